// SPDX-License-Identifier: Apache-2.0

// Package adminapi is what the agent's admin socket says and how to ask it:
// JSON over HTTP on a unix socket that only root can open. The agent serves
// it, the debug CLI reads it; neither imports the other.
//
// Nothing here can hold a secret or a token, by type: credentials appear as
// their role, their association and their expiry.
package adminapi

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/adminsocket"
	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

// DefaultSocket is where the agent listens unless told otherwise.
const DefaultSocket = "/run/latchkey/admin.sock"

// Paths of the API. All are GET unless they say otherwise.
const (
	PathStatus  = "/v1/status"
	PathPods    = "/v1/pods"
	PathWhois   = "/v1/whois"   // ?q=QUERY
	PathFacts   = "/v1/facts"   // ?q=QUERY
	PathDenials = "/v1/denials" // ?after=SEQ
	PathCache   = "/v1/cache"
	// PathCacheDrop and PathCacheRefresh are POST with ?subject=SUBJECT.
	PathCacheDrop    = "/v1/cache/drop"
	PathCacheRefresh = "/v1/cache/refresh"
	// PathToken is POST; the body is the token.
	PathToken = "/v1/token"
	// PathUpstream is POST: it makes the agent connect to EKS Auth.
	PathUpstream = "/v1/upstream"
	// PathLogLevel is GET, and PUT with a LogLevel as its body.
	PathLogLevel = "/v1/log-level"
)

// Errors that a call's can be compared with.
var (
	// ErrNoAgent: nobody listens on the socket.
	ErrNoAgent = errors.New("no agent answers")
	// ErrNotPermitted: the socket is root's.
	ErrNotPermitted = errors.New("not permitted")
	// ErrNotFound: the agent knows nothing of what was asked for.
	ErrNotFound = errors.New("not found")
	// ErrInvalid: the agent could not read the question.
	ErrInvalid = errors.New("invalid question")
	// ErrUnsupported: this agent cannot do it.
	ErrUnsupported = errors.New("not supported by this agent")
)

// Status is the agent itself.
type Status struct {
	Version     string    `json:"version"`
	Started     time.Time `json:"started"`
	Cluster     string    `json:"cluster"`
	Attestation string    `json:"attestation"`
	// Exceptions to Attestation, by namespace.
	Exceptions map[string]string `json:"exceptions,omitempty"`
	// Attesting: the kernel's programs are attached and read.
	Attesting bool     `json:"attesting"`
	Fallbacks []string `json:"fallbacks,omitempty"`
	// Keys says how tokens are checked; "none" means by upstream alone.
	Keys       string            `json:"keys"`
	Kubepods   string            `json:"kubepods_cgroup,omitempty"`
	AttachedAt string            `json:"attached_at,omitempty"`
	Listeners  []Listener        `json:"listeners"`
	BPF        map[string]uint64 `json:"bpf_events,omitempty"`

	// Time is the agent's clock when it answered, PID its process id in its own
	// pid namespace, Audience what tokens must be made for.
	Time     time.Time `json:"time"`
	PID      int       `json:"pid"`
	Audience string    `json:"audience,omitempty"`
	// CannotAttest says why not, if Attesting is false.
	CannotAttest string `json:"cannot_attest,omitempty"`
	// CgroupMount is where cgroup v2 is mounted, as the agent sees it; the paths
	// of cgroups are below it.
	CgroupMount string `json:"cgroup_mount,omitempty"`
	// AttachedID is the kernel's id of the cgroup AttachedAt, and Netns the inode
	// of the agent's network namespace: whoever sees others under the same names
	// looks at another node, or from within a container.
	AttachedID uint64 `json:"attached_cgroup_id,omitempty"`
	Netns      uint32 `json:"netns_inode,omitempty"`
	// Pins is the directory of the pinned programs, links and maps, and
	// ReusedLinks how many of them the agent found attached when it started.
	Pins        string `json:"pins,omitempty"`
	ReusedLinks int    `json:"reused_links,omitempty"`
	// Addresses are those that the agent keeps on the node.
	Addresses []Address `json:"addresses,omitempty"`
	Upstream  Upstream  `json:"upstream"`
}

