// SPDX-License-Identifier: Apache-2.0

package server

import (
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/url"
	"path/filepath"
	"strings"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/adminsocket"
	"github.com/latchkey-dev/latchkey/pkg/eksapi"
)

// Defaults.
const (
	DefaultStateDir       = "/var/lib/latchkey-server"
	DefaultListen         = "127.0.0.1:8443"
	DefaultMetricsAddress = "127.0.0.1:8444"
	// DefaultSessionDuration is what STS allows for every role: its
	// MaxSessionDuration may be longer, and never is shorter.
	DefaultSessionDuration = time.Hour
	// Bounds of STS for DurationSeconds.
	minSession, maxSession = 15 * time.Minute, 12 * time.Hour
	// DefaultAuditSize is in megabytes.
	DefaultAuditSize  = 100
	DefaultAuditFiles = 10
	// DefaultStoreQuota is in bytes.
	DefaultStoreQuota = 2 << 30
)

// Values of Config.NodeBinding.
const (
	// NodeBindingRequire refuses a pod's token unless the caller has proved to be
	// the token's node.
	NodeBindingRequire = string(eksapi.BindRequire)
	// NodeBindingPrefer refuses it if the caller has proved to be another one.
	NodeBindingPrefer = string(eksapi.BindPrefer)
	// NodeBindingOff does not compare.
	NodeBindingOff = string(eksapi.BindOff)
)

// NoLimit as Config.MaxReads and its like lifts the limit.
const NoLimit = -1

// maxRate is beyond what any server does, and far below what overflows.
const maxRate = 1e6

// AuditDefault as Config.AuditLog means audit.jsonl in the state directory.
const AuditDefault = "default"

// Config is the server's settings, as the flags and the file give them.
type Config struct {
	// StateDir holds the store, the users file, the admin socket and the audit
	// log, unless those are told to be elsewhere. Only its owner may enter it.
	StateDir string
	// Listen is where the APIs are served, host:port.
	Listen string
	// TLSCert and TLSKey are files in PEM, read again when they change; both
	// empty means plain HTTP, on loopback or with InsecureHTTP only.
	TLSCert, TLSKey string
	InsecureHTTP    bool
	// MaxConnections bounds the connections of the APIs, MaxAddressConnections
	// those of one address (IPv6: a /64), which may be a proxy's. 0 means the
	// default of that name.
	MaxConnections, MaxAddressConnections int
	// MaxReads, MaxWrites and MaxExchanges are how many calls a second one caller, a
	// user or a node, may make on and on, and a few times as many at once. 0 means
	// the default of pkg/eksapi, NoLimit none.
	MaxReads, MaxWrites, MaxExchanges float64
	// MetricsAddress serves /metrics, /healthz and /readyz; empty means none.
	MetricsAddress string
	// AdminSocket is the path of the CLI's socket; empty means admin.sock in
	// StateDir.
	AdminSocket string
	// Users is the users file; empty means users.yaml in StateDir.
	Users string

	// AuditLog is a file, AuditDefault, "-" for standard output, or empty for
	// none. AuditSize (megabytes) and AuditFiles bound a file and its rotated
	// ancestors.
	AuditLog              string
	AuditSize, AuditFiles int

	// STSEndpoint is the URL of an STS-compatible server; empty means AWS's
	// regional endpoint of each cluster's region.
	STSEndpoint string
	// StandInSTS issues marked credentials that open nothing, and calls nobody.
	StandInSTS bool
	// SessionDuration is asked of STS for one hop.
	SessionDuration time.Duration
	// NodeBinding is one of the constants above.
	NodeBinding string

	// TracesEndpoint is the URL of an OTLP collector (gRPC); empty means none.
	TracesEndpoint string
	// StoreQuota bounds the embedded store, in bytes.
	StoreQuota int64
	// Clusters are put into the store at the start.
	Clusters []ClusterSpec

	// Version is shown by metrics and status.
	Version string
	// Logger is required.
	Logger *slog.Logger
	// Stdout is where AuditLog "-" writes; nil means nowhere.
	Stdout io.Writer
	// Now is the clock; nil means time.Now.
	Now func() time.Time
}

// EtcdDir is where the embedded store is.
func EtcdDir(stateDir string) string { return filepath.Join(stateDir, "etcd") }

// SocketPath is the admin socket's path.
func SocketPath(stateDir, socket string) string {
	if socket != "" {
		return socket
	}
	return filepath.Join(stateDir, "admin.sock")
}

// UsersPath is the users file's path.
func UsersPath(stateDir, users string) string {
	if users != "" {
		return users
	}
	return filepath.Join(stateDir, "users.yaml")
}

