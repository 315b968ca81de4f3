// SPDX-License-Identifier: Apache-2.0

// Package credserver is the HTTP endpoint that pods ask for credentials:
// /v1/credentials on the link-local addresses, and nothing else.
//
// It speaks the wire of the EKS Pod Identity Agent 0.1.37: the same path, the
// same statuses and the same texts, so that every AWS SDK works unchanged. It
// differs where that agent can be hurt: limits belong to the pod that the
// kernel saw connecting and never to an address, and no limit is shared
// between pods.
//
// The way of a request through this package:
//
//	accept       conn.go      the connection is attested once, and charged to its pod
//	head         fasthttp     at most 24 KiB, within a deadline that trickled bytes do not extend
//	limit        limit.go     one token bucket per pod
//	token        memory.go    verified once per pod for the same bytes, then remembered
//	verdict      pkg/verdict  evidence and token are judged at every request
//	credentials  Credentials  a cache; its answer's bytes are written as they are
//	refusal      refuse.go    one table from reason to status, code and text
//
// A request whose token is remembered and whose credentials are cached is
// answered without parsing a token, checking a signature, allocating memory or
// writing a log line.
package credserver

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/valyala/fasthttp"
	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
	"github.com/latchkey-dev/latchkey/pkg/verdict"
)

// Path is the only path that answers with credentials (contract section 5).
const Path = "/v1/credentials"

// Bounds of one request. A projected token is about 1.3 KB and may be 16 KiB;
// what clients add to it is small.
const (
	maxHead = 24 << 10
	// maxBody bounds a body that is read only to find the next request.
	maxBody = 16 << 10
	// writeBuffer holds a whole reply, so that it leaves in one segment's write.
	writeBuffer = 4 << 10
)

// Defaults of Config's durations.
const (
	DefaultHeadTimeout  = 5 * time.Second
	DefaultIdleTimeout  = 15 * time.Second
	DefaultWriteTimeout = 5 * time.Second
	// DefaultWaitTimeout lies under the 2 s at which botocore gives up. The
	// fetch goes on without the client, whose next attempt finds it cached.
	DefaultWaitTimeout = 1800 * time.Millisecond
)

var (
	// ErrConfig: New was given a Config that cannot work or would not be safe.
	ErrConfig = errors.New("credential endpoint configuration")
	// ErrClosed: Serve was called after Shutdown.
	ErrClosed = errors.New("credential endpoint is shut down")
)

// Attestor tells which pod opened a connection. Attest is called once per
// connection, in that connection's goroutine and before a byte is read, with
// the connection as the listener accepted it.
type Attestor interface {
	Attest(net.Conn) (evidence.Attestation, Liveness)
}

// Liveness tells at each request whether the attested pod still lives. An
// Attestor returns nil if there is no pod. Ended is called concurrently and
// must be cheap.
type Liveness interface {
	// Ended is true from the moment the pod's cgroup is gone, for good.
	Ended() bool
}

// TokenVerifier checks a service-account token as the client sent it. An error
// that is a TokenError says what is wrong with the token; any other one says
// nothing about the token, so the client is asked to come again.
type TokenVerifier interface {
	Verify(ctx context.Context, raw string) (evidence.Token, error)
}

// TokenError is what an error of a TokenVerifier may be.
type TokenError interface {
	error
	// Reason names the decision.
	Reason() evidence.Reason
	// Message is the text for the client. It holds nothing of the token.
	Message() string
	// Retriable: nothing is known about the token (no key could be had).
	Retriable() bool
}

// KeyGenerations may be implemented by a TokenVerifier whose keys change. A
// token remembered under one generation is verified again under another, so
// that a withdrawn key stops being honoured on kept-alive connections too.
type KeyGenerations interface {
	KeyGeneration() uint64
}

// ClaimReader may be implemented by a TokenVerifier that can read a token that
// it refused, for Record.Claimed.
type ClaimReader interface {
	// Claims gives what the token says of itself, unchecked, and false if it
	// cannot be read.
	Claims(raw string) (evidence.Token, bool)
}

// CredentialRequest is what Credentials.Get is asked.
type CredentialRequest struct {
	// Token is whom the credentials are for. It passed the verdict.
	Token evidence.Token
	// Raw is the token's exact text, for the upstream. It is a secret. It may
	// be kept.
	Raw string
	// Pod is the one that the kernel saw connecting; empty if it saw none, or
	// several. What the request costs is counted against it.
	Pod evidence.PodUID
	// Uncached: ask upstream and keep nothing; the pod has ended and the mode
	// is not enforce.
	Uncached bool
}

