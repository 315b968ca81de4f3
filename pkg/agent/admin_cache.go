// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"strings"

	"github.com/latchkey-dev/latchkey/pkg/adminapi"
	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

func (a *Agent) cacheState() adminapi.Cache {
	s := a.cache.Stats()
	return adminapi.Cache{
		Entries: a.cacheEntries(), Bytes: s.Bytes, Hits: s.Hits, Misses: s.Misses,
		InFlight: s.InFlight, Waiting: s.Waiting, RateFactor: s.RateFactor,
	}
}

func (a *Agent) cacheEntries() []adminapi.CacheEntry {
	snapshot := a.cache.Snapshot()
	out := make([]adminapi.CacheEntry, 0, len(snapshot))
	for _, s := range snapshot {
		e := adminapi.CacheEntry{
			PodUID: string(s.Subject.PodUID), Namespace: s.Subject.Namespace, ServiceAccount: s.Subject.ServiceAccount,
			Verified: s.Verified, State: string(s.State), Role: s.AssumedRoleARN, Association: s.AssociationID,
			Fetched: timeOrNil(s.Fetched), Expires: timeOrNil(s.Expires), RefreshAt: timeOrNil(s.RefreshAt),
			LastUsed: timeOrNil(s.LastUsed), TokenExpires: timeOrNil(s.TokenExpires), LastErrorAt: timeOrNil(s.LastErrorAt),
		}
		if s.LastError != "" {
			e.LastError = upstreamErrorText(string(s.LastReason), s.LastError)
		}
		out = append(out, e)
	}
	return out
}

// subjectMatch reads SUBJECT.
func subjectMatch(text string) (func(evidence.Subject) bool, error) {
	namespace, account, ok := strings.Cut(text, "/")
	switch {
	case ok && namespace != "" && account != "" && !strings.Contains(account, "/"):
		return func(s evidence.Subject) bool { return s.Namespace == namespace && s.ServiceAccount == account }, nil
	case !ok && (len(text) == 36 || len(text) == 32):
		uid := evidence.PodUID(strings.ToLower(text))
		return func(s evidence.Subject) bool { return s.PodUID == uid }, nil
	}
	return nil, badSubject(text)
}

func (a *Agent) dropCached(text string) (adminapi.CacheChange, error) {
	match, err := subjectMatch(text)
	if err != nil {
		return adminapi.CacheChange{}, err
	}
	n := a.cache.Drop(match)
	if n == 0 {
		return adminapi.CacheChange{}, fmt.Errorf("%w: nothing is cached for %s", adminapi.ErrNotFound, text)
	}
	a.log.Info("credentials dropped by an operator", "subject", text, "entries", n)
	return adminapi.CacheChange{Subject: text, Dropped: n}, nil
}

func (a *Agent) refreshCached(text string) (adminapi.CacheChange, error) {
	match, err := subjectMatch(text)
	if err != nil {
		return adminapi.CacheChange{}, err
	}
	started, waiting := a.cache.Refresh(match)
	if started+waiting == 0 {
		return adminapi.CacheChange{}, fmt.Errorf("%w: nothing is cached for %s", adminapi.ErrNotFound, text)
	}
	a.log.Info("credentials renewed by an operator", "subject", text, "started", started, "waiting", waiting)
	return adminapi.CacheChange{Subject: text, Started: started, Waiting: waiting}, nil
}
