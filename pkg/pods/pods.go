// SPDX-License-Identifier: Apache-2.0

// Package pods is the node's pods as the kernel shows them: which pods have a
// cgroup now, which pod a recorded cgroup id belongs to, and which network
// namespace is whose.
//
// Three sources, in order of precedence. The cgroup id that the kernel recorded
// decides whose a connection is. The cgroup tree decides whether that pod
// lives; inotify only makes the end known sooner. /proc tells which network
// namespace is a pod's, as a third check that can refuse but never attribute.
//
// What pods and containers are called is another matter, for people and the
// audit record only: Runtime learns it from containerd or CRI-O, beside all
// this. Index never asks it, and the API server is not asked by either.
//
// containerd is asked over net/http's HTTP/2: three calls and a few fields of
// its API, without grpc and the services generated from the API, let alone
// containerd's client. An idle agent is to be no larger than 24 MiB. With them
// it is at that bound on a node whose specifications are short, and beyond it
// where they are longer, as with the environment of many services. Its resident
// memory (VmRSS, MiB) 10 s after the start, 2 to 4 runs of each; containerd has
// 60 records, of 30 pods:
//
//	                                  so         grpc       notrace    codec
//	size of the stripped program, MB  16.7       25.6       18.6       18.6
//	no containerd                     19.7–20.0  25.4–25.5  21.4–21.8
//	shortest specifications, audit    21.3–21.6  27.7       23.2–23.8
//	5 kB longer                                             23.5–24.2  23.3–23.8
//	5 kB longer, audit                                      23.7–23.8  23.8–25.2
//	12 kB longer                      20.9–21.0             23.7–24.5  24.1–24.4
//	12 kB longer, audit               21.2–22.3                        25.0
//	40 kB longer                      20.9–21.3             27.9–28.6  24.6
//	40 kB longer, audit               21.1–21.3             28.4–29.5  25.8–26.2
//
// notrace is grpc built with its tag grpcnotrace, as else the linker keeps every
// method that a template could call; codec has besides the smallest windows and
// a codec of its own, for grpc's takes 1 MiB for a message of over 32 KiB; at
// 12 kB some of its runs do not even copy the specification. All have small
// buffers and fixed windows. containerd's ttrpc socket has neither
// containers nor the stream of events. The tests run these calls against grpc's
// server and against containerd.
package pods

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/cgroup"
	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

// Resolver is what the index asks of the kernel; *cgroup.Resolver is one. All
// paths are below the cgroup2 mount. Errors wrap cgroup.ErrGone and
// cgroup.ErrOutside, anything else means that nothing is known.
type Resolver interface {
	// Path returns a cgroup's path, which may have been removed since.
	Path(id evidence.CgroupID) (string, error)
	// ID returns the id of the directory that has the path now.
	ID(path string) (evidence.CgroupID, error)
	// Forget drops what is cached for a pod-level directory.
	Forget(podDir string)
}

// Config configures an Index.
type Config struct {
	// Root is the node's kubepods directory and Mount where its tree is
	// mounted. Both required.
	Root  cgroup.Root
	Mount cgroup.Mount
	// Resolver is required.
	Resolver Resolver

	// ProcFS is the root of procfs, /proc if empty. It must show the processes
	// of all pods (hostPID) and the agent must be allowed to read their ns/net
	// links (CAP_SYS_PTRACE), else every network namespace is unknown.
	ProcFS string
	// HostNetns and HostNetnsCookie are the host's network namespace
	// (OwnNetns, in an agent on the host network). Zero means not known; with
	// no inode no connection is refused for using the host's.
	HostNetns       evidence.NetnsInode
	HostNetnsCookie evidence.NetnsCookie

	// RescanEvery is how often the whole tree is compared although nothing was
	// reported; 0 means 10 s.
	RescanEvery time.Duration
	// Now is the clock, time.Now if nil.
	Now func() time.Time
	// Logger is slog.Default() if nil.
	Logger *slog.Logger

	// OnPod, OnEnd and OnQoS report a pod that appeared, a pod that ended, and
	// a QoS directory that appeared. They are called one at a time, by the
	// goroutine that runs Run, a pod's OnPod before its OnEnd. They must not
	// block: the next end waits for them. Nil ones are left out.
	OnPod func(*Pod)
	OnEnd func(*Pod)
	OnQoS func(evidence.CgroupID)
}

// Pod is one pod for as long as its cgroup exists. If the same pod's directory
// is removed and made again, that is another Pod; the first stays ended.
type Pod struct {
	// UID is the pod's, read from the name that the kubelet gave the directory.
	UID evidence.PodUID
	// Path is the pod-level directory below the cgroup2 mount, ID its id.
	Path string
	ID   evidence.CgroupID
	// QoS is the class.
	QoS cgroup.QoS
	// FirstSeen is when the index learned of the pod: within a moment of its
	// start if the index ran then. The kernel keeps no birth time of a cgroup.
	FirstSeen time.Time

	ended atomic.Bool
	netns podNetns
}

