// SPDX-License-Identifier: Apache-2.0

// Package trial runs a client program in its own tests, as a process with an
// environment of its own: the test binary is the program.
package trial

import (
	"bytes"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/latchkey-dev/latchkey/test/clients"
)

const (
	// Good is the only token that Endpoint takes.
	Good = "good"
	// Secret is in every secret that Endpoint hands out.
	Secret = "not-to-be-printed"
)

// runEnv makes the test binary the program.
const runEnv = "LATCHKEY_TEST_RUN_CLIENT"

// Main is TestMain of a program whose main function is os.Exit(run()).
func Main(m *testing.M, run func() int) {
	if os.Getenv(runEnv) != "" {
		os.Exit(run())
	}
	os.Exit(m.Run())
}

// Endpoint answers credentials ASIATEST of account 222222222222, and 403 with
// the token in it without the good one. It returns its URL.
func Endpoint(t *testing.T) string {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if token := r.Header.Get("Authorization"); token != Good {
			http.Error(w, "refused "+token, http.StatusForbidden)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write([]byte(`{"AccessKeyId":"ASIATEST","SecretAccessKey":"` + Secret + `","Token":"` + Secret +
			`","AccountId":"222222222222","Expiration":"2099-01-02T03:04:05Z"}`))
	}))
	t.Cleanup(server.Close)
	return server.URL
}

// Run runs the program with an endpoint, a pod's token, its standard input and
// its arguments, and returns its exit status and what it printed.
func Run(t *testing.T, uri, token, stdin string, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	file := filepath.Join(dir, "token")
	if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), exe, args...)
	cmd.Env = []string{
		runEnv + "=1", "GORACE=atexit_sleep_ms=0", "HOME=" + dir, "TMPDIR=" + dir, "AWS_EC2_METADATA_DISABLED=true",
		clients.EnvURI + "=" + uri, clients.EnvTokenFile + "=" + file,
	}
	cmd.Stdin = strings.NewReader(stdin)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), errOut.String()
}
