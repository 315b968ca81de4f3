// SPDX-License-Identifier: Apache-2.0

package sts_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	"github.com/aws/aws-sdk-go-v2/credentials"
	sdk "github.com/aws/aws-sdk-go-v2/service/sts"
	"github.com/aws/aws-sdk-go-v2/service/sts/types"
	"github.com/aws/smithy-go"

	"github.com/latchkey-dev/latchkey/test/standin/sts"
)

const (
	keyID, secret = "AKIASTANDINTEST00001", "a secret of forty characters, more or less"
	roleA         = "arn:aws:iam::111122223333:role/team/a"
	roleB         = "arn:aws:iam::444455556666:role/b"
)

func start(t *testing.T, cfg sts.Config) *sts.Running {
	t.Helper()
	if cfg.Callers == nil {
		cfg.Callers = map[string]sts.Caller{keyID: {SecretAccessKey: secret}}
	}
	s, err := sts.Start(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func client(s *sts.Running, id, secret, token string) *sdk.Client {
	return sdk.New(sdk.Options{
		Region: "us-west-2", BaseEndpoint: aws.String(s.URL), Retryer: aws.NopRetryer{},
		Credentials: credentials.NewStaticCredentialsProvider(id, secret, token),
	})
}

func assume(ctx context.Context, c *sdk.Client, edit func(*sdk.AssumeRoleInput)) (*sdk.AssumeRoleOutput, error) {
	in := &sdk.AssumeRoleInput{RoleArn: aws.String(roleA), RoleSessionName: aws.String("eks-test")}
	if edit != nil {
		edit(in)
	}
	return c.AssumeRole(ctx, in)
}

func code(err error) string {
	var api smithy.APIError
	if errors.As(err, &api) {
		return api.ErrorCode()
	}
	if err != nil {
		return "no answer: " + err.Error()
	}
	return ""
}

// The service's own client takes its answers, and sessions work as callers.
func TestSessions(t *testing.T) {
	s := start(t, sts.Config{})
	s.AddRole(sts.Role{ARN: roleA, MaxSession: 2 * time.Hour})
	s.AddRole(sts.Role{ARN: roleB, MaxSession: 12 * time.Hour, Trusts: []string{roleA}, ExternalID: "ex/1", RequireTags: map[string]string{"ns": "web"}})
	tags := func(in *sdk.AssumeRoleInput) {
		in.DurationSeconds = aws.Int32(7200)
		in.Tags = []types.Tag{{Key: aws.String("ns"), Value: aws.String("web")}, {Key: aws.String("own"), Value: aws.String("x y")}}
		in.TransitiveTagKeys = []string{"ns"}
	}
	first, err := assume(t.Context(), client(s, keyID, secret, ""), tags)
	if err != nil {
		t.Fatal(err)
	}
	if got := aws.ToString(first.AssumedRoleUser.Arn); got != "arn:aws:sts::111122223333:assumed-role/a/eks-test" {
		t.Errorf("assumed %s", got)
	}
	c := first.Credentials
	if !strings.HasPrefix(*c.AccessKeyId, sts.AccessKeyPrefix) || len(*c.AccessKeyId) != 20 || len(*c.SecretAccessKey) != 40 {
		t.Errorf("credentials %s", *c.AccessKeyId)
	}
	if got := s.TagsOf(*c.AccessKeyId); len(got) != 1 || got["ns"] != "web" {
		t.Errorf("transitive tags %v", got)
	}
	session := client(s, *c.AccessKeyId, *c.SecretAccessKey, *c.SessionToken)
	who, err := session.GetCallerIdentity(t.Context(), &sdk.GetCallerIdentityInput{})
	if err != nil || aws.ToString(who.Arn) != *first.AssumedRoleUser.Arn || aws.ToString(who.Account) != "111122223333" {
		t.Errorf("identity %+v, %v", who, err)
	}
	toB := func(in *sdk.AssumeRoleInput) {
		in.RoleArn, in.ExternalId, in.DurationSeconds = aws.String(roleB), aws.String("ex/1"), aws.Int32(3600)
	}
	second, err := assume(t.Context(), session, toB)
	if err != nil {
		t.Fatal(err)
	}
	if got := s.TagsOf(*second.Credentials.AccessKeyId); got["ns"] != "web" {
		t.Errorf("inherited tags %v", got)
	}
	for name, c := range map[string]struct {
		client *sdk.Client
		edit   func(*sdk.AssumeRoleInput)
		want   string
	}{
		"an inherited tag again": {session, func(in *sdk.AssumeRoleInput) { toB(in); tags(in); in.DurationSeconds = nil }, "InvalidParameterValue"},
		"chained beyond an hour": {session, func(in *sdk.AssumeRoleInput) { toB(in); in.DurationSeconds = aws.Int32(3601) }, "ValidationError"},
		"without external id":    {session, func(in *sdk.AssumeRoleInput) { toB(in); in.ExternalId = nil }, "AccessDenied"},
		"not trusted":            {client(s, keyID, secret, ""), toB, "AccessDenied"},
		"token of another key":   {client(s, *c.AccessKeyId, *c.SecretAccessKey, *second.Credentials.SessionToken), nil, "InvalidClientTokenId"},
		"no token":               {client(s, *c.AccessKeyId, *c.SecretAccessKey, ""), nil, "InvalidClientTokenId"},
	} {
		if _, err := assume(t.Context(), c.client, c.edit); code(err) != c.want {
			t.Errorf("%s: %q, want %s", name, code(err), c.want)
		}
	}
}

func TestRefuses(t *testing.T) {
	s := start(t, sts.Config{Region: "us-west-2"})
	s.AddRole(sts.Role{ARN: roleA})
	s.AddRole(sts.Role{ARN: roleB, NoTagSession: true})
	tag := func(k, v string) func(*sdk.AssumeRoleInput) {
		return func(in *sdk.AssumeRoleInput) { in.Tags = []types.Tag{{Key: aws.String(k), Value: aws.String(v)}} }
	}
	for name, c := range map[string]struct {
		key, secret, want string
		edit              func(*sdk.AssumeRoleInput)
	}{
		"unknown caller":    {key: "AKIANOBODY0000000000", want: "InvalidClientTokenId"},
		"wrong secret":      {secret: "another", want: "SignatureDoesNotMatch"},
		"unknown role":      {edit: func(in *sdk.AssumeRoleInput) { in.RoleArn = aws.String(roleA + "x") }, want: "AccessDenied"},
		"no tag session":    {edit: func(in *sdk.AssumeRoleInput) { tag("a", "b")(in); in.RoleArn = aws.String(roleB) }, want: "AccessDenied"},
		"too long for role": {edit: func(in *sdk.AssumeRoleInput) { in.DurationSeconds = aws.Int32(3601) }, want: "ValidationError"},
		"too long":          {edit: func(in *sdk.AssumeRoleInput) { in.DurationSeconds = aws.Int32(43201) }, want: "ValidationError"},
		"too short":         {edit: func(in *sdk.AssumeRoleInput) { in.DurationSeconds = aws.Int32(899) }, want: "ValidationError"},
		"session name":      {edit: func(in *sdk.AssumeRoleInput) { in.RoleSessionName = aws.String("a b") }, want: "ValidationError"},
		"tag value":         {edit: tag("a", "x{}"), want: "ValidationError"},
		"long tag value":    {edit: tag("a", strings.Repeat("é", 257)), want: "ValidationError"},
		"aws tag":           {edit: tag("AWS:x", "x"), want: "ValidationError"},
		"policy":            {edit: func(in *sdk.AssumeRoleInput) { in.Policy = aws.String("[]") }, want: "MalformedPolicyDocument"},
		"long policy":       {edit: func(in *sdk.AssumeRoleInput) { in.Policy = aws.String(strings.Repeat("x", 2049)) }, want: "ValidationError"},
		"transitive":        {edit: func(in *sdk.AssumeRoleInput) { in.TransitiveTagKeys = []string{"a"} }, want: "InvalidParameterValue"},
	} {
		if c.key == "" {
			c.key = keyID
		}
		if c.secret == "" {
			c.secret = secret
		}
		if _, err := assume(t.Context(), client(s, c.key, c.secret, ""), c.edit); code(err) != c.want {
			t.Errorf("%s: %q, want %s", name, code(err), c.want)
		}
	}
	elsewhere := sdk.New(sdk.Options{Region: "eu-west-1", BaseEndpoint: aws.String(s.URL), Retryer: aws.NopRetryer{},
		Credentials: credentials.NewStaticCredentialsProvider(keyID, secret, "")})
	if _, err := assume(t.Context(), elsewhere, nil); code(err) != "SignatureDoesNotMatch" {
		t.Errorf("another region: %q", code(err))
	}
	for _, c := range s.Calls() {
		if c.Status < 400 || c.Code == "" {
			t.Errorf("recorded as answered: %+v", c)
		}
	}
}

func TestExpiredSession(t *testing.T) {
	now := time.Now()
	s := start(t, sts.Config{AnyRole: true, Now: func() time.Time { return now }})
	out, err := assume(t.Context(), client(s, keyID, secret, ""), func(in *sdk.AssumeRoleInput) { in.DurationSeconds = aws.Int32(900) })
	if err != nil {
		t.Fatal(err)
	}
	s.RemoveRole(roleA)
	if _, err := assume(t.Context(), client(s, keyID, secret, ""), nil); code(err) != "AccessDenied" {
		t.Errorf("removed role: %q", code(err))
	}
	c := out.Credentials
	for _, step := range []struct {
		pass time.Duration
		want int
	}{{14 * time.Minute, http.StatusOK}, {time.Minute, http.StatusForbidden}} {
		now = now.Add(step.pass)
		const body = "Action=GetCallerIdentity&Version=2011-06-15"
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.URL, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256([]byte(body))
		err = v4.NewSigner().SignHTTP(t.Context(), aws.Credentials{
			AccessKeyID: *c.AccessKeyId, SecretAccessKey: *c.SecretAccessKey, SessionToken: *c.SessionToken,
		}, req, hex.EncodeToString(sum[:]), "sts", "us-west-2", now)
		if err != nil {
			t.Fatal(err)
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = res.Body.Close()
		if res.StatusCode != step.want {
			t.Errorf("after %s: %d, want %d", step.pass, res.StatusCode, step.want)
		}
	}
	if calls := s.Calls(); calls[len(calls)-1].Code != "ExpiredToken" {
		t.Errorf("refused as %s", calls[len(calls)-1].Code)
	}
}

func TestFaults(t *testing.T) {
	s := start(t, sts.Config{AnyRole: true})
	c := client(s, keyID, secret, "")
	for name, f := range sts.Refusals() {
		f.Times = 1
		s.Inject(f)
		_, err := assume(t.Context(), c, nil)
		if err == nil || f.Body == nil && code(err) != f.Code {
			t.Errorf("%s: %q", name, code(err))
		}
	}
	for _, kind := range []sts.Kind{sts.Reset, sts.Truncated, sts.Body} {
		s.Inject(sts.Fault{Kind: kind, Times: 1, Body: []byte("<html")})
		if _, err := assume(t.Context(), c, nil); err == nil {
			t.Errorf("%s: answered", kind)
		}
	}
	s.Inject(sts.Fault{Kind: sts.NoCredentials, Times: 1})
	if out, err := assume(t.Context(), c, nil); err != nil || out.Credentials != nil {
		t.Errorf("no credentials: %v", err)
	}
	s.Inject(sts.Fault{Kind: sts.NoUser, Times: 1, RoleARN: roleB})
	if out, err := assume(t.Context(), c, nil); err != nil || out.AssumedRoleUser == nil {
		t.Errorf("a fault for another role: %v", err)
	}
	hold := make(chan struct{})
	defer close(hold)
	s.Inject(sts.Fault{Hold: hold, Times: 1})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := assume(ctx, c, nil); err == nil {
		t.Error("answered although held back")
	}
	s.ClearFaults()
	s.Refuse()
	if _, err := assume(t.Context(), c, nil); !strings.HasPrefix(code(err), "no answer") {
		t.Errorf("refused: %q", code(err))
	}
	if err := s.Resume(); err != nil {
		t.Fatal(err)
	}
	if _, err := assume(t.Context(), c, nil); err != nil {
		t.Errorf("resumed: %v", err)
	}
	text, _ := json.Marshal(s.Calls())
	if strings.Contains(string(text), secret) || strings.Contains(string(text), sts.SecretPrefix) || strings.Contains(string(text), sts.SessionTokenPrefix) {
		t.Error("a call holds a secret")
	}
	if len(s.Calls()) < 10 {
		t.Errorf("%d calls recorded", len(s.Calls()))
	}
}

func TestOtherRequests(t *testing.T) {
	s := start(t, sts.Config{AnyRole: true})
	for body, want := range map[string]int{
		"Action=AssumeRole&Version=2011-06-15": http.StatusForbidden,
		"Action=AssumeRole&Version=1999":       http.StatusBadRequest,
		"%zz":                                  http.StatusBadRequest,
	} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.URL, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = res.Body.Close()
		if res.StatusCode != want {
			t.Errorf("%s: %d", body, res.StatusCode)
		}
	}
}
