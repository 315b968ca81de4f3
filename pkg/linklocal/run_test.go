// SPDX-License-Identifier: Apache-2.0

package linklocal

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

// running is a Keeper in Run, inside a synctest bubble: time passes only when
// every goroutine waits.
type running struct {
	nl     *fakeKernel
	keeper *Keeper
	opened int

	mu    sync.Mutex
	calls []string
}

func start(t *testing.T, nl *fakeKernel, edit ...func(*Config)) *running {
	t.Helper()
	r := &running{nl: nl}
	edit = append(edit, func(c *Config) {
		c.OnChange = func(f Family, present bool, err error) {
			s := fmt.Sprintf("%s %v", f, present)
			if err != nil {
				s += " error"
			}
			r.mu.Lock()
			defer r.mu.Unlock()
			r.calls = append(r.calls, s)
		}
		c.Subscribe = func(context.Context) (<-chan Event, error) {
			nl.mu.Lock()
			defer nl.mu.Unlock()
			r.opened++
			nl.events = make(chan Event, 1000)
			return nl.events, nil
		}
	})
	r.keeper = mustKeeper(t, nl, edit...)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- r.keeper.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	synctest.Wait()
	return r
}

func (r *running) take() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := r.calls
	r.calls = nil
	return c
}

func (r *running) meddle(f func(nl *fakeKernel)) {
	r.nl.mu.Lock()
	f(r.nl)
	r.nl.mu.Unlock()
	synctest.Wait()
}

func (r *running) repairs() uint64 { return r.keeper.State().Repairs(IPv4) }

func dropV4(nl *fakeKernel) { _ = nl.dropAddr(nl.link(DefaultLinkName).Attrs().Index, v4.AsSlice()) }

func TestRunTellsEachFamilyOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, newFakeKernel())
		if got := r.take(); !slices.Equal(got, []string{"ipv4 true", "ipv6 true"}) {
			t.Errorf("told %q", got)
		}
		n := len(r.nl.writes)
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if got := r.take(); len(got) != 0 || len(r.nl.writes) != n || r.repairs() != 0 {
			t.Errorf("nothing happened, yet told %q, wrote %q, repairs %d", got, r.nl.writes[n:], r.repairs())
		}
	})
}

func TestRunRepairs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, newFakeKernel())
		r.take()
		r.meddle(dropV4)
		time.Sleep(DefaultDebounce)
		synctest.Wait()
		if r.repairs() != 1 || !r.keeper.State().Addresses[0].Present {
			t.Fatalf("not repaired after one debounce: %+v", r.keeper.State())
		}
		// Its own change is an event too, and must not keep it going.
		n := len(r.nl.writes)
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		if len(r.nl.writes) != n || r.repairs() != 1 {
			t.Errorf("went on: wrote %q, repairs %d", r.nl.writes[n:], r.repairs())
		}
		if got := r.take(); len(got) != 0 {
			t.Errorf("the family was never found missing, yet told %q", got)
		}
	})
}

func TestRunBacksOffInAFight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, newFakeKernel(), func(c *Config) { c.MaxBackoff = 2 * time.Second })
		for range 60 * 100 {
			r.meddle(dropV4) // at most 10 ms after each repair
			time.Sleep(10 * time.Millisecond)
		}
		synctest.Wait()
		// Doubling from 50 ms to 2 s takes six repairs in the first 4 s;
		// then one every 2 s.
		if n := r.repairs(); n < 20 || n > 40 {
			t.Errorf("%d repairs in a minute", n)
		}
		time.Sleep(2 * time.Minute) // peace
		n := r.repairs()
		r.meddle(dropV4)
		time.Sleep(DefaultDebounce)
		synctest.Wait()
		if r.repairs() != n+1 {
			t.Error("the wait did not return to its start after a quiet time")
		}
	})
}

