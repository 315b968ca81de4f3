// SPDX-License-Identifier: Apache-2.0

//go:build linux && privileged

package server

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"

	"github.com/latchkey-dev/latchkey/test/standin/tokens"
)

// client is an AWS client that calls operations by name and reports what its
// user would see.
type client interface {
	call(operation string, input map[string]any) reply
}

// reply is what a client's user sees: output, or the error's name and text.
type reply struct {
	output  map[string]any
	code    string
	message string
	// status is 0 where the client does not show it.
	status int
}

// jsClient is @aws-sdk/client-eks in a process of its own.
type jsClient struct {
	t   *testing.T
	in  io.Writer
	out *bufio.Scanner
}

func newJS(s *server, c aws.Credentials) *jsClient {
	s.t.Helper()
	if _, err := os.Stat("js/node_modules/.package-lock.json"); err != nil {
		s.t.Fatal("the JavaScript client is not installed: run make setup, or npm ci in test/server/js")
	}
	cmd := exec.CommandContext(s.ctx, "node", "js/client.mjs")
	cmd.Env = append(cleanEnv(), "AWS_REGION="+region, "AWS_ENDPOINT_URL_EKS="+s.url, "AWS_ACCESS_KEY_ID="+c.AccessKeyID, "AWS_SECRET_ACCESS_KEY="+c.SecretAccessKey)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		in.Close()
		_ = cmd.Wait()
	})
	lines := bufio.NewScanner(out)
	lines.Buffer(nil, 1<<20)
	return &jsClient{s.t, in, lines}
}

func (c *jsClient) call(operation string, input map[string]any) reply {
	c.t.Helper()
	if err := json.NewEncoder(c.in).Encode(map[string]any{"call": operation, "input": input}); err != nil {
		c.t.Fatal(err)
	}
	if !c.out.Scan() {
		c.t.Fatalf("the JavaScript client ended: %v", c.out.Err())
	}
	var a struct {
		Output map[string]any
		Status int
		Error  *struct {
			Name, Message, RequestID string
			Status                   int
			Modelled                 bool
		}
	}
	if err := json.Unmarshal(c.out.Bytes(), &a); err != nil {
		c.t.Fatal(err)
	}
	if a.Error == nil {
		return reply{output: a.Output, status: a.Status}
	}
	if !a.Error.Modelled || a.Error.RequestID == "" {
		c.t.Errorf("%s: the SDK takes %s for no error of its own, or saw no request id", operation, a.Error.Name)
	}
	return reply{code: a.Error.Name, message: a.Error.Message, status: a.Error.Status}
}

// awsCLI is Debian's AWS CLI 2.9, which is older than these operations, with a
// model of them added.
type awsCLI struct {
	s       *server
	env     []string
	service string
}

func newCLI(s *server, c aws.Credentials) *awsCLI {
	s.t.Helper()
	if _, err := os.Stat("/usr/bin/aws"); err != nil {
		s.t.Fatal("the AWS CLI is not installed: install Debian's package awscli")
	}
	home := s.t.TempDir()
	cli := &awsCLI{s: s, service: "eks", env: append(cleanEnv(), "HOME="+home, "AWS_CONFIG_FILE="+filepath.Join(home, "config"),
		"AWS_DEFAULT_REGION="+region, "AWS_ACCESS_KEY_ID="+c.AccessKeyID, "AWS_SECRET_ACCESS_KEY="+c.SecretAccessKey, "AWS_PAGER=", "AWS_MAX_ATTEMPTS=1")}
	for _, service := range []string{"eks", "eks-auth"} {
		if out, err := cli.run("configure", "add-model", "--service-name", service, "--service-model", "file://cli/"+service+".json"); err != nil {
			s.t.Fatalf("aws configure add-model: %v: %s", err, out)
		}
	}
	return cli
}

func (c *awsCLI) run(args ...string) (string, error) {
	cmd := exec.CommandContext(c.s.ctx, "/usr/bin/aws", args...)
	cmd.Env = c.env
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		return errOut.String(), err
	}
	return out.String(), nil
}

func (c *awsCLI) call(operation string, input map[string]any) reply {
	c.s.t.Helper()
	b, err := json.Marshal(input)
	if err != nil {
		c.s.t.Fatal(err)
	}
	var name strings.Builder
	for i, r := range operation {
		if i > 0 && r >= 'A' && r <= 'Z' {
			name.WriteByte('-')
		}
		name.WriteRune(r)
	}
	out, err := c.run(c.service, strings.ToLower(name.String()), "--endpoint-url", c.s.url, "--output", "json", "--no-paginate", "--cli-input-json", string(b))
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		c.s.t.Fatal(err)
	}
	if err == nil {
		var r reply
		if out = strings.TrimSpace(out); out != "" {
			if err := json.Unmarshal([]byte(out), &r.output); err != nil {
				c.s.t.Fatalf("aws %s printed %q", operation, out)
			}
		}
		return r
	}
	// An error occurred (CODE) when calling the NAME operation: MESSAGE
	_, rest, ok := strings.Cut(out, "An error occurred (")
	code, rest, ok2 := strings.Cut(rest, ")")
	if !ok || !ok2 {
		c.s.t.Fatalf("aws %s: %s", operation, out)
	}
	return reply{code: code, message: strings.TrimSpace(rest)}
}

