// SPDX-License-Identifier: Apache-2.0

package credcache

import (
	"context"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// realistic is a request with a token as long as a projected one.
func realistic(n int) Request {
	r := request(n, 0)
	r.Raw += strings.Repeat("x", 1200-len(r.Raw))
	r.Token.Expiry = time.Now().Add(24 * time.Hour)
	return r
}

func warm(tb testing.TB, subjects int, change func(Request) Request) (*Cache, []Request) {
	tb.Helper()
	up := &fake{}
	c, err := New(Config{Upstream: up, UpstreamQPS: 1e9, Concurrency: 1000, MaxEntries: subjects, MaxBytes: 1 << 40, UnverifiedQPS: 1e9})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(c.Close)
	requests := make([]Request, subjects)
	for n := range requests {
		requests[n] = realistic(n)
		if change != nil {
			requests[n] = change(requests[n])
		}
		if _, _, err := c.Get(tb.Context(), requests[n]); err != nil {
			tb.Fatal(err)
		}
	}
	return c, requests
}

func TestHitAllocatesNothing(t *testing.T) {
	for name, change := range map[string]func(Request) Request{"verified": nil, "unverified": unverified} {
		c, requests := warm(t, 100, change)
		ctx := t.Context()
		n := 0
		if allocs := testing.AllocsPerRun(1000, func() {
			n++
			if _, outcome, _ := c.Get(ctx, requests[n%len(requests)]); outcome != OutcomeHit {
				t.Fatal(outcome)
			}
		}); allocs != 0 {
			t.Errorf("%s: %v allocations", name, allocs)
		}
	}
}

func BenchmarkCacheHit(b *testing.B) {
	for name, change := range map[string]func(Request) Request{"verified": nil, "unverified": unverified} {
		for _, subjects := range []int{1, 1000} {
			b.Run(fmt.Sprintf("%s/subjects=%d", name, subjects), func(b *testing.B) {
				c, requests := warm(b, subjects, change)
				ctx := b.Context()
				b.ReportAllocs()
				n := 0
				for b.Loop() {
					n++
					if e, _, _ := c.Get(ctx, requests[n%subjects]); e == nil {
						b.Fatal("no hit")
					}
				}
			})
		}
	}
}

func BenchmarkCacheHitParallel(b *testing.B) {
	c, requests := warm(b, 1000, nil)
	ctx := b.Context()
	b.ReportAllocs()
	var worker atomic.Int64
	b.RunParallel(func(pb *testing.PB) {
		n := int(worker.Add(1)) * 97
		for pb.Next() {
			n++
			if e, _, _ := c.Get(ctx, requests[n%len(requests)]); e == nil {
				b.Error("no hit")
			}
		}
	})
}

// BenchmarkWaiters is one cold subject with 64 requests waiting, upstream
// answering at once: what the fan-out costs.
func BenchmarkWaiters(b *testing.B) {
	c, err := New(Config{Upstream: &fake{}, UpstreamQPS: 1e9, MaxEntries: 1000})
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	n := 0
	for b.Loop() {
		n++
		req := realistic(n)
		var wg sync.WaitGroup
		for range 64 {
			wg.Go(func() { _, _, _ = c.Get(context.Background(), req) })
		}
		wg.Wait()
		c.DropPod(req.PodUID)
	}
}

// BenchmarkBytesPerSubject reports what a subject costs beyond its
// credentials' own bytes; its token's 1.2 KB are part of that.
func BenchmarkBytesPerSubject(b *testing.B) {
	const subjects = 10_000
	for b.Loop() {
		before := heapBytes()
		c, _ := warmLean(b, subjects)
		after := heapBytes()
		s := c.Stats()
		body := int64(0)
		for _, it := range c.lru.items {
			body += int64(len(it.entry.Load().body))
		}
		b.ReportMetric(float64(after-before-body)/subjects, "B/subject")
		b.ReportMetric(float64(s.Bytes-body)/subjects, "counted-B/subject")
		c.Close()
	}
}

// warmLean fills a cache without keeping the requests.
func warmLean(tb testing.TB, subjects int) (*Cache, *leanUpstream) {
	tb.Helper()
	up := &leanUpstream{}
	c, err := New(Config{Upstream: up, UpstreamQPS: 1e9, MaxEntries: subjects, MaxBytes: 1 << 40})
	if err != nil {
		tb.Fatal(err)
	}
	for n := range subjects {
		if _, _, err := c.Get(tb.Context(), realistic(n)); err != nil {
			tb.Fatal(err)
		}
	}
	return c, up
}

type leanUpstream struct{}

func (*leanUpstream) Fetch(_ context.Context, token string) (Answer, error) {
	a := good(token, 6*time.Hour)
	a.SessionToken = strings.Repeat("s", 900)
	return a, nil
}

func heapBytes() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// BenchmarkHitWhileRefreshWaits is a hit whose refresh is overdue but cannot start:
// it must not take the cache's lock each time.
func BenchmarkHitWhileRefreshWaits(b *testing.B) {
	c, requests := warm(b, 1, nil)
	requests[0].Token.Expiry = time.Now().Add(30 * time.Second)
	c.mu.Lock()
	it := c.lru.items[0]
	it.tokenExpiry.Store(requests[0].Token.Expiry.UnixNano())
	it.wantsRequest.Store(0)
	c.mu.Unlock()
	b.ReportAllocs()
	for b.Loop() {
		if e, _, _ := c.Get(b.Context(), requests[0]); e == nil {
			b.Fatal("no hit")
		}
	}
}
