// SPDX-License-Identifier: Apache-2.0

// Package tokens is a stand-in for the part of a Kubernetes API server that
// signs service-account tokens. Tests and the demo use it to make tokens that
// look exactly like the projected ones of Kubernetes 1.32, and bad ones that
// differ from those in one respect.
//
// It is for tests. It checks nothing, and its methods panic where a caller's
// mistake leaves nothing sensible to return.
package tokens

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	_ "crypto/sha512" // registers SHA-384 and SHA-512 for crypto.Hash.New
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"maps"
	"math/big"
	"net/http"
	"strings"
	"time"
)

const (
	// DefaultIssuer is what kubeadm sets on every cluster it makes.
	DefaultIssuer = "https://kubernetes.default.svc.cluster.local"
	// DefaultAudience is the audience of pod identity tokens.
	DefaultAudience = "pods.eks.amazonaws.com"
	// DefaultLifetime is the expirationSeconds that the pod identity webhook
	// asks for.
	DefaultLifetime = 24 * time.Hour
)

// Config says what a Signer is. Its zero value is useful.
type Config struct {
	// Algorithm is RS256, ES256, ES384 or ES512. Empty means RS256.
	Algorithm string
	// RSABits is the size of an RSA key. Zero means 2048, which is what kubeadm
	// makes.
	RSABits int
	// Issuer is the iss claim of tokens that do not set their own. Empty means
	// DefaultIssuer.
	Issuer string
	// Now is the clock that issue times are taken from. Nil means time.Now.
	Now func() time.Time
}

// Signer holds one signing key of a stand-in cluster. It may be used by several
// goroutines at once.
type Signer struct {
	algorithm string
	issuer    string
	kid       string
	private   crypto.Signer
	now       func() time.Time
}

// NewSigner makes a fresh key.
func NewSigner(cfg Config) (*Signer, error) {
	s := &Signer{algorithm: cfg.Algorithm, issuer: cfg.Issuer, now: cfg.Now}
	if s.algorithm == "" {
		s.algorithm = "RS256"
	}
	if s.issuer == "" {
		s.issuer = DefaultIssuer
	}
	if s.now == nil {
		s.now = time.Now
	}
	var err error
	switch s.algorithm {
	case "RS256":
		bits := cfg.RSABits
		if bits == 0 {
			bits = 2048
		}
		s.private, err = rsa.GenerateKey(rand.Reader, bits)
	case "ES256":
		s.private, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case "ES384":
		s.private, err = ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case "ES512":
		s.private, err = ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	default:
		return nil, fmt.Errorf("algorithm %q is none of RS256, ES256, ES384, ES512", s.algorithm)
	}
	if err != nil {
		return nil, fmt.Errorf("making a %s key: %w", s.algorithm, err)
	}
	s.kid, err = KeyID(s.private.Public())
	if err != nil {
		return nil, err
	}
	return s, nil
}

// KeyID is the kid that Kubernetes gives a public key: the unpadded base64url
// form of the SHA-256 of its PKIX DER encoding
// (keyIDFromPublicKey in k8s.io/kubernetes/pkg/serviceaccount).
func KeyID(public crypto.PublicKey) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return "", fmt.Errorf("encoding the public key: %w", err)
	}
	sum := sha256.Sum256(der)
	return base64.RawURLEncoding.EncodeToString(sum[:]), nil
}

// KeyID is the kid of the signer's key.
func (s *Signer) KeyID() string { return s.kid }

// Algorithm is the JWS algorithm the signer signs with.
func (s *Signer) Algorithm() string { return s.algorithm }

// Issuer is the iss claim of the signer's tokens.
func (s *Signer) Issuer() string { return s.issuer }

// Public is the key that verifies the signer's tokens.
func (s *Signer) Public() crypto.PublicKey { return s.private.Public() }

