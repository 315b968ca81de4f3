// SPDX-License-Identifier: Apache-2.0

package linklocal

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func TestNew(t *testing.T) {
	addrs := func(s ...string) func(*Config) {
		return func(c *Config) {
			for _, a := range s {
				c.Addresses = append(c.Addresses, netip.MustParseAddr(a))
			}
		}
	}
	tests := map[string]struct {
		edit func(*Config)
		err  string
	}{
		"defaults":             {func(*Config) {}, ""},
		"one family":           {addrs("169.254.170.23"), ""},
		"two of a family":      {addrs("169.254.170.23", "169.254.170.2"), ""},
		"v4-mapped is the v4":  {addrs("169.254.170.23", "::ffff:169.254.170.23"), "twice"},
		"unspecified":          {addrs("0.0.0.0"), "unicast"},
		"loopback":             {addrs("127.0.0.1"), "unicast"},
		"multicast":            {addrs("ff02::1"), "unicast"},
		"zone":                 {addrs("fe80::1%eth0"), "zone"},
		"zero address":         {func(c *Config) { c.Addresses = []netip.Addr{{}} }, "unicast"},
		"link name too long":   {func(c *Config) { c.LinkName = "pod-id-link00000" }, "link name"},
		"link name with slash": {func(c *Config) { c.LinkName = "../x" }, "link name"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			cfg := Config{Handle: newFakeKernel()}
			tc.edit(&cfg)
			k, err := New(cfg)
			if tc.err == "" {
				if err != nil {
					t.Fatal(err)
				}
				for _, a := range k.State().Addresses {
					if a.Present || !a.Address.IsValid() {
						t.Errorf("state before Ensure: %+v", a)
					}
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tc.err) {
				t.Fatalf("error %v, want one with %q", err, tc.err)
			}
		})
	}
}

// want of one address; the zero value is "absent, no error".
type want struct {
	present, adopted, changed bool
	err                       error
}

var (
	made    = want{present: true, changed: true}
	adopted = want{present: true, adopted: true}
)

