// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/adminapi"
	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

const (
	// defaultHost is where SDKs ask unless a pod was told otherwise.
	defaultHost = "169.254.170.23"
	// badSkew is what SigV4 and tokens do not forgive; noticeSkew is worth a
	// look.
	badSkew    = 5 * time.Minute
	noticeSkew = 30 * time.Second
	// lateWindow is how long after the start a connection may still be one that
	// was begun before: Linux sends a SYN again for about two minutes.
	lateWindow = 3 * time.Minute
)

// agentName is what the agent's process is called.
const agentName = "latchkey-agent"

// The ways of a step's name.
var order = []string{"agent", "kernel", "clock", "process", "cgroup", "pod", "address", "hooks", "reach", "connection", "token", "verdict", "association", "role", "credentials"}

// walk goes from step to step, and stops at the first that failed.
type walk struct {
	in    Input
	f     *adminapi.Facts
	steps []Step
	cause *Cause
	// worth is what is wrong although the pod is served.
	worth *Cause
	// served is when the pod was last given credentials; zero: never. What was
	// refused before is history.
	served time.Time
	// denial is the newest refusal that still matters, nil if there is none, and
	// proxy the newest of somebody outside pods who had the pod's token.
	denial, proxy *adminapi.Denial
	// other is that of another pod that had this pod's token.
	other     *adminapi.Denial
	skew      time.Duration
	skewKnown bool
	host      string
}

// Explain draws the conclusion.
func Explain(in Input) Explanation {
	w := &walk{in: in, f: in.Facts, host: defaultHost}
	if w.f == nil {
		w.withoutAgent()
	} else {
		w.prepare()
		w.agent()
		w.kernel()
		w.clock()
		w.process()
		w.pod()
		w.address()
		w.hooks()
		w.reach()
		w.connection()
		w.token()
		w.verdict()
		w.association()
		w.credentials()
	}
	if w.cause == nil {
		w.cause = w.worth
	}
	if w.cause == nil {
		w.cause = &Cause{Code: None, Text: "nothing is wrong that this node can see"}
	}
	w.fill()
	return Explanation{Query: in.Query, About: w.about(), Steps: w.steps, Cause: *w.cause}
}

func (w *walk) about() string {
	switch f := w.f; {
	case f == nil:
		return w.in.Query
	case f.Pod != nil:
		return "pod " + podName(f.Pod)
	case f.Connection != nil:
		return "connection from " + f.Connection.Client
	case f.Process != nil:
		return "process " + process(f.Process)
	case f.Cgroup != "":
		return "cgroup " + f.Cgroup
	}
	return w.in.Query
}

func podName(p *adminapi.Pod) string {
	if p.Name == "" {
		return p.UID
	}
	return p.Namespace + "/" + p.Name + " (" + p.UID + ")"
}

func account(p *adminapi.Pod) string {
	if p.ServiceAccount == "" {
		return "the pod's service account"
	}
	return "service account " + p.Namespace + "/" + p.ServiceAccount
}

func process(p *adminapi.Process) string {
	if p.Name == "" {
		return fmt.Sprint(p.PID)
	}
	return fmt.Sprintf("%d (%s)", p.PID, p.Name)
}

// add appends a step unless the way has ended.
func (w *walk) add(state State, name, text, source string, at time.Time) {
	if w.cause == nil {
		w.steps = append(w.steps, Step{Name: name, State: state, Text: text, Source: source, At: at})
	}
}

// fail appends the step at which the way ends.
func (w *walk) fail(name, text, source string, at time.Time, c Cause) {
	if w.cause == nil {
		w.add(Fail, name, text, source, at)
		w.cause = &c
	}
}

// fill names the steps behind the one that failed.
func (w *walk) fill() {
	for _, name := range order {
		if !slices.ContainsFunc(w.steps, func(s Step) bool { return s.Name == name }) && w.cause.Broken() && w.behind(name) {
			w.steps = append(w.steps, Step{Name: name, State: NotReached})
		}
	}
}

func (w *walk) behind(name string) bool {
	if len(w.steps) == 0 {
		return false
	}
	return slices.Index(order, name) > slices.Index(order, w.steps[len(w.steps)-1].Name)
}

