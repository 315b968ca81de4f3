// SPDX-License-Identifier: Apache-2.0

package diagnose

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/pkg/adminapi"
	"github.com/latchkey-dev/latchkey/pkg/explain"
)

// Check is one line of the doctor's findings.
type Check struct {
	// Name groups checks: kernel, cgroup, agent, bpf, address, port, reach,
	// imds, upstream, clock, credentials, token, capabilities, cni.
	Name  string        `json:"name"`
	State explain.State `json:"state"`
	Text  string        `json:"text"`
	// Fix says what to do about a warning or failure.
	Fix string `json:"fix,omitempty"`
}

// Failed tells whether a check failed; warnings have not.
func Failed(checks []Check) bool {
	return slices.ContainsFunc(checks, func(c Check) bool { return c.State == explain.Fail })
}

// Doctor checks a node.
type Doctor struct {
	// Agent is asked if it can be.
	Agent *adminapi.Client
	// Child tries connections from pods' network namespaces; without a Command
	// none is tried.
	Child Child
	// ProcFS is /proc if empty. CNIConfig is /etc/cni/net.d if empty, or what the
	// first process has there, if this one has none: a container sees the node's
	// that way, if it is in the node's pid namespace.
	ProcFS    string
	CNIConfig string
	// MaxPods is from how many pods connections are tried; 0 means 3.
	MaxPods int
	// IMDS is the instance metadata service; empty means 169.254.169.254:80.
	IMDS string
	// Report is told of each check as it is done; may be nil.
	Report func(Check)

	checks []Check
	status *adminapi.Status
	hosts  []netip.Addr
	port   uint16
	mount  string
}

// Run does all checks and returns them in order. It ends early only with ctx.
func (d *Doctor) Run(ctx context.Context) []Check {
	if d.ProcFS == "" {
		d.ProcFS = "/proc"
	}
	if d.CNIConfig == "" {
		d.CNIConfig = "/etc/cni/net.d"
		if _, err := os.Stat(d.CNIConfig); err != nil {
			d.CNIConfig = filepath.Join(d.ProcFS, "1", "root", d.CNIConfig)
		}
	}
	if d.MaxPods == 0 {
		d.MaxPods = 3
	}
	if d.IMDS == "" {
		d.IMDS = "169.254.169.254:80"
	}
	d.hosts = []netip.Addr{netip.MustParseAddr("169.254.170.23"), netip.MustParseAddr("fd00:ec2::23")}
	d.port = 80
	for _, check := range []func(context.Context){
		d.root, d.kernel, d.cgroups, d.agent, d.bpf, d.addresses, d.routes, d.ports, d.reach, d.imds,
		d.upstream, d.tokens, d.capabilities, d.cni,
	} {
		if ctx.Err() != nil {
			break
		}
		check(ctx)
	}
	return d.checks
}

func (d *Doctor) add(state explain.State, name, text, fix string) {
	if state == explain.OK {
		fix = ""
	}
	c := Check{Name: name, State: state, Text: text, Fix: fix}
	d.checks = append(d.checks, c)
	if d.Report != nil {
		d.Report(c)
	}
}

// onNode says how to look from the node itself.
func (d *Doctor) onNode() string {
	const plain = "run latchkey on the node itself, as root"
	if d.status == nil || processName(d.ProcFS, d.status.PID) != "latchkey-agent" {
		return plain
	}
	// The image's own, which is there without being installed.
	own := filepath.Join(d.ProcFS, strconv.Itoa(d.status.PID), "root", "latchkey")
	if _, err := os.Stat(own); err != nil {
		return plain
	}
	return plain + ": " + own + " doctor"
}

func (d *Doctor) root(context.Context) {
	if os.Geteuid() != 0 {
		d.add(explain.Fail, "root", "not run as root: most checks cannot be made", "run it with sudo")
	}
}

func (d *Doctor) kernel(context.Context) {
	missing, err := MissingFeatures()
	switch {
	case len(missing) > 0:
		d.add(explain.Fail, "kernel", "missing: "+strings.Join(missing, ", "), "boot Linux 5.10 or later with BTF (CONFIG_DEBUG_INFO_BTF)")
	case err != nil:
		d.add(explain.Warn, "kernel", "cannot tell what the kernel has: "+firstLine(err), "run it as root")
	default:
		d.add(explain.OK, "kernel", "has all that attestation needs", "")
	}
}

