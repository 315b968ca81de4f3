// SPDX-License-Identifier: Apache-2.0

package satoken

import (
	"context"
	"encoding/pem"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
	"github.com/latchkey-dev/latchkey/test/standin/tokens"
)

const ownToken = "own.service-account.token"

func write(t testing.TB, path string, data []byte) string {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func caOf(server *httptest.Server) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
}

func TestFileSourceFollowsTheFile(t *testing.T) {
	s, rotated := signer(t, "ES256", "cluster"), signer(t, "ES256", "other")
	path := filepath.Join(t.TempDir(), "sa.pub")
	source, err := NewFileSource(path)
	if err != nil {
		t.Fatal(err)
	}
	c := &clock{}
	k := newKeys(t, KeysConfig{Source: source, Now: c.now, CacheFile: filepath.Join(t.TempDir(), "keys.json")})
	v := verifier(t, Config{Issuers: []string{tokens.DefaultIssuer}, Keys: k, Now: c.now})
	verify := func(s *tokens.Signer, want evidence.Reason) {
		t.Helper()
		c.advance(DefaultMinRefetch)
		raw := s.Token(tokens.Claims{})
		_, err := v.Verify(t.Context(), raw)
		checkRefusal(t, raw, err, want, "")
	}
	verify(s, evidence.ReasonKeysUnavailable) // not there yet
	write(t, path, s.PEM())
	verify(s, "")
	write(t, path, rotated.JWKS())
	verify(rotated, "")
	verify(s, evidence.ReasonTokenUnknownKey)

	// As a ConfigMap does it: a symbolic link is replaced.
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(write(t, path+".1", s.JWKS()), path); err != nil {
		t.Fatal(err)
	}
	verify(s, "")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	verify(rotated, evidence.ReasonKeysUnavailable)
	verify(s, "")
	if k.Stats().CacheErrors != 0 {
		t.Errorf("%+v", k.Stats())
	}
}

func TestFileSourceRefuses(t *testing.T) {
	s := signer(t, "ES256", "cluster")
	directory := t.TempDir()
	open := write(t, filepath.Join(directory, "open"), s.PEM())
	if err := os.Chmod(open, 0o646); err != nil {
		t.Fatal(err)
	}
	large := write(t, filepath.Join(directory, "large"), make([]byte, maxFileSize+1))
	for name, path := range map[string]string{
		"written by everybody": open, "too large": large, "a directory": directory, "missing": filepath.Join(directory, "none"),
	} {
		source, err := NewFileSource(path)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := source.Fetch(t.Context()); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if _, err := NewFileSource(""); err == nil {
		t.Error("a file without a name")
	}
}

// issuer is a stand-in issuer over TLS whose answers a test can change.
type issuer struct {
	*httptest.Server
	source *IssuerSource

	mu        sync.Mutex
	overrides map[string]http.HandlerFunc
	asked     []string
}

func newIssuer(t *testing.T, s *tokens.Signer) *issuer {
	t.Helper()
	i := &issuer{overrides: map[string]http.HandlerFunc{}}
	var standard http.Handler
	i.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		i.mu.Lock()
		i.asked = append(i.asked, r.URL.Path)
		handler := i.overrides[r.URL.Path]
		i.mu.Unlock()
		if handler != nil {
			handler(w, r)
			return
		}
		standard.ServeHTTP(w, r)
	}))
	t.Cleanup(i.Close)
	standard = tokens.DiscoveryHandler(i.URL, i.URL+"/openid/v1/jwks", s.JWKS)
	source, err := NewIssuerSource(IssuerConfig{URL: i.URL, CAFile: write(t, filepath.Join(t.TempDir(), "ca.pem"), caOf(i.Server))})
	if err != nil {
		t.Fatal(err)
	}
	i.source = source
	return i
}

func (i *issuer) override(path string, h http.HandlerFunc) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.overrides[path] = h
}

func body(text string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(text)) }
}

