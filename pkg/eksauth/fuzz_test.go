// SPDX-License-Identifier: Apache-2.0

package eksauth

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"
)

// FuzzDecode: whatever a 200 holds, the outcome is a complete result or
// ErrInvalidResponse.
func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"subject":{"namespace":"n","serviceAccount":"s"},"audience":"a","podIdentityAssociation":{"associationArn":"x","associationId":"y"},"assumedRoleUser":{"arn":"x","assumeRoleId":"y"},"credentials":{"accessKeyId":"k","secretAccessKey":"s","sessionToken":"t","expiration":1800000100}}`))
	f.Add([]byte(`{"subject":null,"credentials":{"expiration":1e400}}`))
	f.Add([]byte("[]"))
	now := time.Unix(1_800_000_000, 0)
	f.Fuzz(func(t *testing.T, body []byte) {
		r, err := decode(body, now)
		if err != nil {
			if !errors.Is(err, ErrInvalidResponse) || r != nil {
				t.Fatalf("%v %v", r, err)
			}
			return
		}
		k := r.Credentials
		if r.Subject.Namespace == "" || r.Subject.ServiceAccount == "" || r.Audience == "" || r.AssociationID == "" || r.AssumedRoleARN == "" ||
			k.AccessKeyID == "" || k.SecretAccessKey.Reveal() == "" || k.SessionToken.Reveal() == "" || !k.Expiration.After(now) || k.Expiration.Year() > 9999 {
			t.Fatalf("incomplete: %+v", r)
		}
	})
}

// FuzzError: whatever an error's answer holds, it is classed, bounded and
// printable, and a refusal only with the service's own code.
func FuzzError(f *testing.F) {
	f.Add(404, "ResourceNotFoundException:http://x/", "1", []byte(`{"message":"m"}`))
	f.Add(400, "", "Sat, 01 Jan 2000 00:00:00 GMT", []byte(`{"__type":"a#InvalidTokenException"}`))
	f.Add(503, "", "-1", []byte("<html>"))
	c := &Client{cfg: Config{Now: func() time.Time { return time.Unix(1_800_000_000, 0) }}}
	f.Fuzz(func(t *testing.T, status int, kind, after string, body []byte) {
		res := &http.Response{StatusCode: status, Header: http.Header{"X-Amzn-Errortype": {kind}, "Retry-After": {after}}, Body: io.NopCloser(bytes.NewReader(nil))}
		e := c.apiError(res, body, "id", "eyJhbGciOiJSUzI1NiJ9.e30.c2ln")
		if e.RetryAfter < 0 || e.RetryAfter > maxRetryAfter {
			t.Fatalf("retry after %v", e.RetryAfter)
		}
		if text := e.Text(); len(text) > 1000 || strings.ContainsAny(text, "\x00\r\n\x1b") {
			t.Fatalf("text %q", text)
		}
		switch e.Class {
		case ClassNotFound, ClassInvalidToken, ClassExpiredToken:
			if e.Code == "" || status >= 500 {
				t.Fatalf("%d %q classed %s", status, e.Code, e.Class)
			}
		case ClassNone:
			t.Fatal("an error without a class")
		}
	})
}
