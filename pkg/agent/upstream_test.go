// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

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
