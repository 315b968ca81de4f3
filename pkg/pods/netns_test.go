// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

const (
	hostInode  evidence.NetnsInode  = 4026531840
	hostCookie evidence.NetnsCookie = 1
)

// node is a fake node with pod A (namespace 11), pod B (22) and pod C on the
// host network.
type node struct {
	*fakeTree
	x       *Index
	procfs  string
	clock   time.Time
	a, b, c *Pod
}

func newNode(t *testing.T) *node {
	t.Helper()
	n := &node{fakeTree: newFakeTree(t), clock: time.Unix(1e9, 0)}
	cfg := n.config(nil)
	cfg.HostNetns, cfg.HostNetnsCookie = hostInode, hostCookie
	cfg.Now = func() time.Time { return n.clock }
	n.procfs, n.x = cfg.ProcFS, mustNew(t, cfg)
	pod := func(dir string, pid int, netns evidence.NetnsInode) *Pod {
		id := n.mkdir(dir + "/app")
		n.mkdir(dir + "/pause")
		n.procs(dir)
		n.procs(dir+"/app", pid+1)
		n.procs(dir+"/pause", pid)
		process(t, n.procfs, pid, uint64(pid), netns)
		process(t, n.procfs, pid+1, uint64(pid+1), netns)
		p, err := n.x.Resolve(id)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	n.a, n.b, n.c = pod(dirA, 100, 11), pod(dirB, 200, 22), pod(dirC, 300, hostInode)
	return n
}

func TestCheckNetns(t *testing.T) {
	for name, tc := range map[string]struct {
		pod    func(*node) *Pod
		cookie evidence.NetnsCookie
		inode  evidence.NetnsInode
		want   NetnsResult
	}{
		"own":                                {podA, 1011, 11, NetnsOwn},
		"own, no cookie":                     {podA, 0, 11, NetnsOwn},
		"nested":                             {podA, 1099, 99, NetnsUnknown},
		"other pod's":                        {podA, 1022, 22, NetnsOtherPod},
		"other pod's, no cookie":             {podA, 0, 22, NetnsOtherPod},
		"host's":                             {podA, hostCookie, hostInode, NetnsHostNotAllowed},
		"host's, no cookie":                  {podA, 0, hostInode, NetnsHostNotAllowed},
		"host's, no inode":                   {podA, hostCookie, 0, NetnsHostNotAllowed},
		"nothing known":                      {podA, 0, 0, NetnsUnknown},
		"cookie alone":                       {podA, 1011, 0, NetnsUnknown},
		"hostNetwork":                        {podC, hostCookie, hostInode, NetnsOwn},
		"hostNetwork, no cookie":             {podC, 0, hostInode, NetnsOwn},
		"hostNetwork pod in another pod's":   {podC, 1022, 22, NetnsOtherPod},
		"hostNetwork pod, nested":            {podC, 1099, 99, NetnsUnknown},
		"host's inode, but another's cookie": {podA, 1099, hostInode, NetnsUnknown},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			n.x.learnSandboxes(t.Context())
			for range 2 { // from the files, then from what was learned
				if got := n.x.CheckNetns(tc.pod(n), tc.cookie, tc.inode); got != tc.want {
					t.Errorf("got %v, want %v", got, tc.want)
				}
			}
			att, p := n.x.Attest(evidence.Connection{
				TaskCgroup: tc.pod(n).ID, SocketCgroup: tc.pod(n).ID, NetnsCookie: tc.cookie, NetnsInode: tc.inode,
			}, true)
			refused := tc.want == NetnsOtherPod || tc.want == NetnsHostNotAllowed
			if refused != (p == nil) || refused != (att.Reason == evidence.ReasonForeignNetns) ||
				refused != (att.Finding == evidence.FindingContradictory) || att.UnknownNetns != (tc.want == NetnsUnknown) {
				t.Errorf("attestation %+v", att)
			}
		})
	}
}

// A namespace is another pod's also before that pod has connected or a rescan has
// found it: a pod that has just started is no blind spot.
func TestNetnsOfPodThatHasJustStarted(t *testing.T) {
	n := newNode(t)
	if got := n.x.CheckNetns(n.a, 1022, 22); got != NetnsOtherPod {
		t.Errorf("got %v, want %v", got, NetnsOtherPod)
	}
	// A pod that nobody can see into yet is not searched again at once.
	walks := n.x.sandboxWalks.Load()
	for range 3 {
		if got := n.x.CheckNetns(n.a, 1099, 99); got != NetnsUnknown {
			t.Errorf("got %v, want %v", got, NetnsUnknown)
		}
	}
	if more := n.x.sandboxWalks.Load() - walks; more > 1 {
		t.Errorf("%d searches for one unknown namespace, want at most one", more)
	}
}

