// SPDX-License-Identifier: Apache-2.0

// Command latchkey is the debug CLI: it asks the agent on this node, over its
// admin socket, which pod maps to which role and why.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/latchkey-dev/latchkey/pkg/adminapi"
	"github.com/latchkey-dev/latchkey/pkg/commandline"
)

// version is set by the linker.
var version string

// Exit codes, for scripts.
const (
	exitOK       = 0
	exitFailed   = 1 // the agent could not be asked
	exitUsage    = 2 // the command line or the query makes no sense
	exitNotFound = 3 // the agent knows nothing of it
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := newRoot(os.Stdout, time.Now).ExecuteContext(ctx)
	if err != nil {
		fmt.Fprintln(os.Stderr, "latchkey:", err)
	}
	os.Exit(exitCode(err))
}

func exitCode(err error) int {
	var usage commandline.UsageError
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &usage), errors.Is(err, adminapi.ErrInvalid):
		return exitUsage
	case errors.Is(err, adminapi.ErrNotFound):
		return exitNotFound
	}
	return exitFailed
}

type cli struct {
	out    io.Writer
	now    func() time.Time
	socket string
	format string
}

func newRoot(out io.Writer, now func() time.Time) *cobra.Command {
	c := &cli{out: out, now: now}
	root := commandline.Root(out, "latchkey", "Show which pod of this node maps to which role, and why",
		"latchkey asks the latchkey-agent of this node, over its admin socket (root only).\nIt never shows a secret or a token.\n\nExit codes: 0 done, 1 the agent could not be asked, 2 usage, 3 nothing found.",
		commandline.Version(version))
	root.PersistentFlags().StringVar(&c.socket, "admin-socket", adminapi.DefaultSocket, "the agent's admin `socket`")

	pods := &cobra.Command{
		Use:   "pods",
		Short: "List the node's pods: service account, role, credentials, last verdict",
		Args:  commandline.NoArgs,
		Example: "  latchkey pods\n" +
			"  latchkey pods -o json | jq '.pods[] | select(.credentials == \"valid\") | .role'",
		RunE: c.pods,
	}
	whois := &cobra.Command{
		Use:   "whois QUERY",
		Short: "Say which pod a process, connection, cgroup or UID is",
		Long: "QUERY is one of\n" +
			"  a process id of the node, such as 4242\n" +
			"  the client end of a connection to the agent, such as 10.88.0.2:41234 or [fd00:88::2]:41234\n" +
			"  a cgroup path, such as /kubepods.slice/kubepods-pod….slice\n" +
			"  a cgroup id, such as cgroup:12345\n" +
			"  a pod UID",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 1 || args[0] == "" {
				return commandline.UsageError{Err: errors.New("whois takes one QUERY: a pid, ip:port, cgroup path, cgroup:ID or pod UID; see latchkey whois --help")}
			}
			return nil
		},
		RunE: c.whois,
	}
	status := &cobra.Command{
		Use:   "status",
		Short: "Show the agent: what it attests, listens on and checks tokens with",
		Args:  commandline.NoArgs,
		RunE:  c.status,
	}
	for _, cmd := range []*cobra.Command{pods, whois, status} {
		cmd.Flags().StringVarP(&c.format, "output", "o", "table", "`format`: table or json")
		_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"table", "json"}, cobra.ShellCompDirectiveNoFileComp))
		root.AddCommand(cmd)
	}
	return root
}

func (c *cli) json() (bool, error) {
	switch c.format {
	case "json":
		return true, nil
	case "table":
		return false, nil
	}
	return false, commandline.UsageError{Err: fmt.Errorf("unknown output format %q: use table or json", c.format)}
}

func (c *cli) printJSON(v any) error {
	enc := json.NewEncoder(c.out)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}

