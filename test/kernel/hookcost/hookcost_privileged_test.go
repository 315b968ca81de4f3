// SPDX-License-Identifier: Apache-2.0

//go:build privileged

package main

import (
	"os"
	"strings"
	"testing"

	"github.com/latchkey-dev/latchkey/test/testnode"
)

func TestMain(m *testing.M) {
	testnode.Main(nil)
	os.Exit(m.Run())
}

// The instrument works: every scenario has its programs run, and as often as
// there are connections. What it reads is for people.
func TestPrivilegedMeasuresEveryScenario(t *testing.T) {
	text, err := run(config{rounds: 6, batch: 10})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range scenarios() {
		connect := "connect4"
		if s.v6 {
			connect = "connect6"
		}
		for _, want := range []string{"| " + s.name + " | `" + connect + "` | 1.0 |", "| " + s.name + " | `sockops` |"} {
			if !strings.Contains(text, want) {
				t.Errorf("no %q in\n%s", want, text)
			}
		}
	}
}
