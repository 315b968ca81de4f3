// SPDX-License-Identifier: Apache-2.0

package issuer

import (
	"errors"
	"time"
)

// One sentinel per decision, for errors.Is. Every error of Issue is an *Error
// that matches exactly one of them.
var (
	// ErrAccessDenied: the role cannot be assumed, or the cluster may not use it.
	// 400 AccessDeniedException.
	ErrAccessDenied = errors.New("the role may not be assumed")
	// ErrInvalidRequest: STS will never do this as it was asked. 400
	// InvalidRequestException.
	ErrInvalidRequest = errors.New("the session cannot be made")
	// ErrThrottled: too many calls for now. 429 ThrottlingException.
	ErrThrottled = errors.New("STS throttles")
	// ErrUnavailable: nothing is known, or the server's own credentials are at
	// fault. 503 ServiceUnavailableException.
	ErrUnavailable = errors.New("STS is unavailable")
)

// Error says why no credentials were issued.
type Error struct {
	kind    error
	message string
	// Hop is 1 or 2: the call to STS that failed; 0: none was made.
	Hop int
	// Code is STS's error code, empty without one. For metrics and audit.
	Code string
	// STSRequestIDs are those of the calls made, the failed one included if STS
	// gave it one.
	STSRequestIDs []string
	// RetryAfter is how long to wait at least; 0: not known.
	RetryAfter time.Duration
	cause      error
}

// Message is the text for the pod. It never holds STS's own, which names
// principals.
func (e *Error) Message() string { return e.message }

// Error is the text for the log. It may hold STS's own.
func (e *Error) Error() string {
	text := e.kind.Error() + ": " + e.message
	if e.cause != nil {
		text += ": " + e.cause.Error()
	}
	return text
}

// Unwrap gives the cause, for the log only.
func (e *Error) Unwrap() error { return e.cause }

// Is matches the sentinel of the decision.
func (e *Error) Is(target error) bool { return target == e.kind }
