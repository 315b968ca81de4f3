// SPDX-License-Identifier: Apache-2.0

//go:build linux && privileged

package attacks

import (
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/pkg/attribution"
	"github.com/latchkey-dev/latchkey/test/testnode"
)

// A socket passed over a unix socket before it is connected, in both directions:
// made by the thief and connected by the victim, which takes it for its own; and
// made by the victim and connected by the thief. Both cgroups are recorded, and
// they name two pods.
func TestAttackPassedSocket(t *testing.T) {
	both(t, Refused, func(a *attack) {
		a.refused(a.connectedByVictim(), twoPods)
		a.refused(a.madeByVictim(), twoPods)
		a.served(a.victim)
	})
	t.Run("between_hostNetwork_pods", func(t *testing.T) {
		a := onWith(t, sharedNode(t), somebody, Refused, testnode.PodConfig{HostNetwork: true}, testnode.PodConfig{HostNetwork: true})
		a.refused(a.connectedByVictim(), twoPods)
		a.refused(a.madeByVictim(), twoPods)
		a.served(a.victim)
	})
}

// A connected socket handed over. Out of scope, because the victim does it on
// purpose: it could hand over the credentials as well.
func TestAttackDelegatedConnection(t *testing.T) {
	both(t, OutOfScope, func(a *attack) {
		victim, thief := a.victims(), a.thiefs()
		file, err := victim.dial().(*net.TCPConn).File()
		must(t, err)
		defer file.Close()
		a.robbed(thief.askOver(file, a.victim.Token))
		a.served(a.victim)
	})
}

// pidfd_getfd takes an unconnected socket out of a process of the victim, in
// pods that share process ids and a user. The root of another container may not.
func TestAttackTakenSocket(t *testing.T) {
	take := func(a *attack, connected bool) (catch, error) {
		victim, thief := a.victims(), a.thiefs()
		var fd int
		victim.do("own socket", connected, &fd)
		var c catch
		err := thief.try("take socket", takeArgs{PID: victim.PID(), FD: fd, Connect: !connected, Token: a.victim.Token}, &c)
		return c, err
	}
	as(t, somebody, Refused, func(a *attack) {
		c, err := take(a, false)
		must(t, err)
		a.refused(c, twoPods)
		a.served(a.victim)
	})
	as(t, root, NeverReachesTheAgent, func(a *attack) {
		_, err := take(a, false)
		a.unreached(err, unix.EPERM)
	})
	// A connected one is out of scope: who may take descriptors out of a process
	// may also read its memory, and is that process.
	as(t, user{"of the victim", 0}, OutOfScope, func(a *attack) {
		c, err := take(a, true)
		must(t, err)
		a.robbed(c)
		a.served(a.victim)
	})
}

// A socket that is connected, disconnected and connected again: nothing of its
// first life may remain.
func TestAttackReconnectedSocket(t *testing.T) {
	both(t, ServedAsTruePod, func(a *attack) {
		thief := a.thiefs()
		a.trueThief(func(token string) catch { return thief.ask(askOptions{Again: true}, token) })
		a.served(a.victim)
	})
}

// Address poisoning: a process of the thief in a private network namespace that
// has the victim's address connects to the agent. Answers go to the address's
// true owner.
func TestAttackAddressPoisoning(t *testing.T) {
	both(t, NeverReachesTheAgent, func(a *attack) {
		ns, err := a.Node.AddIsolated(testnode.IsolatedConfig{Addresses: []netip.Prefix{netip.PrefixFrom(a.victim.IPv4, 32)}})
		must(t, err)
		c := a.spawn(a.thief.Place().InNetns(ns)).ask(askOptions{Patience: 700 * time.Millisecond}, a.victim.Token)
		// EINPROGRESS is how a blocking connect says that its time is over.
		a.unreached(c.Errno, unix.EINPROGRESS, unix.ETIMEDOUT, unix.ECONNRESET, unix.EHOSTUNREACH)
		a.served(a.victim)
	})
}

