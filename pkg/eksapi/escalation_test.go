// SPDX-License-Identifier: Apache-2.0

package eksapi_test

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/aws/aws-sdk-go-v2/service/eks"

	"github.com/latchkey-dev/latchkey/pkg/association"
)

// What nobody may do: each is refused with the error that it would have in EKS,
// and changes nothing.
func TestPrivilegeEscalation(t *testing.T) {
	w := newWorld(t, nil)
	const collection = "/clusters/prod/pod-identity-associations"
	tag := func(k, v string) func(*eks.CreatePodIdentityAssociationInput) {
		return func(in *eks.CreatePodIdentityAssociationInput) { in.Tags = map[string]string{k: v} }
	}
	web := w.create("web", "api", role("web-api"))
	// Somebody else gave an association of the namespace a role that web may not
	// pass, and restricted it.
	admins := w.create("web", "admin", role("admin"), func(in *eks.CreatePodIdentityAssociationInput) {
		in.TargetRoleArn, in.DisableSessionTags, in.Policy = ptr(target("admin")), ptr(true), ptr(`{"Statement":[]}`)
	})
	db := w.create("db", "api", role("db-api"), tag("team", "db"))
	teams := w.create("shop", "api", role("shop"), tag("team", "team"))
	dev, err := w.as("ADMIN").CreatePodIdentityAssociation(t.Context(), &eks.CreatePodIdentityAssociationInput{
		ClusterName: ptr("dev"), Namespace: ptr("web"), ServiceAccount: ptr("api"), RoleArn: ptr(role("web-api"))})
	if err != nil {
		t.Fatal(err)
	}
	devID := *dev.Association.AssociationId
	arn := func(id string) string {
		return "arn:aws:eks:" + region + ":" + account + ":podidentityassociation/prod/" + id
	}
	devARN := *dev.Association.AssociationArn
	clusterARN := "arn:aws:eks:" + region + ":" + account + ":cluster/prod"
	create := func(ns, sa, more string) string {
		return fmt.Sprintf(`{"namespace":%q,"serviceAccount":%q,%s}`, ns, sa, more)
	}
	roleIs := func(r string) string { return fmt.Sprintf(`"roleArn":%q`, r) }
	denied := func(user, action, resource string) string {
		return "User: " + user + " is not authorized to perform: " + action + " on resource: " + resource
	}
	for name, c := range map[string]struct {
		raw
		status  int
		code    string
		message string
	}{
		"role outside passRoles": {raw{user: "WEBS", path: collection, body: create("web", "new", roleIs(role("admin")))},
			403, "AccessDeniedException", denied("web", "iam:PassRole", role("admin"))},
		"target outside passRoles": {raw{user: "WEBS", path: collection, body: create("web", "new", roleIs(role("web-x"))+`,"targetRoleArn":"`+target("admin")+`"`)},
			403, "AccessDeniedException", denied("web", "iam:PassRole", target("admin"))},
		"role that only looks like it": {raw{user: "WEBS", path: collection, body: create("web", "new", roleIs("arn:aws:iam::999999999999:role/web-x"))},
			403, "AccessDeniedException", ""},
		"role with another letter e": {raw{user: "WEBS", path: collection, body: create("web", "new", roleIs("arn:aws:iam::111122223333:role/wеb-x"))},
			403, "AccessDeniedException", ""},
		"role by another member's case": {raw{user: "WEBS", path: collection, body: create("web", "new", roleIs(role("web-x"))+`,"RoleArn":"`+role("admin")+`","ROLEARN":"`+role("admin")+`","namespace":"db"`)},
			400, "InvalidParameterException", ""},
		"other namespace": {raw{user: "WEBS", path: collection, body: create("db", "new", roleIs(role("web-x")))},
			403, "AccessDeniedException", denied("web", "eks:CreatePodIdentityAssociation", clusterARN)},
		"other cluster": {raw{user: "WEBS", path: "/clusters/dev/pod-identity-associations", body: create("web", "new", roleIs(role("web-x")))},
			403, "AccessDeniedException", denied("web", "eks:CreatePodIdentityAssociation", "arn:aws:eks:"+region+":*:cluster/dev")},
		// Alike, so that nobody learns which clusters there are.
		"unknown cluster": {raw{user: "WEBS", path: "/clusters/none/pod-identity-associations", body: create("web", "new", roleIs(role("web-x")))},
			403, "AccessDeniedException", denied("web", "eks:CreatePodIdentityAssociation", "arn:aws:eks:"+region+":*:cluster/none")},
		"cluster by an escaped slash": {raw{user: "WEBS", path: "/clusters/dev%2F..%2Fprod/pod-identity-associations", body: create("web", "new", roleIs(role("web-x")))},
			403, "AccessDeniedException", ""},

		"describe of other namespace": {raw{user: "WEBS", method: "GET", path: collection + "/" + db},
			403, "AccessDeniedException", denied("web", "eks:DescribePodIdentityAssociation", arn(db))},
		"other cluster's by id": {raw{user: "WEBS", method: "GET", path: collection + "/" + devID},
			404, "ResourceNotFoundException", ""},
		"delete other cluster's by id": {raw{user: "WEBS", method: "DELETE", path: collection + "/" + devID},
			404, "ResourceNotFoundException", ""},
		"update of other cluster's by id": {raw{user: "WEBS", path: collection + "/" + devID, body: "{" + roleIs(role("web-x")) + "}"},
			404, "ResourceNotFoundException", ""},
		"update of other namespace": {raw{user: "WEBS", path: collection + "/" + db, body: "{" + roleIs(role("web-x")) + "}"},
			403, "AccessDeniedException", denied("web", "eks:UpdatePodIdentityAssociation", arn(db))},
		"delete of other namespace": {raw{user: "WEBS", method: "DELETE", path: collection + "/" + db},
			403, "AccessDeniedException", denied("web", "eks:DeletePodIdentityAssociation", arn(db))},
		"list of other namespace": {raw{user: "WEBS", method: "GET", path: collection + "?namespace=db"},
			403, "AccessDeniedException", denied("web", "eks:ListPodIdentityAssociations", clusterARN)},
		"list of two namespaces": {raw{user: "WEBS", method: "GET", path: collection + "?namespace=web&namespace=db"},
			400, "InvalidParameterException", ""},

		"update to a role outside": {raw{user: "WEBS", path: collection + "/" + web, body: "{" + roleIs(role("admin")) + "}"},
			403, "AccessDeniedException", denied("web", "iam:PassRole", role("admin"))},
		"update to a target outside": {raw{user: "WEBS", path: collection + "/" + web, body: `{"targetRoleArn":"` + target("admin") + `"}`},
			403, "AccessDeniedException", denied("web", "iam:PassRole", target("admin"))},
		"clear another's policy": {raw{user: "WEBS", path: collection + "/" + admins, body: `{"policy":""}`},
			403, "AccessDeniedException", denied("web", "iam:PassRole", role("admin"))},
		"other target for another's role": {raw{user: "WEBS", path: collection + "/" + admins, body: `{"targetRoleArn":"` + target("web-x") + `"}`},
			403, "AccessDeniedException", denied("web", "iam:PassRole", role("admin"))},
		"own role for another's target": {raw{user: "WEBS", path: collection + "/" + admins, body: "{" + roleIs(role("web-x")) + "}"},
			403, "AccessDeniedException", denied("web", "iam:PassRole", target("admin"))},

		"create without the tag": {raw{user: "TEAM", path: collection, body: create("web", "new", roleIs(role("x")))},
			403, "AccessDeniedException", denied("team", "eks:CreatePodIdentityAssociation", clusterARN)},
		"create with another's tag": {raw{user: "TEAM", path: collection, body: create("web", "new", roleIs(role("x"))+`,"tags":{"team":"db"}`)},
			403, "AccessDeniedException", ""},
		"create with the tag in another case": {raw{user: "TEAM", path: collection, body: create("web", "new", roleIs(role("x"))+`,"tags":{"Team":"team"}`)},
			403, "AccessDeniedException", ""},
		"create with the tag twice": {raw{user: "TEAM", path: collection, body: create("web", "new", roleIs(role("x"))+`,"tags":{"team":"team","team":"db"}`)},
			400, "InvalidParameterException", ""},
		"update of what another's tag is on": {raw{user: "TEAM", path: collection + "/" + db, body: "{" + roleIs(role("x")) + "}"},
			403, "AccessDeniedException", ""},
		"delete of what no tag is on": {raw{user: "TEAM", method: "DELETE", path: collection + "/" + web},
			403, "AccessDeniedException", ""},
		"tag what is another's": {raw{user: "TEAM", path: "/tags/" + arn(db), body: `{"tags":{"team":"team"}}`},
			403, "AccessDeniedException", denied("team", "eks:TagResource", arn(db))},
		"tag what is nobody's": {raw{user: "TEAM", path: "/tags/" + arn(web), body: `{"tags":{"team":"team"}}`},
			403, "AccessDeniedException", ""},
		"give one's own away": {raw{user: "TEAM", path: "/tags/" + arn(teams), body: `{"tags":{"team":"db"}}`},
			403, "AccessDeniedException", ""},
		"untag one's own": {raw{user: "TEAM", method: "DELETE", path: "/tags/" + arn(teams) + "?tagKeys=team"},
			403, "AccessDeniedException", ""},
		"tag to be allowed to delete": {raw{user: "TAGGER", path: "/tags/" + arn(db), body: `{"tags":{"owner":"tagger"}}`},
			403, "AccessDeniedException", denied("tagger", "eks:TagResource", arn(db))},
		"tag of other namespace": {raw{user: "WEBS", path: "/tags/" + arn(db), body: `{"tags":{"a":"b"}}`},
			403, "AccessDeniedException", ""},
		"tags of other namespace": {raw{user: "WEBS", method: "GET", path: "/tags/" + arn(db)},
			403, "AccessDeniedException", denied("web", "eks:ListTagsForResource", arn(db))},
		"tag in another cluster": {raw{user: "WEBS", path: "/tags/" + devARN, body: `{"tags":{"a":"b"}}`},
			403, "AccessDeniedException", denied("web", "eks:TagResource", "arn:aws:eks:"+region+":*:podidentityassociation/dev/"+devID)},
		"tag another cluster's by one's own": {raw{user: "WEBS", path: "/tags/" + arn(devID), body: `{"tags":{"a":"b"}}`},
			404, "NotFoundException", ""},
		"tag the cluster": {raw{user: "WEBS", path: "/tags/" + clusterARN, body: `{"tags":{"a":"b"}}`},
			403, "AccessDeniedException", denied("web", "eks:TagResource", clusterARN)},
		"tags of the cluster": {raw{user: "WEBS", method: "GET", path: "/tags/" + clusterARN},
			403, "AccessDeniedException", ""},

		"agent's key, create":   {raw{user: "NODE1", path: collection, body: create("web", "new", roleIs(role("x")))}, 403, "AccessDeniedException", ""},
		"agent's key, describe": {raw{user: "NODE1", method: "GET", path: collection + "/" + web}, 403, "AccessDeniedException", ""},
		"agent's key, list":     {raw{user: "NODE1", method: "GET", path: collection}, 403, "AccessDeniedException", ""},
		"agent's key, update":   {raw{user: "NODE1", path: collection + "/" + web, body: "{" + roleIs(role("x")) + "}"}, 403, "AccessDeniedException", ""},
		"agent's key, delete":   {raw{user: "NODE1", method: "DELETE", path: collection + "/" + web}, 403, "AccessDeniedException", ""},
		"agent's key, tag":      {raw{user: "NODE1", path: "/tags/" + arn(web), body: `{"tags":{"a":"b"}}`}, 403, "AccessDeniedException", ""},
		"broker's key, list":    {raw{user: "BROKER", method: "GET", path: collection}, 403, "AccessDeniedException", ""},
		"no permissions":        {raw{user: "NOBODY", method: "GET", path: collection}, 403, "AccessDeniedException", ""},
		"reader updates":        {raw{user: "READER", path: collection + "/" + web, body: "{" + roleIs(role("x")) + "}"}, 403, "AccessDeniedException", ""},
		"reader deletes":        {raw{user: "READER", method: "DELETE", path: collection + "/" + web}, 403, "AccessDeniedException", ""},
		"reader tags":           {raw{user: "READER", path: "/tags/" + arn(web), body: `{"tags":{"a":"b"}}`}, 403, "AccessDeniedException", ""},
		"signed for the other API": {raw{user: "ADMIN", service: "eks-auth", method: "DELETE", path: collection + "/" + web},
			403, "InvalidSignatureException", ""},
		"method by a header": {raw{user: "READER", method: "GET", path: collection + "/" + web, header: http.Header{"X-Http-Method-Override": {"DELETE"}}},
			200, "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			w.unchanged(func() {
				a := w.send(c.raw)
				if a.status != c.status || a.code() != c.code {
					t.Fatalf("got %d %s %s, want %d %s", a.status, a.code(), a.body, c.status, c.code)
				}
				if c.message != "" && a.message(t) != c.message {
					t.Errorf("got  %q\nwant %q", a.message(t), c.message)
				}
				if c.code == "AccessDeniedException" && (strings.Contains(a.body, "db-api") || strings.Contains(a.body, "Statement")) {
					t.Errorf("the refusal tells of what it refuses: %s", a.body)
				}
			})
		})
	}
}

