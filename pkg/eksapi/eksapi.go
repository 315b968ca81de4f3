// SPDX-License-Identifier: Apache-2.0

// Package eksapi is the EKS API for pod identity associations and the EKS Auth
// API on the wire (rest-json), so that the AWS CLI, every SDK and Terraform work
// with an endpoint URL.
//
// One call goes: route, headers, body, signature, rate limit, permission, then the
// store, or, for AssumeRoleForPodIdentity, token, node, association and STS.
// Whatever fails is answered with a documented error in JSON. What is uncertain
// is a 5xx, because clients drop good credentials on some 4xx.
package eksapi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"runtime/debug"
	"time"

	"github.com/google/uuid"

	"github.com/latchkey-dev/latchkey/pkg/association"
	"github.com/latchkey-dev/latchkey/pkg/issuer"
	"github.com/latchkey-dev/latchkey/pkg/permission"
	"github.com/latchkey-dev/latchkey/pkg/sigv4"
	"github.com/latchkey-dev/latchkey/pkg/strangers"
	"github.com/latchkey-dev/latchkey/pkg/tokencheck"
)

// Associations is the store of associations and clusters; *association.Store is
// one. Its methods and errors are described there.
type Associations interface {
	Create(context.Context, association.CreateInput) (association.Association, error)
	Describe(ctx context.Context, cluster, id string) (association.Association, error)
	List(context.Context, association.ListInput) (association.ListOutput, error)
	Update(context.Context, association.UpdateInput) (association.Association, error)
	Delete(context.Context, association.DeleteInput) (association.Association, error)
	Tag(ctx context.Context, arn string, tags map[string]string, check func(association.Resource) error) error
	Untag(ctx context.Context, arn string, keys []string, check func(association.Resource) error) error
	TagsOf(ctx context.Context, arn string) (association.Resource, error)
	Cluster(ctx context.Context, name string) (association.Cluster, error)
}

// Index is the copy in memory that credentials are issued from;
// *association.Index is one.
type Index interface {
	Ready() bool
	Behind() time.Duration
	Lookup(cluster, namespace, serviceAccount string) (association.Association, bool)
	Cluster(name string) (association.Cluster, bool)
	Whole(cluster string) bool
	Wait(ctx context.Context, revision int64) error
}

// Tokens judges service-account tokens; *tokencheck.Checker is one. Errors are
// tokencheck.ErrInvalid, ErrExpired or ErrUnavailable; if they have a method
// Message() string, that is the client's text.
type Tokens interface {
	Check(ctx context.Context, cluster association.Cluster, token string) (tokencheck.Subject, error)
}

// Issuer makes credentials; *issuer.Issuer and *issuer.StandIn are. Errors are
// issuer.ErrAccessDenied, ErrInvalidRequest, ErrThrottled or ErrUnavailable,
// with a Message as for Tokens.
type Issuer interface {
	Issue(context.Context, issuer.Request) (issuer.Credentials, error)
}

// NodeBinding says whether a pod's token is taken from its own node's agent
// alone.
type NodeBinding string

// The modes.
const (
	// BindRequire: the caller must be the node that the token names. So is an empty
	// value.
	BindRequire NodeBinding = "require"
	// BindPrefer: a caller that is a node must be the one that the token names, if
	// it names one; callers that are no node may redeem every token.
	BindPrefer NodeBinding = "prefer"
	// BindOff: any caller with the permission may redeem every token of the
	// cluster.
	BindOff NodeBinding = "off"
)

// Defaults of Config.
const (
	// DefaultMaxBehind is how old the index may be.
	DefaultMaxBehind = 30 * time.Second
	// MaxBody bounds the body of a request: 50 tags of the longest kind, with
	// every character escaped, and a policy.
	MaxBody = 256 << 10
	// MaxExchangeBody bounds that of AssumeRoleForPodIdentity: a token.
	MaxExchangeBody = 32 << 10
)

