// SPDX-License-Identifier: Apache-2.0

// Package credcache keeps each subject's credentials ready to be sent, and
// fetches them from the upstream once however many ask.
//
// A subject is a pod and its service account, taken from a token that was
// verified locally; so a rotated token costs no upstream call. A token that was
// not verified is known by its exact bytes only, and the upstream is its judge.
//
// A fetch belongs to the cache and not to whoever asked first: a client that
// gives up finds the result at its next try. Results and errors reach all that
// wait. Credentials that are asked for are renewed ahead of time, within one
// budget for the node in which requests that wait come first. A refresh that
// fails keeps what there is until it expires, unless the upstream says that
// the association or the pod is no more.
//
// Timers run on the runtime's clock, times are read from Config.Now; tests make
// both agree with testing/synctest.
package credcache

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"
	"math"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

// Limits that are part of the contract with clients.
const (
	// MinServed is the life credentials must have left to be handed out.
	MinServed = 15 * time.Second
	// MaxDenialMemory bounds Config.DenialMemory: longer would delay pods whose
	// association was just made.
	MaxDenialMemory = time.Second
)

// Defaults of Config.
const (
	DefaultAudience         = "pods.eks.amazonaws.com"
	DefaultMaxEntries       = 2000
	DefaultMaxBytes         = 32 << 20
	DefaultEntriesPerPod    = 8
	DefaultMaxRetention     = 3 * time.Hour
	DefaultUpstreamQPS      = 20
	DefaultBackgroundQPS    = 3
	DefaultConcurrency      = 32
	DefaultFetchTimeout     = 10 * time.Second
	DefaultFetchesPerPod    = 8
	DefaultUnverifiedQPS    = 2
	DefaultUnverifiedBurst  = 10
	defaultEndedMemory      = time.Minute
	shardCount              = 64
	maxDenials              = 4096
	never                   = math.MaxInt64
	schedulerMaxSleep       = 30 * time.Second
	tokenMustOutlastRefresh = time.Minute
)

// Upstream trades a token for credentials. Fetch is called by the cache's own
// goroutines, with the cache's own deadline. Errors should be *UpstreamError;
// others are taken as "unavailable".
type Upstream interface {
	Fetch(ctx context.Context, token string) (Answer, error)
}

// Answer is the upstream's answer. It does not show its secrets when printed,
// logged or encoded.
type Answer struct {
	// Namespace, ServiceAccount and Audience are whom the upstream found the
	// token to speak for and to.
	Namespace, ServiceAccount, Audience string
	AssociationARN, AssociationID       string
	// AssumedRoleARN is the STS session's; the account is taken from it.
	AssumedRoleARN                             string
	AccessKeyID, SecretAccessKey, SessionToken string
	// Expiration of the credentials.
	Expiration time.Time
}

// String describes the answer without its secrets.
func (a Answer) String() string {
	return fmt.Sprintf("credentials of %s for %s/%s until %s", a.AssumedRoleARN, a.Namespace, a.ServiceAccount, a.Expiration.UTC().Format(time.RFC3339))
}

// GoString hides the secrets from %#v.
func (a Answer) GoString() string { return a.String() }

// LogValue hides the secrets from slog.
func (a Answer) LogValue() slog.Value { return slog.StringValue(a.String()) }

// MarshalText hides the secrets from encoders.
func (a Answer) MarshalText() ([]byte, error) { return []byte(a.String()), nil }

// Fetch is what Config.Observe is told of each upstream call.
type Fetch struct {
	Subject evidence.Subject
	// Verified: the subject is known, not only claimed.
	Verified bool
	// Background: a refresh nobody waits for.
	Background bool
	// Reason is evidence.ReasonServed for success.
	Reason evidence.Reason
	// Queued is the time spent waiting for the budget, Duration the call's.
	Queued, Duration time.Duration
}

