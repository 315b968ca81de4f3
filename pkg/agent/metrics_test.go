// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/latchkey-dev/latchkey/pkg/attribution"
	"github.com/latchkey-dev/latchkey/pkg/audit"
	"github.com/latchkey-dev/latchkey/pkg/credcache"
	"github.com/latchkey-dev/latchkey/pkg/eksauth"
	"github.com/latchkey-dev/latchkey/pkg/evidence"
	"github.com/latchkey-dev/latchkey/pkg/linklocal"
	"github.com/latchkey-dev/latchkey/pkg/pods"
)

var update = flag.Bool("update", false, "write docs/metrics.md anew from the metrics")

// family is a metric as the document has it.
type family struct {
	name, kind, help string
	labels           []string
}

// fullRegistry has everything that an agent can show, each vector with one value
// at least.
func fullRegistry(t *testing.T) *prometheus.Registry {
	t.Helper()
	m := newMetrics("v", "enforce")
	m.register(sources{
		attesting: true, connections: func() int { return 1 }, keys: func() int { return 1 },
		cache: func() credcache.Stats { return credcache.Stats{NextExpiry: time.Now().Add(time.Hour)} },
		audit: func() audit.Stats { return audit.Stats{} },
		bpf: func() ([]attribution.Event, error) {
			return []attribution.Event{{Name: "connect"}, {Name: "no_key", Error: true}}, nil
		},
		reattached: func() uint64 { return 0 },
		pods:       func() pods.Stats { return pods.Stats{} },
		runtimes: func() []pods.RuntimeStatus {
			return []pods.RuntimeStatus{{Runtime: pods.RuntimeContainerd}}
		},
	})
	m.familyRepairs(linklocal.IPv4, func() uint64 { return 0 })
	m.responses.WithLabelValues("200")
	m.cacheError.WithLabelValues("Recoverable", "x")
	m.refused(evidence.ReasonPodMismatch, true)
	m.attempt(eksauth.Attempt{})
	m.repairs.WithLabelValues("ipv4")
	m.serving.WithLabelValues("127.0.0.1:80")
	return m.registry
}

// allMetrics lists the agent's own metrics by name.
func allMetrics(t *testing.T) []family {
	t.Helper()
	registry := fullRegistry(t)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var out []family
	gathered := map[string]bool{}
	for _, f := range families {
		gathered[f.GetName()] = true
		if !ours(f.GetName()) {
			continue
		}
		labels := map[string]bool{}
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				labels[l.GetName()] = true
			}
		}
		out = append(out, family{f.GetName(), strings.ToLower(f.GetType().String()), f.GetHelp(), slices.Sorted(maps.Keys(labels))})
	}
	// A metric that is registered and was not gathered would be left out of the
	// document in silence.
	descs := make(chan *prometheus.Desc)
	go func() { registry.Describe(descs); close(descs) }()
	name := regexp.MustCompile(`fqName: "([^"]+)"`)
	for d := range descs {
		if n := name.FindStringSubmatch(d.String()); n == nil || ours(n[1]) && !gathered[n[1]] {
			t.Errorf("%s has no value here: give it one", d)
		}
	}
	return out
}

func ours(name string) bool {
	return strings.HasPrefix(name, "latchkey_") || strings.HasPrefix(name, "pod_identity_")
}

// metricsTable is the generated part of docs/metrics.md.
func metricsTable(families []family) string {
	var b strings.Builder
	b.WriteString("| metric | type | labels | meaning |\n|---|---|---|---|\n")
	for _, f := range families {
		labels := make([]string, len(f.labels))
		for i, l := range f.labels {
			labels[i] = "`" + l + "`"
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", f.name, f.kind, strings.Join(labels, ", "), f.help)
	}
	return b.String()
}

func TestMetricsDocument(t *testing.T) {
	const begin, end = "<!-- metrics: written by go test ./pkg/agent -run TestMetricsDocument -update -->\n", "<!-- /metrics -->"
	file := filepath.Join("..", "..", "docs", "metrics.md")
	doc, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(doc), begin)
	got, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no table between %q and %q", file, begin, end)
	}
	want := metricsTable(allMetrics(t))
	if got == want {
		return
	}
	if !*update {
		t.Fatalf("%s does not say what the metrics are: run go test ./pkg/agent -run TestMetricsDocument -update", file)
	}
	if err := os.WriteFile(file, []byte(before+begin+want+end+after), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestMetricsAreNamedWell(t *testing.T) {
	families, err := fullRegistry(t).Gather()
	if err != nil {
		t.Fatal(err)
	}
	own := families[:0]
	for _, f := range families {
		// The reference agent's names are what they are, and so are the runtime's.
		if strings.HasPrefix(f.GetName(), "latchkey_") {
			own = append(own, f)
		}
	}
	problems, err := promlint.NewWithMetricFamilies(own).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	for _, f := range allMetrics(t) {
		if !strings.HasSuffix(f.help, ".") || strings.ContainsAny(f.help, "|\n") {
			t.Errorf("%s: its help is no sentence: %q", f.name, f.help)
		}
	}
}

// The values of labels that people look up are all in the document.
func TestLabelValuesAreDocumented(t *testing.T) {
	doc, err := os.ReadFile(filepath.Join("..", "..", "docs", "metrics.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		heading string
		least   int
		sources []string
		value   *regexp.Regexp
	}{
		{"## Reasons", 30, []string{"../evidence/reason.go", "../credserver/record.go"}, regexp.MustCompile(`Reason\w* +(?:evidence\.)?Reason = "([a-z_]+)"`)},
		{"## Events of the kernel's programs", 9, []string{"../attribution/attribution.go"}, regexp.MustCompile(`EVENT_\w+: +\{Name: "([a-z_]+)"\}`)},
	} {
		_, section, ok := strings.Cut(string(doc), c.heading+"\n")
		if !ok {
			t.Errorf("docs/metrics.md has no section %q", c.heading)
			continue
		}
		section, _, _ = strings.Cut(section, "\n## ")
		documented := map[string]bool{}
		for line := range strings.Lines(section) {
			if cells := strings.Split(line, "|"); len(cells) > 3 {
				for _, name := range strings.Split(cells[1], ",") {
					documented[strings.TrimSpace(name)] = true
				}
			}
		}
		found := 0
		for _, file := range c.sources {
			source, err := os.ReadFile(filepath.FromSlash(file))
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range c.value.FindAllStringSubmatch(string(source), -1) {
				found++
				if !documented[m[1]] {
					t.Errorf("%s: %s is not in docs/metrics.md, %q", file, m[1], c.heading)
				}
			}
		}
		if found < c.least {
			t.Errorf("%q: only %d values found in the code: this test does not see them any more", c.heading, found)
		}
	}
}
