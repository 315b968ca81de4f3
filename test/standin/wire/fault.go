// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"context"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"
)

// Faults are the faults of a service, of its own type F, in the order in which
// calls take them. The zero value has none.
type Faults[F any] struct {
	mu     sync.Mutex
	queued []queued[F]
}

type queued[F any] struct {
	fault F
	left  int // negative: for ever
}

// Add puts a fault behind those there are, for so many calls; 0 means all, until
// Clear.
func (q *Faults[F]) Add(f F, times int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if times == 0 {
		times = -1
	}
	q.queued = append(q.queued, queued[F]{f, times})
}

// Clear forgets all faults.
func (q *Faults[F]) Clear() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.queued = nil
}

// Next takes the first fault that is not used up and is for this call; without
// one it gives F's zero value.
func (q *Faults[F]) Next(isFor func(F) bool) F {
	q.mu.Lock()
	defer q.mu.Unlock()
	for i := range q.queued {
		f := &q.queued[i]
		if f.left == 0 || !isFor(f.fault) {
			continue
		}
		if f.left > 0 {
			f.left--
		}
		return f.fault
	}
	var none F
	return none
}

// Wait holds a call back for a time, and then until hold is closed if it is not
// nil; false if the caller left meanwhile.
func Wait(ctx context.Context, delay time.Duration, hold <-chan struct{}) bool {
	if delay > 0 {
		t := time.NewTimer(delay)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
			return false
		}
	}
	if hold != nil {
		select {
		case <-hold:
		case <-ctx.Done():
			return false
		}
	}
	return true
}

// Reset ends the connection with a TCP RST where it can.
func Reset(w http.ResponseWriter) {
	hijacker, ok := w.(http.Hijacker)
	if !ok {
		panic(http.ErrAbortHandler)
	}
	conn, _, err := hijacker.Hijack()
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	_ = conn.Close()
}

// Truncate answers 200 and half of a body, whose length it promises, and ends
// the connection and the handler.
func Truncate(w http.ResponseWriter, body []byte) {
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(http.StatusOK)
	_, _ = w.Write(body[:len(body)/2])
	// Or a short answer would end before its first byte.
	_ = http.NewResponseController(w).Flush()
	panic(http.ErrAbortHandler)
}
