// SPDX-License-Identifier: Apache-2.0

package credserver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
	"github.com/latchkey-dev/latchkey/pkg/verdict"
)

const text = "text/plain; charset=utf-8"

// TestAnswers is the wire contract: what is sent, and the status, type and
// body that come back.
func TestAnswers(t *testing.T) {
	wrongHost := func(h string) string {
		return "Access Denied. Called agent through invalid address, please use either " +
			"[169.254.170.23 fd00:ec2::23 127.0.0.1] address not " + h + "\n"
	}
	host := func(h string) string {
		return "GET /v1/credentials HTTP/1.1\r\nHost: " + h + "\r\nAccept: */*\r\nAuthorization: " + tokenA + "\r\n\r\n"
	}
	line := func(l string) string {
		return l + "\r\nHost: 169.254.170.23\r\nAccept: */*\r\nAuthorization: " + tokenA + "\r\n\r\n"
	}
	for _, c := range []struct {
		name   string
		send   string
		status int
		kind   string
		body   string
		reason evidence.Reason
		closes bool
	}{
		{"the request of an SDK", get(tokenA, "Accept: application/json"), 200, "application/json", bodyA, evidence.ReasonServed, false},
		{"no Accept", get(tokenA), 200, "application/json", bodyA, evidence.ReasonServed, false},
		{"query string", line("GET /v1/credentials?a=b HTTP/1.1"), 200, "application/json", bodyA, evidence.ReasonServed, false},
		{"POST", "POST /v1/credentials HTTP/1.1\r\nHost: 169.254.170.23\r\nAuthorization: " + tokenA + "\r\nContent-Length: 5\r\n\r\nhello", 200, "application/json", bodyA, evidence.ReasonServed, false},
		{"DELETE", line("DELETE /v1/credentials HTTP/1.1"), 200, "application/json", bodyA, evidence.ReasonServed, false},
		{"a method of one's own", line("FETCH /v1/credentials HTTP/1.1"), 200, "application/json", bodyA, evidence.ReasonServed, false},
		{"HEAD", line("HEAD /v1/credentials HTTP/1.1"), 200, "application/json", "", evidence.ReasonServed, false},
		{"absolute form", line("GET http://169.254.170.23/v1/credentials HTTP/1.1"), 200, "application/json", bodyA, evidence.ReasonServed, false},
		{"lower-case header names", "GET /v1/credentials HTTP/1.1\r\nhost: 169.254.170.23\r\nauthorization: " + tokenA + "\r\n\r\n", 200, "application/json", bodyA, evidence.ReasonServed, false},
		{"trailing blanks after the token", get(tokenA + " \t "), 200, "application/json", bodyA, evidence.ReasonServed, false},
		{"HTTP/1.0", line("GET /v1/credentials HTTP/1.0"), 200, "application/json", bodyA, evidence.ReasonServed, true},
		{"Connection: close", get(tokenA, "Connection: close"), 200, "application/json", bodyA, evidence.ReasonServed, true},
		{"Connection: Close", get(tokenA, "Connection: Close"), 200, "application/json", bodyA, evidence.ReasonServed, true},
		{"close in a list", get(tokenA, "Connection: TE, close"), 200, "application/json", bodyA, evidence.ReasonServed, true},

		{"host with port", host("169.254.170.23:80"), 200, "application/json", bodyA, evidence.ReasonServed, false},
		{"host with empty port", host("169.254.170.23:"), 200, "application/json", bodyA, evidence.ReasonServed, false},
		{"IPv6 host", host("[fd00:ec2::23]"), 200, "application/json", bodyA, evidence.ReasonServed, false},
		{"IPv6 host with port", host("[fd00:ec2::23]:80"), 200, "application/json", bodyA, evidence.ReasonServed, false},
		{"IPv6 host without brackets", host("fd00:ec2::23"), 200, "application/json", bodyA, evidence.ReasonServed, false},
		{"DNS rebinding", host("evil.example"), 403, text, wrongHost("evil.example"), evidence.ReasonHost, false},
		{"DNS rebinding with port", host("evil.example:80"), 403, text, wrongHost("evil.example"), evidence.ReasonHost, false},
		{"address of IMDS", host("169.254.169.254"), 403, text, wrongHost("169.254.169.254"), evidence.ReasonHost, false},
		{"another spelling of the address", host("0xa9.254.170.23"), 403, text, wrongHost("0xa9.254.170.23"), evidence.ReasonHost, false},
		{"upper-case IPv6", host("[FD00:EC2::23]"), 403, text, wrongHost("FD00:EC2::23"), evidence.ReasonHost, false},
		{"port that is none", host("169.254.170.23:8o"), 403, text, wrongHost("169.254.170.23:8o"), evidence.ReasonHost, false},
		{"name before the address", host("evil.169.254.170.23"), 403, text, wrongHost("evil.169.254.170.23"), evidence.ReasonHost, false},
		{"user in the host", host("169.254.170.23@evil"), 403, text, wrongHost("169.254.170.23@evil"), evidence.ReasonHost, false},
		{"two pairs of brackets", host("[[fd00:ec2::23]]"), 403, text, wrongHost("[[fd00:ec2::23]]"), evidence.ReasonHost, false},
		{"absolute form to another host", line("GET http://evil.example/v1/credentials HTTP/1.1"), 403, text, wrongHost("evil.example"), evidence.ReasonHost, false},
		{"empty host", host(""), 400, text, "400 Bad Request: missing required Host header\n", ReasonBadRequest, true},
		{"no host", "GET /v1/credentials HTTP/1.1\r\nAccept: */*\r\nAuthorization: " + tokenA + "\r\n\r\n", 400, text, "400 Bad Request: missing required Host header\n", ReasonBadRequest, true},
		{"no host in HTTP/1.0", "GET /v1/credentials HTTP/1.0\r\nAccept: */*\r\nAuthorization: " + tokenA + "\r\n\r\n", 403, text, wrongHost(""), evidence.ReasonHost, true},
		{"wrong host in JSON", "GET /v1/credentials HTTP/1.1\r\nHost: a\"b\r\nAccept: */*, Application/JSON\r\n\r\n", 403, "application/json", jsonError("AccessDeniedException", strings.TrimSuffix(wrongHost(`a"b`), "\n")), evidence.ReasonHost, false},

		{"root, as probes ask", line("GET / HTTP/1.1"), 404, text, "404 page not found\n", ReasonNotFound, false},
		{"trailing slash", line("GET /v1/credentials/ HTTP/1.1"), 404, text, "404 page not found\n", ReasonNotFound, false},
		{"another case", line("GET /v1/Credentials HTTP/1.1"), 404, text, "404 page not found\n", ReasonNotFound, false},
		{"double slash", line("GET //v1/credentials HTTP/1.1"), 404, text, "404 page not found\n", ReasonNotFound, false},
		{"dots", line("GET /x/../v1/credentials HTTP/1.1"), 404, text, "404 page not found\n", ReasonNotFound, false},
		{"IMDS", line("GET /latest/meta-data/ HTTP/1.1"), 404, text, "404 page not found\n", ReasonNotFound, false},
		{"authority form", line("CONNECT 169.254.170.23:80 HTTP/1.1"), 404, text, "404 page not found\n", ReasonNotFound, false},
		{"asterisk form", line("OPTIONS * HTTP/1.1"), 404, text, "404 page not found\n", ReasonNotFound, false},
		{"absolute form without path", line("GET http://169.254.170.23 HTTP/1.1"), 404, text, "404 page not found\n", ReasonNotFound, false},
		{"another scheme", line("GET https://169.254.170.23/v1/credentials HTTP/1.1"), 404, text, "404 page not found\n", ReasonNotFound, false},
		{"404 stays text for JSON clients", "GET /x HTTP/1.1\r\nHost: x\r\nAccept: application/json\r\n\r\n", 404, text, "404 page not found\n", ReasonNotFound, false},

		{"no token", get(""), 400, text, "Service account token cannot be empty\n", evidence.ReasonTokenMissing, false},
		{"blank token", get("   "), 400, text, "Service account token cannot be empty\n", evidence.ReasonTokenMissing, false},
		{"Bearer", get("Bearer " + tokenA), 400, text, "Service account token cannot be parsed: it does not have three parts\n", evidence.ReasonTokenMalformed, false},
		{"another audience", get("foreign.audience.token"), 400, text, "Service account token has the wrong audience\n", evidence.ReasonTokenAudience, false},
		{"verifier fails without saying why", get("odd"), 503, text, "Service account token cannot be verified at the moment. Retry.\n", evidence.ReasonKeysUnavailable, false},
		{"no token, JSON", get("", "Accept: application/json"), 400, "application/json", jsonError("InvalidTokenException", "Service account token cannot be empty"), evidence.ReasonTokenMissing, false},
		// credential-provider-http of the JavaScript SDK.
		{"a token and no Accept", "GET /v1/credentials HTTP/1.1\r\nHost: 169.254.170.23\r\nAuthorization: foreign.audience.token\r\n\r\n", 400, "application/json", jsonError("InvalidTokenException", "Service account token has the wrong audience"), evidence.ReasonTokenAudience, false},

		{"garbage", "garbage\r\n\r\n", 400, text, "400 Bad Request\n", ReasonBadRequest, true},
		{"HTTP/2 preface", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, text, "HTTP Version Not Supported\n", ReasonBadRequest, true},
		{"HTTP/3.1", line("GET /v1/credentials HTTP/3.1"), 505, text, "HTTP Version Not Supported\n", ReasonBadRequest, true},
		{"control byte in a value", get("a\x01b"), 400, text, "400 Bad Request\n", ReasonBadRequest, true},
		{"space in a request line", line("GET /v1/cred entials HTTP/1.1"), 404, text, "404 page not found\n", ReasonNotFound, false},
		{"unknown transfer encoding", "POST /v1/credentials HTTP/1.1\r\nHost: 169.254.170.23\r\nTransfer-Encoding: gzip\r\n\r\n", 400, text, "400 Bad Request\n", ReasonBadRequest, true},
		{"two lengths", "POST /v1/credentials HTTP/1.1\r\nHost: 169.254.170.23\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400, text, "400 Bad Request\n", ReasonBadRequest, true},
		{"negative length", "POST /v1/credentials HTTP/1.1\r\nHost: 169.254.170.23\r\nContent-Length: -1\r\n\r\n", 400, text, "400 Bad Request\n", ReasonBadRequest, true},
		{"body too large", "POST /v1/credentials HTTP/1.1\r\nHost: 169.254.170.23\r\nContent-Length: 1000000\r\n\r\n", 413, text, "413 Request Entity Too Large\n", ReasonBadRequest, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBed(t, nil)
			conn := b.dial(t)
			r := conn.ask(c.send)
			if r.StatusCode != c.status || r.text != c.body {
				t.Fatalf("got %d %q, want %d %q", r.StatusCode, r.text, c.status, c.body)
			}
			if got := r.Header.Get("Content-Type"); got != c.kind {
				t.Errorf("content type %q, want %q", got, c.kind)
			}
			if r.Header.Get("Date") == "" || r.Header.Get("Server") != "" {
				t.Errorf("want a Date, as SDKs correct their clock from it, and no Server: %v", r.Header)
			}
			if nosniff := r.Header.Get("X-Content-Type-Options") == "nosniff"; nosniff != (c.status != 200) {
				t.Errorf("nosniff is %v at status %d", nosniff, c.status)
			}
			if strings.HasPrefix(c.send, "HEAD") {
				if r.ContentLength != int64(len(bodyA)) {
					t.Errorf("HEAD gives length %d, want %d", r.ContentLength, len(bodyA))
				}
			} else if r.ContentLength != int64(len(r.text)) {
				t.Errorf("length %d of %d bytes", r.ContentLength, len(r.text))
			}
			if r.Close != c.closes {
				t.Errorf("closing is %v, want %v", r.Close, c.closes)
			}
			rec := b.records.last(t)
			if rec.Status != c.status || rec.Reason != c.reason {
				t.Errorf("observed %d %q, want %d %q", rec.Status, rec.Reason, c.status, c.reason)
			}
			if c.closes {
				conn.ended()
				return
			}
			if r := conn.ask(get(tokenA)); r.StatusCode != 200 || r.text != bodyA {
				t.Errorf("the next request on the connection: got %d %q", r.StatusCode, r.text)
			}
		})
	}
}

