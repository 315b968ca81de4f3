// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awsconfig "github.com/aws/aws-sdk-go-v2/config"

	"github.com/latchkey-dev/latchkey/pkg/eksauth"
)

// rotateInterval is how old credentials read from a file may become.
const rotateInterval = time.Minute

// newUpstream makes the client of EKS Auth with the node's own credentials,
// found as every AWS SDK finds them.
func newUpstream(ctx context.Context, cfg *Config, observe func(eksauth.Attempt), permit func(context.Context) error) (*eksauth.Client, error) {
	var opts []func(*awsconfig.LoadOptions) error
	if cfg.RotateCredentials {
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
	ec.ClusterName = cfg.ClusterName
	ec.Observe = observe
	ec.Permit = permit
	ec.NodeName = cfg.NodeName
	ec.UserAgent = "latchkey-agent/" + cfg.Version
	if cfg.Endpoint != "" {
		ec.Endpoint, ec.FIPS = cfg.Endpoint, false
	}
	c, err := eksauth.New(ec)
	if err != nil {
		return nil, fmt.Errorf("EKS Auth client: %w", err)
	}
	return c, nil
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
