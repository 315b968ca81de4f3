// SPDX-License-Identifier: Apache-2.0

package credcache

import (
	"context"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

// expiresIn is the life left of what a subject is served now.
func expiresIn(t *testing.T, c *Cache, req Request) time.Duration {
	t.Helper()
	return time.Until(mustGet(t, c, req, OutcomeHit).Expiry())
}

// The EKS Pod Identity Agent renewed credentials of 3 h or less at their
// expiry, never before.
func TestRefreshTimes(t *testing.T) {
	t.Parallel()
	start := time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)
	for life, want := range map[time.Duration][2]time.Duration{
		// life: {earliest, latest}
		15 * time.Minute: {6 * time.Minute, 7*time.Minute + 30*time.Second},
		39 * time.Minute: {15 * time.Minute, 19*time.Minute + 30*time.Second},
		40 * time.Minute: {8 * time.Minute, 20 * time.Minute},
		59 * time.Minute: {17 * time.Minute, 39 * time.Minute},
		time.Hour:        {17 * time.Minute, 40 * time.Minute},
		6 * time.Hour:    {150 * time.Minute, 180 * time.Minute},
		36 * time.Hour:   {150 * time.Minute, 180 * time.Minute},
	} {
		var lo, hi time.Duration = 1 << 62, 0
		for i := range 1000 {
			at := refreshTime(start, start.Add(life), DefaultMaxRetention, uint64(i)<<54|uint64(i)).Sub(start)
			lo, hi = min(lo, at), max(hi, at)
			if life >= 40*time.Minute && life-at < minLeft {
				t.Fatalf("life %v: only %v left at the refresh", life, life-at)
			}
		}
		if lo < want[0] || hi > want[1] {
			t.Errorf("life %v: from %v to %v, want within %v", life, lo, hi, want)
		}
		if hi-lo < (want[1]-want[0])/3 && life < 3*time.Hour {
			t.Errorf("life %v: all between %v and %v, not spread", life, lo, hi)
		}
	}
}

func TestUsedCredentialsAreRenewedAhead(t *testing.T) {
	t.Parallel()
	for _, life := range []time.Duration{15 * time.Minute, 59 * time.Minute, time.Hour, 6 * time.Hour} {
		t.Run(life.String(), func(t *testing.T) {
			t.Parallel()
			inBubble(t, nil, func(t *testing.T, c *Cache, up *fake) {
				up.life = life
				up.delay = 50 * time.Millisecond
				least := life
				mustGet(t, c, request(1, 0), OutcomeMiss)
				for range 20 * 60 {
					time.Sleep(time.Minute)
					least = min(least, expiresIn(t, c, request(1, 0)))
				}
				want := 20 * time.Minute
				if life < 40*time.Minute {
					want = life/2 - time.Minute
				}
				if least < want {
					t.Errorf("served with only %v left", least)
				}
				if limit := int(20*time.Hour/min(life/4, 2*time.Hour)) + 2; up.count() > limit {
					t.Errorf("%d fetches in 20 h of %v credentials", up.count(), life)
				}
			})
		})
	}
}

func TestUnaskedCredentialsAreNotRenewed(t *testing.T) {
	t.Parallel()
	inBubble(t, nil, func(t *testing.T, c *Cache, up *fake) {
		up.life = time.Hour
		mustGet(t, c, request(1, 0), OutcomeMiss)
		time.Sleep(50 * time.Minute)
		// The first life was asked for, so it was renewed; the second was not.
		if up.count() != 2 {
			t.Fatalf("%d fetches", up.count())
		}
		time.Sleep(20 * time.Minute)
		if s := c.Snapshot(); up.count() != 2 || len(s) != 1 || s[0].State != StateIdle {
			t.Fatalf("%d fetches, %+v", up.count(), s)
		}
		// Asked late: answered from memory, and renewed now.
		if left := expiresIn(t, c, request(1, 0)); left > 30*time.Minute {
			t.Fatalf("%v left", left)
		}
		synctest.Wait()
		time.Sleep(time.Second)
		if left := expiresIn(t, c, request(1, 0)); up.count() != 3 || left < 59*time.Minute {
			t.Errorf("%d fetches, %v left", up.count(), left)
		}
		// Never asked again: it goes, and costs nothing.
		time.Sleep(3 * time.Hour)
		if n := len(c.Snapshot()); n != 0 || up.count() > 4 {
			t.Errorf("%d subjects left after %d fetches", n, up.count())
		}
	})
}

