// SPDX-License-Identifier: Apache-2.0

package credserver

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
	"github.com/latchkey-dev/latchkey/pkg/verdict"
)

// Allowance is what one account may use.
type Allowance struct {
	// Connections open at one time.
	Connections int
	// Rate is in requests per second, refused ones included.
	Rate float64
	// Burst is the number of requests that may come at once after a pause.
	Burst int
}

// Limits bound what one pod can take of the agent. There is no limit across
// pods: whatever one pod does, another finds its own allowance untouched.
// Fields that are zero take the default.
type Limits struct {
	// Pod is each attested pod's own. Default: 256 connections, 500 requests
	// per second, burst 1000: some hundred times what SDKs ask for.
	Pod Allowance
	// Stray is shared by all connections without evidence or with contradictory
	// evidence. Enforcing, none of them is ever served, so the default is
	// small: 64 connections, 50 requests per second, burst 100. In a weaker
	// mode they are, and the default is 1024 connections, 1000 requests per
	// second, burst 1000.
	Stray Allowance
	// Host is shared by all connections from outside every pod, so that stray
	// connections cannot crowd out the node's own probes. Same defaults.
	Host Allowance
	// Patience is how long a request beyond the rate is held before it is
	// looked at again and then refused. It turns a flood into a trickle that
	// costs its own pod's connections and not the node's CPU. Default 50 ms;
	// negative: none.
	Patience time.Duration
}

func (l Limits) withDefaults(p verdict.Policy) (Limits, error) {
	if l.Patience == 0 {
		l.Patience = 50 * time.Millisecond
	}
	shared := Allowance{Connections: 64, Rate: 50, Burst: 100}
	weaker := p.Default != verdict.Enforce
	for _, m := range p.Namespaces {
		weaker = weaker || m != verdict.Enforce
	}
	if weaker {
		shared = Allowance{Connections: 1024, Rate: 1000, Burst: 1000}
	}
	for _, e := range []struct {
		name      string
		is        *Allowance
		otherwise Allowance
	}{
		{"Pod", &l.Pod, Allowance{Connections: 256, Rate: 500, Burst: 1000}},
		{"Stray", &l.Stray, shared},
		{"Host", &l.Host, shared},
	} {
		if e.is.Connections == 0 {
			e.is.Connections = e.otherwise.Connections
		}
		if e.is.Rate == 0 {
			e.is.Rate = e.otherwise.Rate
		}
		if e.is.Burst == 0 {
			e.is.Burst = e.otherwise.Burst
		}
		// Below one request in ten minutes the arithmetic of bucket ends.
		if e.is.Connections < 1 || e.is.Burst < 1 || e.is.Burst > 1e6 || !(e.is.Rate >= 1.0/600 && e.is.Rate <= 1e9) {
			return Limits{}, fmt.Errorf("%w: limit %s cannot be %+v", ErrConfig, e.name, *e.is)
		}
	}
	return l, nil
}

// bucket is a token bucket in one word (the generic cell rate algorithm): at is
// when the bucket will be full again. Times are nanoseconds since the server's
// epoch, on the monotonic clock.
type bucket struct {
	at       atomic.Int64
	interval int64
	depth    int64
}

func newBucket(a Allowance) bucket {
	interval := max(int64(float64(time.Second)/a.Rate), 1)
	return bucket{interval: interval, depth: interval * int64(a.Burst)}
}

// take removes one request, or tells that there is none.
func (b *bucket) take(now int64) bool {
	for {
		at := b.at.Load()
		next := max(at, now) + b.interval
		if next-now > b.depth {
			return false
		}
		if b.at.CompareAndSwap(at, next) {
			return true
		}
	}
}

// knownPerPod is how many different tokens of one pod are remembered. A pod has
// one, and for a while two when it is rotated.
const knownPerPod = 4

// account is one pod's use of the endpoint, or that of all connections of a
// kind that has no pod.
type account struct {
	limit  int64
	bucket bucket
	// conns is written with ledger.mu held, so that an account in use is never
	// dropped.
	conns atomic.Int64
	// turned counts connections beyond the limit that are being told so.
	turned atomic.Int64
	// left is when the last connection was closed. Guarded by ledger.mu.
	left int64

	// known are tokens that the pod presented and that were verified. Nil for
	// shared accounts: there one client could push out another's.
	known *[knownPerPod]atomic.Pointer[knownToken]
	slot  atomic.Uint32
}

func newAccount(a Allowance) *account {
	return &account{limit: int64(a.Connections), bucket: newBucket(a)}
}

// crowded tells whether the account holds more than a quarter of the
// connections it may.
func (a *account) crowded() bool { return a.conns.Load() > a.limit/4 }

// ledger holds the accounts.
type ledger struct {
	pod   Allowance
	stray *account
	host  *account

	mu      sync.Mutex
	pods    map[evidence.PodUID]*account
	pruneAt int64
}

func newLedger(l Limits) *ledger {
	return &ledger{
		pod:   l.Pod,
		stray: newAccount(l.Stray),
		host:  newAccount(l.Host),
		pods:  make(map[evidence.PodUID]*account),
	}
}

// open charges a connection to its account. ok is false, and nothing charged,
// if that is at its limit.
func (l *ledger) open(a *evidence.Attestation, now int64) (_ *account, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var acct *account
	switch {
	case a.Finding == evidence.FindingPod && a.Pod != "":
		if acct = l.pods[a.Pod]; acct == nil {
			acct = newAccount(l.pod)
			acct.known = new([knownPerPod]atomic.Pointer[knownToken])
			acct.bucket.at.Store(now)
			acct.left = now
			l.pods[a.Pod] = acct
		}
	case a.Finding == evidence.FindingNotPod:
		acct = l.host
	default:
		acct = l.stray
	}
	if acct.conns.Load() >= acct.limit {
		return acct, false
	}
	acct.conns.Add(1)
	return acct, true
}

// close takes a connection off its account.
func (l *ledger) close(a *account, now int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	a.conns.Add(-1)
	a.left = now
}

// prune drops, about once per minute, the accounts of pods that have gone or
// been quiet: nobody is connected, and the bucket has filled up again, so that
// reconnecting never gains anything.
func (l *ledger) prune(now int64) {
	const every, quiet = int64(time.Minute), int64(5 * time.Minute)
	l.mu.Lock()
	defer l.mu.Unlock()
	if now < l.pruneAt {
		return
	}
	l.pruneAt = now + every
	for uid, a := range l.pods {
		if a.conns.Load() == 0 && a.left+quiet <= now && a.bucket.at.Load() <= now {
			delete(l.pods, uid)
		}
	}
}

func (l *ledger) size() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.pods)
}
