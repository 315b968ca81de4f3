// SPDX-License-Identifier: Apache-2.0

package credserver

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

// Pods, tokens and credentials of the tests.
const (
	podA = evidence.PodUID("aaaaaaaa-0000-4000-8000-000000000001")
	podB = evidence.PodUID("bbbbbbbb-0000-4000-8000-000000000002")

	tokenA = "header.payload-of-pod-a.signature"
	tokenB = "header.payload-of-pod-b.signature"

	bodyA = `{"AccessKeyId":"ASIAEXAMPLEA","SecretAccessKey":"secret-of-a","Token":"session-a","AccountId":"111122223333","Expiration":"2026-11-21T18:00:00Z"}`
	bodyB = `{"AccessKeyId":"ASIAEXAMPLEB","SecretAccessKey":"secret-of-b","Token":"session-b","AccountId":"111122223333","Expiration":"2026-11-21T18:00:00Z"}`
)

var (
	subjectA = evidence.Subject{PodUID: podA, Namespace: "web", ServiceAccount: "api"}
	subjectB = evidence.Subject{PodUID: podB, Namespace: "web", ServiceAccount: "worker"}
)

// clock is a clock that moves only when told.
type clock struct {
	mu sync.Mutex
	t  time.Time
}

func newClock() *clock { return &clock{t: time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)} }

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.t
}

func (c *clock) Advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.t = c.t.Add(d)
}

// pod is an Attestor's answer and its Liveness.
type pod struct {
	attestation evidence.Attestation
	ended       atomic.Bool
}

func (p *pod) Ended() bool { return p.ended.Load() }

func podOf(uid evidence.PodUID) *pod {
	return &pod{attestation: evidence.Attestation{Finding: evidence.FindingPod, Pod: uid}}
}

// attestorFunc is an Attestor.
type attestorFunc func(net.Conn) (evidence.Attestation, Liveness)

func (f attestorFunc) Attest(c net.Conn) (evidence.Attestation, Liveness) { return f(c) }

// attestAll says that every connection is p's.
func attestAll(p *pod) attestorFunc {
	return func(net.Conn) (evidence.Attestation, Liveness) {
		if p.attestation.Finding != evidence.FindingPod {
			return p.attestation, nil
		}
		return p.attestation, p
	}
}

// tokenError is a TokenError.
type tokenError struct {
	reason    evidence.Reason
	message   string
	retriable bool
}

func (e *tokenError) Error() string           { return string(e.reason) }
func (e *tokenError) Reason() evidence.Reason { return e.reason }
func (e *tokenError) Message() string         { return e.message }
func (e *tokenError) Retriable() bool         { return e.retriable }

// tokens is a TokenVerifier that knows a few texts.
type tokens struct {
	clock      *clock
	expiry     time.Time
	generation atomic.Uint64
	calls      atomic.Int64
	// down, if set, is what every call fails with.
	down atomic.Pointer[tokenError]
	// wait makes calls wait for the end of their context.
	wait bool
}

func (v *tokens) KeyGeneration() uint64 { return v.generation.Load() }

func (v *tokens) Verify(ctx context.Context, raw string) (evidence.Token, error) {
	v.calls.Add(1)
	if v.wait {
		<-ctx.Done()
		return evidence.Token{}, ctx.Err()
	}
	if e := v.down.Load(); e != nil {
		return evidence.Token{}, e
	}
	t := evidence.Token{Expiry: v.expiry, Verified: true}
	switch {
	case raw == tokenA:
		t.Subject, t.ID[0] = subjectA, 'a'
	case raw == tokenB:
		t.Subject, t.ID[0] = subjectB, 'b'
	case raw == "foreign.audience.token":
		return evidence.Token{}, &tokenError{reason: evidence.ReasonTokenAudience, message: "Service account token has the wrong audience"}
	case raw == "odd":
		return evidence.Token{}, fmt.Errorf("something else")
	default:
		return evidence.Token{}, &tokenError{reason: evidence.ReasonTokenMalformed, message: "Service account token cannot be parsed: it does not have three parts"}
	}
	if !v.clock.Now().Before(t.Expiry) {
		return evidence.Token{}, &tokenError{reason: evidence.ReasonTokenExpired, message: "Service account token failed basic claim validations: token is expired"}
	}
	return t, nil
}

// credentialsFunc is a Credentials.
type credentialsFunc func(context.Context, CredentialRequest) (Credential, error)

func (f credentialsFunc) Get(ctx context.Context, r CredentialRequest) (Credential, error) {
	return f(ctx, r)
}

