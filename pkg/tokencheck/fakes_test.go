// SPDX-License-Identifier: Apache-2.0

package tokencheck

import (
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	authv1 "k8s.io/api/authentication/v1"

	"github.com/latchkey-dev/latchkey/pkg/association"
	"github.com/latchkey-dev/latchkey/test/standin/tokens"
)

// signers are expensive to make, and the same for all tests.
var signers struct {
	sync.Mutex
	made map[string]*tokens.Signer
}

func signer(t testing.TB, name string) *tokens.Signer {
	t.Helper()
	signers.Lock()
	defer signers.Unlock()
	if signers.made[name] == nil {
		s, err := tokens.NewSigner(tokens.Config{Algorithm: "ES256"})
		if err != nil {
			t.Fatal(err)
		}
		if signers.made == nil {
			signers.made = map[string]*tokens.Signer{}
		}
		signers.made[name] = s
	}
	return signers.made[name]
}

// clock is a clock that tests move.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func newClock() *clock { return &clock{now: time.Now()} }

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

func clusterOf(s *tokens.Signer, name string) association.Cluster {
	return association.Cluster{Name: name, Issuers: []string{s.Issuer()}, Keys: s.JWKS()}
}

// apiServer is a fake of the part of a Kubernetes API server that reviews
// tokens. It speaks the real wire, over TLS, and does not check signatures.
type apiServer struct {
	*httptest.Server

	mu sync.Mutex
	// credential must be the caller's bearer token.
	credential string
	// gone are the UIDs of pods that were deleted.
	gone map[string]bool
	// answer, if set, takes the place of the answer.
	answer func(w http.ResponseWriter, r *http.Request, review *authv1.TokenReview)
	// edit, if set, changes a good answer.
	edit func(*authv1.TokenReviewStatus)
	// reviews counts requests, atOnce the most at one time, connections the
	// clients' ends.
	reviews     int
	now, atOnce int
	connections map[string]bool
}

func startAPIServer(t testing.TB) *apiServer {
	t.Helper()
	s := &apiServer{credential: "reviewer-credential", gone: map[string]bool{}, connections: map[string]bool{}}
	s.Server = httptest.NewUnstartedServer(s)
	s.Config.ErrorLog = log.New(io.Discard, "", 0) // handshakes are refused on purpose
	s.StartTLS()
	t.Cleanup(s.Close)
	return s
}

func (s *apiServer) set(change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
}

func (s *apiServer) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.reviews
}

func (s *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	s.reviews++
	s.connections[r.RemoteAddr] = true
	credential, answer, edit := s.credential, s.answer, s.edit
	s.now++
	s.atOnce = max(s.atOnce, s.now)
	s.mu.Unlock()
	defer s.set(func() { s.now-- })
	if r.Header.Get("Authorization") != "Bearer "+credential {
		status(w, http.StatusUnauthorized, "Unauthorized")
		return
	}
	if r.Method != http.MethodPost || r.URL.Path != "/apis/authentication.k8s.io/v1/tokenreviews" {
		status(w, http.StatusNotFound, "NotFound")
		return
	}
	var review authv1.TokenReview
	if err := json.NewDecoder(r.Body).Decode(&review); err != nil || review.Kind != "TokenReview" || review.APIVersion != "authentication.k8s.io/v1" {
		status(w, http.StatusBadRequest, "BadRequest")
		return
	}
	if answer != nil {
		answer(w, r, &review)
		return
	}
	review.Status = s.judge(review.Spec)
	if edit != nil {
		edit(&review.Status)
	}
	write(w, http.StatusCreated, review)
}

// judge does what an API server does after it has checked the signature.
func (s *apiServer) judge(spec authv1.TokenReviewSpec) authv1.TokenReviewStatus {
	var claims struct {
		Audience   []string `json:"aud"`
		JTI        string   `json:"jti"`
		Subject    string   `json:"sub"`
		Kubernetes map[string]json.RawMessage
		K          struct {
			Namespace      string
			ServiceAccount struct{ Name, UID string }
			Pod, Node      struct{ Name, UID string }
		} `json:"kubernetes.io"`
	}
	payload, err := base64.RawURLEncoding.DecodeString(strings.Split(spec.Token, ".")[1])
	if err != nil || json.Unmarshal(payload, &claims) != nil {
		return authv1.TokenReviewStatus{Error: "invalid bearer token"}
	}
	both := slices.DeleteFunc(slices.Clone(claims.Audience), func(a string) bool { return !slices.Contains(spec.Audiences, a) })
	if len(both) == 0 {
		return authv1.TokenReviewStatus{Error: fmt.Sprintf("token audiences %q is invalid for the target audiences %q", claims.Audience, spec.Audiences)}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gone[claims.K.Pod.UID] {
		return authv1.TokenReviewStatus{Error: "[invalid bearer token, service account token has been invalidated]"}
	}
	extra := map[string]authv1.ExtraValue{
		extraPodName: {claims.K.Pod.Name}, extraPodUID: {claims.K.Pod.UID}, extraCredential: {"JTI=" + claims.JTI},
	}
	if claims.K.Node.Name != "" {
		extra[extraNodeName], extra[extraNodeUID] = authv1.ExtraValue{claims.K.Node.Name}, authv1.ExtraValue{claims.K.Node.UID}
	}
	return authv1.TokenReviewStatus{
		Authenticated: true, Audiences: both,
		User: authv1.UserInfo{
			Username: claims.Subject, UID: claims.K.ServiceAccount.UID, Extra: extra,
			Groups: []string{"system:serviceaccounts", "system:serviceaccounts:" + claims.K.Namespace, "system:authenticated"},
		},
	}
}

func write(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(v)
}

// status answers as an API server refuses.
func status(w http.ResponseWriter, code int, reason string) {
	write(w, code, map[string]any{
		"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "message": reason, "code": code, "metadata": map[string]any{},
	})
}

// kubeconfig writes a file whose current context leads nowhere, and whose
// context "reviewer" leads to the server.
func (s *apiServer) kubeconfig(t testing.TB, credential string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "kubeconfig")
	s.writeKubeconfig(t, path, credential)
	return path
}

func (s *apiServer) writeKubeconfig(t testing.TB, path, credential string) {
	t.Helper()
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	if err := os.WriteFile(filepath.Join(filepath.Dir(path), "ca.crt"), ca, 0o600); err != nil {
		t.Fatal(err)
	}
	content := fmt.Sprintf(`apiVersion: v1
kind: Config
current-context: nowhere
clusters:
- {name: here, cluster: {server: %q, certificate-authority: ca.crt}}
- {name: nowhere, cluster: {server: "https://127.0.0.1:1"}}
users:
- {name: reviewer, user: {token: %q}}
contexts:
- {name: reviewer, context: {cluster: here, user: reviewer}}
- {name: nowhere, context: {cluster: nowhere, user: reviewer}}
`, s.URL, credential)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}
