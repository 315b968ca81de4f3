// SPDX-License-Identifier: Apache-2.0

package server

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"time"

	"k8s.io/client-go/rest"

	"github.com/latchkey-dev/latchkey/pkg/tokencheck"
)

// FetchedKeys are a cluster's token keys as its API server publishes them now.
type FetchedKeys struct {
	// Server is the API server's URL.
	Server string
	// Issuer is what the API server says that its tokens have in iss.
	Issuer string
	// Document is the JSON Web Key Set.
	Document []byte
}

// FetchKeys asks the API server that a kubeconfig names for its token keys
// (service account issuer discovery, Kubernetes 1.21). It trusts the CA of the
// kubeconfig and nothing else. The kubeconfig's user needs the ClusterRole
// system:service-account-issuer-discovery, which every service account has.
//
// It is for an operator who pins what it returns, after a look. Nothing fetches
// keys by itself: whoever could answer in the API server's place could sign
// tokens of every pod.
func FetchKeys(ctx context.Context, kubeconfig, kubecontext string) (FetchedKeys, error) {
	cfg, err := tokencheck.RESTConfig(kubeconfig, kubecontext)
	if err != nil {
		return FetchedKeys{}, fmt.Errorf("%w: %w", ErrConfig, err)
	}
	cfg.Timeout = 30 * time.Second
	client, err := rest.HTTPClientFor(cfg)
	if err != nil {
		return FetchedKeys{}, fmt.Errorf("kubeconfig %s: %w", kubeconfig, err)
	}
	base, _, err := rest.DefaultServerUrlFor(cfg)
	if err != nil {
		return FetchedKeys{}, fmt.Errorf("kubeconfig %s: %w", kubeconfig, err)
	}
	get := func(path string) ([]byte, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, base.JoinPath(path).String(), nil)
		if err != nil {
			return nil, err
		}
		resp, err := client.Do(req)
		if err != nil {
			return nil, err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return nil, fmt.Errorf("%s: %s", path, resp.Status)
		}
		return io.ReadAll(io.LimitReader(resp.Body, maxKeyDocument))
	}
	out := FetchedKeys{Server: base.String()}
	discovery, err := get("/.well-known/openid-configuration")
	if err != nil {
		return FetchedKeys{}, fmt.Errorf("ask the API server for its issuer: %w", err)
	}
	var d struct {
		Issuer string `json:"issuer"`
	}
	if err := json.Unmarshal(discovery, &d); err != nil || d.Issuer == "" {
		return FetchedKeys{}, fmt.Errorf("ask the API server %s for its issuer: the answer names none", out.Server)
	}
	out.Issuer = d.Issuer
	// From the API server itself: the jwks_uri that it publishes is for others
	// and may lead anywhere.
	if out.Document, err = get("/openid/v1/jwks"); err != nil {
		return FetchedKeys{}, fmt.Errorf("ask the API server for its keys: %w", err)
	}
	return out, nil
}

// maxKeyDocument bounds what an API server may answer.
const maxKeyDocument = 1 << 20
