// SPDX-License-Identifier: Apache-2.0

package credserver

import (
	"context"
	"sync"
	"time"
)

// waitContext is a context with a timeout that begins when somebody first
// waits on it. A request answered from memory never does, and so costs no
// timer and no allocation.
type waitContext struct {
	parent   context.Context
	patience time.Duration

	mu     sync.Mutex
	real   context.Context
	cancel context.CancelFunc
}

func (w *waitContext) begin() context.Context {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.real == nil {
		w.real, w.cancel = context.WithTimeout(w.parent, w.patience)
	}
	return w.real
}

// Deadline implements context.Context.
func (w *waitContext) Deadline() (time.Time, bool) { return w.begin().Deadline() }

// Done implements context.Context.
func (w *waitContext) Done() <-chan struct{} { return w.begin().Done() }

// Err implements context.Context. It does not begin the wait.
func (w *waitContext) Err() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.real == nil {
		return w.parent.Err()
	}
	return w.real.Err()
}

// Value implements context.Context.
func (w *waitContext) Value(key any) any { return w.parent.Value(key) }

// end releases the timer and tells whether there was one; if so the context is
// spent.
func (w *waitContext) end() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.real == nil {
		return false
	}
	w.cancel()
	return true
}
