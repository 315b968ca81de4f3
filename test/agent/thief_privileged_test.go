// SPDX-License-Identifier: Apache-2.0

//go:build linux && privileged

package agent

import (
	"context"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/test/rig"
	"github.com/latchkey-dev/latchkey/test/testnode"
)

// A stolen token is useless wherever it is presented from, and its owner is
// served all the while.
func TestPrivilegedStolenTokenIsUseless(t *testing.T) {
	w := sharedWorld(t)
	victim := w.newPod(t, testnode.PodConfig{})
	thief := w.newPod(t, testnode.PodConfig{Containers: 2})
	host := w.newPod(t, testnode.PodConfig{HostNetwork: true})
	quiet := w.quietNeighbour(t, victim)
	before := w.verdicts(t, "refused", "pod_mismatch")

	for _, tt := range []struct {
		name  string
		place testnode.Place
		text  string
	}{
		{"another pod", thief.Place(), textMismatch},
		{"its second container", thief.In(1), textMismatch},
		{"another user", thief.Place().AsUser(1000, 1000), textMismatch},
		{"a nested cgroup", thief.Place().Nested("inner"), textMismatch},
		{"the victim's network namespace", thief.Place().InNetns(victim.Netns()), textNetns},
		{"the victim's network namespace, as another user", thief.Place().InNetns(victim.Netns()).AsUser(1000, 1000), textNetns},
		{"the host's network namespace", thief.Place().InNetns(w.Node.Netns()), textNetns},
		{"a hostNetwork pod", host.Place(), textMismatch},
		{"a process of the host", w.Node.HostPlace(), textNotPod},
		{"a process of the host in the victim's network namespace", w.Node.HostPlace().InNetns(victim.Netns()), textNotPod},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := newClient(t, tt.place)
			for _, address := range []string{rig.Host4, rig.Host6, mapped} {
				wantRefusal(t, c.ask(address, victim.Token), 403, tt.text)
			}
		})
	}
	t.Run("with aws-sdk-go-v2", func(t *testing.T) {
		env := append(thief.AWSEnv(""), "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE="+victim.TokenFile())
		got := fetch(t, thief.Place().WithEnv(env...))
		if got.AccessKeyID != "" || !strings.Contains(got.Error, textMismatch) {
			t.Errorf("got %+v, want the reason of the refusal", got)
		}
	})
	t.Run("on a connection that was served before", func(t *testing.T) {
		conn := newClient(t, thief.Place()).dial(rig.Host4)
		wantCredentials(t, ask(t, conn, thief.Token), thief)
		wantRefusal(t, ask(t, conn, victim.Token), 403, textMismatch)
		wantCredentials(t, ask(t, conn, thief.Token), thief)
	})

	quiet.wasServed(t)
	if after := w.verdicts(t, "refused", "pod_mismatch"); after < before+17 {
		t.Errorf("%g refusals counted as pod_mismatch", after-before)
	}
	w.logs(t, `"reason":"pod_mismatch"`)
	if n := w.calls(victim); n != 1 {
		t.Errorf("EKS Auth was asked %d times for the victim's role, want once, by the victim", n)
	}
	if !strings.Contains(w.agent.Log(), string(victim.UID)) {
		t.Error("the log does not name whose token it was")
	}
}

// Pods that share the host's network namespace are told apart by their cgroups.
func TestPrivilegedHostNetworkPodsAreToldApart(t *testing.T) {
	w := sharedWorld(t)
	pods := []*pod{
		w.newPod(t, testnode.PodConfig{HostNetwork: true}),
		w.newPod(t, testnode.PodConfig{HostNetwork: true}),
		w.newPod(t, testnode.PodConfig{HostNetwork: true, QoS: testnode.Guaranteed}),
	}
	for _, p := range pods {
		c := newClient(t, p.Place())
		for _, of := range pods {
			for _, address := range []string{rig.Host4, rig.Host6} {
				a := c.ask(address, of.Token)
				if of == p {
					wantCredentials(t, a, p)
				} else {
					wantRefusal(t, a, 403, textMismatch)
				}
			}
		}
	}
}

