// SPDX-License-Identifier: Apache-2.0

// Command latchkey is the debug CLI: it asks the agent on this node, over its
// admin socket, which pod maps to which role and why, and where that fails.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/latchkey-dev/latchkey/pkg/adminapi"
	"github.com/latchkey-dev/latchkey/pkg/commandline"
	"github.com/latchkey-dev/latchkey/pkg/diagnose"
)

// version is set by the linker.
var version string

// Exit codes, for scripts; exitCodes says them to people.
const (
	exitOK       = 0
	exitFailed   = 1 // the agent could not be asked
	exitUsage    = 2 // the command line or the query makes no sense
	exitNotFound = 3 // the agent knows nothing of it
	exitBroken   = 4 // asked and answered: something is wrong
)

const exitCodes = "Exit codes: 0 done, and nothing is wrong; 1 the agent could not be asked; 2 the command line or\n" +
	"the query makes no sense; 3 nothing was found; 4 explain found a cause, doctor a failure, or token\na token that is refused."

// errBroken ends with exitBroken. What is wrong has been said.
var errBroken = errors.New("something is wrong")

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := noToken(os.Args[1:])
	if err == nil {
		err = newRoot(os.Stdout, time.Now).ExecuteContext(ctx)
	}
	if err != nil && !errors.Is(err, errBroken) {
		fmt.Fprintln(os.Stderr, "latchkey:", err)
	}
	os.Exit(exitCode(err))
}

// noToken refuses a command line that holds a token, before any message can
// quote it.
func noToken(args []string) error {
	for _, a := range args {
		if strings.Contains(a, "eyJ") && strings.Count(a, ".") >= 2 {
			return commandline.UsageError{Err: errors.New("an argument is a token, which others can read in the list of processes: put it in a file, and use latchkey token FILE")}
		}
	}
	return nil
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
	case errors.Is(err, errBroken):
		return exitBroken
	}
	return exitFailed
}

// cli is what all verbs share.
type cli struct {
	out    io.Writer
	now    func() time.Time
	socket string
	format string
	colour bool
	// child tries connections in network namespaces: see diagnose.Child.
	child diagnose.Child
}

func newRoot(out io.Writer, now func() time.Time) *cobra.Command {
	c := &cli{out: out, now: now, colour: colourful(out), child: diagnose.Child{Command: []string{"/proc/self/exe", reachVerb}}}
	root := commandline.Root(out, "latchkey", "Show which pod of this node maps to which role, and why",
		"latchkey asks the latchkey-agent of this node, over its admin socket (root only). It never shows a\nsecret or a token.\n\n"+
			"Start with explain POD when a pod gets no credentials, and with doctor when none does.\n\n"+
			"Tables are for people; -o json and -o yaml are for scripts, and their names stay (docs/cli/json.md lists\nthem). Colour is used on a terminal only, and not if NO_COLOR is set.\n\n"+exitCodes,
		commandline.Version(version))
	root.PersistentFlags().StringVar(&c.socket, "admin-socket", adminapi.DefaultSocket, "the agent's admin `socket`")
	verbs := []*cobra.Command{
		c.podsVerb(), c.explainVerb(), c.whoisVerb(), c.denialsVerb(), c.cacheVerb(), c.tokenVerb(),
		c.bpfVerb(), c.doctorVerb(), c.logLevelVerb(), c.statusVerb(),
	}
	for _, v := range verbs {
		v.PersistentFlags().StringVarP(&c.format, "output", "o", formatTable, "`format`: table, wide, json or yaml")
		_ = v.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(formats, cobra.ShellCompDirectiveNoFileComp))
		if v.ValidArgsFunction == nil && v.Name() != "token" {
			// Else the shell offers files.
			v.ValidArgsFunction = cobra.NoFileCompletions
		}
		check := v.PreRunE
		v.PersistentPreRunE = func(cmd *cobra.Command, args []string) error {
			if err := c.checkFormat(); err != nil {
				return err
			}
			if c.socket == "" {
				return usage(cmd, "--admin-socket is empty: give the path of the agent's socket, or leave it out")
			}
			if check != nil {
				return check(cmd, args)
			}
			return nil
		}
		root.AddCommand(v)
	}
	root.AddCommand(reachCommand(out))
	root.InitDefaultCompletionCmd()
	for _, sub := range root.Commands() {
		if sub.Name() == "completion" {
			strictCompletion(sub)
		}
	}
	return root
}

