// SPDX-License-Identifier: Apache-2.0

//go:build linux && privileged

package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/test/clients"
	"github.com/latchkey-dev/latchkey/test/rig"
	"github.com/latchkey-dev/latchkey/test/standin/eksauth"
	"github.com/latchkey-dev/latchkey/test/testnode"
)

// patience is how long a test waits for something that should come soon. It is
// long, because it only matters when the test fails.
const patience = 20 * time.Second

// What the programs are, once TestMain has built them.
var agentProgram, cliProgram string

func TestMain(m *testing.M) {
	testnode.Main(actions())
	os.Exit(run(m))
}

func run(m *testing.M) int {
	remove, err := build()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer remove()
	defer func() {
		if shared.world != nil {
			if err := shared.world.end(); err != nil {
				fmt.Fprintln(os.Stderr, "the shared node:", err)
			}
		}
	}()
	code := m.Run()
	if shared.world != nil {
		// Outside any test, so that its findings must make the run fail here.
		if problem := shared.world.findings(); problem != "" {
			fmt.Fprintln(os.Stderr, "the shared agent:", problem)
			code = 1
		}
	}
	return code
}

// build makes the programs, unless LATCHKEY_AGENT names one.
func build() (remove func(), err error) {
	if agentProgram = os.Getenv("LATCHKEY_AGENT"); agentProgram != "" {
		cliProgram = filepath.Join(filepath.Dir(agentProgram), "latchkey")
		return func() {}, nil
	}
	dir, err := os.MkdirTemp("", "latchkey-test-agent-")
	if err != nil {
		return nil, err
	}
	remove = func() { os.RemoveAll(dir) }
	// Other users run the CLI as well.
	if err := os.Chmod(dir, 0o755); err != nil {
		remove()
		return nil, err
	}
	out, err := exec.Command("go", "build", "-race", "-buildvcs=false", "-o", dir+"/",
		"github.com/latchkey-dev/latchkey/cmd/latchkey-agent", "github.com/latchkey-dev/latchkey/cmd/latchkey").CombinedOutput()
	if err != nil {
		remove()
		return nil, fmt.Errorf("building the agent (LATCHKEY_AGENT names one that is there): %w\n%s", err, out)
	}
	agentProgram, cliProgram = filepath.Join(dir, "latchkey-agent"), filepath.Join(dir, "latchkey")
	return remove, nil
}

// world is a node, and the agent that runs on it at the moment.
type world struct {
	*rig.Rig
	agent *rig.Agent
	// pods counts those made, for names and accounts.
	pods int
}

// newWorld makes a node without an agent. It goes with the test.
func newWorld(t *testing.T, cfg rig.Config) *world {
	t.Helper()
	w, err := makeWorld(t.Context(), cfg)
	must(t, err)
	t.Cleanup(func() {
		w.check(t)
		if err := w.end(); err != nil {
			t.Error(err)
		}
	})
	return w
}

func makeWorld(ctx context.Context, cfg rig.Config) (*world, error) {
	cfg.AgentBinary = agentProgram
	if cfg.Signer.Algorithm == "" {
		cfg.Signer.Algorithm = "ES256" // an RSA key takes its time
	}
	r, err := rig.New(ctx, cfg)
	if err != nil {
		return nil, err
	}
	return &world{Rig: r}, nil
}

func (w *world) end() error {
	if w.agent != nil {
		w.agent.Kill()
	}
	return w.Close()
}

// shared is a node with an enforcing agent, for tests that change neither.
var shared struct {
	sync.Once
	world *world
	err   error
}

func sharedWorld(t *testing.T) *world {
	t.Helper()
	shared.Do(func() {
		// Not the test's context: the node stays for the others.
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if shared.world, shared.err = makeWorld(ctx, rig.Config{}); shared.err == nil {
			shared.world.agent, shared.err = shared.world.StartAgent(ctx)
		}
	})
	must(t, shared.err)
	w := shared.world
	t.Cleanup(func() {
		w.check(t)
		select {
		case <-w.agent.Done():
			t.Errorf("the agent ended: %v; its log:\n%s", w.agent.Err(), w.agent.Log())
		default:
		}
		w.EKSAuth.Reset()
	})
	return w
}

// start starts the agent with the rig's arguments and these, and waits until
// it is ready.
func (w *world) start(t *testing.T, more ...string) *rig.Agent {
	t.Helper()
	return w.startExactly(t, w.Args(more...)...)
}

