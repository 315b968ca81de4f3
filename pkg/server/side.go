// SPDX-License-Identifier: Apache-2.0

package server

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/time/rate"
)

// sideHandler answers /metrics, /healthz and /readyz. Healthz says only that the
// process runs.
func (s *server) sideHandler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/metrics", promhttp.HandlerFor(s.metrics.registry, promhttp.HandlerOpts{ErrorHandling: promhttp.ContinueOnError}))
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("/readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := s.ready(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
		if err := s.users.Status().Err; err != nil {
			fmt.Fprintln(w, "degraded: the users file cannot be used; the last good one is in force")
		}
		if s.cert != nil {
			if _, _, _, err := s.cert.state(); err != nil {
				fmt.Fprintln(w, "degraded: the new TLS certificate cannot be used; the last good one is served")
			}
		}
	})
	return mux
}

// keepServing serves the side endpoint. If its port is taken it tries again: a
// metrics port must not cost anybody credentials.
func (s *server) keepServing(ctx context.Context, address string, h http.Handler) {
	const retry = 5 * time.Second
	warned := false
	for ctx.Err() == nil {
		ln, err := listenTCP(ctx, address)
		if err != nil {
			if !warned {
				s.log.Error("cannot listen; trying again until it works", "endpoint", "metrics", "address", address, "error", err)
				warned = true
			}
			select {
			case <-time.After(retry):
			case <-ctx.Done():
			}
			continue
		}
		warned = false
		s.log.Info("listening", "endpoint", "metrics", "address", ln.Addr().String())
		if err := serveUntil(ctx, ln, newHTTPServer(h), time.Second); err != nil {
			s.log.Error("endpoint ended; starting it again", "endpoint", "metrics", "error", err)
		}
	}
}

// tlsListener speaks TLS, and HTTP/2 with who asks for it.
func tlsListener(ln net.Listener, srv *http.Server) net.Listener {
	cfg := srv.TLSConfig.Clone()
	cfg.NextProtos = []string{"h2", "http/1.1"}
	srv.TLSConfig = cfg
	return tls.NewListener(ln, cfg)
}

// peerLimit bounds the calls of an endpoint whose callers have proved nothing
// yet, for each address. Nodes behind one address share it, so it is generous:
// a node comes every half hour.
type peerLimit struct {
	next http.Handler
	now  func() time.Time

	mu         sync.Mutex
	young, old map[netip.Addr]*rate.Limiter
}

const (
	peerRate  = 50
	peerBurst = 500
	// maxPeers bounds the memory. Two generations: one that was not used since the
	// last change of them is full again, or forgotten when it matters least.
	maxPeers = 16 << 10
)

func newPeerLimit(next http.Handler, now func() time.Time) *peerLimit {
	return &peerLimit{next: next, now: now, young: map[netip.Addr]*rate.Limiter{}}
}

func (l *peerLimit) allow(peer netip.Addr) bool {
	// Whoever has an IPv6 address has 2^64 of them.
	if peer.Is6() && !peer.Is4In6() {
		if p, err := peer.WithZone("").Prefix(64); err == nil {
			peer = p.Addr()
		}
	} else {
		peer = peer.Unmap()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	r := l.young[peer]
	if r == nil {
		if r = l.old[peer]; r == nil {
			r = rate.NewLimiter(peerRate, peerBurst)
		}
		if len(l.young) >= maxPeers {
			l.young, l.old = map[netip.Addr]*rate.Limiter{}, l.young
		}
		l.young[peer] = r
	}
	return r.AllowN(l.now(), 1)
}

// ServeHTTP passes on or answers 429.
func (l *peerLimit) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if a, err := netip.ParseAddrPort(r.RemoteAddr); err == nil && !l.allow(a.Addr()) {
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("X-Amzn-ErrorType", "ThrottlingException")
		w.Header().Set("Retry-After", "1")
		w.WriteHeader(http.StatusTooManyRequests)
		_ = json.NewEncoder(w).Encode(map[string]string{"message": "Rate exceeded"})
		return
	}
	l.next.ServeHTTP(w, r)
}
