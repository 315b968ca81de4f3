// SPDX-License-Identifier: Apache-2.0

package satoken

import (
	"bytes"
	"context"
	"crypto/elliptic"
	"encoding/json"
	"errors"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
	"github.com/latchkey-dev/latchkey/test/standin/tokens"
)

func testNow() time.Time { return time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC) }

// testSigners makes each key once: RSA keys take long.
var testSigners = struct {
	sync.Mutex
	made map[string]*tokens.Signer
}{made: map[string]*tokens.Signer{}}

// signer returns a signer of the algorithm; name tells several apart.
func signer(t testing.TB, algorithm, name string) *tokens.Signer {
	t.Helper()
	testSigners.Lock()
	defer testSigners.Unlock()
	key := algorithm + " " + name
	if testSigners.made[key] == nil {
		s, err := tokens.NewSigner(tokens.Config{Algorithm: algorithm, Now: testNow})
		if err != nil {
			t.Fatal(err)
		}
		testSigners.made[key] = s
	}
	return testSigners.made[key]
}

func keySet(t testing.TB, issuer string, document []byte) *KeySet {
	t.Helper()
	set, err := ParseKeySet(issuer, document)
	if err != nil {
		t.Fatal(err)
	}
	return set
}

func verifier(t testing.TB, cfg Config) *Verifier {
	t.Helper()
	if cfg.Now == nil {
		cfg.Now = testNow
	}
	v, err := NewVerifier(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func parser(t testing.TB, cfg Config) *Parser {
	t.Helper()
	cfg.Now = testNow
	p, err := NewParser(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// incident is one file of testdata/tokens: how the token differs from a good
// one, and what must be said about it.
type incident struct {
	Why string `json:"why"`

	Raw              *string          `json:"raw"`
	RawHeader        string           `json:"raw_header"`
	RawPayload       string           `json:"raw_payload"`
	RawPayloadSuffix string           `json:"raw_payload_suffix"`
	Header           map[string]any   `json:"header"`
	Set              map[string]any   `json:"set"`
	SetKubernetes    map[string]any   `json:"set_kubernetes"`
	Times            map[string]int64 `json:"times"` // claim to seconds from now
	NoPod            bool             `json:"no_pod"`
	Deep             int              `json:"deep"`
	Many             int              `json:"many"`
	Replace          [][3]string      `json:"replace"` // part, old, new
	Sign             string           `json:"sign"`
	Spell            []string         `json:"spell"`

	Reason            evidence.Reason  `json:"reason"`
	ReasonWithoutKeys *evidence.Reason `json:"reason_without_keys"` // nil: the same
	Message           string           `json:"message"`
}

// token makes the token of an incident, signed by s. other is another cluster's
// signer.
func (in incident) token(t *testing.T, s, other *tokens.Signer) string {
	t.Helper()
	if in.Raw != nil {
		return *in.Raw
	}
	c := tokens.Claims{Header: in.Header, Set: map[string]any{}, SetKubernetes: in.SetKubernetes, NoPod: in.NoPod}
	for name, value := range in.Set {
		c.Set[name] = value
	}
	for name, seconds := range in.Times {
		c.Set[name] = testNow().Unix() + seconds
	}
	header, payload := s.Header(c), s.Payload(c)
	for _, r := range in.Replace {
		part := map[string]*[]byte{"header": &header, "payload": &payload}[r[0]]
		if !bytes.Contains(*part, []byte(r[1])) {
			t.Fatalf("%s has no %s", *part, r[1])
		}
		*part = bytes.Replace(*part, []byte(r[1]), []byte(r[2]), 1)
	}
	if in.RawHeader != "" {
		header = []byte(in.RawHeader)
	}
	if in.RawPayload != "" {
		payload = []byte(in.RawPayload)
	}
	if in.Deep > 0 {
		nested := strings.Repeat("[", in.Deep) + strings.Repeat("]", in.Deep)
		payload = bytes.Replace(payload, []byte("{"), []byte(`{"deep":`+nested+`,`), 1)
	}
	if in.Many > 0 {
		payload = bytes.Replace(payload, []byte("{"), []byte(`{"many":[0`+strings.Repeat(",0", in.Many)+`],`), 1)
	}
	payload = append(payload, in.RawPayloadSuffix...)
	// JSON cannot carry a broken byte; the file has U+FFFD for it.
	payload = bytes.ReplaceAll(payload, []byte("\ufffd"), []byte{0xff})

	return in.spell(t, in.sign(t, s, other, header, payload))
}

func (in incident) sign(t *testing.T, s, other *tokens.Signer, header, payload []byte) string {
	t.Helper()
	good := s.Sign(header, payload)
	signature, oops := decodeSegment(good[strings.LastIndex(good, ".")+1:])
	if oops != nil {
		t.Fatal(oops)
	}
	switch in.Sign {
	case "":
		return good
	case "none":
		return tokens.Assemble(header, payload, nil)
	case "hs256-public-key":
		return tokens.SignHMAC(header, payload, s.PEM())
	case "other-key":
		return other.Sign(header, payload)
	case "flip":
		signature[len(signature)/2] ^= 1
	case "short":
		signature = signature[:len(signature)/2]
	case "zero":
		clear(signature)
	case "payload-changed":
		uid, stolen := tokens.UID("pod", "default", "default-0"), tokens.UID("pod", "default", "victim-0")
		payload = bytes.Replace(payload, []byte(uid), []byte(stolen), 1)
	default:
		t.Fatalf("unknown way to sign: %s", in.Sign)
	}
	return tokens.Assemble(header, payload, signature)
}

func (in incident) spell(t *testing.T, token string) string {
	t.Helper()
	if in.Sign == "none" {
		token += "AAAA" // the empty signature has a case of its own
	}
	for _, change := range in.Spell {
		verb, text, _ := strings.Cut(change, ":")
		switch verb {
		case "append":
			token += text
		case "prepend":
			token = text + token
		case "pad-to":
			token += strings.Repeat("A", MaxTokenSize+1-len(token))
		case "drop-signature-segment":
			token = token[:strings.LastIndex(token, ".")]
		case "empty-signature":
			token = token[:strings.LastIndex(token, ".")+1]
		case "insert-newline":
			token = token[:10] + "\n" + token[10:]
		case "unused-bits":
			token = otherSpelling(t, token)
		default:
			t.Fatalf("unknown way to spell: %s", change)
		}
	}
	return token
}

const base64url = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"

// otherSpelling sets an unused bit of the last character.
func otherSpelling(t testing.TB, token string) string {
	t.Helper()
	if n := (len(token) - strings.LastIndex(token, ".") - 1) % 4; n != 2 && n != 3 {
		t.Fatalf("signature has no unused bits: %d", n)
	}
	last := strings.IndexByte(base64url, token[len(token)-1])
	return token[:len(token)-1] + string(base64url[last^1])
}

func loadIncidents(t testing.TB) map[string]incident {
	t.Helper()
	files, err := filepath.Glob("testdata/tokens/*.json")
	if err != nil || len(files) == 0 {
		t.Fatalf("no incidents: %v", err)
	}
	out := map[string]incident{}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var in incident
		decoder := json.NewDecoder(bytes.NewReader(data))
		decoder.DisallowUnknownFields()
		if err := decoder.Decode(&in); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		if in.Why == "" {
			t.Fatalf("%s does not say why", file)
		}
		out[strings.TrimSuffix(filepath.Base(file), ".json")] = in
	}
	return out
}

func TestIncidents(t *testing.T) {
	s, other := signer(t, "RS256", "cluster"), signer(t, "RS256", "other")
	v := verifier(t, Config{Issuers: []string{tokens.DefaultIssuer}, Keys: keySet(t, "", s.JWKS())})
	p := parser(t, Config{Issuers: []string{tokens.DefaultIssuer}})
	for name, in := range loadIncidents(t) {
		t.Run(name, func(t *testing.T) {
			raw := in.token(t, s, other)
			got, err := v.Verify(t.Context(), raw)
			checkRefusal(t, raw, err, in.Reason, in.Message)
			if err == nil && !got.Verified {
				t.Error("accepted, but not verified")
			}

			want := in.Reason
			if in.ReasonWithoutKeys != nil {
				want = *in.ReasonWithoutKeys
			}
			unverified, err := p.ParseUnverified(raw)
			checkRefusal(t, raw, err, want, "")
			if unverified.Verified {
				t.Error("verified without keys")
			}
			if unverified.Verified = got.Verified; got.Verified && unverified != got {
				t.Errorf("without keys %+v\nwith keys %+v", unverified, got)
			}
		})
	}
}

// checkRefusal checks an error of ours: its reason, its sentinel, its text, and
// that nothing of the token is in it.
func checkRefusal(t *testing.T, raw string, err error, reason evidence.Reason, message string) {
	t.Helper()
	if reason == "" {
		if err != nil {
			t.Fatalf("refused: %v", err)
		}
		return
	}
	var refused *Error
	if !errors.As(err, &refused) {
		t.Fatalf("error %v, want %s", err, reason)
	}
	if refused.Reason() != reason {
		t.Errorf("reason %s, want %s (%v)", refused.Reason(), reason, err)
	}
	if !errors.Is(err, sentinel(reason)) {
		t.Errorf("%v does not match its sentinel", err)
	}
	if refused.Retriable() != (reason == evidence.ReasonKeysUnavailable) {
		t.Errorf("retriable: %v", refused.Retriable())
	}
	if message != "" && refused.Message() != message {
		t.Errorf("message %q, want %q", refused.Message(), message)
	}
	for _, part := range strings.Split(raw, ".") {
		if len(part) > 8 && (strings.Contains(refused.Message(), part[:8]) || strings.Contains(err.Error(), part[:8])) {
			t.Errorf("the error quotes the token: %v", err)
		}
	}
}

func TestVerifyReturnsTheClaims(t *testing.T) {
	for _, algorithm := range []string{"RS256", "ES256", "ES384", "ES512"} {
		t.Run(algorithm, func(t *testing.T) {
			s := signer(t, algorithm, "cluster")
			v := verifier(t, Config{Keys: keySet(t, s.Issuer(), s.JWKS())})
			got, err := v.Verify(t.Context(), s.Token(tokens.Claims{
				Namespace: "web", ServiceAccount: "api", Pod: "api-5c9f7", Node: "worker-3", ID: "some-jti",
			}))
			if err != nil {
				t.Fatal(err)
			}
			want := evidence.Token{
				Subject: evidence.Subject{
					PodUID: evidence.PodUID(tokens.UID("pod", "web", "api-5c9f7")), Namespace: "web", ServiceAccount: "api",
				},
				PodName: "api-5c9f7", Node: "worker-3", JTI: "some-jti",
				ServiceAccountUID: tokens.UID("serviceaccount", "web", "api"), NodeUID: tokens.UID("node", "worker-3"),
				Expiry: testNow().Add(24 * time.Hour), Verified: true, ID: got.ID,
			}
			if got != want {
				t.Errorf("got %+v\nwant %+v", got, want)
			}
			if got.ID == [32]byte{} {
				t.Error("no ID")
			}
		})
	}
}

// Any signature (r, s) of an elliptic-curve key has a twin (r, n-s) that
// everybody can compute: the same token must not become two.
func TestMalleatedSignatureIsTheSameToken(t *testing.T) {
	s := signer(t, "ES256", "cluster")
	v := verifier(t, Config{Keys: keySet(t, s.Issuer(), s.JWKS())})
	raw := s.Token(tokens.Claims{})
	dot := strings.LastIndex(raw, ".")
	signature, refused := decodeSegment(raw[dot+1:])
	if refused != nil {
		t.Fatal(refused)
	}
	twin := new(big.Int).Sub(elliptic.P256().Params().N, new(big.Int).SetBytes(signature[32:]))
	twin.FillBytes(signature[32:])
	respelled := raw[:dot+1] + encodeSegment(signature)
	if respelled == raw {
		t.Fatal("not another spelling")
	}
	first, err := v.Verify(t.Context(), raw)
	if err != nil {
		t.Fatal(err)
	}
	second, err := v.Verify(t.Context(), respelled)
	if err != nil {
		t.Fatal(err)
	}
	if first != second {
		t.Errorf("two tokens: %+v, %+v", first, second)
	}
}

func encodeSegment(b []byte) string {
	whole := tokens.Assemble([]byte{0}, []byte{0}, b)
	return whole[strings.LastIndex(whole, ".")+1:]
}

func TestIdentityTellsTokensApart(t *testing.T) {
	ids := map[[32]byte]string{}
	for _, parts := range [][2]string{{"ab", "c"}, {"a", "bc"}, {"abc", ""}, {"", "abc"}, {"ab", "d"}} {
		id := identity([]byte(parts[0]), []byte(parts[1]))
		if other, there := ids[id]; there {
			t.Errorf("%q and %s have the same identity", parts, other)
		}
		ids[id] = parts[0] + "|" + parts[1]
	}
}

func TestIssuers(t *testing.T) {
	s := signer(t, "ES256", "cluster")
	const first, second, third = "https://one.example", "https://two.example", "https://three.example"
	for name, tc := range map[string]struct {
		accepted []string
		named    string // by the keys
		issuer   string
		want     evidence.Reason
	}{
		"listed":                    {accepted: []string{first, second}, issuer: second},
		"listed, keys name another": {accepted: []string{first}, named: third, issuer: first},
		"not listed":                {accepted: []string{first, second}, issuer: third, want: evidence.ReasonTokenIssuer},
		"named by keys, not listed": {accepted: []string{first}, named: third, issuer: third, want: evidence.ReasonTokenIssuer},
		"named by keys":             {named: first, issuer: first},
		"not named by keys":         {named: first, issuer: second, want: evidence.ReasonTokenIssuer},
	} {
		t.Run(name, func(t *testing.T) {
			v := verifier(t, Config{Issuers: tc.accepted, Keys: keySet(t, tc.named, s.JWKS())})
			raw := s.Token(tokens.Claims{Issuer: tc.issuer})
			_, err := v.Verify(t.Context(), raw)
			checkRefusal(t, raw, err, tc.want, "")
		})
	}
	t.Run("parser accepts any", func(t *testing.T) {
		if _, err := parser(t, Config{}).ParseUnverified(s.Token(tokens.Claims{Issuer: third})); err != nil {
			t.Error(err)
		}
	})
}

func TestLeewayCanBeNone(t *testing.T) {
	s := signer(t, "ES256", "cluster")
	v := verifier(t, Config{Leeway: -1, Keys: keySet(t, s.Issuer(), s.JWKS())})
	for name, tc := range map[string]struct {
		claims tokens.Claims
		want   evidence.Reason
	}{
		"last second": {claims: tokens.Claims{Expiry: testNow().Add(time.Second)}},
		"over":        {claims: tokens.Claims{Expiry: testNow()}, want: evidence.ReasonTokenExpired},
		"just begun":  {claims: tokens.Claims{IssuedAt: testNow()}},
		"too early":   {claims: tokens.Claims{IssuedAt: testNow().Add(time.Second)}, want: evidence.ReasonTokenNotYetValid},
	} {
		t.Run(name, func(t *testing.T) {
			raw := s.Token(tc.claims)
			_, err := v.Verify(t.Context(), raw)
			checkRefusal(t, raw, err, tc.want, "")
		})
	}
}

// brokenSource fails in a way of its own.
type brokenSource struct{ err error }

func (b brokenSource) Lookup(context.Context, string, string) (Key, error) { return Key{}, b.err }
func (b brokenSource) NamesIssuer() bool                                   { return true }

// What is not certain must never look like a bad token: the client would throw
// good credentials away.
func TestUncertainIsRetriable(t *testing.T) {
	s := signer(t, "ES256", "cluster")
	raw := s.Token(tokens.Claims{})
	cause := errors.New("dial tcp 10.96.0.1:443: connection refused")
	for _, err := range []error{cause, context.DeadlineExceeded, ErrKeysUnavailable} {
		_, got := verifier(t, Config{Keys: brokenSource{err}}).Verify(t.Context(), raw)
		checkRefusal(t, raw, got, evidence.ReasonKeysUnavailable, "Service account token cannot be verified: keys are unavailable, try again")
		if !errors.Is(got, err) {
			t.Errorf("%v hides %v", got, err)
		}
	}
}

func TestConfigIsChecked(t *testing.T) {
	set := keySet(t, "", signer(t, "ES256", "cluster").JWKS())
	if _, err := NewVerifier(Config{}); err == nil {
		t.Error("a verifier without keys")
	}
	if _, err := NewVerifier(Config{Keys: set}); err == nil {
		t.Error("a verifier that accepts every issuer")
	}
	if _, err := NewVerifier(Config{Keys: set, Issuers: []string{""}}); err == nil {
		t.Error("an empty issuer")
	}
	if _, err := NewParser(Config{Keys: set}); err == nil {
		t.Error("a parser that ignores its keys")
	}
}

func TestEveryReasonHasASentinel(t *testing.T) {
	seen := []error{}
	for _, reason := range []evidence.Reason{
		evidence.ReasonTokenMissing, evidence.ReasonTokenTooLarge, evidence.ReasonTokenMalformed,
		evidence.ReasonTokenAlgorithm, evidence.ReasonTokenUnknownKey, evidence.ReasonTokenSignature,
		evidence.ReasonTokenIssuer, evidence.ReasonTokenAudience, evidence.ReasonTokenExpired,
		evidence.ReasonTokenNotYetValid, evidence.ReasonTokenUnbound, evidence.ReasonKeysUnavailable,
	} {
		s := sentinel(reason)
		if s == nil || slices.Contains(seen, s) {
			t.Errorf("%s: sentinel %v", reason, s)
		}
		seen = append(seen, s)
	}
	if errors.Is(refuse("something_else", ""), nil) {
		t.Error("an unknown reason matches nil")
	}
}

func TestShape(t *testing.T) {
	for text, want := range map[string][2]int{
		`1`: {0, 0}, `{}`: {1, 0}, `{"a":[{}]}`: {3, 0}, `["[[[,["]`: {1, 0}, `["\",[["]`: {1, 0},
		`["\\",[]]`: {2, 1}, `[[],[],[]]`: {2, 2}, `{"a,":1,"b":[1,2]}`: {2, 2},
	} {
		if nesting, commas := shape([]byte(text)); nesting != want[0] || commas != want[1] {
			t.Errorf("%s: %d, %d, want %v", text, nesting, commas, want)
		}
	}
}

func TestNames(t *testing.T) {
	for name, want := range map[string]bool{
		"a": true, "a-b": true, "a.b": true, "0": true, "a--b": true, strings.Repeat("a", 253): true,
		"": false, "-a": false, "a-": false, ".a": false, "a.": false, "a..b": false, "a.-b": false, "a-.b": false,
		"A": false, "a_b": false, "a/b": false, "a\x00": false, "ä": false, strings.Repeat("a", 254): false,
	} {
		if got := isSubdomain(name); got != want {
			t.Errorf("%q: %v", name, got)
		}
	}
	for uid, want := range map[string]bool{
		"b2c5d0b1-0000-4000-8000-000000000002": true, "b2c5d0b100004000800000000000000a": true,
		"b2c5d0b1-0000-4000-8000-00000000000": false, "b2c5d0b1_0000_4000_8000_000000000002": false,
		"b2c5d0b10-000-4000-8000-000000000002": false, "b2c5d0b100004000800000000000000-": false, "": false,
	} {
		if got := isUID(uid); got != want {
			t.Errorf("%q: %v", uid, got)
		}
	}
}

func BenchmarkVerify(b *testing.B) {
	for _, algorithm := range []string{"RS256", "ES256"} {
		b.Run(algorithm, func(b *testing.B) {
			s := signer(b, algorithm, "cluster")
			v := verifier(b, Config{Keys: keySet(b, s.Issuer(), s.JWKS())})
			raw := s.Token(tokens.Claims{})
			b.ReportAllocs()
			for b.Loop() {
				if _, err := v.Verify(b.Context(), raw); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkParse(b *testing.B) {
	s := signer(b, "RS256", "cluster")
	good := s.Token(tokens.Claims{})
	many := map[string]any{}
	for i := range 1100 {
		many["a"+string(rune('a'+i%26))+string(rune('a'+i/26%26))+string(rune('a'+i/676))] = 1
	}
	for name, raw := range map[string]string{
		"Good": good,
		"Junk": strings.Repeat("A", 1200),
		// The most that one refused request can cost.
		"ManyClaims": s.Token(tokens.Claims{Set: many}),
	} {
		b.Run(name, func(b *testing.B) {
			if len(raw) > MaxTokenSize {
				b.Fatal("too large to be read at all")
			}
			p := parser(b, Config{})
			b.ReportAllocs()
			for b.Loop() {
				_, _ = p.ParseUnverified(raw)
			}
		})
	}
}
