// SPDX-License-Identifier: Apache-2.0

package server

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
)

// raw is a request that no SDK would make.
type raw struct {
	method, path, body string
	// service and at are signed for; change comes after the signature.
	service string
	at      time.Time
	change  func(*http.Request)
	// presign puts the signature into the query.
	presign bool
}

func (s *server) raw(c aws.Credentials, q raw) (status int, code, message string) {
	s.t.Helper()
	if q.service == "" {
		q.service = "eks"
	}
	if q.at.IsZero() {
		q.at = time.Now()
	}
	req, err := http.NewRequestWithContext(s.ctx, q.method, s.url+q.path, strings.NewReader(q.body))
	if err != nil {
		s.t.Fatal(err)
	}
	sum := sha256.Sum256([]byte(q.body))
	hash := hex.EncodeToString(sum[:])
	if q.presign {
		signed, _, err := v4.NewSigner().PresignHTTP(s.ctx, c, req, hash, q.service, region, q.at)
		if err != nil {
			s.t.Fatal(err)
		}
		if req, err = http.NewRequestWithContext(s.ctx, q.method, signed, strings.NewReader(q.body)); err != nil {
			s.t.Fatal(err)
		}
	} else if err := v4.NewSigner().SignHTTP(s.ctx, c, req, hash, q.service, region, q.at); err != nil {
		s.t.Fatal(err)
	}
	if q.change != nil {
		q.change(req)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	var m struct{ Message string }
	if err := json.Unmarshal(b, &m); err != nil || resp.Header.Get("Content-Type") != "application/json" || resp.Header.Get("Date") == "" || resp.Header.Get("X-Amzn-Requestid") == "" {
		s.t.Errorf("%s %s: not the answer of an AWS service: %v %q", q.method, q.path, resp.Header, b)
	}
	code, _, _ = strings.Cut(resp.Header.Get("X-Amzn-Errortype"), ":")
	return resp.StatusCode, code, m.Message
}

// Whatever is sent, the answer is one that an SDK can read, and nothing changes.
func TestBadInput(t *testing.T) {
	t.Parallel()
	s := start(t)
	s.addCluster(cluster, newSigner(t))
	admin := s.user("admin")
	before := s.cli("association", "export", "-c", cluster)
	const associations = "/clusters/" + cluster + "/pod-identity-associations"
	create := `{"namespace":"n","serviceAccount":"s","roleArn":"` + roleARN("r") + `"}`
	for _, tc := range []struct {
		name   string
		q      raw
		status int
		code   string
	}{
		{"no such route", raw{method: "GET", path: "/clusters/prod/nodegroups"}, 404, ""},
		{"the root", raw{method: "GET", path: "/"}, 404, ""},
		{"dots in the path", raw{method: "GET", path: "/clusters/../clusters/prod/pod-identity-associations/."}, 404, ""},
		{"another method", raw{method: "PUT", path: associations, body: create}, 0, ""},
		{"no JSON", raw{method: "POST", path: associations, body: "namespace=n"}, 400, ""},
		{"a list", raw{method: "POST", path: associations, body: "[]"}, 400, ""},
		{"a number for a text", raw{method: "POST", path: associations, body: `{"namespace":1}`}, 400, ""},
		{"deep", raw{method: "POST", path: associations, body: strings.Repeat(`{"tags":`, 20000) + strings.Repeat("}", 20000)}, 400, ""},
		{"a megabyte", raw{method: "POST", path: associations, body: `{"namespace":"` + strings.Repeat("n", 1<<20) + `"}`}, 0, ""},
		{"no UTF-8", raw{method: "POST", path: associations, body: "{\"namespace\":\"\xff\"}"}, 400, ""},
		{"a zero byte", raw{method: "POST", path: associations, body: `{"namespace":"n\u0000","serviceAccount":"s","roleArn":"` + roleARN("r") + `"}`}, 400, "InvalidParameterException"},
		{"stale", raw{method: "POST", path: associations, body: create, at: time.Now().Add(-10 * time.Minute)}, 403, "InvalidSignatureException"},
		{"from the future", raw{method: "POST", path: associations, body: create, at: time.Now().Add(10 * time.Minute)}, 403, "InvalidSignatureException"},
		{"for another service", raw{method: "POST", path: associations, body: create, service: "s3"}, 403, "InvalidSignatureException"},
		{"presigned", raw{method: "POST", path: associations, body: create, presign: true}, 403, ""},
		{"a changed body", raw{method: "POST", path: associations, body: create, change: func(r *http.Request) {
			r.Body = io.NopCloser(bytes.NewReader([]byte(strings.Replace(create, `"n"`, `"m"`, 1))))
		}}, 403, "InvalidSignatureException"},
		{"a changed path", raw{method: "POST", path: associations, body: create, change: func(r *http.Request) { r.URL.Path = "/clusters/other/pod-identity-associations" }}, 403, "InvalidSignatureException"},
		{"half a signature", raw{method: "POST", path: associations, body: create, change: func(r *http.Request) { r.Header.Set("Authorization", "AWS4-HMAC-SHA256 Credential=x") }}, 403, "IncompleteSignatureException"},
		{"another scheme", raw{method: "POST", path: associations, body: create, change: func(r *http.Request) { r.Header.Set("Authorization", "Bearer x") }}, 403, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			status, code, message := s.raw(admin, tc.q)
			if status < 400 || status >= 500 || tc.status != 0 && status != tc.status || tc.code != "" && code != tc.code || code == "" {
				t.Errorf("%d %s %s; want %d %s", status, code, message, tc.status, tc.code)
			}
		})
	}
	t.Run("a replay", func(t *testing.T) {
		// Within five minutes a signature is good again, as with AWS; the service
		// account has its association by then.
		at := time.Now()
		q := raw{method: "POST", path: associations, body: strings.Replace(create, `"s"`, `"replayed"`, 1), at: at}
		first, _, message := s.raw(admin, q)
		second, code, _ := s.raw(admin, q)
		if first != 200 || second != 409 || code != "ResourceInUseException" {
			t.Errorf("%d %s, then %d %s", first, message, second, code)
		}
		s.cli("association", "delete", "-c", cluster, "-n", "n", "-s", "replayed")
	})
	if after := s.cli("association", "export", "-c", cluster); after != before {
		t.Errorf("something was made of it:\n%s", after)
	}
	if m, err := s.get("/metrics"); err != nil || strings.Contains(m, "nodegroups") {
		t.Errorf("a path became a time series: %v", err)
	}
}

