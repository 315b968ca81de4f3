// SPDX-License-Identifier: Apache-2.0

// Package verdict joins one token and one piece of kernel evidence into one
// immutable decision. It is pure: no clock, no I/O, no state, no allocation.
//
// It is the smallest and most reviewed package of Latchkey. Who may change
// what a pod is given changes the table in docs/architecture.md ("Verdict")
// and the exhaustive test beside this file in the same commit.
package verdict

import (
	"errors"
	"fmt"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

// Mode says what happens when the kernel's evidence does not support a token.
type Mode uint8

const (
	// Enforce refuses. It is the zero value: forgetting to set a mode cannot
	// weaken anything.
	Enforce Mode = iota
	// Audit serves, counts and logs what Enforce would have refused.
	Audit
	// Off serves without looking at the evidence.
	Off
)

// ErrMode: the text is none of "enforce", "audit" and "off".
var ErrMode = errors.New("unknown attestation mode")

// ParseMode reads the flag's value; the error wraps ErrMode.
func ParseMode(s string) (Mode, error) {
	switch s {
	case "enforce":
		return Enforce, nil
	case "audit":
		return Audit, nil
	case "off":
		return Off, nil
	}
	return Enforce, fmt.Errorf("%w %q: use enforce, audit or off", ErrMode, s)
}

// String is the flag's value.
func (m Mode) String() string {
	switch m {
	case Enforce:
		return "enforce"
	case Audit:
		return "audit"
	case Off:
		return "off"
	}
	return fmt.Sprintf("mode_%d", uint8(m))
}

// Policy holds the node's mode and its exceptions. The zero value enforces.
// It is not changed after it is given to Decide.
type Policy struct {
	Default Mode
	// Namespaces overrides Default by the namespace of the token.
	Namespaces map[string]Mode
}

// ModeFor returns the mode that applies to a token. The token's namespace
// counts, because it is that namespace's role that is at stake: were it the
// connecting pod's, a pod in a relaxed namespace could use any stolen token.
// An unverified token has not proven its namespace, so no exception applies.
func (p Policy) ModeFor(t *evidence.Token) Mode {
	if !t.Verified {
		return p.Default
	}
	if m, ok := p.Namespaces[t.Subject.Namespace]; ok {
		return m
	}
	return p.Default
}

// Input is all that a decision depends on.
type Input struct {
	Policy      Policy
	Attestation evidence.Attestation
	// PodEnded: the attested pod's cgroup is gone. Read at each request, as a
	// kept-alive connection can outlive the pod that opened it.
	PodEnded bool
	Token    evidence.Token
	// TokenRefused is why the token is not acceptable, empty if it is.
	TokenRefused evidence.Reason
}

// Outcome is what to do with the request.
type Outcome uint8

const (
	// RefuseRetry: uncertain. Answer 503, close the connection (it can never
	// gain evidence) and let the client open another.
	RefuseRetry Outcome = iota
	// Refuse: certain. Answer 403.
	Refuse
	// RefuseToken: the token decides; answer what the contract says of it.
	RefuseToken
	// Serve from the cache or from upstream.
	Serve
	// ServeUncached: ask upstream and do not keep the answer, because the pod
	// that the answer would be kept for has ended.
	ServeUncached
)

// String is the value used in logs and metrics.
func (o Outcome) String() string {
	switch o {
	case RefuseRetry:
		return "refuse_retry"
	case Refuse:
		return "refuse"
	case RefuseToken:
		return "refuse_token"
	case Serve:
		return "serve"
	case ServeUncached:
		return "serve_uncached"
	}
	return fmt.Sprintf("outcome_%d", uint8(o))
}

// Verdict is a decision. The zero value refuses.
type Verdict struct {
	Outcome Outcome
	// Reason is ReasonServed, or what Enforce refuses for; it is also set when
	// the request is served only because the mode is weaker.
	Reason evidence.Reason
	// Report: served although Enforce would refuse, and the mode (Audit) asks
	// for it to be counted and logged. Also set in mode Off for an ended pod.
	Report bool
}

// Decide applies the table of the design:
//
//	evidence       token          enforce  audit            off
//	pod X          of pod X       serve    serve            serve
//	pod X          of pod Y       403      serve, report    serve
//	none           valid          503      serve, report    serve
//	contradictory  valid          403      serve, report    serve
//	no pod         valid          403      serve, report    serve
//	X, but ended   of pod X       403      uncached, report uncached, report
//	any            unacceptable   4xx      4xx              4xx
func Decide(in *Input) Verdict {
	// The token first: it is judged alike in every mode, and until it is
	// accepted nothing it claims (its namespace, its pod) may select anything.
	if in.TokenRefused != "" {
		return Verdict{Outcome: RefuseToken, Reason: in.TokenRefused}
	}
	mode := in.Policy.ModeFor(&in.Token)
	refusal, outcome := judge(in)
	if refusal == evidence.ReasonServed {
		return Verdict{Outcome: Serve, Reason: refusal}
	}
	switch mode {
	case Audit:
		if refusal == evidence.ReasonPodEnded {
			return Verdict{Outcome: ServeUncached, Reason: refusal, Report: true}
		}
		return Verdict{Outcome: Serve, Reason: refusal, Report: true}
	case Off:
		if refusal == evidence.ReasonPodEnded {
			return Verdict{Outcome: ServeUncached, Reason: refusal, Report: true}
		}
		return Verdict{Outcome: Serve, Reason: refusal}
	}
	return Verdict{Outcome: outcome, Reason: refusal}
}

// judge says what Enforce does. Every way through it that does not compare two
// pod UIDs and find them equal refuses.
func judge(in *Input) (evidence.Reason, Outcome) {
	a := &in.Attestation
	switch a.Finding {
	case evidence.FindingPod:
		// Two unset UIDs are equal: neither side may be empty, or a token
		// without a pod would match an attestation without one.
		if a.Pod == "" || in.Token.Subject.PodUID == "" || a.Pod != in.Token.Subject.PodUID {
			return evidence.ReasonPodMismatch, Refuse
		}
		if in.PodEnded {
			return evidence.ReasonPodEnded, Refuse
		}
		return evidence.ReasonServed, Serve
	case evidence.FindingContradictory:
		return reasonOr(a.Reason, evidence.ReasonTwoPods), Refuse
	case evidence.FindingNotPod:
		return reasonOr(a.Reason, evidence.ReasonNotPod), Refuse
	}
	// FindingNone and any value this version does not know.
	return reasonOr(a.Reason, evidence.ReasonNoEvidence), RefuseRetry
}

// reasonOr keeps a finding's own reason. ReasonServed is not one: a finding
// that is no pod must never read as served.
func reasonOr(r, otherwise evidence.Reason) evidence.Reason {
	if r == "" || r == evidence.ReasonServed {
		return otherwise
	}
	return r
}
