// SPDX-License-Identifier: Apache-2.0

package audit

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

// memory is a sink that keeps lines, blocks while it is told to, and fails as
// often as it is told to.
type memory struct {
	mu    sync.Mutex
	lines [][]byte
	fail  int

	entered chan struct{} // nil: never blocks
	release chan struct{}
	closed  bool
}

func (m *memory) Write(lines []byte) (int, error) {
	if m.entered != nil {
		m.entered <- struct{}{}
		<-m.release
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fail > 0 {
		m.fail--
		return 0, errors.New("disk full")
	}
	n := 0
	for line := range bytes.Lines(bytes.Clone(lines)) {
		m.lines = append(m.lines, bytes.TrimSuffix(line, newline))
		n++
	}
	return n, nil
}

func (m *memory) Close() error { m.closed = true; return nil }

// start runs a log; what it gives ends it.
func start(t *testing.T, cfg Config) (*Log, func()) {
	t.Helper()
	l, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); l.Run(ctx) }()
	end := sync.OnceFunc(func() { stop(); <-done })
	t.Cleanup(end)
	return l, end
}

func TestLogWritesEverything(t *testing.T) {
	sink := &memory{}
	const workers, each = 4, 500
	l, end := start(t, Config{Sink: sink, SampleHits: 1, Queues: workers, Capacity: 4 * each, Linger: time.Nanosecond})
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for range each {
				r := issued()
				l.Add(uint32(w), &r)
			}
		})
	}
	wg.Wait()
	end()
	if len(sink.lines) != workers*each || l.Stats() != (Stats{Written: workers * each}) {
		t.Errorf("%d lines, %+v", len(sink.lines), l.Stats())
	}
	for _, line := range sink.lines {
		if m := decode(t, line); m["dropped"] != nil || m["verdict"] != "issued" {
			t.Fatalf("%s", line)
		}
	}
	if !sink.closed {
		t.Error("the sink is still open")
	}
}

// A sink that stands still holds nobody up; what is lost is counted, and told in
// the next line.
func TestLogNeverBlocks(t *testing.T) {
	sink := &memory{entered: make(chan struct{}), release: make(chan struct{})}
	l, end := start(t, Config{Sink: sink, SampleHits: 1, Queues: 1, Capacity: 8, Linger: time.Nanosecond})
	add := func(hit bool, n int) {
		for range n {
			r := issued()
			if !hit {
				r = stolen()
			}
			l.Add(0, &r)
		}
	}
	add(true, 1)
	<-sink.entered // the writer is inside the sink
	add(true, 10)  // 6 fit: a quarter is for refusals
	add(false, 5)  // 2 fit
	if s := l.Stats(); s.Full != 7 {
		t.Errorf("%+v, want 7 lost", s)
	}
	close(sink.release)
	for drained := false; !drained; {
		select {
		case <-sink.entered:
			drained = true // the second batch
		case <-time.After(time.Minute):
			t.Fatal("the writer stands still")
		}
	}
	go func() {
		for range sink.entered { //nolint:revive // takes what comes
		}
	}()
	end()
	close(sink.entered)
	if len(sink.lines) != 9 {
		t.Fatalf("%d lines, want 9", len(sink.lines))
	}
	refused := 0
	for i, line := range sink.lines {
		m := decode(t, line)
		if m["verdict"] == "refused" {
			refused++
		}
		if dropped := m["dropped"]; i == 1 && dropped != 7.0 || i != 1 && dropped != nil {
			t.Errorf("line %d tells of %v lost", i, dropped)
		}
	}
	if refused != 2 {
		t.Errorf("%d refusals, want 2: hits took their room", refused)
	}
}

// A pod that is over its limit cannot push others' records out.
func TestLogKeepsRoomBesidesFloods(t *testing.T) {
	l, err := New(Config{Sink: &memory{}, SampleHits: 1, Queues: 1, Capacity: 100})
	if err != nil {
		t.Fatal(err)
	}
	add := func(n int, r Record) {
		for range n {
			l.Add(0, &r)
		}
	}
	flood := stolen()
	flood.Status, flood.Reason = 429, evidence.ReasonRateLimited
	add(1000, flood)
	add(1000, issued())
	add(1000, stolen())
	l.drain()
	count := map[string]int{}
	for _, line := range l.cfg.Sink.(*memory).lines {
		count[decode(t, line)["reason"].(string)]++
	}
	if count["rate_limited"] != 50 || count["served"] != 25 || count["pod_mismatch"] != 25 || l.Stats().Full != 2900 {
		t.Errorf("%v, %+v", count, l.Stats())
	}
}