// Config of a Cache. Zero values mean the default of the field's name unless
// the field says otherwise.
type Config struct {
	// Upstream is required.
	Upstream Upstream
	// Audience must be the answers'.
	Audience string
	// Disabled keeps nothing; simultaneous requests still share one fetch.
	Disabled bool
	// MaxEntries and MaxBytes bound what is kept. Beyond them the entry goes
	// whose last request is longest ago.
	MaxEntries int
	MaxBytes   int64
	// EntriesPerPod bounds what one pod can make the cache keep; beyond it the
	// pod's own entries go. Negative: no such bound.
	EntriesPerPod int
	// MaxRetention is the longest time credentials are served before they are
	// renewed, however long they live.
	MaxRetention time.Duration
	// UpstreamQPS bounds all upstream calls, in calls a second; short bursts may
	// be twice as many. BackgroundQPS bounds refreshes among them, unless they
	// are within ten minutes of expiry. Concurrency bounds the calls in flight.
	UpstreamQPS   float64
	BackgroundQPS float64
	Concurrency   int
	// FetchTimeout bounds a fetch, waiting for the budget included.
	FetchTimeout time.Duration
	// FetchesPerPod bounds the fetches in flight or waiting for one pod.
	FetchesPerPod int
	// UnverifiedQPS and UnverifiedBurst bound the fetches that one pod can cause
	// with tokens that are not verified.
	UnverifiedQPS   float64
	UnverifiedBurst int
	// DenialMemory is how long a refusal is remembered; 0 means
	// MaxDenialMemory, which also bounds it; negative remembers none.
	DenialMemory time.Duration
	// Observe, if set, is called after each upstream call. It must not block.
	Observe func(Fetch)
	// Now is the clock; nil means time.Now.
	Now func() time.Time
	// Logger gets what happens to credentials, never credentials; nil discards.
	Logger *slog.Logger
}

// Request asks for one subject's credentials.
type Request struct {
	// Token passed the verdict: it has not expired and, in enforce mode, is the
	// connection's pod's.
	Token evidence.Token
	// Raw is the token's text as it was sent; a secret. The cache copies what it
	// keeps, so it may be backed by a buffer that is reused after Get.
	Raw string
	// PodUID is the pod that the kernel saw connecting, if it saw one. Fetches
	// with tokens that are not verified are counted against it, never against
	// what such a token claims.
	PodUID evidence.PodUID
	// Bypass asks the upstream and keeps nothing.
	Bypass bool
}

// Outcome says how a request was answered.
type Outcome uint8

// The outcomes of Get.
const (
	// OutcomeHit: from memory.
	OutcomeHit Outcome = iota
	// OutcomeMiss: this request started a fetch and waited for it.
	OutcomeMiss
	// OutcomeJoined: this request waited for a fetch that was under way.
	OutcomeJoined
	// OutcomeDenied: a refusal of less than a second ago is still remembered.
	OutcomeDenied
	// OutcomeBypass: fetched without being kept.
	OutcomeBypass
	// OutcomeLimited: refused here, nothing was asked of the upstream.
	OutcomeLimited
)

// String is the value used in logs, metrics and JSON.
func (o Outcome) String() string {
	switch o {
	case OutcomeHit:
		return "hit"
	case OutcomeMiss:
		return "miss"
	case OutcomeJoined:
		return "joined"
	case OutcomeDenied:
		return "denied"
	case OutcomeBypass:
		return "bypass"
	case OutcomeLimited:
		return "limited"
	}
	return fmt.Sprintf("outcome_%d", uint8(o))
}

// key is what an entry is found by: the subject of a verified token, or the
// hash of an unverified token's bytes. Never both, so that no unverified claim
// can reach what belongs to a subject.
type key struct {
	subject evidence.Subject
	token   [32]byte
	bypass  bool
}

