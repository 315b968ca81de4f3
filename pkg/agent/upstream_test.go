// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/eksauth"
	"github.com/latchkey-dev/latchkey/pkg/nodeauth"
)

// lonely is an environment in which the SDK finds nothing of the machine's.
func lonely(t *testing.T) {
	t.Helper()
	dir := t.TempDir()
	for _, v := range os.Environ() {
		if name, _, _ := strings.Cut(v, "="); strings.HasPrefix(name, "AWS_") {
			t.Setenv(name, "")
			os.Unsetenv(name)
		}
	}
	t.Setenv("HOME", dir)
	t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
	t.Setenv("AWS_CONFIG_FILE", filepath.Join(dir, "none"))
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", filepath.Join(dir, "credentials"))
}

func TestNewUpstreamNeedsARegion(t *testing.T) {
	lonely(t)
	cfg := good()
	_, err := newUpstream(t.Context(), &cfg, slog.New(slog.DiscardHandler), nil, nil)
	if !errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), "AWS_REGION") {
		t.Errorf("got %v, want a word about AWS_REGION", err)
	}
}

func TestEndpointOfUpstream(t *testing.T) {
	for name, c := range map[string]struct{ flag, variable, service, want string }{
		"the region's":                   {"", "", "", "https://eks-auth.eu-central-1.api.aws"},
		"the flag":                       {"https://a.example", "https://b.example", "https://c.example", "https://a.example"},
		"the service's variable":         {"", "https://b.example", "https://c.example", "https://c.example"},
		"the variable for every service": {"", "https://b.example", "", "https://b.example"},
	} {
		t.Run(name, func(t *testing.T) {
			lonely(t)
			t.Setenv("AWS_REGION", "eu-central-1")
			if c.variable != "" {
				t.Setenv("AWS_ENDPOINT_URL", c.variable)
			}
			if c.service != "" {
				t.Setenv("AWS_ENDPOINT_URL_EKS_AUTH", c.service)
			}
			cfg := good()
			cfg.Endpoint = c.flag
			client, err := newUpstream(t.Context(), &cfg, slog.New(slog.DiscardHandler), nil, nil)
			if err != nil {
				t.Fatal(err)
			}
			if got := client.Endpoint(); !strings.HasPrefix(got, c.want) {
				t.Errorf("got %s, want %s", got, c.want)
			}
		})
	}
}

// --rotate-credentials: another process replaces the file, and what it says
// counts from the next minute on.
func TestCredentialsFileIsReadAnew(t *testing.T) {
	lonely(t)
	file := os.Getenv("AWS_SHARED_CREDENTIALS_FILE")
	write := func(key string) {
		t.Helper()
		text := fmt.Sprintf("[default]\naws_access_key_id = %s\naws_secret_access_key = s\naws_session_token = t\n", key)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := (credentialsFile{}).Retrieve(t.Context()); err == nil {
		t.Error("no file, no error")
	}
	for _, key := range []string{"AKIAFIRST", "AKIASECOND"} {
		write(key)
		c, err := (credentialsFile{}).Retrieve(t.Context())
		if err != nil || c.AccessKeyID != key || c.SessionToken != "t" {
			t.Fatalf("got %s, %v; want %s", c.AccessKeyID, err, key)
		}
		if left := time.Until(c.Expires); !c.CanExpire || left > rotateInterval {
			t.Errorf("believed for %v, want at most %v", left, rotateInterval)
		}
	}
	if err := os.WriteFile(file, []byte("[other]\naws_access_key_id = A\naws_secret_access_key = s\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if c, err := (credentialsFile{}).Retrieve(t.Context()); err == nil {
		t.Errorf("keys of another profile: %s", c.AccessKeyID)
	}
}

// With a node token nothing else is searched for credentials, and what the
// server gives is signed with.
func TestNodeTokenIsTheOnlySource(t *testing.T) {
	lonely(t)
	t.Setenv("AWS_REGION", "eu-central-1")
	t.Setenv("AWS_ACCESS_KEY_ID", "AKIAOFTHEENVIRONMENT")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "x")
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte("a.b.c"), 0o600); err != nil {
		t.Fatal(err)
	}
	var signed []string
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == nodeauth.Path("prod") {
			fmt.Fprintf(w, `{"node":{"name":"n1"},"credentials":{"accessKeyId":"LKNODEEXAMPLE","secretAccessKey":"secret","sessionToken":"session","expiration":%d}}`,
				time.Now().Add(time.Hour).Unix())
			return
		}
		signed = append(signed, r.Header.Get("Authorization"))
		w.WriteHeader(http.StatusBadRequest)
	}))
	defer server.Close()

	cfg := good()
	cfg.ClusterName, cfg.NodeTokenFile = "prod", file
	log := slog.New(slog.DiscardHandler)
	if _, err := newUpstream(t.Context(), &cfg, log, nil, nil); !errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), "--endpoint") {
		t.Errorf("without an endpoint: %v", err)
	}
	cfg.Endpoint = server.URL
	client, err := newUpstream(t.Context(), &cfg, log, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.AssumeRoleForPodIdentity(t.Context(), "a.b.c"); err == nil {
		t.Error("the stand-in refuses everything, and yet there are credentials")
	}
	if len(signed) == 0 || !strings.Contains(signed[0], "Credential=LKNODEEXAMPLE/") {
		t.Errorf("signed with %q, want the server's key", signed)
	}
}

