// SPDX-License-Identifier: Apache-2.0

package association

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/big"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
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
	// NewID makes the last 14 characters of an ID, of [a-z0-9], for tests; nil:
	// random ones.
	NewID func() string
	// Limit is how many associations a cluster may have; 0: DefaultLimit. At most
	// MaxLimit.
	Limit int
	// TokenLife is how long client tokens are remembered; 0: DefaultTokenLife.
	TokenLife time.Duration
	// Timeout bounds every call, whatever its context says; 0: DefaultTimeout.
	Timeout time.Duration
	// MaxTxnOps is how many operations etcd takes in one transaction, which
	// CreateMany makes use of; 0: 128, etcd's own default.
	MaxTxnOps int
	// Log is told of what clients are not; nil: nothing is.
	Log *slog.Logger
}

const (
	// DefaultPrefix is where in etcd a store keeps everything.
	DefaultPrefix = "/latchkey/v1/"
	// DefaultTimeout is short enough for a client to try again within its own.
	DefaultTimeout = 5 * time.Second
	// defaultMaxTxnOps is etcd's.
	defaultMaxTxnOps = 128
	// maxTxnBytes stays below etcd's default for a request, 1.5 MiB.
	maxTxnBytes = 1 << 20
	// scanPage is how many records a filtered list reads at once.
	scanPage = 1000
)

// Store is associations and clusters in etcd. It keeps nothing in memory that
// another server with the same etcd would have to know. All its errors are of
// type *Error, but those of a Check function.
type Store struct {
	cfg    Config
	kv     clientv3.KV
	keys   layout
	slots  slots
	leases leases
}

// NewStore makes a store over a client. It does not speak to etcd yet.
func NewStore(cfg Config) *Store {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.NewID == nil {
		cfg.NewID = newID
	}
	if cfg.Limit == 0 {
		cfg.Limit = DefaultLimit
	}
	cfg.Limit = min(cfg.Limit, MaxLimit)
	if cfg.TokenLife == 0 {
		cfg.TokenLife = DefaultTokenLife
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = DefaultTimeout
	}
	if cfg.MaxTxnOps == 0 {
		cfg.MaxTxnOps = defaultMaxTxnOps
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &Store{cfg: cfg, kv: cfg.Client, keys: newLayout(cfg.Prefix)}
	s.leases = leases{lease: cfg.Client, life: cfg.TokenLife, now: cfg.Now}
	return s
}

const idAlphabet = "abcdefghijklmnopqrstuvwxyz0123456789"

// randomDigits is the random part of an ID that its slot leaves: 72 bits, so
// that no ID comes twice.
const randomDigits = IDLength - len("a-") - slotDigits

func newID() string {
	b := make([]byte, randomDigits)
	n := big.NewInt(int64(len(idAlphabet)))
	for i := range b {
		// crypto/rand does not fail (Go 1.24).
		d, err := rand.Int(rand.Reader, n)
		if err != nil {
			panic(err)
		}
		b[i] = idAlphabet[d.Int64()]
	}
	return string(b)
}

// storeError says what a failure of etcd means: nothing that a client of ours
// did wrong, and nothing that could be taken for an answer.
func storeError(cluster string, err error) error {
	var own *Error
	if err == nil || errors.As(err, &own) {
		return err
	}
	e := &Error{Kind: Unavailable, Cluster: cluster, Cause: err,
		Message: "The association store is not available. Try again with the same client request token."}
	for _, bug := range []error{rpctypes.ErrTooManyOps, rpctypes.ErrDuplicateKey, rpctypes.ErrRequestTooLarge, rpctypes.ErrEmptyKey} {
		if errors.Is(err, bug) {
			e.Kind, e.Message = Internal, "The association store refused the request."
		}
	}
	return e
}

// damaged: what is stored is not what this package wrote.
func (s *Store) damaged(ctx context.Context, cluster string, err error) error {
	s.cfg.Log.ErrorContext(ctx, "damaged record in the store", "cluster", cluster, "error", err)
	return &Error{Kind: Internal, Cluster: cluster, Message: "The association store holds a damaged record.", Cause: err}
}

func (s *Store) bounded(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, s.cfg.Timeout)
}