func (w *world) startExactly(t *testing.T, args ...string) *rig.Agent {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	a, err := w.StartAgentExactly(ctx, args...)
	must(t, err)
	w.agent = a
	// A test that fails leaves nothing running to the next one on this node.
	t.Cleanup(a.Kill)
	return a
}

// stop ends the agent as Kubernetes does, and demands that it ends well.
func (w *world) stop(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := w.agent.Stop(ctx); err != nil {
		t.Errorf("the agent did not stop well: %v; its log:\n%s", err, w.agent.Log())
	}
	w.check(t)
	w.agent = nil
}

// findings are what no agent's log may have.
func (w *world) findings() string {
	if w.agent == nil {
		return ""
	}
	for _, bad := range []string{"WARNING: DATA RACE", "panic:", "recovered from a panic", "fatal error:"} {
		if log := w.agent.Log(); strings.Contains(log, bad) {
			return fmt.Sprintf("%q in its log:\n%s", bad, log)
		}
	}
	return ""
}

func (w *world) check(t *testing.T) {
	t.Helper()
	if problem := w.findings(); problem != "" {
		t.Error(problem)
	}
}

// pod is a pod with a role in an account of its own, so that its credentials
// can be told from everybody else's.
type pod struct {
	*rig.Pod
	account string
}

// newPod makes a pod whose service account is named like it. It goes with the
// test, so that tests on a shared node start alike.
func (w *world) newPod(t *testing.T, cfg testnode.PodConfig) *pod {
	t.Helper()
	w.pods++
	if cfg.Name == "" {
		cfg.Name = fmt.Sprintf("pod-%d", w.pods)
	}
	if cfg.ServiceAccount == "" {
		cfg.ServiceAccount = cfg.Name
	}
	if cfg.Namespace == "" {
		cfg.Namespace = fmt.Sprintf("team-%d", w.pods)
	}
	p, err := w.AddPod(t.Context(), cfg)
	must(t, err)
	t.Cleanup(func() { p.Delete(context.Background()) })
	account := fmt.Sprintf("%012d", 500000000000+w.pods)
	w.EKSAuth.Associate(eksauth.Association{
		Namespace: p.Namespace, ServiceAccount: p.ServiceAccount,
		RoleARN: "arn:aws:iam::" + account + ":role/" + p.ServiceAccount,
	})
	return &pod{p, account}
}

// calls is how often EKS Auth was asked for the pod's role.
func (w *world) calls(p *pod) int { return w.EKSAuth.CallsFor(p.Namespace, p.ServiceAccount) }

// client is a process that opens connections, one for each request or one
// for several.
type client struct {
	t    *testing.T
	proc *testnode.Proc
}

func newClient(t *testing.T, place testnode.Place) *client {
	t.Helper()
	proc, err := place.Spawn(t.Context())
	must(t, err)
	t.Cleanup(proc.Kill)
	return &client{t, proc}
}

// dial opens a connection to the endpoint: rig.Host4, rig.Host6 or the
// v4-mapped form.
func (c *client) dial(address string) *rig.Conn {
	c.t.Helper()
	conn, err := c.tryDial(address)
	must(c.t, err)
	return conn
}

func (c *client) tryDial(address string) (*rig.Conn, error) {
	ctx, cancel := context.WithTimeout(c.t.Context(), patience)
	defer cancel()
	raw, err := c.proc.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	c.t.Cleanup(func() { raw.Close() })
	return rig.Over(raw, hostOf(address)), nil
}

// ask makes one request on a connection of its own.
func (c *client) ask(address, token string) rig.Answer {
	c.t.Helper()
	conn := c.dial(address)
	defer conn.Close()
	return ask(c.t, conn, token)
}

func ask(t *testing.T, conn *rig.Conn, token string) rig.Answer {
	t.Helper()
	a, err := conn.Ask(t.Context(), token)
	must(t, err)
	return a
}

// askFrom is one request from a process of its own.
func askFrom(t *testing.T, place testnode.Place, address, token string) rig.Answer {
	t.Helper()
	c := newClient(t, place)
	defer c.proc.Kill()
	return c.ask(address, token)
}

// mapped is the IPv4 address as an IPv6 socket names it.
const mapped = "[::ffff:169.254.170.23]:80"

