// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/pkg/cgroup"
	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

func TestNewRefuses(t *testing.T) {
	good := newFakeTree(t).config(nil)
	for name, change := range map[string]func(*Config){
		"no root":     func(c *Config) { c.Root = cgroup.Root{} },
		"no mount":    func(c *Config) { c.Mount = cgroup.Mount{} },
		"no resolver": func(c *Config) { c.Resolver = nil },
	} {
		cfg := good
		change(&cfg)
		if _, err := New(cfg); !errors.Is(err, ErrConfig) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Attribution must not wait for the watch: nothing runs here.
func TestResolveWithoutRun(t *testing.T) {
	f := newFakeTree(t)
	f.mkdir("/kubepods")
	x := mustNew(t, f.config(nil))
	pod := f.mkdir(dirB)
	nested := f.mkdir(dirB + "/container/pod" + string(uidA))
	gone := f.mkdir(dirA)
	goneCached := f.mkdir(dirA + "/container")
	f.rmdir(dirA)
	f.set(func() { f.cached[goneCached] = true })

	first, err := x.Resolve(pod)
	if err != nil || first.UID != uidB || first.ID != pod || first.QoS != cgroup.Burstable || first.Ended() {
		t.Fatalf("got %+v, %v", first, err)
	}
	for name, tc := range map[string]struct {
		id  evidence.CgroupID
		pod *Pod
		err error
	}{
		"again":                     {pod, first, nil},
		"nested, named like a pod":  {nested, first, nil},
		"the root":                  {f.mkdir("/kubepods"), nil, cgroup.ErrNotPod},
		"a QoS directory":           {f.mkdir("/kubepods/besteffort"), nil, cgroup.ErrNotPod},
		"beside the root":           {f.mkdir("/system.slice"), nil, cgroup.ErrNotPod},
		"odd name in the root":      {f.mkdir("/kubepods/podx/" + "pod" + string(uidA)), nil, cgroup.ErrNotPod},
		"outside the mount":         {outsideID, nil, cgroup.ErrNotPod},
		"gone":                      {gone, nil, cgroup.ErrGone},
		"gone with its path cached": {goneCached, nil, cgroup.ErrGone},
		"never was":                 {7, nil, cgroup.ErrGone},
		"the kernel does not say":   {brokenID, nil, errBroken},
	} {
		t.Run(name, func(t *testing.T) {
			p, err := x.Resolve(tc.id)
			if p != tc.pod || !errors.Is(err, tc.err) {
				t.Errorf("got %+v, %v", p, err)
			}
		})
	}
	if s := x.Stats(); s.LazyPods != 1 || s.Pods != 1 {
		t.Errorf("stats %+v", s)
	}
}

// The directory goes between the look at it and the moment the pod is in the
// index, and its event has come before: nothing else would ever end it.
func TestLazyPodThatEndsMeanwhile(t *testing.T) {
	f := newFakeTree(t)
	id := f.mkdir(dirA)
	x := mustNew(t, f.config(nil))
	var once sync.Once
	f.set(func() {
		f.cached[id] = true
		f.onID = func(string) { once.Do(func() { f.rmdir(dirA) }) }
	})
	if p, err := x.Resolve(id); p != nil || !errors.Is(err, cgroup.ErrGone) {
		t.Errorf("got %+v, %v", p, err)
	}
	if got := x.List(); len(got) != 0 {
		t.Errorf("still listed: %+v", got)
	}
}

func TestRunReportsAndEnds(t *testing.T) {
	for name, run := range map[string]func(*Index) func(context.Context) error{
		"watched": func(x *Index) func(context.Context) error { return x.Run },
		"polled": func(x *Index) func(context.Context) error {
			return func(ctx context.Context) error { return x.run(ctx, nil) }
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFakeTree(t)
			a := f.mkdir(dirA)
			burstable := f.mkdir("/kubepods/burstable")
			var r record
			x := mustNew(t, f.config(&r))
			start(t, x, run(x))
			// What was there is reported before Ready.
			if got := r.all(); !slices.Contains(got, fmt.Sprintf("pod %s %d", uidA, a)) ||
				!slices.Contains(got, fmt.Sprintf("qos %d", burstable)) || len(got) != 2 {
				t.Fatalf("at the start: %q", got)
			}
			if want := name == "watched"; x.Stats().Watching != want {
				eventually(t, "the right mode", func() bool { return x.Stats().Watching == want })
			}

			old, err := x.Resolve(a)
			if err != nil {
				t.Fatal(err)
			}
			b := f.mkdir(dirB)
			eventually(t, "second pod", func() bool { return len(x.List()) == 2 })
			c := f.mkdir(dirC) // with its QoS directory
			eventually(t, "third pod, its class new", func() bool { return len(x.List()) == 3 })
			besteffort := f.mkdir("/kubepods/besteffort")

			f.rmdir(dirA)
			eventually(t, "end", old.Ended)
			again := f.mkdir(dirA)
			eventually(t, "same pod again", func() bool { return len(x.List()) == 3 })
			if p, err := x.Resolve(again); err != nil || p == old || p.Ended() || !old.Ended() {
				t.Errorf("after the return: %+v, %v; old one ended: %v", p, err, old.Ended())
			}
			f.rmdir("/kubepods/burstable")
			eventually(t, "end with its class", func() bool { return len(x.List()) == 2 })

			want := []string{
				fmt.Sprintf("pod %s %d", uidB, b), fmt.Sprintf("qos %d", besteffort), fmt.Sprintf("pod %s %d", uidC, c),
				fmt.Sprintf("end %s %d true", uidA, a), fmt.Sprintf("pod %s %d", uidA, again),
				fmt.Sprintf("end %s %d true", uidB, b),
			}
			eventually(t, "all callbacks", func() bool { return len(r.all()) == 2+len(want) })
			if got := r.all()[2:]; !slices.Equal(got, want) {
				t.Errorf("got  %q\nwant %q", got, want)
			}
			f.set(func() {
				if !slices.Contains(f.forgot, dirA) || !slices.Contains(f.forgot, dirB) {
					t.Errorf("forgotten: %q", f.forgot)
				}
			})
		})
	}
}

func TestRootThatGoesAndComes(t *testing.T) {
	f := newFakeTree(t)
	var r record
	x := mustNew(t, f.config(&r))
	start(t, x, x.Run) // no kubelet yet
	for range 3 {
		id := f.mkdir(dirB)
		eventually(t, "pod", func() bool { return len(x.List()) == 1 })
		eventually(t, "watch", func() bool { return x.Stats().Watching })
		p, err := x.Resolve(id)
		if err != nil {
			t.Fatal(err)
		}
		f.rmdir("/kubepods")
		eventually(t, "end", p.Ended)
		eventually(t, "no watch", func() bool { return !x.Stats().Watching })
	}
}

func TestRunTwice(t *testing.T) {
	f := newFakeTree(t)
	f.mkdir("/kubepods")
	x := mustNew(t, f.config(nil))
	start(t, x, x.Run)
	if err := x.Run(t.Context()); err == nil {
		t.Error("a second Run is accepted")
	}
}

// Lost events: the overflow asks for a scan, and a scan finds everything.
func TestOverflow(t *testing.T) {
	f := newFakeTree(t)
	a := f.mkdir(dirA)
	x := mustNew(t, f.config(nil))
	x.scan(nil)
	old, err := x.Resolve(a)
	if err != nil {
		t.Fatal(err)
	}
	f.rmdir(dirA)
	f.mkdir(dirA)
	f.mkdir(dirC)
	if !x.handle(nil, event{mask: unix.IN_Q_OVERFLOW}) {
		t.Error("no scan after an overflow")
	}
	x.scan(nil)
	if got := x.List(); len(got) != 2 || got[0].CgroupID == a || !old.Ended() {
		t.Errorf("pods %+v, old one ended: %v", got, old.Ended())
	}
	if s := x.Stats(); s.Overflows != 1 || s.Scans != 2 {
		t.Errorf("stats %+v", s)
	}
}

// The event of a removal comes after the same name was made and used again.
func TestLateDeleteEventEndsTheOldPodOnly(t *testing.T) {
	f := newFakeTree(t)
	f.mkdir(dirA)
	x := mustNew(t, f.config(nil))
	x.scan(nil)
	f.rmdir(dirA)
	id := f.mkdir(dirA)
	deleted := event{mask: unix.IN_DELETE | unix.IN_ISDIR, dir: "/kubepods", name: "pod" + string(uidA)}
	x.handle(nil, deleted) // ends the first one
	p, err := x.Resolve(id)
	if err != nil || p.ID != id {
		t.Fatalf("got %+v, %v", p, err)
	}
	x.handle(nil, deleted)
	if p.Ended() {
		t.Error("the new pod was ended by the old one's event")
	}
}

func TestUncertaintyEndsNobody(t *testing.T) {
	f := newFakeTree(t)
	id := f.mkdir(dirA)
	x := mustNew(t, f.config(nil))
	p, err := x.Resolve(id)
	if err != nil {
		t.Fatal(err)
	}
	f.set(func() { f.fail = errBroken })
	x.handle(nil, event{mask: unix.IN_DELETE | unix.IN_ISDIR, dir: "/kubepods", name: "pod" + string(uidA)})
	x.scan(nil)
	if p.Ended() || len(x.List()) != 1 {
		t.Error("a pod was ended although the kernel did not say so")
	}
	if x.Stats().Errors == 0 {
		t.Error("not counted")
	}
	if _, err := x.Resolve(f.mkdir(dirB)); !errors.Is(err, errBroken) {
		t.Errorf("a pod that could not be verified: %v", err)
	}
}

func TestAttest(t *testing.T) {
	f := newFakeTree(t)
	a, a2 := f.mkdir(dirA+"/c1"), f.mkdir(dirA+"/c2/nested")
	b := f.mkdir(dirB + "/c1")
	host := f.mkdir("/system.slice")
	gone := f.mkdir(dirC)
	f.rmdir(dirC)
	x := mustNew(t, f.config(nil))
	none, unresolved := evidence.FindingNone, evidence.ReasonUnresolved
	twoPods := evidence.ReasonTwoPods
	for name, tc := range map[string]struct {
		task, sock evidence.CgroupID
		finding    evidence.Finding
		reason     evidence.Reason
		pod        evidence.PodUID
	}{
		"one pod":                       {a, a, evidence.FindingPod, "", uidA},
		"two containers of one pod":     {a, a2, evidence.FindingPod, "", uidA},
		"socket of another pod":         {a, b, evidence.FindingContradictory, twoPods, ""},
		"socket of the host":            {a, host, evidence.FindingContradictory, twoPods, ""},
		"connected by the host":         {host, a, evidence.FindingContradictory, twoPods, ""},
		"host":                          {host, host, evidence.FindingNotPod, evidence.ReasonNotPod, ""},
		"host, outside the mount":       {host, outsideID, evidence.FindingNotPod, evidence.ReasonNotPod, ""},
		"gone":                          {gone, gone, none, unresolved, ""},
		"task gone":                     {gone, a, none, unresolved, ""},
		"socket's gone":                 {a, gone, none, unresolved, ""},
		"socket's gone, host":           {host, gone, none, unresolved, ""},
		"not recorded":                  {a, 0, none, unresolved, ""},
		"the kernel does not say":       {brokenID, a, none, unresolved, ""},
		"the kernel does not say, host": {host, brokenID, none, unresolved, ""},
	} {
		t.Run(name, func(t *testing.T) {
			conn := evidence.Connection{TaskCgroup: tc.task, SocketCgroup: tc.sock, TGID: 42}
			att, pod := x.Attest(conn, true)
			if att.Finding != tc.finding || att.Reason != tc.reason || att.Pod != tc.pod || att.Connection != conn {
				t.Errorf("got %+v", att)
			}
			if (pod != nil) != (tc.finding == evidence.FindingPod) || pod != nil && pod.UID != tc.pod {
				t.Errorf("pod %+v", pod)
			}
			if att.UnknownNetns != (tc.finding == evidence.FindingPod) {
				t.Error("no namespace is known here")
			}
		})
	}
	att, pod := x.Attest(evidence.Connection{}, false)
	if att != (evidence.Attestation{Finding: none, Reason: evidence.ReasonNoEvidence}) || pod != nil {
		t.Errorf("without evidence: %+v, %v", att, pod)
	}
	if s := x.Stats(); s.Unresolved != 7 || s.UnknownNetns != 2 || s.ForeignNetns != 0 {
		t.Errorf("stats %+v", s)
	}
}

func TestConcurrentUse(t *testing.T) {
	f := newFakeTree(t)
	f.mkdir("/kubepods")
	var r record
	cfg := f.config(&r)
	cfg.RescanEvery = time.Millisecond
	x := mustNew(t, cfg)
	start(t, x, x.Run)
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			dir := strings.Replace(dirA, "000000000001", fmt.Sprintf("%012d", i), 1)
			for range 50 {
				id := f.mkdir(dir)
				p, err := x.Resolve(id)
				if err != nil || p.ID != id || p.Ended() {
					t.Errorf("got %+v, %v", p, err)
				}
				x.Attest(evidence.Connection{TaskCgroup: id, SocketCgroup: id, NetnsInode: 5}, true)
				x.List()
				f.rmdir(dir)
				if p != nil {
					eventually(t, "end", p.Ended)
				}
			}
		})
	}
	wg.Wait()
	// Each pod's start is told before its end, and both once.
	eventually(t, "all callbacks", func() bool { return len(r.all()) == 2*4*50 })
	seen := map[string]bool{}
	for _, line := range r.all() {
		kind, rest, _ := strings.Cut(line, " ")
		rest = strings.TrimSuffix(rest, " true")
		if kind == "end" && !seen["pod "+rest] || seen[kind+" "+rest] {
			t.Errorf("out of order or twice: %s", line)
		}
		seen[kind+" "+rest] = true
	}
}

func TestHitDoesNotAllocate(t *testing.T) {
	f := newFakeTree(t)
	id := f.mkdir(dirB + "/c1")
	cfg := f.config(nil)
	f.procs(dirB+"/c1", 10)
	process(t, cfg.ProcFS, 10, 1, 77)
	x := mustNew(t, cfg)
	conn := evidence.Connection{TaskCgroup: id, SocketCgroup: id, NetnsCookie: 9, NetnsInode: 77}
	if n := testing.AllocsPerRun(100, func() {
		if att, p := x.Attest(conn, true); p == nil || att.UnknownNetns {
			t.Fatalf("got %+v", att)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
	if v, w := x.sandboxVerifies.Load(), x.sandboxWalks.Load(); v != 0 || w != 1 {
		t.Errorf("/proc was read: %d verifications, %d searches", v, w)
	}
}
