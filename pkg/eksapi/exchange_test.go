// SPDX-License-Identifier: Apache-2.0

package eksapi_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/eks"

	"github.com/latchkey-dev/latchkey/pkg/association"
	"github.com/latchkey-dev/latchkey/pkg/eksapi"
	"github.com/latchkey-dev/latchkey/pkg/eksauth"
	"github.com/latchkey-dev/latchkey/pkg/issuer"
	"github.com/latchkey-dev/latchkey/pkg/tokencheck"
	"github.com/latchkey-dev/latchkey/test/standin/tokens"
)

const exchangePath = "/clusters/prod/assume-role-for-pod-identity"

func (w *world) exchange(user, token string) answer {
	w.t.Helper()
	body, err := json.Marshal(map[string]string{"token": token, "eksNodeName": "whatever", "instanceId": "i-1", "zone": "a"})
	if err != nil {
		w.t.Fatal(err)
	}
	return w.send(raw{user: user, path: exchangePath, body: string(body)})
}

// The agent's own client takes the answers.
func TestExchangeWithTheAgentsClient(t *testing.T) {
	w := newWorld(t, nil)
	id := w.create("web", "api", role("api"))
	c, err := eksauth.New(eksauth.Config{
		ClusterName: "prod", Region: region, Endpoint: w.url, MaxAttempts: 1,
		Credentials: aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
			return aws.Credentials{AccessKeyID: "NODE1", SecretAccessKey: secretOf("NODE1")}, nil
		}),
	})
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.AssumeRoleForPodIdentity(t.Context(), signer(t, "prod").Token(tokens.Claims{Namespace: "web", ServiceAccount: "api"}))
	if err != nil {
		t.Fatal(err)
	}
	if s := fmt.Sprintf("%+v", out); !strings.Contains(s, id) {
		t.Errorf("got %s", s)
	}
	_, err = c.AssumeRoleForPodIdentity(t.Context(), signer(t, "prod").Token(tokens.Claims{Namespace: "web", ServiceAccount: "none"}))
	if !errors.Is(err, eksauth.ErrNotFound) {
		t.Errorf("no association: %v", err)
	}
	_, err = c.AssumeRoleForPodIdentity(t.Context(), signer(t, "dev").Token(tokens.Claims{Namespace: "web", ServiceAccount: "api"}))
	if !errors.Is(err, eksauth.ErrInvalidToken) {
		t.Errorf("foreign key: %v", err)
	}
}

func TestExchangeWire(t *testing.T) {
	w := newWorld(t, nil)
	id := w.create("web", "api", role("path/api"))
	a := w.exchange("NODE1", signer(t, "prod").Token(tokens.Claims{Namespace: "web", ServiceAccount: "api", Pod: "api-0"}))
	form := regexp.MustCompile(`^\{"subject":\{"namespace":"web","serviceAccount":"api"\},"audience":"pods.eks.amazonaws.com",` +
		`"podIdentityAssociation":\{"associationArn":"arn:aws:eks:eu-central-1:111122223333:podidentityassociation/prod/` + id + `","associationId":"` + id + `"\},` +
		`"assumedRoleUser":\{"arn":"arn:aws:sts::111122223333:assumed-role/api/eks-prod-api-0-[0-9a-f-]{36}","assumeRoleId":"ARO[A-Z0-9]+:eks-prod-api-0-[0-9a-f-]{36}"\},` +
		`"credentials":\{"accessKeyId":"ASIA[A-Z0-9]{16}","secretAccessKey":"[^"]+","sessionToken":"[^"]+","expiration":[0-9]{10}\}\}$`)
	if a.status != 200 || !form.MatchString(a.body) {
		t.Errorf("%d %s", a.status, a.body)
	}
	if a.header.Get("Cache-Control") != "no-store" {
		t.Errorf("headers %v", a.header)
	}
	// A change is in force as soon as it is answered.
	if _, err := w.as("ADMIN").DeletePodIdentityAssociation(t.Context(), &eks.DeletePodIdentityAssociationInput{ClusterName: ptr("prod"), AssociationId: &id}); err != nil {
		t.Fatal(err)
	}
	if a := w.exchange("NODE1", signer(t, "prod").Token(tokens.Claims{Namespace: "web", ServiceAccount: "api"})); a.status != 404 {
		t.Errorf("deleted: %d %s", a.status, a.body)
	}
}