// Address is one link-local address as the agent last saw it.
type Address struct {
	Address string `json:"address"`
	// Present: it is on the link and can be bound.
	Present bool   `json:"present"`
	Link    string `json:"link,omitempty"`
	// Repairs counts how often it was removed and put back.
	Repairs uint64 `json:"repairs"`
	Error   string `json:"error,omitempty"`
}

// Upstream is EKS Auth as the agent's calls found it.
type Upstream struct {
	Endpoint string `json:"endpoint,omitempty"`
	// LastCall is the end of the last exchange, LastSuccess of the last good one;
	// nil if there was none.
	LastCall    *time.Time `json:"last_call,omitempty"`
	LastSuccess *time.Time `json:"last_success,omitempty"`
	// LastError is why the last exchange failed, nil if it did not.
	LastError *UpstreamError `json:"last_error,omitempty"`
	// ClockSkew is the service's clock (header Date) minus this node's, in
	// seconds; nil if no answer has told.
	ClockSkew   *float64   `json:"clock_skew_seconds,omitempty"`
	ClockSkewAt *time.Time `json:"clock_skew_at,omitempty"`
	// Credentials are the node's own, which the agent calls with.
	Credentials NodeCredentials `json:"node_credentials"`
}

// NodeCredentials describes the credentials that the agent itself uses.
type NodeCredentials struct {
	// State is "unknown" until they are needed, "ok", "missing" if there are
	// none, or "refused" if the service did not accept them the last time.
	State string `json:"state"`
	// Source is where the SDK found them.
	Source string `json:"source,omitempty"`
	// Expires is nil if they do not say.
	Expires *time.Time `json:"expires,omitempty"`
	Error   string     `json:"error,omitempty"`
}

// UpstreamError is a refusal or failure of EKS Auth.
type UpstreamError struct {
	// Reason is the value of metric labels, such as "upstream_not_found".
	Reason string `json:"reason"`
	// Status, Code and RequestID are the service's, if it answered.
	Status    int    `json:"status,omitempty"`
	Code      string `json:"code,omitempty"`
	Message   string `json:"message,omitempty"`
	RequestID string `json:"request_id,omitempty"`
}

// Denial is one refusal, or several of the same kind in a row.
type Denial struct {
	// Seq grows with each refusal that is remembered; ask with ?after=SEQ for
	// what came later.
	Seq uint64 `json:"seq"`
	// First and Last are the times of the first and last of Count refusals.
	First time.Time `json:"first"`
	Last  time.Time `json:"last"`
	Count uint64    `json:"count"`
	// Status is the HTTP status, Reason the value of metric labels.
	Status int    `json:"status"`
	Reason string `json:"reason"`
	// Shadow: served all the same, because the mode is weaker than enforce.
	Shadow bool `json:"served_anyway,omitempty"`
	// Finding is what the kernel's evidence resolved to, and PodUID, Namespace,
	// ServiceAccount and Pod the pod, if it is one and known. Where it is none,
	// PodUID is empty, and the names are those of the connecting process's pod.
	Finding        string `json:"finding"`
	PodUID         string `json:"pod_uid,omitempty"`
	Namespace      string `json:"namespace,omitempty"`
	ServiceAccount string `json:"service_account,omitempty"`
	Pod            string `json:"pod,omitempty"`
	// Cgroup, PID, Process and UID are the connecting process's; PID is in the
	// host's pid namespace, Process its name when it was refused, if it still
	// ran then.
	Cgroup  string `json:"cgroup,omitempty"`
	PID     uint32 `json:"pid,omitempty"`
	Process string `json:"process,omitempty"`
	UID     uint32 `json:"uid"`
	// What the token says of itself; unless TokenVerified, anybody may have
	// written it. Empty if there was none that could be read.
	TokenPodUID         string     `json:"token_pod_uid,omitempty"`
	TokenNamespace      string     `json:"token_namespace,omitempty"`
	TokenServiceAccount string     `json:"token_service_account,omitempty"`
	TokenPod            string     `json:"token_pod,omitempty"`
	TokenJTI            string     `json:"token_jti,omitempty"`
	TokenVerified       bool       `json:"token_verified,omitempty"`
	TokenExpires        *time.Time `json:"token_expires,omitempty"`
	// Peer is the client's end of the connection.
	Peer string `json:"peer,omitempty"`
	// Upstream is set if EKS Auth refused or failed.
	Upstream *UpstreamError `json:"upstream,omitempty"`
	// Detail is the cause as the agent logs it.
	Detail string `json:"detail,omitempty"`
}

