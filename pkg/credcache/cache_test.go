// SPDX-License-Identifier: Apache-2.0

package credcache

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

// The EKS Pod Identity Agent answered 64 waiters on a 50 ms upstream after
// 245 ms, polling.
func TestWaitersOnAColdSubjectShareOneFetch(t *testing.T) {
	t.Parallel()
	inBubble(t, nil, func(t *testing.T, c *Cache, up *fake) {
		up.delay = 50 * time.Millisecond
		start := time.Now()
		var wg sync.WaitGroup
		for i := range 64 {
			wg.Go(func() {
				// Each with a token of its own: one pod's processes may hold old and
				// new ones.
				e, _, err := c.Get(t.Context(), request(1, i%3))
				if err != nil || e == nil || time.Since(start) != 50*time.Millisecond {
					t.Errorf("%v %v after %v", e, err, time.Since(start))
				}
			})
		}
		wg.Wait()
		s := c.Stats()
		if up.count() != 1 || s.Misses != 1 || s.Joined != 63 {
			t.Errorf("%d upstream calls, %d misses, %d joined", up.count(), s.Misses, s.Joined)
		}
	})
}

// There, on an error all 64 called upstream themselves and took 2 s.
func TestErrorReachesAllWaitersAtOnce(t *testing.T) {
	t.Parallel()
	inBubble(t, nil, func(t *testing.T, c *Cache, up *fake) {
		up.delay = 50 * time.Millisecond
		up.answer = refusing(evidence.ReasonUpstreamUnavailable)
		start := time.Now()
		var wg sync.WaitGroup
		for range 64 {
			wg.Go(func() {
				_, _, err := c.Get(t.Context(), request(1, 0))
				if ReasonOf(err) != evidence.ReasonUpstreamUnavailable || time.Since(start) != 50*time.Millisecond {
					t.Errorf("%v after %v", err, time.Since(start))
				}
			})
		}
		wg.Wait()
		if up.count() != 1 {
			t.Errorf("%d upstream calls", up.count())
		}
		// An outage is not remembered: the next request tries again.
		up.set(func(f *fake) { f.answer = nil })
		mustGet(t, c, request(1, 0), OutcomeMiss)
	})
}

// There, an upstream of 0.8 s never served a client that gives up after 0.5 s.
func TestClientThatGivesUpFindsTheResult(t *testing.T) {
	t.Parallel()
	inBubble(t, nil, func(t *testing.T, c *Cache, up *fake) {
		up.delay = 800 * time.Millisecond
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		defer cancel()
		_, outcome, err := c.Get(ctx, request(1, 0))
		if !errors.Is(err, ErrAbandoned) || !errors.Is(err, context.DeadlineExceeded) || outcome != OutcomeMiss {
			t.Fatalf("%v %v", outcome, err)
		}
		if got := ReasonOf(err); got != evidence.ReasonUpstreamUnavailable {
			t.Errorf("reason %s", got)
		}
		time.Sleep(500 * time.Millisecond)
		mustGet(t, c, request(1, 0), OutcomeHit)
		if up.count() != 1 {
			t.Errorf("%d upstream calls", up.count())
		}
	})
}

func TestClientThatReturnsJoinsItsOwnFetch(t *testing.T) {
	t.Parallel()
	inBubble(t, nil, func(t *testing.T, c *Cache, up *fake) {
		up.delay = 800 * time.Millisecond
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		defer cancel()
		if _, _, err := c.Get(ctx, request(1, 0)); err == nil {
			t.Fatal("no error")
		}
		start := time.Now()
		mustGet(t, c, request(1, 0), OutcomeJoined)
		if time.Since(start) != 300*time.Millisecond || up.count() != 1 {
			t.Errorf("%v, %d calls", time.Since(start), up.count())
		}
	})
}

func TestFetchHasItsOwnDeadline(t *testing.T) {
	t.Parallel()
	inBubble(t, func(cfg *Config) { cfg.FetchTimeout = 3 * time.Second }, func(t *testing.T, c *Cache, up *fake) {
		up.delay = time.Hour
		start := time.Now()
		mustFail(t, c, request(1, 0), evidence.ReasonUpstreamUnavailable, OutcomeMiss)
		if time.Since(start) != 3*time.Second {
			t.Errorf("took %v", time.Since(start))
		}
	})
}

