// SPDX-License-Identifier: Apache-2.0

//go:build linux && privileged

package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/pkg/adminapi"
	"github.com/latchkey-dev/latchkey/test/rig"
	"github.com/latchkey-dev/latchkey/test/standin/eksauth"
	"github.com/latchkey-dev/latchkey/test/standin/tokens"
	"github.com/latchkey-dev/latchkey/test/testnode"
)

// initialize puts the addresses on the node, cleanup takes away all that
// initialize and server made, and either may be run again.
func TestPrivilegedInitializeAndCleanup(t *testing.T) {
	w := newWorld(t, rig.Config{})
	run := func(args ...string) (string, int) {
		stdout, stderr, code := runProgram(t, w.Node.AgentPlace(), append([]string{agentProgram}, args...)...)
		return stdout + stderr, code
	}
	untouched := w.network(t)

	for i := range 2 {
		if out, code := run("initialize"); code != 0 || !strings.Contains(out, "link-local addresses are in place") {
			t.Fatalf("initialize, time %d: exit status %d: %s", i+1, code, out)
		}
		now := w.network(t)
		for _, address := range []string{"169.254.170.23/32", "fd00:ec2::23/128"} {
			if n := len(regexp.MustCompile(`(?m)^address \S+ `+regexp.QuoteMeta(address)).FindAllString(now, -1)); n != 1 {
				t.Errorf("%s is there %d times:\n%s", address, n, now)
			}
		}
	}
	if out, err := w.Cleanup(t.Context()); err != nil || !strings.Contains(out, "removed ") {
		t.Errorf("cleanup: %v\n%s", err, out)
	}
	w.wantNothingLeft(t, untouched)
	if out, err := w.Cleanup(t.Context()); err != nil || !strings.Contains(out, "nothing to remove") {
		t.Errorf("cleanup again: %v\n%s", err, out)
	}

	// initialize first, as the chart does it, or not at all.
	for _, first := range []bool{true, false} {
		if first {
			run("initialize")
		}
		w.start(t)
		p := w.newPod(t, testnode.PodConfig{})
		c := newClient(t, p.Place())
		wantCredentials(t, c.ask(rig.Host4, p.Token), p)
		// Not under an agent that runs.
		if out, err := w.Cleanup(t.Context()); err == nil || !strings.Contains(out, "stop it first") {
			t.Errorf("cleanup while the agent runs: %v\n%s", err, out)
		}
		w.wantAttachedOnce(t)
		wantCredentials(t, c.ask(rig.Host4, p.Token), p)
		wantCredentials(t, c.ask(rig.Host6, p.Token), p)
		if first {
			w.stop(t)
		} else {
			w.agent.Kill()
		}
		must(t, p.Delete(t.Context()))
		if out, err := w.Cleanup(t.Context()); err != nil {
			t.Errorf("cleanup after server: %v\n%s", err, out)
		}
		w.wantNothingLeft(t, untouched)
	}

	if out, code := run("version"); code != 0 || strings.Count(out, "\n") != 1 || strings.TrimSpace(out) == "" {
		t.Errorf("version: exit status %d: %q", code, out)
	}
	if out, code := run("initialise"); code == 0 {
		t.Errorf("an unknown command: %q", out)
	}
}

// wantNothingLeft demands that the node is as it was before any agent.
func (w *world) wantNothingLeft(t *testing.T, network string) {
	t.Helper()
	if now := w.network(t); now != network {
		t.Errorf("the node's network was\n%s\nand is\n%s", network, now)
	}
	// The kernel detaches a program some moments after its link's last pin and
	// descriptor have gone.
	eventually(t, func() error {
		for at, n := range w.attached(t) {
			if n != 0 {
				return fmt.Errorf("%d programs are attached as %v", n, at)
			}
		}
		return nil
	})
	for _, path := range []string{w.PinPath(), w.Socket(), filepath.Dir(w.Socket()), w.StateDir()} {
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is left", path)
		}
	}
}

