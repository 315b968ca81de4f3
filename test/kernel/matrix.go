// SPDX-License-Identifier: Apache-2.0

// Package kernel is about the kernels that Latchkey runs on: it reads the logs
// of scripts/kernel-matrix, writes docs/kernels.md from them, and keeps count of
// what the verifier has to do for the programs. Its privileged tests print the
// facts about the kernel they run on.
package kernel

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Outcome of one test on one kernel.
type Outcome string

// Outcomes. NotHere is a test that says, by probing, that the kernel lacks what
// it tests, or one that not-here.tsv leaves out.
const (
	Pass    Outcome = "PASS"
	Fail    Outcome = "FAIL"
	NotHere Outcome = "NOT-HERE"
)

// Result of one test.
type Result struct {
	Package string
	Test    string
	Outcome Outcome
	// Why a test is not here, or how it failed if it did not say so itself.
	Why string
	// Output of a test that failed, its last lines.
	Output []string
	// Listed in not-here.tsv; Test is an expression then.
	Listed bool
}

// Feature is what a probe said on the kernel.
type Feature struct {
	Name, Since string
	// State is "yes", "missing", or an error's text.
	State string
}

// Count is the verifier's work for one program.
type Count struct {
	Program string
	// Processed instructions, over all paths: the kernel refuses a program at a
	// million.
	Processed int
	// Translated is the program's length as loaded, in instructions.
	Translated int
}

// Run is what one kernel's log says.
type Run struct {
	// Kernel is the name it was asked for by: host, 5.10.
	Kernel string
	// Release as uname -r says; empty if the kernel did not come up.
	Release string
	Results []Result

	Features  []Feature
	Fallbacks []string
	// Refused is why attribution does not start, empty if it does.
	Refused  string
	Verifier []Count
}

// FactPrefix begins a line of a test's output that states a fact about the
// kernel; fields follow, separated by tabs.
const FactPrefix = "FACT\t"

// Kinds of facts, the first field.
const (
	FactFeature  = "feature"  // name, since, state
	FactFallback = "fallback" // text
	FactRefused  = "refused"  // why
	FactVerifier = "verifier" // program, processed, translated
)

// Fact formats a fact, without the newline.
func Fact(fields ...string) string {
	clean := make([]string, len(fields))
	for i, f := range fields {
		clean[i] = strings.Map(func(r rune) rune {
			if r < ' ' {
				return ' '
			}
			return r
		}, f)
	}
	return FactPrefix + strings.Join(clean, "\t")
}

var (
	current = regexp.MustCompile(`^=== (RUN|CONT|NAME) +(\S+)$`)
	verdict = regexp.MustCompile(`^ *--- (PASS|FAIL|SKIP): (\S+) \(`)
	logLine = regexp.MustCompile(`^ *\S+\.go:\d+: (.*)$`)
	// What a test writes that finds the kernel without what it tests.
	notHere = regexp.MustCompile(`(?i)\bnot[- ](?:here|on this kernel): *(.+)$`)
)

// keptOutput is how many of a failed test's last lines are shown.
const keptOutput = 40

// running is a test that has begun.
type running struct {
	outcome Outcome
	why     string
	output  []string
}

