// SPDX-License-Identifier: Apache-2.0

package nodeauth

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
)

var _ aws.CredentialsProvider = (*Provider)(nil)

// server answers exchanges as a test wants.
type server struct {
	*httptest.Server

	mu     sync.Mutex
	now    time.Time
	life   time.Duration
	answer http.HandlerFunc // takes the place of the answer
	tokens []string
}

func (s *server) set(change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
}

func (s *server) seen() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.tokens...)
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var in Request
	body, _ := io.ReadAll(r.Body)
	_ = json.Unmarshal(body, &in)
	s.mu.Lock()
	s.tokens = append(s.tokens, in.Token)
	n, answer, now, life := len(s.tokens), s.answer, s.now, s.life
	s.mu.Unlock()
	w.Header().Set("Date", now.UTC().Format(http.TimeFormat))
	if answer != nil {
		answer(w, r)
		return
	}
	if r.Method != http.MethodPost || r.URL.Path != "/base/latchkey/v1/clusters/prod/node-credentials" {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	_ = json.NewEncoder(w).Encode(Answer{
		Node: AnswerNode{Name: "node-1"},
		Credentials: AnswerCredentials{
			AccessKeyID: fmt.Sprintf("LKNODE%d", n), SecretAccessKey: "hunter2-secret", SessionToken: "hunter2-session",
			Expiration: now.Add(life).Unix(),
		},
	})
}

func refusing(status int, code string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		if code != "" {
			w.Header().Set("X-Amzn-ErrorType", code)
		}
		w.WriteHeader(status)
		_, _ = io.WriteString(w, `{"message":"the token my-node-token is not liked"}`)
	}
}

type rig struct {
	*Provider
	server *server
	file   string

	mu  sync.Mutex
	now time.Time
	log bytes.Buffer
}

func (r *rig) clock() time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.now
}

func (r *rig) add(d time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.now = r.now.Add(d)
	r.server.set(func() { r.server.now = r.server.now.Add(d) })
}

func (r *rig) Write(b []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.log.Write(b)
}

func (r *rig) logged() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.log.String()
}

func start(t *testing.T, edit ...func(*ProviderConfig)) *rig {
	t.Helper()
	now := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	r := &rig{server: &server{now: now, life: time.Hour}, now: now, file: filepath.Join(t.TempDir(), "token")}
	r.server.Server = httptest.NewServer(r.server)
	t.Cleanup(r.server.Close)
	r.writeToken(t, "my-node-token")
	cfg := ProviderConfig{
		Endpoint: r.server.URL + "/base/", Cluster: "prod", TokenFile: r.file,
		AttemptTimeout: time.Minute, Timeout: 5 * time.Minute, Backoff: time.Millisecond,
		Now: r.clock, Jitter: func() float64 { return 0.5 }, Log: slog.New(slog.NewTextHandler(r, nil)),
	}
	for _, e := range edit {
		e(&cfg)
	}
	var err error
	if r.Provider, err = NewProvider(cfg); err != nil {
		t.Fatal(err)
	}
	return r
}

