// SPDX-License-Identifier: Apache-2.0

//go:build linux && privileged

package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/latchkey-dev/latchkey/pkg/attribution"
	"github.com/latchkey-dev/latchkey/pkg/credserver"
	"github.com/latchkey-dev/latchkey/test/rig"
	"github.com/latchkey-dev/latchkey/test/standin/eksauth"
	"github.com/latchkey-dev/latchkey/test/testnode"
)

// attached counts the programs at each hook of the node's cgroup.
func (w *world) attached(t *testing.T) map[ebpf.AttachType]int {
	t.Helper()
	dir, err := os.Open(w.Node.CgroupRoot())
	must(t, err)
	defer dir.Close()
	out := map[ebpf.AttachType]int{}
	for _, at := range []ebpf.AttachType{ebpf.AttachCGroupSockOps, ebpf.AttachCGroupInet4Connect, ebpf.AttachCGroupInet6Connect} {
		q, err := link.QueryPrograms(link.QueryOptions{Target: int(dir.Fd()), Attach: at})
		must(t, err)
		out[at] = len(q.Programs)
	}
	return out
}

func (w *world) wantAttachedOnce(t *testing.T) {
	t.Helper()
	for at, n := range w.attached(t) {
		if n != 1 {
			t.Errorf("%d programs are attached as %v, want one", n, at)
		}
	}
}

// event reads a counter of the kernel programs by way of the admin socket.
func (w *world) event(t *testing.T, name string) uint64 {
	t.Helper()
	s, err := w.Admin().Status(t.Context())
	must(t, err)
	return s.BPF[name]
}

// Killed with SIGKILL, the agent leaves the programs at work; the next one takes
// them over, and everybody is who they were.
func TestPrivilegedKilledAgentIsFollowedByTheNext(t *testing.T) {
	w := newWorld(t, rig.Config{})
	first := w.start(t)
	victim, thief := w.newPod(t, testnode.PodConfig{}), w.newPod(t, testnode.PodConfig{})
	inVictim, inThief := newClient(t, victim.Place()), newClient(t, thief.Place())
	kept := inVictim.dial(rig.Host4)
	wantCredentials(t, ask(t, kept, victim.Token), victim)
	connects := w.event(t, "connect")

	first.Kill()
	w.check(t)
	if _, err := kept.Ask(t.Context(), victim.Token); err == nil {
		t.Error("a connection of the killed agent still answers")
	}
	w.wantAttachedOnce(t)
	const tries = 7
	for range tries {
		if _, err := inVictim.tryDial(rig.Host4); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("connecting while no agent runs: %v, want it refused", err)
		}
	}

	second := w.start(t)
	if !strings.Contains(second.Log(), `"reused_links":3`) {
		t.Errorf("the links were not taken over:\n%s", second.Log())
	}
	w.wantAttachedOnce(t)
	// The counters are pinned too, so they show what was seen in between. The
	// agent's own probes count as well.
	if now := w.event(t, "connect"); now < connects+tries {
		t.Errorf("%d connects were seen before and %d after: the programs did not run in between", connects, now)
	}
	for _, address := range []string{rig.Host4, rig.Host6} {
		wantCredentials(t, inVictim.ask(address, victim.Token), victim)
		wantRefusal(t, inThief.ask(address, victim.Token), 403, textMismatch)
		wantCredentials(t, inThief.ask(address, thief.Token), thief)
	}
	w.stop(t)
}

// Connections that the kernel accepted before the agent came to it have their
// evidence: it was bound in the handshake, not by the agent.
func TestPrivilegedEvidenceDoesNotWaitForTheAgent(t *testing.T) {
	w := newWorld(t, rig.Config{})
	a := w.start(t)
	victim, thief := w.newPod(t, testnode.PodConfig{}), w.newPod(t, testnode.PodConfig{})
	inVictim, inThief := newClient(t, victim.Place()), newClient(t, thief.Place())
	// A process that is gone by the time the agent looks.
	gone := newClient(t, victim.Place())
	must(t, syscall.Kill(a.PID(), syscall.SIGSTOP))
	mine, stolen := inVictim.dial(rig.Host4), inThief.dial(rig.Host4)
	left := gone.dial(rig.Host6)
	gone.proc.Kill()
	must(t, syscall.Kill(a.PID(), syscall.SIGCONT))
	wantCredentials(t, ask(t, mine, victim.Token), victim)
	wantRefusal(t, ask(t, stolen, victim.Token), 403, textMismatch)
	wantCredentials(t, ask(t, left, victim.Token), victim)
}

