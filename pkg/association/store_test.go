// SPDX-License-Identifier: Apache-2.0

package association

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/latchkey-dev/latchkey/pkg/etcd"
)

func TestCreateAndDescribe(t *testing.T) {
	now := time.Date(2026, 11, 21, 18, 0, 0, 922_345_678, time.UTC)
	s := newTestStore(t, func(c *Config) { c.Now = func() time.Time { return now } })
	in := input("web", "api")
	in.Tags = map[string]string{"team": "a"}
	in.TargetRoleARN, in.DisableSessionTags = ptr(target), true
	in.Policy = ptr(`{"Version":"2012-10-17"}`)
	a := mustCreate(t, s, in)

	if !regexp.MustCompile(`^a-[a-z0-9]{17}$`).MatchString(a.ID) {
		t.Errorf("ID %q", a.ID)
	}
	want := Association{
		ID: a.ID, ARN: "arn:aws:eks:us-west-2:" + account + ":podidentityassociation/prod/" + a.ID, Cluster: "prod",
		Namespace: "web", ServiceAccount: "api", RoleARN: role, TargetRoleARN: target,
		ExternalID: "us-west-2/" + account + "/prod/web/api", Policy: *in.Policy, DisableSessionTags: true,
		Tags: in.Tags, CreatedAt: now.Truncate(time.Millisecond), ModifiedAt: now.Truncate(time.Millisecond), Revision: a.Revision,
	}
	if !same(a, want) {
		t.Errorf("created %+v\nwant    %+v", a, want)
	}
	got, err := s.Describe(t.Context(), "prod", a.ID)
	if err != nil || !same(got, want) {
		t.Errorf("described %+v, %v", got, err)
	}
	if a.Revision == 0 {
		t.Error("no revision")
	}
	plain := mustCreate(t, s, input("web", "plain"))
	if plain.Tags == nil || plain.ExternalID != "" {
		t.Errorf("a plain one: %+v", plain)
	}
	consistent(t, s)
}

