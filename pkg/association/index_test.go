// SPDX-License-Identifier: Apache-2.0

package association

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/latchkey-dev/latchkey/pkg/etcd"
)

func TestIndexFollows(t *testing.T) {
	s := newTestStore(t, nil)
	before := mustCreate(t, s, input("web", "before"))
	x := startIndex(t, s, nil)
	wait(t, x, before.Revision)
	if !x.Ready() {
		t.Error("not ready after its list")
	}
	if got, ok := x.Lookup("prod", "web", "before"); !ok || !same(got, before) {
		t.Errorf("%+v, %v", got, ok)
	}
	for _, miss := range [][3]string{{"nope", "web", "before"}, {"prod", "web", "nope"}, {"prod", "before", "web"}, {"", "", ""}, {"prod", "", ""}} {
		if got, ok := x.Lookup(miss[0], miss[1], miss[2]); ok {
			t.Errorf("%v: %+v", miss, got)
		}
	}
	if c, ok := x.Cluster("prod"); !ok || c.Account != account || len(x.Clusters()) != 1 {
		t.Errorf("%+v, %v", c, ok)
	}
	if _, ok := x.Cluster("nope"); ok {
		t.Error("a cluster that is not there")
	}

	in := input("web", "later")
	in.TargetRoleARN, in.DisableSessionTags, in.Policy = ptr(target), true, ptr("{}")
	in.Tags = map[string]string{"a": "b"}
	later := mustCreate(t, s, in)
	wait(t, x, later.Revision)
	later.Tags = nil
	if got, ok := x.Lookup("prod", "web", "later"); !ok || !same(got, later) {
		t.Errorf("%+v, %v", got, ok)
	}
	up, err := s.Update(t.Context(), UpdateInput{Cluster: "prod", ID: before.ID, RoleARN: ptr(role + "2")})
	if err != nil {
		t.Fatal(err)
	}
	wait(t, x, up.Revision)
	if got, ok := x.Lookup("prod", "web", "before"); !ok || got.RoleARN != role+"2" {
		t.Errorf("%+v, %v", got, ok)
	}
	gone, err := s.Delete(t.Context(), DeleteInput{Cluster: "prod", ID: before.ID})
	if err != nil {
		t.Fatal(err)
	}
	wait(t, x, gone.Revision)
	if got, ok := x.Lookup("prod", "web", "before"); ok {
		t.Errorf("deleted, and yet there: %+v", got)
	}
	sameAsStore(t, x, s)
	if err := s.DeleteCluster(t.Context(), "prod", true); err != nil {
		t.Fatal(err)
	}
	again, err := s.PutCluster(t.Context(), testCluster("prod"))
	if err != nil {
		t.Fatal(err)
	}
	wait(t, x, again.Revision)
	if n, clusters := x.Len(); n != 0 || clusters != 1 {
		t.Errorf("%d associations, %d clusters after all went", n, clusters)
	}
	if x.Lists() != 1 || x.Damaged() != 0 {
		t.Errorf("%d lists, %d damaged", x.Lists(), x.Damaged())
	}
}

