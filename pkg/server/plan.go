// SPDX-License-Identifier: Apache-2.0

package server

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/latchkey-dev/latchkey/pkg/association"
)

// Change is one step of a plan, and its result once it was applied.
type Change struct {
	// Action is create, update, delete, or conflict: what an add-on owns is not
	// import's to change.
	Action         string `json:"action"`
	Cluster        string `json:"clusterName"`
	Namespace      string `json:"namespace"`
	ServiceAccount string `json:"serviceAccount"`
	// ID is of the association that is there, or that was made.
	ID string `json:"associationId,omitempty"`
	// Differences says what an update changes: member, old and new value.
	Differences []Difference `json:"differences,omitempty"`
	// Applied: it was done. Error is why not.
	Applied bool   `json:"applied"`
	Error   string `json:"error,omitempty"`

	before, after AssociationSpec
}

// Difference is one member that an update changes.
type Difference struct {
	Member string `json:"member"`
	Old    string `json:"old"`
	New    string `json:"new"`
}

// Actions of a Change.
const (
	ActionCreate   = "create"
	ActionUpdate   = "update"
	ActionDelete   = "delete"
	ActionConflict = "conflict"
)

// Plan is what an import does to a cluster.
type Plan struct {
	Cluster string   `json:"clusterName"`
	Changes []Change `json:"changes"`
	// Unchanged counts associations that are as the file says, Extra those that
	// the file does not have and that stay, because nobody asked to prune.
	Unchanged int `json:"unchanged"`
	Extra     int `json:"extra"`
	// DryRun: nothing was applied.
	DryRun bool `json:"dryRun"`
}

// Failed counts the steps that could not be done.
func (p Plan) Failed() int {
	n := 0
	for _, c := range p.Changes {
		if c.Error != "" {
			n++
		}
	}
	return n
}

// makePlan compares what is there with what is wished. Deletions come last: a
// pod's role is never missing for longer than it must be, and a plan that fails
// half way has taken nothing away.
func makePlan(there []association.Association, wished AssociationFile, prune bool) Plan {
	p := Plan{Cluster: wished.Cluster, Changes: []Change{}}
	type key struct{ namespace, serviceAccount string }
	have := make(map[key]association.Association, len(there))
	for _, a := range there {
		have[key{a.Namespace, a.ServiceAccount}] = a
	}
	for _, w := range wished.Associations {
		w = w.declared()
		w.Cluster = wished.Cluster
		k := key{w.Namespace, w.ServiceAccount}
		c := Change{Cluster: w.Cluster, Namespace: w.Namespace, ServiceAccount: w.ServiceAccount, after: w}
		a, ok := have[k]
		delete(have, k)
		if !ok {
			c.Action = ActionCreate
			p.Changes = append(p.Changes, c)
			continue
		}
		c.ID, c.before = a.ID, associationSpecOf(a)
		c.Differences = differences(c.before, w)
		switch {
		case len(c.Differences) == 0:
			p.Unchanged++
			continue
		case a.OwnerARN != "":
			c.Action, c.Error = ActionConflict, "it belongs to "+a.OwnerARN+" and is changed through that only"
		default:
			c.Action = ActionUpdate
		}
		p.Changes = append(p.Changes, c)
	}
	for _, a := range have {
		// What an add-on owns is nobody's leftover.
		if !prune || a.OwnerARN != "" {
			p.Extra++
			continue
		}
		p.Changes = append(p.Changes, Change{
			Action: ActionDelete, Cluster: a.Cluster, Namespace: a.Namespace, ServiceAccount: a.ServiceAccount,
			ID: a.ID, before: associationSpecOf(a),
		})
	}
	rank := map[string]int{ActionConflict: 0, ActionCreate: 1, ActionUpdate: 2, ActionDelete: 3}
	slices.SortStableFunc(p.Changes, func(a, b Change) int {
		return cmp.Or(cmp.Compare(rank[a.Action], rank[b.Action]),
			cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.ServiceAccount, b.ServiceAccount))
	})
	return p
}

// differences are the members in which an association is not as wished.
func differences(is, wished AssociationSpec) []Difference {
	var out []Difference
	add := func(member, old, new string) {
		if old != new {
			out = append(out, Difference{member, old, new})
		}
	}
	add("roleArn", is.RoleARN, wished.RoleARN)
	add("targetRoleArn", is.TargetRoleARN, wished.TargetRoleARN)
	add("policy", string(is.Policy), string(wished.Policy))
	add("disableSessionTags", fmt.Sprint(is.DisableSessionTags), fmt.Sprint(wished.DisableSessionTags))
	add("tags", tagText(is.Tags), tagText(wished.Tags))
	return out
}

func tagText(tags map[string]string) string {
	parts := make([]string, 0, len(tags))
	for _, k := range slices.Sorted(maps.Keys(tags)) {
		parts = append(parts, fmt.Sprintf("%q=%q", k, tags[k]))
	}
	return strings.Join(parts, ",")
}

// exportOf is what is wished of associations that are there, in an order that
// makes a small change a small difference in git. What an add-on owns is left
// out: the add-on makes it.
func exportOf(cluster string, all []AssociationSpec) AssociationFile {
	f := AssociationFile{Cluster: cluster, Associations: []AssociationSpec{}}
	for _, a := range all {
		if a.OwnerARN != "" {
			continue
		}
		d := a.declared()
		d.Cluster = ""
		f.Associations = append(f.Associations, d)
	}
	slices.SortFunc(f.Associations, func(a, b AssociationSpec) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.ServiceAccount, b.ServiceAccount))
	})
	return f
}
