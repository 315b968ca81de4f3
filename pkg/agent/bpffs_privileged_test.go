// SPDX-License-Identifier: Apache-2.0

//go:build privileged

package agent

import (
	"errors"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

func TestPrivilegedMountBPFFS(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "made")
	done := make(chan error)
	go func() {
		// A thread that has left the others' mount namespace is not used again:
		// it ends with its goroutine, as it stays locked.
		runtime.LockOSThread()
		done <- func() error {
			if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
				return err
			}
			if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
				return err
			}
			if mounted, err := MountBPFFS(dir); err != nil || !mounted {
				return errors.Join(errors.New("first"), err)
			}
			if is, err := isBPFFS(dir); err != nil || !is {
				return errors.Join(errors.New("no bpf filesystem"), err)
			}
			if mounted, err := MountBPFFS(dir); err != nil || mounted {
				return errors.Join(errors.New("mounted again"), err)
			}
			return nil
		}()
	}()
	if err := <-done; err != nil {
		t.Error(err)
	}
	// The mount was the thread's own, and the directory is as it was.
	if is, err := isBPFFS(dir); err != nil || is {
		t.Errorf("left mounted: %v, %v", is, err)
	}
}