func TestExchangeRefuses(t *testing.T) {
	w := newWorld(t, nil)
	w.create("web", "api", role("api"))
	w.create("db", "api", role("api"))
	prod := signer(t, "prod")
	claims := tokens.Claims{Namespace: "web", ServiceAccount: "api"}
	with := func(change func(*tokens.Claims)) string { c := claims; change(&c); return prod.Token(c) }
	good := prod.Token(claims)
	hour := time.Now().Add(-time.Hour)
	denied := "User: %s is not authorized to perform: eks-auth:AssumeRoleForPodIdentity on resource: arn:aws:eks:" + region + ":%s:cluster/prod"
	for name, c := range map[string]struct {
		user, token string
		status      int
		code        string
		message     string
	}{
		"no association":         {"NODE1", with(func(c *tokens.Claims) { c.ServiceAccount = "other" }), 404, "ResourceNotFoundException", ""},
		"expired":                {"NODE1", with(func(c *tokens.Claims) { c.IssuedAt, c.Expiry = hour.Add(-time.Hour), hour }), 400, "ExpiredTokenException", ""},
		"not yet":                {"NODE1", with(func(c *tokens.Claims) { c.IssuedAt = time.Now().Add(time.Hour) }), 400, "InvalidTokenException", ""},
		"foreign audience":       {"NODE1", with(func(c *tokens.Claims) { c.Audience = "sts.amazonaws.com" }), 400, "InvalidTokenException", ""},
		"audience of the agents": {"NODE1", with(func(c *tokens.Claims) { c.Audience = "latchkey-server" }), 400, "InvalidTokenException", ""},
		"foreign issuer":         {"NODE1", with(func(c *tokens.Claims) { c.Issuer = "https://issuer.example" }), 400, "InvalidTokenException", ""},
		"other cluster's key":    {"NODE1", signer(t, "dev").Token(claims), 400, "InvalidTokenException", ""},
		"bound to no pod":        {"NODE1", with(func(c *tokens.Claims) { c.NoPod = true }), 400, "InvalidTokenException", ""},
		"no token":               {"NODE1", "x", 400, "InvalidTokenException", ""},
		"bearer":                 {"NODE1", "Bearer " + good, 400, "InvalidTokenException", ""},
		"newline":                {"NODE1", good + "\n", 400, "InvalidTokenException", ""},
		"algorithm none":         {"NODE1", tokens.Assemble([]byte(`{"alg":"none"}`), prod.Payload(claims), nil), 400, "InvalidTokenException", ""},
		"signature of another":   {"NODE1", good[:strings.LastIndexByte(good, '.')] + signer(t, "dev").Token(claims)[strings.LastIndexByte(signer(t, "dev").Token(claims), '.'):], 400, "InvalidTokenException", ""},
		"node of other cluster":  {"NODEDEV", good, 400, "AccessDeniedException", fmt.Sprintf(denied, "node-of-dev", "*")},
		"other node":             {"NODE2", good, 400, "AccessDeniedException", "The pod of the token runs on another node than the caller."},
		"no node":                {"BROKER", good, 400, "AccessDeniedException", ""},
		"admin is no node":       {"ADMIN", good, 400, "AccessDeniedException", ""},
		"token without a node":   {"NODE1", with(func(c *tokens.Claims) { c.NoNode = true }), 400, "AccessDeniedException", ""},
		"no permission":          {"WEBS", good, 400, "AccessDeniedException", fmt.Sprintf(denied, "web", "*")},
		"other namespace":        {"BROKER", with(func(c *tokens.Claims) { c.Namespace = "db" }), 400, "AccessDeniedException", fmt.Sprintf(denied, "broker", account)},
	} {
		t.Run(name, func(t *testing.T) {
			w.audited()
			a := w.exchange(c.user, c.token)
			if a.status != c.status || a.code() != c.code || c.message != "" && a.message(t) != c.message {
				t.Fatalf("got %d %s %s, want %d %s %s", a.status, a.code(), a.body, c.status, c.code, c.message)
			}
			records := w.audited()
			if len(records) != 1 || records[0].Outcome != eksapi.OutcomeRefused || records[0].Code != c.code || records[0].Type != eksapi.TypeExchange || records[0].IssuedAccessKeyID != "" {
				t.Errorf("recorded %+v", records)
			}
			b, _ := json.Marshal(records)
			if len(c.token) > 20 && (strings.Contains(string(b), c.token) || strings.Contains(string(b), c.token[len(c.token)-20:]) || strings.Contains(a.body, c.token)) {
				t.Errorf("the token is in %s", b)
			}
		})
	}
	if a := w.send(raw{user: "ADMIN", path: "/clusters/none/assume-role-for-pod-identity", body: `{"token":"` + good + `"}`}); a.status != 404 || a.message(t) != "No cluster found for name: none." {
		t.Errorf("unknown cluster: %d %s", a.status, a.body)
	}
	if a := w.send(raw{user: "NODE1", path: exchangePath, region: "us-east-1", body: `{"token":"` + good + `"}`}); a.status != 403 || a.code() != "InvalidSignatureException" {
		t.Errorf("other region: %d %s", a.status, a.body)
	}
}

