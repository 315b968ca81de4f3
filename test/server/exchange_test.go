// SPDX-License-Identifier: Apache-2.0

package server

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"

	"github.com/latchkey-dev/latchkey/test/standin/sts"
	"github.com/latchkey-dev/latchkey/test/standin/tokens"
)

// answer is what EKS Auth said.
type answer struct {
	status int
	// code and message are those of an error.
	code, message string
	// role is the assumed role's ARN, key the access key id.
	role, key string
	requestID string
	body      string
}

func (a answer) String() string {
	return fmt.Sprintf("%d %s %s %s", a.status, a.code, a.message, a.role)
}

// post sends a body, signed by AWS's own signer if there are credentials.
func (s *server) post(path, service string, c aws.Credentials, body any) answer {
	s.t.Helper()
	b, err := json.Marshal(body)
	if err != nil {
		s.t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(s.ctx, http.MethodPost, s.url+path, bytes.NewReader(b))
	if err != nil {
		s.t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	if c.HasKeys() {
		sum := sha256.Sum256(b)
		if err := v4.NewSigner().SignHTTP(s.ctx, c, req, hex.EncodeToString(sum[:]), service, region, time.Now()); err != nil {
			s.t.Fatal(err)
		}
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	out := answer{status: resp.StatusCode, requestID: resp.Header.Get("X-Amzn-Requestid")}
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	out.body = string(raw)
	out.code, _, _ = strings.Cut(resp.Header.Get("X-Amzn-Errortype"), ":")
	var parsed struct {
		Message         string
		AssumedRoleUser struct{ Arn string }
		Credentials     struct{ AccessKeyID, SecretAccessKey, SessionToken string }
	}
	if err := json.Unmarshal(raw, &parsed); err != nil {
		s.t.Fatalf("%s answered %d with no JSON: %q", path, resp.StatusCode, raw)
	}
	out.message, out.role, out.key = parsed.Message, parsed.AssumedRoleUser.Arn, parsed.Credentials.AccessKeyID
	return out
}

func (s *server) exchange(c aws.Credentials, cluster, token string) answer {
	s.t.Helper()
	return s.post("/clusters/"+cluster+"/assume-role-for-pod-identity", "eks-auth", c, map[string]string{"token": token})
}

// wantAnswer checks status and code, and for success the role.
func wantAnswer(t *testing.T, what string, a answer, status int, code, text string) {
	t.Helper()
	if a.status != status || a.code != code || !strings.Contains(a.message+a.role, text) {
		t.Errorf("%s: %s; want %d %s with %q", what, a, status, code, text)
	}
	if a.requestID == "" {
		t.Errorf("%s: no request id", what)
	}
}

func TestExchange(t *testing.T) {
	t.Parallel()
	stsServer, err := sts.Start(sts.Config{Callers: map[string]sts.Caller{"AKIASERVER0000000000": {SecretAccessKey: "server's own"}}})
	if err != nil {
		t.Fatal(err)
	}
	defer stsServer.Close()
	for _, r := range []string{"web-reader", "hop"} {
		stsServer.AddRole(sts.Role{ARN: roleARN(r)})
	}
	stsServer.AddRole(sts.Role{ARN: "arn:aws:iam::444455556666:role/target", ExternalID: "us-west-2/111122223333/prod/two/hops", Trusts: []string{roleARN("hop")}})

	s := newServer(t, "--sts-endpoint", stsServer.URL)
	// A CA bundle, too: the SDK takes none with just any HTTP client.
	certificate(t, s.dir, 1)
	s.env = []string{"AWS_ACCESS_KEY_ID=AKIASERVER0000000000", "AWS_SECRET_ACCESS_KEY=server's own", "AWS_CA_BUNDLE=" + filepath.Join(s.dir, "tls.crt")}
	s.serve()
	signer, foreign := newSigner(t), newSigner(t)
	s.addCluster(cluster, signer, "--allow-account", "444455556666")
	s.addCluster("other", foreign)
	agent, admin := s.user("agent", "--node", cluster+"/"+node), s.user("admin")
	stranger := s.user("stranger", "--node", cluster+"/node-2")
	s.cli("association", "create", "-c", cluster, "-n", "web", "-s", "api", "-r", roleARN("web-reader"))
	s.cli("association", "create", "-c", cluster, "-n", "two", "-s", "hops", "-r", roleARN("hop"), "--target-role", "arn:aws:iam::444455556666:role/target")
	s.cli("association", "create", "-c", cluster, "-n", "bad", "-s", "role", "-r", roleARN("nobody-made-it"))
	s.cli("association", "create", "-c", "other", "-n", "web", "-s", "api", "-r", roleARN("web-reader"))
	pod := tokens.Claims{Namespace: "web", ServiceAccount: "api"}
	with := func(change func(*tokens.Claims)) string {
		c := pod
		change(&c)
		return signer.Token(c)
	}
	good := signer.Token(pod)

	a := s.exchange(agent, cluster, good)
	wantAnswer(t, "a good token", a, 200, "", "arn:aws:sts::111122223333:assumed-role/web-reader/eks-prod-api-0-")
	wantAnswer(t, "two hops", s.exchange(agent, cluster, with(func(c *tokens.Claims) { c.Namespace, c.ServiceAccount = "two", "hops" })), 200, "", "arn:aws:sts::444455556666:assumed-role/target/")
	if tags := stsServer.TagsOf(a.key); len(tags) != 6 || tags["kubernetes-service-account"] != "api" {
		t.Errorf("session tags %v, want EKS's six", tags)
	}
	past := time.Now().Add(-2 * time.Hour)
	for _, tc := range []struct {
		what    string
		caller  aws.Credentials
		cluster string
		token   string
		status  int
		code    string
		text    string
	}{
		{"expired", agent, cluster, with(func(c *tokens.Claims) { c.IssuedAt, c.Expiry = past, past.Add(time.Hour) }), 400, "ExpiredTokenException", "The token included in the request is expired"},
		{"foreign audience", agent, cluster, with(func(c *tokens.Claims) { c.Audience = "sts.amazonaws.com" }), 400, "InvalidTokenException", ""},
		{"audience of agents", agent, cluster, with(func(c *tokens.Claims) { c.Audience = "latchkey-server" }), 400, "InvalidTokenException", ""},
		{"another cluster's key", agent, cluster, foreign.Token(pod), 400, "InvalidTokenException", ""},
		{"own key, at another cluster", s.user("agent-other", "--node", "other/"+node), "other", good, 400, "InvalidTokenException", ""},
		{"no pod in it", agent, cluster, with(func(c *tokens.Claims) { c.NoPod = true }), 400, "InvalidTokenException", ""},
		{"another issuer", agent, cluster, with(func(c *tokens.Claims) { c.Issuer = "https://elsewhere" }), 400, "InvalidTokenException", ""},
		{"no token", agent, cluster, "", 400, "InvalidParameterException", ""},
		{"no JWT", agent, cluster, "a.b.c", 400, "InvalidTokenException", ""},
		{"no association", agent, cluster, with(func(c *tokens.Claims) { c.ServiceAccount = "nobody" }), 404, "ResourceNotFoundException", ""},
		{"the role is not there", agent, cluster, with(func(c *tokens.Claims) { c.Namespace, c.ServiceAccount = "bad", "role" }), 400, "AccessDeniedException", "Unauthorized Exception!"},
		{"another node's agent", stranger, cluster, good, 400, "AccessDeniedException", ""},
		{"a user that is no node", admin, cluster, good, 400, "AccessDeniedException", ""},
		{"a token without a node", agent, cluster, with(func(c *tokens.Claims) { c.NoNode = true }), 400, "AccessDeniedException", ""},
		{"an agent at another cluster", agent, "other", foreign.Token(pod), 400, "AccessDeniedException", ""},
		{"an unknown cluster", admin, "nowhere", good, 404, "ResourceNotFoundException", ""},
		{"unsigned", aws.Credentials{}, cluster, good, 403, "MissingAuthenticationTokenException", ""},
		{"mis-signed", aws.Credentials{AccessKeyID: agent.AccessKeyID, SecretAccessKey: "x"}, cluster, good, 403, "InvalidSignatureException", ""},
	} {
		wantAnswer(t, tc.what, s.exchange(tc.caller, tc.cluster, tc.token), tc.status, tc.code, tc.text)
	}
	if d := s.cli("doctor"); !strings.Contains(d, "arn:aws:iam::111122223333:user/AKIASERVER0000000000 in us-west-2") || strings.Contains(d, "fail") {
		t.Errorf("doctor does not know who it is to STS:\n%s", d)
	}
	stsServer.Inject(sts.Fault{Kind: sts.Reset})
	if d := s.try("", "doctor"); d.code != 4 || !strings.Contains(d.stdout, "GetCallerIdentity in us-west-2: ") {
		t.Errorf("doctor with an STS that is away: %+v", d)
	}
	wantAnswer(t, "STS is away", s.exchange(agent, cluster, good), 503, "ServiceUnavailableException", "")
	stsServer.ClearFaults()
	wantAnswer(t, "STS is back", s.exchange(agent, cluster, good), 200, "", "web-reader")

	var issued, refused int
	for _, r := range s.records() {
		if r["type"] != "exchange" {
			continue
		}
		switch r["outcome"] {
		case "done":
			issued++
			for _, m := range []string{"jti", "pod", "pod_uid", "node", "association_id", "role_arn", "session_name", "sts_request_ids", "caller"} {
				if r[m] == nil {
					t.Errorf("an exchange's record has no %s: %v", m, r)
				}
			}
		case "refused":
			refused++
		}
	}
	if issued != 3 || refused < 15 {
		t.Errorf("%d exchanges and %d refusals in the audit log, want 3 and at least 15", issued, refused)
	}
	s.noSecrets(good, "server's own", agent.SecretAccessKey, admin.SecretAccessKey)
}

// noSecrets looks for secrets in all that the server writes or shows.
func (s *server) noSecrets(secrets ...string) {
	s.t.Helper()
	metrics, err := s.get("/metrics")
	if err != nil {
		s.t.Fatal(err)
	}
	audit, err := os.ReadFile(filepath.Join(s.dir, "audit.jsonl"))
	if err != nil {
		s.t.Fatal(err)
	}
	shown := s.try("", "doctor").stdout + s.cli("status") + s.cli("user", "list", "-o", "json") + s.cli("cluster", "list", "-o", "yaml")
	for where, text := range map[string]string{"log": s.log.String(), "metrics": metrics, "audit": string(audit), "CLI": shown} {
		for _, secret := range secrets {
			// A token's secret is its signature.
			if i := strings.LastIndexByte(secret, '.'); i >= 0 {
				secret = secret[i+1:]
			}
			if strings.Contains(text, secret) {
				s.t.Errorf("a secret is in the %s", where)
			}
		}
	}
}

// fakeAPIServer is the part of a Kubernetes API server that reviews tokens and
// publishes keys.
type fakeAPIServer struct {
	*httptest.Server
	// gone: the pod is deleted. away: the API server does not answer.
	gone, away atomic.Bool
	reviews    atomic.Int64
	signer     *tokens.Signer
}

func newAPIServer(t *testing.T, signer *tokens.Signer) *fakeAPIServer {
	f := &fakeAPIServer{signer: signer}
	mux := http.NewServeMux()
	mux.Handle("GET /", tokens.DiscoveryHandler(signer.Issuer(), "https://elsewhere.example/keys", signer.JWKS))
	mux.HandleFunc("POST /apis/authentication.k8s.io/v1/tokenreviews", func(w http.ResponseWriter, r *http.Request) {
		f.reviews.Add(1)
		var review struct {
			Spec struct {
				Token     string
				Audiences []string
			}
		}
		if err := json.NewDecoder(r.Body).Decode(&review); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		status := map[string]any{"authenticated": false, "error": "no"}
		if !f.gone.Load() && strings.Count(review.Spec.Token, ".") == 2 {
			status = map[string]any{
				"authenticated": true, "audiences": review.Spec.Audiences,
				"user": map[string]any{
					"username": "system:serviceaccount:web:api", "uid": tokens.UID("serviceaccount", "web", "api"),
					"extra": map[string]any{
						"authentication.kubernetes.io/pod-name":  []string{"api-0"},
						"authentication.kubernetes.io/pod-uid":   []string{tokens.UID("pod", "web", "api-0")},
						"authentication.kubernetes.io/node-name": []string{node},
						"authentication.kubernetes.io/node-uid":  []string{tokens.UID("node", node)},
					},
				},
			}
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusCreated)
		_ = json.NewEncoder(w).Encode(map[string]any{"kind": "TokenReview", "apiVersion": "authentication.k8s.io/v1", "metadata": map[string]any{}, "spec": map[string]any{}, "status": status})
	})
	f.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if f.away.Load() {
			http.Error(w, "away", http.StatusBadGateway)
			return
		}
		mux.ServeHTTP(w, r)
	}))
	t.Cleanup(f.Close)
	return f
}

