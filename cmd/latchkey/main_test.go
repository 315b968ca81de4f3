// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"github.com/latchkey-dev/latchkey/pkg/adminapi"
	"github.com/latchkey-dev/latchkey/pkg/commandline"
	"github.com/latchkey-dev/latchkey/pkg/explain"
)

func clock() time.Time { return time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC) }

// agent answers each path with a value, on a socket whose path it returns.
func agent(t testing.TB, answers map[string]any) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "a.sock")
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		v, ok := answers[r.URL.Path]
		if !ok {
			w.WriteHeader(http.StatusNotFound)
			v = adminapi.Problem{Error: "no such thing"}
		}
		_ = json.NewEncoder(w).Encode(v)
	})}
	go func() { _ = srv.Serve(ln) }()
	t.Cleanup(func() { srv.Close() })
	return socket
}

func run(t testing.TB, socket string, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	root := newRoot(&out, clock)
	root.SetArgs(append(args, "--admin-socket", socket))
	root.SetErr(&out)
	err := root.ExecuteContext(t.Context())
	return out.String(), err
}

func pods() []adminapi.Pod {
	soon, later, asked := clock().Add(10*time.Minute), clock().Add(5*time.Hour), clock().Add(-90*time.Second)
	return []adminapi.Pod{
		{UID: "c", Namespace: "web", Name: "api", ServiceAccount: "api", Role: "arn:aws:sts::111122223333:assumed-role/api-role/s", Credentials: "valid", Expires: &later, Verdict: "served", LastAsked: &asked},
		{UID: "b", Namespace: "web", Name: "cart\x1b[31m", ServiceAccount: "cart", Role: "arn:aws:iam::111122223333:role/path/cart-role", Credentials: "failing", Expires: &soon},
		{UID: "a", Credentials: "none"},
	}
}

func TestPodsFilterAndSort(t *testing.T) {
	t.Parallel()
	socket := agent(t, map[string]any{adminapi.PathPods: adminapi.Pods{Pods: pods()}})
	for _, tt := range []struct {
		args string
		want string // UIDs in order
	}{
		{"", "acb"}, // the unknown one has no namespace
		{"--sort name", "acb"},
		{"--sort expires", "bca"},
		{"--sort asked", "cab"},
		{"--sort state", "bac"},
		{"--sort role", "abc"},
		{"-n web", "cb"},
		{"--role api-role", "c"},
		{"--role arn:aws:iam::111122223333:role/path/cart-role", "b"},
		{"--state none", "a"},
		{"--service-account cart --state valid", ""},
	} {
		t.Run(tt.args, func(t *testing.T) {
			t.Parallel()
			out, err := run(t, socket, append([]string{"pods", "-o", "json"}, strings.Fields(tt.args)...)...)
			var got adminapi.Pods
			if err != nil || json.Unmarshal([]byte(out), &got) != nil {
				t.Fatalf("%v: %s", err, out)
			}
			uids := ""
			for _, p := range got.Pods {
				uids += p.UID
			}
			if uids != tt.want {
				t.Errorf("%q, want %q", uids, tt.want)
			}
		})
	}
	out, err := run(t, socket, "pods")
	want := "NAMESPACE  POD         SERVICE ACCOUNT  ROLE            CREDENTIALS  EXPIRES IN  LAST VERDICT         POD UID\n" +
		"-          -           -                -               none         -           -                    a\n" +
		"web        api         api              api-role        valid        5h0m        served, 1m30s ago    c\n" +
		"web        cart?[31m   cart             path/cart-role  failing      10m         -                    b\n"
	squeeze := func(s string) string { return strings.Join(strings.Fields(s), " ") }
	if err != nil || squeeze(out) != squeeze(want) {
		t.Errorf("%v:\n%s", err, out)
	}
}