func TestCreateRefuses(t *testing.T) {
	s := newTestStore(t, nil)
	limited := testCluster("limited")
	limited.AllowedRoles = []string{"arn:aws:iam::" + account + ":role/pods/*", "arn:aws:iam::" + other + ":role/shared"}
	if _, err := s.PutCluster(t.Context(), limited); err != nil {
		t.Fatal(err)
	}
	have := mustCreate(t, s, input("web", "have"))
	tags51 := map[string]string{}
	for i := range 51 {
		tags51[fmt.Sprint(i)] = "x"
	}
	const ns, sa = "The parameter namespace should be a lower case RFC 1123 label of at most 63 characters.",
		"The parameter serviceAccount should be a lower case RFC 1123 subdomain of at most 253 characters."
	for name, c := range map[string]struct {
		edit    func(*CreateInput)
		kind    Kind
		message string
	}{
		"unknown cluster":      {func(in *CreateInput) { in.Cluster = "nope" }, ClusterNotFound, "No cluster found for name: nope."},
		"cluster with a slash": {func(in *CreateInput) { in.Cluster = "prod/web" }, ClusterNotFound, "No cluster found for name: prod/web."},
		"cluster with a dot":   {func(in *CreateInput) { in.Cluster = ".." }, ClusterNotFound, "No cluster found for name: ..."},
		"no namespace":         {func(in *CreateInput) { in.Namespace = "" }, InvalidParameter, ns},
		"upper case":           {func(in *CreateInput) { in.Namespace = "Web" }, InvalidParameter, ns},
		"slash":                {func(in *CreateInput) { in.Namespace = "a/b" }, InvalidParameter, ns},
		"dot in a namespace":   {func(in *CreateInput) { in.Namespace = "a.b" }, InvalidParameter, ns},
		"64 characters":        {func(in *CreateInput) { in.Namespace = strings.Repeat("a", 64) }, InvalidParameter, ns},
		"hyphen at the end":    {func(in *CreateInput) { in.Namespace = "a-" }, InvalidParameter, ns},
		"lookalike":            {func(in *CreateInput) { in.Namespace = "wеb" }, InvalidParameter, ns}, // a Cyrillic letter
		"no service account":   {func(in *CreateInput) { in.ServiceAccount = "" }, InvalidParameter, sa},
		"two dots":             {func(in *CreateInput) { in.ServiceAccount = "a..b" }, InvalidParameter, sa},
		"dot dot":              {func(in *CreateInput) { in.ServiceAccount = ".." }, InvalidParameter, sa},
		"254 characters":       {func(in *CreateInput) { in.ServiceAccount = strings.Repeat("a", 254) }, InvalidParameter, sa},
		"newline":              {func(in *CreateInput) { in.ServiceAccount = "a\n" }, InvalidParameter, sa},
		"no role":              {func(in *CreateInput) { in.RoleARN = "" }, InvalidParameter, "Cross-account pass role is not allowed"},
		"role of another account": {func(in *CreateInput) { in.RoleARN = target }, InvalidParameter,
			"Cross-account pass role is not allowed"},
		"role of another partition": {func(in *CreateInput) { in.RoleARN = strings.Replace(role, "aws", "aws-cn", 1) }, InvalidParameter,
			"Cross-account pass role is not allowed"},
		"not a role": {func(in *CreateInput) { in.RoleARN = "arn:aws:iam::" + account + ":user/app" }, InvalidParameter,
			"The parameter roleArn is not the ARN of an IAM role."},
		"target not a role": {func(in *CreateInput) { in.TargetRoleARN = ptr("x") }, InvalidParameter,
			"The parameter targetRoleArn is not the ARN of an IAM role."},
		"target of a foreign account": {func(in *CreateInput) { in.TargetRoleARN = ptr("arn:aws:iam::999999999999:role/t") }, InvalidParameter,
			"The account of targetRoleArn is not allowed for cluster: prod."},
		"role not allowed": {func(in *CreateInput) { in.Cluster = "limited" }, InvalidParameter,
			"The role of roleArn is not allowed for cluster: limited."},
		"target not allowed": {func(in *CreateInput) {
			in.Cluster, in.RoleARN, in.TargetRoleARN = "limited", "arn:aws:iam::"+account+":role/pods/a", ptr(target)
		}, InvalidParameter, "The role of targetRoleArn is not allowed for cluster: limited."},
		"policy with session tags": {func(in *CreateInput) { in.Policy = ptr(`{}`) }, InvalidParameter,
			"The parameter policy requires disableSessionTags to be true."},
		"policy not JSON": {func(in *CreateInput) { in.Policy, in.DisableSessionTags = ptr(`{`), true }, InvalidParameter,
			"The parameter policy should be a JSON object."},
		"policy null": {func(in *CreateInput) { in.Policy, in.DisableSessionTags = ptr(`null`), true }, InvalidParameter,
			"The parameter policy should be a JSON object."},
		"policy an array": {func(in *CreateInput) { in.Policy, in.DisableSessionTags = ptr(`[]`), true }, InvalidParameter,
			"The parameter policy should be a JSON object."},
		"policy of two objects": {func(in *CreateInput) { in.Policy, in.DisableSessionTags = ptr(`{}{}`), true }, InvalidParameter,
			"The parameter policy should be a JSON object."},
		"policy too long": {func(in *CreateInput) {
			in.Policy, in.DisableSessionTags = ptr(`{"a":"`+strings.Repeat("ä", 2041)+`"}`), true
		}, InvalidParameter, "The parameter policy should be at most 2048 characters long."},
		"policy with characters STS refuses": {func(in *CreateInput) { in.Policy, in.DisableSessionTags = ptr(`{"a":"€"}`), true }, InvalidParameter,
			"The parameter policy has characters that a session policy may not have."},
		"51 tags":       {func(in *CreateInput) { in.Tags = tags51 }, InvalidParameter, "A resource can have at most 50 tags."},
		"empty tag key": {func(in *CreateInput) { in.Tags = map[string]string{"": "x"} }, InvalidParameter, "A tag key should have 1 to 128 characters."},
		"long tag key": {func(in *CreateInput) { in.Tags = map[string]string{strings.Repeat("ü", 129): "x"} }, InvalidParameter,
			"A tag key should have 1 to 128 characters."},
		"long tag value": {func(in *CreateInput) { in.Tags = map[string]string{"a": strings.Repeat("ü", 257)} }, InvalidParameter,
			"A tag value can have at most 256 characters."},
		"aws: key":        {func(in *CreateInput) { in.Tags = map[string]string{"aWs:x": "x"} }, InvalidParameter, "Tag keys cannot begin with aws:."},
		"aws: value":      {func(in *CreateInput) { in.Tags = map[string]string{"x": "AWS:"} }, InvalidParameter, "Tag values cannot begin with aws:."},
		"aws: long s":     {func(in *CreateInput) { in.Tags = map[string]string{"awſ:x": "x"} }, InvalidParameter, "Tag keys cannot begin with aws:."},
		"tag not UTF-8":   {func(in *CreateInput) { in.Tags = map[string]string{"a\xff": "x"} }, InvalidParameter, "A tag key is not valid UTF-8."},
		"value not UTF-8": {func(in *CreateInput) { in.Tags = map[string]string{"a": "\xff"} }, InvalidParameter, "A tag value is not valid UTF-8."},
		"duplicate":       {func(in *CreateInput) { in.ServiceAccount = "have" }, InUse, "Association already exists: " + have.ID},
	} {
		t.Run(name, func(t *testing.T) {
			in := input("web", "new")
			c.edit(&in)
			_, err := s.Create(t.Context(), in)
			wantError(t, err, c.kind, c.message)
			var e *Error
			if errors.As(err, &e); e.Cluster != in.Cluster {
				t.Errorf("cluster %q in the error, want %q", e.Cluster, in.Cluster)
			}
		})
	}
	if got := consistent(t, s); len(got) != 1 {
		t.Errorf("%d associations after nothing but refusals", len(got))
	}
}

