// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"fmt"
	"os"
	"strings"
	"syscall"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

// QoS is the kubelet's quality-of-service class of a pod, told by where its
// directory lies.
type QoS string

// The classes. Guaranteed pods lie directly in the root.
const (
	Guaranteed QoS = "guaranteed"
	Burstable  QoS = "burstable"
	BestEffort QoS = "besteffort"
)

// Root is a node's kubepods directory: what the kubelet made, and below which
// it makes one directory per pod. The zero value contains no pod.
//
// The kubelet has two ways to name directories. With the cgroupfs driver it is
//
//	/kubepods/burstable/pod1c3c…-…/
//
// and with the systemd driver every name repeats its parent's, and dashes of
// the UID become underscores, because a dash in a slice's name means a level:
//
//	/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1c3c…_….slice/
type Root struct {
	path string
	// names of the QoS directories and of the pods in each place
	levels [3]level
	suffix string // ".slice" with the systemd driver
	uidSep byte   // what stands for a dash in a UID
}

type level struct {
	qos QoS
	dir string // name of the directory in the root; empty: the root itself
	pod string // what a pod's directory begins with
}

// NewRoot describes the kubepods directory at a path below the mount. The
// driver is told from the name: the systemd driver's ends in ".slice". It
// touches no file. The error wraps ErrPath.
func NewRoot(path string) (Root, error) {
	if err := checkPath(path); err != nil {
		return Root{}, err
	}
	if path == "/" {
		return Root{}, fmt.Errorf("the kubepods root cannot be the top of the tree: %w", ErrPath)
	}
	r := Root{path: path, uidSep: '-'}
	r.levels = [3]level{
		{Guaranteed, "", "pod"},
		{Burstable, string(Burstable), "pod"},
		{BestEffort, string(BestEffort), "pod"},
	}
	base := path[strings.LastIndexByte(path, '/')+1:]
	if stem, ok := strings.CutSuffix(base, ".slice"); ok {
		if stem == "" || strings.HasSuffix(stem, "-") || strings.HasPrefix(stem, "-") {
			return Root{}, fmt.Errorf("%q is no systemd slice: %w", base, ErrPath)
		}
		r.suffix, r.uidSep = ".slice", '_'
		for i := range r.levels {
			l := &r.levels[i]
			if l.dir != "" {
				stem := stem + "-" + l.dir
				l.dir, l.pod = stem+".slice", stem+"-pod"
			} else {
				l.pod = stem + "-pod"
			}
		}
	}
	return r, nil
}

// Path is the root's path below the mount.
func (r Root) Path() string { return r.path }

// QoSDirs returns the paths below the mount of the root's QoS directories,
// whether they exist or not.
func (r Root) QoSDirs() []string {
	var out []string
	for _, l := range r.levels {
		if l.dir != "" {
			out = append(out, r.path+"/"+l.dir)
		}
	}
	return out
}

// IsQoS says whether a direct child of the root with this name is a QoS
// directory, and which.
func (r Root) IsQoS(name string) (QoS, bool) {
	for _, l := range r.levels {
		if l.dir != "" && name == l.dir {
			return l.qos, true
		}
	}
	return "", false
}

// Listing is what lies in a kubepods root at one moment.
type Listing struct {
	// QoS holds the QoS directories that exist, as paths below the mount.
	QoS []string
	// Pods holds the pod-level directories, without container ids.
	Pods []PodRef
}

// List reads the root and its QoS directories. Directories that go away while
// it reads are left out. The error wraps ErrGone if the root does not exist.
func (r Root) List(m Mount) (Listing, error) {
	var out Listing
	for _, l := range r.levels {
		dir := r.path
		if l.dir != "" {
			dir += "/" + l.dir
		}
		entries, err := os.ReadDir(m.Join(dir))
		switch {
		case err == nil:
		case isGone(err) && l.dir != "":
			continue
		case isGone(err):
			return Listing{}, fmt.Errorf("kubepods root %s: %w", dir, ErrGone)
		default:
			return Listing{}, fmt.Errorf("listing pods: %w", err)
		}
		if l.dir != "" {
			out.QoS = append(out.QoS, dir)
		}
		for _, e := range entries {
			if !e.IsDir() {
				continue
			}
			if ref, err := r.Parse(dir + "/" + e.Name()); err == nil {
				out.Pods = append(out.Pods, ref)
			}
		}
	}
	return out, nil
}

