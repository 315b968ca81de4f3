// SPDX-License-Identifier: Apache-2.0

//go:build linux && privileged

package cli

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/test/rig"
)

// A node of 10,000 pods, which no node has: the whole of `latchkey pods`, from
// the start of the program to its end.
func BenchmarkPrivilegedPodsOf10000(b *testing.B) {
	const pods = 10000
	r, err := rig.New(b.Context(), rig.Config{AgentBinary: agentProgram})
	must(b, err)
	defer func() {
		if err := r.Close(); err != nil {
			b.Error(err)
		}
	}()
	for i := range pods {
		must(b, os.Mkdir(filepath.Join(r.Node.KubepodsRoot(), "burstable", fmt.Sprintf("pod%08x-0000-4000-8000-000000000000", i)), 0o755))
	}
	ctx, cancel := context.WithTimeout(b.Context(), 2*time.Minute)
	defer cancel()
	a, err := r.StartAgent(ctx, "--containerd-socket", "off")
	must(b, err)
	defer a.Kill()
	for _, format := range []string{"table", "wide", "json", "yaml"} {
		b.Run(format, func(b *testing.B) {
			for b.Loop() {
				out, err := r.Node.HostPlace().Exec(ctx, cliProgram, "--admin-socket", r.Socket(), "pods", "-o", format)
				must(b, err)
				if n := strings.Count(string(out), "-0000-4000-8000-000000000000"); n < pods {
					b.Fatalf("%d pods are shown", n)
				}
			}
		})
	}
}
