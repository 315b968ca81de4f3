// SPDX-License-Identifier: Apache-2.0

package eksapi_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/service/eks"
	"github.com/aws/smithy-go"

	"github.com/latchkey-dev/latchkey/pkg/association"
	"github.com/latchkey-dev/latchkey/pkg/eksapi"
	"github.com/latchkey-dev/latchkey/pkg/etcd"
	"github.com/latchkey-dev/latchkey/pkg/issuer"
	"github.com/latchkey-dev/latchkey/pkg/permission"
	"github.com/latchkey-dev/latchkey/pkg/sigv4"
	"github.com/latchkey-dev/latchkey/pkg/strangers"
	"github.com/latchkey-dev/latchkey/pkg/tokencheck"
	"github.com/latchkey-dev/latchkey/test/realetcd"
	"github.com/latchkey-dev/latchkey/test/standin/tokens"
)

// One etcd serves all tests of the package, each below its own prefix.
var shared realetcd.Shared

func TestMain(m *testing.M) { os.Exit(shared.Run(m)) }

// signers are the token keys of clusters, by name.
var signers sync.Map

// signer is the token key of a cluster, made once.
func signer(t testing.TB, cluster string) *tokens.Signer {
	t.Helper()
	if s, ok := signers.Load(cluster); ok {
		return s.(*tokens.Signer)
	}
	// All clusters have the same issuer, as those of kubeadm do.
	s, err := tokens.NewSigner(tokens.Config{Algorithm: "ES256"})
	if err != nil {
		t.Fatal(err)
	}
	got, _ := signers.LoadOrStore(cluster, s)
	return got.(*tokens.Signer)
}

const (
	// patience is far more than anything takes on a loaded machine.
	patience = 2 * time.Minute
	region   = "eu-central-1"
	account  = "111122223333"
	other    = "444455556666"
)

func role(name string) string   { return "arn:aws:iam::" + account + ":role/" + name }
func target(name string) string { return "arn:aws:iam::" + other + ":role/" + name }
func ptr[T any](v T) *T         { return &v }

// users are those of the tests; the secret of NAME is "secret-of-NAME-000000".
const users = `users:
- name: admin
  keys: [{accessKeyId: ADMIN, secretAccessKey: secret-of-ADMIN-000000}]
  permissions: [{actions: ["*"], clusters: ["*"], namespaces: ["*"], passRoles: ["*"]}]
- name: web
  keys: [{accessKeyId: WEBS, secretAccessKey: secret-of-WEBS-000000}]
  permissions:
  - {actions: ["eks:*"], clusters: [prod], namespaces: [web], passRoles: ["arn:aws:iam::111122223333:role/web-*", "arn:aws:iam::444455556666:role/web-*"]}
- name: reader
  keys: [{accessKeyId: READER, secretAccessKey: secret-of-READER-000000}]
  permissions: [{actions: ["eks:Describe*", "eks:List*"], clusters: [prod], namespaces: ["*"]}]
- name: team
  keys: [{accessKeyId: TEAM, secretAccessKey: secret-of-TEAM-000000}]
  permissions:
  - {actions: ["eks:Create*"], clusters: [prod], namespaces: ["*"], passRoles: ["*"], conditions: {StringEquals: {"aws:RequestTag/team": team}}}
  - {actions: ["eks:Describe*", "eks:Update*", "eks:Delete*", "eks:*Tag*", "eks:Untag*"], clusters: [prod], namespaces: ["*"], passRoles: ["*"], conditions: {StringEquals: {"aws:ResourceTag/team": team}}}
- name: tagger
  keys: [{accessKeyId: TAGGER, secretAccessKey: secret-of-TAGGER-000000}]
  permissions:
  - {actions: ["eks:*Tag*", "eks:Untag*"], clusters: [prod], namespaces: ["*"]}
  - {actions: ["eks:Delete*"], clusters: [prod], namespaces: ["*"], conditions: {StringLike: {"aws:ResourceTag/owner": "tag*"}}}
- name: nobody
  keys: [{accessKeyId: NOBODY, secretAccessKey: secret-of-NOBODY-000000}]
  permissions: []
- name: node-1
  keys: [{accessKeyId: NODE1, secretAccessKey: secret-of-NODE1-000000}]
  node: {cluster: prod, name: node-1}
- name: node-2
  keys: [{accessKeyId: NODE2, secretAccessKey: secret-of-NODE2-000000}]
  node: {cluster: prod, name: node-2}
- name: node-of-dev
  keys: [{accessKeyId: NODEDEV, secretAccessKey: secret-of-NODEDEV-000000}]
  node: {cluster: dev, name: node-1}
- name: broker
  keys: [{accessKeyId: BROKER, secretAccessKey: secret-of-BROKER-000000}]
  permissions: [{actions: ["eks-auth:*"], clusters: [prod], namespaces: [web]}]
- name: expired
  keys: [{accessKeyId: EXPIRED, secretAccessKey: secret-of-EXPIRED-000000, expires: 2020-01-01T00:00:00Z}]
  permissions: [{actions: ["*"], clusters: ["*"], namespaces: ["*"], passRoles: ["*"]}]
`

