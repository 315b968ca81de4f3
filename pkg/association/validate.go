// SPDX-License-Identifier: Apache-2.0

package association

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"unicode/utf8"
)

func invalid(cluster, format string, args ...any) *Error {
	return &Error{Kind: InvalidParameter, Cluster: cluster, Message: fmt.Sprintf(format, args...)}
}

// ValidClusterName: 1 to 100 of [0-9A-Za-z_-], beginning with a letter or digit
// (model of the EKS API).
func ValidClusterName(s string) bool {
	if s == "" || len(s) > 100 || !alphanumeric(s[0]) {
		return false
	}
	for i := range len(s) {
		if !alphanumeric(s[i]) && s[i] != '-' && s[i] != '_' {
			return false
		}
	}
	return true
}

// ValidNamespace: a label of RFC 1123, in lower case, up to 63 characters.
func ValidNamespace(s string) bool { return len(s) <= 63 && label(s) }

// ValidServiceAccount: a subdomain of RFC 1123, in lower case, up to 253
// characters.
func ValidServiceAccount(s string) bool {
	if len(s) > 253 {
		return false
	}
	for {
		l, rest, more := strings.Cut(s, ".")
		if !label(l) {
			return false
		}
		if !more {
			return true
		}
		s = rest
	}
}

func label(s string) bool {
	return s != "" && lower(s) && s[0] != '-' && s[len(s)-1] != '-'
}

func validateSubject(cluster, namespace, serviceAccount string) error {
	if !ValidNamespace(namespace) {
		return invalid(cluster, "The parameter namespace should be a lower case RFC 1123 label of at most 63 characters.")
	}
	if !ValidServiceAccount(serviceAccount) {
		return invalid(cluster, "The parameter serviceAccount should be a lower case RFC 1123 subdomain of at most 253 characters.")
	}
	return nil
}

// noCluster is also the answer to a name that no cluster can have.
func noCluster(name string) *Error {
	return &Error{Kind: ClusterNotFound, Cluster: name, Message: "No cluster found for name: " + printable(name) + "."}
}

// printable keeps a stranger's text from breaking the line it is put on.
func printable(s string) string {
	if len(s) > 128 {
		s = s[:128]
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r == utf8.RuneError {
			return '?'
		}
		return r
	}, s)
}

func noAssociation(cluster, id string) *Error {
	return &Error{Kind: NotFound, Cluster: cluster, Message: "No pod identity association found for associationId: " + printable(id) + "."}
}

// validateID asks for the length only: what has it and is of another form is
// merely unknown.
func validateID(cluster, id string) error {
	if utf8.RuneCountInString(id) != IDLength {
		return invalid(cluster, "The parameter associationId should be %d characters long.", IDLength)
	}
	return nil
}

// validatePolicy: a JSON object that STS can take as a session policy, and only
// without session tags.
func validatePolicy(cluster, policy string, disableSessionTags bool) error {
	if policy == "" {
		return nil
	}
	if !disableSessionTags {
		return invalid(cluster, "The parameter policy requires disableSessionTags to be true.")
	}
	if n := utf8.RuneCountInString(policy); n > MaxPolicy {
		return invalid(cluster, "The parameter policy should be at most %d characters long.", MaxPolicy)
	}
	// STS: [\u0009\u000A\u000D\u0020-\u00FF]+
	for _, r := range policy {
		if r < ' ' && r != '\t' && r != '\n' && r != '\r' || r > 0xff {
			return invalid(cluster, "The parameter policy has characters that a session policy may not have.")
		}
	}
	var object map[string]json.RawMessage
	if err := json.Unmarshal([]byte(policy), &object); err != nil || object == nil {
		return invalid(cluster, "The parameter policy should be a JSON object.")
	}
	return nil
}

// tagProblem says what is wrong with tags; empty: nothing.
func tagProblem(tags map[string]string) string {
	if len(tags) > MaxTags {
		return fmt.Sprintf("A resource can have at most %d tags.", MaxTags)
	}
	for k, v := range tags {
		if p := tagKeyProblem(k); p != "" {
			return p
		}
		switch {
		case !utf8.ValidString(v):
			return "A tag value is not valid UTF-8."
		case utf8.RuneCountInString(v) > MaxTagValue:
			return fmt.Sprintf("A tag value can have at most %d characters.", MaxTagValue)
		case reserved(v):
			return "Tag values cannot begin with aws:."
		}
	}
	return ""
}

func tagKeyProblem(k string) string {
	switch n := utf8.RuneCountInString(k); {
	case !utf8.ValidString(k):
		return "A tag key is not valid UTF-8."
	case n < 1 || n > MaxTagKey:
		return fmt.Sprintf("A tag key should have 1 to %d characters.", MaxTagKey)
	case reserved(k):
		return "Tag keys cannot begin with aws:."
	}
	return ""
}