func (d *Doctor) cgroups(context.Context) {
	v2, v1, err := Cgroups(d.ProcFS)
	d.mount = v2
	switch {
	case err != nil:
		d.add(explain.Warn, "cgroup", "cannot read the mounts: "+firstLine(err), "run it as root on the node")
	case v2 == "":
		d.add(explain.Fail, "cgroup", "cgroup v2 is not mounted", "boot with systemd.unified_cgroup_hierarchy=1, or mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified")
	case v1:
		d.add(explain.OK, "cgroup", "v2 at "+v2+", beside v1", "")
	default:
		d.add(explain.OK, "cgroup", "v2 at "+v2, "")
	}
}

func (d *Doctor) agent(ctx context.Context) {
	s, err := d.Agent.Status(ctx)
	if err != nil {
		fix := "start latchkey-agent, and look at its log: it says why it does not start"
		holder, _ := PortHolder(d.ProcFS, d.hosts, d.port, 0)
		switch {
		case errors.Is(err, adminapi.ErrNotPermitted):
			fix = "run it with sudo"
		case strings.HasPrefix(holder, "latchkey-agent "), !errors.Is(err, adminapi.ErrNoAgent):
			fix = "give the --admin-socket that the agent was started with (pgrep -af latchkey-agent); if it is the same, look at the agent's log, and restart it"
		}
		d.add(explain.Fail, "agent", firstLine(err), fix)
		return
	}
	d.status = &s
	d.add(explain.OK, "agent", fmt.Sprintf("%s, cluster %s, attestation %s, since %s", s.Version, s.Cluster, s.Attestation, s.Started.UTC().Format(time.RFC3339)), "")
	switch {
	case !s.Attesting:
		d.add(explain.Fail, "attestation", "connections are not attested: "+s.CannotAttest, "put right what that says; the agent tries again when it is restarted")
	case s.Attestation != "enforce":
		d.add(explain.Warn, "attestation", "mode "+s.Attestation+" serves stolen tokens", "run the agent with --attestation=enforce")
	default:
		d.add(explain.OK, "attestation", "enforced below cgroup "+s.AttachedAt, "")
	}
	for _, ns := range slices.Sorted(maps.Keys(s.Exceptions)) {
		if mode := s.Exceptions[ns]; mode != "enforce" && s.Attestation == "enforce" {
			d.add(explain.Warn, "attestation", "mode "+mode+" serves stolen tokens of namespace "+ns, "take "+ns+" out of --attestation-namespace once its pods are attested: latchkey denials -n "+ns)
		}
	}
	for _, f := range s.Fallbacks {
		d.add(explain.Warn, "attestation", "fallback: "+f, "a newer kernel needs it no more")
	}
	d.hosts = nil
	for _, l := range s.Listeners {
		if at, err := netip.ParseAddrPort(l.Address); err == nil {
			d.hosts, d.port = append(d.hosts, at.Addr()), at.Port()
		}
	}
}

func (d *Doctor) bpf(context.Context) {
	if d.status == nil || !d.status.Attesting {
		return
	}
	if !SameCgroups(d.mount, d.status.AttachedAt, d.status.AttachedID) {
		d.add(explain.Warn, "bpf", "the cgroups seen here are not the agent's", "run it on the node itself, or in the agent's container")
		d.mount = ""
		return
	}
	hooks, err := Hooks(d.mount, d.status.AttachedAt, d.status.Pins)
	if err != nil {
		d.add(explain.Warn, "bpf", "cannot list the programs: "+firstLine(err), "run it as root in the host's cgroup namespace")
		return
	}
	for _, h := range hooks {
		mine := slices.IndexFunc(h.Programs, func(p explain.Program) bool { return p.Ours })
		if mine < 0 {
			d.add(explain.Fail, "bpf", h.Name+" is not attached at cgroup "+d.status.AttachedAt, "restart latchkey-agent")
			continue
		}
		d.add(explain.OK, "bpf", fmt.Sprintf("%s is attached: program %d", h.Name, h.Programs[mine].ID), "")
		for i, p := range h.Programs {
			if p.Ours {
				continue
			}
			where := "after"
			if i < mine {
				where = "before"
			}
			name := p.Name
			if name == "" {
				name = "a program whose name is not seen from here"
			}
			d.add(explain.Warn, "bpf", fmt.Sprintf("%s: %s (program %d, cgroup %s) runs %s Latchkey's", h.Name, name, p.ID, p.Cgroup, where), hookHint(p.Name))
		}
	}
	for _, name := range []string{"client_storage", "no_tcp_sock", "inflight", "pending", "flags", "option_space", "option_write", "option_read", "accepted_storage", "no_key"} {
		if n := d.status.BPF[name]; n > 0 {
			d.add(explain.Warn, "bpf", fmt.Sprintf("the programs counted %d errors of kind %s", n, name), "see docs/metrics.md, latchkey_bpf_events_total")
		}
	}
}

