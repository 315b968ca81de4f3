// SPDX-License-Identifier: Apache-2.0

package association

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// IndexConfig is what an Index needs.
type IndexConfig struct {
	// Client speaks to etcd. The index does not close it.
	Client *clientv3.Client
	// Prefix is the store's; empty: DefaultPrefix.
	Prefix string
	// Now is the clock; nil: time.Now.
	Now func() time.Time
	// Progress is how often the store is asked whether the index has everything;
	// 0: half a second.
	Progress time.Duration
	// Stall is how long the store may be silent before the watch is made anew; 0:
	// ten seconds.
	Stall time.Duration
	// Log is told when the watch breaks and comes back; nil: nothing is.
	Log *slog.Logger
}

const (
	defaultProgress = 500 * time.Millisecond
	defaultStall    = 10 * time.Second
	minRetry        = 50 * time.Millisecond
	maxRetry        = 2 * time.Second
	// maxListers bounds how many clusters a list reads at once, and so its memory.
	maxListers = 4
)

// Index holds every association and cluster in memory and follows the store.
// While the store is away it goes on answering with what it knows; Behind tells
// how old that is.
type Index struct {
	cfg  IndexConfig
	keys layout

	// now is what lookups read. A list after the first makes a new one beside it.
	now   atomic.Pointer[snapshot]
	ready atomic.Bool
	// current is when, in nanoseconds, the index is known to have had everything.
	current atomic.Int64
	lists   atomic.Int64
	damaged atomic.Int64

	mu       sync.Mutex
	revision int64
	advanced chan struct{}
}

// snapshot is the state at one revision, changed in place by events.
type snapshot struct {
	mu       sync.RWMutex
	clusters map[string]*clusterIndex
	count    int
}

type subject struct{ namespace, serviceAccount string }

type clusterIndex struct {
	// cluster is nil until it is seen: in one transaction's events it may come
	// after its associations.
	cluster  *Cluster
	subjects map[subject]*Association
	// slots finds what a deletion, which has a key and no value, is about.
	slots []*Association
	// spoilt has the slots whose records cannot be read; clusterSlot is the
	// cluster's own.
	spoilt map[int]bool
}

const clusterSlot = -1

func (c *clusterIndex) spoil(slot int) {
	if c.spoilt == nil {
		c.spoilt = map[int]bool{}
	}
	c.spoilt[slot] = true
}

