// SPDX-License-Identifier: Apache-2.0

//go:build linux && privileged

package contract

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/test/rig"
	"github.com/latchkey-dev/latchkey/test/standin/eksauth"
	"github.com/latchkey-dev/latchkey/test/standin/tokens"
	"github.com/latchkey-dev/latchkey/test/testnode"
)

// The EKS Pod Identity Agent has one token bucket for each listener, taken from
// before the token is looked at: a pod without any token on four connections
// made another pod's 20 requests per second fail 71 times in 100.
func TestPrivilegedDefectTokenlessPodStarvesOthers(t *testing.T) {
	b := start(t)
	rude, quiet := b.bare(testnode.PodConfig{Name: "rude"}), b.pod("quiet")
	var got tally
	b.quiet(quiet, "flood without a token", func() {
		// More than the burst that one pod has, so that its own limit shows.
		got = call[tally](b, b.spawn(rude), "flood", floodArgs{Connections: 8, Requests: 400})
	})
	if got.OK != 0 || got.Other["400"] == 0 {
		t.Errorf("the flooding pod got %+v", got)
	}
	if got.Other["400"]+got.Other["429"] != got.Asked {
		t.Errorf("answers other than 400 and 429: %+v", got)
	}
	// Nor are the refusals missing from the metrics, as there.
	if n := b.metric("pod_identity_http_response", `code="429"`); int(n) != got.Other["429"] {
		t.Errorf("%v answers 429 were counted, %d were given", n, got.Other["429"])
	}
}

// There, 64 waiters poll every 200 ms, and on an error all 64 call upstream.
func TestPrivilegedDefectWaitersPollInsteadOfSharing(t *testing.T) {
	b := start(t)
	for name, fault := range map[string]eksauth.Fault{
		"success": {},
		// A refusal that is remembered for a second, so that a waiter that asks a
		// moment after the answer is one of them.
		"failure": {Kind: eksauth.Refuse, ErrorType: "ResourceNotFoundException", Message: "no such thing"},
	} {
		t.Run(name, func(t *testing.T) {
			p := b.pod(name)
			b.EKSAuth.Reset()
			hold := make(chan struct{})
			fault.Hold = hold
			b.EKSAuth.Inject(fault)
			const waiters = 64
			answers := make(chan []crowdAnswer, 1)
			proc := b.spawn(p)
			before := b.metric("latchkey_connections")
			go func() {
				var got []crowdAnswer
				_ = proc.Call(b.ctx, "crowd", crowdArgs{Tokens: slices.Repeat([]string{p.Token}, waiters)}, &got)
				answers <- got
			}()
			b.until("all waiters are connected", func() bool { return b.metric("latchkey_connections") >= before+waiters })
			b.until("one of them made the agent call", func() bool { now, _ := b.EKSAuth.InFlight(); return now > 0 })
			close(hold)
			got := <-answers
			if len(got) != waiters {
				t.Fatalf("%d answers", len(got))
			}
			for _, a := range got {
				if a != got[0] {
					t.Fatalf("one waiter was answered %+v and another %+v", got[0], a)
				}
			}
			if wantOK := fault.Kind == eksauth.None; (got[0].Status == 200) != wantOK || got[0].Error != "" {
				t.Errorf("answered %d %s", got[0].Status, got[0].Error)
			}
			if n := b.EKSAuth.CallCount(); n != 1 {
				t.Errorf("%d calls of the upstream for %d waiters", n, waiters)
			}
		})
	}
}

// There, the upstream call hangs on the first caller's request: a client that
// gives up sooner than the upstream answers never succeeds.
func TestPrivilegedDefectClientGivesUpCancelsUpstream(t *testing.T) {
	b := start(t)
	p := b.pod("hasty")
	hold := make(chan struct{})
	b.EKSAuth.Inject(eksauth.Fault{Hold: hold})
	call[[]crowdAnswer](b, b.spawn(p), "crowd", crowdArgs{Tokens: []string{p.Token}, GiveUp: 100 * time.Millisecond})
	b.until("its connection is gone", func() bool { return b.metric("latchkey_connections") == 0 })
	if now, _ := b.EKSAuth.InFlight(); now != 1 {
		t.Errorf("%d calls are under way after the client left", now)
	}
	close(hold)
	b.until("the call ends", func() bool { return b.EKSAuth.CallCount() == 1 })
	b.served(p)
	if n := b.EKSAuth.CallCount(); n != 1 {
		t.Errorf("%d calls: the result of the first was thrown away", n)
	}
}