// PEM is the public key as a PKIX "PUBLIC KEY" block: the form of kubeadm's
// sa.pub.
func (s *Signer) PEM() []byte {
	der, err := x509.MarshalPKIXPublicKey(s.Public())
	if err != nil {
		panic(fmt.Sprintf("encoding a key of our own: %v", err))
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
}

// JWKS is the signer's key as the API server publishes it at /openid/v1/jwks.
func (s *Signer) JWKS() []byte { return JWKS(s) }

// JWK is the signer's key as one entry of a key set. Tests may change it.
func (s *Signer) JWK() map[string]any {
	jwk := map[string]any{"use": "sig", "kid": s.kid, "alg": s.algorithm}
	switch key := s.Public().(type) {
	case *rsa.PublicKey:
		jwk["kty"] = "RSA"
		jwk["n"] = encode(key.N.Bytes())
		jwk["e"] = encode(big.NewInt(int64(key.E)).Bytes())
	case *ecdsa.PublicKey:
		point, err := key.Bytes() // 4, X, Y
		if err != nil {
			panic(fmt.Sprintf("encoding a key of our own: %v", err))
		}
		size := (len(point) - 1) / 2
		jwk["kty"] = "EC"
		jwk["crv"] = key.Params().Name
		jwk["x"] = encode(point[1 : 1+size])
		jwk["y"] = encode(point[1+size:])
	}
	return jwk
}

// JWKS is one key set with the keys of all signers: what an API server
// publishes while it changes keys.
func JWKS(signers ...*Signer) []byte {
	keys := make([]map[string]any, 0, len(signers))
	for _, s := range signers {
		keys = append(keys, s.JWK())
	}
	return mustMarshal(map[string]any{"keys": keys})
}

// Discovery is the document of /.well-known/openid-configuration as the API
// server writes it.
func Discovery(issuer, jwksURI string) []byte {
	return mustMarshal(map[string]any{
		"issuer":                                issuer,
		"jwks_uri":                              jwksURI,
		"response_types_supported":              []string{"id_token"},
		"subject_types_supported":               []string{"public"},
		"id_token_signing_alg_values_supported": []string{"RS256"},
	})
}

// DiscoveryHandler answers like an API server's service-account issuer
// discovery: /.well-known/openid-configuration and /openid/v1/jwks. keys is
// called at each request, so that a test can change keys; jwksURI is what the
// discovery document names. Like an API server it answers 406 to a request that
// does not accept what it serves.
func DiscoveryHandler(issuer, jwksURI string, keys func() []byte) http.Handler {
	answer := func(mediaType string, document func() []byte) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			accept := strings.Join(r.Header.Values("Accept"), ",")
			if accept != "" && !strings.Contains(accept, mediaType) && !strings.Contains(accept, "*/*") {
				http.Error(w, "not acceptable", http.StatusNotAcceptable)
				return
			}
			w.Header().Set("Content-Type", mediaType)
			_, _ = w.Write(document())
		}
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /.well-known/openid-configuration", answer("application/json", func() []byte { return Discovery(issuer, jwksURI) }))
	mux.HandleFunc("GET /openid/v1/jwks", answer("application/jwk-set+json", keys))
	return mux
}

// Claims says what a token claims. The zero value is a good token of a pod of
// the service account default/default.
type Claims struct {
	// Namespace and ServiceAccount: empty means "default".
	Namespace      string
	ServiceAccount string
	// ServiceAccountUID: empty means UID of namespace and name.
	ServiceAccountUID string
	// Pod is the pod's name. Empty means the service account's name and "-0".
	Pod string
	// PodUID: empty means UID of namespace and pod name.
	PodUID string
	// Node is the node's name. Empty means "node-1".
	Node string
	// NodeUID: empty means UID of the node name.
	NodeUID string
	// Audience is the one entry of aud. Empty means DefaultAudience.
	Audience string
	// Issuer: empty means the signer's.
	Issuer string
	// IssuedAt is iat and, unless NotBefore is set, nbf. Zero means now.
	IssuedAt  time.Time
	NotBefore time.Time
	// Expiry is exp. Zero means IssuedAt and DefaultLifetime.
	Expiry time.Time
	// ID is jti. Empty means a random one.
	ID string

	// NoPod leaves the pod and node out, as `kubectl create token` does.
	NoPod bool
	// NoNode leaves the node out, as Kubernetes before 1.30 does.
	NoNode bool

	// Set replaces claims by name at the top level, after everything above; a
	// nil value removes the claim.
	Set map[string]any
	// SetKubernetes does the same inside the kubernetes.io claim.
	SetKubernetes map[string]any
	// Header does the same in the JOSE header. It does not change how the token
	// is signed.
	Header map[string]any
}

// UID makes a UUID out of names, the same each time, so that tests need not
// carry UIDs around.
func UID(names ...string) string {
	h := sha256.New()
	for _, name := range names {
		h.Write([]byte(name))
		h.Write([]byte{0})
	}
	return formatUUID(h.Sum(nil))
}

// Header is the JOSE header of the signer's tokens, as JSON.
func (s *Signer) Header(c Claims) []byte {
	return mustMarshal(override(map[string]any{"alg": s.algorithm, "kid": s.kid}, c.Header))
}

