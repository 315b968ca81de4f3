// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/pkg/cgroup"
)

const (
	// pollInterval is how often the tree is listed when it cannot be watched.
	pollInterval = 50 * time.Millisecond

	// IN_DELETE_SELF tells that a watched directory is gone and its watch with
	// it. cgroup v2 directories cannot be moved, so no IN_MOVE.
	watchMask = unix.IN_CREATE | unix.IN_DELETE | unix.IN_DELETE_SELF | unix.IN_ONLYDIR
)

// watch is an inotify instance over cgroup directories.
type watch struct {
	mount cgroup.Mount
	file  *os.File

	mu   sync.Mutex
	dirs map[int32]string // watch descriptor to path below the mount
}

// event is one inotify event with its directory.
type event struct {
	mask uint32
	dir  string // empty for an overflow, or of a watch that is gone
	name string
}

func newWatch(m cgroup.Mount) (*watch, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("inotify: %w", err)
	}
	// Not blocking, so the runtime polls it and Close ends a read under way.
	return &watch{mount: m, file: os.NewFile(uintptr(fd), "inotify"), dirs: make(map[int32]string)}, nil
}

// add watches a directory. To add it again is harmless: the kernel gives the
// same descriptor while it is the same directory.
func (w *watch) add(dir string) error {
	conn, err := w.file.SyscallConn()
	if err != nil {
		return err
	}
	// Held over the call: an event must not be read before its descriptor is
	// known.
	w.mu.Lock()
	defer w.mu.Unlock()
	var inner error
	err = conn.Control(func(fd uintptr) {
		var wd int
		if wd, inner = unix.InotifyAddWatch(int(fd), w.mount.Join(dir), watchMask); inner == nil {
			w.dirs[int32(wd)] = dir
		}
	})
	if err != nil {
		return err
	}
	if inner != nil {
		return fmt.Errorf("watching %s: %w", dir, inner)
	}
	return nil
}

// read returns the next events; it blocks until there is one or the instance is
// closed.
func (w *watch) read(buf []byte) ([]event, error) {
	n, err := w.file.Read(buf)
	if err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []event
	for b := buf[:n]; len(b) >= unix.SizeofInotifyEvent; {
		wd := int32(binary.NativeEndian.Uint32(b[0:]))
		mask := binary.NativeEndian.Uint32(b[4:])
		size := int(binary.NativeEndian.Uint32(b[12:]))
		b = b[unix.SizeofInotifyEvent:]
		if size > len(b) {
			return out, errors.New("short inotify event")
		}
		name, _, _ := bytes.Cut(b[:size], []byte{0})
		b = b[size:]
		out = append(out, event{mask: mask, dir: w.dirs[wd], name: string(name)})
		if mask&unix.IN_IGNORED != 0 {
			delete(w.dirs, wd)
		}
	}
	return out, nil
}

func (w *watch) close() { w.file.Close() }

// run is the index's only goroutine that makes callbacks.
func (x *Index) run(ctx context.Context, w *watch) error {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()

	var events chan []event
	if w != nil {
		events = make(chan []event)
		defer w.close()
		wg.Go(func() {
			defer close(events)
			// A page holds more events than come at once; the rest waits in
			// the kernel's queue.
			buf := make([]byte, 16<<10)
			for {
				batch, err := w.read(buf)
				if len(batch) > 0 {
					select {
					case events <- batch:
					case <-ctx.Done():
						return
					}
				}
				if err != nil {
					if ctx.Err() == nil && !errors.Is(err, os.ErrClosed) {
						x.log.Error("watching the cgroup tree failed, polling it instead", "error", err)
					}
					return
				}
			}
		})
	}

	// Network namespaces are learned beside the loop: reading /proc of every
	// pod takes long enough to delay the news of an end.
	learn := make(chan struct{}, 1)
	wg.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-learn:
				x.learnSandboxes(ctx)
			}
		}
	})

	watched := x.scan(w)
	x.deliver()
	close(x.ready)
	learn <- struct{}{}

	full := time.NewTicker(x.cfg.RescanEvery)
	defer full.Stop()
	poll := time.NewTicker(pollInterval)
	defer poll.Stop()
	for {
		// While the root cannot be watched, or does not exist, look often.
		var often <-chan time.Time
		if !watched {
			often = poll.C
		}
		x.watching.Store(watched)
		select {
		case <-ctx.Done():
			return nil
		case <-x.wake:
		case batch, ok := <-events:
			if !ok {
				w, events, watched = nil, nil, false
				break
			}
			rescan := false
			for _, e := range batch {
				rescan = x.handle(w, e) || rescan
			}
			if rescan {
				watched = x.scan(w)
			}
		case <-often:
			watched = x.scan(w)
		case <-full.C:
			watched = x.scan(w)
			select {
			case learn <- struct{}{}:
			default:
			}
		}
		x.deliver()
	}
}

