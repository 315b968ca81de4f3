// SPDX-License-Identifier: Apache-2.0

package credserver

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
	"github.com/latchkey-dev/latchkey/pkg/verdict"
)

// until waits for something that another goroutine is about to do. It gives
// the processor away instead of sleeping, and gives up when it must be stuck.
func until(t *testing.T, what string, done func() bool) {
	t.Helper()
	stuck := time.Now().Add(time.Minute)
	for !done() {
		if time.Now().After(stuck) {
			t.Fatal("waiting for ", what)
		}
		runtime.Gosched()
	}
}

// states counts the server's connections by what they are doing.
func (b *bed) states(state int32) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := 0
	for c := range b.conns {
		if c.state.Load() == state {
			n++
		}
	}
	return n
}

// A connection kept alive is judged again at each request.
func TestKeepAliveChecksThatThePodLives(t *testing.T) {
	b := newBed(t, nil)
	c := b.dial(t)
	if r := c.ask(get(tokenA)); r.StatusCode != 200 {
		t.Fatalf("got %d %q", r.StatusCode, r.text)
	}
	b.pod.ended.Store(true)
	r := c.ask(get(tokenA))
	if r.StatusCode != 403 || !r.Close || b.records.last(t).Reason != evidence.ReasonPodEnded {
		t.Fatalf("after the pod's end: got %d %q, closing %v", r.StatusCode, r.text, r.Close)
	}
	c.ended()
}

func TestKeepAliveChecksTokenExpiry(t *testing.T) {
	b := newBed(t, nil)
	c := b.dial(t)
	if r := c.ask(get(tokenA)); r.StatusCode != 200 {
		t.Fatalf("got %d %q", r.StatusCode, r.text)
	}
	b.clock.Advance(time.Hour)
	r := c.ask(get(tokenA))
	if r.StatusCode != 400 || r.text != "Service account token failed basic claim validations: token is expired\n" {
		t.Fatalf("past the expiry: got %d %q", r.StatusCode, r.text)
	}
	// What was remembered of the old token must not serve for another.
	if r := c.ask(get(tokenB)); r.StatusCode != 400 {
		t.Fatalf("another expired token: got %d %q", r.StatusCode, r.text)
	}
}

// A pod that ends while its request waits for the upstream gets nothing.
func TestPodEndsDuringFetch(t *testing.T) {
	b := newBed(t, func(cfg *Config, b *bed) {
		cfg.Credentials = credentialsFunc(func(context.Context, CredentialRequest) (Credential, error) {
			b.pod.ended.Store(true)
			return Credential{Body: []byte(bodyA)}, nil
		})
	})
	if r := b.dial(t).ask(get(tokenA)); r.StatusCode != 403 {
		t.Fatalf("got %d %q", r.StatusCode, r.text)
	}
}

// TestTokenIsVerifiedOnce: never again on its connection, nor on another of
// the same pod; always on those of another pod.
func TestTokenIsVerifiedOnce(t *testing.T) {
	var attested atomic.Pointer[pod]
	b := newBed(t, func(cfg *Config, b *bed) {
		attested.Store(b.pod)
		cfg.Attestor = attestorFunc(func(net.Conn) (evidence.Attestation, Liveness) {
			p := attested.Load()
			return p.attestation, p
		})
	})
	ask := func(c *client, token string, status int) {
		t.Helper()
		if r := c.ask(get(token)); r.StatusCode != status {
			t.Fatalf("got %d %q, want %d", r.StatusCode, r.text, status)
		}
	}
	verified := func(n int64, why string) {
		t.Helper()
		if got := b.tokens.calls.Load(); got != n {
			t.Fatalf("%s: %d verifications, want %d", why, got, n)
		}
	}
	first := b.dial(t)
	for range 10 {
		ask(first, tokenA, 200)
	}
	verified(1, "one connection")
	ask(b.dial(t), tokenA, 200)
	verified(1, "a second connection of the pod")

	ask(first, tokenB, 403)
	verified(2, "another token")
	ask(first, tokenA, 200)
	ask(first, tokenB, 403)
	verified(2, "both are remembered")
	ask(first, tokenA[:len(tokenA)-1]+"x", 400)
	verified(3, "one byte differs")
	ask(first, tokenA, 200)
	verified(3, "a bad token is not remembered, and pushes nothing out")

	attested.Store(podOf(podB))
	ask(b.dial(t), tokenA, 403)
	verified(4, "another pod has its own memory")

	b.tokens.generation.Add(1)
	ask(first, tokenA, 200)
	verified(5, "the keys changed")
	ask(first, tokenA, 200)
	verified(5, "and no more after that")
	b.clock.Advance(5 * time.Minute)
	ask(first, tokenA, 200)
	verified(6, "a memory of five minutes")

	b.tokens.down.Store(&tokenError{reason: evidence.ReasonKeysUnavailable, message: "no keys", retriable: true})
	ask(first, tokenA, 200)
	ask(first, "some.other.token", 503)
	if b.records.last(t).Reason != evidence.ReasonKeysUnavailable {
		t.Errorf("observed %+v", b.records.last(t))
	}
}

