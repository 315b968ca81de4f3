// SPDX-License-Identifier: Apache-2.0

package sigv4_test

import (
	"bufio"
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/latchkey-dev/latchkey/pkg/sigv4"
)

// byHand signs a canonical request that somebody wrote down.
func byHand(r *http.Request, canonical string) string {
	return byHandOn(r, r.Header.Get("X-Amz-Date")[:8], canonical)
}

// byHandOn does so with a key of some day.
func byHandOn(r *http.Request, day, canonical string) string {
	sum := func(key []byte, s string) []byte {
		h := hmac.New(sha256.New, key)
		h.Write([]byte(s))
		return h.Sum(nil)
	}
	date := r.Header.Get("X-Amz-Date")
	scope := day + "/" + region + "/eks/aws4_request"
	key := []byte("AWS4" + secretKey)
	for _, s := range strings.Split(scope, "/") {
		key = sum(key, s)
	}
	signature := hex.EncodeToString(sum(key, "AWS4-HMAC-SHA256\n"+date+"\n"+scope+"\n"+hexSum(canonical)))
	_, headers, _ := strings.Cut(canonical, "\n\n")
	headers, _, _ = strings.Cut(headers, "\n")
	return "AWS4-HMAC-SHA256 Credential=" + accessKey + "/" + scope + ", SignedHeaders=" + headers + ", Signature=" + signature
}

// Whatever arrives without a signature of the secret is refused, and nothing
// panics.
func FuzzVerifyForged(f *testing.F) {
	for _, s := range []signed{{}, {body: "{}"}, {method: http.MethodGet, url: "http://latchkey.example/x?a=b&c"}, {presign: true}} {
		r, body := s.arrive(f)
		r.Body = io.NopCloser(bytes.NewReader(body))
		var wire bytes.Buffer
		if err := r.Write(&wire); err != nil {
			f.Fatal(err)
		}
		// The signature is another one: what is fuzzed must not be good to begin with.
		f.Add(bytes.ReplaceAll(wire.Bytes(), []byte("Signature="), []byte("Signature=0")))
		f.Add(bytes.ReplaceAll(wire.Bytes(), []byte(accessKey), []byte("NOBODY")))
	}
	f.Fuzz(func(t *testing.T, wire []byte) {
		r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(wire)))
		if err != nil {
			return
		}
		body, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
		if err != nil {
			return
		}
		if result, err := verifier(t).Verify(r, body, "eks"); err == nil {
			t.Fatalf("a request that nobody signed is good: %+v\n%q", result, wire)
		}
	})
}

// What the SDK signs is good, whatever is in the path and the query; and it is
// not once either means something else.
func FuzzVerifySigned(f *testing.F) {
	f.Add("/clusters/prod", "a=b&c=d", "{}")
	f.Add("/tags/arn%3Aaws/x%2Fy", "tagKeys=a%20b&tagKeys=c%2Fd&tagKeys=c-d", "")
	f.Add("/ä/%E4//../;", "%C3%A9=1&e=2&&=&x", "\x00")
	f.Fuzz(func(t *testing.T, path, query, body string) {
		u, err := url.ParseRequestURI("http://latchkey.example/" + strings.TrimPrefix(path, "/"))
		if err != nil || u.Fragment != "" || u.RawQuery != "" {
			return
		}
		values, err := url.ParseQuery(query)
		if err != nil {
			return
		}
		for k := range values {
			if len(k) >= 6 && strings.EqualFold(k[:6], "x-amz-") {
				return
			}
		}
		u.RawQuery = values.Encode()
		s := signed{url: u.String(), body: body}
		r, got := s.arrive(t)
		if _, err := verifier(t).Verify(r, got, "eks"); err != nil {
			t.Fatalf("%s: %v", u, err)
		}
		for name, change := range map[string]func(*http.Request) []byte{
			"query": func(r *http.Request) []byte { r.URL.RawQuery += "&namespace=x"; return got },
			"path":  func(r *http.Request) []byte { r.RequestURI = "/x" + r.RequestURI; return got },
			"body":  func(*http.Request) []byte { return slices.Concat(got, []byte("x")) },
		} {
			c := r.Clone(t.Context())
			b := change(c)
			if _, err := verifier(t).Verify(c, b, "eks"); err == nil {
				t.Errorf("%s changed, and the signature is good: %s", name, u)
			}
		}
	})
}

func FuzzAccessKeyID(f *testing.F) {
	f.Add("AWS4-HMAC-SHA256 Credential=A/20261121/r/s/aws4_request, SignedHeaders=host, Signature=" + strings.Repeat("0", 64))
	f.Fuzz(func(t *testing.T, s string) {
		id := sigv4.AccessKeyID(&http.Request{Header: http.Header{"Authorization": {s}}})
		if len(id) > sigv4.MaxAccessKeyID || strings.ContainsAny(id, " \n\r\t/\"=,") {
			t.Errorf("%q", id)
		}
	})
}