// Reasons lists what Denial.Reason can be.
func Reasons() []string {
	return []string{
		string(evidence.ReasonNoEvidence), string(evidence.ReasonUnresolved), string(evidence.ReasonNotPod), string(evidence.ReasonTwoPods),
		string(evidence.ReasonForeignNetns), string(evidence.ReasonPodMismatch), string(evidence.ReasonPodEnded),
		string(evidence.ReasonTokenMissing), string(evidence.ReasonTokenTooLarge), string(evidence.ReasonTokenMalformed),
		string(evidence.ReasonTokenAlgorithm), string(evidence.ReasonTokenUnknownKey), string(evidence.ReasonTokenSignature),
		string(evidence.ReasonTokenIssuer), string(evidence.ReasonTokenAudience), string(evidence.ReasonTokenExpired),
		string(evidence.ReasonTokenNotYetValid), string(evidence.ReasonTokenUnbound), string(evidence.ReasonKeysUnavailable),
		string(evidence.ReasonHost), string(evidence.ReasonRateLimited),
		string(evidence.ReasonUpstreamDenied), string(evidence.ReasonUpstreamNotFound), string(evidence.ReasonUpstreamToken),
		string(evidence.ReasonUpstreamThrottled), string(evidence.ReasonUpstreamUnavailable), string(evidence.ReasonUpstreamInvalid),
		string(evidence.ReasonStopping), "bad_request", "internal_error",
	}
}

// Denials is the answer of PathDenials, oldest first.
type Denials struct {
	Denials []Denial `json:"denials"`
	// Seq is the newest there is, for the next question.
	Seq uint64 `json:"seq"`
}

// CacheEntry is what the cache holds for one subject.
type CacheEntry struct {
	PodUID         string `json:"pod_uid"`
	Namespace      string `json:"namespace"`
	ServiceAccount string `json:"service_account"`
	// Verified is false if only EKS Auth has judged the token; the subject is
	// then what the token claims.
	Verified bool `json:"verified"`
	// State is the cache's: fresh, fetching, refreshing, queued, idle,
	// awaiting_token, failing or denied.
	State       string `json:"state"`
	Role        string `json:"role,omitempty"`
	Association string `json:"association,omitempty"`
	// Times are nil where there is none.
	Fetched      *time.Time `json:"fetched,omitempty"`
	Expires      *time.Time `json:"expires,omitempty"`
	RefreshAt    *time.Time `json:"refresh_at,omitempty"`
	LastUsed     *time.Time `json:"last_used,omitempty"`
	TokenExpires *time.Time `json:"token_expires,omitempty"`
	// LastError is the last failed fetch's; nil after a success.
	LastError   *UpstreamError `json:"last_error,omitempty"`
	LastErrorAt *time.Time     `json:"last_error_at,omitempty"`
}

// Cache is the answer of PathCache.
type Cache struct {
	Entries []CacheEntry `json:"entries"`
	// Bytes is what the entries take, Hits and Misses are since the start.
	Bytes    int64  `json:"bytes"`
	Hits     uint64 `json:"hits"`
	Misses   uint64 `json:"misses"`
	InFlight int    `json:"calls_in_flight"`
	Waiting  int    `json:"calls_waiting"`
	// RateFactor is 1, or less while EKS Auth throttles.
	RateFactor float64 `json:"rate_factor"`
}

// CacheChange is the answer of PathCacheDrop and PathCacheRefresh.
type CacheChange struct {
	Subject string `json:"subject"`
	// Dropped entries, or entries whose renewal was Started.
	Dropped int `json:"dropped,omitempty"`
	Started int `json:"started,omitempty"`
	// Waiting entries are renewed by the next request, which brings a token: the
	// one that is kept has expired.
	Waiting int `json:"waiting,omitempty"`
}

