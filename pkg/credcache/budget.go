// SPDX-License-Identifier: Apache-2.0

package credcache

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

const (
	// urgentShare: while a refresh near expiry waits, every fifth call is its.
	urgentShare = 5
	// slowestFactor bounds how far throttling slows the node down.
	slowestFactor = 0.1
	// recovery is the part of the full rate that comes back in a second.
	recovery = 0.05
	// maxBackgroundPause bounds how long throttling stops refreshes.
	maxBackgroundPause = time.Minute
)

// budget shares the node's upstream calls: a rate and a number of calls at
// once. Requests that wait come first, pod by pod in turn, so that one pod's
// flood is not in front of another's single request. Refreshes take what is
// left, at most their own rate; those near expiry get a fifth of all calls even
// if requests never end.
type budget struct {
	now     func() time.Time
	granted chan struct{} // a call for the waiting refresh; capacity 1

	mu            sync.Mutex
	rate, burst   float64
	backRate      float64
	backBurst     float64
	limit         int
	tokens        float64
	backTokens    float64
	refilled      time.Time
	factor        float64 // of rate, after throttling
	slowed        time.Time
	throttles     int // in a row, at most 5
	noRefreshTill time.Time

	inFlight int
	queues   map[evidence.PodUID]*podQueue
	turns    []*podQueue // pods with waiters, next one first
	waiting  int

	wants    bool // a refresh waits
	urgentAt time.Time
	owed     int // calls given to requests while an urgent refresh waited
	timer    *time.Timer
}

type podQueue struct {
	pod     evidence.PodUID
	waiters []*budgetWaiter
}

type budgetWaiter struct {
	granted chan struct{}
	gone    bool
}

func newBudget(cfg Config) *budget {
	b := &budget{
		now: cfg.Now, granted: make(chan struct{}, 1),
		rate: cfg.UpstreamQPS, burst: max(2, 2*cfg.UpstreamQPS),
		backRate: cfg.BackgroundQPS, backBurst: max(1, cfg.BackgroundQPS),
		limit: cfg.Concurrency, factor: 1,
		queues: map[evidence.PodUID]*podQueue{},
	}
	b.tokens, b.backTokens, b.refilled = b.burst, b.backBurst, b.now()
	return b
}

// acquire waits for a call, in its pod's turn. It fails with the context.
func (b *budget) acquire(ctx context.Context, pod evidence.PodUID) error {
	w := &budgetWaiter{granted: make(chan struct{})}
	b.mu.Lock()
	q := b.queues[pod]
	if q == nil {
		q = &podQueue{pod: pod}
		b.queues[pod] = q
		b.turns = append(b.turns, q)
	}
	q.waiters = append(q.waiters, w)
	b.waiting++
	b.dispatch()
	b.mu.Unlock()
	select {
	case <-w.granted:
		return nil
	case <-ctx.Done():
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	select {
	case <-w.granted:
		// Granted at the same moment: the call is not made, so it is free again.
		b.refund()
	default:
		w.gone = true
		if b.waiting--; b.waiting == 0 {
			clear(b.queues)
			b.turns = nil
		}
	}
	if errors.Is(ctx.Err(), context.Canceled) {
		return ErrClosed // nothing but Close cancels a fetch
	}
	return fmt.Errorf("%w: %w", ErrOverloaded, ctx.Err())
}

// release ends a call.
func (b *budget) release() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.inFlight--
	b.dispatch()
}

// giveBack returns a call that was granted to a refresh and not made.
func (b *budget) giveBack() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.refund()
}

func (b *budget) refund() {
	b.inFlight--
	b.tokens = min(b.burst, b.tokens+1)
	b.dispatch()
}

// want says that a refresh waits, and from when on it is urgent. The answer
// comes once on granted.
func (b *budget) want(urgentAt time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.granted) > 0 {
		return // one was given and is not taken yet
	}
	b.wants, b.urgentAt = true, urgentAt
	b.dispatch()
}

// unwant says that no refresh waits.
func (b *budget) unwant() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.wants = false
}

// takeRetry takes a call for one more attempt of a fetch, if nobody waits.
func (b *budget) takeRetry() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.refill(b.now())
	if b.waiting > 0 || b.tokens < 1 {
		return false
	}
	b.tokens--
	return true
}

