// SPDX-License-Identifier: Apache-2.0

package tokencheck

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	authv1 "k8s.io/api/authentication/v1"

	"github.com/latchkey-dev/latchkey/pkg/association"
	"github.com/latchkey-dev/latchkey/pkg/evidence"
	"github.com/latchkey-dev/latchkey/test/standin/tokens"
)

// reviewRig is a checker, a cluster, and the API server that it asks.
type reviewRig struct {
	*Checker
	t       *testing.T
	api     *apiServer
	cluster association.Cluster
	signer  *tokens.Signer
	clock   *clock
	log     *bytes.Buffer

	mu      sync.Mutex
	reviews []Review
}

func startReview(t *testing.T, edit ...func(*Config)) *reviewRig {
	t.Helper()
	r := &reviewRig{t: t, api: startAPIServer(t), signer: signer(t, "a"), clock: newClock(), log: &bytes.Buffer{}}
	cfg := Config{
		Now: r.clock.Now, Log: slog.New(slog.NewTextHandler(r.log, nil)), ReviewTimeout: time.Minute,
		Observe: func(v Review) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.reviews = append(r.reviews, v)
		},
	}
	for _, e := range edit {
		e(&cfg)
	}
	r.Checker = checker(t, cfg)
	r.cluster = clusterOf(r.signer, "prod")
	r.cluster.TokenReview = &association.TokenReview{Kubeconfig: r.api.kubeconfig(t, "reviewer-credential"), Context: "reviewer"}
	return r
}

func (r *reviewRig) check(token string) (Subject, error) {
	return r.Check(r.t.Context(), r.cluster, token)
}

func (r *reviewRig) outcomes() []Outcome {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []Outcome
	for _, v := range r.reviews {
		out = append(out, v.Outcome)
	}
	return out
}

func reasonOf(err error) evidence.Reason {
	var refused *Error
	if errors.As(err, &refused) {
		return refused.Reason()
	}
	return ""
}

// A deleted pod's token is refused from the first question on; a yes is
// remembered for seconds, and for this very token only.
func TestDeletedPod(t *testing.T) {
	r := startReview(t)
	token, second := r.signer.Token(tokens.Claims{ID: "one"}), r.signer.Token(tokens.Claims{ID: "two"})
	for range 3 {
		if got, err := r.check(token); err != nil || !got.Reviewed {
			t.Fatalf("%+v, %v", got, err)
		}
	}
	if n := r.api.count(); n != 1 {
		t.Errorf("%d reviews for one token", n)
	}
	r.api.set(func() { r.api.gone[tokens.UID("pod", "default", "default-0")] = true })
	if _, err := r.check(second); !errors.Is(err, ErrInvalid) || reasonOf(err) != ReasonNotAlive {
		t.Errorf("another token of the pod: %v", err)
	}
	if _, err := r.check(token); err != nil {
		t.Errorf("within the memory's life: %v", err)
	}
	r.clock.add(DefaultReviewLife)
	for range 2 { // a no is not remembered
		if _, err := r.check(token); !errors.Is(err, ErrInvalid) {
			t.Errorf("after it: %v", err)
		}
	}
	if n := r.api.count(); n != 4 {
		t.Errorf("%d reviews", n)
	}
	if got := r.outcomes(); !slices.Equal(got, []Outcome{OutcomeAlive, OutcomeNotAlive, OutcomeNotAlive, OutcomeNotAlive}) {
		t.Errorf("observed %v", got)
	}
	// A clock that is set back does not make a yes last.
	r = startReview(t)
	if _, err := r.check(token); err != nil {
		t.Fatal(err)
	}
	r.clock.add(-time.Second)
	if _, err := r.check(token); err != nil || r.api.count() != 2 {
		t.Errorf("%d reviews, %v", r.api.count(), err)
	}
}

// The keys judge first: the API server gets no junk to look at.
func TestReviewOnlyOfGoodTokens(t *testing.T) {
	r := startReview(t)
	for _, token := range []string{"", "a.b.c", signer(t, "b").Token(tokens.Claims{}), r.signer.Token(tokens.Claims{Audience: "other"})} {
		if _, err := r.check(token); !errors.Is(err, ErrInvalid) {
			t.Errorf("%v", err)
		}
	}
	if n := r.api.count(); n != 0 {
		t.Errorf("%d reviews", n)
	}
}

