// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"github.com/latchkey-dev/latchkey/pkg/commandline"
	"github.com/latchkey-dev/latchkey/pkg/permission"
	"github.com/latchkey-dev/latchkey/pkg/server"
)

// userView is a user without secrets.
type userView struct {
	Name        string                  `json:"name"`
	Keys        []string                `json:"accessKeyIds"`
	Node        *permission.Node        `json:"node,omitempty"`
	Permissions []permission.Permission `json:"permissions,omitempty"`
}

func newUser(c *cli) *cobra.Command {
	list := &cobra.Command{
		Use: "list", Short: "List the users and their access key ids", Args: commandline.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := c.rightFile(cmd); err != nil {
				return err
			}
			users, err := permission.List(c.usersFile())
			if err != nil {
				return err
			}
			views := make([]userView, 0, len(users))
			for _, u := range users {
				v := userView{Name: u.Name, Keys: []string{}, Node: u.Node, Permissions: u.Permissions}
				for _, k := range u.Keys {
					v.Keys = append(v.Keys, k.ID)
				}
				views = append(views, v)
			}
			return c.print(struct {
				Users []userView `json:"users"`
			}{views}, func(w io.Writer) {
				if len(views) == 0 {
					fmt.Fprintln(w, "No users. Add one with `latchkey-server user add`.")
					return
				}
				fmt.Fprintln(w, "NAME\tACCESS KEYS\tMAY")
				for _, v := range views {
					fmt.Fprintf(w, "%s\t%s\t%s\n", v.Name, strings.Join(v.Keys, " "), may(v))
				}
			})
		},
	}
	c.outputFlag(list)
	remove := &cobra.Command{
		Use: "remove NAME", Short: "Remove a user; its keys end at once", Args: args("NAME"),
		RunE: func(cmd *cobra.Command, given []string) error {
			if err := c.rightFile(cmd); err != nil {
				return err
			}
			if err := permission.Remove(c.usersFile(), given[0]); err != nil {
				return err
			}
			c.reload(cmd)
			fmt.Fprintf(c.out, "removed %s\n", given[0])
			return nil
		},
	}
	remove.ValidArgsFunction = onlyFirst(c.userNames)
	return group("user", "Who may call the APIs, in the users file", newUserAdd(c), newUserRotate(c), remove, list)
}

// may says in few words what a user may do.
func may(v userView) string {
	if v.Node != nil {
		return "node " + v.Node.Name + " of " + v.Node.Cluster
	}
	if len(v.Permissions) == 0 {
		return "nothing"
	}
	p := v.Permissions[0]
	text := strings.Join(p.Actions, ",") + " in " + strings.Join(p.Clusters, ",") + "/" + strings.Join(p.Namespaces, ",")
	if len(p.PassRoles) > 0 {
		text += ", roles " + strings.Join(p.PassRoles, ",")
	} else {
		text += ", no roles"
	}
	if n := len(v.Permissions); n > 1 {
		text += fmt.Sprintf(" and %d more", n-1)
	}
	return text
}

func newUserAdd(c *cli) *cobra.Command {
	var (
		p    permission.Permission
		file string
		node string
	)
	cmd := &cobra.Command{
		Use:   "add NAME",
		Short: "Add a user and print its secret key, once",
		Long: "add gives a user one permission, made of the flags, or those of a file (--permissions). Without any\n" +
			"flag it may do everything in every cluster, and give every role; with some, it may give associations\n" +
			"the roles of --pass-role and no others. --node makes the keys those of one node's agent.\n" +
			"A running server reads the file at once.",
		Example: "  latchkey-server user add admin\n" +
			"  latchkey-server user add web-team --cluster prod --namespace web --pass-role 'arn:aws:iam::111122223333:role/web/*'\n" +
			"  latchkey-server user add node-7 --node prod/node-7",
		Args: args("NAME"),
		RunE: func(cmd *cobra.Command, given []string) error {
			u := permission.User{Name: given[0], Keys: []permission.AccessKey{permission.NewAccessKey()}}
			fl := cmd.Flags()
			single := fl.Changed("action") || fl.Changed("cluster") || fl.Changed("namespace") || fl.Changed("pass-role")
			switch {
			case node != "" && (single || file != ""), file != "" && single:
				return usage("give --node, or --permissions, or the flags of one permission")
			case node != "":
				cluster, name, ok := strings.Cut(node, "/")
				if !ok || cluster == "" || name == "" {
					return usage("--node %q: write CLUSTER/NODE", node)
				}
				u.Node = &permission.Node{Cluster: cluster, Name: name}
			case file != "":
				b, err := c.readInput(file)
				if err != nil {
					return fmt.Errorf("read the permissions: %w", err)
				}
				if u.Permissions, err = readPermissions(b, u); err != nil {
					return fmt.Errorf("%s: %w", file, err)
				}
				if len(u.Permissions) == 0 {
					return usage("--permissions %s: a list of permissions, as in the users file", file)
				}
			default:
				// Whoever limits a user to a namespace has not said that its pods may
				// have every role.
				if !single {
					p.PassRoles = []string{"*"}
				}
				u.Permissions = []permission.Permission{p}
			}
			if err := c.rightFile(cmd); err != nil {
				return err
			}
			// The first user may come before the first start.
			if err := os.MkdirAll(filepath.Dir(c.usersFile()), 0o700); err != nil {
				return err
			}
			if err := permission.Add(c.usersFile(), u); err != nil {
				return err
			}
			c.reload(cmd)
			c.printKey(u.Name, u.Keys[0])
			return nil
		},
	}
	f := cmd.Flags()
	f.StringArrayVar(&p.Actions, "action", []string{"*"}, "action `name` or pattern, such as eks:*; may be repeated")
	f.StringArrayVar(&p.Clusters, "cluster", []string{"*"}, "cluster `name` or pattern; may be repeated")
	f.StringArrayVar(&p.Namespaces, "namespace", []string{"*"}, "`namespace` or pattern; may be repeated")
	f.StringArrayVar(&p.PassRoles, "pass-role", nil, "`ARN` or pattern of roles that associations may be given, * for every one; may be repeated\n(default none if another flag limits the user, else every one)")
	f.StringVar(&file, "permissions", "", "YAML `file` with a list of permissions; - for standard input")
	f.StringVar(&node, "node", "", "`CLUSTER/NODE` whose agent gets these keys: they redeem tokens of pods there and nothing else")
	_ = cmd.RegisterFlagCompletionFunc("cluster", c.clusterNames)
	return cmd
}

