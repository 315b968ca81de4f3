// SPDX-License-Identifier: Apache-2.0

package server

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/eks"

	"github.com/latchkey-dev/latchkey/test/standin/tokens"
)

// program is the server's, made once by TestMain.
var program string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	if program = os.Getenv("LATCHKEY_SERVER"); program == "" {
		dir, err := os.MkdirTemp("", "latchkey-server-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		program = filepath.Join(dir, "latchkey-server")
		// As the Makefile builds it, so that what it compiled is used again.
		build := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", program, "../../cmd/latchkey-server")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "building the server: %v\n%s", err, out)
			return 1
		}
	}
	return m.Run()
}

const (
	region  = "us-west-2"
	account = "111122223333"
	cluster = "prod"
	node    = "node-1"
	issuer  = tokens.DefaultIssuer
	// longest bounds what a test waits for; nothing comes near it.
	longest = 2 * time.Minute
)

func roleARN(name string) string { return "arn:aws:iam::" + account + ":role/" + name }

// server is a running program.
type server struct {
	t   *testing.T
	ctx context.Context
	dir string
	// args and env are for every start.
	args, env []string

	cmd  *exec.Cmd
	log  *logBuffer
	done chan struct{}
	err  error
	url  string
	side string
}

// newServer prepares a state directory; nothing runs.
func newServer(t *testing.T, args ...string) *server {
	t.Helper()
	limit := longest
	if os.Getenv("LATCHKEY_KILLS") != "" {
		limit = time.Hour
	}
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	t.Cleanup(cancel)
	// Not t.TempDir, whose path is too long for a socket if the test's name is.
	dir, err := os.MkdirTemp("", "lks-")
	if err != nil {
		t.Fatal(err)
	}
	s := &server{t: t, ctx: ctx, dir: dir, args: args, log: &logBuffer{}}
	t.Cleanup(func() {
		s.kill()
		if t.Failed() {
			t.Logf("the server's log:\n%s", s.log.tail(40))
		}
		os.RemoveAll(dir)
	})
	return s
}

// start prepares a state directory and starts the program with a stand-in for
// STS.
func start(t *testing.T, args ...string) *server {
	t.Helper()
	s := newServer(t, append([]string{"--stand-in-sts"}, args...)...)
	s.serve()
	return s
}

// launch starts the program and waits for nothing.
func (s *server) launch() {
	s.t.Helper()
	s.log.mark()
	s.cmd = exec.Command(program, append([]string{"serve", "--state-dir", s.dir, "--listen", "127.0.0.1:0", "--metrics-address", "127.0.0.1:0"}, s.args...)...)
	s.cmd.Env = append(cleanEnv(), s.env...)
	s.cmd.Stdout, s.cmd.Stderr = s.log, s.log
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	done := make(chan struct{})
	s.done = done
	cmd := s.cmd
	go func() {
		s.err = cmd.Wait()
		close(done)
	}()
}

// serve starts the program and waits until it is ready.
func (s *server) serve() {
	s.t.Helper()
	s.launch()
	s.url, s.side = "", ""
	s.until("the server is ready", func() error {
		select {
		case <-s.done:
			s.t.Fatalf("the server ended: %v\n%s", s.err, s.log.tail(20))
		default:
		}
		for _, line := range s.log.sinceMark() {
			var l struct{ Msg, Listen, Address, Endpoint string }
			if json.Unmarshal([]byte(line), &l) != nil {
				continue
			}
			if l.Msg == "started" {
				s.url = "http://" + l.Listen
				if slices.Contains(s.args, "--tls-cert") {
					s.url = "https://" + l.Listen
				}
			}
			if l.Msg == "listening" && l.Endpoint == "metrics" {
				s.side = "http://" + l.Address
			}
		}
		if s.url == "" || s.side == "" {
			return errors.New("it has not said where it listens")
		}
		_, err := s.get("/readyz")
		return err
	})
}

