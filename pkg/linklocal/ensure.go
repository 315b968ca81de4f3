// SPDX-License-Identifier: Apache-2.0

package linklocal

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Values of the kernel's uapi that netlink wants as plain numbers.
const (
	forever      = 0xffffffff // INFINITY_LIFE_TIME of linux/if_addr.h
	dumpAttempts = 5

	localAttempts = 200
	localInterval = 5 * time.Millisecond
)

// Ensure puts every address in place that can be: link, address, host route.
// What is there already is left as it is, so a second call changes nothing.
//
// The error is nil as long as one address is present, else an
// [ErrUnavailable] that wraps every address's own; the Result always says how
// each address fares. Needs CAP_NET_ADMIN, and CAP_SYS_MODULE nowhere: the
// kernel loads its dummy driver by itself.
func (k *Keeper) Ensure(ctx context.Context) (Result, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return k.last.clone(), fmt.Errorf("ensuring link-local addresses: %w", err)
	}
	before := k.last
	k.last = k.ensure(ctx, before)
	for i := range k.last.Addresses {
		a, was := &k.last.Addresses[i], before.Addresses[i]
		a.Repairs, a.seen = was.Repairs, was.seen || a.Present
		if a.Changed && a.Present && was.seen {
			a.Repairs++
		}
	}
	r := k.last.clone()
	errs := make([]error, 0, len(r.Addresses))
	for _, a := range r.Addresses {
		if a.Present {
			return r, nil
		}
		errs = append(errs, a.Err)
	}
	return r, fmt.Errorf("%w: %w", ErrUnavailable, errors.Join(errs...))
}

