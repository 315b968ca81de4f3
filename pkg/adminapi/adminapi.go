// SPDX-License-Identifier: Apache-2.0

// Package adminapi is what the agent's admin socket says and how to ask it:
// JSON over HTTP on a unix socket that only root can open. The agent serves
// it, the debug CLI reads it; neither imports the other.
//
// Nothing here can hold a secret or a token, by type: credentials appear as
// their role, their association and their expiry.
package adminapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"syscall"
	"time"
)

// DefaultSocket is where the agent listens unless told otherwise.
const DefaultSocket = "/run/latchkey/admin.sock"

// Paths of the API.
const (
	PathStatus = "/v1/status"
	PathPods   = "/v1/pods"
	PathWhois  = "/v1/whois"
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
	// Namespace, ServiceAccount and Name come from the last accepted token;
	// empty until the pod has presented one.
	Namespace      string `json:"namespace,omitempty"`
	ServiceAccount string `json:"service_account,omitempty"`
	Name           string `json:"name,omitempty"`
	// Role is the ARN that the credentials assume.
	Role        string `json:"role,omitempty"`
	Association string `json:"association,omitempty"`
	// Credentials is none, fetching, valid or failing.
	Credentials string     `json:"credentials"`
	Expires     *time.Time `json:"expires,omitempty"`
	// Verdict is the last one of this pod, and LastAsked its time.
	Verdict   string     `json:"verdict,omitempty"`
	LastAsked *time.Time `json:"last_asked,omitempty"`
	Ended     bool       `json:"ended,omitempty"`
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
			Timeout: 10 * time.Second,
			Transport: &http.Transport{
				DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
					return (&net.Dialer{}).DialContext(ctx, "unix", socket)
				},
			},
		},
	}
}

// Status asks for the agent itself.
func (c *Client) Status(ctx context.Context) (Status, error) {
	return get[Status](ctx, c, PathStatus, nil)
}

// Pods asks for the node's pods.
func (c *Client) Pods(ctx context.Context) ([]Pod, error) {
	p, err := get[Pods](ctx, c, PathPods, nil)
	return p.Pods, err
}

// Whois asks which pod a process, a connection's client end (ip:port), a cgroup
// path or id, or a pod UID is. The error wraps ErrInvalid if the query is none
// of these.
func (c *Client) Whois(ctx context.Context, query string) (Whois, error) {
	return get[Whois](ctx, c, PathWhois, url.Values{"q": {query}})
}

func get[T any](ctx context.Context, c *Client, path string, query url.Values) (T, error) {
	var out T
	u := url.URL{Scheme: "http", Host: "agent", Path: path, RawQuery: query.Encode()}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return out, fmt.Errorf("ask the agent: %w", err)
	}
	resp, err := c.http.Do(req)
	switch {
	case err == nil:
	case errors.Is(err, os.ErrPermission):
		return out, fmt.Errorf("%w: the admin socket %s is root's; use sudo", ErrNotPermitted, c.socket)
	case errors.Is(err, os.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return out, fmt.Errorf("%w on %s: is latchkey-agent running on this node, and is --admin-socket the same? %w", ErrNoAgent, c.socket, err)
	default:
		return out, fmt.Errorf("ask the agent: %w", err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 64<<20))
	if err != nil {
		return out, fmt.Errorf("read the agent's answer: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		var p Problem
		if json.Unmarshal(body, &p) != nil || p.Error == "" {
			p.Error = resp.Status
		}
		switch resp.StatusCode {
		case http.StatusNotFound:
			return out, fmt.Errorf("%w: %s", ErrNotFound, p.Error)
		case http.StatusBadRequest:
			return out, fmt.Errorf("%w: %s", ErrInvalid, p.Error)
		}
		return out, fmt.Errorf("the agent says: %s", p.Error)
	}
	if err := json.Unmarshal(body, &out); err != nil {
		return out, fmt.Errorf("read the agent's answer: %w", err)
	}
	return out, nil
}
