// SPDX-License-Identifier: Apache-2.0

package sts

import (
	"net/http"
	"time"
)

// Kind says in which way an answer goes wrong.
type Kind string

// The kinds of fault.
const (
	// None answers as it should; with Delay or Hold it does so late.
	None Kind = ""
	// Refuse answers Status with Code and Message, or with Body as it is (as a
	// proxy in between would).
	Refuse Kind = "refuse"
	// Body answers 200 with Body instead of the answer.
	Body Kind = "body"
	// Truncated answers 200 and ends the connection in the middle of the body.
	Truncated Kind = "truncated"
	// Reset cuts the connection instead of answering.
	Reset Kind = "reset"
	// NoCredentials and NoUser leave these out of the answer.
	NoCredentials Kind = "no_credentials"
	NoUser        Kind = "no_user"
	// Expired answers credentials that have expired a minute ago.
	Expired Kind = "expired"
)

// Fault shapes the answers of the calls that take it.
type Fault struct {
	Kind Kind
	// RoleARN, if set, is the role that calls must ask for to take it.
	RoleARN string
	// Times is how many calls take it; 0 means all, until ClearFaults.
	Times int
	// Delay is waited before anything is answered.
	Delay time.Duration
	// Hold, if not nil, keeps the answer back until it is closed. A channel that
	// nobody closes is a service that hangs.
	Hold <-chan struct{}
	// Status, Code and Message are Refuse's.
	Status        int
	Code, Message string
	// Body is Body's, or Refuse's.
	Body []byte
}

// Refusals are faults as the service answers them, by name. Each message names a
// principal, as the service's do, so that a test can look for it where it must
// not be.
func Refusals() map[string]Fault {
	principal := "arn:aws:sts::999988887777:assumed-role/secret-broker-principal/i-0abc"
	r := func(status int, code, message string) Fault {
		return Fault{Kind: Refuse, Status: status, Code: code, Message: message + " (" + principal + ")"}
	}
	return map[string]Fault{
		"throttle":              r(http.StatusBadRequest, "Throttling", "Rate exceeded"),
		"too many requests":     r(http.StatusTooManyRequests, "TooManyRequestsException", "slow down"),
		"internal failure":      r(http.StatusInternalServerError, "InternalFailure", "an internal error"),
		"service unavailable":   r(http.StatusServiceUnavailable, "ServiceUnavailable", "try again"),
		"access denied":         r(http.StatusForbidden, "AccessDenied", "is not authorized to perform: sts:AssumeRole"),
		"packed policy":         r(http.StatusBadRequest, "PackedPolicyTooLarge", "Packed policy consumes 107% of allotted space"),
		"malformed policy":      r(http.StatusBadRequest, "MalformedPolicyDocument", "Syntax errors in policy."),
		"region disabled":       r(http.StatusForbidden, "RegionDisabledException", "STS is not activated in this region"),
		"validation":            r(http.StatusBadRequest, "ValidationError", "1 validation error detected"),
		"duration":              r(http.StatusBadRequest, "ValidationError", "The requested DurationSeconds exceeds the MaxSessionDuration set for this role."),
		"expired token":         r(http.StatusForbidden, "ExpiredToken", "The security token included in the request is expired"),
		"unknown caller":        r(http.StatusForbidden, "InvalidClientTokenId", "The security token included in the request is invalid."),
		"signature":             r(http.StatusForbidden, "SignatureDoesNotMatch", "The request signature we calculated does not match"),
		"action not supported":  r(http.StatusBadRequest, "InvalidAction", "Could not find operation AssumeRole"),
		"an unknown refusal":    r(http.StatusBadRequest, "SomethingNew", "no words"),
		"denied by a proxy":     {Kind: Refuse, Status: http.StatusForbidden, Body: []byte("<html><body>Forbidden</body></html>")},
		"denied without a body": {Kind: Refuse, Status: http.StatusForbidden, Body: []byte{}},
	}
}

// Inject adds a fault behind those there are: each call takes the first one
// that is for it and not used up.
func (s *Server) Inject(f Fault) { s.faults.Add(f, f.Times) }

// ClearFaults makes the stand-in answer properly again.
func (s *Server) ClearFaults() { s.faults.Clear() }

// nextFault takes the fault for one call.
func (s *Server) nextFault(call Call) Fault {
	return s.faults.Next(func(f Fault) bool { return f.RoleARN == "" || f.RoleARN == call.RoleARN })
}
