// SPDX-License-Identifier: Apache-2.0

package server

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/eks"

	"github.com/latchkey-dev/latchkey/test/standin/tokens"
)

func listInput() *eks.ListPodIdentityAssociationsInput {
	return &eks.ListPodIdentityAssociationsInput{ClusterName: aws.String(cluster)}
}

func writeFile(t *testing.T, dir, name, text string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// Associations live in git: what was exported changes nothing when it is
// imported, and the file's word is made true.
func TestAssociationsAsYAML(t *testing.T) {
	t.Parallel()
	s := start(t)
	s.addCluster(cluster, newSigner(t))
	s.cli("association", "create", "-c", cluster, "-n", "web", "-s", "api", "-r", roleARN("a"), "--tag", "team=web")
	s.cli("association", "create", "-c", cluster, "-n", "web", "-s", "old", "-r", roleARN("a"))
	exported := s.cli("association", "export", "-c", cluster)
	imported := func(text string, args ...string) string {
		t.Helper()
		r := s.try(text, append([]string{"association", "import", "-"}, args...)...)
		if r.code != 0 {
			t.Fatalf("import: exit %d %s%s", r.code, r.stdout, r.stderr)
		}
		return r.stdout
	}
	if out := imported(exported, "--prune"); !strings.Contains(out, "prod: 0 created, 0 updated, 0 deleted, 2 unchanged") {
		t.Errorf("what was exported is not what is there:\n%s", out)
	}
	wished := `
# from git
clusterName: prod
associations:
- {namespace: web, serviceAccount: api, roleArn: "` + roleARN("b") + `", tags: {team: core}}
- {namespace: jobs, serviceAccount: batch, roleArn: "` + roleARN("c") + `"}
`
	plan := imported(wished, "--prune", "--dry-run")
	for _, line := range []string{"+ create", "~ update", "roleArn: " + roleARN("a") + " → " + roleARN("b"), "- delete", "1 would be created, 1 would be updated, 1 would be deleted"} {
		if !strings.Contains(plan, line) {
			t.Errorf("the plan lacks %q:\n%s", line, plan)
		}
	}
	if s.cli("association", "export", "-c", cluster) != exported {
		t.Error("a dry run changed something")
	}
	if out := imported(wished); !strings.Contains(out, "1 not in the file left alone") {
		t.Errorf("without --prune:\n%s", out)
	}
	imported(wished, "--prune")
	if out := imported(wished, "--prune"); !strings.Contains(out, "0 created, 0 updated, 0 deleted, 2 unchanged") {
		t.Errorf("the second time:\n%s", out)
	}
	// One that cannot be does not hold up the others, and is told.
	r := s.try(strings.Replace(wished, roleARN("c"), "arn:aws:iam::999999999999:role/c", 1)+"- {namespace: more, serviceAccount: one, roleArn: \""+roleARN("d")+"\"}\n", "association", "import", "-")
	if r.code != 1 || !strings.Contains(r.stdout, "error: ") || !strings.Contains(s.cli("association", "list", "-c", cluster), "more") {
		t.Errorf("a file with one bad association: %+v", r)
	}
	if r := s.try("clusterName: prod\nassociations:\n- {namespace: a, serviceAccount: b, role: c}\n", "association", "import", "-"); r.code != 2 {
		t.Errorf("a typing error was accepted: %+v", r)
	}
}

func TestSnapshot(t *testing.T) {
	t.Parallel()
	s := start(t)
	s.addCluster(cluster, newSigner(t))
	importMany(s, 300, func(int) string { return "web" })
	exported := s.cli("association", "export", "-c", cluster)
	file := filepath.Join(s.dir, "backup.db")
	s.cli("snapshot", "save", file)
	if fi, err := os.Stat(file); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("the snapshot is %v, %v", fi.Mode(), err)
	}
	s.cli("association", "delete", "-c", cluster, "-n", "web", "-s", "sa-7")
	if r := s.try("", "snapshot", "restore", file); r.code == 0 {
		t.Error("restored under a running server")
	}
	s.stop()
	if r := s.try("", "snapshot", "restore", file); r.code == 0 {
		t.Error("restored over a store")
	}
	if err := os.Rename(filepath.Join(s.dir, "etcd"), filepath.Join(s.dir, "etcd.old")); err != nil {
		t.Fatal(err)
	}
	damaged, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	damaged[len(damaged)/2] ^= 1
	if r := s.try("", "snapshot", "restore", writeFile(t, s.dir, "damaged.db", string(damaged))); r.code == 0 {
		t.Error("restored a damaged snapshot")
	}
	s.cli("snapshot", "restore", file)
	s.serve()
	if got := s.cli("association", "export", "-c", cluster); got != exported {
		t.Error("what was restored is not what was saved")
	}
}