// Pins of another version are taken over, and removed.
func TestPrivilegedPinsOfAnotherLayoutAreTakenOver(t *testing.T) {
	w := newWorld(t, rig.Config{})
	w.start(t).Kill()
	mine, other := filepath.Join(w.PinPath(), attribution.Layout), filepath.Join(w.PinPath(), "v0")
	must(t, os.Rename(mine, other))
	a := w.start(t)
	if !strings.Contains(a.Log(), `"reused_links":3`) || !strings.Contains(a.Log(), `"reused_maps":0`) {
		t.Errorf("links are reused and maps are not, by another layout:\n%s", a.Log())
	}
	w.wantAttachedOnce(t)
	if _, err := os.Stat(other); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the old pins are still there: %v", err)
	}
	pins, err := filepath.Glob(filepath.Join(mine, "link_*"))
	must(t, err)
	if len(pins) != 3 {
		t.Errorf("pinned links: %q", pins)
	}
	victim, thief := w.newPod(t, testnode.PodConfig{}), w.newPod(t, testnode.PodConfig{})
	wantCredentials(t, askFrom(t, victim.Place(), rig.Host4, victim.Token), victim)
	wantRefusal(t, askFrom(t, thief.Place(), rig.Host4, victim.Token), 403, textMismatch)
	// And an agent that pins nothing is good for itself.
	w.stop(t)
	_, err = w.Cleanup(t.Context())
	must(t, err)
	w.start(t, "--pin-path", "")
	wantCredentials(t, askFrom(t, victim.Place(), rig.Host4, victim.Token), victim)
	w.wantAttachedOnce(t)
	w.agent.Kill()
	for at, n := range w.attached(t) {
		if n != 0 {
			t.Errorf("%d programs stay attached as %v without a pin", n, at)
		}
	}
}

type answered struct {
	a   rig.Answer
	err error
	// took is how long it was waited for, where that is told.
	took time.Duration
}

// tooLate tells that the agent let go of a request because EKS Auth took long:
// after 1.8 s whoever asked is to come again.
func (a answered) tooLate() bool {
	return a.err == nil && a.a.Status >= http.StatusServiceUnavailable && a.took >= credserver.DefaultWaitTimeout
}

// waiting starts a request that waits for EKS Auth, and returns when it does.
func (w *world) waiting(t *testing.T, p *pod) <-chan answered {
	t.Helper()
	conn := newClient(t, p.Place()).dial(rig.Host4)
	out := make(chan answered, 1)
	go func() {
		began := time.Now()
		a, err := conn.Ask(context.WithoutCancel(t.Context()), p.Token)
		out <- answered{a, err, time.Since(began)}
	}()
	eventually(t, func() error {
		if now, _ := w.EKSAuth.InFlight(); now == 0 {
			return errors.New("EKS Auth is not asked")
		}
		return nil
	})
	return out
}

// inTime repeats a test that needs a request to wait for EKS Auth, on an agent of
// its own, until the machine is quick enough for it.
func inTime(t *testing.T, test func(t *testing.T) (late bool)) {
	t.Helper()
	for try := range 5 {
		late := false
		t.Run(fmt.Sprint("try ", try+1), func(t *testing.T) { late = test(t) })
		if !late || t.Failed() {
			return
		}
	}
	t.Error("in no try the request still waited when it mattered")
}

// SIGTERM lets a request that waits for EKS Auth end well, closes idle
// connections, and takes no new ones.
func TestPrivilegedStopAnswersWhoWaits(t *testing.T) { inTime(t, stopAnswersWhoWaits) }

func stopAnswersWhoWaits(t *testing.T) (late bool) {
	w := newWorld(t, rig.Config{})
	a := w.start(t)
	slow, idle := w.newPod(t, testnode.PodConfig{}), w.newPod(t, testnode.PodConfig{})
	inIdle := newClient(t, idle.Place())
	kept, silent := inIdle.dial(rig.Host4), inIdle.dial(rig.Host4)
	wantCredentials(t, ask(t, kept, idle.Token), idle)

	hold := make(chan struct{})
	release := sync.OnceFunc(func() { close(hold) })
	defer release()
	w.EKSAuth.Inject(eksauth.Fault{Hold: hold, Times: 1})
	reply := w.waiting(t, slow)
	must(t, syscall.Kill(a.PID(), syscall.SIGTERM))
	w.logs(t, `"msg":"stopping"`)
	for what, conn := range map[string]*rig.Conn{"that never asked": silent, "that is idle": kept} {
		must(t, conn.SetReadDeadline(time.Now().Add(patience)))
		if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("a connection %s: %v, want it closed", what, err)
		}
	}
	eventually(t, func() error {
		conn, err := inIdle.tryDial(rig.Host4)
		if err == nil {
			conn.Close()
		}
		if !errors.Is(err, syscall.ECONNREFUSED) {
			return fmt.Errorf("connecting to an agent that stops: %w, want it refused", cmp.Or(err, errNotYet))
		}
		return nil
	})
	release()
	got := <-reply
	must(t, got.err)
	if late = got.tooLate(); !late {
		wantCredentials(t, got.a, slow)
	}
	if code := ended(t, a); code != 0 {
		t.Errorf("exit status %d", code)
	}
	w.wantAttachedOnce(t)
	return late
}

