// SPDX-License-Identifier: Apache-2.0

package audit

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

// Defaults of Config.
const (
	DefaultCapacity = 1024
	DefaultLinger   = 50 * time.Millisecond
	DefaultQuiet    = 10 * time.Second
)

// ErrConfig: a setting of the audit that cannot be used; the text says which.
var ErrConfig = errors.New("invalid audit configuration")

// Config is what New needs.
type Config struct {
	// Sink takes the lines. Required; the Log closes it.
	Sink Sink
	// SampleHits: of so many answers from the cache one is recorded. 1 records
	// each, 0 none. What was fetched from upstream and what was refused is
	// always recorded.
	SampleHits int
	// Queues is how many queues there are, rounded up to a power of two; 0
	// means one per processor, but 8 at most. Capacity is how many records each holds; 0 means
	// DefaultCapacity.
	Queues, Capacity int
	// Linger is how long the writer collects before it writes, unless a queue is
	// half full; 0 means DefaultLinger.
	Linger time.Duration
	// Enrich, if given, looks up Record.Task. It is called by the writer, so it
	// may take its time, and must not keep the record.
	Enrich func(*Record)
	// Logger gets what is wrong with the sink, at most once per Quiet (0:
	// DefaultQuiet). Nil discards.
	Logger *slog.Logger
	Quiet  time.Duration
	// Now is the clock, time.Now if nil.
	Now func() time.Time
}

// Stats counts records since the start.
type Stats struct {
	// Written reached the sink.
	Written uint64
	// Full did not fit in a queue, because the sink could not keep up; Failed
	// were refused by the sink. Both are told in the next line.
	Full, Failed uint64
	// Sampled are hits that were left out because SampleHits says so.
	Sampled uint64
}

// Log takes records from any number of goroutines and writes them in one. Add
// neither blocks nor allocates.
type Log struct {
	cfg    Config
	log    *slog.Logger
	queues []queue
	mask   uint32

	// wake says that a queue is no longer empty, urgent that one is half full.
	wake, urgent chan struct{}

	hits, sampled         atomic.Uint64
	written, full, failed atomic.Uint64

	// Of the writer's goroutine:

	spare []Record
	lines []byte
	// lost is what the next line tells.
	lost      uint64
	complains time.Time
}

// queue is one worker's, or a few workers', so that they seldom meet at a lock.
type queue struct {
	mu sync.Mutex
	// records has the full capacity as its length; n are in use.
	records []Record
	n       int
	dropped uint64
	_       [64]byte // not in one cache line with the next
}

