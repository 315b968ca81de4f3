// SPDX-License-Identifier: Apache-2.0

package credcache

import "github.com/latchkey-dev/latchkey/pkg/evidence"

// Drop forgets the credentials of the subjects that match, and returns how many
// had any. Their next request asks the upstream. A fetch that is under way is
// not kept. It is for an operator: pods that end are DropPod's.
func (c *Cache) Drop(match func(evidence.Subject) bool) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := 0
	for i := range c.shards {
		for _, it := range c.items(&c.shards[i]) {
			if !match(it.subject) {
				continue
			}
			if it.flight != nil {
				it.flight.discard = true
			}
			if it.entry.Load() != nil {
				n++
			}
			c.remove(it)
		}
	}
	return n
}

// Refresh renews the credentials of the subjects that match now, within the
// budget, although they are not due. It returns how many renewals were started
// or are under way, and for how many the token that is kept has expired: those
// are renewed by the next request.
func (c *Cache) Refresh(match func(evidence.Subject) bool) (started, waiting int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return 0, 0
	}
	now := c.now()
	for i := range c.shards {
		for _, it := range c.items(&c.shards[i]) {
			e := it.entry.Load()
			if e == nil || !match(it.subject) {
				continue
			}
			it.wasAsked = true // the operator asks
			c.refreshNow(it, now)
			if it.flight != nil || it.readyIndex >= 0 {
				started++
				continue
			}
			it.wantsRequest.Store(now.UnixNano())
			waiting++
		}
	}
	return started, waiting
}
