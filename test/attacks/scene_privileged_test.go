// SPDX-License-Identifier: Apache-2.0

//go:build linux && privileged

package attacks

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/test/rig"
	"github.com/latchkey-dev/latchkey/test/standin/eksauth"
	"github.com/latchkey-dev/latchkey/test/testnode"
)

// patience is how long a test waits for what must come. It is long, because it
// only matters when the test fails.
const patience = 20 * time.Second

var (
	agent4 = netip.MustParseAddrPort(rig.Host4)
	agent6 = netip.MustParseAddrPort(rig.Host6)
)

func TestMain(m *testing.M) {
	if askOverInheritedSocket() {
		return
	}
	testnode.Main(programs())
	code := m.Run()
	if err := shared.end(); err != nil {
		fmt.Fprintln(os.Stderr, "the shared node:", err)
		code = 1
	}
	os.Exit(code)
}

// agentProgram gives the agent, or its proof build. LATCHKEY_AGENT and
// LATCHKEY_AGENT_PROOF name ones that are there; else they are built.
func agentProgram(t *testing.T, proof bool) string {
	t.Helper()
	name := "LATCHKEY_AGENT"
	if proof {
		name = "LATCHKEY_AGENT_PROOF"
	}
	if path := os.Getenv(name); path != "" {
		return path
	}
	built.Lock()
	defer built.Unlock()
	if path := built.paths[proof]; path != "" {
		return path
	}
	if built.dir == "" {
		dir, err := os.MkdirTemp("", "latchkey-attacks-")
		must(t, err)
		built.dir = dir
	}
	path := filepath.Join(built.dir, strings.ToLower(name))
	args := []string{"build", "-buildvcs=false", "-o", path}
	if proof {
		args = append(args, "-tags", "proof")
	}
	cmd := exec.Command("go", append(args, "github.com/latchkey-dev/latchkey/cmd/latchkey-agent")...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building the agent (%s names one that is there): %v\n%s", name, err, out)
	}
	if built.paths == nil {
		built.paths = map[bool]string{}
	}
	built.paths[proof] = path
	return path
}

var built struct {
	sync.Mutex
	dir   string
	paths map[bool]string
}

// scene is a node with an agent and a quiet neighbour.
type scene struct {
	*rig.Rig
	agent *rig.Agent
	quiet *neighbour
	pods  int
	proof bool
}

// newScene makes a node without an agent. off is the protection that its agent
// will lack, empty for the agent that ships.
func newScene(t *testing.T, off string) *scene {
	t.Helper()
	// env(1) starts the agent, so that it can be given variables.
	cfg := rig.Config{AgentBinary: "env"}
	cfg.Signer.Algorithm = "ES256" // an RSA key takes its time
	// Not the test's context: a shared node stays for the others.
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	r, err := rig.New(ctx, cfg)
	must(t, err)
	return &scene{Rig: r, proof: off != ""}
}

// start starts the agent, and a neighbour who asks it all the time. env is given
// to the agent.
func (s *scene) start(t *testing.T, env ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var err error
	s.agent, err = s.launch(t, env...)
	must(t, err)
	if err := s.agent.WaitReady(ctx); err != nil {
		t.Fatalf("%v; its log:\n%s", err, s.agent.Log())
	}
	if s.quiet == nil {
		s.quiet = s.newNeighbour(t)
	}
}

func (s *scene) launch(t *testing.T, env ...string) (*rig.Agent, error) {
	t.Helper()
	return s.LaunchAgent(slices.Concat(env, []string{agentProgram(t, s.proof)}, s.Args())...)
}

// end removes the node.
func (s *scene) end() error {
	if s.quiet != nil {
		s.quiet.stop()
	}
	if s.agent != nil {
		s.agent.Kill()
	}
	return s.Close()
}

// shared is the node of all tests that change nothing of it.
var shared sharedScene

type sharedScene struct {
	once  sync.Once
	scene *scene
}

func sharedNode(t *testing.T) *scene {
	t.Helper()
	shared.once.Do(func() {
		s := newScene(t, "")
		shared.scene = s
		s.start(t)
	})
	if shared.scene == nil || shared.scene.quiet == nil {
		t.Fatal("the shared node could not be made")
	}
	return shared.scene
}

func (s *sharedScene) end() error {
	var errs []error
	if s.scene != nil {
		errs = append(errs, s.scene.end())
	}
	if built.dir != "" {
		errs = append(errs, os.RemoveAll(built.dir))
	}
	return errors.Join(errs...)
}

// ownNode is a node that goes with the test. Its agent runs.
func ownNode(t *testing.T, off string) *scene {
	t.Helper()
	s := newScene(t, off)
	t.Cleanup(func() {
		if err := s.end(); err != nil {
			t.Error(err)
		}
	})
	if off != "" {
		s.start(t, "LATCHKEY_PROOF_OFF="+off)
	} else {
		s.start(t)
	}
	return s
}

