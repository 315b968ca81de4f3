// SPDX-License-Identifier: Apache-2.0

// Package tokencheck judges service-account tokens for the server: by the keys
// that the token's cluster was registered with, always, and by asking that
// cluster's API server whether the pod still lives (TokenReview), where the
// cluster was registered with a kubeconfig.
//
// The cluster is chosen by whoever calls, never by the token. A token that
// another cluster's key has signed is invalid, whatever its issuer says: all
// clusters made by kubeadm have the same.
package tokencheck

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/association"
	"github.com/latchkey-dev/latchkey/pkg/evidence"
	"github.com/latchkey-dev/latchkey/pkg/satoken"
)

// Defaults of Config.
const (
	// DefaultMemory is how many verified tokens are remembered; each takes about
	// 600 bytes.
	DefaultMemory = 32768
	// DefaultReviewLife is how long an API server's yes is remembered, for the
	// exact same token. API servers themselves remember theirs for ten seconds
	// (seen with 1.35), so a pod that was deleted is refused after the two
	// together at the latest.
	DefaultReviewLife = 5 * time.Second
	// DefaultReviewTimeout bounds one TokenReview, waiting for a free slot
	// included.
	DefaultReviewTimeout = 2 * time.Second
	// DefaultReviewsAtOnce is how many TokenReviews one cluster is sent at once.
	DefaultReviewsAtOnce = 32
)

// maxClusters bounds what is prepared per cluster; beyond it everything is
// prepared anew. It is far more than a server has.
const maxClusters = 4096

// Subject is whom a token speaks for. All of it was signed by the cluster.
type Subject struct {
	Namespace, ServiceAccount string
	// ServiceAccountUID is empty if the token names none.
	ServiceAccountUID string
	PodName, PodUID   string
	// NodeName and NodeUID are empty on tokens of Kubernetes before 1.30; NodeUID
	// may be empty later too.
	NodeName, NodeUID string
	// JTI is the token's own id, for audit; empty on old clusters. Not secret.
	JTI string
	// Expires is claim exp.
	Expires time.Time
	// Reviewed is false if the cluster's keys alone have judged: the cluster has
	// no TokenReview, or it could not be asked and is set to go on without.
	Reviewed bool
}

// Outcome is what came of asking an API server. It is the value of a metric's
// label.
type Outcome string

// The outcomes.
const (
	// OutcomeAlive: the API server accepts the token.
	OutcomeAlive Outcome = "alive"
	// OutcomeNotAlive: it does not.
	OutcomeNotAlive Outcome = "not_alive"
	// OutcomeMismatch: it takes the token for somebody else's.
	OutcomeMismatch Outcome = "mismatch"
	// OutcomeNoAudience: it has not compared the audience.
	OutcomeNoAudience Outcome = "no_audience"
	// OutcomeOutage: it gave no answer, or refused to review tokens for us.
	OutcomeOutage Outcome = "outage"
	// OutcomeSkipped: it was not asked, because it just did not answer.
	OutcomeSkipped Outcome = "skipped"
)

// Review is what Config.Observe is told.
type Review struct {
	Cluster string
	Outcome Outcome
	// KeysAlone: the token was accepted all the same, by the cluster's setting.
	KeysAlone bool
	Duration  time.Duration
}

// Config is what a Checker is made of. Zero values mean what the field says.
type Config struct {
	// Audience must be among the token's. Empty means satoken.DefaultAudience.
	Audience string
	// Refuse is an audience that must not be among them; empty: none.
	Refuse string
	// Leeway is allowed on the token's times: zero means satoken.DefaultLeeway, a
	// negative value none.
	Leeway time.Duration
	// Memory, ReviewLife, ReviewTimeout and ReviewsAtOnce: zero means the default
	// of that name. A negative ReviewLife remembers nothing.
	Memory        int
	ReviewLife    time.Duration
	ReviewTimeout time.Duration
	ReviewsAtOnce int
	// Observe, if set, is told of each TokenReview. It must not block.
	Observe func(Review)
	// Now is the clock; nil means time.Now.
	Now func() time.Time
	// Log is told of API servers that stop and start to answer; nil discards it.
	Log *slog.Logger
}

// Checker checks tokens of one audience. It may be used by several goroutines.
type Checker struct {
	cfg Config
	// foreign accepts what must be refused.
	foreign *satoken.Parser
	// lenient reads the expiry of expired tokens, for the text.
	lenient *satoken.Parser
	memory  *memory

	mu       sync.RWMutex
	clusters map[string]*cluster
}

