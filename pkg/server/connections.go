// SPDX-License-Identifier: Apache-2.0

package server

import (
	"net"
	"net/netip"
	"sync"
	"sync/atomic"

	"github.com/latchkey-dev/latchkey/pkg/strangers"
)

// Defaults of Config.MaxConnections and MaxAddressConnections. A node has one or
// two connections; an address may be a proxy, with every node behind it.
const (
	DefaultMaxConnections        = 16384
	DefaultMaxAddressConnections = DefaultMaxConnections / 2
)

// boundedListener closes connections beyond its bounds as soon as they are
// accepted. It accepts them first: who waits in the kernel's queue would keep
// others waiting, too.
type boundedListener struct {
	*net.TCPListener
	most, mostOfOne int

	mu      sync.Mutex
	open    int
	from    map[netip.Addr]int
	refused atomic.Uint64
}

func newBoundedListener(ln *net.TCPListener, most, mostOfOne int) *boundedListener {
	return &boundedListener{TCPListener: ln, most: most, mostOfOne: mostOfOne, from: map[netip.Addr]int{}}
}

// Accept waits for a connection that there is room for.
func (l *boundedListener) Accept() (net.Conn, error) {
	for {
		c, err := l.AcceptTCP()
		if err != nil {
			return nil, err
		}
		peer := strangers.Peer(c.RemoteAddr().String())
		if l.enter(peer) {
			return &boundedConn{TCPConn: c, leave: sync.OnceFunc(func() { l.leave(peer) })}, nil
		}
		l.refused.Add(1)
		// Without waiting for what was sent to arrive: nothing was.
		_ = c.SetLinger(0)
		_ = c.Close()
	}
}

func (l *boundedListener) enter(peer netip.Addr) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.open >= l.most || l.from[peer] >= l.mostOfOne {
		return false
	}
	l.open++
	l.from[peer]++
	return true
}

func (l *boundedListener) leave(peer netip.Addr) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.open--
	if l.from[peer]--; l.from[peer] == 0 {
		delete(l.from, peer)
	}
}

// connections is how many are open.
func (l *boundedListener) connections() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.open
}

// boundedConn gives its place back when it is closed, once.
type boundedConn struct {
	*net.TCPConn
	leave func()
}

// Close closes the connection.
func (c *boundedConn) Close() error {
	defer c.leave()
	return c.TCPConn.Close()
}
