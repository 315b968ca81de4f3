// SPDX-License-Identifier: Apache-2.0

//go:build linux && privileged

package attacks

import (
	"bytes"
	"math"
	"os"
	"strings"
	"testing"

	"github.com/latchkey-dev/latchkey/test/testnode"
)

// Each protection turned off, in a build of the agent for this purpose: then the
// attack that it stops must succeed. If one of these fails, the protection is
// tested by nothing.
func TestProof(t *testing.T) {
	for _, p := range []struct {
		off string
		who user
		// pods are what victim and thief are.
		pods testnode.PodConfig
		// attack gives what the attacker gets.
		attack func(*attack) catch
	}{
		{"nonce", root, testnode.PodConfig{}, func(a *attack) catch {
			i := a.interceptHandshake()
			return a.addressesAlone(i, nil)
		}},
		{"peer_tuple", root, testnode.PodConfig{}, func(a *attack) catch {
			i := a.interceptHandshake()
			c, err := a.handMade(handMadeArgs{Nonce: i.seen.Nonce})
			must(a, err)
			return c
		}},
		{"consume_once", root, testnode.PodConfig{}, func(a *attack) catch { return a.replay() }},
		// In one network namespace, which says nothing of who is who.
		{"second_cgroup", somebody, testnode.PodConfig{HostNetwork: true}, func(a *attack) catch { return a.connectedByVictim() }},
		{"netns", root, testnode.PodConfig{}, func(a *attack) catch {
			c, err := a.fromVictimsCgroup()
			must(a, err)
			return c
		}},
		// The same: the forged pod's namespace would be the thief's pod's.
		{"outermost_pod", somebody, testnode.PodConfig{HostNetwork: true}, func(a *attack) catch { return a.fromForgedDirectory("") }},
		{"pod_liveness", somebody, testnode.PodConfig{}, func(a *attack) catch {
			_, after := a.overEndedPods()
			return after
		}},
	} {
		t.Run(p.off, func(t *testing.T) {
			a := onWith(t, ownNode(t, p.off), p.who, OutOfScope, p.pods, p.pods)
			c := p.attack(a)
			if c.account() != a.victim.account {
				t.Errorf("without the protection %q the attack got %v; want the victim's credentials", p.off, c)
			}
			a.seen[OutOfScope] = true
		})
	}
}

// The protections of the victim's own service, turned off: then the victim is
// refused.
func TestProofOfService(t *testing.T) {
	for _, p := range []struct {
		off string
		who user
		// attack gives what the victim gets.
		attack func(*attack) catch
	}{
		{"pod_bound", somebody, (*attack).flooded},
		{"agent_netns", netAdmin, (*attack).usedUp},
	} {
		t.Run(p.off, func(t *testing.T) {
			a := on(t, ownNode(t, p.off), p.who, OutOfScope)
			// Nothing protects the neighbour, either.
			a.failures = math.MaxInt
			a.counted(p.attack(a), noEvidence)
			a.seen[OutOfScope] = true
		})
	}
}

// The agent that ships has no switch: the variable does nothing, and its name is
// not in it.
func TestShippedAgentHasNoSwitch(t *testing.T) {
	const variable = "LATCHKEY_" + "PROOF_OFF"
	for proof, want := range map[bool]bool{false: false, true: true} {
		b, err := os.ReadFile(agentProgram(t, proof))
		must(t, err)
		if got := bytes.Contains(b, []byte(variable)); got != want {
			t.Errorf("proof build %t: it knows %s: %t", proof, variable, got)
		}
	}
	s := newScene(t, "")
	t.Cleanup(func() {
		if err := s.end(); err != nil {
			t.Error(err)
		}
	})
	s.start(t, variable+"=outermost_pod")
	a := on(t, s, somebody, Refused)
	a.refused(a.fromForgedDirectory(""), podMismatch)
	if strings.Contains(s.agent.Log(), "PROOF BUILD") {
		t.Error("the shipped agent calls itself a proof build")
	}
}
