// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/latchkey-dev/latchkey/pkg/adminapi"
	"github.com/latchkey-dev/latchkey/pkg/commandline"
	"github.com/latchkey-dev/latchkey/pkg/diagnose"
	"github.com/latchkey-dev/latchkey/pkg/explain"
)

func (c *cli) statusVerb() *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show the agent: what it attests, listens on, checks tokens with and calls",
		Args:  commandline.NoArgs,
		Example: "  latchkey status\n" +
			"  latchkey status -o json | jq '.listeners[] | select(.serving | not)'",
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := c.agent().Status(cmd.Context())
			if err != nil {
				return err
			}
			return c.print(s, func() error { return c.printStatus(s) })
		},
	}
}

func (c *cli) printStatus(s adminapi.Status) error {
	t := &table{}
	attesting := "yes"
	if !s.Attesting {
		attesting = "no: " + s.CannotAttest
	}
	t.add("version", s.Version)
	t.add("running for", short(c.now().Sub(s.Started)))
	t.add("cluster", s.Cluster)
	t.add("attestation", s.Attestation)
	for _, ns := range slices.Sorted(maps.Keys(s.Exceptions)) {
		t.add("attestation of "+ns, s.Exceptions[ns])
	}
	t.add("kernel attests", attesting)
	for _, f := range s.Fallbacks {
		t.add("fallback", f)
	}
	t.add("token keys", s.Keys)
	t.add("kubepods cgroup", dash(s.Kubepods))
	t.add("attached at", dash(s.AttachedAt))
	t.add("pins", dash(s.Pins))
	for _, l := range s.Listeners {
		state := "serving"
		if !l.Serving {
			state = "not serving: " + l.Error
		}
		t.add(l.Address, state)
	}
	u := s.Upstream
	t.add("EKS Auth", dash(u.Endpoint))
	t.add("last call", c.ago(u.LastCall))
	if e := u.LastError; e != nil {
		t.add("last error", fmt.Sprintf("%s %d %s %s", e.Reason, e.Status, e.Code, e.Message))
	}
	if u.ClockSkew != nil {
		clock := "agrees with this node's"
		if math.Abs(*u.ClockSkew) >= 2 {
			clock = fmt.Sprintf("%+.0f s from this node's", *u.ClockSkew)
		}
		t.add("its clock", clock)
	}
	node := u.Credentials.State
	if u.Credentials.Source != "" {
		node += ", from " + u.Credentials.Source
	}
	if u.Credentials.Expires != nil {
		node += ", expire in " + c.until(u.Credentials.Expires)
	}
	t.add("node's credentials", node)
	return c.write(t)
}

func (c *cli) denialsVerb() *cobra.Command {
	var reason, namespace, pod string
	var watch watcher
	cmd := &cobra.Command{
		Use:   "denials",
		Short: "List what was refused lately, and why",
		Long: "denials shows the refusals that the agent remembers: one line for each pod and reason, with how often it\n" +
			"happened and when last. Requests that only a weaker mode served are marked. What a token says of\nitself is shown with a question mark unless its signature was checked.",
		Args:    commandline.NoArgs,
		Example: "  latchkey denials --reason pod_mismatch\n  latchkey denials --watch -o json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := watch.check(cmd); err != nil {
				return err
			}
			if reason != "" {
				if err := oneOf(cmd, "reason", reason, adminapi.Reasons()); err != nil {
					return err
				}
			}
			remembered := 0
			chosen := func(after uint64) (adminapi.Denials, error) {
				d, err := c.agent().Denials(cmd.Context(), after)
				remembered = len(d.Denials)
				d.Denials = slices.DeleteFunc(d.Denials, func(d adminapi.Denial) bool {
					return reason != "" && d.Reason != reason || namespace != "" && d.Namespace != namespace && d.TokenNamespace != namespace ||
						pod != "" && pod != d.PodUID && pod != d.Pod && pod != d.Namespace+"/"+d.Pod
				})
				return d, err
			}
			if watch.on {
				return c.watchDenials(cmd.Context(), watch, chosen)
			}
			d, err := chosen(0)
			if err != nil {
				return err
			}
			return c.print(d, func() error {
				switch {
				case len(d.Denials) > 0:
				case remembered > 0:
					fmt.Fprintf(c.out, "Nothing that matches was refused lately; there are %d refusals of other kinds.\n", remembered)
					return nil
				default:
					fmt.Fprintln(c.out, "Nothing was refused lately.")
					return nil
				}
				return c.write(c.denialTable(d.Denials, true))
			})
		},
	}
	cmd.Flags().StringVar(&reason, "reason", "", "only refusals for this `reason`, such as pod_mismatch")
	cmd.Flags().StringVarP(&namespace, "namespace", "n", "", "only pods or tokens of this `namespace`")
	cmd.Flags().StringVar(&pod, "pod", "", "only this `pod`, by its UID, name or NAMESPACE/POD")
	watch.flags(cmd)
	_ = cmd.RegisterFlagCompletionFunc("reason", cobra.FixedCompletions(adminapi.Reasons(), cobra.ShellCompDirectiveNoFileComp))
	c.completeFlags(cmd, map[string]func(adminapi.Pod) string{"namespace": podNamespace, "pod": podQuery})
	return cmd
}

