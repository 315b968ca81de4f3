// SPDX-License-Identifier: Apache-2.0

// Package satoken reads and verifies Kubernetes service-account tokens: JSON Web
// Tokens (RFC 7519) that the API server signs, the kubelet projects into a pod,
// and the pod presents to be given credentials.
//
// A Verifier checks form, times, issuer, audience, the binding to a pod, and the
// signature. The keys come from a KeySource that the operator has named: a file,
// an issuer's URL or the API server (Keys with one of the Sources). They never
// come from where a token says they are: whoever makes a token also writes its
// iss claim, and all clusters made by kubeadm share one.
//
// A Parser does the same without keys, for nodes that have none. What it returns
// is a claim, not a fact, and says so (Token.Verified is false).
//
// # What identifies a token
//
// Token.ID is the SHA-256 of the decoded header and payload: what is signed. It
// leaves the signature out, because one token has many: the holder of an ECDSA
// signature (r, s) can write (r, -s), and base64 has unused bits (which this
// package refuses anyway). So it counts tokens, and it ties audit records
// together. It does not prove anything: whoever has seen header and payload can
// put any signature behind them. Memory of an earlier verification must
// therefore be keyed by the token's exact bytes, never by ID, and so must
// anything kept for a token whose Verified is false.
package satoken

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

const (
	// DefaultAudience is the audience of tokens that the pod identity webhook
	// projects.
	DefaultAudience = "pods.eks.amazonaws.com"
	// DefaultLeeway is how far the node's clock may be from the API server's.
	DefaultLeeway = 10 * time.Second
)

// KeySource finds the key that a token names. Keys is one, KeySet another.
type KeySource interface {
	// Lookup returns the key called kid. If issuer is not empty, it is the
	// token's, and must be the one that the source itself names.
	//
	// Errors match ErrUnknownKey if there is no such key, ErrIssuer if the
	// source names another issuer, both only if that is certain and recent.
	// Everything else means that nothing is known.
	Lookup(ctx context.Context, issuer, kid string) (Key, error)
	// NamesIssuer reports whether the source names an issuer of its own.
	NamesIssuer() bool
}

// Config is what a Verifier or a Parser is made of.
type Config struct {
	// Issuers are the accepted iss claims, compared byte by byte. More than one
	// is for a change of issuer. Empty means, for a Verifier, the one that Keys
	// names, and for a Parser any.
	Issuers []string
	// Audience must be among the token's. Empty means DefaultAudience.
	Audience string
	// Leeway is allowed on exp, nbf and iat. Zero means DefaultLeeway, a
	// negative value none.
	Leeway time.Duration
	// Keys is required for a Verifier and must be nil for a Parser.
	Keys KeySource
	// Now is the clock. Nil means time.Now.
	Now func() time.Time
}

// Parser checks tokens without keys. It may be used by several goroutines.
type Parser struct {
	issuers  []string
	audience string
	leeway   time.Duration
	now      func() time.Time
}

// NewParser makes a Parser. It refuses a Config with Keys: whoever has keys
// means to verify.
func NewParser(cfg Config) (*Parser, error) {
	if cfg.Keys != nil {
		return nil, errors.New("a parser does not use keys: make a verifier")
	}
	return newParser(cfg)
}

func newParser(cfg Config) (*Parser, error) {
	p := &Parser{
		issuers:  slices.Clone(cfg.Issuers),
		audience: cfg.Audience,
		leeway:   cfg.Leeway,
		now:      cfg.Now,
	}
	if slices.Contains(p.issuers, "") {
		return nil, errors.New("an accepted issuer is empty")
	}
	if p.audience == "" {
		p.audience = DefaultAudience
	}
	switch {
	case p.leeway == 0:
		p.leeway = DefaultLeeway
	case p.leeway < 0:
		p.leeway = 0
	}
	if p.now == nil {
		p.now = time.Now
	}
	return p, nil
}

// ParseUnverified makes every check that needs no key. The result's Verified is
// false: anybody can have made it. Errors are of type *Error and final.
func (p *Parser) ParseUnverified(raw string) (evidence.Token, error) {
	c, err := p.check(raw)
	if err != nil {
		return evidence.Token{}, err // a nil *Error is not a nil error
	}
	return c.token, nil
}

