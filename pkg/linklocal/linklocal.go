// SPDX-License-Identifier: Apache-2.0

// Package linklocal keeps the credential endpoint's link-local addresses on
// the node: 169.254.170.23 and fd00:ec2::23, each with the host route that the
// EKS Pod Identity Agent makes.
//
// The addresses live on a dummy link, pod-id-link0, or on the loopback link
// where the kernel has no dummy driver. Each address stands alone: a node
// without IPv6 serves IPv4 and the other way round. [Keeper.Ensure] is
// idempotent, [Keeper.Run] repairs what something else removes, and
// [Keeper.Cleanup] removes what carries Latchkey's mark and nothing else.
//
// # Marks
//
//   - A dummy link that Latchkey made carries an ifalias that begins with
//     "latchkey:". Its addresses and routes go when the link goes, so they need
//     no mark of their own.
//   - An IPv4 address on the loopback link carries the label "lo:latchkey".
//   - An IPv6 address has no label. IFA_PROTO would mark it, but needs Linux
//     5.18, which is above the supported floor. So the loopback link gets an
//     alternative name (Linux 5.5), "latchkey-" and the address in 32 hex
//     digits. A file was rejected: it outlives reboots and namespaces, the
//     kernel's own state does not.
//
// A pod-id-link0 without the mark was made by another agent: it is used and
// completed, but nothing on it is ever removed.
package linklocal

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// DefaultLinkName is the link the EKS Pod Identity Agent makes. Using the same
// name lets either agent follow the other on a node.
const DefaultLinkName = "pod-id-link0"

// Defaults of [Config].
const (
	DefaultCheckInterval = 30 * time.Second
	DefaultDebounce      = 50 * time.Millisecond
	DefaultMaxBackoff    = 5 * time.Second
	DefaultSysctlRoot    = "/proc/sys/net"
)

var (
	// ErrConflict says that something else holds the address, or a route to
	// it, on a link of its own. The error is a [*ConflictError], which names
	// the link. Latchkey never takes an address away from its holder.
	ErrConflict = errors.New("link-local address is held elsewhere")

	// ErrIPv6Disabled says that the kernel has no IPv6, or that it is turned
	// off (disable_ipv6) on the link the address belongs to. It is a state of
	// the node, not a fault: IPv4 goes on, and [Keeper.Run] adds the address
	// when IPv6 appears.
	ErrIPv6Disabled = errors.New("IPv6 is disabled")

	// ErrUnavailable is returned by [Keeper.Ensure] when not one of the
	// addresses is in place. It wraps each address's own error.
	ErrUnavailable = errors.New("no link-local address is in place")

	// ErrUncertain says that the kernel's state could not be read. What was
	// known before still stands; nothing was changed.
	ErrUncertain = errors.New("cannot read the kernel's network state")

	// ErrNotUsable says that the address is on the link but IPv6 duplicate
	// address detection has not ended, or has failed, so that it cannot be
	// bound.
	ErrNotUsable = errors.New("address cannot be bound yet")
)

// ConflictError explains who holds an address or the route to it. It is an
// [ErrConflict].
type ConflictError struct {
	// Address is the address asked for.
	Address netip.Addr
	// Link is the name of the link that stands in the way; empty for a route
	// that has no link, such as a blackhole.
	Link string
	// Reason says in words what was found and what to do.
	Reason string
}

// Error gives the address and the reason.
func (e *ConflictError) Error() string { return fmt.Sprintf("%s: %s", e.Address, e.Reason) }

// Is makes errors.Is(err, ErrConflict) hold.
func (e *ConflictError) Is(target error) bool { return target == ErrConflict }

// Family is an IP version: 4 or 6.
type Family uint8

// The two families.
const (
	IPv4 Family = 4
	IPv6 Family = 6
)

// String gives "ipv4" or "ipv6", as used in log and metric labels.
func (f Family) String() string {
	if f == IPv6 {
		return "ipv6"
	}
	return "ipv4"
}

func (f Family) netlink() int {
	if f == IPv6 {
		return netlink.FAMILY_V6
	}
	return netlink.FAMILY_V4
}