// cluster is what is prepared for checking one cluster's tokens.
type cluster struct {
	issuers  []string
	keys     []byte
	review   association.TokenReview // zero: none
	verifier *satoken.Verifier       // nil if err is set
	reviewer *reviewer               // nil without TokenReview
	err      error
}

// New makes a Checker.
func New(cfg Config) (*Checker, error) {
	if cfg.Audience == "" {
		cfg.Audience = satoken.DefaultAudience
	}
	if cfg.Refuse == cfg.Audience {
		return nil, fmt.Errorf("audience %q cannot be both asked for and refused", cfg.Audience)
	}
	if cfg.Memory <= 0 {
		cfg.Memory = DefaultMemory
	}
	if cfg.ReviewLife == 0 {
		cfg.ReviewLife = DefaultReviewLife
	}
	if cfg.ReviewTimeout <= 0 {
		cfg.ReviewTimeout = DefaultReviewTimeout
	}
	if cfg.ReviewsAtOnce <= 0 {
		cfg.ReviewsAtOnce = DefaultReviewsAtOnce
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	c := &Checker{cfg: cfg, memory: newMemory(cfg.Memory), clusters: map[string]*cluster{}}
	var err error
	if cfg.Refuse != "" {
		if c.foreign, err = satoken.NewParser(satoken.Config{Audience: cfg.Refuse, Leeway: cfg.Leeway, Now: cfg.Now}); err != nil {
			return nil, fmt.Errorf("making a parser: %w", err)
		}
	}
	// A century: no token is too old for it.
	c.lenient, err = satoken.NewParser(satoken.Config{Audience: cfg.Audience, Leeway: 100 * 365 * 24 * time.Hour, Now: cfg.Now})
	if err != nil {
		return nil, fmt.Errorf("making a parser: %w", err)
	}
	return c, nil
}

// Check judges a token for a cluster. Errors are of type *Error. The token is
// not kept, only its hash.
func (c *Checker) Check(ctx context.Context, of association.Cluster, token string) (Subject, error) {
	prepared := c.prepare(&of)
	if prepared.err != nil {
		return Subject{}, &Error{sentinel: ErrUnavailable, reason: ReasonMisconfigured,
			message: "The token cannot be checked: the cluster is not set up completely.", cause: prepared.err}
	}
	key := memoryKey{cluster: of.Name, token: sha256.Sum256([]byte(token))}
	known := c.memory.get(key)
	// Keys that have changed since may not be those that signed it; a token that
	// has expired since is judged again, for its error.
	if known == nil || known.by != prepared.verifier || !c.cfg.Now().Before(known.subject.Expires) {
		verified, err := prepared.verifier.Verify(ctx, token)
		if err != nil {
			return Subject{}, c.refusal(err, token)
		}
		if c.foreign != nil {
			if _, err := c.foreign.ParseUnverified(token); !errors.Is(err, satoken.ErrAudience) {
				return Subject{}, &Error{sentinel: ErrInvalid, reason: evidence.ReasonTokenAudience,
					message: "Service account token failed basic claim validations: token must not be for audience " + c.cfg.Refuse}
			}
		}
		known = &memorized{by: prepared.verifier, subject: subjectOf(verified)}
		c.memory.put(key, known)
	}
	subject := known.subject
	if prepared.reviewer == nil {
		return subject, nil
	}
	var err error
	subject.Reviewed, err = c.review(ctx, of.Name, prepared, known, token)
	if err != nil {
		return Subject{}, err
	}
	return subject, nil
}

func subjectOf(t evidence.Token) Subject {
	return Subject{
		Namespace: t.Subject.Namespace, ServiceAccount: t.Subject.ServiceAccount, ServiceAccountUID: t.ServiceAccountUID,
		PodName: t.PodName, PodUID: string(t.Subject.PodUID),
		NodeName: t.Node, NodeUID: t.NodeUID,
		JTI: t.JTI, Expires: t.Expiry,
	}
}

// refusal gives an error of pkg/satoken its meaning here.
func (c *Checker) refusal(err error, token string) error {
	var refused *satoken.Error
	if !errors.As(err, &refused) { // never
		return &Error{sentinel: ErrUnavailable, reason: evidence.ReasonKeysUnavailable, message: "The token cannot be checked, try again.", cause: err}
	}
	e := &Error{sentinel: ErrInvalid, reason: refused.Reason(), message: refused.Message(), cause: refused}
	switch {
	case refused.Retriable():
		e.sentinel = ErrUnavailable
	case errors.Is(refused, satoken.ErrExpired):
		e.sentinel = ErrExpired
		e.message = "The token included in the request is expired"
		if t, err := c.lenient.ParseUnverified(token); err == nil {
			e.message += fmt.Sprintf(": current date/time %s must be before the expiration date/time %s",
				c.cfg.Now().UTC().Format(time.RFC3339), t.Expiry.UTC().Format(time.RFC3339))
		}
	}
	return e
}

// prepare gives what checks a cluster's tokens, made anew if the cluster has
// changed.
func (c *Checker) prepare(of *association.Cluster) *cluster {
	var review association.TokenReview
	if of.TokenReview != nil {
		review = *of.TokenReview
	}
	c.mu.RLock()
	was := c.clusters[of.Name]
	c.mu.RUnlock()
	same := func(p *cluster) bool {
		return p != nil && bytes.Equal(p.keys, of.Keys) && slices.Equal(p.issuers, of.Issuers) && p.review == review
	}
	if same(was) {
		return was
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if was = c.clusters[of.Name]; same(was) {
		return was
	}
	is := &cluster{issuers: slices.Clone(of.Issuers), keys: bytes.Clone(of.Keys), review: review}
	is.verifier, is.err = c.verifier(is)
	switch {
	case of.TokenReview == nil:
	case was != nil && was.review == review:
		is.reviewer = was.reviewer
	default:
		is.reviewer = newReviewer(of.Name, review, c.cfg)
	}
	if len(c.clusters) >= maxClusters {
		clear(c.clusters)
	}
	c.clusters[of.Name] = is
	return is
}

func (c *Checker) verifier(of *cluster) (*satoken.Verifier, error) {
	if len(of.issuers) == 0 {
		return nil, errors.New("no issuer is registered")
	}
	// Without an issuer of its own, the set leaves comparing it to the verifier,
	// which has several.
	set, err := satoken.ParseKeySet("", of.keys)
	if err != nil {
		return nil, fmt.Errorf("the registered keys: %w", err)
	}
	v, err := satoken.NewVerifier(satoken.Config{
		Issuers: of.issuers, Audience: c.cfg.Audience, Leeway: c.cfg.Leeway, Keys: set, Now: c.cfg.Now,
	})
	if err != nil {
		return nil, fmt.Errorf("making a verifier: %w", err)
	}
	return v, nil
}

// review asks the cluster's API server, unless it said yes just now. It is false
// without an error if the keys alone may judge.
func (c *Checker) review(ctx context.Context, name string, prepared *cluster, known *memorized, token string) (bool, error) {
	started := c.cfg.Now()
	if last := known.reviewed.Load(); last != nil {
		// A clock that was set back must not make a yes last.
		if age := started.Sub(*last); age >= 0 && age < c.cfg.ReviewLife {
			return true, nil
		}
	}
	outcome, cause := prepared.reviewer.review(ctx, token, c.cfg.Audience, known.subject)
	keysAlone := (outcome == OutcomeOutage || outcome == OutcomeSkipped) &&
		prepared.review.OnOutage == association.OnOutageKeys && ctx.Err() == nil
	if c.cfg.Observe != nil {
		c.cfg.Observe(Review{Cluster: name, Outcome: outcome, KeysAlone: keysAlone, Duration: c.cfg.Now().Sub(started)})
	}
	unavailable := &Error{sentinel: ErrUnavailable, reason: ReasonReviewUnavailable,
		message: "The token cannot be checked with the cluster now, try again.", cause: cause}
	switch outcome {
	case OutcomeAlive:
		known.reviewed.Store(&started)
		return true, nil
	case OutcomeNotAlive:
		return false, &Error{sentinel: ErrInvalid, reason: ReasonNotAlive,
			message: "The cluster does not accept the token: its pod, service account or node is gone.", cause: cause}
	case OutcomeMismatch:
		return false, &Error{sentinel: ErrInvalid, reason: ReasonReviewMismatch,
			message: "The cluster does not accept the token for this pod and service account.", cause: cause}
	case OutcomeNoAudience:
		unavailable.reason = ReasonMisconfigured
		return false, unavailable
	case OutcomeOutage, OutcomeSkipped:
	}
	if keysAlone {
		return false, nil
	}
	return false, unavailable
}
