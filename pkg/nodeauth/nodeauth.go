// SPDX-License-Identifier: Apache-2.0

// Package nodeauth lets an agent prove which node it runs on. The proof is the
// agent's own service-account token, which the kubelet projects with an audience
// of its own and which names the node; the server trades it for signing keys
// (SigV4) of at most an hour that are tied to that node.
//
// This package is the agent's side, a Provider of credentials, and what both
// sides must agree on. The server's side is pkg/nodeauth/exchange: it is apart
// because agents need none of it.
//
// The exchange is one request, and neither it nor its answer is ever signed: the
// token is the proof.
//
//	POST /latchkey/v1/clusters/{name}/node-credentials   {"token":"…"}
//	200 {"node":{"name":"…","uid":"…"},
//	     "credentials":{"accessKeyId":"…","secretAccessKey":"…","sessionToken":"…","expiration":1700884334}}
//
// Errors have the form of the EKS APIs: a status, header x-amzn-ErrorType, and
// {"message":"…"}. 4xx says that this token will never do; everything else says
// nothing.
package nodeauth

import "net/url"

// Audience is the one audience that an agent's token must have. A token for
// anything else, a pod's for credentials above all, is refused; and this one is
// refused where a pod's is asked for.
const Audience = "latchkey-server"

// AccessKeyPrefix begins every access key id that the exchange gives out, so
// that they cannot be taken for a cloud's.
const AccessKeyPrefix = "LKNODE"

// Path is the path of the exchange for a cluster, escaped.
func Path(cluster string) string {
	return "/latchkey/v1/clusters/" + url.PathEscape(cluster) + "/node-credentials"
}

// Request is the body of the exchange.
type Request struct {
	Token string `json:"token"`
}

// Answer is the body of a successful exchange.
type Answer struct {
	Node        AnswerNode        `json:"node"`
	Credentials AnswerCredentials `json:"credentials"`
}

// AnswerNode is the node that the keys are tied to. UID is empty if the token
// named none.
type AnswerNode struct {
	Name string `json:"name"`
	UID  string `json:"uid,omitempty"`
}

// AnswerCredentials are the keys. Expiration is in seconds since 1970.
type AnswerCredentials struct {
	AccessKeyID     string `json:"accessKeyId"`
	SecretAccessKey string `json:"secretAccessKey"`
	SessionToken    string `json:"sessionToken"`
	Expiration      int64  `json:"expiration"`
}
