// SPDX-License-Identifier: Apache-2.0

package credserver

import (
	"bufio"
	"bytes"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

// memoryConn delivers what it holds, a few bytes at a time, and ends.
type memoryConn struct {
	net.Conn
	in    *bytes.Reader
	piece int
	out   bytes.Buffer
	ended bool
}

func (c *memoryConn) Read(p []byte) (int, error) {
	if len(p) > c.piece {
		p = p[:c.piece]
	}
	return c.in.Read(p)
}

func (c *memoryConn) Write(p []byte) (int, error) { return c.out.Write(p) }
func (c *memoryConn) Close() error                { c.ended = true; return nil }
func (c *memoryConn) LocalAddr() net.Addr         { return &net.TCPAddr{} }
func (c *memoryConn) RemoteAddr() net.Addr        { return &net.TCPAddr{} }

// FuzzRequestHead sends anything at all. The server must not panic, must close
// the connection, and must write nothing but well-formed responses; pod A must
// never be given anything but its own credentials, and those only if its token
// and an allowed host are somewhere in what it sent.
func FuzzRequestHead(f *testing.F) {
	for _, seed := range []string{
		get(tokenA), get(tokenB), get(""), get("Bearer " + tokenA), get(tokenA) + get(tokenB),
		"HEAD /v1/credentials HTTP/1.0\r\nHost: fd00:ec2::23\r\nAuthorization: " + tokenA + "\r\n\r\n",
		"POST http://[fd00:ec2::23]:80/v1/credentials?x HTTP/1.1\r\nHost: x\r\nAuthorization: " + tokenA + "\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n" + get(tokenA),
		"POST /v1/credentials HTTP/1.1\r\nHost: 169.254.170.23\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\nabc",
		"GET /v1/credentials HTTP/1.1\nHost: 169.254.170.23\nAuthorization: " + tokenA + "\n folded\n\n",
		"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "\r\n\r\n", "\x16\x03\x01", "GET / HTTP/1.1\r\nHost: [\r\nAccept: application/json\r\n\r\n",
		get(tokenA, "Content-Length: 99999999999999999999"), get(tokenA, "Connection: close,,"), get(tokenA, "X: "+strings.Repeat("y", 30<<10)),
	} {
		f.Add([]byte(seed), byte(0))
		f.Add([]byte(seed), byte(7))
	}
	f.Fuzz(func(t *testing.T, in []byte, piece byte) {
		obs := &records{}
		b := &bed{clock: newClock(), pod: podOf(podA)}
		b.tokens = &tokens{clock: b.clock, expiry: b.clock.Now().Add(1e12)}
		s, err := New(Config{
			Attestor: attestAll(b.pod), Tokens: b.tokens, Credentials: credentialsFunc(cached), Observer: obs,
			Hosts: []string{"169.254.170.23", "fd00:ec2::23"}, Now: b.clock.Now, Limits: Limits{Patience: -1},
		})
		if err != nil {
			t.Fatal(err)
		}
		s.log = failingLog(t)
		mem := &memoryConn{in: bytes.NewReader(in), piece: 1 << 16}
		if piece != 0 {
			mem.piece = int(piece)
		}
		c := &conn{Conn: mem, server: s}
		s.conns[c] = struct{}{}
		s.run(c)
		if !mem.ended {
			t.Fatal("the connection was left open")
		}
		if st := s.Stats(); st.Connections != 0 || s.ledger.pods[podA].conns.Load() != 0 {
			t.Fatalf("the connection is still counted: %+v", st)
		}
		out := mem.out.String()
		if strings.Contains(out, "secret-of-b") {
			t.Fatal("another pod's credentials")
		}
		if strings.Contains(out, "secret-of-a") {
			if !bytes.Contains(in, []byte(tokenA)) || !bytes.Contains(in, []byte("169.254.170.23")) && !bytes.Contains(in, []byte("fd00:ec2::23")) {
				t.Fatalf("credentials for %q", in)
			}
			if obs.count(evidence.ReasonServed) == 0 {
				t.Fatal("credentials that nobody observed")
			}
		}
		wellFormed(t, out, obs)
	})
}

// wellFormed reads a sequence of responses. HEAD requests make their bodies
// unpredictable from the outside, so it looks at heads only.
func wellFormed(t *testing.T, out string, obs *records) {
	t.Helper()
	heads := 0
	for rest := out; ; heads++ {
		i := strings.Index(rest, "HTTP/1.1 ")
		if i < 0 {
			break
		}
		resp, err := http.ReadResponse(bufio.NewReader(strings.NewReader(rest[i:])), &http.Request{Method: "HEAD"})
		if err != nil {
			t.Fatalf("malformed response: %v in %q", err, rest[i:])
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		_ = resp.Body.Close()
		rest = rest[i+len("HTTP/1.1 "):]
	}
	if out != "" && heads == 0 {
		t.Fatalf("not HTTP: %q", out)
	}
	if heads < len(obs.all) {
		t.Fatalf("%d responses for %d observed requests", heads, len(obs.all))
	}
}

// FuzzHost compares the fast comparison of hosts with what it means.
func FuzzHost(f *testing.F) {
	for _, seed := range []string{"169.254.170.23", "169.254.170.23:80", "[fd00:ec2::23]:80", "fd00:ec2::23", "[fd00:ec2::23]", "a:b:c", "[]", ":", "]:1", "[::]:", "[169.254.170.23]:99999"} {
		f.Add(seed)
	}
	s := &Server{hosts: []string{"169.254.170.23", "fd00:ec2::23"}}
	f.Fuzz(func(t *testing.T, authority string) {
		allowed := s.hostAllowed([]byte(authority))
		want := false
		for _, h := range s.hosts {
			for _, form := range []string{h, "[" + h + "]"} {
				rest, ok := strings.CutPrefix(authority, form)
				if !ok {
					continue
				}
				port, ok := strings.CutPrefix(rest, ":")
				// Without brackets, an IPv6 address cannot have a port.
				if rest == "" || ok && digits([]byte(port)) && (form != h || !strings.Contains(h, ":")) {
					want = true
				}
			}
		}
		if allowed != want {
			t.Fatalf("%q: allowed %v, want %v", authority, allowed, want)
		}
	})
}
