// SPDX-License-Identifier: Apache-2.0

package eksapi_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/eks"
	"github.com/aws/aws-sdk-go-v2/service/eks/types"

	"github.com/latchkey-dev/latchkey/pkg/association"
	"github.com/latchkey-dev/latchkey/pkg/eksapi"
)

// An association's life, with the SDK's client.
func TestAssociationsWithTheSDK(t *testing.T) {
	w := newWorld(t, nil)
	c := w.as("ADMIN")
	began := time.Now().Add(-time.Second)
	created, err := c.CreatePodIdentityAssociation(t.Context(), &eks.CreatePodIdentityAssociationInput{
		ClusterName: ptr("prod"), Namespace: ptr("web"), ServiceAccount: ptr("api.v1"), RoleArn: ptr(role("path/to/api")),
		TargetRoleArn: ptr(target("t")), DisableSessionTags: ptr(true), Policy: ptr(`{"Version":"2012-10-17","Statement":[]}`),
		Tags: map[string]string{"team": "web & co", "größe": "<ä>"},
	})
	if err != nil {
		t.Fatal(err)
	}
	a := created.Association
	id := *a.AssociationId
	if !regexp.MustCompile(`^a-[a-z0-9]{17}$`).MatchString(id) {
		t.Errorf("id %q", id)
	}
	for name, pair := range map[string][2]string{
		"cluster":         {*a.ClusterName, "prod"},
		"namespace":       {*a.Namespace, "web"},
		"service account": {*a.ServiceAccount, "api.v1"},
		"role":            {*a.RoleArn, role("path/to/api")},
		"target":          {*a.TargetRoleArn, target("t")},
		"policy":          {*a.Policy, `{"Version":"2012-10-17","Statement":[]}`},
		"external id":     {*a.ExternalId, region + "/" + account + "/prod/web/api.v1"},
		"arn":             {*a.AssociationArn, "arn:aws:eks:" + region + ":" + account + ":podidentityassociation/prod/" + id},
		"tags":            {fmt.Sprint(a.Tags), fmt.Sprint(map[string]string{"team": "web & co", "größe": "<ä>"})},
	} {
		if pair[0] != pair[1] {
			t.Errorf("%s: %q, want %q", name, pair[0], pair[1])
		}
	}
	if !*a.DisableSessionTags || a.OwnerArn != nil || !a.CreatedAt.Equal(*a.ModifiedAt) || a.CreatedAt.Before(began) || a.CreatedAt.After(time.Now().Add(time.Second)) {
		t.Errorf("got %+v", a)
	}

	// A repeated call is answered with the same, another one is told of it.
	again := &eks.CreatePodIdentityAssociationInput{ClusterName: ptr("prod"), Namespace: ptr("web"), ServiceAccount: ptr("b"), RoleArn: ptr(role("b")), ClientRequestToken: ptr("t1")}
	first, err := c.CreatePodIdentityAssociation(t.Context(), again)
	if err != nil {
		t.Fatal(err)
	}
	second, err := c.CreatePodIdentityAssociation(t.Context(), again)
	if err != nil || *second.Association.AssociationId != *first.Association.AssociationId {
		t.Errorf("repeated: %+v, %v", second, err)
	}
	again.RoleArn = ptr(role("c"))
	_, err = c.CreatePodIdentityAssociation(t.Context(), again)
	wantError(t, err, 400, "InvalidParameterException", "")
	again.ClientRequestToken = nil
	_, err = c.CreatePodIdentityAssociation(t.Context(), again)
	wantError(t, err, 409, "ResourceInUseException", "Association already exists: "+*first.Association.AssociationId)

	described, err := c.DescribePodIdentityAssociation(t.Context(), &eks.DescribePodIdentityAssociationInput{ClusterName: ptr("prod"), AssociationId: &id})
	if err != nil || fmt.Sprint(*described.Association) == "" || *described.Association.RoleArn != *a.RoleArn || !described.Association.CreatedAt.Equal(*a.CreatedAt) {
		t.Errorf("described: %+v, %v", described, err)
	}

	updated, err := c.UpdatePodIdentityAssociation(t.Context(), &eks.UpdatePodIdentityAssociationInput{
		ClusterName: ptr("prod"), AssociationId: &id, RoleArn: ptr(role("new")), TargetRoleArn: ptr(""), Policy: ptr(""), DisableSessionTags: ptr(false),
	})
	if err != nil {
		t.Fatal(err)
	}
	u := updated.Association
	if *u.RoleArn != role("new") || u.TargetRoleArn != nil || u.ExternalId != nil || u.Policy != nil || *u.DisableSessionTags || !u.CreatedAt.Equal(*a.CreatedAt) || u.ModifiedAt.Before(*a.ModifiedAt) || len(u.Tags) != 2 {
		t.Errorf("updated: %+v", u)
	}

	arn := *a.AssociationArn
	if _, err := c.TagResource(t.Context(), &eks.TagResourceInput{ResourceArn: &arn, Tags: map[string]string{"a:b": "1", "a-b": "2", "a b": "3", "team": "x"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.UntagResource(t.Context(), &eks.UntagResourceInput{ResourceArn: &arn, TagKeys: []string{"a-b", "a:b", "größe", "not there"}}); err != nil {
		t.Fatal(err)
	}
	listed, err := c.ListTagsForResource(t.Context(), &eks.ListTagsForResourceInput{ResourceArn: &arn})
	if err != nil || fmt.Sprint(listed.Tags) != fmt.Sprint(map[string]string{"a b": "3", "team": "x"}) {
		t.Errorf("tags: %v, %v", listed, err)
	}
	clusterARN := "arn:aws:eks:" + region + ":" + account + ":cluster/prod"
	if listed, err := c.ListTagsForResource(t.Context(), &eks.ListTagsForResourceInput{ResourceArn: &clusterARN}); err != nil || listed.Tags["stage"] != "prod" {
		t.Errorf("tags of the cluster: %v, %v", listed, err)
	}

	deleted, err := c.DeletePodIdentityAssociation(t.Context(), &eks.DeletePodIdentityAssociationInput{ClusterName: ptr("prod"), AssociationId: &id})
	if err != nil || *deleted.Association.AssociationId != id || *deleted.Association.RoleArn != role("new") || deleted.Association.Tags["team"] != "x" {
		t.Errorf("deleted: %+v, %v", deleted, err)
	}
	_, err = c.DescribePodIdentityAssociation(t.Context(), &eks.DescribePodIdentityAssociationInput{ClusterName: ptr("prod"), AssociationId: &id})
	wantError(t, err, 404, "ResourceNotFoundException", "")
	_, err = c.DeletePodIdentityAssociation(t.Context(), &eks.DeletePodIdentityAssociationInput{ClusterName: ptr("prod"), AssociationId: &id})
	wantError(t, err, 404, "ResourceNotFoundException", "")
}

func TestListWithTheSDK(t *testing.T) {
	w := newWorld(t, nil)
	const n = 250
	var in []association.CreateInput
	for i := range n {
		in = append(in, association.CreateInput{Cluster: "prod", Namespace: fmt.Sprintf("ns-%d", i%5), ServiceAccount: fmt.Sprintf("sa-%d", i/5), RoleARN: role("r")})
	}
	made, err := w.store.CreateMany(t.Context(), "prod", in)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]association.Association{}
	for _, a := range made {
		want[a.ID] = a
	}
	c := w.as("ADMIN")
	for name, q := range map[string]struct {
		in         eks.ListPodIdentityAssociationsInput
		keep       func(association.Association) bool
		want       int
		deleteOnce bool
	}{
		"all":             {eks.ListPodIdentityAssociationsInput{}, func(association.Association) bool { return true }, n, false},
		"small pages":     {eks.ListPodIdentityAssociationsInput{MaxResults: ptr(int32(7))}, func(association.Association) bool { return true }, n, false},
		"namespace":       {eks.ListPodIdentityAssociationsInput{Namespace: ptr("ns-3"), MaxResults: ptr(int32(11))}, func(a association.Association) bool { return a.Namespace == "ns-3" }, n / 5, false},
		"service account": {eks.ListPodIdentityAssociationsInput{ServiceAccount: ptr("sa-3")}, func(a association.Association) bool { return a.ServiceAccount == "sa-3" }, 5, false},
		"both":            {eks.ListPodIdentityAssociationsInput{Namespace: ptr("ns-3"), ServiceAccount: ptr("sa-3")}, func(a association.Association) bool { return a.Namespace == "ns-3" && a.ServiceAccount == "sa-3" }, 1, false},
		"none":            {eks.ListPodIdentityAssociationsInput{Namespace: ptr("ns")}, nil, 0, false},
	} {
		t.Run(name, func(t *testing.T) {
			q.in.ClusterName = ptr("prod")
			seen := map[string]bool{}
			p := eks.NewListPodIdentityAssociationsPaginator(c, &q.in)
			for p.HasMorePages() {
				page, err := p.NextPage(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				most := 100
				if q.in.MaxResults != nil {
					most = int(*q.in.MaxResults)
				}
				if len(page.Associations) > most {
					t.Errorf("a page of %d", len(page.Associations))
				}
				for _, s := range page.Associations {
					a := want[*s.AssociationId]
					if seen[a.ID] || !q.keep(a) || *s.AssociationArn != a.ARN || *s.ClusterName != "prod" || *s.Namespace != a.Namespace || *s.ServiceAccount != a.ServiceAccount || s.OwnerArn != nil {
						t.Errorf("got %+v", s)
					}
					seen[a.ID] = true
				}
			}
			if len(seen) != q.want {
				t.Errorf("%d of %d", len(seen), q.want)
			}
		})
	}
	// What is deleted between two pages takes nothing else with it.
	p := eks.NewListPodIdentityAssociationsPaginator(c, &eks.ListPodIdentityAssociationsInput{ClusterName: ptr("prod"), MaxResults: ptr(int32(50))})
	seen := map[string]bool{}
	gone := 0
	for p.HasMorePages() {
		page, err := p.NextPage(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for i, s := range page.Associations {
			seen[*s.AssociationId] = true
			if i%10 == 0 || i == len(page.Associations)-1 {
				if _, err := c.DeletePodIdentityAssociation(t.Context(), &eks.DeletePodIdentityAssociationInput{ClusterName: ptr("prod"), AssociationId: s.AssociationId}); err != nil {
					t.Fatal(err)
				}
				gone++
			}
		}
	}
	if len(seen) != n || gone == 0 {
		t.Errorf("saw %d of %d while %d were deleted", len(seen), n, gone)
	}
}

// A list tells nothing of namespaces that the caller may not see, and its pages
// are full all the same.
func TestListShowsOnlyWhatOneMaySee(t *testing.T) {
	w := newWorld(t, nil)
	var in []association.CreateInput
	for i := range 120 {
		ns := "secret"
		if i%6 == 0 {
			ns = "web"
		}
		in = append(in, association.CreateInput{Cluster: "prod", Namespace: ns, ServiceAccount: fmt.Sprintf("sa-%d", i), RoleARN: role("r")})
	}
	if _, err := w.store.CreateMany(t.Context(), "prod", in); err != nil {
		t.Fatal(err)
	}
	c := w.as("WEBS")
	p := eks.NewListPodIdentityAssociationsPaginator(c, &eks.ListPodIdentityAssociationsInput{ClusterName: ptr("prod"), MaxResults: ptr(int32(8))})
	var sizes []int
	for p.HasMorePages() {
		page, err := p.NextPage(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		sizes = append(sizes, len(page.Associations))
		for _, s := range page.Associations {
			if *s.Namespace != "web" {
				t.Errorf("the list tells of %s/%s", *s.Namespace, *s.ServiceAccount)
			}
		}
	}
	total := 0
	for i, n := range sizes {
		total += n
		if i < len(sizes)-2 && n != 8 {
			t.Errorf("pages of %v", sizes)
		}
	}
	if total != 20 {
		t.Errorf("%d of 20", total)
	}
	_, err := c.ListPodIdentityAssociations(t.Context(), &eks.ListPodIdentityAssociationsInput{ClusterName: ptr("prod"), Namespace: ptr("secret")})
	wantError(t, err, 403, "AccessDeniedException", "User: web is not authorized to perform: eks:ListPodIdentityAssociations on resource: arn:aws:eks:"+region+":"+account+":cluster/prod")
}

// Of many creates of one service account at once, one makes it.
func TestCreatesAtOnce(t *testing.T) {
	w := newWorld(t, nil)
	c := w.as("ADMIN")
	var wg sync.WaitGroup
	var mu sync.Mutex
	ids := map[string]bool{}
	for range 8 {
		wg.Go(func() {
			out, err := c.CreatePodIdentityAssociation(context.Background(), &eks.CreatePodIdentityAssociationInput{
				ClusterName: ptr("prod"), Namespace: ptr("web"), ServiceAccount: ptr("api"), RoleArn: ptr(role("api"))})
			if err != nil {
				if !strings.Contains(err.Error(), "ResourceInUseException: Association already exists: a-") {
					t.Error(err)
				}
				return
			}
			mu.Lock()
			ids[*out.Association.AssociationId] = true
			mu.Unlock()
		})
	}
	wg.Wait()
	if len(ids) != 1 {
		t.Errorf("made %v", ids)
	}
}

func TestErrorsWithTheSDK(t *testing.T) {
	w := newWorld(t, nil)
	id := w.create("web", "api", role("api"))
	arn := "arn:aws:eks:" + region + ":" + account + ":podidentityassociation/prod/"
	const unknown = "a-00000000000000000"
	c, ctx := w.as("ADMIN"), t.Context()
	create := func(cluster, ns, sa, roleARN string) error {
		_, err := c.CreatePodIdentityAssociation(ctx, &eks.CreatePodIdentityAssociationInput{ClusterName: &cluster, Namespace: &ns, ServiceAccount: &sa, RoleArn: &roleARN})
		return err
	}
	update := func(in eks.UpdatePodIdentityAssociationInput) error {
		in.ClusterName, in.AssociationId = ptr("prod"), &id
		_, err := c.UpdatePodIdentityAssociation(ctx, &in)
		return err
	}
	list := func(in eks.ListPodIdentityAssociationsInput) error {
		if in.ClusterName == nil {
			in.ClusterName = ptr("prod")
		}
		_, err := c.ListPodIdentityAssociations(ctx, &in)
		return err
	}
	describe := func(cluster, id string) error {
		_, err := c.DescribePodIdentityAssociation(ctx, &eks.DescribePodIdentityAssociationInput{ClusterName: &cluster, AssociationId: &id})
		return err
	}
	tag := func(arn string, tags map[string]string) error {
		_, err := c.TagResource(ctx, &eks.TagResourceInput{ResourceArn: &arn, Tags: tags})
		return err
	}
	many := map[string]string{}
	for i := range 51 {
		many[fmt.Sprint(i)] = "x"
	}
	w.unchanged(func() {
		for name, c := range map[string]struct {
			err     error
			status  int
			code    string
			message string
		}{
			"create in no cluster":       {create("none", "web", "x", role("x")), 404, "ResourceNotFoundException", "No cluster found for name: none."},
			"create with odd namespace":  {create("prod", "Web", "x", role("x")), 400, "InvalidParameterException", ""},
			"create with odd account":    {create("prod", "web", "x/y", role("x")), 400, "InvalidParameterException", ""},
			"create with foreign role":   {create("prod", "web", "x", target("x")), 400, "InvalidParameterException", "Cross-account pass role is not allowed"},
			"create with no ARN":         {create("prod", "web", "x", "api"), 400, "InvalidParameterException", ""},
			"create with empty role":     {create("prod", "web", "x", ""), 400, "InvalidParameterException", ""},
			"create with empty name":     {create("prod", "web", "", role("x")), 400, "InvalidParameterException", ""},
			"create twice":               {create("prod", "web", "api", role("x")), 409, "ResourceInUseException", "Association already exists: " + id},
			"describe in no cluster":     {describe("none", id), 404, "ResourceNotFoundException", "No cluster found for name: none."},
			"describe elsewhere":         {describe("dev", id), 404, "ResourceNotFoundException", ""},
			"describe short":             {describe("prod", "a-1"), 400, "InvalidParameterException", "The parameter associationId should be 19 characters long."},
			"describe unknown":           {describe("prod", unknown), 404, "ResourceNotFoundException", ""},
			"describe with a slash":      {describe("prod", "a-0000000000000000/"), 404, "ResourceNotFoundException", ""},
			"update nothing":             {update(eks.UpdatePodIdentityAssociationInput{}), 400, "InvalidParameterException", ""},
			"update to no role":          {update(eks.UpdatePodIdentityAssociationInput{RoleArn: ptr("")}), 400, "InvalidParameterException", "Cross-account pass role is not allowed"},
			"update to foreign role":     {update(eks.UpdatePodIdentityAssociationInput{RoleArn: ptr(target("x"))}), 400, "InvalidParameterException", "Cross-account pass role is not allowed"},
			"policy with session tags":   {update(eks.UpdatePodIdentityAssociationInput{Policy: ptr("{}")}), 400, "InvalidParameterException", ""},
			"policy that is none":        {update(eks.UpdatePodIdentityAssociationInput{Policy: ptr("[]"), DisableSessionTags: ptr(true)}), 400, "InvalidParameterException", ""},
			"list of no cluster":         {list(eks.ListPodIdentityAssociationsInput{ClusterName: ptr("none")}), 404, "ResourceNotFoundException", "No cluster found for name: none."},
			"list with 0":                {list(eks.ListPodIdentityAssociationsInput{MaxResults: ptr(int32(0))}), 400, "InvalidParameterException", ""},
			"list with 101":              {list(eks.ListPodIdentityAssociationsInput{MaxResults: ptr(int32(101))}), 400, "InvalidParameterException", ""},
			"list with -1":               {list(eks.ListPodIdentityAssociationsInput{MaxResults: ptr(int32(-1))}), 400, "InvalidParameterException", ""},
			"list with made-up token":    {list(eks.ListPodIdentityAssociationsInput{NextToken: ptr("abc")}), 400, "InvalidParameterException", ""},
			"tag nothing":                {tag(arn+id, map[string]string{}), 400, "BadRequestException", ""},
			"tag too much":               {tag(arn+id, many), 400, "BadRequestException", ""},
			"tag aws":                    {tag(arn+id, map[string]string{"AWS:x": "y"}), 400, "BadRequestException", ""},
			"tag value aws":              {tag(arn+id, map[string]string{"x": "aws:y"}), 400, "BadRequestException", ""},
			"tag empty key":              {tag(arn+id, map[string]string{"": "y"}), 400, "BadRequestException", ""},
			"tag long key":               {tag(arn+id, map[string]string{strings.Repeat("ä", 129): "y"}), 400, "BadRequestException", ""},
			"tag long value":             {tag(arn+id, map[string]string{"x": strings.Repeat("ä", 257)}), 400, "BadRequestException", ""},
			"tag unknown":                {tag(arn+unknown, map[string]string{"x": "y"}), 404, "NotFoundException", ""},
			"tag of other region's ARN":  {tag(strings.Replace(arn+id, region, "us-east-1", 1), map[string]string{"x": "y"}), 403, "InvalidSignatureException", ""},
			"tag of other account's ARN": {tag(strings.Replace(arn+id, account, other, 1), map[string]string{"x": "y"}), 404, "NotFoundException", ""},
			"tag no ARN":                 {tag("x", map[string]string{"x": "y"}), 400, "BadRequestException", ""},
			"tag an add-on":              {tag("arn:aws:eks:"+region+":"+account+":addon/prod/x/1", map[string]string{"x": "y"}), 400, "BadRequestException", ""},
			"tag an unknown cluster":     {tag("arn:aws:eks:"+region+":"+account+":cluster/none", map[string]string{"x": "y"}), 404, "NotFoundException", ""},
		} {
			t.Run(name, func(t *testing.T) { wantError(t, c.err, c.status, c.code, c.message) })
		}
	})
	// The SDK knows the errors as its own types, with the cluster's name.
	err := create("prod", "web", "api", role("x"))
	var inUse *types.ResourceInUseException
	if !asType(err, &inUse) || aws.ToString(inUse.ClusterName) != "prod" {
		t.Errorf("%v", err)
	}
}

func asType[T error](err error, into *T) bool {
	for err != nil {
		if e, ok := err.(T); ok {
			*into = e
			return true
		}
		u, ok := err.(interface{ Unwrap() error })
		if !ok {
			return false
		}
		err = u.Unwrap()
	}
	return false
}

// The wire, byte for byte as the contract has it.
func TestWire(t *testing.T) {
	w := newWorld(t, nil)
	a := w.send(raw{path: "/clusters/prod/pod-identity-associations", body: `{"namespace":"web","serviceAccount":"api","roleArn":"` + role("api") + `","unknown":{"a":[1,{}]},"targetRoleArn":null}`})
	if a.status != 200 {
		t.Fatalf("%d %s", a.status, a.body)
	}
	form := regexp.MustCompile(`^\{"association":\{"clusterName":"prod","namespace":"web","serviceAccount":"api","roleArn":"arn:aws:iam::111122223333:role/api",` +
		`"associationArn":"arn:aws:eks:eu-central-1:111122223333:podidentityassociation/prod/(a-[a-z0-9]{17})","associationId":"(a-[a-z0-9]{17})","tags":\{\},` +
		`"createdAt":[0-9]{10}(\.[0-9]{0,2}[1-9])?,"modifiedAt":[0-9]{10}(\.[0-9]{0,2}[1-9])?,"disableSessionTags":false\}\}$`)
	m := form.FindStringSubmatch(a.body)
	if m == nil {
		t.Fatalf("created: %s", a.body)
	}
	id := m[1]
	if a := w.send(raw{method: "GET", path: "/clusters/prod/pod-identity-associations/" + id}); a.status != 200 || !form.MatchString(a.body) {
		t.Errorf("described: %s", a.body)
	}
	list := fmt.Sprintf(`{"associations":[{"clusterName":"prod","namespace":"web","serviceAccount":"api","associationArn":"arn:aws:eks:eu-central-1:111122223333:podidentityassociation/prod/%s","associationId":"%s"}]}`, id, id)
	if a := w.send(raw{method: "GET", path: "/clusters/prod/pod-identity-associations?namespace=web&other=x"}); a.body != list {
		t.Errorf("listed: %s", a.body)
	}
	if a := w.send(raw{method: "GET", path: "/clusters/dev/pod-identity-associations"}); a.body != `{"associations":[]}` {
		t.Errorf("listed nothing: %s", a.body)
	}
	arn := "arn:aws:eks:" + region + ":" + account + ":podidentityassociation/prod/" + id
	for _, spelt := range []string{
		arn,
		strings.NewReplacer(":", "%3A", "/", "%2F").Replace(arn),
		strings.NewReplacer(":", "%3a", "/", "%2f").Replace(arn),
		strings.ReplaceAll(arn, "/", "%2F"),
	} {
		if a := w.send(raw{path: "/tags/" + spelt, body: `{"tags":{"a":"b"}}`}); a.status != 200 || a.body != "{}" {
			t.Errorf("tag %s: %d %s", spelt, a.status, a.body)
		}
		if a := w.send(raw{method: "GET", path: "/tags/" + spelt}); a.body != `{"tags":{"a":"b"}}` {
			t.Errorf("tags of %s: %s", spelt, a.body)
		}
		if a := w.send(raw{method: "DELETE", path: "/tags/" + spelt + "?tagKeys=a&tagKeys=b%20c"}); a.body != "{}" {
			t.Errorf("untag %s: %s", spelt, a.body)
		}
		if a := w.send(raw{method: "GET", path: "/tags/" + spelt}); a.body != `{"tags":{}}` {
			t.Errorf("tags of %s: %s", spelt, a.body)
		}
	}
	if a := w.send(raw{path: "/clusters/prod/pod-identity-associations", body: `{"namespace":"web","serviceAccount":"api","roleArn":"` + role("api") + `"}`}); a.body != `{"message":"Association already exists: `+id+`","clusterName":"prod"}` {
		t.Errorf("twice: %s", a.body)
	}
	if a := w.send(raw{method: "DELETE", path: "/clusters/prod/pod-identity-associations/" + id}); a.status != 200 || !form.MatchString(a.body) {
		t.Errorf("deleted: %s", a.body)
	}
}

// Every failure of the store is an error that the SDK knows, with its status.
func TestStoreErrorsWithTheSDK(t *testing.T) {
	for kind, want := range map[association.Kind]struct {
		status    int
		code      string
		tagStatus int
		tagCode   string
	}{
		association.InvalidParameter: {400, "InvalidParameterException", 400, "BadRequestException"},
		association.InvalidRequest:   {400, "InvalidRequestException", 400, "BadRequestException"},
		association.LimitExceeded:    {400, "ResourceLimitExceededException", 400, "BadRequestException"},
		association.ClusterNotFound:  {404, "ResourceNotFoundException", 404, "NotFoundException"},
		association.NotFound:         {404, "ResourceNotFoundException", 404, "NotFoundException"},
		association.InUse:            {409, "ResourceInUseException", 400, "BadRequestException"},
		association.BadTags:          {400, "BadRequestException", 400, "BadRequestException"},
		association.TagsNotFound:     {404, "NotFoundException", 404, "NotFoundException"},
		association.Unavailable:      {503, "ServiceUnavailableException", 503, "ServiceUnavailableException"},
		association.Internal:         {500, "ServerException", 500, "ServerException"},
	} {
		t.Run(kind.String(), func(t *testing.T) {
			message := ""
			if want.status < 500 {
				message = "the text"
			}
			w := newWorld(t, func(cfg *eksapi.Config) {
				cfg.Associations = fakeStore{err: &association.Error{Kind: kind, Message: "the text", Cluster: "prod", Cause: errors.New("a cause")}}
			})
			_, err := w.as("ADMIN").ListPodIdentityAssociations(t.Context(), &eks.ListPodIdentityAssociationsInput{ClusterName: ptr("prod")})
			wantError(t, err, want.status, want.code, message)
			var limit *types.ResourceLimitExceededException
			if kind == association.LimitExceeded && (!errors.As(err, &limit) || aws.ToString(limit.ClusterName) != "prod") {
				t.Errorf("not the SDK's own type, or without the cluster: %v", err)
			}
			_, err = w.as("ADMIN").ListTagsForResource(t.Context(), &eks.ListTagsForResourceInput{ResourceArn: ptr("arn:aws:eks:" + region + ":" + account + ":cluster/prod")})
			wantError(t, err, want.tagStatus, want.tagCode, message)
			if strings.Contains(fmt.Sprint(err), "a cause") {
				t.Errorf("the cause is told: %v", err)
			}
		})
	}
}

// What an add-on owns is seen, with its owner, and changed through that alone.
func TestOwnedWithTheSDK(t *testing.T) {
	w := newWorld(t, nil)
	addon := "arn:aws:eks:" + region + ":" + account + ":addon/prod/some-addon/1"
	a, err := w.store.Create(t.Context(), association.CreateInput{Cluster: "prod", Namespace: "web", ServiceAccount: "api", RoleARN: role("api"), OwnerARN: addon})
	if err != nil {
		t.Fatal(err)
	}
	c := w.as("ADMIN")
	described, err := c.DescribePodIdentityAssociation(t.Context(), &eks.DescribePodIdentityAssociationInput{ClusterName: ptr("prod"), AssociationId: &a.ID})
	if err != nil || aws.ToString(described.Association.OwnerArn) != addon {
		t.Errorf("%+v, %v", described, err)
	}
	listed, err := c.ListPodIdentityAssociations(t.Context(), &eks.ListPodIdentityAssociationsInput{ClusterName: ptr("prod")})
	if err != nil || len(listed.Associations) != 1 || aws.ToString(listed.Associations[0].OwnerArn) != addon {
		t.Errorf("%+v, %v", listed, err)
	}
	w.unchanged(func() {
		_, err := c.UpdatePodIdentityAssociation(t.Context(), &eks.UpdatePodIdentityAssociationInput{ClusterName: ptr("prod"), AssociationId: &a.ID, RoleArn: ptr(role("other"))})
		wantError(t, err, 400, "InvalidRequestException", "")
		_, err = c.DeletePodIdentityAssociation(t.Context(), &eks.DeletePodIdentityAssociationInput{ClusterName: ptr("prod"), AssociationId: &a.ID})
		wantError(t, err, 400, "InvalidRequestException", "")
		// Who may not change it is not told whose it is.
		_, err = w.as("READER").DeletePodIdentityAssociation(t.Context(), &eks.DeletePodIdentityAssociationInput{ClusterName: ptr("prod"), AssociationId: &a.ID})
		wantError(t, err, 403, "AccessDeniedException", "")
	})
}

// An SDK whose clock is wrong learns the time from the Date header, and goes on.
func TestSDKCorrectsItsClock(t *testing.T) {
	ahead := func() time.Time { return time.Now().Add(time.Hour) }
	w := newWorld(t, func(c *eksapi.Config) { c.Now = ahead })
	c := eks.New(eks.Options{BaseEndpoint: &w.url, Region: region, RetryMaxAttempts: 3, Credentials: aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
		return aws.Credentials{AccessKeyID: "ADMIN", SecretAccessKey: secretOf("ADMIN")}, nil
	})})
	if _, err := c.ListPodIdentityAssociations(t.Context(), &eks.ListPodIdentityAssociationsInput{ClusterName: ptr("prod")}); err != nil {
		t.Error(err)
	}
}

func TestRequestIDsDiffer(t *testing.T) {
	w := newWorld(t, nil)
	seen := map[string]bool{}
	for range 5 {
		id := w.send(raw{method: "GET", path: "/"}).header.Get("X-Amzn-Requestid")
		if seen[id] {
			t.Errorf("twice: %s", id)
		}
		seen[id] = true
	}
}

// Every change is recorded once, with what it was.
func TestChangesAreAudited(t *testing.T) {
	w := newWorld(t, nil)
	id := w.create("web", "api", role("api"))
	check := func(what string, want eksapi.Record) eksapi.Record {
		t.Helper()
		got := w.audited()
		if len(got) != 1 {
			t.Fatalf("%s: %d records: %+v", what, len(got), got)
		}
		r := got[0]
		if r.Type != eksapi.TypeChange || r.Operation != want.Operation || r.Outcome != want.Outcome || r.Status != want.Status || r.Code != want.Code ||
			r.Caller != want.Caller || r.Cluster != "prod" || r.AssociationID != id || r.RequestID == "" || r.Time.IsZero() || r.Peer == "" {
			t.Errorf("%s: got %+v", what, r)
		}
		return r
	}
	r := check("create", eksapi.Record{Operation: "CreatePodIdentityAssociation", Outcome: "done", Status: 200, Caller: "admin"})
	if r.AccessKeyID != "ADMIN" || r.ClaimedAccessKeyID != "" || r.Namespace != "web" || r.ServiceAccount != "api" || r.RoleARN != role("api") || r.State == nil || r.State.RoleARN != role("api") {
		t.Errorf("create: %+v", r)
	}
	path := "/clusters/prod/pod-identity-associations/" + id
	w.send(raw{path: path, body: `{"roleArn":"` + role("new") + `"}`})
	r = check("update", eksapi.Record{Operation: "UpdatePodIdentityAssociation", Outcome: "done", Status: 200, Caller: "admin"})
	if r.Previous == nil || r.Previous.RoleARN != role("api") || r.State == nil || r.State.RoleARN != role("new") {
		t.Errorf("update: %+v", r)
	}
	w.send(raw{path: path, user: "READER", body: `{"roleArn":"` + role("mine") + `"}`})
	r = check("update denied", eksapi.Record{Operation: "UpdatePodIdentityAssociation", Outcome: "refused", Status: 403, Code: "AccessDeniedException", Caller: "reader"})
	if r.Reason == "" || r.State != nil {
		t.Errorf("denied: %+v", r)
	}
	w.send(raw{path: path, secret: "wrong", body: `{}`})
	r = check("mis-signed", eksapi.Record{Operation: "UpdatePodIdentityAssociation", Outcome: "refused", Status: 403, Code: "InvalidSignatureException"})
	if r.ClaimedAccessKeyID != "ADMIN" || r.AccessKeyID != "" {
		t.Errorf("mis-signed: %+v", r)
	}
	w.send(raw{path: "/tags/arn:aws:eks:" + region + ":" + account + ":podidentityassociation/prod/" + id, body: `{"tags":{"b":"2","a":"1"}}`})
	if r = check("tag", eksapi.Record{Operation: "TagResource", Outcome: "done", Status: 200, Caller: "admin"}); fmt.Sprint(r.TagKeys) != "[a b]" {
		t.Errorf("tag: %+v", r)
	}
	w.send(raw{method: http.MethodDelete, path: path})
	if r = check("delete", eksapi.Record{Operation: "DeletePodIdentityAssociation", Outcome: "done", Status: 200, Caller: "admin"}); r.Previous == nil || r.State != nil {
		t.Errorf("delete: %+v", r)
	}
	// Reading is not changing.
	w.send(raw{method: http.MethodGet, path: path})
	w.send(raw{method: http.MethodGet, path: "/clusters/prod/pod-identity-associations"})
	w.send(raw{method: http.MethodPost, path: "/unknown"})
	if got := w.audited(); len(got) != 0 {
		t.Errorf("recorded: %+v", got)
	}
	b, err := json.Marshal(r)
	if err != nil || strings.Contains(string(b), "secret") {
		t.Errorf("%s, %v", b, err)
	}
}