func TestUserKeys(t *testing.T) {
	t.Parallel()
	s := start(t)
	s.addCluster(cluster, newSigner(t))
	old := s.user("team")
	if fi, err := os.Stat(filepath.Join(s.dir, "users.yaml")); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("users file: %v, %v", fi.Mode(), err)
	}
	works := func(c aws.Credentials) error {
		_, err := s.eks(c).ListPodIdentityAssociations(s.ctx, listInput())
		return err
	}
	out := s.cli("user", "rotate-key", "team")
	var next aws.Credentials
	if _, err := fmt.Sscanf(strings.ReplaceAll(out, "=", " "), "AWS_ACCESS_KEY_ID %s\nAWS_SECRET_ACCESS_KEY %s", &next.AccessKeyID, &next.SecretAccessKey); err != nil {
		t.Fatalf("rotate-key printed %q: %v", out, err)
	}
	s.until("the new key works", func() error { return works(next) })
	if err := works(old); err != nil {
		t.Errorf("the old key ended too early: %v", err)
	}
	s.cli("user", "rotate-key", "team", "--finish")
	s.until("the old key ends", func() error {
		if works(old) == nil {
			return errors.New("it works")
		}
		return nil
	})
	if err := works(next); err != nil {
		t.Error(err)
	}
	if list := s.cli("user", "list", "-o", "yaml"); strings.Contains(list, next.SecretAccessKey) || !strings.Contains(list, next.AccessKeyID) {
		t.Errorf("user list:\n%s", list)
	}
	var loads []string
	for _, r := range s.records() {
		if r["operation"] == "LoadUsers" {
			loads = append(loads, fmt.Sprint(r["caller"], " ", r["state"]))
		}
	}
	if len(loads) != 3 || !strings.Contains(loads[0], "added:[team]") || !strings.Contains(loads[2], "changed:[team]") {
		t.Errorf("records of the users file: %q", loads)
	}
	// A file that cannot be used leaves the last good one in force.
	if err := os.WriteFile(filepath.Join(s.dir, "users.yaml"), []byte("users: [{"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.until("doctor tells of the broken file", func() error {
		if r := s.try("", "doctor"); r.code != 4 {
			return fmt.Errorf("exit %d: %s", r.code, r.stdout)
		}
		return nil
	})
	if err := works(next); err != nil {
		t.Errorf("a broken file took a good key away: %v", err)
	}
}

// The CLI edits the file that the server reads, or none.
func TestUsersFileElsewhere(t *testing.T) {
	t.Parallel()
	s := newServer(t, "--stand-in-sts")
	file := filepath.Join(s.dir, "elsewhere.yaml")
	s.args = append(s.args, "--users", file)
	s.serve()
	for _, line := range []string{"user add team", "user remove team", "user rotate-key team", "user list"} {
		if r := s.try("", strings.Fields(line)...); r.code != 2 || !strings.Contains(r.stderr, "give --users "+file) {
			t.Errorf("%s: %+v", line, r)
		}
	}
	if _, err := os.Stat(filepath.Join(s.dir, "users.yaml")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a users file that nobody reads: %v", err)
	}
	s.user("team", "--users", file)
	if st := s.cli("status"); !strings.Contains(st, file) {
		t.Errorf("status:\n%s", st)
	}
}

// certificate writes a new self-signed certificate for 127.0.0.1, as whoever
// renews one does: into other files that are renamed.
func certificate(t *testing.T, dir string, serial int64) (pool *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: "latchkey"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{"tls.key": {Type: "PRIVATE KEY", Bytes: keyDER}, "tls.crt": {Type: "CERTIFICATE", Bytes: der}} {
		tmp := writeFile(t, dir, name+".new", string(pem.EncodeToMemory(block)))
		if err := os.Rename(tmp, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	pool = x509.NewCertPool()
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool.AddCert(parsed)
	return pool
}

func TestTLS(t *testing.T) {
	t.Parallel()
	s := newServer(t, "--stand-in-sts")
	first := certificate(t, s.dir, 1)
	s.args = append(s.args, "--tls-cert", filepath.Join(s.dir, "tls.crt"), "--tls-key", filepath.Join(s.dir, "tls.key"))
	s.serve()
	ask := func(pool *x509.CertPool, most uint16) error {
		c := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MaxVersion: most}, DisableKeepAlives: true}}
		resp, err := c.Get(s.url + "/")
		if err != nil {
			return err
		}
		resp.Body.Close()
		return nil
	}
	if err := ask(first, 0); err != nil {
		t.Fatal(err)
	}
	if err := ask(first, tls.VersionTLS12); err == nil {
		t.Error("TLS 1.2 was accepted")
	}
	second := certificate(t, s.dir, 2)
	s.until("the new certificate is served", func() error { return ask(second, 0) })
	// Half a file is no reason to stop serving.
	writeFile(t, s.dir, "tls.crt", "-----BEGIN CERTIFICATE-----\nMII")
	s.until("doctor tells of it", func() error {
		if r := s.try("", "doctor"); r.code != 4 {
			return fmt.Errorf("exit %d", r.code)
		}
		return nil
	})
	if err := ask(second, 0); err != nil {
		t.Errorf("a broken file: %v", err)
	}
}

