// SPDX-License-Identifier: Apache-2.0

package eksauth_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"

	"github.com/latchkey-dev/latchkey/pkg/eksauth"
	standin "github.com/latchkey-dev/latchkey/test/standin/eksauth"
	"github.com/latchkey-dev/latchkey/test/standin/tokens"
)

func nodeKeys() aws.Credentials {
	return aws.Credentials{AccessKeyID: "AKIDNODE", SecretAccessKey: "node-secret", SessionToken: "node-session"}
}

func static(c aws.Credentials) aws.CredentialsProvider {
	return aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) { return c, nil })
}

type bed struct {
	*standin.Running
	token string
}

func newBed(t *testing.T) *bed {
	t.Helper()
	signer, err := tokens.NewSigner(tokens.Config{Algorithm: "ES256"})
	if err != nil {
		t.Fatal(err)
	}
	up, err := standin.Start(standin.Config{Cluster: "prod", JWKS: signer.JWKS(),
		Callers: map[string]string{nodeKeys().AccessKeyID: nodeKeys().SecretAccessKey}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(up.Close)
	up.Associate(standin.Association{Namespace: "web", ServiceAccount: "api", RoleARN: "arn:aws:iam::111122223333:role/api"})
	return &bed{up, signer.Token(tokens.Claims{Namespace: "web", ServiceAccount: "api", Pod: "api-1", PodUID: tokens.UID("api-1")})}
}

func newClient(t *testing.T, endpoint string, change func(*eksauth.Config)) *eksauth.Client {
	t.Helper()
	transport := eksauth.NewTransport(nil)
	t.Cleanup(transport.CloseIdleConnections)
	cfg := eksauth.Config{
		ClusterName: "prod", Region: "us-west-2", Endpoint: endpoint, Credentials: static(nodeKeys()), Transport: transport,
		Jitter: func() float64 { return 0 },
	}
	if change != nil {
		change(&cfg)
	}
	c, err := eksauth.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestSuccess(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	assoc := b.Associate(standin.Association{Namespace: "web", ServiceAccount: "api", RoleARN: "arn:aws:iam::111122223333:role/a/b/api"})
	c := newClient(t, b.URL, func(c *eksauth.Config) { c.NodeName = "node-1" })
	got, err := c.AssumeRoleForPodIdentity(t.Context(), b.token)
	if err != nil {
		t.Fatal(err)
	}
	if got.Subject != (eksauth.Subject{Namespace: "web", ServiceAccount: "api"}) || got.Audience != "pods.eks.amazonaws.com" {
		t.Errorf("subject %+v audience %q", got.Subject, got.Audience)
	}
	if got.AssociationID != assoc.ID || got.AssociationARN != assoc.ARN {
		t.Errorf("association %q %q", got.AssociationID, got.AssociationARN)
	}
	if !strings.HasPrefix(got.AssumedRoleARN, "arn:aws:sts::111122223333:assumed-role/api/eks-prod-api-1-") || got.AssumedRoleID == "" {
		t.Errorf("role %q %q", got.AssumedRoleARN, got.AssumedRoleID)
	}
	k := got.Credentials
	if !strings.HasPrefix(k.AccessKeyID, standin.AccessKeyPrefix) || !strings.HasPrefix(k.SecretAccessKey.Reveal(), standin.SecretPrefix) ||
		!strings.HasPrefix(k.SessionToken.Reveal(), standin.SessionTokenPrefix) {
		t.Error("credentials are not those of the answer")
	}
	if k.Expiration.Location() != time.UTC || !k.Expiration.After(time.Now()) {
		t.Errorf("expiration %v", k.Expiration)
	}
	if calls := b.Calls(); len(calls) != 1 || calls[0].NodeName != "node-1" || got.RequestID != calls[0].RequestID {
		t.Errorf("calls %+v, request id %q", calls, got.RequestID)
	}
}

func TestModelledErrors(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	c := newClient(t, b.URL, nil)
	for _, tt := range []struct {
		kind     string
		class    eksauth.Class
		sentinel error
		calls    int
	}{
		{"AccessDeniedException", eksauth.ClassAccessDenied, eksauth.ErrAccessDenied, 1},
		{"ExpiredTokenException", eksauth.ClassExpiredToken, eksauth.ErrExpiredToken, 1},
		{"InvalidTokenException", eksauth.ClassInvalidToken, eksauth.ErrInvalidToken, 1},
		{"InvalidParameterException", eksauth.ClassRejected, eksauth.ErrRejected, 1},
		{"InvalidRequestException", eksauth.ClassRejected, eksauth.ErrRejected, 1},
		{"ResourceNotFoundException", eksauth.ClassNotFound, eksauth.ErrNotFound, 1},
		{"ThrottlingException", eksauth.ClassThrottled, eksauth.ErrThrottled, 3},
		{"InternalServerException", eksauth.ClassUnavailable, eksauth.ErrUnavailable, 3},
		{"ServiceUnavailableException", eksauth.ClassUnavailable, eksauth.ErrUnavailable, 3},
	} {
		b.Reset()
		b.Inject(standin.Fault{Kind: standin.Refuse, ErrorType: tt.kind, Message: "because"})
		_, err := c.AssumeRoleForPodIdentity(t.Context(), b.token)
		var api *eksauth.APIError
		if !errors.As(err, &api) || api.Code != tt.kind || api.Message != "because" {
			t.Errorf("%s: %v", tt.kind, err)
			continue
		}
		if api.Class != tt.class || !errors.Is(err, tt.sentinel) || eksauth.ClassOf(err) != tt.class {
			t.Errorf("%s: class %s", tt.kind, api.Class)
		}
		calls := b.Calls()
		if len(calls) != tt.calls {
			t.Errorf("%s: %d calls, want %d", tt.kind, len(calls), tt.calls)
		}
		fault := "client"
		if api.Status >= 500 {
			fault = "server"
		}
		want := fmt.Sprintf("[%s]: (%s): because, fault: %s", calls[len(calls)-1].RequestID, tt.kind, fault)
		if api.Text() != want {
			t.Errorf("%s: text %q, want %q", tt.kind, api.Text(), want)
		}
	}
}

// The code alone or the status alone must not make a caller drop credentials.
func TestUncertainIsNotARefusal(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		status int
		header string
		body   string
		class  eksauth.Class
	}{
		{404, "", "<html>not here</html>", eksauth.ClassInvalidResponse},
		{404, "UnknownOperationException", `{}`, eksauth.ClassInvalidResponse},
		{404, "ResourceNotFoundException:http://internal/", `{"message":"m"}`, eksauth.ClassNotFound},
		{404, "", `{"__type":"com.amazonaws.eks.auth#ResourceNotFoundException"}`, eksauth.ClassNotFound},
		{404, "", `{"code":"ResourceNotFoundException"}`, eksauth.ClassNotFound},
		{404, "", `{"__type":{"a":1},"code":7,"message":[]}`, eksauth.ClassInvalidResponse},
		{400, "", "bad", eksauth.ClassInvalidResponse},
		{400, "ExpiredTokenException", `{}`, eksauth.ClassExpiredToken},
		{403, "ExpiredTokenException", `{}`, eksauth.ClassAccessDenied},
		{403, "UnrecognizedClientException", `{}`, eksauth.ClassAccessDenied},
		{403, "InvalidTokenException", `{}`, eksauth.ClassAccessDenied},
		{403, "", "<html>blocked by policy</html>", eksauth.ClassInvalidResponse},
		{407, "", "", eksauth.ClassUnavailable},
		{503, "ResourceNotFoundException", `{}`, eksauth.ClassUnavailable},
		{500, "InvalidTokenException", `{}`, eksauth.ClassUnavailable},
		{400, "ThrottlingException", `{}`, eksauth.ClassThrottled},
		{204, "", "", eksauth.ClassInvalidResponse},
		{302, "ResourceNotFoundException", `{}`, eksauth.ClassInvalidResponse},
	} {
		c := newClient(t, "http://127.0.0.1:1", func(c *eksauth.Config) {
			c.MaxAttempts = 1
			c.Transport = roundTripper(func(*http.Request) (*http.Response, error) {
				h := http.Header{}
				if tt.header != "" {
					h.Set("X-Amzn-Errortype", tt.header)
				}
				return &http.Response{StatusCode: tt.status, Header: h, Body: io.NopCloser(strings.NewReader(tt.body))}, nil
			})
		})
		_, err := c.AssumeRoleForPodIdentity(t.Context(), "a.b.c")
		if got := eksauth.ClassOf(err); err == nil || got != tt.class {
			t.Errorf("%d %q %q: class %s (%v), want %s", tt.status, tt.header, tt.body, got, err, tt.class)
		}
	}
}

// The EKS Pod Identity Agent panics on an answer without the association, and
// passes an undecodable 200 on as a 200.
func TestBrokenAnswersAreErrors(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	c := newClient(t, b.URL, nil)
	var faults []standin.Fault
	for _, member := range []string{"subject", "subject.namespace", "subject.serviceAccount", "audience", "podIdentityAssociation",
		"podIdentityAssociation.associationArn", "podIdentityAssociation.associationId", "assumedRoleUser", "assumedRoleUser.arn",
		"assumedRoleUser.assumeRoleId", "credentials", "credentials.accessKeyId", "credentials.secretAccessKey",
		"credentials.sessionToken", "credentials.expiration"} {
		for _, kind := range []standin.Kind{standin.Omit, standin.Empty, standin.WrongType} {
			faults = append(faults, standin.Fault{Kind: kind, Members: []string{member}})
		}
	}
	for _, body := range []string{"", "garbage", "[]", "null", "{}", `"text"`, "{", "\x00\xff", strings.Repeat("[", 70000), strings.Repeat("a", 1<<20)} {
		faults = append(faults, standin.Fault{Kind: standin.Body, Body: []byte(body)})
	}
	faults = append(faults, standin.Fault{Kind: standin.Expired})
	for _, f := range faults {
		b.Reset()
		b.Inject(f)
		got, err := c.AssumeRoleForPodIdentity(t.Context(), b.token)
		if got != nil || !errors.Is(err, eksauth.ErrInvalidResponse) {
			t.Errorf("%s %v %.20q: %v", f.Kind, f.Members, f.Body, err)
		}
		if b.CallCount() != 1 {
			t.Errorf("%s %v: %d calls, want no retry", f.Kind, f.Members, b.CallCount())
		}
		if err != nil && strings.Contains(err.Error(), standin.SecretPrefix) {
			t.Errorf("%s: the error tells a secret: %v", f.Kind, err)
		}
	}
}

func TestExpirationsThatAreNoTime(t *testing.T) {
	t.Parallel()
	now := time.Unix(1_800_000_000, 0)
	for expiration, ok := range map[string]bool{
		"1800000001": true, "1800000001.999": true, "1.8e9": false, "1800000000.5": false, "1800000000": false, "0": false,
		"-1": false, "1800000001000": false, "1e300": false, `"2030-01-01T00:00:00Z"`: false, "true": false,
	} {
		body := fmt.Sprintf(`{"subject":{"namespace":"n","serviceAccount":"s"},"audience":"a",
			"podIdentityAssociation":{"associationArn":"x","associationId":"y"},"assumedRoleUser":{"arn":"x","assumeRoleId":"y"},
			"credentials":{"accessKeyId":"k","secretAccessKey":"s","sessionToken":"t","expiration":%s}}`, expiration)
		c := newClient(t, "http://127.0.0.1:1", func(c *eksauth.Config) {
			c.Now = func() time.Time { return now }
			c.Transport = roundTripper(func(*http.Request) (*http.Response, error) {
				return &http.Response{StatusCode: 200, Header: http.Header{}, Body: io.NopCloser(strings.NewReader(body))}, nil
			})
		})
		got, err := c.AssumeRoleForPodIdentity(t.Context(), "a.b.c")
		if ok != (err == nil) {
			t.Errorf("expiration %s: %v", expiration, err)
		}
		if err == nil && got.Credentials.Expiration.Nanosecond() != 0 {
			t.Errorf("expiration %s: not rounded down: %v", expiration, got.Credentials.Expiration)
		}
	}
}

func TestTransportFailuresAreRetried(t *testing.T) {
	t.Parallel()
	for _, kind := range []standin.Kind{standin.Reset, standin.Truncated} {
		t.Run(string(kind), func(t *testing.T) {
			t.Parallel()
			b := newBed(t)
			c := newClient(t, b.URL, nil)
			b.Inject(standin.Fault{Kind: kind, Times: 2})
			if _, err := c.AssumeRoleForPodIdentity(t.Context(), b.token); err != nil {
				t.Errorf("third attempt should have succeeded: %v", err)
			}
			b.Reset()
			b.Inject(standin.Fault{Kind: kind})
			if _, err := c.AssumeRoleForPodIdentity(t.Context(), b.token); !errors.Is(err, eksauth.ErrUnavailable) {
				t.Errorf("got %v", err)
			}
			if b.CallCount() != 3 {
				t.Errorf("%d calls, want 3", b.CallCount())
			}
		})
	}
	t.Run("refused", func(t *testing.T) {
		t.Parallel()
		b := newBed(t)
		b.Refuse()
		var attempts []eksauth.Attempt
		c := newClient(t, b.URL, func(c *eksauth.Config) {
			c.Observe = func(a eksauth.Attempt) {
				attempts = append(attempts, a)
				if a.Number == 2 {
					if err := b.Resume(); err != nil {
						t.Error(err)
					}
				}
			}
		})
		if _, err := c.AssumeRoleForPodIdentity(t.Context(), b.token); err != nil {
			t.Error(err)
		}
		if len(attempts) != 3 || attempts[0].Class != eksauth.ClassUnavailable || attempts[2].Class != eksauth.ClassNone || attempts[2].Status != 200 {
			t.Errorf("attempts %+v", attempts)
		}
	})
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func answering(status int, header http.Header, body string) roundTripper {
	return func(*http.Request) (*http.Response, error) {
		if header == nil {
			header = http.Header{}
		}
		return &http.Response{StatusCode: status, Header: header, Body: io.NopCloser(strings.NewReader(body))}, nil
	}
}

func TestPauses(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		retryAfter string
		total      time.Duration
		calls      int
		took       time.Duration
	}{
		"backoff doubles":                       {"", 0, 4, (100 + 200 + 400) / 2 * time.Millisecond},
		"asked to wait a second":                {"1", 0, 4, 3*time.Second + (100+200+400)/2*time.Millisecond},
		"asked to wait longer than it is worth": {"30", 0, 1, 0},
		// After the date has passed, only the backoff is left.
		"a date":       {"Sat, 01 Jan 2000 00:00:01 GMT", 0, 4, time.Second + 50*time.Millisecond + 100*time.Millisecond + 200*time.Millisecond},
		"no time left": {"1", 2 * time.Second, 2, time.Second + 50*time.Millisecond},
		"nonsense":     {"soon", 0, 4, (100 + 200 + 400) / 2 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				calls := 0
				header := http.Header{"Retry-After": {tt.retryAfter}}
				c := newClient(t, "http://127.0.0.1:1", func(c *eksauth.Config) {
					c.Jitter = func() float64 { return 0.5 }
					c.MaxAttempts = 4
					c.TotalTimeout = tt.total
					c.Transport = roundTripper(func(r *http.Request) (*http.Response, error) {
						calls++
						return answering(429, header, `{}`)(r)
					})
				})
				start := time.Now()
				_, err := c.AssumeRoleForPodIdentity(t.Context(), "a.b.c")
				if !errors.Is(err, eksauth.ErrThrottled) {
					t.Errorf("got %v", err)
				}
				if took := time.Since(start); calls != tt.calls || took != tt.took {
					t.Errorf("%d calls in %v, want %d in %v", calls, took, tt.calls, tt.took)
				}
			})
		})
	}
}

