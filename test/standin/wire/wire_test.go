// SPDX-License-Identifier: Apache-2.0

package wire_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"

	"github.com/latchkey-dev/latchkey/test/standin/wire"
)

// The SDK's signature is accepted, whatever is in path and query, and no other.
func TestSignature(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)
	body := []byte("a=b&c=d")
	for name, tt := range map[string]struct {
		url, service, region string
		late                 time.Duration
		edit                 func(*http.Request)
		flaw                 wire.Flaw
		forged               bool
	}{
		"plain":           {},
		"path to escape":  {url: "/clusters/a%20b%2Fc/x+y"},
		"query":           {url: "/?b=2&a=1&a=0&c=%2F+"},
		"any region":      {region: "any"},
		"almost too late": {late: 5 * time.Minute},
		"unsigned":        {edit: func(r *http.Request) { r.Header.Del("Authorization") }, flaw: wire.Unsigned},
		"another form":    {edit: func(r *http.Request) { r.Header.Set("Authorization", "Bearer x") }, flaw: wire.Incomplete},
		"no date":         {edit: func(r *http.Request) { r.Header.Del("X-Amz-Date") }, flaw: wire.Incomplete},
		"host unsigned": {edit: func(r *http.Request) {
			r.Header.Set("Authorization", strings.Replace(r.Header.Get("Authorization"), ";host;", ";", 1))
		}, flaw: wire.Incomplete},
		"another service": {service: "sts", flaw: wire.Invalid},
		"another region":  {region: "us-east-1", flaw: wire.Invalid},
		"late":            {late: 5*time.Minute + time.Second, flaw: wire.Invalid},
		"early":           {late: -5*time.Minute - time.Second, flaw: wire.Invalid},
		"another header":  {edit: func(r *http.Request) { r.Header.Set("X-Amz-Meta", "changed") }, forged: true},
		"another path":    {edit: func(r *http.Request) { r.URL.Path = "/other" }, forged: true},
		"another method":  {edit: func(r *http.Request) { r.Method = http.MethodPut }, forged: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if tt.url == "" {
				tt.url = "/"
			}
			if tt.service == "" {
				tt.service = "eks-auth"
			}
			switch tt.region {
			case "":
				tt.region = "us-west-2"
			case "any":
				tt.region = ""
			}
			r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "http://service.example"+tt.url, bytes.NewReader(body))
			r.Header.Set("X-Amz-Meta", " two  words ")
			sum := sha256.Sum256(body)
			caller := aws.Credentials{AccessKeyID: "AKIDNODE", SecretAccessKey: "secret"}
			if err := v4.NewSigner().SignHTTP(t.Context(), caller, r, hex.EncodeToString(sum[:]), "eks-auth", "us-west-2", now); err != nil {
				t.Fatal(err)
			}
			if tt.edit != nil {
				tt.edit(r)
			}
			s, flaw := wire.ReadSignature(r, tt.service, tt.region, now.Add(tt.late))
			if flaw == nil && tt.flaw != 0 || flaw != nil && flaw.Flaw != tt.flaw {
				t.Fatalf("%v, want flaw %d", flaw, tt.flaw)
			}
			if flaw != nil {
				return
			}
			if s.AccessKeyID != "AKIDNODE" || s.Region != "us-west-2" {
				t.Errorf("%+v", s)
			}
			if s.MadeWith("secret", r, body) == tt.forged || s.MadeWith("Secret", r, body) || s.MadeWith("secret", r, body[1:]) {
				t.Error("wrongly judged")
			}
		})
	}
}

// Calls take the faults that are for them in order, each as often as it says.
func TestFaults(t *testing.T) {
	t.Parallel()
	var q wire.Faults[string]
	q.Add("a1", 1)
	q.Add("b", 2)
	q.Add("a", 0)
	var got []string
	for _, call := range []string{"b", "a", "c", "a", "b", "b", "a"} {
		got = append(got, q.Next(func(f string) bool { return strings.HasPrefix(f, call) }))
	}
	if s := strings.Join(got, " "); s != "b a1  a b  a" {
		t.Errorf("%q", s)
	}
	q.Clear()
	if f := q.Next(func(string) bool { return true }); f != "" {
		t.Errorf("%q", f)
	}
}

// A service can be away, come back at the same address, and break off.
func TestEndpoint(t *testing.T) {
	t.Parallel()
	ln, err := wire.Listen()
	if err != nil {
		t.Fatal(err)
	}
	e := wire.Serve(ln, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/reset":
			wire.Reset(w)
		case "/truncated":
			wire.Truncate(w, []byte("0123456789"))
		default:
			_, _ = io.WriteString(w, "all")
		}
	}))
	defer e.Close()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	get := func(path string) (string, error) {
		res, err := client.Get(e.URL + path)
		if err != nil {
			return "", err
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		return string(b), err
	}
	if got, err := get("/"); got != "all" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	if got, err := get("/reset"); err == nil {
		t.Errorf("after a reset: %q", got)
	}
	if got, err := get("/truncated"); got != "01234" || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("truncated: %q, %v", got, err)
	}
	e.Refuse()
	if got, err := get("/"); err == nil {
		t.Errorf("away: %q", got)
	}
	for range 2 {
		if err := e.Resume(); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := get("/"); got != "all" || err != nil {
		t.Errorf("back: %q, %v", got, err)
	}
	e.Close()
	if err := e.Resume(); !errors.Is(err, wire.ErrClosed) {
		t.Errorf("%v", err)
	}
}