// A rotated token was a miss there.
func TestRotatedTokenIsAHit(t *testing.T) {
	t.Parallel()
	inBubble(t, nil, func(t *testing.T, c *Cache, up *fake) {
		first := mustGet(t, c, request(1, 0), OutcomeMiss)
		if mustGet(t, c, request(1, 1), OutcomeHit) != first || up.count() != 1 {
			t.Error("not the same entry")
		}
	})
}

func TestUnverifiedTokenIsKnownByItsBytes(t *testing.T) {
	t.Parallel()
	inBubble(t, nil, func(t *testing.T, c *Cache, up *fake) {
		mustGet(t, c, unverified(request(1, 0)), OutcomeMiss)
		mustGet(t, c, unverified(request(1, 0)), OutcomeHit)
		mustGet(t, c, unverified(request(1, 1)), OutcomeMiss)
		if s := c.Stats(); s.UnverifiedEntries != 2 {
			t.Errorf("%d unverified entries", s.UnverifiedEntries)
		}
	})
}

func TestUnverifiedClaimReachesNobodysCredentials(t *testing.T) {
	t.Parallel()
	inBubble(t, nil, func(t *testing.T, c *Cache, up *fake) {
		mustGet(t, c, request(1, 0), OutcomeMiss)
		up.answer = refusing(evidence.ReasonUpstreamToken)
		forged := unverified(request(1, 0)) // same claims, same bytes even
		mustFail(t, c, forged, evidence.ReasonUpstreamToken, OutcomeMiss)
		mustGet(t, c, request(1, 0), OutcomeHit)
	})
}

func TestAnswerMustBeForTheTokensSubject(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		change func(*Answer)
		want   error
	}{
		"other namespace":       {func(a *Answer) { a.Namespace = "prod" }, ErrSubjectMismatch},
		"other service account": {func(a *Answer) { a.ServiceAccount = "admin" }, ErrSubjectMismatch},
		"other audience":        {func(a *Answer) { a.Audience = "sts.amazonaws.com" }, ErrAudienceMismatch},
		"no access key":         {func(a *Answer) { a.AccessKeyID = "" }, ErrIncomplete},
		"no secret":             {func(a *Answer) { a.SecretAccessKey = "" }, ErrIncomplete},
		"no session token":      {func(a *Answer) { a.SessionToken = "" }, ErrIncomplete},
		"expired":               {func(a *Answer) { a.Expiration = time.Now().Add(-time.Second) }, ErrExpired},
		"15 s left":             {func(a *Answer) { a.Expiration = time.Now().Add(15 * time.Second) }, ErrExpired},
		"no expiration":         {func(a *Answer) { a.Expiration = time.Time{} }, ErrExpired},
	} {
		for _, verified := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, verified %t", name, verified), func(t *testing.T) {
				t.Parallel()
				inBubble(t, nil, func(t *testing.T, c *Cache, up *fake) {
					up.answer = func(_ context.Context, token string) (Answer, error) {
						a := good(token, 0)
						tt.change(&a)
						return a, nil
					}
					req := request(1, 0)
					req.Token.Verified = verified
					e, _, err := c.Get(t.Context(), req)
					if e != nil || !errors.Is(err, tt.want) || ReasonOf(err) != evidence.ReasonUpstreamInvalid {
						t.Errorf("%v %v", e, err)
					}
					if n := c.Stats().Entries; n != 0 {
						t.Errorf("%d entries kept", n)
					}
				})
			})
		}
	}
}