func TestCreateAccepts(t *testing.T) {
	s := newTestStore(t, nil)
	limited := testCluster("limited")
	limited.AllowedRoles = []string{"arn:aws:iam::" + account + ":role/pods/*", "arn:aws:iam::" + other + ":role/shared"}
	if _, err := s.PutCluster(t.Context(), limited); err != nil {
		t.Fatal(err)
	}
	tags50 := map[string]string{}
	for i := range 50 {
		tags50[fmt.Sprint(i)] = ""
	}
	for name, edit := range map[string]func(*CreateInput){
		"role with a path": func(in *CreateInput) { in.RoleARN = "arn:aws:iam::" + account + ":role/a/b.c/d@e" },
		"names with dots":  func(in *CreateInput) { in.ServiceAccount = "a.b-c.0" },
		"63 characters":    func(in *CreateInput) { in.Namespace = strings.Repeat("a", 63) },
		"253 characters":   func(in *CreateInput) { in.ServiceAccount = strings.Repeat("a", 253) },
		"empty strings":    func(in *CreateInput) { in.Policy, in.TargetRoleARN, in.Tags = ptr(""), ptr(""), map[string]string{} },
		"50 tags":          func(in *CreateInput) { in.Tags = tags50 },
		"tags counted in characters": func(in *CreateInput) {
			in.Tags = map[string]string{strings.Repeat("😀", 128): strings.Repeat("ü", 256)}
		},
		"aws without a colon":        func(in *CreateInput) { in.Tags = map[string]string{"aws": "aws", "awsx:": "aw:s"} },
		"target of the same account": func(in *CreateInput) { in.TargetRoleARN = ptr(role + "2") },
		"policy of 2048 characters": func(in *CreateInput) {
			in.Policy, in.DisableSessionTags = ptr(`{"a":"`+strings.Repeat("ä", 2040)+`"}`), true
		},
		"role and target as allowed": func(in *CreateInput) {
			in.Cluster, in.RoleARN, in.TargetRoleARN = "limited", "arn:aws:iam::"+account+":role/pods/x/y", ptr("arn:aws:iam::"+other+":role/shared")
		},
		"long client token":           func(in *CreateInput) { in.ClientToken = strings.Repeat("x", 5000) },
		"token of strange characters": func(in *CreateInput) { in.ClientToken = "/../\x00\xff" },
	} {
		t.Run(name, func(t *testing.T) {
			in := input("ok", strings.ToLower(strings.ReplaceAll(name, " ", "-")))
			edit(&in)
			mustCreate(t, s, in)
		})
	}
	consistent(t, s)
}

func TestAssociationIDs(t *testing.T) {
	s := newTestStore(t, nil)
	a := mustCreate(t, s, input("web", "api"))
	const length = "The parameter associationId should be 19 characters long."
	unknown := func(id string) string { return "No pod identity association found for associationId: " + id + "." }
	for id, want := range map[string]struct {
		kind    Kind
		message string
	}{
		"":                               {InvalidParameter, length},
		"a-short":                        {InvalidParameter, length},
		a.ID + "x":                       {InvalidParameter, length},
		"a-00000000000000000":            {NotFound, unknown("a-00000000000000000")},
		"i-00000000000000000":            {NotFound, unknown("i-00000000000000000")},
		"a-/../c/prod0000000":            {NotFound, unknown("a-/../c/prod0000000")},
		strings.ToUpper(a.ID):            {NotFound, unknown(strings.ToUpper(a.ID))},
		a.ID[:18] + flip(a.ID[18]):       {NotFound, unknown(a.ID[:18] + flip(a.ID[18]))},
		"ü-00000000000000000":            {NotFound, unknown("ü-00000000000000000")},
		"a-\x00\n00000000000000000"[:19]: {NotFound, unknown("a-??000000000000000")},
	} {
		_, err := s.Describe(t.Context(), "prod", id)
		wantError(t, err, want.kind, want.message)
		_, err = s.Update(t.Context(), UpdateInput{Cluster: "prod", ID: id, RoleARN: ptr(role)})
		wantError(t, err, want.kind, want.message)
		_, err = s.Delete(t.Context(), DeleteInput{Cluster: "prod", ID: id})
		wantError(t, err, want.kind, want.message)
	}
	// The cluster is looked for before the association.
	_, err := s.Describe(t.Context(), "nope", a.ID)
	wantError(t, err, ClusterNotFound, "No cluster found for name: nope.")
	// An ID of one cluster is nothing in another.
	if _, err := s.PutCluster(t.Context(), testCluster("other")); err != nil {
		t.Fatal(err)
	}
	_, err = s.Describe(t.Context(), "other", a.ID)
	wantError(t, err, NotFound, unknown(a.ID))
}

func flip(c byte) string {
	if c == 'a' {
		return "b"
	}
	return "a"
}

