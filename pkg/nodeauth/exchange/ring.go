// SPDX-License-Identifier: Apache-2.0

package exchange

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Defaults of RingConfig.
const (
	// DefaultRotateEvery is how long one key seals.
	DefaultRotateEvery = 24 * time.Hour
	// DefaultRefresh is how often the store is read.
	DefaultRefresh = 30 * time.Second
)

const (
	ringVersion = 1
	// minRefresh is the shortest time between two readings that unknown keys ask
	// for.
	minRefresh = 5 * time.Second
	// storeTimeout bounds one reading or writing.
	storeTimeout = 5 * time.Second
	// overlap is how long a key still opens after another has taken its place:
	// what it sealed last, and clocks that differ.
	overlap = MaxLife + 10*time.Minute

	keyIDSize  = 8
	secretSize = 32
	// maxKeys bounds what is read; there is one, or two for the overlap after a
	// rotation, and more only if somebody rotates by hand.
	maxKeys = 64
	// sessionMark begins every session token. It names the form that follows.
	sessionMark = "LKN1"
	// maxSession bounds what is opened.
	maxSession = 4 << 10
)

// ErrConflict: somebody else has stored something meanwhile. Implementations of
// KeyStore return it.
var ErrConflict = errors.New("the sealing keys have changed meanwhile")

// errSealed: nothing this ring has sealed, or so long ago that its key is gone.
var errSealed = errors.New("not a session token of this server")

// KeyStore keeps the sealing keys for all servers, as one secret value.
type KeyStore interface {
	// Load returns the value and its revision; nil and 0 if there is none.
	Load(ctx context.Context) (value []byte, revision int64, err error)
	// Save replaces the value if its revision is still the given one, and is
	// ErrConflict if it is not.
	Save(ctx context.Context, value []byte, revision int64) error
}

// RingConfig is what a Ring is made of. Zero values mean what the field says.
type RingConfig struct {
	// Store is required.
	Store KeyStore
	// RotateEvery and Refresh: zero means the default of that name.
	RotateEvery, Refresh time.Duration
	// Now is the clock; nil means time.Now.
	Now func() time.Time
	// Log is told of rotations and failures; nil discards it.
	Log *slog.Logger
}

// Ring seals and opens session tokens with keys that all servers share. The
// newest key seals, the ones before it still open. A store that cannot be
// reached changes nothing. It may be used by several goroutines.
type Ring struct {
	cfg  RingConfig
	keys atomic.Pointer[[]ringKey] // nil until first read; oldest first

	// refreshing is held while the store is read or written.
	refreshing sync.Mutex
	// asked is when an unknown key last caused a reading, lastErr what came of the
	// last one.
	asked   time.Time
	lastErr error
}

type ringKey struct {
	id         string // keyIDSize bytes
	activeFrom time.Time
	aead       cipher.AEAD
	secret     []byte
}

// ringDocument is what is stored.
type ringDocument struct {
	Version int          `json:"version"`
	Keys    []ringDocKey `json:"keys"`
}

type ringDocKey struct {
	ID         string `json:"id"`     // hex
	Secret     string `json:"secret"` // base64
	ActiveFrom int64  `json:"activeFrom"`
}

