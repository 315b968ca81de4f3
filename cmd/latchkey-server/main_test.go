// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/latchkey-dev/latchkey/pkg/commandline"
	"github.com/latchkey-dev/latchkey/pkg/permission"
	"github.com/latchkey-dev/latchkey/pkg/server"
)

// command finds a command below the root.
func command(t *testing.T, path ...string) *cobra.Command {
	t.Helper()
	cmd, _, err := newRoot(strings.NewReader(""), &bytes.Buffer{}, &bytes.Buffer{}).Find(path)
	if err != nil {
		t.Fatal(err)
	}
	return cmd
}

func TestApplyFile(t *testing.T) {
	write := func(text string) string {
		file := filepath.Join(t.TempDir(), "server.yaml")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	serve := command(t, "serve")
	if err := serve.ParseFlags([]string{"--listen", "127.0.0.1:1"}); err != nil {
		t.Fatal(err)
	}
	clusters, err := applyFile(serve, write(`
listen: 127.0.0.1:2
session-duration: 30m
insecure-http: true
store-quota: 1000000
metrics-address: ""
state-dir: /x
clusters: [{name: a, region: r}]
`))
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"listen": "127.0.0.1:1", "session-duration": "30m0s", "insecure-http": "true", "store-quota": "1000000", "metrics-address": "", "state-dir": "/x",
	} {
		if got := serve.Flags().Lookup(name).Value.String(); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	if len(clusters) != 1 || clusters[0].Name != "a" {
		t.Errorf("clusters %+v", clusters)
	}
	for name, text := range map[string]string{
		"unknown": "listn: x", "not a flag of its own": "config: x", "a list": "listen: [a]", "nothing": "listen:", "twice": "listen: a\nlisten: b",
		"no duration": "session-duration: soon", "a member of a cluster": "clusters: [{nam: a}]", "no YAML": "a: [", "no mapping": "- a",
	} {
		if _, err := applyFile(command(t, "serve"), write(text)); !errors.Is(err, server.ErrConfig) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What makes no sense is refused before anybody is asked.
func TestUsage(t *testing.T) {
	dir := t.TempDir()
	for _, line := range []string{
		"frobnicate", "serve extra", "cluster add", "cluster add a b", "cluster add a", "cluster add a --keys x --keys-from-kubeconfig y",
		"cluster add a --keys x --context y",
		"cluster add a --keys x --token-review-outage keys", "cluster add a --keys x --token-review-context y", "cluster add --file f --allow-role r", "cluster add --file f --tag a=b",
		"cluster list -o xml", "association create -c a", "association describe -c a", "association describe -c a -n b", "association describe -c a -n b -s c --id d",
		"association update -c a --id b", "association list", "user add", "user add a --node b", "user add a --node b/c --cluster d", "status --verbose", "-v loud serve",
	} {
		var out bytes.Buffer
		root := newRoot(strings.NewReader(""), &out, &out)
		root.SetArgs(append(strings.Fields(line), "--state-dir", dir))
		err := root.Execute()
		var usage commandline.UsageError
		if !errors.As(err, &usage) || exitCode(err) != exitUsage {
			t.Errorf("%s: %v", line, err)
		}
	}
}

// With a file, a name may be given and must be the file's.
func TestClusterOfAFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "cluster.yaml")
	text := "name: a\nregion: us-west-2\naccount: \"111122223333\"\nissuers: [i]\nkeys: |\n  -----BEGIN PUBLIC KEY-----\n" +
		"  MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEfQD2P0LvtkJUL6Uc9NuvDuTXSdL3\n  B49gTcDf3HCwV3CzzRieyXXD5n6WYRRsgMBxkm7Cu1AN7WmyCGnwmZpzlw==\n  -----END PUBLIC KEY-----\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for line, want := range map[string]int{"cluster add -f": exitFailed, "cluster add a -f": exitFailed, "cluster add b -f": exitUsage, "cluster add a b -f": exitUsage} {
		root := newRoot(strings.NewReader(""), &bytes.Buffer{}, &bytes.Buffer{})
		root.SetArgs(append(strings.Fields(line), file, "--state-dir", t.TempDir()))
		// All that is right ends at the server, which does not run.
		if err := root.Execute(); exitCode(err) != want || want == exitFailed && !errors.Is(err, server.ErrNoServer) {
			t.Errorf("%s: %v", line, err)
		}
	}
}