func jsonError(code, message string) string {
	m, _ := json.Marshal(message)
	return fmt.Sprintf(`{"code":%q,"message":%s,"Code":%q,"Message":%s}`, code, m, code, m)
}

// TestUpstreamAnswers: the upstream's status and words are passed on; what it
// did not say itself is 5xx.
func TestUpstreamAnswers(t *testing.T) {
	unavailable := evidence.ReasonUpstreamUnavailable
	for _, c := range []struct {
		name   string
		err    error
		cred   Credential
		status int
		body   string
		reason evidence.Reason
		retry  bool
	}{
		{"no association", &UpstreamError{Reason: evidence.ReasonUpstreamNotFound, Status: 404, Code: "ResourceNotFoundException", Message: "No association", RequestID: "r-1"}, Credential{},
			404, "[r-1]: (ResourceNotFoundException): No association, fault: client\n", evidence.ReasonUpstreamNotFound, false},
		{"denied", &UpstreamError{Reason: evidence.ReasonUpstreamDenied, Status: 400, Code: "AccessDeniedException", Message: "Unauthorized Exception!", RequestID: "r-2"}, Credential{},
			400, "[r-2]: (AccessDeniedException): Unauthorized Exception!, fault: client\n", evidence.ReasonUpstreamDenied, false},
		{"throttled", &UpstreamError{Reason: evidence.ReasonUpstreamThrottled, Status: 429, Code: "ThrottlingException", Message: "Rate exceeded", RequestID: "r-3"}, Credential{},
			429, "[r-3]: (ThrottlingException): Rate exceeded, fault: client\n", evidence.ReasonUpstreamThrottled, true},
		{"unavailable", &UpstreamError{Status: 503, Code: "ServiceUnavailableException", Message: "later", RequestID: "r-4"}, Credential{},
			503, "[r-4]: (ServiceUnavailableException): later, fault: server\n", unavailable, true},
		{"no code", &UpstreamError{Status: 500, RequestID: "r-5"}, Credential{}, 500, "[r-5]: (InternalServerException): , fault: server\n", unavailable, false},
		{"no HTTP answer", &UpstreamError{Reason: unavailable, Err: errors.New("dial tcp: refused")}, Credential{}, 500, "No answer from the credential service. Retry.\n", unavailable, false},
		{"an error of no kind", errors.New("dial tcp: refused"), Credential{}, 500, "No answer from the credential service. Retry.\n", unavailable, false},
		{"the wait ended", fmt.Errorf("waiting: %w", context.DeadlineExceeded), Credential{}, 500, "The credential service has not answered yet. Retry.\n", unavailable, false},
		{"undecodable success", &UpstreamError{Reason: evidence.ReasonUpstreamInvalid, Status: 200, Code: "InvalidResponse", Message: "not JSON", RequestID: "r-6"}, Credential{},
			500, "[r-6]: (InvalidResponse): not JSON, fault: server\n", evidence.ReasonUpstreamInvalid, false},
		{"the upstream quotes the token", &UpstreamError{Status: 400, Code: "InvalidTokenException", Message: "bad token " + tokenA, RequestID: "r-7"}, Credential{},
			400, "[r-7]: (InvalidTokenException): bad token [token], fault: client\n", unavailable, false},
		{"empty credentials", nil, Credential{}, 500, "Internal error\n", ReasonInternal, false},
		{"expired credentials", nil, Credential{Body: []byte(bodyA), Expiry: newClock().Now(), Hit: true}, 500, "Internal error\n", ReasonInternal, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBed(t, func(cfg *Config, _ *bed) {
				cfg.Credentials = credentialsFunc(func(context.Context, CredentialRequest) (Credential, error) { return c.cred, c.err })
			})
			conn := b.dial(t)
			r := conn.ask(get(tokenA))
			if r.StatusCode != c.status || r.text != c.body {
				t.Fatalf("got %d %q, want %d %q", r.StatusCode, r.text, c.status, c.body)
			}
			if (r.Header.Get("Retry-After") == "1") != c.retry {
				t.Errorf("Retry-After %q, want it: %v", r.Header.Get("Retry-After"), c.retry)
			}
			rec := b.records.last(t)
			if rec.Reason != c.reason || rec.Status != c.status || !rec.Judged || rec.Token.Subject != subjectA {
				t.Errorf("observed %+v", rec)
			}
			if c.err != nil && !errors.Is(rec.Err, c.err) {
				t.Errorf("the cause is lost: %v", rec.Err)
			}
		})
	}
}

