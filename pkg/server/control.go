// SPDX-License-Identifier: Apache-2.0

package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/latchkey-dev/latchkey/pkg/association"
	"github.com/latchkey-dev/latchkey/pkg/eksapi"
)

// store is what the control needs of association.Store.
type store interface {
	Create(context.Context, association.CreateInput) (association.Association, error)
	Describe(ctx context.Context, cluster, id string) (association.Association, error)
	List(context.Context, association.ListInput) (association.ListOutput, error)
	Update(context.Context, association.UpdateInput) (association.Association, error)
	Delete(context.Context, association.DeleteInput) (association.Association, error)
	PutCluster(context.Context, association.Cluster) (association.Cluster, error)
	DeleteCluster(ctx context.Context, name string, force bool) error
	Cluster(ctx context.Context, name string) (association.Cluster, error)
	Clusters(ctx context.Context) ([]association.Cluster, error)
}

// control is what an operator may do over the admin socket. It works on the
// store without permissions: who can open the socket owns the state directory.
type control struct {
	store store
	now   func() time.Time
	// changed is told of every change, made or refused.
	changed func(changeRecord)
	// seen waits until the index has reached a revision, for a moment: whoever
	// made a change may use it at once. Nil waits for nothing.
	seen func(ctx context.Context, revision int64)
}

func (c *control) settle(ctx context.Context, revision int64) {
	if c.seen != nil {
		c.seen(ctx, revision)
	}
}

// changeRecord is the audit record of a change made over the admin socket, by
// the configuration file or by the users file. Its members are those of eksapi.Record, which is that
// of a change made by a client.
type changeRecord struct {
	Time          time.Time `json:"time"`
	Type          string    `json:"type"`
	Operation     string    `json:"operation"`
	Outcome       string    `json:"outcome"`
	Error         string    `json:"error,omitempty"`
	Caller        string    `json:"caller"`
	Cluster       string    `json:"cluster,omitempty"`
	AssociationID string    `json:"association_id,omitempty"`
	// State is what the change led to, Previous what it found.
	State    any `json:"state,omitempty"`
	Previous any `json:"previous,omitempty"`
}

func (c *control) note(who, operation, cluster, id string, before, after any, err error) {
	r := changeRecord{
		Time: c.now().UTC(), Type: eksapi.TypeChange, Operation: operation, Outcome: eksapi.OutcomeDone, Caller: who,
		Cluster: cluster, AssociationID: id, Previous: before, State: after,
	}
	if err != nil {
		r.Outcome, r.Error, r.State = eksapi.OutcomeRefused, err.Error(), nil
		if errors.Is(err, association.ErrUnavailable) || errors.Is(err, association.ErrInternal) {
			r.Outcome = eksapi.OutcomeFailed
		}
	}
	c.changed(r)
}

// errExists: a cluster of that name is there, and nobody said to replace it.
var errExists = errors.New("there is a cluster of this name; --replace changes its settings")

// putCluster adds a cluster, or replaces the settings of one.
func (c *control) putCluster(ctx context.Context, who string, spec ClusterSpec, replace bool) (ClusterSpec, error) {
	if _, err := spec.Resolve(); err != nil {
		return ClusterSpec{}, err
	}
	wished, err := spec.cluster()
	if err != nil {
		return ClusterSpec{}, err
	}
	var before any
	old, err := c.store.Cluster(ctx, wished.Name)
	switch {
	case err == nil && !replace:
		return ClusterSpec{}, &association.Error{Kind: association.InUse, Message: errExists.Error(), Cluster: wished.Name, Cause: nil}
	case err == nil:
		before = summaryOf(old)
	case !errors.Is(err, association.ErrClusterNotFound):
		return ClusterSpec{}, err
	}
	done, err := c.store.PutCluster(ctx, wished)
	after := summaryOf(done)
	c.note(who, "PutCluster", wished.Name, "", before, after, err)
	if err != nil {
		return ClusterSpec{}, err
	}
	c.settle(ctx, done.Revision)
	return specOf(done), nil
}