// What was filtered out is there all the same, and what nobody knows is not made
// up.
func TestNothingIsSaidThatIsNotSo(t *testing.T) {
	t.Parallel()
	full := agent(t, map[string]any{
		adminapi.PathPods:    adminapi.Pods{Pods: pods()},
		adminapi.PathDenials: adminapi.Denials{Denials: []adminapi.Denial{{Seq: 1, Reason: "pod_mismatch", Finding: "pod"}}, Seq: 1},
		adminapi.PathWhois:   adminapi.Whois{Query: "1", Pod: &adminapi.Pod{UID: "u", Namespace: "kube-system", Name: "dns", Credentials: "none"}},
	})
	empty := agent(t, map[string]any{adminapi.PathPods: adminapi.Pods{}, adminapi.PathDenials: adminapi.Denials{}})
	for _, tt := range []struct {
		socket, args, want string
	}{
		{full, "pods -n elsewhere", "No pod matches, of 3 on this node."},
		{empty, "pods -n elsewhere", "No pods on this node.\n"},
		{full, "denials --reason two_pods", "Nothing that matches was refused lately; there are 1 refusals of other kinds.\n"},
		{empty, "denials", "Nothing was refused lately.\n"},
		{full, "whois 1", "service account  -\n"},
	} {
		out, err := run(t, tt.socket, strings.Fields(tt.args)...)
		if err != nil || !strings.Contains(out, tt.want) {
			t.Errorf("%s: %v, %q, want %q", tt.args, err, out, tt.want)
		}
	}
	for _, args := range [][]string{{"completion", "tcsh"}, {"completion", "bash", "more"}} {
		if _, err := run(t, full, args...); exitCode(err) != exitUsage {
			t.Errorf("%v: %v", args, err)
		}
	}
	if out, err := run(t, full, "completion", "bash"); err != nil || !strings.Contains(out, "latchkey") {
		t.Errorf("completion bash: %v, %.80q", err, out)
	}
	if _, err := run(t, "", "status"); exitCode(err) != exitUsage {
		t.Errorf("no socket: %v", err)
	}
	_, err := run(t, full, "denials", "--reason", "stolen")
	if exitCode(err) != exitUsage || !strings.Contains(err.Error(), "pod_mismatch") {
		t.Errorf("a reason that there is not: %v", err)
	}
	c := &cli{out: io.Discard, now: clock, format: formatTable}
	var out bytes.Buffer
	c.out = &out
	if err := c.printToken(tokenReport{Claims: &explain.Claims{Namespace: "web", ServiceAccount: "api"}}); err != nil || strings.Contains(out.String(), "  web") {
		t.Errorf("a token without a pod: %v:\n%s", err, out.String())
	}
}

// Completion offers what the node has, and files only where a file is wanted.
func TestCompletion(t *testing.T) {
	t.Parallel()
	socket := agent(t, map[string]any{adminapi.PathPods: adminapi.Pods{Pods: pods()}})
	for args, want := range map[string]string{
		"explain ":                "a web/api",
		"whois ":                  "a web/api",
		"pods -n ":                "web\n:4",
		"pods --role ":            "api-role path/cart-role",
		"pods --service-account ": "api cart",
		"pods --state ":           "none valid denied",
		"pods ":                   ":4",
		"denials --reason ":       "pod_mismatch two_pods",
		"denials --pod ":          "a web/api",
		"log-level cache ":        "debug info",
		"token ":                  ":0",
		"doctor -o ":              "json yaml wide",
	} {
		var out bytes.Buffer
		root := newRoot(&out, clock)
		root.SetArgs(append([]string{"__complete", "--admin-socket", socket}, strings.Split(args, " ")...))
		root.SetErr(io.Discard)
		if err := root.ExecuteContext(t.Context()); err != nil {
			t.Errorf("%q: %v", args, err)
		}
		for w := range strings.SplitSeq(want, " ") {
			if !strings.Contains("\n"+out.String(), "\n"+w+"\n") {
				t.Errorf("%q: no %q in %q", args, w, out.String())
			}
		}
	}
}

// Whoever reads a verb's help at night finds a line to copy.
func TestEachVerbHasAnExample(t *testing.T) {
	t.Parallel()
	var walk func(*cobra.Command)
	walk = func(cmd *cobra.Command) {
		if cmd.Name() == "completion" {
			return // cobra's, which says how to install each shell's
		}
		if cmd.HasParent() && !cmd.Hidden && cmd.Name() != "version" && !strings.Contains(cmd.Example, cmd.CommandPath()) {
			t.Errorf("%s has no example", cmd.CommandPath())
		}
		for _, sub := range cmd.Commands() {
			walk(sub)
		}
	}
	walk(newRoot(io.Discard, clock))
}

