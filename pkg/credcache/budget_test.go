// SPDX-License-Identifier: Apache-2.0

package credcache

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

func TestRateAndConcurrencyAreBounded(t *testing.T) {
	t.Parallel()
	inBubble(t, func(cfg *Config) { cfg.UpstreamQPS, cfg.Concurrency, cfg.FetchTimeout = 10, 5, time.Minute }, func(t *testing.T, c *Cache, up *fake) {
		up.delay = 100 * time.Millisecond
		start := time.Now()
		var wg sync.WaitGroup
		for n := range 200 {
			wg.Go(func() { mustGet(t, c, request(n, 0), OutcomeMiss) })
		}
		wg.Wait()
		if up.mostAtOnce() > 5 {
			t.Errorf("%d calls at once", up.mostAtOnce())
		}
		// 20 at first, then 10 a second; and none of the budget is left unused.
		if took := time.Since(start); took < 18*time.Second || took > 18500*time.Millisecond {
			t.Errorf("200 calls took %v", took)
		}
		if s := c.Stats(); s.InFlight != 0 || s.Waiting != 0 {
			t.Errorf("%+v", s)
		}
	})
}

func TestBudgetThatIsUsedUpSaysSo(t *testing.T) {
	t.Parallel()
	inBubble(t, func(cfg *Config) { cfg.Concurrency, cfg.FetchTimeout = 1, 5*time.Second }, func(t *testing.T, c *Cache, up *fake) {
		up.answer = func(ctx context.Context, _ string) (Answer, error) { <-ctx.Done(); return Answer{}, ctx.Err() }
		go func() { _, _, _ = c.Get(t.Context(), request(1, 0)) }()
		time.Sleep(time.Second)
		_, _, err := c.Get(t.Context(), request(2, 0))
		if err == nil || ReasonOf(err) != evidence.ReasonUpstreamUnavailable {
			t.Errorf("%v", err)
		}
		third := func() { _, _, err = c.Get(t.Context(), request(3, 0)) }
		go func() { _, _, _ = c.Get(t.Context(), request(4, 0)) }()
		synctest.Wait()
		third()
		if !errors.Is(err, ErrOverloaded) {
			t.Errorf("%v", err)
		}
		time.Sleep(10 * time.Second)
		if s := c.Stats(); s.InFlight != 0 || s.Waiting != 0 || len(c.budget.queues) != 0 || len(c.budget.turns) != 0 {
			t.Errorf("%+v", s)
		}
	})
}

// A pod's flood of misses must not stand before another pod's only one.
func TestPodsTakeTurns(t *testing.T) {
	t.Parallel()
	inBubble(t, func(cfg *Config) {
		cfg.UpstreamQPS, cfg.FetchesPerPod, cfg.UnverifiedBurst, cfg.FetchTimeout = 10, 1000, 1000, time.Hour
	}, func(t *testing.T, c *Cache, up *fake) {
		for serial := range 500 {
			go func() { _, _, _ = c.Get(t.Context(), unverified(request(1, serial))) }()
		}
		synctest.Wait()
		start := time.Now()
		mustGet(t, c, request(2, 0), OutcomeMiss)
		// At most the turn that is the flood's, then its own.
		if waited := time.Since(start); waited > 250*time.Millisecond {
			t.Errorf("the quiet pod waited %v", waited)
		}
	})
}

// A flood of requests must not let what is there expire.
func TestUrgentRefreshesGetAFifth(t *testing.T) {
	t.Parallel()
	inBubble(t, func(cfg *Config) {
		cfg.UpstreamQPS, cfg.BackgroundQPS, cfg.FetchTimeout, cfg.MaxEntries = 10, 1, time.Hour, 1e6
	}, func(t *testing.T, c *Cache, up *fake) {
		up.life = 14 * time.Minute // renewed with 7 to 8 minutes left: urgent at once
		for n := range 20 {
			mustGet(t, c, request(n, 0), OutcomeMiss)
		}
		up.set(func(f *fake) { f.calls = nil; f.life = 6 * time.Hour })
		time.Sleep(4 * time.Minute)
		next := 1000
		flood := func(n int) {
			for range n {
				next++
				go func() { _, _, _ = c.Get(t.Context(), request(next, 0)) }()
				synctest.Wait()
			}
		}
		flood(200)
		for range 240 {
			time.Sleep(time.Second)
			flood(10)
		}
		s := c.Stats()
		if s.Refreshes[evidence.ReasonServed] != 20 || s.Expired != 0 {
			t.Errorf("%d renewed, %d expired", s.Refreshes[evidence.ReasonServed], s.Expired)
		}
		if s.Waiting < 200 {
			t.Errorf("only %d wait: the flood was none", s.Waiting)
		}
		c.cancel()
	})
}