// A token that is verified again takes its old place in its pod's memory.
func TestTokenMemoryHoldsATokenOnce(t *testing.T) {
	b := newBed(t, nil)
	c := b.dial(t)
	c.ask(get(tokenA))
	b.ledger.mu.Lock()
	account := b.ledger.pods[podA]
	b.ledger.mu.Unlock()
	for range 3 * knownPerPod {
		b.tokens.generation.Add(1)
		if r := c.ask(get(tokenA)); r.StatusCode != 200 {
			t.Fatalf("got %d %q", r.StatusCode, r.text)
		}
	}
	held := 0
	for i := range account.known {
		if account.known[i].Load() != nil {
			held++
		}
	}
	if held != 1 {
		t.Errorf("one token is held %d times", held)
	}
}

// The request after a body is found, however the body was sent.
func TestBodiesDoNotDesyncKeepAlive(t *testing.T) {
	head := "POST /v1/credentials HTTP/1.1\r\nHost: 169.254.170.23\r\nAuthorization: " + tokenA + "\r\n"
	inner := get(tokenB) // Must never be taken for a request.
	for name, send := range map[string]string{
		"Content-Length":       head + fmt.Sprintf("Content-Length: %d\r\n\r\n%s", len(inner), inner),
		"chunked":              head + fmt.Sprintf("Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n", len(inner), inner),
		"chunked with trailer": head + fmt.Sprintf("Transfer-Encoding: chunked\r\n\r\n%x;ext\r\n%s\r\n0\r\nX-T: 1\r\n\r\n", len(inner), inner),
		"GET with a body":      strings.Replace(head, "POST", "GET", 1) + fmt.Sprintf("Content-Length: %d\r\n\r\n%s", len(inner), inner),
		"HEAD with a body":     strings.Replace(head, "POST", "HEAD", 1) + fmt.Sprintf("Content-Length: %d\r\n\r\n%s", len(inner), inner),
		"refused, with a body": strings.Replace(head, "/v1", "/v2", 1) + fmt.Sprintf("Content-Length: %d\r\n\r\n%s", len(inner), inner),
		"multipart":            head + fmt.Sprintf("Content-Type: multipart/form-data; boundary=x\r\nContent-Length: %d\r\n\r\n%s", len(inner), inner),
		"length and chunked":   head + fmt.Sprintf("Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n", len(inner), inner),
	} {
		t.Run(name, func(t *testing.T) {
			b := newBed(t, nil)
			c := b.dial(t)
			r := c.ask(send)
			if want := map[bool]int{true: 404, false: 200}[strings.Contains(send, "/v2/")]; r.StatusCode != want {
				t.Fatalf("got %d %q, want %d", r.StatusCode, r.text, want)
			}
			if r := c.ask(get(tokenA)); r.StatusCode != 200 || r.text != bodyA {
				t.Fatalf("the next request: got %d %q", r.StatusCode, r.text)
			}
			if n := b.records.count(evidence.ReasonPodMismatch); n != 0 {
				t.Error("a body was read as a request")
			}
		})
	}
}

