// SPDX-License-Identifier: Apache-2.0

//go:build linux && privileged

package attacks

import (
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/test/testnode"
)

// A stolen token. The thief has read the victim's token file and asks with it
// from its own pod, as every SDK does.
func TestAttackStolenToken(t *testing.T) {
	both(t, ServedAsTruePod, func(a *attack) {
		thief := a.thiefs()
		a.trueThief(func(token string) catch { return thief.ask(askOptions{}, token) })
		a.served(a.victim)
	})
}

// The same over IPv6, and over an IPv6 socket that speaks IPv4 to a v4-mapped
// address: two more ways to name the agent, which must not be two more ways in.
func TestAttackIPv6(t *testing.T) {
	both(t, ServedAsTruePod, func(a *attack) {
		thief := a.thiefs()
		a.trueThief(func(token string) catch { return thief.ask(askOptions{To: agent6}, token) })
		a.trueThief(func(token string) catch { return thief.ask(askOptions{Mapped: true}, token) })
		a.served(a.victim)
	})
}

// A pod directory of the victim's name, below the thief's own cgroup: a
// container with a writable cgroup mount can make it. Only the outermost pod
// directory counts, as the kubelet makes that.
func TestAttackForgedPodDirectory(t *testing.T) {
	both(t, Refused, func(a *attack) {
		a.refused(a.fromForgedDirectory(""), podMismatch)
		a.served(a.victim)
	})
}

// A whole kubepods tree with the victim's pod in it, below the thief's own
// cgroup, in both drivers' spelling.
func TestAttackForgedKubepodsTree(t *testing.T) {
	both(t, Refused, func(a *attack) {
		a.refused(a.fromForgedDirectory("kubepods/burstable"), podMismatch)
		a.refused(a.fromForgedDirectory("kubepods.slice/kubepods-burstable.slice"), podMismatch)
		a.served(a.victim)
	})
}

// A process of the node that is in no pod at all, in its own or in the victim's
// network namespace, with the victim's token.
func TestAttackOutsideEveryPod(t *testing.T) {
	both(t, Refused, func(a *attack) {
		a.refused(a.spawn(a.Node.HostPlace()).ask(askOptions{}, a.victim.Token), notInPod)
		a.refused(a.spawn(a.Node.HostPlace().InNetns(a.victim.Netns())).ask(askOptions{}, a.victim.Token), notInPod)
		a.served(a.victim)
	})
}

// A container with the host's cgroup tree mounted for writing puts itself into
// the victim's cgroup. The kernel then says that it is the victim, and that is
// what such a mount means; but its network namespace is still the thief's own
// pod's, which the third check refuses. An ordinary user cannot write there.
func TestAttackHostCgroupMount(t *testing.T) {
	as(t, somebody, NeverReachesTheAgent, func(a *attack) {
		_, err := a.fromVictimsCgroup()
		a.unreached(err, unix.EACCES, unix.EPERM)
	})
	as(t, root, Refused, func(a *attack) {
		c, err := a.fromVictimsCgroup()
		must(t, err)
		a.refused(c, foreignNetns)
		a.served(a.victim)
	})
	// A process that is older than the victim's pod is the oldest in its cgroup,
	// as the process that holds a pod's network namespace is.
	as(t, root, Refused, func(a *attack) {
		thief := a.thiefs()
		younger := a.newPod(t, "younger", testnode.PodConfig{})
		a.Cleanup(func() { younger.Delete(context.Background()) })
		must(t, thief.try("join cgroup", younger.Place().CgroupDir(), nil))
		a.refused(thief.ask(askOptions{}, younger.Token), foreignNetns)
		a.served(younger)
		a.refused(thief.ask(askOptions{}, younger.Token), foreignNetns)
	})
}

// The same container, when it can also enter the victim's network namespace
// (CAP_SYS_ADMIN over it). Out of scope, because who can write the host's cgroup
// tree and enter namespaces is the node's root: it could as well start a process
// in the victim's pod.
func TestAttackHostCgroupMountAndNetns(t *testing.T) {
	const because = "is root of the node"
	as(t, user{because, containerCaps | 1<<capSysAdmin | 1<<unix.CAP_SYS_PTRACE}, OutOfScope, func(a *attack) {
		thief := a.thiefs()
		thief.do("join cgroup", a.victim.Place().CgroupDir(), nil)
		var c catch
		thief.do("new netns", netnsArgs{
			Ask: askOptions{To: agent4, Token: a.victim.Token}, PID: os.Getpid(), FD: a.victim.Netns().FD(),
		}, &c)
		a.robbed(c)
		a.served(a.victim)
	})
}

// Another pod's network namespace: a process of the thief's pod connects from
// inside the victim's, with either token. It is the thief, in a place where the
// thief has no business.
func TestAttackForeignNetns(t *testing.T) {
	both(t, Refused, func(a *attack) {
		thief := a.spawn(a.thief.Place().InNetns(a.victim.Netns()))
		a.refused(thief.ask(askOptions{}, a.victim.Token), foreignNetns)
		a.refused(thief.ask(askOptions{}, a.thief.Token), foreignNetns)
		a.refused(a.spawn(a.thief.Place().InNetns(a.Node.Netns())).ask(askOptions{}, a.thief.Token), foreignNetns)
		a.served(a.victim)
	})
}

