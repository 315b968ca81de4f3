// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"

	"github.com/latchkey-dev/latchkey/pkg/adminapi"
	"github.com/latchkey-dev/latchkey/pkg/explain"
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
	if err := os.WriteFile(filepath.Join(dir, "json.md"), []byte(scriptNames()), 0o644); err != nil {
		t.Fatal(err)
	}
	// A date would make each day's page another one.
	epoch := time.Unix(0, 0).UTC()
	if err := doc.GenManTree(root, &doc.GenManHeader{Section: "8", Source: "Latchkey", Manual: "Latchkey", Date: &epoch}, man); err != nil {
		t.Fatal(err)
	}
}

// scriptNames lists what scripts find in the JSON of each verb.
func scriptNames() string {
	var b strings.Builder
	b.WriteString("# What -o json holds\n\n" +
		"Written from the code, as the commands' pages are. Scripts may rely on these names: within a major version names are added, and none is\n" +
		"renamed or removed. A name that is not always there has a `?`: nothing is known, or it would be empty, zero or false. Times are RFC 3339,\n" +
		"in UTC or with an offset. With `--watch` each line is one of the list's elements. `-o yaml` has the same names.\n")
	for _, verb := range []struct {
		name string
		of   any
	}{
		{"pods", adminapi.Pods{}}, {"explain", explain.Explanation{}}, {"whois", adminapi.Whois{}}, {"denials", adminapi.Denials{}}, {"cache", adminapi.Cache{}},
		{"cache drop, cache refresh", adminapi.CacheChange{}}, {"token", tokenReport{}}, {"bpf", bpfReport{}}, {"doctor", doctorReport{}},
		{"log-level", adminapi.LogLevels{}}, {"status", adminapi.Status{}},
	} {
		b.WriteString("\n## " + verb.name + "\n\n| name | type |\n|---|---|\n")
		namesOf(&b, reflect.TypeOf(verb.of), "")
	}
	return b.String()
}

// namesOf writes a row for each name of a struct, and of what is in it.
func namesOf(b *strings.Builder, typ reflect.Type, prefix string) {
	for i := range typ.NumField() {
		f := typ.Field(i)
		if !f.IsExported() {
			continue
		}
		name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		if name == "" {
			name = "**" + f.Name + " has no name**"
		}
		sometimes := ""
		if options != "" {
			sometimes = "?"
		}
		at, kind := prefix+name, f.Type
		for {
			switch {
			case kind == reflect.TypeFor[time.Time]():
			case kind.Kind() == reflect.Pointer:
				kind = kind.Elem()
				continue
			case kind.Kind() == reflect.Slice:
				at, kind = at+"[]", kind.Elem()
				continue
			case kind.Kind() == reflect.Map:
				at, kind = at+".*", kind.Elem()
				continue
			}
			break
		}
		word := "number"
		switch {
		case kind == reflect.TypeFor[time.Time]():
			word = "time"
		case kind.Kind() == reflect.Struct:
			word = "object"
		case kind.Kind() == reflect.String:
			word = "text"
		case kind.Kind() == reflect.Bool:
			word = "true or false"
		}
		fmt.Fprintf(b, "| `%s`%s | %s |\n", at, sometimes, word)
		if word == "object" {
			namesOf(b, kind, at+".")
		}
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
		if bytes.Contains(text, []byte("has no name")) {
			t.Errorf("%s: a field without a name in JSON", name)
		}
		if strings.HasSuffix(name, ".md") && bytes.Contains(text, []byte(reachVerb)) {
			t.Errorf("%s tells of what is for the program itself", name)
		}
	}
}
