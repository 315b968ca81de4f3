// SPDX-License-Identifier: Apache-2.0

package eksapi

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/latchkey-dev/latchkey/pkg/association"
	"github.com/latchkey-dev/latchkey/pkg/issuer"
	"github.com/latchkey-dev/latchkey/pkg/sigv4"
	"github.com/latchkey-dev/latchkey/pkg/tokencheck"
)

// fault is an error as clients see it.
type fault struct {
	status  int
	code    string
	message string
	// cluster is the member clusterName of those errors that have it.
	cluster string
	// retryAfter is told with 429 and 503, in whole seconds; 0: nothing is.
	retryAfter time.Duration
	cause      error
}

func (f *fault) Error() string {
	if f.cause != nil {
		return f.code + ": " + f.cause.Error()
	}
	return f.code + ": " + f.message
}

func (f *fault) Unwrap() error { return f.cause }

func (c *call) invalidParameter(message string) error {
	if c.route.op.tags {
		return &fault{status: http.StatusBadRequest, code: "BadRequestException", message: message}
	}
	return &fault{status: http.StatusBadRequest, code: "InvalidParameterException", message: message, cluster: c.modelCluster()}
}

func (c *call) invalidRequest(message string) error {
	if c.route.op.tags {
		return &fault{status: http.StatusBadRequest, code: "BadRequestException", message: message}
	}
	return &fault{status: http.StatusBadRequest, code: "InvalidRequestException", message: message, cluster: c.modelCluster()}
}

// modelCluster is the clusterName of errors: EKS has one, EKS Auth has not.
func (c *call) modelCluster() string {
	if c.route.op.auth {
		return ""
	}
	return shown(c.route.cluster)
}

// messenger is an error with a text for clients.
type messenger interface{ Message() string }

func text(err error, otherwise string) string {
	var m messenger
	if errors.As(err, &m) && m.Message() != "" {
		return m.Message()
	}
	return otherwise
}

// fault translates an error. What it does not know is internal, and its text
// stays here.
func (c *call) fault(err error) *fault {
	var f *fault
	if errors.As(err, &f) {
		return f
	}
	var refused *sigv4.Error
	if errors.As(err, &refused) {
		return authFault(refused)
	}
	var stored *association.Error
	if errors.As(err, &stored) {
		return c.storeFault(stored)
	}
	for _, m := range [...]struct {
		is     error
		status int
		code   string
		text   string
	}{
		{tokencheck.ErrInvalid, 400, "InvalidTokenException", "The token included in the request is invalid."},
		{tokencheck.ErrExpired, 400, "ExpiredTokenException", "The token included in the request is expired."},
		{tokencheck.ErrUnavailable, 503, unavailable, "The token cannot be checked now, try again."},
		{issuer.ErrAccessDenied, 400, "AccessDeniedException", "Unauthorized Exception! EKS does not have permissions to assume the associated role."},
		{issuer.ErrInvalidRequest, 400, "InvalidRequestException", "The association cannot be used as it is."},
		{issuer.ErrThrottled, 429, "ThrottlingException", "Too many requests, try again."},
		{issuer.ErrUnavailable, 503, unavailable, "Credentials cannot be issued now, try again."},
		{context.Canceled, 503, unavailable, "The request was cancelled."},
		{context.DeadlineExceeded, 503, unavailable, "The request took too long, try again."},
	} {
		if errors.Is(err, m.is) {
			f := &fault{status: m.status, code: m.code, message: text(err, m.text), cause: err}
			var issued *issuer.Error
			if errors.As(err, &issued) {
				f.retryAfter = issued.RetryAfter
			}
			return f
		}
	}
	return c.internal(err)
}

const unavailable = "ServiceUnavailableException"

func (c *call) internal(err error) *fault {
	code := "ServerException"
	if c.route.op != nil && c.route.op.auth {
		code = "InternalServerException"
	}
	return &fault{status: http.StatusInternalServerError, code: code, message: "An internal error occurred, try again.", cause: err}
}

// authFault: the same for both APIs.
func authFault(e *sigv4.Error) *fault {
	code := "IncompleteSignatureException"
	switch e.Reason {
	case sigv4.ErrMissing:
		code = "MissingAuthenticationTokenException"
	case sigv4.ErrUnknownKey:
		code = "UnrecognizedClientException"
	case sigv4.ErrExpiredKey:
		code = "ExpiredTokenException"
	case sigv4.ErrSignature, sigv4.ErrSkew, sigv4.ErrPresigned:
		code = "InvalidSignatureException"
	}
	return &fault{status: http.StatusForbidden, code: code, message: e.Message, cause: e.Reason}
}

