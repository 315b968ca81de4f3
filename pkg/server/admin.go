// SPDX-License-Identifier: Apache-2.0

package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os/user"
	"reflect"
	"strconv"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/association"
	"github.com/latchkey-dev/latchkey/pkg/nodeauth/exchange"
)

// Paths of the admin socket. It is JSON over HTTP on a unix socket that only the
// server's user and root can open; nothing on it can hold a secret or a token,
// by type. Only the CLI of the same version speaks it: it is no public API.
const (
	pathStatus       = "/v1/status"
	pathDoctor       = "/v1/doctor"
	pathSnapshot     = "/v1/snapshot"
	pathClusters     = "/v1/clusters"
	pathAssociations = "/v1/associations"
	pathImport       = "/v1/import"
	pathReloadUsers  = "/v1/users/reload"
	pathNodeKeys     = "/v1/node-keys"
)

// maxAdmin bounds a request on the admin socket: a file of 5,000 associations
// with tags and policies.
const maxAdmin = 64 << 20

// Status is the server itself.
type Status struct {
	Version  string    `json:"version"`
	Started  time.Time `json:"started"`
	Listen   string    `json:"listen"`
	TLS      bool      `json:"tls"`
	STS      string    `json:"sts"`
	StateDir string    `json:"stateDir"`
	// UsersFile is the users file's path.
	UsersFile string `json:"usersFile"`
	// NodeBinding is the setting's value.
	NodeBinding string `json:"nodeBinding"`
	// Clusters and Associations are what the index holds, Revision the store's
	// revision that it has reached, Behind how old it may be, in seconds.
	Clusters     int     `json:"clusters"`
	Associations int     `json:"associations"`
	Revision     int64   `json:"revision"`
	Behind       float64 `json:"behindSeconds"`
	Users        int     `json:"users"`
	// Ready is what /readyz says; empty if ready.
	NotReady string `json:"notReady,omitempty"`
}

// Problem is the body of every answer that is not 200.
type Problem struct {
	// Kind is a word of problemKinds; it chooses the CLI's exit code.
	Kind  string `json:"kind"`
	Error string `json:"error"`
}

// Kinds of a Problem.
const (
	problemInvalid     = "invalid"
	problemNotFound    = "not_found"
	problemConflict    = "conflict"
	problemUnavailable = "unavailable"
	problemInternal    = "internal"
)

type associationList struct {
	Associations []AssociationSpec `json:"associations"`
}

type clusterList struct {
	Clusters []ClusterSpec `json:"clusters"`
}

type putClusterRequest struct {
	Cluster ClusterSpec `json:"cluster"`
	Replace bool        `json:"replace,omitempty"`
}

type importRequest struct {
	File   AssociationFile `json:"file"`
	Prune  bool            `json:"prune,omitempty"`
	DryRun bool            `json:"dryRun,omitempty"`
}

type rotateRequest struct {
	Revoke bool `json:"revoke,omitempty"`
}

// NodeKeys are the keys that seal nodes' credentials, without secrets.
type NodeKeys struct {
	Keys []exchange.KeyStatus `json:"keys"`
}

// selector names one association: by ID, or by what it is for.
type selector struct {
	Cluster        string `json:"clusterName"`
	Namespace      string `json:"namespace,omitempty"`
	ServiceAccount string `json:"serviceAccount,omitempty"`
	ID             string `json:"associationId,omitempty"`
}

type updateRequest struct {
	selector
	Update
}

// admin serves the socket.
type admin struct {
	control *control
	log     *slog.Logger
	status  func() Status
	doctor  func(context.Context) []Finding
	// snapshot writes the store's content and returns its length.
	snapshot func(context.Context, io.Writer) (int64, error)
	// reloadUsers reads the users file now.
	reloadUsers func() error
	// ring has the keys that seal nodes' credentials.
	ring *exchange.Ring
}

type whoKey struct{}

// who is the user at the other end of the socket, as the kernel names it.
func who(ctx context.Context) string {
	uid, ok := ctx.Value(whoKey{}).(uint32)
	if !ok {
		return "admin socket"
	}
	id := strconv.FormatUint(uint64(uid), 10)
	if u, err := user.LookupId(id); err == nil {
		return "admin socket: " + u.Username
	}
	return "admin socket: uid " + id
}