// Credential is a ready answer.
type Credential struct {
	// Body is the JSON document that is sent as it is. It is not changed after
	// Get returns it.
	Body []byte
	// Expiry is when the credentials end; zero if not known. An answer past it
	// is refused here as well.
	Expiry time.Time
	// Hit: answered without waiting for the upstream.
	Hit bool
	// Role is the ARN of the assumed-role session and Association the id of what
	// gave it, for the Observer.
	Role, Association string
}

// Credentials gives out credentials, from memory or from upstream. Get is
// called only for requests that passed the verdict. On a hit it must not touch
// ctx, whose timer is started by the first call of Done, Deadline or a derived
// context. A fetch must not be tied to ctx: the next attempt of a client that
// gave up should find its result. Errors should be *UpstreamError.
type Credentials interface {
	Get(ctx context.Context, req CredentialRequest) (Credential, error)
}

// UpstreamError is how Credentials says why there are none. It is sent to the
// client in the form of the reference agent:
// "[request-id]: (Code): message, fault: client".
type UpstreamError struct {
	// Reason is for metrics and audit; empty reads as ReasonUpstreamUnavailable.
	Reason evidence.Reason
	// Status is the upstream's HTTP status, passed on if it is 4xx or 5xx; 0 if
	// there was no HTTP answer: the client gets 500.
	Status int
	// Code is the upstream's exception, such as ResourceNotFoundException.
	Code string
	// Message is the upstream's text. A token that it repeats is cut out.
	Message string
	// RequestID is the upstream's x-amzn-RequestId.
	RequestID string
	// Err is the cause, for logs. The client does not see it.
	Err error
}

// Error implements error.
func (e *UpstreamError) Error() string {
	text := fmt.Sprintf("upstream answered %d [%s]: (%s): %s", e.Status, e.RequestID, e.Code, e.Message)
	if e.Err != nil {
		text += ": " + e.Err.Error()
	}
	return text
}

// Unwrap gives the cause.
func (e *UpstreamError) Unwrap() error { return e.Err }

// Config is what New needs. Attestor may be nil only if Policy is mode off
// everywhere; Tokens, Credentials and Hosts are required.
type Config struct {
	Attestor    Attestor
	Tokens      TokenVerifier
	Credentials Credentials
	// Policy is handed to verdict.Decide. The zero value enforces.
	Policy verdict.Policy
	// Hosts are the values of the Host header that are answered: addresses in
	// their canonical text, without port and brackets. Everything else is
	// refused, which stops DNS rebinding.
	Hosts []string
	// Observer is told of every request. Nil: nobody.
	Observer Observer
	// Limits; the zero value gives the defaults described there.
	Limits Limits
	// HeadTimeout bounds the time from a connection's start, or from the first
	// byte of a later request, to the end of its head and body. 0: DefaultHeadTimeout.
	HeadTimeout time.Duration
	// IdleTimeout bounds a kept-alive connection's silence. 0: DefaultIdleTimeout.
	// A pod that holds more than a quarter of its connections is given a
	// second, since what it holds is the agent's memory.
	IdleTimeout time.Duration
	// WriteTimeout bounds the writing of one reply. 0: DefaultWriteTimeout.
	WriteTimeout time.Duration
	// WaitTimeout bounds how long a request waits for keys and upstream
	// together. 0: DefaultWaitTimeout.
	WaitTimeout time.Duration
	// Logger gets what an operator must know; nil discards. Requests are the
	// Observer's matter.
	Logger *slog.Logger
	// Now is the clock, for tests. Nil: time.Now.
	Now func() time.Time
}

// Server is the endpoint. It serves any number of listeners, which share
// nothing that one of them failing could break. Its methods may be called from
// any goroutine.
type Server struct {
	attestor    Attestor
	tokens      TokenVerifier
	generations KeyGenerations
	claims      ClaimReader
	credentials Credentials
	policy      verdict.Policy
	hosts       []string
	observer    Observer
	log         *slog.Logger
	now         func() time.Time
	epoch       time.Time
	wrongHost   string

	headTimeout  time.Duration
	idleTimeout  time.Duration
	writeTimeout time.Duration
	waitTimeout  time.Duration
	patience     time.Duration
	tick         time.Duration

	ledger *ledger
	seed   maphash.Seed
	http   fasthttp.Server

	// coarse is the time since epoch at the last sweep, in nanoseconds. All
	// deadlines of connections are kept on it: no timer, and no clock read,
	// per request.
	coarse   atomic.Int64
	stopping atomic.Bool
	// stopped is closed when Shutdown begins, drained when no connection is left.
	stopped chan struct{}
	drained chan struct{}
	// base is the parent of every wait; it ends when Shutdown gives up waiting.
	base   context.Context
	cancel context.CancelFunc

	mu        sync.Mutex
	conns     map[*conn]struct{}
	listeners map[net.Listener]struct{}
	sweeping  bool
}

