// SPDX-License-Identifier: Apache-2.0

package association

import (
	"encoding/json"
	"fmt"
	"maps"
	"strings"
	"sync"
	"testing"
)

func TestPutCluster(t *testing.T) {
	s := NewStore(testConfig(t))
	c := testCluster("prod")
	c.Issuers = []string{"https://kubernetes.default.svc"}
	c.Keys = json.RawMessage("{ \"keys\": [ {\"kty\":\"RSA\", \"kid\":\"a\", \"n\":\"x\", \"e\":\"AQAB\"} ] }")
	c.TokenReview = &TokenReview{Kubeconfig: "k", Context: "c", OnOutage: OnOutageKeys}
	c.AgentServiceAccounts = []string{"kube-system/agent"}
	c.Tags = map[string]string{"a": "b"}
	got, err := s.PutCluster(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	if got.ARN != "arn:aws:eks:us-west-2:"+account+":cluster/prod" || got.Revision == 0 || got.CreatedAt.IsZero() {
		t.Errorf("%+v", got)
	}
	read, err := s.Cluster(t.Context(), "prod")
	if err != nil || fmt.Sprintf("%+v", read.TokenReview) != fmt.Sprintf("%+v", c.TokenReview) || string(read.Keys) != `{"keys":[{"kty":"RSA","kid":"a","n":"x","e":"AQAB"}]}` ||
		read.Issuers[0] != c.Issuers[0] || read.AgentServiceAccounts[0] != c.AgentServiceAccounts[0] || read.Tags["a"] != "b" || read.Region != "us-west-2" || read.Account != account {
		t.Errorf("%+v, %v", read, err)
	}
	// A configuration that is applied at every start changes nothing at the second.
	again, err := s.PutCluster(t.Context(), c)
	if err != nil || again.Revision != got.Revision {
		t.Errorf("%+v, %v", again, err)
	}
	c.Tags, c.Issuers = nil, []string{"x"}
	again, err = s.PutCluster(t.Context(), c)
	if err != nil || again.Revision <= got.Revision || again.Tags["a"] != "b" || !again.CreatedAt.Equal(got.CreatedAt) || again.Issuers[0] != "x" {
		t.Errorf("%+v, %v", again, err)
	}
	for _, edit := range []func(*Cluster){
		func(c *Cluster) { c.Region = "eu-west-1" },
		func(c *Cluster) { c.Account = other },
		func(c *Cluster) { c.ARN = "arn:aws-cn:eks:us-west-2:" + account + ":cluster/prod" },
	} {
		d := c
		edit(&d)
		_, err := s.PutCluster(t.Context(), d)
		wantError(t, err, InvalidParameter, "The region, account and ARN of cluster prod cannot change: it is "+got.ARN+".")
	}
	if _, err := s.PutCluster(t.Context(), testCluster("a")); err != nil {
		t.Fatal(err)
	}
	list, err := s.Clusters(t.Context())
	if err != nil || len(list) != 2 || list[0].Name != "a" || list[1].Name != "prod" {
		t.Errorf("%+v, %v", list, err)
	}
}

func TestClusterRefuses(t *testing.T) {
	s := NewStore(testConfig(t))
	for name, edit := range map[string]func(*Cluster){
		"no name":            func(c *Cluster) { c.Name = "" },
		"slash":              func(c *Cluster) { c.Name = "a/b" },
		"dots":               func(c *Cluster) { c.Name = ".." },
		"leading hyphen":     func(c *Cluster) { c.Name = "-a" },
		"101 characters":     func(c *Cluster) { c.Name = strings.Repeat("a", 101) },
		"newline":            func(c *Cluster) { c.Name = "a\n" },
		"no region":          func(c *Cluster) { c.Region = "" },
		"region":             func(c *Cluster) { c.Region = "US" },
		"account":            func(c *Cluster) { c.Account = "1" },
		"account in letters": func(c *Cluster) { c.Account = "11112222333x" },
		"another's ARN":      func(c *Cluster) { c.ARN = "arn:aws:eks:us-west-2:" + account + ":cluster/other" },
		"ARN of a role":      func(c *Cluster) { c.ARN = role },
		"no ARN":             func(c *Cluster) { c.ARN = "x" },
		"empty issuer":       func(c *Cluster) { c.Issuers = []string{""} },
		"keys not JSON":      func(c *Cluster) { c.Keys = json.RawMessage(`{`) },
		"no keys":            func(c *Cluster) { c.Keys = json.RawMessage(`{"keys":[]}`) },
		"private key":        func(c *Cluster) { c.Keys = json.RawMessage(`{"keys":[{"kty":"EC","d":"secret"}]}`) },
		"shared secret":      func(c *Cluster) { c.Keys = json.RawMessage(`{"keys":[{"kty":"oct","k":"secret"}]}`) },
		"pattern":            func(c *Cluster) { c.AllowedRoles = []string{"role/*"} },
		"allowed account":    func(c *Cluster) { c.AllowedAccounts = []string{"1*"} },
		"agent":              func(c *Cluster) { c.AgentServiceAccounts = []string{"agent"} },
		"outage":             func(c *Cluster) { c.TokenReview = &TokenReview{OnOutage: "maybe"} },
		"tags":               func(c *Cluster) { c.Tags = map[string]string{"aws:x": "y"} },
	} {
		c := testCluster("prod")
		edit(&c)
		_, err := s.PutCluster(t.Context(), c)
		wantError(t, err, InvalidParameter, "")
		if t.Failed() || strings.Contains(err.Error(), "secret") {
			t.Fatal(name, err)
		}
	}
	if list, err := s.Clusters(t.Context()); err != nil || len(list) != 0 {
		t.Errorf("%+v, %v", list, err)
	}
}

func TestPartitions(t *testing.T) {
	for region, want := range map[string]string{
		"us-west-2": "aws", "cn-north-1": "aws-cn", "us-gov-west-1": "aws-us-gov", "us-iso-east-1": "aws-iso",
		"us-isob-east-1": "aws-iso-b", "eusc-de-east-1": "aws-eusc", "rack-7": "aws",
	} {
		if got := PartitionOf(region); got != want {
			t.Errorf("%s: %s, want %s", region, got, want)
		}
	}
	s := NewStore(testConfig(t))
	c := testCluster("prod")
	c.Region = "cn-north-1"
	if _, err := s.PutCluster(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	in := input("web", "api")
	in.RoleARN = strings.Replace(role, "aws", "aws-cn", 1)
	if a := mustCreate(t, s, in); !strings.HasPrefix(a.ARN, "arn:aws-cn:eks:cn-north-1:") {
		t.Error(a.ARN)
	}
}

func TestDeleteCluster(t *testing.T) {
	s := newTestStore(t, nil)
	in := input("web", "api")
	in.ClientToken = "token"
	a := mustCreate(t, s, in)
	wantError(t, s.DeleteCluster(t.Context(), "prod", false), InUse, "Cluster has pod identity associations: prod.")
	wantError(t, s.DeleteCluster(t.Context(), "nope", true), ClusterNotFound, "No cluster found for name: nope.")
	if err := s.DeleteCluster(t.Context(), "prod", true); err != nil {
		t.Fatal(err)
	}
	_, err := s.Describe(t.Context(), "prod", a.ID)
	wantError(t, err, ClusterNotFound, "No cluster found for name: prod.")
	r, err := s.kv.Get(t.Context(), s.keys.prefix, allKeys()...)
	if err != nil || len(r.Kvs) != 0 {
		t.Errorf("left behind: %v, %v", r.Kvs, err)
	}
	if _, err := s.PutCluster(t.Context(), testCluster("prod")); err != nil {
		t.Fatal(err)
	}
	if err := s.DeleteCluster(t.Context(), "prod", false); err != nil {
		t.Error(err)
	}
}

func TestTags(t *testing.T) {
	s := newTestStore(t, nil)
	a := mustCreate(t, s, input("web", "api"))
	c, err := s.Cluster(t.Context(), "prod")
	if err != nil {
		t.Fatal(err)
	}
	for name, arn := range map[string]string{"association": a.ARN, "cluster": c.ARN} {
		t.Run(name, func(t *testing.T) {
			tags := func() map[string]string {
				t.Helper()
				r, err := s.TagsOf(t.Context(), arn)
				if err != nil || (r.Association == nil) != (name == "cluster") || r.Cluster.Name != "prod" {
					t.Fatalf("%+v, %v", r, err)
				}
				return r.Tags()
			}
			if got := tags(); got == nil || len(got) != 0 {
				t.Errorf("%v", got)
			}
			if err := s.Tag(t.Context(), arn, map[string]string{"a": "1", "b": "2"}, nil); err != nil {
				t.Fatal(err)
			}
			if err := s.Tag(t.Context(), arn, map[string]string{"b": "3", "A": "x"}, nil); err != nil {
				t.Fatal(err)
			}
			if want := map[string]string{"a": "1", "b": "3", "A": "x"}; !maps.Equal(tags(), want) {
				t.Errorf("%v", tags())
			}
			if err := s.Untag(t.Context(), arn, []string{"a", "not there"}, nil); err != nil {
				t.Fatal(err)
			}
			if want := map[string]string{"b": "3", "A": "x"}; !maps.Equal(tags(), want) {
				t.Errorf("%v", tags())
			}
			many := map[string]string{}
			for i := range 49 {
				many[fmt.Sprint("key-", i)] = "x"
			}
			wantError(t, s.Tag(t.Context(), arn, many, nil), BadTags, "A resource can have at most 50 tags.")
			if len(tags()) != 2 {
				t.Errorf("%v", tags())
			}
			delete(many, "key-0")
			if err := s.Tag(t.Context(), arn, many, nil); err != nil || len(tags()) != 50 {
				t.Errorf("%d tags, %v", len(tags()), err)
			}
			if err := s.Tag(t.Context(), arn, map[string]string{"b": "4"}, nil); err != nil || tags()["b"] != "4" {
				t.Errorf("%v, %v", tags(), err)
			}
			wantError(t, s.Tag(t.Context(), arn, nil, nil), BadTags, "At least one tag should be given.")
			wantError(t, s.Tag(t.Context(), arn, map[string]string{"Aws:": "x"}, nil), BadTags, "Tag keys cannot begin with aws:.")
			wantError(t, s.Untag(t.Context(), arn, nil, nil), BadTags, "")
			wantError(t, s.Untag(t.Context(), arn, []string{""}, nil), BadTags, "")
			wantError(t, s.Untag(t.Context(), arn, make([]string, 51), nil), BadTags, "")
		})
	}
	got, err := s.Describe(t.Context(), "prod", a.ID)
	if err != nil || !got.ModifiedAt.Equal(a.ModifiedAt) || got.Revision <= a.Revision || got.Tags["b"] != "4" || got.RoleARN != role {
		t.Errorf("tags changed more than tags: %+v, %v", got, err)
	}
	for arn, kind := range map[string]Kind{
		"": BadTags, "x": BadTags, "arn:aws:eks": BadTags, role: BadTags,
		"arn:aws:eks:us-west-2:" + account + ":podidentityassociation/prod":                     BadTags,
		"arn:aws:eks:us-west-2:" + account + ":podidentityassociation/prod/a-1":                 BadTags,
		"arn:aws:eks:us-west-2:" + account + ":podidentityassociation/prod/a-00000000000000000": TagsNotFound,
		"arn:aws:eks:us-west-2:" + account + ":podidentityassociation/nope/" + a.ID:             TagsNotFound,
		"arn:aws:eks:us-west-2:" + account + ":addon/prod/x/1":                                  TagsNotFound,
		"arn:aws:eks:us-west-2:" + account + ":cluster/nope":                                    TagsNotFound,
		"arn:aws:eks:us-west-2:" + account + ":cluster/prod/":                                   TagsNotFound,
		strings.Replace(a.ARN, "us-west-2", "us-west-1", 1):                                     TagsNotFound,
		strings.Replace(a.ARN, account, other, 1):                                               TagsNotFound,
		strings.Replace(c.ARN, "arn:aws:", "arn:aws-cn:", 1):                                    TagsNotFound,
	} {
		_, err := s.TagsOf(t.Context(), arn)
		wantError(t, err, kind, "")
		wantError(t, s.Tag(t.Context(), arn, map[string]string{"a": "b"}, nil), kind, "")
		wantError(t, s.Untag(t.Context(), arn, []string{"a"}, nil), kind, "")
	}
}

// Taggers at once, beside updates, lose nothing of each other's.
func TestRaceOfTags(t *testing.T) {
	s := newTestStore(t, nil)
	a := mustCreate(t, s, input("web", "api"))
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			if err := s.Tag(t.Context(), a.ARN, map[string]string{fmt.Sprint("key-", i): "x"}, nil); err != nil {
				t.Error(err)
			}
		})
		wg.Go(func() {
			if _, err := s.Update(t.Context(), UpdateInput{Cluster: "prod", ID: a.ID, RoleARN: ptr(fmt.Sprint(role, i))}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	got, err := s.Describe(t.Context(), "prod", a.ID)
	if err != nil || len(got.Tags) != 20 || got.RoleARN == role {
		t.Errorf("%+v, %v", got, err)
	}
}
