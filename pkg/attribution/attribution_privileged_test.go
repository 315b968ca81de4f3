// SPDX-License-Identifier: Apache-2.0

//go:build privileged

package attribution

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/bpf"
	"github.com/latchkey-dev/latchkey/pkg/evidence"
	"github.com/latchkey-dev/latchkey/test/testnode"
)

const port = 80

var (
	addr4 = netip.MustParseAddr("169.254.170.23")
	addr6 = netip.MustParseAddr("fd00:ec2::23")
)

func TestMain(m *testing.M) {
	testnode.Main(testnode.Actions{
		"probe": func(*testnode.Session, json.RawMessage) (any, error) {
			err := Probe()
			return probeResult{errors.Is(err, ErrUnsupported), fmt.Sprint(err)}, nil
		},
		"begin": begin,
	})
	os.Exit(m.Run())
}

type probeResult struct {
	Unsupported bool
	Text        string
}

// begin opens handshakes that nobody answers, and keeps their sockets.
func begin(s *testnode.Session, raw json.RawMessage) (any, error) {
	var n int
	if err := json.Unmarshal(raw, &n); err != nil {
		return nil, err
	}
	for range n {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return nil, err
		}
		if err := unix.Connect(fd, &unix.SockaddrInet4{Port: port, Addr: addr4.As4()}); !errors.Is(err, unix.EINPROGRESS) {
			return nil, fmt.Errorf("connect: %v, want it in progress", err)
		}
	}
	return nil, nil
}

// swallow makes the pod's SYNs to the agent vanish, so that handshakes stay open.
func swallow(t testing.TB, p *testnode.Pod) {
	t.Helper()
	must(t, p.Netns().Do(func() error {
		nobody := net.IP{10, 88, 0, 254}
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		if err := netlink.NeighSet(&netlink.Neigh{
			LinkIndex: l.Attrs().Index, IP: nobody, State: netlink.NUD_PERMANENT,
			HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, 254},
		}); err != nil {
			return err
		}
		return netlink.RouteAdd(&netlink.Route{
			Dst: &net.IPNet{IP: addr4.AsSlice(), Mask: net.CIDRMask(32, 32)}, Gw: nobody, LinkIndex: l.Attrs().Index,
		})
	}))
}

// bed is a node whose agent is this process.
type bed struct {
	t    testing.TB
	node *testnode.Node
	a    *Attribution
	cfg  Config
	// listeners by family.
	v4, v6 net.Listener
}

func newBed(t testing.TB) *bed {
	t.Helper()
	node, err := testnode.New(t.Context(), testnode.Config{})
	if err != nil {
		t.Fatal(err)
	}
	b := &bed{t: t, node: node}
	t.Cleanup(func() {
		for _, l := range []net.Listener{b.v4, b.v6} {
			if l != nil {
				l.Close()
			}
		}
		if b.a != nil {
			b.a.Close()
		}
		_, err := Cleanup(b.cfg.PinPath)
		if err := errors.Join(err, node.Leave(), node.Close()); err != nil {
			t.Error(err)
		}
	})
	must(t, node.Join())
	b.cfg = Config{
		CgroupPath: node.CgroupRoot(),
		PinPath:    filepath.Join(node.BPFFS(), "latchkey"),
		Addresses:  []netip.Addr{addr4, addr6},
		Ports:      []uint16{port},
		Kubepods:   cgroupID(t, node.KubepodsRoot()),
		Netns:      node.Netns().Inode(),
	}
	must(t, node.Netns().AddLoopback(addr4, addr6))
	return b
}

func (b *bed) open() {
	b.t.Helper()
	a, err := Open(b.cfg)
	if err != nil {
		b.t.Fatalf("%+v", err)
	}
	b.a = a
	must(b.t, a.SetQoS([]evidence.CgroupID{
		cgroupID(b.t, filepath.Join(b.node.KubepodsRoot(), "burstable")),
		cgroupID(b.t, filepath.Join(b.node.KubepodsRoot(), "besteffort")),
	}))
}

func (b *bed) listen() {
	b.t.Helper()
	must(b.t, b.node.Do(func() (err error) {
		lc := net.ListenConfig{}
		lc.SetMultipathTCP(false)
		if b.v4, err = lc.Listen(b.t.Context(), "tcp4", fmt.Sprintf("%s:%d", addr4, port)); err != nil {
			return err
		}
		b.v6, err = lc.Listen(b.t.Context(), "tcp6", fmt.Sprintf("[%s]:%d", addr6, port))
		return err
	}))
}