// withoutAgent looks for what keeps the agent itself from running.
func (w *walk) withoutAgent() {
	n := w.in.Node
	if w.in.AgentError == "" {
		w.in.AgentError = adminapi.ErrNoAgent.Error()
	}
	switch {
	case strings.Contains(w.in.AgentError, adminapi.ErrNotPermitted.Error()):
		w.fail("agent", w.in.AgentError, "admin socket", time.Time{}, Cause{NotPermitted, "only root may ask the agent", []string{"run latchkey with sudo"}})
		return
	case strings.HasPrefix(n.PortHolder, agentName+" "), !strings.Contains(w.in.AgentError, adminapi.ErrNoAgent.Error()):
		text := "latchkey-agent does not answer"
		if n.PortHolder != "" {
			text = n.PortHolder + " runs, and does not answer"
		}
		w.fail("agent", w.in.AgentError, "admin socket", time.Time{}, Cause{AgentSilent, text + " on its admin socket",
			[]string{"give latchkey the --admin-socket that the agent was started with: pgrep -af " + agentName, "if it is the same, look at the agent's log, and restart it"}})
		return
	case n.CgroupV2 == "" && n.CgroupV1:
		w.add(Unknown, "agent", w.in.AgentError, "admin socket", time.Time{})
		w.fail("kernel", "cgroup v1 is mounted and cgroup v2 is not", "/proc/self/mountinfo", time.Time{}, cgroupV1())
		return
	case len(n.MissingFeatures) > 0:
		w.add(Unknown, "agent", w.in.AgentError, "admin socket", time.Time{})
		w.fail("kernel", "missing: "+strings.Join(n.MissingFeatures, ", "), "tried on this kernel", time.Time{},
			Cause{NoKernel, "this kernel cannot attest connections, so the agent does not start in enforce mode", []string{"boot Linux 5.10 or later with BTF and cgroup v2"}})
		return
	case n.PortHolder != "":
		w.fail("agent", w.in.AgentError, "admin socket", time.Time{},
			Cause{NoAgent, "no agent runs, and " + n.PortHolder + " holds the credential address", []string{"stop that process, or give the agent another --bind-hosts; then start latchkey-agent"}})
		return
	}
	w.fail("agent", w.in.AgentError, "admin socket", time.Time{},
		Cause{NoAgent, "no latchkey-agent runs on this node", []string{"start it, and look at its log: it says why it does not start", "latchkey doctor checks the node"}})
}

func cgroupV1() Cause {
	return Cause{CgroupV1, "this node has cgroup v1 only, so no connection can be attested to a pod",
		[]string{"boot the node with systemd.unified_cgroup_hierarchy=1", "or mount it beside v1: mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified"}}
}

// prepare finds what of the past still matters.
func (w *walk) prepare() {
	f := w.f
	if p := f.Pod; p != nil {
		if strings.HasPrefix(p.Verdict, string(evidence.ReasonServed)) && p.LastAsked != nil {
			w.served = *p.LastAsked
		}
		for i := range f.Denials {
			d := &f.Denials[i]
			if !d.Last.After(w.served) || d.Shadow {
				continue
			}
			switch {
			case d.PodUID != "" && d.PodUID != p.UID:
				w.other = newer(w.other, d)
			case d.Reason == string(evidence.ReasonNotPod):
				w.proxy = newer(w.proxy, d)
			default:
				w.denial = newer(w.denial, d)
			}
		}
		if w.proxy != nil && w.denial != nil && w.denial.Last.After(w.proxy.Last) {
			w.proxy = nil
		}
	} else {
		for i := range f.Denials {
			w.denial = newer(w.denial, &f.Denials[i])
		}
	}
	skew := f.Status.Upstream.ClockSkew
	if w.in.Upstream != nil && w.in.Upstream.ClockSkew != nil {
		skew = w.in.Upstream.ClockSkew
	}
	if skew != nil {
		w.skew, w.skewKnown = time.Duration(*skew*float64(time.Second)).Round(time.Second), true
	}
	if j := w.in.Injection; j != nil && j.URI != "" {
		if u, err := url.Parse(j.URI); err == nil && u.Hostname() != "" {
			w.host = u.Hostname()
		}
	}
}

func newer(a, b *adminapi.Denial) *adminapi.Denial {
	if a == nil || b.Last.After(a.Last) {
		return b
	}
	return a
}

// reason is that of the refusal that matters.
func (w *walk) reason() evidence.Reason {
	if w.denial == nil {
		return ""
	}
	return evidence.Reason(w.denial.Reason)
}

func (w *walk) skewed() bool { return w.skewKnown && w.skew.Abs() >= badSkew }

func (w *walk) agent() {
	s := &w.f.Status
	mode := s.Attestation
	if p := w.f.Pod; p != nil && s.Exceptions[p.Namespace] != "" {
		mode = s.Exceptions[p.Namespace] + " for tokens of namespace " + p.Namespace
	}
	w.add(OK, "agent", fmt.Sprintf("latchkey-agent %s, attestation %s", s.Version, mode), "admin socket", s.Started)
}

func (w *walk) kernel() {
	s := &w.f.Status
	if s.Attesting {
		w.add(OK, "kernel", "attests connections below "+s.AttachedAt, "the agent's programs", time.Time{})
		return
	}
	c := Cause{NotAttesting, "this node does not attest connections, so a stolen token is served to whoever holds it",
		[]string{"put right what latchkey doctor finds, and run the agent with --attestation=enforce"}}
	if w.in.Node.CgroupV2 == "" && w.in.Node.CgroupV1 {
		c = cgroupV1()
		c.Code = NotAttesting
	}
	w.add(Warn, "kernel", "does not attest: "+s.CannotAttest, "the agent's start", s.Started)
	w.worth = &c
}

func (w *walk) clock() {
	switch {
	case !w.skewKnown:
		w.add(Unknown, "clock", "EKS Auth has not told its time", "header Date", time.Time{})
	case w.skew.Abs() >= noticeSkew:
		w.add(Warn, "clock", "this node's clock is "+behind(w.skew)+" EKS Auth's", "header Date", time.Time{})
	default:
		w.add(OK, "clock", "agrees with EKS Auth's", "header Date", time.Time{})
	}
}

