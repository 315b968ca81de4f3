// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/latchkey-dev/latchkey/pkg/adminapi"
	"github.com/latchkey-dev/latchkey/pkg/diagnose"
	"github.com/latchkey-dev/latchkey/pkg/explain"
)

func (c *cli) explainVerb() *cobra.Command {
	var probe bool
	cmd := &cobra.Command{
		Use:   "explain QUERY",
		Short: "Say why a pod gets the credentials it gets, or none, and what to do",
		Long: "explain goes the way from a process to its credentials: process, cgroup, pod, address, kernel programs,\n" +
			"connection, token, verdict, association, role, credentials. Each step says what was found, where that is\nfrom and how old it is. The first that failed is the cause, and the last line names it.\n\n" +
			"It looks at the environment and at the token file of the pod's processes, lets the agent check that token\n(it is not shown, and sent nowhere else), and tries a connection to the agent from the pod's network\nnamespace, in a child that ends at once. With --probe the child is also put into the pod's cgroup: that is\nthe whole way of a pod's connection, and counts as the pod's for as long as it lasts.\n\n" +
			queryHelp + "\n\n" + exitCodes,
		Args:              oneQuery,
		ValidArgsFunction: c.completePods,
		Example:           "  latchkey explain web/api-5c9f7d\n  latchkey explain 4242 -o json | jq -r .cause.code",
		RunE: func(cmd *cobra.Command, args []string) error {
			in, err := c.gather(cmd.Context(), args[0], probe)
			if err != nil {
				return err
			}
			e := explain.Explain(in)
			if err := c.print(e, func() error { return c.printExplanation(e) }); err != nil {
				return err
			}
			if e.Cause.Broken() {
				return errBroken
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&probe, "probe", false, "also try a connection from within the pod's cgroup")
	return cmd
}

// gather asks the agent, and looks at the node. What cannot be had is left
// out.
func (c *cli) gather(ctx context.Context, query string, probe bool) (explain.Input, error) {
	in := explain.Input{Query: query, Now: c.now()}
	facts, err := c.agent().Facts(ctx, query)
	switch {
	case errors.Is(err, adminapi.ErrNotFound), errors.Is(err, adminapi.ErrInvalid):
		return in, err
	case err != nil:
		in.AgentError = err.Error()
	default:
		in.Facts = &facts
	}
	in.Node.CgroupV2, in.Node.CgroupV1, _ = diagnose.Cgroups("")
	if in.Facts == nil {
		in.Node.MissingFeatures, _ = diagnose.MissingFeatures()
		in.Node.PortHolder, _ = diagnose.PortHolder("", defaultHosts(), 80, 0)
		return in, nil
	}
	var addresses []string
	var hosts []netip.Addr
	port := uint16(80)
	for _, l := range facts.Status.Listeners {
		if at, err := netip.ParseAddrPort(l.Address); err == nil {
			hosts, port = append(hosts, at.Addr()), at.Port()
			addresses = append(addresses, l.Address)
		}
	}
	// Only who stands where the agent does may say that something is missing.
	if diagnose.SameNetns(facts.Status.Netns) {
		if missing, err := diagnose.MissingAddresses(hosts); err == nil {
			for _, a := range missing {
				in.Node.MissingAddresses = append(in.Node.MissingAddresses, a.String())
			}
		}
		in.Node.PortHolder, _ = diagnose.PortHolder("", hosts, port, facts.Status.PID)
	}
	if r, err := c.agent().ReachUpstream(ctx); err == nil {
		in.Upstream = &r
	}
	mount := in.Node.CgroupV2
	at := facts.Status.AttachedAt
	live := facts.Pod != nil && !facts.Pod.Ended && facts.Pod.Cgroup != ""
	if live {
		at = facts.Pod.Cgroup
	}
	if facts.Status.Attesting && !diagnose.SameCgroups(mount, facts.Status.AttachedAt, facts.Status.AttachedID) {
		in.HooksError, mount = diagnose.ErrElsewhere.Error(), ""
	}
	if facts.Status.Attesting && mount != "" {
		if in.Hooks, err = diagnose.Hooks(mount, at, facts.Status.Pins); err != nil {
			in.HooksError = err.Error()
		}
	}
	if live && mount != "" {
		c.lookIntoPod(ctx, &in, filepath.Join(mount, facts.Pod.Cgroup), addresses, probe)
	}
	return in, nil
}

// lookIntoPod adds what the pod's processes were given, and what becomes of
// connections from its network namespace.
func (c *cli) lookIntoPod(ctx context.Context, in *explain.Input, dir string, addresses []string, probe bool) {
	pids, err := diagnose.Processes(dir)
	if err != nil || len(pids) == 0 {
		return
	}
	// A process that was asked after speaks for itself.
	if p := in.Facts.Process; p != nil && in.Facts.Kind == "process" {
		pids = append([]int{p.PID}, pids...)
	}
	var token string
	if in.Injection, token = diagnose.FindInjection("", pids); token != "" {
		in.Injection.Claims, _ = explain.ParseClaims(token)
		if check, err := c.agent().CheckToken(ctx, token); err == nil {
			in.Injection.Token = &check
		}
	}
	pid := in.Facts.Sandbox
	if pid == 0 {
		pid = pids[0]
	}
	netns := filepath.Join("/proc", strconv.Itoa(pid), "ns", "net")
	if in.Reach, err = c.child.Reach(ctx, netns, "", addresses...); err != nil {
		in.Reach = nil
		if errors.Is(err, diagnose.ErrNotPermitted) {
			// The probe would fail the same.
			in.ReachError = err.Error() + "; run latchkey on the node itself, as root"
			return
		}
	}
	leaf := ""
	if probe {
		leaf = diagnose.Leaf(dir)
	}
	if leaf == "" {
		return
	}
	used := defaultHosts()[0]
	if j := in.Injection; j != nil {
		if u, err := url.Parse(j.URI); err == nil {
			if told, err := netip.ParseAddr(u.Hostname()); err == nil {
				used = told
			}
		}
	}
	for _, a := range addresses {
		if at, err := netip.ParseAddrPort(a); err != nil || at.Addr() != used {
			continue
		}
		got, err := c.child.Reach(ctx, netns, leaf, a)
		if err != nil || len(got) == 0 {
			return
		}
		in.Probe = &got[0]
		in.Probe.Attested = "nobody"
		if who, err := c.agent().Whois(ctx, got[0].Local); err == nil && who.Pod != nil {
			in.Probe.Attested = who.Pod.UID
		}
	}
}

func defaultHosts() []netip.Addr {
	return []netip.Addr{netip.MustParseAddr("169.254.170.23"), netip.MustParseAddr("fd00:ec2::23")}
}

// marks stand before the steps of a table.
var marks = map[explain.State]struct {
	text string
	col  colour
}{
	explain.OK: {"ok", green}, explain.Warn: {"warning", yellow}, explain.Fail: {"FAILED", red},
	explain.Unknown: {"unknown", dim},
}

func markColour(column int, text string) colour {
	if column != 0 {
		return plain
	}
	for _, m := range marks {
		if m.text == text {
			return m.col
		}
	}
	return plain
}

// printExplanation ends with the cause, so that it is the last thing that is
// read.
func (c *cli) printExplanation(e explain.Explanation) error {
	fmt.Fprintln(c.out, c.paint(printable(e.About), bold))
	t := &table{colour: markColour}
	var behind []string
	for _, s := range e.Steps {
		if s.State == explain.NotReached {
			behind = append(behind, s.Name)
			continue
		}
		source := ""
		if s.Source != "" {
			source = "(" + s.Source
			if !s.At.IsZero() {
				source += ", " + c.ago(&s.At)
			}
			source += ")"
		}
		t.add(marks[s.State].text, s.Name, strings.TrimSpace(s.Text+"  "+source))
	}
	if err := c.write(t); err != nil {
		return err
	}
	if len(behind) > 0 {
		fmt.Fprintln(c.out, c.paint("not reached: "+strings.Join(behind, ", "), dim))
	}
	for _, f := range e.Cause.Fix {
		fmt.Fprintln(c.out, "do:   ", printable(f))
	}
	col := green
	if e.Cause.Broken() {
		col = red
	} else if e.Cause.Code != explain.None {
		col = yellow
	}
	fmt.Fprintf(c.out, "cause: %s: %s\n", c.paint(string(e.Cause.Code), col), printable(e.Cause.Text))
	return nil
}

func (c *cli) whoisVerb() *cobra.Command {
	return &cobra.Command{
		Use:               "whois QUERY",
		Short:             "Say which pod a process, connection, cgroup or container is",
		Long:              "whois follows the kernel's evidence from what is asked to a pod, as far as it goes.\n\n" + queryHelp,
		Args:              oneQuery,
		ValidArgsFunction: c.completePods,
		Example:           "  latchkey whois 4242\n  latchkey whois 10.88.0.2:41234 -o json",
		RunE: func(cmd *cobra.Command, args []string) error {
			who, err := c.agent().Whois(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return c.print(who, func() error {
				t := &table{}
				for _, s := range who.Steps {
					t.add(s.What, s.Value+"  ("+s.Source+")")
				}
				if p := who.Pod; p != nil {
					t.add("pod", p.UID)
					if p.Name != "" {
						t.add("name", p.Namespace+"/"+p.Name)
					}
					t.add("service account", qualified(p.Namespace, p.ServiceAccount))
					t.add("role", dash(p.Role))
					t.add("credentials", p.Credentials)
					t.add("last verdict", c.verdict(*p))
				}
				return c.write(t)
			})
		},
	}
}
