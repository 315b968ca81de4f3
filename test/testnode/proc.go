// SPDX-License-Identifier: Apache-2.0

//go:build linux

package testnode

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// ErrProcGone means that an action's process has ended.
var ErrProcGone = errors.New("the process has ended")

// selfExe is this program's own file, also after it was rebuilt or removed.
const selfExe = "/proc/self/exe"

// exitGrace bounds how long a process may take to end by itself.
const exitGrace = 5 * time.Second

// Proc is a process in a pod that runs actions, one after the other, and keeps
// their state in between. It is this program, executed again.
type Proc struct {
	place   Place
	cmd     *Cmd
	output  *tail
	done    chan struct{} // closed once the process is reaped
	waitErr error         // set before done is closed

	mu      sync.Mutex // one call at a time
	control *net.UnixConn
}

// Spawn starts a process in the place that waits for calls. It ends with
// [Proc.Close], with its pod, with the node, or when this process dies; ctx
// bounds only its start.
func (p Place) Spawn(ctx context.Context) (*Proc, error) {
	ours, theirs, err := socketPair()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	cmd := p.Command(context.WithoutCancel(ctx), selfExe)
	cmd.Args = []string{"latchkey-testnode"}
	cmd.Env = append(cmd.Env, actionEnv+"="+roleProc)
	cmd.ExtraFiles = []*os.File{theirs}
	proc := &Proc{place: p, cmd: cmd, output: &tail{}, done: make(chan struct{}), control: ours}
	cmd.Stdout, cmd.Stderr = proc.output, proc.output
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(err, ours.Close())
	}
	go func() {
		proc.waitErr = cmd.Wait()
		close(proc.done)
	}()
	// The first answer proves that the program calls Main.
	if err := proc.Call(ctx, actionPing, nil, nil); err != nil {
		proc.Kill()
		if errors.Is(err, ErrProcGone) {
			err = fmt.Errorf("%w (%w)", err, ErrNoMain)
		}
		return nil, fmt.Errorf("starting a process in %s: %w", p.name, err)
	}
	return proc, nil
}

func socketPair() (*net.UnixConn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("making a control socket: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "control"), os.NewFile(uintptr(fds[1]), "control")
	conn, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		theirs.Close()
		return nil, nil, fmt.Errorf("making a control socket: %w", err)
	}
	return conn.(*net.UnixConn), theirs, nil // a unix socket by construction
}

// PID is the process's id.
func (p *Proc) PID() int { return p.cmd.Process.Pid }

// Output is the end of what the process has written to its standard output
// and error.
func (p *Proc) Output() string { return p.output.String() }

// Done is closed when the process has ended.
func (p *Proc) Done() <-chan struct{} { return p.done }

// Call runs an action in the process. result, if not nil, receives what the
// action returned. Errors: [*ActionError] is the action's own, [ErrProcGone]
// means that the process ended. When ctx ends during the call the process is
// killed, since it can no longer be told what to do.
func (p *Proc) Call(ctx context.Context, action string, args, result any) error {
	files, err := p.CallFiles(ctx, action, args, nil, result)
	if len(files) > 0 {
		closeAll(files)
		return fmt.Errorf("action %s replied with descriptors: use CallFiles", action)
	}
	return err
}

