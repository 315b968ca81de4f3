// SPDX-License-Identifier: Apache-2.0

// Package tokencheck judges service-account tokens for the server: by the keys
// that the token's cluster was registered with, always, and by asking that
// cluster's API server whether the pod still lives (TokenReview), where the
// cluster was registered with a kubeconfig.
//
// The cluster is chosen by whoever calls, never by the token. A token that
// another cluster's key has signed is invalid, whatever its issuer says: all
// clusters made by kubeadm have the same.
package tokencheck

import "time"

// Subject is whom a token speaks for. All of it was signed by the cluster.
type Subject struct {
	Namespace, ServiceAccount string
	// ServiceAccountUID is empty if the token names none.
	ServiceAccountUID string
	PodName, PodUID   string
	// NodeName and NodeUID are empty on tokens of Kubernetes before 1.30; NodeUID
	// may be empty later too.
	NodeName, NodeUID string
	// JTI is the token's own id, for audit; empty on old clusters. Not secret.
	JTI string
	// Expires is claim exp.
	Expires time.Time
}
