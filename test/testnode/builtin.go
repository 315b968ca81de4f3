// SPDX-License-Identifier: Apache-2.0

//go:build linux

package testnode

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// The package's own actions, behind methods of Proc.
const (
	actionPing    = "testnode.ping"
	actionDial    = "testnode.dial"
	actionSocket  = "testnode.socket"
	actionConnect = "testnode.connect"
)

type dialArgs struct {
	Network, Address string
	Timeout          time.Duration // 0: the kernel's
}

type socketArgs struct{ Family int }

type connectArgs struct{ Address netip.AddrPort }

func builtinActions() Actions {
	return Actions{
		actionPing:    func(*Session, json.RawMessage) (any, error) { return nil, nil },
		actionDial:    dial,
		actionSocket:  socket,
		actionConnect: connect,
	}
}

func dial(s *Session, raw json.RawMessage) (any, error) {
	var args dialArgs
	if err := json.Unmarshal(raw, &args); err != nil {
		return nil, fmt.Errorf("decoding arguments: %w", err)
	}
	dialer := net.Dialer{Timeout: args.Timeout}
	conn, err := dialer.Dial(args.Network, args.Address)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return nil, fmt.Errorf("network %q is not TCP", args.Network)
	}
	file, err := tcp.File()
	if err != nil {
		return nil, fmt.Errorf("getting the connection's descriptor: %w", err)
	}
	// With Reply this process keeps no copy: the connection closes when the
	// test closes it.
	s.Reply(file)
	return nil, nil
}

func socket(s *Session, raw json.RawMessage) (any, error) {
	var args socketArgs
	if err := json.Unmarshal(raw, &args); err != nil {
		return nil, fmt.Errorf("decoding arguments: %w", err)
	}
	fd, err := unix.Socket(args.Family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return nil, fmt.Errorf("opening a socket: %w", err)
	}
	s.Reply(os.NewFile(uintptr(fd), "socket"))
	return nil, nil
}

func connect(s *Session, raw json.RawMessage) (any, error) {
	defer closeAll(s.Files())
	var args connectArgs
	if err := json.Unmarshal(raw, &args); err != nil {
		return nil, fmt.Errorf("decoding arguments: %w", err)
	}
	if len(s.Files()) != 1 {
		return nil, fmt.Errorf("%d descriptors came instead of one", len(s.Files()))
	}
	fd, err := descriptor(s.Files()[0])
	if err != nil {
		return nil, fmt.Errorf("using the socket: %w", err)
	}
	family, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil {
		return nil, fmt.Errorf("getting the socket's family: %w", err)
	}
	var target unix.Sockaddr
	switch {
	case family == unix.AF_INET6:
		// As16 of an IPv4 address is its v4-mapped form.
		target = &unix.SockaddrInet6{Addr: args.Address.Addr().As16(), Port: int(args.Address.Port())}
	case args.Address.Addr().Is4():
		target = &unix.SockaddrInet4{Addr: args.Address.Addr().As4(), Port: int(args.Address.Port())}
	default:
		return nil, fmt.Errorf("an IPv4 socket cannot connect to %s", args.Address)
	}
	if err := connectAndWait(fd, target); err != nil {
		return nil, fmt.Errorf("connecting to %s: %w", args.Address, err)
	}
	return nil, nil
}

// connectAndWait connects a blocking or non-blocking socket. It leaves that
// mode alone: the test's copy of the descriptor shares it.
func connectAndWait(fd int, target unix.Sockaddr) error {
	err := unix.Connect(fd, target)
	if !errors.Is(err, unix.EINPROGRESS) && !errors.Is(err, unix.EINTR) {
		return err
	}
	poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
	for {
		_, err := unix.Poll(poll, -1)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		break
	}
	errno, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err != nil {
		return err
	}
	if errno != 0 {
		return unix.Errno(errno)
	}
	return nil
}
