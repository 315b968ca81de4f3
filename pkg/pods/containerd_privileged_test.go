// SPDX-License-Identifier: Apache-2.0

//go:build privileged

package pods

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/latchkey-dev/latchkey/pkg/cgroup"
	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

// criNode is containerd and runc in mount, pid and network namespaces of their
// own, with the test in the kubelet's part.
type criNode struct {
	t      *testing.T
	dir    string // of sockets and state, the same inside and outside
	top    string // cgroup of all of it, in every hierarchy
	mount  cgroup.Mount
	init   int // pid of the first process inside
	rt     cri.RuntimeServiceClient
	images string
}

// The first process of the node. containerd may end and come back; its shims,
// and with them the containers, stay until this process is killed.
const nodeScript = `
set -eu
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
mkdir -p /run/netns
mount --bind "$DIR/cni" /var/lib/cni 2>/dev/null || { mkdir -p /var/lib/cni; mount --bind "$DIR/cni" /var/lib/cni; }
ip link set lo up
while :; do
	while [ ! -e "$DIR/up" ]; do sleep 0.05; done
	containerd -c "$DIR/config.toml" >>"$DIR/log" 2>&1 || true
	echo ended >>"$DIR/log"
done
`

const nodeConfig = `
version = 2
root = "%[1]s/root"
state = "/run/containerd"
oom_score = 0
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.aufs"]
[grpc]
  address = "%[1]s/c.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:test"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "%[2]s"
    conf_dir = "%[1]s/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "native"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
`

const nodeNetwork = `{"cniVersion": "0.4.0", "name": "test", "plugins": [
	{"type": "ptp", "ipam": {"type": "host-local", "dataDir": "%s/ipam", "subnet": "10.99.0.0/24"}}
]}`

// pluginDir is where Debian's containernetworking-plugins are, or others'.
func pluginDir(t *testing.T) string {
	t.Helper()
	for _, dir := range []string{"/usr/lib/cni", "/opt/cni/bin", "/usr/libexec/cni"} {
		if _, err := os.Stat(dir + "/ptp"); err == nil {
			return dir
		}
	}
	t.Fatal("no CNI plugins: install containernetworking-plugins (scripts/setup does)")
	return ""
}

func newCRINode(t *testing.T) *criNode {
	t.Helper()
	for _, tool := range []string{"containerd", "runc", "ctr", "gcc", "ip"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Fatalf("%v (scripts/setup installs it)", err)
		}
	}
	m, err := cgroup.FindMount("")
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "lk-cri")
	if err != nil {
		t.Fatal(err)
	}
	n := &criNode{t: t, dir: dir, mount: m, top: fmt.Sprintf("/latchkey-test-%d-cri", os.Getpid())}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(n.removeCgroups)
	n.write("config.toml", fmt.Sprintf(nodeConfig, dir, pluginDir(t)))
	if err := os.MkdirAll(dir+"/net.d", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(dir+"/cni", 0o700); err != nil {
		t.Fatal(err)
	}
	n.write("net.d/10-test.conflist", fmt.Sprintf(nodeNetwork, dir))
	n.image()

	if err := os.MkdirAll(m.Join(n.top+"/system"), 0o755); err != nil {
		t.Fatal(err)
	}
	cg, err := os.Open(m.Join(n.top + "/system"))
	if err != nil {
		t.Fatal(err)
	}
	defer cg.Close()
	cmd := exec.Command("sh", "-c", nodeScript)
	cmd.Env = append(os.Environ(), "DIR="+dir)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.SysProcAttr = &syscall.SysProcAttr{
		// Unsharing, not cloning, the mount namespace makes Go turn off
		// propagation first.
		Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNET, Unshareflags: unix.CLONE_NEWNS,
		UseCgroupFD: true, CgroupFD: int(cg.Fd()), Pdeathsig: syscall.SIGKILL,
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	n.init = cmd.Process.Pid
	t.Cleanup(func() {
		// The first process of a pid namespace takes all others with it.
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			log, _ := os.ReadFile(dir + "/log")
			t.Logf("node: %s\ncontainerd:\n%s", out.String(), log[max(0, len(log)-8<<10):])
		}
	})
	conn, err := grpc.NewClient("unix://"+dir+"/c.sock", grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	n.rt = cri.NewRuntimeServiceClient(conn)
	n.up()
	n.ctr("-n", "k8s.io", "images", "import", n.images)
	return n
}

func (n *criNode) write(name, data string) {
	n.t.Helper()
	if err := os.WriteFile(filepath.Join(n.dir, name), []byte(data), 0o600); err != nil {
		n.t.Fatal(err)
	}
}

// ctx bounds what waits for containerd, which on a busy machine takes its time.
func (n *criNode) ctx() context.Context {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(n.t.Context()), 2*time.Minute)
	n.t.Cleanup(cancel)
	return ctx
}

