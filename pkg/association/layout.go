// SPDX-License-Identifier: Apache-2.0

package association

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// What is where below the prefix. A cluster's name has no slash, nor has a
// namespace or service account.
//
//	a/CLUSTER/SLOT           the association in that slot, a record
//	c/CLUSTER                the cluster, a clusterRecord
//	s/CLUSTER/NAMESPACE/SA   the ID of that service account's association
//	t/CLUSTER/OP/HASH        a client token, a tokenRecord, with a lease
//
// A slot is a number below the limit, as three digits to the base 36. It is
// also the first three characters of the ID's random part, so that the order of
// keys is that of IDs. That a slot is taken once makes the limit exact without
// a counter, which all creates of a cluster would have to wait for.
type layout struct{ prefix string }

func newLayout(prefix string) layout {
	if prefix == "" {
		prefix = DefaultPrefix
	}
	return layout{strings.TrimSuffix(prefix, "/") + "/"}
}

const slotDigits = 3

func slotString(slot int) string {
	s := strconv.FormatInt(int64(slot), 36)
	return strings.Repeat("0", slotDigits-len(s)) + s
}

// slotOf reads the slot of a well-formed ID.
func slotOf(id string) (string, bool) {
	if len(id) != IDLength || !strings.HasPrefix(id, "a-") {
		return "", false
	}
	for i := 2; i < len(id); i++ {
		if c := id[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') {
			return "", false
		}
	}
	return id[2 : 2+slotDigits], true
}

func (l layout) cluster(name string) string { return l.prefix + "c/" + name }
func (l layout) clusters() string           { return l.prefix + "c/" }
func (l layout) association(cluster, slot string) string {
	return l.prefix + "a/" + cluster + "/" + slot
}
func (l layout) associations(cluster string) string { return l.prefix + "a/" + cluster + "/" }
func (l layout) subject(cluster, ns, sa string) string {
	return l.prefix + "s/" + cluster + "/" + ns + "/" + sa
}
func (l layout) subjects(cluster string) string { return l.prefix + "s/" + cluster + "/" }
func (l layout) tokens(cluster string) string   { return l.prefix + "t/" + cluster + "/" }
func (l layout) token(cluster, op, hash string) string {
	return l.prefix + "t/" + cluster + "/" + op + "/" + hash
}

// watched is the range that has the associations and the clusters and nothing
// else: "0" follows "/".
func (l layout) watched() (from, end string) { return l.prefix + "a/", l.prefix + "c0" }

// record is an association as it is stored. What its ARN says is not repeated.
type record struct {
	ARN                string            `json:"arn"`
	Namespace          string            `json:"ns"`
	ServiceAccount     string            `json:"sa"`
	RoleARN            string            `json:"role"`
	TargetRoleARN      string            `json:"target,omitempty"`
	Policy             string            `json:"policy,omitempty"`
	OwnerARN           string            `json:"owner,omitempty"`
	DisableSessionTags bool              `json:"noSessionTags,omitempty"`
	Tags               map[string]string `json:"tags,omitempty"`
	Created            int64             `json:"created"` // milliseconds
	Modified           int64             `json:"modified"`
}

func encode(a *Association) (string, error) {
	b, err := json.Marshal(record{
		ARN: a.ARN, Namespace: a.Namespace, ServiceAccount: a.ServiceAccount,
		RoleARN: a.RoleARN, TargetRoleARN: a.TargetRoleARN, Policy: a.Policy, OwnerARN: a.OwnerARN,
		DisableSessionTags: a.DisableSessionTags, Tags: a.Tags,
		Created: a.CreatedAt.UnixMilli(), Modified: a.ModifiedAt.UnixMilli(),
	})
	if err != nil {
		return "", fmt.Errorf("encode association %s: %w", a.ID, err)
	}
	return string(b), nil
}

const resourceType = "podidentityassociation/"