// hookHint tells what to do about a program that others attach.
func hookHint(name string) string {
	switch {
	case strings.HasPrefix(name, "cil_"), strings.HasPrefix(name, "sock4_"), strings.HasPrefix(name, "sock6_"), strings.HasPrefix(name, "bpf_sock"):
		return "Cilium's socket load balancing: harmless as long as no service has the agent's address; socketLB.hostNamespaceOnly=true keeps it out of pods"
	case strings.HasPrefix(name, "calico_"), strings.HasPrefix(name, "cali_"):
		return "Calico's connect-time load balancing: harmless as long as no service has the agent's address"
	case strings.HasPrefix(name, "sd_"):
		return "systemd's; it refuses or allows, and rewrites nothing"
	}
	return "find out whose it is, and whether it rewrites or refuses connections to the agent: bpftool prog show"
}

func (d *Doctor) addresses(context.Context) {
	if d.elsewhere() {
		d.add(explain.Warn, "address", "this is not the agent's network namespace, so addresses, routes and ports are not looked at", "run it on the node itself, or in the agent's container")
		return
	}
	missing, err := MissingAddresses(d.hosts)
	if err != nil {
		d.add(explain.Warn, "address", firstLine(err), "run it as root on the node")
		return
	}
	for _, a := range d.hosts {
		switch {
		case !slices.Contains(missing, a):
			d.add(explain.OK, "address", a.String()+" is on the node", "")
		case a.Is6() && ipv6Off(d.ProcFS):
			d.add(explain.Warn, "address", a.String()+" is missing, and IPv6 is off", "nothing, if no pod uses IPv6; else enable it")
		default:
			d.add(explain.Fail, "address", a.String()+" is on no link of the node", "latchkey-agent initialize puts it back; with CAP_NET_ADMIN the agent keeps it")
		}
	}
	if d.status == nil {
		return
	}
	for _, a := range d.status.Addresses {
		if a.Repairs > 0 {
			d.add(explain.Warn, "address", fmt.Sprintf("%s was removed and put back %d times", a.Address, a.Repairs), "find out what removes it: ip monitor address")
		}
		if a.Error != "" && a.Present {
			d.add(explain.Warn, "address", a.Address+": "+a.Error, "see docs/architecture.md")
		}
	}
}

// elsewhere: the caller does not see the agent's network.
func (d *Doctor) elsewhere() bool { return d.status != nil && !SameNetns(d.status.Netns) }

func ipv6Off(procfs string) bool {
	data, err := os.ReadFile(filepath.Join(procfs, "sys", "net", "ipv6", "conf", "all", "disable_ipv6"))
	return err != nil || strings.TrimSpace(string(data)) == "1"
}

// routes asks the kernel how it would treat a packet to the addresses.
func (d *Doctor) routes(context.Context) {
	if d.elsewhere() {
		return
	}
	for _, a := range d.hosts {
		got, err := netlink.RouteGet(a.AsSlice())
		switch {
		case err != nil:
			d.add(explain.Fail, "route", a.String()+": "+err.Error(), "ip route get "+a.String()+" should say local")
		case len(got) > 0 && got[0].Type != unix.RTN_LOCAL:
			d.add(explain.Fail, "route", a.String()+" is not delivered on this node", "ip route get "+a.String()+" should say local; look at ip rule and at VRFs")
		default:
			d.add(explain.OK, "route", a.String()+" is delivered on this node", "")
		}
	}
}

func (d *Doctor) ports(context.Context) {
	agent := 0
	if d.status != nil {
		agent = d.status.PID
		for _, l := range d.status.Listeners {
			if l.Serving {
				d.add(explain.OK, "port", "the agent serves "+l.Address, "")
			} else {
				d.add(explain.Fail, "port", "the agent does not serve "+l.Address+": "+l.Error, "free the address; the agent tries again every 5 s")
			}
		}
	}
	if d.elsewhere() {
		return
	}
	holder, err := PortHolder(d.ProcFS, d.hosts, d.port, agent)
	switch {
	case err != nil:
		d.add(explain.Warn, "port", "cannot tell who listens: "+firstLine(err), "run it as root on the node")
	case holder != "" && !strings.HasPrefix(holder, "latchkey-agent "):
		d.add(explain.Fail, "port", holder+" listens on the credential address", "stop it, or let it listen on another address; another credential agent and a hostNetwork ingress are the usual ones")
	}
}

