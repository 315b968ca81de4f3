// SPDX-License-Identifier: Apache-2.0

package credcache

import (
	"cmp"
	"maps"
	"slices"
	"sync/atomic"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

// State says what is going on with a subject's credentials.
type State string

// The states in a snapshot.
const (
	// StateFresh: nothing to do yet.
	StateFresh State = "fresh"
	// StateFetching: a fetch is under way and there are no credentials yet.
	StateFetching State = "fetching"
	// StateRefreshing: credentials are served and being renewed.
	StateRefreshing State = "refreshing"
	// StateQueued: the renewal waits for the node's budget.
	StateQueued State = "queued"
	// StateIdle: due for renewal, but nobody has asked for them in their present
	// life; the next request starts it.
	StateIdle State = "idle"
	// StateAwaitingToken: due for renewal, but the newest token has expired; the
	// next request brings one.
	StateAwaitingToken State = "awaiting_token"
	// StateFailing: the last renewal failed; credentials are served until they
	// expire.
	StateFailing State = "failing"
	// StateDenied: the upstream refused a moment ago.
	StateDenied State = "denied"
)

// Status describes one subject for people. It has no secret.
type Status struct {
	Subject evidence.Subject `json:"subject"`
	// Verified is false for a token that only the upstream has judged; Subject
	// is then what it claims.
	Verified       bool   `json:"verified"`
	State          State  `json:"state"`
	AssumedRoleARN string `json:"assumed_role_arn,omitempty"`
	AssociationID  string `json:"association_id,omitempty"`
	// Expires, Fetched: zero without credentials.
	Expires time.Time `json:"expires,omitzero"`
	Fetched time.Time `json:"fetched,omitzero"`
	// RefreshAt is when the renewal is due; zero if it is under way.
	RefreshAt    time.Time `json:"refresh_at,omitzero"`
	LastUsed     time.Time `json:"last_used,omitzero"`
	TokenExpires time.Time `json:"token_expires,omitzero"`
	// LastError is the last failed fetch's, empty after a success.
	LastError   string          `json:"last_error,omitempty"`
	LastErrorAt time.Time       `json:"last_error_at,omitzero"`
	LastReason  evidence.Reason `json:"last_reason,omitempty"`
}

// Snapshot describes all subjects, sorted by namespace, service account and
// pod.
func (c *Cache) Snapshot() []Status {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	var all []Status
	for i := range c.shards {
		for _, it := range c.shards[i].items {
			all = append(all, it.status(now))
		}
	}
	slices.SortFunc(all, func(a, b Status) int {
		return cmp.Or(cmp.Compare(a.Subject.Namespace, b.Subject.Namespace),
			cmp.Compare(a.Subject.ServiceAccount, b.Subject.ServiceAccount),
			cmp.Compare(a.Subject.PodUID, b.Subject.PodUID), a.Expires.Compare(b.Expires))
	})
	return all
}

// status describes an item. Cache.mu is held.
func (it *item) status(now time.Time) Status {
	s := Status{
		Subject: it.subject, Verified: it.verified,
		LastUsed: fromNano(it.lastUsed.Load()), TokenExpires: fromNano(it.tokenExpiry.Load()),
	}
	if it.lastErr != nil {
		s.LastError, s.LastErrorAt, s.LastReason = it.lastErr.Error(), it.lastErrAt, ReasonOf(it.lastErr)
	}
	e := it.entry.Load()
	if e == nil {
		s.State = StateFetching
		if it.denial.Load() != nil && it.flight == nil {
			s.State = StateDenied
		}
		return s
	}
	s.AssumedRoleARN, s.AssociationID, s.Expires, s.Fetched = e.roleARN, e.associationID, e.expires, e.fetched
	wants := it.wantsRequest.Load()
	if wants != never {
		s.RefreshAt = fromNano(wants)
	}
	switch {
	case it.flight != nil:
		s.State = StateRefreshing
	case it.readyIndex >= 0:
		s.State = StateQueued
	case it.failures > 0:
		s.State = StateFailing
	case now.UnixNano() < wants:
		s.State = StateFresh
	case !it.tokenUsable(now):
		s.State = StateAwaitingToken
	default:
		s.State = StateIdle
	}
	return s
}

func fromNano(ns int64) time.Time {
	if ns == 0 {
		return time.Time{}
	}
	return time.Unix(0, ns).UTC()
}

// counters are the cache's own; none has a label that a pod can choose.
type counters struct {
	misses, joined, denied, limited, abandoned   atomic.Uint64
	evicted, expired, droppedPod, droppedRefused atomic.Uint64
	fetches, refreshes                           map[evidence.Reason]uint64 // guarded by Cache.mu
}

func newCounters() counters {
	return counters{fetches: map[evidence.Reason]uint64{}, refreshes: map[evidence.Reason]uint64{}}
}

// count counts a finished fetch. Cache.mu is held.
func (c *counters) count(background bool, reason evidence.Reason) {
	if background {
		c.refreshes[reason]++
	} else {
		c.fetches[reason]++
	}
}

// Stats are the cache's numbers, for metrics. Counters start at New.
type Stats struct {
	// Requests by how they were answered. Misses started a fetch, Joined waited
	// for one; Abandoned are those of both whose caller left before the end.
	Hits, Misses, Joined, Denied, Limited, Abandoned uint64
	// Fetches and Refreshes count finished ones, with and without somebody
	// waiting from the start, by reason; evidence.ReasonServed is success.
	Fetches, Refreshes map[evidence.Reason]uint64
	// Evicted by the bounds, Expired unrenewed, DroppedPod with their pod,
	// DroppedRefused by the upstream's word.
	Evicted, Expired, DroppedPod, DroppedRefused uint64
	// Entries, Bytes, Due are now's: credentials kept, what they and what belongs
	// to them take, and renewals that wait for the budget.
	Entries int
	Bytes   int64
	Due     int
	// UnverifiedEntries are those whose token only the upstream has judged.
	UnverifiedEntries int
	// InFlight and Waiting are upstream calls now, and fetches that wait for the
	// budget.
	InFlight, Waiting int
	// RateFactor is 1, or less while the upstream throttles.
	RateFactor float64
	// NextExpiry is when the first credentials end; zero without any.
	NextExpiry time.Time
}

// Stats reads the numbers. It looks at every entry: for a scrape, not for a
// request.
func (c *Cache) Stats() Stats {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := Stats{
		Misses: c.stats.misses.Load(), Joined: c.stats.joined.Load(), Denied: c.stats.denied.Load(),
		Limited: c.stats.limited.Load(), Abandoned: c.stats.abandoned.Load(),
		Fetches: maps.Clone(c.stats.fetches), Refreshes: maps.Clone(c.stats.refreshes),
		Evicted: c.stats.evicted.Load(), Expired: c.stats.expired.Load(),
		DroppedPod: c.stats.droppedPod.Load(), DroppedRefused: c.stats.droppedRefused.Load(),
		Entries: len(c.lru.items), Bytes: c.bytes, Due: len(c.ready.items),
	}
	for i := range c.shards {
		s.Hits += c.shards[i].hits.Load()
	}
	for _, it := range c.lru.items {
		if !it.verified {
			s.UnverifiedEntries++
		}
		if e := it.entry.Load(); e != nil && (s.NextExpiry.IsZero() || e.expires.Before(s.NextExpiry)) {
			s.NextExpiry = e.expires
		}
	}
	c.budget.mu.Lock()
	defer c.budget.mu.Unlock()
	c.budget.refill(c.now())
	s.InFlight, s.Waiting, s.RateFactor = c.budget.inFlight, c.budget.waiting, c.budget.factor
	return s
}
