// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

// fileidKernfs is FILEID_KERNFS of include/linux/exportfs.h: the handle is the
// 64-bit kernfs node id in host byte order, which for a cgroup v2 directory is
// what bpf_get_current_cgroup_id gives (Linux 5.5).
const fileidKernfs = 0xfe

// ID returns the id of a cgroup v2 directory, given by its file-system path. It
// needs no privilege. Errors wrap ErrGone if there is no such directory and
// ErrNotCgroup2 if it is something else.
func ID(path string) (evidence.CgroupID, error) {
	// One descriptor for both questions: the name could change hands between
	// asking for the file system's type and asking for the handle.
	fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, idError(path, err)
	}
	defer unix.Close(fd)
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return 0, idError(path, err)
	}
	if st.Type != unix.CGROUP2_SUPER_MAGIC {
		return 0, fmt.Errorf("%s: %w", path, ErrNotCgroup2)
	}
	id, _, err := handleID(fd, "", unix.AT_EMPTY_PATH)
	if err != nil {
		return 0, idError(path, err)
	}
	return id, nil
}

// handleID returns the kernfs id and the mount id of a directory.
func handleID(dirfd int, path string, flags int) (evidence.CgroupID, int, error) {
	h, mount, err := unix.NameToHandleAt(dirfd, path, flags)
	if err != nil {
		return 0, 0, err
	}
	if h.Type() != fileidKernfs || h.Size() != 8 {
		return 0, 0, fmt.Errorf("file handle of type %#x and %d bytes: %w", h.Type(), h.Size(), ErrNotCgroup2)
	}
	return evidence.CgroupID(binary.NativeEndian.Uint64(h.Bytes())), mount, nil
}

// isGone says whether a system call failed because the directory was removed.
// kernfs also answers ENODEV, while the removal is under way, and ESTALE for a
// handle.
func isGone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ESTALE)
}

func idError(path string, err error) error {
	switch {
	case isGone(err):
		return fmt.Errorf("%s: %w", path, ErrGone)
	case errors.Is(err, unix.ENOTDIR):
		return fmt.Errorf("%s: %w", path, ErrNotCgroup2)
	case errors.Is(err, ErrNotCgroup2):
		return fmt.Errorf("%s: %w", path, err)
	}
	return &os.PathError{Op: "cgroup id of", Path: path, Err: err}
}
