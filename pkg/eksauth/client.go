// SPDX-License-Identifier: Apache-2.0

// Package eksauth calls the one operation of the EKS Auth API that the node
// half needs: AssumeRoleForPodIdentity, which trades a pod's service-account
// token for credentials of its role. The AWS SDK's client of this service is
// not used; this is one signed POST (API version 2023-11-26, rest-json, SigV4
// service name eks-auth).
//
// Every outcome that is not the full, unexpired answer of the service is an
// error with a Class. What is uncertain (an answer without the service's error
// code, garbage, a timeout) is never classed as a refusal, because refusals
// make callers drop good credentials.
package eksauth

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"sync/atomic"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
)

// Defaults of Config.
const (
	// DefaultAttemptTimeout bounds one HTTP exchange.
	DefaultAttemptTimeout = 2500 * time.Millisecond
	// DefaultTotalTimeout bounds a call with all its attempts and pauses.
	DefaultTotalTimeout = 8 * time.Second
	// DefaultMaxAttempts counts the first attempt.
	DefaultMaxAttempts = 3
	// DefaultBackoff is the longest pause before the second attempt.
	DefaultBackoff = 100 * time.Millisecond
	// MaxBackoff bounds every pause between attempts. If the service asks for a
	// longer one (Retry-After), the call ends with its error instead: whoever
	// waits learns the truth now, and the caller keeps the pause.
	MaxBackoff = 2 * time.Second
)

const (
	signingName = "eks-auth"
	// maxAnswer is far beyond any answer: STS session tokens stay below 4 KiB.
	maxAnswer = 64 << 10
	// maxMessage bounds how much of an error's text is kept.
	maxMessage = 512
	// skewTolerance is below the five minutes that the service tolerates.
	skewTolerance = 4 * time.Minute
)

// Attempt is what Config.Observe is told of each HTTP exchange.
type Attempt struct {
	// Number counts from 1 within one call.
	Number int
	// Status is the HTTP status, 0 without an answer.
	Status int
	// Class is ClassNone for success.
	Class Class
	// Duration is the exchange's.
	Duration time.Duration
}

// Config of a Client. Zero values mean what the field says.
type Config struct {
	// ClusterName is required: 1 to 100 of [A-Za-z0-9_-], beginning with a
	// letter or digit.
	ClusterName string
	// Region is required; requests are signed for it.
	Region string
	// Endpoint overrides the service's URL for the region, which is used if it
	// is empty. http is accepted, for a server on the same machine.
	Endpoint string
	// FIPS chooses the service's FIPS endpoint; not together with Endpoint.
	FIPS bool
	// Credentials are the node's own and required. If the provider has a method
	// Invalidate (aws.CredentialsCache has), it is called when the service says
	// they have expired.
	Credentials aws.CredentialsProvider
	// Transport carries the requests; nil means NewTransport(nil). A transport
	// and not a client, because a client may follow a redirect and send the
	// token to another host.
	Transport http.RoundTripper
	// NodeName is sent as eksNodeName if set.
	NodeName string
	// UserAgent is sent as it is; empty means "latchkey-agent".
	UserAgent string
	// AttemptTimeout, TotalTimeout, MaxAttempts and Backoff: zero means the
	// default of that name.
	AttemptTimeout time.Duration
	TotalTimeout   time.Duration
	MaxAttempts    int
	Backoff        time.Duration
	// Permit, if set, is asked before every attempt but the first, so that
	// retries count against the caller's budget; an error ends the call.
	Permit func(context.Context) error
	// Observe, if set, is called after each attempt. It must not block.
	Observe func(Attempt)
	// Now is the clock; nil means time.Now.
	Now func() time.Time
	// Jitter gives numbers in [0,1); nil means math/rand.
	Jitter func() float64
	// Logger gets warnings about the endpoint and the clock; nil discards them.
	Logger *slog.Logger
}

// Client calls EKS Auth. It is safe for concurrent use.
type Client struct {
	cfg    Config
	url    string
	signer *v4.Signer
	// skew is added to the clock when signing, in nanoseconds: nodes with a
	// wrong clock would else be refused for ever.
	skew atomic.Int64
	// memory is for State.
	memory memory
}

