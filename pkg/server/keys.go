// SPDX-License-Identifier: Apache-2.0

package server

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"

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
	var publics []jwk
	if trimmed := bytes.TrimSpace(document); len(trimmed) > 0 && trimmed[0] == '{' {
		var doc struct {
			Keys []jwk `json:"keys"`
		}
		if err := json.Unmarshal(trimmed, &doc); err != nil {
			return nil, nil, fmt.Errorf("%w: %w", ErrKeys, err)
		}
		publics = doc.Keys
	} else if publics, err = pemKeys(document); err != nil {
		return nil, nil, err
	}
	var kept []jwk
	var pinned []PinnedKey
	for _, k := range publics {
		public, alg, err := k.public()
		if err != nil {
			// Left out by satoken, too: an encryption key, a short one.
			continue
		}
		der, err := x509.MarshalPKIXPublicKey(public)
		if err != nil {
			continue
		}
		sum := sha256.Sum256(der)
		if k.ID == "" {
			k.ID = base64.RawURLEncoding.EncodeToString(sum[:])
		}
		// What satoken leaves out is not stored either.
		if found, err := set.Lookup(context.Background(), "", k.ID); err != nil || found.Algorithm() != alg {
			continue
		}
		k.Algorithm, k.Use = alg, "sig"
		if slices.ContainsFunc(kept, func(o jwk) bool { return o.ID == k.ID }) {
			continue
		}
		kept = append(kept, k)
		pinned = append(pinned, PinnedKey{ID: k.ID, Algorithm: alg, Fingerprint: "SHA256:" + base64.RawStdEncoding.EncodeToString(sum[:])})
	}
	if len(kept) == 0 {
		return nil, nil, fmt.Errorf("%w: no key that signs tokens", ErrKeys)
	}
	out, err := json.Marshal(struct {
		Keys []jwk `json:"keys"`
	}{kept})
	return out, pinned, err
}

// public is the key itself and the one algorithm for it.
func (k jwk) public() (crypto.PublicKey, string, error) {
	if k.Use != "" && k.Use != "sig" {
		return nil, "", fmt.Errorf("%w: key %q is for %q", ErrKeys, k.ID, k.Use)
	}
	number := func(s string) (*big.Int, error) {
		b, err := base64.RawURLEncoding.DecodeString(strings.TrimRight(s, "="))
		return new(big.Int).SetBytes(b), err
	}
	switch k.Type {
	case "RSA":
		n, err1 := number(k.N)
		e, err2 := number(k.E)
		if err := errors.Join(err1, err2); err != nil || !e.IsInt64() || e.Int64() < 3 || e.Int64() > 1<<31-1 {
			return nil, "", fmt.Errorf("%w: key %q", ErrKeys, k.ID)
		}
		return &rsa.PublicKey{N: n, E: int(e.Int64())}, "RS256", nil
	case "EC":
		curve := map[string]elliptic.Curve{"P-256": elliptic.P256(), "P-384": elliptic.P384(), "P-521": elliptic.P521()}[k.Curve]
		if curve == nil {
			return nil, "", fmt.Errorf("%w: key %q has curve %q", ErrKeys, k.ID, k.Curve)
		}
		x, err1 := number(k.X)
		y, err2 := number(k.Y)
		size := (curve.Params().BitSize + 7) / 8
		if err := errors.Join(err1, err2); err != nil || (x.BitLen()+7)/8 > size || (y.BitLen()+7)/8 > size {
			return nil, "", fmt.Errorf("%w: key %q", ErrKeys, k.ID)
		}
		point := make([]byte, 1+2*size)
		point[0] = 4
		x.FillBytes(point[1 : 1+size])
		y.FillBytes(point[1+size:])
		public, err := ecdsa.ParseUncompressedPublicKey(curve, point)
		if err != nil {
			return nil, "", fmt.Errorf("%w: key %q: %w", ErrKeys, k.ID, err)
		}
		return public, map[string]string{"P-256": "ES256", "P-384": "ES384", "P-521": "ES512"}[k.Curve], nil
	}
	return nil, "", fmt.Errorf("%w: key %q is of type %q", ErrKeys, k.ID, k.Type)
}

// pemKeys are the keys of PEM blocks.
func pemKeys(document []byte) ([]jwk, error) {
	var out []jwk
	for rest := document; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return out, nil
		}
		var public any
		var err error
		switch block.Type {
		case "PUBLIC KEY":
			public, err = x509.ParsePKIXPublicKey(block.Bytes)
		case "RSA PUBLIC KEY":
			public, err = x509.ParsePKCS1PublicKey(block.Bytes)
		case "CERTIFICATE":
			var cert *x509.Certificate
			if cert, err = x509.ParseCertificate(block.Bytes); err == nil {
				public = cert.PublicKey
			}
		}
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrKeys, err)
		}
		encode := base64.RawURLEncoding.EncodeToString
		switch key := public.(type) {
		case *rsa.PublicKey:
			out = append(out, jwk{Type: "RSA", N: encode(key.N.Bytes()), E: encode(big.NewInt(int64(key.E)).Bytes())})
		case *ecdsa.PublicKey:
			point, err := key.Bytes()
			if err != nil {
				return nil, fmt.Errorf("%w: %w", ErrKeys, err)
			}
			size := (len(point) - 1) / 2
			out = append(out, jwk{Type: "EC", Curve: key.Params().Name, X: encode(point[1 : 1+size]), Y: encode(point[1+size:])})
		}
	}
}
