// SPDX-License-Identifier: Apache-2.0

//go:build linux && privileged

package testnode

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

// patience bounds what the tests wait for; nothing takes nearly as long.
const patience = 30 * time.Second

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

func newNode(t *testing.T, cfg Config) *Node {
	t.Helper()
	n, err := New(testContext(t), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	return n
}

func addPod(t *testing.T, n *Node, cfg PodConfig) *Pod {
	t.Helper()
	p, err := n.AddPod(testContext(t), cfg)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func spawn(t *testing.T, p Place) *Proc {
	t.Helper()
	proc, err := p.Spawn(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(proc.Kill)
	return proc
}

// listen opens a listener in the node's network namespace.
func listen(t *testing.T, n *Node, address string) net.Listener {
	t.Helper()
	var l net.Listener
	err := n.Do(func() (err error) {
		l, err = net.Listen("tcp", address)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// gone waits for the kernel and another process to remove path.
func gone(t *testing.T, path string) {
	t.Helper()
	for ctx := testContext(t); ; {
		if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
			return
		} else if err != nil {
			t.Fatal(err)
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%s is still there", path)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// machine is what of the machine a node could disturb.
func machine(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintln(&b, "link", l.Attrs().Name, l.Type(), l.Attrs().Flags, addrs)
	}
	routes, err := netlink.RouteList(nil, netlink.FAMILY_ALL)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range routes {
		fmt.Fprintln(&b, "route", r.String())
	}
	for _, path := range []string{"net/ipv4/ip_forward", "net/ipv6/conf/all/accept_dad", "net/ipv6/conf/default/accept_dad", "net/ipv6/conf/all/disable_ipv6"} {
		value, err := os.ReadFile("/proc/sys/" + path)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintln(&b, path, strings.TrimSpace(string(value)))
	}
	points, err := mounts()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range points {
		fmt.Fprintln(&b, "mount", p)
	}
	root, err := Cgroup2Mount()
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{root, os.TempDir(), "/run/netns"} {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		for _, e := range entries {
			// Other packages' tests may run at the same time.
			if pid, ok := ownerOf(e.Name()); dir != os.TempDir() && (!ok || pid == os.Getpid()) || ok && pid == os.Getpid() {
				fmt.Fprintln(&b, dir, e.Name())
			}
		}
	}
	return b.String()
}

func TestPrivilegedCloseLeavesNothing(t *testing.T) {
	before := machine(t)
	n, err := New(testContext(t), Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	p := addPod(t, n, PodConfig{Name: "a"})
	// A process nobody waits for, which makes cgroups of its own.
	if err := p.Place().Nested("x/y").Command(t.Context(), "sleep", "1000").Start(); err != nil {
		t.Fatal(err)
	}
	if during := machine(t); during == before {
		t.Error("the comparison does not even see the node's cgroup")
	}
	if err := os.WriteFile(filepath.Join(p.Dir(), "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := n.Close(); err != nil {
		t.Error(err)
	}
	if after := machine(t); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	if err := n.Close(); err != nil {
		t.Errorf("the second Close: %v", err)
	}
	if _, err := n.AddPod(t.Context(), PodConfig{Name: "late"}); err == nil {
		t.Error("a closed node took a pod")
	}
	if err := n.Do(func() error { return nil }); !errors.Is(err, os.ErrClosed) {
		t.Errorf("entering a closed node gave %v", err)
	}
}

func TestPrivilegedPlaces(t *testing.T) {
	for _, driver := range []Driver{DriverCgroupfs, DriverSystemd} {
		t.Run(string(driver), func(t *testing.T) {
			n := newNode(t, Config{Driver: driver})
			t.Setenv("TESTNODE_SECRET", "the test's own")
			const uid = evidence.PodUID("0a1b2c3d-0000-4000-8000-000000000001")
			burstable := addPod(t, n, PodConfig{Name: "b", UID: uid, Containers: 2, Env: []string{"TESTNODE_SECRET=pod"}})
			best := addPod(t, n, PodConfig{Name: "e", QoS: BestEffort})
			guaranteed := addPod(t, n, PodConfig{Name: "g", QoS: Guaranteed})
			host := addPod(t, n, PodConfig{Name: "h", HostNetwork: true})

			root := "/" + n.Name()
			id := burstable.Containers()[0].ID
			want := root + "/kubepods/burstable/pod" + string(uid) + "/" + id
			if driver == DriverSystemd {
				want = root + "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod0a1b2c3d_0000_4000_8000_000000000001.slice/cri-containerd-" + id + ".scope"
			}
			if got := burstable.Place().CgroupPath(); got != want {
				t.Errorf("cgroup of the container is %s, want %s", got, want)
			}

			tests := []struct {
				name      string
				place     Place
				netns     *Netns
				parent    string
				addresses []netip.Addr
				uid       int
				secret    string
			}{
				{"burstable", burstable.Place(), burstable.Netns(), burstable.CgroupPath(), []netip.Addr{burstable.IPv4, burstable.IPv6}, 0, "pod"},
				{"second container", burstable.In(1), burstable.Netns(), burstable.CgroupPath(), nil, 0, "pod"},
				{"sandbox", burstable.SandboxPlace(), burstable.Netns(), burstable.CgroupPath(), nil, 0, "pod"},
				{"nested", burstable.Place().Nested("kubepods/pod-forged"), burstable.Netns(), burstable.CgroupPath(), nil, 0, "pod"},
				{"user", burstable.Place().AsUser(1234, 1234), burstable.Netns(), burstable.CgroupPath(), nil, 1234, "pod"},
				{"other namespace", burstable.Place().InNetns(best.Netns()), best.Netns(), burstable.CgroupPath(), []netip.Addr{best.IPv4}, 0, "pod"},
				{"more environment", best.Place().WithEnv("TESTNODE_SECRET=more"), best.Netns(), best.CgroupPath(), nil, 0, "more"},
				{"guaranteed", guaranteed.Place(), guaranteed.Netns(), guaranteed.CgroupPath(), []netip.Addr{guaranteed.IPv4, guaranteed.IPv6}, 0, ""},
				{"host network", host.Place(), n.Netns(), host.CgroupPath(), []netip.Addr{bridgeIPv4().Addr(), bridgeIPv6().Addr()}, 0, ""},
				{"node", n.HostPlace(), n.Netns(), root, nil, 0, ""},
				{"agent", n.AgentPlace(), n.Netns(), root, nil, 0, ""},
			}
			for _, tt := range tests {
				t.Run(tt.name, func(t *testing.T) {
					var got where
					if err := tt.place.Call(testContext(t), "where", nil, &got); err != nil {
						t.Fatal(err)
					}
					if got.Cgroup != tt.place.CgroupPath() || !strings.HasPrefix(got.Cgroup, tt.parent+"/") {
						t.Errorf("runs in cgroup %s, want %s, below %s", got.Cgroup, tt.place.CgroupPath(), tt.parent)
					}
					if evidence.NetnsInode(got.Netns) != tt.netns.Inode() {
						t.Errorf("runs in namespace %d, want %d", got.Netns, tt.netns.Inode())
					}
					if got.UID != tt.uid || got.Secret != tt.secret || got.Home != tt.place.home {
						t.Errorf("user %d, environment %q, home %s", got.UID, got.Secret, got.Home)
					}
					for _, want := range tt.addresses {
						if !slices.ContainsFunc(got.Addresses, func(a string) bool { return strings.HasPrefix(a, want.String()+"/") }) {
							t.Errorf("addresses %v have no %s", got.Addresses, want)
						}
					}
					text, err := tt.place.Exec(testContext(t), "cat", "/proc/self/cgroup")
					if err != nil || !strings.Contains(string(text), "0::"+tt.place.CgroupPath()+"\n") {
						t.Errorf("a program runs in %q, %v", text, err)
					}
				})
			}
			if _, err := burstable.In(2).Exec(t.Context(), "true"); err == nil {
				t.Error("a container that does not exist ran a program")
			}
			if _, err := burstable.Place().Nested("../../x").Exec(t.Context(), "true"); err == nil {
				t.Error("a nested cgroup outside its parent ran a program")
			}
		})
	}
}

// What the kernel's hooks see is what the node says, from the first
// instruction on.
func TestPrivilegedKernelSeesThePod(t *testing.T) {
	n := newNode(t, Config{})
	seen, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer seen.Close()
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, License: "Apache-2.0",
		Instructions: asm.Instructions{
			asm.FnGetCurrentCgroupId.Call(),
			asm.StoreMem(asm.RFP, -8, asm.R0, asm.DWord),
			asm.StoreImm(asm.RFP, -16, 0, asm.Word),
			asm.LoadMapPtr(asm.R1, seen.FD()),
			asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, -16),
			asm.Mov.Reg(asm.R3, asm.RFP), asm.Add.Imm(asm.R3, -8),
			asm.Mov.Imm(asm.R4, 0),
			asm.FnMapUpdateElem.Call(),
			asm.Mov.Imm(asm.R0, 1), asm.Return(),
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer program.Close()
	attached, err := link.AttachCgroup(link.CgroupOptions{Path: n.CgroupRoot(), Attach: ebpf.AttachCGroupInet4Connect, Program: program})
	if err != nil {
		t.Fatal(err)
	}
	defer attached.Close()
	pin := filepath.Join(n.BPFFS(), "seen")
	if err := seen.Pin(pin); err != nil {
		t.Fatal(err)
	}

	l := listen(t, n, "0.0.0.0:0")
	address := fmt.Sprintf("%s:%d", bridgeIPv4().Addr(), l.Addr().(*net.TCPAddr).Port)
	a, b := addPod(t, n, PodConfig{Name: "a"}), addPod(t, n, PodConfig{Name: "b"})
	for _, place := range []Place{a.Place(), b.Place(), a.Place().Nested("docker/x"), n.HostPlace()} {
		conn, err := spawn(t, place).DialContext(testContext(t), "tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
		var got evidence.CgroupID
		if err := seen.Lookup(uint32(0), &got); err != nil {
			t.Fatal(err)
		}
		want, err := place.CgroupID()
		if err != nil {
			t.Fatal(err)
		}
		if got != want {
			t.Errorf("a connect from %s was seen from cgroup %d, want %d", place.CgroupPath(), got, want)
		}
	}
}

func TestPrivilegedConnections(t *testing.T) {
	n := newNode(t, Config{})
	l := listen(t, n, "[::]:0")
	port := uint16(l.Addr().(*net.TCPAddr).Port)
	a, b := addPod(t, n, PodConfig{Name: "a"}), addPod(t, n, PodConfig{Name: "b"})
	procA, procB := spawn(t, a.Place()), spawn(t, b.Place())
	v4, v6 := n.Gateways()

	// accept gives the address that the node sees.
	accept := func(t *testing.T) netip.Addr {
		t.Helper()
		l.(*net.TCPListener).SetDeadline(time.Now().Add(patience))
		conn, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
	}
	t.Run("dial", func(t *testing.T) {
		for gateway, want := range map[netip.Addr]netip.Addr{v4: a.IPv4, v6: a.IPv6} {
			conn, err := procA.DialContext(testContext(t), "tcp", netip.AddrPortFrom(gateway, port).String())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if got := accept(t); got != want {
				t.Errorf("a connection to %s comes from %s, want %s", gateway, got, want)
			}
		}
	})
	t.Run("socket of one pod connected by another", func(t *testing.T) {
		for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
			socket, err := procA.Socket(testContext(t), family)
			if err != nil {
				t.Fatal(err)
			}
			defer socket.Close()
			if err := procB.Connect(testContext(t), socket, netip.AddrPortFrom(v4, port)); err != nil {
				t.Fatal(err)
			}
			// The socket's namespace is its creator's. For AF_INET6 the
			// address went in as v4-mapped.
			if got := accept(t); got != a.IPv4 {
				t.Errorf("comes from %s, want %s", got, a.IPv4)
			}
		}
	})
	t.Run("refused", func(t *testing.T) {
		if _, err := procA.DialContext(testContext(t), "tcp", netip.AddrPortFrom(v4, 1).String()); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("got %v, want ECONNREFUSED", err)
		}
	})
	t.Run("pod to pod", func(t *testing.T) {
		var inB net.Listener
		if err := b.Netns().Do(func() (err error) { inB, err = net.Listen("tcp", ":0"); return err }); err != nil {
			t.Fatal(err)
		}
		defer inB.Close()
		conn, err := procA.DialContext(testContext(t), "tcp", netip.AddrPortFrom(b.IPv4, uint16(inB.Addr().(*net.TCPAddr).Port)).String())
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
	})
	t.Run("http", func(t *testing.T) {
		web := listen(t, n, "0.0.0.0:0")
		server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.RemoteAddr) })}
		go server.Serve(web)
		defer server.Close()
		client := &http.Client{Transport: &http.Transport{DialContext: procA.DialContext}}
		defer client.CloseIdleConnections()
		resp, err := client.Get(fmt.Sprintf("http://%s:%d/", v4, web.Addr().(*net.TCPAddr).Port))
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if body, err := io.ReadAll(resp.Body); err != nil || !strings.HasPrefix(string(body), a.IPv4.String()+":") {
			t.Errorf("the server saw %q, %v; want %s", body, err, a.IPv4)
		}
	})
}

func TestPrivilegedIsolated(t *testing.T) {
	n := newNode(t, Config{})
	l := listen(t, n, "0.0.0.0:0")
	victim, thief := addPod(t, n, PodConfig{Name: "victim"}), addPod(t, n, PodConfig{Name: "thief"})
	claim := []netip.Prefix{netip.PrefixFrom(victim.IPv4, 24), netip.PrefixFrom(victim.IPv6, 64)}
	v4, _ := n.Gateways()
	target := netip.AddrPortFrom(v4, uint16(l.Addr().(*net.TCPAddr).Port)).String()

	routed, err := n.AddIsolated(IsolatedConfig{Name: "routed", Addresses: claim, NodeRoutes: true})
	if err != nil {
		t.Fatal(err)
	}
	conn, err := spawn(t, thief.Place().InNetns(routed)).DialContext(testContext(t), "tcp", target)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if got := conn.LocalAddr().(*net.TCPAddr).AddrPort().Addr(); got != victim.IPv4 {
		t.Errorf("the thief's connection has address %s, want %s", got, victim.IPv4)
	}

	alone, err := n.AddIsolated(IsolatedConfig{Name: "alone", Addresses: claim, Unconnected: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := spawn(t, thief.Place().InNetns(alone)).DialContext(testContext(t), "tcp", target); err == nil {
		t.Error("a namespace without a link reached the node")
	}
	var got where
	if err := thief.Place().InNetns(alone).Call(testContext(t), "where", nil, &got); err != nil {
		t.Fatal(err)
	}
	if got.Cgroup != thief.Place().CgroupPath() || !slices.Contains(got.Addresses, claim[0].String()) {
		t.Errorf("the thief runs in %s with %v", got.Cgroup, got.Addresses)
	}
}

func TestPrivilegedProc(t *testing.T) {
	n := newNode(t, Config{NoBridge: true})
	p := addPod(t, n, PodConfig{Name: "a"})
	proc := spawn(t, p.Place())
	for want := 1; want <= 3; want++ {
		var got int
		if err := proc.Call(testContext(t), "count", nil, &got); err != nil || got != want {
			t.Errorf("call %d counted %d, %v", want, got, err)
		}
	}
	var refused bool
	if err := p.Call(testContext(t), "nomain", nil, &refused); err != nil || !refused {
		t.Errorf("a program without Main made a node: %v", err)
	}
	if err := proc.Call(testContext(t), "sleep", make(chan int), nil); err == nil {
		t.Error("arguments that have no JSON were sent")
	}
	var ae *ActionError
	if err := proc.Call(testContext(t), "missing", nil, nil); !errors.As(err, &ae) || ae.Action != "missing" {
		t.Errorf("an action that does not exist gave %v", err)
	}
	if err := proc.Call(testContext(t), "where", nil, new(int)); err == nil {
		t.Error("a result of the wrong type was taken")
	}
	other := n.HostPlace()
	if err := other.Move(proc.PID()); err != nil {
		t.Fatal(err)
	}
	var got where
	if err := proc.Call(testContext(t), "where", nil, &got); err != nil || got.Cgroup != other.CgroupPath() || evidence.NetnsInode(got.Netns) != p.Netns().Inode() {
		t.Errorf("after the move it is in %s, namespace %d, %v", got.Cgroup, got.Netns, err)
	}
	if err := proc.Close(); err != nil {
		t.Error(err)
	}

	ctx, cancel := context.WithCancel(t.Context())
	stuck := spawn(t, p.Place())
	time.AfterFunc(10*time.Millisecond, cancel)
	if err := stuck.Call(ctx, "sleep", nil, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled call gave %v", err)
	}
	select {
	case <-stuck.Done():
	default:
		t.Error("the process of a cancelled call lives on")
	}
	if err := spawn(t, p.Place()).Call(testContext(t), "exit", nil, nil); !errors.Is(err, ErrProcGone) {
		t.Errorf("a process that ended gave %v", err)
	}
}

func TestPrivilegedCommand(t *testing.T) {
	n := newNode(t, Config{NoBridge: true})
	p := addPod(t, n, PodConfig{Name: "a"})
	if out, err := p.Exec(t.Context(), "sh", "-c", "echo out; echo problem >&2; exit 4"); err == nil || !strings.Contains(err.Error(), "problem") || string(out) != "out\n" {
		t.Errorf("got %q, %v", out, err)
	}
	if out, err := p.Command(t.Context(), "sh", "-c", "echo out; echo err >&2").CombinedOutput(); err != nil || string(out) != "out\nerr\n" {
		t.Errorf("got %q, %v", out, err)
	}
	if err := p.Command(t.Context()).Run(); err == nil {
		t.Error("an empty command ran")
	}
	if err := p.Command(t.Context(), "/does/not/exist").Run(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a program that does not exist gave %v", err)
	}
}

func TestPrivilegedDelete(t *testing.T) {
	n := newNode(t, Config{})
	v4, _ := n.Gateways()
	for _, keep := range []bool{false, true} {
		t.Run(fmt.Sprintf("keep=%t", keep), func(t *testing.T) {
			l := listen(t, n, "0.0.0.0:0")
			target := netip.AddrPortFrom(v4, uint16(l.Addr().(*net.TCPAddr).Port)).String()
			p := addPod(t, n, PodConfig{Name: "a"})
			proc := spawn(t, p.Place())
			conn, err := proc.DialContext(testContext(t), "tcp", target)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			accepted, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer accepted.Close()
			// A tree of processes in cgroups of their own.
			shell := p.Place().Nested("a/b").Command(t.Context(), "sh", "-c", "sleep 1000 & sleep 1000 & wait")
			if err := shell.Start(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() { ended <- shell.Wait() }()

			remove := p.Delete
			if keep {
				remove = p.DeleteKeepingNetns
			}
			if err := remove(testContext(t)); err != nil {
				t.Fatal(err)
			}
			for _, path := range []string{p.CgroupDir(), p.Dir()} {
				if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("%s is still there: %v", path, err)
				}
			}
			<-proc.Done()
			if err := <-ended; err == nil {
				t.Error("the shell ended in peace")
			}
			if err := p.Place().Command(t.Context(), "true").Run(); err == nil {
				t.Error("a deleted pod ran a program")
			}
			if _, err := os.Stat(p.CgroupDir()); !errors.Is(err, fs.ErrNotExist) {
				t.Error("and its cgroup came back")
			}
			if err := p.Delete(testContext(t)); err != nil {
				t.Errorf("the second Delete: %v", err)
			}
			if keep {
				// The connection, held by this test, still works.
				if _, err := io.WriteString(conn, "x"); err != nil {
					t.Fatal(err)
				}
				accepted.SetReadDeadline(time.Now().Add(patience))
				if got, err := io.ReadAll(io.LimitReader(accepted, 1)); err != nil || string(got) != "x" {
					t.Errorf("over the kept connection came %q, %v", got, err)
				}
				return
			}
			// Everything may be used again at once.
			again := addPod(t, n, PodConfig{Name: "again", UID: p.UID, IPv4: p.IPv4, IPv6: p.IPv6})
			if _, err := n.AddPod(t.Context(), PodConfig{Name: "second", UID: p.UID}); err == nil {
				t.Error("two pods have one UID")
			}
			if _, err := n.AddPod(t.Context(), PodConfig{Name: "second", IPv4: p.IPv4}); !errors.Is(err, ErrNoAddress) {
				t.Errorf("two pods with one address: %v", err)
			}
			if c, err := spawn(t, again.Place()).DialContext(testContext(t), "tcp", target); err != nil {
				t.Error(err)
			} else {
				c.Close()
			}
		})
	}
}

func TestPrivilegedToken(t *testing.T) {
	n := newNode(t, Config{NoBridge: true})
	p := addPod(t, n, PodConfig{Name: "a"})
	for _, token := range []string{"first", "second"} {
		if err := p.WriteToken(token); err != nil {
			t.Fatal(err)
		}
		place := p.Place().AsUser(65534, 65534).WithEnv(p.AWSEnv("")...)
		out, err := place.Exec(t.Context(), "sh", "-c", `cat "$AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"`)
		if err != nil || string(out) != token {
			t.Errorf("nobody reads %q, %v; want %q", out, err, token)
		}
	}
}

func TestPrivilegedJoin(t *testing.T) {
	n := newNode(t, Config{NoBridge: true})
	before, err := ownCgroup()
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Join(); err != nil {
		t.Fatal(err)
	}
	defer n.Leave()
	if got, err := ownCgroup(); err != nil || got != n.AgentPlace().CgroupPath() {
		t.Errorf("joined %s, %v", got, err)
	}
	// Must not end this process: that is the assertion.
	if err := killCgroup(testContext(t), n.CgroupRoot()); !errors.Is(err, ErrInside) {
		t.Errorf("killing our own cgroup gave %v", err)
	}
	if err := n.Close(); err != nil {
		t.Error(err)
	}
	if got, err := ownCgroup(); err != nil || got != before {
		t.Errorf("after Close in %s, %v; want %s", got, err, before)
	}
}

func TestPrivilegedNetnsCookie(t *testing.T) {
	n := newNode(t, Config{NoBridge: true})
	a, b := addPod(t, n, PodConfig{Name: "a"}), addPod(t, n, PodConfig{Name: "b", HostNetwork: true})
	seen := make(map[evidence.NetnsCookie]bool)
	for _, ns := range []*Netns{a.Netns(), b.Netns(), n.Netns()} {
		cookie, err := ns.Cookie()
		if errors.Is(err, unix.ENOPROTOOPT) {
			t.Log("the kernel has no SO_NETNS_COOKIE (Linux 5.14)")
			return
		}
		if err != nil || cookie == 0 {
			t.Fatalf("cookie %d, %v", cookie, err)
		}
		seen[cookie] = true
	}
	if len(seen) != 2 {
		t.Errorf("a pod's namespace and the node's have %d cookies, want 2", len(seen))
	}
}

// A program that dies without Close leaves nothing.
func TestPrivilegedWatchdog(t *testing.T) {
	n := newNode(t, Config{NoBridge: true})
	ends := map[string]func(*Proc){
		"killed": func(p *Proc) { p.Kill() },
		"panic": func(p *Proc) {
			if err := p.Call(testContext(t), "crash", nil, nil); !errors.Is(err, ErrProcGone) {
				t.Errorf("crashing gave %v", err)
			}
		},
		"left without Close": func(p *Proc) {
			if err := p.Close(); err != nil {
				t.Error(err)
			}
		},
	}
	for name, end := range ends {
		t.Run(name, func(t *testing.T) {
			proc := spawn(t, n.HostPlace())
			var paths []string
			if err := proc.Call(testContext(t), "node", nil, &paths); err != nil {
				t.Fatal(err)
			}
			for _, path := range paths {
				if _, err := os.Stat(path); err != nil {
					t.Fatal(err)
				}
			}
			end(proc)
			for _, path := range paths {
				gone(t, path)
			}
		})
	}
}

func TestPrivilegedSweep(t *testing.T) {
	root, err := Cgroup2Mount()
	if err != nil {
		t.Fatal(err)
	}
	cfg := Config{Dir: t.TempDir(), NoBridge: true}
	live := newNode(t, cfg)

	// A pid that was in use and is not any more.
	dead := exec.Command("true")
	if err := dead.Run(); err != nil {
		t.Fatal(err)
	}
	left := func(i int) (cgroup, dir string) {
		name := fmt.Sprintf("%s%d-%d", namePrefix, dead.Process.Pid, i)
		cgroup, dir = filepath.Join(root, name), filepath.Join(cfg.Dir, name)
		if err := os.MkdirAll(filepath.Join(cgroup, "kubepods", "pod1"), 0o755); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { removeCgroup(context.Background(), cgroup) })
		if err := os.MkdirAll(filepath.Join(dir, "bpf"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := mountBPFFS(filepath.Join(dir, "bpf")); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unmountBelow(dir) })
		return cgroup, dir
	}
	cgroup, dir := left(0)
	orphan := exec.Command("sleep", "1000")
	if err := orphan.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { orphan.Process.Kill() })
	if err := moveProcess(filepath.Join(cgroup, "kubepods", "pod1"), orphan.Process.Pid); err != nil {
		t.Fatal(err)
	}
	lockedCgroup, lockedDir := left(1)
	for _, d := range []string{lockedCgroup, lockedDir} {
		lock, err := lockDir(d)
		if err != nil {
			t.Fatal(err)
		}
		defer lock.Close()
	}
	other := filepath.Join(cfg.Dir, "latchkey-node-of-somebody")
	if err := os.Mkdir(other, 0o755); err != nil {
		t.Fatal(err)
	}
	outside := t.TempDir()
	link := filepath.Join(cfg.Dir, fmt.Sprintf("%s%d-2", namePrefix, dead.Process.Pid))
	if err := os.Symlink(outside, link); err != nil {
		t.Fatal(err)
	}

	removed, err := Sweep(testContext(t), cfg)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{cgroup, dir} {
		if !slices.Contains(removed, want) {
			t.Errorf("%s was not reported as removed", want)
		}
		if _, err := os.Lstat(want); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is still there: %v", want, err)
		}
	}
	if err := orphan.Wait(); err == nil {
		t.Error("the orphan was not killed")
	}
	for _, want := range []string{live.CgroupRoot(), live.Dir(), live.BPFFS(), lockedCgroup, lockedDir, other, link, outside} {
		if _, err := os.Lstat(want); err != nil {
			t.Errorf("what is in use, or is not a node's, was touched: %v", err)
		}
	}
}

func BenchmarkPrivilegedAddPod(b *testing.B) {
	n, err := New(b.Context(), Config{})
	if err != nil {
		b.Fatal(err)
	}
	defer n.Close()
	for b.Loop() {
		p, err := n.AddPod(b.Context(), PodConfig{Name: "a"})
		if err != nil {
			b.Fatal(err)
		}
		if err := p.Delete(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}
