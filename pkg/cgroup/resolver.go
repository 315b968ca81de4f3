// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

// ResolverConfig configures a Resolver.
type ResolverConfig struct {
	// Mount is the cgroup2 mount to resolve against. Required.
	Mount Mount
	// Owner names who pays for a cached path, usually Root.Owner. Each owner
	// has entries of its own, so that a pod with any number of nested cgroups
	// pushes out nobody's entries but its own. Nil: all share one owner.
	Owner func(path string) string
	// PerOwner is how many paths are kept per owner; 0 means 64.
	PerOwner int
	// MaxOwners is how many owners are kept; 0 means 4096. One more, and all
	// is forgotten, which costs one look-up each.
	MaxOwners int
}

// Resolver turns a cgroup id into its path. It is safe for concurrent use.
type Resolver struct {
	dir     *os.File
	point   string
	mountID int
	owner   func(string) string
	// The cache never goes stale: kernfs ids are not reused while the kernel
	// runs, and a cgroup v2 directory can be neither renamed nor moved. What a
	// cached path does not say is whether the directory still exists.
	shards    [resolverShards]resolverShard
	perOwner  int
	maxOwners int
	lookups   atomic.Uint64

	mu     sync.Mutex // guards owners; taken on a miss only, before a shard's lock
	owners map[string]*ownerEntries
}

const (
	resolverShards = 16
	// maxCachedPath: a kubelet's own paths have some 250 bytes. Longer ones are
	// made by a workload that nests, and are looked up each time, so that what
	// a pod can make the agent remember stays small.
	maxCachedPath = 1024
)

type resolverShard struct {
	sync.RWMutex
	paths map[evidence.CgroupID]string
	_     [40]byte // keeps neighbours' locks off one cache line
}

// ownerEntries is a ring: when full, the oldest id leaves.
type ownerEntries struct {
	ids  []evidence.CgroupID
	next int
}

// NewResolver opens the mount and resolves its root once as a probe. That needs
// CAP_DAC_READ_SEARCH in the initial user namespace, and so does every later
// miss. Errors wrap ErrNotCgroup2 if the mount point is not one.
func NewResolver(cfg ResolverConfig) (*Resolver, error) {
	if cfg.PerOwner <= 0 {
		cfg.PerOwner = 64
	}
	if cfg.MaxOwners <= 0 {
		cfg.MaxOwners = 4096
	}
	if cfg.Owner == nil {
		cfg.Owner = func(string) string { return "" }
	}
	// Not O_PATH: kernels before 6.x refuse such a descriptor as the mount of
	// open_by_handle_at.
	dir, err := os.OpenFile(cfg.Mount.Point, os.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("opening the cgroup v2 mount: %w", err)
	}
	r := &Resolver{
		dir: dir, owner: cfg.Owner, perOwner: cfg.PerOwner, maxOwners: cfg.MaxOwners,
		owners: make(map[string]*ownerEntries),
	}
	for i := range r.shards {
		r.shards[i].paths = make(map[evidence.CgroupID]string)
	}
	if err := r.probe(); err != nil {
		dir.Close()
		return nil, fmt.Errorf("cgroup v2 mount %s: %w", cfg.Mount.Point, err)
	}
	return r, nil
}

func (r *Resolver) probe() error {
	var id evidence.CgroupID
	err := r.withFD(func(fd int) error {
		var st unix.Statfs_t
		if err := unix.Fstatfs(fd, &st); err != nil {
			return err
		}
		if st.Type != unix.CGROUP2_SUPER_MAGIC {
			return ErrNotCgroup2
		}
		var err error
		// The mount point as the kernel spells it: that is what readlink of a
		// descriptor will begin with.
		if r.point, err = os.Readlink("/proc/self/fd/" + strconv.Itoa(fd)); err != nil {
			return err
		}
		id, r.mountID, err = handleID(fd, "", unix.AT_EMPTY_PATH)
		return err
	})
	if err != nil {
		return err
	}
	r.point = strings.TrimSuffix(r.point, "/")
	if _, err = r.Lookup(id); errors.Is(err, unix.EPERM) {
		return fmt.Errorf("resolving a cgroup id needs CAP_DAC_READ_SEARCH: %w", err)
	}
	return err
}

// withFD runs f with the mount's descriptor, which cannot be closed and reused
// meanwhile.
func (r *Resolver) withFD(f func(fd int) error) error {
	conn, err := r.dir.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	if err := conn.Control(func(fd uintptr) { inner = f(int(fd)) }); err != nil {
		return err
	}
	return inner
}

