// SPDX-License-Identifier: Apache-2.0

//go:build linux

package testnode

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

// QoS is a pod's quality-of-service class, which decides where its cgroup is.
type QoS string

// The three classes of Kubernetes.
const (
	Burstable  QoS = "burstable"
	BestEffort QoS = "besteffort"
	Guaranteed QoS = "guaranteed" // directly below kubepods
)

// tokenName is the file that the pod-identity webhook mounts.
const tokenName = "eks-pod-identity-token"

// PodConfig says what pod to make. Only Name is needed.
type PodConfig struct {
	// Name, Namespace (empty: "default") and ServiceAccount (empty:
	// "default") are Kubernetes' names; the node uses them in messages only.
	Name           string
	Namespace      string
	ServiceAccount string
	// UID is metadata.uid. Empty: random.
	UID evidence.PodUID
	// QoS is the class. Empty: Burstable.
	QoS QoS
	// HostNetwork pods share the node's network namespace.
	HostNetwork bool
	// IPv4 and IPv6 ask for addresses in the bridge's networks. Zero: the
	// next free ones. Ignored for HostNetwork.
	IPv4, IPv6 netip.Addr
	// Containers is how many there are besides the sandbox. 0: one.
	Containers int
	// Env is added to every process's environment.
	Env []string
	// NoPause leaves out the pause process; the network namespace is held by
	// this process anyway. For tests with very many pods.
	NoPause bool
}

// Container is one container's cgroup.
type Container struct {
	// ID is the runtime's: 64 hexadecimal digits.
	ID string
	// Dir is the absolute path of its cgroup.
	Dir string
}

// Pod is one pod of a node.
type Pod struct {
	// Name, Namespace, ServiceAccount, UID, QoS and HostNetwork are as
	// configured, or the defaults.
	Name           string
	Namespace      string
	ServiceAccount string
	UID            evidence.PodUID
	QoS            QoS
	HostNetwork    bool
	// IPv4 and IPv6 are its addresses; invalid for HostNetwork pods and on a
	// node without a bridge.
	IPv4, IPv6 netip.Addr

	node       *Node
	dir        string // absolute cgroup
	home       string
	netns      *Netns
	veth       string
	env        []string
	sandbox    Container
	containers []Container
	pause      *Proc

	mu      sync.Mutex
	deleted bool
}

// AddPod makes a pod: cgroups for it, its sandbox and its containers, a
// network namespace on the bridge, a pause process in the sandbox, and a
// directory for its token. The pod is up when AddPod returns.
func (n *Node) AddPod(ctx context.Context, cfg PodConfig) (*Pod, error) {
	p := &Pod{
		Name:           cfg.Name,
		Namespace:      cfg.Namespace,
		ServiceAccount: cfg.ServiceAccount,
		UID:            cfg.UID,
		QoS:            cfg.QoS,
		HostNetwork:    cfg.HostNetwork,
		node:           n,
		env:            cfg.Env,
	}
	if p.Name == "" {
		return nil, errors.New("adding a pod: it has no name")
	}
	if p.Namespace == "" {
		p.Namespace = "default"
	}
	if p.ServiceAccount == "" {
		p.ServiceAccount = "default"
	}
	if p.UID == "" {
		p.UID = randomUID()
	}
	if strings.ContainsAny(string(p.UID), "/.") {
		return nil, fmt.Errorf("adding pod %s: uid %q is not a file name", p.Name, p.UID)
	}
	switch p.QoS {
	case "":
		p.QoS = Burstable
	case Burstable, BestEffort, Guaranteed:
	default:
		return nil, fmt.Errorf("adding pod %s: unknown QoS class %q", p.Name, p.QoS)
	}
	n.mu.Lock()
	closed := n.closed
	n.mu.Unlock()
	if closed {
		return nil, fmt.Errorf("adding pod %s: node %s: %w", p.Name, n.name, ErrClosed)
	}
	p.dir = filepath.Join(n.qosDir(p.QoS), n.podDirName(p.QoS, p.UID))
	p.home = filepath.Join(n.dir, "pods", string(p.UID))
	// Mkdir, not MkdirAll: a second pod of that UID must fail before anything
	// of the first one's is touched.
	if err := os.Mkdir(p.dir, 0o755); err != nil {
		return nil, fmt.Errorf("adding pod %s: making its cgroup: %w", p.Name, err)
	}
	n.mu.Lock()
	n.pods[p] = struct{}{}
	n.mu.Unlock()
	if err := p.build(ctx, cfg); err != nil {
		return nil, errors.Join(fmt.Errorf("adding pod %s: %w", p.Name, err), p.Delete(context.WithoutCancel(ctx)))
	}
	return p, nil
}

