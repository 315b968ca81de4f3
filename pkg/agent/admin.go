// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/pkg/adminapi"
	"github.com/latchkey-dev/latchkey/pkg/cgroup"
	"github.com/latchkey-dev/latchkey/pkg/evidence"
	"github.com/latchkey-dev/latchkey/pkg/pods"
)

// listenAdmin makes the socket in a directory of root's alone; the permissions
// of a socket itself are not checked by every kernel feature that reaches it,
// those of its directory are. A socket that nobody listens on any more, left by
// a killed agent, is replaced.
func listenAdmin(ctx context.Context, socket string) (net.Listener, error) {
	dir := filepath.Dir(socket)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("admin socket: %w", err)
	}
	if fi, err := os.Lstat(socket); err == nil {
		if fi.Mode()&fs.ModeSocket == 0 {
			return nil, fmt.Errorf("admin socket: %s is there and is no socket", socket)
		}
		if c, err := (&net.Dialer{}).DialContext(ctx, "unix", socket); err == nil {
			c.Close()
			return nil, fmt.Errorf("%w, and listens on %s", ErrAnotherAgent, socket)
		}
		if err := os.Remove(socket); err != nil {
			return nil, fmt.Errorf("admin socket: %w", err)
		}
	}
	ln, err := (&net.ListenConfig{}).Listen(ctx, "unix", socket)
	if err != nil {
		return nil, fmt.Errorf("admin socket: %w", err)
	}
	if err := os.Chmod(socket, 0o600); err != nil {
		ln.Close()
		return nil, fmt.Errorf("admin socket: %w", err)
	}
	return &rootOnly{ln.(*net.UnixListener)}, nil
}

// rootOnly closes connections of anybody but root (or whoever runs the agent),
// as the kernel names the peer, should the directory's mode have been changed.
type rootOnly struct{ *net.UnixListener }

func (l *rootOnly) Accept() (net.Conn, error) {
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		if uid, err := peerUID(c); err == nil && (uid == 0 || uid == uint32(os.Geteuid())) {
			return c, nil
		}
		c.Close()
	}
}

func peerUID(c *net.UnixConn) (uint32, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var cerr error
	if err := raw.Control(func(fd uintptr) {
		cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, err
	}
	if cerr != nil {
		return 0, cerr
	}
	return cred.Uid, nil
}

func (a *Agent) adminHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+adminapi.PathStatus, func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, http.StatusOK, a.status()) })
	mux.HandleFunc("GET "+adminapi.PathPods, func(w http.ResponseWriter, _ *http.Request) {
		writeJSON(w, http.StatusOK, adminapi.Pods{Pods: a.pods()})
	})
	mux.HandleFunc("GET "+adminapi.PathWhois, func(w http.ResponseWriter, r *http.Request) {
		who, err := a.whois(r.URL.Query().Get("q"))
		switch {
		case err == nil:
			writeJSON(w, http.StatusOK, who)
		case errors.Is(err, adminapi.ErrInvalid):
			writeJSON(w, http.StatusBadRequest, adminapi.Problem{Error: problemText(err)})
		case errors.Is(err, adminapi.ErrNotFound):
			writeJSON(w, http.StatusNotFound, adminapi.Problem{Error: problemText(err)})
		default:
			writeJSON(w, http.StatusInternalServerError, adminapi.Problem{Error: err.Error()})
		}
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		writeJSON(w, http.StatusNotFound, adminapi.Problem{Error: "this agent knows no " + r.URL.Path})
	})
	return mux
}

// problemText leaves out the sentinel's text, which the client adds again.
func problemText(err error) string {
	t := err.Error()
	for _, s := range []error{adminapi.ErrInvalid, adminapi.ErrNotFound} {
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
	}
	if len(a.cfg.Policy.Namespaces) > 0 {
		s.Exceptions = map[string]string{}
		for ns, m := range a.cfg.Policy.Namespaces {
			s.Exceptions[ns] = m.String()
		}
	}
	if a.node != nil {
		s.Kubepods, s.AttachedAt = a.node.root.Path(), a.node.attachAt
		if events, err := a.node.kernel.Events(); err == nil {
			s.BPF = make(map[string]uint64, len(events))
			for _, e := range events {
				s.BPF[e.Name] = e.Count
			}
		}
	}
	return s
}