// There, every request that is refused upstream is another call, and 256 new
// tokens at once are 246 calls in flight.
func TestPrivilegedDefectNoNegativeCacheNoMissLimit(t *testing.T) {
	t.Run("no association", func(t *testing.T) {
		b := start(t)
		p := b.bare(testnode.PodConfig{Name: "none"})
		c := b.dial(p, rig.Host4)
		for range 10 {
			if a, err := c.Ask(b.ctx, p.Token); err != nil || a.Status != http.StatusNotFound {
				t.Fatalf("%d %s %v", a.Status, a.Body, err)
			}
		}
		// A refusal is remembered for a second; ten requests take longer only on
		// a machine that hardly runs.
		if n := b.EKSAuth.CallCount(); n > 3 {
			t.Errorf("%d calls for 10 requests", n)
		}
	})
	t.Run("new tokens", func(t *testing.T) {
		b := newBed(t)
		b.startAgent(b.byTokenArgs()...)
		greedy, quiet := b.pod("greedy"), b.pod("quiet")
		b.served(quiet)
		b.EKSAuth.Reset()
		const many = 200
		raw := make([]string, many)
		for i := range raw {
			claims := b.Claims(greedy.Pod)
			claims.Set = map[string]any{"jti": fmt.Sprint(i)}
			raw[i] = b.Signer.Token(claims)
		}
		hold := make(chan struct{})
		b.EKSAuth.Inject(eksauth.Fault{Hold: hold})
		answers := make(chan []crowdAnswer, 1)
		proc := b.spawn(greedy)
		go func() {
			var got []crowdAnswer
			_ = proc.Call(b.ctx, "crowd", crowdArgs{Tokens: raw}, &got)
			answers <- got
		}()
		b.until("the greedy pod is refused", func() bool { return b.metric("pod_identity_http_response", `code="429"`) > 100 })
		// A pod that is cached does not notice, and one that is not only waits
		// for the upstream.
		b.served(quiet)
		_, most := b.EKSAuth.InFlight()
		close(hold)
		refused := 0
		for _, a := range <-answers {
			if a.Status == http.StatusTooManyRequests {
				refused++
			}
		}
		if most > 8 || refused < many/2 {
			t.Errorf("%d calls in flight at once, %d of %d requests refused", most, refused, many)
		}
		b.EKSAuth.ClearFaults()
		b.served(b.pod("late"))
	})
}

// There, tokens are hardly looked at: each forged one is a call upstream, at
// the account's expense.
func TestPrivilegedDefectForgedTokensSpendTheQuota(t *testing.T) {
	b := start(t)
	p := b.pod("forger")
	other, err := tokens.NewSigner(tokens.Config{Issuer: b.Signer.Issuer()})
	if err != nil {
		t.Fatal(err)
	}
	var raw []string
	for i := range 32 {
		c := b.Claims(p.Pod)
		c.Set = map[string]any{"jti": fmt.Sprint(i)}
		if i%2 == 0 {
			// By the name of the cluster's own key.
			c.Header = map[string]any{"kid": b.Signer.KeyID()}
		}
		raw = append(raw, other.Token(c))
	}
	for _, a := range call[[]crowdAnswer](b, b.spawn(p), "crowd", crowdArgs{Tokens: raw}) {
		if a.Status != http.StatusBadRequest {
			t.Fatalf("%+v", a)
		}
	}
	if n := b.EKSAuth.CallCount(); n != 0 {
		t.Errorf("%d calls of the upstream for forged tokens", n)
	}
	b.served(p)
}

// byTokenArgs start an agent without keys.
func (b *bed) byTokenArgs(more ...string) []string {
	args := b.Args(more...)
	for _, flag := range []string{"--jwks", "--issuer"} {
		i := slices.Index(args, flag)
		args = slices.Delete(args, i, i+2)
	}
	return args
}

