// SPDX-License-Identifier: Apache-2.0

//go:build linux && privileged

package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"

	"github.com/latchkey-dev/latchkey/pkg/attribution"
	"github.com/latchkey-dev/latchkey/pkg/diagnose"
	"github.com/latchkey-dev/latchkey/pkg/explain"
	"github.com/latchkey-dev/latchkey/test/rig"
	"github.com/latchkey-dev/latchkey/test/standin/eksauth"
)

// What is wrong with a node, made for real, is one of doctor's lines, with what
// to do; failures show in the exit status, warnings do not.
func TestPrivilegedDoctorFindsWhatIsWrong(t *testing.T) {
	for _, tt := range []struct {
		name  string
		cfg   rig.Config
		make  func(t *testing.T, w *world)
		under func(w *world) []string
		flags []string
		check string
		state explain.State
		text  string
		fix   string
	}{
		{name: "no agent", make: func(*testing.T, *world) {}, check: "agent", state: explain.Fail, text: "no agent answers"},
		{name: "cgroup v1 only", make: func(*testing.T, *world) {}, under: withoutCgroup2, check: "cgroup", state: explain.Fail, text: "cgroup v2 is not mounted"},
		{name: "port held by another", make: func(t *testing.T, w *world) {
			must(t, w.Node.Do(func() error {
				ln, err := net.Listen("tcp4", "0.0.0.0:80")
				if err == nil {
					t.Cleanup(func() { ln.Close() })
				}
				return err
			}))
		}, check: "port", state: explain.Fail, text: "on 0.0.0.0:80 listens on the credential address"},
		{name: "address gone", make: func(t *testing.T, w *world) { addressGone(t, w) }, check: "address", state: explain.Fail, text: "169.254.170.23 is on no link"},
		{name: "programs detached", make: func(t *testing.T, w *world) {
			w.start(t)
			l, err := link.LoadPinnedLink(filepath.Join(w.PinPath(), attribution.Layout, "link_sockops"), nil)
			must(t, err)
			defer l.Close()
			must(t, l.Detach())
		}, check: "bpf", state: explain.Fail, text: "sockops is not attached"},
		{name: "another's program", make: func(t *testing.T, w *world) { hookShadowed(t, w, w.Node.CgroupRoot(), false) }, check: "bpf", state: explain.Warn, text: "takes_over"},
		{name: "clock far off", cfg: *ahead(time.Hour), make: func(t *testing.T, w *world) { w.start(t) }, check: "clock", state: explain.Fail, text: "differs from EKS Auth's by 1h0m0s"},
		{name: "clock a little off", cfg: *ahead(90 * time.Second), make: func(t *testing.T, w *world) { w.start(t) }, check: "clock", state: explain.Warn, text: "differs from EKS Auth's by 1m"},
		{name: "upstream down", make: func(t *testing.T, w *world) { w.start(t); w.EKSAuth.Refuse() }, check: "upstream", state: explain.Fail, text: "connection refused"},
		{name: "node's credentials refused", cfg: rig.Config{EKSAuth: eksauth.Config{Callers: map[string]string{"AKIASOMEBODYELSE0000": "x"}}}, make: func(t *testing.T, w *world) {
			w.start(t)
			p := w.add(t)
			p.ask(t, p.Token)
		}, check: "credentials", state: explain.Fail, text: "does not accept the node's own"},
		{name: "weak mode", make: func(t *testing.T, w *world) { w.start(t, "--attestation", "audit") }, check: "attestation", state: explain.Warn, text: "mode audit serves stolen tokens"},
		{name: "weak mode of a namespace", make: func(t *testing.T, w *world) { w.start(t, "--attestation-namespace", "legacy=audit") }, check: "attestation", state: explain.Warn, text: "mode audit serves stolen tokens of namespace legacy"},
		{name: "asked on another socket", make: func(t *testing.T, w *world) { w.start(t) }, flags: []string{"--admin-socket", "/run/elsewhere/admin.sock"}, check: "agent", state: explain.Fail, text: "no agent answers on /run/elsewhere/admin.sock", fix: "pgrep -af latchkey-agent"},
		{name: "pods reach the metadata service", make: func(t *testing.T, w *world) {
			w.start(t)
			w.add(t)
			must(t, w.Node.Do(func() error {
				lo, err := netlink.LinkByName("lo")
				if err != nil {
					return err
				}
				if err := netlink.AddrAdd(lo, &netlink.Addr{IPNet: &net.IPNet{IP: net.IP{169, 254, 169, 254}, Mask: net.CIDRMask(32, 32)}}); err != nil {
					return err
				}
				ln, err := net.Listen("tcp", "169.254.169.254:80")
				if err != nil {
					return err
				}
				srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(401) })}
				go func() { _ = srv.Serve(ln) }()
				t.Cleanup(func() { srv.Close() })
				return nil
			}))
		}, check: "imds", state: explain.Warn, text: "pods reach the instance metadata service"},
		{name: "a pod that is cut off", make: func(t *testing.T, w *world) {
			w.start(t)
			p := w.named(t, "cut-off", "cut-off", "cut-off")
			p.served(t)
			swallow(t, p.Netns())
		}, check: "reach", state: explain.Warn, text: "169.254.170.23:80 cannot be reached from pod web/cut-off: no answer within"},
		{name: "Cilium", make: func(t *testing.T, w *world) {
			w.start(t)
			must(t, w.Node.Do(func() error {
				return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "cilium_host"}, PeerName: "cilium_net"})
			}))
		}, check: "cni", state: explain.Warn, text: "Cilium is here"},
		{name: "a node-level proxy", make: func(t *testing.T, w *world) {
			w.start(t)
			sleep, err := exec.LookPath("sleep")
			must(t, err)
			program := filepath.Join(t.TempDir(), "ztunnel")
			copyFile(t, sleep, program)
			cmd := w.Node.HostPlace().Command(t.Context(), program, "600")
			must(t, cmd.Start())
			t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
		}, check: "cni", state: explain.Warn, text: "ztunnel ("},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t, tt.cfg)
			tt.make(t, w)
			var wrapper []string
			if tt.under != nil {
				wrapper = tt.under(w)
			}
			eventually(t, func() error {
				r := w.latchkeyUnder(t, wrapper, append([]string{"doctor", "-o", "json"}, tt.flags...)...)
				var got struct{ Checks []diagnose.Check }
				if err := json.Unmarshal([]byte(r.stdout), &got); err != nil {
					return fmt.Errorf("%w in %s%s", err, r.stdout, r.stderr)
				}
				want := 0
				if diagnose.Failed(got.Checks) {
					want = 4
				}
				if r.code != want {
					return fmt.Errorf("exit status %d, want %d", r.code, want)
				}
				for _, k := range got.Checks {
					if k.Name == tt.check && k.State == tt.state && strings.Contains(k.Text, tt.text) && k.Fix != "" && strings.Contains(k.Fix, tt.fix) {
						return nil
					}
				}
				return fmt.Errorf("no %s of %s that says %q: %+v", tt.state, tt.check, tt.text, got.Checks)
			})
		})
	}
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	src, err := os.Open(from)
	must(t, err)
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY, 0o755)
	must(t, err)
	_, err = io.Copy(dst, src)
	must(t, err)
	must(t, dst.Close())
}
