// SPDX-License-Identifier: Apache-2.0

// Package presubmit holds the rules of this repository that no general linter
// knows: each is a test over the source tree, and says what to do about what it
// found.
package presubmit

import (
	"bufio"
	"bytes"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
)

const module = "github.com/latchkey-dev/latchkey"

// root is the repository, seen from this package's directory, where `go test`
// runs it.
const root = "../.."

// files lists the repository's own files, by slash-separated paths.
func files(t *testing.T) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, p)
		if err != nil {
			return err
		}
		rel = filepath.ToSlash(rel)
		if d.IsDir() {
			switch {
			case d.Name() == "node_modules", rel == ".git", rel == "bin", rel == "dist", rel == ".cache":
				return filepath.SkipDir
			}
			return nil
		}
		if d.Type().IsRegular() {
			out = append(out, rel)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(out) < 20 {
		t.Fatalf("only %d files below %s: this test looks in the wrong place", len(out), root)
	}
	return out
}

func read(t *testing.T, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, filepath.FromSlash(name)))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func testdata(name string) bool { return strings.Contains("/"+name, "/testdata/") }

func generated(b []byte) bool { return bytes.HasPrefix(b, []byte("// Code generated ")) }

// goFile is a parsed source file that somebody wrote.
type goFile struct {
	name string
	ast  *ast.File
	fset *token.FileSet
}

func (f goFile) dir() string { return path.Dir(f.name) }
func (f goFile) test() bool  { return strings.HasSuffix(f.name, "_test.go") }
func (f goFile) pkg() bool   { return strings.HasPrefix(f.name, "pkg/") }
func (f goFile) at(n ast.Node) string {
	return f.name + ":" + strconv.Itoa(f.fset.Position(n.Pos()).Line)
}

// goFiles parses the tree once for all tests.
func goFiles(t *testing.T) []goFile {
	t.Helper()
	parsing.Do(func() { parsed = parseGo(t) })
	if len(parsed) == 0 {
		t.Fatal("no Go file could be parsed")
	}
	return parsed
}

var (
	parsing sync.Once
	parsed  []goFile
)

func parseGo(t *testing.T) []goFile {
	t.Helper()
	var out []goFile
	for _, name := range files(t) {
		if path.Ext(name) != ".go" || testdata(name) {
			continue
		}
		b := read(t, name)
		if generated(b) {
			continue
		}
		fset := token.NewFileSet()
		f, err := parser.ParseFile(fset, name, b, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			t.Errorf("parse: %v", err)
			continue
		}
		out = append(out, goFile{name, f, fset})
	}
	return out
}

// Every source file says under which licence it is, in its first lines.
func TestLicenceLines(t *testing.T) {
	source := map[string]bool{".go": true, ".c": true, ".h": true, ".sh": true, ".mjs": true, ".js": true}
	for _, name := range files(t) {
		if testdata(name) {
			continue
		}
		b := read(t, name)
		base := path.Base(name)
		script := bytes.HasPrefix(b, []byte("#!"))
		if !source[path.Ext(name)] && !script && base != "Makefile" && base != "Dockerfile" {
			continue
		}
		if generated(b) {
			continue
		}
		want := "SPDX-License-Identifier: Apache-2.0"
		// The kernel asks for a licence compatible with its own, for the
		// helpers that it gives to such programs only.
		if strings.HasPrefix(name, "bpf/") && path.Ext(name) != ".go" {
			want = "SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause"
		}
		lines := bytes.SplitN(b, []byte("\n"), 6)
		if !bytes.Contains(bytes.Join(lines[:min(5, len(lines))], []byte("\n")), []byte(want)) {
			t.Errorf("%s: no line %q among its first five", name, want)
		}
	}
}

