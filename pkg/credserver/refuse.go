// SPDX-License-Identifier: Apache-2.0

package credserver

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"

	"github.com/valyala/fasthttp"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
	"github.com/latchkey-dev/latchkey/pkg/verdict"
)

// Codes of JSON errors. They are the names that AWS services use, so that the
// SDKs' own rules about what to retry apply.
const (
	codeAccessDenied  = "AccessDeniedException"
	codeBadRequest    = "InvalidRequestException"
	codeExpiredToken  = "ExpiredTokenException"
	codeInternal      = "InternalServerException"
	codeInvalidToken  = "InvalidTokenException"
	codeNotFound      = "ResourceNotFoundException"
	codeThrottled     = "ThrottlingException"
	codeUnavailable   = "ServiceUnavailableException"
	maxUpstreamText   = 2 << 10
	maxEchoedHost     = 256
	retryAfterSeconds = "1"

	tooManyConnectionsText = "Too Many Requests"
)

var (
	contentJSON = []byte("application/json")
	contentText = []byte("text/plain; charset=utf-8")

	tooManyConnections = []byte("HTTP/1.1 429 Too Many Requests\r\n" +
		"Content-Type: text/plain; charset=utf-8\r\n" +
		"X-Content-Type-Options: nosniff\r\n" +
		"Retry-After: " + retryAfterSeconds + "\r\n" +
		"Connection: close\r\n" +
		"Content-Length: 18\r\n\r\n" +
		tooManyConnectionsText + "\n")
)

// refusal is an answer without credentials.
type refusal struct {
	status int
	reason evidence.Reason
	code   string // empty: text only, whatever the client accepts
	text   string
	// retry: sent with Retry-After. The SDKs wait their own time.
	retry bool
	// close: the connection cannot become good, or its state is not known.
	close bool
	err   error
}

// refuse writes r: plain text as the reference agent does, or JSON for clients
// that say they read it. The Go SDK reads code and message, the JavaScript SDK
// Code and Message.
func (s *Server) refuse(ctx *fasthttp.RequestCtx, _ *conn, r refusal, rec *Record) {
	rec.Status, rec.Reason, rec.Told = r.status, r.reason, r.text
	resp := &ctx.Response
	resp.ResetBody()
	resp.SetStatusCode(r.status)
	resp.Header.Set(fasthttp.HeaderXContentTypeOptions, "nosniff")
	if r.retry {
		resp.Header.Set(fasthttp.HeaderRetryAfter, retryAfterSeconds)
	}
	if r.close {
		resp.SetConnectionClose()
	}
	if r.code != "" && wantsJSON(&ctx.Request.Header) {
		body, err := json.Marshal(struct {
			LowerCode    string `json:"code"`
			LowerMessage string `json:"message"`
			Code         string
			Message      string
		}{r.code, r.text, r.code, r.text})
		if err == nil {
			resp.Header.SetContentTypeBytes(contentJSON)
			resp.SetBodyRaw(body)
			return
		}
	}
	resp.Header.SetContentTypeBytes(contentText)
	resp.SetBodyRaw([]byte(r.text + "\n"))
}

// wantsJSON: the request names JSON; or it brings a token and names no type,
// which means any (RFC 9110 section 12.5.1). That is the JavaScript SDK's HTTP
// provider, which shows its user a reason only if it comes in JSON. A wildcard
// alone is what people's tools send; they get the reference agent's text.
func wantsJSON(h *fasthttp.RequestHeader) bool {
	accept := h.Peek(fasthttp.HeaderAccept)
	if len(accept) == 0 {
		return len(h.Peek(fasthttp.HeaderAuthorization)) > 0
	}
	return containsFold(accept, contentJSON)
}

// refusalOf words a verdict. The texts name no pod: whoever holds a stolen
// token must not learn from it whose it is or where that pod runs.
func refusalOf(v verdict.Verdict) refusal {
	if v.Outcome != verdict.Refuse {
		// RefuseRetry, and whatever a later version adds: uncertain.
		text := "No evidence of which pod opened this connection: it is older than the agent's kernel programs, " +
			"or was not opened by a process in a pod on this node. Retry on a new connection."
		if v.Reason == evidence.ReasonUnresolved {
			text = "The process that opened this connection is gone, so its pod cannot be told. Retry on a new connection."
		}
		return refusal{
			status: fasthttp.StatusServiceUnavailable, reason: v.Reason, code: codeUnavailable,
			text: text, retry: true, close: true,
		}
	}
	r := refusal{status: fasthttp.StatusForbidden, reason: v.Reason, code: codeAccessDenied, close: true}
	switch v.Reason {
	case evidence.ReasonPodMismatch:
		// Another token may fit this connection.
		r.close = false
		r.text = "Access Denied. The service account token belongs to another pod than the one that opened this connection. " +
			"Use this pod's own token, from the file named by AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE."
	case evidence.ReasonTwoPods:
		r.text = "Access Denied. This connection was made in one pod with a socket of another. " +
			"Create and connect the socket in the pod that needs the credentials."
	case evidence.ReasonForeignNetns:
		r.text = "Access Denied. This connection was opened in a network namespace that is not its pod's own. " +
			"Connect from the pod's own network namespace."
	case evidence.ReasonNotPod:
		r.text = "Access Denied. This connection was opened by a process outside every pod; credentials are given to pods only."
	case evidence.ReasonPodEnded:
		r.text = "Access Denied. The pod that opened this connection has ended."
	default:
		r.text = "Access Denied. The evidence of which pod opened this connection does not support the service account token."
	}
	return r
}