// handle acts on one event and says whether the tree must be scanned.
func (x *Index) handle(w *watch, e event) (rescan bool) {
	root := x.cfg.Root.Path()
	switch {
	case e.mask&unix.IN_Q_OVERFLOW != 0:
		x.overflows.Add(1)
		x.log.Warn("events about pods were lost, listing all")
		return true
	case e.mask&(unix.IN_DELETE_SELF|unix.IN_IGNORED|unix.IN_UNMOUNT) != 0:
		// Root or QoS directory. The scan finds whose pods are gone, and that
		// the watch is.
		return true
	case e.mask&unix.IN_ISDIR == 0 || e.dir == "":
		return false
	}
	path := e.dir + "/" + e.name
	if e.dir == root {
		if _, ok := x.cfg.Root.IsQoS(e.name); ok {
			// The scan adds the watch first and lists then, so a pod made
			// before the watch is listed and one made after it is reported.
			return true
		}
	}
	if e.mask&unix.IN_DELETE != 0 {
		if p := x.lookup(path); p != nil {
			// The event tells of a name; a new directory may have it by now.
			x.verify(p)
		}
		return false
	}
	if ref, err := x.cfg.Root.Parse(path); err == nil {
		x.observe(ref)
	}
	return false
}

// observe makes sure that a directory's pod is known.
func (x *Index) observe(ref cgroup.PodRef) {
	if _, _, err := x.ensure(ref); err != nil && !errors.Is(err, cgroup.ErrGone) {
		x.errors.Add(1)
		x.log.Debug("cannot read a pod's cgroup", "pod_uid", string(ref.UID), "error", err)
	}
}

// scan compares the index with the tree: watches, QoS directories, new pods,
// pods that are gone. It says whether all there is to watch is watched.
func (x *Index) scan(w *watch) (watched bool) {
	x.scans.Add(1)
	watched = w != nil
	var trouble error
	defer func() { x.report(trouble) }()
	// Watch first, list then: what is made in between is seen twice, not never.
	for _, dir := range append([]string{x.cfg.Root.Path()}, x.cfg.Root.QoSDirs()...) {
		if w == nil {
			break
		}
		err := w.add(dir)
		switch {
		case err == nil:
		case errors.Is(err, fs.ErrNotExist) && dir != x.cfg.Root.Path():
			// Its appearance is the root's event.
		case errors.Is(err, fs.ErrNotExist):
			watched, trouble = false, err
		default:
			watched, trouble = false, err
		}
	}

	listing, err := x.cfg.Root.List(x.cfg.Mount)
	if err != nil && !errors.Is(err, cgroup.ErrGone) {
		// Nothing is known, so nobody is ended.
		trouble = err
		return watched
	}
	x.scanQoS(listing.QoS)
	seen := make(map[string]bool, len(listing.Pods))
	for _, ref := range listing.Pods {
		seen[ref.Path] = true
		x.observe(ref)
	}
	for _, p := range x.snapshot() {
		// Pods that were added after the listing are missing from it.
		if !seen[p.Path] {
			x.verify(p)
		}
	}
	return watched
}

// report logs what keeps the tree from being watched or listed: once, not at
// every attempt, and again when it has changed or passed.
func (x *Index) report(trouble error) {
	text := ""
	if trouble != nil {
		text = trouble.Error()
		x.errors.Add(1)
	}
	if text == x.trouble {
		return
	}
	x.trouble = text
	if trouble == nil {
		x.log.Info("watching the node's pods again")
		return
	}
	x.log.Warn("cannot watch or list the node's pods, trying often", "error", trouble)
}

func (x *Index) scanQoS(dirs []string) {
	for _, dir := range dirs {
		id, err := x.cfg.Resolver.ID(dir)
		if err != nil {
			continue // gone again; its return is an event
		}
		x.mu.Lock()
		if x.qos[dir] != id {
			x.qos[dir] = id
			x.notify(notice{qos: id})
		}
		x.mu.Unlock()
	}
}