// pod is a pod with a role in an account of its own, so that it can be told
// whose credentials somebody got.
type pod struct {
	*rig.Pod
	account string
}

func (s *scene) newPod(t *testing.T, name string, cfg testnode.PodConfig) *pod {
	t.Helper()
	s.pods++
	if cfg.Name = name; cfg.ServiceAccount == "" {
		cfg.ServiceAccount = fmt.Sprintf("%s-%d", name, s.pods)
	}
	cfg.Namespace = "team"
	p, err := s.AddPod(context.Background(), cfg)
	must(t, err)
	account := fmt.Sprintf("%012d", 500000000000+s.pods)
	s.EKSAuth.Associate(eksauth.Association{
		Namespace: p.Namespace, ServiceAccount: p.ServiceAccount,
		RoleARN: "arn:aws:iam::" + account + ":role/" + p.ServiceAccount,
	})
	return &pod{p, account}
}

// neighbour asks for its own credentials all the time, each time on a new
// connection.
type neighbour struct {
	cancel context.CancelFunc
	done   chan struct{}
	proc   *testnode.Proc
	served atomic.Int64
	mu     sync.Mutex
	failed []string
}

func (s *scene) newNeighbour(t *testing.T) *neighbour {
	t.Helper()
	p := s.newPod(t, "neighbour", testnode.PodConfig{})
	proc, err := p.Place().Spawn(context.Background())
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	n := &neighbour{cancel: cancel, done: make(chan struct{}), proc: proc}
	go func() {
		defer close(n.done)
		for ctx.Err() == nil {
			err := n.ask(ctx, p)
			switch {
			case err == nil:
				n.served.Add(1)
			case ctx.Err() == nil:
				n.mu.Lock()
				n.failed = append(n.failed, err.Error())
				n.mu.Unlock()
			}
			select {
			case <-time.After(15 * time.Millisecond):
			case <-ctx.Done():
			}
		}
	}()
	return n
}

func (n *neighbour) ask(ctx context.Context, p *pod) error {
	raw, err := n.proc.DialContext(ctx, "tcp", rig.Host4)
	if err != nil {
		return err
	}
	defer raw.Close()
	a, err := rig.Over(raw, rig.Host4).Ask(ctx, p.Token)
	if err == nil && (a.Status != http.StatusOK || !strings.Contains(a.Body, p.account)) {
		err = fmt.Errorf("%d %s", a.Status, a.Body)
	}
	return err
}

func (n *neighbour) stop() {
	n.cancel()
	n.proc.Kill()
	<-n.done
}

func (n *neighbour) failures() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.failed)
}

// counters are what the agent counts: refusals by reason, and the programs'
// events.
type counters struct {
	refused map[string]float64
	events  map[string]uint64
}

func (s *scene) counters(t *testing.T) counters {
	t.Helper()
	// Also asked when the test's own context has ended.
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	text, err := s.Metrics(ctx)
	must(t, err)
	c := counters{refused: map[string]float64{}}
	for _, m := range regexp.MustCompile(`(?m)^latchkey_verdicts_total\{outcome="refused",reason="([a-z_]+)"\} (\S+)$`).FindAllStringSubmatch(text, -1) {
		v, err := strconv.ParseFloat(m[2], 64)
		must(t, err)
		c.refused[m[1]] = v
	}
	st, err := s.Admin().Status(ctx)
	must(t, err)
	c.events = st.BPF
	return c
}

// programErrors are the events that tell of something that failed in the
// programs.
func programErrors() []string {
	return []string{"client_storage", "no_tcp_sock", "inflight", "pending", "flags", "option_space", "option_write", "option_read", "accepted_storage", "no_key"}
}

// attack is a test under way: an attacker and a victim on a scene.
type attack struct {
	*testing.T
	*scene
	victim, thief *pod
	// who the attacker is in its pod.
	who user

	want     Outcome
	seen     map[Outcome]bool
	before   counters
	failures int
	// tolerated are program errors that the attacker brings on itself.
	tolerated []string
}

// Cleanup is the test's, not the rig's.
func (a *attack) Cleanup(f func()) { a.T.Cleanup(f) }

// user is with whose privileges an attacker's program runs.
type user struct {
	name string
	caps capabilities
}

var (
	somebody = user{"an ordinary user", 0}
	root     = user{"root of the container", containerCaps}
	netAdmin = user{"root with CAP_NET_ADMIN", containerCaps | 1<<capNetAdmin}
)