// dump repeats a list the kernel says was changed while it was read: taken as
// it is, an address could seem to be missing that is not.
func dump[T any](what string, list func() ([]T, error)) ([]T, error) {
	var err error
	for range dumpAttempts {
		var l []T
		if l, err = list(); err == nil {
			return l, nil
		}
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return nil, fmt.Errorf("%w: listing %s: %w", ErrUncertain, what, err)
}

// look is one reading of the kernel's state.
type look struct {
	links   []netlink.Link
	own, lo netlink.Link // nil if absent
	holders map[netip.Addr][]netlink.Addr
	errs    map[Family]error
}

func (l *look) name(index int) string {
	for _, link := range l.links {
		if link.Attrs().Index == index {
			return link.Attrs().Name
		}
	}
	return fmt.Sprintf("link %d", index)
}

func (l *look) holderOn(a netip.Addr, link netlink.Link) (netlink.Addr, bool) {
	for _, h := range l.holders[a] {
		if link != nil && h.LinkIndex == link.Attrs().Index {
			return h, true
		}
	}
	return netlink.Addr{}, false
}

func (k *Keeper) look() (*look, error) {
	links, err := dump("links", k.nl.LinkList)
	if err != nil {
		return nil, err
	}
	l := &look{links: links, holders: map[netip.Addr][]netlink.Addr{}, errs: map[Family]error{}}
	for _, link := range links {
		switch {
		case link.Attrs().Name == k.cfg.LinkName:
			l.own = link
		case link.Attrs().Flags&net.FlagLoopback != 0 && l.lo == nil:
			l.lo = link
		}
	}
	for _, f := range k.families() {
		addrs, err := dump(f.String()+" addresses", func() ([]netlink.Addr, error) { return k.nl.AddrList(nil, f.netlink()) })
		if err != nil {
			l.errs[f] = err
			continue
		}
		for _, na := range addrs {
			if a, ok := addrOf(na.IPNet); ok {
				l.holders[a] = append(l.holders[a], na)
			}
		}
	}
	return l, nil
}

func (k *Keeper) families() []Family {
	var v4, v6 bool
	for _, a := range k.cfg.Addresses {
		v4, v6 = v4 || a.Is4(), v6 || a.Is6()
	}
	var fs []Family
	if v4 {
		fs = append(fs, IPv4)
	}
	if v6 {
		fs = append(fs, IPv6)
	}
	return fs
}

func addrOf(n *net.IPNet) (netip.Addr, bool) {
	if n == nil {
		return netip.Addr{}, false
	}
	a, ok := netip.AddrFromSlice(n.IP)
	return a.Unmap(), ok
}

func hostNet(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}

func (k *Keeper) ensure(ctx context.Context, before Result) Result {
	r := Result{Addresses: make([]AddressState, len(k.cfg.Addresses))}
	for i, a := range k.cfg.Addresses {
		r.Addresses[i].Address = a
	}
	// uncertain keeps what was known: a failed look is no reason to close a
	// listener that works.
	uncertain := func(s *AddressState, i int, err error) {
		s.Present, s.Adopted, s.Err = before.Addresses[i].Present, before.Addresses[i].Adopted, err
	}

	l, err := k.look()
	if err != nil {
		r.Link, r.Loopback, r.Adopted = before.Link, before.Loopback, before.Adopted
		for i := range r.Addresses {
			uncertain(&r.Addresses[i], i, err)
		}
		return r
	}

	target := k.choose(l)
	plans := make([]plan, len(r.Addresses))
	wanted := false
	for i := range r.Addresses {
		a := &r.Addresses[i]
		if err := l.errs[familyOf(a.Address)]; err != nil {
			uncertain(a, i, err)
			plans[i].skip = true
			continue
		}
		plans[i] = k.plan(l, target, a.Address)
		a.Err, a.Present = plans[i].err, plans[i].skip && plans[i].there
		wanted = wanted || !plans[i].skip
	}

	linkChanged := false
	if wanted {
		target, linkChanged, err = k.ensureLink(l, target)
	}
	for i := range r.Addresses {
		a := &r.Addresses[i]
		switch {
		case plans[i].skip:
		case err != nil:
			// The address may well be there (the link could only not be set
			// up), but it cannot be relied on.
			a.Err = err
		default:
			k.place(ctx, target, plans[i], a)
			a.Changed = a.Changed || linkChanged
		}
	}

	k.index = 0
	if target == nil || err != nil {
		return r
	}
	attrs := target.Attrs()
	k.index = attrs.Index
	loopback := attrs.Flags&net.FlagLoopback != 0
	adopted := !loopback && !markedLink(target)
	used := false
	for i := range r.Addresses {
		a := &r.Addresses[i]
		used = used || a.Present
		if !a.Present || l.errs[familyOf(a.Address)] != nil {
			continue
		}
		a.Adopted = adopted
		if h, found := l.holderOn(a.Address, target); found && loopback {
			a.Adopted = !markedOnLoopback(target, h, a.Address)
		}
	}
	if used || markedLink(target) {
		r.Link, r.Loopback, r.Adopted = attrs.Name, loopback, adopted
	}
	return r
}

// choose picks the link: pod-id-link0 if it exists, whoever made it; else the
// loopback link if one of the addresses is already there, because moving it
// would break connections; else nil, which means a dummy link has to be made.
func (k *Keeper) choose(l *look) netlink.Link {
	if l.own != nil {
		return l.own
	}
	for _, a := range k.cfg.Addresses {
		if _, ok := l.holderOn(a, l.lo); ok {
			return l.lo
		}
	}
	return nil
}

// plan is what is to be done about one address.
type plan struct {
	skip  bool  // change nothing
	there bool  // address is on the target already, and usable
	route bool  // host route is there already
	err   error // to report, whether skip or not
}

// plan finds all reasons to keep off before anything is made, so that a
// refusal leaves nothing behind.
func (k *Keeper) plan(l *look, target netlink.Link, a netip.Addr) plan {
	if target != nil && target == l.own && target.Type() != "dummy" {
		// Only a dummy link leads nowhere. On anything else what is sent
		// to the address could leave the node.
		return plan{skip: true, err: &ConflictError{Address: a, Link: k.cfg.LinkName,
			Reason: fmt.Sprintf("link %s exists and is a %s link, not a dummy link: remove or rename it", k.cfg.LinkName, target.Type())}}
	}
	if a.Is6() {
		// The new link will inherit what "default" says.
		conf := "default"
		if target != nil {
			conf = target.Attrs().Name
		}
		if err := k.ipv6Disabled(conf); err != nil {
			return plan{skip: true, err: fmt.Errorf("%s: %w", a, err)}
		}
	}
	var p plan
	held, there := l.holderOn(a, target)
	if there && held.Flags&(unix.IFA_F_TENTATIVE|unix.IFA_F_DADFAILED) != 0 && held.Flags&unix.IFA_F_OPTIMISTIC == 0 {
		return plan{skip: true, err: fmt.Errorf("%s on link %s: %w (flags %#x)", a, target.Attrs().Name, ErrNotUsable, held.Flags)}
	}
	p.there = there
	for _, h := range l.holders[a] {
		if target == nil || h.LinkIndex != target.Attrs().Index {
			name := l.name(h.LinkIndex)
			p.err = &ConflictError{Address: a, Link: name,
				Reason: fmt.Sprintf("another agent or an administrator has put this address on link %s: remove it there first", name)}
			// An address that is on our link works whatever else there is,
			// because the local table comes first: keep it and report.
			p.skip = !p.there
		}
	}
	routes, err := k.routes(a)
	if err != nil {
		return plan{skip: true, there: p.there, err: fmt.Errorf("%s: %w", a, err)}
	}
	var elsewhere error
	for _, route := range routes {
		if target != nil && leavesBy(route, target) {
			p.route = true
		} else {
			elsewhere = routeConflict(l, a, route)
		}
	}
	if elsewhere != nil && !p.route {
		p.skip = true
		if p.err == nil {
			p.err = elsewhere
		}
	}
	return p
}

func (k *Keeper) routes(a netip.Addr) ([]netlink.Route, error) {
	return dump("routes to "+a.String(), func() ([]netlink.Route, error) {
		return k.nl.RouteListFiltered(familyOf(a).netlink(), &netlink.Route{Table: unix.RT_TABLE_MAIN, Dst: hostNet(a)},
			netlink.RT_FILTER_TABLE|netlink.RT_FILTER_DST)
	})
}

func leavesBy(r netlink.Route, link netlink.Link) bool {
	return r.LinkIndex == link.Attrs().Index && r.Gw == nil && (r.Type == unix.RTN_UNICAST || r.Type == unix.RTN_UNSPEC)
}

func routeConflict(l *look, a netip.Addr, r netlink.Route) error {
	c := &ConflictError{Address: a}
	switch {
	case r.LinkIndex != 0 && (r.Type == unix.RTN_UNICAST || r.Type == unix.RTN_UNSPEC):
		c.Link = l.name(r.LinkIndex)
		c.Reason = fmt.Sprintf("the main table has a route to this address out of link %s: remove it first", c.Link)
	case len(r.MultiPath) > 0:
		names := make([]string, len(r.MultiPath))
		for i, hop := range r.MultiPath {
			names[i] = l.name(hop.LinkIndex)
		}
		c.Link = names[0]
		c.Reason = "the main table has a multipath route to this address out of links " + strings.Join(names, ", ") + ": remove it first"
	default:
		c.Reason = fmt.Sprintf("the main table has a route to this address that leads nowhere (route type %d, such as blackhole or unreachable): remove it first", r.Type)
	}
	return c
}

// ipv6Disabled reads the sysctl of a link, or of "default". A link that has
// no directory there has no IPv6 (its MTU is below 1280, for example).
func (k *Keeper) ipv6Disabled(conf string) error {
	if _, err := os.Stat(k.cfg.SysctlRoot); err != nil {
		// Not even the root can be seen: let the kernel's answer to the
		// address itself decide.
		return nil
	}
	if _, err := os.Stat(filepath.Join(k.cfg.SysctlRoot, "ipv6")); errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%w: the kernel has no IPv6", ErrIPv6Disabled)
	}
	b, err := os.ReadFile(filepath.Join(k.cfg.SysctlRoot, "ipv6", "conf", conf, "disable_ipv6"))
	switch {
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("%w: there is no IPv6 on %s", ErrIPv6Disabled, conf)
	case err != nil:
		return nil
	case strings.TrimSpace(string(b)) != "0":
		return fmt.Errorf("%w: sysctl net.ipv6.conf.%s.disable_ipv6 is set", ErrIPv6Disabled, conf)
	}
	return nil
}

