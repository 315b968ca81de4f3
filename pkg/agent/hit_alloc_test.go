// SPDX-License-Identifier: Apache-2.0

//go:build !race

package agent

import (
	"testing"

	"github.com/latchkey-dev/latchkey/pkg/audit"
)

// A cached answer allocates nothing, through endpoint, verdict, cache, response,
// metrics and audit. The race detector allocates by itself, so `make test` runs
// this in a build without it (target test-allocations).
func TestHitAllocatesNothing(t *testing.T) {
	for _, a := range hitAudits {
		t.Run("audit "+a.name, func(t *testing.T) {
			var log *audit.Log
			var end func() audit.Stats
			if a.on {
				log, end = auditTo(t, a.sample)
			}
			hit := hitPath(t, log)
			for range 100 {
				hit()
			}
			const runs = 2000
			if n := testing.AllocsPerRun(runs, hit); n >= 1 {
				t.Errorf("%v allocations per cached answer, want 0", n)
			}
			if !a.on {
				return
			}
			// The first answer is no hit, and AllocsPerRun begins with one run more.
			const hits = 100 + runs + 1
			want := uint64(1)
			if a.sample > 0 {
				want += (hits + uint64(a.sample) - 1) / uint64(a.sample)
			}
			if s := end(); s.Written+s.Full != want || s.Failed != 0 || s.Written == 0 {
				t.Errorf("%+v, want %d records written or counted as lost", s, want)
			}
		})
	}
}
