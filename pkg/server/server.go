// SPDX-License-Identifier: Apache-2.0

package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.opentelemetry.io/contrib/instrumentation/net/http/otelhttp"

	"github.com/latchkey-dev/latchkey/pkg/adminsocket"
	"github.com/latchkey-dev/latchkey/pkg/association"
	"github.com/latchkey-dev/latchkey/pkg/eksapi"
	"github.com/latchkey-dev/latchkey/pkg/etcd"
	"github.com/latchkey-dev/latchkey/pkg/issuer"
	"github.com/latchkey-dev/latchkey/pkg/nodeauth"
	"github.com/latchkey-dev/latchkey/pkg/nodeauth/exchange"
	"github.com/latchkey-dev/latchkey/pkg/permission"
	"github.com/latchkey-dev/latchkey/pkg/satoken"
	"github.com/latchkey-dev/latchkey/pkg/sigv4"
	"github.com/latchkey-dev/latchkey/pkg/strangers"
	"github.com/latchkey-dev/latchkey/pkg/tokencheck"
)

const (
	// stopGrace is how long requests in progress may take once the server is told
	// to stop. Kubernetes gives a pod 30 s.
	stopGrace = 15 * time.Second
	// startLimit bounds what the start waits for: a store of half a million
	// associations on a slow disk.
	startLimit = 5 * time.Minute
)

// server is a running server.
type server struct {
	cfg     Config
	log     *slog.Logger
	started time.Time

	etcd  *etcd.Server
	store *association.Store
	index *association.Index
	users *permission.Users
	ring  *exchange.Ring
	cert  *certificate
	audit *auditLog
	// strangers bounds the records of refusals on both endpoints together.
	strangers *strangers.Limits
	metrics   *metrics
	control   *control
	// sts is what `doctor` asks STS with; nil for a stand-in.
	sts      func(context.Context) Finding
	address  string
	serving  atomic.Bool
	stopping atomic.Bool
}