// Nested cgroups, as systemd, docker or crun in a pod make them: whatever they
// are called, they are the pod's.
func TestAttackNestedCgroups(t *testing.T) {
	both(t, ServedAsTruePod, func(a *attack) {
		for _, name := range []string{"init.scope", "docker/0123456789ab", "system.slice/a.service/b/c/d/e/f/g/h/i/j/k/l"} {
			thief := a.spawn(a.thief.Place().Nested(name))
			a.trueThief(func(token string) catch { return thief.ask(askOptions{}, token) })
		}
		a.served(a.victim)
	})
}

// A threaded cgroup with the victim's name: one thread of the process is in it,
// the others are not, and that thread connects.
func TestAttackThreadedCgroup(t *testing.T) {
	as(t, root, ServedAsTruePod, func(a *attack) {
		// A domain without processes of its own, whose children may be threaded.
		base := a.thief.Place().Nested("domain")
		a.trueThief(func(token string) catch {
			var c catch
			a.spawn(base).do("thread", threadedArgs{
				Dir: filepath.Join(base.CgroupDir(), filepath.Base(a.victim.CgroupDir())),
				Ask: askOptions{To: agent4, Token: token},
			}, &c)
			return c
		})
		a.served(a.victim)
	})
}

// A task that moves to another cgroup of its pod while it connects: the socket
// is made in one, the handshake begun in a second and the request sent from a
// third.
func TestAttackMovedAroundConnect(t *testing.T) {
	as(t, root, ServedAsTruePod, func(a *attack) {
		var dirs []string
		for _, name := range []string{"one", "two"} {
			place := a.thief.Place().Nested(name)
			_, err := place.CgroupID() // makes it
			must(t, err)
			dirs = append(dirs, place.CgroupDir())
		}
		a.trueThief(func(token string) catch {
			thief := a.thiefs()
			thief.do("join cgroup", dirs[0], nil)
			thief.do("begin", askOptions{To: agent4}, nil)
			thief.do("join cgroup", dirs[1], nil)
			var c catch
			thief.do("finish", askOptions{Token: token}, &c)
			return c
		})
		a.served(a.victim)
	})
}

// clone3 with CLONE_INTO_CGROUP: a child that is elsewhere from its first
// instruction. Into the victim's cgroup it takes the right to write there. Into
// one of its own it is the thief.
func TestAttackCloneIntoCgroup(t *testing.T) {
	as(t, somebody, NeverReachesTheAgent, func(a *attack) {
		a.unreached(a.thiefs().try("clone into", cloneArgs{Dir: a.victim.Place().CgroupDir(), Token: a.victim.Token}, nil), unix.EACCES, unix.EPERM)
	})
	as(t, root, ServedAsTruePod, func(a *attack) {
		thief := a.thiefs()
		a.trueThief(func(token string) catch {
			var c catch
			thief.do("clone into", cloneArgs{Dir: filepath.Join(a.thief.Place().CgroupDir(), "child"), Token: token, Make: true}, &c)
			return c
		})
		a.served(a.victim)
	})
}

// exec after connect: another program, of another user where the attacker may
// change it, asks over the connection.
func TestAttackExecAfterConnect(t *testing.T) {
	both(t, ServedAsTruePod, func(a *attack) {
		thief := a.thiefs()
		a.trueThief(func(token string) catch {
			var c catch
			thief.do("exec after", token, &c)
			return c
		})
		a.served(a.victim)
	})
}

// Reuse of an address and a port: the victim ends, a pod gets its address, and
// connects from the port that the victim used last, with the victim's token.
func TestAttackAddressAndPortReuse(t *testing.T) {
	both(t, ServedAsTruePod, func(a *attack) {
		last := a.victims().ask(askOptions{}, a.victim.Token)
		must(t, a.victim.Delete(t.Context()))
		heir := a.newPod(t, "heir", testnode.PodConfig{IPv4: a.victim.IPv4, IPv6: a.victim.IPv6})
		t.Cleanup(func() { heir.Delete(t.Context()) })
		must(t, a.thief.Delete(t.Context()))
		a.thief = heir
		from := netip.AddrPortFrom(heir.IPv4, last.LocalPort)
		used := false
		a.trueThief(func(token string) catch {
			if used { // the port waits for a while
				from = netip.AddrPort{}
			}
			used = true
			return a.thiefs().ask(askOptions{Bind: from}, token)
		})
	})
}