// The tree does not know on whose machine it lies.
func TestNoPathOfOneMachine(t *testing.T) {
	// In pieces, or this file would find itself.
	machine := regexp.MustCompile(`(^|[^A-Za-z0-9_.\-/])/(wo` + `rk|ho` + `me/[a-z]|Us` + `ers/[A-Za-z]|tm` + `p/)`)
	download := regexp.MustCompile(`"reso` + `lved": *"http`)
	for _, name := range files(t) {
		// A runtime's mount table or a cgroup path may name anything.
		if testdata(name) || path.Ext(name) == ".o" {
			continue
		}
		s := bufio.NewScanner(bytes.NewReader(read(t, name)))
		s.Buffer(nil, 16<<20)
		for line := 1; s.Scan(); line++ {
			if machine.Match(s.Bytes()) {
				t.Errorf("%s:%d names a path of one machine; use a directory that the caller gives: %s", name, line, strings.TrimSpace(s.Text()))
			}
			if download.Match(s.Bytes()) {
				t.Errorf("%s:%d names a download address; leave that to the client's configuration", name, line)
			}
		}
		if err := s.Err(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A package is named after what it is about.
func TestPackageNames(t *testing.T) {
	bad := map[string]bool{
		"util": true, "utils": true, "common": true, "helper": true, "helpers": true,
		"manager": true, "misc": true, "shared": true, "base": true, "types": true,
	}
	for _, f := range goFiles(t) {
		if n := strings.TrimSuffix(f.ast.Name.Name, "_test"); bad[n] {
			t.Errorf("%s: package %s says nothing of what is in it", f.name, n)
		}
		for _, part := range strings.Split(f.dir(), "/") {
			if bad[part] {
				t.Errorf("%s: directory %s says nothing of what is in it", f.name, part)
			}
		}
	}
}

// arrows reads who may import whom from the table in docs/architecture.md, so
// that what is documented is what is checked.
func arrows(t *testing.T) map[string][]string {
	t.Helper()
	const start, end = "<!-- packages -->", "<!-- /packages -->"
	doc := string(read(t, "docs/architecture.md"))
	_, table, ok := strings.Cut(doc, start)
	table, _, ok2 := strings.Cut(table, end)
	if !ok || !ok2 {
		t.Fatalf("docs/architecture.md has no table between %s and %s", start, end)
	}
	code := regexp.MustCompile("`([^`]+)`")
	out := map[string][]string{}
	for _, line := range strings.Split(table, "\n") {
		cells := strings.Split(line, "|")
		if len(cells) != 5 || !strings.Contains(cells[1], "`") {
			continue
		}
		var may []string
		for _, m := range code.FindAllStringSubmatch(cells[3], -1) {
			may = append(may, m[1])
		}
		for _, m := range code.FindAllStringSubmatch(cells[1], -1) {
			out[strings.TrimSuffix(m[1], "/")] = may
		}
	}
	if len(out) < 10 {
		t.Fatalf("only %d rows in the table of packages", len(out))
	}
	return out
}

// allowed: a rule "pkg/x" allows that package, "pkg/…" everything below.
func allowed(rules []string, imported string) bool {
	for _, r := range rules {
		if below, ok := strings.CutSuffix(r, "…"); ok && strings.HasPrefix(imported, below) || r == imported {
			return true
		}
	}
	return false
}

// Arrows point one way: commands, assembly, parts, types.
func TestImportArrows(t *testing.T) {
	table := arrows(t)
	seen := map[string]bool{}
	for _, f := range goFiles(t) {
		if f.test() || strings.HasPrefix(f.name, "test/") || strings.HasPrefix(f.name, "demo/") || strings.HasPrefix(f.name, "bench/") {
			continue
		}
		rules, ok := table[f.dir()]
		// A sub-package belongs to the package above it.
		for d := f.dir(); !ok && d != "."; d = path.Dir(d) {
			rules, ok = table[d]
		}
		if !ok {
			if !seen[f.dir()] {
				t.Errorf("%s is not in the table of packages of docs/architecture.md", f.dir())
			}
			seen[f.dir()] = true
			continue
		}
		for _, imp := range f.ast.Imports {
			p, err := strconv.Unquote(imp.Path.Value)
			if err != nil {
				t.Errorf("%s: %v", f.at(imp), err)
				continue
			}
			if p == "C" {
				t.Errorf("%s: cgo; the binaries are static", f.at(imp))
			}
			imported, ours := strings.CutPrefix(p, module+"/")
			if ours && imported != f.dir() && !allowed(rules, imported) {
				t.Errorf("%s: %s may not import %s (docs/architecture.md, packages)", f.at(imp), f.dir(), imported)
			}
		}
	}
}

// Some dependencies are for one place only.
func TestDependenciesInTheirPlace(t *testing.T) {
	for prefix, places := range map[string][]string{
		"github.com/valyala/fasthttp":   {"pkg/credserver", "test/", "bench/"},
		"github.com/cilium/ebpf":        {"bpf", "pkg/attribution", "pkg/diagnose", "test/", "demo"},
		"github.com/containerd/":        {"test/"},
		"google.golang.org/grpc":        {"pkg/etcd", "test/"},
		"github.com/vishvananda/":       {"pkg/linklocal", "pkg/pods", "pkg/diagnose", "test/", "demo"},
		"github.com/spf13/cobra":        {"cmd/", "pkg/commandline", "test/cluster/"},
		"github.com/go-jose/":           {"pkg/satoken", "test/"},
		"k8s.io/":                       {"pkg/association", "pkg/tokencheck", "pkg/webhook", "pkg/addon", "pkg/server", "test/", "cmd/latchkey-server"},
		"helm.sh/":                      {"test/chart"},
		"github.com/sirupsen/logrus":    nil,
		"github.com/stretchr/testify":   nil,
		"github.com/pkg/errors":         nil,
		"golang.org/x/exp":              nil,
		"github.com/prometheus/client_": {"pkg/", "cmd/", "test/"},
		"go.etcd.io/":                   {"pkg/association", "pkg/etcd", "pkg/nodeauth", "pkg/server", "test/"},
		"go.uber.org/zap":               {"pkg/etcd"},
	} {
		for _, f := range goFiles(t) {
			for _, imp := range f.ast.Imports {
				p, _ := strconv.Unquote(imp.Path.Value)
				if !strings.HasPrefix(p, prefix) {
					continue
				}
				ok := f.test()
				for _, place := range places {
					ok = ok || strings.HasPrefix(f.name, place)
				}
				if !ok || places == nil {
					t.Errorf("%s: %s is not for this package", f.at(imp), p)
				}
			}
		}
	}
}

// What happens at start is written down in one place, the constructor.
func TestNoInit(t *testing.T) {
	for _, f := range goFiles(t) {
		for _, d := range f.ast.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil && fn.Name.Name == "init" {
				t.Errorf("%s: func init; wire it in the constructor", f.at(fn))
			}
		}
	}
}

// Whoever reads the documentation of a package finds every name in it.
func TestExportedNamesAreDocumented(t *testing.T) {
	// Methods that the standard library calls, and that mean the same everywhere.
	formatting := map[string]bool{"String": true, "GoString": true, "LogValue": true, "Error": true, "Unwrap": true}
	packageDoc := map[string]bool{}
	for _, f := range goFiles(t) {
		if !f.pkg() || f.test() {
			continue
		}
		packageDoc[f.dir()] = packageDoc[f.dir()] || f.ast.Doc != nil
		for _, d := range f.ast.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				if d.Name.IsExported() && d.Doc == nil && exportedReceiver(d) && !formatting[d.Name.Name] {
					t.Errorf("%s: %s has no comment", f.at(d), d.Name.Name)
				}
			case *ast.GenDecl:
				for _, s := range d.Specs {
					switch s := s.(type) {
					case *ast.TypeSpec:
						if s.Name.IsExported() && s.Doc == nil && d.Doc == nil {
							t.Errorf("%s: %s has no comment", f.at(s), s.Name.Name)
						}
					case *ast.ValueSpec:
						// A group of values may share one comment.
						for _, n := range s.Names {
							if n.IsExported() && s.Doc == nil && d.Doc == nil && s.Comment == nil {
								t.Errorf("%s: %s has no comment", f.at(s), n.Name)
							}
						}
					}
				}
			}
		}
	}
	for _, dir := range slices.Sorted(maps.Keys(packageDoc)) {
		if !packageDoc[dir] {
			t.Errorf("package %s has no comment", dir)
		}
	}
}