func TestReviewAnswers(t *testing.T) {
	extra := func(key string, values ...string) func(*authv1.TokenReviewStatus) {
		return func(s *authv1.TokenReviewStatus) {
			if s.User.Extra[key] = values; values == nil {
				delete(s.User.Extra, key)
			}
		}
	}
	for name, c := range map[string]struct {
		edit    func(*authv1.TokenReviewStatus)
		outcome Outcome
		want    error // nil: accepted
	}{
		"as it is":          {func(*authv1.TokenReviewStatus) {}, OutcomeAlive, nil},
		"more audiences":    {func(s *authv1.TokenReviewStatus) { s.Audiences = append(s.Audiences, "more") }, OutcomeAlive, nil},
		"other audiences":   {func(s *authv1.TokenReviewStatus) { s.Audiences = []string{"https://kubernetes.default.svc"} }, OutcomeNoAudience, ErrUnavailable},
		"no audiences":      {func(s *authv1.TokenReviewStatus) { s.Audiences = nil }, OutcomeNoAudience, ErrUnavailable},
		"not authenticated": {func(s *authv1.TokenReviewStatus) { s.Authenticated = false }, OutcomeNotAlive, ErrInvalid},
		"empty":             {func(s *authv1.TokenReviewStatus) { *s = authv1.TokenReviewStatus{} }, OutcomeNotAlive, ErrInvalid},
		"expired there": {func(s *authv1.TokenReviewStatus) {
			*s = authv1.TokenReviewStatus{Error: "[invalid bearer token, service account token has expired]"}
		}, OutcomeNotAlive, ErrInvalid},
		"account gone, and a webhook is away": {func(s *authv1.TokenReviewStatus) {
			*s = authv1.TokenReviewStatus{Error: `[serviceaccounts "default" not found, Post "https://webhook": dial tcp 10.0.0.1:443: connect: connection refused]`}
		}, OutcomeNotAlive, ErrInvalid},
		"could not look the account up": {func(s *authv1.TokenReviewStatus) {
			*s = authv1.TokenReviewStatus{Error: "[invalid bearer token, etcdserver: request timed out]"}
		}, OutcomeOutage, ErrUnavailable},
		"could not ask in time": {func(s *authv1.TokenReviewStatus) {
			*s = authv1.TokenReviewStatus{Error: `Get "https://[::1]:6443/api/v1/namespaces/default/serviceaccounts/default": context deadline exceeded`}
		}, OutcomeOutage, ErrUnavailable},
		"another user":              {func(s *authv1.TokenReviewStatus) { s.User.Username = "system:serviceaccount:default:other" }, OutcomeMismatch, ErrInvalid},
		"account made anew":         {func(s *authv1.TokenReviewStatus) { s.User.UID = tokens.UID("new") }, OutcomeMismatch, ErrInvalid},
		"another pod":               {extra(extraPodName, "other-0"), OutcomeMismatch, ErrInvalid},
		"pod made anew":             {extra(extraPodUID, tokens.UID("new")), OutcomeMismatch, ErrInvalid},
		"no pod":                    {extra(extraPodUID), OutcomeMismatch, ErrInvalid},
		"two pods":                  {extra(extraPodUID, tokens.UID("pod", "default", "default-0"), "x"), OutcomeMismatch, ErrInvalid},
		"another node":              {extra(extraNodeName, "node-2"), OutcomeMismatch, ErrInvalid},
		"node made anew":            {extra(extraNodeUID, tokens.UID("new")), OutcomeMismatch, ErrInvalid},
		"before nodes were told of": {extra(extraNodeName), OutcomeAlive, nil},
		"another token":             {extra(extraCredential, "JTI=x"), OutcomeMismatch, ErrInvalid},
	} {
		r := startReview(t)
		r.api.edit = c.edit
		_, err := r.check(r.signer.Token(tokens.Claims{}))
		if (err == nil) != (c.want == nil) || err != nil && !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
		if got := r.outcomes(); !slices.Equal(got, []Outcome{c.outcome}) {
			t.Errorf("%s: observed %v", name, got)
		}
	}
}

