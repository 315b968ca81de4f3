// SPDX-License-Identifier: Apache-2.0

package satoken

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/json"
)

const (
	// maxKeySetSize bounds a key document, in bytes.
	maxKeySetSize = 1 << 20
	// maxKeys bounds the entries of one document.
	maxKeys = 256
	// RSA modulus bounds, in bits. Below: RFC 7518 section 3.3. Above: checking a
	// signature costs the square of the size.
	minRSABits, maxRSABits = 2048, 8192
)

// Key is one public key, with the only algorithm it may be used for.
type Key struct {
	id        string
	algorithm jose.SignatureAlgorithm
	public    crypto.PublicKey // *rsa.PublicKey or *ecdsa.PublicKey
}

// ID is the kid that tokens name it by.
func (k Key) ID() string { return k.id }

// Algorithm is RS256, ES256, ES384 or ES512: RSA keys are used with RS256 only,
// an elliptic-curve key with its curve's.
func (k Key) Algorithm() string { return string(k.algorithm) }

// Public is the key itself, an *rsa.PublicKey or an *ecdsa.PublicKey.
func (k Key) Public() crypto.PublicKey { return k.public }

// KeySet is an immutable set of public keys. It is a KeySource that never
// changes.
type KeySet struct {
	issuer  string
	keys    map[string]Key
	order   []string // of the keys in the document, by name
	skipped []error
}

// ParseKeySet reads a JSON Web Key Set (RFC 7517 section 5), or one or more PEM
// blocks: PUBLIC KEY, RSA PUBLIC KEY or CERTIFICATE. A certificate stands for
// its key alone: names and dates are not looked at.
//
// A PEM key, and a JWK without kid, is called what Kubernetes calls it: the
// unpadded base64url of the SHA-256 of its PKIX DER.
//
// issuer is the issuer that these keys belong to; empty if the source names
// none.
//
// Keys that cannot verify a service-account token (encryption keys, other
// types, RSA below 2048 bits) are left out and reported by Skipped. The whole
// document is refused if no key is left, if two different keys share a name, or
// if it contains a private or symmetric key: that secret is out.
func ParseKeySet(issuer string, document []byte) (*KeySet, error) {
	if len(document) > maxKeySetSize {
		return nil, fmt.Errorf("key document is larger than %d bytes", maxKeySetSize)
	}
	set := &KeySet{issuer: issuer, keys: map[string]Key{}}
	var err error
	if strings.HasPrefix(strings.TrimLeft(string(document), " \t\r\n"), "{") {
		err = set.readJWKS(document)
	} else {
		err = set.readPEM(document)
	}
	if err != nil {
		return nil, err
	}
	if len(set.keys) == 0 {
		return nil, fmt.Errorf("key document has no usable key: %w", errors.Join(set.skipped...))
	}
	return set, nil
}

// Len is the number of usable keys.
func (s *KeySet) Len() int { return len(s.keys) }

// Keys are the usable keys in the order of the document.
func (s *KeySet) Keys() []Key {
	out := make([]Key, len(s.order))
	for i, id := range s.order {
		out[i] = s.keys[id]
	}
	return out
}

// Issuer is the issuer that the keys belong to; empty if the source names none.
func (s *KeySet) Issuer() string { return s.issuer }

// Skipped says why keys of the document were left out, one error each.
func (s *KeySet) Skipped() []error { return s.skipped }

// NamesIssuer reports whether Issuer is not empty.
func (s *KeySet) NamesIssuer() bool { return s.issuer != "" }

// Lookup finds a key. Its errors are ErrIssuer and ErrUnknownKey: this set is
// all there is.
func (s *KeySet) Lookup(_ context.Context, issuer, kid string) (Key, error) {
	if issuer != "" && issuer != s.issuer {
		return Key{}, ErrIssuer
	}
	key, ok := s.keys[kid]
	if !ok {
		return Key{}, ErrUnknownKey
	}
	return key, nil
}

func (s *KeySet) readJWKS(document []byte) error {
	if nesting, _ := shape(document); nesting > maxNesting {
		return errors.New("key set is nested too deeply")
	}
	var doc struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(document, &doc); err != nil {
		return fmt.Errorf("key set is not valid JSON: %w", err)
	}
	if len(doc.Keys) > maxKeys {
		return fmt.Errorf("key set has more than %d keys", maxKeys)
	}
	for i, raw := range doc.Keys {
		var members map[string]any
		if err := json.Unmarshal(raw, &members); err != nil {
			return fmt.Errorf("key %d is not a JSON object with unique names: %w", i, err)
		}
		for _, secret := range [...]string{"d", "k", "p", "q", "dp", "dq", "qi", "oth", "priv"} {
			if _, there := members[secret]; there {
				return fmt.Errorf("key %d is a private or symmetric key: it must be replaced, and only public keys be published", i)
			}
		}
		var jwk jose.JSONWebKey
		if err := jwk.UnmarshalJSON(raw); err != nil {
			s.skip("key %d: %w", i, err)
			continue
		}
		if jwk.Use != "" && jwk.Use != "sig" {
			s.skip("key %d is not for signatures (use %q)", i, jwk.Use)
			continue
		}
		if err := s.add(jwk.KeyID, jwk.Algorithm, jwk.Key); err != nil {
			return fmt.Errorf("key %d: %w", i, err)
		}
	}
	return nil
}