// hostOf is what a client at an address says in its Host header.
func hostOf(address string) string {
	if address == mapped {
		return rig.Host4
	}
	return address
}

// wantCredentials demands the credentials of the pod's own role.
func wantCredentials(t *testing.T, a rig.Answer, p *pod) {
	t.Helper()
	if a.Status != http.StatusOK {
		t.Errorf("%d %s; want credentials", a.Status, strings.TrimSpace(a.Body))
		return
	}
	var got struct{ AccessKeyId, SecretAccessKey, Token, AccountId, Expiration string }
	if err := json.Unmarshal([]byte(a.Body), &got); err != nil {
		t.Errorf("the answer is not JSON: %v", err)
		return
	}
	if got.AccountId != p.account {
		t.Errorf("credentials of account %s, want %s's own, of account %s", got.AccountId, p.Name, p.account)
	}
	expires, err := time.Parse(time.RFC3339, got.Expiration)
	if err != nil || !strings.HasSuffix(got.Expiration, "Z") || time.Until(expires) <= 0 {
		t.Errorf("expiration %q: %v", got.Expiration, err)
	}
	if !strings.HasPrefix(got.AccessKeyId, eksauth.AccessKeyPrefix) || !strings.HasPrefix(got.SecretAccessKey, eksauth.SecretPrefix) ||
		!strings.HasPrefix(got.Token, eksauth.SessionTokenPrefix) {
		t.Error("these are not the credentials that EKS Auth gave")
	}
	if ct := a.Header.Get("Content-Type"); ct != "application/json" {
		t.Errorf("Content-Type %q", ct)
	}
}

// wantRefusal demands a status and a text, and no trace of credentials.
func wantRefusal(t *testing.T, a rig.Answer, status int, text string) {
	t.Helper()
	if a.Status != status || !strings.Contains(a.Body, text) {
		t.Errorf("%d %s; want %d and %q", a.Status, strings.TrimSpace(a.Body), status, text)
	}
	if strings.Contains(a.Body, eksauth.SecretPrefix) || strings.Contains(a.Body, eksauth.AccessKeyPrefix) {
		t.Error("the refusal holds credentials")
	}
}

// Texts of refusals that several tests look for.
const (
	textMismatch = "belongs to another pod"
	textTwoPods  = "with a socket of another"
	textNetns    = "not its pod's own"
	textNotPod   = "outside every pod"
	textEnded    = "has ended"
	textNone     = "No evidence of which pod"
)

// neighbour asks for its own credentials all the time, on new and on kept
// connections, and must get them each time.
type neighbour struct {
	stop   context.CancelFunc
	done   chan struct{}
	served int
	failed []string
}

func (w *world) quietNeighbour(t *testing.T, p *pod) *neighbour {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	n := &neighbour{stop: stop, done: make(chan struct{})}
	c := newClient(t, p.Place())
	go func() {
		defer close(n.done)
		var kept *rig.Conn
		for i := 0; ctx.Err() == nil; i++ {
			if kept == nil || i%5 == 0 {
				if kept != nil {
					kept.Close()
				}
				raw, err := c.proc.DialContext(ctx, "tcp", rig.Host4)
				if err != nil {
					if ctx.Err() == nil {
						n.failed = append(n.failed, err.Error())
					}
					return
				}
				kept = rig.Over(raw, rig.Host4)
			}
			a, err := kept.Ask(ctx, p.Token)
			switch {
			case ctx.Err() != nil:
			case err != nil:
				n.failed = append(n.failed, err.Error())
				kept.Close()
				kept = nil
			case a.Status != http.StatusOK:
				n.failed = append(n.failed, fmt.Sprint(a.Status, " ", a.Body))
			default:
				n.served++
			}
			select {
			case <-time.After(10 * time.Millisecond):
			case <-ctx.Done():
			}
		}
		if kept != nil {
			kept.Close()
		}
	}()
	t.Cleanup(func() { stop(); <-n.done })
	return n
}

// wasServed ends the neighbour's requests and demands that all were answered.
func (n *neighbour) wasServed(t *testing.T) {
	t.Helper()
	n.stop()
	<-n.done
	if len(n.failed) > 0 || n.served == 0 {
		t.Errorf("the neighbour was served %d times and failed %d times: %q", n.served, len(n.failed), n.failed[:min(len(n.failed), 5)])
	}
}

