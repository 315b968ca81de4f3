// SPDX-License-Identifier: Apache-2.0

// Package explain turns what is known of one pod, process or connection into
// the steps from a process to its credentials, the cause of what is wrong, and
// what to do about it. It is pure: it asks nobody, and everything that it
// concludes from is in its input.
//
// A step says what was found, where it is from and how old it is. The first
// step that has failed is the cause; what lies behind it was not reached. What
// happened before the pod was last served is history, and no cause.
package explain

import (
	"time"

	"github.com/latchkey-dev/latchkey/pkg/adminapi"
)

// Input is all that a conclusion may rest on. Nil and zero mean not known.
type Input struct {
	// Query is what was asked, and Now the time of the question.
	Query string
	Now   time.Time
	// Facts are the agent's; nil if it could not be asked, and AgentError is
	// then why.
	Facts      *adminapi.Facts
	AgentError string
	// Node is what was seen without the agent.
	Node Node
	// Hooks are the places that Latchkey's programs are attached at, as they
	// are for this pod or, without one, for the node; HooksError is why they are
	// not known.
	Hooks      []Hook
	HooksError string
	// Injection is what the pod's processes were given; nil if none could be
	// looked at.
	Injection *Injection
	// Reach is what became of connections from the pod's network namespace.
	Reach []Reach
	// ReachError is why no connection could be tried from there; empty if none
	// was to be.
	ReachError string
	// Probe is what became of a connection from within the pod's cgroup too;
	// nil if none was tried.
	Probe *Reach
	// Upstream is what became of asking EKS Auth for nothing.
	Upstream *adminapi.Reached
}

// Node is what a look at the node itself shows.
type Node struct {
	// CgroupV2 is where cgroup v2 is mounted, empty if it is not, and CgroupV1
	// tells that v1 is.
	CgroupV2 string
	CgroupV1 bool
	// MissingFeatures of the kernel, and why the rest is not known.
	MissingFeatures []string
	// MissingAddresses are those of the agent that no link of the node has.
	MissingAddresses []string
	// PortHolder is who listens on a credential address, if it is not the
	// agent: "nginx (1234) on 0.0.0.0:80".
	PortHolder string
}

// Hook is one kind of attachment.
type Hook struct {
	// Name is connect4, connect6 or sockops.
	Name string `json:"name"`
	// Programs are in the order in which they run.
	Programs []Program `json:"programs"`
}

// Program is one program at a hook.
type Program struct {
	ID   uint32 `json:"id"`
	Name string `json:"name"`
	// Ours: Latchkey's.
	Ours bool `json:"latchkey"`
	// Cgroup is where it is attached, below the mount.
	Cgroup string `json:"cgroup,omitempty"`
	// Link is the id of the link that holds it; 0 for none.
	Link uint32 `json:"link,omitempty"`
	// Loaded is when, zero if not known.
	Loaded time.Time `json:"loaded,omitzero"`
}

// Injection is what the pod-identity webhook gives a pod, as one of its
// processes has it.
type Injection struct {
	// PID is the process.
	PID int
	// URI and TokenFile are AWS_CONTAINER_CREDENTIALS_FULL_URI and
	// AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE; empty if unset in all processes.
	URI, TokenFile string
	// Other is a setting that SDKs prefer, such as AWS_ACCESS_KEY_ID.
	Other string
	// Proxy is a proxy variable that is not kept from the address by NO_PROXY.
	Proxy string
	// TokenError is why the token file could not be read.
	TokenError string
	// Token is what the agent makes of the token in it; nil if it was not asked.
	Token *adminapi.TokenCheck
	// Claims are what the token says.
	Claims *Claims
}

// Reach is what became of one connection.
type Reach struct {
	// Address that was tried, "169.254.170.23:80".
	Address string `json:"address"`
	// Status is the HTTP status of GET /, 404 from an agent; 0 without one.
	Status int `json:"status,omitempty"`
	// Error says why there was none.
	Error string `json:"error,omitempty"`
	// Local is the connection's own end.
	Local string `json:"local,omitempty"`
	// Attested is whether the agent saw the connection as the pod's; set for a
	// Probe only.
	Attested string `json:"attested,omitempty"`
}

