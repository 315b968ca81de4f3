// SPDX-License-Identifier: Apache-2.0

package satoken

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"math/big"
	"slices"
	"strings"
	"testing"

	"github.com/latchkey-dev/latchkey/test/standin/tokens"
)

func jwks(t testing.TB, keys ...map[string]any) []byte {
	t.Helper()
	b, err := json.Marshal(map[string]any{"keys": keys})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// with changes a JWK; nil removes a member.
func with(jwk map[string]any, name string, value any) map[string]any {
	if jwk[name] = value; value == nil {
		delete(jwk, name)
	}
	return jwk
}

func block(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

func selfSigned(t testing.TB) (certificate []byte, key *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "service-accounts"}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return block("CERTIFICATE", der), key
}

func TestParseKeySetAccepts(t *testing.T) {
	rs, es := signer(t, "RS256", "cluster"), signer(t, "ES256", "cluster")
	es384, es512 := signer(t, "ES384", "cluster"), signer(t, "ES512", "cluster")
	certificate, certified := selfSigned(t)
	certifiedID, err := tokens.KeyID(certified.Public())
	if err != nil {
		t.Fatal(err)
	}
	weak, err := tokens.NewSigner(tokens.Config{RSABits: 1024})
	if err != nil {
		t.Fatal(err)
	}
	edwards := map[string]any{"kty": "OKP", "crv": "Ed25519", "kid": "ed", "x": strings.Repeat("A", 43)}
	pkcs1 := block("RSA PUBLIC KEY", x509.MarshalPKCS1PublicKey(rs.Public().(*rsa.PublicKey)))
	join := func(parts ...[]byte) (out []byte) {
		for _, part := range parts {
			out = append(out, part...)
		}
		return out
	}
	for name, tc := range map[string]struct {
		document []byte
		ids      []string
		skipped  int
	}{
		"every algorithm":      {tokens.JWKS(rs, es, es384, es512), []string{rs.KeyID(), es.KeyID(), es384.KeyID(), es512.KeyID()}, 0},
		"leading space":        {join([]byte(" \r\n\t"), es.JWKS()), []string{es.KeyID()}, 0},
		"no alg, no use":       {jwks(t, with(with(es.JWK(), "alg", nil), "use", nil)), []string{es.KeyID()}, 0},
		"no kid":               {jwks(t, with(es.JWK(), "kid", nil)), []string{es.KeyID()}, 0},
		"the same key twice":   {tokens.JWKS(es, es), []string{es.KeyID()}, 0},
		"under two names":      {jwks(t, es.JWK(), with(es.JWK(), "kid", "second")), []string{es.KeyID(), "second"}, 0},
		"EKS's names":          {jwks(t, with(rs.JWK(), "kid", strings.Repeat("0a", 20))), []string{strings.Repeat("0a", 20)}, 0},
		"weak key":             {tokens.JWKS(es, weak), []string{es.KeyID()}, 1},
		"encryption key":       {jwks(t, es.JWK(), with(rs.JWK(), "use", "enc")), []string{es.KeyID()}, 1},
		"other algorithm":      {jwks(t, es.JWK(), with(rs.JWK(), "alg", "PS256")), []string{es.KeyID()}, 1},
		"curve of other alg":   {jwks(t, es.JWK(), with(es384.JWK(), "alg", "ES256")), []string{es.KeyID()}, 1},
		"other type":           {jwks(t, es.JWK(), edwards), []string{es.KeyID()}, 1},
		"unknown type":         {jwks(t, es.JWK(), map[string]any{"kty": "new"}), []string{es.KeyID()}, 1},
		"not on the curve":     {jwks(t, rs.JWK(), with(es.JWK(), "x", strings.Repeat("A", 43))), []string{rs.KeyID()}, 1},
		"even RSA exponent":    {jwks(t, es.JWK(), with(rs.JWK(), "e", "BA")), []string{es.KeyID()}, 1},
		"name too long":        {jwks(t, es.JWK(), with(rs.JWK(), "kid", strings.Repeat("k", 257))), []string{es.KeyID()}, 1},
		"PEM":                  {es.PEM(), []string{es.KeyID()}, 0},
		"PEM, two keys":        {join(es.PEM(), rs.PEM()), []string{es.KeyID(), rs.KeyID()}, 0},
		"PEM, PKCS #1":         {pkcs1, []string{rs.KeyID()}, 0},
		"PEM, certificate":     {certificate, []string{certifiedID}, 0},
		"PEM, text around":     {join([]byte("our key:\n"), es.PEM(), []byte("\nthe end\n")), []string{es.KeyID()}, 0},
		"PEM, EC parameters":   {join(block("EC PARAMETERS", []byte{1}), es.PEM()), []string{es.KeyID()}, 1},
		"PEM, weak and strong": {join(weak.PEM(), es.PEM()), []string{es.KeyID()}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			set, err := ParseKeySet("", tc.document)
			if err != nil {
				t.Fatal(err)
			}
			if set.Len() != len(tc.ids) || len(set.Skipped()) != tc.skipped {
				t.Errorf("%d keys, skipped %v", set.Len(), set.Skipped())
			}
			var inOrder []string
			for _, key := range set.Keys() {
				inOrder = append(inOrder, key.ID())
				if found, err := set.Lookup(t.Context(), "", key.ID()); err != nil || found != key || found.Public() == nil {
					t.Errorf("key %s: %v", key.ID(), err)
				}
			}
			if !slices.Equal(inOrder, tc.ids) {
				t.Errorf("keys %q, want %q", inOrder, tc.ids)
			}
		})
	}
}