func (a *Agent) fallbacks() []string {
	if a.node == nil {
		return nil
	}
	return a.node.kernel.Status().Fallbacks
}

// pods joins what the kernel says of the node with what the cache holds.
func (a *Agent) pods() []adminapi.Pod {
	cached := a.cached()
	var out []adminapi.Pod
	if a.node != nil {
		for _, info := range a.node.index.List() {
			out = append(out, a.describe(info.UID, info.Path, string(info.QoS), cached))
		}
		return out
	}
	// Without the kernel's list: the pods that asked.
	for uid := range cached {
		out = append(out, a.describe(uid, "", "", cached))
	}
	return out
}

func (a *Agent) describe(uid evidence.PodUID, cgroupPath, qos string, cached map[evidence.PodUID]cachedPod) adminapi.Pod {
	p := adminapi.Pod{UID: string(uid), Cgroup: cgroupPath, QoS: qos, Credentials: "none"}
	if c, ok := cached[uid]; ok {
		p.Namespace, p.ServiceAccount = c.namespace, c.serviceAccount
		p.Role, p.Association, p.Credentials, p.Expires = c.role, c.association, c.state, c.expires
		if !c.lastUsed.IsZero() {
			used := c.lastUsed
			p.LastAsked, p.Verdict = &used, string(evidence.ReasonServed)
		}
	}
	if last, ok := a.observer.last(uid); ok {
		if s := last.Token.Subject; s.PodUID != "" {
			p.Namespace, p.ServiceAccount, p.Name = s.Namespace, s.ServiceAccount, last.Token.PodName
		}
		if p.LastAsked == nil || last.At.After(*p.LastAsked) {
			at := last.At
			p.LastAsked, p.Verdict = &at, string(last.Reason)
			switch {
			case last.Shadow:
				p.Verdict = "served despite " + p.Verdict
			case last.Status != http.StatusOK:
				p.Verdict = fmt.Sprintf("refused %d %s", last.Status, last.Reason)
			}
		}
	}
	return p
}

