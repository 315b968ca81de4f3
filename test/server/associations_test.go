// SPDX-License-Identifier: Apache-2.0

package server

import (
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/eks"
)

// What a client of the association API does all day, with aws-sdk-go-v2.
func TestGoSDK(t *testing.T) {
	t.Parallel()
	s := start(t)
	s.addCluster(cluster, newSigner(t))
	c, ctx := s.eks(s.user("admin")), s.ctx

	in := &eks.CreatePodIdentityAssociationInput{
		ClusterName: aws.String(cluster), Namespace: aws.String("web"), ServiceAccount: aws.String("api"),
		RoleArn: aws.String(roleARN("path/to/api")), Tags: map[string]string{"team": "web"}, ClientRequestToken: aws.String("first"),
	}
	made, err := c.CreatePodIdentityAssociation(ctx, in)
	if err != nil {
		t.Fatal(err)
	}
	a := made.Association
	id, arn := aws.ToString(a.AssociationId), aws.ToString(a.AssociationArn)
	if arn != "arn:aws:eks:us-west-2:111122223333:podidentityassociation/prod/"+id || len(id) != 19 || !strings.HasPrefix(id, "a-") ||
		aws.ToString(a.RoleArn) != roleARN("path/to/api") || a.Tags["team"] != "web" || a.CreatedAt == nil || aws.ToBool(a.DisableSessionTags) {
		t.Errorf("created %+v", a)
	}
	t.Run("replayed", func(t *testing.T) {
		again, err := c.CreatePodIdentityAssociation(ctx, in)
		if err != nil || aws.ToString(again.Association.AssociationId) != id {
			t.Errorf("the same call again: %v, %v", again, err)
		}
		other := *in
		other.RoleArn = aws.String(roleARN("other"))
		_, err = c.CreatePodIdentityAssociation(ctx, &other)
		want(t, "same token, other role", err, "InvalidParameterException", 400, "")
	})
	t.Run("duplicate", func(t *testing.T) {
		other := *in
		other.ClientRequestToken = aws.String("second")
		_, err := c.CreatePodIdentityAssociation(ctx, &other)
		want(t, "same service account", err, "ResourceInUseException", 409, "Association already exists: "+id)
	})
	t.Run("describe", func(t *testing.T) {
		got, err := c.DescribePodIdentityAssociation(ctx, &eks.DescribePodIdentityAssociationInput{ClusterName: aws.String(cluster), AssociationId: aws.String(id)})
		if err != nil || aws.ToString(got.Association.AssociationArn) != arn {
			t.Errorf("%v, %v", got, err)
		}
	})
	t.Run("update", func(t *testing.T) {
		got, err := c.UpdatePodIdentityAssociation(ctx, &eks.UpdatePodIdentityAssociationInput{
			ClusterName: aws.String(cluster), AssociationId: aws.String(id),
			RoleArn: aws.String(roleARN("next")), TargetRoleArn: aws.String(roleARN("target")),
		})
		if err != nil {
			t.Fatal(err)
		}
		if aws.ToString(got.Association.RoleArn) != roleARN("next") || aws.ToString(got.Association.ExternalId) != "us-west-2/111122223333/prod/web/api" {
			t.Errorf("%+v", got.Association)
		}
		got, err = c.UpdatePodIdentityAssociation(ctx, &eks.UpdatePodIdentityAssociationInput{
			ClusterName: aws.String(cluster), AssociationId: aws.String(id), TargetRoleArn: aws.String(""),
		})
		if err != nil || got.Association.TargetRoleArn != nil || got.Association.ExternalId != nil {
			t.Errorf("target cleared: %+v, %v", got, err)
		}
	})
	t.Run("tags", func(t *testing.T) {
		if _, err := c.TagResource(ctx, &eks.TagResourceInput{ResourceArn: aws.String(arn), Tags: map[string]string{"a b": "c/d", "ключ": "значение"}}); err != nil {
			t.Fatal(err)
		}
		if _, err := c.UntagResource(ctx, &eks.UntagResourceInput{ResourceArn: aws.String(arn), TagKeys: []string{"team", "never"}}); err != nil {
			t.Fatal(err)
		}
		got, err := c.ListTagsForResource(ctx, &eks.ListTagsForResourceInput{ResourceArn: aws.String(arn)})
		if err != nil || !maps.Equal(got.Tags, map[string]string{"a b": "c/d", "ключ": "значение"}) {
			t.Errorf("%v, %v", got, err)
		}
	})
	t.Run("delete", func(t *testing.T) {
		del := &eks.DeletePodIdentityAssociationInput{ClusterName: aws.String(cluster), AssociationId: aws.String(id)}
		got, err := c.DeletePodIdentityAssociation(ctx, del)
		if err != nil || aws.ToString(got.Association.AssociationId) != id {
			t.Errorf("%v, %v", got, err)
		}
		_, err = c.DeletePodIdentityAssociation(ctx, del)
		want(t, "deleted twice", err, "ResourceNotFoundException", 404, "")
	})
	t.Run("audit", func(t *testing.T) {
		var seen []string
		for _, r := range s.records() {
			if r["caller"] == "admin" {
				seen = append(seen, fmt.Sprint(r["operation"], " ", r["outcome"]))
			}
		}
		for _, op := range []string{"CreatePodIdentityAssociation done", "CreatePodIdentityAssociation refused", "UpdatePodIdentityAssociation done", "DeletePodIdentityAssociation done", "TagResource done", "UntagResource done"} {
			if !slices.Contains(seen, op) {
				t.Errorf("no record of %s among %q", op, seen)
			}
		}
	})
}

