// SPDX-License-Identifier: Apache-2.0

package permission_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/latchkey-dev/latchkey/pkg/permission"
)

type tags = map[string]string

func principal(t testing.TB, permissions ...permission.Permission) permission.Principal {
	t.Helper()
	p, err := permission.Compile(permissions)
	if err != nil {
		t.Fatal(err)
	}
	return permission.Principal{Name: "u", Policy: p}
}

func all(s ...string) []string { return s }

func equals(key, value string) map[string]map[string]permission.Values {
	return map[string]map[string]permission.Values{"StringEquals": {key: {value}}}
}

var (
	everything = permission.Permission{Actions: all("*"), Clusters: all("*"), Namespaces: all("*"), PassRoles: all("*")}
	// web may do everything in one namespace with its own roles.
	web = permission.Permission{Actions: all("eks:*"), Clusters: all("prod"), Namespaces: all("web", "web-*"), PassRoles: all("arn:aws:iam::111122223333:role/web-*")}
)

func role(name string) string { return "arn:aws:iam::111122223333:role/" + name }

func TestAllow(t *testing.T) {
	tagged := web
	tagged.Conditions = equals("aws:ResourceTag/team", "web")
	requested := web
	requested.Conditions = map[string]map[string]permission.Values{
		"StringLike":   {"aws:RequestTag/team": {"web-?", "shop*"}},
		"StringEquals": {"aws:RequestTag/stage": {"dev", "test"}},
	}
	create := permission.Request{Action: permission.CreateAssociation, Cluster: "prod", Namespace: "web", Resource: "the cluster", PassRoles: all(role("web-a"))}
	with := func(r permission.Request, change func(*permission.Request)) permission.Request { change(&r); return r }
	for name, c := range map[string]struct {
		may     []permission.Permission
		request permission.Request
		allowed bool
		action  permission.Action // that the refusal names
	}{
		"nothing":               {nil, create, false, permission.CreateAssociation},
		"everything":            {all1(everything), create, true, ""},
		"own":                   {all1(web), create, true, ""},
		"pattern of namespace":  {all1(web), with(create, func(r *permission.Request) { r.Namespace = "web-1" }), true, ""},
		"other namespace":       {all1(web), with(create, func(r *permission.Request) { r.Namespace = "db" }), false, permission.CreateAssociation},
		"prefix of namespace":   {all1(web), with(create, func(r *permission.Request) { r.Namespace = "we" }), false, permission.CreateAssociation},
		"longer namespace":      {all1(web), with(create, func(r *permission.Request) { r.Namespace = "webx" }), false, permission.CreateAssociation},
		"no namespace":          {all1(web), with(create, func(r *permission.Request) { r.Namespace = "" }), false, permission.CreateAssociation},
		"any namespace":         {all1(web), with(create, func(r *permission.Request) { r.Namespace, r.AnyNamespace = "", true }), true, ""},
		"no namespace, all":     {all1(everything), with(create, func(r *permission.Request) { r.Namespace = "" }), true, ""},
		"other cluster":         {all1(web), with(create, func(r *permission.Request) { r.Cluster = "prod2" }), false, permission.CreateAssociation},
		"cluster in other case": {all1(web), with(create, func(r *permission.Request) { r.Cluster = "PROD" }), false, permission.CreateAssociation},
		"other action":          {all1(web), with(create, func(r *permission.Request) { r.Action = permission.AssumeRole }), false, permission.AssumeRole},
		"other role":            {all1(web), with(create, func(r *permission.Request) { r.PassRoles = all(role("admin")) }), false, permission.PassRole},
		"second role":           {all1(web), with(create, func(r *permission.Request) { r.PassRoles = all(role("web-a"), role("admin")) }), false, permission.PassRole},
		"role of other account": {all1(web), with(create, func(r *permission.Request) { r.PassRoles = all("arn:aws:iam::999999999999:role/web-a") }), false, permission.PassRole},
		"empty role":            {all1(web), with(create, func(r *permission.Request) { r.PassRoles = all(role("web-a"), "") }), true, ""},
		"no arn":                {all1(web), with(create, func(r *permission.Request) { r.PassRoles = all("web-a") }), false, permission.PassRole},
		"no passRoles":          {all1(permission.Permission{Actions: all("*"), Clusters: all("*"), Namespaces: all("*")}), create, false, permission.PassRole},
		"parts do not add up": {[]permission.Permission{
			{Actions: all("*"), Clusters: all("prod"), Namespaces: all("db"), PassRoles: all("*")}, web,
		}, with(create, func(r *permission.Request) { r.PassRoles = all(role("admin")) }), false, permission.PassRole},
		"resource tag":           {all1(tagged), with(create, func(r *permission.Request) { r.ResourceTags = tags{"team": "web"} }), true, ""},
		"resource tag missing":   {all1(tagged), create, false, permission.CreateAssociation},
		"resource tag other":     {all1(tagged), with(create, func(r *permission.Request) { r.ResourceTags = tags{"team": "db"} }), false, permission.CreateAssociation},
		"tag key in other case":  {all1(tagged), with(create, func(r *permission.Request) { r.ResourceTags = tags{"Team": "web"} }), false, permission.CreateAssociation},
		"tag value other case":   {all1(tagged), with(create, func(r *permission.Request) { r.ResourceTags = tags{"team": "Web"} }), false, permission.CreateAssociation},
		"request is no resource": {all1(tagged), with(create, func(r *permission.Request) { r.RequestTags = tags{"team": "web"} }), false, permission.CreateAssociation},
		"request tags":           {all1(requested), with(create, func(r *permission.Request) { r.RequestTags = tags{"team": "web-1", "stage": "dev"} }), true, ""},
		"request tags, like":     {all1(requested), with(create, func(r *permission.Request) { r.RequestTags = tags{"team": "shopping", "stage": "test"} }), true, ""},
		"request tags, one off":  {all1(requested), with(create, func(r *permission.Request) { r.RequestTags = tags{"team": "web-1", "stage": "prod"} }), false, permission.CreateAssociation},
		"request tags, one gone": {all1(requested), with(create, func(r *permission.Request) { r.RequestTags = tags{"team": "web-1"} }), false, permission.CreateAssociation},
		"equals takes no pattern": {all1(permission.Permission{Actions: all("*"), Clusters: all("*"), Namespaces: all("*"), PassRoles: all("*"), Conditions: equals("aws:ResourceTag/team", "*")}),
			with(create, func(r *permission.Request) { r.ResourceTags = tags{"team": "x"} }), false, permission.CreateAssociation},
	} {
		t.Run(name, func(t *testing.T) {
			d := principal(t, c.may...).Allow(c.request)
			if d.Allowed != c.allowed || d.Action != c.action {
				t.Fatalf("got %+v", d)
			}
			if !d.Allowed && (d.Reason == "" || d.Resource == "" && d.Action != permission.PassRole) {
				t.Errorf("a refusal that says too little: %+v", d)
			}
		})
	}
}

