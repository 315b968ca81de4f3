// SPDX-License-Identifier: Apache-2.0

package etcd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const patience = 2 * time.Minute

func start(t testing.TB, cfg Config) *Server {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	s, err := Start(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func put(t testing.TB, c *clientv3.Client, k, v string) {
	t.Helper()
	if _, err := c.Put(t.Context(), k, v); err != nil {
		t.Fatal(err)
	}
}

func get(t testing.TB, c *clientv3.Client, k string) string {
	t.Helper()
	r, err := c.Get(t.Context(), k)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Kvs) == 0 {
		return ""
	}
	return string(r.Kvs[0].Value)
}

// sockets lists this process's sockets, with what the kernel's tables say of
// each: protocol, and address or path.
func sockets(t *testing.T) map[string]string {
	t.Helper()
	kinds := map[string]string{}
	for _, table := range []string{"tcp", "tcp6", "udp", "udp6", "unix", "packet", "netlink"} {
		b, err := os.ReadFile(filepath.Join("/proc/self/net", table))
		if err != nil {
			continue // no such family in this kernel
		}
		for _, line := range strings.Split(string(b), "\n")[1:] {
			f := strings.Fields(line)
			inode, what := 9, 1
			switch table {
			case "unix":
				inode, what = 6, 7
			case "packet":
				inode, what = 8, 2
			case "netlink":
				inode, what = 9, 1
			}
			if len(f) <= inode {
				continue
			}
			at := "unnamed"
			if len(f) > what {
				at = f[what]
			}
			kinds["socket:["+f[inode]+"]"] = table + " " + at
		}
	}
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, fd := range fds {
		to, err := os.Readlink(filepath.Join("/proc/self/fd", fd.Name()))
		if err != nil || !strings.HasPrefix(to, "socket:") {
			continue
		}
		kind, ok := kinds[to]
		if !ok {
			kind = "in no table"
		}
		out[to] = kind
	}
	return out
}

// Nobody can connect to this etcd: it has no socket of any kind, neither a TCP
// port nor one in the abstract namespace nor a file.
func TestNoSocket(t *testing.T) {
	before := sockets(t)
	dir := t.TempDir()
	s := start(t, Config{Dir: dir})
	put(t, s.Client(), "a", "b")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	w := s.Client().Watch(ctx, "a", clientv3.WithRev(1))
	if r := <-w; r.Err() != nil {
		t.Error(r.Err())
	}
	for inode, kind := range sockets(t) {
		if _, ok := before[inode]; !ok {
			t.Errorf("etcd opened a socket: %s", kind)
		}
	}
	if err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.Type()&fs.ModeSocket != 0 {
			t.Errorf("%s is a socket", p)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	// The test sees what it looks for.
	for _, at := range []struct{ network, address, want string }{
		{"tcp", "127.0.0.1:0", "tcp 0100007F:"},
		{"unix", "@latchkey-etcd-test-" + filepath.Base(filepath.Dir(dir)), "unix @latchkey-etcd-test-"},
	} {
		l, err := net.Listen(at.network, at.address)
		if err != nil {
			t.Fatal(err)
		}
		seen := false
		for inode, kind := range sockets(t) {
			_, old := before[inode]
			seen = seen || !old && strings.HasPrefix(kind, at.want)
		}
		l.Close()
		if !seen {
			t.Errorf("this test does not see a listener on %s %s", at.network, at.address)
		}
	}
}

// Whatever the umask and the mode that the directory had: it is its owner's.
func TestPrivate(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	s := start(t, Config{Dir: dir})
	put(t, s.Client(), "a", "b")
	fi, err := os.Stat(dir)
	if err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
	err = filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err == nil && fi.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %v", p, fi.Mode())
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

func TestOneProcessOnly(t *testing.T) {
	dir := t.TempDir()
	s := start(t, Config{Dir: dir})
	if _, err := Start(t.Context(), Config{Dir: dir}); !errors.Is(err, ErrLocked) {
		t.Errorf("a second server: %v", err)
	}
	if _, err := Restore(strings.NewReader(""), dir, nil); !errors.Is(err, ErrLocked) {
		t.Errorf("restore over a running server: %v", err)
	}
	put(t, s.Client(), "a", "b")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("closed again: %v", err)
	}
	if s.Err() != nil {
		t.Errorf("closed, and that is a failure: %v", s.Err())
	}
	// Whoever comes late is told, and brings nothing down.
	if _, err := s.Status(t.Context()); !errors.Is(err, ErrStopped) {
		t.Error(err)
	}
	if _, err := s.Save(t.Context(), io.Discard); !errors.Is(err, ErrStopped) {
		t.Error(err)
	}
	if _, err := s.Recover(t.Context()); !errors.Is(err, ErrStopped) {
		t.Error(err)
	}
	if err := s.Defrag(t.Context()); !errors.Is(err, ErrStopped) {
		t.Error(err)
	}
	if _, err := s.Client().Get(t.Context(), "a"); err == nil {
		t.Error("a closed server answers")
	}
	// What was written is there, also leases; and revisions go on.
	again := start(t, Config{Dir: dir})
	if got := get(t, again.Client(), "a"); got != "b" {
		t.Errorf("after a restart: %q", got)
	}
}

func TestStartGivesUp(t *testing.T) {
	if _, err := Start(t.Context(), Config{}); err == nil {
		t.Error("started nowhere")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	dir := t.TempDir()
	// It may be ready sooner than it is noticed that nobody waits.
	if s, err := Start(ctx, Config{Dir: dir}); err == nil {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	} else if !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	// What was begun is in nobody's way.
	start(t, Config{Dir: dir})
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Start(t.Context(), Config{Dir: file}); err == nil {
		t.Error("started on a file")
	}
}

// A first start that is killed at any moment leaves nothing that the next one
// cannot start from: see Server.bootstrap.
func TestUnfinishedBootstrap(t *testing.T) {
	dir := t.TempDir()
	// As etcd leaves it when it dies just after it made its log.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	s := &Server{cfg: Config{Dir: dir, Log: slog.New(slog.DiscardHandler), Retention: time.Hour, QuotaBytes: 1 << 30, slow: time.Hour}}
	if e, err := s.run(ctx, memberDir(dir)+".new"); err == nil {
		e.Close()
	}
	if _, err := os.Stat(memberDir(dir) + ".new"); err != nil {
		t.Fatal(err)
	}
	put(t, start(t, Config{Dir: dir}).Client(), "a", "b")
	if _, err := os.Stat(memberDir(dir) + ".new"); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

// Calls that are under way when the server closes end, with an error.
func TestCloseEndsCalls(t *testing.T) {
	s := start(t, Config{Dir: t.TempDir()})
	w := s.Client().Watch(context.Background(), "a")
	var wg sync.WaitGroup
	ended := make(chan error, 8)
	begun := make(chan struct{}, 8)
	for range 8 {
		wg.Go(func() {
			for i := 0; ; i++ {
				ctx, cancel := context.WithTimeout(context.Background(), patience)
				_, err := s.Client().Put(ctx, "a", "b")
				cancel()
				if i == 0 {
					begun <- struct{}{}
				}
				if err != nil {
					ended <- err
					return
				}
			}
		})
	}
	for range 8 {
		<-begun
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	wg.Wait()
	for range 8 {
		if err := <-ended; err == nil || errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a write to a closed server: %v", err)
		}
	}
	for range w {
	}
	if s.Err() != nil {
		t.Error(s.Err())
	}
}

func TestUnexpectedEnd(t *testing.T) {
	s := start(t, Config{Dir: t.TempDir()})
	s.etcd.Server.HardStop()
	select {
	case <-s.Failed():
	case <-time.After(patience):
		t.Fatal("nobody noticed")
	}
	if !errors.Is(s.Err(), ErrStopped) {
		t.Error(s.Err())
	}
	if _, err := s.Status(t.Context()); !errors.Is(err, ErrStopped) {
		t.Error(err)
	}
}

func TestSnapshot(t *testing.T) {
	dir := t.TempDir()
	s := start(t, Config{Dir: filepath.Join(dir, "one")})
	for i := range 500 {
		put(t, s.Client(), fmt.Sprint("key-", i), strings.Repeat("v", 100))
	}
	if _, err := s.Client().Delete(t.Context(), "key-7"); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	n, err := s.Save(t.Context(), &b)
	if err != nil || n != int64(b.Len()) {
		t.Fatalf("%d of %d bytes, %v", n, b.Len(), err)
	}
	put(t, s.Client(), "later", "x")
	st, err := s.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}

	file := filepath.Join(dir, "snapshot")
	if err := os.WriteFile(file, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	info, err := Verify(file)
	if err != nil || info.Keys < 499 || info.Bytes != n || info.Revision >= st.Revision {
		t.Errorf("%+v, %v", info, err)
	}
	two := filepath.Join(dir, "two")
	if got, err := Restore(bytes.NewReader(b.Bytes()), two, nil); err != nil || got != info {
		t.Fatalf("%+v, %v", got, err)
	}
	if _, err := Restore(bytes.NewReader(b.Bytes()), two, nil); !errors.Is(err, ErrNotEmpty) {
		t.Errorf("restored over a store: %v", err)
	}
	r := start(t, Config{Dir: two})
	if get(t, r.Client(), "key-0") == "" || get(t, r.Client(), "key-7") != "" || get(t, r.Client(), "later") != "" {
		t.Error("what was restored is not what was saved")
	}
	now, err := r.Status(t.Context())
	if err != nil || now.Revision <= st.Revision {
		t.Errorf("revision %d after %d, %v: who knew that one takes the past for the present", now.Revision, st.Revision, err)
	}
	// A watch from before the restore is told to begin anew.
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if w := <-r.Client().Watch(ctx, "key", clientv3.WithPrefix(), clientv3.WithRev(st.Revision)); w.CompactRevision == 0 {
		t.Errorf("%+v", w)
	}
	put(t, r.Client(), "key-7", "again")

	if entries, err := os.ReadDir(two); err != nil || len(entries) != 2 {
		t.Errorf("left in the directory: %v, %v", entries, err)
	}
}

func TestDamagedSnapshot(t *testing.T) {
	dir := t.TempDir()
	s := start(t, Config{Dir: filepath.Join(dir, "one")})
	put(t, s.Client(), "a", "b")
	var b bytes.Buffer
	if _, err := s.Save(t.Context(), &b); err != nil {
		t.Fatal(err)
	}
	whole := b.Bytes()
	changed := bytes.Clone(whole)
	changed[len(changed)/2] ^= 1
	for name, bad := range map[string][]byte{
		"empty": nil, "cut": whole[:len(whole)-1], "no digest": whole[:len(whole)-32], "half": whole[:len(whole)/2],
		"one bit": changed, "text": []byte("hello"), "digest of nothing": make([]byte, 32),
	} {
		to := filepath.Join(dir, strings.ReplaceAll(name, " ", "-"))
		if _, err := Restore(bytes.NewReader(bad), to, nil); !errors.Is(err, ErrBadSnapshot) {
			t.Errorf("%s: %v", name, err)
		}
		// Nothing is there, so a good one can follow.
		if _, err := Restore(bytes.NewReader(whole), to, nil); err != nil {
			t.Errorf("%s, and then a good one: %v", name, err)
		}
	}
	if _, err := s.Save(t.Context(), failing{}); err == nil {
		t.Error("saved to where nothing can be written")
	}
	if _, err := Verify(filepath.Join(dir, "nothing")); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	put(t, s.Client(), "a", "c")
}

// A snapshot that is being written when the server closes ends with an error,
// and neither holds the server up nor brings the process down.
func TestCloseWhileSaving(t *testing.T) {
	s := start(t, Config{Dir: t.TempDir()})
	for i := range 40 {
		put(t, s.Client(), fmt.Sprint("key-", i), strings.Repeat("v", 100<<10))
	}
	var st Status
	for deadline := time.Now().Add(patience); st.SizeBytes < 2<<20; time.Sleep(5 * time.Millisecond) {
		var err error
		if st, err = s.Status(t.Context()); err != nil || time.Now().After(deadline) {
			t.Fatal(st, err)
		}
	}
	r, w := io.Pipe()
	saved := make(chan error, 1)
	go func() {
		_, err := s.Save(t.Context(), w)
		saved <- err
	}()
	if _, err := io.ReadFull(r, make([]byte, 4096)); err != nil {
		t.Fatal(err)
	}
	closed := make(chan error, 1)
	go func() { closed <- s.Close() }()
	<-s.life.Done()
	// The reader goes away, as one on a connection does that is closed.
	r.Close()
	if err := <-saved; err == nil {
		t.Error("half a snapshot is none")
	}
	select {
	case err := <-closed:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Fatal("Close does not return")
	}
}

type failing struct{}

func (failing) Write([]byte) (int, error) { return 0, errors.New("disk full") }

func TestQuota(t *testing.T) {
	var log lockedBuffer
	s := start(t, Config{Dir: t.TempDir(), QuotaBytes: 8 << 20, check: time.Hour, Log: slog.New(slog.NewTextHandler(&log, nil))})
	c := s.Client()
	big := strings.Repeat("x", 512<<10)
	var err error
	for i := 0; i < 200 && err == nil; i++ {
		_, err = c.Put(t.Context(), "big", big)
	}
	if !errors.Is(err, rpctypes.ErrNoSpace) {
		t.Fatalf("after more than the quota: %v", err)
	}
	st, serr := s.Status(t.Context())
	if serr != nil || !st.NoSpace || st.Corrupt || st.QuotaBytes != 8<<20 || st.SizeBytes == 0 {
		t.Errorf("%+v, %v", st, serr)
	}
	// Reading and deleting go on.
	if get(t, c, "big") != big {
		t.Error("lost")
	}
	if _, err := c.Delete(t.Context(), "big"); err != nil {
		t.Error(err)
	}
	if _, err := c.Put(t.Context(), "small", "x"); !errors.Is(err, rpctypes.ErrNoSpace) {
		t.Errorf("%v", err)
	}
	ok, err := s.Recover(t.Context())
	if err != nil || !ok {
		t.Fatalf("recover: %v, %v", ok, err)
	}
	put(t, c, "small", "x")
	if st, err := s.Status(t.Context()); err != nil || st.NoSpace || st.SizeBytes > 4<<20 {
		t.Errorf("%+v, %v", st, err)
	}
	if ok, err := s.Recover(t.Context()); err != nil || !ok {
		t.Errorf("recover what needs none: %v, %v", ok, err)
	}
	if !strings.Contains(log.String(), "store has room again") {
		t.Errorf("the log says: %s", log.String())
	}
}

// It is also done without being asked, when what fills the store is history.
func TestKeepsRoom(t *testing.T) {
	var log lockedBuffer
	s := start(t, Config{Dir: t.TempDir(), QuotaBytes: 4 << 20, check: 10 * time.Millisecond, Log: slog.New(slog.NewTextHandler(&log, nil))})
	big := strings.Repeat("x", 512<<10)
	full := false
	for deadline := time.Now().Add(patience); !full || !strings.Contains(log.String(), "store has room again"); {
		if time.Now().After(deadline) {
			t.Fatalf("full %v; the log says: %s", full, log.String())
		}
		if full {
			time.Sleep(5 * time.Millisecond)
			continue
		}
		_, err := s.Client().Put(t.Context(), "big", big)
		if full = errors.Is(err, rpctypes.ErrNoSpace); err != nil && !full {
			t.Fatal(err)
		}
	}
	put(t, s.Client(), "small", "x")
	if !strings.Contains(log.String(), "store is full") {
		t.Errorf("the log says: %s", log.String())
	}
}

// The client's own Defragment works too, which in etcd's in-process client it
// does not.
func TestDefragment(t *testing.T) {
	s := start(t, Config{Dir: t.TempDir()})
	for range 50 {
		put(t, s.Client(), "a", strings.Repeat("x", 100<<10))
	}
	// etcd brings what it has in its log to the database in batches.
	var st Status
	for deadline := time.Now().Add(patience); st.SizeBytes < 3<<20; {
		var err error
		time.Sleep(5 * time.Millisecond)
		if st, err = s.Status(t.Context()); err != nil || time.Now().After(deadline) {
			t.Fatal(st, err)
		}
	}
	if _, err := s.Client().Compact(t.Context(), st.Revision, clientv3.WithCompactPhysical()); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Client().Defragment(t.Context(), ""); err != nil {
		t.Fatal(err)
	}
	if now, err := s.Status(t.Context()); err != nil || now.SizeBytes >= st.SizeBytes {
		t.Errorf("%+v after %+v, %v", now, st, err)
	}
	put(t, s.Client(), "a", "b")
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// Values are what the store keeps, and no business of a log's; keys are named in
// this program's way.
func TestLog(t *testing.T) {
	var b lockedBuffer
	s := start(t, Config{Dir: t.TempDir(), slow: time.Nanosecond, Log: slog.New(slog.NewTextHandler(&b, &slog.HandlerOptions{Level: slog.LevelDebug - 8}))})
	for i := range 100 {
		put(t, s.Client(), fmt.Sprint("key-", i), "a-value-that-is-secret")
	}
	if _, err := s.Client().Txn(t.Context()).If(clientv3.Compare(clientv3.Value("key-1"), "=", "a-value-that-is-secret")).
		Then(clientv3.OpPut("key-1", "a-value-that-is-secret")).Commit(); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	log := b.String()
	for _, bad := range []string{"secret", "level=INFO", "data-dir=", "production", "not cryptographically"} {
		if strings.Contains(log, bad) {
			t.Errorf("the log has %q", bad)
		}
	}
	for _, good := range []string{"level=DEBUG", "component=etcd", "data_dir=", "took too long"} {
		if !strings.Contains(log, good) {
			t.Errorf("the log does not have %q", good)
		}
	}
}
