// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/pkg/credserver"
	"github.com/latchkey-dev/latchkey/pkg/evidence"
	"github.com/latchkey-dev/latchkey/pkg/pods"
)

// evidenceReader is pkg/attribution's part, podIndex pkg/pods'.
type evidenceReader interface {
	Evidence(syscall.Conn) (evidence.Connection, bool, error)
}

type podIndex interface {
	Attest(evidence.Connection, bool) (evidence.Attestation, *pods.Pod)
}

// attestor joins the two into credserver.Attestor, and recognises the agent's
// own probes.
type attestor struct {
	// kernel and index are nil if the node cannot attest, which only the
	// modes audit and off allow: then there is never any evidence.
	kernel evidenceReader
	index  podIndex
	log    *slog.Logger
	recent recentConnections

	// probing counts the probes under way, so that a connection costs nothing
	// more while there is none.
	probing atomic.Int32
	mu      sync.Mutex
	probes  map[uint64]chan<- struct{} // by client socket cookie
}

func newAttestor(kernel evidenceReader, index podIndex, log *slog.Logger) *attestor {
	return &attestor{kernel: kernel, index: index, log: log, probes: map[uint64]chan<- struct{}{}}
}

// Attest implements credserver.Attestor: one bpf(2) call.
func (a *attestor) Attest(c net.Conn) (evidence.Attestation, credserver.Liveness) {
	none := evidence.Attestation{Finding: evidence.FindingNone, Reason: evidence.ReasonNoEvidence}
	if a.kernel == nil || a.index == nil {
		return none, nil
	}
	sc, ok := c.(syscall.Conn)
	if !ok {
		a.log.Error("a connection without descriptor", "type", fmt.Sprintf("%T", c))
		return none, nil
	}
	conn, ok, err := a.kernel.Evidence(sc)
	if err != nil {
		// Not to be told from a connection that was closed meanwhile; the
		// client is asked to come again either way.
		a.log.Debug("cannot read evidence", "error", err)
		ok = false
	}
	if ok && a.probing.Load() > 0 {
		a.recognise(conn.SocketCookie)
	}
	att, pod := a.index.Attest(conn, ok)
	a.recent.add(c.RemoteAddr(), att)
	if pod == nil {
		// Not a nil *pods.Pod in an interface.
		return att, nil
	}
	return att, pod
}

func (a *attestor) recognise(cookie uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if done, ok := a.probes[cookie]; ok {
		delete(a.probes, cookie)
		close(done)
	}
}

// Errors of a self-probe.
var (
	errNotAttested = errors.New("the kernel's evidence of the agent's own connection did not arrive")
	errNotServing  = errors.New("the endpoint does not answer")
)

// probe connects to one of the agent's own addresses and checks the whole way:
// the endpoint answers, and the evidence of this very socket reached the
// accepted one. It asks for "/", which is nobody's path.
func (a *attestor) probe(ctx context.Context, at netip.AddrPort) error {
	seen := make(chan struct{})
	var cookie uint64
	dialer := net.Dialer{
		// Before connect, so that the accepted side cannot be first.
		Control: func(_, _ string, raw syscall.RawConn) error {
			var err error
			if cerr := raw.Control(func(fd uintptr) {
				cookie, err = unix.GetsockoptUint64(int(fd), unix.SOL_SOCKET, unix.SO_COOKIE)
			}); cerr != nil {
				return cerr
			}
			if err != nil {
				return fmt.Errorf("read the socket's cookie: %w", err)
			}
			a.mu.Lock()
			a.probes[cookie] = seen
			a.mu.Unlock()
			return nil
		},
	}
	a.probing.Add(1)
	defer func() {
		a.probing.Add(-1)
		a.mu.Lock()
		delete(a.probes, cookie)
		a.mu.Unlock()
	}()
	// Not the default transport: a proxy in the environment is not for this.
	client := http.Client{Transport: &http.Transport{DialContext: dialer.DialContext, DisableKeepAlives: true}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+at.String()+"/", nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return fmt.Errorf("%w on %s: %w", errNotServing, at, err)
	}
	resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusNotFound:
	case http.StatusTooManyRequests:
		// An agent outside every pod shares its limit with the host's other
		// processes: being refused by it is an answer as well.
	default:
		return fmt.Errorf("%w on %s: status %d, expected 404", errNotServing, at, resp.StatusCode)
	}
	if a.kernel == nil {
		return nil
	}
	// The evidence is read before the request is, so it is here by now or it
	// never comes.
	select {
	case <-seen:
		return nil
	default:
		return fmt.Errorf("%w on %s", errNotAttested, at)
	}
}

// recentConnections remembers the client ends of the last connections, for
// `latchkey whois`. Bounded; one short lock per connection, none per request.
type recentConnections struct {
	mu    sync.Mutex
	byEnd map[netip.AddrPort]recent
	ring  []netip.AddrPort
	next  int
}

type recent struct {
	att evidence.Attestation
	at  time.Time
}

const maxRecent = 4096

func (r *recentConnections) add(addr net.Addr, att evidence.Attestation) {
	tcp, ok := addr.(*net.TCPAddr)
	if !ok {
		return
	}
	end := clientEnd(tcp.AddrPort())
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.byEnd == nil {
		r.byEnd = make(map[netip.AddrPort]recent)
	}
	if _, known := r.byEnd[end]; !known {
		if len(r.ring) < maxRecent {
			r.ring = append(r.ring, end)
		} else {
			delete(r.byEnd, r.ring[r.next])
			r.ring[r.next] = end
			r.next = (r.next + 1) % maxRecent
		}
	}
	r.byEnd[end] = recent{att, time.Now()}
}

func (r *recentConnections) find(end netip.AddrPort) (recent, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	c, ok := r.byEnd[clientEnd(end)]
	return c, ok
}

func clientEnd(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap().WithZone(""), a.Port())
}