func TestParseKeySetRefuses(t *testing.T) {
	rs, es, other := signer(t, "RS256", "cluster"), signer(t, "ES256", "cluster"), signer(t, "ES256", "other")
	weak, err := tokens.NewSigner(tokens.Config{RSABits: 1024})
	if err != nil {
		t.Fatal(err)
	}
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	edwards, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	edwardsDER, err := x509.MarshalPKIXPublicKey(edwards)
	if err != nil {
		t.Fatal(err)
	}
	var many []map[string]any
	for range maxKeys + 1 {
		many = append(many, es.JWK())
	}
	damaged := strings.Replace(string(es.PEM()), "-----END", "----END", 1)
	for name, tc := range map[string]struct {
		document []byte
		want     string
	}{
		"empty":                 {nil, "no usable key"},
		"prose":                 {[]byte("not a key"), "no usable key"},
		"no keys":               {[]byte(`{"keys":[]}`), "no usable key"},
		"only a weak key":       {weak.JWKS(), "1024 bits"},
		"only a weak PEM key":   {weak.PEM(), "1024 bits"},
		"only Ed25519":          {block("PUBLIC KEY", edwardsDER), "not supported"},
		"symmetric key":         {jwks(t, es.JWK(), map[string]any{"kty": "oct", "kid": "x", "k": "AAAA"}), "private or symmetric"},
		"private JWK":           {jwks(t, with(es.JWK(), "d", "AAAA")), "private or symmetric"},
		"private PEM":           {block("PRIVATE KEY", pkcs8), "private key"},
		"private after public":  {append(es.PEM(), block("EC PRIVATE KEY", pkcs8)...), "private key"},
		"two keys of one name":  {jwks(t, es.JWK(), with(other.JWK(), "kid", es.KeyID())), "two keys"},
		"two types of one name": {jwks(t, es.JWK(), with(rs.JWK(), "kid", es.KeyID())), "two keys"},
		"repeated member":       {[]byte(strings.Replace(string(es.JWKS()), `"kty"`, `"kid":"x","kty"`, 1)), "unique names"},
		"repeated keys":         {[]byte(`{"keys":[],` + string(es.JWKS()[1:])), "not valid JSON"},
		"trailing data":         {append(es.JWKS(), '{'), "not valid JSON"},
		"key is not an object":  {[]byte(`{"keys":[1]}`), "key 0"},
		"too many keys":         {jwks(t, many...), "more than"},
		"too deep":              {[]byte(`{"keys":` + strings.Repeat("[", 100)), "deeply"},
		"too large":             {make([]byte, maxKeySetSize+1), "larger"},
		"damaged PEM":           {[]byte(damaged), "damaged"},
		"damaged, then good":    {append([]byte(damaged), rs.PEM()...), "damaged"},
		"not what it says":      {block("PUBLIC KEY", []byte{1, 2, 3}), "PEM block 0"},
	} {
		t.Run(name, func(t *testing.T) {
			set, err := ParseKeySet("", tc.document)
			if err == nil {
				t.Fatalf("accepted with %d keys", set.Len())
			}
			if !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %q does not say %q", err, tc.want)
			}
		})
	}
}

// A key has one algorithm, whatever a token asks for.
func TestKeyAlgorithm(t *testing.T) {
	for _, algorithm := range []string{"RS256", "ES256", "ES384", "ES512"} {
		s := signer(t, algorithm, "cluster")
		key, err := keySet(t, "", s.PEM()).Lookup(t.Context(), "", s.KeyID())
		if err != nil || key.Algorithm() != algorithm {
			t.Errorf("%s: %s, %v", algorithm, key.Algorithm(), err)
		}
	}
}

func TestKeySetLookup(t *testing.T) {
	s := signer(t, "ES256", "cluster")
	named, nameless := keySet(t, "https://one.example", s.JWKS()), keySet(t, "", s.JWKS())
	for name, tc := range map[string]struct {
		set         *KeySet
		issuer, kid string
		want        error
	}{
		"any issuer":         {named, "", s.KeyID(), nil},
		"its issuer":         {named, "https://one.example", s.KeyID(), nil},
		"another issuer":     {named, "https://two.example", s.KeyID(), ErrIssuer},
		"no issuer is named": {nameless, "https://one.example", s.KeyID(), ErrIssuer},
		"unknown key":        {named, "https://one.example", "x", ErrUnknownKey},
	} {
		if _, err := tc.set.Lookup(t.Context(), tc.issuer, tc.kid); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", name, err, tc.want)
		}
	}
	if !named.NamesIssuer() || nameless.NamesIssuer() {
		t.Error("NamesIssuer")
	}
}