// There, the 16 spellings of one token that differ in bits base64 does not use
// are 16 tokens: 16 calls and 16 cache entries.
func TestPrivilegedDefectSpellingsOfOneTokenAreManyTokens(t *testing.T) {
	b := newBed(t)
	b.startAgent(b.byTokenArgs()...)
	p := b.pod("speller")
	b.served(p)
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	end := len(p.Token) - 1
	last := strings.IndexByte(alphabet, p.Token[end])
	c := b.dial(p, rig.Host4)
	for i := range 16 {
		spelling := p.Token[:end] + string(alphabet[last&^15|i])
		a, err := c.Ask(b.ctx, spelling)
		if err != nil || a.Status != 200 && a.Status != 400 {
			t.Fatalf("%d %s %v", a.Status, a.Body, err)
		}
	}
	if n := b.EKSAuth.CallCount(); n != 1 {
		t.Errorf("%d calls of the upstream for one token", n)
	}
}

// There, an upstream answer that cannot be decoded is passed on as 200 with
// the body "[]", and one without its association ends the process.
func TestPrivilegedDefectUndecodableReplyIs200(t *testing.T) {
	// Renewed soon, because there it is the renewal that ends the process.
	b := start(t, "--max-credential-retention-before-renewal", "200ms", "--max-service-qps", "50", "--upstream-qps", "50")
	for name, fault := range map[string]eksauth.Fault{
		"html":               {Kind: eksauth.Body, Body: []byte("<html>sign in</html>")},
		"empty":              {Kind: eksauth.Body},
		"array":              {Kind: eksauth.Body, Body: []byte("[]")},
		"null":               {Kind: eksauth.Body, Body: []byte("null")},
		"cut short":          {Kind: eksauth.Truncated},
		"no association":     {Kind: eksauth.Omit, Members: []string{"podIdentityAssociation", "assumedRoleUser"}},
		"null association":   {Kind: eksauth.Empty, Members: []string{"podIdentityAssociation", "assumedRoleUser"}},
		"no credentials":     {Kind: eksauth.Omit, Members: []string{"credentials"}},
		"null credentials":   {Kind: eksauth.Empty, Members: []string{"credentials"}},
		"no secret key":      {Kind: eksauth.Omit, Members: []string{"credentials.secretAccessKey"}},
		"members of no type": {Kind: eksauth.WrongType, Members: []string{"subject", "credentials", "assumedRoleUser"}},
	} {
		t.Run(name, func(t *testing.T) {
			p := b.pod("p" + tokens.UID(name)[:8])
			b.EKSAuth.Reset()
			key := b.served(p)
			b.EKSAuth.Inject(fault)
			calls := b.EKSAuth.CallCount()
			b.until("the renewal meets the fault", func() bool {
				b.ask(p)
				return b.EKSAuth.CallCount() > calls
			})
			if fault.Kind == eksauth.Omit && name == "no association" || name == "null association" {
				// An answer without these members is complete enough for the pod.
				if a := b.ask(p); keyOf(a) == "" && a.Status < 500 {
					t.Errorf("%d %s", a.Status, a.Body)
				}
			} else if got := b.served(p); got != key {
				t.Errorf("a bad renewal replaced good credentials: %s", got)
			}
			cold := b.pod("c" + tokens.UID(name)[:8])
			a := b.ask(cold)
			if a.Status == 200 && (keyOf(a) == "" || !strings.Contains(a.Body, "SecretAccessKey")) || a.Status != 200 && a.Status < 500 {
				t.Errorf("without credentials the answer is %d %q", a.Status, a.Body)
			}
			select {
			case <-b.agent.Done():
				t.Fatalf("the agent ended: %v", b.agent.Err())
			default:
			}
			b.EKSAuth.ClearFaults()
		})
	}
}

// There, each address has a cache, a limiter and upstream calls of its own.
func TestPrivilegedDefectAddressesShareNothing(t *testing.T) {
	b := start(t)
	p := b.pod("dual")
	key := b.served(p)
	a, err := rig.Ask(b.ctx, p.Place(), rig.Host6, p.Token)
	if err != nil || keyOf(a) != key {
		t.Errorf("over IPv6: %d %s %v", a.Status, a.Body, err)
	}
	if n := b.EKSAuth.CallCount(); n != 1 {
		t.Errorf("%d calls of the upstream", n)
	}
}

