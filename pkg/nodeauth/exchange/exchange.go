// SPDX-License-Identifier: Apache-2.0

// Package exchange is the server's side of pkg/nodeauth: it trades an agent's
// token for signing keys that are tied to the agent's node, and recognises the
// keys when requests are signed with them.
//
// Nothing is stored per key: the session token carries, sealed, all there is to
// know, so that any server can open what another has made.
package exchange

import (
	"context"
	"crypto/rand"
	"encoding/base32"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/association"
	"github.com/latchkey-dev/latchkey/pkg/evidence"
	"github.com/latchkey-dev/latchkey/pkg/nodeauth"
	"github.com/latchkey-dev/latchkey/pkg/permission"
	"github.com/latchkey-dev/latchkey/pkg/sigv4"
	"github.com/latchkey-dev/latchkey/pkg/tokencheck"
)

// MaxLife is how long keys live at most; never longer than the token they were
// given for.
const MaxLife = time.Hour

// DefaultAgents is the service account whose tokens prove a node, in clusters
// that name none.
const DefaultAgents = "kube-system/latchkey-agent"

// One sentinel per decision, for errors.Is. Every error of Exchange is an *Error
// that matches exactly one of them.
var (
	// ErrInvalid: not a token that proves a node. 400 InvalidTokenException.
	ErrInvalid = errors.New("the token proves no node")
	// ErrExpired: 400 InvalidTokenException, as if it were ErrInvalid.
	ErrExpired = errors.New("the token is expired")
	// ErrNotAgent: a good token, of a service account that is no agent's. 403
	// AccessDeniedException.
	ErrNotAgent = errors.New("the service account is not an agent's")
	// ErrUnavailable: nothing is known. 503 ServiceUnavailableException.
	ErrUnavailable = errors.New("tokens cannot be exchanged now")
)

// Error says why no keys were given.
type Error struct {
	kind    error
	message string
	cause   error
}

// Message is the text for the agent.
func (e *Error) Message() string { return e.message }

// Error is the text for the log.
func (e *Error) Error() string {
	text := e.kind.Error() + ": " + e.message
	if e.cause != nil {
		text += ": " + e.cause.Error()
	}
	return text
}

// Unwrap gives the cause, for the log only.
func (e *Error) Unwrap() error { return e.cause }

// Is matches the sentinel of the decision.
func (e *Error) Is(target error) bool { return target == e.kind }

// Node is a node that has been proved, and by whom.
type Node struct {
	Cluster string
	// Name and UID are the node's; UID is empty if the token named none.
	Name, UID string
	// Namespace, ServiceAccount, PodName and PodUID are the agent's.
	Namespace, ServiceAccount, PodName, PodUID string
	// Expires is when the keys end.
	Expires time.Time
}

// String names the node as audit and logs do.
func (n Node) String() string { return "node/" + n.Cluster + "/" + n.Name }

// Grant is what an agent gets.
type Grant struct {
	Node                                       Node
	AccessKeyID, SecretAccessKey, SessionToken string
	// JTI is the id of the token that was traded, for audit.
	JTI string
}

// String shows no secret.
func (g Grant) String() string { return "keys " + g.AccessKeyID + " of " + g.Node.String() }

// GoString shows no secret.
func (g Grant) GoString() string { return g.String() }

// LogValue shows no secret.
func (g Grant) LogValue() slog.Value { return slog.StringValue(g.String()) }

// Event is what Config.Observe is told of each exchange. It has no secret.
type Event struct {
	// Cluster is the cluster asked for. There may be none of that name.
	Cluster string
	// Peer is the other end of the connection, which may be a proxy; empty without
	// one.
	Peer string
	// Grant's secrets are empty; all of it is if Err is set.
	Grant Grant
	// Err is why there are no keys.
	Err error
}

// Tokens checks agents' tokens: a *tokencheck.Checker for nodeauth.Audience,
// which refuses the audience of pods.
type Tokens interface {
	Check(ctx context.Context, of association.Cluster, token string) (tokencheck.Subject, error)
}

// Clusters knows the clusters there are: an *association.Index.
type Clusters interface {
	Cluster(name string) (association.Cluster, bool)
	Ready() bool
}

// Config is what an Exchanger is made of. Zero values mean what the field says.
type Config struct {
	// Ring, Tokens and Clusters are required.
	Ring     *Ring
	Tokens   Tokens
	Clusters Clusters
	// Agents are the service accounts ("namespace/name") whose tokens prove a node
	// in clusters that name none; nil means DefaultAgents.
	Agents []string
	// Observe, if set, is told of each exchange. It must not block.
	Observe func(Event)
	// Now is the clock; nil means time.Now.
	Now func() time.Time
	// Log gets what an operator has to know; nil discards it.
	Log *slog.Logger
}

