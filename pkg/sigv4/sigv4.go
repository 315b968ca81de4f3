// SPDX-License-Identifier: Apache-2.0

// Package sigv4 verifies requests that are signed with AWS Signature Version 4
// in their Authorization header. It is the server's side of what every AWS SDK
// does, for all services but S3, after
// https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-create-signed-request.html
//
// What it refuses on purpose: presigned URLs (they work for whoever sees them),
// bodies that are not covered (UNSIGNED-PAYLOAD, streaming), x-amz-* headers
// that are not covered, and more than one value where a reader might take the
// other one.
//
// A request can be replayed while its date is inside the window of tolerated
// skew, as with AWS. Operations that must not happen twice have idempotency
// tokens.
package sigv4

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"net/http"
	"slices"
	"strings"
	"time"
)

// Limits of what is looked at, and the default skew.
const (
	// DefaultSkew is how far a request's date may be from the clock, either way.
	DefaultSkew = 5 * time.Minute
	// MaxAuthorization bounds the Authorization header, in bytes.
	MaxAuthorization = 4 << 10
	// MaxSessionToken bounds the X-Amz-Security-Token header, in bytes.
	MaxSessionToken = 16 << 10
	// MaxSignedHeaders bounds the list of signed headers.
	MaxSignedHeaders = 64
	// MaxAccessKeyID bounds an access key ID, in bytes.
	MaxAccessKeyID = 128
)

const (
	algorithm  = "AWS4-HMAC-SHA256"
	terminator = "aws4_request"
	timeForm   = "20060102T150405Z"
	dateForm   = "20060102"
)

// One sentinel for each reason to refuse. The first six are what *Error unwraps
// to; their texts go to clients.
var (
	// ErrMissing: there is no signature.
	ErrMissing = errors.New("missing authentication token")
	// ErrPresigned: the signature is in the query.
	ErrPresigned = errors.New("presigned requests are not accepted")
	// ErrIncomplete: what is needed to check the signature is missing or has not
	// the form that it must have.
	ErrIncomplete = errors.New("incomplete signature")
	// ErrSkew: the request's date is too far from the clock. SDKs that see the Date
	// header of the answer correct their clock and try again.
	ErrSkew = errors.New("signature expired or not yet valid")
	// ErrSignature: the signature is not that of this request under this key.
	ErrSignature = errors.New("signature does not match")
	// ErrUnknownKey: there is no such access key, or not with this session token.
	// Implementations of Keys return it.
	ErrUnknownKey = errors.New("unknown access key")
	// ErrExpiredKey: the key has been valid. It is told only to who proved to have
	// the secret. Implementations of Keys return it, together with the Key.
	ErrExpiredKey = errors.New("expired access key")
)

// Error is a refusal. Message is for the client: it holds nothing that the
// client did not send, and no secret.
type Error struct {
	// Reason is one of the sentinels.
	Reason error
	// Message says what is wrong with this request.
	Message string
}

func (e *Error) Error() string { return e.Message }
func (e *Error) Unwrap() error { return e.Reason }

func refuse(reason error, format string, args ...any) error {
	return &Error{Reason: reason, Message: fmt.Sprintf(format, args...)}
}

// Key is what there is to know of an access key.
type Key struct {
	// Secret is the secret access key.
	Secret string
	// Principal is who the key belongs to; it is handed through to Result.
	Principal any
}

// String shows no secret.
func (k Key) String() string { return fmt.Sprintf("key of %v", k.Principal) }

// GoString shows no secret.
func (k Key) GoString() string { return k.String() }

// Keys finds access keys.
type Keys interface {
	// Lookup returns the key of an access key ID. sessionToken is the request's
	// X-Amz-Security-Token, empty without one; a key that has none must refuse one.
	// Errors are ErrUnknownKey; ErrExpiredKey together with the key; any other is
	// handed to the caller of Verify as it is: it is not the request's fault.
	Lookup(ctx context.Context, accessKeyID, sessionToken string) (Key, error)
}

// Choose looks for keys without a session token in Static and for those with
// one in Session. A nil field knows no key.
type Choose struct{ Static, Session Keys }

// Lookup implements Keys.
func (c Choose) Lookup(ctx context.Context, accessKeyID, sessionToken string) (Key, error) {
	keys := c.Static
	if sessionToken != "" {
		keys = c.Session
	}
	if keys == nil {
		return Key{}, ErrUnknownKey
	}
	return keys.Lookup(ctx, accessKeyID, sessionToken)
}

// Config of a Verifier. Zero values mean what the field says.
type Config struct {
	// Keys is required.
	Keys Keys
	// Skew is how far a request's date may be from the clock; 0: DefaultSkew.
	Skew time.Duration
	// Now is the clock; nil: time.Now.
	Now func() time.Time
	// CacheSize is how many derived signing keys are remembered; 0: 4096. They are
	// of keys that have proved themselves, for one day, region and service.
	CacheSize int
}

// Verifier checks signatures. It is safe for concurrent use.
type Verifier struct {
	keys  Keys
	skew  time.Duration
	now   func() time.Time
	cache signingKeys
	dummy [sha256.Size]byte
}

// New makes a Verifier.
func New(cfg Config) (*Verifier, error) {
	if cfg.Keys == nil {
		return nil, errors.New("sigv4: no source of keys")
	}
	v := &Verifier{keys: cfg.Keys, skew: cfg.Skew, now: cfg.Now}
	if v.skew == 0 {
		v.skew = DefaultSkew
	}
	if v.now == nil {
		v.now = time.Now
	}
	v.cache.size = cfg.CacheSize
	if v.cache.size <= 0 {
		v.cache.size = 4096
	}
	return v, nil
}

// Result is a request whose signature is good.
type Result struct {
	// AccessKeyID is the key it is signed with.
	AccessKeyID string
	// Principal is the key's.
	Principal any
	// Region is the one it is signed for. It is as the client chose it: whether
	// that is the right one is for the caller to judge, who knows by now that the
	// client may be answered.
	Region string
	// Time is the request's own date.
	Time time.Time
}

// AccessKeyID gives the access key ID that a request claims, for records of
// what was refused; empty if there is none in the form that Verify accepts.
func AccessKeyID(r *http.Request) string {
	values := r.Header["Authorization"]
	if len(values) != 1 {
		return ""
	}
	a, err := parseAuthorization(values[0])
	if err != nil {
		return ""
	}
	return a.accessKeyID
}

// Verify checks that r, with this body, was signed for service by the holder
// of a key, not longer ago than the skew. The hash of the body is computed here,
// whatever the request says of it. Errors are *Error, or whatever else Keys
// returned.
func (v *Verifier) Verify(r *http.Request, body []byte, service string) (Result, error) {
	q, err := v.Begin(r, service)
	if err != nil {
		return Result{}, err
	}
	return q.Verify(body)
}

// Request is a request whose headers have the form of a signed one. That is all
// that is known of it before Verify.
type Request struct {
	v     *Verifier
	r     *http.Request
	auth  authorization
	at    time.Time
	date  string
	token string
}

