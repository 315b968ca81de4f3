// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

// generated makes the reference in a directory: Markdown there, man pages in
// man/.
func generated(t *testing.T, dir string) {
	t.Helper()
	root := newRoot(io.Discard, time.Now)
	root.DisableAutoGenTag = true
	root.InitDefaultCompletionCmd()
	for _, c := range root.Commands() {
		if c.Name() == "completion" {
			// Its help is cobra's own, a page for each shell.
			c.Hidden = true
		}
	}
	hideHelpFlag(root)
	man := filepath.Join(dir, "man")
	if err := os.MkdirAll(man, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := doc.GenMarkdownTree(root, dir); err != nil {
		t.Fatal(err)
	}
	// A date would make each day's page another one.
	epoch := time.Unix(0, 0).UTC()
	if err := doc.GenManTree(root, &doc.GenManHeader{Section: "8", Source: "Latchkey", Manual: "Latchkey", Date: &epoch}, man); err != nil {
		t.Fatal(err)
	}
}

func hideHelpFlag(c *cobra.Command) {
	c.InitDefaultHelpFlag()
	c.InitDefaultVersionFlag()
	for _, sub := range c.Commands() {
		hideHelpFlag(sub)
	}
}

// The reference in docs/cli is what the commands say of themselves.
// LATCHKEY_UPDATE=1 writes it anew.
func TestReferenceIsCurrent(t *testing.T) {
	const committed = "../../docs/cli"
	if os.Getenv("LATCHKEY_UPDATE") != "" {
		generated(t, committed)
		return
	}
	fresh := t.TempDir()
	generated(t, fresh)
	list := func(dir string) map[string][]byte {
		out := map[string][]byte{}
		err := filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
			if err != nil || e.IsDir() {
				return err
			}
			text, err := os.ReadFile(path)
			name, _ := filepath.Rel(dir, path)
			out[name] = text
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	want, got := list(fresh), list(committed)
	if len(want) < 20 {
		t.Fatalf("only %d pages were made", len(want))
	}
	for name, text := range want {
		if !bytes.Equal(got[name], text) {
			t.Errorf("docs/cli/%s is not current: run LATCHKEY_UPDATE=1 go test ./cmd/latchkey -run Reference", name)
		}
	}
	for name := range got {
		if want[name] == nil {
			t.Errorf("docs/cli/%s belongs to no command: remove it", name)
		}
	}
	for name, text := range want {
		if strings.HasSuffix(name, ".md") && bytes.Contains(text, []byte(reachVerb)) {
			t.Errorf("%s tells of what is for the program itself", name)
		}
	}
}
