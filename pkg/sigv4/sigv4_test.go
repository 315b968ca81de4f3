// SPDX-License-Identifier: Apache-2.0

package sigv4_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"

	"github.com/latchkey-dev/latchkey/pkg/sigv4"
)

var now = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)

const (
	accessKey = "LKIAEXAMPLE"
	secretKey = "a secret that nobody must see"
	region    = "eu-central-1"
)

// fakeKeys is a source of keys for tests.
type fakeKeys map[string]fakeKey

type fakeKey struct {
	key   sigv4.Key
	token string
	err   error
}

func (f fakeKeys) Lookup(_ context.Context, id, token string) (sigv4.Key, error) {
	k, ok := f[id]
	if !ok || k.token != token {
		return sigv4.Key{}, sigv4.ErrUnknownKey
	}
	return k.key, k.err
}

var errStore = errors.New("the store of keys is away")

func keys() fakeKeys {
	return fakeKeys{
		accessKey: {key: sigv4.Key{Secret: secretKey, Principal: "ops"}},
		"SESSION": {key: sigv4.Key{Secret: "session secret", Principal: "node"}, token: "sess/ion+token=="},
		"EXPIRED": {key: sigv4.Key{Secret: secretKey, Principal: "gone"}, err: sigv4.ErrExpiredKey},
		"NOTOLD":  {err: sigv4.ErrExpiredKey},
		"EMPTY":   {key: sigv4.Key{Principal: "nobody"}},
		"BROKEN":  {err: errStore},
	}
}

func verifier(t testing.TB) *sigv4.Verifier {
	t.Helper()
	v, err := sigv4.New(sigv4.Config{Keys: keys(), Now: func() time.Time { return now }})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// signed makes a request as it arrives at a server, signed by the SDK.
type signed struct {
	method, url, body  string
	header             http.Header
	id, secret, token  string
	service, region    string
	at                 time.Time
	hash               string
	change             func(*http.Request) // before it is signed
	tamper             func(*http.Request) // after
	wire               func([]byte) []byte // on the wire
	bodyAfter          func(string) string // body that arrives
	options            func(*v4.SignerOptions)
	presign, doNotSign bool
}

func (s signed) arrive(t testing.TB) (*http.Request, []byte) {
	t.Helper()
	def := func(p *string, v string) {
		if *p == "" {
			*p = v
		}
	}
	def(&s.method, http.MethodPost)
	def(&s.url, "http://latchkey.example:8080/clusters/prod/pod-identity-associations")
	def(&s.id, accessKey)
	def(&s.secret, secretKey)
	def(&s.service, "eks")
	def(&s.region, region)
	if s.at.IsZero() {
		s.at = now
	}
	r, err := http.NewRequest(s.method, s.url, strings.NewReader(s.body))
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range s.header {
		r.Header[k] = v
	}
	if s.change != nil {
		s.change(r)
	}
	sum := sha256.Sum256([]byte(s.body))
	def(&s.hash, hex.EncodeToString(sum[:]))
	credentials := aws.Credentials{AccessKeyID: s.id, SecretAccessKey: s.secret, SessionToken: s.token}
	signer := v4.NewSigner()
	switch {
	case s.doNotSign:
	case s.presign:
		u, _, err := signer.PresignHTTP(t.Context(), credentials, r, s.hash, s.service, s.region, s.at)
		if err != nil {
			t.Fatal(err)
		}
		r, _ = http.NewRequest(s.method, u, strings.NewReader(s.body))
	default:
		options := func(*v4.SignerOptions) {}
		if s.options != nil {
			options = s.options
		}
		if err := signer.SignHTTP(t.Context(), credentials, r, s.hash, s.service, s.region, s.at, options); err != nil {
			t.Fatal(err)
		}
	}
	if s.tamper != nil {
		s.tamper(r)
	}
	var wire bytes.Buffer
	if err := r.Write(&wire); err != nil {
		t.Fatal(err)
	}
	b := wire.Bytes()
	if s.wire != nil {
		b = s.wire(b)
	}
	got, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(b)))
	if err != nil {
		t.Fatalf("read request: %v\n%s", err, b)
	}
	got = got.WithContext(t.Context())
	body, err := io.ReadAll(got.Body)
	if err != nil {
		t.Fatal(err)
	}
	if s.bodyAfter != nil {
		body = []byte(s.bodyAfter(string(body)))
	}
	return got, body
}