func TestRefusesToStart(t *testing.T) {
	t.Parallel()
	running := start(t)
	for _, tc := range []struct {
		name string
		args []string
		// other changes the state directory.
		code int
		text string
	}{
		{"plain HTTP for everybody", []string{"--listen", "0.0.0.0:0"}, 2, "plain HTTP beyond loopback"},
		{"certificate without key", []string{"--tls-cert", "x"}, 2, "belong together"},
		{"certificate that is not there", []string{"--tls-cert", "/nonexistent", "--tls-key", "/nonexistent"}, 2, "TLS certificate"},
		{"stand-in and endpoint", []string{"--stand-in-sts", "--sts-endpoint", "http://127.0.0.1:1"}, 2, "makes no sense"},
		{"no URL", []string{"--sts-endpoint", "sts"}, 2, "http://"},
		{"session too short", []string{"--session-duration", "5m"}, 2, "STS allows"},
		{"unknown node binding", []string{"--node-binding", "maybe"}, 2, "node-binding"},
		{"unknown flag", []string{"--port", "1"}, 2, "unknown flag"},
		{"unknown setting", []string{"--config", writeFile(t, running.dir, "a.yaml", "listn: 127.0.0.1:0\n")}, 2, `there is no setting "listn"`},
		{"unknown member of a cluster", []string{"--config", writeFile(t, running.dir, "b.yaml", "clusters:\n- {name: a, regoin: b}\n")}, 2, "regoin"},
		{"cluster without keys", []string{"--config", writeFile(t, running.dir, "c.yaml", "clusters:\n- {name: a, region: us-west-2, account: '111122223333', issuers: [x]}\n")}, 2, "has no keys"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newServer(t)
			r := s.try("", append([]string{"serve", "--metrics-address", ""}, tc.args...)...)
			if r.code != tc.code || !strings.Contains(r.stderr, tc.text) {
				t.Errorf("exit %d: %s; want %d with %q", r.code, r.stderr, tc.code, tc.text)
			}
			if _, err := os.Stat(filepath.Join(s.dir, "etcd")); !errors.Is(err, fs.ErrNotExist) {
				t.Error("it made a store all the same")
			}
		})
	}
	t.Run("on another's state directory", func(t *testing.T) {
		r := running.try("", "serve", "--listen", "127.0.0.1:0", "--metrics-address", "", "--stand-in-sts")
		if r.code != 1 || !strings.Contains(r.stderr, "another latchkey-server") {
			t.Errorf("%+v", r)
		}
		running.cli("status")
	})
}

