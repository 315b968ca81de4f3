// SPDX-License-Identifier: Apache-2.0

package sts

import (
	"encoding/json"
	"encoding/xml"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/latchkey-dev/latchkey/test/standin/wire"
)

// Marks by which everything this stand-in issues can be told from the real
// service's.
const (
	AccessKeyPrefix    = wire.AccessKeyPrefix
	SecretPrefix       = wire.SecretPrefix
	SessionTokenPrefix = wire.SessionTokenPrefix
)

// maxBody is far beyond any request.
const maxBody = 256 << 10

// Caller is somebody with long-lived keys.
type Caller struct {
	SecretAccessKey string
	// ARN is who that is; empty means arn:aws:iam::111122223333:user/ and the
	// access key id.
	ARN string
}

// Role is a role that can be assumed.
type Role struct {
	// ARN may hold a path.
	ARN string
	// MaxSession is MaxSessionDuration; 0 means an hour.
	MaxSession time.Duration
	// Trusts are the ARNs of callers, or of roles whose sessions call; none means
	// everybody.
	Trusts []string
	// ExternalID, if set, must be sent.
	ExternalID string
	// RequireTags are session tags that must be there, inherited ones included
	// (condition aws:RequestTag/KEY); value "*" is any.
	RequireTags map[string]string
	// NoTagSession: the trust policy lacks sts:TagSession.
	NoTagSession bool
}

// Config is what the stand-in is made of.
type Config struct {
	// Callers maps access key ids to their owners. Without any, nobody may call.
	Callers map[string]Caller
	// Region must be the one requests are signed for; empty accepts any.
	Region string
	// AnyRole lets every well-formed role be assumed, as one of Role's zero
	// values, unless it was added or removed.
	AnyRole bool
	// PackedLimit bounds the bytes of policy and tags together; 0 means 4096. The
	// real measure is another and not published.
	PackedLimit int
	// SessionTokenBytes is the session token's length; 0 means 700.
	SessionTokenBytes int
	// Now is the clock; nil means time.Now.
	Now func() time.Time
}

// Call is what is remembered of one request. It has no secret.
type Call struct {
	Time      time.Time
	RequestID string
	// Action is AssumeRole or GetCallerIdentity.
	Action string
	// CallerARN is the ARN of the caller, once the signature is good.
	CallerARN string
	// Chained: the caller is a role's session.
	Chained bool
	// Region is the one signed for, Host the header, Connection the client's end.
	Region, Host, Connection, UserAgent string

	RoleARN, SessionName, ExternalID, Policy string
	// Duration is 0 if it was not sent.
	Duration time.Duration
	// Tags and TransitiveKeys are those sent.
	Tags           map[string]string
	TransitiveKeys []string

	// Status is the HTTP status, 0 if the connection was cut or the client left.
	Status int
	// Code is empty on success.
	Code string
	// Fault is the fault that shaped this answer.
	Fault Kind
}

// session is what the stand-in has issued.
type session struct {
	secret, token, arn, roleARN, id string
	expires                         time.Time
	transitive                      map[string]string
}

// Server is the stand-in. It is an http.Handler and safe for concurrent use.
type Server struct {
	cfg Config

	mu       sync.Mutex
	roles    map[string]Role
	removed  map[string]bool
	sessions map[string]session
	faults   wire.Faults[Fault]
	calls    []Call
}

// New makes a stand-in without roles.
func New(cfg Config) *Server {
	if cfg.PackedLimit == 0 {
		cfg.PackedLimit = 4096
	}
	if cfg.SessionTokenBytes == 0 {
		cfg.SessionTokenBytes = 700
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	cfg.Callers = maps.Clone(cfg.Callers)
	return &Server{cfg: cfg, roles: map[string]Role{}, removed: map[string]bool{}, sessions: map[string]session{}}
}

// AddRole adds or replaces a role.
func (s *Server) AddRole(r Role) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.removed, r.ARN)
	s.roles[r.ARN] = r
}

// RemoveRole removes a role: nobody may assume it any more.
func (s *Server) RemoveRole(arn string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.roles, arn)
	s.removed[arn] = true
}

// Calls returns what was asked so far, in the order in which it was answered.
func (s *Server) Calls() []Call {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.calls)
}

// TagsOf gives the transitive tags of a session that the stand-in has made, by
// its access key id.
func (s *Server) TagsOf(accessKeyID string) map[string]string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.sessions[accessKeyID].transitive)
}

// apiError is an answer of the service that is not a success.
type apiError struct {
	status        int
	code, message string
}

func refuse(status int, code, format string, args ...any) *apiError {
	return &apiError{status, code, fmt.Sprintf(format, args...)}
}

// caller is who signed a request.
type caller struct {
	arn, roleARN, id string
	session          *session // nil for long-lived keys
}