// Process is a process of the node.
type Process struct {
	PID  int    `json:"pid"`
	Name string `json:"name,omitempty"`
}

// Connection is one connection to the agent and what the kernel said of it.
type Connection struct {
	// Client is the client's end.
	Client   string    `json:"client"`
	Accepted time.Time `json:"accepted"`
	// Finding is pod, not_pod, contradictory or none, and Reason says why it is
	// not pod.
	Finding string `json:"finding"`
	Reason  string `json:"reason,omitempty"`
	// PodUID is set for finding pod.
	PodUID string `json:"pod_uid,omitempty"`
	// The rest is the kernel's record, empty for finding none.
	PID          uint32 `json:"pid,omitempty"`
	UID          uint32 `json:"uid"`
	TaskCgroup   string `json:"task_cgroup,omitempty"`
	SocketCgroup string `json:"socket_cgroup,omitempty"`
	NetnsInode   uint32 `json:"netns_inode,omitempty"`
	UnknownNetns bool   `json:"unknown_netns,omitempty"`
}

// Facts is all that the agent knows of what one query names, for `latchkey
// explain`. What it does not know is left empty.
type Facts struct {
	Query string `json:"query"`
	// Kind is what the query was taken for: "process", "connection", "cgroup",
	// "container" or "pod".
	Kind string `json:"kind"`
	// Status is the agent's.
	Status Status `json:"agent"`
	// Process, Connection and Cgroup are those that the query names or leads
	// over; Cgroup is a path below the mount.
	Process    *Process    `json:"process,omitempty"`
	Connection *Connection `json:"connection,omitempty"`
	Cgroup     string      `json:"cgroup,omitempty"`
	Container  string      `json:"container,omitempty"`
	// Pod is nil if the way ends before one.
	Pod *Pod `json:"pod,omitempty"`
	// PodSeen is since when the agent knows the pod.
	PodSeen *time.Time `json:"pod_seen,omitempty"`
	// Sandbox is a process in the pod's network namespace, 0 if none is known.
	Sandbox     int    `json:"sandbox_pid,omitempty"`
	Netns       uint32 `json:"netns_inode,omitempty"`
	HostNetwork bool   `json:"host_network,omitempty"`
	// LastConnection is the pod's last among the connections remembered.
	LastConnection *Connection `json:"last_connection,omitempty"`
	// Token is what the pod's last accepted token said.
	TokenJTI     string     `json:"token_jti,omitempty"`
	TokenExpires *time.Time `json:"token_expires,omitempty"`
	// Cache is what is held for the pod.
	Cache []CacheEntry `json:"cache,omitempty"`
	// Denials are the recent refusals of the pod's connections and of its token,
	// oldest first.
	Denials []Denial `json:"denials,omitempty"`
}

// TokenCheck is what the agent makes of a token. It has neither the token nor
// its signature.
type TokenCheck struct {
	// Accepted: the agent would go on to the verdict. Otherwise Reason is the
	// value of metric labels and Message what the pod would be told.
	Accepted bool   `json:"accepted"`
	Reason   string `json:"reason,omitempty"`
	Message  string `json:"message,omitempty"`
	// Verified: the signature was checked with the cluster's keys.
	Verified bool `json:"verified"`
	// Keys says how tokens are checked here, as Status.Keys does.
	Keys     string    `json:"keys"`
	Audience string    `json:"audience"`
	Time     time.Time `json:"time"`
}

// Reached is the answer of PathUpstream: whether EKS Auth answers at all,
// whatever it says. The request is not signed and carries no token.
type Reached struct {
	Endpoint string `json:"endpoint"`
	// Status is the HTTP status, 0 without an answer; Error says why.
	Status int    `json:"status,omitempty"`
	Error  string `json:"error,omitempty"`
	// ClockSkew is the service's clock minus this node's, in seconds; nil if the
	// answer has no Date.
	ClockSkew *float64 `json:"clock_skew_seconds,omitempty"`
	// Milliseconds is how long it took.
	Milliseconds int64 `json:"milliseconds"`
}

