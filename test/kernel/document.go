// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Markers around the block of docs/kernels.md that test/kernel/hookcost writes.
const (
	CostStart = "<!-- hook cost: written by test/kernel/hookcost -->"
	CostEnd   = "<!-- /hook cost -->"
)

// SetCost puts a text between the markers of a document.
func SetCost(document, text string) (string, error) {
	before, rest, ok := strings.Cut(document, CostStart)
	_, after, ok2 := strings.Cut(rest, CostEnd)
	if !ok || !ok2 {
		return "", fmt.Errorf("the document has no block between %q and %q", CostStart, CostEnd)
	}
	return before + CostStart + "\n" + strings.TrimSpace(text) + "\n" + CostEnd + after, nil
}

// cost is what is between the markers now.
func cost(document string) string {
	_, rest, ok := strings.Cut(document, CostStart)
	text, _, ok2 := strings.Cut(rest, CostEnd)
	if !ok || !ok2 {
		return ""
	}
	return strings.TrimSpace(text)
}

// Document renders docs/kernels.md from the runs. previous is the document so
// far, of which the block about cost is kept.
func Document(runs []Run, previous string) string {
	var b strings.Builder
	p := func(format string, a ...any) { fmt.Fprintf(&b, format+"\n", a...) }
	p("<!-- Written by DOCS=1 scripts/kernel-matrix. Do not edit. -->")
	p("# Kernels")
	p("")
	p("Latchkey needs Linux 5.10 with type information (BTF) and cgroup v2. Features are probed; versions are never compared.")
	p("This page is written from a run of `make test-kernels`, which runs the privileged tests on Debian's cloud kernels under")
	p("emulation and on the kernel of the machine it runs on (`host`).")
	p("")
	p("- **supported**: everything is there.")
	p("- **degraded**: a fallback is in use. The evidence is as good, except where the fallback says otherwise. The agent logs")
	p("  each at start, and `/readyz` and `latchkey status` show it.")
	p("- **refused**: the agent does not start in enforce mode, and says what is missing.")
	p("")
	header := func(first string, more ...string) {
		cells := []string{first}
		for _, r := range runs {
			cells = append(cells, r.name())
		}
		cells = append(cells, more...)
		row(&b, cells...)
		rule := make([]string, len(cells))
		for i := range rule {
			rule[i] = "---"
		}
		row(&b, rule...)
	}

	p("## Results")
	p("")
	row(&b, "kernel", "release", "", "tests passed", "failed", "not here")
	row(&b, "---", "---", "---", "--:", "--:", "--:")
	for _, r := range runs {
		release := r.Release
		if r.Kernel == "host" {
			// Whose machine it was is nobody's business.
			release = Series(release)
		}
		row(&b, r.Kernel, code(release), "**"+r.Verdict()+"**", strconv.Itoa(r.Count(Pass)), strconv.Itoa(r.Count(Fail)), strconv.Itoa(r.Count(NotHere)))
	}
	p("")
	for _, r := range runs {
		if r.Refused != "" {
			p("%s is refused: %s", r.name(), r.Refused)
			p("")
		}
	}
	p("Refused on any version: a kernel without BTF, one older than 5.10 (it lacks the TCP header options of BPF), and cgroup v1")
	p("alone. The message names what is missing and the version it came with.")
	p("")

	p("## Features probed")
	p("")
	header("feature", "since")
	for _, f := range union(runs, func(r Run) []string {
		var out []string
		for _, f := range r.Features {
			out = append(out, f.Name)
		}
		return out
	}) {
		cells := []string{f}
		since := ""
		for _, r := range runs {
			state := "?"
			for _, x := range r.Features {
				if x.Name == f {
					state, since = x.State, x.Since
				}
			}
			cells = append(cells, state)
		}
		row(&b, append(cells, since)...)
	}
	p("")

	p("## Fallbacks in use")
	p("")
	fallbacks := union(runs, func(r Run) []string { return r.Fallbacks })
	if len(fallbacks) == 0 {
		p("None.")
	} else {
		header("fallback")
		for _, f := range fallbacks {
			cells := []string{f}
			for _, r := range runs {
				if slices.Contains(r.Fallbacks, f) {
					cells = append(cells, "in use")
				} else {
					cells = append(cells, "–")
				}
			}
			row(&b, cells...)
		}
	}
	p("")
	p("All helpers that the programs call are in every kernel from 5.10 on: none has a substitute. Where the kernel has no dummy")
	p("driver the link-local addresses live on `lo`; that is no matter of version.")
	p("")

	p("## Verifier")
	p("")
	p("Instructions that the verifier processed over all paths (it gives up at a million), and the length of the program as")
	p("loaded. A growth of more than %.0f %% over `test/kernel/verifier.tsv` fails the tests.", 100*MaxGrowth)
	p("")
	header("program")
	for _, program := range union(runs, func(r Run) []string {
		var out []string
		for _, c := range r.Verifier {
			out = append(out, c.Program)
		}
		return out
	}) {
		cells := []string{code(program)}
		for _, r := range runs {
			cell := "?"
			for _, c := range r.Verifier {
				if c.Program == program {
					cell = fmt.Sprintf("%d (%d)", c.Processed, c.Translated)
				}
			}
			cells = append(cells, cell)
		}
		row(&b, cells...)
	}
	p("")

	p("## What an unrelated connection costs")
	p("")
	p(CostStart)
	if c := cost(previous); c != "" {
		p("%s", c)
	}
	p(CostEnd)
	p("")
	p("What empty programs cost is the kernel's own way to any program attached there, about ten calls per connection with both")
	p("ends on the node; the rest is Latchkey's. `go run ./test/kernel/hookcost` measures it anew.")
	p("")

	p("## Tests")
	p("")
	header("test")
	key := func(x Result) string { return x.Package + " " + x.Test }
	top := func(r Run) []string {
		var out []string
		for _, x := range r.Results {
			if !x.Listed && !strings.Contains(x.Test, "/") && !strings.HasPrefix(x.Test, "(") {
				out = append(out, key(x))
			}
		}
		return out
	}
	tests := union(runs, top)
	slices.Sort(tests)
	for _, t := range tests {
		pkg, name, _ := strings.Cut(t, " ")
		cells := []string{code(strings.TrimPrefix(pkg, "./")) + " " + name}
		for _, r := range runs {
			cells = append(cells, r.cell(pkg, name))
		}
		row(&b, cells...)
	}
	// One line for each reason, however many kernels have it.
	type absence struct{ test, why string }
	var order []absence
	where := map[absence][]string{}
	for _, r := range runs {
		for _, x := range r.Results {
			if x.Outcome != NotHere {
				continue
			}
			a := absence{x.Test, x.Why}
			if where[a] == nil {
				order = append(order, a)
			}
			where[a] = append(where[a], r.Kernel)
		}
	}
	if len(order) > 0 {
		p("")
		p("Not here:")
		p("")
	}
	for _, a := range order {
		p("- %s on %s: %s", code(a.test), strings.Join(where[a], ", "), a.why)
	}
	return b.String()
}