// exportedReceiver: a method of an unexported type is seen by nobody, except
// through an interface that documents it.
func exportedReceiver(d *ast.FuncDecl) bool {
	if d.Recv == nil || len(d.Recv.List) == 0 {
		return true
	}
	typ := d.Recv.List[0].Type
	for {
		switch x := typ.(type) {
		case *ast.StarExpr:
			typ = x.X
		case *ast.IndexExpr:
			typ = x.X
		case *ast.IndexListExpr:
			typ = x.X
		case *ast.Ident:
			return x.IsExported()
		default:
			return true
		}
	}
}

// A test that needs the kernel is recognised by its file's name and by its
// build constraint, has both, and fails where it cannot run: skipped, it would
// read as passed.
func TestPrivilegedTests(t *testing.T) {
	for _, f := range goFiles(t) {
		if !f.test() {
			continue
		}
		constraint := false
		for _, g := range f.ast.Comments {
			if g.Pos() > f.ast.Package {
				break
			}
			for _, c := range g.List {
				constraint = constraint || strings.HasPrefix(c.Text, "//go:build") && regexp.MustCompile(`\bprivileged\b`).MatchString(c.Text)
			}
		}
		if named := strings.HasSuffix(f.name, "_privileged_test.go"); named != constraint {
			t.Errorf("%s: name says privileged %v, build constraint %v", f.name, named, constraint)
		}
		if !constraint {
			continue
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			if call, ok := n.(*ast.CallExpr); ok {
				if sel, ok := call.Fun.(*ast.SelectorExpr); ok && slices.Contains([]string{"Skip", "Skipf", "SkipNow"}, sel.Sel.Name) {
					t.Errorf("%s: a privileged test that skips; fail and say what is missing", f.at(call))
				}
			}
			return true
		})
	}
}

