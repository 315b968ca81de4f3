// SPDX-License-Identifier: Apache-2.0

//go:build linux && privileged

package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/test/rig"
	"github.com/latchkey-dev/latchkey/test/standin/eksauth"
	"github.com/latchkey-dev/latchkey/test/testnode"
)

// patience is how long a test waits for something that should come soon.
const patience = 30 * time.Second

// The programs, once TestMain has built them.
var agentProgram, cliProgram string

func TestMain(m *testing.M) {
	testnode.Main()
	os.Exit(run(m))
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "latchkey-test-cli-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	args := []string{"build", "-buildvcs=false", "-ldflags", "-X main.version=v1.0.0", "-o", dir + "/"}
	// The Makefile's: -race, or nothing.
	args = append(args, strings.Fields(os.Getenv("RACE"))...)
	args = append(args, "github.com/latchkey-dev/latchkey/cmd/latchkey-agent", "github.com/latchkey-dev/latchkey/cmd/latchkey")
	out, err := exec.Command("go", args...).CombinedOutput()
	if err != nil {
		fmt.Fprintf(os.Stderr, "building the programs: %v\n%s", err, out)
		return 1
	}
	agentProgram, cliProgram = filepath.Join(dir, "latchkey-agent"), filepath.Join(dir, "latchkey")
	return m.Run()
}

// world is a node, and the agent that runs on it.
type world struct {
	*rig.Rig
	agent *rig.Agent
	pods  int
}

func newWorld(t *testing.T, cfg rig.Config) *world {
	t.Helper()
	cfg.AgentBinary = agentProgram
	cfg.Signer.Algorithm = "ES256"
	r, err := rig.New(t.Context(), cfg)
	must(t, err)
	w := &world{Rig: r}
	t.Cleanup(func() {
		if w.agent != nil {
			w.agent.Kill()
			for _, bad := range []string{"WARNING: DATA RACE", "panic:", "fatal error:"} {
				if log := w.agent.Log(); strings.Contains(log, bad) {
					t.Errorf("%q in the agent's log:\n%s", bad, log)
				}
			}
		}
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	return w
}

func (w *world) start(t *testing.T, more ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	a, err := w.StartAgent(ctx, append([]string{"--containerd-socket", "off"}, more...)...)
	must(t, err)
	w.agent = a
}

// pod is a pod whose application has the webhook's environment.
type pod struct {
	*rig.Pod
	app *testnode.Proc
}

func (p *pod) uid() string { return string(p.UID) }

// named adds a pod. It is associated with a role, unless role is empty.
func (w *world) named(t *testing.T, name, account, role string) *pod {
	t.Helper()
	p, err := w.AddPod(t.Context(), testnode.PodConfig{Name: name, Namespace: "web", ServiceAccount: account})
	must(t, err)
	t.Cleanup(func() { p.Delete(context.Background()) })
	if role != "" {
		w.Associate("web", account, role)
	}
	out := &pod{Pod: p}
	out.app, err = p.Place().WithEnv(p.AWSEnv("")...).Spawn(t.Context())
	must(t, err)
	t.Cleanup(out.app.Kill)
	return out
}

// add is named with names that nobody else has.
func (w *world) add(t *testing.T) *pod {
	t.Helper()
	w.pods++
	name := fmt.Sprintf("app-%d", w.pods)
	return w.named(t, name, name, name)
}

// askFrom asks once from a process, and gives the status.
func askFrom(t *testing.T, from *testnode.Proc, token string) rig.Answer {
	t.Helper()
	c := dial(t, from)
	defer c.Close()
	return over(t, c, token)
}

func dial(t *testing.T, from *testnode.Proc) *rig.Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	c, err := from.DialContext(ctx, "tcp", rig.Host4)
	must(t, err)
	return rig.Over(c, rig.Host4)
}

func over(t *testing.T, c *rig.Conn, token string) rig.Answer {
	t.Helper()
	a, err := c.Ask(t.Context(), token)
	must(t, err)
	return a
}

// ask asks as the pod itself.
func (p *pod) ask(t *testing.T, token string) rig.Answer { return askFrom(t, p.app, token) }

// served demands credentials.
func (p *pod) served(t *testing.T) rig.Answer {
	t.Helper()
	a := p.ask(t, p.Token)
	if a.Status != 200 {
		t.Fatalf("%s was refused: %d %s", p.Name, a.Status, a.Body)
	}
	return a
}

// result is one run of the CLI.
type result struct {
	stdout, stderr string
	code           int
}

func (r result) lastLine() string {
	lines := strings.Split(strings.TrimRight(r.stdout, "\n"), "\n")
	return lines[len(lines)-1]
}

// latchkey runs the CLI on the node.
func (w *world) latchkey(t *testing.T, args ...string) result {
	t.Helper()
	return w.latchkeyUnder(t, nil, args...)
}

// latchkeyUnder runs it through another program.
func (w *world) latchkeyUnder(t *testing.T, wrapper []string, args ...string) result {
	t.Helper()
	argv := append(append([]string{}, wrapper...), cliProgram, "--admin-socket", w.Socket())
	return runIn(t, w.Node.HostPlace(), nil, append(argv, args...)...)
}

func runIn(t *testing.T, place testnode.Place, stdin *strings.Reader, argv ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	cmd := place.Command(ctx, argv...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if stdin != nil {
		cmd.Stdin = stdin
	}
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return result{out.String(), errs.String(), cmd.ProcessState.ExitCode()}
}

// eventually polls until f gives no error: refusals are noted behind the
// answer.
func eventually(t *testing.T, f func() error) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// refuse makes EKS Auth refuse every call, for the test.
func (w *world) refuse(t *testing.T, f eksauth.Fault) {
	t.Helper()
	f.Kind = eksauth.Refuse
	w.EKSAuth.Inject(f)
	t.Cleanup(w.EKSAuth.ClearFaults)
}
