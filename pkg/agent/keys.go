// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/latchkey-dev/latchkey/pkg/credserver"
	"github.com/latchkey-dev/latchkey/pkg/evidence"
	"github.com/latchkey-dev/latchkey/pkg/satoken"
)

// keyCacheName is the key cache in the state directory.
const keyCacheName = "token-keys.json"

// tokenCheck is how tokens are checked on this node.
type tokenCheck struct {
	verifier credserver.TokenVerifier
	// keys is nil if only the upstream can tell a genuine token.
	keys *satoken.Keys
	// what says it to people.
	what string
}

// unverified lets the upstream judge: without keys a token is only read.
type unverified struct{ parser *satoken.Parser }

func (u unverified) Verify(_ context.Context, raw string) (evidence.Token, error) {
	return u.parser.ParseUnverified(raw)
}

// Claims implements credserver.ClaimReader.
func (unverified) Claims(raw string) (evidence.Token, bool) { return satoken.Claims(raw) }

// verified checks signatures; what is remembered of a token ends with the keys
// it was checked with.
type verified struct {
	*satoken.Verifier
	keys *satoken.Keys
}

// Claims implements credserver.ClaimReader.
func (verified) Claims(raw string) (evidence.Token, bool) { return satoken.Claims(raw) }

// KeyGeneration implements credserver.KeyGenerations.
func (v verified) KeyGeneration() uint64 { return v.keys.Generation() }

// newTokenCheck chooses the source of keys: what the operator named, else the
// API server that the agent's own pod was given, else none. A token's iss claim
// chooses nothing.
func newTokenCheck(cfg *Config, log *slog.Logger) (tokenCheck, error) {
	var source satoken.Source
	var issuers []string
	var err error
	switch {
	case cfg.KeyFile != "":
		source, err = satoken.NewFileSource(cfg.KeyFile)
		if cfg.IssuerURL != "" {
			issuers = []string{cfg.IssuerURL}
		}
	case cfg.IssuerURL != "":
		source, err = satoken.NewIssuerSource(satoken.IssuerConfig{URL: cfg.IssuerURL, CAFile: cfg.IssuerCA})
	case inPod():
		source, err = satoken.NewAPIServerSource(satoken.APIServerConfig{})
	}
	if err != nil {
		return tokenCheck{}, fmt.Errorf("verification keys: %w", err)
	}
	if source == nil {
		p, err := satoken.NewParser(satoken.Config{Audience: cfg.Audience})
		if err != nil {
			return tokenCheck{}, err
		}
		return tokenCheck{verifier: unverified{p}, what: "none: EKS Auth alone judges tokens"}, nil
	}
	kc := satoken.KeysConfig{Source: source, Logger: log}
	if cfg.StateDir != "" {
		kc.CacheFile = filepath.Join(cfg.StateDir, keyCacheName)
	}
	keys, err := satoken.NewKeys(kc)
	if err != nil {
		return tokenCheck{}, fmt.Errorf("verification keys: %w", err)
	}
	if len(issuers) == 0 && !source.NamesIssuer() {
		// A key file for one cluster: whoever signs with its keys is the
		// issuer. satoken wants that said.
		return tokenCheck{}, fmt.Errorf("%w: --jwks has keys but no issuer: give --issuer too, the API server's --service-account-issuer", ErrConfig)
	}
	v, err := satoken.NewVerifier(satoken.Config{Issuers: issuers, Audience: cfg.Audience, Keys: keys})
	if err != nil {
		return tokenCheck{}, fmt.Errorf("verification keys: %w", err)
	}
	return tokenCheck{verifier: verified{v, keys}, keys: keys, what: source.String()}, nil
}

// inPod: the kubelet has mounted a token of the agent's own.
func inPod() bool {
	if os.Getenv("KUBERNETES_SERVICE_HOST") == "" {
		return false
	}
	_, err := os.Stat(filepath.Join(satoken.ServiceAccountDir, "token"))
	return err == nil
}