var prepared = map[evidence.PodUID][]byte{podA: []byte(bodyA), podB: []byte(bodyB)}

func cached(_ context.Context, r CredentialRequest) (Credential, error) {
	return Credential{Body: prepared[r.Token.Subject.PodUID], Hit: true}, nil
}

// records is an Observer that keeps what it was told.
type records struct {
	mu  sync.Mutex
	all []Record
}

func (r *records) Observe(rec Record) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all = append(r.all, rec)
}

func (r *records) last(t *testing.T) Record {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.all) == 0 {
		t.Fatal("nothing was observed")
	}
	return r.all[len(r.all)-1]
}

func (r *records) count(reason evidence.Reason) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := 0
	for _, rec := range r.all {
		if rec.Reason == reason {
			n++
		}
	}
	return n
}

// bed is a server under test.
type bed struct {
	*Server
	clock   *clock
	tokens  *tokens
	pod     *pod
	records *records
	addr    string
	served  chan error
}

// newBed makes a server on a clock that stands still, with every connection
// attested as pod A's, and serves it on loopback. change may alter the Config.
func newBed(t testing.TB, change func(*Config, *bed)) *bed {
	t.Helper()
	b := &bed{clock: newClock(), pod: podOf(podA), records: &records{}, served: make(chan error, 1)}
	b.tokens = &tokens{clock: b.clock, expiry: b.clock.Now().Add(time.Hour)}
	cfg := Config{
		Attestor:    attestAll(b.pod),
		Tokens:      b.tokens,
		Credentials: credentialsFunc(cached),
		Hosts:       []string{"169.254.170.23", "fd00:ec2::23", "127.0.0.1"},
		Observer:    b.records,
		Now:         b.clock.Now,
		Limits:      Limits{Patience: -1},
	}
	if change != nil {
		change(&cfg, b)
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	b.Server = s
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b.addr = ln.Addr().String()
	go func() { b.served <- s.Serve(ln) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithCancel(context.Background())
		cancel() // Whatever is left is cut.
		_ = s.Shutdown(ctx)
	})
	return b
}

// client is a raw connection.
type client struct {
	t testing.TB
	net.Conn
	r *bufio.Reader
}

func (b *bed) dial(t testing.TB) *client {
	t.Helper()
	nc, err := net.Dial("tcp4", b.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = nc.Close() })
	// A test that is stuck fails instead of hanging.
	if err := nc.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	return &client{t: t, Conn: nc, r: bufio.NewReader(nc)}
}

func (c *client) send(text string) {
	c.t.Helper()
	if _, err := io.WriteString(c.Conn, text); err != nil {
		c.t.Fatal(err)
	}
}

// reply is a response, read to its end.
type reply struct {
	*http.Response
	text string
}

func (c *client) receive(method string) reply {
	c.t.Helper()
	r, err := c.tryReceive(method)
	if err != nil {
		c.t.Fatalf("no reply: %v", err)
	}
	return r
}

func (c *client) tryReceive(method string) (reply, error) {
	resp, err := http.ReadResponse(c.r, &http.Request{Method: method})
	if err != nil {
		return reply{}, err
	}
	text, err := io.ReadAll(resp.Body)
	return reply{resp, string(text)}, err
}

func (c *client) ask(text string) reply {
	c.t.Helper()
	c.send(text)
	method, _, _ := strings.Cut(text, " ")
	return c.receive(method)
}

// ended reads until the server has closed the connection.
func (c *client) ended() {
	c.t.Helper()
	rest, err := io.ReadAll(c.r)
	if len(rest) > 0 {
		c.t.Fatalf("%d bytes before the end of the connection (%v): %q", len(rest), err, rest)
	}
}

// get is the request of an SDK.
func get(token string, lines ...string) string {
	head := "GET /v1/credentials HTTP/1.1\r\nHost: 169.254.170.23\r\n"
	if token != "" {
		head += "Authorization: " + token + "\r\n"
	}
	accept := false
	for _, l := range lines {
		head += l + "\r\n"
		accept = accept || strings.HasPrefix(l, "Accept:")
	}
	if !accept {
		// As people's tools do.
		head += "Accept: */*\r\n"
	}
	return head + "\r\n"
}

// failingLog fails the test when something is logged at level error, which is
// how a recovered panic shows.
func failingLog(t *testing.T) *slog.Logger {
	return slog.New(slog.NewTextHandler(failingWriter{t}, &slog.HandlerOptions{Level: slog.LevelError}))
}

type failingWriter struct{ t *testing.T }

func (w failingWriter) Write(p []byte) (int, error) {
	w.t.Errorf("logged: %s", p)
	return len(p), nil
}
