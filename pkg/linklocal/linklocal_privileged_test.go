// SPDX-License-Identifier: Apache-2.0

//go:build privileged

package linklocal

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// node is a network namespace of the test's own. The test's goroutine stays
// on a thread inside it; the thread ends with the goroutine.
type node struct {
	ns    netns.NsHandle
	h     *netlink.Handle
	dummy bool // the kernel has the driver, or is asked
}

// withoutDummy answers as a kernel without the dummy driver does.
type withoutDummy struct{ *netlink.Handle }

func (w withoutDummy) LinkAdd(l netlink.Link) error {
	if l.Type() == "dummy" {
		return unix.EOPNOTSUPP
	}
	return w.Handle.LinkAdd(l)
}

// onEachLink runs a test with the address on the loopback link, and on a dummy
// link where the kernel has the driver.
func onEachLink(t *testing.T, test func(t *testing.T, n *node)) {
	t.Helper()
	hasDummy := false
	t.Run("loopback", func(t *testing.T) {
		n := mustNode(t)
		hasDummy, n.dummy = n.dummy, false
		test(t, n)
	})
	if !hasDummy {
		t.Log("this kernel has no dummy driver: tested on the loopback link only")
		return
	}
	t.Run("dummy", func(t *testing.T) { test(t, mustNode(t)) })
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func mustNode(t *testing.T) *node {
	t.Helper()
	runtime.LockOSThread() // never unlocked: the thread must not be used again
	ns, err := netns.New()
	must(t, err)
	t.Cleanup(func() { _ = ns.Close() })
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	must(t, err)
	t.Cleanup(h.Close)
	n := &node{ns: ns, h: h}
	must(t, h.LinkSetUp(n.link(t, "lo")))

	probe := &netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Name: "probe"}}
	switch err := h.LinkAdd(probe); {
	case err == nil:
		n.dummy = true
		must(t, h.LinkDel(probe))
	case !errors.Is(err, unix.EOPNOTSUPP):
		t.Fatalf("probing for the dummy driver: %v", err)
	}
	return n
}

func (n *node) linkName() string {
	if n.dummy {
		return DefaultLinkName
	}
	return "lo"
}

func (n *node) link(t *testing.T, name string) netlink.Link {
	t.Helper()
	l, err := n.h.LinkByName(name)
	must(t, err)
	return l
}

// mustPod makes a second namespace joined by a veth pair, 10.9.0.1 and
// fd77::1 on the node's end "pod0", 10.9.0.2 and fd77::2 on the pod's, which
// has default routes to the node.
func (n *node) mustPod(t *testing.T) netns.NsHandle {
	t.Helper()
	pod, err := netns.New() // moves this thread
	must(t, err)
	t.Cleanup(func() { _ = pod.Close() })
	must(t, netns.Set(n.ns))
	must(t, n.h.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "pod0", Flags: net.FlagUp}, PeerName: "eth0", PeerNamespace: netlink.NsFd(int(pod))}))
	configure := func(h *netlink.Handle, link string, addrs ...string) netlink.Link {
		l, err := h.LinkByName(link)
		must(t, err)
		must(t, h.LinkSetUp(l))
		for _, a := range addrs {
			na := &netlink.Addr{IPNet: cidr(a)}
			if na.IP.To4() == nil {
				na.Flags = unix.IFA_F_NODAD
			}
			must(t, h.AddrAdd(l, na))
		}
		return l
	}
	configure(n.h, "pod0", "10.9.0.1/24", "fd77::1/64")
	n.awaitLocal(t, "fd77::1/128")
	ph, err := netlink.NewHandleAt(pod, unix.NETLINK_ROUTE)
	must(t, err)
	defer ph.Close()
	eth := configure(ph, "eth0", "10.9.0.2/24", "fd77::2/64")
	must(t, ph.RouteAdd(&netlink.Route{LinkIndex: eth.Attrs().Index, Dst: cidr("0.0.0.0/0"), Gw: net.ParseIP("10.9.0.1")}))
	must(t, ph.RouteAdd(&netlink.Route{LinkIndex: eth.Attrs().Index, Dst: cidr("::/0"), Gw: net.ParseIP("fd77::1")}))
	return pod
}

