// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/audit"
	"github.com/latchkey-dev/latchkey/pkg/credcache"
	"github.com/latchkey-dev/latchkey/pkg/credserver"
	"github.com/latchkey-dev/latchkey/pkg/evidence"
	"github.com/latchkey-dev/latchkey/pkg/satoken"
	"github.com/latchkey-dev/latchkey/test/standin/tokens"
)

// fixedAttestor attests every connection as one pod's. The kernel's part is
// measured in pkg/attribution, the index's in pkg/pods.
type fixedAttestor struct{ pod evidence.PodUID }

func (f fixedAttestor) Attest(net.Conn) (evidence.Attestation, credserver.Liveness) {
	return evidence.Attestation{Finding: evidence.FindingPod, Pod: f.pod}, alive{}
}

type alive struct{}

func (alive) Ended() bool { return false }

type fixedUpstream struct{ calls int }

func (u *fixedUpstream) Fetch(context.Context, string) (credcache.Answer, error) {
	u.calls++
	return credcache.Answer{
		Namespace: "default", ServiceAccount: "default", Audience: satoken.DefaultAudience,
		AssociationID: "a-1", AssumedRoleARN: "arn:aws:sts::111122223333:assumed-role/r/s",
		AccessKeyID: "ASIAEXAMPLE", SecretAccessKey: "x", SessionToken: strings.Repeat("s", 900),
		Expiration: time.Now().Add(6 * time.Hour),
	}, nil
}

// hitPath is the whole way of a cached answer as the agent puts it together,
// over a loopback connection: endpoint, remembered token, verdict, cache,
// observer. The client allocates nothing, so what is counted is the agent's.
func hitPath(tb testing.TB, log *audit.Log) func() {
	tb.Helper()
	signer, err := tokens.NewSigner(tokens.Config{})
	if err != nil {
		tb.Fatal(err)
	}
	claims := tokens.Claims{}
	token := signer.Token(claims)
	keys, err := satoken.ParseKeySet(signer.Issuer(), signer.JWKS())
	if err != nil {
		tb.Fatal(err)
	}
	verifier, err := satoken.NewVerifier(satoken.Config{Keys: keys})
	if err != nil {
		tb.Fatal(err)
	}
	tok, err := verifier.Verify(tb.Context(), token)
	if err != nil {
		tb.Fatal(err)
	}
	up := &fixedUpstream{}
	cache, err := credcache.New(credcache.Config{Upstream: up})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(cache.Close)
	server, err := credserver.New(credserver.Config{
		Attestor: fixedAttestor{tok.Subject.PodUID}, Tokens: verifier, Credentials: credentials{cache},
		Hosts:    []string{"127.0.0.1"},
		Observer: newObserver(newMetrics("test", "enforce"), slog.New(slog.DiscardHandler), nil, log),
		Limits:   credserver.Limits{Pod: credserver.Allowance{Connections: 8, Rate: 1e9, Burst: 1e6}},
	})
	if err != nil {
		tb.Fatal(err)
	}
	ln, err := credserver.Listen(tb.Context(), netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		tb.Fatal(err)
	}
	go func() { _ = server.Serve(ln) }()
	tb.Cleanup(func() { _ = server.Shutdown(context.Background()) })

	conn, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { conn.Close() })
	request := fmt.Appendf(nil, "GET %s HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: %s\r\nAccept: application/json\r\n\r\n", credserver.Path, token)
	ask := func(buf []byte) (int, error) {
		if _, err := conn.Write(request); err != nil {
			return 0, err
		}
		return conn.Read(buf)
	}
	first := make([]byte, 16<<10)
	n, err := ask(first)
	if err != nil || !bytes.HasPrefix(first[:n], []byte("HTTP/1.1 200 ")) || up.calls != 1 {
		tb.Fatalf("the first answer: %v, %d calls, %.200s", err, up.calls, first[:n])
	}
	// Every further answer has the first one's length: the head differs in
	// the date only.
	buf := make([]byte, n)
	return func() {
		if _, err := conn.Write(request); err != nil {
			tb.Fatal(err)
		}
		if _, err := io.ReadFull(conn, buf); err != nil {
			tb.Fatal(err)
		}
		if !bytes.HasPrefix(buf, []byte("HTTP/1.1 200 ")) {
			tb.Fatalf("%.200s", buf)
		}
	}
}

// hitAudits are the ways in which an answer from the cache can be audited.
var hitAudits = []struct {
	name   string
	on     bool
	sample int
}{
	{"off", false, 0},
	{"each", true, 1},
	{"one of 100", true, 100},
	{"none", true, 0},
}

// nowhere is a sink that counts lines.
type nowhere struct{ lines atomic.Int64 }

func (n *nowhere) Write(lines []byte) (int, error) {
	written := bytes.Count(lines, []byte("\n"))
	n.lines.Add(int64(written))
	return written, nil
}

func (n *nowhere) Close() error { return nil }

// auditTo starts an audit; what it gives ends it and tells how many records
// were written and lost.
func auditTo(tb testing.TB, sample int) (*audit.Log, func() audit.Stats) {
	tb.Helper()
	log, err := audit.New(audit.Config{Sink: &nowhere{}, SampleHits: sample})
	if err != nil {
		tb.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); log.Run(ctx) }()
	end := func() audit.Stats {
		stop()
		<-done
		return log.Stats()
	}
	tb.Cleanup(func() { end() })
	return log, end
}

func BenchmarkAgentHit(b *testing.B) {
	for _, a := range hitAudits {
		b.Run("audit "+a.name, func(b *testing.B) {
			var log *audit.Log
			if a.on {
				log, _ = auditTo(b, a.sample)
			}
			hit := hitPath(b, log)
			b.ReportAllocs()
			for b.Loop() {
				hit()
			}
		})
	}
}
