// SPDX-License-Identifier: Apache-2.0

package credcache

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"
	"unsafe"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

// Entry is one subject's credentials, ready to be sent. It never changes, and
// it does not show its secrets when printed or logged.
type Entry struct {
	body        []byte
	expires     time.Time
	fetched     time.Time
	servedUntil int64 // unix ns

	roleARN, associationID string
}

// Body is the JSON document for the pod: AccessKeyId, SecretAccessKey, Token,
// AccountId, Expiration, in this order. The caller must not change it.
func (e *Entry) Body() []byte { return e.body }

// Expiry is when the credentials end.
func (e *Entry) Expiry() time.Time { return e.expires }

// AssumedRoleARN is the STS session's.
func (e *Entry) AssumedRoleARN() string { return e.roleARN }

// AssociationID is that of the association that gave the role.
func (e *Entry) AssociationID() string { return e.associationID }

// String describes the entry without its secrets.
func (e *Entry) String() string {
	return fmt.Sprintf("credentials of %s until %s", e.roleARN, e.expires.Format(time.RFC3339))
}

// GoString hides the secrets from %#v.
func (e *Entry) GoString() string { return e.String() }

// LogValue hides the secrets from slog.
func (e *Entry) LogValue() slog.Value { return slog.StringValue(e.String()) }

// MarshalText hides the secrets from encoders.
func (e *Entry) MarshalText() ([]byte, error) { return []byte(e.String()), nil }

// Errors about answers. They come wrapped in an *UpstreamError with
// evidence.ReasonUpstreamInvalid.
var (
	ErrSubjectMismatch  = errors.New("the upstream's answer is for another service account than the token")
	ErrAudienceMismatch = errors.New("the upstream's answer is for another audience")
	ErrIncomplete       = errors.New("the upstream's answer lacks credentials")
	ErrExpired          = errors.New("fetched credentials are expired or will expire within the next 15 seconds")
)

// newEntry checks an answer against the token it was fetched with and prepares
// the bytes that pods get.
func newEntry(a *Answer, subject evidence.Subject, audience string, now time.Time) (*Entry, error) {
	invalid := func(err error) (*Entry, error) {
		return nil, &UpstreamError{Reason: evidence.ReasonUpstreamInvalid, Err: err}
	}
	switch {
	case a.Namespace != subject.Namespace || a.ServiceAccount != subject.ServiceAccount:
		return invalid(ErrSubjectMismatch)
	case a.Audience != audience:
		return invalid(ErrAudienceMismatch)
	case a.AccessKeyID == "" || a.SecretAccessKey == "" || a.SessionToken == "":
		return invalid(ErrIncomplete)
	case a.Expiration.Sub(now) <= MinServed:
		return invalid(ErrExpired)
	case a.Expiration.UTC().Year() > 9999:
		// RFC 3339 cannot write it, and clients could not read it.
		return invalid(ErrIncomplete)
	}
	// Whole seconds, in UTC with Z: the JavaScript SDK takes nothing else.
	expires := a.Expiration.UTC().Truncate(time.Second)
	body, err := json.Marshal(struct {
		AccessKeyID     string `json:"AccessKeyId"`
		SecretAccessKey string
		Token           string
		AccountID       string `json:"AccountId,omitempty"`
		Expiration      string
	}{a.AccessKeyID, a.SecretAccessKey, a.SessionToken, accountOf(a.AssumedRoleARN), expires.Format(time.RFC3339)})
	if err != nil {
		return invalid(ErrIncomplete)
	}
	return &Entry{
		body:          body,
		expires:       expires,
		fetched:       now,
		servedUntil:   expires.Add(-MinServed).UnixNano(),
		roleARN:       a.AssumedRoleARN,
		associationID: a.AssociationID,
	}, nil
}

// accountOf is the account in an ARN (arn:partition:service:region:account:…),
// empty if there is none.
func accountOf(arn string) string {
	parts := strings.SplitN(arn, ":", 6)
	if len(parts) != 6 || len(parts[4]) != 12 || strings.Trim(parts[4], "0123456789") != "" {
		return ""
	}
	return parts[4]
}

// hashToken hashes a token's exact bytes, without copying them.
func hashToken(raw string) [32]byte {
	return sha256.Sum256(unsafe.Slice(unsafe.StringData(raw), len(raw)))
}

// itemOverhead is what an item costs beside its strings and bytes: the structs,
// its places in maps and heaps.
const itemOverhead = 1120

func sizeOf(it *item, e *Entry) int64 {
	return itemOverhead + int64(len(e.body)+len(e.roleARN)+len(e.associationID)+len(it.token)+
		len(it.subject.Namespace)+len(it.subject.ServiceAccount)+len(it.subject.PodUID))
}

// UpstreamError says why the upstream gave no credentials.
type UpstreamError struct {
	// Reason decides what becomes of credentials that are there: on
	// ReasonUpstreamNotFound, and on ReasonUpstreamToken for a token that has
	// not expired, they go; on everything else they stay until they expire.
	// ReasonUpstreamNotFound, ReasonUpstreamToken, ReasonTokenExpired and
	// ReasonUpstreamDenied are remembered for a moment.
	Reason evidence.Reason
	// RetryAfter is how long the upstream asks to wait; 0 if it does not say.
	RetryAfter time.Duration
	// Err is the upstream client's error.
	Err error
}

// Error is the upstream client's text.
func (e *UpstreamError) Error() string {
	if e.Err == nil {
		return string(e.Reason)
	}
	return e.Err.Error()
}

// Unwrap gives the upstream client's error.
func (e *UpstreamError) Unwrap() error { return e.Err }

// ReasonOf names an error of Get; evidence.ReasonServed for nil.
func ReasonOf(err error) evidence.Reason {
	var up *UpstreamError
	switch {
	case err == nil:
		return evidence.ReasonServed
	case errors.As(err, &up):
		return up.Reason
	case errors.Is(err, ErrLimited):
		return evidence.ReasonRateLimited
	case errors.Is(err, ErrClosed):
		return evidence.ReasonStopping
	}
	// Not known to be anything worse: gave up, overloaded, no answer.
	return evidence.ReasonUpstreamUnavailable
}

// isDenial: the upstream has judged, and asking again at once changes nothing.
func isDenial(r evidence.Reason) bool {
	switch r {
	case evidence.ReasonUpstreamNotFound, evidence.ReasonUpstreamToken, evidence.ReasonTokenExpired, evidence.ReasonUpstreamDenied:
		return true
	}
	return false
}
