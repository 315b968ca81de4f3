// SPDX-License-Identifier: Apache-2.0

package credserver

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/valyala/fasthttp"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

// benchToken has the size of a projected token.
func benchToken() string {
	b := make([]byte, 950)
	_, _ = rand.Read(b)
	return base64.RawURLEncoding.EncodeToString(b)
}

// anyToken is a TokenVerifier that accepts everything as pod A's.
type anyToken struct{}

func (anyToken) Verify(context.Context, string) (evidence.Token, error) {
	return evidence.Token{Subject: subjectA, Verified: true, Expiry: time.Now().Add(time.Hour)}, nil
}

// countObserver is as cheap as an observer can be.
type countObserver struct{ hits uint64 }

func (c *countObserver) Observe(r Record) {
	if r.Hit {
		c.hits++
	}
}

func benchServer(tb testing.TB, observer Observer) *Server {
	tb.Helper()
	body := bytes.Repeat([]byte("x"), 1300)
	expiry := time.Now().Add(time.Hour)
	s, err := New(Config{
		Attestor: attestAll(podOf(podA)),
		Tokens:   anyToken{},
		Credentials: credentialsFunc(func(context.Context, CredentialRequest) (Credential, error) {
			return Credential{Body: body, Expiry: expiry, Hit: true}, nil
		}),
		Hosts:    []string{"169.254.170.23", "fd00:ec2::23", "127.0.0.1"},
		Observer: observer,
		Limits:   Limits{Pod: Allowance{Rate: 1e9, Burst: 1e6, Connections: 4096}},
	})
	if err != nil {
		tb.Fatal(err)
	}
	return s
}

// BenchmarkHandlerHit is the endpoint's own part of a cached answer: from the
// parsed head to the response ready to be written.
func BenchmarkHandlerHit(b *testing.B) {
	observer := &countObserver{}
	s := benchServer(b, observer)
	near, far := net.Pipe()
	defer near.Close()
	defer far.Close()
	c := &conn{Conn: near, server: s}
	c.input.Policy = s.policy
	c.input.Attestation, c.live = s.attestor.Attest(near)
	c.account, _ = s.ledger.open(&c.input.Attestation, 0)
	var ctx fasthttp.RequestCtx
	ctx.Init2(c, silent{}, false)
	head := get(benchToken(), "Accept: application/json", "User-Agent: aws-sdk-go-v2/1.47", "Accept-Encoding: gzip")
	if err := ctx.Request.Header.Read(bufio.NewReader(strings.NewReader(head))); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		ctx.Response.Reset()
		s.handle(&ctx)
		if ctx.Response.StatusCode() != fasthttp.StatusOK {
			b.Fatalf("status %d: %s", ctx.Response.StatusCode(), ctx.Response.Body())
		}
	}
	if observer.hits == 0 {
		b.Fatal("no hit was observed")
	}
}

// repeatConn is a connection on which the same request comes over and over.
type repeatConn struct {
	net.Conn
	request []byte
	left    int
	written int
}

func (c *repeatConn) Read(p []byte) (int, error) {
	if c.left == 0 {
		return 0, io.EOF
	}
	c.left--
	return copy(p, c.request), nil
}

func (c *repeatConn) Write(p []byte) (int, error) { c.written += len(p); return len(p), nil }
func (c *repeatConn) Close() error                { return nil }
func (c *repeatConn) LocalAddr() net.Addr         { return &net.TCPAddr{} }
func (c *repeatConn) RemoteAddr() net.Addr        { return &net.TCPAddr{} }

// BenchmarkConnectionHit is a cached answer on a kept-alive connection with
// everything but the kernel: head in, reply out.
func BenchmarkConnectionHit(b *testing.B) {
	s := benchServer(b, &countObserver{})
	head := get(benchToken(), "Accept: application/json", "User-Agent: aws-sdk-go-v2/1.47", "Accept-Encoding: gzip")
	b.Run("latchkey", func(b *testing.B) {
		b.ReportAllocs()
		c := &conn{Conn: &repeatConn{request: []byte(head), left: b.N}, server: s}
		s.conns[c] = struct{}{}
		b.ResetTimer()
		s.run(c)
		if c.Conn.(*repeatConn).written < b.N*1300 {
			b.Fatal("not every request was answered")
		}
	})
	b.Run("bare", func(b *testing.B) {
		b.ReportAllocs()
		c := &repeatConn{request: []byte(head), left: b.N}
		srv := bareServer()
		b.ResetTimer()
		_ = srv.ServeConn(c)
		if c.written < b.N*1300 {
			b.Fatal("not every request was answered")
		}
	})
}

// BenchmarkOneConnectionEachHit is a cached answer with a connection of its
// own, without the kernel: attested, charged, its token found in the pod's
// memory, answered, closed.
func BenchmarkOneConnectionEachHit(b *testing.B) {
	s := benchServer(b, &countObserver{})
	head := []byte(get(benchToken(), "Accept: application/json", "Connection: close"))
	b.ReportAllocs()
	for b.Loop() {
		raw := &repeatConn{request: head, left: 1}
		c := &conn{Conn: raw, server: s}
		s.conns[c] = struct{}{}
		s.run(c)
		if raw.written < 1300 {
			b.Fatal("not answered")
		}
	}
}

