// SPDX-License-Identifier: Apache-2.0

//go:build linux && privileged

package attacks

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/test/rig"
	"github.com/latchkey-dev/latchkey/test/testnode"
)

// capabilities are a set, by number.
type capabilities uint64

const (
	capNetAdmin = unix.CAP_NET_ADMIN
	capSysAdmin = unix.CAP_SYS_ADMIN
)

// containerCaps are what the common runtimes leave to a container's root.
const containerCaps capabilities = 1<<unix.CAP_CHOWN | 1<<unix.CAP_DAC_OVERRIDE | 1<<unix.CAP_FOWNER | 1<<unix.CAP_FSETID |
	1<<unix.CAP_KILL | 1<<unix.CAP_SETGID | 1<<unix.CAP_SETUID | 1<<unix.CAP_SETPCAP | 1<<unix.CAP_NET_BIND_SERVICE |
	1<<unix.CAP_NET_RAW | 1<<unix.CAP_SYS_CHROOT | 1<<unix.CAP_MKNOD | 1<<unix.CAP_AUDIT_WRITE | 1<<unix.CAP_SETFCAP

// envelope is what every program of this package is called with.
type envelope struct {
	// Caps is all that root keeps; 0: it is not root.
	Caps capabilities
	Args json.RawMessage
}

// program makes an action of a function. The function runs on a thread of its
// own that has no more than the envelope's capabilities, and whose system calls
// no signal interrupts.
func program[A any](f func(s *testnode.Session, args A) (any, error)) testnode.Action {
	return func(s *testnode.Session, raw json.RawMessage) (any, error) {
		var e envelope
		if err := json.Unmarshal(raw, &e); err != nil {
			return nil, err
		}
		var args A
		if err := json.Unmarshal(e.Args, &args); err != nil {
			return nil, err
		}
		var result any
		var err error
		done := make(chan struct{})
		go func() {
			defer close(done)
			// Never unlocked: the thread ends with the goroutine.
			runtime.LockOSThread()
			if err = undisturbed(); err != nil {
				return
			}
			if err = confine(e.Caps); err == nil {
				result, err = f(s, args)
			}
		}()
		<-done
		return result, err
	}
}

// undisturbed keeps the signal from the calling thread with which the runtime
// preempts a goroutine that has run for 10 ms, as on a slow machine most do. It
// would end a connect, a poll or a sendto that waits.
func undisturbed() error {
	var set unix.Sigset_t
	for _, s := range []syscall.Signal{unix.SIGURG, unix.SIGCHLD} {
		set.Val[0] |= 1 << (s - 1)
	}
	return os.NewSyscallError("sigprocmask", unix.PthreadSigmask(unix.SIG_BLOCK, &set, nil))
}

