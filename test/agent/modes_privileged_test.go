// SPDX-License-Identifier: Apache-2.0

//go:build linux && privileged

package agent

import (
	"slices"
	"strings"
	"testing"

	"github.com/latchkey-dev/latchkey/test/rig"
	"github.com/latchkey-dev/latchkey/test/standin/tokens"
	"github.com/latchkey-dev/latchkey/test/testnode"
)

// Audit serves what enforce would refuse, and says so; off serves without a
// word. Neither takes a bad token.
func TestPrivilegedWeakerModes(t *testing.T) {
	w := newWorld(t, rig.Config{})
	victim, thief := w.newPod(t, testnode.PodConfig{}), w.newPod(t, testnode.PodConfig{})
	maker := newClient(t, victim.Place())
	for _, mode := range []string{"audit", "off"} {
		t.Run(mode, func(t *testing.T) {
			w.start(t, "--attestation", mode)
			inThief, onHost := newClient(t, thief.Place()), newClient(t, w.Node.HostPlace())
			wantCredentials(t, maker.ask(rig.Host4, victim.Token), victim)
			wantCredentials(t, inThief.ask(rig.Host4, victim.Token), victim)
			wantCredentials(t, onHost.ask(rig.Host4, victim.Token), victim)
			if mode == "audit" {
				w.logs(t, "served, but enforce mode would refuse")
				eventually(t, func() error {
					table, _, _ := w.cli(t, "pods")
					if !strings.Contains(table, "served despite pod_mismatch") {
						return errNotYet
					}
					return nil
				})
			}
			stranger, err := tokens.NewSigner(tokens.Config{Algorithm: "ES256"})
			must(t, err)
			for _, bad := range []string{"", "garbage", stranger.Token(w.Claims(victim.Pod.Pod))} {
				wantRefusal(t, inThief.ask(rig.Host4, bad), 400, "Service account token")
			}
			// A pod that has ended is served from nothing that was kept for it.
			late := w.newPod(t, testnode.PodConfig{})
			kept := newClient(t, late.Place()).dial(rig.Host4)
			wantCredentials(t, ask(t, kept, late.Token), late)
			must(t, late.DeleteKeepingNetns(t.Context()))
			eventually(t, func() error {
				wantCredentials(t, ask(t, kept, late.Token), late)
				if w.verdicts(t, "shadow", "pod_ended") == 0 {
					return errNotYet
				}
				return nil
			})

			want := 1.0
			if mode == "off" {
				want = 0
			}
			for _, reason := range []string{"pod_mismatch", "not_in_pod"} {
				if n := w.verdicts(t, "shadow", reason); n != want {
					t.Errorf("%g answers counted as shadow for %s, want %g", n, reason, want)
				}
				if n := w.verdicts(t, "refused", reason); n != 0 {
					t.Errorf("%g refusals for %s", n, reason)
				}
			}
			table, _, _ := w.cli(t, "status")
			if !strings.Contains(table, mode) {
				t.Errorf("status does not show the mode:\n%s", table)
			}
			w.stop(t)
		})
	}
}

// The mode is that of the namespace whose role is at stake: the token's, once it
// is verified.
func TestPrivilegedModeOfANamespace(t *testing.T) {
	w := newWorld(t, rig.Config{})
	relaxed := w.newPod(t, testnode.PodConfig{Namespace: "relaxed"})
	strict := w.newPod(t, testnode.PodConfig{Namespace: "strict"})
	stranger, err := tokens.NewSigner(tokens.Config{Algorithm: "ES256"})
	must(t, err)
	for _, tt := range []struct {
		name string
		args []string
	}{
		{"one is off", []string{"--attestation-namespace", "relaxed=off"}},
		{"one is audited", []string{"--attestation-namespace", "relaxed=audit"}},
		{"one is enforced", []string{"--attestation", "off", "--attestation-namespace", "strict=enforce"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w.start(t, tt.args...)
			inRelaxed, inStrict, onHost := newClient(t, relaxed.Place()), newClient(t, strict.Place()), newClient(t, w.Node.HostPlace())
			wantCredentials(t, inRelaxed.ask(rig.Host4, relaxed.Token), relaxed)
			wantCredentials(t, inStrict.ask(rig.Host4, strict.Token), strict)
			wantCredentials(t, inStrict.ask(rig.Host4, relaxed.Token), relaxed)
			wantCredentials(t, onHost.ask(rig.Host4, relaxed.Token), relaxed)
			wantRefusal(t, inRelaxed.ask(rig.Host4, strict.Token), 403, textMismatch)
			wantRefusal(t, onHost.ask(rig.Host4, strict.Token), 403, textNotPod)
			forged := stranger.Token(tokens.Claims{Namespace: "relaxed", ServiceAccount: relaxed.ServiceAccount, PodUID: string(relaxed.UID)})
			wantRefusal(t, inStrict.ask(rig.Host4, forged), 400, "Service account token cannot be verified")
			out, _, _ := w.cli(t, "status", "-o", "json")
			if _, exception, _ := strings.Cut(tt.args[len(tt.args)-1], "="); !strings.Contains(out, exception) {
				t.Errorf("status does not show the exception:\n%s", out)
			}
			w.stop(t)
		})
	}
}

