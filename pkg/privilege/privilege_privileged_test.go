// SPDX-License-Identifier: Apache-2.0

//go:build privileged

package privilege

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const childEnv = "LATCHKEY_PRIVILEGE_TEST"

// TestMain is also the child: confined, it reports what it holds, itself and a
// program that it executes.
func TestMain(m *testing.M) {
	if os.Getenv(childEnv) == "" {
		os.Exit(m.Run())
	}
	if err := Confine(Of(unix.CAP_NET_ADMIN, unix.CAP_BPF)); err != nil {
		fmt.Println("confine:", err)
		os.Exit(1)
	}
	eff, bnd, _ := Held()
	fmt.Println("confined:", eff, bnd)
	grandchild, err := exec.Command("grep", "CapEff", "/proc/self/status").Output()
	fmt.Println("child:", strings.TrimSpace(string(grandchild)), err)
	if err := Drop(Of(unix.CAP_BPF)); err != nil && !errors.Is(err, ErrCannotConfine) {
		fmt.Println("drop:", err)
	}
	done := make(chan Set)
	go func() {
		eff, _, _ := Held()
		done <- eff
	}()
	fmt.Println("dropped:", <-done)
	os.Exit(0)
}

func TestPrivilegedConfine(t *testing.T) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childEnv+"=1")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	text := string(out)
	if !strings.Contains(text, "confined: NET_ADMIN,BPF NET_ADMIN,BPF") {
		t.Errorf("the process holds something else:\n%s", text)
	}
	want := fmt.Sprintf("%016x", uint64(Of(unix.CAP_NET_ADMIN, unix.CAP_BPF)))
	if !strings.Contains(text, "child: CapEff:\t"+want) {
		t.Errorf("a child of root regained something; want %s:\n%s", want, text)
	}
	// With cgo (the race detector) Drop cannot work and says so.
	if !strings.Contains(text, "dropped: NET_ADMIN\n") && !strings.Contains(text, "dropped: NET_ADMIN,BPF\n") {
		t.Errorf("after Drop:\n%s", text)
	}
}
