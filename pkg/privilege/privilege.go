// SPDX-License-Identifier: Apache-2.0

// Package privilege lets a process keep only the capabilities it needs, though
// it was started with more, as a privileged container is.
//
// For a process of root it is the bounding set that counts (capabilities(7)):
// whatever it holds, root regains at the next exec. So Confine takes away from
// the bounding set and executes the program again; after that no thread, and no
// child, has more. Drop then takes away at run time what was needed only for
// the start, and from the bounding set too.
package privilege

import (
	"errors"
	"fmt"
	"math/bits"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Set is a set of capabilities, one bit each, as in /proc/PID/status.
type Set uint64

// Of makes a set of capability numbers (unix.CAP_…).
func Of(caps ...int) Set {
	var s Set
	for _, c := range caps {
		s |= 1 << c
	}
	return s
}

// names of those that this program has to do with; others print as numbers.
var names = map[int]string{
	unix.CAP_DAC_READ_SEARCH: "DAC_READ_SEARCH", unix.CAP_NET_BIND_SERVICE: "NET_BIND_SERVICE", unix.CAP_NET_ADMIN: "NET_ADMIN",
	unix.CAP_SYS_PTRACE: "SYS_PTRACE", unix.CAP_SYS_ADMIN: "SYS_ADMIN", unix.CAP_SYS_RESOURCE: "SYS_RESOURCE",
	unix.CAP_PERFMON: "PERFMON", unix.CAP_BPF: "BPF", unix.CAP_SETPCAP: "SETPCAP",
}

// String lists the capabilities without their prefix.
func (s Set) String() string {
	if s == 0 {
		return "none"
	}
	var out []string
	for r := s; r != 0; r &= r - 1 {
		c := bits.TrailingZeros64(uint64(r))
		name, ok := names[c]
		if !ok {
			name = strconv.Itoa(c)
		}
		out = append(out, name)
	}
	return strings.Join(out, ",")
}

// ErrCannotConfine: the process may not take from its bounding set (that needs
// CAP_SETPCAP), or the kernel refused. The process goes on as it was.
var ErrCannotConfine = errors.New("capabilities cannot be given up")

// Held returns the process's effective and bounding sets.
func Held() (effective, bounding Set, err error) {
	// Of this thread; the runtime's threads are alike unless a program makes
	// them differ, which this one does not.
	data, err := os.ReadFile("/proc/thread-self/status")
	if err != nil {
		return 0, 0, fmt.Errorf("read the capabilities: %w", err)
	}
	return parseStatus(string(data))
}

func parseStatus(status string) (effective, bounding Set, err error) {
	found := 0
	for line := range strings.Lines(status) {
		for prefix, set := range map[string]*Set{"CapEff:": &effective, "CapBnd:": &bounding} {
			text, ok := strings.CutPrefix(line, prefix)
			if !ok {
				continue
			}
			v, err := strconv.ParseUint(strings.TrimSpace(text), 16, 64)
			if err != nil {
				return 0, 0, fmt.Errorf("read the capabilities: %w", err)
			}
			*set = Set(v)
			found++
		}
	}
	if found != 2 {
		return 0, 0, errors.New("read the capabilities: /proc/thread-self/status has no CapEff and CapBnd")
	}
	return effective, bounding, nil
}

// Confine makes this process one that can never have a capability outside keep.
// If it could, Confine executes the program again, with the same arguments and
// environment, and does not return. It returns nil if there is nothing to give
// up, and an error that wraps ErrCannotConfine if it may not.
//
// Call it first thing: what the process has in memory is lost.
func Confine(keep Set) error {
	effective, bounding, err := Held()
	if err != nil {
		return err
	}
	if bounding&^keep == 0 {
		return nil
	}
	if effective&Of(unix.CAP_SETPCAP) == 0 {
		return fmt.Errorf("%w: no CAP_SETPCAP", ErrCannotConfine)
	}
	// The calls below concern one thread; exec makes it the only one.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for r := bounding &^ keep; r != 0; r &= r - 1 {
		c := bits.TrailingZeros64(uint64(r))
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0); err != nil {
			return fmt.Errorf("%w: %s: %w", ErrCannotConfine, Of(c), err)
		}
	}
	// Inheritable and ambient ones would survive the exec of a program that is
	// not root's.
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("%w: ambient: %w", ErrCannotConfine, err)
	}
	if err := capset(effective & keep); err != nil {
		return fmt.Errorf("%w: %w", ErrCannotConfine, err)
	}
	err = syscall.Exec("/proc/self/exe", os.Args, os.Environ())
	return fmt.Errorf("%w: execute again: %w", ErrCannotConfine, err)
}

// capset sets this thread's effective and permitted sets, and empties the
// inheritable one.
func capset(s Set) error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	data := capData(s)
	return unix.Capset(&header, &data[0])
}

func capData(s Set) [2]unix.CapUserData {
	return [2]unix.CapUserData{
		{Effective: uint32(s), Permitted: uint32(s)},
		{Effective: uint32(s >> 32), Permitted: uint32(s >> 32)},
	}
}

// Drop gives up capabilities on every thread of the process, for good: also in
// the bounding set, so that no program that it executes regains them. That part
// needs CAP_SETPCAP, which drop itself may name; without it the rest is done and
// the error wraps ErrCannotConfine. In a program built with cgo it does nothing
// and returns such an error too: the Go runtime cannot reach threads that C made.
func Drop(drop Set) error {
	effective, bounding, err := Held()
	if err != nil {
		return err
	}
	var boundErr error
	if bounding&drop != 0 && effective&Of(unix.CAP_SETPCAP) == 0 {
		boundErr = fmt.Errorf("%w: bounding set: no CAP_SETPCAP", ErrCannotConfine)
	} else {
		for r := bounding & drop; r != 0; r &= r - 1 {
			c := bits.TrailingZeros64(uint64(r))
			if _, _, errno := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0, 0); errno != 0 {
				boundErr = fmt.Errorf("%w: bounding set: %s: %w", ErrCannotConfine, Of(c), errno)
				break
			}
		}
	}
	if effective&drop == 0 {
		return boundErr
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	data := capData(effective &^ drop)
	_, _, errno := syscall.AllThreadsSyscall(unix.SYS_CAPSET,
		uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&data[0])), 0)
	runtime.KeepAlive(&data)
	if errno != 0 {
		return fmt.Errorf("%w: %w", ErrCannotConfine, errno)
	}
	return boundErr
}