func TestNodeBinding(t *testing.T) {
	node := func(name string) tokens.Claims {
		return tokens.Claims{Namespace: "web", ServiceAccount: "api", Node: name, NoNode: name == ""}
	}
	for _, mode := range []eksapi.NodeBinding{"", eksapi.BindRequire, eksapi.BindPrefer, eksapi.BindOff} {
		w := newWorld(t, func(c *eksapi.Config) { c.NodeBinding = mode })
		w.create("web", "api", role("api"))
		prefer, off := mode == eksapi.BindPrefer, mode == eksapi.BindOff
		for name, c := range map[string]struct {
			user, node string
			want       bool
		}{
			"its node":         {"NODE1", "node-1", true},
			"other node":       {"NODE2", "node-1", off},
			"unnamed":          {"NODE1", "", prefer || off},
			"user":             {"BROKER", "node-1", prefer || off},
			"user, unnamed":    {"BROKER", "", prefer || off},
			"of other cluster": {"NODEDEV", "node-1", false},
		} {
			if a := w.exchange(c.user, signer(t, "prod").Token(node(c.node))); (a.status == 200) != c.want {
				t.Errorf("%q: %s: %d %s", mode, name, a.status, a.body)
			}
		}
	}
	if _, err := eksapi.New(eksapi.Config{}); err == nil {
		t.Error("an API with nothing behind it")
	}
}

// Each exchange is recorded once, with what it was, and without what is secret.
func TestExchangesAreAudited(t *testing.T) {
	w := newWorld(t, nil)
	id := w.create("web", "api", role("api"), func(in *eks.CreatePodIdentityAssociationInput) { in.TargetRoleArn = ptr(target("t")) })
	w.audited()
	token := signer(t, "prod").Token(tokens.Claims{Namespace: "web", ServiceAccount: "api", Pod: "api-0", ID: "the-jti"})
	a := w.exchange("NODE1", token)
	records := w.audited()
	if a.status != 200 || len(records) != 1 {
		t.Fatalf("%d, %+v", a.status, records)
	}
	r := records[0]
	if r.Type != eksapi.TypeExchange || r.Outcome != eksapi.OutcomeDone || r.Status != 200 || r.Caller != "node-1" || r.CallerNode == nil || r.CallerNode.Name != "node-1" ||
		r.AccessKeyID != "NODE1" || r.Cluster != "prod" || r.Namespace != "web" || r.ServiceAccount != "api" || r.Pod != "api-0" || r.PodUID == "" || r.Node != "node-1" ||
		r.JTI != "the-jti" || r.AssociationID != id || r.RoleARN != role("api") || r.TargetRoleARN != target("t") || r.AssumedRoleARN == "" || r.SessionName == "" ||
		len(r.STSRequestIDs) != 2 || r.Expires == nil || r.State != nil || r.RequestID != a.header.Get("X-Amzn-Requestid") {
		t.Errorf("got %+v", r)
	}
	var answered struct {
		Credentials struct{ AccessKeyID, SecretAccessKey, SessionToken string }
	}
	if err := json.Unmarshal([]byte(a.body), &answered); err != nil {
		t.Fatal(err)
	}
	if r.IssuedAccessKeyID != answered.Credentials.AccessKeyID {
		t.Errorf("key %q, recorded %q", answered.Credentials.AccessKeyID, r.IssuedAccessKeyID)
	}
	b, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	for _, secret := range []string{token, token[strings.LastIndexByte(token, '.'):], answered.Credentials.SecretAccessKey, answered.Credentials.SessionToken, secretOf("NODE1")} {
		if strings.Contains(string(b), secret) {
			t.Errorf("%q is in %s", secret, b)
		}
	}
}

