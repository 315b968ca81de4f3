// SPDX-License-Identifier: Apache-2.0

package eksapi

import (
	"context"
	"maps"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/association"
	"github.com/latchkey-dev/latchkey/pkg/permission"
)

// fullAssociation is an association in answers. Members that are not set are
// left out, but for tags and disableSessionTags, which the service always sends.
type fullAssociation struct {
	Cluster            string            `json:"clusterName"`
	Namespace          string            `json:"namespace"`
	ServiceAccount     string            `json:"serviceAccount"`
	RoleARN            string            `json:"roleArn"`
	ARN                string            `json:"associationArn"`
	ID                 string            `json:"associationId"`
	Tags               map[string]string `json:"tags"`
	CreatedAt          seconds           `json:"createdAt"`
	ModifiedAt         seconds           `json:"modifiedAt"`
	OwnerARN           string            `json:"ownerArn,omitempty"`
	DisableSessionTags bool              `json:"disableSessionTags"`
	TargetRoleARN      string            `json:"targetRoleArn,omitempty"`
	ExternalID         string            `json:"externalId,omitempty"`
	Policy             string            `json:"policy,omitempty"`
}

type associationAnswer struct {
	Association fullAssociation `json:"association"`
}

func full(a association.Association) associationAnswer {
	tags := a.Tags
	if tags == nil {
		tags = map[string]string{}
	}
	return associationAnswer{fullAssociation{
		Cluster: a.Cluster, Namespace: a.Namespace, ServiceAccount: a.ServiceAccount, RoleARN: a.RoleARN,
		ARN: a.ARN, ID: a.ID, Tags: tags, CreatedAt: seconds(a.CreatedAt), ModifiedAt: seconds(a.ModifiedAt),
		OwnerARN: a.OwnerARN, DisableSessionTags: a.DisableSessionTags, TargetRoleARN: a.TargetRoleARN,
		ExternalID: a.ExternalID, Policy: a.Policy,
	}}
}

type summary struct {
	Cluster        string `json:"clusterName"`
	Namespace      string `json:"namespace"`
	ServiceAccount string `json:"serviceAccount"`
	ARN            string `json:"associationArn"`
	ID             string `json:"associationId"`
	OwnerARN       string `json:"ownerArn,omitempty"`
}

type listAnswer struct {
	Associations []summary `json:"associations"`
	NextToken    string    `json:"nextToken,omitempty"`
}

type tagsAnswer struct {
	Tags map[string]string `json:"tags"`
}

type emptyAnswer struct{}

// enterCluster is what every operation on a cluster's associations begins with:
// the caller has something to do with it, it exists, and the signature is for
// its region.
func (c *call) enterCluster() (association.Cluster, error) {
	resource := "cluster/" + shown(c.route.cluster)
	if c.route.id != "" {
		resource = "podidentityassociation/" + shown(c.route.cluster) + "/" + shown(c.route.id)
	}
	if err := c.allowSomewhere(resource); err != nil {
		return association.Cluster{}, err
	}
	cluster, err := c.Associations.Cluster(c.r.Context(), c.route.cluster)
	if err != nil {
		return cluster, err
	}
	return cluster, c.checkRegion(cluster)
}

// forAssociation is a request for permission on what is there.
func (c *call) forAssociation(a association.Association) permission.Request {
	return permission.Request{Action: c.route.op.action, Cluster: a.Cluster, Namespace: a.Namespace, Resource: a.ARN, ResourceTags: a.Tags}
}

// settle waits until this server issues credentials by a change, before the
// change is answered: who asks here next sees it. It does not fail: other
// servers and a slow watch are what callers have to expect anyway.
func (c *call) settle(revision int64) {
	ctx, cancel := context.WithTimeout(c.r.Context(), time.Second)
	defer cancel()
	_ = c.Index.Wait(ctx, revision)
}

