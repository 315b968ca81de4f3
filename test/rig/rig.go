// SPDX-License-Identifier: Apache-2.0

//go:build linux

// Package rig is a whole Latchkey node for black-box tests and the demo: a
// testnode, a signer of its cluster's tokens, a stand-in for EKS Auth in the
// node's network namespace, and the agent's own program as a process in the
// agent's cgroup. Only EKS Auth is a stand-in: the kernel, the cgroups, the
// namespaces, the agent and the clients are real.
package rig

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/adminapi"
	"github.com/latchkey-dev/latchkey/test/standin/eksauth"
	"github.com/latchkey-dev/latchkey/test/standin/tokens"
	"github.com/latchkey-dev/latchkey/test/testnode"
)

// What is the same on every rig.
const (
	Cluster = "demo"
	Account = "111122223333"
	Region  = "us-west-2"
	// Host4 and Host6 are where SDKs ask.
	Host4 = "169.254.170.23:80"
	Host6 = "[fd00:ec2::23]:80"
	// Path that they ask for.
	Path = "/v1/credentials"

	probePort   = "2703"
	metricsPort = "2705"
)

// Config of a Rig. The zero value works but for AgentBinary.
type Config struct {
	// AgentBinary is the agent's program. Required.
	AgentBinary string
	// Node is the testnode's.
	Node testnode.Config
	// Signer is the cluster's token signer.
	Signer tokens.Config
	// EKSAuth is the stand-in's; cluster, account, region, keys and issuer are
	// filled in.
	EKSAuth eksauth.Config
}

// Rig is a node with everything that an agent needs around it.
type Rig struct {
	Node    *testnode.Node
	Signer  *tokens.Signer
	EKSAuth *eksauth.Running

	cfg  Config
	keys string
	// endpoint is what agents ask, with the node's own keys for it.
	endpoint, nodeKey, nodeSecret string
}

// New makes the node, the signer and the stand-in. No agent runs yet.
func New(ctx context.Context, cfg Config) (_ *Rig, err error) {
	r := &Rig{cfg: cfg, nodeKey: nodeKey, nodeSecret: nodeSecret}
	if r.Signer, err = tokens.NewSigner(cfg.Signer); err != nil {
		return nil, fmt.Errorf("making the cluster's signing key: %w", err)
	}
	if r.Node, err = testnode.New(ctx, cfg.Node); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.Close())
		}
	}()
	r.keys = filepath.Join(r.Node.Dir(), "jwks.json")
	if err := os.WriteFile(r.keys, r.Signer.JWKS(), 0o644); err != nil {
		return nil, err
	}
	ec := cfg.EKSAuth
	ec.Cluster, ec.Account, ec.Region = Cluster, Account, Region
	ec.JWKS, ec.Issuer = r.Signer.JWKS(), r.Signer.Issuer()
	if ec.Callers == nil {
		ec.Callers = map[string]string{nodeKey: nodeSecret}
	}
	standin, err := eksauth.New(ec)
	if err != nil {
		return nil, err
	}
	// In the node's network namespace, where the agent finds it.
	err = r.Node.Do(func() error {
		ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		r.EKSAuth = standin.Serve(ln)
		r.endpoint = r.EKSAuth.URL
		return nil
	})
	return r, err
}

// The node's own AWS credentials, which only the stand-in knows; latchkey-server
// makes its own.
const (
	nodeKey    = "AKIASTANDINNODE00000"
	nodeSecret = "stand-in secret of the node, worth nothing"
)

// Close ends and removes everything.
func (r *Rig) Close() error {
	if r.EKSAuth != nil {
		r.EKSAuth.Close()
	}
	return r.Node.Close()
}

// KeyFile is the cluster's public keys.
func (r *Rig) KeyFile() string { return r.keys }

// PinPath is where the agent pins.
func (r *Rig) PinPath() string { return filepath.Join(r.Node.BPFFS(), "latchkey") }

// Socket is the agent's admin socket.
func (r *Rig) Socket() string { return filepath.Join(r.Node.Dir(), "run", "admin.sock") }

// StateDir is the agent's.
func (r *Rig) StateDir() string { return filepath.Join(r.Node.Dir(), "state") }

// Pod is a pod with a token of its service account.
type Pod struct {
	*testnode.Pod
	// Token is what WriteToken last wrote.
	Token string
}

// AddPod makes a pod with a fresh token in its token file.
func (r *Rig) AddPod(ctx context.Context, cfg testnode.PodConfig) (*Pod, error) {
	p, err := r.Node.AddPod(ctx, cfg)
	if err != nil {
		return nil, err
	}
	pod := &Pod{Pod: p}
	return pod, r.Rotate(pod)
}