// A file has the flags' names; the command line wins.
func TestConfigFile(t *testing.T) {
	t.Parallel()
	signer := newSigner(t)
	s := newServer(t)
	keys := writeFile(t, s.dir, "sa.pub", string(signer.PEM()))
	config := writeFile(t, s.dir, "server.yaml", fmt.Sprintf(`
stand-in-sts: true
session-duration: 30m
node-binding: prefer
audit-max-size: 5
listen: 192.0.2.1:1 # not used: the command line says otherwise
clusters:
- name: prod
  region: us-west-2
  account: "111122223333"
  issuers: [%q]
  keysFile: %s
  allowedRoles: ["arn:aws:iam::111122223333:role/web/*"]
`, issuer, keys))
	s.args = []string{"--config", config}
	s.serve()
	if st := s.cli("status"); !strings.Contains(st, "prefer") || !strings.Contains(st, "stand-in") {
		t.Errorf("status:\n%s", st)
	}
	if r := s.try("", "association", "create", "-c", cluster, "-n", "a", "-s", "b", "-r", roleARN("admin")); r.code != 2 {
		t.Errorf("a role that the cluster may not use: %+v", r)
	}
	s.cli("association", "create", "-c", cluster, "-n", "a", "-s", "b", "-r", roleARN("web/r"))
	described := s.cli("cluster", "describe", cluster, "-o", "yaml")
	s.stop()
	s.serve()
	if again := s.cli("cluster", "describe", cluster, "-o", "yaml"); again != described {
		t.Errorf("a restart changed the cluster:\n%s\nwas\n%s", again, described)
	}
	if r := s.try(described, "cluster", "add", "--replace", "--file", "-"); r.code != 0 {
		t.Errorf("what describe writes cannot be added: %s", r.stderr)
	}
	if got, err := exec.CommandContext(s.ctx, program, "__complete", "--state-dir", s.dir, "association", "list", "-c", "").Output(); err != nil || !strings.HasPrefix(string(got), cluster+"\t") {
		t.Errorf("completion does not know the cluster: %q, %v", got, err)
	}
	if r := s.try("", "cluster", "remove", cluster); r.code == 0 || !strings.Contains(r.stderr, "conflict") {
		t.Errorf("a cluster with associations was removed: %+v", r)
	}
	s.cli("cluster", "remove", cluster, "--force")
	if r := s.try("", "cluster", "describe", cluster); r.code != 3 {
		t.Errorf("exit %d for a cluster that is gone", r.code)
	}
}

// A user's calls are bounded as the flags say.
func TestLimitsOfCallers(t *testing.T) {
	t.Parallel()
	s := start(t, "--max-reads", "0.000001", "--max-writes", "-1")
	s.addCluster(cluster, newSigner(t))
	// Making a user takes a read of its own, which is all it has.
	busy := s.eks(s.user("busy"))
	_, err := busy.ListPodIdentityAssociations(s.ctx, listInput())
	want(t, "one read too many", err, "ThrottlingException", 429, "Rate exceeded")
	for i := range 150 {
		_, err := busy.CreatePodIdentityAssociation(s.ctx, &eks.CreatePodIdentityAssociationInput{
			ClusterName: aws.String(cluster), Namespace: aws.String("web"), ServiceAccount: aws.String(fmt.Sprint("sa-", i)), RoleArn: aws.String(roleARN("r")),
		})
		if err != nil {
			t.Fatalf("change %d without a limit: %v", i, err)
		}
	}
	if r := newServer(t).try("", "serve", "--metrics-address", "", "--max-writes", "0"); r.code != 2 || !strings.Contains(r.stderr, "-1 for no limit") {
		t.Errorf("%+v", r)
	}
}

