// SPDX-License-Identifier: Apache-2.0

package eksapi

import (
	"net/http"
	"net/url"
	"strings"

	"github.com/latchkey-dev/latchkey/pkg/permission"
)

// operation is one operation of the APIs.
type operation struct {
	name, service string
	action        permission.Action
	// audited: changes, and exchanges.
	audited bool
	// tags: the tag operations have errors of their own.
	tags bool
	// auth: of EKS Auth, whose errors differ.
	auth         bool
	deniedStatus int
	maxBody      int64
	rate         rateClass
	serve        func(*call) (any, error)
}

// route is a request's operation and what its path names, decoded.
type route struct {
	op      *operation
	cluster string
	id      string
	arn     string
}

func eks(name string, audited bool, rate rateClass, serve func(*call) (any, error)) *operation {
	return &operation{name: name, service: "eks", action: permission.Action("eks:" + name), audited: audited,
		deniedStatus: http.StatusForbidden, maxBody: MaxBody, rate: rate, serve: serve}
}

func eksTags(name string, audited bool, rate rateClass, serve func(*call) (any, error)) *operation {
	op := eks(name, audited, rate, serve)
	op.tags = true
	return op
}

// operations by path and method.
var (
	collectionOps = map[string]*operation{
		http.MethodGet:  eks("ListPodIdentityAssociations", false, rateRead, (*call).list),
		http.MethodPost: eks("CreatePodIdentityAssociation", true, rateWrite, (*call).create),
	}
	associationOps = map[string]*operation{
		http.MethodGet:    eks("DescribePodIdentityAssociation", false, rateRead, (*call).describe),
		http.MethodPost:   eks("UpdatePodIdentityAssociation", true, rateWrite, (*call).update),
		http.MethodDelete: eks("DeletePodIdentityAssociation", true, rateWrite, (*call).delete),
	}
	tagOps = map[string]*operation{
		http.MethodGet:    eksTags("ListTagsForResource", false, rateRead, (*call).listTags),
		http.MethodPost:   eksTags("TagResource", true, rateWrite, (*call).tag),
		http.MethodDelete: eksTags("UntagResource", true, rateWrite, (*call).untag),
	}
	exchangeOps = map[string]*operation{
		http.MethodPost: {name: "AssumeRoleForPodIdentity", service: "eks-auth", action: permission.AssumeRole, audited: true,
			auth: true, deniedStatus: http.StatusBadRequest, maxBody: MaxExchangeBody, rate: rateExchange, serve: (*call).exchange},
	}
)

// parseRoute finds the operation. It does not use http.ServeMux, which answers
// what it does not know in plain text, and redirects.
func parseRoute(r *http.Request) (route, *fault) {
	path := r.URL.EscapedPath()
	var out route
	var ops map[string]*operation
	if rest, ok := strings.CutPrefix(path, "/tags/"); ok {
		// Some clients escape the ARN's slashes, some do not.
		arn, err := url.PathUnescape(rest)
		if err != nil || arn == "" {
			return out, unknownOperation(http.StatusNotFound)
		}
		out.arn, ops = arn, tagOps
	} else if rest, ok := strings.CutPrefix(path, "/clusters/"); ok {
		parts := strings.Split(rest, "/")
		for i, p := range parts {
			plain, err := url.PathUnescape(p)
			if err != nil || plain == "" {
				return out, unknownOperation(http.StatusNotFound)
			}
			parts[i] = plain
		}
		out.cluster = parts[0]
		switch {
		case len(parts) == 2 && parts[1] == "pod-identity-associations":
			ops = collectionOps
		case len(parts) == 3 && parts[1] == "pod-identity-associations":
			out.id, ops = parts[2], associationOps
		case len(parts) == 2 && parts[1] == "assume-role-for-pod-identity":
			ops = exchangeOps
		}
	}
	if ops == nil {
		return out, unknownOperation(http.StatusNotFound)
	}
	op, ok := ops[r.Method]
	if !ok {
		return out, unknownOperation(http.StatusMethodNotAllowed)
	}
	out.op = op
	return out, nil
}

func unknownOperation(status int) *fault {
	return &fault{status: status, code: "UnknownOperationException", message: "There is no such operation."}
}