// fakeIndex stands in for an index that is not as it should be.
type fakeIndex struct {
	eksapi.Index
	notReady bool
	behind   time.Duration
	// lost is what of prod cannot be found: "", "cluster" or "association".
	lost string
}

func (f *fakeIndex) Ready() bool           { return !f.notReady }
func (f *fakeIndex) Behind() time.Duration { return f.behind }
func (f *fakeIndex) Whole(string) bool     { return f.lost == "" }

func (f *fakeIndex) Cluster(name string) (association.Cluster, bool) {
	if f.lost == "cluster" {
		return association.Cluster{}, false
	}
	return f.Index.Cluster(name)
}

func (f *fakeIndex) Lookup(cluster, namespace, serviceAccount string) (association.Association, bool) {
	if f.lost != "" {
		return association.Association{}, false
	}
	return f.Index.Lookup(cluster, namespace, serviceAccount)
}

// fakeTokens answers every token alike.
type fakeTokens struct{ err error }

func (f fakeTokens) Check(context.Context, association.Cluster, string) (tokencheck.Subject, error) {
	return tokencheck.Subject{Namespace: "web", ServiceAccount: "api", NodeName: "node-1", PodName: "p", PodUID: "u"}, f.err
}

// fakeIssuer fails as it is told to.
type fakeIssuer struct {
	err   error
	panic bool
}

func (f fakeIssuer) Issue(context.Context, issuer.Request) (issuer.Credentials, error) {
	if f.panic {
		panic("with a secret in it")
	}
	return issuer.Credentials{}, f.err
}

// fakeStore fails in all its methods that it is asked for.
type fakeStore struct {
	eksapi.Associations
	err error
}

func (f fakeStore) Cluster(context.Context, string) (association.Cluster, error) {
	return association.Cluster{}, f.err
}

func (f fakeStore) TagsOf(context.Context, string) (association.Resource, error) {
	return association.Resource{}, f.err
}

type said struct{ text string }

func (s said) Error() string   { return "for the log" }
func (s said) Message() string { return s.text }

