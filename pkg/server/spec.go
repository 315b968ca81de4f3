// SPDX-License-Identifier: Apache-2.0

package server

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/latchkey-dev/latchkey/pkg/association"
)

// ClusterSpec is a cluster as people write it: in the configuration file, in
// the output of `cluster describe -o yaml`, and over the admin socket.
type ClusterSpec struct {
	Name string `json:"name"`
	// ARN is made of name, region and account where it is empty.
	ARN     string `json:"arn,omitempty"`
	Region  string `json:"region,omitempty"`
	Account string `json:"account,omitempty"`
	// Issuers are the accepted values of a token's iss.
	Issuers []string `json:"issuers,omitempty"`
	// Keys are the pinned public keys, a JSON Web Key Set or PEM, as a text or, for
	// a key set, as an object. KeysFile is a file with them instead; it is read
	// once, when the cluster is put, and never answered.
	Keys     json.RawMessage `json:"keys,omitempty"`
	KeysFile string          `json:"keysFile,omitempty"`
	// AllowedRoles and AllowedAccounts are association.Cluster's.
	AllowedRoles    []string `json:"allowedRoles,omitempty"`
	AllowedAccounts []string `json:"allowedAccounts,omitempty"`
	// TokenReview asks the cluster's API server whether a token's pod still lives.
	TokenReview *TokenReviewSpec `json:"tokenReview,omitempty"`
	// AgentServiceAccounts are association.Cluster's.
	AgentServiceAccounts []string          `json:"agentServiceAccounts,omitempty"`
	Tags                 map[string]string `json:"tags,omitempty"`

	// What follows is answered and not read.

	PinnedKeys []PinnedKey `json:"pinnedKeys,omitempty"`
	CreatedAt  *time.Time  `json:"createdAt,omitempty"`
	ModifiedAt *time.Time  `json:"modifiedAt,omitempty"`
}

// TokenReviewSpec is association.TokenReview.
type TokenReviewSpec struct {
	// Kubeconfig is a path on the server's machine.
	Kubeconfig string `json:"kubeconfig"`
	Context    string `json:"context,omitempty"`
	// OnOutage is refuse (the default) or keys.
	OnOutage string `json:"onOutage,omitempty"`
}

// Document is the text of Keys, whether it was written as an object or as a
// string.
func (s *ClusterSpec) document() ([]byte, error) {
	if s.KeysFile != "" {
		if len(s.Keys) > 0 {
			return nil, fmt.Errorf("%w: cluster %s has both keys and keysFile", ErrConfig, s.Name)
		}
		b, err := os.ReadFile(s.KeysFile)
		if err != nil {
			return nil, fmt.Errorf("%w: keys of cluster %s: %w", ErrConfig, s.Name, err)
		}
		return b, nil
	}
	if len(s.Keys) == 0 {
		return nil, fmt.Errorf("%w: cluster %s has no keys: its tokens cannot be checked", ErrConfig, s.Name)
	}
	var text string
	if json.Unmarshal(s.Keys, &text) == nil {
		return []byte(text), nil
	}
	return s.Keys, nil
}

// Resolve reads KeysFile, so that the spec can be sent to a server that does not
// see the file, and makes Keys a JSON Web Key Set. It returns the keys that are
// pinned. Errors wrap ErrConfig.
func (s *ClusterSpec) Resolve() ([]PinnedKey, error) {
	doc, err := s.document()
	if err != nil {
		return nil, err
	}
	set, pinned, err := PinKeys(doc)
	if err != nil {
		return nil, fmt.Errorf("%w: cluster %s: %w", ErrConfig, s.Name, err)
	}
	s.Keys, s.KeysFile = set, ""
	return pinned, nil
}

