// SPDX-License-Identifier: Apache-2.0

package tokencheck

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	authv1 "k8s.io/api/authentication/v1"
	authclient "k8s.io/client-go/kubernetes/typed/authentication/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/latchkey-dev/latchkey/pkg/association"
)

const (
	// kubeconfigInterval is how often the file is looked at for a change.
	kubeconfigInterval = 10 * time.Second
	maxKubeconfig      = 1 << 20
	// After so many failures in a row an API server is asked by one call at a
	// time, and not before outagePause has passed: the others need not wait for a
	// timeout each.
	outageFailures = 3
	outagePause    = time.Second
)

// Where the API server says what a token was bound to (k8s.io/apiserver,
// pkg/authentication/serviceaccount; credential-id since 1.30).
const (
	extraPodName    = "authentication.kubernetes.io/pod-name"
	extraPodUID     = "authentication.kubernetes.io/pod-uid"
	extraNodeName   = "authentication.kubernetes.io/node-name"
	extraNodeUID    = "authentication.kubernetes.io/node-uid"
	extraCredential = "authentication.kubernetes.io/credential-id"
)

// reviewer asks one cluster's API server. It may be used by several goroutines.
type reviewer struct {
	cluster string
	cfg     association.TokenReview
	timeout time.Duration
	now     func() time.Time
	log     *slog.Logger
	slots   chan struct{}

	// loading is held while the file is read.
	loading sync.Mutex
	client  rest.Interface
	content []byte
	looked  time.Time

	mu       sync.Mutex
	failures int
	retryAt  time.Time
	probing  bool
	lastErr  error
}

func newReviewer(cluster string, review association.TokenReview, cfg Config) *reviewer {
	return &reviewer{
		cluster: cluster, cfg: review,
		timeout: cfg.ReviewTimeout, now: cfg.Now, log: cfg.Log,
		slots: make(chan struct{}, cfg.ReviewsAtOnce),
	}
}

// review asks whether the token is good and still this subject's. The error is
// the cause of any outcome but OutcomeAlive, for the log.
func (r *reviewer) review(ctx context.Context, token, audience string, subject Subject) (Outcome, error) {
	if err := r.begin(); err != nil {
		return OutcomeSkipped, err
	}
	bounded, cancel := context.WithTimeout(ctx, r.timeout)
	defer cancel()
	status, err := r.ask(bounded, token, audience)
	// A caller who left says nothing about the API server.
	r.end(err, err != nil && ctx.Err() != nil)
	if err != nil {
		return OutcomeOutage, err
	}
	return judge(status, audience, subject)
}

// begin reports why the API server is not to be asked now; nil if it is.
func (r *reviewer) begin() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.failures < outageFailures {
		return nil
	}
	if r.probing || r.now().Before(r.retryAt) {
		return fmt.Errorf("not asked again so soon: %w", r.lastErr)
	}
	r.probing = true
	return nil
}

func (r *reviewer) end(err error, callerLeft bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.probing = false
	switch {
	case callerLeft:
	case err == nil:
		if r.failures > 0 {
			r.log.Info("the cluster's API server reviews tokens again", "cluster", r.cluster)
		}
		r.failures, r.lastErr = 0, nil
	default:
		if r.failures == 0 {
			r.log.Warn("the cluster's API server does not review tokens", "cluster", r.cluster, "error", err, "on_outage", r.onOutage())
		}
		r.failures++
		r.lastErr, r.retryAt = err, r.now().Add(outagePause)
	}
}

func (r *reviewer) onOutage() string {
	if r.cfg.OnOutage == association.OnOutageKeys {
		return association.OnOutageKeys
	}
	return association.OnOutageRefuse
}

