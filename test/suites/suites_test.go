// SPDX-License-Identifier: Apache-2.0

// Package suites tests what the black-box suites are made of, without a node:
// that a step cannot pass because something is missing.
package suites

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// Every step is a program, and has its line in the suite's README.
func TestReadmes(t *testing.T) {
	suites, err := filepath.Glob("[0-9][0-9]-*")
	if err != nil || len(suites) < 13 {
		t.Fatalf("%v, %v", suites, err)
	}
	for _, suite := range suites {
		steps, err := filepath.Glob(suite + "/[0-9][0-9]-*")
		if err != nil {
			t.Fatal(err)
		}
		slices.Sort(steps)
		var want []string
		for i, step := range steps {
			if number := fmt.Sprintf("%02d-", i+1); !strings.HasPrefix(filepath.Base(step), number) {
				t.Errorf("%s: want number %s", step, number)
			}
			if info, err := os.Stat(step); err != nil || info.Mode()&0o111 == 0 {
				t.Errorf("%s cannot be run: %v", step, err)
			}
			if text, err := os.ReadFile(step); err != nil || !bytes.Contains(text, []byte(`. "$(dirname "$0")/../lib"`)) {
				t.Errorf("%s does not begin with lib, which ends it when something fails: %v", step, err)
			}
			want = append(want, fmt.Sprintf("%d. ", i+1))
		}
		readme, err := os.ReadFile(suite + "/README.md")
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.HasPrefix(readme, []byte("# "+suite+": ")) {
			t.Errorf("%s/README.md does not begin with the suite's name", suite)
		}
		var got []string
		for _, line := range regexp.MustCompile(`(?m)^[0-9]+\. `).FindAll(readme, -1) {
			got = append(got, string(line))
		}
		if len(want) == 0 || !slices.Equal(got, want) {
			t.Errorf("%s/README.md has lines %v for steps %v", suite, got, want)
		}
	}
}

