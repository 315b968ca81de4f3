// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

// NetnsResult is what a connection's network namespace says about its pod.
type NetnsResult uint8

const (
	// NetnsUnknown: the namespace is no sandbox that the node knows: nested
	// containers have their own, and a sandbox may just have been re-created.
	// To be accepted, and counted.
	NetnsUnknown NetnsResult = iota
	// NetnsOwn: it is that of the pod's sandbox.
	NetnsOwn
	// NetnsOtherPod: it is that of another pod's sandbox. To be refused.
	NetnsOtherPod
	// NetnsHostNotAllowed: it is the host's, and the pod has one of its own.
	// To be refused.
	NetnsHostNotAllowed
)

// String is the value used in logs and metrics.
func (r NetnsResult) String() string {
	switch r {
	case NetnsUnknown:
		return "unknown"
	case NetnsOwn:
		return "own"
	case NetnsOtherPod:
		return "other_pod"
	case NetnsHostNotAllowed:
		return "host_not_allowed"
	}
	return "netns_result_" + strconv.Itoa(int(r))
}

// sandbox is the process that holds a pod's network namespace: its oldest, which
// is the pause container's. Immutable.
type sandbox struct {
	pid   int
	start uint64 // field 22 of /proc/PID/stat; pid and start name a process
	inode evidence.NetnsInode
}

// podNetns is what is known of one pod's network namespace.
type podNetns struct {
	sandbox atomic.Pointer[sandbox] // nil: not known
	// cookie is that of the namespace which was last seen to be the sandbox's.
	// Cookies are not reused, so once learned it needs no second look; zero if
	// not learned yet.
	cookie atomic.Uint64
	// confirmed is the sandbox that was compared with those of all other pods.
	confirmed atomic.Pointer[sandbox]

	mu       sync.Mutex // one reader of /proc per pod at a time
	lastWalk time.Time
}

// walkSoon bounds how often one pod's processes are searched for its sandbox if
// the search keeps finding none: in an agent that does not see its processes it
// would otherwise cost a search per connection. It is short, as a pod's first
// search may have come before its first process, and for as long as none follows
// its namespace passes for one that nobody knows. A container cannot be started
// in a sandbox, reach another pod's cgroup and connect in so short a time.
const walkSoon = 10 * time.Millisecond

// OwnNetns returns the network namespace of the calling process: the host's, if
// the agent is on the host network. On kernels before 5.14 the cookie is zero.
func OwnNetns() (evidence.NetnsInode, evidence.NetnsCookie, error) {
	inode, err := readNetns("/proc/self")
	if err != nil {
		return 0, 0, fmt.Errorf("own network namespace: %w", err)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, 0, fmt.Errorf("own network namespace: %w", err)
	}
	defer unix.Close(fd)
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if errors.Is(err, unix.ENOPROTOOPT) {
		return inode, 0, nil
	}
	if err != nil {
		return 0, 0, fmt.Errorf("own network namespace: %w", err)
	}
	return inode, evidence.NetnsCookie(cookie), nil
}

func (x *Index) isHost(cookie evidence.NetnsCookie, inode evidence.NetnsInode) bool {
	if x.cfg.HostNetns == 0 {
		// The sandboxes' inodes could not be compared with it.
		return false
	}
	if cookie != 0 && x.cfg.HostNetnsCookie != 0 {
		return cookie == x.cfg.HostNetnsCookie
	}
	// The host's namespace never ends, so its inode is never another's.
	return inode == x.cfg.HostNetns
}

