// SPDX-License-Identifier: Apache-2.0

// Command demo shows Latchkey's main job on one Linux machine, without AWS and
// without Kubernetes: an unmodified AWS SDK makes associations at
// latchkey-server, two pods get the credentials of their own roles, a thief
// with a stolen token gets none, and a role changes while pods run.
//
// It makes a node of its own (a network namespace and a cgroup) and removes it
// again; nothing else on the machine changes. Its exit status is 0 only if
// every expectation held.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/eks"

	"github.com/latchkey-dev/latchkey/pkg/attribution"
	"github.com/latchkey-dev/latchkey/test/clients"
	"github.com/latchkey-dev/latchkey/test/rig"
	"github.com/latchkey-dev/latchkey/test/testnode"
)

// longest that the demo may take.
const longest = 2 * time.Minute

func main() {
	testnode.Main()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := run(ctx)
	if err != nil {
		fmt.Fprintln(os.Stderr, "\ndemo:", err)
		os.Exit(1)
	}
}

// demo prints, and counts expectations that did not hold.
type demo struct {
	out    io.Writer
	color  bool
	start  time.Time
	failed int
	rig    *rig.Rig
	bin    string
	eks    *eks.Client
	// ids are the associations, by namespace and service account.
	ids map[string]string
}

func run(ctx context.Context) (err error) {
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	d := &demo{ids: map[string]string{}, out: os.Stdout, color: isTerminal(os.Stdout), start: time.Now(), bin: filepath.Dir(exe)}
	if err := d.preflight(); err != nil {
		return err
	}
	bounded, cancel := context.WithTimeout(ctx, longest)
	defer cancel()

	d.step("A node of its own: network namespace, cgroup, bridge, bpf filesystem")
	if d.rig, err = rig.New(bounded, rig.Config{AgentBinary: filepath.Join(d.bin, "latchkey-agent")}); err != nil {
		return err
	}
	defer func() {
		if cerr := d.rig.Close(); cerr != nil {
			err = errors.Join(err, cerr)
		}
		if err == nil {
			d.say("The node is gone.")
		}
	}()
	d.say("cgroup %s, pods below %s", d.rig.Node.CgroupRoot(), filepath.Base(d.rig.Node.KubepodsRoot()))

	d.step("latchkey-server on the node's loopback: store, association API, EKS Auth API")
	server, err := d.rig.StartServer(bounded, filepath.Join(d.bin, "latchkey-server"))
	if err != nil {
		return err
	}
	d.eks = server.EKS()
	d.say("ready, for cluster %q, whose token keys are pinned; the agent's keys are good for %s only", rig.Cluster, rig.NodeName)
	d.say("There is no AWS here: --stand-in-sts issues marked credentials that open nothing.")

	d.step("latchkey-agent, attestation enforced")
	agent, err := d.rig.StartAgent(bounded)
	if err != nil {
		return err
	}
	d.say("ready: it attested a connection of its own on each address")

	d.step("Two pods; an unmodified aws-sdk-go-v2 calls CreatePodIdentityAssociation for each")
	api, err := d.pod(bounded, "web", "api", "api-7c9f-x2x", "web-reader")
	if err != nil {
		return err
	}
	batch, err := d.pod(bounded, "jobs", "batch", "batch-0", "batch-writer")
	if err != nil {
		return err
	}

	d.step("An unmodified aws-sdk-go-v2 in each pod asks 169.254.170.23")
	d.sdk(bounded, api, api, "gets web-reader", true)
	d.sdk(bounded, batch, batch, "gets batch-writer", true)
	d.sdk6(bounded, api)

	d.step("The pod \"batch\" has stolen the token of \"api\"")
	d.sdk(bounded, batch, api, "is refused", false)
	d.ask(bounded, "the same request by hand", batch.Place(), api.Token, 403)
	d.ask(bounded, "from another user in the thief's pod", batch.Place().AsUser(1000, 1000), api.Token, 403)
	d.ask(bounded, "from the thief's cgroup in the victim's network namespace", batch.Place().InNetns(api.Netns()), api.Token, 403)

	d.step("A process outside every pod has it, too")
	d.ask(bounded, "a process of the host", d.rig.Node.HostPlace(), api.Token, 403)

	d.step("The role of web/api changes while its pod runs (UpdatePodIdentityAssociation)")
	d.role(bounded, api, "before: web-reader", "web-reader")
	if err := d.update(bounded, "web", "api", "web-writer"); err != nil {
		return err
	}
	d.sdk(bounded, api, api, "asks at once: still served from the agent's cache, until that is renewed", true)
	d.role(bounded, api, "so it is web-reader still", "web-reader")
	newer, err := d.rig.AddPod(bounded, testnode.PodConfig{Name: "api-7c9f-new", Namespace: "web", ServiceAccount: "api"})
	if err != nil {
		return err
	}
	d.sdk(bounded, newer, newer, "a new pod of that service account, asks", true)
	d.role(bounded, newer, "and it is web-writer", "web-writer")
	d.cli(bounded, "cache", "refresh", string(api.UID))
	d.role(bounded, api, "the first pod's is now web-writer, too", "web-writer")

	d.step("The pod \"api\" is deleted while somebody else holds a connection that it opened")
	held, _, err := rig.Dial(bounded, api.Place(), rig.Host4)
	if err != nil {
		return err
	}
	defer held.Close()
	d.answer(bounded, "before", held, api.Token, 200)
	// Its network namespace stays, as one does that somebody holds.
	if err := api.DeleteKeepingNetns(bounded); err != nil {
		return err
	}
	d.refused(bounded, "after, on the same connection", held, api.Token)

	d.step("What the node's CLI shows")
	d.cli(bounded, "pods")
	d.cli(bounded, "whois", string(batch.UID))

	if os.Getenv("KEEP") == "1" {
		d.keep(ctx, server, batch)
		// The person's Ctrl-C, or the time that passed, must not end the
		// clean-up as well.
		bounded, cancel = context.WithTimeout(context.WithoutCancel(ctx), longest)
		defer cancel()
	}

	d.step("Stop and clean up")
	if err := agent.Stop(bounded); err != nil {
		return fmt.Errorf("the agent did not stop well: %w; its log:\n%s", err, agent.Log())
	}
	out, err := d.rig.Cleanup(bounded)
	if err != nil {
		return fmt.Errorf("latchkey-agent cleanup: %w\n%s", err, out)
	}
	d.say("latchkey-agent cleanup removed %d things: programs, pins, addresses", strings.Count(out, "removed "))
	if err := server.Stop(bounded); err != nil {
		return fmt.Errorf("the server did not stop well: %w; its log:\n%s", err, server.Log())
	}
	audit, err := server.Audit()
	if err != nil {
		return err
	}
	d.secrets("the agent's log", agent.Log(), api.Token, batch.Token, newer.Token)
	d.secrets("the server's log and audit", server.Log()+audit, api.Token, batch.Token, newer.Token)
	d.audited(audit)

	if d.failed > 0 {
		return fmt.Errorf("%d expectations did not hold; the agent's log:\n%s\nthe server's:\n%s", d.failed, agent.Log(), server.Log())
	}
	fmt.Fprintf(d.out, "\n%s in %s.\n", d.paint("32", "Every expectation held"), time.Since(d.start).Round(100*time.Millisecond))
	return nil
}