// now has milliseconds, as what is stored has.
func (s *Store) now() time.Time { return s.cfg.Now().UTC().Truncate(time.Millisecond) }

// first is the only key-value of a get by key, or nil.
func first(r *clientv3.TxnResponse, i int) *mvccpb.KeyValue {
	if kvs := r.Responses[i].GetResponseRange().Kvs; len(kvs) > 0 {
		return kvs[0]
	}
	return nil
}

// clusterAt decodes the cluster of a transaction's i-th get.
func (s *Store) clusterAt(ctx context.Context, name string, r *clientv3.TxnResponse, i int) (Cluster, error) {
	kv := first(r, i)
	if kv == nil {
		return Cluster{}, noCluster(name)
	}
	c, err := decodeCluster(kv.Key, kv.Value, kv.ModRevision)
	if err != nil {
		return Cluster{}, s.damaged(ctx, name, err)
	}
	return c, nil
}

// associationAt decodes the association of a transaction's i-th get. It is
// ErrNotFound if the slot is empty or has another association by now.
func (s *Store) associationAt(ctx context.Context, cluster, id string, r *clientv3.TxnResponse, i int) (Association, error) {
	kv := first(r, i)
	if kv == nil {
		return Association{}, noAssociation(cluster, id)
	}
	a, err := decode(kv.Key, kv.Value, kv.ModRevision)
	if err != nil {
		return Association{}, s.damaged(ctx, cluster, err)
	}
	if a.ID != id {
		return Association{}, noAssociation(cluster, id)
	}
	if a.Tags == nil {
		a.Tags = map[string]string{}
	}
	return a, nil
}

// located checks the form of a cluster's name and an ID, and returns the
// association's key. An ID that no association can have gets an empty key.
func (s *Store) located(cluster, id string) (key string, err error) {
	if err := validateID(cluster, id); err != nil {
		return "", err
	}
	if !ValidClusterName(cluster) {
		return "", noCluster(cluster)
	}
	slot, ok := slotOf(id)
	if !ok {
		// A slot that does not exist, so that the cluster is still looked for first.
		slot = "-"
	}
	return s.keys.association(cluster, slot), nil
}

// read gets a cluster and an association at one revision.
func (s *Store) read(ctx context.Context, cluster, id string, more ...clientv3.Op) (Cluster, Association, *clientv3.TxnResponse, error) {
	key, err := s.located(cluster, id)
	if err != nil {
		return Cluster{}, Association{}, nil, err
	}
	ops := append([]clientv3.Op{clientv3.OpGet(s.keys.cluster(cluster)), clientv3.OpGet(key)}, more...)
	r, err := s.kv.Txn(ctx).Then(ops...).Commit()
	if err != nil {
		return Cluster{}, Association{}, nil, storeError(cluster, err)
	}
	c, err := s.clusterAt(ctx, cluster, r, 0)
	if err != nil {
		return Cluster{}, Association{}, nil, err
	}
	a, err := s.associationAt(ctx, cluster, id, r, 1)
	return c, a, r, err
}

// Describe returns one association.
func (s *Store) Describe(ctx context.Context, cluster, id string) (Association, error) {
	ctx, cancel := s.bounded(ctx)
	defer cancel()
	_, a, _, err := s.read(ctx, cluster, id)
	return a, err
}

// The operations that remember client tokens, each by itself.
const (
	opCreate = "c"
	opUpdate = "u"
)