// importMany puts associations in place with one command.
func importMany(s *server, n int, namespace func(i int) string) {
	s.t.Helper()
	var b strings.Builder
	fmt.Fprintf(&b, "clusterName: %s\nassociations:\n", cluster)
	for i := range n {
		fmt.Fprintf(&b, "- {namespace: %s, serviceAccount: sa-%d, roleArn: %s}\n", namespace(i), i, roleARN("r"))
	}
	if r := s.try(b.String(), "association", "import", "-"); r.code != 0 {
		s.t.Fatalf("import: %s%s", r.stdout, r.stderr)
	}
}

func TestGoSDKLists(t *testing.T) {
	t.Parallel()
	s := start(t)
	s.addCluster(cluster, newSigner(t))
	c, ctx := s.eks(s.user("admin")), s.ctx
	const n = 250
	importMany(s, n, func(i int) string { return fmt.Sprintf("ns-%d", i%5) })

	pages := func(in *eks.ListPodIdentityAssociationsInput, between func(page int)) (ids []string, count int) {
		t.Helper()
		in.ClusterName = aws.String(cluster)
		p := eks.NewListPodIdentityAssociationsPaginator(c, in)
		for p.HasMorePages() {
			page, err := p.NextPage(ctx)
			if err != nil {
				t.Fatal(err)
			}
			count++
			for _, a := range page.Associations {
				ids = append(ids, aws.ToString(a.AssociationId))
			}
			if between != nil {
				between(count)
			}
		}
		return ids, count
	}
	all, count := pages(&eks.ListPodIdentityAssociationsInput{}, nil)
	slices.Sort(all)
	if len(slices.Compact(all)) != n || count != 3 {
		t.Errorf("%d associations on %d pages, want %d on 3", len(all), count, n)
	}
	if ns, _ := pages(&eks.ListPodIdentityAssociationsInput{Namespace: aws.String("ns-3")}, nil); len(ns) != n/5 {
		t.Errorf("namespace ns-3 has %d, want %d", len(ns), n/5)
	}
	if one, _ := pages(&eks.ListPodIdentityAssociationsInput{Namespace: aws.String("ns-3"), ServiceAccount: aws.String("sa-3")}, nil); len(one) != 1 {
		t.Errorf("one service account has %d", len(one))
	}
	// What is deleted between two pages must not hide what comes after it.
	gone := ""
	rest, _ := pages(&eks.ListPodIdentityAssociationsInput{MaxResults: aws.Int32(100)}, func(page int) {
		if page == 1 {
			gone = all[0]
			if _, err := c.DeletePodIdentityAssociation(ctx, &eks.DeletePodIdentityAssociationInput{ClusterName: aws.String(cluster), AssociationId: aws.String(gone)}); err != nil {
				t.Fatal(err)
			}
		}
	})
	for _, id := range all {
		if id != gone && !slices.Contains(rest, id) {
			t.Errorf("%s was lost when %s was deleted between pages", id, gone)
		}
	}
}

