// SPDX-License-Identifier: Apache-2.0

package tokencheck

import (
	"encoding/binary"
	"sync"
	"sync/atomic"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/satoken"
)

// memoryKey is a token, by the hash of its exact bytes, in one cluster.
type memoryKey struct {
	cluster string
	token   [32]byte
}

// memorized is a token that was verified.
type memorized struct {
	// by is the verifier that did: another one has other keys.
	by      *satoken.Verifier
	subject Subject
	// reviewed is when the API server last said yes; nil: never.
	reviewed atomic.Pointer[time.Time]
}

// memory holds verified tokens, in two generations: what is not asked for while
// one generation fills up is forgotten with it. That bounds it without a list
// to keep in order. Only verified tokens come in, so no stranger fills it.
type memory struct{ shards [16]shard }

type shard struct {
	mu       sync.Mutex
	size     int // of a generation
	now, old map[memoryKey]*memorized
}

func newMemory(size int) *memory {
	m := &memory{}
	for i := range m.shards {
		m.shards[i] = shard{size: max(1, size/2/len(m.shards)), now: map[memoryKey]*memorized{}}
	}
	return m
}

func (m *memory) shard(k memoryKey) *shard {
	return &m.shards[binary.LittleEndian.Uint16(k.token[:])%uint16(len(m.shards))]
}

func (m *memory) get(k memoryKey) *memorized {
	s := m.shard(k)
	s.mu.Lock()
	defer s.mu.Unlock()
	if e, ok := s.now[k]; ok {
		return e
	}
	e, ok := s.old[k]
	if !ok {
		return nil
	}
	s.put(k, e)
	return e
}

func (m *memory) put(k memoryKey, e *memorized) {
	s := m.shard(k)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.put(k, e)
}

func (s *shard) put(k memoryKey, e *memorized) {
	if _, there := s.now[k]; !there && len(s.now) >= s.size {
		s.old, s.now = s.now, make(map[memoryKey]*memorized, s.size)
	}
	s.now[k] = e
}
