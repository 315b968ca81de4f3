// SPDX-License-Identifier: Apache-2.0

//go:build linux && privileged

package contract

import (
	"net/http"
	"testing"

	"github.com/latchkey-dev/latchkey/test/rig"
)

// 10,000 connections that are silent, or have begun a request and do not go on,
// cost a bounded amount of memory and no other pod a request. There is no limit
// of connections in the EKS Pod Identity Agent.
func TestPrivilegedIdleConnectionsAreBounded(t *testing.T) {
	b := start(t)
	greedy, quiet := b.pod("greedy"), b.pod("quiet")
	const many = 10_000
	// What 10,000 connections cost without a bound: tens of KiB each.
	const allowedKB = 48 << 10
	var opened int
	var before int
	b.quiet(quiet, "10,000 idle connections", func() {
		before = b.kilobytes("VmHWM")
		proc := b.spawn(greedy)
		opened = call[int](b, proc, "idle", idleArgs{Connections: many})
		// Those that are turned away are told why, which takes a moment.
		b.until("the agent keeps what one pod may have", func() bool { return b.metric("latchkey_connections") < 300 })
		// A second crowd, while the first is still there.
		call[int](b, b.spawn(greedy), "idle", idleArgs{Connections: 500})
	})
	if opened < many*9/10 {
		t.Errorf("only %d of %d connections were opened: the test shows nothing", opened, many)
	}
	grown := b.kilobytes("VmHWM") - before
	t.Logf("%d connections from one pod: the agent's peak of resident memory grew from %d by %d KiB", opened, before, grown)
	if grown > allowedKB {
		t.Errorf("resident memory grew by %d KiB", grown)
	}
	if n := b.metric("pod_identity_http_response", `code="429"`); n < many/2 {
		t.Errorf("%v connections were turned away", n)
	}
	// The silent ones are closed after a while, and the pod is served again.
	b.until("the greedy pod is served", func() bool {
		// Turned away, it may have been told so before it asked.
		a, err := rig.Ask(b.ctx, greedy.Place(), rig.Host4, greedy.Token)
		return err == nil && a.Status == http.StatusOK
	})
}

// Requests that trickle in byte by byte are ended, however long the client
// would go on.
func TestPrivilegedSlowHeadsAreEnded(t *testing.T) {
	t.Parallel() // waits most of its time
	b := start(t)
	slow, quiet := b.pod("slow"), b.pod("quiet")
	const many = 200
	b.quiet(quiet, "slow heads", func() {
		got := call[tally](b, b.spawn(slow), "drip", dripArgs{Connections: many, Token: slow.Token})
		if got.OK != 0 || got.Asked != many {
			t.Errorf("a head that never ends was answered: %+v", got)
		}
		t.Logf("ended with %v", got.Other)
	})
	b.until("no connection is left", func() bool { return b.metric("latchkey_connections") == 0 })
	b.served(slow)
}

// What clients do that are cut off, broken or hostile.
func TestPrivilegedRudeClients(t *testing.T) {
	b := start(t)
	rude, quiet := b.pod("rude"), b.pod("quiet")
	b.served(rude)
	before := b.kilobytes("VmHWM")
	b.quiet(quiet, "rude clients", func() {
		for _, tt := range []struct {
			kind   string
			count  int
			status string // of every one; empty: nobody listened
		}{
			{"reset at once", 300, ""},
			{"reset in the head", 300, ""},
			{"reset after the request", 300, ""},
			{"half-closed", 20, "200"},
			{"half-closed in the head", 20, "400"},
			{"pipelined", 4, "200"},
			{"head of 1 MB", 10, "431"},
			{"header of 1 MB", 10, "431"},
			{"token of 1 MB", 10, "431"},
		} {
			t.Run(tt.kind, func(t *testing.T) {
				got := call[tally](b, b.spawn(rude), "rude", rudeArgs{Kind: tt.kind, Connections: tt.count, Token: rude.Token})
				switch tt.status {
				case "200":
					if got.OK != tt.count {
						t.Errorf("%+v", got)
					}
				case "":
					if got.OK != 0 || got.Other["0"] != tt.count {
						t.Errorf("%+v", got)
					}
				default:
					// Closed without a word is right as well.
					if got.Other[tt.status]+got.Other["0"] != tt.count {
						t.Errorf("%+v", got)
					}
				}
			})
		}
	})
	b.until("no connection is left", func() bool { return b.metric("latchkey_connections") == 0 })
	b.served(rude)
	if grown := b.kilobytes("VmHWM") - before; grown > 32<<10 {
		t.Errorf("resident memory grew by %d KiB", grown)
	}
	select {
	case <-b.agent.Done():
		t.Errorf("the agent ended: %v", b.agent.Err())
	default:
	}
}