// Every refusal has its documented code and status, and changes nothing.
func TestGoSDKRefusals(t *testing.T) {
	t.Parallel()
	s := start(t)
	s.addCluster(cluster, newSigner(t))
	admin := s.user("admin")
	c, ctx := s.eks(admin), s.ctx
	made, err := c.CreatePodIdentityAssociation(ctx, &eks.CreatePodIdentityAssociationInput{
		ClusterName: aws.String(cluster), Namespace: aws.String("web"), ServiceAccount: aws.String("api"), RoleArn: aws.String(roleARN("r")),
	})
	if err != nil {
		t.Fatal(err)
	}
	id, arn := made.Association.AssociationId, made.Association.AssociationArn
	before := s.cli("association", "export", "-c", cluster)

	create := func(change func(*eks.CreatePodIdentityAssociationInput)) func() error {
		return func() error {
			in := &eks.CreatePodIdentityAssociationInput{ClusterName: aws.String(cluster), Namespace: aws.String("n"), ServiceAccount: aws.String("s"), RoleArn: aws.String(roleARN("r"))}
			change(in)
			_, err := c.CreatePodIdentityAssociation(ctx, in)
			return err
		}
	}
	update := func(change func(*eks.UpdatePodIdentityAssociationInput)) func() error {
		return func() error {
			in := &eks.UpdatePodIdentityAssociationInput{ClusterName: aws.String(cluster), AssociationId: id}
			change(in)
			_, err := c.UpdatePodIdentityAssociation(ctx, in)
			return err
		}
	}
	list := func(in eks.ListPodIdentityAssociationsInput) func() error {
		return func() error {
			if in.ClusterName == nil {
				in.ClusterName = aws.String(cluster)
			}
			_, err := c.ListPodIdentityAssociations(ctx, &in)
			return err
		}
	}
	tag := func(arn string, tags map[string]string) func() error {
		return func() error {
			_, err := c.TagResource(ctx, &eks.TagResourceInput{ResourceArn: aws.String(arn), Tags: tags})
			return err
		}
	}
	describe := func(cluster, id string) func() error {
		return func() error {
			_, err := c.DescribePodIdentityAssociation(ctx, &eks.DescribePodIdentityAssociationInput{ClusterName: aws.String(cluster), AssociationId: aws.String(id)})
			return err
		}
	}
	many := map[string]string{}
	for i := range 51 {
		many[fmt.Sprint("k", i)] = "v"
	}
	for _, tc := range []struct {
		name   string
		do     func() error
		code   string
		status int
		text   string
	}{
		{"unknown cluster", create(func(in *eks.CreatePodIdentityAssociationInput) { in.ClusterName = aws.String("nowhere") }), "ResourceNotFoundException", 404, "No cluster found for name: nowhere."},
		{"namespace with capitals", create(func(in *eks.CreatePodIdentityAssociationInput) { in.Namespace = aws.String("Web") }), "InvalidParameterException", 400, ""},
		{"namespace that only looks right", create(func(in *eks.CreatePodIdentityAssociationInput) { in.Namespace = aws.String("wеb") }), "InvalidParameterException", 400, ""},
		{"namespace too long", create(func(in *eks.CreatePodIdentityAssociationInput) { in.Namespace = aws.String(strings.Repeat("n", 64)) }), "InvalidParameterException", 400, ""},
		{"service account with a slash", create(func(in *eks.CreatePodIdentityAssociationInput) { in.ServiceAccount = aws.String("a/b") }), "InvalidParameterException", 400, ""},
		{"empty service account", create(func(in *eks.CreatePodIdentityAssociationInput) { in.ServiceAccount = aws.String("") }), "InvalidParameterException", 400, ""},
		{"role of another account", create(func(in *eks.CreatePodIdentityAssociationInput) {
			in.RoleArn = aws.String("arn:aws:iam::999999999999:role/r")
		}), "InvalidParameterException", 400, "Cross-account pass role is not allowed"},
		{"no role", create(func(in *eks.CreatePodIdentityAssociationInput) {
			in.RoleArn = aws.String("arn:aws:iam::111122223333:user/r")
		}), "InvalidParameterException", 400, ""},
		{"policy with session tags", create(func(in *eks.CreatePodIdentityAssociationInput) { in.Policy = aws.String(`{"Version":"2012-10-17"}`) }), "", 400, ""},
		{"51 tags", create(func(in *eks.CreatePodIdentityAssociationInput) { in.Tags = many }), "InvalidParameterException", 400, ""},
		{"aws: tag", create(func(in *eks.CreatePodIdentityAssociationInput) { in.Tags = map[string]string{"AWS:x": "y"} }), "InvalidParameterException", 400, ""},
		{"update of nothing", update(func(*eks.UpdatePodIdentityAssociationInput) {}), "", 400, ""},
		{"empty role", update(func(in *eks.UpdatePodIdentityAssociationInput) { in.RoleArn = aws.String("") }), "InvalidParameterException", 400, "Cross-account pass role is not allowed"},
		{"short id", describe(cluster, "a-123"), "InvalidParameterException", 400, "The parameter associationId should be 19 characters long."},
		{"unknown id", describe(cluster, "a-00000000000000000"), "ResourceNotFoundException", 404, ""},
		{"id in an unknown cluster", describe("nowhere", "a-00000000000000000"), "ResourceNotFoundException", 404, "No cluster found"},
		{"maxResults 0", list(eks.ListPodIdentityAssociationsInput{MaxResults: aws.Int32(0)}), "InvalidParameterException", 400, ""},
		{"maxResults 101", list(eks.ListPodIdentityAssociationsInput{MaxResults: aws.Int32(101)}), "InvalidParameterException", 400, ""},
		{"made-up page token", list(eks.ListPodIdentityAssociationsInput{NextToken: aws.String("AAAA")}), "InvalidParameterException", 400, ""},
		{"list of an unknown cluster", list(eks.ListPodIdentityAssociationsInput{ClusterName: aws.String("nowhere")}), "ResourceNotFoundException", 404, ""},
		{"no tags", tag(aws.ToString(arn), map[string]string{}), "BadRequestException", 400, ""},
		{"too many tags", tag(aws.ToString(arn), many), "BadRequestException", 400, ""},
		{"tag with aws:", tag(aws.ToString(arn), map[string]string{"aws:x": "y"}), "BadRequestException", 400, ""},
		{"tag of no ARN", tag("x", map[string]string{"a": "b"}), "BadRequestException", 400, ""},
		{"tag of what is not there", tag("arn:aws:eks:us-west-2:111122223333:podidentityassociation/prod/a-00000000000000000", map[string]string{"a": "b"}), "NotFoundException", 404, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := tc.do()
			if tc.code == "" {
				// Either of the two names is documented.
				code, status := outcome(err)
				if status != tc.status || code != "InvalidParameterException" && code != "InvalidRequestException" {
					t.Errorf("%s %d: %v", code, status, err)
				}
				return
			}
			want(t, tc.name, err, tc.code, tc.status, tc.text)
		})
	}
	if after := s.cli("association", "export", "-c", cluster); after != before {
		t.Errorf("the refused calls changed something:\n%s\nwas\n%s", after, before)
	}
}

