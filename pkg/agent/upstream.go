// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awsconfig "github.com/aws/aws-sdk-go-v2/config"

	"github.com/latchkey-dev/latchkey/pkg/eksauth"
	"github.com/latchkey-dev/latchkey/pkg/nodeauth"
)

// rotateInterval is how old credentials read from a file may become.
const rotateInterval = time.Minute

// newUpstream makes the client of EKS Auth with the node's own credentials:
// fetched for the node's token if there is one, else found as every AWS SDK
// finds them.
func newUpstream(ctx context.Context, cfg *Config, log *slog.Logger, observe func(eksauth.Attempt), permit func(context.Context) error) (*eksauth.Client, error) {
	var opts []func(*awsconfig.LoadOptions) error
	switch {
	case cfg.NodeTokenFile != "":
		// The SDK's own search ends here: what it might find on the node is for
		// AWS, and not for the server that the token is for.
		opts = append(opts, awsconfig.WithCredentialsProvider(aws.AnonymousCredentials{}))
	case cfg.RotateCredentials:
		opts = append(opts, awsconfig.WithCredentialsProvider(aws.NewCredentialsCache(credentialsFile{})))
	}
	a, err := awsconfig.LoadDefaultConfig(ctx, opts...)
	if err != nil {
		return nil, fmt.Errorf("read the AWS configuration: %w", err)
	}
	if a.Region == "" {
		return nil, fmt.Errorf("%w: no region: set AWS_REGION", ErrConfig)
	}
	ec, err := eksauth.ConfigFrom(ctx, a)
	if err != nil {
		return nil, fmt.Errorf("read the AWS configuration: %w", err)
	}
	// What the SDK read of the CA bundle was for good. The transport serves the
	// node token too.
	if file := caBundle(a.ConfigSources); file != "" {
		if base, ok := ec.Transport.(*http.Transport); ok {
			ec.Transport, err = eksauth.NewBundleTransport(eksauth.BundleConfig{File: file, Base: base, Logger: log})
			if err != nil {
				return nil, fmt.Errorf("%w: %w", ErrConfig, err)
			}
		}
	}
	ec.ClusterName = cfg.ClusterName
	ec.Observe = observe
	ec.Permit = permit
	ec.NodeName = cfg.NodeName
	ec.UserAgent = "latchkey-agent/" + cfg.Version
	if cfg.Endpoint != "" {
		ec.Endpoint, ec.FIPS = cfg.Endpoint, false
	}
	if cfg.NodeTokenFile != "" {
		if ec.Endpoint == "" {
			return nil, fmt.Errorf("%w: --node-token-file is for a Latchkey server: give its URL as --endpoint", ErrConfig)
		}
		p, err := nodeauth.NewProvider(nodeauth.ProviderConfig{
			Endpoint: ec.Endpoint, Cluster: cfg.ClusterName, TokenFile: cfg.NodeTokenFile,
			HTTP: &http.Client{Transport: ec.Transport}, Log: log,
		})
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrConfig, err)
		}
		ec.Credentials = p
	}
	ec.Logger = log
	c, err := eksauth.New(ec)
	if err != nil {
		return nil, fmt.Errorf("EKS Auth client: %w", err)
	}
	return c, nil
}

// caBundle is the file that AWS_CA_BUNDLE or the profile names, as the SDK finds
// it: the first of its sources that has one.
func caBundle(sources []any) string {
	for _, source := range sources {
		file := ""
		switch s := source.(type) {
		case awsconfig.EnvConfig:
			file = s.CustomCABundle
		case awsconfig.SharedConfig:
			file = s.CustomCABundle
		}
		if file != "" {
			return file
		}
	}
	return ""
}

// credentialsFile reads the default profile of the shared credentials file
// anew: on hybrid nodes another process replaces it.
type credentialsFile struct{}

func (credentialsFile) Retrieve(ctx context.Context) (aws.Credentials, error) {
	path := os.Getenv("AWS_SHARED_CREDENTIALS_FILE")
	if path == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return aws.Credentials{}, fmt.Errorf("find the shared credentials file: %w", err)
		}
		path = filepath.Join(home, ".aws", "credentials")
	}
	p, err := awsconfig.LoadSharedConfigProfile(ctx, "default", func(o *awsconfig.LoadSharedConfigOptions) {
		o.CredentialsFiles, o.ConfigFiles = []string{path}, []string{}
	})
	if err != nil {
		return aws.Credentials{}, fmt.Errorf("read the shared credentials file: %w", err)
	}
	if !p.Credentials.HasKeys() {
		return aws.Credentials{}, errors.New("the shared credentials file has no keys in its default profile")
	}
	c := p.Credentials
	c.Source = "SharedCredentialsFile"
	c.CanExpire, c.Expires = true, time.Now().Add(rotateInterval)
	return c, nil
}