// confine takes from the calling thread, if it is root's, all capabilities but
// these; also from programs that it starts.
func confine(keep capabilities) error {
	if os.Geteuid() != 0 {
		return nil
	}
	for c := uintptr(0); c <= unix.CAP_LAST_CAP; c++ {
		if keep&(1<<c) == 0 {
			// EINVAL: this kernel has fewer.
			if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil && !errors.Is(err, unix.EINVAL) {
				return fmt.Errorf("dropping capability %d: %w", c, err)
			}
		}
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	low, high := uint32(keep), uint32(keep>>32)
	data := [2]unix.CapUserData{{Effective: low, Permitted: low}, {Effective: high, Permitted: high}}
	if err := unix.Capset(&header, &data[0]); err != nil {
		return fmt.Errorf("setting capabilities: %w", err)
	}
	return nil
}

func programs() testnode.Actions {
	return testnode.Actions{
		"ask":           program(ask),
		"begin":         program(begin),
		"finish":        program(finish),
		"own socket":    program(ownSocket),
		"take socket":   program(takeSocket),
		"over passed":   program(overPassed),
		"join cgroup":   program(joinCgroup),
		"thread":        program(threaded),
		"clone into":    program(cloneInto),
		"exec after":    program(execAfter),
		"repair":        program(repair),
		"bind":          program(bindListener),
		"new netns":     program(newNetns),
		"uring":         program(askByUring),
		"hold":          program(hold),
		"hand-made":     program(handMade),
		"intercept":     program(intercept),
		"intercepted":   program(intercepted),
		"give back":     program(giveBack),
		"sniff":         program(sniff),
		"sniffed":       program(sniffed),
		"flood":         program(flood),
		"use up":        program(useUp),
		"claim":         program(claim),
		"own namespace": program(ownListener),
	}
}

// askOptions says how to connect. The zero value is how everybody does.
type askOptions struct {
	To    netip.AddrPort
	Token string
	// Mapped: an IPv6 socket to a v4-mapped address.
	Mapped bool
	// Protocol is IPPROTO_TCP if 0.
	Protocol int
	// Bind is where the socket is bound first, if valid.
	Bind netip.AddrPort
	// BindLate asks for the port at connect (IP_BIND_ADDRESS_NO_PORT).
	BindLate bool
	// Device for SO_BINDTODEVICE.
	Device string
	// Transparent allows to bind an address that is not the host's.
	Transparent bool
	// FastOpen sends the request in the SYN: "connect" by
	// TCP_FASTOPEN_CONNECT, "sendto" by MSG_FASTOPEN.
	FastOpen string
	// Again: connect, disconnect, and connect once more.
	Again bool
	// Patience bounds connecting; 0: as long as anything that must come.
	Patience time.Duration
}

func sockaddr(a netip.AddrPort, v6 bool) unix.Sockaddr {
	if v6 || a.Addr().Is6() {
		return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
}

// request is what an SDK sends.
func request(to netip.AddrPort, token string) []byte {
	host := to.Addr().String()
	if to.Addr().Is6() {
		host = "[" + host + "]"
	}
	return []byte("GET " + rig.Path + " HTTP/1.1\r\nHost: " + host + "\r\nAuthorization: " + token + "\r\n\r\n")
}

// response reads one answer.
func response(r io.Reader) (catch, error) {
	resp, err := http.ReadResponse(bufio.NewReader(r), nil)
	if err != nil {
		return catch{}, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return catch{Status: resp.StatusCode, Body: string(body), Closed: resp.Close}, err
}

// fdIO reads and writes a blocking descriptor.
type fdIO int

func (f fdIO) Read(p []byte) (int, error) {
	for {
		n, err := unix.Read(int(f), p)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if errors.Is(err, unix.EAGAIN) {
			// Another process that holds the socket may have made it non-blocking.
			poll := []unix.PollFd{{Fd: int32(f), Events: unix.POLLIN}}
			if ready, _ := unix.Poll(poll, int(patience.Milliseconds())); ready > 0 {
				continue
			}
			return 0, unix.ETIMEDOUT
		}
		if err == nil && n == 0 && len(p) > 0 {
			return 0, io.EOF
		}
		return max(n, 0), err
	}
}

func (f fdIO) Write(p []byte) (int, error) {
	for {
		n, err := unix.Write(int(f), p)
		if !errors.Is(err, unix.EINTR) {
			return max(n, 0), err
		}
	}
}

// connect goes on when a signal interrupts it. The second call waits for the
// first one's handshake.
func connect(fd int, to unix.Sockaddr) error {
	for {
		if err := unix.Connect(fd, to); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// netError turns what the network said into a catch; other errors stay.
func netError(err error) (any, error) {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return catch{Errno: errno}, nil
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return catch{Errno: unix.ECONNRESET}, nil
	}
	return nil, err
}

func timeouts(fd int, d time.Duration) error {
	tv := unix.NsecToTimeval(int64(d))
	// A blocking connect that takes longer gives EINPROGRESS.
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv); err != nil {
		return err
	}
	return unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)
}

func openSocket(o askOptions) (int, error) {
	family := unix.AF_INET
	if o.To.Addr().Is6() || o.Mapped {
		family = unix.AF_INET6
	}
	if o.Protocol == 0 {
		o.Protocol = unix.IPPROTO_TCP
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, o.Protocol)
	if err != nil {
		return -1, fmt.Errorf("socket: %w", err)
	}
	err = func() error {
		if o.Patience == 0 {
			o.Patience = patience
		}
		if err := timeouts(fd, o.Patience); err != nil {
			return err
		}
		for _, opt := range []struct {
			on                  bool
			level, name, number int
		}{
			{true, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1},
			{o.Transparent, unix.SOL_IP, unix.IP_TRANSPARENT, 1},
			{o.BindLate, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1},
			{o.FastOpen == "connect", unix.SOL_TCP, unix.TCP_FASTOPEN_CONNECT, 1},
		} {
			if !opt.on {
				continue
			}
			if err := unix.SetsockoptInt(fd, opt.level, opt.name, opt.number); err != nil {
				return os.NewSyscallError(fmt.Sprintf("setsockopt %d", opt.name), err)
			}
		}
		if o.Device != "" {
			if err := unix.SetsockoptString(fd, unix.SOL_SOCKET, unix.SO_BINDTODEVICE, o.Device); err != nil {
				return os.NewSyscallError("SO_BINDTODEVICE", err)
			}
		}
		if o.Bind.IsValid() {
			if err := unix.Bind(fd, sockaddr(o.Bind, family == unix.AF_INET6)); err != nil {
				return os.NewSyscallError("bind", err)
			}
		}
		return nil
	}()
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// ask connects and asks.
func ask(_ *testnode.Session, o askOptions) (any, error) {
	fd, err := openSocket(o)
	if err != nil {
		return netError(err)
	}
	defer unix.Close(fd)
	to := sockaddr(o.To, o.Mapped)
	if o.Again {
		if err := connect(fd, to); err != nil {
			return netError(err)
		}
		if err := disconnect(fd); err != nil {
			return nil, err
		}
	}
	req := request(o.To, o.Token)
	if o.FastOpen == "sendto" {
		if err := unix.Sendto(fd, req, unix.MSG_FASTOPEN, to); err != nil {
			return netError(err)
		}
	} else {
		if err := connect(fd, to); err != nil {
			return netError(err)
		}
		if _, err := fdIO(fd).Write(req); err != nil {
			return netError(err)
		}
	}
	c, err := response(fdIO(fd))
	if err != nil {
		return netError(err)
	}
	c.LocalPort = localPort(fd)
	if info, err := unix.GetsockoptTCPInfo(fd, unix.SOL_TCP, unix.TCP_INFO); err == nil {
		const synData = 32 // TCPI_OPT_SYN_DATA
		c.SynData = info.Options&synData != 0
	}
	return c, nil
}

// disconnect is connect to AF_UNSPEC.
func disconnect(fd int) error {
	var addr [16]byte
	_, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&addr[0])), uintptr(len(addr)))
	if errno != 0 {
		return os.NewSyscallError("disconnect", errno)
	}
	return nil
}

