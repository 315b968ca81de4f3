// SPDX-License-Identifier: Apache-2.0

package satoken

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
	"github.com/latchkey-dev/latchkey/test/standin/tokens"
)

// fakeSource publishes what a test sets.
type fakeSource struct {
	identity string

	mu       sync.Mutex
	document Document
	err      error

	fetches atomic.Int64
	// gate, if not nil, holds every fetch until it is closed or the fetch's
	// time is up.
	gate chan struct{}
}

func (f *fakeSource) publish(document Document, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.document, f.err = document, err
}

func (f *fakeSource) Fetch(ctx context.Context) (Document, error) {
	f.fetches.Add(1)
	if f.gate != nil {
		select {
		case <-f.gate:
		case <-ctx.Done():
			return Document{}, ctx.Err()
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.document, f.err
}

func (f *fakeSource) Identity() (string, error) { return f.identity, nil }
func (f *fakeSource) NamesIssuer() bool         { return true }
func (f *fakeSource) String() string            { return "fake source" }

// clock is advanced by hand.
type clock struct{ offset atomic.Int64 }

func (c *clock) now() time.Time          { return testNow().Add(time.Duration(c.offset.Load())) }
func (c *clock) advance(d time.Duration) { c.offset.Add(int64(d)) }

func newKeys(t testing.TB, cfg KeysConfig) *Keys {
	t.Helper()
	k, err := NewKeys(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func published(signers ...*tokens.Signer) Document {
	return Document{Issuer: tokens.DefaultIssuer, Keys: tokens.JWKS(signers...)}
}

func checkStats(t *testing.T, k *Keys, want Stats) {
	t.Helper()
	got := k.Stats()
	got.LastSuccess = want.LastSuccess
	want.Source, want.Issuer = got.Source, tokens.DefaultIssuer
	if got != want {
		t.Errorf("stats %+v, want %+v", got, want)
	}
}

func TestKeysFetchOnFirstLookupAndNoMore(t *testing.T) {
	s := signer(t, "ES256", "cluster")
	source := &fakeSource{document: published(s)}
	k := newKeys(t, KeysConfig{Source: source, Now: (&clock{}).now})
	for range 3 {
		if _, err := k.Lookup(t.Context(), tokens.DefaultIssuer, s.KeyID()); err != nil {
			t.Fatal(err)
		}
	}
	checkStats(t, k, Stats{Keys: 1, Fetches: 1})
}

func TestKeysUnknownKeyIsFetchedOncePerInterval(t *testing.T) {
	s, rotated := signer(t, "ES256", "cluster"), signer(t, "ES256", "other")
	source := &fakeSource{document: published(s)}
	c := &clock{}
	k := newKeys(t, KeysConfig{Source: source, Now: c.now})
	lookup := func(kid string, want error) {
		t.Helper()
		if _, err := k.Lookup(t.Context(), "", kid); !errors.Is(err, want) {
			t.Errorf("%v, want %v", err, want)
		}
	}
	lookup(s.KeyID(), nil)
	for range 100 {
		lookup("made-up", ErrUnknownKey)
	}
	source.publish(published(s, rotated), nil)
	c.advance(DefaultMinRefetch - 1)
	lookup(rotated.KeyID(), ErrUnknownKey)
	if got := source.fetches.Load(); got != 1 {
		t.Fatalf("%d fetches inside the interval", got)
	}
	c.advance(1)
	lookup(rotated.KeyID(), nil)
	lookup(s.KeyID(), nil)
	checkStats(t, k, Stats{Keys: 2, Fetches: 2, UnknownKeys: 101})
}

// While the source cannot be reached, a key we do not know may be a new one.
func TestKeysUnknownKeyIsUncertainWhileTheSourceFails(t *testing.T) {
	s, rotated := signer(t, "ES256", "cluster"), signer(t, "ES256", "other")
	source := &fakeSource{document: published(s)}
	c := &clock{}
	k := newKeys(t, KeysConfig{Source: source, Now: c.now})
	v := verifier(t, Config{Keys: k, Now: c.now})
	verify := func(s *tokens.Signer, want evidence.Reason) {
		t.Helper()
		raw := s.Token(tokens.Claims{})
		_, err := v.Verify(t.Context(), raw)
		checkRefusal(t, raw, err, want, "")
	}
	verify(s, "")
	verify(rotated, evidence.ReasonTokenUnknownKey)

	for name, document := range map[string]Document{
		"source fails":     {},
		"source is broken": {Issuer: tokens.DefaultIssuer, Keys: []byte("{")},
		"no issuer":        {Keys: s.JWKS()},
	} {
		t.Run(name, func(t *testing.T) {
			if document.Keys == nil {
				source.publish(document, errors.New("connection refused"))
			} else {
				source.publish(document, nil)
			}
			c.advance(DefaultMinRefetch)
			before := source.fetches.Load()
			for range 3 {
				verify(rotated, evidence.ReasonKeysUnavailable)
				verify(s, "") // the last keys stay
			}
			if got := source.fetches.Load() - before; got != 1 {
				t.Errorf("%d fetches", got)
			}
		})
	}

	source.publish(published(rotated), nil)
	c.advance(DefaultMinRefetch)
	verify(rotated, "")
	verify(s, evidence.ReasonTokenUnknownKey) // withdrawn
}

func TestKeysNoneYetIsUncertain(t *testing.T) {
	s := signer(t, "ES256", "cluster")
	k := newKeys(t, KeysConfig{Source: &fakeSource{err: errors.New("no route to host")}, Now: testNow})
	raw := s.Token(tokens.Claims{})
	_, err := verifier(t, Config{Keys: k}).Verify(t.Context(), raw)
	checkRefusal(t, raw, err, evidence.ReasonKeysUnavailable, "")
	if !strings.Contains(err.Error(), "no route to host") {
		t.Errorf("%v does not say why", err)
	}
}

// During a change of issuer a known key signs for a name that is not known yet.
func TestKeysFollowTheIssuer(t *testing.T) {
	s := signer(t, "ES256", "cluster")
	source := &fakeSource{document: published(s)}
	c := &clock{}
	k := newKeys(t, KeysConfig{Source: source, Now: c.now})
	if _, err := k.Lookup(t.Context(), "https://new.example", s.KeyID()); !errors.Is(err, ErrIssuer) {
		t.Errorf("%v", err)
	}
	source.publish(Document{Issuer: "https://new.example", Keys: s.JWKS()}, nil)
	c.advance(DefaultMinRefetch)
	if _, err := k.Lookup(t.Context(), "https://new.example", s.KeyID()); err != nil {
		t.Error(err)
	}
	if _, err := k.Lookup(t.Context(), tokens.DefaultIssuer, s.KeyID()); !errors.Is(err, ErrIssuer) {
		t.Errorf("%v", err)
	}
}

func TestKeysShareOneFetch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := signer(t, "ES256", "cluster")
		source := &fakeSource{document: published(s), gate: make(chan struct{})}
		k := newKeys(t, KeysConfig{Source: source})
		errs := make(chan error, 64)
		for range cap(errs) {
			go func() {
				_, err := k.Lookup(t.Context(), "", s.KeyID())
				errs <- err
			}()
		}
		synctest.Wait()
		if got := source.fetches.Load(); got != 1 {
			t.Errorf("%d fetches", got)
		}
		close(source.gate)
		for range cap(errs) {
			if err := <-errs; err != nil {
				t.Error(err)
			}
		}
		if got := source.fetches.Load(); got != 1 {
			t.Errorf("%d fetches", got)
		}
	})
}

// A client that gives up neither waits on nor stops the fetch for the others.
func TestKeysCallerGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := signer(t, "ES256", "cluster")
		source := &fakeSource{document: published(s), gate: make(chan struct{})}
		k := newKeys(t, KeysConfig{Source: source})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := k.Lookup(ctx, "", s.KeyID())
		if !errors.Is(err, ErrKeysUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v", err)
		}
		close(source.gate)
		synctest.Wait()
		if _, err := k.Lookup(t.Context(), "", s.KeyID()); err != nil {
			t.Error(err)
		}
		if got := source.fetches.Load(); got != 1 {
			t.Errorf("%d fetches", got)
		}
	})
}

func TestKeysFetchIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source := &fakeSource{gate: make(chan struct{})} // never opened
		k := newKeys(t, KeysConfig{Source: source})
		start := time.Now()
		_, err := k.Lookup(t.Context(), "", "x")
		if !errors.Is(err, ErrKeysUnavailable) {
			t.Errorf("%v", err)
		}
		if got := time.Since(start); got != DefaultFetchTimeout {
			t.Errorf("waited %v of the test's clock", got)
		}
	})
}

func TestKeysRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, rotated := signer(t, "ES256", "cluster"), signer(t, "ES256", "other")
		source := &fakeSource{document: published(s)}
		k := newKeys(t, KeysConfig{Source: source})
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- k.Run(ctx) }()
		synctest.Wait()
		checkStats(t, k, Stats{Keys: 1, Fetches: 1}) // at once

		source.publish(published(rotated), nil)
		time.Sleep(DefaultRefreshInterval / 2) // of the test's clock
		synctest.Wait()
		checkStats(t, k, Stats{Keys: 1, Fetches: 1})
		time.Sleep(DefaultRefreshInterval)
		synctest.Wait()
		if _, err := k.set.Load().Lookup(ctx, "", s.KeyID()); !errors.Is(err, ErrUnknownKey) {
			t.Errorf("a withdrawn key is still there: %v", err)
		}

		// Failures are tried again sooner, but ever more slowly.
		source.publish(Document{}, errors.New("down"))
		time.Sleep(2 * DefaultRefreshInterval)
		synctest.Wait()
		before := k.Stats().FetchErrors
		if before < 3 || before > 8 {
			t.Errorf("%d tries", before)
		}
		time.Sleep(4 * DefaultRefreshInterval)
		synctest.Wait()
		if more := k.Stats().FetchErrors - before; more < 2 || more > 6 {
			t.Errorf("%d more tries", more)
		}
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("%v", err)
		}
	})
}

