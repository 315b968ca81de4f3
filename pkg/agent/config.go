// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path"
	"strings"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/attribution"
	"github.com/latchkey-dev/latchkey/pkg/audit"
	"github.com/latchkey-dev/latchkey/pkg/credserver"
	"github.com/latchkey-dev/latchkey/pkg/linklocal"
	"github.com/latchkey-dev/latchkey/pkg/verdict"
)

// ErrConfig: a setting that cannot be used; the text says which and why.
var ErrConfig = errors.New("invalid configuration")

// Defaults, the reference agent's where it has the setting.
const (
	DefaultPort         = 80
	DefaultProbePort    = 2703
	DefaultMetricsPort  = 2705
	DefaultStateDir     = "/var/lib/latchkey"
	DefaultMaxRetention = 3 * time.Hour
	DefaultMaxCacheSize = 2000
	DefaultRenewalQPS   = 3
	// What one pod may use: some hundred times what SDKs ask for.
	DefaultPodQPS         = 500
	DefaultPodBurst       = 1000
	DefaultPodConnections = 256
	// DefaultUpstreamQPS bounds the node's calls of the EKS Auth API, whose
	// limit all nodes of an account share.
	DefaultUpstreamQPS = 10
)

// Values of Config.ContainerRuntime besides a path.
const (
	RuntimeAuto = "auto"
	RuntimeOff  = "off"
)

// Config is the agent's settings, as the flags give them.
type Config struct {
	// ClusterName is sent to EKS Auth. Required.
	ClusterName string
	// BindHosts are the addresses that credentials are served on; nil means
	// both link-local ones. See ParseBindHosts.
	BindHosts []netip.Addr
	// Port of every bind host.
	Port uint16
	// ProbePort is on localhost; 0 means none.
	ProbePort uint16
	// MetricsAddress is an address or empty for all; MetricsPort 0 means none.
	MetricsAddress string
	MetricsPort    uint16
	// AdminSocket and PinPath are paths; empty AdminSocket means none, empty
	// PinPath means that nothing is pinned.
	AdminSocket string
	PinPath     string
	// CgroupRoot is the kubepods cgroup, if it cannot be found.
	CgroupRoot string
	// StateDir keeps the verification keys over restarts; empty means nowhere.
	StateDir string

	// Policy is the attestation mode and its exceptions.
	Policy verdict.Policy
	// KeyFile and IssuerURL say where verification keys come from; both empty
	// means the API server if the agent runs in a pod, else nowhere. With both,
	// the file has the keys and the URL is the issuer that tokens must name.
	KeyFile   string
	IssuerURL string
	// IssuerCA is a CA file for IssuerURL; empty means the system's.
	IssuerCA string
	// Audience that tokens must name; empty means pods.eks.amazonaws.com.
	Audience string

	// Endpoint overrides the EKS Auth endpoint.
	Endpoint string
	// RotateCredentials re-reads the node's credentials from the shared
	// credentials file each minute.
	RotateCredentials bool
	// NodeTokenFile is a projected service-account token with audience
	// latchkey-server, which the server at Endpoint exchanges for the node's
	// credentials. Then nothing else is searched for credentials. Empty: none.
	NodeTokenFile string
	// MaxRetention is how long credentials are kept before they are renewed; 0
	// turns the cache off. MaxCacheSize likewise counts entries.
	MaxRetention time.Duration
	MaxCacheSize int
	// RenewalQPS is the share of UpstreamQPS for renewals in the background.
	RenewalQPS  float64
	UpstreamQPS float64

	// UpstreamConcurrency bounds the calls in flight; MaxCacheBytes the cache's
	// memory. 0 means the cache's default.
	UpstreamConcurrency int
	MaxCacheBytes       int64
	// NodeName is sent to EKS Auth as eksNodeName; empty sends none.
	NodeName string
	// PodLimits is what one pod may use of the endpoint; zero fields mean the
	// endpoint's defaults. There is no limit that pods share.
	PodLimits credserver.Allowance
	// ContainerRuntime is containerd's socket, which tells what pods are called:
	// a path, RuntimeAuto (the usual places, CRI-O's too) or RuntimeOff; empty
	// means off.
	ContainerRuntime string
	// CleanupOnExit removes at the end what Cleanup removes, as if no agent came
	// after this one. Until the next one attaches, connections have no evidence.
	CleanupOnExit bool

	// Audit says where the audit goes, AuditSampleHits what of the answers from
	// the cache it records: see audit.Target and audit.Config.
	Audit           audit.Target
	AuditSampleHits int
	// Version is shown by the CLI and in metrics.
	Version string
	// Logger is required. Its handler should let every level through: LogLevel
	// decides at first, and Agent.SetLogLevel later.
	Logger *slog.Logger
	// LogLevel is every component's at the start; the zero value is info.
	LogLevel slog.Level
}

// Warning is a setting that is accepted, and what is made of it.
type Warning string

