// SPDX-License-Identifier: Apache-2.0

package credserver

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime/debug"
	"sync/atomic"
	"time"

	"github.com/valyala/fasthttp"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
	"github.com/latchkey-dev/latchkey/pkg/verdict"
)

// What a connection is doing; conn.state.
const (
	stateNew    int32 = iota // no byte has come yet
	stateActive              // a request is being read or answered
	stateIdle                // between two requests
)

// expired is a value of conn.readBy that is always in the past.
const expired = -1

// crowdedIdle is how long a connection of a pod that holds many may be idle.
const crowdedIdle = time.Second

// conn is an accepted connection with everything that is decided once for it.
//
// Its deadlines are numbers that the server's sweep compares a few times per
// second; only when one has passed is the socket told. Timers of the runtime
// would be set three times per request and hardly ever fire.
type conn struct {
	net.Conn
	server  *Server
	account *account
	live    Liveness
	peer    netip.AddrPort

	// readBy and writeBy are deadlines on Server.coarse; 0: none.
	readBy  atomic.Int64
	writeBy atomic.Int64
	state   atomic.Int32

	// What follows belongs to the connection's goroutine.

	// input carries the policy, the attestation and the remembered token from
	// request to request, so that a hit copies none of them.
	input verdict.Input
	known *knownToken
	wait  *waitContext
	// linger: unread input is expected, so closing at once would reset the
	// connection before the client has read why.
	linger bool
	closed bool
}

// start takes a connection over from a listener.
func (s *Server) start(nc net.Conn) {
	c := &conn{Conn: nc, server: s, peer: peerOf(nc)}
	c.readBy.Store(s.coarse.Load() + int64(s.headTimeout))
	s.mu.Lock()
	if s.stopping.Load() {
		s.mu.Unlock()
		_ = nc.Close()
		return
	}
	s.conns[c] = struct{}{}
	s.mu.Unlock()
	go s.run(c)
}