func secretOf(id string) string { return "secret-of-" + id + "-000000" }

// world is a server with everything real but STS.
type world struct {
	t     testing.TB
	url   string
	store *association.Store
	index *association.Index

	mu      sync.Mutex
	records []eksapi.Record
}

// newWorld makes a server with clusters prod and dev.
func newWorld(t testing.TB, edit func(*eksapi.Config)) *world {
	t.Helper()
	w := &world{t: t}
	client := shared.Client(t)
	prefix := shared.Prefix()
	w.store = association.NewStore(association.Config{Client: client, Prefix: prefix, Timeout: patience, MaxTxnOps: etcd.MaxTxnOps})
	w.index = association.NewIndex(association.IndexConfig{Client: client, Prefix: prefix, Progress: 20 * time.Millisecond})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.index.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	for _, name := range []string{"prod", "dev"} {
		c, err := w.store.PutCluster(t.Context(), association.Cluster{
			Name: name, Region: region, Account: account, AllowedAccounts: []string{other},
			Issuers: []string{tokens.DefaultIssuer}, Keys: json.RawMessage(signer(t, name).JWKS()), Tags: map[string]string{"stage": name},
		})
		if err != nil {
			t.Fatal(err)
		}
		w.settle(c.Revision)
	}
	path := filepath.Join(t.TempDir(), "users.yaml")
	if err := os.WriteFile(path, []byte(users), 0o600); err != nil {
		t.Fatal(err)
	}
	known, err := permission.Open(permission.Config{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	checker, err := tokencheck.New(tokencheck.Config{})
	if err != nil {
		t.Fatal(err)
	}
	standIn, err := issuer.NewStandIn(issuer.StandInConfig{})
	if err != nil {
		t.Fatal(err)
	}
	unlimited := eksapi.Rate{PerSecond: -1}
	free := strangers.Rate{PerSecond: -1}
	cfg := eksapi.Config{
		Associations: w.store, Index: w.index, Tokens: checker, Issuer: standIn, Keys: sigv4.Choose{Static: known},
		// A test that a machine delays must not fail by it.
		MaxBehind: patience, Limits: eksapi.Limits{Reads: unlimited, Writes: unlimited, Exchanges: unlimited},
		Strangers: strangers.New(strangers.Config{Failures: free, Records: free, AllRecords: free}),
		Audit: func(r eksapi.Record) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.records = append(w.records, r)
		},
	}
	if edit != nil {
		edit(&cfg)
	}
	h, err := eksapi.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(h)
	t.Cleanup(server.Close)
	w.url = server.URL
	return w
}

// settle waits until the index has a revision.
func (w *world) settle(revision int64) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), patience)
	defer cancel()
	if err := w.index.Wait(ctx, revision); err != nil {
		w.t.Fatal(err)
	}
}

// audited returns the records since the last time.
func (w *world) audited() []eksapi.Record {
	w.mu.Lock()
	defer w.mu.Unlock()
	out := w.records
	w.records = nil
	return out
}

// as is the SDK's client of a user, who does not try again.
func (w *world) as(user string) *eks.Client {
	return eks.New(eks.Options{
		BaseEndpoint: &w.url, Region: region, Retryer: aws.NopRetryer{},
		Credentials: aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
			return aws.Credentials{AccessKeyID: user, SecretAccessKey: secretOf(user)}, nil
		}),
	})
}

// create makes an association as admin, or fails the test.
func (w *world) create(ns, sa, roleARN string, edit ...func(*eks.CreatePodIdentityAssociationInput)) string {
	w.t.Helper()
	in := &eks.CreatePodIdentityAssociationInput{ClusterName: ptr("prod"), Namespace: &ns, ServiceAccount: &sa, RoleArn: &roleARN}
	for _, e := range edit {
		e(in)
	}
	out, err := w.as("ADMIN").CreatePodIdentityAssociation(w.t.Context(), in)
	if err != nil {
		w.t.Fatal(err)
	}
	return *out.Association.AssociationId
}

// wantError compares what the SDK makes of an answer.
func wantError(t testing.TB, err error, status int, code, message string) {
	t.Helper()
	var api smithy.APIError
	var response *awshttp.ResponseError
	if !errors.As(err, &api) || !errors.As(err, &response) {
		t.Fatalf("got %v, want %d %s", err, status, code)
	}
	if response.HTTPStatusCode() != status || api.ErrorCode() != code || message != "" && api.ErrorMessage() != message {
		t.Fatalf("got %d %s: %q\nwant %d %s: %q", response.HTTPStatusCode(), api.ErrorCode(), api.ErrorMessage(), status, code, message)
	}
	if response.RequestID == "" {
		t.Error("an error without a request ID")
	}
}