// cell is how a test went, in a word.
func (r *Run) cell(pkg, test string) string {
	for _, x := range r.Results {
		if x.Package == pkg && x.Test == test {
			return map[Outcome]string{Pass: "pass", Fail: "**fail**", NotHere: "not here"}[x.Outcome]
		}
	}
	for _, x := range r.Results {
		if !x.Listed || x.Package != pkg {
			continue
		}
		if left, err := regexp.MatchString("^(?:"+x.Test+")$", test); err == nil && left {
			return "not here"
		}
	}
	return "–"
}

// name of a kernel as a column's head.
func (r *Run) name() string {
	if r.Kernel == "host" && r.Release != "" {
		return "host (" + Series(r.Release) + ")"
	}
	return r.Kernel
}

// union keeps the order in which the runs name things.
func union(runs []Run, of func(Run) []string) []string {
	var out []string
	for _, r := range runs {
		for _, s := range of(r) {
			if !slices.Contains(out, s) {
				out = append(out, s)
			}
		}
	}
	return out
}

func code(s string) string {
	if s == "" {
		return "–"
	}
	return "`" + s + "`"
}

func row(b *strings.Builder, cells ...string) {
	for _, c := range cells {
		b.WriteString("| " + strings.ReplaceAll(c, "|", "\\|") + " ")
	}
	b.WriteString("|\n")
}