func TestIssuerSource(t *testing.T) {
	s := signer(t, "ES256", "cluster")
	i := newIssuer(t, s)
	k := newKeys(t, KeysConfig{Source: i.source, CacheFile: filepath.Join(t.TempDir(), "keys.json")})
	v := verifier(t, Config{Keys: k})
	for issuer, want := range map[string]evidence.Reason{i.URL: "", tokens.DefaultIssuer: evidence.ReasonTokenIssuer} {
		raw := s.Token(tokens.Claims{Issuer: issuer})
		_, err := v.Verify(t.Context(), raw)
		checkRefusal(t, raw, err, want, "")
	}
	if k.Stats().CacheErrors != 0 || k.Stats().Issuer != i.URL {
		t.Errorf("%+v", k.Stats())
	}
}

func TestIssuerSourceRefuses(t *testing.T) {
	s := signer(t, "ES256", "cluster")
	elsewhere := httptest.NewServer(body(string(s.JWKS())))
	t.Cleanup(elsewhere.Close)
	const doc, keys = discoveryPath, jwksPath
	redirect := func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, elsewhere.URL, http.StatusFound) }
	for name, tc := range map[string]struct {
		path   string
		answer func(url string) http.HandlerFunc
		want   string
	}{
		"another issuer": {doc, func(url string) http.HandlerFunc {
			return body(string(tokens.Discovery("https://other.example", url+keys)))
		}, "names issuer"},
		"issuer with a slash": {doc, func(url string) http.HandlerFunc {
			return body(string(tokens.Discovery(url+"/", url+keys)))
		}, "names issuer"},
		"no issuer":    {doc, func(string) http.HandlerFunc { return body(`{}`) }, "names no issuer"},
		"two issuers":  {doc, func(string) http.HandlerFunc { return body(`{"issuer":"a","issuer":"b"}`) }, "duplicate"},
		"not JSON":     {doc, func(string) http.HandlerFunc { return body(`<html>`) }, "discovery document"},
		"too deep":     {doc, func(string) http.HandlerFunc { return body(strings.Repeat("[", 1000)) }, "deeply"},
		"redirected":   {doc, func(string) http.HandlerFunc { return redirect }, "status 302"},
		"not found":    {doc, func(string) http.HandlerFunc { return http.NotFound }, "status 404"},
		"keys by http": {doc, func(url string) http.HandlerFunc { return body(string(tokens.Discovery(url, elsewhere.URL))) }, "https is required"},
		"keys in file": {doc, func(url string) http.HandlerFunc { return body(string(tokens.Discovery(url, "file:///etc/passwd"))) }, "jwks_uri"},
		"keys nowhere": {doc, func(url string) http.HandlerFunc { return body(string(tokens.Discovery(url, ""))) }, "jwks_uri"},
		"keys with a user": {doc, func(url string) http.HandlerFunc {
			return body(string(tokens.Discovery(url, strings.Replace(url, "://", "://user:pass@", 1))))
		}, "user"},
		"keys redirected": {keys, func(string) http.HandlerFunc { return redirect }, "status 302"},
		"keys failing": {keys, func(string) http.HandlerFunc {
			return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(503) }
		}, "status 503"},
		"keys endless": {keys, func(string) http.HandlerFunc {
			return func(w http.ResponseWriter, _ *http.Request) {
				for range 3 {
					_, _ = w.Write(make([]byte, maxKeySetSize/2))
				}
			}
		}, "more than"},
	} {
		t.Run(name, func(t *testing.T) {
			i := newIssuer(t, s)
			i.override(tc.path, tc.answer(i.URL))
			_, err := i.source.Fetch(t.Context())
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("%v, want %q", err, tc.want)
			}
			if strings.Contains(err.Error(), "pass") && tc.path == doc && name == "keys with a user" {
				t.Errorf("quotes a password: %v", err)
			}
		})
	}
	t.Run("another CA", func(t *testing.T) {
		i := newIssuer(t, s)
		source, err := NewIssuerSource(IssuerConfig{URL: i.URL})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := source.Fetch(t.Context()); err == nil || !strings.Contains(err.Error(), "certificate") {
			t.Errorf("%v", err)
		}
	})
	t.Run("no CA", func(t *testing.T) {
		source, err := NewIssuerSource(IssuerConfig{URL: "https://a.example", CAFile: write(t, filepath.Join(t.TempDir(), "ca.pem"), nil)})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := source.Fetch(t.Context()); err == nil || !strings.Contains(err.Error(), "no certificate") {
			t.Errorf("%v", err)
		}
	})
}