// item is one key's place: its credentials, its fetch, its refusal.
type item struct {
	key      key
	hash     uint64
	pod      evidence.PodUID
	subject  evidence.Subject // as claimed, if not verified
	verified bool

	// Read on the hit path without a lock.
	entry    atomic.Pointer[Entry]
	denial   atomic.Pointer[denial]
	lastUsed atomic.Int64 // unix ns
	// wantsRequest is when a hit should report itself: the refresh is due and
	// waits for a request; never if not.
	wantsRequest atomic.Int64
	tokenExpiry  atomic.Int64 // unix ns, of token

	// The rest is guarded by Cache.mu.
	token     string // newest one seen, for the refresh
	flight    *flight
	gone      bool // no longer in the cache
	wasAsked  bool // the present entry was fetched because somebody asked
	size      int64
	failures  int // refreshes failed in a row
	lastErr   error
	lastErrAt time.Time

	lruStamp                       int64 // lastUsed when last looked at
	dueAt                          int64
	expiresAt                      int64 // the entry's, where ready is ordered by it
	lruIndex, dueIndex, readyIndex int
	podPrev, podNext               *item
}

// denial is a remembered refusal.
type denial struct {
	until   int64
	err     error
	tokenID [32]byte
	// anyToken: the refusal is about the subject and not about the token.
	anyToken bool
}

// flight is one fetch and those who wait for it.
type flight struct {
	item       *item
	token      string
	tokenID    [32]byte
	expiry     time.Time // of the token; zero if unknown
	background bool
	// joined: somebody waits for it although it began in the background.
	joined bool // guarded by Cache.mu
	// discard: the pod ended; whoever waits gets the result, nobody keeps it.
	discard bool // guarded by Cache.mu

	done  chan struct{}
	entry *Entry // set before done is closed
	err   error
}

type shard struct {
	mu    sync.RWMutex
	items map[key]*item
	hits  atomic.Uint64
	// Keeps two shards' counters off one cache line.
	_ [64]byte
}

// pod is what is counted for one pod.
type pod struct {
	items    *item // list by podNext
	count    int
	entries  int
	flights  int
	tokens   float64 // of its bucket of unverified fetches
	refilled time.Time
}

// Cache keeps and fetches credentials. It is safe for concurrent use.
type Cache struct {
	cfg    Config
	now    func() time.Time
	log    *slog.Logger
	seed   maphash.Seed
	budget *budget
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	wake   chan struct{}
	shards [shardCount]shard

	// mu guards everything that changes when credentials come or go. Hits do
	// not take it. It is taken before a shard's lock, never after.
	mu      sync.Mutex
	closed  bool
	pods    map[evidence.PodUID]*pod
	ended   map[evidence.PodUID]time.Time // pods that ended lately, until when
	lru     itemHeap                      // items with an entry, by lruStamp
	due     itemHeap                      // items with something to do, by dueAt
	ready   itemHeap                      // items to refresh now, by expiry
	bytes   int64
	denials int
	stats   counters
}

// Errors of New and Get.
var (
	// ErrConfig: New was given a Config it cannot work with.
	ErrConfig = errors.New("invalid cache configuration")
	// ErrClosed: the cache is closed. Retriable elsewhere.
	ErrClosed = errors.New("the credential cache is closed")
	// ErrLimited: this pod has too many fetches under way or caused too many.
	ErrLimited = errors.New("too many credential fetches for this pod")
	// ErrOverloaded: the node's budget of upstream calls is used up.
	ErrOverloaded = errors.New("the node's budget of upstream calls is used up")
	// ErrAbandoned: the caller's context ended; the fetch goes on.
	ErrAbandoned = errors.New("gave up waiting for the credentials")
	// ErrFetchPanicked: a defect in the upstream client.
	ErrFetchPanicked = errors.New("fetching the credentials failed unexpectedly")
)