func TestRefreshUsesTheNewestToken(t *testing.T) {
	t.Parallel()
	inBubble(t, nil, func(t *testing.T, c *Cache, up *fake) {
		up.life = time.Hour
		mustGet(t, c, request(1, 1), OutcomeMiss)
		mustGet(t, c, request(1, 2), OutcomeHit)
		mustGet(t, c, request(1, 0), OutcomeHit) // an old process still sends the old one
		time.Sleep(45 * time.Minute)
		if up.count() != 2 || up.last() != request(1, 2).Raw {
			t.Errorf("%d fetches, the last with %q", up.count(), up.last())
		}
		// Nor does the old one displace it when it starts a refresh that is due.
		for c.Snapshot()[0].State != StateIdle {
			time.Sleep(time.Minute)
		}
		mustGet(t, c, request(1, 0), OutcomeHit)
		synctest.Wait()
		if up.count() != 3 || up.last() != request(1, 2).Raw {
			t.Errorf("%d fetches, the last with %q", up.count(), up.last())
		}
	})
}

// A pod whose token ran out in an outage lost its credentials there.
func TestExpiredTokenKeepsCredentialsUntilANewOneComes(t *testing.T) {
	t.Parallel()
	inBubble(t, nil, func(t *testing.T, c *Cache, up *fake) {
		up.life = 6 * time.Hour
		short := request(1, 0)
		short.Token.Expiry = time.Now().Add(time.Hour)
		mustGet(t, c, short, OutcomeMiss)
		time.Sleep(4 * time.Hour)
		if s := c.Snapshot()[0]; up.count() != 1 || s.State != StateAwaitingToken {
			t.Fatalf("%d fetches, state %s", up.count(), s.State)
		}
		// One that is about to expire does not help.
		useless := request(1, 0)
		useless.Token.Expiry = time.Now().Add(30 * time.Second)
		mustGet(t, c, useless, OutcomeHit)
		synctest.Wait()
		if up.count() != 1 {
			t.Fatal("a refresh was tried with a token about to expire")
		}
		time.Sleep(time.Minute)
		mustGet(t, c, request(1, 1), OutcomeHit)
		time.Sleep(time.Second)
		if left := expiresIn(t, c, request(1, 1)); up.count() != 2 || up.last() != request(1, 1).Raw || left < 5*time.Hour {
			t.Errorf("%d fetches, %v left", up.count(), left)
		}
	})
}

// The token may run out while the refresh waits for the budget.
func TestTokenThatExpiresInTheQueue(t *testing.T) {
	t.Parallel()
	inBubble(t, func(cfg *Config) { cfg.BackgroundQPS = 1e-6 }, func(t *testing.T, c *Cache, up *fake) {
		for n := range 3 {
			req := request(n, 0)
			req.Token.Expiry = time.Now().Add(3*time.Hour + 30*time.Minute)
			mustGet(t, c, req, OutcomeMiss)
		}
		time.Sleep(5*time.Hour + 55*time.Minute)
		// One refresh went at once; the others were urgent only when their tokens
		// had expired.
		if up.count() != 4 {
			t.Fatalf("%d fetches", up.count())
		}
		for n := range 3 {
			mustGet(t, c, request(n, 1), OutcomeHit)
		}
		time.Sleep(time.Second)
		if s := c.Stats(); up.count() != 6 || s.Refreshes[evidence.ReasonServed] != 3 || s.InFlight != 0 {
			t.Errorf("%d fetches, %+v", up.count(), s)
		}
	})
}

