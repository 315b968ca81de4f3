// SPDX-License-Identifier: Apache-2.0

package credcache

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

func only(n int) func(evidence.Subject) bool {
	return func(s evidence.Subject) bool { return s == subject(n) }
}

// What an operator drops is fetched anew; the others are left alone.
func TestDropForgetsWhatMatches(t *testing.T) {
	t.Parallel()
	inBubble(t, nil, func(t *testing.T, c *Cache, up *fake) {
		mustGet(t, c, request(1, 0), OutcomeMiss)
		mustGet(t, c, request(2, 0), OutcomeMiss)
		if n := c.Drop(only(1)); n != 1 {
			t.Errorf("dropped %d", n)
		}
		if n := c.Drop(only(3)); n != 0 {
			t.Errorf("dropped %d of a subject that is not there", n)
		}
		mustGet(t, c, request(2, 0), OutcomeHit)
		mustGet(t, c, request(1, 0), OutcomeMiss)
		mustGet(t, c, request(1, 0), OutcomeHit)
		// The result of a fetch that was under way is not kept.
		up.set(func(f *fake) { f.delay = time.Second })
		c.Drop(only(1))
		done := make(chan struct{})
		go func() {
			defer close(done)
			mustGet(t, c, request(1, 0), OutcomeMiss)
		}()
		synctest.Wait()
		c.Drop(only(1))
		<-done
		mustGet(t, c, request(1, 0), OutcomeMiss)
	})
}

// An operator's refresh comes before its time, and waits for a token if the one
// that is kept has expired.
func TestRefreshBeforeItIsDue(t *testing.T) {
	t.Parallel()
	inBubble(t, func(cfg *Config) { cfg.MaxRetention = 100 * time.Hour }, func(t *testing.T, c *Cache, up *fake) {
		up.life = 200 * time.Hour
		mustGet(t, c, request(1, 0), OutcomeMiss)
		time.Sleep(time.Minute)
		if started, waiting := c.Refresh(only(1)); started != 1 || waiting != 0 {
			t.Errorf("started %d, waiting %d", started, waiting)
		}
		synctest.Wait()
		if up.count() != 2 {
			t.Errorf("%d calls, want 2", up.count())
		}
		if started, waiting := c.Refresh(only(2)); started+waiting != 0 {
			t.Error("refreshed what is not there")
		}
		time.Sleep(25 * time.Hour) // serial 0's token lives a day
		if started, waiting := c.Refresh(only(1)); started != 0 || waiting != 1 {
			t.Errorf("with an expired token: started %d, waiting %d", started, waiting)
		}
		before := up.count()
		mustGet(t, c, request(1, 1), OutcomeHit)
		synctest.Wait()
		if up.count() != before+1 {
			t.Errorf("%d calls after the request that brought a token, want %d", up.count(), before+1)
		}
	})
}
