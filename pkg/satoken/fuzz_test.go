// SPDX-License-Identifier: Apache-2.0

package satoken

import (
	"encoding/base64"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/latchkey-dev/latchkey/test/standin/tokens"
)

// FuzzParse: nothing that a pod sends makes the parser panic, and what it
// accepts has one spelling, names that are names, and a bound pod.
func FuzzParse(f *testing.F) {
	s, other := signer(f, "ES256", "cluster"), signer(f, "ES256", "other")
	f.Add(s.Token(tokens.Claims{}))
	f.Add(s.Token(tokens.Claims{NoPod: true}))
	f.Add(s.Token(tokens.Claims{Set: map[string]any{"aud": "pods.eks.amazonaws.com"}}))
	f.Add(other.Token(tokens.Claims{Header: map[string]any{"alg": "none"}}))
	f.Add(otherSpelling(f, s.Token(tokens.Claims{})))
	f.Add("Bearer x")
	f.Add("e30.e30.AAAA")
	f.Add("a.b")
	p, v := parser(f, Config{}), verifier(f, Config{Keys: keySet(f, other.Issuer(), other.JWKS())})
	f.Fuzz(func(t *testing.T, raw string) {
		token, err := p.ParseUnverified(raw)
		_, verifyErr := v.Verify(t.Context(), raw)
		if err != nil {
			refused, ok := err.(*Error)
			if !ok || sentinel(refused.Reason()) == nil || refused.Message() == "" || refused.Retriable() {
				t.Errorf("not a refusal: %#v", err)
			}
			if verifyErr == nil {
				t.Errorf("verified what does not parse: %v", err)
			}
			return
		}
		if len(raw) > MaxTokenSize {
			t.Error("too large")
		}
		parts := strings.Split(raw, ".")
		if len(parts) != 3 {
			t.Fatalf("%d segments", len(parts))
		}
		for _, part := range parts {
			decoded, err := base64.RawURLEncoding.DecodeString(part)
			if err != nil || base64.RawURLEncoding.EncodeToString(decoded) != part {
				t.Errorf("segment %q has another spelling", part)
			}
		}
		subject := token.Subject
		if !isLabel(subject.Namespace) || !isSubdomain(subject.ServiceAccount) || !isSubdomain(token.PodName) || !isUID(string(subject.PodUID)) {
			t.Errorf("subject %+v of pod %q", subject, token.PodName)
		}
		if token.Verified || token.ID == [32]byte{} || !token.Expiry.Add(DefaultLeeway).After(testNow()) {
			t.Errorf("token %+v", token)
		}
		if _, err := token.Expiry.MarshalText(); err != nil {
			t.Errorf("expiry: %v", err)
		}
		// The library that checks signatures must be able to read it too, and
		// understand the same algorithm and key by it.
		signed, err := jose.ParseSignedCompact(raw, []jose.SignatureAlgorithm{jose.RS256, jose.ES256, jose.ES384, jose.ES512})
		if err != nil {
			t.Fatalf("the library cannot read it: %v", err)
		}
		c, refused := parse(raw)
		if refused != nil {
			t.Fatal(refused)
		}
		if header := signed.Signatures[0].Protected; header.Algorithm != string(c.algorithm) || header.KeyID != c.keyID {
			t.Errorf("library: %s, %q; we: %s, %q", header.Algorithm, header.KeyID, c.algorithm, c.keyID)
		}
		if string(signed.UnsafePayloadWithoutVerification()) != string(c.payload) {
			t.Error("the library reads other claims")
		}
	})
}

// FuzzParseClaims does the same from inside: the claims are the input, so that
// the fuzzer need not find base64.
func FuzzParseClaims(f *testing.F) {
	s := signer(f, "ES256", "cluster")
	header := string(s.Header(tokens.Claims{}))
	f.Add(header, string(s.Payload(tokens.Claims{})))
	f.Add(header, string(s.Payload(tokens.Claims{NoPod: true})))
	f.Add(header, `{"a":{"b":1,"b":2}}`)
	f.Add(`{"alg":"ES256","kid":"x","crit":["b64"],"b64":false}`, `[]`)
	p := parser(f, Config{})
	f.Fuzz(func(t *testing.T, header, payload string) {
		token, err := p.ParseUnverified(tokens.Assemble([]byte(header), []byte(payload), []byte{1}))
		if err != nil {
			return
		}
		want := `"system:serviceaccount:` + token.Subject.Namespace + ":" + token.Subject.ServiceAccount + `"`
		if !strings.Contains(payload, `\`) && !strings.Contains(payload, want) {
			t.Errorf("subject %+v is nowhere in %s", token.Subject, payload)
		}
	})
}

// FuzzKeySetFile: no document makes the reader panic, and every key it accepts
// is one that may verify tokens.
func FuzzKeySetFile(f *testing.F) {
	s, e := signer(f, "RS256", "cluster"), signer(f, "ES256", "cluster")
	certificate, _ := selfSigned(f)
	f.Add(tokens.JWKS(s, e))
	f.Add(s.PEM())
	f.Add(append(e.PEM(), certificate...))
	f.Add([]byte(`{"keys":[{"kty":"oct","k":"AAAA"}]}`))
	f.Add([]byte("-----BEGIN PUBLIC KEY-----\n-----BEGIN PUBLIC KEY-----\n"))
	token := e.Token(tokens.Claims{Expiry: testNow().Add(time.Hour)})
	f.Fuzz(func(t *testing.T, document []byte) {
		set, err := ParseKeySet("", document)
		if err != nil {
			return
		}
		if set.Len() == 0 || set.NamesIssuer() {
			t.Errorf("%d keys, issuer %q", set.Len(), set.Issuer())
		}
		for id, key := range set.keys {
			if id == "" || len(id) > maxKeyIDSize || id != key.ID() {
				t.Errorf("name %q", id)
			}
			if algorithm, err := algorithmOf(key.public); err != nil || algorithm != key.algorithm {
				t.Errorf("key %q: %v", id, err)
			}
			if err := verifySignature(token, nil, key); err == nil {
				t.Error("verified a payload that is not the token's")
			}
		}
	})
}