// behind words how this node's clock differs if the service's is ahead by skew.
func behind(skew time.Duration) string {
	if skew > 0 {
		return skew.String() + " behind"
	}
	return (-skew).String() + " ahead of"
}

func (w *walk) clockCause() Cause {
	return Cause{ClockSkew, "clock skew: this node's clock is " + behind(w.skew) + " EKS Auth's, so tokens and signatures seem to be of another time",
		[]string{"set the clock and keep it: chronyc makestep; chronyc tracking"}}
}

func (w *walk) process() {
	f := w.f
	if f.Process != nil {
		w.add(OK, "process", process(f.Process), "/proc", time.Time{})
	}
	if f.Cgroup != "" {
		w.add(OK, "cgroup", f.Cgroup, "cgroup v2", time.Time{})
	}
}

func (w *walk) pod() {
	f := w.f
	switch {
	case f.Pod == nil:
		w.noPod()
	case f.Pod.Ended:
		source := "cgroup tree"
		c := Cause{PodEnded, "the pod has ended: its cgroup is gone, and credentials are given to pods that live", []string{"ask from the pod that runs now; a process that outlived its pod must be started in a pod"}}
		w.fail("pod", podName(f.Pod)+" has ended", source, time.Time{}, c)
	default:
		at := time.Time{}
		if f.PodSeen != nil {
			at = *f.PodSeen
		}
		text := podName(f.Pod)
		if f.Pod.ServiceAccount != "" {
			text += ", " + account(f.Pod)
		}
		w.add(OK, "pod", text, "the cgroup's name", at)
	}
}

// noPod explains a process or connection that belongs to no pod.
func (w *walk) noPod() {
	f := w.f
	if c := f.Connection; c != nil && c.Finding != "not_pod" {
		d := w.denial
		if d == nil {
			d = &adminapi.Denial{Reason: c.Reason, Last: c.Accepted, First: c.Accepted}
		}
		cause := w.evidenceCause(evidence.Reason(c.Reason), d)
		w.hooks()
		w.fail("connection", c.Client+": "+c.Finding+", "+c.Reason, "the kernel's evidence", c.Accepted, cause)
		return
	}
	who := w.about()
	c := Cause{NotInPod, who + " is outside every pod, and credentials are given to pods only", []string{"run it in a pod; for the node's own use give it the node's role"}}
	if w.denial != nil && w.denial.TokenPodUID != "" {
		c.Code = NodeProxy
		c.Text = who + " is outside every pod and asked with the token of pod " + w.denial.TokenNamespace + "/" + w.denial.TokenPod + ": a node-level proxy, or a stolen token"
		c.Fix = proxyFix()
	}
	w.fail("pod", "none: outside "+f.Status.Kubepods, "cgroup path", time.Time{}, c)
}

func proxyFix() []string {
	return []string{"let the proxy leave 169.254.170.23 and fd00:ec2::23 alone, so that the pod connects itself",
		"Istio: annotation traffic.sidecar.istio.io/excludeOutboundIPRanges=169.254.170.23/32 with sidecars, label istio.io/dataplane-mode=none in ambient mode"}
}

// usesIPv6 tells which family the pod was told to use.
func (w *walk) usesIPv6() bool { return strings.Contains(w.host, ":") }

func (w *walk) address() {
	if w.cause != nil || w.f.Pod == nil {
		return
	}
	s := &w.f.Status
	for _, a := range s.Addresses {
		if a.Address == w.host && !a.Present {
			text := a.Address + " is not on the node"
			if a.Error != "" {
				text += ": " + a.Error
			}
			w.fail("address", text, "netlink", time.Time{}, addressGone(w.host))
		}
	}
	for _, missing := range w.in.Node.MissingAddresses {
		if missing == w.host {
			w.fail("address", missing+" is on none of the node's links", "netlink", time.Time{}, addressGone(w.host))
		}
	}
	for _, l := range s.Listeners {
		if hostOf(l.Address) == w.host && !l.Serving {
			c := Cause{NotServing, "the agent does not serve " + l.Address + ": " + l.Error, []string{"free the address, or let the agent bind it; it tries again every 5 s"}}
			if w.in.Node.PortHolder != "" {
				c.Text = w.in.Node.PortHolder + " holds " + l.Address + ", so the agent cannot serve it"
			}
			w.fail("address", l.Address+" is not served: "+l.Error, "the agent's listeners", time.Time{}, c)
		}
	}
	w.add(OK, "address", w.host+" is on the node and served", "netlink, the agent's listeners", time.Time{})
}

func hostOf(address string) string {
	host := address[:max(0, strings.LastIndexByte(address, ':'))]
	return strings.Trim(host, "[]")
}

func addressGone(host string) Cause {
	return Cause{AddressGone, "the link-local address " + host + " is gone from the node, so no pod can connect to the agent",
		[]string{"latchkey-agent initialize puts it back once; with CAP_NET_ADMIN the agent keeps it", "find out what removes it: ip monitor address"}}
}

