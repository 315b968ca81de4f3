// SPDX-License-Identifier: Apache-2.0

// Package permission decides who may do what with associations and
// credentials, and keeps the file of users.
//
// Nothing is allowed that a permission does not allow; there are no denying
// permissions. One permission must allow the whole of a request: two that each
// allow a part (one the namespace, the other the role) do not add up, because
// whoever wrote them did not mean their product.
package permission

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Action is what a caller wants to do, by the name that IAM has for it.
type Action string

// The actions.
const (
	CreateAssociation   Action = "eks:CreatePodIdentityAssociation"
	DescribeAssociation Action = "eks:DescribePodIdentityAssociation"
	ListAssociations    Action = "eks:ListPodIdentityAssociations"
	UpdateAssociation   Action = "eks:UpdatePodIdentityAssociation"
	DeleteAssociation   Action = "eks:DeletePodIdentityAssociation"
	TagResource         Action = "eks:TagResource"
	UntagResource       Action = "eks:UntagResource"
	ListTags            Action = "eks:ListTagsForResource"
	AssumeRole          Action = "eks-auth:AssumeRoleForPodIdentity"
	// PassRole is in no permission: passRoles grants it. It is what a Decision
	// names when a role is what was missing.
	PassRole Action = "iam:PassRole"
)

// Actions returns every action that a permission can name.
func Actions() []Action {
	return []Action{CreateAssociation, DescribeAssociation, ListAssociations, UpdateAssociation, DeleteAssociation,
		TagResource, UntagResource, ListTags, AssumeRole}
}

// Node is the node that a caller proved to be. UID may be empty.
type Node struct {
	Cluster string `yaml:"cluster" json:"cluster"`
	Name    string `yaml:"name" json:"name"`
	UID     string `yaml:"uid,omitempty" json:"uid,omitempty"`
}

// Principal is a caller that has proved who it is. The zero Principal may do
// nothing.
type Principal struct {
	// Name is for messages and records: a user's name, or of a node what its
	// maker chose.
	Name string
	// Node is set for an agent. It may ask for credentials in its own cluster, and
	// nothing else, whatever Policy says.
	Node *Node
	// Policy is what anybody else may do; nil is nothing.
	Policy *Policy
}

// String is the name.
func (p Principal) String() string { return p.Name }

// Request is what is asked for.
type Request struct {
	Action Action
	// Cluster is its name.
	Cluster string
	// Namespace is that of the association or pod. Empty: the request is about the
	// cluster as a whole, and only permissions for every namespace allow it.
	Namespace string
	// AnyNamespace: a permission for some namespace is enough. For lists, whose
	// entries are looked at one by one, and before the namespace is known.
	AnyNamespace bool
	// Resource is the ARN that a refusal names.
	Resource string
	// PassRoles are the roles that the pods will get; each must be allowed. Empty
	// strings do not count.
	PassRoles []string
	// ResourceTags are those that the resource has: the association's, or the
	// cluster's where there is no association yet. RequestTags are in the request.
	ResourceTags, RequestTags map[string]string
}

// Decision is the answer to a Request. The zero Decision refuses.
type Decision struct {
	Allowed bool
	// Action and Resource are what was refused: those of the request, or PassRole
	// and the role.
	Action   Action
	Resource string
	// Reason says, for operators, what the nearest permission lacks.
	Reason string
}

// Allow decides.
func (p Principal) Allow(r Request) Decision {
	if p.Node != nil {
		return p.allowNode(r)
	}
	d, _ := p.Policy.allow(r, nil)
	return d
}

// AllowSomewhere decides before the resource is known: whether some permission
// allows this action in this cluster. It is no permission for anything, and
// keeps those without from learning what there is.
func (p Principal) AllowSomewhere(r Request) Decision {
	if p.Node != nil {
		return p.allowNode(r)
	}
	for _, s := range p.Policy.list() {
		if s.action(r.Action) && matchAny(s.clusters, r.Cluster) {
			return Decision{Allowed: true}
		}
	}
	return Decision{Action: r.Action, Resource: r.Resource, Reason: "no permission for this action in this cluster"}
}

// AllowRetag decides on a change of the resource's tags to after. The caller
// must be allowed to retag what is there as well as what will be, and must not
// gain anything by it: else whoever may tag could give itself every resource
// that its other permissions find by a tag.
func (p Principal) AllowRetag(r Request, after map[string]string) Decision {
	d := p.Allow(r)
	if !d.Allowed || p.Node != nil {
		return d
	}
	will := r
	will.ResourceTags = after
	if d := p.Allow(will); !d.Allowed {
		d.Reason = "not with the tags that it would have: " + d.Reason
		return d
	}
	for _, s := range p.Policy.list() {
		if action, gained := p.Policy.gains(s, r, after); gained {
			return Decision{Action: r.Action, Resource: r.Resource, Reason: "the new tags would allow the caller " + string(action)}
		}
	}
	return Decision{Allowed: true}
}

