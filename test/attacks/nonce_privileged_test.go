// SPDX-License-Identifier: Apache-2.0

//go:build linux && privileged

package attacks

import (
	"crypto/rand"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// User-space TCP: a handshake out of packets that the thief's pod makes by hand
// (CAP_NET_RAW), from an address of the pod network that nobody has, so that no
// kernel resets it. No hook has seen a connect, so there is no evidence.
func TestAttackUserSpaceTCP(t *testing.T) {
	as(t, somebody, NeverReachesTheAgent, func(a *attack) {
		_, err := a.handMade(handMadeArgs{})
		a.unreached(err, unix.EPERM)
	})
	as(t, root, Refused, func(a *attack) {
		for _, token := range []string{a.victim.Token, a.thief.Token} {
			c, err := a.handMade(handMadeArgs{Token: token})
			must(t, err)
			a.refused(c, noEvidence)
		}
		a.wantEvent("no_option")
		a.served(a.victim)
	})
}

// The same with guessed nonces.
func TestAttackGuessedNonce(t *testing.T) {
	as(t, root, Refused, func(a *attack) {
		for i := range 5 {
			nonce := make([]byte, 8)
			rand.Read(nonce)
			c, err := a.handMade(handMadeArgs{Nonce: nonce, Src: netip.AddrPortFrom(a.spare(), uint16(41000+i))})
			must(t, err)
			a.refused(c, noEvidence)
		}
		if n := a.event("nonce_unknown"); n != 5 {
			t.Errorf("%d unknown nonces were counted, want 5", n)
		}
		a.served(a.victim)
	})
}

// The addresses alone: while a handshake of the victim is under way, the thief
// completes one from the victim's address and port, without the nonce or with
// a guessed one. Who comes from there is not therefore the victim.
func TestAttackAddressesAlone(t *testing.T) {
	as(t, root, Refused, func(a *attack) {
		i := a.interceptHandshake()
		a.refused(a.addressesAlone(i, nil), noEvidence)
		a.refused(a.addressesAlone(i, []byte("01234567")), noEvidence)
		a.wantEvent("no_option")
		a.wantEvent("nonce_unknown")
		i.letGo()
		if c := i.victimAsks(); c.account() != a.victim.account {
			t.Errorf("the victim got %v over the connection it had begun", c)
		}
		a.served(a.victim)
	})
}

func (a *attack) addressesAlone(i *intercepting, nonce []byte) catch {
	a.Helper()
	c, err := a.handMade(handMadeArgs{Src: i.seen.Src, Poison: true, Nonce: nonce})
	must(a, err)
	return c
}

// A stolen nonce: the thief has put itself between victim and gateway by lying
// about the gateway's address, keeps the victim's SYN, and uses its nonce, which
// is still good, on a connection from an address of its own. The ends of the two
// connections differ. The victim's own connection works as soon as it gets
// through.
func TestAttackStolenNonce(t *testing.T) {
	as(t, root, Refused, func(a *attack) {
		i := a.interceptHandshake()
		c, err := a.handMade(handMadeArgs{Nonce: i.seen.Nonce})
		must(t, err)
		a.refused(c, noEvidence)
		a.wantEvent("peer_mismatch")
		i.letGo()
		if c := i.victimAsks(); c.account() != a.victim.account {
			t.Errorf("the victim got %v over the connection it had begun", c)
		}
		a.served(a.victim)
	})
}

// The same from the victim's own address and port. It works, and is out of
// scope, because the thief is on the path of the victim's packets, which are
// plain HTTP: it could as well let the victim connect and read the credentials.
func TestAttackStolenNonceOnThePath(t *testing.T) {
	as(t, root, OutOfScope, func(a *attack) {
		i := a.interceptHandshake()
		c, err := a.handMade(handMadeArgs{Src: i.seen.Src, Poison: true, Nonce: i.seen.Nonce})
		must(t, err)
		a.robbed(c)
		i.letGo()
		// What the victim had begun comes without its nonce and is told to come
		// again.
		a.counted(i.victimAsks(), noEvidence)
		a.served(a.victim)
	})
}

// A replayed nonce: a spy has heard the nonce of a connection of the victim that
// was served and closed. The thief takes the victim's address over and plays the
// same handshake again, from the same port; then from its own address.
func TestAttackReplayedNonce(t *testing.T) {
	as(t, root, Refused, func(a *attack) {
		a.refused(a.replay(), noEvidence)
		a.wantEvent("nonce_unknown")
		a.served(a.victim)
	})
}

// A nonce used up elsewhere: the thief plays a handshake that it intercepted to
// a listener of its own, on the agent's address in a private network namespace.
// Evidence goes to the agent's listener only, so the nonce stays good and the
// victim's connection works as soon as it gets through.
func TestAttackNonceUsedUpElsewhere(t *testing.T) {
	as(t, netAdmin, NeverReachesTheAgent, func(a *attack) {
		if c := a.usedUp(); c.account() != a.victim.account {
			t.Errorf("the victim got %v over the connection it had begun", c)
		}
		a.seen[NeverReachesTheAgent] = true
		a.served(a.victim)
	})
}