// foreign lists the programs of others at the hooks that connections pass.
func (w *walk) foreign() (names []string, ours bool) {
	ours = true
	for _, h := range w.in.Hooks {
		mine := slices.IndexFunc(h.Programs, func(p Program) bool { return p.Ours })
		if mine < 0 {
			ours = false
		}
		if h.Name == "connect4" && w.usesIPv6() || h.Name == "connect6" && !w.usesIPv6() || h.Name == "sockops" {
			continue
		}
		for i, p := range h.Programs {
			if p.Ours {
				continue
			}
			where := "after"
			if i < mine {
				where = "before"
			}
			names = append(names, fmt.Sprintf("%s (id %d, at cgroup %s) runs %s Latchkey's program at %s", programName(p), p.ID, cgroupText(p.Cgroup), where, h.Name))
		}
	}
	return names, ours
}

func programName(p Program) string {
	if p.Name == "" {
		return "a program without name"
	}
	return p.Name
}

func cgroupText(path string) string {
	if path == "" {
		return "unknown"
	}
	return path
}

// seen: the agent has seen a connection of this pod.
func (w *walk) seen() bool {
	return w.f.LastConnection != nil || !w.served.IsZero() || w.denial != nil && w.denial.PodUID != ""
}

func (w *walk) hooks() {
	if w.cause != nil || !w.f.Status.Attesting {
		return
	}
	if w.in.HooksError != "" || len(w.in.Hooks) == 0 {
		w.add(Unknown, "hooks", "cannot be listed: "+w.in.HooksError, "BPF_PROG_QUERY", time.Time{})
		return
	}
	foreign, ours := w.foreign()
	if !ours {
		w.fail("hooks", "Latchkey's programs are not attached on this pod's way", "BPF_PROG_QUERY", time.Time{},
			Cause{NotAttached, "Latchkey's kernel programs are not attached any more, so no connection gets evidence", []string{"restart latchkey-agent; find out what detached them (bpftool link detach, a removed cgroup)"}})
		return
	}
	probed := w.in.Probe != nil && w.in.Probe.Attested != "" && (w.f.Pod == nil || w.in.Probe.Attested != w.f.Pod.UID)
	unreached := w.unreached()
	// Who never asked may just not have asked: not so if what was tried passed
	// the same programs.
	silent := !w.seen() && w.proxy == nil && !w.passed()
	suspicious := len(foreign) > 0 && (probed || unreached != "" || w.in.Probe == nil && (silent || w.reason() == evidence.ReasonNoEvidence))
	switch {
	case suspicious:
		text := "hook shadowed: " + foreign[0] + ", and no connection of this pod has reached the agent"
		if probed {
			text = "hook shadowed: " + foreign[0] + ", and a connection tried from the pod did not reach the agent as the pod's"
		} else if unreached != "" {
			text = "hook shadowed: " + foreign[0] + ", and a connection from the pod's network namespace fails: " + unreached
		} else if w.reason() == evidence.ReasonNoEvidence {
			text = "hook shadowed: " + foreign[0] + ", and the pod's connection had no evidence"
		}
		w.fail("hooks", strings.Join(foreign, "; "), "BPF_PROG_QUERY", time.Time{}, Cause{Shadowed, text,
			[]string{"let that program leave 169.254.170.23 and fd00:ec2::23 alone, or detach it: latchkey bpf shows whose it is", "Cilium: socketLB.hostNamespaceOnly=true keeps its socket load balancing out of pods", "latchkey explain --probe tries a connection from within the pod"}})
	case len(foreign) > 0:
		w.add(Warn, "hooks", "also attached: "+strings.Join(foreign, "; "), "BPF_PROG_QUERY", time.Time{})
	default:
		w.add(OK, "hooks", "Latchkey's programs alone see this pod connect", "BPF_PROG_QUERY", time.Time{})
	}
}

// unreached is why the address that the pod uses was not reached from its
// network namespace; empty if it was, or was not tried.
func (w *walk) unreached() string {
	for _, r := range w.in.Reach {
		if hostOf(r.Address) == w.host && r.Status == 0 {
			return r.Error
		}
	}
	return ""
}

// passed: the agent was reached from the pod's network namespace, by a process
// that every program of another's sees as well: all are at the top of the
// hierarchy, as Cilium's are.
func (w *walk) passed() bool {
	if len(w.in.Reach) == 0 || w.unreached() != "" {
		return false
	}
	for _, h := range w.in.Hooks {
		for _, p := range h.Programs {
			if !p.Ours && p.Cgroup != "/" {
				return false
			}
		}
	}
	return true
}

// reach comes behind the hooks: a program of another's explains more than what
// became of a connection.
func (w *walk) reach() {
	if w.cause != nil || w.f.Pod == nil {
		return
	}
	if w.in.ReachError != "" {
		w.add(Unknown, "reach", "whether the pod reaches "+w.host+" is not seen from here: "+w.in.ReachError, "", time.Time{})
		return
	}
	if len(w.in.Reach) == 0 {
		return
	}
	if why := w.unreached(); why != "" {
		w.fail("reach", w.host+" cannot be reached from the pod's network namespace: "+why, "a connection from there", time.Time{},
			Cause{Unreachable, "pods cannot reach " + w.host + ": " + why,
				[]string{"look for what drops or reroutes it: ip route get " + w.host + " from the pod, nft list ruleset, network policies, the CNI's own routes"}})
		return
	}
	w.add(OK, "reach", w.host+" answers in the pod's network namespace", "a connection from there", time.Time{})
}

