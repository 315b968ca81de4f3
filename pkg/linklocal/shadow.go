// SPDX-License-Identifier: Apache-2.0

package linklocal

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// FindingKind says what can keep a pod's packet from reaching the address.
type FindingKind string

// The kinds of finding; the values are constant and fit for a metric label.
const (
	// RuleBeforeLocal: a policy routing rule that can match comes before the
	// one that looks into the local table. What its table answers wins.
	RuleBeforeLocal FindingKind = "rule_before_local"
	// NoLocalRule: no rule without conditions looks into the local table.
	NoLocalRule FindingKind = "no_local_rule"
	// NotLocal: the kernel, asked how it would treat a packet from this link
	// to the address, would not deliver it to the node.
	NotLocal FindingKind = "not_local"
	// InVRF: the link belongs to a VRF. A listener outside it accepts the
	// connection only with sysctl net.ipv4.tcp_l3mdev_accept.
	InVRF FindingKind = "vrf"
)

// Finding is one reason why pods may not reach an address.
type Finding struct {
	// Kind of obstacle.
	Kind FindingKind
	// Family concerned.
	Family Family
	// Address concerned; invalid if all of the family are.
	Address netip.Addr
	// Link that faces a pod; empty for rules.
	Link string
	// Conditional says that the rule has conditions (mark, source, incoming
	// link, ...), so that it may never match a pod's packets.
	Conditional bool
	// Detail in words.
	Detail string
}

// CheckShadowed asks whether packets from pod-facing links end at the local
// table for every address that is present: policy rules before it, VRFs, and
// the kernel's own answer for each link that is up, is not the loopback link
// or ours, and is not a port of a bridge or bond. A link the kernel will not
// answer for (no plausible source address under strict reverse-path filtering)
// is passed over; the rules still count for it.
//
// A finding is a reason to warn, not to stop: rules may be meant for other
// traffic. err is not nil only if the kernel's state could not be read, and
// the findings made until then are returned with it.
func (k *Keeper) CheckShadowed(ctx context.Context) ([]Finding, error) {
	st := k.State()
	links, err := dump("links", k.nl.LinkList)
	if err != nil {
		return nil, err
	}
	var found []Finding
	var errs []error
	for _, f := range k.families() {
		if err := ctx.Err(); err != nil {
			return found, fmt.Errorf("checking policy routing: %w", err)
		}
		var addrs []netip.Addr
		for _, a := range st.Addresses {
			if a.Present && familyOf(a.Address) == f {
				addrs = append(addrs, a.Address)
			}
		}
		if len(addrs) == 0 {
			continue
		}
		rules, err := dump(f.String()+" rules", func() ([]netlink.Rule, error) { return k.nl.RuleList(f.netlink()) })
		if err != nil {
			errs = append(errs, err)
		} else {
			found = append(found, shadowingRules(f, addrs, rules)...)
		}
		var routes []netlink.Route
		if f == IPv4 {
			// Only IPv4 checks the source of a packet, so only there a
			// plausible one is needed.
			routes, err = dump("ipv4 routes", func() ([]netlink.Route, error) {
				return k.nl.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
			})
			if err != nil {
				errs = append(errs, err)
				continue
			}
		}
		for _, link := range podFacing(links, st.Link) {
			name := link.Attrs().Name
			if vrf := vrfOf(links, link); vrf != "" {
				found = append(found, Finding{Kind: InVRF, Family: f, Link: name,
					Detail: fmt.Sprintf("link %s belongs to VRF %s", name, vrf)})
			}
			for _, a := range addrs {
				if detail, bad := k.notLocal(link, a, routes); bad {
					found = append(found, Finding{Kind: NotLocal, Family: f, Address: a, Link: name, Detail: detail})
				}
			}
		}
	}
	return found, errors.Join(errs...)
}

// shadowingRules walks the rules in the kernel's order up to the one that
// sends everything to the local table.
func shadowingRules(f Family, addrs []netip.Addr, rules []netlink.Rule) []Finding {
	var found []Finding
	for _, r := range rules {
		conditional := isConditional(r)
		if r.Table == unix.RT_TABLE_LOCAL && !conditional && !r.Invert {
			return found
		}
		// A rule for the local table does no harm. One that asks for an
		// outgoing link never matches a packet that comes in.
		if r.Table == unix.RT_TABLE_LOCAL || r.OifName != "" || !matchesAny(r, addrs) {
			continue
		}
		found = append(found, Finding{Kind: RuleBeforeLocal, Family: f, Conditional: conditional,
			Detail: fmt.Sprintf("policy rule with priority %d (table %d) comes before the local table", r.Priority, r.Table)})
	}
	return append(found, Finding{Kind: NoLocalRule, Family: f,
		Detail: "no policy rule sends all packets to the local table"})
}

