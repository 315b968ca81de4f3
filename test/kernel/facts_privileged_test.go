// SPDX-License-Identifier: Apache-2.0

//go:build privileged

package kernel

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/rlimit"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/bpf"
	"github.com/latchkey-dev/latchkey/pkg/attribution"
	"github.com/latchkey-dev/latchkey/pkg/evidence"
	"github.com/latchkey-dev/latchkey/test/rig"
	"github.com/latchkey-dev/latchkey/test/testnode"
)

func TestMain(m *testing.M) {
	testnode.Main(testnode.Actions{"probe-without-btf": probeWithoutBTF})
	os.Exit(m.Run())
}

// series of the running kernel. Only tests ask for it: what Latchkey does goes
// by probes.
func series(t testing.TB) string {
	t.Helper()
	var u unix.Utsname
	must(t, unix.Uname(&u))
	return Series(unix.ByteSliceToString(u.Release[:]))
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// fact goes to the log of the kernel matrix, on a line of its own.
func fact(fields ...string) { fmt.Println(Fact(fields...)) }

// A probe that finds a feature missing on a kernel that is not older than the
// one named has a wrong version, or is wrong itself: either way the agent would
// refuse a good kernel, or send people to a wrong one.
func TestPrivilegedProbesAgreeWithTheKernel(t *testing.T) {
	running := series(t)
	found := attribution.Features()
	if len(found) < 10 {
		t.Errorf("only %d features are probed", len(found))
	}
	for _, f := range found {
		state := "yes"
		switch {
		case errors.Is(f.Err, ebpf.ErrNotSupported):
			state = "missing"
		case f.Err != nil:
			state = "cannot tell: " + f.Err.Error()
			t.Errorf("%s: %v", f.Name, f.Err)
		}
		fact(FactFeature, f.Name, f.Since, state)
		if err := judgeProbe(running, f.Since, state == "yes"); err != nil {
			t.Errorf("%s: %v", f.Name, err)
		}
	}
}

// Attribution opens on every kernel of the matrix, or says why not.
func TestPrivilegedFallbacks(t *testing.T) {
	running := series(t)
	b := newBed(t)
	a, err := attribution.Open(b.cfg)
	if err != nil {
		fact(FactRefused, err.Error())
		t.Fatal(err)
	}
	defer a.Close()
	got := a.Status().Fallbacks
	for _, f := range got {
		fact(FactFallback, f)
		if err := judgeFallback(running, f); err != nil {
			t.Error(err)
		}
	}
	for _, want := range knownFallbacks {
		inUse := slices.ContainsFunc(got, func(f string) bool { return strings.Contains(f, want.contains) })
		if older := Older(running, want.before); inUse != older {
			t.Errorf("fallback %q on %s: in use %v, want %v", want.contains, running, inUse, older)
		}
	}
	if len(got) > len(knownFallbacks) {
		t.Errorf("a fallback that this test does not know: %q", got)
	}

	// Whatever is used, the evidence is right.
	pod, err := b.node.AddPod(t.Context(), testnode.PodConfig{Name: "web"})
	must(t, err)
	want, err := pod.Place().CgroupID()
	must(t, err)
	ln := b.listen(t)
	proc, err := pod.Place().Spawn(t.Context())
	must(t, err)
	defer proc.Kill()
	client, err := proc.DialContext(t.Context(), "tcp", agentAddress)
	must(t, err)
	defer client.Close()
	must(t, ln.(*net.TCPListener).SetDeadline(time.Now().Add(30*time.Second)))
	server, err := ln.Accept()
	must(t, err)
	defer server.Close()
	ev, ok, err := a.Evidence(server.(syscall.Conn))
	must(t, err)
	if !ok || ev.TaskCgroup != want || ev.SocketCgroup != want || ev.NetnsInode != pod.Netns().Inode() || ev.NetnsCookie == 0 {
		events, err := a.Events()
		t.Logf("the programs counted %+v, %v", events, err)
		t.Errorf("evidence %+v, %v; want cgroup %d twice, netns inode %d and a cookie", ev, ok, want, pod.Netns().Inode())
	}
	// The limit that maps were charged to.
	var limit unix.Rlimit
	must(t, unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit))
	if Older(running, "5.11") && limit.Cur != unix.RLIM_INFINITY {
		t.Errorf("RLIMIT_MEMLOCK is %d on a kernel that charges maps to it", limit.Cur)
	}
}

