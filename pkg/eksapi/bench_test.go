// SPDX-License-Identifier: Apache-2.0

package eksapi_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/pkg/association"
	"github.com/latchkey-dev/latchkey/pkg/eksapi"
	"github.com/latchkey-dev/latchkey/pkg/etcd"
	"github.com/latchkey-dev/latchkey/pkg/issuer"
	"github.com/latchkey-dev/latchkey/pkg/permission"
	"github.com/latchkey-dev/latchkey/pkg/sigv4"
	"github.com/latchkey-dev/latchkey/pkg/tokencheck"
	"github.com/latchkey-dev/latchkey/test/standin/tokens"
)

const (
	benchClusters     = 100
	benchAssociations = 5000 // in each
	benchNodes        = 20   // of those that ask
	benchRequests     = 4000
)

// constIssuer is STS that takes no time: what is measured is this server.
type constIssuer struct{ credentials issuer.Credentials }

func (c constIssuer) Issue(context.Context, issuer.Request) (issuer.Credentials, error) {
	return c.credentials, nil
}

// nodeKeys are the keys of nodes.
type nodeKeys struct{}

func (nodeKeys) Lookup(_ context.Context, id, _ string) (sigv4.Key, error) {
	return sigv4.Key{Secret: secretOf(id), Principal: permission.Principal{
		Name: id, Node: &permission.Node{Cluster: id[:len("cluster-000")], Name: "node-" + id[len("cluster-000-"):]},
	}}, nil
}

type request struct {
	http.Request
	body []byte
}

// benchWorld is a server with every association in its index, and requests that
// are signed already.
var benchWorld struct {
	once     sync.Once
	index    *association.Index
	requests []request
}

func prepare(b *testing.B) {
	b.Helper()
	benchWorld.once.Do(func() {
		client := shared.Client(b)
		prefix := "/bench/"
		store := association.NewStore(association.Config{Client: client, Prefix: prefix, Timeout: patience, MaxTxnOps: etcd.MaxTxnOps})
		key := rsaSigner(b)
		jwks := json.RawMessage(key.JWKS())
		var last int64
		began := time.Now()
		for i := range benchClusters {
			name := fmt.Sprintf("cluster-%03d", i)
			if _, err := store.PutCluster(b.Context(), association.Cluster{Name: name, Region: region, Account: account, Issuers: []string{tokens.DefaultIssuer}, Keys: jwks}); err != nil {
				b.Fatal(err)
			}
			in := make([]association.CreateInput, benchAssociations)
			for j := range in {
				in[j] = association.CreateInput{Cluster: name, Namespace: fmt.Sprintf("namespace-%d", j%50), ServiceAccount: fmt.Sprintf("account-%d", j), RoleARN: role(fmt.Sprintf("role-%d", j))}
			}
			made, err := store.CreateMany(b.Context(), name, in)
			if err != nil {
				b.Fatal(err)
			}
			last = max(last, made[len(made)-1].Revision)
		}
		b.Logf("seeded in %v", time.Since(began).Round(time.Millisecond))
		benchWorld.index = association.NewIndex(association.IndexConfig{Client: client, Prefix: prefix})
		go func() { _ = benchWorld.index.Run(context.Background()) }()
		if err := benchWorld.index.Wait(context.Background(), last); err != nil {
			b.Fatal(err)
		}
		for i := range benchRequests {
			cluster, node, account := fmt.Sprintf("cluster-%03d", i%benchClusters), i%benchNodes, i*7%benchAssociations
			token := key.Token(tokens.Claims{Namespace: fmt.Sprintf("namespace-%d", account%50), ServiceAccount: fmt.Sprintf("account-%d", account), Pod: fmt.Sprintf("pod-%d", i), Node: fmt.Sprintf("node-%d", node)})
			body := fmt.Sprintf(`{"token":%q}`, token)
			r := raw{user: fmt.Sprintf("%s-%d", cluster, node), path: "/clusters/" + cluster + "/assume-role-for-pod-identity", body: body}.request(b, "http://latchkey.example")
			r.RequestURI = r.URL.RequestURI()
			benchWorld.requests = append(benchWorld.requests, request{*r, []byte(body)})
		}
	})
	if len(benchWorld.requests) < benchRequests {
		b.Fatal("not prepared")
	}
}

func rsaSigner(b *testing.B) *tokens.Signer {
	b.Helper()
	s, err := tokens.NewSigner(tokens.Config{})
	if err != nil {
		b.Fatal(err)
	}
	return s
}

