// SPDX-License-Identifier: Apache-2.0

package association

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/latchkey-dev/latchkey/pkg/etcd"
	"github.com/latchkey-dev/latchkey/test/realetcd"
)

// One etcd serves all tests of the package, each below its own prefix.
var shared realetcd.Shared

func TestMain(m *testing.M) {
	if dir := os.Getenv(crashDirEnv); dir != "" {
		crashChild(dir)
		return
	}
	os.Exit(shared.Run(m))
}

// patience is far more than anything takes on a loaded machine.
const patience = 2 * time.Minute

// testConfig is that of a store of one test's own.
func testConfig(t testing.TB) Config {
	t.Helper()
	return Config{
		Client: shared.Client(t), Prefix: shared.Prefix(), Timeout: patience, MaxTxnOps: etcd.MaxTxnOps,
	}
}

const (
	account = "111122223333"
	other   = "444455556666"
	role    = "arn:aws:iam::" + account + ":role/app"
	target  = "arn:aws:iam::" + other + ":role/target"
)

func testCluster(name string) Cluster {
	return Cluster{Name: name, Region: "us-west-2", Account: account, AllowedAccounts: []string{other}}
}

// newTestStore makes a store with a cluster "prod".
func newTestStore(t testing.TB, edit func(*Config)) *Store {
	t.Helper()
	cfg := testConfig(t)
	if edit != nil {
		edit(&cfg)
	}
	s := NewStore(cfg)
	if _, err := s.PutCluster(t.Context(), testCluster("prod")); err != nil {
		t.Fatal(err)
	}
	return s
}

func input(ns, sa string) CreateInput {
	return CreateInput{Cluster: "prod", Namespace: ns, ServiceAccount: sa, RoleARN: role}
}

func mustCreate(t testing.TB, s *Store, in CreateInput) Association {
	t.Helper()
	a, err := s.Create(t.Context(), in)
	if err != nil {
		t.Fatalf("create %s/%s: %v", in.Namespace, in.ServiceAccount, err)
	}
	return a
}

func ptr[T any](v T) *T { return &v }

// wantError compares kind and message.
func wantError(t testing.TB, err error, kind Kind, message string) {
	t.Helper()
	var e *Error
	if !errors.As(err, &e) {
		t.Fatalf("error %v (%T), want %v: %s", err, err, kind, message)
	}
	if e.Kind != kind || !errors.Is(err, kind.sentinel()) || message != "" && e.Message != message {
		t.Fatalf("error of kind %q: %q; want %q: %q", e.Kind, e.Message, kind, message)
	}
}

// all lists a whole cluster, page by page.
func all(t testing.TB, s *Store, in ListInput) []Association {
	t.Helper()
	var out []Association
	for {
		p, err := s.List(t.Context(), in)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, p.Associations...)
		if p.NextToken == "" {
			return out
		}
		in.NextToken = p.NextToken
	}
}

// consistent compares what is stored under one prefix, record by record: every
// association has its service account's entry, and the other way round.
func consistent(t testing.TB, s *Store) map[subject]Association {
	t.Helper()
	r, err := s.kv.Get(t.Context(), s.keys.prefix, clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	clusters, subjects, out := map[string]bool{}, map[string]string{}, map[subject]Association{}
	var found []Association
	for _, kv := range r.Kvs {
		rest := strings.TrimPrefix(string(kv.Key), s.keys.prefix)
		switch kind, rest, _ := strings.Cut(rest, "/"); kind {
		case "c":
			clusters[rest] = true
		case "s":
			subjects[rest] = string(kv.Value)
		case "a":
			a, err := decode(kv.Key, kv.Value, kv.ModRevision)
			if err != nil {
				t.Error(err)
				continue
			}
			found = append(found, a)
		case "t":
		default:
			t.Errorf("unknown key %s", kv.Key)
		}
	}
	for _, a := range found {
		at := subject{a.Cluster + "/" + a.Namespace, a.ServiceAccount}
		if b, ok := out[at]; ok {
			t.Errorf("%v has two associations, %s and %s", at, a.ID, b.ID)
		}
		out[at] = a
		if !clusters[a.Cluster] {
			t.Errorf("%s is of cluster %s, which is not there", a.ID, a.Cluster)
		}
		if got := subjects[at.namespace+"/"+at.serviceAccount]; got != a.ID {
			t.Errorf("%v is entered as %q, and has %s", at, got, a.ID)
		}
	}
	if len(subjects) != len(out) {
		t.Errorf("%d service accounts for %d associations", len(subjects), len(out))
	}
	return out
}

// startIndex runs an index over a store until the test ends.
func startIndex(t testing.TB, s *Store, edit func(*IndexConfig)) *Index {
	t.Helper()
	cfg := IndexConfig{Client: s.cfg.Client, Prefix: s.cfg.Prefix, Progress: 20 * time.Millisecond}
	if edit != nil {
		edit(&cfg)
	}
	x := NewIndex(cfg)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- x.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run ended with %v", err)
		}
	})
	return x
}

func wait(t testing.TB, x *Index, revision int64) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := x.Wait(ctx, revision); err != nil {
		t.Fatalf("index at %d, want %d: %v", x.Revision(), revision, err)
	}
}

// sameAsStore compares an index with what is stored.
func sameAsStore(t testing.TB, x *Index, s *Store) {
	t.Helper()
	stored := consistent(t, s)
	n, _ := x.Len()
	if n != len(stored) {
		t.Errorf("the index has %d associations, the store %d", n, len(stored))
	}
	for _, a := range stored {
		got, ok := x.Lookup(a.Cluster, a.Namespace, a.ServiceAccount)
		a.Tags = nil
		if !ok || !same(got, a) {
			t.Errorf("index: %+v, store: %+v", got, a)
		}
	}
}

func same(a, b Association) bool {
	at, bt := a.Tags, b.Tags
	a.Tags, b.Tags = nil, nil
	if len(at) != len(bt) {
		return false
	}
	for k, v := range at {
		if w, ok := bt[k]; !ok || v != w {
			return false
		}
	}
	return a.ID == b.ID && a.ARN == b.ARN && a.Cluster == b.Cluster && a.Namespace == b.Namespace && a.ServiceAccount == b.ServiceAccount &&
		a.RoleARN == b.RoleARN && a.TargetRoleARN == b.TargetRoleARN && a.ExternalID == b.ExternalID && a.Policy == b.Policy &&
		a.OwnerARN == b.OwnerARN && a.DisableSessionTags == b.DisableSessionTags &&
		a.CreatedAt.Equal(b.CreatedAt) && a.ModifiedAt.Equal(b.ModifiedAt) && a.Revision == b.Revision
}

func keyValue(key, value string) *mvccpb.KeyValue {
	return &mvccpb.KeyValue{Key: []byte(key), Value: []byte(value), ModRevision: 1, CreateRevision: 1}
}
