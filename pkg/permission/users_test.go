// SPDX-License-Identifier: Apache-2.0

package permission_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/permission"
	"github.com/latchkey-dev/latchkey/pkg/sigv4"
)

const usersYAML = `# The users of this server.
users:
  # Who is on call.
  - name: ops
    keys:
      - accessKeyId: LKIAOPS1
        secretAccessKey: the-first-secret-of-ops
      - accessKeyId: LKIAOPS2
        secretAccessKey: the-second-secret-of-ops
        expires: 2027-01-01T00:00:00Z
    permissions:
      - actions: ["*"]
        clusters: ["*"]
        namespaces: ["*"]
        passRoles: ["*"]
  - name: web-team
    keys: [{accessKeyId: LKIAWEB, secretAccessKey: the-secret-of-the-web-team}]
    permissions:
      - actions: ["eks:*PodIdentityAssociation*"]
        clusters: [prod]
        namespaces: [web]
        passRoles: ["arn:aws:iam::111122223333:role/web-*"]
        conditions:
          StringEquals: {aws:RequestTag/team: web}
          StringLike: {aws:RequestTag/stage: [dev-*, test]}
  - name: bare-node-7
    keys: [{accessKeyId: LKIANODE7, secretAccessKey: the-secret-of-node-7}]
    node: {cluster: prod, name: node-7}
`

var now = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)

func write(t testing.TB, path, content string, mode fs.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

func usersFile(t testing.TB) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "users.yaml")
	write(t, path, usersYAML, 0o600)
	return path
}

func TestParse(t *testing.T) {
	users, err := permission.Parse([]byte(usersYAML))
	if err != nil {
		t.Fatal(err)
	}
	if len(users) != 3 || len(users[0].Keys) != 2 || users[2].Node.Name != "node-7" {
		t.Fatalf("got %+v", users)
	}
	if got := users[1].Permissions[0].Conditions["StringEquals"]["aws:RequestTag/team"]; len(got) != 1 || got[0] != "web" {
		t.Errorf("a single value: %q", got)
	}
	for _, empty := range []string{"", "users:", "users: []", "{}", "# nothing\n"} {
		if users, err := permission.Parse([]byte(empty)); err != nil || len(users) != 0 {
			t.Errorf("%q: %v, %v", empty, users, err)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	swap := func(old, new string) string {
		if !strings.Contains(usersYAML, old) {
			t.Fatalf("nothing to replace: %q", old)
		}
		return strings.Replace(usersYAML, old, new, 1)
	}
	for name, c := range map[string]struct{ file, want string }{
		"unknown field":           {swap("        namespaces: [web]", "        namespace: [web]"), "line 21"},
		"misspelt conditions":     {swap("conditions:", "condition:"), "line 23"},
		"unknown field at top":    {"user: []\n", "line 1"},
		"unknown field of a key":  {swap("expires:", "expire:"), "line 10"},
		"unknown field of a node": {swap("name: node-7}", "nodeName: node-7}"), "line 28"},
		"not yaml":                {"users: [", "line 1"},
		"no mapping":              {"- a\n", "line 1"},
		"two documents":           {usersYAML + "---\nusers: []\n", "more than one"},
		"field twice":             {swap("  - name: web-team\n", "  - name: web-team\n    name: ops2\n"), "line 17"},
		"user twice":              {swap("name: web-team", "name: ops"), "line 16"},
		"key twice":               {swap("LKIAWEB", "LKIAOPS1"), "line 16"},
		"key twice with one":      {swap("LKIAOPS2", "LKIAOPS1"), "line 4"},
		"short secret":            {swap("the-secret-of-the-web-team", "short"), "line 16"},
		"secret with a space":     {swap("the-secret-of-the-web-team", "the secret of the web team"), "line 16"},
		"odd access key":          {swap("LKIAWEB", "LKIA/WEB"), "line 16"},
		"no access key":           {swap("accessKeyId: LKIAWEB, ", ""), "line 16"},
		"odd name":                {swap("name: web-team", "name: web:team"), "line 16"},
		"no name":                 {swap("name: web-team", `name: ""`), "line 16"},
		"odd action":              {swap("eks:*PodIdentityAssociation*", "eks:Foo"), "line 16"},
		"no clusters":             {swap("        clusters: [prod]\n", ""), "clusters is missing"},
		"node with permissions":   {usersYAML + "    permissions: [{actions: ['*'], clusters: ['*'], namespaces: ['*']}]\n", "line 26"},
		"node without a cluster":  {swap("cluster: prod, name: node-7", "name: node-7"), "line 26"},
		"number as a name":        {swap("clusters: [prod]", "clusters: {a: b}"), "line 20"},
		"secret as a key":         {swap("[{accessKeyId: LKIAWEB, secretAccessKey: the-secret-of-the-web-team}]", "[the-secret-of-the-web-team]"), "line 17"},
		"secret as an alias":      {swap("secretAccessKey: the-secret-of-the-web-team", "secretAccessKey: *the-secret-of-the-web-team"), "a value"},
		"too large":               {"# " + strings.Repeat("x", permission.MaxFile), "larger"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := permission.Parse([]byte(c.file))
			if !errors.Is(err, permission.ErrFile) {
				t.Fatalf("got %v", err)
			}
			if !strings.Contains(err.Error(), c.want) {
				t.Errorf("%q is not in %q", c.want, err)
			}
			if strings.Contains(err.Error(), "the-sec") || strings.Contains(err.Error(), "of the web") {
				t.Errorf("a secret is in %q", err)
			}
		})
	}
}

func TestLookup(t *testing.T) {
	clock := now
	users, err := permission.Open(permission.Config{Path: usersFile(t), Now: func() time.Time { return clock }})
	if err != nil {
		t.Fatal(err)
	}
	look := func(id, token, secret, name string, want error) {
		t.Helper()
		k, err := users.Lookup(t.Context(), id, token)
		if !errors.Is(err, want) || k.Secret != secret {
			t.Errorf("%s: %q, %v", id, k.Secret, err)
			return
		}
		if p, _ := k.Principal.(permission.Principal); p.Name != name {
			t.Errorf("%s belongs to %q", id, p.Name)
		}
	}
	look("LKIAOPS1", "", "the-first-secret-of-ops", "ops", nil)
	look("LKIAOPS2", "", "the-second-secret-of-ops", "ops", nil)
	look("LKIAWEB", "", "the-secret-of-the-web-team", "web-team", nil)
	look("LKIAWEB", "token", "", "", sigv4.ErrUnknownKey)
	look("LKIANOBODY", "", "", "", sigv4.ErrUnknownKey)
	look("", "", "", "", sigv4.ErrUnknownKey)
	clock = time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)
	look("LKIAOPS2", "", "the-second-secret-of-ops", "ops", sigv4.ErrExpiredKey)
	look("LKIAOPS1", "", "the-first-secret-of-ops", "ops", nil)

	k, err := users.Lookup(t.Context(), "LKIANODE7", "")
	if p, _ := k.Principal.(permission.Principal); err != nil || p.Node == nil || *p.Node != (permission.Node{Cluster: "prod", Name: "node-7"}) {
		t.Errorf("the node: %+v, %v", k.Principal, err)
	}
}