// peerOf is the client's end, as IPv4 where it is IPv4.
func peerOf(nc net.Conn) netip.AddrPort {
	tcp, ok := nc.RemoteAddr().(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	end := tcp.AddrPort()
	return netip.AddrPortFrom(end.Addr().Unmap(), end.Port())
}

// run serves one connection to its end.
func (s *Server) run(c *conn) {
	// fasthttp does not recover. One connection must not end the agent, or a
	// pod that finds a bug in a parser takes credentials from all others.
	defer func() {
		if p := recover(); p != nil {
			s.logPanic(p)
		}
		_ = c.Close()
	}()
	// The evidence was bound to the socket when the handshake was completed,
	// before it could be accepted. Reading it now and not at the first request
	// lets silent connections count against the pod that opened them.
	if s.attestor != nil {
		c.input.Attestation, c.live = s.attestor.Attest(c.Conn)
	}
	c.input.Policy = s.policy
	account, ok := s.ledger.open(&c.input.Attestation, s.elapsed())
	if !ok {
		s.turnAway(c, account)
		return
	}
	c.account = account
	_ = s.http.ServeConn(c)
}

// turnAway answers a connection beyond its pod's allowance, unread. Only so
// many at a time are answered: being told takes a descriptor for a moment, and
// descriptors are the node's.
func (s *Server) turnAway(c *conn, a *account) {
	const atOnce = 32
	s.observe(Record{
		Status:      fasthttp.StatusTooManyRequests,
		Reason:      evidence.ReasonRateLimited,
		Attestation: c.input.Attestation,
		Start:       s.now(),
		Peer:        c.peer,
		Told:        tooManyConnectionsText,
	})
	defer a.turned.Add(-1)
	if a.turned.Add(1) > atOnce {
		return
	}
	c.state.Store(stateActive)
	if _, err := c.Write(tooManyConnections); err == nil {
		c.drain()
	}
}

// Read implements net.Conn.
func (c *conn) Read(p []byte) (int, error) {
	for {
		n, err := c.Conn.Read(p)
		if n > 0 {
			c.state.CompareAndSwap(stateNew, stateActive)
			return n, err
		}
		if err == nil || !errors.Is(err, os.ErrDeadlineExceeded) || c.late() {
			return n, err
		}
		// The sweep expired an earlier deadline at the moment a new request
		// moved it: the socket's deadline is out of date.
		if e := c.Conn.SetReadDeadline(time.Time{}); e != nil {
			return n, e
		}
		if c.late() {
			return n, err
		}
	}
}

// late tells whether the connection's read deadline has passed.
func (c *conn) late() bool {
	by := c.readBy.Load()
	return by == expired || by != 0 && by <= c.server.coarse.Load()
}

// Write implements net.Conn.
func (c *conn) Write(p []byte) (int, error) {
	if c.state.Load() == stateNew {
		// fasthttp answers 408 to a connection that never said anything. A
		// client that connected ahead of time would take it for the reply to
		// its next request.
		return len(p), nil
	}
	c.writeBy.Store(c.server.coarse.Load() + int64(c.server.writeTimeout))
	n, err := c.Conn.Write(p)
	c.writeBy.Store(0)
	return n, err
}

// Close implements net.Conn. It is called by the connection's goroutine only.
func (c *conn) Close() error {
	if c.closed {
		return nil
	}
	c.closed = true
	s := c.server
	if c.linger {
		c.drain()
	}
	err := c.Conn.Close()
	if c.account != nil {
		s.ledger.close(c.account, s.elapsed())
	}
	s.mu.Lock()
	delete(s.conns, c)
	if len(s.conns) == 0 && s.stopping.Load() {
		// Shutdown found connections, and start adds none after it began, so
		// this is reached once.
		close(s.drained)
	}
	s.mu.Unlock()
	return err
}

// drain reads, for a short while and a bounded amount, what the client is
// still sending, so that it gets to read the answer: closing a socket with
// unread input sends a reset, which discards it.
func (c *conn) drain() {
	const patience, most = 200 * time.Millisecond, 256 << 10
	half, ok := c.Conn.(interface{ CloseWrite() error })
	if !ok || half.CloseWrite() != nil {
		return
	}
	if c.Conn.SetReadDeadline(time.Now().Add(patience)) != nil {
		return
	}
	_, _ = io.CopyN(io.Discard, struct{ io.Reader }{c.Conn}, most)
}

// connState follows the connection through fasthttp.
func connState(nc net.Conn, state fasthttp.ConnState) {
	c, ok := nc.(*conn)
	if !ok {
		return
	}
	s := c.server
	switch state {
	case fasthttp.StateActive:
		// Also called before the first read; until a byte has come the
		// connection stays new.
		if c.state.Load() == stateNew {
			return
		}
		c.state.Store(stateActive)
		c.readBy.Store(s.coarse.Load() + int64(s.headTimeout))
	case fasthttp.StateIdle:
		c.readBy.Store(s.coarse.Load() + int64(s.idleTimeout))
		c.state.Store(stateIdle)
		// Either Shutdown sees the new state, or this sees that it began.
		if s.stopping.Load() {
			c.endIfIdle()
		}
	}
}

// endIfIdle wakes a connection that waits for a request, so that it ends. If
// a request arrives at the same time, connState moves the deadline and Read
// goes on.
func (c *conn) endIfIdle() {
	if c.state.Load() != stateActive {
		c.readBy.Store(expired)
		_ = c.Conn.SetReadDeadline(time.Unix(1, 0))
	}
}

// elapsed is the time since the server was made, in nanoseconds.
func (s *Server) elapsed() int64 { return int64(s.now().Sub(s.epoch)) }

// sweepLoop calls sweep until Shutdown has drained or cut all connections.
func (s *Server) sweepLoop() {
	ticker := time.NewTicker(s.tick)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
			s.sweep()
		case <-s.base.Done():
			return
		}
	}
}

// sweep advances the coarse clock and enforces the deadlines of connections.
func (s *Server) sweep() {
	now := s.elapsed()
	s.coarse.Store(now)
	s.ledger.prune(now)
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		if by := c.writeBy.Load(); by != 0 && by <= now {
			// The client does not read its reply.
			_ = c.Conn.Close()
			continue
		}
		by := c.readBy.Load()
		if by == 0 || by == expired {
			continue
		}
		if by <= now {
			_ = c.Conn.SetReadDeadline(time.Unix(1, 0))
			continue
		}
		// Each idle connection holds about 30 KiB. One that a pod keeps open is
		// a courtesy; hundreds are a cost to the node.
		if c.state.Load() == stateIdle && by-int64(s.idleTimeout)+int64(crowdedIdle) <= now && c.account.crowded() {
			c.endIfIdle()
		}
	}
}

// logPanic reports a panic without its value, which may hold what a client
// sent, unless it is the runtime's own.
func (s *Server) logPanic(p any) {
	cause := "other"
	var re interface {
		error
		RuntimeError()
	}
	if err, ok := p.(error); ok && errors.As(err, &re) {
		cause = re.Error()
	}
	s.log.Error("credential endpoint recovered from a panic", "cause", cause, "stack", string(debug.Stack()))
}