// Every line of a table begins its columns at the same places.
func TestTablesAreAligned(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	c := &cli{out: &out}
	tab := &table{head: []string{"A", "B", "C"}}
	tab.add("län", "x", "1")
	tab.add("y", "longer", "2")
	if err := c.write(tab); err != nil || out.String() != "A    B       C\nlän  x       1\ny    longer  2\n" {
		t.Errorf("%v:\n%s", err, out.String())
	}
	out.Reset()
	below := &table{widths: tab.widths}
	below.add("z", "y", "3")
	if err := c.write(below); err != nil || out.String() != "z    y       3\n" {
		t.Errorf("what goes on below is not in line: %v:\n%s", err, out.String())
	}
	out.Reset()
	c.colour = true
	tab.colour = func(column int, _ string) colour {
		if column == 1 {
			return red
		}
		return plain
	}
	if err := c.write(tab); err != nil || !strings.Contains(out.String(), "y    \x1b[31mlonger\x1b[0m  2\n") {
		t.Errorf("%v: %q", err, out.String())
	}
}

// Colour is for people: on a terminal, and not if they say that it is in the
// way.
func TestColourOnATerminalOnly(t *testing.T) {
	tty, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Fatalf("no terminal can be had: %v", err)
	}
	defer tty.Close()
	file, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	t.Setenv("TERM", "xterm")
	t.Setenv("NO_COLOR", "")
	if !colourful(tty) || colourful(file) || colourful(&bytes.Buffer{}) {
		t.Error("colour belongs on a terminal, and nowhere else")
	}
	t.Setenv("NO_COLOR", "1")
	if colourful(tty) {
		t.Error("NO_COLOR is not heeded")
	}
	t.Setenv("NO_COLOR", "")
	t.Setenv("TERM", "dumb")
	if colourful(tty) {
		t.Error("a dumb terminal shows no colour")
	}
}

func TestExitCodes(t *testing.T) {
	t.Parallel()
	for want, err := range map[int]error{
		exitOK: nil, exitFailed: errors.New("x"), exitUsage: commandline.UsageError{Err: errors.New("x")},
		exitNotFound: fmt.Errorf("x: %w", adminapi.ErrNotFound), exitBroken: errBroken,
	} {
		if got := exitCode(err); got != want {
			t.Errorf("%v: %d, want %d", err, got, want)
		}
	}
	if exitCode(fmt.Errorf("x: %w", adminapi.ErrInvalid)) != exitUsage {
		t.Error("a query that the agent cannot read is the user's")
	}
	if noToken([]string{"explain", "eyJh.eyJh.c2ln"}) == nil || noToken([]string{"explain", "10.0.0.1:80", "a.b.c"}) != nil {
		t.Error("tokens among the arguments, and nothing else, are refused")
	}
}

func TestShortDurations(t *testing.T) {
	t.Parallel()
	for d, want := range map[time.Duration]string{
		1499 * time.Millisecond: "1s", 119 * time.Second: "1m59s", 2 * time.Minute: "2m", 119 * time.Minute: "119m",
		2*time.Hour + 5*time.Minute: "2h5m", 49 * time.Hour: "2d",
	} {
		if got := short(d); got != want {
			t.Errorf("%v: %q, want %q", d, got, want)
		}
	}
}

// What the CLI itself costs on a node of 10,000 pods, without the program's
// start and the agent's part.
func BenchmarkPodsOf10000(b *testing.B) {
	var all []adminapi.Pod
	for i := range 10000 {
		p := pods()[i%3]
		p.UID = fmt.Sprintf("%08x-0000-4000-8000-000000000000", i)
		all = append(all, p)
	}
	socket := agent(b, map[string]any{adminapi.PathPods: adminapi.Pods{Pods: all}})
	for b.Loop() {
		if out, err := run(b, socket, "pods"); err != nil || strings.Count(out, "\n") != 10001 {
			b.Fatal(err)
		}
	}
}
