// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/latchkey-dev/latchkey/pkg/commandline"
	"github.com/latchkey-dev/latchkey/pkg/server"
)

// associationFlags are those that several commands have.
type associationFlags struct {
	sel        server.Selector
	spec       server.AssociationSpec
	policyFile string
	tags       []string
}

// selectorFlags name one association, or filter a list.
func (c *cli) selectorFlags(o *associationFlags, cmd *cobra.Command, withID bool) {
	c.clusterFlag(o, cmd)
	f := cmd.Flags()
	f.StringVarP(&o.sel.Namespace, "namespace", "n", "", "`namespace` of the service account")
	f.StringVarP(&o.sel.ServiceAccount, "service-account", "s", "", "`name` of the service account")
	if withID {
		f.StringVar(&o.sel.ID, "id", "", "association `ID`, instead of namespace and service account")
	}
}

func (c *cli) clusterFlag(o *associationFlags, cmd *cobra.Command) {
	cmd.Flags().StringVarP(&o.sel.Cluster, "cluster", "c", "", "`name` of the cluster (required)")
	_ = cmd.RegisterFlagCompletionFunc("cluster", c.clusterNames)
}

func (o *associationFlags) needCluster() error {
	if o.sel.Cluster == "" {
		return usage("give --cluster")
	}
	return nil
}

// needOne refuses a selector that does not name exactly one.
func (o *associationFlags) needOne() error {
	if err := o.needCluster(); err != nil {
		return err
	}
	named := o.sel.Namespace != "" && o.sel.ServiceAccount != ""
	if named == (o.sel.ID != "") || o.sel.ID != "" && (o.sel.Namespace != "" || o.sel.ServiceAccount != "") {
		return usage("give --namespace and --service-account, or --id")
	}
	return nil
}

func newAssociation(c *cli) *cobra.Command {
	return group("association", "Which role the pods of a service account get",
		c.associationCreate(), c.associationList(), c.associationDescribe(), c.associationUpdate(), c.associationDelete(),
		c.associationImport(), c.associationExport())
}

// roleFlags say what an association gives.
func (o *associationFlags) roleFlags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVarP(&o.spec.RoleARN, "role", "r", "", "`ARN` of the role")
	f.StringVar(&o.spec.TargetRoleARN, "target-role", "", "`ARN` of a role that is assumed from the first; empty for none")
	f.StringVar(&o.policyFile, "policy", "", "`file` with a session policy, which needs --disable-session-tags; empty for none")
	f.BoolVar(&o.spec.DisableSessionTags, "disable-session-tags", false, "send STS no session tags")
	f.StringArrayVar(&o.tags, "tag", nil, "`KEY=VALUE`; may be repeated; update replaces all tags")
}

func (c *cli) policy(o *associationFlags) (string, error) {
	if o.policyFile == "" {
		return "", nil
	}
	b, err := c.readInput(o.policyFile)
	if err != nil {
		return "", fmt.Errorf("read the policy: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

func (c *cli) associationCreate() *cobra.Command {
	var o associationFlags
	cmd := &cobra.Command{
		Use: "create", Short: "Give the pods of a service account a role", Args: commandline.NoArgs,
		Example: "  latchkey-server association create -c prod -n web -s api -r arn:aws:iam::111122223333:role/web-reader",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.sel.Cluster == "" || o.sel.Namespace == "" || o.sel.ServiceAccount == "" || o.spec.RoleARN == "" {
				return usage("give --cluster, --namespace, --service-account and --role")
			}
			s := o.spec
			s.Cluster, s.Namespace, s.ServiceAccount = o.sel.Cluster, o.sel.Namespace, o.sel.ServiceAccount
			policy, err := c.policy(&o)
			if err != nil {
				return err
			}
			s.Policy = server.PolicyText(policy)
			if s.Tags, err = pairs("tag", o.tags); err != nil {
				return err
			}
			done, err := c.client().CreateAssociation(cmd.Context(), s)
			if err != nil {
				return err
			}
			return c.print(done, func(w io.Writer) { printAssociation(w, done) })
		},
	}
	c.selectorFlags(&o, cmd, false)
	o.roleFlags(cmd)
	c.outputFlag(cmd)
	return cmd
}

func (c *cli) associationList() *cobra.Command {
	var o associationFlags
	cmd := &cobra.Command{
		Use: "list", Short: "List a cluster's associations", Args: commandline.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := o.needCluster(); err != nil {
				return err
			}
			all, err := c.client().Associations(cmd.Context(), o.sel.Cluster, o.sel.Namespace, o.sel.ServiceAccount)
			if err != nil {
				return err
			}
			return c.print(struct {
				Associations []server.AssociationSpec `json:"associations"`
			}{all}, func(w io.Writer) {
				if len(all) == 0 {
					fmt.Fprintln(w, "No associations.")
					return
				}
				fmt.Fprintln(w, "NAMESPACE\tSERVICE ACCOUNT\tROLE\tTARGET ROLE\tID\tMODIFIED")
				for _, a := range all {
					fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", a.Namespace, a.ServiceAccount, a.RoleARN, dash(a.TargetRoleARN), a.ID, a.ModifiedAt.Format("2006-01-02 15:04Z"))
				}
			})
		},
	}
	c.selectorFlags(&o, cmd, false)
	c.outputFlag(cmd)
	return cmd
}

func (c *cli) associationDescribe() *cobra.Command {
	var o associationFlags
	cmd := &cobra.Command{
		Use: "describe", Short: "Show an association", Args: commandline.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := o.needOne(); err != nil {
				return err
			}
			a, err := c.client().Association(cmd.Context(), o.sel)
			if err != nil {
				return err
			}
			return c.print(a, func(w io.Writer) { printAssociation(w, a) })
		},
	}
	c.selectorFlags(&o, cmd, true)
	c.outputFlag(cmd)
	return cmd
}

