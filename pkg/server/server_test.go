// SPDX-License-Identifier: Apache-2.0

package server

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"log/slog"
	"math"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/latchkey-dev/latchkey/pkg/association"
	"github.com/latchkey-dev/latchkey/pkg/eksapi"
	"github.com/latchkey-dev/latchkey/pkg/etcd"
	"github.com/latchkey-dev/latchkey/pkg/issuer"
	"github.com/latchkey-dev/latchkey/pkg/nodeauth/exchange"
	"github.com/latchkey-dev/latchkey/pkg/satoken"
	"github.com/latchkey-dev/latchkey/pkg/strangers"
	"github.com/latchkey-dev/latchkey/pkg/tokencheck"
	"github.com/latchkey-dev/latchkey/test/standin/tokens"
)

func signer(t testing.TB, algorithm string) *tokens.Signer {
	t.Helper()
	s, err := tokens.NewSigner(tokens.Config{Algorithm: algorithm})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// What is pinned verifies what the cluster signs, whatever form it came in, and
// people see the same fingerprint in every form.
func TestPinKeys(t *testing.T) {
	for _, alg := range []string{"RS256", "ES256", "ES384", "ES512"} {
		s := signer(t, alg)
		var fingerprints []string
		for form, doc := range map[string][]byte{"JWKS": s.JWKS(), "PEM": s.PEM()} {
			set, pinned, err := PinKeys(doc)
			if err != nil || len(pinned) != 1 || pinned[0].ID != s.KeyID() || pinned[0].Algorithm != alg {
				t.Fatalf("%s %s: %+v, %v", alg, form, pinned, err)
			}
			fingerprints = append(fingerprints, pinned[0].Fingerprint)
			keys, err := satoken.ParseKeySet("", set)
			if err != nil {
				t.Fatal(err)
			}
			v, err := satoken.NewVerifier(satoken.Config{Issuers: []string{s.Issuer()}, Keys: keys})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := v.Verify(t.Context(), s.Token(tokens.Claims{})); err != nil {
				t.Errorf("%s %s: %v", alg, form, err)
			}
			again, _, err := PinKeys(set)
			if err != nil || !bytes.Equal(again, set) {
				t.Errorf("%s %s: pinned again: %s, was %s", alg, form, again, set)
			}
		}
		if fingerprints[0] != fingerprints[1] {
			t.Errorf("%s: fingerprints %q", alg, fingerprints)
		}
	}
}

func TestPinKeysRefuses(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	private := signer(t, "RS256").JWK()
	private["d"] = "c2VjcmV0"
	withPrivate, err := json.Marshal(map[string]any{"keys": []any{private}})
	if err != nil {
		t.Fatal(err)
	}
	for name, doc := range map[string]string{
		"empty": "", "no keys": `{"keys":[]}`, "no JSON": "{", "text": "hello",
		"private PEM": string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})),
		"private JWK": string(withPrivate), "secret": `{"keys":[{"kty":"oct","k":"c2VjcmV0","kid":"a"}]}`,
	} {
		if _, _, err := PinKeys([]byte(doc)); !errors.Is(err, ErrKeys) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzPinKeys(f *testing.F) {
	s := signer(f, "ES256")
	f.Add(s.JWKS())
	f.Add(s.PEM())
	f.Add([]byte(`{"keys":[{"kty":"EC","crv":"P-521","x":"AA","y":"AA","kid":""}]}`))
	f.Fuzz(func(t *testing.T, doc []byte) {
		set, pinned, err := PinKeys(doc)
		if err != nil {
			return
		}
		if len(pinned) == 0 {
			t.Fatal("no key and no error")
		}
		if _, again, err := PinKeys(set); err != nil || len(again) != len(pinned) {
			t.Fatalf("what was pinned cannot be pinned: %v", err)
		}
	})
}

func writeCertificate(t *testing.T, dir string, serial int64) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(serial), NotBefore: time.Unix(0, 0), NotAfter: time.Unix(1<<32, 0)}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string]*pem.Block{"crt": {Type: "CERTIFICATE", Bytes: cert}, "key": {Type: "PRIVATE KEY", Bytes: der}} {
		// A new file each time, as renewals make one.
		tmp := filepath.Join(dir, name+".new")
		if err := os.WriteFile(tmp, pem.EncodeToMemory(b), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(tmp, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
}

func TestCertificateIsReadAgain(t *testing.T) {
	dir := t.TempDir()
	writeCertificate(t, dir, 1)
	now := time.Unix(1000, 0)
	c, err := newCertificate(filepath.Join(dir, "crt"), filepath.Join(dir, "key"), func() time.Time { return now }, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	serial := func() int64 {
		t.Helper()
		got, err := c.get(nil)
		if err != nil {
			t.Fatal(err)
		}
		return got.Leaf.SerialNumber.Int64()
	}
	writeCertificate(t, dir, 2)
	if got := serial(); got != 1 {
		t.Errorf("%d at once: the files are looked at for every handshake", got)
	}
	now = now.Add(certificateAge)
	if got := serial(); got != 2 {
		t.Errorf("%d after a change", got)
	}
	// Half a pair: a new certificate whose key is not there yet.
	writeCertificate(t, t.TempDir(), 3)
	if err := os.WriteFile(filepath.Join(dir, "crt"), []byte("-----BEGIN"), 0o600); err != nil {
		t.Fatal(err)
	}
	now = now.Add(certificateAge)
	if got := serial(); got != 2 {
		t.Errorf("%d with a broken file", got)
	}
	if _, _, _, err := c.state(); err == nil {
		t.Error("the broken file is not told")
	}
	writeCertificate(t, dir, 4)
	now = now.Add(certificateAge)
	if got := serial(); got != 4 {
		t.Errorf("%d after the repair", got)
	}
	// A clock that was set back must not stop the looking.
	now = now.Add(-time.Hour)
	writeCertificate(t, dir, 5)
	if got := serial(); got != 5 {
		t.Errorf("%d after the clock was set back", got)
	}
}

func TestPlan(t *testing.T) {
	is := func(ns, sa, role, owner string, tags map[string]string) association.Association {
		return association.Association{ID: "a-" + ns + sa, Cluster: "c", Namespace: ns, ServiceAccount: sa, RoleARN: role, OwnerARN: owner, Tags: tags}
	}
	want := func(ns, sa, role string, tags map[string]string) AssociationSpec {
		return AssociationSpec{Namespace: ns, ServiceAccount: sa, RoleARN: role, Tags: tags}
	}
	there := []association.Association{
		is("a", "same", "r", "", map[string]string{"k": "v"}), is("a", "role", "r", "", nil), is("a", "tags", "r", "", map[string]string{"k": "v", "l": "w"}),
		is("a", "gone", "r", "", nil), is("a", "addon", "r", "owner", nil), is("a", "addon-left", "r", "owner", nil),
	}
	file := AssociationFile{Cluster: "c", Associations: []AssociationSpec{
		want("a", "same", "r", map[string]string{"k": "v"}), want("a", "role", "s", nil), want("a", "tags", "r", map[string]string{"k": "x", "m": "y"}),
		want("a", "new", "r", nil), want("a", "addon", "s", nil),
	}}
	lines := func(p Plan) (out []string) {
		for _, c := range p.Changes {
			out = append(out, c.Action+" "+c.ServiceAccount)
		}
		return out
	}
	p := makePlan(there, file, true)
	if got := strings.Join(lines(p), ", "); got != "conflict addon, create new, update role, update tags, delete gone" {
		t.Errorf("plan: %s", got)
	}
	if p.Unchanged != 1 || p.Extra != 1 || p.Failed() != 1 {
		t.Errorf("%+v", p)
	}
	if got := strings.Join(lines(makePlan(there, file, false)), ", "); strings.Contains(got, "delete") {
		t.Errorf("deletes without being asked: %s", got)
	}
}

func TestParseAssociations(t *testing.T) {
	const one = "clusterName: a\nassociations:\n- {namespace: n, serviceAccount: s, roleArn: r}\n"
	got, err := ParseAssociations([]byte("# comment\n---\n" + one + "---\n" + strings.Replace(one, ": a", ": b", 1)))
	if err != nil || len(got) != 2 || got[1].Associations[0].Cluster != "b" {
		t.Errorf("two documents: %+v, %v", got, err)
	}
	if got, err = ParseAssociations([]byte("clusterName: a\nassociations: []\n")); err != nil || len(got) != 1 {
		t.Errorf("none, and that in words: %+v, %v", got, err)
	}
	for name, text := range map[string]string{
		"no associations": "clusterName: a\n", "a list of a template": "clusterName: a\nassociations:\n",
		"nothing": "", "a comment": "# x\n", "no cluster": "associations: []\n", "no YAML": "a: [", "a member nobody knows": one + "prune: true\n",
		"no role": "clusterName: a\nassociations:\n- {namespace: n, serviceAccount: s}\n", "twice": one + "- {namespace: n, serviceAccount: s, roleArn: q}\n",
		"two documents of a cluster": one + "---\n" + one, "another cluster's": one + "- {clusterName: b, namespace: n, serviceAccount: t, roleArn: q}\n",
	} {
		if _, err := ParseAssociations([]byte(text)); !errors.Is(err, ErrConfig) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzParseAssociations(f *testing.F) {
	f.Add([]byte("clusterName: a\nassociations:\n- {namespace: n, serviceAccount: s, roleArn: r, tags: {a: b}}\n---\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		files, err := ParseAssociations(data)
		if err == nil && len(files) == 0 {
			t.Fatal("nothing, and no error")
		}
	})
}

func TestLoopback(t *testing.T) {
	for address, want := range map[string]bool{
		"127.0.0.1:1": true, "127.9.9.9:1": true, "[::1]:1": true, "localhost:1": true, "[::ffff:127.0.0.1]:1": true,
		"0.0.0.0:1": false, "[::]:1": false, ":1": false, "10.0.0.1:1": false, "localhost.example:1": false, "127.0.0.1": false, "": false,
	} {
		if got := loopback(address); got != want {
			t.Errorf("%q: %v", address, got)
		}
	}
}

// A record that cannot be written is counted; the next one is tried again.
func TestAuditFailure(t *testing.T) {
	var log bytes.Buffer
	w := &brokenWriter{broken: true}
	a := &auditLog{log: slog.New(slog.NewTextHandler(&log, nil)), w: w}
	a.Write(map[string]int{"n": 1})
	a.Write(map[string]int{"n": 2})
	w.broken = false
	a.Write(map[string]int{"n": 3})
	if a.failed.Load() != 2 || a.written.Load() != 1 || w.String() != "{\"n\":3}\n" {
		t.Errorf("%d lost, %d written: %q", a.failed.Load(), a.written.Load(), w.String())
	}
	if n := strings.Count(log.String(), "could not be written"); n != 1 {
		t.Errorf("told %d times, want once", n)
	}
}

type brokenWriter struct {
	bytes.Buffer
	broken bool
}

func (w *brokenWriter) Write(p []byte) (int, error) {
	if w.broken {
		return 0, errors.New("no space left")
	}
	return w.Buffer.Write(p)
}

func TestPeerLimit(t *testing.T) {
	now := time.Unix(1000, 0)
	l := newPeerLimit(http.NotFoundHandler(), func() time.Time { return now })
	a, neighbour, other := netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::ffff"), netip.MustParseAddr("2001:db8:0:1::1")
	for range peerBurst {
		if !l.allow(a) {
			t.Fatal("refused within the burst")
		}
	}
	if l.allow(neighbour) {
		t.Error("another address of the same network has a limit of its own")
	}
	if !l.allow(other) {
		t.Error("another network shares the limit")
	}
	w := httptest.NewRecorder()
	r := httptest.NewRequest(http.MethodPost, "/", nil)
	r.RemoteAddr = "[2001:db8::1]:1"
	l.ServeHTTP(w, r)
	if w.Code != http.StatusTooManyRequests || w.Header().Get("X-Amzn-Errortype") != "ThrottlingException" || !json.Valid(w.Body.Bytes()) {
		t.Errorf("%d %v %s", w.Code, w.Header(), w.Body)
	}
	now = now.Add(time.Second)
	if !l.allow(a) {
		t.Error("refused after a second")
	}
}

// Refused tokens of agents have records as far as the budget of strangers goes,
// and short ones; keys that are given have theirs in any case.
func TestStrangersOfNodes(t *testing.T) {
	var out bytes.Buffer
	now := func() time.Time { return time.Unix(1000, 0) }
	s := &server{cfg: Config{Now: now}, metrics: newMetrics(&Config{}),
		audit: &auditLog{w: &out, log: slog.New(slog.DiscardHandler)}, strangers: strangers.New(strangers.Config{Now: now})}
	for range 1000 {
		s.nodeExchanged(exchange.Event{Cluster: strings.Repeat("\x01", 4000), Peer: "192.0.2.1:1", Err: exchange.ErrInvalid})
	}
	lines := strings.Count(out.String(), "\n")
	if lines == 0 || lines > 100 || out.Len() > lines*1024 || !strings.Contains(out.String(), "192.0.2.1:1") {
		t.Errorf("%d records of %d bytes", lines, out.Len())
	}
	families, err := s.metrics.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if n := f.GetMetric()[0].GetCounter().GetValue(); f.GetName() == "latchkey_server_audit_unrecorded_total" && n != float64(1000-lines) {
			t.Errorf("%v counted as left out of 1000, %d recorded", n, lines)
		}
	}
	for range 1000 {
		s.nodeExchanged(exchange.Event{Cluster: "prod", Peer: "192.0.2.1:1"})
	}
	if n := strings.Count(out.String(), "\n"); n != lines+1000 {
		t.Errorf("%d records of keys that were given", n-lines)
	}
}

// Whatever a caller makes up, no time series is made of it.
func TestMetrics(t *testing.T) {
	m := newMetrics(&Config{Version: "v", NodeBinding: NodeBindingRequire})
	m.observe(eksapi.Observation{Operation: "ListPodIdentityAssociations", Status: 200, Duration: time.Millisecond})
	m.stsCall(issuer.Call{Hop: 1, Code: "ok"})
	m.review(tokencheck.Review{Cluster: "prod", Outcome: tokencheck.OutcomeOutage, KeysAlone: true})
	m.nodes.WithLabelValues("done").Inc()
	for _, name := range []string{"prod", "x1", "x2", "x3"} {
		m.audited(eksapi.Record{Type: eksapi.TypeExchange, Cluster: name, Outcome: eksapi.OutcomeRefused}, func(c string) bool { return c == "prod" })
	}
	m.registry.MustRegister(newStoreCollector(func(context.Context) (etcd.Status, error) { return etcd.Status{QuotaBytes: 1, NoSpace: true}, nil }))
	families, err := m.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	own := families[:0]
	for _, f := range families {
		if strings.HasPrefix(f.GetName(), "latchkey_") {
			own = append(own, f)
		}
		if f.GetName() == "latchkey_server_exchanges_total" && len(f.GetMetric()) != 2 {
			t.Errorf("%d series of exchanges, want prod's and one for the unknown: %v", len(f.GetMetric()), f.GetMetric())
		}
	}
	problems, err := promlint.NewWithMetricFamilies(own).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

func TestConfigIsChecked(t *testing.T) {
	good := func() Config {
		return Config{
			StateDir: "/var/lib/x", Listen: DefaultListen, SessionDuration: time.Hour, NodeBinding: NodeBindingRequire, AuditLog: AuditDefault,
			AuditSize: 1, StoreQuota: 1, Logger: slog.New(slog.DiscardHandler),
		}
	}
	c := good()
	if err := c.check(); err != nil {
		t.Fatal(err)
	}
	if c.AdminSocket != "/var/lib/x/admin.sock" || c.Users != "/var/lib/x/users.yaml" || c.AuditLog != "/var/lib/x/audit.jsonl" {
		t.Errorf("%+v", c)
	}
	for name, change := range map[string]func(*Config){
		"relative state directory": func(c *Config) { c.StateDir = "x" },
		"plain HTTP":               func(c *Config) { c.Listen = "10.0.0.1:1" },
		"no port":                  func(c *Config) { c.Listen = "127.0.0.1" },
		"key without certificate":  func(c *Config) { c.TLSKey = "k" },
		"long socket":              func(c *Config) { c.AdminSocket = "/" + strings.Repeat("s", 200) },
		"session of a day":         func(c *Config) { c.SessionDuration = 24 * time.Hour },
		"session of a fraction":    func(c *Config) { c.SessionDuration = time.Hour + time.Millisecond },
		"node binding":             func(c *Config) { c.NodeBinding = "" },
		"traces":                   func(c *Config) { c.TracesEndpoint = "collector:4317" },
		"limit below none":         func(c *Config) { c.MaxReads = -2 },
		"limit that is no number":  func(c *Config) { c.MaxWrites = math.NaN() },
		"limit without end":        func(c *Config) { c.MaxExchanges = math.Inf(1) },
		"cluster without a region": func(c *Config) {
			c.Clusters = []ClusterSpec{{Name: "a", Account: "1", Issuers: []string{"i"}, Keys: signer(t, "ES256").JWKS()}}
		},
		"cluster twice": func(c *Config) {
			one := ClusterSpec{Name: "a", Region: "r", Account: "1", Issuers: []string{"i"}, Keys: signer(t, "ES256").JWKS()}
			c.Clusters = []ClusterSpec{one, one}
		},
	} {
		c := good()
		change(&c)
		if err := c.check(); !errors.Is(err, ErrConfig) {
			t.Errorf("%s: %v", name, err)
		}
	}
	c = good()
	c.MaxReads, c.MaxWrites = 0.01, NoLimit
	if err := c.check(); err != nil {
		t.Fatal(err)
	}
	if got, want := c.limits(), (eksapi.Limits{Reads: eksapi.Rate{PerSecond: 0.01, Burst: 1}, Writes: eksapi.Rate{PerSecond: -1, Burst: 1}, Exchanges: eksapi.Rate{PerSecond: 200, Burst: 1000}}); got != want {
		t.Errorf("limits %+v, want %+v", got, want)
	}
	for endpoint, warned := range map[string]bool{"http://minio:9000": true, "http://127.0.0.1:9000": false, "https://sts.example": false} {
		c := good()
		c.STSEndpoint = endpoint
		if err := c.check(); err != nil || (len(c.warnings()) > 0) != warned {
			t.Errorf("%s: %v, %q", endpoint, err, c.warnings())
		}
	}
	c = good()
	c.Listen, c.InsecureHTTP = "10.0.0.1:1", true
	if err := c.check(); err != nil || len(c.warnings()) == 0 {
		t.Errorf("forced plain HTTP: %v, %q", err, c.warnings())
	}
}