// Run serves until ctx ends, then stops gracefully and returns nil. It returns
// an error if the server cannot start: a setting that makes no sense (ErrConfig),
// a state directory that is in use (ErrAnotherServer), an address that is taken;
// or if the store fails while it serves.
func Run(ctx context.Context, cfg Config) error {
	if err := cfg.check(); err != nil {
		return err
	}
	for _, w := range cfg.warnings() {
		cfg.Logger.Warn(w)
	}
	s := &server{cfg: cfg, log: cfg.Logger, started: cfg.Now(), strangers: strangers.New(strangers.Config{Now: cfg.Now})}
	if err := ownDirectory(cfg.StateDir); err != nil {
		return err
	}
	var err error
	if cfg.TLSCert != "" {
		if s.cert, err = newCertificate(cfg.TLSCert, cfg.TLSKey, cfg.Now, s.log); err != nil {
			return fmt.Errorf("%w: %w", ErrConfig, err)
		}
	}
	// Both addresses before the store is opened: who cannot serve should not
	// touch it. Nothing is accepted yet.
	tcp, err := listenTCP(ctx, cfg.Listen)
	if err != nil {
		return fmt.Errorf("--listen: %w", err)
	}
	defer tcp.Close()
	ln := newBoundedListener(tcp, cfg.MaxConnections, cfg.MaxAddressConnections)
	s.address = ln.Addr().String()
	adminListener, err := listenAdmin(ctx, cfg.AdminSocket)
	if err != nil {
		return err
	}
	defer adminListener.Close()
	if s.audit, err = openAudit(cfg.AuditLog, cfg.AuditSize, cfg.AuditFiles, cfg.Stdout, s.log); err != nil {
		return err
	}
	defer s.audit.Close()
	stopTraces, err := startTraces(ctx, &cfg)
	if err != nil {
		return err
	}
	defer stopTraces()
	if err := s.openUsers(); err != nil {
		return err
	}

	// What runs beside the requests ends after them.
	background, stopBackground := context.WithCancel(context.WithoutCancel(ctx))
	var wg sync.WaitGroup
	defer func() {
		stopBackground()
		wg.Wait()
	}()
	starting, cancelStart := context.WithTimeout(ctx, startLimit)
	defer cancelStart()

	if s.etcd, err = etcd.Start(starting, etcd.Config{Dir: EtcdDir(cfg.StateDir), QuotaBytes: cfg.StoreQuota, Log: s.log}); err != nil {
		if ctx.Err() != nil {
			return nil // told to stop meanwhile
		}
		if errors.Is(err, etcd.ErrLocked) {
			return fmt.Errorf("%w: %w", ErrAnotherServer, err)
		}
		return fmt.Errorf("store: %w", err)
	}
	defer s.etcd.Close()
	// Last of what needs the store, so that it ends first.
	defer func() {
		stopBackground()
		wg.Wait()
	}()
	client := s.etcd.Client()
	s.store = association.NewStore(association.Config{Client: client, Now: cfg.Now, Log: s.log})
	s.index = association.NewIndex(association.IndexConfig{Client: client, Now: cfg.Now, Log: s.log})
	s.metrics = newMetrics(&s.cfg)
	s.control = &control{store: s.store, now: cfg.Now, changed: func(r changeRecord) { s.audit.Write(r) }}
	if err := s.control.configured(starting, cfg.Clusters); err != nil {
		return err
	}
	if s.ring, err = exchange.NewRing(exchange.RingConfig{Store: sealingKeys{client}, Now: cfg.Now, Log: s.log}); err != nil {
		return err
	}
	if err := s.ring.Refresh(starting); err != nil {
		return fmt.Errorf("the keys that seal nodes' credentials: %w", err)
	}
	handler, err := s.api(ctx)
	if err != nil {
		return err
	}
	wg.Go(func() { _ = s.index.Run(background) })
	wg.Go(func() { _ = s.users.Run(background) })
	wg.Go(func() { _ = s.ring.Run(background) })

	// The side endpoints may answer before the index is whole: that is when
	// somebody asks what takes so long.
	side, stopSide := context.WithCancel(context.WithoutCancel(ctx))
	defer stopSide()
	s.metrics.registerState(s)
	s.metrics.gauge("latchkey_server_connections", "Connections of the APIs that are open.", func() float64 { return float64(ln.connections()) })
	s.metrics.counter("latchkey_server_connections_refused_total", "Connections of the APIs closed at once, because there were too many.", func() float64 { return float64(ln.refused.Load()) })
	// Not before: until now nothing filled the index.
	s.control.seen = func(ctx context.Context, revision int64) {
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		_ = s.index.Wait(ctx, revision)
	}
	if cfg.MetricsAddress != "" {
		wg.Go(func() { s.keepServing(side, cfg.MetricsAddress, s.sideHandler()) })
	}
	a := &admin{control: s.control, log: s.log, status: s.status, doctor: s.examine, snapshot: s.snapshot, reloadUsers: s.users.Reload, ring: s.ring}
	adminServer := newHTTPServer(a.handler())
	// A doctor or an import takes longer than a client of the API may.
	adminServer.ReadTimeout, adminServer.WriteTimeout = time.Minute, 10*time.Minute
	adminServer.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
		if p, ok := c.(adminsocket.Conn); ok {
			return context.WithValue(ctx, whoKey{}, p.UID)
		}
		return ctx
	}
	wg.Go(func() {
		if err := serveUntil(side, adminListener, adminServer, stopGrace); err != nil {
			s.log.Error("admin socket ended", "error", err)
		}
	})
	if err := s.waitIndex(starting); err != nil {
		if ctx.Err() != nil {
			return nil // told to stop meanwhile
		}
		return err
	}

	apiServer := newHTTPServer(handler)
	if s.cert != nil {
		apiServer.TLSConfig = s.cert.tlsConfig()
	}
	serving, stopServing := context.WithCancel(context.WithoutCancel(ctx))
	defer stopServing()
	ended := make(chan error, 1)
	wg.Go(func() { ended <- serveAPI(serving, ln, apiServer) })
	s.serving.Store(true)
	associations, clusters := s.index.Len()
	s.log.Info("started", "version", cfg.Version, "listen", s.address, "tls", s.cert != nil, "sts", s.stsText(),
		"clusters", clusters, "associations", associations, "users", s.users.Status().Users, "node_binding", cfg.NodeBinding)

	select {
	case <-ctx.Done():
	case err = <-ended:
		return fmt.Errorf("the listener ended: %w", err)
	case <-s.etcd.Failed():
		err = fmt.Errorf("the store ended: %w", s.etcd.Err())
	}
	s.stopping.Store(true)
	s.log.Info("stopping")
	stopServing()
	if cut := <-ended; cut != nil {
		s.log.Warn("not everybody was answered", "error", cut)
	}
	stopSide()
	if err == nil {
		s.log.Info("stopped")
	}
	return err
}