func TestExpectContinue(t *testing.T) {
	b := newBed(t, nil)
	c := b.dial(t)
	c.send("POST /v1/credentials HTTP/1.1\r\nHost: 169.254.170.23\r\nAuthorization: " + tokenA +
		"\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
	line, err := c.r.ReadString('\n')
	if err != nil || !strings.HasPrefix(line, "HTTP/1.1 100") {
		t.Fatalf("got %q, %v", line, err)
	}
	if _, err := c.r.ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	if r := c.ask("hello"); r.StatusCode != 200 || r.text != bodyA {
		t.Fatalf("got %d %q", r.StatusCode, r.text)
	}
	if r := c.ask(get(tokenA)); r.StatusCode != 200 {
		t.Fatalf("the next request: got %d %q", r.StatusCode, r.text)
	}
}

func TestPipelining(t *testing.T) {
	b := newBed(t, nil)
	c := b.dial(t)
	c.send(get(tokenA) + get(tokenB) + get("") + get(tokenA) + get(tokenA, "Connection: close"))
	for i, want := range []int{200, 403, 400, 200, 200} {
		if r := c.receive("GET"); r.StatusCode != want || r.Close != (i == 4) {
			t.Fatalf("reply %d: got %d %q", i, r.StatusCode, r.text)
		}
	}
	c.ended()
}

// The reference takes heads of 1 MB; a token is 16 KiB at most.
func TestHeadSize(t *testing.T) {
	b := newBed(t, nil)
	big := strings.Repeat("x", 16<<10)
	if r := b.dial(t).ask(get(big)); r.StatusCode != 400 || b.records.last(t).Reason != evidence.ReasonTokenMalformed {
		t.Fatalf("a token of 16 KiB is to be judged by the verifier: got %d %q", r.StatusCode, r.text)
	}
	for _, size := range []int{24 << 10, 100 << 10, 200 << 10} {
		c := b.dial(t)
		// The client reads while it writes, as clients do: the server need not
		// take all of it.
		go func() {
			_, _ = io.WriteString(c.Conn, get(tokenA, "X-Big: "+strings.Repeat("x", size)))
		}()
		r, err := c.tryReceive("GET")
		if err != nil {
			t.Fatalf("%d bytes: %v", size, err)
		}
		if r.StatusCode != 431 || !r.Close || r.text != "431 Request Header Fields Too Large\n" {
			t.Fatalf("%d bytes: got %d %q", size, r.StatusCode, r.text)
		}
	}
}

// Slowloris: a trickle of bytes does not extend the time a head may take.
func TestSlowHead(t *testing.T) {
	b := newBed(t, nil)
	c := b.dial(t)
	c.send("GET /v1/credentials HTTP/1.1\r\n")
	until(t, "the first bytes", func() bool { return b.states(stateActive) == 1 })
	b.clock.Advance(4 * time.Second)
	b.sweep()
	c.send("Host: 169.254.170.23\r\n")
	b.clock.Advance(time.Second)
	b.sweep()
	if r := c.receive("GET"); r.StatusCode != 408 || !r.Close {
		t.Fatalf("got %d %q", r.StatusCode, r.text)
	}
	c.ended()
}

// A connection that says nothing is closed and told nothing: its client would
// take it for the reply to what it sends next.
func TestSilentConnection(t *testing.T) {
	b := newBed(t, nil)
	c := b.dial(t)
	until(t, "the connection", func() bool { return b.Stats().Connections == 1 })
	b.clock.Advance(DefaultHeadTimeout)
	b.sweep()
	c.ended()
	until(t, "its end", func() bool { return b.Stats().Connections == 0 })
}

func TestIdleConnection(t *testing.T) {
	b := newBed(t, nil)
	c := b.dial(t)
	c.ask(get(tokenA))
	until(t, "idleness", func() bool { return b.states(stateIdle) == 1 })
	b.clock.Advance(DefaultIdleTimeout - time.Second)
	b.sweep()
	if r := c.ask(get(tokenA)); r.StatusCode != 200 {
		t.Fatalf("before the timeout: got %d", r.StatusCode)
	}
	until(t, "idleness", func() bool { return b.states(stateIdle) == 1 })
	b.clock.Advance(DefaultIdleTimeout)
	b.sweep()
	c.ended()
}

// A deadline that the sweep has just enforced is void once a request is there.
func TestStaleDeadline(t *testing.T) {
	b := newBed(t, nil)
	c := b.dial(t)
	c.ask(get(tokenA))
	until(t, "idleness", func() bool { return b.states(stateIdle) == 1 })
	b.mu.Lock()
	for sc := range b.conns {
		// As if a deadline long replaced had been told to the socket late.
		_ = sc.Conn.SetReadDeadline(time.Unix(1, 0))
	}
	b.mu.Unlock()
	if r := c.ask(get(tokenA)); r.StatusCode != 200 {
		t.Fatalf("got %d %q", r.StatusCode, r.text)
	}
}

// Whoever does not read its replies is cut off.
func TestSlowReader(t *testing.T) {
	b := newBed(t, func(cfg *Config, _ *bed) {
		cfg.Credentials = credentialsFunc(func(context.Context, CredentialRequest) (Credential, error) {
			return Credential{Body: bytes.Repeat([]byte("x"), 32<<20), Hit: true}, nil
		})
	})
	c := b.dial(t)
	c.send(get(tokenA))
	until(t, "the write to begin", func() bool {
		b.mu.Lock()
		defer b.mu.Unlock()
		for sc := range b.conns {
			return sc.writeBy.Load() != 0
		}
		return false
	})
	b.clock.Advance(DefaultWriteTimeout)
	until(t, "the connection to be cut", func() bool { b.sweep(); return b.Stats().Connections == 0 })
}

// A pod's idle connections are a courtesy that shrinks with their number.
func TestManyIdleConnections(t *testing.T) {
	b := newBed(t, func(cfg *Config, _ *bed) { cfg.Limits.Pod.Connections = 16 })
	var all []*client
	for range 4 {
		c := b.dial(t)
		c.ask(get(tokenA))
		all = append(all, c)
	}
	until(t, "idleness", func() bool { return b.states(stateIdle) == 4 })
	b.clock.Advance(crowdedIdle)
	b.sweep()
	for _, c := range all {
		if r := c.ask(get(tokenA)); r.StatusCode != 200 {
			t.Fatalf("a quarter is no crowd: got %d", r.StatusCode)
		}
	}
	b.dial(t).ask(get(tokenA))
	until(t, "idleness", func() bool { return b.states(stateIdle) == 5 })
	b.clock.Advance(crowdedIdle)
	b.sweep()
	until(t, "the crowd to thin out", func() bool { return b.Stats().Connections <= 4 })
}

// Reference, section 0.2: a pod without any token made a legitimate client
// fail 71 % of the time, because they shared a limit.
func TestRequestLimitIsThePodsOwn(t *testing.T) {
	quiet := podOf(podB)
	var attested atomic.Pointer[pod]
	b := newBed(t, func(cfg *Config, b *bed) {
		cfg.Limits.Pod = Allowance{Rate: 10, Burst: 5}
		attested.Store(b.pod)
		cfg.Attestor = attestorFunc(func(net.Conn) (evidence.Attestation, Liveness) {
			p := attested.Load()
			return p.attestation, p
		})
	})
	flood := b.dial(t)
	for i := range 50 {
		r := flood.ask(get(""))
		want, body := 400, "Service account token cannot be empty\n"
		if i >= 5 {
			want, body = 429, "Too Many Requests\n"
		}
		if r.StatusCode != want || r.text != body || (r.Header.Get("Retry-After") == "1") != (want == 429) {
			t.Fatalf("request %d: got %d %q %v", i, r.StatusCode, r.text, r.Header)
		}
	}
	second := b.dial(t)
	if r := second.ask("GET / HTTP/1.1\r\nHost: x\r\n\r\n"); r.StatusCode != 429 {
		t.Fatalf("another path on another connection escapes the limit: %d", r.StatusCode)
	}
	attested.Store(quiet)
	c := b.dial(t)
	for i := range 5 {
		if r := c.ask(get(tokenB)); r.StatusCode != 200 {
			t.Fatalf("request %d of the quiet pod: got %d %q", i, r.StatusCode, r.text)
		}
	}
	b.clock.Advance(100 * time.Millisecond)
	if r := flood.ask(get(tokenA)); r.StatusCode != 200 {
		t.Fatalf("a tenth of a second is one request: got %d", r.StatusCode)
	}
	if r := flood.ask(get(tokenA)); r.StatusCode != 429 {
		t.Fatalf("and no second one: got %d", r.StatusCode)
	}
}

// A request beyond the rate is held for a moment and then looked at again.
func TestPatience(t *testing.T) {
	b := newBed(t, func(cfg *Config, _ *bed) {
		cfg.Limits = Limits{Pod: Allowance{Rate: 1, Burst: 1}, Patience: time.Millisecond}
	})
	c := b.dial(t)
	if r := c.ask(get(tokenA)); r.StatusCode != 200 {
		t.Fatalf("got %d", r.StatusCode)
	}
	if r := c.ask(get(tokenA)); r.StatusCode != 429 {
		t.Fatalf("the clock stands still: got %d", r.StatusCode)
	}
	b.clock.Advance(time.Second)
	if r := c.ask(get(tokenA)); r.StatusCode != 200 {
		t.Fatalf("got %d", r.StatusCode)
	}
}

func TestConnectionLimitIsThePodsOwn(t *testing.T) {
	quiet := podOf(podB)
	var attested atomic.Pointer[pod]
	b := newBed(t, func(cfg *Config, b *bed) {
		cfg.Limits.Pod.Connections = 3
		cfg.Limits.Stray.Connections = 1
		cfg.Limits.Host.Connections = 1
		attested.Store(b.pod)
		cfg.Attestor = attestorFunc(func(net.Conn) (evidence.Attestation, Liveness) {
			p := attested.Load()
			return p.attestation, p
		})
	})
	var open []*client
	for i := range 3 {
		c := b.dial(t)
		if r := c.ask(get(tokenA)); r.StatusCode != 200 {
			t.Fatalf("connection %d: got %d", i, r.StatusCode)
		}
		open = append(open, c)
	}
	c := b.dial(t)
	if r := c.ask(get(tokenA)); r.StatusCode != 429 || !r.Close || r.Header.Get("Retry-After") != "1" || r.text != "Too Many Requests\n" {
		t.Fatalf("a connection too many: got %d %q %v", r.StatusCode, r.text, r.Header)
	}
	c.ended()
	if b.records.count(evidence.ReasonRateLimited) != 1 {
		t.Error("it was not observed")
	}

	// Other pods, connections without evidence and the host have their own.
	attested.Store(quiet)
	if r := b.dial(t).ask(get(tokenB)); r.StatusCode != 200 {
		t.Fatalf("the quiet pod: got %d", r.StatusCode)
	}
	for finding, want := range map[evidence.Finding]int{evidence.FindingNone: 503, evidence.FindingNotPod: 403} {
		attested.Store(&pod{attestation: evidence.Attestation{Finding: finding}})
		held := b.dial(t)
		held.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n")
		if r := held.receive("GET"); r.StatusCode != 404 {
			t.Fatalf("%v: got %d", finding, r.StatusCode)
		}
		if r := b.dial(t).ask(get(tokenA)); r.StatusCode != 429 {
			t.Fatalf("%v, one too many: got %d", finding, r.StatusCode)
		}
		if r := held.ask(get(tokenA)); r.StatusCode != want {
			t.Fatalf("%v: got %d, want %d", finding, r.StatusCode, want)
		}
	}

	// A connection that ends makes room.
	attested.Store(b.pod)
	_ = open[0].Close()
	until(t, "room", func() bool {
		b.ledger.mu.Lock()
		defer b.ledger.mu.Unlock()
		return b.ledger.pods[podA].conns.Load() == 2
	})
	if r := b.dial(t).ask(get(tokenA)); r.StatusCode != 200 {
		t.Fatalf("after one ended: got %d", r.StatusCode)
	}
}

// Accounts go when their pods have, and never while they hold something back.
func TestAccountsArePruned(t *testing.T) {
	limits, err := Limits{Pod: Allowance{Rate: 0.01, Burst: 10}}.withDefaults(verdict.Policy{})
	if err != nil {
		t.Fatal(err)
	}
	l := newLedger(limits)
	minute := int64(time.Minute)
	for i := range 1000 {
		a, ok := l.open(&evidence.Attestation{Finding: evidence.FindingPod, Pod: evidence.PodUID(fmt.Sprint(i))}, 0)
		if !ok {
			t.Fatal("refused")
		}
		if i == 0 {
			continue // Stays connected.
		}
		if i == 1 {
			for a.bucket.take(0) {
			} // Has used up what fills again in 1000 s.
		}
		l.close(a, 0)
	}
	l.prune(minute)
	if n := l.size(); n != 1000 {
		t.Fatalf("after a minute %d accounts are left", n)
	}
	l.prune(5 * minute)
	if n := l.size(); n != 2 {
		t.Fatalf("after five minutes %d accounts are left, want the connected and the exhausted one", n)
	}
	l.prune(20 * minute)
	if n := l.size(); n != 1 {
		t.Fatalf("after twenty minutes %d accounts are left, want the connected one", n)
	}
}

func TestBucket(t *testing.T) {
	b := newBucket(Allowance{Rate: 10, Burst: 3})
	var got []bool
	for _, ms := range []int64{0, 0, 0, 0, 99, 100, 100, 300, 300, 300, 10_000, 10_000, 10_000, 10_000} {
		got = append(got, b.take(ms*int64(time.Millisecond)))
	}
	want := []bool{true, true, true, false, false, true, false, true, true, false, true, true, true, false}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// Shutdown lets a request in progress finish and closes what is idle.
func TestShutdown(t *testing.T) {
	asked, answer := make(chan struct{}), make(chan struct{})
	b := newBed(t, func(cfg *Config, _ *bed) {
		cfg.Credentials = credentialsFunc(func(ctx context.Context, r CredentialRequest) (Credential, error) {
			if r.Token.Subject == subjectA {
				close(asked)
				<-answer
			}
			return cached(ctx, r)
		})
		cfg.Attestor, cfg.Policy.Default = nil, verdict.Off
	})
	idle, silent, busy := b.dial(t), b.dial(t), b.dial(t)
	idle.ask(get(tokenB))
	busy.send(get(tokenA))
	<-asked
	until(t, "idleness", func() bool { return b.states(stateIdle) == 1 && b.states(stateNew) == 1 })

	done := make(chan error, 1)
	go func() { done <- b.Shutdown(t.Context()) }()
	idle.ended()
	silent.ended()
	if err := <-b.served; err != nil {
		t.Fatalf("Serve: %v", err)
	}
	select {
	case err := <-done:
		t.Fatalf("Shutdown did not wait: %v", err)
	default:
	}
	if _, err := net.Dial("tcp4", b.addr); err == nil {
		t.Error("still accepting")
	}
	close(answer)
	if r := busy.receive("GET"); r.StatusCode != 200 || r.text != bodyA || !r.Close {
		t.Fatalf("the request in progress: got %d %q, closing %v", r.StatusCode, r.text, r.Close)
	}
	if err := <-done; err != nil {
		t.Fatalf("Shutdown: %v", err)
	}
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Serve(ln); !errors.Is(err, ErrClosed) {
		t.Errorf("Serve after Shutdown: %v", err)
	}
	if _, err := ln.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("and leaves the listener open: %v", err)
	}
	if err := b.Shutdown(t.Context()); err != nil {
		t.Errorf("a second Shutdown: %v", err)
	}
}

// When its context ends, Shutdown cuts what is left, and what waits stops.
func TestShutdownCutsOff(t *testing.T) {
	asked := make(chan struct{})
	b := newBed(t, func(cfg *Config, _ *bed) {
		cfg.WaitTimeout = time.Hour
		cfg.Credentials = credentialsFunc(func(ctx context.Context, _ CredentialRequest) (Credential, error) {
			close(asked)
			<-ctx.Done()
			return Credential{}, ctx.Err()
		})
	})
	c := b.dial(t)
	c.send(get(tokenA))
	<-asked
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := b.Shutdown(ctx); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
	until(t, "the connection's end", func() bool { return b.Stats().Connections == 0 })
	if rec := b.records.last(t); rec.Reason != evidence.ReasonStopping || rec.Status != 503 {
		t.Errorf("observed %+v", rec)
	}
}

// brokenListener fails as told and then delivers.
type brokenListener struct {
	net.Listener
	mu   sync.Mutex
	errs []error
}

func (l *brokenListener) Accept() (net.Conn, error) {
	l.mu.Lock()
	if len(l.errs) > 0 {
		err := l.errs[0]
		l.errs = l.errs[1:]
		l.mu.Unlock()
		return nil, err
	}
	l.mu.Unlock()
	return l.Listener.Accept()
}

func accepting(errno syscall.Errno) error {
	return &net.OpError{Op: "accept", Net: "tcp", Err: os.NewSyscallError("accept4", errno)}
}

// Reference, section 0.9: a family that fails took the other one with it. And
// running out of descriptors must not end a listener: that would be an outage
// which any pod could cause.
func TestListenersFailAlone(t *testing.T) {
	b := newBed(t, nil)
	first, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	second, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	bad := accepting(syscall.EBADF)
	done := make(chan error, 1)
	go func() {
		done <- b.Serve(&brokenListener{Listener: first, errs: []error{bad}},
			&brokenListener{Listener: second, errs: []error{accepting(syscall.EMFILE), accepting(syscall.ECONNABORTED), accepting(syscall.ENOBUFS)}})
	}()
	for _, addr := range []string{b.addr, second.Addr().String()} {
		nc, err := net.Dial("tcp4", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		old := b.addr
		b.addr = addr
		if r := b.dial(t).ask(get(tokenA)); r.StatusCode != 200 {
			t.Fatalf("got %d", r.StatusCode)
		}
		b.addr = old
	}
	// Closing one on purpose, as when its address goes away, is no failure.
	_ = second.Close()
	if err := <-done; !errors.Is(err, syscall.EBADF) || errors.Is(err, net.ErrClosed) {
		t.Fatalf("Serve: %v", err)
	}
	if r := b.dial(t).ask(get(tokenA)); r.StatusCode != 200 {
		t.Fatalf("got %d", r.StatusCode)
	}
}

func TestListen(t *testing.T) {
	for _, addr := range []string{"127.0.0.1:0", "[::ffff:127.0.0.1]:0", "[::1]:0"} {
		ln, err := Listen(t.Context(), netip.MustParseAddrPort(addr))
		if err != nil {
			if strings.HasPrefix(addr, "[::1]") {
				t.Logf("no IPv6 here: %v", err)
				continue
			}
			t.Fatal(err)
		}
		raw, err := ln.(*net.TCPListener).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		if err := raw.Control(func(fd uintptr) {
			if p, err := syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, 38 /* SO_PROTOCOL */); err != nil || p != syscall.IPPROTO_TCP {
				t.Errorf("%s: protocol %d, %v; want plain TCP", addr, p, err)
			}
			if v, err := syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, 15 /* SO_REUSEPORT */); err != nil || v != 0 {
				t.Errorf("%s: SO_REUSEPORT %d, %v", addr, v, err)
			}
		}); err != nil {
			t.Fatal(err)
		}
		_ = ln.Close()
	}
	taken, err := Listen(t.Context(), netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	if _, err := Listen(t.Context(), netip.MustParseAddrPort(taken.Addr().String())); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("an address in use: %v", err)
	}
}

