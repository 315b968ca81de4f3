// SPDX-License-Identifier: Apache-2.0

package association

import (
	"context"
	"errors"
	"maps"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// PutCluster creates the cluster or replaces its settings, and returns what is
// stored. Name, ARN, region and account of a cluster cannot change. Nil Tags
// keep those that are there. What is equal already is not written again.
func (s *Store) PutCluster(ctx context.Context, c Cluster) (Cluster, error) {
	ctx, cancel := s.bounded(ctx)
	defer cancel()
	if err := c.Validate(); err != nil {
		return Cluster{}, err
	}
	for {
		if err := ctx.Err(); err != nil {
			return Cluster{}, storeError(c.Name, err)
		}
		have, err := s.Cluster(ctx, c.Name)
		if err != nil && !errors.Is(err, ErrClusterNotFound) {
			return Cluster{}, err
		}
		if err == nil && have.ARN != c.ARN {
			return Cluster{}, invalid(c.Name, "The region, account and ARN of cluster %s cannot change: it is %s.", c.Name, have.ARN)
		}
		next := c
		next.Tags = maps.Clone(c.Tags)
		if next.Tags == nil {
			next.Tags = have.Tags
		}
		if next.Tags == nil {
			next.Tags = map[string]string{}
		}
		next.CreatedAt, next.ModifiedAt, next.Revision = have.CreatedAt, have.ModifiedAt, have.Revision
		if have.Revision != 0 && sameSettings(&have, &next) {
			return have, nil
		}
		next.ModifiedAt = s.now()
		if have.Revision == 0 {
			next.CreatedAt = next.ModifiedAt
		}
		done, err := s.replaceCluster(ctx, &next)
		if err != nil {
			return Cluster{}, err
		}
		if done {
			return next, nil
		}
	}
}

// sameSettings compares by what is stored.
func sameSettings(a, b *Cluster) bool {
	x, err := encodeCluster(a)
	if err != nil {
		return false
	}
	y, err := encodeCluster(b)
	return err == nil && x == y
}

// DeleteCluster removes a cluster. One that has associations is ErrInUse,
// unless forced: then they go with it, all at one moment.
func (s *Store) DeleteCluster(ctx context.Context, name string, force bool) error {
	ctx, cancel := s.bounded(ctx)
	defer cancel()
	for {
		if err := ctx.Err(); err != nil {
			return storeError(name, err)
		}
		c, err := s.Cluster(ctx, name)
		if err != nil {
			return err
		}
		// Creates require the cluster as they read it, so none slips in beside this.
		cmps := []clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(s.keys.cluster(name)), "=", c.Revision)}
		if !force {
			// Holds if the range is empty: what exists has a creation revision.
			cmps = append(cmps, clientv3.Compare(clientv3.CreateRevision(s.keys.associations(name)), "=", 0).WithPrefix())
		}
		r, err := s.kv.Txn(ctx).If(cmps...).Then(
			clientv3.OpDelete(s.keys.cluster(name)),
			clientv3.OpDelete(s.keys.associations(name), clientv3.WithPrefix()),
			clientv3.OpDelete(s.keys.subjects(name), clientv3.WithPrefix()),
			clientv3.OpDelete(s.keys.tokens(name), clientv3.WithPrefix()),
		).Else(
			clientv3.OpGet(s.keys.associations(name), clientv3.WithPrefix(), clientv3.WithCountOnly()),
		).Commit()
		if err != nil {
			return storeError(name, err)
		}
		if r.Succeeded {
			s.slots.drop(name)
			return nil
		}
		if !force && r.Responses[0].GetResponseRange().Count > 0 {
			return &Error{Kind: InUse, Cluster: name, Message: "Cluster has pod identity associations: " + name + "."}
		}
	}
}

// Cluster returns a cluster, or ErrClusterNotFound.
func (s *Store) Cluster(ctx context.Context, name string) (Cluster, error) {
	ctx, cancel := s.bounded(ctx)
	defer cancel()
	if !ValidClusterName(name) {
		return Cluster{}, noCluster(name)
	}
	r, err := s.kv.Txn(ctx).Then(clientv3.OpGet(s.keys.cluster(name))).Commit()
	if err != nil {
		return Cluster{}, storeError(name, err)
	}
	return s.clusterAt(ctx, name, r, 0)
}

// Clusters returns all clusters in the order of their names.
func (s *Store) Clusters(ctx context.Context) ([]Cluster, error) {
	ctx, cancel := s.bounded(ctx)
	defer cancel()
	r, err := s.kv.Get(ctx, s.keys.clusters(), clientv3.WithPrefix())
	if err != nil {
		return nil, storeError("", err)
	}
	out := make([]Cluster, 0, len(r.Kvs))
	for _, kv := range r.Kvs {
		c, err := decodeCluster(kv.Key, kv.Value, kv.ModRevision)
		if err != nil {
			return nil, s.damaged(ctx, "", err)
		}
		out = append(out, c)
	}
	return out, nil
}