// eventually polls until f gives no error.
func eventually(t *testing.T, f func() error) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

// logs waits for a text in the agent's log: refusals are logged behind the
// answer.
func (w *world) logs(t *testing.T, text string) {
	t.Helper()
	eventually(t, func() error {
		if !strings.Contains(w.agent.Log(), text) {
			return fmt.Errorf("no %q in the agent's log:\n%s", text, w.agent.Log())
		}
		return nil
	})
}

// metric reads one sample, named as it is written: name{label="value"}. A
// sample that is not there is 0.
func (w *world) metric(t *testing.T, sample string) float64 {
	t.Helper()
	text, err := w.Metrics(t.Context())
	must(t, err)
	line := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(sample) + ` (\S+)$`).FindStringSubmatch(text)
	if line == nil {
		return 0
	}
	v, err := strconv.ParseFloat(line[1], 64)
	must(t, err)
	return v
}

// verdicts is latchkey_verdicts_total.
func (w *world) verdicts(t *testing.T, outcome, reason string) float64 {
	t.Helper()
	return w.metric(t, fmt.Sprintf(`latchkey_verdicts_total{outcome=%q,reason=%q}`, outcome, reason))
}

// cli runs latchkey on the node and gives its output and exit status.
func (w *world) cli(t *testing.T, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	return runProgram(t, w.Node.HostPlace(), append([]string{cliProgram, "--admin-socket", w.Socket()}, args...)...)
}

func runProgram(t *testing.T, place testnode.Place, argv ...string) (stdout, stderr string, code int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := place.Command(ctx, argv...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// ended waits for an agent that is expected to end by itself.
func ended(t *testing.T, a *rig.Agent) (code int) {
	t.Helper()
	select {
	case <-a.Done():
	case <-time.After(patience):
		a.Kill()
		t.Fatalf("the agent goes on; its log:\n%s", a.Log())
	}
	var exit *exec.ExitError
	if errors.As(a.Err(), &exit) {
		return exit.ExitCode()
	}
	must(t, a.Err())
	return 0
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// actions are what the tests' own processes do in pods.
func actions() testnode.Actions {
	return testnode.Actions{
		"fetch":    func(*testnode.Session, json.RawMessage) (any, error) { return clients.Fetch(context.Background()), nil },
		"askOver":  askOver,
		"dialFrom": dialFrom,
		"dialUnix": dialUnix,
	}
}

type askOverArgs struct{ Host, Token string }

// askOver makes a request over a connection that was handed to it.
func askOver(s *testnode.Session, raw json.RawMessage) (any, error) {
	var args askOverArgs
	if err := json.Unmarshal(raw, &args); err != nil {
		return nil, err
	}
	c, err := net.FileConn(s.Files()[0])
	if err != nil {
		return nil, err
	}
	defer c.Close()
	defer s.Files()[0].Close()
	return rig.Over(c, args.Host).Ask(context.Background(), args.Token)
}

type dialFromArgs struct{ Local, Remote netip.AddrPort }

// dialFrom connects from a chosen address.
func dialFrom(s *testnode.Session, raw json.RawMessage) (any, error) {
	var args dialFromArgs
	if err := json.Unmarshal(raw, &args); err != nil {
		return nil, err
	}
	d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(args.Local), Timeout: patience}
	c, err := d.Dial("tcp", args.Remote.String())
	if err != nil {
		return nil, err
	}
	defer c.Close()
	f, err := c.(*net.TCPConn).File()
	if err != nil {
		return nil, err
	}
	s.Reply(f)
	return nil, nil
}

// dialUnix asks the admin socket and says how far it came.
func dialUnix(_ *testnode.Session, raw json.RawMessage) (any, error) {
	var path string
	if err := json.Unmarshal(raw, &path); err != nil {
		return nil, err
	}
	c, err := net.DialTimeout("unix", path, patience)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return nil, err
	}
	// A peer that closes at once may be faster than the request.
	_, _ = c.Write([]byte("GET /v1/status HTTP/1.0\r\n\r\n"))
	b := make([]byte, 64)
	n, err := c.Read(b)
	if errors.Is(err, unix.ECONNRESET) {
		err = nil
	}
	if n == 0 {
		return "", nil
	}
	return string(b[:n]), err
}