func (c *call) storeFault(e *association.Error) *fault {
	f := &fault{message: e.Message, cluster: shown(e.Cluster), cause: e.Cause}
	if f.cluster == "" {
		f.cluster = c.modelCluster()
	}
	switch e.Kind {
	case association.InvalidParameter:
		f.status, f.code = http.StatusBadRequest, "InvalidParameterException"
	case association.InvalidRequest:
		f.status, f.code = http.StatusBadRequest, "InvalidRequestException"
	case association.LimitExceeded:
		f.status, f.code = http.StatusBadRequest, "ResourceLimitExceededException"
	case association.ClusterNotFound, association.NotFound:
		f.status, f.code = http.StatusNotFound, "ResourceNotFoundException"
	case association.InUse:
		f.status, f.code = http.StatusConflict, "ResourceInUseException"
	case association.BadTags:
		f.status, f.code = http.StatusBadRequest, "BadRequestException"
	case association.TagsNotFound:
		f.status, f.code = http.StatusNotFound, "NotFoundException"
	case association.Unavailable:
		f.status, f.code, f.cluster = http.StatusServiceUnavailable, unavailable, ""
	default:
		return c.internal(e)
	}
	if c.route.op.tags {
		// The tag operations have two errors of their own for all these.
		f.cluster = ""
		switch f.status {
		case http.StatusNotFound:
			f.code = "NotFoundException"
		case http.StatusBadRequest, http.StatusConflict:
			f.status, f.code = http.StatusBadRequest, "BadRequestException"
		}
	}
	return f
}

// shown is a text of a stranger's as answers repeat it: not longer than any name
// that exists, and in one line.
func shown(s string) string {
	if len(s) > 160 {
		s = s[:160]
	}
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || r == utf8.RuneError {
			return '?'
		}
		return r
	}, s)
}

// finish records, answers and observes.
func (c *call) finish(answer any, err error) {
	var f *fault
	var body []byte
	if err == nil {
		if body, err = json.Marshal(answer); err != nil {
			err = c.internal(err)
		}
	}
	status, code := http.StatusOK, ""
	if err != nil {
		f = c.fault(err)
		status, code = f.status, f.code
		body, _ = json.Marshal(struct {
			Message string `json:"message"`
			Cluster string `json:"clusterName,omitempty"`
		}{f.message, f.cluster})
	}
	operation := "unknown"
	if c.route.op != nil {
		operation = c.route.op.name
		c.audit(f)
	}
	if status >= 500 {
		c.Log.Error("a request failed", "request_id", c.id, "operation", operation, "status", status, "code", code,
			"caller", c.caller.Name, "cluster", shown(c.route.cluster), "error", f)
	}
	h := c.w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("X-Amzn-Requestid", c.id)
	// SDKs set their clock by it, so it is this clock's.
	h.Set("Date", c.Now().UTC().Format(http.TimeFormat))
	if f != nil {
		h.Set("X-Amzn-Errortype", f.code)
		if status == http.StatusTooManyRequests || status == http.StatusServiceUnavailable {
			h.Set("Retry-After", strconv.Itoa(max(1, int((f.retryAfter+time.Second-1)/time.Second))))
		}
		if status == http.StatusMethodNotAllowed {
			h.Set("Allow", "GET, POST, DELETE")
		}
	}
	c.w.WriteHeader(status)
	_, _ = c.w.Write(body) // a client that is gone is nobody's error
	if c.Observe != nil {
		c.Observe(Observation{Operation: operation, Status: status, Code: code, Duration: c.Now().Sub(c.start),
			Stranger: c.route.op != nil && !c.verified, Unrecorded: c.unrecorded})
	}
}

// seconds is a time as rest-json has it: epoch seconds, with a fraction down to
// milliseconds if there is one.
type seconds time.Time

// MarshalJSON writes the number.
func (s seconds) MarshalJSON() ([]byte, error) {
	ms := time.Time(s).UnixMilli()
	b := strconv.AppendInt(nil, ms/1000, 10)
	if rest := ms % 1000; rest > 0 {
		b = append(b, '.', byte('0'+rest/100), byte('0'+rest/10%10), byte('0'+rest%10))
		for b[len(b)-1] == '0' {
			b = b[:len(b)-1]
		}
	}
	return b, nil
}