// What a sink refuses is told once it takes something again.
func TestLogTellsWhatTheSinkLost(t *testing.T) {
	sink := &memory{fail: 1}
	l, err := New(Config{Sink: sink, SampleHits: 1, Queues: 1})
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		r := stolen()
		l.Add(0, &r)
	}
	l.drain()
	r := stolen()
	l.Add(0, &r)
	l.drain()
	r = stolen()
	l.Add(0, &r)
	l.drain()
	if len(sink.lines) != 2 || l.Stats() != (Stats{Written: 2, Failed: 3}) {
		t.Fatalf("%d lines, %+v", len(sink.lines), l.Stats())
	}
	if m := decode(t, sink.lines[0]); m["dropped"] != 3.0 {
		t.Errorf("%s", sink.lines[0])
	}
	if m := decode(t, sink.lines[1]); m["dropped"] != nil {
		t.Errorf("told twice: %s", sink.lines[1])
	}
}

func TestLogSamplesHitsOnly(t *testing.T) {
	for _, c := range []struct{ sample, hits, want int }{{1, 10, 10}, {3, 10, 4}, {0, 10, 0}} {
		sink := &memory{}
		l, err := New(Config{Sink: sink, SampleHits: c.sample})
		if err != nil {
			t.Fatal(err)
		}
		for range c.hits {
			if l.Hit() {
				r := issued()
				l.Add(0, &r)
			}
		}
		r := stolen()
		l.Add(0, &r)
		l.drain()
		if len(sink.lines) != c.want+1 || l.Stats().Sampled != uint64(c.hits-c.want) {
			t.Errorf("one of %d: %d lines of %d hits and a refusal, %+v", c.sample, len(sink.lines), c.hits, l.Stats())
		}
		if c.sample == 3 {
			if m := decode(t, sink.lines[0]); m["sampled"] != 3.0 {
				t.Errorf("%s", sink.lines[0])
			}
			if m := decode(t, sink.lines[len(sink.lines)-1]); m["sampled"] != nil {
				t.Errorf("a refusal was sampled: %s", sink.lines[len(sink.lines)-1])
			}
		}
	}
}

func TestLogEnrichesOutsideOfAdd(t *testing.T) {
	sink := &memory{}
	asked := 0
	l, err := New(Config{Sink: sink, Queues: 1, Enrich: func(r *Record) { asked++; r.Task.Container = "looked-up" }})
	if err != nil {
		t.Fatal(err)
	}
	r := stolen()
	l.Add(0, &r)
	if asked != 0 {
		t.Error("looked up while a pod waits")
	}
	l.drain()
	if pod := decode(t, sink.lines[0])["pod"].(map[string]any); asked != 1 || pod["container"] != "looked-up" {
		t.Errorf("%d times, %s", asked, sink.lines[0])
	}
}

func TestAddAllocatesNothing(t *testing.T) {
	l, err := New(Config{Sink: &memory{}, Queues: 1, Capacity: 4096})
	if err != nil {
		t.Fatal(err)
	}
	r := stolen()
	if n := testing.AllocsPerRun(1000, func() { l.Add(0, &r) }); n > 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestNewRefuses(t *testing.T) {
	for name, cfg := range map[string]Config{
		"no sink":           {},
		"negative sample":   {Sink: &memory{}, SampleHits: -1},
		"negative capacity": {Sink: &memory{}, Capacity: -1},
	} {
		if _, err := New(cfg); !errors.Is(err, ErrConfig) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func BenchmarkAdd(b *testing.B) {
	l, err := New(Config{Sink: &memory{}, Queues: 1, Capacity: 1 << 12})
	if err != nil {
		b.Fatal(err)
	}
	r := issued()
	b.ReportAllocs()
	for b.Loop() {
		l.Add(0, &r)
		if l.queues[0].n == cap(l.queues[0].records)/2 {
			l.queues[0].n = 0
		}
	}
}

func BenchmarkAppendJSON(b *testing.B) {
	r := issued()
	buf := make([]byte, 0, 4096)
	b.ReportAllocs()
	for b.Loop() {
		buf = r.AppendJSON(buf[:0])
	}
	b.SetBytes(int64(len(buf)))
}