// handler is what is measured: everything but STS and the store of keys.
func handler(b *testing.B, memory int) http.Handler {
	b.Helper()
	at := time.Now()
	checker, err := tokencheck.New(tokencheck.Config{Memory: memory})
	if err != nil {
		b.Fatal(err)
	}
	unlimited := eksapi.Rate{PerSecond: -1}
	h, err := eksapi.New(eksapi.Config{
		Associations: fakeStore{}, Index: benchWorld.index, Tokens: checker, Keys: nodeKeys{}, MaxBehind: patience,
		Issuer: constIssuer{issuer.Credentials{AccessKeyID: "ASIAEXAMPLEEXAMPLE00", SecretAccessKey: string(bytes.Repeat([]byte("s"), 40)),
			SessionToken: string(bytes.Repeat([]byte("t"), 900)), Expires: at.Add(time.Hour), AssumedRoleARN: "arn:aws:sts::111122223333:assumed-role/r/s", AssumedRoleID: "AROA:s"}},
		// The requests are signed once, and stay good.
		Skew: 24 * time.Hour, Limits: eksapi.Limits{Exchanges: unlimited},
		Audit: func(eksapi.Record) {},
	})
	if err != nil {
		b.Fatal(err)
	}
	return h
}

// discard is an answer that is thrown away.
type discard struct {
	header http.Header
	status int
}

func (d *discard) Header() http.Header         { return d.header }
func (d *discard) Write(p []byte) (int, error) { return len(p), nil }
func (d *discard) WriteHeader(status int)      { d.status = status }

// BenchmarkExchange is AssumeRoleForPodIdentity from the parsed request to the
// answer, with 100 clusters of 5,000 associations each, and STS left out. With
// new tokens every one of them is verified; with known ones it is remembered.
func BenchmarkExchange(b *testing.B) {
	prepare(b)
	for name, memory := range map[string]int{"known": 0, "new": 1} {
		b.Run("tokens="+name, func(b *testing.B) {
			h := handler(b, memory)
			times := make([]time.Duration, 0, b.N)
			var mu sync.Mutex
			var next atomic.Int64
			b.ReportAllocs()
			b.ResetTimer()
			used := cpu()
			b.RunParallel(func(pb *testing.PB) {
				var own []time.Duration
				for pb.Next() {
					in := &benchWorld.requests[int(next.Add(1))%benchRequests]
					r := in.Request
					r.Body = io.NopCloser(bytes.NewReader(in.body))
					w := &discard{header: http.Header{}}
					began := time.Now()
					h.ServeHTTP(w, &r)
					own = append(own, time.Since(began))
					if w.status != 200 {
						b.Errorf("status %d", w.status)
						return
					}
				}
				mu.Lock()
				times = append(times, own...)
				mu.Unlock()
			})
			b.StopTimer()
			report(b, times, cpu()-used)
		})
	}
}

// BenchmarkExchangeHTTP is the same through net/http on the loopback, with
// kept-alive connections. The clients' work is in it.
func BenchmarkExchangeHTTP(b *testing.B) {
	prepare(b)
	server := httptest.NewServer(handler(b, 0))
	defer server.Close()
	transport := &http.Transport{MaxIdleConnsPerHost: 16}
	defer transport.CloseIdleConnections()
	times := make([]time.Duration, 0, b.N)
	var mu sync.Mutex
	var next atomic.Int64
	b.ResetTimer()
	used := cpu()
	b.RunParallel(func(pb *testing.PB) {
		var own []time.Duration
		for pb.Next() {
			in := &benchWorld.requests[int(next.Add(1))%benchRequests]
			r := in.Request.Clone(context.Background())
			r.RequestURI, r.Host = "", "latchkey.example"
			r.URL.Host = server.Listener.Addr().String()
			r.Body = io.NopCloser(bytes.NewReader(in.body))
			began := time.Now()
			res, err := transport.RoundTrip(r)
			if err != nil {
				b.Error(err)
				return
			}
			_, _ = io.Copy(io.Discard, res.Body)
			res.Body.Close()
			own = append(own, time.Since(began))
			if res.StatusCode != 200 {
				b.Errorf("status %d", res.StatusCode)
				return
			}
		}
		mu.Lock()
		times = append(times, own...)
		mu.Unlock()
	})
	b.StopTimer()
	report(b, times, cpu()-used)
}

// cpu is what this process has used. On a machine that others use too, it tells
// more than the clock.
func cpu() time.Duration {
	var u unix.Rusage
	if unix.Getrusage(unix.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func report(b *testing.B, times []time.Duration, used time.Duration) {
	if len(times) == 0 {
		return
	}
	slices.Sort(times)
	b.ReportMetric(float64(times[len(times)*50/100].Microseconds()), "µs-p50")
	b.ReportMetric(float64(times[len(times)*99/100].Microseconds()), "µs-p99")
	b.ReportMetric(float64(used.Microseconds())/float64(b.N), "cpu-µs/op")
	b.ReportMetric(float64(b.N)/used.Seconds(), "per-cpu-s")
}
