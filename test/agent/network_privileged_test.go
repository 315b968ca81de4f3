// SPDX-License-Identifier: Apache-2.0

//go:build linux && privileged

package agent

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/test/rig"
	"github.com/latchkey-dev/latchkey/test/testnode"
)

// network describes the links, addresses, routes and rules of the node.
func (w *world) network(t *testing.T) string {
	t.Helper()
	var lines []string
	must(t, w.Node.Do(func() error {
		links, err := netlink.LinkList()
		if err != nil {
			return err
		}
		for _, l := range links {
			a := l.Attrs()
			lines = append(lines, fmt.Sprintf("link %s %s %q %q", a.Name, l.Type(), a.Alias, a.AltNames))
			addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
			if err != nil {
				return err
			}
			for _, addr := range addrs {
				// A link's own fe80 address comes in its own time.
				if !addr.IP.IsLinkLocalUnicast() || addr.IP.To4() != nil {
					lines = append(lines, fmt.Sprintf("address %s %s %q", a.Name, addr.IPNet, addr.Label))
				}
			}
		}
		for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			routes, err := netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
			if err != nil {
				return err
			}
			for _, r := range routes {
				if r.Dst != nil && !r.Dst.IP.IsLinkLocalUnicast() || r.Dst != nil && r.Dst.IP.To4() != nil {
					lines = append(lines, fmt.Sprintf("route %s %d", r.Dst, r.LinkIndex))
				}
			}
			rules, err := netlink.RuleList(family)
			if err != nil {
				return err
			}
			for _, r := range rules {
				lines = append(lines, "rule "+r.String())
			}
		}
		return nil
	}))
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// listening lists the local ends, as the kernel writes them, of the node's
// listening sockets on a port.
func (w *world) listening(t *testing.T, port uint16) (ends []string) {
	t.Helper()
	must(t, w.Node.Do(func() error {
		for _, file := range []string{"tcp", "tcp6"} {
			f, err := os.Open("/proc/thread-self/net/" + file)
			if err != nil {
				return err
			}
			defer f.Close()
			lines := bufio.NewScanner(f)
			for lines.Scan() {
				fields := strings.Fields(lines.Text())
				const listen = "0A"
				if len(fields) > 3 && fields[3] == listen && strings.HasSuffix(fields[1], fmt.Sprintf(":%04X", port)) {
					ends = append(ends, strings.TrimSuffix(fields[1], fmt.Sprintf(":%04X", port)))
				}
			}
			if err := lines.Err(); err != nil {
				return err
			}
		}
		return nil
	}))
	return ends
}

// The link-local addresses as /proc/net/tcp and tcp6 write them.
const (
	proc4 = "17AAFEA9"
	proc6 = "C20E00FD" + "00000000" + "00000000" + "23000000"
)

// Credentials are offered on the addresses that were named and on no other,
// whatever is written for -b.
func TestPrivilegedBindHosts(t *testing.T) {
	w := newWorld(t, rig.Config{})
	p, host := w.newPod(t, testnode.PodConfig{}), w.newPod(t, testnode.PodConfig{HostNetwork: true})
	inPod, onHost := newClient(t, p.Place()), newClient(t, host.Place())
	for _, tt := range []struct {
		name string
		args []string
		want []string
		warn string
	}{
		{"default", nil, []string{proc4, proc6}, ""},
		{"empty", []string{"-b", ""}, []string{proc4}, "an empty --bind-hosts means 169.254.170.23 only"},
		{"IPv4", []string{"--bind-hosts", "169.254.170.23"}, []string{proc4}, ""},
		{"IPv6", []string{"-b", "[fd00:ec2::23]"}, []string{proc6}, ""},
		{"empty and IPv6", []string{"-b", "", "-b", "fd00:ec2::23"}, []string{proc4, proc6}, "an empty --bind-hosts"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w.start(t, tt.args...)
			got := w.listening(t, 80)
			slices.Sort(got)
			slices.Sort(tt.want)
			if !slices.Equal(got, tt.want) {
				t.Errorf("listening on %q, want %q", got, tt.want)
			}
			if tt.warn != "" && !strings.Contains(w.agent.Log(), tt.warn) {
				t.Errorf("no warning:\n%s", w.agent.Log())
			}
			for proc, address := range map[string]string{proc4: rig.Host4, proc6: rig.Host6} {
				if slices.Contains(tt.want, proc) {
					wantCredentials(t, inPod.ask(address, p.Token), p)
					wantCredentials(t, onHost.ask(address, host.Token), host)
				} else if _, err := onHost.tryDial(address); err == nil {
					t.Errorf("somebody answers on %s", address)
				}
			}
			// Neither the bridge's address nor loopback.
			for _, other := range []string{"10.88.0.1:80", "127.0.0.1:80", "[::1]:80", "[fd00:88::1]:80"} {
				if _, err := onHost.tryDial(other); err == nil {
					t.Errorf("somebody answers on %s", other)
				}
			}
			w.stop(t)
			_, err := w.Cleanup(t.Context())
			must(t, err)
		})
	}
}

