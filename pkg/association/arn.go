// SPDX-License-Identifier: Apache-2.0

package association

// ARN is an Amazon Resource Name, in its parts.
type ARN struct{ Partition, Service, Region, Account, Resource string }

// ParseARN splits an ARN. It asks for a known form of partition, service, region
// and account, and for a resource of printable ASCII.
func ParseARN(s string) (ARN, error) { return ARN{}, todo() }

func (a ARN) String() string {
	return "arn:" + a.Partition + ":" + a.Service + ":" + a.Region + ":" + a.Account + ":" + a.Resource
}

// ParseRoleARN parses the ARN of an IAM role, with or without a path.
func ParseRoleARN(s string) (ARN, error) { return ARN{}, todo() }

// MatchARN tells whether arn matches a pattern, in which "*" stands for any
// characters and "?" for one. Neither crosses a colon: a pattern has six parts,
// as an ARN has, or is "*" alone. Upper and lower case differ.
func MatchARN(pattern, arn string) bool { return false }

// AllowsRole tells whether the cluster may use this role for the first hop. The
// error is an *Error with the text that clients know.
func (c *Cluster) AllowsRole(roleARN string) error { return todo() }

// AllowsTarget tells whether the cluster may use this role for the second hop.
func (c *Cluster) AllowsTarget(roleARN string) error { return todo() }
