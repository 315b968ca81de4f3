// SPDX-License-Identifier: Apache-2.0

//go:build privileged

package agent

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/pkg/agent"
	"github.com/latchkey-dev/latchkey/pkg/privilege"
	"github.com/latchkey-dev/latchkey/test/rig"
	"github.com/latchkey-dev/latchkey/test/testnode"
)

// capabilities reads a set of every thread of a process; they must agree.
func capabilities(t *testing.T, pid int, name string) privilege.Set {
	t.Helper()
	files, err := filepath.Glob("/proc/" + strconv.Itoa(pid) + "/task/*/status")
	must(t, err)
	var set privilege.Set
	seen := false
	for _, f := range files {
		data, err := os.ReadFile(f)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // the thread has ended
		}
		must(t, err)
		for line := range strings.Lines(string(data)) {
			text, ok := strings.CutPrefix(line, name+":")
			if !ok {
				continue
			}
			v, err := strconv.ParseUint(strings.TrimSpace(text), 16, 64)
			must(t, err)
			if seen && privilege.Set(v) != set {
				t.Errorf("%s of %s is %v, another thread's %v", name, f, privilege.Set(v), set)
			}
			set, seen = privilege.Set(v), true
		}
	}
	if !seen {
		t.Errorf("no %s of any thread of process %d", name, pid)
	}
	return set
}

// Started with every capability, as a privileged container is, the agent ends up
// with those of docs/privileges.md, on every thread, and neither it nor a child
// can get more.
func TestPrivilegedAgentKeepsOnlyWhatItNeeds(t *testing.T) {
	w := newWorld(t, rig.Config{})
	a := w.start(t)
	allowed := agent.Capabilities()
	running := allowed &^ privilege.Of(unix.CAP_PERFMON, unix.CAP_SYS_RESOURCE, unix.CAP_SETPCAP)
	// A build with cgo, which the race detector makes, keeps what the start alone
	// needs: there the runtime cannot reach every thread.
	if strings.Contains(a.Log(), "operation not supported") {
		t.Log("built with cgo: the capabilities of the start are kept")
		running = allowed
	}
	// What this process lacks it cannot give.
	_, given, err := privilege.Held()
	must(t, err)
	running &= given
	for _, set := range []string{"CapEff", "CapPrm", "CapBnd"} {
		if got := capabilities(t, a.PID(), set); got != running {
			t.Errorf("%s is %v, want %v", set, got, running)
		}
	}
	if inherited := capabilities(t, a.PID(), "CapInh") | capabilities(t, a.PID(), "CapAmb"); inherited != 0 {
		t.Errorf("inheritable or ambient: %v", inherited)
	}
}

// Each capability is needed for what the table says, and nothing else is: with
// exactly the table's the agent works, and without one it does what is written
// there.
func TestPrivilegedCapabilitiesOneByOne(t *testing.T) {
	table := map[string]int{
		"bpf": unix.CAP_BPF, "perfmon": unix.CAP_PERFMON, "net_admin": unix.CAP_NET_ADMIN,
		"net_bind_service": unix.CAP_NET_BIND_SERVICE, "dac_read_search": unix.CAP_DAC_READ_SEARCH,
		"sys_ptrace": unix.CAP_SYS_PTRACE,
	}
	for name, c := range map[string]struct {
		without string
		// says is in the log of an agent that refuses to start; empty: it serves.
		says string
	}{
		"all of them":              {"", ""},
		"without SYS_PTRACE":       {"sys_ptrace", ""},
		"without BPF":              {"bpf", "cannot attest"},
		"without PERFMON":          {"perfmon", "cannot attest"},
		"without NET_ADMIN":        {"net_admin", "cannot attest"},
		"without DAC_READ_SEARCH":  {"dac_read_search", "cannot attest"},
		"without NET_BIND_SERVICE": {"net_bind_service", "permission denied"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, rig.Config{})
			set := []string{"-all"}
			for capability := range table {
				if capability != c.without {
					set = append(set, "+"+capability)
				}
			}
			a, err := w.LaunchAgentUnder([]string{"setpriv", "--bounding-set", strings.Join(set, ",")}, w.Args()...)
			must(t, err)
			w.agent = a
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			if c.says == "" {
				must(t, a.WaitReady(ctx))
				p := w.newPod(t, testnode.PodConfig{})
				wantCredentials(t, askFrom(t, p.Place(), rig.Host4, p.Token), p)
				return
			}
			for !strings.Contains(a.Log(), c.says) {
				select {
				case <-ctx.Done():
					t.Fatalf("it does not say %q:\n%s", c.says, a.Log())
				case <-time.After(20 * time.Millisecond):
				}
			}
			if _, err := w.Ready(t.Context()); err == nil {
				t.Error("it is ready all the same")
			}
		})
	}
}