func TestUpdate(t *testing.T) {
	var clock atomic.Int64
	s := newTestStore(t, func(c *Config) {
		c.Now = func() time.Time { return time.Unix(1_700_000_000+clock.Add(1), 0) }
	})
	a := mustCreate(t, s, input("web", "api"))
	update := func(in UpdateInput) (Association, error) {
		in.Cluster, in.ID = "prod", a.ID
		return s.Update(t.Context(), in)
	}
	got, err := update(UpdateInput{TargetRoleARN: ptr(target), DisableSessionTags: ptr(true), Policy: ptr(`{}`)})
	if err != nil {
		t.Fatal(err)
	}
	if got.RoleARN != role || got.TargetRoleARN != target || got.ExternalID != "us-west-2/"+account+"/prod/web/api" || got.Policy != `{}` || !got.DisableSessionTags {
		t.Errorf("after the first update: %+v", got)
	}
	if !got.ModifiedAt.After(a.ModifiedAt) || !got.CreatedAt.Equal(a.CreatedAt) || got.Revision <= a.Revision {
		t.Errorf("times %v %v, revision %d after %+v", got.CreatedAt, got.ModifiedAt, got.Revision, a)
	}
	for name, c := range map[string]struct {
		in      UpdateInput
		message string
	}{
		"nothing":                  {UpdateInput{}, "At least one of roleArn, targetRoleArn, disableSessionTags and policy should be given."},
		"only a token":             {UpdateInput{ClientToken: "x"}, "At least one of roleArn, targetRoleArn, disableSessionTags and policy should be given."},
		"empty role":               {UpdateInput{RoleARN: ptr("")}, "Cross-account pass role is not allowed"},
		"foreign role":             {UpdateInput{RoleARN: ptr(target)}, "Cross-account pass role is not allowed"},
		"session tags with policy": {UpdateInput{DisableSessionTags: ptr(false)}, "The parameter policy requires disableSessionTags to be true."},
		"policy an array":          {UpdateInput{Policy: ptr("[]")}, "The parameter policy should be a JSON object."},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := update(c.in)
			wantError(t, err, InvalidParameter, c.message)
		})
	}
	if now, err := s.Describe(t.Context(), "prod", a.ID); err != nil || !same(now, got) {
		t.Errorf("refused updates changed it: %+v, %v", now, err)
	}
	got, err = update(UpdateInput{TargetRoleARN: ptr(""), Policy: ptr(""), DisableSessionTags: ptr(false)})
	if err != nil || got.TargetRoleARN != "" || got.ExternalID != "" || got.Policy != "" || got.DisableSessionTags {
		t.Errorf("cleared: %+v, %v", got, err)
	}
	if got, err = update(UpdateInput{RoleARN: ptr(role + "2")}); err != nil || got.RoleARN != role+"2" {
		t.Errorf("new role: %+v, %v", got, err)
	}
	// Tags come with the role, or neither does.
	before := got
	_, err = update(UpdateInput{RoleARN: ptr(role + "3"), Tags: &map[string]string{"aws:x": "y"}})
	wantError(t, err, InvalidParameter, "Tag keys cannot begin with aws:.")
	if got, err = s.Describe(t.Context(), "prod", a.ID); err != nil || !same(got, before) {
		t.Errorf("the role without the tags: %+v, %v", got, err)
	}
	if got, err = update(UpdateInput{RoleARN: ptr(role + "3"), Tags: &map[string]string{"a": "b"}}); err != nil || got.RoleARN != role+"3" ||
		!maps.Equal(got.Tags, map[string]string{"a": "b"}) || got.Revision != before.Revision+1 {
		t.Errorf("role and tags: %+v, %v", got, err)
	}
	before = got
	if got, err = update(UpdateInput{Tags: &map[string]string{}}); err != nil || len(got.Tags) != 0 || got.Tags == nil || !got.ModifiedAt.Equal(before.ModifiedAt) {
		t.Errorf("no tags: %+v, %v", got, err)
	}
}

func TestOwned(t *testing.T) {
	s := newTestStore(t, nil)
	const addon = "arn:aws:eks:us-west-2:111122223333:addon/prod/x/1"
	in := input("web", "api")
	in.OwnerARN = addon
	a := mustCreate(t, s, in)
	_, err := s.Update(t.Context(), UpdateInput{Cluster: "prod", ID: a.ID, RoleARN: ptr(role + "2")})
	wantError(t, err, InvalidRequest, "")
	_, err = s.Delete(t.Context(), DeleteInput{Cluster: "prod", ID: a.ID, OwnerARN: "another"})
	wantError(t, err, InvalidRequest, "")
	// Who may not change it is not told whose it is.
	deny := func(Association) error { return errDenied }
	if _, err := s.Update(t.Context(), UpdateInput{Cluster: "prod", ID: a.ID, RoleARN: ptr(role + "2"), Check: deny}); err != errDenied {
		t.Errorf("update: %v", err)
	}
	if _, err := s.Delete(t.Context(), DeleteInput{Cluster: "prod", ID: a.ID, Check: deny}); err != errDenied {
		t.Errorf("delete: %v", err)
	}
	if _, err := s.Update(t.Context(), UpdateInput{Cluster: "prod", ID: a.ID, RoleARN: ptr(role + "2"), OwnerARN: addon}); err != nil {
		t.Error(err)
	}
	if _, err := s.Delete(t.Context(), DeleteInput{Cluster: "prod", ID: a.ID, OwnerARN: addon}); err != nil {
		t.Error(err)
	}
}

