// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"sync"
	"time"
)

// ErrClosed is returned by Resume after Close.
var ErrClosed = errors.New("the stand-in is closed")

// Endpoint is where a stand-in listens.
type Endpoint struct {
	// URL is the endpoint to give a client, such as "http://127.0.0.1:39131".
	URL string

	handler http.Handler
	addr    string

	mu     sync.Mutex
	http   *http.Server
	closed bool
}

// Listen takes a free port of the loopback address.
func Listen() (net.Listener, error) { return listen("127.0.0.1:0") }

func listen(addr string) (net.Listener, error) {
	var lc net.ListenConfig
	ln, err := lc.Listen(context.Background(), "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("the stand-in cannot listen: %w", err)
	}
	return ln, nil
}

// Serve answers on a listener, in the background, until Close.
func Serve(ln net.Listener, h http.Handler) *Endpoint {
	e := &Endpoint{URL: "http://" + ln.Addr().String(), handler: h, addr: ln.Addr().String()}
	e.serve(ln)
	return e
}

func (e *Endpoint) serve(ln net.Listener) {
	server := &http.Server{
		Handler:           e.handler,
		ReadHeaderTimeout: 10 * time.Second,
		// Cut connections are on purpose here.
		ErrorLog: log.New(io.Discard, "", 0),
	}
	e.http = server
	go func() { _ = server.Serve(ln) }()
}

// Refuse stops listening and cuts all connections: the next one is refused.
func (e *Endpoint) Refuse() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.stop()
}

func (e *Endpoint) stop() {
	if e.http != nil {
		_ = e.http.Close()
		e.http = nil
	}
}

// Resume listens again on the same address after Refuse.
func (e *Endpoint) Resume() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return ErrClosed
	}
	if e.http != nil {
		return nil
	}
	ln, err := listen(e.addr)
	if err != nil {
		return err
	}
	e.serve(ln)
	return nil
}

// Close stops the stand-in for good.
func (e *Endpoint) Close() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.stop()
	e.closed = true
}