// A wait ends with the client's patience; what it waited for is not told.
func TestWaitTimeout(t *testing.T) {
	b := newBed(t, func(cfg *Config, b *bed) {
		cfg.WaitTimeout = time.Millisecond
		cfg.Credentials = credentialsFunc(func(ctx context.Context, r CredentialRequest) (Credential, error) {
			if b.tokens.calls.Load() > 1 {
				return cached(ctx, r)
			}
			<-ctx.Done()
			return Credential{}, ctx.Err()
		})
	})
	c := b.dial(t)
	if r := c.ask(get(tokenA)); r.StatusCode != 500 || r.text != "The credential service has not answered yet. Retry.\n" {
		t.Fatalf("got %d %q", r.StatusCode, r.text)
	}
	b.tokens.generation.Add(1)
	if r := c.ask(get(tokenA)); r.StatusCode != 200 {
		t.Fatalf("the next request has a wait of its own: got %d %q", r.StatusCode, r.text)
	}
	b.tokens.wait = true
	b.tokens.generation.Add(1)
	if r := c.ask(get(tokenA)); r.StatusCode != 503 {
		t.Fatalf("waiting for keys: got %d %q", r.StatusCode, r.text)
	}
}

// A wait that nobody began costs nothing and serves again.
func TestWaitContext(t *testing.T) {
	parent, cancel := context.WithCancel(t.Context())
	w := &waitContext{parent: parent, patience: time.Hour}
	if w.Err() != nil || w.end() {
		t.Fatal("the wait began by itself")
	}
	if deadline, ok := w.Deadline(); !ok || time.Until(deadline) > time.Hour {
		t.Fatalf("deadline %v, %v", deadline, ok)
	}
	child, stop := context.WithCancel(w)
	defer stop()
	cancel()
	<-child.Done()
	if !errors.Is(w.Err(), context.Canceled) || !w.end() {
		t.Fatalf("after the parent's end: %v", w.Err())
	}
	if late := (&waitContext{parent: parent, patience: time.Hour}); late.Err() == nil {
		t.Error("a wait under an ended parent has not ended")
	}
}

