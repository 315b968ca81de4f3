// SPDX-License-Identifier: Apache-2.0

//go:build linux

package testnode

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
)

func TestParseMountinfo(t *testing.T) {
	const text = `24 30 0:22 / /sys/fs/cgroup rw,nosuid shared:4 - tmpfs tmpfs rw,mode=755
25 24 0:23 / /sys/fs/cgroup/unified rw,nosuid shared:5 master:1 - cgroup2 cgroup2 rw
26 24 0:24 /kubepods /odd\040dir\134x rw - cgroup2 cgroup2 rw
`
	got, err := parseMountinfo(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	want := []mountPoint{
		{"/", "/sys/fs/cgroup", "tmpfs"},
		{"/", "/sys/fs/cgroup/unified", "cgroup2"},
		{"/kubepods", `/odd dir\x`, "cgroup2"},
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if _, err := parseMountinfo(strings.NewReader("not a mount\n")); err == nil {
		t.Error("a malformed line was accepted")
	}
}

func TestPickCgroup2(t *testing.T) {
	part := mountPoint{"/kubepods", "/part", "cgroup2"}
	whole := mountPoint{"/", "/sys/fs/cgroup/unified", "cgroup2"}
	tests := []struct {
		name    string
		points  []mountPoint
		want    string
		wantErr error
	}{
		{"hybrid", []mountPoint{{"/", "/sys/fs/cgroup/memory", "cgroup"}, whole}, whole.path, nil},
		{"a bind mount of a part comes first", []mountPoint{part, whole}, whole.path, nil},
		{"only a part", []mountPoint{part}, "", ErrNoCgroup2},
		{"v1 alone", []mountPoint{{"/", "/sys/fs/cgroup/memory", "cgroup"}}, "", ErrNoCgroup2},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := pickCgroup2(tt.points)
			if got != tt.want || !errors.Is(err, tt.wantErr) {
				t.Errorf("got %q, %v; want %q, %v", got, err, tt.want, tt.wantErr)
			}
		})
	}
}

func TestOwnerOf(t *testing.T) {
	tests := []struct {
		name string
		pid  int
		ok   bool
	}{
		{"latchkey-node-123-0", 123, true},
		{"latchkey-node-123-45", 123, true},
		{"latchkey-node-123", 0, false},
		{"latchkey-node-0-1", 0, false},
		{"latchkey-node--1-1", 0, false},
		{"latchkey-node-123-x", 0, false},
		{"latchkey-node-123--1", 0, false},
		{"latchkey-node-123-0-backup", 0, false},
		{"my-latchkey-node-123-0", 0, false},
		{"kubepods", 0, false},
	}
	for _, tt := range tests {
		pid, ok := ownerOf(tt.name)
		if pid != tt.pid || ok != tt.ok {
			t.Errorf("ownerOf(%q) = %d, %t; want %d, %t", tt.name, pid, ok, tt.pid, tt.ok)
		}
	}
}

// pair is a connected pair of control sockets.
func pair(t *testing.T) (a, b *net.UnixConn) {
	t.Helper()
	a, file, err := socketPair()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	other, err := net.FileConn(file)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); other.Close() })
	return a, other.(*net.UnixConn)
}