func TestDeadlines(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		calls := 0
		c := newClient(t, "http://127.0.0.1:1", func(c *eksauth.Config) {
			c.AttemptTimeout, c.TotalTimeout = time.Second, 2500*time.Millisecond
			c.MaxAttempts = 10
			c.Transport = roundTripper(func(r *http.Request) (*http.Response, error) {
				calls++
				<-r.Context().Done()
				return nil, r.Context().Err()
			})
		})
		start := time.Now()
		_, err := c.AssumeRoleForPodIdentity(t.Context(), "a.b.c")
		if !errors.Is(err, eksauth.ErrUnavailable) || time.Since(start) != 2500*time.Millisecond || calls != 3 {
			t.Errorf("%v after %v and %d calls", err, time.Since(start), calls)
		}
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(300*time.Millisecond, cancel)
		start, calls = time.Now(), 0
		_, err = c.AssumeRoleForPodIdentity(ctx, "a.b.c")
		if err == nil || time.Since(start) != 300*time.Millisecond || calls != 1 {
			t.Errorf("cancelled: %v after %v and %d calls", err, time.Since(start), calls)
		}
	})
}

func TestRetriesNeedAPermit(t *testing.T) {
	t.Parallel()
	calls, permits := 0, 0
	c := newClient(t, "http://127.0.0.1:1", func(c *eksauth.Config) {
		c.MaxAttempts = 5
		c.Transport = roundTripper(func(r *http.Request) (*http.Response, error) { calls++; return answering(500, nil, "")(r) })
		c.Permit = func(context.Context) error {
			if permits++; permits == 2 {
				return errors.New("no more")
			}
			return nil
		}
	})
	if _, err := c.AssumeRoleForPodIdentity(t.Context(), "a.b.c"); !errors.Is(err, eksauth.ErrUnavailable) || calls != 2 {
		t.Errorf("%v after %d calls, want the upstream's error after 2", err, calls)
	}
}