// CheckNetns compares the network namespace of a connection with those of the
// pods' sandboxes. Zero cookie and inode mean not known. In the usual case, a
// namespace that was seen to be the pod's own before, it costs one atomic load.
//
// An inode of /proc/PID/ns/net is reused when its namespace has ended, so a
// cached one is never a reason to refuse: before that the facts are read again
// for both pods.
func (x *Index) CheckNetns(p *Pod, cookie evidence.NetnsCookie, inode evidence.NetnsInode) NetnsResult {
	if cookie != 0 && uint64(cookie) == p.netns.cookie.Load() {
		return NetnsOwn
	}
	if cookie == 0 {
		// Without cookies (before 5.14) the cached inode is what there is. It
		// is looked after by every rescan.
		if sb := p.netns.sandbox.Load(); sb != nil && inode != 0 && sb.inode == inode && (sb == p.netns.confirmed.Load() || x.cfg.HostNetns == 0) {
			return NetnsOwn
		}
	}
	sb := x.freshSandbox(p)
	if sb != nil && x.cfg.HostNetns != 0 && sb != p.netns.confirmed.Load() {
		// It may be a process of another pod's that was moved here, in a
		// namespace that is known as that pod's only if its sandbox is.
		x.learnMissingPods()
		x.learnMissingSandboxes()
		if sb = x.freshSandbox(p); sb != nil {
			p.netns.confirmed.Store(sb)
		}
	}
	if x.matches(sb, cookie, inode) {
		if cookie != 0 {
			p.netns.cookie.Store(uint64(cookie))
		}
		return NetnsOwn
	}
	if x.isHost(cookie, inode) {
		if sb == nil {
			return NetnsUnknown
		}
		return NetnsHostNotAllowed
	}
	if inode == 0 {
		return NetnsUnknown
	}
	other := x.sandboxOwner(inode)
	if other == nil && sb != nil && x.cfg.HostNetns != 0 {
		// Nobody's, or that of a pod too young to be in the table as it is: until then
		// its namespace would be as good as one of this pod's own making. If
		// even this pod's processes cannot be seen, others' cannot either; and
		// where the host's is not known, it must not be taken for a pod's.
		x.learnMissingPods()
		x.learnMissingSandboxes()
		other = x.sandboxOwner(inode)
	}
	if other == nil || other == p || other.UID == p.UID {
		return NetnsUnknown
	}
	if c := other.netns.cookie.Load(); c != 0 && cookie != 0 && c != uint64(cookie) {
		// The same number, another namespace.
		return NetnsUnknown
	}
	theirs := x.freshSandbox(other)
	if theirs == nil || theirs.inode != inode || other.Ended() {
		return NetnsUnknown
	}
	return NetnsOtherPod
}

// matches says whether a connection's namespace is that of a sandbox.
func (x *Index) matches(sb *sandbox, cookie evidence.NetnsCookie, inode evidence.NetnsInode) bool {
	switch {
	case sb == nil:
		return false
	case x.isHost(cookie, inode):
		return x.isHost(0, sb.inode)
	}
	return inode != 0 && sb.inode == inode && !x.isHost(0, sb.inode)
}

// strays says whether a process that was found in a pod's cgroup is in another
// pod's network namespace. Who can write the host's cgroup tree can move a
// process that is older than the pod; older than the process that holds the
// namespace which it came from it is not, but it may be that process.
func (x *Index) strays(p *Pod, sb *sandbox) bool {
	owner := x.sandboxOwner(sb.inode)
	if owner == nil || owner.UID == p.UID || owner.Ended() || x.cfg.HostNetns == 0 {
		return false
	}
	theirs := owner.netns.sandbox.Load()
	return theirs != nil && theirs.inode == sb.inode &&
		cmp.Or(cmp.Compare(theirs.start, sb.start), cmp.Compare(theirs.pid, sb.pid)) <= 0 && x.stillSandbox(theirs)
}

// freshSandbox returns the pod's sandbox as it is now, nil if it cannot be told.
// The known one is kept while its process is what it was, whoever else is in the
// pod's cgroup by now; else the pod's processes are searched, at most once in
// walkSoon.
func (x *Index) freshSandbox(p *Pod) *sandbox {
	n := &p.netns
	n.mu.Lock()
	defer n.mu.Unlock()
	known := n.sandbox.Load()
	if known != nil {
		x.sandboxVerifies.Add(1)
		if x.stillSandbox(known) && !x.strays(p, known) {
			return known
		}
		x.setSandbox(p, nil)
	}
	now := x.cfg.Now()
	if !n.lastWalk.IsZero() && now.Sub(n.lastWalk) < walkSoon && now.Sub(n.lastWalk) >= 0 {
		return nil
	}
	n.lastWalk = now
	x.sandboxWalks.Add(1)
	found := x.findSandbox(p)
	if found != nil {
		x.setSandbox(p, found)
	}
	return found
}

