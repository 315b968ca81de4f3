// SPDX-License-Identifier: Apache-2.0

// Package eksauth is a stand-in for Amazon EKS Auth, for tests and the demo.
// It is not the service: the credentials it hands out are marked as a
// stand-in's and open nothing.
//
// It speaks the service's wire (rest-json, API version 2023-11-26, operation
// AssumeRoleForPodIdentity) and judges what it is sent by itself, with no code
// of the agent's: that the request is signed for service eks-auth, and that the
// token is one that the cluster's keys signed, for this audience, for a pod,
// within its time. A test can therefore trust its yes and its no.
//
// Faults can be switched on to see what a client makes of them: refusals,
// delays, dropped connections, answers that are garbage, incomplete, expired or
// someone else's. It counts and records calls, never their tokens.
package eksauth