func isConditional(r netlink.Rule) bool {
	return r.Mark != 0 || r.Mask != nil && *r.Mask != 0 || r.Tos != 0 || r.TunID != 0 || r.IifName != "" || r.OifName != "" ||
		r.Src != nil || r.Dst != nil || r.Sport != nil || r.Dport != nil || r.IPProto != 0 || r.UIDRange != nil ||
		r.SuppressPrefixlen >= 0 || r.SuppressIfgroup >= 0
}

func matchesAny(r netlink.Rule, addrs []netip.Addr) bool {
	if r.Dst == nil || r.Invert {
		return true
	}
	for _, a := range addrs {
		if r.Dst.Contains(a.AsSlice()) {
			return true
		}
	}
	return false
}

func podFacing(links []netlink.Link, own string) []netlink.Link {
	var l []netlink.Link
	for _, link := range links {
		at := link.Attrs()
		if at.Flags&net.FlagUp == 0 || at.Flags&net.FlagLoopback != 0 || at.Name == own || link.Type() == "vrf" {
			continue
		}
		// Packets of a bridge's or bond's port come in through its master.
		if at.MasterIndex != 0 && vrfOf(links, link) == "" {
			continue
		}
		l = append(l, link)
	}
	return l
}

func vrfOf(links []netlink.Link, link netlink.Link) string {
	for _, m := range links {
		if m.Attrs().Index == link.Attrs().MasterIndex && m.Type() == "vrf" {
			return m.Attrs().Name
		}
	}
	return ""
}

// notLocal asks the kernel for the route of a packet coming in on the link.
func (k *Keeper) notLocal(link netlink.Link, a netip.Addr, routes []netlink.Route) (detail string, bad bool) {
	opts := &netlink.RouteGetOptions{IifIndex: link.Attrs().Index}
	if a.Is4() {
		opts.SrcAddr = plausibleSource(link, routes)
	}
	got, err := k.nl.RouteGetWithOptions(a.AsSlice(), opts)
	switch {
	case errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EACCES):
		return fmt.Sprintf("a packet from link %s to %s would be dropped: %v", link.Attrs().Name, a, err), true
	case err != nil, len(got) == 0:
		// EXDEV or EINVAL: the made-up source did not pass. The link may
		// also be gone by now.
		return "", false
	}
	var ways []string
	for _, r := range got {
		if r.Type == unix.RTN_LOCAL {
			return "", false
		}
		ways = append(ways, fmt.Sprintf("type %d, table %d, link %d", r.Type, r.Table, r.LinkIndex))
	}
	return fmt.Sprintf("a packet from link %s to %s would not be delivered to this node (route %s)",
		link.Attrs().Name, a, strings.Join(ways, "; ")), true
}

// plausibleSource gives an address that reverse-path filtering expects behind
// the link: the pod's own if there is a host route to it, else one of the
// link's subnet, else one of TEST-NET-1, which passes where the filter is off.
func plausibleSource(link netlink.Link, routes []netlink.Route) net.IP {
	src := net.IPv4(192, 0, 2, 1).To4()
	for _, r := range routes {
		if r.LinkIndex != link.Attrs().Index || r.Dst == nil || r.Gw != nil {
			continue
		}
		ones, bits := r.Dst.Mask.Size()
		base := r.Dst.IP.To4()
		if bits != 32 || base == nil || ones == 0 {
			continue
		}
		if ones == 32 {
			return base
		}
		p, ok := netip.AddrFromSlice(base)
		if !ok {
			continue
		}
		// The node's own address in the subnet would be a martian source.
		for p = p.Next(); r.Dst.Contains(p.AsSlice()); p = p.Next() {
			if r.Src == nil || !r.Src.Equal(p.AsSlice()) {
				src = p.AsSlice()
				break
			}
		}
	}
	return src
}
