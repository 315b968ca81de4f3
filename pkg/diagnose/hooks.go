// SPDX-License-Identifier: Apache-2.0

// Package diagnose looks at a node for the debug CLI: which programs are
// attached where and in which order, whether addresses are there and can be
// reached from a pod's network namespace, what a pod's processes were given,
// and what on the node is known to get in the way. It runs as root beside the
// agent, for a moment, and changes nothing.
package diagnose

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/pkg/explain"
)

// hookTypes are where Latchkey attaches, by the names of its pins.
var hookTypes = [...]struct {
	name   string
	attach ebpf.AttachType
}{
	{"connect4", ebpf.AttachCGroupInet4Connect},
	{"connect6", ebpf.AttachCGroupInet6Connect},
	{"sockops", ebpf.AttachCGroupSockOps},
}

// queryEffective is BPF_F_QUERY_EFFECTIVE: what runs for a process in the
// cgroup, in the order in which it runs, wherever it is attached.
const queryEffective = 1 << 0

// ownPrefix begins the names of Latchkey's programs. Anybody can use it, so it
// only counts where nothing is pinned.
const ownPrefix = "latchkey_"

// Object is a pinned program, link or map.
type Object struct {
	// Kind is program, link or map; Name is the pin's.
	Kind string `json:"kind"`
	Name string `json:"name"`
	ID   uint32 `json:"id"`
	// Detail says the rest: type and size of a map, target of a link.
	Detail string `json:"detail,omitempty"`

	// program is a link's; loaded is a program's, zero if not known.
	program uint32
	loaded  time.Time
}

// Pinned lists what is pinned in the agent's directory: programs, links, maps.
func Pinned(dir string) ([]Object, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("list the pins: %w", err)
	}
	var out []Object
	var errs []error
	for _, e := range entries {
		at := filepath.Join(dir, e.Name())
		o, err := pinned(at, e.Name())
		if err != nil {
			errs = append(errs, fmt.Errorf("open %s: %w", at, err))
			continue
		}
		if o != nil {
			out = append(out, *o)
		}
	}
	return out, errors.Join(errs...)
}

func pinned(at, base string) (*Object, error) {
	kind, name, _ := strings.Cut(base, "_")
	switch kind {
	case "prog":
		p, err := ebpf.LoadPinnedProgram(at, nil)
		if err != nil {
			return nil, err
		}
		defer p.Close()
		info, err := p.Info()
		if err != nil {
			return nil, err
		}
		id, _ := info.ID()
		o := &Object{Kind: "program", Name: name, ID: uint32(id), Detail: fullName(info.Name, name) + ", " + p.Type().String()}
		if since, ok := info.LoadTime(); ok {
			o.loaded = bootTime().Add(since).Truncate(time.Second)
		}
		return o, nil
	case "link":
		l, err := link.LoadPinnedLink(at, nil)
		if err != nil {
			return nil, err
		}
		defer l.Close()
		info, err := l.Info()
		if err != nil {
			return nil, err
		}
		detail := fmt.Sprintf("program %d", info.Program)
		if c := info.Cgroup(); c != nil {
			detail += fmt.Sprintf(", cgroup id %d", c.CgroupId)
			if c.CgroupId == 0 {
				detail += " (detached)"
			}
		}
		return &Object{Kind: "link", Name: name, ID: uint32(info.ID), Detail: detail, program: uint32(info.Program)}, nil
	case "map":
		m, err := ebpf.LoadPinnedMap(at, nil)
		if err != nil {
			return nil, err
		}
		defer m.Close()
		info, err := m.Info()
		if err != nil {
			return nil, err
		}
		id, _ := info.ID()
		most := fmt.Sprintf("%d entries at most", info.MaxEntries)
		if info.MaxEntries == 0 {
			// The kernel keeps such a map's entries with their sockets.
			most = "an entry a socket"
		}
		return &Object{Kind: "map", Name: name, ID: uint32(id), Detail: fmt.Sprintf("%s, key %d, value %d bytes, %s", info.Type, info.KeySize, info.ValueSize, most)}, nil
	}
	return nil, nil
}

// maxName is how much of a program's name the kernel itself keeps
// (BPF_OBJ_NAME_LEN, without the NUL). The rest is in the program's BTF, which
// only CAP_SYS_ADMIN may open.
const maxName = 15

// fullName is the name of the agent's program that is pinned as pin, also where
// only its beginning is seen.
func fullName(seen, pin string) string {
	if full := ownPrefix + pin; len(seen) == maxName && strings.HasPrefix(full, seen) {
		return full
	}
	return seen
}

// Hooks lists what is attached on the way of a process in a cgroup, a path
// below the mount, in the order in which it runs. pins is the agent's
// directory, empty if it pins nothing.
func Hooks(mount, cgroup, pins string) ([]explain.Hook, error) {
	own, links := ownPrograms(pins), linksOf()
	out := []explain.Hook{}
	for _, h := range hookTypes {
		effective, err := query(filepath.Join(mount, cgroup), h.attach, queryEffective)
		if err != nil {
			return out, fmt.Errorf("programs at %s of %s: %w", h.name, cgroup, err)
		}
		where := map[ebpf.ProgramID]string{}
		for at := filepath.Clean("/" + cgroup); ; at = filepath.Dir(at) {
			direct, err := query(filepath.Join(mount, at), h.attach, 0)
			if err != nil {
				return out, fmt.Errorf("programs at %s of %s: %w", h.name, at, err)
			}
			for _, p := range direct {
				if _, known := where[p.ID]; !known {
					where[p.ID] = at
				}
			}
			if at == "/" {
				break
			}
		}
		hook := explain.Hook{Name: h.name, Programs: []explain.Program{}}
		for _, p := range effective {
			d := describe(p, own, links)
			d.Cgroup = where[p.ID]
			hook.Programs = append(hook.Programs, d)
		}
		out = append(out, hook)
	}
	return out, nil
}

// maxCgroups bounds a walk down the tree.
const maxCgroups = 20000

// Below lists the programs of others that are attached in the cgroups below
// one, where they see some pods only. It stops, with an error, after 20,000
// cgroups.
func Below(mount, cgroup, pins string) ([]explain.Hook, error) {
	own, links := ownPrograms(pins), linksOf()
	out := make([]explain.Hook, len(hookTypes))
	for i, h := range hookTypes {
		out[i].Name = h.name
	}
	top := filepath.Join(mount, cgroup)
	n := 0
	err := filepath.WalkDir(top, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
				return nil // gone meanwhile
			}
			return err
		}
		if !e.IsDir() || path == top {
			return nil
		}
		if n++; n > maxCgroups {
			return fmt.Errorf("more than %d cgroups below %s", maxCgroups, cgroup)
		}
		for i, h := range hookTypes {
			found, err := query(path, h.attach, 0)
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil {
				return err
			}
			for _, p := range found {
				d := describe(p, own, links)
				d.Cgroup = strings.TrimPrefix(path, strings.TrimSuffix(mount, "/"))
				out[i].Programs = append(out[i].Programs, d)
			}
		}
		return nil
	})
	return slices.DeleteFunc(out, func(h explain.Hook) bool { return len(h.Programs) == 0 }), err
}

func query(dir string, at ebpf.AttachType, flags uint32) ([]link.AttachedProgram, error) {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(fd)
	r, err := link.QueryPrograms(link.QueryOptions{Target: fd, Attach: at, QueryFlags: flags})
	if err != nil {
		return nil, err
	}
	return r.Programs, nil
}

// describe names a program. Of one that may not be opened, for which it takes
// CAP_SYS_ADMIN, or is gone, no more is known than its pin says.
func describe(p link.AttachedProgram, own map[uint32]explain.Program, links map[ebpf.ProgramID]link.ID) explain.Program {
	d, ours := own[uint32(p.ID)]
	d.ID, d.Ours = uint32(p.ID), ours
	if id, ok := links[p.ID]; ok {
		d.Link = uint32(id)
	}
	if id, ok := p.LinkID(); ok {
		d.Link = uint32(id)
	}
	prog, err := ebpf.NewProgramFromID(p.ID)
	if err != nil {
		return d
	}
	defer prog.Close()
	if info, err := prog.Info(); err == nil {
		if !ours {
			d.Name = info.Name
		}
		if since, ok := info.LoadTime(); ok {
			d.Loaded = bootTime().Add(since).Truncate(time.Second)
		}
	}
	if own == nil {
		d.Ours = strings.HasPrefix(d.Name, ownPrefix)
	}
	return d
}

// linksOf gives the cgroup links of the machine by their programs: most kernels
// do not tell of them when they are asked for a cgroup's programs. A program
// that was attached without a link is not in it.
func linksOf() map[ebpf.ProgramID]link.ID {
	out := map[ebpf.ProgramID]link.ID{}
	var it link.Iterator
	defer it.Close()
	for it.Next() {
		if info, err := it.Link.Info(); err == nil && info.Cgroup() != nil {
			out[info.Program] = it.ID
		}
	}
	return out
}

// ownPrograms are the pinned programs by id, with what their pins tell of them;
// nil if nothing is pinned.
func ownPrograms(pins string) map[uint32]explain.Program {
	if pins == "" {
		return nil
	}
	objects, err := Pinned(pins)
	if err != nil && len(objects) == 0 {
		return nil
	}
	own := map[uint32]explain.Program{}
	links := map[uint32]uint32{}
	for _, o := range objects {
		switch o.Kind {
		case "program":
			name, _, _ := strings.Cut(o.Detail, ",")
			own[o.ID] = explain.Program{ID: o.ID, Name: name, Ours: true, Loaded: o.loaded}
		case "link":
			links[o.program] = o.ID
		}
	}
	for id, p := range own {
		p.Link = links[id]
		own[id] = p
	}
	return own
}

// bootTime is when the kernel's clock of program load times began.
func bootTime() time.Time {
	var up unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &up); err != nil {
		return time.Time{}
	}
	return time.Now().Add(-time.Duration(up.Nano()))
}
