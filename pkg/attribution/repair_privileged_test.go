// SPDX-License-Identifier: Apache-2.0

//go:build privileged

package attribution

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"github.com/latchkey-dev/latchkey/test/testnode"
)

// detach does what `bpftool link detach` does.
func (b *bed) detach(hook string) {
	b.t.Helper()
	l, err := link.LoadPinnedLink(filepath.Join(b.cfg.PinPath, Layout, "link_"+hook), nil)
	must(b.t, err)
	defer l.Close()
	must(b.t, l.Detach())
}

// Whatever of the programs somebody detaches, it is put back, with its pin, and
// evidence comes again; without anybody, nothing is touched.
func TestPrivilegedRepairAttachesAgain(t *testing.T) {
	b := ready(t)
	pod := b.pod("a", testnode.PodConfig{})
	proc := b.spawn(pod.Place())
	want := placeID(t, pod.Place())
	if ev, ok := b.dial(proc, dest4()); !ok || ev.TaskCgroup != want {
		t.Fatalf("before anything happened: %+v, %v", ev, ok)
	}
	unchanged := func(when string) {
		t.Helper()
		if hooks, err := b.a.Repair(); err != nil || len(hooks) != 0 {
			t.Fatalf("%s: repaired %v, %v", when, hooks, err)
		}
	}
	unchanged("nothing is wrong")
	var put uint64
	for _, c := range []struct {
		hooks      []string
		address    string
		noEvidence bool
	}{
		{[]string{"connect4"}, dest4(), true},
		{[]string{"connect6"}, dest6(), true},
		{[]string{"sockops"}, dest4(), true},
		{[]string{"sockops", "connect4", "connect6"}, dest6(), true},
	} {
		for _, h := range c.hooks {
			b.detach(h)
		}
		if ev, ok := b.dial(proc, c.address); ok == c.noEvidence {
			t.Errorf("%v detached: evidence %+v, %v", c.hooks, ev, ok)
		}
		hooks, err := b.a.Repair()
		if err != nil || !slices.Equal(hooks, c.hooks) {
			t.Errorf("repaired %v, %v; want %v", hooks, err, c.hooks)
		}
		put += uint64(len(c.hooks))
		if ev, ok := b.dial(proc, c.address); !ok || ev.TaskCgroup != want {
			t.Errorf("%v attached again: evidence %+v, %v", c.hooks, ev, ok)
		}
		unchanged("just repaired")
	}
	if got := b.a.Reattached(); got != put {
		t.Errorf("counted %d, want %d", got, put)
	}
	// The pins are the live links': the next agent takes them over.
	must(t, b.a.Close())
	b.open()
	if s := b.a.Status(); s.ReusedLinks != len(hooks) {
		t.Errorf("the next agent found %d links of %d", s.ReusedLinks, len(hooks))
	}
	unchanged("taken over")
	must(t, b.a.Close())
	unchanged("closed")
	b.open()
}

// What an agent that was killed over it left half pinned is in nobody's way, and
// goes with the rest.
func TestPrivilegedRepairHalfDone(t *testing.T) {
	b := ready(t)
	pin := filepath.Join(b.cfg.PinPath, Layout, "link_connect4")
	left := filepath.Join(b.cfg.PinPath, Layout, freshPin+"link_connect4")
	b.detach("connect4")
	must(t, os.Rename(pin, left))
	if hooks, err := b.a.Repair(); err != nil || !slices.Equal(hooks, []string{"connect4"}) {
		t.Errorf("repaired %v, %v", hooks, err)
	}
	if _, err := os.Lstat(pin); err != nil {
		t.Error(err)
	}
	must(t, os.Rename(pin, left))
	must(t, b.a.Close())
	b.a = nil
	if _, err := Cleanup(b.cfg.PinPath); err != nil {
		t.Error(err)
	}
}

// Another program in the link is replaced.
func TestPrivilegedRepairReplacesForeignProgram(t *testing.T) {
	b := ready(t)
	proc := b.spawn(b.pod("a", testnode.PodConfig{}).Place())
	foreign, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "foreign", Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	})
	must(t, err)
	defer foreign.Close()
	l, err := link.LoadPinnedLink(filepath.Join(b.cfg.PinPath, Layout, "link_connect4"), nil)
	must(t, err)
	defer l.Close()
	must(t, l.Update(foreign))
	if _, ok := b.dial(proc, dest4()); ok {
		t.Error("evidence, although the program is another")
	}
	if hooks, err := b.a.Repair(); err != nil || !slices.Equal(hooks, []string{"connect4"}) {
		t.Errorf("repaired %v, %v", hooks, err)
	}
	if _, ok := b.dial(proc, dest4()); !ok {
		t.Error("no evidence after the repair")
	}
}
