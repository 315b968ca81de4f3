// SPDX-License-Identifier: Apache-2.0

// Package clients holds real, unmodified AWS clients to be run in pods, and
// what they report. The Go client is a function ([Fetch]), so that a test can
// run it as a testnode action, and a program (awsgo). The JavaScript clients
// are in js, botocore's is in py, and the AWS CLI is Debian's.
package clients

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
)

// The environment variables that the SDKs read and the pod-identity webhook
// sets.
const (
	EnvURI       = "AWS_CONTAINER_CREDENTIALS_FULL_URI"
	EnvToken     = "AWS_CONTAINER_AUTHORIZATION_TOKEN"
	EnvTokenFile = "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"
)

// maxBody bounds what is kept of a response.
const maxBody = 64 << 10

// Clients that are missing; the texts say what to do.
var (
	// ErrNotInstalled means that the JavaScript clients' modules are missing.
	ErrNotInstalled = errors.New("the JavaScript clients are not installed: run `npm install --no-audit --no-fund` in test/clients/js")
	// ErrNoBotocore means that botocore is missing.
	ErrNoBotocore = errors.New("botocore is not installed: install Debian's awscli and python3-requests, and run test/clients/py/install")
	// ErrNoCLI means that the AWS CLI is missing.
	ErrNoCLI = errors.New("the AWS CLI is not installed: install Debian's package awscli")
)

// Result is what a client reports, as one line of JSON. It holds nothing that
// could be used: no secret key, no session token, no service-account token.
type Result struct {
	// AccessKeyID is of the credentials received.
	AccessKeyID string `json:"access_key_id,omitempty"`
	// AccountID is theirs too. JavaScript's HTTP provider (3.972) drops it.
	AccountID string `json:"account_id,omitempty"`
	// Expires is when the SDK takes them to end, in RFC 3339; empty if never.
	// The default configuration of aws-sdk-go-v2 makes that 5 minutes earlier
	// than the endpoint said.
	Expires string `json:"expires,omitempty"`
	// Source is what the SDK calls the provider they came from.
	Source string `json:"source,omitempty"`
	// Error is why there are none; empty on success.
	Error string `json:"error,omitempty"`
	// DurationMS is how long it took, retries included, in milliseconds.
	DurationMS float64 `json:"duration_ms"`
}

// Fetch gets credentials as any program does that uses aws-sdk-go-v2: by the
// default chain and nothing but the process's environment. It never fails
// otherwise than in Result.Error.
func Fetch(ctx context.Context) Result {
	start := time.Now()
	creds, err := retrieve(ctx)
	result := Result{DurationMS: milliseconds(start)}
	if err != nil {
		result.Error = redact(err.Error(), os.Getenv(EnvTokenFile))
		return result
	}
	result.AccessKeyID = creds.AccessKeyID
	result.AccountID = creds.AccountID
	result.Source = creds.Source
	if creds.CanExpire {
		result.Expires = creds.Expires.UTC().Format(time.RFC3339)
	}
	return result
}

func retrieve(ctx context.Context) (aws.Credentials, error) {
	cfg, err := config.LoadDefaultConfig(ctx)
	if err != nil {
		return aws.Credentials{}, fmt.Errorf("loading the SDK's configuration: %w", err)
	}
	return cfg.Credentials.Retrieve(ctx)
}

func milliseconds(since time.Time) float64 {
	return float64(time.Since(since).Microseconds()) / 1000
}

// redact takes tokens out of a text that is going to be printed: a server or
// an SDK may quote what it was sent.
func redact(text string, tokenFiles ...string) string {
	tokens := []string{os.Getenv(EnvToken)}
	for _, file := range tokenFiles {
		if token, err := os.ReadFile(file); err == nil {
			tokens = append(tokens, string(token), strings.TrimSpace(string(token)))
		}
	}
	for _, token := range tokens {
		if token != "" {
			text = strings.ReplaceAll(text, token, "[token]")
		}
	}
	return text
}

// HoldResult is what [Hold] reports of one request, as one line of JSON.
type HoldResult struct {
	// Status is the HTTP status; 0 if there was no response.
	Status int `json:"status"`
	// Connection counts the connections opened, from 1. While it stays the
	// same, so did the connection.
	Connection int `json:"connection"`
	// Local is the connection's own address.
	Local string `json:"local,omitempty"`
	// Closed says that the server will close the connection.
	Closed bool `json:"closed,omitempty"`
	// AccessKeyID and AccountID are of the credentials received.
	AccessKeyID string `json:"access_key_id,omitempty"`
	AccountID   string `json:"account_id,omitempty"`
	// Body is the response, unless it holds credentials.
	Body string `json:"body,omitempty"`
	// Error is why there is no response.
	Error string `json:"error,omitempty"`
	// DurationMS is how long it took, in milliseconds.
	DurationMS float64 `json:"duration_ms"`
}