func TestRedirectsAreNotFollowed(t *testing.T) {
	t.Parallel()
	var reached atomic.Bool
	other := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { reached.Store(true) }))
	defer other.Close()
	first := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, other.URL, http.StatusTemporaryRedirect)
	}))
	defer first.Close()
	_, err := newClient(t, first.URL, nil).AssumeRoleForPodIdentity(t.Context(), "a.b.c")
	if !errors.Is(err, eksauth.ErrInvalidResponse) || reached.Load() {
		t.Errorf("%v; the token went on: %t", err, reached.Load())
	}
}

func TestWrongClockIsCorrected(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	c := newClient(t, b.URL, func(c *eksauth.Config) {
		c.Now = func() time.Time { return time.Now().Add(-3 * time.Hour) }
	})
	for range 2 {
		if _, err := c.AssumeRoleForPodIdentity(t.Context(), b.token); err != nil {
			t.Fatal(err)
		}
	}
	if got := b.CallCount(); got != 3 {
		t.Errorf("%d calls, want 3: one refused, then two right ones", got)
	}
}

type invalidatable struct {
	mu   sync.Mutex
	keys []aws.Credentials
}

func (p *invalidatable) Retrieve(context.Context) (aws.Credentials, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.keys[0], nil
}

func (p *invalidatable) Invalidate() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.keys) > 1 {
		p.keys = p.keys[1:]
	}
}

