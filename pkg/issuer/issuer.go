// SPDX-License-Identifier: Apache-2.0

// Package issuer makes the credentials that a pod gets: STS AssumeRole of the
// association's role, and from there of its target role if it has one, with
// the session name, tags and limits that EKS Pod Identity uses.
//
// Issuer calls AWS STS or a server that speaks its wire. StandIn calls nobody:
// for demonstrations, and only if asked for.
package issuer

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awsmiddleware "github.com/aws/aws-sdk-go-v2/aws/middleware"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	awsconfig "github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/sts"
	"github.com/aws/aws-sdk-go-v2/service/sts/types"
	"github.com/aws/smithy-go/middleware"
	"github.com/google/uuid"

	"github.com/latchkey-dev/latchkey/pkg/association"
	"github.com/latchkey-dev/latchkey/pkg/tokencheck"
)

// Session durations. STS caps a session at the role's MaxSessionDuration, an
// hour unless set, and at an hour where the caller is a role's session itself.
const (
	DefaultDuration = time.Hour
	MinDuration     = 900 * time.Second
	MaxDuration     = 43200 * time.Second
)

// Defaults of Config.
const (
	// DefaultAttemptTimeout bounds one HTTP exchange with STS.
	DefaultAttemptTimeout = 2 * time.Second
	// DefaultTimeout bounds Issue with all hops, attempts and pauses.
	DefaultTimeout = 6 * time.Second
	// DefaultMaxAttempts counts the first attempt of a hop.
	DefaultMaxAttempts = 3
	// DefaultMaxBackoff bounds a pause between attempts.
	DefaultMaxBackoff = 300 * time.Millisecond
)

// Request says for whom to issue credentials. The association is the one of the
// subject's service account in the cluster.
type Request struct {
	Cluster     association.Cluster
	Association association.Association
	Subject     tokencheck.Subject
}

// Credentials are what a pod gets, and what is noted of it.
type Credentials struct {
	AccessKeyID, SecretAccessKey, SessionToken string
	// Expires is in UTC.
	Expires time.Time
	// AssumedRoleARN and AssumedRoleID are the session's, of the target role if
	// there is one.
	AssumedRoleARN, AssumedRoleID string
	SessionName                   string
	// STSRequestIDs has one for each hop, for audit.
	STSRequestIDs []string
}

// LogValue keeps the secrets out of logs.
func (c Credentials) LogValue() slog.Value {
	return slog.GroupValue(slog.String("access_key_id", c.AccessKeyID), slog.Time("expires", c.Expires),
		slog.String("assumed_role_arn", c.AssumedRoleARN))
}

// String keeps the secrets out of texts.
func (c Credentials) String() string { return "credentials of " + c.AssumedRoleARN }

// GoString keeps the secrets out of %#v.
func (c Credentials) GoString() string { return c.String() }

// Call is what Config.Observe is told of each hop.
type Call struct {
	// Hop is 1 or 2.
	Hop    int
	Region string
	// Code is "ok", STS's error code, or "unavailable" without an answer.
	Code string
	// Duration is that of all attempts.
	Duration time.Duration
}

// Config is what an Issuer is made of. Zero values mean what the field says.
type Config struct {
	// Credentials are the server's own. Nil means those of the AWS default chain:
	// environment, shared files, web identity, container, instance.
	Credentials aws.CredentialsProvider
	// Endpoint is the URL of an STS-compatible server, called for every region.
	// Empty means AWS STS of the cluster's region.
	Endpoint string
	// Duration of sessions, MinDuration to MaxDuration. Zero means
	// DefaultDuration. Sessions of target roles have an hour at most.
	Duration time.Duration
	// Transport carries the calls; nil means one of NewTransport, which keeps
	// connections. A transport and not a client, because a client may follow a
	// redirect.
	Transport http.RoundTripper
	// AttemptTimeout, Timeout, MaxAttempts and MaxBackoff: zero means the default
	// of that name.
	AttemptTimeout, Timeout time.Duration
	MaxAttempts             int
	MaxBackoff              time.Duration
	// UserAgent is added to the SDK's; empty means "latchkey-server".
	UserAgent string
	// Observe, if set, is called after each hop. It must not block.
	Observe func(Call)
	// NewID makes the UUIDs of session names; nil means random ones.
	NewID func() uuid.UUID
	// Now is the clock; nil means time.Now.
	Now func() time.Time
	// Log gets what an operator has to know; nil discards it.
	Log *slog.Logger
}

