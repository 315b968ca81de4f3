// SPDX-License-Identifier: Apache-2.0

//go:build linux && privileged

package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/pkg/attribution"
	"github.com/latchkey-dev/latchkey/pkg/explain"
	"github.com/latchkey-dev/latchkey/test/rig"
	"github.com/latchkey-dev/latchkey/test/standin/eksauth"
	"github.com/latchkey-dev/latchkey/test/standin/tokens"
	"github.com/latchkey-dev/latchkey/test/testnode"
)

// broken is a set-up in which a pod gets no credentials, and what the last line
// of explain must say of it.
type broken struct {
	name string
	// own makes a node for this set-up alone; the others share one.
	own *rig.Config
	// make breaks something for real, and gives what to explain.
	make func(t *testing.T, w *world) (query string)
	// under is what the CLI is run through.
	under func(w *world) []string
	code  explain.Code
	text  string
	flags []string
}

func brokenSetups() []broken {
	return []broken{
		{name: "no association", code: explain.NoAssociation, text: "no association", make: func(t *testing.T, w *world) string {
			p := w.named(t, "lonely", "lonely", "")
			wantStatus(t, p.ask(t, p.Token), 404)
			return "web/lonely"
		}},
		{name: "wrong audience", code: explain.TokenAudience, text: "wrong audience", make: func(t *testing.T, w *world) string {
			p := w.add(t)
			c := w.Claims(p.Pod.Pod)
			c.Audience = "sts.amazonaws.com"
			wantStatus(t, p.ask(t, w.Signer.Token(c)), 400)
			return p.uid()
		}},
		{name: "wrong audience, in the token file only", code: explain.TokenAudience, text: "wrong audience", make: func(t *testing.T, w *world) string {
			p := w.add(t)
			c := w.Claims(p.Pod.Pod)
			c.Audience = "sts.amazonaws.com"
			must(t, p.WriteToken(w.Signer.Token(c)))
			return p.uid()
		}},
		{name: "another pod's token", code: explain.OtherPodsToken, text: "another pod's token: the pod presents the token of web/", make: func(t *testing.T, w *world) string {
			victim, thief := w.add(t), w.add(t)
			wantStatus(t, thief.ask(t, victim.Token), 403)
			return thief.uid()
		}},
		{name: "agent late", own: &rig.Config{}, code: explain.AgentLate, text: "agent late", make: agentLate},
		{name: "address gone", own: &rig.Config{}, code: explain.AddressGone, text: "169.254.170.23 is gone from the node", make: addressGone},
		{name: "upstream denied", code: explain.UpstreamDenied, text: "upstream denied", make: func(t *testing.T, w *world) string {
			p := w.add(t)
			w.refuse(t, eksauth.Fault{ErrorType: "AccessDeniedException", Message: "not authorized to perform sts:TagSession"})
			if a := p.ask(t, p.Token); a.Status == 200 {
				t.Fatal("served")
			}
			return p.uid()
		}},
		{name: "throttled", code: explain.UpstreamThrottled, text: "throttled", make: func(t *testing.T, w *world) string {
			p := w.add(t)
			w.refuse(t, eksauth.Fault{ErrorType: "ThrottlingException", Message: "Rate exceeded"})
			wantStatus(t, p.ask(t, p.Token), 429)
			return p.uid()
		}},
		{name: "node credentials expired", code: explain.NodeCredentials, text: "the node's own credentials have expired", make: func(t *testing.T, w *world) string {
			p := w.add(t)
			w.refuse(t, eksauth.Fault{Status: 403, ErrorType: "ExpiredTokenException", Message: "The security token included in the request is expired"})
			if a := p.ask(t, p.Token); a.Status == 200 {
				t.Fatal("served")
			}
			return p.uid()
		}},
		{name: "node credentials unknown", own: &rig.Config{EKSAuth: eksauth.Config{Callers: map[string]string{"AKIASOMEBODYELSE0000": "x"}}},
			code: explain.NodeCredentials, text: "not known to AWS", make: func(t *testing.T, w *world) string {
				w.start(t)
				p := w.add(t)
				if a := p.ask(t, p.Token); a.Status == 200 {
					t.Fatal("served")
				}
				return p.uid()
			}},
		{name: "clock skew", own: ahead(time.Hour), code: explain.ClockSkew, text: "clock skew: this node's clock is 1h0m", make: func(t *testing.T, w *world) string {
			w.start(t)
			p := w.add(t)
			wantStatus(t, p.ask(t, p.Token), 400)
			return p.uid()
		}},
		{name: "hook shadowed", own: &rig.Config{}, code: explain.Shadowed, text: "hook shadowed: takes_over (id ", make: func(t *testing.T, w *world) string {
			return hookShadowed(t, w, w.Node.KubepodsRoot(), true)
		}},
		{name: "hook shadowed, found by a probe", own: &rig.Config{}, flags: []string{"--probe"}, code: explain.Shadowed, text: "a connection tried from the pod", make: func(t *testing.T, w *world) string {
			return hookShadowed(t, w, w.Node.CgroupRoot(), false)
		}},
		{name: "node-level proxy", code: explain.NodeProxy, text: "a node-level proxy connects for the pod", make: func(t *testing.T, w *world) string {
			p := w.add(t)
			proxy, err := w.Node.HostPlace().Spawn(t.Context())
			must(t, err)
			t.Cleanup(proxy.Kill)
			wantStatus(t, askFrom(t, proxy, p.Token), 403)
			return p.uid()
		}},
		{name: "node-level proxy, asked about itself", code: explain.NodeProxy, text: "outside every pod and asked with the token of pod web/", make: func(t *testing.T, w *world) string {
			p := w.add(t)
			proxy, err := w.Node.HostPlace().Nested("proxy").Spawn(t.Context())
			must(t, err)
			t.Cleanup(proxy.Kill)
			wantStatus(t, askFrom(t, proxy, p.Token), 403)
			return strconv.Itoa(proxy.PID())
		}},
		{name: "cgroup v1 only", own: &rig.Config{}, under: withoutCgroup2, code: explain.CgroupV1, text: "cgroup v1 only", make: func(t *testing.T, w *world) string {
			p := w.add(t)
			a, err := w.LaunchAgentUnder(withoutCgroup2(w), w.Args()...)
			must(t, err)
			select {
			case <-a.Done():
			case <-time.After(patience):
				a.Kill()
				t.Fatal("an agent that cannot attest started in enforce mode")
			}
			return p.uid()
		}},
		{name: "expired token", code: explain.TokenExpired, text: "the pod's token has expired", make: func(t *testing.T, w *world) string {
			p := w.add(t)
			c := w.Claims(p.Pod.Pod)
			c.IssuedAt, c.Expiry = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
			wantStatus(t, p.ask(t, w.Signer.Token(c)), 400)
			return p.uid()
		}},
		{name: "unknown key", code: explain.TokenKey, text: "unknown key", make: func(t *testing.T, w *world) string {
			p := w.add(t)
			stranger, err := tokens.NewSigner(tokens.Config{Algorithm: "ES256"})
			must(t, err)
			wantStatus(t, p.ask(t, stranger.Token(w.Claims(p.Pod.Pod))), 400)
			return p.uid()
		}},
		{name: "ended pod", code: explain.PodEnded, text: "the pod has ended", make: func(t *testing.T, w *world) string {
			p := w.add(t)
			p.served(t)
			must(t, p.Delete(t.Context()))
			eventually(t, func() error {
				if r := w.latchkey(t, "pods"); strings.Contains(r.stdout, p.uid()) {
					return fmt.Errorf("still there: %s", r.stdout)
				}
				return nil
			})
			return "web/" + p.Name
		}},
		{name: "a passed socket", code: explain.TwoPods, text: "made in one pod and connected in another", make: func(t *testing.T, w *world) string {
			a, b := w.add(t), w.add(t)
			s, err := a.app.Socket(t.Context(), unix.AF_INET)
			must(t, err)
			defer s.Close()
			must(t, b.app.Connect(t.Context(), s, netip.MustParseAddrPort(rig.Host4)))
			c, err := net.FileConn(s)
			must(t, err)
			defer c.Close()
			wantStatus(t, over(t, rig.Over(c, rig.Host4), b.Token), 403)
			return b.uid()
		}},
		{name: "another pod's network namespace", code: explain.ForeignNetns, text: "network namespace that is not its own", make: func(t *testing.T, w *world) string {
			a, b := w.add(t), w.add(t)
			in, err := a.Place().InNetns(b.Netns()).Spawn(t.Context())
			must(t, err)
			t.Cleanup(in.Kill)
			eventually(t, func() error {
				if got := askFrom(t, in, a.Token); got.Status != 403 {
					return fmt.Errorf("%d %s", got.Status, got.Body)
				}
				return nil
			})
			return a.uid()
		}},
		{name: "upstream down", own: &rig.Config{}, code: explain.UpstreamDown, text: "EKS Auth is unavailable", make: func(t *testing.T, w *world) string {
			w.start(t)
			p := w.add(t)
			w.EKSAuth.Refuse()
			if a := p.ask(t, p.Token); a.Status < 500 {
				t.Fatalf("%d", a.Status)
			}
			return p.uid()
		}},
		{name: "programs detached", own: &rig.Config{}, code: explain.NotAttached, text: "not attached any more", make: func(t *testing.T, w *world) string {
			w.start(t)
			p := w.add(t)
			p.served(t)
			l, err := link.LoadPinnedLink(filepath.Join(w.PinPath(), attribution.Layout, "link_connect4"), nil)
			must(t, err)
			defer l.Close()
			must(t, l.Detach())
			return p.uid()
		}},
		{name: "not injected", code: explain.NotInjected, text: "the pod was not injected", make: func(t *testing.T, w *world) string {
			p, err := w.AddPod(t.Context(), testnode.PodConfig{Name: "early", Namespace: "web"})
			must(t, err)
			t.Cleanup(func() { p.Delete(context.Background()) })
			return string(p.UID)
		}},
		{name: "static keys", code: explain.OtherCredentials, text: "AWS_ACCESS_KEY_ID", make: func(t *testing.T, w *world) string {
			p, err := w.AddPod(t.Context(), testnode.PodConfig{Name: "static", Namespace: "web"})
			must(t, err)
			t.Cleanup(func() { p.Delete(context.Background()) })
			app, err := p.Place().WithEnv(append(p.AWSEnv(""), "AWS_ACCESS_KEY_ID=AKIAOFTHEPOD")...).Spawn(t.Context())
			must(t, err)
			t.Cleanup(app.Kill)
			return string(p.UID)
		}},
		{name: "agent asked on another socket", flags: []string{"--admin-socket", "/run/elsewhere/admin.sock"}, code: explain.AgentSilent, text: "runs, and does not answer on its admin socket", make: func(t *testing.T, w *world) string {
			return w.add(t).uid()
		}},
		{name: "no agent", own: &rig.Config{}, code: explain.NoAgent, text: "no latchkey-agent runs", make: func(t *testing.T, w *world) string {
			return w.add(t).uid()
		}},
	}
}