// What is uncertain is never answered in a way that makes an agent drop the
// credentials that it has.
func TestUncertainIs5xx(t *testing.T) {
	unavailable := fmt.Errorf("%w: STS of arn:secret", issuer.ErrUnavailable)
	for name, c := range map[string]struct {
		edit    func(*eksapi.Config)
		status  int
		code    string
		message string
	}{
		"index not filled": {func(c *eksapi.Config) { c.Index = &fakeIndex{Index: c.Index, notReady: true} }, 503, "ServiceUnavailableException", ""},
		"index stale":      {func(c *eksapi.Config) { c.MaxBehind, c.Index = 0, &fakeIndex{Index: c.Index, behind: 31 * time.Second} }, 503, "ServiceUnavailableException", ""},
		"damaged cluster":  {func(c *eksapi.Config) { c.Index = &fakeIndex{Index: c.Index, lost: "cluster"} }, 503, "ServiceUnavailableException", ""},
		"damaged record":   {func(c *eksapi.Config) { c.Index = &fakeIndex{Index: c.Index, lost: "association"} }, 503, "ServiceUnavailableException", ""},
		"tokens":           {func(c *eksapi.Config) { c.Tokens = fakeTokens{fmt.Errorf("%w: x", tokencheck.ErrUnavailable)} }, 503, "ServiceUnavailableException", ""},
		"tokens, unknown":  {func(c *eksapi.Config) { c.Tokens = fakeTokens{errors.New("with a secret in it")} }, 500, "InternalServerException", "An internal error occurred, try again."},
		"tokens, late":     {func(c *eksapi.Config) { c.Tokens = fakeTokens{context.DeadlineExceeded} }, 503, "ServiceUnavailableException", ""},
		"issuer":           {func(c *eksapi.Config) { c.Issuer = fakeIssuer{err: unavailable} }, 503, "ServiceUnavailableException", "Credentials cannot be issued now, try again."},
		"issuer, text": {func(c *eksapi.Config) {
			c.Issuer = fakeIssuer{err: errors.Join(issuer.ErrUnavailable, said{"the text"})}
		}, 503, "ServiceUnavailableException", "the text"},
		"issuer, unknown":   {func(c *eksapi.Config) { c.Issuer = fakeIssuer{err: errors.New("with a secret in it")} }, 500, "InternalServerException", "An internal error occurred, try again."},
		"issuer, throttled": {func(c *eksapi.Config) { c.Issuer = fakeIssuer{err: fmt.Errorf("%w: x", issuer.ErrThrottled)} }, 429, "ThrottlingException", ""},
		"issuer, denied":    {func(c *eksapi.Config) { c.Issuer = fakeIssuer{err: fmt.Errorf("%w: x", issuer.ErrAccessDenied)} }, 400, "AccessDeniedException", ""},
		"issuer, invalid":   {func(c *eksapi.Config) { c.Issuer = fakeIssuer{err: fmt.Errorf("%w: x", issuer.ErrInvalidRequest)} }, 400, "InvalidRequestException", ""},
		"panic":             {func(c *eksapi.Config) { c.Issuer = fakeIssuer{panic: true} }, 500, "InternalServerException", "An internal error occurred, try again."},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, func(cfg *eksapi.Config) {
				c.edit(cfg)
				cfg.Log = slog.New(slog.DiscardHandler)
			})
			w.create("web", "api", role("api"))
			w.audited()
			a := w.exchange("NODE1", signer(t, "prod").Token(tokens.Claims{Namespace: "web", ServiceAccount: "api"}))
			if a.status != c.status || a.code() != c.code || c.message != "" && a.message(t) != c.message {
				t.Errorf("got %d %s %s", a.status, a.code(), a.body)
			}
			if strings.Contains(a.body, "secret") {
				t.Errorf("the cause is in %s", a.body)
			}
			if retry := a.header.Get("Retry-After"); (c.status == 503 || c.status == 429) != (retry == "1") {
				t.Errorf("Retry-After %q", retry)
			}
			if r := w.audited(); len(r) != 1 || r[0].Status != c.status || (r[0].Outcome == eksapi.OutcomeFailed) != (c.status >= 500) {
				t.Errorf("recorded %+v", r)
			}
		})
	}
}

func TestStoreOutageIs5xx(t *testing.T) {
	for name, c := range map[string]struct {
		err    error
		status int
		code   string
	}{
		"unavailable": {&association.Error{Kind: association.Unavailable, Message: "try again"}, 503, "ServiceUnavailableException"},
		"internal":    {&association.Error{Kind: association.Internal, Message: "with a secret in it"}, 500, "ServerException"},
		"unknown":     {errors.New("with a secret in it"), 500, "ServerException"},
		"late":        {context.DeadlineExceeded, 503, "ServiceUnavailableException"},
	} {
		w := newWorld(t, func(cfg *eksapi.Config) { cfg.Associations = fakeStore{err: c.err} })
		for _, r := range []raw{
			{method: "GET", path: "/clusters/prod/pod-identity-associations"},
			{method: "POST", path: "/clusters/prod/pod-identity-associations", body: "{}"},
			{method: "DELETE", path: "/clusters/prod/pod-identity-associations/a-00000000000000000"},
			{method: "GET", path: "/tags/arn:aws:eks:" + region + ":" + account + ":cluster/prod"},
		} {
			if message := w.refused(r, c.status, c.code); strings.Contains(message, "secret") {
				t.Errorf("%s: the cause is in %q", name, message)
			}
		}
	}
}