// Nor is one whose directory no event has told of yet, and looking for such does
// not list the tree for each connection.
func TestNetnsOfPodThatNoEventHasToldOf(t *testing.T) {
	n := newNode(t)
	if got := n.x.CheckNetns(n.a, 1099, 99); got != NetnsUnknown {
		t.Errorf("nobody's: got %v, want %v", got, NetnsUnknown)
	}
	const dirD = "/kubepods/burstable/poddddddddd-0000-4000-8000-000000000004"
	n.mkdir(dirD + "/pause")
	n.procs(dirD)
	n.procs(dirD+"/pause", 400)
	process(t, n.procfs, 400, 400, 44)
	if got := n.x.CheckNetns(n.a, 1044, 44); got != NetnsUnknown || n.x.lookup(dirD) != nil {
		t.Errorf("at once after the last look: got %v", got)
	}
	n.clock = n.clock.Add(walkSoon)
	if got := n.x.CheckNetns(n.a, 1044, 44); got != NetnsOtherPod {
		t.Errorf("got %v, want %v", got, NetnsOtherPod)
	}
}

// Nor is one whose directory was searched before its first process was there.
func TestNetnsOfPodSearchedBeforeItsFirstProcess(t *testing.T) {
	n := newNode(t)
	n.procs(dirB + "/app")
	n.procs(dirB + "/pause")
	n.x.learnSandboxes(t.Context())
	n.procs(dirB+"/app", 201)
	n.procs(dirB+"/pause", 200)
	n.clock = n.clock.Add(walkSoon)
	if got := n.x.CheckNetns(n.a, 1022, 22); got != NetnsOtherPod {
		t.Errorf("got %v, want %v", got, NetnsOtherPod)
	}
}

// Nor one whose first process was seen before it entered the pod's namespace.
func TestNetnsOfPodSearchedWhileItsSandboxWasMade(t *testing.T) {
	n := newNode(t)
	rmProc(t, n, 200)
	process(t, n.procfs, 200, 200, hostInode)
	n.x.learnSandboxes(t.Context())
	if sb := n.b.netns.sandbox.Load(); sb == nil || sb.inode != hostInode {
		t.Fatalf("the test's beginning: got %+v", sb)
	}
	rmProc(t, n, 200)
	process(t, n.procfs, 200, 200, 22)
	n.clock = n.clock.Add(walkSoon)
	if got := n.x.CheckNetns(n.a, 1022, 22); got != NetnsOtherPod {
		t.Errorf("got %v, want %v", got, NetnsOtherPod)
	}
}

// A process of pod A that is older than pod B is moved into B's cgroup: it is the
// oldest there, and B's sandbox all the same is not where it is.
func TestProcessMovedIntoAnotherPod(t *testing.T) {
	moved := func(n *node, pids ...int) {
		n.procs(dirA + "/app")
		n.procs(dirB+"/app", append(pids, 201)...)
	}
	for name, move := range map[string]func(*testing.T, *node){
		"both are known": func(t *testing.T, n *node) {
			n.x.learnSandboxes(t.Context())
			moved(n, 101)
		},
		"nobody is known": func(_ *testing.T, n *node) { moved(n, 101) },
		"when only B had been searched": func(t *testing.T, n *node) {
			moved(n, 101)
			if sb := n.x.freshSandbox(n.b); sb == nil || sb.inode != 11 {
				t.Fatalf("the test's beginning: %+v", sb)
			}
		},
		"with more of them than are looked at": func(t *testing.T, n *node) {
			var many []int
			for pid := 110; pid < 110+2*maxSandboxTries; pid++ {
				process(t, n.procfs, pid, uint64(pid), 11)
				many = append(many, pid)
			}
			moved(n, many...)
		},
		"the one that held A's namespace": func(t *testing.T, n *node) {
			n.x.learnSandboxes(t.Context())
			n.procs(dirA + "/pause")
			moved(n, 100)
			rmProc(t, n, 200)
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			move(t, n)
			for range 3 {
				for _, cookie := range []evidence.NetnsCookie{1011, 0} {
					if got := n.x.CheckNetns(n.b, cookie, 11); got != NetnsOtherPod {
						t.Errorf("cookie %d: got %v, want %v", cookie, got, NetnsOtherPod)
					}
				}
				n.clock = n.clock.Add(time.Second)
			}
			// Neither pod is worse off in its own.
			for p, inode := range map[*Pod]evidence.NetnsInode{n.a: 11, n.b: 22} {
				if got := n.x.CheckNetns(p, 0, inode); got != NetnsOwn && got != NetnsUnknown {
					t.Errorf("%s in its own: %v", p.UID, got)
				}
			}
		})
	}
}

