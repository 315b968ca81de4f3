// SPDX-License-Identifier: Apache-2.0

package attribution

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/bpf"
)

// DefaultPinPath is where the agent pins, below the usual mount of bpffs.
const DefaultPinPath = "/sys/fs/bpf/latchkey"

// pinnedMap tells the maps that outlive the process. The constants do not:
// each load has its own.
func pinnedMap(name string) bool {
	return !strings.HasPrefix(name, ".") && name != bpf.AttributionMapInflightZero
}

// makePinDirectory makes dir for root alone: who can open the nonce key's map
// can compute nonces.
func makePinDirectory(dir string) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return fmt.Errorf("make the pin directory: %w", err)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(filepath.Dir(dir), &fs); err != nil {
		return fmt.Errorf("look at %s: %w", filepath.Dir(dir), err)
	}
	if fs.Type != unix.BPF_FS_MAGIC {
		return fmt.Errorf("%s is %w; mount one (mount -t bpf bpf /sys/fs/bpf) or choose another --pin-path",
			filepath.Dir(dir), ErrNotBPFFS)
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("make the pin directory: %w", err)
	}
	return nil
}

// freshPin begins the name of a pin that is about to take another's place.
const freshPin = "new_"

// pinOver pins an object in place of whatever has that name. There is no moment
// without a pin: an agent that is killed in it would take its program with it.
func pinOver(o interface{ Pin(string) error }, path string) error {
	fresh := filepath.Join(filepath.Dir(path), freshPin+filepath.Base(path))
	// One that was killed may have left it.
	if err := os.Remove(fresh); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := o.Pin(fresh); err != nil {
		return err
	}
	return os.Rename(fresh, path)
}

// pinnedLinks lists a hook's pins, this layout's first.
func pinnedLinks(pinPath, hook string) []string {
	found, _ := filepath.Glob(filepath.Join(pinPath, "*", "link_"+hook))
	mine := filepath.Join(pinPath, Layout, "link_"+hook)
	slices.SortFunc(found, func(a, b string) int {
		switch {
		case a == mine:
			return -1
		case b == mine:
			return 1
		}
		return strings.Compare(a, b)
	})
	return found
}

func removeOtherLayouts(pinPath string, log *slog.Logger) error {
	entries, err := os.ReadDir(pinPath)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		if e.Name() == Layout || !isLayout(e) {
			continue
		}
		removed, err := removeDirectory(filepath.Join(pinPath, e.Name()))
		log.Info("removed the pins of another version", "directory", e.Name(), "objects", len(removed))
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// isLayout: v1, v2, ... and nothing else is ours to remove.
func isLayout(e os.DirEntry) bool {
	n, ok := strings.CutPrefix(e.Name(), "v")
	return e.IsDir() && ok && n != "" && strings.Trim(n, "0123456789") == ""
}

// removeDirectory removes pins of ours and then the directory; anything else in
// it stays, and so does the directory.
func removeDirectory(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var removed []string
	var errs []error
	// Links first: a program must not run with its maps half gone.
	for _, prefix := range []string{"link_", "prog_", "map_", freshPin} {
		for _, e := range entries {
			if !strings.HasPrefix(e.Name(), prefix) {
				continue
			}
			path := filepath.Join(dir, e.Name())
			if err := os.Remove(path); err != nil {
				errs = append(errs, err)
				continue
			}
			removed = append(removed, path)
		}
	}
	if err := os.Remove(dir); err != nil {
		errs = append(errs, err)
	}
	return removed, errors.Join(errs...)
}

// Cleanup detaches and removes everything pinned under pinPath, of every
// version, and returns the paths removed. Programs that a running agent holds
// stay attached until it ends. A pinPath that does not exist is no error.
func Cleanup(pinPath string) ([]string, error) {
	entries, err := os.ReadDir(pinPath)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list the pins: %w", err)
	}
	var removed []string
	var errs []error
	for _, e := range entries {
		if !isLayout(e) {
			continue
		}
		r, err := removeDirectory(filepath.Join(pinPath, e.Name()))
		removed = append(removed, r...)
		errs = append(errs, err)
	}
	if err := os.Remove(pinPath); err != nil && !errors.Is(err, os.ErrNotExist) {
		errs = append(errs, fmt.Errorf("something else is in %s: %w", pinPath, err))
	}
	return removed, errors.Join(errs...)
}

var _ interface{ Pin(string) error } = (*ebpf.Program)(nil)