// readyz proves that credentials can be served and connections attested;
// EKS Auth is no part of it. healthz says that the process runs.
func TestPrivilegedProbes(t *testing.T) {
	w := newWorld(t, rig.Config{})
	w.start(t)
	for _, port := range []string{"2703", "2705"} {
		for _, path := range []string{"/healthz", "/readyz"} {
			if out, err := w.Get(t.Context(), port, path); err != nil || !strings.HasPrefix(out, "ok\n") {
				t.Errorf("%s on port %s: %q, %v", path, port, out, err)
			}
		}
	}
	attested := w.event(t, "attested")
	eventually(t, func() error {
		_, err := w.Ready(t.Context())
		if err == nil && w.event(t, "attested") < attested+2 {
			return errNotYet
		}
		return err
	})
	w.EKSAuth.Refuse()
	for range 3 {
		if _, err := w.Ready(t.Context()); err != nil {
			t.Errorf("readyz while EKS Auth is away: %v", err)
		}
	}
	w.resume(t)
	// Only the node itself is answered by the probe port.
	must(t, w.Node.Do(func() error {
		c, err := net.DialTimeout("tcp", "10.88.0.1:2703", patience)
		if err == nil {
			c.Close()
			return errors.New("the probe port is open on the pod network")
		}
		return nil
	}))
	w.stop(t)
}

// The admin socket is root's, by its directory, by its mode, and by the peer
// that the kernel names.
func TestPrivilegedAdminSocketIsRoots(t *testing.T) {
	w := newWorld(t, rig.Config{})
	w.start(t)
	dir := filepath.Dir(w.Socket())
	for path, want := range map[string]fs.FileMode{dir: 0o700, w.Socket(): 0o600} {
		fi, err := os.Lstat(path)
		must(t, err)
		if fi.Mode().Perm() != want {
			t.Errorf("%s has mode %v, want %v", path, fi.Mode().Perm(), want)
		}
	}
	root, user := newClient(t, w.Node.HostPlace()), newClient(t, w.Node.HostPlace().AsUser(1000, 1000))
	var answer string
	must(t, root.proc.Call(t.Context(), "dialUnix", w.Socket(), &answer))
	if !strings.Contains(answer, " 200 ") {
		t.Errorf("root is answered %q", answer)
	}
	if err := user.proc.Call(t.Context(), "dialUnix", w.Socket(), &answer); !errors.Is(err, syscall.EACCES) {
		t.Errorf("another user: %v, want it denied", err)
	}
	_, stderr, code := runProgram(t, w.Node.HostPlace().AsUser(1000, 1000), cliProgram, "pods", "--admin-socket", w.Socket())
	if code != 1 || !strings.Contains(stderr, "use sudo") {
		t.Errorf("the CLI for another user: exit status %d: %s", code, stderr)
	}
	// Modes that somebody loosened do not open it.
	must(t, os.Chmod(dir, 0o755))
	must(t, os.Chmod(w.Socket(), 0o666))
	answer = "not asked"
	if err := user.proc.Call(t.Context(), "dialUnix", w.Socket(), &answer); err != nil || answer != "" {
		t.Errorf("another user with loose modes: %q, %v; want the connection closed", answer, err)
	}
	must(t, root.proc.Call(t.Context(), "dialUnix", w.Socket(), &answer))
	if !strings.Contains(answer, " 200 ") {
		t.Errorf("root is answered %q afterwards", answer)
	}
	w.stop(t)
	if _, err := os.Lstat(w.Socket()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket stays after the agent: %v", err)
	}
}