func (a *admin) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+pathStatus, answer(func(*http.Request, *struct{}) (any, error) { return a.status(), nil }))
	mux.HandleFunc("GET "+pathDoctor, answer(func(r *http.Request, _ *struct{}) (any, error) { return a.doctor(r.Context()), nil }))
	mux.HandleFunc("GET "+pathSnapshot, a.serveSnapshot)

	mux.HandleFunc("GET "+pathClusters, answer(func(r *http.Request, _ *struct{}) (any, error) {
		all, err := a.control.clusters(r.Context())
		return clusterList{all}, err
	}))
	mux.HandleFunc("PUT "+pathClusters, answer(func(r *http.Request, in *putClusterRequest) (any, error) {
		return a.control.putCluster(r.Context(), who(r.Context()), in.Cluster, in.Replace)
	}))
	mux.HandleFunc("GET "+pathClusters+"/{name}", answer(func(r *http.Request, _ *struct{}) (any, error) {
		c, err := a.control.store.Cluster(r.Context(), r.PathValue("name"))
		return specOf(c), err
	}))
	mux.HandleFunc("DELETE "+pathClusters+"/{name}", answer(func(r *http.Request, _ *struct{}) (any, error) {
		return struct{}{}, a.control.deleteCluster(r.Context(), who(r.Context()), r.PathValue("name"), r.URL.Query().Get("force") == "true")
	}))

	mux.HandleFunc("GET "+pathAssociations, answer(func(r *http.Request, _ *struct{}) (any, error) {
		q := r.URL.Query()
		all, err := a.control.list(r.Context(), q.Get("clusterName"), q.Get("namespace"), q.Get("serviceAccount"))
		out := associationList{Associations: make([]AssociationSpec, 0, len(all))}
		for _, one := range all {
			out.Associations = append(out.Associations, associationSpecOf(one))
		}
		return out, err
	}))
	mux.HandleFunc("POST "+pathAssociations, answer(func(r *http.Request, in *AssociationSpec) (any, error) {
		one, err := a.control.create(r.Context(), who(r.Context()), *in)
		a.control.settle(r.Context(), one.Revision)
		return associationSpecOf(one), err
	}))
	one := func(do func(ctx context.Context, is association.Association, in *updateRequest) (association.Association, error)) http.HandlerFunc {
		return answer(func(r *http.Request, in *updateRequest) (any, error) {
			is, err := a.control.find(r.Context(), in.Cluster, in.Namespace, in.ServiceAccount, in.ID)
			if err != nil {
				return nil, err
			}
			is, err = do(r.Context(), is, in)
			a.control.settle(r.Context(), is.Revision)
			return associationSpecOf(is), err
		})
	}
	mux.HandleFunc("POST "+pathAssociations+"/describe", one(func(_ context.Context, is association.Association, _ *updateRequest) (association.Association, error) {
		return is, nil
	}))
	mux.HandleFunc("POST "+pathAssociations+"/update", one(func(ctx context.Context, is association.Association, in *updateRequest) (association.Association, error) {
		return a.control.update(ctx, who(ctx), is, in.Update)
	}))
	mux.HandleFunc("POST "+pathAssociations+"/delete", one(func(ctx context.Context, is association.Association, _ *updateRequest) (association.Association, error) {
		return a.control.remove(ctx, who(ctx), is)
	}))
	mux.HandleFunc("POST "+pathImport, answer(func(r *http.Request, in *importRequest) (any, error) {
		return a.control.importFile(r.Context(), who(r.Context()), in.File, in.Prune, in.DryRun)
	}))
	mux.HandleFunc("POST "+pathReloadUsers, answer(func(*http.Request, *struct{}) (any, error) {
		return struct{}{}, a.reloadUsers()
	}))
	mux.HandleFunc("GET "+pathNodeKeys, answer(func(*http.Request, *struct{}) (any, error) { return NodeKeys{a.ring.Status()}, nil }))
	mux.HandleFunc("POST "+pathNodeKeys+"/rotate", answer(func(r *http.Request, in *rotateRequest) (any, error) {
		err := a.ring.Rotate(r.Context(), in.Revoke)
		if err != nil {
			err = fmt.Errorf("%w: %w", association.ErrUnavailable, err)
		}
		a.control.note(who(r.Context()), "RotateNodeKeys", "", "", nil, in, err)
		return NodeKeys{a.ring.Status()}, err
	}))
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		writeJSON(w, http.StatusNotFound, Problem{problemNotFound, "this server knows no " + r.Method + " " + r.URL.Path})
	})
	return mux
}