// awaitLocal waits for an IPv6 address to be in the local table, where the
// kernel puts it some time after it was added.
func (n *node) awaitLocal(t *testing.T, a string) {
	t.Helper()
	eventually(t, a+" in the local table", func() bool {
		r, err := n.h.RouteListFiltered(netlink.FAMILY_V6, &netlink.Route{Table: unix.RT_TABLE_LOCAL, Dst: cidr(a)}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_DST)
		return err == nil && len(r) > 0
	})
}

func (n *node) mustKeeper(t *testing.T, edit ...func(*Config)) *Keeper {
	t.Helper()
	cfg := Config{Handle: n.h}
	if !n.dummy {
		cfg.Handle = withoutDummy{n.h}
	}
	for _, e := range edit {
		e(&cfg)
	}
	k, err := New(cfg)
	must(t, err)
	return k
}

// run starts Run on a thread inside the node and ends it with the test.
func (n *node) run(t *testing.T, k *Keeper) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if err := netns.Set(n.ns); err != nil {
			done <- err
			return
		}
		done <- k.Run(ctx)
	}()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(stop)
	return stop
}

// eventually polls: the kernel's notifications have no clock to inject.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !cond() {
		if time.Now().After(deadline) {
			t.Fatalf("not in 20 s: %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// inventory lists what a namespace has, to compare before and after.
func (n *node) inventory(t *testing.T) []string {
	t.Helper()
	var l []string
	links, err := n.h.LinkList()
	must(t, err)
	for _, link := range links {
		at := link.Attrs()
		l = append(l, fmt.Sprintf("link %s %s alias %q altnames %q", at.Name, link.Type(), at.Alias, at.AltNames))
	}
	addrs, err := n.h.AddrList(nil, netlink.FAMILY_ALL)
	must(t, err)
	for _, a := range addrs {
		l = append(l, fmt.Sprintf("addr %s link %d scope %d flags %#x", a, a.LinkIndex, a.Scope, a.Flags))
	}
	for _, table := range []int{unix.RT_TABLE_MAIN, unix.RT_TABLE_LOCAL} {
		for _, f := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			routes, err := n.h.RouteListFiltered(f, &netlink.Route{Table: table}, netlink.RT_FILTER_TABLE)
			must(t, err)
			for _, r := range routes {
				l = append(l, fmt.Sprintf("route %s link %d table %d type %d proto %d scope %d metric %d", r.Dst, r.LinkIndex, r.Table, r.Type, r.Protocol, r.Scope, r.Priority))
			}
		}
	}
	// The kernel gives links their link-local addresses when it likes.
	l = slices.DeleteFunc(l, func(s string) bool { return strings.Contains(s, "fe80::") || strings.Contains(s, "ff00::") })
	slices.Sort(l)
	return l
}

func mustSysctl(t *testing.T, link, value string) {
	t.Helper()
	must(t, os.WriteFile(filepath.Join(DefaultSysctlRoot, "ipv6/conf", link, "disable_ipv6"), []byte(value), 0))
}

func TestPrivilegedEnsureAndCleanup(t *testing.T) { onEachLink(t, privilegedEnsureAndCleanup) }

func privilegedEnsureAndCleanup(t *testing.T, n *node) {
	pod := n.mustPod(t)
	before := n.inventory(t)
	k := n.mustKeeper(t)
	r, err := k.Ensure(context.Background())
	must(t, err)
	if r.Link != n.linkName() || r.Adopted {
		t.Errorf("result %+v", r)
	}
	for _, a := range r.Addresses {
		if !a.Present || a.Adopted || !a.Changed || a.Err != nil {
			t.Errorf("%+v", a)
		}
	}
	link := n.link(t, n.linkName())
	for _, a := range DefaultAddresses() {
		addrs, err := n.h.AddrList(link, familyOf(a).netlink())
		must(t, err)
		i := slices.IndexFunc(addrs, func(na netlink.Addr) bool { return na.IP.Equal(a.AsSlice()) })
		if i < 0 {
			t.Fatalf("%s is not on %s", a, link.Attrs().Name)
		}
		if n.dummy && !markedLink(link) || !n.dummy && !markedOnLoopback(link, addrs[i], a) {
			t.Errorf("%s carries no mark: %+v, alias %q, alternative names %q", a, addrs[i], link.Attrs().Alias, link.Attrs().AltNames)
		}
		routes, err := k.routes(a)
		must(t, err)
		if len(routes) != 1 || !leavesBy(routes[0], link) {
			t.Errorf("routes to %s in the main table: %v", a, routes)
		}
	}

	after := n.inventory(t)
	if r, err = k.Ensure(context.Background()); err != nil || r.Addresses[0].Changed || r.Addresses[1].Changed || !slices.Equal(n.inventory(t), after) {
		t.Errorf("a second Ensure changed something: %+v, %v", r, err)
	}
	again := n.mustKeeper(t)
	if r, err = again.Ensure(context.Background()); err != nil || r.Addresses[0].Changed || r.Addresses[0].Adopted || r.Addresses[1].Adopted || !slices.Equal(n.inventory(t), after) {
		t.Errorf("a restarted agent does not know its own: %+v, %v", r, err)
	}

	t.Run("a pod connects", func(t *testing.T) {
		// t.Run has its own goroutine: go into the node on its thread.
		runtime.LockOSThread()
		must(t, netns.Set(n.ns))
		for _, a := range DefaultAddresses() {
			l, err := net.Listen("tcp", netip.AddrPortFrom(a, 80).String())
			must(t, err)
			dialed := make(chan error, 1)
			go func() {
				runtime.LockOSThread()
				if err := netns.Set(pod); err != nil {
					dialed <- err
					return
				}
				c, err := net.DialTimeout("tcp", l.Addr().String(), 10*time.Second)
				if err == nil {
					_ = c.Close()
				}
				dialed <- err
			}()
			if err := <-dialed; err != nil {
				t.Errorf("from the pod: %v", err)
				_ = l.Close()
				continue
			}
			c, err := l.Accept()
			must(t, err)
			if from := c.RemoteAddr().String(); !strings.Contains(from, "10.9.0.2") && !strings.Contains(from, "fd77::2") {
				t.Errorf("connection from %s", from)
			}
			_ = c.Close()
			_ = l.Close()
		}
	})

	removed, err := again.Cleanup(context.Background())
	must(t, err)
	if len(removed) == 0 {
		t.Error("nothing said to be removed")
	}
	if got := n.inventory(t); !slices.Equal(got, before) {
		t.Errorf("cleanup left or took something:\nbefore %s\nafter  %s", strings.Join(before, "\n       "), strings.Join(got, "\n       "))
	}
	if removed, err := again.Cleanup(context.Background()); err != nil || len(removed) != 0 {
		t.Errorf("a second cleanup: %q, %v", removed, err)
	}
}

// With unnumbered veths, as several CNI plugins make, the kernel looks on all
// links for a source address. It must not find ours.
func TestPrivilegedNoSourceAddress(t *testing.T) { onEachLink(t, privilegedNoSourceAddress) }

func privilegedNoSourceAddress(t *testing.T, n *node) {
	must(t, n.h.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "bare", Flags: net.FlagUp}, PeerName: "barepeer"}))
	must(t, n.h.LinkSetUp(n.link(t, "barepeer")))
	k := n.mustKeeper(t)
	_, err := k.Ensure(context.Background())
	must(t, err)
	if n.dummy {
		// A dummy link made before the node's own has the address as the
		// reference makes it. Real nodes have their own link first.
		t.Log("on a dummy link the reference's scope is kept: nothing to check")
		return
	}
	n.mustPod(t) // the node's own addresses, on a link that comes later
	bare := n.link(t, "bare").Attrs().Index
	for dst, want := range map[string]string{"10.99.0.9/32": "10.9.0.1", "fd99::9/128": "fd77::1"} {
		must(t, n.h.RouteAdd(&netlink.Route{LinkIndex: bare, Dst: cidr(dst)}))
		got, err := n.h.RouteGet(cidr(dst).IP)
		must(t, err)
		if len(got) != 1 || got[0].Src.String() != want {
			t.Errorf("to %s the node would use %v as its source, want %s", dst, got, want)
		}
	}
}

