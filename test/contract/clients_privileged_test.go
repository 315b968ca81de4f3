// SPDX-License-Identifier: Apache-2.0

//go:build linux && privileged

package contract

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/test/clients"
	"github.com/latchkey-dev/latchkey/test/rig"
	"github.com/latchkey-dev/latchkey/test/standin/eksauth"
	"github.com/latchkey-dev/latchkey/test/testnode"
)

// localURI is for clients that allow the machine's own addresses only.
const localURI = "http://127.0.0.1" + rig.Path

// client is a real AWS client and what a person sees of a refusal in it.
type client struct {
	name string
	// local clients allow 127.0.0.1 only and take the token from a variable:
	// they run in hostNetwork pods.
	local bool
	// program runs it; nil is aws-sdk-go-v2, which runs as an action.
	program func() ([]string, error)
	// cli prints no clients.Result.
	cli bool
	// shows gives the part of an error that a person can see, of the server's
	// status and text.
	shows func(status int, text string) []string
}

func all(status int, text string) []string { return []string{text, fmt.Sprint(status)} }

// realClients are the clients of the contract.
func realClients() []client {
	js := func(p clients.JSProvider) func() ([]string, error) {
		return func() ([]string, error) { return clients.JS(p) }
	}
	return []client{
		{name: "aws-sdk-go-v2", shows: func(_ int, text string) []string { return []string{text} }},
		// credential-provider-http sends no Accept and reads Code and Message
		// from JSON, of 4xx only.
		{name: "javascript-v3-http", program: js(clients.JSHTTP),
			shows: func(status int, text string) []string {
				if status >= 500 {
					text = ""
				}
				return []string{fmt.Sprint("status: ", status), text}
			}},
		// fromContainerMetadata drops body and status, and gives up after 1 s.
		{name: "javascript-v3-metadata", program: js(clients.JSMetadata), local: true,
			shows: func(int, string) []string { return []string{"from instance metadata service"} }},
		{name: "botocore", program: clients.Botocore, shows: all},
		{name: "aws-cli", program: clients.CLI, cli: true, local: true, shows: all},
	}
}

// fetch runs the client in a place with a token in file and variable.
func (c client) fetch(b *bed, place testnode.Place, p *rig.Pod) (clients.Result, error) {
	uri := ""
	if c.local {
		uri = localURI
	}
	place = place.WithEnv(append(p.AWSEnv(uri), clients.EnvToken+"="+p.Token)...)
	if c.program == nil {
		return b.sdk(place)
	}
	argv, err := c.program()
	if err != nil {
		return clients.Result{}, err
	}
	cmd := place.Command(b.ctx, argv...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err = cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return clients.Result{}, err
	}
	if c.cli {
		return clients.ReadCLI(stdout.Bytes(), stderr.Bytes(), p.Token), nil
	}
	var r clients.Result
	if jerr := json.Unmarshal(stdout.Bytes(), &r); jerr != nil {
		return r, fmt.Errorf("%s did not report: %w: %s", c.name, jerr, &stderr)
	}
	return r, nil
}

// clientPods are one pod for each client.
func (b *bed) clientPods(prefix string, associated bool) map[string]*rig.Pod {
	b.t.Helper()
	out := map[string]*rig.Pod{}
	for _, c := range realClients() {
		p := b.bare(testnode.PodConfig{Name: prefix + "-" + c.name, HostNetwork: c.local})
		if associated {
			b.Associate(p.Namespace, p.ServiceAccount, p.Name)
		}
		out[c.name] = p
	}
	return out
}