// The same when the node's routes do lead to the thief, as if it had won the
// address altogether. The connection works, and is the thief's.
func TestAttackAddressTakenOver(t *testing.T) {
	both(t, ServedAsTruePod, func(a *attack) {
		ns, err := a.Node.AddIsolated(testnode.IsolatedConfig{
			Addresses: []netip.Prefix{netip.PrefixFrom(a.victim.IPv4, 32)}, NodeRoutes: true,
		})
		must(t, err)
		thief := a.spawn(a.thief.Place().InNetns(ns))
		a.trueThief(func(token string) catch { return thief.ask(askOptions{}, token) })
	})
}

// ARP and IP spoofing on one bridge: the thief's kernel has the victim's address
// (CAP_NET_ADMIN in its own namespace), and the node has been told that the
// address is there.
func TestAttackSpoofedAddress(t *testing.T) {
	as(t, netAdmin, ServedAsTruePod, func(a *attack) {
		must(t, a.thief.Netns().Do(func() error {
			eth0, err := netlink.LinkByName("eth0")
			if err != nil {
				return err
			}
			return netlink.AddrAdd(eth0, &netlink.Addr{IPNet: &net.IPNet{IP: a.victim.IPv4.AsSlice(), Mask: net.CIDRMask(32, 32)}})
		}))
		thief := a.thiefs()
		a.trueThief(func(token string) catch {
			thief.do("claim", claimArgs{"eth0", a.victim.IPv4, a.gateway()}, nil)
			return thief.ask(askOptions{Bind: netip.AddrPortFrom(a.victim.IPv4, 0)}, token)
		})
		a.claimBack()
		a.served(a.victim)
	})
}

// IP_TRANSPARENT lets a process with CAP_NET_RAW bind an address that is not its
// host's: the victim's. The answer to its SYN goes to the victim.
func TestAttackTransparentSocket(t *testing.T) {
	as(t, somebody, NeverReachesTheAgent, func(a *attack) {
		c := a.thiefs().ask(askOptions{Transparent: true, Bind: netip.AddrPortFrom(a.victim.IPv4, 0)}, a.victim.Token)
		a.unreached(c.Errno, unix.EPERM)
	})
	as(t, root, NeverReachesTheAgent, func(a *attack) {
		c := a.thiefs().ask(askOptions{Transparent: true, Bind: netip.AddrPortFrom(a.victim.IPv4, 0), Patience: 700 * time.Millisecond}, a.victim.Token)
		a.unreached(c.Errno, unix.EINPROGRESS, unix.ETIMEDOUT, unix.ECONNRESET)
		a.served(a.victim)
	})
}

// Bind tricks: a port chosen only at connect, a fixed port, a device. The
// evidence is of the connection that results.
func TestAttackBindTricks(t *testing.T) {
	both(t, ServedAsTruePod, func(a *attack) {
		thief := a.thiefs()
		for _, o := range []askOptions{
			{Bind: netip.AddrPortFrom(a.thief.IPv4, 0), BindLate: true},
			{Bind: netip.AddrPortFrom(a.thief.IPv4, 0)},
			{Device: "eth0"},
			{Device: "eth0", Bind: netip.AddrPortFrom(a.thief.IPv4, 0), BindLate: true},
		} {
			a.trueThief(func(token string) catch { return thief.ask(o, token) })
		}
		a.served(a.victim)
	})
}

// SYN cookies forced on the node: nothing is kept between SYN and ACK.
func TestAttackForcedSYNCookies(t *testing.T) {
	both(t, ServedAsTruePod, func(a *attack) {
		sysctl(a, a.Node.Netns(), "tcp_syncookies", "2")
		thief := a.thiefs()
		a.trueThief(func(token string) catch { return thief.ask(askOptions{}, token) })
		a.trueThief(func(token string) catch { return thief.ask(askOptions{To: agent6}, token) })
		a.served(a.victim)
	})
}

// sysctl sets one of a namespace's for the test.
func sysctl(a *attack, ns *testnode.Netns, name, value string) {
	a.Helper()
	path := "/proc/sys/net/ipv4/" + name
	var before []byte
	must(a, ns.Do(func() (err error) {
		if before, err = os.ReadFile(path); err != nil {
			return err
		}
		return os.WriteFile(path, []byte(value), 0o644)
	}))
	a.Cleanup(func() {
		if err := ns.Do(func() error { return os.WriteFile(path, before, 0o644) }); err != nil {
			a.Error(err)
		}
	})
}

