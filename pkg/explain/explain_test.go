// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"encoding/base64"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/adminapi"
)

const uid = "0f7e2a52-6a3b-4d5e-9c1f-3a6d2b8c4e10"

func now() time.Time { return time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC) }

func ago(d time.Duration) *time.Time {
	t := now().Add(-d)
	return &t
}

func ptr[T any](v T) *T { return &v }

// healthy is a pod that is served.
func healthy() Input {
	return Input{
		Query: "web/api", Now: now(),
		Facts: &adminapi.Facts{
			Query: "web/api", Kind: "pod", Cgroup: "/kubepods/pod" + uid,
			Status: adminapi.Status{
				Version: "v1", Started: *ago(time.Hour), Cluster: "demo", Attestation: "enforce", Attesting: true, AttachedAt: "/", Kubepods: "/kubepods",
				Audience: "pods.eks.amazonaws.com", Keys: "keys.json",
				Listeners: []adminapi.Listener{{Address: "169.254.170.23:80", Serving: true}, {Address: "[fd00:ec2::23]:80", Serving: true}},
				Addresses: []adminapi.Address{{Address: "169.254.170.23", Present: true}, {Address: "fd00:ec2::23", Present: true}},
				Upstream:  adminapi.Upstream{ClockSkew: ptr(0.3), Credentials: adminapi.NodeCredentials{State: "ok", Source: "EC2RoleProvider"}},
			},
			Pod: &adminapi.Pod{UID: uid, Name: "api", Namespace: "web", ServiceAccount: "api", Cgroup: "/kubepods/pod" + uid, Role: "arn:aws:sts::1:assumed-role/api/s",
				Association: "a-1", Credentials: "valid", Expires: ptr(now().Add(time.Hour)), Verdict: "served", LastAsked: ago(time.Minute)},
			Cache: []adminapi.CacheEntry{{PodUID: uid, State: "fresh", Fetched: ago(5 * time.Hour), Expires: ptr(now().Add(time.Hour))}},
		},
		Hooks: []Hook{{"connect4", []Program{{ID: 1, Name: "latchkey_connec", Ours: true, Cgroup: "/"}}},
			{"connect6", []Program{{ID: 2, Name: "latchkey_connec", Ours: true, Cgroup: "/"}}}, {"sockops", []Program{{ID: 3, Ours: true}}}},
		Injection: &Injection{PID: 42, URI: "http://169.254.170.23/v1/credentials", TokenFile: "/token", Claims: &Claims{PodUID: uid, Expires: now().Add(time.Hour)},
			Token: &adminapi.TokenCheck{Accepted: true, Verified: true}},
		Node:  Node{CgroupV2: "/sys/fs/cgroup"},
		Reach: []Reach{{Address: "169.254.170.23:80", Status: 404}},
	}
}

// unserved is a pod that has been given nothing.
func unserved() Input {
	in := healthy()
	p := in.Facts.Pod
	p.Role, p.Association, p.Credentials, p.Expires, p.Verdict, p.LastAsked = "", "", "none", nil, "", nil
	in.Facts.Cache = nil
	return in
}

// refused is a pod whose last request was refused for a reason.
func refused(reason string, more func(*adminapi.Denial)) func(*Input) {
	return func(in *Input) {
		*in = unserved()
		d := adminapi.Denial{Reason: reason, Finding: "pod", PodUID: uid, First: *ago(2 * time.Minute), Last: *ago(time.Minute), Status: 403}
		if more != nil {
			more(&d)
		}
		in.Facts.Denials = []adminapi.Denial{d}
	}
}

func upstream(status int, code, message string) func(*adminapi.Denial) {
	return func(d *adminapi.Denial) {
		d.Upstream = &adminapi.UpstreamError{Reason: d.Reason, Status: status, Code: code, Message: message}
	}
}