// The same of a pod on the host network: B has been seen to be elsewhere.
func TestProcessMovedFromTheHostNetwork(t *testing.T) {
	n := newNode(t)
	n.x.learnSandboxes(t.Context())
	process(t, n.procfs, 150, 150, hostInode)
	n.procs(dirB+"/app", 150, 201)
	for range 3 {
		n.clock = n.clock.Add(time.Second)
		if got := n.x.CheckNetns(n.b, hostCookie, hostInode); got != NetnsHostNotAllowed {
			t.Errorf("got %v, want %v", got, NetnsHostNotAllowed)
		}
	}
}

func podA(n *node) *Pod { return n.a }
func podC(n *node) *Pod { return n.c }

// The cookie is learned with the first connection; then nothing is read.
func TestUsualCaseReadsNothing(t *testing.T) {
	n := newNode(t)
	check := func(want NetnsResult, p *Pod, cookie evidence.NetnsCookie, inode evidence.NetnsInode) {
		t.Helper()
		if got := n.x.CheckNetns(p, cookie, inode); got != want {
			t.Errorf("got %v, want %v", got, want)
		}
	}
	check(NetnsOwn, n.a, 1011, 11)
	if err := os.RemoveAll(n.procfs); err != nil {
		t.Fatal(err)
	}
	check(NetnsOwn, n.a, 1011, 11)
	check(NetnsUnknown, n.b, 1022, 22)
}

// The sandbox is gone and the kernel has given its number to a new namespace.
func TestReusedInode(t *testing.T) {
	n := newNode(t)
	n.x.learnSandboxes(t.Context())
	// Pod B's sandbox dies; A's is re-created and gets B's old number.
	for _, pid := range []int{100, 101, 200, 201} {
		if err := os.RemoveAll(filepath.Join(n.procfs, strconv.Itoa(pid))); err != nil {
			t.Fatal(err)
		}
	}
	n.procs(dirA+"/pause", 110)
	process(t, n.procfs, 110, 1000, 22)
	n.clock = n.clock.Add(walkSoon)
	if got := n.x.CheckNetns(n.a, 1122, 22); got != NetnsOwn {
		t.Errorf("own namespace with a reused number: %v", got)
	}
	// And the other way round: the number is stale in B, a third namespace of
	// pod C has it.
	if got := n.x.CheckNetns(n.c, 1123, 11); got != NetnsUnknown {
		t.Errorf("number of a dead sandbox: %v", got)
	}
}

// The cached facts say "another pod's" while that pod's process is gone, its pid
// is another's, or it moved: no refusal on such facts.
func TestStaleFactsDoNotRefuse(t *testing.T) {
	for name, change := range map[string]func(*testing.T, *node){
		"process gone": func(t *testing.T, n *node) { n.procs(dirB + "/pause"); n.procs(dirB + "/app"); rmProc(t, n, 200) },
		"pid reused": func(t *testing.T, n *node) {
			n.procs(dirB + "/pause")
			n.procs(dirB + "/app")
			process(t, n.procfs, 200, 9999, 22)
		},
		"in a new netns":    func(t *testing.T, n *node) { process(t, n.procfs, 200, 200, 23); process(t, n.procfs, 201, 201, 23) },
		"pod ended":         func(t *testing.T, n *node) { n.rmdir(dirB); n.x.verify(n.b) },
		"zombie, all moved": func(t *testing.T, n *node) { process(t, n.procfs, 200, 200, 0); process(t, n.procfs, 201, 201, 23) },
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			n.x.learnSandboxes(t.Context())
			if got := n.x.CheckNetns(n.a, 1022, 22); got != NetnsOtherPod {
				t.Fatalf("before: %v", got)
			}
			change(t, n)
			n.clock = n.clock.Add(walkSoon)
			if got := n.x.CheckNetns(n.a, 1022, 22); got != NetnsUnknown {
				t.Errorf("after: %v", got)
			}
		})
	}
}