// ensureLink makes the link if there is none and sets it up.
func (k *Keeper) ensureLink(l *look, target netlink.Link) (link netlink.Link, changed bool, err error) {
	if target == nil {
		if target, err = k.makeDummy(); err != nil {
			return nil, false, err
		}
		if changed = target != nil; !changed {
			if target = l.lo; target == nil {
				return nil, false, errors.New("the kernel has no dummy driver and there is no loopback link")
			}
		}
	}
	attrs := target.Attrs()
	if attrs.Flags&net.FlagUp != 0 {
		return target, changed, nil
	}
	if err := k.nl.LinkSetUp(target); err != nil {
		return target, changed, fmt.Errorf("setting link %s up: %w", attrs.Name, err)
	}
	k.log.Info("link set up", "link", attrs.Name)
	return target, true, nil
}

// makeDummy gives nil without an error if the kernel has no dummy driver.
func (k *Keeper) makeDummy() (netlink.Link, error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = k.cfg.LinkName
	link := &netlink.Dummy{LinkAttrs: attrs}
	err := k.nl.LinkAdd(link)
	switch {
	case errors.Is(err, unix.EOPNOTSUPP):
		// rtnetlink's answer to a kind it neither knows nor can load.
		k.log.Info("kernel has no dummy driver, using the loopback link")
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("making dummy link %s: %w", k.cfg.LinkName, err)
	}
	// The kernel takes no alias in the request that makes a link. Killed in
	// between, a link without a mark stays: used next time, never removed.
	if err := k.nl.LinkSetAlias(link, linkMark); err != nil {
		err = fmt.Errorf("marking link %s: %w", k.cfg.LinkName, err)
		if derr := k.nl.LinkDel(link); derr != nil {
			err = fmt.Errorf("%w; removing it again: %w", err, derr)
		}
		return nil, err
	}
	link.Alias = linkMark
	k.log.Info("dummy link made", "link", k.cfg.LinkName)
	return link, nil
}

