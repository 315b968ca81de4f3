// SPDX-License-Identifier: Apache-2.0

package eksauth

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/latchkey-dev/latchkey/test/standin/wire"
)

// Marks by which everything this stand-in issues can be told from the real
// service's.
const (
	AccessKeyPrefix    = wire.AccessKeyPrefix
	SecretPrefix       = wire.SecretPrefix
	SessionTokenPrefix = wire.SessionTokenPrefix
)

// maxBody is far beyond any request; more is refused unread.
const maxBody = 64 << 10

// Config describes the cluster the stand-in answers for.
type Config struct {
	// Cluster is the cluster's name; empty means "demo".
	Cluster string
	// Region must be the one requests are signed for; empty means "us-west-2".
	Region string
	// Account owns the associations, 12 digits; empty means "111122223333".
	Account string
	// JWKS are the cluster's public keys as the API server publishes them at
	// /openid/v1/jwks. Without any, every token is refused.
	JWKS []byte
	// Issuer must equal a token's iss; empty accepts any.
	Issuer string
	// Audience must be among a token's aud; empty means "pods.eks.amazonaws.com".
	Audience string
	// Lifetime of the credentials; 0 means 6 h, as the service's.
	Lifetime time.Duration
	// SessionTokenBytes is the session token's length; 0 means 900.
	SessionTokenBytes int
	// Callers maps access key ids to secret access keys. With it, a request's
	// signature is recomputed and the key must be known. Without it only the
	// form of the signature is checked.
	Callers map[string]string
	// Now is the clock; nil means time.Now.
	Now func() time.Time
}

// Association gives a service account a role.
type Association struct {
	Namespace      string
	ServiceAccount string
	// RoleARN is an IAM role's ARN; a path in it is legal.
	RoleARN string
	// TargetRoleARN, if set, is the role whose credentials are handed out, for
	// 59 minutes, after the service's manner.
	TargetRoleARN string
	// ID and ARN are filled in by Associate.
	ID, ARN string
}

// Call is what is remembered of one request. It has no secret.
type Call struct {
	Time      time.Time
	RequestID string
	// AccessKeyID is the caller's, from the signature.
	AccessKeyID string
	// NodeName is member eksNodeName, if sent.
	NodeName string
	// Namespace, ServiceAccount, Pod and PodUID are the token's, if genuine.
	Namespace, ServiceAccount, Pod, PodUID string
	// Status is the HTTP status, 0 if the connection was cut.
	Status int
	// ErrorType is empty on success.
	ErrorType string
	// Fault is the fault that shaped this answer.
	Fault Kind
}

// Server is the stand-in. It is an http.Handler and safe for concurrent use.
type Server struct {
	cfg Config

	mu           sync.Mutex
	keys         jose.JSONWebKeySet
	associations map[[2]string]Association
	faults       wire.Faults[Fault]
	calls        []Call
	inFlight     int
	maxInFlight  int
	lifetime     time.Duration
}

// New makes a stand-in without associations. It fails on a key set it cannot
// read.
func New(cfg Config) (*Server, error) {
	if cfg.Cluster == "" {
		cfg.Cluster = "demo"
	}
	if cfg.Region == "" {
		cfg.Region = "us-west-2"
	}
	if cfg.Account == "" {
		cfg.Account = "111122223333"
	}
	if cfg.Audience == "" {
		cfg.Audience = "pods.eks.amazonaws.com"
	}
	if cfg.Lifetime == 0 {
		cfg.Lifetime = 6 * time.Hour
	}
	if cfg.SessionTokenBytes == 0 {
		cfg.SessionTokenBytes = 900
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	s := &Server{cfg: cfg, associations: map[[2]string]Association{}, lifetime: cfg.Lifetime}
	if len(cfg.JWKS) > 0 {
		if err := s.SetJWKS(cfg.JWKS); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// SetJWKS replaces the cluster's keys.
func (s *Server) SetJWKS(jwks []byte) error {
	var set jose.JSONWebKeySet
	if err := json.Unmarshal(jwks, &set); err != nil {
		return fmt.Errorf("reading the key set: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keys = set
	return nil
}

// SetLifetime changes how long credentials issued from now on live. Negative
// ones have expired already.
func (s *Server) SetLifetime(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lifetime = d
}

// Associate adds or replaces the association of a service account and returns
// it with its id and ARN.
func (s *Server) Associate(a Association) Association {
	s.mu.Lock()
	defer s.mu.Unlock()
	key := [2]string{a.Namespace, a.ServiceAccount}
	if old, ok := s.associations[key]; ok && a.ID == "" {
		a.ID = old.ID
	}
	if a.ID == "" {
		a.ID = "a-" + strings.ToLower(wire.RandomText(17))
	}
	a.ARN = fmt.Sprintf("arn:%s:eks:%s:%s:podidentityassociation/%s/%s",
		s.partition(), s.cfg.Region, s.cfg.Account, s.cfg.Cluster, a.ID)
	s.associations[key] = a
	return a
}

// Dissociate removes a service account's association, if it has one.
func (s *Server) Dissociate(namespace, serviceAccount string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.associations, [2]string{namespace, serviceAccount})
}

// Calls returns what was asked so far, oldest first, finished calls only.
func (s *Server) Calls() []Call {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]Call(nil), s.calls...)
}

// CallCount is the number of calls finished so far, whatever came of them.
func (s *Server) CallCount() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.calls)
}

