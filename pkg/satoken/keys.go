// SPDX-License-Identifier: Apache-2.0

package satoken

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// DefaultMinRefetch is the shortest time between two fetches that unknown
	// keys ask for.
	DefaultMinRefetch = 10 * time.Second
	// DefaultRefreshInterval is how often keys are fetched unasked. It bounds how
	// long a key that the cluster has withdrawn goes on being accepted.
	DefaultRefreshInterval = 5 * time.Minute
	// DefaultFileInterval is the same for a FileSource, which costs nothing to
	// look at.
	DefaultFileInterval = 30 * time.Second
	// DefaultFetchTimeout bounds one fetch.
	DefaultFetchTimeout = 10 * time.Second
)

// Document is what a Source has published.
type Document struct {
	// Issuer is the issuer that the source names; empty if it names none.
	Issuer string
	// Keys is a key document as ParseKeySet reads it.
	Keys []byte
}

// Source fetches a cluster's keys from one place that the operator has named:
// FileSource, IssuerSource or APIServerSource.
type Source interface {
	// Fetch gets the document. It is never called twice at once.
	Fetch(ctx context.Context) (Document, error)
	// Identity is a text that tells this source from every other, so that keys
	// cached from one are never used for another. Empty means that the
	// documents must not be cached on disk.
	Identity() (string, error)
	// NamesIssuer reports whether documents have an Issuer.
	NamesIssuer() bool
	// String is for people. It holds no secret.
	fmt.Stringer
}

// KeysConfig is what Keys is made of.
type KeysConfig struct {
	// Source is required.
	Source Source
	// CacheFile keeps the last keys over a restart. Its directory is made if it
	// is missing, with mode 0700. Empty means none.
	CacheFile string
	// MinRefetch: zero means DefaultMinRefetch.
	MinRefetch time.Duration
	// RefreshInterval: zero means DefaultRefreshInterval, or DefaultFileInterval
	// for a FileSource. Run varies it by a quarter either way, so that a
	// cluster's nodes do not ask all at once.
	RefreshInterval time.Duration
	// FetchTimeout: zero means DefaultFetchTimeout.
	FetchTimeout time.Duration
	// Logger: nil means none.
	Logger *slog.Logger
	// Now is the clock. Nil means time.Now.
	Now func() time.Time
}

// Keys is a KeySource that holds a source's keys in memory and on disk. Finding
// a key takes no lock. What a source has published stays in use until it
// publishes something else: a source that cannot be reached changes nothing.
type Keys struct {
	cfg KeysConfig
	log *slog.Logger
	set atomic.Pointer[publishedSet] // nil until the first fetch

	mu      sync.Mutex // guards what follows
	flight  *flight    // the fetch under way, if any
	ended   time.Time  // when the last fetch ended; zero: none has
	lastErr error      // how it ended

	generation                                 atomic.Uint64
	fetches, fetchErrors, unknown, cacheErrors atomic.Uint64
	lastSuccess                                atomic.Int64 // Unix nanoseconds; 0: none
}

// publishedSet is a set with the document it was read from.
type publishedSet struct {
	*KeySet
	document Document
	// cachedAs is the identity under which the document is in the cache file;
	// empty if it is not.
	cachedAs string
}

// flight is one fetch that any number of callers wait for. err is set before
// done is closed.
type flight struct {
	done chan struct{}
	err  error
}