func (c *cli) pods(cmd *cobra.Command, _ []string) error {
	asJSON, err := c.json()
	if err != nil {
		return err
	}
	pods, err := adminapi.NewClient(c.socket).Pods(cmd.Context())
	if err != nil {
		return err
	}
	if asJSON {
		return c.printJSON(adminapi.Pods{Pods: pods})
	}
	if len(pods) == 0 {
		fmt.Fprintln(c.out, "No pods on this node.")
		return nil
	}
	w := tabwriter.NewWriter(c.out, 0, 4, 2, ' ', 0)
	fmt.Fprintln(w, "NAMESPACE\tPOD\tSERVICE ACCOUNT\tROLE\tCREDENTIALS\tEXPIRES IN\tLAST VERDICT\tPOD UID")
	for _, p := range pods {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", dash(p.Namespace), dash(p.Name), dash(p.ServiceAccount),
			dash(roleName(p.Role)), p.Credentials, c.until(p.Expires), c.verdict(p), p.UID)
	}
	return w.Flush()
}

func (c *cli) whois(cmd *cobra.Command, args []string) error {
	asJSON, err := c.json()
	if err != nil {
		return err
	}
	who, err := adminapi.NewClient(c.socket).Whois(cmd.Context(), args[0])
	if err != nil {
		return err
	}
	if asJSON {
		return c.printJSON(who)
	}
	w := tabwriter.NewWriter(c.out, 0, 4, 2, ' ', 0)
	for _, s := range who.Steps {
		fmt.Fprintf(w, "%s\t%s\t(%s)\n", s.What, s.Value, s.Source)
	}
	if p := who.Pod; p != nil {
		fmt.Fprintf(w, "pod\t%s\t\n", p.UID)
		fmt.Fprintf(w, "service account\t%s\t\n", dash(strings.Trim(p.Namespace+"/"+p.ServiceAccount, "/")))
		fmt.Fprintf(w, "role\t%s\t\n", dash(p.Role))
		fmt.Fprintf(w, "credentials\t%s\t\n", p.Credentials)
		fmt.Fprintf(w, "last verdict\t%s\t\n", c.verdict(*p))
	}
	return w.Flush()
}

func (c *cli) status(cmd *cobra.Command, _ []string) error {
	asJSON, err := c.json()
	if err != nil {
		return err
	}
	s, err := adminapi.NewClient(c.socket).Status(cmd.Context())
	if err != nil {
		return err
	}
	if asJSON {
		return c.printJSON(s)
	}
	w := tabwriter.NewWriter(c.out, 0, 4, 2, ' ', 0)
	attesting := "no"
	if s.Attesting {
		attesting = "yes"
	}
	fmt.Fprintf(w, "version\t%s\nrunning for\t%s\ncluster\t%s\nattestation\t%s\nkernel attests\t%s\ntoken keys\t%s\nkubepods cgroup\t%s\nattached at\t%s\n",
		s.Version, c.now().Sub(s.Started).Round(time.Second), s.Cluster, s.Attestation, attesting, s.Keys, dash(s.Kubepods), dash(s.AttachedAt))
	for ns, mode := range s.Exceptions {
		fmt.Fprintf(w, "attestation of %s\t%s\n", ns, mode)
	}
	for _, f := range s.Fallbacks {
		fmt.Fprintf(w, "fallback\t%s\n", f)
	}
	for _, l := range s.Listeners {
		state := "serving"
		if !l.Serving {
			state = "not serving: " + l.Error
		}
		fmt.Fprintf(w, "%s\t%s\n", l.Address, state)
	}
	return w.Flush()
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// roleName is the last part of a role's ARN; the whole is in -o json.
func roleName(arn string) string {
	if _, name, ok := strings.Cut(arn, ":role/"); ok {
		return name
	}
	if _, name, ok := strings.Cut(arn, ":assumed-role/"); ok {
		role, _, _ := strings.Cut(name, "/")
		return role
	}
	return arn
}

func (c *cli) until(t *time.Time) string {
	if t == nil {
		return "-"
	}
	d := t.Sub(c.now()).Round(time.Second)
	if d <= 0 {
		return "expired"
	}
	return d.String()
}

func (c *cli) verdict(p adminapi.Pod) string {
	v := dash(p.Verdict)
	if p.LastAsked != nil {
		v += fmt.Sprintf(", %s ago", c.now().Sub(*p.LastAsked).Round(time.Second))
	}
	if p.Ended {
		v += " (pod has ended)"
	}
	return v
}