// What the same users may do works.
func TestPermissionsAllow(t *testing.T) {
	w := newWorld(t, nil)
	const collection = "/clusters/prod/pod-identity-associations"
	ok := func(r raw) string {
		t.Helper()
		a := w.send(r)
		if a.status != 200 {
			t.Fatalf("%s %s as %s: %d %s", r.method, r.path, r.user, a.status, a.body)
		}
		return a.body
	}
	id := func(body string) string {
		_, rest, _ := strings.Cut(body, `"associationId":"`)
		return rest[:association.IDLength]
	}
	web := id(ok(raw{user: "WEBS", path: collection, body: `{"namespace":"web","serviceAccount":"a","roleArn":"` + role("web-a") + `","targetRoleArn":"` + target("web-b") + `"}`}))
	ok(raw{user: "WEBS", method: "GET", path: collection + "/" + web})
	ok(raw{user: "WEBS", method: "GET", path: collection + "?namespace=web"})
	ok(raw{user: "WEBS", path: collection + "/" + web, body: `{"targetRoleArn":"","roleArn":"` + role("web-c") + `"}`})
	arn := "arn:aws:eks:" + region + ":" + account + ":podidentityassociation/prod/"
	ok(raw{user: "WEBS", path: "/tags/" + arn + web, body: `{"tags":{"a":"b"}}`})
	ok(raw{user: "WEBS", method: "DELETE", path: "/tags/" + arn + web + "?tagKeys=a"})
	ok(raw{user: "READER", method: "GET", path: collection + "/" + web})
	ok(raw{user: "WEBS", method: "DELETE", path: collection + "/" + web})

	team := id(ok(raw{user: "TEAM", path: collection, body: `{"namespace":"x","serviceAccount":"a","roleArn":"` + role("x") + `","tags":{"team":"team","more":"x"}}`}))
	ok(raw{user: "TEAM", path: collection + "/" + team, body: `{"disableSessionTags":true}`})
	ok(raw{user: "TEAM", path: "/tags/" + arn + team, body: `{"tags":{"other":"x"}}`})
	ok(raw{user: "TEAM", method: "DELETE", path: "/tags/" + arn + team + "?tagKeys=other"})
	ok(raw{user: "TEAM", method: "DELETE", path: collection + "/" + team})
}

// A repeated create is answered with what the first one made only to who may
// still have made that.
func TestReplayedCreateIsJudgedAnew(t *testing.T) {
	w := newWorld(t, nil)
	in := raw{user: "WEBS", path: "/clusters/prod/pod-identity-associations",
		body: `{"namespace":"web","serviceAccount":"a","roleArn":"` + role("web-a") + `","clientRequestToken":"tok"}`}
	first := w.send(in)
	if again := w.send(in); again.status != 200 || again.body != first.body {
		t.Fatalf("repeated: %d %s", again.status, again.body)
	}
	_, id, _ := strings.Cut(first.body, `"associationId":"`)
	id = id[:association.IDLength]
	if a := w.send(raw{path: "/clusters/prod/pod-identity-associations/" + id, body: `{"roleArn":"` + role("admin") + `"}`}); a.status != 200 {
		t.Fatal(a.body)
	}
	// With somebody else's token, too.
	if a := w.send(in); a.status == 200 && strings.Contains(a.body, "role/admin") {
		t.Errorf("tells of a role that the caller may not pass: %s", a.body)
	}
}