// A file that cannot be used changes nothing, and is reported once.
func TestReloadKeepsTheLastGoodFile(t *testing.T) {
	path := usersFile(t)
	var log bytes.Buffer
	users, err := permission.Open(permission.Config{Path: path, Now: func() time.Time { return now }, Log: slog.New(slog.NewTextHandler(&log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	there := func(id string) bool { _, err := users.Lookup(t.Context(), id, ""); return err == nil }
	for name, spoil := range map[string]func(){
		"broken":         func() { write(t, path, "users: [", 0o600) },
		"unknown field":  func() { write(t, path, usersYAML+"more: 1\n", 0o600) },
		"writable":       func() { write(t, path, "users: []\n", 0o666) },
		"group-writable": func() { write(t, path, "users: []\n", 0o620) },
		"gone":           func() { os.Remove(path) },
		"a directory":    func() { os.Remove(path); os.Mkdir(path, 0o700) },
	} {
		log.Reset()
		spoil()
		for range 3 {
			if err := users.Reload(); err == nil {
				t.Errorf("%s: no error", name)
			}
		}
		if s := users.Status(); s.Err == nil || s.Users != 3 || s.Keys != 4 || !there("LKIAWEB") {
			t.Errorf("%s: %+v", name, s)
		}
		if n := strings.Count(log.String(), "level=ERROR"); n != 1 {
			t.Errorf("%s: reported %d times: %s", name, n, log.String())
		}
		os.RemoveAll(path)
		// The same content as before: good again all the same.
		write(t, path, usersYAML, 0o600)
		if err := users.Reload(); err != nil || users.Status().Err != nil {
			t.Errorf("after %s: %v", name, err)
		}
	}
	write(t, path, strings.ReplaceAll(usersYAML, "LKIAWEB", "LKIANEW"), 0o600)
	if err := users.Reload(); err != nil || there("LKIAWEB") || !there("LKIANEW") {
		t.Errorf("a new key: %v", err)
	}
	write(t, path, "users: []\n", 0o600)
	if err := users.Reload(); err != nil || there("LKIANEW") || users.Status().Users != 0 {
		t.Errorf("no users: %v", err)
	}
	if strings.Contains(log.String(), "secret-of") {
		t.Error("a secret is in the log")
	}
}

// A change is told with the names that it is about, once, and without secrets.
func TestChangesAreTold(t *testing.T) {
	path := usersFile(t)
	var told []permission.Change
	users, err := permission.Open(permission.Config{Path: path, Changed: func(c permission.Change) { told = append(told, c) }})
	if err != nil {
		t.Fatal(err)
	}
	user := func(name, secret, actions string) string {
		return "- {name: " + name + ", keys: [{accessKeyId: LK" + name + ", secretAccessKey: " + secret + "}], permissions: [{actions: [" + actions + "], clusters: [a], namespaces: [b]}]}\n"
	}
	for _, c := range []struct {
		name, text string
		want       *permission.Change
	}{
		{"others", "users:\n" + user("one", "secret-of-one-0000", "'*'") + user("two", "secret-of-two-0000", "'*'"), nil},
		{"the same, written otherwise", "# again\nusers:\n" + user("one", "secret-of-one-0000", `"*"`) + user("two", "secret-of-two-0000", "'*'"), nil},
		{"more rights, and one gone", "users:\n" + user("one", "secret-of-one-0000", "'*', 'eks:*'") + user("three", "secret-of-three-00", "'*'"),
			&permission.Change{Users: 2, Keys: 2, Added: []string{"three"}, Removed: []string{"two"}, Changed: []string{"one"}}},
		{"another secret", "users:\n" + user("one", "secret-of-another-one", "'*', 'eks:*'") + user("three", "secret-of-three-00", "'*'"),
			&permission.Change{Users: 2, Keys: 2, Changed: []string{"one"}}},
	} {
		told = nil
		write(t, path, c.text, 0o600)
		for range 2 {
			if err := users.Reload(); err != nil {
				t.Fatal(err)
			}
		}
		if c.name == "others" {
			continue // all three of the file before are gone
		}
		if c.want == nil && len(told) > 0 || c.want != nil && (len(told) != 1 || !reflect.DeepEqual(told[0], *c.want)) {
			t.Errorf("%s: %+v, want %+v", c.name, told, c.want)
		}
	}
}

func TestRunFollowsTheFile(t *testing.T) {
	path := usersFile(t)
	users, err := permission.Open(permission.Config{Path: path, Interval: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- users.Run(ctx) }()
	if err := permission.Remove(path, "web-team"); err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := users.Lookup(ctx, "LKIAWEB", ""); err != nil {
			break
		}
		time.Sleep(time.Millisecond)
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestOpenNeedsAUsableFile(t *testing.T) {
	path := usersFile(t)
	if _, err := permission.Open(permission.Config{Path: path + ".not"}); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	write(t, path, "users: [", 0o600)
	if _, err := permission.Open(permission.Config{Path: path}); !errors.Is(err, permission.ErrFile) {
		t.Error(err)
	}
}

func TestWarnsOfAFileThatOthersRead(t *testing.T) {
	path := usersFile(t)
	var log bytes.Buffer
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	users, err := permission.Open(permission.Config{Path: path, Log: slog.New(slog.NewTextHandler(&log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	_ = users.Reload()
	if n := strings.Count(log.String(), "can be read by others"); n != 1 {
		t.Errorf("warned %d times: %s", n, log.String())
	}
}

func TestEdit(t *testing.T) {
	path := filepath.Join(t.TempDir(), "users.yaml")
	if users, err := permission.List(path); err != nil || len(users) != 0 {
		t.Fatalf("no file: %v, %v", users, err)
	}
	user := permission.User{Name: "new", Keys: []permission.AccessKey{permission.NewAccessKey()}, Permissions: all1(everything)}
	if err := permission.Add(path, user); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if err := permission.Add(path, user); !errors.Is(err, permission.ErrUserExists) {
		t.Errorf("twice: %v", err)
	}
	users, err := permission.Open(permission.Config{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	if k, err := users.Lookup(t.Context(), user.Keys[0].ID, ""); err != nil || k.Secret != user.Keys[0].Secret {
		t.Error(err)
	}

	// What somebody wrote by hand stays as it is.
	write(t, path, usersYAML, 0o600)
	if err := permission.Add(path, user); err != nil {
		t.Fatal(err)
	}
	key := permission.NewAccessKey()
	key.Expires = now
	if err := permission.AddKey(path, "web-team", key); err != nil {
		t.Fatal(err)
	}
	b, _ := os.ReadFile(path)
	for _, want := range []string{"# The users of this server.", "# Who is on call.", key.ID, user.Keys[0].ID} {
		if !strings.Contains(string(b), want) {
			t.Errorf("%q is not in\n%s", want, b)
		}
	}
	list, err := permission.List(path)
	if err != nil || len(list) != 4 || len(list[1].Keys) != 2 || !list[1].Keys[1].Expires.Equal(now) {
		t.Fatalf("%+v, %v", list, err)
	}
	if err := permission.RemoveKey(path, "LKIAWEB"); err != nil {
		t.Error(err)
	}
	if err := permission.Remove(path, "ops"); err != nil {
		t.Error(err)
	}
	if list, err = permission.List(path); err != nil || len(list) != 3 || list[0].Name != "web-team" || len(list[0].Keys) != 1 || list[0].Keys[0].ID != key.ID {
		t.Errorf("%+v, %v", list, err)
	}
	for name, err := range map[string]error{
		"remove":     permission.Remove(path, "ops"),
		"add key":    permission.AddKey(path, "ops", key),
		"remove key": permission.RemoveKey(path, "LKIAWEB"),
	} {
		if !errors.Is(err, permission.ErrNoUser) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Neither a user that would be refused, nor a file that is not understood.
	before, _ := os.ReadFile(path)
	if err := permission.Add(path, permission.User{Name: "bad name"}); !errors.Is(err, permission.ErrFile) {
		t.Error(err)
	}
	if after, _ := os.ReadFile(path); !bytes.Equal(before, after) {
		t.Error("the file changed")
	}
	write(t, path, "users: [{name: x, what: y}]\n", 0o600)
	if err := permission.Add(path, user); !errors.Is(err, permission.ErrFile) {
		t.Error(err)
	}
	if entries, _ := os.ReadDir(filepath.Dir(path)); len(entries) != 2 {
		t.Errorf("left behind: %v", entries)
	}
}

func TestEditsAtOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "users.yaml")
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			if err := permission.Add(path, permission.User{Name: fmt.Sprintf("u%d", i), Keys: []permission.AccessKey{permission.NewAccessKey()}}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if users, err := permission.List(path); err != nil || len(users) != 8 {
		t.Errorf("%d users, %v", len(users), err)
	}
}

func TestKeysPrintNoSecret(t *testing.T) {
	key := permission.NewAccessKey()
	user := permission.User{Name: "u", Keys: []permission.AccessKey{key}}
	b, err := json.Marshal(user)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{string(b), fmt.Sprint(user), fmt.Sprintf("%+v", user), fmt.Sprintf("%#v", user), fmt.Sprint(key), fmt.Sprintf("%#v", key)} {
		if strings.Contains(s, key.Secret) {
			t.Errorf("the secret is in %s", s)
		}
		if !strings.Contains(s, key.ID) {
			t.Errorf("the key's ID is not in %s", s)
		}
	}
	if other := permission.NewAccessKey(); other.ID == key.ID || other.Secret == key.Secret || len(key.Secret) < 40 || len(key.ID) != 20 {
		t.Errorf("keys %v and %v", key, other)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(usersYAML))
	f.Add([]byte("users: [{name: x, keys: [{accessKeyId: ABCD, secretAccessKey: aaaaaaaaaaaaaaaaaaaa}]}]"))
	f.Add([]byte("a: &a [*a]"))
	f.Fuzz(func(t *testing.T, b []byte) {
		users, err := permission.Parse(b)
		if err != nil {
			if !errors.Is(err, permission.ErrFile) {
				t.Errorf("%v is no ErrFile", err)
			}
			return
		}
		for _, u := range users {
			for _, k := range u.Keys {
				if len(k.Secret) < permission.MinSecret {
					t.Errorf("a secret of %d bytes", len(k.Secret))
				}
			}
		}
	})
}

// Who edits the file as root must not take it from the server.
func TestEditKeepsOwnerAndMode(t *testing.T) {
	path := usersFile(t)
	before, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	want := *before.Sys().(*syscall.Stat_t)
	if os.Geteuid() == 0 {
		if err := os.Chown(path, 12345, 12346); err != nil {
			t.Fatal(err)
		}
		want.Uid, want.Gid = 12345, 12346
	}
	if err := os.Chmod(path, 0o640); err != nil {
		t.Fatal(err)
	}
	if err := permission.Remove(path, "ops"); err != nil {
		t.Fatal(err)
	}
	after, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	got := after.Sys().(*syscall.Stat_t)
	if got.Uid != want.Uid || got.Gid != want.Gid || after.Mode().Perm() != 0o640 {
		t.Errorf("owner %d:%d, mode %v; want %d:%d", got.Uid, got.Gid, after.Mode(), want.Uid, want.Gid)
	}
}

// A symbolic link, as Kubernetes mounts files, is followed and not replaced.
func TestEditFollowsLinks(t *testing.T) {
	path := usersFile(t)
	link := filepath.Join(t.TempDir(), "users.yaml")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	if err := permission.Remove(link, "ops"); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Lstat(link); err != nil || info.Mode()&fs.ModeSymlink == 0 {
		t.Errorf("the link is gone: %v, %v", info, err)
	}
	if users, err := permission.List(path); err != nil || len(users) != 2 {
		t.Errorf("%d users, %v", len(users), err)
	}
}
