// SPDX-License-Identifier: Apache-2.0

package eksapi

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
)

// FuzzRoute: a path leads to one operation or none, and what it names is what
// was escaped, decoded once.
func FuzzRoute(f *testing.F) {
	for _, p := range []string{
		"/clusters/prod/pod-identity-associations", "/clusters/prod/pod-identity-associations/a-1", "/clusters/prod/assume-role-for-pod-identity",
		"/tags/arn%3Aaws%3Aeks%3Ar%3A1%3Acluster%2Fx", "/tags/arn:aws:eks:r:1:cluster/x", "/clusters/a%2Fb/pod-identity-associations", "//", "/clusters/%00/x", "/tags/%252F",
	} {
		for _, m := range []string{"GET", "POST", "DELETE", "PUT"} {
			f.Add(m, p)
		}
	}
	f.Fuzz(func(t *testing.T, method, path string) {
		u, err := url.ParseRequestURI(path)
		if err != nil || u.Host != "" || !strings.HasPrefix(path, "/") {
			return
		}
		got, fault := parseRoute(&http.Request{Method: method, URL: u})
		if fault != nil {
			if got.op != nil || fault.status != 404 && fault.status != 405 {
				t.Errorf("%+v, %v", got, fault)
			}
			return
		}
		if got.op == nil || got.op.serve == nil {
			t.Fatalf("no operation: %+v", got)
		}
		if (got.arn != "") == (got.cluster != "") {
			t.Errorf("%+v", got)
		}
		// What is named, escaped again, leads to the same.
		again := "/tags/" + url.PathEscape(got.arn)
		if got.arn == "" {
			again = "/clusters/" + url.PathEscape(got.cluster) + "/pod-identity-associations"
			if got.op.auth {
				again = "/clusters/" + url.PathEscape(got.cluster) + "/assume-role-for-pod-identity"
			} else if got.id != "" {
				again += "/" + url.PathEscape(got.id)
			}
		}
		u, err = url.ParseRequestURI(again)
		if err != nil {
			t.Fatal(err)
		}
		if second, fault := parseRoute(&http.Request{Method: method, URL: u}); fault != nil || second != got {
			t.Errorf("%q is %+v, %q is %+v, %v", path, got, again, second, fault)
		}
	})
}

// FuzzBody: a body is read as encoding/json would read it, member by member, or
// refused.
func FuzzBody(f *testing.F) {
	for _, b := range []string{
		`{"a":"x","b":true,"c":{"k":"v"},"d":null}`, `{"a":1}`, `{"A":"x"}`, `{"a":"x","a":"y"}`, `{"a":"\u0061\ud800"}`, `{"x":[[[[]]]]}`, `{}`, `[]`, `{"c":{"k":"v","k":"w"}}`, ` {"a" : "x" } `, "{\"a\":\"\xff\"}",
	} {
		f.Add([]byte(b))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		var a string
		var p *string
		var b bool
		var tags map[string]string
		c := &call{body: body, route: route{op: collectionOps[http.MethodPost]}}
		err := c.decode(member{"a", &a}, member{"p", &p}, member{"b", &b}, member{"c", &tags})
		var want map[string]json.RawMessage
		valid := json.Unmarshal(body, &want) == nil && want != nil
		if err != nil {
			if f := c.fault(err); f.status != 400 || f.code != "InvalidParameterException" {
				t.Errorf("%v", err)
			}
			return
		}
		if !valid {
			t.Fatalf("taken: %q", body)
		}
		same := func(name string, got any) {
			raw, ok := want[name]
			if !ok {
				return
			}
			var expected any
			if err := json.Unmarshal(raw, &expected); err != nil {
				t.Fatal(err)
			}
			if expected == nil {
				return
			}
			x, _ := json.Marshal(expected)
			y, _ := json.Marshal(got)
			if string(x) != string(y) {
				t.Errorf("%q: %s is %s", body, name, y)
			}
		}
		same("a", a)
		same("p", p)
		same("b", b)
		same("c", tags)
	})
}

// FuzzDeep: what is not deep can be read without deep recursion.
func FuzzDeep(f *testing.F) {
	f.Add([]byte(`{"a":[{"b":"]}"}]}`))
	f.Add([]byte(strings.Repeat("[", 40)))
	f.Add([]byte(`"\"[[[["`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if !json.Valid(b) {
			return
		}
		depth, most := 0, 0
		dec := json.NewDecoder(strings.NewReader(string(b)))
		for {
			token, err := dec.Token()
			if err != nil {
				break
			}
			switch token {
			case json.Delim('{'), json.Delim('['):
				depth++
				most = max(most, depth)
			case json.Delim('}'), json.Delim(']'):
				depth--
			}
		}
		if got := deep(b); got != (most > maxDepth) {
			t.Errorf("%d deep: %v: %q", most, got, b)
		}
	})
}

// FuzzUnauthenticated: whatever arrives without a good signature is answered
// with 4xx in JSON.
func FuzzUnauthenticated(f *testing.F) {
	h, err := New(Config{Associations: noStore{}, Index: noIndex{}, Tokens: noTokens{}, Issuer: noIssuer{}, Keys: noKeys{}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add("POST", "/clusters/prod/assume-role-for-pod-identity", "AWS4-HMAC-SHA256 Credential=A/20261121/r/eks-auth/aws4_request, SignedHeaders=host;x-amz-date, Signature=00", "20261121T120000Z", `{"token":"x"}`)
	f.Add("GET", "/tags/x?tagKeys=%zz", "", "", "")
	f.Fuzz(func(t *testing.T, method, target, authorization, date, body string) {
		u, err := url.ParseRequestURI(target)
		if err != nil || method == "" {
			return
		}
		r := httptest.NewRequest("POST", "/", strings.NewReader(body))
		r.Method, r.URL, r.RequestURI = method, u, target
		r.Header.Set("Authorization", authorization)
		r.Header.Set("X-Amz-Date", date)
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code < 400 || w.Code > 499 || !json.Valid(w.Body.Bytes()) || w.Header().Get("X-Amzn-Errortype") == "" {
			t.Errorf("%d %v %s", w.Code, w.Header(), w.Body)
		}
	})
}