// reach tries the addresses from the node and from within pods.
func (d *Doctor) reach(ctx context.Context) {
	if len(d.Child.Command) == 0 || d.status == nil || len(d.hosts) == 0 {
		return
	}
	var addresses []string
	for _, h := range d.hosts {
		addresses = append(addresses, netip.AddrPortFrom(h, d.port).String())
	}
	if d.elsewhere() || d.mount == "" {
		return
	}
	d.reachFrom(ctx, "the node", filepath.Join(d.ProcFS, "self", "ns", "net"), addresses)
	pods, err := d.Agent.Pods(ctx)
	if err != nil {
		d.add(explain.Warn, "reach", "cannot list the pods: "+firstLine(err), "see the agent's log")
		return
	}
	own, _ := os.Readlink(filepath.Join(d.ProcFS, "self", "ns", "net"))
	tried := map[string]bool{own: true}
	for _, p := range pods {
		if len(tried) > d.MaxPods {
			break
		}
		pids, err := Processes(filepath.Join(d.mount, p.Cgroup))
		if err != nil || len(pids) == 0 {
			continue
		}
		ns := filepath.Join(d.ProcFS, strconv.Itoa(pids[0]), "ns", "net")
		link, err := os.Readlink(ns)
		if err != nil || tried[link] {
			continue
		}
		tried[link] = true
		name := p.UID
		if p.Name != "" {
			name = p.Namespace + "/" + p.Name
		}
		if !d.reachFrom(ctx, "pod "+name, ns, addresses) {
			d.add(explain.Unknown, "reach", "whether pods reach the agent is not seen from here: "+ErrNotPermitted.Error(), d.onNode())
			break
		}
	}
	if len(tried) == 1 {
		d.add(explain.Warn, "reach", "no pod with a network namespace of its own runs here, so none was tried", "run it again when one does")
	}
}

// reachFrom is false if the namespace may not be entered.
func (d *Doctor) reachFrom(ctx context.Context, who, netns string, addresses []string) bool {
	got, err := d.Child.Reach(ctx, netns, "", addresses...)
	if errors.Is(err, ErrNotPermitted) {
		return false
	}
	if err != nil {
		d.add(explain.Warn, "reach", "from "+who+": "+firstLine(err), "run it as root on the node")
		return true
	}
	ok := 0
	for _, r := range got {
		if r.Status != 0 {
			ok++
		}
	}
	for _, r := range got {
		state := explain.Fail
		if ok > 0 {
			// One family is enough for a pod; which one it was told to use is in
			// its own settings.
			state = explain.Warn
		}
		switch {
		case r.Status == 404, r.Status == 429:
			d.add(explain.OK, "reach", r.Address+" answers "+who, "")
		case r.Status != 0:
			d.add(explain.Fail, "reach", fmt.Sprintf("%s answers %s with %d: that is not the agent", r.Address, who, r.Status), "see who listens: ss -ltnp; look for what redirects it: nft list ruleset")
		default:
			d.add(state, "reach", r.Address+" cannot be reached from "+who+": "+r.Error, "nft list ruleset, network policies, ip rule; in the pod: ip route get")
		}
	}
	return true
}

// imds looks whether the node's role can be had from the instance metadata
// service: by the agent, which may need it, and by pods, which should not.
func (d *Doctor) imds(ctx context.Context) {
	if len(d.Child.Command) == 0 {
		return
	}
	got, err := d.Child.Reach(ctx, filepath.Join(d.ProcFS, "self", "ns", "net"), "", d.IMDS)
	if err != nil || len(got) == 0 {
		return
	}
	if got[0].Status == 0 {
		d.add(explain.OK, "imds", "no instance metadata service here; the node's credentials come from elsewhere", "")
		return
	}
	d.add(explain.OK, "imds", "the instance metadata service answers the node", "")
	if d.status == nil {
		return
	}
	pods, err := d.Agent.Pods(ctx)
	if err != nil {
		return
	}
	own, _ := os.Readlink(filepath.Join(d.ProcFS, "self", "ns", "net"))
	for _, p := range pods {
		pids, err := Processes(filepath.Join(d.mount, p.Cgroup))
		if err != nil || len(pids) == 0 {
			continue
		}
		ns := filepath.Join(d.ProcFS, strconv.Itoa(pids[0]), "ns", "net")
		if link, err := os.Readlink(ns); err != nil || link == own {
			continue
		}
		got, err := d.Child.Reach(ctx, ns, "", d.IMDS)
		if errors.Is(err, ErrNotPermitted) {
			d.add(explain.Unknown, "imds", "whether pods reach the instance metadata service is not seen from here: "+err.Error(), d.onNode())
			return
		}
		if err == nil && len(got) > 0 {
			if got[0].Status != 0 {
				d.add(explain.Warn, "imds", "pods reach the instance metadata service, and with it the node's role", "require IMDSv2 with a hop limit of 1, or refuse 169.254.169.254 to pods by network policy")
			} else {
				d.add(explain.OK, "imds", "pods do not reach the instance metadata service", "")
			}
		}
		return
	}
}