var errDenied = errors.New("denied")

// Check judges what is there, not what the caller believes is there.
// A create is judged on the cluster that the transaction sees, before anything
// is told of what is there.
func TestCreateIsJudgedInItsTransaction(t *testing.T) {
	s := newTestStore(t, nil)
	in := input("web", "api")
	times := 0
	in.Allow = func(c Cluster) error {
		if times++; times > 1 {
			if c.Tags["team"] != "other" {
				t.Errorf("judged on tags %v", c.Tags)
			}
			return errDenied
		}
		// Given to another team between look and write.
		return s.Tag(t.Context(), c.ARN, map[string]string{"team": "other"}, nil)
	}
	if _, err := s.Create(t.Context(), in); err != errDenied || times != 2 {
		t.Errorf("%v after %d times", err, times)
	}
	if l, err := s.List(t.Context(), ListInput{Cluster: "prod"}); err != nil || len(l.Associations) != 0 {
		t.Errorf("%+v, %v", l, err)
	}
	in.Allow = nil
	mustCreate(t, s, in)
	in.Allow, in.ClientToken = func(Cluster) error { return errDenied }, "another"
	if _, err := s.Create(t.Context(), in); err != errDenied {
		t.Errorf("told that it is there: %v", err)
	}
}

func TestCheck(t *testing.T) {
	s := newTestStore(t, nil)
	a := mustCreate(t, s, input("web", "api"))
	deny := func(Association) error { return errDenied }
	if _, err := s.Update(t.Context(), UpdateInput{Cluster: "prod", ID: a.ID, RoleARN: ptr(role + "2"), Check: deny}); err != errDenied {
		t.Errorf("update: %v", err)
	}
	if _, err := s.Delete(t.Context(), DeleteInput{Cluster: "prod", ID: a.ID, Check: deny}); err != errDenied {
		t.Errorf("delete: %v", err)
	}
	if err := s.Tag(t.Context(), a.ARN, map[string]string{"a": "b"}, func(Resource) error { return errDenied }); err != errDenied {
		t.Errorf("tag: %v", err)
	}
	if got, err := s.Describe(t.Context(), "prod", a.ID); err != nil || !same(got, a) {
		t.Errorf("denied, and yet changed: %+v, %v", got, err)
	}
	// The tag that allows the change goes away between the check and the write: the
	// check is asked again.
	if err := s.Tag(t.Context(), a.ARN, map[string]string{"team": "mine"}, nil); err != nil {
		t.Fatal(err)
	}
	asked := 0
	_, err := s.Delete(t.Context(), DeleteInput{Cluster: "prod", ID: a.ID, Check: func(before Association) error {
		if asked++; asked == 1 {
			if err := s.Untag(t.Context(), a.ARN, []string{"team"}, nil); err != nil {
				t.Error(err)
			}
		}
		if before.Tags["team"] != "mine" {
			return errDenied
		}
		// What a check does to its copy is nobody's business.
		before.Tags["team"] = "x"
		return nil
	}})
	if err != errDenied || asked != 2 {
		t.Errorf("delete after %d checks: %v", asked, err)
	}
	consistent(t, s)
}

func TestDelete(t *testing.T) {
	s := newTestStore(t, nil)
	a := mustCreate(t, s, input("web", "api"))
	got, err := s.Delete(t.Context(), DeleteInput{Cluster: "prod", ID: a.ID})
	if err != nil || got.ID != a.ID || got.RoleARN != role || got.Revision <= a.Revision {
		t.Errorf("deleted %+v, %v", got, err)
	}
	_, err = s.Delete(t.Context(), DeleteInput{Cluster: "prod", ID: a.ID})
	wantError(t, err, NotFound, "")
	if b := mustCreate(t, s, input("web", "api")); b.ID == a.ID {
		t.Error("an ID came twice")
	}
	consistent(t, s)
}

// Of many creates at once for one service account, from several servers, one
// wins, and all others are told its ID.
func TestRaceOfCreates(t *testing.T) {
	cfg := testConfig(t)
	servers := make([]*Store, 4)
	for i := range servers {
		servers[i] = NewStore(cfg)
	}
	if _, err := servers[0].PutCluster(t.Context(), testCluster("prod")); err != nil {
		t.Fatal(err)
	}
	for round := range 10 {
		const callers = 64
		var wg sync.WaitGroup
		var mu sync.Mutex
		var won []string
		told := map[string]int{}
		for i := range callers {
			wg.Go(func() {
				in := input("race", fmt.Sprint("sa-", round))
				in.ClientToken = fmt.Sprint("token-", round, "-", i)
				a, err := servers[i%len(servers)].Create(t.Context(), in)
				mu.Lock()
				defer mu.Unlock()
				var e *Error
				switch {
				case err == nil:
					won = append(won, a.ID)
				case errors.As(err, &e) && e.Kind == InUse:
					told[e.ID]++
				default:
					t.Errorf("create: %v", err)
				}
			})
		}
		wg.Wait()
		if len(won) != 1 || told[won[0]] != callers-1 {
			t.Fatalf("round %d: won %v, told %v", round, won, told)
		}
	}
	if got := consistent(t, servers[0]); len(got) != 10 {
		t.Errorf("%d associations", len(got))
	}
}