// Exchanger trades tokens for keys, and finds the keys again. It is a
// sigv4.Keys, and an http.Handler for nodeauth.Path. It may be used by several
// goroutines.
type Exchanger struct{ cfg Config }

// New makes an Exchanger.
func New(cfg Config) (*Exchanger, error) {
	if cfg.Ring == nil || cfg.Tokens == nil || cfg.Clusters == nil {
		return nil, errors.New("an exchanger needs a ring, tokens and clusters")
	}
	if cfg.Agents == nil {
		cfg.Agents = []string{DefaultAgents}
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Exchanger{cfg}, nil
}

// Exchange trades a token for keys. Errors are of type *Error.
func (e *Exchanger) Exchange(ctx context.Context, cluster association.Cluster, token string) (Grant, error) {
	return e.exchangeAs(ctx, cluster, true, token, "")
}

// exchangeAs is Exchange for a caller at peer. If the cluster is not known, it
// has a name only, and the token is refused like a bad one.
func (e *Exchanger) exchangeAs(ctx context.Context, cluster association.Cluster, known bool, token, peer string) (grant Grant, err error) {
	if known {
		grant, err = e.exchange(ctx, cluster, token)
	} else {
		err = &Error{kind: ErrInvalid, message: messageInvalid, cause: errNoCluster}
	}
	if e.cfg.Observe != nil {
		shown := grant
		shown.SecretAccessKey, shown.SessionToken = "", ""
		e.cfg.Observe(Event{Cluster: cluster.Name, Peer: peer, Grant: shown, Err: err})
	}
	return grant, err
}

func (e *Exchanger) exchange(ctx context.Context, cluster association.Cluster, token string) (Grant, error) {
	subject, err := e.cfg.Tokens.Check(ctx, cluster, token)
	if err != nil {
		return Grant{}, tokenError(err)
	}
	if !e.isAgent(cluster, subject.Namespace, subject.ServiceAccount) {
		return Grant{}, &Error{kind: ErrNotAgent, message: fmt.Sprintf(
			"Service account %s/%s does not prove nodes of cluster %s.", subject.Namespace, subject.ServiceAccount, cluster.Name)}
	}
	// Kubernetes before 1.30 does not write it. Such clusters use static keys.
	if subject.NodeName == "" {
		return Grant{}, &Error{kind: ErrInvalid, message: "The token names no node; it needs Kubernetes 1.30 or later."}
	}
	now := e.cfg.Now()
	expires := now.Add(MaxLife)
	if subject.Expires.Before(expires) {
		expires = subject.Expires
	}
	expires = expires.UTC().Truncate(time.Second)
	if !now.Before(expires) { // the checker allows for clocks that differ
		return Grant{}, &Error{kind: ErrExpired, message: messageInvalid}
	}
	random := make([]byte, 40)
	_, _ = rand.Read(random) // never fails since Go 1.24
	grant := Grant{
		Node: Node{
			Cluster: cluster.Name, Name: subject.NodeName, UID: subject.NodeUID,
			Namespace: subject.Namespace, ServiceAccount: subject.ServiceAccount,
			PodName: subject.PodName, PodUID: subject.PodUID,
			Expires: expires,
		},
		AccessKeyID:     nodeauth.AccessKeyPrefix + base32.StdEncoding.EncodeToString(random[:10])[:14],
		SecretAccessKey: base64.StdEncoding.EncodeToString(random[10:]),
		JTI:             subject.JTI,
	}
	content, err := json.Marshal(sealedOf(grant, cluster))
	if err != nil {
		return Grant{}, &Error{kind: ErrUnavailable, message: messageUnavailable, cause: fmt.Errorf("encoding: %w", err)}
	}
	session, ok := e.cfg.Ring.seal(grant.AccessKeyID, content)
	if !ok {
		return Grant{}, &Error{kind: ErrUnavailable, message: messageUnavailable, cause: errors.New("there is no sealing key")}
	}
	grant.SessionToken = session
	return grant, nil
}

const (
	messageUnavailable = "Node credentials cannot be given now, try again."
	// messageInvalid is one text for all that is wrong with a token before its
	// signature counts, and for a cluster that does not exist. The audit log has
	// which it was.
	messageInvalid = "There is no cluster of this name, or the token is not one that it gave to an agent, or is out of date."
)

// errNoCluster is the cause of a refusal, for the log.
var errNoCluster = errors.New("there is no cluster of this name")

// tokenError gives an error of pkg/tokencheck its meaning here.
func tokenError(err error) error {
	e := &Error{kind: ErrUnavailable, message: messageUnavailable, cause: err}
	var refused *tokencheck.Error
	if errors.As(err, &refused) {
		e.message = refused.Message()
	}
	switch {
	case errors.Is(err, tokencheck.ErrInvalid):
		e.kind = ErrInvalid
		var reasoned interface{ Reason() evidence.Reason }
		if !errors.As(err, &reasoned) || reasoned.Reason() != tokencheck.ReasonNotAlive && reasoned.Reason() != tokencheck.ReasonReviewMismatch {
			e.message = messageInvalid
		}
	case errors.Is(err, tokencheck.ErrExpired):
		e.kind, e.message = ErrExpired, messageInvalid
	}
	return e
}

func (e *Exchanger) isAgent(cluster association.Cluster, namespace, serviceAccount string) bool {
	agents := cluster.AgentServiceAccounts
	if len(agents) == 0 {
		agents = e.cfg.Agents
	}
	return slices.Contains(agents, namespace+"/"+serviceAccount)
}

// sealed is the content of a session token. Names are short: it travels with
// every request.
type sealed struct {
	Secret         string `json:"s"`
	Cluster        string `json:"c"`
	ClusterMade    int64  `json:"m"` // CreatedAt in ms: a cluster of the same name made later is another
	Node           string `json:"n"`
	NodeUID        string `json:"u,omitempty"`
	Namespace      string `json:"ns"`
	ServiceAccount string `json:"sa"`
	Pod            string `json:"p"`
	PodUID         string `json:"pu"`
	Expires        int64  `json:"e"`
}

func sealedOf(g Grant, c association.Cluster) sealed {
	n := g.Node
	return sealed{
		Secret: g.SecretAccessKey, Cluster: n.Cluster, ClusterMade: c.CreatedAt.UnixMilli(),
		Node: n.Name, NodeUID: n.UID, Namespace: n.Namespace, ServiceAccount: n.ServiceAccount,
		Pod: n.PodName, PodUID: n.PodUID, Expires: n.Expires.Unix(),
	}
}

// Lookup implements sigv4.Keys; a key's Principal is a permission.Principal with
// its Node set, which may ask for credentials and nothing else. Keys end with their time, with their cluster,
// and when their service account is no agent's any more.
func (e *Exchanger) Lookup(ctx context.Context, accessKeyID, sessionToken string) (sigv4.Key, error) {
	content, err := e.cfg.Ring.open(ctx, accessKeyID, sessionToken)
	if errors.Is(err, errSealed) {
		return sigv4.Key{}, sigv4.ErrUnknownKey
	}
	if err != nil {
		return sigv4.Key{}, &Error{kind: ErrUnavailable, message: messageUnavailable, cause: err}
	}
	var s sealed
	if err := json.Unmarshal(content, &s); err != nil {
		// Sealed by a later version of this server.
		return sigv4.Key{}, &Error{kind: ErrUnavailable, message: messageUnavailable, cause: errors.New("a session token of another form")}
	}
	node := Node{
		Cluster: s.Cluster, Name: s.Node, UID: s.NodeUID, Namespace: s.Namespace, ServiceAccount: s.ServiceAccount,
		PodName: s.Pod, PodUID: s.PodUID, Expires: time.Unix(s.Expires, 0).UTC(),
	}
	key := sigv4.Key{Secret: s.Secret, Principal: permission.Principal{
		Name: node.String(),
		Node: &permission.Node{Cluster: node.Cluster, Name: node.Name, UID: node.UID},
	}}
	if !e.cfg.Now().Before(node.Expires) {
		return key, sigv4.ErrExpiredKey
	}
	if !e.cfg.Clusters.Ready() {
		return sigv4.Key{}, &Error{kind: ErrUnavailable, message: messageUnavailable, cause: errors.New("the clusters are not known yet")}
	}
	cluster, ok := e.cfg.Clusters.Cluster(s.Cluster)
	if !ok || cluster.CreatedAt.UnixMilli() != s.ClusterMade || !e.isAgent(cluster, s.Namespace, s.ServiceAccount) {
		return sigv4.Key{}, sigv4.ErrUnknownKey
	}
	return key, nil
}
