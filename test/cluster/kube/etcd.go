// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"net/url"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/server/v3/embed"
)

// newEtcd is one etcd member on the loopback address, for state that is thrown
// away: without fsync and without TLS.
func newEtcd() *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:  "etcd",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg := embed.NewConfig()
			cfg.Name = "node"
			cfg.Dir = dir
			cfg.LogLevel = "error"
			cfg.UnsafeNoFsync = true
			client := []url.URL{{Scheme: "http", Host: "127.0.0.1:2379"}}
			peer := []url.URL{{Scheme: "http", Host: "127.0.0.1:2380"}}
			cfg.ListenClientUrls, cfg.AdvertiseClientUrls = client, client
			cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = peer, peer
			cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGTERM, syscall.SIGINT)
			defer stop()
			etcd, err := embed.StartEtcd(cfg)
			if err != nil {
				return fmt.Errorf("starting etcd: %w", err)
			}
			defer etcd.Close()
			select {
			case <-ctx.Done():
				return nil
			case err := <-etcd.Err():
				return err
			}
		},
	}
	cmd.Flags().StringVar(&dir, "data-dir", "", "data `directory`")
	_ = cmd.MarkFlagRequired("data-dir")
	return cmd
}