func TestPrivilegedRepair(t *testing.T) { onEachLink(t, privilegedRepair) }

func privilegedRepair(t *testing.T, n *node) {
	k := n.mustKeeper(t, func(c *Config) { c.CheckInterval = time.Hour }) // events alone
	stop := n.run(t, k)
	present := func(f Family) bool { p, err := k.State().Family(f); return p && err == nil }
	eventually(t, "both families present", func() bool { return present(IPv4) && present(IPv6) })
	settled := n.inventory(t)
	wantRepairs := map[Family]uint64{}

	step := func(what string, families []Family, meddle func(link netlink.Link) error) {
		t.Helper()
		must(t, meddle(n.link(t, n.linkName())))
		for _, f := range families {
			wantRepairs[f]++
		}
		eventually(t, what+" repaired", func() bool {
			return k.State().Repairs(IPv4) >= wantRepairs[IPv4] && k.State().Repairs(IPv6) >= wantRepairs[IPv6] && present(IPv4) && present(IPv6)
		})
	}
	delAddr := func(a netip.Addr) func(netlink.Link) error {
		return func(l netlink.Link) error { return n.h.AddrDel(l, &netlink.Addr{IPNet: hostNet(a)}) }
	}
	delRoute := func(a netip.Addr) func(netlink.Link) error {
		return func(l netlink.Link) error {
			return n.h.RouteDel(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: hostNet(a)})
		}
	}
	step("IPv4 address", []Family{IPv4}, delAddr(v4))
	step("IPv6 address", []Family{IPv6}, delAddr(v6))
	if got := n.inventory(t); !slices.Equal(got, settled) {
		t.Errorf("not as it was:\n%s\nwas\n%s", strings.Join(got, "\n"), strings.Join(settled, "\n"))
	}
	step("IPv4 route", []Family{IPv4}, delRoute(v4))
	step("IPv6 route", []Family{IPv6}, delRoute(v6))
	step("link down", []Family{IPv4, IPv6}, func(l netlink.Link) error { return n.h.LinkSetDown(l) })
	if n.dummy {
		step("link", []Family{IPv4, IPv6}, func(l netlink.Link) error { return n.h.LinkDel(l) })
		if !markedLink(n.link(t, DefaultLinkName)) {
			t.Error("the new link carries no mark")
		}
	}

	stop()
	_, err := k.Cleanup(context.Background())
	must(t, err)
	for _, line := range n.inventory(t) {
		if strings.Contains(line, v4.String()) || strings.Contains(line, v6.String()) || strings.Contains(line, "latchkey") {
			t.Errorf("cleanup left %s", line)
		}
	}
}