// NewRing makes a ring. It has no keys before Refresh or Run.
func NewRing(cfg RingConfig) (*Ring, error) {
	if cfg.Store == nil {
		return nil, errors.New("a ring needs a store")
	}
	if cfg.RotateEvery <= 0 {
		cfg.RotateEvery = DefaultRotateEvery
	}
	if cfg.Refresh <= 0 {
		cfg.Refresh = DefaultRefresh
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Ring{cfg: cfg}, nil
}

// Ready reports whether there are keys.
func (r *Ring) Ready() bool {
	keys := r.keys.Load()
	return keys != nil && len(*keys) > 0
}

// Run keeps the keys fresh and rotates them until ctx ends. It returns ctx's
// error.
func (r *Ring) Run(ctx context.Context) error {
	tick := time.NewTicker(r.cfg.Refresh)
	defer tick.Stop()
	failed := false
	for {
		err := r.Refresh(ctx)
		switch {
		case err != nil && ctx.Err() == nil && !failed:
			r.cfg.Log.Warn("keys for node credentials cannot be read or rotated", "error", err)
		case err == nil && failed:
			r.cfg.Log.Info("keys for node credentials can be read again")
		}
		failed = err != nil
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}

// Refresh reads the keys, makes or rotates them if it is time, and throws away
// those that have nothing to open any more, in the store too.
func (r *Ring) Refresh(ctx context.Context) error {
	r.refreshing.Lock()
	defer r.refreshing.Unlock()
	return r.change(ctx, func(keys []ringKey) ([]ringKey, error) {
		now := r.cfg.Now()
		if keys = retire(keys, now); len(keys) == 0 {
			k, err := newRingKey(now)
			return []ringKey{k}, err
		}
		if now.Before(keys[len(keys)-1].activeFrom.Add(r.cfg.RotateEvery)) {
			return keys, nil
		}
		// Not used before every server has had time to read it.
		k, err := newRingKey(now.Add(2 * r.cfg.Refresh))
		if err != nil {
			return nil, err
		}
		r.cfg.Log.Info("the key for node credentials is rotated", "active_from", k.activeFrom)
		return append(keys, k), nil
	})
}

// Rotate puts a new key in place at once. With revoke, all credentials issued
// so far end: here at once, at other servers within RingConfig.Refresh.
func (r *Ring) Rotate(ctx context.Context, revoke bool) error {
	r.refreshing.Lock()
	defer r.refreshing.Unlock()
	return r.change(ctx, func(keys []ringKey) ([]ringKey, error) {
		k, err := newRingKey(r.cfg.Now())
		if err != nil {
			return nil, err
		}
		if revoke {
			keys = nil
		}
		return append(retire(keys, r.cfg.Now()), k), nil
	})
}

// KeyStatus is a sealing key, without its secret.
type KeyStatus struct {
	// ID is in each session token that the key has sealed, in the clear.
	ID string `json:"id"`
	// ActiveFrom is when it begins to seal, in UTC.
	ActiveFrom time.Time `json:"activeFrom"`
	// Sealing: new tokens are sealed with it. The others open what they sealed, or
	// are not in force yet.
	Sealing bool `json:"sealing,omitempty"`
}

// Status lists the keys in use, oldest first.
func (r *Ring) Status() []KeyStatus {
	out := []KeyStatus{}
	sealing, ok := r.sealing()
	if !ok {
		return out
	}
	for _, k := range *r.keys.Load() {
		out = append(out, KeyStatus{ID: hex.EncodeToString([]byte(k.id)), ActiveFrom: k.activeFrom, Sealing: k.id == sealing.id})
	}
	return out
}

// retire leaves out keys that have nothing to open any more.
func retire(keys []ringKey, now time.Time) []ringKey {
	var out []ringKey
	for i, k := range keys {
		if i+1 == len(keys) || now.Before(keys[i+1].activeFrom.Add(overlap)) {
			out = append(out, k)
		}
	}
	return out
}

// change reads the keys, has them changed, and stores them if they were. What
// is used is what the store has. r.refreshing is held.
func (r *Ring) change(ctx context.Context, edit func([]ringKey) ([]ringKey, error)) (err error) {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	defer func() { r.lastErr = err }()
	for range 5 {
		value, revision, err := r.cfg.Store.Load(ctx)
		if err != nil {
			return fmt.Errorf("reading the sealing keys: %w", err)
		}
		keys, err := decodeRing(value)
		if err != nil {
			// Not replaced: other servers may be able to read it.
			return fmt.Errorf("reading the sealing keys: %w", err)
		}
		wanted, err := edit(keys)
		if err != nil {
			return err
		}
		if slices.EqualFunc(keys, wanted, func(a, b ringKey) bool { return a.id == b.id }) {
			r.keys.Store(&keys)
			return nil
		}
		if value, err = encodeRing(wanted); err != nil {
			return err
		}
		err = r.cfg.Store.Save(ctx, value, revision)
		if errors.Is(err, ErrConflict) {
			continue // another server was first; see what it did
		}
		if err != nil {
			if len(keys) > 0 {
				r.keys.Store(&keys)
			}
			return fmt.Errorf("storing the sealing keys: %w", err)
		}
		r.keys.Store(&wanted)
		return nil
	}
	return fmt.Errorf("storing the sealing keys: %w", ErrConflict)
}

func newRingKey(activeFrom time.Time) (ringKey, error) {
	random := make([]byte, keyIDSize+secretSize)
	_, _ = rand.Read(random) // never fails since Go 1.24
	return makeRingKey(string(random[:keyIDSize]), random[keyIDSize:], activeFrom.UTC().Truncate(time.Second))
}

func makeRingKey(id string, secret []byte, activeFrom time.Time) (ringKey, error) {
	block, err := aes.NewCipher(secret)
	if err != nil {
		return ringKey{}, fmt.Errorf("making a sealing key: %w", err)
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return ringKey{}, fmt.Errorf("making a sealing key: %w", err)
	}
	return ringKey{id: id, activeFrom: activeFrom, aead: aead, secret: secret}, nil
}

// decodeRing's errors hold nothing of the value, which is secret.
func decodeRing(value []byte) ([]ringKey, error) {
	if len(value) == 0 {
		return nil, nil
	}
	var doc ringDocument
	if json.Unmarshal(value, &doc) != nil {
		return nil, errors.New("the value is not what a server stores")
	}
	if doc.Version != ringVersion || len(doc.Keys) == 0 || len(doc.Keys) > maxKeys {
		return nil, fmt.Errorf("the value is of version %d with %d keys", doc.Version, len(doc.Keys))
	}
	var keys []ringKey
	for _, d := range doc.Keys {
		id, idErr := hex.DecodeString(d.ID)
		secret, secretErr := base64.StdEncoding.DecodeString(d.Secret)
		if idErr != nil || secretErr != nil || len(id) != keyIDSize || len(secret) != secretSize {
			return nil, errors.New("the value has a key of another form")
		}
		k, err := makeRingKey(string(id), secret, time.Unix(d.ActiveFrom, 0).UTC())
		if err != nil {
			return nil, err
		}
		keys = append(keys, k)
	}
	slices.SortStableFunc(keys, func(a, b ringKey) int { return a.activeFrom.Compare(b.activeFrom) })
	return keys, nil
}

func encodeRing(keys []ringKey) ([]byte, error) {
	doc := ringDocument{Version: ringVersion}
	for _, k := range keys {
		doc.Keys = append(doc.Keys, ringDocKey{
			ID: hex.EncodeToString([]byte(k.id)), Secret: base64.StdEncoding.EncodeToString(k.secret), ActiveFrom: k.activeFrom.Unix(),
		})
	}
	value, err := json.Marshal(doc)
	if err != nil {
		return nil, fmt.Errorf("encoding the sealing keys: %w", err)
	}
	return value, nil
}

// additional is what a sealed token is bound to beside its content.
func additional(keyID, accessKeyID string) []byte { return []byte(sessionMark + keyID + accessKeyID) }

// seal makes a session token that only belongs to one access key id. It is false
// if there are no keys.
func (r *Ring) seal(accessKeyID string, content []byte) (string, bool) {
	k, ok := r.sealing()
	if !ok {
		return "", false
	}
	sealed := k.aead.Seal([]byte(k.id), nil, content, additional(k.id, accessKeyID))
	return sessionMark + base64.RawURLEncoding.EncodeToString(sealed), true
}

// sealing is the newest key in force; false if there are none.
func (r *Ring) sealing() (ringKey, bool) {
	keys := r.keys.Load()
	if keys == nil || len(*keys) == 0 {
		return ringKey{}, false
	}
	k := (*keys)[0]
	now := r.cfg.Now()
	for _, other := range (*keys)[1:] {
		if !now.Before(other.activeFrom) {
			k = other
		}
	}
	return k, true
}

// open gives back what was sealed. Its error is errSealed if that is certain;
// every other means that the keys could not be had.
func (r *Ring) open(ctx context.Context, accessKeyID, session string) ([]byte, error) {
	encoded, ok := strings.CutPrefix(session, sessionMark)
	if !ok || len(session) > maxSession {
		return nil, errSealed
	}
	sealed, err := base64.RawURLEncoding.Strict().DecodeString(encoded)
	if err != nil || len(sealed) < keyIDSize || strings.ContainsAny(encoded, "\r\n") {
		return nil, errSealed
	}
	id := string(sealed[:keyIDSize])
	k, ok := r.find(id)
	if !ok {
		if err := r.refreshFor(ctx, id); err != nil {
			return nil, err
		}
		if k, ok = r.find(id); !ok {
			return nil, errSealed
		}
	}
	content, err := k.aead.Open(nil, nil, sealed[keyIDSize:], additional(id, accessKeyID))
	if err != nil {
		return nil, errSealed
	}
	return content, nil
}

func (r *Ring) find(id string) (ringKey, bool) {
	keys := r.keys.Load()
	if keys == nil {
		return ringKey{}, false
	}
	i := slices.IndexFunc(*keys, func(k ringKey) bool { return k.id == id })
	if i < 0 {
		return ringKey{}, false
	}
	return (*keys)[i], true
}

// refreshFor reads the store because of a key that is not known here: another
// server may just have made it. Strangers can ask for keys that nobody has, so
// it does that once in a while only.
func (r *Ring) refreshFor(ctx context.Context, id string) error {
	r.refreshing.Lock()
	defer r.refreshing.Unlock()
	if _, ok := r.find(id); ok {
		return nil
	}
	now := r.cfg.Now()
	if now.Sub(r.asked).Abs() < minRefresh {
		return r.lastErr
	}
	r.asked = now
	return r.change(ctx, func(keys []ringKey) ([]ringKey, error) { return keys, nil })
}
