// SPDX-License-Identifier: Apache-2.0

package commandline

import (
	"errors"
	"strings"
	"testing"
)

func TestRoot(t *testing.T) {
	for _, c := range []struct {
		args  []string
		usage bool
		says  string
	}{
		{nil, false, "the long text"},
		{[]string{"version"}, false, "v1.2.3\n"},
		{[]string{"--version"}, false, "v1.2.3"},
		{[]string{"nonsense"}, true, "tool --help"},
		{[]string{"--nonsense"}, true, "tool --help"},
		{[]string{"version", "nonsense"}, true, "tool version --help"},
	} {
		var out strings.Builder
		root := Root(&out, "tool", "short", "the long text", "v1.2.3")
		root.SetArgs(c.args)
		err := root.Execute()
		var usage UsageError
		if errors.As(err, &usage) != c.usage {
			t.Errorf("%v: got %v, usage error wanted: %v", c.args, err, c.usage)
		}
		text := out.String()
		if err != nil {
			text = err.Error()
		}
		if !strings.Contains(text, c.says) {
			t.Errorf("%v: says %q, want %q in it", c.args, text, c.says)
		}
	}
}

func TestVersion(t *testing.T) {
	if got := Version("v9"); got != "v9" {
		t.Errorf("got %q", got)
	}
	if Version("") == "" {
		t.Error("no version at all")
	}
}
