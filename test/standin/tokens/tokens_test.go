// SPDX-License-Identifier: Apache-2.0

package tokens

import (
	"encoding/base64"
	"encoding/json"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
)

func fixedNow() time.Time { return time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC) }

func newSigner(t *testing.T, cfg Config) *Signer {
	t.Helper()
	s, err := NewSigner(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// The bytes of a real projected token of Kubernetes 1.32, with our names and
// times in it.
func TestTokenIsShapedLikeKubernetes(t *testing.T) {
	s := newSigner(t, Config{Now: fixedNow})
	token := s.Token(Claims{
		Namespace: "web", ServiceAccount: "api", ServiceAccountUID: "b2c5d0b1-0000-4000-8000-000000000001",
		Pod: "api-5c9f7", PodUID: "b2c5d0b1-0000-4000-8000-000000000002",
		Node: "worker-3", NodeUID: "b2c5d0b1-0000-4000-8000-000000000003",
		ID: "b2c5d0b1-0000-4000-8000-000000000004",
	})
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		t.Fatalf("%d segments", len(parts))
	}
	header, _ := base64.RawURLEncoding.DecodeString(parts[0])
	payload, _ := base64.RawURLEncoding.DecodeString(parts[1])
	if want := `{"alg":"RS256","kid":"` + s.KeyID() + `"}`; string(header) != want {
		t.Errorf("header %s, want %s", header, want)
	}
	const want = `{"aud":["pods.eks.amazonaws.com"],"exp":1795348800,"iat":1795262400,` +
		`"iss":"https://kubernetes.default.svc.cluster.local","jti":"b2c5d0b1-0000-4000-8000-000000000004",` +
		`"kubernetes.io":{"namespace":"web","node":{"name":"worker-3","uid":"b2c5d0b1-0000-4000-8000-000000000003"},` +
		`"pod":{"name":"api-5c9f7","uid":"b2c5d0b1-0000-4000-8000-000000000002"},` +
		`"serviceaccount":{"name":"api","uid":"b2c5d0b1-0000-4000-8000-000000000001"}},` +
		`"nbf":1795262400,"sub":"system:serviceaccount:web:api"}`
	if string(payload) != want {
		t.Errorf("payload\n got %s\nwant %s", payload, want)
	}
}

// Every algorithm's tokens verify with the published key, judged by a library
// that shares no code with the signer.
func TestTokenVerifies(t *testing.T) {
	for _, algorithm := range []string{"RS256", "ES256", "ES384", "ES512"} {
		t.Run(algorithm, func(t *testing.T) {
			s, other := newSigner(t, Config{Algorithm: algorithm}), newSigner(t, Config{Algorithm: algorithm})
			var set jose.JSONWebKeySet
			if err := json.Unmarshal(JWKS(s, other), &set); err != nil {
				t.Fatal(err)
			}
			keys := set.Key(s.KeyID())
			if len(keys) != 1 {
				t.Fatalf("%d keys of that id", len(keys))
			}
			signed, err := jose.ParseSignedCompact(s.Token(Claims{}), []jose.SignatureAlgorithm{jose.SignatureAlgorithm(algorithm)})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := signed.Verify(keys[0]); err != nil {
				t.Errorf("own key: %v", err)
			}
			if _, err := signed.Verify(set.Key(other.KeyID())[0]); err == nil {
				t.Error("verified with another key")
			}
		})
	}
}

func TestOverrides(t *testing.T) {
	s := newSigner(t, Config{Algorithm: "ES256", Now: fixedNow})
	c := Claims{
		NoNode:        true,
		Set:           map[string]any{"exp": nil, "aud": "one"},
		SetKubernetes: map[string]any{"pod": nil, "extra": 1},
		Header:        map[string]any{"alg": "none", "kid": nil},
	}
	if got, want := string(s.Header(c)), `{"alg":"none"}`; got != want {
		t.Errorf("header %s, want %s", got, want)
	}
	payload := string(s.Payload(c))
	for _, absent := range []string{`"exp"`, `"pod"`, `"node"`} {
		if strings.Contains(payload, absent) {
			t.Errorf("%s is there: %s", absent, payload)
		}
	}
	for _, present := range []string{`"aud":"one"`, `"extra":1`} {
		if !strings.Contains(payload, present) {
			t.Errorf("%s is missing: %s", present, payload)
		}
	}
}

func TestDiscoveryHandler(t *testing.T) {
	s := newSigner(t, Config{Algorithm: "ES256"})
	h := DiscoveryHandler(s.Issuer(), "https://example.test/openid/v1/jwks", s.JWKS)
	for path, want := range map[string]string{
		"/.well-known/openid-configuration": `"issuer":"` + DefaultIssuer + `"`,
		"/openid/v1/jwks":                   s.KeyID(),
	} {
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, httptest.NewRequest("GET", path, nil))
		if rec.Code != 200 || !strings.Contains(rec.Body.String(), want) {
			t.Errorf("%s: %d %s", path, rec.Code, rec.Body)
		}
	}
}

func TestNewSignerRefusesUnknownAlgorithm(t *testing.T) {
	if _, err := NewSigner(Config{Algorithm: "none"}); err == nil {
		t.Error("accepted")
	}
}
