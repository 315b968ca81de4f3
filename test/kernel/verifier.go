// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"bufio"
	_ "embed"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// MaxGrowth is how much more work than before a program may be to the verifier
// before somebody has to look at it.
const MaxGrowth = 0.20

//go:embed verifier.tsv
var committed string

// Baseline is the verifier's work as last accepted: by kernel series ("6.1"),
// then by program, the instructions processed.
type Baseline map[string]map[string]int

// CommittedBaseline is verifier.tsv.
func CommittedBaseline() (Baseline, error) { return ParseBaseline(committed) }

// ParseBaseline reads what String writes.
func ParseBaseline(text string) (Baseline, error) {
	out := Baseline{}
	s := bufio.NewScanner(strings.NewReader(text))
	for n := 1; s.Scan(); n++ {
		if s.Text() == "" || strings.HasPrefix(s.Text(), "#") {
			continue
		}
		c := strings.Split(s.Text(), "\t")
		if len(c) != 3 {
			return nil, fmt.Errorf("verifier.tsv, line %d: want kernel, program and count, separated by tabs", n)
		}
		count, err := strconv.Atoi(c[2])
		if err != nil || count <= 0 {
			return nil, fmt.Errorf("verifier.tsv, line %d: %q is no count", n, c[2])
		}
		out.set(c[0], c[1], count)
	}
	return out, s.Err()
}

func (b Baseline) set(series, program string, count int) {
	if b[series] == nil {
		b[series] = map[string]int{}
	}
	b[series][program] = count
}

// String is the file's text.
func (b Baseline) String() string {
	var out strings.Builder
	out.WriteString("# Instructions that the verifier processed, by kernel series and program.\n" +
		"# Written by: UPDATE_VERIFIER=1 scripts/kernel-matrix\n")
	for _, series := range slices.SortedFunc(maps.Keys(b), compareSeries) {
		for _, program := range slices.Sorted(maps.Keys(b[series])) {
			fmt.Fprintf(&out, "%s\t%s\t%d\n", series, program, b[series][program])
		}
	}
	return out.String()
}

// Update takes over what a run counted, in place of what was known of that
// kernel series.
func (b Baseline) Update(r *Run) {
	if len(r.Verifier) == 0 {
		return
	}
	series := Series(r.Release)
	delete(b, series)
	for _, c := range r.Verifier {
		b.set(series, c.Program, c.Processed)
	}
}

// Check compares counts with the baseline of their kernel series and returns
// what is wrong, each with what to do. known is false if the series has no
// baseline, which is no fault: a developer's machine may have any kernel.
func (b Baseline) Check(series string, counts []Count) (wrong []string, known bool) {
	base := b[series]
	if base == nil {
		return nil, false
	}
	const update = "if that is meant, write the new counts with UPDATE_VERIFIER=1 scripts/kernel-matrix, commit test/kernel/verifier.tsv and say why in the commit"
	seen := map[string]bool{}
	for _, c := range counts {
		seen[c.Program] = true
		was, ok := base[c.Program]
		switch {
		case !ok:
			wrong = append(wrong, fmt.Sprintf("%s on %s: the verifier processed %d instructions, and there is no earlier count; %s", c.Program, series, c.Processed, update))
		case float64(c.Processed) > float64(was)*(1+MaxGrowth):
			wrong = append(wrong, fmt.Sprintf("%s on %s: the verifier processed %d instructions, %d before (%+.0f %%, more than %.0f %%); %s",
				c.Program, series, c.Processed, was, 100*(float64(c.Processed)/float64(was)-1), 100*MaxGrowth, update))
		}
	}
	for _, program := range slices.Sorted(maps.Keys(base)) {
		if !seen[program] {
			wrong = append(wrong, fmt.Sprintf("%s on %s: there is a count of earlier, and no such program now; %s", program, series, update))
		}
	}
	return wrong, true
}

// Series is the part of a release that names a kernel's series: 6.1 of
// 6.1.0-37-cloud-amd64. A release in another form is returned as it is.
func Series(release string) string {
	major, rest, ok := strings.Cut(release, ".")
	if !ok {
		return release
	}
	minor := rest[:len(rest)-len(strings.TrimLeft(rest, "0123456789"))]
	if minor == "" {
		return release
	}
	return major + "." + minor
}

// Older says whether series a came before b. What is no number counts as zero.
func Older(a, b string) bool { return compareSeries(a, b) < 0 }

func compareSeries(a, b string) int {
	number := func(s string) (n [2]int) {
		major, minor, _ := strings.Cut(s, ".")
		n[0], _ = strconv.Atoi(major)
		n[1], _ = strconv.Atoi(minor)
		return n
	}
	x, y := number(a), number(b)
	return slices.Compare(x[:], y[:])
}