// The same call many times at once, with its token, makes one association, and
// all callers get it.
func TestRaceOfRetries(t *testing.T) {
	s := newTestStore(t, nil)
	in := input("web", "api")
	in.ClientToken = "once"
	var wg sync.WaitGroup
	var mu sync.Mutex
	ids := map[string]int{}
	for range 32 {
		wg.Go(func() {
			a, err := s.Create(t.Context(), in)
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			ids[a.ID]++
		})
	}
	wg.Wait()
	if len(ids) != 1 {
		t.Errorf("associations: %v", ids)
	}
	consistent(t, s)
}

// Exactly as many as the limit allows are made, however many want to, from
// several servers, and while others are deleted.
func TestLimitUnderRace(t *testing.T) {
	const limit = 40
	cfg := testConfig(t)
	cfg.Limit = limit
	servers := []*Store{NewStore(cfg), NewStore(cfg), NewStore(cfg)}
	if _, err := servers[0].PutCluster(t.Context(), testCluster("prod")); err != nil {
		t.Fatal(err)
	}
	fill := func(round int) (made []Association) {
		var wg sync.WaitGroup
		var mu sync.Mutex
		for i := range 3 * limit {
			wg.Go(func() {
				a, err := servers[i%len(servers)].Create(t.Context(), input("web", fmt.Sprintf("sa-%d-%d", round, i)))
				if err == nil {
					mu.Lock()
					defer mu.Unlock()
					made = append(made, a)
					return
				}
				var e *Error
				if !errors.As(err, &e) || e.Kind != LimitExceeded {
					t.Errorf("create: %v", err)
				}
			})
		}
		wg.Wait()
		return made
	}
	made := fill(0)
	if len(made) != limit {
		t.Fatalf("%d were made", len(made))
	}
	_, err := servers[0].Create(t.Context(), input("web", "one-more"))
	wantError(t, err, LimitExceeded, "The cluster has reached the limit of 40 pod identity associations.")
	// What is there already is said to be there, limit or not.
	_, err = servers[0].Create(t.Context(), input("web", made[0].ServiceAccount))
	wantError(t, err, InUse, "Association already exists: "+made[0].ID)
	for _, a := range made[:7] {
		if _, err := servers[1].Delete(t.Context(), DeleteInput{Cluster: "prod", ID: a.ID}); err != nil {
			t.Fatal(err)
		}
	}
	if again := fill(1); len(again) != 7 {
		t.Errorf("%d were made after 7 deletions", len(again))
	}
	if got := consistent(t, servers[0]); len(got) != limit {
		t.Errorf("%d associations", len(got))
	}
}

// Creates that race the deletion of their cluster leave nothing behind.
func TestRaceOfClusterDeletion(t *testing.T) {
	s := newTestStore(t, nil)
	for round := range 20 {
		if _, err := s.PutCluster(t.Context(), testCluster("prod")); err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for i := range 16 {
			wg.Go(func() {
				in := input("web", fmt.Sprintf("sa-%d-%d", round, i))
				in.ClientToken = in.ServiceAccount
				if _, err := s.Create(t.Context(), in); err != nil && !errors.Is(err, ErrClusterNotFound) {
					t.Error(err)
				}
			})
		}
		var deleted bool
		wg.Go(func() {
			err := s.DeleteCluster(t.Context(), "prod", round%2 == 0)
			if deleted = err == nil; err != nil && !errors.Is(err, ErrInUse) {
				t.Error(err)
			}
		})
		wg.Wait()
		left := consistent(t, s)
		if deleted && len(left) != 0 {
			t.Errorf("%d associations of a cluster that is gone", len(left))
		}
	}
}

// A restart is a new store and a new client over the same data: see also
// TestCrash, which restarts etcd itself.
func TestSurvivesAnotherServer(t *testing.T) {
	cfg := testConfig(t)
	one := NewStore(cfg)
	if _, err := one.PutCluster(t.Context(), testCluster("prod")); err != nil {
		t.Fatal(err)
	}
	in := input("web", "api")
	in.ClientToken = "t"
	a := mustCreate(t, one, in)
	two := NewStore(cfg)
	if b, err := two.Create(t.Context(), in); err != nil || !same(a, b) {
		t.Errorf("replay at another server: %+v, %v", b, err)
	}
	if b, err := two.Describe(t.Context(), "prod", a.ID); err != nil || !same(a, b) {
		t.Errorf("%+v, %v", b, err)
	}
}

