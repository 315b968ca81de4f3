// SPDX-License-Identifier: Apache-2.0

// Command latchkey-server is the cluster half of Latchkey: it gives clusters
// that are not EKS the pod identity associations and the EKS Auth API that EKS
// has. Clients are the AWS CLI, every AWS SDK and Terraform, with an endpoint
// URL.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"sigs.k8s.io/yaml"

	"github.com/latchkey-dev/latchkey/pkg/commandline"
	"github.com/latchkey-dev/latchkey/pkg/permission"
	"github.com/latchkey-dev/latchkey/pkg/server"
)

// version is set by the linker.
var version string

// Exit codes, for scripts. A setting that cannot work needs a person, anything
// else may pass.
const (
	exitFailed   = 1
	exitUsage    = 2
	exitNotFound = 3
	exitFindings = 4
)

func main() {
	// Before anything secret is in memory: no core file may hold it.
	_ = unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	// A second signal ends the process at once.
	context.AfterFunc(ctx, stop)
	err := newRoot(os.Stdin, os.Stdout, os.Stderr).ExecuteContext(ctx)
	if err == nil {
		return
	}
	fmt.Fprintln(os.Stderr, "latchkey-server:", err)
	os.Exit(exitCode(err))
}

// errFindings: doctor found something that does not work.
var errFindings = errors.New("something does not work; see the lines that begin with fail")

func exitCode(err error) int {
	var usage commandline.UsageError
	switch {
	case errors.As(err, &usage), errors.Is(err, server.ErrConfig), errors.Is(err, server.ErrRefused),
		errors.Is(err, permission.ErrFile), errors.Is(err, permission.ErrPermission):
		return exitUsage
	case errors.Is(err, server.ErrNotFound), errors.Is(err, permission.ErrNoUser):
		return exitNotFound
	case errors.Is(err, errFindings):
		return exitFindings
	}
	return exitFailed
}

// cli is what the commands share.
type cli struct {
	in       io.Reader
	out      io.Writer
	errOut   io.Writer
	stateDir string
	socket   string
	users    string
	level    string
	format   string
}

func newRoot(in io.Reader, out, errOut io.Writer) *cobra.Command {
	c := &cli{in: in, out: out, errOut: errOut}
	root := commandline.Root(out, "latchkey-server", "Pod identity associations and EKS Auth for any cluster",
		"latchkey-server serve answers the AWS CLI, every AWS SDK and Terraform, given its URL as endpoint,\n"+
			"and latchkey-agent on every node. The other commands speak to the running server over its admin\n"+
			"socket (its user and root only), but for user, which edits the users file, and snapshot restore.\n\n"+
			"Exit codes: 0 done, 1 failed, 2 usage or a setting that cannot work, 3 not found, 4 doctor found a fault.",
		commandline.Version(version))
	root.SetErr(errOut)
	f := root.PersistentFlags()
	f.StringVar(&c.stateDir, "state-dir", server.DefaultStateDir, "`directory` with the store, the users and the admin socket; only its owner may enter it")
	f.StringVar(&c.socket, "admin-socket", "", "`path` of the socket that the CLI asks (default admin.sock in --state-dir)")
	f.StringVar(&c.users, "users", "", "users `file` (default users.yaml in --state-dir)")
	f.StringVarP(&c.level, "verbosity", "v", "info", "log `level`: error, warn, info or debug")
	_ = root.RegisterFlagCompletionFunc("verbosity", cobra.FixedCompletions([]string{"error", "warn", "info", "debug"}, cobra.ShellCompDirectiveNoFileComp))
	root.AddCommand(newServe(c), newCluster(c), newAssociation(c), newUser(c), newSnapshot(c), newNodeKeys(c), newDoctor(c), newStatus(c))
	return root
}

func (c *cli) client() *server.Client {
	return server.NewClient(server.SocketPath(c.stateDir, c.socket))
}

func (c *cli) usersFile() string { return server.UsersPath(c.stateDir, c.users) }