func (s *KeySet) readPEM(document []byte) error {
	for i := 0; ; i++ {
		block, rest := pem.Decode(document)
		if block == nil {
			// pem.Decode passes over what it cannot read. A block that was
			// meant to be there must not go missing unnoticed.
			if strings.Contains(string(document), "-----BEGIN") {
				return fmt.Errorf("PEM block %d is damaged", i)
			}
			return nil
		}
		if i == maxKeys {
			return fmt.Errorf("key document has more than %d keys", maxKeys)
		}
		if skipped := document[:len(document)-len(rest)]; strings.Count(string(skipped), "-----BEGIN") > 1 {
			return fmt.Errorf("PEM block %d is damaged", i)
		}
		document = rest

		var public any
		var err error
		switch block.Type {
		case "PUBLIC KEY":
			public, err = x509.ParsePKIXPublicKey(block.Bytes)
		case "RSA PUBLIC KEY":
			public, err = x509.ParsePKCS1PublicKey(block.Bytes)
		case "CERTIFICATE":
			var certificate *x509.Certificate
			if certificate, err = x509.ParseCertificate(block.Bytes); err == nil {
				public = certificate.PublicKey
			}
		default:
			if strings.Contains(block.Type, "PRIVATE KEY") {
				return fmt.Errorf("PEM block %d is a private key: give the public key", i)
			}
			s.skip("PEM block %d has type %q", i, block.Type)
			continue
		}
		if err != nil {
			return fmt.Errorf("PEM block %d (%s): %w", i, block.Type, err)
		}
		if err := s.add("", "", public); err != nil {
			return fmt.Errorf("PEM block %d: %w", i, err)
		}
	}
}

// add takes a key in, or skips it. An empty id is computed. algorithm is what
// the document says the key is for, empty if nothing.
func (s *KeySet) add(id, algorithm string, public any) error {
	usable, err := algorithmOf(public)
	if err != nil {
		s.skip("key %q: %w", id, err)
		return nil
	}
	if algorithm != "" && algorithm != string(usable) {
		s.skip("key %q is for algorithm %q, not %s", id, algorithm, usable)
		return nil
	}
	if id == "" {
		if id, err = kubernetesKeyID(public); err != nil {
			return err
		}
	}
	if len(id) > maxKeyIDSize {
		s.skip("a key's name is longer than %d bytes", maxKeyIDSize)
		return nil
	}
	if other, there := s.keys[id]; !there {
		s.order = append(s.order, id)
	} else if !equalKeys(other.public, public) {
		return fmt.Errorf("two keys are called %q", id)
	}
	s.keys[id] = Key{id: id, algorithm: usable, public: public}
	return nil
}

func (s *KeySet) skip(format string, args ...any) {
	s.skipped = append(s.skipped, fmt.Errorf(format, args...))
}

// algorithmOf is the one algorithm that a key is used with.
func algorithmOf(public any) (jose.SignatureAlgorithm, error) {
	switch key := public.(type) {
	case *rsa.PublicKey:
		if bits := key.N.BitLen(); bits < minRSABits || bits > maxRSABits {
			return "", fmt.Errorf("RSA key has %d bits, not %d to %d", bits, minRSABits, maxRSABits)
		}
		// The bounds crypto/rsa itself sets, found here at load and not at the
		// first token.
		if key.E < 3 || key.E&1 == 0 || int64(key.E) > 1<<31-1 {
			return "", errors.New("RSA key has an unusable exponent")
		}
		return jose.RS256, nil
	case *ecdsa.PublicKey:
		switch key.Curve {
		case elliptic.P256():
			return jose.ES256, nil
		case elliptic.P384():
			return jose.ES384, nil
		case elliptic.P521():
			return jose.ES512, nil
		}
		return "", errors.New("curve is none of P-256, P-384, P-521")
	}
	return "", fmt.Errorf("key type %T is not supported", public)
}

func equalKeys(a, b any) bool {
	key, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && key.Equal(b)
}

// kubernetesKeyID is keyIDFromPublicKey of k8s.io/kubernetes/pkg/serviceaccount.
func kubernetesKeyID(public any) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return "", fmt.Errorf("naming the key: %w", err)
	}
	sum := sha256.Sum256(der)
	return base64.RawURLEncoding.EncodeToString(sum[:]), nil
}
