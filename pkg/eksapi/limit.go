// SPDX-License-Identifier: Apache-2.0

package eksapi

import (
	"net/http"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/latchkey-dev/latchkey/pkg/strangers"
)

// Rate is how many calls a caller may make.
type Rate struct {
	// PerSecond is the lasting rate; 0: the default of its kind, negative: no
	// limit.
	PerSecond float64
	// Burst is how many may come at once; 0: the default of its kind.
	Burst int
}

// Limits are the rates of one caller: a user, whatever its keys, or a node.
type Limits struct {
	// Reads are describe and lists; by default DefaultReads/s, 200 at once.
	Reads Rate
	// Writes are changes; by default DefaultWrites/s, 100 at once.
	Writes Rate
	// Exchanges are AssumeRoleForPodIdentity; by default DefaultExchanges/s, 1000
	// at once: a node whose pods all start.
	Exchanges Rate
}

// Defaults of Limits, in calls per second.
const (
	DefaultReads     = 50
	DefaultWrites    = 20
	DefaultExchanges = 200
)

type rateClass int

const (
	rateRead rateClass = iota
	rateWrite
	rateExchange
	rateClasses
)

// maxCallers bounds the memory of limits. Only who has proved a key has an
// entry, so nobody can push others out by making up names.
const maxCallers = 64 << 10

// limiters has one limiter for each caller and class. Two generations, as one
// that was not used since the last change of them is full again anyway.
type limiters struct {
	now   func() time.Time
	rates [rateClasses]Rate
	most  int

	mu         sync.Mutex
	young, old map[callerClass]*rate.Limiter
}

type callerClass struct {
	kind, name string
	class      rateClass
}

func newLimiters(l Limits, now func() time.Time) *limiters {
	or := func(r, d Rate) Rate {
		if r.PerSecond == 0 {
			r.PerSecond = d.PerSecond
		}
		if r.Burst <= 0 {
			r.Burst = d.Burst
		}
		return r
	}
	return &limiters{now: now, most: maxCallers, young: map[callerClass]*rate.Limiter{}, rates: [rateClasses]Rate{
		rateRead:     or(l.Reads, Rate{DefaultReads, 200}),
		rateWrite:    or(l.Writes, Rate{DefaultWrites, 100}),
		rateExchange: or(l.Exchanges, Rate{DefaultExchanges, 1000}),
	}}
}

func (l *limiters) allow(k callerClass) bool {
	r := l.rates[k.class]
	if r.PerSecond < 0 {
		return true
	}
	l.mu.Lock()
	limiter := l.young[k]
	if limiter == nil {
		if limiter = l.old[k]; limiter == nil {
			limiter = rate.NewLimiter(rate.Limit(r.PerSecond), r.Burst)
		}
		if len(l.young) >= l.most/2 {
			l.old, l.young = l.young, map[callerClass]*rate.Limiter{}
		}
		l.young[k] = limiter
	}
	l.mu.Unlock()
	return limiter.AllowN(l.now(), 1)
}

// limit refuses a caller that asks too often.
func (c *call) limit() error {
	k := callerClass{"user", c.caller.Name, c.route.op.rate}
	if n := c.caller.Node; n != nil {
		k.kind, k.name = "node "+n.Cluster, n.Name
	}
	if c.limits.allow(k) {
		return nil
	}
	return c.throttled()
}

func (c *call) throttled() error {
	return &fault{status: http.StatusTooManyRequests, code: "ThrottlingException", message: "Rate exceeded", cluster: c.modelCluster(), retryAfter: time.Second}
}

const (
	// freeBody is how much of a body is read without asking: more than the token of
	// any exchange. The number of connections bounds it.
	freeBody = 16 << 10
	// maxBodies is how many larger ones are held at a time for callers who have not
	// proved who they are yet, peerBodies how many of them for one address, which
	// may be a proxy's.
	maxBodies  = 256
	peerBodies = maxBodies / 2
)

// bodies counts the larger bodies that are being read.
type bodies struct {
	mu   sync.Mutex
	all  int
	from map[netip.Addr]int
}

func newBodies() *bodies { return &bodies{from: map[netip.Addr]int{}} }

// take has a place for one, until it is released; false: there is none.
func (b *bodies) take(remote string) (release func(), ok bool) {
	peer := strangers.Peer(remote)
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.all >= maxBodies || b.from[peer] >= peerBodies {
		return nil, false
	}
	b.all++
	b.from[peer]++
	return func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.all--
		if b.from[peer]--; b.from[peer] == 0 {
			delete(b.from, peer)
		}
	}, true
}