func TestEnsure(t *testing.T) {
	dummyLink := func(k *fakeKernel, alias string, up bool) {
		at := netlink.LinkAttrs{Name: DefaultLinkName, Alias: alias}
		if up {
			at.Flags = net.FlagUp
		}
		k.addLink(&netlink.Dummy{LinkAttrs: at})
	}
	tests := map[string]struct {
		prepare func(t *testing.T, k *fakeKernel)
		edit    func(t *testing.T, c *Config)

		link        string
		linkAdopted bool
		v4, v6      want
		err         error  // of Ensure
		says        string // some address's error says
		writes      int    // -1: not checked
	}{
		"fresh node makes a dummy link": {
			link: DefaultLinkName, v4: made, v6: made,
			writes: 6, // link, alias, up, two addresses, the IPv4 route
		},
		"no dummy driver falls back to loopback": {
			prepare: func(_ *testing.T, k *fakeKernel) { k.noDummy = true },
			link:    "lo", v4: made, v6: made,
			writes: 4, // IPv6 mark, two addresses, the IPv4 route
		},
		"the reference agent's link is adopted as it is": {
			prepare: func(_ *testing.T, k *fakeKernel) {
				dummyLink(k, "", true)
				k.preload(DefaultLinkName, v4, true)
				k.preload(DefaultLinkName, v6, true)
			},
			link: DefaultLinkName, linkAdopted: true, v4: adopted, v6: adopted, writes: 0,
		},
		"the reference agent's link is completed": {
			prepare: func(_ *testing.T, k *fakeKernel) {
				dummyLink(k, "", true)
				k.preload(DefaultLinkName, v4, true)
			},
			link: DefaultLinkName, linkAdopted: true, v4: adopted,
			v6: want{present: true, adopted: true, changed: true}, writes: 1,
		},
		"own link found after a restart": {
			prepare: func(_ *testing.T, k *fakeKernel) {
				dummyLink(k, linkMark, true)
				k.preload(DefaultLinkName, v4, true)
				k.preload(DefaultLinkName, v6, true)
			},
			link: DefaultLinkName, v4: want{present: true}, v6: want{present: true}, writes: 0,
		},
		"own link that is down is set up": {
			prepare: func(_ *testing.T, k *fakeKernel) {
				dummyLink(k, linkMark, false)
				k.preload(DefaultLinkName, v4, true)
				k.preload(DefaultLinkName, v6, true)
			},
			link: DefaultLinkName, v4: made, v6: made, writes: 1,
		},
		"an address already on loopback is adopted there": {
			prepare: func(_ *testing.T, k *fakeKernel) { k.preload("lo", v4, true) },
			link:    "lo", v4: adopted, v6: made, writes: 2,
		},
		"link of another type under our name": {
			prepare: func(_ *testing.T, k *fakeKernel) {
				k.addLink(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: DefaultLinkName, Flags: net.FlagUp}})
			},
			v4: want{err: ErrConflict}, v6: want{err: ErrConflict}, err: ErrConflict, says: "is a bridge link", writes: 0,
		},
		"IPv4 held by another link": {
			prepare: func(_ *testing.T, k *fakeKernel) { k.preload("eth0", v4, false) },
			link:    DefaultLinkName, v4: want{err: ErrConflict}, v6: made, says: "link eth0", writes: -1,
		},
		"both held by another link: nothing is made": {
			prepare: func(_ *testing.T, k *fakeKernel) { k.preload("eth0", v4, false); k.preload("eth0", v6, false) },
			v4:      want{err: ErrConflict}, v6: want{err: ErrConflict}, err: ErrConflict, says: "link eth0", writes: 0,
		},
		"route out of another link": {
			prepare: func(_ *testing.T, k *fakeKernel) {
				k.preloadRoute(netlink.Route{LinkIndex: 2, Dst: hostNet(v4), Type: unix.RTN_UNICAST})
			},
			link: DefaultLinkName, v4: want{err: ErrConflict}, v6: made, says: "route to this address out of link eth0", writes: -1,
		},
		"blackhole route": {
			prepare: func(_ *testing.T, k *fakeKernel) {
				k.preloadRoute(netlink.Route{Dst: hostNet(v4), Type: unix.RTN_BLACKHOLE})
			},
			link: DefaultLinkName, v4: want{err: ErrConflict}, v6: made, says: "leads nowhere", writes: -1,
		},
		"multipath route": {
			prepare: func(_ *testing.T, k *fakeKernel) {
				k.preloadRoute(netlink.Route{Dst: hostNet(v6), Type: unix.RTN_UNICAST, MultiPath: []*netlink.NexthopInfo{{LinkIndex: 2}}})
			},
			link: DefaultLinkName, v4: made, v6: want{err: ErrConflict}, says: "multipath", writes: -1,
		},
		"a wider route elsewhere is no conflict": {
			prepare: func(_ *testing.T, k *fakeKernel) {
				_, n, _ := net.ParseCIDR("169.254.0.0/16")
				k.preloadRoute(netlink.Route{LinkIndex: 2, Dst: n, Type: unix.RTN_UNICAST})
			},
			link: DefaultLinkName, v4: made, v6: made, writes: -1,
		},
		"held by us and by another link: kept and reported": {
			prepare: func(_ *testing.T, k *fakeKernel) {
				dummyLink(k, linkMark, true)
				k.preload(DefaultLinkName, v4, false)
				k.preload(DefaultLinkName, v6, true)
				k.preload("eth0", v4, false)
			},
			link: DefaultLinkName, v4: want{present: true, changed: true, err: ErrConflict}, v6: want{present: true}, says: "link eth0", writes: 1,
		},
		"address ours, route turned away: kept and reported": {
			prepare: func(_ *testing.T, k *fakeKernel) {
				dummyLink(k, linkMark, true)
				k.preload(DefaultLinkName, v4, false)
				k.preload(DefaultLinkName, v6, true)
				k.preloadRoute(netlink.Route{LinkIndex: 2, Dst: hostNet(v4), Type: unix.RTN_UNICAST})
			},
			link: DefaultLinkName, v4: want{present: true, err: ErrConflict}, v6: want{present: true}, says: "link eth0", writes: 0,
		},
		"kernel without IPv6": {
			edit: func(t *testing.T, c *Config) { c.SysctlRoot = sysctls(t, nil) },
			link: DefaultLinkName, v4: made, v6: want{err: ErrIPv6Disabled}, says: "kernel has no IPv6", writes: -1,
		},
		"IPv6 disabled by default": {
			edit: func(t *testing.T, c *Config) { c.SysctlRoot = sysctls(t, map[string]string{"default": "1"}) },
			link: DefaultLinkName, v4: made, v6: want{err: ErrIPv6Disabled}, says: "conf.default.disable_ipv6", writes: -1,
		},
		"IPv6 disabled on loopback only": {
			prepare: func(_ *testing.T, k *fakeKernel) { k.noDummy = true },
			edit:    func(t *testing.T, c *Config) { c.SysctlRoot = sysctls(t, map[string]string{"default": "0", "lo": "1"}) },
			link:    "lo", v4: made, v6: want{err: ErrIPv6Disabled}, says: "conf.lo.disable_ipv6", writes: -1,
		},
		"IPv6 disabled while it was added": {
			prepare: func(_ *testing.T, k *fakeKernel) { k.noDummy = true; k.fail["AddrAdd6"] = unix.EACCES },
			link:    "lo", v4: made, v6: want{err: ErrIPv6Disabled}, writes: -1,
		},
		"only IPv6, and it is off: nothing is made": {
			edit: func(t *testing.T, c *Config) {
				c.Addresses = []netip.Addr{v6}
				c.SysctlRoot = sysctls(t, map[string]string{"default": "1"})
			},
			v6: want{err: ErrIPv6Disabled}, err: ErrIPv6Disabled, writes: 0,
		},
		"IPv4 fails, IPv6 goes on": {
			prepare: func(_ *testing.T, k *fakeKernel) { k.fail["AddrAdd4"] = unix.ENOBUFS },
			link:    DefaultLinkName, v4: want{err: unix.ENOBUFS, changed: true}, v6: made, writes: -1,
		},
		"not permitted": {
			prepare: func(_ *testing.T, k *fakeKernel) { k.fail["LinkAdd"] = unix.EPERM },
			v4:      want{err: unix.EPERM}, v6: want{err: unix.EPERM}, err: ErrUnavailable, writes: -1,
		},
		"route cannot be added": {
			prepare: func(_ *testing.T, k *fakeKernel) { k.fail["RouteAdd"] = unix.ENETDOWN },
			link:    DefaultLinkName, v4: want{present: true, changed: true, err: unix.ENETDOWN}, v6: made, writes: -1,
		},
		"somebody added the route at the same time": {
			prepare: func(_ *testing.T, k *fakeKernel) { k.fail["RouteAdd"] = unix.EEXIST },
			link:    DefaultLinkName, v4: made, v6: made, writes: -1,
		},
		"links cannot be listed": {
			prepare: func(_ *testing.T, k *fakeKernel) { k.fail["LinkList"] = unix.ENOMEM },
			v4:      want{err: ErrUncertain}, v6: want{err: ErrUncertain}, err: ErrUncertain, writes: 0,
		},
		"a list that is never consistent": {
			prepare: func(_ *testing.T, k *fakeKernel) { k.fail["AddrList10"] = netlink.ErrDumpInterrupted },
			link:    DefaultLinkName, v4: made, v6: want{err: ErrUncertain}, writes: -1,
		},
		"duplicate address detection has failed": {
			prepare: func(_ *testing.T, k *fakeKernel) {
				dummyLink(k, "", true)
				k.preload(DefaultLinkName, v4, true)
				k.preload(DefaultLinkName, v6, true)
				k.addrs[len(k.addrs)-1].Flags = unix.IFA_F_DADFAILED | unix.IFA_F_TENTATIVE
			},
			link: DefaultLinkName, linkAdopted: true, v4: adopted, v6: want{err: ErrNotUsable}, writes: 0,
		},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			nl := newFakeKernel()
			if tc.prepare != nil {
				tc.prepare(t, nl)
			}
			k := mustKeeper(t, nl, func(c *Config) {
				if tc.edit != nil {
					tc.edit(t, c)
				}
			})
			r, err := k.Ensure(context.Background())
			if !errors.Is(err, tc.err) || (tc.err == nil) != (err == nil) {
				t.Errorf("Ensure: %v, want %v", err, tc.err)
			}
			if r.Link != tc.link || r.Adopted != tc.linkAdopted || r.Loopback != (tc.link == "lo") {
				t.Errorf("link %q (adopted %v, loopback %v), want %q (adopted %v)", r.Link, r.Adopted, r.Loopback, tc.link, tc.linkAdopted)
			}
			said := false
			for _, a := range r.Addresses {
				w := tc.v4
				if a.Address.Is6() {
					w = tc.v6
				}
				if got := (want{a.Present, a.Adopted, a.Changed, nil}); got != (want{w.present, w.adopted, w.changed, nil}) || !errors.Is(a.Err, w.err) || (w.err == nil) != (a.Err == nil) {
					t.Errorf("%s: %+v, want %+v", a.Address, a, w)
				}
				said = said || a.Err != nil && strings.Contains(a.Err.Error(), tc.says)
			}
			if tc.says != "" && !said {
				t.Errorf("no address's error says %q: %+v", tc.says, r)
			}
			if tc.writes >= 0 && len(nl.writes) != tc.writes {
				t.Errorf("%d writes, want %d: %q", len(nl.writes), tc.writes, nl.writes)
			}

			// Whatever the outcome, looking again finds the same, and if all
			// was well writes nothing.
			n := len(nl.writes)
			again, _ := k.Ensure(context.Background())
			for i, a := range again.Addresses {
				if a.Present != r.Addresses[i].Present || a.Adopted != r.Addresses[i].Adopted || a.Repairs != 0 {
					t.Errorf("second Ensure: %+v, first %+v", a, r.Addresses[i])
				}
			}
			if tc.v4.err == nil && tc.v6.err == nil && tc.err == nil && nl.fail["RouteAdd"] == nil && len(nl.writes) != n {
				t.Errorf("second Ensure wrote %q", nl.writes[n:])
			}
		})
	}
}