func familyOf(a netip.Addr) Family {
	if a.Is4() {
		return IPv4
	}
	return IPv6
}

// Handle is what the package needs of netlink. A *netlink.Handle satisfies it.
type Handle interface {
	LinkList() ([]netlink.Link, error)
	LinkAdd(link netlink.Link) error
	LinkDel(link netlink.Link) error
	LinkSetUp(link netlink.Link) error
	LinkSetAlias(link netlink.Link, alias string) error
	LinkAddAltName(link netlink.Link, name string) error
	LinkDelAltName(link netlink.Link, name string) error
	AddrList(link netlink.Link, family int) ([]netlink.Addr, error)
	AddrAdd(link netlink.Link, addr *netlink.Addr) error
	AddrDel(link netlink.Link, addr *netlink.Addr) error
	RouteListFiltered(family int, filter *netlink.Route, mask uint64) ([]netlink.Route, error)
	RouteAdd(route *netlink.Route) error
	RouteDel(route *netlink.Route) error
	RouteGetWithOptions(dst net.IP, options *netlink.RouteGetOptions) ([]netlink.Route, error)
	RuleList(family int) ([]netlink.Rule, error)
}

// Config configures a [Keeper]. The zero value is the default of every field.
type Config struct {
	// Addresses to keep; nil means 169.254.170.23 and fd00:ec2::23. There may
	// be several of one family.
	Addresses []netip.Addr
	// LinkName of the dummy link; empty means [DefaultLinkName].
	LinkName string
	// Handle to the kernel; nil opens one in the network namespace of the
	// calling thread, which [Keeper.Close] closes.
	Handle Handle
	// Subscribe opens a stream of changes; nil means [SubscribeNetlink].
	Subscribe func(ctx context.Context) (<-chan Event, error)
	// OnChange is called by [Keeper.Run], from its own goroutine and one call
	// at a time: once for each configured family at first, and whenever a
	// family's presence or error changes. present says that every address of
	// the family can be bound. err may be set though present is true: the
	// address is there and something about it deserves attention.
	OnChange func(family Family, present bool, err error)
	// CheckInterval between checks that no event asked for; 0 means
	// [DefaultCheckInterval].
	CheckInterval time.Duration
	// Debounce is how long Run waits after an event for more of the same; 0
	// means [DefaultDebounce].
	Debounce time.Duration
	// MaxBackoff bounds the wait between repairs when something keeps
	// removing what Run restores; 0 means [DefaultMaxBackoff].
	MaxBackoff time.Duration
	// SysctlRoot is where the kernel's net sysctls are read; empty means
	// [DefaultSysctlRoot]. The kernel shows there the network namespace of
	// the reading thread.
	SysctlRoot string
	// Logger; nil discards.
	Logger *slog.Logger
}

// AddressState is one address as the last look at the kernel found or left it.
type AddressState struct {
	// Address in question.
	Address netip.Addr
	// Present says the address is on Latchkey's link and can be bound.
	Present bool
	// Adopted says it is there and does not carry Latchkey's mark.
	Adopted bool
	// Changed says that the last Ensure had to add the address, its route or
	// the link.
	Changed bool
	// Repairs counts how often the address, its route or its link had to be
	// restored after the address had once been present, since New.
	Repairs uint64
	// Err is why the address is not as it should be; nil if all is well.
	Err error

	seen bool // has been present since New
}

// Result is the state of every address.
type Result struct {
	// Link is the name of the link that carries the addresses; empty when
	// there is none.
	Link string
	// Loopback says the link is the loopback link.
	Loopback bool
	// Adopted says that the dummy link was made by somebody else, as the EKS
	// Pod Identity Agent does. It is right to use if nobody listens on the
	// address, which the caller finds out by listening.
	Adopted bool
	// Addresses in the order of Config.Addresses.
	Addresses []AddressState
}