// kubeconfig for it, with its CA.
func (f *fakeAPIServer) kubeconfig(t *testing.T, dir string) string {
	t.Helper()
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: f.Certificate().Raw})
	caFile, file := filepath.Join(dir, "ca.crt"), filepath.Join(dir, "kubeconfig")
	if err := os.WriteFile(caFile, ca, 0o600); err != nil {
		t.Fatal(err)
	}
	config := fmt.Sprintf(`{"apiVersion":"v1","kind":"Config","current-context":"c",
"clusters":[{"name":"c","cluster":{"server":%q,"certificate-authority":%q}}],
"users":[{"name":"u","user":{"token":"reviewer"}}],
"contexts":[{"name":"c","context":{"cluster":"c","user":"u"}}]}`, f.URL, caFile)
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// The keys are fetched once and pinned; a deleted pod's token is refused, and
// an API server that does not answer is no reason to refuse one.
func TestExchangeWithTokenReview(t *testing.T) {
	t.Parallel()
	s := start(t)
	api := newAPIServer(t, newSigner(t))
	kubeconfig := api.kubeconfig(t, s.dir)

	refused := s.try("", "cluster", "add", cluster, "--region", region, "--account", account, "--keys-from-kubeconfig", kubeconfig)
	if refused.code != 2 || !strings.Contains(refused.stderr, "SHA256:"+strings.NewReplacer("-", "+", "_", "/").Replace(api.signer.KeyID())) {
		t.Errorf("keys were pinned unseen, or their fingerprint was not shown: %+v", refused)
	}
	refused = s.try("", "cluster", "add", cluster, "--region", region, "--account", account, "--keys-from-kubeconfig", kubeconfig, "--fingerprint", "SHA256:other")
	if refused.code != 2 {
		t.Errorf("keys with another fingerprint were pinned: %+v", refused)
	}
	s.cli("cluster", "add", cluster, "--region", region, "--account", account, "--keys-from-kubeconfig", kubeconfig, "--yes", "--token-review", kubeconfig)
	agent := s.user("agent", "--node", cluster+"/"+node)
	s.cli("association", "create", "-c", cluster, "-n", "web", "-s", "api", "-r", roleARN("r"))
	token := func() string {
		return api.signer.Token(tokens.Claims{Namespace: "web", ServiceAccount: "api", Node: node})
	}
	wantAnswer(t, "a living pod", s.exchange(agent, cluster, token()), 200, "", "role/r/")
	if api.reviews.Load() == 0 {
		t.Error("the API server was not asked")
	}
	if d := s.cli("doctor"); !strings.Contains(d, "TokenReview answers") || !strings.Contains(d, "those that "+api.URL+" publishes") {
		t.Errorf("doctor:\n%s", d)
	}
	api.gone.Store(true)
	wantAnswer(t, "a deleted pod", s.exchange(agent, cluster, token()), 400, "InvalidTokenException", "")
	api.gone.Store(false)
	api.away.Store(true)
	wantAnswer(t, "an API server that is away", s.exchange(agent, cluster, token()), 503, "ServiceUnavailableException", "")
	if d := s.try("", "doctor"); d.code != 4 || !strings.Contains(d.stdout, "fail") {
		t.Errorf("doctor with an API server that is away: %+v", d)
	}
	wantAnswer(t, "another key meanwhile", s.exchange(agent, cluster, newSigner(t).Token(tokens.Claims{Namespace: "web", ServiceAccount: "api"})), 400, "InvalidTokenException", "")
	s.cli("cluster", "add", cluster, "--replace", "--region", region, "--account", account, "--yes",
		"--keys", writeFile(t, s.dir, "jwks.json", string(api.signer.JWKS())), "--issuer", api.signer.Issuer(), "--token-review", kubeconfig, "--token-review-outage", "keys")
	s.until("the setting is in force", func() error {
		if a := s.exchange(agent, cluster, token()); a.status != 200 {
			return fmt.Errorf("%s", a)
		}
		return nil
	})
	if m, err := s.get("/metrics"); err != nil || !strings.Contains(m, `latchkey_server_token_reviews_bypassed_total{cluster="prod"} `) {
		t.Errorf("tokens accepted by their keys alone are not counted: %v", err)
	}

	// A kubeconfig of another cluster, whose API server reviews tokens just as well.
	api.away.Store(false)
	s.cli("cluster", "add", cluster, "--replace", "--region", region, "--account", account,
		"--keys", writeFile(t, s.dir, "jwks.json", string(newSigner(t).JWKS())), "--issuer", api.signer.Issuer(), "--token-review", kubeconfig)
	if d := s.try("", "doctor"); d.code != 4 || !strings.Contains(d.stdout, "signs tokens with none of them") {
		t.Errorf("doctor with another cluster's API server: %+v", d)
	}
}

