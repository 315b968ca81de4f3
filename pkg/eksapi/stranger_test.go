// SPDX-License-Identifier: Apache-2.0

package eksapi_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/eksapi"
	"github.com/latchkey-dev/latchkey/test/standin/tokens"
)

// A stranger's request leaves at most one record in the audit log, and a short
// one, however long its names and headers are; what it asked to read leaves
// none. So the log grows by the number of requests alone.
func TestStrangersRecordsAreShort(t *testing.T) {
	w := newWorld(t, nil)
	long := strings.Repeat("%01", 8000) // three bytes each on the wire, six in JSON
	claim := http.Header{"Authorization": {"AWS4-HMAC-SHA256 Credential=" + strings.Repeat("A", 128) + "/20261121/" + region +
		"/eks-auth/aws4_request, SignedHeaders=host;x-amz-date, Signature=" + strings.Repeat("0", 64)}}
	for name, c := range map[string]struct {
		raw
		records int
	}{
		"exchange":           {raw{path: "/clusters/" + long + "/assume-role-for-pod-identity", body: `{"token":"x"}`}, 1},
		"exchange, a claim":  {raw{path: "/clusters/" + long + "/assume-role-for-pod-identity", header: claim, body: `{"token":"x"}`}, 1},
		"update":             {raw{path: "/clusters/" + long + "/pod-identity-associations/" + long, header: claim, body: "{}"}, 1},
		"tags":               {raw{path: "/tags/" + long, header: claim, body: "{}"}, 1},
		"list":               {raw{method: http.MethodGet, path: "/clusters/" + long + "/pod-identity-associations"}, 0},
		"unknown operation":  {raw{path: "/" + long}, 0},
		"an announced giant": {raw{path: exchangePath, header: claim, body: `{"token":"` + strings.Repeat("x", 1<<20) + `"}`}, 1},
	} {
		c.unsigned = true
		if a := w.send(c.raw); a.status < 400 || a.status > 499 {
			t.Errorf("%s: %d %s", name, a.status, a.body)
		}
		records := w.audited()
		if len(records) != c.records {
			t.Errorf("%s: %d records, want %d", name, len(records), c.records)
		}
		for _, r := range records {
			line, err := json.Marshal(r)
			if err != nil {
				t.Fatal(err)
			}
			if r.Caller != "" || r.AccessKeyID != "" || len(line) > 32<<10 {
				t.Errorf("%s: a record of %d bytes: %.200s", name, len(line), fmt.Sprintf("%+v", r))
			}
		}
	}
}

// A limit that the threat model names: an exchange that is sent again is
// answered while its date is good, and not later.
func TestReplayedExchange(t *testing.T) {
	at := time.Now()
	clock := at
	w := newWorld(t, func(c *eksapi.Config) { c.Now = func() time.Time { return clock } })
	w.create("web", "api", role("api"))
	body, err := json.Marshal(map[string]string{"token": signer(t, "prod").Token(tokens.Claims{Namespace: "web", ServiceAccount: "api"})})
	if err != nil {
		t.Fatal(err)
	}
	r := raw{user: "NODE1", path: exchangePath, at: at, body: string(body)}
	for range 2 {
		if a := w.send(r); a.status != 200 {
			t.Fatalf("while its date is good: %d %s", a.status, a.body)
		}
	}
	clock = at.Add(6 * time.Minute)
	w.audited()
	w.refused(r, 403, "InvalidSignatureException")
	if got := w.audited(); len(got) != 1 || got[0].Caller != "" || got[0].IssuedAccessKeyID != "" {
		t.Errorf("recorded %+v", got)
	}
}
