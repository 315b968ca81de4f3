// SPDX-License-Identifier: Apache-2.0

package exchange

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"
)

// clock is a clock that tests move.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// memoryStore is a KeyStore.
type memoryStore struct {
	mu       sync.Mutex
	value    []byte
	revision int64
	err      error  // fails Load
	saveErr  error  // fails Save
	before   func() // called before each Save is looked at, without the lock
	loads    int
}

func (s *memoryStore) set(change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
}

func (s *memoryStore) Load(context.Context) ([]byte, int64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.loads++
	return bytes.Clone(s.value), s.revision, s.err
}

func (s *memoryStore) Save(_ context.Context, value []byte, revision int64) error {
	if s.before != nil {
		s.before()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.saveErr != nil {
		return s.saveErr
	}
	if revision != s.revision {
		return ErrConflict
	}
	s.value, s.revision = bytes.Clone(value), s.revision+1
	return nil
}

func newTestRing(t testing.TB, store KeyStore, c *clock) *Ring {
	t.Helper()
	r, err := NewRing(RingConfig{Store: store, Now: c.Now})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func (r *Ring) mustSeal(t *testing.T, content string) string {
	t.Helper()
	session, ok := r.seal("KEY", []byte(content))
	if !ok {
		t.Fatal("no key to seal with")
	}
	return session
}

func opens(t *testing.T, r *Ring, session, want string) {
	t.Helper()
	if got, err := r.open(t.Context(), "KEY", session); err != nil || string(got) != want {
		t.Errorf("opened %q, %v, want %q", got, err, want)
	}
}

func refresh(t *testing.T, rings ...*Ring) {
	t.Helper()
	for _, r := range rings {
		if err := r.Refresh(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

// Servers that start at once agree on one key.
func TestServersShareKeys(t *testing.T) {
	store, c := &memoryStore{}, &clock{now: time.Now()}
	a, b := newTestRing(t, store, c), newTestRing(t, store, c)
	if a.Ready() {
		t.Error("ready without keys")
	}
	if _, ok := a.seal("KEY", nil); ok {
		t.Error("sealed without a key")
	}
	store.before = func() { // b is first
		store.before = nil
		refresh(t, b)
	}
	refresh(t, a)
	if store.revision != 1 || !a.Ready() || !b.Ready() {
		t.Errorf("revision %d", store.revision)
	}
	opens(t, b, a.mustSeal(t, "from a"), "from a")
	opens(t, a, b.mustSeal(t, "from b"), "from b")
	// One that has just started, and knows nothing yet.
	opens(t, newTestRing(t, store, c), a.mustSeal(t, "from a"), "from a")
}

// Through rotations, everything that has not expired opens at every server, and
// old keys go.
func TestRotation(t *testing.T) {
	store, c := &memoryStore{}, &clock{now: time.Now()}
	a, b := newTestRing(t, store, c), newTestRing(t, store, c)
	refresh(t, a, b)
	type sealed struct {
		at      time.Time
		session string
	}
	var all []sealed
	most := 0
	for range 3 * 24 * 6 { // three days of ten minutes
		refresh(t, a)
		for _, s := range all {
			if c.Now().Sub(s.at) <= MaxLife {
				opens(t, a, s.session, "x")
				opens(t, b, s.session, "x")
			}
		}
		all = append(all, sealed{c.Now(), a.mustSeal(t, "x")}, sealed{c.Now(), b.mustSeal(t, "x")})
		most = max(most, len(*a.keys.Load()))
		c.add(10 * time.Minute)
		refresh(t, b)
	}
	if most > 2 || store.revision < 3 {
		t.Errorf("%d keys at most, revision %d", most, store.revision)
	}
	if _, err := a.open(t.Context(), "KEY", all[0].session); !errors.Is(err, errSealed) {
		t.Errorf("after three days: %v", err)
	}
	// A new key is known before it is used.
	first := (*a.keys.Load())[len(*a.keys.Load())-1]
	c.add(DefaultRotateEvery)
	refresh(t, a)
	keys := *a.keys.Load()
	if last := keys[len(keys)-1]; last.id == first.id || !last.activeFrom.After(c.Now()) {
		t.Errorf("rotated to a key active from %s at %s", last.activeFrom, c.Now())
	}
	session := a.mustSeal(t, "x")
	raw, err := base64.RawURLEncoding.DecodeString(strings.TrimPrefix(session, sessionMark))
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := b.find(string(raw[:keyIDSize])); !ok {
		t.Error("sealed with a key that not everybody knows")
	}
}

// A key that has been replaced opens until nothing that it sealed can be good,
// and then is gone from the store too, without another rotation.
func TestReplacedKeysRetire(t *testing.T) {
	store, c := &memoryStore{}, &clock{now: time.Now()}
	a, b := newTestRing(t, store, c), newTestRing(t, store, c)
	refresh(t, a, b)
	c.add(DefaultRotateEvery)
	refresh(t, a, b)
	c.add(2 * DefaultRefresh) // the new key is in force from here on, give or take a second
	session := (*a.keys.Load())[0]
	for range 6 {
		refresh(t, a, b)
		for _, r := range []*Ring{a, b} {
			if _, ok := r.find(session.id); !ok {
				t.Fatal("gone while what it sealed may be good")
			}
		}
		c.add(MaxLife / 6)
	}
	c.add(overlap - MaxLife)
	refresh(t, a, b)
	for _, r := range []*Ring{a, b} {
		if _, ok := r.find(session.id); ok {
			t.Error("still opens, though another key has sealed for longer than anything lives")
		}
	}
	kept, err := decodeRing(store.value)
	if err != nil || len(kept) != 1 || kept[0].id == session.id {
		t.Errorf("the store has %d keys, %v", len(kept), err)
	}
	revision := store.revision
	refresh(t, a, b)
	if store.revision != revision {
		t.Error("written again without a change")
	}
}

func TestRevoke(t *testing.T) {
	store, c := &memoryStore{}, &clock{now: time.Now()}
	a, b := newTestRing(t, store, c), newTestRing(t, store, c)
	refresh(t, a, b)
	session := a.mustSeal(t, "x")
	c.add(time.Minute)
	if err := a.Rotate(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	opens(t, a, session, "x")
	opens(t, b, a.mustSeal(t, "y"), "y")
	if st := a.Status(); len(st) != 2 || st[0].Sealing || !st[1].Sealing || len(st[1].ID) != 2*keyIDSize {
		t.Errorf("status %+v", st)
	}
	if err := a.Rotate(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	c.add(DefaultRefresh)
	refresh(t, b)
	for _, r := range []*Ring{a, b} {
		if _, err := r.open(t.Context(), "KEY", session); !errors.Is(err, errSealed) {
			t.Errorf("revoked: %v", err)
		}
	}
	opens(t, b, a.mustSeal(t, "z"), "z")
	if st := b.Status(); len(st) != 1 || !st[0].Sealing {
		t.Errorf("status %+v", st)
	}
}

// A store that cannot be reached, or read, takes nothing away, and says nothing
// about sessions.
func TestStoreOutage(t *testing.T) {
	store, c := &memoryStore{}, &clock{now: time.Now()}
	a, b := newTestRing(t, store, c), newTestRing(t, store, c)
	refresh(t, a)
	session := a.mustSeal(t, "x")
	down := errors.New("down")
	store.set(func() { store.err = down })
	if err := a.Refresh(t.Context()); !errors.Is(err, down) {
		t.Errorf("%v", err)
	}
	opens(t, a, session, "x")
	for range 2 {
		if _, err := b.open(t.Context(), "KEY", session); !errors.Is(err, down) || errors.Is(err, errSealed) {
			t.Errorf("a server without keys: %v", err)
		}
	}
	if store.loads != 3 { // a twice, b once
		t.Errorf("the store was read %d times", store.loads)
	}
	store.set(func() { store.err = nil })
	c.add(minRefresh)
	opens(t, b, session, "x")

	good := store.value
	for _, bad := range []string{"{", `{"version":2,"keys":[{}]}`, `{"version":1}`, `{"version":1,"keys":[{"id":"00","secret":"AAAA"}]}`,
		`{"version":1,"keys":[{"id":"0000000000000000","secret":"AAAA"}]}`} {
		store.set(func() { store.value = []byte(bad) })
		if err := a.Refresh(t.Context()); err == nil || strings.Contains(err.Error(), "AAAA") {
			t.Errorf("%s: %v", bad, err)
		}
		if string(store.value) != bad {
			t.Errorf("%s was replaced", bad)
		}
		opens(t, a, session, "x")
	}
	store.set(func() { store.value = good; store.saveErr = down })
	c.add(DefaultRotateEvery)
	if err := a.Refresh(t.Context()); !errors.Is(err, down) {
		t.Errorf("%v", err)
	}
	opens(t, b, a.mustSeal(t, "y"), "y")
	store.set(func() { store.saveErr = ErrConflict })
	if err := a.Refresh(t.Context()); !errors.Is(err, ErrConflict) {
		t.Errorf("for ever in conflict: %v", err)
	}
}

// Strangers cannot have the store read at their pace.
func TestUnknownKeysAreAskedForSeldom(t *testing.T) {
	store, c := &memoryStore{}, &clock{now: time.Now()}
	a := newTestRing(t, store, c)
	refresh(t, a)
	other := newTestRing(t, &memoryStore{}, c)
	refresh(t, other)
	foreign := other.mustSeal(t, "x")
	before := store.loads
	for range 100 {
		if _, err := a.open(t.Context(), "KEY", foreign); !errors.Is(err, errSealed) {
			t.Fatal(err)
		}
	}
	if n := store.loads - before; n != 1 {
		t.Errorf("the store was read %d times", n)
	}
	c.add(minRefresh)
	store.set(func() { store.err = errors.New("down") })
	for range 100 {
		if _, err := a.open(t.Context(), "KEY", foreign); err == nil || errors.Is(err, errSealed) {
			t.Fatalf("while the store is away: %v", err)
		}
	}
	if n := store.loads - before; n != 2 {
		t.Errorf("the store was read %d times", n)
	}
}

func TestRun(t *testing.T) {
	store, c := &memoryStore{}, &clock{now: time.Now()}
	store.err = errors.New("down")
	var log bytes.Buffer
	r, err := NewRing(RingConfig{Store: store, Now: c.Now, Refresh: time.Millisecond, Log: slog.New(slog.NewTextHandler(&log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- r.Run(ctx) }()
	wait := func(what string, is func() bool) {
		for deadline := time.Now().Add(time.Minute); !is(); time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal(what)
			}
		}
	}
	wait("the store is not read", func() bool { store.mu.Lock(); defer store.mu.Unlock(); return store.loads > 3 })
	store.set(func() { store.err = nil })
	wait("no keys", r.Ready)
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	if n := strings.Count(log.String(), "level=WARN"); n != 1 {
		t.Errorf("log %s", log.String())
	}
	if _, err := NewRing(RingConfig{}); err == nil {
		t.Error("made without a store")
	}
}

// FuzzRing: no stored value makes anything panic, and what is read is whole.
func FuzzRing(f *testing.F) {
	f.Add([]byte(`{"version":1,"keys":[{"id":"0011223344556677","secret":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=","activeFrom":1}]}`))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, value []byte) {
		keys, err := decodeRing(value)
		if err != nil {
			return
		}
		for i, k := range keys {
			if len(k.id) != keyIDSize || len(k.secret) != secretSize || k.aead == nil || i > 0 && k.activeFrom.Before(keys[i-1].activeFrom) {
				t.Errorf("key %d", i)
			}
		}
	})
}
