// SPDX-License-Identifier: Apache-2.0

package exchange

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"

	"github.com/latchkey-dev/latchkey/pkg/association"
	"github.com/latchkey-dev/latchkey/pkg/nodeauth"
	"github.com/latchkey-dev/latchkey/pkg/permission"
	"github.com/latchkey-dev/latchkey/pkg/sigv4"
	"github.com/latchkey-dev/latchkey/pkg/tokencheck"
	"github.com/latchkey-dev/latchkey/test/standin/tokens"
)

// clusters is an index that tests change.
type clusters struct {
	mu    sync.Mutex
	known map[string]association.Cluster
	away  bool
}

func (c *clusters) Cluster(name string) (association.Cluster, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	cluster, ok := c.known[name]
	return cluster, ok
}

func (c *clusters) Ready() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return !c.away
}

func (c *clusters) set(change func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	change()
}

// rig is a server's side with two clusters.
type rig struct {
	*Exchanger
	clusters *clusters
	store    *memoryStore
	ring     *Ring
	a, b     *tokens.Signer
	clock    *clock

	mu     sync.Mutex
	events []Event
}

func start(t testing.TB) *rig {
	t.Helper()
	r := &rig{clock: &clock{now: time.Now()}, store: &memoryStore{}, clusters: &clusters{known: map[string]association.Cluster{}}}
	for name, s := range map[string]**tokens.Signer{"a": &r.a, "b": &r.b} {
		var err error
		if *s, err = tokens.NewSigner(tokens.Config{Algorithm: "ES256", Now: r.clock.Now}); err != nil {
			t.Fatal(err)
		}
		r.clusters.known[name] = association.Cluster{Name: name, Issuers: []string{(*s).Issuer()}, Keys: (*s).JWKS(), CreatedAt: time.UnixMilli(1700000000123)}
	}
	r.ring = newTestRing(t, r.store, r.clock)
	if err := r.ring.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	check, err := tokencheck.New(tokencheck.Config{Audience: nodeauth.Audience, Refuse: "pods.eks.amazonaws.com", Now: r.clock.Now})
	if err != nil {
		t.Fatal(err)
	}
	r.Exchanger, err = New(Config{Ring: r.ring, Tokens: check, Clusters: r.clusters, Now: r.clock.Now, Observe: func(e Event) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.events = append(r.events, e)
	}})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func agent(edit ...func(*tokens.Claims)) tokens.Claims {
	c := tokens.Claims{Namespace: "kube-system", ServiceAccount: "latchkey-agent", Pod: "latchkey-agent-x", Node: "worker-3", Audience: nodeauth.Audience, ID: "the-jti"}
	for _, e := range edit {
		e(&c)
	}
	return c
}

func (r *rig) exchange(t testing.TB, cluster, token string) (Grant, error) {
	t.Helper()
	c, ok := r.clusters.Cluster(cluster)
	if !ok {
		t.Fatalf("no cluster %s", cluster)
	}
	return r.Exchange(t.Context(), c, token)
}