// New makes a Log; Run writes what it takes. Errors wrap ErrConfig.
func New(cfg Config) (*Log, error) {
	switch {
	case cfg.Sink == nil:
		return nil, fmt.Errorf("%w: no sink", ErrConfig)
	case cfg.SampleHits < 0 || cfg.Queues < 0 || cfg.Capacity < 0 || cfg.Linger < 0:
		return nil, fmt.Errorf("%w: sizes, counts and durations are not negative", ErrConfig)
	}
	if cfg.Queues == 0 {
		// More would only be memory: a queue is locked for a copy.
		cfg.Queues = min(runtime.GOMAXPROCS(0), 8)
	}
	if cfg.Capacity == 0 {
		cfg.Capacity = DefaultCapacity
	}
	// A quarter is kept for what is no hit: see Add.
	cfg.Capacity = max(cfg.Capacity, 4)
	if cfg.Linger == 0 {
		cfg.Linger = DefaultLinger
	}
	if cfg.Quiet == 0 {
		cfg.Quiet = DefaultQuiet
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	n := 1 << bits.Len(uint(cfg.Queues-1))
	l := &Log{
		cfg: cfg, log: cfg.Logger, queues: make([]queue, n), mask: uint32(n - 1),
		wake: make(chan struct{}, 1), urgent: make(chan struct{}, 1),
		spare: make([]Record, cfg.Capacity),
	}
	if l.log == nil {
		l.log = slog.New(slog.DiscardHandler)
	}
	for i := range l.queues {
		l.queues[i].records = make([]Record, cfg.Capacity)
	}
	return l, nil
}

// Hit tells whether the next answer from the cache is to be recorded. Call it
// once for each.
func (l *Log) Hit() bool {
	switch n := uint64(l.cfg.SampleHits); {
	case n == 1:
		return true
	case n > 1 && l.hits.Add(1)%n == 1:
		return true
	}
	l.sampled.Add(1)
	return false
}

// Add records r, of which it keeps a copy. Worker is any number that tells
// those apart who call at the same time. If there is no room the record is
// counted and lost: hits while there is still some for refusals, and requests
// beyond a pod's limit while there is some for both.
func (l *Log) Add(worker uint32, r *Record) {
	q := &l.queues[worker&l.mask]
	q.mu.Lock()
	room := len(q.records)
	switch {
	case r.Hit:
		room -= room / 4
	case r.Reason == evidence.ReasonRateLimited:
		// The one thing that a pod can be refused for as fast as it can connect.
		room /= 2
	}
	if q.n >= room {
		q.dropped++
		q.mu.Unlock()
		l.full.Add(1)
		return
	}
	q.records[q.n] = *r
	q.n++
	n := q.n
	q.mu.Unlock()
	switch n {
	case 1:
		signal(l.wake)
	case l.cfg.Capacity / 2:
		signal(l.urgent)
	}
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Stats counts.
func (l *Log) Stats() Stats {
	return Stats{Written: l.written.Load(), Full: l.full.Load(), Failed: l.failed.Load(), Sampled: l.sampled.Load()}
}

// Run writes what is added until ctx ends, then what is left, and closes the
// sink. Add what is to be written before ctx ends. Nothing wakes up while there
// is nothing to write.
func (l *Log) Run(ctx context.Context) {
	linger := time.NewTimer(l.cfg.Linger)
	defer linger.Stop()
	for ctx.Err() == nil {
		select {
		case <-l.wake:
		case <-ctx.Done():
			continue
		}
		linger.Reset(l.cfg.Linger)
		select {
		case <-linger.C:
		case <-l.urgent:
		case <-ctx.Done():
		}
		l.drain()
	}
	l.drain()
	if err := l.cfg.Sink.Close(); err != nil {
		l.complain("cannot close the audit's sink", err)
	}
}

// batch is how many bytes are written at once; lines are not divided.
const batch = 64 << 10

// drain writes what the queues hold.
func (l *Log) drain() {
	for i := range l.queues {
		q := &l.queues[i]
		q.mu.Lock()
		records, n, dropped := q.records, q.n, q.dropped
		q.records, q.n, q.dropped = l.spare, 0, 0
		q.mu.Unlock()
		l.spare = records
		l.lost += dropped
		l.write(records[:n])
		// What the records point to need not stay until they are overwritten.
		clear(records[:n])
	}
}

func (l *Log) write(records []Record) {
	count := 0
	for i := range records {
		r := &records[i]
		if l.cfg.Enrich != nil {
			l.cfg.Enrich(r)
		}
		told := uint64(0)
		if count == 0 {
			told = l.lost // the first of each batch, until one arrives
		}
		sampled := 0
		if r.Hit {
			sampled = l.cfg.SampleHits
		}
		l.lines = append(r.append(l.lines, told, sampled), '\n')
		count++
		if len(l.lines) >= batch {
			l.flush(count)
			count = 0
		}
	}
	if count > 0 {
		l.flush(count)
	}
}

func (l *Log) flush(count int) {
	written, err := l.cfg.Sink.Write(l.lines)
	written = min(max(written, 0), count)
	l.written.Add(uint64(written))
	failed := uint64(count - written)
	l.failed.Add(failed)
	if written > 0 {
		// The first line, which tells what had been lost, is there.
		l.lost = 0
	}
	l.lost += failed
	if err != nil {
		l.complain("cannot write audit records", err)
	}
	l.lines = l.lines[:0]
}

func (l *Log) complain(what string, err error) {
	now := l.cfg.Now()
	if !l.complains.IsZero() && now.Sub(l.complains) < l.cfg.Quiet {
		return
	}
	l.complains = now
	l.log.Error(what, "error", err, "lost", l.lost)
}
