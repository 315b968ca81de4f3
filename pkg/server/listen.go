// SPDX-License-Identifier: Apache-2.0

package server

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// maxSocketPath is the longest path of a unix socket (sun_path of unix(7),
// without its zero byte).
const maxSocketPath = 107

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

func listenTCP(ctx context.Context, address string) (net.Listener, error) {
	lc := net.ListenConfig{}
	lc.SetMultipathTCP(false)
	return lc.Listen(ctx, "tcp", address)
}

// newHTTPServer is the server of every endpoint. Bodies are at most some tens of
// kilobytes, so whoever takes longer than this to send one is no client.
func newHTTPServer(h http.Handler) *http.Server {
	return &http.Server{
		Handler: h, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 15 * time.Second,
		WriteTimeout: time.Minute, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 64 << 10,
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

// listenUnix makes the admin socket in a directory that only its owner can
// enter. A socket that nobody listens on any more, left by a killed server, is
// replaced.
func listenUnix(ctx context.Context, socket string) (net.Listener, error) {
	if len(socket) > maxSocketPath {
		return nil, fmt.Errorf("%w: admin socket %s: a socket's path has at most %d bytes; give a shorter --admin-socket", ErrConfig, socket, maxSocketPath)
	}
	if err := os.MkdirAll(filepath.Dir(socket), 0o700); err != nil {
		return nil, fmt.Errorf("admin socket: %w", err)
	}
	if fi, err := os.Lstat(socket); err == nil {
		if fi.Mode()&fs.ModeSocket == 0 {
			return nil, fmt.Errorf("admin socket: %s is there and is no socket", socket)
		}
		if c, err := (&net.Dialer{}).DialContext(ctx, "unix", socket); err == nil {
			c.Close()
			return nil, fmt.Errorf("%w: it listens on %s", ErrAnotherServer, socket)
		}
		if err := os.Remove(socket); err != nil {
			return nil, fmt.Errorf("admin socket: %w", err)
		}
	}
	ln, err := (&net.ListenConfig{}).Listen(ctx, "unix", socket)
	if err != nil {
		return nil, fmt.Errorf("admin socket: %w", err)
	}
	if err := os.Chmod(socket, 0o600); err != nil {
		ln.Close()
		return nil, fmt.Errorf("admin socket: %w", err)
	}
	return &ownerOnly{ln.(*net.UnixListener)}, nil
}

// ownerOnly closes connections of anybody but root and whoever runs the server,
// as the kernel names the peer, should the directory's mode have been changed.
type ownerOnly struct{ *net.UnixListener }

// peerConn is a connection that knows who is at its other end.
type peerConn struct {
	*net.UnixConn
	uid uint32
}

// Accept waits for a connection of somebody who may.
func (l *ownerOnly) Accept() (net.Conn, error) {
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		if uid, err := peerUID(c); err == nil && (uid == 0 || uid == uint32(os.Geteuid())) {
			return peerConn{c, uid}, nil
		}
		c.Close()
	}
}

func peerUID(c *net.UnixConn) (uint32, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var cerr error
	if err := raw.Control(func(fd uintptr) {
		cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, err
	}
	if cerr != nil {
		return 0, cerr
	}
	return cred.Uid, nil
}
