// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/latchkey-dev/latchkey/test/clients"
)

// runEnv makes the test binary the program itself.
const runEnv = "LATCHKEY_TEST_RUN_AWSGO"

func TestMain(m *testing.M) {
	if os.Getenv(runEnv) != "" {
		os.Exit(run())
	}
	os.Exit(m.Run())
}

func TestExitStatus(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "good" {
			http.Error(w, "refused", http.StatusForbidden)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.Write([]byte(`{"AccessKeyId":"ASIATEST","SecretAccessKey":"x","Token":"y","Expiration":"2099-01-02T03:04:05Z"}`))
	}))
	defer server.Close()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, token, stdin string
		args               []string
		want               int
		out                string
	}{
		{"credentials", "good", "", nil, 0, `"access_key_id":"ASIATEST"`},
		{"refusal", "bad", "", nil, 1, `"error":`},
		{"hold", "good", "get\n", []string{"-hold"}, 0, `"status":200`},
		{"hold, refusal", "bad", "get\n", []string{"-hold"}, 0, `"status":403`},
		{"hold, unknown command", "good", "put\n", []string{"-hold"}, 2, ""},
		{"unknown flag", "good", "", []string{"-secret"}, 2, ""},
		{"argument", "good", "", []string{"x"}, 2, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "token")
			if err := os.WriteFile(file, []byte(tt.token), 0o600); err != nil {
				t.Fatal(err)
			}
			cmd := exec.CommandContext(t.Context(), exe, tt.args...)
			cmd.Env = []string{
				runEnv + "=1", "GORACE=atexit_sleep_ms=0", "HOME=" + t.TempDir(), "AWS_EC2_METADATA_DISABLED=true",
				clients.EnvURI + "=" + server.URL, clients.EnvTokenFile + "=" + file,
			}
			cmd.Stdin = strings.NewReader(tt.stdin)
			out, err := cmd.Output()
			var exit *exec.ExitError
			if err != nil && !errors.As(err, &exit) {
				t.Fatal(err)
			}
			if got := cmd.ProcessState.ExitCode(); got != tt.want || !strings.Contains(string(out), tt.out) {
				t.Errorf("status %d, output %s; want %d, %s", got, out, tt.want, tt.out)
			}
			if len(out) > 0 && !json.Valid(out) {
				t.Errorf("the output is not JSON: %s", out)
			}
		})
	}
}
