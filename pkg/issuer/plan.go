// SPDX-License-Identifier: Apache-2.0

package issuer

import (
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/google/uuid"

	"github.com/latchkey-dev/latchkey/pkg/association"
)

// Limits of STS (service model, AssumeRole).
const (
	maxTagValue   = 256
	minExternalID = 2
	maxExternalID = 1224
)

// firstHopDuration is enough to make the second hop with: STS's minimum.
const firstHopDuration = 900 * time.Second

// chainedLimit is what STS allows a session whose caller is itself a role's
// session.
const chainedLimit = time.Hour

// tag is a session tag. All are transitive: they go on to the next role.
type tag struct{ key, value string }

// hop is one call of AssumeRole.
type hop struct {
	roleARN, sessionName string
	duration             time.Duration
	externalID, policy   string // empty: none
	tags                 []tag
}

// plan decides which calls make the session. It is where the cluster's limits
// are enforced: an association may be older than they are.
func plan(req Request, duration time.Duration, id uuid.UUID) ([]hop, error) {
	a, c, s := &req.Association, &req.Cluster, &req.Subject
	invalid := func(format string, args ...any) ([]hop, error) {
		return nil, &Error{kind: ErrInvalidRequest, message: fmt.Sprintf(format, args...)}
	}
	// Never: whoever calls has looked the association up by these three.
	if a.Cluster != c.Name || a.Namespace != s.Namespace || a.ServiceAccount != s.ServiceAccount {
		return nil, &Error{kind: ErrUnavailable, message: messageUnavailable,
			cause: fmt.Errorf("association %s is not of cluster, namespace and service account asked for", a.ID)}
	}
	if err := c.AllowsRole(a.RoleARN); err != nil {
		return nil, &Error{kind: ErrAccessDenied, message: "The cluster is not allowed to use the associated role.", cause: err}
	}
	if a.TargetRoleARN != "" {
		if err := c.AllowsTarget(a.TargetRoleARN); err != nil {
			return nil, &Error{kind: ErrAccessDenied, message: "The cluster is not allowed to use the associated target role.", cause: err}
		}
	}
	// With tags the policy could not be sent whole; left out, it would give more
	// than was meant.
	if a.Policy != "" && !a.DisableSessionTags {
		return invalid("The association has a session policy and session tags; a policy requires that session tags are disabled.")
	}
	var tags []tag
	if !a.DisableSessionTags {
		tags = []tag{
			{"eks-cluster-arn", c.ARN},
			{"eks-cluster-name", c.Name},
			{"kubernetes-namespace", s.Namespace},
			{"kubernetes-service-account", s.ServiceAccount},
			{"kubernetes-pod-name", s.PodName},
			{"kubernetes-pod-uid", s.PodUID},
		}
		for _, t := range tags {
			// Refused and not bent into shape: trust policies compare these, and two
			// names must never become one.
			if !isTagValue(t.value) {
				return invalid("Session tag %s cannot have this value; disable session tags for this association.", t.key)
			}
		}
	}
	name := sessionName(c.Name, s.PodName, id)
	if a.TargetRoleARN == "" {
		return []hop{{roleARN: a.RoleARN, sessionName: name, duration: duration, policy: a.Policy, tags: tags}}, nil
	}
	externalID := a.ExternalID
	if externalID == "" {
		externalID = strings.Join([]string{c.Region, c.Account, c.Name, a.Namespace, a.ServiceAccount}, "/")
	}
	if !isExternalID(externalID) {
		return invalid("The association's external id cannot be sent to STS.")
	}
	return []hop{
		{roleARN: a.RoleARN, sessionName: name, duration: min(duration, firstHopDuration), tags: tags},
		// No tags: the first hop's are inherited, and setting one again is an error.
		{roleARN: a.TargetRoleARN, sessionName: name, duration: min(duration, chainedLimit), externalID: externalID, policy: a.Policy},
	}, nil
}

// sessionName is what EKS makes: eks-, ten characters each of cluster and pod,
// and a UUID. At most 62 characters of the 64 that STS takes.
func sessionName(cluster, pod string, id uuid.UUID) string {
	return "eks-" + shorten(cluster) + "-" + shorten(pod) + "-" + id.String()
}

// shorten keeps ten characters of those that STS takes in a session name.
func shorten(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < utf8.RuneSelf && (unicode.IsLetter(r) || unicode.IsDigit(r) || strings.ContainsRune("_+=,.@-", r)) {
			return r
		}
		return '-'
	}, s)
	return s[:min(len(s), 10)]
}

// isTagValue: 0 to 256 of [\p{L}\p{Z}\p{N}_.:/=+\-@].
func isTagValue(s string) bool {
	return utf8.ValidString(s) && utf8.RuneCountInString(s) <= maxTagValue &&
		!strings.ContainsFunc(s, func(r rune) bool {
			return !unicode.In(r, unicode.L, unicode.Z, unicode.N) && !strings.ContainsRune("_.:/=+-@", r)
		})
}

// isExternalID: 2 to 1224 of [\w+=,.@:/-].
func isExternalID(s string) bool {
	return len(s) >= minExternalID && len(s) <= maxExternalID && !strings.ContainsFunc(s, func(r rune) bool {
		return r >= utf8.RuneSelf || !unicode.IsLetter(r) && !unicode.IsDigit(r) && !strings.ContainsRune("_+=,.@:/-", r)
	})
}

// region is the one whose STS is called: the cluster's. A session of the global
// endpoint may not be good in regions that an account has to opt in to.
func region(c association.Cluster) string { return c.Region }

// keysOf lists the keys of tags.
func keysOf(tags []tag) []string {
	keys := make([]string, 0, len(tags))
	for _, t := range tags {
		keys = append(keys, t.key)
	}
	return slices.Clip(keys)
}
