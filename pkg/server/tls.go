// SPDX-License-Identifier: Apache-2.0

package server

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"
)

// certificateAge is how long the files of a certificate are not looked at
// again: a handshake is not made dearer by two stat calls each.
const certificateAge = time.Second

// certificate is a certificate and its key, from two files that somebody else
// (cert-manager, an ACME client, the kubelet) replaces while the server runs.
// The files are read again when they have changed, at a handshake, so that there
// is no timer and no watch to lose. A pair that cannot be used, such as one
// half written, changes nothing: the last good one is served, and the files are
// tried again.
type certificate struct {
	certFile, keyFile string
	now               func() time.Time
	log               *slog.Logger

	mu       sync.Mutex
	looked   time.Time
	cert     *tls.Certificate
	stamp    [2]fileStamp
	failed   error
	reloads  uint64
	failures uint64
}

// fileStamp tells one content of a file from another. Kubernetes replaces files
// by a symbolic link to another directory: inode and time differ then.
type fileStamp struct {
	modified time.Time
	size     int64
	info     os.FileInfo
}

func stampOf(path string) (fileStamp, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return fileStamp{}, err
	}
	return fileStamp{fi.ModTime(), fi.Size(), fi}, nil
}

func (s fileStamp) same(o fileStamp) bool {
	return s.info != nil && o.info != nil && s.modified.Equal(o.modified) && s.size == o.size && os.SameFile(s.info, o.info)
}

// newCertificate loads the pair, which must be usable at the start.
func newCertificate(certFile, keyFile string, now func() time.Time, log *slog.Logger) (*certificate, error) {
	c := &certificate{certFile: certFile, keyFile: keyFile, now: now, log: log}
	if err := c.load(); err != nil {
		return nil, err
	}
	c.looked = now()
	return c, nil
}

func (c *certificate) stamps() ([2]fileStamp, error) {
	var out [2]fileStamp
	for i, f := range []string{c.certFile, c.keyFile} {
		s, err := stampOf(f)
		if err != nil {
			return out, err
		}
		out[i] = s
	}
	return out, nil
}

// load reads both files. The stamps are taken before: a file that changes while
// it is read looks changed at the next look.
func (c *certificate) load() error {
	stamp, err := c.stamps()
	if err != nil {
		return fmt.Errorf("TLS certificate: %w", err)
	}
	pair, err := tls.LoadX509KeyPair(c.certFile, c.keyFile)
	if err != nil {
		return fmt.Errorf("TLS certificate %s with key %s: %w", c.certFile, c.keyFile, err)
	}
	if pair.Leaf == nil {
		return fmt.Errorf("TLS certificate %s: no certificate in it", c.certFile)
	}
	c.cert, c.stamp = &pair, stamp
	return nil
}

// get is tls.Config.GetCertificate.
func (c *certificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.look()
	return c.cert, nil
}

// look loads the files if they changed. The caller holds mu.
func (c *certificate) look() {
	now := c.now()
	if since := now.Sub(c.looked); since >= 0 && since < certificateAge {
		return
	}
	c.looked = now
	stamp, err := c.stamps()
	if err == nil && stamp[0].same(c.stamp[0]) && stamp[1].same(c.stamp[1]) {
		c.failed = nil
		return
	}
	if err == nil {
		err = c.load()
	}
	if err != nil {
		// Once for each kind of failure, not at every handshake.
		if c.failed == nil || c.failed.Error() != err.Error() {
			c.log.Error("cannot read the new TLS certificate; the last one is served", "error", err)
		}
		c.failed = err
		c.failures++
		return
	}
	c.failed = nil
	c.reloads++
	c.log.Info("TLS certificate read again", "not_after", c.cert.Leaf.NotAfter, "subject", c.cert.Leaf.Subject.String())
}

// state is the leaf in use, and why its files cannot be used now, if so.
func (c *certificate) state() (leaf *x509.Certificate, reloads, failures uint64, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.look()
	return c.cert.Leaf, c.reloads, c.failures, c.failed
}

// tlsConfig offers TLS 1.3 and nothing older: every SDK of the last years has
// it.
func (c *certificate) tlsConfig() *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS13, GetCertificate: c.get}
}

// errNoTLS: the server would speak plain HTTP where others can listen.
var errNoTLS = errors.New("plain HTTP beyond loopback: give --tls-cert and --tls-key, listen on 127.0.0.1, or force it with --insecure-http")
