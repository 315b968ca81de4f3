// SPDX-License-Identifier: Apache-2.0

//go:build linux && privileged

package contract

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/test/clients"
	"github.com/latchkey-dev/latchkey/test/rig"
	"github.com/latchkey-dev/latchkey/test/testnode"
)

// agentBinary is made once by TestMain.
var agentBinary string

func TestMain(m *testing.M) {
	testnode.Main(actions())
	os.Exit(run(m))
}

func run(m *testing.M) int {
	if agentBinary = os.Getenv("LATCHKEY_AGENT"); agentBinary == "" {
		dir, err := os.MkdirTemp("", "latchkey-contract-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		agentBinary = filepath.Join(dir, "latchkey-agent")
		// Without the race detector: its memory is what some tests look at.
		build := exec.Command("go", "build", "-o", agentBinary, "../../cmd/latchkey-agent")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "building the agent: %v\n%s", err, out)
			return 1
		}
	}
	return m.Run()
}

// longest bounds a test; a test that hangs fails instead.
const longest = 90 * time.Second

// bed is a node with an agent.
type bed struct {
	*rig.Rig
	t     *testing.T
	ctx   context.Context
	agent *rig.Agent
}

// newBed makes a node whose agent has not been started.
func newBed(t *testing.T) *bed {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), longest)
	t.Cleanup(cancel)
	r, err := rig.New(ctx, rig.Config{AgentBinary: agentBinary})
	if err != nil {
		t.Fatal(err)
	}
	b := &bed{Rig: r, t: t, ctx: ctx}
	t.Cleanup(func() {
		if t.Failed() && b.agent != nil {
			t.Logf("the agent's log:\n%s", lastLines(b.agent.Log(), 40))
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return b
}

// start makes a node and starts its agent with more arguments.
func start(t *testing.T, args ...string) *bed {
	t.Helper()
	b := newBed(t)
	b.startAgent(b.Args(args...)...)
	return b
}

func (b *bed) startAgent(args ...string) {
	b.t.Helper()
	a, err := b.StartAgentExactly(b.ctx, args...)
	if err != nil {
		b.t.Fatal(err)
	}
	b.agent = a
}

// pod adds one with a role of its own.
func (b *bed) pod(name string) *rig.Pod {
	b.t.Helper()
	p := b.bare(testnode.PodConfig{Name: name})
	b.Associate(p.Namespace, p.ServiceAccount, name)
	return p
}

// bare adds one without an association.
func (b *bed) bare(cfg testnode.PodConfig) *rig.Pod {
	b.t.Helper()
	cfg.Namespace, cfg.ServiceAccount = "app", cfg.Name
	p, err := b.AddPod(b.ctx, cfg)
	if err != nil {
		b.t.Fatal(err)
	}
	return p
}

// ask asks once from the pod with its own token.
func (b *bed) ask(p *rig.Pod) rig.Answer {
	b.t.Helper()
	return b.askWith(p, p.Token)
}

func (b *bed) askWith(p *rig.Pod, token string) rig.Answer {
	b.t.Helper()
	a, err := rig.Ask(b.ctx, p.Place(), rig.Host4, token)
	if err != nil {
		b.t.Fatal(err)
	}
	return a
}

// served asks and returns the access key id.
func (b *bed) served(p *rig.Pod) string {
	b.t.Helper()
	a := b.ask(p)
	key := keyOf(a)
	if key == "" {
		b.t.Fatalf("%s is not served: %d %s", p.Name, a.Status, a.Body)
	}
	return key
}

// keyOf is the access key id of an answer, empty if it has no credentials.
func keyOf(a rig.Answer) string {
	var c struct{ AccessKeyId string }
	if a.Status != 200 || json.Unmarshal([]byte(a.Body), &c) != nil {
		return ""
	}
	return c.AccessKeyId
}

// dial opens a connection that the pod keeps.
func (b *bed) dial(p *rig.Pod, host string) *rig.Conn {
	b.t.Helper()
	c, proc, err := rig.Dial(b.ctx, p.Place(), host)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { c.Close(); proc.Kill() })
	return c
}

// spawn starts a process in the pod.
func (b *bed) spawn(p *rig.Pod) *testnode.Proc {
	b.t.Helper()
	proc, err := p.Spawn(b.ctx)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(proc.Kill)
	return proc
}

// call runs an action in a process.
func call[T any](b *bed, proc *testnode.Proc, action string, args any) (result T) {
	b.t.Helper()
	if err := proc.Call(b.ctx, action, args, &result); err != nil {
		b.t.Fatal(err)
	}
	return result
}

// metric is the sum of a metric's series whose labels contain all the texts.
func (b *bed) metric(name string, labels ...string) float64 {
	b.t.Helper()
	text, err := b.Metrics(b.ctx)
	if err != nil {
		b.t.Fatal(err)
	}
	sum, found := 0.0, false
	for line := range strings.Lines(text) {
		series, value, ok := strings.Cut(strings.TrimSpace(line), " ")
		if !ok || strings.TrimSuffix(series, series[min(len(name), len(series)):]) != name ||
			len(series) > len(name) && series[len(name)] != '{' {
			continue
		}
		match := true
		for _, l := range labels {
			match = match && strings.Contains(series, l)
		}
		v, err := strconv.ParseFloat(value, 64)
		if err != nil || !match {
			continue
		}
		sum, found = sum+v, true
	}
	if !found && len(labels) == 0 {
		b.t.Fatalf("no metric %s", name)
	}
	return sum
}

// until polls: some things happen in another process, and nothing tells of
// them. It fails the test when the test's time is over.
func (b *bed) until(what string, happened func() bool) {
	b.t.Helper()
	for !happened() {
		select {
		case <-b.ctx.Done():
			b.t.Fatalf("never happened: %s", what)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// kilobytes reads a field of the agent's /proc/PID/status, such as VmHWM.
func (b *bed) kilobytes(field string) int {
	b.t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", b.agent.PID()))
	if err != nil {
		b.t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, field+":"); ok {
			n, err := strconv.Atoi(strings.Fields(rest)[0])
			if err != nil {
				b.t.Fatal(err)
			}
			return n
		}
	}
	b.t.Fatalf("no %s of process %d", field, b.agent.PID())
	return 0
}

// quiet is a neighbour that asks while something is done, on a connection of
// its own each time. It fails the test if any request fails.
func (b *bed) quiet(p *rig.Pod, what string, during func()) {
	b.t.Helper()
	b.served(p)
	proc := b.spawn(p)
	done := make(chan struct{})
	type outcome struct {
		tally tally
		err   error
	}
	result := make(chan outcome, 1)
	go func() {
		var o outcome
		for {
			var t tally
			if o.err = proc.Call(b.ctx, "steady", steadyArgs{Token: p.Token, Requests: 10}, &t); o.err != nil {
				break
			}
			o.tally.add(t)
			select {
			case <-done:
				result <- o
				return
			default:
			}
		}
		result <- o
	}()
	during()
	close(done)
	o := <-result
	if o.err != nil {
		b.t.Fatal(o.err)
	}
	if o.tally.OK != o.tally.Asked || o.tally.Asked < 10 {
		b.t.Errorf("%s: the quiet pod got %d of %d requests answered; the others: %v", what, o.tally.OK, o.tally.Asked, o.tally.Other)
	}
}

func lastLines(s string, n int) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// sdk is aws-sdk-go-v2 in a process of its own in the place.
func (b *bed) sdk(place testnode.Place) (r clients.Result, err error) {
	err = place.Call(b.ctx, "fetch", nil, &r)
	return r, err
}

func dialTCP(ctx context.Context, address string) (net.Conn, error) {
	return (&net.Dialer{}).DialContext(ctx, "tcp", address)
}
