// SPDX-License-Identifier: Apache-2.0

package credcache

import (
	"container/heap"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

const (
	// minLeft is the life that credentials keep when they are handed out.
	minLeft = 20 * time.Minute
	// urgentLeft: refreshes closer to expiry get their own share of the budget.
	urgentLeft = 10 * time.Minute
	// spread is the longest time over which one node's refreshes are spread.
	spread = 30 * time.Minute
)

// refreshTime is when credentials should be renewed. Below 40 minutes of life:
// around half. Else early enough that they keep minLeft with a twelfth of their
// life to spare for a queue, and never later than maxRetention. The hash
// spreads subjects that were fetched together.
func refreshTime(fetched, expires time.Time, maxRetention time.Duration, hash uint64) time.Time {
	life := expires.Sub(fetched)
	var earliest, latest time.Duration
	if life < 2*minLeft {
		latest = min(life/2, maxRetention)
		earliest = latest * 4 / 5
	} else {
		latest = min(life-minLeft-life/12, maxRetention)
		earliest = latest - min(latest/2, spread)
	}
	return fetched.Add(earliest + time.Duration(fraction(hash)*float64(latest-earliest)))
}

// fraction gives a number in [0,1) from the hash's bits that do not choose the
// shard.
func fraction(hash uint64) float64 { return float64(hash>>32) / (1 << 32) }

// retryPause is the time to the next try after failed refreshes: longer with
// each failure, shorter as the end comes near, and not the same for all.
func retryPause(left time.Duration, failures int, hash uint64) time.Duration {
	pause := min(15*time.Second<<min(failures-1, 5), left/4, 5*time.Minute)
	pause = max(pause, 5*time.Second)
	return pause/2 + time.Duration(fraction(hash*0x9E3779B97F4A7C15+uint64(failures)<<40)*float64(pause)/2)
}

// asked: somebody wanted these credentials during their present life.
func (it *item) asked(e *Entry) bool {
	return it.wasAsked || it.lastUsed.Load() > e.fetched.UnixNano()
}

// offer takes a request's newer token, and starts the refresh that waits for
// one. Called from the hit path a few times in an entry's life.
func (c *Cache) offer(it *item, req *Request) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if it.gone || c.closed {
		return
	}
	c.keepToken(it, req)
	now := c.now()
	if now.UnixNano() >= it.wantsRequest.Load() {
		c.refreshNow(it, now)
		if it.flight == nil && it.readyIndex < 0 {
			// This token will not do (it is about to expire): hits go without the lock
			// for a while.
			it.wantsRequest.Store(now.Add(time.Second).UnixNano())
		}
	}
}

// refreshNow queues an item's refresh, if one makes sense. If not, the next
// hit asks again. c.mu is held.
func (c *Cache) refreshNow(it *item, now time.Time) {
	e := it.entry.Load()
	if e == nil || it.flight != nil || it.readyIndex >= 0 || !it.asked(e) || !it.tokenUsable(now) {
		return
	}
	it.wantsRequest.Store(never)
	c.ready.add(it)
	c.dueSet(it, e.servedUntil)
	c.signal()
}

// dueSet plans an item's next event. c.mu is held.
func (c *Cache) dueSet(it *item, at int64) {
	it.dueAt = at
	if it.dueIndex >= 0 {
		c.due.fix(it)
	} else {
		c.due.add(it)
	}
}

// signal makes the scheduler look again.
func (c *Cache) signal() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// schedule runs until Close: removes what has expired and refreshes what is
// due, as the budget allows.
func (c *Cache) schedule() {
	timer := time.NewTimer(schedulerMaxSleep)
	defer timer.Stop()
	for {
		sleep := c.step()
		timer.Reset(sleep)
		select {
		case <-c.ctx.Done():
			return
		case <-c.wake:
		case <-timer.C:
		case <-c.budget.granted:
			c.refreshNext()
		}
	}
}

