// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/credcache"
	"github.com/latchkey-dev/latchkey/pkg/credserver"
	"github.com/latchkey-dev/latchkey/pkg/eksauth"
	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

// The three packages of the credentials' way know nothing of each other. What
// one calls an answer, an error or a request, the next has its own type for;
// this file is the translation, and decides nothing but the tables in it.

// upstream makes pkg/eksauth the cache's upstream.
type upstream struct{ client *eksauth.Client }

// Fetch implements credcache.Upstream.
func (u upstream) Fetch(ctx context.Context, token string) (credcache.Answer, error) {
	r, err := u.client.AssumeRoleForPodIdentity(ctx, token)
	if err != nil {
		ue := &credcache.UpstreamError{Reason: reasonOf(eksauth.ClassOf(err)), Err: err}
		var api *eksauth.APIError
		if errors.As(err, &api) {
			ue.RetryAfter = api.RetryAfter
		}
		return credcache.Answer{}, ue
	}
	return credcache.Answer{
		Namespace: r.Subject.Namespace, ServiceAccount: r.Subject.ServiceAccount, Audience: r.Audience,
		AssociationARN: r.AssociationARN, AssociationID: r.AssociationID, AssumedRoleARN: r.AssumedRoleARN,
		AccessKeyID:     r.Credentials.AccessKeyID,
		SecretAccessKey: r.Credentials.SecretAccessKey.Reveal(),
		SessionToken:    r.Credentials.SessionToken.Reveal(),
		Expiration:      r.Credentials.Expiration,
	}, nil
}

// reasonOf decides what a failed call means for credentials that are cached:
// see credcache.UpstreamError.Reason. Access denied may be the node's own role
// and therefore drops nothing.
func reasonOf(c eksauth.Class) evidence.Reason {
	switch c {
	case eksauth.ClassNone:
		return evidence.ReasonServed
	case eksauth.ClassNotFound:
		return evidence.ReasonUpstreamNotFound
	case eksauth.ClassInvalidToken:
		return evidence.ReasonUpstreamToken
	case eksauth.ClassExpiredToken:
		return evidence.ReasonTokenExpired
	case eksauth.ClassAccessDenied:
		return evidence.ReasonUpstreamDenied
	case eksauth.ClassThrottled:
		return evidence.ReasonUpstreamThrottled
	case eksauth.ClassInvalidResponse, eksauth.ClassRejected:
		return evidence.ReasonUpstreamInvalid
	case eksauth.ClassUnavailable, eksauth.ClassNodeCredentials:
	}
	return evidence.ReasonUpstreamUnavailable
}

// credentials makes the cache credserver.Credentials.
type credentials struct{ cache *credcache.Cache }

// Get implements credserver.Credentials. On a hit it allocates nothing.
func (c credentials) Get(ctx context.Context, req credserver.CredentialRequest) (credserver.Credential, error) {
	entry, outcome, err := c.cache.Get(ctx, credcache.Request{
		Token: req.Token, Raw: req.Raw, PodUID: req.Pod, Bypass: req.Uncached,
	})
	if err != nil {
		return credserver.Credential{}, clientError(err)
	}
	return credserver.Credential{
		Body: entry.Body(), Expiry: entry.Expiry(), Hit: outcome == credcache.OutcomeHit,
		Role: entry.AssumedRoleARN(), Association: entry.AssociationID(),
	}, nil
}

// clientError says to the pod what the cache says. What is uncertain, or the
// node's own trouble, is 5xx or 429 and never a status that makes a client
// give up.
func clientError(err error) error {
	out := &credserver.UpstreamError{Reason: credcache.ReasonOf(err), Err: err}
	var api *eksauth.APIError
	switch {
	case errors.As(err, &api):
		out.Status, out.Code, out.Message, out.RequestID = api.Status, api.Code, api.Message, api.RequestID
		if api.Class == eksauth.ClassInvalidResponse || api.Class == eksauth.ClassUnavailable && api.Status < http.StatusInternalServerError {
			// Somebody in between answered, not the service.
			out.Status = http.StatusBadGateway
		}
	case errors.Is(err, credcache.ErrLimited):
		out.Reason, out.Status, out.Code = evidence.ReasonRateLimited, http.StatusTooManyRequests, "ThrottlingException"
		out.Message = "this pod has too many requests under way"
	case errors.Is(err, credcache.ErrOverloaded):
		out.Reason, out.Status, out.Code = evidence.ReasonUpstreamThrottled, http.StatusServiceUnavailable, "ServiceUnavailableException"
		out.Message = "this node's budget of EKS Auth calls is used up; come again"
	case errors.Is(err, credcache.ErrClosed):
		out.Reason, out.Status, out.Code = evidence.ReasonStopping, http.StatusServiceUnavailable, "ServiceUnavailableException"
		out.Message = "the agent is stopping; come again"
	case errors.Is(err, credcache.ErrAbandoned):
		out.Status, out.Code = http.StatusGatewayTimeout, "ServiceUnavailableException"
		out.Message = "EKS Auth takes long; the call goes on, come again"
	case errors.Is(err, credcache.ErrSubjectMismatch), errors.Is(err, credcache.ErrAudienceMismatch),
		errors.Is(err, credcache.ErrIncomplete), errors.Is(err, credcache.ErrExpired), errors.Is(err, eksauth.ErrInvalidResponse):
		out.Status, out.Code = http.StatusBadGateway, "InvalidResponse"
		out.Message = "EKS Auth gave an answer that cannot be used"
	case errors.Is(err, eksauth.ErrNodeCredentials):
		out.Status, out.Code = http.StatusServiceUnavailable, "NodeCredentials"
		out.Message = "the node's agent has no AWS credentials of its own to call EKS Auth with"
	}
	return out
}

// cachedPod is what the cache holds for a pod, for the admin socket.
type cachedPod struct {
	namespace, serviceAccount, role, association, state string
	expires                                             *time.Time
	lastUsed                                            time.Time
}

// cached describes each pod's credentials. A pod with several tokens that were
// not verified shows the one used last.
func (a *Agent) cached() map[evidence.PodUID]cachedPod {
	out := map[evidence.PodUID]cachedPod{}
	for _, s := range a.cache.Snapshot() {
		if old, ok := out[s.Subject.PodUID]; ok && old.lastUsed.After(s.LastUsed) {
			continue
		}
		c := cachedPod{
			namespace: s.Subject.Namespace, serviceAccount: s.Subject.ServiceAccount,
			role: s.AssumedRoleARN, association: s.AssociationID, lastUsed: s.LastUsed, state: stateOf(s.State),
		}
		if !s.Expires.IsZero() {
			c.expires = &s.Expires
		} else {
			// Never served, so never used.
			c.lastUsed = time.Time{}
		}
		out[s.Subject.PodUID] = c
	}
	return out
}

// stateOf says in a word whether the pod has credentials; the cache's own states
// tell what happens to them next.
func stateOf(s credcache.State) string {
	switch s {
	case credcache.StateFetching:
		return "fetching"
	case credcache.StateFailing:
		return "failing"
	case credcache.StateDenied:
		return "denied"
	case credcache.StateFresh, credcache.StateRefreshing, credcache.StateQueued, credcache.StateIdle, credcache.StateAwaitingToken:
	}
	return "valid"
}