// brokenKV fails as etcd fails.
type brokenKV struct {
	clientv3.KV
	err error
	// after commits the transaction first, so that its answer is what is lost.
	after bool
}

type brokenTxn struct {
	clientv3.Txn
	kv *brokenKV
}

func (b *brokenKV) Txn(ctx context.Context) clientv3.Txn { return &brokenTxn{b.KV.Txn(ctx), b} }

func (b *brokenKV) Get(ctx context.Context, key string, opts ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	if b.err != nil && !b.after {
		return nil, b.err
	}
	return b.KV.Get(ctx, key, opts...)
}

func (b *brokenTxn) If(c ...clientv3.Cmp) clientv3.Txn  { b.Txn = b.Txn.If(c...); return b }
func (b *brokenTxn) Then(o ...clientv3.Op) clientv3.Txn { b.Txn = b.Txn.Then(o...); return b }
func (b *brokenTxn) Else(o ...clientv3.Op) clientv3.Txn { b.Txn = b.Txn.Else(o...); return b }

func (b *brokenTxn) Commit() (*clientv3.TxnResponse, error) {
	if b.kv.err != nil && !b.kv.after {
		return nil, b.kv.err
	}
	r, err := b.Txn.Commit()
	// Reads are answered; the write's answer gets lost.
	if err == nil && b.kv.err != nil && len(r.Responses) > 0 && r.Responses[0].GetResponsePut() != nil {
		return nil, b.kv.err
	}
	return r, err
}

func TestStoreOutage(t *testing.T) {
	for name, cause := range map[string]error{
		"no leader": rpctypes.ErrNoLeader, "no space": rpctypes.ErrNoSpace, "timeout": rpctypes.ErrTimeout,
		"timeout by a lost connection": rpctypes.ErrTimeoutDueToConnectionLost, "too many requests": rpctypes.ErrTooManyRequests,
		"deadline": context.DeadlineExceeded, "cancelled": context.Canceled, "stopped": rpctypes.ErrStopped,
	} {
		t.Run(name, func(t *testing.T) {
			s := newTestStore(t, nil)
			a := mustCreate(t, s, input("web", "api"))
			broken := &brokenKV{KV: s.kv, err: cause}
			s.kv = broken
			ctx := t.Context()
			_, create := s.Create(ctx, input("web", "b"))
			_, describe := s.Describe(ctx, "prod", a.ID)
			_, list := s.List(ctx, ListInput{Cluster: "prod"})
			_, update := s.Update(ctx, UpdateInput{Cluster: "prod", ID: a.ID, RoleARN: ptr(role)})
			_, del := s.Delete(ctx, DeleteInput{Cluster: "prod", ID: a.ID})
			_, tags := s.TagsOf(ctx, a.ARN)
			_, put := s.PutCluster(ctx, testCluster("x"))
			_, get := s.Cluster(ctx, "prod")
			_, clusters := s.Clusters(ctx)
			_, many := s.CreateMany(ctx, "prod", []CreateInput{input("web", "c")})
			for op, err := range map[string]error{
				"create": create, "describe": describe, "list": list, "update": update, "delete": del, "tags": tags,
				"tag": s.Tag(ctx, a.ARN, map[string]string{"a": "b"}, nil), "untag": s.Untag(ctx, a.ARN, []string{"a"}, nil),
				"put cluster": put, "cluster": get, "clusters": clusters, "delete cluster": s.DeleteCluster(ctx, "prod", true), "create many": many,
			} {
				if !errors.Is(err, ErrUnavailable) || !errors.Is(err, cause) {
					t.Errorf("%s: %v", op, err)
				}
			}
			s.kv = broken.KV
			if got := consistent(t, s); len(got) != 1 {
				t.Errorf("%d associations", len(got))
			}
		})
	}
}

// An answer that gets lost is the case that client tokens are for.
func TestLostAnswer(t *testing.T) {
	s := newTestStore(t, nil)
	broken := &brokenKV{KV: s.kv, err: rpctypes.ErrTimeout, after: true}
	s.kv = broken
	in := input("web", "api")
	in.ClientToken = "retry"
	_, err := s.Create(t.Context(), in)
	wantError(t, err, Unavailable, "")
	s.kv = broken.KV
	a, err := s.Create(t.Context(), in)
	if err != nil {
		t.Fatal(err)
	}
	if got := all(t, s, ListInput{Cluster: "prod"}); len(got) != 1 || got[0].ID != a.ID {
		t.Errorf("%+v", got)
	}
	// Without a token the retry is told what stands in its way.
	in.ClientToken = ""
	_, err = s.Create(t.Context(), in)
	wantError(t, err, InUse, "Association already exists: "+a.ID)

	s.kv = broken
	up := UpdateInput{Cluster: "prod", ID: a.ID, RoleARN: ptr(role + "2"), ClientToken: "up"}
	_, err = s.Update(t.Context(), up)
	wantError(t, err, Unavailable, "")
	s.kv = broken.KV
	first, err := s.Describe(t.Context(), "prod", a.ID)
	if err != nil {
		t.Fatal(err)
	}
	again, err := s.Update(t.Context(), up)
	if err != nil || !same(first, again) || again.RoleARN != role+"2" {
		t.Errorf("%+v, %v", again, err)
	}
}