// ServeHTTP answers one request.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	call := Call{
		Time: s.cfg.Now(), RequestID: wire.RequestID(), Host: r.Host, Connection: r.RemoteAddr, UserAgent: r.UserAgent(),
	}
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.calls = append(s.calls, call)
	}()
	body, err := io.ReadAll(io.LimitReader(r.Body, maxBody+1))
	if err != nil || len(body) > maxBody {
		call.Status, call.Code = http.StatusBadRequest, "MalformedInput"
		s.writeError(w, call.RequestID, nil, refuse(call.Status, call.Code, "the body cannot be read"))
		return
	}
	form, failure := s.parse(r, body, &call)
	fault := s.nextFault(call)
	call.Fault = fault.Kind
	if !wire.Wait(r.Context(), fault.Delay, fault.Hold) {
		return
	}
	var answer any
	switch {
	case fault.Kind == Reset:
		wire.Reset(w)
		return
	case fault.Kind == Refuse:
		failure = refuse(fault.Status, fault.Code, "%s", fault.Message)
	case failure == nil:
		answer, failure = s.act(r, body, form, &call, fault)
	}
	if failure != nil {
		call.Status, call.Code = failure.status, failure.code
		s.writeError(w, call.RequestID, &fault, failure)
		return
	}
	call.Status = http.StatusOK
	w.Header().Set("Content-Type", "text/xml")
	w.Header().Set("X-Amzn-Requestid", call.RequestID)
	w.Header().Set("Date", s.cfg.Now().UTC().Format(http.TimeFormat))
	out, _ := xml.Marshal(answer)
	if fault.Kind == Body {
		out = fault.Body
	}
	if fault.Kind == Truncated {
		wire.Truncate(w, out)
	}
	_, _ = w.Write(out)
}

// parse reads the form, and notes what is asked, before anything is judged.
func (s *Server) parse(r *http.Request, body []byte, call *Call) (url.Values, *apiError) {
	if r.Method != http.MethodPost || r.URL.Path != "/" {
		return nil, refuse(http.StatusNotFound, "UnknownOperationException", "POST / is all there is")
	}
	form, err := url.ParseQuery(string(body))
	if err != nil {
		return nil, refuse(http.StatusBadRequest, "MalformedQueryString", "the form cannot be read")
	}
	call.Action = form.Get("Action")
	call.RoleARN, call.SessionName = form.Get("RoleArn"), form.Get("RoleSessionName")
	call.ExternalID, call.Policy = form.Get("ExternalId"), form.Get("Policy")
	if seconds, err := strconv.Atoi(form.Get("DurationSeconds")); err == nil {
		call.Duration = time.Duration(seconds) * time.Second
	}
	for i := 1; form.Has(fmt.Sprintf("Tags.member.%d.Key", i)); i++ {
		if call.Tags == nil {
			call.Tags = map[string]string{}
		}
		call.Tags[form.Get(fmt.Sprintf("Tags.member.%d.Key", i))] = form.Get(fmt.Sprintf("Tags.member.%d.Value", i))
	}
	for i := 1; form.Has(fmt.Sprintf("TransitiveTagKeys.member.%d", i)); i++ {
		call.TransitiveKeys = append(call.TransitiveKeys, form.Get(fmt.Sprintf("TransitiveTagKeys.member.%d", i)))
	}
	if form.Get("Version") != "2011-06-15" {
		return nil, refuse(http.StatusBadRequest, "NoSuchVersion", "The requested version ( %s ) is not valid.", form.Get("Version"))
	}
	return form, nil
}

func (s *Server) act(r *http.Request, body []byte, form url.Values, call *Call, fault Fault) (any, *apiError) {
	who, failure := s.checkSignature(r, body, call)
	if failure != nil {
		return nil, failure
	}
	call.CallerARN, call.Chained = who.arn, who.session != nil
	switch call.Action {
	case "AssumeRole":
		return s.assumeRole(form, call, who, fault)
	case "GetCallerIdentity":
		account := strings.Split(who.arn, ":")[4]
		return &identityResponse{
			Result:   identityResult{Arn: who.arn, UserID: who.id, Account: account},
			Metadata: metadata{call.RequestID},
		}, nil
	}
	return nil, refuse(http.StatusBadRequest, "InvalidAction", "Could not find operation %s for version 2011-06-15", call.Action)
}

