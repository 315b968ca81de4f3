// SPDX-License-Identifier: Apache-2.0

package sts

import (
	"context"
	"fmt"
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
	var lc net.ListenConfig
	ln, err := lc.Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("starting the stand-in for STS: %w", err)
	}
	r := &Running{Server: New(cfg), URL: "http://" + ln.Addr().String(), addr: ln.Addr().String()}
	r.serve(ln)
	return r, nil
}

func (r *Running) serve(ln net.Listener) {
	r.http = &http.Server{
		Handler:           r.Server,
		ReadHeaderTimeout: 10 * time.Second,
	}
	go func(server *http.Server) { _ = server.Serve(ln) }(r.http)
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
	if r.closed || r.http != nil {
		return nil
	}
	var lc net.ListenConfig
	ln, err := lc.Listen(context.Background(), "tcp", r.addr)
	if err != nil {
		return fmt.Errorf("resuming the stand-in for STS: %w", err)
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
