// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"fmt"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// ErrAnotherAgent: another agent runs on this node and uses the same pins or
// the same admin socket.
var ErrAnotherAgent = errors.New("another agent runs on this node")

// claimPins makes this process the only agent that uses the pins: links are
// replaced by updating them, so a second agent with other addresses would leave
// the first one without evidence. The lock ends with the process, however that
// ends. Only root can open the directory, so nobody else can hold the lock.
//
// A directory that cannot be made or locked is not this function's to report:
// attribution says what is wrong with it, and some modes go on without.
func claimPins(dir string) (release func(), err error) {
	if dir == "" {
		return func() {}, nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return func() {}, nil
	}
	return lockPins(dir)
}

// lockPins is claimPins for a directory that may be missing.
func lockPins(dir string) (release func(), err error) {
	f, err := os.Open(dir)
	if err != nil {
		return func() {}, nil
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		f.Close()
		return nil, fmt.Errorf("%w with the pins in %s: stop it first", ErrAnotherAgent, dir)
	}
	return func() { f.Close() }, nil
}

// addressesFree finds out, before anything on the node is changed, whether
// another process listens on one of the addresses. An address that is not
// there yet is free. Nothing listens here, so nobody can connect meanwhile.
func addressesFree(hosts []netip.Addr, port uint16) error {
	var errs []error
	for _, h := range hosts {
		at := netip.AddrPortFrom(h, port)
		if errors.Is(tryBind(at), unix.EADDRINUSE) {
			errs = append(errs, addressInUse(at))
		}
	}
	return errors.Join(errs...)
}

func addressInUse(at netip.AddrPort) error {
	return fmt.Errorf("%w: another process listens on %s, such as the EKS Pod Identity Agent or an ingress on every address of the host; stop it, or choose another --bind-hosts", ErrAddressInUse, at)
}

// tryBind binds a socket, as a listener would, and closes it. With
// SO_REUSEADDR, as Go's listeners have it, only a listening socket is in the
// way; with IP_FREEBIND the address need not be on the node.
func tryBind(at netip.AddrPort) error {
	family, sa := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{Port: int(at.Port()), Addr: at.Addr().As16()})
	if at.Addr().Unmap().Is4() {
		family, sa = unix.AF_INET, &unix.SockaddrInet4{Port: int(at.Port()), Addr: at.Addr().Unmap().As4()}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return err
	}
	if family == unix.AF_INET6 {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1); err != nil {
			return err
		}
		err = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_FREEBIND, 1)
	} else {
		err = unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_FREEBIND, 1)
	}
	if err != nil {
		return err
	}
	return unix.Bind(fd, sa)
}
