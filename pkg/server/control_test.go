// SPDX-License-Identifier: Apache-2.0

package server

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/association"
	"github.com/latchkey-dev/latchkey/pkg/eksapi"
	"github.com/latchkey-dev/latchkey/pkg/etcd"
)

// newControl is a control on a store of its own.
func newControl(t *testing.T) (*control, *[]changeRecord) {
	t.Helper()
	e, err := etcd.Start(t.Context(), etcd.Config{Dir: t.TempDir() + "/etcd"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close() })
	var records []changeRecord
	return &control{
		store: association.NewStore(association.Config{Client: e.Client()}), now: time.Now,
		changed: func(r changeRecord) { records = append(records, r) },
	}, &records
}

func spec(t *testing.T, name string) ClusterSpec {
	return ClusterSpec{Name: name, Region: "us-west-2", Account: "111122223333", Issuers: []string{"https://issuer"}, Keys: signer(t, "ES256").JWKS()}
}

func TestControlClusters(t *testing.T) {
	c, records := newControl(t)
	ctx := t.Context()
	one := spec(t, "prod")
	put, err := c.putCluster(ctx, "me", one, false)
	if err != nil || put.ARN != "arn:aws:eks:us-west-2:111122223333:cluster/prod" || len(put.PinnedKeys) != 1 {
		t.Fatalf("%+v, %v", put, err)
	}
	if _, err := c.putCluster(ctx, "me", one, false); !errors.Is(err, association.ErrInUse) {
		t.Errorf("added twice: %v", err)
	}
	// The configuration file's cluster, as it is: nothing to do, nothing to tell.
	if _, err := one.Resolve(); err != nil {
		t.Fatal(err)
	}
	n := len(*records)
	if err := c.configured(ctx, []ClusterSpec{one}); err != nil || len(*records) != n {
		t.Errorf("put again without a difference: %v, %d records", err, len(*records)-n)
	}
	one.AllowedRoles = []string{"arn:aws:iam::111122223333:role/web/*"}
	if err := c.configured(ctx, []ClusterSpec{one}); err != nil || len(*records) != n+1 {
		t.Errorf("a difference: %v, %d records", err, len(*records)-n)
	}
	last := (*records)[n]
	before, ok := last.Previous.(ClusterSpec)
	if !ok || len(before.AllowedRoles) != 0 || before.Keys != nil || last.Caller != "configuration file" || last.Outcome != eksapi.OutcomeDone {
		t.Errorf("record %+v", last)
	}
	if _, err := c.create(ctx, "me", AssociationSpec{Cluster: "prod", Namespace: "n", ServiceAccount: "s", RoleARN: "arn:aws:iam::111122223333:role/other"}); err == nil {
		t.Error("a role that the cluster may not use")
	}
	if got := (*records)[n+1]; got.Outcome != eksapi.OutcomeRefused || got.Error == "" {
		t.Errorf("a refusal's record: %+v", got)
	}
}

func TestControlImport(t *testing.T) {
	c, _ := newControl(t)
	ctx := t.Context()
	if _, err := c.putCluster(ctx, "me", spec(t, "prod"), false); err != nil {
		t.Fatal(err)
	}
	const role = "arn:aws:iam::111122223333:role/"
	file := AssociationFile{Cluster: "prod", Associations: []AssociationSpec{
		{Namespace: "a", ServiceAccount: "one", RoleARN: role + "r", Tags: map[string]string{"k": "v"}},
		{Namespace: "a", ServiceAccount: "two", RoleARN: role + "r", TargetRoleARN: role + "t"},
		{Namespace: "a", ServiceAccount: "bad", RoleARN: "nonsense"},
	}}
	var reached int64
	c.seen = func(_ context.Context, revision int64) { reached = revision }
	p, err := c.importFile(ctx, "me", file, true, false)
	if err != nil || p.Failed() != 1 {
		t.Fatalf("%+v, %v", p, err)
	}
	all, err := c.list(ctx, "prod", "", "")
	if err != nil || len(all) != 2 {
		t.Fatalf("%+v, %v", all, err)
	}
	if newest := slices.MaxFunc(all, func(a, b association.Association) int { return int(a.Revision - b.Revision) }); reached != newest.Revision {
		t.Errorf("waited for revision %d, the newest is %d", reached, newest.Revision)
	}
	// Everything changes: fields, a cleared target, tags that come and go.
	file.Associations = []AssociationSpec{
		{Namespace: "a", ServiceAccount: "one", RoleARN: role + "s", Tags: map[string]string{"l": "w"}},
		{Namespace: "a", ServiceAccount: "two", RoleARN: role + "r", DisableSessionTags: true, Policy: `{"Version":"2012-10-17"}`},
	}
	if p, err = c.importFile(ctx, "me", file, true, false); err != nil || p.Failed() != 0 {
		t.Fatalf("%+v, %v", p, err)
	}
	if p, err = c.importFile(ctx, "me", file, true, true); err != nil || len(p.Changes) != 0 || p.Unchanged != 2 {
		t.Errorf("the second time: %+v, %v", p, err)
	}
	// A policy may be written as YAML, and is as good as its text.
	const text = `{"Statement":[{"Action":"s3:*","Effect":"Allow"}],"Version":"2012-10-17"}`
	var read []AssociationFile
	for _, policy := range []string{"{Version: 2012-10-17, Statement: [{Effect: Allow, Action: 's3:*'}]}", "'" + text + "'"} {
		if read, err = ParseAssociations([]byte("clusterName: prod\nassociations:\n- {namespace: a, serviceAccount: two, roleArn: \"" + role + "r\", disableSessionTags: true, policy: " + policy + "}\n")); err != nil {
			t.Fatal(err)
		}
		if p, err = c.importFile(ctx, "me", read[0], false, false); err != nil || p.Failed() != 0 {
			t.Errorf("%s: %+v, %v", policy, p, err)
		}
		if a, err := c.find(ctx, "prod", "a", "two", ""); err != nil || a.Policy != text {
			t.Errorf("%s: %+v, %v", policy, a, err)
		}
	}
	if len(p.Changes) != 0 {
		t.Errorf("the text of the same policy: %+v", p.Changes)
	}
	if _, err := ParseAssociations([]byte("clusterName: prod\nassociations:\n- {namespace: a, serviceAccount: b, roleArn: r, policy: [1]}\n")); !errors.Is(err, ErrConfig) {
		t.Errorf("a list for a policy: %v", err)
	}
	// A step is done as a whole or not at all.
	file.Associations[0].RoleARN, file.Associations[0].Tags = role+"u", map[string]string{"aws:l": "w"}
	if p, err = c.importFile(ctx, "me", file, true, false); err != nil || p.Failed() != 1 {
		t.Errorf("a tag that cannot be: %+v, %v", p, err)
	}
	if a, err := c.find(ctx, "prod", "a", "one", ""); err != nil || a.RoleARN != role+"s" || a.Tags["l"] != "w" {
		t.Errorf("half a step was done: %+v, %v", a, err)
	}
	if _, err := c.importFile(ctx, "me", AssociationFile{Cluster: "nowhere"}, true, false); !errors.Is(err, association.ErrClusterNotFound) {
		t.Errorf("an unknown cluster: %v", err)
	}
	if _, err := c.find(ctx, "prod", "a", "nobody", ""); !errors.Is(err, association.ErrNotFound) || !strings.Contains(err.Error(), "a/nobody") {
		t.Errorf("%v", err)
	}
}
