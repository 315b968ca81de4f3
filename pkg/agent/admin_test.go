// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/latchkey-dev/latchkey/pkg/adminapi"
	"github.com/latchkey-dev/latchkey/pkg/credcache"
	"github.com/latchkey-dev/latchkey/pkg/credserver"
	"github.com/latchkey-dev/latchkey/pkg/eksauth"
	"github.com/latchkey-dev/latchkey/pkg/evidence"
	"github.com/latchkey-dev/latchkey/pkg/pods"
)

// The admin socket takes errors of EKS Auth apart from their text, which other
// packages word: what is taken apart here is made by them.
func TestUpstreamErrorsAreTakenApart(t *testing.T) {
	t.Parallel()
	api := &eksauth.APIError{Status: 403, Code: "ExpiredTokenException", Message: "expired: (at noon), fault: client", RequestID: "id-1", Class: eksauth.ClassAccessDenied}
	cached := &credcache.UpstreamError{Reason: evidence.ReasonUpstreamDenied, Err: api}
	for name, err := range map[string]error{
		"the cache's":    cached,
		"the endpoint's": clientError(cached),
		"wrapped":        fmt.Errorf("fetching: %w", &credserver.UpstreamError{Status: 403, Code: "X", Message: "Y", Err: cached}),
	} {
		u := upstreamErrorText("upstream_denied", err.Error())
		if u.Reason != "upstream_denied" || u.Status != 403 || u.Code != api.Code || u.RequestID != "id-1" || u.Message != api.Message {
			t.Errorf("%s: %+v from %q", name, u, err)
		}
	}
	gone := clientError(&credcache.UpstreamError{Reason: evidence.ReasonUpstreamUnavailable, Err: errors.New("dial tcp: refused")})
	if u := upstreamErrorText("upstream_unavailable", gone.Error()); u.Status != 0 || u.Message != "dial tcp: refused" {
		t.Errorf("%+v from %q", u, gone)
	}
	if u := upstreamErrorText("upstream_unavailable", "dial tcp: refused"); u.Status != 0 || u.Message != "dial tcp: refused" {
		t.Errorf("%+v", u)
	}
}

// The CLI refuses to choose by a reason that no refusal has, so it must know
// all that there are.
func TestReasonsOfDenialsAreAllListed(t *testing.T) {
	t.Parallel()
	listed := adminapi.Reasons()
	want := 0
	constant := regexp.MustCompile(`Reason\w* +(?:evidence\.)?Reason = "([a-z_]+)"`)
	for _, file := range []string{"../evidence/reason.go", "../credserver/record.go"} {
		source, err := os.ReadFile(filepath.FromSlash(file))
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range constant.FindAllStringSubmatch(string(source), -1) {
			if r := evidence.Reason(m[1]); r == evidence.ReasonServed || r == credserver.ReasonNotFound {
				continue // no refusal, or not of credentials
			}
			want++
			if !slices.Contains(listed, m[1]) {
				t.Errorf("%s is missing", m[1])
			}
		}
	}
	if len(listed) != want {
		t.Errorf("%d are listed, and there are %d", len(listed), want)
	}
}

func TestSubjects(t *testing.T) {
	t.Parallel()
	const uid = "0f7e2a52-6a3b-4d5e-9c1f-3a6d2b8c4e10"
	s := evidence.Subject{PodUID: uid, Namespace: "web", ServiceAccount: "api"}
	for text, want := range map[string]bool{"web/api": true, "web/other": false, uid: true, strings.ToUpper(uid): true, strings.Replace(uid, "0", "1", 1): false} {
		match, err := subjectMatch(text)
		if err != nil || match(s) != want {
			t.Errorf("%q: %v", text, err)
		}
	}
	for _, text := range []string{"", "web", "/api", "web/", "a/b/c", "*"} {
		if _, err := subjectMatch(text); !errors.Is(err, adminapi.ErrInvalid) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

// Pods that ended are remembered by their last token, and not without end.
func TestEndedPodsAreRemembered(t *testing.T) {
	t.Parallel()
	var s adminState
	o := &observer{pods: map[evidence.PodUID]lastVerdict{"pod-3": {Token: evidence.Token{PodName: "api"}}}}
	for i := range maxEnded + 10 {
		s.podEnded(&pods.Pod{UID: evidence.PodUID(fmt.Sprintf("pod-%d", i%(maxEnded+5)))}, o)
	}
	if len(s.ended) != maxEnded {
		t.Errorf("%d are remembered", len(s.ended))
	}
	e, ok := s.findEnded(func(e *endedPod) bool { return e.uid == "pod-3" })
	if !ok || e.token.PodName != "api" {
		t.Errorf("%+v, %v", e, ok)
	}
	if _, ok := s.findEnded(func(e *endedPod) bool { return e.uid == "pod-7" }); ok {
		t.Error("the oldest should have gone")
	}
}

type fakeNames map[evidence.PodUID]pods.Metadata

func (f fakeNames) Metadata(uid evidence.PodUID) (pods.Metadata, bool) {
	m, ok := f[uid]
	return m, ok
}

// The container runtime's names are shown until the pod's own token tells, and
// what the pod asked for besides credentials is no verdict.
func TestPodsAreNamedByTheRuntimeUntilTheyAsk(t *testing.T) {
	t.Parallel()
	a := &Agent{observer: &observer{pods: map[evidence.PodUID]lastVerdict{}}}
	a.admin.names = fakeNames{"u": {UID: "u", Name: "from-runtime", Namespace: "web", Containers: []pods.Container{{Name: "main"}, {Name: "sidecar"}}}}
	p := a.describe("u", "/kubepods/podu", "burstable", nil)
	if p.Name != "from-runtime" || p.Namespace != "web" || p.ServiceAccount != "" || len(p.Containers) != 2 || p.Credentials != "none" || p.Verdict != "" {
		t.Errorf("%+v", p)
	}
	a.observer.pods["u"] = lastVerdict{Reason: evidence.ReasonPodMismatch, Status: 403, Token: evidence.Token{
		Subject: evidence.Subject{PodUID: "u", Namespace: "web", ServiceAccount: "api"}, PodName: "from-token"}}
	p = a.describe("u", "", "", nil)
	if p.Name != "from-token" || p.ServiceAccount != "api" || p.Verdict != "refused 403 pod_mismatch" {
		t.Errorf("%+v", p)
	}
	if p = a.describe("unknown", "", "", nil); p.Name != "" || p.Namespace != "" {
		t.Errorf("%+v", p)
	}
}

func TestContainerIDs(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("ab", 32)
	for text, want := range map[string]bool{
		long: true, long[:12]: true, "containerd://" + long: true, "cri-o://" + long[:20]: true,
		long[:11]: false, long + "a": false, "web": false, "abcdefghijkl": false, "": false,
	} {
		if containerForm.MatchString(text) != want {
			t.Errorf("%q", text)
		}
	}
}