func localPort(fd int) uint16 {
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return 0
	}
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return uint16(sa.Port)
	case *unix.SockaddrInet6:
		return uint16(sa.Port)
	}
	return 0
}

// handshakePatience is how long a handshake may take that was begun in vain: its
// SYN comes again after 1, 3, 7, 15, 31 and 63 s.
const handshakePatience = 70 * time.Second

// begin opens a handshake and does not wait for it. It gives the local port.
func begin(s *testnode.Session, o askOptions) (any, error) {
	o.Patience = handshakePatience
	fd, err := openSocket(o)
	if err != nil {
		return nil, err
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, err
	}
	if err := connect(fd, sockaddr(o.To, o.Mapped)); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		return nil, os.NewSyscallError("connect", err)
	}
	s.Values["begun"] = fd
	return localPort(fd), nil
}

// finish waits for that handshake and asks over it.
func finish(s *testnode.Session, o askOptions) (any, error) {
	fd, ok := s.Values["begun"].(int)
	if !ok {
		return nil, errors.New("nothing was begun")
	}
	defer unix.Close(fd)
	poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
	for {
		n, err := unix.Poll(poll, int(handshakePatience.Milliseconds()))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			return catch{Errno: unix.ETIMEDOUT}, err
		}
		break
	}
	if errno, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR); err != nil || errno != 0 {
		return catch{Errno: syscall.Errno(errno)}, err
	}
	if err := unix.SetNonblock(fd, false); err != nil {
		return nil, err
	}
	return askOver(fd, o.Token)
}

func askOver(fd int, token string) (any, error) {
	if err := timeouts(fd, patience); err != nil {
		return nil, err
	}
	if _, err := fdIO(fd).Write(request(agent4, token)); err != nil {
		return netError(err)
	}
	c, err := response(fdIO(fd))
	if err != nil {
		return netError(err)
	}
	return c, nil
}

