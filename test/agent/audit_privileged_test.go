// SPDX-License-Identifier: Apache-2.0

//go:build linux && privileged

package agent

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/test/rig"
	"github.com/latchkey-dev/latchkey/test/standin/eksauth"
	"github.com/latchkey-dev/latchkey/test/standin/tokens"
	"github.com/latchkey-dev/latchkey/test/testnode"
)

// auditLine is what docs/audit.md says of a line.
type auditLine struct {
	Time, Type, Verdict, Reason, Cache, Finding, Peer, Told string
	Status                                                  int
	Pod                                                     struct {
		UID, Name, Namespace string
		ServiceAccount       string `json:"service_account"`
	}
	Role, Session, Association string
	Token                      *struct {
		VerifiedBy     string `json:"verified_by"`
		PodUID         string `json:"pod_uid"`
		Namespace, JTI string
	}
	Claimed *struct {
		PodUID     string `json:"pod_uid"`
		VerifiedBy string `json:"verified_by"`
	} `json:"claimed_token"`
	CgroupID    json.Number `json:"cgroup_id"`
	Cgroup      string
	NetnsCookie json.Number `json:"netns_cookie"`
	PID         int
	UID         *int
	LatencyUS   *int `json:"latency_us"`
	Dropped     int
}

func readAudit(t *testing.T, file string) (lines []auditLine, raw []byte) {
	t.Helper()
	raw, err := os.ReadFile(file)
	must(t, err)
	s := bufio.NewScanner(bytes.NewReader(raw))
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		var l auditLine
		if err := json.Unmarshal(s.Bytes(), &l); err != nil {
			t.Fatalf("%v: %s", err, s.Bytes())
		}
		if l.Type != "audit" || l.Time == "" || l.LatencyUS == nil || l.Dropped != 0 {
			t.Errorf("%s", s.Bytes())
		}
		lines = append(lines, l)
	}
	must(t, s.Err())
	return lines, raw
}

// Each credential that was issued or refused has its line, with what the kernel
// saw beside what the token says, and nothing that could be used.
func TestPrivilegedAudit(t *testing.T) {
	w := newWorld(t, rig.Config{})
	file := filepath.Join(t.TempDir(), "audit", "audit.log")
	w.start(t, "--audit", "file:"+file, "--containerd-socket", "off")
	victim, thief := w.newPod(t, testnode.PodConfig{}), w.newPod(t, testnode.PodConfig{})
	inVictim, inThief := newClient(t, victim.Place()), newClient(t, thief.Place())
	stranger, err := tokens.NewSigner(tokens.Config{Algorithm: "ES256"})
	must(t, err)
	forged := stranger.Token(w.Claims(victim.Pod.Pod))

	served := inVictim.ask(rig.Host4, victim.Token)
	wantCredentials(t, served, victim)
	wantCredentials(t, inVictim.ask(rig.Host6, victim.Token), victim)
	wantRefusal(t, inThief.ask(rig.Host4, victim.Token), 403, textMismatch)
	if a := inThief.ask(rig.Host4, forged); a.Status != 400 {
		t.Errorf("a forged token: %d %s", a.Status, a.Body)
	}
	w.stop(t)

	lines, raw := readAudit(t, file)
	if len(lines) != 4 {
		t.Fatalf("%d lines, want 4:\n%s", len(lines), raw)
	}
	find := func(what string, match func(*auditLine) bool) auditLine {
		t.Helper()
		var found []auditLine
		for i := range lines {
			if match(&lines[i]) {
				found = append(found, lines[i])
			}
		}
		if len(found) != 1 {
			t.Fatalf("%d lines of %s in\n%s", len(found), what, raw)
		}
		return found[0]
	}
	for _, cache := range []string{"miss", "hit"} {
		l := find(cache, func(l *auditLine) bool { return l.Cache == cache })
		if l.Verdict != "issued" || l.Reason != "served" || l.Status != 200 || l.Finding != "pod" ||
			l.Pod.UID != string(victim.UID) || l.Pod.Name != victim.Name || l.Pod.Namespace != victim.Namespace || l.Pod.ServiceAccount != victim.ServiceAccount ||
			!strings.Contains(l.Role, victim.account) || l.Session == "" || l.Association == "" ||
			l.Token == nil || l.Token.VerifiedBy != "keys" || l.Token.PodUID != string(victim.UID) || l.Token.JTI == "" || l.Claimed != nil {
			t.Errorf("%s: %+v", cache, l)
		}
		checkKernel(t, cache, l, inVictim)
	}
	l := find("the stolen token", func(l *auditLine) bool { return l.Reason == "pod_mismatch" })
	if l.Verdict != "refused" || l.Status != 403 || l.Role != "" || l.Pod.UID != string(thief.UID) || l.Pod.Name != "" ||
		l.Token == nil || l.Token.PodUID != string(victim.UID) || l.Token.VerifiedBy != "keys" || !strings.Contains(l.Told, "another pod") {
		t.Errorf("the stolen token: %+v", l)
	}
	checkKernel(t, "the stolen token", l, inThief)
	l = find("the forged token", func(l *auditLine) bool { return strings.HasPrefix(l.Reason, "token_") })
	if l.Verdict != "refused" || l.Pod.UID != string(thief.UID) || l.Token != nil || l.Claimed == nil || l.Claimed.PodUID != string(victim.UID) || l.Claimed.VerifiedBy != "" {
		t.Errorf("the forged token: %+v", l)
	}
	var creds struct{ SecretAccessKey, Token string }
	must(t, json.Unmarshal([]byte(served.Body), &creds))
	secrets := []string{creds.SecretAccessKey, creds.Token, eksauth.SecretPrefix, eksauth.SessionTokenPrefix}
	for _, token := range []string{victim.Token, forged} {
		secrets = append(secrets, strings.Split(token, ".")[1:]...)
	}
	for _, s := range secrets {
		if bytes.Contains(raw, []byte(s)) {
			t.Errorf("the audit shows %.12s…", s)
		}
	}
}