// Without keys EKS Auth alone tells a genuine token. The pod is checked all the
// same, and everybody can see that the claim is weaker.
func TestPrivilegedByTokenMode(t *testing.T) {
	w := newWorld(t, rig.Config{})
	args := slices.Clone(w.Args())
	for _, flag := range []string{"--jwks", "--issuer"} {
		i := slices.Index(args, flag)
		args = slices.Delete(args, i, i+2)
	}
	w.startExactly(t, args...)
	victim, thief := w.newPod(t, testnode.PodConfig{}), w.newPod(t, testnode.PodConfig{})
	inVictim, inThief := newClient(t, victim.Place()), newClient(t, thief.Place())
	for range 3 {
		wantCredentials(t, inVictim.ask(rig.Host4, victim.Token), victim)
	}
	if n := w.calls(victim); n != 1 {
		t.Errorf("EKS Auth was asked %d times for one token, want once", n)
	}
	wantRefusal(t, inThief.ask(rig.Host4, victim.Token), 403, textMismatch)
	wantRefusal(t, askFrom(t, w.Node.HostPlace(), rig.Host4, victim.Token), 403, textNotPod)
	old := victim.Token
	must(t, w.Rotate(victim.Pod))
	wantCredentials(t, inVictim.ask(rig.Host4, victim.Token), victim)
	wantCredentials(t, inVictim.ask(rig.Host4, old), victim)
	if n := w.calls(victim); n != 2 {
		t.Errorf("EKS Auth was asked %d times for two tokens, want twice", n)
	}
	// The thief's own pod and the victim's service account, signed by nobody.
	stranger, err := tokens.NewSigner(tokens.Config{Algorithm: "ES256"})
	must(t, err)
	claims := w.Claims(victim.Pod.Pod)
	claims.Pod, claims.PodUID = thief.Name, string(thief.UID)
	wantRefusal(t, inThief.ask(rig.Host4, stranger.Token(claims)), 400, "InvalidTokenException")
	wantRefusal(t, inThief.ask(rig.Host4, "garbage"), 400, "Service account token cannot be parsed")
	wantCredentials(t, inThief.ask(rig.Host4, thief.Token), thief)

	if n := w.metric(t, "latchkey_token_keys"); n != 0 {
		t.Errorf("latchkey_token_keys %g", n)
	}
	if n := w.metric(t, "latchkey_by_token_mode"); n != 1 {
		t.Errorf("latchkey_by_token_mode %g", n)
	}
	if out, _, _ := w.cli(t, "status"); !strings.Contains(out, "EKS Auth alone judges tokens") {
		t.Errorf("status does not show it:\n%s", out)
	}
	w.logs(t, "no key to check tokens with")
	w.stop(t)
}

// What makes no sense is refused before anything is done, with the flag's name.
func TestPrivilegedSettingsThatCannotWork(t *testing.T) {
	w := newWorld(t, rig.Config{})
	without := func(flag string) []string {
		args := slices.Clone(w.Args())
		i := slices.Index(args, flag)
		return slices.Delete(args, i, i+2)
	}
	before := w.network(t)
	for _, tt := range []struct {
		name string
		args []string
		text string
	}{
		{"an unknown mode", w.Args("--attestation", "maybe"), "maybe"},
		{"an unknown mode of a namespace", w.Args("--attestation-namespace", "web=maybe"), "maybe"},
		{"no namespace", w.Args("--attestation-namespace", "off"), "NAMESPACE=MODE"},
		{"a namespace twice", w.Args("--attestation-namespace", "web=off", "--attestation-namespace", "web=audit"), "twice"},
		{"every IPv4 address", w.Args("-b", "0.0.0.0"), "every address"},
		{"every IPv6 address", w.Args("-b", "[::]"), "every address"},
		{"every address, v4-mapped", w.Args("-b", "::ffff:0.0.0.0"), "every address"},
		{"every address among others", w.Args("-b", "169.254.170.23", "-b", "0.0.0.0"), "every address"},
		{"a name to serve on", w.Args("-b", "credentials.example"), "IP address"},
		{"a multicast address", w.Args("-b", "224.0.0.1"), "unicast"},
		{"port 0", w.Args("-p", "0"), "--port"},
		{"port 65536", w.Args("-p", "65536"), "65536"},
		{"no cluster", without("--cluster-name"), "--cluster-name"},
		{"keys without issuer", without("--issuer"), "--issuer"},
		{"a relative path", w.Args("--admin-socket", "admin.sock"), "--admin-socket"},
		{"an unknown flag", w.Args("--attest"), "--attest"},
		{"an argument", w.Args("now"), "now"},
		{"an unknown verbosity", w.Args("-v", "loud"), "loud"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			stdout, stderr, code := runProgram(t, w.Node.AgentPlace().WithEnv("AWS_REGION="+rig.Region), append([]string{agentProgram}, tt.args...)...)
			if code != 2 || !strings.Contains(stderr, tt.text) || strings.Count(stderr, "\n") > 3 {
				t.Errorf("exit status %d, want 2, and %q in a line or two: %s%s", code, tt.text, stdout, stderr)
			}
		})
	}
	if after := w.network(t); after != before {
		t.Errorf("the node's network changed from\n%s\nto\n%s", before, after)
	}
	for at, n := range w.attached(t) {
		if n != 0 {
			t.Errorf("%d programs are attached as %v", n, at)
		}
	}
}
