// SPDX-License-Identifier: Apache-2.0

package credcache_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"

	"github.com/latchkey-dev/latchkey/pkg/credcache"
	"github.com/latchkey-dev/latchkey/pkg/eksauth"
	"github.com/latchkey-dev/latchkey/pkg/evidence"
	standin "github.com/latchkey-dev/latchkey/test/standin/eksauth"
	"github.com/latchkey-dev/latchkey/test/standin/tokens"
)

// upstream joins client and cache, as the agent does.
type upstream struct{ client *eksauth.Client }

func (u upstream) Fetch(ctx context.Context, token string) (credcache.Answer, error) {
	r, err := u.client.AssumeRoleForPodIdentity(ctx, token)
	if err != nil {
		out := &credcache.UpstreamError{Reason: reasonOf(eksauth.ClassOf(err)), Err: err}
		var api *eksauth.APIError
		if errors.As(err, &api) {
			out.RetryAfter = api.RetryAfter
		}
		return credcache.Answer{}, out
	}
	return credcache.Answer{
		Namespace: r.Subject.Namespace, ServiceAccount: r.Subject.ServiceAccount, Audience: r.Audience,
		AssociationARN: r.AssociationARN, AssociationID: r.AssociationID, AssumedRoleARN: r.AssumedRoleARN,
		AccessKeyID: r.Credentials.AccessKeyID, SecretAccessKey: r.Credentials.SecretAccessKey.Reveal(),
		SessionToken: r.Credentials.SessionToken.Reveal(), Expiration: r.Credentials.Expiration,
	}, nil
}

func reasonOf(c eksauth.Class) evidence.Reason {
	switch c {
	case eksauth.ClassNotFound:
		return evidence.ReasonUpstreamNotFound
	case eksauth.ClassInvalidToken:
		return evidence.ReasonUpstreamToken
	case eksauth.ClassExpiredToken:
		return evidence.ReasonTokenExpired
	case eksauth.ClassAccessDenied, eksauth.ClassRejected:
		return evidence.ReasonUpstreamDenied
	case eksauth.ClassThrottled:
		return evidence.ReasonUpstreamThrottled
	case eksauth.ClassInvalidResponse:
		return evidence.ReasonUpstreamInvalid
	}
	return evidence.ReasonUpstreamUnavailable
}

type bed struct {
	*standin.Running
	*credcache.Cache
	signer *tokens.Signer
}

