// SPDX-License-Identifier: Apache-2.0

package association

import (
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
)

// remoteEtcd is one that is spoken to over gRPC, with etcd's own default limits,
// as a cluster elsewhere is. It is stopped and started again by the test.
type remoteEtcd struct {
	cfg    func() *embed.Config
	server *embed.Etcd
	client *clientv3.Client
}

func newRemote(t *testing.T) *remoteEtcd {
	t.Helper()
	// Socket paths are short.
	dir := t.TempDir()
	peer, err := url.Parse("unix://remote")
	if err != nil {
		t.Fatal(err)
	}
	socket := url.URL{Scheme: "unix", Path: filepath.Join(dir, "s")}
	r := &remoteEtcd{cfg: func() *embed.Config {
		c := embed.NewConfig()
		c.Name, c.Dir, c.InitialCluster = "remote", filepath.Join(dir, "data"), "remote=unix://remote"
		c.ListenPeerUrls, c.AdvertisePeerUrls = nil, []url.URL{*peer}
		c.ListenClientUrls, c.AdvertiseClientUrls = []url.URL{socket}, []url.URL{socket}
		c.EnableGRPCGateway = false
		c.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
		return c
	}}
	r.start(t)
	t.Cleanup(func() { r.server.Close() })
	r.client, err = clientv3.New(clientv3.Config{Endpoints: []string{"unix://" + socket.Path}, Logger: zap.NewNop(), DialTimeout: patience})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.client.Close() })
	return r
}

func (r *remoteEtcd) start(t *testing.T) {
	t.Helper()
	var err error
	if r.server, err = embed.StartEtcd(r.cfg()); err != nil {
		t.Fatal(err)
	}
	select {
	case <-r.server.Server.ReadyNotify():
	case <-time.After(patience):
		t.Fatal("etcd did not start")
	}
}

// The same code serves over a connection: races, watches, and an outage.
func TestRemoteEtcd(t *testing.T) {
	r := newRemote(t)
	cfg := Config{Client: r.client, Timeout: patience}
	s := NewStore(cfg)
	if _, err := s.PutCluster(t.Context(), testCluster("prod")); err != nil {
		t.Fatal(err)
	}
	x := startIndex(t, s, nil)

	var wg sync.WaitGroup
	var mu sync.Mutex
	made := 0
	for range 16 {
		wg.Go(func() {
			if _, err := s.Create(t.Context(), input("race", "one")); err == nil {
				mu.Lock()
				made++
				mu.Unlock()
			} else if !errors.Is(err, ErrInUse) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if made != 1 {
		t.Errorf("%d were made", made)
	}
	var in []CreateInput
	for i := range 300 {
		in = append(in, input("many", fmt.Sprint("sa-", i)))
	}
	many, err := s.CreateMany(t.Context(), "prod", in)
	if err != nil {
		t.Fatal(err)
	}
	wait(t, x, many[299].Revision)
	sameAsStore(t, x, s)
	if got := all(t, s, ListInput{Cluster: "prod"}); len(got) != 301 {
		t.Errorf("%d associations", len(got))
	}
	until(t, "progress", func() bool { return x.Behind() < time.Minute })

	// Away: what cannot be said is said to be unavailable, and what was known is
	// answered from memory.
	r.server.Close()
	impatient := NewStore(Config{Client: r.client, Timeout: 200 * time.Millisecond})
	token := input("web", "outage")
	token.ClientToken = "token"
	_, err = impatient.Create(t.Context(), token)
	wantError(t, err, Unavailable, "")
	_, err = impatient.Describe(t.Context(), "prod", many[0].ID)
	wantError(t, err, Unavailable, "")
	if _, ok := x.Lookup("prod", "many", "sa-7"); !ok {
		t.Error("the index forgot")
	}
	r.start(t)
	a, err := s.Create(t.Context(), token)
	if err != nil {
		t.Fatal(err)
	}
	wait(t, x, a.Revision)
	sameAsStore(t, x, s)
	if x.Lists() != 1 {
		t.Errorf("%d lists: an outage is no reason to read everything again", x.Lists())
	}
}
