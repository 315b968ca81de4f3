// SPDX-License-Identifier: Apache-2.0

// Package wire is what the stand-ins for AWS services have in common below their
// operations: listening, the SigV4 signatures of requests, answers that go
// wrong, and the form of the credentials that they make up.
//
// It shares no code with what is tested: signatures are judged from the SigV4
// documents, neither with the SDK nor with the server's verifier.
package wire
