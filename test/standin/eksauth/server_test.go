// SPDX-License-Identifier: Apache-2.0

package eksauth_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"io"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"

	"github.com/latchkey-dev/latchkey/test/standin/eksauth"
	"github.com/latchkey-dev/latchkey/test/standin/tokens"
)

const operation = "/clusters/prod/assume-role-for-pod-identity"

type bed struct {
	*eksauth.Running
	signer *tokens.Signer
	caller aws.Credentials
	client *http.Client
}

func newBed(t *testing.T) *bed {
	t.Helper()
	signer, err := tokens.NewSigner(tokens.Config{Algorithm: "ES256"})
	if err != nil {
		t.Fatal(err)
	}
	caller := aws.Credentials{AccessKeyID: "AKIDNODE", SecretAccessKey: "node-secret", SessionToken: "node-session"}
	r, err := eksauth.Start(eksauth.Config{
		Cluster: "prod", JWKS: signer.JWKS(), Issuer: signer.Issuer(),
		Callers: map[string]string{caller.AccessKeyID: caller.SecretAccessKey},
	})
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{}
	t.Cleanup(func() { transport.CloseIdleConnections(); r.Close() })
	r.Associate(eksauth.Association{Namespace: "web", ServiceAccount: "api", RoleARN: "arn:aws:iam::111122223333:role/team/api"})
	return &bed{Running: r, signer: signer, caller: caller, client: &http.Client{Transport: transport}}
}

func (b *bed) token(c tokens.Claims) string {
	if c.Namespace == "" {
		c.Namespace, c.ServiceAccount, c.Pod, c.PodUID = "web", "api", "api-5c9f7d8b6-x2x4z", tokens.UID("api")
	}
	return b.signer.Token(c)
}

// post signs with the SDK, so the stand-in's own arithmetic is checked by it.
func (b *bed) post(t *testing.T, service, path, body string) (*http.Response, map[string]any) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, b.URL+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	sum := sha256.Sum256([]byte(body))
	if service != "" {
		if err := v4.NewSigner().SignHTTP(t.Context(), b.caller, req, hex.EncodeToString(sum[:]), service, "us-west-2", time.Now()); err != nil {
			t.Fatal(err)
		}
	}
	return b.do(t, req)
}

func (b *bed) do(t *testing.T, req *http.Request) (*http.Response, map[string]any) {
	t.Helper()
	res, err := b.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	raw, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	var out map[string]any
	if err := json.Unmarshal(raw, &out); err != nil {
		t.Fatalf("answer is not JSON: %q", raw)
	}
	return res, out
}

func request(token string) string { return `{"token":"` + token + `"}` }

func TestAnswerIsTheServicesShape(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	res, out := b.post(t, "eks-auth", operation, request(b.token(tokens.Claims{})))
	if res.StatusCode != http.StatusOK {
		t.Fatalf("status %d: %v", res.StatusCode, out)
	}
	if id := res.Header.Get("x-amzn-RequestId"); !regexp.MustCompile(`^[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}$`).MatchString(id) {
		t.Errorf("x-amzn-RequestId %q is not a UUID", id)
	}
	if res.Header.Get("Date") == "" {
		t.Error("no Date")
	}
	credentials := out["credentials"].(map[string]any)
	key := credentials["accessKeyId"].(string)
	if !strings.HasPrefix(key, eksauth.AccessKeyPrefix) || len(key) != 20 {
		t.Errorf("access key id %q is not marked or not 20 long", key)
	}
	if secret := credentials["secretAccessKey"].(string); !strings.HasPrefix(secret, eksauth.SecretPrefix) || len(secret) != 40 {
		t.Errorf("secret of %d characters is not marked or not 40 long", len(secret))
	}
	if !strings.HasPrefix(credentials["sessionToken"].(string), eksauth.SessionTokenPrefix) {
		t.Error("session token is not marked")
	}
	if _, ok := credentials["expiration"].(float64); !ok {
		t.Errorf("expiration is %T, want a number", credentials["expiration"])
	}
	arn := out["assumedRoleUser"].(map[string]any)["arn"].(string)
	if !regexp.MustCompile(`^arn:aws:sts::111122223333:assumed-role/api/eks-prod-api-5c9f7d-[0-9a-f-]{36}$`).MatchString(arn) {
		t.Errorf("assumed role %q", arn)
	}
	assoc := out["podIdentityAssociation"].(map[string]any)
	if id := assoc["associationId"].(string); !regexp.MustCompile(`^a-[a-z0-9]{17}$`).MatchString(id) {
		t.Errorf("association id %q", id)
	}
	if out["audience"] != "pods.eks.amazonaws.com" || out["subject"].(map[string]any)["serviceAccount"] != "api" {
		t.Errorf("subject %v, audience %v", out["subject"], out["audience"])
	}
	calls := b.Calls()
	if len(calls) != 1 || calls[0].Status != 200 || calls[0].Pod != "api-5c9f7d8b6-x2x4z" || calls[0].AccessKeyID != "AKIDNODE" {
		t.Errorf("calls %+v", calls)
	}
}

