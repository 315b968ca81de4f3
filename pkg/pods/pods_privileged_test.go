// SPDX-License-Identifier: Apache-2.0

//go:build privileged

package pods

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/pkg/cgroup"
	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

// realNode is a kubepods tree of its own on the machine's cgroup2 mount.
type realNode struct {
	t        testing.TB
	mount    cgroup.Mount
	root     cgroup.Root
	resolver *cgroup.Resolver
	x        *Index
}

func newRealNode(t testing.TB, change func(*Config)) *realNode {
	t.Helper()
	m, err := cgroup.FindMount("")
	if err != nil {
		t.Fatal(err)
	}
	top := fmt.Sprintf("/latchkey-test-%d-%s", os.Getpid(), strings.ReplaceAll(t.Name(), "/", "-"))
	n := &realNode{t: t, mount: m}
	if err := os.Mkdir(m.Join(top), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.removeAll(top) })
	n.mkdir(top + "/kubepods")
	if n.root, err = cgroup.FindRoot(m, "", top+"/kubepods"); err != nil {
		t.Fatal(err)
	}
	if n.resolver, err = cgroup.NewResolver(cgroup.ResolverConfig{Mount: m, Owner: n.root.Owner}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.resolver.Close() })
	cfg := Config{Root: n.root, Mount: m, Resolver: n.resolver, RescanEvery: time.Hour}
	if cfg.HostNetns, cfg.HostNetnsCookie, err = OwnNetns(); err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(&cfg)
	}
	n.x = mustNew(t, cfg)
	return n
}

func (n *realNode) removeAll(dir string) {
	entries, err := os.ReadDir(n.mount.Join(dir))
	if err != nil {
		n.t.Error(err)
		return
	}
	for _, e := range entries {
		if e.IsDir() {
			n.removeAll(dir + "/" + e.Name())
		}
	}
	n.rmdir(dir)
}

// rmdir removes a cgroup; its last process may be leaving it just now.
func (n *realNode) rmdir(dir string) {
	n.t.Helper()
	eventually(n.t, "removal of "+dir, func() bool {
		err := os.Remove(n.mount.Join(dir))
		if err != nil && !errors.Is(err, unix.EBUSY) {
			n.t.Fatal(err)
		}
		return err == nil
	})
}

func (n *realNode) mkdir(dir string) evidence.CgroupID {
	n.t.Helper()
	if err := os.MkdirAll(n.mount.Join(dir), 0o755); err != nil {
		n.t.Fatal(err)
	}
	id, err := cgroup.ID(n.mount.Join(dir))
	if err != nil {
		n.t.Fatal(err)
	}
	return id
}

// dir gives a path in this node's tree for one of the fake node's.
func (n *realNode) dir(path string) string {
	return n.root.Path() + strings.TrimPrefix(path, "/kubepods")
}

// run starts a process in a cgroup, in a network namespace of its own if asked,
// and returns its pid and a function that ends it.
func (n *realNode) run(dir string, ownNetns bool) (pid int, stop func()) {
	n.t.Helper()
	n.mkdir(dir)
	fd, err := os.Open(n.mount.Join(dir))
	if err != nil {
		n.t.Fatal(err)
	}
	defer fd.Close()
	cmd := exec.Command("cat")
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(fd.Fd()), Pdeathsig: syscall.SIGKILL}
	if ownNetns {
		cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWNET
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		n.t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		n.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	stop = sync.OnceFunc(func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			n.t.Error(err)
		}
	})
	n.t.Cleanup(stop)
	// An echo says that it runs, in the namespaces it is to have.
	if _, err := in.Write([]byte("x")); err != nil {
		n.t.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, 1)); err != nil {
		n.t.Fatal(err)
	}
	return cmd.Process.Pid, stop
}

func netnsOf(t testing.TB, pid int) evidence.NetnsInode {
	t.Helper()
	inode, err := readNetns(fmt.Sprintf("/proc/%d", pid))
	if err != nil {
		t.Fatal(err)
	}
	return inode
}