func serveAPI(ctx context.Context, ln net.Listener, srv *http.Server) error {
	if srv.TLSConfig != nil {
		return serveUntil(ctx, tlsListener(ln, srv), srv, stopGrace)
	}
	return serveUntil(ctx, ln, srv, stopGrace)
}

// ownDirectory makes the state directory, or takes away what others may do with
// it: secrets of nodes and users are in it.
func ownDirectory(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("--state-dir: %w", err)
	}
	fi, err := os.Stat(dir)
	switch {
	case err != nil:
		return fmt.Errorf("--state-dir: %w", err)
	case !fi.IsDir():
		return fmt.Errorf("%w: --state-dir %s is no directory", ErrConfig, dir)
	case fi.Mode().Perm()&0o077 == 0:
		return nil
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return fmt.Errorf("--state-dir %s must be open to its owner alone: %w", dir, err)
	}
	return nil
}

// openUsers opens the users file. One that is not there is made: the first start
// is before the first user.
func (s *server) openUsers() (err error) {
	if f, err := os.OpenFile(s.cfg.Users, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600); err == nil {
		_, werr := f.WriteString("# Users of latchkey-server; `latchkey-server user` edits this file.\nusers: []\n")
		if err := errors.Join(werr, f.Close()); err != nil {
			return fmt.Errorf("users file: %w", err)
		}
	} else if !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("users file: %w", err)
	}
	changed := func(c permission.Change) {
		s.audit.Write(changeRecord{Time: s.cfg.Now().UTC(), Type: eksapi.TypeChange, Operation: "LoadUsers", Outcome: eksapi.OutcomeDone, Caller: "users file", State: c})
	}
	if s.users, err = permission.Open(permission.Config{Path: s.cfg.Users, Changed: changed, Now: s.cfg.Now, Log: s.log}); err != nil {
		return fmt.Errorf("%w: %w", ErrConfig, err)
	}
	if st := s.users.Status(); st.Users == 0 {
		s.log.Warn("there are no users: nobody can make an association but over the admin socket; `latchkey-server user add` makes one", "file", s.cfg.Users)
	}
	return nil
}

// api is the handler of the listener.
func (s *server) api(ctx context.Context) (http.Handler, error) {
	pods, err := tokencheck.New(tokencheck.Config{
		Audience: satoken.DefaultAudience, Refuse: nodeauth.Audience,
		Observe: s.metrics.review, Now: s.cfg.Now, Log: s.log,
	})
	if err != nil {
		return nil, err
	}
	agents, err := tokencheck.New(tokencheck.Config{
		Audience: nodeauth.Audience, Refuse: satoken.DefaultAudience,
		Observe: s.metrics.review, Now: s.cfg.Now, Log: s.log,
	})
	if err != nil {
		return nil, err
	}
	nodes, err := exchange.New(exchange.Config{
		Ring: s.ring, Tokens: agents, Clusters: s.index, Observe: s.nodeExchanged, Now: s.cfg.Now, Log: s.log,
	})
	if err != nil {
		return nil, err
	}
	credentials, err := s.issuer(ctx)
	if err != nil {
		return nil, err
	}
	eks, err := eksapi.New(eksapi.Config{
		Associations: s.store, Index: s.index, Tokens: pods, Issuer: credentials,
		Keys:        sigv4.Choose{Static: s.users, Session: nodes},
		NodeBinding: eksapi.NodeBinding(s.cfg.NodeBinding), Limits: s.cfg.limits(), Strangers: s.strangers,
		Audit: func(r eksapi.Record) {
			s.metrics.audited(r, func(name string) bool { _, ok := s.index.Cluster(name); return ok })
			s.audit.Write(r)
		},
		Observe: s.metrics.observe, Now: s.cfg.Now, Log: s.log,
	})
	if err != nil {
		return nil, err
	}
	limited := newPeerLimit(nodes, s.cfg.Now)
	mux := http.NewServeMux()
	mux.Handle(exchange.Pattern, limited)
	// A mux answers some paths with redirects and texts of its own; an SDK wants
	// JSON, and a signature is of the path as it was sent. So only the one path
	// that is not the SDKs' goes through it.
	var handler http.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost && strings.HasPrefix(r.URL.Path, "/latchkey/v1/") {
			if _, pattern := mux.Handler(r); pattern == exchange.Pattern {
				mux.ServeHTTP(w, r)
				return
			}
		}
		eks.ServeHTTP(w, r)
	})
	if s.cfg.TracesEndpoint != "" {
		// Names of operations, statuses and times: neither headers nor bodies. Who
		// calls does not choose what is traced.
		handler = otelhttp.NewHandler(handler, "latchkey-server", otelhttp.WithPublicEndpointFn(func(*http.Request) bool { return true }))
	}
	return handler, nil
}

