// SPDX-License-Identifier: Apache-2.0

//go:build linux

package testnode

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// Reasons why no node can be made here. Their texts say what to do.
var (
	// ErrNotRoot: namespaces, cgroups and mounts need root.
	ErrNotRoot = errors.New("a test node needs root: run it with sudo")
	// ErrNoMain: the program does not call Main, so it cannot be executed
	// again as a pod's process.
	ErrNoMain = errors.New("testnode.Main must be the first call of main or TestMain")
	// ErrClosed: the node, or the pod, has been closed.
	ErrClosed = errors.New("closed")
)

// closeTimeout bounds how long Close waits for processes to be gone. Killed
// processes end in milliseconds unless the machine is stuck.
const closeTimeout = 30 * time.Second

// Driver says how the kubelet's cgroups are named.
type Driver string

// The kubelet's two cgroup drivers.
const (
	// DriverCgroupfs names them kubepods/burstable/pod<uid>/<container id>.
	DriverCgroupfs Driver = "cgroupfs"
	// DriverSystemd names them
	// kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod<uid>.slice/cri-containerd-<container id>.scope,
	// with the uid's dashes as underscores, as on EKS. No systemd is needed.
	DriverSystemd Driver = "systemd"
)

// Config says what node to make. The zero value is a good one.
type Config struct {
	// Driver is how cgroups are named. Empty: DriverCgroupfs.
	Driver Driver
	// ScopePrefix is what DriverSystemd puts before a container id: the
	// runtime's name. Empty: "cri-containerd"; CRI-O has "crio".
	ScopePrefix string
	// NoBridge leaves out the pod network; pods then have only lo, unless
	// they are HostNetwork.
	NoBridge bool
	// Dir is where the node's own directory is made. Empty: os.TempDir().
	Dir string
	// Logger gets what cannot be returned, such as a failure of Sweep.
	// Nil: discarded.
	Logger *slog.Logger
}

func (c Config) withDefaults() (Config, error) {
	switch c.Driver {
	case "":
		c.Driver = DriverCgroupfs
	case DriverCgroupfs, DriverSystemd:
	default:
		return c, fmt.Errorf("unknown cgroup driver %q", c.Driver)
	}
	if c.ScopePrefix == "" {
		c.ScopePrefix = "cri-containerd"
	}
	if c.Dir == "" {
		c.Dir = os.TempDir()
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c, nil
}

// Node is one node. Its methods may be called from any goroutine.
type Node struct {
	cfg        Config
	name       string
	mountPoint string // of cgroup2
	root       string // absolute
	dir        string
	netns      *Netns
	watchdog   *watchdog

	// Held for the node's life: they tell Sweep that it is in use.
	locks []*os.File

	mu         sync.Mutex
	closed     bool
	joinedFrom string // absolute cgroup this process was in before Join
	pods       map[*Pod]struct{}
	spaces     []*Netns
	addresses  map[netip.Addr]bool
	lastHost   int
	veths      int
}

// New makes a node. It needs root, cgroup v2, IPv6, veth and bridge, and that
// [Main] ran before. Close it when done; ctx bounds only the making.
func New(ctx context.Context, cfg Config) (*Node, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	if os.Geteuid() != 0 {
		return nil, ErrNotRoot
	}
	if _, again := os.LookupEnv(actionEnv); again {
		// Main would have taken it out. Going on would start programs that
		// start programs without end.
		return nil, ErrNoMain
	}
	mountPoint, err := Cgroup2Mount()
	if err != nil {
		return nil, err
	}
	if _, err := Sweep(ctx, cfg); err != nil {
		cfg.Logger.LogAttrs(ctx, slog.LevelWarn, "sweeping left-over test nodes failed", slog.Any("error", err))
	}
	n := &Node{
		cfg:        cfg,
		mountPoint: mountPoint,
		pods:       make(map[*Pod]struct{}),
		addresses:  map[netip.Addr]bool{bridgeIPv4().Addr(): true, bridgeIPv6().Addr(): true},
	}
	if err := n.build(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("making a test node: %w", err), n.Close())
	}
	return n, nil
}