// tokenRefusal words the error of a TokenVerifier.
func tokenRefusal(err error) refusal {
	var te TokenError
	if !errors.As(err, &te) || te.Reason() == "" || te.Retriable() {
		// Nothing is known about the token: never an answer that would make a
		// client give up on a good one.
		r := refusal{
			status: fasthttp.StatusServiceUnavailable, reason: evidence.ReasonKeysUnavailable, code: codeUnavailable,
			text: "Service account token cannot be verified at the moment. Retry.", retry: true, err: err,
		}
		if te != nil && te.Reason() != "" {
			r.reason = te.Reason()
			if m := te.Message(); m != "" {
				r.text = m
			}
		}
		return r
	}
	r := refusal{status: fasthttp.StatusBadRequest, reason: te.Reason(), code: codeInvalidToken, text: te.Message(), err: err}
	if r.reason == evidence.ReasonTokenExpired {
		r.code = codeExpiredToken
	}
	if r.text == "" {
		r.text = "Service account token was refused: " + string(r.reason)
	}
	return r
}

// upstreamRefusal passes on what the upstream said. What is not the upstream's
// own word about this request is 5xx, so that clients come again and keep the
// credentials they have.
func (s *Server) upstreamRefusal(err error, token string) refusal {
	r := refusal{
		status: fasthttp.StatusInternalServerError, reason: evidence.ReasonUpstreamUnavailable,
		code: codeInternal, text: "No answer from the credential service. Retry.", err: err,
	}
	var ue *UpstreamError
	switch {
	case errors.Is(err, errEmptyCredential):
		r.reason, r.text = ReasonInternal, "Internal error"
		return r
	case s.stopping.Load() && waitEnded(err):
		r.status, r.reason, r.code = fasthttp.StatusServiceUnavailable, evidence.ReasonStopping, codeUnavailable
		r.text, r.retry, r.close = "The agent is stopping. Retry.", true, true
		return r
	case !errors.As(err, &ue):
		if waitEnded(err) {
			r.text = "The credential service has not answered yet. Retry."
		}
		return r
	}
	if ue.Reason != "" {
		r.reason = ue.Reason
	}
	fault := "server"
	if ue.Status >= 400 && ue.Status <= 599 {
		r.status = ue.Status
		if ue.Status < 500 {
			fault = "client"
		}
	}
	r.retry = r.status == fasthttp.StatusTooManyRequests || r.status == fasthttp.StatusServiceUnavailable
	r.code = upstreamCode(ue, r.status)
	if ue.Status == 0 && ue.Code == "" && ue.Message == "" {
		return r
	}
	text := "[" + ue.RequestID + "]: (" + r.code + "): " + ue.Message + ", fault: " + fault
	// An upstream that quotes the request would put the token into logs.
	text = strings.ReplaceAll(text, token, "[token]")
	if len(text) > maxUpstreamText {
		text = text[:maxUpstreamText]
	}
	r.text = strings.ToValidUTF8(text, "?")
	return r
}

func upstreamCode(ue *UpstreamError, status int) string {
	if ue.Code != "" {
		return ue.Code
	}
	switch status {
	case fasthttp.StatusForbidden:
		return codeAccessDenied
	case fasthttp.StatusNotFound:
		return codeNotFound
	case fasthttp.StatusTooManyRequests:
		return codeThrottled
	case fasthttp.StatusServiceUnavailable:
		return codeUnavailable
	}
	if status < 500 {
		return codeBadRequest
	}
	return codeInternal
}

// printable makes what a client sent fit to be shown.
func printable(b []byte) string {
	if len(b) > maxEchoedHost {
		b = b[:maxEchoedHost]
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, string(b))
}

// containsFold tells whether b contains the lower-case ASCII text sub, in any case.
func containsFold(b, sub []byte) bool {
	for i := 0; i+len(sub) <= len(b); i++ {
		if bytes.EqualFold(b[i:i+len(sub)], sub) {
			return true
		}
	}
	return false
}