func TestRunChecksWithoutEvents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		nl := newFakeKernel()
		r := start(t, nl)
		r.meddle(func(nl *fakeKernel) {
			silent := nl.events
			nl.events = nil
			dropV4(nl)
			nl.events = silent
		})
		time.Sleep(DefaultCheckInterval)
		synctest.Wait()
		if r.repairs() != 1 {
			t.Error("not found by the check")
		}
	})
}

func TestRunSubscribesAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, newFakeKernel())
		r.meddle(func(nl *fakeKernel) {
			ended := nl.events
			nl.events = nil
			close(ended)
			dropV4(nl) // the event that was lost
		})
		time.Sleep(resubscribeDelay)
		synctest.Wait()
		if r.opened != 2 || r.repairs() != 1 {
			t.Errorf("opened %d times, repairs %d", r.opened, r.repairs())
		}
		r.meddle(dropV4)
		time.Sleep(time.Second)
		synctest.Wait()
		if r.repairs() != 2 {
			t.Error("the new stream is not read")
		}
	})
}

func TestRunWithoutSubscription(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		nl := newFakeKernel()
		k := mustKeeper(t, nl) // its Subscribe fails
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error)
		go func() { done <- k.Run(ctx) }()
		synctest.Wait()
		nl.mu.Lock()
		dropV4(nl)
		nl.mu.Unlock()
		time.Sleep(DefaultCheckInterval)
		synctest.Wait()
		if n := k.State().Repairs(IPv4); n != 1 {
			t.Errorf("repairs %d", n)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestRunIPv6AppearsAndGoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		root := t.TempDir()
		setSysctl(t, root, "default", "1")
		nl := newFakeKernel()
		r := start(t, nl, func(c *Config) { c.SysctlRoot = root })
		if got := r.take(); !slices.Equal(got, []string{"ipv4 true", "ipv6 false error"}) {
			t.Fatalf("told %q", got)
		}
		if _, err := r.keeper.State().Family(IPv6); !errors.Is(err, ErrIPv6Disabled) {
			t.Errorf("error %v", err)
		}

		setSysctl(t, root, "default", "0")
		setSysctl(t, root, DefaultLinkName, "0")
		// The kernel's sign: eth0 gets its own link-local address.
		r.meddle(func(nl *fakeKernel) {
			nl.emit(Event{Kind: AddressEvent, Address: netip.MustParseAddr("fe80::1"), LinkIndex: 2})
		})
		time.Sleep(DefaultDebounce)
		synctest.Wait()
		if got := r.take(); !slices.Equal(got, []string{"ipv6 true"}) {
			t.Fatalf("told %q", got)
		}

		setSysctl(t, root, DefaultLinkName, "1")
		r.meddle(func(nl *fakeKernel) { _ = nl.dropAddr(nl.link(DefaultLinkName).Attrs().Index, v6.AsSlice()) })
		time.Sleep(DefaultDebounce)
		synctest.Wait()
		if got := r.take(); !slices.Equal(got, []string{"ipv6 false error"}) {
			t.Errorf("told %q", got)
		}

		if err := os.RemoveAll(filepath.Join(root, "ipv6")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(DefaultCheckInterval)
		synctest.Wait()
		if got := r.take(); !slices.Equal(got, []string{"ipv6 false error"}) {
			t.Errorf("another reason has to be told, told %q", got)
		}
	})
}

// The holder of the address goes away: the agent takes over by itself.
func TestRunTakesOverWhenTheConflictEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		nl := newFakeKernel()
		nl.preload("eth0", v4, false)
		nl.preload("eth0", v6, false)
		r := start(t, nl)
		if got := r.take(); !slices.Equal(got, []string{"ipv4 false error", "ipv6 false error"}) {
			t.Fatalf("told %q", got)
		}
		if nl.link(DefaultLinkName) != nil {
			t.Error("a link was made though nothing can be put on it")
		}
		r.meddle(func(nl *fakeKernel) { _ = nl.dropAddr(2, v4.AsSlice()); _ = nl.dropAddr(2, v6.AsSlice()) })
		time.Sleep(DefaultDebounce)
		synctest.Wait()
		if got := r.take(); !slices.Equal(got, []string{"ipv4 true", "ipv6 true"}) {
			t.Errorf("told %q", got)
		}
	})
}