// ErrConfig: the issuer cannot be made.
var ErrConfig = errors.New("invalid settings for STS")

// Issuer calls STS. It may be used by several goroutines.
type Issuer struct {
	cfg     Config
	own     *aws.CredentialsCache
	retryer aws.Retryer

	mu      sync.RWMutex
	clients map[string]*sts.Client // by region
}

// New makes an issuer. With Config.Credentials nil it reads the AWS
// configuration of the environment; it calls nobody.
func New(ctx context.Context, cfg Config) (*Issuer, error) {
	if cfg.Duration == 0 {
		cfg.Duration = DefaultDuration
	}
	if cfg.Duration < MinDuration || cfg.Duration > MaxDuration {
		return nil, fmt.Errorf("%w: a session of %s: must be %s to %s", ErrConfig, cfg.Duration, MinDuration, MaxDuration)
	}
	if cfg.Endpoint != "" {
		u, err := url.Parse(cfg.Endpoint)
		if err != nil {
			return nil, fmt.Errorf("%w: the endpoint is no URL", ErrConfig)
		}
		if u.Scheme != "https" && u.Scheme != "http" || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
			return nil, fmt.Errorf("%w: endpoint %q: need http:// or https:// and a host, and nothing but a path behind", ErrConfig, u.Redacted())
		}
	}
	var own aws.Config
	if cfg.Credentials == nil {
		var err error
		if own, err = awsconfig.LoadDefaultConfig(ctx); err != nil {
			return nil, fmt.Errorf("%w: reading the AWS configuration: %w", ErrConfig, err)
		}
		cfg.Credentials = own.Credentials
	}
	cache, cached := cfg.Credentials.(*aws.CredentialsCache)
	if !cached {
		cache = aws.NewCredentialsCache(cfg.Credentials)
	}
	if cfg.AttemptTimeout <= 0 {
		cfg.AttemptTimeout = DefaultAttemptTimeout
	}
	if cfg.Timeout <= 0 {
		cfg.Timeout = DefaultTimeout
	}
	if cfg.MaxAttempts <= 0 {
		cfg.MaxAttempts = DefaultMaxAttempts
	}
	if cfg.MaxBackoff <= 0 {
		cfg.MaxBackoff = DefaultMaxBackoff
	}
	if cfg.Transport == nil {
		cfg.Transport = NewTransport(own)
	}
	if cfg.UserAgent == "" {
		cfg.UserAgent = "latchkey-server"
	}
	if cfg.NewID == nil {
		cfg.NewID = uuid.New
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Issuer{
		cfg: cfg,
		own: cache,
		// One for all: its budget of retries is what keeps an ailing STS from being
		// asked three times as often.
		retryer: retry.NewStandard(func(o *retry.StandardOptions) {
			o.MaxAttempts = cfg.MaxAttempts
			o.MaxBackoff = cfg.MaxBackoff
		}),
		clients: map[string]*sts.Client{},
	}, nil
}

// NewTransport makes what carries calls of STS unless Config says otherwise. It
// believes the CA bundle that the AWS configuration names (AWS_CA_BUNDLE or
// ca_bundle), if it names one, as every SDK does.
func NewTransport(own aws.Config) http.RoundTripper {
	var trust *tls.Config
	if c, ok := own.HTTPClient.(*awshttp.BuildableClient); ok {
		if t := c.GetTransport().TLSClientConfig; t != nil && t.RootCAs != nil {
			trust = &tls.Config{RootCAs: t.RootCAs, MinVersion: tls.VersionTLS12}
		}
	}
	return &http.Transport{
		TLSClientConfig:        trust,
		Proxy:                  http.ProxyFromEnvironment,
		DialContext:            (&net.Dialer{Timeout: time.Second, KeepAlive: 15 * time.Second}).DialContext,
		TLSHandshakeTimeout:    time.Second,
		MaxIdleConns:           256,
		MaxIdleConnsPerHost:    64,
		IdleConnTimeout:        50 * time.Second,
		MaxResponseHeaderBytes: 32 << 10,
		ForceAttemptHTTP2:      false,
	}
}