// A container with a writable cgroup mount can make directories of any name
// below its own. They change nothing.
func TestPrivilegedForgedPodDirectory(t *testing.T) {
	w := sharedWorld(t)
	victim, thief := w.newPod(t, testnode.PodConfig{}), w.newPod(t, testnode.PodConfig{})
	dir, container := "pod"+string(victim.UID), victim.Containers()[0].ID
	for _, forged := range []string{
		dir,
		filepath.Join(dir, container),
		filepath.Join("kubepods", "burstable", dir, container),
		filepath.Join("kubepods", dir),
		strings.TrimPrefix(victim.Place().CgroupPath(), "/"),
		"kubepods.slice/kubepods-pod" + strings.ReplaceAll(string(victim.UID), "-", "_") + ".slice",
	} {
		t.Run(forged, func(t *testing.T) {
			c := newClient(t, thief.Place().Nested(forged))
			wantRefusal(t, c.ask(rig.Host4, victim.Token), 403, textMismatch)
			wantRefusal(t, c.ask(rig.Host6, victim.Token), 403, textMismatch)
			wantCredentials(t, c.ask(rig.Host4, thief.Token), thief)
		})
	}
	// Next to the real tree, outside of it: what a process of the host makes is
	// no pod either.
	c := newClient(t, w.Node.HostPlace().Nested(filepath.Join("kubepods", dir, container)))
	wantRefusal(t, c.ask(rig.Host4, victim.Token), 403, textNotPod)
	wantCredentials(t, askFrom(t, victim.Place(), rig.Host4, victim.Token), victim)
}

// A socket that one pod made and another connected belongs to neither.
func TestPrivilegedPassedSocketIsRefused(t *testing.T) {
	w := sharedWorld(t)
	a, b := w.newPod(t, testnode.PodConfig{}), w.newPod(t, testnode.PodConfig{})
	host := w.Node.HostPlace()
	for _, tt := range []struct {
		name               string
		maker, connector   testnode.Place
		family             int
		address, askedHost string
	}{
		{"made in A, connected in B", a.Place(), b.Place(), unix.AF_INET, rig.Host4, rig.Host4},
		{"made in B, connected in A", b.Place(), a.Place(), unix.AF_INET, rig.Host4, rig.Host4},
		{"made in A, connected in B, IPv6", a.Place(), b.Place(), unix.AF_INET6, rig.Host6, rig.Host6},
		{"made in A, connected in B, v4-mapped", a.Place(), b.Place(), unix.AF_INET6, mapped, rig.Host4},
		{"made in A, connected by the host", a.Place(), host, unix.AF_INET, rig.Host4, rig.Host4},
		{"made by the host, connected in A", host, a.Place(), unix.AF_INET, rig.Host4, rig.Host4},
	} {
		t.Run(tt.name, func(t *testing.T) {
			maker, connector := newClient(t, tt.maker), newClient(t, tt.connector)
			for _, token := range []string{a.Token, b.Token} {
				socket, err := maker.proc.Socket(t.Context(), tt.family)
				must(t, err)
				defer socket.Close()
				must(t, connector.proc.Connect(t.Context(), socket, netip.MustParseAddrPort(tt.address)))
				raw, err := net.FileConn(socket)
				must(t, err)
				defer raw.Close()
				wantRefusal(t, ask(t, rig.Over(raw, tt.askedHost), token), 403, textTwoPods)
			}
		})
	}
}

// A pod that connects and hands the connection over has delegated it: it is
// served as the opener, and as nobody else.
func TestPrivilegedHandedOverConnectionIsTheOpeners(t *testing.T) {
	w := sharedWorld(t)
	opener, receiver := w.newPod(t, testnode.PodConfig{}), w.newPod(t, testnode.PodConfig{})
	inOpener, inReceiver := newClient(t, opener.Place()), newClient(t, receiver.Place())
	over := func(token string) (a rig.Answer) {
		raw, err := inOpener.proc.DialContext(t.Context(), "tcp", rig.Host4)
		must(t, err)
		defer raw.Close()
		f, err := raw.(*net.TCPConn).File()
		must(t, err)
		defer f.Close()
		_, err = inReceiver.proc.CallFiles(t.Context(), "askOver", askOverArgs{rig.Host4, token}, []*os.File{f}, &a)
		must(t, err)
		return a
	}
	wantCredentials(t, over(opener.Token), opener)
	wantRefusal(t, over(receiver.Token), 403, textMismatch)
}

