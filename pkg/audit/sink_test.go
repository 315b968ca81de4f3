// SPDX-License-Identifier: Apache-2.0

package audit

import (
	"bytes"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestOpen(t *testing.T) {
	var out bytes.Buffer
	for _, c := range []struct {
		target Target
		ok, on bool
	}{
		{Target{}, true, false},
		{Target{Spec: "off"}, true, false},
		{Target{Spec: "stdout", Stdout: &out}, true, true},
		{Target{Spec: "file:/var/log/latchkey/audit.log"}, true, true},
		{Target{Spec: "unixgram:/run/collector.sock"}, true, true},
		{Target{Spec: "stdout"}, false, false},
		{Target{Spec: "stdout:", Stdout: &out}, false, false},
		{Target{Spec: "off:/x"}, false, false},
		{Target{Spec: "file"}, false, false},
		{Target{Spec: "file:"}, false, false},
		{Target{Spec: "file:audit.log"}, false, false},
		{Target{Spec: "unixgram:sock"}, false, false},
		{Target{Spec: "syslog"}, false, false},
		{Target{Spec: "file:/x", MaxSize: -1}, false, false},
	} {
		sink, err := Open(c.target)
		if (err == nil) != c.ok || (sink != nil) != c.on || err != nil && !errors.Is(err, ErrConfig) {
			t.Errorf("%+v: %v, %v", c.target, sink, err)
		}
		if sink != nil {
			_ = sink.Close()
		}
	}
}

// A file that has become too large is put aside, whole lines only, and only
// root may read it.
func TestFileRotates(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "sub", "audit.log")
	sink, err := Open(Target{Spec: "file:" + path, MaxSize: 1})
	if err != nil {
		t.Fatal(err)
	}
	line := []byte(strings.Repeat("x", 1023) + "\n")
	lines := bytes.Repeat(line, 64)
	const writes = 24 // 1.5 MiB
	for range writes {
		if n, err := sink.Write(lines); n != 64 || err != nil {
			t.Fatal(n, err)
		}
	}
	if err := sink.Close(); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(entries) != 2 {
		t.Fatalf("%v, %v", entries, err)
	}
	total := 0
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(filepath.Dir(path), e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		if len(b)%len(line) != 0 || len(b) > 1<<20 {
			t.Errorf("%s has %d bytes", e.Name(), len(b))
		}
		total += len(b)
		if fi, err := e.Info(); err != nil || fi.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", e.Name(), fi.Mode(), err)
		}
	}
	if total != writes*len(lines) {
		t.Errorf("%d bytes, want %d", total, writes*len(lines))
	}
}

type short struct{}

func (short) Write(p []byte) (int, error) { return len(p) - 1, errors.New("disk full") }

// A line that is cut has not arrived.
func TestStreamCountsWholeLines(t *testing.T) {
	if n, err := (&stream{writer: short{}}).Write([]byte("a\nb\nc\n")); n != 2 || err == nil {
		t.Errorf("%d, %v, want 2 and the error", n, err)
	}
}

// disk has room for so many bytes.
type disk struct {
	room int
	text []byte
}

func (d *disk) Write(p []byte) (int, error) {
	n := min(len(p), d.room)
	d.text, d.room = append(d.text, p[:n]...), d.room-n
	if n < len(p) {
		return n, errors.New("disk full")
	}
	return n, nil
}

// What was cut off when the disk was full does not spoil the line that follows,
// which tells what was lost.
func TestLineAfterOneThatWasCut(t *testing.T) {
	d := &disk{room: len("aaa\nbb")}
	s := &stream{writer: d}
	if n, err := s.Write([]byte("aaa\nbbb\n")); n != 1 || err == nil {
		t.Errorf("%d, %v", n, err)
	}
	if n, err := s.Write([]byte("ccc\n")); n != 0 || err == nil {
		t.Errorf("the disk is full: %d, %v", n, err)
	}
	d.room = 100
	for range 2 {
		if n, err := s.Write([]byte("ddd\n")); n != 1 || err != nil {
			t.Errorf("%d, %v", n, err)
		}
	}
	if want := "aaa\nbb\nddd\nddd\n"; string(d.text) != want {
		t.Errorf("%q, want %q", d.text, want)
	}
}

func listenUnixgram(t *testing.T, path string) *net.UnixConn {
	t.Helper()
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func receive(t *testing.T, c *net.UnixConn) string {
	t.Helper()
	buf := make([]byte, 64<<10)
	if err := c.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	n, err := c.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	return string(buf[:n])
}

// One datagram per line; a receiver that is not there, stands still or is
// started anew costs lines and nothing else.
func TestDatagrams(t *testing.T) {
	path := filepath.Join(t.TempDir(), "collector.sock")
	now := time.Now()
	sink := &datagram{path: path, now: func() time.Time { return now }}
	defer sink.Close()
	if n, err := sink.Write([]byte("lost\n")); n != 0 || err == nil {
		t.Fatalf("nobody listens: %d, %v", n, err)
	}
	receiver := listenUnixgram(t, path)
	if n, err := sink.Write([]byte("too soon\n")); n != 0 || !errors.Is(err, errReceiver) {
		t.Fatalf("%d, %v, want no attempt so soon", n, err)
	}
	now = now.Add(reconnect)
	if n, err := sink.Write([]byte("one\ntwo\n")); n != 2 || err != nil {
		t.Fatal(n, err)
	}
	if a, b := receive(t, receiver), receive(t, receiver); a != "one" || b != "two" {
		t.Errorf("%q, %q", a, b)
	}
	// Started anew: another socket at the same place.
	_ = receiver.Close()
	_ = os.Remove(path)
	receiver = listenUnixgram(t, path)
	if n, err := sink.Write([]byte("three\n")); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	if got := receive(t, receiver); got != "three" {
		t.Errorf("%q", got)
	}
}

func TestDatagramReceiverStandsStill(t *testing.T) {
	path := filepath.Join(t.TempDir(), "collector.sock")
	receiver := listenUnixgram(t, path)
	sink, err := Open(Target{Spec: "unixgram:" + path})
	if err != nil {
		t.Fatal(err)
	}
	defer sink.Close()
	// More than any queue of the kernel's holds.
	var lines []byte
	const many = 20000
	for range many {
		lines = append(lines, "0123456789012345678901234567890123456789\n"...)
	}
	n, err := sink.Write(lines)
	if n == 0 || n == many || err == nil {
		t.Fatalf("%d of %d, %v", n, many, err)
	}
	for range n {
		receive(t, receiver)
	}
	if n, err := sink.Write([]byte("again\n")); n != 1 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
}