// check makes every check that needs no key.
func (p *Parser) check(raw string) (*claims, *Error) {
	c, err := parse(raw)
	if err != nil {
		return nil, err
	}
	now := p.now()
	if !now.Before(c.expiry.Add(p.leeway)) {
		return nil, refuse(evidence.ReasonTokenExpired, "token is expired")
	}
	if latest := now.Add(p.leeway); latest.Before(c.notBefore) || latest.Before(c.issuedAt) {
		return nil, refuse(evidence.ReasonTokenNotYetValid, "token is not valid yet")
	}
	if len(p.issuers) > 0 && !slices.Contains(p.issuers, c.issuer) {
		return nil, refuse(evidence.ReasonTokenIssuer, "token issuer is not this cluster's")
	}
	if !slices.Contains(c.audience, p.audience) {
		return nil, refuse(evidence.ReasonTokenAudience, "token audience must be "+p.audience)
	}
	return c, nil
}

// Claims reads what a token says of itself and checks nothing: not its time,
// its audience, its issuer or its signature. It is for telling people about a
// token that was refused. False if it is not a token of a service account.
func Claims(raw string) (evidence.Token, bool) {
	c, err := parse(raw)
	if err != nil {
		return evidence.Token{}, false
	}
	return c.token, true
}

// Verifier checks tokens. It may be used by several goroutines.
type Verifier struct {
	parser *Parser
	keys   KeySource
}

// NewVerifier makes a Verifier. It refuses a Config that would accept tokens of
// any issuer: no Issuers, and Keys that name none.
func NewVerifier(cfg Config) (*Verifier, error) {
	if cfg.Keys == nil {
		return nil, errors.New("a verifier needs keys")
	}
	if len(cfg.Issuers) == 0 && !cfg.Keys.NamesIssuer() {
		return nil, errors.New("the key source names no issuer: list the accepted ones")
	}
	parser, err := newParser(cfg)
	if err != nil {
		return nil, err
	}
	return &Verifier{parser: parser, keys: cfg.Keys}, nil
}

// Verify checks a token: form, times, issuer, audience, pod, key, signature, in
// this order, so that no junk causes keys to be fetched. Errors are of type
// *Error. raw is not kept.
//
// Leeway allows a token to be accepted for a moment after its Expiry; whoever
// keeps the result compares Expiry itself.
//
// It may wait for keys to be fetched, for as long as ctx allows; then the error
// is ErrKeysUnavailable.
func (v *Verifier) Verify(ctx context.Context, raw string) (evidence.Token, error) {
	c, refused := v.parser.check(raw)
	if refused != nil {
		return evidence.Token{}, refused
	}
	issuer := ""
	if len(v.parser.issuers) == 0 {
		issuer = c.issuer
	}
	key, err := v.keys.Lookup(ctx, issuer, c.keyID)
	switch {
	case err == nil:
	case errors.Is(err, ErrUnknownKey):
		return evidence.Token{}, refuse(evidence.ReasonTokenUnknownKey, "signed with a key that is not this cluster's")
	case errors.Is(err, ErrIssuer):
		return evidence.Token{}, refuse(evidence.ReasonTokenIssuer, "token issuer is not this cluster's")
	default:
		return evidence.Token{}, &Error{
			reason: evidence.ReasonKeysUnavailable, detail: "keys are unavailable, try again", cause: err,
		}
	}
	// The key decides how it is used, never the token: this is what stops an
	// RSA key's bytes from being used as an HMAC secret.
	if c.algorithm != key.algorithm {
		return evidence.Token{}, refuse(evidence.ReasonTokenAlgorithm, "signature algorithm is not the key's")
	}
	if err := verifySignature(raw, c.payload, key); err != nil {
		return evidence.Token{}, refuse(evidence.ReasonTokenSignature, "signature is not valid")
	}
	c.token.Verified = true
	return c.token, nil
}

func verifySignature(raw string, payload []byte, key Key) error {
	signed, err := jose.ParseSignedCompact(raw, []jose.SignatureAlgorithm{key.algorithm})
	if err != nil {
		return fmt.Errorf("parsing: %w", err)
	}
	verified, err := signed.Verify(key.public)
	if err != nil {
		return fmt.Errorf("verifying: %w", err)
	}
	// Two parsers have read this token. What was verified must be what was
	// understood.
	if !bytes.Equal(verified, payload) {
		return errors.New("the library verified other bytes")
	}
	return nil
}
