// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func parse(t *testing.T, name, log string) Run {
	t.Helper()
	r, err := Parse(name, strings.NewReader(log))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// brief is the outcome, the test, and why.
func brief(r Run) []string {
	var out []string
	for _, x := range r.Results {
		out = append(out, strings.TrimSpace(fmt.Sprintf("%s %s %s", x.Outcome, x.Test, x.Why)))
	}
	return out
}

// One file per thing that a log can be; the first line says what is wanted of
// each test, in order, separated by semicolons.
func TestParse(t *testing.T) {
	logs, err := filepath.Glob("testdata/*.log")
	if err != nil || len(logs) < 8 {
		t.Fatalf("%d logs, %v", len(logs), err)
	}
	for _, path := range logs {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".log"), func(t *testing.T) {
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			first, log, _ := strings.Cut(string(b), "\n")
			want, ok := strings.CutPrefix(first, "want: ")
			if !ok {
				t.Fatal("the first line does not say what is wanted")
			}
			r := parse(t, "5.10", log)
			if got := strings.Join(brief(r), "; "); got != want {
				t.Errorf("got  %s\nwant %s", got, want)
			}
			if r.Failed() != strings.Contains(want, "FAIL") {
				t.Errorf("failed: %v", r.Failed())
			}
		})
	}
}

func TestParseKeepsTheOutputOfAFailure(t *testing.T) {
	var log strings.Builder
	log.WriteString("MATRIX kernel 6.1.0\nMATRIX package ./pkg/x\n=== RUN   TestA\n")
	for i := range 3 * keptOutput {
		fmt.Fprintf(&log, "    a_test.go:1: line %d\n", i)
	}
	log.WriteString("--- FAIL: TestA (0.00s)\nFAIL\nMATRIX end ./pkg/x 1\nMATRIX done 1\n")
	r := parse(t, "6.1", log.String())
	if len(r.Results) != 1 {
		t.Fatalf("%+v", r.Results)
	}
	out := r.Results[0].Output
	if len(out) != keptOutput || out[len(out)-1] != fmt.Sprintf("line %d", 3*keptOutput-1) {
		t.Errorf("%d lines kept: %q", len(out), out)
	}
}

const passing = "=== RUN   TestA\n--- PASS: TestA (0.00s)\nPASS\nMATRIX end ./pkg/x 0\nMATRIX done 0\n"

func TestVerdict(t *testing.T) {
	feature := Fact(FactFeature, "f", "5.8", "yes") + "\n"
	for name, tc := range map[string]struct{ log, want string }{
		"supported":  {feature + passing, "supported"},
		"degraded":   {feature + Fact(FactFallback, "instead (before Linux 5.15)") + "\n" + passing, "degraded"},
		"refused":    {feature + Fact(FactRefused, "no BTF") + "\n" + strings.ReplaceAll(passing, "PASS: ", "FAIL: "), "refused"},
		"failed":     {feature + strings.ReplaceAll(passing, "PASS: ", "FAIL: "), "failed"},
		"not probed": {passing, "not told"},
	} {
		r := parse(t, "5.10", "MATRIX kernel 5.10.0\nMATRIX package ./pkg/x\n"+tc.log)
		if got := r.Verdict(); got != tc.want {
			t.Errorf("%s: %s, want %s", name, got, tc.want)
		}
	}
}

func TestFactsSurviveTheLog(t *testing.T) {
	log := "MATRIX kernel 5.10.0-30-cloud-amd64\nMATRIX package ./test/kernel\n=== RUN   TestF\n" +
		Fact(FactFeature, "helper A\tin B\n", "5.8", "yes") + "\r\n" +
		"text without an end" + Fact(FactFallback, "other way (before Linux 5.15)") + "\n" +
		Fact(FactVerifier, "prog", "350", "317") + "\n--- PASS: TestF (0.00s)\n" + strings.ReplaceAll(passing, "./pkg/x", "./test/kernel")
	r := parse(t, "5.10", log)
	if r.Failed() {
		t.Fatalf("%q", brief(r))
	}
	if want := (Feature{"helper A in B ", "5.8", "yes"}); len(r.Features) != 1 || r.Features[0] != want {
		t.Errorf("features %q", r.Features)
	}
	if want := []string{"other way (before Linux 5.15)"}; !slices.Equal(r.Fallbacks, want) {
		t.Errorf("fallbacks %q", r.Fallbacks)
	}
	if want := []Count{{"prog", 350, 317}}; !slices.Equal(r.Verifier, want) {
		t.Errorf("verifier %v", r.Verifier)
	}
	for _, bad := range []string{FactPrefix + "feature\tonly", FactPrefix + "verifier\tp\tmany\t3", FactPrefix} {
		r := parse(t, "5.10", "MATRIX kernel 5.10.0\nMATRIX package ./pkg/x\n"+bad+"\n"+passing)
		if !r.Failed() {
			t.Errorf("%q was passed over", bad)
		}
	}
}