func TestVerifyAcceptsWhatTheSDKSigns(t *testing.T) {
	for name, s := range map[string]signed{
		"plain":            {body: `{"namespace":"web"}`},
		"get":              {method: http.MethodGet},
		"empty path":       {method: http.MethodGet, url: "http://latchkey.example"},
		"escaped path":     {url: "http://latchkey.example/tags/arn%3Aaws%3Aeks%3Aeu-central-1%3A111122223333%3Apodidentityassociation%2Fprod%2Fa-1"},
		"unescaped path":   {url: "http://latchkey.example/tags/arn:aws:eks:eu-central-1:111122223333:podidentityassociation/prod/a-1"},
		"odd path":         {url: "http://latchkey.example/a%20b/c+d/%e4%b8%ad/~x/;y/@z/'"},
		"double slash":     {url: "http://latchkey.example//a//b/"},
		"dots":             {url: "http://latchkey.example/a/../b/./c"},
		"query":            {method: http.MethodGet, url: "http://latchkey.example/x?namespace=web&maxResults=5"},
		"query no value":   {method: http.MethodGet, url: "http://latchkey.example/x?a&b=&c==d"},
		"query repeated":   {method: http.MethodDelete, url: "http://latchkey.example/x?tagKeys=b&tagKeys=a&tagKeys=a%20b&tagKeys=c%2Fd&tagKeys=c-d"},
		"query unicode":    {method: http.MethodGet, url: "http://latchkey.example/x?k=%E4%B8%AD%20%2B%26%3D&%C3%A9=1&e=2"},
		"query plus":       {method: http.MethodGet, url: "http://latchkey.example/x?k=a+b"},
		"query empty part": {method: http.MethodGet, url: "http://latchkey.example/x?&a=1&&b=2&"},
		"session token":    {id: "SESSION", secret: "session secret", token: "sess/ion+token=="},
		"declared hash":    {body: "x", header: http.Header{"X-Amz-Content-Sha256": {hexSum("x")}}},
		"many values":      {header: http.Header{"X-Amz-Thing": {"a", " b   c ", ""}}},
		"spaces in values": {header: http.Header{"Thing": {"  a   b  "}}},
		"service eks-auth": {service: "eks-auth"},
		"older":            {at: now.Add(-5 * time.Minute)},
		"newer":            {at: now.Add(5 * time.Minute)},
		"default port":     {url: "http://latchkey.example:80/x"},
		"unsigned header added on the way": {tamper: func(r *http.Request) {
			r.Header.Set("X-Forwarded-For", "192.0.2.1")
			r.Header.Set("X-Amzn-Trace-Id", "Root=1")
		}},
	} {
		t.Run(name, func(t *testing.T) {
			r, body := s.arrive(t)
			service := s.service
			if service == "" {
				service = "eks"
			}
			got, err := verifier(t).Verify(r, body, service)
			if err != nil {
				t.Fatal(err)
			}
			want := sigv4.Result{AccessKeyID: accessKey, Principal: "ops", Region: region, Time: now}
			if s.id != "" {
				want.AccessKeyID, want.Principal = "SESSION", "node"
			}
			if !s.at.IsZero() {
				want.Time = s.at
			}
			if got != want {
				t.Errorf("got %+v, want %+v", got, want)
			}
		})
	}
}

func hexSum(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:])
}

func authorization(change func(string) string) func(*http.Request) {
	return func(r *http.Request) { r.Header.Set("Authorization", change(r.Header.Get("Authorization"))) }
}

func replace(old, new string) func(*http.Request) {
	return authorization(func(s string) string {
		if !strings.Contains(s, old) {
			panic("nothing to replace: " + old + " in " + s)
		}
		return strings.ReplaceAll(s, old, new)
	})
}

func TestVerifyRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		signed
		want error
	}{
		"no signature":         {signed{doNotSign: true}, sigv4.ErrMissing},
		"bearer":               {signed{tamper: authorization(func(string) string { return "Bearer x" })}, sigv4.ErrMissing},
		"empty authorization":  {signed{tamper: authorization(func(string) string { return "" })}, sigv4.ErrMissing},
		"presigned":            {signed{presign: true}, sigv4.ErrPresigned},
		"presigned and signed": {signed{url: "http://latchkey.example/x?X-Amz-Signature=00"}, sigv4.ErrPresigned},
		"presigned, disguised": {signed{url: "http://latchkey.example/x?%58-amz-Credential=00"}, sigv4.ErrPresigned},
		"token in the query":   {signed{url: "http://latchkey.example/x?X-Amz-Security-Token=00"}, sigv4.ErrPresigned},
		"two authorizations":   {signed{tamper: func(r *http.Request) { r.Header.Add("Authorization", r.Header.Get("Authorization")) }}, sigv4.ErrIncomplete},
		"asymmetric":           {signed{tamper: replace("AWS4-HMAC-SHA256", "AWS4-ECDSA-P256-SHA256")}, sigv4.ErrIncomplete},
		"long":                 {signed{tamper: replace("Signature=", strings.Repeat(" ", sigv4.MaxAuthorization)+"Signature=")}, sigv4.ErrIncomplete},
		"no credential":        {signed{tamper: replace("Credential=", "Credentials=")}, sigv4.ErrIncomplete},
		"no signature field":   {signed{tamper: authorization(func(s string) string { return s[:strings.LastIndex(s, ",")] })}, sigv4.ErrIncomplete},
		"credential twice":     {signed{tamper: authorization(func(s string) string { return s + ", Credential=x" })}, sigv4.ErrIncomplete},
		"unknown field":        {signed{tamper: authorization(func(s string) string { return s + ", Foo=x" })}, sigv4.ErrIncomplete},
		"short scope":          {signed{tamper: replace("/eks/", "/")}, sigv4.ErrIncomplete},
		"long scope":           {signed{tamper: replace("/eks/", "/eks/eks/")}, sigv4.ErrIncomplete},
		"other terminator":     {signed{tamper: replace("aws4_request", "aws5_request")}, sigv4.ErrIncomplete},
		"odd access key":       {signed{tamper: replace("Credential="+accessKey, "Credential=LKIA EXAMPLE")}, sigv4.ErrIncomplete},
		"no access key":        {signed{tamper: replace("Credential="+accessKey, "Credential=")}, sigv4.ErrIncomplete},
		"odd region":           {signed{tamper: replace(region, "eu_central\n")}, sigv4.ErrIncomplete},
		"signature cut":        {signed{tamper: authorization(func(s string) string { return s[:len(s)-2] })}, sigv4.ErrIncomplete},
		"signature upper case": {signed{tamper: authorization(func(s string) string { i := strings.LastIndex(s, "=") + 1; return s[:i] + strings.ToUpper(s[i:]) })}, sigv4.ErrIncomplete},
		"signature not hex":    {signed{tamper: authorization(func(s string) string { return s[:len(s)-2] + "zz" })}, sigv4.ErrIncomplete},
		"headers out of order": {signed{tamper: replace("host;x-amz-date", "x-amz-date;host")}, sigv4.ErrIncomplete},
		"header twice":         {signed{tamper: replace("host;", "host;host;")}, sigv4.ErrIncomplete},
		"no signed headers": {signed{tamper: authorization(func(s string) string {
			i := strings.Index(s, "SignedHeaders=")
			return s[:i] + "SignedHeaders=" + s[strings.LastIndex(s, ", "):]
		})}, sigv4.ErrIncomplete},
		"too many headers":       {signed{tamper: replace("host;", "host;"+manyHeaders())}, sigv4.ErrIncomplete},
		"host not signed":        {signed{tamper: replace("host;", "")}, sigv4.ErrIncomplete},
		"date not signed":        {signed{tamper: replace(";x-amz-date", "")}, sigv4.ErrIncomplete},
		"no date":                {signed{tamper: func(r *http.Request) { r.Header.Del("X-Amz-Date") }}, sigv4.ErrIncomplete},
		"two dates":              {signed{tamper: func(r *http.Request) { r.Header.Add("X-Amz-Date", r.Header.Get("X-Amz-Date")) }}, sigv4.ErrIncomplete},
		"date in another form":   {signed{tamper: func(r *http.Request) { r.Header.Set("X-Amz-Date", now.Format(time.RFC3339)) }}, sigv4.ErrIncomplete},
		"impossible date":        {signed{tamper: func(r *http.Request) { r.Header.Set("X-Amz-Date", "20261132T120000Z") }}, sigv4.ErrIncomplete},
		"x-amz added":            {signed{tamper: func(r *http.Request) { r.Header.Set("X-Amz-Target", "x") }}, sigv4.ErrIncomplete},
		"unsigned payload":       {signed{hash: "UNSIGNED-PAYLOAD", header: http.Header{"X-Amz-Content-Sha256": {"UNSIGNED-PAYLOAD"}}}, sigv4.ErrIncomplete},
		"streaming":              {signed{hash: "STREAMING-AWS4-HMAC-SHA256-PAYLOAD", header: http.Header{"X-Amz-Content-Sha256": {"STREAMING-AWS4-HMAC-SHA256-PAYLOAD"}}}, sigv4.ErrIncomplete},
		"two hashes":             {signed{header: http.Header{"X-Amz-Content-Sha256": {hexSum(""), hexSum("")}}}, sigv4.ErrIncomplete},
		"empty hash":             {signed{header: http.Header{"X-Amz-Content-Sha256": {""}}}, sigv4.ErrSignature},
		"hash of another body":   {signed{body: "x", header: http.Header{"X-Amz-Content-Sha256": {hexSum("y")}}}, sigv4.ErrSignature},
		"two tokens":             {signed{id: "SESSION", secret: "session secret", token: "sess/ion+token==", tamper: func(r *http.Request) { r.Header.Add("X-Amz-Security-Token", "other") }}, sigv4.ErrIncomplete},
		"long token":             {signed{token: strings.Repeat("x", sigv4.MaxSessionToken+1)}, sigv4.ErrIncomplete},
		"bad escape in query":    {signed{doNotSign: false, wire: func(b []byte) []byte { return bytes.Replace(b, []byte(" HTTP/1.1"), []byte("?a=%zz HTTP/1.1"), 1) }}, sigv4.ErrIncomplete},
		"semicolon in query":     {signed{wire: func(b []byte) []byte { return bytes.Replace(b, []byte(" HTTP/1.1"), []byte("?a=1;b=2 HTTP/1.1"), 1) }}, sigv4.ErrIncomplete},
		"old":                    {signed{at: now.Add(-5*time.Minute - time.Second)}, sigv4.ErrSkew},
		"of the future":          {signed{at: now.Add(5*time.Minute + time.Second)}, sigv4.ErrSkew},
		"very old":               {signed{at: now.AddDate(-1, 0, 0)}, sigv4.ErrSkew},
		"scope of another day":   {signed{tamper: replace("/20261121/", "/20261120/")}, sigv4.ErrSignature},
		"other service":          {signed{service: "s3"}, sigv4.ErrSignature},
		"other api of ours":      {signed{service: "eks-auth"}, sigv4.ErrSignature},
		"wrong secret":           {signed{secret: "not the secret"}, sigv4.ErrSignature},
		"unknown key":            {signed{id: "NOBODY"}, sigv4.ErrUnknownKey},
		"key without token":      {signed{id: "SESSION", secret: "session secret"}, sigv4.ErrUnknownKey},
		"static key with token":  {signed{token: "x"}, sigv4.ErrUnknownKey},
		"wrong token":            {signed{id: "SESSION", secret: "session secret", token: "other"}, sigv4.ErrUnknownKey},
		"expired":                {signed{id: "EXPIRED"}, sigv4.ErrExpiredKey},
		"expired, wrong secret":  {signed{id: "EXPIRED", secret: "not the secret"}, sigv4.ErrSignature},
		"expired, no key":        {signed{id: "NOTOLD"}, sigv4.ErrUnknownKey},
		"key without a secret":   {signed{id: "EMPTY", secret: " "}, sigv4.ErrUnknownKey},
		"broken source":          {signed{id: "BROKEN"}, errStore},
		"body changed":           {signed{body: `{"a":1}`, bodyAfter: func(string) string { return `{"a":2}` }}, sigv4.ErrSignature},
		"body cut":               {signed{body: `{"a":1}`, bodyAfter: func(string) string { return "" }}, sigv4.ErrSignature},
		"method changed":         {signed{tamper: func(r *http.Request) { r.Method = http.MethodDelete }}, sigv4.ErrSignature},
		"path changed":           {signed{tamper: func(r *http.Request) { r.URL.Path = "/clusters/other/pod-identity-associations" }}, sigv4.ErrSignature},
		"path spelled otherwise": {signed{url: "http://latchkey.example/a/b", wire: func(b []byte) []byte { return bytes.Replace(b, []byte("/a/b"), []byte("/a%2Fb"), 1) }}, sigv4.ErrSignature},
		"query added":            {signed{tamper: func(r *http.Request) { r.URL.RawQuery = "namespace=x" }}, sigv4.ErrSignature},
		"query changed":          {signed{url: "http://latchkey.example/x?a=1&b=2", tamper: func(r *http.Request) { r.URL.RawQuery = "a=2&b=1" }}, sigv4.ErrSignature},
		"host changed":           {signed{tamper: func(r *http.Request) { r.Host = "other.example" }}, sigv4.ErrSignature},
		"signed header gone":     {signed{header: http.Header{"Thing": {"x"}}, tamper: func(r *http.Request) { r.Header.Del("Thing") }}, sigv4.ErrSignature},
		"signed header changed":  {signed{header: http.Header{"Thing": {"x"}}, tamper: func(r *http.Request) { r.Header.Set("Thing", "y") }}, sigv4.ErrSignature},
		"region changed":         {signed{tamper: replace(region, "us-east-1")}, sigv4.ErrSignature},
		"path not escaped twice": {signed{url: "http://latchkey.example/a%2Fb", options: func(o *v4.SignerOptions) { o.DisableURIPathEscaping = true }}, sigv4.ErrSignature},
	} {
		t.Run(name, func(t *testing.T) {
			r, body := c.arrive(t)
			got, err := verifier(t).Verify(r, body, "eks")
			if !errors.Is(err, c.want) {
				t.Fatalf("got %v, want %v", err, c.want)
			}
			if got != (sigv4.Result{}) {
				t.Errorf("refused, and yet a result: %+v", got)
			}
			for _, secret := range []string{secretKey, "session secret"} {
				if strings.Contains(err.Error(), secret) {
					t.Errorf("the secret is in %q", err)
				}
			}
		})
	}
}

