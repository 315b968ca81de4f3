// SPDX-License-Identifier: Apache-2.0

package eksauth

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// Class says what an error means for whoever holds credentials already. Its
// text is the value of metric labels.
type Class string

// The classes of outcomes.
const (
	// ClassNone: no error.
	ClassNone Class = "ok"
	// ClassNotFound: the service account has no association, or there is no such
	// cluster. Final.
	ClassNotFound Class = "not_found"
	// ClassInvalidToken: the token is not genuine, or its pod or service account
	// is gone. Final for this token.
	ClassInvalidToken Class = "invalid_token"
	// ClassExpiredToken: the token has expired. Final for this token.
	ClassExpiredToken Class = "expired_token"
	// ClassAccessDenied: the role cannot be assumed, or the node itself is not
	// allowed to ask. The two cannot always be told apart.
	ClassAccessDenied Class = "access_denied"
	// ClassRejected: the service refused the request for another reason
	// (InvalidParameterException, InvalidRequestException).
	ClassRejected Class = "rejected"
	// ClassThrottled: too many requests; see RetryAfter.
	ClassThrottled Class = "throttled"
	// ClassUnavailable: no answer, or a 5xx. Says nothing about the pod.
	ClassUnavailable Class = "unavailable"
	// ClassNodeCredentials: the node has no credentials to sign with.
	ClassNodeCredentials Class = "node_credentials"
	// ClassInvalidResponse: an answer that the service never gives: undecodable,
	// incomplete, with expired credentials, or from somebody in between.
	ClassInvalidResponse Class = "invalid_response"
)

// One sentinel for each class, for errors.Is.
var (
	ErrNotFound        = errors.New("EKS Auth knows no association")
	ErrInvalidToken    = errors.New("EKS Auth refused the token")
	ErrExpiredToken    = errors.New("EKS Auth found the token expired")
	ErrAccessDenied    = errors.New("EKS Auth denied access")
	ErrRejected        = errors.New("EKS Auth rejected the request")
	ErrThrottled       = errors.New("EKS Auth throttles")
	ErrUnavailable     = errors.New("EKS Auth is unavailable")
	ErrNodeCredentials = errors.New("no credentials of the node")
	ErrInvalidResponse = errors.New("invalid answer from EKS Auth")
)

func sentinel(c Class) error {
	switch c {
	case ClassNotFound:
		return ErrNotFound
	case ClassInvalidToken:
		return ErrInvalidToken
	case ClassExpiredToken:
		return ErrExpiredToken
	case ClassAccessDenied:
		return ErrAccessDenied
	case ClassRejected:
		return ErrRejected
	case ClassThrottled:
		return ErrThrottled
	case ClassNodeCredentials:
		return ErrNodeCredentials
	case ClassInvalidResponse:
		return ErrInvalidResponse
	case ClassNone, ClassUnavailable:
	}
	return ErrUnavailable
}

// ClassOf classes an error of this package; ClassNone for nil. Errors it does
// not know, a context's among them, are ClassUnavailable: they say nothing.
func ClassOf(err error) Class {
	if err == nil {
		return ClassNone
	}
	var api *APIError
	if errors.As(err, &api) {
		return api.Class
	}
	for _, c := range []Class{ClassInvalidResponse, ClassNodeCredentials} {
		if errors.Is(err, sentinel(c)) {
			return c
		}
	}
	return ClassUnavailable
}

// APIError is an answer of the service that is not a success. Its texts are
// bounded, printable and free of the token.
type APIError struct {
	// Status is the HTTP status.
	Status int
	// Code is the error's name in the service's model, such as
	// "ResourceNotFoundException"; empty if whoever answered gave none.
	Code string
	// Message is the service's text.
	Message string
	// RequestID is from header x-amzn-RequestId.
	RequestID string
	// RetryAfter is how long the service asks to wait, 0 if it does not say.
	RetryAfter time.Duration
	// Class is what the error means.
	Class Class

	date time.Time // header Date, zero if absent
}

// Error describes the answer for an operator.
func (e *APIError) Error() string {
	return fmt.Sprintf("EKS Auth answered %d %s", e.Status, e.Text())
}

// Text is the description that pods get to see, in the form of the EKS Pod
// Identity Agent: "[request-id]: (Code): message, fault: client".
func (e *APIError) Text() string {
	fault := "client"
	if e.Status >= http.StatusInternalServerError {
		fault = "server"
	}
	return fmt.Sprintf("[%s]: (%s): %s, fault: %s", e.RequestID, e.Code, e.Message, fault)
}