// LogLevel is the body of a PUT of PathLogLevel.
type LogLevel struct {
	// Component is one of LogLevels.Levels, or "all".
	Component string `json:"component"`
	// Level is debug, info, warn or error.
	Level string `json:"level"`
}

// LogLevels is the answer of PathLogLevel: each component's level.
type LogLevels struct {
	Levels map[string]string `json:"levels"`
}

// Listener is one address that credentials are served on.
type Listener struct {
	Address string `json:"address"`
	Serving bool   `json:"serving"`
	Error   string `json:"error,omitempty"`
}

// Pod is one pod of the node and what it was given.
type Pod struct {
	UID    string `json:"uid"`
	Cgroup string `json:"cgroup"`
	QoS    string `json:"qos"`
	// Namespace, ServiceAccount and Name come from the last accepted token, or
	// the container runtime; empty until one of them has told.
	Namespace      string `json:"namespace,omitempty"`
	ServiceAccount string `json:"service_account,omitempty"`
	Name           string `json:"name,omitempty"`
	// Role is the ARN that the credentials assume.
	Role        string `json:"role,omitempty"`
	Association string `json:"association,omitempty"`
	// Credentials is none, fetching, valid, failing or denied.
	Credentials string     `json:"credentials"`
	Expires     *time.Time `json:"expires,omitempty"`
	// Verdict is the last one of this pod, and LastAsked its time.
	Verdict   string     `json:"verdict,omitempty"`
	LastAsked *time.Time `json:"last_asked,omitempty"`
	Ended     bool       `json:"ended,omitempty"`
	// Containers are the container runtime's names, if it has told.
	Containers []string `json:"containers,omitempty"`
}

// Pods is the answer of PathPods.
type Pods struct {
	Pods []Pod `json:"pods"`
}

// Whois answers "which pod is this?", step by step.
type Whois struct {
	Query string `json:"query"`
	// Steps are what was found on the way, in order.
	Steps []Step `json:"steps"`
	// Pod is nil if the way ends before one.
	Pod *Pod `json:"pod,omitempty"`
}

// Step is one piece of evidence and where it is from.
type Step struct {
	What   string `json:"what"`
	Value  string `json:"value"`
	Source string `json:"source"`
}

// Problem is the body of every answer that is not 200.
type Problem struct {
	Error string `json:"error"`
}

// Client asks an agent.
type Client struct {
	http   *http.Client
	socket string
}

// NewClient makes a client for a socket; nothing is opened until it is asked.
func NewClient(socket string) *Client {
	return &Client{
		socket: socket,
		http: &http.Client{
			Timeout:   10 * time.Second,
			Transport: adminsocket.Transport(socket),
		},
	}
}

// Status asks for the agent itself.
func (c *Client) Status(ctx context.Context) (Status, error) {
	return ask[Status](ctx, c, http.MethodGet, PathStatus, nil, nil)
}

// Pods asks for the node's pods.
func (c *Client) Pods(ctx context.Context) ([]Pod, error) {
	p, err := ask[Pods](ctx, c, http.MethodGet, PathPods, nil, nil)
	return p.Pods, err
}

// Whois asks which pod a process, a connection's client end (ip:port), a cgroup
// path or id, a container id, a pod's UID or NAMESPACE/NAME is. The error wraps
// ErrInvalid if the query is none of these.
func (c *Client) Whois(ctx context.Context, query string) (Whois, error) {
	return ask[Whois](ctx, c, http.MethodGet, PathWhois, url.Values{"q": {query}}, nil)
}

// Facts asks for all that the agent knows of what a query names: see Whois.
func (c *Client) Facts(ctx context.Context, query string) (Facts, error) {
	return ask[Facts](ctx, c, http.MethodGet, PathFacts, url.Values{"q": {query}}, nil)
}

// Denials asks for the refusals that changed after a sequence number; 0 means
// all that are remembered.
func (c *Client) Denials(ctx context.Context, after uint64) (Denials, error) {
	return ask[Denials](ctx, c, http.MethodGet, PathDenials, url.Values{"after": {strconv.FormatUint(after, 10)}}, nil)
}

// Cache asks what is cached.
func (c *Client) Cache(ctx context.Context) (Cache, error) {
	return ask[Cache](ctx, c, http.MethodGet, PathCache, nil, nil)
}

