// SPDX-License-Identifier: Apache-2.0

package eksauth

import (
	"encoding/json"
	"net/http"
	"slices"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/latchkey-dev/latchkey/test/standin/wire"
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

// checkSignature judges the request's SigV4 signature and returns the caller's
// access key id. With Config.Callers the signature is computed.
func (s *Server) checkSignature(r *http.Request, body []byte) (string, *apiError) {
	forbid := func(kind, text string) (string, *apiError) {
		return "", refuse(http.StatusForbidden, kind, "%s", text)
	}
	sig, flaw := wire.ReadSignature(r, "eks-auth", s.cfg.Region, s.cfg.Now())
	if flaw != nil {
		kind := map[wire.Flaw]string{
			wire.Unsigned: "MissingAuthenticationTokenException", wire.Incomplete: "IncompleteSignatureException", wire.Invalid: "InvalidSignatureException",
		}[flaw.Flaw]
		return forbid(kind, flaw.Text)
	}
	if s.cfg.Callers == nil {
		return sig.AccessKeyID, nil
	}
	secret, ok := s.cfg.Callers[sig.AccessKeyID]
	if !ok {
		return forbid("UnrecognizedClientException", "The security token included in the request is invalid.")
	}
	if !sig.MadeWith(secret, r, body) {
		return forbid("InvalidSignatureException", "The request signature we calculated does not match the signature you provided.")
	}
	return sig.AccessKeyID, nil
}
