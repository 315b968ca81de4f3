// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/latchkey-dev/latchkey/pkg/credcache"
	"github.com/latchkey-dev/latchkey/pkg/credserver"
	"github.com/latchkey-dev/latchkey/pkg/eksauth"
	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

// Every class has a reason, and only what is final about the pod drops
// credentials that are good (credcache.UpstreamError.Reason).
func TestReasonOf(t *testing.T) {
	drops := map[evidence.Reason]bool{evidence.ReasonUpstreamNotFound: true, evidence.ReasonUpstreamToken: true}
	for class, want := range map[eksauth.Class]struct {
		reason evidence.Reason
		drops  bool
	}{
		eksauth.ClassNone:            {evidence.ReasonServed, false},
		eksauth.ClassNotFound:        {evidence.ReasonUpstreamNotFound, true},
		eksauth.ClassInvalidToken:    {evidence.ReasonUpstreamToken, true},
		eksauth.ClassExpiredToken:    {evidence.ReasonTokenExpired, false},
		eksauth.ClassAccessDenied:    {evidence.ReasonUpstreamDenied, false},
		eksauth.ClassRejected:        {evidence.ReasonUpstreamInvalid, false},
		eksauth.ClassThrottled:       {evidence.ReasonUpstreamThrottled, false},
		eksauth.ClassUnavailable:     {evidence.ReasonUpstreamUnavailable, false},
		eksauth.ClassNodeCredentials: {evidence.ReasonUpstreamUnavailable, false},
		eksauth.ClassInvalidResponse: {evidence.ReasonUpstreamInvalid, false},
		"unheard of":                 {evidence.ReasonUpstreamUnavailable, false},
	} {
		if got := reasonOf(class); got != want.reason || drops[got] != want.drops {
			t.Errorf("%s: got %s (drops %v), want %s", class, got, drops[got], want.reason)
		}
	}
}

// Whatever is the node's trouble or uncertain is 5xx or 429: a 4xx makes SDKs
// drop credentials that are good.
func TestClientErrorIsRetriableUnlessUpstreamSaysNo(t *testing.T) {
	up := func(status int, class eksauth.Class) error {
		return &credcache.UpstreamError{Reason: reasonOf(class), Err: &eksauth.APIError{Status: status, Code: "X", Class: class}}
	}
	for name, c := range map[string]struct {
		err    error
		status int
	}{
		"no association":            {up(404, eksauth.ClassNotFound), 404},
		"invalid token":             {up(400, eksauth.ClassInvalidToken), 400},
		"throttled":                 {up(429, eksauth.ClassThrottled), 429},
		"unavailable":               {up(503, eksauth.ClassUnavailable), 503},
		"a proxy's 404":             {up(404, eksauth.ClassUnavailable), 502},
		"a captive portal's 200":    {up(200, eksauth.ClassInvalidResponse), 502},
		"wrong subject":             {&credcache.UpstreamError{Reason: evidence.ReasonUpstreamInvalid, Err: credcache.ErrSubjectMismatch}, 502},
		"expired answer":            {&credcache.UpstreamError{Reason: evidence.ReasonUpstreamInvalid, Err: credcache.ErrExpired}, 502},
		"node without credentials":  {&credcache.UpstreamError{Reason: evidence.ReasonUpstreamUnavailable, Err: eksauth.ErrNodeCredentials}, 503},
		"this pod asks too much":    {credcache.ErrLimited, 429},
		"the node's budget is used": {credcache.ErrOverloaded, 503},
		"stopping":                  {credcache.ErrClosed, 503},
		"takes long":                {fmt.Errorf("%w: %w", credcache.ErrAbandoned, context.DeadlineExceeded), 504},
		"no answer at all":          {&credcache.UpstreamError{Reason: evidence.ReasonUpstreamUnavailable, Err: errors.New("connection refused")}, 0},
	} {
		var got *credserver.UpstreamError
		if !errors.As(clientError(c.err), &got) {
			t.Fatalf("%s: not an UpstreamError", name)
		}
		if got.Status != c.status {
			t.Errorf("%s: status %d, want %d", name, got.Status, c.status)
		}
		if got.Status != 0 && got.Status != 404 && got.Status != 400 && got.Status != 429 && got.Status < 500 {
			t.Errorf("%s: %d makes a client drop good credentials", name, got.Status)
		}
		if !errors.Is(got, c.err) {
			t.Errorf("%s: the cause is lost", name)
		}
	}
}