func TestPrivilegedConflict(t *testing.T) { onEachLink(t, privilegedConflict) }

func privilegedConflict(t *testing.T, n *node) {
	n.mustPod(t)
	veth := n.link(t, "pod0")
	for _, a := range DefaultAddresses() {
		must(t, n.h.AddrAdd(veth, &netlink.Addr{IPNet: hostNet(a), Flags: unix.IFA_F_NODAD}))
	}
	n.awaitLocal(t, v6.String()+"/128")
	before := n.inventory(t)
	k := n.mustKeeper(t)
	r, err := k.Ensure(context.Background())
	if !errors.Is(err, ErrConflict) || !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "pod0") {
		t.Errorf("error %v, want a conflict that names pod0", err)
	}
	var c *ConflictError
	if !errors.As(r.Addresses[1].Err, &c) || c.Link != "pod0" || c.Address != v6 {
		t.Errorf("IPv6: %v", r.Addresses[1].Err)
	}
	if got := n.inventory(t); !slices.Equal(got, before) {
		t.Errorf("a refusal changed something: %q", got)
	}

	n.run(t, k)
	must(t, n.h.AddrDel(veth, &netlink.Addr{IPNet: hostNet(v4)}))
	eventually(t, "IPv4 taken over", func() bool { p, err := k.State().Family(IPv4); return p && err == nil })
	if p, err := k.State().Family(IPv6); p || !errors.Is(err, ErrConflict) {
		t.Errorf("IPv6 is still held elsewhere: %v, %v", p, err)
	}
}