// A limited user gets the roles that it is given, and no others.
func TestUserAdd(t *testing.T) {
	dir := t.TempDir()
	for line, want := range map[string][]string{
		"admin":                                       {"*"},
		"reader --action eks:List*":                   nil,
		"web --cluster prod --namespace web":          nil,
		"api --namespace web --pass-role a:b:c:d:e:f": {"a:b:c:d:e:f"},
		"any --namespace web --pass-role *":           {"*"},
	} {
		root := newRoot(strings.NewReader(""), &bytes.Buffer{}, &bytes.Buffer{})
		root.SetArgs(append(append([]string{"user", "add"}, strings.Fields(line)...), "--state-dir", dir))
		if err := root.Execute(); err != nil {
			t.Fatal(err)
		}
		users, err := permission.List(filepath.Join(dir, "users.yaml"))
		if err != nil {
			t.Fatal(err)
		}
		u := users[len(users)-1]
		if got := u.Permissions[0].PassRoles; !slices.Equal(got, want) {
			t.Errorf("%s: roles %q, want %q", line, got, want)
		}
	}
}

// A person reads the same each time, and what holds where nothing is said.
func TestPrintCluster(t *testing.T) {
	for range 20 {
		var out bytes.Buffer
		printCluster(&out, server.ClusterSpec{Name: "prod", Account: "111122223333", Tags: map[string]string{"a": "1", "b": "2", "c": "3"}})
		if text := out.String(); !strings.Contains(text, "agents\tkube-system/latchkey-agent\ntag\ta=1\ntag\tb=2\ntag\tc=3\n") {
			t.Fatal(text)
		}
	}
}

func TestCompletion(t *testing.T) {
	dir := t.TempDir()
	if err := permission.Add(filepath.Join(dir, "users.yaml"), permission.User{Name: "web-team", Keys: []permission.AccessKey{permission.NewAccessKey()}}); err != nil {
		t.Fatal(err)
	}
	for line, want := range map[string]string{
		"user remove": "web-team", "user rotate-key": "web-team", "user remove web-team": "", "status -v": "debug", "status -o": "yaml",
		"cluster add a --token-review-outage": "keys", "serve --node-binding": "prefer",
		"cluster remove": "", // nobody to ask
	} {
		var out bytes.Buffer
		root := newRoot(strings.NewReader(""), &out, &out)
		root.SetArgs(append(append([]string{"__complete", "--state-dir", dir}, strings.Fields(line)...), ""))
		if err := root.Execute(); err != nil {
			t.Fatal(err)
		}
		if got := out.String(); !strings.Contains(got, want) || want == "" && !strings.HasPrefix(got, ":4") {
			t.Errorf("%s: %q, want %q", line, got, want)
		}
	}
}

// A server that is still starting accepts and does not answer yet.
func TestServerThatStarts(t *testing.T) {
	dir, err := os.MkdirTemp("", "lks-") // a path that is short enough for a socket
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	ln, err := net.Listen("unix", filepath.Join(dir, "admin.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	var errOut bytes.Buffer
	root := newRoot(strings.NewReader(""), &bytes.Buffer{}, &errOut)
	root.SetArgs([]string{"user", "add", "early", "--state-dir", dir})
	if err := root.Execute(); err != nil {
		t.Fatal(err)
	}
	users, err := permission.List(filepath.Join(dir, "users.yaml"))
	if err != nil || len(users) != 1 || !strings.Contains(errOut.String(), "the server has not read the users file") {
		t.Errorf("%+v, %v, said %q", users, err, errOut.String())
	}
}

func TestNoServer(t *testing.T) {
	var out bytes.Buffer
	root := newRoot(strings.NewReader(""), &out, &out)
	root.SetArgs([]string{"status", "--state-dir", t.TempDir()})
	err := root.Execute()
	if !errors.Is(err, server.ErrNoServer) || exitCode(err) != exitFailed {
		t.Errorf("%v", err)
	}
}

// Every command says what it does, and every flag.
func TestHelp(t *testing.T) {
	var walk func(*cobra.Command)
	walk = func(cmd *cobra.Command) {
		if cmd.Short == "" {
			t.Errorf("%s has no description", cmd.CommandPath())
		}
		for _, c := range cmd.Commands() {
			walk(c)
		}
	}
	walk(newRoot(strings.NewReader(""), &bytes.Buffer{}, &bytes.Buffer{}))
}