// The end of a pod is known within 100 ms of the removal of its cgroup. The
// latency is printed; the test's own bound is only for a watch that is broken.
func TestEndOfRealPod(t *testing.T) {
	n := newRealNode(t, nil)
	start(t, n.x, n.x.Run)
	if !n.x.Stats().Watching {
		eventually(t, "watching", func() bool { return n.x.Stats().Watching })
	}
	const rounds = 50
	var latency []time.Duration
	for i := range rounds {
		dir := n.dir([]string{dirA, dirB, dirC}[i%3]) // the class's directory appears under way
		id := n.mkdir(dir + "/c1")
		p, err := n.x.Resolve(id)
		if err != nil {
			t.Fatal(err)
		}
		_, stop := n.run(dir+"/c1", false)
		stop()
		n.rmdir(dir + "/c1")
		if p.Ended() {
			t.Fatal("ended while its directory exists")
		}
		n.rmdir(dir)
		latency = append(latency, eventually(t, "end", p.Ended))
		if _, err := n.resolver.Lookup(id); !errors.Is(err, cgroup.ErrGone) {
			t.Errorf("the id still resolves: %v", err)
		}
	}
	slices.Sort(latency)
	t.Logf("rmdir to Ended: median %v, worst of %d %v", latency[rounds/2], rounds, latency[rounds-1])
	if s := n.x.Stats(); s.Overflows != 0 || s.Errors != 0 {
		t.Errorf("stats %+v", s)
	}
}

// Whatever a workload names the cgroups it makes, it stays the outermost pod.
func TestForgedDirectories(t *testing.T) {
	n := newRealNode(t, nil)
	start(t, n.x, n.x.Run)
	attacker, victim := n.dir(dirA), n.dir(dirB)
	n.mkdir(victim)
	for _, forged := range []string{
		attacker + "/pod" + string(uidB),
		attacker + "/burstable/pod" + string(uidB),
		attacker + "/kubepods/burstable/pod" + string(uidB),
		attacker + "/c1" + victim,
		attacker + "/" + "x (deleted)/pod" + string(uidB),
	} {
		id := n.mkdir(forged)
		p, err := n.x.Resolve(id)
		if err != nil || p.UID != uidA {
			t.Errorf("%s: %+v, %v", forged, p, err)
		}
	}
	for _, i := range n.x.List() {
		if i.Path != attacker && i.Path != victim {
			t.Errorf("a forged directory became a pod: %+v", i)
		}
	}
	if _, err := n.x.Resolve(n.mkdir(n.root.Path() + "/burstable")); !errors.Is(err, cgroup.ErrNotPod) {
		t.Errorf("QoS directory: %v", err)
	}
	own, err := n.mount.SelfPath("")
	if err != nil {
		t.Fatal(err)
	}
	id, err := n.resolver.ID(own)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.x.Resolve(id); !errors.Is(err, cgroup.ErrNotPod) {
		t.Errorf("the test's own cgroup: %v", err)
	}
}