// The CLI shows, to root and to scripts, who is who and why.
func TestPrivilegedCLI(t *testing.T) {
	w := newWorld(t, rig.Config{})
	if _, stderr, code := w.cli(t, "pods"); code != 1 || !strings.Contains(stderr, "is latchkey-agent running") {
		t.Errorf("without an agent: exit status %d: %s", code, stderr)
	}
	w.start(t)
	if out, _, code := w.cli(t, "pods"); code != 0 || !strings.Contains(out, "No pods on this node") {
		t.Errorf("without pods: exit status %d: %s", code, out)
	}
	victim, thief, quiet := w.newPod(t, testnode.PodConfig{}), w.newPod(t, testnode.PodConfig{}), w.newPod(t, testnode.PodConfig{})
	inVictim, inThief := newClient(t, victim.Place()), newClient(t, thief.Place())
	conn := inVictim.dial(rig.Host4)
	wantCredentials(t, ask(t, conn, victim.Token), victim)
	wantRefusal(t, inThief.ask(rig.Host4, victim.Token), 403, textMismatch)
	w.logs(t, "pod_mismatch")

	t.Run("pods", func(t *testing.T) {
		table, stderr, code := w.cli(t, "pods")
		if code != 0 || stderr != "" {
			t.Errorf("exit status %d: %s", code, stderr)
		}
		rows := strings.Split(strings.TrimSpace(table), "\n")
		if len(rows) != 4 || !strings.HasPrefix(rows[0], "NAMESPACE") {
			t.Fatalf("want a head and three pods:\n%s", table)
		}
		for _, tt := range []struct {
			p    *pod
			want []string
		}{
			{victim, []string{victim.Namespace, victim.Name, victim.ServiceAccount, "valid", "served"}},
			{thief, []string{"refused 403 pod_mismatch", "none"}},
			{quiet, []string{"none"}},
		} {
			row := ""
			for _, r := range rows[1:] {
				if strings.HasSuffix(r, string(tt.p.UID)) {
					row = r
				}
			}
			for _, want := range tt.want {
				if !strings.Contains(row, want) {
					t.Errorf("no %q in the row of %s: %q", want, tt.p.Name, row)
				}
			}
			if tt.p != victim && strings.Contains(row, victim.ServiceAccount) {
				t.Errorf("a thief is called by what it stole: %q", row)
			}
		}
		out, _, _ := w.cli(t, "pods", "-o", "json")
		var got adminapi.Pods
		if err := json.Unmarshal([]byte(out), &got); err != nil || len(got.Pods) != 3 {
			t.Fatalf("%d pods, %v in %s", len(got.Pods), err, out)
		}
		for _, p := range got.Pods {
			if p.UID == string(victim.UID) && (!strings.Contains(p.Role, victim.account) || p.Expires == nil || p.LastAsked == nil || p.Association == "") {
				t.Errorf("%+v", p)
			}
		}
	})

	id, err := victim.Place().CgroupID()
	must(t, err)
	for _, query := range []string{
		fmt.Sprint(inVictim.proc.PID()),
		conn.LocalAddr().String(),
		victim.Place().CgroupPath(),
		victim.Place().CgroupDir(),
		fmt.Sprintf("cgroup:%d", id),
		string(victim.UID),
		strings.ToUpper(string(victim.UID)),
	} {
		t.Run("whois "+query, func(t *testing.T) {
			table, stderr, code := w.cli(t, "whois", query)
			if code != 0 || !strings.Contains(table, string(victim.UID)) || !strings.Contains(table, victim.account) {
				t.Errorf("exit status %d: %s%s", code, table, stderr)
			}
			out, _, _ := w.cli(t, "whois", query, "--output", "json")
			var got adminapi.Whois
			if err := json.Unmarshal([]byte(out), &got); err != nil || got.Query != query || got.Pod == nil || got.Pod.UID != string(victim.UID) || len(got.Steps) == 0 {
				t.Errorf("%v in %s", err, out)
			}
		})
	}
	for _, tt := range []struct {
		name string
		args []string
		code int
		text string
	}{
		{"outside every pod", []string{"whois", fmt.Sprint(w.agent.PID())}, 0, "none: outside"},
		{"nobody", []string{"whois", "4194304"}, 3, "process 4194304"},
		{"an unknown connection", []string{"whois", "10.88.0.99:1"}, 3, "no recent connection"},
		{"an unknown cgroup", []string{"whois", "/kubepods/nothing"}, 3, "no cgroup"},
		{"a cgroup outside the tree", []string{"whois", "/../../etc"}, 3, ""},
		{"an unknown cgroup id", []string{"whois", "cgroup:1234567890123"}, 3, "cgroup id"},
		{"no number", []string{"whois", "cgroup:abc"}, 2, "decimal number"},
		{"process 0", []string{"whois", "0"}, 2, "pid 0"},
		{"nonsense", []string{"whois", "what?"}, 3, "is no pid"},
		{"no query", []string{"whois"}, 2, "takes one QUERY"},
		{"two queries", []string{"whois", "1", "2"}, 2, "takes one QUERY"},
		{"an empty query", []string{"whois", ""}, 2, "takes one QUERY"},
		{"an unknown format", []string{"pods", "-o", "xml"}, 2, "use table, wide, json or yaml"},
		{"an unknown flag", []string{"pods", "--all"}, 2, "--all"},
		{"an argument", []string{"pods", "web"}, 2, "unknown argument"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			stdout, stderr, code := w.cli(t, tt.args...)
			if code != tt.code || !strings.Contains(stdout+stderr, tt.text) {
				t.Errorf("exit status %d, want %d and %q: %s%s", code, tt.code, tt.text, stdout, stderr)
			}
			if code != 0 && stdout != "" {
				t.Errorf("an error on standard output: %q", stdout)
			}
		})
	}

	t.Run("status", func(t *testing.T) {
		table, stderr, code := w.cli(t, "status")
		if code != 0 {
			t.Errorf("exit status %d: %s", code, stderr)
		}
		for _, want := range []string{rig.Cluster, "enforce", "169.254.170.23:80", "[fd00:ec2::23]:80", "serving", w.KeyFile()} {
			if !strings.Contains(table, want) {
				t.Errorf("no %q in\n%s", want, table)
			}
		}
		out, _, _ := w.cli(t, "status", "-o", "json")
		var got adminapi.Status
		if err := json.Unmarshal([]byte(out), &got); err != nil || !got.Attesting || len(got.Listeners) != 2 || got.BPF["attested"] == 0 {
			t.Errorf("%v in %s", err, out)
		}
	})
	if out, _, code := w.cli(t, "version"); code != 0 || strings.Count(out, "\n") != 1 {
		t.Errorf("version: exit status %d: %q", code, out)
	}
	w.stop(t)
}

