// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/latchkey-dev/latchkey/test/clients/trial"
)

func TestMain(m *testing.M) { trial.Main(m, run) }

func TestExitStatus(t *testing.T) {
	uri := trial.Endpoint(t)
	for _, tt := range []struct {
		name, token, stdin string
		args               []string
		want               int
		out                string
	}{
		{"credentials", trial.Good, "", nil, 0, `"access_key_id":"ASIATEST"`},
		{"refusal", "bad", "", nil, 1, `"error":`},
		{"hold", trial.Good, "get\n", []string{"-hold"}, 0, `"status":200`},
		{"hold, refusal", "bad", "get\n", []string{"-hold"}, 0, `"status":403`},
		{"hold, unknown command", trial.Good, "put\n", []string{"-hold"}, 2, ""},
		{"unknown flag", trial.Good, "", []string{"-secret"}, 2, ""},
		{"argument", trial.Good, "", []string{"x"}, 2, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, out, errOut := trial.Run(t, uri, tt.token, tt.stdin, tt.args...)
			if got != tt.want || !strings.Contains(out, tt.out) {
				t.Errorf("status %d, output %s%s; want %d, %s", got, out, errOut, tt.want, tt.out)
			}
			if out != "" && !json.Valid([]byte(out)) {
				t.Errorf("the output is not JSON: %s", out)
			}
			if strings.Contains(out+errOut, trial.Secret) {
				t.Error("a secret was printed")
			}
		})
	}
}