func newBed(t *testing.T) *bed {
	t.Helper()
	signer, err := tokens.NewSigner(tokens.Config{Algorithm: "ES256"})
	if err != nil {
		t.Fatal(err)
	}
	up, err := standin.Start(standin.Config{Cluster: "prod", JWKS: signer.JWKS()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(up.Close)
	up.Associate(standin.Association{Namespace: "web", ServiceAccount: "api", RoleARN: "arn:aws:iam::111122223333:role/api"})
	var cache *credcache.Cache
	client, err := eksauth.New(eksauth.Config{
		ClusterName: "prod", Region: "us-west-2", Endpoint: up.URL, Backoff: time.Millisecond,
		Permit: func(ctx context.Context) error { return cache.Permit(ctx) },
		Credentials: aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
			return aws.Credentials{AccessKeyID: "AKIDNODE", SecretAccessKey: "secret"}, nil
		}),
	})
	if err != nil {
		t.Fatal(err)
	}
	if cache, err = credcache.New(credcache.Config{Upstream: upstream{client}}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(cache.Close)
	return &bed{up, cache, signer}
}

func (b *bed) request(serviceAccount, pod string) credcache.Request {
	c := tokens.Claims{Namespace: "web", ServiceAccount: serviceAccount, Pod: pod, PodUID: tokens.UID(pod), Expiry: time.Now().Add(time.Hour)}
	raw := b.signer.Token(c)
	uid := evidence.PodUID(c.PodUID)
	return credcache.Request{Raw: raw, PodUID: uid, Token: evidence.Token{Verified: true, Expiry: c.Expiry,
		Subject: evidence.Subject{PodUID: uid, Namespace: "web", ServiceAccount: serviceAccount}}}
}

func TestThroughTheRealWire(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	held := make(chan struct{})
	b.Inject(standin.Fault{Hold: held, Times: 1})
	req := b.request("api", "api-1")
	var wg sync.WaitGroup
	var mu sync.Mutex
	bodies := map[string]int{}
	for range 64 {
		wg.Go(func() {
			e, _, err := b.Get(t.Context(), req)
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			bodies[string(e.Body())]++
		})
	}
	for s := b.Stats(); s.Misses+s.Joined < 64; s = b.Stats() {
		if t.Context().Err() != nil {
			t.Fatal("the waiters did not come")
		}
	}
	close(held)
	wg.Wait()
	if len(bodies) != 1 || b.CallCount() != 1 {
		t.Fatalf("%d different answers, %d calls", len(bodies), b.CallCount())
	}
	for body := range bodies {
		var out map[string]string
		if err := json.Unmarshal([]byte(body), &out); err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(out["AccessKeyId"], standin.AccessKeyPrefix) || !strings.HasPrefix(out["SecretAccessKey"], standin.SecretPrefix) ||
			!strings.HasPrefix(out["Token"], standin.SessionTokenPrefix) || out["AccountId"] != "111122223333" || !strings.HasSuffix(out["Expiration"], "Z") {
			t.Errorf("body's members %d", len(out))
		}
	}
	if s := b.Snapshot(); len(s) != 1 || !strings.HasPrefix(s[0].AssumedRoleARN, "arn:aws:sts::111122223333:assumed-role/api/eks-prod-api-1-") {
		t.Errorf("%+v", s)
	}
}

func TestFaultsOfTheRealWire(t *testing.T) {
	t.Parallel()
	refuse := func(kind string) standin.Fault { return standin.Fault{Kind: standin.Refuse, ErrorType: kind} }
	for i, tt := range []struct {
		fault standin.Fault
		want  evidence.Reason
	}{
		{refuse("ResourceNotFoundException"), evidence.ReasonUpstreamNotFound},
		{refuse("InvalidTokenException"), evidence.ReasonUpstreamToken},
		{refuse("ExpiredTokenException"), evidence.ReasonTokenExpired},
		{refuse("AccessDeniedException"), evidence.ReasonUpstreamDenied},
		{refuse("InvalidRequestException"), evidence.ReasonUpstreamDenied},
		{refuse("ThrottlingException"), evidence.ReasonUpstreamThrottled},
		{refuse("InternalServerException"), evidence.ReasonUpstreamUnavailable},
		{standin.Fault{Kind: standin.Reset}, evidence.ReasonUpstreamUnavailable},
		{standin.Fault{Kind: standin.Truncated}, evidence.ReasonUpstreamUnavailable},
		{standin.Fault{Kind: standin.Body, Body: []byte("[]")}, evidence.ReasonUpstreamInvalid},
		{standin.Fault{Kind: standin.Omit, Members: []string{"podIdentityAssociation"}}, evidence.ReasonUpstreamInvalid},
		{standin.Fault{Kind: standin.Expired}, evidence.ReasonUpstreamInvalid},
		{standin.Fault{Kind: standin.OtherSubject}, evidence.ReasonUpstreamInvalid},
		{standin.Fault{Kind: standin.OtherAudience}, evidence.ReasonUpstreamInvalid},
	} {
		t.Run(fmt.Sprintf("%s %s", tt.fault.Kind, tt.fault.ErrorType), func(t *testing.T) {
			t.Parallel()
			b := newBed(t)
			b.Inject(tt.fault)
			req := b.request("api", fmt.Sprintf("api-%d", i))
			if e, _, err := b.Get(t.Context(), req); e != nil || credcache.ReasonOf(err) != tt.want {
				t.Errorf("%v (%s), want %s", err, credcache.ReasonOf(err), tt.want)
			} else if strings.Contains(err.Error(), req.Raw) || strings.Contains(err.Error(), standin.SecretPrefix) {
				t.Error("the error tells a secret")
			}
			b.ClearFaults()
			req.Bypass = true // past the refusal that is remembered
			if tt.want == evidence.ReasonUpstreamUnavailable || tt.want == evidence.ReasonUpstreamInvalid {
				req.Bypass = false
			}
			if _, _, err := b.Get(t.Context(), req); err != nil {
				t.Errorf("after the fault: %v", err)
			}
		})
	}
}

func TestNoAssociation(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	_, _, err := b.Get(t.Context(), b.request("nobody", "n-1"))
	var api *eksauth.APIError
	if !errors.As(err, &api) || api.Status != 404 || !errors.Is(err, eksauth.ErrNotFound) {
		t.Errorf("the upstream's own error is to come through: %v", err)
	}
}
