// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"
	"sigs.k8s.io/yaml"

	"github.com/latchkey-dev/latchkey/pkg/commandline"
)

// Output formats.
const (
	formatTable = "table"
	formatWide  = "wide"
	formatJSON  = "json"
	formatYAML  = "yaml"
)

var formats = []string{formatTable, formatWide, formatJSON, formatYAML}

func (c *cli) checkFormat() error {
	if !slices.Contains(formats, c.format) {
		return commandline.UsageError{Err: fmt.Errorf("unknown output format %q: use table, wide, json or yaml", c.format)}
	}
	return nil
}

func (c *cli) wide() bool { return c.format == formatWide }

// print writes v for scripts, or lets a person's table be written.
func (c *cli) print(v any, people func() error) error {
	switch c.format {
	case formatJSON:
		enc := json.NewEncoder(c.out)
		enc.SetIndent("", "  ")
		enc.SetEscapeHTML(false)
		return enc.Encode(v)
	case formatYAML:
		text, err := yaml.Marshal(v)
		if err != nil {
			return err
		}
		_, err = c.out.Write(text)
		return err
	}
	return people()
}

// colour is an SGR parameter.
type colour string

const (
	plain  colour = ""
	red    colour = "31"
	green  colour = "32"
	yellow colour = "33"
	bold   colour = "1"
	dim    colour = "2"
)

// colourful: a person looks, and has not said that colour is in the way
// (no-color.org).
func colourful(out io.Writer) bool {
	return os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb" && terminal(out)
}

func terminal(out io.Writer) bool {
	f, ok := out.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

func (c *cli) paint(text string, col colour) string {
	if !c.colour || col == plain || text == "" {
		return text
	}
	return "\x1b[" + string(col) + "m" + text + "\x1b[0m"
}

// table is columns of text. It measures once and writes once, since a node can
// have thousands of rows.
type table struct {
	head []string
	rows [][]string
	// widths are the columns' at least, and what they were once written: what
	// goes on below stays in line.
	widths []int
	colour func(column int, text string) colour
}

func (t *table) add(cells ...string) {
	for i, cell := range cells {
		cells[i] = printable(cell)
	}
	t.rows = append(t.rows, cells)
}

func (c *cli) write(t *table) error {
	columns := len(t.head)
	for _, r := range t.rows {
		columns = max(columns, len(r))
	}
	widths := make([]int, columns)
	copy(widths, t.widths)
	for _, r := range append([][]string{t.head}, t.rows...) {
		for i, cell := range r {
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	t.widths = widths
	w := bufio.NewWriterSize(c.out, 64<<10)
	line := func(r []string, paint func(int, string) colour) {
		for i, cell := range r {
			text := cell
			if paint != nil {
				text = c.paint(cell, paint(i, cell))
			}
			w.WriteString(text)
			if i < len(r)-1 {
				for range widths[i] - utf8.RuneCountInString(cell) + 2 {
					w.WriteByte(' ')
				}
			}
		}
		w.WriteByte('\n')
	}
	if len(t.head) > 0 {
		line(t.head, func(int, string) colour { return bold })
	}
	for _, r := range t.rows {
		line(r, t.colour)
	}
	return w.Flush()
}

// printable keeps what others named from moving the cursor.
func printable(s string) string {
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return strings.Map(func(r rune) rune {
				if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 || r == 0x2028 || r == 0x2029 || r >= 0x200e && r <= 0x200f ||
					r >= 0x202a && r <= 0x202e || r >= 0x2066 && r <= 0x2069 {
					return '?'
				}
				return r
			}, s)
		}
	}
	return s
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// qualified is a name with its namespace, where there is one.
func qualified(namespace, name string) string {
	if name == "" {
		return "-"
	}
	return namespace + "/" + name
}

// short is a duration as people say it.
func short(d time.Duration) string {
	switch d = d.Round(time.Second); {
	case d < 2*time.Minute:
		return d.String()
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh%dm", int(d.Hours()), int(d.Minutes())%60)
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}

func (c *cli) until(t *time.Time) string {
	if t == nil {
		return "-"
	}
	d := t.Sub(c.now())
	if d <= 0 {
		return "expired"
	}
	return short(d)
}

func (c *cli) ago(t *time.Time) string {
	if t == nil || t.IsZero() {
		return "-"
	}
	return short(max(0, c.now().Sub(*t))) + " ago"
}

// roleName is the last part of a role's ARN; the whole is in -o wide and json.
func roleName(arn string) string {
	if _, name, ok := strings.Cut(arn, ":role/"); ok {
		return name
	}
	if _, name, ok := strings.Cut(arn, ":assumed-role/"); ok {
		role, _, _ := strings.Cut(name, "/")
		return role
	}
	return arn
}