// place adds address and route and writes the outcome to s.
func (k *Keeper) place(ctx context.Context, link netlink.Link, p plan, s *AddressState) {
	a := s.Address
	s.Err = p.err
	if a.Is6() && !p.there {
		// Only now is the link known for certain: with "default" enabled it
		// may still be disabled on the loopback link.
		if err := k.ipv6Disabled(link.Attrs().Name); err != nil {
			s.Err = fmt.Errorf("%s: %w", a, err)
			return
		}
	}
	if !p.there {
		if err := k.addAddress(link, a); err != nil {
			s.Err = err
			return
		}
		s.Changed = true
		if err := k.awaitLocal(ctx, a); err != nil {
			s.Err = err
			return
		}
	}
	s.Present = true

	if p.route {
		return
	}
	// The kernel has made one for IPv6 with the address just added, and the
	// reference does not add a second.
	if !p.there && a.Is6() {
		routes, err := k.routes(a)
		if err != nil {
			s.Err = fmt.Errorf("%s: %w", a, err)
			return
		}
		for _, r := range routes {
			if leavesBy(r, link) {
				return
			}
		}
	}
	// As the reference makes it: main table, default protocol and scope, no
	// source, no metric.
	err := k.nl.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: hostNet(a)})
	if err != nil && !errors.Is(err, unix.EEXIST) {
		s.Err = fmt.Errorf("adding route to %s out of link %s: %w", a, link.Attrs().Name, err)
		return
	}
	s.Changed = s.Changed || err == nil
	if err == nil {
		k.log.Info("route added", "address", a.String(), "link", link.Attrs().Name)
	}
}

