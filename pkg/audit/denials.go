// SPDX-License-Identifier: Apache-2.0

package audit

import (
	"cmp"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

// Denial is one kind of refusal that somebody met with lately: the same pod,
// for the same reason, as often as it happened.
type Denial struct {
	Reason evidence.Reason
	// Status is the HTTP status; 200 with Shadow: served although enforce mode
	// would have refused.
	Status int
	Shadow bool
	// First and Last are the times of the first and of the newest one, Count
	// how many there were.
	First, Last time.Time
	Count       uint64
	// Seq is greater than that of all that was remembered before, also by an
	// earlier process if the clock was not set back: a request that waited for
	// upstream is remembered after others that came later.
	Seq uint64

	// What follows is of the newest one.

	// Attestation is what the kernel says of who asked. Pod is empty unless the
	// finding is evidence.FindingPod.
	Attestation evidence.Attestation
	// Task is what else is known of who asked, for people.
	Task Task
	// Claimed is what the token says of itself. Claimed.Verified tells whether
	// its signature was checked; if not, anybody may have written it. Zero if
	// there was no token that could be read.
	Claimed evidence.Token
	// Peer is the client's end of the connection.
	Peer netip.AddrPort
	// Told is the text that the client was given.
	Told string
	// Cause is the cause as the agent knows it, for people on call; often empty.
	Cause string
}

// Denials remembers the recent refusals. It is bounded, and so that one pod
// that asks in vain without end cannot push out what happened to the others, a
// pod has one entry per reason. The zero value is ready.
type Denials struct {
	mu    sync.Mutex
	byKey map[denialKey]*Denial
	seq   uint64
}

// MaxDenials is how many kinds of refusal are remembered.
const MaxDenials = 1024

type denialKey struct {
	pod    evidence.PodUID
	peer   netip.Addr
	reason evidence.Reason
	shadow bool
}

// Add remembers a refusal, or one that enforce mode would have refused. It
// takes a lock and may allocate: not for the request path.
func (d *Denials) Add(r *Record) {
	k := denialKey{pod: r.Attestation.Pod, reason: r.Reason, shadow: r.Shadow}
	if k.pod == "" {
		k.pod = r.Task.Pod
	}
	if k.pod == "" {
		// Then the address is all that tells one from another.
		k.peer = r.Peer.Addr()
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	n := d.byKey[k]
	if n == nil {
		if d.byKey == nil {
			d.byKey = make(map[denialKey]*Denial)
		}
		if len(d.byKey) >= MaxDenials {
			d.evict()
		}
		n = &Denial{Reason: r.Reason, Shadow: r.Shadow, First: r.Time}
		d.byKey[k] = n
	}
	n.Count++
	// The time of the answer, as numbers that began at zero would repeat in the
	// next process.
	d.seq = max(d.seq+1, uint64(max(0, r.Time.Add(r.Latency).UnixNano())))
	n.Seq = d.seq
	if r.Time.Before(n.Last) {
		return // workers' records come in no strict order
	}
	n.Status, n.Last, n.Attestation, n.Claimed, n.Peer = r.Status, r.Time, r.Attestation, r.Token, r.Peer
	n.Task, n.Told, n.Cause = r.Task, clip(r.Told, maxTold), ""
	if r.Err != nil {
		n.Cause = clip(r.Err.Error(), maxTold)
	}
}

// evict removes the entry that was seen longest ago.
func (d *Denials) evict() {
	var oldest denialKey
	var at time.Time
	found := false
	for k, n := range d.byKey {
		if !found || n.Last.Before(at) {
			oldest, at, found = k, n.Last, true
		}
	}
	delete(d.byKey, oldest)
}

// List gives copies, newest first.
func (d *Denials) List() []Denial {
	d.mu.Lock()
	out := make([]Denial, 0, len(d.byKey))
	for _, n := range d.byKey {
		out = append(out, *n)
	}
	d.mu.Unlock()
	slices.SortFunc(out, func(a, b Denial) int {
		return cmp.Or(b.Last.Compare(a.Last), cmp.Compare(a.Reason, b.Reason), cmp.Compare(a.Attestation.Pod, b.Attestation.Pod))
	})
	return out
}
