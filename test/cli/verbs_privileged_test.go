// SPDX-License-Identifier: Apache-2.0

//go:build linux && privileged

package cli

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/latchkey-dev/latchkey/pkg/adminapi"
	"github.com/latchkey-dev/latchkey/pkg/diagnose"
	"github.com/latchkey-dev/latchkey/pkg/explain"
	"github.com/latchkey-dev/latchkey/test/rig"
	"github.com/latchkey-dev/latchkey/test/standin/eksauth"
	"github.com/latchkey-dev/latchkey/test/testnode"
)

// busy is a node where a bit of everything has happened: a pod that is served,
// one without association, and a thief.
type busy struct {
	*world
	api, batch, thief *pod
	secrets           []string
}

func newBusy(t *testing.T) *busy {
	t.Helper()
	w := newWorld(t, rig.Config{})
	w.start(t)
	b := &busy{world: w, api: w.named(t, "api-5c9f7d-x2x1p", "api", "api"), batch: w.named(t, "batch-0", "batch", ""), thief: w.named(t, "shell", "shell", "shell")}
	served := b.api.served(t)
	wantStatus(t, b.batch.ask(t, b.batch.Token), 404)
	wantStatus(t, b.thief.ask(t, b.api.Token), 403)
	var creds struct{ AccessKeyId, SecretAccessKey, Token string }
	must(t, json.Unmarshal([]byte(served.Body), &creds))
	b.secrets = append(b.secrets, creds.SecretAccessKey, creds.Token, creds.AccessKeyId, eksauth.SecretPrefix, eksauth.SessionTokenPrefix, "secret of the node")
	for _, token := range []string{b.api.Token, b.batch.Token, b.thief.Token} {
		b.secrets = append(b.secrets, strings.Split(token, ".")...)
	}
	eventually(t, func() error {
		if r := w.latchkey(t, "denials"); strings.Count(r.stdout, "\n") < 3 {
			return fmt.Errorf("not all refusals are noted yet:\n%s", r.stdout)
		}
		return nil
	})
	return b
}

// as decodes the output of a run in JSON and in YAML, which must say the same.
func as[T any](t *testing.T, w *world, code int, args ...string) T {
	t.Helper()
	var fromJSON, fromYAML T
	for format, into := range map[string]*T{"json": &fromJSON, "yaml": &fromYAML} {
		r := w.latchkey(t, append(args, "-o", format)...)
		if r.code != code {
			t.Fatalf("%v -o %s: exit status %d, want %d: %s", args, format, r.code, code, r.stderr)
		}
		text := []byte(r.stdout)
		if format == "yaml" {
			var err error
			if text, err = yaml.YAMLToJSONStrict(text); err != nil {
				t.Fatalf("%v: %v in\n%s", args, err, r.stdout)
			}
		}
		if err := json.Unmarshal(text, into); err != nil {
			t.Fatalf("%v -o %s: %v in\n%s", args, format, err, r.stdout)
		}
	}
	return fromJSON
}