func TestRotatedNodeCredentials(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	old := nodeKeys()
	old.AccessKeyID = "AKIDOLD"
	provider := &invalidatable{keys: []aws.Credentials{old, nodeKeys()}}
	c := newClient(t, b.URL, func(c *eksauth.Config) { c.Credentials = provider })
	if _, err := c.AssumeRoleForPodIdentity(t.Context(), b.token); err != nil {
		t.Error(err)
	}
	wrong := newClient(t, b.URL, func(c *eksauth.Config) { c.Credentials = &invalidatable{keys: []aws.Credentials{old}} })
	b.Reset()
	if _, err := wrong.AssumeRoleForPodIdentity(t.Context(), b.token); !errors.Is(err, eksauth.ErrAccessDenied) || b.CallCount() != 2 {
		t.Errorf("%v after %d calls", err, b.CallCount())
	}
}

func TestNoNodeCredentials(t *testing.T) {
	t.Parallel()
	cause := errors.New("IMDS is off")
	c := newClient(t, "http://127.0.0.1:1", func(c *eksauth.Config) {
		c.Credentials = aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) { return aws.Credentials{}, cause })
	})
	_, err := c.AssumeRoleForPodIdentity(t.Context(), "a.b.c")
	if !errors.Is(err, eksauth.ErrNodeCredentials) || !errors.Is(err, cause) || eksauth.ClassOf(err) != eksauth.ClassNodeCredentials {
		t.Errorf("got %v", err)
	}
}

