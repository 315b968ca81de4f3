// SPDX-License-Identifier: Apache-2.0

package association

import (
	"bytes"
	"context"
	"errors"
	"path/filepath"
	"testing"

	"github.com/latchkey-dev/latchkey/pkg/etcd"
)

// What a restart, and a snapshot that is restored elsewhere, leave as it was:
// clusters, associations, tags, and what client tokens were used for.
func TestRestartAndRestore(t *testing.T) {
	dir := t.TempDir()
	open := func(dir string) (*etcd.Server, *Store) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		srv, err := etcd.Start(ctx, etcd.Config{Dir: dir})
		if err != nil {
			t.Fatal(err)
		}
		return srv, NewStore(Config{Client: srv.Client(), Timeout: patience})
	}
	shut := func(srv *etcd.Server) {
		t.Helper()
		if err := srv.Close(); err != nil {
			t.Fatal(err)
		}
	}

	srv, s := open(filepath.Join(dir, "one"))
	if _, err := s.PutCluster(t.Context(), testCluster("prod")); err != nil {
		t.Fatal(err)
	}
	in := input("web", "api")
	in.ClientToken, in.Tags = "create", map[string]string{"a": "b"}
	a := mustCreate(t, s, in)
	up := UpdateInput{Cluster: "prod", ID: a.ID, RoleARN: ptr(role + "2"), ClientToken: "update"}
	a, err := s.Update(t.Context(), up)
	if err != nil {
		t.Fatal(err)
	}
	check := func(s *Store) {
		t.Helper()
		if got, err := s.Create(t.Context(), in); err != nil || !same(got, a) {
			t.Errorf("replay of create: %+v, %v", got, err)
		}
		if got, err := s.Update(t.Context(), up); err != nil || !same(got, a) {
			t.Errorf("replay of update: %+v, %v", got, err)
		}
		changed := in
		changed.ServiceAccount = "other"
		_, err := s.Create(t.Context(), changed)
		wantError(t, err, InvalidParameter, otherParameters)
		if got := consistent(t, s); len(got) != 1 {
			t.Errorf("%d associations", len(got))
		}
	}
	check(s)
	shut(srv)

	srv, s = open(filepath.Join(dir, "one"))
	check(s)
	var snapshot bytes.Buffer
	if _, err := srv.Save(t.Context(), &snapshot); err != nil {
		t.Fatal(err)
	}
	// This is later than the snapshot, and the restore undoes it.
	later := mustCreate(t, s, input("web", "later"))
	x := startIndex(t, s, nil)
	wait(t, x, later.Revision)
	shut(srv)

	if _, err := etcd.Restore(&snapshot, filepath.Join(dir, "two"), nil); err != nil {
		t.Fatal(err)
	}
	srv, s = open(filepath.Join(dir, "two"))
	defer shut(srv)
	check(s)
	if _, err := s.Describe(t.Context(), "prod", later.ID); !errors.Is(err, ErrNotFound) {
		t.Errorf("%v", err)
	}
	next := input("web", "next")
	next.ClientToken = "next"
	if b := mustCreate(t, s, next); b.Revision <= later.Revision {
		t.Errorf("revision %d after %d: changes would be taken for old ones", b.Revision, later.Revision)
	}
}