// Whatever is broken, the last line of explain names it, and scripts get the
// same by its code.
func TestPrivilegedExplainNamesTheCause(t *testing.T) {
	shared := newWorld(t, rig.Config{})
	shared.start(t)
	lines := map[string]string{}
	defer func() { recordCauses(t, lines) }()
	for _, tt := range brokenSetups() {
		t.Run(tt.name, func(t *testing.T) {
			w := shared
			if tt.own != nil {
				w = newWorld(t, *tt.own)
			}
			query := tt.make(t, w)
			var wrapper []string
			if tt.under != nil {
				wrapper = tt.under(w)
			}
			args := append([]string{"explain", query}, tt.flags...)
			eventually(t, func() error {
				r := w.latchkeyUnder(t, wrapper, args...)
				last := r.lastLine()
				if r.code != 4 || !strings.HasPrefix(last, "cause: "+string(tt.code)+": ") || !strings.Contains(last, tt.text) {
					return fmt.Errorf("exit status %d, want 4 and cause %s, %q:\n%s%s", r.code, tt.code, tt.text, r.stdout, r.stderr)
				}
				if !strings.Contains(r.stdout, "FAILED") || !strings.Contains(r.stdout, "\ndo: ") {
					return fmt.Errorf("no step failed, or nothing to do:\n%s", r.stdout)
				}
				root := strings.TrimPrefix(w.Node.CgroupRoot(), w.Node.Cgroup2Mount())
				lines[tt.name] = strings.NewReplacer(root+"/", "/", root, "/", w.KeyFile(), "/etc/latchkey/jwks.json").Replace(last)
				return nil
			})
			eventually(t, func() error {
				r := w.latchkeyUnder(t, wrapper, append(args, "-o", "json")...)
				var e explain.Explanation
				if err := json.Unmarshal([]byte(r.stdout), &e); err != nil || e.Cause.Code != tt.code || len(e.Cause.Fix) == 0 {
					return fmt.Errorf("cause %+v, %v; want %s", e.Cause, err, tt.code)
				}
				return nil
			})
		})
	}
}