// Refreshes that can wait leave the budget to requests.
func TestRequestsComeBeforeRefreshes(t *testing.T) {
	t.Parallel()
	inBubble(t, func(cfg *Config) {
		cfg.UpstreamQPS, cfg.BackgroundQPS, cfg.FetchTimeout = 10, 10, time.Hour
	}, func(t *testing.T, c *Cache, up *fake) {
		b := c.budget
		b.mu.Lock()
		b.tokens = 0
		b.mu.Unlock()
		c.cancel() // the scheduler is played by the test
		synctest.Wait()
		c.ctx = context.Background()
		b.want(time.Now().Add(time.Hour))
		for range 30 {
			go func() { _ = b.acquire(context.Background(), "x") }()
		}
		synctest.Wait()
		time.Sleep(2 * time.Second)
		if len(b.granted) != 0 {
			t.Error("a refresh went before requests that wait")
		}
		time.Sleep(2 * time.Second)
		if len(b.granted) != 1 {
			t.Error("no refresh went after all requests")
		}
		b.stop()
	})
}

func TestBackgroundShareIsBounded(t *testing.T) {
	t.Parallel()
	inBubble(t, func(cfg *Config) { cfg.UpstreamQPS, cfg.BackgroundQPS = 100, 3 }, func(t *testing.T, c *Cache, up *fake) {
		c.budget.mu.Lock()
		c.budget.tokens = 1000
		c.budget.mu.Unlock()
		for n := range 1000 {
			mustGet(t, c, request(n, 0), OutcomeMiss)
		}
		up.set(func(f *fake) { f.calls = nil })
		time.Sleep(4 * time.Hour)
		if len(up.history()) != 1000 {
			t.Errorf("%d renewals of 1000", len(up.history()))
		}
		if n := busiestSecond(up.history()); n > 6 {
			t.Errorf("%d background calls in one second", n)
		}
	})
}

func TestThrottlingSlowsTheNodeDown(t *testing.T) {
	t.Parallel()
	inBubble(t, func(cfg *Config) { cfg.UpstreamQPS = 10 }, func(t *testing.T, c *Cache, up *fake) {
		b := c.budget
		throttle := func(after time.Duration) {
			b.report(&UpstreamError{Reason: evidence.ReasonUpstreamThrottled, RetryAfter: after, Err: errors.New("slow down")})
		}
		for range 20 {
			throttle(0) // one burst of refusals is one sign
		}
		if f := c.Stats().RateFactor; f != 0.5 {
			t.Errorf("factor %v", f)
		}
		for range 10 {
			time.Sleep(time.Second)
			throttle(0)
		}
		if f := c.Stats().RateFactor; f < slowestFactor || f > 0.2 {
			t.Errorf("factor %v", f)
		}
		time.Sleep(30 * time.Second)
		b.report(nil)
		if f := c.Stats().RateFactor; f != 1 {
			t.Errorf("factor %v after half a minute", f)
		}
		throttle(40 * time.Second)
		b.want(time.Now().Add(time.Hour))
		time.Sleep(39 * time.Second)
		if len(b.granted) != 0 {
			t.Error("a refresh went though the upstream asked to wait")
		}
		// Requests still go: each is somebody waiting.
		mustGet(t, c, request(1, 0), OutcomeMiss)
	})
}

func TestRetryNeedsWhatNobodyWaitsFor(t *testing.T) {
	t.Parallel()
	inBubble(t, func(cfg *Config) { cfg.UpstreamQPS, cfg.FetchTimeout = 1, time.Hour }, func(t *testing.T, c *Cache, up *fake) {
		for range 2 {
			if err := c.Permit(t.Context()); err != nil {
				t.Error(err)
			}
		}
		if err := c.Permit(t.Context()); !errors.Is(err, ErrOverloaded) {
			t.Errorf("got %v", err)
		}
		go func() { _, _, _ = c.Get(t.Context(), request(1, 0)) }()
		synctest.Wait()
		if c.Stats().Waiting != 1 || c.Permit(t.Context()) == nil {
			t.Error("a retry went before a request that waits")
		}
		time.Sleep(3 * time.Second)
		if err := c.Permit(t.Context()); err != nil || up.count() != 1 {
			t.Errorf("%v, %d calls", err, up.count())
		}
	})
}