func (w *world) disableIPv6(t *testing.T, value string) {
	t.Helper()
	must(t, w.Node.Do(func() error {
		files, err := filepath.Glob("/proc/sys/net/ipv6/conf/*/disable_ipv6")
		for _, f := range files {
			err = errors.Join(err, os.WriteFile(f, []byte(value), 0o644))
		}
		return err
	}))
}

// A node without IPv6 serves IPv4, and IPv6 once it has it.
func TestPrivilegedIPv6DisabledAndEnabledLater(t *testing.T) {
	w := newWorld(t, rig.Config{})
	w.disableIPv6(t, "1")
	a := w.start(t)
	p, host := w.newPod(t, testnode.PodConfig{}), w.newPod(t, testnode.PodConfig{HostNetwork: true})
	inPod, onHost := newClient(t, p.Place()), newClient(t, host.Place())
	wantCredentials(t, inPod.ask(rig.Host4, p.Token), p)
	for family, want := range map[string]float64{"ipv4": 1, "ipv6": 0} {
		if got := w.metric(t, fmt.Sprintf(`latchkey_link_local_present{family=%q}`, family)); got != want {
			t.Errorf("%s is present: %g, want %g", family, got, want)
		}
	}
	ready, err := w.Ready(t.Context())
	must(t, err)
	if !strings.Contains(ready, "degraded: [fd00:ec2::23]:80") {
		t.Errorf("readyz does not say what is missing: %q", ready)
	}
	if !strings.Contains(a.Log(), "IPv6") {
		t.Errorf("the log does not say what is missing:\n%s", a.Log())
	}

	w.disableIPv6(t, "0")
	eventually(t, func() error {
		conn, err := onHost.tryDial(rig.Host6)
		if err != nil {
			return err
		}
		wantCredentials(t, ask(t, conn, host.Token), host)
		return nil
	})
	eventually(t, func() error {
		if w.metric(t, `latchkey_link_local_present{family="ipv6"}`) != 1 {
			return errNotYet
		}
		return nil
	})
	wantRefusal(t, onHost.ask(rig.Host6, p.Token), 403, textMismatch)
	wantCredentials(t, inPod.ask(rig.Host4, p.Token), p)
	w.stop(t)
}

// Addresses that something removes while the agent serves come back.
func TestPrivilegedRemovedAddressesAreRepaired(t *testing.T) {
	w := newWorld(t, rig.Config{})
	w.start(t)
	p := w.newPod(t, testnode.PodConfig{})
	c := newClient(t, p.Place())
	wantCredentials(t, c.ask(rig.Host4, p.Token), p)
	for family, address := range map[string]string{"ipv4": rig.Host4, "ipv6": rig.Host6} {
		t.Run(family, func(t *testing.T) {
			host, _, err := net.SplitHostPort(address)
			must(t, err)
			repairs := fmt.Sprintf(`latchkey_link_local_repairs_total{family=%q}`, family)
			before := w.metric(t, repairs)
			must(t, w.Node.Do(func() error {
				links, err := netlink.LinkList()
				if err != nil {
					return err
				}
				removed := 0
				for _, l := range links {
					addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
					if err != nil {
						return err
					}
					for _, a := range addrs {
						if a.IP.Equal(net.ParseIP(host)) {
							removed++
							if err := netlink.AddrDel(l, &a); err != nil {
								return err
							}
						}
					}
				}
				if removed != 1 {
					return fmt.Errorf("the address was there %d times", removed)
				}
				return nil
			}))
			eventually(t, func() error {
				if w.metric(t, repairs) <= before {
					return errNotYet
				}
				conn, err := c.tryDial(address)
				if err != nil {
					return err
				}
				wantCredentials(t, ask(t, conn, p.Token), p)
				return nil
			})
		})
	}
	w.stop(t)
}