func TestRealNetworkNamespaces(t *testing.T) {
	var ticks atomic.Int64 // every look at the clock is far from the last one
	n := newRealNode(t, func(c *Config) {
		c.Now = func() time.Time { return time.Unix(0, 0).Add(walkSoon * time.Duration(ticks.Add(1))) }
	})
	start(t, n.x, n.x.Run)
	host := n.x.cfg.HostNetns
	pauseA, stopA := n.run(n.dir(dirA)+"/pause", true)
	nestedA, stopNested := n.run(n.dir(dirA)+"/app/docker", true)
	pauseB, stopB := n.run(n.dir(dirB)+"/pause", true)
	n.run(n.dir(dirC)+"/pause", false)
	pod := func(dir string) *Pod {
		t.Helper()
		p, err := n.x.Resolve(n.mkdir(n.dir(dir)))
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	a, b, c := pod(dirA), pod(dirB), pod(dirC)
	n.x.learnSandboxes(t.Context())
	own, other, nested := netnsOf(t, pauseA), netnsOf(t, pauseB), netnsOf(t, nestedA)
	for name, tc := range map[string]struct {
		pod   *Pod
		inode evidence.NetnsInode
		want  NetnsResult
	}{
		"own":                    {a, own, NetnsOwn},
		"nested":                 {a, nested, NetnsUnknown},
		"other pod's":            {a, other, NetnsOtherPod},
		"other pod's, reversed":  {b, own, NetnsOtherPod},
		"another's nested":       {b, nested, NetnsUnknown},
		"host's":                 {a, host, NetnsHostNotAllowed},
		"hostNetwork":            {c, host, NetnsOwn},
		"hostNetwork in a pod's": {c, own, NetnsOtherPod},
	} {
		if got := n.x.CheckNetns(tc.pod, 0, tc.inode); got != tc.want {
			t.Errorf("%s: %v, want %v", name, got, tc.want)
		}
	}
	// B's namespace ends; what is cached of it must not refuse anybody.
	stopB()
	if got := n.x.CheckNetns(a, 0, other); got != NetnsUnknown {
		t.Errorf("namespace of a sandbox that is gone: %v", got)
	}
	// A's sandbox is re-created: the pod's own namespace is another one now.
	stopA()
	stopNested()
	again, _ := n.run(n.dir(dirA)+"/pause2", true)
	if got := n.x.CheckNetns(a, 0, netnsOf(t, again)); got != NetnsOwn {
		t.Errorf("re-created sandbox: %v", got)
	}
	if got := n.x.CheckNetns(a, 0, host); got != NetnsHostNotAllowed {
		t.Errorf("host's, after the sandbox was re-created: %v", got)
	}
}

func TestManyPods(t *testing.T) {
	n := newRealNode(t, nil)
	const pods = 2000
	ids := make([]evidence.CgroupID, pods)
	for i := range ids {
		class := []string{"", "/burstable", "/besteffort"}[i%3]
		ids[i] = n.mkdir(fmt.Sprintf("%s%s/podaaaaaaaa-0000-4000-8000-%012d/c1", n.root.Path(), class, i))
	}
	begin := time.Now()
	start(t, n.x, n.x.Run)
	t.Logf("index of %d pods built in %v", pods, time.Since(begin))
	if got := n.x.Stats().Pods; got != pods {
		t.Errorf("%d pods", got)
	}
	begin = time.Now()
	for i, id := range ids {
		p, err := n.x.Resolve(id)
		if err != nil || !strings.HasSuffix(string(p.UID), fmt.Sprintf("%012d", i)) {
			t.Fatalf("%d: %+v, %v", i, p, err)
		}
	}
	t.Logf("first look at all: %v each", time.Since(begin)/pods)
	if s := n.x.Stats(); s.LazyPods != 0 {
		t.Errorf("stats %+v", s)
	}
	// All end at once, as when a node is drained: none is missed.
	n.removeAll(n.root.Path() + "/burstable")
	eventually(t, "all of a class to end", func() bool { return n.x.Stats().Pods == pods-pods/3-1 })
}

// One connection's evidence to its pod: the cost on the accept path.
func BenchmarkAttestHit(b *testing.B) {
	n := newRealNode(b, nil)
	id := n.mkdir(n.dir(dirB) + "/c1")
	pid, _ := n.run(n.dir(dirB)+"/c1", true)
	conn := evidence.Connection{TaskCgroup: id, SocketCgroup: id, NetnsCookie: 12345, NetnsInode: netnsOf(b, pid)}
	if att, p := n.x.Attest(conn, true); p == nil || att.UnknownNetns {
		b.Fatalf("got %+v", att)
	}
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, p := n.x.Attest(conn, true); p == nil {
				b.Fatal("not attested")
			}
		}
	})
}

func BenchmarkResolveHit(b *testing.B) {
	n := newRealNode(b, nil)
	id := n.mkdir(n.dir(dirB) + "/c1")
	b.ReportAllocs()
	for b.Loop() {
		if _, err := n.x.Resolve(id); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkEnded(b *testing.B) {
	n := newRealNode(b, nil)
	p, err := n.x.Resolve(n.mkdir(n.dir(dirB)))
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if p.Ended() {
			b.Fatal("ended")
		}
	}
}
