// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"cmp"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/latchkey-dev/latchkey/pkg/adminapi"
	"github.com/latchkey-dev/latchkey/pkg/audit"
	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

// denial is what is served, and what only the search needs.
type denial struct {
	adminapi.Denial
	// taskPod is the pod of the connecting task where the evidence names no
	// single pod.
	taskPod string
}

// denials lists the recent refusals, oldest first.
func (a *Agent) denials() ([]denial, error) {
	list := a.Denials()
	slices.Reverse(list)
	out := make([]denial, 0, len(list))
	for i := range list {
		out = append(out, a.denial(&list[i]))
	}
	return out, nil
}

func (a *Agent) denial(n *audit.Denial) denial {
	conn := &n.Attestation.Connection
	d := denial{taskPod: string(n.Task.Pod), Denial: adminapi.Denial{
		Seq: n.Seq, First: n.First, Last: n.Last, Count: n.Count,
		Status: n.Status, Reason: string(n.Reason), Shadow: n.Shadow, Finding: n.Attestation.Finding.String(),
		PodUID: string(n.Attestation.Pod), Namespace: n.Task.Namespace, Pod: n.Task.PodName,
		Cgroup: n.Task.Cgroup, PID: conn.TGID, Process: n.Task.Process, UID: conn.UID, Detail: n.Cause,
		TokenJTI: n.Claimed.JTI, TokenPod: n.Claimed.PodName, TokenPodUID: string(n.Claimed.Subject.PodUID),
		TokenNamespace: n.Claimed.Subject.Namespace, TokenServiceAccount: n.Claimed.Subject.ServiceAccount,
		TokenVerified: n.Claimed.Verified, TokenExpires: timeOrNil(n.Claimed.Expiry),
	}}
	if n.Peer.IsValid() {
		d.Peer = n.Peer.String()
	}
	// Where the evidence names no single pod, the connecting task's is named, as
	// the container runtime's names are.
	if pod := cmp.Or(n.Attestation.Pod, n.Task.Pod); pod != "" {
		if last, ok := a.observer.last(pod); ok && last.Token.Subject.PodUID == pod {
			s := last.Token.Subject
			d.Namespace, d.ServiceAccount, d.Pod = s.Namespace, s.ServiceAccount, last.Token.PodName
		}
	}
	if u := upstreamErrorText(string(n.Reason), n.Cause); u.Status != 0 || isUpstream(n.Reason) {
		d.Upstream = u
	}
	return d
}

func isUpstream(r evidence.Reason) bool {
	switch r {
	case evidence.ReasonUpstreamDenied, evidence.ReasonUpstreamNotFound, evidence.ReasonUpstreamToken,
		evidence.ReasonUpstreamThrottled, evidence.ReasonUpstreamUnavailable, evidence.ReasonUpstreamInvalid:
		return true
	}
	return false
}

// answered is how pkg/eksauth words an answer that is not a success
// (APIError.Error), wherever it stands in the text of an error around it.
var answered = regexp.MustCompile(`EKS Auth answered (\d+) \[([^\]]*)\]: \(([^)]*)\): (.*), fault: (?:client|server)`)

// upstreamErrorText takes an error apart that was kept as its text.
func upstreamErrorText(reason, text string) *adminapi.UpstreamError {
	// What the endpoint puts before a failure without an answer says nothing.
	text = strings.TrimPrefix(text, "upstream answered 0 []: (): : ")
	out := &adminapi.UpstreamError{Reason: reason, Message: text}
	if m := answered.FindStringSubmatch(text); m != nil {
		out.Status, _ = strconv.Atoi(m[1])
		out.RequestID, out.Code, out.Message = m[2], m[3], m[4]
	}
	return out
}

func (a *Agent) denialsAfter(text string) (adminapi.Denials, error) {
	var after uint64
	if text != "" {
		var err error
		if after, err = strconv.ParseUint(text, 10, 64); err != nil {
			return adminapi.Denials{}, fmt.Errorf("%w: after=%q: give a sequence number", adminapi.ErrInvalid, text)
		}
	}
	all, err := a.denials()
	out := adminapi.Denials{Denials: []adminapi.Denial{}, Seq: after}
	for _, d := range all {
		if d.Seq > after {
			out.Denials = append(out.Denials, d.Denial)
			out.Seq = max(out.Seq, d.Seq)
		}
	}
	return out, err
}
