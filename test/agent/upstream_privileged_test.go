// SPDX-License-Identifier: Apache-2.0

//go:build linux && privileged

package agent

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/test/rig"
	"github.com/latchkey-dev/latchkey/test/standin/eksauth"
	"github.com/latchkey-dev/latchkey/test/testnode"
)

var errNotYet = errors.New("it has not come about yet")

// resume lets EKS Auth listen again after Refuse, where the agent looks for it.
func (w *world) resume(t *testing.T) {
	t.Helper()
	must(t, w.Node.Do(w.EKSAuth.Resume))
}

// However EKS Auth fails, a pod without credentials is asked to come again, one
// that has them keeps them, and all is well once it answers again.
func TestPrivilegedUpstreamTrouble(t *testing.T) {
	w := newWorld(t, rig.Config{})
	w.start(t, "--upstream-qps", "100")
	warm := w.newPod(t, testnode.PodConfig{})
	inWarm := newClient(t, warm.Place())
	first := inWarm.ask(rig.Host4, warm.Token)
	wantCredentials(t, first, warm)

	members := []string{"subject", "audience", "podIdentityAssociation", "assumedRoleUser", "credentials", "credentials.accessKeyId",
		"credentials.secretAccessKey", "credentials.sessionToken", "credentials.expiration"}
	faults := []struct {
		name  string
		fault eksauth.Fault
		down  bool
	}{
		{name: "nobody listens", down: true},
		{name: "the connection is cut", fault: eksauth.Fault{Kind: eksauth.Reset}},
		{name: "429", fault: eksauth.Fault{Kind: eksauth.Refuse, ErrorType: "ThrottlingException", RetryAfter: "1"}},
		{name: "500", fault: eksauth.Fault{Kind: eksauth.Refuse, ErrorType: "InternalServerException"}},
		{name: "503", fault: eksauth.Fault{Kind: eksauth.Refuse, ErrorType: "ServiceUnavailableException"}},
		{name: "a proxy's own 404", fault: eksauth.Fault{Kind: eksauth.Refuse, Status: 404, Body: []byte("<html>nothing here</html>")}},
		{name: "a proxy's own 403", fault: eksauth.Fault{Kind: eksauth.Refuse, Status: 403, Body: []byte("<html>log in</html>")}},
		{name: "200 with a web page", fault: eksauth.Fault{Kind: eksauth.Body, Body: []byte("<html>welcome</html>")}},
		{name: "200 with nothing", fault: eksauth.Fault{Kind: eksauth.Body, Body: []byte{}}},
		{name: "200 with null", fault: eksauth.Fault{Kind: eksauth.Body, Body: []byte("null")}},
		{name: "200 with 8 MB", fault: eksauth.Fault{Kind: eksauth.Body, Body: []byte(`{"x":"` + strings.Repeat("x", 8<<20) + `"}`)}},
		{name: "200 cut short", fault: eksauth.Fault{Kind: eksauth.Truncated}},
		{name: "credentials that have expired", fault: eksauth.Fault{Kind: eksauth.Expired}},
		{name: "somebody else's credentials", fault: eksauth.Fault{Kind: eksauth.OtherSubject}},
		{name: "another audience's credentials", fault: eksauth.Fault{Kind: eksauth.OtherAudience}},
	}
	for _, m := range members {
		for _, kind := range []eksauth.Kind{eksauth.Omit, eksauth.Empty, eksauth.WrongType} {
			faults = append(faults, struct {
				name  string
				fault eksauth.Fault
				down  bool
			}{name: fmt.Sprintf("200, member %s %s", m, kind), fault: eksauth.Fault{Kind: kind, Members: []string{m}}})
		}
	}
	for _, tt := range faults {
		t.Run(tt.name, func(t *testing.T) {
			cold := w.newPod(t, testnode.PodConfig{NoPause: true})
			c := newClient(t, cold.Place())
			if tt.down {
				w.EKSAuth.Refuse()
			} else {
				w.EKSAuth.Inject(tt.fault)
			}
			a := c.ask(rig.Host4, cold.Token)
			if a.Status < 500 && a.Status != http.StatusTooManyRequests {
				t.Errorf("%d %s; want a status that SDKs retry", a.Status, a.Body)
			}
			if strings.Contains(a.Body, eksauth.SecretPrefix) || strings.Contains(a.Body, "<html>") {
				t.Errorf("the answer passes on what came: %.200q", a.Body)
			}
			if a := inWarm.ask(rig.Host4, warm.Token); a.Body != first.Body {
				t.Errorf("the other pod got %d %.100q instead of what it had", a.Status, a.Body)
			}
			if _, err := w.Ready(t.Context()); err != nil {
				t.Errorf("readiness: %v; EKS Auth is no part of it", err)
			}
			must(t, w.Rotate(warm.Pod))
			w.EKSAuth.ClearFaults()
			w.resume(t)
			eventually(t, func() error {
				if a = c.ask(rig.Host4, cold.Token); a.Status != http.StatusOK {
					return fmt.Errorf("after recovery: %d %s", a.Status, a.Body)
				}
				return nil
			})
			wantCredentials(t, a, cold)
		})
	}
	if n := w.calls(warm); n != 1 {
		t.Errorf("EKS Auth was asked %d times for the pod that had its credentials, want once", n)
	}
}