// Claims of a pod's token.
func (r *Rig) Claims(p *testnode.Pod) tokens.Claims {
	return tokens.Claims{Namespace: p.Namespace, ServiceAccount: p.ServiceAccount, Pod: p.Name, PodUID: string(p.UID)}
}

// Rotate gives the pod a new token, as the kubelet does.
func (r *Rig) Rotate(p *Pod) error {
	p.Token = r.Signer.Token(r.Claims(p.Pod))
	return p.WriteToken(p.Token)
}

// Associate gives a service account a role of the rig's account.
func (r *Rig) Associate(namespace, serviceAccount, role string) eksauth.Association {
	return r.EKSAuth.Associate(eksauth.Association{
		Namespace: namespace, ServiceAccount: serviceAccount,
		RoleARN: "arn:aws:iam::" + Account + ":role/" + role,
	})
}

// Agent is the agent's process.
type Agent struct {
	rig  *Rig
	cmd  *testnode.Cmd
	log  *buffer
	done chan struct{}
	err  error
}

// Args are the arguments of `latchkey-agent server` on this rig.
func (r *Rig) Args(more ...string) []string {
	args := []string{
		"server", "--cluster-name", Cluster, "--endpoint", r.endpoint,
		"--jwks", r.keys, "--issuer", r.Signer.Issuer(),
		"--cgroup-root", r.Node.KubepodsRoot(), "--pin-path", r.PinPath(),
		"--admin-socket", r.Socket(), "--state-dir", r.StateDir(),
	}
	return append(args, more...)
}

// StartAgent starts the agent with Args(more...) and waits until it is ready.
func (r *Rig) StartAgent(ctx context.Context, more ...string) (*Agent, error) {
	return r.StartAgentExactly(ctx, r.Args(more...)...)
}

// StartAgentExactly starts the agent's program with these arguments only, and
// waits until it is ready.
func (r *Rig) StartAgentExactly(ctx context.Context, args ...string) (*Agent, error) {
	a, err := r.LaunchAgent(args...)
	if err != nil {
		return nil, err
	}
	if err := a.WaitReady(ctx); err != nil {
		a.Kill()
		return nil, fmt.Errorf("%w; its log:\n%s", err, a.Log())
	}
	return a, nil
}

// LaunchAgent starts the program and does not wait for anything.
func (r *Rig) LaunchAgent(args ...string) (*Agent, error) { return r.LaunchAgentUnder(nil, args...) }

// LaunchAgentUnder starts the program through another one, such as setpriv,
// which gets the agent's command line after its own arguments.
func (r *Rig) LaunchAgentUnder(wrapper []string, args ...string) (*Agent, error) {
	a := &Agent{rig: r, log: &buffer{}, done: make(chan struct{})}
	place := r.Node.AgentPlace().WithEnv("AWS_REGION="+Region, "AWS_ACCESS_KEY_ID="+r.nodeKey, "AWS_SECRET_ACCESS_KEY="+r.nodeSecret,
		"AWS_EC2_METADATA_DISABLED=true")
	a.cmd = place.Command(context.Background(), slices.Concat(wrapper, []string{r.cfg.AgentBinary}, args)...)
	a.cmd.Stdout, a.cmd.Stderr = a.log, a.log
	if err := a.cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting the agent: %w", err)
	}
	go func() {
		a.err = a.cmd.Wait()
		close(a.done)
	}()
	return a, nil
}

// PID is the agent's process id.
func (a *Agent) PID() int { return a.cmd.Process.Pid }

// Log is what the agent has written so far.
func (a *Agent) Log() string { return a.log.String() }

// Done is closed when the process has ended.
func (a *Agent) Done() <-chan struct{} { return a.done }

// Err is how the process ended, once Done is closed.
func (a *Agent) Err() error { return a.err }

// WaitReady polls /readyz until it says yes, the agent ends, or ctx does.
func (a *Agent) WaitReady(ctx context.Context) error {
	for {
		_, last := a.rig.Get(ctx, probePort, "/readyz")
		if last == nil {
			return nil
		}
		select {
		case <-a.done:
			return fmt.Errorf("the agent ended: %w", errors.Join(a.err, last))
		case <-ctx.Done():
			return fmt.Errorf("the agent did not become ready: %w", last)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Stop asks the agent to stop and waits for it; the error is how it ended.
func (a *Agent) Stop(ctx context.Context) error {
	_ = a.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-a.done:
		return a.err
	case <-ctx.Done():
		a.Kill()
		return fmt.Errorf("the agent did not stop: %w", ctx.Err())
	}
}

// Kill is kill -9.
func (a *Agent) Kill() {
	_ = a.cmd.Process.Kill()
	<-a.done
}

// Get fetches a path from a port of the node's loopback.
func (r *Rig) Get(ctx context.Context, port, path string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	client := r.client()
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://127.0.0.1:"+port+path, nil)
	if err != nil {
		return "", err
	}
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 4<<20))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %d %s", path, resp.StatusCode, bytes.TrimSpace(body))
	}
	return string(body), err
}

// Ready asks /readyz.
func (r *Rig) Ready(ctx context.Context) (string, error) { return r.Get(ctx, probePort, "/readyz") }

// Metrics fetches /metrics.
func (r *Rig) Metrics(ctx context.Context) (string, error) {
	return r.Get(ctx, metricsPort, "/metrics")
}

// client is one whose connections are made in the node's network namespace, by
// this process.
func (r *Rig) client() *http.Client {
	return &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, network, address string) (c net.Conn, err error) {
			err = r.Node.Do(func() error {
				c, err = (&net.Dialer{}).DialContext(ctx, network, address)
				return err
			})
			return c, err
		},
	}}
}

// Admin is a client of the agent's admin socket.
func (r *Rig) Admin() *adminapi.Client { return adminapi.NewClient(r.Socket()) }

// Cleanup runs `latchkey-agent cleanup` on the node.
func (r *Rig) Cleanup(ctx context.Context) (string, error) {
	out, err := r.Node.AgentPlace().Command(ctx, r.cfg.AgentBinary, "cleanup",
		"--pin-path", r.PinPath(), "--admin-socket", r.Socket(), "--state-dir", r.StateDir()).CombinedOutput()
	return string(out), err
}

// Answer is what the endpoint said to one request.
type Answer struct {
	Status int
	Header http.Header
	Body   string
}

// askTimeout bounds one request. It only matters to a test that fails.
const askTimeout = 20 * time.Second

// errUsedUp: an answer or an error has ended the connection.
var errUsedUp = errors.New("the connection is used up")

// Conn asks for credentials over one connection, one request after the other.
//
// It speaks HTTP itself: http.Transport gives a connection up whose writer has
// not been heard of 50 ms after the answer, which on a slow machine happens to
// good ones.
type Conn struct {
	net.Conn
	r    *bufio.Reader
	host string
	used bool
}

// Over makes requests over a connection that somebody opened, whoever it was.
// The requests are made by this process; the kernel's evidence is that of the
// connection's opener.
func Over(c net.Conn, host string) *Conn {
	return &Conn{Conn: c, r: bufio.NewReader(c), host: host}
}

// Ask makes one request with a token. A deadline that the connection has stays.
func (c *Conn) Ask(ctx context.Context, token string) (Answer, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+c.host+Path, nil)
	if err != nil {
		return Answer{}, err
	}
	req.Header.Set("Authorization", token)
	// As people's tools do: the answer is text.
	req.Header.Set("Accept", "*/*")
	if c.used {
		return Answer{}, errUsedUp
	}
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	a, last, err := c.exchange(req)
	if !stop() || err != nil || last {
		c.used = true
		_ = c.Close()
	}
	if err != nil && ctx.Err() != nil {
		err = ctx.Err()
	}
	return a, err
}

// exchange writes a request and reads its answer; last says that none follows.
func (c *Conn) exchange(req *http.Request) (a Answer, last bool, err error) {
	// Who is turned away may be told before all is written.
	werr := req.Write(c.Conn)
	resp, err := http.ReadResponse(c.r, req)
	if err != nil {
		return Answer{}, true, errors.Join(werr, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	return Answer{resp.StatusCode, resp.Header, string(body)}, resp.Close || werr != nil, err
}

// Dial opens a connection to the endpoint from a process in the place, and
// leaves that process running: it is the connection's opener. host is Host4 or
// Host6.
func Dial(ctx context.Context, place testnode.Place, host string) (*Conn, *testnode.Proc, error) {
	proc, err := place.Spawn(ctx)
	if err != nil {
		return nil, nil, err
	}
	c, err := proc.DialContext(ctx, "tcp", host)
	if err != nil {
		proc.Kill()
		return nil, nil, err
	}
	return Over(c, host), proc, nil
}

// Ask asks once from a process in the place, which ends with it.
func Ask(ctx context.Context, place testnode.Place, host, token string) (Answer, error) {
	c, proc, err := Dial(ctx, place, host)
	if err != nil {
		return Answer{}, err
	}
	defer proc.Kill()
	defer c.Close()
	return c.Ask(ctx, token)
}

// buffer is a bytes.Buffer for two goroutines.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}