// A condition on tags holds, and cannot be got round by tagging.
func TestTagConditions(t *testing.T) {
	t.Parallel()
	s := start(t)
	s.addCluster(cluster, newSigner(t))
	s.cli("association", "create", "-c", cluster, "-n", "web", "-s", "ours", "-r", roleARN("r"), "--tag", "team=web")
	s.cli("association", "create", "-c", cluster, "-n", "web", "-s", "theirs", "-r", roleARN("r"), "--tag", "team=core")
	out := s.try(`
- actions: ["eks:*"]
  clusters: ["*"]
  namespaces: ["*"]
  passRoles: ["*"]
  conditions: {StringEquals: {"aws:ResourceTag/team": web}}
`, "user", "add", "web-team", "--permissions", "-")
	var c aws.Credentials
	if _, err := fmt.Sscanf(strings.ReplaceAll(out.stdout, "=", " "), "AWS_ACCESS_KEY_ID %s\nAWS_SECRET_ACCESS_KEY %s", &c.AccessKeyID, &c.SecretAccessKey); err != nil {
		t.Fatalf("%+v: %v", out, err)
	}
	var ids = map[string]string{}
	for line := range strings.Lines(s.cli("association", "list", "-c", cluster)) {
		if f := strings.Fields(line); len(f) > 4 && f[0] == "web" {
			ids[f[1]] = f[4]
		}
	}
	path := func(name string) string { return "/clusters/" + cluster + "/pod-identity-associations/" + ids[name] }
	s.until("the user is known", func() error {
		if _, code, _ := s.raw(c, raw{method: "GET", path: "/tags/x"}); code == "UnrecognizedClientException" {
			return fmt.Errorf("%s", code)
		}
		return nil
	})
	if status, code, m := s.raw(c, raw{method: "POST", path: path("ours"), body: `{"roleArn":"` + roleARN("q") + `"}`}); status != 200 {
		t.Errorf("what the tag allows: %d %s %s", status, code, m)
	}
	for what, q := range map[string]raw{
		"read":   {method: "GET", path: path("theirs")},
		"change": {method: "POST", path: path("theirs"), body: `{"roleArn":"` + roleARN("q") + `"}`},
		"delete": {method: "DELETE", path: path("theirs")},
		"tag":    {method: "POST", path: "/tags/arn:aws:eks:us-west-2:111122223333:podidentityassociation%2Fprod%2F" + ids["theirs"], body: `{"tags":{"team":"web"}}`},
	} {
		if status, code, _ := s.raw(c, q); status != 403 || code != "AccessDeniedException" {
			t.Errorf("%s of another team's: %d %s", what, status, code)
		}
	}
}
