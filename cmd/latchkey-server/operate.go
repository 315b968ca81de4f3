// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/latchkey-dev/latchkey/pkg/commandline"
	"github.com/latchkey-dev/latchkey/pkg/etcd"
	"github.com/latchkey-dev/latchkey/pkg/server"
)

func newSnapshot(c *cli) *cobra.Command {
	save := &cobra.Command{
		Use: "save FILE", Short: "Write the store's content to a new file",
		Long: "save asks the running server. The file holds clusters, associations and the keys that seal nodes'\n" +
			"credentials: keep it as you keep secrets. The users file is not in it.",
		Args: args("FILE"),
		RunE: func(cmd *cobra.Command, given []string) error { return c.save(cmd, given[0]) },
	}
	restore := &cobra.Command{
		Use: "restore FILE", Short: "Make a new store of a snapshot; the server must not run",
		Long: "restore writes into --state-dir, in which there must be no store: move the old one (etcd/) away first.",
		Args: args("FILE"),
		RunE: func(_ *cobra.Command, given []string) error {
			f, err := os.Open(given[0])
			if err != nil {
				return err
			}
			defer f.Close()
			log, err := c.logger(c.errOut)
			if err != nil {
				return err
			}
			if err := os.MkdirAll(c.stateDir, 0o700); err != nil {
				return err
			}
			info, err := etcd.Restore(f, server.EtcdDir(c.stateDir), log)
			switch {
			case errors.Is(err, etcd.ErrNotEmpty):
				return fmt.Errorf("%w: move it away first", err)
			case errors.Is(err, etcd.ErrLocked):
				return fmt.Errorf("%w: stop the server first", err)
			case err != nil:
				return err
			}
			fmt.Fprintf(c.out, "restored revision %d, %d keys, into %s\n", info.Revision, info.Keys, server.EtcdDir(c.stateDir))
			return nil
		},
	}
	return group("snapshot", "Back up and restore the store", save, restore)
}

// save writes beside the file and renames: a file of that name is a whole
// snapshot, or there is none.
func (c *cli) save(cmd *cobra.Command, path string) (err error) {
	if _, err := os.Lstat(path); err == nil {
		return usage("%s is there already", path)
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".part-*") // mode 0600
	if err != nil {
		return err
	}
	defer func() {
		tmp.Close()
		os.Remove(tmp.Name())
	}()
	n, err := c.client().Snapshot(cmd.Context(), tmp)
	if err != nil {
		return err
	}
	if err := errors.Join(tmp.Sync(), tmp.Close()); err != nil {
		return err
	}
	info, err := etcd.Verify(tmp.Name())
	if err != nil {
		return fmt.Errorf("what was written is no good snapshot: %w", err)
	}
	// Not over a file that was made meanwhile.
	if err := os.Link(tmp.Name(), path); err != nil {
		return err
	}
	fmt.Fprintf(c.out, "saved revision %d, %d keys, %d bytes, to %s\n", info.Revision, info.Keys, n, path)
	return nil
}

func newNodeKeys(c *cli) *cobra.Command {
	show := func(k server.NodeKeys, err error) error {
		if err != nil {
			return err
		}
		return c.print(k, func(w io.Writer) {
			fmt.Fprintln(w, "KEY\tACTIVE FROM\tUSE")
			for _, key := range k.Keys {
				use := "opens"
				switch {
				case key.Sealing:
					use = "seals and opens"
				case key.ActiveFrom.After(time.Now()):
					use = "will seal"
				}
				fmt.Fprintf(w, "%s\t%s\t%s\n", key.ID, key.ActiveFrom.Format(time.RFC3339), use)
			}
		})
	}
	status := &cobra.Command{
		Use: "status", Short: "List the keys in use, without their secrets", Args: commandline.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return show(c.client().NodeKeys(cmd.Context())) },
	}
	var revoke bool
	rotate := &cobra.Command{
		Use: "rotate", Short: "Seal with a new key from now on",
		Long: "rotate makes a new key. The server does so by itself every day; after a snapshot got into wrong hands,\n" +
			"use --revoke: it takes the old keys away, and all credentials that nodes have been given end at once.\n" +
			"Agents trade their tokens for new ones by themselves, and serve from their caches meanwhile.",
		Args: commandline.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return show(c.client().RotateNodeKeys(cmd.Context(), revoke))
		},
	}
	rotate.Flags().BoolVar(&revoke, "revoke", false, "end all credentials that nodes have been given, at once")
	c.outputFlag(status, rotate)
	return group("node-keys", "The keys that seal nodes' credentials", rotate, status)
}

func newDoctor(c *cli) *cobra.Command {
	cmd := &cobra.Command{
		Use: "doctor", Short: "Look at the server and what it depends on, and say what to do",
		Long: "doctor asks the running server about its state directory, store, TLS certificate, users and audit log,\n" +
			"and lets it ask STS who it is and each cluster's API server whether it may review tokens and which keys\n" +
			"it has. Each line is ok, warn or fail; with a fail, the exit code is 4.",
		Args: commandline.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			findings, err := c.client().Doctor(cmd.Context())
			if err != nil {
				return err
			}
			failed := false
			for _, f := range findings {
				failed = failed || f.Level == server.LevelFail
			}
			if err := c.print(struct {
				Findings []server.Finding `json:"findings"`
			}{findings}, func(w io.Writer) {
				for _, f := range findings {
					fmt.Fprintf(w, "%s\t%s\t%s\n", f.Level, f.What, f.Found)
					if f.Fix != "" {
						fmt.Fprintf(w, "\t\t→ %s\n", f.Fix)
					}
				}
			}); err != nil {
				return err
			}
			if failed {
				return errFindings
			}
			return nil
		},
	}
	c.outputFlag(cmd)
	return cmd
}

func newStatus(c *cli) *cobra.Command {
	cmd := &cobra.Command{
		Use: "status", Short: "Show the running server", Args: commandline.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := c.client().Status(cmd.Context())
			if err != nil {
				return err
			}
			return c.print(s, func(w io.Writer) {
				ready := "yes"
				if s.NotReady != "" {
					ready = s.NotReady
				}
				tls := "plain HTTP"
				if s.TLS {
					tls = "TLS 1.3"
				}
				fmt.Fprintf(w, "version\t%s\n", s.Version)
				fmt.Fprintf(w, "running for\t%s\n", time.Since(s.Started).Round(time.Second))
				fmt.Fprintf(w, "ready\t%s\n", ready)
				fmt.Fprintf(w, "listens on\t%s, %s\n", s.Listen, tls)
				fmt.Fprintf(w, "STS\t%s\n", s.STS)
				fmt.Fprintf(w, "node binding\t%s\n", s.NodeBinding)
				fmt.Fprintf(w, "users file\t%s\n", s.UsersFile)
				fmt.Fprintf(w, "clusters, associations, users\t%d, %d, %d\n", s.Clusters, s.Associations, s.Users)
				fmt.Fprintf(w, "store revision\t%d, index %.1f s behind\n", s.Revision, s.Behind)
			})
		},
	}
	c.outputFlag(cmd)
	return cmd
}