// check fills in what is empty and refuses what cannot work.
func (c *Config) check() error {
	if c.Logger == nil {
		return fmt.Errorf("%w: no logger", ErrConfig)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Stdout == nil {
		c.Stdout = io.Discard
	}
	if c.StateDir == "" || !filepath.IsAbs(c.StateDir) {
		return fmt.Errorf("%w: --state-dir %q: give an absolute path", ErrConfig, c.StateDir)
	}
	c.AdminSocket, c.Users = SocketPath(c.StateDir, c.AdminSocket), UsersPath(c.StateDir, c.Users)
	if c.AuditLog == AuditDefault {
		c.AuditLog = filepath.Join(c.StateDir, "audit.jsonl")
	}
	for _, p := range []struct{ flag, value string }{{"--admin-socket", c.AdminSocket}, {"--users", c.Users}} {
		if !filepath.IsAbs(p.value) {
			return fmt.Errorf("%w: %s %q: give an absolute path", ErrConfig, p.flag, p.value)
		}
	}
	if err := adminsocket.CheckPath(c.AdminSocket); err != nil {
		return fmt.Errorf("%w: %w", ErrConfig, err)
	}
	for _, a := range []struct{ flag, value string }{{"--listen", c.Listen}, {"--metrics-address", c.MetricsAddress}} {
		if a.value == "" && a.flag != "--listen" {
			continue
		}
		if _, _, err := net.SplitHostPort(a.value); err != nil {
			return fmt.Errorf("%w: %s %q: give host:port, such as %s", ErrConfig, a.flag, a.value, DefaultListen)
		}
	}
	switch {
	case (c.TLSCert == "") != (c.TLSKey == ""):
		return fmt.Errorf("%w: --tls-cert and --tls-key belong together", ErrConfig)
	case c.TLSCert == "" && !loopback(c.Listen) && !c.InsecureHTTP:
		return fmt.Errorf("%w: --listen %s: %w", ErrConfig, c.Listen, errNoTLS)
	}
	if c.StandInSTS && c.STSEndpoint != "" {
		return fmt.Errorf("%w: --stand-in-sts calls nobody, so --sts-endpoint makes no sense with it", ErrConfig)
	}
	for _, u := range []struct{ flag, value string }{{"--sts-endpoint", c.STSEndpoint}, {"--traces-endpoint", c.TracesEndpoint}} {
		if u.value == "" {
			continue
		}
		if p, err := url.Parse(u.value); err != nil || p.Host == "" || p.Scheme != "http" && p.Scheme != "https" {
			return fmt.Errorf("%w: %s %q: give a URL that begins with http:// or https://", ErrConfig, u.flag, u.value)
		}
	}
	if c.SessionDuration < minSession || c.SessionDuration > maxSession || c.SessionDuration%time.Second != 0 {
		return fmt.Errorf("%w: --session-duration %s: STS allows %s to %s", ErrConfig, c.SessionDuration, minSession, maxSession)
	}
	switch c.NodeBinding {
	case NodeBindingRequire, NodeBindingPrefer, NodeBindingOff:
	default:
		return fmt.Errorf("%w: --node-binding %q: use %s, %s or %s", ErrConfig, c.NodeBinding, NodeBindingRequire, NodeBindingPrefer, NodeBindingOff)
	}
	if c.MaxConnections == 0 {
		c.MaxConnections = DefaultMaxConnections
	}
	if c.MaxAddressConnections == 0 {
		c.MaxAddressConnections = DefaultMaxAddressConnections
	}
	if c.MaxConnections < 0 || c.MaxAddressConnections < 0 {
		return fmt.Errorf("%w: --max-connections and --max-connections-per-address are more than 0", ErrConfig)
	}
	for _, l := range []struct {
		flag  string
		value *float64
		usual float64
	}{{"--max-reads", &c.MaxReads, eksapi.DefaultReads}, {"--max-writes", &c.MaxWrites, eksapi.DefaultWrites}, {"--max-exchanges", &c.MaxExchanges, eksapi.DefaultExchanges}} {
		if *l.value == 0 {
			*l.value = l.usual
		}
		if v := *l.value; v != NoLimit && !(v > 0 && v <= maxRate) { // NaN is neither
			return fmt.Errorf("%w: %s %g: give calls a second, up to %g, or %d for no limit", ErrConfig, l.flag, v, maxRate, NoLimit)
		}
	}
	if c.AuditSize <= 0 || c.AuditFiles < 0 || c.StoreQuota <= 0 {
		return fmt.Errorf("%w: sizes and counts are not negative, and --audit-max-size and --store-quota are more than 0", ErrConfig)
	}
	seen := map[string]bool{}
	for i := range c.Clusters {
		s := &c.Clusters[i]
		if seen[s.Name] {
			return fmt.Errorf("%w: cluster %s is configured twice", ErrConfig, s.Name)
		}
		seen[s.Name] = true
		if _, err := s.Resolve(); err != nil {
			return err
		}
		if _, err := s.cluster(); err != nil {
			return err
		}
	}
	return nil
}

// limits are those of one caller. Who comes after a while may do at once what he
// might have done in the last seconds.
func (c *Config) limits() eksapi.Limits {
	of := func(perSecond float64, seconds float64) eksapi.Rate {
		return eksapi.Rate{PerSecond: perSecond, Burst: max(1, int(math.Ceil(perSecond*seconds)))}
	}
	return eksapi.Limits{Reads: of(c.MaxReads, 4), Writes: of(c.MaxWrites, 5), Exchanges: of(c.MaxExchanges, 5)}
}

// warnings are settings that are accepted and that somebody should know of.
func (c *Config) warnings() []string {
	var out []string
	if c.StandInSTS {
		out = append(out, "STAND-IN STS: the credentials issued are marked and open nothing; never use this beyond a demo or a test")
	}
	if c.TLSCert == "" && !loopback(c.Listen) {
		out = append(out, "plain HTTP beyond loopback: tokens and credentials can be read on the way")
	}
	if u, err := url.Parse(c.STSEndpoint); err == nil && u.Scheme == "http" && !loopback(net.JoinHostPort(u.Hostname(), "0")) {
		out = append(out, "--sts-endpoint is plain HTTP: the credentials that it issues can be read on the way")
	}
	if c.NodeBinding != NodeBindingRequire {
		out = append(out, "node binding is "+c.NodeBinding+": a node's agent may redeem tokens of pods on other nodes")
	}
	return out
}

// oneLine keeps an error of several lines readable in a log.
func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }
