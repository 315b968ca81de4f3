// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Flaw says what kind of thing is wrong with a signature; services have their
// own codes for each.
type Flaw int

// The flaws.
const (
	// Unsigned: there is no Authorization header.
	Unsigned Flaw = iota + 1
	// Incomplete: the header, or what has to be signed, is not all there.
	Incomplete
	// Invalid: it is for another service, region or time.
	Invalid
)

// SignatureError is why a signature is not accepted, without having been
// computed. The text is close to the services'.
type SignatureError struct {
	Flaw Flaw
	Text string
}

func (e *SignatureError) Error() string { return e.Text }

// Signature is what a request says of its SigV4 signature.
type Signature struct {
	AccessKeyID, Region string
	// Headers are the names of the signed ones.
	Headers []string

	day, service, stamp, given string
}

var signatureForm = regexp.MustCompile(`^AWS4-HMAC-SHA256 Credential=([A-Z0-9]{4,128})/(\d{8})/([a-z0-9-]+)/([a-z0-9-]+)/aws4_request, ?SignedHeaders=([a-z0-9;-]+), ?Signature=([0-9a-f]{64})$`)

// ReadSignature reads a request's signature, and judges all of it but who made
// it: MadeWith does that. An empty region accepts any. Beside an error the
// signature is as far as it could be read.
func ReadSignature(r *http.Request, service, region string, now time.Time) (Signature, *SignatureError) {
	auth := r.Header.Get("Authorization")
	if auth == "" {
		return Signature{}, &SignatureError{Unsigned, "Missing Authentication Token"}
	}
	m := signatureForm.FindStringSubmatch(auth)
	if m == nil {
		return Signature{}, &SignatureError{Incomplete, "The Authorization header is not a complete AWS4-HMAC-SHA256 signature"}
	}
	s := Signature{
		AccessKeyID: m[1], Region: m[3], Headers: strings.Split(m[5], ";"),
		day: m[2], service: m[4], stamp: r.Header.Get("X-Amz-Date"), given: m[6],
	}
	if s.service != service {
		return s, &SignatureError{Invalid, fmt.Sprintf("Credential should be scoped to correct service: '%s'.", service)}
	}
	if region != "" && s.Region != region {
		return s, &SignatureError{Invalid, "Credential should be scoped to a valid region."}
	}
	if !slices.Contains(s.Headers, "host") || !slices.Contains(s.Headers, "x-amz-date") {
		return s, &SignatureError{Incomplete, "Host and X-Amz-Date must be signed"}
	}
	at, err := time.Parse("20060102T150405Z", s.stamp)
	if err != nil || !strings.HasPrefix(s.stamp, s.day) {
		return s, &SignatureError{Incomplete, "X-Amz-Date is missing or not the credential's day"}
	}
	if now.Sub(at).Abs() > 5*time.Minute {
		return s, &SignatureError{Invalid, fmt.Sprintf("Signature expired: %s is not within 5 minutes of now", s.stamp)}
	}
	return s, nil
}

// MadeWith computes the signature of the request that s was read from, and
// reports whether it is the one that came.
func (s Signature) MadeWith(secret string, r *http.Request, body []byte) bool {
	return hmac.Equal([]byte(s.compute(secret, r, body)), []byte(s.given))
}

func (s Signature) compute(secret string, r *http.Request, body []byte) string {
	var canonical strings.Builder
	// The path is escaped once on the wire and once more here, as for every
	// service but S3.
	segments := strings.Split(r.URL.EscapedPath(), "/")
	for i, segment := range segments {
		segments[i] = strings.ReplaceAll(url.QueryEscape(segment), "+", "%20")
	}
	query := r.URL.Query()
	for _, values := range query {
		slices.Sort(values)
	}
	canonical.WriteString(r.Method + "\n" + strings.Join(segments, "/") + "\n" + strings.ReplaceAll(query.Encode(), "+", "%20") + "\n")
	for _, name := range s.Headers {
		value := strings.Join(r.Header.Values(name), ",")
		switch name {
		case "host":
			value = r.Host
		case "content-length":
			value = strconv.FormatInt(r.ContentLength, 10)
		}
		canonical.WriteString(name + ":" + strings.Join(strings.Fields(value), " ") + "\n")
	}
	canonical.WriteString("\n" + strings.Join(s.Headers, ";") + "\n" + hexSum(body))

	scope := []string{s.day, s.Region, s.service, "aws4_request"}
	toSign := "AWS4-HMAC-SHA256\n" + s.stamp + "\n" + strings.Join(scope, "/") + "\n" + hexSum([]byte(canonical.String()))
	key := []byte("AWS4" + secret)
	for _, part := range scope {
		key = mac(key, part)
	}
	return hex.EncodeToString(mac(key, toSign))
}

func mac(key []byte, text string) []byte {
	h := hmac.New(sha256.New, key)
	h.Write([]byte(text))
	return h.Sum(nil)
}

func hexSum(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}