// Parse reads the log of one kernel. It never fails on what a log says: what is
// wrong with it becomes a failed result, so that it cannot be overlooked.
func Parse(kernelName string, log io.Reader) (Run, error) {
	r := Run{Kernel: kernelName}
	var pkg, name string
	tests := map[string]*running{}
	var order []string
	var loose []string
	begun, done := false, false

	finish := func(exit string) {
		failed := false
		for _, n := range order {
			t := tests[n]
			res := Result{Package: pkg, Test: n, Outcome: t.outcome, Why: t.why}
			switch {
			case t.outcome == "":
				res.Outcome, res.Why = Fail, "it did not finish"
			case t.outcome == Pass && t.why != "":
				res.Outcome = NotHere
			case t.outcome == Fail:
				res.Why = ""
			}
			if res.Outcome == Fail {
				failed = true
				res.Output = t.output
			}
			// Subtests are told of only if there is something to tell.
			if !strings.Contains(n, "/") || res.Outcome != Pass {
				r.Results = append(r.Results, res)
			}
		}
		why := ""
		switch {
		case exit == "":
			why = "the run ended in this package"
		case exit != "0" && !failed:
			why = "the test program ended with status " + exit
		case len(order) == 0:
			why = "no test matched"
		}
		if why != "" {
			r.Results = append(r.Results, Result{Package: pkg, Test: "(package)", Outcome: Fail, Why: why, Output: loose})
		}
		pkg, name, tests, order, loose = "", "", map[string]*running{}, nil, nil
	}

	s := bufio.NewScanner(log)
	s.Buffer(nil, 4<<20)
	for s.Scan() {
		line := strings.TrimRight(s.Text(), "\r")
		if rest, ok := strings.CutPrefix(line, "MATRIX "); ok {
			kind, value, _ := strings.Cut(rest, " ")
			switch kind {
			case "kernel":
				r.Release, begun = value, true
			case "package":
				if pkg != "" {
					finish("")
				}
				pkg = value
			case "end":
				_, exit, _ := strings.Cut(value, " ")
				finish(exit)
			case "done":
				done = true
			}
			continue
		}
		if m := current.FindStringSubmatch(line); m != nil {
			name = m[2]
			if tests[name] == nil {
				tests[name] = &running{}
				order = append(order, name)
			}
			continue
		}
		// The marker of a test's end can follow what it left on the line.
		if i := strings.Index(line, "--- "); i > 0 && strings.TrimSpace(line[:i]) != "" && verdict.MatchString(line[i:]) {
			line = line[i:]
		}
		if m := verdict.FindStringSubmatch(line); m != nil {
			t := tests[m[2]]
			if t == nil {
				t = &running{}
				tests[m[2]] = t
				order = append(order, m[2])
			}
			switch m[1] {
			case "PASS":
				t.outcome = Pass
			case "FAIL":
				t.outcome = Fail
			case "SKIP":
				t.outcome = NotHere
				if t.why == "" && len(t.output) > 0 {
					t.why = t.output[len(t.output)-1]
				}
				if t.why == "" {
					t.why = "skipped, and does not say why"
				}
			}
			continue
		}
		if i := strings.Index(line, FactPrefix); i >= 0 {
			r.fact(strings.Split(line[i+len(FactPrefix):], "\t"))
			continue
		}
		if line == "PASS" || line == "FAIL" {
			// The whole program's.
			name = ""
			continue
		}
		if m := logLine.FindStringSubmatch(line); m != nil {
			line = m[1]
		}
		if t := tests[name]; t != nil {
			if m := notHere.FindStringSubmatch(line); m != nil {
				t.why = m[1]
			}
			t.output = keep(t.output, line)
		}
		loose = keep(loose, line)
	}
	if err := s.Err(); err != nil {
		return r, fmt.Errorf("reading the log of kernel %s: %w", kernelName, err)
	}
	if pkg != "" {
		finish("")
	}
	switch {
	case !begun:
		r.Results = append(r.Results, Result{Test: "(boot)", Outcome: Fail, Why: "the kernel did not come up"})
	case !done:
		r.Results = append(r.Results, Result{Test: "(run)", Outcome: Fail, Why: "the run did not get to its end: a time-out, or the kernel failed"})
	case len(r.Results) == 0:
		r.Results = append(r.Results, Result{Test: "(run)", Outcome: Fail, Why: "no test ran"})
	}
	return r, nil
}

func keep(lines []string, line string) []string {
	if line == "" {
		return lines
	}
	if len(lines) == keptOutput {
		lines = lines[1:]
	}
	return append(lines, line)
}

