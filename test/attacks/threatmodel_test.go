// SPDX-License-Identifier: Apache-2.0

package attacks

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// The threat model is the list of attacks: each test here is in it, and what it
// expects is said in the same row.
func TestEveryAttackIsInTheThreatModel(t *testing.T) {
	doc, err := os.ReadFile("../../docs/threat-model.md")
	if err != nil {
		t.Fatal(err)
	}
	names, err := filepath.Glob("*_privileged_test.go")
	if err != nil {
		t.Fatal(err)
	}
	rows := map[string]string{}
	for _, row := range regexp.MustCompile(`(?m)^\|.*\|$`).FindAllString(string(doc), -1) {
		for _, m := range regexp.MustCompile("`(Test[A-Za-z0-9]+)(?:/[a-z_]+)?`").FindAllStringSubmatch(row, -1) {
			rows[m[1]] += row + "\n"
		}
	}
	attacks := 0
	for _, name := range names {
		fset := token.NewFileSet()
		file, err := parser.ParseFile(fset, name, nil, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range file.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok || !strings.HasPrefix(fn.Name.Name, "TestAttack") && !strings.HasPrefix(fn.Name.Name, "TestProof") {
				continue
			}
			attacks++
			row := rows[fn.Name.Name]
			if row == "" {
				t.Errorf("%s: %s is not in docs/threat-model.md", fset.Position(fn.Pos()), fn.Name.Name)
				continue
			}
			if strings.TrimSpace(fn.Doc.Text()) == "" {
				t.Errorf("%s: %s does not say what the attack is", fset.Position(fn.Pos()), fn.Name.Name)
			}
			for outcome, words := range said() {
				if mentions(fn, outcome) && strings.HasPrefix(fn.Name.Name, "TestAttack") && !containsAny(row, words) {
					t.Errorf("%s: %s expects %s, and its row says nothing like %q:\n%s", fset.Position(fn.Pos()), fn.Name.Name, outcome, words, row)
				}
			}
		}
	}
	if attacks < 40 {
		t.Errorf("only %d attacks were found: this test does not see them any more", attacks)
	}
}

// said is how the threat model words the outcomes.
func said() map[string][]string {
	return map[string][]string{
		"Refused":              {"refused", "429", "costs the flooder"},
		"ServedAsTruePod":      {"served as", "as IPv4", "as without", "403", "costs the pod its own", "evidence of the last connect"},
		"NeverReachesTheAgent": {"never reaches", "An ordinary user cannot", "Without the capability", "write access", "nobody notices", "no effect"},
		"OutOfScope":           {"out of scope"},
	}
}

func mentions(fn *ast.FuncDecl, name string) (found bool) {
	ast.Inspect(fn, func(n ast.Node) bool {
		id, ok := n.(*ast.Ident)
		found = found || ok && id.Name == name
		return !found
	})
	return found
}

func containsAny(s string, words []string) bool {
	for _, w := range words {
		if strings.Contains(s, w) {
			return true
		}
	}
	return false
}