func TestNewKeysChecksItsConfig(t *testing.T) {
	if _, err := NewKeys(KeysConfig{}); err == nil {
		t.Error("keys without a source")
	}
	if _, err := NewKeys(KeysConfig{Source: &fakeSource{}, MinRefetch: -1}); err == nil {
		t.Error("a negative duration")
	}
	file, err := NewFileSource("x")
	if err != nil {
		t.Fatal(err)
	}
	if got := newKeys(t, KeysConfig{Source: file}).cfg.RefreshInterval; got != DefaultFileInterval {
		t.Errorf("files are read every %v", got)
	}
}

// cached fills a cache file and returns its name.
func cached(t *testing.T, identity string, s *tokens.Signer) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "state", "keys.json")
	k := newKeys(t, KeysConfig{Source: &fakeSource{identity: identity, document: published(s)}, CacheFile: path})
	if err := k.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	checkStats(t, k, Stats{Keys: 1, Fetches: 1})
	return path
}

func TestCacheSurvivesARestart(t *testing.T) {
	s, rotated := signer(t, "ES256", "cluster"), signer(t, "ES256", "other")
	path := cached(t, "cluster one", s)
	for name, want := range map[string]fs.FileMode{path: 0o600, filepath.Dir(path): fs.ModeDir | 0o700} {
		if info, err := os.Stat(name); err != nil || info.Mode() != want {
			t.Errorf("%s: %v, %v", name, info.Mode(), err)
		}
	}

	source := &fakeSource{identity: "cluster one", err: errors.New("down")}
	c := &clock{}
	k := newKeys(t, KeysConfig{Source: source, CacheFile: path, Now: c.now})
	if _, err := k.Lookup(t.Context(), tokens.DefaultIssuer, s.KeyID()); err != nil {
		t.Error(err)
	}
	if !k.Stats().LastSuccess.IsZero() {
		t.Error("the source never answered")
	}
	// From the cache we cannot tell what other keys there are by now.
	if _, err := k.Lookup(t.Context(), "", rotated.KeyID()); !errors.Is(err, ErrKeysUnavailable) {
		t.Errorf("%v", err)
	}
	source.publish(published(rotated), nil)
	c.advance(DefaultMinRefetch)
	if _, err := k.Lookup(t.Context(), "", rotated.KeyID()); err != nil {
		t.Error(err)
	}
	again := newKeys(t, KeysConfig{Source: source, CacheFile: path})
	if _, err := again.set.Load().Lookup(t.Context(), "", rotated.KeyID()); err != nil {
		t.Errorf("the new keys are not in the file: %v", err)
	}
	if left, err := filepath.Glob(path + "*"); err != nil || len(left) != 1 {
		t.Errorf("files left: %v, %v", left, err)
	}
}