func (c *cli) watchDenials(ctx context.Context, w watcher, since func(uint64) (adminapi.Denials, error)) error {
	var seq uint64
	var widths []int
	first := true
	return w.each(ctx, func() error {
		d, err := since(seq)
		if err != nil {
			return err
		}
		seq = d.Seq
		defer func() { first = false }()
		if c.format == formatJSON || c.format == formatYAML {
			return c.printLines(toAny(d.Denials))
		}
		if len(d.Denials) == 0 && !first {
			return nil
		}
		t := c.denialTable(d.Denials, first)
		t.widths = widths
		err = c.write(t)
		widths = t.widths
		return err
	})
}

func (c *cli) denialTable(all []adminapi.Denial, head bool) *table {
	t := &table{colour: func(column int, text string) colour {
		if column == 3 && !strings.HasPrefix(text, "served") {
			return red
		}
		return plain
	}}
	if head {
		t.head = []string{"LAST", "TIMES", "STATUS", "REASON", "POD", "PROCESS", "TOKEN OF"}
		if c.wide() {
			t.head = append(t.head, "CGROUP", "PEER", "TOKEN ID", "DETAIL")
		}
	}
	for _, d := range all {
		pod := d.Pod
		switch {
		case d.Pod != "":
			pod = d.Namespace + "/" + d.Pod
		case d.PodUID != "":
			pod = d.PodUID
		case d.Finding != "pod":
			pod = "(" + d.Finding + ")"
		}
		proc := "-"
		if d.PID != 0 {
			proc = fmt.Sprintf("%d %s", d.PID, d.Process)
		}
		token := "-"
		if d.TokenPodUID != "" {
			token = d.TokenNamespace + "/" + d.TokenPod
			if !d.TokenVerified {
				token += "?"
			}
		}
		reason := d.Reason
		if d.Shadow {
			reason = "served despite " + reason
		}
		cells := []string{c.ago(&d.Last), fmt.Sprint(d.Count), fmt.Sprint(d.Status), reason, dash(pod), strings.TrimSpace(proc), token}
		if c.wide() {
			cells = append(cells, dash(d.Cgroup), dash(d.Peer), dash(d.TokenJTI), dash(d.Detail))
		}
		t.add(cells...)
	}
	return t
}