// as runs the attack in a subtest, as that user, on the shared node.
func as(t *testing.T, who user, want Outcome, f func(a *attack)) {
	t.Helper()
	t.Run(strings.ReplaceAll(who.name, " ", "_"), func(t *testing.T) {
		t.Helper()
		f(on(t, sharedNode(t), who, want))
	})
}

// both runs the attack as an ordinary user and as root of the container.
func both(t *testing.T, want Outcome, f func(a *attack)) {
	t.Helper()
	as(t, somebody, want, f)
	as(t, root, want, f)
}

// on sets the scene for one attack: a victim that is served, and a thief that
// is served, with what is its own.
func on(t *testing.T, s *scene, who user, want Outcome) *attack {
	t.Helper()
	return onWith(t, s, who, want, testnode.PodConfig{}, testnode.PodConfig{})
}

func onWith(t *testing.T, s *scene, who user, want Outcome, victim, thief testnode.PodConfig) *attack {
	t.Helper()
	a := &attack{T: t, scene: s, who: who, want: want, seen: map[Outcome]bool{}}
	a.victim, a.thief = s.newPod(t, "victim", victim), s.newPod(t, "thief", thief)
	for _, p := range []*pod{a.victim, a.thief} {
		t.Cleanup(func() { p.Delete(context.Background()) })
		if !p.HostNetwork {
			// The thief's kernel must not forward for it what it intercepts.
			must(t, p.Netns().Do(func() error { return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("0"), 0o644) }))
		}
	}
	a.served(a.victim)
	a.failures = len(s.quiet.failures())
	quiet := s.quiet.served.Load()
	a.before = s.counters(t)
	t.Cleanup(func() {
		if t.Failed() {
			return
		}
		if !a.seen[a.want] || len(a.seen) != 1 {
			t.Errorf("the outcome was %q, expected %q", slices.Collect(maps.Keys(a.seen)), a.want)
		}
		a.eventually(func() error {
			if s.quiet.served.Load() <= quiet {
				return errors.New("the neighbour was not served while this went on")
			}
			return nil
		})
		if f := s.quiet.failures(); len(f) > a.failures {
			t.Errorf("the neighbour was refused %d times: %q", len(f)-a.failures, f[a.failures:min(len(f), a.failures+3)])
		}
		now := s.counters(t)
		for _, e := range programErrors() {
			if n := now.events[e] - a.before.events[e]; n > 0 && !slices.Contains(a.tolerated, e) {
				t.Errorf("the programs counted %d errors of kind %s", n, e)
			}
		}
	})
	return a
}

// hand is a process that runs programs of the attacks.
type hand struct {
	*testnode.Proc
	a    *attack
	caps capabilities
}

// thiefs is a process in the thief's pod, with the attacker's privileges.
func (a *attack) thiefs() *hand { return a.spawn(a.thief.Place()) }

// victims is one in the victim's pod, of an ordinary user.
func (a *attack) victims() *hand {
	a.Helper()
	return a.spawnAs(a.victim.Place(), somebody)
}

// spawn starts a process of the attacker in a place.
func (a *attack) spawn(p testnode.Place) *hand {
	a.Helper()
	return a.spawnAs(p, a.who)
}

func (a *attack) spawnAs(p testnode.Place, who user) *hand {
	a.Helper()
	if who.caps == 0 {
		p = p.AsUser(1000, 1000)
	}
	proc, err := p.Spawn(a.Context())
	must(a, err)
	a.Cleanup(proc.Kill)
	return &hand{proc, a, who.caps}
}

// try runs a program in the process and gives its error.
func (h *hand) try(program string, args, result any) error {
	h.a.Helper()
	ctx, cancel := context.WithTimeout(h.a.Context(), handshakePatience+2*patience)
	defer cancel()
	return h.Call(ctx, program, envelope{h.caps, mustJSON(h.a, args)}, result)
}

// do is try for a program that must not fail.
func (h *hand) do(program string, args, result any) {
	h.a.Helper()
	if err := h.try(program, args, result); err != nil {
		h.a.Fatalf("%s: %v", program, err)
	}
}

// ask connects and asks with a token.
func (h *hand) ask(o askOptions, token string) catch {
	h.a.Helper()
	o.Token = token
	if !o.To.IsValid() {
		o.To = agent4
	}
	var c catch
	h.a.eventually(func() error {
		// Not an answer yet: EKS Auth takes long, and whoever asked comes again.
		if h.do("ask", o, &c); c.Status == http.StatusGatewayTimeout {
			return errors.New(c.String())
		}
		return nil
	})
	return c
}

// catch is what a request came back with.
type catch struct {
	Status int
	Body   string
	// Closed: the answer said Connection: close.
	Closed bool
	// Errno is what connecting or sending failed with, if it did.
	Errno syscall.Errno
	// LocalPort is the connection's.
	LocalPort uint16
	// SynData: the request travelled in the SYN (TCP Fast Open).
	SynData bool
}