func TestEnsureMarksWhatItMakes(t *testing.T) {
	t.Run("dummy", func(t *testing.T) {
		nl := newFakeKernel()
		mustEnsure(t, mustKeeper(t, nl))
		if l := nl.link(DefaultLinkName); !markedLink(l) || l.Attrs().Flags&net.FlagUp == 0 {
			t.Errorf("link %+v", l.Attrs())
		}
		for _, a := range nl.addrs {
			if a.IP.To4() == nil && a.Flags&unix.IFA_F_NODAD == 0 {
				t.Errorf("IPv6 address with duplicate address detection: %+v", a)
			}
			if ones, bits := a.Mask.Size(); ones != bits {
				t.Errorf("address %s is not a host prefix", a)
			}
		}
		r := nl.routes[slices.IndexFunc(nl.routes, func(r netlink.Route) bool { return r.Dst.IP.To4() != nil })]
		if r.Scope != 0 || r.Src != nil || r.Priority != 0 || r.Gw != nil {
			t.Errorf("host route is not as the reference makes it: %+v", r)
		}
	})
	t.Run("loopback", func(t *testing.T) {
		nl := newFakeKernel()
		nl.noDummy = true
		mustEnsure(t, mustKeeper(t, nl))
		lo := nl.link("lo")
		for _, a := range nl.addrs {
			ip, _ := addrOf(a.IPNet)
			if !markedOnLoopback(lo, a, ip) {
				t.Errorf("%s carries no mark", ip)
			}
			if ip.Is4() && a.Scope != unix.RT_SCOPE_HOST {
				t.Errorf("%s has scope %d: the kernel would use it as a source", ip, a.Scope)
			}
			if ip.Is6() && (a.PreferedLft != 0 || a.ValidLft != forever) {
				t.Errorf("%s is not deprecated: lifetimes %d, %d", ip, a.PreferedLft, a.ValidLft)
			}
		}
	})
	t.Run("link that cannot be marked is not kept", func(t *testing.T) {
		nl := newFakeKernel()
		nl.fail["LinkSetAlias"] = unix.EIO
		if _, err := mustKeeper(t, nl).Ensure(context.Background()); !errors.Is(err, unix.EIO) {
			t.Errorf("error %v", err)
		}
		if nl.link(DefaultLinkName) != nil {
			t.Error("the link is still there")
		}
	})
	t.Run("address that cannot be marked is not added", func(t *testing.T) {
		nl := newFakeKernel()
		nl.noDummy = true
		nl.fail["LinkAddAltName"] = unix.EIO
		r := mustEnsure(t, mustKeeper(t, nl))
		if _, err := r.Family(IPv6); !errors.Is(err, unix.EIO) || len(nl.addrs) != 1 {
			t.Errorf("error %v, addresses %v", err, nl.addrs)
		}
	})
	t.Run("no mark without its address", func(t *testing.T) {
		nl := newFakeKernel()
		nl.noDummy = true
		nl.fail["AddrAdd6"] = unix.ENOBUFS
		mustEnsure(t, mustKeeper(t, nl))
		if n := nl.link("lo").Attrs().AltNames; len(n) != 0 {
			t.Errorf("left %q", n)
		}
	})
}

