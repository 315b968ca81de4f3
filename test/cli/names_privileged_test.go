// SPDX-License-Identifier: Apache-2.0

//go:build linux && privileged

package cli

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/pkg/adminapi"
	"github.com/latchkey-dev/latchkey/test/rig"
)

// containerd is a real one with a state of its own. It runs nothing: what it
// knows of a container is all that the agent asks it for.
type containerd struct{ dir string }

func (c containerd) socket() string { return filepath.Join(c.dir, "c.sock") }

const containerdConfig = `
version = 2
root = "%[1]s/root"
state = "%[1]s/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.aufs"]
[grpc]
  address = "%[1]s/c.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "%[1]s/opt"
`

func startContainerd(t *testing.T) containerd {
	t.Helper()
	for _, tool := range []string{"containerd", "ctr"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Fatalf("%v (scripts/setup installs it)", err)
		}
	}
	dir, err := os.MkdirTemp("", "lk-names") // a socket's path is short
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	c := containerd{dir}
	must(t, os.Mkdir(filepath.Join(dir, "rootfs"), 0o755))
	config := filepath.Join(dir, "config.toml")
	must(t, os.WriteFile(config, fmt.Appendf(nil, containerdConfig, dir), 0o600))
	var log bytes.Buffer
	cmd := exec.CommandContext(t.Context(), "containerd", "-c", config)
	cmd.Stdout, cmd.Stderr = &log, &log
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
	must(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Signal(unix.SIGTERM)
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("containerd:\n%s", log.Bytes()[max(0, log.Len()-4<<10):])
		}
	})
	eventually(t, func() error { return c.ctr(t, "version") })
	return c
}

func (c containerd) ctr(t *testing.T, args ...string) error {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "ctr", append([]string{"-a", c.socket(), "-n", "k8s.io"}, args...)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("ctr %v: %w: %s", args, err, out)
	}
	return nil
}

// name makes containerd's record of a pod's container, as its CRI plugin would.
func (c containerd) name(t *testing.T, p *pod, name string) {
	t.Helper()
	args := []string{"containers", "create", "--rootfs"}
	for label, value := range map[string]string{
		"io.cri-containerd.kind": "container", "io.kubernetes.container.name": name,
		"io.kubernetes.pod.uid": p.uid(), "io.kubernetes.pod.name": p.Name, "io.kubernetes.pod.namespace": p.Namespace,
	} {
		args = append(args, "--label", label+"="+value)
	}
	must(t, c.ctr(t, append(args, filepath.Join(c.dir, "rootfs"), p.Containers()[0].ID, "/app")...))
}

// What containerd calls a container is in the audit's lines of what its process
// was given or refused, and in the CLI's list. A refused thief is named by it,
// who never presented a token of its own.
func TestPrivilegedContainerdNamesWhoAsked(t *testing.T) {
	c := startContainerd(t)
	w := newWorld(t, rig.Config{})
	file := filepath.Join(t.TempDir(), "audit", "audit.log")
	w.start(t, "--containerd-socket", c.socket(), "--audit", "file:"+file)
	app, thief := w.add(t), w.add(t)
	c.name(t, app, "server")
	c.name(t, thief, "shell")
	eventually(t, func() error {
		r := w.latchkey(t, "pods", "-o", "json")
		var got adminapi.Pods
		if err := json.Unmarshal([]byte(r.stdout), &got); err != nil {
			return fmt.Errorf("%w: %s%s", err, r.stdout, r.stderr)
		}
		for p, want := range map[*pod]string{app: "server", thief: "shell"} {
			if !slices.ContainsFunc(got.Pods, func(g adminapi.Pod) bool {
				return g.UID == p.uid() && g.Name == p.Name && g.Namespace == p.Namespace && slices.Contains(g.Containers, want)
			}) {
				return fmt.Errorf("%s is not named: %+v", p.Name, got.Pods)
			}
		}
		return nil
	})

	app.served(t)
	wantStatus(t, thief.ask(t, app.Token), 403)
	type line struct {
		Verdict, Reason string
		Pod             struct {
			UID, Name, Namespace, Container string
			ContainerID                     string `json:"container_id"`
		}
	}
	eventually(t, func() error {
		text, err := os.ReadFile(file)
		if errors.Is(err, fs.ErrNotExist) {
			return err
		}
		must(t, err)
		var lines []line
		for s := bufio.NewScanner(bytes.NewReader(text)); s.Scan(); {
			var l line
			if err := json.Unmarshal(s.Bytes(), &l); err != nil {
				return fmt.Errorf("%w: %s", err, s.Bytes())
			}
			lines = append(lines, l)
		}
		for _, want := range []struct {
			p                          *pod
			verdict, reason, container string
		}{{app, "issued", "served", "server"}, {thief, "refused", "pod_mismatch", "shell"}} {
			if !slices.ContainsFunc(lines, func(l line) bool {
				return l.Verdict == want.verdict && l.Reason == want.reason && l.Pod.UID == want.p.uid() && l.Pod.Name == want.p.Name &&
					l.Pod.Namespace == want.p.Namespace && l.Pod.Container == want.container && l.Pod.ContainerID == want.p.Containers()[0].ID
			}) {
				return fmt.Errorf("no line of %s in\n%s", want.container, text)
			}
		}
		return nil
	})
	eventually(t, func() error {
		if r := w.latchkey(t, "denials"); !strings.Contains(r.stdout, " "+thief.Namespace+"/"+thief.Name+" ") {
			return fmt.Errorf("the thief is not named:\n%s%s", r.stdout, r.stderr)
		}
		return nil
	})
}