func TestBodyIsTheContracts(t *testing.T) {
	t.Parallel()
	at := time.Date(2026, 11, 21, 19, 0, 0, 999_000_000, time.FixedZone("", 3600))
	for name, tt := range map[string]struct{ arn, want string }{
		"account of the role": {"arn:aws:sts::111122223333:assumed-role/r/s", `,"AccountId":"111122223333"`},
		"other partition":     {"arn:aws-cn:sts::444455556666:assumed-role/r/s", `,"AccountId":"444455556666"`},
		"no ARN":              {"r", ""},
		"no account":          {"arn:aws:sts:::assumed-role/r/s", ""},
		"not an account":      {"arn:aws:sts::11112222333a:assumed-role/r/s", ""},
	} {
		e, err := newEntry(&Answer{Namespace: "n", ServiceAccount: "s", Audience: "a", AssumedRoleARN: tt.arn,
			AccessKeyID: "ASIA1", SecretAccessKey: "a+b/c=", SessionToken: "t==", Expiration: at},
			evidence.Subject{Namespace: "n", ServiceAccount: "s"}, "a", at.Add(-time.Hour))
		if err != nil {
			t.Fatal(err)
		}
		want := `{"AccessKeyId":"ASIA1","SecretAccessKey":"a+b/c=","Token":"t=="` + tt.want + `,"Expiration":"2026-11-21T18:00:00Z"}`
		if string(e.Body()) != want {
			t.Errorf("%s:\n got %s\nwant %s", name, e.Body(), want)
		}
	}
}

// There, credentials were served down to 15 s of life and the sweep ran once a
// minute; here the time is looked at in each request.
func TestNothingIsServedInItsLast15Seconds(t *testing.T) {
	t.Parallel()
	inBubble(t, nil, func(t *testing.T, c *Cache, up *fake) {
		up.life = 10 * time.Minute
		mustGet(t, c, request(1, 0), OutcomeMiss)
		up.set(func(f *fake) { f.answer = refusing(evidence.ReasonUpstreamUnavailable) })
		time.Sleep(10*time.Minute - MinServed - time.Nanosecond)
		mustGet(t, c, request(1, 0), OutcomeHit)
		time.Sleep(time.Nanosecond)
		mustFail(t, c, request(1, 0), evidence.ReasonUpstreamUnavailable, OutcomeMiss)
		synctest.Wait()
		if s := c.Stats(); s.Entries != 0 || s.Bytes != 0 {
			t.Errorf("%+v", s)
		}
	})
}

// There, ten asks without an association were ten upstream calls.
func TestDenialIsRememberedForASecond(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		reason   evidence.Reason
		kept     bool
		anyToken bool
	}{
		{evidence.ReasonUpstreamNotFound, true, true},
		{evidence.ReasonUpstreamDenied, true, true},
		{evidence.ReasonUpstreamToken, true, false},
		{evidence.ReasonTokenExpired, true, false},
		{evidence.ReasonUpstreamThrottled, false, false},
		{evidence.ReasonUpstreamUnavailable, false, false},
		{evidence.ReasonUpstreamInvalid, false, false},
	} {
		t.Run(string(tt.reason), func(t *testing.T) {
			t.Parallel()
			inBubble(t, nil, func(t *testing.T, c *Cache, up *fake) {
				up.answer = refusing(tt.reason)
				mustFail(t, c, request(1, 0), tt.reason, OutcomeMiss)
				time.Sleep(time.Second - time.Nanosecond)
				want := OutcomeMiss
				if tt.kept {
					want = OutcomeDenied
				}
				mustFail(t, c, request(1, 0), tt.reason, want)
				// A newer token may be judged otherwise.
				if tt.kept && !tt.anyToken {
					mustFail(t, c, request(1, 1), tt.reason, OutcomeMiss)
					time.Sleep(time.Second)
				}
				time.Sleep(time.Second)
				synctest.Wait()
				if n := len(c.Snapshot()); n != 0 {
					t.Errorf("%d subjects remembered after a second", n)
				}
				up.set(func(f *fake) { f.answer = nil })
				mustGet(t, c, request(1, 0), OutcomeMiss)
			})
		})
	}
}

func TestBypassKeepsNothing(t *testing.T) {
	t.Parallel()
	inBubble(t, nil, func(t *testing.T, c *Cache, up *fake) {
		up.delay = time.Millisecond
		bypass := request(1, 0)
		bypass.Bypass = true
		kept := mustGet(t, c, request(1, 0), OutcomeMiss)
		if mustGet(t, c, bypass, OutcomeBypass) == kept {
			t.Error("a bypass was answered from memory")
		}
		mustGet(t, c, bypass, OutcomeBypass)
		if up.count() != 3 || c.Stats().Entries != 1 || len(c.Snapshot()) != 1 {
			t.Errorf("%d calls, %+v", up.count(), c.Stats())
		}
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() { mustGet(t, c, bypass, OutcomeBypass) })
		}
		wg.Wait()
		if up.count() != 4 {
			t.Errorf("ten at once made %d calls", up.count()-3)
		}
	})
}