// New makes a cache and starts its scheduler, which Close ends.
func New(cfg Config) (*Cache, error) {
	if cfg.Upstream == nil {
		return nil, fmt.Errorf("%w: no upstream", ErrConfig)
	}
	if cfg.UpstreamQPS < 0 || cfg.BackgroundQPS < 0 || cfg.Concurrency < 0 || cfg.MaxEntries < 0 || cfg.MaxBytes < 0 ||
		cfg.FetchTimeout < 0 || cfg.MaxRetention < 0 {
		return nil, fmt.Errorf("%w: negative limit", ErrConfig)
	}
	setDefault(&cfg.Audience, DefaultAudience)
	setDefault(&cfg.MaxEntries, DefaultMaxEntries)
	setDefault(&cfg.MaxBytes, DefaultMaxBytes)
	setDefault(&cfg.EntriesPerPod, DefaultEntriesPerPod)
	setDefault(&cfg.MaxRetention, DefaultMaxRetention)
	setDefault(&cfg.UpstreamQPS, DefaultUpstreamQPS)
	setDefault(&cfg.BackgroundQPS, DefaultBackgroundQPS)
	setDefault(&cfg.Concurrency, DefaultConcurrency)
	setDefault(&cfg.FetchTimeout, DefaultFetchTimeout)
	setDefault(&cfg.FetchesPerPod, DefaultFetchesPerPod)
	setDefault(&cfg.UnverifiedQPS, DefaultUnverifiedQPS)
	setDefault(&cfg.UnverifiedBurst, DefaultUnverifiedBurst)
	setDefault(&cfg.DenialMemory, MaxDenialMemory)
	cfg.DenialMemory = min(cfg.DenialMemory, MaxDenialMemory)
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	c := &Cache{
		cfg:    cfg,
		now:    cfg.Now,
		log:    cfg.Logger,
		seed:   maphash.MakeSeed(),
		budget: newBudget(cfg),
		wake:   make(chan struct{}, 1),
		pods:   map[evidence.PodUID]*pod{},
		ended:  map[evidence.PodUID]time.Time{},
		lru:    byLastUse(),
		due:    byDueTime(),
		ready:  byExpiry(),
		stats:  newCounters(),
	}
	for i := range c.shards {
		c.shards[i].items = map[key]*item{}
	}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	c.wg.Go(c.schedule)
	return c, nil
}

func setDefault[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

// Close ends the scheduler and all fetches, and forgets everything. Whoever
// waits gets an error.
func (c *Cache) Close() {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.cancel()
	c.wg.Wait()
	c.budget.stop()
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range c.shards {
		for _, it := range c.items(&c.shards[i]) {
			c.remove(it)
		}
	}
}

// Get returns a subject's credentials, from memory or from the upstream, with
// how they were come by. On a hit it does not touch ctx, allocates nothing and
// takes no lock that another subject's miss holds. Else it waits until the
// fetch ends or ctx does; the fetch goes on without it.
//
// Errors are the upstream's, or ErrAbandoned, ErrLimited, ErrOverloaded,
// ErrClosed; ReasonOf names them all. After an outcome other than OutcomeHit
// the pod may have ended meanwhile: the caller looks again.
func (c *Cache) Get(ctx context.Context, req Request) (*Entry, Outcome, error) {
	k, hash := c.keyOf(&req)
	now := c.now().UnixNano()
	if !k.bypass {
		s := &c.shards[hash%shardCount]
		s.mu.RLock()
		it := s.items[k]
		s.mu.RUnlock()
		if it != nil {
			// Expiry is looked at here, at each request, and not left to a sweep.
			if e := it.entry.Load(); e != nil && now < e.servedUntil {
				it.lastUsed.Store(now)
				if now >= it.wantsRequest.Load() || expiryOf(&req.Token) > it.tokenExpiry.Load() {
					c.offer(it, &req)
				}
				s.hits.Add(1)
				return e, OutcomeHit, nil
			}
			if d := it.denial.Load(); d.covers(&req, now) {
				c.stats.denied.Add(1)
				return nil, OutcomeDenied, d.err
			}
		}
	}
	return c.miss(ctx, k, hash, &req)
}

// keyOf gives the key and its hash, without allocating.
func (c *Cache) keyOf(req *Request) (key, uint64) {
	var k key
	var hash uint64
	if req.Token.Verified {
		k.subject = req.Token.Subject
		hash = maphash.String(c.seed, string(k.subject.PodUID))
	} else {
		k.token = hashToken(req.Raw)
		hash = maphash.Bytes(c.seed, k.token[:])
	}
	k.bypass = req.Bypass || c.cfg.Disabled
	return k, hash
}

func (d *denial) covers(req *Request, now int64) bool {
	return d != nil && now < d.until && (d.anyToken || d.tokenID == req.Token.ID)
}

// expiryOf is a token's expiry in unix nanoseconds; an unknown one counts as
// older than every known one.
func expiryOf(t *evidence.Token) int64 {
	if t.Expiry.IsZero() {
		return 0
	}
	return t.Expiry.UnixNano()
}

// miss starts a fetch or joins one.
func (c *Cache) miss(ctx context.Context, k key, hash uint64, req *Request) (*Entry, Outcome, error) {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil, OutcomeLimited, ErrClosed
	}
	uid := req.PodUID
	if req.Token.Verified {
		uid = req.Token.Subject.PodUID
	}
	now := c.now()
	if until, ok := c.ended[uid]; ok && !k.bypass && now.Before(until) {
		// A request that was under way when its pod ended: what is fetched for it
		// must not outlive it.
		k.bypass = true
	}
	s := &c.shards[hash%shardCount]
	it := s.items[k] // writers hold c.mu, so reading needs no shard lock
	if it != nil {
		// Another request may have been faster since the look without the lock.
		if e := it.entry.Load(); e != nil && now.UnixNano() < e.servedUntil {
			it.lastUsed.Store(now.UnixNano())
			c.mu.Unlock()
			s.hits.Add(1)
			return e, OutcomeHit, nil
		}
		if d := it.denial.Load(); d.covers(req, now.UnixNano()) {
			c.mu.Unlock()
			c.stats.denied.Add(1)
			return nil, OutcomeDenied, d.err
		}
	}
	outcome := OutcomeJoined
	if it == nil || it.flight == nil {
		if !c.admit(uid, req.Token.Verified, now) {
			c.mu.Unlock()
			c.stats.limited.Add(1)
			return nil, OutcomeLimited, ErrLimited
		}
		if it == nil {
			it = c.insert(k, hash, uid, req)
		}
		it.lastUsed.Store(now.UnixNano())
		c.keepToken(it, req)
		c.start(it, req.Raw, req.Token, false)
		outcome = OutcomeMiss
	}
	f := it.flight
	f.joined = true
	c.mu.Unlock()
	if outcome == OutcomeMiss {
		c.stats.misses.Add(1)
	} else {
		c.stats.joined.Add(1)
	}
	if k.bypass {
		outcome = OutcomeBypass
	}
	select {
	case <-f.done:
		return f.entry, outcome, f.err
	case <-ctx.Done():
		c.stats.abandoned.Add(1)
		return nil, outcome, fmt.Errorf("%w: %w", ErrAbandoned, ctx.Err())
	}
}