// Whoever operates the node sees the fallbacks: in the log of the start and in
// the answer to the readiness probe.
func TestPrivilegedAgentNamesItsFallbacks(t *testing.T) {
	r, err := rig.New(t.Context(), rig.Config{AgentBinary: agentBinary(t)})
	must(t, err)
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	a, err := r.StartAgent(ctx)
	must(t, err)
	t.Cleanup(a.Kill)
	ready, err := r.Ready(ctx)
	must(t, err)
	running := series(t)
	logged, log := 0, a.Log()
	for _, f := range knownFallbacks {
		want := Older(running, f.before)
		if got := strings.Contains(ready, "fallback: ") && strings.Contains(ready, f.contains); got != want {
			t.Errorf("readiness names %q: %v, want %v:\n%s", f.contains, got, want, ready)
		}
		if got := strings.Contains(log, f.contains); got != want {
			t.Errorf("the log names %q: %v, want %v:\n%s", f.contains, got, want, log)
		}
		if want {
			logged++
		}
	}
	if n := strings.Count(log, "fallback in use on this kernel"); n != logged {
		t.Errorf("%d fallbacks in the log of the start, want %d:\n%s", n, logged, log)
	}
}

// agentBinary is the agent's program: the one given, where there is no Go to
// build it with, or one built now.
func agentBinary(t *testing.T) string {
	t.Helper()
	if path := os.Getenv("LATCHKEY_AGENT"); path != "" {
		return path
	}
	out := filepath.Join(t.TempDir(), "latchkey-agent")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-o", out, "github.com/latchkey-dev/latchkey/cmd/latchkey-agent")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building the agent: %v\n%s", err, text)
	}
	return out
}

// A kernel without type information is refused with a message that names it.
func TestPrivilegedRefusedWithoutBTF(t *testing.T) {
	b := newBed(t)
	var r refusal
	must(t, b.node.HostPlace().Call(t.Context(), "probe-without-btf", nil, &r))
	if !r.Unsupported || !strings.Contains(r.Text, "CONFIG_DEBUG_INFO_BTF") || !strings.Contains(r.Text, "Linux 5.10") {
		t.Errorf("unsupported %v: %s; want a refusal that names CONFIG_DEBUG_INFO_BTF and the oldest kernel", r.Unsupported, r.Text)
	}
}

type refusal struct {
	Unsupported bool
	Text        string
}

// probeWithoutBTF hides the type information in a mount namespace of its own.
func probeWithoutBTF(*testnode.Session, json.RawMessage) (any, error) {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return nil, err
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return nil, fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("none", "/sys/kernel/btf", "tmpfs", 0, ""); err != nil {
		return nil, fmt.Errorf("hide the type information: %w", err)
	}
	err := attribution.Probe()
	return refusal{errors.Is(err, attribution.ErrUnsupported), fmt.Sprint(err)}, nil
}

var processed = regexp.MustCompile(`(?m)^processed (\d+) insns`)