func TestDisabledKeepsNothing(t *testing.T) {
	t.Parallel()
	inBubble(t, func(cfg *Config) { cfg.Disabled = true }, func(t *testing.T, c *Cache, up *fake) {
		for range 3 {
			mustGet(t, c, request(1, 0), OutcomeBypass)
		}
		if up.count() != 3 || len(c.Snapshot()) != 0 {
			t.Errorf("%d calls, %v", up.count(), c.Snapshot())
		}
	})
}

// There, entries of dead pods were served and renewed until their token ran
// out.
func TestPodThatEndsIsDroppedAtOnce(t *testing.T) {
	t.Parallel()
	inBubble(t, nil, func(t *testing.T, c *Cache, up *fake) {
		mustGet(t, c, request(1, 0), OutcomeMiss)
		mustGet(t, c, unverified(request(1, 0)), OutcomeMiss)
		mustGet(t, c, request(2, 0), OutcomeMiss)
		c.DropPod(subject(1).PodUID)
		if s := c.Snapshot(); len(s) != 1 || s[0].Subject != subject(2) {
			t.Errorf("left: %v", s)
		}
		// A request that was under way when the pod ended comes through, but what
		// it fetches is not kept.
		mustGet(t, c, request(1, 0), OutcomeBypass)
		if n := len(c.Snapshot()); n != 1 {
			t.Errorf("%d subjects", n)
		}
		time.Sleep(24 * time.Hour)
		if up.last() == fakeToken(subject(1), 0) {
			t.Error("the ended pod's credentials were renewed")
		}
	})
}

// The same UID again, as after a static pod's or a kubelet's restart.
func TestPodMadeAgainIsCachedAgain(t *testing.T) {
	t.Parallel()
	inBubble(t, nil, func(t *testing.T, c *Cache, _ *fake) {
		mustGet(t, c, request(1, 0), OutcomeMiss)
		c.DropPod(subject(1).PodUID)
		mustGet(t, c, request(1, 0), OutcomeBypass)
		c.AdmitPod(subject(1).PodUID)
		mustGet(t, c, request(1, 0), OutcomeMiss)
		mustGet(t, c, request(1, 0), OutcomeHit)
	})
}

func TestFetchUnderWayForAnEndedPodIsNotKept(t *testing.T) {
	t.Parallel()
	inBubble(t, nil, func(t *testing.T, c *Cache, up *fake) {
		up.delay = time.Second
		var wg sync.WaitGroup
		wg.Go(func() {
			if e, _, err := c.Get(t.Context(), request(1, 0)); e == nil || err != nil {
				t.Errorf("the waiter is to have the answer, and to judge: %v", err)
			}
		})
		time.Sleep(500 * time.Millisecond)
		c.DropPod(subject(1).PodUID)
		wg.Wait()
		if s := c.Stats(); s.Entries != 0 || s.Bytes != 0 || len(c.Snapshot()) != 0 {
			t.Errorf("kept: %+v", s)
		}
	})
}

func TestRefreshUnderWayForAnEndedPodIsNotKept(t *testing.T) {
	t.Parallel()
	inBubble(t, nil, func(t *testing.T, c *Cache, up *fake) {
		mustGet(t, c, request(1, 0), OutcomeMiss)
		up.set(func(f *fake) { f.delay = time.Second })
		for up.count() < 2 {
			time.Sleep(100 * time.Millisecond)
		}
		c.DropPod(subject(1).PodUID)
		time.Sleep(5 * time.Second)
		if s := c.Stats(); s.Entries != 0 || s.Bytes != 0 || len(c.Snapshot()) != 0 {
			t.Errorf("kept: %+v", s)
		}
	})
}

