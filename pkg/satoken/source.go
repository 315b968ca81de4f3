// SPDX-License-Identifier: Apache-2.0

package satoken

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4/json"
)

// ServiceAccountDir is where Kubernetes mounts a pod's own token and the API
// server's CA.
const ServiceAccountDir = "/var/run/secrets/kubernetes.io/serviceaccount"

const (
	discoveryPath = "/.well-known/openid-configuration"
	jwksPath      = "/openid/v1/jwks"
)

// FileSource reads keys from a file that the operator keeps: a JSON Web Key Set
// or PEM, such as kubeadm's sa.pub. It names no issuer.
type FileSource struct{ path string }

// NewFileSource makes a FileSource. The file need not exist yet.
func NewFileSource(path string) (*FileSource, error) {
	if path == "" {
		return nil, errors.New("the key file has no name")
	}
	absolute, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("naming the key file: %w", err)
	}
	return &FileSource{path: absolute}, nil
}

// Fetch reads the file. It reads it each time and lets the content be compared:
// size, inode and times can all stay the same over a change that is made within
// one tick of the file system's clock, and the file is small.
func (s *FileSource) Fetch(context.Context) (Document, error) {
	// Symbolic links are followed: mounted ConfigMaps are made of them.
	data, err := readFile(s.path, 0, func(path string, info fs.FileInfo) error {
		if info.Mode().Perm()&0o002 != 0 {
			return fmt.Errorf("%s may be written by everybody", path)
		}
		return nil
	})
	return Document{Keys: data}, err
}

// Identity is empty: the file is on disk already.
func (s *FileSource) Identity() (string, error) { return "", nil }

// NamesIssuer is false.
func (s *FileSource) NamesIssuer() bool { return false }

func (s *FileSource) String() string { return "file " + s.path }

// IssuerConfig is what an IssuerSource is made of.
type IssuerConfig struct {
	// URL is the issuer, exactly as tokens have it in iss. It must be https;
	// http only to this host itself.
	URL string
	// CAFile holds the certificates to trust instead of the system's, in PEM. It
	// is read at each fetch.
	CAFile string
}

// IssuerSource reads keys by OpenID Connect Discovery 1.0 from an issuer that
// the operator has named.
type IssuerSource struct {
	cfg       IssuerConfig
	plainText bool // the issuer is on this host, without TLS
}

// NewIssuerSource makes an IssuerSource. It does not contact the issuer.
func NewIssuerSource(cfg IssuerConfig) (*IssuerSource, error) {
	u, err := url.Parse(cfg.URL)
	if err != nil {
		return nil, fmt.Errorf("reading the issuer URL: %w", err)
	}
	s := &IssuerSource{cfg: cfg, plainText: u.Scheme == "http" && isLoopback(u.Hostname())}
	if err := s.checkURL(u); err != nil {
		return nil, fmt.Errorf("issuer URL: %w", err)
	}
	if u.RawQuery != "" || u.ForceQuery {
		return nil, errors.New("issuer URL: a query is not allowed")
	}
	return s, nil
}

// checkURL allows https, and http to this host if the operator has named an
// issuer there: no remote document can send us to a local service.
func (s *IssuerSource) checkURL(u *url.URL) error {
	switch {
	case u.Host == "":
		return errors.New("no host is named")
	case u.User != nil || u.Fragment != "":
		return errors.New("a user or fragment is not allowed")
	case u.Scheme == "https":
		return nil
	case u.Scheme == "http" && s.plainText && isLoopback(u.Hostname()):
		return nil
	}
	return errors.New("https is required")
}

func isLoopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// Fetch reads the discovery document, which must name the issuer as it was
// configured, and the key set that it points to.
func (s *IssuerSource) Fetch(ctx context.Context) (Document, error) {
	roots, _, err := readRoots(s.cfg.CAFile)
	if err != nil {
		return Document{}, err
	}
	get := getter(roots, http.ProxyFromEnvironment, "")
	found, err := discover(ctx, get, strings.TrimSuffix(s.cfg.URL, "/")+discoveryPath)
	if err != nil {
		return Document{}, err
	}
	if found.Issuer != s.cfg.URL {
		return Document{}, fmt.Errorf("discovery document names issuer %q", found.Issuer)
	}
	u, err := url.Parse(found.JWKSURI)
	if err != nil {
		return Document{}, fmt.Errorf("reading jwks_uri: %w", err)
	}
	if err := s.checkURL(u); err != nil {
		return Document{}, fmt.Errorf("jwks_uri %s: %w", u.Redacted(), err)
	}
	keys, err := get(ctx, found.JWKSURI)
	return Document{Issuer: found.Issuer, Keys: keys}, err
}

// Identity is the URL and whom we trust to answer for it.
func (s *IssuerSource) Identity() (string, error) {
	_, trust, err := readRoots(s.cfg.CAFile)
	return "issuer " + s.cfg.URL + " trusting " + trust, err
}

// NamesIssuer is true.
func (s *IssuerSource) NamesIssuer() bool { return true }

func (s *IssuerSource) String() string { return "issuer " + s.cfg.URL }

// APIServerConfig is what an APIServerSource is made of.
type APIServerConfig struct {
	// Dir holds the files token and ca.crt, which are read at each fetch: the
	// kubelet replaces them. Empty means ServiceAccountDir.
	Dir string
	// Host and Port of the API server. Empty means the environment variables
	// KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT.
	Host, Port string
}

// APIServerSource reads keys from the API server of the cluster that this pod
// runs in, by service account issuer discovery (Kubernetes 1.21). The ClusterRole
// system:service-account-issuer-discovery, which every service account has by
// default, allows it.
type APIServerSource struct {
	dir, base string
}