// check compares a reply with what it should be.
func check(t *testing.T, what string, r reply, code string, status int, text string) {
	t.Helper()
	if r.code != code || r.status != 0 && r.status != status || !strings.Contains(r.message, text) {
		t.Errorf("%s: %+v; want %q %d with %q", what, r, code, status, text)
	}
}

func TestPrivilegedJavaScriptSDK(t *testing.T) {
	t.Parallel()
	s := start(t)
	s.addCluster(cluster, newSigner(t))
	everyOperation(t, s, newJS(s, s.user("admin")), newJS(s, s.user("nobody", "--action", "eks:List*", "--namespace", "none")))
}

func TestPrivilegedAWSCLI(t *testing.T) {
	t.Parallel()
	s := start(t)
	signer := newSigner(t)
	s.addCluster(cluster, signer)
	admin := newCLI(s, s.user("admin"))
	everyOperation(t, s, admin, newCLI(s, s.user("nobody", "--action", "eks:List*", "--namespace", "none")))

	// EKS Auth, by a client that is nobody's here.
	agent := newCLI(s, s.user("agent", "--node", cluster+"/"+node))
	agent.service = "eks-auth"
	s.cli("association", "create", "-c", cluster, "-n", "auth", "-s", "api", "-r", roleARN("reader"))
	assume := func(token string) reply {
		return agent.call("AssumeRoleForPodIdentity", map[string]any{"clusterName": cluster, "token": token})
	}
	pod := tokens.Claims{Namespace: "auth", ServiceAccount: "api"}
	r := assume(signer.Token(pod))
	user, _ := r.output["assumedRoleUser"].(map[string]any)
	creds, _ := r.output["credentials"].(map[string]any)
	expires, err := time.Parse(time.RFC3339, text(creds["expiration"]))
	if r.code != "" || !strings.HasPrefix(text(user["arn"]), "arn:aws:sts::111122223333:assumed-role/reader/eks-prod-api-0-") || err != nil || time.Until(expires) < 30*time.Minute {
		t.Errorf("AssumeRoleForPodIdentity: %s %s, expires %s", r.code, text(user["arn"]), expires)
	}
	expired := pod
	expired.IssuedAt = time.Now().Add(-2 * time.Hour)
	expired.Expiry = time.Now().Add(-time.Hour)
	check(t, "expired", assume(signer.Token(expired)), "ExpiredTokenException", 400, "must be before the expiration date/time")
	unbound := pod
	unbound.NoPod = true
	check(t, "unbound", assume(signer.Token(unbound)), "InvalidTokenException", 400, "")
	check(t, "foreign key", assume(newSigner(t).Token(pod)), "InvalidTokenException", 400, "")
	pod.ServiceAccount = "nobody"
	check(t, "no association", assume(signer.Token(pod)), "ResourceNotFoundException", 404, "")
}

func text(v any) string {
	s, _ := v.(string)
	return s
}

