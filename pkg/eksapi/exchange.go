// SPDX-License-Identifier: Apache-2.0

package eksapi

import (
	"errors"
	"net/http"
	"strings"

	"github.com/latchkey-dev/latchkey/pkg/association"
	"github.com/latchkey-dev/latchkey/pkg/evidence"
	"github.com/latchkey-dev/latchkey/pkg/issuer"
	"github.com/latchkey-dev/latchkey/pkg/permission"
	"github.com/latchkey-dev/latchkey/pkg/tokencheck"
)

// audience is what tokens for credentials are made for.
const audience = "pods.eks.amazonaws.com"

type exchangeAnswer struct {
	Subject     exchangeSubject     `json:"subject"`
	Audience    string              `json:"audience"`
	Association exchangeAssociation `json:"podIdentityAssociation"`
	User        exchangeUser        `json:"assumedRoleUser"`
	Credentials exchangeCredentials `json:"credentials"`
}

type exchangeSubject struct {
	Namespace      string `json:"namespace"`
	ServiceAccount string `json:"serviceAccount"`
}

type exchangeAssociation struct {
	ARN string `json:"associationArn"`
	ID  string `json:"associationId"`
}

type exchangeUser struct {
	ARN string `json:"arn"`
	ID  string `json:"assumeRoleId"`
}

type exchangeCredentials struct {
	AccessKeyID     string `json:"accessKeyId"`
	SecretAccessKey string `json:"secretAccessKey"`
	SessionToken    string `json:"sessionToken"`
	// Expiration is in whole seconds, not rounded up.
	Expiration int64 `json:"expiration"`
}

// exchange is AssumeRoleForPodIdentity.
func (c *call) exchange() (any, error) {
	request := permission.Request{Action: c.route.op.action, Cluster: c.route.cluster}
	if err := c.allowSomewhere("cluster/" + shown(c.route.cluster)); err != nil {
		return nil, err
	}
	// An index that was never filled, or that the store has not confirmed for long,
	// cannot say that there is no association, nor that there still is one.
	if !c.Index.Ready() {
		return nil, notNow("the index of associations is not filled yet")
	}
	if c.Index.Behind() > c.MaxBehind {
		return nil, notNow("the index of associations is behind the store")
	}
	cluster, ok := c.Index.Cluster(c.route.cluster)
	if !ok {
		if !c.Index.Whole(c.route.cluster) {
			return nil, notNow(damagedRecord)
		}
		return nil, notFound("No cluster found for name: " + shown(c.route.cluster) + ".")
	}
	if err := c.checkRegion(cluster); err != nil {
		return nil, err
	}
	request.Resource, request.ResourceTags = cluster.ARN, cluster.Tags
	request.AnyNamespace = true
	if err := c.allow(request); err != nil {
		return nil, err
	}
	var token string
	// eksNodeName, instanceId and zone are sent too; the caller could write there
	// what it likes.
	if err := c.decode(member{"token", &token}); err != nil {
		return nil, err
	}
	if token == "" {
		return nil, c.invalidParameter("The parameter token is required.")
	}
	subject, err := c.Tokens.Check(c.r.Context(), cluster, token)
	if err != nil {
		var reasoned interface{ Reason() evidence.Reason }
		if errors.As(err, &reasoned) {
			c.record.Reason = string(reasoned.Reason())
		}
		return nil, err
	}
	c.record.subject(subject)
	request.Namespace, request.AnyNamespace = subject.Namespace, false
	if err := c.allow(request); err != nil {
		return nil, err
	}
	if err := c.checkNode(cluster, subject); err != nil {
		return nil, err
	}
	a, ok := c.Index.Lookup(cluster.Name, subject.Namespace, subject.ServiceAccount)
	if !ok {
		// Agents drop credentials on a 404, so it must be certain.
		if !c.Index.Whole(cluster.Name) {
			return nil, notNow(damagedRecord)
		}
		return nil, notFound("No Pod Identity association found for service account " + subject.Namespace + "/" + subject.ServiceAccount + ".")
	}
	c.record.association(a)
	issued, err := c.Issuer.Issue(c.r.Context(), issuer.Request{Cluster: cluster, Association: a, Subject: subject})
	if err != nil {
		var failed *issuer.Error
		if errors.As(err, &failed) {
			c.record.STSRequestIDs, c.record.STSCode = failed.STSRequestIDs, failed.Code
		}
		return nil, err
	}
	c.record.issued(issued)
	return exchangeAnswer{
		Subject: exchangeSubject{subject.Namespace, subject.ServiceAccount}, Audience: audience,
		Association: exchangeAssociation{a.ARN, a.ID},
		User:        exchangeUser{issued.AssumedRoleARN, issued.AssumedRoleID},
		Credentials: exchangeCredentials{issued.AccessKeyID, issued.SecretAccessKey, issued.SessionToken, issued.Expires.Unix()},
	}, nil
}

// checkNode keeps one node's agent from redeeming the tokens of another node's
// pods.
func (c *call) checkNode(cluster association.Cluster, subject tokencheck.Subject) error {
	if c.NodeBinding == BindOff {
		return nil
	}
	refuse := func(reason, message string) error {
		c.record.Reason = reason
		return &fault{status: http.StatusBadRequest, code: "AccessDeniedException", message: message}
	}
	node := c.caller.Node
	switch {
	case node == nil && c.NodeBinding == BindPrefer:
		return nil
	case node == nil:
		return refuse("caller_not_node", "Only the node that a pod runs on may ask for its credentials, and the caller is no node.")
	case node.Cluster != cluster.Name:
		return refuse("node_of_other_cluster", "The caller is a node of another cluster.")
	case subject.NodeName == "" && c.NodeBinding == BindPrefer:
		return nil
	case subject.NodeName == "":
		return refuse("token_names_no_node", "The token names no node, and only the node that a pod runs on may ask for its credentials.")
	case node.Name != subject.NodeName || node.UID != "" && subject.NodeUID != "" && !strings.EqualFold(node.UID, subject.NodeUID):
		return refuse("node_mismatch", "The pod of the token runs on another node than the caller.")
	}
	return nil
}

// damagedRecord is the cause of what cannot be said because of a damaged record.
const damagedRecord = "a record of the cluster in the store is damaged"

func notNow(cause string) error {
	return &fault{status: http.StatusServiceUnavailable, code: unavailable,
		message: "Associations cannot be looked up now, try again.", cause: errors.New(cause)}
}

func notFound(message string) error {
	return &fault{status: http.StatusNotFound, code: "ResourceNotFoundException", message: message}
}