// TestVerdicts: evidence and token through to the answer, in every mode.
func TestVerdicts(t *testing.T) {
	finding := func(f evidence.Finding, r evidence.Reason) *pod {
		return &pod{attestation: evidence.Attestation{Finding: f, Reason: r}}
	}
	endedPod := podOf(podA)
	endedPod.ended.Store(true)
	type want struct {
		status int
		closes bool
	}
	served := want{200, false}
	for _, c := range []struct {
		name                string
		pod                 *pod
		token               string
		reason              evidence.Reason
		enforce, audit, off want
	}{
		{"its own token", podOf(podA), tokenA, evidence.ReasonServed, served, served, served},
		{"a stolen token", podOf(podA), tokenB, evidence.ReasonPodMismatch, want{403, false}, served, served},
		{"no evidence", finding(evidence.FindingNone, evidence.ReasonNoEvidence), tokenA, evidence.ReasonNoEvidence, want{503, true}, served, served},
		{"cgroup gone", finding(evidence.FindingNone, evidence.ReasonUnresolved), tokenA, evidence.ReasonUnresolved, want{503, true}, served, served},
		{"two pods", finding(evidence.FindingContradictory, evidence.ReasonTwoPods), tokenA, evidence.ReasonTwoPods, want{403, true}, served, served},
		{"foreign netns", finding(evidence.FindingContradictory, evidence.ReasonForeignNetns), tokenA, evidence.ReasonForeignNetns, want{403, true}, served, served},
		{"host process", finding(evidence.FindingNotPod, evidence.ReasonNotPod), tokenA, evidence.ReasonNotPod, want{403, true}, served, served},
		{"pod that has ended", endedPod, tokenA, evidence.ReasonPodEnded, want{403, true}, served, served},
		{"bad token without evidence", finding(evidence.FindingNone, evidence.ReasonNoEvidence), "foreign.audience.token", evidence.ReasonTokenAudience, want{400, false}, want{400, false}, want{400, false}},
	} {
		for mode, expect := range map[verdict.Mode]want{verdict.Enforce: c.enforce, verdict.Audit: c.audit, verdict.Off: c.off} {
			t.Run(c.name+"/"+mode.String(), func(t *testing.T) {
				var uncached bool
				b := newBed(t, func(cfg *Config, _ *bed) {
					cfg.Policy.Default = mode
					cfg.Attestor = attestAll(c.pod)
					cfg.Credentials = credentialsFunc(func(ctx context.Context, r CredentialRequest) (Credential, error) {
						uncached = r.Uncached
						return cached(ctx, r)
					})
				})
				r := b.dial(t).ask(get(c.token))
				if r.StatusCode != expect.status || r.Close != expect.closes {
					t.Fatalf("got %d %q, closing %v; want %+v", r.StatusCode, r.text, r.Close, expect)
				}
				if (r.Header.Get("Retry-After") == "1") != (expect.status == 503) {
					t.Errorf("Retry-After %q at status %d", r.Header.Get("Retry-After"), expect.status)
				}
				for _, secret := range []string{string(podA), string(podB), "web", "worker", "payload"} {
					if r.StatusCode != 200 && strings.Contains(r.text, secret) {
						t.Errorf("the refusal names %q: %q", secret, r.text)
					}
				}
				rec := b.records.last(t)
				if rec.Reason != c.reason || rec.Attestation != c.pod.attestation {
					t.Errorf("observed %+v, want reason %q", rec, c.reason)
				}
				if want := c.reason == evidence.ReasonPodEnded && mode != verdict.Enforce; uncached != want {
					t.Errorf("asked for uncached credentials: %v, want %v", uncached, want)
				}
			})
		}
	}
}

