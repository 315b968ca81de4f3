// SPDX-License-Identifier: Apache-2.0

package server

import (
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/latchkey-dev/latchkey/pkg/association"
	"github.com/latchkey-dev/latchkey/test/standin/tokens"
)

// A kubeconfig can be another cluster's, and keys change.
func TestCompareKeys(t *testing.T) {
	a, b := signer(t, "RS256"), signer(t, "ES256")
	for name, c := range map[string]struct {
		pinned    []byte
		published []byte
		issuer    string
		level     string
		text      string
	}{
		"the same":              {a.JWKS(), a.JWKS(), a.Issuer(), LevelOK, "https://api"},
		"pinned from PEM":       {a.PEM(), a.JWKS(), a.Issuer(), LevelOK, ""},
		"another cluster's":     {a.JWKS(), b.JWKS(), a.Issuer(), LevelFail, "another cluster's API server, or has new keys"},
		"another issuer":        {a.JWKS(), a.JWKS(), "https://other", LevelFail, "https://other"},
		"a key to come":         {a.JWKS(), tokens.JWKS(a, b), a.Issuer(), LevelWarn, "not pinned, and tokens signed with those are refused: " + b.KeyID()},
		"a key that was":        {tokens.JWKS(a, b), a.JWKS(), a.Issuer(), LevelWarn, "not published by https://api: " + b.KeyID()},
		"nothing to look at":    {a.JWKS(), []byte(`{"keys":[]}`), a.Issuer(), LevelWarn, "cannot be compared"},
		"the kid of another":    {a.JWKS(), []byte(strings.Replace(string(b.JWKS()), b.KeyID(), a.KeyID(), 1)), a.Issuer(), LevelFail, ""},
		"another and the kid's": {tokens.JWKS(a, b), b.JWKS(), a.Issuer(), LevelWarn, a.KeyID()},
	} {
		keys, _, err := PinKeys(c.pinned)
		if err != nil {
			t.Fatal(err)
		}
		f := compareKeys(association.Cluster{Name: "prod", Issuers: []string{"https://before", a.Issuer()}, Keys: keys},
			FetchedKeys{Server: "https://api", Issuer: c.issuer, Document: c.published})
		if f.Level != c.level || !strings.Contains(f.Found, c.text) || (f.Level == LevelOK) != (f.Fix == "") {
			t.Errorf("%s: %+v", name, f)
		}
	}
}

// The doctor must not find well what exchanges refuse to use.
func TestDoctorReadsKubeconfigsAsExchangesDo(t *testing.T) {
	api := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusCreated)
		fmt.Fprint(w, `{"kind":"TokenReview","apiVersion":"authentication.k8s.io/v1","status":{}}`)
	}))
	defer api.Close()
	dir := t.TempDir()
	ca := filepath.Join(dir, "ca.crt")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: api.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	for trust, well := range map[string]bool{"certificate-authority: ca.crt": true, "insecure-skip-tls-verify: true": false} {
		file := filepath.Join(dir, "kubeconfig")
		text := fmt.Sprintf("clusters: [{name: a, cluster: {server: '%s', %s}}]\ncontexts: [{name: a, context: {cluster: a}}]\ncurrent-context: a\n", api.URL, trust)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := reviewNothing(t.Context(), &association.TokenReview{Kubeconfig: file}); (err == nil) != well {
			t.Errorf("%s: %v", trust, err)
		}
		if _, err := FetchKeys(t.Context(), file, ""); err == nil || strings.Contains(err.Error(), "insecure") == well {
			t.Errorf("%s: keys: %v", trust, err)
		}
	}
}