// Create makes an association. Of many calls for one service account at once
// one succeeds, and the others are ErrInUse with its ID. A call that repeats
// ClientToken and all parameters of an earlier one returns what that made, as it
// is now; with other parameters it is ErrInvalidParameter.
//
// After ErrUnavailable nobody knows whether it was made: repeat the call, with
// the same token.
func (s *Store) Create(ctx context.Context, in CreateInput) (Association, error) {
	ctx, cancel := s.bounded(ctx)
	defer cancel()
	if err := checkCreate(in); err != nil {
		return Association{}, err
	}
	use := s.use(opCreate, in.Cluster, in.ClientToken, createParams(in))
	subject := s.keys.subject(in.Cluster, in.Namespace, in.ServiceAccount)
	for {
		if err := ctx.Err(); err != nil {
			return Association{}, storeError(in.Cluster, err)
		}
		r, err := s.kv.Txn(ctx).Then(append([]clientv3.Op{
			clientv3.OpGet(s.keys.cluster(in.Cluster)), clientv3.OpGet(subject),
		}, use.gets()...)...).Commit()
		if err != nil {
			return Association{}, storeError(in.Cluster, err)
		}
		c, err := s.clusterAt(ctx, in.Cluster, r, 0)
		if err != nil {
			return Association{}, err
		}
		if in.Allow != nil {
			if err := in.Allow(c); err != nil {
				return Association{}, err
			}
		}
		// A repeated call gets its answer before anything else is judged that may have
		// changed meanwhile.
		if id, err := s.replayed(ctx, &use, r, 2); err != nil {
			return Association{}, err
		} else if id != "" {
			c, a, _, err := s.read(ctx, in.Cluster, id)
			if errors.Is(err, ErrNotFound) {
				continue // deleted this moment: the token has ended
			}
			if err == nil && in.Check != nil {
				err = in.Check(c, a)
			}
			if err != nil {
				return Association{}, err
			}
			return a, nil
		}
		a, err := s.proposed(&c, in)
		if err != nil {
			return Association{}, err
		}
		if kv := first(r, 1); kv != nil {
			return Association{}, inUse(in.Cluster, string(kv.Value))
		}
		slot, err := s.takeSlot(ctx, in.Cluster)
		if err != nil {
			return Association{}, err
		}
		done, err := s.insert(ctx, &c, &a, slot, use)
		if err != nil {
			return Association{}, err
		}
		if done {
			return a, nil
		}
	}
}

func inUse(cluster, id string) *Error {
	return &Error{Kind: InUse, Cluster: cluster, ID: id, Message: "Association already exists: " + id}
}

// checkCreate is what can be said without knowing the cluster.
func checkCreate(in CreateInput) error {
	if !ValidClusterName(in.Cluster) {
		return noCluster(in.Cluster)
	}
	if err := validateSubject(in.Cluster, in.Namespace, in.ServiceAccount); err != nil {
		return err
	}
	if p := tagProblem(in.Tags); p != "" {
		return invalid(in.Cluster, "%s", p)
	}
	return validatePolicy(in.Cluster, value(in.Policy), in.DisableSessionTags)
}

func value(p *string) string {
	if p == nil {
		return ""
	}
	return *p
}

// proposed is the association that in asks for, without its ID.
func (s *Store) proposed(c *Cluster, in CreateInput) (Association, error) {
	if err := c.AllowsRole(in.RoleARN); err != nil {
		return Association{}, err
	}
	now := s.now()
	a := Association{
		Cluster: in.Cluster, Namespace: in.Namespace, ServiceAccount: in.ServiceAccount, RoleARN: in.RoleARN,
		Policy: value(in.Policy), OwnerARN: in.OwnerARN, DisableSessionTags: in.DisableSessionTags,
		Tags: maps.Clone(in.Tags), CreatedAt: now, ModifiedAt: now,
	}
	if a.Tags == nil {
		a.Tags = map[string]string{}
	}
	if err := setTarget(c, &a, value(in.TargetRoleARN)); err != nil {
		return Association{}, err
	}
	return a, nil
}

func setTarget(c *Cluster, a *Association, target string) error {
	if target == "" {
		a.TargetRoleARN, a.ExternalID = "", ""
		return nil
	}
	if err := c.AllowsTarget(target); err != nil {
		return err
	}
	a.TargetRoleARN, a.ExternalID = target, externalID(c.Region, c.Account, a)
	return nil
}

// name gives an association its ID and ARN.
func (s *Store) name(c *Cluster, a *Association, slot int) {
	a.ID = "a-" + slotString(slot) + s.cfg.NewID()
	a.ARN = ARN{Partition: c.partition(), Service: "eks", Region: c.Region, Account: c.Account, Resource: resourceType + c.Name + "/" + a.ID}.String()
}

