// SPDX-License-Identifier: Apache-2.0

package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/adminsocket"
)

// loopback reports whether an address of the form host:port can be reached from
// this machine only. A name other than localhost is not looked up: what it means
// can change.
func loopback(address string) bool {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return false
	}
	if host == "localhost" {
		return true
	}
	a, err := netip.ParseAddr(host)
	return err == nil && a.Unmap().IsLoopback()
}

func listenTCP(ctx context.Context, address string) (*net.TCPListener, error) {
	lc := net.ListenConfig{}
	lc.SetMultipathTCP(false)
	ln, err := lc.Listen(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	return ln.(*net.TCPListener), nil
}

// newHTTPServer is the server of every endpoint. Bodies are at most some tens of
// kilobytes, so whoever takes longer than this to send one is no client.
func newHTTPServer(h http.Handler) *http.Server {
	return &http.Server{
		Handler: h, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 15 * time.Second,
		WriteTimeout: time.Minute, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 64 << 10,
		HTTP2: &http.HTTP2Config{MaxConcurrentStreams: 100},
		// Its messages are of clients that went away, and of TLS handshakes that
		// failed.
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug),
	}
}

// serveUntil serves until ctx ends, then lets requests in progress finish for as
// long as grace.
func serveUntil(ctx context.Context, ln net.Listener, srv *http.Server, grace time.Duration) error {
	done := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() {
		sctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
		defer cancel()
		err := srv.Shutdown(sctx)
		if err != nil {
			_ = srv.Close()
		}
		done <- err
	})
	err := srv.Serve(ln)
	if stop() {
		return err
	}
	if cut := <-done; cut != nil {
		return fmt.Errorf("requests were cut: %w", cut)
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// listenAdmin makes the admin socket.
func listenAdmin(ctx context.Context, socket string) (net.Listener, error) {
	ln, err := adminsocket.Listen(ctx, socket)
	if errors.Is(err, adminsocket.ErrInUse) {
		return nil, fmt.Errorf("%w: it listens on %s", ErrAnotherServer, socket)
	}
	return ln, err
}
