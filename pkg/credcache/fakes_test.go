// SPDX-License-Identifier: Apache-2.0

package credcache

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

const (
	fakeSecret  = "SECRETsecretSECRETsecret"
	fakeSession = "SESSIONsessionSESSIONsession"
)

// fakeToken is a token's text that tells the fake upstream whom it is for:
// "namespace|service account|anything".
func fakeToken(s evidence.Subject, serial int) string {
	return fmt.Sprintf("%s|%s|TOKEN-%s-%d", s.Namespace, s.ServiceAccount, s.PodUID, serial)
}

// fake is an upstream. Answer decides; nil answers well.
type fake struct {
	mu     sync.Mutex
	delay  time.Duration
	life   time.Duration
	answer func(ctx context.Context, token string) (Answer, error)
	calls  []call
	now    int // in flight
	most   int
}

type call struct {
	at    time.Time
	token string
}

func (f *fake) set(change func(*fake)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(f)
}

func (f *fake) Fetch(ctx context.Context, token string) (Answer, error) {
	f.mu.Lock()
	f.calls = append(f.calls, call{time.Now(), token})
	f.now++
	f.most = max(f.most, f.now)
	delay, answer, life := f.delay, f.answer, f.life
	f.mu.Unlock()
	defer f.set(func(f *fake) { f.now-- })
	if delay > 0 {
		select {
		case <-time.After(delay):
		case <-ctx.Done():
			return Answer{}, ctx.Err()
		}
	}
	if answer != nil {
		return answer(ctx, token)
	}
	return good(token, life), nil
}

func good(token string, life time.Duration) Answer {
	if life == 0 {
		life = 6 * time.Hour
	}
	parts := strings.Split(token, "|")
	return Answer{
		Namespace: parts[0], ServiceAccount: parts[1], Audience: DefaultAudience,
		AssociationARN: "arn:aws:eks:us-west-2:111122223333:podidentityassociation/prod/a-1", AssociationID: "a-1",
		AssumedRoleARN: "arn:aws:sts::111122223333:assumed-role/" + parts[1] + "/eks-prod",
		AccessKeyID:    "ASIAFAKE", SecretAccessKey: fakeSecret, SessionToken: fakeSession,
		Expiration: time.Now().Add(life),
	}
}

func (f *fake) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.calls)
}

func (f *fake) mostAtOnce() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.most
}

func (f *fake) history() []call {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.calls)
}

func (f *fake) last() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls[len(f.calls)-1].token
}

// subject makes the n-th pod's.
func subject(n int) evidence.Subject {
	return evidence.Subject{PodUID: evidence.PodUID(fmt.Sprintf("00000000-0000-4000-8000-%012d", n)), Namespace: "web", ServiceAccount: fmt.Sprintf("sa-%d", n)}
}

// request with a verified token of the given serial; each serial's token lives
// a day longer than the one before.
func request(n, serial int) Request {
	s := subject(n)
	raw := fakeToken(s, serial)
	return Request{
		Token: evidence.Token{Subject: s, ID: sha256.Sum256([]byte(raw)), Verified: true,
			Expiry: time.Date(2000, 1, 2+serial, 0, 0, 0, 0, time.UTC)},
		Raw: raw, PodUID: s.PodUID,
	}
}

func unverified(r Request) Request {
	r.Token.Verified = false
	return r
}

// inBubble runs a test on a clock that moves only while everybody sleeps; it
// begins at midnight of 2000-01-01.
func inBubble(t *testing.T, change func(*Config), body func(t *testing.T, c *Cache, up *fake)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		up := &fake{}
		cfg := Config{Upstream: up}
		if change != nil {
			change(&cfg)
		}
		c, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		body(t, c, up)
	})
}

func mustGet(t *testing.T, c *Cache, req Request, want Outcome) *Entry {
	t.Helper()
	e, outcome, err := c.Get(t.Context(), req)
	if err != nil || outcome != want {
		t.Fatalf("got %v (%v) at %s, want %v", outcome, err, time.Now().Format(time.TimeOnly), want)
	}
	return e
}

func mustFail(t *testing.T, c *Cache, req Request, want evidence.Reason, outcome Outcome) {
	t.Helper()
	e, got, err := c.Get(t.Context(), req)
	if e != nil || ReasonOf(err) != want || got != outcome {
		t.Fatalf("got %v (%v, %s), want %s with %s", got, err, ReasonOf(err), outcome, want)
	}
}

func refusing(reason evidence.Reason) func(context.Context, string) (Answer, error) {
	return func(context.Context, string) (Answer, error) {
		return Answer{}, &UpstreamError{Reason: reason, Err: errors.New("upstream says " + string(reason))}
	}
}