// A thief that takes the victim's address, and poisons the node's neighbour
// table so that answers come to it, is still itself.
func TestPrivilegedAddressPoisoningChangesNothing(t *testing.T) {
	w := sharedWorld(t)
	victim, thief := w.newPod(t, testnode.PodConfig{}), w.newPod(t, testnode.PodConfig{})
	wantCredentials(t, askFrom(t, victim.Place(), rig.Host4, victim.Token), victim)

	address := &netlink.Addr{IPNet: &net.IPNet{IP: victim.IPv4.AsSlice(), Mask: net.CIDRMask(32, 32)}}
	var mac net.HardwareAddr
	must(t, thief.Netns().Do(func() error {
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		mac = eth0.Attrs().HardwareAddr
		return netlink.AddrAdd(eth0, address)
	}))
	neighbour := func(change func(*netlink.Neigh) error) {
		must(t, w.Node.Do(func() error {
			bridge, err := netlink.LinkByName("cni0")
			if err != nil {
				return err
			}
			return change(&netlink.Neigh{LinkIndex: bridge.Attrs().Index, IP: victim.IPv4.AsSlice(), State: netlink.NUD_PERMANENT, HardwareAddr: mac})
		}))
	}
	neighbour(netlink.NeighSet)

	c := newClient(t, thief.Place())
	from := func(token string) rig.Answer {
		files, err := c.proc.CallFiles(t.Context(), "dialFrom",
			dialFromArgs{netip.AddrPortFrom(victim.IPv4, 0), netip.MustParseAddrPort(rig.Host4)}, nil, nil)
		must(t, err)
		defer files[0].Close()
		raw, err := net.FileConn(files[0])
		must(t, err)
		defer raw.Close()
		if got := raw.LocalAddr().(*net.TCPAddr).AddrPort().Addr(); got != victim.IPv4 {
			t.Fatalf("the thief connected from %s, not from the victim's address", got)
		}
		return ask(t, rig.Over(raw, rig.Host4), token)
	}
	wantRefusal(t, from(victim.Token), 403, textMismatch)
	wantCredentials(t, from(thief.Token), thief)

	// The thief's address first: it would answer when the node asks anew.
	must(t, thief.Netns().Do(func() error {
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.AddrDel(eth0, address)
	}))
	neighbour(netlink.NeighDel)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	a, err := rig.Ask(ctx, victim.Place(), rig.Host4, victim.Token)
	must(t, err)
	wantCredentials(t, a, victim)
}

// A pod's own namespaces inside its own (docker in a pod) are unknown to the
// node: accepted as the pod's, and counted.
func TestPrivilegedNestedNetworkNamespaceIsStillThePod(t *testing.T) {
	w := sharedWorld(t)
	outer, other := w.newPod(t, testnode.PodConfig{}), w.newPod(t, testnode.PodConfig{})
	// The namespace of a pod that the node no longer has.
	gone := w.newPod(t, testnode.PodConfig{})
	must(t, gone.DeleteKeepingNetns(t.Context()))
	before := w.metric(t, "latchkey_unknown_netns_total")
	c := newClient(t, outer.Place().InNetns(gone.Netns()))
	wantCredentials(t, c.ask(rig.Host4, outer.Token), outer)
	wantRefusal(t, c.ask(rig.Host4, other.Token), 403, textMismatch)
	if after := w.metric(t, "latchkey_unknown_netns_total"); after != before+2 {
		t.Errorf("%g connections counted as from an unknown network namespace, want 2", after-before)
	}
}
