// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/pkg/adminapi"
	"github.com/latchkey-dev/latchkey/pkg/adminsocket"
	"github.com/latchkey-dev/latchkey/pkg/eksauth"
	"github.com/latchkey-dev/latchkey/pkg/evidence"
	"github.com/latchkey-dev/latchkey/pkg/satoken"
)

// listenAdmin makes the admin socket.
func listenAdmin(ctx context.Context, socket string) (net.Listener, error) {
	ln, err := adminsocket.Listen(ctx, socket)
	if errors.Is(err, adminsocket.ErrInUse) {
		return nil, fmt.Errorf("%w, and listens on %s", ErrAnotherAgent, socket)
	}
	return ln, err
}

// errNotImplemented: this agent was built or configured without it.
var errNotImplemented = errors.New("not supported by this agent")

// adminHandler serves pkg/adminapi.
func (a *Agent) adminHandler() http.Handler {
	mux := http.NewServeMux()
	handle := func(pattern string, f func(*http.Request) (any, error)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			answer, err := f(r)
			if err != nil {
				writeJSON(w, statusOf(err), adminapi.Problem{Error: problemText(err)})
				return
			}
			writeJSON(w, http.StatusOK, answer)
		})
	}
	query := func(name string, f func(string) (any, error)) func(*http.Request) (any, error) {
		return func(r *http.Request) (any, error) { return f(r.URL.Query().Get(name)) }
	}
	handle("GET "+adminapi.PathStatus, func(*http.Request) (any, error) { return a.status(), nil })
	handle("GET "+adminapi.PathPods, func(*http.Request) (any, error) { return adminapi.Pods{Pods: a.pods()}, nil })
	handle("GET "+adminapi.PathWhois, query("q", func(q string) (any, error) { return a.whois(q) }))
	handle("GET "+adminapi.PathFacts, query("q", func(q string) (any, error) { return a.facts(q) }))
	handle("GET "+adminapi.PathDenials, query("after", func(after string) (any, error) { return a.denialsAfter(after) }))
	handle("GET "+adminapi.PathCache, func(*http.Request) (any, error) { return a.cacheState(), nil })
	handle("POST "+adminapi.PathCacheDrop, query("subject", func(s string) (any, error) { return a.dropCached(s) }))
	handle("POST "+adminapi.PathCacheRefresh, query("subject", func(s string) (any, error) { return a.refreshCached(s) }))
	handle("POST "+adminapi.PathToken, a.checkToken)
	handle("POST "+adminapi.PathUpstream, a.reachUpstream)
	handle("GET "+adminapi.PathLogLevel, func(*http.Request) (any, error) { return a.logLevels() })
	handle("PUT "+adminapi.PathLogLevel, a.setLogLevel)
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		writeJSON(w, http.StatusNotFound, adminapi.Problem{Error: "this agent knows no " + r.URL.Path})
	})
	return mux
}

func statusOf(err error) int {
	switch {
	case errors.Is(err, adminapi.ErrInvalid):
		return http.StatusBadRequest
	case errors.Is(err, adminapi.ErrNotFound):
		return http.StatusNotFound
	case errors.Is(err, errNotImplemented):
		return http.StatusNotImplemented
	}
	return http.StatusInternalServerError
}

// problemText leaves out the sentinel's text, which the client adds again.
func problemText(err error) string {
	t := err.Error()
	for _, s := range []error{adminapi.ErrInvalid, adminapi.ErrNotFound, errNotImplemented} {
		t = strings.TrimPrefix(t, s.Error()+": ")
	}
	return t
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v)
}