// The real stream ends when its context does, and closes its sockets.
func TestSubscribeNetlinkEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	events, err := SubscribeNetlink(ctx)
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	for range events {
	}
}

func TestConcerns(t *testing.T) {
	k := mustKeeper(t, newFakeKernel())
	mustEnsure(t, k)
	index := k.index
	tests := map[string]struct {
		e    Event
		want bool
	}{
		"our address on any link": {Event{Kind: AddressEvent, Address: v4, LinkIndex: 99}, true},
		"any address on our link": {Event{Kind: AddressEvent, Address: netip.MustParseAddr("fe80::1"), LinkIndex: index}, true},
		"a pod's address":         {Event{Kind: AddressEvent, Address: netip.MustParseAddr("10.0.0.9"), LinkIndex: 99}, false},
		"a pod's IPv6 address":    {Event{Kind: AddressEvent, Address: netip.MustParseAddr("fe80::2"), LinkIndex: 99}, false},
		"our link":                {Event{Kind: LinkEvent, Link: "renamed", LinkIndex: index}, true},
		"a link of our name":      {Event{Kind: LinkEvent, Link: DefaultLinkName, LinkIndex: 99}, true},
		"a pod's link":            {Event{Kind: LinkEvent, Link: "veth1", LinkIndex: 99}, false},
		"route to our address":    {Event{Kind: RouteEvent, Address: v6}, true},
		"a pod's route":           {Event{Kind: RouteEvent, Address: netip.MustParseAddr("10.0.0.9")}, false},
		"a prefix's route":        {Event{Kind: RouteEvent}, false},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			if got := k.concerns(tc.e); got != tc.want {
				t.Errorf("%v", got)
			}
		})
	}
}

func TestWait(t *testing.T) {
	k := mustKeeper(t, newFakeKernel(), func(c *Config) { c.Debounce = time.Second; c.MaxBackoff = 5 * time.Second })
	for streak, want := range []time.Duration{1, 2, 4, 5, 5} {
		if got := k.wait(streak); got != want*time.Second {
			t.Errorf("after %d repairs: %s", streak, got)
		}
	}
	if got := k.wait(1 << 40); got != 5*time.Second {
		t.Errorf("after very many: %s", got)
	}
	k = mustKeeper(t, newFakeKernel(), func(c *Config) { c.Debounce = time.Minute })
	if got := k.wait(3); got != time.Minute {
		t.Errorf("never below the debounce, got %s", got)
	}
}

