// SPDX-License-Identifier: Apache-2.0

package issuer

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	service "github.com/aws/aws-sdk-go-v2/service/sts"
	"github.com/aws/aws-sdk-go-v2/service/sts/types"
	"github.com/aws/smithy-go"
	"github.com/google/uuid"

	"github.com/latchkey-dev/latchkey/pkg/association"
	"github.com/latchkey-dev/latchkey/pkg/tokencheck"
	"github.com/latchkey-dev/latchkey/test/standin/sts"
)

const (
	keyID, secret = "AKIASTANDINTEST00001", "a secret of forty characters, more or less"
	broker        = "arn:aws:iam::111122223333:role/broker"
	role          = "arn:aws:iam::111122223333:role/team/web"
	target        = "arn:aws:iam::444455556666:role/data"
	policy        = `{"Version":"2012-10-17","Statement":[]}`
)

func testID() uuid.UUID { return uuid.MustParse("d1861451-6ee5-4069-ae5d-741cbb99692a") }

func request(edit ...func(*Request)) Request {
	r := Request{
		Cluster: association.Cluster{
			Name: "eks-workshop-of-many", ARN: "arn:aws:eks:eu-west-1:111122223333:cluster/eks-workshop-of-many",
			Region: "eu-west-1", Account: "111122223333", AllowedAccounts: []string{"444455556666"},
		},
		Association: association.Association{
			ID: "a-0123456789abcdefg", Cluster: "eks-workshop-of-many", Namespace: "web", ServiceAccount: "api", RoleARN: role,
		},
		Subject: tokencheck.Subject{
			Namespace: "web", ServiceAccount: "api", PodName: "app1-v1-56f9b5c8d-x2lq7", PodUID: "7c1c1dd4-1111-4222-8333-944455556666",
		},
	}
	for _, e := range edit {
		e(&r)
	}
	return r
}

func withTarget(r *Request) {
	r.Association.TargetRoleARN = target
	r.Association.ExternalID = "eu-west-1/111122223333/eks-workshop-of-many/web/api"
}

func withPolicy(r *Request) {
	r.Association.Policy, r.Association.DisableSessionTags = policy, true
}

func sixTags() map[string]string {
	return map[string]string{
		"eks-cluster-arn":            "arn:aws:eks:eu-west-1:111122223333:cluster/eks-workshop-of-many",
		"eks-cluster-name":           "eks-workshop-of-many",
		"kubernetes-namespace":       "web",
		"kubernetes-service-account": "api",
		"kubernetes-pod-name":        "app1-v1-56f9b5c8d-x2lq7",
		"kubernetes-pod-uid":         "7c1c1dd4-1111-4222-8333-944455556666",
	}
}

// rig is an issuer and the STS it calls.
type rig struct {
	*Issuer
	sts *sts.Running
	log *bytes.Buffer

	mu    sync.Mutex
	calls []Call
}

