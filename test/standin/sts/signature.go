// SPDX-License-Identifier: Apache-2.0

package sts

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// checkSignature judges the request's SigV4 signature, from the SigV4 documents
// and not with the SDK, and says who made it.
func (s *Server) checkSignature(r *http.Request, body []byte, call *Call) (caller, *apiError) {
	forbid := func(code, format string, args ...any) (caller, *apiError) {
		return caller{}, refuse(http.StatusForbidden, code, format, args...)
	}
	auth := r.Header.Get("Authorization")
	if auth == "" {
		return forbid("MissingAuthenticationToken", "Request is missing Authentication Token")
	}
	m := regexp.MustCompile(`^AWS4-HMAC-SHA256 Credential=([A-Z0-9]{4,128})/(\d{8})/([a-z0-9-]+)/([a-z0-9-]+)/aws4_request, ?SignedHeaders=([a-z0-9;-]+), ?Signature=([0-9a-f]{64})$`).
		FindStringSubmatch(auth)
	if m == nil {
		return forbid("IncompleteSignature", "Authorization header is not a complete AWS4-HMAC-SHA256 signature")
	}
	key, day, region, service, signature := m[1], m[2], m[3], m[4], m[6]
	signed := strings.Split(m[5], ";")
	call.Region = region
	if service != "sts" {
		return forbid("SignatureDoesNotMatch", "Credential should be scoped to correct service: 'sts'.")
	}
	if s.cfg.Region != "" && region != s.cfg.Region {
		return forbid("SignatureDoesNotMatch", "Credential should be scoped to a valid region.")
	}
	if !slices.Contains(signed, "host") || !slices.Contains(signed, "x-amz-date") {
		return forbid("IncompleteSignature", "Host and X-Amz-Date must be signed")
	}
	stamp := r.Header.Get("X-Amz-Date")
	at, err := time.Parse("20060102T150405Z", stamp)
	if err != nil || !strings.HasPrefix(stamp, day) {
		return forbid("IncompleteSignature", "X-Amz-Date is missing or not the credential's day")
	}
	if s.cfg.Now().Sub(at).Abs() > 5*time.Minute {
		return forbid("SignatureDoesNotMatch", "Signature expired: %s is not within 5 minutes of now", stamp)
	}

	var secret string
	var who caller
	token := r.Header.Get("X-Amz-Security-Token")
	s.mu.Lock()
	made, isSession := s.sessions[key]
	s.mu.Unlock()
	owner, isCaller := s.cfg.Callers[key]
	switch {
	case isSession && made.token == token && slices.Contains(signed, "x-amz-security-token"):
		if !s.cfg.Now().Before(made.expires) {
			return forbid("ExpiredToken", "The security token included in the request is expired")
		}
		secret, who = made.secret, caller{arn: made.arn, roleARN: made.roleARN, id: made.id, session: &made}
	case isCaller && token == "":
		secret, who = owner.SecretAccessKey, caller{arn: owner.ARN, id: key}
		if who.arn == "" {
			who.arn = "arn:aws:iam::111122223333:user/" + key
		}
	default:
		return forbid("InvalidClientTokenId", "The security token included in the request is invalid.")
	}
	if want := sign(r, body, secret, day, region, stamp, signed); !hmac.Equal([]byte(want), []byte(signature)) {
		return forbid("SignatureDoesNotMatch", "The request signature we calculated does not match the signature you provided.")
	}
	return who, nil
}

// sign computes the signature of a request to "/" without a query.
func sign(r *http.Request, body []byte, secret, day, region, stamp string, signed []string) string {
	var canonical strings.Builder
	canonical.WriteString(r.Method + "\n" + (&url.URL{Path: r.URL.Path}).EscapedPath() + "\n" + r.URL.Query().Encode() + "\n")
	for _, name := range signed {
		value := strings.Join(r.Header.Values(name), ",")
		switch name {
		case "host":
			value = r.Host
		case "content-length":
			value = strconv.FormatInt(r.ContentLength, 10)
		}
		canonical.WriteString(name + ":" + strings.Join(strings.Fields(value), " ") + "\n")
	}
	canonical.WriteString("\n" + strings.Join(signed, ";") + "\n" + hexSum(body))

	scope := strings.Join([]string{day, region, "sts", "aws4_request"}, "/")
	toSign := "AWS4-HMAC-SHA256\n" + stamp + "\n" + scope + "\n" + hexSum([]byte(canonical.String()))
	key := []byte("AWS4" + secret)
	for _, part := range []string{day, region, "sts", "aws4_request"} {
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
