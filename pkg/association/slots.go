// SPDX-License-Identifier: Apache-2.0

package association

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// slots remembers which slots of a cluster were free when it last looked. That
// is a hint: whether one still is, the transaction that fills it finds out.
type slots struct {
	mu   sync.Mutex
	free map[string][]uint16
	// looking is held by who looks for free slots of a cluster, so that of many
	// only one does.
	looking map[string]*sync.Mutex
}

func (f *slots) pop(cluster string) (int, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	l := f.free[cluster]
	if len(l) == 0 {
		return 0, false
	}
	f.free[cluster] = l[:len(l)-1]
	return int(l[len(l)-1]), true
}

// give returns a slot that was not used after all.
func (f *slots) give(cluster string, slot int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.free != nil {
		f.free[cluster] = append(f.free[cluster], uint16(slot))
	}
}

// drop forgets what is known of a cluster.
func (f *slots) drop(cluster string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.free, cluster)
	delete(f.looking, cluster)
}

func (f *slots) put(cluster string, free []uint16) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.free == nil {
		f.free = map[string][]uint16{}
	}
	f.free[cluster] = free
}

func (f *slots) look(cluster string) *sync.Mutex {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.looking == nil {
		f.looking = map[string]*sync.Mutex{}
	}
	if f.looking[cluster] == nil {
		f.looking[cluster] = new(sync.Mutex)
	}
	return f.looking[cluster]
}

// takeSlot finds a slot that was free a moment ago, or reports ErrLimitExceeded
// if at one moment there was none.
func (s *Store) takeSlot(ctx context.Context, cluster string) (int, error) {
	if slot, ok := s.slots.pop(cluster); ok {
		return slot, nil
	}
	mu := s.slots.look(cluster)
	mu.Lock()
	defer mu.Unlock()
	for {
		if slot, ok := s.slots.pop(cluster); ok {
			return slot, nil
		}
		// Counting is cheap, and what there is to do for a full cluster.
		prefix := s.keys.associations(cluster)
		n, err := s.kv.Get(ctx, prefix, clientv3.WithPrefix(), clientv3.WithCountOnly())
		if err != nil {
			return 0, storeError(cluster, err)
		}
		if n.Count >= int64(s.cfg.Limit) {
			return 0, &Error{Kind: LimitExceeded, Cluster: cluster,
				Message: fmt.Sprintf("The cluster has reached the limit of %d pod identity associations.", s.cfg.Limit)}
		}
		r, err := s.kv.Get(ctx, prefix, clientv3.WithPrefix(), clientv3.WithKeysOnly())
		if err != nil {
			return 0, storeError(cluster, err)
		}
		taken := make([]bool, MaxLimit)
		for _, kv := range r.Kvs {
			if n, err := strconv.ParseInt(strings.TrimPrefix(string(kv.Key), prefix), 36, 32); err == nil && n >= 0 && n < MaxLimit {
				taken[n] = true
			}
		}
		// No more than there is room for, should slots beyond the limit be taken.
		room := s.cfg.Limit - len(r.Kvs)
		free := make([]uint16, 0, max(room, 0))
		for _, n := range rand.Perm(s.cfg.Limit) {
			if len(free) < room && !taken[n] {
				free = append(free, uint16(n))
			}
		}
		s.slots.put(cluster, free)
	}
}