func manyHeaders() string {
	var b strings.Builder
	for i := range sigv4.MaxSignedHeaders {
		fmt.Fprintf(&b, "i%03d;", i)
	}
	return b.String()
}

// Older SDKs for Go sorted parameters before escaping them: another order for
// keys such as these.
func TestVerifyAcceptsBothOrdersOfParameters(t *testing.T) {
	s := signed{method: http.MethodDelete, url: "http://latchkey.example/tags/x?tagKeys=a%3Ab&tagKeys=a-b"}
	r, body := s.arrive(t)
	if _, err := verifier(t).Verify(r, body, "eks"); err != nil {
		t.Fatal(err)
	}
	// Signed by hand in the other order.
	r.Header.Set("Authorization", byHand(r, "DELETE\n/tags/x\ntagKeys=a-b&tagKeys=a%3Ab\nhost:latchkey.example\nx-amz-date:20261121T120000Z\n\nhost;x-amz-date\n"+hexSum("")))
	if _, err := verifier(t).Verify(r, body, "eks"); err != nil {
		t.Error(err)
	}
	r.Header.Set("Authorization", byHand(r, "DELETE\n/tags/x\ntagKeys=a-b&tagKeys=a%3Ac\nhost:latchkey.example\nx-amz-date:20261121T120000Z\n\nhost;x-amz-date\n"+hexSum("")))
	if _, err := verifier(t).Verify(r, body, "eks"); !errors.Is(err, sigv4.ErrSignature) {
		t.Errorf("other parameters: %v", err)
	}
}