func start(t *testing.T, edit ...func(*Config)) *rig {
	t.Helper()
	s, err := sts.Start(sts.Config{Callers: map[string]sts.Caller{keyID: {SecretAccessKey: secret, ARN: broker}}, Region: "eu-west-1"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	s.AddRole(sts.Role{ARN: role, Trusts: []string{broker}, MaxSession: 12 * time.Hour})
	s.AddRole(sts.Role{ARN: target, Trusts: []string{role}, MaxSession: 12 * time.Hour, ExternalID: "eu-west-1/111122223333/eks-workshop-of-many/web/api"})
	r := &rig{sts: s, log: &bytes.Buffer{}}
	cfg := Config{
		Credentials: credentials.NewStaticCredentialsProvider(keyID, secret, ""), Endpoint: s.URL,
		MaxBackoff: time.Millisecond, NewID: testID, Log: slog.New(slog.NewTextHandler(r.log, nil)),
		// Generous: no test waits for them, but for those that set their own.
		AttemptTimeout: time.Minute, Timeout: 5 * time.Minute,
		Observe: func(c Call) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.calls = append(r.calls, c)
		},
	}
	for _, e := range edit {
		e(&cfg)
	}
	if r.Issuer, err = New(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	return r
}

// The calls of contract section 7.3, as STS gets them.
func TestCalls(t *testing.T) {
	session := "eks-eks-worksh-app1-v1-56-" + testID().String()
	first := sts.Call{RoleARN: role, SessionName: session, Duration: time.Hour, Tags: sixTags(), TransitiveKeys: slices.Sorted(maps.Keys(sixTags()))}
	second := sts.Call{RoleARN: target, SessionName: session, Duration: time.Hour, Chained: true, ExternalID: "eu-west-1/111122223333/eks-workshop-of-many/web/api"}
	edited := func(c sts.Call, edit func(*sts.Call)) sts.Call { edit(&c); return c }
	noTags := func(c *sts.Call) { c.Tags, c.TransitiveKeys = nil, nil }
	lasting := func(d time.Duration) func(*sts.Call) { return func(c *sts.Call) { c.Duration = d } }
	policied := func(c *sts.Call) { noTags(c); c.Policy = policy }

	for name, c := range map[string]struct {
		request  Request
		duration time.Duration
		want     []sts.Call
	}{
		"one hop":             {request(), 0, []sts.Call{first}},
		"one hop, 12 h":       {request(), 12 * time.Hour, []sts.Call{edited(first, lasting(12*time.Hour))}},
		"one hop, 15 min":     {request(), 15 * time.Minute, []sts.Call{edited(first, lasting(15*time.Minute))}},
		"one hop, no tags":    {request(func(r *Request) { r.Association.DisableSessionTags = true }), 0, []sts.Call{edited(first, noTags)}},
		"one hop, policy":     {request(withPolicy), 0, []sts.Call{edited(first, policied)}},
		"two hops":            {request(withTarget), 0, []sts.Call{edited(first, lasting(15*time.Minute)), second}},
		"two hops, 12 h":      {request(withTarget), 12 * time.Hour, []sts.Call{edited(first, lasting(15*time.Minute)), second}},
		"two hops, 30 min":    {request(withTarget), 30 * time.Minute, []sts.Call{edited(first, lasting(15*time.Minute)), edited(second, lasting(30*time.Minute))}},
		"two hops, policy":    {request(withTarget, withPolicy), 0, []sts.Call{edited(edited(first, lasting(15*time.Minute)), noTags), edited(second, func(c *sts.Call) { c.Policy = policy })}},
		"external id not set": {request(withTarget, func(r *Request) { r.Association.ExternalID = "" }), 0, []sts.Call{edited(first, lasting(15*time.Minute)), second}},
	} {
		t.Run(name, func(t *testing.T) {
			r := start(t, func(cfg *Config) { cfg.Duration = c.duration })
			got, err := r.Issue(t.Context(), c.request)
			if err != nil {
				t.Fatal(err)
			}
			var calls []sts.Call
			var ids []string
			for _, call := range r.sts.Calls() {
				ids = append(ids, call.RequestID)
				slices.Sort(call.TransitiveKeys)
				calls = append(calls, sts.Call{RoleARN: call.RoleARN, SessionName: call.SessionName, Duration: call.Duration, Chained: call.Chained,
					ExternalID: call.ExternalID, Policy: call.Policy, Tags: call.Tags, TransitiveKeys: call.TransitiveKeys})
				if call.Region != "eu-west-1" || !strings.Contains(call.UserAgent, "latchkey-server") {
					t.Errorf("region %s, user agent %s", call.Region, call.UserAgent)
				}
			}
			asText := func(v any) string { b, _ := json.MarshalIndent(v, "", " "); return string(b) }
			if asText(calls) != asText(c.want) {
				t.Errorf("got %s\nwant %s", asText(calls), asText(c.want))
			}
			if !slices.Equal(got.STSRequestIDs, ids) {
				t.Errorf("request ids %v, want %v", got.STSRequestIDs, ids)
			}
			last := c.want[len(c.want)-1]
			account, roleName := "111122223333", "web"
			if len(c.want) > 1 {
				account, roleName = "444455556666", "data"
			}
			if want := "arn:aws:sts::" + account + ":assumed-role/" + roleName + "/" + session; got.AssumedRoleARN != want {
				t.Errorf("assumed %s, want %s", got.AssumedRoleARN, want)
			}
			if !strings.HasSuffix(got.AssumedRoleID, ":"+session) || got.SessionName != session || len(session) > 64 {
				t.Errorf("session %s, id %s", got.SessionName, got.AssumedRoleID)
			}
			if got.AccessKeyID == "" || got.SecretAccessKey == "" || got.SessionToken == "" {
				t.Error("credentials are not complete")
			}
			// The last hop's tags are those of the first, inherited.
			tags := r.sts.TagsOf(got.AccessKeyID)
			if c.request.Association.DisableSessionTags != (len(tags) == 0) || len(tags) != 0 && !maps.Equal(tags, sixTags()) {
				t.Errorf("the session has tags %v", tags)
			}
			if left := time.Until(got.Expires); left > last.Duration || left < last.Duration-5*time.Minute {
				t.Errorf("expires in %s, asked for %s", left, last.Duration)
			}
			if len(r.calls) != len(c.want) || r.calls[0] != (Call{Hop: 1, Region: "eu-west-1", Code: "ok", Duration: r.calls[0].Duration}) {
				t.Errorf("observed %+v", r.calls)
			}
		})
	}
}

// What is wrong with an association, or more than its cluster may, never reaches
// STS.
func TestRefusedBeforeSTS(t *testing.T) {
	for name, c := range map[string]struct {
		edit func(*Request)
		want error
	}{
		"role not allowed":    {func(r *Request) { r.Cluster.AllowedRoles = []string{"arn:aws:iam::111122223333:role/other*"} }, ErrAccessDenied},
		"another account":     {func(r *Request) { r.Association.RoleARN = "arn:aws:iam::444455556666:role/web" }, ErrAccessDenied},
		"target's account":    {func(r *Request) { withTarget(r); r.Cluster.AllowedAccounts = nil }, ErrAccessDenied},
		"target not allowed":  {func(r *Request) { withTarget(r); r.Cluster.AllowedRoles = []string{role} }, ErrAccessDenied},
		"role is no role":     {func(r *Request) { r.Association.RoleARN = "arn:aws:iam::111122223333:user/web" }, ErrAccessDenied},
		"no role":             {func(r *Request) { r.Association.RoleARN = "" }, ErrAccessDenied},
		"policy with tags":    {func(r *Request) { withPolicy(r); r.Association.DisableSessionTags = false }, ErrInvalidRequest},
		"tag's characters":    {func(r *Request) { r.Subject.PodName = "pod{1}" }, ErrInvalidRequest},
		"tag's length":        {func(r *Request) { r.Subject.PodName = strings.Repeat("x", 257) }, ErrInvalidRequest},
		"tag is not UTF-8":    {func(r *Request) { r.Subject.PodName = "\xff" }, ErrInvalidRequest},
		"external id":         {func(r *Request) { withTarget(r); r.Association.ExternalID = "a b" }, ErrInvalidRequest},
		"long external id":    {func(r *Request) { withTarget(r); r.Association.ExternalID = strings.Repeat("x", 1225) }, ErrInvalidRequest},
		"another cluster's":   {func(r *Request) { r.Association.Cluster = "b" }, ErrUnavailable},
		"another namespace":   {func(r *Request) { r.Subject.Namespace = "b" }, ErrUnavailable},
		"another account's s": {func(r *Request) { r.Subject.ServiceAccount = "b" }, ErrUnavailable},
	} {
		r := start(t)
		got, err := r.Issue(t.Context(), request(c.edit))
		var failed *Error
		if !errors.Is(err, c.want) || !errors.As(err, &failed) || failed.Message() == "" || got.AccessKeyID != "" {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
		if n := len(r.sts.Calls()); n != 0 {
			t.Errorf("%s: %d calls", name, n)
		}
		s, newErr := NewStandIn(StandInConfig{})
		if newErr != nil {
			t.Fatal(newErr)
		}
		if _, err := s.Issue(t.Context(), request(c.edit)); !errors.Is(err, c.want) {
			t.Errorf("%s: the stand-in: %v, want %v", name, err, c.want)
		}
	}
}

// Letters of other scripts and the longest names are fine; so is a dot in a name.
func TestTagsThatSTSTakes(t *testing.T) {
	r := start(t)
	name := strings.Repeat("a", 253)
	if _, err := r.Issue(t.Context(), request(func(r *Request) { r.Subject.PodName = name })); err != nil {
		t.Error(err)
	}
	if _, err := r.Issue(t.Context(), request(func(r *Request) { r.Subject.PodName = "pöd 1.x" })); err != nil {
		t.Error(err)
	}
	calls := r.sts.Calls()
	if got := calls[1].SessionName; got != "eks-eks-worksh-p-d-1.x-"+testID().String() {
		t.Errorf("session %s", got)
	}
}

// Every answer of STS has one meaning, and its own words do not reach the pod.
func TestErrors(t *testing.T) {
	want := map[string]struct {
		kind     error
		attempts int
	}{
		"throttle":              {ErrThrottled, 3},
		"too many requests":     {ErrThrottled, 3},
		"internal failure":      {ErrUnavailable, 3},
		"service unavailable":   {ErrUnavailable, 3},
		"access denied":         {ErrAccessDenied, 1},
		"packed policy":         {ErrInvalidRequest, 1},
		"malformed policy":      {ErrInvalidRequest, 1},
		"region disabled":       {ErrInvalidRequest, 1},
		"validation":            {ErrInvalidRequest, 1},
		"duration":              {ErrInvalidRequest, 1},
		"expired token":         {ErrUnavailable, 1},
		"unknown caller":        {ErrUnavailable, 1},
		"signature":             {ErrUnavailable, 1},
		"action not supported":  {ErrUnavailable, 1},
		"an unknown refusal":    {ErrUnavailable, 1},
		"denied by a proxy":     {ErrUnavailable, 1},
		"denied without a body": {ErrUnavailable, 1},
	}
	for name, fault := range sts.Refusals() {
		w, ok := want[name]
		if !ok {
			t.Errorf("%s: no expectation", name)
			continue
		}
		for hop, arn := range map[int]string{1: role, 2: target} {
			t.Run(fmt.Sprintf("%s, hop %d", name, hop), func(t *testing.T) {
				r := start(t)
				fault.RoleARN = arn
				r.sts.Inject(fault)
				_, err := r.Issue(t.Context(), request(withTarget))
				var failed *Error
				if !errors.As(err, &failed) || !errors.Is(err, w.kind) {
					t.Fatalf("%v, want %v", err, w.kind)
				}
				for _, kind := range []error{ErrAccessDenied, ErrInvalidRequest, ErrThrottled, ErrUnavailable} {
					if errors.Is(err, kind) != (kind == w.kind) {
						t.Errorf("is %v: %t", kind, errors.Is(err, kind))
					}
				}
				if failed.Message() == "" || strings.Contains(failed.Message(), "principal") || strings.Contains(failed.Message(), fault.Message) && fault.Message != "" {
					t.Errorf("message %q", failed.Message())
				}
				if fault.Body == nil && !strings.Contains(err.Error(), "secret-broker-principal") {
					t.Errorf("the log does not get the cause: %v", err)
				}
				calls := r.sts.Calls()
				if n := len(calls) - (hop - 1); n != w.attempts {
					t.Errorf("%d attempts, want %d", n, w.attempts)
				}
				if failed.Hop != hop || fault.Body == nil && failed.Code != fault.Code {
					t.Errorf("hop %d, code %s", failed.Hop, failed.Code)
				}
				if fault.Body == nil && (len(failed.STSRequestIDs) != hop || failed.STSRequestIDs[hop-1] != calls[len(calls)-1].RequestID) {
					t.Errorf("request ids %v", failed.STSRequestIDs)
				}
			})
		}
	}
}

// Answers that are none, and answers that are not whole.
func TestBrokenAnswers(t *testing.T) {
	for name, fault := range map[string]sts.Fault{
		"reset":          {Kind: sts.Reset},
		"truncated":      {Kind: sts.Truncated},
		"garbage":        {Kind: sts.Body, Body: []byte("<html>")},
		"empty":          {Kind: sts.Body, Body: []byte{}},
		"no credentials": {Kind: sts.NoCredentials},
		"expired":        {Kind: sts.Expired},
		"redirect":       {Kind: sts.Refuse, Status: http.StatusTemporaryRedirect, Body: []byte("elsewhere")},
	} {
		r := start(t)
		r.sts.Inject(fault)
		if got, err := r.Issue(t.Context(), request()); !errors.Is(err, ErrUnavailable) || got.AccessKeyID != "" {
			t.Errorf("%s: %v", name, err)
		}
	}
	r := start(t)
	r.sts.Refuse()
	if _, err := r.Issue(t.Context(), request()); !errors.Is(err, ErrUnavailable) {
		t.Errorf("refused: %v", err)
	}
	if err := r.sts.Resume(); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Issue(t.Context(), request()); err != nil {
		t.Errorf("resumed: %v", err)
	}
}

// Servers that speak STS's wire may leave the assumed role empty; AWS does not.
func TestCompatibleServers(t *testing.T) {
	r := start(t)
	r.sts.Inject(sts.Fault{Kind: sts.NoUser})
	got, err := r.Issue(t.Context(), request())
	if err != nil || got.AssumedRoleARN != "arn:aws:sts::111122223333:assumed-role/web/"+got.SessionName || got.AssumedRoleID != "web:"+got.SessionName {
		t.Errorf("%s, %s, %v", got.AssumedRoleARN, got.AssumedRoleID, err)
	}
	whole := func() *service.AssumeRoleOutput {
		return &service.AssumeRoleOutput{
			AssumedRoleUser: &types.AssumedRoleUser{Arn: aws.String("arn"), AssumedRoleId: aws.String("id")},
			Credentials: &types.Credentials{AccessKeyId: aws.String("a"), SecretAccessKey: aws.String("b"), SessionToken: aws.String("c"),
				Expiration: aws.Time(time.Now().Add(time.Hour))},
		}
	}
	if _, failed := read(whole(), hop{roleARN: role}, time.Now(), false); failed != nil {
		t.Error(failed)
	}
	for name, edit := range map[string]func(*service.AssumeRoleOutput){
		"no user":   func(o *service.AssumeRoleOutput) { o.AssumedRoleUser = nil },
		"no ARN":    func(o *service.AssumeRoleOutput) { o.AssumedRoleUser.Arn = nil },
		"empty id":  func(o *service.AssumeRoleOutput) { o.AssumedRoleUser.AssumedRoleId = aws.String("") },
		"no key":    func(o *service.AssumeRoleOutput) { o.Credentials.AccessKeyId = nil },
		"no secret": func(o *service.AssumeRoleOutput) { o.Credentials.SecretAccessKey = nil },
		"no token":  func(o *service.AssumeRoleOutput) { o.Credentials.SessionToken = aws.String("") },
		"no expiry": func(o *service.AssumeRoleOutput) { o.Credentials.Expiration = nil },
	} {
		out := whole()
		edit(out)
		if _, failed := read(out, hop{roleARN: role}, time.Now(), false); !errors.Is(failed, ErrUnavailable) {
			t.Errorf("%s: %v", name, failed)
		}
	}
}

// What the service asks callers to wait for is handed on, within reason.
func TestRetryAfter(t *testing.T) {
	for header, want := range map[string]time.Duration{"": 0, "3": 3 * time.Second, "86400": time.Minute, "-1": 0, "soon": 0} {
		i, err := New(t.Context(), Config{
			Credentials: credentials.NewStaticCredentialsProvider(keyID, secret, ""), MaxAttempts: 1,
			Transport: transport(func(r *http.Request) (*http.Response, error) {
				const body = `<ErrorResponse><Error><Code>Throttling</Code><Message>no</Message></Error></ErrorResponse>`
				return &http.Response{StatusCode: 400, Header: http.Header{"Retry-After": {header}}, Body: io.NopCloser(strings.NewReader(body)), Request: r}, nil
			}),
		})
		if err != nil {
			t.Fatal(err)
		}
		_, err = i.Issue(t.Context(), request())
		var failed *Error
		if !errors.As(err, &failed) || !errors.Is(err, ErrThrottled) || failed.RetryAfter != want {
			t.Errorf("%q: %v", header, err)
		}
	}
}

// A fault that passes costs an attempt, not the pod's credentials.
func TestAttempts(t *testing.T) {
	r := start(t)
	r.sts.Inject(sts.Fault{Kind: sts.Reset, Times: 1})
	f := sts.Refusals()["throttle"]
	f.Times, f.RoleARN = 2, target
	r.sts.Inject(f)
	if _, err := r.Issue(t.Context(), request(withTarget)); err != nil {
		t.Error(err)
	}
	if n := len(r.sts.Calls()); n != 5 {
		t.Errorf("%d calls", n)
	}
}

// A service that hangs is left after the timeouts, not waited for.
func TestHangs(t *testing.T) {
	hold := make(chan struct{})
	defer close(hold)
	r := start(t, func(cfg *Config) { cfg.AttemptTimeout, cfg.Timeout = 20*time.Millisecond, time.Minute })
	r.sts.Inject(sts.Fault{Hold: hold})
	if _, err := r.Issue(t.Context(), request()); !errors.Is(err, ErrUnavailable) {
		t.Errorf("each attempt bounded: %v", err)
	}
	r = start(t, func(cfg *Config) { cfg.Timeout = 50 * time.Millisecond })
	r.sts.Inject(sts.Fault{Hold: hold})
	if _, err := r.Issue(t.Context(), request()); !errors.Is(err, ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("all attempts bounded: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := start(t).Issue(ctx, request()); !errors.Is(err, ErrUnavailable) {
		t.Errorf("the caller left: %v", err)
	}
}

// A role that allows less than is set costs one more call and a line in the log.
func TestDurationOfTheRole(t *testing.T) {
	r := start(t, func(cfg *Config) { cfg.Duration = 6 * time.Hour })
	r.sts.AddRole(sts.Role{ARN: role, MaxSession: 2 * time.Hour})
	got, err := r.Issue(t.Context(), request())
	if err != nil {
		t.Fatal(err)
	}
	var asked []time.Duration
	var ids []string
	for _, c := range r.sts.Calls() {
		asked, ids = append(asked, c.Duration), append(ids, c.RequestID)
	}
	if !slices.Equal(asked, []time.Duration{6 * time.Hour, time.Hour}) || !slices.Equal(got.STSRequestIDs, ids) {
		t.Errorf("asked for %v, request ids %v of %v", asked, got.STSRequestIDs, ids)
	}
	if !strings.Contains(r.log.String(), role) || strings.Count(r.log.String(), "\n") != 1 {
		t.Errorf("log %q", r.log)
	}
	if time.Until(got.Expires) > time.Hour {
		t.Errorf("expires %s", got.Expires)
	}
}

// brokenProvider fails as a provider that itself calls STS does.
type brokenProvider struct{}

func (brokenProvider) Retrieve(context.Context) (aws.Credentials, error) {
	return aws.Credentials{}, fmt.Errorf("assume the server's role: %w", &smithy.GenericAPIError{Code: "AccessDenied", Message: "no"})
}

// The server's own trouble is never the pod's.
func TestOwnCredentials(t *testing.T) {
	r := start(t, func(cfg *Config) { cfg.Credentials = brokenProvider{} })
	_, err := r.Issue(t.Context(), request())
	if !errors.Is(err, ErrUnavailable) || errors.Is(err, ErrAccessDenied) {
		t.Errorf("%v", err)
	}
	if n := len(r.sts.Calls()); n != 0 {
		t.Errorf("%d calls", n)
	}
	r = start(t, func(cfg *Config) {
		cfg.Credentials = credentials.NewStaticCredentialsProvider(keyID, "another secret", "")
	})
	if _, err := r.Issue(t.Context(), request()); !errors.Is(err, ErrUnavailable) {
		t.Errorf("wrong secret: %v", err)
	}
}

// rotated gives credentials that have ended the first time, good ones then.
type rotated struct{ calls int }

func (p *rotated) Retrieve(context.Context) (aws.Credentials, error) {
	if p.calls++; p.calls == 1 {
		return aws.Credentials{AccessKeyID: "ASIAREVOKED000000000", SecretAccessKey: secret, SessionToken: "x"}, nil
	}
	return aws.Credentials{AccessKeyID: keyID, SecretAccessKey: secret}, nil
}

// Own credentials that STS knows no more are fetched anew; others are kept.
func TestOwnCredentialsThatEnded(t *testing.T) {
	p := &rotated{}
	r := start(t, func(cfg *Config) { cfg.Credentials = p })
	if _, err := r.Issue(t.Context(), request()); !errors.Is(err, ErrUnavailable) {
		t.Errorf("revoked: %v", err)
	}
	for range 3 {
		if _, err := r.Issue(t.Context(), request(withTarget)); err != nil {
			t.Errorf("fetched anew: %v", err)
		}
	}
	f := sts.Refusals()["expired token"]
	f.RoleARN, f.Times = target, 1
	r.sts.Inject(f) // the first hop's session, not ours
	if _, err := r.Issue(t.Context(), request(withTarget)); !errors.Is(err, ErrUnavailable) {
		t.Errorf("second hop: %v", err)
	}
	if _, err := r.Issue(t.Context(), request()); err != nil || p.calls != 2 {
		t.Errorf("fetched %d times, %v", p.calls, err)
	}
}

type transport func(*http.Request) (*http.Response, error)

func (f transport) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// Without an endpoint, the cluster's region is called, in its partition.
func TestRegionalEndpoints(t *testing.T) {
	var mu sync.Mutex
	var urls []string
	i, err := New(t.Context(), Config{
		Credentials: credentials.NewStaticCredentialsProvider(keyID, secret, ""), MaxAttempts: 1,
		Transport: transport(func(r *http.Request) (*http.Response, error) {
			mu.Lock()
			defer mu.Unlock()
			urls = append(urls, r.URL.String())
			return nil, io.ErrUnexpectedEOF
		}),
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, region := range []string{"us-east-1", "eu-west-1", "cn-north-1", "us-gov-west-1", "eu-west-1"} {
		if _, err := i.Issue(t.Context(), request(func(r *Request) { r.Cluster.Region = region })); !errors.Is(err, ErrUnavailable) {
			t.Errorf("%s: %v", region, err)
		}
	}
	want := []string{"https://sts.us-east-1.amazonaws.com/", "https://sts.eu-west-1.amazonaws.com/", "https://sts.cn-north-1.amazonaws.com.cn/",
		"https://sts.us-gov-west-1.amazonaws.com/", "https://sts.eu-west-1.amazonaws.com/"}
	if !slices.Equal(urls, want) {
		t.Errorf("called %v", urls)
	}
	if len(i.clients) != 4 {
		t.Errorf("%d clients", len(i.clients))
	}
}

// An STS-compatible server has a certificate of its own CA as a rule.
func TestCABundle(t *testing.T) {
	r := start(t)
	plain, err := url.Parse(r.sts.URL)
	if err != nil {
		t.Fatal(err)
	}
	proxy := httputil.NewSingleHostReverseProxy(plain)
	private := httptest.NewUnstartedServer(proxy)
	private.Config.ErrorLog = log.New(io.Discard, "", 0)
	private.StartTLS()
	t.Cleanup(private.Close)
	bundle := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(bundle, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: private.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("AWS_ACCESS_KEY_ID", keyID)
	t.Setenv("AWS_SECRET_ACCESS_KEY", secret)
	t.Setenv("AWS_SESSION_TOKEN", "")
	for _, file := range []string{"", bundle} {
		t.Setenv("AWS_CA_BUNDLE", file)
		i, err := New(t.Context(), Config{Endpoint: private.URL, MaxAttempts: 1, AttemptTimeout: time.Minute, Timeout: time.Minute})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := i.Issue(t.Context(), request()); (err == nil) != (file != "") || err != nil && !errors.Is(err, ErrUnavailable) {
			t.Errorf("CA bundle %q: %v", file, err)
		}
	}
	t.Setenv("AWS_CA_BUNDLE", bundle+".none")
	if _, err := New(t.Context(), Config{Endpoint: private.URL}); !errors.Is(err, ErrConfig) {
		t.Errorf("a bundle that is not there: %v", err)
	}
}

func TestConnectionsAreKept(t *testing.T) {
	r := start(t)
	for range 10 {
		if _, err := r.Issue(t.Context(), request(withTarget)); err != nil {
			t.Fatal(err)
		}
	}
	connections := map[string]bool{}
	for _, c := range r.sts.Calls() {
		connections[c.Connection] = true
	}
	// One, on a quiet machine; the transport drops a connection whose request took
	// long to be written.
	if len(connections) > 10 {
		t.Errorf("%d connections for 20 calls in a row", len(connections))
	}
}

// Many at once get each their own session.
func TestAtOnce(t *testing.T) {
	r := start(t, func(cfg *Config) { cfg.NewID = nil })
	var wg sync.WaitGroup
	var mu sync.Mutex
	sessions := map[string]bool{}
	for range 32 {
		wg.Go(func() {
			got, err := r.Issue(t.Context(), request(withTarget))
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			sessions[got.SessionName] = true
		})
	}
	wg.Wait()
	if len(sessions) != 32 {
		t.Errorf("%d sessions", len(sessions))
	}
}

func TestSettings(t *testing.T) {
	static := credentials.NewStaticCredentialsProvider(keyID, secret, "")
	for name, cfg := range map[string]Config{
		"too short":          {Duration: 899 * time.Second},
		"too long":           {Duration: 43201 * time.Second},
		"endpoint":           {Endpoint: "sts.example.com"},
		"endpoint's scheme":  {Endpoint: "ftp://sts.example.com"},
		"endpoint with user": {Endpoint: "https://user:hunter2@sts.example.com"},
		"endpoint, garbage":  {Endpoint: "https://sts.example.com/%zz?hunter2"},
	} {
		cfg.Credentials = static
		_, err := New(t.Context(), cfg)
		if !errors.Is(err, ErrConfig) || strings.Contains(fmt.Sprint(err), "hunter2") {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, d := range []time.Duration{0, MinDuration, MaxDuration} {
		if _, err := New(t.Context(), Config{Credentials: static, Duration: d}); err != nil {
			t.Errorf("%s: %v", d, err)
		}
	}
	if _, err := NewStandIn(StandInConfig{Duration: time.Second}); !errors.Is(err, ErrConfig) {
		t.Errorf("stand-in: %v", err)
	}
}

func TestStandIn(t *testing.T) {
	var log bytes.Buffer
	now := time.Date(2026, 11, 21, 12, 0, 0, 5, time.UTC)
	s, err := NewStandIn(StandInConfig{NewID: testID, Now: func() time.Time { return now }, Log: slog.New(slog.NewTextHandler(&log, nil)), Duration: 2 * time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(log.String(), "stand-in") {
		t.Errorf("log %q", log.String())
	}
	one, err := s.Issue(t.Context(), request())
	if err != nil {
		t.Fatal(err)
	}
	two, err := s.Issue(t.Context(), request(withTarget))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []Credentials{one, two} {
		if !strings.HasPrefix(c.AccessKeyID, StandInKeyPrefix) || len(c.AccessKeyID) != 20 ||
			!strings.HasPrefix(c.SecretAccessKey, StandInSecretPrefix) || len(c.SecretAccessKey) != 40 ||
			!strings.HasPrefix(c.SessionToken, StandInTokenPrefix) {
			t.Errorf("not marked: %s", c.AccessKeyID)
		}
	}
	if one.AccessKeyID == two.AccessKeyID || one.SecretAccessKey == two.SecretAccessKey || one.SessionToken == two.SessionToken {
		t.Error("issued twice")
	}
	if want := now.Truncate(time.Second).Add(2 * time.Hour); !one.Expires.Equal(want) {
		t.Errorf("expires %s", one.Expires)
	}
	if want := now.Truncate(time.Second).Add(time.Hour); !two.Expires.Equal(want) {
		t.Errorf("with a target, expires %s", two.Expires)
	}
	if want := "arn:aws:sts::444455556666:assumed-role/data/" + two.SessionName; two.AssumedRoleARN != want || len(two.STSRequestIDs) != 2 {
		t.Errorf("assumed %s, request ids %v", two.AssumedRoleARN, two.STSRequestIDs)
	}
	if want := "arn:aws:sts::111122223333:assumed-role/web/" + one.SessionName; one.AssumedRoleARN != want {
		t.Errorf("assumed %s", one.AssumedRoleARN)
	}
}

func TestSecretsDoNotShow(t *testing.T) {
	c := Credentials{AccessKeyID: "ASIA", SecretAccessKey: "hunter2", SessionToken: "hunter2", AssumedRoleARN: role}
	var log bytes.Buffer
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "credentials", c)
	text := fmt.Sprintf("%v %+v %#v %s", c, c, c, c) + log.String()
	if strings.Contains(text, "hunter2") || !strings.Contains(text, role) {
		t.Errorf("shown: %s", text)
	}
}

// Whatever names come, a plan is one that STS takes, or a refusal.
func FuzzPlan(f *testing.F) {
	f.Add("prod", "web", "api", "api-0", "uid", "ext", policy, true)
	f.Add("", "\xff", "a/b", strings.Repeat("é", 300), "", "", "", false)
	f.Fuzz(func(t *testing.T, cluster, namespace, account, pod, uid, external, policy string, noTags bool) {
		hops, err := plan(request(func(r *Request) {
			r.Cluster.Name, r.Association.Cluster = cluster, cluster
			r.Subject = tokencheck.Subject{Namespace: namespace, ServiceAccount: account, PodName: pod, PodUID: uid}
			r.Association.Namespace, r.Association.ServiceAccount = namespace, account
			r.Association.Policy, r.Association.DisableSessionTags = policy, noTags
			r.Association.TargetRoleARN, r.Association.ExternalID = target, external
		}), time.Hour, testID())
		if err != nil {
			var failed *Error
			if !errors.As(err, &failed) || !errors.Is(err, ErrInvalidRequest) {
				t.Errorf("%v", err)
			}
			return
		}
		for i, h := range hops {
			if len(h.sessionName) < 2 || len(h.sessionName) > 64 || strings.ContainsFunc(h.sessionName, func(r rune) bool {
				return !strings.ContainsRune("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_+=,.@-", r)
			}) {
				t.Errorf("session name %q", h.sessionName)
			}
			if (i == 0) == (h.externalID != "") || i == 0 && h.policy != "" || i == 1 && (len(h.tags) > 0 || h.policy != policy) {
				t.Errorf("hop %d: %+v", i, h)
			}
			if noTags && len(h.tags) > 0 || len(h.tags) > 0 && h.policy != "" {
				t.Errorf("hop %d has tags", i)
			}
		}
	})
}