func ready(t testing.TB) *bed {
	b := newBed(t)
	b.open()
	b.listen()
	return b
}

func (b *bed) pod(name string, cfg testnode.PodConfig) *testnode.Pod {
	b.t.Helper()
	cfg.Name = name
	p, err := b.node.AddPod(b.t.Context(), cfg)
	must(b.t, err)
	return p
}

func (b *bed) spawn(p testnode.Place) *testnode.Proc {
	b.t.Helper()
	proc, err := p.Spawn(b.t.Context())
	must(b.t, err)
	b.t.Cleanup(proc.Kill)
	return proc
}

// accept takes the next connection and reads its evidence.
func (b *bed) accept(l net.Listener) (evidence.Connection, bool) {
	b.t.Helper()
	must(b.t, l.(*net.TCPListener).SetDeadline(time.Now().Add(20*time.Second)))
	c, err := l.Accept()
	must(b.t, err)
	b.t.Cleanup(func() { c.Close() })
	ev, ok, err := b.a.Evidence(c.(syscall.Conn))
	must(b.t, err)
	return ev, ok
}

// dial connects from proc and returns what the agent saw.
func (b *bed) dial(proc *testnode.Proc, address string) (evidence.Connection, bool) {
	b.t.Helper()
	c, err := proc.DialContext(b.t.Context(), "tcp", address)
	must(b.t, err)
	b.t.Cleanup(func() { c.Close() })
	if strings.HasPrefix(address, "[fd00") {
		return b.accept(b.v6)
	}
	return b.accept(b.v4)
}

func (b *bed) events() map[string]uint64 {
	b.t.Helper()
	events, err := b.a.Events()
	must(b.t, err)
	out := map[string]uint64{}
	for _, e := range events {
		out[e.Name] = e.Count
		if e.Error && e.Count > 0 {
			b.t.Errorf("the programs counted %d errors of kind %s", e.Count, e.Name)
		}
	}
	return out
}

