// SPDX-License-Identifier: Apache-2.0

package association

import (
	"errors"
	"strings"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"
)

func allKeys() []clientv3.OpOption { return []clientv3.OpOption{clientv3.WithPrefix()} }

func TestParseRoleARN(t *testing.T) {
	for _, good := range []string{
		role, "arn:aws:iam::111122223333:role/a/b/c", "arn:aws-us-gov:iam::111122223333:role/x_+=,.@-Y",
		"arn:aws-eusc:iam::111122223333:role/" + strings.Repeat("a", 64), "arn:aws:iam::111122223333:role/p:q/x",
	} {
		if a, err := ParseRoleARN(good); err != nil || a.String() != good {
			t.Errorf("%s: %v, %v", good, a, err)
		}
	}
	for _, bad := range []string{
		"", "arn", "arn:aws:iam::111122223333:role/", "arn:aws:iam::111122223333:role", "arn:aws:iam::111122223333:user/x",
		"arn:aws:iam::11112222333:role/x", "arn:aws:iam::1111222233334:role/x", "arn:aws:iam:us-west-2:111122223333:role/x",
		"arn:aws:iam:::role/x", "arn:aws:sts::111122223333:assumed-role/x/y", "arn:aws:iam::111122223333:role/x y",
		"arn:aws:iam::111122223333:role/x\n", "arn:aws:iam::111122223333:role/*", "arn:aws:iam::*:role/x", "arn:aws:iam::111122223333:role/a/?",
		"arn:aws:iam::111122223333:role/a/", "arn:aws:iam::111122223333:role//x", "arn:AWS:iam::111122223333:role/x", "arn:awsx:iam::111122223333:role/x",
		"arn:aws:iam::111122223333:role/" + strings.Repeat("a", 65), "arn:aws:iam::111122223333:role/" + strings.Repeat("a/", 300) + "x",
		"arn:aws:iam::111122223333:role/ünder", "arn:aws:iam::111122223333:Role/x", " arn:aws:iam::111122223333:role/x",
		"arn:aws:iam::１１１１２２２２３３３３:role/x", "arn:aws:iam::111122223333:role/" + strings.Repeat("a", 3000),
	} {
		if a, err := ParseRoleARN(bad); !errors.Is(err, ErrMalformedARN) {
			t.Errorf("%q: %v, %v", bad, a, err)
		}
	}
}

func TestMatchARN(t *testing.T) {
	for _, c := range []struct {
		pattern, arn string
		want         bool
	}{
		{"*", role, true},
		{role, role, true},
		{role, role + "x", false},
		{role + "*", role, true},
		{"arn:aws:iam::111122223333:role/*", "arn:aws:iam::111122223333:role/a/b", true},
		{"arn:aws:iam::111122223333:role/pods/*", "arn:aws:iam::111122223333:role/pods", false},
		{"arn:aws:iam::111122223333:role/pods-?", "arn:aws:iam::111122223333:role/pods-1", true},
		{"arn:aws:iam::111122223333:role/pods-?", "arn:aws:iam::111122223333:role/pods-", false},
		{"arn:aws:iam::*:role/x", "arn:aws:iam::111122223333:role/x", true},
		// A star for the account is not one for what follows.
		{"arn:aws:iam::1*:role/x", "arn:aws:iam::1:role/y:role/x", false},
		{"arn:*:role/x", "arn:aws:iam::111122223333:role/x", false},
		{"arn:aws:iam::111122223333:role/App", "arn:aws:iam::111122223333:role/app", false},
		{"arn:aws:iam::111122223333:role/a*b*c", "arn:aws:iam::111122223333:role/aXbYbZc", true},
		{"arn:aws:iam::111122223333:role/a*b*c", "arn:aws:iam::111122223333:role/aXbYbZ", false},
		{"arn:aws:iam::111122223333:*", role, true},
		{"arn:aws:iam::111122223333", role, false},
		{"", role, false},
		{"", "", false},
		{"arn:aws:iam::111122223333:role/" + strings.Repeat("*a", 500) + "b", "arn:aws:iam::111122223333:role/" + strings.Repeat("a", 1500), false},
	} {
		if got := MatchARN(c.pattern, c.arn); got != c.want {
			t.Errorf("%s, %s: %v", c.pattern, c.arn, got)
		}
	}
}