// summaryOf is a cluster for the audit log: fingerprints instead of keys.
func summaryOf(c association.Cluster) ClusterSpec {
	s := specOf(c)
	s.Keys = nil
	return s
}

// configured puts the clusters of the configuration file, where they differ.
func (c *control) configured(ctx context.Context, specs []ClusterSpec) error {
	for _, s := range specs {
		wished, err := s.cluster()
		if err != nil {
			return err
		}
		if old, err := c.store.Cluster(ctx, s.Name); err == nil && sameCluster(old, wished) {
			continue
		}
		if _, err := c.putCluster(ctx, "configuration file", s, true); err != nil {
			return fmt.Errorf("%w: cluster %s: %w", ErrConfig, s.Name, err)
		}
	}
	return nil
}

// sameCluster compares what a file can set.
func sameCluster(a, b association.Cluster) bool {
	x, y := specOf(a), specOf(b)
	if b.ARN == "" {
		y.ARN = x.ARN
	}
	x.CreatedAt, x.ModifiedAt, y.CreatedAt, y.ModifiedAt = nil, nil, nil, nil
	return equalJSON(x, y)
}

func (c *control) deleteCluster(ctx context.Context, who, name string, force bool) error {
	old, err := c.store.Cluster(ctx, name)
	if err != nil {
		return err
	}
	err = c.store.DeleteCluster(ctx, name, force)
	c.note(who, "DeleteCluster", name, "", summaryOf(old), nil, err)
	return err
}

func (c *control) clusters(ctx context.Context) ([]ClusterSpec, error) {
	all, err := c.store.Clusters(ctx)
	if err != nil {
		return nil, err
	}
	out := make([]ClusterSpec, 0, len(all))
	for _, one := range all {
		out = append(out, specOf(one))
	}
	return out, nil
}

// list gives every association of a cluster that the filters allow.
func (c *control) list(ctx context.Context, cluster, namespace, serviceAccount string) ([]association.Association, error) {
	var out []association.Association
	in := association.ListInput{Cluster: cluster, Namespace: namespace, ServiceAccount: serviceAccount}
	for {
		page, err := c.store.List(ctx, in)
		if err != nil {
			return nil, err
		}
		out = append(out, page.Associations...)
		if page.NextToken == "" {
			return out, nil
		}
		in.NextToken = page.NextToken
	}
}

// find is the association of an ID, or of NAMESPACE/SERVICEACCOUNT, which is
// what people know.
func (c *control) find(ctx context.Context, cluster, namespace, serviceAccount, id string) (association.Association, error) {
	if id != "" {
		return c.store.Describe(ctx, cluster, id)
	}
	found, err := c.list(ctx, cluster, namespace, serviceAccount)
	if err != nil {
		return association.Association{}, err
	}
	if len(found) != 1 {
		return association.Association{}, &association.Error{
			Kind: association.NotFound, Cluster: cluster,
			Message: fmt.Sprintf("cluster %s has no association for service account %s/%s", cluster, namespace, serviceAccount),
		}
	}
	return found[0], nil
}

func (c *control) create(ctx context.Context, who string, s AssociationSpec) (association.Association, error) {
	a, err := c.store.Create(ctx, association.CreateInput{
		Cluster: s.Cluster, Namespace: s.Namespace, ServiceAccount: s.ServiceAccount, RoleARN: s.RoleARN,
		TargetRoleARN: nonEmpty(s.TargetRoleARN), Policy: nonEmpty(string(s.Policy)),
		DisableSessionTags: s.DisableSessionTags, Tags: s.Tags, ClientToken: uuid.NewString(),
	})
	var after any = s.declared()
	if err == nil {
		after = associationSpecOf(a)
	}
	c.note(who, "CreatePodIdentityAssociation", s.Cluster, a.ID, nil, after, err)
	return a, err
}