// The first SYN is lost. The second one carries the nonce as well.
func TestAttackSYNRetransmission(t *testing.T) {
	both(t, ServedAsTruePod, func(a *attack) {
		a.trueThief(func(token string) catch {
			thief := a.thiefs()
			restore := a.swallow(a.thief.Netns())
			thief.do("begin", askOptions{To: agent4}, nil)
			restore()
			var c catch
			thief.do("finish", askOptions{Token: token}, &c)
			return c
		})
		a.served(a.victim)
	})
}

// A multipath TCP client. The agent's listeners are plain TCP, so it falls back.
func TestAttackMPTCP(t *testing.T) {
	both(t, ServedAsTruePod, func(a *attack) {
		thief := a.thiefs()
		mptcp := askOptions{Protocol: unix.IPPROTO_MPTCP}
		c := thief.ask(mptcp, a.thief.Token)
		switch c.Errno {
		case unix.EPROTONOSUPPORT, unix.ENOPROTOOPT, unix.EINVAL:
			a.notHere("no multipath TCP: %v", c.Errno)
			return
		}
		a.trueThief(func(token string) catch { return thief.ask(mptcp, token) })
		a.served(a.victim)
	})
}

// TCP_REPAIR makes a socket look connected, without a handshake. There is
// nothing at the other end. It takes CAP_NET_ADMIN.
func TestAttackRepairedSocket(t *testing.T) {
	both(t, NeverReachesTheAgent, func(a *attack) {
		a.unreached(a.thiefs().try("repair", a.victim.Token, nil), unix.EPERM)
	})
	as(t, netAdmin, NeverReachesTheAgent, func(a *attack) {
		var c catch
		err := a.thiefs().try("repair", a.victim.Token, &c)
		if err != nil {
			a.unreached(err, unix.EPERM)
			return
		}
		a.unreached(c.Errno, unix.ECONNRESET, unix.EPIPE, unix.ETIMEDOUT)
		a.served(a.victim)
	})
}

// io_uring connects, once in the task's own context and once by a thread of the
// kernel (SQPOLL). That thread is one of the process's own, in its cgroup; before
// Linux 5.12 it was the kernel's, which is refused because it is nobody's pod.
func TestAttackIOUring(t *testing.T) {
	both(t, ServedAsTruePod, func(a *attack) {
		thief := a.thiefs()
		for _, sqpoll := range []bool{false, true} {
			connect := func(token string) uringAnswer {
				var u uringAnswer
				thief.do("uring", uringArgs{sqpoll, token}, &u)
				return u
			}
			switch u := connect(a.thief.Token); {
			case u.Missing != "":
				a.notHere("no io_uring (SQPOLL %t) for %s: %s", sqpoll, a.who.name, u.Missing)
				continue
			case sqpoll && u.Catch.Status == twoPods.status:
				t.Log("the kernel's SQPOLL thread is in no pod, and is refused")
				a.counted(u.Catch, twoPods)
				a.counted(connect(a.victim.Token).Catch, twoPods)
				continue
			}
			a.trueThief(func(token string) catch { return connect(token).Catch })
		}
		a.served(a.victim)
	})
}

// A connection that was begun before the programs were attached, by a SYN that
// was lost, and is completed after the agent has started. It never gains
// evidence; the client is told to open another, and that one is served.
func TestAttackLateAttach(t *testing.T) {
	a := on(t, ownNode(t, ""), somebody, Refused)
	a.agent.Kill()
	_, err := attribution.Cleanup(a.PinPath())
	must(t, err)
	victim := a.victims()
	restore := a.swallow(a.victim.Netns())
	victim.do("begin", askOptions{To: agent4}, nil)
	a.start(t)
	// The neighbour found nobody meanwhile.
	served := a.quiet.served.Load()
	for a.quiet.served.Load() == served {
		time.Sleep(5 * time.Millisecond)
	}
	a.failures = len(a.quiet.failures())
	// The counters began anew.
	a.before = a.counters(t)
	restore()
	var c catch
	victim.do("finish", askOptions{Token: a.victim.Token}, &c)
	a.refused(c, noEvidence)
	a.wantEvent("no_option")
	a.served(a.victim)
}