// DropCached makes the agent forget a subject's credentials. A subject is
// NAMESPACE/SERVICEACCOUNT or a pod's UID; the error wraps ErrNotFound if
// nothing is cached for it.
func (c *Client) DropCached(ctx context.Context, subject string) (CacheChange, error) {
	return ask[CacheChange](ctx, c, http.MethodPost, PathCacheDrop, url.Values{"subject": {subject}}, nil)
}

// RefreshCached makes the agent renew a subject's credentials now: see
// DropCached.
func (c *Client) RefreshCached(ctx context.Context, subject string) (CacheChange, error) {
	return ask[CacheChange](ctx, c, http.MethodPost, PathCacheRefresh, url.Values{"subject": {subject}}, nil)
}

// CheckToken makes the agent check a token as it would a pod's. The agent
// keeps nothing of it.
func (c *Client) CheckToken(ctx context.Context, token string) (TokenCheck, error) {
	return ask[TokenCheck](ctx, c, http.MethodPost, PathToken, nil, strings.NewReader(token))
}

// ReachUpstream makes the agent connect to EKS Auth.
func (c *Client) ReachUpstream(ctx context.Context) (Reached, error) {
	return ask[Reached](ctx, c, http.MethodPost, PathUpstream, nil, nil)
}

// LogLevels asks for the levels of the agent's components.
func (c *Client) LogLevels(ctx context.Context) (LogLevels, error) {
	return ask[LogLevels](ctx, c, http.MethodGet, PathLogLevel, nil, nil)
}

// SetLogLevel changes one until the agent ends, and returns them all. The error
// wraps ErrInvalid if there is no such component or level.
func (c *Client) SetLogLevel(ctx context.Context, level LogLevel) (LogLevels, error) {
	body, err := json.Marshal(level)
	if err != nil {
		return LogLevels{}, fmt.Errorf("ask the agent: %w", err)
	}
	return ask[LogLevels](ctx, c, http.MethodPut, PathLogLevel, nil, bytes.NewReader(body))
}

// maxAnswer is far beyond what a node of thousands of pods has to say.
const maxAnswer = 64 << 20

func ask[T any](ctx context.Context, c *Client, method, path string, query url.Values, body io.Reader) (T, error) {
	var out T
	u := url.URL{Scheme: "http", Host: "agent", Path: path, RawQuery: query.Encode()}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), body)
	if err != nil {
		return out, fmt.Errorf("ask the agent: %w", err)
	}
	resp, err := c.http.Do(req)
	// The URL around the cause is made up, and says nothing to people.
	var failed *url.Error
	if errors.As(err, &failed) {
		err = failed.Err
	}
	var waited net.Error
	switch {
	case err == nil:
	case errors.As(err, &waited) && waited.Timeout():
		return out, fmt.Errorf("the agent on %s has not answered within %s: its log may say why", c.socket, c.http.Timeout)
	case adminsocket.Forbidden(err):
		return out, fmt.Errorf("%w: the admin socket %s is root's; use sudo", ErrNotPermitted, c.socket)
	case adminsocket.NobodyListens(err):
		return out, fmt.Errorf("%w on %s: is latchkey-agent running on this node, and is --admin-socket the same? %w", ErrNoAgent, c.socket, err)
	default:
		return out, fmt.Errorf("ask the agent: %w", err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return out, fmt.Errorf("read the agent's answer: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		var p Problem
		if json.Unmarshal(text, &p) != nil || p.Error == "" {
			p.Error = resp.Status
		}
		switch resp.StatusCode {
		case http.StatusNotFound:
			return out, fmt.Errorf("%w: %s", ErrNotFound, p.Error)
		case http.StatusBadRequest:
			return out, fmt.Errorf("%w: %s", ErrInvalid, p.Error)
		case http.StatusNotImplemented:
			return out, fmt.Errorf("%w: %s", ErrUnsupported, p.Error)
		}
		return out, fmt.Errorf("the agent says: %s", p.Error)
	}
	if err := json.Unmarshal(text, &out); err != nil {
		return out, fmt.Errorf("read the agent's answer: %w", err)
	}
	return out, nil
}