// The verifier's work is counted, so that a change which doubles it is seen
// before a kernel refuses it.
func TestPrivilegedVerifierCounts(t *testing.T) {
	b := newBed(t)
	must(t, rlimit.RemoveMemlock()) // as Open does
	spec, err := bpf.LoadAttribution()
	must(t, err)
	// As the agent sets them: the verifier knows the constants.
	port, n := [attribution.MaxPorts]uint32{80}, uint32(1)
	var v4 [attribution.MaxAddresses]uint32
	var v6 [attribution.MaxAddresses][4]uint32
	v4[0], v6[0] = 0x17aafea9, [4]uint32{0xc20e00fd, 0, 0, 0x23000000}
	for name, value := range map[string]any{
		bpf.AttributionVarPorts: port, bpf.AttributionVarPortCount: n,
		bpf.AttributionVarAddresses4: v4, bpf.AttributionVarAddress4Count: n,
		bpf.AttributionVarAddresses6: v6, bpf.AttributionVarAddress6Count: n,
		bpf.AttributionVarKubepodsId: uint64(cgroupID(t, b.node.KubepodsRoot())),
	} {
		must(t, spec.Variables[name].Set(value))
	}
	// The verifier's own statistics: VerifiedInstructions of the program's info
	// is only there from 5.16 on.
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{
		Programs: ebpf.ProgramOptions{LogLevel: ebpf.LogLevelStats},
	})
	must(t, err)
	defer coll.Close()
	var counts []Count
	for _, name := range slices.Sorted(maps.Keys(coll.Programs)) {
		prog := coll.Programs[name]
		m := processed.FindStringSubmatch(prog.VerifierLog)
		if m == nil {
			t.Errorf("%s: the verifier gave no count:\n%s", name, prog.VerifierLog)
			continue
		}
		done, err := strconv.Atoi(m[1])
		must(t, err)
		info, err := prog.Info()
		must(t, err)
		size, err := info.TranslatedSize()
		must(t, err)
		c := Count{name, done, size / 8}
		counts = append(counts, c)
		fact(FactVerifier, c.Program, strconv.Itoa(c.Processed), strconv.Itoa(c.Translated))
		if v, ok := info.VerifiedInstructions(); ok && int(v) != done {
			t.Errorf("%s: the verifier's log says %d instructions, the program's info %d", name, done, v)
		}
	}
	baseline, err := CommittedBaseline()
	must(t, err)
	wrong, known := baseline.Check(series(t), counts)
	for _, w := range wrong {
		t.Error(w)
	}
	if !known {
		t.Logf("no earlier counts of Linux %s in verifier.tsv to compare with", series(t))
	}
}

const agentAddress = "169.254.170.23:80"

// bed is a node to load the programs on, with the agent's address.
type bed struct {
	node *testnode.Node
	cfg  attribution.Config
}

func newBed(t *testing.T) *bed {
	t.Helper()
	node, err := testnode.New(t.Context(), testnode.Config{})
	must(t, err)
	b := &bed{node: node}
	t.Cleanup(func() {
		_, err := attribution.Cleanup(b.cfg.PinPath)
		if err := errors.Join(err, node.Leave(), node.Close()); err != nil {
			t.Error(err)
		}
	})
	must(t, node.Join())
	addr := netip.MustParseAddrPort(agentAddress)
	b.cfg = attribution.Config{
		CgroupPath: node.CgroupRoot(), PinPath: filepath.Join(node.BPFFS(), "latchkey"),
		Addresses: []netip.Addr{addr.Addr()}, Ports: []uint16{addr.Port()},
		Kubepods: cgroupID(t, node.KubepodsRoot()), Netns: node.Netns().Inode(),
	}
	must(t, node.Do(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.AddrAdd(lo, &netlink.Addr{IPNet: &net.IPNet{IP: addr.Addr().AsSlice(), Mask: net.CIDRMask(32, 32)}})
	}))
	return b
}

func (b *bed) listen(t *testing.T) net.Listener {
	t.Helper()
	var ln net.Listener
	must(t, b.node.Do(func() (err error) {
		lc := net.ListenConfig{}
		lc.SetMultipathTCP(false)
		ln, err = lc.Listen(t.Context(), "tcp4", agentAddress)
		return err
	}))
	t.Cleanup(func() { ln.Close() })
	return ln
}

func cgroupID(t testing.TB, dir string) evidence.CgroupID {
	t.Helper()
	id, err := testnode.CgroupID(dir)
	must(t, err)
	return id
}