func decode(key, value []byte, revision int64) (Association, error) {
	var r record
	if err := json.Unmarshal(value, &r); err != nil {
		return Association{}, fmt.Errorf("decode association at %s: %w", key, err)
	}
	// Cut the parts out of the ARN, so that they share its memory.
	p := strings.SplitN(r.ARN, ":", 6)
	if len(p) != 6 {
		return Association{}, fmt.Errorf("decode association at %s: %w", key, ErrMalformedARN)
	}
	name, ok := strings.CutPrefix(p[5], resourceType)
	cluster, id, ok2 := strings.Cut(name, "/")
	slot, ok3 := slotOf(id)
	if !ok || !ok2 || !ok3 || !strings.HasSuffix(string(key), "/"+cluster+"/"+slot) {
		return Association{}, fmt.Errorf("decode association at %s: the ARN is of another", key)
	}
	a := Association{
		ID: id, ARN: r.ARN, Cluster: cluster, Namespace: r.Namespace, ServiceAccount: r.ServiceAccount,
		RoleARN: r.RoleARN, TargetRoleARN: r.TargetRoleARN, Policy: r.Policy, OwnerARN: r.OwnerARN,
		DisableSessionTags: r.DisableSessionTags, Tags: r.Tags,
		CreatedAt: time.UnixMilli(r.Created).UTC(), ModifiedAt: time.UnixMilli(r.Modified).UTC(),
		Revision: revision,
	}
	if a.TargetRoleARN != "" {
		a.ExternalID = externalID(p[3], p[4], &a)
	}
	return a, nil
}

// externalID is what the second hop is recognised by in the target's trust
// policy.
func externalID(region, account string, a *Association) string {
	return region + "/" + account + "/" + a.Cluster + "/" + a.Namespace + "/" + a.ServiceAccount
}

// clusterRecord is a cluster as it is stored.
type clusterRecord struct {
	ARN                  string            `json:"arn"`
	Issuers              []string          `json:"issuers,omitempty"`
	Keys                 json.RawMessage   `json:"keys,omitempty"`
	AllowedRoles         []string          `json:"allowedRoles,omitempty"`
	AllowedAccounts      []string          `json:"allowedAccounts,omitempty"`
	TokenReview          *TokenReview      `json:"tokenReview,omitempty"`
	AgentServiceAccounts []string          `json:"agentServiceAccounts,omitempty"`
	Tags                 map[string]string `json:"tags,omitempty"`
	Created              int64             `json:"created"`
	Modified             int64             `json:"modified"`
}

func encodeCluster(c *Cluster) (string, error) {
	b, err := json.Marshal(clusterRecord{
		ARN: c.ARN, Issuers: c.Issuers, Keys: c.Keys, AllowedRoles: c.AllowedRoles, AllowedAccounts: c.AllowedAccounts,
		TokenReview: c.TokenReview, AgentServiceAccounts: c.AgentServiceAccounts, Tags: c.Tags,
		Created: c.CreatedAt.UnixMilli(), Modified: c.ModifiedAt.UnixMilli(),
	})
	if err != nil {
		return "", fmt.Errorf("encode cluster %s: %w", c.Name, err)
	}
	return string(b), nil
}

func decodeCluster(key, value []byte, revision int64) (Cluster, error) {
	var r clusterRecord
	if err := json.Unmarshal(value, &r); err != nil {
		return Cluster{}, fmt.Errorf("decode cluster at %s: %w", key, err)
	}
	a, err := ParseARN(r.ARN)
	if err != nil {
		return Cluster{}, fmt.Errorf("decode cluster at %s: %w", key, err)
	}
	name, ok := strings.CutPrefix(a.Resource, "cluster/")
	if !ok || !strings.HasSuffix(string(key), "/"+name) {
		return Cluster{}, fmt.Errorf("decode cluster at %s: the ARN is of another", key)
	}
	if r.Tags == nil {
		r.Tags = map[string]string{}
	}
	return Cluster{
		Name: name, ARN: r.ARN, Region: a.Region, Account: a.Account, Issuers: r.Issuers, Keys: r.Keys,
		AllowedRoles: r.AllowedRoles, AllowedAccounts: r.AllowedAccounts, TokenReview: r.TokenReview,
		AgentServiceAccounts: r.AgentServiceAccounts, Tags: r.Tags,
		CreatedAt: time.UnixMilli(r.Created).UTC(), ModifiedAt: time.UnixMilli(r.Modified).UTC(), Revision: revision,
	}, nil
}

// tokenRecord remembers what a client token was used for.
type tokenRecord struct {
	// ID is the association that the call made or changed. When it ends, so does
	// the token.
	ID string `json:"id"`
	// Params is a digest of the call's parameters.
	Params string `json:"params"`
	// Expires is in milliseconds; the lease only cleans up.
	Expires int64 `json:"expires"`
}