// report lets throttling slow the node down and success bring it back.
func (b *budget) report(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := b.now()
	b.refill(now)
	var up *UpstreamError
	if !errors.As(err, &up) || up.Reason != evidence.ReasonUpstreamThrottled {
		if err == nil {
			b.throttles = 0
		}
		return
	}
	// Many calls in flight are refused together; that is one sign, not many.
	if now.Sub(b.slowed) >= time.Second {
		b.slowed = now
		b.factor = max(slowestFactor, b.factor/2)
		b.throttles = min(b.throttles+1, 5)
	}
	pause := min(max(up.RetryAfter, time.Second<<b.throttles), maxBackgroundPause)
	if till := now.Add(pause); till.After(b.noRefreshTill) {
		b.noRefreshTill = till
	}
	b.dispatch()
}

// refill adds what the time has brought. b.mu is held.
func (b *budget) refill(now time.Time) {
	// A clock set back brings nothing and takes nothing.
	seconds := max(0, now.Sub(b.refilled).Seconds())
	b.refilled = now
	b.factor = min(1, b.factor+seconds*recovery)
	b.tokens = min(b.burst, b.tokens+seconds*b.rate*b.factor)
	b.backTokens = min(b.backBurst, b.backTokens+seconds*b.backRate)
}

// dispatch gives out what there is. b.mu is held.
func (b *budget) dispatch() {
	now := b.now()
	b.refill(now)
	for b.inFlight < b.limit && (b.waiting > 0 || b.wants) {
		if b.tokens < 1 {
			b.later(seconds((1 - b.tokens) / (b.rate * b.factor)))
			return
		}
		urgent := b.wants && !now.Before(b.urgentAt)
		switch {
		case urgent && (b.waiting == 0 || b.owed >= urgentShare-1):
			b.grantRefresh()
		case b.waiting > 0:
			b.grantNext()
			if urgent {
				b.owed++
			}
		default:
			if wait := b.refreshWait(now); wait > 0 {
				b.later(wait)
				return
			}
			b.backTokens--
			b.grantRefresh()
		}
	}
}

// refreshWait is how long a refresh that is not urgent has to wait, 0 if it may
// go. One call is left for a request, so that refreshes at the full rate do not
// make requests wait. b.mu is held.
func (b *budget) refreshWait(now time.Time) time.Duration {
	wait := max(0, b.noRefreshTill.Sub(now))
	if b.backTokens < 1 {
		wait = max(wait, seconds((1-b.backTokens)/b.backRate))
	}
	if b.tokens < 2 {
		wait = max(wait, seconds((2-b.tokens)/(b.rate*b.factor)))
	}
	// It may become urgent before.
	return min(wait, max(time.Millisecond, b.urgentAt.Sub(now)))
}

func (b *budget) grantRefresh() {
	b.take()
	b.wants, b.owed = false, 0
	b.granted <- struct{}{}
}

// grantNext gives a call to the pod whose turn it is. b.mu is held and somebody
// waits.
func (b *budget) grantNext() {
	for {
		q := b.turns[0]
		b.turns = b.turns[1:]
		var w *budgetWaiter
		for len(q.waiters) > 0 && w == nil {
			if !q.waiters[0].gone {
				w = q.waiters[0]
			}
			q.waiters[0] = nil
			q.waiters = q.waiters[1:]
		}
		if len(q.waiters) > 0 {
			b.turns = append(b.turns, q)
		} else {
			delete(b.queues, q.pod)
		}
		if w != nil {
			b.waiting--
			b.take()
			close(w.granted)
			return
		}
	}
}

func (b *budget) take() {
	b.tokens--
	b.inFlight++
}

// later looks again after a while. b.mu is held.
func (b *budget) later(wait time.Duration) {
	// Rounding down would look again too early, over and over.
	wait = max(wait+time.Microsecond, 100*time.Microsecond)
	if b.timer != nil {
		b.timer.Stop()
	}
	b.timer = time.AfterFunc(wait, func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.dispatch()
	})
}

func (b *budget) stop() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.limit = 0
	if b.timer != nil {
		b.timer.Stop()
	}
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }
