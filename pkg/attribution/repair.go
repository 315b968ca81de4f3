// SPDX-License-Identifier: Apache-2.0

package attribution

import (
	"errors"
	"fmt"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// hooked is a program at its hook.
type hooked struct {
	link    link.Link
	program *ebpf.Program
	id      ebpf.ProgramID // of program; 0: not known
	name    string
	attach  ebpf.AttachType
}

func newHooked(l link.Link, prog *ebpf.Program, name string, attach ebpf.AttachType) *hooked {
	h := &hooked{link: l, program: prog, name: name, attach: attach}
	if info, err := prog.Info(); err == nil {
		h.id, _ = info.ID()
	}
	return h
}

// Close gives up the link that is in use now.
func (h *hooked) Close() error { return h.link.Close() }

// Reattached counts the programs that Repair put back.
func (a *Attribution) Reattached() uint64 { return a.reattached.Load() }

// Repair looks whether the programs are still where Open put them, and puts back
// those that are not: whoever is root can detach a link (bpftool link detach), or
// put another program into it. It returns the hooks that it repaired. The maps
// and the nonce key stay; connections that were opened meanwhile have no
// evidence. A few system calls, none of which changes anything as long as
// nothing is wrong.
func (a *Attribution) Repair() ([]string, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.hooked) == 0 {
		return nil, nil // closed
	}
	var target unix.Stat_t
	if err := unix.Stat(a.cfg.CgroupPath, &target); err != nil {
		return nil, fmt.Errorf("look at the cgroup that the programs are attached at: %w", err)
	}
	var repaired []string
	var errs []error
	// In the order of hooks: evidence that is noted before sock_ops is back
	// would not be carried.
	for _, h := range a.hooked {
		did, err := a.repair(h, target.Ino)
		if err != nil {
			errs = append(errs, fmt.Errorf("attach %s again: %w", h.name, err))
		}
		if did {
			repaired = append(repaired, h.name)
			a.reattached.Add(1)
		}
	}
	return repaired, errors.Join(errs...)
}

func (a *Attribution) repair(h *hooked, cgroup uint64) (bool, error) {
	info, err := h.link.Info()
	if err != nil {
		return false, fmt.Errorf("look at the link: %w", err)
	}
	at := info.Cgroup()
	if at == nil {
		return false, errors.New("the link is none to a cgroup")
	}
	if at.CgroupId == cgroup {
		if h.id == 0 || info.Program == h.id {
			return false, nil
		}
		if err := h.link.Update(h.program); err != nil {
			return false, fmt.Errorf("another program is in the link: %w", err)
		}
		return true, nil
	}
	// A link that was detached can never be attached again (its cgroup reads as
	// 0); neither can one whose cgroup was removed.
	fresh, err := link.AttachCgroup(link.CgroupOptions{Path: a.cfg.CgroupPath, Attach: h.attach, Program: h.program})
	if err != nil {
		return false, err
	}
	old := h.link
	h.link = fresh
	if a.status.Directory != "" {
		// The dead one's pin would be what the next agent finds.
		if err := pinOver(fresh, filepath.Join(a.status.Directory, "link_"+h.name)); err != nil {
			return true, errors.Join(fmt.Errorf("pin: %w", err), old.Close())
		}
	}
	return true, old.Close()
}
