// SPDX-License-Identifier: Apache-2.0

package eksapi_test

import (
	"context"
	"encoding/json"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"

	"github.com/latchkey-dev/latchkey/pkg/eksapi"
	"github.com/latchkey-dev/latchkey/pkg/nodeauth"
	"github.com/latchkey-dev/latchkey/pkg/nodeauth/exchange"
	"github.com/latchkey-dev/latchkey/pkg/sigv4"
	"github.com/latchkey-dev/latchkey/pkg/tokencheck"
	"github.com/latchkey-dev/latchkey/test/standin/tokens"
)

// fakeKeyStore keeps the sealing keys in memory.
type fakeKeyStore struct {
	mu       sync.Mutex
	value    []byte
	revision int64
}

func (f *fakeKeyStore) Load(context.Context) ([]byte, int64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.value, f.revision, nil
}

func (f *fakeKeyStore) Save(_ context.Context, value []byte, revision int64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if revision != f.revision {
		return exchange.ErrConflict
	}
	f.value, f.revision = value, revision+1
	return nil
}

// An agent proves its node with its own token, and its keys are good for the
// pods of that node, and for nothing else.
func TestNodesThatProveThemselves(t *testing.T) {
	var nodes *exchange.Exchanger
	w := newWorld(t, func(c *eksapi.Config) {
		ring, err := exchange.NewRing(exchange.RingConfig{Store: &fakeKeyStore{}})
		if err != nil {
			t.Fatal(err)
		}
		if err := ring.Refresh(t.Context()); err != nil {
			t.Fatal(err)
		}
		agents, err := tokencheck.New(tokencheck.Config{Audience: nodeauth.Audience, Refuse: tokens.DefaultAudience})
		if err != nil {
			t.Fatal(err)
		}
		clusters, ok := c.Index.(exchange.Clusters)
		if !ok {
			t.Fatal("the index knows no clusters")
		}
		if nodes, err = exchange.New(exchange.Config{Ring: ring, Tokens: agents, Clusters: clusters, Agents: []string{"kube-system/agent"}}); err != nil {
			t.Fatal(err)
		}
		static, _ := c.Keys.(sigv4.Choose)
		c.Keys = sigv4.Choose{Static: static.Static, Session: nodes}
	})
	w.create("web", "api", role("api"))
	keys := func(cluster, node string) aws.Credentials {
		t.Helper()
		of, ok := w.index.Cluster(cluster)
		if !ok {
			t.Fatal("no cluster")
		}
		g, err := nodes.Exchange(t.Context(), of, signer(t, cluster).Token(tokens.Claims{Namespace: "kube-system", ServiceAccount: "agent", Node: node, Audience: nodeauth.Audience}))
		if err != nil {
			t.Fatal(err)
		}
		return aws.Credentials{AccessKeyID: g.AccessKeyID, SecretAccessKey: g.SecretAccessKey, SessionToken: g.SessionToken}
	}
	send := func(c aws.Credentials, r raw, service string) answer {
		r.unsigned = true
		r.tamper = func(req *http.Request) {
			if err := v4.NewSigner().SignHTTP(t.Context(), c, req, sum(r.body), service, region, time.Now()); err != nil {
				t.Fatal(err)
			}
		}
		return w.send(r)
	}
	body, err := json.Marshal(map[string]string{"token": signer(t, "prod").Token(tokens.Claims{Namespace: "web", ServiceAccount: "api", Node: "node-1"})})
	if err != nil {
		t.Fatal(err)
	}
	redeem := raw{path: exchangePath, body: string(body)}
	node := keys("prod", "node-1")
	w.audited()
	if a := send(node, redeem, "eks-auth"); a.status != 200 {
		t.Fatalf("its own pod: %d %s", a.status, a.body)
	}
	if r := w.audited(); len(r) != 1 || r[0].Caller != "node/prod/node-1" || r[0].CallerNode == nil || r[0].CallerNode.UID == "" {
		t.Errorf("recorded %+v", r)
	}
	unsealed, cut, mixed := node, node, keys("prod", "node-2")
	unsealed.SessionToken = ""
	cut.SessionToken = cut.SessionToken[:len(cut.SessionToken)-2]
	mixed.SessionToken = node.SessionToken
	for name, c := range map[string]struct {
		keys    aws.Credentials
		raw     raw
		service string
		status  int
		code    string
	}{
		"another node's pod":           {keys("prod", "node-2"), redeem, "eks-auth", 400, "AccessDeniedException"},
		"node of that name, elsewhere": {keys("dev", "node-1"), redeem, "eks-auth", 400, "AccessDeniedException"},
		"without the session token":    {unsealed, redeem, "eks-auth", 403, "UnrecognizedClientException"},
		"a session token cut":          {cut, redeem, "eks-auth", 403, "UnrecognizedClientException"},
		"another's session token":      {mixed, redeem, "eks-auth", 403, "UnrecognizedClientException"},
		"list":                         {node, raw{method: "GET", path: "/clusters/prod/pod-identity-associations"}, "eks", 403, "AccessDeniedException"},
		"create":                       {node, raw{path: "/clusters/prod/pod-identity-associations", body: "{}"}, "eks", 403, "AccessDeniedException"},
		"tag its cluster":              {node, raw{path: "/tags/arn:aws:eks:" + region + ":" + account + ":cluster/prod", body: `{"tags":{"a":"b"}}`}, "eks", 403, "AccessDeniedException"},
	} {
		if a := send(c.keys, c.raw, c.service); a.status != c.status || a.code() != c.code {
			t.Errorf("%s: %d %s", name, a.status, a.body)
		}
	}
}
