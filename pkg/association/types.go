// SPDX-License-Identifier: Apache-2.0

// Package association holds pod identity associations and the clusters that
// they are of: the model, its validation with the texts clients know, a store
// in etcd, and an index in memory that follows the store.
//
// Everything that must hold under a race is a comparison inside one etcd
// transaction: one association per cluster, namespace and service account; at
// most so many per cluster; none of a cluster that is gone. Nothing depends on
// a lock of this process, so several servers may work on one etcd.
//
// There is no HTTP here, and no permission: callers hand in what to check, as a
// function that sees the current value.
package association

import (
	"encoding/json"
	"time"
)

// Association says which role the pods of one service account get. Forms and
// meanings are those of the EKS API's PodIdentityAssociation.
type Association struct {
	// ID is "a-" and 17 of [a-z0-9].
	ID string
	// ARN is arn:PARTITION:eks:REGION:ACCOUNT:podidentityassociation/CLUSTER/ID.
	ARN string
	// Cluster, Namespace and ServiceAccount are what it is for: at most one
	// association has the same three. They never change.
	Cluster, Namespace, ServiceAccount string
	// RoleARN is the role of the first hop, of the cluster's own account.
	RoleARN string
	// TargetRoleARN is the role of the second hop; empty: there is one hop.
	TargetRoleARN string
	// ExternalID is sent with the second hop:
	// REGION/ACCOUNT/CLUSTER/NAMESPACE/SERVICEACCOUNT. Empty without a target.
	ExternalID string
	// Policy is a session policy, a JSON object; empty: none.
	Policy string
	// OwnerARN is the add-on that made it, and that alone may change it.
	OwnerARN string
	// DisableSessionTags leaves the six session tags out.
	DisableSessionTags bool
	// Tags is never nil in what the store returns. The index leaves it nil.
	Tags map[string]string
	// CreatedAt and ModifiedAt are in UTC, with milliseconds. Changes of tags do
	// not move ModifiedAt.
	CreatedAt, ModifiedAt time.Time
	// Revision is the store's revision of its last change, tags included.
	Revision int64
}

// Cluster is a Kubernetes cluster that associations may be made for.
type Cluster struct {
	// Name is 1 to 100 of [0-9A-Za-z_-], beginning with a letter or digit.
	Name string
	// ARN is arn:PARTITION:eks:REGION:ACCOUNT:cluster/NAME. PutCluster makes it of
	// the other three where it is empty.
	ARN string
	// Region and Account (12 digits) are those of ARN. None of the four can be
	// changed.
	Region, Account string
	// Issuers are the accepted values of a token's iss, exactly.
	Issuers []string
	// Keys is the pinned JSON Web Key Set, public keys only. Tokens of this
	// cluster are verified with nothing else.
	Keys json.RawMessage
	// AllowedRoles are patterns (see MatchARN), one of which every role of an
	// association must match, its target included. Empty: every role, as far as
	// Account and AllowedAccounts go.
	AllowedRoles []string
	// AllowedAccounts are the accounts that target roles may be of, besides
	// Account itself; "*" is every account.
	AllowedAccounts []string
	// TokenReview asks the cluster's API server too; nil: the keys alone judge.
	TokenReview *TokenReview
	// AgentServiceAccounts ("namespace/name") are whose tokens prove a node; empty
	// leaves it to the reader's default.
	AgentServiceAccounts []string
	// Tags are for people, and for conditions of permissions.
	Tags map[string]string
	// CreatedAt and ModifiedAt are in UTC, with milliseconds.
	CreatedAt, ModifiedAt time.Time
	// Revision is the store's revision of its last change.
	Revision int64
}

// What TokenReview.OnOutage may be.
const (
	// OnOutageRefuse answers "try again" while the API server is away. So does an
	// empty value.
	OnOutageRefuse = "refuse"
	// OnOutageKeys goes on with the keys alone.
	OnOutageKeys = "keys"
)