func TestCacheIsNotUsed(t *testing.T) {
	s := signer(t, "ES256", "cluster")
	must := func(t *testing.T, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, tc := range map[string]struct {
		spoil  func(t *testing.T, path string)
		errors uint64
	}{
		"missing":           {func(t *testing.T, path string) { must(t, os.Remove(path)) }, 0},
		"no directory":      {func(t *testing.T, path string) { must(t, os.RemoveAll(filepath.Dir(path))) }, 0},
		"of another source": {func(t *testing.T, path string) { must(t, os.Rename(cached(t, "cluster two", s), path)) }, 0},
		"of another version": {func(t *testing.T, path string) {
			must(t, os.WriteFile(path, []byte(`{"version":2,"source":"cluster one"}`), 0o600))
		}, 0},
		"garbage": {func(t *testing.T, path string) { must(t, os.WriteFile(path, []byte("x"), 0o600)) }, 1},
		"without keys": {func(t *testing.T, path string) {
			must(t, os.WriteFile(path, []byte(`{"version":1,"source":"cluster one"}`), 0o600))
		}, 1},
		"group may write":  {func(t *testing.T, path string) { must(t, os.Chmod(path, 0o620)) }, 1},
		"others may write": {func(t *testing.T, path string) { must(t, os.Chmod(path, 0o602)) }, 1},
		"directory others may write": {func(t *testing.T, path string) {
			must(t, os.Chmod(filepath.Dir(path), 0o777))
		}, 1},
		"symbolic link": {func(t *testing.T, path string) {
			must(t, os.Rename(path, path+".real"))
			must(t, os.Symlink(path+".real", path))
		}, 1},
		"directory is a symbolic link": {func(t *testing.T, path string) {
			must(t, os.Rename(filepath.Dir(path), filepath.Dir(path)+".real"))
			must(t, os.Symlink(filepath.Dir(path)+".real", filepath.Dir(path)))
		}, 1},
		"not a file": {func(t *testing.T, path string) {
			must(t, os.Remove(path))
			must(t, os.Mkdir(path, 0o700))
		}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			path := cached(t, "cluster one", s)
			tc.spoil(t, path)
			k := newKeys(t, KeysConfig{Source: &fakeSource{identity: "cluster one"}, CacheFile: path})
			if got := k.Stats(); got.Keys != 0 || got.CacheErrors != tc.errors {
				t.Errorf("%+v", got)
			}
		})
	}
}

// owned is a file as stat would describe it.
type owned struct {
	fs.FileInfo // nil: nothing else is asked
	uid         int
	mode        fs.FileMode
}

func (o owned) Sys() any          { return &syscall.Stat_t{Uid: uint32(o.uid)} }
func (o owned) Mode() fs.FileMode { return o.mode }

func TestCheckOwn(t *testing.T) {
	us := os.Geteuid()
	for name, tc := range map[string]struct {
		info owned
		ok   bool
	}{
		"ours":             {owned{uid: us, mode: 0o600}, true},
		"ours, readable":   {owned{uid: us, mode: 0o644}, true},
		"another user's":   {owned{uid: us + 1, mode: 0o600}, false},
		"group may write":  {owned{uid: us, mode: 0o660}, false},
		"others may write": {owned{uid: us, mode: 0o606}, false},
	} {
		if err := checkOwn("keys.json", tc.info); (err == nil) != tc.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A source that must not be cached, and a cache that cannot be written.
func TestCacheIsNotWritten(t *testing.T) {
	s := signer(t, "ES256", "cluster")
	directory := t.TempDir()
	path := filepath.Join(directory, "keys.json")
	k := newKeys(t, KeysConfig{Source: &fakeSource{document: published(s)}, CacheFile: path})
	if err := k.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("written: %v", err)
	}

	if err := os.Chmod(directory, 0o777); err != nil {
		t.Fatal(err)
	}
	k = newKeys(t, KeysConfig{Source: &fakeSource{identity: "one", document: published(s)}, CacheFile: path})
	for range 2 { // tried each time
		if err := k.Refresh(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	checkStats(t, k, Stats{Keys: 1, Fetches: 2, CacheErrors: 3})
	if err := os.Chmod(directory, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := k.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Errorf("not written when it could be: %v", err)
	}
}

func TestKeysConcurrently(t *testing.T) {
	s, rotated := signer(t, "ES256", "cluster"), signer(t, "ES256", "other")
	source := &fakeSource{identity: "one", document: published(s)}
	k := newKeys(t, KeysConfig{
		Source: source, CacheFile: filepath.Join(t.TempDir(), "keys.json"), MinRefetch: time.Nanosecond,
		Logger: slog.New(slog.DiscardHandler),
	})
	var group sync.WaitGroup
	for i := range 8 {
		group.Go(func() {
			for j := range 50 {
				switch (i + j) % 4 {
				case 0:
					source.publish(published(s, rotated), nil)
				case 1:
					source.publish(published(s), nil)
				case 2:
					k.Stats()
				}
				if _, err := k.Lookup(t.Context(), "", s.KeyID()); err != nil {
					t.Error(err)
				}
				if _, err := k.Lookup(t.Context(), "", rotated.KeyID()); err != nil && !errors.Is(err, ErrUnknownKey) {
					t.Error(err)
				}
			}
		})
	}
	group.Wait()
}

func BenchmarkKeysLookup(b *testing.B) {
	s := signer(b, "ES256", "cluster")
	k := newKeys(b, KeysConfig{Source: &fakeSource{document: published(s)}})
	if err := k.Refresh(b.Context()); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := k.Lookup(context.Background(), tokens.DefaultIssuer, s.KeyID()); err != nil {
				b.Error(err)
			}
		}
	})
}