// An exception belongs to the namespace of the token, not of the caller.
func TestNamespaceException(t *testing.T) {
	b := newBed(t, func(cfg *Config, b *bed) {
		b.pod.attestation = evidence.Attestation{Finding: evidence.FindingNone}
		cfg.Policy.Namespaces = map[string]verdict.Mode{"web": verdict.Audit}
	})
	if r := b.dial(t).ask(get(tokenA)); r.StatusCode != 200 {
		t.Fatalf("got %d %q", r.StatusCode, r.text)
	}
	if rec := b.records.last(t); !rec.Verdict.Report {
		t.Errorf("the exception is not reported: %+v", rec.Verdict)
	}
}

// TestHTTPClient goes through net/http, which pools connections and checks what
// it reads more strictly than the raw tests do.
func TestHTTPClient(t *testing.T) {
	b := newBed(t, nil)
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	for i := range 20 {
		method := []string{"GET", "POST", "HEAD", "PUT"}[i%4]
		var body io.Reader
		if method == "POST" || method == "PUT" {
			body = strings.NewReader(strings.Repeat("x", i*500))
		}
		req, err := http.NewRequestWithContext(t.Context(), method, "http://"+b.addr+Path+"?n=1", body)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", tokenA)
		resp, err := transport.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if err != nil || resp.StatusCode != 200 || method != "HEAD" && string(got) != bodyA {
			t.Fatalf("%s: %d %q %v", method, resp.StatusCode, got, err)
		}
	}
	if s := b.Stats(); s.Connections != 1 || s.Accounts != 1 {
		t.Errorf("20 requests of one client left %+v, want one connection and one account", s)
	}
}

