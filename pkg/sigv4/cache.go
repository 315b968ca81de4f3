// SPDX-License-Identifier: Apache-2.0

package sigv4

import (
	"crypto/sha256"
	"crypto/subtle"
	"sync"
)

// signingKeys remembers derived keys: four HMACs fewer for each request. It has
// two generations: when the young one is full, the old one goes, and what is
// used moves back to the young. So it is bounded without a list of use.
type signingKeys struct {
	size int

	mu         sync.RWMutex
	young, old map[cacheID]cacheEntry
}

type cacheID struct{ accessKeyID, date, region, service string }

type cacheEntry struct {
	// secret is what the key was derived from: an access key ID can get another.
	secret string
	key    [sha256.Size]byte
}

func (c *signingKeys) get(id cacheID, secret string) ([sha256.Size]byte, bool) {
	c.mu.RLock()
	e, ok := c.young[id]
	aged := false
	if !ok {
		e, ok = c.old[id]
		aged = ok
	}
	c.mu.RUnlock()
	if !ok || subtle.ConstantTimeCompare([]byte(e.secret), []byte(secret)) != 1 {
		return [sha256.Size]byte{}, false
	}
	if aged {
		c.put(id, secret, e.key)
	}
	return e.key, true
}

func (c *signingKeys) put(id cacheID, secret string, key [sha256.Size]byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.young == nil || len(c.young) >= (c.size+1)/2 {
		c.old, c.young = c.young, make(map[cacheID]cacheEntry)
	}
	c.young[id] = cacheEntry{secret, key}
}
