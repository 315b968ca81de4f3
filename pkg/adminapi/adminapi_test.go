// SPDX-License-Identifier: Apache-2.0

package adminapi

import (
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

// serve answers on a socket of its own.
func serve(t *testing.T, h http.HandlerFunc) *Client {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "a.sock")
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: h}
	go func() { _ = srv.Serve(ln) }()
	t.Cleanup(func() { srv.Close() })
	return NewClient(socket)
}

// A script tells by the error what to do about it.
func TestErrorsSayWhatWentWrong(t *testing.T) {
	t.Parallel()
	for status, want := range map[int]error{404: ErrNotFound, 400: ErrInvalid, 501: ErrUnsupported, 500: nil} {
		c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(status)
			_ = json.NewEncoder(w).Encode(Problem{Error: "because"})
		})
		_, err := c.Facts(t.Context(), "x")
		if err == nil || !strings.HasSuffix(err.Error(), "because") || want != nil && !errors.Is(err, want) {
			t.Errorf("%d: %v", status, err)
		}
	}
	c := serve(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "<html>") })
	if _, err := c.Status(t.Context()); err == nil {
		t.Error("garbage was taken for an answer")
	}
	_, err := NewClient(filepath.Join(t.TempDir(), "none.sock")).Pods(t.Context())
	if !errors.Is(err, ErrNoAgent) || !strings.Contains(err.Error(), "is latchkey-agent running") || strings.Contains(err.Error(), "http://") {
		t.Errorf("%v", err)
	}
}

// An agent that hangs is not one that does not run.
func TestAgentThatDoesNotAnswer(t *testing.T) {
	t.Parallel()
	c := serve(t, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	c.http.Timeout = 50 * time.Millisecond
	_, err := c.Status(t.Context())
	if err == nil || errors.Is(err, ErrNoAgent) || !strings.Contains(err.Error(), "has not answered within 50ms") {
		t.Errorf("%v", err)
	}
}

// Each call asks what its name says, with what it was given.
func TestCallsAskWhatTheyAreFor(t *testing.T) {
	t.Parallel()
	var got string
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		got = r.Method + " " + r.URL.RequestURI() + " " + string(body)
		_, _ = io.WriteString(w, "{}")
	})
	ctx := t.Context()
	for want, call := range map[string]func() error{
		"GET /v1/status ":                       func() error { _, err := c.Status(ctx); return err },
		"GET /v1/pods ":                         func() error { _, err := c.Pods(ctx); return err },
		"GET /v1/whois?q=web%2Fa+b ":            func() error { _, err := c.Whois(ctx, "web/a b"); return err },
		"GET /v1/facts?q=1 ":                    func() error { _, err := c.Facts(ctx, "1"); return err },
		"GET /v1/denials?after=7 ":              func() error { _, err := c.Denials(ctx, 7); return err },
		"GET /v1/cache ":                        func() error { _, err := c.Cache(ctx); return err },
		"POST /v1/cache/drop?subject=a%2Fb ":    func() error { _, err := c.DropCached(ctx, "a/b"); return err },
		"POST /v1/cache/refresh?subject=a%2Fb ": func() error { _, err := c.RefreshCached(ctx, "a/b"); return err },
		"POST /v1/token the token":              func() error { _, err := c.CheckToken(ctx, "the token"); return err },
		"POST /v1/upstream ":                    func() error { _, err := c.ReachUpstream(ctx); return err },
		"GET /v1/log-level ":                    func() error { _, err := c.LogLevels(ctx); return err },
		`PUT /v1/log-level {"component":"cache","level":"debug"}`: func() error {
			_, err := c.SetLogLevel(ctx, LogLevel{"cache", "debug"})
			return err
		},
	} {
		if err := call(); err != nil || got != want {
			t.Errorf("%q, %v; want %q", got, err, want)
		}
	}
}

// No type of the API has a place for a token, a key or a secret.
func TestNothingCanHoldASecret(t *testing.T) {
	t.Parallel()
	seen := map[reflect.Type]bool{}
	var walk func(reflect.Type)
	walk = func(typ reflect.Type) {
		if seen[typ] {
			return
		}
		seen[typ] = true
		switch typ.Kind() {
		case reflect.Pointer, reflect.Slice, reflect.Map:
			walk(typ.Elem())
		case reflect.Struct:
			for i := range typ.NumField() {
				f := typ.Field(i)
				name := strings.ToLower(f.Name)
				if strings.Contains(name, "secret") || strings.Contains(name, "accesskey") || strings.Contains(name, "session") || name == "token" || name == "raw" || name == "signature" {
					t.Errorf("%s.%s", typ, f.Name)
				}
				walk(f.Type)
			}
		}
	}
	for _, v := range []any{Status{}, Pods{}, Whois{}, Facts{}, Denials{}, Cache{}, CacheChange{}, TokenCheck{}, Reached{}, LogLevels{}} {
		walk(reflect.TypeOf(v))
	}
	if len(seen) < 20 {
		t.Errorf("only %d types were looked at", len(seen))
	}
}