func (c *cli) cacheVerb() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "cache",
		Short: "Show the credentials that the agent holds, and drop or renew them",
		Long: "cache shows for each subject (a pod and its service account) the role, the state and the times of its\n" +
			"credentials; never the credentials. States: fresh; refreshing, queued: being renewed; idle: nobody asks\nfor them; awaiting_token: renewed by the next request, as the token that is kept has expired; failing:\nserved until they expire, since they cannot be renewed; fetching, denied: there are none.",
		Args: commandline.NoArgs,
		Example: "  latchkey cache\n" +
			"  latchkey cache -o json | jq '.entries[] | select(.state == \"failing\") | .last_error'",
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := c.agent().Cache(cmd.Context())
			if err != nil {
				return err
			}
			return c.print(s, func() error { return c.printCache(s) })
		},
	}
	subject := func(use, shortText, long, example string, do func(context.Context, string) (adminapi.CacheChange, error)) *cobra.Command {
		return &cobra.Command{
			Use: use + " SUBJECT", Short: shortText, Long: long + "\n\nSUBJECT is NAMESPACE/SERVICEACCOUNT, for all its pods on this node, or a pod's UID.", Example: example,
			Args: func(cmd *cobra.Command, args []string) error {
				if len(args) != 1 || args[0] == "" {
					return usage(cmd, "takes one SUBJECT: NAMESPACE/SERVICEACCOUNT or a pod UID")
				}
				return nil
			},
			ValidArgsFunction: func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
				s, err := c.agent().Cache(cmd.Context())
				if err != nil || len(args) > 0 {
					return nil, cobra.ShellCompDirectiveNoFileComp
				}
				var out []string
				for _, e := range s.Entries {
					out = append(out, e.Namespace+"/"+e.ServiceAccount)
				}
				slices.Sort(out)
				return slices.Compact(out), cobra.ShellCompDirectiveNoFileComp
			},
			RunE: func(cmd *cobra.Command, args []string) error {
				change, err := do(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				return c.print(change, func() error {
					switch {
					case change.Dropped > 0:
						fmt.Fprintf(c.out, "dropped %d\n", change.Dropped)
					default:
						fmt.Fprintf(c.out, "renewal of %d started, %d wait for the pod's next request\n", change.Started, change.Waiting)
					}
					return nil
				})
			},
		}
	}
	cmd.AddCommand(
		subject("drop", "Forget a subject's credentials; its next request asks EKS Auth",
			"drop makes the agent forget a subject's credentials. What pods hold already stays valid until it expires.", "  latchkey cache drop web/api",
			func(ctx context.Context, s string) (adminapi.CacheChange, error) { return c.agent().DropCached(ctx, s) }),
		subject("refresh", "Renew a subject's credentials now, and keep the old ones until that is done",
			"refresh renews a subject's credentials before they are due, such as after its role was changed.", "  latchkey cache refresh web/api",
			func(ctx context.Context, s string) (adminapi.CacheChange, error) {
				return c.agent().RefreshCached(ctx, s)
			}),
	)
	return cmd
}

func (c *cli) printCache(s adminapi.Cache) error {
	fmt.Fprintf(c.out, "%d entries, %d KiB; %d hits, %d misses; %d calls under way, %d wait; rate ×%.2f\n",
		len(s.Entries), (s.Bytes+1023)/1024, s.Hits, s.Misses, s.InFlight, s.Waiting, s.RateFactor)
	if len(s.Entries) == 0 {
		return nil
	}
	t := &table{head: []string{"NAMESPACE", "SERVICE ACCOUNT", "ROLE", "STATE", "EXPIRES IN", "RENEWED IN", "USED", "TOKEN EXPIRES IN", "LAST ERROR", "POD UID"},
		colour: verdictColour}
	for _, e := range s.Entries {
		last := "-"
		if e.LastError != nil {
			last = strings.TrimSpace(e.LastError.Reason+" "+e.LastError.Code) + ", " + c.ago(e.LastErrorAt)
		}
		role := roleName(e.Role)
		if c.wide() {
			role = e.Role
		}
		renewed := c.until(e.RefreshAt)
		if renewed == "expired" {
			renewed = "due"
		}
		t.add(e.Namespace, e.ServiceAccount, dash(role), e.State, c.until(e.Expires), renewed, c.ago(e.LastUsed), c.until(e.TokenExpires), last, e.PodUID)
	}
	return c.write(t)
}

// tokenReport is what `latchkey token` says.
type tokenReport struct {
	Claims *explain.Claims `json:"claims"`
	// Check is nil if the agent could not be asked.
	Check *adminapi.TokenCheck `json:"check,omitempty"`
}

