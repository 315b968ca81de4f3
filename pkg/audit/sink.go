// SPDX-License-Identifier: Apache-2.0

package audit

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"time"

	"gopkg.in/natefinch/lumberjack.v2"
)

// Sink takes lines. Its methods are called by one goroutine.
type Sink interface {
	// Write takes one or more lines, each with its newline, and tells how many
	// of them, from the first on, arrived. It may block for a bounded time.
	Write(lines []byte) (written int, err error)
	// Close ends the sink.
	Close() error
}

// Target says where the audit goes, as the flags do.
type Target struct {
	// Spec is "off" (or empty), "stdout", "file:PATH" or "unixgram:PATH".
	Spec string
	// MaxSize is how large a file may become, in MiB, before it is put aside;
	// 0 means DefaultMaxSize. MaxBackups is how many of those are kept, MaxAge
	// for how many days; 0 means without end.
	MaxSize, MaxBackups, MaxAge int
	// Stdout is what "stdout" means. Each Write is one call of its Write.
	Stdout io.Writer
}

// Defaults of Target.
const (
	DefaultMaxSize    = 100 // MiB
	DefaultMaxBackups = 5
)

// Open makes the sink of a target; nil if that is off. Nothing is opened before
// the first line. Errors wrap ErrConfig.
func Open(t Target) (Sink, error) {
	kind, path, _ := strings.Cut(t.Spec, ":")
	switch kind {
	case "file", "unixgram":
		if !filepath.IsAbs(path) {
			return nil, fmt.Errorf("%w: %q: give an absolute path, as in %s:/var/log/latchkey/audit.log", ErrConfig, t.Spec, kind)
		}
	case "", "off", "stdout":
		if strings.Contains(t.Spec, ":") {
			return nil, fmt.Errorf("%w: %q: %s takes no path", ErrConfig, t.Spec, kind)
		}
	default:
		return nil, fmt.Errorf("%w: %q: use stdout, file:PATH, unixgram:PATH or off", ErrConfig, t.Spec)
	}
	if t.MaxSize < 0 || t.MaxBackups < 0 || t.MaxAge < 0 {
		return nil, fmt.Errorf("%w: sizes, counts and days are not negative", ErrConfig)
	}
	switch kind {
	case "stdout":
		if t.Stdout == nil {
			return nil, fmt.Errorf("%w: no standard output", ErrConfig)
		}
		return &stream{writer: t.Stdout}, nil
	case "file":
		if t.MaxSize == 0 {
			t.MaxSize = DefaultMaxSize
		}
		// Made with mode 0600, its directory 0755 if it is missing.
		f := &lumberjack.Logger{Filename: path, MaxSize: t.MaxSize, MaxBackups: t.MaxBackups, MaxAge: t.MaxAge}
		return &stream{writer: f, closer: f}, nil
	case "unixgram":
		return &datagram{path: path, now: time.Now}, nil
	}
	return nil, nil
}

// stream writes lines to a file.
type stream struct {
	writer io.Writer
	closer io.Closer // nil: not ours
	// torn: what was written last ends within a line, as on a full disk.
	torn bool
}

// Write implements Sink.
func (s *stream) Write(lines []byte) (int, error) {
	if s.torn {
		// Else the next line, which tells what was lost, would be no JSON either.
		if n, err := s.writer.Write(newline); n < len(newline) {
			return 0, err
		}
		s.torn = false
	}
	n, err := s.writer.Write(lines)
	n = min(max(n, 0), len(lines))
	s.torn = n > 0 && lines[n-1] != newline[0]
	// A part of a line is no line.
	return bytes.Count(lines[:n], newline), err
}

// Close implements Sink.
func (s *stream) Close() error {
	if s.closer == nil {
		return nil
	}
	return s.closer.Close()
}

var newline = []byte{'\n'}

// datagram sends each line, without its newline, to a unix datagram socket.
type datagram struct {
	path string
	now  func() time.Time

	conn  net.Conn
	again time.Time // no attempt to connect before
}

const (
	// sendPatience is how long a receiver may be behind: the kernel queues a
	// few datagrams only, and then the sender waits.
	sendPatience = 250 * time.Millisecond
	reconnect    = time.Second
)

// errReceiver: the last attempt to reach the receiver was a moment ago.
var errReceiver = errors.New("no receiver")

// Write implements Sink.
func (d *datagram) Write(lines []byte) (written int, err error) {
	deadline := d.now().Add(sendPatience)
	for len(lines) > 0 {
		line, rest, _ := bytes.Cut(lines, newline)
		if err := d.send(line, deadline); err != nil {
			return written, err
		}
		written++
		lines = rest
	}
	return written, nil
}

func (d *datagram) send(line []byte, deadline time.Time) error {
	fresh := d.conn == nil
	if err := d.connect(); err != nil {
		return err
	}
	err := d.sendOnce(line, deadline)
	var ne net.Error
	if err == nil || errors.As(err, &ne) && ne.Timeout() {
		// Too slow, but there.
		return err
	}
	d.disconnect()
	if fresh {
		return err
	}
	// The receiver was started anew: its socket is another one now.
	d.again = time.Time{}
	if err := d.connect(); err != nil {
		return err
	}
	if err := d.sendOnce(line, deadline); err != nil {
		d.disconnect()
		return err
	}
	return nil
}

func (d *datagram) sendOnce(line []byte, deadline time.Time) error {
	if err := d.conn.SetWriteDeadline(deadline); err != nil {
		return err
	}
	_, err := d.conn.Write(line)
	return err
}

func (d *datagram) connect() error {
	if d.conn != nil {
		return nil
	}
	now := d.now()
	if now.Before(d.again) {
		return fmt.Errorf("%w at %s", errReceiver, d.path)
	}
	d.again = now.Add(reconnect)
	c, err := net.Dial("unixgram", d.path)
	if err != nil {
		return err
	}
	d.conn = c
	return nil
}

func (d *datagram) disconnect() {
	if d.conn != nil {
		_ = d.conn.Close()
		d.conn = nil
	}
}

// Close implements Sink.
func (d *datagram) Close() error {
	d.disconnect()
	return nil
}