// setSandbox changes what is known of a pod; nil: nothing.
func (x *Index) setSandbox(p *Pod, sb *sandbox) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if old := p.netns.sandbox.Load(); old != nil && x.byNetns[old.inode] == p {
		delete(x.byNetns, old.inode)
	}
	p.netns.sandbox.Store(sb)
	if sb != nil && !p.Ended() && !x.isHost(0, sb.inode) {
		x.byNetns[sb.inode] = p
	}
}

// learnSandboxes brings the table of all pods up to date, so that a namespace
// is known as another pod's before that pod has ever connected.
func (x *Index) learnSandboxes(ctx context.Context) {
	for _, p := range x.snapshot() {
		if ctx.Err() != nil {
			return
		}
		if !p.Ended() {
			x.freshSandbox(p)
		}
	}
}

func (x *Index) sandboxOwner(inode evidence.NetnsInode) *Pod {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return x.byNetns[inode]
}

// learnMissingPods adds the pods that no event has told of yet: on a busy node
// the news of a directory may come later than a connection from its namespace.
// It lists the tree at most once in walkSoon, or a pod with nested namespaces
// would cost that for each connection.
func (x *Index) learnMissingPods() {
	// Who waits here needs what the one before it finds.
	x.listing.Lock()
	defer x.listing.Unlock()
	now := x.cfg.Now()
	if since := now.Sub(x.listed); !x.listed.IsZero() && since >= 0 && since < walkSoon {
		return
	}
	x.listed = now
	listing, err := x.cfg.Root.List(x.cfg.Mount)
	if err != nil {
		// What is known stays, and the next scan says what is wrong.
		x.errors.Add(1)
		x.log.Debug("cannot list the pods for an unknown network namespace", "error", err)
		return
	}
	for _, ref := range listing.Pods {
		if x.lookup(ref.Path) == nil {
			x.observe(ref)
		}
	}
}

// settling is how long after its start a pod's sandbox is not relied on without
// a look: a runtime's first process is in the pod's cgroup before it enters the
// pod's namespace. It is longer than two rescans.
const settling = 30 * time.Second

// learnMissingSandboxes is learnSandboxes for the pods that have none in the
// table, or one that may have been read too early. There are few: those that
// started lately.
func (x *Index) learnMissingSandboxes() {
	now := x.cfg.Now()
	for _, p := range x.snapshot() {
		if p.netns.sandbox.Load() == nil || now.Sub(p.FirstSeen) < settling {
			x.freshSandbox(p)
		}
	}
}

// Bounds of a search. The sandbox lies directly below the pod's directory, and
// the search goes breadth first, so what a workload nests cannot hide it.
const (
	maxSandboxDirs   = 256  // directories
	maxSandboxProcs  = 1024 // processes
	maxProcsPerDir   = 256  // processes of one directory
	maxSandboxTries  = 8    // candidates, oldest first
	maxProcsFileSize = maxProcsPerDir * 12
)

// candidate is a process of a pod.
type candidate struct {
	pid   int
	start uint64
	dir   string
}

// findSandbox searches the oldest process in a pod's cgroup and reads its
// network namespace. Nil if no process can be seen: it has none yet, or the
// agent is in another pid namespace and every pid reads as 0.
func (x *Index) findSandbox(p *Pod) *sandbox {
	var procs []candidate
	queue := []string{p.Path}
	for dirs := 0; len(queue) > 0 && dirs < maxSandboxDirs && len(procs) < maxSandboxProcs; dirs++ {
		dir := queue[0]
		queue = queue[1:]
		// CRI-O's monitor is older than the sandbox and is in the host's
		// namespaces: it would make every pod look like hostNetwork.
		if x.cfg.Root.IsMonitor(dir) {
			continue
		}
		for _, pid := range x.readProcs(dir) {
			if start, err := x.startTime(pid); err == nil {
				procs = append(procs, candidate{pid, start, dir})
			}
		}
		entries, err := os.ReadDir(x.cfg.Mount.Join(dir))
		if err != nil {
			continue // removed meanwhile
		}
		for _, e := range entries {
			if e.IsDir() && len(queue) < maxSandboxDirs {
				queue = append(queue, dir+"/"+e.Name())
			}
		}
	}
	slices.SortFunc(procs, func(a, b candidate) int {
		return cmp.Or(cmp.Compare(a.start, b.start), cmp.Compare(a.pid, b.pid))
	})
	for _, c := range procs[:min(len(procs), maxSandboxTries)] {
		if sb := x.sandboxOf(c); sb != nil && !x.strays(p, sb) {
			return sb
		}
	}
	return nil
}