// A private CA is replaced while the agent runs: the node's credentials and the
// pods' are fetched from the server of the new CA without a restart, wherever
// the file is named.
func TestChangedCABundle(t *testing.T) {
	for name, set := range map[string]func(t *testing.T, bundle string){
		"AWS_CA_BUNDLE": func(t *testing.T, bundle string) { t.Setenv("AWS_CA_BUNDLE", bundle) },
		"profile": func(t *testing.T, bundle string) {
			if err := os.WriteFile(os.Getenv("AWS_CONFIG_FILE"), []byte("[default]\nca_bundle = "+bundle+"\n"), 0o600); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			lonely(t)
			t.Setenv("AWS_REGION", "eu-central-1")
			dir := t.TempDir()
			token, bundle := filepath.Join(dir, "token"), filepath.Join(dir, "ca.pem")
			write := func(file string, content []byte) {
				t.Helper()
				if err := os.WriteFile(file+".new", content, 0o600); err != nil {
					t.Fatal(err)
				}
				if err := os.Rename(file+".new", file); err != nil {
					t.Fatal(err)
				}
			}
			write(token, []byte("a.b.c"))
			var asked sync.Map
			server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				asked.Store(r.URL.Path, true)
				if r.URL.Path != nodeauth.Path("prod") {
					w.Header().Set("X-Amzn-Errortype", "ResourceNotFoundException")
					w.WriteHeader(http.StatusNotFound)
					return
				}
				fmt.Fprintf(w, `{"node":{"name":"n1"},"credentials":{"accessKeyId":"LKNODEEXAMPLE","secretAccessKey":"secret","sessionToken":"session","expiration":%d}}`,
					time.Now().Add(time.Hour).Unix())
			}))
			server.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError) // of handshakes before the change
			server.StartTLS()
			defer server.Close()
			write(bundle, otherCA(t))
			set(t, bundle)

			cfg := good()
			cfg.ClusterName, cfg.NodeTokenFile, cfg.Endpoint = "prod", token, server.URL
			client, err := newUpstream(t.Context(), &cfg, slog.New(slog.DiscardHandler), nil, nil)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := client.AssumeRoleForPodIdentity(t.Context(), "a.b.c"); !errors.Is(err, eksauth.ErrNodeCredentials) {
				t.Fatalf("a server of another CA: %v", err)
			}
			write(bundle, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}))
			// The file and a provider that has failed are not asked at once again.
			deadline := time.Now().Add(time.Minute)
			for !errors.Is(err, eksauth.ErrNotFound) {
				if time.Now().After(deadline) {
					t.Fatalf("the new CA is not trusted: %v", err)
				}
				time.Sleep(50 * time.Millisecond)
				_, err = client.AssumeRoleForPodIdentity(t.Context(), "a.b.c")
			}
			for _, path := range []string{nodeauth.Path("prod"), "/clusters/prod/assume-role-for-pod-identity"} {
				if _, ok := asked.Load(path); !ok {
					t.Errorf("nobody asked %s", path)
				}
			}
		})
	}
}

// otherCA is a certificate that vouches for nobody here.
func otherCA(t *testing.T) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), IsCA: true, BasicConstraintsValid: true, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}
