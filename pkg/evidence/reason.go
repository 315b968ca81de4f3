// SPDX-License-Identifier: Apache-2.0

package evidence

// Reason names one decision about a request. It is the value of metric labels
// and of the audit's "reason", so a Reason never changes its text.
type Reason string

// Reasons of the kernel's side (pkg/attribution, pkg/pods, pkg/verdict).
const (
	// ReasonServed: evidence and token agree.
	ReasonServed Reason = "served"
	// ReasonNoEvidence: no hook saw this connection being opened: it is older
	// than the agent's programs, came from another host, or was made by a
	// user-space TCP stack.
	ReasonNoEvidence Reason = "no_evidence"
	// ReasonUnresolved: the cgroup recorded is gone, so its pod is not known.
	ReasonUnresolved Reason = "cgroup_gone"
	// ReasonNotPod: opened by a process outside every pod.
	ReasonNotPod Reason = "not_in_pod"
	// ReasonTwoPods: the socket was made in one pod and connected by another.
	ReasonTwoPods Reason = "two_pods"
	// ReasonForeignNetns: opened in the network namespace of another pod, or of
	// the host by a pod that is not hostNetwork.
	ReasonForeignNetns Reason = "foreign_netns"
	// ReasonPodMismatch: the token is another pod's. The stolen token.
	ReasonPodMismatch Reason = "pod_mismatch"
	// ReasonPodEnded: the pod that opened the connection is gone.
	ReasonPodEnded Reason = "pod_ended"
)

// Reasons of the token's side (pkg/satoken).
const (
	ReasonTokenMissing     Reason = "token_missing"
	ReasonTokenTooLarge    Reason = "token_too_large"
	ReasonTokenMalformed   Reason = "token_malformed"
	ReasonTokenAlgorithm   Reason = "token_algorithm"
	ReasonTokenUnknownKey  Reason = "token_unknown_key"
	ReasonTokenSignature   Reason = "token_signature"
	ReasonTokenIssuer      Reason = "token_issuer"
	ReasonTokenAudience    Reason = "token_audience"
	ReasonTokenExpired     Reason = "token_expired"
	ReasonTokenNotYetValid Reason = "token_not_yet_valid"
	// ReasonTokenUnbound: the token is not bound to a pod.
	ReasonTokenUnbound Reason = "token_unbound"
	// ReasonKeysUnavailable: no verification key could be had; nothing is known
	// about the token, so the client is asked to come again.
	ReasonKeysUnavailable Reason = "keys_unavailable"
)

// Reasons of the endpoint (pkg/credserver) and the upstream (pkg/credcache,
// pkg/eksauth).
const (
	ReasonHost                Reason = "invalid_host"
	ReasonRateLimited         Reason = "rate_limited"
	ReasonUpstreamDenied      Reason = "upstream_denied"
	ReasonUpstreamNotFound    Reason = "upstream_not_found"
	ReasonUpstreamToken       Reason = "upstream_token"
	ReasonUpstreamThrottled   Reason = "upstream_throttled"
	ReasonUpstreamUnavailable Reason = "upstream_unavailable"
	ReasonUpstreamInvalid     Reason = "upstream_invalid"
	ReasonStopping            Reason = "stopping"
)