// reserved: begins with aws: in any case, by Unicode's rules, under which there
// are more than two forms of s.
func reserved(s string) bool {
	n := 0
	for i := range s {
		if n == len("aws:") {
			s = s[:i]
			break
		}
		n++
	}
	return strings.EqualFold(s, "aws:")
}

// Validate checks what a client may set of a cluster, and fills in ARN. The
// errors are InvalidParameter.
func (c *Cluster) Validate() error {
	bad := func(format string, args ...any) error { return invalid(c.Name, format, args...) }
	if !ValidClusterName(c.Name) {
		return bad("The cluster name should be 1 to 100 letters, digits, hyphens and underscores, beginning with a letter or digit.")
	}
	if c.Region == "" || len(c.Region) > 63 || !label(c.Region) {
		return bad("The region of cluster %s should be a name in lower case, such as us-west-2.", c.Name)
	}
	if !isAccount(c.Account) {
		return bad("The account of cluster %s should be 12 digits.", c.Name)
	}
	want := ARN{Partition: PartitionOf(c.Region), Service: "eks", Region: c.Region, Account: c.Account, Resource: "cluster/" + c.Name}
	if c.ARN == "" {
		c.ARN = want.String()
	}
	have, err := ParseARN(c.ARN)
	if err != nil {
		return bad("The ARN of cluster %s is malformed.", c.Name)
	}
	// A partition may be younger than this program.
	want.Partition = have.Partition
	if have != want {
		return bad("The ARN of cluster %s does not have its region, account and name.", c.Name)
	}
	for _, iss := range c.Issuers {
		if iss == "" || !utf8.ValidString(iss) {
			return bad("An issuer of cluster %s is empty or not text.", c.Name)
		}
	}
	if err := validateKeys(c); err != nil {
		return err
	}
	for _, p := range c.AllowedRoles {
		if p != "*" && (strings.Count(p, ":") < 5 || !strings.HasPrefix(p, "arn:")) {
			return bad("The pattern %s of allowed roles is not of the form arn:PARTITION:iam::ACCOUNT:role/NAME.", printable(p))
		}
	}
	for _, a := range c.AllowedAccounts {
		if a != "*" && !isAccount(a) {
			return bad("The allowed account %s should be 12 digits, or *.", printable(a))
		}
	}
	for _, a := range c.AgentServiceAccounts {
		ns, sa, ok := strings.Cut(a, "/")
		if !ok || !ValidNamespace(ns) || !ValidServiceAccount(sa) {
			return bad("The agent's service account %s should be NAMESPACE/NAME.", printable(a))
		}
	}
	if t := c.TokenReview; t != nil && t.OnOutage != "" && t.OnOutage != OnOutageRefuse && t.OnOutage != OnOutageKeys {
		return bad("What to do in an outage of cluster %s should be %s or %s.", c.Name, OnOutageRefuse, OnOutageKeys)
	}
	if p := tagProblem(c.Tags); p != "" {
		return bad("%s", p)
	}
	return nil
}

// validateKeys looks at the form only; whoever verifies tokens reads the keys.
func validateKeys(c *Cluster) error {
	if len(c.Keys) == 0 {
		return nil
	}
	var set struct {
		Keys []map[string]json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(c.Keys, &set); err != nil || len(set.Keys) == 0 {
		return invalid(c.Name, "The keys of cluster %s should be a JSON Web Key Set with at least one key.", c.Name)
	}
	for _, k := range set.Keys {
		// d is the private part of RSA, EC and OKP keys, k a shared secret (RFC 7518).
		for _, secret := range []string{"d", "k"} {
			if _, ok := k[secret]; ok {
				return invalid(c.Name, "The keys of cluster %s should be public: one of them is not.", c.Name)
			}
		}
	}
	var b bytes.Buffer
	if err := json.Compact(&b, c.Keys); err != nil {
		return invalid(c.Name, "The keys of cluster %s should be a JSON Web Key Set with at least one key.", c.Name)
	}
	c.Keys = b.Bytes()
	return nil
}

// PartitionOf is the partition that a region belongs to.
func PartitionOf(region string) string {
	for prefix, p := range map[string]string{
		"cn-": "aws-cn", "us-gov-": "aws-us-gov", "us-iso-": "aws-iso", "us-isob-": "aws-iso-b",
		"eu-isoe-": "aws-iso-e", "us-isof-": "aws-iso-f", "eusc-": "aws-eusc",
	} {
		if strings.HasPrefix(region, prefix) {
			return p
		}
	}
	return "aws"
}