// NewKeys makes a Keys, and reads the cache file. A cache file that cannot be
// used is logged and counted, not an error: the source has the keys.
func NewKeys(cfg KeysConfig) (*Keys, error) {
	if cfg.Source == nil {
		return nil, errors.New("keys need a source")
	}
	interval := DefaultRefreshInterval
	if _, ok := cfg.Source.(*FileSource); ok {
		interval = DefaultFileInterval
	}
	for _, d := range []struct {
		value  *time.Duration
		preset time.Duration
	}{
		{&cfg.MinRefetch, DefaultMinRefetch},
		{&cfg.RefreshInterval, interval},
		{&cfg.FetchTimeout, DefaultFetchTimeout},
	} {
		if *d.value < 0 {
			return nil, errors.New("a duration is negative")
		}
		if *d.value == 0 {
			*d.value = d.preset
		}
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	k := &Keys{cfg: cfg, log: cfg.Logger.With("key_source", cfg.Source.String())}
	k.loadCache()
	return k, nil
}

// NamesIssuer reports whether the source names an issuer.
func (k *Keys) NamesIssuer() bool { return k.cfg.Source.NamesIssuer() }

// Lookup finds a key. If the set at hand does not have it, or names another
// issuer, the keys are fetched again, at most once per MinRefetch; callers share
// that fetch, each waiting no longer than its own ctx.
//
// The answer is ErrUnknownKey or ErrIssuer only if the source was reached less
// than MinRefetch ago. If it was not, the error is ErrKeysUnavailable: the
// cluster may well have made a new key.
func (k *Keys) Lookup(ctx context.Context, issuer, kid string) (Key, error) {
	if set := k.set.Load(); set != nil {
		if key, err := set.Lookup(ctx, issuer, kid); err == nil {
			return key, nil
		}
	}
	if err := k.refetch(ctx, false); err != nil {
		return Key{}, fmt.Errorf("%w: %w", ErrKeysUnavailable, err)
	}
	key, err := k.set.Load().Lookup(ctx, issuer, kid)
	if err != nil {
		k.unknown.Add(1)
	}
	return key, err
}

// Refresh fetches the keys now, or joins the fetch under way. It waits no longer
// than ctx; the fetch itself goes on.
func (k *Keys) Refresh(ctx context.Context) error { return k.refetch(ctx, true) }

// Run keeps the keys fresh until ctx ends: at once, then every RefreshInterval;
// after a failure sooner, from MinRefetch up, doubling. It returns ctx's error.
func (k *Keys) Run(ctx context.Context) error {
	retry := k.cfg.MinRefetch
	for {
		wait := k.cfg.RefreshInterval
		if err := k.Refresh(ctx); err == nil {
			retry = k.cfg.MinRefetch
		} else {
			wait = min(retry, wait)
			retry = min(2*retry, k.cfg.RefreshInterval)
		}
		timer := time.NewTimer(time.Duration(float64(wait) * (0.75 + 0.5*rand.Float64())))
		select {
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		case <-timer.C:
		}
	}
}

// refetch waits for a fetch that ends after this call, or, unless force is set,
// ended less than MinRefetch ago.
func (k *Keys) refetch(ctx context.Context, force bool) error {
	k.mu.Lock()
	f := k.flight
	if f == nil {
		if age := k.cfg.Now().Sub(k.ended); !force && !k.ended.IsZero() && age >= 0 && age < k.cfg.MinRefetch {
			err := k.lastErr
			k.mu.Unlock()
			return err
		}
		f = &flight{done: make(chan struct{})}
		k.flight = f
		go k.fly(f)
	}
	k.mu.Unlock()
	select {
	case <-f.done:
		return f.err
	case <-ctx.Done():
		return fmt.Errorf("waiting for keys: %w", context.Cause(ctx))
	}
}

// fly runs one fetch. It is detached from whoever asked: one client that hangs
// up must not take the keys from the others.
func (k *Keys) fly(f *flight) {
	ctx, cancel := context.WithTimeout(context.Background(), k.cfg.FetchTimeout)
	defer cancel()
	k.fetches.Add(1)
	err := k.fetch(ctx)
	if err != nil {
		k.fetchErrors.Add(1)
		k.log.Warn("fetching token keys failed, keeping the last ones", "error", err)
	} else {
		k.lastSuccess.Store(k.cfg.Now().UnixNano())
	}
	f.err = err
	k.mu.Lock()
	k.flight, k.ended, k.lastErr = nil, k.cfg.Now(), err
	k.mu.Unlock()
	close(f.done)
}

func (k *Keys) fetch(ctx context.Context) error {
	document, err := k.cfg.Source.Fetch(ctx)
	if err != nil {
		return fmt.Errorf("fetching keys from %s: %w", k.cfg.Source, err)
	}
	old := k.set.Load()
	if old != nil && old.document.Issuer == document.Issuer && bytes.Equal(old.document.Keys, document.Keys) {
		// Writes the cache if that failed the last time, or if the source has
		// another CA now and would not know its own cache again.
		k.store(old)
		return nil
	}
	set, err := ParseKeySet(document.Issuer, document.Keys)
	if err != nil {
		return fmt.Errorf("reading keys of %s: %w", k.cfg.Source, err)
	}
	if k.NamesIssuer() && !set.NamesIssuer() {
		return fmt.Errorf("reading keys of %s: no issuer is named", k.cfg.Source)
	}
	k.store(&publishedSet{KeySet: set, document: document})
	k.generation.Add(1)
	k.log.Info("token keys changed", "keys", set.Len(), "issuer", set.Issuer(), "skipped", len(set.Skipped()))
	for _, reason := range set.Skipped() {
		k.log.Warn("a published key is not usable", "error", reason)
	}
	return nil
}

// store puts a set to use, then on disk: a slow disk must not hold new keys
// back. Only the one fetch under way calls it.
func (k *Keys) store(set *publishedSet) {
	k.set.Store(set)
	saved := *set
	saved.cachedAs = k.saveCache(set)
	k.set.Store(&saved)
}

// Stats are counters since the start, and the state of the keys.
type Stats struct {
	// Source names the source.
	Source string
	// Issuer is the issuer it names; empty if none.
	Issuer string
	// Keys is the number of usable keys at hand, Skipped that of published keys
	// that are not usable.
	Keys, Skipped int
	// Fetches counts fetches begun, FetchErrors those that failed.
	Fetches, FetchErrors uint64
	// UnknownKeys counts lookups of keys (or issuers) that the source does not
	// have.
	UnknownKeys uint64
	// CacheErrors counts cache files that could not be read or written.
	CacheErrors uint64
	// LastSuccess is when the source last answered; zero: not since the start,
	// so what Keys counts came from the cache file.
	LastSuccess time.Time
}

// Generation changes whenever the source publishes other keys: what was
// verified under an earlier one may be signed by a key that was withdrawn.
func (k *Keys) Generation() uint64 { return k.generation.Load() }

// Stats may be called at any time.
func (k *Keys) Stats() Stats {
	s := Stats{
		Source:      k.cfg.Source.String(),
		Fetches:     k.fetches.Load(),
		FetchErrors: k.fetchErrors.Load(),
		UnknownKeys: k.unknown.Load(),
		CacheErrors: k.cacheErrors.Load(),
	}
	if set := k.set.Load(); set != nil {
		s.Issuer, s.Keys, s.Skipped = set.Issuer(), set.Len(), len(set.Skipped())
	}
	if at := k.lastSuccess.Load(); at != 0 {
		s.LastSuccess = time.Unix(0, at)
	}
	return s
}