// raw is a request made by hand.
type raw struct {
	method, path, body string
	user               string
	service            string
	region             string
	at                 time.Time
	unsigned           bool
	secret             string
	header             http.Header
	tamper             func(*http.Request)
}

type answer struct {
	status int
	header http.Header
	body   string
}

// code is the error's name.
func (a answer) code() string { return a.header.Get("X-Amzn-Errortype") }

func (a answer) message(t testing.TB) string {
	t.Helper()
	var body struct {
		Message string `json:"message"`
	}
	if err := json.Unmarshal([]byte(a.body), &body); err != nil {
		t.Fatalf("%v: %s", err, a.body)
	}
	return body.Message
}

func (r raw) request(t testing.TB, url string) *http.Request {
	t.Helper()
	if r.method == "" {
		r.method = http.MethodPost
	}
	if r.user == "" {
		r.user = "ADMIN"
	}
	if r.service == "" {
		r.service = "eks"
		if strings.HasSuffix(r.path, "/assume-role-for-pod-identity") {
			r.service = "eks-auth"
		}
	}
	if r.region == "" {
		r.region = region
	}
	if r.secret == "" {
		r.secret = secretOf(r.user)
	}
	if r.at.IsZero() {
		r.at = time.Now()
	}
	req, err := http.NewRequestWithContext(t.Context(), r.method, url+r.path, strings.NewReader(r.body))
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range r.header {
		req.Header[k] = v
	}
	if !r.unsigned {
		credentials := aws.Credentials{AccessKeyID: r.user, SecretAccessKey: r.secret}
		if err := v4.NewSigner().SignHTTP(t.Context(), credentials, req, sum(r.body), r.service, r.region, r.at); err != nil {
			t.Fatal(err)
		}
	}
	if r.tamper != nil {
		r.tamper(req)
	}
	return req
}

func (w *world) send(r raw) answer {
	w.t.Helper()
	req := r.request(w.t, w.url)
	res, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		w.t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	a := answer{res.StatusCode, res.Header, string(body)}
	// What holds for every answer.
	if got := a.header.Get("Content-Type"); got != "application/json" {
		w.t.Errorf("%s %s: Content-Type %q", r.method, r.path, got)
	}
	if req.Method != http.MethodHead && !json.Valid(body) {
		w.t.Errorf("%s %s: not JSON: %q", r.method, r.path, body)
	}
	if len(a.header.Get("X-Amzn-Requestid")) != 36 || a.header.Get("Date") == "" {
		w.t.Errorf("%s %s: no request ID or date in %v", r.method, r.path, a.header)
	}
	if (a.status == 200) != (a.code() == "") {
		w.t.Errorf("%s %s: %d with error %q", r.method, r.path, a.status, a.code())
	}
	return a
}

// refused sends a request that must be answered with an error.
func (w *world) refused(r raw, status int, code string) string {
	w.t.Helper()
	a := w.send(r)
	if a.status != status || a.code() != code {
		w.t.Errorf("%s %s: got %d %s %s, want %d %s", r.method, r.path, a.status, a.code(), a.body, status, code)
	}
	return a.message(w.t)
}

// everything is what a cluster has, as JSON, to compare before and after.
func (w *world) everything() string {
	w.t.Helper()
	var all bytes.Buffer
	for _, cluster := range []string{"prod", "dev"} {
		c, err := w.store.Cluster(w.t.Context(), cluster)
		if err != nil {
			w.t.Fatal(err)
		}
		fmt.Fprintf(&all, "%s %d %v\n", c.Name, c.Revision, c.Tags)
		in := association.ListInput{Cluster: cluster}
		for {
			out, err := w.store.List(w.t.Context(), in)
			if err != nil {
				w.t.Fatal(err)
			}
			for _, a := range out.Associations {
				fmt.Fprintf(&all, "%+v\n", a)
			}
			if in.NextToken = out.NextToken; in.NextToken == "" {
				break
			}
		}
	}
	return all.String()
}

// unchanged fails if what f does changes anything.
func (w *world) unchanged(f func()) {
	w.t.Helper()
	before := w.everything()
	f()
	if after := w.everything(); before != after {
		w.t.Errorf("something changed:\n%s\nto\n%s", before, after)
	}
}

// brokenKeys is a source of keys that is away.
type brokenKeys struct{}

func (brokenKeys) Lookup(context.Context, string, string) (sigv4.Key, error) {
	return sigv4.Key{}, errors.New("the store of keys is away, with a secret in it")
}

func sum(body string) string {
	s := sha256.Sum256([]byte(body))
	return hex.EncodeToString(s[:])
}