// Nothing that people read holds anything that could be used: no token, no
// secret, whatever happened, at the most talkative level.
func TestPrivilegedNothingSecretIsShown(t *testing.T) {
	w := newWorld(t, rig.Config{})
	audit := filepath.Join(t.TempDir(), "audit.log")
	w.start(t, "-v", "trace", "--audit", "file:"+audit)
	victim, thief := w.newPod(t, testnode.PodConfig{}), w.newPod(t, testnode.PodConfig{})
	inVictim, inThief := newClient(t, victim.Place()), newClient(t, thief.Place())
	shown := map[string]string{}
	var secrets []string
	token := func(name, text string) {
		parts := strings.Split(text, ".")
		for _, p := range parts[1:] {
			if len(p) > 30 {
				secrets = append(secrets, p)
			}
		}
		shown["the answer to "+name] = inThief.ask(rig.Host4, text).Body
	}
	served := inVictim.ask(rig.Host4, victim.Token)
	wantCredentials(t, served, victim)
	var creds struct{ SecretAccessKey, Token string }
	must(t, json.Unmarshal([]byte(served.Body), &creds))
	// The prefixes are part of every secret that the stand-in issues.
	secrets = append(secrets, creds.SecretAccessKey, creds.Token, eksauth.SecretPrefix, eksauth.SessionTokenPrefix, "secret of the node")

	stranger, err := tokens.NewSigner(tokens.Config{Algorithm: "ES256"})
	must(t, err)
	claims := w.Claims(thief.Pod.Pod)
	token("a stolen token", victim.Token)
	token("a token of another cluster", stranger.Token(claims))
	token("a broken token", victim.Token[:len(victim.Token)-30]+"!"+victim.Token[len(victim.Token)-30:])
	expired := claims
	expired.Expiry = expired.Expiry.AddDate(2020, 0, 0)
	token("an expired token", w.Signer.Token(expired))
	w.EKSAuth.Inject(eksauth.Fault{Kind: eksauth.Refuse, ErrorType: "InvalidRequestException", Message: "bad token: " + thief.Token, Times: 1})
	token("EKS Auth's quoting", thief.Token)
	w.EKSAuth.Inject(eksauth.Fault{Kind: eksauth.Omit, Members: []string{"credentials.sessionToken"}, Times: 1})
	eventually(t, func() error {
		if a := inThief.ask(rig.Host4, thief.Token); a.Status != http.StatusBadGateway {
			return errNotYet
		}
		return nil
	})
	exchange(t, inThief.dial(rig.Host4), "GET "+rig.Path+" HTTP/1.1\r\nAuthorization "+victim.Token+"\r\n: \r\n\r\n")
	exchange(t, inThief.dial(rig.Host4), request("GET", "/"+victim.Token, "169.254.170.23", ""))

	shown["/metrics"], err = w.Metrics(t.Context())
	must(t, err)
	for _, args := range [][]string{{"pods"}, {"pods", "-o", "json"}, {"status"}, {"status", "-o", "json"},
		{"whois", string(victim.UID)}, {"whois", string(victim.UID), "-o", "json"}, {"whois", fmt.Sprint(inThief.proc.PID()), "-o", "json"}} {
		stdout, stderr, _ := w.cli(t, args...)
		shown["latchkey "+strings.Join(args, " ")] = stdout + stderr
	}
	a := w.agent
	w.stop(t)
	shown["the log"] = a.Log()
	_, raw := readAudit(t, audit)
	shown["the audit"] = string(raw)
	if len(raw) == 0 {
		t.Error("the audit is empty")
	}

	for what, text := range shown {
		for _, s := range secrets {
			if strings.Contains(text, s) {
				t.Errorf("%s shows %.12s…", what, s)
			}
		}
	}
	if !strings.Contains(shown["the log"], `"level":"DEBUG"`) {
		t.Error("the log is not at its most talkative")
	}
	if !strings.Contains(served.Body, eksauth.SecretPrefix) {
		t.Error("what this test looks for is not what the stand-in issues")
	}
}