// causesFile is what was said of each set-up.
const causesFile = "../../docs/cli-causes.md"

// recordCauses writes the last lines with LATCHKEY_RECORD=1, and else demands
// that the document lists each set-up with its code.
func recordCauses(t *testing.T, lines map[string]string) {
	t.Helper()
	var doc strings.Builder
	doc.WriteString("# What explain names\n\n" +
		"Each of these was broken for real, on a node with a real agent, by a test (`TestPrivilegedExplainNamesTheCause`), and this is the\n" +
		"last line that `latchkey explain` printed. The word behind `cause:` is for scripts, and does not change; exit status 4.\n\n" +
		"| broken | last line |\n|---|---|\n")
	if len(lines) < len(brokenSetups()) {
		return // some were left out by -run, or have failed
	}
	var rows []string
	for _, b := range brokenSetups() {
		row := "| " + b.name + " | `" + strings.ReplaceAll(lines[b.name], "|", "/") + "` |\n"
		rows = append(rows, row)
		doc.WriteString(row)
	}
	if os.Getenv("LATCHKEY_RECORD") != "" {
		must(t, os.WriteFile(causesFile, []byte(doc.String()), 0o644))
		return
	}
	text, err := os.ReadFile(causesFile)
	must(t, err)
	for i, b := range brokenSetups() {
		if !strings.Contains(string(text), "| "+b.name+" | `cause: "+string(b.code)+": ") {
			t.Errorf("docs/cli-causes.md is not current (LATCHKEY_RECORD=1 writes it anew): no %s", rows[i])
		}
	}
	if n := strings.Count(string(text), "`cause: "); n != len(rows) {
		t.Errorf("docs/cli-causes.md has %d rows, want %d", n, len(rows))
	}
}