// admit counts a fetch against its pod. c.mu is held.
func (c *Cache) admit(uid evidence.PodUID, verified bool, now time.Time) bool {
	p := c.pods[uid]
	if p == nil {
		p = c.addPod(uid, now)
	}
	if p.flights >= c.cfg.FetchesPerPod {
		return false
	}
	if !verified && c.cfg.UnverifiedQPS > 0 {
		c.refillPod(p, now)
		if p.tokens < 1 {
			return false
		}
		p.tokens--
	}
	return true
}

func (c *Cache) addPod(uid evidence.PodUID, now time.Time) *pod {
	p := &pod{tokens: float64(c.cfg.UnverifiedBurst), refilled: now}
	c.pods[cloneUID(uid)] = p
	return p
}

func (c *Cache) refillPod(p *pod, now time.Time) {
	p.tokens = min(float64(c.cfg.UnverifiedBurst), p.tokens+max(0, now.Sub(p.refilled).Seconds())*c.cfg.UnverifiedQPS)
	p.refilled = now
}

// forgetPod drops a pod's record once it says nothing any more.
func (c *Cache) forgetPod(uid evidence.PodUID) {
	p := c.pods[uid]
	if p == nil || p.count > 0 || p.flights > 0 {
		return
	}
	c.refillPod(p, c.now())
	if _, ended := c.ended[uid]; ended || p.tokens >= float64(c.cfg.UnverifiedBurst) {
		delete(c.pods, uid)
	}
}