// Observation is what Config.Observe is told of each call.
type Observation struct {
	// Operation is the operation's name, or "unknown".
	Operation string
	Status    int
	// Code is the error's name, empty for success.
	Code     string
	Duration time.Duration
	// Stranger: the caller has not proved who it is. Unrecorded: its record was
	// left out; TypeUnrecorded.
	Stranger, Unrecorded bool
}

// Config of the API. Zero values mean what the field says.
type Config struct {
	// Associations, Index, Tokens, Issuer and Keys are required. The Principal of
	// Keys must be a permission.Principal.
	Associations Associations
	Index        Index
	Tokens       Tokens
	Issuer       Issuer
	Keys         sigv4.Keys
	// Region is accepted in signatures besides the cluster's own; empty: the
	// cluster's alone.
	Region string
	// Skew is how far a request's date may be from the clock; 0: sigv4.DefaultSkew.
	Skew time.Duration
	// NodeBinding: empty means BindRequire.
	NodeBinding NodeBinding
	// MaxBehind is how old the index may be before nothing is issued from it;
	// 0: DefaultMaxBehind.
	MaxBehind time.Duration
	// Limits are per caller.
	Limits Limits
	// Strangers bounds what callers can cost who have proved nothing; nil: one with
	// the defaults.
	Strangers *strangers.Limits
	// Audit is called exactly once for each change and each exchange, whatever
	// becomes of it, before it is answered; but of callers that have not proved who
	// they are only as often as Strangers allows, and then with a summary of the
	// others. It must not block for long. Nil: nobody is told.
	Audit func(Record)
	// Observe is called after each call. It must not block. Nil: nobody is told.
	Observe func(Observation)
	// Now is the clock; nil: time.Now.
	Now func() time.Time
	// Log is told why a 5xx was answered; nil: nothing is.
	Log *slog.Logger
}

// api is the handler.
type api struct {
	Config
	verifier *sigv4.Verifier
	limits   *limiters
	bodies   *bodies
}

// New makes the handler. It answers every request, those that it does not know
// with 404 in JSON.
func New(cfg Config) (http.Handler, error) {
	for name, missing := range map[string]bool{
		"Associations": cfg.Associations == nil, "Index": cfg.Index == nil, "Tokens": cfg.Tokens == nil,
		"Issuer": cfg.Issuer == nil, "Keys": cfg.Keys == nil,
	} {
		if missing {
			return nil, fmt.Errorf("eksapi: no %s", name)
		}
	}
	switch cfg.NodeBinding {
	case "":
		cfg.NodeBinding = BindRequire
	case BindRequire, BindPrefer, BindOff:
	default:
		return nil, fmt.Errorf("eksapi: unknown node binding %q: require, prefer or off", cfg.NodeBinding)
	}
	if cfg.MaxBehind == 0 {
		cfg.MaxBehind = DefaultMaxBehind
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Strangers == nil {
		cfg.Strangers = strangers.New(strangers.Config{Now: cfg.Now})
	}
	verifier, err := sigv4.New(sigv4.Config{Keys: cfg.Keys, Skew: cfg.Skew, Now: cfg.Now})
	if err != nil {
		return nil, err
	}
	return &api{Config: cfg, verifier: verifier, limits: newLimiters(cfg.Limits, cfg.Now), bodies: newBodies()}, nil
}

// call is one request on its way.
type call struct {
	*api
	r     *http.Request
	w     http.ResponseWriter
	route route
	start time.Time
	id    string
	body  []byte

	verified bool
	caller   permission.Principal
	region   string
	record   Record
	recorded bool
	// unrecorded: there is no record, as there have been many.
	unrecorded bool
}

// ServeHTTP answers one call.
func (a *api) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c := &call{api: a, r: r, w: w, start: a.Now(), id: uuid.NewString()}
	a.summarise()
	answer, err := c.serve()
	c.finish(answer, err)
}