func (c catch) String() string {
	if c.Errno != 0 {
		return c.Errno.Error()
	}
	if account := c.account(); account != "" {
		return "credentials of account " + account
	}
	return fmt.Sprintf("%d %s", c.Status, strings.TrimSpace(c.Body))
}

// account tells whose credentials these are.
func (c catch) account() string {
	var got struct{ AccountId string }
	if c.Status != http.StatusOK || json.Unmarshal([]byte(c.Body), &got) != nil {
		return ""
	}
	return got.AccountId
}

// served demands that a pod gets its own credentials.
func (a *attack) served(p *pod) {
	a.Helper()
	c := a.spawnAs(p.Place(), somebody).ask(askOptions{}, p.Token)
	if c.account() != p.account {
		a.Fatalf("%s is not served: %v", p.Name, c)
	}
}

// The texts and counters of the agent's refusals.
type refusal struct {
	status int
	reason string
}

var (
	podMismatch  = refusal{http.StatusForbidden, "pod_mismatch"}
	twoPods      = refusal{http.StatusForbidden, "two_pods"}
	foreignNetns = refusal{http.StatusForbidden, "foreign_netns"}
	notInPod     = refusal{http.StatusForbidden, "not_in_pod"}
	podEnded     = refusal{http.StatusForbidden, "pod_ended"}
	noEvidence   = refusal{http.StatusServiceUnavailable, "no_evidence"}
)

// refused demands that the attacker got a refusal and nothing else, and that it
// was counted.
func (a *attack) refused(c catch, r refusal) {
	a.Helper()
	a.counted(c, r)
	a.seen[Refused] = true
}

func (a *attack) counted(c catch, r refusal) {
	a.Helper()
	if c.Status != r.status {
		a.Errorf("got %v; want %d for %s", c, r.status, r.reason)
		return
	}
	if strings.Contains(c.Body, eksauth.SecretPrefix) || strings.Contains(c.Body, eksauth.AccessKeyPrefix) {
		a.Error("the refusal holds credentials")
	}
	if r == noEvidence && !c.Closed {
		a.Error("a connection without evidence stays open")
	}
	// Answers are counted behind their last byte.
	a.eventually(func() error {
		if now := a.counters(a.T); now.refused[r.reason] <= a.before.refused[r.reason] {
			return fmt.Errorf("no refusal for %s was counted", r.reason)
		}
		return nil
	})
}

// trueThief demands that connections made in this way count as the thief's: its
// own token is good on them, the victim's is not.
func (a *attack) trueThief(ask func(token string) catch) {
	a.Helper()
	if c := ask(a.victim.Token); c.Status != podMismatch.status {
		a.Errorf("with the victim's token: %v; want 403", c)
	} else {
		a.counted(c, podMismatch)
	}
	if c := ask(a.thief.Token); c.account() != a.thief.account {
		a.Errorf("with its own token: %v; want its own credentials", c)
	}
	a.seen[ServedAsTruePod] = true
}

// unreached demands that the attempt failed on the way to the agent.
func (a *attack) unreached(err error, want ...error) {
	a.Helper()
	for _, w := range want {
		if errors.Is(err, w) {
			a.seen[NeverReachesTheAgent] = true
			return
		}
	}
	a.Errorf("got error %v, want one of %v", err, want)
}

// robbed demands that the attacker got the victim's credentials.
func (a *attack) robbed(c catch) {
	a.Helper()
	if c.account() != a.victim.account {
		a.Errorf("got %v; want the victim's credentials", c)
	}
	a.seen[OutOfScope] = true
}

// event tells how often the programs counted an event since the attack began.
func (a *attack) event(name string) uint64 {
	a.Helper()
	return a.counters(a.T).events[name] - a.before.events[name]
}

// wantEvent demands that an event was counted.
func (a *attack) wantEvent(name string) {
	a.Helper()
	if a.event(name) == 0 {
		a.Errorf("no event %s was counted", name)
	}
}

// notHere says loudly what the kernel lacks. The attack cannot be made there, so
// there is nothing that could be refused.
func (a *attack) notHere(format string, args ...any) {
	a.Helper()
	a.Logf("Not on this kernel: "+format, args...)
	a.seen[a.want] = true
}

func (a *attack) eventually(f func() error) {
	a.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			a.Error(err)
			return
		}
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func mustJSON(t testing.TB, v any) json.RawMessage {
	t.Helper()
	b, err := json.Marshal(v)
	must(t, err)
	return b
}

func writeSysctl(name, value string) error {
	return os.WriteFile("/proc/sys/net/ipv4/"+name, []byte(value), 0o644)
}