// Two namespaces with one number in turn: the cookie tells them apart.
func TestCookieTellsReusedNumbersApart(t *testing.T) {
	n := newNode(t)
	if got := n.x.CheckNetns(n.b, 1022, 22); got != NetnsOwn {
		t.Fatal(got)
	}
	if got := n.x.CheckNetns(n.a, 1023, 22); got != NetnsUnknown {
		t.Errorf("another namespace: %v", got)
	}
	if got := n.x.CheckNetns(n.a, 1022, 22); got != NetnsOtherPod {
		t.Errorf("that very namespace: %v", got)
	}
}

// A pod that turned out to be on the host network is allowed it, and one whose
// sandbox was re-created elsewhere is not any more.
func TestHostNetworkOnFreshFacts(t *testing.T) {
	n := newNode(t)
	if got := n.x.CheckNetns(n.a, hostCookie, hostInode); got != NetnsHostNotAllowed {
		t.Fatal(got)
	}
	process(t, n.procfs, 100, 100, hostInode)
	n.clock = n.clock.Add(walkSoon)
	if got := n.x.CheckNetns(n.a, hostCookie, hostInode); got != NetnsOwn {
		t.Errorf("its sandbox is in the host's: %v", got)
	}
	if got := n.x.List()[0]; got.UID != uidA || !got.HostNet || got.Sandbox != 100 || got.Netns != hostInode {
		t.Errorf("listed as %+v", got)
	}
}

func TestHostUnknownRefusesNothing(t *testing.T) {
	n := newNode(t)
	n.x.cfg.HostNetns = 0
	if got := n.x.CheckNetns(n.a, hostCookie, hostInode); got != NetnsUnknown {
		t.Error(got)
	}
	if got := n.x.CheckNetns(n.c, hostCookie, hostInode); got != NetnsOwn {
		t.Error(got)
	}
}

// Without hostPID every pid reads as 0, and without processes nothing is known:
// all is accepted, and /proc is not searched for each connection.
func TestProcessesNotVisible(t *testing.T) {
	n := newNode(t)
	for _, dir := range []string{dirA, dirB, dirC} {
		n.procs(dir+"/app", 0, 0)
		n.procs(dir+"/pause", 0)
	}
	for range 5 {
		for _, inode := range []evidence.NetnsInode{11, 22, hostInode} {
			if got := n.x.CheckNetns(n.a, 0, inode); got != NetnsUnknown {
				t.Errorf("%d: %v", inode, got)
			}
		}
	}
	if got := n.x.sandboxWalks.Load(); got != 1 {
		t.Errorf("%d searches", got)
	}
	n.clock = n.clock.Add(walkSoon)
	n.procs(dirA+"/pause", 100)
	if got := n.x.CheckNetns(n.a, 0, 11); got != NetnsOwn {
		t.Errorf("once they are visible: %v", got)
	}
}

func TestSandboxIsTheOldestAndNotTheMonitor(t *testing.T) {
	n := newNode(t)
	n.mkdir(dirA + "/crio-conmon-1")
	n.mkdir(dirA + "/app/deep/er")
	n.procs(dirA+"/crio-conmon-1", 50)
	n.procs(dirA+"/app/deep/er", 60)
	process(t, n.procfs, 50, 1, hostInode) // older, in the host's namespace
	process(t, n.procfs, 60, 400, 99)      // lower pid, younger
	sb := n.x.findSandbox(n.a)
	if sb == nil || sb.pid != 100 || sb.inode != 11 {
		t.Errorf("got %+v", sb)
	}
	process(t, n.procfs, 100, 100, 0) // a zombie has no namespace
	if sb := n.x.findSandbox(n.a); sb == nil || sb.pid != 101 {
		t.Errorf("got %+v", sb)
	}
}