// Path returns the path of a cgroup below the mount, "/" being its root. A
// cached path is returned without a system call or an allocation, even if the
// directory has been removed since. Errors are those of Lookup and are not
// cached.
func (r *Resolver) Path(id evidence.CgroupID) (string, error) {
	s := r.shard(id)
	s.RLock()
	path, ok := s.paths[id]
	s.RUnlock()
	if ok {
		return path, nil
	}
	path, err := r.Lookup(id)
	if err != nil {
		return "", err
	}
	r.remember(id, path)
	return path, nil
}

func (r *Resolver) shard(id evidence.CgroupID) *resolverShard {
	// Ids are handed out in sequence, so the low bits spread well.
	return &r.shards[uint64(id)%resolverShards]
}

// Lookup asks the kernel, past the cache. Errors wrap ErrGone, ErrOutside, or
// what the system call returned.
func (r *Resolver) Lookup(id evidence.CgroupID) (string, error) {
	r.lookups.Add(1)
	var buf [8]byte
	binary.NativeEndian.PutUint64(buf[:], uint64(id))
	handle := unix.NewFileHandle(fileidKernfs, buf[:])
	var path string
	err := r.withFD(func(mount int) error {
		fd, err := unix.OpenByHandleAt(mount, handle, unix.O_PATH|unix.O_CLOEXEC)
		if err != nil {
			return err
		}
		full, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
		unix.Close(fd)
		if err != nil {
			return err
		}
		rel, ok := strings.CutPrefix(full, r.point)
		if !ok || rel != "" && rel[0] != '/' {
			// The kernel prints no mount point for what the mount's root does
			// not contain.
			return ErrOutside
		}
		path = rel
		if rel == "" || rel == "/" {
			path, rel = "/", "/."
		}
		// The kernel marks a removed directory with " (deleted)", but a
		// workload can name a living one so. Hence no trimming: ask for the id
		// of the very path, and believe the path only if it is this id's.
		back, mountID, err := handleID(mount, rel[1:], 0)
		if err != nil {
			return err
		}
		if back != id || mountID != r.mountID {
			return ErrGone
		}
		return nil
	})
	switch {
	case err == nil:
		return path, nil
	case isGone(err):
		return "", fmt.Errorf("cgroup %d: %w", id, ErrGone)
	}
	return "", fmt.Errorf("cgroup %d: %w", id, err)
}

// remember stores a path under its owner.
func (r *Resolver) remember(id evidence.CgroupID, path string) {
	if len(path) > maxCachedPath {
		return
	}
	owner := r.owner(path)
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.shard(id)
	s.RLock()
	_, known := s.paths[id]
	s.RUnlock()
	if known {
		return // another goroutine looked the same id up
	}
	o := r.owners[owner]
	if o == nil {
		if len(r.owners) >= r.maxOwners {
			r.flush()
		}
		o = new(ownerEntries)
		r.owners[owner] = o
	}
	if len(o.ids) < r.perOwner {
		o.ids = append(o.ids, id)
	} else {
		r.drop(o.ids[o.next])
		o.ids[o.next] = id
		o.next = (o.next + 1) % len(o.ids)
	}
	s.Lock()
	s.paths[id] = path
	s.Unlock()
}

func (r *Resolver) drop(id evidence.CgroupID) {
	s := r.shard(id)
	s.Lock()
	delete(s.paths, id)
	s.Unlock()
}

func (r *Resolver) flush() {
	clear(r.owners)
	for i := range r.shards {
		s := &r.shards[i]
		s.Lock()
		clear(s.paths)
		s.Unlock()
	}
}

// Forget drops every cached path of an owner, for a pod that has ended.
func (r *Resolver) Forget(owner string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if o := r.owners[owner]; o != nil {
		for _, id := range o.ids {
			r.drop(id)
		}
		delete(r.owners, owner)
	}
}

// ID returns the id of a directory given by its path below the mount. It needs
// no privilege and no descriptor. Errors are those of the function ID.
func (r *Resolver) ID(path string) (evidence.CgroupID, error) {
	if path == "" || path[0] != '/' {
		return 0, fmt.Errorf("%q: %w", path, ErrPath)
	}
	rel := path[1:]
	if rel == "" {
		rel = "."
	}
	var id evidence.CgroupID
	err := r.withFD(func(fd int) error {
		var mountID int
		var err error
		id, mountID, err = handleID(fd, rel, 0)
		if err == nil && mountID != r.mountID {
			err = ErrNotCgroup2 // something is mounted over the directory
		}
		return err
	})
	if err != nil {
		return 0, idError(path, err)
	}
	return id, nil
}

// Lookups returns how many ids were asked of the kernel: the cache's misses.
func (r *Resolver) Lookups() uint64 { return r.lookups.Load() }

// Close releases the mount. Ids that are not cached cannot be resolved then.
func (r *Resolver) Close() error { return r.dir.Close() }