// ParseBindHosts reads the values of --bind-hosts. An empty value means the
// IPv4 link-local address alone, as documented for IPv4-only nodes: it never
// means every address, which would offer credentials to the whole network. For
// the same reason an unspecified address is refused.
func ParseBindHosts(values []string) ([]netip.Addr, []Warning, error) {
	if len(values) == 0 {
		return linklocal.DefaultAddresses(), nil, nil
	}
	var out []netip.Addr
	var warnings []Warning
	seen := map[netip.Addr]bool{}
	for _, v := range values {
		host := strings.TrimSuffix(strings.TrimPrefix(strings.TrimSpace(v), "["), "]")
		switch host {
		case "":
			host = "169.254.170.23"
			warnings = append(warnings, "an empty --bind-hosts means 169.254.170.23 only; write that address")
		case "localhost":
			host = "127.0.0.1"
		}
		a, err := netip.ParseAddr(host)
		switch {
		case err != nil:
			return nil, nil, fmt.Errorf("%w: --bind-hosts %q: give an IP address", ErrConfig, v)
		case a.Unmap().IsUnspecified():
			return nil, nil, fmt.Errorf("%w: --bind-hosts %q: every address of the node would hand out credentials; name the addresses", ErrConfig, v)
		case a.IsMulticast() || a.Zone() != "":
			return nil, nil, fmt.Errorf("%w: --bind-hosts %q: give a unicast address without zone", ErrConfig, v)
		}
		a = a.Unmap()
		if !seen[a] {
			seen[a] = true
			out = append(out, a)
		}
	}
	return out, warnings, nil
}

// ParseExceptions reads the values of --attestation-namespace, each
// NAMESPACE=MODE.
func ParseExceptions(values []string) (map[string]verdict.Mode, error) {
	out := map[string]verdict.Mode{}
	for _, v := range values {
		ns, text, ok := strings.Cut(v, "=")
		if !ok || ns == "" {
			return nil, fmt.Errorf("%w: --attestation-namespace %q: write NAMESPACE=MODE", ErrConfig, v)
		}
		m, err := verdict.ParseMode(text)
		if err != nil {
			return nil, fmt.Errorf("%w: --attestation-namespace %q: %w", ErrConfig, v, err)
		}
		if _, twice := out[ns]; twice {
			return nil, fmt.Errorf("%w: --attestation-namespace names %s twice", ErrConfig, ns)
		}
		out[ns] = m
	}
	return out, nil
}

// check refuses what cannot work, and says of the rest what is odd.
func (c *Config) check() ([]Warning, error) {
	var warnings []Warning
	if c.Logger == nil {
		return nil, fmt.Errorf("%w: no logger", ErrConfig)
	}
	if c.ClusterName == "" {
		return nil, fmt.Errorf("%w: --cluster-name is required", ErrConfig)
	}
	if len(c.BindHosts) == 0 {
		c.BindHosts = linklocal.DefaultAddresses()
	}
	if c.Port == 0 {
		return nil, fmt.Errorf("%w: --port must be 1 to 65535", ErrConfig)
	}
	if v4, v6 := families(c.BindHosts); v4 > attribution.MaxAddresses || v6 > attribution.MaxAddresses {
		return nil, fmt.Errorf("%w: more than %d bind hosts of one family", ErrConfig, attribution.MaxAddresses)
	}
	for _, p := range []struct{ flag, value string }{{"--admin-socket", c.AdminSocket}, {"--pin-path", c.PinPath}, {"--state-dir", c.StateDir}, {"--node-token-file", c.NodeTokenFile}} {
		if p.value != "" && !path.IsAbs(p.value) {
			return nil, fmt.Errorf("%w: %s %q: give an absolute path", ErrConfig, p.flag, p.value)
		}
	}
	if c.MaxRetention < 0 || c.MaxCacheSize < 0 || c.RenewalQPS < 0 || c.UpstreamQPS < 0 || c.UpstreamConcurrency < 0 ||
		c.MaxCacheBytes < 0 || c.PodLimits.Rate < 0 || c.PodLimits.Burst < 0 || c.PodLimits.Connections < 0 {
		return nil, fmt.Errorf("%w: durations, sizes and rates are not negative", ErrConfig)
	}
	if c.UpstreamQPS == 0 {
		c.UpstreamQPS = DefaultUpstreamQPS
	}
	if c.RenewalQPS > c.UpstreamQPS {
		warnings = append(warnings, Warning(fmt.Sprintf("--max-service-qps %g is more than --upstream-qps %g, which bounds all calls", c.RenewalQPS, c.UpstreamQPS)))
	}
	// The reference agent refuses to start here.
	if c.MaxRetention > 0 && c.RenewalQPS*c.MaxRetention.Seconds() < float64(c.MaxCacheSize)/2 {
		warnings = append(warnings, "--max-service-qps is too small to renew a full cache within --max-credential-retention-before-renewal; what is due late is renewed by the request that asks for it")
	}
	if c.NodeTokenFile != "" && c.RotateCredentials {
		return nil, fmt.Errorf("%w: --node-token-file and --rotate-credentials name two sources of the node's credentials; give one", ErrConfig)
	}
	switch r := c.ContainerRuntime; {
	case r == "", r == RuntimeAuto, r == RuntimeOff, path.IsAbs(r):
	default:
		return nil, fmt.Errorf("%w: --containerd-socket %q: give an absolute path, auto or off", ErrConfig, r)
	}
	if c.AuditSampleHits < 0 {
		return nil, fmt.Errorf("%w: --audit-sample-hits %d: use 1 to record each hit, N for one of N, 0 for none", ErrConfig, c.AuditSampleHits)
	}
	if c.MaxRetention == 0 || c.MaxCacheSize == 0 {
		warnings = append(warnings, "the cache is off: every request calls EKS Auth, and an outage there reaches every pod")
	}
	if c.Policy.Default != verdict.Enforce {
		warnings = append(warnings, Warning("attestation is "+c.Policy.Default.String()+": a stolen token is served to whoever holds it"))
	}
	return warnings, nil
}

func families(addrs []netip.Addr) (v4, v6 int) {
	for _, a := range addrs {
		if a.Is4() {
			v4++
		} else {
			v6++
		}
	}
	return v4, v6
}