func (p Principal) allowNode(r Request) Decision {
	if r.Action == AssumeRole && p.Node.Cluster != "" && p.Node.Cluster == r.Cluster {
		return Decision{Allowed: true}
	}
	return Decision{Action: r.Action, Resource: r.Resource, Reason: "a node may only ask for credentials in its own cluster"}
}

// Values are the accepted values of a condition. In YAML also a single one.
type Values []string

// Permission allows some actions in some clusters and namespaces.
type Permission struct {
	// Actions are names or patterns, such as "eks:Describe*" or "*".
	Actions []string `yaml:"actions" json:"actions"`
	// Clusters are names or patterns.
	Clusters []string `yaml:"clusters" json:"clusters"`
	// Namespaces are names or patterns. Only "*" allows what is about a cluster as
	// a whole.
	Namespaces []string `yaml:"namespaces" json:"namespaces"`
	// PassRoles are ARNs or patterns of the roles that associations may get, their
	// targets included. "*" and "?" match within one of the six parts of an ARN;
	// "*" alone is every role.
	PassRoles []string `yaml:"passRoles,omitempty" json:"passRoles,omitempty"`
	// Conditions all must hold: operator (StringEquals, StringLike), key
	// (aws:ResourceTag/KEY, aws:RequestTag/KEY), values of which one must match. A
	// tag that is not there matches nothing.
	Conditions map[string]map[string]Values `yaml:"conditions,omitempty" json:"conditions,omitempty"`
}

// Policy is a list of permissions, ready to decide. It does not change.
type Policy struct{ statements []statement }

type statement struct {
	actions, clusters, namespaces, passRoles []string
	resource, request                        []condition
}

type condition struct {
	tag    string
	like   bool
	values []string
}

// ErrPermission: a permission that cannot mean anything.
var ErrPermission = errors.New("invalid permission")

// Prefixes of the keys that conditions have.
const (
	resourceTag = "aws:ResourceTag/"
	requestTag  = "aws:RequestTag/"
)

// Compile checks permissions and makes a Policy of them.
func Compile(permissions []Permission) (*Policy, error) {
	p := &Policy{}
	for i, perm := range permissions {
		s, err := compile(perm)
		if err != nil {
			return nil, fmt.Errorf("%w %d: %w", ErrPermission, i+1, err)
		}
		p.statements = append(p.statements, s)
	}
	return p, nil
}

func compile(p Permission) (statement, error) {
	s := statement{actions: p.Actions, clusters: p.Clusters, namespaces: p.Namespaces, passRoles: p.PassRoles}
	for name, list := range map[string][]string{"actions": p.Actions, "clusters": p.Clusters, "namespaces": p.Namespaces} {
		if len(list) == 0 {
			return s, fmt.Errorf(`%s is missing; everything is ["*"]`, name)
		}
		if slices.Contains(list, "") {
			return s, fmt.Errorf("%s has an empty entry", name)
		}
	}
	for _, pattern := range p.Actions {
		// A name that never matches is a mistake that nobody would notice.
		if !slices.ContainsFunc(Actions(), func(a Action) bool { return match(pattern, string(a)) }) {
			return s, fmt.Errorf("there is no action %q", pattern)
		}
	}
	for _, pattern := range p.PassRoles {
		if pattern != "*" && len(strings.SplitN(pattern, ":", 6)) != 6 {
			return s, fmt.Errorf("passRoles has %q, which is no ARN: arn:PARTITION:iam::ACCOUNT:role/NAME, or * for every role", pattern)
		}
	}
	for _, operator := range slices.Sorted(maps.Keys(p.Conditions)) {
		if operator != "StringEquals" && operator != "StringLike" {
			return s, fmt.Errorf("there is no condition operator %q, only StringEquals and StringLike", operator)
		}
		for _, key := range slices.Sorted(maps.Keys(p.Conditions[operator])) {
			values := p.Conditions[operator][key]
			c := condition{like: operator == "StringLike", values: values}
			if len(values) == 0 {
				return s, fmt.Errorf("condition %s has no values", key)
			}
			var resource, request bool
			if c.tag, resource = strings.CutPrefix(key, resourceTag); resource && c.tag != "" {
				s.resource = append(s.resource, c)
			} else if c.tag, request = strings.CutPrefix(key, requestTag); request && c.tag != "" {
				s.request = append(s.request, c)
			} else {
				return s, fmt.Errorf("there is no condition key %q, only %sKEY and %sKEY", key, resourceTag, requestTag)
			}
		}
	}
	return s, nil
}