// Keys whose source is away are nobody's fault either.
func TestKeysOutageIs5xx(t *testing.T) {
	w := newWorld(t, func(cfg *eksapi.Config) { cfg.Keys = brokenKeys{} })
	w.refused(raw{method: "GET", path: "/clusters/prod/pod-identity-associations"}, 503, "ServiceUnavailableException")
	w.refused(raw{path: exchangePath, body: "{}"}, 503, "ServiceUnavailableException")
}

func TestRateLimits(t *testing.T) {
	clock := time.Now()
	w := newWorld(t, func(c *eksapi.Config) {
		c.Now = func() time.Time { return clock }
		c.Limits = eksapi.Limits{Reads: eksapi.Rate{PerSecond: 1, Burst: 3}, Writes: eksapi.Rate{PerSecond: 1, Burst: 1}, Exchanges: eksapi.Rate{PerSecond: 2, Burst: 1}}
	})
	list := raw{method: "GET", path: "/clusters/prod/pod-identity-associations"}
	for range 3 {
		if a := w.send(list); a.status != 200 {
			t.Fatalf("%d %s", a.status, a.body)
		}
	}
	if m := w.refused(list, 429, "ThrottlingException"); m != "Rate exceeded" {
		t.Error(m)
	}
	// Others, and other things, are not held back.
	for _, r := range []raw{
		{user: "READER", method: "GET", path: list.path},
		{path: list.path, body: `{"namespace":"web","serviceAccount":"x","roleArn":"` + role("x") + `"}`},
	} {
		if a := w.send(r); a.status != 200 {
			t.Errorf("%s as %q: %d %s", r.method, r.user, a.status, a.body)
		}
	}
	// Who has not proved a key takes nothing from whoever has.
	for range 5 {
		w.refused(raw{method: "GET", path: list.path, user: "READER", secret: "wrong"}, 403, "InvalidSignatureException")
	}
	if a := w.send(raw{user: "READER", method: "GET", path: list.path}); a.status != 200 {
		t.Errorf("%d %s", a.status, a.body)
	}
	clock = clock.Add(time.Second)
	if a := w.send(list); a.status != 200 {
		t.Errorf("a second later: %d %s", a.status, a.body)
	}
	w.refused(list, 429, "ThrottlingException")
	w.refused(raw{user: "NODE1", path: exchangePath, body: "{}"}, 400, "InvalidParameterException")
	w.refused(raw{user: "NODE1", path: exchangePath, body: "{}"}, 429, "ThrottlingException")
	w.refused(raw{user: "NODE2", path: exchangePath, body: "{}"}, 400, "InvalidParameterException")
}

func TestObserve(t *testing.T) {
	got := make(chan eksapi.Observation, 10)
	w := newWorld(t, func(c *eksapi.Config) { c.Observe = func(o eksapi.Observation) { got <- o } })
	w.send(raw{method: "GET", path: "/clusters/prod/pod-identity-associations"})
	w.send(raw{method: http.MethodDelete, path: "/clusters/prod/pod-identity-associations/x"})
	w.send(raw{path: "/nothing"})
	for _, want := range []eksapi.Observation{
		{Operation: "ListPodIdentityAssociations", Status: 200},
		{Operation: "DeletePodIdentityAssociation", Status: 400, Code: "InvalidParameterException"},
		{Operation: "unknown", Status: 404, Code: "UnknownOperationException"},
	} {
		o := <-got
		o.Duration = 0
		if o != want {
			t.Errorf("got %+v, want %+v", o, want)
		}
	}
}