func (b *bed) wantPending(want int) {
	b.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		n, err := b.a.Pending()
		must(b.t, err)
		if n == want {
			return
		}
		if time.Now().After(deadline) {
			b.t.Fatalf("%d handshakes pending, want %d", n, want)
		}
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func cgroupID(t testing.TB, dir string) evidence.CgroupID {
	t.Helper()
	id, err := testnode.CgroupID(dir)
	must(t, err)
	return id
}

func placeID(t testing.TB, p testnode.Place) evidence.CgroupID {
	t.Helper()
	id, err := p.CgroupID()
	must(t, err)
	return id
}

func dest4() string { return fmt.Sprintf("%s:%d", addr4, port) }
func dest6() string { return fmt.Sprintf("[%s]:%d", addr6, port) }

// Every way an ordinary pod can connect: over veth, both families, v4-mapped,
// from the host's network namespace, from nested cgroups.
func TestPrivilegedEvidence(t *testing.T) {
	b := ready(t)
	burstable := b.pod("burstable", testnode.PodConfig{})
	guaranteed := b.pod("guaranteed", testnode.PodConfig{QoS: testnode.Guaranteed})
	host := b.pod("host", testnode.PodConfig{HostNetwork: true})
	for name, place := range map[string]testnode.Place{
		"burstable over veth":  burstable.Place(),
		"guaranteed over veth": guaranteed.Place(),
		"hostNetwork":          host.Place(),
		"nested cgroup":        burstable.Place().Nested("docker/inner"),
		"unprivileged user":    burstable.Place().AsUser(1000, 1000),
		"outside every pod":    b.node.HostPlace(),
	} {
		for _, address := range []string{dest4(), dest6(), "[::ffff:169.254.170.23]:80"} {
			t.Run(name+" to "+address, func(t *testing.T) {
				proc := b.spawn(place)
				ev, ok := b.dial(proc, address)
				if !ok {
					t.Fatal("no evidence")
				}
				want := placeID(t, place)
				if ev.TaskCgroup != want || ev.SocketCgroup != want {
					t.Errorf("cgroups %d and %d, want %d", ev.TaskCgroup, ev.SocketCgroup, want)
				}
				if inode := place.Netns().Inode(); ev.NetnsInode != inode {
					t.Errorf("netns inode %d, want %d", ev.NetnsInode, inode)
				}
				cookie, err := place.Netns().Cookie()
				if errors.Is(err, unix.ENOPROTOOPT) {
					// SO_NETNS_COOKIE is of Linux 5.14; the programs have it
					// before that, but nothing to compare with.
					cookie, err = ev.NetnsCookie, nil
				}
				must(t, err)
				if ev.NetnsCookie != cookie || cookie == 0 {
					t.Errorf("netns cookie %d, want %d", ev.NetnsCookie, cookie)
				}
				if int(ev.TGID) != proc.PID() {
					t.Errorf("process %d, want %d", ev.TGID, proc.PID())
				}
				if strings.Contains(name, "unprivileged") != (ev.UID == 1000) {
					t.Errorf("user %d", ev.UID)
				}
			})
		}
	}
	b.wantPending(0)
	b.events()
}

// Under SYN cookies the server keeps nothing between SYN and ACK, so there is no
// saved SYN to read the nonce from.
func TestPrivilegedForcedSYNCookies(t *testing.T) {
	b := ready(t)
	pod := b.pod("web", testnode.PodConfig{})
	for _, mode := range []string{"0", "1", "2"} {
		// A sysctl of the node's own network namespace.
		must(t, b.node.Do(func() error {
			return os.WriteFile("/proc/sys/net/ipv4/tcp_syncookies", []byte(mode), 0o644)
		}))
		for _, address := range []string{dest4(), dest6()} {
			ev, ok := b.dial(b.spawn(pod.Place()), address)
			if !ok || ev.TaskCgroup != placeID(t, pod.Place()) {
				t.Errorf("tcp_syncookies=%s, %s: got %+v, %v", mode, address, ev, ok)
			}
		}
	}
	b.events()
}

// A socket made in one pod and connected by another names both.
func TestPrivilegedPassedSocketNamesBothPods(t *testing.T) {
	b := ready(t)
	maker, connecter := b.pod("maker", testnode.PodConfig{}), b.pod("connecter", testnode.PodConfig{})
	socket, err := b.spawn(maker.Place()).Socket(t.Context(), unix.AF_INET)
	must(t, err)
	defer socket.Close()
	must(t, b.spawn(connecter.Place()).Connect(t.Context(), socket, netip.AddrPortFrom(addr4, port)))
	ev, ok := b.accept(b.v4)
	if !ok {
		t.Fatal("no evidence")
	}
	if ev.SocketCgroup != placeID(t, maker.Place()) || ev.TaskCgroup != placeID(t, connecter.Place()) {
		t.Errorf("socket of %d connected by %d, want %d and %d", ev.SocketCgroup, ev.TaskCgroup,
			placeID(t, maker.Place()), placeID(t, connecter.Place()))
	}
	if ev.NetnsInode != maker.Netns().Inode() {
		t.Errorf("netns %d is not the socket's", ev.NetnsInode)
	}
}

// A pod that claims another's address in a network namespace of its own gets
// its own name, whatever the addresses say.
func TestPrivilegedAddressPoisoning(t *testing.T) {
	b := ready(t)
	victim, thief := b.pod("victim", testnode.PodConfig{}), b.pod("thief", testnode.PodConfig{})
	if _, ok := b.dial(b.spawn(victim.Place()), dest4()); !ok {
		t.Fatal("no evidence for the victim")
	}
	// The thief's namespace answers for the agent's address itself, and holds
	// the victim's: nothing it does there may reach the agent's books.
	must(t, thief.Netns().Do(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		for _, ip := range []netip.Addr{victim.IPv4, addr4} {
			if err := netlink.AddrAdd(lo, &netlink.Addr{IPNet: &net.IPNet{IP: ip.AsSlice(), Mask: net.CIDRMask(32, 32)}}); err != nil {
				return err
			}
		}
		return nil
	}))
	proc := b.spawn(thief.Place())
	if c, err := proc.DialContext(t.Context(), "tcp", dest4()); err == nil {
		c.Close()
		t.Fatal("the thief's own namespace does not listen, yet it connected")
	}
	b.wantPending(0)
	// Through the bridge, from the victim's address.
	ev, ok := b.dial(proc, dest6())
	if !ok || ev.TaskCgroup != placeID(t, thief.Place()) {
		t.Errorf("got %+v, %v; want the thief's cgroup", ev, ok)
	}
}

