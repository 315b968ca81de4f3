// SPDX-License-Identifier: Apache-2.0

package satoken

import (
	"errors"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

// One sentinel per decision, for errors.Is. Every error of Verify and
// ParseUnverified is an *Error that matches exactly one of them.
var (
	// ErrMissing: no token at all.
	ErrMissing = errors.New("token is missing")
	// ErrTooLarge: longer than MaxTokenSize.
	ErrTooLarge = errors.New("token is too large")
	// ErrMalformed: not the compact JWS of a service account token.
	ErrMalformed = errors.New("token is malformed")
	// ErrAlgorithm: the signature algorithm is not allowed, or not the key's.
	ErrAlgorithm = errors.New("token algorithm is not allowed")
	// ErrUnknownKey: a key source that was asked just now has no such key.
	ErrUnknownKey = errors.New("token key is not known")
	// ErrSignature: the key did not make this signature.
	ErrSignature = errors.New("token signature is not valid")
	// ErrIssuer: issued by somebody else than the cluster.
	ErrIssuer = errors.New("token issuer is not accepted")
	// ErrAudience: meant for somebody else.
	ErrAudience = errors.New("token audience is not accepted")
	// ErrExpired: claim exp has passed.
	ErrExpired = errors.New("token is expired")
	// ErrNotYetValid: claim nbf or iat lies in the future.
	ErrNotYetValid = errors.New("token is not valid yet")
	// ErrUnbound: the token is not bound to a pod.
	ErrUnbound = errors.New("token is not bound to a pod")
	// ErrKeysUnavailable: the keys could not be had, so nothing is known about
	// the token. The only retriable one: answer 503, never 4xx.
	ErrKeysUnavailable = errors.New("verification keys are unavailable")
)

// Error says why a token was refused. It never holds any part of the token.
type Error struct {
	reason evidence.Reason
	// detail is our own constant words, fit for the client.
	detail string
	// cause is for the log only: it may name hosts and files.
	cause error
}

func refuse(reason evidence.Reason, detail string) *Error {
	return &Error{reason: reason, detail: detail}
}

// Reason is the decision, for metrics and audit.
func (e *Error) Reason() evidence.Reason { return e.reason }

// Retriable reports that the same token may be accepted later: nothing is wrong
// with it as far as anybody knows. All other errors are final.
func (e *Error) Retriable() bool { return e.reason == evidence.ReasonKeysUnavailable }

// Message is the text for the client. Where the EKS Pod Identity Agent checks
// the same thing, it is that agent's text.
func (e *Error) Message() string {
	switch e.reason {
	case evidence.ReasonTokenMissing:
		return "Service account token cannot be empty"
	case evidence.ReasonTokenTooLarge, evidence.ReasonTokenMalformed, evidence.ReasonTokenAlgorithm:
		return "Service account token cannot be parsed: " + e.detail
	case evidence.ReasonTokenUnknownKey, evidence.ReasonTokenSignature, evidence.ReasonKeysUnavailable:
		return "Service account token cannot be verified: " + e.detail
	}
	return "Service account token failed basic claim validations: " + e.detail
}

// Error is the text for the log.
func (e *Error) Error() string {
	text := string(e.reason) + ": " + e.detail
	if e.cause != nil {
		text += ": " + e.cause.Error()
	}
	return text
}

// Unwrap gives what made the keys unavailable.
func (e *Error) Unwrap() error { return e.cause }

// Is matches the sentinel of the decision.
func (e *Error) Is(target error) bool { return target != nil && target == sentinel(e.reason) }

func sentinel(reason evidence.Reason) error {
	switch reason {
	case evidence.ReasonTokenMissing:
		return ErrMissing
	case evidence.ReasonTokenTooLarge:
		return ErrTooLarge
	case evidence.ReasonTokenMalformed:
		return ErrMalformed
	case evidence.ReasonTokenAlgorithm:
		return ErrAlgorithm
	case evidence.ReasonTokenUnknownKey:
		return ErrUnknownKey
	case evidence.ReasonTokenSignature:
		return ErrSignature
	case evidence.ReasonTokenIssuer:
		return ErrIssuer
	case evidence.ReasonTokenAudience:
		return ErrAudience
	case evidence.ReasonTokenExpired:
		return ErrExpired
	case evidence.ReasonTokenNotYetValid:
		return ErrNotYetValid
	case evidence.ReasonTokenUnbound:
		return ErrUnbound
	case evidence.ReasonKeysUnavailable:
		return ErrKeysUnavailable
	}
	return nil
}