// NewIndex makes an empty index; Run fills it.
func NewIndex(cfg IndexConfig) *Index {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Progress == 0 {
		cfg.Progress = defaultProgress
	}
	if cfg.Stall == 0 {
		cfg.Stall = defaultStall
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	x := &Index{cfg: cfg, keys: newLayout(cfg.Prefix), advanced: make(chan struct{})}
	x.now.Store(&snapshot{clusters: map[string]*clusterIndex{}})
	x.current.Store(cfg.Now().UnixNano())
	return x
}

// Ready tells whether the index was filled once. It stays true: what is known
// stays known while the store is away; see Behind.
func (x *Index) Ready() bool { return x.ready.Load() }

// Lookup finds the association of a service account. It allocates nothing. Tags
// are not kept in the index: they are nil.
func (x *Index) Lookup(cluster, namespace, serviceAccount string) (Association, bool) {
	s := x.now.Load()
	s.mu.RLock()
	defer s.mu.RUnlock()
	c := s.clusters[cluster]
	if c == nil || c.cluster == nil {
		return Association{}, false
	}
	a := c.subjects[subject{namespace, serviceAccount}]
	if a == nil {
		return Association{}, false
	}
	return *a, true
}

// Cluster finds a cluster. What it points to is shared: it is not to be changed.
func (x *Index) Cluster(name string) (Cluster, bool) {
	s := x.now.Load()
	s.mu.RLock()
	defer s.mu.RUnlock()
	c := s.clusters[name]
	if c == nil || c.cluster == nil {
		return Cluster{}, false
	}
	return *c.cluster, true
}

// Whole tells whether every record of a cluster could be read. If not, what
// Lookup and Cluster do not find may be there all the same.
func (x *Index) Whole(cluster string) bool {
	s := x.now.Load()
	s.mu.RLock()
	defer s.mu.RUnlock()
	c := s.clusters[cluster]
	return c == nil || len(c.spoilt) == 0
}

// Clusters returns all clusters, in no order. What they point to is shared.
func (x *Index) Clusters() []Cluster {
	s := x.now.Load()
	s.mu.RLock()
	defer s.mu.RUnlock()
	out := make([]Cluster, 0, len(s.clusters))
	for _, c := range s.clusters {
		if c.cluster != nil {
			out = append(out, *c.cluster)
		}
	}
	return out
}

// Len is how many associations and clusters there are.
func (x *Index) Len() (associations, clusters int) {
	s := x.now.Load()
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, c := range s.clusters {
		if c.cluster != nil {
			clusters++
		}
	}
	return s.count, clusters
}

// Lists is how often everything was read anew: once, and once more whenever the
// index was away for longer than the store remembers.
func (x *Index) Lists() int64 { return x.lists.Load() }

// Damaged is how many records could not be read and were left out.
func (x *Index) Damaged() int64 { return x.damaged.Load() }

// Revision is the store's revision that the index is known to have reached.
func (x *Index) Revision() int64 {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.revision
}

// Wait returns when the index has reached a revision, or with the context's
// error.
func (x *Index) Wait(ctx context.Context, revision int64) error {
	for {
		x.mu.Lock()
		reached, advanced := x.ready.Load() && x.revision >= revision, x.advanced
		x.mu.Unlock()
		if reached {
			return nil
		}
		select {
		case <-advanced:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// Behind is how long ago the index is known to have had everything: while all is
// well at most about IndexConfig.Progress. Before the first list it counts from
// NewIndex.
func (x *Index) Behind() time.Duration {
	return max(0, time.Duration(x.cfg.Now().UnixNano()-x.current.Load()))
}

// reach notes a revision, and since when the index has everything up to it.
func (x *Index) reach(revision int64, asOf time.Time) {
	if !asOf.IsZero() {
		x.current.Store(asOf.UnixNano())
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if revision > x.revision {
		x.revision = revision
		close(x.advanced)
		x.advanced = make(chan struct{})
	}
}

// restart sets the revision, down as well: after a list.
func (x *Index) restart(revision int64, asOf time.Time) {
	x.current.Store(asOf.UnixNano())
	x.mu.Lock()
	defer x.mu.Unlock()
	x.revision = revision
	x.ready.Store(true)
	close(x.advanced)
	x.advanced = make(chan struct{})
}

// Why a watch ends.
var (
	errRelist = errors.New("the store does not remember the revisions since the last event")
	errStall  = errors.New("the store is silent")
	errEnded  = errors.New("the watch has ended")
	errBehind = errors.New("the store is at an earlier revision")
)

// Run lists, then watches, until ctx ends; after a failure it tries again. It
// returns the context's error.
func (x *Index) Run(ctx context.Context) error {
	retry := minRetry
	relist := true
	for {
		began := x.cfg.Now()
		var err error
		if relist {
			err = x.list(ctx)
		}
		if err == nil {
			relist = false
			err = x.watch(ctx)
			relist = errors.Is(err, errRelist) || errors.Is(err, errBehind) && x.isOlder(ctx)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		// What has worked for a while is not slow to be tried again.
		if x.cfg.Now().Sub(began) > maxRetry {
			retry = minRetry
		}
		x.cfg.Log.WarnContext(ctx, "association index lost the store", "error", err, "behind_seconds", x.Behind().Seconds(), "retry_seconds", retry.Seconds(), "relist", relist)
		t := time.NewTimer(retry/2 + rand.N(retry/2))
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return ctx.Err()
		}
		retry = min(2*retry, maxRetry)
	}
}

// list reads everything at one revision, cluster by cluster: etcd counts what is
// left of a range at each read, so that pages of one large range would take time
// by the square of its size.
func (x *Index) list(ctx context.Context) error {
	began := x.cfg.Now()
	r, err := x.cfg.Client.Get(ctx, x.keys.clusters(), clientv3.WithPrefix())
	if err != nil {
		return fmt.Errorf("list clusters: %w", err)
	}
	next := &snapshot{clusters: make(map[string]*clusterIndex, len(r.Kvs))}
	names := make(chan string, len(r.Kvs))
	for _, kv := range r.Kvs {
		x.put(ctx, next, kv)
		if name, _, ok := x.at(string(kv.Key)); ok {
			names <- name
		}
	}
	close(names)

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), maxListers) {
		wg.Go(func() {
			for name := range names {
				if err := x.listOne(ctx, next, name, r.Header.Revision); err != nil {
					cancel(err)
					return
				}
			}
		})
	}
	wg.Wait()
	if err := context.Cause(ctx); err != nil {
		return fmt.Errorf("list associations: %w", err)
	}
	x.now.Store(next)
	x.lists.Add(1)
	x.restart(r.Header.Revision, began)
	x.cfg.Log.InfoContext(ctx, "association index is filled", "associations", next.count, "clusters", len(next.clusters),
		"revision", r.Header.Revision, "seconds", x.cfg.Now().Sub(began).Seconds())
	return nil
}

// listOne reads the associations of one cluster, beside others.
func (x *Index) listOne(ctx context.Context, next *snapshot, name string, revision int64) error {
	r, err := x.cfg.Client.Get(ctx, x.keys.associations(name), clientv3.WithPrefix(), clientv3.WithRev(revision))
	if err != nil {
		return err
	}
	own := &snapshot{clusters: map[string]*clusterIndex{name: {subjects: make(map[subject]*Association, len(r.Kvs))}}}
	for _, kv := range r.Kvs {
		x.put(ctx, own, kv)
	}
	next.mu.Lock()
	defer next.mu.Unlock()
	c := next.of(name)
	c.subjects, c.slots = own.clusters[name].subjects, own.clusters[name].slots
	for slot := range own.clusters[name].spoilt {
		c.spoil(slot)
	}
	next.count += own.count
	return nil
}

// watch applies events from the revision that was reached.
func (x *Index) watch(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	from, end := x.keys.watched()
	// A member that has lost its cluster would go on being silent and content.
	wctx := clientv3.WithRequireLeader(ctx)
	// From the revision that was reached, not the one after it: etcd answers no
	// question about progress while a watch of its stream begins in the future, so
	// a store that nobody writes to would seem silent. To apply its events again
	// changes nothing.
	events := x.cfg.Client.Watch(wctx, from, clientv3.WithRange(end), clientv3.WithRev(max(1, x.Revision())), clientv3.WithFragment())

	// Only an answer that was asked for proves anything about the time of asking.
	// One question is open at a time; the answer counts for the oldest.
	var asked time.Time
	tick := time.NewTicker(x.cfg.Progress)
	defer tick.Stop()
	heard := x.cfg.Now()
	for {
		select {
		case r, ok := <-events:
			if !ok {
				return errEnded
			}
			if r.CompactRevision != 0 {
				return fmt.Errorf("%w: %d is compacted", errRelist, r.CompactRevision)
			}
			if err := r.Err(); err != nil {
				if errors.Is(err, rpctypes.ErrCompacted) || errors.Is(err, rpctypes.ErrFutureRev) {
					return fmt.Errorf("%w: %w", errRelist, err)
				}
				return err
			}
			heard = x.cfg.Now()
			if r.Header.Revision < x.Revision() {
				return fmt.Errorf("%w: %d", errBehind, r.Header.Revision)
			}
			if r.IsProgressNotify() {
				x.reach(r.Header.Revision, asked)
				asked = time.Time{}
				continue
			}
			x.apply(ctx, r.Events)
		case <-tick.C:
			now := x.cfg.Now()
			if now.Sub(heard) > x.cfg.Stall {
				return errStall
			}
			if asked.IsZero() {
				asked = now
			}
			if err := x.cfg.Client.RequestProgress(wctx); err != nil {
				return fmt.Errorf("request progress: %w", err)
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// isOlder tells a store that was restored from the past, and answers in the
// other's place, from a member that is merely late.
func (x *Index) isOlder(ctx context.Context) bool {
	from, _ := x.keys.watched()
	ctx, cancel := context.WithTimeout(ctx, x.cfg.Stall)
	defer cancel()
	r, err := x.cfg.Client.Get(ctx, from, clientv3.WithCountOnly())
	return err == nil && r.Header.Revision < x.Revision()
}

func (x *Index) apply(ctx context.Context, events []*clientv3.Event) {
	s := x.now.Load()
	var revision int64
	s.mu.Lock()
	for _, e := range events {
		if e.Kv.ModRevision > revision {
			revision = e.Kv.ModRevision
		}
		if e.Type == clientv3.EventTypeDelete {
			x.remove(s, string(e.Kv.Key))
		} else {
			x.put(ctx, s, e.Kv)
		}
	}
	s.mu.Unlock()
	x.reach(revision, time.Time{})
}

// at splits a key; ok is false for one that is not the index's business.
func (x *Index) at(key string) (cluster string, slot int, ok bool) {
	rest, ok := strings.CutPrefix(key, x.keys.prefix)
	if !ok {
		return "", 0, false
	}
	if cluster, ok = strings.CutPrefix(rest, "c/"); ok {
		return cluster, -1, true
	}
	if rest, ok = strings.CutPrefix(rest, "a/"); !ok {
		return "", 0, false
	}
	cluster, digits, ok := strings.Cut(rest, "/")
	n, err := strconv.ParseUint(digits, 36, 32)
	if !ok || err != nil || n >= MaxLimit {
		return "", 0, false
	}
	return cluster, int(n), true
}

// of finds or makes the part of a cluster.
func (s *snapshot) of(cluster string) *clusterIndex {
	c := s.clusters[cluster]
	if c == nil {
		c = &clusterIndex{subjects: map[subject]*Association{}}
		s.clusters[strings.Clone(cluster)] = c
	}
	return c
}

// put takes a record in. What cannot be read is left out, and Whole tells: that
// refuses for now, and does not give a role that is not asked for.
func (x *Index) put(ctx context.Context, s *snapshot, kv *mvccpb.KeyValue) {
	name, slot, ok := x.at(string(kv.Key))
	if !ok {
		return
	}
	c := s.of(name)
	if slot < 0 {
		is, err := decodeCluster(kv.Key, kv.Value, kv.ModRevision)
		if err != nil {
			x.spoilt(ctx, err)
			c.cluster = nil
			c.spoil(clusterSlot)
			return
		}
		c.cluster = &is
		delete(c.spoilt, clusterSlot)
		return
	}
	c.clear(s, slot)
	a, err := decode(kv.Key, kv.Value, kv.ModRevision)
	if err != nil {
		x.spoilt(ctx, err)
		c.spoil(slot)
		return
	}
	a.Tags = nil
	if slot >= len(c.slots) {
		// Slots are filled in no order: room for the usual limit at once.
		n := min(max(slot+1, DefaultLimit/8, 2*len(c.slots)), MaxLimit)
		c.slots = append(c.slots, make([]*Association, n-len(c.slots))...)
	}
	c.slots[slot] = &a
	c.subjects[subject{a.Namespace, a.ServiceAccount}] = &a
	s.count++
}

func (x *Index) spoilt(ctx context.Context, err error) {
	x.damaged.Add(1)
	x.cfg.Log.ErrorContext(ctx, "damaged record in the store", "error", err)
}

// clear empties a slot.
func (c *clusterIndex) clear(s *snapshot, slot int) {
	delete(c.spoilt, slot)
	if slot >= len(c.slots) || c.slots[slot] == nil {
		return
	}
	a := c.slots[slot]
	c.slots[slot] = nil
	s.count--
	// In another slot the service account may have a new association already.
	if at := (subject{a.Namespace, a.ServiceAccount}); c.subjects[at] == a {
		delete(c.subjects, at)
	}
}

func (x *Index) remove(s *snapshot, key string) {
	name, slot, ok := x.at(key)
	c := s.clusters[name]
	if !ok || c == nil {
		return
	}
	if slot < 0 {
		c.cluster = nil
		delete(c.spoilt, clusterSlot)
	} else {
		c.clear(s, slot)
	}
	if c.cluster == nil && len(c.subjects) == 0 && len(c.spoilt) == 0 {
		delete(s.clusters, name)
	}
}