// sandboxOf reads a candidate's network namespace. The pid may have become
// another process's since it was read from the cgroup. If it is in the cgroup
// now, and as old as it was, it was the same process throughout.
func (x *Index) sandboxOf(c candidate) *sandbox {
	inode, err := readNetns(x.procDir(c.pid))
	if err != nil {
		return nil // a zombie has none
	}
	sb := &sandbox{pid: c.pid, start: c.start, inode: inode}
	if !slices.Contains(x.readProcs(c.dir), c.pid) || !x.stillSandbox(sb) {
		return nil
	}
	return sb
}

// stillSandbox says whether a process is still the one it was, in the namespace
// it was in.
func (x *Index) stillSandbox(sb *sandbox) bool {
	inode, err := readNetns(x.procDir(sb.pid))
	if err != nil || inode != sb.inode {
		return false
	}
	start, err := x.startTime(sb.pid)
	return err == nil && start == sb.start
}

func (x *Index) procDir(pid int) string { return filepath.Join(x.cfg.ProcFS, strconv.Itoa(pid)) }

// readProcs returns the first processes of a cgroup that this pid namespace can
// name. A threaded cgroup refuses; its processes are those of a parent's.
func (x *Index) readProcs(dir string) []int {
	f, err := os.Open(x.cfg.Mount.Join(dir) + "/cgroup.procs")
	if err != nil {
		return nil
	}
	defer f.Close()
	buf := make([]byte, maxProcsFileSize)
	size := 0
	for size < len(buf) {
		// The kernel gives one page at a time.
		n, err := f.Read(buf[size:])
		size += n
		if err != nil || n == 0 {
			break
		}
	}
	text := string(buf[:size])
	if size == len(buf) {
		// Cut off: the last line may be half a number.
		text = text[:strings.LastIndexByte(text, '\n')+1]
	}
	var pids []int
	for line := range strings.SplitSeq(text, "\n") {
		if pid, err := strconv.Atoi(line); err == nil && pid > 0 {
			pids = append(pids, pid)
			if len(pids) == maxProcsPerDir {
				break
			}
		}
	}
	return pids
}

// errStat: a stat file does not have the form of proc(5).
var errStat = errors.New("malformed stat file")

func (x *Index) startTime(pid int) (uint64, error) {
	data, err := os.ReadFile(filepath.Join(x.procDir(pid), "stat"))
	if err != nil {
		return 0, err
	}
	return parseStartTime(string(data))
}

// parseStartTime reads field 22 of /proc/PID/stat, in clock ticks since boot.
// Field 2 is the process's name, which the process chooses, with blanks and
// parentheses as it likes: the last parenthesis ends it.
func parseStartTime(stat string) (uint64, error) {
	end := strings.LastIndexByte(stat, ')')
	if end < 0 {
		return 0, errStat
	}
	fields := strings.Fields(stat[end+1:])
	const startTime = 22 - 3 // the first of these is field 3
	if len(fields) <= startTime {
		return 0, errStat
	}
	start, err := strconv.ParseUint(fields[startTime], 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%w: start time: %w", errStat, err)
	}
	return start, nil
}

// readNetns reads the inode of a process's network namespace, "net:[INODE]".
func readNetns(procDir string) (evidence.NetnsInode, error) {
	link, err := os.Readlink(procDir + "/ns/net")
	if err != nil {
		return 0, err
	}
	return parseNetns(link)
}

// errNetns: a ns/net link does not have the form of namespaces(7).
var errNetns = errors.New("malformed namespace link")

func parseNetns(link string) (evidence.NetnsInode, error) {
	number, ok := strings.CutPrefix(link, "net:[")
	if ok {
		number, ok = strings.CutSuffix(number, "]")
	}
	inode, err := strconv.ParseUint(number, 10, 32)
	if !ok || err != nil || inode == 0 {
		return 0, fmt.Errorf("%w: %q", errNetns, link)
	}
	return evidence.NetnsInode(inode), nil
}