// Every cause follows from the facts, and is named in a sentence that says so.
func TestExplain(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		change func(*Input)
		code   Code
		step   string // that failed; empty: none
		text   string
	}{
		"served":      {func(*Input) {}, None, "", "the pod is served credentials of arn:aws:sts::1:assumed-role/api/s"},
		"never asked": {func(in *Input) { *in = unserved() }, NeverAsked, "", "has not asked"},
		"history": {func(in *Input) {
			in.Facts.Denials = []adminapi.Denial{{Reason: "pod_mismatch", PodUID: uid, Last: *ago(time.Hour)}}
		}, None, "", "served"},
		"after that": {func(in *Input) {
			in.Facts.Denials = []adminapi.Denial{{Reason: "pod_mismatch", PodUID: uid, Last: *ago(time.Second)}}
		}, OtherPodsToken, "verdict", "another pod's token"},
		"shadow": {func(in *Input) {
			in.Facts.Denials = []adminapi.Denial{{Reason: "pod_mismatch", PodUID: uid, Last: *ago(0), Shadow: true}}
		}, None, "", "served"},
		"no agent":   {func(in *Input) { in.Facts, in.AgentError = nil, "no agent answers" }, NoAgent, "agent", "no latchkey-agent runs"},
		"not root":   {func(in *Input) { in.Facts, in.AgentError = nil, "not permitted: use sudo" }, NotPermitted, "agent", "only root"},
		"cgroup v1":  {func(in *Input) { in.Facts, in.Node = nil, Node{CgroupV1: true} }, CgroupV1, "kernel", "cgroup v1 only"},
		"old kernel": {func(in *Input) { in.Facts, in.Node.MissingFeatures = nil, []string{"BTF"} }, NoKernel, "kernel", "cannot attest"},
		"agent elsewhere": {func(in *Input) {
			in.Facts, in.AgentError, in.Node.PortHolder = nil, "no agent answers on /run/x", "latchkey-agent (7) on 169.254.170.23:80"
		}, AgentSilent, "agent", "latchkey-agent (7) on 169.254.170.23:80 runs, and does not answer"},
		"agent hangs":     {func(in *Input) { in.Facts, in.AgentError = nil, "the agent has not answered within 10s" }, AgentSilent, "agent", "latchkey-agent does not answer"},
		"port held":       {func(in *Input) { in.Facts, in.Node.PortHolder = nil, "nginx (7) on 0.0.0.0:80" }, NoAgent, "agent", "nginx (7) on 0.0.0.0:80 holds"},
		"not attesting":   {func(in *Input) { in.Facts.Status.Attesting, in.Facts.Status.CannotAttest = false, "no BTF" }, NotAttesting, "", "does not attest"},
		"address gone":    {func(in *Input) { in.Facts.Status.Addresses[0].Present = false }, AddressGone, "address", "169.254.170.23 is gone"},
		"seen to be gone": {func(in *Input) { in.Node.MissingAddresses = []string{"169.254.170.23"} }, AddressGone, "address", "169.254.170.23 is gone"},
		"other family":    {func(in *Input) { in.Facts.Status.Addresses[1].Present = false }, None, "", "served"},
		"family in use": {func(in *Input) {
			in.Injection.URI = "http://[fd00:ec2::23]/v1/credentials"
			in.Facts.Status.Addresses[1].Present = false
		}, AddressGone, "address", "fd00:ec2::23 is gone"},
		"not served": {func(in *Input) {
			in.Facts.Status.Listeners[0] = adminapi.Listener{Address: "169.254.170.23:80", Error: "in use"}
		}, NotServing, "address", "does not serve 169.254.170.23:80"},
		"unreachable": {func(in *Input) { in.Reach[0] = Reach{Address: "169.254.170.23:80", Error: "no route to host"} }, Unreachable, "reach", "no route to host"},
		"not seen":    {func(in *Input) { in.Reach, in.ReachError = nil, "it takes CAP_SYS_ADMIN" }, None, "", "served"},
		"detached":    {func(in *Input) { in.Hooks[0].Programs = nil }, NotAttached, "hooks", "not attached any more"},
		"shadowed": {func(in *Input) {
			*in = unserved()
			in.Hooks[0].Programs = append([]Program{{ID: 9, Name: "cil_sock4_conne", Cgroup: "/kubepods"}}, in.Hooks[0].Programs...)
		}, Shadowed, "hooks", "cil_sock4_conne (id 9, at cgroup /kubepods) runs before"},
		"passed by others": {func(in *Input) {
			*in = unserved()
			in.Hooks[0].Programs = append([]Program{{ID: 9, Name: "cil_sock4_conne", Cgroup: "/"}}, in.Hooks[0].Programs...)
		}, NeverAsked, "", "has not asked"},
		"shadowed for all": {func(in *Input) {
			in.Hooks[0].Programs = append(in.Hooks[0].Programs, Program{ID: 9, Name: "x"})
			in.Reach[0] = Reach{Address: "169.254.170.23:80", Error: "connection refused"}
		}, Shadowed, "hooks", "fails: connection refused"},
		"harmless company": {func(in *Input) { in.Hooks[0].Programs = append(in.Hooks[0].Programs, Program{ID: 9, Name: "sd_fw"}) }, None, "", "served"},
		"a good probe": {func(in *Input) {
			*in = unserved()
			in.Hooks[0].Programs = append(in.Hooks[0].Programs, Program{ID: 9})
			in.Probe = &Reach{Status: 404, Attested: uid}
		}, NeverAsked, "", "has not asked"},
		"a bad probe": {func(in *Input) {
			in.Hooks[0].Programs = append(in.Hooks[0].Programs, Program{ID: 9, Name: "x"})
			in.Probe = &Reach{Error: "refused", Attested: "nobody"}
		}, Shadowed, "hooks", "tried from the pod"},
		"ended":   {func(in *Input) { in.Facts.Pod.Ended = true }, PodEnded, "pod", "has ended"},
		"outside": {func(in *Input) { in.Facts.Pod, in.Facts.Process = nil, &adminapi.Process{PID: 7, Name: "sshd"} }, NotInPod, "pod", "process 7 (sshd) is outside every pod"},
		"no connection": {func(in *Input) {
			in.Facts.Pod, in.Facts.Connection = nil, &adminapi.Connection{Client: "10.0.0.9:1", Finding: "none", Reason: "no_evidence", Accepted: now()}
		}, NoEvidence, "connection", "no hook saw"},
		"proxy": {refused("not_in_pod", func(d *adminapi.Denial) {
			d.PodUID, d.Finding, d.PID, d.Process, d.Cgroup = "", "not_pod", 7, "ztunnel", "/system.slice/ztunnel"
		}), NodeProxy, "connection", "process 7 (ztunnel) in cgroup /system.slice/ztunnel"},
		"proxy in a pod":  {refused("pod_mismatch", func(d *adminapi.Denial) { d.PodUID, d.Pod, d.Namespace = "other", "ztunnel", "istio-system" }), NodeProxy, "connection", "pod istio-system/ztunnel (other)"},
		"agent late":      {refused("no_evidence", func(d *adminapi.Denial) { d.PodUID, d.First = "", now().Add(-time.Hour+time.Second) }), AgentLate, "connection", "agent late"},
		"user-space TCP":  {refused("no_evidence", func(d *adminapi.Denial) { d.PodUID = "" }), NoEvidence, "connection", "user-space TCP"},
		"two pods":        {refused("two_pods", func(d *adminapi.Denial) { d.PodUID = "" }), TwoPods, "connection", "one pod and connected in another"},
		"foreign netns":   {refused("foreign_netns", func(d *adminapi.Denial) { d.PodUID = "" }), ForeignNetns, "connection", "not its own"},
		"cgroup gone":     {refused("cgroup_gone", func(d *adminapi.Denial) { d.PodUID = "" }), CgroupGone, "connection", "were gone"},
		"not injected":    {func(in *Input) { *in = unserved(); in.Injection = &Injection{PID: 1} }, NotInjected, "token", "not injected"},
		"static keys":     {func(in *Input) { *in = unserved(); in.Injection.Other = "AWS_ACCESS_KEY_ID" }, OtherCredentials, "token", "AWS_ACCESS_KEY_ID"},
		"through a proxy": {func(in *Input) { *in = unserved(); in.Injection.Proxy = "HTTP_PROXY" }, Proxied, "token", "HTTP_PROXY"},
		"no file":         {func(in *Input) { *in = unserved(); in.Injection.Token, in.Injection.TokenError = nil, "no such file" }, TokenFile, "token", "no such file"},
		"file of another": {func(in *Input) {
			*in = unserved()
			in.Injection.Claims = &Claims{PodUID: "x", Namespace: "web", Pod: "other"}
		}, OtherPodsToken, "token", "the token of web/other"},
		"file refused": {func(in *Input) { in.Injection.Token = &adminapi.TokenCheck{Reason: "token_audience"} }, TokenAudience, "token", "wrong audience"},
		"missing":      {refused("token_missing", nil), TokenMissing, "token", "without a token"},
		"expired":      {refused("token_expired", nil), TokenExpired, "token", "has expired"},
		"unknown key":  {refused("token_unknown_key", nil), TokenKey, "token", "unknown key"},
		"signature":    {refused("token_signature", nil), TokenSignature, "token", "signature"},
		"issuer":       {refused("token_issuer", nil), TokenIssuer, "token", "another issuer"},
		"unbound":      {refused("token_unbound", nil), TokenUnbound, "token", "not bound"},
		"malformed":    {refused("token_malformed", nil), TokenMalformed, "token", "no service-account token"},
		"too early":    {refused("token_not_yet_valid", nil), TokenNotYetValid, "token", "not valid yet"},
		"no keys":      {refused("keys_unavailable", nil), KeysUnavailable, "token", "no keys"},
		"skew and token": {func(in *Input) {
			refused("token_not_yet_valid", nil)(in)
			in.Upstream = &adminapi.Reached{ClockSkew: ptr(3600.0)}
		}, ClockSkew, "token", "1h0m0s behind"},
		"skew and signature": {func(in *Input) {
			refused("upstream_denied", upstream(403, "InvalidSignatureException", "Signature expired"))(in)
			in.Facts.Status.Upstream.ClockSkew = ptr(-900.0)
		}, ClockSkew, "association", "15m0s ahead of"},
		"limited":        {refused("rate_limited", nil), RateLimited, "verdict", "asks too often"},
		"host":           {refused("invalid_host", nil), WrongHost, "verdict", "another host"},
		"no association": {refused("upstream_not_found", upstream(404, "ResourceNotFoundException", "none")), NoAssociation, "association", "service account web/api has no pod identity association in cluster demo"},
		"denied":         {refused("upstream_denied", upstream(400, "AccessDeniedException", "trust")), UpstreamDenied, "association", "upstream denied"},
		"refused token":  {refused("upstream_token", upstream(400, "InvalidTokenException", "bad")), UpstreamToken, "association", "refuses the pod's token"},
		"throttled":      {refused("upstream_throttled", upstream(429, "ThrottlingException", "slow")), UpstreamThrottled, "association", "throttled"},
		"own budget":     {refused("upstream_throttled", nil), UpstreamThrottled, "association", "throttled"},
		"down":           {refused("upstream_unavailable", upstream(0, "", "connection refused")), UpstreamDown, "association", "connection refused"},
		"garbage":        {refused("upstream_invalid", upstream(200, "", "html")), UpstreamInvalid, "association", "cannot be used"},
		"node expired":   {refused("upstream_denied", upstream(403, "ExpiredTokenException", "expired")), NodeCredentials, "association", "have expired (EC2RoleProvider)"},
		"node unknown":   {refused("upstream_denied", upstream(403, "UnrecognizedClientException", "?")), NodeCredentials, "association", "not known to AWS"},
		"node has none": {func(in *Input) {
			refused("upstream_unavailable", nil)(in)
			in.Facts.Status.Upstream.Credentials = adminapi.NodeCredentials{State: "missing", Error: "no IMDS"}
		}, NodeCredentials, "association", "no AWS credentials of its own: no IMDS"},
		"something new": {refused("brand_new", nil), OtherRefusal, "association", "brand_new"},
		"renewal fails": {func(in *Input) {
			in.Facts.Cache[0].State, in.Facts.Cache[0].LastError = "failing", &adminapi.UpstreamError{Reason: "upstream_unavailable"}
		}, RenewalFailing, "", "cannot be renewed"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			in := healthy()
			tt.change(&in)
			e := Explain(in)
			if e.Cause.Code != tt.code || !strings.Contains(e.Cause.Text, tt.text) {
				t.Errorf("%s: %s; want %s: %q", e.Cause.Code, e.Cause.Text, tt.code, tt.text)
			}
			failed := ""
			for i, s := range e.Steps {
				if failed != "" && s.State != NotReached {
					t.Errorf("%s comes after the step that failed, %s", s.Name, failed)
				}
				if s.State == Fail {
					failed = s.Name
				}
				if s.Text == "" && s.State != NotReached {
					t.Errorf("step %d, %s, says nothing", i, s.Name)
				}
			}
			if failed != tt.step {
				t.Errorf("failed at %q, want %q: %+v", failed, tt.step, e.Steps)
			}
			if (tt.step != "") != e.Cause.Broken() {
				t.Errorf("broken: %v", e.Cause.Broken())
			}
			if e.Cause.Broken() && len(e.Cause.Fix) == 0 && e.Cause.Code != OtherRefusal {
				t.Error("nothing to do about it")
			}
		})
	}
}

