// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

func TestReadWrk(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		out  string
		want loadResult
		err  error
	}{
		"all well": {"Running 2s test\n  123456 requests in 2.00s, 180.10MB read\nRequests/sec:  61728.00\n", loadResult{requests: 123456}, nil},
		"refusals and errors": {"  1000 requests in 2.00s, 1MB read\n  Socket errors: connect 1, read 2, write 3, timeout 4\n  Non-2xx or 3xx responses: 990\n",
			loadResult{requests: 1000, failed: 1000}, nil},
		"no count": {"unable to connect to 169.254.170.23:80 Connection refused", loadResult{}, errNoCount},
	} {
		got, err := readWrk(tt.out)
		if got != tt.want || !errors.Is(err, tt.err) {
			t.Errorf("%s: %+v %v", name, got, err)
		}
	}
}

func TestQuantile(t *testing.T) {
	t.Parallel()
	v := []int{5, 1, 4, 2, 3}
	for q, want := range map[float64]int{0: 1, 0.25: 2, 0.5: 3, 0.99: 5, 1: 5} {
		if got := quantile(v, q); got != want {
			t.Errorf("quantile %v is %d, want %d", q, got, want)
		}
	}
	if got := median([]float64(nil)); got != 0 {
		t.Errorf("median of nothing is %v", got)
	}
}

func TestInsert(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "report.md")
	if err := os.WriteFile(file, []byte("# A\n"+markBegin+"old\n"+markEnd+"end\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := insert(file, "new\n"); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(file)
	if err != nil || string(got) != "# A\n"+markBegin+"new\n"+markEnd+"end\n" {
		t.Errorf("%q %v", got, err)
	}
	if err := os.WriteFile(file, []byte("# A\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := insert(file, "new\n"); !errors.Is(err, errNoMarks) {
		t.Errorf("without marks: %v", err)
	}
}

func TestMetric(t *testing.T) {
	t.Parallel()
	text := "# HELP latchkey_cache_bytes Memory.\nlatchkey_cache_bytes_total 7\nlatchkey_cache_bytes 1.5e+06\n"
	if got := metric(text, "latchkey_cache_bytes"); got != 1.5e6 {
		t.Errorf("got %v", got)
	}
}
