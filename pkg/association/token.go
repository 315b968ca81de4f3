// SPDX-License-Identifier: Apache-2.0

package association

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// tokenUse is one call's use of a client token; its zero value is that of a call
// without one. Tokens are remembered by digest, so that neither their length nor
// their text matters.
type tokenUse struct {
	cluster, key, params string
	// revision is the key's, of a token that has ended; 0: there was none.
	revision int64
}

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return base64.RawURLEncoding.EncodeToString(sum[:])
}

func (s *Store) use(op, cluster, token, params string) tokenUse {
	if token == "" {
		return tokenUse{}
	}
	return tokenUse{cluster: cluster, key: s.keys.token(cluster, op, digest([]byte(token))), params: params}
}

// gets reads the token along with what the call needs anyway.
func (u tokenUse) gets() []clientv3.Op {
	if u.key == "" {
		return nil
	}
	return []clientv3.Op{clientv3.OpGet(u.key)}
}

// cmps requires that nobody else has used the token meanwhile.
func (u tokenUse) cmps() []clientv3.Cmp {
	if u.key == "" {
		return nil
	}
	return []clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(u.key), "=", u.revision)}
}

// params is a digest of everything but the token. Nil and empty, where they mean
// the same, give the same.
func params(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		// Strings, booleans and a map of strings can be encoded.
		panic(fmt.Sprintf("association: encode parameters: %v", err))
	}
	return digest(b)
}

func createParams(in CreateInput) string {
	tags := in.Tags
	if tags == nil {
		tags = map[string]string{}
	}
	return params([]any{in.Namespace, in.ServiceAccount, in.RoleARN, value(in.TargetRoleARN), value(in.Policy), in.DisableSessionTags, tags, in.OwnerARN})
}

func updateParams(in UpdateInput) string {
	all := []any{in.ID, in.RoleARN, in.TargetRoleARN, in.DisableSessionTags, in.Policy, in.OwnerARN}
	if in.Tags != nil {
		all = append(all, *in.Tags)
	}
	return params(all)
}

// replayed looks at the token that the i-th get of a transaction read. It
// returns the ID of the association that an equal call made or changed, or
// nothing if the token is new or has ended; of a token that was used for
// something else it is InvalidParameter.
func (s *Store) replayed(ctx context.Context, u *tokenUse, r *clientv3.TxnResponse, i int) (string, error) {
	if u.key == "" {
		return "", nil
	}
	u.revision = 0
	kv := first(r, i)
	if kv == nil {
		return "", nil
	}
	u.revision = kv.ModRevision
	var t tokenRecord
	if err := json.Unmarshal(kv.Value, &t); err != nil {
		return "", s.damaged(ctx, u.cluster, fmt.Errorf("decode client token: %w", err))
	}
	if s.cfg.Now().UnixMilli() >= t.Expires {
		return "", nil
	}
	// It ends with its association.
	if _, err := s.Describe(ctx, u.cluster, t.ID); errors.Is(err, ErrNotFound) {
		return "", nil
	} else if err != nil {
		return "", err
	}
	if t.Params != u.params {
		return "", invalid(u.cluster, "The clientRequestToken was used before with other parameters.")
	}
	return t.ID, nil
}

// remember is the write that notes the use of a token.
func (s *Store) remember(ctx context.Context, u tokenUse, id string) (clientv3.Op, error) {
	lease, err := s.leases.get(ctx)
	if err != nil {
		return clientv3.Op{}, err
	}
	b, err := json.Marshal(tokenRecord{ID: id, Params: u.params, Expires: s.cfg.Now().Add(s.cfg.TokenLife).UnixMilli()})
	if err != nil {
		return clientv3.Op{}, fmt.Errorf("encode client token: %w", err)
	}
	return clientv3.OpPut(u.key, string(b), clientv3.WithLease(lease)), nil
}

// A lease for each token would double the writes. One serves many, but not so
// many that their end together is felt.
const (
	leaseUses = 1000
	leaseAge  = time.Hour
)

// leases gives leases that outlast the tokens put under them. They only clean
// up: a token's life is in its record.
type leases struct {
	lease clientv3.Lease
	life  time.Duration
	now   func() time.Time

	mu      sync.Mutex
	id      clientv3.LeaseID
	granted time.Time
	uses    int
}

func (l *leases) get(ctx context.Context) (clientv3.LeaseID, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if age := l.now().Sub(l.granted); l.id == clientv3.NoLease || l.uses >= leaseUses || age >= leaseAge || age < 0 {
		// A quarter of an hour more, for a clock that is put back a little.
		ttl := l.life + leaseAge + 15*time.Minute
		r, err := l.lease.Grant(ctx, int64(ttl/time.Second))
		if err != nil {
			return clientv3.NoLease, fmt.Errorf("lease for client tokens: %w", err)
		}
		l.id, l.granted, l.uses = r.ID, l.now(), 0
	}
	l.uses++
	return l.id, nil
}

func (l *leases) forget() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.id = clientv3.NoLease
}
