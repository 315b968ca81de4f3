// SPDX-License-Identifier: Apache-2.0

package tokencheck

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/association"
	"github.com/latchkey-dev/latchkey/pkg/evidence"
	"github.com/latchkey-dev/latchkey/test/standin/tokens"
)

func checker(t testing.TB, cfg Config) *Checker {
	t.Helper()
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestCheckReturnsWhatTheClusterSigned(t *testing.T) {
	s := signer(t, "a")
	c := checker(t, Config{})
	expiry := time.Now().Add(time.Hour).UTC().Truncate(time.Second)
	token := s.Token(tokens.Claims{Namespace: "web", ServiceAccount: "api", Pod: "api-0", Node: "worker-3", ID: "some-jti", Expiry: expiry})
	want := Subject{
		Namespace: "web", ServiceAccount: "api", ServiceAccountUID: tokens.UID("serviceaccount", "web", "api"),
		PodName: "api-0", PodUID: tokens.UID("pod", "web", "api-0"),
		NodeName: "worker-3", NodeUID: tokens.UID("node", "worker-3"), JTI: "some-jti", Expires: expiry,
	}
	for range 2 { // the second is remembered
		got, err := c.Check(t.Context(), clusterOf(s, "a"), token)
		if err != nil || got != want {
			t.Errorf("got %+v, %v\nwant %+v", got, err, want)
		}
	}
	old := s.Token(tokens.Claims{NoNode: true})
	if got, err := c.Check(t.Context(), clusterOf(s, "a"), old); err != nil || got.NodeName != "" || got.NodeUID != "" {
		t.Errorf("without a node: %+v, %v", got, err)
	}
}

// What is asked for every token of a stranger's.
func TestCheckRefuses(t *testing.T) {
	s, other := signer(t, "a"), signer(t, "b")
	twoAudiences := map[string]any{"aud": []string{"pods.eks.amazonaws.com", "latchkey-server"}}
	for name, c := range map[string]struct {
		token  string
		want   error
		reason evidence.Reason
	}{
		"expired":              {s.Token(tokens.Claims{IssuedAt: time.Now().Add(-2 * time.Hour), Expiry: time.Now().Add(-time.Hour)}), ErrExpired, evidence.ReasonTokenExpired},
		"not yet":              {s.Token(tokens.Claims{IssuedAt: time.Now().Add(time.Hour)}), ErrInvalid, evidence.ReasonTokenNotYetValid},
		"foreign audience":     {s.Token(tokens.Claims{Audience: "sts.amazonaws.com"}), ErrInvalid, evidence.ReasonTokenAudience},
		"an agent's audience":  {s.Token(tokens.Claims{Audience: "latchkey-server"}), ErrInvalid, evidence.ReasonTokenAudience},
		"both audiences":       {s.Token(tokens.Claims{Set: twoAudiences}), ErrInvalid, evidence.ReasonTokenAudience},
		"foreign issuer":       {s.Token(tokens.Claims{Issuer: "https://elsewhere.example.com"}), ErrInvalid, evidence.ReasonTokenIssuer},
		"foreign cluster":      {other.Token(tokens.Claims{}), ErrInvalid, evidence.ReasonTokenUnknownKey},
		"foreign, own key id":  {other.Sign(s.Header(tokens.Claims{}), s.Payload(tokens.Claims{})), ErrInvalid, evidence.ReasonTokenSignature},
		"unsigned":             {tokens.Assemble(s.Header(tokens.Claims{Header: map[string]any{"alg": "none"}}), s.Payload(tokens.Claims{}), []byte("x")), ErrInvalid, evidence.ReasonTokenAlgorithm},
		"not bound":            {s.Token(tokens.Claims{NoPod: true}), ErrInvalid, evidence.ReasonTokenUnbound},
		"another pod's claims": {s.Token(tokens.Claims{Set: map[string]any{"sub": "system:serviceaccount:kube-system:admin"}}), ErrInvalid, evidence.ReasonTokenMalformed},
		"garbage":              {"a.b.c", ErrInvalid, evidence.ReasonTokenMalformed},
		"nothing":              {"", ErrInvalid, evidence.ReasonTokenMissing},
		"a lot":                {strings.Repeat("a", 1<<20), ErrInvalid, evidence.ReasonTokenTooLarge},
	} {
		checker := checker(t, Config{Refuse: "latchkey-server"})
		for range 2 { // a refusal is not remembered as anything else
			got, err := checker.Check(t.Context(), clusterOf(s, "a"), c.token)
			var refused *Error
			if !errors.As(err, &refused) || !errors.Is(err, c.want) || refused.Reason() != c.reason || refused.Message() == "" {
				t.Fatalf("%s: %+v, %v", name, got, err)
			}
			for _, kind := range []error{ErrInvalid, ErrExpired, ErrUnavailable} {
				if errors.Is(err, kind) != (kind == c.want) {
					t.Errorf("%s: is %v", name, kind)
				}
			}
			if strings.Count(err.Error(), string(c.reason)) != 1 {
				t.Errorf("%s: %v", name, err)
			}
			for part := range strings.SplitSeq(c.token, ".") {
				if len(part) > 8 && strings.Contains(err.Error()+refused.Message(), part[:9]) {
					t.Errorf("%s: the error quotes the token: %v", name, err)
				}
			}
		}
	}
}

// The text that clients of EKS Auth know.
func TestExpiredText(t *testing.T) {
	now := newClock()
	s := signer(t, "a")
	expiry := now.Now().Add(time.Hour).UTC().Truncate(time.Second)
	token := s.Token(tokens.Claims{Expiry: expiry})
	c := checker(t, Config{Now: now.Now})
	if _, err := c.Check(t.Context(), clusterOf(s, "a"), token); err != nil {
		t.Fatal(err)
	}
	now.add(2 * time.Hour) // what is remembered has expired too
	_, err := c.Check(t.Context(), clusterOf(s, "a"), token)
	want := fmt.Sprintf("The token included in the request is expired: current date/time %s must be before the expiration date/time %s",
		now.Now().UTC().Format(time.RFC3339), expiry.Format(time.RFC3339))
	var refused *Error
	if !errors.Is(err, ErrExpired) || !errors.As(err, &refused) || refused.Message() != want {
		t.Errorf("got %v\nwant %s", err, want)
	}
}

// A key registered for one cluster is refused for another, though both have the
// issuer that kubeadm gives every cluster, and though the token is remembered.
func TestClustersAreApart(t *testing.T) {
	a, b := signer(t, "a"), signer(t, "b")
	c := checker(t, Config{})
	token := a.Token(tokens.Claims{})
	if _, err := c.Check(t.Context(), clusterOf(a, "a"), token); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Check(t.Context(), clusterOf(b, "b"), token); !errors.Is(err, ErrInvalid) {
		t.Errorf("cluster b: %v", err)
	}
	// The same name, with other keys: a cluster that was made anew.
	if _, err := c.Check(t.Context(), clusterOf(b, "a"), token); !errors.Is(err, ErrInvalid) {
		t.Errorf("withdrawn key: %v", err)
	}
	both := clusterOf(a, "a")
	both.Keys = tokens.JWKS(a, b)
	for _, s := range []*tokens.Signer{a, b} {
		if _, err := c.Check(t.Context(), both, s.Token(tokens.Claims{})); err != nil {
			t.Errorf("during a change of keys: %v", err)
		}
	}
	moved := both
	moved.Issuers = []string{"https://new.example.com"}
	if _, err := c.Check(t.Context(), moved, token); !errors.Is(err, ErrInvalid) {
		t.Errorf("withdrawn issuer: %v", err)
	}
	moved.Issuers = append(moved.Issuers, a.Issuer())
	if _, err := c.Check(t.Context(), moved, token); err != nil {
		t.Errorf("one of two issuers: %v", err)
	}
}

// What an operator got wrong is never the pod's fault.
func TestMisconfiguredCluster(t *testing.T) {
	s := signer(t, "a")
	for name, edit := range map[string]func(*association.Cluster){
		"no keys":      func(c *association.Cluster) { c.Keys = nil },
		"broken keys":  func(c *association.Cluster) { c.Keys = []byte(`{"keys":[{}]}`) },
		"no issuer":    func(c *association.Cluster) { c.Issuers = nil },
		"empty issuer": func(c *association.Cluster) { c.Issuers = []string{""} },
	} {
		cluster := clusterOf(s, "a")
		edit(&cluster)
		c := checker(t, Config{})
		_, err := c.Check(t.Context(), cluster, s.Token(tokens.Claims{}))
		var refused *Error
		if !errors.Is(err, ErrUnavailable) || !errors.As(err, &refused) || refused.Reason() != ReasonMisconfigured {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := c.Check(t.Context(), clusterOf(s, "a"), s.Token(tokens.Claims{})); err != nil {
			t.Errorf("%s, mended: %v", name, err)
		}
	}
	if _, err := New(Config{Refuse: "pods.eks.amazonaws.com"}); err == nil {
		t.Error("an audience both asked for and refused")
	}
}

func TestOtherAudience(t *testing.T) {
	s := signer(t, "a")
	agents := checker(t, Config{Audience: "latchkey-server", Refuse: "pods.eks.amazonaws.com"})
	if _, err := agents.Check(t.Context(), clusterOf(s, "a"), s.Token(tokens.Claims{Audience: "latchkey-server"})); err != nil {
		t.Error(err)
	}
	for _, claims := range []tokens.Claims{{}, {Set: map[string]any{"aud": []string{"latchkey-server", "pods.eks.amazonaws.com"}}}} {
		if _, err := agents.Check(t.Context(), clusterOf(s, "a"), s.Token(claims)); !errors.Is(err, ErrInvalid) {
			t.Errorf("a pod's token: %v", err)
		}
	}
}

// What is remembered is bounded, and no stranger's doing.
func TestMemoryIsBounded(t *testing.T) {
	s, other := signer(t, "a"), signer(t, "b")
	c := checker(t, Config{Memory: 64})
	held := func() (n int) {
		for i := range c.memory.shards {
			n += len(c.memory.shards[i].now) + len(c.memory.shards[i].old)
		}
		return n
	}
	for range 50 {
		if _, err := c.Check(t.Context(), clusterOf(s, "a"), other.Token(tokens.Claims{})); err == nil {
			t.Fatal("accepted")
		}
	}
	if n := held(); n != 0 {
		t.Errorf("%d tokens of strangers remembered", n)
	}
	for range 300 {
		if _, err := c.Check(t.Context(), clusterOf(s, "a"), s.Token(tokens.Claims{})); err != nil {
			t.Fatal(err)
		}
	}
	if n := held(); n > 64 || n < 16 {
		t.Errorf("%d tokens remembered", n)
	}
	m := newMemory(64)
	kept := memoryKey{cluster: "a"}
	m.put(kept, &memorized{})
	for i := range 100 { // all in one shard
		m.put(memoryKey{cluster: fmt.Sprint(i)}, &memorized{})
		if m.get(kept) == nil {
			t.Fatalf("forgotten although in use, after %d others", i)
		}
	}
	for i := range maxClusters + 1 {
		c.prepare(&association.Cluster{Name: fmt.Sprint(i)})
	}
	if n := len(c.clusters); n > maxClusters {
		t.Errorf("%d clusters prepared", n)
	}
}

func TestAtOnce(t *testing.T) {
	s := signer(t, "a")
	api := startAPIServer(t)
	cluster := clusterOf(s, "a")
	cluster.TokenReview = &association.TokenReview{Kubeconfig: api.kubeconfig(t, "reviewer-credential"), Context: "reviewer"}
	c := checker(t, Config{ReviewTimeout: time.Minute, ReviewsAtOnce: 4})
	raw := make([]string, 8)
	for i := range raw {
		raw[i] = s.Token(tokens.Claims{})
	}
	var wg sync.WaitGroup
	for i := range 64 {
		wg.Go(func() {
			if _, err := c.Check(t.Context(), cluster, raw[i%len(raw)]); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	api.mu.Lock()
	defer api.mu.Unlock()
	if api.atOnce > 4 || api.reviews < len(raw) {
		t.Errorf("%d reviews, %d at once", api.reviews, api.atOnce)
	}
}

// BenchmarkCheck is the token's part of AssumeRoleForPodIdentity.
func BenchmarkCheck(b *testing.B) {
	s, err := tokens.NewSigner(tokens.Config{})
	if err != nil {
		b.Fatal(err)
	}
	cluster := clusterOf(s, "a")
	raw := make([]string, 512)
	for i := range raw {
		raw[i] = s.Token(tokens.Claims{})
	}
	for name, memory := range map[string]int{"remembered": DefaultMemory, "first": 1} {
		b.Run(name, func(b *testing.B) {
			c := checker(b, Config{Memory: memory})
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				if _, err := c.Check(context.Background(), cluster, raw[i%len(raw)]); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
