// SPDX-License-Identifier: Apache-2.0

package eksauth_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/eksauth"
)

// authority is a CA of its own with a certificate for 127.0.0.1.
type authority struct {
	pem  []byte
	leaf tls.Certificate
}

func newAuthority(t *testing.T, name string) authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	own, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(2), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: ca.NotBefore, NotAfter: ca.NotAfter, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}, ca, own.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return authority{
		pem:  pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		leaf: tls.Certificate{Certificate: [][]byte{leaf}, PrivateKey: own},
	}
}

// rotating is a TLS server whose certificate changes while it runs, a bundle
// that is replaced as the kubelet does it, and a transport between them.
type rotating struct {
	*httptest.Server
	*eksauth.BundleTransport
	leaf  atomic.Pointer[tls.Certificate]
	dir   string
	now   atomic.Int64 // nanoseconds that the clock is ahead
	log   *bytes.Buffer
	conns atomic.Int32
}

// mount replaces the directory's link, as the kubelet does with a ConfigMap;
// nil: the new version lacks the file.
func (r *rotating) mount(t *testing.T, content []byte) {
	t.Helper()
	version, err := os.MkdirTemp(r.dir, "version-")
	if err != nil {
		t.Fatal(err)
	}
	if content != nil {
		if err := os.WriteFile(filepath.Join(version, "ca.crt"), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	link := filepath.Join(r.dir, "..data_tmp")
	if err := os.Symlink(filepath.Base(version), link); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(link, filepath.Join(r.dir, "..data")); err != nil {
		t.Fatal(err)
	}
}

// serve changes the server's certificate, and makes the next request connect.
func (r *rotating) serve(a authority) {
	r.leaf.Store(&a.leaf)
	r.CloseIdleConnections()
}

func (r *rotating) pass(d time.Duration) { r.now.Add(int64(d)) }

// post sends something and returns what came back.
func (r *rotating) post(ctx context.Context, body string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, r.URL, strings.NewReader(body))
	if err != nil {
		return err
	}
	res, err := r.RoundTrip(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	got, err := io.ReadAll(res.Body)
	if err == nil && string(got) != body {
		err = errors.New("the body that arrived is " + string(got))
	}
	return err
}

func newRotating(t *testing.T, a authority, proxy func(*http.Request) (*url.URL, error)) *rotating {
	t.Helper()
	r := &rotating{dir: t.TempDir(), log: new(bytes.Buffer)}
	r.leaf.Store(&a.leaf)
	r.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		_, _ = io.Copy(w, req.Body)
	}))
	r.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError) // of clients that do not trust it
	r.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			r.conns.Add(1)
		}
	}
	r.TLS = &tls.Config{MinVersion: tls.VersionTLS12, GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
		return &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{*r.leaf.Load()}}, nil
	}}
	r.StartTLS()
	t.Cleanup(r.Close)
	r.mount(t, a.pem)
	start := time.Now()
	base := eksauth.NewTransport(&http.Transport{Proxy: proxy})
	var err error
	r.BundleTransport, err = eksauth.NewBundleTransport(eksauth.BundleConfig{
		File: filepath.Join(r.dir, "..data", "ca.crt"), Base: base,
		Now:    func() time.Time { return start.Add(time.Duration(r.now.Load())) },
		Logger: slog.New(slog.NewTextHandler(r.log, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.CloseIdleConnections)
	return r
}

func distrusted(err error) bool {
	var v *tls.CertificateVerificationError
	return errors.As(err, &v)
}

func TestBundleIsReadAnew(t *testing.T) {
	t.Parallel()
	old, fresh := newAuthority(t, "old"), newAuthority(t, "new")
	for name, wait := range map[string]time.Duration{
		// The request fails first, and is sent again.
		"after a certificate that is not trusted": time.Second,
		"before a request":                        eksauth.DefaultBundleInterval,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRotating(t, old, nil)
			if err := r.post(t.Context(), "one"); err != nil {
				t.Fatal(err)
			}
			r.serve(fresh)
			if err := r.post(t.Context(), "two"); !distrusted(err) {
				t.Fatalf("a server of another CA: %v", err)
			}
			r.mount(t, fresh.pem)
			// Not more often than that, however many fail.
			if err := r.post(t.Context(), "three"); !distrusted(err) {
				t.Fatalf("the file was looked at again at once: %v", err)
			}
			r.pass(wait)
			if err := r.post(t.Context(), "four"); err != nil {
				t.Errorf("after the CA's change: %v", err)
			}
			if got := strings.Count(r.log.String(), "read anew"); got != 1 {
				t.Errorf("told %d times:\n%s", got, r.log)
			}
			// The old one is trusted no longer.
			r.serve(old)
			if err := r.post(t.Context(), "five"); !distrusted(err) {
				t.Errorf("a server of the old CA: %v", err)
			}
		})
	}
}