// The mode that is told is that of the pod's namespace.
func TestExplainTellsTheModeOfTheNamespace(t *testing.T) {
	t.Parallel()
	for exempt, want := range map[string]string{"web": "attestation audit for tokens of namespace web", "other": "attestation enforce"} {
		in := healthy()
		in.Facts.Status.Exceptions = map[string]string{exempt: "audit"}
		if got := Explain(in).Steps[0]; got.Name != "agent" || !strings.HasSuffix(got.Text, want) {
			t.Errorf("%s is exempt: %+v", exempt, got)
		}
	}
}

// Nothing is concluded from nothing, and nothing panics.
func TestExplainKnowsWhatItDoesNotKnow(t *testing.T) {
	t.Parallel()
	for _, in := range []Input{{}, {Facts: &adminapi.Facts{}}, {Facts: &adminapi.Facts{Pod: &adminapi.Pod{}}}, {Facts: &adminapi.Facts{Connection: &adminapi.Connection{}}}} {
		if e := Explain(in); e.Cause.Text == "" || e.Cause.Code == None && in.Facts == nil {
			t.Errorf("%+v", e)
		}
	}
	in := unserved()
	in.Injection, in.Hooks, in.Reach = nil, nil, nil
	e := Explain(in)
	if e.Cause.Code != NeverAsked || !slices.ContainsFunc(e.Steps, func(s Step) bool { return s.Name == "hooks" && s.State == Unknown }) {
		t.Errorf("%+v", e)
	}
}

