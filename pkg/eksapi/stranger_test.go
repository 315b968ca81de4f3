// SPDX-License-Identifier: Apache-2.0

package eksapi_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/eksapi"
	"github.com/latchkey-dev/latchkey/pkg/strangers"
	"github.com/latchkey-dev/latchkey/test/standin/tokens"
)

// A stranger's request leaves at most one record in the audit log, and a short
// one, however long its names and headers are; what it asked to read leaves
// none.
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
			if r.Caller != "" || r.AccessKeyID != "" || len(line) > 2<<10 {
				t.Errorf("%s: a record of %d bytes: %.200s", name, len(line), fmt.Sprintf("%+v", r))
			}
		}
	}
}

// Strangers leave so many records and no more, then a summary, and are refused
// before anything is done for them. Who has a key is served and told the truth
// meanwhile, though they come from the same address.
func TestStrangersAreLimited(t *testing.T) {
	var mu sync.Mutex
	now := time.Now()
	clock := func() time.Time { mu.Lock(); defer mu.Unlock(); return now }
	var seen []eksapi.Observation
	w := newWorld(t, func(c *eksapi.Config) {
		c.Now = clock
		c.Strangers = strangers.New(strangers.Config{Failures: strangers.Rate{PerSecond: 1, Burst: 20}, Records: strangers.Rate{PerSecond: 0.1, Burst: 5}, Now: clock})
		c.Observe = func(o eksapi.Observation) { mu.Lock(); defer mu.Unlock(); seen = append(seen, o) }
	})
	w.create("web", "api", role("api"))
	w.audited()
	stranger := raw{user: "STRANGER", path: exchangePath, body: `{"token":"x"}`}
	const all, answered, recorded = 30, 20, 5
	for i := range all {
		status, code := 403, "UnrecognizedClientException"
		if i >= answered {
			status, code = 429, "ThrottlingException"
		}
		w.refused(stranger, status, code)
	}
	records := w.audited()
	if len(records) != recorded || records[0].ClaimedAccessKeyID != "STRANGER" {
		t.Errorf("%d records of strangers, want %d: %+v", len(records), recorded, records)
	}
	mu.Lock()
	left := 0
	for _, o := range seen {
		if o.Unrecorded && o.Stranger {
			left++
		}
	}
	mu.Unlock()
	if left != all-recorded {
		t.Errorf("%d observed as left out", left)
	}
	w.refused(raw{path: exchangePath, unsigned: true}, 429, "ThrottlingException")
	w.refused(raw{method: http.MethodGet, path: "/clusters/prod/pod-identity-associations", unsigned: true}, 429, "ThrottlingException")
	// Nothing is read of a stranger's body by then: it may be as large as it likes.
	big := stranger
	big.body = `{"token":"` + strings.Repeat("x", 1<<20) + `"}`
	w.refused(big, 429, "ThrottlingException")

	token := signer(t, "prod").Token(tokens.Claims{Namespace: "web", ServiceAccount: "api"})
	for range 3 {
		if a := w.send(raw{user: "NODE1", path: exchangePath, body: `{"token":"` + token + `"}`, at: now}); a.status != 200 {
			t.Errorf("a node at the same address: %d %s", a.status, a.body)
		}
	}
	w.refused(raw{user: "NODE1", path: exchangePath, body: "{}", at: now.Add(-time.Hour)}, 429, "ThrottlingException")
	w.refused(raw{user: "NODE1", path: exchangePath, body: "{}", secret: "another-secret-000000"}, 403, "InvalidSignatureException")
	w.refused(raw{user: "EXPIRED", path: exchangePath, body: "{}"}, 403, "ExpiredTokenException")
	if records := w.audited(); len(records) != 3 || records[0].Caller == "" {
		t.Errorf("records of the node: %+v", records)
	}

	mu.Lock()
	now = now.Add(2 * strangers.DefaultInterval)
	mu.Unlock()
	w.refused(stranger, 403, "UnrecognizedClientException")
	records = w.audited()
	if len(records) != 2 || records[0].Type != eksapi.TypeUnrecorded || records[0].Unrecorded != all-recorded+5 ||
		records[0].Since == nil || records[0].Peer == "" || records[1].Type != eksapi.TypeExchange {
		t.Errorf("a while later: %+v", records)
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
