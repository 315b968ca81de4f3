// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// MountBPFFS makes sure that a directory is a bpf filesystem, and says whether
// it was mounted now. It takes CAP_SYS_ADMIN, and in a container a volume whose
// mounts reach the host; so `initialize` does it, and the process that serves
// needs neither.
func MountBPFFS(dir string) (mounted bool, err error) {
	is, err := isBPFFS(dir)
	if errors.Is(err, fs.ErrNotExist) {
		// The kernel makes the usual place; another may be wanted.
		if err = os.MkdirAll(dir, 0o700); err == nil {
			is, err = isBPFFS(dir)
		}
	}
	if err != nil {
		return false, fmt.Errorf("bpf filesystem: %w", err)
	}
	if is {
		return false, nil
	}
	if err := unix.Mount("bpf", dir, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC|unix.MS_RELATIME, "mode=0700"); err != nil {
		return false, fmt.Errorf("mount a bpf filesystem on %s: %w", dir, err)
	}
	return true, nil
}

func isBPFFS(dir string) (bool, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return false, &fs.PathError{Op: "statfs", Path: dir, Err: err}
	}
	return st.Type == unix.BPF_FS_MAGIC, nil
}
