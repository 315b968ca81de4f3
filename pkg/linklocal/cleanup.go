// SPDX-License-Identifier: Apache-2.0

package linklocal

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Cleanup removes what carries Latchkey's mark in this network namespace, also
// if it was made with other addresses or another link name, and says in words
// what that was. A dummy link or an address that somebody else made stays, and
// so does what Ensure added to such a link.
//
// It goes on after an error and joins them all. [Keeper.Run] must have ended:
// it would put everything back. The EKS Pod Identity Agent uses a link it
// finds without making its own, so do not clean up once it has taken over.
func (k *Keeper) Cleanup(ctx context.Context) (removed []string, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("removing link-local addresses: %w", err)
	}
	links, err := dump("links", k.nl.LinkList)
	if err != nil {
		return nil, err
	}
	var errs []error
	did := func(what string, err error) {
		switch {
		case gone(err):
		case err != nil:
			errs = append(errs, fmt.Errorf("removing %s: %w", what, err))
		default:
			removed = append(removed, what)
			k.log.Info("removed", "object", what)
		}
	}
	for _, link := range links {
		if markedLink(link) {
			did("dummy link "+link.Attrs().Name, ignoreDone(k.nl.LinkDel(link)))
		}
		if link.Attrs().Flags&net.FlagLoopback != 0 {
			if err := k.cleanLoopback(link, did); err != nil {
				errs = append(errs, err)
			}
		}
	}
	if len(errs) == 0 {
		fresh := Result{Addresses: make([]AddressState, len(k.last.Addresses))}
		for i, a := range k.last.Addresses {
			fresh.Addresses[i] = AddressState{Address: a.Address, Repairs: a.Repairs}
		}
		k.last, k.index = fresh, 0
	}
	return removed, errors.Join(errs...)
}

// errGone marks what somebody else removed first: neither done nor failed.
var errGone = errors.New("already gone")

func gone(err error) bool { return errors.Is(err, errGone) }

func ignoreDone(err error) error {
	var notFound netlink.LinkNotFoundError
	if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EADDRNOTAVAIL) ||
		errors.Is(err, unix.ENOENT) || errors.As(err, &notFound) {
		return errGone
	}
	return err
}

func (k *Keeper) cleanLoopback(lo netlink.Link, did func(what string, err error)) error {
	v4, err := dump("ipv4 addresses", func() ([]netlink.Addr, error) { return k.nl.AddrList(lo, netlink.FAMILY_V4) })
	if err != nil {
		return err
	}
	for _, na := range v4 {
		if a, ok := addrOf(na.IPNet); ok && a.Is4() && na.Label == loopbackLabel(lo) {
			if err := k.removeAddress(lo, &na, a, did); err != nil {
				return err
			}
		}
	}
	marked := map[netip.Addr]bool{}
	for _, name := range lo.Attrs().AltNames {
		if a, ok := parseAltName(name); ok {
			marked[a] = true
		}
	}
	if len(marked) == 0 {
		return nil
	}
	v6, err := dump("ipv6 addresses", func() ([]netlink.Addr, error) { return k.nl.AddrList(lo, netlink.FAMILY_V6) })
	if err != nil {
		return err
	}
	for _, na := range v6 {
		a, ok := addrOf(na.IPNet)
		if !ok || !marked[a] {
			continue
		}
		if err := k.removeAddress(lo, &na, a, did); err != nil {
			return err
		}
	}
	// The mark goes last, so that an interrupted cleanup can be repeated.
	for a := range marked {
		did("mark "+altName(a), ignoreDone(k.nl.LinkDelAltName(lo, altName(a))))
	}
	return nil
}

// removeAddress removes the host routes out of the loopback link first: the
// address is what the mark hangs on, and its removal would orphan them.
func (k *Keeper) removeAddress(lo netlink.Link, na *netlink.Addr, a netip.Addr, did func(what string, err error)) error {
	routes, err := k.routes(a)
	if err != nil {
		return err
	}
	name := lo.Attrs().Name
	for _, r := range routes {
		if leavesBy(r, lo) {
			did(fmt.Sprintf("route to %s out of link %s", a, name), ignoreDone(k.nl.RouteDel(&r)))
		}
	}
	if err := ignoreDone(k.nl.AddrDel(lo, na)); err != nil && !gone(err) {
		return fmt.Errorf("removing %s from link %s: %w", a, name, err)
	}
	did(fmt.Sprintf("address %s from link %s", a, name), nil)
	return nil
}