// client is the client of a region, made once.
func (i *Issuer) client(region string) *sts.Client {
	i.mu.RLock()
	c := i.clients[region]
	i.mu.RUnlock()
	if c != nil {
		return c
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if c = i.clients[region]; c == nil {
		o := sts.Options{
			Region: region,
			HTTPClient: &http.Client{
				Transport:     i.cfg.Transport,
				Timeout:       i.cfg.AttemptTimeout, // body included
				CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
			},
			Retryer:    i.retryer,
			APIOptions: []func(*middleware.Stack) error{awsmiddleware.AddUserAgentKey(i.cfg.UserAgent)},
		}
		if i.cfg.Endpoint != "" {
			o.BaseEndpoint = aws.String(i.cfg.Endpoint)
		}
		c = sts.New(o)
		i.clients[region] = c
	}
	return c
}

// Issue makes credentials. Errors are of type *Error. It takes no longer than
// Config.Timeout, whatever ctx allows.
func (i *Issuer) Issue(ctx context.Context, req Request) (Credentials, error) {
	hops, err := plan(req, i.cfg.Duration, i.cfg.NewID())
	if err != nil {
		return Credentials{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, i.cfg.Timeout)
	defer cancel()
	// Fetched apart from the calls: what goes wrong with the server's own
	// credentials may look like an answer about the role, and is none.
	own, err := i.own.Retrieve(ctx)
	if err != nil {
		return Credentials{}, &Error{kind: ErrUnavailable, message: messageUnavailable,
			cause: fmt.Errorf("the server's own credentials: %w", err)}
	}
	var out Credentials
	var requestIDs []string
	for n, h := range hops {
		answer, ids, err := i.assume(ctx, n+1, region(req.Cluster), own, h)
		requestIDs = append(requestIDs, ids...)
		if err != nil {
			err.STSRequestIDs = requestIDs
			return Credentials{}, err
		}
		out = answer
		own = aws.Credentials{AccessKeyID: answer.AccessKeyID, SecretAccessKey: answer.SecretAccessKey, SessionToken: answer.SessionToken}
	}
	out.STSRequestIDs = requestIDs
	return out, nil
}

// assume makes one hop, if need be a second time with the duration that every
// role allows.
func (i *Issuer) assume(ctx context.Context, n int, region string, caller aws.Credentials, h hop) (Credentials, []string, *Error) {
	answer, id, err := i.call(ctx, n, region, caller, h)
	if err == nil || h.duration <= chainedLimit || !refusesDuration(err) {
		return answer, id, err
	}
	i.cfg.Log.Warn("STS does not allow sessions of this length for the role; issuing an hour instead",
		"role_arn", h.roleARN, "duration", h.duration, "error", err.cause)
	h.duration = chainedLimit
	answer, again, err := i.call(ctx, n, region, caller, h)
	return answer, append(id, again...), err
}

func (i *Issuer) call(ctx context.Context, n int, region string, caller aws.Credentials, h hop) (Credentials, []string, *Error) {
	in := &sts.AssumeRoleInput{
		RoleArn:         aws.String(h.roleARN),
		RoleSessionName: aws.String(h.sessionName),
		DurationSeconds: aws.Int32(int32(h.duration / time.Second)),
	}
	if h.externalID != "" {
		in.ExternalId = aws.String(h.externalID)
	}
	if h.policy != "" {
		in.Policy = aws.String(h.policy)
	}
	if len(h.tags) > 0 {
		in.TransitiveTagKeys = keysOf(h.tags)
		for _, t := range h.tags {
			in.Tags = append(in.Tags, types.Tag{Key: aws.String(t.key), Value: aws.String(t.value)})
		}
	}
	started := i.cfg.Now()
	out, err := i.client(region).AssumeRole(ctx, in, func(o *sts.Options) {
		o.Credentials = credentials.StaticCredentialsProvider{Value: caller}
	})
	var answer Credentials
	var ids []string
	var failed *Error
	if err == nil {
		if id, ok := awsmiddleware.GetRequestIDMetadata(out.ResultMetadata); ok {
			ids = append(ids, id)
		}
		answer, failed = read(out, h, started, i.cfg.Endpoint != "")
	} else {
		failed = classify(err, n)
		ids = requestIDsOf(err)
	}
	if i.cfg.Observe != nil {
		code := "ok"
		if failed != nil {
			if code = failed.Code; code == "" {
				code = "unavailable"
			}
		}
		i.cfg.Observe(Call{Hop: n, Region: region, Code: code, Duration: i.cfg.Now().Sub(started)})
	}
	if failed != nil {
		failed.Hop = n
		if n == 1 && refusesCaller(failed.Code) {
			i.own.Invalidate() // the next call fetches the server's own credentials anew
		}
	}
	return answer, ids, failed
}