func (c *call) create() (any, error) {
	cluster, err := c.enterCluster()
	if err != nil {
		return nil, err
	}
	in := association.CreateInput{Cluster: cluster.Name}
	if err := c.decode(
		member{"namespace", &in.Namespace}, member{"serviceAccount", &in.ServiceAccount},
		member{"roleArn", &in.RoleARN}, member{"targetRoleArn", &in.TargetRoleARN},
		member{"policy", &in.Policy}, member{"disableSessionTags", &in.DisableSessionTags},
		member{"tags", &in.Tags}, member{"clientRequestToken", &in.ClientToken},
	); err != nil {
		return nil, err
	}
	c.record.Namespace, c.record.ServiceAccount = in.Namespace, in.ServiceAccount
	c.record.RoleARN, c.record.TargetRoleARN = in.RoleARN, value(in.TargetRoleARN)
	for _, required := range [...]struct{ name, value string }{
		{"namespace", in.Namespace}, {"serviceAccount", in.ServiceAccount}, {"roleArn", in.RoleARN},
	} {
		if required.value == "" {
			return nil, c.invalidParameter("The parameter " + required.name + " is required.")
		}
	}
	allowed := func(cluster association.Cluster, roles ...string) error {
		return c.allow(permission.Request{Action: c.route.op.action, Cluster: cluster.Name, Namespace: in.Namespace,
			Resource: cluster.ARN, PassRoles: roles, ResourceTags: cluster.Tags, RequestTags: in.Tags})
	}
	// Now, so that who may not is told that and not what is wrong with the request;
	// and again in the transaction, whose cluster may have other tags.
	if err := allowed(cluster, in.RoleARN, value(in.TargetRoleARN)); err != nil {
		return nil, err
	}
	in.Allow = func(cluster association.Cluster) error {
		return allowed(cluster, in.RoleARN, value(in.TargetRoleARN))
	}
	// A repeated call is answered with what the first one made, which somebody else
	// may have changed since.
	in.Check = func(cluster association.Cluster, existing association.Association) error {
		return allowed(cluster, existing.RoleARN, existing.TargetRoleARN)
	}
	a, err := c.Associations.Create(c.r.Context(), in)
	if err != nil {
		return nil, err
	}
	c.record.association(a)
	c.settle(a.Revision)
	return full(a), nil
}

func (c *call) describe() (any, error) {
	if _, err := c.enterCluster(); err != nil {
		return nil, err
	}
	a, err := c.Associations.Describe(c.r.Context(), c.route.cluster, c.route.id)
	if err != nil {
		return nil, err
	}
	if err := c.allow(c.forAssociation(a)); err != nil {
		return nil, err
	}
	return full(a), nil
}

func (c *call) list() (any, error) {
	cluster, err := c.enterCluster()
	if err != nil {
		return nil, err
	}
	query, err := url.ParseQuery(c.r.URL.RawQuery)
	if err != nil {
		return nil, c.invalidParameter("The query is malformed.")
	}
	in := association.ListInput{Cluster: cluster.Name}
	for name, into := range map[string]*string{"namespace": &in.Namespace, "serviceAccount": &in.ServiceAccount, "nextToken": &in.NextToken} {
		if *into, _, err = c.one(query, name); err != nil {
			return nil, err
		}
	}
	most, ok, err := c.one(query, "maxResults")
	if err != nil {
		return nil, err
	}
	if ok {
		n, err := strconv.Atoi(most)
		if err != nil {
			return nil, c.invalidParameter("The parameter maxResults must be a number from 1 to " + strconv.Itoa(association.MaxPage) + ".")
		}
		in.MaxResults = &n
	}
	request := permission.Request{Action: c.route.op.action, Cluster: cluster.Name, Namespace: in.Namespace,
		AnyNamespace: in.Namespace == "", Resource: cluster.ARN, ResourceTags: cluster.Tags}
	if err := c.allow(request); err != nil {
		return nil, err
	}
	// A list must not tell of namespaces that the caller may not see.
	request.AnyNamespace = false
	seen := map[string]bool{}
	in.Keep = func(a association.Association) bool {
		keep, ok := seen[a.Namespace]
		if !ok {
			r := request
			r.Namespace = a.Namespace
			keep = c.caller.Allow(r).Allowed
			seen[a.Namespace] = keep
		}
		return keep
	}
	out, err := c.Associations.List(c.r.Context(), in)
	if err != nil {
		return nil, err
	}
	answer := listAnswer{Associations: make([]summary, 0, len(out.Associations)), NextToken: out.NextToken}
	for _, a := range out.Associations {
		answer.Associations = append(answer.Associations, summary{a.Cluster, a.Namespace, a.ServiceAccount, a.ARN, a.ID, a.OwnerARN})
	}
	return answer, nil
}

