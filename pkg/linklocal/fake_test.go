// SPDX-License-Identifier: Apache-2.0

package linklocal

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

var (
	v4 = netip.MustParseAddr("169.254.170.23")
	v6 = netip.MustParseAddr("fd00:ec2::23")
)

// fakeKernel behaves as rtnetlink does in what the package relies on.
type fakeKernel struct {
	mu      sync.Mutex
	noDummy bool
	noLocal bool             // IPv6 addresses never get into the local table
	fail    map[string]error // by operation; answered until removed
	links   []netlink.Link
	addrs   []netlink.Addr
	routes  []netlink.Route
	rules   map[int][]netlink.Rule
	get     func(dst net.IP, o *netlink.RouteGetOptions) ([]netlink.Route, error)
	writes  []string
	next    int
	events  chan Event
}

func newFakeKernel() *fakeKernel {
	k := &fakeKernel{fail: map[string]error{}, rules: map[int][]netlink.Rule{}, next: 1}
	k.addLink(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Name: "lo", Flags: net.FlagUp | net.FlagLoopback}})
	k.addLink(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Name: "eth0", Flags: net.FlagUp}})
	return k
}

func (k *fakeKernel) addLink(l netlink.Link) netlink.Link {
	l.Attrs().Index = k.next
	k.next++
	k.links = append(k.links, l)
	return l
}

func (k *fakeKernel) link(name string) netlink.Link {
	for _, l := range k.links {
		if l.Attrs().Name == name {
			return l
		}
	}
	return nil
}

func (k *fakeKernel) emit(e Event) {
	if k.events != nil {
		k.events <- e
	}
}

func (k *fakeKernel) write(op, what string) error {
	k.writes = append(k.writes, op+" "+what)
	return k.fail[op]
}

func (k *fakeKernel) LinkList() ([]netlink.Link, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	l := make([]netlink.Link, len(k.links))
	for i, link := range k.links {
		at := *link.Attrs()
		at.AltNames = slices.Clone(at.AltNames)
		l[i] = &netlink.GenericLink{LinkAttrs: at, LinkType: link.Type()}
	}
	return l, k.fail["LinkList"]
}

func (k *fakeKernel) LinkAdd(l netlink.Link) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.noDummy {
		return unix.EOPNOTSUPP
	}
	if err := k.write("LinkAdd", l.Attrs().Name); err != nil {
		return err
	}
	if k.link(l.Attrs().Name) != nil {
		return unix.EEXIST
	}
	at := *l.Attrs()
	l.Attrs().Index = k.addLink(&netlink.Dummy{LinkAttrs: at}).Attrs().Index
	k.emit(Event{Kind: LinkEvent, Link: at.Name, LinkIndex: l.Attrs().Index})
	return nil
}

func (k *fakeKernel) LinkDel(l netlink.Link) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.write("LinkDel", l.Attrs().Name); err != nil {
		return err
	}
	if k.link(l.Attrs().Name) == nil {
		return unix.ENODEV
	}
	i := l.Attrs().Index
	k.links = slices.DeleteFunc(k.links, func(x netlink.Link) bool { return x.Attrs().Index == i })
	k.addrs = slices.DeleteFunc(k.addrs, func(x netlink.Addr) bool { return x.LinkIndex == i })
	k.routes = slices.DeleteFunc(k.routes, func(x netlink.Route) bool { return x.LinkIndex == i })
	k.emit(Event{Kind: LinkEvent, Link: l.Attrs().Name, LinkIndex: i})
	return nil
}

func (k *fakeKernel) change(op string, l netlink.Link, f func(at *netlink.LinkAttrs)) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.write(op, l.Attrs().Name); err != nil {
		return err
	}
	x := k.link(l.Attrs().Name)
	if x == nil {
		return unix.ENODEV
	}
	f(x.Attrs())
	k.emit(Event{Kind: LinkEvent, Link: l.Attrs().Name, LinkIndex: x.Attrs().Index})
	return nil
}

