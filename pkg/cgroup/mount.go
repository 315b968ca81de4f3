// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Mount is one mount of the cgroup v2 tree.
type Mount struct {
	// Point is where it is mounted, as this process sees it.
	Point string
	// Root is which directory of the tree is mounted there (field 4 of
	// mountinfo), relative to this process's cgroup namespace: "/" is the
	// namespace's own root and "/../.." lies two levels above it.
	Root string
	// ID and Parent are the mount's ids (fields 1 and 2).
	ID, Parent int
}

// maxMountinfoLine bounds a line; an overlay mount of many layers makes long
// ones, each path of it up to a page.
const maxMountinfoLine = 4 << 20

// ParseMountinfo returns the cgroup2 mounts of a mountinfo file (proc(5)) that
// can be reached: those that are not covered by a later mount on the same
// point, and whose root has not been removed. The order is the file's. It
// returns an error that wraps ErrMountinfo, or the reader's.
func ParseMountinfo(r io.Reader) ([]Mount, error) {
	type entry struct {
		Mount
		cgroup2 bool
	}
	var all []entry
	sc := bufio.NewScanner(r)
	sc.Buffer(make([]byte, 0, 64<<10), maxMountinfoLine)
	for n := 1; sc.Scan(); n++ {
		line := sc.Text()
		if line == "" {
			continue
		}
		// The optional fields end with a lone "-". Blanks inside a field are
		// escaped, so the first " - " is that separator and no mount's name
		// can forge it.
		left, right, ok := strings.Cut(line, " - ")
		fields, fstype := strings.Fields(left), strings.Fields(right)
		if !ok || len(fields) < 6 || len(fstype) < 1 {
			return nil, fmt.Errorf("line %d: %w: too few fields", n, ErrMountinfo)
		}
		id, err := strconv.Atoi(fields[0])
		if err != nil {
			return nil, fmt.Errorf("line %d: %w: mount id: %w", n, ErrMountinfo, err)
		}
		parent, err := strconv.Atoi(fields[1])
		if err != nil {
			return nil, fmt.Errorf("line %d: %w: parent id: %w", n, ErrMountinfo, err)
		}
		all = append(all, entry{
			Mount:   Mount{Point: unescape(fields[4]), Root: unescape(fields[3]), ID: id, Parent: parent},
			cgroup2: fstype[0] == "cgroup2",
		})
	}
	if err := sc.Err(); err != nil {
		return nil, fmt.Errorf("reading mountinfo: %w", err)
	}

	// A mount whose parent is another one on the same point lies on top of it:
	// the path leads to the upper one only.
	points := make(map[int]string, len(all))
	for _, e := range all {
		points[e.ID] = e.Point
	}
	covered := make(map[int]bool)
	for _, e := range all {
		if below, ok := points[e.Parent]; ok && e.Parent != e.ID && below == e.Point {
			covered[e.Parent] = true
		}
	}
	var out []Mount
	for _, e := range all {
		if e.cgroup2 && !covered[e.ID] && !strings.HasSuffix(e.Root, "//deleted") && filepath.IsAbs(e.Point) {
			out = append(out, e.Mount)
		}
	}
	return out, nil
}

// unescape undoes the octal escapes of mountinfo: blank, tab, newline and
// backslash are written \040, \011, \012 and \134.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if v, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(v))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// ChooseMount picks the mount that shows the most of the tree: the one with the
// shallowest root, where every ".." of a root counts one level up. A container
// that was given the host's /sys/fs/cgroup has its own, deeper view as well,
// and that one does not show the other pods. Among equals the shorter mount
// point wins, then the first. Without any it returns ErrNoCgroup2.
func ChooseMount(mounts []Mount) (Mount, error) {
	if len(mounts) == 0 {
		return Mount{}, ErrNoCgroup2
	}
	best := mounts[0]
	for _, m := range mounts[1:] {
		d, b := rootDepth(m.Root), rootDepth(best.Root)
		if d < b || d == b && len(m.Point) < len(best.Point) {
			best = m
		}
	}
	return best, nil
}

func rootDepth(root string) int {
	depth := 0
	for part := range strings.SplitSeq(root, "/") {
		switch part {
		case "", ".":
		case "..":
			depth--
		default:
			depth++
		}
	}
	return depth
}

// FindMount reads a mountinfo file and chooses among its cgroup2 mounts. An
// empty path means /proc/self/mountinfo.
func FindMount(mountinfo string) (Mount, error) {
	if mountinfo == "" {
		mountinfo = "/proc/self/mountinfo"
	}
	f, err := os.Open(mountinfo)
	if err != nil {
		return Mount{}, fmt.Errorf("finding the cgroup v2 mount: %w", err)
	}
	defer f.Close()
	mounts, err := ParseMountinfo(f)
	if err != nil {
		return Mount{}, fmt.Errorf("%s: %w", mountinfo, err)
	}
	return ChooseMount(mounts)
}

