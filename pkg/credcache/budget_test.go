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
		up.answer = func(_ context.Context, token string) (Answer, error) {
			time.Sleep(20 * time.Second) // and no context ends it
			return good(token, 0), nil
		}
		go func() { _, _, _ = c.Get(t.Context(), request(1, 0)) }()
		time.Sleep(time.Second)
		start := time.Now()
		_, _, err := c.Get(t.Context(), request(2, 0))
		if !errors.Is(err, ErrOverloaded) || ReasonOf(err) != evidence.ReasonUpstreamUnavailable || time.Since(start) != 5*time.Second {
			t.Errorf("%v after %v", err, time.Since(start))
		}
		time.Sleep(time.Minute)
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
	synctest.Test(t, func(t *testing.T) {
		b := newBudget(Config{UpstreamQPS: 10, BackgroundQPS: 10, Concurrency: 100, Now: time.Now})
		defer b.stop()
		b.tokens = 0
		b.want(time.Now().Add(time.Hour))
		for range 30 {
			go func() { _ = b.acquire(t.Context(), "x") }()
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
	})
}

func TestBackgroundShareIsBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBudget(Config{UpstreamQPS: 100, BackgroundQPS: 3, Concurrency: 100, Now: time.Now})
		defer b.stop()
		refreshes := func(urgent time.Duration) (n int) {
			for end := time.Now().Add(10 * time.Second); time.Now().Before(end); n++ {
				b.want(time.Now().Add(urgent))
				<-b.granted
				b.release()
			}
			return n
		}
		if n := refreshes(time.Hour); n < 30 || n > 34 {
			t.Errorf("%d in ten seconds, want three a second and three more", n)
		}
		if n := refreshes(0); n < 1000 || n > 1210 {
			t.Errorf("%d urgent ones in ten seconds, want the whole budget", n)
		}
	})
}

func TestThrottlingSlowsTheNodeDown(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBudget(Config{UpstreamQPS: 10, BackgroundQPS: 10, Concurrency: 100, Now: time.Now})
		defer b.stop()
		throttle := func(after time.Duration) {
			b.report(&UpstreamError{Reason: evidence.ReasonUpstreamThrottled, RetryAfter: after, Err: errors.New("slow down")})
		}
		factor := func() float64 {
			b.mu.Lock()
			defer b.mu.Unlock()
			b.refill(time.Now())
			return b.factor
		}
		for range 20 {
			throttle(0) // one burst of refusals is one sign
		}
		if f := factor(); f != 0.5 {
			t.Errorf("factor %v", f)
		}
		for range 10 {
			time.Sleep(time.Second)
			throttle(0)
		}
		if f := factor(); f < slowestFactor || f > 0.2 {
			t.Errorf("factor %v", f)
		}
		// A success between two refusals does not undo the first.
		b.report(nil)
		throttle(0)
		time.Sleep(2 * time.Minute)
		b.report(nil)
		if f := factor(); f != 1 {
			t.Errorf("factor %v after two minutes", f)
		}
		throttle(40 * time.Second)
		b.want(time.Now().Add(time.Hour))
		time.Sleep(40*time.Second - time.Millisecond)
		if len(b.granted) != 0 {
			t.Error("a refresh went though the upstream asked to wait")
		}
		// Requests still go: each is somebody waiting.
		if err := b.acquire(t.Context(), "x"); err != nil {
			t.Error(err)
		}
		time.Sleep(2 * time.Millisecond)
		if len(b.granted) != 1 {
			t.Error("the refresh did not go after the pause")
		}
		<-b.granted
		// Near its end a refresh does not wait for the pause.
		throttle(40 * time.Second)
		b.want(time.Now().Add(10 * time.Second))
		time.Sleep(11 * time.Second)
		if len(b.granted) != 1 {
			t.Error("an urgent refresh waited for the pause")
		}
	})
}

func TestRetryNeedsWhatNobodyWaitsFor(t *testing.T) {
	t.Parallel()
	inBubble(t, func(cfg *Config) { cfg.UpstreamQPS, cfg.Concurrency = 1, 1 }, func(t *testing.T, c *Cache, up *fake) {
		for range 2 {
			if err := c.Permit(t.Context()); err != nil {
				t.Error(err)
			}
		}
		if err := c.Permit(t.Context()); !errors.Is(err, ErrOverloaded) {
			t.Errorf("got %v", err)
		}
		up.set(func(f *fake) { f.delay = 5 * time.Second })
		time.Sleep(10 * time.Second)
		for n := range 2 {
			go func() { _, _, _ = c.Get(t.Context(), request(n, 0)) }()
		}
		synctest.Wait()
		if c.Stats().Waiting != 1 || c.Permit(t.Context()) == nil {
			t.Error("a retry went before a request that waits")
		}
		time.Sleep(15 * time.Second)
		if err := c.Permit(t.Context()); err != nil || up.count() != 2 {
			t.Errorf("%v, %d calls", err, up.count())
		}
	})
}