func (n *Node) build(ctx context.Context) error {
	if err := n.claim(); err != nil {
		return err
	}
	// Before anything that outlives this process by itself.
	var err error
	if n.watchdog, err = startWatchdog(ctx, watchdogArgs{Root: n.root, Dir: n.dir}); err != nil {
		return err
	}
	for _, dir := range append(n.qosDirs(), n.agentDir(), n.hostDir()) {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("making cgroup: %w", err)
		}
	}
	if err := os.Mkdir(n.BPFFS(), 0o700); err != nil {
		return fmt.Errorf("making the node's directory: %w", err)
	}
	if err := os.Mkdir(filepath.Join(n.dir, "pods"), 0o755); err != nil {
		return fmt.Errorf("making the node's directory: %w", err)
	}
	if err := mountBPFFS(n.BPFFS()); err != nil {
		return err
	}
	if n.netns, err = n.newNetns(n.name); err != nil {
		return err
	}
	if n.cfg.NoBridge {
		return nil
	}
	return n.netns.Do(addBridge)
}

// claim finds a free name and makes the two directories that bear it.
func (n *Node) claim() error {
	for i := range 1000 {
		name := fmt.Sprintf("%s%d-%d", namePrefix, os.Getpid(), i)
		root, dir := filepath.Join(n.mountPoint, name), filepath.Join(n.cfg.Dir, name)
		err := os.Mkdir(root, 0o755)
		if errors.Is(err, fs.ErrExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("making the node's cgroup: %w", err)
		}
		n.root = root
		// 0711: a process of another user reaches its pod's directory, but
		// cannot list the others. Mkdir fails on whatever is there already, so
		// nobody can prepare a link at this name.
		err = os.Mkdir(dir, 0o711)
		if errors.Is(err, fs.ErrExist) {
			if err := os.Remove(root); err != nil {
				return fmt.Errorf("removing cgroup: %w", err)
			}
			n.root = ""
			continue
		}
		if err != nil {
			return fmt.Errorf("making the node's directory: %w", err)
		}
		n.dir, n.name = dir, name
		for _, d := range []string{root, dir} {
			lock, err := lockDir(d)
			if err != nil {
				return fmt.Errorf("locking the node's directory: %w", err)
			}
			n.locks = append(n.locks, lock)
		}
		return nil
	}
	return fmt.Errorf("no free name %s%d-N in %s and %s", namePrefix, os.Getpid(), n.mountPoint, n.cfg.Dir)
}

func (n *Node) newNetns(name string) (*Netns, error) {
	ns, err := newNetns(name)
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return nil, errors.Join(fmt.Errorf("node %s: %w", n.name, ErrClosed), ns.close())
	}
	n.spaces = append(n.spaces, ns)
	return ns, nil
}

func (n *Node) vethName() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.veths++
	return fmt.Sprintf("veth%d", n.veths)
}

// Name is the node's name, latchkey-node-<pid>-<n>.
func (n *Node) Name() string { return n.name }

// Dir is the node's own directory. It is removed by Close.
func (n *Node) Dir() string { return n.dir }

// BPFFS is a bpffs mount for this node's pins alone.
func (n *Node) BPFFS() string { return filepath.Join(n.dir, "bpf") }

// Cgroup2Mount is where cgroup v2 is mounted.
func (n *Node) Cgroup2Mount() string { return n.mountPoint }

// CgroupRoot is the absolute path of the node's topmost cgroup, to which
// programs are attached: they then see this node's processes only.
func (n *Node) CgroupRoot() string { return n.root }

// KubepodsRoot is the absolute path of the cgroup that holds all pods.
func (n *Node) KubepodsRoot() string {
	if n.cfg.Driver == DriverSystemd {
		return filepath.Join(n.root, "kubepods.slice")
	}
	return filepath.Join(n.root, "kubepods")
}

func (n *Node) agentDir() string {
	if n.cfg.Driver == DriverSystemd {
		return filepath.Join(n.root, "system.slice", "agent.service")
	}
	return filepath.Join(n.root, "system", "agent")
}

func (n *Node) hostDir() string {
	if n.cfg.Driver == DriverSystemd {
		return filepath.Join(n.root, "system.slice", "host.service")
	}
	return filepath.Join(n.root, "system", "host")
}