func (k *fakeKernel) LinkSetUp(l netlink.Link) error {
	return k.change("LinkSetUp", l, func(at *netlink.LinkAttrs) { at.Flags |= net.FlagUp })
}

func (k *fakeKernel) LinkSetAlias(l netlink.Link, alias string) error {
	return k.change("LinkSetAlias", l, func(at *netlink.LinkAttrs) { at.Alias = alias })
}

func (k *fakeKernel) LinkAddAltName(l netlink.Link, name string) error {
	return k.change("LinkAddAltName", l, func(at *netlink.LinkAttrs) { at.AltNames = append(at.AltNames, name) })
}

func (k *fakeKernel) LinkDelAltName(l netlink.Link, name string) error {
	return k.change("LinkDelAltName", l, func(at *netlink.LinkAttrs) {
		at.AltNames = slices.DeleteFunc(at.AltNames, func(n string) bool { return n == name })
	})
}

func familyOfIP(ip net.IP) int {
	if ip.To4() != nil {
		return netlink.FAMILY_V4
	}
	return netlink.FAMILY_V6
}

func (k *fakeKernel) AddrList(l netlink.Link, family int) ([]netlink.Addr, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	var res []netlink.Addr
	for _, a := range k.addrs {
		if familyOfIP(a.IP) == family && (l == nil || l.Attrs().Index == a.LinkIndex) {
			res = append(res, a)
		}
	}
	return res, k.fail[fmt.Sprintf("AddrList%d", family)]
}

func (k *fakeKernel) AddrAdd(l netlink.Link, a *netlink.Addr) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	op := "AddrAdd4"
	if familyOfIP(a.IP) == netlink.FAMILY_V6 {
		op = "AddrAdd6"
	}
	if err := k.write(op, a.IP.String()+" "+l.Attrs().Name); err != nil {
		return err
	}
	n := *a
	n.LinkIndex = l.Attrs().Index
	if slices.ContainsFunc(k.addrs, func(x netlink.Addr) bool { return x.LinkIndex == n.LinkIndex && x.IP.Equal(n.IP) }) {
		return unix.EEXIST
	}
	k.addrs = append(k.addrs, n)
	if op == "AddrAdd6" {
		// The kernel makes the prefix route of an IPv6 address itself.
		k.routes = append(k.routes, netlink.Route{LinkIndex: n.LinkIndex, Dst: n.IPNet, Table: unix.RT_TABLE_MAIN, Type: unix.RTN_UNICAST, Protocol: unix.RTPROT_KERNEL})
		if !k.noLocal {
			k.routes = append(k.routes, netlink.Route{LinkIndex: n.LinkIndex, Dst: n.IPNet, Table: unix.RT_TABLE_LOCAL, Type: unix.RTN_LOCAL, Protocol: unix.RTPROT_KERNEL})
		}
	}
	ip, _ := netip.AddrFromSlice(n.IP)
	k.emit(Event{Kind: AddressEvent, Address: ip.Unmap(), LinkIndex: n.LinkIndex})
	return nil
}

func (k *fakeKernel) AddrDel(l netlink.Link, a *netlink.Addr) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.write("AddrDel", a.IP.String()+" "+l.Attrs().Name); err != nil {
		return err
	}
	return k.dropAddr(l.Attrs().Index, a.IP)
}

// dropAddr is AddrDel by somebody else, with the lock held.
func (k *fakeKernel) dropAddr(index int, ip net.IP) error {
	n := len(k.addrs)
	k.addrs = slices.DeleteFunc(k.addrs, func(x netlink.Addr) bool { return x.LinkIndex == index && x.IP.Equal(ip) })
	if len(k.addrs) == n {
		return unix.EADDRNOTAVAIL
	}
	k.routes = slices.DeleteFunc(k.routes, func(x netlink.Route) bool {
		return x.LinkIndex == index && x.Dst.IP.Equal(ip) && x.Protocol == unix.RTPROT_KERNEL
	})
	a, _ := netip.AddrFromSlice(ip)
	k.emit(Event{Kind: AddressEvent, Address: a.Unmap(), LinkIndex: index})
	return nil
}