// Connections from before the programs never gain evidence.
func TestPrivilegedLateAttach(t *testing.T) {
	b := newBed(t)
	b.listen()
	pod := b.pod("early", testnode.PodConfig{})
	proc := b.spawn(pod.Place())
	c, err := proc.DialContext(t.Context(), "tcp", dest4())
	must(t, err)
	defer c.Close()
	b.open()
	if ev, ok := b.accept(b.v4); ok {
		t.Errorf("evidence for a connection from before the programs: %+v", ev)
	}
	if _, ok := b.dial(proc, dest4()); !ok {
		t.Error("no evidence for one from after")
	}
}

// The next agent takes over what the killed one left: in between the pinned
// programs go on, and a connection opened then has its evidence.
func TestPrivilegedRestartWithPinnedPrograms(t *testing.T) {
	b := ready(t)
	pod := b.pod("web", testnode.PodConfig{})
	proc := b.spawn(pod.Place())
	if _, ok := b.dial(proc, dest4()); !ok {
		t.Fatal("no evidence at first")
	}
	first := b.a.Status()
	if first.ReusedLinks != 0 || first.ReusedMaps != 0 {
		t.Errorf("a fresh start reused %+v", first)
	}
	key := nonceKey(t, b.cfg.PinPath)
	// As after kill -9: the descriptors are gone, the listener's queue stays
	// here so that the connection can be looked at.
	must(t, b.a.Close())
	c, err := proc.DialContext(t.Context(), "tcp", dest4())
	must(t, err)
	defer c.Close()
	b.open()
	if ev, ok := b.accept(b.v4); !ok || ev.TaskCgroup != placeID(t, pod.Place()) {
		t.Errorf("opened while no agent ran: got %+v, %v", ev, ok)
	}
	s := b.a.Status()
	if s.ReusedLinks != len(hooks) || s.ReusedMaps == 0 {
		t.Errorf("the restart reused %+v, want all %d links", s, len(hooks))
	}
	if nonceKey(t, b.cfg.PinPath) != key {
		t.Error("the restart changed the nonce key under running programs")
	}
	if n := b.events()["attested"]; n != 2 {
		t.Errorf("%d attested, want 2: the counters go on", n)
	}
	// Other addresses after a restart.
	b.cfg.Ports = []uint16{8080}
	must(t, b.a.Close())
	b.open()
	if _, ok := b.dial(proc, dest4()); ok {
		t.Error("evidence on a port that is no longer the agent's")
	}
}

// Rings of pods that end while no agent runs are freed by the next one, and
// nobody else's.
func TestPrivilegedRestartFreesRingsOfEndedPods(t *testing.T) {
	b := ready(t)
	stays, ends := b.pod("stays", testnode.PodConfig{}), b.pod("ends", testnode.PodConfig{})
	for _, p := range []*testnode.Pod{stays, ends} {
		if _, ok := b.dial(b.spawn(p.Place()), dest4()); !ok {
			t.Fatal("no evidence")
		}
	}
	kept := uint64(cgroupID(t, stays.CgroupDir()))
	must(t, b.a.Close())
	must(t, ends.Delete(t.Context()))
	b.open()
	rings := map[uint64]bool{}
	var id uint64
	var ring bpf.AttributionRing
	it := b.a.inflight.Iterate()
	for it.Next(&id, &ring) {
		rings[id] = true
	}
	must(t, it.Err())
	if len(rings) != 1 || !rings[kept] {
		t.Errorf("rings of %v after the restart, want that of %d", rings, kept)
	}
}

// A listener in a network namespace of its own, on what is the agent's address
// there, gets connections but no evidence.
func TestPrivilegedListenerInAnotherNetnsTakesNoEvidence(t *testing.T) {
	b := ready(t)
	pod := b.pod("own", testnode.PodConfig{})
	var l net.Listener
	must(t, pod.Netns().Do(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(lo, &netlink.Addr{IPNet: &net.IPNet{IP: addr4.AsSlice(), Mask: net.CIDRMask(32, 32)}}); err != nil {
			return err
		}
		lc := net.ListenConfig{}
		lc.SetMultipathTCP(false)
		l, err = lc.Listen(t.Context(), "tcp4", dest4())
		return err
	}))
	defer l.Close()
	c, err := b.spawn(pod.Place()).DialContext(t.Context(), "tcp4", dest4())
	must(t, err)
	defer c.Close()
	if ev, ok := b.accept(l); ok {
		t.Errorf("the pod's own listener got %+v", ev)
	}
	if n := b.events()["attested"]; n != 0 {
		t.Errorf("%d attested, want none", n)
	}
}