// A defect in one request ends neither the agent nor gives anything away.
func TestPanic(t *testing.T) {
	var log bytes.Buffer
	b := newBed(t, func(cfg *Config, _ *bed) {
		cfg.Logger = slog.New(slog.NewJSONHandler(&log, nil))
		cfg.Credentials = credentialsFunc(func(ctx context.Context, r CredentialRequest) (Credential, error) {
			if r.Token.Subject == subjectA {
				panic("with " + r.Raw)
			}
			return cached(ctx, r)
		})
		cfg.Attestor, cfg.Policy.Default = nil, verdict.Off
	})
	c := b.dial(t)
	if r := c.ask(get(tokenA)); r.StatusCode != 500 || r.text != "Internal error\n" || !r.Close {
		t.Fatalf("got %d %q", r.StatusCode, r.text)
	}
	c.ended()
	if rec := b.records.last(t); rec.Reason != ReasonInternal || rec.Status != 500 {
		t.Errorf("observed %+v", rec)
	}
	if r := b.dial(t).ask(get(tokenB)); r.StatusCode != 200 {
		t.Fatalf("the next one: got %d", r.StatusCode)
	}
	if s := log.String(); !strings.Contains(s, "recovered from a panic") || strings.Contains(s, tokenA) {
		t.Errorf("the log: %s", s)
	}
}