// flagDefinition matches the methods of pflag and flag that define a flag.
var flagDefinition = regexp.MustCompile(`^(Bool|Count|Duration|Float(32|64)|IP|Int(8|16|32|64)?|String|Uint(8|16|32|64)?|Text)(Slice|Array|ToString|ToInt)?(Var)?P?$|^(Var)P?$`)

// definedFlags finds the long names of the commands' flags in the files that are
// wanted, with where each is defined.
func definedFlags(t *testing.T, wanted func(file string) bool) map[string]string {
	t.Helper()
	out := map[string]string{}
	for _, f := range goFiles(t) {
		if f.test() || !strings.HasPrefix(f.name, "cmd/") || !wanted(f.name) {
			continue
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			sel, ok := call.Fun.(*ast.SelectorExpr)
			if !ok || !flagDefinition.MatchString(sel.Sel.Name) || len(call.Args) < 3 {
				return true
			}
			// The name is the first argument, or the second after a pointer.
			arg := call.Args[0]
			if strings.Contains(sel.Sel.Name, "Var") {
				arg = call.Args[1]
			}
			if lit, ok := arg.(*ast.BasicLit); ok && lit.Kind == token.STRING {
				name, err := strconv.Unquote(lit.Value)
				if err == nil {
					out[name] = f.at(call)
				}
			}
			return true
		})
	}
	return out
}