func TestLeftOut(t *testing.T) {
	list, err := ParseLeftOut(strings.NewReader("# comment\n\nemulated\t./pkg/x\tTestSlow\ttoo slow\n5.10\t./pkg/x\tTestOld\ttoo old\n*\t./pkg/y\tTestY\tnever\n"))
	if err != nil {
		t.Fatal(err)
	}
	for kernelName, want := range map[string]int{"host": 0, "5.10": 2, "6.1": 1} {
		r := parse(t, kernelName, "MATRIX kernel 5.10.0\nMATRIX package ./pkg/x\n"+passing)
		r.LeaveOut(list)
		if got := r.Count(NotHere); got != want || r.Failed() {
			t.Errorf("%s: %d not here, want %d: %q", kernelName, got, want, brief(r))
		}
	}
	for _, bad := range []string{"5.10\t./pkg/x\tTestA", "5.10\t./pkg/x\tTestA\t", "5.10\t./pkg/x\tTest(\twhy"} {
		if _, err := ParseLeftOut(strings.NewReader(bad)); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
	f, err := os.Open("not-here.tsv")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := ParseLeftOut(f); err != nil {
		t.Errorf("not-here.tsv: %v", err)
	}
}

func TestDocumentKeepsTheCost(t *testing.T) {
	runs := []Run{
		parse(t, "host", "MATRIX kernel 6.18.5-x\nMATRIX package ./pkg/x\n"+Fact(FactFeature, "f", "5.8", "yes")+"\n"+passing),
		parse(t, "5.10", "MATRIX kernel 5.10.0\nMATRIX package ./pkg/x\n"+Fact(FactFeature, "f", "5.8", "yes")+"\n"+
			Fact(FactFallback, "a | b (before Linux 5.15)")+"\n"+Fact(FactVerifier, "prog", "350", "317")+"\n"+passing),
	}
	runs[0].Results = append(runs[0].Results, Result{Package: "./pkg/x", Test: "TestB", Outcome: Pass})
	runs[1].LeaveOut([]LeftOut{{"5.10", "./pkg/x", "Test(B|C)", "too slow"}})
	doc := Document(runs, "")
	for _, want := range []string{
		"| f | yes | yes | 5.8 |", "| host | `6.18` | **supported** | 2 | 0 | 0 |", "**degraded**",
		"| a \\| b (before Linux 5.15) | – | in use |", "| `prog` | ? | 350 (317) |", "| `pkg/x` TestA | pass | pass |",
		"| `pkg/x` TestB | pass | not here |", "- `Test(B|C)` on 5.10: too slow\n",
	} {
		if !strings.Contains(doc, want) {
			t.Errorf("no %q in\n%s", want, doc)
		}
	}
	if Document(runs, doc) != doc {
		t.Error("written twice, the document differs")
	}
	with, err := SetCost(doc, "| cost |\n")
	if err != nil || !strings.Contains(with, CostStart+"\n| cost |\n"+CostEnd) {
		t.Errorf("%v\n%s", err, with)
	}
	if Document(runs, with) != with {
		t.Error("writing the document anew lost the block about cost")
	}
	if _, err := SetCost("no markers", "x"); err == nil {
		t.Error("no markers, no error")
	}
}

func TestBaseline(t *testing.T) {
	b := Baseline{"5.10": {"a": 100, "b": 50}, "6.1": {"a": 100}}
	again, err := ParseBaseline(b.String())
	if err != nil || again.String() != b.String() {
		t.Fatalf("%v\n%s", err, again)
	}
	for _, tc := range []struct {
		name, series string
		counts       []Count
		wrong        string
		known        bool
	}{
		{"the same", "5.10", []Count{{"a", 100, 1}, {"b", 50, 1}}, "", true},
		{"at the limit", "5.10", []Count{{"a", 120, 1}, {"b", 60, 1}}, "", true},
		{"over it", "5.10", []Count{{"a", 121, 1}, {"b", 50, 1}}, "a on 5.10: the verifier processed 121 instructions, 100 before (+21 %", true},
		{"less", "5.10", []Count{{"a", 10, 1}, {"b", 50, 1}}, "", true},
		{"a new program", "6.1", []Count{{"a", 100, 1}, {"c", 1, 1}}, "c on 6.1", true},
		{"one that went", "5.10", []Count{{"a", 100, 1}}, "b on 5.10", true},
		{"another kernel", "6.6", []Count{{"a", 9999, 1}}, "", false},
	} {
		wrong, known := b.Check(tc.series, tc.counts)
		if known != tc.known || (tc.wrong == "") != (len(wrong) == 0) || !strings.Contains(strings.Join(wrong, " "), tc.wrong) {
			t.Errorf("%s: %q, %v", tc.name, wrong, known)
		}
		for _, w := range wrong {
			if !strings.Contains(w, "UPDATE_VERIFIER=1") {
				t.Errorf("%s: does not say what to do: %s", tc.name, w)
			}
		}
	}
	b.Update(&Run{Release: "5.10.0-30", Verifier: []Count{{"a", 7, 1}}})
	b.Update(&Run{Release: "6.1.0"})
	if got := b.String(); !strings.Contains(got, "5.10\ta\t7\n6.1\ta\t100\n") || strings.Contains(got, "b") && strings.Contains(got, "\tb\t") {
		t.Errorf("after the update:\n%s", got)
	}
	for _, bad := range []string{"5.10\ta", "5.10\ta\tx", "5.10\ta\t0"} {
		if _, err := ParseBaseline(bad); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
	if _, err := CommittedBaseline(); err != nil {
		t.Error(err)
	}
}

func TestSeries(t *testing.T) {
	for release, want := range map[string]string{
		"5.10.0-30-cloud-amd64": "5.10", "6.12.38+deb12-amd64": "6.12", "6.18": "6.18", "6.19-rc1": "6.19", "odd": "odd", "6.x": "6.x",
	} {
		if got := Series(release); got != want {
			t.Errorf("%s: %s, want %s", release, got, want)
		}
	}
	if !Older("5.10", "5.15") || Older("6.12", "6.2") || Older("6.1", "6.1") || !Older("5.4", "5.10") {
		t.Error("series are compared as text")
	}
}