// qosDirs are the cgroups that hold the pods of each class, as a kubelet makes
// them at its start.
func (n *Node) qosDirs() []string {
	return []string{n.qosDir(Guaranteed), n.qosDir(Burstable), n.qosDir(BestEffort)}
}

func (n *Node) qosDir(qos QoS) string {
	switch {
	case qos == Guaranteed:
		return n.KubepodsRoot()
	case n.cfg.Driver == DriverSystemd:
		return filepath.Join(n.KubepodsRoot(), "kubepods-"+string(qos)+".slice")
	}
	return filepath.Join(n.KubepodsRoot(), string(qos))
}

func (n *Node) relative(dir string) string {
	return strings.TrimPrefix(dir, n.mountPoint)
}

// Netns is the node's network namespace.
func (n *Node) Netns() *Netns { return n.netns }

// NetnsFD is the descriptor of the node's network namespace. Do not close it.
func (n *Node) NetnsFD() int { return n.netns.FD() }

// Do runs f on a thread that is in the node's network namespace: see
// [Netns.Do]. The sockets which f opens are in this process's cgroup: see
// [Node.Join].
func (n *Node) Do(f func() error) error { return n.netns.Do(f) }

// AgentPlace is where the node's agent runs: the node's network namespace and
// a system cgroup, outside every pod.
func (n *Node) AgentPlace() Place {
	return Place{node: n, name: "agent", base: n.agentDir(), dir: n.agentDir(), netns: n.netns, home: n.dir}
}

// HostPlace is any other process of the node, outside every pod.
func (n *Node) HostPlace() Place {
	return Place{node: n, name: "host", base: n.hostDir(), dir: n.hostDir(), netns: n.netns, home: n.dir}
}

// HostCommand prepares a program that runs outside every pod: see
// [Place.Command].
func (n *Node) HostCommand(ctx context.Context, argv ...string) *Cmd {
	return n.HostPlace().Command(ctx, argv...)
}

// Join moves this whole process into the agent's cgroup, so that the sockets
// which it opens from now on belong to the node. Leave or Close move it back.
func (n *Node) Join() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return fmt.Errorf("joining node %s: %w", n.name, ErrClosed)
	}
	if n.joinedFrom != "" {
		return nil
	}
	own, err := ownCgroup()
	if err != nil {
		return err
	}
	if err := moveProcess(n.agentDir(), os.Getpid()); err != nil {
		return err
	}
	n.joinedFrom = filepath.Join(n.mountPoint, own)
	return nil
}

// Leave undoes Join.
func (n *Node) Leave() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.joinedFrom == "" {
		return nil
	}
	if err := moveProcess(n.joinedFrom, os.Getpid()); err != nil {
		return err
	}
	n.joinedFrom = ""
	return nil
}

// Pods lists the node's pods that have not been deleted, in no order.
func (n *Node) Pods() []*Pod {
	n.mu.Lock()
	defer n.mu.Unlock()
	pods := make([]*Pod, 0, len(n.pods))
	for p := range n.pods {
		pods = append(pods, p)
	}
	return pods
}

// Close ends every process of the node and removes everything it made. It may
// be called twice. If it fails, what could not be removed is left to [Sweep].
func (n *Node) Close() error {
	n.mu.Lock()
	if n.closed {
		n.mu.Unlock()
		return nil
	}
	n.closed = true
	n.mu.Unlock()

	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	var errs []error
	// First, or the kill would be ours.
	errs = append(errs, n.Leave())
	if n.root != "" {
		errs = append(errs, removeCgroup(ctx, n.root))
	}
	for _, p := range n.Pods() {
		p.reap()
	}
	for _, ns := range n.spaces {
		errs = append(errs, ns.close())
	}
	if n.dir != "" {
		errs = append(errs, removeDir(n.dir))
	}
	for _, lock := range n.locks {
		errs = append(errs, lock.Close())
	}
	if n.watchdog != nil {
		errs = append(errs, n.watchdog.dismiss())
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("closing node %s: %w", n.name, err)
	}
	return nil
}
