// SPDX-License-Identifier: Apache-2.0

package audit

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

func TestDenialsRememberTheNewest(t *testing.T) {
	var d Denials
	r := stolen()
	d.Add(&r)
	again := stolen()
	again.Time = r.Time.Add(time.Second)
	again.Told = "newer"
	d.Add(&again)
	late := stolen() // an older one, from a slower worker
	late.Time = r.Time.Add(-time.Second)
	late.Told = "older"
	d.Add(&late)
	other := stolen()
	other.Time = r.Time.Add(time.Minute)
	other.Reason = evidence.ReasonTokenExpired
	d.Add(&other)

	got := d.List()
	if len(got) != 2 || got[0].Reason != evidence.ReasonTokenExpired {
		t.Fatalf("%+v", got)
	}
	n := got[1]
	if n.Count != 3 || !n.First.Equal(r.Time) || !n.Last.Equal(again.Time) || n.Told != "newer" || n.Status != 403 ||
		n.Attestation.Pod != podA || n.Claimed.Subject.PodUID != podB || !n.Claimed.Verified || n.Cause != "cause" || n.Peer != r.Peer {
		t.Errorf("%+v", n)
	}
	// What was given out is a copy.
	got[1].Count = 99
	if d.List()[1].Count != 3 {
		t.Error("a reader changed what is remembered")
	}
}

// Who asks for what came later is told of a request that began before what it has
// seen, and waited for upstream; and the numbers go on in the next process.
func TestDenialsAreNumberedAsTheyCome(t *testing.T) {
	var d Denials
	quick, slow, again := stolen(), stolen(), stolen()
	slow.Time, slow.Latency, slow.Reason = quick.Time.Add(-5*time.Second), 4*time.Second, evidence.ReasonUpstreamUnavailable
	again.Time = slow.Time.Add(-time.Second)
	again.Reason = slow.Reason
	var last uint64
	for _, r := range []Record{quick, slow, again} {
		d.Add(&r)
		var newest uint64
		for _, n := range d.List() {
			newest = max(newest, n.Seq)
			if n.Reason == r.Reason && n.Seq <= last {
				t.Errorf("%s, remembered after %d, has number %d", n.Reason, last, n.Seq)
			}
		}
		last = newest
	}
	var next Denials
	later := stolen()
	later.Time = quick.Time.Add(time.Second)
	next.Add(&later)
	if got := next.List()[0].Seq; got <= last {
		t.Errorf("the next process begins with %d, not after %d", got, last)
	}
}

// A pod that is refused without end has one entry per reason, so it pushes out
// nobody else.
func TestDenialsAreBoundedPerPod(t *testing.T) {
	var d Denials
	victim := stolen()
	victim.Attestation.Pod = podB
	d.Add(&victim)
	for i := range 3 * MaxDenials {
		r := stolen()
		r.Time = r.Time.Add(time.Duration(i) * time.Second)
		r.Token.JTI = fmt.Sprint("jti", i)
		r.Peer = netip.AddrPortFrom(r.Peer.Addr(), uint16(i))
		d.Add(&r)
		nested := r // from two pods at once: the task's own pod has the entry
		nested.Attestation = evidence.Attestation{Finding: evidence.FindingContradictory, Reason: evidence.ReasonTwoPods}
		nested.Attestation.Connection.TaskCgroup = evidence.CgroupID(i + 1)
		nested.Reason = evidence.ReasonTwoPods
		d.Add(&nested)
	}
	if got := d.List(); len(got) != 3 {
		t.Errorf("%d entries, want 3", len(got))
	}
}

func TestDenialsAreBounded(t *testing.T) {
	var d Denials
	start := issued().Time
	for i := range MaxDenials + 10 {
		r := stolen()
		r.Time = start.Add(time.Duration(i) * time.Second)
		r.Attestation.Pod = evidence.PodUID(fmt.Sprint("pod", i))
		d.Add(&r)
	}
	got := d.List()
	if len(got) != MaxDenials {
		t.Fatalf("%d entries, want %d", len(got), MaxDenials)
	}
	if oldest := got[len(got)-1].Attestation.Pod; oldest != "pod10" {
		t.Errorf("the oldest left is %s, want pod10", oldest)
	}
}