func (r *rig) writeToken(t *testing.T, token string) {
	t.Helper()
	if err := os.WriteFile(r.file, []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
}

// settle waits until no fetch is under way.
func (r *rig) settle(t *testing.T) {
	t.Helper()
	r.Provider.mu.Lock()
	f := r.flight
	r.Provider.mu.Unlock()
	if f == nil {
		return
	}
	select {
	case <-f.done:
	case <-time.After(time.Minute):
		t.Fatal("a fetch does not end")
	}
}

func (r *rig) retrieve(t *testing.T) (string, error) {
	t.Helper()
	c, err := r.Retrieve(t.Context())
	return c.AccessKeyID, err
}

func TestRetrieve(t *testing.T) {
	r := start(t)
	c, err := r.Retrieve(t.Context())
	want := aws.Credentials{AccessKeyID: "LKNODE1", SecretAccessKey: "hunter2-secret", SessionToken: "hunter2-session",
		Source: "LatchkeyNodeToken", CanExpire: true, Expires: r.clock().Add(time.Hour)}
	if err != nil || c != want {
		t.Errorf("%+v, %v", c, err)
	}
	if seen := r.server.seen(); len(seen) != 1 || seen[0] != "my-node-token" {
		t.Errorf("the server saw %q", seen)
	}
}

// Renewed from half their life on, with the token that is there then, and
// nobody waits for it.
func TestRenewal(t *testing.T) {
	r := start(t)
	if _, err := r.retrieve(t); err != nil {
		t.Fatal(err)
	}
	r.writeToken(t, "next-token\n")
	r.add(30*time.Minute - time.Second)
	if id, err := r.retrieve(t); id != "LKNODE1" || err != nil || len(r.server.seen()) != 1 {
		t.Errorf("before half the life: %s, %v", id, err)
	}
	r.add(time.Second)
	hold := make(chan struct{})
	r.server.set(func() {
		r.server.answer = func(w http.ResponseWriter, req *http.Request) {
			<-hold
			r.server.set(func() { r.server.answer = nil })
			// The body was read: answer as usual.
			_ = json.NewEncoder(w).Encode(Answer{Credentials: AnswerCredentials{AccessKeyID: "LKNODE2", SecretAccessKey: "s", SessionToken: "t",
				Expiration: r.clock().Add(time.Hour).Unix()}})
		}
	})
	for range 5 {
		if id, err := r.retrieve(t); id != "LKNODE1" || err != nil {
			t.Errorf("while it is renewed: %s, %v", id, err)
		}
	}
	close(hold)
	r.settle(t)
	if id, err := r.retrieve(t); id != "LKNODE2" || err != nil {
		t.Errorf("renewed: %s, %v", id, err)
	}
	if seen := r.server.seen(); len(seen) != 2 || seen[1] != "next-token" {
		t.Errorf("the server saw %q", seen)
	}
}

// Neither an outage nor a refusal takes keys away before they expire.
func TestKeptUntilExpiry(t *testing.T) {
	for name, c := range map[string]struct {
		answer http.HandlerFunc
		want   error
	}{
		"outage":  {refusing(503, "ServiceUnavailableException"), ErrUnavailable},
		"refusal": {refusing(400, "InvalidTokenException"), ErrRefused},
	} {
		r := start(t)
		if _, err := r.retrieve(t); err != nil {
			t.Fatal(err)
		}
		r.server.set(func() { r.server.answer = c.answer })
		r.add(40 * time.Minute)
		for range 5 {
			if id, err := r.retrieve(t); id != "LKNODE1" || err != nil {
				t.Errorf("%s: %s, %v", name, id, err)
			}
			r.settle(t)
		}
		asked := len(r.server.seen()) - 1
		if c.want == ErrRefused && asked != 1 || c.want == ErrUnavailable && asked != attempts {
			t.Errorf("%s: asked %d times in one moment", name, asked)
		}
		r.add(20*time.Minute - unusable - time.Nanosecond)
		if id, err := r.retrieve(t); id != "LKNODE1" || err != nil {
			t.Errorf("%s, at the end: %s, %v", name, id, err)
		}
		r.settle(t)
		r.add(2 * pauseRenewal)
		if id, err := r.retrieve(t); id != "" || !errors.Is(err, c.want) {
			t.Errorf("%s, after: %s, %v", name, id, err)
		}
		r.server.set(func() { r.server.answer = nil })
		if _, err := r.retrieve(t); !errors.Is(err, c.want) {
			t.Errorf("%s: asked again at once: %v", name, err)
		}
		r.add(2 * pauseNone)
		if id, err := r.retrieve(t); id == "" || err != nil {
			t.Errorf("%s, over: %s, %v", name, id, err)
		}
		if strings.Contains(r.logged(), "hunter2") || strings.Contains(r.logged(), "my-node-token") || !strings.Contains(r.logged(), "again") {
			t.Errorf("%s: log %s", name, r.logged())
		}
	}
}

// What the server means: its own 4xx is a no, all else is nothing.
func TestAnswers(t *testing.T) {
	body := func(text string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, text) }
	}
	for name, c := range map[string]struct {
		answer   http.HandlerFunc
		want     error
		attempts int
	}{
		"invalid token":  {refusing(400, "InvalidTokenException:http://x"), ErrRefused, 1},
		"no agent":       {refusing(403, "AccessDeniedException"), ErrRefused, 1},
		"no cluster":     {refusing(404, "ResourceNotFoundException"), ErrRefused, 1},
		"another server": {refusing(404, ""), ErrUnavailable, attempts},
		"a proxy":        {refusing(403, ""), ErrUnavailable, attempts},
		"throttled":      {refusing(429, "ThrottlingException"), ErrUnavailable, attempts},
		"broken":         {refusing(500, "InternalServerException"), ErrUnavailable, attempts},
		"redirect": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "/elsewhere", http.StatusTemporaryRedirect)
		}, ErrUnavailable, attempts},
		"garbage":        {body("<html>"), ErrUnavailable, attempts},
		"nothing":        {body(""), ErrUnavailable, attempts},
		"half an answer": {body(`{"credentials":{"accessKeyId":"a","secretAccessKey":"hunter2","expiration":4000000000}}`), ErrUnavailable, attempts},
		"expired":        {body(`{"credentials":{"accessKeyId":"a","secretAccessKey":"hunter2","sessionToken":"x","expiration":1000000000}}`), ErrUnavailable, attempts},
		"milliseconds":   {body(`{"credentials":{"accessKeyId":"a","secretAccessKey":"hunter2","sessionToken":"x","expiration":4000000000000}}`), ErrUnavailable, attempts},
		"endless":        {func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(make([]byte, maxAnswer+1)) }, ErrUnavailable, attempts},
		"cut":            {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, ErrUnavailable, attempts},
	} {
		r := start(t)
		r.server.answer = c.answer
		id, err := r.retrieve(t)
		if id != "" || !errors.Is(err, c.want) {
			t.Errorf("%s: %s, %v, want %v", name, id, err, c.want)
		}
		if n := len(r.server.seen()); n != c.attempts {
			t.Errorf("%s: %d attempts", name, n)
		}
		if text := fmt.Sprint(err) + r.logged(); strings.Contains(text, "hunter2") || strings.Contains(text, "my-node-token") {
			t.Errorf("%s: %s", name, text)
		}
	}
}