// ask sends one TokenReview. Every error means that nothing is known: also a
// 401 or 403, which speaks of the kubeconfig's credential and not of the token.
func (r *reviewer) ask(ctx context.Context, token, audience string) (*authv1.TokenReviewStatus, error) {
	select {
	case r.slots <- struct{}{}:
		defer func() { <-r.slots }()
	case <-ctx.Done():
		return nil, fmt.Errorf("waiting for other token reviews: %w", ctx.Err())
	}
	client, err := r.load()
	if err != nil {
		return nil, err
	}
	in := &authv1.TokenReview{Spec: authv1.TokenReviewSpec{Token: token, Audiences: []string{audience}}}
	// No retries here: they sleep as long as a server asks them to.
	body, err := client.Post().Resource("tokenreviews").MaxRetries(0).Body(in).Do(ctx).Raw()
	if err != nil {
		return nil, fmt.Errorf("token review: %w", withoutToken(err, token))
	}
	// Decoded here, because the client takes any object for the one asked for, and
	// one without a status would be a no.
	var out authv1.TokenReview
	if err := json.Unmarshal(body, &out); err != nil || out.Kind != "TokenReview" || out.APIVersion != authv1.SchemeGroupVersion.String() {
		return nil, errors.New("token review: the answer is none")
	}
	return &out.Status, nil
}

// withoutToken hides the token, should whoever answered have echoed it.
func withoutToken(err error, token string) error {
	if strings.Contains(err.Error(), token) {
		return errors.New("the answer repeats the token")
	}
	return err
}

// judge compares what the API server says with what the token says.
func judge(s *authv1.TokenReviewStatus, audience string, subject Subject) (Outcome, error) {
	if !s.Authenticated {
		if undecided(s.Error) {
			return OutcomeOutage, fmt.Errorf("the API server could not judge the token: %q", bounded(s.Error))
		}
		return OutcomeNotAlive, fmt.Errorf("the API server does not accept the token: %q", bounded(s.Error))
	}
	// An API server that does not know audiences leaves the list empty. Then it
	// has not checked ours, though the token has it: something else than the
	// cluster's own API server has answered, or another authenticator of it.
	if !slices.Contains(s.Audiences, audience) {
		return OutcomeNoAudience, fmt.Errorf("the API server has accepted the token for other audiences than %s", audience)
	}
	if want := "system:serviceaccount:" + subject.Namespace + ":" + subject.ServiceAccount; s.User.Username != want {
		return OutcomeMismatch, fmt.Errorf("the token is of %s, the API server says %q", want, bounded(s.User.Username))
	}
	if subject.ServiceAccountUID != "" && s.User.UID != subject.ServiceAccountUID {
		return OutcomeMismatch, fmt.Errorf("service account UID: the token has %s, the API server %q", subject.ServiceAccountUID, bounded(s.User.UID))
	}
	for _, want := range []struct {
		key, value string
		required   bool
	}{
		{extraPodName, subject.PodName, true},
		{extraPodUID, subject.PodUID, true},
		{extraNodeName, subject.NodeName, false},
		{extraNodeUID, subject.NodeUID, false},
		{extraCredential, credentialID(subject.JTI), false},
	} {
		got, there := s.User.Extra[want.key]
		if want.value == "" || !there && !want.required {
			continue
		}
		if !slices.Equal(got, authv1.ExtraValue{want.value}) {
			return OutcomeMismatch, fmt.Errorf("%s: the token has %s, the API server %q", want.key, want.value, bounded(strings.Join(got, ",")))
		}
	}
	return OutcomeAlive, nil
}

// undecided tells whether a no says that the API server could not look up what
// the token is bound to, or could not ask another authenticator, instead of
// anything about the token: it answers both alike. A text that says both speaks
// of the token.
func undecided(text string) bool {
	text = strings.ToLower(text)
	has := func(parts ...string) bool {
		return slices.ContainsFunc(parts, func(p string) bool { return strings.Contains(text, p) })
	}
	// k8s.io/kubernetes, pkg/serviceaccount/claims.go
	if has("has been invalidated", "has expired", "has been deleted", "not found", "does not match") {
		return false
	}
	return has("timeout", "timed out", "deadline exceeded", "context canceled", "connection refused", "connection reset", "no route to host",
		"no such host", "unexpected eof", "tls handshake", "etcdserver", "unavailable", "unable to return a response", "too many requests")
}

func credentialID(jti string) string {
	if jti == "" {
		return ""
	}
	return "JTI=" + jti
}

func bounded(s string) string { return s[:min(len(s), 200)] }

