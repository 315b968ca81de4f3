// SPDX-License-Identifier: Apache-2.0

package eksauth

import (
	"crypto/tls"
	"crypto/x509"
	"net/http"
	"net/http/httptest"
	"testing"
)

// A base as the SDK makes it for AWS_CA_BUNDLE, able to do HTTP/2, and a server
// that prefers that: the two must still understand each other.
func TestTransportSpeaksHTTP1WithAServerOfHTTP2(t *testing.T) {
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Protocol", r.Proto)
	}))
	srv.EnableHTTP2 = true
	srv.StartTLS()
	defer srv.Close()
	roots := x509.NewCertPool()
	roots.AddCert(srv.Certificate())
	base := &http.Transport{ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}}
	for _, used := range []bool{false, true} {
		tr := NewTransport(base)
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, srv.URL, http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := tr.RoundTrip(req)
		if err != nil {
			t.Fatalf("base used before: %v: %v", used, err)
		}
		resp.Body.Close()
		if got := resp.Header.Get("Protocol"); got != "HTTP/1.1" {
			t.Errorf("base used before: %v: %s", used, got)
		}
		tr.CloseIdleConnections()

		// The base itself is as it was.
		if resp, err = base.RoundTrip(req.Clone(t.Context())); err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if got := resp.Header.Get("Protocol"); got != "HTTP/2.0" {
			t.Errorf("the base speaks %s", got)
		}
	}
	base.CloseIdleConnections()
}