func TestPrivilegedRouteConflict(t *testing.T) { onEachLink(t, privilegedRouteConflict) }

func privilegedRouteConflict(t *testing.T, n *node) {
	n.mustPod(t)
	must(t, n.h.RouteAdd(&netlink.Route{LinkIndex: n.link(t, "pod0").Attrs().Index, Dst: hostNet(v4), Scope: unix.RT_SCOPE_LINK}))
	must(t, n.h.RouteAdd(&netlink.Route{Dst: hostNet(v6), Type: unix.RTN_BLACKHOLE}))
	r, err := n.mustKeeper(t).Ensure(context.Background())
	if !errors.Is(err, ErrConflict) || !strings.Contains(err.Error(), "pod0") || !strings.Contains(err.Error(), "leads nowhere") {
		t.Errorf("error %v", err)
	}
	if r.Addresses[0].Present || r.Addresses[1].Present {
		t.Errorf("result %+v", r)
	}
}

func TestPrivilegedIPv6DisabledThenEnabled(t *testing.T) {
	onEachLink(t, privilegedIPv6DisabledThenEnabled)
}

func privilegedIPv6DisabledThenEnabled(t *testing.T, n *node) {
	mustSysctl(t, "all", "1")
	type change struct {
		f       Family
		present bool
		err     error
	}
	changes := make(chan change, 100)
	k := n.mustKeeper(t, func(c *Config) {
		c.CheckInterval = time.Hour
		c.OnChange = func(f Family, present bool, err error) { changes <- change{f, present, err} }
	})
	next := func() change {
		t.Helper()
		select {
		case c := <-changes:
			return c
		case <-time.After(20 * time.Second):
			t.Fatalf("no change in 20 s; state %+v", k.State())
			return change{}
		}
	}
	n.run(t, k)
	if c := next(); c.f != IPv4 || !c.present || c.err != nil {
		t.Errorf("IPv4: %+v", c)
	}
	if c := next(); c.f != IPv6 || c.present || !errors.Is(c.err, ErrIPv6Disabled) {
		t.Errorf("IPv6 while disabled: %+v", c)
	}
	mustSysctl(t, "all", "0")
	for c := next(); !c.present; c = next() { // the reason may change on the way
		if c.f != IPv6 || !errors.Is(c.err, ErrIPv6Disabled) {
			t.Fatalf("on the way: %+v", c)
		}
	}
	mustSysctl(t, "all", "1")
	if c := next(); c.f != IPv6 || c.present || !errors.Is(c.err, ErrIPv6Disabled) {
		t.Errorf("IPv6 disabled again: %+v", c)
	}
	if p, err := k.State().Family(IPv4); !p || err != nil {
		t.Errorf("IPv4 suffered: %v, %v", p, err)
	}
}

func TestPrivilegedForeignLink(t *testing.T) { onEachLink(t, privilegedForeignLink) }

func privilegedForeignLink(t *testing.T, n *node) {
	if !n.dummy {
		// A link that is not dummy leads somewhere: never used.
		must(t, n.h.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: DefaultLinkName}}))
		before := n.inventory(t)
		k := n.mustKeeper(t)
		if _, err := k.Ensure(context.Background()); !errors.Is(err, ErrConflict) || !strings.Contains(err.Error(), "bridge") {
			t.Errorf("error %v", err)
		}
		if removed, err := k.Cleanup(context.Background()); err != nil || len(removed) != 0 {
			t.Errorf("cleanup: %q, %v", removed, err)
		}
		if got := n.inventory(t); !slices.Equal(got, before) {
			t.Errorf("changed: %q", got)
		}
		return
	}
	// As the EKS Pod Identity Agent makes it.
	link := &netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Name: DefaultLinkName}}
	must(t, n.h.LinkAdd(link))
	for _, a := range DefaultAddresses() {
		must(t, n.h.AddrAdd(link, &netlink.Addr{IPNet: hostNet(a), Flags: unix.IFA_F_NODAD}))
	}
	must(t, n.h.LinkSetUp(link))
	must(t, n.h.RouteAdd(&netlink.Route{LinkIndex: link.Index, Dst: hostNet(v4)}))
	n.awaitLocal(t, v6.String()+"/128")
	before := n.inventory(t)
	k := n.mustKeeper(t)
	r, err := k.Ensure(context.Background())
	must(t, err)
	if !r.Adopted || !r.Addresses[0].Adopted || r.Addresses[0].Changed || r.Addresses[1].Changed {
		t.Errorf("result %+v", r)
	}
	if removed, err := k.Cleanup(context.Background()); err != nil || len(removed) != 0 {
		t.Errorf("cleanup: %q, %v", removed, err)
	}
	if got := n.inventory(t); !slices.Equal(got, before) {
		t.Errorf("changed: %q, before %q", got, before)
	}
}

