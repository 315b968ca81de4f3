// SPDX-License-Identifier: Apache-2.0

package clients

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const (
	testToken  = "header.payload.signature"
	testSecret = "the-secret-key"
)

// endpoint answers as the agent does: with credentials to who presents
// testToken, and otherwise with a text that quotes what it was sent.
func endpoint(w http.ResponseWriter, r *http.Request) {
	got := r.Header.Get("Authorization")
	switch {
	case r.URL.Path != "/v1/credentials" || r.Method != http.MethodGet:
		http.NotFound(w, r)
	case got != testToken:
		http.Error(w, "this token is refused: "+got, http.StatusForbidden)
	default:
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprintf(w, `{"AccessKeyId":"ASIATEST","SecretAccessKey":"%s","Token":"session","AccountId":"111122223333","Expiration":"2099-01-02T03:04:05Z"}`, testSecret)
	}
}

// environment is what the webhook injects into a pod, and nothing else that an
// SDK reads.
func environment(t *testing.T, uri, token string) {
	t.Helper()
	for _, pair := range os.Environ() {
		if name, _, _ := strings.Cut(pair, "="); strings.HasPrefix(name, "AWS_") {
			t.Setenv(name, "") // restored after the test
			os.Unsetenv(name)
		}
	}
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("HOME", t.TempDir())
	t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
	t.Setenv(EnvURI, uri)
	t.Setenv(EnvTokenFile, file)
}

func TestFetch(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(endpoint))
	defer server.Close()

	environment(t, server.URL+"/v1/credentials", testToken)
	got := Fetch(t.Context())
	if got.Error != "" || got.AccessKeyID != "ASIATEST" || got.AccountID != "111122223333" || got.Expires != "2099-01-02T02:59:05Z" || got.Source != "CredentialsEndpointProvider" {
		t.Errorf("with the right token: %+v", got)
	}
	text, err := json.Marshal(got)
	if err != nil || strings.Contains(string(text), testSecret) || strings.Contains(string(text), "session") {
		t.Errorf("the report holds a secret: %s, %v", text, err)
	}

	environment(t, server.URL+"/v1/credentials", "someone.elses.token")
	got = Fetch(t.Context())
	if !strings.Contains(got.Error, "this token is refused: [token]") || got.AccessKeyID != "" {
		t.Errorf("with another token: %+v", got)
	}
}

func TestHold(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(endpoint))
	defer server.Close()
	environment(t, server.URL+"/v1/credentials", testToken)
	stolen := filepath.Join(t.TempDir(), "stolen")
	if err := os.WriteFile(stolen, []byte("someone.elses.token"), 0o600); err != nil {
		t.Fatal(err)
	}

	commands, in := io.Pipe()
	out, reports := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		err := Hold(t.Context(), commands, reports)
		reports.Close()
		ended <- err
	}()
	lines := bufio.NewScanner(out)
	ask := func(command string) (got HoldResult) {
		t.Helper()
		if _, err := io.WriteString(in, command+"\n"); err != nil {
			t.Fatal(err)
		}
		if !lines.Scan() {
			t.Fatalf("no answer to %q: %v", command, lines.Err())
		}
		if strings.Contains(lines.Text(), testSecret) {
			t.Errorf("the report holds a secret: %s", lines.Text())
		}
		if err := json.Unmarshal(lines.Bytes(), &got); err != nil {
			t.Fatal(err)
		}
		return got
	}
	first := ask("get")
	if first.Status != 200 || first.Connection != 1 || first.AccessKeyID != "ASIATEST" || first.AccountID != "111122223333" || first.Local == "" {
		t.Errorf("first: %+v", first)
	}
	second := ask("get " + stolen)
	if second.Status != 403 || second.Connection != 1 || second.Local != first.Local || strings.TrimSpace(second.Body) != "this token is refused: [token]" {
		t.Errorf("with another token: %+v", second)
	}
	if got := ask("get /does/not/exist"); got.Error == "" || got.Status != 0 {
		t.Errorf("without a token: %+v", got)
	}
	server.CloseClientConnections()
	// The loss may be noticed before or during the next request.
	if got := ask("get"); got.Status == 200 && got.Connection != 2 {
		t.Errorf("after the server closed the connection: %+v", got)
	}
	if got := ask("get"); got.Status != 200 || got.Connection != 2 {
		t.Errorf("on the next connection: %+v", got)
	}
	in.Close()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if err := Hold(t.Context(), strings.NewReader("post\n"), io.Discard); err == nil {
		t.Error("an unknown command was taken")
	}
}

func TestRedact(t *testing.T) {
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte("abc\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv(EnvToken, "xyz")
	if got, want := redact("abc, xyz and abcd", file, "/does/not/exist"), "[token], [token] and [token]d"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestReadCLI(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		stdout, stderr string
		want           Result
	}{
		"credentials": {
			`{"Version":1,"AccessKeyId":"ASIATEST","SecretAccessKey":"secret","SessionToken":"session","Expiration":"2099-01-02T03:04:05+00:00"}`, "",
			Result{AccessKeyID: "ASIATEST", Expires: "2099-01-02T03:04:05+00:00", Source: "aws-cli"},
		},
		"an error that quotes the token": {"", "\nUnable: a.b.c was refused\n", Result{Error: "Unable: [token] was refused"}},
		"what cannot be read":            {"secret", "", Result{Error: "the AWS CLI printed nothing that can be read"}},
	} {
		if got := ReadCLI([]byte(tt.stdout), []byte(tt.stderr), "a.b.c"); got != tt.want {
			t.Errorf("%s: %+v", name, got)
		}
	}
}