func TestAttestorPanics(t *testing.T) {
	var broken atomic.Bool
	broken.Store(true)
	b := newBed(t, func(cfg *Config, b *bed) {
		cfg.Attestor = attestorFunc(func(net.Conn) (evidence.Attestation, Liveness) {
			if broken.Load() {
				panic(errors.New("broken"))
			}
			return b.pod.attestation, b.pod
		})
	})
	b.dial(t).ended()
	broken.Store(false)
	if r := b.dial(t).ask(get(tokenA)); r.StatusCode != 200 {
		t.Fatalf("got %d", r.StatusCode)
	}
	until(t, "the broken one to be forgotten", func() bool { return b.Stats().Connections == 1 })
}

// Nothing that a client sends, and no credential, reaches the log.
func TestLogHoldsNoSecret(t *testing.T) {
	var log bytes.Buffer
	b := newBed(t, func(cfg *Config, _ *bed) {
		cfg.Logger = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	})
	for _, send := range []string{
		get(tokenA), get(tokenB), get("Bearer " + tokenA), "GET" + tokenA + "\r\n\r\n",
		get(tokenA + "\x01"), "GET " + tokenA + " HTTP/9.9\r\n\r\n", get(tokenA, "X y: "+tokenA),
		get(tokenA, "X: "+strings.Repeat(tokenA, 2000)),
	} {
		c := b.dial(t)
		go func() { _, _ = io.WriteString(c.Conn, send) }()
		if _, err := c.tryReceive("GET"); err != nil {
			t.Fatalf("no reply to %.60q: %v", send, err)
		}
	}
	if strings.Contains(log.String(), "payload") || strings.Contains(log.String(), "secret") {
		t.Errorf("the log: %s", &log)
	}
	b.records.mu.Lock()
	defer b.records.mu.Unlock()
	if s := fmt.Sprintf("%+v", b.records.all); strings.Contains(s, "payload-of-pod") || strings.Contains(s, "secret-of") {
		t.Errorf("a record holds a secret: %s", s)
	}
}