func all1(p permission.Permission) []permission.Permission { return []permission.Permission{p} }

// An agent's keys are good for one thing, whatever else they are given.
func TestNodeMayOnlyAskForCredentials(t *testing.T) {
	policy, err := permission.Compile(all1(everything))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range []permission.Principal{
		{Name: "n", Node: &permission.Node{Cluster: "prod", Name: "n1"}},
		{Name: "n", Node: &permission.Node{Cluster: "prod", Name: "n1"}, Policy: policy},
	} {
		for _, a := range permission.Actions() {
			for _, cluster := range []string{"prod", "other", ""} {
				r := permission.Request{Action: a, Cluster: cluster, Namespace: "web"}
				want := a == permission.AssumeRole && cluster == "prod"
				if got := p.Allow(r).Allowed; got != want {
					t.Errorf("%s in %q: %v", a, cluster, got)
				}
				if got := p.AllowSomewhere(r).Allowed; got != want {
					t.Errorf("%s somewhere in %q: %v", a, cluster, got)
				}
				if got := p.AllowRetag(r, nil).Allowed; got != want {
					t.Errorf("%s retag in %q: %v", a, cluster, got)
				}
			}
		}
	}
	if (permission.Principal{Node: &permission.Node{}}).Allow(permission.Request{Action: permission.AssumeRole}).Allowed {
		t.Error("a node of no cluster may do something")
	}
}

func TestZeroPrincipalMayNothing(t *testing.T) {
	for _, a := range permission.Actions() {
		var p permission.Principal
		r := permission.Request{Action: a}
		if p.Allow(r).Allowed || p.AllowSomewhere(r).Allowed || p.AllowRetag(r, nil).Allowed {
			t.Errorf("%s is allowed", a)
		}
	}
}

func TestAllowSomewhere(t *testing.T) {
	p := principal(t, web)
	for name, c := range map[string]struct {
		r    permission.Request
		want bool
	}{
		"its cluster":   {permission.Request{Action: permission.DescribeAssociation, Cluster: "prod"}, true},
		"other cluster": {permission.Request{Action: permission.DescribeAssociation, Cluster: "dev"}, false},
		"other action":  {permission.Request{Action: permission.AssumeRole, Cluster: "prod"}, false},
	} {
		if d := p.AllowSomewhere(c.r); d.Allowed != c.want {
			t.Errorf("%s: %+v", name, d)
		}
	}
}