// State is a step's.
type State string

// The states of steps.
const (
	// OK: as it should be.
	OK State = "ok"
	// Warn: worth a look, and not the cause.
	Warn State = "warning"
	// Fail: this is where the way ends.
	Fail State = "failed"
	// Unknown: nothing is known of it, for lack of evidence.
	Unknown State = "unknown"
	// NotReached: behind the step that failed.
	NotReached State = "not_reached"
)

// Step is one part of the way from a process to its credentials.
type Step struct {
	// Name is one of agent, kernel, clock, process, cgroup, pod, address, hooks,
	// reach, connection, token, verdict, association, role, credentials.
	Name  string `json:"name"`
	State State  `json:"state"`
	// Text says what was found.
	Text string `json:"text"`
	// Source is where that is from.
	Source string `json:"source,omitempty"`
	// At is when it was so; zero: now.
	At time.Time `json:"at,omitzero"`
}

// Code names a cause, for scripts; it never changes its text.
type Code string

// The causes.
const (
	None               Code = "none"
	NeverAsked         Code = "never_asked"
	NoAgent            Code = "no_agent"
	AgentSilent        Code = "agent_not_answering"
	NotPermitted       Code = "not_permitted"
	CgroupV1           Code = "cgroup_v1_only"
	NoKernel           Code = "kernel_cannot_attest"
	AddressGone        Code = "address_gone"
	NotServing         Code = "address_not_served"
	Unreachable        Code = "address_unreachable"
	NotAttached        Code = "programs_not_attached"
	Shadowed           Code = "hook_shadowed"
	NotInPod           Code = "not_in_pod"
	NodeProxy          Code = "node_level_proxy"
	PodEnded           Code = "pod_ended"
	NotInjected        Code = "not_injected"
	OtherCredentials   Code = "other_credentials"
	Proxied            Code = "http_proxy"
	TokenFile          Code = "token_file"
	TokenMissing       Code = "token_missing"
	TokenExpired       Code = "token_expired"
	TokenAudience      Code = "token_audience"
	TokenKey           Code = "token_unknown_key"
	TokenSignature     Code = "token_signature"
	TokenIssuer        Code = "token_issuer"
	TokenUnbound       Code = "token_unbound"
	TokenMalformed     Code = "token_malformed"
	TokenNotYetValid   Code = "token_not_yet_valid"
	KeysUnavailable    Code = "keys_unavailable"
	OtherPodsToken     Code = "another_pods_token"
	AgentLate          Code = "agent_late"
	NoEvidence         Code = "no_evidence"
	CgroupGone         Code = "cgroup_gone"
	TwoPods            Code = "two_pods"
	ForeignNetns       Code = "foreign_netns"
	RateLimited        Code = "rate_limited"
	WrongHost          Code = "wrong_host"
	NoAssociation      Code = "no_association"
	UpstreamToken      Code = "upstream_refuses_token"
	UpstreamDenied     Code = "upstream_denied"
	UpstreamThrottled  Code = "upstream_throttled"
	UpstreamDown       Code = "upstream_unavailable"
	UpstreamInvalid    Code = "upstream_invalid"
	NodeCredentials    Code = "node_credentials"
	ClockSkew          Code = "clock_skew"
	OtherRefusal       Code = "refused"
	RenewalFailing     Code = "renewal_failing"
	NotAttesting       Code = "not_attesting"
	ConnectionUnjudged Code = "connection_unjudged"
)

// Cause is why there are no credentials, and what to do.
type Cause struct {
	Code Code `json:"code"`
	// Text names the cause in a sentence.
	Text string `json:"text"`
	// Fix says what to do; empty if there is nothing.
	Fix []string `json:"fix,omitempty"`
}

// Broken tells whether the cause keeps credentials from the pod.
func (c Cause) Broken() bool {
	return c.Code != None && c.Code != NeverAsked && c.Code != RenewalFailing && c.Code != NotAttesting
}

// Explanation is the answer to one query.
type Explanation struct {
	Query string `json:"query"`
	// About names what the query led to: "pod web/api (UID)".
	About string `json:"about"`
	Steps []Step `json:"steps"`
	Cause Cause  `json:"cause"`
}
