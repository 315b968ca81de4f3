// SPDX-License-Identifier: Apache-2.0

package adminsocket

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The directory and the socket are their owner's alone, and the daemon is told
// who asks.
func TestListenAndAsk(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "d", "a.sock")
	ln, err := Listen(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]os.FileMode{path: 0o600, filepath.Dir(path): 0o700} {
		fi, err := os.Stat(name)
		if err != nil || fi.Mode().Perm() != want {
			t.Errorf("%s: %v, %v", name, fi.Mode(), err)
		}
	}
	type key struct{}
	server := &http.Server{
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, key{}, c.(Conn).UID)
		},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.Context().Value(key{})) }),
	}
	go func() { _ = server.Serve(ln) }()
	defer server.Close()
	client := http.Client{Transport: Transport(path)}
	res, err := client.Get("http://anything/")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if got, err := io.ReadAll(res.Body); err != nil || string(got) != fmt.Sprint(os.Geteuid()) {
		t.Errorf("%q, %v", got, err)
	}

	if _, err := Listen(t.Context(), path); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), path) {
		t.Errorf("a second one: %v", err)
	}
	server.Close()
	if _, err := client.Get("http://anything/"); !NobodyListens(err) || Forbidden(err) {
		t.Errorf("after the end: %v", err)
	}
}

// What a killed daemon leaves is replaced, and nothing else is.
func TestWhatIsThereAlready(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "a.sock")
	left, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	left.SetUnlinkOnClose(false)
	left.Close()
	if _, err := (&http.Client{Transport: Transport(path)}).Get("http://anything/"); !NobodyListens(err) {
		t.Errorf("a socket left behind: %v", err)
	}
	ln, err := Listen(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	ln.Close()

	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(t.Context(), path); err == nil || errors.Is(err, ErrInUse) {
		t.Errorf("a file: %v", err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "precious" {
		t.Errorf("the file: %q, %v", b, err)
	}
}

func TestLongPath(t *testing.T) {
	t.Parallel()
	for n, want := range map[int]bool{maxPath: true, maxPath + 1: false} {
		if err := CheckPath("/" + strings.Repeat("a", n-1)); (err == nil) != want {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
	dir := filepath.Join(t.TempDir(), strings.Repeat("a", maxPath))
	if _, err := Listen(t.Context(), filepath.Join(dir, "a.sock")); err == nil {
		t.Error("made")
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("something was made: %v", err)
	}
}