func (d *Doctor) upstream(ctx context.Context) {
	if d.status == nil {
		return
	}
	r, err := d.Agent.ReachUpstream(ctx)
	switch {
	case err != nil:
		d.add(explain.Warn, "upstream", "cannot ask the agent to try: "+firstLine(err), "see the agent's log")
	case r.Error != "":
		d.add(explain.Fail, "upstream", r.Endpoint+": "+r.Error, "let the node reach it: proxy, VPC endpoint com.amazonaws.REGION.eks-auth, security group, DNS")
	default:
		d.add(explain.OK, "upstream", fmt.Sprintf("%s answers", r.Endpoint), "")
	}
	switch {
	case err != nil:
	case r.ClockSkew == nil:
		d.add(explain.Unknown, "clock", "EKS Auth has not told its time", "let the node reach EKS Auth; chronyc tracking shows whether the clock is kept")
	default:
		skew := time.Duration(*r.ClockSkew * float64(time.Second)).Round(time.Second)
		fix := "set the clock and keep it: chronyc makestep; chronyc tracking"
		switch {
		case skew.Abs() >= 5*time.Minute:
			d.add(explain.Fail, "clock", fmt.Sprintf("differs from EKS Auth's by %s", skew.Abs()), fix)
		case skew.Abs() >= 30*time.Second:
			d.add(explain.Warn, "clock", fmt.Sprintf("differs from EKS Auth's by %s", skew.Abs()), fix)
		default:
			d.add(explain.OK, "clock", "agrees with EKS Auth's", "")
		}
	}
	u := d.status.Upstream
	switch c := u.Credentials; c.State {
	case "ok":
		d.add(explain.OK, "credentials", "the node's own come from "+c.Source, "")
	case "missing":
		d.add(explain.Fail, "credentials", "the node has none of its own: "+c.Error, "give the node a role: instance profile, hybrid activation, or a credentials file")
	case "refused":
		d.add(explain.Fail, "credentials", "EKS Auth does not accept the node's own", "renew them: they have expired, or are of another account or partition")
	default:
		d.add(explain.OK, "credentials", "the node's own have not been needed yet", "")
	}
	if e := u.LastError; e != nil && u.LastCall != nil {
		d.add(explain.Warn, "upstream", fmt.Sprintf("the last call failed: %s %d %s", e.Reason, e.Status, e.Code), "latchkey denials shows whose it was, latchkey explain POD why")
	}
}

func (d *Doctor) tokens(context.Context) {
	if d.status == nil {
		return
	}
	if strings.HasPrefix(d.status.Keys, "none") {
		d.add(explain.Warn, "token", "there are no keys to check tokens with, so every rotated token costs a call of EKS Auth", "give the agent --issuer, or a service account")
		return
	}
	d.add(explain.OK, "token", "checked with the keys of "+d.status.Keys, "")
}

// capabilities that the running agent uses (docs/privileges.md).
var needed = [...]struct {
	bit  uint
	name string
	what string
}{
	{unix.CAP_BPF, "CAP_BPF", "evidence cannot be read where unprivileged bpf(2) is off"},
	{unix.CAP_NET_ADMIN, "CAP_NET_ADMIN", "the addresses are not kept"},
	{unix.CAP_NET_BIND_SERVICE, "CAP_NET_BIND_SERVICE", "port 80 cannot be opened again"},
	{unix.CAP_DAC_READ_SEARCH, "CAP_DAC_READ_SEARCH", "cgroup ids cannot be resolved"},
	{unix.CAP_SYS_PTRACE, "CAP_SYS_PTRACE", "pods' network namespaces are unknown"},
}