// Join gives the file-system path of a cgroup path below the mount.
func (m Mount) Join(path string) string { return strings.TrimSuffix(m.Point, "/") + path }

// SelfPath returns the path, below the mount, of the cgroup that the calling
// process is in. procfs is the root of procfs, /proc if empty. It returns
// ErrOutside if the mount does not show it.
//
// /proc/self/cgroup is relative to the cgroup namespace. If the mount's root
// lies above that (the host's tree in a container with a cgroup namespace of
// its own), the names in between are nowhere to be read, and the directory that
// lists this process is searched instead.
func (m Mount) SelfPath(procfs string) (string, error) {
	p, err := m.path(procfs, "self", os.Getpid())
	if err != nil {
		return "", fmt.Errorf("finding the agent's own cgroup: %w", err)
	}
	return p, nil
}

// ProcessPath is SelfPath for any process. Where it has to search, which the
// node's whole tree may take, it is not for the way of a request.
func (m Mount) ProcessPath(procfs string, pid int) (string, error) {
	p, err := m.path(procfs, strconv.Itoa(pid), pid)
	if err != nil {
		return "", fmt.Errorf("finding the cgroup of process %d: %w", pid, err)
	}
	return p, nil
}

// path finds the cgroup of a process, dir in procfs.
func (m Mount) path(procfs, dir string, pid int) (string, error) {
	if procfs == "" {
		procfs = "/proc"
	}
	data, err := os.ReadFile(filepath.Join(procfs, dir, "cgroup"))
	if err != nil {
		return "", err
	}
	own := ""
	for line := range strings.SplitSeq(string(data), "\n") {
		// The v2 entry is "0::PATH"; it is the only one with hierarchy 0.
		if p, ok := strings.CutPrefix(line, "0::"); ok {
			own = p
		}
	}
	if own == "" {
		return "", ErrNoCgroup2
	}
	if !hasDotDot(own) && !hasDotDot(m.Root) {
		root := strings.TrimSuffix(m.Root, "/")
		switch {
		case own == root || own == m.Root:
			return "/", nil
		case strings.HasPrefix(own, root+"/"):
			return own[len(root):], nil
		}
		return "", fmt.Errorf("cgroup %s, mount shows %s: %w", own, m.Root, ErrOutside)
	}
	return m.findPID(pid)
}

func hasDotDot(path string) bool {
	for part := range strings.SplitSeq(path, "/") {
		if part == ".." {
			return true
		}
	}
	return false
}

// maxSearch bounds how many directories a search of the whole tree visits. A
// node with 250 pods has about 3,000.
const maxSearch = 1 << 16

// findPID searches the directory whose cgroup.procs holds the process. The file
// is the kernel's and gives pids as this process's pid namespace has them, so
// it cannot be forged by whoever made the directory.
func (m Mount) findPID(pid int) (string, error) {
	want := strconv.Itoa(pid)
	found := ""
	err := walk(m, maxSearch, func(path string, _ int) (descend bool, err error) {
		data, err := os.ReadFile(m.Join(path) + "/cgroup.procs")
		if err != nil {
			// Threaded cgroups refuse the read (EOPNOTSUPP); directories go
			// away during the search. Neither holds this process.
			return true, nil
		}
		for line := range strings.SplitSeq(string(data), "\n") {
			if line == want {
				found = path
				return false, fs.SkipAll
			}
		}
		return true, nil
	})
	if err != nil {
		return "", fmt.Errorf("searching the cgroup tree: %w", err)
	}
	if found == "" {
		return "", fmt.Errorf("process %d is in no cgroup below %s: %w", pid, m.Point, ErrOutside)
	}
	return found, nil
}

// walk visits the directories below the mount breadth first, parents before
// children, and stops without error if visit returns fs.SkipAll. Directories
// that go away meanwhile are passed over.
func walk(m Mount, limit int, visit func(path string, depth int) (descend bool, err error)) error {
	type item struct {
		path  string
		depth int
	}
	queue := []item{{path: "/"}}
	for seen := 0; len(queue) > 0; seen++ {
		if seen == limit {
			return fmt.Errorf("more than %d directories: %w", limit, ErrSearchLimit)
		}
		it := queue[0]
		queue = queue[1:]
		descend, err := visit(it.path, it.depth)
		if errors.Is(err, fs.SkipAll) {
			return nil
		}
		if err != nil {
			return err
		}
		if !descend {
			continue
		}
		entries, err := os.ReadDir(m.Join(it.path))
		if err != nil {
			if it.path != "/" && isGone(err) {
				continue
			}
			return err
		}
		base := strings.TrimSuffix(it.path, "/")
		for _, e := range entries {
			if e.IsDir() {
				queue = append(queue, item{base + "/" + e.Name(), it.depth + 1})
			}
		}
	}
	return nil
}
