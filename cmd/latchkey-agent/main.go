// SPDX-License-Identifier: Apache-2.0

// Command latchkey-agent is the node half of Latchkey: it answers at the
// link-local address that every AWS SDK knows, with the credentials of the pod
// that really asks. It takes the commands and flags of the EKS Pod Identity
// Agent.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/pkg/adminapi"
	"github.com/latchkey-dev/latchkey/pkg/agent"
	"github.com/latchkey-dev/latchkey/pkg/attribution"
	"github.com/latchkey-dev/latchkey/pkg/audit"
	"github.com/latchkey-dev/latchkey/pkg/commandline"
	"github.com/latchkey-dev/latchkey/pkg/credcache"
	"github.com/latchkey-dev/latchkey/pkg/linklocal"
	"github.com/latchkey-dev/latchkey/pkg/privilege"
	"github.com/latchkey-dev/latchkey/pkg/verdict"
)

// version is set by the linker.
var version string

// Exit codes: a setting that cannot work needs a person, anything else may pass.
const (
	exitFailed = 1
	exitUsage  = 2
)

func main() {
	// Before anything secret is in memory: no core file may hold it. That
	// also denies ptrace to other processes of the same user.
	_ = unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	// A second signal ends the process at once.
	context.AfterFunc(ctx, stop)
	err := newRoot(os.Stdout).ExecuteContext(ctx)
	if err == nil {
		return
	}
	fmt.Fprintln(os.Stderr, "latchkey-agent:", err)
	var usage commandline.UsageError
	if errors.As(err, &usage) || errors.Is(err, agent.ErrConfig) {
		os.Exit(exitUsage)
	}
	os.Exit(exitFailed)
}

func newRoot(out io.Writer) *cobra.Command {
	var verbosity string
	root := commandline.Root(out, "latchkey-agent", "Give every pod of this node the credentials of its own role, and only to that pod", "",
		commandline.Version(version))
	root.PersistentFlags().StringVarP(&verbosity, "verbosity", "v", "info", "log `level`: panic, fatal, error, warn, info, debug or trace")
	logger := func() (*slog.Logger, error) {
		level, err := parseLevel(verbosity)
		if err != nil {
			return nil, commandline.UsageError{Err: err}
		}
		return slog.New(slog.NewJSONHandler(out, &slog.HandlerOptions{Level: level})), nil
	}
	root.AddCommand(newServer(out, &verbosity), newInitialize(logger), newCleanup(out, logger))
	return root
}

// parseLevel takes the reference agent's levels; slog has fewer.
func parseLevel(s string) (slog.Level, error) {
	switch strings.ToLower(s) {
	case "panic", "fatal", "error":
		return slog.LevelError, nil
	case "warn", "warning":
		return slog.LevelWarn, nil
	case "info":
		return slog.LevelInfo, nil
	case "debug", "trace":
		return slog.LevelDebug, nil
	}
	return 0, fmt.Errorf("unknown verbosity %q: use panic, fatal, error, warn, info, debug or trace", s)
}