// serve runs the operation; a panic is an internal error like another.
func (c *call) serve() (answer any, err error) {
	defer func() {
		if p := recover(); p != nil {
			c.Log.Error("panic while serving", "request_id", c.id, "operation", c.route.op.name, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			answer, err = nil, errors.New("panic")
		}
	}()
	var f *fault
	if c.route, f = parseRoute(c.r); f != nil {
		return nil, f
	}
	if err := c.authenticate(); err != nil {
		return nil, err
	}
	if err := c.limit(); err != nil {
		return nil, err
	}
	return c.route.op.serve(c)
}

// authenticate reads the body and finds out who calls.
func (c *call) authenticate() error {
	exhausted := c.Strangers.Exhausted(c.r.RemoteAddr)
	result, err := c.verify(exhausted)
	var refused *sigv4.Error
	var f *fault
	switch {
	case errors.As(err, &refused), errors.As(err, &f):
		if f == nil || f.status < 500 {
			c.Strangers.Failed(c.r.RemoteAddr)
		}
		return err
	case err != nil:
		// Not the request's fault: the keys could not be looked up.
		return &fault{status: http.StatusServiceUnavailable, code: unavailable, message: "The access key cannot be checked now, try again.", cause: err}
	}
	principal, ok := result.Principal.(permission.Principal)
	if !ok {
		return fmt.Errorf("access key %s belongs to a %T, not to a permission.Principal", result.AccessKeyID, result.Principal)
	}
	c.verified, c.caller, c.region = true, principal, result.Region
	c.record.AccessKeyID = result.AccessKeyID
	return nil
}

// verify checks the signature. Where callers have failed often, one that names
// no key that there is, or whose headers are wrong, gets no further than those.
// Others are never refused for what somebody at their address did, nor told
// anything but the truth: who has a key that has ended needs to know. (Clients
// whose clock is wrong see so by the Date of every answer.)
func (c *call) verify(exhausted bool) (sigv4.Result, error) {
	request, err := c.verifier.Begin(c.r, c.route.op.service)
	if err != nil {
		if exhausted {
			return sigv4.Result{}, c.throttled()
		}
		return sigv4.Result{}, err
	}
	if exhausted {
		if known, err := request.Known(); err != nil {
			return sigv4.Result{}, err
		} else if !known {
			return sigv4.Result{}, c.throttled()
		}
	}
	release, err := c.readBody()
	defer release()
	if err != nil {
		return sigv4.Result{}, err
	}
	return request.Verify(c.body)
}

// checkRegion compares the region of the signature. It runs when the caller may
// know of the cluster.
func (c *call) checkRegion(cluster association.Cluster) error {
	if c.region == cluster.Region || c.Region != "" && c.region == c.Region {
		return nil
	}
	want := cluster.Region
	if c.Region != "" && c.Region != want {
		want += "' or '" + c.Region
	}
	return &fault{status: http.StatusForbidden, code: "InvalidSignatureException",
		message: fmt.Sprintf("Credential should be scoped to a valid region: '%s', not '%s'.", want, c.region)}
}

// deny is the answer to a call that is not allowed.
func (c *call) deny(d permission.Decision) error {
	c.record.Reason = d.Reason
	return &fault{
		status: c.route.op.deniedStatus, code: "AccessDeniedException",
		message: fmt.Sprintf("User: %s is not authorized to perform: %s on resource: %s", c.caller.Name, d.Action, d.Resource),
	}
}

// allow is nil if the caller is allowed.
func (c *call) allow(r permission.Request) error {
	if d := c.caller.Allow(r); !d.Allowed {
		return c.deny(d)
	}
	return nil
}

// allowSomewhere is nil if the caller has anything to do with this cluster. The
// refusal names no account: that would tell which clusters there are.
func (c *call) allowSomewhere(resource string) error {
	r := permission.Request{Action: c.route.op.action, Cluster: c.route.cluster,
		Resource: "arn:aws:eks:" + c.region + ":*:" + resource}
	if d := c.caller.AllowSomewhere(r); !d.Allowed {
		return c.deny(d)
	}
	return nil
}