// Retagging must give the caller nothing: neither what was not its own, nor
// permissions that its own conditions hold back.
func TestAllowRetag(t *testing.T) {
	onTeam := func(actions ...string) permission.Permission {
		return permission.Permission{Actions: actions, Clusters: all("*"), Namespaces: all("*"), PassRoles: all("*"), Conditions: equals("aws:ResourceTag/team", "web")}
	}
	free := func(actions ...string) permission.Permission {
		return permission.Permission{Actions: actions, Clusters: all("*"), Namespaces: all("*")}
	}
	webNS := free("eks:*")
	webNS.Namespaces, webNS.PassRoles = all("web"), all(role("web"))
	wide := onTeam("eks:Update*")
	wide.PassRoles = all(role("admin"))
	tag := permission.Request{Action: permission.TagResource, Cluster: "prod", Namespace: "web", Resource: "r"}
	for name, c := range map[string]struct {
		may           []permission.Permission
		before, after tags
		want          bool
	}{
		"own stays own":                   {all1(onTeam("eks:*")), tags{"team": "web"}, tags{"team": "web", "x": "y"}, true},
		"not its own":                     {all1(onTeam("eks:*")), tags{"team": "db"}, tags{"team": "web"}, false},
		"untagged is not its own":         {all1(onTeam("eks:*")), nil, tags{"team": "web"}, false},
		"given away":                      {all1(onTeam("eks:*")), tags{"team": "web"}, tags{"team": "db"}, false},
		"tag taken off":                   {all1(onTeam("eks:*")), tags{"team": "web"}, tags{}, false},
		"no conditions":                   {all1(free("eks:*")), tags{"team": "db"}, tags{"team": "web"}, true},
		"taken through another condition": {[]permission.Permission{free("eks:TagResource"), onTeam("eks:Delete*")}, tags{"team": "db"}, tags{"team": "web"}, false},
		"nothing to be gained":            {[]permission.Permission{free("eks:TagResource"), onTeam("eks:Delete*")}, tags{"team": "web"}, tags{"team": "web", "x": "y"}, true},
		"had it anyway":                   {[]permission.Permission{free("eks:*"), onTeam("eks:Delete*")}, tags{"team": "db"}, tags{"team": "web"}, true},
		"had it with fewer roles":         {[]permission.Permission{webNS, wide}, tags{"team": "db"}, tags{"team": "web"}, false},
		"gains in another cluster only": {[]permission.Permission{free("eks:TagResource"), {Actions: all("eks:Delete*"), Clusters: all("dev"), Namespaces: all("*"), Conditions: equals("aws:ResourceTag/team", "web")}},
			tags{}, tags{"team": "web"}, true},
		"gains in another namespace only": {[]permission.Permission{free("eks:TagResource"), {Actions: all("eks:Delete*"), Clusters: all("*"), Namespaces: all("db"), Conditions: equals("aws:ResourceTag/team", "web")}},
			tags{}, tags{"team": "web"}, true},
	} {
		t.Run(name, func(t *testing.T) {
			r := tag
			r.ResourceTags = c.before
			if d := principal(t, c.may...).AllowRetag(r, c.after); d.Allowed != c.want {
				t.Errorf("got %+v", d)
			}
		})
	}
	// The tags of a cluster decide about what is made in it.
	r := permission.Request{Action: permission.TagResource, Cluster: "prod", Resource: "r", ResourceTags: tags{}}
	if d := principal(t, free("eks:TagResource"), onTeam("eks:Create*")).AllowRetag(r, tags{"team": "web"}); d.Allowed {
		t.Error("a cluster was retagged to be allowed to create in it")
	}
	if d := principal(t, webNS).AllowRetag(r, tags{"x": "y"}); d.Allowed {
		t.Error("who is limited to a namespace retagged the cluster")
	}
	if d := principal(t, free("eks:TagResource")).AllowRetag(r, tags{"team": "web"}); !d.Allowed {
		t.Errorf("got %+v", d)
	}
}