func TestIssuerURL(t *testing.T) {
	for address, want := range map[string]bool{
		"https://oidc.example/id/ABC": true, "https://oidc.example:8443": true,
		"http://localhost:8080": true, "http://127.0.0.1": true, "http://[::1]:80/x": true,
		"": false, "oidc.example": false, "http://oidc.example": false, "http://10.0.0.1": false,
		"http://localhost.attacker.example": false, "https://": false, "https://user:secret@oidc.example": false,
		"https://oidc.example?x=1": false, "https://oidc.example?": false, "https://oidc.example#x": false,
		"file:///etc/passwd": false, "https://oidc.example:port": false,
	} {
		_, err := NewIssuerSource(IssuerConfig{URL: address})
		if (err == nil) != want {
			t.Errorf("%q: %v", address, err)
		}
		if err != nil && strings.Contains(err.Error(), "secret") {
			t.Errorf("quotes a password: %v", err)
		}
	}
}

// An issuer on this host is for development: the whole way may be plain.
func TestIssuerOnThisHost(t *testing.T) {
	s := signer(t, "ES256", "cluster")
	var handler http.Handler
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { handler.ServeHTTP(w, r) }))
	t.Cleanup(server.Close)
	handler = tokens.DiscoveryHandler(server.URL, server.URL+jwksPath, s.JWKS)
	source, err := NewIssuerSource(IssuerConfig{URL: server.URL})
	if err != nil {
		t.Fatal(err)
	}
	document, err := source.Fetch(t.Context())
	if err != nil || document.Issuer != server.URL {
		t.Errorf("%+v, %v", document, err)
	}
}

// apiServer is a stand-in API server that lets only our own token in.
func apiServer(t *testing.T, s *tokens.Signer) (*APIServerSource, string) {
	t.Helper()
	discovery := tokens.DiscoveryHandler(tokens.DefaultIssuer, "https://elsewhere.example/openid/v1/jwks", s.JWKS)
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer "+ownToken {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		discovery.ServeHTTP(w, r)
	}))
	t.Cleanup(server.Close)
	u, err := url.Parse(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	directory := t.TempDir()
	write(t, filepath.Join(directory, "token"), []byte(ownToken+"\n"))
	write(t, filepath.Join(directory, "ca.crt"), caOf(server))
	source, err := NewAPIServerSource(APIServerConfig{Dir: directory, Host: u.Hostname(), Port: u.Port()})
	if err != nil {
		t.Fatal(err)
	}
	return source, directory
}

func TestAPIServerSource(t *testing.T) {
	s := signer(t, "ES256", "cluster")
	source, directory := apiServer(t, s)
	// The request carries our token: a proxy must not see it.
	t.Setenv("HTTPS_PROXY", "http://127.0.0.1:1")
	k := newKeys(t, KeysConfig{Source: source})
	v := verifier(t, Config{Keys: k})
	if _, err := v.Verify(t.Context(), s.Token(tokens.Claims{})); err != nil {
		t.Fatal(err)
	}

	// The kubelet replaces the token; a stale one is refused, a new one used.
	write(t, filepath.Join(directory, "token"), []byte("stale.own.token"))
	_, err := source.Fetch(t.Context())
	if err == nil || !strings.Contains(err.Error(), "status 401") || strings.Contains(err.Error(), "stale.own.token") {
		t.Errorf("%v", err)
	}
	write(t, filepath.Join(directory, "token"), []byte("no header\x00 can carry this token"))
	_, err = source.Fetch(t.Context())
	if err == nil || strings.Contains(err.Error(), "can carry this") {
		t.Errorf("%v", err)
	}
	write(t, filepath.Join(directory, "token"), []byte(ownToken))
	if _, err := source.Fetch(t.Context()); err != nil {
		t.Error(err)
	}
}