// readPermissions reads a list of permissions as the users file has it, with its
// checks.
func readPermissions(b []byte, u permission.User) ([]permission.Permission, error) {
	var list any
	if err := yaml.UnmarshalStrict(b, &list); err != nil {
		return nil, fmt.Errorf("%w: %w", permission.ErrPermission, err)
	}
	doc, err := json.Marshal(map[string]any{"users": []any{map[string]any{
		"name": u.Name, "permissions": list,
		"keys": []any{map[string]string{"accessKeyId": u.Keys[0].ID, "secretAccessKey": u.Keys[0].Secret}},
	}}})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", permission.ErrPermission, err)
	}
	users, err := permission.Parse(doc) // JSON is YAML
	if err != nil {
		return nil, err
	}
	return users[0].Permissions, nil
}

func newUserRotate(c *cli) *cobra.Command {
	var finish bool
	cmd := &cobra.Command{
		Use:   "rotate-key NAME",
		Short: "Give a user a new key; with --finish, take the older ones away",
		Long: "rotate-key adds a key and prints its secret, once; the old one stays good until every client has the\n" +
			"new one and rotate-key --finish takes all but the newest away.",
		Args: args("NAME"),
		RunE: func(cmd *cobra.Command, given []string) error {
			if err := c.rightFile(cmd); err != nil {
				return err
			}
			file := c.usersFile()
			defer c.reload(cmd)
			if !finish {
				key := permission.NewAccessKey()
				if err := permission.AddKey(file, given[0], key); err != nil {
					return err
				}
				c.printKey(given[0], key)
				return nil
			}
			users, err := permission.List(file)
			if err != nil {
				return err
			}
			i := slices.IndexFunc(users, func(u permission.User) bool { return u.Name == given[0] })
			if i < 0 {
				return fmt.Errorf("%w: %s", permission.ErrNoUser, given[0])
			}
			keys := users[i].Keys
			if len(keys) < 2 {
				return errors.New("there is one key only: rotate-key without --finish adds another")
			}
			// The newest is the last one in the file.
			for _, k := range keys[:len(keys)-1] {
				if err := permission.RemoveKey(file, k.ID); err != nil {
					return err
				}
				fmt.Fprintf(c.out, "removed %s of %s\n", k.ID, given[0])
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&finish, "finish", false, "remove all keys but the newest")
	cmd.ValidArgsFunction = onlyFirst(c.userNames)
	return cmd
}

// rightFile refuses a users file that the running server does not read, unless
// it was named: a user that is in no server's file, or one that is not removed
// from it, goes unnoticed.
func (c *cli) rightFile(cmd *cobra.Command) error {
	if cmd.Flags().Changed("users") {
		return nil
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), asideTimeout)
	defer cancel()
	st, err := c.client().Status(ctx)
	if err != nil || st.UsersFile == "" {
		return nil // nobody to ask
	}
	here, err := filepath.Abs(c.usersFile())
	if err != nil {
		return err
	}
	ours, err1 := os.Stat(here)
	theirs, err2 := os.Stat(st.UsersFile)
	if here == filepath.Clean(st.UsersFile) || err1 == nil && err2 == nil && os.SameFile(ours, theirs) {
		return nil
	}
	return usage("the server reads its users from %s: give --users %s", st.UsersFile, st.UsersFile)
}

// reload has a running server read the users file now. It would by itself soon,
// so that a server that cannot be asked is no error.
func (c *cli) reload(cmd *cobra.Command) {
	ctx, cancel := context.WithTimeout(cmd.Context(), asideTimeout)
	defer cancel()
	if err := c.client().ReloadUsers(ctx); err != nil && !errors.Is(err, server.ErrNoServer) && !errors.Is(err, server.ErrNotPermitted) {
		fmt.Fprintln(c.errOut, "the server has not read the users file:", err)
	}
}

// printKey writes a key as people put it into an environment or a credentials
// file. It is the only place that prints a secret, and it is printed once: the
// users file has it, and nobody shows that.
func (c *cli) printKey(name string, k permission.AccessKey) {
	fmt.Fprintf(c.errOut, "Key of %s; the secret is not shown again:\n", name)
	fmt.Fprintf(c.out, "AWS_ACCESS_KEY_ID=%s\nAWS_SECRET_ACCESS_KEY=%s\n", k.ID, k.Secret)
}