// New prepares a Server. Errors wrap ErrConfig.
func New(cfg Config) (*Server, error) {
	if cfg.Tokens == nil || cfg.Credentials == nil {
		return nil, fmt.Errorf("%w: Tokens and Credentials are required", ErrConfig)
	}
	if cfg.Attestor == nil && !offEverywhere(cfg.Policy) {
		return nil, fmt.Errorf("%w: without an Attestor the mode must be off everywhere", ErrConfig)
	}
	if len(cfg.Hosts) == 0 {
		return nil, fmt.Errorf("%w: no host is allowed", ErrConfig)
	}
	for _, h := range cfg.Hosts {
		if h == "" || strings.ContainsAny(h, "[]/ ") {
			return nil, fmt.Errorf("%w: host %q: give an address without port and brackets", ErrConfig, h)
		}
	}
	for _, d := range []time.Duration{cfg.HeadTimeout, cfg.IdleTimeout, cfg.WriteTimeout, cfg.WaitTimeout} {
		if d < 0 {
			return nil, fmt.Errorf("%w: negative timeout %v", ErrConfig, d)
		}
	}
	limits, err := cfg.Limits.withDefaults(cfg.Policy)
	if err != nil {
		return nil, err
	}
	s := &Server{
		attestor:     cfg.Attestor,
		tokens:       cfg.Tokens,
		credentials:  cfg.Credentials,
		policy:       cfg.Policy,
		hosts:        append([]string(nil), cfg.Hosts...),
		observer:     cfg.Observer,
		log:          cfg.Logger,
		now:          cfg.Now,
		headTimeout:  orDefault(cfg.HeadTimeout, DefaultHeadTimeout),
		idleTimeout:  orDefault(cfg.IdleTimeout, DefaultIdleTimeout),
		writeTimeout: orDefault(cfg.WriteTimeout, DefaultWriteTimeout),
		waitTimeout:  orDefault(cfg.WaitTimeout, DefaultWaitTimeout),
		patience:     limits.Patience,
		ledger:       newLedger(limits),
		seed:         maphash.MakeSeed(),
		stopped:      make(chan struct{}),
		drained:      make(chan struct{}),
		conns:        make(map[*conn]struct{}),
		listeners:    make(map[net.Listener]struct{}),
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if s.now == nil {
		s.now = time.Now
	}
	s.generations, _ = cfg.Tokens.(KeyGenerations)
	s.claims, _ = cfg.Tokens.(ClaimReader)
	s.epoch = s.now()
	s.wrongHost = fmt.Sprintf("Access Denied. Called agent through invalid address, please use either %v address not ", s.hosts)
	s.tick = max(min(s.headTimeout, s.idleTimeout, s.writeTimeout)/4, 10*time.Millisecond)
	s.tick = min(s.tick, 250*time.Millisecond)
	s.base, s.cancel = context.WithCancel(context.Background())
	s.http = fasthttp.Server{
		Handler:      s.handle,
		ErrorHandler: s.handleError,
		ConnState:    connState,
		// Connections are bounded per pod, in ledger. A bound here would be one
		// that a single pod can use up.
		Concurrency:                  math.MaxInt32,
		ReadBufferSize:               maxHead,
		WriteBufferSize:              writeBuffer,
		MaxRequestBodySize:           maxBody,
		NoDefaultServerHeader:        true,
		NoDefaultContentType:         true,
		DisablePreParseMultipartForm: true, // It would write bodies to temporary files.
		SecureErrorLogMessage:        true,
		Logger:                       silent{}, // Its messages quote heads, tokens included.
	}
	return s, nil
}

func orDefault(d, otherwise time.Duration) time.Duration {
	if d == 0 {
		return otherwise
	}
	return d
}

// offEverywhere tells whether no token can lead to a decision on evidence.
func offEverywhere(p verdict.Policy) bool {
	for _, m := range p.Namespaces {
		if m != verdict.Off {
			return false
		}
	}
	return p.Default == verdict.Off
}

// Listen opens a listener fit for Serve: plain TCP, because an MPTCP handshake
// leaves no room for the option that carries the evidence, and without Fast Open
// for the same reason; of one address family; never with SO_REUSEPORT, with which a hostNetwork pod could join the
// port. TCP keep-alive is off: silent connections are closed by IdleTimeout.
func Listen(ctx context.Context, address netip.AddrPort) (net.Listener, error) {
	lc := net.ListenConfig{KeepAlive: -1}
	lc.SetMultipathTCP(false)
	network := "tcp6"
	if address.Addr().Unmap().Is4() {
		network = "tcp4"
		address = netip.AddrPortFrom(address.Addr().Unmap(), address.Port())
	}
	ln, err := lc.Listen(ctx, network, address.String())
	if err != nil {
		return nil, fmt.Errorf("opening the credential endpoint on %v: %w", address, err)
	}
	if err := refuseFastOpen(ln); err != nil {
		_ = ln.Close()
		return nil, fmt.Errorf("opening the credential endpoint on %v: %w", address, err)
	}
	return ln, nil
}

// refuseFastOpen takes back what the sysctl tcp_fastopen can make every listener
// offer (bit 0x400): a client with a Fast Open cookie has no room left in its
// SYN for the option that carries the evidence, and what completes such a
// handshake is the SYN. It has to come after listen(2), which sets it.
func refuseFastOpen(ln net.Listener) error {
	sc, ok := ln.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	if err := raw.Control(func(fd uintptr) {
		serr = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_FASTOPEN, 0)
	}); err != nil {
		return err
	}
	if errors.Is(serr, unix.ENOPROTOOPT) {
		return nil // a kernel without Fast Open
	}
	return serr
}