// each runs all clients at the same time, each in its pod, and checks what they
// report.
func (b *bed) each(t *testing.T, in, with map[string]*rig.Pod, check func(*testing.T, client, clients.Result)) {
	t.Helper()
	results := map[string]clients.Result{}
	errs := map[string]error{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for _, c := range realClients() {
		wg.Go(func() {
			r, err := c.fetch(b, in[c.name].Place(), with[c.name])
			mu.Lock()
			defer mu.Unlock()
			results[c.name], errs[c.name] = r, err
		})
	}
	wg.Wait()
	for _, c := range realClients() {
		t.Run(c.name, func(t *testing.T) {
			if err := errs[c.name]; err != nil {
				t.Fatal(err)
			}
			if strings.Contains(results[c.name].Error, with[c.name].Token) {
				t.Error("the client's error quotes the token")
			}
			check(t, c, results[c.name])
		})
	}
}

// Real, unmodified clients through what happens in a life, and what a person
// sees of it. README.md has it as a table.
func TestPrivilegedRealClients(t *testing.T) {
	t.Parallel() // waits most of its time
	b := start(t, "--bind-hosts", "169.254.170.23", "--bind-hosts", "127.0.0.1")
	keys := map[string]string{}
	pods := b.clientPods("app", true)

	served := func(what string, same bool) {
		t.Helper()
		t.Run(what, func(t *testing.T) {
			b.each(t, pods, pods, func(t *testing.T, c client, r clients.Result) {
				if r.Error != "" || !strings.HasPrefix(r.AccessKeyID, eksauth.AccessKeyPrefix) {
					t.Fatalf("%+v", r)
				}
				if old := keys[c.name]; old != "" && (old == r.AccessKeyID) != same {
					t.Errorf("had %s, got %s", old, r.AccessKeyID)
				}
				keys[c.name] = r.AccessKeyID
			})
		})
	}
	rotate := func() {
		t.Helper()
		for _, p := range pods {
			if err := b.Rotate(p); err != nil {
				t.Fatal(err)
			}
		}
	}
	refused := func(what string, in, with map[string]*rig.Pod, status int, text string) {
		t.Helper()
		t.Run(what, func(t *testing.T) {
			b.each(t, in, with, func(t *testing.T, c client, r clients.Result) {
				if r.AccessKeyID != "" || r.Error == "" {
					t.Fatalf("not refused: %+v", r)
				}
				t.Logf("a person sees: %s", r.Error)
				for _, part := range c.shows(status, text) {
					if !strings.Contains(r.Error, part) {
						t.Errorf("the error lacks %q: %s", part, r.Error)
					}
				}
			})
		})
	}

	served("first", false)
	calls := b.EKSAuth.CallCount()
	rotate()
	served("rotated token", true)
	b.EKSAuth.Refuse()
	rotate()
	served("rotated token while the upstream is out", true)
	if n := b.EKSAuth.CallCount(); n != calls {
		t.Errorf("rotated tokens made %d calls", n-calls)
	}

	stolen := map[string]*rig.Pod{}
	thieves := b.clientPods("thief", false)
	for name := range thieves {
		stolen[name] = pods[name]
	}
	refused("403, stolen token", thieves, stolen, http.StatusForbidden, "The service account token belongs to another pod")
	cold := b.clientPods("cold", false)
	refused("500, upstream out", cold, cold, http.StatusInternalServerError, "No answer from the credential service")
	// Where it listened before.
	if err := b.Node.Do(b.EKSAuth.Resume); err != nil {
		t.Fatal(err)
	}
	refused("404, no association", cold, cold, http.StatusNotFound, "No association found for service account")
	for _, p := range cold {
		b.Associate(p.Namespace, p.ServiceAccount, p.Name)
	}
	b.EKSAuth.Inject(eksauth.Fault{Kind: eksauth.Refuse, ErrorType: "ThrottlingException", Message: "Rate exceeded for this account"})
	refused("429, upstream throttles", cold, cold, http.StatusTooManyRequests, "Rate exceeded for this account")
	b.EKSAuth.ClearFaults()
	b.EKSAuth.Inject(eksauth.Fault{Kind: eksauth.Refuse, ErrorType: "ServiceUnavailableException", Message: "Come back later"})
	refused("503, upstream unavailable", cold, cold, http.StatusServiceUnavailable, "Come back later")
	b.EKSAuth.ClearFaults()

	// Nothing of this sticks: the same pods are served as soon as it is over.
	pods, keys = cold, map[string]string{}
	b.until("the throttled upstream is called again", func() bool { return b.ask(cold["botocore"]).Status == http.StatusOK })
	served("after all that", false)
}

// A client outside everything that the programs see, as after a late attach: its
// connections have no evidence. What they are told is 503 and why.
func TestPrivilegedRealClientsWithoutEvidence(t *testing.T) {
	b := start(t)
	p := b.pod("app")
	c := b.over(rig.Host4)
	a, err := c.Ask(b.ctx, p.Token)
	if err != nil || a.Status != http.StatusServiceUnavailable || a.Header.Get("Retry-After") == "" {
		t.Fatalf("%+v %v", a, err)
	}
	// A connection never gains evidence, so it is not kept.
	if a, err := c.Ask(b.ctx, p.Token); err == nil {
		t.Errorf("the connection is still open: %+v", a)
	}
	if !strings.Contains(a.Body, "Retry on a new connection") {
		t.Errorf("no advice in %q", a.Body)
	}
}

// over opens a connection from this process, which no program watches.
func (b *bed) over(host string) *rig.Conn {
	b.t.Helper()
	var conn *rig.Conn
	err := b.Node.Do(func() error {
		c, err := dialTCP(b.ctx, host)
		if err == nil {
			conn = rig.Over(c, host)
		}
		return err
	})
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { conn.Close() })
	return conn
}

// Credentials that end are never served past their time, whatever the upstream
// does, and clients get new ones once it answers.
func TestPrivilegedRealClientsThroughExpiry(t *testing.T) {
	b := start(t)
	p := b.pod("app")
	// Credentials are served while they have more than 15 s left.
	b.EKSAuth.SetLifetime(16 * time.Second)
	old := b.served(p)
	b.EKSAuth.Inject(eksauth.Fault{Kind: eksauth.Refuse, ErrorType: "InternalServerException", Message: "out"})
	var last rig.Answer
	b.until("the old credentials are no longer served", func() bool {
		last = b.ask(p)
		return keyOf(last) != old
	})
	if last.Status < 500 && last.Status != http.StatusTooManyRequests {
		t.Errorf("expired during an outage: %d %s", last.Status, last.Body)
	}
	b.EKSAuth.SetLifetime(6 * time.Hour)
	b.EKSAuth.ClearFaults()
	b.until("the upstream is called again", func() bool { return keyOf(b.ask(p)) != "" })
	for _, c := range realClients() {
		if c.local {
			continue
		}
		r, err := c.fetch(b, p.Place(), p)
		if err != nil || r.Error != "" || r.AccessKeyID == old {
			t.Errorf("%s: %+v %v", c.name, r, err)
		}
	}
}
