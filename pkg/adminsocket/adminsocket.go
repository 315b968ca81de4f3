// SPDX-License-Identifier: Apache-2.0

// Package adminsocket is the unix socket over which whoever runs a daemon, or
// root, asks it things: how it is made, who may connect, and how to reach it.
// What is said on it is the daemon's own matter.
package adminsocket

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// maxPath is the longest path of a unix socket (sun_path of unix(7), without its
// zero byte).
const maxPath = 107

// dialTimeout bounds connecting, which waits only for a daemon that does not
// accept.
const dialTimeout = 10 * time.Second

// ErrInUse: somebody listens on the socket already.
var ErrInUse = errors.New("the admin socket is in use")

// CheckPath returns an error if a path is too long for a socket. The text speaks
// of flag --admin-socket.
func CheckPath(path string) error {
	if len(path) > maxPath {
		return fmt.Errorf("admin socket %s: a socket's path has at most %d bytes; give a shorter --admin-socket", path, maxPath)
	}
	return nil
}

// Listen makes the socket in a directory that only its owner can enter: the
// permissions of a socket itself are not checked by every kernel feature that
// reaches it, those of its directory are. A socket that nobody listens on any
// more, left by a killed daemon, is replaced; the error wraps ErrInUse if
// somebody does. Connections of anybody but root and whoever runs this process
// are closed unread, and those accepted are of type Conn.
func Listen(ctx context.Context, path string) (net.Listener, error) {
	if err := CheckPath(path); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("admin socket: %w", err)
	}
	if fi, err := os.Lstat(path); err == nil {
		if fi.Mode()&fs.ModeSocket == 0 {
			return nil, fmt.Errorf("admin socket: %s is there and is no socket", path)
		}
		if c, err := (&net.Dialer{}).DialContext(ctx, "unix", path); err == nil {
			c.Close()
			return nil, fmt.Errorf("%w: %s", ErrInUse, path)
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("admin socket: %w", err)
		}
	}
	ln, err := (&net.ListenConfig{}).Listen(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("admin socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		ln.Close()
		return nil, fmt.Errorf("admin socket: %w", err)
	}
	return &ownerOnly{ln.(*net.UnixListener)}, nil
}

// Conn is an accepted connection that knows who is at its other end.
type Conn struct {
	*net.UnixConn
	// UID is the user who connected, as the kernel names it (SO_PEERCRED of
	// unix(7)).
	UID uint32
}

// ownerOnly asks the kernel who connects, should the directory's mode have been
// changed.
type ownerOnly struct{ *net.UnixListener }

// Accept waits for a connection of somebody who may.
func (l *ownerOnly) Accept() (net.Conn, error) {
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		if uid, err := peerUID(c); err == nil && (uid == 0 || uid == uint32(os.Geteuid())) {
			return Conn{c, uid}, nil
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

// Transport carries HTTP requests over a socket, whatever host their URLs name.
// Nothing is opened until it is asked.
func Transport(path string) *http.Transport {
	return &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, "unix", path)
		},
	}
}

// NobodyListens reports whether a request failed because there is no socket, or
// one that was left behind.
func NobodyListens(err error) bool {
	return errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED)
}

// Forbidden reports whether a request failed because the socket is somebody
// else's.
func Forbidden(err error) bool { return errors.Is(err, os.ErrPermission) }