func TestCompileRefuses(t *testing.T) {
	valid := permission.Permission{Actions: all("eks:*"), Clusters: all("*"), Namespaces: all("*")}
	for name, change := range map[string]func(*permission.Permission){
		"no actions":      func(p *permission.Permission) { p.Actions = nil },
		"no clusters":     func(p *permission.Permission) { p.Clusters = nil },
		"no namespaces":   func(p *permission.Permission) { p.Namespaces = nil },
		"empty namespace": func(p *permission.Permission) { p.Namespaces = all("") },
		"unknown action":  func(p *permission.Permission) { p.Actions = all("eks:*", "eks:CreateAssociation") },
		"unknown service": func(p *permission.Permission) { p.Actions = all("s3:*") },
		"passing as such": func(p *permission.Permission) { p.Actions = all("iam:PassRole") },
		"role by name":    func(p *permission.Permission) { p.PassRoles = all("web-*") },
		"unknown operator": func(p *permission.Permission) {
			p.Conditions = map[string]map[string]permission.Values{"StringNotEquals": {"aws:ResourceTag/a": {"b"}}}
		},
		"unknown key":       func(p *permission.Permission) { p.Conditions = equals("aws:PrincipalTag/a", "b") },
		"key in other case": func(p *permission.Permission) { p.Conditions = equals("aws:resourcetag/a", "b") },
		"key without tag":   func(p *permission.Permission) { p.Conditions = equals("aws:ResourceTag/", "b") },
		"no values": func(p *permission.Permission) {
			p.Conditions = map[string]map[string]permission.Values{"StringLike": {"aws:ResourceTag/a": {}}}
		},
	} {
		p := valid
		change(&p)
		if _, err := permission.Compile(all1(p)); !errors.Is(err, permission.ErrPermission) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := permission.Compile(all1(valid)); err != nil {
		t.Error(err)
	}
}

func TestPatterns(t *testing.T) {
	for _, c := range []struct {
		pattern, role string
		want          bool
	}{
		{"*", "arn:aws:iam::111122223333:role/x", true},
		{"arn:aws:iam::111122223333:role/x", "arn:aws:iam::111122223333:role/x", true},
		{"arn:aws:iam::111122223333:role/x", "arn:aws:iam::111122223333:role/X", false},
		{"arn:aws:iam::111122223333:role/x", "arn:aws:iam::111122223333:role/xx", false},
		{"arn:aws:iam::111122223333:role/*", "arn:aws:iam::111122223333:role/path/to/x", true},
		{"arn:aws:iam::111122223333:role/*-x", "arn:aws:iam::111122223333:role/a-b-x", true},
		{"arn:aws:iam::111122223333:role/*-x", "arn:aws:iam::111122223333:role/a-x-b", false},
		{"arn:aws:iam::111122223333:role/a?c", "arn:aws:iam::111122223333:role/abc", true},
		{"arn:aws:iam::111122223333:role/a?c", "arn:aws:iam::111122223333:role/ac", false},
		{"arn:aws:iam::111122223333:role/a**c", "arn:aws:iam::111122223333:role/abbc", true},
		{"arn:*:iam::*:role/x", "arn:aws-cn:iam::111122223333:role/x", true},
		// A "*" for the account does not run on into the name.
		{"arn:aws:iam::*:role/x", "arn:aws:iam::1:role/admin:role/x", false},
		{"arn:aws:iam:*", "arn:aws:iam::111122223333:role/x", false},
	} {
		p := permission.Permission{Actions: all("*"), Clusters: all("*"), Namespaces: all("*"), PassRoles: all(c.pattern)}
		compiled, err := permission.Compile(all1(p))
		if err != nil {
			if c.want {
				t.Errorf("%s: %v", c.pattern, err)
			}
			continue
		}
		got := permission.Principal{Policy: compiled}.Allow(permission.Request{Action: permission.CreateAssociation, Cluster: "c", Namespace: "n", PassRoles: all(c.role)})
		if got.Allowed != c.want {
			t.Errorf("%s ~ %s: %v", c.pattern, c.role, got.Allowed)
		}
	}
}

// A pattern of many stars costs no more than its length times the text's.
func TestPatternIsNotExponential(t *testing.T) {
	p := web
	p.Namespaces = all(strings.Repeat("*a", 200) + "b")
	if principal(t, p).Allow(permission.Request{Action: permission.DescribeAssociation, Cluster: "prod", Namespace: strings.Repeat("a", 5000)}).Allowed {
		t.Error("matched")
	}
}

func FuzzPattern(f *testing.F) {
	f.Add("web-*", "web-1")
	f.Add("*?*", "")
	f.Fuzz(func(t *testing.T, pattern, s string) {
		if len(pattern) > 64 || len(s) > 64 || pattern == "" || s == "" {
			return
		}
		p := web
		p.Namespaces = all(pattern)
		got := principal(t, p).Allow(permission.Request{Action: permission.DescribeAssociation, Cluster: "prod", Namespace: s}).Allowed
		if want := slowMatch(pattern, s, map[string]bool{}); got != want {
			t.Errorf("%q ~ %q: %v", pattern, s, got)
		}
	})
}

// slowMatch is the definition of a match.
func slowMatch(p, s string, seen map[string]bool) (out bool) {
	k := fmt.Sprintf("%d/%d", len(p), len(s))
	if v, ok := seen[k]; ok {
		return v
	}
	defer func() { seen[k] = out }()
	switch {
	case p == "":
		return s == ""
	case p[0] == '*':
		return slowMatch(p[1:], s, seen) || s != "" && slowMatch(p, s[1:], seen)
	}
	return s != "" && (p[0] == '?' || p[0] == s[0]) && slowMatch(p[1:], s[1:], seen)
}
