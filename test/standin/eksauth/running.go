// SPDX-License-Identifier: Apache-2.0

package eksauth

import (
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"sync"
	"time"
)

// Running is a stand-in that listens.
type Running struct {
	*Server
	// URL is the endpoint to give a client, such as "http://127.0.0.1:39131".
	URL string

	mu     sync.Mutex
	addr   string
	http   *http.Server
	closed bool
}

// Start makes a stand-in that listens on a free port of the loopback address.
func Start(cfg Config) (*Running, error) {
	s, err := New(cfg)
	if err != nil {
		return nil, err
	}
	var lc net.ListenConfig
	ln, err := lc.Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("starting the stand-in for EKS Auth: %w", err)
	}
	return s.Serve(ln), nil
}

// Serve answers on a listener, in the background, until Close.
func (s *Server) Serve(ln net.Listener) *Running {
	r := &Running{Server: s, URL: "http://" + ln.Addr().String(), addr: ln.Addr().String()}
	r.serve(ln)
	return r
}

func (r *Running) serve(ln net.Listener) {
	server := &http.Server{
		Handler:           r.Server,
		ReadHeaderTimeout: 10 * time.Second,
		// Cut connections are on purpose here.
		ErrorLog: log.New(io.Discard, "", 0),
	}
	r.http = server
	go func() { _ = server.Serve(ln) }()
}

// Refuse stops listening and cuts all connections: the next one is refused.
func (r *Running) Refuse() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.http != nil {
		_ = r.http.Close()
		r.http = nil
	}
}

// Resume listens again on the same address after Refuse.
func (r *Running) Resume() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return ErrClosed
	}
	if r.http != nil {
		return nil
	}
	var lc net.ListenConfig
	ln, err := lc.Listen(context.Background(), "tcp", r.addr)
	if err != nil {
		return fmt.Errorf("resuming the stand-in for EKS Auth: %w", err)
	}
	r.serve(ln)
	return nil
}

// Close stops the stand-in for good.
func (r *Running) Close() {
	r.Refuse()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = true
}