// Whatever keeps an API server from reviewing is no answer about the token:
// 503, or the keys alone where the cluster says so.
func TestOutage(t *testing.T) {
	answer := func(code int, reason string) func(*reviewRig) {
		return func(r *reviewRig) {
			r.api.answer = func(w http.ResponseWriter, _ *http.Request, _ *authv1.TokenReview) { status(w, code, reason) }
		}
	}
	raw := func(body string) func(*reviewRig) {
		return func(r *reviewRig) {
			r.api.answer = func(w http.ResponseWriter, _ *http.Request, _ *authv1.TokenReview) {
				w.Header().Set("Content-Type", "application/json")
				_, _ = w.Write([]byte(body))
			}
		}
	}
	kubeconfig := func(content string) func(*reviewRig) {
		return func(r *reviewRig) {
			if err := os.WriteFile(r.cluster.TokenReview.Kubeconfig, []byte(content), 0o600); err != nil {
				r.t.Fatal(err)
			}
		}
	}
	for name, cause := range map[string]func(*reviewRig){
		"500":                answer(500, "InternalError"),
		"503":                answer(503, "ServiceUnavailable"),
		"429":                answer(429, "TooManyRequests"),
		"our own 401":        func(r *reviewRig) { r.api.credential = "another" },
		"our own 403":        answer(403, "Forbidden"),
		"404":                answer(404, "NotFound"),
		"garbage":            raw("<html>"),
		"another kind":       raw(`{"kind":"Pod","apiVersion":"v1"}`),
		"closed":             func(r *reviewRig) { r.api.Close() },
		"no file":            func(r *reviewRig) { r.cluster.TokenReview.Kubeconfig += ".none" },
		"no context":         func(r *reviewRig) { r.cluster.TokenReview.Context = "none" },
		"not there":          func(r *reviewRig) { r.cluster.TokenReview.Context = "nowhere" },
		"empty file":         kubeconfig(""),
		"a file of rubbish":  kubeconfig("{"),
		"plain http":         kubeconfig("clusters: [{name: a, cluster: {server: 'http://api.example.com'}}]\ncontexts: [{name: reviewer, context: {cluster: a}}]\n"),
		"anybody can answer": kubeconfig("clusters: [{name: a, cluster: {server: 'https://api.example.com', insecure-skip-tls-verify: true}}]\ncontexts: [{name: reviewer, context: {cluster: a}}]\n"),
		"another certificate": func(r *reviewRig) {
			kubeconfig(fmt.Sprintf("clusters: [{name: a, cluster: {server: '%s'}}]\ncontexts: [{name: reviewer, context: {cluster: a}}]\n", r.api.URL))(r)
		},
		"hangs": func(r *reviewRig) {
			r.api.answer = func(_ http.ResponseWriter, req *http.Request, _ *authv1.TokenReview) { <-req.Context().Done() }
		},
		"cut": func(r *reviewRig) {
			r.api.answer = func(http.ResponseWriter, *http.Request, *authv1.TokenReview) { panic(http.ErrAbortHandler) }
		},
	} {
		for _, setting := range []string{"", association.OnOutageRefuse, association.OnOutageKeys} {
			t.Run(name+" "+setting, func(t *testing.T) {
				r := startReview(t, func(cfg *Config) {
					if name == "hangs" {
						cfg.ReviewTimeout = 20 * time.Millisecond
					}
				})
				r.cluster.TokenReview.OnOutage = setting
				cause(r)
				token := r.signer.Token(tokens.Claims{})
				got, err := r.check(token)
				keys := setting == association.OnOutageKeys
				switch {
				case keys && (err != nil || got.Reviewed || got.PodName == ""):
					t.Errorf("%+v, %v", got, err)
				case !keys && (!errors.Is(err, ErrUnavailable) || reasonOf(err) != ReasonReviewUnavailable):
					t.Errorf("%v", err)
				}
				if want := (Review{Cluster: "prod", Outcome: OutcomeOutage, KeysAlone: keys}); r.reviews[0].Outcome != want.Outcome || r.reviews[0].KeysAlone != keys || r.reviews[0].Cluster != "prod" {
					t.Errorf("observed %+v", r.reviews[0])
				}
				text := r.log.String() + fmt.Sprint(err)
				if !strings.Contains(r.log.String(), "prod") || strings.Contains(text, token[len(token)-20:]) || strings.Contains(text, "reviewer-credential") {
					t.Errorf("log %s", text)
				}
				// Also then, what the keys refuse is refused.
				if _, err := r.check(signer(t, "b").Token(tokens.Claims{})); !errors.Is(err, ErrInvalid) {
					t.Errorf("a foreign token: %v", err)
				}
			})
		}
	}
}

// An API server that does not answer is asked by one call at a time, and asked
// again until it does.
func TestOutageIsProbed(t *testing.T) {
	r := startReview(t)
	r.api.answer = func(w http.ResponseWriter, _ *http.Request, _ *authv1.TokenReview) {
		status(w, 503, "ServiceUnavailable")
	}
	token := r.signer.Token(tokens.Claims{})
	for range 10 {
		if _, err := r.check(token); !errors.Is(err, ErrUnavailable) {
			t.Fatal(err)
		}
	}
	if n := r.api.count(); n != outageFailures {
		t.Errorf("%d reviews", n)
	}
	r.clock.add(outagePause)
	for range 5 {
		if _, err := r.check(token); !errors.Is(err, ErrUnavailable) {
			t.Fatal(err)
		}
	}
	if n := r.api.count(); n != outageFailures+1 {
		t.Errorf("%d reviews after a pause", n)
	}

	// One call probes; the others do not wait for it.
	asked, hold := make(chan struct{}), make(chan struct{})
	r.api.set(func() {
		r.api.answer = func(w http.ResponseWriter, _ *http.Request, review *authv1.TokenReview) {
			close(asked)
			<-hold
			review.Status = r.api.judge(review.Spec)
			write(w, http.StatusCreated, review)
		}
	})
	r.clock.add(outagePause)
	probe := make(chan error)
	go func() {
		_, err := r.check(token)
		probe <- err
	}()
	<-asked
	if _, err := r.check(token); !errors.Is(err, ErrUnavailable) {
		t.Errorf("beside the probe: %v", err)
	}
	r.api.set(func() { r.api.answer = nil })
	close(hold)
	if err := <-probe; err != nil {
		t.Errorf("the probe: %v", err)
	}
	if _, err := r.check(r.signer.Token(tokens.Claims{ID: "after"})); err != nil {
		t.Errorf("after the outage: %v", err)
	}
	if strings.Count(r.log.String(), "level=WARN") != 1 || strings.Count(r.log.String(), "reviews tokens again") != 1 {
		t.Errorf("log %s", r.log)
	}
}

