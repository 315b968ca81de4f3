// SPDX-License-Identifier: Apache-2.0

package eksapi

import (
	"maps"
	"slices"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/association"
	"github.com/latchkey-dev/latchkey/pkg/issuer"
	"github.com/latchkey-dev/latchkey/pkg/permission"
	"github.com/latchkey-dev/latchkey/pkg/sigv4"
	"github.com/latchkey-dev/latchkey/pkg/strangers"
	"github.com/latchkey-dev/latchkey/pkg/tokencheck"
)

// Outcomes of a Record.
const (
	// OutcomeDone: the change was made, the credentials were issued.
	OutcomeDone = "done"
	// OutcomeRefused: 4xx.
	OutcomeRefused = "refused"
	// OutcomeFailed: 5xx. A change may have been made all the same.
	OutcomeFailed = "failed"
)

// Types of a Record.
const (
	// TypeChange: create, update, delete, tag, untag.
	TypeChange = "change"
	// TypeExchange: AssumeRoleForPodIdentity.
	TypeExchange = "exchange"
	// TypeUnrecorded sums up refusals of callers that had not proved who they are,
	// of which there were too many to record each.
	TypeUnrecorded = "unrecorded"
)

// Record is what became of one change or exchange. It holds no secret and no
// token. What was not known when the call ended is empty.
type Record struct {
	Time      time.Time `json:"time"`
	Type      string    `json:"type"`
	Operation string    `json:"operation,omitempty"`
	RequestID string    `json:"request_id,omitempty"`
	Outcome   string    `json:"outcome"`
	Status    int       `json:"status,omitempty"`
	// Code and Message are what the client was told, Reason the decision behind
	// it, Error the cause as the server knows it.
	Code    string `json:"code,omitempty"`
	Message string `json:"message,omitempty"`
	Reason  string `json:"reason,omitempty"`
	Error   string `json:"error,omitempty"`
	// Caller has proved to be that. ClaimedAccessKeyID is what a request named
	// that did not prove it.
	Caller             string           `json:"caller,omitempty"`
	CallerNode         *permission.Node `json:"caller_node,omitempty"`
	AccessKeyID        string           `json:"access_key_id,omitempty"`
	ClaimedAccessKeyID string           `json:"claimed_access_key_id,omitempty"`
	// Peer is the other end of the connection, which may be a proxy.
	Peer string `json:"peer,omitempty"`

	Cluster        string `json:"cluster,omitempty"`
	Namespace      string `json:"namespace,omitempty"`
	ServiceAccount string `json:"service_account,omitempty"`
	AssociationID  string `json:"association_id,omitempty"`
	AssociationARN string `json:"association_arn,omitempty"`
	RoleARN        string `json:"role_arn,omitempty"`
	TargetRoleARN  string `json:"target_role_arn,omitempty"`
	// State is what a change led to, Previous what an update or delete found.
	State    *State   `json:"state,omitempty"`
	Previous *State   `json:"previous,omitempty"`
	TagKeys  []string `json:"tag_keys,omitempty"`

	// Of exchanges, what the verified token says.
	ServiceAccountUID string `json:"service_account_uid,omitempty"`
	Pod               string `json:"pod,omitempty"`
	PodUID            string `json:"pod_uid,omitempty"`
	Node              string `json:"node,omitempty"`
	JTI               string `json:"jti,omitempty"`
	// Of exchanges, what was issued.
	AssumedRoleARN    string     `json:"assumed_role_arn,omitempty"`
	SessionName       string     `json:"session_name,omitempty"`
	IssuedAccessKeyID string     `json:"issued_access_key_id,omitempty"`
	Expires           *time.Time `json:"expires,omitempty"`
	STSRequestIDs     []string   `json:"sts_request_ids,omitempty"`
	STSCode           string     `json:"sts_code,omitempty"`

	// Latency is in microseconds.
	Latency int64 `json:"latency_us"`

	// Of TypeUnrecorded alone: how many there were, from Since to Time; Peer is the
	// last one's.
	Unrecorded int64      `json:"unrecorded,omitempty"`
	Since      *time.Time `json:"since,omitempty"`
}

// State is what of an association a change can change.
type State struct {
	RoleARN            string `json:"role_arn"`
	TargetRoleARN      string `json:"target_role_arn,omitempty"`
	DisableSessionTags bool   `json:"disable_session_tags,omitempty"`
	Policy             string `json:"policy,omitempty"`
}

