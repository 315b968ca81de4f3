// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/test/kernel"
)

func TestQuantiles(t *testing.T) {
	x := []float64{5, 1, 4, 2, 3}
	for q, want := range map[float64]float64{0: 1, 0.25: 2, 0.5: 3, 0.625: 3.5, 1: 5} {
		if got := quantile(x, q); got != want {
			t.Errorf("quantile %v: %v, want %v", q, got, want)
		}
	}
	if x[0] != 5 {
		t.Error("the rounds were put into another order")
	}
	if !math.IsNaN(median(nil)) {
		t.Error("the median of nothing is a number")
	}
}

func TestConfidenceHoldsTheMedian(t *testing.T) {
	var x []float64
	for i := range 100 {
		x = append(x, float64(i))
	}
	low, high := confidence(x)
	if low != 40 || high != 60 {
		t.Errorf("%v to %v, want 40 to 60", low, high)
	}
	// Outliers, as on a busy machine, do not move it.
	for i := range 20 {
		x[99-i] = 1e9
	}
	if l, h := confidence(x); l != low || h != high {
		t.Errorf("with outliers: %v to %v", l, h)
	}
	if l, h := confidence([]float64{7}); l != 7 || h != 7 {
		t.Errorf("of one: %v to %v", l, h)
	}
}

func TestDestinations(t *testing.T) {
	for _, tc := range []struct {
		server
		want []byte
	}{
		{server{scenario: scenario{port: 8080}}, []byte{unix.AF_INET, 0, 0x1f, 0x90, 127, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0}},
		{server{scenario: scenario{port: 80, veth: true}}, []byte{unix.AF_INET, 0, 0, 80, 10, 89, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0}},
		{server{scenario: scenario{port: 80, v6: true}}, []byte{unix.AF_INET6, 0, 0, 80, 0, 0, 0, 0, 0xfd, 0, 1, 0x0c, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0}},
	} {
		got := tc.destination(1)
		if !bytes.Equal(got, tc.want) {
			t.Errorf("%+v: % x, want % x", tc.scenario, got, tc.want)
		}
		if bytes.Equal(got, tc.destination(2)) {
			t.Errorf("%+v: the same destination twice", tc.scenario)
		}
	}
}

func TestRender(t *testing.T) {
	text := render(config{rounds: 3, batch: 10}, "Linux 6.1", []hook{{name: "connect4"}, {name: "sockops"}}, []result{{
		scenario: scenario{name: "loopback"},
		total:    total{nothing: []float64{1000, 1000, 1000}, empty: []float64{1010, 1010, 1010}, latchkey: []float64{1020, 1020, 1020}},
		calls:    map[string]*perCall{"sockops": {raw: []float64{55, 55, 55}, empty: []float64{50, 50, 50}, calls: 9}},
	}})
	for _, want := range []string{
		"| loopback | 1000 [1000–1000] | 10 [10–10] | 20 [20–20] | **2.0 %** [2.0–2.0] |",
		"| loopback | `sockops` | 9.0 | 55 | 50 | **5 [5–5]** |",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	if strings.Contains(text, "`connect4`") {
		t.Error("a row for a program that did not run")
	}
}

func TestWrite(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kernels.md")
	if err := os.WriteFile(path, []byte("a\n"+kernel.CostStart+"\nold\n"+kernel.CostEnd+"\nb\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := write(path, "new"); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	if err != nil || strings.Contains(string(got), "old") || !strings.Contains(string(got), "\nnew\n") {
		t.Errorf("%q, %v", got, err)
	}
	if err := write(filepath.Join(t.TempDir(), "missing"), "new"); err == nil {
		t.Error("no file, no error")
	}
}