func mustEnsure(t *testing.T, k *Keeper) Result {
	t.Helper()
	r, err := k.Ensure(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// A look that fails must not make a caller close a listener that works.
func TestEnsureKeepsWhatItKnewWhenUncertain(t *testing.T) {
	for _, op := range []string{"LinkList", "AddrList2", "RouteList"} {
		t.Run(op, func(t *testing.T) {
			nl := newFakeKernel()
			k := mustKeeper(t, nl)
			mustEnsure(t, k)
			nl.fail[op] = netlink.ErrDumpInterrupted
			r, err := k.Ensure(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			if present, err := r.Family(IPv4); !present || !errors.Is(err, ErrUncertain) {
				t.Errorf("present %v, error %v", present, err)
			}
			if r.Link != DefaultLinkName {
				t.Errorf("link %q", r.Link)
			}
			delete(nl.fail, op)
			n := len(nl.writes)
			if r := mustEnsure(t, k); r.Addresses[0].Err != nil || len(nl.writes) != n {
				t.Errorf("afterwards %+v, writes %q", r, nl.writes[n:])
			}
		})
	}
}

func TestEnsureRepairs(t *testing.T) {
	del := map[string]func(nl *fakeKernel){
		"address": func(nl *fakeKernel) { _ = nl.dropAddr(nl.link(DefaultLinkName).Attrs().Index, v4.AsSlice()) },
		"route": func(nl *fakeKernel) {
			nl.routes = slices.DeleteFunc(nl.routes, func(r netlink.Route) bool { return r.Dst.IP.Equal(v4.AsSlice()) })
		},
		"link":      func(nl *fakeKernel) { _ = nl.LinkDel(nl.link(DefaultLinkName)) },
		"link down": func(nl *fakeKernel) { nl.link(DefaultLinkName).Attrs().Flags &^= net.FlagUp },
	}
	for name, remove := range del {
		t.Run(name, func(t *testing.T) {
			nl := newFakeKernel()
			k := mustKeeper(t, nl)
			mustEnsure(t, k)
			remove(nl)
			r := mustEnsure(t, k)
			if present, err := r.Family(IPv4); !present || err != nil || r.Repairs(IPv4) != 1 {
				t.Errorf("present %v, error %v, repairs %d", present, err, r.Repairs(IPv4))
			}
			if r = mustEnsure(t, k); r.Repairs(IPv4) != 1 || r.Addresses[0].Changed {
				t.Errorf("another repair without need: %+v", r)
			}
		})
	}
	t.Run("adopted link removed by its owner", func(t *testing.T) {
		nl := newFakeKernel()
		nl.addLink(&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Name: DefaultLinkName, Flags: net.FlagUp}})
		k := mustKeeper(t, nl)
		if r := mustEnsure(t, k); !r.Adopted {
			t.Fatalf("not adopted: %+v", r)
		}
		_ = nl.LinkDel(nl.link(DefaultLinkName))
		if r := mustEnsure(t, k); r.Adopted || !markedLink(nl.link(DefaultLinkName)) {
			t.Errorf("the new link is ours and has to say so: %+v", r)
		}
	})
}

func TestEnsureWaitsForTheLocalTable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		nl := newFakeKernel()
		nl.noLocal = true
		k := mustKeeper(t, nl)
		go func() {
			time.Sleep(100 * time.Millisecond)
			nl.mu.Lock()
			defer nl.mu.Unlock()
			nl.routes = append(nl.routes, netlink.Route{Dst: hostNet(v6), Table: unix.RT_TABLE_LOCAL, Type: unix.RTN_LOCAL})
		}()
		if r := mustEnsure(t, k); !r.Addresses[1].Present || r.Addresses[1].Err != nil {
			t.Errorf("%+v", r.Addresses[1])
		}
	})
	synctest.Test(t, func(t *testing.T) {
		nl := newFakeKernel()
		nl.noLocal = true
		if r := mustEnsure(t, mustKeeper(t, nl)); r.Addresses[1].Present || !errors.Is(r.Addresses[1].Err, ErrNotUsable) || !r.Addresses[0].Present {
			t.Errorf("%+v", r)
		}
	})
}