// everyOperation makes the calls of a day, and the mistakes.
func everyOperation(t *testing.T, s *server, c, stranger client) {
	t.Helper()
	in := map[string]any{"clusterName": cluster, "namespace": "web", "serviceAccount": "api", "roleArn": roleARN("team/api"), "tags": map[string]string{"team": "web"}, "clientRequestToken": "first"}
	r := c.call("CreatePodIdentityAssociation", in)
	a, _ := r.output["association"].(map[string]any)
	id, arn := text(a["associationId"]), text(a["associationArn"])
	if len(id) != 19 || text(a["roleArn"]) != roleARN("team/api") || a["createdAt"] == nil {
		t.Fatalf("create: %+v", r)
	}
	one := func(more ...any) map[string]any {
		m := map[string]any{"clusterName": cluster, "associationId": id}
		for i := 0; i < len(more); i += 2 {
			m[more[i].(string)] = more[i+1]
		}
		return m
	}
	again := c.call("CreatePodIdentityAssociation", in)
	if b, _ := again.output["association"].(map[string]any); text(b["associationId"]) != id {
		t.Errorf("replayed: %+v", again)
	}
	in["clientRequestToken"] = "second"
	check(t, "duplicate", c.call("CreatePodIdentityAssociation", in), "ResourceInUseException", 409, "Association already exists: "+id)
	r = c.call("UpdatePodIdentityAssociation", one("roleArn", roleARN("b"), "targetRoleArn", roleARN("c")))
	if a, _ := r.output["association"].(map[string]any); text(a["externalId"]) != "us-west-2/111122223333/prod/web/api" {
		t.Errorf("update: %+v", r)
	}
	r = c.call("UpdatePodIdentityAssociation", one("targetRoleArn", ""))
	if a, _ := r.output["association"].(map[string]any); text(a["roleArn"]) != roleARN("b") || a["targetRoleArn"] != nil {
		t.Errorf("target cleared: %+v", r)
	}
	c.call("TagResource", map[string]any{"resourceArn": arn, "tags": map[string]string{"a b": "c/d=é"}})
	c.call("UntagResource", map[string]any{"resourceArn": arn, "tagKeys": []string{"team", "never/was"}})
	r = c.call("ListTagsForResource", map[string]any{"resourceArn": arn})
	if tags, _ := r.output["tags"].(map[string]any); len(tags) != 1 || tags["a b"] != "c/d=é" {
		t.Errorf("tags: %+v", r)
	}
	r = c.call("DescribePodIdentityAssociation", one())
	if a, _ := r.output["association"].(map[string]any); text(a["associationArn"]) != arn {
		t.Errorf("describe: %+v", r)
	}

	importMany(s, 249, func(i int) string { return "many" })
	seen, pages := map[string]bool{}, 0
	list := map[string]any{"clusterName": cluster}
	for {
		r := c.call("ListPodIdentityAssociations", list)
		all, _ := r.output["associations"].([]any)
		for _, one := range all {
			seen[text(one.(map[string]any)["associationId"])] = true
		}
		pages++
		next := text(r.output["nextToken"])
		if next == "" || r.code != "" || pages > 10 {
			break
		}
		list["nextToken"] = next
	}
	if len(seen) != 250 || pages != 3 {
		t.Errorf("%d associations on %d pages, want 250 on 3", len(seen), pages)
	}
	r = c.call("ListPodIdentityAssociations", map[string]any{"clusterName": cluster, "namespace": "web", "serviceAccount": "api"})
	if all, _ := r.output["associations"].([]any); len(all) != 1 {
		t.Errorf("filtered: %+v", r)
	}

	create := func(member string, value any) reply {
		in := map[string]any{"clusterName": cluster, "namespace": "n", "serviceAccount": "s", "roleArn": roleARN("r")}
		in[member] = value
		return c.call("CreatePodIdentityAssociation", in)
	}
	check(t, "unknown cluster", create("clusterName", "nowhere"), "ResourceNotFoundException", 404, "No cluster found for name: nowhere.")
	check(t, "bad namespace", create("namespace", "Web"), "InvalidParameterException", 400, "")
	check(t, "cross-account role", create("roleArn", "arn:aws:iam::999999999999:role/r"), "InvalidParameterException", 400, "Cross-account pass role is not allowed")
	check(t, "aws: tag", create("tags", map[string]string{"aws:x": "y"}), "InvalidParameterException", 400, "")
	check(t, "empty update", c.call("UpdatePodIdentityAssociation", one("roleArn", "")), "InvalidParameterException", 400, "Cross-account pass role is not allowed")
	check(t, "short id", c.call("DescribePodIdentityAssociation", map[string]any{"clusterName": cluster, "associationId": "a-1"}), "InvalidParameterException", 400, "should be 19 characters long")
	check(t, "unknown id", c.call("DescribePodIdentityAssociation", map[string]any{"clusterName": cluster, "associationId": "a-00000000000000000"}), "ResourceNotFoundException", 404, "")
	check(t, "too many results", c.call("ListPodIdentityAssociations", map[string]any{"clusterName": cluster, "maxResults": 101}), "InvalidParameterException", 400, "")
	check(t, "tags of no ARN", c.call("ListTagsForResource", map[string]any{"resourceArn": "x"}), "BadRequestException", 400, "")
	check(t, "tags of what is not there", c.call("ListTagsForResource", map[string]any{"resourceArn": arn[:len(arn)-3] + "000"}), "NotFoundException", 404, "")
	r = stranger.call("DescribePodIdentityAssociation", one())
	check(t, "not permitted", r, "AccessDeniedException", 403, "is not authorized to perform: eks:DescribePodIdentityAssociation")

	r = c.call("DeletePodIdentityAssociation", one())
	if a, _ := r.output["association"].(map[string]any); text(a["associationId"]) != id {
		t.Errorf("delete: %+v", r)
	}
	check(t, "deleted twice", c.call("DeletePodIdentityAssociation", one()), "ResourceNotFoundException", 404, "")
}
