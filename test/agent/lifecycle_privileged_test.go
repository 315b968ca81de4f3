// SPDX-License-Identifier: Apache-2.0

//go:build linux && privileged

package agent

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/latchkey-dev/latchkey/pkg/attribution"
	"github.com/latchkey-dev/latchkey/test/rig"
	"github.com/latchkey-dev/latchkey/test/testnode"
)

// hasRing tells whether the kernel programs keep a ring of handshakes for a pod.
func (w *world) hasRing(t *testing.T, podCgroup uint64) bool {
	t.Helper()
	m, err := ebpf.LoadPinnedMap(filepath.Join(w.PinPath(), attribution.Layout, "map_inflight"), &ebpf.LoadPinOptions{ReadOnly: true})
	must(t, err)
	defer m.Close()
	value, err := m.LookupBytes(podCgroup)
	must(t, err)
	return value != nil
}

// settled waits until the agent knows of no pod that the node does not have, and
// has dropped the others' credentials.
func (w *world) settled(t *testing.T) {
	t.Helper()
	eventually(t, func() error {
		pods, err := w.Admin().Pods(t.Context())
		if err != nil {
			return err
		}
		if n, has := len(pods), len(w.Node.Pods()); n != has {
			return fmt.Errorf("the agent lists %d pods, the node has %d", n, has)
		}
		if n, most := w.metric(t, "latchkey_cache_entries"), float64(len(pods)); n > most {
			return fmt.Errorf("%g cached credentials of %g pods", n, most)
		}
		return nil
	})
}

// A pod's end is final at once: on connections that somebody still holds, in
// the cache, and in the kernel.
func TestPrivilegedDeletedPodIsForgotten(t *testing.T) {
	w := sharedWorld(t)
	p, quiet := w.newPod(t, testnode.PodConfig{}), w.newPod(t, testnode.PodConfig{})
	neighbour := w.quietNeighbour(t, quiet)
	id, err := testnode.CgroupID(p.CgroupDir())
	must(t, err)
	c := newClient(t, p.Place())
	kept4, kept6 := c.dial(rig.Host4), c.dial(rig.Host6)
	wantCredentials(t, ask(t, kept4, p.Token), p)
	wantCredentials(t, ask(t, kept6, p.Token), p)
	wantCredentials(t, askFrom(t, quiet.Place(), rig.Host4, quiet.Token), quiet)
	if !w.hasRing(t, uint64(id)) {
		t.Error("the kernel programs know nothing of the pod")
	}
	// The pods of earlier tests have gone by now, or nearly.
	w.settled(t)
	entries := w.metric(t, "latchkey_cache_entries")

	// Its network namespace stays, as one does that somebody holds.
	must(t, p.DeleteKeepingNetns(t.Context()))
	gone := time.Now()
	eventually(t, func() error {
		if a := ask(t, kept4, p.Token); a.Status == http.StatusOK {
			return errors.New("still served on a connection of the pod that has ended")
		}
		return nil
	})
	t.Logf("refused within %v of the cgroup's end", time.Since(gone).Round(time.Millisecond))
	wantRefusal(t, ask(t, kept6, p.Token), 403, textEnded)
	eventually(t, func() error {
		if now := w.metric(t, "latchkey_cache_entries"); now != entries-1 {
			return fmt.Errorf("%g cached credentials, want %g", now, entries-1)
		}
		if w.hasRing(t, uint64(id)) {
			return errors.New("the kernel programs keep the ring of a pod that has ended")
		}
		pods, err := w.Admin().Pods(t.Context())
		if err != nil {
			return err
		}
		for _, q := range pods {
			if q.UID == string(p.UID) {
				return errors.New("the pod is still listed")
			}
		}
		return nil
	})
	neighbour.wasServed(t)
}