func (n *criNode) ctr(args ...string) {
	n.t.Helper()
	out, err := exec.CommandContext(n.ctx(), "ctr", append([]string{"-a", n.dir + "/c.sock"}, args...)...).CombinedOutput()
	if err != nil {
		n.t.Fatalf("ctr %v: %v: %s", args, err, out)
	}
}

// wait is for what containerd and runc do.
func (n *criNode) wait(what string, cond func() bool) {
	n.t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); !cond(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			n.t.Fatalf("never happened: %s", what)
		}
	}
}

func (n *criNode) up() {
	n.t.Helper()
	n.write("up", "")
	n.wait("containerd answers", func() bool {
		ctx, cancel := context.WithTimeout(n.ctx(), 5*time.Second)
		defer cancel()
		r, err := n.rt.Status(ctx, &cri.StatusRequest{})
		if err != nil {
			return false
		}
		for _, c := range r.GetStatus().GetConditions() {
			if !c.GetStatus() {
				return false
			}
		}
		return true
	})
}

// down ends containerd, not its containers.
func (n *criNode) down() {
	n.t.Helper()
	if err := os.Remove(n.dir + "/up"); err != nil {
		n.t.Fatal(err)
	}
	children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", n.init, n.init))
	if err != nil {
		n.t.Fatal(err)
	}
	killed := false
	for pid := range strings.FieldsSeq(string(children)) {
		var p int
		if _, err := fmt.Sscan(pid, &p); err != nil {
			n.t.Fatal(err)
		}
		// Shims were given to this process too.
		if comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", p)); err == nil && strings.TrimSpace(string(comm)) == "containerd" {
			if err := unix.Kill(p, unix.SIGKILL); err != nil {
				n.t.Fatal(err)
			}
			killed = true
		}
	}
	if !killed {
		n.t.Fatalf("no containerd among %q", children)
	}
	n.wait("containerd to end", func() bool {
		log, err := os.ReadFile(n.dir + "/log")
		return err == nil && bytes.HasSuffix(log, []byte("ended\n"))
	})
}

// image makes an archive with one static program that waits, as `docker save`
// would.
func (n *criNode) image() {
	n.t.Helper()
	bin := n.dir + "/pause"
	cc := exec.Command("gcc", "-static", "-Os", "-o", bin, "-x", "c", "-")
	cc.Stdin = strings.NewReader("#include <unistd.h>\nint main(void) { for (;;) pause(); }\n")
	if out, err := cc.CombinedOutput(); err != nil {
		n.t.Fatalf("gcc: %v: %s", err, out)
	}
	program, err := os.ReadFile(bin)
	if err != nil {
		n.t.Fatal(err)
	}
	archive := func(files ...any) []byte {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for i := 0; i < len(files); i += 2 {
			data := files[i+1].([]byte)
			if err := w.WriteHeader(&tar.Header{Name: files[i].(string), Mode: 0o755, Size: int64(len(data)), Typeflag: tar.TypeReg}); err != nil {
				n.t.Fatal(err)
			}
			if _, err := w.Write(data); err != nil {
				n.t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			n.t.Fatal(err)
		}
		return b.Bytes()
	}
	layer := archive("pause", program)
	config := fmt.Appendf(nil, `{"architecture":"amd64","os":"linux","config":{"Entrypoint":["/pause"]},"rootfs":{"type":"layers","diff_ids":["sha256:%x"]}}`, sha256.Sum256(layer))
	manifest := []byte(`[{"Config":"config.json","RepoTags":["localhost/pause:test"],"Layers":["layer.tar"]}]`)
	n.images = n.dir + "/image.tar"
	if err := os.WriteFile(n.images, archive("manifest.json", manifest, "config.json", config, "layer.tar", layer), 0o600); err != nil {
		n.t.Fatal(err)
	}
}

// criPod is a pod as the kubelet asks for it.
type criPod struct {
	n          *criNode
	uid        evidence.PodUID
	config     *cri.PodSandboxConfig
	sandbox    string
	containers map[string]string // name to id
}

func (n *criNode) pod(uid evidence.PodUID, name string, hostNetwork bool, labels map[string]string) *criPod {
	n.t.Helper()
	all := kubeLabels(uid, name)
	for k, v := range labels {
		all[k] = v
	}
	linux := &cri.LinuxPodSandboxConfig{CgroupParent: n.top + "/kubepods/burstable/pod" + string(uid)}
	if hostNetwork {
		linux.SecurityContext = &cri.LinuxSandboxSecurityContext{NamespaceOptions: &cri.NamespaceOption{Network: cri.NamespaceMode_NODE}}
	}
	p := &criPod{n: n, uid: uid, containers: make(map[string]string), config: &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: name, Namespace: "shop", Uid: string(uid)},
		LogDirectory: n.dir, Labels: all, Linux: linux,
	}}
	r, err := n.rt.RunPodSandbox(n.ctx(), &cri.RunPodSandboxRequest{Config: p.config})
	if err != nil {
		n.t.Fatal("sandbox: ", err)
	}
	p.sandbox = r.GetPodSandboxId()
	return p
}