func nonceKey(t *testing.T, pinPath string) bpf.AttributionSiphashKey {
	t.Helper()
	m, err := ebpf.LoadPinnedMap(filepath.Join(pinPath, Layout, "map_nonce_key"), nil)
	must(t, err)
	defer m.Close()
	var key bpf.AttributionSiphashKey
	must(t, m.Lookup(uint32(0), &key))
	if key.K0 == 0 && key.K1 == 0 {
		t.Error("no nonce key")
	}
	return key
}

// Pins of another version are taken over and removed; two versions are never
// attached at once.
func TestPrivilegedUpgradeFromAnotherLayout(t *testing.T) {
	b := newBed(t)
	b.open()
	must(t, b.a.Close())
	old := filepath.Join(b.cfg.PinPath, "v0")
	must(t, os.Rename(filepath.Join(b.cfg.PinPath, Layout), old))
	b.open()
	b.listen()
	if s := b.a.Status(); s.ReusedLinks != len(hooks) || s.ReusedMaps != 0 {
		t.Errorf("reused %+v, want the links and none of the maps", s)
	}
	if _, err := os.Stat(old); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("old pins: %v", err)
	}
	pod := b.pod("web", testnode.PodConfig{})
	if _, ok := b.dial(b.spawn(pod.Place()), dest4()); !ok {
		t.Error("no evidence after the upgrade")
	}
	if n := b.events()["connect"]; n != 1 {
		t.Errorf("%d connects counted, want 1", n)
	}
}

func TestPrivilegedCleanupLeavesNothing(t *testing.T) {
	b := newBed(t)
	b.open()
	foreign := filepath.Join(b.cfg.PinPath, "somebody-elses")
	must(t, os.Mkdir(foreign, 0o700))
	must(t, b.a.Close())
	b.a = nil
	removed, err := Cleanup(b.cfg.PinPath)
	if err == nil || len(removed) == 0 {
		t.Errorf("with a stranger's directory inside: removed %d, error %v; want an error that says so", len(removed), err)
	}
	must(t, os.Remove(foreign))
	if _, err := Cleanup(b.cfg.PinPath); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(b.cfg.PinPath); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after cleanup: %v", err)
	}
}

func TestPrivilegedPinPathMustBeBPFFS(t *testing.T) {
	b := newBed(t)
	b.cfg.PinPath = t.TempDir() + "/pins"
	if _, err := Open(b.cfg); !errors.Is(err, ErrNotBPFFS) {
		t.Errorf("got %v, want ErrNotBPFFS", err)
	}
}

// A pod that opens handshakes without end, from many cgroups of its own, loses
// its own oldest ones. A neighbour's are untouched.
func TestPrivilegedFloodIsBoundedPerPod(t *testing.T) {
	b := ready(t)
	flooder, quiet := b.pod("flooder", testnode.PodConfig{}), b.pod("quiet", testnode.PodConfig{})
	swallow(t, flooder)
	swallow(t, quiet)
	ring := len(bpf.AttributionRing{}.Nonce)
	hold := func(place testnode.Place, n int) { must(t, b.spawn(place).Call(t.Context(), "begin", n, nil)) }
	hold(quiet.Place(), 3)
	b.wantPending(3)
	for i := range 4 {
		hold(flooder.Place().Nested(fmt.Sprintf("inner-%d", i)), ring/2)
	}
	b.wantPending(3 + ring)
	if n := b.events()["evicted"]; n != uint64(ring) {
		t.Errorf("%d evicted, want %d", n, ring)
	}
	// The pod that ends gives its ring back.
	must(t, b.a.PodEnded(cgroupID(t, flooder.CgroupDir())))
	must(t, b.a.PodEnded(cgroupID(t, flooder.CgroupDir())))
}

// What leaves when the client closes before anybody answered.
func TestPrivilegedEntryLeavesWithTheClientSocket(t *testing.T) {
	b := ready(t)
	pod := b.pod("web", testnode.PodConfig{})
	swallow(t, pod)
	proc := b.spawn(pod.Place())
	must(t, proc.Call(t.Context(), "begin", 1, nil))
	b.wantPending(1)
	must(t, proc.Close())
	b.wantPending(0)
	if n := b.events()["closed_unused"]; n != 1 {
		t.Errorf("%d closed unused, want 1", n)
	}
}