// insert stores a new association. It reports false if something that it was
// made from has changed, and the caller has to look again.
func (s *Store) insert(ctx context.Context, c *Cluster, a *Association, slot int, use tokenUse) (bool, error) {
	s.name(c, a, slot)
	rec, err := encode(a)
	if err != nil {
		return false, &Error{Kind: Internal, Cluster: c.Name, Message: "The association could not be stored.", Cause: err}
	}
	key := s.keys.association(a.Cluster, slotString(slot))
	subject := s.keys.subject(a.Cluster, a.Namespace, a.ServiceAccount)
	cmps := []clientv3.Cmp{
		clientv3.Compare(clientv3.ModRevision(s.keys.cluster(a.Cluster)), "=", c.Revision),
		clientv3.Compare(clientv3.CreateRevision(subject), "=", 0),
		clientv3.Compare(clientv3.CreateRevision(key), "=", 0),
	}
	puts := []clientv3.Op{clientv3.OpPut(key, rec), clientv3.OpPut(subject, a.ID)}
	r, err := s.commit(ctx, a.Cluster, cmps, puts, []clientv3.Op{clientv3.OpGet(key, clientv3.WithCountOnly())}, use, a.ID)
	if err != nil {
		return false, err
	}
	if !r.Succeeded {
		if r.Responses[0].GetResponseRange().Count == 0 {
			s.slots.give(a.Cluster, slot)
		}
		return false, nil
	}
	a.Revision = r.Header.Revision
	return true, nil
}

// commit runs a transaction that also writes down the use of a client token.
// What fails with ErrUnavailable may have happened.
func (s *Store) commit(ctx context.Context, cluster string, cmps []clientv3.Cmp, then, otherwise []clientv3.Op, use tokenUse, id string) (*clientv3.TxnResponse, error) {
	for {
		all := append([]clientv3.Op(nil), then...)
		if use.key != "" {
			put, err := s.remember(ctx, use, id)
			if err != nil {
				return nil, storeError(cluster, err)
			}
			all = append(all, put)
		}
		r, err := s.kv.Txn(ctx).If(append(cmps, use.cmps()...)...).Then(all...).Else(otherwise...).Commit()
		if errors.Is(err, rpctypes.ErrLeaseNotFound) && use.key != "" {
			// Somebody revoked it, or the store was restored from before it. Nothing was
			// written.
			s.leases.forget()
			continue
		}
		if err != nil {
			return nil, storeError(cluster, err)
		}
		return r, nil
	}
}

// owned refuses a change of what belongs to an add-on by anybody else.
func owned(a *Association, owner string) error {
	if a.OwnerARN == "" || a.OwnerARN == owner {
		return nil
	}
	return &Error{Kind: InvalidRequest, Cluster: a.Cluster, Message: "The association is owned by an add-on and can be changed only through it: " + a.OwnerARN}
}

// Update changes an association and returns it. A call that repeats ClientToken
// and all parameters of an earlier one changes nothing again.
func (s *Store) Update(ctx context.Context, in UpdateInput) (Association, error) {
	ctx, cancel := s.bounded(ctx)
	defer cancel()
	settings := in.RoleARN != nil || in.TargetRoleARN != nil || in.DisableSessionTags != nil || in.Policy != nil
	if !settings && in.Tags == nil {
		if _, err := s.located(in.Cluster, in.ID); err != nil {
			return Association{}, err
		}
		return Association{}, invalid(in.Cluster, "At least one of roleArn, targetRoleArn, disableSessionTags and policy should be given.")
	}
	use := s.use(opUpdate, in.Cluster, in.ClientToken, updateParams(in))
	for {
		if err := ctx.Err(); err != nil {
			return Association{}, storeError(in.Cluster, err)
		}
		c, a, r, err := s.read(ctx, in.Cluster, in.ID, use.gets()...)
		if err != nil {
			return Association{}, err
		}
		// First, as the owner is not everybody's to know.
		if in.Check != nil {
			if err := in.Check(clone(a)); err != nil {
				return Association{}, err
			}
		}
		if err := owned(&a, in.OwnerARN); err != nil {
			return Association{}, err
		}
		if id, err := s.replayed(ctx, &use, r, 2); err != nil {
			return Association{}, err
		} else if id != "" {
			return a, nil
		}
		if err := changed(&c, &a, in); err != nil {
			return Association{}, err
		}
		if settings {
			a.ModifiedAt = s.now()
		}
		done, err := s.replace(ctx, &c, &a, use)
		if err != nil {
			return Association{}, err
		}
		if done {
			return a, nil
		}
	}
}