// ownSocket makes a socket, connected or not, and tells its number.
func ownSocket(_ *testnode.Session, connected bool) (any, error) {
	fd, err := openSocket(askOptions{To: agent4})
	if err == nil && connected {
		err = connect(fd, sockaddr(agent4, false))
	}
	return fd, err
}

type takeArgs struct {
	PID, FD int
	// Connect: the thief connects what it took.
	Connect bool
	Token   string
}

// takeSocket takes a descriptor out of another process by pidfd_getfd(2).
func takeSocket(_ *testnode.Session, o takeArgs) (any, error) {
	pidfd, err := unix.PidfdOpen(o.PID, 0)
	if err != nil {
		return nil, os.NewSyscallError("pidfd_open", err)
	}
	defer unix.Close(pidfd)
	fd, err := unix.PidfdGetfd(pidfd, o.FD, 0)
	if err != nil {
		return nil, os.NewSyscallError("pidfd_getfd", err)
	}
	defer unix.Close(fd)
	if o.Connect {
		if err := connect(fd, sockaddr(agent4, false)); err != nil {
			return nil, os.NewSyscallError("connect", err)
		}
	}
	return askOver(fd, o.Token)
}

// overPassed asks over a connection that came with the call.
func overPassed(s *testnode.Session, token string) (any, error) {
	if len(s.Files()) != 1 {
		return nil, fmt.Errorf("%d descriptors came", len(s.Files()))
	}
	file := s.Files()[0]
	defer file.Close()
	fd := int(file.Fd()) // blocking from here on
	return askOver(fd, token)
}

// joinCgroup moves the whole process.
func joinCgroup(_ *testnode.Session, dir string) (any, error) {
	return nil, os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0)
}

type threadedArgs struct {
	Dir string
	Ask askOptions
}

// threaded makes a threaded cgroup and asks from a thread in it.
func threaded(s *testnode.Session, o threadedArgs) (any, error) {
	if err := os.MkdirAll(o.Dir, 0o755); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(o.Dir, "cgroup.type"), []byte("threaded"), 0); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(o.Dir, "cgroup.threads"), []byte(strconv.Itoa(unix.Gettid())), 0); err != nil {
		return nil, err
	}
	own, err := os.ReadFile("/proc/thread-self/cgroup")
	if err != nil {
		return nil, err
	}
	if !strings.Contains(string(own), filepath.Base(o.Dir)) {
		return nil, fmt.Errorf("the thread is in %s", own)
	}
	return ask(s, o.Ask)
}

// inheritedToken makes this program, started again, ask once; inheritedSocket
// is the descriptor to ask over, 0: it connects itself.
const (
	inheritedToken  = "LATCHKEY_ATTACKS_TOKEN"
	inheritedSocket = "LATCHKEY_ATTACKS_SOCKET"
)

// askOverInheritedSocket is the whole program, if it was started for that.
func askOverInheritedSocket() bool {
	token, ok := os.LookupEnv(inheritedToken)
	if !ok {
		return false
	}
	var result any
	var err error
	if fd, _ := strconv.Atoi(os.Getenv(inheritedSocket)); fd > 0 {
		result, err = askOver(fd, token)
	} else {
		result, err = ask(nil, askOptions{To: agent4, Token: token})
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	json.NewEncoder(os.Stdout).Encode(result)
	return true
}

// again starts this program once more, to ask.
func again(token string, change func(*exec.Cmd)) (any, error) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), inheritedToken+"="+token)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	change(cmd)
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%w %s", err, errs.Bytes())
	}
	var c catch
	err = json.Unmarshal(out, &c)
	return c, err
}

type cloneArgs struct {
	Dir, Token string
	Make       bool
}

// cloneInto starts a process that is in the cgroup from its first instruction.
func cloneInto(_ *testnode.Session, o cloneArgs) (any, error) {
	if o.Make {
		if err := os.MkdirAll(o.Dir, 0o755); err != nil {
			return nil, err
		}
	}
	dir, err := os.Open(o.Dir)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	return again(o.Token, func(cmd *exec.Cmd) {
		cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	})
}