// load gives the client, made anew when the kubeconfig has changed. A file that
// cannot be used any more changes nothing.
func (r *reviewer) load() (rest.Interface, error) {
	r.loading.Lock()
	defer r.loading.Unlock()
	now := r.now()
	if r.client != nil && now.Sub(r.looked).Abs() < kubeconfigInterval {
		return r.client, nil
	}
	r.looked = now
	content, err := os.ReadFile(r.cfg.Kubeconfig)
	if err == nil && len(content) > maxKubeconfig {
		err = fmt.Errorf("more than %d bytes", maxKubeconfig)
	}
	if err == nil && r.client != nil && bytes.Equal(content, r.content) {
		return r.client, nil
	}
	var client rest.Interface
	if err == nil {
		client, err = r.connect(content)
	}
	switch {
	case err == nil:
		r.client, r.content = client, content
	case r.client == nil:
		return nil, fmt.Errorf("kubeconfig %s: %w", r.cfg.Kubeconfig, err)
	default:
		r.log.Warn("a changed kubeconfig is not used", "cluster", r.cluster, "file", r.cfg.Kubeconfig, "error", err)
	}
	return r.client, nil
}

// RESTConfig reads how to reach the API server that a kubeconfig names, as token
// reviews do: from this file alone, and only where nobody else can answer.
func RESTConfig(kubeconfig, kubecontext string) (*rest.Config, error) {
	content, err := os.ReadFile(kubeconfig)
	if err == nil && len(content) > maxKubeconfig {
		err = fmt.Errorf("more than %d bytes", maxKubeconfig)
	}
	var cfg *rest.Config
	if err == nil {
		cfg, err = restConfig(content, kubeconfig, kubecontext)
	}
	if err != nil {
		return nil, fmt.Errorf("kubeconfig %s: %w", kubeconfig, err)
	}
	return cfg, nil
}

func restConfig(content []byte, kubeconfig, kubecontext string) (*rest.Config, error) {
	parsed, err := clientcmd.Load(content)
	if err != nil {
		return nil, fmt.Errorf("reading: %w", err)
	}
	// Relative paths in it start from where it lies.
	for _, c := range parsed.Clusters {
		c.LocationOfOrigin = kubeconfig
	}
	for _, a := range parsed.AuthInfos {
		a.LocationOfOrigin = kubeconfig
	}
	if err := clientcmd.ResolveLocalPaths(parsed); err != nil {
		return nil, fmt.Errorf("resolving paths: %w", err)
	}
	// Not the loader that falls back to the cluster this server runs in: another
	// cluster's word about a token is worth nothing.
	cfg, err := clientcmd.NewNonInteractiveClientConfig(*parsed, kubecontext, &clientcmd.ConfigOverrides{}, nil).ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("choosing a context: %w", err)
	}
	if err := trusted(cfg); err != nil {
		return nil, err
	}
	cfg.UserAgent = "latchkey-server"
	return cfg, nil
}

func (r *reviewer) connect(content []byte) (rest.Interface, error) {
	cfg, err := restConfig(content, r.cfg.Kubeconfig, r.cfg.Context)
	if err != nil {
		return nil, err
	}
	cfg.Timeout = r.timeout
	cfg.QPS = -1 // the slots are the limit
	cfg.ContentType = "application/json"
	// When a connection dies silently, a request's timeout closes it, while an
	// HTTP/2 connection would stay in use.
	cfg.NextProtos = []string{"http/1.1"}
	client, err := rest.HTTPClientFor(cfg)
	if err != nil {
		return nil, fmt.Errorf("making a client: %w", err)
	}
	typed, err := authclient.NewForConfigAndClient(cfg, client)
	if err != nil {
		return nil, fmt.Errorf("making a client: %w", err)
	}
	return typed.RESTClient(), nil
}

// trusted refuses connections on which anybody could answer, and read tokens.
func trusted(cfg *rest.Config) error {
	if cfg.Insecure {
		return errors.New("insecure-skip-tls-verify: anybody could answer for the API server")
	}
	host := cfg.Host
	if !strings.Contains(host, "://") {
		host = "http://" + host // as client-go reads it
	}
	u, err := url.Parse(host)
	if err != nil {
		return errors.New("the server's address is no URL")
	}
	addr, err := netip.ParseAddr(u.Hostname())
	if u.Scheme == "https" || err == nil && addr.IsLoopback() {
		return nil
	}
	return fmt.Errorf("server %s: need https", u.Redacted())
}
