// SPDX-License-Identifier: Apache-2.0

// Package etcd runs an etcd server inside this process, for this process alone,
// and takes and restores snapshots of one.
//
// The server has no listener at all: no TCP port, no socket in a directory, and
// none in the abstract namespace, which is where a `unix:///path` peer URL would
// end up. Clients call its functions; as it has no peers, nobody else has
// anything to say to it. What Client returns is the same type as a client of an
// etcd cluster elsewhere, so whoever takes one need not know.
//
// Writes are on disk before they are acknowledged. If they cannot be brought
// there, etcd ends the process, as it must not tell a lie later.
package etcd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// Defaults of Config.
const (
	// DefaultQuotaBytes is room for some two million associations.
	DefaultQuotaBytes = 2 << 30
	// DefaultRetention is how long old revisions are kept for whoever watches and
	// was away.
	DefaultRetention = 10 * time.Minute
	// MaxTxnOps is how many operations one transaction may have; a cluster
	// elsewhere has 128 unless told otherwise.
	MaxTxnOps = 2048
)

const (
	// name and peerURL only name this member to itself: nothing listens there, and
	// a name that can be resolved would be.
	name    = "latchkey"
	peerURL = "unix://latchkey"
	token   = "latchkey"
	// maxRequest leaves room for MaxTxnOps operations of an association each, and is
	// the most that etcd recommends.
	maxRequest = 10 << 20
	// defragAtStart is the free space in MiB that is worth a defragmentation while
	// nobody waits for answers.
	defragAtStart = 256
	lockName      = "latchkey.lock"
)

// Reasons why a server does not start.
var (
	// ErrLocked: another process has the directory open.
	ErrLocked = errors.New("etcd: the directory is in use by another process")
	// ErrStopped: the server has ended.
	ErrStopped = errors.New("etcd: the server has stopped")
)

// Config says where the data is and how much it may be.
type Config struct {
	// Dir is the data directory. It is made if it is missing, and nobody but its
	// owner may enter it.
	Dir string
	// QuotaBytes bounds the database; 0: DefaultQuotaBytes. Beyond it writes are
	// refused, see Status.NoSpace, until what nobody needs any more was given up: the
	// server tries that by itself.
	QuotaBytes int64
	// Retention is how long old revisions are kept; 0: DefaultRetention.
	Retention time.Duration
	// Log receives the server's messages, most of them at level debug; nil: nothing
	// does.
	Log *slog.Logger

	// slow is what takes so long that etcd warns of it, check how often the quota is
	// looked after; tests set them.
	slow, check time.Duration
}

// Server is a running etcd.
type Server struct {
	cfg    Config
	etcd   *embed.Etcd
	client *clientv3.Client
	lock   *os.File
	failed chan struct{}

	mu  sync.Mutex
	err error
	// life ends when Close begins. What touches the database holds using meanwhile:
	// etcd ends the process if it is asked for a snapshot of a closed one.
	life  context.Context
	end   context.CancelFunc
	using sync.RWMutex

	closeOnce sync.Once
	watcher   sync.WaitGroup
}

// Start starts etcd and waits until it serves, or ctx ends. ErrLocked means
// that another process uses the directory.
func Start(ctx context.Context, cfg Config) (*Server, error) {
	if cfg.Dir == "" {
		return nil, errors.New("etcd: no data directory")
	}
	if cfg.QuotaBytes == 0 {
		cfg.QuotaBytes = DefaultQuotaBytes
	}
	if cfg.Retention == 0 {
		cfg.Retention = DefaultRetention
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.slow == 0 {
		// A machine with a slow disk is not news at every write.
		cfg.slow = time.Second
	}
	if cfg.check == 0 {
		cfg.check = 10 * time.Second
	}
	lock, err := claim(cfg.Dir)
	if err != nil {
		return nil, err
	}
	s := &Server{cfg: cfg, lock: lock, failed: make(chan struct{})}
	s.life, s.end = context.WithCancel(context.Background())
	if err := s.start(ctx); err != nil {
		s.end()
		return nil, errors.Join(err, lock.Close())
	}
	return s, nil
}

// start makes the member if there is none, and starts it.
func (s *Server) start(ctx context.Context) error {
	dir := memberDir(s.cfg.Dir)
	if _, err := os.Lstat(dir); errors.Is(err, os.ErrNotExist) {
		if err := s.bootstrap(ctx, dir); err != nil {
			return err
		}
	} else if err != nil {
		return fmt.Errorf("etcd: data directory: %w", err)
	}
	e, err := s.run(ctx, dir)
	if err != nil {
		return err
	}
	s.etcd = e
	s.client = v3client.New(e.Server)
	s.client.Maintenance = maintenance{s.client.Maintenance, s}
	s.watcher.Go(s.watch)
	s.watcher.Go(s.keepRoom)
	return nil
}

// bootstrap makes a new member elsewhere and puts it in its place when it is
// whole. An etcd that is killed between making its log and writing its own
// membership into it comes up without a member, and never serves.
func (s *Server) bootstrap(ctx context.Context, dir string) error {
	unfinished := dir + ".new"
	if err := os.RemoveAll(unfinished); err != nil {
		return fmt.Errorf("etcd: new data directory: %w", err)
	}
	e, err := s.run(ctx, unfinished)
	if err != nil {
		return err
	}
	e.Close()
	if err := os.Rename(unfinished, dir); err != nil {
		return fmt.Errorf("etcd: new data directory: %w", err)
	}
	if err := syncDir(s.cfg.Dir); err != nil {
		return fmt.Errorf("etcd: new data directory: %w", err)
	}
	return nil
}

// claim makes the directory private and takes it for this process. etcd has
// locks of its own, but waits for them for ever.
func claim(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("etcd: data directory: %w", err)
	}
	// One that was there may have been made with a looser mode.
	if err := os.Chmod(dir, 0o700); err != nil {
		return nil, fmt.Errorf("etcd: make the data directory private: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, lockName), os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("etcd: lock file: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%w: %s", ErrLocked, dir)
		}
		return nil, fmt.Errorf("etcd: lock %s: %w", dir, err)
	}
	return f, nil
}

