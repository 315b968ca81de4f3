// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

// DefaultContainerdSockets returns where containerd listens: its own place, and
// that of k3s and RKE2.
func DefaultContainerdSockets() []string {
	return []string{"/run/containerd/containerd.sock", "/run/k3s/containerd/containerd.sock"}
}

// DefaultCRIODirs returns where CRI-O keeps a directory of each container: its
// run root, which is a tmpfs, as the containers/storage library lays it out.
func DefaultCRIODirs() []string {
	return []string{"/run/containers/storage/overlay-containers"}
}

// RuntimeConfig configures a Runtime.
type RuntimeConfig struct {
	// ContainerdSockets are tried in this order; nil means
	// DefaultContainerdSockets, an empty slice none. To connect takes root.
	ContainerdSockets []string
	// Namespace is containerd's, in which the kubelet's containers are; empty
	// means k8s.io.
	Namespace string
	// CRIODirs are read, every one that exists; nil means DefaultCRIODirs, an
	// empty slice none.
	CRIODirs []string
	// Now is the clock, time.Now if nil.
	Now func() time.Time
	// Logger is slog.Default() if nil.
	Logger *slog.Logger
}

// Runtime learns from the node's container runtime what pods and containers are
// called. Nothing on the way of a request waits for it or needs it: without a
// runtime, or with one that hangs, pods are served alike and shown by UID.
//
// It reads only. It is safe for concurrent use.
//
// How the agent uses it: NewRuntime, Run beside Index.Run, Metadata and
// Container for the audit record and the admin socket.
type Runtime struct {
	cfg     RuntimeConfig
	log     *slog.Logger
	catalog *catalog

	mu     sync.Mutex
	status []*RuntimeStatus // of the runtimes that were seen

	retryMin, retryMax time.Duration
	// settle is when containerd is listed for the second time: it does not
	// acknowledge a subscription, so the first list may be older than that by a
	// moment. relist is how often it is listed then, although events tell.
	settle, relist time.Duration
	poll           time.Duration // how often CRI-O's directories are read
}

// RuntimeStatus says how a runtime of the node can be reached, for people.
type RuntimeStatus struct {
	// Runtime is RuntimeContainerd or RuntimeCRIO.
	Runtime string `json:"runtime"`
	// Source is the socket or the directory.
	Source string `json:"source"`
	// Connected: what is known is kept up to date. Since is when that last
	// changed; zero if it never was.
	Connected bool      `json:"connected"`
	Since     time.Time `json:"since,omitzero"`
	// Error is why not, empty if Connected.
	Error string `json:"error,omitempty"`
	// Connects counts successful connects, so all after the first are
	// reconnects.
	Connects uint64 `json:"connects"`
	// Pods and Containers are how many are known by name; sandboxes count as
	// containers. Dropped counts records that were left out at a bound, at each
	// look.
	Pods       int    `json:"pods"`
	Containers int    `json:"containers"`
	Dropped    uint64 `json:"dropped"`
}

// NewRuntime makes no connection; Run does.
func NewRuntime(cfg RuntimeConfig) *Runtime {
	if cfg.ContainerdSockets == nil {
		cfg.ContainerdSockets = DefaultContainerdSockets()
	}
	if cfg.CRIODirs == nil {
		cfg.CRIODirs = DefaultCRIODirs()
	}
	if cfg.Namespace == "" {
		cfg.Namespace = "k8s.io"
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	return &Runtime{
		cfg: cfg, log: cfg.Logger, catalog: newCatalog(),
		retryMin: 250 * time.Millisecond, retryMax: 30 * time.Second,
		settle: 5 * time.Second, relist: 10 * time.Minute, poll: 5 * time.Second,
	}
}

// Metadata returns what the runtime says of a pod; false if it says nothing. It
// reads memory only. The maps and slices are not to be changed.
func (r *Runtime) Metadata(uid evidence.PodUID) (Metadata, bool) { return r.catalog.metadata(uid) }

// Container returns a container of a pod; false if the runtime knows none of
// that id in that pod. A container's id is read from the name of a cgroup that
// the workload may have made, so it is looked for in the pod that the kernel
// names, and nowhere else.
func (r *Runtime) Container(uid evidence.PodUID, id string) (Container, bool) {
	r.catalog.mu.RLock()
	defer r.catalog.mu.RUnlock()
	rec := r.catalog.byID[id]
	if rec == nil || rec.uid != uid {
		return Container{}, false
	}
	c := rec.container()
	if rec.sandbox {
		// The kubelet's name for it.
		c.Name = "POD"
	}
	return c, true
}

// FindContainer returns whose a container is, by its id or a unique beginning
// of at least 6 digits; false if there is none, or more than one. For people's
// questions, never for a connection's evidence.
func (r *Runtime) FindContainer(id string) (evidence.PodUID, string, bool) {
	return r.catalog.find(id)
}

// FindPod returns the pods of a namespace with a name, in no order: more than
// one if the runtime still has a record of an ended one. An empty namespace
// means all. For people's questions.
func (r *Runtime) FindPod(namespace, name string) []evidence.PodUID {
	return r.catalog.named(namespace, name)
}

// Status returns the runtimes that were found on the node: one, as a rule; none
// if there was no socket and no directory yet.
func (r *Runtime) Status() []RuntimeStatus {
	r.mu.Lock()
	out := make([]RuntimeStatus, 0, len(r.status))
	for _, s := range r.status {
		out = append(out, *s)
	}
	r.mu.Unlock()
	for i := range out {
		out[i].Pods, out[i].Containers, out[i].Dropped = r.catalog.counts(out[i].Runtime)
	}
	return out
}

// Run keeps the metadata up to date until the context ends, and returns nil
// then. It waits for a runtime that is not there yet and reconnects to one that
// went away; what was known is kept meanwhile.
func (r *Runtime) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	if len(r.cfg.CRIODirs) > 0 {
		wg.Go(func() { r.runCRIO(ctx) })
	}
	if len(r.cfg.ContainerdSockets) > 0 {
		wg.Go(func() { r.runContainerd(ctx) })
	}
	return nil
}

// of returns a runtime's status. The caller holds mu.
func (r *Runtime) of(runtime string) *RuntimeStatus {
	for _, s := range r.status {
		if s.Runtime == runtime {
			return s
		}
	}
	s := &RuntimeStatus{Runtime: runtime}
	r.status = append(r.status, s)
	return s
}

// connected notes that a source is read.
func (r *Runtime) connected(runtime, source string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.of(runtime)
	s.Source, s.Error, s.Connected, s.Since = source, "", true, r.cfg.Now()
	s.Connects++
}

// lost notes that a source is not read, and says whether that is news.
func (r *Runtime) lost(runtime, source string, err error) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.of(runtime)
	news := s.Connected || s.Error != err.Error()
	if s.Connected {
		s.Connected, s.Since = false, r.cfg.Now()
	}
	s.Source, s.Error = source, err.Error()
	return news
}

// absent notes that a runtime is not there. One that never was is not on this
// node, and no news.
func (r *Runtime) absent(runtime string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.status {
		if s.Runtime != runtime {
			continue
		}
		if s.Connected {
			s.Connected, s.Since = false, r.cfg.Now()
		}
		s.Error = "not there"
	}
}

// pause waits; false if the context ended first.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