// execAfter connects and lets another program, of another user if it may, ask.
func execAfter(_ *testnode.Session, token string) (any, error) {
	fd, err := openSocket(askOptions{To: agent4})
	if err != nil {
		return nil, err
	}
	if err := connect(fd, sockaddr(agent4, false)); err != nil {
		return netError(err)
	}
	file := os.NewFile(uintptr(fd), "connection")
	defer file.Close()
	return again(token, func(cmd *exec.Cmd) {
		cmd.ExtraFiles = []*os.File{file}
		cmd.Env = append(cmd.Env, inheritedSocket+"=3")
		if os.Geteuid() == 0 {
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		}
	})
}

// repair makes a socket look connected, without a handshake, and asks.
func repair(_ *testnode.Session, token string) (any, error) {
	fd, err := openSocket(askOptions{To: agent4})
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_REPAIR, 1); err != nil {
		return nil, os.NewSyscallError("TCP_REPAIR", err)
	}
	if err := connect(fd, sockaddr(agent4, false)); err != nil {
		return nil, os.NewSyscallError("connect", err)
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_REPAIR, 0); err != nil {
		return nil, os.NewSyscallError("TCP_REPAIR", err)
	}
	return askOver(fd, token)
}

type bindArgs struct {
	At        netip.AddrPort
	ReusePort bool
	Device    string
}

// bindListener tries to listen where the agent does.
func bindListener(_ *testnode.Session, o bindArgs) (any, error) {
	fd, err := openSocket(askOptions{To: o.At, Device: o.Device})
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	if o.ReusePort {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1); err != nil {
			return nil, os.NewSyscallError("SO_REUSEPORT", err)
		}
	}
	if err := unix.Bind(fd, sockaddr(o.At, false)); err != nil {
		return nil, os.NewSyscallError("bind", err)
	}
	return nil, os.NewSyscallError("listen", unix.Listen(fd, 1))
}

type netnsArgs struct {
	Ask askOptions
	// FD of the namespace in process PID.
	PID, FD int
}

// newNetns asks from another network namespace, which it enters by the
// descriptor that another process has of it.
func newNetns(s *testnode.Session, o netnsArgs) (any, error) {
	ns, err := os.Open(fmt.Sprintf("/proc/%d/fd/%d", o.PID, o.FD))
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		return nil, os.NewSyscallError("setns", err)
	}
	return ask(s, o.Ask)
}

type holdArgs struct {
	To netip.AddrPort
	N  int
	// From are source addresses to take turns with; empty: the kernel's choice.
	From []netip.Addr
	// Established: wait for each handshake.
	Established bool
}

// hold opens connections and keeps them. It tells how many it has.
func hold(s *testnode.Session, o holdArgs) (any, error) {
	held, _ := s.Values["held"].([]int)
	defer func() { s.Values["held"] = held }()
	for i := range o.N {
		ask := askOptions{To: o.To}
		if len(o.From) > 0 {
			ask.Bind, ask.BindLate = netip.AddrPortFrom(o.From[i%len(o.From)], 0), true
		}
		fd, err := openSocket(ask)
		if err != nil {
			return len(held), err
		}
		held = append(held, fd)
		if !o.Established {
			if err := unix.SetNonblock(fd, true); err != nil {
				return len(held), err
			}
		}
		if err := connect(fd, sockaddr(o.To, false)); err != nil && !errors.Is(err, unix.EINPROGRESS) {
			return len(held), os.NewSyscallError("connect", err)
		}
	}
	return len(held), nil
}

// ownListener listens on the agent's address inside the process's own
// namespace, where the test has put it, and connects to itself. It tells
// whether that worked.
func ownListener(_ *testnode.Session, token string) (any, error) {
	l, err := net.Listen("tcp4", agent4.String())
	if err != nil {
		return nil, err
	}
	defer l.Close()
	c, err := net.DialTimeout("tcp4", agent4.String(), patience)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	served, err := l.Accept()
	if err != nil {
		return nil, err
	}
	defer served.Close()
	if _, err := c.Write(request(agent4, token)); err != nil {
		return nil, err
	}
	served.SetReadDeadline(time.Now().Add(patience))
	req, err := http.ReadRequest(bufio.NewReader(served))
	if err != nil {
		return nil, err
	}
	return req.Header.Get("Authorization") == token, nil
}