func (c *call) update() (any, error) {
	cluster, err := c.enterCluster()
	if err != nil {
		return nil, err
	}
	in := association.UpdateInput{Cluster: cluster.Name, ID: c.route.id}
	if err := c.decode(
		member{"roleArn", &in.RoleARN}, member{"targetRoleArn", &in.TargetRoleARN}, member{"policy", &in.Policy},
		member{"disableSessionTags", &in.DisableSessionTags}, member{"clientRequestToken", &in.ClientToken},
	); err != nil {
		return nil, err
	}
	in.Check = func(before association.Association) error {
		c.record.association(before)
		c.record.Previous = state(before)
		r := c.forAssociation(before)
		// All roles that it will have, also those that stay: whoever may not pass a
		// role may not widen what its pods can do with it either, by clearing a
		// policy or choosing its target.
		r.PassRoles = []string{or(in.RoleARN, before.RoleARN), or(in.TargetRoleARN, before.TargetRoleARN)}
		return c.allow(r)
	}
	a, err := c.Associations.Update(c.r.Context(), in)
	if err != nil {
		return nil, err
	}
	c.record.association(a)
	c.settle(a.Revision)
	return full(a), nil
}

func (c *call) delete() (any, error) {
	cluster, err := c.enterCluster()
	if err != nil {
		return nil, err
	}
	a, err := c.Associations.Delete(c.r.Context(), association.DeleteInput{
		Cluster: cluster.Name, ID: c.route.id,
		Check: func(before association.Association) error {
			c.record.association(before)
			return c.allow(c.forAssociation(before))
		},
	})
	if err != nil {
		return nil, err
	}
	c.record.association(a)
	c.record.State, c.record.Previous = nil, state(a)
	c.settle(a.Revision)
	return full(a), nil
}

// enterTags is what every tag operation begins with.
func (c *call) enterTags() error {
	arn, err := association.ParseARN(c.route.arn)
	if err != nil || arn.Service != "eks" {
		return c.invalidParameter("The resource ARN is invalid.")
	}
	kind, rest, _ := strings.Cut(arn.Resource, "/")
	cluster, id, _ := strings.Cut(rest, "/")
	switch kind {
	case "podidentityassociation":
		c.record.AssociationARN, c.record.AssociationID = c.route.arn, id
	case "cluster":
	default:
		return c.invalidParameter("The resource ARN is not of a pod identity association or a cluster.")
	}
	c.route.cluster = cluster
	if err := c.allowSomewhere(shown(arn.Resource)); err != nil {
		return err
	}
	return c.checkRegion(association.Cluster{Region: arn.Region})
}

// forResource is a request for permission on what has the tags.
func (c *call) forResource(r association.Resource) permission.Request {
	if r.Association != nil {
		c.record.association(*r.Association)
		return c.forAssociation(*r.Association)
	}
	return permission.Request{Action: c.route.op.action, Cluster: r.Cluster.Name, Resource: r.Cluster.ARN, ResourceTags: r.Cluster.Tags}
}

func (c *call) listTags() (any, error) {
	if err := c.enterTags(); err != nil {
		return nil, err
	}
	resource, err := c.Associations.TagsOf(c.r.Context(), c.route.arn)
	if err != nil {
		return nil, err
	}
	request := c.forResource(resource)
	if err := c.allow(request); err != nil {
		return nil, err
	}
	tags := request.ResourceTags
	if tags == nil {
		tags = map[string]string{}
	}
	return tagsAnswer{tags}, nil
}

func (c *call) tag() (any, error) {
	if err := c.enterTags(); err != nil {
		return nil, err
	}
	var tags map[string]string
	if err := c.decode(member{"tags", &tags}); err != nil {
		return nil, err
	}
	c.record.TagKeys = keysOf(tags)
	return emptyAnswer{}, c.Associations.Tag(c.r.Context(), c.route.arn, tags, func(before association.Resource) error {
		r := c.forResource(before)
		r.RequestTags = tags
		after := maps.Clone(r.ResourceTags)
		if after == nil {
			after = map[string]string{}
		}
		maps.Copy(after, tags)
		return c.allowRetag(r, after)
	})
}

func (c *call) untag() (any, error) {
	if err := c.enterTags(); err != nil {
		return nil, err
	}
	query, err := url.ParseQuery(c.r.URL.RawQuery)
	if err != nil {
		return nil, c.invalidParameter("The query is malformed.")
	}
	keys := query["tagKeys"]
	c.record.TagKeys = bounded(keys)
	return emptyAnswer{}, c.Associations.Untag(c.r.Context(), c.route.arn, keys, func(before association.Resource) error {
		r := c.forResource(before)
		after := maps.Clone(r.ResourceTags)
		for _, k := range keys {
			delete(after, k)
		}
		return c.allowRetag(r, after)
	})
}

func (c *call) allowRetag(r permission.Request, after map[string]string) error {
	if d := c.caller.AllowRetag(r, after); !d.Allowed {
		return c.deny(d)
	}
	return nil
}

func value(s *string) string {
	if s == nil {
		return ""
	}
	return *s
}

func or(s *string, otherwise string) string {
	if s == nil {
		return otherwise
	}
	return *s
}