// changed applies an update.
func changed(c *Cluster, a *Association, in UpdateInput) error {
	if in.RoleARN != nil {
		if err := c.AllowsRole(*in.RoleARN); err != nil {
			return err
		}
		a.RoleARN = *in.RoleARN
	}
	if in.TargetRoleARN != nil {
		if err := setTarget(c, a, *in.TargetRoleARN); err != nil {
			return err
		}
	}
	if in.DisableSessionTags != nil {
		a.DisableSessionTags = *in.DisableSessionTags
	}
	if in.Policy != nil {
		a.Policy = *in.Policy
	}
	if in.Tags != nil {
		if p := tagProblem(*in.Tags); p != "" {
			return invalid(a.Cluster, "%s", p)
		}
		if a.Tags = maps.Clone(*in.Tags); a.Tags == nil {
			a.Tags = map[string]string{}
		}
	}
	return validatePolicy(a.Cluster, a.Policy, a.DisableSessionTags)
}

// replace stores an association that was read at a.Revision, and sets its new
// one. It reports false if it, or the cluster that allowed it, changed since.
func (s *Store) replace(ctx context.Context, c *Cluster, a *Association, use tokenUse) (bool, error) {
	rec, err := encode(a)
	if err != nil {
		return false, &Error{Kind: Internal, Cluster: a.Cluster, Message: "The association could not be stored.", Cause: err}
	}
	key, err := s.located(a.Cluster, a.ID)
	if err != nil {
		return false, err
	}
	cmps := []clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(key), "=", a.Revision)}
	if c != nil {
		cmps = append(cmps, clientv3.Compare(clientv3.ModRevision(s.keys.cluster(c.Name)), "=", c.Revision))
	}
	r, err := s.commit(ctx, a.Cluster, cmps, []clientv3.Op{clientv3.OpPut(key, rec)}, nil, use, a.ID)
	if err != nil || !r.Succeeded {
		return false, err
	}
	a.Revision = r.Header.Revision
	return true, nil
}

func clone(a Association) Association {
	a.Tags = maps.Clone(a.Tags)
	return a
}

// Delete ends an association and returns what it was. Credentials that were
// given out stay valid until they expire.
func (s *Store) Delete(ctx context.Context, in DeleteInput) (Association, error) {
	ctx, cancel := s.bounded(ctx)
	defer cancel()
	for {
		if err := ctx.Err(); err != nil {
			return Association{}, storeError(in.Cluster, err)
		}
		_, a, _, err := s.read(ctx, in.Cluster, in.ID)
		if err != nil {
			return Association{}, err
		}
		// First, as the owner is not everybody's to know.
		if in.Check != nil {
			if err := in.Check(clone(a)); err != nil {
				return Association{}, err
			}
		}
		if err := owned(&a, in.OwnerARN); err != nil {
			return Association{}, err
		}
		key, err := s.located(in.Cluster, in.ID)
		if err != nil {
			return Association{}, err
		}
		r, err := s.commit(ctx, in.Cluster,
			[]clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(key), "=", a.Revision)},
			[]clientv3.Op{clientv3.OpDelete(key), clientv3.OpDelete(s.keys.subject(a.Cluster, a.Namespace, a.ServiceAccount))},
			nil, tokenUse{}, "")
		if err != nil {
			return Association{}, err
		}
		if r.Succeeded {
			a.Revision = r.Header.Revision
			return a, nil
		}
	}
}

