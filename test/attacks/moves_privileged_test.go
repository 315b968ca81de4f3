// SPDX-License-Identifier: Apache-2.0

//go:build linux && privileged

package attacks

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/test/testnode"
)

// The moves of attacks that a proof makes, too. Each gives what the attacker,
// or where it says so the victim, came home with.

// gateway is the pods' way to the agent.
func (a *attack) gateway() netip.Addr {
	v4, _ := a.Node.Gateways()
	return v4
}

// spare is an address of the pod network that no pod has.
func (a *attack) spare() netip.Addr {
	used := map[netip.Addr]bool{}
	for _, p := range a.Node.Pods() {
		used[p.IPv4] = true
	}
	b := a.gateway().As4()
	for b[3] = 239; used[netip.AddrFrom4(b)]; b[3]-- {
	}
	return netip.AddrFrom4(b)
}

// fromForgedDirectory: a process in a directory named like the victim's pod,
// below the thief's own cgroup.
func (a *attack) fromForgedDirectory(prefix string) catch {
	a.Helper()
	name := filepath.Join(prefix, filepath.Base(a.victim.CgroupDir()), a.victim.Containers()[0].ID)
	return a.spawn(a.thief.Place().Nested(name)).ask(askOptions{}, a.victim.Token)
}

// connectedByVictim: the thief makes a socket, the victim connects it, and the
// thief asks over its own copy.
func (a *attack) connectedByVictim() catch {
	a.Helper()
	thief, victim := a.thiefs(), a.victims()
	socket, err := thief.Socket(a.Context(), unix.AF_INET)
	must(a, err)
	defer socket.Close()
	must(a, victim.Connect(a.Context(), socket, agent4))
	return thief.askOver(socket, a.victim.Token)
}

// madeByVictim: the other way round.
func (a *attack) madeByVictim() catch {
	a.Helper()
	thief, victim := a.thiefs(), a.victims()
	socket, err := victim.Socket(a.Context(), unix.AF_INET)
	must(a, err)
	defer socket.Close()
	must(a, thief.Connect(a.Context(), socket, agent4))
	return thief.askOver(socket, a.victim.Token)
}

// askOver asks over a socket that the test passes to the process.
func (h *hand) askOver(socket *os.File, token string) catch {
	h.a.Helper()
	var c catch
	_, err := h.CallFiles(h.a.Context(), "over passed", envelope{h.caps, mustJSON(h.a, token)}, []*os.File{socket}, &c)
	must(h.a, err)
	return c
}

// dial gives a connection that the process opened.
func (h *hand) dial() net.Conn {
	h.a.Helper()
	ctx, cancel := context.WithTimeout(h.a.Context(), patience)
	defer cancel()
	c, err := h.DialContext(ctx, "tcp4", agent4.String())
	must(h.a, err)
	h.a.Cleanup(func() { c.Close() })
	return c
}

// overEndedPods: the victim hands a connection to the thief, works with it, and
// ends. The thief goes on.
func (a *attack) overEndedPods() (before, after catch) {
	a.Helper()
	thief := a.thiefs()
	c := a.victims().dial()
	file, err := c.(*net.TCPConn).File()
	must(a, err)
	defer file.Close()
	before = thief.askOver(file, a.victim.Token)
	// The connection lives on, as its network namespace does.
	a.endVictim()
	return before, thief.askOver(file, a.victim.Token)
}

// endVictim ends the victim's pod, and returns when the agent knows.
func (a *attack) endVictim() {
	a.Helper()
	must(a, a.victim.DeleteKeepingNetns(a.Context()))
	a.eventually(func() error {
		pods, err := a.Admin().Pods(a.Context())
		for _, p := range pods {
			if p.UID == string(a.victim.UID) {
				err = errors.New("the agent lists a pod that has ended")
			}
		}
		return err
	})
}

// fromVictimsCgroup: a process of the thief that moves itself into the victim's
// cgroup, in a mount of the host's tree, and stays in its own network namespace.
func (a *attack) fromVictimsCgroup() (catch, error) {
	a.Helper()
	thief := a.thiefs()
	if err := thief.try("join cgroup", a.victim.Place().CgroupDir(), nil); err != nil {
		return catch{}, err
	}
	return thief.ask(askOptions{}, a.victim.Token), nil
}

// handMade asks with packets made by hand in the thief's pod.
func (a *attack) handMade(o handMadeArgs) (catch, error) {
	a.Helper()
	o.Link, o.Gateway = "eth0", a.gateway()
	if !o.Src.IsValid() {
		o.Src = netip.AddrPortFrom(a.spare(), 40000)
	}
	if o.Token == "" {
		o.Token = a.victim.Token
	}
	var c catch
	err := a.thiefs().try("hand-made", o, &c)
	return c, err
}

// interception is a handshake of the victim that ended in the thief's hands: the
// agent has not seen it.
type intercepting struct {
	a             *attack
	thief, victim *hand
	seen          handshakeSeen
}

// interceptHandshake makes the victim begin a connection, whose SYN the thief
// takes off the bridge by lying about the gateway's address.
func (a *attack) interceptHandshake() *intercepting {
	a.Helper()
	i := &intercepting{a: a, thief: a.thiefs(), victim: a.victims()}
	i.thief.do("intercept", interceptArgs{Link: "eth0", Own: a.thief.IPv4, Victim: a.victim.IPv4, Gateway: a.gateway()}, nil)
	i.victim.do("begin", askOptions{To: agent4}, nil)
	i.thief.do("intercepted", struct{}{}, &i.seen)
	return i
}

// letGo ends the interception. The victim's SYN comes again by itself.
func (i *intercepting) letGo() {
	i.a.Helper()
	i.thief.do("give back", struct{}{}, nil)
}