func TestRefusals(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	other, err := tokens.NewSigner(tokens.Config{Algorithm: "ES256"})
	if err != nil {
		t.Fatal(err)
	}
	good := b.token(tokens.Claims{})
	signerKid := map[string]any{"kid": b.signer.KeyID()}
	web := tokens.Claims{Namespace: "web", ServiceAccount: "api", Pod: "p", PodUID: tokens.UID("p")}
	variant := func(change func(*tokens.Claims)) string {
		c := web
		change(&c)
		return request(b.signer.Token(c))
	}
	forged := web
	forged.Header = signerKid
	for name, tt := range map[string]struct {
		service, path, body string
		status              int
		kind                string
	}{
		"not signed":            {"", operation, request(good), 403, "MissingAuthenticationTokenException"},
		"signed for eks":        {"eks", operation, request(good), 403, "InvalidSignatureException"},
		"other cluster":         {"eks-auth", "/clusters/dev/assume-role-for-pod-identity", request(good), 404, "ResourceNotFoundException"},
		"other operation":       {"eks-auth", "/clusters/prod", request(good), 404, "UnknownOperationException"},
		"not JSON":              {"eks-auth", operation, "{", 400, "SerializationException"},
		"no token":              {"eks-auth", operation, "{}", 400, "InvalidParameterException"},
		"not a token":           {"eks-auth", operation, request("x.y.z"), 400, "InvalidTokenException"},
		"foreign key":           {"eks-auth", operation, request(other.Token(web)), 400, "InvalidTokenException"},
		"foreign key, our kid":  {"eks-auth", operation, request(other.Token(forged)), 400, "InvalidTokenException"},
		"signature changed":     {"eks-auth", operation, request(good[:len(good)-12] + "AAAAAAAAAAAA"), 400, "InvalidTokenException"},
		"expired":               {"eks-auth", operation, variant(func(c *tokens.Claims) { c.Expiry = time.Now().Add(-time.Minute) }), 400, "ExpiredTokenException"},
		"not yet":               {"eks-auth", operation, variant(func(c *tokens.Claims) { c.NotBefore = time.Now().Add(time.Hour) }), 400, "InvalidTokenException"},
		"foreign audience":      {"eks-auth", operation, variant(func(c *tokens.Claims) { c.Audience = "sts.amazonaws.com" }), 400, "InvalidTokenException"},
		"foreign issuer":        {"eks-auth", operation, variant(func(c *tokens.Claims) { c.Issuer = "https://elsewhere" }), 400, "InvalidTokenException"},
		"not bound to a pod":    {"eks-auth", operation, variant(func(c *tokens.Claims) { c.NoPod = true }), 400, "InvalidTokenException"},
		"subject contradicts":   {"eks-auth", operation, variant(func(c *tokens.Claims) { c.Set = map[string]any{"sub": "system:serviceaccount:web:admin"} }), 400, "InvalidTokenException"},
		"no association":        {"eks-auth", operation, variant(func(c *tokens.Claims) { c.ServiceAccount = "none" }), 404, "ResourceNotFoundException"},
		"algorithm none":        {"eks-auth", operation, request(tokens.Assemble([]byte(`{"alg":"none"}`), b.signer.Payload(web), nil)), 400, "InvalidTokenException"},
		"key used as HMAC key":  {"eks-auth", operation, request(tokens.SignHMAC([]byte(`{"alg":"HS256","kid":"`+b.signer.KeyID()+`"}`), b.signer.Payload(web), b.signer.PEM())), 400, "InvalidTokenException"},
		"body beyond the limit": {"eks-auth", operation, request(strings.Repeat("a", 70<<10)), 400, "SerializationException"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			res, out := b.post(t, tt.service, tt.path, tt.body)
			kind, _, _ := strings.Cut(res.Header.Get("x-amzn-ErrorType"), ":")
			if res.StatusCode != tt.status || kind != tt.kind {
				t.Errorf("%d %s (%v), want %d %s", res.StatusCode, kind, out["message"], tt.status, tt.kind)
			}
			if out["message"] == nil || res.Header.Get("Content-Type") != "application/json" {
				t.Errorf("error body %v of type %q", out, res.Header.Get("Content-Type"))
			}
		})
	}
}

func TestSignatureIsComputedNotOnlySeen(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	b.caller.SecretAccessKey = "guessed"
	if res, _ := b.post(t, "eks-auth", operation, request(b.token(tokens.Claims{}))); res.StatusCode != http.StatusForbidden {
		t.Errorf("wrong secret: status %d", res.StatusCode)
	}
	b.caller.AccessKeyID = "AKIDOTHER"
	res, _ := b.post(t, "eks-auth", operation, request(b.token(tokens.Claims{})))
	if got := res.Header.Get("x-amzn-ErrorType"); !strings.HasPrefix(got, "UnrecognizedClientException") {
		t.Errorf("unknown key: %d %s", res.StatusCode, got)
	}
}