// whois follows the evidence from what was asked to a pod, as far as it goes.
func (a *Agent) whois(query string) (adminapi.Whois, error) {
	who := adminapi.Whois{Query: query}
	step := func(what, value, source string) {
		who.Steps = append(who.Steps, adminapi.Step{What: what, Value: value, Source: source})
	}
	if a.node == nil {
		return who, fmt.Errorf("%w: this agent does not attest, so it knows no cgroups", adminapi.ErrNotFound)
	}
	var cgroupPath string
	switch {
	case query == "":
		return who, fmt.Errorf("%w: give a pid, ip:port, cgroup path, cgroup:ID or pod UID", adminapi.ErrInvalid)
	case strings.HasPrefix(query, "/"):
		cgroupPath = strings.TrimSuffix(strings.TrimPrefix(query, strings.TrimSuffix(a.node.mount.Point, "/")), "/")
		id, err := a.node.resolver.ID(cgroupPath)
		if err != nil {
			return who, fmt.Errorf("%w: no cgroup %s: %w", adminapi.ErrNotFound, cgroupPath, err)
		}
		step("cgroup", cgroupPath, "as asked")
		step("cgroup id", id.String(), "kernel, name_to_handle_at")
	case strings.HasPrefix(query, "cgroup:"):
		id, err := strconv.ParseUint(query[len("cgroup:"):], 10, 64)
		if err != nil {
			return who, fmt.Errorf("%w: %q: a cgroup id is a decimal number", adminapi.ErrInvalid, query)
		}
		if cgroupPath, err = a.node.resolver.Path(evidence.CgroupID(id)); err != nil {
			return who, fmt.Errorf("%w: cgroup id %d: %w", adminapi.ErrNotFound, id, err)
		}
		step("cgroup", cgroupPath, "kernel, open_by_handle_at")
	default:
		if end, err := netip.ParseAddrPort(query); err == nil {
			c, ok := a.attestor.recent.find(end)
			if !ok {
				return who, fmt.Errorf("%w: no recent connection from %s (the last %d are remembered)", adminapi.ErrNotFound, end, maxRecent)
			}
			conn := c.att.Connection
			step("connection", end.String(), "accepted "+c.at.UTC().Format("15:04:05"))
			step("finding", c.att.Finding.String(), "evidence rules")
			if c.att.Reason != "" {
				step("reason", string(c.att.Reason), "evidence rules")
			}
			if c.att.Finding == evidence.FindingNone && conn == (evidence.Connection{}) {
				return who, nil
			}
			step("process", fmt.Sprintf("%d, user %d", conn.TGID, conn.UID), "kernel, at connect")
			step("network namespace", fmt.Sprintf("inode %d, cookie %d", conn.NetnsInode, conn.NetnsCookie), "kernel, client socket")
			if conn.SocketCgroup != conn.TaskCgroup {
				if p, err := a.node.resolver.Path(conn.SocketCgroup); err == nil {
					step("socket's cgroup", p, "kernel, sk_cgrp_data")
				}
			}
			p, err := a.node.resolver.Path(conn.TaskCgroup)
			if err != nil {
				step("cgroup", "gone, was id "+conn.TaskCgroup.String(), "kernel, at connect")
				return who, nil
			}
			cgroupPath = p
			step("cgroup", p, "kernel, connecting task")
			break
		}
		if pid, err := strconv.Atoi(query); err == nil {
			if pid <= 0 {
				return who, fmt.Errorf("%w: pid %d", adminapi.ErrInvalid, pid)
			}
			p, err := a.node.processCgroup(pid)
			if err != nil {
				return who, fmt.Errorf("%w: process %d: %w", adminapi.ErrNotFound, pid, err)
			}
			cgroupPath = p
			step("process", query, "as asked, in the agent's pid namespace")
			step("cgroup", p, "kernel, /proc/"+query+"/cgroup")
			break
		}
		for _, info := range a.node.index.List() {
			if string(info.UID) == strings.ToLower(query) {
				cgroupPath = info.Path
				step("cgroup", info.Path, "cgroup tree")
			}
		}
		if cgroupPath == "" {
			return who, fmt.Errorf("%w: %q is no pid, ip:port, cgroup path or cgroup:ID, and no pod of this node has that UID", adminapi.ErrNotFound, query)
		}
	}
	ref, err := a.node.root.Parse(cgroupPath)
	if err != nil {
		if errors.Is(err, cgroup.ErrNotPod) {
			step("pod", "none: outside "+a.node.root.Path(), "cgroup path")
			return who, nil
		}
		return who, err
	}
	if ref.ContainerID != "" {
		step("container", ref.ContainerID, "cgroup path, for display")
	}
	if info, ok := a.findPod(ref.UID); ok && info.Netns != 0 {
		step("sandbox", fmt.Sprintf("process %d, network namespace %d", info.Sandbox, info.Netns), "/proc")
	}
	pod := a.describe(ref.UID, ref.Path, string(ref.QoS), a.cached())
	who.Pod = &pod
	return who, nil
}

func (a *Agent) findPod(uid evidence.PodUID) (pods.Info, bool) {
	for _, info := range a.node.index.List() {
		if info.UID == uid {
			return info, true
		}
	}
	return pods.Info{}, false
}

// processCgroup reads a process's cgroup v2 path and makes it one below the
// mount.
func (n *node) processCgroup(pid int) (string, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return "", err
	}
	for line := range strings.SplitSeq(string(data), "\n") {
		p, ok := strings.CutPrefix(line, "0::")
		if !ok {
			continue
		}
		root := strings.TrimSuffix(n.mount.Root, "/")
		if p == root {
			return "/", nil
		}
		rest, ok := strings.CutPrefix(p, root+"/")
		if !ok {
			return "", fmt.Errorf("its cgroup %s is outside what the agent sees", p)
		}
		return "/" + rest, nil
	}
	return "", errors.New("it has no cgroup v2 entry")
}