func TestNewRefuses(t *testing.T) {
	good := func() Config {
		return Config{
			Attestor: attestAll(podOf(podA)), Tokens: &tokens{clock: newClock()},
			Credentials: credentialsFunc(cached), Hosts: []string{"127.0.0.1"},
		}
	}
	if _, err := New(good()); err != nil {
		t.Fatalf("a good configuration: %v", err)
	}
	off := good()
	off.Attestor, off.Policy.Default = nil, verdict.Off
	if _, err := New(off); err != nil {
		t.Fatalf("mode off without an Attestor: %v", err)
	}
	for name, spoil := range map[string]func(*Config){
		"no tokens":                   func(c *Config) { c.Tokens = nil },
		"no credentials":              func(c *Config) { c.Credentials = nil },
		"no hosts":                    func(c *Config) { c.Hosts = nil },
		"empty host":                  func(c *Config) { c.Hosts = []string{""} },
		"host with brackets":          func(c *Config) { c.Hosts = []string{"[fd00:ec2::23]"} },
		"enforcing without Attestor":  func(c *Config) { c.Attestor = nil },
		"auditing without Attestor":   func(c *Config) { c.Attestor = nil; c.Policy.Default = verdict.Audit },
		"an exception needs Attestor": func(c *Config) { *c = off; c.Policy.Namespaces = map[string]verdict.Mode{"prod": verdict.Enforce} },
		"negative timeout":            func(c *Config) { c.IdleTimeout = -time.Second },
		"negative limit":              func(c *Config) { c.Limits.Pod.Connections = -1 },
		"rate that is no number":      func(c *Config) { c.Limits.Host.Rate = -1 },
		"burst beyond reason":         func(c *Config) { c.Limits.Stray.Burst = 1 << 40 },
	} {
		cfg := good()
		spoil(&cfg)
		if _, err := New(cfg); !errors.Is(err, ErrConfig) {
			t.Errorf("%s: got %v, want ErrConfig", name, err)
		}
	}
}