// The EKS Pod Identity Agent opened hundreds of connections for a thousand cold
// fetches.
func TestConnectionsAreReusedAndBounded(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	var opened atomic.Int64
	srv := httptest.NewUnstartedServer(b.Server)
	srv.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			opened.Add(1)
		}
	}
	srv.Start()
	defer srv.Close()
	c := newClient(t, srv.URL, func(cfg *eksauth.Config) {
		cfg.AttemptTimeout, cfg.TotalTimeout = time.Minute, 5*time.Minute
	})
	var n int64
	// 16 are kept when idle and at most 32 are open: bursts may reopen some. So
	// does net/http after each pause of 50 ms that a busy machine makes, hence
	// several tries.
	for range 5 {
		opened.Store(0)
		var wg sync.WaitGroup
		for range 64 {
			wg.Go(func() {
				for range 5 {
					if _, err := c.AssumeRoleForPodIdentity(t.Context(), b.token); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		if n = opened.Load(); n <= 160 {
			break
		}
	}
	if n > 160 {
		t.Errorf("%d connections for 320 calls", n)
	}
	if _, most := b.InFlight(); most > 32 {
		t.Errorf("%d calls in flight at once", most)
	}
}

func TestSecretsDoNotShow(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	got, err := newClient(t, b.URL, nil).AssumeRoleForPodIdentity(t.Context(), b.token)
	if err != nil {
		t.Fatal(err)
	}
	asJSON, err := json.Marshal(got)
	if err != nil {
		t.Fatal(err)
	}
	var logged bytes.Buffer
	slog.New(slog.NewJSONHandler(&logged, nil)).Info("x", "result", got, "secret", got.Credentials.SessionToken)
	slog.New(slog.NewTextHandler(&logged, nil)).Info("x", "result", *got, "secret", got.Credentials.SecretAccessKey)
	hidden := struct{ r eksauth.Result }{*got}
	for name, text := range map[string]string{
		"json": string(asJSON), "log": logged.String(), "%v": fmt.Sprintf("%v", got), "%+v": fmt.Sprintf("%+v", *got),
		"%#v": fmt.Sprintf("%#v", *got), "unexported": fmt.Sprintf("%v %+v %#v", hidden, hidden, hidden),
		"%s": fmt.Sprintf("%s %q %x", got.Credentials.SecretAccessKey, got.Credentials.SessionToken, got.Credentials.SessionToken),
	} {
		for _, secret := range []string{got.Credentials.SecretAccessKey.Reveal(), got.Credentials.SessionToken.Reveal()} {
			if strings.Contains(text, secret) || strings.Contains(text, fmt.Sprintf("%x", secret)) {
				t.Errorf("%s shows a secret", name)
			}
		}
	}
}

func TestErrorsDoNotEchoTheToken(t *testing.T) {
	t.Parallel()
	token := strings.Repeat("eyJ0", 100) + ".b.c"
	header := http.Header{"X-Amzn-Errortype": {"Bad" + token}, "X-Amzn-Requestid": {token}}
	body, err := json.Marshal(map[string]string{"message": "\x1b[31mtoken " + token + strings.Repeat("x", 5000)})
	if err != nil {
		t.Fatal(err)
	}
	c := newClient(t, "http://127.0.0.1:1", func(c *eksauth.Config) { c.Transport = answering(400, header, string(body)) })
	_, got := c.AssumeRoleForPodIdentity(t.Context(), token)
	text := got.Error()
	if strings.Contains(text, "eyJ0eyJ0") || strings.Contains(text, "\x1b") || len(text) > 1000 {
		t.Errorf("error %q", text)
	}
}

func TestNewRefuses(t *testing.T) {
	t.Parallel()
	good := eksauth.Config{ClusterName: "prod", Region: "us-west-2", Credentials: static(nodeKeys())}
	if _, err := eksauth.New(good); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		change func(*eksauth.Config)
		want   error
	}{
		"no cluster":         {func(c *eksauth.Config) { c.ClusterName = "" }, eksauth.ErrClusterName},
		"path in cluster":    {func(c *eksauth.Config) { c.ClusterName = "a/../b" }, eksauth.ErrClusterName},
		"long cluster":       {func(c *eksauth.Config) { c.ClusterName = strings.Repeat("a", 101) }, eksauth.ErrClusterName},
		"no region":          {func(c *eksauth.Config) { c.Region = "" }, eksauth.ErrRegion},
		"host in region":     {func(c *eksauth.Config) { c.Region = "x.example.org/" }, eksauth.ErrRegion},
		"no credentials":     {func(c *eksauth.Config) { c.Credentials = nil }, eksauth.ErrConfig},
		"no scheme":          {func(c *eksauth.Config) { c.Endpoint = "localhost:80" }, eksauth.ErrEndpoint},
		"no host":            {func(c *eksauth.Config) { c.Endpoint = "https://" }, eksauth.ErrEndpoint},
		"password":           {func(c *eksauth.Config) { c.Endpoint = "https://u:p@host" }, eksauth.ErrEndpoint},
		"query":              {func(c *eksauth.Config) { c.Endpoint = "https://host/?a=b" }, eksauth.ErrEndpoint},
		"FIPS with endpoint": {func(c *eksauth.Config) { c.Endpoint, c.FIPS = "https://host", true }, eksauth.ErrEndpoint},
	} {
		cfg := good
		tt.change(&cfg)
		if _, err := eksauth.New(cfg); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestEndpoints(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		region string
		fips   bool
		want   string
	}{
		{"us-west-2", false, "https://eks-auth.us-west-2.api.aws"},
		{"us-east-1", true, "https://eks-auth-fips.us-east-1.api.aws"},
		{"cn-north-1", false, "https://eks-auth.cn-north-1.api.amazonwebservices.com.cn"},
		{"us-gov-west-1", true, "https://eks-auth-fips.us-gov-west-1.api.aws"},
		{"us-iso-east-1", false, "https://eks-auth.us-iso-east-1.api.aws.ic.gov"},
		{"us-isob-east-1", false, "https://eks-auth.us-isob-east-1.api.aws.scloud"},
		{"eusc-de-east-1", false, "https://eks-auth.eusc-de-east-1.api.amazonwebservices.eu"},
	} {
		if got := eksauth.DefaultEndpoint(tt.region, tt.fips); got != tt.want {
			t.Errorf("%s: %s, want %s", tt.region, got, tt.want)
		}
	}
	c := newClient(t, "https://host/base/", nil)
	if got := c.Endpoint(); got != "https://host/base" {
		t.Errorf("endpoint %q", got)
	}
}

// isolate keeps the machine's own AWS configuration out of a test.
func isolate(t *testing.T) {
	t.Helper()
	for _, name := range []string{"AWS_PROFILE", "AWS_CA_BUNDLE", "AWS_USE_FIPS_ENDPOINT", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS"} {
		t.Setenv(name, "")
	}
	for _, name := range []string{"AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_EKS_AUTH"} {
		t.Setenv(name, "") // restores it afterwards
		if err := os.Unsetenv(name); err != nil {
			t.Fatal(err)
		}
	}
	dir := t.TempDir()
	t.Setenv("AWS_CONFIG_FILE", filepath.Join(dir, "config"))
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", filepath.Join(dir, "credentials"))
	t.Setenv("AWS_REGION", "eu-central-1")
	t.Setenv("AWS_ACCESS_KEY_ID", nodeKeys().AccessKeyID)
	t.Setenv("AWS_SECRET_ACCESS_KEY", nodeKeys().SecretAccessKey)
}

func TestConfigFromEnvironment(t *testing.T) {
	for name, tt := range map[string]struct {
		env      map[string]string
		profile  string
		endpoint string
		fips     bool
	}{
		"nothing set":            {nil, "", "", false},
		"own":                    {map[string]string{"AWS_ENDPOINT_URL_EKS_AUTH": "https://own"}, "", "https://own", false},
		"global":                 {map[string]string{"AWS_ENDPOINT_URL": "https://global"}, "", "https://global", false},
		"own before global":      {map[string]string{"AWS_ENDPOINT_URL": "https://global", "AWS_ENDPOINT_URL_EKS_AUTH": "https://own"}, "", "https://own", false},
		"ignored":                {map[string]string{"AWS_ENDPOINT_URL_EKS_AUTH": "https://own", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"}, "", "", false},
		"profile":                {nil, "[default]\nservices = s\n[services s]\neks_auth =\n  endpoint_url = https://file\n", "https://file", false},
		"env global, file's own": {map[string]string{"AWS_ENDPOINT_URL": "https://global"}, "[default]\nservices = s\n[services s]\neks_auth =\n  endpoint_url = https://file\n", "https://global", false},
		"FIPS":                   {map[string]string{"AWS_USE_FIPS_ENDPOINT": "true"}, "", "", true},
	} {
		t.Run(name, func(t *testing.T) {
			isolate(t)
			for k, v := range tt.env {
				t.Setenv(k, v)
			}
			if tt.profile != "" {
				if err := os.WriteFile(os.Getenv("AWS_CONFIG_FILE"), []byte(tt.profile), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			loaded, err := config.LoadDefaultConfig(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			got, err := eksauth.ConfigFrom(t.Context(), loaded)
			if err != nil {
				t.Fatal(err)
			}
			if got.Region != "eu-central-1" || got.Endpoint != tt.endpoint || got.FIPS != tt.fips || got.Credentials == nil {
				t.Errorf("got region %q endpoint %q fips %t", got.Region, got.Endpoint, got.FIPS)
			}
		})
	}
}

func TestPrivateCAFromEnvironment(t *testing.T) {
	isolate(t)
	b := newBed(t)
	srv := httptest.NewTLSServer(b.Server)
	defer srv.Close()
	bundle := filepath.Join(t.TempDir(), "ca.pem")
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})
	if err := os.WriteFile(bundle, ca, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("AWS_REGION", "us-west-2")
	t.Setenv("AWS_ENDPOINT_URL_EKS_AUTH", srv.URL)
	call := func() error {
		loaded, err := config.LoadDefaultConfig(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		cfg, err := eksauth.ConfigFrom(t.Context(), loaded)
		if err != nil {
			t.Fatal(err)
		}
		transport, ok := cfg.Transport.(*http.Transport)
		if !ok || transport.Proxy == nil {
			t.Error("the transport has no proxy function")
		}
		defer transport.CloseIdleConnections()
		cfg.ClusterName, cfg.MaxAttempts = "prod", 1
		c, err := eksauth.New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		_, err = c.AssumeRoleForPodIdentity(t.Context(), b.token)
		return err
	}
	var unknown x509.UnknownAuthorityError
	if err := call(); !errors.As(err, &unknown) {
		t.Errorf("without the CA: %v", err)
	}
	t.Setenv("AWS_CA_BUNDLE", bundle)
	if err := call(); err != nil {
		t.Errorf("with the CA: %v", err)
	}
}
