// SPDX-License-Identifier: Apache-2.0

// Package realetcd gives the tests of a package one etcd, the server's own,
// which starts when the first of them asks for it.
package realetcd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/latchkey-dev/latchkey/pkg/etcd"
)

// Shared is an etcd of several tests, which keep apart by their prefixes. The
// zero value has not been started.
type Shared struct {
	once     sync.Once
	server   *etcd.Server
	dir      string
	err      error
	prefixes atomic.Int64
}

// Run runs a package's tests, and then ends the etcd; the result is the exit
// code. It is for TestMain.
func (s *Shared) Run(m *testing.M) int {
	code := m.Run()
	if err := s.close(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	return code
}

// Client is etcd's client, for all tests.
func (s *Shared) Client(t testing.TB) *clientv3.Client {
	t.Helper()
	s.once.Do(func() {
		if s.dir, s.err = os.MkdirTemp("", "latchkey-test-etcd-"); s.err == nil {
			s.server, s.err = etcd.Start(context.Background(), etcd.Config{Dir: s.dir})
		}
	})
	if s.err != nil {
		t.Fatal(s.err)
	}
	return s.server.Client()
}

// Prefix is one that nobody else was given.
func (s *Shared) Prefix() string { return fmt.Sprintf("/test/%d/", s.prefixes.Add(1)) }

func (s *Shared) close() error {
	if s.dir == "" {
		return nil
	}
	var err error
	if s.server != nil {
		err = s.server.Close()
	}
	return errors.Join(err, os.RemoveAll(s.dir))
}