func (p *criPod) container(name string) string {
	t := p.n.t
	t.Helper()
	labels := kubeLabels(p.uid, p.config.GetMetadata().GetName())
	labels[labelContainerName] = name
	r, err := p.n.rt.CreateContainer(p.n.ctx(), &cri.CreateContainerRequest{
		PodSandboxId: p.sandbox, SandboxConfig: p.config,
		Config: &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: name}, Image: &cri.ImageSpec{Image: "localhost/pause:test"},
			Labels: labels, LogPath: name + ".log", Linux: &cri.LinuxContainerConfig{},
		},
	})
	if err != nil {
		t.Fatal("container: ", err)
	}
	if _, err := p.n.rt.StartContainer(p.n.ctx(), &cri.StartContainerRequest{ContainerId: r.GetContainerId()}); err != nil {
		t.Fatal("start: ", err)
	}
	p.containers[name] = r.GetContainerId()
	return r.GetContainerId()
}

func (p *criPod) removeContainer(name string) {
	t := p.n.t
	t.Helper()
	if _, err := p.n.rt.RemoveContainer(p.n.ctx(), &cri.RemoveContainerRequest{ContainerId: p.containers[name]}); err != nil {
		t.Fatal("remove container: ", err)
	}
}

// remove does what the kubelet does at a pod's end, the cgroup last.
func (p *criPod) remove() {
	t := p.n.t
	t.Helper()
	if _, err := p.n.rt.StopPodSandbox(p.n.ctx(), &cri.StopPodSandboxRequest{PodSandboxId: p.sandbox}); err != nil {
		t.Fatal("stop: ", err)
	}
	if _, err := p.n.rt.RemovePodSandbox(p.n.ctx(), &cri.RemovePodSandboxRequest{PodSandboxId: p.sandbox}); err != nil {
		t.Fatal("remove: ", err)
	}
	p.n.removeTrees(p.config.GetLinux().GetCgroupParent())
}

// removeTrees removes a path's cgroups in every hierarchy that is mounted: runc
// uses those of version 1 too where they are.
func (n *criNode) removeTrees(path string) {
	n.t.Helper()
	roots := []string{n.mount.Point}
	more, err := filepath.Glob("/sys/fs/cgroup/*" + path)
	if err != nil {
		n.t.Fatal(err)
	}
	for _, m := range more {
		roots = append(roots, strings.TrimSuffix(m, path))
	}
	for _, root := range roots {
		n.wait("removal of "+root+path, func() bool {
			var dirs []string
			err := filepath.WalkDir(root+path, func(p string, d fs.DirEntry, err error) error {
				if err == nil && d.IsDir() {
					dirs = append(dirs, p)
				}
				return nil
			})
			if err != nil {
				n.t.Fatal(err)
			}
			for i := len(dirs) - 1; i >= 0; i-- {
				if err := os.Remove(dirs[i]); err != nil && !errors.Is(err, fs.ErrNotExist) {
					return false // its last process is leaving
				}
			}
			return true
		})
	}
}

func (n *criNode) removeCgroups() { n.removeTrees(n.top) }

// netnsInode reads the inode of a namespace's file as the node's processes see
// it.
func (n *criNode) netnsInode(path string) evidence.NetnsInode {
	n.t.Helper()
	root, err := unix.Open(fmt.Sprintf("/proc/%d/root", n.init), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		n.t.Fatal(err)
	}
	defer unix.Close(root)
	// /var/run is a link to /run: the node's, not the test's.
	fd, err := unix.Openat2(root, path, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT})
	if err != nil {
		n.t.Fatalf("%s: %v", path, err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		n.t.Fatalf("%s: %v", path, err)
	}
	return evidence.NetnsInode(st.Ino)
}

