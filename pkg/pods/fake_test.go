// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/cgroup"
	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

const (
	uidA evidence.PodUID = "aaaaaaaa-0000-4000-8000-000000000001"
	uidB evidence.PodUID = "bbbbbbbb-0000-4000-8000-000000000002"
	uidC evidence.PodUID = "cccccccc-0000-4000-8000-000000000003"

	dirA = "/kubepods/pod" + string(uidA)
	dirB = "/kubepods/burstable/pod" + string(uidB)
	dirC = "/kubepods/besteffort/pod" + string(uidC)
)

// fakeTree is a directory tree that gives ids as cgroupfs does: never twice.
// The directories are real, so inotify works on them.
type fakeTree struct {
	t     testing.TB
	mount cgroup.Mount

	mu     sync.Mutex
	next   evidence.CgroupID
	ids    map[string]evidence.CgroupID // of what exists
	paths  map[evidence.CgroupID]string // of what ever existed
	cached map[evidence.CgroupID]bool   // Path answers although it is gone
	fail   error                        // answer of every ID
	onID   func(path string)            // runs after ID has its answer
	forgot []string
}

func newFakeTree(t testing.TB) *fakeTree {
	t.Helper()
	f := &fakeTree{
		t: t, mount: cgroup.Mount{Point: t.TempDir(), Root: "/"}, next: 100,
		ids:    make(map[string]evidence.CgroupID),
		paths:  make(map[evidence.CgroupID]string),
		cached: make(map[evidence.CgroupID]bool),
	}
	return f
}

func (f *fakeTree) mkdir(path string) evidence.CgroupID {
	f.t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := 1; i <= len(path); i++ {
		if i < len(path) && path[i] != '/' {
			continue
		}
		dir := path[:i]
		if _, ok := f.ids[dir]; ok {
			continue
		}
		f.next++
		f.ids[dir], f.paths[f.next] = f.next, dir
		if err := os.Mkdir(f.mount.Join(dir), 0o755); err != nil {
			f.t.Fatal(err)
		}
	}
	return f.ids[path]
}

func (f *fakeTree) rmdir(path string) {
	f.t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	for dir := range f.ids {
		if dir == path || strings.HasPrefix(dir, path+"/") {
			delete(f.ids, dir)
		}
	}
	if err := os.RemoveAll(f.mount.Join(path)); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fakeTree) Path(id evidence.CgroupID) (string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if id == outsideID {
		return "", cgroup.ErrOutside
	}
	if id == brokenID {
		return "", errBroken
	}
	path, ok := f.paths[id]
	if !ok || f.ids[path] != id && !f.cached[id] {
		return "", cgroup.ErrGone
	}
	return path, nil
}

const (
	outsideID evidence.CgroupID = 1 << 40
	brokenID  evidence.CgroupID = 1 << 41
)

var errBroken = errors.New("the kernel does not say")

func (f *fakeTree) ID(path string) (evidence.CgroupID, error) {
	f.mu.Lock()
	id, ok := f.ids[path]
	fail, onID := f.fail, f.onID
	f.mu.Unlock()
	if onID != nil {
		onID(path)
	}
	switch {
	case fail != nil:
		return 0, fail
	case !ok:
		return 0, cgroup.ErrGone
	}
	return id, nil
}

func (f *fakeTree) Forget(dir string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.forgot = append(f.forgot, dir)
}

func (f *fakeTree) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

// log is what the callbacks were told.
type record struct {
	mu    sync.Mutex
	lines []string
}

func (r *record) add(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lines = append(r.lines, fmt.Sprintf(format, args...))
}

func (r *record) all() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]string(nil), r.lines...)
}

func (f *fakeTree) config(r *record) Config {
	f.t.Helper()
	root, err := cgroup.NewRoot("/kubepods")
	if err != nil {
		f.t.Fatal(err)
	}
	cfg := Config{Root: root, Mount: f.mount, Resolver: f, ProcFS: f.t.TempDir(), RescanEvery: time.Hour}
	if r != nil {
		cfg.OnPod = func(p *Pod) { r.add("pod %s %d", p.UID, p.ID) }
		cfg.OnEnd = func(p *Pod) { r.add("end %s %d %v", p.UID, p.ID, p.Ended()) }
		cfg.OnQoS = func(id evidence.CgroupID) { r.add("qos %d", id) }
	}
	return cfg
}

func mustNew(t testing.TB, cfg Config) *Index {
	t.Helper()
	x, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return x
}

// start runs the index until the test ends and returns once it is ready.
func start(t testing.TB, x *Index, run func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	<-x.Ready()
}

// eventually polls a condition that another goroutine or the kernel brings
// about. The bound is for a test that hangs, not a claim about time.
func eventually(t testing.TB, what string, cond func() bool) time.Duration {
	t.Helper()
	begin := time.Now()
	for !cond() {
		if time.Since(begin) > 30*time.Second {
			t.Fatalf("never happened: %s", what)
		}
		time.Sleep(200 * time.Microsecond)
	}
	return time.Since(begin)
}

// process makes a process of the fake procfs.
func process(t testing.TB, procfs string, pid int, start uint64, netns evidence.NetnsInode) {
	t.Helper()
	dir := filepath.Join(procfs, strconv.Itoa(pid))
	if err := os.MkdirAll(dir+"/ns", 0o755); err != nil {
		t.Fatal(err)
	}
	stat := fmt.Sprintf("%d (a) b) (c) S 1 %d 0 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 %d 1000 10", pid, pid, start)
	if err := os.WriteFile(dir+"/stat", []byte(stat), 0o600); err != nil {
		t.Fatal(err)
	}
	link := dir + "/ns/net"
	if err := os.Remove(link); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	if netns == 0 {
		return // a zombie
	}
	if err := os.Symlink(fmt.Sprintf("net:[%d]", netns), link); err != nil {
		t.Fatal(err)
	}
}

func (f *fakeTree) procs(dir string, pids ...int) {
	f.t.Helper()
	var b strings.Builder
	for _, pid := range pids {
		fmt.Fprintln(&b, pid)
	}
	if err := os.WriteFile(f.mount.Join(dir)+"/cgroup.procs", []byte(b.String()), 0o600); err != nil {
		f.t.Fatal(err)
	}
}
