// SPDX-License-Identifier: Apache-2.0

package association

import (
	"context"
	"log/slog"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// Config is what a Store needs.
type Config struct {
	// Client speaks to etcd. The store does not close it.
	Client *clientv3.Client
	// Prefix is where in etcd everything is kept; empty: DefaultPrefix.
	Prefix string
	// Now is the clock; nil: time.Now.
	Now func() time.Time
	// NewID makes the 14 random characters of an ID, for tests; nil: crypto/rand.
	NewID func() string
	// Limit is how many associations a cluster may have; 0: DefaultLimit.
	Limit int
	// TokenLife is how long client tokens are remembered; 0: DefaultTokenLife.
	TokenLife time.Duration
	// Timeout bounds every call, whatever its context says; 0: 5 s.
	Timeout time.Duration
	// Log is told of what clients are not; nil: nothing is.
	Log *slog.Logger
}

// DefaultPrefix is where in etcd a store keeps everything.
const DefaultPrefix = "/latchkey/v1/"

// Store is associations and clusters in etcd. It keeps nothing that another
// server with the same etcd would have to know.
type Store struct{ cfg Config }

// NewStore makes a store over a client. It does not speak to etcd yet.
func NewStore(cfg Config) *Store { return &Store{cfg: cfg} }

func todo() error { return &Error{Kind: Unavailable, Message: "not yet"} }

// Create makes an association.
func (s *Store) Create(ctx context.Context, in CreateInput) (Association, error) {
	return Association{}, todo()
}

// Describe returns one association.
func (s *Store) Describe(ctx context.Context, cluster, id string) (Association, error) {
	return Association{}, todo()
}

// List returns a page of a cluster's associations.
func (s *Store) List(ctx context.Context, in ListInput) (ListOutput, error) {
	return ListOutput{}, todo()
}

// Update changes an association and returns it.
func (s *Store) Update(ctx context.Context, in UpdateInput) (Association, error) {
	return Association{}, todo()
}

// Delete ends an association and returns what it was.
func (s *Store) Delete(ctx context.Context, in DeleteInput) (Association, error) {
	return Association{}, todo()
}

// Resource is what an ARN of a tag operation names: an association, or a
// cluster (then Association is nil).
type Resource struct {
	Cluster     Cluster
	Association *Association
}

// Tag merges tags into those of the resource; nothing changes if the result is
// not allowed. check, if not nil, sees the resource first, as UpdateInput.Check.
func (s *Store) Tag(ctx context.Context, arn string, tags map[string]string, check func(before Resource) error) error {
	return todo()
}

// Untag removes tags by key; keys that are not there are no error. check is as
// in Tag.
func (s *Store) Untag(ctx context.Context, arn string, keys []string, check func(before Resource) error) error {
	return todo()
}

// TagsOf returns the resource that arn names, with its tags.
func (s *Store) TagsOf(ctx context.Context, arn string) (Resource, error) {
	return Resource{}, todo()
}

// PutCluster creates the cluster or replaces its settings, and returns what is
// stored. Name, ARN, region and account of a cluster cannot change.
func (s *Store) PutCluster(ctx context.Context, c Cluster) (Cluster, error) {
	return Cluster{}, todo()
}

// DeleteCluster removes a cluster. One that has associations is ErrInUse,
// unless forced: then they go with it.
func (s *Store) DeleteCluster(ctx context.Context, name string, force bool) error { return todo() }

// Cluster returns a cluster, or ErrClusterNotFound.
func (s *Store) Cluster(ctx context.Context, name string) (Cluster, error) { return Cluster{}, todo() }

// Clusters returns all clusters in the order of their names.
func (s *Store) Clusters(ctx context.Context) ([]Cluster, error) { return nil, todo() }

// CreateMany makes associations of one cluster in few, large transactions, for
// seeding and imports: each batch as a whole or not at all. It returns what was
// made, in the order of in; after an error, that is the part before it.
func (s *Store) CreateMany(ctx context.Context, cluster string, in []CreateInput) ([]Association, error) {
	return nil, todo()
}