// Family reports whether every address of the family is present, and joins
// their errors. A family without any address is not present and has no error.
func (r Result) Family(f Family) (present bool, err error) {
	var errs []error
	n := 0
	present = true
	for _, a := range r.Addresses {
		if familyOf(a.Address) != f {
			continue
		}
		n++
		present = present && a.Present
		if a.Err != nil {
			errs = append(errs, a.Err)
		}
	}
	return present && n > 0, errors.Join(errs...)
}

// Repairs sums the repairs of the family's addresses.
func (r Result) Repairs(f Family) uint64 {
	var n uint64
	for _, a := range r.Addresses {
		if familyOf(a.Address) == f {
			n += a.Repairs
		}
	}
	return n
}

// Keeper puts the addresses on the node and keeps them there. Its methods may
// be called from several goroutines.
type Keeper struct {
	cfg    Config
	nl     Handle
	closer func()
	log    *slog.Logger

	mu    sync.Mutex // one look-and-change at a time
	last  Result
	index int // of the link in last; 0 if none
}

// DefaultAddresses gives the two addresses every AWS SDK accepts over plain
// HTTP: 169.254.170.23 and fd00:ec2::23.
func DefaultAddresses() []netip.Addr {
	return []netip.Addr{netip.MustParseAddr("169.254.170.23"), netip.MustParseAddr("fd00:ec2::23")}
}

// New checks the configuration and opens a netlink handle unless one is given.
// It changes nothing.
func New(cfg Config) (*Keeper, error) {
	if len(cfg.Addresses) == 0 {
		cfg.Addresses = DefaultAddresses()
	}
	cfg.Addresses = slices.Clone(cfg.Addresses)
	for i, a := range cfg.Addresses {
		a = a.Unmap()
		if !a.IsValid() || a.IsUnspecified() || a.IsMulticast() || a.IsLoopback() || a.Zone() != "" {
			return nil, fmt.Errorf("link-local address %q: must be a unicast address that is not loopback and has no zone", cfg.Addresses[i])
		}
		if slices.Contains(cfg.Addresses[:i], a) {
			return nil, fmt.Errorf("link-local address %s is given twice", a)
		}
		cfg.Addresses[i] = a
	}
	if cfg.LinkName == "" {
		cfg.LinkName = DefaultLinkName
	}
	if len(cfg.LinkName) >= unix.IFNAMSIZ || strings.ContainsAny(cfg.LinkName, "/: \t\n%") || cfg.LinkName == "." || cfg.LinkName == ".." {
		return nil, fmt.Errorf("link name %q: must be 1 to %d characters without slash, colon, percent or blank", cfg.LinkName, unix.IFNAMSIZ-1)
	}
	if cfg.CheckInterval <= 0 {
		cfg.CheckInterval = DefaultCheckInterval
	}
	if cfg.Debounce <= 0 {
		cfg.Debounce = DefaultDebounce
	}
	if cfg.MaxBackoff <= 0 {
		cfg.MaxBackoff = DefaultMaxBackoff
	}
	if cfg.SysctlRoot == "" {
		cfg.SysctlRoot = DefaultSysctlRoot
	}
	if cfg.Subscribe == nil {
		cfg.Subscribe = SubscribeNetlink
	}
	if cfg.OnChange == nil {
		cfg.OnChange = func(Family, bool, error) {}
	}
	k := &Keeper{cfg: cfg, nl: cfg.Handle, closer: func() {}, log: cfg.Logger}
	if k.log == nil {
		k.log = slog.New(slog.DiscardHandler)
	}
	if k.nl == nil {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return nil, fmt.Errorf("opening netlink: %w", err)
		}
		k.nl, k.closer = h, h.Close
	}
	k.last.Addresses = make([]AddressState, len(cfg.Addresses))
	for i, a := range cfg.Addresses {
		k.last.Addresses[i].Address = a
	}
	return k, nil
}

// Close closes the netlink handle that New opened. The addresses stay.
func (k *Keeper) Close() { k.closer() }

// State gives what the last Ensure found, without asking the kernel. Before
// the first Ensure no address is present.
func (k *Keeper) State() Result {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.last.clone()
}

func (r Result) clone() Result {
	r.Addresses = slices.Clone(r.Addresses)
	return r
}
