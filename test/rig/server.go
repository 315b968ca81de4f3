// SPDX-License-Identifier: Apache-2.0

//go:build linux

package rig

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/eks"

	"github.com/latchkey-dev/latchkey/test/testnode"
)

// What is the same for every server of a rig.
const (
	serverListen = "127.0.0.1:8443"
	serverSide   = "8444"
	// NodeName is the node in the tokens of the rig's pods.
	NodeName = "node-1"
)

// Server is latchkey-server's process: the cluster half, on the node's
// loopback.
type Server struct {
	// URL is the endpoint of its APIs, in the node's network namespace.
	URL string

	rig    *Rig
	binary string
	dir    string
	// admin may do everything; its keys are the SDK's.
	admin aws.Credentials
	cmd   *testnode.Cmd
	log   *buffer
	done  chan struct{}
	err   error
}

// StartServer starts latchkey-server on the node with a store of its own, the
// rig's cluster, a user for EKS and one for the node's agent, and waits until it
// is ready. Agents that are started afterwards ask it, and no longer the
// stand-in for EKS Auth. Unless the arguments say otherwise, it calls no STS.
func (r *Rig) StartServer(ctx context.Context, binary string, more ...string) (*Server, error) {
	s := &Server{URL: "http://" + serverListen, rig: r, binary: binary, dir: filepath.Join(r.Node.Dir(), "server"), log: &buffer{}, done: make(chan struct{})}
	var err error
	if s.admin, err = s.addUser(ctx, "admin"); err != nil {
		return nil, err
	}
	node, err := s.addUser(ctx, "agent", "--node", Cluster+"/"+NodeName)
	if err != nil {
		return nil, err
	}
	config, err := json.Marshal(map[string]any{"clusters": []map[string]any{{
		"name": Cluster, "region": Region, "account": Account,
		"issuers": []string{r.Signer.Issuer()}, "keysFile": r.keys,
	}}})
	if err != nil {
		return nil, err
	}
	// JSON is YAML.
	file := filepath.Join(r.Node.Dir(), "server.yaml")
	if err := os.WriteFile(file, config, 0o600); err != nil {
		return nil, err
	}
	args := append([]string{"serve", "--state-dir", s.dir, "--config", file, "--listen", serverListen,
		"--metrics-address", "127.0.0.1:" + serverSide, "--stand-in-sts"}, more...)
	s.cmd = r.Node.HostPlace().WithEnv("AWS_EC2_METADATA_DISABLED=true").Command(context.Background(), append([]string{binary}, args...)...)
	s.cmd.Stdout, s.cmd.Stderr = s.log, s.log
	if err := s.cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting the server: %w", err)
	}
	go func() {
		s.err = s.cmd.Wait()
		close(s.done)
	}()
	for {
		_, last := r.Get(ctx, serverSide, "/readyz")
		if last == nil {
			break
		}
		select {
		case <-s.done:
			return nil, fmt.Errorf("the server ended: %w; its log:\n%s", errors.Join(s.err, last), s.Log())
		case <-ctx.Done():
			s.Kill()
			return nil, fmt.Errorf("the server did not become ready: %w; its log:\n%s", last, s.Log())
		case <-time.After(20 * time.Millisecond):
		}
	}
	r.endpoint, r.nodeKey, r.nodeSecret = s.URL, node.AccessKeyID, node.SecretAccessKey
	return s, nil
}

// addUser makes a user with the server's own CLI.
func (s *Server) addUser(ctx context.Context, name string, more ...string) (aws.Credentials, error) {
	cmd := s.Command(ctx, append([]string{"user", "add", name}, more...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return aws.Credentials{}, fmt.Errorf("latchkey-server user add: %w: %s", err, &stderr)
	}
	var c aws.Credentials
	for line := range strings.Lines(string(out)) {
		k, v, _ := strings.Cut(strings.TrimSpace(line), "=")
		switch k {
		case "AWS_ACCESS_KEY_ID":
			c.AccessKeyID = v
		case "AWS_SECRET_ACCESS_KEY":
			c.SecretAccessKey = v
		}
	}
	if !c.HasKeys() {
		return c, errors.New("latchkey-server user add printed no key")
	}
	return c, nil
}

// Command is a command of the server's CLI for this server.
func (s *Server) Command(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, s.binary, slices.Concat(args, []string{"--state-dir", s.dir})...)
}

// EKS is an unmodified client of aws-sdk-go-v2 for the association API, whose
// connections are made in the node's network namespace by this process. Its
// user may do everything.
func (s *Server) EKS() *eks.Client {
	return eks.New(eks.Options{
		Region: Region, BaseEndpoint: aws.String(s.URL), HTTPClient: s.rig.client(),
		Credentials: credentials.StaticCredentialsProvider{Value: s.admin},
	})
}

// StateDir is the server's.
func (s *Server) StateDir() string { return s.dir }

// Audit is what the server has written into its audit log.
func (s *Server) Audit() (string, error) {
	b, err := os.ReadFile(filepath.Join(s.dir, "audit.jsonl"))
	return string(b), err
}

// Log is what the server has written so far.
func (s *Server) Log() string { return s.log.String() }

// Stop asks the server to stop and waits for it; the error is how it ended.
func (s *Server) Stop(ctx context.Context) error {
	_ = s.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-s.done:
		return s.err
	case <-ctx.Done():
		s.Kill()
		return fmt.Errorf("the server did not stop: %w", ctx.Err())
	}
}

// Kill is kill -9.
func (s *Server) Kill() {
	_ = s.cmd.Process.Kill()
	<-s.done
}