// Two clusters can have an API server at one address, but not with one CA.
func TestAPIServerIdentityHasTheCA(t *testing.T) {
	s := signer(t, "ES256", "cluster")
	source, directory := apiServer(t, s)
	path := filepath.Join(t.TempDir(), "keys.json")
	k := newKeys(t, KeysConfig{Source: source, CacheFile: path})
	if err := k.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := newKeys(t, KeysConfig{Source: source, CacheFile: path}).Stats(); got.Keys != 1 {
		t.Errorf("%+v", got)
	}
	ca, err := os.ReadFile(filepath.Join(directory, "ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	certificate, _ := selfSigned(t)
	write(t, filepath.Join(directory, "ca.crt"), append(ca, certificate...))
	if got := newKeys(t, KeysConfig{Source: source, CacheFile: path}).Stats(); got.Keys != 0 || got.CacheErrors != 0 {
		t.Errorf("keys of another CA: %+v", got)
	}
	// The running agent follows its CA, and knows its cache again afterwards.
	if err := k.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := newKeys(t, KeysConfig{Source: source, CacheFile: path}).Stats(); got.Keys != 1 {
		t.Errorf("%+v", got)
	}
	if err := os.Remove(filepath.Join(directory, "ca.crt")); err != nil {
		t.Fatal(err)
	}
	if got := newKeys(t, KeysConfig{Source: source, CacheFile: path}).Stats(); got.Keys != 0 || got.CacheErrors != 1 {
		t.Errorf("keys without a CA: %+v", got)
	}
}

func TestAPIServerAddress(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	t.Setenv("KUBERNETES_SERVICE_PORT", "")
	for _, cfg := range []APIServerConfig{{}, {Host: "10.96.0.1"}, {Port: "443"}, {Host: "a@b", Port: "443"}, {Host: "a/b", Port: "443"}, {Host: "a", Port: "x"}} {
		if _, err := NewAPIServerSource(cfg); err == nil {
			t.Errorf("%+v accepted", cfg)
		}
	}
	t.Setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
	t.Setenv("KUBERNETES_SERVICE_PORT", "443")
	source, err := NewAPIServerSource(APIServerConfig{})
	if err != nil || source.String() != "API server https://[fd00::1]:443" {
		t.Errorf("%v, %v", source, err)
	}
}

// A token's iss must never cause a connection: it is the attacker's to write.
func TestKeysAreNeverFetchedFromTheToken(t *testing.T) {
	s, attacker := signer(t, "ES256", "cluster"), signer(t, "ES256", "other")
	evil := newIssuer(t, attacker)
	i := newIssuer(t, s)
	v := verifier(t, Config{Keys: newKeys(t, KeysConfig{Source: i.source})})
	for _, claims := range []tokens.Claims{
		{Issuer: evil.URL}, {Issuer: i.URL},
		{Issuer: evil.URL, Header: map[string]any{"kid": evil.URL + jwksPath}},
	} {
		if _, err := v.Verify(t.Context(), attacker.Token(claims)); err == nil {
			t.Errorf("%+v accepted", claims)
		}
	}
	evil.mu.Lock()
	defer evil.mu.Unlock()
	if len(evil.asked) != 0 {
		t.Errorf("the attacker was asked for %v", evil.asked)
	}
}

// A server that accepts and never answers costs the fetch's time and no more.
func TestSilentServer(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	source, err := NewIssuerSource(IssuerConfig{URL: "http://" + listener.Addr().String()})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		connection, err := listener.Accept()
		if err == nil {
			defer func() { _ = connection.Close() }()
		}
		cancel() // instead of waiting for the time to pass
		<-t.Context().Done()
	}()
	if _, err := source.Fetch(ctx); err == nil {
		t.Error("answered")
	}
}
