// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// readiness proves the whole way of a request up to the cache, for each
// address: that it is bound, that it answers, that the kernel's evidence
// arrives. Upstream is no part of it: an outage there must not take a node's
// agent, which answers from its cache, out of service.
type readiness struct {
	a *Agent

	mu   sync.Mutex
	at   time.Time
	last error
}

// readinessAge is how long an answer is good for, so that whoever polls the
// probe cannot make the agent connect to itself without end.
const readinessAge = time.Second

func (r *readiness) check(ctx context.Context) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.at.IsZero() && time.Since(r.at) < readinessAge {
		return r.last
	}
	r.last = r.probe(ctx)
	r.at = time.Now()
	return r.last
}

var errNotReady = errors.New("not ready")

func (r *readiness) probe(ctx context.Context) error {
	if r.a.stopping.Load() {
		return fmt.Errorf("%w: stopping", errNotReady)
	}
	serving := r.a.listeners.serving()
	if len(serving) == 0 {
		return fmt.Errorf("%w: no address is served yet", errNotReady)
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	for _, at := range serving {
		if err := r.a.attestor.probe(ctx, at); err != nil {
			return fmt.Errorf("%w: %w", errNotReady, err)
		}
	}
	return nil
}

// probeHandler answers /healthz and /readyz. Healthz says only that the process
// runs: what it could restart is shown by readyz.
func (a *Agent) probeHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("/readyz", func(w http.ResponseWriter, r *http.Request) {
		if err := a.ready.check(r.Context()); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
		for _, l := range a.listeners.list() {
			if !l.Serving {
				fmt.Fprintf(w, "degraded: %s is not served: %s\n", l.Address, l.Error)
			}
		}
		for _, f := range a.fallbacks() {
			fmt.Fprintf(w, "fallback: %s\n", f)
		}
	})
	return mux
}

func (a *Agent) metricsHandler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/metrics", promhttp.HandlerFor(a.metrics.registry, promhttp.HandlerOpts{ErrorHandling: promhttp.ContinueOnError}))
	// The reference agent has its probes here as well.
	mux.Handle("/", a.probeHandler())
	return mux
}

// keepServing serves one of the side endpoints. If its port is taken it tries
// again: a metrics port must not cost pods their credentials.
func keepServing(ctx context.Context, log *slog.Logger, name, address string, h http.Handler) {
	const retry = 5 * time.Second
	warned := false
	for ctx.Err() == nil {
		lc := net.ListenConfig{}
		lc.SetMultipathTCP(false)
		ln, err := lc.Listen(ctx, "tcp", address)
		if err != nil {
			if !warned {
				log.Error("cannot listen; trying again until it works", "endpoint", name, "address", address, "error", err)
				warned = true
			}
			select {
			case <-time.After(retry):
			case <-ctx.Done():
			}
			continue
		}
		warned = false
		log.Info("listening", "endpoint", name, "address", ln.Addr().String())
		if err := serveHTTP(ctx, ln, h); err != nil {
			log.Error("endpoint ended; starting it again", "endpoint", name, "error", err)
		}
	}
}

// serveHTTP serves until ctx ends.
func serveHTTP(ctx context.Context, ln net.Listener, h http.Handler) error {
	srv := &http.Server{
		Handler: h, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second,
		WriteTimeout: 30 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
		// Its messages are of clients that went away.
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug),
	}
	done := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(done)
		sctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		_ = srv.Shutdown(sctx)
	})
	err := srv.Serve(ln)
	if !stop() {
		<-done
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}