func TestExchange(t *testing.T) {
	r := start(t)
	g, err := r.exchange(t, "a", r.a.Token(agent()))
	if err != nil {
		t.Fatal(err)
	}
	want := Node{
		Cluster: "a", Name: "worker-3", UID: tokens.UID("node", "worker-3"), Namespace: "kube-system", ServiceAccount: "latchkey-agent",
		PodName: "latchkey-agent-x", PodUID: tokens.UID("pod", "kube-system", "latchkey-agent-x"),
		Expires: r.clock.Now().Add(time.Hour).UTC().Truncate(time.Second),
	}
	if g.Node != want || g.JTI != "the-jti" {
		t.Errorf("got %+v\nwant %+v", g.Node, want)
	}
	if len(g.AccessKeyID) != 20 || !strings.HasPrefix(g.AccessKeyID, nodeauth.AccessKeyPrefix) || len(g.SecretAccessKey) != 40 || len(g.SessionToken) > 1024 {
		t.Errorf("key %s, session token of %d bytes", g.AccessKeyID, len(g.SessionToken))
	}
	key, err := r.Lookup(t.Context(), g.AccessKeyID, g.SessionToken)
	if err != nil || key.Secret != g.SecretAccessKey {
		t.Fatalf("%v", err)
	}
	p, ok := key.Principal.(permission.Principal)
	if !ok || p.Node == nil || *p.Node != (permission.Node{Cluster: "a", Name: "worker-3", UID: want.UID}) || p.Name != "node/a/worker-3" {
		t.Errorf("principal %+v", key.Principal)
	}
	again, err := r.exchange(t, "a", r.a.Token(agent()))
	if err != nil || again.AccessKeyID == g.AccessKeyID || again.SecretAccessKey == g.SecretAccessKey {
		t.Errorf("the same keys again: %v", err)
	}
	if len(r.events) != 2 || r.events[0].Grant.SecretAccessKey != "" || r.events[0].Grant.SessionToken != "" || r.events[0].Grant.AccessKeyID != g.AccessKeyID || r.events[0].Cluster != "a" {
		t.Errorf("observed %v", r.events)
	}
	text := fmt.Sprintf("%v %+v %#v %v", g, g, g, key)
	var log bytes.Buffer
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "grant", g)
	if text += log.String(); strings.Contains(text, g.SecretAccessKey) || strings.Contains(text, g.SessionToken) {
		t.Errorf("shown: %s", text)
	}
	if raw, _ := base64.RawURLEncoding.DecodeString(strings.TrimPrefix(g.SessionToken, sessionMark)); bytes.Contains(raw, []byte("worker-3")) {
		t.Error("the session token can be read")
	}
}

// Never longer than the token.
func TestKeysEndWithTheToken(t *testing.T) {
	r := start(t)
	end := r.clock.Now().Add(10 * time.Minute).UTC().Truncate(time.Second)
	g, err := r.exchange(t, "a", r.a.Token(agent(func(c *tokens.Claims) { c.Expiry = end })))
	if err != nil || !g.Node.Expires.Equal(end) {
		t.Fatalf("expires %s, %v", g.Node.Expires, err)
	}
	r.clock.add(10 * time.Minute)
	key, err := r.Lookup(t.Context(), g.AccessKeyID, g.SessionToken)
	if !errors.Is(err, sigv4.ErrExpiredKey) || key.Secret != g.SecretAccessKey {
		t.Errorf("after it: %v", err)
	}
	// The checker's leeway for clocks gives no key that has expired already.
	if _, err := r.exchange(t, "a", r.a.Token(agent(func(c *tokens.Claims) { c.IssuedAt, c.Expiry = end.Add(-time.Hour), end }))); !errors.Is(err, ErrExpired) {
		t.Errorf("a token that has just expired: %v", err)
	}
}

func TestExchangeRefuses(t *testing.T) {
	r := start(t)
	set := func(f func(*tokens.Claims)) string { return r.a.Token(agent(f)) }
	for name, c := range map[string]struct {
		token string
		want  error
	}{
		"a pod's token": {set(func(c *tokens.Claims) { c.Audience = "pods.eks.amazonaws.com" }), ErrInvalid},
		"a token for both": {set(func(c *tokens.Claims) {
			c.Set = map[string]any{"aud": []string{"latchkey-server", "pods.eks.amazonaws.com"}}
		}), ErrInvalid},
		"the API server's":    {set(func(c *tokens.Claims) { c.Audience = "https://kubernetes.default.svc" }), ErrInvalid},
		"no agent":            {set(func(c *tokens.Claims) { c.ServiceAccount = "default" }), ErrNotAgent},
		"an agent's namesake": {set(func(c *tokens.Claims) { c.Namespace = "default" }), ErrNotAgent},
		"no node":             {set(func(c *tokens.Claims) { c.NoNode = true }), ErrInvalid},
		"no pod":              {set(func(c *tokens.Claims) { c.NoPod = true }), ErrInvalid},
		"expired": {set(func(c *tokens.Claims) {
			c.IssuedAt, c.Expiry = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
		}), ErrExpired},
		"another cluster's": {r.b.Token(agent()), ErrInvalid},
		"garbage":           {"a.b.c", ErrInvalid},
	} {
		g, err := r.exchange(t, "a", c.token)
		var refused *Error
		if !errors.Is(err, c.want) || !errors.As(err, &refused) || refused.Message() == "" || g != (Grant{}) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
		if e := r.events[len(r.events)-1]; !errors.Is(e.Err, c.want) {
			t.Errorf("%s: observed %v", name, e)
		}
	}
	// The cluster says who its agents are; then the default is none.
	c := r.clusters.known["a"]
	c.AgentServiceAccounts = []string{"latchkey/agent"}
	r.clusters.known["a"] = c
	if _, err := r.exchange(t, "a", r.a.Token(agent())); !errors.Is(err, ErrNotAgent) {
		t.Errorf("the default where the cluster names others: %v", err)
	}
	if _, err := r.exchange(t, "a", set(func(c *tokens.Claims) { c.Namespace, c.ServiceAccount = "latchkey", "agent" })); err != nil {
		t.Errorf("the cluster's own: %v", err)
	}
}

