// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"errors"
	"log/slog"
	"net/netip"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/audit"
	"github.com/latchkey-dev/latchkey/pkg/credserver"
	"github.com/latchkey-dev/latchkey/pkg/evidence"
	"github.com/latchkey-dev/latchkey/pkg/verdict"
)

var start = time.Date(2026, 11, 21, 22, 0, 0, 0, time.UTC)

func served(pod evidence.PodUID, hit bool) credserver.Record {
	return credserver.Record{
		Status: 200, Reason: evidence.ReasonServed, Verdict: verdict.Verdict{Outcome: verdict.Serve, Reason: evidence.ReasonServed}, Judged: true,
		Attestation: evidence.Attestation{Finding: evidence.FindingPod, Pod: pod},
		Token:       evidence.Token{Subject: evidence.Subject{PodUID: pod, Namespace: "shop", ServiceAccount: "cart"}, PodName: "cart-0", Verified: true},
		Hit:         hit, Role: "arn:aws:sts::111122223333:assumed-role/r/s", Association: "a-1",
		Peer: netip.MustParseAddrPort("10.88.0.2:4000"), Start: start,
	}
}

func refused(pod, token evidence.PodUID) credserver.Record {
	r := served(pod, false)
	r.Status, r.Reason, r.Role, r.Association = 403, evidence.ReasonPodMismatch, "", ""
	r.Verdict = verdict.Verdict{Outcome: verdict.Refuse, Reason: evidence.ReasonPodMismatch}
	r.Token.Subject = evidence.Subject{PodUID: token, Namespace: "bank", ServiceAccount: "teller"}
	r.Told = "Access Denied."
	return r
}

// handled drains the queue as run does.
func (o *observer) handled() {
	for {
		select {
		case r := <-o.queue:
			o.handle(r)
		default:
			return
		}
	}
}

// Nothing that is served is worth a line at info, and one refusal is not worth
// one each.
func TestRequestsAreNotLoggedOneByOne(t *testing.T) {
	var log bytes.Buffer
	o := newObserver(newMetrics("v", "enforce"), slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelInfo})), nil, nil)
	for i := range 100 {
		o.Observe(served("a", i > 0))
	}
	o.handled()
	if log.Len() != 0 {
		t.Errorf("100 served requests are told in the log: %s", log.String())
	}
	for range 100 {
		o.Observe(refused("a", "b"))
		o.handled()
	}
	if n := strings.Count(log.String(), "\n"); n != 1 {
		t.Errorf("%d lines for 100 refusals at once, want 1", n)
	}
}

// What is remembered of a refusal is who really asked, what was claimed and what
// was told; a claim that nobody vouches for changes nothing else.
func TestDenialsAndLastVerdict(t *testing.T) {
	enriched := 0
	o := newObserver(newMetrics("v", "enforce"), slog.New(slog.DiscardHandler), func(r *audit.Record) { enriched++; r.Task.Container = "app" }, nil)
	a := &Agent{observer: o}
	o.Observe(served("a", false))
	o.Observe(refused("a", "b"))
	forged := refused("c", "")
	forged.Status, forged.Reason, forged.Verdict, forged.Err = 400, evidence.ReasonTokenSignature, verdict.Verdict{}, errors.New("signature is not valid")
	forged.Token, forged.Claimed = evidence.Token{}, evidence.Token{Subject: evidence.Subject{PodUID: "c", Namespace: "kube-system"}, PodName: "root"}
	forged.Start = start.Add(time.Second)
	o.Observe(forged)
	shadow := refused("d", "b")
	shadow.Status, shadow.Verdict.Report, shadow.Start = 200, true, start.Add(2*time.Second)
	o.Observe(shadow)
	probe := refused("a", "")
	probe.Status, probe.Reason = 404, credserver.ReasonNotFound
	o.Observe(probe)
	o.handled()

	got := a.Denials()
	if len(got) != 3 || enriched != 3 {
		t.Fatalf("%d denials, %d looked up: %+v", len(got), enriched, got)
	}
	if d := got[0]; !d.Shadow || d.Status != 200 || d.Attestation.Pod != "d" {
		t.Errorf("served although enforce mode would refuse: %+v", d)
	}
	if d := got[1]; d.Reason != evidence.ReasonTokenSignature || d.Attestation.Pod != "c" || d.Claimed.Verified || d.Claimed.PodName != "root" || d.Cause != "signature is not valid" {
		t.Errorf("the forged token: %+v", d)
	}
	if d := got[2]; d.Attestation.Pod != "a" || d.Claimed.Subject.PodUID != "b" || !d.Claimed.Verified || d.Told != "Access Denied." || d.Task.Container != "app" {
		t.Errorf("the stolen token: %+v", d)
	}
	// The probe of another path was no request for credentials.
	if last, ok := o.last("a"); !ok || last.Token.Subject.Namespace != "shop" || last.Reason != evidence.ReasonPodMismatch {
		t.Errorf("pod a is %+v, %v", last, ok)
	}
	if last, ok := o.last("c"); !ok || last.Token.PodName != "" || last.Status != 400 {
		t.Errorf("pod c took a name from a forged token: %+v, %v", last, ok)
	}
}

