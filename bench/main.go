// SPDX-License-Identifier: Apache-2.0

// Command bench measures what Latchkey costs, and writes it down.
//
//	go run ./bench                    print the report
//	go run ./bench -o docs/benchmarks.md   and put it between the marks in that file
//
// Everything is measured on one node of its own (test/rig), in one run, in
// rounds that take turns, so that what the machine does besides hurts all alike;
// ratios say more than times. It needs root, Debian's nginx-light, wrk and iproute2,
// and the Go toolchain. Nothing on the machine's own network changes.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/latchkey-dev/latchkey/test/testnode"
)

func main() {
	testnode.Main(actions())
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			os.Exit(2)
		}
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// bench is one run.
type bench struct {
	ctx    context.Context
	agent  string // the agent's program
	rounds int
	length time.Duration // of one measurement with load
	report strings.Builder
}

// cases are what can be measured, in the report's order.
func cases() []struct {
	name string
	run  func(*bench) error
} {
	return []struct {
		name string
		run  func(*bench) error
	}{
		{"hit", (*bench).hit},
		{"allocs", (*bench).allocations},
		{"fairness", (*bench).fairness},
		{"waiters", (*bench).waiters},
		{"giveup", (*bench).giveUp},
		{"memory", (*bench).memory},
		{"hooks", (*bench).hooks},
	}
}

func run(ctx context.Context, args []string) error {
	var names []string
	for _, c := range cases() {
		names = append(names, c.name)
	}
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	out := flags.String("o", "", "`file` to put the report into, between its marks")
	only := flags.String("only", strings.Join(names, ","), "cases, separated by commas")
	agent := flags.String("agent", "", "the agent's `program`; empty builds it")
	rounds := flags.Int("rounds", 5, "rounds of each comparison")
	length := flags.Duration("length", 2*time.Second, "of each measurement under load")
	if err := flags.Parse(args); err != nil {
		return err
	}
	for _, tool := range []string{"nginx", "wrk", "ip", "go"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("%s is missing: install Debian's nginx-light, wrk and iproute2, and Go", tool)
		}
	}
	b := &bench{ctx: ctx, agent: *agent, rounds: *rounds, length: *length}
	if b.agent == "" {
		dir, err := os.MkdirTemp("", "latchkey-bench-")
		if err != nil {
			return err
		}
		defer os.RemoveAll(dir)
		b.agent = filepath.Join(dir, "latchkey-agent")
		build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", b.agent, "./cmd/latchkey-agent")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if text, err := build.CombinedOutput(); err != nil {
			return fmt.Errorf("building the agent: %w\n%s", err, text)
		}
	}
	chosen := strings.Split(*only, ",")
	before := load()
	started := time.Now()
	for _, c := range cases() {
		if !slices.Contains(chosen, c.name) {
			continue
		}
		fmt.Fprintln(os.Stderr, "measuring", c.name)
		if err := c.run(b); err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
	}
	text := b.machine(started, before, load()) + b.report.String()
	fmt.Print(text)
	if *out == "" {
		return nil
	}
	return insert(*out, text)
}

// Marks in the file that the report is put into.
const (
	markBegin = "<!-- report: begin -->\n"
	markEnd   = "<!-- report: end -->\n"
)

var errNoMarks = errors.New("has no marks for the report")

// insert replaces what is between the marks.
func insert(file, text string) error {
	old, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	before, rest, ok := bytes.Cut(old, []byte(markBegin))
	_, after, ok2 := bytes.Cut(rest, []byte(markEnd))
	if !ok || !ok2 {
		return fmt.Errorf("%s %w", file, errNoMarks)
	}
	return os.WriteFile(file, []byte(string(before)+markBegin+text+markEnd+string(after)), 0o644)
}

// printf adds to the report.
func (b *bench) printf(format string, args ...any) { fmt.Fprintf(&b.report, format, args...) }

// machine is where and when this was measured.
func (b *bench) machine(started time.Time, before, after string) string {
	kernel, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	revision, _ := exec.CommandContext(b.ctx, "git", "describe", "--always", "--dirty").Output()
	nginx, _ := exec.CommandContext(b.ctx, "nginx", "-v").CombinedOutput()
	return fmt.Sprintf("Measured %s in %s at revision %s: Linux %s, %d CPUs (%s), %s, %s; load average %s before and %s after.\n\n",
		started.UTC().Format("2006-01-02 15:04"), time.Since(started).Round(time.Second), strings.TrimSpace(string(revision)),
		strings.TrimSpace(string(kernel)), runtime.NumCPU(), cpuModel(), runtime.Version(),
		strings.TrimPrefix(strings.TrimSpace(string(nginx)), "nginx version: "), before, after)
}

func load() string {
	text, _ := os.ReadFile("/proc/loadavg")
	return strings.Join(strings.Fields(string(text))[:1], " ")
}

func cpuModel() string {
	text, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(text)) {
		if _, model, ok := strings.Cut(line, "model name\t: "); ok {
			return strings.TrimSpace(model)
		}
	}
	return "unknown"
}

// met says whether a target is.
func met(ok bool) string {
	if ok {
		return "met"
	}
	return "**missed**"
}

func median[T int | float64 | time.Duration](v []T) T { return quantile(v, 0.5) }

// quantile is the smallest value that at least q of them do not exceed.
func quantile[T int | float64 | time.Duration](v []T, q float64) T {
	if len(v) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(v))
	return s[min(len(s)-1, int(q*float64(len(s))))]
}