// Who may not, may not; whoever asks.
func TestGoSDKPermissions(t *testing.T) {
	t.Parallel()
	s := start(t)
	s.addCluster(cluster, newSigner(t))
	s.addCluster("other", newSigner(t))
	admin := s.eks(s.user("admin"))
	limited := s.eks(s.user("web-team", "--cluster", cluster, "--namespace", "web", "--action", "eks:*", "--pass-role", roleARN("web/*")))
	agent := s.eks(s.user("agent", "--node", cluster+"/"+node))
	unknown := s.eks(aws.Credentials{AccessKeyID: "LKIA0000000000000000", SecretAccessKey: "x"})
	create := func(c *eks.Client, cluster, namespace, role string) error {
		_, err := c.CreatePodIdentityAssociation(s.ctx, &eks.CreatePodIdentityAssociationInput{
			ClusterName: aws.String(cluster), Namespace: aws.String(namespace), ServiceAccount: aws.String("s"), RoleArn: aws.String(role)})
		return err
	}
	if err := create(limited, cluster, "web", roleARN("web/r")); err != nil {
		t.Errorf("what is allowed: %v", err)
	}
	want(t, "role outside passRoles", create(limited, cluster, "web", roleARN("admin")), "AccessDeniedException", 403, "")
	want(t, "another namespace", create(limited, cluster, "kube-system", roleARN("web/r")), "AccessDeniedException", 403, "")
	want(t, "another cluster", create(limited, "other", "web", roleARN("web/r")), "AccessDeniedException", 403, "")
	want(t, "an agent's key", create(agent, cluster, "web", roleARN("web/r")), "AccessDeniedException", 403, "")
	want(t, "an unknown key", create(unknown, cluster, "web", roleARN("web/r")), "UnrecognizedClientException", 403, "")
	if err := create(admin, cluster, "kube-system", roleARN("admin")); err != nil {
		t.Fatal(err)
	}
	seen, err := limited.ListPodIdentityAssociations(s.ctx, &eks.ListPodIdentityAssociationsInput{ClusterName: aws.String(cluster)})
	if err != nil || len(seen.Associations) != 1 {
		t.Errorf("a limited list has %v, %v; want the one of its namespace", seen, err)
	}
	if s.try("", "user", "remove", "web-team").code != 0 {
		t.Fatal("user remove")
	}
	s.until("a removed user's key ends", func() error {
		_, err := limited.ListPodIdentityAssociations(s.ctx, &eks.ListPodIdentityAssociationsInput{ClusterName: aws.String(cluster)})
		if code, status := outcome(err); code != "UnrecognizedClientException" || status != http.StatusForbidden {
			return fmt.Errorf("%s %d", code, status)
		}
		return nil
	})
}