func (k *fakeKernel) RouteListFiltered(family int, f *netlink.Route, mask uint64) ([]netlink.Route, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	var res []netlink.Route
	for _, r := range k.routes {
		if familyOfIP(r.Dst.IP) != family || r.Table != f.Table {
			continue
		}
		if mask&netlink.RT_FILTER_DST != 0 && r.Dst.String() != f.Dst.String() {
			continue
		}
		res = append(res, r)
	}
	return res, k.fail["RouteList"]
}

func (k *fakeKernel) RouteAdd(r *netlink.Route) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.write("RouteAdd", r.Dst.String()); err != nil {
		return err
	}
	n := *r
	n.Table, n.Type, n.Protocol = unix.RT_TABLE_MAIN, unix.RTN_UNICAST, unix.RTPROT_BOOT
	k.routes = append(k.routes, n)
	a, _ := netip.AddrFromSlice(n.Dst.IP)
	k.emit(Event{Kind: RouteEvent, Address: a.Unmap()})
	return nil
}

func (k *fakeKernel) RouteDel(r *netlink.Route) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.write("RouteDel", r.Dst.String()); err != nil {
		return err
	}
	n := len(k.routes)
	k.routes = slices.DeleteFunc(k.routes, func(x netlink.Route) bool {
		return x.LinkIndex == r.LinkIndex && x.Dst.String() == r.Dst.String()
	})
	if len(k.routes) == n {
		return unix.ESRCH
	}
	a, _ := netip.AddrFromSlice(r.Dst.IP)
	k.emit(Event{Kind: RouteEvent, Address: a.Unmap()})
	return nil
}

func (k *fakeKernel) RouteGetWithOptions(dst net.IP, o *netlink.RouteGetOptions) ([]netlink.Route, error) {
	if k.get == nil {
		return []netlink.Route{{Type: unix.RTN_LOCAL}}, nil
	}
	return k.get(dst, o)
}

func (k *fakeKernel) RuleList(family int) ([]netlink.Rule, error) {
	if r, ok := k.rules[family]; ok {
		return r, k.fail["RuleList"]
	}
	return []netlink.Rule{rule(0, unix.RT_TABLE_LOCAL), rule(32766, unix.RT_TABLE_MAIN)}, k.fail["RuleList"]
}

func rule(prio, table int) netlink.Rule {
	r := *netlink.NewRule()
	r.Priority, r.Table = prio, table
	return r
}

// preload puts an address, and the route the kernel or the reference makes,
// on a link as somebody else would.
func (k *fakeKernel) preload(link string, a netip.Addr, withRoute bool) {
	i := k.link(link).Attrs().Index
	k.addrs = append(k.addrs, netlink.Addr{IPNet: hostNet(a), LinkIndex: i, Label: link})
	if withRoute {
		k.preloadRoute(netlink.Route{LinkIndex: i, Dst: hostNet(a), Type: unix.RTN_UNICAST})
	}
}

func (k *fakeKernel) preloadRoute(r netlink.Route) {
	r.Table = unix.RT_TABLE_MAIN
	k.routes = append(k.routes, r)
}

// sysctls makes a stand-in for /proc/sys/net. values: link name to
// disable_ipv6; nil means a kernel without IPv6.
func sysctls(t *testing.T, values map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, v := range values {
		setSysctl(t, root, name, v)
	}
	return root
}

func setSysctl(t *testing.T, root, name, v string) {
	t.Helper()
	d := filepath.Join(root, "ipv6", "conf", name)
	if err := os.MkdirAll(d, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(d, "disable_ipv6"), []byte(v+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
}

var ipv6On = map[string]string{"default": "0", "lo": "0", "eth0": "0", DefaultLinkName: "0"}

func mustKeeper(t *testing.T, nl Handle, edit ...func(*Config)) *Keeper {
	t.Helper()
	cfg := Config{Handle: nl, SysctlRoot: sysctls(t, ipv6On),
		Subscribe: func(context.Context) (<-chan Event, error) { return nil, unix.EPERM }}
	for _, e := range edit {
		e(&cfg)
	}
	k, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return k
}