// There, the LRU was FIFO: what was asked for all the time went first.
func TestWhatIsReadStays(t *testing.T) {
	t.Parallel()
	inBubble(t, func(cfg *Config) { cfg.MaxEntries, cfg.UpstreamQPS = 10, 1e6 }, func(t *testing.T, c *Cache, up *fake) {
		mustGet(t, c, request(0, 0), OutcomeMiss)
		for n := 1; n <= 200; n++ {
			time.Sleep(time.Millisecond)
			mustGet(t, c, request(n, 0), OutcomeMiss)
			time.Sleep(time.Millisecond)
			mustGet(t, c, request(0, 0), OutcomeHit)
			if entries := c.Stats().Entries; entries > 10 {
				t.Fatalf("%d entries", entries)
			}
		}
		if s := c.Stats(); s.Evicted != 191 || s.Entries != 10 {
			t.Errorf("%+v", s)
		}
		for n := 192; n <= 200; n++ {
			mustGet(t, c, request(n, 0), OutcomeHit)
		}
		// Exactly the least recently read one goes, whatever the order of writing.
		time.Sleep(time.Millisecond)
		for n := 200; n >= 193; n-- {
			time.Sleep(time.Millisecond)
			mustGet(t, c, request(n, 0), OutcomeHit)
		}
		time.Sleep(time.Millisecond)
		mustGet(t, c, request(0, 0), OutcomeHit)
		mustGet(t, c, request(500, 0), OutcomeMiss)
		mustGet(t, c, request(0, 0), OutcomeHit)
		for n := 193; n <= 200; n++ {
			mustGet(t, c, request(n, 0), OutcomeHit)
		}
		mustGet(t, c, request(192, 0), OutcomeMiss)
	})
}

func TestBytesAreBounded(t *testing.T) {
	t.Parallel()
	inBubble(t, func(cfg *Config) { cfg.MaxBytes, cfg.UpstreamQPS = 20_000, 1e6 }, func(t *testing.T, c *Cache, up *fake) {
		up.answer = func(_ context.Context, token string) (Answer, error) {
			a := good(token, 0)
			a.SessionToken = strings.Repeat("x", 3000)
			return a, nil
		}
		for n := range 50 {
			time.Sleep(time.Millisecond)
			mustGet(t, c, request(n, 0), OutcomeMiss)
			if s := c.Stats(); s.Bytes > 20_000 || s.Entries < 1 {
				t.Fatalf("%+v", s)
			}
		}
		mustGet(t, c, request(49, 0), OutcomeHit)
		for n := range 50 {
			c.DropPod(subject(n).PodUID)
		}
		if s := c.Stats(); s.Bytes != 0 || s.Entries != 0 {
			t.Errorf("after all pods ended: %+v", s)
		}
	})
}

// One pod with many spellings of its token must not push others out.
func TestOnePodEvictsItsOwnOnly(t *testing.T) {
	t.Parallel()
	inBubble(t, func(cfg *Config) { cfg.MaxEntries, cfg.EntriesPerPod, cfg.UnverifiedQPS = 10, 3, 1e6 }, func(t *testing.T, c *Cache, up *fake) {
		for n := range 5 {
			mustGet(t, c, unverified(request(n, 0)), OutcomeMiss)
		}
		for serial := range 50 {
			time.Sleep(100 * time.Millisecond)
			mustGet(t, c, unverified(request(9, serial)), OutcomeMiss)
		}
		for n := range 5 {
			mustGet(t, c, unverified(request(n, 0)), OutcomeHit)
		}
		if s := c.Stats(); s.Entries != 8 || s.Evicted != 47 {
			t.Errorf("%+v", s)
		}
	})
}

// There, 256 new tokens at once were 246 calls in flight.
func TestUnverifiedMissesAreLimitedPerPod(t *testing.T) {
	t.Parallel()
	inBubble(t, nil, func(t *testing.T, c *Cache, up *fake) {
		up.answer = refusing(evidence.ReasonUpstreamToken)
		limited := 0
		for serial := range 100 {
			if _, _, err := c.Get(t.Context(), unverified(request(1, serial))); errors.Is(err, ErrLimited) {
				if ReasonOf(err) != evidence.ReasonRateLimited {
					t.Fatal(ReasonOf(err))
				}
				limited++
			}
		}
		if limited != 90 || up.count() != 10 {
			t.Errorf("%d limited, %d calls", limited, up.count())
		}
		// What a token claims does not choose the account.
		other := unverified(request(2, 1000))
		other.PodUID = subject(1).PodUID
		mustFail(t, c, other, evidence.ReasonRateLimited, OutcomeLimited)
		// Others, and verified tokens, go on.
		mustFail(t, c, unverified(request(2, 0)), evidence.ReasonUpstreamToken, OutcomeMiss)
		time.Sleep(time.Second)
		mustFail(t, c, unverified(request(1, 200)), evidence.ReasonUpstreamToken, OutcomeMiss)
	})
}