func (c *cli) tokenVerb() *cobra.Command {
	return &cobra.Command{
		Use:   "token FILE",
		Short: "Show what a token says, and whether the agent would take it",
		Long: "token reads a service-account token from a file (- for standard input), shows its claims, and lets the\n" +
			"agent check it as it would a pod's, up to the verdict. The signature is masked, and the token is not\nshown, kept or sent anywhere else.\n\n" + exitCodes,
		Example: "  latchkey token /proc/4242/root/var/run/secrets/pods.eks.amazonaws.com/serviceaccount/eks-pod-identity-token",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 1 || args[0] == "" {
				return usage(cmd, "takes one FILE that holds a token, or - for standard input")
			}
			return nil
		},
		RunE: c.token,
	}
}

// maxToken is a byte more than the agent takes.
const maxToken = 16<<10 + 1

func (c *cli) token(cmd *cobra.Command, args []string) error {
	in := cmd.InOrStdin()
	if args[0] != "-" {
		f, err := os.Open(args[0])
		if err != nil {
			return usage(cmd, "cannot read FILE: %v", err)
		}
		defer f.Close()
		in = f
	}
	raw, err := io.ReadAll(io.LimitReader(in, maxToken))
	if err != nil {
		return usage(cmd, "cannot read FILE: %v", err)
	}
	var report tokenReport
	if report.Claims, err = explain.ParseClaims(strings.TrimSpace(string(raw))); err != nil {
		return usage(cmd, "FILE %s holds %v", args[0], err)
	}
	check, askErr := c.agent().CheckToken(cmd.Context(), string(raw))
	if askErr == nil {
		report.Check = &check
	}
	if err := c.print(report, func() error { return c.printToken(report) }); err != nil {
		return err
	}
	if askErr != nil {
		return fmt.Errorf("not checked: %w", askErr)
	}
	if !check.Accepted {
		return errBroken
	}
	return nil
}

func (c *cli) printToken(r tokenReport) error {
	k := r.Claims
	when := func(at time.Time) string {
		if at.IsZero() {
			return "-"
		}
		if d := at.Sub(c.now()); d > 0 {
			return at.Format(time.RFC3339) + ", in " + short(d)
		}
		return at.Format(time.RFC3339) + ", " + c.ago(&at)
	}
	t := &table{}
	t.add("algorithm", dash(k.Algorithm))
	t.add("key id", dash(k.KeyID))
	t.add("issuer", dash(k.Issuer))
	t.add("audience", dash(strings.Join(k.Audience, ", ")))
	t.add("subject", dash(k.Subject))
	t.add("pod", qualified(k.Namespace, k.Pod))
	t.add("pod UID", dash(k.PodUID))
	t.add("node", dash(k.Node))
	t.add("token id", dash(k.ID))
	t.add("issued", when(k.IssuedAt))
	t.add("not before", when(k.NotBefore))
	t.add("expires", when(k.Expires))
	t.add("signature", fmt.Sprintf("%d bytes, masked", k.SignatureBytes))
	if r.Check != nil {
		t.add("checked with", r.Check.Keys)
		t.add("audience here", r.Check.Audience)
	}
	if err := c.write(t); err != nil {
		return err
	}
	switch {
	case r.Check == nil:
	case !r.Check.Accepted:
		fmt.Fprintf(c.out, "%s: %s: %s\n", c.paint("refused", red), r.Check.Reason, printable(r.Check.Message))
	case r.Check.Verified:
		fmt.Fprintf(c.out, "%s, its signature was checked\n", c.paint("accepted", green))
	default:
		fmt.Fprintf(c.out, "%s as far as this node can tell; EKS Auth judges it\n", c.paint("accepted", green))
	}
	return nil
}

// bpfReport is what `latchkey bpf` says.
type bpfReport struct {
	AttachedAt string            `json:"attached_at"`
	Pins       string            `json:"pins,omitempty"`
	Objects    []diagnose.Object `json:"objects,omitempty"`
	Hooks      []explain.Hook    `json:"hooks"`
	Below      []explain.Hook    `json:"below,omitempty"`
	Counters   map[string]uint64 `json:"counters"`
	Problems   []string          `json:"problems,omitempty"`
}