func TestNoServer(t *testing.T) {
	r := start(t)
	r.server.Close()
	if _, err := r.retrieve(t); !errors.Is(err, ErrUnavailable) {
		t.Errorf("%v", err)
	}
}

func TestTokenFile(t *testing.T) {
	for name, make := range map[string]func(r *rig) error{
		"none":      func(r *rig) error { return os.Remove(r.file) },
		"empty":     func(r *rig) error { return os.WriteFile(r.file, []byte(" \n"), 0o600) },
		"a lot":     func(r *rig) error { return os.WriteFile(r.file, bytes.Repeat([]byte("x"), maxToken+1), 0o600) },
		"directory": func(r *rig) error { return errors.Join(os.Remove(r.file), os.Mkdir(r.file, 0o700)) },
	} {
		r := start(t)
		if err := make(r); err != nil {
			t.Fatal(err)
		}
		if _, err := r.retrieve(t); !errors.Is(err, ErrTokenFile) {
			t.Errorf("%s: %v", name, err)
		}
		if n := len(r.server.seen()); n != 0 {
			t.Errorf("%s: %d requests", name, n)
		}
	}
}

// A node whose clock is wrong by hours has keys for as long as others.
func TestWrongClock(t *testing.T) {
	r := start(t)
	r.server.now = r.server.now.Add(-5 * time.Hour)
	if c, err := r.Retrieve(t.Context()); err != nil || !c.Expires.Equal(r.clock().Add(time.Hour)) {
		t.Errorf("expires %s, %v", c.Expires, err)
	}
}

// All who wait share one fetch, and one who leaves does not end it.
func TestOneFetchForAll(t *testing.T) {
	r := start(t)
	asked, hold := make(chan struct{}), make(chan struct{})
	r.server.answer = func(w http.ResponseWriter, _ *http.Request) {
		close(asked)
		<-hold
		_ = json.NewEncoder(w).Encode(Answer{Credentials: AnswerCredentials{AccessKeyID: "LKNODE", SecretAccessKey: "s", SessionToken: "t",
			Expiration: r.clock().Add(time.Hour).Unix()}})
	}
	ctx, cancel := context.WithCancel(t.Context())
	left := make(chan error)
	go func() {
		_, err := r.Retrieve(ctx)
		left <- err
	}()
	<-asked
	cancel()
	if err := <-left; !errors.Is(err, context.Canceled) {
		t.Errorf("who left: %v", err)
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if c, err := r.Retrieve(t.Context()); err != nil || c.AccessKeyID != "LKNODE" {
				t.Errorf("%s, %v", c.AccessKeyID, err)
			}
		})
	}
	close(hold)
	wg.Wait()
	if n := len(r.server.seen()); n != 1 {
		t.Errorf("%d requests", n)
	}
}