func FuzzParseARN(f *testing.F) {
	for _, s := range []string{role, target, "arn:aws:eks:us-west-2:111122223333:podidentityassociation/prod/a-9njjin9gfghecgocd", "arn:aws:iam::111122223333:role/a:b", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		a, err := ParseARN(s)
		if err != nil {
			if !errors.Is(err, ErrMalformedARN) {
				t.Errorf("%v", err)
			}
			return
		}
		if a.String() != s {
			t.Errorf("%q became %q", s, a)
		}
		if !MatchARN("arn:*:*:*:*:*", s) || strings.ContainsAny(s, "\n\x00 ") {
			t.Errorf("%q is no ARN", s)
		}
		if r, err := ParseRoleARN(s); err == nil && (r != a || !MatchARN(s, s) || len(r.Account) != 12) {
			t.Errorf("%q as a role: %+v", s, r)
		}
	})
}

// The match is that of a plain, slow one.
func FuzzMatchARN(f *testing.F) {
	f.Add("a*b?c", "aXXbYc")
	f.Add("**", "")
	f.Add("*a*a*a", "aaaaaaab")
	f.Fuzz(func(t *testing.T, p, s string) {
		if len(p) > 12 || len(s) > 24 {
			return
		}
		var slow func(p, s string) bool
		slow = func(p, s string) bool {
			switch {
			case p == "":
				return s == ""
			case p[0] == '*':
				return slow(p[1:], s) || s != "" && slow(p, s[1:])
			}
			return s != "" && (p[0] == '?' || p[0] == s[0]) && slow(p[1:], s[1:])
		}
		if glob(p, s) != slow(p, s) {
			t.Errorf("%q, %q: %v", p, s, glob(p, s))
		}
	})
}

// A token is taken only as it was given, and says nothing else then.
func FuzzPageToken(f *testing.F) {
	in := ListInput{Cluster: "prod", Namespace: "web"}
	f.Add(pageToken(in, "a-9njjin9gfghecgocd"), "prod", "web", "")
	f.Add(pageToken(in, "a-9njjin9gfghecgocd"), "prod", "", "")
	f.Add("", "", "", "")
	f.Add("AWEt", "prod", "web", "api")
	f.Fuzz(func(t *testing.T, token, cluster, ns, sa string) {
		in := ListInput{Cluster: cluster, Namespace: ns, ServiceAccount: sa, NextToken: token}
		id, err := parsePageToken(in)
		if err != nil {
			if !errors.Is(err, ErrInvalidParameter) {
				t.Error(err)
			}
			return
		}
		if _, ok := slotOf(id); !ok || pageToken(in, id) != token {
			t.Errorf("%q was taken as %q", token, id)
		}
	})
}

// What is stored is what was meant, whatever the text.
func FuzzRecord(f *testing.F) {
	f.Add("web", "api", role, "{}", "k", "v")
	f.Add("", "\x00\xff", "\u2028", "<&>", "ſ", "\\")
	f.Fuzz(func(t *testing.T, ns, sa, role, policy, k, v string) {
		for _, s := range []*string{&ns, &sa, &role, &policy, &k, &v} {
			*s = strings.ToValidUTF8(*s, "")
		}
		a := Association{ID: "a-00000000000000000", Cluster: "prod", ARN: "arn:aws:eks:r:" + account + ":podidentityassociation/prod/a-00000000000000000",
			Namespace: ns, ServiceAccount: sa, RoleARN: role, Policy: policy, Tags: map[string]string{k: v}, Revision: 7}
		a.CreatedAt, a.ModifiedAt = a.CreatedAt.UTC(), a.ModifiedAt.UTC()
		rec, err := encode(&a)
		if err != nil {
			t.Fatal(err)
		}
		got, err := decode([]byte("/p/a/prod/000"), []byte(rec), 7)
		if err != nil || !same(got, a) {
			t.Errorf("%+v became %+v, %v", a, got, err)
		}
	})
}

func TestNames(t *testing.T) {
	if !ValidClusterName("A") || !ValidClusterName("9_-z") || !ValidClusterName(strings.Repeat("a", 100)) {
		t.Error("a good cluster name was refused")
	}
	for _, bad := range []string{"", "_a", "a.b", "a b", "ä", "a/b"} {
		if ValidClusterName(bad) {
			t.Errorf("cluster name %q", bad)
		}
	}
	for _, bad := range []string{"", ".a", "a.", "-a", "a.-b", "A", "a_b", "a/b", "ａ"} {
		if ValidServiceAccount(bad) {
			t.Errorf("service account %q", bad)
		}
	}
	// Slots sort as they count.
	last := ""
	for n := range MaxLimit {
		s := slotString(n)
		if len(s) != slotDigits || s <= last {
			t.Fatalf("slot %d is %q after %q", n, s, last)
		}
		last = s
	}
}
