// SPDX-License-Identifier: Apache-2.0

package eksapi

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/sigv4"
	"github.com/latchkey-dev/latchkey/pkg/strangers"
)

// What nothing is asked of.
type (
	noStore  struct{ Associations }
	noIndex  struct{ Index }
	noTokens struct{ Tokens }
	noIssuer struct{ Issuer }
	noKeys   struct{}
)

func (noKeys) Lookup(context.Context, string, string) (sigv4.Key, error) {
	return sigv4.Key{}, sigv4.ErrUnknownKey
}

// However many callers there are, memory is bounded, and one who goes on asking
// is not forgotten by it.
func TestLimitersAreBounded(t *testing.T) {
	now := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	l := newLimiters(Limits{Reads: Rate{PerSecond: 0.001, Burst: 5}}, func() time.Time { return now })
	l.most = 100
	busy := callerClass{"user", "busy", rateRead}
	allowed := 0
	for i := range 1000 {
		if i%10 == 0 && l.allow(busy) {
			allowed++
		}
		l.allow(callerClass{"user", fmt.Sprint(i), rateRead})
		if n := len(l.young) + len(l.old); n > l.most {
			t.Fatalf("%d limiters", n)
		}
	}
	if allowed != 5 {
		t.Errorf("allowed %d times", allowed)
	}
}

// Large bodies of callers who are not known yet have so many places, and one
// address has half of them.
func TestBodies(t *testing.T) {
	b := newBodies()
	var release []func()
	take := func(remote string) bool {
		f, ok := b.take(remote)
		if ok {
			release = append(release, f)
		}
		return ok
	}
	for range peerBodies {
		if !take("192.0.2.1:1") {
			t.Fatal("no place")
		}
	}
	if take("192.0.2.1:2") {
		t.Error("more than half for one address")
	}
	for range maxBodies - peerBodies {
		if !take("192.0.2.2:1") {
			t.Fatal("no place")
		}
	}
	if take("192.0.2.3:1") {
		t.Error("more than there are")
	}
	for _, f := range release {
		f()
	}
	if b.all != 0 || len(b.from) != 0 || !take("192.0.2.1:1") {
		t.Errorf("%d left, of %d addresses", b.all, len(b.from))
	}
}

// A large body has its place until its caller is known, or refused, and not
// longer. Without a place it is not read, and nothing is said of the caller.
func TestPlacesForBodies(t *testing.T) {
	h, err := New(Config{Associations: noStore{}, Index: noIndex{}, Tokens: noTokens{}, Issuer: noIssuer{}, Keys: noKeys{},
		Strangers: strangers.New(strangers.Config{Failures: strangers.Rate{PerSecond: -1}})})
	if err != nil {
		t.Fatal(err)
	}
	send := func(size int) int {
		r := httptest.NewRequest(http.MethodPost, "/clusters/prod/pod-identity-associations", strings.NewReader(strings.Repeat("x", size)))
		at := time.Now().UTC()
		r.Header.Set("X-Amz-Date", at.Format("20060102T150405Z"))
		r.Header.Set("Authorization", "AWS4-HMAC-SHA256 Credential=SOMEBODY/"+at.Format("20060102")+
			"/eu-central-1/eks/aws4_request, SignedHeaders=host;x-amz-date, Signature="+strings.Repeat("0", 64))
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		return w.Code
	}
	for i := range peerBodies + 1 {
		if status := send(freeBody + 1); status != http.StatusForbidden {
			t.Fatalf("body %d: %d", i, status)
		}
	}
	b := h.(*api).bodies
	for range peerBodies {
		if _, ok := b.take("192.0.2.1:1234"); !ok { // httptest's own
			t.Fatal("a place was not given back")
		}
	}
	if large, small := send(freeBody+1), send(freeBody); large != http.StatusServiceUnavailable || small != http.StatusForbidden {
		t.Errorf("without a place: a large body %d, a small one %d", large, small)
	}
}

func TestDefaultLimits(t *testing.T) {
	now := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	l := newLimiters(Limits{}, func() time.Time { return now })
	for class, want := range map[rateClass]int{rateRead: 200, rateWrite: 100, rateExchange: 1000} {
		n := 0
		for l.allow(callerClass{"user", "u", class}) {
			n++
		}
		if n != want {
			t.Errorf("class %d: %d at once", class, n)
		}
	}
}

func TestSeconds(t *testing.T) {
	for ms, want := range map[int64]string{
		1700862734922: "1700862734.922", 1700862734920: "1700862734.92", 1700862734900: "1700862734.9", 1700862734000: "1700862734", 1700862734007: "1700862734.007", 0: "0",
	} {
		b, err := json.Marshal(seconds(time.UnixMilli(ms)))
		if err != nil || string(b) != want {
			t.Errorf("%d: %s, %v", ms, b, err)
		}
	}
}