// An agent proves its node with its own token, and is then that node only.
func TestNodeCredentials(t *testing.T) {
	t.Parallel()
	s := start(t)
	signer := newSigner(t)
	s.addCluster(cluster, signer, "--agent", "latchkey/agent")
	s.cli("association", "create", "-c", cluster, "-n", "web", "-s", "api", "-r", roleARN("r"))
	trade := func(c tokens.Claims) (answer, aws.Credentials) {
		a := s.post("/latchkey/v1/clusters/"+cluster+"/node-credentials", "", aws.Credentials{}, map[string]string{"token": signer.Token(c)})
		var got struct {
			Credentials struct{ AccessKeyID, SecretAccessKey, SessionToken string }
		}
		if err := json.Unmarshal([]byte(a.body), &got); err != nil {
			t.Fatal(err)
		}
		return a, aws.Credentials{AccessKeyID: got.Credentials.AccessKeyID, SecretAccessKey: got.Credentials.SecretAccessKey, SessionToken: got.Credentials.SessionToken}
	}
	agent := tokens.Claims{Namespace: "latchkey", ServiceAccount: "agent", Node: "node-7", Audience: "latchkey-server"}
	a, keys := trade(agent)
	if a.status != 200 || !keys.HasKeys() || keys.SessionToken == "" {
		t.Fatalf("no keys for an agent: %s", a)
	}
	pod := func(on string) string {
		return signer.Token(tokens.Claims{Namespace: "web", ServiceAccount: "api", Node: on})
	}
	wantAnswer(t, "a pod on the node", s.exchange(keys, cluster, pod("node-7")), 200, "", "role/r/")
	wantAnswer(t, "a pod on another", s.exchange(keys, cluster, pod("node-8")), 400, "AccessDeniedException", "")
	forged := keys
	forged.SessionToken = keys.SessionToken[:len(keys.SessionToken)-4] + "AAAA"
	wantAnswer(t, "a forged session token", s.exchange(forged, cluster, pod("node-7")), 403, "UnrecognizedClientException", "")
	want(t, "associations with a node's keys", func() error {
		_, err := s.eks(keys).ListPodIdentityAssociations(context.Background(), listInput())
		return err
	}(), "AccessDeniedException", 403, "")

	other := agent
	other.ServiceAccount = "somebody"
	b, _ := trade(other)
	wantAnswerNoID(t, "a service account that is no agent's", b, 403, "AccessDeniedException")
	other = agent
	other.Audience = tokens.DefaultAudience
	b, _ = trade(other)
	wantAnswerNoID(t, "a token for pods' credentials", b, 400, "InvalidTokenException")

	// The keys outlive the process that gave them.
	s.stop()
	s.serve()
	wantAnswer(t, "after a restart", s.exchange(keys, cluster, pod("node-7")), 200, "", "role/r/")
	s.cli("node-keys", "rotate")
	wantAnswer(t, "after a rotation", s.exchange(keys, cluster, pod("node-7")), 200, "", "role/r/")
	if st := s.cli("node-keys", "status"); strings.Count(st, "opens") != 2 || strings.Count(st, "seals and opens") != 1 {
		t.Errorf("sealing keys:\n%s", st)
	}
	s.cli("node-keys", "rotate", "--revoke", "-o", "json")
	wantAnswer(t, "after they were revoked", s.exchange(keys, cluster, pod("node-7")), 403, "UnrecognizedClientException", "")
	if _, keys := trade(agent); !keys.HasKeys() {
		t.Error("no new keys after all were revoked")
	}
	found := false
	for _, r := range s.records() {
		found = found || r["type"] == "node_credentials" && r["outcome"] == "done" && r["jti"] != nil
	}
	if !found {
		t.Error("no record of the node's keys")
	}
	s.noSecrets(keys.SecretAccessKey, keys.SessionToken)
}

func wantAnswerNoID(t *testing.T, what string, a answer, status int, code string) {
	t.Helper()
	if a.status != status || a.code != code {
		t.Errorf("%s: %s; want %d %s", what, a, status, code)
	}
}