// PodRef is what a path says about a pod.
type PodRef struct {
	// UID is that of the outermost pod.
	UID evidence.PodUID
	// Path is the pod-level directory, below the mount.
	Path string
	// QoS is the class, by where the directory lies.
	QoS QoS
	// ContainerID is for display only: the name it is read from may be the
	// workload's. Empty if the path does not go that deep, names no container,
	// or is that of CRI-O's monitor process.
	ContainerID string
}

// Parse returns the pod that a path below the mount belongs to: the outermost
// one. Errors wrap ErrNotPod, or ErrPath if the text is no canonical path.
func (r Root) Parse(path string) (PodRef, error) {
	if err := checkPath(path); err != nil {
		return PodRef{}, err
	}
	l, dir, ok := r.split(path)
	if !ok {
		return PodRef{}, fmt.Errorf("%s: %w", path, ErrNotPod)
	}
	name := dir[strings.LastIndexByte(dir, '/')+1:]
	uid, ok := strings.CutPrefix(name, l.pod)
	if ok {
		uid, ok = strings.CutSuffix(uid, r.suffix)
	}
	if ok {
		uid, ok = parseUID(uid, r.uidSep)
	}
	if !ok {
		// A direct child of the root that is not named as the kubelet names
		// pods. Nothing deeper is looked at: those names are not the kubelet's.
		return PodRef{}, fmt.Errorf("%s: %w", path, ErrNotPod)
	}
	ref := PodRef{UID: evidence.PodUID(uid), Path: dir, QoS: l.qos}
	if len(path) > len(dir) {
		next, _, _ := strings.Cut(path[len(dir)+1:], "/")
		ref.ContainerID = containerID(next)
	}
	return ref, nil
}

// PodDir returns the part of a path that is the pod-level directory if there is
// a pod: the child of the root or of a QoS directory that the path goes
// through. It looks at the place only, not at the name, and does not allocate:
// it is for finding a pod that Parse has accepted before.
func (r Root) PodDir(path string) (string, bool) {
	_, dir, ok := r.split(path)
	return dir, ok
}

// Owner is PodDir for ResolverConfig: everything outside every pod has the
// owner "".
func (r Root) Owner(path string) string {
	dir, _ := r.PodDir(path)
	return dir
}

// split finds the level and the child of that level's directory on the path.
func (r Root) split(path string) (l level, dir string, ok bool) {
	if r.path == "" || len(path) < len(r.path)+2 || path[:len(r.path)] != r.path || path[len(r.path)] != '/' {
		return level{}, "", false
	}
	first := nextPart(path, len(r.path)+1)
	name := path[len(r.path)+1 : first]
	for _, l := range r.levels[1:] {
		if name != l.dir {
			continue
		}
		if len(path) < first+2 {
			return level{}, "", false // the QoS directory itself
		}
		if proofOff("outermost_pod") {
			return l, innermost(path, nextPart(path, first+1), l.pod), true
		}
		return l, path[:nextPart(path, first+1)], true
	}
	return r.levels[0], path[:first], true
}

// innermost is what must not be believed: the deepest directory from end on that
// is named like a pod's. For proof builds.
func innermost(path string, end int, pod string) string {
	dir := path[:end]
	for end < len(path) {
		next := nextPart(path, end+1)
		if strings.HasPrefix(path[end+1:next], pod) {
			dir = path[:next]
		}
		end = next
	}
	return dir
}

