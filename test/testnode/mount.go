// SPDX-License-Identifier: Apache-2.0

//go:build linux

package testnode

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrNoCgroup2 means that no cgroup v2 hierarchy is mounted. Hybrid machines
// have one at /sys/fs/cgroup/unified; with cgroup v1 alone there is none.
var ErrNoCgroup2 = errors.New("no cgroup v2 hierarchy is mounted: boot with systemd.unified_cgroup_hierarchy=1 or mount one with `mount -t cgroup2 none DIR`")

// mountPoint is one line of /proc/PID/mountinfo, as far as it matters here.
type mountPoint struct {
	root   string // the directory of the file system that is mounted
	path   string // where
	fsType string
}

// parseMountinfo reads the format of proc_pid_mountinfo(5).
func parseMountinfo(r io.Reader) ([]mountPoint, error) {
	var points []mountPoint
	scanner := bufio.NewScanner(r)
	scanner.Buffer(nil, 1<<20) // overlay options make long lines
	for scanner.Scan() {
		fields := strings.Fields(scanner.Text())
		// 36 35 98:0 /root /path opts [optional...] - type source superopts
		dash := slices.Index(fields, "-")
		if dash < 6 || len(fields) < dash+2 {
			return nil, fmt.Errorf("parsing mountinfo line %q", scanner.Text())
		}
		points = append(points, mountPoint{
			root:   unescapeMount(fields[3]),
			path:   unescapeMount(fields[4]),
			fsType: fields[dash+1],
		})
	}
	if err := scanner.Err(); err != nil {
		return nil, fmt.Errorf("reading mountinfo: %w", err)
	}
	return points, nil
}

// unescapeMount undoes the octal escapes of blanks and backslashes in a mount
// path.
func unescapeMount(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+4 <= len(s) {
			if c, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(c))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

func mounts() ([]mountPoint, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("opening mountinfo: %w", err)
	}
	defer f.Close()
	return parseMountinfo(f)
}

// pickCgroup2 chooses the mount to make nodes in: the first that shows the
// whole hierarchy, since a bind mount of a part of it would give cgroup paths
// that differ from those in /proc/PID/cgroup.
func pickCgroup2(points []mountPoint) (string, error) {
	for _, p := range points {
		if p.fsType == "cgroup2" && p.root == "/" {
			return p.path, nil
		}
	}
	return "", ErrNoCgroup2
}

// Cgroup2Mount finds where the cgroup v2 hierarchy is mounted, for example
// /sys/fs/cgroup, or /sys/fs/cgroup/unified on a hybrid machine. The error is
// [ErrNoCgroup2] if it is mounted nowhere.
func Cgroup2Mount() (string, error) {
	points, err := mounts()
	if err != nil {
		return "", err
	}
	return pickCgroup2(points)
}

// mountBPFFS mounts a bpffs instance of its own at dir: each mount of bpffs is
// a new, empty instance, so pins of two nodes never meet.
func mountBPFFS(dir string) error {
	if err := unix.Mount("bpf", dir, "bpf", 0, "mode=0700"); err != nil {
		return fmt.Errorf("mounting bpffs at %s: %w", dir, err)
	}
	return nil
}

// unmountBelow detaches every mount at or below dir, the deepest first.
func unmountBelow(dir string) error {
	points, err := mounts()
	if err != nil {
		return err
	}
	var errs []error
	// Later lines are mounted later, so they can only lie on top of earlier ones.
	for _, p := range slices.Backward(points) {
		if p.path != dir && !strings.HasPrefix(p.path, dir+"/") {
			continue
		}
		if err := unix.Unmount(p.path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			errs = append(errs, fmt.Errorf("unmounting %s: %w", p.path, err))
		}
	}
	return errors.Join(errs...)
}

// removeDir removes a node's directory. It does not delete through a mount
// that could not be detached: what lies behind it may not be the node's.
func removeDir(dir string) error {
	if err := unmountBelow(dir); err != nil {
		return err
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("removing %s: %w", dir, err)
	}
	return nil
}