// The next pod of that name is another pod.
func TestPrivilegedRecreatedPod(t *testing.T) {
	for _, tt := range []struct {
		name    string
		sameUID bool
	}{
		{"another UID, as a StatefulSet's", false},
		{"the same UID, as a static pod's", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := sharedWorld(t)
			first := w.newPod(t, testnode.PodConfig{})
			cfg := testnode.PodConfig{Name: first.Name, Namespace: first.Namespace, ServiceAccount: first.ServiceAccount}
			if tt.sameUID {
				cfg.UID = first.UID
			}
			kept := newClient(t, first.Place()).dial(rig.Host4)
			wantCredentials(t, ask(t, kept, first.Token), first)
			must(t, first.DeleteKeepingNetns(t.Context()))

			again, err := w.AddPod(t.Context(), cfg)
			must(t, err)
			t.Cleanup(func() { again.Delete(context.Background()) })
			second := &pod{again, first.account}
			c := newClient(t, second.Place())
			wantCredentials(t, c.ask(rig.Host4, second.Token), second)
			a := c.ask(rig.Host4, first.Token)
			if tt.sameUID {
				// The token names the pod by its UID, and that is the pod's.
				wantCredentials(t, a, second)
			} else {
				wantRefusal(t, a, 403, textMismatch)
			}
			// What the first one opened is the first one's.
			if a := ask(t, kept, first.Token); a.Status != http.StatusForbidden {
				t.Errorf("on the first pod's connection: %d %s", a.Status, a.Body)
			}
			if a, err := kept.Ask(t.Context(), second.Token); err == nil && a.Status == http.StatusOK {
				t.Error("the second pod's token was served on the first pod's connection")
			}
			// For a minute nothing is kept for a UID whose pod has ended.
			if n := w.calls(second); n != 2 && !tt.sameUID {
				t.Errorf("EKS Auth was asked %d times for two pods, want twice", n)
			}
		})
	}
}

// detach takes the kernel programs away from under the agent.
func (w *world) detach(t *testing.T) {
	t.Helper()
	pins, err := filepath.Glob(filepath.Join(w.PinPath(), attribution.Layout, "link_*"))
	must(t, err)
	if len(pins) != 3 {
		t.Fatalf("pinned links: %q", pins)
	}
	for _, pin := range pins {
		l, err := link.LoadPinnedLink(pin, nil)
		must(t, err)
		must(t, l.Detach())
		must(t, l.Close())
	}
}

// A connection that no program saw being opened has no evidence and never gains
// any: it is closed, so that the client opens another. The agent notices that it
// cannot attest, and puts the programs back by itself.
func TestPrivilegedConnectionWithoutEvidence(t *testing.T) {
	w := newWorld(t, rig.Config{})
	w.start(t)
	p := w.newPod(t, testnode.PodConfig{})
	c := newClient(t, p.Place())
	before := c.dial(rig.Host4)
	wantCredentials(t, ask(t, before, p.Token), p)

	refused := 0.0
	for _, address := range []string{rig.Host4, rig.Host6} {
		eventually(t, func() error {
			w.detach(t)
			conn := c.dial(address)
			reply := exchange(t, conn, request("GET", rig.Path, hostOf(address), p.Token))
			if reply.Status == http.StatusOK {
				return errors.New("the agent was faster")
			}
			refused++
			wantRefusal(t, reply.Answer, 503, textNone)
			if !reply.closed || !strings.Contains(reply.head, "Connection: close") || reply.Header.Get("Retry-After") != "1" {
				t.Errorf("want the connection closed and Retry-After: 1, got closed %v and\n%s", reply.closed, reply.head)
			}
			return nil
		})
	}
	// Evidence that is there stays good.
	wantCredentials(t, ask(t, before, p.Token), p)
	if n := w.verdicts(t, "refused", "no_evidence"); n < refused {
		t.Errorf("%g refusals counted as no_evidence, want %g", n, refused)
	}
	var reason error
	eventually(t, func() error {
		w.detach(t)
		if _, reason = w.Ready(t.Context()); reason == nil {
			return errors.New("the agent calls itself ready while it cannot attest")
		}
		return nil
	})
	if !strings.Contains(reason.Error(), "evidence") {
		t.Errorf("readiness does not say why: %v", reason)
	}
	if _, err := w.Get(t.Context(), "2703", "/healthz"); err != nil {
		t.Errorf("healthz: %v", err)
	}

	// Left alone, it repairs itself.
	eventually(t, func() error {
		if a := c.ask(rig.Host4, p.Token); a.Status != http.StatusOK {
			return fmt.Errorf("%d %s", a.Status, a.Body)
		}
		_, err := w.Ready(t.Context())
		return err
	})
	thief := w.newPod(t, testnode.PodConfig{})
	whole := func() {
		t.Helper()
		w.wantAttachedOnce(t)
		wantCredentials(t, c.ask(rig.Host4, p.Token), p)
		wantCredentials(t, c.ask(rig.Host6, p.Token), p)
		wantRefusal(t, askFrom(t, thief.Place(), rig.Host4, p.Token), 403, textMismatch)
	}
	whole()
	if n := w.metric(t, "latchkey_bpf_reattached_total"); n < 3 {
		t.Errorf("%g programs were put back, want 3 at least", n)
	}
	w.logs(t, "attached them again")
	// What was put back is pinned for the next agent.
	w.stop(t)
	w.start(t)
	whole()
}
