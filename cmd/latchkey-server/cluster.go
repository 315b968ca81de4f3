// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"github.com/latchkey-dev/latchkey/pkg/association"
	"github.com/latchkey-dev/latchkey/pkg/commandline"
	"github.com/latchkey-dev/latchkey/pkg/nodeauth/exchange"
	"github.com/latchkey-dev/latchkey/pkg/server"
)

func newCluster(c *cli) *cobra.Command {
	list := &cobra.Command{
		Use: "list", Short: "List the clusters", Args: commandline.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			all, err := c.client().Clusters(cmd.Context())
			if err != nil {
				return err
			}
			return c.print(struct {
				Clusters []server.ClusterSpec `json:"clusters"`
			}{all}, func(w io.Writer) {
				if len(all) == 0 {
					fmt.Fprintln(w, "No clusters. Add one with `latchkey-server cluster add`.")
					return
				}
				fmt.Fprintln(w, "NAME\tREGION\tACCOUNT\tKEYS\tTOKEN REVIEW\tALLOWED ROLES")
				for _, s := range all {
					review := "no"
					if s.TokenReview != nil {
						review = "yes"
					}
					roles := strings.Join(s.AllowedRoles, " ")
					if roles == "" {
						roles = "any of the account"
					}
					fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\t%s\n", s.Name, s.Region, s.Account, len(s.PinnedKeys), review, roles)
				}
			})
		},
	}
	describe := &cobra.Command{
		Use: "describe NAME", Short: "Show a cluster, as --config and cluster add --file take it with -o yaml", Args: args("NAME"),
		RunE: func(cmd *cobra.Command, given []string) error {
			s, err := c.client().Cluster(cmd.Context(), given[0])
			if err != nil {
				return err
			}
			return c.print(s, func(w io.Writer) { printCluster(w, s) })
		},
	}
	var force bool
	remove := &cobra.Command{
		Use: "remove NAME", Short: "Remove a cluster; with --force, its associations with it",
		Long: "remove refuses a cluster that has associations. Credentials that were issued stay valid until they\nexpire; no new ones are.",
		Args: args("NAME"),
		RunE: func(cmd *cobra.Command, given []string) error {
			if err := c.client().DeleteCluster(cmd.Context(), given[0], force); err != nil {
				return err
			}
			fmt.Fprintf(c.out, "removed %s\n", given[0])
			return nil
		},
	}
	remove.Flags().BoolVar(&force, "force", false, "remove its associations, too")
	c.outputFlag(list, describe)
	remove.ValidArgsFunction, describe.ValidArgsFunction = onlyFirst(c.clusterNames), onlyFirst(c.clusterNames)
	return group("cluster", "Clusters whose pods get credentials", newClusterAdd(c), remove, list, describe)
}

// printCluster is a cluster for a person.
func printCluster(w io.Writer, s server.ClusterSpec) {
	row := func(name, value string) { fmt.Fprintf(w, "%s\t%s\n", name, dash(value)) }
	row("name", s.Name)
	row("arn", s.ARN)
	row("issuers", strings.Join(s.Issuers, ", "))
	for _, k := range s.PinnedKeys {
		row("key", fmt.Sprintf("%s %s  kid %s", k.Algorithm, k.Fingerprint, k.ID))
	}
	roles := strings.Join(s.AllowedRoles, ", ")
	if roles == "" {
		roles = "any of account " + s.Account
	}
	row("allowed roles", roles)
	accounts := strings.Join(s.AllowedAccounts, ", ")
	if accounts == "" {
		accounts = "its own"
	}
	row("accounts of targets", accounts)
	review := "no: a token is good until it expires, though its pod be gone"
	if t := s.TokenReview; t != nil {
		review = t.Kubeconfig
		if t.Context != "" {
			review += ", context " + t.Context
		}
		review += "; in an outage: " + t.OnOutage
	}
	row("token review", review)
	agents := strings.Join(s.AgentServiceAccounts, ", ")
	if agents == "" {
		agents = exchange.DefaultAgents
	}
	row("agents", agents)
	for _, k := range slices.Sorted(maps.Keys(s.Tags)) {
		row("tag", k+"="+s.Tags[k])
	}
	if s.CreatedAt != nil && s.ModifiedAt != nil {
		row("created, modified", s.CreatedAt.Format("2006-01-02 15:04:05Z")+", "+s.ModifiedAt.Format("2006-01-02 15:04:05Z"))
	}
}