func (k *Keeper) addAddress(link netlink.Link, a netip.Addr) error {
	attrs := link.Attrs()
	na := &netlink.Addr{IPNet: hostNet(a)}
	loopback := attrs.Flags&net.FlagLoopback != 0
	marked := false
	if a.Is6() {
		// Nobody else can have it: no need to wait a second before it can
		// be bound.
		na.Flags = unix.IFA_F_NODAD
	}
	switch {
	case loopback && a.Is4():
		na.Label = loopbackLabel(link)
		// The kernel looks through all links, loopback first, for a source
		// address when the outgoing link has none (pods' veths often do
		// not). With global scope it would choose this one for the node's
		// own traffic to pods; with host scope it never does.
		na.Scope = unix.RT_SCOPE_HOST
	case loopback && a.Is6():
		// For the same reason: deprecated addresses can be bound and
		// connected to, but are the last choice as a source (RFC 6724,
		// rule 3).
		na.ValidLft, na.PreferedLft = forever, 0
		if !hasAltName(link, altName(a)) {
			// The mark goes first. The other way round, a kill in between
			// would leave an address that nobody owns.
			if err := k.nl.LinkAddAltName(link, altName(a)); err != nil && !errors.Is(err, unix.EEXIST) {
				return fmt.Errorf("marking link %s for %s: %w", attrs.Name, a, err)
			}
			marked = true
		}
	}
	err := k.nl.AddrAdd(link, na)
	if err == nil {
		k.log.Info("address added", "address", a.String(), "link", attrs.Name)
		return nil
	}
	if marked {
		if derr := k.nl.LinkDelAltName(link, altName(a)); derr != nil {
			k.log.Warn("mark not removed", "link", attrs.Name, "address", a.String(), "error", derr)
		}
	}
	// EACCES: disable_ipv6 was set after it was read. The other two: no
	// IPv6 in this kernel, and /proc could not tell.
	if a.Is6() && (errors.Is(err, unix.EACCES) || errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP)) {
		return fmt.Errorf("adding %s to link %s: %w: %w", a, attrs.Name, ErrIPv6Disabled, err)
	}
	return fmt.Errorf("adding %s to link %s: %w", a, attrs.Name, err)
}

// awaitLocal waits until the local table has a just added IPv6 address: the
// kernel puts it there from a work queue (addrconf_dad_work), even without
// duplicate address detection. Until then it can be bound, but a connection
// to it is lost.
func (k *Keeper) awaitLocal(ctx context.Context, a netip.Addr) error {
	if a.Is4() {
		return nil
	}
	for range localAttempts {
		routes, err := dump("local table", func() ([]netlink.Route, error) {
			return k.nl.RouteListFiltered(netlink.FAMILY_V6, &netlink.Route{Table: unix.RT_TABLE_LOCAL, Dst: hostNet(a)},
				netlink.RT_FILTER_TABLE|netlink.RT_FILTER_DST)
		})
		if err != nil {
			return fmt.Errorf("%s: %w", a, err)
		}
		if len(routes) > 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", a, ctx.Err())
		case <-time.After(localInterval):
		}
	}
	return fmt.Errorf("%s: %w: the kernel has not put it into the local table", a, ErrNotUsable)
}

func hasAltName(link netlink.Link, name string) bool {
	for _, n := range link.Attrs().AltNames {
		if n == name {
			return true
		}
	}
	return false
}