// A pod that is served is told so, whatever was wrong before; with every kind
// of query.
func TestPrivilegedExplainOfAPodThatIsServed(t *testing.T) {
	w := newWorld(t, rig.Config{})
	w.start(t)
	p := w.named(t, "api-0", "api", "api")
	p.ask(t, w.Signer.Token(tokens.Claims{Audience: "elsewhere"}))
	c := dial(t, p.app)
	defer c.Close()
	if a := over(t, c, p.Token); a.Status != 200 {
		t.Fatal(a.Body)
	}
	id := p.Containers()[0].ID
	for _, query := range []string{"web/api-0", "api-0", p.uid(), strconv.Itoa(p.app.PID()), c.LocalAddr().String(),
		p.CgroupPath(), p.Place().CgroupDir(), id, id[:12], "containerd://" + id} {
		t.Run(query, func(t *testing.T) {
			eventually(t, func() error {
				r := w.latchkey(t, "explain", query, "--probe")
				if r.code != 0 || !strings.HasPrefix(r.lastLine(), "cause: none: nothing is wrong: the pod is served credentials of arn:aws:sts::") {
					return fmt.Errorf("exit status %d:\n%s%s", r.code, r.stdout, r.stderr)
				}
				return nil
			})
			r := w.latchkey(t, "whois", query)
			if r.code != 0 || !strings.Contains(r.stdout, p.uid()) || !strings.Contains(r.stdout, "web/api") {
				t.Errorf("whois: exit status %d:\n%s%s", r.code, r.stdout, r.stderr)
			}
		})
	}
	// The beginning of a container's id may look like a number.
	digits := strings.Repeat("12345678", 8)
	dir := filepath.Join(w.Node.Cgroup2Mount(), p.CgroupPath(), digits)
	must(t, os.Mkdir(dir, 0o755))
	r := w.latchkey(t, "whois", digits[:13])
	must(t, os.Remove(dir))
	if r.code != 0 || !strings.Contains(r.stdout, digits) || !strings.Contains(r.stdout, p.uid()) {
		t.Errorf("whois of a container id of digits: exit status %d:\n%s%s", r.code, r.stdout, r.stderr)
	}
	// One that never asked is not said to be broken.
	q := w.add(t)
	if r := w.latchkey(t, "explain", q.uid()); r.code != 0 || !strings.HasPrefix(r.lastLine(), "cause: never_asked: ") {
		t.Errorf("exit status %d:\n%s%s", r.code, r.stdout, r.stderr)
	}
}

