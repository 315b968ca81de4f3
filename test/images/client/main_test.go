// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
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
const runEnv = "LATCHKEY_TEST_RUN_CLIENT"

func TestMain(m *testing.M) {
	if os.Getenv(runEnv) != "" {
		os.Exit(run())
	}
	os.Exit(m.Run())
}

func TestVerbs(t *testing.T) {
	const secret = "not-to-be-printed"
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "good" {
			http.Error(w, "refused "+r.Header.Get("Authorization"), http.StatusForbidden)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.Write([]byte(`{"AccessKeyId":"ASIATEST","SecretAccessKey":"` + secret + `","Token":"` + secret + `","AccountId":"222222222222","Expiration":"2099-01-02T03:04:05Z"}`))
	}))
	defer server.Close()
	gone := httptest.NewServer(nil)
	gone.Close()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, uri, token, stdin string
		args                    []string
		want                    int
		out                     string
	}{
		{"fetch", server.URL, "good", "", []string{"fetch"}, 0, `"account_id":"222222222222"`},
		{"fetch, refused", server.URL, "bad", "", []string{"fetch"}, 1, `"error":`},
		{"get", server.URL, "good", "", []string{"get"}, 0, `"status":200`},
		{"get, refused", server.URL, "bad", "", []string{"get"}, 0, `"status":403`},
		{"get, a token of its own", server.URL, "bad", "good\n", []string{"get", "-"}, 0, `"status":200`},
		{"get, nobody there", gone.URL, "good", "", []string{"get"}, 1, `"status":0`},
		{"must", server.URL, "good", "", []string{"must"}, 0, `"status":200`},
		{"must, refused", server.URL, "bad", "", []string{"must"}, 1, `"status":403`},
		{"connection", server.URL, "good", "get\nget\n", []string{"connection"}, 0, `"connection":1`},
		{"ask, no interval", server.URL, "good", "", []string{"ask", "0s", "x"}, 1, ""},
		{"no verb", server.URL, "good", "", nil, 2, ""},
		{"unknown verb", server.URL, "good", "", []string{"put"}, 2, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			file := filepath.Join(dir, "token")
			if err := os.WriteFile(file, []byte(tt.token), 0o600); err != nil {
				t.Fatal(err)
			}
			cmd := exec.CommandContext(t.Context(), exe, tt.args...)
			cmd.Env = []string{
				runEnv + "=1", "GORACE=atexit_sleep_ms=0", "HOME=" + dir, "TMPDIR=" + dir, "AWS_EC2_METADATA_DISABLED=true",
				clients.EnvURI + "=" + tt.uri, clients.EnvTokenFile + "=" + file,
			}
			cmd.Stdin = strings.NewReader(tt.stdin)
			var out, errOut bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &errOut
			_ = cmd.Run() // The status says it all.
			if got := cmd.ProcessState.ExitCode(); got != tt.want || !strings.Contains(out.String(), tt.out) {
				t.Errorf("status %d, output %s%s; want %d, %s", got, &out, &errOut, tt.want, tt.out)
			}
			for line := range strings.Lines(out.String()) {
				if !json.Valid([]byte(line)) {
					t.Errorf("not JSON: %s", line)
				}
			}
			if strings.Contains(out.String()+errOut.String(), secret) {
				t.Error("a secret was printed")
			}
		})
	}
}