// bash runs a script that has lib, with programs of its own before all others.
func bash(t *testing.T, script string, programs map[string]string, env ...string) (string, error) {
	t.Helper()
	bin := t.TempDir()
	for name, text := range programs {
		if err := os.WriteFile(filepath.Join(bin, name), []byte("#!/bin/bash\n"+text+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), "bash", "-c", ". ./lib\n"+script)
	cmd.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"), "PATIENCE=300", "STATE="+t.TempDir(), "NS=suite", "CLUSTER_CGROUP2=/none")
	cmd.Env = append(cmd.Env, env...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func TestLib(t *testing.T) {
	if _, err := exec.LookPath("jq"); err != nil {
		t.Fatal("no jq here: make setup installs it")
	}
	pods := t.TempDir()
	dir := filepath.Join(pods, "uid/volumes/kubernetes.io~empty-dir/out")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "answers"), []byte("{\"status\":200}\n{\"status\":200}\n{\"sta"), 0o600); err != nil {
		t.Fatal(err)
	}
	ready := func(condition string, deleted bool) map[string]string {
		stamp := ""
		if deleted {
			stamp = `, "deletionTimestamp": "2026-01-01T00:00:00Z"`
		}
		return map[string]string{"kubectl": fmt.Sprintf(
			`case "$*" in *" get pods "*) echo '{"items": [{"metadata": {"name": "a"%s}, "status": {"conditions": [{"type": "Ready", "status": "%s"}]}}]}' ;; esac`, stamp, condition)}
	}
	for _, c := range []struct {
		name, script string
		programs     map[string]string
		want         string // part of the output of a failure; empty for success
	}{
		{"all lines", `expect x '.a == 1' '{"a": 1} {"a": 1}'`, nil, ""},
		{"one line is not so", `expect x '.a == 1' '{"a": 1} {"a": 2}'`, nil, "FAILED: x: want"},
		{"nothing", `expect x true ""`, nil, "FAILED: x: want"},
		{"no JSON", `expect x true 'error'`, nil, "FAILED: x: want"},
		{"what is written meanwhile", `expect x '.status == 200' "$(asked uid)"`, nil, ""},
		{"it comes true", `n=0; later() { n=$((n + 1)); [ -e "$STATE/x" ] || { touch "$STATE/x"; return 1; }; }; eventually x later`, nil, ""},
		{"it never does", `eventually "the end" false`, nil, "FAILED: the end: not after 1 s"},
		{"a step that goes wrong", "false\necho unreached", nil, "exit status"},
		{"a pipe that goes wrong", "false | cat\necho unreached", nil, "exit status"},
		{"an agent that is Ready", "agent_ready", ready("True", false), ""},
		{"one that is not", "agent_ready", ready("False", false), "FAILED: the agents are Ready"},
		{"one that is about to go", "agent_ready", ready("True", true), "FAILED: the agents are Ready"},
		{"records that never come", `before=$(upstream_calls app)
			echo "$before unreached"`, map[string]string{"kubectl": "", "eks": ""}, "FAILED: what was asked for until now"},
	} {
		t.Run(c.name, func(t *testing.T) {
			bin := t.TempDir()
			if err := os.WriteFile(filepath.Join(bin, "eks"), []byte("#!/bin/bash\n"), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(bin, "admin-keys"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			env := []string{"PODS=" + pods, "SUITE_BIN=" + bin, "SHARED=" + bin}
			if c.want != "" {
				env = append(env, "PATIENCE=1") // for what never comes
			}
			out, err := bash(t, c.script, c.programs, env...)
			if err != nil {
				out += err.Error()
			}
			if (err == nil) != (c.want == "") || !strings.Contains(out, c.want) || strings.Contains(out, "unreached") {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
}

// That nothing is left is not said because nobody could look.
func TestTracesAreLookedFor(t *testing.T) {
	const nothing, something, broken = "exit 0", "echo '7: x inet 169.254.170.23/32 cgroup_inet4_connect pod-id-link0 *:2703 '", "echo no >&2; exit 2"
	tools := map[string]string{"addresses": "ip", "routes": "ip", "links": "ip", "listeners": "ss", "programs": "bpftool", "pins": "find", "files": "find", "processes": "pgrep"}
	for kind, tool := range tools {
		run := func(script, program string) error {
			out, err := bash(t, ". 99-uninstalls/traces\n"+script, map[string]string{tool: program, "sleep": ""})
			if err != nil && !strings.Contains(out, "FAILED: ") {
				t.Errorf("%s with %s: %v: %s", script, program, err, out)
			}
			return err
		}
		for _, c := range []struct {
			script, program string
			good            bool
		}{
			{"none " + kind, nothing, true},
			{"none " + kind, something, false},
			{"none " + kind, broken, false},
			{"some " + kind, nothing, false},
			{"some " + kind, something, true},
			{"some " + kind, broken, false},
		} {
			if err := run(c.script, c.program); (err == nil) != c.good {
				t.Errorf("%s, where %s does %q: %v", c.script, tool, c.program, err)
			}
		}
	}
	// What pgrep says of no process.
	if out, err := bash(t, ". 99-uninstalls/traces\nnone processes", map[string]string{"pgrep": "exit 1"}); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	// The second half of what routes asks.
	if _, err := bash(t, ". 99-uninstalls/traces\nnone routes", map[string]string{"ip": `[ "$1" = route ]`}); err == nil {
		t.Error("IPv6 routes are not asked for, and none is said to be left")
	}
}

// Pods that run what was built before are replaced, and no other.
func TestRenew(t *testing.T) {
	dir, state := t.TempDir(), t.TempDir()
	program := filepath.Join(dir, "agent")
	if err := os.WriteFile(program, []byte("new"), 0o755); err != nil {
		t.Fatal(err)
	}
	archive := filepath.Join(dir, "agent.tar")
	if out, err := exec.CommandContext(t.Context(), "../images/archive", "localhost/agent:e2e", archive, program).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	config, err := exec.CommandContext(t.Context(), "tar", "-xOf", archive, "config.json").Output()
	if err != nil {
		t.Fatal(err)
	}
	current := fmt.Sprintf("sha256:%x", sha256.Sum256(config))
	pods := func(agent string) string {
		pod := `{"metadata": {"name": %q}, "spec": {"containers": [{"name": "main", "image": %q}]},
			"status": {"conditions": [{"type": "Ready", "status": "True"}], "containerStatuses": [{"name": "main", "imageID": %q}]}}`
		return fmt.Sprintf(`{"items": [`+pod+`, `+pod+`]}`, "agent-x", "localhost/agent:e2e", agent, "other", "elsewhere/other:1", "sha256:1")
	}
	kubectl := `case "$*" in
		*" get pods "*) if [ -e "$STATE/deleted" ]; then cat "$STATE/after"; else cat "$STATE/before"; fi ;;
		*" delete pod "*) echo "$*" >>"$STATE/deleted" ;;
		esac`
	for before, want := range map[string]string{current: "", "sha256:0": "-n latchkey delete pod agent-x --wait --timeout=300s\n"} {
		for name, text := range map[string]string{"before": pods(before), "after": pods(current)} {
			if err := os.WriteFile(filepath.Join(state, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if out, err := bash(t, "./renew "+archive, map[string]string{"kubectl": kubectl}, "STATE="+state); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if got, _ := os.ReadFile(filepath.Join(state, "deleted")); string(got) != want {
			t.Errorf("with image %s: %q, want %q", before, got, want)
		}
		_ = os.Remove(filepath.Join(state, "deleted"))
	}
}

// root is a directory with an `id` that says root, for scripts that want it but
// end before they need it.
func root(t *testing.T) string {
	t.Helper()
	bin := t.TempDir()
	if err := os.WriteFile(filepath.Join(bin, "id"), []byte("#!/bin/sh\necho 0\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return bin + ":" + os.Getenv("PATH")
}

// Directories that are to be named are not emptied of what is not the suites'.
func TestOthersFilesAreLeftAlone(t *testing.T) {
	dir, cache := t.TempDir(), t.TempDir()
	mine := filepath.Join(dir, "mine")
	suite := filepath.Join(dir, "04-stolen-token")
	if err := os.WriteFile(mine, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(suite, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		env, want string
		command   []string
	}{
		{"LATCHKEY_SUITE_LOGS=", "building Latchkey's programs", []string{"test/suites/run", "01"}},
		{"LATCHKEY_CLUSTER_DIR=", "is not a node's directory", []string{"scripts/cluster", "down"}},
		{"LATCHKEY_CLUSTER_DIR=", "is not a node's directory", []string{"scripts/cluster", "up"}},
	} {
		cmd := exec.CommandContext(t.Context(), c.command[0], c.command[1:]...)
		cmd.Path, cmd.Dir = filepath.Join("../..", c.command[0]), ""
		// What is built with it fails, so nothing is started.
		cmd.Env = append(os.Environ(), "PATH="+root(t), "GO=false", "XDG_CACHE_HOME="+cache, c.env+dir)
		out, err := cmd.CombinedOutput()
		if err == nil || !strings.Contains(string(out), c.want) {
			t.Errorf("%v: %v: %s", c.command, err, out)
		}
		if _, err := os.Stat(mine); err != nil {
			t.Fatalf("%v with %s%s: %v", c.command, c.env, dir, err)
		}
	}
	if _, err := os.Stat(suite); err == nil {
		t.Error("the logs of the last run are still there")
	}
}

// The list names every step.
func TestList(t *testing.T) {
	out, err := exec.CommandContext(t.Context(), "./run", "--list").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	steps, err := filepath.Glob("[0-9][0-9]-*/[0-9][0-9]-*")
	if err != nil {
		t.Fatal(err)
	}
	if got := len(regexp.MustCompile(`(?m)^    [0-9]+\. `).FindAll(out, -1)); got != len(steps) {
		t.Errorf("%d lines for %d steps:\n%s", got, len(steps), out)
	}
	if out, err := exec.CommandContext(t.Context(), "./run", "--help").CombinedOutput(); err != nil || !strings.HasPrefix(string(out), "run [OPTION...]") || !strings.Contains(string(out), "\nLogs of what failed") {
		t.Errorf("%v: %s", err, out)
	}
	if out, err := exec.CommandContext(t.Context(), "./run", "77").CombinedOutput(); err == nil || !strings.Contains(string(out), "no suite 77") {
		t.Errorf("%v: %s", err, out)
	}
}