// cluster is the spec as it is stored. Keys must be resolved.
func (s *ClusterSpec) cluster() (association.Cluster, error) {
	c := association.Cluster{
		Name: s.Name, ARN: s.ARN, Region: s.Region, Account: s.Account, Issuers: s.Issuers, Keys: s.Keys,
		AllowedRoles: s.AllowedRoles, AllowedAccounts: s.AllowedAccounts,
		AgentServiceAccounts: s.AgentServiceAccounts, Tags: s.Tags,
	}
	if s.ARN != "" {
		a, err := association.ParseARN(s.ARN)
		if err != nil {
			return c, fmt.Errorf("%w: cluster %s: %w", ErrConfig, s.Name, err)
		}
		if c.Region == "" {
			c.Region = a.Region
		}
		if c.Account == "" {
			c.Account = a.Account
		}
	}
	for _, m := range []struct{ what, value, flag string }{{"name", c.Name, "NAME"}, {"region", c.Region, "--region"}, {"account", c.Account, "--account"}} {
		if m.value == "" {
			return c, fmt.Errorf("%w: cluster %q has no %s (%s)", ErrConfig, s.Name, m.what, m.flag)
		}
	}
	if len(c.Issuers) == 0 {
		return c, fmt.Errorf("%w: cluster %s has no issuer (--issuer): give what its tokens have in iss, such as https://kubernetes.default.svc.cluster.local", ErrConfig, s.Name)
	}
	if t := s.TokenReview; t != nil {
		if !filepath.IsAbs(t.Kubeconfig) {
			return c, fmt.Errorf("%w: cluster %s: tokenReview.kubeconfig %q: give an absolute path on the server's machine", ErrConfig, s.Name, t.Kubeconfig)
		}
		if t.OnOutage != "" && t.OnOutage != association.OnOutageRefuse && t.OnOutage != association.OnOutageKeys {
			return c, fmt.Errorf("%w: cluster %s: tokenReview.onOutage %q: use %s or %s", ErrConfig, s.Name, t.OnOutage, association.OnOutageRefuse, association.OnOutageKeys)
		}
		c.TokenReview = &association.TokenReview{Kubeconfig: t.Kubeconfig, Context: t.Context, OnOutage: t.OnOutage}
	}
	for _, a := range s.AgentServiceAccounts {
		if ns, name, ok := strings.Cut(a, "/"); !ok || ns == "" || name == "" || strings.Contains(name, "/") {
			return c, fmt.Errorf("%w: cluster %s: agent service account %q: write NAMESPACE/NAME", ErrConfig, s.Name, a)
		}
	}
	return c, nil
}

// specOf is a stored cluster as people see it.
func specOf(c association.Cluster) ClusterSpec {
	s := ClusterSpec{
		Name: c.Name, ARN: c.ARN, Region: c.Region, Account: c.Account, Issuers: c.Issuers, Keys: c.Keys,
		AllowedRoles: c.AllowedRoles, AllowedAccounts: c.AllowedAccounts,
		AgentServiceAccounts: c.AgentServiceAccounts, Tags: c.Tags,
	}
	if t := c.TokenReview; t != nil {
		s.TokenReview = &TokenReviewSpec{Kubeconfig: t.Kubeconfig, Context: t.Context, OnOutage: t.OnOutage}
	}
	// Keys that were stored could be read when they were.
	_, s.PinnedKeys, _ = PinKeys(c.Keys)
	if !c.CreatedAt.IsZero() {
		s.CreatedAt = &c.CreatedAt
	}
	if !c.ModifiedAt.IsZero() {
		s.ModifiedAt = &c.ModifiedAt
	}
	return s
}

// AssociationSpec is an association as people write it, keep it in git, and see
// it. What identifies it is namespace and service account, never the ID.
type AssociationSpec struct {
	// ID, ARN and the other members with "answered" are not read by an import.
	ID  string `json:"associationId,omitempty"`  // answered
	ARN string `json:"associationArn,omitempty"` // answered

	Cluster        string `json:"clusterName,omitempty"`
	Namespace      string `json:"namespace"`
	ServiceAccount string `json:"serviceAccount"`
	RoleARN        string `json:"roleArn"`
	TargetRoleARN  string `json:"targetRoleArn,omitempty"`
	// Policy is a JSON object as a text, or, where it is read, as it is.
	Policy             PolicyText        `json:"policy,omitempty"`
	DisableSessionTags bool              `json:"disableSessionTags,omitempty"`
	Tags               map[string]string `json:"tags,omitempty"`

	ExternalID string     `json:"externalId,omitempty"` // answered
	OwnerARN   string     `json:"ownerArn,omitempty"`   // answered
	CreatedAt  *time.Time `json:"createdAt,omitempty"`  // answered
	ModifiedAt *time.Time `json:"modifiedAt,omitempty"` // answered
}

// PolicyText is a session policy. People may write it as YAML.
type PolicyText string

// UnmarshalJSON reads a text, or an object as the text of it.
func (p *PolicyText) UnmarshalJSON(b []byte) error {
	b = bytes.TrimSpace(b)
	if len(b) == 0 || b[0] != '{' {
		var text string
		if err := json.Unmarshal(b, &text); err != nil {
			return errors.New("a policy is an object, or the text of one in JSON")
		}
		*p = PolicyText(text)
		return nil
	}
	var text bytes.Buffer
	if err := json.Compact(&text, b); err != nil {
		return fmt.Errorf("policy: %w", err)
	}
	*p = PolicyText(text.String())
	return nil
}

