// SPDX-License-Identifier: Apache-2.0

//go:build !race

package agent

import "testing"

// A cached answer allocates nothing, through endpoint, verdict, cache, response
// and metrics. The race detector allocates by itself, so `make test` runs this
// in a build without it (target test-allocations).
func TestHitAllocatesNothing(t *testing.T) {
	hit := hitPath(t)
	for range 100 {
		hit()
	}
	if n := testing.AllocsPerRun(2000, hit); n >= 1 {
		t.Errorf("%v allocations per cached answer, want 0", n)
	}
}