func (r *Run) fact(f []string) {
	switch {
	case f[0] == FactFeature && len(f) == 4:
		r.Features = append(r.Features, Feature{f[1], f[2], f[3]})
	case f[0] == FactFallback && len(f) == 2:
		r.Fallbacks = append(r.Fallbacks, f[1])
	case f[0] == FactRefused && len(f) == 2:
		r.Refused = f[1]
	case f[0] == FactVerifier && len(f) == 4:
		processed, err := strconv.Atoi(f[2])
		translated, err2 := strconv.Atoi(f[3])
		if err := errors.Join(err, err2); err == nil {
			r.Verifier = append(r.Verifier, Count{f[1], processed, translated})
			return
		}
		fallthrough
	default:
		r.Results = append(r.Results, Result{Test: "(facts)", Outcome: Fail, Why: fmt.Sprintf("a fact that nobody can read: %q", f)})
	}
}

// Failed says whether anything went wrong.
func (r *Run) Failed() bool {
	return slices.ContainsFunc(r.Results, func(x Result) bool { return x.Outcome == Fail })
}

// Count of the results with an outcome; subtests are not counted.
func (r *Run) Count(o Outcome) int {
	n := 0
	for _, x := range r.Results {
		if x.Outcome == o && !strings.Contains(x.Test, "/") {
			n++
		}
	}
	return n
}

// Verdict on the kernel in one word: supported, degraded (fallbacks are in
// use), refused (attribution does not start), or failed (a test did).
func (r *Run) Verdict() string {
	switch {
	case r.Refused != "":
		return "refused"
	case r.Failed():
		return "failed"
	case len(r.Features) == 0:
		// Without test/kernel nothing is known of the kernel.
		return "not told"
	case len(r.Fallbacks) > 0:
		return "degraded"
	}
	return "supported"
}

// LeftOut is a line of not-here.tsv.
type LeftOut struct {
	Kernel, Package, Test, Why string
}

// ParseLeftOut reads not-here.tsv.
func ParseLeftOut(f io.Reader) ([]LeftOut, error) {
	var out []LeftOut
	s := bufio.NewScanner(f)
	for n := 1; s.Scan(); n++ {
		line := s.Text()
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		c := strings.Split(line, "\t")
		if len(c) != 4 || slices.Contains(c, "") {
			return nil, fmt.Errorf("line %d: want kernel, package, test and why, separated by tabs", n)
		}
		if _, err := regexp.Compile(c[2]); err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		out = append(out, LeftOut{c[0], c[1], c[2], c[3]})
	}
	return out, s.Err()
}

// LeaveOut adds what was left out on this kernel, so that it is told of. Only
// packages that ran count.
func (r *Run) LeaveOut(list []LeftOut) {
	ran := map[string]bool{}
	for _, x := range r.Results {
		ran[x.Package] = true
	}
	for _, l := range list {
		if ran[l.Package] && (l.Kernel == r.Kernel || l.Kernel == "*" || l.Kernel == "emulated" && r.Kernel != "host") {
			r.Results = append(r.Results, Result{Package: l.Package, Test: l.Test, Outcome: NotHere, Why: l.Why, Listed: true})
		}
	}
}

// WriteLines writes one line for each test.
func (r *Run) WriteLines(w io.Writer) error {
	release := r.Release
	if release == "" {
		release = "-"
	}
	for _, x := range r.Results {
		line := fmt.Sprintf("%-5s %-8s %-18s %-40s %s", r.Kernel, x.Outcome, path.Base(x.Package), x.Test, x.Why)
		if _, err := fmt.Fprintln(w, strings.TrimRight(line, " ")); err != nil {
			return err
		}
	}
	_, err := fmt.Fprintf(w, "%-5s %s: %s, %d passed, %d failed, %d not here\n", r.Kernel, release, r.Verdict(), r.Count(Pass), r.Count(Fail), r.Count(NotHere))
	return err
}