// Is makes errors.Is work with the sentinel of the error's class.
func (e *APIError) Is(target error) bool { return target == sentinel(e.Class) }

// apiError reads an answer that is not 200.
func (c *Client) apiError(res *http.Response, body []byte, requestID, token string) *APIError {
	e := &APIError{Status: res.StatusCode, RequestID: requestID}
	var members struct {
		Type         any `json:"__type"`
		Code         any `json:"code"`
		Message      any `json:"message"`
		UpperMessage any `json:"Message"`
	}
	// The body may be anything; what is not JSON says nothing.
	_ = json.Unmarshal(body, &members)
	for _, candidate := range []any{res.Header.Get("X-Amzn-Errortype"), members.Type, members.Code} {
		if text, ok := candidate.(string); ok && bareCode(text) != "" {
			e.Code = clean(bareCode(text), 128, token)
			break
		}
	}
	for _, candidate := range []any{members.Message, members.UpperMessage} {
		if text, ok := candidate.(string); ok && text != "" {
			e.Message = clean(text, maxMessage, token)
			break
		}
	}
	e.Class = classify(e.Status, e.Code)
	e.RetryAfter = retryAfter(res.Header.Get("Retry-After"), c.cfg.Now())
	if date, err := http.ParseTime(res.Header.Get("Date")); err == nil {
		e.date = date
	}
	return e
}

// bareCode strips what AWS puts around an error's name: a namespace before #,
// an address after a colon.
func bareCode(text string) string {
	text, _, _ = strings.Cut(text, ":")
	return strings.TrimSpace(text[strings.LastIndexByte(text, '#')+1:])
}

// classify decides by status and code together. The status alone decides for
// 429 and 5xx only: a 404 or 403 without the service's code is a proxy's or a
// wrong endpoint's and says nothing about the pod. The code alone does not
// decide either: ExpiredTokenException is about the pod's token with status 400
// and about the node's own credentials with 403.
func classify(status int, code string) Class {
	switch {
	case status == http.StatusTooManyRequests || throttling(code):
		return ClassThrottled
	case status >= http.StatusInternalServerError, status == http.StatusRequestTimeout,
		status == http.StatusProxyAuthRequired:
		return ClassUnavailable
	case code == "" || status < http.StatusBadRequest:
		return ClassInvalidResponse
	case status == http.StatusNotFound && code == "ResourceNotFoundException":
		return ClassNotFound
	case status == http.StatusBadRequest && code == "InvalidTokenException":
		return ClassInvalidToken
	case status == http.StatusBadRequest && code == "ExpiredTokenException":
		return ClassExpiredToken
	case code == "AccessDeniedException" || status == http.StatusForbidden || status == http.StatusUnauthorized:
		return ClassAccessDenied
	case status == http.StatusBadRequest:
		return ClassRejected
	}
	return ClassInvalidResponse
}

func throttling(code string) bool {
	switch code {
	case "ThrottlingException", "Throttling", "TooManyRequestsException", "RequestLimitExceeded", "SlowDown":
		return true
	}
	return false
}

// maxRetryAfter bounds what an answer can make us wait for.
const maxRetryAfter = 5 * time.Minute

// retryAfter reads RFC 9110's header, seconds or a date.
func retryAfter(value string, now time.Time) time.Duration {
	if value == "" {
		return 0
	}
	if seconds, err := strconv.Atoi(value); err == nil {
		return min(time.Duration(max(0, min(seconds, 1<<20)))*time.Second, maxRetryAfter)
	}
	if at, err := http.ParseTime(value); err == nil {
		return min(max(0, at.Sub(now)), maxRetryAfter)
	}
	return 0
}

// retriable says whether another attempt within this call may succeed.
func retriable(err error) bool {
	var api *APIError
	if errors.As(err, &api) {
		switch api.Status {
		case http.StatusTooManyRequests, http.StatusInternalServerError, http.StatusBadGateway,
			http.StatusServiceUnavailable, http.StatusGatewayTimeout:
			return true
		}
		return api.Class == ClassThrottled
	}
	// No answer, or half of one. An attempt's own timeout is in this, the
	// caller's end is checked by the loop.
	return errors.Is(err, ErrUnavailable) || errors.Is(err, context.DeadlineExceeded)
}