// What EKS Auth says of the request itself, the pod gets to hear.
func TestPrivilegedUpstreamRefusals(t *testing.T) {
	w := newWorld(t, rig.Config{})
	w.start(t)
	for _, tt := range []struct {
		errorType string
		status    int
	}{
		{"AccessDeniedException", 400},
		{"InvalidTokenException", 400},
		{"InvalidRequestException", 400},
	} {
		t.Run(tt.errorType, func(t *testing.T) {
			p := w.newPod(t, testnode.PodConfig{})
			c := newClient(t, p.Place())
			w.EKSAuth.Inject(eksauth.Fault{Kind: eksauth.Refuse, ErrorType: tt.errorType, Message: "because, and the token was " + p.Token})
			a := c.ask(rig.Host4, p.Token)
			wantRefusal(t, a, tt.status, "("+tt.errorType+"): because")
			if !strings.HasPrefix(a.Body, "[") || !strings.Contains(a.Body, ", fault: client") {
				t.Errorf("not in the reference's form: %s", a.Body)
			}
			if strings.Contains(a.Body, p.Token) {
				t.Error("the answer quotes the token")
			}
			w.EKSAuth.ClearFaults()
			eventually(t, func() error {
				if a := c.ask(rig.Host4, p.Token); a.Status != http.StatusOK {
					return fmt.Errorf("after recovery: %d %s", a.Status, a.Body)
				}
				return nil
			})
		})
	}
	t.Run("no association", func(t *testing.T) {
		p := w.newPod(t, testnode.PodConfig{})
		w.EKSAuth.Dissociate(p.Namespace, p.ServiceAccount)
		c := newClient(t, p.Place())
		wantRefusal(t, c.ask(rig.Host4, p.Token), 404, "ResourceNotFoundException")
		// And when there is one.
		w.EKSAuth.Associate(eksauth.Association{Namespace: p.Namespace, ServiceAccount: p.ServiceAccount,
			RoleARN: "arn:aws:iam::" + p.account + ":role/" + p.ServiceAccount})
		eventually(t, func() error {
			if a := c.ask(rig.Host4, p.Token); a.Status != http.StatusOK {
				return fmt.Errorf("after the association was made: %d %s", a.Status, a.Body)
			}
			return nil
		})
	})
}

// A client that gives up does not end the fetch: its next try finds the result.
func TestPrivilegedSlowUpstream(t *testing.T) {
	w := sharedWorld(t)
	p := w.newPod(t, testnode.PodConfig{})
	c := newClient(t, p.Place())
	hold := make(chan struct{})
	w.EKSAuth.Inject(eksauth.Fault{Hold: hold, Times: 1})
	conn := c.dial(rig.Host4)
	must(t, conn.SetDeadline(time.Now().Add(300*time.Millisecond)))
	if a, err := conn.Ask(t.Context(), p.Token); err == nil {
		t.Fatalf("answered with %d while EKS Auth was silent", a.Status)
	}
	// One that waits for as long as the agent does is asked to come again.
	a := c.ask(rig.Host4, p.Token)
	if a.Status < 500 {
		t.Errorf("%d %s; want a status that SDKs retry", a.Status, a.Body)
	}
	close(hold)
	eventually(t, func() error {
		if a := c.ask(rig.Host4, p.Token); a.Status != http.StatusOK {
			return fmt.Errorf("%d %s", a.Status, a.Body)
		}
		return nil
	})
	if n := w.calls(p); n != 1 {
		t.Errorf("EKS Auth was asked %d times, want once for all tries", n)
	}
}

// Everybody who waits for the same role waits for one call.
func TestPrivilegedWaitersShareOneCall(t *testing.T) {
	w := sharedWorld(t)
	p := w.newPod(t, testnode.PodConfig{})
	c := newClient(t, p.Place())
	hold := make(chan struct{})
	w.EKSAuth.Inject(eksauth.Fault{Hold: hold, Times: 1})
	const many = 32
	answers := make(chan answered, many)
	for range many {
		conn := c.dial(rig.Host4)
		go func() {
			a, err := conn.Ask(t.Context(), p.Token)
			answers <- answered{a: a, err: err}
		}()
	}
	eventually(t, func() error {
		if now, _ := w.EKSAuth.InFlight(); now == 0 {
			return errNotYet
		}
		return nil
	})
	close(hold)
	for range many {
		got := <-answers
		must(t, got.err)
		wantCredentials(t, got.a, p)
	}
	if n := w.calls(p); n != 1 {
		t.Errorf("EKS Auth was asked %d times, want once", n)
	}
}
