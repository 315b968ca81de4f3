// SPDX-License-Identifier: Apache-2.0

package eksauth

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	// DefaultBundleInterval is how often the file is looked at, while there are
	// requests.
	DefaultBundleInterval = 5 * time.Second
	// afterDistrust is the same after a certificate that is not trusted: the file
	// is the likely cure.
	afterDistrust = time.Second
	// maxBundle is several times a system's whole bundle.
	maxBundle = 4 << 20
)

// ErrBundle: the file with the CAs cannot be read, or holds no certificate.
var ErrBundle = errors.New("the CA bundle cannot be used")

// BundleConfig is what a BundleTransport is made of.
type BundleConfig struct {
	// File has the certificates to trust, in PEM, and nothing else is trusted;
	// required.
	File string
	// Base is the transport but for the certificates. It is not changed; nil
	// means NewTransport(nil).
	Base *http.Transport
	// Interval is how often the file is looked at; zero means
	// DefaultBundleInterval.
	Interval time.Duration
	// Now is the clock; nil means time.Now.
	Now func() time.Time
	// Logger gets each change, and each file that cannot be used, once; nil
	// discards them.
	Logger *slog.Logger
}

// BundleTransport is an http.RoundTripper that trusts what a file says now, not
// what it said at the start: a private CA is replaced while agents run. It looks
// at the file when there is a request, so it needs no goroutine. A file that
// cannot be used changes nothing. It may be used by several goroutines.
//
// The transport as a whole is exchanged, and not the verification of TLS
// replaced: crypto/tls goes on to check names and chains, also through a proxy,
// and no idle connection outlives the CA that it was trusted for.
type BundleTransport struct {
	cfg     BundleConfig
	present atomic.Pointer[http.Transport]

	mu      sync.Mutex
	checked time.Time
	// sum is of the file that is in use, refused that of the last one that could
	// not be: it tells what was logged.
	sum, refused [sha256.Size]byte
}

// NewBundleTransport makes a BundleTransport and reads the file. Errors match
// ErrBundle.
func NewBundleTransport(cfg BundleConfig) (*BundleTransport, error) {
	if cfg.Base == nil {
		cfg.Base = NewTransport(nil)
	}
	if cfg.Interval <= 0 {
		cfg.Interval = DefaultBundleInterval
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	t := &BundleTransport{cfg: cfg, checked: cfg.Now()}
	data, err := readBundle(cfg.File)
	if err != nil {
		return nil, err
	}
	roots, err := parseBundle(cfg.File, data)
	if err != nil {
		return nil, err
	}
	t.sum = sha256.Sum256(data)
	t.present.Store(t.trusting(roots))
	return t, nil
}

// RoundTrip sends a request to a server that the file vouches for. If the
// server's certificate is not trusted, and the file has changed, it tries once
// more: nothing was sent yet.
func (t *BundleTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	used := t.look(t.cfg.Interval)
	res, err := used.RoundTrip(req)
	var distrust *tls.CertificateVerificationError
	if err == nil || !errors.As(err, &distrust) {
		return res, err
	}
	next := t.look(min(afterDistrust, t.cfg.Interval))
	hasBody := req.Body != nil && req.Body != http.NoBody
	if next == used || hasBody && req.GetBody == nil {
		return nil, err
	}
	again := req.Clone(req.Context())
	if hasBody {
		body, bodyErr := req.GetBody()
		if bodyErr != nil {
			return nil, err
		}
		again.Body = body
	}
	return next.RoundTrip(again)
}

// CloseIdleConnections closes the connections that no request uses.
func (t *BundleTransport) CloseIdleConnections() { t.present.Load().CloseIdleConnections() }

// look reads the file if that is longer ago than interval, and returns the
// transport to use. The content is compared, not size and times, which can stay
// the same over a change; symbolic links are followed, as mounted ConfigMaps and
// Secrets are made of them.
func (t *BundleTransport) look(interval time.Duration) *http.Transport {
	t.mu.Lock()
	defer t.mu.Unlock()
	present, now := t.present.Load(), t.cfg.Now()
	// Age below zero: the clock was set back.
	if age := now.Sub(t.checked); age >= 0 && age < interval {
		return present
	}
	t.checked = now
	data, err := readBundle(t.cfg.File)
	sum := sha256.Sum256(data)
	if err != nil {
		sum = sha256.Sum256([]byte(err.Error()))
	} else if sum == t.sum {
		t.refused = [sha256.Size]byte{}
		return present
	}
	var roots *x509.CertPool
	if err == nil {
		roots, err = parseBundle(t.cfg.File, data)
	}
	if err != nil {
		if sum != t.refused {
			t.refused = sum
			t.cfg.Logger.Error("the new CA bundle is ignored, and what the last one held is trusted", "error", err)
		}
		return present
	}
	t.sum, t.refused = sum, [sha256.Size]byte{}
	next := t.trusting(roots)
	t.present.Store(next)
	// Requests on their way end as they are.
	present.CloseIdleConnections()
	t.cfg.Logger.Info("the CA bundle has changed and was read anew", "file", t.cfg.File)
	return next
}

// trusting is the base with these certificates.
func (t *BundleTransport) trusting(roots *x509.CertPool) *http.Transport {
	next := t.cfg.Base.Clone()
	if next.TLSClientConfig == nil {
		next.TLSClientConfig = &tls.Config{MinVersion: tls.VersionTLS12}
	}
	next.TLSClientConfig.RootCAs = roots // the clone's own
	return next
}

func readBundle(path string) ([]byte, error) {
	// Without blocking: what was a file once may be a pipe now.
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBundle, err)
	}
	defer func() { _ = file.Close() }()
	if info, err := file.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%w: %s is not a regular file", ErrBundle, path)
	}
	data, err := io.ReadAll(io.LimitReader(file, maxBundle+1))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBundle, err)
	}
	if len(data) > maxBundle {
		return nil, fmt.Errorf("%w: %s has more than %d bytes", ErrBundle, path, maxBundle)
	}
	return data, nil
}

// parseBundle accepts what the AWS SDK accepts at the start.
func parseBundle(path string, data []byte) (*x509.CertPool, error) {
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(data) {
		return nil, fmt.Errorf("%w: %s holds no certificate", ErrBundle, path)
	}
	return roots, nil
}