// A key of another day is another key: it may have been given to somebody for
// that day alone.
func TestVerifyRefusesTheKeyOfAnotherDay(t *testing.T) {
	s := signed{method: http.MethodGet, url: "http://latchkey.example/x?a=1"}
	r, body := s.arrive(t)
	canonical := "GET\n/x\na=1\nhost:latchkey.example\nx-amz-date:20261121T120000Z\n\nhost;x-amz-date\n" + hexSum("")
	for day, want := range map[string]error{"20261121": nil, "20261120": sigv4.ErrSignature, "20261122": sigv4.ErrSignature, "2026112x": sigv4.ErrSignature} {
		r.Header.Set("Authorization", byHandOn(r, day, canonical))
		if _, err := verifier(t).Verify(r, body, "eks"); !errors.Is(err, want) {
			t.Errorf("%s: %v", day, err)
		}
	}
}

// An example that the documentation of AWS works through, with its own key.
func TestSignatureOfTheDocumentation(t *testing.T) {
	const secret = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
	at := time.Date(2015, 8, 30, 12, 36, 0, 0, time.UTC)
	v, err := sigv4.New(sigv4.Config{
		Keys: fakeKeys{"AKIDEXAMPLE": {key: sigv4.Key{Secret: secret}}},
		Now:  func() time.Time { return at },
	})
	if err != nil {
		t.Fatal(err)
	}
	const wire = "GET /?Action=ListUsers&Version=2010-05-08 HTTP/1.1\r\nHost: iam.amazonaws.com\r\n" +
		"Content-Type: application/x-www-form-urlencoded; charset=utf-8\r\nX-Amz-Date: 20150830T123600Z\r\n" +
		"Authorization: AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/iam/aws4_request, SignedHeaders=content-type;host;x-amz-date, " +
		"Signature=5d672d79c15b13162d9279b0855cfba6789a8edb4c82c400e06b5924a6f2b5d7\r\n\r\n"
	r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(wire)))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.Verify(r, nil, "iam"); err != nil {
		t.Error(err)
	}
}