// CallsFor counts the finished calls with a genuine token of a service account.
func (s *Server) CallsFor(namespace, serviceAccount string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, c := range s.calls {
		if c.Namespace == namespace && c.ServiceAccount == serviceAccount {
			n++
		}
	}
	return n
}

// InFlight is the number of calls being answered now, and the most there were
// at once.
func (s *Server) InFlight() (now, most int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.inFlight, s.maxInFlight
}

// Reset forgets calls and faults; associations and keys stay.
func (s *Server) Reset() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls, s.maxInFlight = nil, s.inFlight
	s.faults.Clear()
}

// apiError is a modelled error of the service.
type apiError struct {
	status  int
	kind    string
	message string
}

func (e *apiError) Error() string { return e.kind + ": " + e.message }

func refuse(status int, kind, format string, args ...any) *apiError {
	return &apiError{status: status, kind: kind, message: fmt.Sprintf(format, args...)}
}

// ServeHTTP answers one request.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	s.inFlight++
	s.maxInFlight = max(s.maxInFlight, s.inFlight)
	fault := s.faults.Next(func(Fault) bool { return true })
	s.mu.Unlock()

	call := Call{Time: s.cfg.Now(), RequestID: wire.RequestID(), Fault: fault.Kind}
	record := func() {
		s.mu.Lock()
		s.inFlight--
		s.calls = append(s.calls, call)
		s.mu.Unlock()
	}

	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if err != nil {
		call.Status, call.ErrorType = http.StatusBadRequest, "SerializationException"
		record()
		s.writeError(w, call.RequestID, &fault, refuse(call.Status, call.ErrorType, "cannot read the request"))
		return
	}
	if !wire.Wait(r.Context(), fault.Delay, fault.Hold) {
		record()
		return
	}
	if fault.Kind == Reset {
		record()
		wire.Reset(w)
		return
	}

	answer, failure := s.answer(r, body, &call, &fault)
	if fault.Kind == Refuse {
		failure = &apiError{status: fault.Status, kind: fault.ErrorType, message: fault.Message}
	}
	// Recorded before the answer is written: whoever has the answer finds the
	// call counted.
	if failure != nil {
		call.Status, call.ErrorType = failure.status, failure.kind
		record()
		s.writeError(w, call.RequestID, &fault, failure)
		return
	}
	call.Status = http.StatusOK
	record()
	s.writeAnswer(w, call.RequestID, &fault, answer)
}

// answer does the operation: who asks, what for, may they.
func (s *Server) answer(r *http.Request, body []byte, call *Call, fault *Fault) (map[string]any, *apiError) {
	name, ok := strings.CutPrefix(r.URL.Path, "/clusters/")
	name, ok2 := strings.CutSuffix(name, "/assume-role-for-pod-identity")
	if !ok || !ok2 || r.Method != http.MethodPost {
		return nil, refuse(http.StatusNotFound, "UnknownOperationException", "no such operation")
	}
	accessKey, failure := s.checkSignature(r, body)
	if failure != nil {
		return nil, failure
	}
	call.AccessKeyID = accessKey

	var in struct {
		Token       *string `json:"token"`
		EKSNodeName string  `json:"eksNodeName"`
	}
	if err := json.Unmarshal(body, &in); err != nil {
		return nil, refuse(http.StatusBadRequest, "SerializationException", "the request is not JSON")
	}
	call.NodeName = in.EKSNodeName
	if name != s.cfg.Cluster {
		return nil, refuse(http.StatusNotFound, "ResourceNotFoundException", "No cluster found for name: %s.", name)
	}
	if in.Token == nil || *in.Token == "" {
		return nil, refuse(http.StatusBadRequest, "InvalidParameterException", "token is required")
	}
	s.mu.Lock()
	keys, lifetime := s.keys, s.lifetime
	s.mu.Unlock()
	who, failure := s.checkToken(*in.Token, keys)
	if failure != nil {
		return nil, failure
	}
	call.Namespace, call.ServiceAccount, call.Pod, call.PodUID = who.namespace, who.serviceAccount, who.pod, who.podUID

	s.mu.Lock()
	assoc, ok := s.associations[[2]string{who.namespace, who.serviceAccount}]
	s.mu.Unlock()
	if !ok {
		return nil, refuse(http.StatusNotFound, "ResourceNotFoundException",
			"No association found for service account %s in namespace %s", who.serviceAccount, who.namespace)
	}
	return s.issue(assoc, who, lifetime, fault), nil
}