// A second SIGTERM ends it at once.
func TestPrivilegedSecondSIGTERMEndsAtOnce(t *testing.T) { inTime(t, secondSIGTERMEndsAtOnce) }

func secondSIGTERMEndsAtOnce(t *testing.T) (late bool) {
	w := newWorld(t, rig.Config{})
	a := w.start(t)
	slow := w.newPod(t, testnode.PodConfig{})
	hold := make(chan struct{})
	defer close(hold)
	w.EKSAuth.Inject(eksauth.Fault{Hold: hold})
	reply := w.waiting(t, slow)
	must(t, syscall.Kill(a.PID(), syscall.SIGTERM))
	w.logs(t, `"msg":"stopping"`)
	if err := syscall.Kill(a.PID(), syscall.SIGTERM); !errors.Is(err, syscall.ESRCH) {
		must(t, err)
	}
	<-a.Done()
	got := <-reply
	if got.tooLate() {
		return true
	}
	var exit *exec.ExitError
	if !errors.As(a.Err(), &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGTERM {
		t.Errorf("the agent ended with %v, want it ended by the signal", a.Err())
	}
	if got.err == nil {
		t.Errorf("an answer came all the same: %+v", got.a)
	}
	// Nothing of it stands in the next one's way.
	w.EKSAuth.ClearFaults()
	w.start(t)
	wantCredentials(t, askFrom(t, slow.Place(), rig.Host4, slow.Token), slow)
	return false
}

// A second agent, whatever it was told, finds that one runs, says so, and
// breaks nothing.
func TestPrivilegedSecondAgentIsRefused(t *testing.T) {
	w := newWorld(t, rig.Config{})
	w.start(t)
	victim, thief := w.newPod(t, testnode.PodConfig{}), w.newPod(t, testnode.PodConfig{})
	inVictim, inThief := newClient(t, victim.Place()), newClient(t, thief.Place())
	kept := inVictim.dial(rig.Host4)
	wantCredentials(t, ask(t, kept, victim.Token), victim)
	elsewhere := []string{
		"--admin-socket", filepath.Join(w.Node.Dir(), "second", "admin.sock"), "--state-dir", filepath.Join(w.Node.Dir(), "second-state"),
		"--probe-port", "2713", "--metrics-port", "2715",
	}
	for _, tt := range []struct {
		name string
		args []string
	}{
		{"the same arguments", nil},
		{"other ports and paths, the same pins", elsewhere},
		{"another address, the same pins", append([]string{"-b", "127.0.0.1", "-p", "8080"}, elsewhere...)},
		{"the same address, other pins", append([]string{"--pin-path", filepath.Join(w.Node.BPFFS(), "second")}, elsewhere...)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			second, err := w.LaunchAgent(w.Args(tt.args...)...)
			must(t, err)
			if code := ended(t, second); code != 1 {
				t.Errorf("exit status %d, want 1; its log:\n%s", code, second.Log())
			}
			if log := second.Log(); !strings.Contains(log, "another") {
				t.Errorf("it does not say why:\n%s", log)
			}
			wantCredentials(t, ask(t, kept, victim.Token), victim)
			for _, address := range []string{rig.Host4, rig.Host6} {
				wantCredentials(t, inVictim.ask(address, victim.Token), victim)
				wantRefusal(t, inThief.ask(address, victim.Token), 403, textMismatch)
			}
			if _, err := w.Ready(t.Context()); err != nil {
				t.Errorf("the first agent: %v", err)
			}
			if _, err := w.Admin().Status(t.Context()); err != nil {
				t.Errorf("the first agent's admin socket: %v", err)
			}
			w.wantAttachedOnce(t)
		})
	}
	if n := w.calls(victim); n != 1 {
		t.Error(fmt.Sprint("EKS Auth was asked ", n, " times, want once"))
	}
}