func TestKeysAreRememberedAndForgotten(t *testing.T) {
	source := keys()
	v, err := sigv4.New(sigv4.Config{Keys: source, Now: func() time.Time { return now }, CacheSize: 4})
	if err != nil {
		t.Fatal(err)
	}
	check := func(s signed, want error) {
		t.Helper()
		r, body := s.arrive(t)
		if _, err := v.Verify(r, body, "eks"); !errors.Is(err, want) {
			t.Fatalf("got %v, want %v", err, want)
		}
	}
	for range 3 {
		check(signed{}, nil)
		check(signed{secret: "other"}, sigv4.ErrSignature)
		for _, r := range []string{"r1", "r2", "r3", "r4", "r5", "r6"} {
			check(signed{region: r}, nil)
		}
	}
	// The key gets another secret: the remembered one is worth nothing.
	check(signed{}, nil)
	source[accessKey] = fakeKey{key: sigv4.Key{Secret: "a new secret of the key", Principal: "ops"}}
	check(signed{}, sigv4.ErrSignature)
	check(signed{secret: "a new secret of the key"}, nil)
	delete(source, accessKey)
	check(signed{secret: "a new secret of the key"}, sigv4.ErrUnknownKey)
}

func TestVerifyAtOnce(t *testing.T) {
	v := verifier(t)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for j := range 20 {
				r, body := signed{region: fmt.Sprintf("r%d", (i+j)%5)}.arrive(t)
				if _, err := v.Verify(r, body, "eks"); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

func TestChoose(t *testing.T) {
	static := fakeKeys{"K": {key: sigv4.Key{Secret: "static"}}}
	session := fakeKeys{"K": {key: sigv4.Key{Secret: "session"}, token: "t"}}
	for name, c := range map[string]struct {
		keys  sigv4.Choose
		token string
		want  string
	}{
		"static":     {sigv4.Choose{Static: static, Session: session}, "", "static"},
		"session":    {sigv4.Choose{Static: static, Session: session}, "t", "session"},
		"no static":  {sigv4.Choose{Session: session}, "", ""},
		"no session": {sigv4.Choose{Static: static}, "t", ""},
	} {
		key, err := c.keys.Lookup(t.Context(), "K", c.token)
		if key.Secret != c.want || (c.want == "") != errors.Is(err, sigv4.ErrUnknownKey) {
			t.Errorf("%s: %q, %v", name, key.Secret, err)
		}
	}
}

func TestNothingPrintsTheSecret(t *testing.T) {
	k := sigv4.Key{Secret: secretKey, Principal: "ops"}
	for _, s := range []string{fmt.Sprint(k), fmt.Sprintf("%+v", k), fmt.Sprintf("%#v", k), fmt.Sprint(&k)} {
		if strings.Contains(s, secretKey) {
			t.Errorf("the secret is in %q", s)
		}
	}
}

func TestClaimedAccessKeyID(t *testing.T) {
	r, _ := signed{secret: "wrong"}.arrive(t)
	if got := sigv4.AccessKeyID(r); got != accessKey {
		t.Errorf("got %q", got)
	}
	r.Header.Set("Authorization", "Bearer secret")
	if got := sigv4.AccessKeyID(r); got != "" {
		t.Errorf("got %q", got)
	}
}

func TestNewNeedsKeys(t *testing.T) {
	if _, err := sigv4.New(sigv4.Config{}); err == nil {
		t.Error("a verifier without keys")
	}
}

func BenchmarkVerify(b *testing.B) {
	v := verifier(b)
	r, body := signed{id: "SESSION", secret: "session secret", token: "sess/ion+token==", body: strings.Repeat("x", 1300)}.arrive(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := v.Verify(r, body, "eks"); err != nil {
			b.Fatal(err)
		}
	}
}