// Each verb says what is true, to people and to scripts.
func TestPrivilegedVerbs(t *testing.T) {
	b := newBusy(t)
	w := b.world

	t.Run("pods", func(t *testing.T) {
		all := as[adminapi.Pods](t, w, 0, "pods").Pods
		if len(all) != 3 {
			t.Fatalf("%d pods", len(all))
		}
		for _, tt := range []struct {
			args []string
			want []*pod
		}{
			{[]string{"-n", "web"}, []*pod{b.api, b.batch, b.thief}},
			{[]string{"--namespace", "elsewhere"}, nil},
			{[]string{"--service-account", "api"}, []*pod{b.api}},
			{[]string{"--role", "api"}, []*pod{b.api}},
			{[]string{"--state", "valid"}, []*pod{b.api}},
			{[]string{"--sort", "expires", "--state", "valid"}, []*pod{b.api}},
		} {
			got := as[adminapi.Pods](t, w, 0, append([]string{"pods"}, tt.args...)...).Pods
			if tt.args[0] == "-n" {
				// The thief has presented no token of its own, so nobody knows its
				// namespace.
				tt.want = tt.want[:2]
			}
			if len(got) != len(tt.want) {
				t.Errorf("%v: %d pods, want %d: %+v", tt.args, len(got), len(tt.want), got)
				continue
			}
			for i, p := range got {
				if p.UID != tt.want[i].uid() {
					t.Errorf("%v: pod %d is %s", tt.args, i, p.Name)
				}
			}
		}
		r := w.latchkey(t, "pods", "-o", "wide")
		if !strings.Contains(r.stdout, b.api.CgroupPath()) || !strings.Contains(r.stdout, "arn:aws:sts::"+rig.Account) || !strings.Contains(r.stdout, "refused 403 pod_mismatch") {
			t.Errorf("wide:\n%s", r.stdout)
		}
		if strings.Contains(r.stdout, "\x1b") {
			t.Error("colour although nobody looks")
		}
	})
	t.Run("pods --watch", func(t *testing.T) {
		lines, stop := b.watch(t, "pods", "--watch", "--interval", "100ms", "-o", "json")
		defer stop()
		for range 3 {
			<-lines
		}
		late := w.named(t, "late", "late", "late")
		late.served(t)
		for {
			select {
			case line := <-lines:
				var p adminapi.Pod
				must(t, json.Unmarshal([]byte(line), &p))
				if p.UID == late.uid() && p.Credentials == "valid" {
					return
				}
			case <-time.After(patience):
				t.Fatal("the new pod is not shown")
			}
		}
	})
	t.Run("denials", func(t *testing.T) {
		all := as[adminapi.Denials](t, w, 0, "denials").Denials
		byReason := map[string]adminapi.Denial{}
		for _, d := range all {
			byReason[d.Reason] = d
		}
		stolen := byReason["pod_mismatch"]
		if stolen.PodUID != b.thief.uid() || stolen.TokenPodUID != b.api.uid() || !stolen.TokenVerified || stolen.Status != 403 || stolen.Count == 0 || stolen.PID == 0 || stolen.Process == "" {
			t.Errorf("%+v", stolen)
		}
		missing := byReason["upstream_not_found"]
		if missing.PodUID != b.batch.uid() || missing.Upstream == nil || missing.Upstream.Status != 404 || missing.Upstream.Code != "ResourceNotFoundException" || missing.Upstream.RequestID == "" {
			t.Errorf("%+v, upstream %+v", missing, missing.Upstream)
		}
		if got := as[adminapi.Denials](t, w, 0, "denials", "--reason", "pod_mismatch", "--pod", b.thief.uid()).Denials; len(got) != 1 {
			t.Errorf("filtered: %+v", got)
		}
		if r := w.latchkey(t, "denials", "--reason", "two_pods"); !strings.HasPrefix(r.stdout, "Nothing that matches was refused lately; there are ") {
			t.Errorf("%q", r.stdout)
		}
		lines, stop := b.watch(t, "denials", "-w", "--interval", "100ms", "-o", "json", "--reason", "token_expired")
		defer stop()
		c := w.Claims(b.thief.Pod.Pod)
		c.IssuedAt, c.Expiry = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
		b.thief.ask(t, w.Signer.Token(c))
		select {
		case line := <-lines:
			if !strings.Contains(line, "token_expired") {
				t.Error(line)
			}
		case <-time.After(patience):
			t.Error("a new refusal is not shown")
		}
	})
	t.Run("cache", func(t *testing.T) {
		find := func() *adminapi.CacheEntry {
			for _, e := range as[adminapi.Cache](t, w, 0, "cache").Entries {
				if e.PodUID == b.api.uid() {
					return &e
				}
			}
			return nil
		}
		e := find()
		if e == nil || e.State != "fresh" || e.Expires == nil || e.TokenExpires == nil || e.RefreshAt == nil || !strings.Contains(e.Role, "/api/") {
			t.Fatalf("%+v", e)
		}
		if r := w.latchkey(t, "cache", "-o", "wide"); !strings.Contains(r.stdout, e.Role) {
			t.Errorf("wide:\n%s", r.stdout)
		}
		calls := w.EKSAuth.CallsFor("web", "api")
		if got := as[adminapi.CacheChange](t, w, 0, "cache", "refresh", "web/api"); got.Started != 1 {
			t.Errorf("%+v", got)
		}
		eventually(t, func() error {
			if n := w.EKSAuth.CallsFor("web", "api"); n <= calls {
				return fmt.Errorf("%d calls", n)
			}
			return nil
		})
		if r := w.latchkey(t, "cache", "drop", b.api.uid()); r.code != 0 || r.stdout != "dropped 1\n" {
			t.Errorf("drop: %d %s%s", r.code, r.stdout, r.stderr)
		}
		if find() != nil {
			t.Error("still there")
		}
		if r := w.latchkey(t, "cache", "drop", "web/api"); r.code != 3 {
			t.Errorf("drop again: %d %s", r.code, r.stderr)
		}
		b.api.served(t)
	})
	t.Run("token", func(t *testing.T) {
		type report struct {
			Claims *explain.Claims
			Check  *adminapi.TokenCheck
		}
		got := as[report](t, w, 0, "token", b.api.TokenFile())
		if got.Claims == nil || got.Claims.PodUID != b.api.uid() || got.Claims.SignatureBytes == 0 || got.Check == nil || !got.Check.Accepted || !got.Check.Verified {
			t.Errorf("%+v", got)
		}
		c := w.Claims(b.api.Pod.Pod)
		c.Audience = "sts.amazonaws.com"
		bad := filepath.Join(t.TempDir(), "token")
		must(t, os.WriteFile(bad, []byte(w.Signer.Token(c)), 0o600))
		r := w.latchkey(t, "token", bad)
		if r.code != 4 || !strings.Contains(r.lastLine(), "refused: token_audience") || !strings.Contains(r.stdout, "sts.amazonaws.com") {
			t.Errorf("exit status %d:\n%s%s", r.code, r.stdout, r.stderr)
		}
		piped := runIn(t, w.Node.HostPlace(), strings.NewReader(b.api.Token), cliProgram, "--admin-socket", w.Socket(), "token", "-")
		if piped.code != 0 || !strings.Contains(piped.stdout, "masked") {
			t.Errorf("exit status %d:\n%s%s", piped.code, piped.stdout, piped.stderr)
		}
	})
	t.Run("bpf", func(t *testing.T) {
		type report struct {
			Objects  []diagnose.Object
			Hooks    []explain.Hook
			Counters map[string]uint64
		}
		got := as[report](t, w, 0, "bpf")
		kinds := map[string]int{}
		for _, o := range got.Objects {
			kinds[o.Kind]++
			if o.ID == 0 {
				t.Errorf("%+v", o)
			}
		}
		if kinds["program"] != 3 || kinds["link"] != 3 || kinds["map"] < 6 {
			t.Errorf("%v", kinds)
		}
		if len(got.Hooks) != 3 || got.Counters["attested"] == 0 {
			t.Errorf("%+v, %v", got.Hooks, got.Counters)
		}
		for _, h := range got.Hooks {
			mine := 0
			for _, p := range h.Programs {
				if p.Ours {
					mine++
				}
			}
			if mine != 1 {
				t.Errorf("%s: %+v", h.Name, h.Programs)
			}
		}
	})
	t.Run("doctor", func(t *testing.T) {
		type report struct{ Checks []diagnose.Check }
		got := as[report](t, w, 0, "doctor")
		seen := map[string]bool{}
		for _, k := range got.Checks {
			seen[k.Name] = true
			if k.State == explain.Fail || k.State != explain.OK && k.Fix == "" {
				t.Errorf("%+v", k)
			}
		}
		for _, name := range []string{"kernel", "cgroup", "agent", "attestation", "bpf", "address", "route", "port", "reach", "imds", "upstream", "clock", "credentials", "token", "capabilities", "cni"} {
			if !seen[name] {
				t.Errorf("nothing was said of %s: %+v", name, got.Checks)
			}
		}
		if r := w.latchkey(t, "doctor"); !strings.Contains(r.stdout, "answers pod web/") || !strings.HasPrefix(r.stdout, "ok ") {
			t.Errorf("\n%s", r.stdout)
		}
	})
	t.Run("from elsewhere", func(t *testing.T) {
		// In another network namespace, and with another view of the cgroups, what
		// is missing there is not missing on the node.
		elsewhere := w.Node.HostPlace().InNetns(b.batch.Netns())
		r := runIn(t, elsewhere, nil, cliProgram, "--admin-socket", w.Socket(), "explain", b.api.uid())
		if r.code != 0 || !strings.HasPrefix(r.lastLine(), "cause: none: ") {
			t.Errorf("exit status %d:\n%s%s", r.code, r.stdout, r.stderr)
		}
		r = runIn(t, elsewhere, nil, cliProgram, "--admin-socket", w.Socket(), "doctor")
		if r.code != 0 || !strings.Contains(r.stdout, "this is not the agent's network namespace") {
			t.Errorf("exit status %d:\n%s%s", r.code, r.stdout, r.stderr)
		}
		inside := []string{"unshare", "-C", "-m", "sh", "-c", `umount -l "$0" && mount -t cgroup2 none "$0" && exec "$@"`, w.Node.Cgroup2Mount()}
		r = w.latchkeyUnder(t, inside, "explain", b.api.uid())
		if r.code != 0 || !strings.Contains(r.stdout, "not the agent's view") {
			t.Errorf("exit status %d:\n%s%s", r.code, r.stdout, r.stderr)
		}
		r = w.latchkeyUnder(t, inside, "doctor")
		if r.code != 0 || !strings.Contains(r.stdout, "the cgroups seen here are not the agent's") {
			t.Errorf("exit status %d:\n%s%s", r.code, r.stdout, r.stderr)
		}
	})
	t.Run("log-level", func(t *testing.T) {
		if got := as[adminapi.LogLevels](t, w, 0, "log-level"); got.Levels["cache"] != "info" {
			t.Errorf("%+v", got)
		}
		if got := as[adminapi.LogLevels](t, w, 0, "log-level", "cache", "debug"); len(got.Levels) != 1 || got.Levels["cache"] != "debug" {
			t.Errorf("%+v", got)
		}
		if got := as[adminapi.LogLevels](t, w, 0, "log-level", "all", "warn"); got.Levels["cache"] != "warn" || got.Levels["agent"] != "warn" {
			t.Errorf("%+v", got)
		}
		if got := as[adminapi.LogLevels](t, w, 0, "log-level", "cache"); got.Levels["cache"] != "warn" {
			t.Errorf("%+v", got)
		}
	})
	t.Run("status", func(t *testing.T) {
		got := as[adminapi.Status](t, w, 0, "status")
		if !got.Attesting || got.PID != w.agent.PID() || len(got.Addresses) != 2 || !got.Addresses[0].Present || got.Pins == "" ||
			got.Upstream.Endpoint != w.EKSAuth.URL || got.Upstream.ClockSkew == nil || got.Upstream.Credentials.State != "ok" {
			t.Errorf("%+v", got)
		}
	})
	t.Run("completion", func(t *testing.T) {
		for _, shell := range []string{"bash", "zsh", "fish"} {
			if r := w.latchkey(t, "completion", shell); r.code != 0 || !strings.Contains(r.stdout, "latchkey") {
				t.Errorf("%s: exit status %d", shell, r.code)
			}
		}
		if r := w.latchkey(t, "__complete", "explain", ""); !strings.Contains(r.stdout, "web/api-5c9f7d-x2x1p\n") {
			t.Errorf("pods are not offered:\n%s", r.stdout)
		}
	})
}

