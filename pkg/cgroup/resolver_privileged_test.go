// SPDX-License-Identifier: Apache-2.0

//go:build privileged

package cgroup

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

func hostMount(t testing.TB) Mount {
	t.Helper()
	m, err := FindMount("")
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// tree makes a cgroup of its own and returns its path below the mount.
func tree(t testing.TB, m Mount) string {
	t.Helper()
	name := strings.Map(func(r rune) rune {
		if r == '/' {
			return '-'
		}
		return r
	}, t.Name())
	top := fmt.Sprintf("/latchkey-test-%d-%s", os.Getpid(), name)
	mustMkdir(t, m, top)
	t.Cleanup(func() { removeTree(t, m, top) })
	return top
}

func mustMkdir(t testing.TB, m Mount, path string) evidence.CgroupID {
	t.Helper()
	if err := os.MkdirAll(m.Join(path), 0o755); err != nil {
		t.Fatal(err)
	}
	id, err := ID(m.Join(path))
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func removeTree(t testing.TB, m Mount, top string) {
	t.Helper()
	var dirs []string
	if err := walk(Mount{Point: m.Join(top)}, maxSearch, func(path string, _ int) (bool, error) {
		dirs = append(dirs, strings.TrimSuffix(top+path, "/"))
		return true, nil
	}); err != nil {
		t.Error(err)
	}
	for i := len(dirs) - 1; i >= 0; i-- {
		if err := os.Remove(m.Join(dirs[i])); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Error(err)
		}
	}
}

func mustResolver(t testing.TB, cfg ResolverConfig) *Resolver {
	t.Helper()
	r, err := NewResolver(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func TestIDAndPath(t *testing.T) {
	m := hostMount(t)
	r := mustResolver(t, ResolverConfig{Mount: m})
	top := tree(t, m)
	for _, sub := range []string{"", "/kubepods", "/kubepods/x y", "/kubepods/x (deleted)", "/kubepods/x (deleted)/y"} {
		id := mustMkdir(t, m, top+sub)
		if other, err := r.ID(top + sub); err != nil || other != id {
			t.Errorf("%q: Resolver.ID is %v, %v; ID is %v", sub, other, err, id)
		}
		var st unix.Stat_t
		if err := unix.Stat(m.Join(top+sub), &st); err != nil || st.Ino != uint64(id) {
			t.Errorf("%q: inode %d, id %d, %v", sub, st.Ino, id, err)
		}
		for range 2 { // the second answer is the cache's
			if got, err := r.Path(id); err != nil || got != top+sub {
				t.Errorf("%q: got %q, %v", sub, got, err)
			}
		}
	}
	id, err := r.ID("/")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := r.Path(id); err != nil || got != "/" {
		t.Errorf("top: %q, %v", got, err)
	}
}

func TestGone(t *testing.T) {
	m := hostMount(t)
	r := mustResolver(t, ResolverConfig{Mount: m})
	top := tree(t, m)
	id := mustMkdir(t, m, top+"/x")
	cached := mustMkdir(t, m, top+"/cached")
	if _, err := r.Path(cached); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"/x", "/cached"} {
		if err := os.Remove(m.Join(top + name)); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := r.Path(id); !errors.Is(err, ErrGone) {
		t.Errorf("removed: %q, %v", got, err)
	}
	if got, err := r.Lookup(cached); !errors.Is(err, ErrGone) {
		t.Errorf("past the cache: %q, %v", got, err)
	}
	if got, err := r.Path(cached); err != nil || got != top+"/cached" {
		t.Errorf("cached: %q, %v", got, err)
	}
	// The name comes back, the id does not.
	if again := mustMkdir(t, m, top+"/x"); again == id {
		t.Errorf("id %d was reused", id)
	}
	if got, err := r.Path(id); !errors.Is(err, ErrGone) {
		t.Errorf("after the name came back: %q, %v", got, err)
	}
	if got, err := r.Path(1 << 60); !errors.Is(err, ErrGone) {
		t.Errorf("id never given out: %q, %v", got, err)
	}
	if got, err := r.Path(0); err == nil {
		t.Errorf("id 0: %q", got)
	}
	if _, err := ID(m.Join(top + "/none")); !errors.Is(err, ErrGone) {
		t.Error(err)
	}
	if _, err := r.ID(top + "/none"); !errors.Is(err, ErrGone) {
		t.Error(err)
	}
	if _, err := ID(t.TempDir()); !errors.Is(err, ErrNotCgroup2) {
		t.Error(err)
	}
	if _, err := ID(m.Join(top + "/cgroup.procs")); !errors.Is(err, ErrNotCgroup2) {
		t.Error(err)
	}
	if _, err := NewResolver(ResolverConfig{Mount: Mount{Point: t.TempDir()}}); !errors.Is(err, ErrNotCgroup2) {
		t.Error(err)
	}
}

// A handle knows no mount: it leads to any cgroup of the tree, also to those
// that a mount of a part of it does not show.
func TestOutsideTheMount(t *testing.T) {
	m := hostMount(t)
	top := tree(t, m)
	outside := mustMkdir(t, m, top+"/outside")
	inside := mustMkdir(t, m, top+"/part/inside")
	part := Mount{Point: t.TempDir()}
	if err := unix.Mount(m.Join(top+"/part"), part.Point, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(part.Point, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	r := mustResolver(t, ResolverConfig{Mount: part})
	t.Cleanup(func() { r.Close() })
	if got, err := r.Path(inside); err != nil || got != "/inside" {
		t.Errorf("inside: %q, %v", got, err)
	}
	if got, err := r.Path(outside); !errors.Is(err, ErrOutside) {
		t.Errorf("outside: %q, %v", got, err)
	}
}

// A path is believed only if it leads back to the id. Here it does not, because
// another cgroup is mounted over the directory.
func TestPathThatLeadsElsewhere(t *testing.T) {
	m := hostMount(t)
	top := tree(t, m)
	id := mustMkdir(t, m, top+"/x")
	mustMkdir(t, m, top+"/other")
	r := mustResolver(t, ResolverConfig{Mount: m})
	for _, over := range []string{"/other", "/x"} {
		if err := unix.Mount(m.Join(top+over), m.Join(top+"/x"), "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
		got, err := r.Lookup(id)
		if umount := unix.Unmount(m.Join(top+"/x"), unix.MNT_DETACH); umount != nil {
			t.Fatal(umount)
		}
		if !errors.Is(err, ErrGone) {
			t.Errorf("%s on top: %q, %v", over, got, err)
		}
	}
	if got, err := r.Lookup(id); err != nil || got != top+"/x" {
		t.Errorf("with nothing on top: %q, %v", got, err)
	}
}

// Who owns a part of the tree can make a kubepods directory there.
func TestFindRootPassesOverDelegatedTrees(t *testing.T) {
	m := hostMount(t)
	part := Mount{Point: m.Join(tree(t, m)), Root: "/"}
	mustMkdir(t, part, "/delegated.service/kubepods")
	if root, err := FindRoot(part, "", ""); err != nil || root.Path() != "/delegated.service/kubepods" {
		t.Errorf("root's own: %q, %v", root.Path(), err)
	}
	if err := os.Chown(part.Join("/delegated.service"), 65534, 65534); err != nil {
		t.Fatal(err)
	}
	if root, err := FindRoot(part, "", ""); !errors.Is(err, ErrNoRoot) {
		t.Errorf("another user's: %q, %v", root.Path(), err)
	}
}

// One owner with many cgroups pushes out its own entries only.
func TestCacheIsBoundedPerOwner(t *testing.T) {
	m := hostMount(t)
	top := tree(t, m)
	root := mustRoot(t, top+"/kubepods")
	r := mustResolver(t, ResolverConfig{Mount: m, Owner: root.Owner, PerOwner: 4, MaxOwners: 3})
	pod := func(i int) string { return fmt.Sprintf("%s/pod1c3c2b62-7a0e-4d5e-9f50-0a8f4c1f2a%02d", root.Path(), i) }
	resolve := func(id evidence.CgroupID) (miss bool) {
		t.Helper()
		before := r.Lookups()
		if _, err := r.Path(id); err != nil {
			t.Fatal(err)
		}
		return r.Lookups() != before
	}
	quiet := mustMkdir(t, m, pod(1))
	resolve(quiet)
	var flood []evidence.CgroupID
	for i := range 20 {
		flood = append(flood, mustMkdir(t, m, fmt.Sprintf("%s/nested%d", pod(2), i)))
		resolve(flood[i])
	}
	if resolve(quiet) {
		t.Error("the quiet pod's entry was pushed out")
	}
	for i, id := range flood[16:] {
		if resolve(id) {
			t.Errorf("entry %d of the newest four is missing", i)
		}
	}
	if !resolve(flood[0]) {
		t.Error("the flooding pod has more entries than its bound")
	}
	r.Forget(pod(1))
	if !resolve(quiet) {
		t.Error("a forgotten owner's entry is still there")
	}
	for i := 3; i < 9; i++ {
		resolve(mustMkdir(t, m, pod(i)))
	}
	if n := len(r.owners); n > 3 {
		t.Errorf("%d owners", n)
	}
	total := 0
	for i := range r.shards {
		total += len(r.shards[i].paths)
	}
	if total > 3*4 {
		t.Errorf("%d paths", total)
	}
	if long := mustMkdir(t, m, pod(3)+strings.Repeat("/"+strings.Repeat("x", 200), 5)); !resolve(long) {
		t.Error("an overlong path was known before")
	} else if !resolve(long) {
		t.Error("an overlong path was kept")
	}
}

func TestConcurrentUse(t *testing.T) {
	m := hostMount(t)
	top := tree(t, m)
	r := mustResolver(t, ResolverConfig{Mount: m, PerOwner: 3})
	paths := map[evidence.CgroupID]string{}
	for i := range 8 {
		path := fmt.Sprintf("%s/c%d", top, i)
		paths[mustMkdir(t, m, path)] = path
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 50 {
				for id, want := range paths {
					if got, err := r.Path(id); err != nil || got != want {
						t.Errorf("%d: %q, %v; want %q", id, got, err, want)
					}
				}
				r.Forget("")
			}
		})
	}
	wg.Wait()
}

// The id of a process's cgroup is that of the directory it was put into, and
// the agent finds its own place both ways.
func TestSelfPathOfRealProcess(t *testing.T) {
	m := hostMount(t)
	top := tree(t, m)
	dir := top + "/kubepods/besteffort/podaaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee/agent"
	mustMkdir(t, m, dir)
	fd, err := os.Open(m.Join(dir))
	if err != nil {
		t.Fatal(err)
	}
	defer fd.Close()
	cmd := exec.Command("cat")
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(fd.Fd())}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); cmd.Wait() })
	if got, err := m.findPID(cmd.Process.Pid); err != nil || got != dir {
		t.Errorf("searched: %q, %v", got, err)
	}
	root, err := FindRoot(m, dir, "")
	if err != nil || root.Path() != top+"/kubepods" {
		t.Errorf("root %q, %v", root.Path(), err)
	}
	if own, err := m.SelfPath(""); err != nil {
		t.Errorf("own: %q, %v", own, err)
	} else if again, err := m.findPID(os.Getpid()); err != nil || again != own {
		t.Errorf("own: read %q, searched %q, %v", own, again, err)
	}
}

func TestHitDoesNotAllocate(t *testing.T) {
	m := hostMount(t)
	id := mustMkdir(t, m, tree(t, m))
	r := mustResolver(t, ResolverConfig{Mount: m})
	if n := testing.AllocsPerRun(100, func() {
		if _, err := r.Path(id); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkResolveHit(b *testing.B) {
	m := hostMount(b)
	id := mustMkdir(b, m, tree(b, m))
	r := mustResolver(b, ResolverConfig{Mount: m})
	b.ReportAllocs()
	for b.Loop() {
		if _, err := r.Path(id); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkResolveMiss(b *testing.B) {
	m := hostMount(b)
	id := mustMkdir(b, m, tree(b, m))
	r := mustResolver(b, ResolverConfig{Mount: m})
	b.ReportAllocs()
	for b.Loop() {
		if _, err := r.Lookup(id); err != nil {
			b.Fatal(err)
		}
	}
}