// A renewal that has just failed does not delay the fetch that somebody needs.
func TestNeededAtOnce(t *testing.T) {
	for name, lose := range map[string]func(r *rig){
		"expired":     func(r *rig) { r.add(time.Second) },
		"invalidated": func(r *rig) { r.Invalidate() },
	} {
		r := start(t)
		if _, err := r.retrieve(t); err != nil {
			t.Fatal(err)
		}
		r.server.set(func() { r.server.answer = refusing(503, "ServiceUnavailableException") })
		r.add(time.Hour - unusable - time.Second)
		if _, err := r.retrieve(t); err != nil {
			t.Fatal(err)
		}
		r.settle(t)
		r.server.set(func() { r.server.answer = nil })
		lose(r)
		if id, err := r.retrieve(t); err != nil || id == "LKNODE1" {
			t.Errorf("%s: %s, %v", name, id, err)
		}
	}
}

func TestInvalidate(t *testing.T) {
	r := start(t)
	if _, err := r.retrieve(t); err != nil {
		t.Fatal(err)
	}
	r.Invalidate()
	if id, err := r.retrieve(t); id != "LKNODE2" || err != nil {
		t.Errorf("%s, %v", id, err)
	}
}

func TestProviderSettings(t *testing.T) {
	good := ProviderConfig{Endpoint: "https://latchkey.example.com", Cluster: "prod", TokenFile: "token"}
	for name, edit := range map[string]func(*ProviderConfig){
		"no endpoint":    func(c *ProviderConfig) { c.Endpoint = "" },
		"no scheme":      func(c *ProviderConfig) { c.Endpoint = "latchkey.example.com" },
		"another scheme": func(c *ProviderConfig) { c.Endpoint = "unix:///x" },
		"a user":         func(c *ProviderConfig) { c.Endpoint = "https://user:hunter2@latchkey.example.com" },
		"a query":        func(c *ProviderConfig) { c.Endpoint += "?x" },
		"garbage":        func(c *ProviderConfig) { c.Endpoint += ":hunter2" },
		"no cluster":     func(c *ProviderConfig) { c.Cluster = "" },
		"a path":         func(c *ProviderConfig) { c.Cluster = "../prod" },
		"no file":        func(c *ProviderConfig) { c.TokenFile = "" },
	} {
		cfg := good
		edit(&cfg)
		if _, err := NewProvider(cfg); !errors.Is(err, ErrProviderConfig) || strings.Contains(fmt.Sprint(err), "hunter2") {
			t.Errorf("%s: %v", name, err)
		}
	}
	for endpoint, warned := range map[string]bool{
		"https://latchkey.example.com": false, "http://latchkey.example.com": true, "http://127.0.0.1:8443": false, "http://[::1]": false, "http://localhost": false,
	} {
		var log bytes.Buffer
		cfg := good
		cfg.Endpoint, cfg.Log = endpoint, slog.New(slog.NewTextHandler(&log, nil))
		if _, err := NewProvider(cfg); err != nil || (log.Len() > 0) != warned {
			t.Errorf("%s: %v, log %q", endpoint, err, log.String())
		}
	}
}

// FuzzAnswer: no answer makes anything panic, and half of one is none.
func FuzzAnswer(f *testing.F) {
	f.Add([]byte(`{"credentials":{"accessKeyId":"a","secretAccessKey":"b","sessionToken":"c","expiration":1795262400}}`), "Sat, 21 Nov 2026 12:00:00 GMT")
	f.Add([]byte(`{`), "")
	f.Fuzz(func(t *testing.T, body []byte, date string) {
		now := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
		k, err := decode(body, now, date)
		if (k == nil) == (err == nil) {
			t.Fatalf("%v, %v", k, err)
		}
		if k != nil && (!k.HasKeys() || k.SessionToken == "" || !k.Expires.After(now) || k.Expires.After(now.Add(24*time.Hour)) || k.renew.After(k.Expires)) {
			t.Errorf("%+v", k)
		}
	})
}