// There, an IPv6 address that cannot be bound ends the process, and with it
// IPv4: a crash loop on every node without IPv6. (An address that somebody else
// listens on does end the start here, in either family: two agents on a node
// are a mistake to be told.)
func TestPrivilegedDefectIPv6BindKillsIPv4(t *testing.T) {
	b := newBed(t)
	if err := b.Node.Do(func() error {
		return os.WriteFile("/proc/sys/net/ipv6/conf/all/disable_ipv6", []byte("1"), 0)
	}); err != nil {
		t.Fatal(err)
	}
	b.startAgent(b.Args()...)
	b.served(b.pod("v4"))
	if n := b.metric("latchkey_listener_serving", "fd00:ec2::23"); n != 0 {
		t.Errorf("IPv6 is said to be served: %v", n)
	}
	if n := b.metric("latchkey_listener_serving", "169.254.170.23"); n != 1 {
		t.Errorf("IPv4 is said not to be served: %v", n)
	}
}

// There, the readiness probe goes through HTTP_PROXY: the proxy's answer is not
// the 404 that is expected, and the pod is restarted for ever.
func TestPrivilegedDefectProxyVariableCatchesProbe(t *testing.T) {
	dir := t.TempDir()
	wrapper := filepath.Join(dir, "agent")
	script := fmt.Sprintf("#!/bin/sh\nHTTP_PROXY=http://127.0.0.1:9 http_proxy=http://127.0.0.1:9 exec %s \"$@\"\n", agentBinary)
	if err := os.WriteFile(wrapper, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), longest)
	defer cancel()
	r, err := rig.New(ctx, rig.Config{AgentBinary: wrapper})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	}()
	b := &bed{Rig: r, t: t, ctx: ctx}
	b.startAgent(r.Args()...)
	environ, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", b.agent.PID()))
	if err != nil || !strings.Contains(string(environ), "HTTP_PROXY=") {
		t.Fatalf("the agent's environment has no proxy: %v", err)
	}
	b.served(b.pod("app"))
}