// Begin is what of Verify needs neither body nor key, so that both need not be
// had for what cannot be good. Errors are *Error.
func (v *Verifier) Begin(r *http.Request, service string) (Request, error) {
	if presigned(r.URL.RawQuery) {
		return Request{}, refuse(ErrPresigned, "The signature must be in the Authorization header, presigned requests are not accepted.")
	}
	values := r.Header["Authorization"]
	if len(values) == 0 {
		return Request{}, refuse(ErrMissing, "Missing Authentication Token")
	}
	if len(values) > 1 {
		return Request{}, refuse(ErrIncomplete, "There must be one Authorization header.")
	}
	auth, err := parseAuthorization(values[0])
	if err != nil {
		return Request{}, err
	}
	if auth.service != service {
		return Request{}, refuse(ErrSignature, "Credential should be scoped to correct service: '%s'.", service)
	}
	date, err := single(r.Header, "X-Amz-Date")
	if err != nil {
		return Request{}, err
	}
	if date == "" {
		return Request{}, refuse(ErrIncomplete, "Authorization header requires existence of a 'X-Amz-Date' header.")
	}
	at, err := time.Parse(timeForm, date)
	if err != nil || at.Format(timeForm) != date {
		return Request{}, refuse(ErrIncomplete, "Date must be in ISO-8601 'basic format'.")
	}
	if auth.date != date[:len(dateForm)] {
		return Request{}, refuse(ErrSignature, "Date in Credential scope does not match YYYYMMDD from ISO-8601 version of date from HTTP.")
	}
	now := v.now()
	if at.Before(now.Add(-v.skew)) {
		return Request{}, refuse(ErrSkew, "Signature expired: %s is now earlier than %s (%s - %s)",
			date, now.Add(-v.skew).UTC().Format(timeForm), now.UTC().Format(timeForm), minutes(v.skew))
	}
	if at.After(now.Add(v.skew)) {
		return Request{}, refuse(ErrSkew, "Signature not yet current: %s is still later than %s (%s + %s)",
			date, now.Add(v.skew).UTC().Format(timeForm), now.UTC().Format(timeForm), minutes(v.skew))
	}
	token, err := single(r.Header, "X-Amz-Security-Token")
	if err != nil {
		return Request{}, err
	}
	if len(token) > MaxSessionToken {
		return Request{}, refuse(ErrIncomplete, "The security token is too long.")
	}
	if err := coversAll(r.Header, auth.signedHeaders); err != nil {
		return Request{}, err
	}
	return Request{v: v, r: r, auth: auth, at: at, date: date, token: token}, nil
}

// Known reports whether there is such an access key, with this session token. It
// says nothing of whether the request is signed with it. An error is whatever
// Keys returned.
func (q Request) Known() (bool, error) {
	key, err := q.v.keys.Lookup(q.r.Context(), q.auth.accessKeyID, q.token)
	switch {
	case errors.Is(err, ErrUnknownKey):
		return false, nil
	case err != nil && !errors.Is(err, ErrExpiredKey):
		return false, fmt.Errorf("look up access key: %w", err)
	}
	return key.Secret != "", nil
}

// Verify checks the signature of the request, with this body, as
// Verifier.Verify does.
func (q Request) Verify(body []byte) (Result, error) {
	v, r, auth, date := q.v, q.r, q.auth, q.date
	sum := sha256.Sum256(body)
	if err := checkDeclaredHash(r.Header, sum); err != nil {
		return Result{}, err
	}
	key, err := v.keys.Lookup(r.Context(), auth.accessKeyID, q.token)
	expired := errors.Is(err, ErrExpiredKey) && key.Secret != ""
	unknown := errors.Is(err, ErrUnknownKey) || errors.Is(err, ErrExpiredKey) && !expired || err == nil && key.Secret == ""
	if err != nil && !unknown && !expired {
		return Result{}, fmt.Errorf("look up access key: %w", err)
	}
	if unknown {
		// The same work as for a known key follows, so that how long an answer takes
		// says no more than the answer.
		key = Key{Secret: "there is no such key, and this is not its secret"}
	}
	good, err := v.match(r, auth, date, sum, key.Secret)
	switch {
	case err != nil:
		return Result{}, err
	case unknown:
		return Result{}, refuse(ErrUnknownKey, "The security token included in the request is invalid.")
	case !good:
		return Result{}, refuse(ErrSignature, "The request signature we calculated does not match the signature you provided. "+
			"Check your AWS Secret Access Key and signing method. Consult the service documentation for details.")
	case expired:
		return Result{}, refuse(ErrExpiredKey, "The security token included in the request is expired")
	}
	return Result{AccessKeyID: auth.accessKeyID, Principal: key.Principal, Region: auth.region, Time: q.at}, nil
}

