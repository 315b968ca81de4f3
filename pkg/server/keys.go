// SPDX-License-Identifier: Apache-2.0

package server

import (
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"

	"github.com/latchkey-dev/latchkey/pkg/satoken"
)

// PinnedKey is one public key that a cluster's tokens may be signed with, as
// people compare it.
type PinnedKey struct {
	// ID is the kid that tokens name it by.
	ID string `json:"kid"`
	// Algorithm is RS256, ES256, ES384 or ES512.
	Algorithm string `json:"alg"`
	// Fingerprint is "SHA256:" and the unpadded base64 of the SHA-256 of the
	// key's PKIX DER, the form that ssh-keygen prints its own in.
	//
	//	openssl pkey -pubin -in sa.pub -outform DER | openssl dgst -sha256 -binary | base64
	//
	// gives the same but for the padding.
	Fingerprint string `json:"fingerprint"`
}

// jwk has the members of a public key (RFC 7517, RFC 7518 section 6) and no
// others, so that what is stored can hold no private one.
type jwk struct {
	Type      string `json:"kty"`
	Use       string `json:"use,omitempty"`
	ID        string `json:"kid"`
	Algorithm string `json:"alg"`
	N         string `json:"n,omitempty"`
	E         string `json:"e,omitempty"`
	Curve     string `json:"crv,omitempty"`
	X         string `json:"x,omitempty"`
	Y         string `json:"y,omitempty"`
}

// ErrKeys: a document from which no key can be pinned.
var ErrKeys = errors.New("unusable token keys")

// PinKeys reads a cluster's public token keys, a JSON Web Key Set or PEM such as
// kubeadm's sa.pub, and gives them as the JSON Web Key Set that is stored, with
// what people compare. It refuses what pkg/satoken refuses: a document without a
// usable key, with two keys of one name, or with a private one.
func PinKeys(document []byte) (json.RawMessage, []PinnedKey, error) {
	set, err := satoken.ParseKeySet("", document)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrKeys, err)
	}
	var kept []jwk
	var pinned []PinnedKey
	for _, key := range set.Keys() {
		k, err := jwkOf(key)
		if err != nil {
			return nil, nil, fmt.Errorf("%w: key %q: %w", ErrKeys, key.ID(), err)
		}
		der, err := x509.MarshalPKIXPublicKey(key.Public())
		if err != nil {
			return nil, nil, fmt.Errorf("%w: key %q: %w", ErrKeys, key.ID(), err)
		}
		sum := sha256.Sum256(der)
		kept = append(kept, k)
		pinned = append(pinned, PinnedKey{ID: k.ID, Algorithm: k.Algorithm, Fingerprint: "SHA256:" + base64.RawStdEncoding.EncodeToString(sum[:])})
	}
	out, err := json.Marshal(struct {
		Keys []jwk `json:"keys"`
	}{kept})
	return out, pinned, err
}

func jwkOf(key satoken.Key) (jwk, error) {
	k := jwk{Use: "sig", ID: key.ID(), Algorithm: key.Algorithm()}
	encode := base64.RawURLEncoding.EncodeToString
	switch public := key.Public().(type) {
	case *rsa.PublicKey:
		k.Type, k.N, k.E = "RSA", encode(public.N.Bytes()), encode(big.NewInt(int64(public.E)).Bytes())
	case *ecdsa.PublicKey:
		point, err := public.Bytes()
		if err != nil {
			return jwk{}, err
		}
		size := (len(point) - 1) / 2
		k.Type, k.Curve, k.X, k.Y = "EC", public.Params().Name, encode(point[1:1+size]), encode(point[1+size:])
	default:
		return jwk{}, fmt.Errorf("type %T", public)
	}
	return k, nil
}