// What is worth knowing, and keeps no credentials from the pod, is said and is no
// failure.
func TestPrivilegedExplainWarns(t *testing.T) {
	t.Run("a node that does not attest", func(t *testing.T) {
		w := newWorld(t, rig.Config{})
		a, err := w.LaunchAgentUnder(withoutCgroup2(w), w.Args("--attestation", "audit", "--containerd-socket", "off")...)
		must(t, err)
		w.agent = a
		must(t, a.WaitReady(t.Context()))
		p := w.named(t, "api", "api", "api")
		p.served(t)
		eventually(t, func() error {
			// By its UID: only the kernel's evidence would tie a name to it.
			r := w.latchkeyUnder(t, withoutCgroup2(w), "explain", p.uid())
			if r.code != 0 || !strings.HasPrefix(r.lastLine(), "cause: not_attesting: this node has cgroup v1 only") {
				return fmt.Errorf("exit status %d:\n%s%s", r.code, r.stdout, r.stderr)
			}
			return nil
		})
	})
	t.Run("a renewal that fails", func(t *testing.T) {
		w := newWorld(t, rig.Config{})
		w.start(t)
		p := w.named(t, "api", "api", "api")
		p.served(t)
		w.EKSAuth.Refuse()
		if r := w.latchkey(t, "cache", "refresh", p.uid()); r.code != 0 {
			t.Fatalf("%s%s", r.stdout, r.stderr)
		}
		eventually(t, func() error {
			r := w.latchkey(t, "explain", "web/api")
			if r.code != 0 || !strings.HasPrefix(r.lastLine(), "cause: renewal_failing: credentials are served until") || !strings.Contains(r.lastLine(), "EKS Auth is unavailable") {
				return fmt.Errorf("exit status %d:\n%s%s", r.code, r.stdout, r.stderr)
			}
			return nil
		})
		p.served(t)
	})
	t.Run("two pods of one name", func(t *testing.T) {
		w := newWorld(t, rig.Config{})
		w.start(t)
		for _, ns := range []string{"blue", "green"} {
			p, err := w.AddPod(t.Context(), testnode.PodConfig{Name: "api", Namespace: ns, ServiceAccount: "api"})
			must(t, err)
			t.Cleanup(func() { p.Delete(context.Background()) })
			w.Associate(ns, "api", "api")
			a, err := rig.Ask(t.Context(), p.Place(), rig.Host4, p.Token)
			must(t, err)
			wantStatus(t, a, 200)
		}
		eventually(t, func() error {
			if r := w.latchkey(t, "explain", "api"); r.code != 2 || !strings.Contains(r.stderr, "2 pods are called") {
				return fmt.Errorf("exit status %d: %s", r.code, r.stderr)
			}
			return nil
		})
		if r := w.latchkey(t, "explain", "blue/api"); r.code != 0 {
			t.Errorf("exit status %d:\n%s", r.code, r.stdout)
		}
	})
}

// agentLate begins a connection whose SYN is lost, starts the agent, and lets
// the SYN come again.
func agentLate(t *testing.T, w *world) string {
	p := w.add(t)
	restore := swallow(t, p.Netns())
	// The address must be routed to from the start.
	type dialed struct {
		c   net.Conn
		err error
	}
	done := make(chan dialed, 1)
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	t.Cleanup(cancel)
	go func() {
		c, err := p.app.DialContext(ctx, "tcp", rig.Host4)
		done <- dialed{c, err}
	}()
	eventually(t, func() error {
		data, err := p.Exec(t.Context(), "cat", "/proc/net/tcp")
		if err != nil || !strings.Contains(string(data), " 02 ") { // SYN_SENT
			return fmt.Errorf("no SYN is on its way: %v\n%s", err, data)
		}
		return nil
	})
	w.start(t)
	restore()
	d := <-done
	must(t, d.err)
	defer d.c.Close()
	wantStatus(t, over(t, rig.Over(d.c, rig.Host4), p.Token), 503)
	return p.uid()
}