// memberDir is etcd's own, beside the lock.
func memberDir(dir string) string { return filepath.Join(dir, "etcd") }

// run starts a member in dir and waits until it serves.
func (s *Server) run(ctx context.Context, dir string) (*embed.Etcd, error) {
	peer, err := url.Parse(peerURL)
	if err != nil {
		return nil, fmt.Errorf("etcd: peer URL: %w", err)
	}
	c := embed.NewConfig()
	c.Name, c.Dir = name, dir
	c.ListenPeerUrls, c.ListenClientUrls, c.ListenClientHttpUrls, c.ListenMetricsUrls = nil, nil, nil, nil
	c.AdvertisePeerUrls, c.AdvertiseClientUrls = []url.URL{*peer}, []url.URL{*peer}
	c.InitialCluster = name + "=" + peerURL
	c.InitialClusterToken = token
	c.EnableGRPCGateway = false
	c.QuotaBackendBytes = s.cfg.QuotaBytes
	c.MaxTxnOps, c.MaxRequestBytes = MaxTxnOps, maxRequest
	c.AutoCompactionMode, c.AutoCompactionRetention = embed.CompactorModePeriodic, s.cfg.Retention.String()
	c.BootstrapDefragThresholdMegabytes = defragAtStart
	c.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.New(&core{log: s.cfg.Log}))
	c.WarningApplyDuration, c.WarningUnaryRequestDuration = s.cfg.slow, s.cfg.slow
	// There is no peer that could be behind and catch up from the log, which is held
	// in memory; and what of it is newer than the last snapshot is read at the start.
	c.SnapshotCount, c.SnapshotCatchUpEntries = 2000, 200
	// Nobody logs in.
	c.AuthToken = ""

	e, err := embed.StartEtcd(c)
	if err != nil {
		return nil, fmt.Errorf("etcd: start: %w", err)
	}
	select {
	case <-e.Server.ReadyNotify():
		return e, nil
	case <-e.Server.StopNotify():
		err = ErrStopped
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	e.Close()
	return nil, fmt.Errorf("etcd: start: %w", err)
}