// A change of one setting lifts no limit and changes nothing else.
func TestClusterReplace(t *testing.T) {
	t.Parallel()
	s := start(t)
	old, next := newSigner(t), newSigner(t)
	s.addCluster(cluster, old, "--allow-role", roleARN("web/*"), "--allow-account", "444455556666", "--agent", "kube-system/agent", "--tag", "a=b",
		"--token-review", "/etc/reviewer", "--token-review-context", "c")
	described := func() string { return s.cli("cluster", "describe", cluster, "-o", "json") }
	modified := regexp.MustCompile(`"modifiedAt": "[^"]*"`)
	before := modified.ReplaceAllString(described(), "")
	both := writeFile(t, s.dir, "both.json", string(tokens.JWKS(old, next)))
	s.cli("cluster", "add", cluster, "--replace", "--keys", both)
	changed := described()
	if !strings.Contains(changed, next.KeyID()) || !strings.Contains(changed, roleARN("web/*")) || !strings.Contains(changed, "/etc/reviewer") {
		t.Errorf("after a change of keys:\n%s", changed)
	}
	s.cli("cluster", "add", cluster, "--replace", "--keys", writeFile(t, s.dir, "old.pub", string(old.PEM())))
	if got := modified.ReplaceAllString(described(), ""); got != before {
		t.Errorf("there and back:\n%s\nwas\n%s", got, before)
	}
	for _, c := range []struct {
		flags     []string
		has, lack string
	}{
		{[]string{"--token-review-outage", "keys"}, `"onOutage": "keys"`, `"onOutage": "refuse"`},
		{[]string{"--token-review", "/etc/other"}, `"/etc/other"`, `"context"`},
		{[]string{"--token-review", "none"}, roleARN("web/*"), "tokenReview"},
		{[]string{"--allow-role", "*"}, `"444455556666"`, roleARN("web/*")},
		{[]string{"--issuer", "https://a", "--issuer", "https://b"}, "https://b", old.Issuer()},
	} {
		s.cli(append([]string{"cluster", "add", cluster, "--replace"}, c.flags...)...)
		if got := described(); !strings.Contains(got, c.has) || strings.Contains(got, c.lack) {
			t.Errorf("%q:\n%s", c.flags, got)
		}
	}
	// What a script gives without its variables is no wish.
	for _, flag := range []string{"--allow-role", "--allow-account", "--agent", "--issuer", "--token-review"} {
		if r := s.try("", "cluster", "add", cluster, "--replace", flag, ""); r.code != 2 {
			t.Errorf("%s with nothing: %+v", flag, r)
		}
	}
	if r := s.try("", "cluster", "add", "new", "--replace", "--region", region, "--account", account); r.code != 2 || !strings.Contains(r.stderr, "give --keys") {
		t.Errorf("a new cluster without keys: %+v", r)
	}
}

// The store has no listener: what the process listens on is the two addresses
// and the admin socket in a directory of its own.
func TestListensOnNothingElse(t *testing.T) {
	t.Parallel()
	s := start(t)
	inodes := map[string]bool{}
	fds := fmt.Sprintf("/proc/%d/fd", s.cmd.Process.Pid)
	entries, err := os.ReadDir(fds)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if l, err := os.Readlink(filepath.Join(fds, e.Name())); err == nil && strings.HasPrefix(l, "socket:[") {
			inodes[strings.Trim(strings.TrimPrefix(l, "socket:"), "[]")] = true
		}
	}
	count := 0
	for _, proto := range []string{"tcp", "tcp6", "udp", "udp6"} {
		for _, f := range table(t, s.cmd.Process.Pid, proto) {
			// Column 3 is the state (0A: listening), 9 the inode.
			if len(f) > 9 && inodes[f[9]] && (f[3] == "0A" || strings.HasPrefix(proto, "udp")) {
				count++
			}
		}
	}
	if count != 2 {
		t.Errorf("%d listening sockets, want the APIs' and the metrics'", count)
	}
	var paths []string
	for _, f := range table(t, s.cmd.Process.Pid, "unix") {
		if len(f) > 7 && inodes[f[6]] && f[3] == "00010000" {
			paths = append(paths, f[7])
		}
	}
	if !slices.Equal(paths, []string{filepath.Join(s.dir, "admin.sock")}) {
		t.Errorf("unix sockets %q, want the admin socket alone", paths)
	}
	if fi, err := os.Stat(s.dir); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("the state directory has mode %v, %v", fi.Mode(), err)
	}
}

func table(t *testing.T, pid int, proto string) [][]string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", pid, proto))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // no IPv6 here
	}
	if err != nil {
		t.Fatal(err)
	}
	var out [][]string
	for line := range strings.Lines(string(b)) {
		out = append(out, strings.Fields(line))
	}
	return out
}