// There, a temporary failure of the node's own role evicted every pod's valid
// credentials.
func TestWhatDropsOnRefreshAndWhatKeeps(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		reason evidence.Reason
		drops  bool
	}{
		{evidence.ReasonUpstreamNotFound, true},
		{evidence.ReasonUpstreamToken, true},
		{evidence.ReasonTokenExpired, false},
		{evidence.ReasonUpstreamDenied, false},
		{evidence.ReasonUpstreamThrottled, false},
		{evidence.ReasonUpstreamUnavailable, false},
		{evidence.ReasonUpstreamInvalid, false},
	} {
		t.Run(string(tt.reason), func(t *testing.T) {
			t.Parallel()
			inBubble(t, nil, func(t *testing.T, c *Cache, up *fake) {
				up.life = time.Hour
				mustGet(t, c, request(1, 0), OutcomeMiss)
				up.set(func(f *fake) { f.answer = refusing(tt.reason) })
				time.Sleep(45 * time.Minute)
				if up.count() < 2 {
					t.Fatal("no refresh was tried")
				}
				if tt.drops {
					mustFail(t, c, request(1, 0), tt.reason, OutcomeMiss)
					if c.Stats().DroppedRefused != 1 || up.count() != 3 {
						t.Errorf("%d fetches, %+v", up.count(), c.Stats())
					}
					return
				}
				mustGet(t, c, request(1, 0), OutcomeHit)
				if s := c.Snapshot()[0]; s.State != StateFailing || s.LastReason != tt.reason || s.LastError == "" {
					t.Errorf("%+v", s)
				}
				// The end is the credentials' own, and not a moment later.
				time.Sleep(14*time.Minute + 44*time.Second)
				mustGet(t, c, request(1, 0), OutcomeHit)
				if n := up.count(); n > 60 {
					t.Errorf("%d fetches during the outage", n)
				}
				up.set(func(f *fake) { f.answer = nil })
				time.Sleep(time.Minute)
				if e, _, err := c.Get(t.Context(), request(1, 0)); err != nil || time.Until(e.Expiry()) < 58*time.Minute {
					t.Errorf("after the outage: %v %v", e, err)
				}
			})
		})
	}
}

// InvalidToken says nothing about credentials if the token had run out when it
// was judged.
func TestInvalidTokenOfAnExpiredTokenKeeps(t *testing.T) {
	t.Parallel()
	inBubble(t, nil, func(t *testing.T, c *Cache, up *fake) {
		up.life = time.Hour
		req := request(1, 0)
		mustGet(t, c, req, OutcomeMiss)
		up.set(func(f *fake) {
			f.answer = func(ctx context.Context, token string) (Answer, error) {
				time.Sleep(5 * time.Second)
				return refusing(evidence.ReasonUpstreamToken)(ctx, token)
			}
		})
		c.mu.Lock()
		f := &flight{item: c.lru.items[0], expiry: time.Now().Add(-time.Second), background: true, done: make(chan struct{})}
		c.failed(f, &UpstreamError{Reason: evidence.ReasonUpstreamToken})
		c.mu.Unlock()
		mustGet(t, c, req, OutcomeHit)
	})
}