func (w *walk) connection() {
	if w.cause != nil || w.f.Pod == nil {
		return
	}
	if w.proxy != nil {
		who := fmt.Sprintf("process %d", w.proxy.PID)
		if w.proxy.Process != "" {
			who = fmt.Sprintf("process %d (%s)", w.proxy.PID, w.proxy.Process)
		}
		w.fail("connection", who+" in "+cgroupText(w.proxy.Cgroup)+", outside every pod, asked with this pod's token", "the kernel's evidence", w.proxy.Last,
			Cause{NodeProxy, "a node-level proxy connects for the pod: " + who + " in cgroup " + cgroupText(w.proxy.Cgroup) + " is outside every pod", proxyFix()})
		return
	}
	switch r := w.reason(); r {
	case evidence.ReasonNoEvidence, evidence.ReasonUnresolved, evidence.ReasonTwoPods, evidence.ReasonForeignNetns:
		w.fail("connection", "the kernel's evidence: "+string(r), "the kernel's evidence", w.denial.Last, w.evidenceCause(r, w.denial))
		return
	}
	if o := w.other; o != nil {
		who := "pod " + podName(&adminapi.Pod{Namespace: o.Namespace, Name: o.Pod, UID: o.PodUID})
		if !w.seen() {
			w.fail("connection", who+" asked with this pod's token", "the kernel's evidence", o.Last,
				Cause{NodeProxy, who + " connects with this pod's token: a proxy that runs in a pod, or a stolen token", proxyFix()})
			return
		}
		w.add(Warn, "connection", who+" also tried this pod's token, and was refused", "the kernel's evidence", o.Last)
	}
	switch c := w.f.LastConnection; {
	case w.in.Probe != nil && w.in.Probe.Status != 0:
		w.add(OK, "connection", "one tried now from within the pod was attested", "--probe", time.Time{})
	case c != nil:
		w.add(OK, "connection", fmt.Sprintf("from %s by process %d, user %d: the pod's own", c.Client, c.PID, c.UID), "the kernel's evidence", c.Accepted)
	case w.denial != nil:
		w.add(OK, "connection", "the pod's own", "the kernel's evidence", w.denial.Last)
	case !w.served.IsZero():
		w.add(OK, "connection", "the pod's own", "the kernel's evidence", w.served)
	default:
		w.add(Unknown, "connection", "none of this pod is remembered", "the agent's last connections", time.Time{})
	}
}

// evidenceCause explains evidence that supports nobody.
func (w *walk) evidenceCause(r evidence.Reason, d *adminapi.Denial) Cause {
	switch r {
	case evidence.ReasonTwoPods:
		return Cause{TwoPods, "the socket was made in one pod and connected in another", []string{"create and connect the socket in the pod that needs the credentials; do not pass descriptors, and do not let io_uring threads of another process connect"}}
	case evidence.ReasonForeignNetns:
		return Cause{ForeignNetns, "the pod connected from a network namespace that is not its own", []string{"connect from the pod's own network namespace"}}
	case evidence.ReasonUnresolved:
		return Cause{CgroupGone, "the process that connected, and its cgroup, were gone before its pod could be told", []string{"retry; SDKs do"}}
	case evidence.ReasonPodEnded:
		return Cause{PodEnded, "the pod that opened the connection has ended", []string{"ask from the pod that runs now"}}
	}
	s := &w.f.Status
	if since := d.First.Sub(s.Started); s.ReusedLinks == 0 && since < lateWindow {
		return Cause{AgentLate, "agent late: the connection was begun before the agent's programs were attached, at " + s.Started.UTC().Format(time.TimeOnly) + " UTC, and never gains evidence",
			[]string{"nothing to do: the SDK opens another connection, which has evidence", "let the agent start before pods: give it priorityClassName system-node-critical"}}
	}
	return Cause{NoEvidence, "no hook saw this connection being opened: it came from a user-space TCP stack, from another host, or from a sandbox with its own kernel (gVisor, Kata)",
		[]string{"connect with the kernel's TCP from a process in the pod", "on nodes that run such sandboxes, exempt the namespace: --attestation-namespace NAMESPACE=audit"}}
}