// nextPart returns where the component that starts at i ends.
func nextPart(path string, i int) int {
	if n := strings.IndexByte(path[i:], '/'); n >= 0 {
		return i + n
	}
	return len(path)
}

// checkPath accepts absolute paths without empty, "." and ".." components.
func checkPath(path string) error {
	if path == "" || path[0] != '/' {
		return fmt.Errorf("%q: not absolute: %w", path, ErrPath)
	}
	if path == "/" {
		return nil
	}
	for i := 0; i < len(path); {
		end := nextPart(path, i+1)
		switch part := path[i+1 : end]; part {
		case "", ".", "..":
			return fmt.Errorf("%q: component %q: %w", path, part, ErrPath)
		}
		i = end
	}
	if strings.IndexByte(path, 0) >= 0 {
		return fmt.Errorf("%q: NUL byte: %w", path, ErrPath)
	}
	return nil
}

// parseUID accepts the two forms a pod UID has, and no other spelling of them:
// a lower-case UUID whose dashes are written as sep, or, for static pods, the
// kubelet's hash of 32 hex digits. A second spelling would make two names of
// one pod.
func parseUID(s string, sep byte) (string, bool) {
	switch len(s) {
	case 32:
		return s, isHex(s)
	case 36:
		for i := range len(s) {
			switch i {
			case 8, 13, 18, 23:
				if s[i] != sep {
					return "", false
				}
			default:
				if !isHexDigit(s[i]) {
					return "", false
				}
			}
		}
		if sep != '-' {
			s = strings.ReplaceAll(s, string(sep), "-")
		}
		return s, true
	}
	return "", false
}

func isHexDigit(c byte) bool { return c >= '0' && c <= '9' || c >= 'a' && c <= 'f' }

func isHex(s string) bool {
	for i := range len(s) {
		if !isHexDigit(s[i]) {
			return false
		}
	}
	return true
}

// containerID reads a container's id from the directory below a pod's, as the
// runtimes name it: containerd, CRI-O and docker with the systemd driver as
// PREFIX-ID.scope, CRI-O with cgroupfs as crio-ID, the others as the bare id.
func containerID(name string) string {
	s, scope := strings.CutSuffix(name, ".scope")
	for _, prefix := range []string{"cri-containerd-", "crio-", "docker-"} {
		id, ok := strings.CutPrefix(s, prefix)
		if !ok {
			continue
		}
		// "crio-conmon-ID" is the monitor of that container, not the container:
		// it fails the test for hex.
		if len(id) == 64 && isHex(id) && (scope || prefix == "crio-") {
			return id
		}
		return ""
	}
	if !scope && isContainerID(s) {
		return s
	}
	return ""
}

func isContainerID(s string) bool { return len(s) == 64 && isHex(s) }

// isMonitor says whether a directory below a pod's is that of CRI-O's conmon,
// which runs in the pod's cgroup but in the host's namespaces.
func isMonitor(name string) bool { return strings.HasPrefix(name, "crio-conmon-") }

// IsMonitor says whether a path below the mount lies in the directory of
// CRI-O's monitor process of a pod's container. It runs in the pod's cgroup but
// in the host's network namespace, so it says nothing about the pod's.
func (r Root) IsMonitor(path string) bool {
	dir, ok := r.PodDir(path)
	return ok && len(path) > len(dir) && isMonitor(path[len(dir)+1:])
}

// isRootName says whether a directory is named as the kubelet names its root:
// kubepods or kubepods.slice, and below --cgroup-root (as kind sets it)
// PREFIX/kubepods or PREFIX.slice/PREFIX-kubepods.slice.
func isRootName(parent, name string) bool {
	if name == "kubepods" || name == "kubepods.slice" {
		return true
	}
	stem, ok := strings.CutSuffix(name, "-kubepods.slice")
	return ok && stem != "" && parent == stem+".slice"
}