func TestOutageOfAnHourAndRecovery(t *testing.T) {
	t.Parallel()
	inBubble(t, nil, func(t *testing.T, c *Cache, up *fake) {
		for n := range 50 {
			mustGet(t, c, request(n, 0), OutcomeMiss)
		}
		time.Sleep(2*time.Hour + 20*time.Minute)
		up.set(func(f *fake) { f.answer = refusing(evidence.ReasonUpstreamUnavailable) })
		for range 60 {
			time.Sleep(time.Minute)
			for n := range 50 {
				mustGet(t, c, request(n, 1), OutcomeHit)
			}
		}
		failed := up.count()
		up.set(func(f *fake) { f.answer = nil })
		time.Sleep(10 * time.Minute)
		for n := range 50 {
			if left := expiresIn(t, c, request(n, 1)); left < 5*time.Hour {
				t.Errorf("subject %d has %v left ten minutes after the outage", n, left)
			}
		}
		if perSubject := (failed - 50) / 50; perSubject > 30 {
			t.Errorf("%d tries for each subject in an hour of outage", perSubject)
		}
	})
}

func TestRetryPausesGrowAndSpread(t *testing.T) {
	t.Parallel()
	for failures := 1; failures < 12; failures++ {
		seen := map[time.Duration]bool{}
		for i := range 100 {
			p := retryPause(6*time.Hour, failures, uint64(i)*0x123456789ABCDEF)
			if p < 7500*time.Millisecond || p > 5*time.Minute {
				t.Fatalf("after %d failures: %v", failures, p)
			}
			seen[p] = true
		}
		if len(seen) < 50 {
			t.Errorf("after %d failures only %d different pauses", failures, len(seen))
		}
	}
	if p := retryPause(time.Second, 9, 1); p > 5*time.Second {
		t.Errorf("near the end: %v", p)
	}
}

// There, 2 credentials a minute were renewed.
func TestRefreshOf10000Subjects(t *testing.T) {
	t.Parallel()
	const subjects = 10_000
	inBubble(t, func(cfg *Config) {
		cfg.MaxEntries, cfg.MaxBytes = subjects, 1<<30
		cfg.UpstreamQPS, cfg.BackgroundQPS = 10, 10
	}, func(t *testing.T, c *Cache, up *fake) {
		up.life = time.Hour
		up.delay = 50 * time.Millisecond
		// All at once, as after a node's start, past the budget to make the worst
		// case: everything falls due together.
		c.budget.mu.Lock()
		c.budget.tokens, c.budget.limit = subjects, subjects
		c.budget.burst = subjects
		c.budget.mu.Unlock()
		done := make(chan struct{}, subjects)
		for n := range subjects {
			go func() {
				defer func() { done <- struct{}{} }()
				mustGet(t, c, request(n, 0), OutcomeMiss)
			}()
		}
		for range subjects {
			<-done
		}
		c.budget.mu.Lock()
		c.budget.tokens, c.budget.limit, c.budget.burst = 0, DefaultConcurrency, 20
		c.budget.mu.Unlock()
		up.set(func(f *fake) { f.calls = nil })

		least := time.Hour
		const hours = 2
		for range hours * 6 {
			time.Sleep(10 * time.Minute)
			for n := range subjects {
				least = min(least, expiresIn(t, c, request(n, 0)))
			}
		}
		s := c.Stats()
		if s.Misses != subjects {
			t.Errorf("%d fetches on the request path", s.Misses-subjects)
		}
		if least < 20*time.Minute {
			t.Errorf("served with %v left", least)
		}
		if busiest := busiestSecond(up.history()); busiest > 30 {
			t.Errorf("%d calls in one second", busiest)
		}
		if perSecond := float64(up.count()) / (hours * time.Hour).Seconds(); perSecond > 10 {
			t.Errorf("%.1f calls a second", perSecond)
		}
		t.Logf("least life served %v, %d renewals in %d h (%.1f/s), busiest second %d", least, up.count(), hours,
			float64(up.count())/(hours*time.Hour).Seconds(), busiestSecond(up.history()))
	})
}

func busiestSecond(calls []call) int {
	most, from := 0, 0
	for i := range calls {
		for calls[i].at.Sub(calls[from].at) >= time.Second {
			from++
		}
		most = max(most, i-from+1)
	}
	return most
}