// watch notices an end that Close did not ask for.
func (s *Server) watch() {
	var err error
	select {
	case <-s.etcd.Server.StopNotify():
	case err = <-s.etcd.Err():
	case <-s.life.Done():
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.life.Err() != nil {
		return
	}
	s.err = ErrStopped
	if err != nil {
		s.err = fmt.Errorf("%w: %w", ErrStopped, err)
	}
	close(s.failed)
}

// Client returns the client of this server. It is the server's: Close closes
// it.
func (s *Server) Client() *clientv3.Client { return s.client }

// Failed is closed when the server has stopped without being told to; Err then
// says why.
func (s *Server) Failed() <-chan struct{} { return s.failed }

// Err is why the server has stopped by itself; nil while it runs, and after
// Close.
func (s *Server) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// Close stops the server, and returns when its files are closed. Calls that are
// under way fail. It may be called again.
func (s *Server) Close() error {
	var err error
	s.closeOnce.Do(func() {
		s.mu.Lock()
		s.end()
		s.mu.Unlock()
		s.watcher.Wait()
		s.using.Lock()
		defer s.using.Unlock()
		// First those who call, so that the server has nobody to wait for.
		if cerr := s.client.Close(); cerr != nil && !errors.Is(cerr, context.Canceled) {
			err = fmt.Errorf("etcd: close the client: %w", cerr)
		}
		s.etcd.Close()
		// Closing the file gives up the lock.
		if cerr := s.lock.Close(); cerr != nil {
			err = errors.Join(err, fmt.Errorf("etcd: lock file: %w", cerr))
		}
	})
	return err
}

// use keeps the server from being closed until done is called. The context ends
// when Close begins.
func (s *Server) use(ctx context.Context) (_ context.Context, done func(), err error) {
	s.using.RLock()
	if err := s.Err(); err != nil || s.life.Err() != nil {
		s.using.RUnlock()
		if err == nil {
			err = ErrStopped
		}
		return nil, nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(s.life, cancel)
	return ctx, func() {
		stop()
		cancel()
		s.using.RUnlock()
	}, nil
}

// Status is what a doctor wants to know.
type Status struct {
	// SizeBytes is the database file, InUseBytes what of it holds data, QuotaBytes
	// the most it may be.
	SizeBytes, InUseBytes, QuotaBytes int64
	// Revision is the newest.
	Revision int64
	// NoSpace: the quota was reached, and writes are refused until Recover.
	NoSpace bool
	// Corrupt: etcd found its data damaged, and refuses everything. A snapshot has
	// to be restored.
	Corrupt bool
}

// Status asks the server how it is.
func (s *Server) Status(ctx context.Context) (Status, error) {
	ctx, done, err := s.use(ctx)
	if err != nil {
		return Status{}, err
	}
	defer done()
	return s.status(ctx)
}

func (s *Server) status(ctx context.Context) (Status, error) {
	r, err := s.client.Maintenance.Status(ctx, "")
	if err != nil {
		return Status{}, fmt.Errorf("etcd: status: %w", err)
	}
	out := Status{SizeBytes: r.DbSize, InUseBytes: r.DbSizeInUse, QuotaBytes: r.DbSizeQuota, Revision: r.Header.Revision}
	for _, a := range s.etcd.Server.Alarms() {
		out.NoSpace = out.NoSpace || a.Alarm == etcdserverpb.AlarmType_NOSPACE
		out.Corrupt = out.Corrupt || a.Alarm == etcdserverpb.AlarmType_CORRUPT
	}
	return out, nil
}

// Defrag gives free space back to the file system. Everybody waits meanwhile:
// some seconds for each GiB.
func (s *Server) Defrag(ctx context.Context) error {
	_, done, err := s.use(ctx)
	if err != nil {
		return err
	}
	defer done()
	return s.defrag()
}

func (s *Server) defrag() error {
	if err := s.etcd.Server.Defragment(); err != nil {
		return fmt.Errorf("etcd: defragment: %w", err)
	}
	return nil
}

// Recover takes a server that has reached its quota back to work: it drops old
// revisions, defragments, and, if that made room, allows writes again. It
// reports whether they are allowed now.
func (s *Server) Recover(ctx context.Context) (bool, error) {
	ctx, done, err := s.use(ctx)
	if err != nil {
		return false, err
	}
	defer done()
	st, err := s.status(ctx)
	if err != nil || !st.NoSpace {
		return err == nil, err
	}
	if _, err := s.client.Compact(ctx, st.Revision, clientv3.WithCompactPhysical()); err != nil && !compacted(err) {
		return false, fmt.Errorf("etcd: compact: %w", err)
	}
	if err := s.defrag(); err != nil {
		return false, err
	}
	if st, err = s.status(ctx); err != nil {
		return false, err
	}
	// With less room the next write would raise the alarm again.
	if st.SizeBytes > st.QuotaBytes-st.QuotaBytes/20 {
		return false, nil
	}
	if _, err := s.client.AlarmDisarm(ctx, &clientv3.AlarmMember{}); err != nil {
		return false, fmt.Errorf("etcd: disarm the alarm: %w", err)
	}
	s.cfg.Log.Warn("store has room again", "size_bytes", st.SizeBytes, "quota_bytes", st.QuotaBytes)
	return true, nil
}

const maxCheck = 10 * time.Minute

// keepRoom notices that the quota was reached, says so, and makes room if there
// is something to give up: old revisions, and the file's free pages, which count.
func (s *Server) keepRoom() {
	every := s.cfg.check
	t := time.NewTimer(every)
	defer t.Stop()
	for {
		select {
		case <-t.C:
		case <-s.failed:
			return
		case <-s.life.Done():
			return
		}
		next := s.cfg.check
		if st, err := s.Status(s.life); err == nil && st.NoSpace {
			s.cfg.Log.Error("store is full: writes are refused", "size_bytes", st.SizeBytes, "in_use_bytes", st.InUseBytes, "quota_bytes", st.QuotaBytes)
			if ok, err := s.Recover(s.life); err != nil || !ok {
				// Everybody waits while it tries, so not too often.
				next = min(2*every, maxCheck)
				s.cfg.Log.Error("store stays full: raise the quota, or delete", "error", err, "retry_seconds", next.Seconds())
			}
		}
		every = next
		t.Reset(every)
	}
}

// maintenance replaces the calls that the in-process client cannot make: etcd
// gives it no notifier of its health, and dereferences that.
type maintenance struct {
	clientv3.Maintenance
	server *Server
}

// Defragment is Server.Defrag, whatever the endpoint.
func (m maintenance) Defragment(ctx context.Context, _ string) (*clientv3.DefragmentResponse, error) {
	if err := m.server.Defrag(ctx); err != nil {
		return nil, err
	}
	return &clientv3.DefragmentResponse{}, nil
}