// Serve answers on the listeners until each of them ends, and owns them. It
// can be called several times, such as when an address family appears later.
// A listener that fails does not disturb the others. Serve returns nil if all
// ended because they were closed or because of Shutdown, else what the failed
// ones met with.
func (s *Server) Serve(listeners ...net.Listener) error {
	s.mu.Lock()
	if s.stopping.Load() {
		s.mu.Unlock()
		for _, ln := range listeners {
			_ = ln.Close()
		}
		return ErrClosed
	}
	for _, ln := range listeners {
		s.listeners[ln] = struct{}{}
	}
	if !s.sweeping {
		s.sweeping = true
		go s.sweepLoop()
	}
	s.mu.Unlock()

	errs := make([]error, len(listeners))
	var wg sync.WaitGroup
	for i, ln := range listeners {
		wg.Go(func() {
			errs[i] = s.acceptLoop(ln)
			_ = ln.Close()
			s.mu.Lock()
			delete(s.listeners, ln)
			s.mu.Unlock()
			if errs[i] != nil {
				s.log.Error("credential endpoint lost a listener", "address", ln.Addr().String(), "error", errs[i])
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (s *Server) acceptLoop(ln net.Listener) error {
	const longest = time.Second
	var delay time.Duration
	for {
		nc, err := ln.Accept()
		switch {
		case err == nil:
			delay = 0
			s.start(nc)
			continue
		case s.stopping.Load() || errors.Is(err, net.ErrClosed):
			return nil
		case !passing(err):
			return fmt.Errorf("accepting on %v: %w", ln.Addr(), err)
		}
		// Out of descriptors or memory, or a connection that failed before it
		// was accepted: the listener is sound, so giving it up would be the
		// outage that the client was looking for.
		if delay == 0 {
			delay = 5 * time.Millisecond
			s.log.Warn("credential endpoint cannot accept for the moment", "address", ln.Addr().String(), "error", err)
		} else {
			delay = min(2*delay, longest)
		}
		timer := time.NewTimer(delay)
		select {
		case <-timer.C:
		case <-s.stopped:
			timer.Stop()
			return nil
		}
	}
}

// passing tells whether accept may succeed later on the same listener. Per
// accept(2), Linux also reports here errors of the network that concern one
// connection only, so what is permanent is listed, not what passes.
func passing(err error) bool {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return false
	}
	switch errno {
	case syscall.EBADF, syscall.EINVAL, syscall.ENOTSOCK, syscall.EFAULT:
		return false
	}
	return true
}

// Shutdown stops accepting, closes idle connections, lets requests in progress
// finish (their replies say Connection: close), and returns when all are
// answered. When ctx ends first it cuts what is left and returns ctx's error.
// Serve returns nil. Calling Shutdown again waits as well.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	if !s.stopping.Swap(true) {
		close(s.stopped)
		if len(s.conns) == 0 {
			close(s.drained)
		}
	}
	for ln := range s.listeners {
		_ = ln.Close()
	}
	for c := range s.conns {
		c.endIfIdle()
	}
	s.mu.Unlock()
	defer s.cancel()

	select {
	case <-s.drained:
		return nil
	case <-ctx.Done():
	}
	s.cancel()
	s.mu.Lock()
	left := len(s.conns)
	for c := range s.conns {
		_ = c.Conn.Close()
	}
	s.mu.Unlock()
	return fmt.Errorf("cutting %d connections: %w", left, ctx.Err())
}

// Stats is a glance at the server.
type Stats struct {
	// Connections that are open now.
	Connections int
	// Accounts is the number of pods with an account: those with connections,
	// and those that had some lately.
	Accounts int
}

// Stats counts; it is meant for metrics and the admin socket.
func (s *Server) Stats() Stats {
	s.mu.Lock()
	n := len(s.conns)
	s.mu.Unlock()
	return Stats{Connections: n, Accounts: s.ledger.size()}
}

// silent drops fasthttp's log: its messages quote what clients sent.
type silent struct{}

// Printf implements fasthttp.Logger.
func (silent) Printf(string, ...any) {}