// strictCompletion refuses what cobra's own command answers with its help, or
// with another exit code than ours.
func strictCompletion(cmd *cobra.Command) {
	var shells []string
	for _, sub := range cmd.Commands() {
		sub.Args = commandline.NoArgs
		shells = append(shells, sub.Name())
	}
	cmd.Args = nil
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return cmd.Help()
		}
		return usage(cmd, "%q: use %s", args[0], strings.Join(shells, ", "))
	}
}

func (c *cli) agent() *adminapi.Client { return adminapi.NewClient(c.socket) }

// reachVerb is what the CLI executes itself with to enter a network namespace.
const reachVerb = "reach-from"

func reachCommand(out io.Writer) *cobra.Command {
	return &cobra.Command{
		Use: reachVerb + " NETNS ADDRESS...", Hidden: true, Short: "Try connections from a network namespace",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) < 2 {
				return usage(cmd, "takes the file of a network namespace and addresses, ip:port")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return diagnose.ReachFrom(cmd.Context(), out, args[0], args[1:])
		},
	}
}

// usage is a command line that cannot be understood, and what was expected.
func usage(cmd *cobra.Command, format string, args ...any) error {
	return commandline.UsageError{Err: fmt.Errorf("%s %s; see %s --help", cmd.Name(), fmt.Sprintf(format, args...), cmd.CommandPath())}
}

// oneOf refuses a flag's value that is none of these.
func oneOf(cmd *cobra.Command, flag, value string, allowed []string) error {
	for _, a := range allowed {
		if value == a {
			return nil
		}
	}
	last := len(allowed) - 1
	return usage(cmd, "--%s %q: use %s or %s", flag, value, strings.Join(allowed[:last], ", "), allowed[last])
}

// oneQuery wants one argument that names a pod, process or connection.
func oneQuery(cmd *cobra.Command, args []string) error {
	if len(args) != 1 || args[0] == "" {
		return usage(cmd, "takes one QUERY: a pid, ip:port, cgroup path, cgroup:ID, container id, pod UID or NAMESPACE/POD")
	}
	return nil
}

const queryHelp = "QUERY is one of\n" +
	"  a pod, as NAMESPACE/POD, by its name alone if that is unique, or by its UID\n" +
	"  a process id of the node, such as 4242\n" +
	"  the client end of a connection to the agent, such as 10.88.0.2:41234 or [fd00:88::2]:41234\n" +
	"  a cgroup path, such as /kubepods.slice/kubepods-pod….slice, or a cgroup id, such as cgroup:12345\n" +
	"  a container id, whole or its beginning"

// completePods offers the pods' names.
func (c *cli) completePods(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	pods, err := c.agent().Pods(cmd.Context())
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var out []string
	for _, p := range pods {
		out = append(out, podQuery(p))
	}
	return out, cobra.ShellCompDirectiveNoFileComp
}

// podQuery names a pod as it can be asked after.
func podQuery(p adminapi.Pod) string {
	if p.Name == "" {
		return p.UID
	}
	return qualified(p.Namespace, p.Name)
}

// completeFlags offers for each flag what the node's pods have there.
func (c *cli) completeFlags(cmd *cobra.Command, flags map[string]func(adminapi.Pod) string) {
	for name, value := range flags {
		_ = cmd.RegisterFlagCompletionFunc(name, func(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
			pods, err := c.agent().Pods(cmd.Context())
			if err != nil {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			var out []string
			for _, p := range pods {
				if v := value(p); v != "" {
					out = append(out, v)
				}
			}
			slices.Sort(out)
			return slices.Compact(out), cobra.ShellCompDirectiveNoFileComp
		})
	}
}