// Errors of New.
var (
	ErrClusterName = errors.New("invalid cluster name")
	ErrRegion      = errors.New("invalid region")
	ErrEndpoint    = errors.New("invalid EKS Auth endpoint")
	ErrConfig      = errors.New("incomplete EKS Auth configuration")
)

var (
	clusterNameForm = regexp.MustCompile(`^[0-9A-Za-z][A-Za-z0-9_-]{0,99}$`)
	// regionForm keeps the default endpoint's host name what it looks like.
	regionForm = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
)

// New makes a client. It does no I/O.
func New(cfg Config) (*Client, error) {
	if !clusterNameForm.MatchString(cfg.ClusterName) {
		return nil, fmt.Errorf("%w %q: 1 to 100 letters, digits, - and _", ErrClusterName, cfg.ClusterName)
	}
	if !regionForm.MatchString(cfg.Region) {
		return nil, fmt.Errorf("%w %q: set AWS_REGION or the region of the profile", ErrRegion, cfg.Region)
	}
	if cfg.Credentials == nil {
		return nil, fmt.Errorf("%w: no provider of the node's credentials", ErrConfig)
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	base, err := endpointOf(cfg)
	if err != nil {
		return nil, err
	}
	if base.Scheme == "http" && !isLoopback(base.Hostname()) {
		cfg.Logger.Warn("EKS Auth is called over plain http: whoever is on the path can read tokens and credentials",
			"endpoint", base.Redacted())
	}
	if cfg.Transport == nil {
		cfg.Transport = NewTransport(nil)
	}
	if cfg.UserAgent == "" {
		cfg.UserAgent = "latchkey-agent"
	}
	if cfg.AttemptTimeout <= 0 {
		cfg.AttemptTimeout = DefaultAttemptTimeout
	}
	if cfg.TotalTimeout <= 0 {
		cfg.TotalTimeout = DefaultTotalTimeout
	}
	if cfg.MaxAttempts <= 0 {
		cfg.MaxAttempts = DefaultMaxAttempts
	}
	if cfg.Backoff <= 0 {
		cfg.Backoff = DefaultBackoff
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Jitter == nil {
		cfg.Jitter = rand.Float64
	}
	return &Client{
		cfg:    cfg,
		url:    base.JoinPath("clusters", cfg.ClusterName, "assume-role-for-pod-identity").String(),
		signer: v4.NewSigner(),
	}, nil
}

// Endpoint is the URL that is called, without the cluster's path.
func (c *Client) Endpoint() string {
	return strings.TrimSuffix(c.url, "/clusters/"+c.cfg.ClusterName+"/assume-role-for-pod-identity")
}

// AssumeRoleForPodIdentity trades a pod's token for its role's credentials
// (contract: POST /clusters/{name}/assume-role-for-pod-identity). It retries
// what may pass, within the client's deadlines and the context's. Errors carry
// a Class (ClassOf); those that the service itself answered are *APIError.
func (c *Client) AssumeRoleForPodIdentity(ctx context.Context, token string) (*Result, error) {
	body, err := json.Marshal(struct {
		Token       string `json:"token"`
		EKSNodeName string `json:"eksNodeName,omitempty"`
	}{token, c.cfg.NodeName})
	if err != nil {
		return nil, fmt.Errorf("encoding the request to EKS Auth: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, c.cfg.TotalTimeout)
	defer cancel()
	// A repair (new node credentials, corrected clock) is tried once per call:
	// it can only help the first time.
	repaired := false
	for n := 1; ; n++ {
		started := c.cfg.Now()
		result, status, err := c.attempt(ctx, body, token)
		c.noteOutcome(err)
		if c.cfg.Observe != nil {
			c.cfg.Observe(Attempt{Number: n, Status: status, Class: ClassOf(err), Duration: c.cfg.Now().Sub(started)})
		}
		if err == nil {
			return result, nil
		}
		var pause time.Duration
		switch {
		case n >= c.cfg.MaxAttempts || ctx.Err() != nil:
			return nil, err
		case !repaired && c.repair(err):
			repaired = true
		case retriable(err):
			pause = c.pause(n, err)
		default:
			return nil, err
		}
		if deadline, ok := ctx.Deadline(); pause > MaxBackoff || ok && time.Until(deadline) <= pause {
			// Waiting would use up all the time left: the answer now is worth more.
			return nil, err
		}
		if !sleep(ctx, pause) {
			return nil, err
		}
		if c.cfg.Permit != nil {
			if permitErr := c.cfg.Permit(ctx); permitErr != nil {
				return nil, err
			}
		}
	}
}

// attempt does one exchange.
func (c *Client) attempt(ctx context.Context, body []byte, token string) (*Result, int, error) {
	ctx, cancel := context.WithTimeout(ctx, c.cfg.AttemptTimeout)
	defer cancel()
	creds, err := c.cfg.Credentials.Retrieve(ctx)
	c.noteCredentials(creds, err)
	if err != nil {
		return nil, 0, fmt.Errorf("%w: %w", ErrNodeCredentials, err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.url, bytes.NewReader(body))
	if err != nil {
		return nil, 0, fmt.Errorf("%w: %w", ErrEndpoint, err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", c.cfg.UserAgent)
	sum := sha256.Sum256(body)
	signedAt := c.cfg.Now().Add(time.Duration(c.skew.Load()))
	if err := c.signer.SignHTTP(ctx, creds, req, hex.EncodeToString(sum[:]), signingName, c.cfg.Region, signedAt); err != nil {
		return nil, 0, fmt.Errorf("%w: signing: %w", ErrNodeCredentials, err)
	}
	res, err := c.cfg.Transport.RoundTrip(req)
	if err != nil {
		return nil, 0, fmt.Errorf("%w: %w", ErrUnavailable, hideURL(err))
	}
	defer func() { _ = res.Body.Close() }()
	c.noteDate(res.Header)
	answer, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer+1))
	if err != nil {
		return nil, res.StatusCode, fmt.Errorf("%w: reading the answer: %w", ErrUnavailable, err)
	}
	if len(answer) > maxAnswer {
		return nil, res.StatusCode, fmt.Errorf("%w: more than %d bytes", ErrInvalidResponse, maxAnswer)
	}
	requestID := clean(res.Header.Get("X-Amzn-Requestid"), 64, token)
	if res.StatusCode != http.StatusOK {
		return nil, res.StatusCode, c.apiError(res, answer, requestID, token)
	}
	result, err := decode(answer, c.cfg.Now())
	if err != nil {
		return nil, res.StatusCode, err
	}
	result.RequestID = requestID
	return result, res.StatusCode, nil
}

// repair corrects what made the service refuse the node itself; true if another
// attempt makes sense.
func (c *Client) repair(err error) bool {
	var api *APIError
	if !errors.As(err, &api) || api.Status != http.StatusForbidden {
		return false
	}
	switch api.Code {
	case "InvalidSignatureException", "RequestTimeTooSkewed", "RequestExpired", "RequestInTheFuture", "SignatureDoesNotMatch":
		if api.date.IsZero() {
			return false
		}
		now := c.cfg.Now()
		skew := api.date.Sub(now)
		if (skew - time.Duration(c.skew.Load())).Abs() < skewTolerance {
			return false
		}
		c.skew.Store(int64(skew))
		c.cfg.Logger.Warn("this node's clock is wrong; requests are signed with the service's time", "skew", skew)
		return true
	case "ExpiredTokenException", "ExpiredToken", "UnrecognizedClientException":
		// With status 403 these speak of the node's credentials, not of the pod's
		// token.
		if cache, ok := c.cfg.Credentials.(interface{ Invalidate() }); ok {
			cache.Invalidate()
			return true
		}
	}
	return false
}

// pause before attempt n+1: what the service asked for, else full jitter, so
// that nodes that failed together do not come back together.
func (c *Client) pause(n int, err error) time.Duration {
	backoff := min(c.cfg.Backoff<<min(n-1, 10), MaxBackoff)
	pause := time.Duration(c.cfg.Jitter() * float64(backoff))
	var api *APIError
	if errors.As(err, &api) && api.RetryAfter > 0 {
		pause += api.RetryAfter
	}
	return pause
}

func sleep(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// hideURL drops the URL that net/http puts around transport errors: it can
// carry a proxy's user and password.
func hideURL(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}

// clean makes text from outside fit for logs: bounded, printable, and without
// the token, should somebody have echoed it.
func clean(text string, limit int, token string) string {
	if len(token) >= 16 {
		text = strings.ReplaceAll(text, token, "[token]")
	}
	text = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(text, "?"))
	if len(text) > limit {
		text = strings.ToValidUTF8(text[:limit], "") + "..."
	}
	return text
}
