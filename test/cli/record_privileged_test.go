// SPDX-License-Identifier: Apache-2.0

//go:build linux && privileged

package cli

import (
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/latchkey-dev/latchkey/test/standin/eksauth"
)

// recorded is docs/cli.md.
const recorded = "../../docs/cli.md"

// run is one command of the script: as it is shown, and as it is run.
type shown struct {
	heading, words string
	command        string
	args           []string
	code           int
}

func script(b *busy) []shown {
	return []shown{
		{"pods", "Three pods: one is served, one has no association, one has asked with a token that is not its own and has presented none of its own, so its name is not known.", "latchkey pods", []string{"pods"}, 0},
		{"", "For scripts:", "latchkey pods --state valid -o yaml", []string{"pods", "--state", "valid", "-o", "yaml"}, 0},
		{"explain", "Of a pod that is served:", "latchkey explain web/api-5c9f7d-x2x1p", []string{"explain", "web/api-5c9f7d-x2x1p"}, 0},
		{"", "Of one that is not. The last line names the cause, and the exit status is 4:", "latchkey explain web/batch-0", []string{"explain", "web/batch-0"}, 4},
		{"", "Of a thief, by one of its processes:", "latchkey explain $PID", []string{"explain", strconv.Itoa(b.thief.app.PID())}, 4},
		{"", "With `--probe` a connection is tried from within the pod too:", "latchkey explain --probe web/api-5c9f7d-x2x1p", []string{"explain", "--probe", "web/api-5c9f7d-x2x1p"}, 0},
		{"whois", "", "latchkey whois $PID", []string{"whois", strconv.Itoa(b.api.app.PID())}, 0},
		{"denials", "", "latchkey denials", []string{"denials"}, 0},
		{"cache", "", "latchkey cache", []string{"cache"}, 0},
		{"", "", "latchkey cache refresh web/api", []string{"cache", "refresh", "web/api"}, 0},
		{"", "", "latchkey cache drop web/api", []string{"cache", "drop", "web/api"}, 0},
		{"token", "", "latchkey token $FILE", []string{"token", b.api.TokenFile()}, 0},
		{"bpf", "", "latchkey bpf", []string{"bpf"}, 0},
		{"doctor", "", "latchkey doctor", []string{"doctor"}, 0},
		{"log-level", "", "latchkey log-level", []string{"log-level"}, 0},
		{"", "", "latchkey log-level cache debug", []string{"log-level", "cache", "debug"}, 0},
		{"status", "", "latchkey status", []string{"status"}, 0},
		{"version", "", "latchkey version", []string{"version"}, 0},
		{"bad input", "Says what was expected, and ends with 2:", "latchkey pods --state good", []string{"pods", "--state", "good"}, 2},
		{"", "", "latchkey log-level kitchen debug", []string{"log-level", "kitchen", "debug"}, 2},
	}
}

// The runs in docs/cli.md are those of this script. LATCHKEY_RECORD=1 writes
// them anew; else the commands and their exit statuses are compared, and that
// each still prints what it printed, but for numbers and names.
func TestPrivilegedRecordedRuns(t *testing.T) {
	b := newBusy(t)
	var doc strings.Builder
	doc.WriteString("# The debug CLI at work\n\n" +
		"`latchkey` tells whoever is on call which pod of this node maps to which role, and why, or why not. What follows is real output,\n" +
		"recorded by a test on a node with a real agent, real cgroups and namespaces, and a stand-in for EKS Auth; only directories are\n" +
		"named as they are on a node. The reference of commands and flags is in [cli/](cli/latchkey.md), with man pages in `docs/cli/man`;\n" +
		"[json.md](cli/json.md) lists what scripts find in `-o json`;\n" +
		"[causes](cli-causes.md) lists what `explain` said of set-ups that were broken for real. `latchkey completion bash|zsh|fish` completes\n" +
		"verbs, flags, pods and components. [cli-cluster.md](cli-cluster.md) is the same on a cluster, by `kubectl exec` and on the node.\n")
	root := strings.TrimPrefix(b.Node.CgroupRoot(), b.Node.Cgroup2Mount())
	names := strings.NewReplacer(
		b.PinPath(), "/sys/fs/bpf/latchkey", b.Socket(), "/run/latchkey/admin.sock", b.KeyFile(), "/etc/latchkey/jwks.json",
		b.api.TokenFile(), "/var/run/secrets/pods.eks.amazonaws.com/serviceaccount/eks-pod-identity-token",
		b.thief.TokenFile(), "/var/run/secrets/pods.eks.amazonaws.com/serviceaccount/eks-pod-identity-token",
		b.batch.TokenFile(), "/var/run/secrets/pods.eks.amazonaws.com/serviceaccount/eks-pod-identity-token",
		root+"/", "/", root+"  ", "/"+strings.Repeat(" ", len(root)+1), root, "/")
	var commands []string
	for _, s := range script(b) {
		r := b.latchkey(t, s.args...)
		if r.code != s.code {
			t.Errorf("%s: exit status %d, want %d:\n%s%s", s.command, r.code, s.code, r.stdout, r.stderr)
		}
		text := names.Replace(r.stdout + r.stderr)
		for _, secret := range append(b.secrets, eksauth.AccessKeyPrefix) {
			if strings.Contains(text, secret) {
				t.Fatalf("%s shows %.12s…", s.command, secret)
			}
		}
		if s.heading != "" {
			fmt.Fprintf(&doc, "\n## %s\n", s.heading)
		}
		if s.words != "" {
			fmt.Fprintf(&doc, "\n%s\n", s.words)
		}
		fmt.Fprintf(&doc, "\n```console\n$ latchkey%s\n%s```\n", strings.TrimPrefix(s.command, "latchkey"), text)
		commands = append(commands, s.command)
	}
	if os.Getenv("LATCHKEY_RECORD") != "" {
		must(t, os.WriteFile(recorded, []byte(doc.String()), 0o644))
		return
	}
	text, err := os.ReadFile(recorded)
	must(t, err)
	was, is := shape(string(text)), shape(doc.String())
	for i := 0; i < max(len(was), len(is)); i++ {
		var old, fresh string
		if i < len(was) {
			old = was[i]
		}
		if i < len(is) {
			fresh = is[i]
		}
		if old != fresh {
			t.Errorf("docs/cli.md is not current: run LATCHKEY_RECORD=1 go test -tags privileged -run Recorded ./test/cli as root\nrecorded: %s\nnow:      %s", old, fresh)
			break
		}
	}
	if len(commands) < 15 {
		t.Errorf("only %d commands", len(commands))
	}
}

// shape is what of a recording stays the same: the commands, the headings, and
// the names in the first column of what they print.
func shape(doc string) []string {
	var out []string
	word := regexp.MustCompile(`^(ok|warning|FAILED|unknown|cause:|[A-Z][A-Z ]+[A-Z])\s+(\S*)`)
	for line := range strings.SplitSeq(doc, "\n") {
		switch m := word.FindStringSubmatch(line); {
		case strings.HasPrefix(line, "$ "), strings.HasPrefix(line, "#"):
			out = append(out, line)
		case m != nil && !strings.HasPrefix(line, "warning cni") && !strings.HasPrefix(line, "warning  cni"):
			out = append(out, strings.Join(strings.Fields(m[0]), " "))
		}
	}
	return out
}