// swallow sends what a namespace's processes send to the endpoint to a router
// that is not there.
func swallow(t *testing.T, ns *testnode.Netns) (restore func()) {
	t.Helper()
	var route netlink.Route
	must(t, ns.Do(func() error {
		nobody := net.IP{10, 88, 0, 254}
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		if err := netlink.NeighSet(&netlink.Neigh{LinkIndex: eth0.Attrs().Index, IP: nobody, State: netlink.NUD_PERMANENT,
			HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, 254}}); err != nil {
			return err
		}
		route = netlink.Route{Dst: &net.IPNet{IP: net.IP{169, 254, 170, 23}, Mask: net.CIDRMask(32, 32)}, Gw: nobody,
			LinkIndex: eth0.Attrs().Index, Flags: int(netlink.FLAG_ONLINK)}
		return netlink.RouteAdd(&route)
	}))
	return func() {
		t.Helper()
		must(t, ns.Do(func() error { return netlink.RouteDel(&route) }))
	}
}

// addressGone has something that takes the address away whenever the agent puts
// it back.
func addressGone(t *testing.T, w *world) string {
	w.start(t)
	p := w.add(t)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			_ = w.Node.Do(func() error {
				list, err := netlink.AddrList(nil, netlink.FAMILY_V4)
				if err != nil {
					return err
				}
				for _, a := range list {
					if !a.IP.Equal(net.IP{169, 254, 170, 23}) {
						continue
					}
					l, err := netlink.LinkByIndex(a.LinkIndex)
					if err != nil {
						return err
					}
					_ = netlink.AddrDel(l, &a)
				}
				return nil
			})
			select {
			case <-ctx.Done():
			case <-time.After(10 * time.Millisecond):
			}
		}
	}()
	t.Cleanup(func() { stop(); <-done })
	return p.uid()
}

// hookShadowed attaches a program, before the agent does or after, that sends
// connections for the endpoint elsewhere, as a socket load balancer would.
func hookShadowed(t *testing.T, w *world, cgroup string, before bool) string {
	if !before {
		w.start(t)
	}
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "takes_over", Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, License: "GPL",
		Instructions: asm.Instructions{
			// struct bpf_sock_addr: user_ip4 at 4, user_port at 24, network order.
			asm.LoadMem(asm.R2, asm.R1, 4, asm.Word),
			asm.JNE.Imm32(asm.R2, 0x17aafea9, "out"),
			asm.Mov.Imm(asm.R2, 0x0100007f),
			asm.StoreMem(asm.R1, 4, asm.R2, asm.Word),
			asm.Mov.Imm(asm.R2, 0x0900), // port 9
			asm.StoreMem(asm.R1, 24, asm.R2, asm.Word),
			asm.Mov.Imm(asm.R0, 1).WithSymbol("out"),
			asm.Return(),
		},
	})
	must(t, err)
	defer prog.Close()
	l, err := link.AttachCgroup(link.CgroupOptions{Path: cgroup, Attach: ebpf.AttachCGroupInet4Connect, Program: prog})
	must(t, err)
	t.Cleanup(func() { l.Close() })
	if before {
		w.start(t)
	}
	p := w.add(t)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if c, err := p.app.DialContext(ctx, "tcp", rig.Host4); err == nil {
		c.Close()
		t.Fatal("the program does not take the connection over")
	}
	return p.uid()
}

// withoutCgroup2 runs a program in a mount namespace of its own that has cgroup
// v1 only.
func withoutCgroup2(w *world) []string {
	return []string{"unshare", "-m", "sh", "-c",
		`for m in $(grep ' - cgroup2 ' /proc/self/mountinfo | cut -d ' ' -f 5); do umount -l "$m" || exit 99; done
		grep -q ' - cgroup ' /proc/self/mountinfo || mount -t cgroup -o none,name=latchkeytest none "$0" || exit 98
		exec "$@"`,
		w.Node.Cgroup2Mount()}
}

// ahead is a cluster whose clocks are ahead of the node's.
func ahead(d time.Duration) *rig.Config {
	now := func() time.Time { return time.Now().Add(d) }
	return &rig.Config{Signer: tokens.Config{Now: now}, EKSAuth: eksauth.Config{Now: now}}
}

func wantStatus(t *testing.T, a rig.Answer, status int) {
	t.Helper()
	if a.Status != status {
		t.Fatalf("%d %s, want %d", a.Status, a.Body, status)
	}
}