// A store that is full refuses to take more, for the time being; what is there
// can be read and deleted.
func TestFullStore(t *testing.T) {
	srv, err := etcd.Start(t.Context(), etcd.Config{Dir: t.TempDir(), QuotaBytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer srv.Close()
	s := NewStore(Config{Client: srv.Client(), Timeout: patience})
	if _, err := s.PutCluster(t.Context(), testCluster("prod")); err != nil {
		t.Fatal(err)
	}
	in := input("web", "")
	in.Tags = map[string]string{}
	for i := range 50 {
		in.Tags[fmt.Sprint(i)] = strings.Repeat("\u20ac", 256)
	}
	var last Association
	for i := 0; ; i++ {
		if i == 1000 {
			t.Fatal("a quota of 1 MiB is never reached")
		}
		in.ServiceAccount = fmt.Sprint("sa-", i)
		a, err := s.Create(t.Context(), in)
		if err != nil {
			wantError(t, err, Unavailable, "")
			break
		}
		last = a
	}
	// The one that was refused may be there: etcd says so also of the write that
	// reaches the quota. A retry with its token would tell.
	in.ServiceAccount, in.ClientToken = "another", "a lease, too"
	// On a slow machine etcd may have made room by now.
	if _, err = s.Create(t.Context(), in); err != nil {
		wantError(t, err, Unavailable, "")
	}
	if _, err = s.Update(t.Context(), UpdateInput{Cluster: "prod", ID: last.ID, RoleARN: ptr(role)}); err != nil {
		wantError(t, err, Unavailable, "")
	}
	if got, err := s.Describe(t.Context(), "prod", last.ID); err != nil || got.RoleARN != role {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := s.Delete(t.Context(), DeleteInput{Cluster: "prod", ID: last.ID}); err != nil {
		t.Errorf("delete: %v", err)
	}
	consistent(t, s)
}

func TestTimeLimit(t *testing.T) {
	s := newTestStore(t, nil)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := s.Create(ctx, input("web", "api"))
	wantError(t, err, Unavailable, "")
	s.cfg.Timeout = time.Nanosecond
	_, err = s.Describe(t.Context(), "prod", "a-00000000000000000")
	wantError(t, err, Unavailable, "")
}

func TestDamagedRecord(t *testing.T) {
	s := newTestStore(t, nil)
	a := mustCreate(t, s, input("web", "api"))
	slot, _ := slotOf(a.ID)
	for _, bad := range []string{"", "{", `{"arn":"x"}`, strings.Replace(`{"arn":"`+a.ARN+`"}`, "/prod/", "/other/", 1)} {
		if _, err := s.kv.Put(t.Context(), s.keys.association("prod", slot), bad); err != nil {
			t.Fatal(err)
		}
		_, err := s.Describe(t.Context(), "prod", a.ID)
		wantError(t, err, Internal, "")
		_, err = s.List(t.Context(), ListInput{Cluster: "prod"})
		wantError(t, err, Internal, "")
	}
}

func TestCreateMany(t *testing.T) {
	s := newTestStore(t, func(c *Config) { c.MaxTxnOps, c.Limit = 20, 60 })
	var in []CreateInput
	for i := range 50 {
		in = append(in, input("web", fmt.Sprint("sa-", i)))
	}
	out, err := s.CreateMany(t.Context(), "prod", in)
	if err != nil || len(out) != 50 {
		t.Fatalf("%d, %v", len(out), err)
	}
	for i, a := range out {
		got, err := s.Describe(t.Context(), "prod", a.ID)
		if err != nil || a.ServiceAccount != in[i].ServiceAccount || !same(got, a) {
			t.Errorf("%+v, %v", got, err)
		}
	}
	// One that is there already stops the batch that it is in.
	out, err = s.CreateMany(t.Context(), "prod", []CreateInput{input("web", "new-0"), input("web", "sa-7")})
	wantError(t, err, InUse, "")
	if len(out) != 0 {
		t.Errorf("%+v", out)
	}
	// Two of one name in one call.
	out, err = s.CreateMany(t.Context(), "prod", []CreateInput{input("web", "new-1"), input("web", "new-1")})
	wantError(t, err, InUse, "")
	if len(out) != 1 {
		t.Errorf("%+v", out)
	}
	in = in[:0]
	for i := range 50 {
		in = append(in, input("more", fmt.Sprint("sa-", i)))
	}
	out, err = s.CreateMany(t.Context(), "prod", in)
	wantError(t, err, LimitExceeded, "")
	if got := consistent(t, s); len(got) != 60 || len(out) != 9 {
		t.Errorf("%d associations, the last call made %d", len(got), len(out))
	}
	_, err = s.CreateMany(t.Context(), "nope", in)
	wantError(t, err, ClusterNotFound, "")
}
