// SPDX-License-Identifier: Apache-2.0

//go:build linux

package testnode

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"runtime/debug"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

// ErrNoIPv6 means that the kernel has IPv6 turned off.
var ErrNoIPv6 = errors.New("the kernel has no IPv6: boot without ipv6.disable=1")

// errGoexit reports a function that ended its goroutine instead of returning,
// as t.FailNow does.
var errGoexit = errors.New("the function left its goroutine (t.FailNow must not be called in it)")

// Netns is a network namespace held open by a file descriptor of this process.
// It has no name in /run/netns and goes when the last holder goes.
type Netns struct {
	name  string
	inode evidence.NetnsInode

	mu   sync.Mutex
	file *os.File // nil once closed
}

// newNetns makes a namespace with lo up and IPv6 ready without delays.
func newNetns(name string) (*Netns, error) {
	var file *os.File
	err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unsharing the network namespace: %w", err)
		}
		var err error
		// The thread's, not /proc/self's, which is that of the main thread.
		if file, err = os.Open("/proc/thread-self/ns/net"); err != nil {
			return fmt.Errorf("opening the new network namespace: %w", err)
		}
		// /proc/sys/net shows the namespace of the thread that opens it.
		for _, setting := range []struct{ name, value string }{
			// Some machines turn IPv6 off by default in new namespaces.
			{"all/disable_ipv6", "0"},
			{"default/disable_ipv6", "0"},
			// Duplicate address detection would keep every link-local address
			// unusable for two seconds.
			{"all/accept_dad", "0"},
			{"default/accept_dad", "0"},
			{"all/accept_ra", "0"},
			{"default/accept_ra", "0"},
		} {
			err := writeExisting("/proc/sys/net/ipv6/conf/"+setting.name, setting.value)
			if errors.Is(err, fs.ErrNotExist) {
				return ErrNoIPv6
			}
			if err != nil {
				return fmt.Errorf("setting sysctl %s: %w", setting.name, err)
			}
		}
		return nil
	})
	if err != nil {
		if file != nil {
			file.Close()
		}
		return nil, fmt.Errorf("making network namespace %s: %w", name, err)
	}
	n := &Netns{name: name, file: file}
	if err := n.setUp(); err != nil {
		n.close()
		return nil, fmt.Errorf("setting up network namespace %s: %w", name, err)
	}
	return n, nil
}

func (n *Netns) setUp() error {
	var stat unix.Stat_t
	if err := unix.Fstat(int(n.file.Fd()), &stat); err != nil {
		return fmt.Errorf("reading its inode: %w", err)
	}
	n.inode = evidence.NetnsInode(stat.Ino)
	return n.Do(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return fmt.Errorf("finding lo: %w", err)
		}
		if err := netlink.LinkSetUp(lo); err != nil {
			return fmt.Errorf("setting lo up: %w", err)
		}
		return nil
	})
}

// FD is the namespace's file descriptor, for setns(2). It is this object's:
// do not close it.
func (n *Netns) FD() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.file == nil {
		return -1
	}
	return int(n.file.Fd())
}

// Path names the namespace for other processes, as for `nsenter --net=PATH`.
// It is good as long as this process lives and the namespace is not closed.
func (n *Netns) Path() string {
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.FD())
}

// Inode is the namespace's inode number, as in /proc/PID/ns/net.
func (n *Netns) Inode() evidence.NetnsInode { return n.inode }

// Cookie is the namespace's SO_NETNS_COOKIE (Linux 5.14). Older kernels give
// an error that is ENOPROTOOPT.
func (n *Netns) Cookie() (evidence.NetnsCookie, error) {
	var cookie uint64
	err := n.Do(func() error {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("opening a socket: %w", err)
		}
		defer unix.Close(fd)
		cookie, err = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
		if err != nil {
			return fmt.Errorf("getting the netns cookie: %w", err)
		}
		return nil
	})
	return evidence.NetnsCookie(cookie), err
}

// Do runs f on a thread that is inside the namespace and returns its error. A
// socket that f opens belongs to the namespace for good, so listeners, netlink
// functions and /proc/sys/net all act inside. Goroutines which f starts run
// outside. A panic of f comes up in the caller.
func (n *Netns) Do(f func() error) error {
	n.mu.Lock()
	if n.file == nil {
		n.mu.Unlock()
		return fmt.Errorf("entering network namespace %s: %w", n.name, os.ErrClosed)
	}
	// A private descriptor: close may run meanwhile.
	fd, err := unix.FcntlInt(n.file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	n.mu.Unlock()
	if err != nil {
		return fmt.Errorf("entering network namespace %s: %w", n.name, err)
	}
	defer unix.Close(fd)
	return onThread(func() error {
		if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("entering network namespace %s: %w", n.name, err)
		}
		return f()
	})
}

func (n *Netns) close() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.file == nil {
		return nil
	}
	err := n.file.Close()
	n.file = nil
	return err
}

// onThread runs f on an OS thread of its own, which f may put into another
// network namespace. Afterwards the thread is put back; if that fails it ends
// instead of carrying other goroutines into the wrong network.
func onThread(f func() error) error {
	type outcome struct {
		err      error
		panicked any
		stack    []byte
	}
	done := make(chan outcome, 1)
	go func() {
		out := outcome{err: errGoexit}
		defer func() { done <- out }()
		runtime.LockOSThread()
		origin, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			runtime.UnlockOSThread()
			out.err = fmt.Errorf("opening this thread's network namespace: %w", err)
			return
		}
		defer func() {
			if err := unix.Setns(int(origin.Fd()), unix.CLONE_NEWNET); err == nil {
				runtime.UnlockOSThread()
			}
			origin.Close()
		}()
		defer func() {
			if p := recover(); p != nil {
				out.panicked, out.stack = p, debug.Stack()
			}
		}()
		out.err = f()
	}()
	out := <-done
	if out.panicked != nil {
		panic(fmt.Sprintf("%v\n\nraised in a network namespace:\n%s", out.panicked, out.stack))
	}
	return out.err
}