// issuer is STS, or what stands in for it.
func (s *server) issuer(ctx context.Context) (eksapi.Issuer, error) {
	if s.cfg.StandInSTS {
		return issuer.NewStandIn(issuer.StandInConfig{Duration: s.cfg.SessionDuration, Now: s.cfg.Now, Log: s.log})
	}
	s.sts = s.askSTS
	i, err := issuer.New(ctx, issuer.Config{
		Endpoint: s.cfg.STSEndpoint, Duration: s.cfg.SessionDuration, Observe: s.metrics.stsCall,
		Now: s.cfg.Now, Log: s.log,
	})
	if errors.Is(err, issuer.ErrConfig) {
		return nil, fmt.Errorf("%w: %w", ErrConfig, err)
	}
	return i, err
}

func (s *server) stsText() string {
	switch {
	case s.cfg.StandInSTS:
		return "stand-in"
	case s.cfg.STSEndpoint != "":
		return s.cfg.STSEndpoint
	}
	return "AWS"
}

// nodeRecord is the audit record of keys given to an agent, or refused.
type nodeRecord struct {
	Time    time.Time        `json:"time"`
	Type    string           `json:"type"`
	Outcome string           `json:"outcome"`
	Error   string           `json:"error,omitempty"`
	Cluster string           `json:"cluster"`
	Peer    string           `json:"peer,omitempty"`
	Node    *permission.Node `json:"node,omitempty"`
	// Of the agent's pod, and of its token.
	Namespace         string     `json:"namespace,omitempty"`
	ServiceAccount    string     `json:"service_account,omitempty"`
	Pod               string     `json:"pod,omitempty"`
	PodUID            string     `json:"pod_uid,omitempty"`
	JTI               string     `json:"jti,omitempty"`
	IssuedAccessKeyID string     `json:"issued_access_key_id,omitempty"`
	Expires           *time.Time `json:"expires,omitempty"`
}

// typeNode is nodeRecord.Type.
const typeNode = "node_credentials"

func (s *server) nodeExchanged(e exchange.Event) {
	r := nodeRecord{Time: s.cfg.Now().UTC(), Type: typeNode, Outcome: eksapi.OutcomeDone, Cluster: strangers.Text(e.Cluster), Peer: e.Peer}
	switch n := e.Grant.Node; {
	case errors.Is(e.Err, exchange.ErrUnavailable):
		r.Outcome, r.Error = eksapi.OutcomeFailed, clip(e.Err.Error())
	case e.Err != nil:
		// The cause alone: what the caller was told of it is no more than that.
		cause := e.Err
		if inner := errors.Unwrap(cause); inner != nil {
			cause = inner
		}
		r.Outcome, r.Error = eksapi.OutcomeRefused, strangers.Text(cause.Error())
	default:
		r.Node = &permission.Node{Cluster: n.Cluster, Name: n.Name, UID: n.UID}
		r.Namespace, r.ServiceAccount, r.Pod, r.PodUID = n.Namespace, n.ServiceAccount, n.PodName, n.PodUID
		r.JTI, r.IssuedAccessKeyID, r.Expires = e.Grant.JTI, e.Grant.AccessKeyID, &n.Expires
	}
	s.metrics.nodes.WithLabelValues(r.Outcome).Inc()
	if e.Err != nil && !s.strangers.Record(e.Peer) {
		s.metrics.unrecorded.Inc()
		return
	}
	s.audit.Write(r)
}