func (n *Node) podDirName(qos QoS, uid evidence.PodUID) string {
	if n.cfg.Driver != DriverSystemd {
		return "pod" + string(uid)
	}
	class := ""
	if qos != Guaranteed {
		class = string(qos) + "-"
	}
	// In slice names a dash separates levels.
	return "kubepods-" + class + "pod" + strings.ReplaceAll(string(uid), "-", "_") + ".slice"
}

func (p *Pod) newContainer() (Container, error) {
	id := make([]byte, 32)
	rand.Read(id)
	c := Container{ID: hex.EncodeToString(id)}
	name := c.ID
	if p.node.cfg.Driver == DriverSystemd {
		name = p.node.cfg.ScopePrefix + "-" + c.ID + ".scope"
	}
	c.Dir = filepath.Join(p.dir, name)
	if err := os.Mkdir(c.Dir, 0o755); err != nil {
		return c, fmt.Errorf("making a container's cgroup: %w", err)
	}
	return c, nil
}

func (p *Pod) build(ctx context.Context, cfg PodConfig) error {
	var err error
	if p.sandbox, err = p.newContainer(); err != nil {
		return err
	}
	for range max(cfg.Containers, 1) {
		c, err := p.newContainer()
		if err != nil {
			return err
		}
		p.containers = append(p.containers, c)
	}
	// 0755, and token files 0644: containers run as any user.
	if err := os.MkdirAll(p.tokenDir(), 0o755); err != nil {
		return fmt.Errorf("making its directory: %w", err)
	}
	if err := p.connect(cfg); err != nil {
		return err
	}
	if cfg.NoPause {
		return nil
	}
	if p.pause, err = p.SandboxPlace().Spawn(ctx); err != nil {
		return fmt.Errorf("starting the pause process: %w", err)
	}
	return nil
}

func (p *Pod) connect(cfg PodConfig) error {
	if p.HostNetwork {
		p.netns = p.node.netns
		return nil
	}
	ns, err := p.node.newNetns(p.Name)
	if err != nil {
		return err
	}
	p.netns = ns
	if p.node.cfg.NoBridge {
		return nil
	}
	v4, v6, err := p.node.allocate(cfg.IPv4, cfg.IPv6)
	if err != nil {
		return err // nothing taken, so nothing for Delete to give back
	}
	p.IPv4, p.IPv6 = v4, v6
	p.veth = p.node.vethName()
	if err := p.node.addVeth(p.veth, ns, true); err != nil {
		return err
	}
	gateway4, gateway6 := p.node.Gateways()
	return setUpEth0(ns, []netip.Prefix{
		netip.PrefixFrom(p.IPv4, bridgeIPv4().Bits()),
		netip.PrefixFrom(p.IPv6, bridgeIPv6().Bits()),
	}, []netip.Addr{gateway4, gateway6})
}

// randomUID makes a version 4 UUID (RFC 9562).
func randomUID() evidence.PodUID {
	b := make([]byte, 16)
	rand.Read(b)
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return evidence.PodUID(fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:]))
}

// CgroupDir is the absolute path of the pod's cgroup.
func (p *Pod) CgroupDir() string { return p.dir }

// CgroupPath is the same relative to the cgroup2 mount, as the beginning of
// what /proc/PID/cgroup shows.
func (p *Pod) CgroupPath() string { return p.node.relative(p.dir) }

// Containers are the pod's containers, without the sandbox.
func (p *Pod) Containers() []Container { return append([]Container(nil), p.containers...) }

// Sandbox is the container of the pause process.
func (p *Pod) Sandbox() Container { return p.sandbox }

// Netns is the pod's network namespace; the node's for HostNetwork pods.
func (p *Pod) Netns() *Netns { return p.netns }

// Dir is a directory of the pod's own, readable by every user.
func (p *Pod) Dir() string { return p.home }

func (p *Pod) tokenDir() string { return filepath.Join(p.home, "serviceaccount") }

// TokenFile is where WriteToken writes and where AWSEnv points to.
func (p *Pod) TokenFile() string { return filepath.Join(p.tokenDir(), tokenName) }

