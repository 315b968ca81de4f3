// SPDX-License-Identifier: Apache-2.0

package issuer

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/service/sts"
	"github.com/aws/aws-sdk-go-v2/service/sts/types"
	"github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"

	"github.com/latchkey-dev/latchkey/pkg/association"
)

// Texts for pods. The first is EKS Auth's own.
const (
	messageDenied      = "Unauthorized Exception! EKS does not have permissions to assume the associated role."
	messageDeniedHop2  = "Unauthorized Exception! The associated role does not have permissions to assume the target role."
	messagePacked      = "The session policy and session tags of the association are too large together. Disable session tags for it, or shorten the policy."
	messagePolicy      = "The session policy of the association is malformed."
	messageRegion      = "STS is not activated in the region of the cluster for the account of the role."
	messageRefused     = "STS does not accept the session as the association asks for it."
	messageThrottled   = "Too many requests to STS, try again."
	messageUnavailable = "STS is unavailable, try again."
)

// classify says what an error of AssumeRole means. What is not certainly a no to
// this role is ErrUnavailable: a pod that is told no may drop the credentials it
// has.
func classify(err error, hop int) *Error {
	e := &Error{kind: ErrUnavailable, message: messageUnavailable, cause: err}
	var api smithy.APIError
	if !errors.As(err, &api) {
		return e
	}
	e.Code = shortCode(api.ErrorCode())
	e.RetryAfter = retryAfter(err)
	if status := statusOf(err); status >= 500 {
		return e
	}
	switch api.ErrorCode() {
	case "AccessDenied", "AccessDeniedException", "UnauthorizedOperation":
		e.kind, e.message = ErrAccessDenied, messageDenied
		if hop > 1 {
			e.message = messageDeniedHop2
		}
	case "PackedPolicyTooLarge", "PackedPolicyTooLargeException":
		e.kind, e.message = ErrInvalidRequest, messagePacked
	case "MalformedPolicyDocument", "MalformedPolicyDocumentException":
		e.kind, e.message = ErrInvalidRequest, messagePolicy
	case "RegionDisabledException":
		e.kind, e.message = ErrInvalidRequest, messageRegion
	case "ValidationError", "InvalidParameterValue", "InvalidParameterCombination", "InvalidParameter":
		e.kind, e.message = ErrInvalidRequest, messageRefused
	case "Throttling", "ThrottlingException", "ThrottledException", "RequestThrottled", "RequestThrottledException",
		"TooManyRequestsException", "RequestLimitExceeded", "SlowDown":
		e.kind, e.message = ErrThrottled, messageThrottled
	default:
		// ExpiredToken, InvalidClientTokenId, SignatureDoesNotMatch and their like
		// speak of the caller, which is this server.
		if statusOf(err) == 429 {
			e.kind, e.message = ErrThrottled, messageThrottled
		}
	}
	return e
}

// refusesDuration tells whether STS found the session too long: for the role, or
// for a caller that is a role's session itself.
func refusesDuration(e *Error) bool {
	var api smithy.APIError
	return errors.As(e.cause, &api) && api.ErrorCode() == "ValidationError" &&
		strings.Contains(strings.ToLower(api.ErrorMessage()), "durationseconds")
}

// refusesCaller tells whether STS found the caller's credentials to have ended.
func refusesCaller(code string) bool {
	switch code {
	case "ExpiredToken", "ExpiredTokenException", "InvalidClientTokenId", "UnrecognizedClientException":
		return true
	}
	return false
}

func statusOf(err error) int {
	var response *smithyhttp.ResponseError
	if errors.As(err, &response) {
		return response.HTTPStatusCode()
	}
	return 0
}

func requestIDsOf(err error) []string {
	var response *awshttp.ResponseError
	if errors.As(err, &response) && response.RequestID != "" {
		return []string{response.RequestID}
	}
	return nil
}

// shortCode keeps what can be an error code; it becomes a metric's label.
func shortCode(code string) string {
	if len(code) > 64 || strings.ContainsFunc(code, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '.')
	}) {
		return "other"
	}
	return code
}

// read takes an answer, whole or not at all. Some STS-compatible servers
// (MinIO) leave the assumed role empty, which AWS never does: then it is named
// as AWS would, after what was asked for.
func read(out *sts.AssumeRoleOutput, h hop, started time.Time, compatible bool) (Credentials, *Error) {
	broken := func(what string) (Credentials, *Error) {
		return Credentials{}, &Error{kind: ErrUnavailable, message: messageUnavailable, cause: fmt.Errorf("STS's answer has %s", what)}
	}
	c, u := out.Credentials, out.AssumedRoleUser
	if u == nil {
		u = &types.AssumedRoleUser{}
	}
	arn, id := aws.ToString(u.Arn), aws.ToString(u.AssumedRoleId)
	if compatible && (arn == "" || id == "") {
		role, err := association.ParseRoleARN(h.roleARN)
		if err != nil {
			return broken("no assumed role, and the role cannot be read")
		}
		arn, id = sessionARN(role, h.sessionName), roleName(role)+":"+h.sessionName
	}
	switch {
	case c == nil || aws.ToString(c.AccessKeyId) == "" || aws.ToString(c.SecretAccessKey) == "" || aws.ToString(c.SessionToken) == "":
		return broken("no credentials")
	case c.Expiration == nil || !c.Expiration.After(started):
		return broken("no time of expiry that is to come")
	case arn == "" || id == "":
		return broken("no assumed role")
	}
	return Credentials{
		AccessKeyID: *c.AccessKeyId, SecretAccessKey: *c.SecretAccessKey, SessionToken: *c.SessionToken,
		Expires:        c.Expiration.UTC(),
		AssumedRoleARN: arn, AssumedRoleID: id,
		SessionName: h.sessionName,
	}, nil
}

// roleName leaves the role's path out, as names and ARNs of sessions do.
func roleName(role association.ARN) string {
	return role.Resource[strings.LastIndexByte(role.Resource, '/')+1:]
}

// sessionARN is the ARN of a role's session.
func sessionARN(role association.ARN, session string) string {
	return fmt.Sprintf("arn:%s:sts::%s:assumed-role/%s/%s", role.Partition, role.Account, roleName(role), session)
}

// retryAfter is what the service asks for, in whole seconds, a minute at most.
func retryAfter(err error) time.Duration {
	var response *smithyhttp.ResponseError
	if !errors.As(err, &response) || response.Response == nil {
		return 0
	}
	seconds, parseErr := strconv.Atoi(response.Response.Header.Get("Retry-After"))
	if parseErr != nil || seconds < 0 {
		return 0
	}
	return min(time.Duration(seconds)*time.Second, time.Minute)
}