func (w *walk) token() {
	if w.cause != nil || w.f.Pod == nil {
		return
	}
	r := w.reason()
	if c, ok := w.tokenCause(r); ok {
		text := "refused: " + string(r)
		if w.denial.TokenExpires != nil && r == evidence.ReasonTokenExpired {
			text += ", at " + w.denial.TokenExpires.UTC().Format(time.RFC3339)
		}
		w.fail("token", text, "the pod's last request", w.denial.Last, c)
		return
	}
	j := w.in.Injection
	if j == nil || w.denial != nil {
		w.tokenFromAgent()
		return
	}
	fresh := w.served.IsZero() // injection that never worked
	switch {
	case j.URI == "" && fresh:
		w.fail("token", "no process of the pod has AWS_CONTAINER_CREDENTIALS_FULL_URI", fmt.Sprintf("/proc/%d/environ", j.PID), time.Time{},
			Cause{NotInjected, "the pod was not injected: it does not know where to ask for credentials", []string{"associations apply to pods made after them: delete the pod, so that it is made again", "see whether the pod-identity webhook runs, and whether the pod has label eks.amazonaws.com/skip-pod-identity-webhook"}})
	case j.Other != "" && fresh:
		w.fail("token", "the pod has "+j.Other+", which SDKs prefer", fmt.Sprintf("/proc/%d/environ", j.PID), time.Time{},
			Cause{OtherCredentials, "the pod has " + j.Other + ", which every SDK prefers to pod identity, so it never asks", []string{"remove that setting from the pod"}})
	case j.Proxy != "" && fresh:
		w.fail("token", "the pod has "+j.Proxy+", and NO_PROXY does not name "+w.host, fmt.Sprintf("/proc/%d/environ", j.PID), time.Time{},
			Cause{Proxied, "the pod sends its requests through " + j.Proxy + " and not to the agent", []string{"add " + w.host + " to NO_PROXY in the pod"}})
	case j.TokenError != "":
		w.fail("token", j.TokenError, "the pod's token file", time.Time{},
			Cause{TokenFile, "the pod's token file cannot be read: " + j.TokenError, []string{"see whether the projected volume eks-pod-identity-token is mounted in that container"}})
	case j.Claims != nil && j.Claims.PodUID != "" && j.Claims.PodUID != w.f.Pod.UID:
		w.fail("token", "the token file holds the token of pod "+j.Claims.Namespace+"/"+j.Claims.Pod, j.TokenFile, j.Claims.IssuedAt, w.mismatch(j.Claims.Namespace+"/"+j.Claims.Pod))
	case j.Token != nil && !j.Token.Accepted:
		c, ok := w.tokenCause(evidence.Reason(j.Token.Reason))
		if !ok {
			c = Cause{OtherRefusal, "the pod's token is refused: " + j.Token.Message, nil}
		}
		at := time.Time{}
		if j.Claims != nil {
			at = j.Claims.IssuedAt
		}
		w.fail("token", "in its file: "+j.Token.Reason, j.TokenFile, at, c)
	case j.Token != nil:
		text := "good"
		if !j.Token.Verified {
			text = "well-formed; only EKS Auth can judge it"
		}
		at := time.Time{}
		if j.Claims != nil {
			text += ", expires " + j.Claims.Expires.Format(time.RFC3339)
			at = j.Claims.IssuedAt
		}
		w.add(OK, "token", text, j.TokenFile, at)
	default:
		w.tokenFromAgent()
	}
}

func (w *walk) tokenFromAgent() {
	if e := w.f.TokenExpires; e != nil {
		w.add(OK, "token", "accepted, expires "+e.UTC().Format(time.RFC3339), "the pod's last request", time.Time{})
		return
	}
	w.add(Unknown, "token", "the pod has presented none that was accepted", "the agent", time.Time{})
}

func (w *walk) tokenCause(r evidence.Reason) (Cause, bool) {
	audience := w.f.Status.Audience
	switch r {
	case evidence.ReasonTokenMissing:
		return Cause{TokenMissing, "the request came without a token", []string{"set AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE in the container; the webhook does"}}, true
	case evidence.ReasonTokenExpired:
		if w.skewed() {
			return w.clockCause(), true
		}
		return Cause{TokenExpired, "the pod's token has expired", []string{"read the token from its file at each use: the kubelet replaces it; SDKs do", "if the file itself is old: journalctl -u kubelet | grep token"}}, true
	case evidence.ReasonTokenNotYetValid:
		if w.skewed() {
			return w.clockCause(), true
		}
		return Cause{TokenNotYetValid, "the pod's token is not valid yet: the clocks of this node and of the API server differ", []string{"set both clocks: chronyc makestep"}}, true
	case evidence.ReasonTokenAudience:
		return Cause{TokenAudience, "wrong audience: the pod's token is not made for " + audience, []string{"project a token with audience " + audience + "; the webhook does. The API server's own token in /var/run/secrets/kubernetes.io will not do"}}, true
	case evidence.ReasonTokenUnknownKey:
		return Cause{TokenKey, "unknown key: the pod's token is signed with a key that is not this cluster's (" + w.f.Status.Keys + ")", []string{"compare the key id (latchkey token FILE) with the API server's /openid/v1/jwks", "after a change of keys, give the agent the new ones"}}, true
	case evidence.ReasonTokenSignature:
		return Cause{TokenSignature, "the signature of the pod's token is wrong: it was altered, or is not this cluster's", []string{"take the token from its file as it is"}}, true
	case evidence.ReasonTokenIssuer:
		return Cause{TokenIssuer, "the pod's token names another issuer than this cluster's", []string{"compare iss (latchkey token FILE) with the agent's --issuer"}}, true
	case evidence.ReasonTokenUnbound:
		return Cause{TokenUnbound, "the token is not bound to a pod", []string{"use a projected token; kubectl create token makes one without a pod"}}, true
	case evidence.ReasonTokenMalformed, evidence.ReasonTokenTooLarge, evidence.ReasonTokenAlgorithm:
		return Cause{TokenMalformed, "the request's token is no service-account token of Kubernetes", []string{"send the file's text alone in Authorization, without Bearer and without a line break"}}, true
	case evidence.ReasonKeysUnavailable:
		return Cause{KeysUnavailable, "the agent has no keys to check tokens with: " + w.f.Status.Keys, []string{"let the agent reach them, or give it a file with --jwks"}}, true
	}
	return Cause{}, false
}