// broken tokens that cannot be checked are no refusal.
type unavailable struct{}

func (unavailable) Check(ctx context.Context, _ association.Cluster, _ string) (tokencheck.Subject, error) {
	c, err := tokencheck.New(tokencheck.Config{})
	if err != nil {
		return tokencheck.Subject{}, err
	}
	return c.Check(ctx, association.Cluster{}, "") // a cluster without keys
}

func TestUncertain(t *testing.T) {
	r := start(t)
	ring, err := NewRing(RingConfig{Store: &memoryStore{}, Now: r.clock.Now})
	if err != nil {
		t.Fatal(err)
	}
	for name, cfg := range map[string]Config{
		"tokens cannot be checked": {Ring: r.ring, Tokens: unavailable{}, Clusters: r.clusters},
		"no sealing key":           {Ring: ring, Tokens: r.cfg.Tokens, Clusters: r.clusters},
	} {
		e, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := e.Exchange(t.Context(), r.clusters.known["a"], r.a.Token(agent())); !errors.Is(err, ErrUnavailable) || errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	g, err := r.exchange(t, "a", r.a.Token(agent()))
	if err != nil {
		t.Fatal(err)
	}
	r.clusters.set(func() { r.clusters.away = true })
	if _, err := r.Lookup(t.Context(), g.AccessKeyID, g.SessionToken); !errors.Is(err, ErrUnavailable) || errors.Is(err, sigv4.ErrUnknownKey) {
		t.Errorf("clusters not known yet: %v", err)
	}
	if _, err := New(Config{}); err == nil {
		t.Error("made of nothing")
	}
}

// Keys end with their cluster, also if another of its name takes its place, and
// when their service account is no agent's any more.
func TestKeysEndWithTheCluster(t *testing.T) {
	for name, edit := range map[string]func(c *association.Cluster) bool{
		"removed":        func(*association.Cluster) bool { return false },
		"made anew":      func(c *association.Cluster) bool { c.CreatedAt = c.CreatedAt.Add(time.Second); return true },
		"another agent":  func(c *association.Cluster) bool { c.AgentServiceAccounts = []string{"x/y"}; return true },
		"changed":        func(c *association.Cluster) bool { c.ModifiedAt = time.Now(); c.Revision++; return true },
		"still an agent": func(c *association.Cluster) bool { c.AgentServiceAccounts = []string{DefaultAgents}; return true },
	} {
		r := start(t)
		g, err := r.exchange(t, "a", r.a.Token(agent()))
		if err != nil {
			t.Fatal(err)
		}
		c := r.clusters.known["a"]
		if delete(r.clusters.known, "a"); edit(&c) {
			r.clusters.known["a"] = c
		}
		_, err = r.Lookup(t.Context(), g.AccessKeyID, g.SessionToken)
		if valid := name == "changed" || name == "still an agent"; valid && err != nil || !valid && !errors.Is(err, sigv4.ErrUnknownKey) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestLookupRefuses(t *testing.T) {
	r := start(t)
	g, err := r.exchange(t, "a", r.a.Token(agent()))
	if err != nil {
		t.Fatal(err)
	}
	other, err := r.exchange(t, "a", r.a.Token(agent()))
	if err != nil {
		t.Fatal(err)
	}
	flip := func(i int) string {
		raw, _ := base64.RawURLEncoding.DecodeString(strings.TrimPrefix(g.SessionToken, sessionMark))
		raw[i] ^= 1
		return sessionMark + base64.RawURLEncoding.EncodeToString(raw)
	}
	for name, c := range map[string][2]string{
		"another key's session": {g.AccessKeyID, other.SessionToken},
		"another key":           {other.AccessKeyID, g.SessionToken},
		"no key":                {"", g.SessionToken},
		"nothing":               {g.AccessKeyID, ""},
		"no mark":               {g.AccessKeyID, strings.TrimPrefix(g.SessionToken, sessionMark)},
		"another key id":        {g.AccessKeyID, flip(0)},
		"another nonce":         {g.AccessKeyID, flip(keyIDSize)},
		"another content":       {g.AccessKeyID, flip(keyIDSize + 40)},
		"cut":                   {g.AccessKeyID, g.SessionToken[:len(g.SessionToken)-4]},
		"very short":            {g.AccessKeyID, sessionMark + "AAAA"},
		"just a key id":         {g.AccessKeyID, g.SessionToken[:len(sessionMark)+11]},
		"a line break":          {g.AccessKeyID, g.SessionToken + "\n"},
		"a lot":                 {g.AccessKeyID, sessionMark + strings.Repeat("A", 1<<20)},
	} {
		if key, err := r.Lookup(t.Context(), c[0], c[1]); !errors.Is(err, sigv4.ErrUnknownKey) || key.Secret != "" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Both sides of the wire together: the agent's provider, the handler, the
// SDK's signer, and the server's verifier.
func TestEndToEnd(t *testing.T) {
	r := start(t)
	mux := http.NewServeMux()
	mux.Handle(Pattern, r)
	server := httptest.NewServer(mux)
	defer server.Close()
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte(r.a.Token(agent())), 0o600); err != nil {
		t.Fatal(err)
	}
	p, err := nodeauth.NewProvider(nodeauth.ProviderConfig{Endpoint: server.URL, Cluster: "a", TokenFile: file})
	if err != nil {
		t.Fatal(err)
	}
	c, err := p.Retrieve(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	body := []byte(`{"token":"x"}`)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, server.URL+"/clusters/a/assume-role-for-pod-identity", bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(body)
	if err := v4.NewSigner().SignHTTP(t.Context(), c, req, hex.EncodeToString(sum[:]), "eks-auth", "us-west-2", time.Now()); err != nil {
		t.Fatal(err)
	}
	req.Host = req.URL.Host
	v, err := sigv4.New(sigv4.Config{Keys: sigv4.Choose{Session: r}})
	if err != nil {
		t.Fatal(err)
	}
	result, err := v.Verify(req, body, "eks-auth")
	if err != nil {
		t.Fatal(err)
	}
	if got, ok := result.Principal.(permission.Principal); !ok || got.Node == nil || got.Node.Name != "worker-3" || got.Node.Cluster != "a" {
		t.Errorf("principal %+v", result.Principal)
	}
}

func TestHandler(t *testing.T) {
	r := start(t)
	mux := http.NewServeMux()
	mux.Handle(Pattern, r)
	good, _ := json.Marshal(nodeauth.Request{Token: r.a.Token(agent())})
	post := func(cluster, body string) *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		mux.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodPost, nodeauth.Path(cluster), strings.NewReader(body)))
		return w
	}
	for name, c := range map[string]struct {
		cluster, body string
		status        int
		code          string
	}{
		"good":               {"a", string(good), 200, ""},
		"unknown members":    {"a", `{"more":[{}],` + string(good[1:]), 200, ""},
		"no such cluster":    {"none", string(good), 400, "InvalidTokenException"},
		"another cluster":    {"b", string(good), 400, "InvalidTokenException"},
		"a pod's token":      {"a", `{"token":"` + r.a.Token(tokens.Claims{}) + `"}`, 400, "InvalidTokenException"},
		"no agent":           {"a", `{"token":"` + r.a.Token(tokens.Claims{Audience: nodeauth.Audience}) + `"}`, 403, "AccessDeniedException"},
		"no token":           {"a", `{}`, 400, "InvalidParameterException"},
		"no JSON":            {"a", `token=x`, 400, "InvalidRequestException"},
		"another type":       {"a", `{"token":1}`, 400, "InvalidRequestException"},
		"too large":          {"a", `{"token":"` + strings.Repeat("x", maxBody) + `"}`, 413, "InvalidRequestException"},
		"escaped characters": {"a/b", string(good), 400, "InvalidTokenException"},
	} {
		w := post(c.cluster, c.body)
		if w.Code != c.status || w.Header().Get("X-Amzn-ErrorType") != c.code || w.Header().Get("X-Amzn-RequestId") == "" ||
			w.Header().Get("Content-Type") != "application/json" || w.Header().Get("Cache-Control") != "no-store" {
			t.Errorf("%s: %d %v", name, w.Code, w.Header())
		}
		var answer map[string]any
		if err := json.Unmarshal(w.Body.Bytes(), &answer); err != nil || c.code != "" && answer["message"] == "" {
			t.Errorf("%s: body %s", name, w.Body)
		}
	}
	r.clusters.set(func() { r.clusters.away = true })
	if w := post("a", string(good)); w.Code != 503 || w.Header().Get("X-Amzn-ErrorType") != "ServiceUnavailableException" {
		t.Errorf("not ready: %d", w.Code)
	}
}

// Whoever has no token of the cluster is not told whether there is one.
func TestClustersAreNotTold(t *testing.T) {
	r := start(t)
	mux := http.NewServeMux()
	mux.Handle(Pattern, r)
	post := func(cluster, token string) string {
		body, err := json.Marshal(nodeauth.Request{Token: token})
		if err != nil {
			t.Fatal(err)
		}
		w := httptest.NewRecorder()
		mux.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodPost, nodeauth.Path(cluster), bytes.NewReader(body)))
		return fmt.Sprint(w.Code, w.Header().Get("X-Amzn-ErrorType"), w.Body)
	}
	good := r.a.Token(agent())
	for name, token := range map[string]string{
		"junk":               "x",
		"of another cluster": r.b.Token(agent()),
		"an old one of it": r.b.Token(agent(func(c *tokens.Claims) {
			c.IssuedAt, c.Expiry = r.clock.Now().Add(-3*time.Hour), r.clock.Now().Add(-2*time.Hour)
		})),
		"for another audience": r.b.Token(agent(func(c *tokens.Claims) { c.Audience = "x" })),
		"a changed signature":  good[:len(good)-4] + "AAAA",
		"no signature":         good[:strings.LastIndex(good, ".")+1],
	} {
		if there, not := post("a", token), post("none", token); there != not {
			t.Errorf("%s: %s\nwithout a cluster: %s", name, there, not)
		}
	}
}

// FuzzLookup: no session token makes anything panic, and none but ours opens.
func FuzzLookup(f *testing.F) {
	r := start(f)
	g, err := r.exchange(f, "a", r.a.Token(agent()))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(g.AccessKeyID, g.SessionToken)
	f.Add("", sessionMark)
	f.Fuzz(func(t *testing.T, id, session string) {
		key, err := r.Lookup(t.Context(), id, session)
		if ours := id == g.AccessKeyID && session == g.SessionToken; (err == nil) != ours || !ours && key.Secret != "" {
			t.Errorf("%v", err)
		}
	})
}

func BenchmarkLookup(b *testing.B) {
	r := start(b)
	g, err := r.exchange(b, "a", r.a.Token(agent()))
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := r.Lookup(b.Context(), g.AccessKeyID, g.SessionToken); err != nil {
			b.Fatal(err)
		}
	}
}