func state(a association.Association) *State {
	return &State{a.RoleARN, a.TargetRoleARN, a.DisableSessionTags, a.Policy}
}

func (r *Record) association(a association.Association) {
	r.Cluster, r.Namespace, r.ServiceAccount = a.Cluster, a.Namespace, a.ServiceAccount
	r.AssociationID, r.AssociationARN, r.RoleARN, r.TargetRoleARN = a.ID, a.ARN, a.RoleARN, a.TargetRoleARN
	r.State = state(a)
}

func (r *Record) subject(s tokencheck.Subject) {
	r.Namespace, r.ServiceAccount, r.ServiceAccountUID = s.Namespace, s.ServiceAccount, s.ServiceAccountUID
	r.Pod, r.PodUID, r.Node, r.JTI = s.PodName, s.PodUID, s.NodeName, s.JTI
}

func (r *Record) issued(c issuer.Credentials) {
	r.AssumedRoleARN, r.SessionName, r.IssuedAccessKeyID = c.AssumedRoleARN, c.SessionName, c.AccessKeyID
	r.STSRequestIDs = c.STSRequestIDs
	expires := c.Expires
	r.Expires = &expires
}

// audit hands the record over; f is nil for success.
func (c *call) audit(f *fault) {
	if !c.route.op.audited || c.Audit == nil || c.recorded {
		return
	}
	c.recorded = true
	if !c.verified && !c.Strangers.Record(c.r.RemoteAddr) {
		c.unrecorded = true
		return
	}
	r := &c.record
	r.Time, r.Operation, r.RequestID, r.Peer = c.start, c.route.op.name, c.id, c.r.RemoteAddr
	r.Type = TypeChange
	if c.route.op.auth {
		r.Type, r.State = TypeExchange, nil
	}
	if r.Cluster == "" {
		r.Cluster = clip(c.route.cluster)
	}
	if r.AssociationID == "" {
		r.AssociationID = clip(c.route.id)
	}
	if c.verified {
		r.Caller, r.CallerNode = c.caller.Name, c.caller.Node
	} else {
		r.ClaimedAccessKeyID = sigv4.AccessKeyID(c.r)
	}
	r.Outcome, r.Status = OutcomeDone, 200
	if f != nil {
		r.Outcome, r.Status, r.Code, r.Message = OutcomeRefused, f.status, f.code, f.message
		if f.status >= 500 {
			r.Outcome = OutcomeFailed
		}
		if f.cause != nil {
			r.Error = f.cause.Error()
		}
		// What was meant to be is not what is.
		r.State = nil
	}
	r.Namespace, r.ServiceAccount = clip(r.Namespace), clip(r.ServiceAccount)
	r.RoleARN, r.TargetRoleARN = clip(r.RoleARN), clip(r.TargetRoleARN)
	r.AssociationARN, r.Message, r.Error = clip(r.AssociationARN), clip(r.Message), clip(r.Error)
	if !c.verified {
		// Nothing else has been learnt of the request by then.
		for _, text := range []*string{&r.Cluster, &r.AssociationID, &r.ClaimedAccessKeyID, &r.Message, &r.Error} {
			*text = strangers.Text(*text)
		}
	}
	r.Latency = c.Now().Sub(c.start).Microseconds()
	c.Audit(*r)
}

// summarise records what was left out, when it is time. Requests do it, so the
// last of a flood are summed up when somebody asks next.
func (a *api) summarise() {
	if a.Audit == nil {
		return
	}
	if left, ok := a.Strangers.Summary(); ok {
		a.Audit(Record{Time: a.Now(), Type: TypeUnrecorded, Outcome: OutcomeRefused, Peer: left.Peer, Unrecorded: left.Count, Since: &left.Since})
	}
}

// maxText bounds each text of a record that a client may have chosen, in bytes.
const maxText = 2048

func clip(s string) string {
	if len(s) > maxText {
		return s[:maxText]
	}
	return s
}

// bounded keeps what could be the keys of tags.
func bounded(keys []string) []string {
	out := make([]string, 0, min(len(keys), association.MaxTags))
	for _, k := range keys[:min(len(keys), association.MaxTags)] {
		out = append(out, clip(k))
	}
	slices.Sort(out)
	return out
}

func keysOf(tags map[string]string) []string { return bounded(slices.Collect(maps.Keys(tags))) }
