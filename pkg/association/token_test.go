// SPDX-License-Identifier: Apache-2.0

package association

import (
	"errors"
	"fmt"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

const otherParameters = "The clientRequestToken was used before with other parameters."

func TestCreateTokens(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	s := newTestStore(t, func(c *Config) { c.Now = func() time.Time { return now } })
	if _, err := s.PutCluster(t.Context(), testCluster("other")); err != nil {
		t.Fatal(err)
	}
	in := input("web", "api")
	in.ClientToken = "token"
	a := mustCreate(t, s, in)

	// Equal in meaning is equal.
	same1 := in
	same1.Tags, same1.Policy, same1.TargetRoleARN = map[string]string{}, ptr(""), ptr("")
	for i, again := range []CreateInput{in, same1} {
		if b, err := s.Create(t.Context(), again); err != nil || !same(a, b) {
			t.Errorf("replay %d: %+v, %v", i, b, err)
		}
	}
	for name, edit := range map[string]func(*CreateInput){
		"namespace":       func(in *CreateInput) { in.Namespace = "x" },
		"service account": func(in *CreateInput) { in.ServiceAccount = "x" },
		"role":            func(in *CreateInput) { in.RoleARN = role + "2" },
		"target":          func(in *CreateInput) { in.TargetRoleARN = ptr(target) },
		"session tags":    func(in *CreateInput) { in.DisableSessionTags = true },
		"policy":          func(in *CreateInput) { in.Policy, in.DisableSessionTags = ptr("{}"), true },
		"tags":            func(in *CreateInput) { in.Tags = map[string]string{"a": "b"} },
		"owner":           func(in *CreateInput) { in.OwnerARN = "x" },
	} {
		b := in
		edit(&b)
		_, err := s.Create(t.Context(), b)
		if wantError(t, err, InvalidParameter, otherParameters); t.Failed() {
			t.Fatal(name)
		}
	}
	// What a token made is judged before it is shown.
	b := in
	b.Check = func(_ Cluster, got Association) error {
		if got.ID != a.ID {
			t.Errorf("checked %+v", got)
		}
		return errDenied
	}
	if _, err := s.Create(t.Context(), b); err != errDenied {
		t.Errorf("check of a replay: %v", err)
	}
	// It is the cluster's, and the operation's.
	b = in
	b.Cluster = "other"
	mustCreate(t, s, b)
	if _, err := s.Update(t.Context(), UpdateInput{Cluster: "prod", ID: a.ID, RoleARN: ptr(role), ClientToken: "token"}); err != nil {
		t.Errorf("a create's token with an update: %v", err)
	}

	now = now.Add(24*time.Hour - time.Millisecond)
	if b, err := s.Create(t.Context(), in); err != nil || b.ID != a.ID {
		t.Errorf("replay just within a day: %+v, %v", b, err)
	}
	now = now.Add(time.Millisecond)
	_, err := s.Create(t.Context(), in)
	wantError(t, err, InUse, "Association already exists: "+a.ID)
	b = in
	b.ServiceAccount = "new"
	if c := mustCreate(t, s, b); c.ID == a.ID {
		t.Error("a token that has ended was replayed")
	}
	if c, err := s.Create(t.Context(), b); err != nil || c.ServiceAccount != "new" {
		t.Errorf("the second life of a token: %+v, %v", c, err)
	}
}

// With its association a token ends: the same call makes a new one.
func TestTokenEndsWithItsAssociation(t *testing.T) {
	s := newTestStore(t, nil)
	in := input("web", "api")
	in.ClientToken = "token"
	a := mustCreate(t, s, in)
	if _, err := s.Delete(t.Context(), DeleteInput{Cluster: "prod", ID: a.ID}); err != nil {
		t.Fatal(err)
	}
	b := mustCreate(t, s, in)
	if b.ID == a.ID {
		t.Error("the deleted one came back")
	}
	if c, err := s.Create(t.Context(), in); err != nil || c.ID != b.ID {
		t.Errorf("%+v, %v", c, err)
	}
	// And with its cluster.
	if err := s.DeleteCluster(t.Context(), "prod", true); err != nil {
		t.Fatal(err)
	}
	if _, err := s.PutCluster(t.Context(), testCluster("prod")); err != nil {
		t.Fatal(err)
	}
	in.RoleARN = role + "2"
	if c := mustCreate(t, s, in); c.RoleARN != role+"2" {
		t.Errorf("%+v", c)
	}
}

func TestUpdateTokens(t *testing.T) {
	s := newTestStore(t, nil)
	a, b := mustCreate(t, s, input("web", "a")), mustCreate(t, s, input("web", "b"))
	up := func(id, token, role string) (Association, error) {
		return s.Update(t.Context(), UpdateInput{Cluster: "prod", ID: id, RoleARN: ptr(role), ClientToken: token})
	}
	if _, err := up(a.ID, "one", role+"1"); err != nil {
		t.Fatal(err)
	}
	if _, err := up(a.ID, "two", role+"2"); err != nil {
		t.Fatal(err)
	}
	// A late retry of the first does not undo the second.
	if got, err := up(a.ID, "one", role+"1"); err != nil || got.RoleARN != role+"2" {
		t.Errorf("late retry: %+v, %v", got, err)
	}
	_, err := up(a.ID, "one", role+"3")
	wantError(t, err, InvalidParameter, otherParameters)
	_, err = up(b.ID, "one", role+"1")
	wantError(t, err, InvalidParameter, otherParameters)
	if _, err := s.Delete(t.Context(), DeleteInput{Cluster: "prod", ID: a.ID}); err != nil {
		t.Fatal(err)
	}
	_, err = up(a.ID, "one", role+"1")
	wantError(t, err, NotFound, "")
	if _, err := up(b.ID, "one", role+"1"); err != nil {
		t.Errorf("a token whose association is gone: %v", err)
	}
}

// The lease behind the tokens may go, after a restore or by somebody's hand; that
// ends the tokens, and no call.
func TestLostLease(t *testing.T) {
	s := newTestStore(t, nil)
	in := input("web", "api")
	in.ClientToken = "token"
	a := mustCreate(t, s, in)
	tokens := func() int64 {
		r, err := s.kv.Get(t.Context(), s.keys.tokens("prod"), clientv3.WithPrefix(), clientv3.WithCountOnly())
		if err != nil {
			t.Fatal(err)
		}
		return r.Count
	}
	if tokens() != 1 {
		t.Fatalf("%d tokens", tokens())
	}
	if _, err := s.leases.lease.Revoke(t.Context(), s.leases.id); err != nil {
		t.Fatal(err)
	}
	if tokens() != 0 {
		t.Errorf("%d tokens without their lease", tokens())
	}
	_, err := s.Create(t.Context(), in)
	wantError(t, err, InUse, "Association already exists: "+a.ID)
	in.ServiceAccount = "next"
	mustCreate(t, s, in)
	if tokens() != 1 {
		t.Errorf("%d tokens", tokens())
	}
}

func TestLeasesAreShared(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	s := newTestStore(t, func(c *Config) { c.Now = func() time.Time { return now } })
	seen := map[clientv3.LeaseID]int{}
	for i := range leaseUses + 10 {
		id, err := s.leases.get(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if seen[id]++; seen[id] > leaseUses {
			t.Fatalf("lease used %d times at %d", seen[id], i)
		}
	}
	if len(seen) != 2 {
		t.Errorf("%d leases", len(seen))
	}
	now = now.Add(leaseAge)
	id, err := s.leases.get(t.Context())
	if err != nil || seen[id] != 0 {
		t.Errorf("an old lease was used again: %v", err)
	}
	ttl, err := s.leases.lease.TimeToLive(t.Context(), id)
	if err != nil || ttl.GrantedTTL < int64((DefaultTokenLife+leaseAge)/time.Second) {
		t.Errorf("lease %+v, %v: it would end before the last token under it", ttl, err)
	}
}

func TestPages(t *testing.T) {
	s := newTestStore(t, nil)
	var in []CreateInput
	for i := range 250 {
		in = append(in, input(fmt.Sprint("ns-", i%3), fmt.Sprint("sa-", i%50, "-", i/3%2)))
		in[i].ServiceAccount = fmt.Sprint("sa-", i/3%10)
		in[i].Namespace = fmt.Sprintf("ns-%d-%d", i%3, i/30)
	}
	if _, err := s.CreateMany(t.Context(), "prod", in); err != nil {
		t.Fatal(err)
	}
	for _, size := range []*int{nil, ptr(1), ptr(7), ptr(100)} {
		got := all(t, s, ListInput{Cluster: "prod", MaxResults: size})
		if len(got) != 250 {
			t.Fatalf("%d associations", len(got))
		}
		for i := 1; i < len(got); i++ {
			if got[i-1].ID >= got[i].ID {
				t.Fatalf("out of order: %s, %s", got[i-1].ID, got[i].ID)
			}
		}
	}
	page, err := s.List(t.Context(), ListInput{Cluster: "prod"})
	if err != nil || len(page.Associations) != 100 || page.NextToken == "" {
		t.Errorf("first page: %d, %q, %v", len(page.Associations), page.NextToken, err)
	}
	// A page that ends with the list has no token.
	if got, err := s.List(t.Context(), ListInput{Cluster: "prod", Namespace: "ns-0-0", MaxResults: ptr(10)}); err != nil || len(got.Associations) != 10 || got.NextToken != "" {
		t.Errorf("filtered: %d, %q, %v", len(got.Associations), got.NextToken, err)
	}
	if got := all(t, s, ListInput{Cluster: "prod", ServiceAccount: "sa-3", MaxResults: ptr(4)}); len(got) != 25 {
		t.Errorf("by service account: %d", len(got))
	}
	if got := all(t, s, ListInput{Cluster: "prod", Namespace: "ns-1-2", ServiceAccount: "sa-3"}); len(got) != 1 {
		t.Errorf("by both: %d", len(got))
	}
	if got := all(t, s, ListInput{Cluster: "prod", Namespace: "ns-1"}); len(got) != 0 {
		t.Errorf("a filter is not a prefix: %d", len(got))
	}
	keep := func(a Association) bool { return a.Namespace == "ns-2-1" }
	if got, err := s.List(t.Context(), ListInput{Cluster: "prod", Keep: keep, MaxResults: ptr(10)}); err != nil || len(got.Associations) != 10 || got.NextToken != "" {
		t.Errorf("kept: %d, %q, %v", len(got.Associations), got.NextToken, err)
	}
	for _, n := range []int{0, -1, 101} {
		_, err := s.List(t.Context(), ListInput{Cluster: "prod", MaxResults: &n})
		wantError(t, err, InvalidParameter, "The parameter maxResults should be between 1 and 100.")
	}
	_, err = s.List(t.Context(), ListInput{Cluster: "nope"})
	wantError(t, err, ClusterNotFound, "No cluster found for name: nope.")
	if _, err := s.PutCluster(t.Context(), testCluster("empty")); err != nil {
		t.Fatal(err)
	}
	got, err := s.List(t.Context(), ListInput{Cluster: "empty"})
	if err != nil || got.Associations == nil || len(got.Associations) != 0 || got.NextToken != "" {
		t.Errorf("empty list: %+v, %v", got, err)
	}
}

// One cluster's name may begin with another's.
func TestClustersDoNotMix(t *testing.T) {
	s := newTestStore(t, nil)
	for _, c := range []string{"prod-2", "prod_", "prod0"} {
		if _, err := s.PutCluster(t.Context(), testCluster(c)); err != nil {
			t.Fatal(err)
		}
		in := input("web", "api")
		in.Cluster = c
		mustCreate(t, s, in)
	}
	if got := all(t, s, ListInput{Cluster: "prod"}); len(got) != 0 {
		t.Errorf("%+v", got)
	}
	if err := s.DeleteCluster(t.Context(), "prod", true); err != nil {
		t.Fatal(err)
	}
	if got := consistent(t, s); len(got) != 3 {
		t.Errorf("%d left", len(got))
	}
}

func TestPageTokens(t *testing.T) {
	s := newTestStore(t, nil)
	if _, err := s.PutCluster(t.Context(), testCluster("other")); err != nil {
		t.Fatal(err)
	}
	for i := range 5 {
		mustCreate(t, s, input("web", fmt.Sprint("sa-", i)))
	}
	base := ListInput{Cluster: "prod", Namespace: "web", MaxResults: ptr(2)}
	p, err := s.List(t.Context(), base)
	if err != nil || p.NextToken == "" {
		t.Fatal(err)
	}
	const message = "The parameter nextToken is not valid for this list."
	refuse := func(name string, in ListInput) {
		t.Helper()
		if _, err := s.List(t.Context(), in); !errors.Is(err, ErrInvalidParameter) || err.Error() != message {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, edit := range map[string]func(*ListInput){
		"other cluster":    func(in *ListInput) { in.Cluster = "other" },
		"no filter":        func(in *ListInput) { in.Namespace = "" },
		"other filter":     func(in *ListInput) { in.Namespace = "x" },
		"one filter more":  func(in *ListInput) { in.ServiceAccount = "sa-1" },
		"filters swapped":  func(in *ListInput) { in.Namespace, in.ServiceAccount = "", "web" },
		"cut":              func(in *ListInput) { in.NextToken = in.NextToken[:20] },
		"longer":           func(in *ListInput) { in.NextToken += "A" },
		"an ID":            func(in *ListInput) { in.NextToken = p.Associations[0].ID },
		"not base64":       func(in *ListInput) { in.NextToken = "%%%" },
		"line break in it": func(in *ListInput) { in.NextToken = in.NextToken[:8] + "\n" + in.NextToken[8:] },
		"padded":           func(in *ListInput) { in.NextToken += "=" },
	} {
		in := base
		in.NextToken = p.NextToken
		edit(&in)
		refuse(name, in)
	}
	for i := range p.NextToken {
		in := base
		in.NextToken = p.NextToken[:i] + flip(p.NextToken[i]) + p.NextToken[i+1:]
		refuse(fmt.Sprintf("character %d changed", i), in)
	}
	// How many are wanted is not part of it.
	base.NextToken, base.MaxResults = p.NextToken, nil
	if got, err := s.List(t.Context(), base); err != nil || len(got.Associations) != 3 || got.NextToken != "" {
		t.Errorf("%+v, %v", got, err)
	}
}

// Whatever is deleted and made between two pages: what is there all the time
// comes exactly once.
func TestPagesUnderDeletion(t *testing.T) {
	s := newTestStore(t, func(c *Config) { c.Limit = 200 })
	stays, goes := map[string]int{}, []Association{}
	for i := range 150 {
		a := mustCreate(t, s, input("web", fmt.Sprint("sa-", i)))
		if i%2 == 0 {
			stays[a.ID] = 0
		} else {
			goes = append(goes, a)
		}
	}
	in := ListInput{Cluster: "prod", MaxResults: ptr(10)}
	for page := 0; ; page++ {
		p, err := s.List(t.Context(), in)
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range p.Associations {
			if _, ok := stays[a.ID]; ok {
				stays[a.ID]++
			}
		}
		if p.NextToken == "" {
			break
		}
		in.NextToken = p.NextToken
		// Also the one that the token names, and another in its slot.
		last := p.Associations[len(p.Associations)-1]
		if _, ok := stays[last.ID]; ok {
			delete(stays, last.ID)
			if _, err := s.Delete(t.Context(), DeleteInput{Cluster: "prod", ID: last.ID}); err != nil {
				t.Fatal(err)
			}
		}
		for range min(5, len(goes)) {
			_, err := s.Delete(t.Context(), DeleteInput{Cluster: "prod", ID: goes[0].ID})
			if err != nil && !errors.Is(err, ErrNotFound) {
				t.Fatal(err)
			}
			goes = goes[1:]
			mustCreate(t, s, input("new", fmt.Sprintf("sa-%d-%d", page, len(goes))))
		}
	}
	for id, n := range stays {
		if n != 1 {
			t.Errorf("%s came %d times", id, n)
		}
	}
	consistent(t, s)
}