func (c *cli) logger(w io.Writer) (*slog.Logger, error) {
	levels := map[string]slog.Level{"error": slog.LevelError, "warn": slog.LevelWarn, "info": slog.LevelInfo, "debug": slog.LevelDebug}
	l, ok := levels[strings.ToLower(c.level)]
	if !ok {
		return nil, usage("unknown verbosity %q: use error, warn, info or debug", c.level)
	}
	return slog.New(slog.NewJSONHandler(w, &slog.HandlerOptions{Level: l})), nil
}

func usage(format string, args ...any) error {
	return commandline.UsageError{Err: fmt.Errorf(format, args...)}
}

// args wants exactly these arguments.
func args(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, given []string) error {
		for i, n := range names {
			if len(given) <= i || given[i] == "" {
				return usage("%s needs %s; see %s --help", cmd.CommandPath(), n, cmd.CommandPath())
			}
		}
		if len(given) > len(names) {
			return usage("unknown argument %q; see %s --help", given[len(names)], cmd.CommandPath())
		}
		return nil
	}
}

// group is a command that only has commands below it.
func group(use, short string, below ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{
		Use: use, Short: short, Args: commandline.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(below...)
	return cmd
}

// outputFlag gives a command -o.
func (c *cli) outputFlag(cmds ...*cobra.Command) {
	for _, cmd := range cmds {
		cmd.Flags().StringVarP(&c.format, "output", "o", "table", "`format`: table, json or yaml")
		_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"table", "json", "yaml"}, cobra.ShellCompDirectiveNoFileComp))
		before := cmd.RunE
		cmd.RunE = func(cmd *cobra.Command, given []string) error {
			// Before anything is done: a command that changed something must not
			// fail because it does not know how to say so.
			switch c.format {
			case "table", "json", "yaml":
				return before(cmd, given)
			}
			return usage("unknown output format %q: use table, json or yaml", c.format)
		}
	}
}

// print writes a value in the format asked for.
func (c *cli) print(v any, table func(w io.Writer)) error {
	switch c.format {
	case "json":
		enc := json.NewEncoder(c.out)
		enc.SetIndent("", "  ")
		enc.SetEscapeHTML(false)
		return enc.Encode(v)
	case "yaml":
		return c.printYAML(v)
	}
	w := tabwriter.NewWriter(c.out, 0, 4, 2, ' ', 0)
	table(w)
	return w.Flush()
}

func (c *cli) printYAML(v any) error {
	b, err := yaml.Marshal(v)
	if err != nil {
		return fmt.Errorf("write YAML: %w", err)
	}
	_, err = c.out.Write(b)
	return err
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// asideTimeout bounds what a command asks the server beside its own business: one
// that is opening a large store accepts connections, and answers minutes later.
const asideTimeout = 3 * time.Second

// clusterNames completes the name of a cluster, if a server can be asked.
func (c *cli) clusterNames(cmd *cobra.Command, _ []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	ctx, cancel := context.WithTimeout(cmd.Context(), asideTimeout)
	defer cancel()
	all, err := c.client().Clusters(ctx)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []cobra.Completion
	for _, s := range all {
		names = append(names, cobra.CompletionWithDesc(s.Name, s.ARN))
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// userNames completes the name of a user.
func (c *cli) userNames(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
	users, err := permission.List(c.usersFile())
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []cobra.Completion
	for _, u := range users {
		names = append(names, u.Name)
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// onlyFirst completes one argument.
func onlyFirst(first cobra.CompletionFunc) cobra.CompletionFunc {
	return func(cmd *cobra.Command, given []string, prefix string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if len(given) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return first(cmd, given, prefix)
	}
}

// pairs reads KEY=VALUE.
func pairs(flag string, values []string) (map[string]string, error) {
	if len(values) == 0 {
		return nil, nil
	}
	out := map[string]string{}
	for _, v := range values {
		k, val, ok := strings.Cut(v, "=")
		if !ok || k == "" {
			return nil, usage("--%s %q: write KEY=VALUE", flag, v)
		}
		if _, twice := out[k]; twice {
			return nil, usage("--%s names %q twice", flag, k)
		}
		out[k] = val
	}
	return out, nil
}

// readInput reads a file, or standard input if it is called "-".
func (c *cli) readInput(file string) ([]byte, error) {
	if file == "-" {
		return io.ReadAll(c.in)
	}
	return os.ReadFile(file)
}