// insert adds an empty item. c.mu is held.
func (c *Cache) insert(k key, hash uint64, uid evidence.PodUID, req *Request) *item {
	// The strings may be parts of a connection's buffer.
	k.subject = cloneSubject(k.subject)
	it := &item{
		key: k, hash: hash, pod: cloneUID(uid), subject: cloneSubject(req.Token.Subject), verified: req.Token.Verified,
		lruIndex: -1, dueIndex: -1, readyIndex: -1,
	}
	if it.verified {
		it.subject = k.subject
	}
	it.wantsRequest.Store(never)
	p := c.pods[it.pod]
	if p == nil {
		p = c.addPod(it.pod, c.now())
	}
	p.count++
	it.podNext = p.items
	if p.items != nil {
		p.items.podPrev = it
	}
	p.items = it
	s := &c.shards[hash%shardCount]
	s.mu.Lock()
	s.items[k] = it
	s.mu.Unlock()
	return it
}

// remove takes an item out of the cache for good. A fetch of it goes on for
// those who wait. c.mu is held.
func (c *Cache) remove(it *item) {
	if it.gone {
		return
	}
	it.gone = true
	c.dropEntry(it)
	c.dropDenial(it)
	c.due.take(it)
	c.ready.take(it)
	it.token = ""
	s := &c.shards[it.hash%shardCount]
	s.mu.Lock()
	delete(s.items, it.key)
	s.mu.Unlock()
	p := c.pods[it.pod]
	p.count--
	if it.podPrev != nil {
		it.podPrev.podNext = it.podNext
	} else {
		p.items = it.podNext
	}
	if it.podNext != nil {
		it.podNext.podPrev = it.podPrev
	}
	it.podPrev, it.podNext = nil, nil
	c.forgetPod(it.pod)
}

// dropEntry takes an item's credentials away. c.mu is held.
func (c *Cache) dropEntry(it *item) {
	if it.entry.Swap(nil) == nil {
		return
	}
	c.lru.take(it)
	c.ready.take(it)
	it.wantsRequest.Store(never)
	c.bytes -= it.size
	it.size = 0
	c.pods[it.pod].entries--
}

func (c *Cache) dropDenial(it *item) {
	if it.denial.Swap(nil) != nil {
		c.denials--
	}
}

// items lists a shard's. c.mu is held.
func (c *Cache) items(s *shard) []*item {
	all := make([]*item, 0, len(s.items))
	for _, it := range s.items {
		all = append(all, it)
	}
	return all
}

// DropPod forgets a pod that has ended, at once. A fetch under way for it is
// not kept, nor is one that a request just behind starts. The pods' keeper
// marks the pod ended before it calls this.
func (c *Cache) DropPod(uid evidence.PodUID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	for old, until := range c.ended {
		if !now.Before(until) {
			delete(c.ended, old)
		}
	}
	c.ended[cloneUID(uid)] = now.Add(defaultEndedMemory)
	p := c.pods[uid]
	if p == nil {
		return
	}
	for it := p.items; it != nil; {
		next := it.podNext
		if it.flight != nil {
			it.flight.discard = true
		}
		if it.entry.Load() != nil {
			c.stats.droppedPod.Add(1)
		}
		c.remove(it)
		it = next
	}
	c.forgetPod(uid)
}

// AdmitPod tells that a pod lives: one that had ended and was made again under
// its UID is cached from now on.
func (c *Cache) AdmitPod(uid evidence.PodUID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.ended, uid)
}

// Permit lets the upstream client make one more attempt within a fetch. It
// never waits: when the budget is used up, somebody's first attempt is worth
// more than a retry.
func (c *Cache) Permit(context.Context) error {
	if !c.budget.takeRetry() {
		return ErrOverloaded
	}
	return nil
}

func cloneSubject(s evidence.Subject) evidence.Subject {
	return evidence.Subject{
		PodUID:         cloneUID(s.PodUID),
		Namespace:      strings.Clone(s.Namespace),
		ServiceAccount: strings.Clone(s.ServiceAccount),
	}
}

// cloneUID copies a pod UID out of whatever buffer it is part of.
func cloneUID(uid evidence.PodUID) evidence.PodUID {
	return evidence.PodUID(strings.Clone(string(uid)))
}