func TestClockThatJumps(t *testing.T) {
	t.Parallel()
	var jump atomic.Int64
	inBubble(t, func(cfg *Config) {
		cfg.Now = func() time.Time { return time.Now().Add(time.Duration(jump.Load())) }
	}, func(t *testing.T, c *Cache, up *fake) {
		up.answer = func(_ context.Context, token string) (Answer, error) {
			a := good(token, 0)
			a.Expiration = c.now().Add(time.Hour)
			return a, nil
		}
		mustGet(t, c, request(1, 0), OutcomeMiss)
		synctest.Wait()
		jump.Store(int64(-30 * 24 * time.Hour)) // set back a month
		time.Sleep(time.Minute)
		mustGet(t, c, request(1, 0), OutcomeHit)
		synctest.Wait()
		jump.Store(int64(2 * time.Hour)) // and on, beyond the expiry
		mustGet(t, c, request(1, 3), OutcomeMiss)
		time.Sleep(time.Minute)
		mustGet(t, c, request(1, 3), OutcomeHit)
		if up.count() != 2 {
			t.Errorf("%d fetches", up.count())
		}
	})
}

// A request that meets a refresh under way, with credentials that ran out
// meanwhile, waits for it instead of starting its own.
func TestRequestJoinsARefreshUnderWay(t *testing.T) {
	t.Parallel()
	inBubble(t, func(cfg *Config) { cfg.FetchTimeout = time.Hour }, func(t *testing.T, c *Cache, up *fake) {
		up.life = 15 * time.Minute
		mustGet(t, c, request(1, 0), OutcomeMiss)
		up.set(func(f *fake) { f.delay = 10 * time.Minute })
		time.Sleep(15 * time.Minute)
		if s := c.Snapshot(); len(s) != 1 || s[0].State != StateFetching {
			t.Fatalf("%+v", s)
		}
		mustGet(t, c, request(1, 0), OutcomeJoined)
		if up.count() != 2 {
			t.Errorf("%d fetches", up.count())
		}
	})
}

func TestSnapshotNamesStates(t *testing.T) {
	t.Parallel()
	inBubble(t, nil, func(t *testing.T, c *Cache, up *fake) {
		up.life = time.Hour
		mustGet(t, c, request(1, 0), OutcomeMiss)
		s := c.Snapshot()[0]
		if s.State != StateFresh || s.Subject != subject(1) || !s.Verified || s.AssociationID != "a-1" ||
			s.AssumedRoleARN != "arn:aws:sts::111122223333:assumed-role/sa-1/eks-prod" || !s.Expires.Equal(time.Now().Add(time.Hour)) ||
			!s.Fetched.Equal(time.Now()) || !s.LastUsed.Equal(time.Now()) || s.RefreshAt.IsZero() || s.TokenExpires.IsZero() || s.LastError != "" {
			t.Errorf("%+v", s)
		}
		up.set(func(f *fake) { f.delay = 2 * time.Second })
		go func() { _, _, _ = c.Get(context.Background(), request(2, 0)) }()
		time.Sleep(time.Second)
		if s := c.Snapshot(); len(s) != 2 || s[1].State != StateFetching {
			t.Errorf("%+v", s)
		}
		time.Sleep(2 * time.Second)
		up.set(func(f *fake) { f.answer = refusing(evidence.ReasonUpstreamNotFound); f.delay = 0 })
		mustFail(t, c, request(3, 0), evidence.ReasonUpstreamNotFound, OutcomeMiss)
		if s := c.Snapshot(); len(s) != 3 || s[2].State != StateDenied || s[2].LastReason != evidence.ReasonUpstreamNotFound {
			t.Errorf("%+v", s)
		}
		text, err := json.Marshal(c.Snapshot())
		if err != nil || len(text) < 100 {
			t.Errorf("%s %v", text, err)
		}
	})
}

