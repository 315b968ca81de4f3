// SPDX-License-Identifier: Apache-2.0

package linklocal

import (
	"context"
	"errors"
	"net"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func newForeignDummy() netlink.Link {
	return &netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Name: DefaultLinkName, Flags: net.FlagUp}}
}

func cidr(s string) *net.IPNet {
	ip, n, err := net.ParseCIDR(s)
	if err != nil {
		panic(err)
	}
	return &net.IPNet{IP: ip, Mask: n.Mask}
}

func TestCheckShadowedRules(t *testing.T) {
	with := func(r netlink.Rule, edit func(*netlink.Rule)) netlink.Rule {
		edit(&r)
		return r
	}
	local := rule(100, unix.RT_TABLE_LOCAL)
	type finding struct {
		kind        FindingKind
		conditional bool
	}
	tests := map[string]struct {
		rules []netlink.Rule
		want  []finding
	}{
		"the kernel's own":         {[]netlink.Rule{rule(0, unix.RT_TABLE_LOCAL), rule(32766, 254)}, nil},
		"local moved, none before": {[]netlink.Rule{local, rule(32766, 254)}, nil},
		"a table before local":     {[]netlink.Rule{rule(5, 7), local}, []finding{{RuleBeforeLocal, false}}},
		"by mark, as Cilium's":     {[]netlink.Rule{with(rule(9, 2004), func(r *netlink.Rule) { r.Mark = 0x200 }), local}, []finding{{RuleBeforeLocal, true}}},
		"by incoming link":         {[]netlink.Rule{with(rule(9, 7), func(r *netlink.Rule) { r.IifName = "veth0" }), local}, []finding{{RuleBeforeLocal, true}}},
		"by outgoing link":         {[]netlink.Rule{with(rule(9, 7), func(r *netlink.Rule) { r.OifName = "eth0" }), local}, nil},
		"to elsewhere":             {[]netlink.Rule{with(rule(9, 7), func(r *netlink.Rule) { r.Dst = cidr("10.0.0.0/8") }), local}, nil},
		"to us":                    {[]netlink.Rule{with(rule(9, 7), func(r *netlink.Rule) { r.Dst = cidr("169.254.0.0/16") }), local}, []finding{{RuleBeforeLocal, true}}},
		"not to elsewhere": {[]netlink.Rule{with(rule(9, 7), func(r *netlink.Rule) { r.Dst = cidr("10.0.0.0/8"); r.Invert = true }), local},
			[]finding{{RuleBeforeLocal, true}}},
		"conditional local does not end the walk": {[]netlink.Rule{with(rule(0, unix.RT_TABLE_LOCAL), func(r *netlink.Rule) { r.IifName = "eth0" }), rule(9, 7), local},
			[]finding{{RuleBeforeLocal, false}}},
		"no local rule": {[]netlink.Rule{rule(32766, 254)}, []finding{{RuleBeforeLocal, false}, {NoLocalRule, false}}},
		"no rules":      {[]netlink.Rule{}, []finding{{NoLocalRule, false}}},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			nl := newFakeKernel()
			nl.rules[netlink.FAMILY_V4] = tc.rules
			k := mustKeeper(t, nl)
			mustEnsure(t, k)
			got, err := k.CheckShadowed(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			if len(got) != len(tc.want) {
				t.Fatalf("found %+v, want %+v", got, tc.want)
			}
			for i, f := range got {
				if f.Kind != tc.want[i].kind || f.Conditional != tc.want[i].conditional || f.Family != IPv4 || f.Detail == "" {
					t.Errorf("found %+v, want %+v", f, tc.want[i])
				}
			}
		})
	}
}

func TestCheckShadowedLinks(t *testing.T) {
	nl := newFakeKernel()
	up := func(name string, master int) netlink.LinkAttrs {
		return netlink.LinkAttrs{Name: name, Flags: net.FlagUp, MasterIndex: master}
	}
	pod := nl.addLink(&netlink.Veth{LinkAttrs: up("pod", 0)})
	bridge := nl.addLink(&netlink.Bridge{LinkAttrs: up("cni0", 0)})
	nl.addLink(&netlink.Veth{LinkAttrs: up("port", bridge.Attrs().Index)})
	vrf := nl.addLink(&netlink.Vrf{LinkAttrs: up("blue", 0)})
	nl.addLink(&netlink.Veth{LinkAttrs: up("invrf", vrf.Attrs().Index)})
	nl.addLink(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "down"}})
	nl.preloadRoute(netlink.Route{LinkIndex: pod.Attrs().Index, Dst: cidr("10.1.2.3/32")})
	nl.preloadRoute(netlink.Route{LinkIndex: bridge.Attrs().Index, Dst: cidr("10.2.0.0/24"), Src: net.IPv4(10, 2, 0, 1)})

	asked := map[string]string{}
	nl.get = func(dst net.IP, o *netlink.RouteGetOptions) ([]netlink.Route, error) {
		name := ""
		for _, l := range nl.links {
			if l.Attrs().Index == o.IifIndex {
				name = l.Attrs().Name
			}
		}
		if dst.To4() == nil {
			return []netlink.Route{{Type: unix.RTN_LOCAL}}, nil
		}
		asked[name] = o.SrcAddr.String()
		switch name {
		case "pod":
			return []netlink.Route{{Type: unix.RTN_UNICAST, Table: 7, LinkIndex: 2}}, nil
		case "cni0":
			return nil, unix.EHOSTUNREACH
		case "eth0":
			return nil, unix.EXDEV
		}
		return []netlink.Route{{Type: unix.RTN_LOCAL}}, nil
	}
	k := mustKeeper(t, nl)
	mustEnsure(t, k)
	got, err := k.CheckShadowed(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]FindingKind{}
	for _, f := range got {
		found[f.Family.String()+" "+f.Link] = f.Kind
	}
	want := map[string]FindingKind{"ipv4 pod": NotLocal, "ipv4 cni0": NotLocal, "ipv4 invrf": InVRF, "ipv6 invrf": InVRF}
	if len(found) != len(want) || len(got) != len(want) {
		t.Errorf("found %+v, want %v", got, want)
	}
	for key, kind := range want {
		if found[key] != kind {
			t.Errorf("%s: %q, want %q", key, found[key], kind)
		}
	}
	// A source that is plausible for each link, and no question for ports of
	// a bridge, links that are down, or our own.
	wantAsked := map[string]string{"pod": "10.1.2.3", "cni0": "10.2.0.2", "eth0": "192.0.2.1", "invrf": "192.0.2.1"}
	for name, src := range wantAsked {
		if asked[name] != src {
			t.Errorf("%s asked with source %q, want %q", name, asked[name], src)
		}
	}
	if len(asked) != len(wantAsked) {
		t.Errorf("asked for %v", asked)
	}
}

func TestCheckShadowedErrors(t *testing.T) {
	nl := newFakeKernel()
	k := mustKeeper(t, nl)
	if got, err := k.CheckShadowed(context.Background()); err != nil || len(got) != 0 {
		t.Errorf("before Ensure there is nothing to shadow: %v, %v", got, err)
	}
	mustEnsure(t, k)
	nl.fail["RuleList"] = unix.EPERM
	if _, err := k.CheckShadowed(context.Background()); !errors.Is(err, ErrUncertain) {
		t.Errorf("error %v", err)
	}
	nl.fail["LinkList"] = unix.EPERM
	if _, err := k.CheckShadowed(context.Background()); !errors.Is(err, ErrUncertain) {
		t.Errorf("error %v", err)
	}
}