func (c *cli) associationUpdate() *cobra.Command {
	var o associationFlags
	cmd := &cobra.Command{
		Use: "update", Short: "Change an association; what is not given stays", Args: commandline.NoArgs,
		Long: "update changes what new credentials are for. Pods that have some keep those until their agent renews\nthem, at the latest 20 minutes before they end.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := o.needOne(); err != nil {
				return err
			}
			var u server.Update
			f := cmd.Flags()
			if f.Changed("role") {
				u.RoleARN = &o.spec.RoleARN
			}
			if f.Changed("target-role") {
				u.TargetRoleARN = &o.spec.TargetRoleARN
			}
			if f.Changed("policy") {
				p, err := c.policy(&o)
				if err != nil {
					return err
				}
				u.Policy = &p
			}
			if f.Changed("disable-session-tags") {
				u.DisableSessionTags = &o.spec.DisableSessionTags
			}
			if f.Changed("tag") {
				if len(o.tags) == 1 && o.tags[0] == "" {
					o.tags = nil
				}
				tags, err := pairs("tag", o.tags)
				if err != nil {
					return err
				}
				if tags == nil {
					tags = map[string]string{}
				}
				u.Tags = &tags
			}
			if u.Empty() {
				return usage("say what to change: --role, --target-role, --policy, --disable-session-tags or --tag")
			}
			a, err := c.client().UpdateAssociation(cmd.Context(), o.sel, u)
			if err != nil {
				return err
			}
			return c.print(a, func(w io.Writer) { printAssociation(w, a) })
		},
	}
	c.selectorFlags(&o, cmd, true)
	o.roleFlags(cmd)
	c.outputFlag(cmd)
	return cmd
}

func (c *cli) associationDelete() *cobra.Command {
	var o associationFlags
	cmd := &cobra.Command{
		Use: "delete", Short: "Delete an association; credentials that were issued stay valid until they expire", Args: commandline.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := o.needOne(); err != nil {
				return err
			}
			a, err := c.client().DeleteAssociation(cmd.Context(), o.sel)
			if err != nil {
				return err
			}
			fmt.Fprintf(c.out, "deleted %s: %s/%s no longer gets %s\n", a.ID, a.Namespace, a.ServiceAccount, a.RoleARN)
			return nil
		},
	}
	c.selectorFlags(&o, cmd, true)
	return cmd
}

func (c *cli) associationExport() *cobra.Command {
	var o associationFlags
	cmd := &cobra.Command{
		Use: "export", Short: "Write a cluster's associations as YAML, for git", Args: commandline.NoArgs,
		Long: "export writes what import reads: sorted, without IDs and times, and without what add-ons own.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := o.needCluster(); err != nil {
				return err
			}
			f, err := c.client().Export(cmd.Context(), o.sel.Cluster)
			if err != nil {
				return err
			}
			return c.printYAML(f)
		},
	}
	c.clusterFlag(&o, cmd)
	return cmd
}

