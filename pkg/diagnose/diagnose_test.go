// SPDX-License-Identifier: Apache-2.0

package diagnose

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/latchkey-dev/latchkey/pkg/explain"
)

// procfs makes a /proc of files.
func procfs(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, text := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestCgroups(t *testing.T) {
	t.Parallel()
	const v2 = "30 20 0:26 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
	const v1 = "31 20 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
	for text, want := range map[string]struct {
		v2 string
		v1 bool
	}{
		v2: {"/sys/fs/cgroup/unified", false}, v1: {"", true}, v1 + v2: {"/sys/fs/cgroup/unified", true}, "": {"", false},
	} {
		got2, got1, err := Cgroups(procfs(t, map[string]string{"self/mountinfo": text}))
		if err != nil || got2 != want.v2 || got1 != want.v1 {
			t.Errorf("%q: %q, %v, %v", text, got2, got1, err)
		}
	}
	if _, _, err := Cgroups(t.TempDir()); err == nil {
		t.Error("no error without mountinfo")
	}
}

func TestListenersAndTheirHolders(t *testing.T) {
	t.Parallel()
	root := procfs(t, map[string]string{
		"self/net/tcp": "  sl  local_address rem_address   st ...\n" +
			"   0: 17AAFEA9:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0\n" +
			"   1: 00000000:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4712 1 0\n" +
			"   2: 17AAFEA9:0050 0200580A:C000 01 00000000:00000000 00:00000000 00000000     0        0 4713 1 0\n" +
			"   3: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4714 1 0\nrubbish\n",
		"self/net/tcp6": "   0: C20E00FD00000000000000002300" + "0000:0050 0:0 0A 0:0 0:0 0 0 0 4715 1\n",
		"7/comm":        "nginx\n",
		"9/comm":        "latchkey-agent\n",
	})
	for pid, inode := range map[string]string{"7": "4712", "9": "4711"} {
		dir := filepath.Join(root, pid, "fd")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink("socket:["+inode+"]", filepath.Join(dir, "3")); err != nil {
			t.Fatal(err)
		}
	}
	got, err := Listeners(root, 80)
	if err != nil || len(got) != 3 {
		t.Fatalf("%+v, %v", got, err)
	}
	if got[0].At != netip.MustParseAddrPort("169.254.170.23:80") || got[0].Process != "latchkey-agent (9)" || got[1].Process != "nginx (7)" || got[1].At.Addr() != netip.IPv4Unspecified() {
		t.Errorf("%+v", got)
	}
	mine := []netip.Addr{netip.MustParseAddr("169.254.170.23")}
	if holder, err := PortHolder(root, mine, 80, 9); err != nil || holder != "nginx (7) on 0.0.0.0:80" {
		t.Errorf("%q, %v", holder, err)
	}
	if holder, err := PortHolder(root, mine, 81, 9); err != nil || holder != "" {
		t.Errorf("%q, %v", holder, err)
	}
}

func FuzzParseListener(f *testing.F) {
	f.Add("   0: 17AAFEA9:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0")
	f.Fuzz(func(t *testing.T, line string) {
		if l, ok := parseListener(line); ok && !l.At.IsValid() {
			t.Errorf("%q: %+v", line, l)
		}
	})
}

func env(list ...string) string { return strings.Join(list, "\x00") + "\x00" }

func TestFindInjection(t *testing.T) {
	t.Parallel()
	const uri, file = "AWS_CONTAINER_CREDENTIALS_FULL_URI=http://169.254.170.23/v1/credentials", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE=/var/run/token"
	root := procfs(t, map[string]string{
		"1/environ":           env("PATH=/bin"),
		"2/environ":           env("PATH=/bin", uri, file, "HTTP_PROXY=http://proxy", "AWS_ACCESS_KEY_ID=AKIA"),
		"2/root/var/run/real": "TOKEN",
		"3/environ":           env(uri, file, "http_proxy=http://proxy", "NO_PROXY=10.0.0.0/8,169.254.0.0/16"),
		"3/root/etc/x":        "",
		"4/environ":           env(uri, file),
		"4/root/etc/x":        "",
		"secret":              "of the host",
	})
	// What lies at the path is the pod's: a link is followed inside its root.
	if err := os.Symlink("/var/run/real", filepath.Join(root, "2/root/var/run/token")); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(root, "4/root/var/run"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("../../../../secret", filepath.Join(root, "4/root/var/run/token")); err != nil {
		t.Fatal(err)
	}
	j, token := FindInjection(root, []int{99, 1, 2})
	if j == nil || j.PID != 2 || j.URI == "" || j.Other != "AWS_ACCESS_KEY_ID" || j.Proxy != "HTTP_PROXY" || token != "TOKEN" || j.TokenError != "" {
		t.Errorf("%+v", j)
	}
	if j, token = FindInjection(root, []int{3}); j == nil || j.Proxy != "" || token != "" || j.TokenError == "" {
		t.Errorf("%+v", j)
	}
	if j, token = FindInjection(root, []int{4}); j == nil || token != "" || j.TokenError == "" {
		t.Errorf("a link out of the pod's root was followed: %+v", j)
	}
	if j, _ = FindInjection(root, []int{1}); j == nil || j.URI != "" {
		t.Errorf("%+v", j)
	}
	if j, _ = FindInjection(root, []int{99}); j != nil {
		t.Errorf("%+v", j)
	}
}

func TestProcessesAndLeaf(t *testing.T) {
	t.Parallel()
	dir := procfs(t, map[string]string{"cgroup.procs": "", "a/cgroup.procs": "12\n7\n", "a/b/cgroup.procs": "7\n3\n", "c/other": "99"})
	got, err := Processes(dir)
	if err != nil || !slices.Equal(got, []int{3, 7, 12}) {
		t.Errorf("%v, %v", got, err)
	}
	if leaf := Leaf(dir); leaf != filepath.Join(dir, "a") {
		t.Errorf("%q", leaf)
	}
	if leaf := Leaf(filepath.Join(dir, "c")); leaf != "" {
		t.Errorf("%q", leaf)
	}
	if _, err := Processes(filepath.Join(dir, "nowhere")); err == nil {
		t.Error("no error for a cgroup that is not there")
	}
}

func TestCNIHazardsAreNamed(t *testing.T) {
	t.Parallel()
	cni := procfs(t, map[string]string{"10-a.conflist": `{"plugins":[{"type":"bridge"},{"type":"istio-cni"}]}`, "20-b.conflist": `{"type":"linkerd-cni"}`, "30-c.conf": `{"type":"bridge"}`})
	d := &Doctor{ProcFS: procfs(t, map[string]string{"12/comm": "ztunnel\n", "13/comm": "bash\n", "self/x": ""}), CNIConfig: cni}
	told := 0
	d.Report = func(Check) { told++ }
	d.cni(t.Context())
	for _, want := range []string{"Istio's CNI plugin is chained (10-a.conflist)", "Linkerd's CNI plugin is chained (20-b.conflist)", "ztunnel (12) runs on this node"} {
		if !slices.ContainsFunc(d.checks, func(c Check) bool { return c.State == explain.Warn && c.Fix != "" && strings.Contains(c.Text, want) }) {
			t.Errorf("no warning %q: %+v", want, d.checks)
		}
	}
	if told != len(d.checks) {
		t.Errorf("%d checks were told of as they were made, of %d", told, len(d.checks))
	}
	for name, want := range map[string]string{"cil_sock4_connect": "Cilium", "calico_connect4": "Calico", "sd_fw_ingress": "systemd", "x": "bpftool"} {
		if !strings.Contains(hookHint(name), want) {
			t.Errorf("%s: %s", name, hookHint(name))
		}
	}
}

func TestFailed(t *testing.T) {
	t.Parallel()
	if Failed([]Check{{State: explain.OK}, {State: explain.Warn}}) || !Failed([]Check{{State: explain.OK}, {State: explain.Fail}}) {
		t.Error("warnings are no failures, failures are")
	}
}

// The agent's own network namespace can be tried from without a privilege.
func TestReachFromTheOwnNamespace(t *testing.T) {
	t.Parallel()
	srv := httptest.NewServer(http.NotFoundHandler())
	defer srv.Close()
	closed := httptest.NewServer(http.NotFoundHandler())
	closed.Close()
	addresses := []string{srv.Listener.Addr().String(), closed.Listener.Addr().String()}
	var out bytes.Buffer
	done := make(chan error)
	// ReachFrom never gives its thread back.
	go func() { done <- ReachFrom(context.Background(), &out, "/proc/self/ns/net", addresses) }()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	var a answer
	if err := json.Unmarshal(out.Bytes(), &a); err != nil || a.Denied || len(a.Reached) != 2 {
		t.Fatalf("%s, %v", out.Bytes(), err)
	}
	if r := a.Reached[0]; r.Status != http.StatusNotFound || r.Error != "" || r.Local == "" {
		t.Errorf("%+v", r)
	}
	if r := a.Reached[1]; r.Status != 0 || r.Error == "" {
		t.Errorf("%+v", r)
	}
}

// What the child says, as a program that prints it.
func TestChildThatMayNotEnter(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]error{`{"reached":null,"denied":true}`: ErrNotPermitted, `{"reached":[{"address":"a","status":404}]}`: nil} {
		got, err := Child{Command: []string{"/bin/sh", "-c", "echo '" + text + "'"}}.Reach(t.Context(), "/proc/self/ns/net", "")
		if !errors.Is(err, want) || (want == nil) != (len(got) == 1) {
			t.Errorf("%s: %+v, %v", text, got, err)
		}
	}
}

func TestNamesThatTheKernelCutsOff(t *testing.T) {
	t.Parallel()
	for seen, want := range map[string]string{
		"latchkey_connec": "latchkey_connect4", "latchkey_connect4": "latchkey_connect4", "latchkey_socko": "latchkey_socko",
		"somebody_connec": "somebody_connec", "": "",
	} {
		if got := fullName(seen, "connect4"); got != want {
			t.Errorf("%q: %q, not %q", seen, got, want)
		}
	}
}