// bareServer is fasthttp writing fixed bytes: what the engine alone costs.
func bareServer() *fasthttp.Server {
	body := bytes.Repeat([]byte("x"), 1300)
	return &fasthttp.Server{
		NoDefaultServerHeader: true,
		ReadBufferSize:        maxHead,
		Logger:                silent{},
		Handler: func(ctx *fasthttp.RequestCtx) {
			ctx.Response.Header.SetContentTypeBytes(contentJSON)
			ctx.Response.SetBodyRaw(body)
		},
	}
}

// serverRole makes the test binary one of the servers of BenchmarkReplyLoopback.
const serverRole = "CREDSERVER_BENCH_ROLE"

func TestMain(m *testing.M) {
	if role := os.Getenv(serverRole); role != "" {
		os.Exit(serveForBenchmark(role))
	}
	os.Exit(m.Run())
}

// serveForBenchmark serves until stdin ends. It prints its address, and for
// each line on stdin the CPU time that it has used, in microseconds.
func serveForBenchmark(role string) int {
	ln, err := Listen(context.Background(), netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	switch role {
	case "latchkey":
		var tb testing.B
		go func() { _ = benchServer(&tb, &countObserver{}).Serve(ln) }()
	case "bare":
		go func() { _ = bareServer().Serve(ln) }()
	}
	fmt.Println(ln.Addr())
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		var u syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
			return 1
		}
		fmt.Println((u.Utime.Nano() + u.Stime.Nano()) / 1000)
	}
	return 0
}

// child is a server in its own process.
type child struct {
	addr string
	in   io.WriteCloser
	out  *bufio.Scanner
}

func startChild(b *testing.B, role string) *child {
	b.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), serverRole+"="+role)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		_ = in.Close()
		_ = cmd.Wait()
	})
	c := &child{in: in, out: bufio.NewScanner(out)}
	if !c.out.Scan() {
		b.Fatal("the server did not start")
	}
	c.addr = c.out.Text()
	return c
}

// cpu gives the CPU time the server has used, in microseconds.
func (c *child) cpu(b *testing.B) float64 {
	b.Helper()
	if _, err := io.WriteString(c.in, "\n"); err != nil || !c.out.Scan() {
		b.Fatal("the server is gone")
	}
	us, err := strconv.ParseFloat(c.out.Text(), 64)
	if err != nil {
		b.Fatal(err)
	}
	return us
}

// BenchmarkReplyLoopbackHit measures the CPU that a server process uses per
// cached answer over loopback TCP, beside bare fasthttp in the same run. The
// ratio is what the endpoint adds.
func BenchmarkReplyLoopbackHit(b *testing.B) {
	used := map[string]float64{}
	for _, keep := range []bool{true, false} {
		kind := map[bool]string{true: "keepalive", false: "close"}[keep]
		for _, role := range []string{"bare", "latchkey"} {
			b.Run(kind+"/"+role, func(b *testing.B) {
				srv := startChild(b, role)
				const parallel = 16
				head := []byte(get(benchToken(), "Accept: application/json"))
				if !keep {
					head = []byte(get(benchToken(), "Accept: application/json", "Connection: close"))
				}
				load(b, srv.addr, head, parallel, 200, keep)
				before := srv.cpu(b)
				b.ResetTimer()
				load(b, srv.addr, head, parallel, b.N, keep)
				b.StopTimer()
				us := (srv.cpu(b) - before) / float64(b.N)
				used[kind+role] = us
				b.ReportMetric(us, "cpu-µs/req")
				if role == "latchkey" {
					b.ReportMetric(us/used[kind+"bare"], "×bare")
				}
			})
		}
	}
}

// load sends n requests over the given number of connections at a time.
func load(b *testing.B, addr string, head []byte, parallel, n int, keep bool) {
	b.Helper()
	errs := make(chan error, parallel)
	for w := range parallel {
		share := n / parallel
		if w < n%parallel {
			share++
		}
		go func() { errs <- worker(addr, head, share, keep) }()
	}
	for range parallel {
		if err := <-errs; err != nil {
			b.Fatal(err)
		}
	}
}

func worker(addr string, head []byte, n int, keep bool) error {
	buf := make([]byte, 4096)
	var c net.Conn
	var err error
	for i := range n {
		if c == nil {
			if c, err = net.Dial("tcp4", addr); err != nil {
				return err
			}
		}
		if _, err = c.Write(head); err != nil {
			return err
		}
		got, end := 0, -1
		for end < 0 || got < end+4+1300 {
			m, err := c.Read(buf[got:])
			got += m
			if err != nil {
				return fmt.Errorf("request %d: %w after %q", i, err, buf[:got])
			}
			if end < 0 {
				end = bytes.Index(buf[:got], []byte("\r\n\r\n"))
			}
		}
		if !bytes.HasPrefix(buf, []byte("HTTP/1.1 200")) {
			return fmt.Errorf("request %d: %q", i, buf[:got])
		}
		if !keep {
			_ = c.Close()
			c = nil
		}
	}
	if c != nil {
		return c.Close()
	}
	return nil
}