// NewAPIServerSource makes an APIServerSource. It does not contact the API
// server.
func NewAPIServerSource(cfg APIServerConfig) (*APIServerSource, error) {
	if cfg.Dir == "" {
		cfg.Dir = ServiceAccountDir
	}
	if cfg.Host == "" {
		cfg.Host = os.Getenv("KUBERNETES_SERVICE_HOST")
	}
	if cfg.Port == "" {
		cfg.Port = os.Getenv("KUBERNETES_SERVICE_PORT")
	}
	if cfg.Host == "" || cfg.Port == "" {
		return nil, errors.New("the API server's address is not known: KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set, so this does not run in a pod")
	}
	base := "https://" + net.JoinHostPort(cfg.Host, cfg.Port)
	if u, err := url.Parse(base); err != nil || u.Hostname() != cfg.Host || u.User != nil {
		return nil, errors.New("the API server's address is not valid")
	}
	return &APIServerSource{dir: cfg.Dir, base: base}, nil
}

// Fetch reads the issuer and the keys, both from the API server itself: the
// jwks_uri it publishes is for others and often names an outside address.
func (s *APIServerSource) Fetch(ctx context.Context) (Document, error) {
	roots, _, err := readRoots(s.caFile())
	if err != nil {
		return Document{}, err
	}
	token, err := readFile(filepath.Join(s.dir, "token"), 0, func(string, fs.FileInfo) error { return nil })
	if err != nil {
		return Document{}, fmt.Errorf("our own token: %w", err)
	}
	// No proxy: it is our own cluster, and the request carries our token.
	get := getter(roots, nil, strings.TrimSpace(string(token)))
	found, err := discover(ctx, get, s.base+discoveryPath)
	if err != nil {
		return Document{}, err
	}
	keys, err := get(ctx, s.base+jwksPath)
	return Document{Issuer: found.Issuer, Keys: keys}, err
}

// Identity is the address and the CA: many clusters have an API server at
// 10.96.0.1, but each has its own CA.
func (s *APIServerSource) Identity() (string, error) {
	_, trust, err := readRoots(s.caFile())
	return "apiserver " + s.base + " trusting " + trust, err
}

// NamesIssuer is true.
func (s *APIServerSource) NamesIssuer() bool { return true }

func (s *APIServerSource) String() string { return "API server " + s.base }

func (s *APIServerSource) caFile() string { return filepath.Join(s.dir, "ca.crt") }

// readRoots reads a CA file, and names what it holds. No file means the
// system's certificates.
func readRoots(path string) (_ *x509.CertPool, trust string, err error) {
	if path == "" {
		return nil, "system", nil
	}
	data, err := readFile(path, 0, func(string, fs.FileInfo) error { return nil })
	if err != nil {
		return nil, "", fmt.Errorf("CA file: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(data) {
		return nil, "", fmt.Errorf("CA file %s holds no certificate", path)
	}
	return pool, fmt.Sprintf("sha256:%x", sha256.Sum256(data)), nil
}

// discovery is what we read of OpenID Connect Discovery 1.0, section 3.
type discovery struct {
	Issuer  string `json:"issuer"`
	JWKSURI string `json:"jwks_uri"`
}

func discover(ctx context.Context, get getFunc, address string) (discovery, error) {
	data, err := get(ctx, address)
	if err != nil {
		return discovery{}, err
	}
	var found discovery
	if nesting, _ := shape(data); nesting > maxNesting {
		return discovery{}, errors.New("discovery document is nested too deeply")
	}
	if err := json.Unmarshal(data, &found); err != nil {
		return discovery{}, fmt.Errorf("reading the discovery document: %w", err)
	}
	if found.Issuer == "" {
		return discovery{}, errors.New("discovery document names no issuer")
	}
	return found, nil
}

type getFunc func(ctx context.Context, address string) ([]byte, error)

// getter makes a client for one fetch. Fetches are minutes apart, so it keeps no
// connection, and each one sees the present CA.
func getter(roots *x509.CertPool, proxy func(*http.Request) (*url.URL, error), token string) getFunc {
	client := &http.Client{
		// A redirect could lead anywhere, and would take a reply from a place
		// that nobody has named for the issuer's own.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{
			Proxy:                  proxy,
			DialContext:            (&net.Dialer{Timeout: 3 * time.Second}).DialContext,
			TLSClientConfig:        &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
			TLSHandshakeTimeout:    5 * time.Second,
			ResponseHeaderTimeout:  5 * time.Second,
			MaxResponseHeaderBytes: 64 << 10,
			DisableKeepAlives:      true,
		},
	}
	return func(ctx context.Context, address string) ([]byte, error) {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
		if err != nil {
			return nil, fmt.Errorf("making a request: %w", err)
		}
		// The API server answers 406 to whoever does not ask for the media type of
		// RFC 7517 when it serves keys; discovery documents are plain JSON.
		request.Header.Set("Accept", "application/jwk-set+json, application/json")
		if token != "" {
			request.Header.Set("Authorization", "Bearer "+token)
		}
		response, err := client.Do(request)
		if err != nil {
			return nil, fmt.Errorf("asking: %w", err)
		}
		defer func() { _ = response.Body.Close() }()
		if response.StatusCode != http.StatusOK {
			return nil, fmt.Errorf("GET %s: status %d", request.URL.Redacted(), response.StatusCode)
		}
		body, err := io.ReadAll(io.LimitReader(response.Body, maxKeySetSize+1))
		if err != nil {
			return nil, fmt.Errorf("GET %s: %w", request.URL.Redacted(), err)
		}
		if len(body) > maxKeySetSize {
			return nil, fmt.Errorf("GET %s: more than %d bytes", request.URL.Redacted(), maxKeySetSize)
		}
		return body, nil
	}
}