// Ended says whether the pod's cgroup is gone. It costs one atomic load, never
// goes back to false, and turns true within 100 ms of the removal while
// Index.Run runs.
func (p *Pod) Ended() bool { return p.ended.Load() && !proofOff("pod_liveness") }

// Info is a Pod at one moment, for the admin socket.
type Info struct {
	UID       evidence.PodUID     `json:"uid"`
	Path      string              `json:"cgroup_path"`
	CgroupID  evidence.CgroupID   `json:"cgroup_id"`
	QoS       cgroup.QoS          `json:"qos"`
	FirstSeen time.Time           `json:"first_seen"`
	Netns     evidence.NetnsInode `json:"netns_inode,omitempty"` // 0: not known
	HostNet   bool                `json:"host_network"`
	Sandbox   int                 `json:"sandbox_pid,omitempty"` // 0: not known
}

// Stats counts what the index did since it was made.
type Stats struct {
	// Pods is how many live now.
	Pods int
	// Watching: ends are reported by inotify; if false, by polling.
	Watching bool
	// Scans is how often the whole tree was listed, Overflows how often because
	// the kernel's event queue had overflowed.
	Scans, Overflows uint64
	// LazyPods is how many pods were found by a connection before the watch
	// told of them.
	LazyPods uint64
	// UnknownNetns counts connections accepted from a network namespace that
	// is no pod's sandbox; ForeignNetns those refused.
	UnknownNetns, ForeignNetns uint64
	// Unresolved counts connections whose cgroup is gone or could not be read.
	Unresolved uint64
	// Errors counts questions about the tree that the kernel did not answer,
	// other than by "gone". They change nothing about any pod.
	Errors uint64
}

// Index holds the node's pods. It is safe for concurrent use.
type Index struct {
	cfg Config
	log *slog.Logger

	// mu guards the maps and orders the queue. It is write-locked for a map
	// update only, never over a system call.
	mu      sync.RWMutex
	byDir   map[string]*Pod
	byNetns map[evidence.NetnsInode]*Pod // sandboxes, without the host's
	qos     map[string]evidence.CgroupID
	queue   []notice

	// listing guards listed, when a connection last had the tree listed, and is
	// held meanwhile.
	listing sync.Mutex
	listed  time.Time

	// trouble is what was last logged about watching; Run's goroutine's alone.
	trouble string

	wake  chan struct{} // queue is not empty
	ready chan struct{} // closed after the first scan
	once  sync.Once

	watching                      atomic.Bool
	scans, overflows, lazyPods    atomic.Uint64
	unknownNetns, foreignNetns    atomic.Uint64
	unresolved, errors            atomic.Uint64
	sandboxWalks, sandboxVerifies atomic.Uint64
}

// notice is one call of a callback that is due.
type notice struct {
	pod   *Pod
	ended bool
	qos   evidence.CgroupID
}

// ErrConfig: a required field of Config is missing.
var ErrConfig = errors.New("invalid pod index configuration")