func (a *Agent) status() adminapi.Status {
	s := adminapi.Status{
		Version: a.cfg.Version, Started: a.started, Cluster: a.cfg.ClusterName,
		Attestation: a.cfg.Policy.Default.String(),
		Attesting:   a.node != nil,
		Fallbacks:   a.fallbacks(),
		Keys:        a.tokens.what,
		Listeners:   a.listeners.list(),
		Time:        time.Now(), PID: os.Getpid(), Audience: a.audience(),
		Upstream: a.upstreamState(),
	}
	if len(a.cfg.Policy.Namespaces) > 0 {
		s.Exceptions = map[string]string{}
		for ns, m := range a.cfg.Policy.Namespaces {
			s.Exceptions[ns] = m.String()
		}
	}
	if a.admin.cannotAttest != nil {
		s.CannotAttest = a.admin.cannotAttest.Error()
	}
	if a.node != nil {
		s.Kubepods, s.AttachedAt, s.CgroupMount = a.node.root.Path(), a.node.attachAt, a.node.mount.Point
		if id, err := a.node.resolver.ID(a.node.attachAt); err == nil {
			s.AttachedID = uint64(id)
		}
		kernel := a.node.kernel.Status()
		s.Pins, s.ReusedLinks = kernel.Directory, kernel.ReusedLinks
		if events, err := a.node.kernel.Events(); err == nil {
			s.BPF = make(map[string]uint64, len(events))
			for _, e := range events {
				s.BPF[e.Name] = e.Count
			}
		}
	}
	var own unix.Stat_t
	if err := unix.Stat("/proc/self/ns/net", &own); err == nil {
		s.Netns = uint32(own.Ino)
	}
	if k := a.admin.keeper; k != nil {
		r := k.State()
		for _, at := range r.Addresses {
			addr := adminapi.Address{Address: at.Address.String(), Present: at.Present, Link: r.Link, Repairs: at.Repairs}
			if at.Err != nil {
				addr.Error = at.Err.Error()
			}
			s.Addresses = append(s.Addresses, addr)
		}
	}
	return s
}

func (a *Agent) audience() string {
	if a.cfg.Audience != "" {
		return a.cfg.Audience
	}
	return satoken.DefaultAudience
}

func (a *Agent) fallbacks() []string {
	if a.node == nil {
		return nil
	}
	return a.node.kernel.Status().Fallbacks
}

// upstreamState tells how calls of EKS Auth went.
func (a *Agent) upstreamState() adminapi.Upstream {
	c := a.admin.upstream
	if c == nil {
		return adminapi.Upstream{Credentials: adminapi.NodeCredentials{State: "unknown"}}
	}
	s := c.State()
	u := adminapi.Upstream{
		Endpoint: c.Endpoint(), LastCall: timeOrNil(s.LastCall), LastSuccess: timeOrNil(s.LastSuccess),
		LastError: upstreamError(reasonOf(eksauth.ClassOf(s.LastError)), s.LastError), ClockSkewAt: timeOrNil(s.SkewAt),
		Credentials: adminapi.NodeCredentials{State: "unknown", Source: s.Credentials.Source, Expires: timeOrNil(s.Credentials.Expires)},
	}
	if !s.SkewAt.IsZero() {
		u.ClockSkew = seconds(s.Skew)
	}
	switch {
	case s.Credentials.Err != nil:
		u.Credentials.State, u.Credentials.Error = "missing", s.Credentials.Err.Error()
	case s.Credentials.Refused:
		u.Credentials.State = "refused"
	case s.Credentials.Source != "":
		u.Credentials.State = "ok"
	}
	return u
}

// upstreamError describes a failed call; nil for none.
func upstreamError(reason evidence.Reason, err error) *adminapi.UpstreamError {
	if err == nil {
		return nil
	}
	out := &adminapi.UpstreamError{Reason: string(reason), Message: err.Error()}
	var api *eksauth.APIError
	if errors.As(err, &api) {
		out.Status, out.Code, out.Message, out.RequestID = api.Status, api.Code, api.Message, api.RequestID
	}
	return out
}

// reachUpstream makes one request that asks for nothing.
func (a *Agent) reachUpstream(r *http.Request) (any, error) {
	c := a.admin.upstream
	if c == nil {
		return nil, errNotImplemented
	}
	out := adminapi.Reached{Endpoint: c.Endpoint()}
	got, err := c.Reach(r.Context())
	if err != nil {
		out.Error = err.Error()
		return out, nil
	}
	out.Status, out.Milliseconds = got.Status, got.Took.Milliseconds()
	if got.HasSkew {
		out.ClockSkew = seconds(got.Skew)
	}
	return out, nil
}

func timeOrNil(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

func seconds(d time.Duration) *float64 {
	s := d.Seconds()
	return &s
}