func (c *cli) bpfVerb() *cobra.Command {
	return &cobra.Command{
		Use:   "bpf",
		Short: "Show the kernel programs, maps and counters, and who else is at their hooks",
		Long: "bpf shows what the agent has pinned, its counters, and all programs that run when a process below the\n" +
			"agent's cgroup connects: those of the same cgroup and of those above it, in the order in which they run,\nand those that are attached further below, which see some pods only.",
		Args: commandline.NoArgs,
		Example: "  latchkey bpf\n" +
			"  latchkey bpf -o json | jq .counters.no_option",
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := c.agent().Status(cmd.Context())
			if err != nil {
				return err
			}
			if !s.Attesting {
				return fmt.Errorf("%w: this agent has no programs: %s", adminapi.ErrNotFound, s.CannotAttest)
			}
			r := bpfReport{Hooks: []explain.Hook{}, AttachedAt: s.AttachedAt, Pins: s.Pins, Counters: s.BPF}
			problem := func(err error) {
				if err != nil {
					r.Problems = append(r.Problems, err.Error())
				}
			}
			mount, _, err := diagnose.Cgroups("")
			if err == nil && mount == "" {
				err = errors.New("cgroup v2 is not mounted here")
			}
			problem(err)
			if s.Pins != "" {
				r.Objects, err = diagnose.Pinned(s.Pins)
				problem(err)
			}
			if mount != "" {
				r.Hooks, err = diagnose.Hooks(mount, s.AttachedAt, s.Pins)
				problem(err)
				r.Below, err = diagnose.Below(mount, s.AttachedAt, s.Pins)
				problem(err)
				if slices.ContainsFunc(slices.Concat(r.Hooks, r.Below), func(h explain.Hook) bool {
					return slices.ContainsFunc(h.Programs, func(p explain.Program) bool { return !p.Ours && p.Name == "" })
				}) {
					problem(errors.New("the names of others' programs are not seen from here: that takes CAP_SYS_ADMIN; run latchkey on the node itself, as root"))
				}
			}
			return c.print(r, func() error { return c.printBPF(r) })
		},
	}
}

func (c *cli) printBPF(r bpfReport) error {
	fmt.Fprintf(c.out, "attached at cgroup %s, pinned in %s\n\n", r.AttachedAt, dash(r.Pins))
	if len(r.Objects) > 0 {
		t := &table{head: []string{"PINNED", "NAME", "ID", "DETAIL"}}
		for _, o := range r.Objects {
			t.add(o.Kind, o.Name, fmt.Sprint(o.ID), o.Detail)
		}
		if err := c.write(t); err != nil {
			return err
		}
		fmt.Fprintln(c.out)
	}
	hooks := func(head string, all []explain.Hook, ordered bool) error {
		t := &table{head: []string{head, "ORDER", "PROGRAM", "ID", "LINK", "CGROUP", "LOADED", "WHOSE"}, colour: func(column int, text string) colour {
			if column == 7 && text != "Latchkey" {
				return yellow
			}
			return plain
		}}
		for _, h := range all {
			for i, p := range h.Programs {
				whose, order, link := "another's", "-", "-"
				if p.Ours {
					whose = "Latchkey"
				}
				if ordered {
					order = fmt.Sprint(i + 1)
				}
				if p.Link != 0 {
					link = fmt.Sprint(p.Link)
				}
				t.add(h.Name, order, dash(p.Name), fmt.Sprint(p.ID), link, dash(p.Cgroup), c.ago(&p.Loaded), whose)
			}
		}
		return c.write(t)
	}
	if err := hooks("HOOK", r.Hooks, true); err != nil {
		return err
	}
	if len(r.Below) > 0 {
		fmt.Fprintln(c.out)
		if err := hooks("BELOW", r.Below, false); err != nil {
			return err
		}
	}
	fmt.Fprintln(c.out)
	t := &table{head: []string{"COUNTER", "COUNT"}}
	for _, name := range slices.Sorted(maps.Keys(r.Counters)) {
		t.add(name, fmt.Sprint(r.Counters[name]))
	}
	if err := c.write(t); err != nil {
		return err
	}
	for _, p := range r.Problems {
		fmt.Fprintln(c.out, c.paint("warning", yellow)+":", printable(p))
	}
	return nil
}

