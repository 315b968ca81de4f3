// SPDX-License-Identifier: Apache-2.0

//go:build linux

package testnode

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// bridgeName is the bridge's name on nodes with the reference CNI plugins.
const bridgeName = "cni0"

// bridgeIPv4 is the node's address on the pod network, and the pods' default
// gateway. Pods get the following ones.
func bridgeIPv4() netip.Prefix { return netip.MustParsePrefix("10.88.0.1/24") }

// bridgeIPv6 is the same for IPv6.
func bridgeIPv6() netip.Prefix { return netip.MustParsePrefix("fd00:88::1/64") }

// Gateways are the addresses of the node's bridge, which are the pods' default
// gateways: 10.88.0.1 and fd00:88::1.
func (n *Node) Gateways() (v4, v6 netip.Addr) {
	return bridgeIPv4().Addr(), bridgeIPv6().Addr()
}

// ErrNoAddress means that all 253 IPv4 addresses of the pod network are taken,
// or that the one asked for is.
var ErrNoAddress = errors.New("no free pod address")

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// addAddress gives link an address without a tentative phase.
func addAddress(link netlink.Link, p netip.Prefix) error {
	addr := &netlink.Addr{IPNet: ipNet(p)}
	if p.Addr().Is6() {
		// Without it the address is tentative for two seconds.
		addr.Flags = unix.IFA_F_NODAD
	}
	if err := netlink.AddrAdd(link, addr); err != nil {
		return fmt.Errorf("adding address %s to %s: %w", p, link.Attrs().Name, err)
	}
	return nil
}

// AddLoopback puts addresses on the namespace's lo and returns when a socket can
// be bound to each: the kernel enters IPv6 addresses into the local table from a
// work queue, after the request for them has been answered.
func (n *Netns) AddLoopback(addrs ...netip.Addr) error {
	return n.Do(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return fmt.Errorf("finding lo: %w", err)
		}
		for _, a := range addrs {
			if err := addAddress(lo, netip.PrefixFrom(a, a.BitLen())); err != nil {
				return err
			}
		}
		for _, a := range addrs {
			if err := waitBindable(a); err != nil {
				return err
			}
		}
		return nil
	})
}

// bindWait is how long the kernel may take to make an address usable.
const bindWait = 20 * time.Second

func waitBindable(a netip.Addr) error {
	for deadline := time.Now().Add(bindWait); ; time.Sleep(time.Millisecond) {
		c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(a, 0)))
		if err == nil {
			return c.Close()
		}
		if !errors.Is(err, unix.EADDRNOTAVAIL) || time.Now().After(deadline) {
			return fmt.Errorf("waiting for address %s: %w", a, err)
		}
	}
}

func addDefaultRoute(link netlink.Link, gateway netip.Addr) error {
	route := &netlink.Route{LinkIndex: link.Attrs().Index, Gw: gateway.AsSlice(), Flags: int(netlink.FLAG_ONLINK)}
	if err := netlink.RouteAdd(route); err != nil {
		return fmt.Errorf("adding the default route via %s: %w", gateway, err)
	}
	return nil
}

// addBridge makes cni0 in the calling thread's namespace.
func addBridge() error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = bridgeName
	// Its own, or the bridge takes that of one of its ports and changes it when
	// the port goes: what pods send to the gateway is then lost until their
	// neighbour entries end.
	attrs.HardwareAddr = net.HardwareAddr{0x02, 0, 0, 0, 0, 0x01}
	if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
		return fmt.Errorf("adding bridge %s: %w", bridgeName, err)
	}
	bridge, err := netlink.LinkByName(bridgeName)
	if err != nil {
		return fmt.Errorf("finding bridge %s: %w", bridgeName, err)
	}
	for _, p := range []netip.Prefix{bridgeIPv4(), bridgeIPv6()} {
		if err := addAddress(bridge, p); err != nil {
			return err
		}
	}
	if err := netlink.LinkSetUp(bridge); err != nil {
		return fmt.Errorf("setting bridge %s up: %w", bridgeName, err)
	}
	return nil
}

// addVeth makes a veth pair: hostName in the node's namespace, a port of the
// bridge if bridged, and eth0 in ns.
func (n *Node) addVeth(hostName string, ns *Netns, bridged bool) error {
	return n.netns.Do(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = hostName
		if bridged {
			bridge, err := netlink.LinkByName(bridgeName)
			if err != nil {
				return fmt.Errorf("finding bridge %s: %w", bridgeName, err)
			}
			attrs.MasterIndex = bridge.Attrs().Index
		}
		err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(ns.FD())})
		if err != nil {
			return fmt.Errorf("adding veth %s: %w", hostName, err)
		}
		link, err := netlink.LinkByName(hostName)
		if err != nil {
			return fmt.Errorf("finding veth %s: %w", hostName, err)
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return fmt.Errorf("setting veth %s up: %w", hostName, err)
		}
		return nil
	})
}

// delVeth removes a pair by its end in the node's namespace.
func (n *Node) delVeth(hostName string) error {
	return n.netns.Do(func() error {
		link, err := netlink.LinkByName(hostName)
		if errors.As(err, &netlink.LinkNotFoundError{}) {
			return nil // went with the pod's namespace
		}
		if err != nil {
			return fmt.Errorf("finding veth %s: %w", hostName, err)
		}
		if err := netlink.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("removing veth %s: %w", hostName, err)
		}
		return nil
	})
}