// Update is what `association update` changes; nil keeps.
type Update struct {
	RoleARN            *string `json:"roleArn,omitempty"`
	TargetRoleARN      *string `json:"targetRoleArn,omitempty"`
	Policy             *string `json:"policy,omitempty"`
	DisableSessionTags *bool   `json:"disableSessionTags,omitempty"`
	// Tags replaces all tags.
	Tags *map[string]string `json:"tags,omitempty"`
}

// Empty: it changes nothing.
func (u Update) Empty() bool {
	return u.RoleARN == nil && u.TargetRoleARN == nil && u.Policy == nil && u.DisableSessionTags == nil && u.Tags == nil
}

// update is one transaction, tags included.
func (c *control) update(ctx context.Context, who string, is association.Association, u Update) (association.Association, error) {
	a, err := c.store.Update(ctx, association.UpdateInput{
		Cluster: is.Cluster, ID: is.ID, RoleARN: u.RoleARN, TargetRoleARN: u.TargetRoleARN,
		Policy: u.Policy, DisableSessionTags: u.DisableSessionTags, Tags: u.Tags, ClientToken: uuid.NewString(),
	})
	var after any
	if err == nil {
		after = associationSpecOf(a)
	}
	c.note(who, "UpdatePodIdentityAssociation", is.Cluster, is.ID, associationSpecOf(is), after, err)
	return a, err
}

func (c *control) remove(ctx context.Context, who string, is association.Association) (association.Association, error) {
	a, err := c.store.Delete(ctx, association.DeleteInput{Cluster: is.Cluster, ID: is.ID})
	c.note(who, "DeletePodIdentityAssociation", is.Cluster, is.ID, associationSpecOf(is), nil, err)
	return a, err
}

// importFile makes a cluster's associations what the file says. A step that
// fails is in the plan, and the others are done all the same: what is wrong with
// one association must not hold up five hundred.
func (c *control) importFile(ctx context.Context, who string, f AssociationFile, prune, dryRun bool) (Plan, error) {
	there, err := c.list(ctx, f.Cluster, "", "")
	if err != nil {
		return Plan{}, err
	}
	p := makePlan(there, f, prune)
	p.DryRun = dryRun
	if dryRun {
		return p, nil
	}
	newest := int64(0)
	defer func() { c.settle(ctx, newest) }()
	for i := range p.Changes {
		ch := &p.Changes[i]
		var a association.Association
		var err error
		switch ch.Action {
		case ActionConflict:
			continue
		case ActionCreate:
			a, err = c.create(ctx, who, ch.after)
			ch.ID = a.ID
		case ActionUpdate:
			is := there[slices.IndexFunc(there, func(a association.Association) bool { return a.ID == ch.ID })]
			a, err = c.update(ctx, who, is, updateFor(is, ch.after))
		case ActionDelete:
			is := there[slices.IndexFunc(there, func(a association.Association) bool { return a.ID == ch.ID })]
			if _, err = c.remove(ctx, who, is); errors.Is(err, association.ErrNotFound) {
				err = nil // somebody else was faster
			}
		}
		if err != nil {
			if errors.Is(err, association.ErrUnavailable) || ctx.Err() != nil {
				return p, err
			}
			ch.Error = err.Error()
			continue
		}
		ch.Applied, newest = true, max(newest, a.Revision)
	}
	return p, nil
}

// updateFor is the update that makes an association as wished.
func updateFor(is association.Association, wished AssociationSpec) Update {
	var u Update
	if is.RoleARN != wished.RoleARN {
		u.RoleARN = &wished.RoleARN
	}
	if is.TargetRoleARN != wished.TargetRoleARN {
		u.TargetRoleARN = &wished.TargetRoleARN
	}
	if policy := string(wished.Policy); is.Policy != policy {
		u.Policy = &policy
	}
	if is.DisableSessionTags != wished.DisableSessionTags {
		u.DisableSessionTags = &wished.DisableSessionTags
	}
	if tagText(is.Tags) != tagText(wished.Tags) {
		tags := wished.Tags
		if tags == nil {
			tags = map[string]string{}
		}
		u.Tags = &tags
	}
	return u
}

func nonEmpty(s string) *string {
	if s == "" {
		return nil
	}
	return &s
}