// WriteToken puts a token into the pod's token file, replacing the old one at
// once, as the kubelet does when it rotates.
func (p *Pod) WriteToken(token string) error {
	next := p.TokenFile() + ".next"
	if err := os.WriteFile(next, []byte(token), 0o644); err != nil {
		return fmt.Errorf("writing the token of pod %s: %w", p.Name, err)
	}
	if err := os.Rename(next, p.TokenFile()); err != nil {
		return fmt.Errorf("writing the token of pod %s: %w", p.Name, err)
	}
	return nil
}

// AWSEnv are the variables that the pod-identity webhook injects, for
// [Place.WithEnv]. An empty uri is the well-known IPv4 address. The instance
// metadata service, which comes next in the SDKs' chain, is turned off: there
// is none to wait for.
func (p *Pod) AWSEnv(uri string) []string {
	if uri == "" {
		uri = "http://169.254.170.23/v1/credentials"
	}
	return []string{
		"AWS_CONTAINER_CREDENTIALS_FULL_URI=" + uri,
		"AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE=" + p.TokenFile(),
		"AWS_EC2_METADATA_DISABLED=true",
		"AWS_REGION=us-west-2",
	}
}

func (p *Pod) place(c Container) Place {
	return Place{node: p.node, name: "pod " + p.Name, base: c.Dir, dir: c.Dir, netns: p.netns, home: p.home, env: p.env}
}

// Place is the pod's first container.
func (p *Pod) Place() Place { return p.place(p.containers[0]) }

// In is the pod's container number i, from 0. Using the place of a container
// that the pod does not have is an error.
func (p *Pod) In(i int) Place {
	if i < 0 || i >= len(p.containers) {
		place := p.Place()
		place.err = fmt.Errorf("the pod has no container %d", i)
		return place
	}
	return p.place(p.containers[i])
}

// SandboxPlace is the container of the pause process.
func (p *Pod) SandboxPlace() Place { return p.place(p.sandbox) }

// Command is [Place.Command] in the pod's first container.
func (p *Pod) Command(ctx context.Context, argv ...string) *Cmd {
	return p.Place().Command(ctx, argv...)
}

// Exec is [Place.Exec] in the pod's first container.
func (p *Pod) Exec(ctx context.Context, argv ...string) ([]byte, error) {
	return p.Place().Exec(ctx, argv...)
}

// Call is [Place.Call] in the pod's first container.
func (p *Pod) Call(ctx context.Context, action string, args, result any) error {
	return p.Place().Call(ctx, action, args, result)
}

// Spawn is [Place.Spawn] in the pod's first container.
func (p *Pod) Spawn(ctx context.Context) (*Proc, error) { return p.Place().Spawn(ctx) }

// Delete ends the pod as a kubelet does: kills its processes, removes its
// cgroups, its network namespace, its addresses and its directory. A second
// call does nothing. Connections that somebody outside the pod holds (a passed
// descriptor, a process moved away) stay open, but lose their network: see
// DeleteKeepingNetns.
func (p *Pod) Delete(ctx context.Context) error { return p.delete(ctx, false) }

// DeleteKeepingNetns is Delete without removing the network namespace and its
// veth, which live on until the node closes. A connection that the pod opened
// and that somebody else holds still works then.
func (p *Pod) DeleteKeepingNetns(ctx context.Context) error { return p.delete(ctx, true) }

func (p *Pod) delete(ctx context.Context, keepNetns bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.deleted {
		return nil
	}
	var errs []error
	if err := removeCgroup(ctx, p.dir); err != nil {
		// Still there: may be tried again.
		return fmt.Errorf("deleting pod %s: %w", p.Name, err)
	}
	p.deleted = true
	p.reap()
	if !keepNetns {
		if p.veth != "" {
			errs = append(errs, p.node.delVeth(p.veth))
		}
		if p.netns != nil && !p.HostNetwork {
			errs = append(errs, p.netns.close())
		}
		p.node.release(p.IPv4, p.IPv6)
	}
	if err := os.RemoveAll(p.home); err != nil && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, fmt.Errorf("removing its directory: %w", err))
	}
	p.node.mu.Lock()
	delete(p.node.pods, p)
	p.node.mu.Unlock()
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("deleting pod %s: %w", p.Name, err)
	}
	return nil
}

// reap waits for the killed pause process, so that no zombie stays.
func (p *Pod) reap() {
	if p.pause != nil {
		p.pause.Kill()
	}
}
