// SPDX-License-Identifier: Apache-2.0

//go:build linux && privileged

package attacks

import (
	"fmt"
	"net/http"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/test/testnode"
)

// Handshakes without end, from nested cgroups and network namespaces, while one
// of the victim's is under way. The bound is the pod's own: what leaves early is
// the flooder's.
func TestAttackHandshakeFlood(t *testing.T) {
	both(t, Refused, func(a *attack) {
		if c := a.flooded(); c.account() != a.victim.account {
			t.Errorf("the victim got %v over the connection it had begun", c)
		}
		if a.event("evicted") > 0 {
			a.seen[Refused] = true
		}
		a.served(a.victim)
	})
}

// Connections that are completed and kept, more than a pod may have. The excess
// is turned away; the victim and the neighbour do not notice.
func TestAttackConnectionFlood(t *testing.T) {
	both(t, Refused, func(a *attack) {
		thief := a.thiefs()
		a.eventually(func() error {
			// Silent connections are closed after a while, so on a slow machine
			// there may be fewer by now: then more of them.
			a.thiefs().do("hold", holdArgs{To: agent4, N: 300, Established: true}, nil)
			c := thief.ask(askOptions{}, a.thief.Token)
			// Being told takes a descriptor, so only so many are told at a time.
			if c.Status == http.StatusTooManyRequests || c.Errno == unix.ECONNRESET {
				return nil
			}
			return fmt.Errorf("one more connection got %v, want 429", c)
		})
		a.counted(catch{Status: http.StatusTooManyRequests}, refusal{http.StatusTooManyRequests, "rate_limited"})
		a.seen[Refused] = true
		a.served(a.victim)
	})
}

// SYNs from addresses that nobody has, made by hand: the listener's queue fills,
// and the kernel goes over to SYN cookies.
func TestAttackSYNFlood(t *testing.T) {
	as(t, root, NeverReachesTheAgent, func(a *attack) {
		var sent int
		a.thiefs().do("flood", floodArgs{"eth0", a.thief.IPv4, a.gateway(), 5000}, &sent)
		if sent > 0 {
			a.seen[NeverReachesTheAgent] = true
		}
		for range 5 {
			a.served(a.victim)
		}
	})
}

// Map pressure: connections from more cgroups than are remembered per pod, and
// from several network namespaces. Each is the thief's, and costs only the thief.
func TestAttackMapPressure(t *testing.T) {
	as(t, root, ServedAsTruePod, func(a *attack) {
		thief := a.thiefs()
		for i := range 80 {
			place := a.thief.Place().Nested(fmt.Sprintf("n-%d/%s", i, a.victim.UID))
			_, err := place.CgroupID()
			must(t, err)
			thief.do("join cgroup", place.CgroupDir(), nil)
			if c := thief.ask(askOptions{}, a.victim.Token); c.Status != podMismatch.status {
				t.Fatalf("from cgroup %d: %v", i, c)
			}
		}
		for i := range 4 {
			ns, err := a.Node.AddIsolated(testnode.IsolatedConfig{
				Addresses: []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 98, byte(i), 1}), 24)}, NodeRoutes: true,
			})
			must(t, err)
			inner := a.spawn(a.thief.Place().InNetns(ns))
			a.trueThief(func(token string) catch { return inner.ask(askOptions{}, token) })
		}
		a.served(a.victim)
	})
}

// TCP Fast Open: the client wants its request to travel in the SYN. The agent's
// listeners do not offer that, so it goes as always.
func TestAttackFastOpen(t *testing.T) {
	for _, mode := range []string{"connect", "sendto"} {
		as(t, user{"by " + mode, 0}, ServedAsTruePod, func(a *attack) {
			thief := a.thiefs()
			for range 2 { // a cookie is used from the second time on
				a.trueThief(func(token string) catch { return thief.ask(askOptions{FastOpen: mode}, token) })
			}
			a.served(a.victim)
		})
	}
}

// TCP Fast Open where the administrator has it offered by every listener of the
// node (tcp_fastopen, bit 0x400). Cookie and nonce do not fit into one SYN, so
// the agent takes the offer back for its own listeners: the connection opens as
// any other.
func TestAttackFastOpenOffered(t *testing.T) {
	offered := func(t *testing.T, node, client string, want Outcome, f func(a *attack, ask func(token string) catch)) {
		s := newScene(t, "")
		t.Cleanup(func() {
			if err := s.end(); err != nil {
				t.Error(err)
			}
		})
		must(t, s.Node.Do(func() error { return writeSysctl("tcp_fastopen", node) }))
		s.start(t)
		a := on(t, s, somebody, want)
		sysctl(a, a.thief.Netns(), "tcp_fastopen", client)
		thief := a.thiefs()
		f(a, func(token string) catch {
			c := thief.ask(askOptions{FastOpen: "sendto"}, token)
			if c.SynData {
				t.Errorf("the agent took a request from a SYN (%v)", c)
			}
			return c
		})
		a.served(a.victim)
	}
	t.Run("with_cookie", func(t *testing.T) {
		offered(t, "1027", "1", ServedAsTruePod, func(a *attack, ask func(string) catch) { a.trueThief(ask) })
	})
	t.Run("without_cookie", func(t *testing.T) {
		offered(t, "1539", "5", ServedAsTruePod, func(a *attack, ask func(string) catch) { a.trueThief(ask) })
	})
}