func (w *walk) mismatch(owner string) Cause {
	return Cause{OtherPodsToken, "another pod's token: the pod presents the token of " + owner, []string{"let the pod use its own token, from the file that AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE names", "if it should not have that token at all, somebody has stolen it: look at both pods"}}
}

func (w *walk) verdict() {
	if w.cause != nil || w.f.Pod == nil {
		return
	}
	d := w.denial
	switch w.reason() {
	case evidence.ReasonPodMismatch:
		owner := "another pod"
		if d.TokenPodUID != "" {
			owner = d.TokenNamespace + "/" + d.TokenPod + " (" + d.TokenPodUID + ")"
		}
		w.fail("verdict", "the connection is this pod's and the token is of "+owner, "evidence and token", d.Last, w.mismatch(owner))
	case evidence.ReasonPodEnded:
		w.fail("verdict", "the pod has ended", "cgroup tree", d.Last, w.evidenceCause(evidence.ReasonPodEnded, d))
	case evidence.ReasonRateLimited:
		w.fail("verdict", "too many requests or connections of this pod", "the agent's limits", d.Last,
			Cause{RateLimited, "the pod asks too often, and is refused by its own limit", []string{"let it keep its credentials until they expire, as SDKs do", "--max-pod-qps, --max-pod-burst and --max-pod-connections set the limit"}})
	case evidence.ReasonHost:
		w.fail("verdict", "the Host header is none of the agent's addresses", "the pod's last request", d.Last,
			Cause{WrongHost, "the pod asked for another host than the agent's addresses", []string{"use http://169.254.170.23/v1/credentials as it is"}})
	case "":
		if w.served.IsZero() {
			w.add(Unknown, "verdict", "no request is remembered", "the agent", time.Time{})
			return
		}
		w.add(OK, "verdict", w.f.Pod.Verdict, "evidence and token", w.served)
	default:
		w.add(OK, "verdict", "evidence and token agree", "evidence and token", d.Last)
	}
}

// association explains what EKS Auth said.
func (w *walk) association() {
	if w.cause != nil || w.f.Pod == nil {
		return
	}
	p := w.f.Pod
	if w.denial != nil {
		u := w.denial.Upstream
		if u == nil {
			u = &adminapi.UpstreamError{Reason: w.denial.Reason, Status: w.denial.Status, Message: w.denial.Detail}
		}
		c := w.upstreamCause(u)
		w.fail("association", upstreamText(u), "EKS Auth's answer", w.denial.Last, c)
		return
	}
	switch {
	case p.Association != "":
		w.add(OK, "association", p.Association+" of "+account(p), "EKS Auth's answer", w.fetched())
		w.add(OK, "role", p.Role, "EKS Auth's answer", w.fetched())
	case p.Role != "":
		w.add(OK, "role", p.Role, "EKS Auth's answer", w.fetched())
	default:
		w.add(Unknown, "association", "EKS Auth has not been asked", "the agent", time.Time{})
	}
}

func (w *walk) fetched() time.Time {
	var at time.Time
	for _, e := range w.f.Cache {
		if e.Fetched != nil && e.Fetched.After(at) {
			at = *e.Fetched
		}
	}
	return at
}

func upstreamText(u *adminapi.UpstreamError) string {
	text := u.Reason
	if u.Status != 0 {
		text += fmt.Sprintf(": %d %s", u.Status, u.Code)
	}
	if u.Message != "" {
		text += ": " + u.Message
	}
	if u.RequestID != "" {
		text += " (request " + u.RequestID + ")"
	}
	return text
}

// credentialCodes are AWS's words for a caller whose own credentials are bad,
// with status 403; with 400 ExpiredTokenException is about the pod's token.
var credentialCodes = []string{"ExpiredTokenException", "ExpiredToken", "UnrecognizedClientException", "InvalidClientTokenId", "MissingAuthenticationTokenException"}

// signatureCodes are AWS's words for a signature of another time, or a wrong
// one.
var signatureCodes = []string{"InvalidSignatureException", "RequestTimeTooSkewed", "RequestExpired", "RequestInTheFuture", "SignatureDoesNotMatch"}