func TestFetchesPerPodAreBounded(t *testing.T) {
	t.Parallel()
	inBubble(t, func(cfg *Config) { cfg.UnverifiedBurst, cfg.FetchesPerPod = 1000, 4 }, func(t *testing.T, c *Cache, up *fake) {
		up.delay = time.Second
		var wg sync.WaitGroup
		for serial := range 100 {
			wg.Go(func() { _, _, _ = c.Get(t.Context(), unverified(request(1, serial))) })
		}
		wg.Wait()
		if up.count() != 4 || c.Stats().Limited != 96 {
			t.Errorf("%d calls, %+v", up.count(), c.Stats())
		}
	})
}

// A defect in the client killed the process there.
func TestUpstreamThatPanics(t *testing.T) {
	t.Parallel()
	for name, fail := range map[string]func(){
		"panic":  func() { panic("token " + fakeSecret) },
		"nil":    func() { var a *Answer; a.AccessKeyID = "x" },
		"goexit": func() { runtime.Goexit() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var log bytes.Buffer
			inBubble(t, func(cfg *Config) { cfg.Logger = slog.New(slog.NewTextHandler(&log, nil)) }, func(t *testing.T, c *Cache, up *fake) {
				mustGet(t, c, request(2, 0), OutcomeMiss)
				up.set(func(f *fake) {
					f.answer = func(context.Context, string) (Answer, error) { fail(); return Answer{}, nil }
				})
				_, _, err := c.Get(t.Context(), request(1, 0))
				if !errors.Is(err, ErrFetchPanicked) {
					t.Errorf("got %v", err)
				}
				time.Sleep(4 * time.Hour) // a refresh panics too
				mustGet(t, c, request(2, 0), OutcomeHit)
				up.set(func(f *fake) { f.answer = nil })
				mustGet(t, c, request(1, 0), OutcomeMiss)
				if s := c.Stats(); s.InFlight != 0 || s.Waiting != 0 {
					t.Errorf("places in the budget lost: %+v", s)
				}
			})
			if strings.Contains(log.String(), fakeSecret) {
				t.Error("the log tells what panicked")
			}
		})
	}
}

func TestRequestsBufferMayBeReused(t *testing.T) {
	t.Parallel()
	inBubble(t, nil, func(t *testing.T, c *Cache, up *fake) {
		up.delay = time.Second
		up.life = time.Hour
		want := request(1, 0)
		// All strings of the request are parts of one buffer, as they are in an
		// HTTP server.
		buf := []byte(want.Raw + string(want.PodUID) + want.Token.Subject.Namespace + want.Token.Subject.ServiceAccount)
		text := unsafeString(buf)
		cut := func(n int) string { s := text[:n]; text = text[n:]; return s }
		req := want
		req.Raw = cut(len(want.Raw))
		req.PodUID = evidence.PodUID(cut(len(want.PodUID)))
		req.Token.Subject = evidence.Subject{PodUID: req.PodUID, Namespace: cut(len("web")), ServiceAccount: cut(len("sa-1"))}
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if _, _, err := c.Get(ctx, req); err == nil {
			t.Fatal("no error")
		}
		for i := range buf {
			buf[i] = 'X'
		}
		time.Sleep(2 * time.Second)
		mustGet(t, c, want, OutcomeHit)
		time.Sleep(50 * time.Minute)
		mustGet(t, c, want, OutcomeHit)
		for _, call := range up.history() {
			if call.token != want.Raw {
				t.Errorf("upstream was sent %q", call.token)
			}
		}
		c.DropPod(subject(1).PodUID)
		if n := len(c.Snapshot()); n != 0 {
			t.Errorf("%d subjects left", n)
		}
	})
}