func TestCleanup(t *testing.T) {
	has := func(removed []string, s string) bool {
		return slices.ContainsFunc(removed, func(r string) bool { return strings.Contains(r, s) })
	}
	t.Run("dummy link of ours", func(t *testing.T) {
		nl := newFakeKernel()
		k := mustKeeper(t, nl)
		mustEnsure(t, k)
		removed, err := k.Cleanup(context.Background())
		if err != nil || !has(removed, DefaultLinkName) {
			t.Errorf("removed %q, error %v", removed, err)
		}
		if len(nl.links) != 2 || len(nl.addrs) != 0 || len(nl.routes) != 0 {
			t.Errorf("left %v %v %v", nl.links, nl.addrs, nl.routes)
		}
		if st := k.State(); st.Link != "" || st.Addresses[0].Present {
			t.Errorf("state %+v", st)
		}
		if removed, err := k.Cleanup(context.Background()); err != nil || len(removed) != 0 {
			t.Errorf("again: removed %q, error %v", removed, err)
		}
	})
	t.Run("loopback, by an agent that knows other addresses", func(t *testing.T) {
		nl := newFakeKernel()
		nl.noDummy = true
		nl.preload("lo", netip.MustParseAddr("127.0.0.1"), false)
		nl.preload("lo", netip.MustParseAddr("::1"), false)
		mustEnsure(t, mustKeeper(t, nl))
		other := mustKeeper(t, nl, func(c *Config) { c.Addresses = []netip.Addr{netip.MustParseAddr("169.254.170.2")} })
		if _, err := other.Cleanup(context.Background()); err != nil {
			t.Fatal(err)
		}
		if len(nl.addrs) != 2 || len(nl.routes) != 0 || len(nl.link("lo").Attrs().AltNames) != 0 {
			t.Errorf("left %v %v %q", nl.addrs, nl.routes, nl.link("lo").Attrs().AltNames)
		}
	})
	t.Run("another's link stays", func(t *testing.T) {
		nl := newFakeKernel()
		nl.addLink(newForeignDummy())
		nl.preload(DefaultLinkName, v4, true)
		k := mustKeeper(t, nl)
		mustEnsure(t, k)
		if removed, err := k.Cleanup(context.Background()); err != nil || len(removed) != 0 {
			t.Errorf("removed %q, error %v", removed, err)
		}
		if nl.link(DefaultLinkName) == nil || len(nl.addrs) != 2 {
			t.Errorf("left %v %v", nl.links, nl.addrs)
		}
	})
	t.Run("another's address on loopback stays", func(t *testing.T) {
		nl := newFakeKernel()
		nl.noDummy = true
		nl.preload("lo", v4, true)
		k := mustKeeper(t, nl)
		mustEnsure(t, k)
		if _, err := k.Cleanup(context.Background()); err != nil {
			t.Fatal(err)
		}
		if len(nl.addrs) != 1 || !nl.addrs[0].IP.Equal(v4.AsSlice()) || len(nl.routes) != 1 {
			t.Errorf("left %v %v", nl.addrs, nl.routes)
		}
	})
	t.Run("a mark whose address is gone", func(t *testing.T) {
		nl := newFakeKernel()
		nl.link("lo").Attrs().AltNames = []string{altName(v6), "someone-elses"}
		if _, err := mustKeeper(t, nl).Cleanup(context.Background()); err != nil {
			t.Fatal(err)
		}
		if got := nl.link("lo").Attrs().AltNames; !slices.Equal(got, []string{"someone-elses"}) {
			t.Errorf("left %q", got)
		}
	})
	t.Run("an error keeps the mark for the next time", func(t *testing.T) {
		nl := newFakeKernel()
		nl.noDummy = true
		k := mustKeeper(t, nl)
		mustEnsure(t, k)
		nl.fail["AddrDel"] = unix.EPERM
		if _, err := k.Cleanup(context.Background()); !errors.Is(err, unix.EPERM) {
			t.Errorf("error %v", err)
		}
		delete(nl.fail, "AddrDel")
		if _, err := k.Cleanup(context.Background()); err != nil || len(nl.addrs) != 0 || len(nl.link("lo").Attrs().AltNames) != 0 {
			t.Errorf("error %v, left %v", err, nl.addrs)
		}
	})
	t.Run("somebody else was faster", func(t *testing.T) {
		nl := newFakeKernel()
		k := mustKeeper(t, nl)
		mustEnsure(t, k)
		nl.fail["LinkDel"] = unix.ENODEV
		if removed, err := k.Cleanup(context.Background()); err != nil || len(removed) != 0 {
			t.Errorf("removed %q, error %v", removed, err)
		}
	})
	t.Run("links cannot be listed", func(t *testing.T) {
		nl := newFakeKernel()
		nl.fail["LinkList"] = unix.EPERM
		if _, err := mustKeeper(t, nl).Cleanup(context.Background()); !errors.Is(err, ErrUncertain) {
			t.Errorf("error %v", err)
		}
	})
}