// watch runs a verb that goes on, and gives its lines.
func (b *busy) watch(t *testing.T, args ...string) (lines <-chan string, stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	cmd := b.Node.HostPlace().Command(ctx, append([]string{cliProgram, "--admin-socket", b.Socket()}, args...)...)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	c := make(chan string, 100)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for s := bufio.NewScanner(out); s.Scan(); {
			c <- s.Text()
		}
	}()
	return c, func() {
		cancel()
		<-done
		_ = cmd.Wait()
	}
}

// Nothing that the CLI prints, whatever the verb and the format, and nothing
// that the admin socket says, holds any part of a token, a secret or an access
// key.
func TestPrivilegedNothingSecretIsShown(t *testing.T) {
	b := newBusy(t)
	w := b.world
	// EKS Auth quotes the token that it refuses.
	w.EKSAuth.Inject(eksauth.Fault{Kind: eksauth.Refuse, ErrorType: "InvalidRequestException", Message: "bad token: " + b.thief.Token, Times: 1})
	b.thief.ask(t, b.thief.Token)
	garbled := filepath.Join(t.TempDir(), "token")
	must(t, os.WriteFile(garbled, []byte(b.api.Token[:len(b.api.Token)-20]+"!"), 0o600))
	shown := map[string]string{}
	for _, args := range [][]string{
		{"pods"}, {"explain", b.api.uid()}, {"explain", b.batch.uid()}, {"explain", b.thief.uid(), "--probe"}, {"explain", strconv.Itoa(b.api.app.PID())},
		{"whois", b.api.uid()}, {"denials"}, {"cache"}, {"token", b.api.TokenFile()}, {"token", garbled}, {"token", b.api.Token},
		{"bpf"}, {"doctor"}, {"log-level"}, {"status"}, {"explain", b.api.Token}, {"whois", b.api.Token}, {"cache", "drop", b.api.Token}, {"cache", "refresh", "web/api"},
	} {
		for _, format := range []string{"table", "wide", "json", "yaml"} {
			r := w.latchkey(t, append(args, "-o", format)...)
			name := "latchkey " + args[0]
			if len(args) > 1 && args[1] != b.api.Token {
				name += " " + args[1]
			}
			text := r.stdout + r.stderr
			shown[name+" -o "+format] += text
		}
	}
	for _, path := range []string{adminapi.PathStatus, adminapi.PathPods, adminapi.PathFacts + "?q=" + b.api.uid(), adminapi.PathDenials, adminapi.PathCache} {
		shown["GET "+path] = w.admin(t, path)
	}
	for what, text := range shown {
		for _, s := range b.secrets {
			if s != "" && strings.Contains(text, s) {
				t.Errorf("%s shows %.12s…", what, s)
			}
		}
		if text == "" {
			t.Errorf("%s shows nothing", what)
		}
	}
}