// Real containers of containerd and runc: the kernel's side of the index and the
// runtime's names agree, through containerd's own end and return.
func TestPrivilegedContainerd(t *testing.T) {
	n := newCRINode(t)
	a := n.pod(uidA, "web-0", false, map[string]string{"app": "web"})
	server := a.container("server")
	b := n.pod(uidB, "proxy", true, nil)
	proxy := b.container("proxy")

	root, err := cgroup.FindRoot(n.mount, "", n.top+"/kubepods")
	if err != nil {
		t.Fatal(err)
	}
	resolver, err := cgroup.NewResolver(cgroup.ResolverConfig{Mount: n.mount, Owner: root.Owner})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { resolver.Close() })
	x := mustNew(t, Config{Root: root, Mount: n.mount, Resolver: resolver, HostNetns: netnsOf(t, n.init)})
	start(t, x, x.Run)

	r := NewRuntime(RuntimeConfig{ContainerdSockets: []string{n.dir + "/c.sock"}, CRIODirs: []string{}, Logger: slog.New(slog.DiscardHandler)})
	// Events alone tell of what comes after the first list.
	r.settle = time.Hour
	runRuntime(t, r)
	n.wait("connected", func() bool { return connects(r) == 1 })

	m, ok := r.Metadata(uidA)
	if !ok || m.Name != "web-0" || m.Namespace != "shop" || m.Labels["app"] != "web" || m.SandboxID != a.sandbox || m.HostNetwork || m.Created.IsZero() {
		t.Errorf("pod: %+v", m)
	}
	if len(m.Containers) != 1 || m.Containers[0].ID != server || m.Containers[0].Name != "server" ||
		m.Containers[0].Image != "localhost/pause:test" || m.Containers[0].SandboxID != a.sandbox {
		t.Errorf("containers: %+v", m.Containers)
	}
	if len(m.Labels) != 1 {
		t.Errorf("labels: %v", m.Labels)
	}
	// The runtime's path is the namespace that the kernel shows.
	x.learnSandboxes(t.Context())
	info, ok := x.Find(uidA)
	if !ok || info.Netns == 0 || info.Netns != n.netnsInode(m.NetnsPath) {
		t.Errorf("network namespace: the kernel's is %d, %s is %d", info.Netns, m.NetnsPath, n.netnsInode(m.NetnsPath))
	}
	if m, ok := r.Metadata(uidB); !ok || !m.HostNetwork || m.NetnsPath != "" {
		t.Errorf("hostNetwork: %+v", m)
	}
	if info, ok := x.Find(uidB); !ok || !info.HostNet {
		t.Errorf("hostNetwork, by the kernel: %+v", info)
	}
	if c, ok := r.Container(uidB, server); ok {
		t.Errorf("another pod's container: %+v", c)
	}
	// What the cgroup tree has, the runtime can name, and the times agree.
	for uid, want := range map[evidence.PodUID][]string{uidA: {a.sandbox, server}, uidB: {b.sandbox, proxy}} {
		got := x.Containers(uid)
		if len(got) != len(want) {
			t.Errorf("containers of %s: %+v", uid, got)
		}
		for _, c := range got {
			known, ok := r.Container(uid, c.ID)
			if !ok || known.Name == "" || c.PID == 0 {
				t.Errorf("%+v is %+v, %v", c, known, ok)
			}
			if d := c.Started.Sub(known.Created); d < -2*time.Second || d > 5*time.Minute {
				t.Errorf("made %v, started %v", known.Created, c.Started)
			}
		}
	}

	// Events: a container, a pod, their ends.
	side := a.container("sidecar")
	n.wait("the sidecar", func() bool { c, ok := r.Container(uidA, side); return ok && c.Name == "sidecar" })
	a.removeContainer("sidecar")
	n.wait("its end", func() bool { _, ok := r.Container(uidA, side); return !ok })
	c := n.pod(uidC, "job-1", false, nil)
	n.wait("the new pod", func() bool { m, ok := r.Metadata(uidC); return ok && m.Name == "job-1" && m.NetnsPath != "" })
	n.wait("the new pod's cgroup", func() bool { _, ok := x.Find(uidC); return ok })
	c.remove()
	n.wait("its end", func() bool { _, ok := r.Metadata(uidC); return !ok })
	n.wait("its cgroup's end", func() bool { _, ok := x.Find(uidC); return !ok })

	// containerd ends: everything that is known stays, and the kernel's side
	// does not notice.
	n.down()
	n.wait("the loss", func() bool { return connects(r) == 0 })
	if m, ok := r.Metadata(uidA); !ok || m.Name != "web-0" {
		t.Errorf("without containerd: %+v", m)
	}
	id, err := resolver.ID(info.Path + "/" + server)
	if err != nil {
		t.Fatal(err)
	}
	if att, p := x.Attest(evidence.Connection{TaskCgroup: id, SocketCgroup: id, NetnsInode: info.Netns}, true); p == nil || att.Pod != uidA {
		t.Errorf("without containerd a connection is %+v", att)
	}
	n.up()
	n.wait("the reconnect", func() bool { return connects(r) == 2 })
	if m, ok := r.Metadata(uidA); !ok || len(m.Containers) != 1 {
		t.Errorf("after containerd's return: %+v", m)
	}
	a.remove()
	n.wait("the pod's end", func() bool { _, ok := r.Metadata(uidA); return !ok })
	b.remove()
	n.wait("nothing left", func() bool { s := r.Status(); return s[0].Containers == 0 })
}

func runRuntime(t *testing.T, r *Runtime) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}