// There, a metrics port that is taken ends the process.
func TestPrivilegedDefectMetricsPortTakenStopsCredentials(t *testing.T) {
	b := newBed(t)
	var taken net.Listener
	if err := b.Node.Do(func() (err error) {
		taken, err = (&net.ListenConfig{}).Listen(b.ctx, "tcp", ":2705")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	b.startAgent(b.Args()...)
	b.served(b.pod("app"))
	if !strings.Contains(b.agent.Log(), "2705") {
		t.Error("the log does not say which port is taken")
	}
}

// There, anybody who reaches the metrics port makes the agent connect to
// itself at each request for /readyz.
func TestPrivilegedDefectProbesCanBeTriggeredWithoutBound(t *testing.T) {
	b := start(t)
	const asked = 200
	before := b.metric("pod_identity_http_response", `code="404"`)
	for range asked {
		if _, err := b.Get(b.ctx, "2705", "/readyz"); err != nil {
			t.Fatal(err)
		}
	}
	if n := b.metric("pod_identity_http_response", `code="404"`) - before; n >= asked/2 {
		t.Errorf("%d requests made the agent probe itself %v times", asked, n)
	}
}

// There, AccessDenied at renewal drops credentials that are still good, also
// if it is the node's own role that is denied.
func TestPrivilegedDefectAccessDeniedEvicts(t *testing.T) {
	b := start(t, "--max-credential-retention-before-renewal", "200ms", "--max-service-qps", "50", "--upstream-qps", "50")
	for _, fault := range []eksauth.Fault{
		{Kind: eksauth.Refuse, ErrorType: "AccessDeniedException", Message: "node role"},
		{Kind: eksauth.Refuse, ErrorType: "AccessDeniedException", Status: http.StatusForbidden, Message: "node role"},
		{Kind: eksauth.Refuse, ErrorType: "ExpiredTokenException", Message: "skewed clock"},
	} {
		t.Run(fmt.Sprint(fault.ErrorType, fault.Status), func(t *testing.T) {
			p := b.pod("p" + tokens.UID(fault.ErrorType, fmt.Sprint(fault.Status))[:8])
			b.EKSAuth.Reset()
			key := b.served(p)
			b.EKSAuth.Inject(fault)
			calls := b.EKSAuth.CallCount()
			b.until("the renewal is denied", func() bool {
				b.ask(p)
				return b.EKSAuth.CallCount() > calls
			})
			if got := b.served(p); got != key {
				t.Errorf("credentials %s were replaced by %s", key, got)
			}
			b.EKSAuth.ClearFaults()
		})
	}
}

// There, credentials of pods that are gone, or that nobody asks for any more,
// are renewed until their token ends.
func TestPrivilegedDefectDeadPodsAreRenewed(t *testing.T) {
	b := start(t, "--max-credential-retention-before-renewal", "200ms", "--max-service-qps", "50", "--upstream-qps", "50")
	dead, once, busy := b.pod("dead"), b.pod("once"), b.pod("busy")
	b.served(dead)
	b.served(once)
	if err := dead.Delete(b.ctx); err != nil {
		t.Fatal(err)
	}
	b.until("the dead pod's credentials are dropped", func() bool {
		pods, err := b.Admin().Pods(b.ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range pods {
			if p.UID == string(dead.UID) {
				return false
			}
		}
		return true
	})
	calls := b.EKSAuth.CallsFor("app", "dead")
	// The busy pod's renewals are the clock.
	b.until("four renewals of a pod that asks", func() bool {
		b.served(busy)
		return b.EKSAuth.CallsFor("app", "busy") >= 5
	})
	if n := b.EKSAuth.CallsFor("app", "dead"); n != calls {
		t.Errorf("%d calls for a pod that is gone", n-calls)
	}
	// The life that it asked in is renewed, the next is not.
	if n := b.EKSAuth.CallsFor("app", "once"); n > 2 {
		t.Errorf("%d calls for a pod that asked once", n)
	}
}

// There, "hit" counts renewals in the background.
func TestPrivilegedDefectHitMetricCountsRenewals(t *testing.T) {
	b := start(t)
	p := b.pod("app")
	for range 4 {
		b.served(p)
	}
	hits, misses := b.metric("pod_identity_cache_state", `state="hit"`), b.metric("pod_identity_cache_state", `state="miss"`)
	if hits != 3 || misses != 1 {
		t.Errorf("%v hits and %v misses after one miss and three hits", hits, misses)
	}
	if n := b.metric("pod_identity_http_response", `code="200"`); n != 4 {
		t.Errorf("%v answers 200", n)
	}
}

// There, each cached answer is a log line, or five at the chart's default
// level.
func TestPrivilegedDefectLogLinePerHit(t *testing.T) {
	b := start(t, "--verbosity", "trace")
	p := b.pod("app")
	c := b.dial(p, rig.Host4)
	if a, err := c.Ask(b.ctx, p.Token); err != nil || a.Status != 200 {
		t.Fatalf("%d %s %v", a.Status, a.Body, err)
	}
	before := strings.Count(b.agent.Log(), "\n")
	for range 100 {
		if a, err := c.Ask(b.ctx, p.Token); err != nil || a.Status != 200 {
			t.Fatalf("%d %s %v", a.Status, a.Body, err)
		}
	}
	if n := strings.Count(b.agent.Log(), "\n") - before; n > 10 {
		t.Errorf("100 cached answers wrote %d lines:\n%s", n, lastLines(b.agent.Log(), 5))
	}
}

// There, a renewal rate that is small beside the cache's size is a panic at the
// start.
func TestPrivilegedDefectSmallRenewalRatePanics(t *testing.T) {
	b := start(t, "--max-service-qps", "1", "--max-credential-retention-before-renewal", "10s")
	b.served(b.pod("app"))
	if !strings.Contains(b.agent.Log(), "--max-service-qps is too small") {
		t.Errorf("no warning:\n%s", lastLines(b.agent.Log(), 5))
	}
}
