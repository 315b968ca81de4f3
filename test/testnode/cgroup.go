// SPDX-License-Identifier: Apache-2.0

//go:build linux

package testnode

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

// ErrInside means that the calling process is itself in the cgroup that it was
// asked to kill.
var ErrInside = errors.New("this process is inside the cgroup to be killed")

// CgroupID gives the kernel's id of the cgroup v2 directory dir: the number
// that bpf_get_current_cgroup_id returns for a task in it.
func CgroupID(dir string) (evidence.CgroupID, error) {
	handle, _, err := unix.NameToHandleAt(unix.AT_FDCWD, dir, 0)
	if err != nil {
		return 0, fmt.Errorf("getting the file handle of %s: %w", dir, err)
	}
	// kernfs handles are the 64-bit node id, in host order.
	if len(handle.Bytes()) != 8 {
		return 0, fmt.Errorf("%s: a file handle of %d bytes is not a cgroup's", dir, len(handle.Bytes()))
	}
	return evidence.CgroupID(binary.NativeEndian.Uint64(handle.Bytes())), nil
}

// ownCgroup is the v2 path of this process, as in /proc/self/cgroup.
func ownCgroup() (string, error) {
	text, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", fmt.Errorf("reading this process's cgroup: %w", err)
	}
	for line := range strings.Lines(string(text)) {
		if path, ok := strings.CutPrefix(line, "0::"); ok {
			return strings.TrimSuffix(path, "\n"), nil
		}
	}
	return "", ErrNoCgroup2
}

// moveProcess puts a whole process, with all its threads, into cgroup dir.
func moveProcess(dir string, pid int) error {
	err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0)
	if err != nil {
		return fmt.Errorf("moving process %d into cgroup %s: %w", pid, dir, err)
	}
	return nil
}

// cgroupTree lists dir and every cgroup below it, children before parents.
func cgroupTree(dir string) ([]string, error) {
	var dirs []string
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return nil // removed while we looked
			}
			return err
		}
		if entry.IsDir() {
			dirs = append(dirs, path)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("listing cgroups below %s: %w", dir, err)
	}
	slices.Reverse(dirs)
	return dirs, nil
}

// members lists the processes in dir and below it. Processes of other pid
// namespaces show as 0 and are left out.
func members(dir string) ([]int, error) {
	dirs, err := cgroupTree(dir)
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, d := range dirs {
		text, err := os.ReadFile(filepath.Join(d, "cgroup.procs"))
		switch {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENODEV):
			continue // removed while we looked
		case errors.Is(err, unix.EOPNOTSUPP):
			continue // a threaded cgroup: its processes are listed by its domain
		case err != nil:
			return nil, fmt.Errorf("listing processes of %s: %w", d, err)
		}
		for field := range strings.FieldsSeq(string(text)) {
			if pid, err := strconv.Atoi(field); err == nil && pid > 0 {
				pids = append(pids, pid)
			}
		}
	}
	return pids, nil
}

// killCgroup ends every process in dir and below it, and returns when none is
// left or ctx ends.
func killCgroup(ctx context.Context, dir string) error {
	for {
		pids, err := members(dir)
		if err != nil {
			return err
		}
		if slices.Contains(pids, os.Getpid()) {
			return fmt.Errorf("killing %s: %w", dir, ErrInside)
		}
		// One write kills a tree that forks all the time, too (Linux 5.14).
		// O_CREATE must not be given: before 5.14 the file is not there.
		err = writeExisting(filepath.Join(dir, "cgroup.kill"), "1")
		switch {
		case err == nil:
		case errors.Is(err, fs.ErrNotExist):
			if _, statErr := os.Stat(dir); errors.Is(statErr, fs.ErrNotExist) {
				return nil
			}
			for _, pid := range pids {
				// ESRCH: it ended by itself.
				if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
					return fmt.Errorf("killing process %d of %s: %w", pid, dir, err)
				}
			}
		case errors.Is(err, unix.ENODEV):
			return nil // removed meanwhile
		default:
			return fmt.Errorf("killing cgroup %s: %w", dir, err)
		}
		empty, err := waitEmpty(ctx, dir, 200*time.Millisecond)
		if err != nil || empty {
			return err
		}
	}
}

func writeExisting(path, text string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Close())
}

// waitEmpty waits until no live process is in dir or below it, for at most
// slice, and says whether that came. The kernel wakes us: cgroup.events polls
// readable (POLLPRI) when "populated" changes.
func waitEmpty(ctx context.Context, dir string, slice time.Duration) (bool, error) {
	f, err := os.Open(filepath.Join(dir, "cgroup.events"))
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("watching cgroup %s: %w", dir, err)
	}
	defer f.Close()
	text := make([]byte, 512)
	poll := []unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLPRI}}
	for waited := false; ; waited = true {
		n, err := f.ReadAt(text, 0)
		if n == 0 && err != nil {
			if errors.Is(err, unix.ENODEV) {
				return true, nil
			}
			return false, fmt.Errorf("reading cgroup events of %s: %w", dir, err)
		}
		if bytes.Contains(text[:n], []byte("populated 0")) {
			return true, nil
		}
		if waited {
			return false, nil
		}
		if err := ctx.Err(); err != nil {
			return false, fmt.Errorf("waiting for the processes of %s to end: %w", dir, err)
		}
		if _, err := unix.Poll(poll, int(slice.Milliseconds())); err != nil && !errors.Is(err, unix.EINTR) {
			return false, fmt.Errorf("polling cgroup %s: %w", dir, err)
		}
	}
}

// removeCgroup kills what is in dir and below it and removes the directories.
// A directory that is already gone is no error.
func removeCgroup(ctx context.Context, dir string) error {
	for {
		if err := killCgroup(ctx, dir); err != nil {
			return err
		}
		dirs, err := cgroupTree(dir)
		if err != nil {
			return err
		}
		busy := false
		for _, d := range dirs {
			err := unix.Rmdir(d)
			switch {
			case err == nil, errors.Is(err, unix.ENOENT):
			case errors.Is(err, unix.EBUSY), errors.Is(err, unix.ENOTEMPTY):
				// Somebody put a process or a child there since we looked.
				busy = true
			default:
				return fmt.Errorf("removing cgroup %s: %w", d, err)
			}
		}
		if !busy {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("removing cgroup %s: %w", dir, err)
		}
	}
}

// lockDir opens dir and takes an exclusive lock on it that lives as long as
// the file returned, so as long as this process. Locks, unlike pids, are not
// reused and hold across pid namespaces.
func lockDir(dir string) (*os.File, error) {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: dir, Err: err}
	}
	if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		unix.Close(fd)
		return nil, &fs.PathError{Op: "flock", Path: dir, Err: err}
	}
	return os.NewFile(uintptr(fd), dir), nil
}
