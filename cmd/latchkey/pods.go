// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/latchkey-dev/latchkey/pkg/adminapi"
	"github.com/latchkey-dev/latchkey/pkg/commandline"
)

// podFilter is what pods are chosen and ordered by.
type podFilter struct {
	namespace, serviceAccount, role, state, sort string
}

var (
	podStates = []string{"none", "fetching", "valid", "failing", "denied"}
	podSorts  = []string{"namespace", "name", "service-account", "role", "state", "expires", "asked"}
)

func (c *cli) podsVerb() *cobra.Command {
	var f podFilter
	var watch watcher
	cmd := &cobra.Command{
		Use:   "pods",
		Short: "List the node's pods: service account, role, credentials, last verdict",
		Long: "pods shows for each pod of this node the service account that its token names, the role and the\n" +
			"association that EKS Auth gave for it, how long its credentials last, and what became of its last\nrequest. A pod that has not asked shows dashes; a pod whose names the container runtime tells has them\nbefore it asks. -o wide adds the association, the QoS class, the containers and the cgroup.",
		Args: commandline.NoArgs,
		Example: "  latchkey pods -n web --state failing\n" +
			"  latchkey pods --sort expires --watch\n" +
			"  latchkey pods -o json | jq '.pods[] | select(.credentials == \"valid\") | .role'",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if f.state != "" {
				if err := oneOf(cmd, "state", f.state, podStates); err != nil {
					return err
				}
			}
			if err := oneOf(cmd, "sort", f.sort, podSorts); err != nil {
				return err
			}
			if err := watch.check(cmd); err != nil {
				return err
			}
			if watch.on {
				return c.watchPods(cmd.Context(), f, watch)
			}
			pods, err := c.agent().Pods(cmd.Context())
			if err != nil {
				return err
			}
			return c.printPods(f, pods)
		},
	}
	fl := cmd.Flags()
	fl.StringVarP(&f.namespace, "namespace", "n", "", "only pods of this `namespace`")
	fl.StringVar(&f.serviceAccount, "service-account", "", "only pods of this service `account`")
	fl.StringVar(&f.role, "role", "", "only pods with this `role`, by its name or ARN")
	fl.StringVar(&f.state, "state", "", "only pods whose credentials are in this `state`: none, fetching, valid, failing or denied")
	fl.StringVar(&f.sort, "sort", "namespace", "order by `column`: namespace, name, service-account, role, state, expires or asked")
	watch.flags(cmd)
	c.completeFlags(cmd, map[string]func(adminapi.Pod) string{
		"namespace": podNamespace, "service-account": func(p adminapi.Pod) string { return p.ServiceAccount }, "role": func(p adminapi.Pod) string { return roleName(p.Role) },
	})
	_ = cmd.RegisterFlagCompletionFunc("state", cobra.FixedCompletions(podStates, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("sort", cobra.FixedCompletions(podSorts, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// choose filters and sorts.
func (f podFilter) choose(pods []adminapi.Pod) []adminapi.Pod {
	pods = slices.DeleteFunc(pods, func(p adminapi.Pod) bool {
		return f.namespace != "" && p.Namespace != f.namespace || f.serviceAccount != "" && p.ServiceAccount != f.serviceAccount ||
			f.role != "" && p.Role != f.role && roleName(p.Role) != f.role || f.state != "" && p.Credentials != f.state
	})
	// Who is not there yet comes last.
	when := func(t *time.Time) int64 {
		if t == nil {
			return 1<<63 - 1
		}
		return t.UnixNano()
	}
	slices.SortFunc(pods, func(a, b adminapi.Pod) int {
		first := 0
		switch f.sort {
		case "name":
			first = cmp.Compare(a.Name, b.Name)
		case "service-account":
			first = cmp.Compare(a.ServiceAccount, b.ServiceAccount)
		case "role":
			first = cmp.Compare(a.Role, b.Role)
		case "state":
			first = cmp.Compare(a.Credentials, b.Credentials)
		case "expires":
			first = cmp.Compare(when(a.Expires), when(b.Expires))
		case "asked":
			// The latest first, and who never asked last.
			if a.LastAsked != nil && b.LastAsked != nil {
				first = b.LastAsked.Compare(*a.LastAsked)
			} else {
				first = cmp.Compare(when(a.LastAsked), when(b.LastAsked))
			}
		}
		if first != 0 {
			return first
		}
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name), cmp.Compare(a.UID, b.UID))
	})
	return pods
}

func podNamespace(p adminapi.Pod) string { return p.Namespace }

func (c *cli) printPods(f podFilter, all []adminapi.Pod) error {
	there := len(all)
	pods := f.choose(all)
	return c.print(adminapi.Pods{Pods: pods}, func() error {
		if len(pods) == 0 {
			switch there {
			case 0:
				fmt.Fprintln(c.out, "No pods on this node.")
			default:
				fmt.Fprintf(c.out, "No pod matches, of %d on this node. Namespace and service account are known once a pod has\npresented a token; the namespace also from the container runtime.\n", there)
			}
			return nil
		}
		return c.write(c.podTable(pods, true))
	})
}

func (c *cli) podTable(pods []adminapi.Pod, head bool) *table {
	t := &table{colour: verdictColour, rows: make([][]string, 0, len(pods))}
	if head {
		t.head = []string{"NAMESPACE", "POD", "SERVICE ACCOUNT", "ROLE", "CREDENTIALS", "EXPIRES IN", "LAST VERDICT", "POD UID"}
		if c.wide() {
			t.head = []string{"NAMESPACE", "POD", "SERVICE ACCOUNT", "ROLE", "ASSOCIATION", "CREDENTIALS", "EXPIRES IN", "LAST VERDICT", "QOS", "CONTAINERS", "CGROUP", "POD UID"}
		}
	}
	for _, p := range pods {
		if c.wide() {
			t.add(dash(p.Namespace), dash(p.Name), dash(p.ServiceAccount), dash(p.Role), dash(p.Association), p.Credentials,
				c.until(p.Expires), c.verdict(p), dash(p.QoS), dash(strings.Join(p.Containers, ",")), dash(p.Cgroup), p.UID)
			continue
		}
		t.add(dash(p.Namespace), dash(p.Name), dash(p.ServiceAccount), dash(roleName(p.Role)), p.Credentials,
			c.until(p.Expires), c.verdict(p), p.UID)
	}
	return t
}

func verdictColour(_ int, text string) colour {
	switch {
	case strings.HasPrefix(text, "refused"), text == "denied", text == "expired":
		return red
	case text == "failing", strings.HasPrefix(text, "served despite"):
		return yellow
	case text == "valid":
		return green
	}
	return plain
}

func (c *cli) verdict(p adminapi.Pod) string {
	v := dash(p.Verdict)
	if p.LastAsked != nil {
		v += ", " + c.ago(p.LastAsked)
	}
	if p.Ended {
		v += " (pod has ended)"
	}
	return v
}

// watchPods shows the pods anew: on a terminal all of them, else what changed.
func (c *cli) watchPods(ctx context.Context, f podFilter, w watcher) error {
	before := map[string]adminapi.Pod{}
	first := true
	var widths []int
	return w.each(ctx, func() error {
		pods, err := c.agent().Pods(ctx)
		if err != nil {
			return err
		}
		if terminal(c.out) && c.format != formatJSON && c.format != formatYAML {
			fmt.Fprint(c.out, "\x1b[H\x1b[2J")
			return c.printPods(f, pods)
		}
		pods = f.choose(pods)
		now := make(map[string]adminapi.Pod, len(pods))
		var changed []adminapi.Pod
		for _, p := range pods {
			now[p.UID] = p
			if old, known := before[p.UID]; !known || !reflect.DeepEqual(old, p) {
				changed = append(changed, p)
			}
		}
		for uid, p := range before {
			if _, there := now[uid]; !there {
				p.Ended = true
				changed = append(changed, p)
			}
		}
		before = now
		defer func() { first = false }()
		if c.format == formatJSON || c.format == formatYAML {
			return c.printLines(toAny(changed))
		}
		if len(changed) == 0 && !first {
			return nil
		}
		t := c.podTable(changed, first)
		t.widths = widths
		err = c.write(t)
		widths = t.widths
		return err
	})
}

func toAny[T any](all []T) []any {
	out := make([]any, 0, len(all))
	for _, v := range all {
		out = append(out, v)
	}
	return out
}

// printLines writes one document for each, as a stream's reader wants them.
func (c *cli) printLines(all []any) error {
	for _, v := range all {
		if c.format == formatYAML {
			fmt.Fprintln(c.out, "---")
			if err := c.print(v, nil); err != nil {
				return err
			}
			continue
		}
		if err := json.NewEncoder(c.out).Encode(v); err != nil {
			return err
		}
	}
	return nil
}

// watcher is the flags of verbs that go on.
type watcher struct {
	on       bool
	interval time.Duration
}

func (w *watcher) flags(cmd *cobra.Command) {
	cmd.Flags().BoolVarP(&w.on, "watch", "w", false, "go on, and show what changes, until interrupted")
	cmd.Flags().DurationVar(&w.interval, "interval", 2*time.Second, "how often --watch looks")
}

func (w *watcher) check(cmd *cobra.Command) error {
	if w.interval < 100*time.Millisecond {
		return usage(cmd, "--interval %s: give 100ms or more", w.interval)
	}
	return nil
}

// each calls f until it fails or ctx ends, which is no error.
func (w *watcher) each(ctx context.Context, f func() error) error {
	tick := time.NewTicker(w.interval)
	defer tick.Stop()
	for {
		if err := f(); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}