func TestClose(t *testing.T) {
	t.Parallel()
	inBubble(t, func(cfg *Config) { cfg.Concurrency = 1 }, func(t *testing.T, c *Cache, up *fake) {
		up.delay = time.Hour
		var wg sync.WaitGroup
		for n := range 3 {
			wg.Go(func() {
				if e, _, err := c.Get(t.Context(), request(n, 0)); e != nil || err == nil {
					t.Errorf("%v %v", e, err)
				}
			})
		}
		synctest.Wait()
		c.Close()
		wg.Wait()
		mustFail(t, c, request(1, 0), evidence.ReasonStopping, OutcomeLimited)
		if len(c.Snapshot()) != 0 {
			t.Error("something is kept after Close")
		}
		c.DropPod(subject(1).PodUID)
		c.Close()
	})
}

func TestNewRefuses(t *testing.T) {
	t.Parallel()
	for name, cfg := range map[string]Config{
		"no upstream":  {},
		"negative QPS": {Upstream: &fake{}, UpstreamQPS: -1},
		"negative max": {Upstream: &fake{}, MaxEntries: -1},
	} {
		if c, err := New(cfg); c != nil || !errors.Is(err, ErrConfig) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSecretsDoNotShow(t *testing.T) {
	t.Parallel()
	var text bytes.Buffer
	log := slog.New(slog.NewJSONHandler(&text, &slog.HandlerOptions{Level: slog.LevelDebug}))
	inBubble(t, func(cfg *Config) {
		cfg.Logger = log
		cfg.Observe = func(f Fetch) { log.Info("fetch", "fetch", f) }
	}, func(t *testing.T, c *Cache, up *fake) {
		up.life = 15 * time.Minute
		e := mustGet(t, c, request(1, 0), OutcomeMiss)
		up.set(func(f *fake) { f.answer = refusing(evidence.ReasonUpstreamDenied) })
		time.Sleep(10 * time.Minute)
		a := good(fakeToken(subject(1), 0), 0)
		hidden := struct{ e *Entry }{e}
		asJSON, err := json.Marshal([]any{c.Snapshot(), c.Stats(), e, a})
		if err != nil {
			t.Fatal(err)
		}
		log.Info("x", "entry", e, "answer", a, "snapshot", c.Snapshot())
		fmt.Fprintf(&text, "%v %+v %#v %v %+v %#v %v %+v %s %v", e, e, e, a, a, a, hidden, hidden, asJSON, c.Snapshot())
		if len(c.Snapshot()) != 1 || c.Snapshot()[0].LastReason != evidence.ReasonUpstreamDenied {
			t.Errorf("snapshot %+v", c.Snapshot())
		}
	})
	for _, secret := range []string{fakeSecret, fakeSession, "TOKEN-"} {
		if strings.Contains(text.String(), secret) {
			t.Errorf("%s shows in %s", secret, text.String())
		}
	}
}

func TestErrorTexts(t *testing.T) {
	t.Parallel()
	cause := errors.New("cause")
	up := &UpstreamError{Reason: evidence.ReasonUpstreamDenied, Err: cause}
	if up.Error() != "cause" || !errors.Is(up, cause) || (&UpstreamError{Reason: evidence.ReasonUpstreamDenied}).Error() != "upstream_denied" {
		t.Errorf("%v", up)
	}
	for err, want := range map[error]evidence.Reason{
		nil: evidence.ReasonServed, up: evidence.ReasonUpstreamDenied, cause: evidence.ReasonUpstreamUnavailable,
		ErrLimited: evidence.ReasonRateLimited, ErrClosed: evidence.ReasonStopping, ErrOverloaded: evidence.ReasonUpstreamUnavailable,
		ErrFetchPanicked: evidence.ReasonUpstreamUnavailable,
	} {
		if got := ReasonOf(err); got != want {
			t.Errorf("%v: %s", err, got)
		}
	}
}

// TestEverythingAtOnce is for the race detector, and for what must hold after
// any mix.
func TestEverythingAtOnce(t *testing.T) {
	t.Parallel()
	inBubble(t, func(cfg *Config) {
		cfg.MaxEntries, cfg.UpstreamQPS, cfg.BackgroundQPS = 40, 500, 100
	}, func(t *testing.T, c *Cache, up *fake) {
		up.answer = func(_ context.Context, token string) (Answer, error) {
			time.Sleep(time.Duration(rand.IntN(200)) * time.Millisecond)
			switch rand.IntN(10) {
			case 0:
				return refusing(evidence.ReasonUpstreamNotFound)(nil, token)
			case 1:
				return refusing(evidence.ReasonUpstreamUnavailable)(nil, token)
			case 2:
				return refusing(evidence.ReasonUpstreamThrottled)(nil, token)
			}
			return good(token, time.Duration(20+rand.IntN(3000))*time.Second), nil
		}
		var wg sync.WaitGroup
		for worker := range 16 {
			wg.Go(func() {
				for range 600 {
					n := rand.IntN(60)
					req := request(n, rand.IntN(3))
					if worker%4 == 0 {
						req = unverified(req)
					}
					req.Bypass = rand.IntN(20) == 0
					ctx, cancel := context.WithTimeout(t.Context(), time.Duration(rand.IntN(300))*time.Millisecond)
					e, _, err := c.Get(ctx, req)
					cancel()
					if (e == nil) == (err == nil) {
						t.Errorf("%v %v", e, err)
					}
					if e != nil && !bytes.Contains(e.Body(), []byte("ASIAFAKE")) {
						t.Error("no credentials")
					}
					if e != nil && !strings.Contains(e.AssumedRoleARN(), "/"+req.Token.Subject.ServiceAccount+"/") {
						t.Errorf("%s got %s", req.Token.Subject.ServiceAccount, e.AssumedRoleARN())
					}
					if rand.IntN(30) == 0 {
						c.DropPod(subject(n).PodUID)
					}
					if rand.IntN(50) == 0 {
						c.Snapshot()
						c.Stats()
					}
					time.Sleep(time.Duration(rand.IntN(20)) * time.Second)
				}
			})
		}
		wg.Wait()
		time.Sleep(time.Hour)
		checkBooks(t, c)
		for n := range 60 {
			c.DropPod(subject(n).PodUID)
		}
		checkBooks(t, c)
		if s := c.Stats(); s.Entries != 0 || s.Bytes != 0 || s.InFlight != 0 || s.Waiting != 0 || len(c.Snapshot()) != 0 {
			t.Errorf("left over: %+v", s)
		}
		if len(c.pods) != 0 {
			t.Errorf("%d pods' records left", len(c.pods))
		}
	})
}

// checkBooks compares every count the cache keeps with what is there.
func checkBooks(t *testing.T, c *Cache) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	var entries, denials, items int
	var size int64
	perPod := map[evidence.PodUID]int{}
	for i := range c.shards {
		for k, it := range c.shards[i].items {
			items++
			perPod[it.pod]++
			if k != it.key || it.gone {
				t.Errorf("item %v in the wrong place", it.subject)
			}
			if e := it.entry.Load(); e != nil {
				entries++
				size += sizeOf(it, e)
				if it.lruIndex < 0 || c.lru.items[it.lruIndex] != it {
					t.Errorf("%v has credentials and is not in the LRU", it.subject)
				}
			} else if it.lruIndex >= 0 || it.readyIndex >= 0 {
				t.Errorf("%v has no credentials and is in a heap", it.subject)
			}
			if it.denial.Load() != nil {
				denials++
			}
			if it.flight == nil && it.dueIndex < 0 {
				t.Errorf("%v has nothing planned and would stay for ever", it.subject)
			}
		}
	}
	if entries != len(c.lru.items) || size != c.bytes || denials != c.denials || len(c.due.items) > items {
		t.Errorf("%d entries of %d bytes and %d denials; the books say %d, %d, %d", entries, size, denials, len(c.lru.items), c.bytes, c.denials)
	}
	for uid, p := range c.pods {
		listed := 0
		for it := p.items; it != nil; it = it.podNext {
			listed++
		}
		if p.count != perPod[uid] || listed != p.count {
			t.Errorf("pod %s: %d items, counted %d, listed %d", uid, perPod[uid], p.count, listed)
		}
	}
}
