// SPDX-License-Identifier: Apache-2.0

package eksauth

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
)

// A client tells what its calls found: the service's clock, the last error, and
// whether the node's own credentials were the trouble.
func TestStateTellsWhatCallsFound(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	status, code := http.StatusForbidden, "ExpiredTokenException"
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Date", now.Add(time.Hour).Format(http.TimeFormat))
		w.Header().Set("X-Amzn-ErrorType", code)
		w.WriteHeader(status)
	}))
	defer srv.Close()
	var missing error
	c, err := New(Config{
		ClusterName: "demo", Region: "us-west-2", Endpoint: srv.URL, MaxAttempts: 1,
		Now: func() time.Time { return now },
		Credentials: aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
			return aws.Credentials{AccessKeyID: "AKIA", SecretAccessKey: "hidden", Source: "test", CanExpire: true, Expires: now.Add(time.Minute)}, missing
		}),
	})
	if err != nil {
		t.Fatal(err)
	}
	if s := c.State(); !s.LastCall.IsZero() || !s.SkewAt.IsZero() || s.Credentials.Source != "" {
		t.Errorf("before any call: %+v", s)
	}
	call := func() State {
		_, err := c.AssumeRoleForPodIdentity(t.Context(), "a.b.c")
		if err == nil {
			t.Fatal("an empty answer was taken")
		}
		return c.State()
	}
	s := call()
	if s.Skew != time.Hour || s.LastCall != now || !s.LastSuccess.IsZero() || ClassOf(s.LastError) != ClassAccessDenied ||
		!s.Credentials.Refused || s.Credentials.Source != "test" || !s.Credentials.Expires.Equal(now.Add(time.Minute)) {
		t.Errorf("%+v", s)
	}
	// A refusal of the token says that the node's credentials are good.
	status, code = http.StatusBadRequest, "ExpiredTokenException"
	if s = call(); s.Credentials.Refused {
		t.Errorf("%+v", s)
	}
	missing = errors.New("no role here")
	if s = call(); !errors.Is(s.Credentials.Err, missing) || ClassOf(s.LastError) != ClassNodeCredentials {
		t.Errorf("%+v", s)
	}
	r, err := c.Reach(t.Context())
	if err != nil || r.Status != http.StatusBadRequest || !r.HasSkew || r.Skew != time.Hour {
		t.Errorf("%+v, %v", r, err)
	}
	srv.Close()
	if _, err := c.Reach(t.Context()); !errors.Is(err, ErrUnavailable) {
		t.Errorf("a server that is gone: %v", err)
	}
}