// preflight says all that is missing at once, and what to do.
func (d *demo) preflight() error {
	var missing []string
	if os.Geteuid() != 0 {
		missing = append(missing, "root: run it with sudo")
	}
	if _, err := os.Stat("/sys/kernel/btf/vmlinux"); err != nil {
		missing = append(missing, "the kernel's type information (/sys/kernel/btf/vmlinux): use a kernel with CONFIG_DEBUG_INFO_BTF, as distributions build it since 2020")
	}
	if _, err := testnode.Cgroup2Mount(); err != nil {
		missing = append(missing, fmt.Sprintf("cgroup v2: %v", err))
	}
	for _, name := range []string{"latchkey-agent", "latchkey-server", "latchkey", "awsgo"} {
		if _, err := os.Stat(filepath.Join(d.bin, name)); err != nil {
			missing = append(missing, "the program "+name+" beside this one: run `make demo`")
		}
	}
	if len(missing) == 0 {
		if err := attribution.Probe(); err != nil {
			missing = append(missing, err.Error())
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("cannot run here; missing:\n  - %s", strings.Join(missing, "\n  - "))
	}
	return nil
}

func (d *demo) pod(ctx context.Context, namespace, serviceAccount, name, role string) (*rig.Pod, error) {
	p, err := d.rig.AddPod(ctx, testnode.PodConfig{Name: name, Namespace: namespace, ServiceAccount: serviceAccount})
	if err != nil {
		return nil, err
	}
	out, err := d.eks.CreatePodIdentityAssociation(ctx, &eks.CreatePodIdentityAssociationInput{
		ClusterName: aws.String(rig.Cluster), Namespace: aws.String(namespace), ServiceAccount: aws.String(serviceAccount),
		RoleArn: aws.String(roleARN(role)),
	})
	if err != nil {
		return nil, err
	}
	d.ids[namespace+"/"+serviceAccount] = aws.ToString(out.Association.AssociationId)
	d.say("%-12s service account %s/%s, role %s, address %s", name, namespace, serviceAccount, role, p.IPv4)
	return p, nil
}

func roleARN(role string) string { return "arn:aws:iam::" + rig.Account + ":role/" + role }

// update gives a service account another role.
func (d *demo) update(ctx context.Context, namespace, serviceAccount, role string) error {
	out, err := d.eks.UpdatePodIdentityAssociation(ctx, &eks.UpdatePodIdentityAssociationInput{
		ClusterName: aws.String(rig.Cluster), AssociationId: aws.String(d.ids[namespace+"/"+serviceAccount]), RoleArn: aws.String(roleARN(role)),
	})
	if err != nil {
		return err
	}
	d.say("%s: role %s", aws.ToString(out.Association.AssociationId), aws.ToString(out.Association.RoleArn))
	return nil
}

// role looks up at the agent whose credentials a pod was given.
func (d *demo) role(ctx context.Context, p *rig.Pod, what, want string) {
	// A renewal takes a moment.
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for {
		pods, err := d.rig.Admin().Pods(ctx)
		got := ""
		for _, one := range pods {
			if one.UID == string(p.UID) {
				got = one.Role
			}
		}
		// The session's ARN: arn:aws:sts::ACCOUNT:assumed-role/ROLE/SESSION.
		held := err == nil && strings.Contains(got, "/"+want+"/")
		if held || err != nil || ctx.Err() != nil {
			d.expect(held, "%s: %s", what, got)
			return
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

// audited counts the exchanges in the server's audit log.
func (d *demo) audited(audit string) {
	done := 0
	for line := range strings.Lines(audit) {
		var r struct{ Type, Outcome, JTI string }
		if json.Unmarshal([]byte(line), &r) == nil && r.Type == "exchange" && r.Outcome == "done" && r.JTI != "" {
			done++
		}
	}
	d.expect(done >= 4, "%d exchanges in the server's audit log: two pods, the new one, the renewal", done)
}

// sdk runs the SDK's client in one pod with the token of another, or its own.
func (d *demo) sdk(ctx context.Context, in, tokenOf *rig.Pod, what string, want bool) {
	// Readable there: a stolen token is a copy.
	r := d.awsgo(ctx, in, tokenOf.AWSEnv(""))
	switch {
	case r.Error == "" && want:
		d.expect(true, "%s %s: %s…, account %s, %.0f ms", in.Name, what, r.AccessKeyID[:min(12, len(r.AccessKeyID))], r.AccountID, r.DurationMS)
	case r.Error != "" && !want:
		d.expect(strings.Contains(r.Error, "belongs to another pod"), "%s %s: %s", in.Name, what, lastLine(r.Error))
	default:
		d.expect(false, "%s %s: got key %q, error %q", in.Name, what, r.AccessKeyID, r.Error)
	}
}

func (d *demo) sdk6(ctx context.Context, in *rig.Pod) {
	r := d.awsgo(ctx, in, in.AWSEnv("http://"+strings.TrimSuffix(rig.Host6, ":80")+rig.Path))
	d.expect(r.Error == "", "%s over IPv6: account %s%s", in.Name, r.AccountID, r.Error)
}

func (d *demo) awsgo(ctx context.Context, in *rig.Pod, env []string) clients.Result {
	out, err := in.Place().WithEnv(env...).Command(ctx, filepath.Join(d.bin, "awsgo")).Output()
	var r clients.Result
	if jerr := json.Unmarshal(out, &r); jerr != nil {
		r.Error = fmt.Sprintf("the client did not report: %v %v", err, jerr)
	}
	return r
}

func (d *demo) ask(ctx context.Context, what string, place testnode.Place, token string, want int) {
	a, err := rig.Ask(ctx, place, rig.Host4, token)
	d.status(what, a, err, want)
}

func (d *demo) answer(ctx context.Context, what string, c *rig.Conn, token string, want int) {
	a, err := c.Ask(ctx, token)
	d.status(what, a, err, want)
}

// refused asks until the answer is 403: a pod's end is noticed within 100 ms of
// its cgroup's, or later on a machine that has much to do.
func (d *demo) refused(ctx context.Context, what string, c *rig.Conn, token string) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for {
		a, err := c.Ask(ctx, token)
		if err != nil || a.Status == 403 || ctx.Err() != nil {
			d.status(what, a, err, 403)
			return
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

func (d *demo) status(what string, a rig.Answer, err error, want int) {
	if err != nil {
		d.expect(false, "%s: %v", what, err)
		return
	}
	text := "credentials"
	if a.Status != 200 {
		text = strings.TrimSpace(a.Body)
	}
	d.expect(a.Status == want, "%s: %d %s", what, a.Status, text)
}

func (d *demo) cli(ctx context.Context, args ...string) {
	args = append(args, "--admin-socket", d.rig.Socket())
	cmd := exec.CommandContext(ctx, filepath.Join(d.bin, "latchkey"), args...)
	out, err := cmd.CombinedOutput()
	fmt.Fprintf(d.out, "  $ latchkey %s\n", strings.Join(args[:len(args)-2], " "))
	for line := range strings.Lines(string(out)) {
		fmt.Fprint(d.out, "  ", line)
	}
	if err != nil {
		d.expect(false, "latchkey %s: %v", args[0], err)
	}
}

// secrets looks for tokens where none may be.
func (d *demo) secrets(where, log string, tokens ...string) {
	clean := true
	for _, t := range tokens {
		parts := strings.Split(t, ".")
		clean = clean && !strings.Contains(log, parts[len(parts)-1])
	}
	d.expect(clean, "no token in %s (%d lines)", where, strings.Count(log, "\n"))
}

func (d *demo) keep(ctx context.Context, server *rig.Server, pod *rig.Pod) {
	d.step("KEEP=1: everything stays until Ctrl-C")
	d.say("the table:        %s/latchkey pods --admin-socket %s", d.bin, d.rig.Socket())
	d.say("the server:       %s/latchkey-server status --state-dir %s", d.bin, server.StateDir())
	d.say("the node's netns: nsenter --net=%s", fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), d.rig.Node.NetnsFD()))
	d.say("pins:             %s", d.rig.PinPath())
	d.say("a pod:            %s, cgroup %s", pod.Name, pod.CgroupDir())
	<-ctx.Done()
}

func (d *demo) step(format string, args ...any) {
	fmt.Fprintf(d.out, "\n%s %s\n", d.paint("1;36", "=="), d.paint("1", fmt.Sprintf(format, args...)))
}

func (d *demo) say(format string, args ...any) { fmt.Fprintf(d.out, "  "+format+"\n", args...) }

func (d *demo) expect(held bool, format string, args ...any) {
	mark := d.paint("32", "ok ")
	if !held {
		mark = d.paint("31", "NOT")
		d.failed++
	}
	fmt.Fprintf(d.out, "  %s %s\n", mark, fmt.Sprintf(format, args...))
}

func (d *demo) paint(code, text string) string {
	if !d.color {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

func isTerminal(f *os.File) bool {
	fi, err := f.Stat()
	return err == nil && fi.Mode()&os.ModeCharDevice != 0 && os.Getenv("NO_COLOR") == ""
}

// lastLine is the reason at the end of an SDK's chain of errors.
func lastLine(s string) string {
	s = strings.TrimSpace(s)
	if i := strings.LastIndexByte(s, '\n'); i >= 0 {
		s = s[i+1:]
	}
	const most = 160
	if len(s) > most {
		s = "…" + s[len(s)-most:]
	}
	return s
}