// Payload is the claims as JSON, with the keys in the order the API server
// writes them (sorted, as its JWT library does).
func (s *Signer) Payload(c Claims) []byte {
	c = s.withDefaults(c)
	kubernetes := map[string]any{
		"namespace":      c.Namespace,
		"serviceaccount": map[string]any{"name": c.ServiceAccount, "uid": c.ServiceAccountUID},
	}
	if !c.NoPod {
		kubernetes["pod"] = map[string]any{"name": c.Pod, "uid": c.PodUID}
		if !c.NoNode {
			kubernetes["node"] = map[string]any{"name": c.Node, "uid": c.NodeUID}
		}
	}
	return mustMarshal(override(map[string]any{
		"aud":           []string{c.Audience},
		"exp":           c.Expiry.Unix(),
		"iat":           c.IssuedAt.Unix(),
		"iss":           c.Issuer,
		"jti":           c.ID,
		"kubernetes.io": override(kubernetes, c.SetKubernetes),
		"nbf":           c.NotBefore.Unix(),
		"sub":           "system:serviceaccount:" + c.Namespace + ":" + c.ServiceAccount,
	}, c.Set))
}

// Token is a signed token with these claims.
func (s *Signer) Token(c Claims) string {
	return s.Sign(s.Header(c), s.Payload(c))
}

// Sign signs any two byte strings, well-formed or not, with the signer's own
// algorithm whatever the header says.
func (s *Signer) Sign(header, payload []byte) string {
	return Assemble(header, payload, s.signature(signingInput(header, payload)))
}

// Assemble puts a token together from its three decoded parts.
func Assemble(header, payload, signature []byte) string {
	return signingInput(header, payload) + "." + encode(signature)
}

// SignHMAC signs with HMAC-SHA-256 (HS256). With a public key's bytes as the
// secret it makes the classic forgery against verifiers that let the token
// choose the algorithm.
func SignHMAC(header, payload, secret []byte) string {
	mac := hmac.New(sha256.New, secret)
	mac.Write([]byte(signingInput(header, payload)))
	return Assemble(header, payload, mac.Sum(nil))
}

// withDefaults fills in what the caller left empty.
func (s *Signer) withDefaults(c Claims) Claims {
	set := func(field *string, value string) {
		if *field == "" {
			*field = value
		}
	}
	set(&c.Namespace, "default")
	set(&c.ServiceAccount, "default")
	set(&c.ServiceAccountUID, UID("serviceaccount", c.Namespace, c.ServiceAccount))
	set(&c.Pod, c.ServiceAccount+"-0")
	set(&c.PodUID, UID("pod", c.Namespace, c.Pod))
	set(&c.Node, "node-1")
	set(&c.NodeUID, UID("node", c.Node))
	set(&c.Audience, DefaultAudience)
	set(&c.Issuer, s.issuer)
	if c.ID == "" {
		random := make([]byte, 16)
		_, _ = rand.Read(random) // never fails since Go 1.24
		c.ID = formatUUID(random)
	}
	if c.IssuedAt.IsZero() {
		c.IssuedAt = s.now()
	}
	if c.NotBefore.IsZero() {
		c.NotBefore = c.IssuedAt
	}
	if c.Expiry.IsZero() {
		c.Expiry = c.IssuedAt.Add(DefaultLifetime)
	}
	return c
}

// signature signs the JWS signing input. ECDSA signatures are the two numbers
// in fixed width, not DER (RFC 7518 section 3.4).
func (s *Signer) signature(input string) []byte {
	hash := map[string]crypto.Hash{
		"RS256": crypto.SHA256, "ES256": crypto.SHA256, "ES384": crypto.SHA384, "ES512": crypto.SHA512,
	}[s.algorithm]
	h := hash.New()
	h.Write([]byte(input))
	digest := h.Sum(nil)

	if key, ok := s.private.(*ecdsa.PrivateKey); ok {
		r, t, err := ecdsa.Sign(rand.Reader, key, digest)
		if err != nil {
			panic(fmt.Sprintf("signing: %v", err))
		}
		size := (key.Params().BitSize + 7) / 8
		out := make([]byte, 2*size)
		r.FillBytes(out[:size])
		t.FillBytes(out[size:])
		return out
	}
	out, err := s.private.Sign(rand.Reader, digest, hash)
	if err != nil {
		panic(fmt.Sprintf("signing: %v", err))
	}
	return out
}

func signingInput(header, payload []byte) string { return encode(header) + "." + encode(payload) }

func encode(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }

// override replaces values by name; nil removes.
func override(values, with map[string]any) map[string]any {
	maps.Copy(values, with)
	maps.DeleteFunc(values, func(_ string, v any) bool { return v == nil })
	return values
}

// formatUUID gives the first 16 bytes the form of a version 4 UUID.
func formatUUID(b []byte) string {
	var u [16]byte
	copy(u[:], b)
	u[6] = u[6]&0x0f | 0x40
	u[8] = u[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[0:4], u[4:6], u[6:8], u[8:10], u[10:])
}

func mustMarshal(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("encoding: %v", err))
	}
	return b
}