func (w *walk) upstreamCause(u *adminapi.UpstreamError) Cause {
	who := "the pod's service account"
	if w.f.Pod != nil {
		who = account(w.f.Pod)
		if w.f.Pod.ServiceAccount == "" && w.denial != nil && w.denial.TokenServiceAccount != "" {
			who = "service account " + w.denial.TokenNamespace + "/" + w.denial.TokenServiceAccount
		}
	}
	cluster := w.f.Status.Cluster
	namespace, serviceAccount := "NAMESPACE", "SERVICEACCOUNT"
	if p := w.f.Pod; p != nil && p.ServiceAccount != "" {
		namespace, serviceAccount = p.Namespace, p.ServiceAccount
	}
	node := w.f.Status.Upstream.Credentials
	switch {
	case u.Status == 403 && slices.Contains(credentialCodes, u.Code), node.State == "missing":
		text := "the node's own credentials have expired or are not known to AWS"
		if node.State == "missing" {
			text = "the node has no AWS credentials of its own: " + node.Error
		} else if strings.HasPrefix(u.Code, "Expired") {
			text = "the node's own credentials have expired (" + node.Source + ")"
		}
		return Cause{NodeCredentials, text, []string{"give the node its role again: instance profile, hybrid activation, or the file that the agent reads", "with --rotate-credentials the agent reads the shared credentials file each minute"}}
	case u.Status == 403 && slices.Contains(signatureCodes, u.Code):
		if w.skewed() {
			return w.clockCause()
		}
		return Cause{NodeCredentials, "EKS Auth does not accept the agent's signature: " + u.Message, []string{"compare region and secret key of the node's own credentials"}}
	}
	switch evidence.Reason(u.Reason) {
	case evidence.ReasonUpstreamNotFound:
		return Cause{NoAssociation, "no association: " + who + " has no pod identity association in cluster " + cluster,
			[]string{"aws eks create-pod-identity-association --cluster-name " + cluster + " --namespace " + namespace + " --service-account " + serviceAccount + " --role-arn ROLE", "aws eks list-pod-identity-associations --cluster-name " + cluster + " shows those that there are"}}
	case evidence.ReasonUpstreamToken:
		if w.skewed() {
			return w.clockCause()
		}
		return Cause{UpstreamToken, "EKS Auth refuses the pod's token: " + u.Message, []string{"see that the agent's --cluster-name is this cluster's, and that the pod and its service account still exist"}}
	case evidence.ReasonTokenExpired:
		if w.skewed() {
			return w.clockCause()
		}
		return Cause{TokenExpired, "EKS Auth found the pod's token expired", []string{"read the token from its file at each use"}}
	case evidence.ReasonUpstreamDenied:
		return Cause{UpstreamDenied, "upstream denied: EKS Auth may not give the role of " + who + ", or the node may not ask: " + u.Message,
			[]string{"the role's trust policy must let pods.eks.amazonaws.com do sts:AssumeRole and sts:TagSession", "the node's role must be allowed eks-auth:AssumeRoleForPodIdentity"}}
	case evidence.ReasonUpstreamThrottled:
		return Cause{UpstreamThrottled, "throttled: EKS Auth, or this node's own budget of calls, takes no more at the moment", []string{"wait; the agent slows down by itself", "--upstream-qps sets the node's budget; ask AWS for a higher quota if many nodes share one account"}}
	case evidence.ReasonUpstreamInvalid:
		return Cause{UpstreamInvalid, "EKS Auth's answer cannot be used: " + u.Message, []string{"see who really answers at " + w.f.Status.Upstream.Endpoint + ": a proxy?"}}
	case evidence.ReasonUpstreamUnavailable:
		return Cause{UpstreamDown, "EKS Auth is unavailable at " + w.f.Status.Upstream.Endpoint + ": " + strings.TrimPrefix(u.Message, "EKS Auth is unavailable: "), []string{"see that the node reaches it: latchkey doctor; proxy, VPC endpoint, security group, DNS"}}
	}
	return Cause{OtherRefusal, "refused: " + u.Reason + " " + u.Message, []string{"see the agent's log"}}
}

func (w *walk) credentials() {
	if w.cause != nil || w.f.Pod == nil {
		return
	}
	p := w.f.Pod
	for _, e := range w.f.Cache {
		if e.Expires == nil || e.State != "failing" || e.LastError == nil {
			continue
		}
		c := w.upstreamCause(e.LastError)
		w.add(Warn, "credentials", "served until "+e.Expires.UTC().Format(time.RFC3339)+", and cannot be renewed: "+upstreamText(e.LastError), "the agent's cache", w.fetched())
		w.worth = &Cause{RenewalFailing, "credentials are served until " + e.Expires.UTC().Format(time.TimeOnly) + " UTC and cannot be renewed: " + c.Text, c.Fix}
		return
	}
	if p.Expires != nil && p.Expires.After(w.in.Now) {
		w.add(OK, "credentials", p.Credentials+" until "+p.Expires.UTC().Format(time.RFC3339), "the agent's cache", w.fetched())
		if w.worth == nil {
			w.worth = &Cause{Code: None, Text: "nothing is wrong: the pod is served credentials of " + p.Role}
		}
		return
	}
	w.add(Unknown, "credentials", "none are cached", "the agent's cache", time.Time{})
	if w.served.IsZero() && w.worth == nil {
		w.worth = &Cause{NeverAsked, "the pod has not asked for credentials; nothing on this node keeps it from them", []string{"let it ask: aws sts get-caller-identity in the pod", "see that the pod has AWS_CONTAINER_CREDENTIALS_FULL_URI (the webhook sets it in pods made after their association)"}}
	}
}
