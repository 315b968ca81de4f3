// SPDX-License-Identifier: Apache-2.0

package credserver

import (
	"context"
	"hash/maphash"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

// knownFor bounds how long a verified token is believed without looking at it
// again, for verifiers that do not tell when their keys change.
const knownFor = int64(5 * time.Minute)

// knownToken is a token that was verified. It does not change.
type knownToken struct {
	raw        string
	sum        uint64
	token      evidence.Token
	generation uint64
	checked    int64 // time since the server's epoch
}

// is tells whether raw is this token. The keyed sum is compared first: bytes
// are compared, in a time that depends on them, only when they are all but
// certain to be equal, so that the time tells nothing to someone who guesses.
func (k *knownToken) is(raw []byte, sum uint64) bool {
	return k != nil && k.sum == sum && k.raw == string(raw)
}

// verify gives the verified form of a token, from memory if these very bytes
// were verified before on this connection, or on another one of the same pod.
// The memory belongs to the pod: no pod can push out what another's holds.
func (s *Server) verify(c *conn, raw []byte, now time.Time) (*knownToken, error) {
	elapsed := int64(now.Sub(s.epoch))
	var generation uint64
	if s.generations != nil {
		generation = s.generations.KeyGeneration()
	}
	sum := maphash.Bytes(s.seed, raw)
	// Past its expiry a token is not refused here but verified again: the
	// verifier knows the leeway, and the words.
	good := func(k *knownToken) bool {
		return k.is(raw, sum) && k.generation == generation &&
			elapsed-k.checked < knownFor && now.Before(k.token.Expiry)
	}
	if good(c.known) {
		return c.known, nil
	}
	known := c.account.known
	if known != nil {
		for i := range known {
			if k := known[i].Load(); good(k) {
				return k, nil
			}
		}
	}
	text := string(raw)
	token, err := s.tokens.Verify(c.waiting(), text)
	if err != nil {
		return nil, err
	}
	k := &knownToken{raw: text, sum: sum, token: token, generation: generation, checked: elapsed}
	if known != nil {
		i := c.account.slot.Add(1) % knownPerPod
		// The same token again, after its time: in its old place, so that it
		// does not take a second one.
		for j := range known {
			if known[j].Load().is(raw, sum) {
				i = uint32(j)
			}
		}
		known[i].Store(k)
	}
	return k, nil
}

// waiting gives the context for what the current request may wait for.
func (c *conn) waiting() context.Context {
	if c.wait == nil {
		c.wait = &waitContext{parent: c.server.base, patience: c.server.waitTimeout}
	}
	return c.wait
}

// waited ends the request's wait. A context that nobody waited on serves the
// next request too: that is every hit.
func (c *conn) waited() {
	if c.wait != nil && c.wait.end() {
		c.wait = nil
	}
}