// answer makes a handler of a function from a JSON body to a JSON answer.
func answer[In any](do func(*http.Request, *In) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var in In
		if r.Method != http.MethodGet && r.Method != http.MethodDelete {
			dec := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxAdmin))
			dec.DisallowUnknownFields()
			if err := dec.Decode(&in); err != nil {
				writeJSON(w, http.StatusBadRequest, Problem{problemInvalid, "the request cannot be read: " + err.Error()})
				return
			}
		}
		out, err := do(r, &in)
		if err != nil {
			status, p := problemOf(err)
			writeJSON(w, status, p)
			return
		}
		writeJSON(w, http.StatusOK, out)
	}
}

// problemOf maps an error to a Problem. The caller owns the server, so the
// error's whole text is answered.
func problemOf(err error) (int, Problem) {
	p := Problem{problemInternal, err.Error()}
	switch {
	case errors.Is(err, association.ErrClusterNotFound), errors.Is(err, association.ErrNotFound), errors.Is(err, association.ErrTagsNotFound):
		p.Kind = problemNotFound
		return http.StatusNotFound, p
	case errors.Is(err, association.ErrInUse):
		p.Kind = problemConflict
		return http.StatusConflict, p
	case errors.Is(err, association.ErrUnavailable), errors.Is(err, context.DeadlineExceeded):
		p.Kind = problemUnavailable
		return http.StatusServiceUnavailable, p
	case errors.Is(err, association.ErrInvalidParameter), errors.Is(err, association.ErrInvalidRequest), errors.Is(err, association.ErrLimitExceeded),
		errors.Is(err, association.ErrBadTags), errors.Is(err, ErrConfig):
		p.Kind = problemInvalid
		return http.StatusBadRequest, p
	}
	return http.StatusInternalServerError, p
}

// serveSnapshot streams the store's content. Its end is marked in a trailer, so
// that a stream that broke is not taken for a backup.
func (a *admin) serveSnapshot(w http.ResponseWriter, r *http.Request) {
	// A large store takes longer than the server's general limit.
	_ = http.NewResponseController(w).SetWriteDeadline(time.Time{})
	w.Header().Set("Trailer", trailerDone)
	w.Header().Set("Content-Type", "application/octet-stream")
	n, err := a.snapshot(r.Context(), w)
	if err != nil {
		a.log.Error("snapshot failed", "error", err)
		if n == 0 {
			w.Header().Del("Trailer")
			status, p := problemOf(err)
			writeJSON(w, status, p)
		}
		return
	}
	w.Header().Set(trailerDone, strconv.FormatInt(n, 10))
	a.control.note(who(r.Context()), "SaveSnapshot", "", "", nil, map[string]int64{"bytes": n}, nil)
}

const trailerDone = "X-Latchkey-Bytes"

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	_ = enc.Encode(v)
}

// equalJSON compares two values as they would be written.
func equalJSON(a, b any) bool {
	var x, y any
	ja, err1 := json.Marshal(a)
	jb, err2 := json.Marshal(b)
	if err := errors.Join(err1, err2, json.Unmarshal(ja, &x), json.Unmarshal(jb, &y)); err != nil {
		return false
	}
	return reflect.DeepEqual(x, y)
}

// Finding is one line of `latchkey-server doctor`.
type Finding struct {
	// Level is ok, warn or fail.
	Level string `json:"level"`
	// What was looked at, What was found, and what to do about it.
	What  string `json:"what"`
	Found string `json:"found"`
	Fix   string `json:"fix,omitempty"`
}

// Levels of a Finding.
const (
	LevelOK   = "ok"
	LevelWarn = "warn"
	LevelFail = "fail"
)

func ok(what, format string, args ...any) Finding {
	return Finding{Level: LevelOK, What: what, Found: fmt.Sprintf(format, args...)}
}

func warn(what, fix, format string, args ...any) Finding {
	return Finding{LevelWarn, what, fmt.Sprintf(format, args...), fix}
}

func fail(what, fix, format string, args ...any) Finding {
	return Finding{LevelFail, what, fmt.Sprintf(format, args...), fix}
}