func TestPrivilegedShadowed(t *testing.T) { onEachLink(t, privilegedShadowed) }

func privilegedShadowed(t *testing.T, n *node) {
	n.mustPod(t)
	k := n.mustKeeper(t)
	_, err := k.Ensure(context.Background())
	must(t, err)
	found, err := k.CheckShadowed(context.Background())
	must(t, err)
	if len(found) != 0 {
		t.Errorf("a plain node, yet found %+v", found)
	}

	// The local table moved behind a table that sends the address elsewhere.
	for _, f := range []Family{IPv4, IPv6} {
		add := func(prio, table int) {
			r := netlink.NewRule()
			r.Family, r.Priority, r.Table = f.netlink(), prio, table
			must(t, n.h.RuleAdd(r))
		}
		add(100, unix.RT_TABLE_LOCAL)
		add(50, 7)
		old := netlink.NewRule()
		old.Family, old.Priority, old.Table = f.netlink(), 0, unix.RT_TABLE_LOCAL
		must(t, n.h.RuleDel(old))
	}
	found, err = k.CheckShadowed(context.Background())
	must(t, err)
	if len(found) != 2 || found[0].Kind != RuleBeforeLocal || found[1].Kind != RuleBeforeLocal {
		t.Errorf("an empty table before the local one: %+v", found)
	}
	for _, a := range DefaultAddresses() {
		must(t, n.h.RouteAdd(&netlink.Route{LinkIndex: n.link(t, "pod0").Attrs().Index, Dst: hostNet(a), Table: 7}))
	}
	found, err = k.CheckShadowed(context.Background())
	must(t, err)
	notLocal := map[Family]bool{}
	for _, f := range found {
		if f.Kind == NotLocal && f.Link == "pod0" {
			notLocal[f.Family] = true
		}
	}
	if !notLocal[IPv4] || !notLocal[IPv6] {
		t.Errorf("the address is routed away, found only %+v", found)
	}
}

// CAP_NET_ADMIN is all Ensure, and without it the error says so and nothing
// panics.
func TestPrivilegedCapabilities(t *testing.T) { onEachLink(t, privilegedCapabilities) }

func privilegedCapabilities(t *testing.T, n *node) {
	limit := func(caps uint32) {
		t.Helper()
		hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var data [2]unix.CapUserData
		must(t, unix.Capget(&hdr, &data[0]))
		data[0].Effective, data[1].Effective = caps, 0
		hdr.Pid = 0
		must(t, unix.Capset(&hdr, &data[0])) // this thread only
	}
	limit(0)
	r, err := n.mustKeeper(t).Ensure(context.Background())
	if !errors.Is(err, os.ErrPermission) || !errors.Is(err, ErrUnavailable) {
		t.Errorf("without capabilities: %+v, %v", r, err)
	}
	limit(1 << unix.CAP_NET_ADMIN)
	k := n.mustKeeper(t)
	if r, err = k.Ensure(context.Background()); err != nil || !r.Addresses[0].Present || !r.Addresses[1].Present {
		t.Errorf("with CAP_NET_ADMIN alone: %+v, %v", r, err)
	}
	if _, err = k.Cleanup(context.Background()); err != nil {
		t.Errorf("cleanup with CAP_NET_ADMIN alone: %v", err)
	}
}