// match compares the signature with what it should be. Every request that does
// not match takes the same way, whether its key is unknown, known or remembered.
func (v *Verifier) match(r *http.Request, auth authorization, date string, body [sha256.Size]byte, secret string) (bool, error) {
	params, err := parseQuery(r.URL.RawQuery)
	if err != nil {
		return false, err
	}
	head := canonicalHead(r)
	tail := canonicalTail(r, auth, body)
	scope := auth.date + "/" + auth.region + "/" + auth.service + "/" + terminator
	toSign := func(query string) string {
		h := sha256.New()
		write(h, head, query, "\n", tail)
		var sum [sha256.Size]byte
		return algorithm + "\n" + date + "\n" + scope + "\n" + hex.EncodeToString(h.Sum(sum[:0]))
	}
	id := cacheID{auth.accessKeyID, auth.date, auth.region, auth.service}
	query := canonicalQuery(params, byEncoded)
	text := toSign(query)

	remembered, ok := v.cache.get(id, secret)
	if !ok {
		remembered = v.dummy
	}
	if equal := matches(remembered, text, auth.signature); equal && ok {
		return true, nil
	}
	signing := signingKey(secret, auth)
	good := matches(signing, text, auth.signature)
	// The specification sorts parameters after encoding them. Older SDKs for Go
	// sort before, which is another order for some tag keys. Either is the same
	// set of parameters.
	if other := canonicalQuery(params, byPlain); other != query && !good {
		good = matches(signing, toSign(other), auth.signature)
	}
	if good {
		v.cache.put(id, secret, signing)
	}
	return good, nil
}

func matches(key [sha256.Size]byte, text string, signature [sha256.Size]byte) bool {
	sum := mac(key[:], text)
	return subtle.ConstantTimeCompare(sum[:], signature[:]) == 1
}

func signingKey(secret string, a authorization) [sha256.Size]byte {
	k := mac([]byte("AWS4"+secret), a.date)
	k = mac(k[:], a.region)
	k = mac(k[:], a.service)
	return mac(k[:], terminator)
}

func mac(key []byte, text string) (out [sha256.Size]byte) {
	h := hmac.New(sha256.New, key)
	h.Write([]byte(text))
	h.Sum(out[:0])
	return out
}

func write(h hash.Hash, parts ...string) {
	for _, p := range parts {
		h.Write([]byte(p))
	}
}

func minutes(d time.Duration) string {
	if d%time.Minute == 0 {
		return fmt.Sprintf("%d min.", d/time.Minute)
	}
	return d.String()
}

// single returns a header that may be there once.
func single(h http.Header, name string) (string, error) {
	switch values := h[name]; len(values) {
	case 0:
		return "", nil
	case 1:
		return values[0], nil
	}
	return "", refuse(ErrIncomplete, "There must be one %s header.", name)
}

// checkDeclaredHash compares what the request says of its body, if it does,
// with what the body is.
func checkDeclaredHash(h http.Header, sum [sha256.Size]byte) error {
	declared, err := single(h, "X-Amz-Content-Sha256")
	if err != nil || declared == "" && h["X-Amz-Content-Sha256"] == nil {
		return err
	}
	if declared != hex.EncodeToString(sum[:]) {
		if strings.HasPrefix(declared, "UNSIGNED-") || strings.HasPrefix(declared, "STREAMING-") {
			return refuse(ErrIncomplete, "The body must be signed: x-amz-content-sha256 must be its SHA-256.")
		}
		return refuse(ErrSignature, "The provided 'x-amz-content-sha256' header does not match what was computed.")
	}
	return nil
}

// coversAll: whatever may change the meaning of a request must be signed.
func coversAll(h http.Header, signed []string) error {
	if !slices.Contains(signed, "host") {
		return refuse(ErrIncomplete, "'Host' must be a 'SignedHeader' in the AWS Authorization.")
	}
	for name := range h {
		lower := strings.ToLower(name)
		if strings.HasPrefix(lower, "x-amz-") && !slices.Contains(signed, lower) {
			return refuse(ErrIncomplete, "Headers that begin with x-amz- must be signed, and one is not.")
		}
	}
	for _, name := range signed {
		if name == "host" || name == "content-length" {
			continue
		}
		if _, ok := h[http.CanonicalHeaderKey(name)]; !ok {
			return refuse(ErrSignature, "A header in SignedHeaders is not in the request.")
		}
	}
	return nil
}
