// SPDX-License-Identifier: Apache-2.0

package verdict

import (
	"errors"
	"testing"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

// TestDecideExhaustive walks every combination of mode, finding, ownership,
// pod life, token state and verification, and compares with the table written
// out a second time, in another form, by hand.
func TestDecideExhaustive(t *testing.T) {
	type row struct {
		finding evidence.Finding
		same    bool
		ended   bool
	}
	serve := Verdict{Outcome: Serve, Reason: evidence.ReasonServed}
	// want[row] = enforce, audit, off for an acceptable token.
	want := map[row][3]Verdict{}
	reported := func(r evidence.Reason) Verdict { return Verdict{Serve, r, true} }
	silent := func(r evidence.Reason) Verdict { return Verdict{Serve, r, false} }
	for _, ended := range []bool{false, true} {
		want[row{evidence.FindingPod, false, ended}] = [3]Verdict{{Refuse, evidence.ReasonPodMismatch, false}, reported(evidence.ReasonPodMismatch), silent(evidence.ReasonPodMismatch)}
		for _, same := range []bool{false, true} {
			for _, f := range []evidence.Finding{evidence.FindingNone, 200} {
				want[row{f, same, ended}] = [3]Verdict{{RefuseRetry, evidence.ReasonNoEvidence, false}, reported(evidence.ReasonNoEvidence), silent(evidence.ReasonNoEvidence)}
			}
			want[row{evidence.FindingContradictory, same, ended}] = [3]Verdict{{Refuse, evidence.ReasonTwoPods, false}, reported(evidence.ReasonTwoPods), silent(evidence.ReasonTwoPods)}
			want[row{evidence.FindingNotPod, same, ended}] = [3]Verdict{{Refuse, evidence.ReasonNotPod, false}, reported(evidence.ReasonNotPod), silent(evidence.ReasonNotPod)}
		}
	}
	want[row{evidence.FindingPod, true, false}] = [3]Verdict{serve, serve, serve}
	ended := Verdict{ServeUncached, evidence.ReasonPodEnded, true}
	want[row{evidence.FindingPod, true, true}] = [3]Verdict{{Refuse, evidence.ReasonPodEnded, false}, ended, ended}

	cases := 0
	for r, modes := range want {
		for mode, expected := range modes {
			for _, verified := range []bool{true, false} {
				for _, refused := range []evidence.Reason{"", evidence.ReasonTokenExpired, evidence.ReasonTokenAudience, evidence.ReasonTokenMalformed} {
					in := Input{
						Policy:       Policy{Default: Mode(mode)},
						Attestation:  evidence.Attestation{Finding: r.finding, Pod: "x"},
						PodEnded:     r.ended,
						Token:        evidence.Token{Subject: evidence.Subject{PodUID: "y"}, Verified: verified},
						TokenRefused: refused,
					}
					if r.same {
						in.Token.Subject.PodUID = "x"
					}
					exp := expected
					if refused != "" {
						exp = Verdict{Outcome: RefuseToken, Reason: refused}
					}
					if got := Decide(&in); got != exp {
						t.Errorf("mode %v finding %v same %v ended %v verified %v refused %q: got %+v, want %+v",
							Mode(mode), r.finding, r.same, r.ended, verified, refused, got, exp)
					}
					cases++
				}
			}
		}
	}
	if cases != 5*2*2*3*2*4 {
		t.Fatalf("walked %d cases; the table is not complete", cases)
	}
}

// A finding's own reason is what the person is told.
func TestDecideKeepsTheFindingsReason(t *testing.T) {
	for f, r := range map[evidence.Finding]evidence.Reason{
		evidence.FindingNone:          evidence.ReasonUnresolved,
		evidence.FindingContradictory: evidence.ReasonForeignNetns,
	} {
		in := Input{Attestation: evidence.Attestation{Finding: f, Reason: r}}
		if got := Decide(&in); got.Reason != r || got.Outcome == Serve {
			t.Errorf("%v: got %+v, want reason %s", f, got, r)
		}
		in.Attestation.Reason = evidence.ReasonServed
		if got := Decide(&in); got.Reason == evidence.ReasonServed || got.Outcome >= Serve {
			t.Errorf("%v claiming to be served: got %+v", f, got)
		}
	}
}

func TestDecideEmptyPodsDoNotMatch(t *testing.T) {
	in := Input{Attestation: evidence.Attestation{Finding: evidence.FindingPod}}
	if got := Decide(&in); got.Outcome != Refuse {
		t.Fatalf("empty pod on both sides: got %+v, want refuse", got)
	}
}

// The exception is looked up by the token's namespace, and only once that
// namespace is proven.
func TestModeFor(t *testing.T) {
	p := Policy{Default: Enforce, Namespaces: map[string]Mode{"relaxed": Off, "watched": Audit}}
	for _, c := range []struct {
		namespace string
		verified  bool
		want      Mode
	}{
		{"relaxed", true, Off}, {"watched", true, Audit}, {"other", true, Enforce}, {"", true, Enforce},
		{"relaxed", false, Enforce}, {"watched", false, Enforce},
	} {
		tok := evidence.Token{Subject: evidence.Subject{Namespace: c.namespace}, Verified: c.verified}
		if got := p.ModeFor(&tok); got != c.want {
			t.Errorf("namespace %q verified %v: got %v, want %v", c.namespace, c.verified, got, c.want)
		}
	}
	strict := Policy{Default: Audit, Namespaces: map[string]Mode{"prod": Enforce}}
	tok := evidence.Token{Subject: evidence.Subject{Namespace: "prod"}, Verified: true}
	if got := strict.ModeFor(&tok); got != Enforce {
		t.Errorf("a stricter exception: got %v, want enforce", got)
	}
}

// A pod in a relaxed namespace that presents a token of a strict one is
// refused: it is the strict namespace's role that is at stake.
func TestRelaxedNamespaceCannotUseStolenToken(t *testing.T) {
	in := Input{
		Policy:      Policy{Namespaces: map[string]Mode{"relaxed": Off}},
		Attestation: evidence.Attestation{Finding: evidence.FindingPod, Pod: "thief-in-relaxed"},
		Token:       evidence.Token{Subject: evidence.Subject{PodUID: "victim", Namespace: "prod"}, Verified: true},
	}
	if got := Decide(&in); got.Outcome != Refuse || got.Reason != evidence.ReasonPodMismatch {
		t.Fatalf("got %+v, want refused for pod_mismatch", got)
	}
}

func TestParseMode(t *testing.T) {
	for _, m := range []Mode{Enforce, Audit, Off} {
		if got, err := ParseMode(m.String()); err != nil || got != m {
			t.Errorf("%v: got %v, %v", m, got, err)
		}
	}
	for _, s := range []string{"", "Enforce", "on", "enforce "} {
		if m, err := ParseMode(s); !errors.Is(err, ErrMode) || m != Enforce {
			t.Errorf("%q: got %v, %v, want ErrMode and enforce", s, m, err)
		}
	}
}

func TestZeroValuesRefuse(t *testing.T) {
	if got := Decide(&Input{}); got.Outcome >= RefuseToken || got.Reason == evidence.ReasonServed {
		t.Fatalf("the zero input: got %+v", got)
	}
	if (Verdict{}).Outcome >= Serve {
		t.Fatal("the zero verdict serves")
	}
}

func BenchmarkDecideHit(b *testing.B) {
	in := Input{
		Policy:      Policy{Namespaces: map[string]Mode{"relaxed": Audit}},
		Attestation: evidence.Attestation{Finding: evidence.FindingPod, Pod: "9b2f0e5c-52b2-4a35-8f3f-9c1e2a7c4b11"},
		Token:       evidence.Token{Subject: evidence.Subject{PodUID: "9b2f0e5c-52b2-4a35-8f3f-9c1e2a7c4b11", Namespace: "web"}, Verified: true},
	}
	b.ReportAllocs()
	for b.Loop() {
		if Decide(&in).Outcome != Serve {
			b.Fatal("refused")
		}
	}
}