func token(header, payload string) string {
	enc := base64.RawURLEncoding.EncodeToString
	return enc([]byte(header)) + "." + enc([]byte(payload)) + "." + enc([]byte("signature"))
}

func TestParseClaims(t *testing.T) {
	t.Parallel()
	c, err := ParseClaims(token(`{"alg":"RS256","kid":"k"}`, `{"aud":["a","b"],"iss":"i","sub":"s","jti":"j","exp":1800000000,"iat":1700000000,
		"kubernetes.io":{"namespace":"web","serviceaccount":{"name":"api"},"pod":{"name":"p","uid":"u"},"node":{"name":"n"}}}`))
	if err != nil || c.KeyID != "k" || len(c.Audience) != 2 || c.ServiceAccount != "api" || c.PodUID != "u" || c.Node != "n" || c.Expires.Unix() != 1800000000 ||
		c.SignatureBytes != 9 || !c.NotBefore.IsZero() {
		t.Errorf("%+v, %v", c, err)
	}
	if c, err = ParseClaims(token(`{}`, "{\"aud\":\"one\",\"sub\":\"\\u001b[31m\u202eevil\",\"exp\":1e300}")); err != nil || c.Audience[0] != "one" || c.Subject != "?[31m?evil" || !c.Expires.IsZero() {
		t.Errorf("%+v, %v", c, err)
	}
	for _, bad := range []string{"", "a", "a.b", "a.b.c.d", "e30.e30.!", "e30.e30", "eyJ.e30.e30", strings.Repeat("a", 20000)} {
		if _, err := ParseClaims(bad); err == nil || len(bad) > 3 && strings.Contains(err.Error(), bad) {
			t.Errorf("%.20q: %v", bad, err)
		}
	}
}

func FuzzParseClaims(f *testing.F) {
	f.Add(token(`{"alg":"RS256"}`, `{"aud":["a"]}`))
	f.Add("e30.e30.e30")
	f.Fuzz(func(t *testing.T, text string) {
		c, err := ParseClaims(text)
		if err != nil {
			return
		}
		for _, s := range append(c.Audience, c.Subject, c.Issuer, c.KeyID, c.Pod, c.ID) {
			if strings.ContainsAny(s, "\x00\x1b\n\r\x7f") || len(s) > 300 {
				t.Errorf("not fit for a terminal: %q", s)
			}
		}
	})
}

// Where no connection could be tried, the explanation says so, and no more.
func TestWhatCannotBeTriedIsUnknown(t *testing.T) {
	t.Parallel()
	in := healthy()
	in.Reach, in.ReachError = nil, "it takes CAP_SYS_ADMIN"
	for _, s := range Explain(in).Steps {
		if s.Name == "reach" {
			if s.State != Unknown || !strings.Contains(s.Text, "not seen from here: it takes CAP_SYS_ADMIN") {
				t.Errorf("%+v", s)
			}
			return
		}
	}
	t.Error("there is no such step")
}