// Resets, half-closed connections and silence leave nothing behind.
func TestRudeClients(t *testing.T) {
	b := newBed(t, nil)
	for i, send := range []string{"", "G", get(tokenA)[:40], get(tokenA), get(tokenA) + "GET", "\r\n\r\n\r\n", "\x00\x01\x02", "\x16\x03\x01\x02\x00\x01\x00"} {
		c := b.dial(t)
		c.send(send)
		tcp := c.Conn.(*net.TCPConn)
		switch i % 3 {
		case 0:
			_ = tcp.SetLinger(0)
			_ = tcp.Close()
		case 1:
			_ = tcp.CloseWrite()
			_, _ = io.ReadAll(c.r)
		case 2:
			_ = tcp.Close()
		}
	}
	until(t, "all to be gone", func() bool { return b.Stats().Connections == 0 })
	if r := b.dial(t).ask(get(tokenA)); r.StatusCode != 200 {
		t.Fatalf("got %d", r.StatusCode)
	}
}

// A half-closed client still gets its answer.
func TestHalfClosed(t *testing.T) {
	b := newBed(t, nil)
	c := b.dial(t)
	c.send(get(tokenA))
	if err := c.Conn.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if r := c.receive("GET"); r.StatusCode != 200 || r.text != bodyA {
		t.Fatalf("got %d %q", r.StatusCode, r.text)
	}
	c.ended()
}

