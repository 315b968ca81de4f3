// SPDX-License-Identifier: Apache-2.0

//go:build privileged

package privilege

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

const childEnv = "LATCHKEY_PRIVILEGE_TEST"

// TestMain is also the child: confined, it reports what it holds, itself and a
// program that it executes, before and after Drop.
func TestMain(m *testing.M) {
	kind := os.Getenv(childEnv)
	if kind == "" {
		os.Exit(m.Run())
	}
	keep, drop := Of(unix.CAP_NET_ADMIN, unix.CAP_BPF), Of(unix.CAP_BPF)
	if kind == withSetpcap {
		keep, drop = keep|Of(unix.CAP_SETPCAP), drop|Of(unix.CAP_SETPCAP)
	}
	if err := Confine(keep); err != nil {
		fmt.Println("confine:", err)
		os.Exit(1)
	}
	report("confined")
	// With cgo (the race detector) Drop cannot work and says so.
	err := Drop(drop)
	fmt.Printf("drop: cannot %t, cgo %t, %v\n", errors.Is(err, ErrCannotConfine), errors.Is(err, syscall.ENOTSUP), err)
	report("dropped")
	os.Exit(0)
}

const withSetpcap = "SETPCAP"

// report tells the sets of every thread, in one line if they agree, and a
// child's.
func report(when string) {
	// More threads than one, made before and after.
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			_, _, _ = Held()
		})
	}
	wg.Wait()
	files, _ := filepath.Glob("/proc/self/task/*/status")
	seen := map[string]bool{}
	for _, f := range files {
		data, err := os.ReadFile(f)
		if errors.Is(err, syscall.ESRCH) || errors.Is(err, os.ErrNotExist) {
			continue // a thread that has ended
		}
		eff, bnd, err := parseStatus(string(data))
		seen[fmt.Sprint(when, ": ", eff, " ", bnd, " ", err)] = true
	}
	for line := range seen {
		fmt.Println(line)
	}
	child, err := exec.Command("cat", "/proc/self/status").Output()
	eff, bnd, parseErr := parseStatus(string(child))
	fmt.Println(when, "child:", eff, bnd, err, parseErr)
}

func TestPrivilegedConfineAndDrop(t *testing.T) {
	for name, c := range map[string]struct {
		kind  string
		lines []string
	}{
		"for good": {withSetpcap, []string{
			"confined: SETPCAP,NET_ADMIN,BPF SETPCAP,NET_ADMIN,BPF <nil>",
			"confined child: SETPCAP,NET_ADMIN,BPF SETPCAP,NET_ADMIN,BPF <nil> <nil>",
			"drop: cannot false, cgo false, <nil>",
			"dropped: NET_ADMIN NET_ADMIN <nil>",
			"dropped child: NET_ADMIN NET_ADMIN <nil> <nil>",
		}},
		// The child shows why the bounding set matters.
		"without SETPCAP until an exec": {"none", []string{
			"confined: NET_ADMIN,BPF NET_ADMIN,BPF <nil>",
			"confined child: NET_ADMIN,BPF NET_ADMIN,BPF <nil> <nil>",
			"drop: cannot true, cgo false, capabilities cannot be given up: bounding set: no CAP_SETPCAP",
			"dropped: NET_ADMIN NET_ADMIN,BPF <nil>",
			"dropped child: NET_ADMIN,BPF NET_ADMIN,BPF <nil> <nil>",
		}},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := exec.Command("/proc/self/exe")
			cmd.Env = append(os.Environ(), childEnv+"="+c.kind)
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			want := c.lines
			if bytes.Contains(out, []byte("cgo true")) {
				want = want[:2]
			} else if got := bytes.Count(out, []byte("\n")); got != len(want) {
				t.Errorf("%d lines, want %d: threads differ", got, len(want))
			}
			for _, line := range want {
				if !bytes.Contains(out, []byte(line+"\n")) {
					t.Errorf("nothing says %q:\n%s", line, out)
				}
			}
		})
	}
}
