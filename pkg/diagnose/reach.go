// SPDX-License-Identifier: Apache-2.0

package diagnose

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/pkg/explain"
)

// reachTimeout bounds one connection and its answer.
const reachTimeout = 2 * time.Second

// ErrNotPermitted: this process may not enter the network namespace. The
// agent's container may not, as it lacks CAP_SYS_ADMIN.
var ErrNotPermitted = errors.New("entering a pod's network namespace takes CAP_SYS_ADMIN")

// answer is what the child writes.
type answer struct {
	Reached []explain.Reach `json:"reached"`
	// Denied is set if the child may not enter the namespace.
	Denied bool `json:"denied,omitempty"`
}

// Child makes the processes that enter a pod's network namespace. They are this
// program executed again, do one thing, and end: whoever asks never enters
// anything itself.
type Child struct {
	// Command is the program and the arguments before the namespace and the
	// addresses; it must end in ReachFrom.
	Command []string
}

// Reach connects to each address, "ip:port", from the network namespace of a
// file such as /proc/PID/ns/net, and asks for "/" there, which is nobody's path:
// an agent answers 404. cgroupDir, if not empty, is the cgroup in which the
// child is made. The error is ErrNotPermitted if this process may not do that.
func (c Child) Reach(ctx context.Context, netns, cgroupDir string, addresses ...string) ([]explain.Reach, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(len(addresses)+1)*reachTimeout+3*time.Second)
	defer cancel()
	args := append(append([]string(nil), c.Command[1:]...), netns)
	cmd := exec.CommandContext(ctx, c.Command[0], append(args, addresses...)...)
	// Nothing of the caller's: a proxy in the environment is not for this.
	cmd.Env = []string{"GORACE=atexit_sleep_ms=0"}
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if cgroupDir != "" {
		dir, err := os.Open(cgroupDir)
		if err != nil {
			return nil, fmt.Errorf("enter the pod's cgroup: %w", err)
		}
		defer dir.Close()
		cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	}
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("try a connection from %s: %w: %s", netns, err, strings.TrimSpace(errs.String()))
	}
	var a answer
	if err := json.Unmarshal(out.Bytes(), &a); err != nil {
		return nil, fmt.Errorf("try a connection from %s: %w", netns, err)
	}
	if a.Denied {
		return nil, ErrNotPermitted
	}
	return a.Reached, nil
}

// ReachFrom is the child's part: it enters the namespace for good, tries the
// addresses one after the other, and writes what it found as JSON.
func ReachFrom(ctx context.Context, w io.Writer, netns string, addresses []string) error {
	// Never unlocked: the thread ends with the goroutine, and the process soon.
	runtime.LockOSThread()
	fd, err := unix.Open(netns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open the network namespace %s: %w", netns, err)
	}
	// To stay where it is needs no privilege.
	if !isOwnNetns(fd) {
		err = unix.Setns(fd, unix.CLONE_NEWNET)
	}
	_ = unix.Close(fd)
	if errors.Is(err, unix.EPERM) {
		return json.NewEncoder(w).Encode(answer{Denied: true})
	}
	if err != nil {
		return fmt.Errorf("enter the network namespace %s: %w", netns, err)
	}
	out := make([]explain.Reach, 0, len(addresses))
	for _, a := range addresses {
		out = append(out, reach(ctx, a))
	}
	return json.NewEncoder(w).Encode(answer{Reached: out})
}

// isOwnNetns tells whether an open network namespace is this thread's.
func isOwnNetns(fd int) bool {
	var it, own unix.Stat_t
	return unix.Fstat(fd, &it) == nil && unix.Stat("/proc/thread-self/ns/net", &own) == nil && it.Dev == own.Dev && it.Ino == own.Ino
}

// reach runs on the calling thread alone: an address in numbers is dialed by
// the goroutine that asks.
func reach(ctx context.Context, address string) explain.Reach {
	r := explain.Reach{Address: address}
	ctx, cancel := context.WithTimeout(ctx, reachTimeout)
	defer cancel()
	d := net.Dialer{FallbackDelay: -1}
	d.SetMultipathTCP(false)
	c, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		r.Error = reachError(err)
		return r
	}
	defer c.Close()
	r.Local = c.LocalAddr().String()
	_ = c.SetDeadline(time.Now().Add(reachTimeout))
	host, _, _ := net.SplitHostPort(address)
	if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	if _, err := fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: %s\r\nUser-Agent: latchkey\r\nConnection: close\r\n\r\n", host); err != nil {
		r.Error = reachError(err)
		return r
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		r.Error = "connected, and no HTTP answer came: " + reachError(err)
		return r
	}
	resp.Body.Close()
	r.Status = resp.StatusCode
	return r
}

// reachError words what a connection failed with.
func reachError(err error) string {
	var errno syscall.Errno
	var timeout net.Error
	switch {
	case errors.As(err, &timeout) && timeout.Timeout():
		return "no answer within " + reachTimeout.String()
	case errors.As(err, &errno):
		return errno.Error()
	}
	return err.Error()
}
