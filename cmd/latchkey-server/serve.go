// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"github.com/latchkey-dev/latchkey/pkg/commandline"
	"github.com/latchkey-dev/latchkey/pkg/eksapi"
	"github.com/latchkey-dev/latchkey/pkg/server"
)

func newServe(c *cli) *cobra.Command {
	var (
		cfg  server.Config
		file string
	)
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Serve the association API and EKS Auth",
		Long: "serve runs the store and answers until it gets SIGTERM. The AWS credentials with which it assumes\n" +
			"the pods' roles are found as every AWS SDK finds them (AWS_PROFILE, AWS_WEB_IDENTITY_TOKEN_FILE,\n" +
			"instance role and so on).\n\n" +
			"--config is a YAML file whose keys are the names of these flags, without dashes in front, and\n" +
			"clusters, a list of clusters as `cluster describe -o yaml` writes them. A flag on the command line\n" +
			"wins over the file.",
		Example: "  latchkey-server serve --state-dir /var/lib/latchkey-server\n" +
			"  latchkey-server serve --config /etc/latchkey/server.yaml --listen 0.0.0.0:8443 --tls-cert tls.crt --tls-key tls.key",
		Args: commandline.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if file != "" {
				clusters, err := applyFile(cmd, file)
				if err != nil {
					return err
				}
				cfg.Clusters = clusters
			}
			if cfg.MaxReads == 0 || cfg.MaxWrites == 0 || cfg.MaxExchanges == 0 {
				return usage("--max-reads, --max-writes and --max-exchanges: 0 would let nobody in; give -1 for no limit")
			}
			log, err := c.logger(c.out)
			if err != nil {
				return err
			}
			cfg.StateDir, cfg.AdminSocket, cfg.Users = c.stateDir, c.socket, c.users
			cfg.Logger, cfg.Version, cfg.Stdout = log, commandline.Version(version), c.out
			return server.Run(cmd.Context(), cfg)
		},
	}
	f := cmd.Flags()
	f.StringVar(&file, "config", "", "YAML `file` with settings and clusters")
	f.StringVar(&cfg.Listen, "listen", server.DefaultListen, "`address` of the APIs, host:port")
	f.StringVar(&cfg.TLSCert, "tls-cert", "", "certificate chain `file` in PEM, read again when it changes")
	f.StringVar(&cfg.TLSKey, "tls-key", "", "`file` with its key in PEM")
	f.BoolVar(&cfg.InsecureHTTP, "insecure-http", false, "allow plain HTTP on addresses other than loopback")
	f.IntVar(&cfg.MaxConnections, "max-connections", server.DefaultMaxConnections, "connections of the APIs at most")
	f.IntVar(&cfg.MaxAddressConnections, "max-connections-per-address", server.DefaultMaxAddressConnections, "connections of one address at most (IPv6: of a /64), which may be a proxy's")
	f.Float64Var(&cfg.MaxReads, "max-reads", eksapi.DefaultReads, "describes and lists a second of one user, and four times as many at once; -1 for no limit")
	f.Float64Var(&cfg.MaxWrites, "max-writes", eksapi.DefaultWrites, "changes a second of one user, and five times as many at once; -1 for no limit")
	f.Float64Var(&cfg.MaxExchanges, "max-exchanges", eksapi.DefaultExchanges, "AssumeRoleForPodIdentity a second of one node or user, and five times as many at once; -1 for no limit")
	f.StringVar(&cfg.MetricsAddress, "metrics-address", server.DefaultMetricsAddress, "`address` of /metrics, /healthz and /readyz, host:port; empty for none")
	f.StringVar(&cfg.STSEndpoint, "sts-endpoint", "", "`URL` of an STS-compatible server instead of AWS STS of each cluster's region")
	f.BoolVar(&cfg.StandInSTS, "stand-in-sts", false, "call no STS and issue marked credentials that open nothing: for demos and tests")
	f.DurationVar(&cfg.SessionDuration, "session-duration", server.DefaultSessionDuration, "how long credentials live, 15m to 12h; no longer than the roles allow")
	f.StringVar(&cfg.NodeBinding, "node-binding", server.NodeBindingRequire, "whether an agent must prove its node to redeem a token of a pod there:\nrequire, prefer (if it has proved one) or off")
	f.StringVar(&cfg.AuditLog, "audit-log", server.AuditDefault, "`file` with a record of each exchange and change, - for standard output, empty for none\n(default audit.jsonl in --state-dir)")
	f.IntVar(&cfg.AuditSize, "audit-max-size", server.DefaultAuditSize, "megabytes at which the audit file is rotated")
	f.IntVar(&cfg.AuditFiles, "audit-max-files", server.DefaultAuditFiles, "rotated audit files to keep; 0 keeps all")
	f.StringVar(&cfg.TracesEndpoint, "traces-endpoint", "", "`URL` of an OpenTelemetry collector (OTLP, gRPC); empty sends no traces")
	f.Int64Var(&cfg.StoreQuota, "store-quota", server.DefaultStoreQuota, "size of the store at most, in `bytes`")
	f.Lookup("audit-log").DefValue = ""
	_ = cmd.RegisterFlagCompletionFunc("node-binding", cobra.FixedCompletions([]string{server.NodeBindingRequire, server.NodeBindingPrefer, server.NodeBindingOff}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// applyFile sets the flags that a file names and that the command line does
// not, and returns the file's clusters. A key that nobody knows is refused: what
// it was meant to say, perhaps a limit, would be lost.
func applyFile(cmd *cobra.Command, file string) ([]server.ClusterSpec, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("%w: --config: %w", server.ErrConfig, err)
	}
	settings := map[string]json.RawMessage{}
	if err := yaml.UnmarshalStrict(data, &settings); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", server.ErrConfig, file, err)
	}
	var clusters []server.ClusterSpec
	for key, raw := range settings {
		if key == "clusters" {
			if err := yaml.UnmarshalStrict(raw, &clusters); err != nil {
				return nil, fmt.Errorf("%w: %s: clusters: %w", server.ErrConfig, file, err)
			}
			continue
		}
		fl := cmd.Flags().Lookup(key)
		if fl == nil || slices.Contains([]string{"config", "help", "version"}, key) {
			return nil, fmt.Errorf("%w: %s: there is no setting %q; keys are the flags of `latchkey-server serve` and clusters", server.ErrConfig, file, key)
		}
		value := string(raw)
		if strings.HasPrefix(value, `"`) {
			if err := json.Unmarshal(raw, &value); err != nil {
				return nil, fmt.Errorf("%w: %s: %s: %w", server.ErrConfig, file, key, err)
			}
		}
		if value == "null" || strings.HasPrefix(value, "{") || strings.HasPrefix(value, "[") {
			return nil, fmt.Errorf("%w: %s: %s: give one value", server.ErrConfig, file, key)
		}
		if fl.Changed {
			continue
		}
		if err := fl.Value.Set(value); err != nil {
			return nil, fmt.Errorf("%w: %s: %s: %w", server.ErrConfig, file, key, err)
		}
	}
	return clusters, nil
}
