// SPDX-License-Identifier: Apache-2.0

// Package sts is a stand-in for AWS STS, for tests and the demo. It is not the
// service: the credentials it hands out are marked as a stand-in's and open
// nothing but itself.
//
// It speaks the service's wire (query protocol, version 2011-06-15; AssumeRole
// and GetCallerIdentity) and judges what it is sent by itself, with no code of
// the server's: the SigV4 signature of a caller it knows or of a session it has
// made, the limits of the service's model, the role's trust, how long sessions
// may be, and what sessions inherit. A test can therefore trust its yes and its
// no.
//
// Faults can be switched on to see what a client makes of them. It records
// calls, never their secrets.
package sts
