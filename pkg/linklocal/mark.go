// SPDX-License-Identifier: Apache-2.0

package linklocal

import (
	"encoding/hex"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
)

const (
	linkMarkPrefix = "latchkey:"
	linkMark       = linkMarkPrefix + " EKS Pod Identity endpoint; removed by latchkey-agent cleanup"
	labelSuffix    = ":latchkey"
	altNamePrefix  = "latchkey-"
)

// markedLink says whether Latchkey made this dummy link. The type counts too:
// an alias is free text, and a link of another type was certainly not made here.
func markedLink(l netlink.Link) bool {
	return l.Type() == "dummy" && strings.HasPrefix(l.Attrs().Alias, linkMarkPrefix)
}

// loopbackLabel is the IPv4 mark. It begins with the link's name because
// iproute2 and older tools expect that of a label.
func loopbackLabel(lo netlink.Link) string { return lo.Attrs().Name + labelSuffix }

// altName is the IPv6 mark: hex digits, because a colon is not allowed in the
// name of a link.
func altName(a netip.Addr) string {
	b := a.As16()
	return altNamePrefix + hex.EncodeToString(b[:])
}

// parseAltName is the reverse of altName; ok is false for any other name.
func parseAltName(s string) (a netip.Addr, ok bool) {
	digits, found := strings.CutPrefix(s, altNamePrefix)
	if !found {
		return netip.Addr{}, false
	}
	b, err := hex.DecodeString(digits)
	if err != nil || len(b) != 16 {
		return netip.Addr{}, false
	}
	a = netip.AddrFrom16([16]byte(b))
	// Only the exact spelling is a mark, and only an IPv6 address has one.
	return a, a.Is6() && !a.Is4In6() && altName(a) == s
}

// markedOnLoopback says whether the address on the loopback link is Latchkey's.
func markedOnLoopback(lo netlink.Link, na netlink.Addr, a netip.Addr) bool {
	if a.Is4() {
		return na.Label == loopbackLabel(lo)
	}
	return slices.Contains(lo.Attrs().AltNames, altName(a))
}