// CallFiles is Call with descriptors passed along in both directions
// (SCM_RIGHTS). The caller keeps files and owns what is returned.
func (p *Proc) CallFiles(ctx context.Context, action string, args any, files []*os.File, result any) ([]*os.File, error) {
	text, err := marshalArgs(args)
	if err != nil {
		return nil, fmt.Errorf("action %s: %w", action, err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	stop := context.AfterFunc(ctx, func() { p.control.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	var reply answer
	var replied []*os.File
	if err = send(p.control, command{Action: action, Args: text}, files); err == nil {
		replied, err = receive(p.control, &reply)
	}
	if err != nil {
		p.Kill()
		if ctx.Err() != nil {
			return nil, fmt.Errorf("action %s in %s: %w", action, p.place.name, ctx.Err())
		}
		return nil, fmt.Errorf("action %s in %s: %w: %w; its output: %s", action, p.place.name, ErrProcGone, err, strings.TrimSpace(p.Output()))
	}
	if reply.Error != nil {
		closeAll(replied)
		return nil, fmt.Errorf("in %s: %w", p.place.name, reply.Error)
	}
	if result != nil {
		if err := json.Unmarshal(reply.Result, result); err != nil {
			closeAll(replied)
			return nil, fmt.Errorf("action %s: decoding its result: %w", action, err)
		}
	}
	return replied, nil
}

// Kill ends the process at once and waits for it.
func (p *Proc) Kill() {
	p.control.Close()
	p.cmd.Process.Kill() // ErrProcessDone: it was faster
	<-p.done
}

// Close lets the process end by itself, and kills it if it does not within 5
// seconds. The error tells of a process that failed, with its output.
func (p *Proc) Close() error {
	select {
	case <-p.done:
		// Ended or killed before: its caller knows.
		p.control.Close()
		return nil
	default:
	}
	p.control.Close()
	timer := time.NewTimer(exitGrace)
	defer timer.Stop()
	select {
	case <-p.done:
	case <-timer.C:
		p.Kill()
		return fmt.Errorf("process %d in %s did not end within %s", p.PID(), p.place.name, exitGrace)
	}
	if p.waitErr != nil {
		return fmt.Errorf("process %d in %s: %w; its output: %s", p.PID(), p.place.name, p.waitErr, strings.TrimSpace(p.Output()))
	}
	return nil
}

// DialContext opens a TCP connection in the process and hands it over, so that
// the test holds a connection which the pod opened. Its signature is that of
// [net.Dialer.DialContext]: with it an http.Transport's requests come from the
// pod. network is tcp, tcp4 or tcp6; no names are looked up.
func (p *Proc) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	target, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, fmt.Errorf("dialing from %s: %w", p.place.name, err)
	}
	args := dialArgs{Network: network, Address: target.String()}
	if deadline, ok := ctx.Deadline(); ok {
		args.Timeout = time.Until(deadline)
	}
	files, err := p.CallFiles(ctx, actionDial, args, nil, nil)
	if err != nil {
		return nil, err
	}
	defer closeAll(files)
	if len(files) != 1 {
		return nil, fmt.Errorf("dialing from %s: %d descriptors came", p.place.name, len(files))
	}
	conn, err := net.FileConn(files[0])
	if err != nil {
		return nil, fmt.Errorf("dialing from %s: %w", p.place.name, err)
	}
	return conn, nil
}

// Socket makes an unconnected TCP socket in the process and hands it over:
// its creator is the pod. family is unix.AF_INET or unix.AF_INET6.
func (p *Proc) Socket(ctx context.Context, family int) (*os.File, error) {
	files, err := p.CallFiles(ctx, actionSocket, socketArgs{Family: family}, nil, nil)
	if err != nil {
		return nil, err
	}
	if len(files) != 1 {
		closeAll(files)
		return nil, fmt.Errorf("opening a socket in %s: %d descriptors came", p.place.name, len(files))
	}
	return files[0], nil
}

// Connect makes the process connect a socket that was made elsewhere: the
// connecting task is the pod's, the socket's creator is not. It is done when
// the connection is established. The caller keeps the file.
func (p *Proc) Connect(ctx context.Context, socket *os.File, target netip.AddrPort) error {
	_, err := p.CallFiles(ctx, actionConnect, connectArgs{Address: target}, []*os.File{socket}, nil)
	return err
}

// tailSize is how much of a process's output is kept.
const tailSize = 64 << 10

// tail is an io.Writer that keeps the last 64 KiB.
type tail struct {
	mu   sync.Mutex
	text []byte
}

var _ io.Writer = (*tail)(nil)

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.text = append(t.text, p...)
	if over := len(t.text) - tailSize; over > 0 {
		t.text = bytes.Clone(t.text[over:])
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.text)
}