func associationSpecOf(a association.Association) AssociationSpec {
	s := AssociationSpec{
		ID: a.ID, ARN: a.ARN, Cluster: a.Cluster, Namespace: a.Namespace, ServiceAccount: a.ServiceAccount,
		RoleARN: a.RoleARN, TargetRoleARN: a.TargetRoleARN, Policy: PolicyText(a.Policy),
		DisableSessionTags: a.DisableSessionTags, ExternalID: a.ExternalID, OwnerARN: a.OwnerARN,
		CreatedAt: &a.CreatedAt, ModifiedAt: &a.ModifiedAt,
	}
	if len(a.Tags) > 0 {
		s.Tags = a.Tags
	}
	return s
}

// declared is what of the spec is wished, without what the server adds: what
// export writes and import compares.
func (s AssociationSpec) declared() AssociationSpec {
	s.ID, s.ARN, s.ExternalID, s.OwnerARN, s.CreatedAt, s.ModifiedAt = "", "", "", "", nil, nil
	if len(s.Tags) == 0 {
		s.Tags = nil
	}
	return s
}

// AssociationFile is the file that `association export` writes and `association
// import` reads.
type AssociationFile struct {
	Cluster      string            `json:"clusterName"`
	Associations []AssociationSpec `json:"associations"`
}

// ParseAssociations reads an AssociationFile, strictly: a member that nobody
// knows is a typing error, and what it was meant to say would be lost. Several
// documents divided by --- are one.
func ParseAssociations(data []byte) ([]AssociationFile, error) {
	var out []AssociationFile
	for i, doc := range splitDocuments(string(data)) {
		if strings.TrimSpace(stripComments(doc)) == "" {
			continue
		}
		var f AssociationFile
		if err := yaml.UnmarshalStrict([]byte(doc), &f); err != nil {
			return nil, fmt.Errorf("%w: document %d: %w", ErrConfig, i+1, err)
		}
		if f.Cluster == "" {
			return nil, fmt.Errorf("%w: document %d: no clusterName", ErrConfig, i+1)
		}
		// With --prune that would delete everything, when a template has gone wrong.
		if f.Associations == nil {
			return nil, fmt.Errorf("%w: cluster %s: no associations; write associations: [] if it shall have none", ErrConfig, f.Cluster)
		}
		seen := map[[2]string]bool{}
		for j := range f.Associations {
			a := &f.Associations[j]
			if a.Cluster != "" && a.Cluster != f.Cluster {
				return nil, fmt.Errorf("%w: association %d is of cluster %s in a document of %s", ErrConfig, j+1, a.Cluster, f.Cluster)
			}
			a.Cluster = f.Cluster
			if a.Namespace == "" || a.ServiceAccount == "" || a.RoleARN == "" {
				return nil, fmt.Errorf("%w: association %d of cluster %s needs namespace, serviceAccount and roleArn", ErrConfig, j+1, f.Cluster)
			}
			k := [2]string{a.Namespace, a.ServiceAccount}
			if seen[k] {
				return nil, fmt.Errorf("%w: cluster %s has %s/%s twice", ErrConfig, f.Cluster, a.Namespace, a.ServiceAccount)
			}
			seen[k] = true
		}
		if slices.ContainsFunc(out, func(o AssociationFile) bool { return o.Cluster == f.Cluster }) {
			return nil, fmt.Errorf("%w: cluster %s has two documents", ErrConfig, f.Cluster)
		}
		out = append(out, f)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%w: no document in it", ErrConfig)
	}
	return out, nil
}

// splitDocuments divides a YAML stream at lines that are "---".
func splitDocuments(s string) []string {
	var out []string
	var b strings.Builder
	for line := range strings.Lines(s) {
		if t := strings.TrimRight(line, " \t\r\n"); t == "---" {
			out = append(out, b.String())
			b.Reset()
			continue
		}
		b.WriteString(line)
	}
	return append(out, b.String())
}

func stripComments(s string) string {
	var b strings.Builder
	for line := range strings.Lines(s) {
		if !strings.HasPrefix(strings.TrimSpace(line), "#") {
			b.WriteString(line)
		}
	}
	return b.String()
}

// Errors of this package.
var (
	// ErrConfig: a setting or a file that cannot be used; the text says which and
	// why.
	ErrConfig = errors.New("invalid configuration")
	// ErrAnotherServer: the state directory is another server's.
	ErrAnotherServer = errors.New("another latchkey-server runs on this state directory")
)