// A crash leaves no core file, which would hold every pod's credentials.
func TestPrivilegedNoCoreDump(t *testing.T) {
	w := newWorld(t, rig.Config{})
	// Makes a Go program that crashes raise SIGABRT, as others do.
	t.Setenv("GOTRACEBACK", "crash")
	unlimited := &unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	// This machine writes core files, of programs that allow it.
	control := w.Node.HostPlace().Command(ctx, "sleep", "60")
	control.Dir = t.TempDir()
	must(t, control.Start())
	must(t, unix.Prlimit(control.Process.Pid, unix.RLIMIT_CORE, unlimited, nil))
	must(t, control.Process.Signal(syscall.SIGABRT))
	var exit *exec.ExitError
	if err := control.Wait(); !errors.As(err, &exit) || !exit.Sys().(syscall.WaitStatus).CoreDump() {
		t.Fatalf("no core file is written on this machine, so none can be missed: %v; allow them (ulimit -Hc unlimited)", err)
	}
	a := w.start(t)
	must(t, unix.Prlimit(a.PID(), unix.RLIMIT_CORE, unlimited, nil))
	must(t, syscall.Kill(a.PID(), syscall.SIGABRT))
	<-a.Done()
	if !errors.As(a.Err(), &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGABRT {
		t.Errorf("the agent ended with %v, want it to crash", a.Err())
	} else if exit.Sys().(syscall.WaitStatus).CoreDump() {
		t.Error("the agent's memory was written to a core file")
	}
	// The next test must not take the crash for a finding.
	w.agent = nil
}