func TestMessages(t *testing.T) {
	a, b := pair(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	// Larger than a socket buffer, and with a descriptor.
	sent := command{Action: "x", Args: json.RawMessage(`"` + strings.Repeat("y", 1<<20) + `"`)}
	errs := make(chan error, 1)
	go func() {
		err := send(a, sent, []*os.File{w})
		errs <- errors.Join(err, w.Close(), send(a, command{Action: "second"}, nil), a.Close())
	}()
	var got command
	files, err := receive(b, &got)
	if err != nil {
		t.Fatal(err)
	}
	if got.Action != sent.Action || !bytes.Equal(got.Args, sent.Args) {
		t.Errorf("another message came than was sent")
	}
	if len(files) != 1 {
		t.Fatalf("%d descriptors came, want 1", len(files))
	}
	if _, err := files[0].WriteString("hello"); err != nil {
		t.Fatal(err)
	}
	files[0].Close()
	if text, err := io.ReadAll(r); err != nil || string(text) != "hello" {
		t.Errorf("through the passed pipe came %q, %v", text, err)
	}
	if files, err := receive(b, &got); err != nil || got.Action != "second" || len(files) != 0 {
		t.Errorf("second message: %+v, %d descriptors, %v", got, len(files), err)
	}
	if _, err := receive(b, &got); err != io.EOF {
		t.Errorf("at the end: %v, want io.EOF", err)
	}
	if err := <-errs; err != nil {
		t.Error(err)
	}
}

// The control socket is written by a process in a pod.
func FuzzReceive(f *testing.F) {
	f.Add([]byte("\x00\x00\x00\x02\x00\x00\x00\x00{}"))
	f.Add([]byte("\x00\x00\x00\x02\x00\x00\x00\x01{}"))
	f.Add([]byte("\xff\xff\xff\xff\x00\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 64<<10 {
			return // would fill the socket's buffer, and nobody reads yet
		}
		a, b := pair(t)
		if _, err := a.Write(data); err != nil && len(data) > 0 {
			t.Fatal(err)
		}
		a.Close()
		for {
			var got answer
			files, err := receive(b, &got)
			if len(files) > 0 {
				t.Fatalf("%d descriptors came from nowhere", len(files))
			}
			if err != nil {
				return
			}
		}
	})
}

func TestRunActions(t *testing.T) {
	actions := Actions{
		"double": func(_ *Session, args json.RawMessage) (any, error) {
			var n int
			err := json.Unmarshal(args, &n)
			return 2 * n, err
		},
		"refused": func(*Session, json.RawMessage) (any, error) {
			return nil, &fs.PathError{Op: "connect", Path: "x", Err: syscall.ECONNREFUSED}
		},
		"late":   func(*Session, json.RawMessage) (any, error) { return nil, os.ErrDeadlineExceeded },
		"panics": func(*Session, json.RawMessage) (any, error) { panic("boo") },
		"opaque": func(*Session, json.RawMessage) (any, error) { return make(chan int), nil },
	}
	call := func(name string) answer {
		return run(actions, &Session{}, command{Action: name, Args: json.RawMessage("21")})
	}
	if got := call("double"); got.Error != nil || string(got.Result) != "42" {
		t.Errorf("double: %s, %v", got.Result, got.Error)
	}
	if got := call("refused").Error; got == nil || !errors.Is(got, syscall.ECONNREFUSED) || got.Timeout {
		t.Errorf("refused: %+v", got)
	}
	if got := call("late").Error; got == nil || !got.Timeout {
		t.Errorf("late: %+v", got)
	}
	if got := call("panics").Error; got == nil || !strings.Contains(got.Message, "boo") {
		t.Errorf("panics: %+v", got)
	}
	if got := call("opaque").Error; got == nil {
		t.Error("a result that has no JSON was accepted")
	}
	if got := call("missing").Error; got == nil || got.Unwrap() != nil {
		t.Errorf("missing: %+v", got)
	}
}

func TestTailKeepsTheEnd(t *testing.T) {
	var out tail
	for range 5 {
		if n, err := out.Write(bytes.Repeat([]byte("x"), tailSize/3)); n != tailSize/3 || err != nil {
			t.Fatal(n, err)
		}
	}
	out.Write([]byte("the end"))
	if got := out.String(); len(got) != tailSize || !strings.HasSuffix(got, "xthe end") {
		t.Errorf("kept %d bytes, ending in %q", len(got), got[max(0, len(got)-10):])
	}
}

func TestOnThread(t *testing.T) {
	want := errors.New("mine")
	if err := onThread(func() error { return want }); !errors.Is(err, want) {
		t.Errorf("got %v, want %v", err, want)
	}
	func() {
		defer func() {
			if p, ok := recover().(string); !ok || !strings.Contains(p, "boo") {
				t.Errorf("recovered %v, want the function's panic", p)
			}
		}()
		onThread(func() error { panic("boo") })
	}()
	if err := onThread(func() error { runtime.Goexit(); return nil }); !errors.Is(err, errGoexit) {
		t.Errorf("a function that left its goroutine gave %v", err)
	}
}

func TestUIDs(t *testing.T) {
	a, b := randomUID(), randomUID()
	if len(a) != 36 || a == b || a[14] != '4' {
		t.Errorf("%s and %s are not two random UUIDs", a, b)
	}
}
