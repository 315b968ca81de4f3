// SPDX-License-Identifier: Apache-2.0

package association

import (
	"errors"
	"fmt"
	"strings"
)

// ErrMalformedARN is the cause of every failure to parse an ARN.
var ErrMalformedARN = errors.New("malformed ARN")

// ARN is an Amazon Resource Name, in its parts.
type ARN struct{ Partition, Service, Region, Account, Resource string }

// maxARN is the longest ARN that IAM takes.
const maxARN = 2048

// ParseARN splits an ARN: arn:PARTITION:SERVICE:REGION:ACCOUNT:RESOURCE. The
// partition is aws or begins with aws-, region and account may be empty, the
// account has 12 digits otherwise, the resource is of printable ASCII.
func ParseARN(s string) (ARN, error) {
	if len(s) > maxARN {
		return ARN{}, fmt.Errorf("%w: %d bytes", ErrMalformedARN, len(s))
	}
	p := strings.SplitN(s, ":", 6)
	if len(p) != 6 || p[0] != "arn" {
		return ARN{}, fmt.Errorf("%w: not six parts after arn", ErrMalformedARN)
	}
	a := ARN{Partition: p[1], Service: p[2], Region: p[3], Account: p[4], Resource: p[5]}
	switch {
	case a.Partition != "aws" && !strings.HasPrefix(a.Partition, "aws-") || !lower(a.Partition):
		return ARN{}, fmt.Errorf("%w: partition", ErrMalformedARN)
	case a.Service == "" || !lower(a.Service):
		return ARN{}, fmt.Errorf("%w: service", ErrMalformedARN)
	case !lower(a.Region):
		return ARN{}, fmt.Errorf("%w: region", ErrMalformedARN)
	case a.Account != "" && !isAccount(a.Account):
		return ARN{}, fmt.Errorf("%w: account", ErrMalformedARN)
	case a.Resource == "" || strings.IndexFunc(a.Resource, func(r rune) bool { return r <= ' ' || r > '~' }) >= 0:
		return ARN{}, fmt.Errorf("%w: resource", ErrMalformedARN)
	}
	return a, nil
}

func (a ARN) String() string {
	return "arn:" + a.Partition + ":" + a.Service + ":" + a.Region + ":" + a.Account + ":" + a.Resource
}

// lower: of [a-z0-9-] only; empty is.
func lower(s string) bool {
	for i := range len(s) {
		if c := s[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}

func isAccount(s string) bool {
	if len(s) != 12 {
		return false
	}
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return false
		}
	}
	return true
}

// ParseRoleARN parses the ARN of an IAM role: arn:PARTITION:iam::ACCOUNT:role/
// and a name of up to 64 of [A-Za-z0-9_+=,.@-], with or without a path before
// it. Wildcards are no part of a role here, though IAM allows them in a path.
func ParseRoleARN(s string) (ARN, error) {
	a, err := ParseARN(s)
	if err != nil {
		return ARN{}, err
	}
	path, isRole := strings.CutPrefix(a.Resource, "role/")
	switch {
	case a.Service != "iam" || a.Region != "" || a.Account == "" || !isRole:
		return ARN{}, fmt.Errorf("%w: not of a role", ErrMalformedARN)
	case strings.ContainsAny(path, "*?"):
		return ARN{}, fmt.Errorf("%w: wildcard", ErrMalformedARN)
	}
	name := path[strings.LastIndexByte(path, '/')+1:]
	if name == "" || len(name) > 64 {
		return ARN{}, fmt.Errorf("%w: role name", ErrMalformedARN)
	}
	for i := range len(name) {
		c := name[i]
		if !alphanumeric(c) && strings.IndexByte("_+=,.@-", c) < 0 {
			return ARN{}, fmt.Errorf("%w: role name", ErrMalformedARN)
		}
	}
	// The path is 512 with the slashes at both ends.
	if len(path)-len(name) > 511 || strings.HasPrefix(path, "/") {
		return ARN{}, fmt.Errorf("%w: role path", ErrMalformedARN)
	}
	return a, nil
}

func alphanumeric(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
}

// MatchARN tells whether arn matches a pattern, in which "*" stands for any
// characters and "?" for one. Before the resource neither crosses a colon: a
// pattern has six parts, as an ARN has, or is "*" alone. In the resource "*"
// crosses slashes, and so covers paths. Upper and lower case differ.
func MatchARN(pattern, arn string) bool {
	if pattern == "*" {
		return true
	}
	for range 5 {
		var p, a string
		var okp, oka bool
		p, pattern, okp = strings.Cut(pattern, ":")
		a, arn, oka = strings.Cut(arn, ":")
		if !okp || !oka || !glob(p, a) {
			return false
		}
	}
	return glob(pattern, arn)
}

// glob goes back to the last star only, so that no pattern takes more than
// len(p)*len(s) steps.
func glob(p, s string) bool {
	i, j, star, mark := 0, 0, -1, 0
	for j < len(s) {
		switch {
		case i < len(p) && p[i] == '*':
			star, mark = i, j
			i++
		case i < len(p) && (p[i] == '?' || p[i] == s[j]):
			i++
			j++
		case star >= 0:
			mark++
			i, j = star+1, mark
		default:
			return false
		}
	}
	for i < len(p) && p[i] == '*' {
		i++
	}
	return i == len(p)
}

// crossAccount is the text that EKS has, also for no role at all.
const crossAccount = "Cross-account pass role is not allowed"

func (c *Cluster) invalid(format string, args ...any) *Error {
	return &Error{Kind: InvalidParameter, Cluster: c.Name, Message: fmt.Sprintf(format, args...)}
}

// AllowsRole tells whether the cluster may use this role for the first hop. The
// error is an *Error with the text that clients know.
func (c *Cluster) AllowsRole(roleARN string) error {
	if roleARN == "" {
		return c.invalid(crossAccount)
	}
	a, err := ParseRoleARN(roleARN)
	if err != nil {
		e := c.invalid("The parameter roleArn is not the ARN of an IAM role.")
		e.Cause = err
		return e
	}
	if a.Account != c.Account || a.Partition != c.partition() {
		return c.invalid(crossAccount)
	}
	return c.allowed(roleARN, "roleArn")
}

// AllowsTarget tells whether the cluster may use this role for the second hop.
// The error is as that of AllowsRole.
func (c *Cluster) AllowsTarget(roleARN string) error {
	a, err := ParseRoleARN(roleARN)
	if err != nil {
		e := c.invalid("The parameter targetRoleArn is not the ARN of an IAM role.")
		e.Cause = err
		return e
	}
	// No account reaches into another partition.
	if a.Partition != c.partition() || a.Account != c.Account && !c.allowsAccount(a.Account) {
		return c.invalid("The account of targetRoleArn is not allowed for cluster: %s.", c.Name)
	}
	return c.allowed(roleARN, "targetRoleArn")
}

func (c *Cluster) partition() string {
	_, rest, _ := strings.Cut(c.ARN, ":")
	p, _, _ := strings.Cut(rest, ":")
	return p
}

func (c *Cluster) allowsAccount(account string) bool {
	for _, a := range c.AllowedAccounts {
		if a == "*" || a == account {
			return true
		}
	}
	return false
}

func (c *Cluster) allowed(roleARN, what string) error {
	if len(c.AllowedRoles) == 0 {
		return nil
	}
	for _, p := range c.AllowedRoles {
		if MatchARN(p, roleARN) {
			return nil
		}
	}
	return c.invalid("The role of %s is not allowed for cluster: %s.", what, c.Name)
}