// A caller who leaves tells nothing about the API server.
func TestCallerLeaves(t *testing.T) {
	r := startReview(t)
	r.cluster.TokenReview.OnOutage = association.OnOutageKeys
	token := r.signer.Token(tokens.Claims{})
	for range outageFailures + 2 {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := r.Check(ctx, r.cluster, token); !errors.Is(err, ErrUnavailable) {
			t.Errorf("%v", err)
		}
	}
	if got, err := r.check(token); err != nil || !got.Reviewed {
		t.Errorf("%+v, %v", got, err)
	}
}

// A changed kubeconfig is used, a broken one is not.
func TestKubeconfigIsReadAgain(t *testing.T) {
	r := startReview(t)
	file := r.cluster.TokenReview.Kubeconfig
	token := func() string { return r.signer.Token(tokens.Claims{}) }
	if _, err := r.check(token()); err != nil {
		t.Fatal(err)
	}
	r.api.set(func() { r.api.credential = "renewed" })
	r.api.writeKubeconfig(t, file, "renewed")
	r.clock.add(kubeconfigInterval)
	if _, err := r.check(token()); err != nil {
		t.Errorf("renewed: %v", err)
	}
	if err := os.WriteFile(file, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	r.clock.add(kubeconfigInterval)
	if _, err := r.check(token()); err != nil {
		t.Errorf("broken: %v", err)
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	r.clock.add(kubeconfigInterval)
	if _, err := r.check(token()); err != nil {
		t.Errorf("removed: %v", err)
	}
	r.api.mu.Lock()
	defer r.api.mu.Unlock()
	if n := len(r.api.connections); n > 2 {
		t.Errorf("%d connections for 4 calls in a row and one change", n)
	}
}

// In a pod, a kubeconfig that says nothing must not become the pod's own
// cluster.
func TestNeverTheOwnCluster(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
	t.Setenv("KUBERNETES_SERVICE_PORT", "1")
	r := startReview(t)
	if err := os.WriteFile(r.cluster.TokenReview.Kubeconfig, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := r.check(r.signer.Token(tokens.Claims{}))
	if !errors.Is(err, ErrUnavailable) || !strings.Contains(fmt.Sprint(err), filepath.Base(r.cluster.TokenReview.Kubeconfig)) {
		t.Errorf("%v", err)
	}
}

// FuzzJudge: no answer is taken for a yes to another subject.
func FuzzJudge(f *testing.F) {
	f.Add(true, "pods.eks.amazonaws.com", "system:serviceaccount:web:api", "sa-uid", "api-0", "pod-uid", "node")
	f.Add(false, "", "", "", "", "", "")
	subject := Subject{Namespace: "web", ServiceAccount: "api", ServiceAccountUID: "sa-uid", PodName: "api-0", PodUID: "pod-uid", NodeName: "node"}
	f.Fuzz(func(t *testing.T, authenticated bool, audience, user, userUID, pod, podUID, node string) {
		outcome, err := judge(&authv1.TokenReviewStatus{
			Authenticated: authenticated, Audiences: []string{audience},
			User: authv1.UserInfo{Username: user, UID: userUID, Extra: map[string]authv1.ExtraValue{
				extraPodName: {pod}, extraPodUID: {podUID}, extraNodeName: {node},
			}},
		}, "pods.eks.amazonaws.com", subject)
		same := authenticated && audience == "pods.eks.amazonaws.com" && user == "system:serviceaccount:web:api" && userUID == "sa-uid" &&
			pod == "api-0" && podUID == "pod-uid" && node == "node"
		if (outcome == OutcomeAlive) != same || (err == nil) != same {
			t.Errorf("%s, %v", outcome, err)
		}
	})
}