func newServer(out io.Writer, verbosity *string) *cobra.Command {
	var (
		cfg         agent.Config
		bindHosts   []string
		attestation string
		exceptions  []string
	)
	cmd := &cobra.Command{
		Use:   "server",
		Short: "Answer pods that ask for credentials",
		Long: "server attaches the kernel programs, puts the link-local addresses on the node if it may,\n" +
			"and answers pods until it gets SIGTERM. The node's own AWS credentials and region are found\n" +
			"as every AWS SDK finds them (AWS_REGION, AWS_ENDPOINT_URL_EKS_AUTH, HTTPS_PROXY and so on).",
		Example: "  latchkey-agent server --cluster-name prod",
		Args:    commandline.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var err error
			if cfg.LogLevel, err = parseLevel(*verbosity); err != nil {
				return commandline.UsageError{Err: err}
			}
			// The levels are the agent's, as they can be changed while it runs.
			cfg.Logger = slog.New(slog.NewJSONHandler(out, &slog.HandlerOptions{Level: slog.LevelDebug}))
			cfg.Audit.Stdout = out
			cfg.Version = commandline.Version(version)
			log := slog.New(slog.NewJSONHandler(out, &slog.HandlerOptions{Level: cfg.LogLevel}))
			var warnings []agent.Warning
			if cfg.BindHosts, warnings, err = agent.ParseBindHosts(bindHosts); err != nil {
				return err
			}
			for _, w := range warnings {
				log.Warn(string(w))
			}
			if cfg.Policy.Default, err = verdict.ParseMode(attestation); err != nil {
				return commandline.UsageError{Err: fmt.Errorf("--attestation: %w", err)}
			}
			if cfg.Policy.Namespaces, err = agent.ParseExceptions(exceptions); err != nil {
				return err
			}
			// Executes the program again with less, if it was given more than it
			// needs; then this is where the second run passes through.
			if err := privilege.Confine(agent.Capabilities()); err != nil {
				log.Warn("running with more capabilities than needed", "error", err)
			}
			return agent.Run(cmd.Context(), cfg)
		},
	}
	f := cmd.Flags()
	// The EKS Pod Identity Agent's.
	f.StringVarP(&cfg.ClusterName, "cluster-name", "c", "", "cluster `name` sent to EKS Auth (required)")
	f.Uint16VarP(&cfg.Port, "port", "p", agent.DefaultPort, "`port` that credentials are served on")
	f.StringArrayVarP(&bindHosts, "bind-hosts", "b", nil, "`address` to serve on; may be repeated and then replaces both defaults;\nempty means 169.254.170.23 only (default 169.254.170.23 and [fd00:ec2::23])")
	f.Uint16Var(&cfg.ProbePort, "probe-port", agent.DefaultProbePort, "`port` of /healthz and /readyz on localhost; 0 for none")
	f.StringVar(&cfg.MetricsAddress, "metrics-address", "0.0.0.0", "`address` of /metrics")
	f.Uint16Var(&cfg.MetricsPort, "metrics-port", agent.DefaultMetricsPort, "`port` of /metrics; 0 for none")
	f.DurationVar(&cfg.MaxRetention, "max-credential-retention-before-renewal", agent.DefaultMaxRetention, "renew credentials at this age at the latest; 0 turns the cache off")
	f.IntVar(&cfg.MaxCacheSize, "max-cache-size", agent.DefaultMaxCacheSize, "cached credentials at most; 0 turns the cache off")
	f.Float64Var(&cfg.RenewalQPS, "max-service-qps", agent.DefaultRenewalQPS, "renewals in the background per second at most")
	f.BoolVar(&cfg.RotateCredentials, "rotate-credentials", false, "read the node's own credentials from the shared credentials file each minute")
	f.StringVar(&cfg.Endpoint, "endpoint", "", "`URL` of EKS Auth instead of the region's")
	// Latchkey's own.
	f.StringVar(&attestation, "attestation", verdict.Enforce.String(), "what to do when the kernel's evidence does not support a token:\nenforce refuses, audit serves and reports, off serves")
	f.StringArrayVar(&exceptions, "attestation-namespace", nil, "`NAMESPACE=MODE` for tokens of that namespace; may be repeated")
	f.StringVar(&cfg.KeyFile, "jwks", "", "`file` with the cluster's token keys (JWKS or PEM); needs --issuer too")
	f.StringVar(&cfg.IssuerURL, "issuer", "", "`URL` that tokens must name as issuer; keys are fetched there unless --jwks is given.\nWithout both: the API server, if the agent runs in a pod, else EKS Auth alone judges tokens")
	f.StringVar(&cfg.IssuerCA, "issuer-ca", "", "CA `file` for --issuer instead of the system's")
	f.StringVar(&cfg.AdminSocket, "admin-socket", adminapi.DefaultSocket, "`path` of the socket that the latchkey CLI asks; empty for none")
	f.StringVar(&cfg.PinPath, "pin-path", attribution.DefaultPinPath, "`directory` on a bpf filesystem for what outlives the process; empty to pin nothing")
	f.StringVar(&cfg.CgroupRoot, "cgroup-root", "", "kubepods cgroup, if it cannot be found: a `path` below the cgroup v2 mount")
	f.StringVar(&cfg.StateDir, "state-dir", agent.DefaultStateDir, "`directory` that keeps the token keys over a restart; empty for none")
	f.Float64Var(&cfg.UpstreamQPS, "upstream-qps", agent.DefaultUpstreamQPS, "calls of EKS Auth per second at most, renewals included")
	f.IntVar(&cfg.UpstreamConcurrency, "upstream-concurrency", credcache.DefaultConcurrency, "calls of EKS Auth in flight at most")
	f.Int64Var(&cfg.MaxCacheBytes, "max-cache-bytes", credcache.DefaultMaxBytes, "memory for cached credentials, in `bytes`")
	f.StringVar(&cfg.NodeName, "node-name", "", "`name` sent to EKS Auth as eksNodeName; empty sends none")
	f.Float64Var(&cfg.PodLimits.Rate, "max-pod-qps", agent.DefaultPodQPS, "requests of one pod per second at most, refused ones included")
	f.IntVar(&cfg.PodLimits.Burst, "max-pod-burst", agent.DefaultPodBurst, "requests of one pod that may come at once after a pause")
	f.IntVar(&cfg.PodLimits.Connections, "max-pod-connections", agent.DefaultPodConnections, "open connections of one pod at most")
	f.StringVar(&cfg.NodeTokenFile, "node-token-file", "", "projected token `file` of audience latchkey-server: a Latchkey server at --endpoint\ngives the node's credentials for it, and nothing else is searched for any")
	f.StringVar(&cfg.ContainerRuntime, "containerd-socket", agent.RuntimeAuto, "`path` of the socket that tells the names of pods, for people and the audit;\nauto looks in the usual places, CRI-O's too; off asks nobody")
	f.BoolVar(&cfg.CleanupOnExit, "cleanup-on-exit", false, "at the end remove from the node what cleanup removes; not where another agent follows")
	f.StringVar(&cfg.Audit.Spec, "audit", "off", "where the audit goes, a line of JSON per credential issued or refused: `target` is\nstdout, file:PATH, unixgram:PATH or off")
	f.IntVar(&cfg.AuditSampleHits, "audit-sample-hits", 1, "record one of so many answers from the cache; 1 each, 0 none. The rest is always recorded")
	f.IntVar(&cfg.Audit.MaxSize, "audit-max-size", audit.DefaultMaxSize, "size in `MiB` at which the audit's file is put aside")
	f.IntVar(&cfg.Audit.MaxBackups, "audit-max-backups", audit.DefaultMaxBackups, "files put aside that are kept; 0 for all")
	f.IntVar(&cfg.Audit.MaxAge, "audit-max-age", 0, "`days` that a file put aside is kept; 0 for ever")
	_ = cmd.RegisterFlagCompletionFunc("attestation", cobra.FixedCompletions([]string{"enforce", "audit", "off"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

func newInitialize(logger func() (*slog.Logger, error)) *cobra.Command {
	var bpffs string
	cmd := &cobra.Command{
		Use:   "initialize",
		Short: "Put the link-local addresses on the node, and exit",
		Long: "initialize makes the link pod-id-link0 (or, where the kernel has no dummy links, uses lo),\n" +
			"gives it 169.254.170.23 and fd00:ec2::23 and their routes. It needs CAP_NET_ADMIN and may be\n" +
			"run again. IPv6 that is missing is reported and no failure.\n" +
			"With --mount-bpffs it also mounts a bpf filesystem, if none is there, which needs CAP_SYS_ADMIN.",
		Args: commandline.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := logger()
			if err != nil {
				return err
			}
			if bpffs != "" {
				mounted, err := agent.MountBPFFS(bpffs)
				if err != nil {
					return err
				}
				if mounted {
					log.Info("mounted a bpf filesystem", "directory", bpffs)
				}
			}
			return agent.Initialize(cmd.Context(), linklocal.Config{Logger: log})
		},
	}
	cmd.Flags().StringVar(&bpffs, "mount-bpffs", "", "`directory` to mount a bpf filesystem on, if it is none yet; usually /sys/fs/bpf. Empty: mount nothing")
	return cmd
}

func newCleanup(out io.Writer, logger func() (*slog.Logger, error)) *cobra.Command {
	var pinPath, stateDir, adminSocket string
	cmd := &cobra.Command{
		Use:   "cleanup",
		Short: "Remove from the node what the agent left, and exit",
		Long: "cleanup detaches the kernel programs, removes their pins, and the link, addresses and routes\n" +
			"that carry Latchkey's mark. Nothing that somebody else made is touched. Run it when the agent\n" +
			"has stopped for good.",
		Args: commandline.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := logger()
			if err != nil {
				return err
			}
			removed, err := agent.Cleanup(cmd.Context(), agent.CleanupConfig{
				PinPath: pinPath, StateDir: stateDir, AdminSocket: adminSocket,
				LinkLocal: linklocal.Config{Logger: log},
			})
			for _, r := range removed {
				fmt.Fprintln(out, "removed", r)
			}
			if len(removed) == 0 && err == nil {
				fmt.Fprintln(out, "nothing to remove")
			}
			return err
		},
	}
	cmd.Flags().StringVar(&pinPath, "pin-path", attribution.DefaultPinPath, "`directory` that server was given")
	cmd.Flags().StringVar(&stateDir, "state-dir", agent.DefaultStateDir, "`directory` that server was given; empty keeps it")
	cmd.Flags().StringVar(&adminSocket, "admin-socket", adminapi.DefaultSocket, "`path` that server was given; empty keeps it")
	return cmd
}
