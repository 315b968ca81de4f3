// SPDX-License-Identifier: Apache-2.0

package eksauth

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// identity is who a genuine token speaks for.
type identity struct{ namespace, serviceAccount, pod, podUID string }

// audience is claim aud: one string or several.
type audience []string

// UnmarshalJSON takes both forms.
func (a *audience) UnmarshalJSON(b []byte) error {
	var one string
	if json.Unmarshal(b, &one) == nil {
		*a = audience{one}
		return nil
	}
	return json.Unmarshal(b, (*[]string)(a))
}

// checkToken judges a token by the cluster's keys. The texts are close to the
// service's.
func (s *Server) checkToken(raw string, keys jose.JSONWebKeySet) (identity, *apiError) {
	invalid := func(format string, args ...any) (identity, *apiError) {
		return identity{}, refuse(http.StatusBadRequest, "InvalidTokenException", format, args...)
	}
	jws, err := jose.ParseSignedCompact(raw, []jose.SignatureAlgorithm{jose.RS256, jose.ES256, jose.ES384, jose.ES512})
	if err != nil {
		return invalid("The token included in the request cannot be parsed")
	}
	candidates := keys.Key(jws.Signatures[0].Protected.KeyID)
	if len(candidates) != 1 {
		return invalid("The token included in the request is signed by an unknown key")
	}
	payload, err := jws.Verify(candidates[0])
	if err != nil {
		return invalid("The signature of the token included in the request is wrong")
	}
	var claims struct {
		Audience   audience `json:"aud"`
		Issuer     string   `json:"iss"`
		Subject    string   `json:"sub"`
		Expiry     int64    `json:"exp"`
		NotBefore  int64    `json:"nbf"`
		Kubernetes struct {
			Namespace      string                     `json:"namespace"`
			ServiceAccount struct{ Name, UID string } `json:"serviceaccount"`
			Pod            struct{ Name, UID string } `json:"pod"`
		} `json:"kubernetes.io"`
	}
	if err := json.Unmarshal(payload, &claims); err != nil {
		return invalid("The claims of the token included in the request cannot be parsed")
	}
	now := s.cfg.Now()
	if expiry := time.Unix(claims.Expiry, 0); !now.Before(expiry) {
		return identity{}, refuse(http.StatusBadRequest, "ExpiredTokenException",
			"The token included in the request is expired: current date/time %s must be before the expiration date/time %s",
			now.UTC().Format(time.RFC3339), expiry.UTC().Format(time.RFC3339))
	}
	// Kubelet and judge may be on machines whose clocks differ a little.
	if now.Add(30 * time.Second).Before(time.Unix(claims.NotBefore, 0)) {
		return invalid("The token included in the request is not valid yet")
	}
	if s.cfg.Issuer != "" && claims.Issuer != s.cfg.Issuer {
		return invalid("The token included in the request has an unknown issuer")
	}
	if !slices.Contains(claims.Audience, s.cfg.Audience) {
		return invalid("The token included in the request is not for audience %s", s.cfg.Audience)
	}
	k := claims.Kubernetes
	if k.Pod.Name == "" || k.Pod.UID == "" {
		return invalid("The token included in the request is not bound to a pod")
	}
	if claims.Subject != "system:serviceaccount:"+k.Namespace+":"+k.ServiceAccount.Name {
		return invalid("The subject of the token included in the request is wrong")
	}
	return identity{k.Namespace, k.ServiceAccount.Name, k.Pod.Name, k.Pod.UID}, nil
}

func signatureForm() *regexp.Regexp {
	return regexp.MustCompile(`^AWS4-HMAC-SHA256 Credential=([A-Z0-9]{4,128})/(\d{8})/([a-z0-9-]+)/([a-z0-9-]+)/aws4_request, ?SignedHeaders=([a-z0-9;-]+), ?Signature=([0-9a-f]{64})$`)
}

// checkSignature judges the request's SigV4 signature and returns the caller's
// access key id. With Config.Callers it computes the signature itself, from the
// SigV4 documents and not with the SDK.
func (s *Server) checkSignature(r *http.Request, body []byte) (string, *apiError) {
	forbid := func(kind, format string, args ...any) (string, *apiError) {
		return "", refuse(http.StatusForbidden, kind, format, args...)
	}
	auth := r.Header.Get("Authorization")
	if auth == "" {
		return forbid("MissingAuthenticationTokenException", "Missing Authentication Token")
	}
	m := signatureForm().FindStringSubmatch(auth)
	if m == nil {
		return forbid("IncompleteSignatureException", "The Authorization header is not a complete AWS4-HMAC-SHA256 signature")
	}
	accessKey, day, region, service, signature := m[1], m[2], m[3], m[4], m[6]
	signed := strings.Split(m[5], ";")
	if service != "eks-auth" {
		return forbid("InvalidSignatureException", "Credential should be scoped to correct service: 'eks-auth'.")
	}
	if region != s.cfg.Region {
		return forbid("InvalidSignatureException", "Credential should be scoped to a valid region.")
	}
	if !slices.Contains(signed, "host") || !slices.Contains(signed, "x-amz-date") {
		return forbid("IncompleteSignatureException", "Host and X-Amz-Date must be signed")
	}
	stamp := r.Header.Get("X-Amz-Date")
	at, err := time.Parse("20060102T150405Z", stamp)
	if err != nil || !strings.HasPrefix(stamp, day) {
		return forbid("IncompleteSignatureException", "X-Amz-Date is missing or not the credential's day")
	}
	if skew := s.cfg.Now().Sub(at).Abs(); skew > 5*time.Minute {
		return forbid("InvalidSignatureException", "Signature expired: %s is not within 5 minutes of now", stamp)
	}
	if s.cfg.Callers == nil {
		return accessKey, nil
	}
	secret, ok := s.cfg.Callers[accessKey]
	if !ok {
		return forbid("UnrecognizedClientException", "The security token included in the request is invalid.")
	}
	want := computeSignature(r, body, secret, day, region, service, stamp, signed)
	if !hmac.Equal([]byte(want), []byte(signature)) {
		return forbid("InvalidSignatureException", "The request signature we calculated does not match the signature you provided.")
	}
	return accessKey, nil
}

func computeSignature(r *http.Request, body []byte, secret, day, region, service, stamp string, signed []string) string {
	var canonical strings.Builder
	// The path is escaped once on the wire and once more here, as for every
	// service but S3.
	segments := strings.Split(r.URL.EscapedPath(), "/")
	for i, segment := range segments {
		segments[i] = strings.ReplaceAll(url.QueryEscape(segment), "+", "%20")
	}
	canonical.WriteString(r.Method + "\n" + strings.Join(segments, "/") + "\n" + r.URL.Query().Encode() + "\n")
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

	scope := strings.Join([]string{day, region, service, "aws4_request"}, "/")
	toSign := "AWS4-HMAC-SHA256\n" + stamp + "\n" + scope + "\n" + hexSum([]byte(canonical.String()))
	key := []byte("AWS4" + secret)
	for _, part := range []string{day, region, service, "aws4_request"} {
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