// issue makes the answer's members for one association.
func (s *Server) issue(assoc Association, who identity, lifetime time.Duration, fault *Fault) map[string]any {
	role := assoc.RoleARN
	if assoc.TargetRoleARN != "" {
		role = assoc.TargetRoleARN
		lifetime = min(lifetime, 59*time.Minute)
	}
	account, roleName := splitRole(role, s.cfg.Account)
	session := fmt.Sprintf("eks-%.10s-%.10s-%s", s.cfg.Cluster, who.pod, wire.RequestID())
	key, secret, token := wire.Credentials(s.cfg.SessionTokenBytes)

	expiration := s.cfg.Now().Add(lifetime)
	subject := map[string]any{"namespace": who.namespace, "serviceAccount": who.serviceAccount}
	audience := s.cfg.Audience
	switch fault.Kind {
	case Expired:
		expiration = s.cfg.Now().Add(-time.Minute)
	case OtherSubject:
		subject = map[string]any{"namespace": "someone", "serviceAccount": "else"}
	case OtherAudience:
		audience = "sts.amazonaws.com"
	}
	return map[string]any{
		"subject":  subject,
		"audience": audience,
		"podIdentityAssociation": map[string]any{
			"associationArn": assoc.ARN,
			"associationId":  assoc.ID,
		},
		"assumedRoleUser": map[string]any{
			"arn":          fmt.Sprintf("arn:%s:sts::%s:assumed-role/%s/%s", s.partition(), account, roleName, session),
			"assumeRoleId": wire.RoleID() + ":" + session,
		},
		"credentials": map[string]any{
			"accessKeyId":     key,
			"secretAccessKey": secret,
			"sessionToken":    token,
			"expiration":      expiration.Unix(),
		},
	}
}

func (s *Server) writeAnswer(w http.ResponseWriter, requestID string, fault *Fault, answer map[string]any) {
	for _, path := range fault.Members {
		applyMember(answer, path, fault.Kind)
	}
	var body []byte
	if fault.Kind == Body {
		body = fault.Body
	} else {
		var err error
		if body, err = json.Marshal(answer); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
	}
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("X-Amzn-RequestId", requestID)
	h.Set("Date", s.cfg.Now().UTC().Format(http.TimeFormat))
	if fault.Kind == Truncated {
		wire.Truncate(w, body)
	}
	_, _ = w.Write(body)
}

func (s *Server) writeError(w http.ResponseWriter, requestID string, fault *Fault, e *apiError) {
	h := w.Header()
	h.Set("X-Amzn-RequestId", requestID)
	h.Set("Date", s.cfg.Now().UTC().Format(http.TimeFormat))
	if fault.RetryAfter != "" {
		h.Set("Retry-After", fault.RetryAfter)
	}
	if fault.Kind == Refuse && fault.Body != nil {
		// Something in between answered, not the service.
		h.Set("Content-Type", "text/html")
		w.WriteHeader(e.status)
		_, _ = w.Write(fault.Body)
		return
	}
	h.Set("Content-Type", "application/json")
	// The real header may carry a namespace after a colon; clients strip it.
	h.Set("X-Amzn-ErrorType", e.kind+":http://internal.amazon.com/coral/com.amazonaws.eks.auth/")
	body, _ := json.Marshal(map[string]string{"message": e.message})
	w.WriteHeader(e.status)
	_, _ = w.Write(body)
}

func (s *Server) partition() string {
	switch {
	case strings.HasPrefix(s.cfg.Region, "cn-"):
		return "aws-cn"
	case strings.HasPrefix(s.cfg.Region, "us-gov-"):
		return "aws-us-gov"
	}
	return "aws"
}

// splitRole gives account and bare name of an IAM role's ARN; sessions' ARNs
// leave the role's path out.
func splitRole(arn, fallbackAccount string) (account, name string) {
	parts := strings.SplitN(arn, ":", 6)
	if len(parts) != 6 {
		return fallbackAccount, arn
	}
	return parts[4], parts[5][strings.LastIndexByte(parts[5], '/')+1:]
}
