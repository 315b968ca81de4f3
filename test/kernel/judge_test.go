// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"fmt"
	"regexp"
	"testing"
)

// knownFallbacks are those of pkg/attribution, by a part of their text, and the
// kernel that needs each no more. Tests hold the kernel to them, so that a
// fallback is neither used where it is not needed nor left unsaid where it is.
var knownFallbacks = []struct{ contains, before string }{
	{"sock_cgroup_data.val", "5.15"},
	{"RLIMIT_MEMLOCK", "5.11"},
	{"SO_NETNS_COOKIE", "5.14"},
}

// judgeProbe: a feature may be missing only on a kernel older than since. An
// older one may have it, by a distribution's backport.
func judgeProbe(running, since string, there bool) error {
	if !there && !Older(running, since) {
		return fmt.Errorf("the probe says missing on Linux %s, and names %s as the first that has it: one of the two is wrong", running, since)
	}
	return nil
}

var needless = regexp.MustCompile(`\(before Linux (\d+\.\d+)\)$`)

// judgeFallback: a fallback says until when it is needed, and is not used after.
func judgeFallback(running, text string) error {
	m := needless.FindStringSubmatch(text)
	if m == nil {
		return fmt.Errorf("fallback %q does not end with the kernel that needs it no more, as (before Linux X.Y)", text)
	}
	if !Older(running, m[1]) {
		return fmt.Errorf("fallback %q is in use on Linux %s", text, running)
	}
	return nil
}

func TestKnownFallbacksAreOfKernelsThatAreTested(t *testing.T) {
	for _, f := range knownFallbacks {
		// The oldest of the matrix uses them all, so that each is tested.
		if err := judgeFallback("5.10", f.contains+" (before Linux "+f.before+")"); err != nil {
			t.Error(err)
		}
	}
}

func TestJudgeProbe(t *testing.T) {
	for _, tc := range []struct {
		running, since string
		there, wrong   bool
	}{
		{"5.10", "5.8", true, false},
		{"5.10", "5.8", false, true},
		{"5.10", "5.10", false, true},
		{"5.4", "5.10", false, false},
		{"5.4", "5.10", true, false}, // a backport
		{"6.1", "5.10", false, true},
		{"6.12", "6.2", false, true}, // not as text
	} {
		if err := judgeProbe(tc.running, tc.since, tc.there); (err != nil) != tc.wrong {
			t.Errorf("%+v: %v", tc, err)
		}
	}
}

func TestJudgeFallback(t *testing.T) {
	for _, tc := range []struct {
		running, text string
		wrong         bool
	}{
		{"5.10", "something else (before Linux 5.15)", false},
		{"5.15", "something else (before Linux 5.15)", true},
		{"6.1", "something else (before Linux 5.15)", true},
		{"5.10", "something else", true},
		{"5.10", "something (before Linux 5.15) else", true},
	} {
		if err := judgeFallback(tc.running, tc.text); (err != nil) != tc.wrong {
			t.Errorf("%+v: %v", tc, err)
		}
	}
}