// List returns a page of a cluster's associations, in the order of their IDs.
// What is there all the time that a client takes for its pages is on exactly
// one of them.
func (s *Store) List(ctx context.Context, in ListInput) (ListOutput, error) {
	ctx, cancel := s.bounded(ctx)
	defer cancel()
	if !ValidClusterName(in.Cluster) {
		return ListOutput{}, noCluster(in.Cluster)
	}
	limit := MaxPage
	if in.MaxResults != nil {
		limit = *in.MaxResults
	}
	if limit < 1 || limit > MaxPage {
		return ListOutput{}, invalid(in.Cluster, "The parameter maxResults should be between 1 and %d.", MaxPage)
	}
	from, after := s.keys.associations(in.Cluster), ""
	if in.NextToken != "" {
		var err error
		if after, err = parsePageToken(in); err != nil {
			return ListOutput{}, err
		}
		slot, _ := slotOf(after)
		// The slot itself may have another association by now, with a later ID.
		from = s.keys.association(in.Cluster, slot)
	}
	end := clientv3.GetPrefixRangeEnd(s.keys.associations(in.Cluster))
	// Unfiltered, a page needs one record more than it has, to know whether it is
	// the last, and perhaps the one that the token names.
	scan := int64(limit + 2)
	if in.Namespace != "" || in.ServiceAccount != "" || in.Keep != nil {
		scan = scanPage
	}
	out := ListOutput{Associations: []Association{}}
	checked := false
	for {
		page := clientv3.OpGet(from, clientv3.WithRange(end), clientv3.WithLimit(scan))
		r, err := s.kv.Txn(ctx).Then(clientv3.OpGet(s.keys.cluster(in.Cluster), clientv3.WithKeysOnly()), page).Commit()
		if err != nil {
			return ListOutput{}, storeError(in.Cluster, err)
		}
		if !checked && first(r, 0) == nil {
			return ListOutput{}, noCluster(in.Cluster)
		}
		checked = true
		rng := r.Responses[1].GetResponseRange()
		for _, kv := range rng.Kvs {
			from = string(kv.Key) + "\x00"
			a, err := decode(kv.Key, kv.Value, kv.ModRevision)
			if err != nil {
				return ListOutput{}, s.damaged(ctx, in.Cluster, err)
			}
			if a.ID <= after || in.Namespace != "" && a.Namespace != in.Namespace ||
				in.ServiceAccount != "" && a.ServiceAccount != in.ServiceAccount {
				continue
			}
			if a.Tags == nil {
				a.Tags = map[string]string{}
			}
			if in.Keep != nil && !in.Keep(a) {
				continue
			}
			if len(out.Associations) == limit {
				out.NextToken = pageToken(in, out.Associations[limit-1].ID)
				return out, nil
			}
			out.Associations = append(out.Associations, a)
		}
		if !rng.More {
			return out, nil
		}
	}
}

// CreateMany makes associations of one cluster in few, large transactions, for
// seeding and imports: each batch as a whole or not at all. Client tokens are
// not looked at. It returns what was made, in the order of in; after an error,
// that is the part before the batch that failed. It has no time limit of its
// own.
func (s *Store) CreateMany(ctx context.Context, cluster string, in []CreateInput) ([]Association, error) {
	var out []Association
	for len(in) > 0 {
		batch, n, err := s.createBatch(ctx, cluster, in)
		if err != nil {
			return out, err
		}
		out, in = append(out, batch...), in[n:]
	}
	return out, nil
}