// clusterFlags are those of cluster add.
type clusterFlags struct {
	spec         server.ClusterSpec
	file         string
	keys         string
	kubeconfig   string
	context      string
	fingerprints []string
	yes          bool
	replace      bool
	review       server.TokenReviewSpec
	tags         []string
}

func newClusterAdd(c *cli) *cobra.Command {
	var o clusterFlags
	cmd := &cobra.Command{
		Use:   "add NAME",
		Short: "Add a cluster, with the keys that its tokens are signed with",
		Long: "add pins the public keys that the cluster signs service-account tokens with. They come from a file\n" +
			"(--keys: a JSON Web Key Set, or PEM such as kubeadm's sa.pub), or once, now, from the API server that\n" +
			"a kubeconfig names (--keys-from-kubeconfig). Their fingerprints are shown before they are pinned; the\n" +
			"server never fetches keys by itself.",
		Example: "  latchkey-server cluster add prod --region eu-central-1 --account 111122223333 \\\n" +
			"    --keys /etc/kubernetes/pki/sa.pub --issuer https://kubernetes.default.svc.cluster.local \\\n" +
			"    --allow-role 'arn:aws:iam::111122223333:role/prod/*'\n" +
			"  latchkey-server cluster add lab --region eu-central-1 --account 111122223333 \\\n" +
			"    --keys-from-kubeconfig ~/.kube/config --context lab\n" +
			"  latchkey-server cluster add lab --replace --token-review /etc/latchkey/lab.kubeconfig\n" +
			"  latchkey-server cluster describe lab -o yaml | latchkey-server cluster add --replace --file -",
		Args: func(cmd *cobra.Command, given []string) error {
			if o.file != "" && len(given) == 0 {
				return nil // the file has it
			}
			return args("NAME")(cmd, given)
		},
		RunE: func(cmd *cobra.Command, given []string) error {
			if len(given) == 1 {
				o.spec.Name = given[0]
			}
			if err := o.check(cmd); err != nil {
				return err
			}
			return c.addCluster(cmd, o)
		},
	}
	f := cmd.Flags()
	f.StringVarP(&o.file, "file", "f", "", "YAML `file` with the whole cluster instead of the other flags; - for standard input")
	f.StringVar(&o.spec.Region, "region", "", "`region` of the cluster's ARN, and of the STS that is called for it (required for a new one)")
	f.StringVar(&o.spec.Account, "account", "", "account `ID` of the cluster's ARN and of its roles (required for a new one)")
	f.StringVar(&o.spec.ARN, "arn", "", "`ARN`, if it is not arn:aws:eks:REGION:ACCOUNT:cluster/NAME")
	f.StringArrayVar(&o.spec.Issuers, "issuer", nil, "accepted iss of tokens, exactly; may be repeated (default with --keys-from-kubeconfig: what the API server says)")
	f.StringVar(&o.keys, "keys", "", "`file` with the public keys, JWKS or PEM")
	f.StringVar(&o.kubeconfig, "keys-from-kubeconfig", "", "ask the API server of this kubeconfig `file` for the keys, once, now")
	f.StringVar(&o.context, "context", "", "`context` of --keys-from-kubeconfig")
	f.StringArrayVar(&o.fingerprints, "fingerprint", nil, "`SHA256:…` that every key must have one of, instead of a question; may be repeated")
	f.BoolVar(&o.yes, "yes", false, "pin what the API server says without a question")
	f.StringArrayVar(&o.spec.AllowedRoles, "allow-role", nil, "ARN `pattern` of roles that associations may get, with * and ?; may be repeated (default every role of the account)")
	f.StringArrayVar(&o.spec.AllowedAccounts, "allow-account", nil, "account `ID` that target roles may be of besides the cluster's own, or *; may be repeated")
	f.StringVar(&o.review.Kubeconfig, "token-review", "", "kubeconfig `file`, on the server's machine, of a user who may create TokenReviews:\nthe API server is asked whether a token's pod still lives; none takes it away")
	f.StringVar(&o.review.Context, "token-review-context", "", "`context` in it")
	f.StringVar(&o.review.OnOutage, "token-review-outage", association.OnOutageRefuse, "what to do while that API server is away: refuse (answer 503) or keys (go on with the keys alone)")
	f.StringArrayVar(&o.spec.AgentServiceAccounts, "agent", nil, "`NAMESPACE/NAME` of a service account whose tokens prove a node; may be repeated")
	f.StringArrayVar(&o.tags, "tag", nil, "`KEY=VALUE`; may be repeated")
	f.BoolVar(&o.replace, "replace", false, "change a cluster that is there; what is not given stays")
	_ = cmd.RegisterFlagCompletionFunc("token-review-outage", cobra.FixedCompletions([]string{association.OnOutageRefuse, association.OnOutageKeys}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// check refuses flags that would not be looked at: one of them may have been
// meant as a limit.
func (o *clusterFlags) check(cmd *cobra.Command) error {
	fl := cmd.Flags()
	for _, f := range []struct{ flag, needs, or string }{
		{"context", "keys-from-kubeconfig", ""}, {"token-review-context", "token-review", "replace"}, {"token-review-outage", "token-review", "replace"},
	} {
		if o.file == "" && fl.Changed(f.flag) && !fl.Changed(f.needs) && (f.or == "" || !fl.Changed(f.or)) {
			return usage("--%s says nothing without --%s", f.flag, f.needs)
		}
	}
	if o.file == "" {
		return nil
	}
	for _, flag := range []string{"region", "account", "arn", "issuer", "keys", "keys-from-kubeconfig", "context", "allow-role", "allow-account",
		"token-review", "token-review-context", "token-review-outage", "agent", "tag"} {
		if fl.Changed(flag) {
			return usage("--%s and --file: write it into the file", flag)
		}
	}
	return nil
}

func (c *cli) addCluster(cmd *cobra.Command, o clusterFlags) error {
	s := o.spec
	var err error
	if o.file != "" {
		data, err := c.readInput(o.file)
		if err != nil {
			return fmt.Errorf("read the cluster: %w", err)
		}
		if err := yaml.UnmarshalStrict(data, &s); err != nil {
			return fmt.Errorf("%w: %s: %w", server.ErrConfig, o.file, err)
		}
		if o.spec.Name != "" && s.Name != o.spec.Name {
			return usage("%s is of cluster %q, not of %q", o.file, s.Name, o.spec.Name)
		}
	} else {
		if s.Tags, err = pairs("tag", o.tags); err != nil {
			return err
		}
		if o.keys != "" && o.kubeconfig != "" {
			return usage("give --keys or --keys-from-kubeconfig, not both")
		}
		s.KeysFile = o.keys
		if cmd.Flags().Changed("token-review") && o.review.Kubeconfig != noReview {
			s.TokenReview = &o.review
		}
		if o.replace {
			if err := c.keepOthers(cmd, &o, &s); err != nil {
				return err
			}
		}
		if o.keys == "" && o.kubeconfig == "" && len(s.Keys) == 0 {
			return usage("give --keys or --keys-from-kubeconfig; see %s --help", cmd.CommandPath())
		}
	}
	ask := false
	if o.kubeconfig != "" {
		fetched, err := server.FetchKeys(cmd.Context(), o.kubeconfig, o.context)
		if err != nil {
			return err
		}
		s.Keys = fetched.Document
		if len(s.Issuers) == 0 {
			s.Issuers = []string{fetched.Issuer}
		}
		fmt.Fprintf(c.errOut, "%s says that it signs tokens of issuer %s with:\n", fetched.Server, fetched.Issuer)
		ask = !o.yes && len(o.fingerprints) == 0
	}
	pinned, err := s.Resolve()
	if err != nil {
		return err
	}
	for _, k := range pinned {
		fmt.Fprintf(c.errOut, "  %s %s  kid %s\n", k.Algorithm, k.Fingerprint, k.ID)
		if len(o.fingerprints) > 0 && !slices.Contains(o.fingerprints, k.Fingerprint) {
			return fmt.Errorf("%w: key %s has fingerprint %s, which is not among --fingerprint; nothing was pinned", server.ErrConfig, k.ID, k.Fingerprint)
		}
	}
	if ask {
		if err := c.confirm("Pin these keys for " + s.Name + "?"); err != nil {
			return err
		}
	}
	done, err := c.client().PutCluster(cmd.Context(), s, o.replace)
	if err != nil {
		return err
	}
	fmt.Fprintf(c.out, "%s is registered with %d keys\n", done.ARN, len(done.PinnedKeys))
	return nil
}

// noReview as --token-review takes it away. An empty value does not: it is what
// a script without its variable gives.
const noReview = "none"

// keepOthers takes what no flag names from the cluster that is there: a change
// of keys must not lift limits that nobody thought of.
func (c *cli) keepOthers(cmd *cobra.Command, o *clusterFlags, s *server.ClusterSpec) error {
	was, err := c.client().Cluster(cmd.Context(), s.Name)
	if errors.Is(err, server.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	given := cmd.Flags().Changed
	for _, m := range []struct {
		flag      string
		into, was *string
	}{{"region", &s.Region, &was.Region}, {"account", &s.Account, &was.Account}, {"arn", &s.ARN, &was.ARN}} {
		if !given(m.flag) {
			*m.into = *m.was
		}
	}
	for _, m := range []struct {
		flag      string
		into, was *[]string
	}{{"allow-role", &s.AllowedRoles, &was.AllowedRoles}, {"allow-account", &s.AllowedAccounts, &was.AllowedAccounts}, {"agent", &s.AgentServiceAccounts, &was.AgentServiceAccounts}} {
		if !given(m.flag) {
			*m.into = *m.was
		}
	}
	// With other keys from an API server comes the issuer that it names.
	if !given("issuer") && o.kubeconfig == "" {
		s.Issuers = was.Issuers
	}
	if o.keys == "" && o.kubeconfig == "" {
		s.Keys = was.Keys
	}
	if was.TokenReview == nil || o.review.Kubeconfig == noReview {
		return nil
	}
	review := *was.TokenReview
	if given("token-review") {
		review.Kubeconfig, review.Context = o.review.Kubeconfig, "" // another file's contexts are others
	}
	if given("token-review-context") {
		review.Context = o.review.Context
	}
	if given("token-review-outage") {
		review.OnOutage = o.review.OnOutage
	}
	s.TokenReview = &review
	return nil
}

// confirm asks a person. Where there is none, it refuses and says what to give.
func (c *cli) confirm(question string) error {
	f, ok := c.in.(*os.File)
	if ok {
		fi, err := f.Stat()
		ok = err == nil && fi.Mode()&os.ModeCharDevice != 0
	}
	if !ok {
		return usage("nobody is here to look at the fingerprints: give --fingerprint or --yes")
	}
	fmt.Fprintf(c.errOut, "%s [y/N] ", question)
	line, _ := bufio.NewReader(c.in).ReadString('\n')
	if l := strings.ToLower(strings.TrimSpace(line)); l != "y" && l != "yes" {
		return errors.New("nothing was pinned")
	}
	return nil
}