// doctorReport is what `latchkey doctor` says.
type doctorReport struct {
	Checks []diagnose.Check `json:"checks"`
}

func (c *cli) doctorVerb() *cobra.Command {
	return &cobra.Command{
		Use:   "doctor",
		Short: "Check the node: kernel, programs, addresses, reachability, EKS Auth, clock, what gets in the way",
		Long: "doctor checks what credentials of pods depend on, and says of each ok, warning or failed, with what to do.\n" +
			"It changes nothing. Connections are tried from the node and from the network namespaces of up to three\npods, in children that end at once. What the agent's container may not see is unknown there: on the\nnode itself, as root, nothing is.\n\n" + exitCodes,
		Args: commandline.NoArgs,
		Example: "  latchkey doctor\n" +
			"  latchkey doctor -o json | jq '.checks[] | select(.state != \"ok\")'",
		RunE: func(cmd *cobra.Command, _ []string) error {
			d := &diagnose.Doctor{Agent: c.agent(), Child: c.child}
			people := c.format == formatTable || c.format == formatWide
			if people {
				// As it goes: a check may wait for somebody who does not answer.
				d.Report = func(k diagnose.Check) {
					m := marks[k.State]
					fmt.Fprintf(c.out, "%s%s %-14s%s\n", c.paint(m.text, m.col), strings.Repeat(" ", max(0, 8-len(m.text))), k.Name, printable(k.Text))
					if k.Fix != "" {
						fmt.Fprintf(c.out, "%23s→ %s\n", "", printable(k.Fix))
					}
				}
			}
			checks := d.Run(cmd.Context())
			if !people {
				if err := c.print(doctorReport{checks}, nil); err != nil {
					return err
				}
			}
			if diagnose.Failed(checks) {
				return errBroken
			}
			return cmd.Context().Err()
		},
	}
}

var logLevels = []string{"debug", "info", "warn", "error"}

func (c *cli) logLevelVerb() *cobra.Command {
	return &cobra.Command{
		Use:   "log-level [COMPONENT [LEVEL]]",
		Short: "Show or change how much the agent logs, per component, while it runs",
		Long: "log-level shows the level of each component of the agent's log, or of one, or changes it until the agent\n" +
			"ends. COMPONENT all means every one. LEVEL is debug, info, warn or error.",
		Example: "  latchkey log-level\n  latchkey log-level cache debug\n  latchkey log-level all info",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 2 {
				return usage(cmd, "takes a COMPONENT and a LEVEL")
			}
			if len(args) == 2 && !slices.Contains(logLevels, args[1]) {
				return usage(cmd, "level %q: use debug, info, warn or error", args[1])
			}
			return nil
		},
		ValidArgsFunction: func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			if len(args) == 1 {
				return logLevels, cobra.ShellCompDirectiveNoFileComp
			}
			l, err := c.agent().LogLevels(cmd.Context())
			if err != nil || len(args) > 1 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			return append(slices.Sorted(maps.Keys(l.Levels)), "all"), cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			var levels adminapi.LogLevels
			var err error
			if len(args) == 2 {
				levels, err = c.agent().SetLogLevel(cmd.Context(), adminapi.LogLevel{Component: args[0], Level: args[1]})
			} else {
				levels, err = c.agent().LogLevels(cmd.Context())
			}
			if err != nil {
				return err
			}
			if len(args) > 0 && args[0] != "all" {
				level, ok := levels.Levels[args[0]]
				if !ok {
					return usage(cmd, "component %q: use %s or all", args[0], strings.Join(slices.Sorted(maps.Keys(levels.Levels)), ", "))
				}
				levels.Levels = map[string]string{args[0]: level}
			}
			return c.print(levels, func() error {
				t := &table{head: []string{"COMPONENT", "LEVEL"}}
				for _, name := range slices.Sorted(maps.Keys(levels.Levels)) {
					t.add(name, levels.Levels[name])
				}
				return c.write(t)
			})
		},
	}
}