// The process that was refused is named although it has ended, as whoever asks
// comes later; its pod is named also where the evidence names no single one.
func TestDenialsNameTheProcess(t *testing.T) {
	o := newObserver(newMetrics("v", "enforce"), slog.New(slog.DiscardHandler), func(r *audit.Record) { r.Task.Pod = "a" }, nil)
	a := &Agent{observer: o}
	sleep := exec.Command("sleep", "600")
	if err := sleep.Start(); err != nil {
		t.Fatal(err)
	}
	pid := sleep.Process.Pid
	defer func() { _ = sleep.Process.Kill(); _ = sleep.Wait() }()
	// It is the test's own name until it executes.
	for deadline := time.Now().Add(30 * time.Second); processName(pid) != "sleep"; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("process %d is called %q", pid, processName(pid))
		}
	}
	o.Observe(served("a", false))
	r := refused("", "b")
	r.Attestation = evidence.Attestation{Finding: evidence.FindingContradictory, Reason: evidence.ReasonForeignNetns}
	r.Attestation.Connection.TGID = uint32(pid)
	o.Observe(r)
	o.handled()
	_ = sleep.Process.Kill()
	_ = sleep.Wait()
	got, err := a.denialsAfter("")
	if err != nil || len(got.Denials) != 1 {
		t.Fatalf("%+v, %v", got, err)
	}
	if d := got.Denials[0]; d.Process != "sleep" || d.PID != uint32(pid) || d.PodUID != "" || d.Pod != "cart-0" || d.Namespace != "shop" {
		t.Errorf("%+v", d)
	}
	if more, err := a.denialsAfter(strconv.FormatUint(got.Seq, 10)); err != nil || len(more.Denials) != 0 {
		t.Errorf("what was told is told again: %+v, %v", more, err)
	}
	if name := o.processName(0); name != "" {
		t.Errorf("no process is called %q", name)
	}
}

func TestLogLevels(t *testing.T) {
	var out bytes.Buffer
	l := newLogLevels(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug}), slog.LevelInfo)
	a := &Agent{levels: l, log: l.logger(LogAgent)}
	cache, tokens := l.logger(LogCache).With("k", 1).WithGroup("g"), l.logger(LogTokens)
	say := func(want int) {
		t.Helper()
		out.Reset()
		cache.Debug("x")
		tokens.Debug("y")
		if n := strings.Count(out.String(), "\n"); n != want {
			t.Errorf("%d lines, want %d: %s", n, want, out.String())
		}
	}
	say(0)
	if err := a.SetLogLevel(LogCache, slog.LevelDebug); err != nil {
		t.Fatal(err)
	}
	say(1)
	if !strings.Contains(out.String(), "component=cache") {
		t.Errorf("no component in %s", out.String())
	}
	if err := a.SetLogLevel(LogAll, slog.LevelDebug); err != nil {
		t.Fatal(err)
	}
	say(2)
	if err := a.SetLogLevel("kache", slog.LevelDebug); !errors.Is(err, ErrLogComponent) || !strings.Contains(err.Error(), LogCache) {
		t.Errorf("an unknown component: %v", err)
	}
	levels := a.LogLevels()
	if len(levels) != len(logComponents()) {
		t.Errorf("%v", levels)
	}
	for _, c := range logComponents() {
		if level, ok := levels[c]; !ok || level != slog.LevelDebug {
			t.Errorf("%s is at %v, %v", c, level, ok)
		}
	}
}

// BenchmarkObserveHit is what the agent's bookkeeping adds to an answer from the
// cache.
func BenchmarkObserveHit(b *testing.B) {
	for _, a := range hitAudits {
		b.Run("audit "+a.name, func(b *testing.B) {
			var log *audit.Log
			if a.on {
				log, _ = auditTo(b, a.sample)
			}
			o := newObserver(newMetrics("v", "enforce"), slog.New(slog.DiscardHandler), nil, log)
			r := served("a", true)
			b.ReportAllocs()
			for b.Loop() {
				o.Observe(r)
			}
		})
	}
}