// The option goes with the handshake and the first data, and with nothing more.
func TestPrivilegedOptionStopsAfterFirstData(t *testing.T) {
	b := ready(t)
	pod := b.pod("web", testnode.PodConfig{})
	var sniffer int
	must(t, b.node.Do(func() (err error) {
		sniffer, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, int(htons(unix.ETH_P_IP)))
		return err
	}))
	defer unix.Close(sniffer)
	must(t, unix.SetsockoptTimeval(sniffer, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 300000}))

	client, err := b.spawn(pod.Place()).DialContext(t.Context(), "tcp4", dest4())
	must(t, err)
	defer client.Close()
	server, err := b.v4.Accept()
	must(t, err)
	defer server.Close()
	exchange := func() {
		for _, c := range []struct{ w, r net.Conn }{{client, server}, {server, client}} {
			_, err := c.w.Write([]byte("x"))
			must(t, err)
			_, err = c.r.Read(make([]byte, 1))
			must(t, err)
		}
	}
	exchange()
	exchange()
	exchange()

	var syn, early, late int
	var first [4]byte // sequence number of the first data
	data := 0
	buf := make([]byte, 4096)
	for {
		n, _, err := unix.Recvfrom(sniffer, buf, 0)
		if errors.Is(err, unix.EAGAIN) {
			break
		}
		if errors.Is(err, unix.EINTR) {
			continue
		}
		must(t, err)
		ip := buf[:n]
		if len(ip) < 40 || ip[0]>>4 != 4 || ip[9] != unix.IPPROTO_TCP {
			continue
		}
		tcp := ip[int(ip[0]&15)*4:]
		if dst := int(tcp[2])<<8 | int(tcp[3]); dst != port {
			continue
		}
		has := hasOption(tcp[20 : int(tcp[12]>>4)*4])
		payload := len(tcp) - int(tcp[12]>>4)*4
		switch {
		case tcp[13]&2 != 0:
			if has {
				syn++
			}
		case payload > 0 && data == 0:
			first = [4]byte(tcp[4:8])
			data++
			if has {
				early++
			}
		case payload > 0 && first == [4]byte(tcp[4:8]):
			// The same once more: its acknowledgement took long.
		case payload > 0:
			data++
			if has {
				late++
			}
		}
	}
	if syn == 0 || early == 0 || data < 3 || late != 0 {
		t.Errorf("option on %d SYN, %d first data, %d later of %d data segments; want some, some, none", syn, early, late, data)
	}
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

func hasOption(opts []byte) bool {
	for len(opts) > 0 {
		switch {
		case opts[0] == 0:
			return false
		case opts[0] == 1:
			opts = opts[1:]
			continue
		case len(opts) < 2 || int(opts[1]) < 2 || int(opts[1]) > len(opts):
			return false
		case opts[0] == 254 && opts[1] == 12 && opts[2] == 0x4c && opts[3] == 0x4b:
			return true
		}
		opts = opts[opts[1]:]
	}
	return false
}

// The node's own features are what Open relies on.
func TestPrivilegedProbe(t *testing.T) {
	if err := Probe(); err != nil {
		t.Fatal(err)
	}
	for _, f := range Features() {
		if f.Err != nil || f.Name == "" || f.Since == "" {
			t.Errorf("%+v", f)
		}
	}
}

// Without the capabilities the answer is not "your kernel is too old".
func TestPrivilegedProbeWithoutCapabilities(t *testing.T) {
	b := newBed(t)
	var r probeResult
	must(t, b.node.HostPlace().AsUser(65534, 65534).Call(t.Context(), "probe", nil, &r))
	if r.Unsupported || !strings.Contains(r.Text, "CAP_BPF") {
		t.Errorf("got unsupported %v, %q; want a word about CAP_BPF", r.Unsupported, r.Text)
	}
}

// BenchmarkPrivilegedEvidence is what a connection costs the agent beyond
// accept: once per connection, never per request.
func BenchmarkPrivilegedEvidence(bench *testing.B) {
	b := ready(bench)
	pod := b.pod("web", testnode.PodConfig{})
	client, err := b.spawn(pod.Place()).DialContext(bench.Context(), "tcp4", dest4())
	must(bench, err)
	defer client.Close()
	server, err := b.v4.Accept()
	must(bench, err)
	defer server.Close()
	bench.ReportAllocs()
	for bench.Loop() {
		if _, ok, err := b.a.Evidence(server.(syscall.Conn)); !ok || err != nil {
			bench.Fatal(ok, err)
		}
	}
}