// createBatch makes as many of in as fit into one transaction.
func (s *Store) createBatch(ctx context.Context, cluster string, in []CreateInput) ([]Association, int, error) {
	if !ValidClusterName(cluster) {
		return nil, 0, noCluster(cluster)
	}
	for {
		if err := ctx.Err(); err != nil {
			return nil, 0, storeError(cluster, err)
		}
		r, err := s.kv.Txn(ctx).Then(clientv3.OpGet(s.keys.cluster(cluster))).Commit()
		if err != nil {
			return nil, 0, storeError(cluster, err)
		}
		c, err := s.clusterAt(ctx, cluster, r, 0)
		if err != nil {
			return nil, 0, err
		}
		b := batch{store: s, cluster: &c}
		for _, one := range in {
			if more, err := b.add(ctx, one); err != nil {
				b.giveBack()
				return nil, 0, err
			} else if !more {
				break
			}
		}
		done, err := b.commit(ctx)
		if err != nil {
			return nil, 0, err
		}
		if done {
			return b.out, len(b.out), nil
		}
	}
}

// batch is a transaction of several creates under construction.
type batch struct {
	store    *Store
	cluster  *Cluster
	out      []Association
	slots    []int
	subjects map[string]bool
	cmps     []clientv3.Cmp
	puts     []clientv3.Op
	bytes    int
}

// add takes one more, and reports false if it did not fit.
func (b *batch) add(ctx context.Context, in CreateInput) (bool, error) {
	in.Cluster = b.cluster.Name
	if len(b.cmps)+3 > b.store.cfg.MaxTxnOps && len(b.out) > 0 || b.bytes > maxTxnBytes {
		return false, nil
	}
	if err := checkCreate(in); err != nil {
		return false, err
	}
	a, err := b.store.proposed(b.cluster, in)
	if err != nil {
		return false, err
	}
	subject := b.store.keys.subject(in.Cluster, in.Namespace, in.ServiceAccount)
	if b.subjects[subject] {
		// It would be in use after this batch. Leave it to the next, which says so.
		return false, nil
	}
	slot, err := b.store.takeSlot(ctx, in.Cluster)
	if err != nil {
		// The limit counts for those that fit as well.
		if len(b.out) > 0 && errors.Is(err, ErrLimitExceeded) {
			return false, nil
		}
		return false, err
	}
	b.store.name(b.cluster, &a, slot)
	rec, err := encode(&a)
	if err != nil {
		return false, &Error{Kind: Internal, Cluster: in.Cluster, Message: "The association could not be stored.", Cause: err}
	}
	key := b.store.keys.association(in.Cluster, slotString(slot))
	b.cmps = append(b.cmps,
		clientv3.Compare(clientv3.CreateRevision(subject), "=", 0),
		clientv3.Compare(clientv3.CreateRevision(key), "=", 0))
	b.puts = append(b.puts, clientv3.OpPut(key, rec), clientv3.OpPut(subject, a.ID))
	if b.subjects == nil {
		b.subjects = map[string]bool{}
	}
	b.subjects[subject] = true
	b.bytes += len(key)*2 + len(rec) + len(subject)*2 + IDLength + 100
	b.out, b.slots = append(b.out, a), append(b.slots, slot)
	return true, nil
}

func (b *batch) giveBack() {
	for _, slot := range b.slots {
		b.store.slots.give(b.cluster.Name, slot)
	}
}

// commit reports false if the batch has to be made again.
func (b *batch) commit(ctx context.Context) (bool, error) {
	name := b.cluster.Name
	cmps := append(b.cmps, clientv3.Compare(clientv3.ModRevision(b.store.keys.cluster(name)), "=", b.cluster.Revision))
	r, err := b.store.kv.Txn(ctx).If(cmps...).Then(b.puts...).Commit()
	if err != nil {
		return false, storeError(name, err)
	}
	if r.Succeeded {
		for i := range b.out {
			b.out[i].Revision = r.Header.Revision
		}
		return true, nil
	}
	// Which of them is in the way? If none is, slots were taken or the cluster was
	// changed, and all may be tried again.
	b.store.slots.drop(name)
	for _, a := range b.out {
		g, err := b.store.kv.Get(ctx, b.store.keys.subject(name, a.Namespace, a.ServiceAccount))
		if err != nil {
			return false, storeError(name, err)
		}
		if len(g.Kvs) > 0 {
			e := inUse(name, string(g.Kvs[0].Value))
			e.Cause = fmt.Errorf("service account %s/%s", a.Namespace, a.ServiceAccount)
			return false, e
		}
	}
	return false, nil
}