// clip bounds a text that somebody unknown may have chosen.
func clip(t string) string {
	const most = 512
	if len(t) > most {
		return t[:most]
	}
	return t
}

func (s *server) waitIndex(ctx context.Context) error {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !s.index.Ready() {
		select {
		case <-tick.C:
		case <-s.etcd.Failed():
			return fmt.Errorf("the store ended: %w", s.etcd.Err())
		case <-ctx.Done():
			return fmt.Errorf("the index was not filled in time: %w", context.Cause(ctx))
		}
	}
	return nil
}

func (s *server) snapshot(ctx context.Context, w io.Writer) (int64, error) {
	return s.etcd.Save(ctx, w)
}

func (s *server) status() Status {
	st := Status{
		Version: s.cfg.Version, Started: s.started, Listen: s.address, TLS: s.cert != nil, STS: s.stsText(),
		StateDir: s.cfg.StateDir, UsersFile: s.cfg.Users, NodeBinding: s.cfg.NodeBinding,
		Revision: s.index.Revision(), Behind: s.index.Behind().Seconds(), Users: s.users.Status().Users,
	}
	st.Associations, st.Clusters = s.index.Len()
	if err := s.ready(); err != nil {
		st.NotReady = err.Error()
	}
	return st
}

// errNotReady: the server should be sent no requests.
var errNotReady = errors.New("not ready")

// ready proves what an exchange needs: a store that answered lately, an index
// that is whole, users, and the keys of nodes' credentials. STS and the
// clusters' API servers are no part of it: an outage there must not take the
// association API out of service.
func (s *server) ready() error {
	switch behind := s.index.Behind(); {
	case s.stopping.Load():
		return fmt.Errorf("%w: stopping", errNotReady)
	case s.etcd.Err() != nil:
		return fmt.Errorf("%w: the store ended", errNotReady)
	case !s.index.Ready():
		return fmt.Errorf("%w: the index is being filled", errNotReady)
	case !s.serving.Load():
		return fmt.Errorf("%w: starting", errNotReady)
	case behind > eksapi.DefaultMaxBehind:
		return fmt.Errorf("%w: the index is %s behind the store", errNotReady, behind.Round(time.Second))
	case !s.ring.Ready():
		return fmt.Errorf("%w: no key to seal nodes' credentials with", errNotReady)
	case s.users.Status().Loaded.IsZero():
		return fmt.Errorf("%w: no users file could be read", errNotReady)
	}
	return nil
}

// sealingKeys keeps the keys of exchange.Ring in the store, so that every
// server on it opens what another has sealed.
type sealingKeys struct{ client *clientv3.Client }

// keySealing is outside of what the index watches.
const keySealing = "/latchkey/server/sealing-keys"

// Load implements exchange.KeyStore.
func (k sealingKeys) Load(ctx context.Context) ([]byte, int64, error) {
	ctx, cancel := context.WithTimeout(ctx, association.DefaultTimeout)
	defer cancel()
	r, err := k.client.Get(ctx, keySealing)
	if err != nil {
		return nil, 0, fmt.Errorf("read the sealing keys: %w", err)
	}
	if len(r.Kvs) == 0 {
		return nil, 0, nil
	}
	return r.Kvs[0].Value, r.Kvs[0].ModRevision, nil
}

// Save implements exchange.KeyStore.
func (k sealingKeys) Save(ctx context.Context, value []byte, revision int64) error {
	ctx, cancel := context.WithTimeout(ctx, association.DefaultTimeout)
	defer cancel()
	r, err := k.client.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(keySealing), "=", revision)).
		Then(clientv3.OpPut(keySealing, string(value))).Commit()
	switch {
	case err != nil:
		return fmt.Errorf("write the sealing keys: %w", err)
	case !r.Succeeded:
		return exchange.ErrConflict
	}
	return nil
}