// Random changes from several servers, with slots filled, emptied and filled
// again, and clusters that come and go: at every rest the index is the store.
func TestIndexEqualsStore(t *testing.T) {
	cfg := testConfig(t)
	cfg.Limit = 12
	a, b := NewStore(cfg), NewStore(cfg)
	x := startIndex(t, a, nil)
	for round := range 10 {
		var wg sync.WaitGroup
		for w := range 8 {
			s := []*Store{a, b}[w%2]
			r := rand.New(rand.NewPCG(uint64(round), uint64(w)))
			wg.Go(func() {
				for range 30 {
					in := CreateInput{Cluster: fmt.Sprint("c-", r.IntN(2)), Namespace: "ns", ServiceAccount: fmt.Sprint("sa-", r.IntN(20)), RoleARN: role}
					var err error
					switch r.IntN(12) {
					case 0:
						err = s.DeleteCluster(t.Context(), in.Cluster, true)
					case 1, 2:
						_, err = s.PutCluster(t.Context(), testCluster(in.Cluster))
					case 3, 4, 5, 6, 7:
						_, err = s.Create(t.Context(), in)
					default:
						var p ListOutput
						if p, err = s.List(t.Context(), ListInput{Cluster: in.Cluster}); err == nil && len(p.Associations) > 0 {
							v := p.Associations[r.IntN(len(p.Associations))]
							if r.IntN(2) == 0 {
								_, err = s.Update(t.Context(), UpdateInput{Cluster: v.Cluster, ID: v.ID, RoleARN: ptr(fmt.Sprint(role, r.IntN(9)))})
							} else {
								_, err = s.Delete(t.Context(), DeleteInput{Cluster: v.Cluster, ID: v.ID})
							}
						}
					}
					var e *Error
					if err != nil && (!errors.As(err, &e) || e.Kind == Internal || e.Kind == Unavailable) {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		mark, err := a.PutCluster(t.Context(), testCluster(fmt.Sprint("mark-", round)))
		if err != nil {
			t.Fatal(err)
		}
		wait(t, x, mark.Revision)
		sameAsStore(t, x, a)
	}
}

// flakyWatcher fails watches as connections do, and can hold progress back.
type flakyWatcher struct {
	clientv3.Watcher
	mu      sync.Mutex
	cancels []context.CancelFunc
	silent  atomic.Bool
	refuse  atomic.Bool
	behind  atomic.Bool
	watches atomic.Int64
}

func (f *flakyWatcher) Watch(ctx context.Context, key string, opts ...clientv3.OpOption) clientv3.WatchChan {
	f.watches.Add(1)
	if f.refuse.Load() {
		c := make(chan clientv3.WatchResponse)
		close(c)
		return c
	}
	if f.behind.Load() {
		c := make(chan clientv3.WatchResponse, 1)
		c <- clientv3.WatchResponse{Header: &etcdserverpb.ResponseHeader{Revision: 1}}
		return c
	}
	ctx, cancel := context.WithCancel(ctx)
	f.mu.Lock()
	f.cancels = append(f.cancels, cancel)
	f.mu.Unlock()
	return f.Watcher.Watch(ctx, key, opts...)
}

func (f *flakyWatcher) RequestProgress(ctx context.Context) error {
	if f.silent.Load() {
		return nil
	}
	return f.Watcher.RequestProgress(ctx)
}

func (f *flakyWatcher) breakAll() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range f.cancels {
		c()
	}
	f.cancels = nil
}

func flakyClient(t testing.TB) (*clientv3.Client, *flakyWatcher) {
	c := *shared.Client(t) //nolint // a copy with another Watcher is what is wanted
	f := &flakyWatcher{Watcher: c.Watcher}
	c.Watcher = f
	return &c, f
}

func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("it never came about: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// A connection that breaks costs no event and no list.
func TestIndexReconnects(t *testing.T) {
	s := newTestStore(t, nil)
	c, flaky := flakyClient(t)
	x := startIndex(t, s, func(cfg *IndexConfig) { cfg.Client = c })
	for i := range 5 {
		a := mustCreate(t, s, input("web", fmt.Sprint("sa-", i)))
		wait(t, x, a.Revision)
		flaky.breakAll()
	}
	a := mustCreate(t, s, input("web", "last"))
	wait(t, x, a.Revision)
	sameAsStore(t, x, s)
	if x.Lists() != 1 {
		t.Errorf("%d lists", x.Lists())
	}
}

// While the store is away the index answers with what it knows, says how old
// that is, and catches up by a list if the store has forgotten meanwhile.
func TestIndexAfterCompaction(t *testing.T) {
	s := newTestStore(t, nil)
	c, flaky := flakyClient(t)
	var ahead atomic.Int64
	x := startIndex(t, s, func(cfg *IndexConfig) {
		cfg.Client = c
		cfg.Now = func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
	})
	kept, gone := mustCreate(t, s, input("web", "kept")), mustCreate(t, s, input("web", "gone"))
	wait(t, x, gone.Revision)
	flaky.refuse.Store(true)
	flaky.breakAll()
	n := flaky.watches.Load()
	until(t, "the index tries to watch again", func() bool { return flaky.watches.Load() > n })

	if _, err := s.Delete(t.Context(), DeleteInput{Cluster: "prod", ID: gone.ID}); err != nil {
		t.Fatal(err)
	}
	later := mustCreate(t, s, input("web", "later"))
	if _, err := c.Compact(t.Context(), later.Revision); err != nil && !errors.Is(err, rpctypes.ErrCompacted) {
		t.Fatal(err)
	}
	ahead.Store(int64(time.Hour))
	if _, ok := x.Lookup("prod", "web", "gone"); !ok || !x.Ready() {
		t.Error("what was known is not known any more")
	}
	if b := x.Behind(); b < 50*time.Minute {
		t.Errorf("behind by %v, after an hour", b)
	}
	flaky.refuse.Store(false)
	wait(t, x, later.Revision)
	if _, ok := x.Lookup("prod", "web", "gone"); ok {
		t.Error("a deletion was lost")
	}
	if got, ok := x.Lookup("prod", "web", "kept"); !ok || got.ID != kept.ID {
		t.Errorf("%+v", got)
	}
	sameAsStore(t, x, s)
	if x.Lists() != 2 {
		t.Errorf("%d lists", x.Lists())
	}
	until(t, "the index is current again", func() bool { return x.Behind() < time.Minute })
}

// A watch that says nothing is not one that has nothing to say.
func TestIndexStall(t *testing.T) {
	s := newTestStore(t, nil)
	c, flaky := flakyClient(t)
	x := startIndex(t, s, func(cfg *IndexConfig) { cfg.Client, cfg.Stall = c, 100*time.Millisecond })
	until(t, "the index is filled", x.Ready)
	flaky.silent.Store(true)
	n := flaky.watches.Load()
	until(t, "a new watch", func() bool { return flaky.watches.Load() > n+1 })
	flaky.silent.Store(false)
	a := mustCreate(t, s, input("web", "api"))
	wait(t, x, a.Revision)
}

// Progress shows that the index has everything, also when nothing happens.
func TestIndexProgress(t *testing.T) {
	s := newTestStore(t, nil)
	x := startIndex(t, s, nil)
	until(t, "the index is filled", x.Ready)
	// A change elsewhere moves the revision, and no event comes here.
	r, err := s.kv.Put(t.Context(), "/elsewhere", "x")
	if err != nil {
		t.Fatal(err)
	}
	wait(t, x, r.Header.Revision)
	a := x.current.Load()
	until(t, "progress", func() bool { return x.current.Load() > a })
}

// Where nothing is ever written the store still says that the index has
// everything: a server that merely waits has not lost its store.
func TestIndexOfAnIdleStore(t *testing.T) {
	srv, err := etcd.Start(t.Context(), etcd.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	x := NewIndex(IndexConfig{Client: srv.Client(), Progress: 5 * time.Millisecond})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- x.Run(ctx) }()
	until(t, "the list", x.Ready)
	listed := x.current.Load()
	until(t, "an answer that was asked for after the list", func() bool { return x.current.Load() > listed })
	cancel()
	<-done
	if err := srv.Close(); err != nil {
		t.Error(err)
	}
}

// oldKV answers as a store does that was restored from the past.
type oldKV struct {
	clientv3.KV
	old atomic.Bool
}

func (o *oldKV) Get(ctx context.Context, key string, opts ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	r, err := o.KV.Get(ctx, key, opts...)
	if err == nil && o.old.Load() && len(r.Kvs) == 0 && r.Count == 0 {
		r.Header.Revision = 1
	}
	return r, err
}

// A member that is late is waited for; a store that has gone back is read anew.
func TestIndexOfAnOlderStore(t *testing.T) {
	s := newTestStore(t, nil)
	c, flaky := flakyClient(t)
	kv := &oldKV{KV: c.KV}
	c.KV = kv
	x := startIndex(t, s, func(cfg *IndexConfig) { cfg.Client = c })
	a := mustCreate(t, s, input("web", "api"))
	wait(t, x, a.Revision)
	n := flaky.watches.Load()
	flaky.behind.Store(true)
	flaky.breakAll()
	until(t, "new watches", func() bool { return flaky.watches.Load() > n+2 })
	if x.Lists() != 1 {
		t.Errorf("%d lists because of a late member", x.Lists())
	}
	kv.old.Store(true)
	until(t, "a new list", func() bool { return x.Lists() > 1 })
	kv.old.Store(false)
	flaky.behind.Store(false)
	b := mustCreate(t, s, input("web", "other"))
	wait(t, x, b.Revision)
	sameAsStore(t, x, s)
}

func TestIndexDamage(t *testing.T) {
	s := newTestStore(t, nil)
	a, b := mustCreate(t, s, input("web", "a")), mustCreate(t, s, input("web", "b"))
	x := startIndex(t, s, nil)
	wait(t, x, b.Revision)
	slot, _ := slotOf(a.ID)
	if _, err := s.kv.Put(t.Context(), s.keys.association("prod", slot), "{"); err != nil {
		t.Fatal(err)
	}
	r, err := s.kv.Put(t.Context(), s.keys.prefix+"a/prod/not-a-slot", "{}")
	if err != nil {
		t.Fatal(err)
	}
	wait(t, x, r.Header.Revision)
	if _, ok := x.Lookup("prod", "web", "a"); ok {
		t.Error("a damaged record still gives a role")
	}
	if _, ok := x.Lookup("prod", "web", "b"); !ok || x.Damaged() != 1 {
		t.Errorf("%d damaged", x.Damaged())
	}
	// Who asks must be able to tell "cannot say" from "there is none", also after a
	// list, and of this cluster alone.
	fresh := startIndex(t, s, nil)
	wait(t, fresh, r.Header.Revision)
	if x.Whole("prod") || fresh.Whole("prod") || !x.Whole("dev") {
		t.Error("it is not told which cluster has a damaged record")
	}
	if _, err := s.kv.Delete(t.Context(), s.keys.association("prod", slot)); err != nil {
		t.Fatal(err)
	}
	until(t, "the record is gone", func() bool { return x.Whole("prod") })
	if r, err = s.kv.Put(t.Context(), s.keys.cluster("prod"), "{"); err != nil {
		t.Fatal(err)
	}
	wait(t, x, r.Header.Revision)
	if _, ok := x.Lookup("prod", "web", "b"); ok {
		t.Error("a cluster that cannot be read still gives roles")
	}
	fresh = startIndex(t, s, nil)
	wait(t, fresh, r.Header.Revision)
	if x.Whole("prod") || fresh.Whole("prod") {
		t.Error("a cluster that cannot be read counts as none")
	}
	d, err := s.kv.Delete(t.Context(), s.keys.cluster("prod"))
	if err != nil {
		t.Fatal(err)
	}
	wait(t, x, d.Header.Revision)
	if !x.Whole("prod") {
		t.Error("a cluster that is gone counts as damaged")
	}
}

func TestIndexBeforeItsList(t *testing.T) {
	x := NewIndex(IndexConfig{Client: shared.Client(t), Now: func() time.Time { return time.Now().Add(time.Hour) }})
	if x.Ready() {
		t.Error("ready before anything was read")
	}
	if _, ok := x.Lookup("a", "b", "c"); ok {
		t.Error("found something in nothing")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := x.Wait(ctx, 0); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// seeded makes an index of n associations in each of so many clusters, from
// records as they are stored.
func seeded(t testing.TB, clusters, n int) *Index {
	t.Helper()
	x := NewIndex(IndexConfig{})
	s := NewStore(Config{})
	for c := range clusters {
		cl := testCluster(fmt.Sprintf("cluster-%03d", c))
		if err := cl.Validate(); err != nil {
			t.Fatal(err)
		}
		rec, err := encodeCluster(&cl)
		if err != nil {
			t.Fatal(err)
		}
		event(t, x, x.keys.cluster(cl.Name), rec)
		for i := range n {
			in := seedInput(cl.Name, i)
			a, err := s.proposed(&cl, in)
			if err != nil {
				t.Fatal(err)
			}
			s.name(&cl, &a, i)
			if rec, err = encode(&a); err != nil {
				t.Fatal(err)
			}
			event(t, x, x.keys.association(cl.Name, slotString(i)), rec)
		}
	}
	return x
}

// seedInput has names of the length that people give.
func seedInput(cluster string, i int) CreateInput {
	in := CreateInput{Cluster: cluster, Namespace: fmt.Sprintf("team-payments-%d", i%50), ServiceAccount: fmt.Sprintf("checkout-worker-%d", i),
		RoleARN: fmt.Sprintf("arn:aws:iam::%s:role/pods/checkout-worker-role-%d", account, i)}
	if i%4 == 0 {
		in.TargetRoleARN = ptr(fmt.Sprintf("arn:aws:iam::%s:role/target-%d", other, i))
	}
	return in
}

func event(t testing.TB, x *Index, key, value string) {
	t.Helper()
	x.apply(context.Background(), []*clientv3.Event{{Type: clientv3.EventTypePut, Kv: keyValue(key, value)}})
	if x.Damaged() != 0 {
		t.Fatalf("%s: %s", key, value)
	}
}

func TestLookupAllocatesNothing(t *testing.T) {
	x := seeded(t, 3, 50)
	if n := testing.AllocsPerRun(100, func() {
		if a, ok := x.Lookup("cluster-001", "team-payments-7", "checkout-worker-7"); !ok || a.ID == "" {
			t.Error("not found")
		}
		if c, ok := x.Cluster("cluster-001"); !ok || c.Name == "" {
			t.Error("no cluster")
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