// FuzzEntry: whatever strings an upstream answers, the body is one JSON object
// with these values.
func FuzzEntry(f *testing.F) {
	f.Add("n", "s", "arn:aws:sts::111122223333:assumed-role/r/s", "ASIA", "secret", "token", int64(1_900_000_000))
	f.Add("n\"", "s\\", ":::::", "\x00", "</script>", "\u2028", int64(1<<40))
	f.Fuzz(func(t *testing.T, namespace, account, arn, id, secret, token string, expiry int64) {
		now := time.Unix(1_800_000_000, 0)
		e, err := newEntry(&Answer{Namespace: namespace, ServiceAccount: account, Audience: "a", AssumedRoleARN: arn,
			AccessKeyID: id, SecretAccessKey: secret, SessionToken: token, Expiration: time.Unix(expiry, 0)},
			evidence.Subject{Namespace: namespace, ServiceAccount: account}, "a", now)
		if err != nil {
			if ReasonOf(err) != evidence.ReasonUpstreamInvalid {
				t.Fatal(err)
			}
			return
		}
		var out map[string]string
		if err := json.Unmarshal(e.Body(), &out); err != nil {
			t.Fatalf("%v: %q", err, e.Body())
		}
		at, err := time.Parse("2006-01-02T15:04:05Z", out["Expiration"])
		if err != nil || !at.Equal(e.Expiry()) || at.Sub(now) < MinServed {
			t.Fatalf("expiration %q: %v", out["Expiration"], err)
		}
		if account, ok := out["AccountId"]; ok && len(account) != 12 {
			t.Fatalf("account %q", account)
		}
		if len(out) < 4 {
			t.Fatalf("members lack: %q", e.Body())
		}
	})
}

func TestBackgroundRefreshIsObserved(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	var seen []Fetch
	inBubble(t, func(cfg *Config) {
		cfg.Observe = func(f Fetch) { mu.Lock(); defer mu.Unlock(); seen = append(seen, f) }
	}, func(t *testing.T, c *Cache, up *fake) {
		up.life, up.delay = time.Hour, 70*time.Millisecond
		mustGet(t, c, request(1, 0), OutcomeMiss)
		time.Sleep(45 * time.Minute)
	})
	if len(seen) != 2 || seen[0].Background || !seen[1].Background || seen[1].Duration != 70*time.Millisecond ||
		seen[0].Reason != evidence.ReasonServed || seen[0].Subject != subject(1) || !seen[0].Verified {
		t.Errorf("%+v", seen)
	}
}

// TestRandomLives: subjects with any life, asked at any time, and an upstream
// that fails now and then: nobody is ever served what has run out, and nobody
// who asks regularly waits.
func TestRandomLives(t *testing.T) {
	t.Parallel()
	inBubble(t, func(cfg *Config) { cfg.UpstreamQPS, cfg.BackgroundQPS = 100, 100 }, func(t *testing.T, c *Cache, up *fake) {
		up.answer = func(_ context.Context, token string) (Answer, error) {
			time.Sleep(time.Duration(rand.IntN(3000)) * time.Millisecond)
			if rand.IntN(3) == 0 {
				return Answer{}, &UpstreamError{Reason: evidence.ReasonUpstreamUnavailable, Err: errors.New("down")}
			}
			return good(token, time.Duration(10+rand.IntN(400))*time.Minute), nil
		}
		for range 24 * 30 {
			time.Sleep(2 * time.Minute)
			for n := range 100 {
				e, outcome, err := c.Get(t.Context(), request(n, 2))
				if err == nil && time.Until(e.Expiry()) < MinServed {
					t.Fatalf("served with %v left", time.Until(e.Expiry()))
				}
				_ = outcome
			}
		}
		// A third of all tries fail; credentials of ten minutes get about four
		// tries before they end.
		s := c.Stats()
		if s.Misses > s.Hits/50 {
			t.Errorf("%d misses, %d hits", s.Misses, s.Hits)
		}
		checkBooks(t, c)
	})
}