// On standard output, among the log, and to a datagram socket; without hits if
// they are not asked for.
func TestPrivilegedAuditTargets(t *testing.T) {
	w := newWorld(t, rig.Config{})
	p := w.newPod(t, testnode.PodConfig{})
	c := newClient(t, p.Place())
	askTwice := func() {
		t.Helper()
		wantCredentials(t, c.ask(rig.Host4, p.Token), p)
		wantCredentials(t, c.ask(rig.Host4, p.Token), p)
	}

	a := w.start(t, "--audit", "stdout", "--audit-sample-hits", "0")
	askTwice()
	w.stop(t)
	if n := strings.Count(a.Log(), `"type":"audit"`); n != 1 || strings.Count(a.Log(), `"cache":"miss"`) != 1 {
		t.Errorf("%d lines of audit, want the one that was no hit:\n%s", n, a.Log())
	}

	path := filepath.Join(t.TempDir(), "collector.sock")
	receiver, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	must(t, err)
	defer receiver.Close()
	w.start(t, "--audit", "unixgram:"+path)
	askTwice()
	buf := make([]byte, 64<<10)
	seen := map[string]int{} // in either order
	for range 2 {
		must(t, receiver.SetReadDeadline(time.Now().Add(patience)))
		n, err := receiver.Read(buf)
		must(t, err)
		var l auditLine
		if err := json.Unmarshal(buf[:n], &l); err != nil || l.Pod.UID != string(p.UID) {
			t.Errorf("%v: %s", err, buf[:n])
		}
		seen[l.Cache]++
	}
	if seen["miss"] != 1 || seen["hit"] != 1 {
		t.Errorf("%v, want a miss and a hit", seen)
	}
	w.stop(t)

	stdout, stderr, code := runProgram(t, w.Node.AgentPlace(), append([]string{agentProgram}, w.Args("--audit", "file:audit.log")...)...)
	if code != 2 || !strings.Contains(stdout+stderr, "absolute path") {
		t.Errorf("a relative path: exit status %d: %s", code, stdout+stderr)
	}
}

func checkKernel(t *testing.T, what string, l auditLine, c *client) {
	t.Helper()
	if l.PID != c.proc.PID() || l.UID == nil || l.CgroupID == "" || l.Cgroup == "" || l.Peer == "" {
		t.Errorf("%s: the kernel's part is %+v, want process %d", what, l, c.proc.PID())
	}
}

// An agent that is to leave nothing behind leaves nothing; one that is followed
// by the next leaves that one alone.
func TestPrivilegedCleanupOnExit(t *testing.T) {
	w := newWorld(t, rig.Config{})
	untouched := w.network(t)
	for i := range 2 {
		w.start(t, "--cleanup-on-exit")
		p := w.newPod(t, testnode.PodConfig{Name: fmt.Sprintf("p%d", i)})
		c := newClient(t, p.Place())
		wantCredentials(t, c.ask(rig.Host4, p.Token), p)
		must(t, p.Delete(t.Context()))
		w.stop(t)
		w.wantNothingLeft(t, untouched)
	}
	// Without the flag everything stays for the next one.
	w.start(t)
	w.stop(t)
	w.wantAttachedOnce(t)
}
