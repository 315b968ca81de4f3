// SPDX-License-Identifier: Apache-2.0

// Package server puts the cluster half together: the store, the index that
// follows it, the APIs, the users, the issuer; and what people need of it: TLS,
// an audit log, metrics, probes, and the admin socket that the CLI speaks over.
//
// What is started, in this order: the store, the configured clusters, the
// index, and only when that is whole the listener. A server that cannot say
// what an association is answers nobody, because "there is none" makes agents
// drop credentials that are good.
package server
