// SPDX-License-Identifier: Apache-2.0

package etcd

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/etcdutl/v3/snapshot"
	"go.uber.org/zap"
)

// revisionBump separates the revisions of a restored store from all that anybody
// saw of the one before.
const revisionBump = 1_000_000_000

// ErrBadSnapshot means that what was read is not a whole, undamaged snapshot.
var ErrBadSnapshot = errors.New("etcd: not a whole snapshot")

// ErrNotEmpty means that there is a store already where one is to be restored.
var ErrNotEmpty = errors.New("etcd: the directory has a store already")

// SnapshotInfo is what a snapshot holds.
type SnapshotInfo struct {
	// Revision is the newest in it.
	Revision int64
	// Keys is how many keys are in it, Bytes its size.
	Keys  int
	Bytes int64
	// Version is that of etcd's storage.
	Version string
}

// Save writes a snapshot to w, as `etcdctl snapshot save` does: the database and
// its SHA-256. It is consistent, and nobody waits for it. It works with any
// client. What was written is no snapshot if Save fails.
func Save(ctx context.Context, c *clientv3.Client, w io.Writer) (int64, error) {
	r, err := c.SnapshotWithVersion(ctx)
	if err != nil {
		return 0, fmt.Errorf("etcd: snapshot: %w", err)
	}
	n, err := io.Copy(w, r.Snapshot)
	if cerr := r.Snapshot.Close(); err == nil && cerr != nil {
		err = cerr
	}
	if err != nil {
		return n, fmt.Errorf("etcd: snapshot: %w", err)
	}
	if n%512 != sha256.Size {
		return n, fmt.Errorf("etcd: snapshot: %w: it ended after %d bytes", ErrBadSnapshot, n)
	}
	return n, nil
}

// Save writes a snapshot of this server to w. Close waits for a write to w that
// is under way.
func (s *Server) Save(ctx context.Context, w io.Writer) (int64, error) {
	ctx, done, err := s.use(ctx)
	if err != nil {
		return 0, err
	}
	defer done()
	return Save(ctx, s.client, w)
}

// Verify reads a snapshot file and tells what is in it. It is ErrBadSnapshot if
// one bit is not as it was saved.
func Verify(file string) (SnapshotInfo, error) {
	f, err := os.Open(file)
	if err != nil {
		return SnapshotInfo{}, fmt.Errorf("etcd: snapshot: %w", err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return SnapshotInfo{}, fmt.Errorf("etcd: snapshot: %w", err)
	}
	// Databases come in pages, so this tells whether a digest follows.
	if fi.Size()%512 != sha256.Size || fi.Size() < 512 {
		return SnapshotInfo{}, fmt.Errorf("%w: %d bytes cannot be a database and its digest", ErrBadSnapshot, fi.Size())
	}
	h := sha256.New()
	if _, err := io.CopyN(h, f, fi.Size()-sha256.Size); err != nil {
		return SnapshotInfo{}, fmt.Errorf("etcd: snapshot: %w", err)
	}
	var want [sha256.Size]byte
	if _, err := io.ReadFull(f, want[:]); err != nil {
		return SnapshotInfo{}, fmt.Errorf("etcd: snapshot: %w", err)
	}
	if [sha256.Size]byte(h.Sum(nil)) != want {
		return SnapshotInfo{}, fmt.Errorf("%w: its digest is another's", ErrBadSnapshot)
	}
	st, err := snapshot.NewV3(zap.NewNop()).Status(file)
	if err != nil {
		return SnapshotInfo{}, fmt.Errorf("%w: %w", ErrBadSnapshot, err)
	}
	return SnapshotInfo{Revision: st.Revision, Keys: st.TotalKey, Bytes: fi.Size(), Version: st.Version}, nil
}

// Restore makes a new data directory of a snapshot, for Start. dir must have no
// store in it: ErrNotEmpty. Either the whole store is there afterwards, or
// none. Its revisions begin far above those of the snapshot, so that nobody who
// knew later ones takes the past for the present.
func Restore(r io.Reader, dir string, log *slog.Logger) (SnapshotInfo, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	lock, err := claim(dir)
	if err != nil {
		return SnapshotInfo{}, err
	}
	defer lock.Close()
	if _, err := os.Lstat(memberDir(dir)); !errors.Is(err, os.ErrNotExist) {
		return SnapshotInfo{}, fmt.Errorf("%w: %s", ErrNotEmpty, dir)
	}
	work, err := os.MkdirTemp(dir, "restore-")
	if err != nil {
		return SnapshotInfo{}, fmt.Errorf("etcd: restore: %w", err)
	}
	defer os.RemoveAll(work)

	file := filepath.Join(work, "snapshot.db")
	if err := write(file, r); err != nil {
		return SnapshotInfo{}, fmt.Errorf("etcd: restore: %w", err)
	}
	info, err := Verify(file)
	if err != nil {
		return SnapshotInfo{}, err
	}
	out := filepath.Join(work, "etcd")
	err = snapshot.NewV3(zap.New(&core{log: log})).Restore(snapshot.RestoreConfig{
		SnapshotPath: file, OutputDataDir: out,
		Name: name, PeerURLs: []string{peerURL}, InitialCluster: name + "=" + peerURL, InitialClusterToken: token,
		RevisionBump: revisionBump, MarkCompacted: true,
	})
	if err != nil {
		return SnapshotInfo{}, fmt.Errorf("etcd: restore: %w", err)
	}
	if err := os.Chmod(out, 0o700); err != nil {
		return SnapshotInfo{}, fmt.Errorf("etcd: restore: %w", err)
	}
	if err := os.Rename(out, memberDir(dir)); err != nil {
		return SnapshotInfo{}, fmt.Errorf("etcd: restore: %w", err)
	}
	if err := syncDir(dir); err != nil {
		return SnapshotInfo{}, fmt.Errorf("etcd: restore: %w", err)
	}
	return info, nil
}

func write(file string, r io.Reader) error {
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	if serr := f.Sync(); err == nil {
		err = serr
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// compacted tells that there was nothing left to compact.
func compacted(err error) bool { return errors.Is(err, rpctypes.ErrCompacted) }