// victimAsks is what the victim gets over the connection that it began.
func (i *intercepting) victimAsks() catch {
	i.a.Helper()
	var c catch
	i.victim.do("finish", askOptions{Token: i.a.victim.Token}, &c)
	return c
}

// replay: a spy in the host's network namespace hears the nonce of a connection
// of the victim, which is used and closed. Then the thief claims the victim's
// address and plays the handshake again, from the same port.
func (a *attack) replay() catch {
	a.Helper()
	spyPod := a.newPod(a.T, "spy", testnode.PodConfig{HostNetwork: true})
	a.Cleanup(func() { spyPod.Delete(context.Background()) })
	spy := a.spawnAs(spyPod.Place(), root)
	spy.do("sniff", "cni0", nil)
	if c := a.victims().ask(askOptions{}, a.victim.Token); c.account() != a.victim.account {
		a.Fatalf("the victim is not served: %v", c)
	}
	var seen handshakeSeen
	spy.do("sniffed", a.victim.IPv4, &seen)
	defer a.claimBack()
	c, err := a.handMade(handMadeArgs{Src: seen.Src, Nonce: seen.Nonce, Poison: true})
	must(a, err)
	return c
}

// claimBack makes the node find the victim again.
func (a *attack) claimBack() {
	a.Helper()
	a.spawnAs(a.victim.Place(), root).do("claim", claimArgs{"eth0", a.victim.IPv4, a.gateway()}, nil)
}

// swallow makes what a namespace sends to the agent vanish, until the function
// that it returns is called.
func (a *attack) swallow(ns *testnode.Netns) (restore func()) {
	a.Helper()
	var route netlink.Route
	must(a, ns.Do(func() error {
		// A router that is not there. With a fixed MAC nothing waits for it.
		nobody := net.IP{10, 88, 0, 254}
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		if err := netlink.NeighSet(&netlink.Neigh{
			LinkIndex: link.Attrs().Index, IP: nobody, State: netlink.NUD_PERMANENT, HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, 254},
		}); err != nil {
			return err
		}
		route = netlink.Route{
			Dst: &net.IPNet{IP: agent4.Addr().AsSlice(), Mask: net.CIDRMask(32, 32)}, Gw: nobody,
			LinkIndex: link.Attrs().Index, Flags: int(netlink.FLAG_ONLINK),
		}
		return netlink.RouteAdd(&route)
	}))
	return func() {
		a.Helper()
		must(a, ns.Do(func() error { return netlink.RouteDel(&route) }))
	}
}

// flooded: while a handshake of the victim is under way, the thief begins many,
// from nested cgroups and network namespaces of its own. It gives what the
// victim gets.
func (a *attack) flooded() catch {
	a.Helper()
	victim := a.victims()
	restore := a.swallow(a.victim.Netns())
	victim.do("begin", askOptions{To: agent4}, nil)

	a.swallow(a.thief.Netns())
	spaces := []*testnode.Netns{a.thief.Netns()}
	for i := range 2 {
		ns, err := a.Node.AddIsolated(testnode.IsolatedConfig{
			Name: fmt.Sprintf("flooder-%d", i), Addresses: []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 99, byte(i), 1}), 24)},
		})
		must(a, err)
		a.swallow(ns)
		spaces = append(spaces, ns)
	}
	for i := range 6 {
		place := a.thief.Place().Nested(fmt.Sprintf("inner-%d", i)).InNetns(spaces[i%len(spaces)])
		a.spawn(place).do("hold", holdArgs{To: agent4, N: 100}, nil)
	}
	restore()
	var c catch
	victim.do("finish", askOptions{Token: a.victim.Token}, &c)
	return c
}

// usedUp: the thief plays an intercepted handshake of the victim to a listener
// of its own, on the agent's address in a network namespace of its own. It
// gives what the victim gets over that handshake afterwards.
func (a *attack) usedUp() catch {
	a.Helper()
	ns, err := a.Node.AddIsolated(testnode.IsolatedConfig{
		Name: "own", Unconnected: true, Addresses: []netip.Prefix{netip.PrefixFrom(agent4.Addr(), 32)},
	})
	must(a, err)
	must(a, ns.Do(func() error {
		for _, c := range []string{"all", "lo"} {
			if err := os.WriteFile("/proc/sys/net/ipv4/conf/"+c+"/rp_filter", []byte("0"), 0o644); err != nil {
				return err
			}
		}
		if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("0"), 0o644); err != nil {
			return err
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		// Answers to the victim's address go out on lo, where they are seen.
		return netlink.RouteAdd(&netlink.Route{
			Dst: &net.IPNet{IP: a.victim.IPv4.AsSlice(), Mask: net.CIDRMask(32, 32)}, LinkIndex: lo.Attrs().Index, Scope: netlink.SCOPE_LINK,
		})
	}))
	i := a.interceptHandshake()
	var accepted bool
	a.spawn(a.thief.Place().InNetns(ns)).do("use up", i.seen, &accepted)
	if !accepted {
		a.Error("the thief's own listener did not accept the victim's handshake")
	}
	i.letGo()
	return i.victimAsks()
}

// reusePID starts a process in a place that gets a given process id.
func (a *attack) reusePID(place testnode.Place, pid int) *hand {
	a.Helper()
	for range 50 {
		// Best effort: others on the machine start processes, too.
		must(a, os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(fmt.Sprint(pid-1)), 0o644))
		h := a.spawn(place)
		if h.PID() == pid {
			return h
		}
		h.Kill()
		if err := unix.Kill(pid, 0); !errors.Is(err, unix.ESRCH) {
			a.Logf("process id %d is taken by somebody else", pid)
			return nil
		}
	}
	return nil
}
