// SPDX-License-Identifier: Apache-2.0

package linklocal

import (
	"context"
	"net/netip"
	"time"
)

// Run ensures the addresses, then keeps them: it looks again soon after an
// event that may concern them, and every Config.CheckInterval in any case. It
// ends when ctx does and returns nil; no state of the node ends it.
//
// A removed address is back after Config.Debounce. If something keeps removing
// it, the wait doubles with each repair up to Config.MaxBackoff, so two
// programs that disagree do not keep a processor busy.
func (k *Keeper) Run(ctx context.Context) error {
	told := map[Family]report{}
	streak := 0
	for ctx.Err() == nil {
		sub, cancel := context.WithCancel(ctx)
		// Subscribe before looking: what changes after the look is then
		// either seen by it or announced.
		events, err := k.cfg.Subscribe(sub)
		if err != nil {
			k.log.Warn("no netlink notifications, checking at intervals only", "error", err)
			events = nil
		}
		k.watch(ctx, events, told, &streak)
		cancel()
	}
	return nil
}

// report is what OnChange was told last. Errors are compared by their text:
// each look makes new values.
type report struct {
	present bool
	err     string
}

// watch returns when ctx ends, when the stream of events ends (the socket's
// buffer overflowed and notifications were lost), or after one interval if
// there is no stream, so that Run subscribes again.
func (k *Keeper) watch(ctx context.Context, events <-chan Event, told map[Family]report, streak *int) {
	check := time.NewTicker(k.cfg.CheckInterval)
	defer check.Stop()
	subscribed := events != nil
	k.pass(ctx, told)
	var due <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case e, ok := <-events:
			switch {
			case !ok:
				k.log.Warn("netlink notifications lost, subscribing again")
				// Not at once: under a flood of changes the next socket
				// would overflow as well.
				events = nil
				subscribed = false
				due = nil
				check.Reset(min(k.cfg.CheckInterval, resubscribeDelay))
			case due == nil && k.concerns(e):
				// The first event starts the clock and later ones do not
				// move it: a busy node cannot put a repair off.
				due = time.After(k.wait(*streak))
			}
		case <-due:
			due = nil
			if k.pass(ctx, told) {
				*streak++
			}
		case <-check.C:
			if !subscribed {
				return
			}
			if !k.pass(ctx, told) {
				*streak = 0
			}
		}
	}
}

const resubscribeDelay = time.Second

func (k *Keeper) wait(streak int) time.Duration {
	d := k.cfg.Debounce
	for range streak {
		if d >= k.cfg.MaxBackoff {
			break
		}
		d *= 2
	}
	return max(min(d, k.cfg.MaxBackoff), k.cfg.Debounce)
}

// pass ensures once, tells who wants to know, and says whether something had
// to be restored. Its own changes come back as one more event and one more
// pass, which finds nothing to do and so ends the matter.
func (k *Keeper) pass(ctx context.Context, told map[Family]report) (repaired bool) {
	before := k.State()
	r, err := k.Ensure(ctx)
	if ctx.Err() != nil {
		return false
	}
	if err != nil {
		k.log.Debug("no link-local address in place", "error", err)
	}
	for _, f := range k.families() {
		if n := r.Repairs(f); n != before.Repairs(f) {
			repaired = true
			k.log.Warn("link-local address was removed and has been restored", "family", f.String(), "link", r.Link, "repairs", n)
		}
		present, err := r.Family(f)
		now := report{present: present}
		if err != nil {
			now.err = err.Error()
		}
		if was, ok := told[f]; ok && was == now {
			continue
		}
		told[f] = now
		switch {
		case err != nil:
			k.log.Warn("link-local address state", "family", f.String(), "present", present, "link", r.Link, "error", err)
		default:
			k.log.Info("link-local address state", "family", f.String(), "present", present, "link", r.Link)
		}
		k.cfg.OnChange(f, present, err)
	}
	return repaired
}

// concerns says whether an event may have changed what Ensure looks at. A busy
// node has many events, nearly all of other links and addresses.
func (k *Keeper) concerns(e Event) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if e.Link == k.cfg.LinkName || k.index != 0 && e.LinkIndex == k.index {
		return true
	}
	missing6 := false
	for _, a := range k.last.Addresses {
		if a.Address == e.Address {
			return true
		}
		missing6 = missing6 || a.Address.Is6() && !a.Present
	}
	// IPv6 turned on somewhere shows as link-local addresses on every link.
	return missing6 && e.Kind == AddressEvent && e.Address.Is6()
}

// EventKind says what an [Event] is about.
type EventKind uint8

// The kinds of event.
const (
	// AddressEvent: an address was added, removed or changed.
	AddressEvent EventKind = iota + 1
	// LinkEvent: a link appeared, went away or changed.
	LinkEvent
	// RouteEvent: a route was added or removed.
	RouteEvent
)

// Event is one change of the kernel's network state.
type Event struct {
	Kind EventKind
	// Address of an AddressEvent, destination of a RouteEvent that concerns a
	// single host; else invalid.
	Address netip.Addr
	// LinkIndex of the link concerned; 0 if none.
	LinkIndex int
	// Link is the link's name, in a LinkEvent only.
	Link string
}
