// SPDX-License-Identifier: Apache-2.0

package tokencheck

import (
	"errors"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
	"github.com/latchkey-dev/latchkey/pkg/satoken"
)

// One sentinel per decision, for errors.Is. Every error of Check is an *Error
// that matches exactly one of them.
var (
	// ErrInvalid: the token is not good, and will not become so. 400
	// InvalidTokenException.
	ErrInvalid = errors.New("token is not valid")
	// ErrExpired: it was good once, or claims to have been. 400
	// ExpiredTokenException.
	ErrExpired = errors.New("token is expired")
	// ErrUnavailable: nothing is known about the token. 503, never 4xx: clients
	// drop good credentials on the latter.
	ErrUnavailable = errors.New("token cannot be checked now")
)

// Reasons of this package, beside those of pkg/satoken.
const (
	// ReasonNotAlive: the cluster's API server does not accept the token: its pod,
	// service account or node is gone.
	ReasonNotAlive evidence.Reason = "token_not_alive"
	// ReasonReviewMismatch: the API server took the token for somebody else's.
	ReasonReviewMismatch evidence.Reason = "review_mismatch"
	// ReasonReviewUnavailable: the API server was asked, and nothing is known.
	ReasonReviewUnavailable evidence.Reason = "review_unavailable"
	// ReasonMisconfigured: what the cluster was registered with cannot be used.
	ReasonMisconfigured evidence.Reason = "cluster_misconfigured"
)

// Error says why a token was not accepted. It never holds any part of the token.
type Error struct {
	sentinel error
	reason   evidence.Reason
	message  string
	cause    error
}

// Reason is the decision, for metrics and audit.
func (e *Error) Reason() evidence.Reason { return e.reason }

// Message is the text for the client. It names no host and no file.
func (e *Error) Message() string { return e.message }

// Error is the text for the log.
func (e *Error) Error() string {
	text := e.sentinel.Error() + ": "
	var token *satoken.Error
	switch {
	case e.cause == nil:
		return text + string(e.reason)
	case errors.As(e.cause, &token): // it begins with the reason itself
		return text + e.cause.Error()
	}
	return text + string(e.reason) + ": " + e.cause.Error()
}

// Unwrap gives the cause, which is for the log only.
func (e *Error) Unwrap() error { return e.cause }

// Is matches the sentinel of the decision.
func (e *Error) Is(target error) bool { return target == e.sentinel }