// Hold makes requests over one kept connection, on command: a line "get" on in
// makes one with the token of EnvTokenFile, "get FILE" one with the token of
// that file; each is answered by a line of JSON ([HoldResult]) on out. The
// requests have the headers of aws-sdk-go-v2's, but are not retried and go
// through no proxy. It returns when in ends.
func Hold(ctx context.Context, in io.Reader, out io.Writer) error {
	h := holder{uri: os.Getenv(EnvURI)}
	defer h.drop()
	lines := bufio.NewScanner(in)
	encoder := json.NewEncoder(out)
	for lines.Scan() {
		words := strings.Fields(lines.Text())
		if len(words) == 0 {
			continue
		}
		if words[0] != "get" || len(words) > 2 {
			return fmt.Errorf("unknown command %q: want get [FILE]", lines.Text())
		}
		file := os.Getenv(EnvTokenFile)
		if len(words) == 2 {
			file = words[1]
		}
		if err := encoder.Encode(h.get(ctx, file)); err != nil {
			return fmt.Errorf("reporting: %w", err)
		}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("reading commands: %w", err)
	}
	return nil
}

// requestTimeout bounds one request of [Hold].
const requestTimeout = 30 * time.Second

// holder speaks HTTP itself: http.Transport gives up a good connection whose
// writer has not been heard of 50 ms after the answer, as happens to a client
// that is given little CPU time.
type holder struct {
	uri string
	// conn is nil before the first request and after one that ended it.
	conn        net.Conn
	r           *bufio.Reader
	connections int
}

func (h *holder) drop() {
	if h.conn != nil {
		_ = h.conn.Close()
		h.conn = nil
	}
}

func (h *holder) get(ctx context.Context, tokenFile string) HoldResult {
	start := time.Now()
	result, err := h.do(ctx, tokenFile)
	if err != nil {
		result.Error = redact(err.Error(), tokenFile)
	}
	result.Body = redact(result.Body, tokenFile)
	result.Connection = h.connections
	result.DurationMS = milliseconds(start)
	return result
}

func (h *holder) do(ctx context.Context, tokenFile string) (HoldResult, error) {
	var result HoldResult
	token, err := os.ReadFile(tokenFile)
	if err != nil {
		return result, fmt.Errorf("reading the token: %w", err)
	}
	if strings.ContainsAny(string(token), "\r\n") {
		return result, errors.New("the token has a line break, which no header can have")
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, h.uri, nil)
	if err != nil {
		return result, fmt.Errorf("making a request: %w", err)
	}
	req.Header.Set("Authorization", string(token))
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", "aws-sdk-go-v2")
	// net/http would ask for compression; the SDK asks for none.
	req.Header.Set("Accept-Encoding", "identity")
	resp, body, err := h.exchange(req, &result)
	if err != nil {
		return result, err
	}
	result.Status, result.Closed = resp.StatusCode, resp.Close
	if resp.StatusCode != http.StatusOK {
		result.Body = string(body)
		return result, nil
	}
	var creds struct{ AccessKeyId, AccountId string }
	if err := json.Unmarshal(body, &creds); err != nil {
		// Not quoted: it may be credentials all the same.
		return result, errors.New("the response is not JSON")
	}
	result.AccessKeyID, result.AccountID = creds.AccessKeyId, creds.AccountId
	return result, nil
}

// exchange makes the request on the connection that is kept, or on another one if
// the server has closed that in between.
func (h *holder) exchange(req *http.Request, result *HoldResult) (*http.Response, []byte, error) {
	for {
		kept := h.conn != nil
		if !kept {
			var err error
			h.connections++
			if h.conn, err = (&net.Dialer{}).DialContext(req.Context(), "tcp", authority(req.URL)); err != nil {
				h.conn = nil
				return nil, nil, err
			}
			h.r = bufio.NewReader(h.conn)
		}
		result.Local = h.conn.LocalAddr().String()
		resp, body, err := h.onConnection(req)
		if err == nil {
			if resp.Close {
				h.drop()
			}
			return resp, body, nil
		}
		h.drop()
		if err := req.Context().Err(); err != nil {
			return nil, nil, err
		}
		if !kept || resp != nil {
			return nil, nil, err
		}
	}
}