func (p *Policy) list() []statement {
	if p == nil {
		return nil
	}
	return p.statements
}

// allow decides, with the statements that only accepts, or all if it is nil. The
// second result is the one that allows.
func (p *Policy) allow(r Request, only func(statement) bool) (Decision, int) {
	best, nearest := -1, Decision{Action: r.Action, Resource: r.Resource, Reason: "no permission for this action"}
	for i, s := range p.list() {
		if only != nil && !only(s) {
			continue
		}
		step, d := s.allow(r)
		if d.Allowed {
			return d, i
		}
		if step > best {
			best, nearest = step, d
		}
	}
	return nearest, -1
}

// allow decides, and says how far it came.
func (s statement) allow(r Request) (int, Decision) {
	no := Decision{Action: r.Action, Resource: r.Resource}
	switch {
	case !s.action(r.Action):
		no.Reason = "no permission for this action"
		return 0, no
	case !matchAny(s.clusters, r.Cluster):
		no.Reason = "no permission in this cluster"
		return 1, no
	case !s.namespace(r):
		no.Reason = "no permission in this namespace"
		return 2, no
	case !hold(s.resource, r.ResourceTags):
		no.Reason = "a condition on the resource's tags does not hold"
		return 3, no
	case !hold(s.request, r.RequestTags):
		no.Reason = "a condition on the request's tags does not hold"
		return 4, no
	}
	for _, role := range r.PassRoles {
		if role != "" && !slices.ContainsFunc(s.passRoles, func(pattern string) bool { return matchARN(pattern, role) }) {
			return 5, Decision{Action: PassRole, Resource: role, Reason: "the role is not in passRoles"}
		}
	}
	return 6, Decision{Allowed: true}
}

func (s statement) action(a Action) bool { return matchAny(s.actions, string(a)) }

func (s statement) namespace(r Request) bool {
	if r.AnyNamespace {
		return true
	}
	if r.Namespace == "" {
		return slices.Contains(s.namespaces, "*")
	}
	return matchAny(s.namespaces, r.Namespace)
}

func hold(conditions []condition, tags map[string]string) bool {
	for _, c := range conditions {
		value, ok := tags[c.tag]
		if !ok || !slices.ContainsFunc(c.values, func(want string) bool {
			return want == value || c.like && match(want, value)
		}) {
			return false
		}
	}
	return true
}

// gains tells whether the change of tags makes s hold, and what that would allow
// which nothing allowed before.
func (p *Policy) gains(s statement, r Request, after map[string]string) (Action, bool) {
	if hold(s.resource, r.ResourceTags) || !hold(s.resource, after) || !matchAny(s.clusters, r.Cluster) ||
		r.Namespace != "" && !matchAny(s.namespaces, r.Namespace) {
		return "", false
	}
	for _, a := range Actions() {
		if s.action(a) && !slices.ContainsFunc(p.list(), func(had statement) bool {
			return had.action(a) && matchAny(had.clusters, r.Cluster) && hold(had.resource, r.ResourceTags) &&
				len(had.request) == 0 &&
				(r.Namespace != "" && matchAny(had.namespaces, r.Namespace) || covers(had.namespaces, s.namespaces)) &&
				(a != CreateAssociation && a != UpdateAssociation || covers(had.passRoles, s.passRoles))
		}) {
			return a, true
		}
	}
	return "", false
}

// covers tells whether patterns surely match whatever others do.
func covers(patterns, others []string) bool {
	return slices.Contains(patterns, "*") || !slices.ContainsFunc(others, func(o string) bool { return !slices.Contains(patterns, o) })
}

func matchAny(patterns []string, s string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return match(p, s) })
}

// match tells whether s is of the pattern, in which "*" stands for any
// characters and "?" for one. It takes at most len(pattern)·len(s) steps.
func match(pattern, s string) bool {
	p, i, star, mark := 0, 0, -1, 0
	for i < len(s) {
		switch {
		case p < len(pattern) && pattern[p] == '*':
			star, mark = p, i
			p++
		case p < len(pattern) && (pattern[p] == '?' || pattern[p] == s[i]):
			p++
			i++
		case star >= 0:
			mark++
			p, i = star+1, mark
		default:
			return false
		}
	}
	for p < len(pattern) && pattern[p] == '*' {
		p++
	}
	return p == len(pattern)
}

// matchARN matches part by part, so that a "*" for an account does not run on
// into the name.
func matchARN(pattern, arn string) bool {
	if pattern == "*" {
		return true
	}
	want, have := strings.SplitN(pattern, ":", 6), strings.SplitN(arn, ":", 6)
	if len(want) != 6 || len(have) != 6 {
		return false
	}
	for i := range want {
		if !match(want[i], have[i]) {
			return false
		}
	}
	return true
}
