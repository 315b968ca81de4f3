// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/latchkey-dev/latchkey/test/clients/trial"
)

func TestMain(m *testing.M) { trial.Main(m, run) }

func TestVerbs(t *testing.T) {
	uri := trial.Endpoint(t)
	gone := httptest.NewServer(nil)
	gone.Close()
	for _, tt := range []struct {
		name, uri, token, stdin string
		args                    []string
		want                    int
		out                     string
	}{
		{"fetch", uri, trial.Good, "", []string{"fetch"}, 0, `"account_id":"222222222222"`},
		{"fetch, refused", uri, "bad", "", []string{"fetch"}, 1, `"error":`},
		{"get", uri, trial.Good, "", []string{"get"}, 0, `"status":200`},
		{"get, refused", uri, "bad", "", []string{"get"}, 0, `"status":403`},
		{"get, a token of its own", uri, "bad", "good\n", []string{"get", "-"}, 0, `"status":200`},
		{"get, nobody there", gone.URL, trial.Good, "", []string{"get"}, 1, `"status":0`},
		{"must", uri, trial.Good, "", []string{"must"}, 0, `"status":200`},
		{"must, refused", uri, "bad", "", []string{"must"}, 1, `"status":403`},
		{"connection", uri, trial.Good, "get\nget\n", []string{"connection"}, 0, `"connection":1`},
		{"ask, no interval", uri, trial.Good, "", []string{"ask", "0s", "x"}, 1, ""},
		{"no verb", uri, trial.Good, "", nil, 2, ""},
		{"unknown verb", uri, trial.Good, "", []string{"put"}, 2, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, out, errOut := trial.Run(t, tt.uri, tt.token, tt.stdin, tt.args...)
			if got != tt.want || !strings.Contains(out, tt.out) {
				t.Errorf("status %d, output %s%s; want %d, %s", got, out, errOut, tt.want, tt.out)
			}
			for line := range strings.Lines(out) {
				if !json.Valid([]byte(line)) {
					t.Errorf("not JSON: %s", line)
				}
			}
			if strings.Contains(out+errOut, trial.Secret) {
				t.Error("a secret was printed")
			}
		})
	}
}