// setUpEth0 gives the pod's end its addresses and default routes.
func setUpEth0(ns *Netns, addrs []netip.Prefix, gateways []netip.Addr) error {
	return ns.Do(func() error {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return fmt.Errorf("finding eth0: %w", err)
		}
		for _, p := range addrs {
			if err := addAddress(link, p); err != nil {
				return err
			}
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return fmt.Errorf("setting eth0 up: %w", err)
		}
		for _, gateway := range gateways {
			if err := addDefaultRoute(link, gateway); err != nil {
				return err
			}
		}
		return nil
	})
}

// allocate takes a pod address pair. A zero want means any; addresses are
// handed out round robin, as CNI's host-local does, so that one is not reused
// at once unless a test asks for it by name.
func (n *Node) allocate(want4, want6 netip.Addr) (v4, v6 netip.Addr, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for range 253 {
		n.lastHost++
		if n.lastHost < 2 || n.lastHost > 254 {
			n.lastHost = 2
		}
		v4, v6 = podAddresses(n.lastHost)
		if want4.IsValid() {
			v4 = want4
		}
		if want6.IsValid() {
			v6 = want6
		}
		if !n.addresses[v4] && !n.addresses[v6] {
			n.addresses[v4], n.addresses[v6] = true, true
			return v4, v6, nil
		}
	}
	return v4, v6, fmt.Errorf("%w: %s, %s", ErrNoAddress, v4, v6)
}

func podAddresses(host int) (v4, v6 netip.Addr) {
	b4, b6 := bridgeIPv4().Addr().As4(), bridgeIPv6().Addr().As16()
	b4[3], b6[15] = byte(host), byte(host)
	return netip.AddrFrom4(b4), netip.AddrFrom16(b6)
}

func (n *Node) release(addrs ...netip.Addr) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, a := range addrs {
		delete(n.addresses, a)
	}
}

// IsolatedConfig describes a network namespace beside the pod network.
type IsolatedConfig struct {
	// Name is for messages. Empty: "isolated".
	Name string
	// Addresses are claimed inside, as they are: a pod's address may be among
	// them. They are on eth0, or on lo if Unconnected.
	Addresses []netip.Prefix
	// Unconnected leaves the namespace without any link to the node.
	Unconnected bool
	// NodeAddresses are given to the node's end of the veth pair. The first
	// one of each family is the namespace's default gateway; without any, the
	// bridge's addresses are, reached over this link.
	NodeAddresses []netip.Prefix
	// NodeRoutes makes the node route Addresses to this namespace. Without it
	// answers to a claimed address go to its true owner.
	NodeRoutes bool
}

// AddIsolated makes a network namespace that is not on the bridge: joined to
// the node by a veth pair of its own, or not at all. With [Place.InNetns] a
// pod's process runs in it, so that an attacker can claim a victim's address.
// It goes with the node.
func (n *Node) AddIsolated(cfg IsolatedConfig) (*Netns, error) {
	if cfg.Name == "" {
		cfg.Name = "isolated"
	}
	ns, err := n.newNetns(cfg.Name)
	if err != nil {
		return nil, err
	}
	if err := n.setUpIsolated(ns, cfg); err != nil {
		return nil, errors.Join(fmt.Errorf("setting up namespace %s: %w", cfg.Name, err), ns.close())
	}
	return ns, nil
}

func (n *Node) setUpIsolated(ns *Netns, cfg IsolatedConfig) error {
	if cfg.Unconnected {
		return ns.Do(func() error {
			lo, err := netlink.LinkByName("lo")
			if err != nil {
				return fmt.Errorf("finding lo: %w", err)
			}
			for _, p := range cfg.Addresses {
				if err := addAddress(lo, p); err != nil {
					return err
				}
			}
			return nil
		})
	}
	host := n.vethName()
	if err := n.addVeth(host, ns, false); err != nil {
		return err
	}
	err := n.netns.Do(func() error {
		link, err := netlink.LinkByName(host)
		if err != nil {
			return fmt.Errorf("finding veth %s: %w", host, err)
		}
		for _, p := range cfg.NodeAddresses {
			if err := addAddress(link, p); err != nil {
				return err
			}
		}
		for _, p := range cfg.Addresses {
			if !cfg.NodeRoutes {
				break
			}
			single := netip.PrefixFrom(p.Addr(), p.Addr().BitLen())
			// Replace: the most specific route may be another isolated one's.
			route := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(single), Scope: netlink.SCOPE_LINK}
			if err := netlink.RouteReplace(route); err != nil {
				return fmt.Errorf("routing %s to %s: %w", single, host, err)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	var has4, has6 bool
	for _, p := range cfg.Addresses {
		has4, has6 = has4 || p.Addr().Is4(), has6 || p.Addr().Is6()
	}
	var gateways []netip.Addr
	for _, family := range []struct {
		use      bool
		fallback netip.Prefix
	}{{has4, bridgeIPv4()}, {has6, bridgeIPv6()}} {
		if !family.use {
			continue
		}
		gateway := family.fallback.Addr()
		for _, p := range cfg.NodeAddresses {
			if p.Addr().Is4() == gateway.Is4() {
				gateway = p.Addr()
				break
			}
		}
		gateways = append(gateways, gateway)
	}
	return setUpEth0(ns, cfg.Addresses, gateways)
}
