// SPDX-License-Identifier: Apache-2.0

// Command eks speaks to a Latchkey server as others do: with the EKS client of
// aws-sdk-go-v2, and as an agent on the wire of EKS Auth. The suites run it on
// the node. Endpoint, keys and CA are in the environment that every SDK reads.
//
//	eks list CLUSTER                  the associations' ids
//	eks associate CLUSTER NAMESPACE SERVICEACCOUNT ROLE TARGETROLE
//	eks exchange CLUSTER <NODETOKEN   keys for a node token, as shell assignments
//	eks assume CLUSTER <PODTOKEN      what EKS Auth answers for a pod's token
//
// assume prints status, error code, message and account as JSON, and no secret.
package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/eks"
)

func main() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "eks:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	cfg, err := config.LoadDefaultConfig(ctx)
	if err != nil {
		return err
	}
	switch {
	case len(args) == 6 && args[0] == "associate":
		return associate(ctx, cfg, args[1:])
	case len(args) == 2 && args[0] == "list":
		return list(ctx, cfg, args[1])
	case len(args) == 2 && args[0] == "exchange":
		return exchange(ctx, cfg, args[1])
	case len(args) == 2 && args[0] == "assume":
		return assume(ctx, cfg, args[1])
	}
	return errors.New("usage: eks list CLUSTER | associate CLUSTER NAMESPACE SERVICEACCOUNT ROLE TARGETROLE | exchange CLUSTER | assume CLUSTER")
}

func list(ctx context.Context, cfg aws.Config, cluster string) error {
	pages := eks.NewListPodIdentityAssociationsPaginator(eks.NewFromConfig(cfg), &eks.ListPodIdentityAssociationsInput{ClusterName: &cluster})
	for pages.HasMorePages() {
		page, err := pages.NextPage(ctx)
		if err != nil {
			return err
		}
		for _, a := range page.Associations {
			fmt.Println(aws.ToString(a.AssociationId))
		}
	}
	return nil
}

func associate(ctx context.Context, cfg aws.Config, args []string) error {
	out, err := eks.NewFromConfig(cfg).CreatePodIdentityAssociation(ctx, &eks.CreatePodIdentityAssociationInput{
		ClusterName: &args[0], Namespace: &args[1], ServiceAccount: &args[2], RoleArn: &args[3], TargetRoleArn: &args[4],
	})
	if err != nil {
		return err
	}
	fmt.Println(aws.ToString(out.Association.AssociationId))
	return nil
}

// exchange is the one request that is not signed: the token is the proof.
func exchange(ctx context.Context, cfg aws.Config, cluster string) error {
	status, answer, err := post(ctx, cfg, "/latchkey/v1/clusters/"+cluster+"/node-credentials", nil)
	if err != nil {
		return err
	}
	var got struct {
		Credentials struct{ AccessKeyID, SecretAccessKey, SessionToken string }
	}
	if status != http.StatusOK {
		return fmt.Errorf("status %d: %s", status, answer)
	}
	if err := json.Unmarshal(answer, &got); err != nil {
		return errors.New("the answer is not JSON")
	}
	c := got.Credentials
	fmt.Printf("AWS_ACCESS_KEY_ID='%s'\nAWS_SECRET_ACCESS_KEY='%s'\nAWS_SESSION_TOKEN='%s'\n", c.AccessKeyID, c.SecretAccessKey, c.SessionToken)
	return nil
}

func assume(ctx context.Context, cfg aws.Config, cluster string) error {
	status, answer, err := post(ctx, cfg, "/clusters/"+cluster+"/assume-role-for-pod-identity", cfg.Credentials)
	if err != nil {
		return err
	}
	var got struct {
		Message         string
		AssumedRoleUser struct{ ARN string }
	}
	if err := json.Unmarshal(answer, &got); err != nil {
		return errors.New("the answer is not JSON")
	}
	return json.NewEncoder(os.Stdout).Encode(map[string]any{"status": status, "message": got.Message, "role": got.AssumedRoleUser.ARN})
}

// post sends the token on standard input, signed if there are credentials.
func post(ctx context.Context, cfg aws.Config, path string, credentials aws.CredentialsProvider) (int, []byte, error) {
	token, err := io.ReadAll(io.LimitReader(os.Stdin, 64<<10))
	if err != nil {
		return 0, nil, fmt.Errorf("reading the token: %w", err)
	}
	body, err := json.Marshal(map[string]string{"token": strings.TrimSpace(string(token))})
	if err != nil {
		return 0, nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, strings.TrimSuffix(aws.ToString(cfg.BaseEndpoint), "/")+path, bytes.NewReader(body))
	if err != nil {
		return 0, nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	if credentials != nil {
		keys, err := credentials.Retrieve(ctx)
		if err != nil {
			return 0, nil, err
		}
		sum := sha256.Sum256(body)
		if err := v4.NewSigner().SignHTTP(ctx, keys, req, hex.EncodeToString(sum[:]), "eks-auth", cfg.Region, time.Now()); err != nil {
			return 0, nil, err
		}
	}
	// The SDK's own client, which trusts AWS_CA_BUNDLE.
	resp, err := cfg.HTTPClient.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	return resp.StatusCode, answer, err
}