// hold lets this process listen on an address of the node, which it is given if
// need be.
func (w *world) hold(t *testing.T, network, address string) net.Listener {
	t.Helper()
	var ln net.Listener
	must(t, w.Node.Do(func() (err error) {
		lc := net.ListenConfig{}
		lc.SetMultipathTCP(false)
		ln, err = lc.Listen(t.Context(), network, address)
		return err
	}))
	t.Cleanup(func() { ln.Close() })
	return ln
}

// While another process answers on one of the addresses, the agent refuses to
// start, says who could be in the way, and changes nothing.
func TestPrivilegedAddressHeldByAnother(t *testing.T) {
	w := newWorld(t, rig.Config{})
	// As the EKS Pod Identity Agent leaves the node.
	must(t, w.Node.Do(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		for _, cidr := range []string{"169.254.170.23/32", "fd00:ec2::23/128"} {
			a, err := netlink.ParseAddr(cidr)
			if err != nil {
				return err
			}
			a.Flags = unix.IFA_F_NODAD
			if err := netlink.AddrAdd(lo, a); err != nil {
				return err
			}
		}
		return nil
	}))
	before := w.network(t)
	for _, tt := range []struct {
		name             string
		network, address string
		text             string
	}{
		{"another agent on IPv4", "tcp4", "169.254.170.23:80", "another process listens on 169.254.170.23:80"},
		{"another agent on IPv6", "tcp6", "[fd00:ec2::23]:80", "another process listens on [fd00:ec2::23]:80"},
		{"an ingress on every IPv4 address", "tcp4", "0.0.0.0:80", "another process listens on 169.254.170.23:80"},
		{"an ingress on every address", "tcp", "[::]:80", "another process listens on 169.254.170.23:80"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ln := w.hold(t, tt.network, tt.address)
			defer ln.Close()
			a, err := w.LaunchAgent(w.Args()...)
			must(t, err)
			if code := ended(t, a); code != 1 || !strings.Contains(a.Log(), tt.text) || !strings.Contains(a.Log(), "--bind-hosts") {
				t.Errorf("exit status %d, want 1, and %q in:\n%s", code, tt.text, a.Log())
			}
			for at, n := range w.attached(t) {
				if n != 0 {
					t.Errorf("%d programs are attached as %v", n, at)
				}
			}
			if after := w.network(t); after != before {
				t.Errorf("the node's network changed from\n%s\nto\n%s", before, after)
			}
			if _, err := os.Stat(w.Socket()); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the admin socket: %v", err)
			}
		})
	}
	// Once they are gone, the addresses that they left are good.
	w.start(t)
	p := w.newPod(t, testnode.PodConfig{})
	wantCredentials(t, askFrom(t, p.Place(), rig.Host4, p.Token), p)
	wantCredentials(t, askFrom(t, p.Place(), rig.Host6, p.Token), p)
	w.stop(t)
	_, err := w.Cleanup(t.Context())
	must(t, err)
	// What somebody else made is not the agent's to remove.
	if after := w.network(t); !strings.Contains(after, "169.254.170.23/32") || !strings.Contains(after, "fd00:ec2::23/128") {
		t.Errorf("cleanup removed what it had not made:\n%s", after)
	}
}

// Ports for people that are taken cost no pod its credentials.
func TestPrivilegedTakenSidePortsCostNoCredentials(t *testing.T) {
	w := newWorld(t, rig.Config{})
	metrics, probes := w.hold(t, "tcp", ":2705"), w.hold(t, "tcp", "localhost:2703")
	a, err := w.LaunchAgent(w.Args()...)
	must(t, err)
	w.agent = a
	w.logs(t, `"msg":"started"`)
	p := w.newPod(t, testnode.PodConfig{})
	wantCredentials(t, askFrom(t, p.Place(), rig.Host4, p.Token), p)
	w.logs(t, `"endpoint":"metrics"`)
	w.logs(t, `"endpoint":"probes"`)
	metrics.Close()
	probes.Close()
	eventually(t, func() error {
		_, err := w.Ready(t.Context())
		if err != nil {
			return err
		}
		_, err = w.Metrics(t.Context())
		return err
	})
	w.stop(t)
}