// maxRootDepth is how deep FindRoot searches. Kubelets put their root at level
// 1, with --cgroup-root usually at level 2.
const maxRootDepth = 6

// FindRoot finds the node's kubepods root.
//
//   - self is the cgroup of the agent (Mount.SelfPath), empty if not known. If
//     the agent runs in a pod, the root is the shallowest kubepods directory
//     above it: deeper ones are made by workloads.
//   - Else override (flag --cgroup-root), which must exist. It is a path below
//     the mount, or a file-system path that begins with the mount point.
//   - Else the only kubepods directory of the tree.
//
// The search never enters a kubepods directory, a scope, a directory named like
// a container or user.slice, and passes over directories that the owner of the
// tree's top does not own: whoever runs there can make directories of any name.
//
// Errors wrap ErrAmbiguousRoot (both candidates are named; also if override
// contradicts the agent's own place), ErrNoRoot, ErrPath or ErrSearchLimit.
func FindRoot(m Mount, self, override string) (Root, error) {
	if override != "" {
		rel, ok := strings.CutPrefix(override, strings.TrimSuffix(m.Point, "/")+"/")
		if ok && m.Point != "/" {
			override = "/" + rel
		}
		if len(override) > 1 {
			override = strings.TrimSuffix(override, "/")
		}
		r, err := NewRoot(override)
		if err != nil {
			return Root{}, fmt.Errorf("--cgroup-root: %w", err)
		}
		st, err := os.Stat(m.Join(override))
		if err != nil {
			return Root{}, fmt.Errorf("--cgroup-root %s: %w: %w", override, ErrNoRoot, err)
		}
		if !st.IsDir() {
			return Root{}, fmt.Errorf("--cgroup-root %s: %w: not a directory", override, ErrNoRoot)
		}
		if own := rootAbove(self); own != "" && own != override {
			return Root{}, fmt.Errorf("the agent runs below %s, but --cgroup-root is %s: %w", own, override, ErrAmbiguousRoot)
		}
		return r, nil
	}
	if own := rootAbove(self); own != "" {
		return NewRoot(own)
	}

	top, err := os.Stat(m.Join("/"))
	if err != nil {
		return Root{}, fmt.Errorf("searching the kubepods root: %w", err)
	}
	var found []string
	err = walk(m, maxSearch, func(path string, depth int) (bool, error) {
		if path == "/" {
			return true, nil
		}
		dir, name := path[:strings.LastIndexByte(path, '/')], path[strings.LastIndexByte(path, '/')+1:]
		if name == "user.slice" || strings.HasSuffix(name, ".scope") || isContainerID(name) || !sameOwner(top, m.Join(path)) {
			return false, nil
		}
		if isRootName(dir[strings.LastIndexByte(dir, '/')+1:], name) {
			found = append(found, path)
			return false, nil
		}
		return depth < maxRootDepth, nil
	})
	if err != nil {
		return Root{}, fmt.Errorf("searching the kubepods root: %w", err)
	}
	switch len(found) {
	case 0:
		return Root{}, ErrNoRoot
	case 1:
		return NewRoot(found[0])
	}
	return Root{}, fmt.Errorf("%s: %w", strings.Join(found, " and "), ErrAmbiguousRoot)
}

// rootAbove returns the shallowest kubepods directory that contains a path, or
// is it; empty if there is none.
func rootAbove(self string) string {
	if checkPath(self) != nil || self == "/" {
		return ""
	}
	parent := ""
	for i := 0; i < len(self); {
		end := nextPart(self, i+1)
		name := self[i+1 : end]
		if isRootName(parent, name) {
			return self[:end]
		}
		parent, i = name, end
	}
	return ""
}

func sameOwner(top os.FileInfo, path string) bool {
	st, err := os.Lstat(path)
	if err != nil {
		return false
	}
	a, okA := top.Sys().(*syscall.Stat_t)
	b, okB := st.Sys().(*syscall.Stat_t)
	return okA && okB && a.Uid == b.Uid
}
