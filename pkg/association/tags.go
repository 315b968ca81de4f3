// SPDX-License-Identifier: Apache-2.0

package association

import (
	"context"
	"errors"
	"maps"
	"strings"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// Resource is what an ARN of a tag operation names: an association, or a
// cluster (then Association is nil).
type Resource struct {
	Cluster     Cluster
	Association *Association
}

// Tags are those of the resource, never nil.
func (r Resource) Tags() map[string]string {
	if r.Association != nil {
		return r.Association.Tags
	}
	return r.Cluster.Tags
}

func (r Resource) clone() Resource {
	r.Cluster.Tags = maps.Clone(r.Cluster.Tags)
	if r.Association != nil {
		a := clone(*r.Association)
		r.Association = &a
	}
	return r
}

func badTags(message string) *Error { return &Error{Kind: BadTags, Message: message} }

// resource finds what an ARN names.
func (s *Store) resource(ctx context.Context, arn string) (Resource, error) {
	a, err := ParseARN(arn)
	if err != nil {
		e := badTags("The resource ARN is malformed.")
		e.Cause = err
		return Resource{}, e
	}
	unknown := &Error{Kind: TagsNotFound, Message: "No resource found for ARN: " + printable(arn)}
	if a.Service != "eks" || a.Region == "" || a.Account == "" {
		return Resource{}, badTags("The resource ARN is not of this service.")
	}
	kind, name, _ := strings.Cut(a.Resource, "/")
	var out Resource
	switch kind {
	case "cluster":
		out.Cluster, err = s.Cluster(ctx, name)
		if err == nil && out.Cluster.ARN != arn {
			return Resource{}, unknown
		}
	case strings.TrimSuffix(resourceType, "/"):
		cluster, id, ok := strings.Cut(name, "/")
		if !ok || len(id) != IDLength {
			return Resource{}, badTags("The resource ARN is malformed.")
		}
		var as Association
		out.Cluster, as, _, err = s.read(ctx, cluster, id)
		if err == nil && as.ARN != arn {
			return Resource{}, unknown
		}
		out.Association = &as
	default:
		return Resource{}, unknown
	}
	if errors.Is(err, ErrClusterNotFound) || errors.Is(err, ErrNotFound) {
		return Resource{}, unknown
	}
	if err != nil {
		return Resource{}, err
	}
	return out, nil
}

// TagsOf returns the resource that arn names, with its tags. ErrBadTags if it
// is malformed, ErrTagsNotFound if there is none.
func (s *Store) TagsOf(ctx context.Context, arn string) (Resource, error) {
	ctx, cancel := s.bounded(ctx)
	defer cancel()
	return s.resource(ctx, arn)
}

// Tag merges tags into those of the resource; nothing changes if the result is
// not allowed. check, if not nil, sees the resource first, as UpdateInput.Check.
func (s *Store) Tag(ctx context.Context, arn string, tags map[string]string, check func(before Resource) error) error {
	if len(tags) == 0 {
		return badTags("At least one tag should be given.")
	}
	if p := tagProblem(tags); p != "" {
		return badTags(p)
	}
	return s.retag(ctx, arn, check, func(have map[string]string) (bool, error) {
		before := maps.Clone(have)
		maps.Copy(have, tags)
		if p := tagProblem(have); p != "" {
			return false, badTags(p)
		}
		return !maps.Equal(before, have), nil
	})
}

// Untag removes tags by key; keys that are not there are no error. check is as
// in Tag.
func (s *Store) Untag(ctx context.Context, arn string, keys []string, check func(before Resource) error) error {
	if len(keys) < 1 || len(keys) > MaxTags {
		return badTags("Between 1 and 50 tag keys should be given.")
	}
	for _, k := range keys {
		if p := tagKeyProblem(k); p != "" {
			return badTags(p)
		}
	}
	return s.retag(ctx, arn, check, func(have map[string]string) (bool, error) {
		n := len(have)
		for _, k := range keys {
			delete(have, k)
		}
		return len(have) != n, nil
	})
}

// retag changes the tags of a resource, and nothing else of it.
func (s *Store) retag(ctx context.Context, arn string, check func(Resource) error, edit func(map[string]string) (bool, error)) error {
	ctx, cancel := s.bounded(ctx)
	defer cancel()
	for {
		if err := ctx.Err(); err != nil {
			return storeError("", err)
		}
		res, err := s.resource(ctx, arn)
		if err != nil {
			return err
		}
		if check != nil {
			if err := check(res.clone()); err != nil {
				return err
			}
		}
		if changed, err := edit(res.Tags()); err != nil || !changed {
			return err
		}
		var done bool
		if a := res.Association; a != nil {
			done, err = s.replace(ctx, nil, a, tokenUse{})
		} else {
			done, err = s.replaceCluster(ctx, &res.Cluster)
		}
		if err != nil || done {
			return err
		}
	}
}

// replaceCluster stores a cluster that was read at c.Revision (0: that was not
// there), and sets its new one. It reports false if it changed since.
func (s *Store) replaceCluster(ctx context.Context, c *Cluster) (bool, error) {
	rec, err := encodeCluster(c)
	if err != nil {
		return false, &Error{Kind: Internal, Cluster: c.Name, Message: "The cluster could not be stored.", Cause: err}
	}
	key := s.keys.cluster(c.Name)
	r, err := s.kv.Txn(ctx).
		If(clientv3.Compare(clientv3.ModRevision(key), "=", c.Revision)).
		Then(clientv3.OpPut(key, rec)).Commit()
	if err != nil {
		return false, storeError(c.Name, err)
	}
	if r.Succeeded {
		c.Revision = r.Header.Revision
	}
	return r.Succeeded, nil
}