// onConnection gives no response, only an error, if none has begun.
func (h *holder) onConnection(req *http.Request) (*http.Response, []byte, error) {
	conn := h.conn
	stop := context.AfterFunc(req.Context(), func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	// Who is turned away may be told before all is written.
	werr := req.Write(conn)
	if _, err := h.r.Peek(1); err != nil {
		return nil, nil, errors.Join(werr, err)
	}
	resp, err := http.ReadResponse(h.r, req)
	if err != nil {
		return &http.Response{}, nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxBody))
	if err != nil {
		return resp, nil, fmt.Errorf("reading the response: %w", err)
	}
	resp.Close = resp.Close || werr != nil || len(body) == maxBody
	return resp, body, nil
}

func authority(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = "80"
	}
	return net.JoinHostPort(u.Hostname(), port)
}

// JSProvider is one of the JavaScript clients.
type JSProvider string

// The providers of the AWS SDK for JavaScript v3 that speak to the agent.
const (
	// JSHTTP is @aws-sdk/credential-provider-http, part of the default chain.
	JSHTTP JSProvider = "http"
	// JSMetadata is fromContainerMetadata of @smithy/credential-provider-imds:
	// it allows localhost only and reads the token from EnvToken only.
	JSMetadata JSProvider = "metadata"
)

// JS is the command line that runs a JavaScript client, which prints a
// [Result]; its exit status is 1 if it got no credentials. The working
// directory must be inside the repository. The error is [ErrNotInstalled] if
// its modules are missing.
func JS(provider JSProvider) ([]string, error) {
	root, err := repository()
	if err != nil {
		return nil, fmt.Errorf("looking for the JavaScript clients: %w", err)
	}
	dir := filepath.Join(root, "test", "clients", "js")
	if _, err := os.Stat(filepath.Join(dir, "node_modules", ".package-lock.json")); err != nil {
		return nil, ErrNotInstalled
	}
	return []string{"node", filepath.Join(dir, "client.mjs"), string(provider)}, nil
}

// Botocore is the command line that runs botocore 1.37, Python's SDK, which
// prints a [Result]; its exit status is 1 if it got no credentials. The working
// directory must be inside the repository. The error is [ErrNoBotocore] if it
// is missing.
func Botocore() ([]string, error) {
	root, err := repository()
	if err != nil {
		return nil, fmt.Errorf("looking for botocore: %w", err)
	}
	packages := filepath.Join(root, ".cache", "botocore", "x", "usr", "lib", "python3", "dist-packages")
	if _, err := os.Stat(filepath.Join(packages, "botocore", "session.py")); err != nil {
		return nil, ErrNoBotocore
	}
	return []string{debianPython, filepath.Join(root, "test", "clients", "py", "client.py"), packages}, nil
}

// Debian's own, whatever else is in PATH: what botocore imports is there.
const (
	debianPython = "/usr/bin/python3"
	debianCLI    = "/usr/bin/aws"
)

// CLI is the command line of Debian 12's AWS CLI 2.9 that prints credentials:
// give its output to [ReadCLI]. It is older than EKS Pod Identity: it allows
// localhost and 169.254.170.2 only, and reads the token from EnvToken only. The
// error is [ErrNoCLI] if it is missing.
func CLI() ([]string, error) {
	if _, err := os.Stat(debianCLI); err != nil {
		return nil, ErrNoCLI
	}
	return []string{debianCLI, "configure", "export-credentials", "--format", "process"}, nil
}

// ReadCLI makes a [Result] of what [CLI] wrote to its standard output and
// error, keeping no secret of it, nor the token that it was given.
func ReadCLI(stdout, stderr []byte, token string) Result {
	var creds struct{ AccessKeyId, Expiration string }
	if err := json.Unmarshal(stdout, &creds); err != nil || creds.AccessKeyId == "" {
		text := strings.TrimSpace(string(stderr))
		if text == "" {
			// Not quoted: it may be credentials all the same.
			text = "the AWS CLI printed nothing that can be read"
		}
		if token != "" {
			text = strings.ReplaceAll(text, token, "[token]")
		}
		return Result{Error: text}
	}
	return Result{AccessKeyID: creds.AccessKeyId, Expires: creds.Expiration, Source: "aws-cli"}
}

// repository is the root of the repository that the working directory is in.
func repository() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return "", errors.New("not inside the repository")
		}
		dir = parent
	}
}