// TokenReview says how to ask a cluster's API server whether a token's pod
// still lives.
type TokenReview struct {
	// Kubeconfig is a file on the server's machine, Context a context in it
	// (empty: the current one).
	Kubeconfig string `json:"kubeconfig,omitempty"`
	Context    string `json:"context,omitempty"`
	// OnOutage is OnOutageRefuse (also if empty) or OnOutageKeys.
	OnOutage string `json:"onOutage,omitempty"`
}

// CreateInput is what CreatePodIdentityAssociation gives.
type CreateInput struct {
	Cluster, Namespace, ServiceAccount, RoleARN string
	// TargetRoleARN and Policy: nil and empty both mean none.
	TargetRoleARN, Policy *string
	DisableSessionTags    bool
	Tags                  map[string]string
	// ClientToken makes repeating the call safe; empty: it is not.
	ClientToken string
	// OwnerARN is set by add-ons only.
	OwnerARN string
	// Allow, if there is one, judges the cluster as it is when the association is
	// made: the transaction then requires that it still is what Allow saw. It runs
	// before anything is told of what is there, maybe more than once. Its error is
	// returned as it is.
	Allow func(Cluster) error
	// Check, if there is one, judges a result that was made by an earlier call
	// with the same ClientToken, before it is returned, in the cluster as it is
	// now. Its error is Create's.
	Check func(in Cluster, existing Association) error
}

// UpdateInput is what UpdatePodIdentityAssociation gives. At least one of the
// pointers must be set; nil keeps.
type UpdateInput struct {
	Cluster, ID string
	RoleARN     *string
	// TargetRoleARN and Policy: empty clears.
	TargetRoleARN, Policy *string
	DisableSessionTags    *bool
	// Tags replaces all tags, in the same transaction. No client's update has it.
	Tags *map[string]string
	// ClientToken makes repeating the call safe: a repeated update does not undo
	// what came after the first. Empty: it is not.
	ClientToken string
	// Check, if there is one, judges the association that is about to change; the
	// transaction then requires that it still is what Check saw. It may run more
	// than once. Its error is returned as it is.
	Check func(before Association) error
	// OwnerARN must be the association's, if that has one.
	OwnerARN string
}

// DeleteInput is what DeletePodIdentityAssociation gives. Check and OwnerARN
// are as in UpdateInput.
type DeleteInput struct {
	Cluster, ID string
	Check       func(before Association) error
	OwnerARN    string
}

// ListInput is what ListPodIdentityAssociations gives.
type ListInput struct {
	Cluster string
	// Namespace and ServiceAccount filter, exactly; empty: any.
	Namespace, ServiceAccount string
	// MaxResults is 1 to 100; nil: 100.
	MaxResults *int
	// NextToken is that of the page before; it serves the same cluster and
	// filters only.
	NextToken string
	// Keep, if there is one, leaves out what the caller may not see. Pages are
	// full all the same.
	Keep func(Association) bool
}

// ListOutput is a page, in the order of ID.
type ListOutput struct {
	Associations []Association
	// NextToken is empty on the last page.
	NextToken string
}

// Limits of the contract with clients.
const (
	// DefaultLimit is how many associations a cluster may have.
	DefaultLimit = 5000
	// MaxLimit bounds Config.Limit.
	MaxLimit = 36 * 36 * 36
	// DefaultTokenLife is how long a client token is remembered.
	DefaultTokenLife = 24 * time.Hour
	// MaxTags is how many tags a resource may have.
	MaxTags = 50
	// MaxTagKey and MaxTagValue are in characters, not bytes.
	MaxTagKey, MaxTagValue = 128, 256
	// MaxPolicy is in characters: STS's bound for a session policy in the clear.
	MaxPolicy = 2048
	// MaxPage is the most and the default of ListInput.MaxResults.
	MaxPage = 100
	// IDLength is that of an association's ID.
	IDLength = 19
)