func (d *Doctor) capabilities(context.Context) {
	if d.status == nil {
		return
	}
	dir := filepath.Join(d.ProcFS, strconv.Itoa(d.status.PID))
	if processName(d.ProcFS, d.status.PID) != "latchkey-agent" {
		d.add(explain.Warn, "capabilities", "the agent's process is not seen from here", "run it in the host's pid namespace, and the agent with hostPID")
		return
	}
	data, err := os.ReadFile(filepath.Join(dir, "status"))
	if err != nil {
		d.add(explain.Warn, "capabilities", firstLine(err), "run it as root")
		return
	}
	_, rest, _ := strings.Cut(string(data), "\nCapEff:")
	line, _, _ := strings.Cut(rest, "\n")
	held, err := strconv.ParseUint(strings.TrimSpace(line), 16, 64)
	if err != nil {
		d.add(explain.Warn, "capabilities", "cannot be read", "run it as root")
		return
	}
	missing := false
	for _, c := range needed {
		if held&(1<<c.bit) == 0 {
			missing = true
			d.add(explain.Warn, "capabilities", "the agent lacks "+c.name+": "+c.what, "see docs/privileges.md")
		}
	}
	if !missing {
		d.add(explain.OK, "capabilities", "the agent holds what it uses", "")
	}
}

// cni looks for what is known to connect for pods, or to redirect them.
func (d *Doctor) cni(context.Context) {
	found := false
	warn := func(text, fix string) {
		found = true
		d.add(explain.Warn, "cni", text, fix)
	}
	links, err := netlink.LinkList()
	if err == nil || errors.Is(err, netlink.ErrDumpInterrupted) {
		for _, l := range links {
			switch name := l.Attrs().Name; name {
			case "cilium_host":
				warn("Cilium is here: with kube-proxy replacement its socket load balancing runs in pods' connects, with host routing its programs deliver packets past the node's rules",
					"latchkey explain --probe POD shows whether a pod still reaches the agent; socketLB.hostNamespaceOnly=true if not")
			case "istioin", "istioout":
				warn("Istio's ambient redirection is here: ztunnel connects for pods", "label pods istio.io/dataplane-mode=none, or leave 169.254.170.23/32 out of what is captured")
			case "nodelocaldns":
				found = true
				d.add(explain.OK, "cni", "NodeLocal DNSCache is here; it uses other link-local addresses", "")
			}
		}
	}
	entries, err := os.ReadDir(d.CNIConfig)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		found = true
		d.add(explain.Unknown, "cni", "the CNI plugins' settings are not seen from here: "+err.Error(), d.onNode())
	}
	for _, e := range entries {
		data, err := os.ReadFile(filepath.Join(d.CNIConfig, e.Name()))
		if err != nil || e.IsDir() {
			continue
		}
		if strings.Contains(string(data), "istio-cni") {
			warn("Istio's CNI plugin is chained ("+e.Name()+"): sidecars or ztunnel may connect for pods", "annotation traffic.sidecar.istio.io/excludeOutboundIPRanges=169.254.170.23/32, or label istio.io/dataplane-mode=none")
		}
		if strings.Contains(string(data), "linkerd-cni") {
			warn("Linkerd's CNI plugin is chained ("+e.Name()+"): its proxy connects for pods, from the pod's own cgroup", "annotation config.linkerd.io/skip-outbound-ports=80 if requests fail")
		}
	}
	for _, p := range d.proxies() {
		warn(p+" runs on this node: a node-level proxy connects from its own cgroup, and is refused", "let it leave 169.254.170.23 and fd00:ec2::23 alone")
	}
	if !found {
		d.add(explain.OK, "cni", "nothing known to get in the way was found", "")
	}
}

// proxies are processes whose names are those of node-level proxies.
func (d *Doctor) proxies() []string {
	entries, err := os.ReadDir(d.ProcFS)
	if err != nil {
		return nil
	}
	var out []string
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err != nil {
			continue
		}
		comm, err := os.ReadFile(filepath.Join(d.ProcFS, e.Name(), "comm"))
		if err != nil {
			continue
		}
		switch name := strings.TrimSpace(string(comm)); name {
		case "ztunnel", "kube2iam", "kiam", "cilium-envoy":
			out = append(out, name+" ("+e.Name()+")")
		}
	}
	return out
}

func firstLine(err error) string {
	line, _, _ := strings.Cut(err.Error(), "\n")
	return line
}