// New returns an index that is empty until Run has made its first scan. Resolve
// and Attest work without: they look at the tree themselves. But pods end only
// while Run runs. The error wraps ErrConfig.
func New(cfg Config) (*Index, error) {
	if cfg.Root.Path() == "" || cfg.Mount.Point == "" || cfg.Resolver == nil {
		return nil, fmt.Errorf("%w: Root, Mount and Resolver are required", ErrConfig)
	}
	if cfg.ProcFS == "" {
		cfg.ProcFS = "/proc"
	}
	if cfg.RescanEvery <= 0 {
		cfg.RescanEvery = 10 * time.Second
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	return &Index{
		cfg: cfg, log: cfg.Logger,
		byDir:   make(map[string]*Pod),
		byNetns: make(map[evidence.NetnsInode]*Pod),
		qos:     make(map[string]evidence.CgroupID),
		wake:    make(chan struct{}, 1),
		ready:   make(chan struct{}),
	}, nil
}

// Ready is closed once Run has listed the tree and has called the callbacks for
// what it found.
func (x *Index) Ready() <-chan struct{} { return x.ready }

// RootID returns the id of the kubepods directory itself.
func (x *Index) RootID() (evidence.CgroupID, error) { return x.cfg.Resolver.ID(x.cfg.Root.Path()) }

// Resolve returns the pod that a cgroup belongs to. It does not depend on the
// watch: a pod's UID is in the path from the first instant, so a pod that no
// event has told of yet is added here. In the usual case it makes no system
// call and does not allocate.
//
// Errors wrap cgroup.ErrNotPod, which is a final answer, or cgroup.ErrGone; any
// other error means, like ErrGone, that nothing is known.
func (x *Index) Resolve(id evidence.CgroupID) (*Pod, error) {
	path, err := x.cfg.Resolver.Path(id)
	if err != nil {
		if errors.Is(err, cgroup.ErrOutside) {
			// The kubepods root is inside the mount, so this is no pod of it.
			return nil, cgroup.ErrNotPod
		}
		return nil, err
	}
	dir, ok := x.cfg.Root.PodDir(path)
	if !ok {
		return nil, cgroup.ErrNotPod
	}
	if p := x.lookup(dir); p != nil {
		return p, nil
	}
	ref, err := x.cfg.Root.Parse(path)
	if err != nil {
		return nil, err
	}
	p, added, err := x.ensure(ref)
	if err == nil && added {
		x.lazyPods.Add(1)
	}
	return p, err
}

func (x *Index) lookup(dir string) *Pod {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return x.byDir[dir]
}

// ensure returns the live pod of a pod-level directory and adds it if need be.
// The error wraps cgroup.ErrGone if the directory does not exist.
func (x *Index) ensure(ref cgroup.PodRef) (p *Pod, added bool, err error) {
	id, err := x.cfg.Resolver.ID(ref.Path)
	if err != nil {
		return nil, false, err
	}
	x.mu.Lock()
	if old := x.byDir[ref.Path]; old != nil {
		if old.ID == id {
			x.mu.Unlock()
			return old, false, nil
		}
		// The directory went and came back: same name, another pod.
		x.end(old)
	}
	p = &Pod{UID: ref.UID, Path: ref.Path, ID: id, QoS: ref.QoS, FirstSeen: x.cfg.Now()}
	x.byDir[ref.Path] = p
	x.notify(notice{pod: p})
	x.mu.Unlock()

	// The directory may have gone between asking for its id and adding the
	// pod, and its event may have come in between too, when there was no pod
	// to end. So ask once more now that an event would find it.
	if !x.verify(p) {
		return nil, true, fmt.Errorf("%s: %w", p.Path, cgroup.ErrGone)
	}
	return p, true, nil
}

// verify ends a pod whose directory is gone, or is another one by now, and says
// whether it still lives. If the kernel cannot tell, nothing changes.
func (x *Index) verify(p *Pod) bool {
	id, err := x.cfg.Resolver.ID(p.Path)
	switch {
	case err == nil && id == p.ID:
		return true
	case err != nil && !errors.Is(err, cgroup.ErrGone):
		x.errors.Add(1)
		x.log.Debug("cannot tell whether a pod lives", "pod_uid", string(p.UID), "error", err)
		return !p.Ended()
	}
	x.mu.Lock()
	x.end(p)
	x.mu.Unlock()
	return false
}

// end marks a pod. The caller holds mu.
func (x *Index) end(p *Pod) {
	if p.ended.Swap(true) {
		return
	}
	if x.byDir[p.Path] == p {
		delete(x.byDir, p.Path)
	}
	if sb := p.netns.sandbox.Load(); sb != nil && x.byNetns[sb.inode] == p {
		delete(x.byNetns, sb.inode)
	}
	x.notify(notice{pod: p, ended: true})
}

// notify queues a callback for Run's goroutine. The caller holds mu, so that
// the queue has the order in which things happened.
func (x *Index) notify(n notice) {
	x.queue = append(x.queue, n)
	select {
	case x.wake <- struct{}{}:
	default:
	}
}

// deliver makes the calls that are due.
func (x *Index) deliver() {
	x.mu.Lock()
	due := x.queue
	x.queue = nil
	x.mu.Unlock()
	for _, n := range due {
		switch {
		case n.pod == nil:
			if x.cfg.OnQoS != nil {
				x.cfg.OnQoS(n.qos)
			}
		case n.ended:
			x.cfg.Resolver.Forget(n.pod.Path)
			x.log.Debug("pod ended", "pod_uid", string(n.pod.UID))
			if x.cfg.OnEnd != nil {
				x.cfg.OnEnd(n.pod)
			}
		default:
			x.log.Debug("pod seen", "pod_uid", string(n.pod.UID), "cgroup_path", n.pod.Path)
			if x.cfg.OnPod != nil {
				x.cfg.OnPod(n.pod)
			}
		}
	}
}

// snapshot returns the pods that live, in no order.
func (x *Index) snapshot() []*Pod {
	x.mu.RLock()
	defer x.mu.RUnlock()
	out := make([]*Pod, 0, len(x.byDir))
	for _, p := range x.byDir {
		out = append(out, p)
	}
	return out
}

// List returns the pods that live, ordered by UID.
func (x *Index) List() []Info {
	pods := x.snapshot()
	out := make([]Info, 0, len(pods))
	for _, p := range pods {
		out = append(out, x.info(p))
	}
	slices.SortFunc(out, func(a, b Info) int {
		return cmp.Or(cmp.Compare(a.UID, b.UID), cmp.Compare(a.Path, b.Path))
	})
	return out
}

func (x *Index) info(p *Pod) Info {
	i := Info{UID: p.UID, Path: p.Path, CgroupID: p.ID, QoS: p.QoS, FirstSeen: p.FirstSeen}
	if sb := p.netns.sandbox.Load(); sb != nil {
		i.Netns, i.Sandbox, i.HostNet = sb.inode, sb.pid, x.isHost(0, sb.inode)
	}
	return i
}

// Stats returns the counters.
func (x *Index) Stats() Stats {
	x.mu.RLock()
	n := len(x.byDir)
	x.mu.RUnlock()
	return Stats{
		Pods: n, Watching: x.watching.Load(),
		Scans: x.scans.Load(), Overflows: x.overflows.Load(), LazyPods: x.lazyPods.Load(),
		UnknownNetns: x.unknownNetns.Load(), ForeignNetns: x.foreignNetns.Load(), Unresolved: x.unresolved.Load(),
		Errors: x.errors.Load(),
	}
}

// Attest applies the evidence rules to what the kernel recorded of a connection;
// ok is false if it recorded nothing. The pod is nil unless the finding is
// FindingPod.
//
// Task and socket must be of one pod: a socket that was made in one and
// connected in another says that somebody passed a descriptor, or that a kernel
// thread connected for its owner, and which of the two is at work cannot be
// told. What cannot be resolved is FindingNone, never a refusal for good.
func (x *Index) Attest(conn evidence.Connection, ok bool) (evidence.Attestation, *Pod) {
	if !ok {
		return evidence.Attestation{Finding: evidence.FindingNone, Reason: evidence.ReasonNoEvidence}, nil
	}
	att := evidence.Attestation{Connection: conn}
	task, taskErr := x.Resolve(conn.TaskCgroup)
	sock, sockErr := task, taskErr
	if conn.SocketCgroup != conn.TaskCgroup && !proofOff("second_cgroup") {
		sock, sockErr = x.Resolve(conn.SocketCgroup)
	}
	for _, err := range [...]error{taskErr, sockErr} {
		if err != nil && !errors.Is(err, cgroup.ErrNotPod) {
			x.unresolved.Add(1)
			if !errors.Is(err, cgroup.ErrGone) {
				// Counted, and logged for debugging only: a workload can nest
				// its cgroups until their path is too long to be read.
				x.errors.Add(1)
				x.log.Debug("cannot resolve a connection's cgroup",
					"task_cgroup", conn.TaskCgroup, "socket_cgroup", conn.SocketCgroup, "error", err)
			}
			att.Finding, att.Reason = evidence.FindingNone, evidence.ReasonUnresolved
			return att, nil
		}
	}
	switch {
	case task == nil && sock == nil:
		att.Finding, att.Reason = evidence.FindingNotPod, evidence.ReasonNotPod
		return att, nil
	case task == nil || sock == nil || task.UID != sock.UID:
		att.Finding, att.Reason = evidence.FindingContradictory, evidence.ReasonTwoPods
		return att, nil
	}
	netns := x.CheckNetns(task, conn.NetnsCookie, conn.NetnsInode)
	if proofOff("netns") {
		netns = NetnsOwn
	}
	switch netns {
	case NetnsOwn:
	case NetnsUnknown:
		att.UnknownNetns = true
		x.unknownNetns.Add(1)
	default:
		x.foreignNetns.Add(1)
		att.Finding, att.Reason = evidence.FindingContradictory, evidence.ReasonForeignNetns
		return att, nil
	}
	att.Finding, att.Pod = evidence.FindingPod, task.UID
	return att, task
}

// Run watches the tree until the context ends, and returns nil then. It must
// run once and only once.
func (x *Index) Run(ctx context.Context) error {
	first := false
	x.once.Do(func() { first = true })
	if !first {
		return errors.New("pod index: Run called twice")
	}
	w, err := newWatch(x.cfg.Mount)
	if err != nil {
		// fs.inotify.max_user_instances is often used up on a node. Polling
		// keeps the promise on the end of a pod, at the price of a few
		// directory reads a second.
		x.log.Warn("cannot watch the cgroup tree, polling it instead", "error", err, "poll_interval", pollInterval)
		w = nil
	}
	return x.run(ctx, w)
}