// One pod opens thousands of connections and says nothing on them. It gets its
// own allowance of them; a quiet pod does not notice.
func TestFloodOfConnections(t *testing.T) {
	loud, quiet := podOf(podA), podOf(podB)
	loudAddr := netip.MustParseAddr("127.0.0.2")
	b := newBed(t, func(cfg *Config, _ *bed) {
		cfg.Attestor = attestorFunc(func(nc net.Conn) (evidence.Attestation, Liveness) {
			if nc.RemoteAddr().(*net.TCPAddr).AddrPort().Addr() == loudAddr {
				return loud.attestation, loud
			}
			return quiet.attestation, quiet
		})
		cfg.Limits = Limits{} // The defaults.
	})
	const flood = 3000
	started, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: loudAddr.AsSlice()}}
		for i := range flood {
			nc, err := d.DialContext(t.Context(), "tcp4", b.addr)
			if err != nil {
				t.Errorf("connection %d: %v", i, err)
				return
			}
			defer nc.Close()
			if i == flood/10 {
				close(started)
			}
		}
	}()
	<-started
	for i := range 200 {
		c := b.dial(t)
		if r := c.ask(get(tokenB)); r.StatusCode != 200 {
			t.Fatalf("request %d of the quiet pod: got %d %q", i, r.StatusCode, r.text)
		}
		_ = c.Close()
	}
	<-done
	b.ledger.mu.Lock()
	held := b.ledger.pods[podA].conns.Load()
	b.ledger.mu.Unlock()
	if held > 256 {
		t.Errorf("the flooding pod held %d connections", held)
	}
	until(t, "the excess to be gone", func() bool { return b.Stats().Connections <= 256 })
	if b.records.count(evidence.ReasonRateLimited) == 0 {
		t.Error("nothing was turned away")
	}
}

// Many connections and pods at once, for the race detector.
func TestConcurrentPods(t *testing.T) {
	pods := []*pod{podOf(podA), podOf(podB)}
	var n atomic.Int64
	b := newBed(t, func(cfg *Config, _ *bed) {
		cfg.Attestor = attestorFunc(func(net.Conn) (evidence.Attestation, Liveness) {
			p := pods[n.Add(1)%2]
			return p.attestation, p
		})
		cfg.Limits.Pod = Allowance{Rate: 1e6, Burst: 1e5}
	})
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() {
			c := b.dial(t)
			for i := range 50 {
				token, body := tokenA, bodyA
				if i%2 == 0 {
					token, body = tokenB, bodyB
				}
				if _, err := io.WriteString(c.Conn, get(token)); err != nil {
					t.Error(err)
					return
				}
				r, err := c.tryReceive("GET")
				if err != nil || r.StatusCode == 200 && r.text != body || r.StatusCode != 200 && r.StatusCode != 403 {
					t.Errorf("got %+v, %v", r, err)
					return
				}
				b.sweep()
			}
		})
	}
	wg.Wait()
	if served, refused := b.records.count(evidence.ReasonServed), b.records.count(evidence.ReasonPodMismatch); served != 800 || refused != 800 {
		t.Errorf("served %d and refused %d of 1600, want half each", served, refused)
	}
}