// errImport: some steps of an import could not be done.
var errImport = errors.New("not everything was imported; see the lines that say error")

func (c *cli) associationImport() *cobra.Command {
	var prune, dryRun bool
	cmd := &cobra.Command{
		Use: "import FILE", Short: "Make a cluster's associations what a YAML file says", Args: args("FILE"),
		Long: "import creates and updates what differs, and with --prune deletes what the file does not have. What\n" +
			"add-ons own is left alone. Running it twice changes nothing the second time. FILE may be - for\n" +
			"standard input, and may have several documents, one for each cluster.",
		Example: "  latchkey-server association export -c prod >prod.yaml\n" +
			"  latchkey-server association import --prune --dry-run prod.yaml",
		RunE: func(cmd *cobra.Command, given []string) error {
			data, err := c.readInput(given[0])
			if err != nil {
				return fmt.Errorf("read the associations: %w", err)
			}
			files, err := server.ParseAssociations(data)
			if err != nil {
				return err
			}
			var plans []server.Plan
			failed := 0
			for _, f := range files {
				p, err := c.client().Import(cmd.Context(), f, prune, dryRun)
				if err != nil {
					return fmt.Errorf("cluster %s: %w", f.Cluster, err)
				}
				plans = append(plans, p)
				failed += p.Failed()
			}
			if err := c.print(struct {
				Plans []server.Plan `json:"plans"`
			}{plans}, func(w io.Writer) { printPlans(w, plans) }); err != nil {
				return err
			}
			if failed > 0 {
				return errImport
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&prune, "prune", false, "delete associations that the file does not have")
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "say what would be done, and do nothing")
	c.outputFlag(cmd)
	return cmd
}

func printPlans(w io.Writer, plans []server.Plan) {
	for _, p := range plans {
		count := map[string]int{}
		for _, ch := range p.Changes {
			sign := map[string]string{server.ActionCreate: "+", server.ActionUpdate: "~", server.ActionDelete: "-", server.ActionConflict: "!"}[ch.Action]
			fmt.Fprintf(w, "%s %s\t%s/%s\t%s\n", sign, ch.Action, ch.Namespace, ch.ServiceAccount, dash(ch.ID))
			for _, d := range ch.Differences {
				fmt.Fprintf(w, "    %s: %s → %s\n", d.Member, dash(d.Old), dash(d.New))
			}
			if ch.Error != "" {
				fmt.Fprintf(w, "    error: %s\n", ch.Error)
			}
			if ch.Error == "" {
				count[ch.Action]++
			}
		}
		verb := ""
		if p.DryRun {
			verb = "would be "
		}
		fmt.Fprintf(w, "%s: %d %screated, %d %supdated, %d %sdeleted, %d unchanged", p.Cluster,
			count[server.ActionCreate], verb, count[server.ActionUpdate], verb, count[server.ActionDelete], verb, p.Unchanged)
		if p.Extra > 0 {
			fmt.Fprintf(w, ", %d not in the file left alone", p.Extra)
		}
		if n := p.Failed(); n > 0 {
			fmt.Fprintf(w, ", %d failed", n)
		}
		fmt.Fprintln(w)
	}
}

func printAssociation(w io.Writer, a server.AssociationSpec) {
	row := func(name, value string) {
		if value != "" {
			fmt.Fprintf(w, "%s\t%s\n", name, value)
		}
	}
	row("id", a.ID)
	row("arn", a.ARN)
	row("service account", a.Namespace+"/"+a.ServiceAccount)
	row("role", a.RoleARN)
	row("target role", a.TargetRoleARN)
	row("external id", a.ExternalID)
	row("policy", string(a.Policy))
	if a.DisableSessionTags {
		row("session tags", "disabled")
	}
	row("owner", a.OwnerARN)
	for _, k := range slices.Sorted(maps.Keys(a.Tags)) {
		row("tag", k+"="+a.Tags[k])
	}
	if a.CreatedAt != nil && a.ModifiedAt != nil {
		row("created, modified", a.CreatedAt.Format("2006-01-02 15:04:05Z")+", "+a.ModifiedAt.Format("2006-01-02 15:04:05Z"))
	}
}