// admin asks the admin socket itself.
func (w *world) admin(t *testing.T, path string) string {
	t.Helper()
	client := http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", w.Socket())
	}}}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://agent"+path, nil)
	must(t, err)
	resp, err := client.Do(req)
	must(t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	must(t, err)
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: %d %s", path, resp.StatusCode, body)
	}
	return string(body)
}

// Bad input, to every verb, is exit status 2 and an error that says what was
// expected, on standard error alone.
func TestPrivilegedBadInputSaysWhatWasExpected(t *testing.T) {
	w := newWorld(t, rig.Config{})
	w.start(t)
	a, err := w.AddPod(t.Context(), testnode.PodConfig{Name: "x"})
	must(t, err)
	_ = a
	notToken := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(notToken, []byte("hello"), 0o600))
	for _, tt := range []struct {
		args []string
		text string
	}{
		{[]string{"pods", "extra"}, "unknown argument"},
		{[]string{"pods", "-o", "xml"}, "use table, wide, json or yaml"},
		{[]string{"pods", "--state", "good"}, "use none, fetching, valid, failing or denied"},
		{[]string{"pods", "--sort", "age"}, "use namespace, name, service-account, role, state, expires or asked"},
		{[]string{"pods", "--watch", "--interval", "1ms"}, "give 100ms or more"},
		{[]string{"pods", "--interval", "soon"}, "invalid"},
		{[]string{"explain"}, "takes one QUERY: a pid, ip:port"},
		{[]string{"explain", ""}, "takes one QUERY"},
		{[]string{"explain", "a", "b"}, "takes one QUERY"},
		{[]string{"explain", "0"}, "a process id is 1 or more"},
		{[]string{"explain", "cgroup:x"}, "a cgroup id is a decimal number"},
		{[]string{"explain", "x", "-o", "html"}, "use table, wide, json or yaml"},
		{[]string{"whois"}, "takes one QUERY"},
		{[]string{"whois", "-5"}, "unknown shorthand flag"},
		{[]string{"whois", "cgroup:"}, "a cgroup id is a decimal number"},
		{[]string{"denials", "all"}, "unknown argument"},
		{[]string{"denials", "--reason", "stolen"}, "use no_evidence, cgroup_gone, not_in_pod, "},
		{[]string{"denials", "--interval", "0s"}, "give 100ms or more"},
		{[]string{"cache", "flush"}, "unknown argument"},
		{[]string{"cache", "drop"}, "takes one SUBJECT: NAMESPACE/SERVICEACCOUNT or a pod UID"},
		{[]string{"cache", "drop", "everything"}, "a subject is NAMESPACE/SERVICEACCOUNT or a pod UID"},
		{[]string{"cache", "refresh", "a/b/c"}, "a subject is NAMESPACE/SERVICEACCOUNT or a pod UID"},
		{[]string{"cache", "refresh", "a", "b"}, "takes one SUBJECT"},
		{[]string{"token"}, "takes one FILE that holds a token"},
		{[]string{"token", "/nowhere"}, "no such file"},
		{[]string{"token", notToken}, "three parts of base64url"},
		{[]string{"token", "eyJh.eyJh.sig"}, "put it in a file, and use latchkey token FILE"},
		{[]string{"bpf", "programs"}, "unknown argument"},
		{[]string{"doctor", "house"}, "unknown argument"},
		{[]string{"log-level", "cache", "loud"}, "use debug, info, warn or error"},
		{[]string{"log-level", "kitchen"}, "use agent, "},
		{[]string{"log-level", "kitchen", "debug"}, "use agent, "},
		{[]string{"log-level", "a", "b", "c"}, "takes a COMPONENT and a LEVEL"},
		{[]string{"status", "now"}, "unknown argument"},
		{[]string{"version", "2"}, "unknown argument"},
		{[]string{"completion", "tcsh"}, "use bash, fish, powershell, zsh"},
		{[]string{"status", "--admin-socket", ""}, "give the path of the agent's socket"},
		{[]string{"explian", "x"}, "unknown argument"},
		{[]string{"--verbose"}, "unknown flag"},
	} {
		t.Run(strings.Join(tt.args, " "), func(t *testing.T) {
			r := w.latchkey(t, tt.args...)
			if r.code != 2 || !strings.Contains(r.stderr, tt.text) || r.stdout != "" || strings.Count(r.stderr, "\n") != 1 {
				t.Errorf("exit status %d, want 2 and %q on standard error alone:\n%s%s", r.code, tt.text, r.stdout, r.stderr)
			}
		})
	}
	for _, args := range [][]string{{"explain", "nobody"}, {"whois", "10.1.2.3:4"}, {"cache", "drop", "web/nobody"}} {
		if r := w.latchkey(t, args...); r.code != 3 || r.stdout != "" {
			t.Errorf("%v: exit status %d, want 3: %s", args, r.code, r.stderr)
		}
	}
	w.agent.Kill()
	for _, args := range [][]string{{"pods"}, {"status"}, {"denials"}, {"cache"}, {"bpf"}, {"log-level"}, {"whois", "1"}} {
		if r := w.latchkey(t, args...); r.code != 1 || !strings.Contains(r.stderr, "is latchkey-agent running") {
			t.Errorf("%v without an agent: exit status %d, want 1: %s", args, r.code, r.stderr)
		}
	}
	if r := w.latchkey(t, "doctor"); r.code != 4 || !strings.Contains(r.stdout, "FAILED") {
		t.Errorf("doctor without an agent: exit status %d:\n%s", r.code, r.stdout)
	}
}