// step handles what is due, and tells the budget whether a refresh waits and
// when it becomes urgent. It returns how long nothing else is to do; never
// long, because clocks are set and machines sleep.
func (c *Cache) step() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	sleep := schedulerMaxSleep
	for len(c.due.items) > 0 {
		it := c.due.items[0]
		if wait := time.Duration(it.dueAt - now.UnixNano()); wait > 0 {
			sleep = min(sleep, wait)
			break
		}
		c.handle(it, now)
	}
	if len(c.ready.items) > 0 {
		c.budget.want(time.Unix(0, c.ready.items[0].expiresAt).Add(-urgentLeft))
	} else {
		c.budget.unwant()
	}
	return sleep
}

// handle does an item's event. Each branch moves dueAt on or takes the item out
// of the heap. c.mu is held.
func (c *Cache) handle(it *item, now time.Time) {
	e := it.entry.Load()
	switch {
	case e == nil:
		// A refusal's time is over; a fetch under way will put things right.
		c.dropDenial(it)
		c.due.take(it)
		if it.flight == nil {
			c.remove(it)
		}
	case now.UnixNano() >= e.servedUntil:
		c.stats.expired.Add(1)
		c.dropEntry(it)
		c.due.take(it)
		if it.flight == nil {
			c.remove(it)
		}
	default:
		c.dueSet(it, e.servedUntil)
		c.refreshNow(it, now)
	}
}

// refreshNext uses a place in the budget for the refresh that needs it most.
func (c *Cache) refreshNext() {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	for len(c.ready.items) > 0 && !c.closed {
		it := c.ready.items[0]
		c.ready.take(it)
		e := it.entry.Load()
		if e == nil || it.flight != nil {
			continue
		}
		if now.UnixNano() >= e.servedUntil || !it.tokenUsable(now) {
			// The next request brings a token.
			it.wantsRequest.Store(now.UnixNano())
			continue
		}
		token := evidence.Token{}
		if expiry := it.tokenExpiry.Load(); expiry != 0 {
			token.Expiry = time.Unix(0, expiry)
		}
		c.start(it, it.token, token, true)
		return
	}
	c.budget.giveBack()
}

// itemHeap is a heap of items that know their places in it.
type itemHeap struct {
	items []*item
	less  func(a, b *item) bool
	index func(*item) *int
}

func byLastUse() itemHeap {
	return itemHeap{less: func(a, b *item) bool { return a.lruStamp < b.lruStamp }, index: func(it *item) *int { return &it.lruIndex }}
}

func byDueTime() itemHeap {
	return itemHeap{less: func(a, b *item) bool { return a.dueAt < b.dueAt }, index: func(it *item) *int { return &it.dueIndex }}
}

func byExpiry() itemHeap {
	return itemHeap{less: func(a, b *item) bool { return a.expiresAt < b.expiresAt }, index: func(it *item) *int { return &it.readyIndex }}
}

func (h *itemHeap) add(it *item) { heap.Push(h, it) }
func (h *itemHeap) fix(it *item) { heap.Fix(h, *h.index(it)) }
func (h *itemHeap) take(it *item) {
	if i := *h.index(it); i >= 0 {
		heap.Remove(h, i)
	}
}

// Len, Less, Swap, Push and Pop are container/heap's.
func (h *itemHeap) Len() int           { return len(h.items) }
func (h *itemHeap) Less(i, j int) bool { return h.less(h.items[i], h.items[j]) }
func (h *itemHeap) Swap(i, j int) {
	h.items[i], h.items[j] = h.items[j], h.items[i]
	*h.index(h.items[i]), *h.index(h.items[j]) = i, j
}

// Push adds at the end.
func (h *itemHeap) Push(x any) {
	it := x.(*item)
	*h.index(it) = len(h.items)
	h.items = append(h.items, it)
}

// Pop takes from the end.
func (h *itemHeap) Pop() any {
	last := len(h.items) - 1
	it := h.items[last]
	h.items[last] = nil
	h.items = h.items[:last]
	*h.index(it) = -1
	return it
}