// A connection that was trusted for the old CA ends with it; while nothing
// changes it is kept.
func TestBundleChangeEndsConnections(t *testing.T) {
	t.Parallel()
	old, fresh := newAuthority(t, "old"), newAuthority(t, "new")
	r := newRotating(t, old, nil)
	for range 3 {
		if err := r.post(t.Context(), "x"); err != nil {
			t.Fatal(err)
		}
		r.pass(eksauth.DefaultBundleInterval)
	}
	if got := r.conns.Load(); got != 1 {
		t.Errorf("%d connections, want 1", got)
	}
	r.mount(t, fresh.pem)
	if err := r.post(t.Context(), "x"); !distrusted(err) {
		t.Errorf("the old CA is in the file no longer: %v", err)
	}
}

func TestBrokenBundleKeepsTheLast(t *testing.T) {
	t.Parallel()
	old, fresh := newAuthority(t, "old"), newAuthority(t, "new")
	r := newRotating(t, old, nil)
	for _, broken := range [][]byte{nil, {}, []byte("no PEM"), old.pem[:len(old.pem)/2], bytes.Repeat([]byte("x"), 5<<20)} {
		r.log.Reset()
		r.mount(t, broken)
		for range 3 {
			r.pass(eksauth.DefaultBundleInterval)
			r.CloseIdleConnections()
			if err := r.post(t.Context(), "x"); err != nil {
				t.Fatalf("%.20q: %v", broken, err)
			}
		}
		if got := strings.Count(r.log.String(), "level=ERROR"); got != 1 {
			t.Errorf("%.20q: told %d times, want once:\n%s", broken, got, r.log)
		}
	}
	// The same fault after a good file is news again.
	r.mount(t, old.pem)
	r.pass(eksauth.DefaultBundleInterval)
	if err := r.post(t.Context(), "x"); err != nil {
		t.Fatal(err)
	}
	r.log.Reset()
	r.mount(t, nil)
	r.pass(eksauth.DefaultBundleInterval)
	if err := r.post(t.Context(), "x"); err != nil || strings.Count(r.log.String(), "level=ERROR") != 1 {
		t.Errorf("%v\n%s", err, r.log)
	}
	// And a good one heals.
	r.mount(t, fresh.pem)
	r.serve(fresh)
	r.pass(eksauth.DefaultBundleInterval)
	if err := r.post(t.Context(), "x"); err != nil {
		t.Errorf("after a good file: %v", err)
	}
}

// Through a proxy certificates are checked by the same file.
func TestBundleThroughAProxy(t *testing.T) {
	t.Parallel()
	old, fresh := newAuthority(t, "old"), newAuthority(t, "new")
	var tunnels atomic.Int32
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		tunnels.Add(1)
		up, err := (&net.Dialer{}).DialContext(req.Context(), "tcp", req.Host)
		if err != nil {
			w.WriteHeader(http.StatusBadGateway)
			return
		}
		defer up.Close()
		w.WriteHeader(http.StatusOK)
		down, buffered, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer down.Close()
		go func() {
			_, _ = io.Copy(up, buffered)
			up.Close()
		}()
		_, _ = io.Copy(down, up)
	}))
	t.Cleanup(proxy.Close)
	u, err := url.Parse(proxy.URL)
	if err != nil {
		t.Fatal(err)
	}
	r := newRotating(t, old, http.ProxyURL(u))
	if err := r.post(t.Context(), "x"); err != nil {
		t.Fatal(err)
	}
	r.serve(fresh)
	r.mount(t, fresh.pem)
	r.pass(eksauth.DefaultBundleInterval)
	if err := r.post(t.Context(), "x"); err != nil {
		t.Errorf("after the change: %v", err)
	}
	if tunnels.Load() != 2 {
		t.Errorf("%d tunnels, want 2", tunnels.Load())
	}
	r.CloseIdleConnections()
}

// Nobody who asks during the change gets anything but an answer.
func TestBundleChangesUnderLoad(t *testing.T) {
	t.Parallel()
	old, fresh := newAuthority(t, "old"), newAuthority(t, "new")
	r := newRotating(t, old, nil)
	r.mount(t, append(append([]byte{}, old.pem...), fresh.pem...)) // as a careful CA rotates
	r.pass(eksauth.DefaultBundleInterval)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for range 20 {
				if err := r.post(t.Context(), "x"); err != nil {
					t.Errorf("worker %d: %v", i, err)
				}
			}
		})
	}
	r.leaf.Store(&fresh.leaf) // new connections see the new one
	r.mount(t, fresh.pem)
	r.pass(eksauth.DefaultBundleInterval)
	wg.Wait()
	r.serve(old)
	if err := r.post(t.Context(), "x"); !distrusted(err) {
		t.Errorf("the old CA after the change: %v", err)
	}
}

func TestNewBundleTransportNeedsACertificate(t *testing.T) {
	t.Parallel()
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{"", empty, filepath.Dir(empty), empty + "-missing"} {
		if _, err := eksauth.NewBundleTransport(eksauth.BundleConfig{File: file}); !errors.Is(err, eksauth.ErrBundle) {
			t.Errorf("%q: %v", file, err)
		}
	}
}