func TestEnsureEndedContext(t *testing.T) {
	nl := newFakeKernel()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := mustKeeper(t, nl).Ensure(ctx); !errors.Is(err, context.Canceled) || len(nl.writes) != 0 {
		t.Errorf("error %v, writes %q", err, nl.writes)
	}
}

func TestResultFamily(t *testing.T) {
	other := netip.MustParseAddr("169.254.170.2")
	r := Result{Addresses: []AddressState{{Address: v4, Present: true, Repairs: 1}, {Address: other, Err: ErrNotUsable, Repairs: 2}}}
	if present, err := r.Family(IPv4); present || !errors.Is(err, ErrNotUsable) {
		t.Errorf("IPv4: %v, %v", present, err)
	}
	if present, err := r.Family(IPv6); present || err != nil {
		t.Errorf("IPv6 without an address: %v, %v", present, err)
	}
	if n := r.Repairs(IPv4); n != 3 {
		t.Errorf("repairs %d", n)
	}
}

func TestParseAltName(t *testing.T) {
	if a, ok := parseAltName(altName(v6)); !ok || a != v6 {
		t.Errorf("round trip: %s, %v", a, ok)
	}
	for _, s := range []string{
		"", "latchkey-", "latchkey-fd00", "eth0", "latchkey-zz000ec2000000000000000000000023",
		"latchkey-FD000EC2000000000000000000000023", altName(v4), altName(v6) + "00", "x" + altName(v6),
	} {
		if a, ok := parseAltName(s); ok {
			t.Errorf("%q taken for the mark of %s", s, a)
		}
	}
}