// compare reports what is defined and not documented, and the other way round.
func compare(t *testing.T, doc, what string, defined map[string]string, documented map[string]bool) {
	t.Helper()
	for _, name := range slices.Sorted(maps.Keys(defined)) {
		if !documented[name] {
			t.Errorf("%s: %s %s is not in %s", defined[name], what, name, doc)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(documented)) {
		if defined[name] == "" {
			t.Errorf("%s: there is no %s %s", doc, what, name)
		}
	}
}

// documentedNames takes, from the tables of a document, what the first cells of
// the rows name in code.
func documentedNames(t *testing.T, doc string, name *regexp.Regexp) map[string]bool {
	t.Helper()
	out := map[string]bool{}
	for _, line := range strings.Split(string(read(t, doc)), "\n") {
		cells := strings.Split(line, "|")
		if len(cells) < 4 {
			continue
		}
		for _, m := range name.FindAllStringSubmatch(cells[1], -1) {
			out[m[1]] = true
		}
	}
	return out
}

// Each half has its own documents of flags and metrics.
const (
	agentFlags    = "docs/flags.md"
	serverFlags   = "docs/server-flags.md"
	agentMetrics  = "docs/metrics.md"
	serverMetrics = "docs/server-metrics.md"
)

func TestFlagsAreDocumented(t *testing.T) {
	flag := regexp.MustCompile("`(?:-[a-z], )?--([a-z0-9-]+)`")
	for _, doc := range []string{agentFlags, serverFlags} {
		defined := definedFlags(t, func(file string) bool {
			return strings.HasPrefix(file, "cmd/latchkey-server/") == (doc == serverFlags)
		})
		if len(defined) == 0 {
			t.Fatalf("no flag of %s was found below cmd/: this test does not see them any more", doc)
		}
		compare(t, doc, "flag", defined, documentedNames(t, doc, flag))
	}
}

func TestMetricsAreDocumented(t *testing.T) {
	metric := regexp.MustCompile(`^(latchkey|pod_identity)_[a-z0-9_]*[a-z0-9]$`)
	defined := map[string]string{}
	for _, f := range goFiles(t) {
		if f.test() || !f.pkg() && !strings.HasPrefix(f.name, "cmd/") {
			continue
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			if lit, ok := n.(*ast.BasicLit); ok && lit.Kind == token.STRING {
				if s, err := strconv.Unquote(lit.Value); err == nil && metric.MatchString(s) {
					defined[s] = f.at(lit)
				}
			}
			return true
		})
	}
	if len(defined) == 0 {
		t.Fatal("no metric was found below pkg/: this test does not see them any more")
	}
	name := regexp.MustCompile("`((?:latchkey|pod_identity)_[a-z0-9_]+)")
	for _, doc := range []string{agentMetrics, serverMetrics} {
		ofDoc := maps.Clone(defined)
		maps.DeleteFunc(ofDoc, func(metric, _ string) bool {
			return strings.HasPrefix(metric, "latchkey_server_") != (doc == serverMetrics)
		})
		compare(t, doc, "metric", ofDoc, documentedNames(t, doc, name))
	}
}

// A test named in a document exists.
func TestNamedTestsExist(t *testing.T) {
	tests := map[string]bool{}
	for _, f := range goFiles(t) {
		if !f.test() {
			continue
		}
		for _, d := range f.ast.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil {
				tests[fn.Name.Name] = true
			}
		}
	}
	name := regexp.MustCompile("`((?:Test|Fuzz|Benchmark)[A-Z][A-Za-z0-9_]*)(?:/[^`]*)?`")
	for _, doc := range files(t) {
		if path.Ext(doc) != ".md" {
			continue
		}
		for _, m := range name.FindAllStringSubmatch(string(read(t, doc)), -1) {
			if !tests[m[1]] {
				t.Errorf("%s names %s, and there is no such test", doc, m[1])
			}
		}
	}
}

// A link inside the repository leads somewhere.
func TestLinksInDocuments(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)\s]+)\)`)
	scheme := regexp.MustCompile(`^[a-z]+:`)
	for _, doc := range files(t) {
		if path.Ext(doc) != ".md" {
			continue
		}
		for _, m := range link.FindAllStringSubmatch(string(read(t, doc)), -1) {
			target, fragment, _ := strings.Cut(m[1], "#")
			if scheme.MatchString(m[1]) {
				continue
			}
			file := doc
			if target != "" {
				file = path.Join(path.Dir(doc), target)
				if _, err := os.Stat(filepath.Join(root, filepath.FromSlash(file))); err != nil {
					t.Errorf("%s: link to %s: %v", doc, m[1], err)
					continue
				}
			}
			if fragment != "" && path.Ext(file) == ".md" && !slices.Contains(headings(string(read(t, file))), fragment) {
				t.Errorf("%s: link to %s: no such heading", doc, m[1])
			}
		}
	}
}

// headings gives the anchors that common renderers make of a document's
// headings.
func headings(doc string) []string {
	drop := regexp.MustCompile(`[^\p{L}\p{N} _-]`)
	var out []string
	for _, line := range strings.Split(doc, "\n") {
		if h := strings.TrimLeft(line, "#"); h != line && strings.HasPrefix(h, " ") {
			h = drop.ReplaceAllString(strings.ToLower(strings.TrimSpace(h)), "")
			out = append(out, strings.ReplaceAll(h, " ", "-"))
		}
	}
	return out
}