func (s *Server) assumeRole(form url.Values, call *Call, who caller, fault Fault) (any, *apiError) {
	if failure := s.validate(form, call); failure != nil {
		return nil, failure
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	role, known := s.roles[call.RoleARN]
	if !known && s.cfg.AnyRole && !s.removed[call.RoleARN] {
		role, known = Role{ARN: call.RoleARN}, true
	}
	denied := func(action string) *apiError {
		return refuse(http.StatusForbidden, "AccessDenied",
			"User: %s is not authorized to perform: sts:%s on resource: %s", who.arn, action, call.RoleARN)
	}
	inherited := map[string]string{}
	if who.session != nil {
		inherited = who.session.transitive
	}
	all := maps.Clone(inherited)
	maps.Copy(all, call.Tags)
	switch {
	case !known, len(role.Trusts) > 0 && !slices.Contains(role.Trusts, who.arn) && (who.roleARN == "" || !slices.Contains(role.Trusts, who.roleARN)):
		return nil, denied("AssumeRole")
	case role.ExternalID != "" && role.ExternalID != call.ExternalID:
		return nil, denied("AssumeRole")
	case role.NoTagSession && len(all) > 0:
		return nil, denied("TagSession")
	}
	for k, want := range role.RequireTags {
		if got, there := all[k]; !there || want != "*" && got != want {
			return nil, denied("AssumeRole")
		}
	}
	for k := range call.Tags {
		if _, there := inherited[k]; there {
			return nil, refuse(http.StatusBadRequest, "InvalidParameterValue",
				"One of the specified transitive tag keys can't be set because it conflicts with a transitive tag key from the calling session.")
		}
	}
	duration := call.Duration
	if duration == 0 {
		duration = time.Hour
	}
	longest := role.MaxSession
	if longest == 0 {
		longest = time.Hour
	}
	if who.session != nil && duration > time.Hour {
		return nil, refuse(http.StatusBadRequest, "ValidationError",
			"The requested DurationSeconds exceeds the 1 hour session limit for roles assumed by role chaining.")
	}
	if duration > longest {
		return nil, refuse(http.StatusBadRequest, "ValidationError",
			"The requested DurationSeconds exceeds the MaxSessionDuration set for this role.")
	}
	transitive := maps.Clone(inherited)
	for _, k := range call.TransitiveKeys {
		transitive[k] = call.Tags[k]
	}
	parts := strings.SplitN(role.ARN, ":", 6)
	name := parts[5][strings.LastIndexByte(parts[5], '/')+1:]
	key, secret, token := wire.Credentials(s.cfg.SessionTokenBytes)
	made := session{
		secret: secret, token: token,
		arn:     fmt.Sprintf("arn:%s:sts::%s:assumed-role/%s/%s", parts[1], parts[4], name, call.SessionName),
		roleARN: role.ARN,
		id:      wire.RoleID() + ":" + call.SessionName,
		expires: s.cfg.Now().Add(duration).UTC().Truncate(time.Second), transitive: transitive,
	}
	s.sessions[key] = made
	answer := &assumeRoleResponse{
		Result: assumeRoleResult{
			User: &assumedRoleUser{Arn: made.arn, ID: made.id},
			Credentials: &sessionCredentials{
				AccessKeyID: key, SecretAccessKey: made.secret, SessionToken: made.token, Expiration: made.expires.Format(time.RFC3339),
			},
			PackedPolicySize: packed(call) * 100 / s.cfg.PackedLimit,
		},
		Metadata: metadata{call.RequestID},
	}
	switch fault.Kind {
	case NoCredentials:
		answer.Result.Credentials = nil
	case NoUser:
		answer.Result.User = nil
	case Expired:
		answer.Result.Credentials.Expiration = s.cfg.Now().Add(-time.Minute).UTC().Format(time.RFC3339)
	}
	return answer, nil
}

func packed(call *Call) int {
	n := len(call.Policy)
	for k, v := range call.Tags {
		n += len(k) + len(v)
	}
	return n
}

// The forms of the service's model.
var (
	roleForm        = regexp.MustCompile(`^arn:[a-z-]+:iam::\d{12}:role/[\x21-\x7e]+$`)
	sessionNameForm = regexp.MustCompile(`^[\w+=,.@-]{2,64}$`)
	externalIDForm  = regexp.MustCompile(`^[\w+=,.@:/-]+$`)
	tagForm         = regexp.MustCompile(`^[\p{L}\p{Z}\p{N}_.:/=+\-@]*$`)
)

// validate applies the limits of the service's model.
func (s *Server) validate(form url.Values, call *Call) *apiError {
	constraint := func(member, value string) *apiError {
		return refuse(http.StatusBadRequest, "ValidationError",
			"1 validation error detected: Value '%s' at '%s' failed to satisfy constraint", value, member)
	}
	if !roleForm.MatchString(call.RoleARN) || len(call.RoleARN) > 2048 {
		return refuse(http.StatusBadRequest, "ValidationError", "%s is invalid", call.RoleARN)
	}
	if !sessionNameForm.MatchString(call.SessionName) {
		return constraint("roleSessionName", call.SessionName)
	}
	if form.Has("ExternalId") && (len(call.ExternalID) < 2 || len(call.ExternalID) > 1224 || !externalIDForm.MatchString(call.ExternalID)) {
		return constraint("externalId", call.ExternalID)
	}
	if raw := form.Get("DurationSeconds"); form.Has("DurationSeconds") {
		if seconds, err := strconv.Atoi(raw); err != nil || seconds < 900 || seconds > 43200 {
			return constraint("durationSeconds", raw)
		}
	}
	if form.Has("Policy") {
		if len(call.Policy) > 2048 {
			return constraint("policy", call.Policy)
		}
		var object map[string]any
		if json.Unmarshal([]byte(call.Policy), &object) != nil {
			return refuse(http.StatusBadRequest, "MalformedPolicyDocument", "Syntax errors in policy.")
		}
	}
	if len(call.Tags) > 50 || form.Has("Tags.member.51.Key") {
		return constraint("tags", strconv.Itoa(len(call.Tags)))
	}
	if form.Has(fmt.Sprintf("Tags.member.%d.Key", len(call.Tags)+1)) {
		return refuse(http.StatusBadRequest, "InvalidParameterValue", "Duplicate tag keys found.")
	}
	for k, v := range call.Tags {
		if k == "" || utf8.RuneCountInString(k) > 128 || !tagForm.MatchString(k) || strings.HasPrefix(strings.ToLower(k), "aws:") {
			return constraint("tags.member.key", k)
		}
		if utf8.RuneCountInString(v) > 256 || !tagForm.MatchString(v) {
			return constraint("tags.member.value", v)
		}
	}
	for _, k := range call.TransitiveKeys {
		if _, there := call.Tags[k]; !there {
			return refuse(http.StatusBadRequest, "InvalidParameterValue",
				"The specified transitive tag key must be included in the requested tags.")
		}
	}
	if size := packed(call); size > s.cfg.PackedLimit {
		return refuse(http.StatusBadRequest, "PackedPolicyTooLarge",
			"Packed size of session tags consumes %d%% of allotted space", size*100/s.cfg.PackedLimit)
	}
	return nil
}

// The answers, as the service's model has them.
type (
	metadata struct {
		RequestID string `xml:"RequestId"`
	}
	assumeRoleResponse struct {
		XMLName  xml.Name         `xml:"https://sts.amazonaws.com/doc/2011-06-15/ AssumeRoleResponse"`
		Result   assumeRoleResult `xml:"AssumeRoleResult"`
		Metadata metadata         `xml:"ResponseMetadata"`
	}
	assumeRoleResult struct {
		User             *assumedRoleUser    `xml:"AssumedRoleUser,omitempty"`
		Credentials      *sessionCredentials `xml:"Credentials,omitempty"`
		PackedPolicySize int                 `xml:"PackedPolicySize"`
	}
	assumedRoleUser struct {
		Arn string
		ID  string `xml:"AssumedRoleId"`
	}
	sessionCredentials struct {
		AccessKeyID     string `xml:"AccessKeyId"`
		SecretAccessKey string
		SessionToken    string
		Expiration      string
	}
	identityResponse struct {
		XMLName  xml.Name       `xml:"https://sts.amazonaws.com/doc/2011-06-15/ GetCallerIdentityResponse"`
		Result   identityResult `xml:"GetCallerIdentityResult"`
		Metadata metadata       `xml:"ResponseMetadata"`
	}
	identityResult struct {
		Arn     string
		UserID  string `xml:"UserId"`
		Account string
	}
	errorResponse struct {
		XMLName   xml.Name    `xml:"https://sts.amazonaws.com/doc/2011-06-15/ ErrorResponse"`
		Error     errorMember `xml:"Error"`
		RequestID string      `xml:"RequestId"`
	}
	errorMember struct{ Type, Code, Message string }
)

func (s *Server) writeError(w http.ResponseWriter, requestID string, fault *Fault, e *apiError) {
	h := w.Header()
	h.Set("X-Amzn-Requestid", requestID)
	h.Set("Date", s.cfg.Now().UTC().Format(http.TimeFormat))
	if fault != nil && fault.Kind == Refuse && fault.Body != nil {
		// Something in between answered, not the service.
		h.Set("Content-Type", "text/html")
		w.WriteHeader(e.status)
		_, _ = w.Write(fault.Body)
		return
	}
	kind := "Sender"
	if e.status >= 500 {
		kind = "Receiver"
	}
	h.Set("Content-Type", "text/xml")
	out, _ := xml.Marshal(errorResponse{Error: errorMember{kind, e.code, e.message}, RequestID: requestID})
	w.WriteHeader(e.status)
	_, _ = w.Write(out)
}
