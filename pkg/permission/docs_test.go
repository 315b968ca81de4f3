// SPDX-License-Identifier: Apache-2.0

package permission_test

import (
	"os"
	"strings"
	"testing"

	"github.com/latchkey-dev/latchkey/pkg/permission"
)

// What the documentation shows is a users file, and it names every action.
func TestDocumentation(t *testing.T) {
	b, err := os.ReadFile("../../docs/permissions.md")
	if err != nil {
		t.Fatal(err)
	}
	_, example, ok := strings.Cut(string(b), "<!-- users -->\n```yaml\n")
	example, _, ok2 := strings.Cut(example, "```\n<!-- /users -->")
	if !ok || !ok2 {
		t.Fatal("no example")
	}
	if users, err := permission.Parse([]byte(example)); err != nil || len(users) != 3 {
		t.Errorf("%d users, %v", len(users), err)
	}
	for _, a := range permission.Actions() {
		if !strings.Contains(string(b), "`"+string(a)+"`") {
			t.Errorf("%s is not documented", a)
		}
	}
}