// Reuse of a process id: a process of the thief has the id that one of the
// victim's had when it was served.
func TestAttackPIDReuse(t *testing.T) {
	as(t, root, ServedAsTruePod, func(a *attack) {
		var thief *hand
		// The kernel's own threads take process ids, too, and keep them.
		for range 20 {
			victim := a.victims()
			if c := victim.ask(askOptions{}, a.victim.Token); c.account() != a.victim.account {
				t.Fatalf("the victim is not served: %v", c)
			}
			victim.Kill()
			if thief = a.reusePID(a.thief.Place(), victim.PID()); thief != nil {
				break
			}
		}
		if thief == nil {
			t.Fatal("no process id could be had again")
		}
		a.trueThief(func(token string) catch { return thief.ask(askOptions{}, token) })
		a.served(a.victim)
	})
}

// A pod that is deleted and made again with the same name and service account,
// as of a StatefulSet. It has another UID: a token of the first is no good in
// the second, and neither is it in the thief.
func TestAttackPodRecreated(t *testing.T) {
	both(t, Refused, func(a *attack) {
		old := a.victim.Token
		must(t, a.victim.Delete(t.Context()))
		again := a.newPod(t, "victim", testnode.PodConfig{ServiceAccount: a.victim.ServiceAccount})
		t.Cleanup(func() { again.Delete(t.Context()) })
		a.refused(a.spawn(again.Place()).ask(askOptions{}, old), podMismatch)
		a.refused(a.thiefs().ask(askOptions{}, old), podMismatch)
		a.served(again)
	})
}

// A pod that ends while somebody else holds a connection which it opened; also
// when a pod of the same UID takes its place, as a static pod's does.
func TestAttackEndedPod(t *testing.T) {
	both(t, Refused, func(a *attack) {
		before, after := a.overEndedPods()
		if before.account() != a.victim.account {
			t.Errorf("before its end: %v", before)
		}
		a.refused(after, podEnded)
	})
	as(t, user{"of a static pod", 0}, Refused, func(a *attack) {
		c := a.victims().dial()
		file, err := c.(interface{ File() (*os.File, error) }).File()
		must(t, err)
		defer file.Close()
		thief := a.thiefs()
		// A connection that says nothing is closed after 5 s.
		if before := thief.askOver(file, a.victim.Token); before.account() != a.victim.account {
			t.Errorf("before its end: %v", before)
		}
		a.endVictim()
		again := a.newPod(t, "victim", testnode.PodConfig{UID: a.victim.UID, ServiceAccount: a.victim.ServiceAccount})
		t.Cleanup(func() { again.Delete(t.Context()) })
		a.served(again)
		a.refused(thief.askOver(file, a.victim.Token), podEnded)
	})
}

// Several pods in the host's network namespace share addresses, ports and
// loopback. Their cgroups differ.
func TestAttackHostNetworkPods(t *testing.T) {
	for _, who := range []user{somebody, root} {
		t.Run(who.name, func(t *testing.T) {
			a := onWith(t, sharedNode(t), who, ServedAsTruePod, testnode.PodConfig{HostNetwork: true}, testnode.PodConfig{HostNetwork: true})
			thief := a.thiefs()
			a.trueThief(func(token string) catch { return thief.ask(askOptions{}, token) })
			a.trueThief(func(token string) catch { return thief.ask(askOptions{To: agent6}, token) })
			a.served(a.victim)
		})
	}
}

// A listener of the thief on the agent's address, in its own network namespace
// (CAP_NET_ADMIN there). It hears its own processes, and nobody else.
func TestAttackListenerOnTheAgentsAddress(t *testing.T) {
	as(t, netAdmin, NeverReachesTheAgent, func(a *attack) {
		must(t, a.thief.Netns().Do(func() error {
			lo, err := netlink.LinkByName("lo")
			if err != nil {
				return err
			}
			addr, err := netlink.ParseAddr(agent4.Addr().String() + "/32")
			if err != nil {
				return err
			}
			return netlink.AddrAdd(lo, addr)
		}))
		var heardItself bool
		a.thiefs().do("own namespace", a.thief.Token, &heardItself)
		if heardItself {
			a.seen[NeverReachesTheAgent] = true
		}
		a.served(a.victim)
	})
}

// The port of the agent: a hostNetwork pod tries to join it with SO_REUSEPORT,
// on the agent's address, on every address, and on one device, as the agent's
// user and as another. The agent's sockets do not share.
func TestAttackListenerTheft(t *testing.T) {
	for _, who := range []user{somebody, root} {
		t.Run(who.name, func(t *testing.T) {
			a := onWith(t, sharedNode(t), who, NeverReachesTheAgent, testnode.PodConfig{}, testnode.PodConfig{HostNetwork: true})
			thief := a.thiefs()
			for _, at := range []netip.AddrPort{agent4, agent6, netip.MustParseAddrPort("0.0.0.0:80"), netip.MustParseAddrPort("[::]:80")} {
				for _, device := range []string{"", "lo", "cni0"} {
					for _, share := range []bool{false, true} {
						// EACCES: the port is root's.
						a.unreached(thief.try("bind", bindArgs{at, share, device}, nil), unix.EADDRINUSE, unix.EACCES, unix.EPERM)
					}
				}
			}
			a.served(a.victim)
		})
	}
}