// A pid that was read from the pod's cgroup is another process's by now: the
// host's, say, and the pod would pass for hostNetwork.
func TestPidReusedDuringTheSearch(t *testing.T) {
	n := newNode(t)
	process(t, n.procfs, 900, 900, hostInode)
	for name, c := range map[string]candidate{
		"not in the cgroup":     {900, 900, dirA + "/pause"},
		"of another age":        {100, 99, dirA + "/pause"},
		"gone":                  {901, 901, dirA + "/pause"},
		"cgroup gone":           {100, 100, dirA + "/none"},
		"in another's cgroup":   {200, 200, dirA + "/pause"},
		"in another of the pod": {101, 101, dirA + "/pause"},
	} {
		if sb := n.x.sandboxOf(c); sb != nil {
			t.Errorf("%s: %+v", name, sb)
		}
	}
	if sb := n.x.sandboxOf(candidate{100, 100, dirA + "/pause"}); sb == nil || sb.inode != 11 {
		t.Errorf("the pod's own: %+v", sb)
	}
}

// A workload with very many cgroups and processes bounds the search, and does
// not hide the sandbox beside them.
func TestSearchIsBounded(t *testing.T) {
	n := newNode(t)
	var many []int
	for pid := 1000; pid < 1000+2*maxProcsPerDir; pid++ {
		many = append(many, pid)
	}
	n.procs(dirA+"/app", many...)
	if got := n.x.readProcs(dirA + "/app"); len(got) != maxProcsPerDir {
		t.Errorf("%d processes read", len(got))
	}
	for i := range 2 * maxSandboxDirs {
		n.mkdir(dirA + "/app/" + strconv.Itoa(i))
	}
	if sb := n.x.findSandbox(n.a); sb == nil || sb.pid != 100 {
		t.Errorf("got %+v", sb)
	}
	long := strings.Repeat("1234567890123456\n", 2*maxProcsPerDir)
	if err := os.WriteFile(n.mount.Join(dirA+"/app/cgroup.procs"), []byte(long), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, pid := range n.x.readProcs(dirA + "/app") {
		if pid != 1234567890123456 {
			t.Errorf("half a number was read: %d", pid)
		}
	}
}

func rmProc(t *testing.T, n *node, pid int) {
	t.Helper()
	if err := os.RemoveAll(filepath.Join(n.procfs, strconv.Itoa(pid))); err != nil {
		t.Fatal(err)
	}
}

func TestOwnNetns(t *testing.T) {
	inode, cookie, err := OwnNetns()
	if err != nil || inode == 0 {
		t.Errorf("got %d, %d, %v", inode, cookie, err)
	}
}

func TestParseNetns(t *testing.T) {
	for link, want := range map[string]evidence.NetnsInode{
		"net:[4026531840]": 4026531840, "net:[1]": 1,
		"net:[0]": 0, "net:[]": 0, "net:[1": 0, "mnt:[1]": 0, "": 0, "net:[4294967296]": 0, "net:[-1]": 0,
	} {
		got, err := parseNetns(link)
		if got != want || (err == nil) != (want != 0) || err != nil && !errors.Is(err, errNetns) {
			t.Errorf("%q: %d, %v", link, got, err)
		}
	}
}

const statTail = " S 1 5 0 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 777 1000 10"

func TestParseStartTime(t *testing.T) {
	for stat, want := range map[string]uint64{
		"5 (pause)" + statTail:               777,
		"5 (a) R 1 2 3 (b c)" + statTail:     777,
		"5 ()" + statTail:                    777,
		"5 (x" + statTail:                    0,
		"5 (x) S 1 2":                        0,
		"":                                   0,
		"5 (x) S" + strings.Repeat(" x", 30): 0,
	} {
		got, err := parseStartTime(stat)
		if got != want || (err == nil) != (want != 0) || err != nil && !errors.Is(err, errStat) {
			t.Errorf("%q: %d, %v", stat, got, err)
		}
	}
}

// FuzzStartTime: a process chooses its name, and no name changes the rest.
func FuzzStartTime(f *testing.F) {
	for _, name := range []string{"pause", "a) S 1 1 1 1", "(", ")", " ", "\n) R 9 9"} {
		f.Add(name, "")
	}
	f.Add("", "5 (x) S")
	f.Fuzz(func(t *testing.T, name, junk string) {
		if got, err := parseStartTime("5 (" + name + ")" + statTail); err != nil || got != 777 {
			t.Fatalf("name %q: %d, %v", name, got, err)
		}
		if got, err := parseStartTime(junk); err != nil && got != 0 {
			t.Fatalf("error and result: %d, %v", got, err)
		}
	})
}