// until waits for a condition.
func (s *server) until(what string, f func() error) {
	s.t.Helper()
	for {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-s.ctx.Done():
			s.t.Fatalf("%s: %v", what, err)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// kill is kill -9.
func (s *server) kill() {
	if s.cmd != nil {
		_ = s.cmd.Process.Kill()
		<-s.done
	}
}

// stop is SIGTERM; the program must end well.
func (s *server) stop() {
	s.t.Helper()
	_ = s.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-s.done:
		if s.err != nil {
			s.t.Fatalf("stopped with %v", s.err)
		}
	case <-s.ctx.Done():
		s.t.Fatal("the server did not stop")
	}
}

// get fetches a path of the side endpoint.
func (s *server) get(path string) (string, error) {
	req, err := http.NewRequestWithContext(s.ctx, http.MethodGet, s.side+path, nil)
	if err != nil {
		return "", err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	var b bytes.Buffer
	_, err = b.ReadFrom(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %d %s", path, resp.StatusCode, b.String())
	}
	return b.String(), err
}

// result is what a command did.
type result struct {
	stdout, stderr string
	code           int
}

// try runs a command of the CLI.
func (s *server) try(stdin string, args ...string) result {
	s.t.Helper()
	cmd := exec.CommandContext(s.ctx, program, append(args, "--state-dir", s.dir)...)
	cmd.Env = cleanEnv()
	cmd.Stdin = strings.NewReader(stdin)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		s.t.Fatal(err)
	}
	return result{out.String(), errOut.String(), cmd.ProcessState.ExitCode()}
}

// cli runs a command that must succeed and returns what it printed.
func (s *server) cli(args ...string) string {
	s.t.Helper()
	r := s.try("", args...)
	if r.code != 0 {
		s.t.Fatalf("latchkey-server %s: exit %d: %s%s", strings.Join(args, " "), r.code, r.stdout, r.stderr)
	}
	return r.stdout
}

// user makes one and waits until its keys are in force, if the server runs.
func (s *server) user(name string, args ...string) aws.Credentials {
	s.t.Helper()
	out := s.cli(append([]string{"user", "add", name}, args...)...)
	m := regexp.MustCompile(`AWS_ACCESS_KEY_ID=(\S+)\nAWS_SECRET_ACCESS_KEY=(\S+)`).FindStringSubmatch(out)
	if m == nil {
		s.t.Fatalf("user add printed %q", out)
	}
	c := aws.Credentials{AccessKeyID: m[1], SecretAccessKey: m[2]}
	if s.url != "" {
		s.until("the new user is known", func() error {
			_, err := s.eks(c).ListTagsForResource(s.ctx, &eks.ListTagsForResourceInput{ResourceArn: aws.String("x")})
			if code, _ := outcome(err); code == "UnrecognizedClientException" {
				return err
			}
			return nil
		})
	}
	return c
}

// addCluster registers a cluster whose tokens the signer signs.
func (s *server) addCluster(name string, signer *tokens.Signer, more ...string) {
	s.t.Helper()
	file := filepath.Join(s.dir, name+".pub")
	if err := os.WriteFile(file, signer.PEM(), 0o600); err != nil {
		s.t.Fatal(err)
	}
	s.cli(append([]string{"cluster", "add", name, "--region", region, "--account", account, "--keys", file, "--issuer", signer.Issuer()}, more...)...)
}

// eks is an unmodified client. It does not retry, so that a test sees every
// answer.
func (s *server) eks(c aws.Credentials) *eks.Client {
	return eks.New(eks.Options{
		Region: region, BaseEndpoint: aws.String(s.url), Credentials: credentials.StaticCredentialsProvider{Value: c},
		Retryer: aws.NopRetryer{},
	})
}

// outcome is the error code that an SDK found, and the HTTP status.
func outcome(err error) (code string, status int) {
	if err == nil {
		return "", http.StatusOK
	}
	var api interface{ ErrorCode() string }
	if errors.As(err, &api) {
		code = api.ErrorCode()
	}
	var resp interface{ HTTPStatusCode() int }
	if errors.As(err, &resp) {
		status = resp.HTTPStatusCode()
	}
	return code, status
}

// want checks an error's code and status, and a part of its text.
func want(t *testing.T, what string, err error, code string, status int, text string) {
	t.Helper()
	gotCode, gotStatus := outcome(err)
	if gotCode != code || gotStatus != status {
		t.Errorf("%s: %s %d, want %s %d: %v", what, gotCode, gotStatus, code, status, err)
		return
	}
	if text != "" && !strings.Contains(err.Error(), text) {
		t.Errorf("%s: %v, want %q in it", what, err, text)
	}
}

// records are the audit log's.
func (s *server) records() []map[string]any {
	s.t.Helper()
	b, err := os.ReadFile(filepath.Join(s.dir, "audit.jsonl"))
	if err != nil {
		s.t.Fatal(err)
	}
	var out []map[string]any
	lines := bufio.NewScanner(bytes.NewReader(b))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var r map[string]any
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
			s.t.Fatalf("audit line %q: %v", lines.Text(), err)
		}
		out = append(out, r)
	}
	return out
}

func newSigner(t *testing.T) *tokens.Signer {
	t.Helper()
	s, err := tokens.NewSigner(tokens.Config{Algorithm: "ES256"})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// cleanEnv is the environment without anything of AWS's.
func cleanEnv() []string {
	var out []string
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, "AWS_") && !strings.HasPrefix(e, "KUBECONFIG=") {
			out = append(out, e)
		}
	}
	return append(out, "AWS_EC2_METADATA_DISABLED=true", "AWS_SHARED_CREDENTIALS_FILE=/nonexistent", "AWS_CONFIG_FILE=/nonexistent")
}

// logBuffer keeps what the program writes.
type logBuffer struct {
	mu    sync.Mutex
	b     bytes.Buffer
	start int
}

// Write implements io.Writer.
func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (l *logBuffer) mark() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.start = l.b.Len()
}

func (l *logBuffer) sinceMark() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Split(string(l.b.Bytes()[l.start:]), "\n")
}

func (l *logBuffer) tail(n int) string {
	lines := strings.Split(strings.TrimSpace(l.String()), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
