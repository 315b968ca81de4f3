// SPDX-License-Identifier: Apache-2.0

package credcache

import (
	"context"
	"runtime/debug"
	"strings"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

// start begins an item's fetch. A background one holds its place in the budget
// already. c.mu is held.
func (c *Cache) start(it *item, raw string, token evidence.Token, background bool) {
	f := &flight{
		item: it, token: raw, tokenID: token.ID, expiry: token.Expiry, background: background,
		done: make(chan struct{}),
	}
	if !background {
		if it.token == raw {
			f.token = it.token
		} else {
			f.token = strings.Clone(raw)
		}
	}
	it.flight = f
	c.pods[it.pod].flights++
	c.wg.Go(func() { c.fly(f) })
}

// fly does one fetch and hands its result to everybody.
func (c *Cache) fly(f *flight) {
	// On the cache's own context: the first to ask may hang up, others wait.
	ctx, cancel := context.WithTimeout(c.ctx, c.cfg.FetchTimeout)
	defer cancel()
	var entry *Entry
	err := ErrFetchPanicked
	started := c.now()
	called := started
	holding := f.background
	landed := false
	land := func() {
		landed = true
		if holding {
			c.budget.release()
		}
		c.land(f, entry, err)
	}
	defer func() {
		// Whatever happens in the client, whoever waits is told, and the other
		// pods' credentials stay served.
		if landed {
			return
		}
		// The panic's value may hold what the client was working on: not logged.
		_ = recover()
		c.log.Error("fetching credentials panicked", "stack", string(debug.Stack()))
		entry, err = nil, ErrFetchPanicked
		land()
	}()
	if !holding {
		if err = c.budget.acquire(ctx, f.item.pod); err != nil {
			land()
			return
		}
		holding = true
		called = c.now()
	}
	err = ErrFetchPanicked
	answer, fetchErr := c.cfg.Upstream.Fetch(ctx, f.token)
	ended := c.now()
	if fetchErr == nil {
		entry, fetchErr = newEntry(&answer, f.item.subject, c.cfg.Audience, ended)
	}
	err = fetchErr
	c.budget.report(err)
	if c.cfg.Observe != nil {
		c.cfg.Observe(Fetch{Subject: f.item.subject, Verified: f.item.verified, Background: f.background,
			Reason: ReasonOf(err), Queued: called.Sub(started), Duration: ended.Sub(called)})
	}
	land()
}

// land keeps a fetch's result, as far as it may be kept, and wakes all that
// wait for it.
func (c *Cache) land(f *flight, entry *Entry, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	it := f.item
	f.entry, f.err = entry, err
	defer close(f.done)
	it.flight = nil
	if p := c.pods[it.pod]; p != nil {
		p.flights--
		c.forgetPod(it.pod)
	}
	c.stats.count(f.background, ReasonOf(err))
	switch {
	case f.discard || it.gone || c.closed:
		c.remove(it)
	case it.key.bypass:
		c.denyOrRemove(f, err)
	case err == nil:
		c.keep(f, entry)
	default:
		c.failed(f, err)
	}
	c.signal()
}

// keep puts fetched credentials in place. c.mu is held.
func (c *Cache) keep(f *flight, entry *Entry) {
	it := f.item
	c.dropDenial(it)
	p := c.pods[it.pod]
	if it.entry.Load() == nil {
		p.entries++
		it.lruStamp = it.lastUsed.Load()
		c.lru.add(it)
	}
	it.wasAsked = !f.background || f.joined
	it.failures, it.lastErr = 0, nil
	size := sizeOf(it, entry)
	c.bytes += size - it.size
	it.size = size
	c.ready.take(it)
	it.expiresAt = entry.expires.UnixNano()
	it.entry.Store(entry)
	at := refreshTime(entry.fetched, entry.expires, c.cfg.MaxRetention, it.hash)
	it.wantsRequest.Store(at.UnixNano())
	c.dueSet(it, at.UnixNano())
	c.evict(it, p)
}

// evict keeps the bounds. One pod's surplus costs that pod's own entries
// first. c.mu is held.
func (c *Cache) evict(newest *item, p *pod) {
	// Pods that the kernel did not name share no fate, only the whole's bounds.
	for newest.pod != "" && c.cfg.EntriesPerPod > 0 && p.entries > c.cfg.EntriesPerPod {
		oldest := newest
		for it := p.items; it != nil; it = it.podNext {
			if it.entry.Load() != nil && it.lastUsed.Load() < oldest.lastUsed.Load() {
				oldest = it
			}
		}
		c.stats.evicted.Add(1)
		c.remove(oldest)
	}
	for len(c.lru.items) > c.cfg.MaxEntries || c.bytes > c.cfg.MaxBytes && len(c.lru.items) > 1 {
		oldest := c.lru.items[0]
		// Hits move lastUsed on without touching the heap; it only grows, so the
		// top is the oldest once its stamp is true.
		if used := oldest.lastUsed.Load(); used != oldest.lruStamp {
			oldest.lruStamp = used
			c.lru.fix(oldest)
			continue
		}
		c.stats.evicted.Add(1)
		c.remove(oldest)
	}
}

// failed decides what a failure means for what there is. c.mu is held.
func (c *Cache) failed(f *flight, err error) {
	it := f.item
	now := c.now()
	reason := ReasonOf(err)
	it.lastErr, it.lastErrAt = err, now
	e := it.entry.Load()
	if e == nil || now.UnixNano() >= e.servedUntil {
		c.dropEntry(it)
		c.denyOrRemove(f, err)
		return
	}
	// AccessDenied may be about the node's role, ExpiredToken about a clock; an
	// outage says nothing at all. Only these two say the credentials should not
	// be there.
	unexpired := f.expiry.IsZero() || now.Before(f.expiry)
	if reason == evidence.ReasonUpstreamNotFound || reason == evidence.ReasonUpstreamToken && unexpired {
		c.log.Info("credentials dropped: the upstream does not give them any more",
			"reason", string(reason), "pod_uid", string(it.subject.PodUID),
			"namespace", it.subject.Namespace, "service_account", it.subject.ServiceAccount)
		c.stats.droppedRefused.Add(1)
		c.dropEntry(it)
		c.denyOrRemove(f, err)
		return
	}
	it.failures++
	if it.failures == 1 {
		c.log.Warn("credentials could not be renewed and stay in use", "reason", string(reason), "error", err,
			"pod_uid", string(it.subject.PodUID), "namespace", it.subject.Namespace,
			"service_account", it.subject.ServiceAccount, "expires", e.expires)
	}
	at := now.Add(retryPause(e.expires.Sub(now), it.failures, it.hash)).UnixNano()
	it.wantsRequest.Store(at)
	c.dueSet(it, at)
}

// denyOrRemove remembers a refusal for a moment, or forgets the item. c.mu is
// held.
func (c *Cache) denyOrRemove(f *flight, err error) {
	it := f.item
	reason := ReasonOf(err)
	if err == nil || !isDenial(reason) || c.cfg.DenialMemory <= 0 || c.denials >= maxDenials {
		c.remove(it)
		return
	}
	c.dropDenial(it)
	until := c.now().Add(c.cfg.DenialMemory).UnixNano()
	it.denial.Store(&denial{
		until: until, err: err, tokenID: f.tokenID,
		anyToken: reason == evidence.ReasonUpstreamNotFound || reason == evidence.ReasonUpstreamDenied,
	})
	c.denials++
	it.token = ""
	it.tokenExpiry.Store(0)
	c.dueSet(it, until)
}

// keepToken remembers the newest token, for the refresh. c.mu is held.
func (c *Cache) keepToken(it *item, req *Request) bool {
	expiry := expiryOf(&req.Token)
	if it.key.bypass || it.token != "" && expiry <= it.tokenExpiry.Load() {
		return false
	}
	before := len(it.token)
	it.token = strings.Clone(req.Raw)
	it.tokenExpiry.Store(expiry)
	if it.entry.Load() != nil {
		it.size += int64(len(it.token) - before)
		c.bytes += int64(len(it.token) - before)
	}
	return true
}

// tokenUsable: a refresh with the token that is kept can succeed.
func (it *item) tokenUsable(now time.Time) bool {
	expiry := it.tokenExpiry.Load()
	return it.token != "" && (expiry == 0 || expiry > now.Add(tokenMustOutlastRefresh).UnixNano())
}