func TestFaults(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	body := request(b.token(tokens.Claims{}))
	held := make(chan struct{})
	close(held)
	for _, tt := range []struct {
		name  string
		fault eksauth.Fault
		check func(res *http.Response, out map[string]any) bool
	}{
		{"refuse", eksauth.Fault{Kind: eksauth.Refuse, ErrorType: "ThrottlingException", RetryAfter: "7"}, func(res *http.Response, _ map[string]any) bool {
			return res.StatusCode == 429 && res.Header.Get("Retry-After") == "7"
		}},
		{"omit", eksauth.Fault{Kind: eksauth.Omit, Members: []string{"audience", "credentials.sessionToken"}}, func(_ *http.Response, out map[string]any) bool {
			_, audience := out["audience"]
			_, token := out["credentials"].(map[string]any)["sessionToken"]
			return !audience && !token
		}},
		{"empty", eksauth.Fault{Kind: eksauth.Empty, Members: []string{"podIdentityAssociation"}}, func(_ *http.Response, out map[string]any) bool {
			v, ok := out["podIdentityAssociation"]
			return ok && v == nil
		}},
		{"body", eksauth.Fault{Kind: eksauth.Body, Body: []byte(`{"x":1}`)}, func(res *http.Response, out map[string]any) bool {
			return res.StatusCode == 200 && out["x"] != nil
		}},
		{"expired", eksauth.Fault{Kind: eksauth.Expired}, func(_ *http.Response, out map[string]any) bool {
			return out["credentials"].(map[string]any)["expiration"].(float64) < float64(time.Now().Unix())
		}},
		{"other subject", eksauth.Fault{Kind: eksauth.OtherSubject}, func(_ *http.Response, out map[string]any) bool {
			return out["subject"].(map[string]any)["serviceAccount"] != "api"
		}},
		{"held, then right", eksauth.Fault{Hold: held}, func(res *http.Response, _ map[string]any) bool { return res.StatusCode == 200 }},
	} {
		tt.fault.Times = 1
		b.Inject(tt.fault)
		if res, out := b.post(t, "eks-auth", operation, body); !tt.check(res, out) {
			t.Errorf("%s: %d %v", tt.name, res.StatusCode, out)
		}
	}
	if res, _ := b.post(t, "eks-auth", operation, body); res.StatusCode != 200 {
		t.Errorf("after the faults: %d", res.StatusCode)
	}
	if got := b.CallsFor("web", "api"); got != 8 {
		t.Errorf("%d calls recorded, want 8", got)
	}
}

func TestCutConnections(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	try := func() error {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, b.URL+operation, bytes.NewReader(nil))
		if err != nil {
			t.Fatal(err)
		}
		res, err := b.client.Do(req)
		if err != nil {
			return err
		}
		defer func() { _ = res.Body.Close() }()
		_, err = io.ReadAll(res.Body)
		return err
	}
	b.Inject(eksauth.Fault{Kind: eksauth.Reset, Times: 1})
	if try() == nil {
		t.Error("reset: no error")
	}
	if err := try(); err != nil {
		t.Errorf("after the reset: %v", err)
	}
	b.Refuse()
	if try() == nil {
		t.Error("refused: no error")
	}
	if err := b.Resume(); err != nil {
		t.Fatal(err)
	}
	if err := try(); err != nil {
		t.Errorf("resumed: %v", err)
	}
}

func TestErrorTypesAreTheModels(t *testing.T) {
	t.Parallel()
	want := []string{"AccessDeniedException", "ExpiredTokenException", "InternalServerException", "InvalidParameterException",
		"InvalidRequestException", "InvalidTokenException", "ResourceNotFoundException", "ServiceUnavailableException", "ThrottlingException"}
	if got := eksauth.ErrorTypes(); !slices.Equal(got, want) {
		t.Errorf("got %v", got)
	}
}

func TestTargetRole(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	b.Associate(eksauth.Association{Namespace: "web", ServiceAccount: "api",
		RoleARN: "arn:aws:iam::111122223333:role/api", TargetRoleARN: "arn:aws:iam::444455556666:role/target"})
	_, out := b.post(t, "eks-auth", operation, request(b.token(tokens.Claims{})))
	if arn := out["assumedRoleUser"].(map[string]any)["arn"].(string); !strings.HasPrefix(arn, "arn:aws:sts::444455556666:assumed-role/target/") {
		t.Errorf("assumed role %q", arn)
	}
	if exp := int64(out["credentials"].(map[string]any)["expiration"].(float64)); exp > time.Now().Add(59*time.Minute).Unix() {
		t.Errorf("expires at %d, more than 59 minutes from now", exp)
	}
}
