// SPDX-License-Identifier: Apache-2.0

package credserver

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"time"

	"github.com/valyala/fasthttp"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
	"github.com/latchkey-dev/latchkey/pkg/verdict"
)

var errEmptyCredential = errors.New("the cache gave credentials that are empty or past their expiry")

// handle answers one request. It is fasthttp's Handler.
func (s *Server) handle(ctx *fasthttp.RequestCtx) {
	c, ok := ctx.Conn().(*conn)
	if !ok {
		// Only connections from Serve are attested; nothing else is answered.
		ctx.SetStatusCode(fasthttp.StatusInternalServerError)
		ctx.SetConnectionClose()
		return
	}
	start := s.now()
	// The request has been read: its deadline must not cut short a wait that
	// has its own.
	c.readBy.Store(0)
	rec := Record{Start: start}
	defer func() {
		if p := recover(); p != nil {
			s.logPanic(p)
			c.known, c.input.Token = nil, evidence.Token{}
			s.refuse(ctx, c, refusal{
				status: fasthttp.StatusInternalServerError, reason: ReasonInternal,
				code: codeInternal, text: "Internal error", close: true,
			}, &rec)
			s.finish(c, &rec)
		}
	}()
	s.answer(ctx, c, start, &rec)
	if s.stopping.Load() || wantsClose(&ctx.Request.Header) {
		ctx.SetConnectionClose()
	}
	c.waited()
	if s.observer != nil {
		s.finish(c, &rec)
	}
}

func (s *Server) finish(c *conn, rec *Record) {
	rec.Attestation, rec.Peer = c.input.Attestation, c.peer
	rec.Latency = s.now().Sub(rec.Start)
	s.observe(*rec)
}

// answer writes the response of one request and fills in its record.
func (s *Server) answer(ctx *fasthttp.RequestCtx, c *conn, now time.Time, rec *Record) {
	h := &ctx.Request.Header
	if !s.admit(c, now) {
		s.refuse(ctx, c, refusal{
			status: fasthttp.StatusTooManyRequests, reason: evidence.ReasonRateLimited,
			code: codeThrottled, text: "Too Many Requests", retry: true,
		}, rec)
		return
	}
	authority, path, ok := target(h)
	if !ok {
		s.refuse(ctx, c, refusal{
			status: fasthttp.StatusHTTPVersionNotSupported, reason: ReasonBadRequest,
			code: codeBadRequest, text: "HTTP Version Not Supported", close: true,
		}, rec)
		return
	}
	if len(h.Host()) == 0 && h.IsHTTP11() {
		s.refuse(ctx, c, refusal{
			status: fasthttp.StatusBadRequest, reason: ReasonBadRequest,
			code: codeBadRequest, text: "400 Bad Request: missing required Host header", close: true,
		}, rec)
		return
	}
	if string(path) != Path {
		s.refuse(ctx, c, refusal{
			status: fasthttp.StatusNotFound, reason: ReasonNotFound, text: "404 page not found",
		}, rec)
		return
	}
	if !s.hostAllowed(authority) {
		s.refuse(ctx, c, refusal{
			status: fasthttp.StatusForbidden, reason: evidence.ReasonHost,
			code: codeAccessDenied, text: s.wrongHost + printable(bareHost(authority)),
		}, rec)
		return
	}

	in := &c.input
	in.TokenRefused = ""
	in.PodEnded = c.live != nil && c.live.Ended()
	raw := h.Peek(fasthttp.HeaderAuthorization)
	known, refused := s.judgeToken(c, raw, now)
	if known != c.known {
		c.known = known
		in.Token = evidence.Token{}
		if known != nil {
			in.Token = known.token
		}
	}
	in.TokenRefused = refused.reason
	v := verdict.Decide(in)
	if v.Outcome == verdict.RefuseToken {
		rec.Err = refused.err
		if s.claims != nil && s.observer != nil && len(raw) > 0 {
			rec.Claimed = s.claimed(raw)
		}
		s.refuse(ctx, c, refused, rec)
		return
	}
	rec.Verdict, rec.Judged, rec.Token = v, true, in.Token
	if v.Outcome < verdict.Serve {
		s.refuse(ctx, c, refusalOf(v), rec)
		return
	}

	cred, err := s.credentials.Get(c.waiting(), CredentialRequest{
		Token:    in.Token,
		Raw:      known.raw,
		Pod:      in.Attestation.Pod,
		Uncached: v.Outcome == verdict.ServeUncached,
	})
	if err == nil && (len(cred.Body) == 0 || !cred.Expiry.IsZero() && !now.Before(cred.Expiry)) {
		err = errEmptyCredential
	}
	if err != nil {
		rec.Err = err
		s.refuse(ctx, c, s.upstreamRefusal(err, known.raw), rec)
		return
	}
	if !cred.Hit && !in.PodEnded && c.live != nil && c.live.Ended() {
		// The pod ended while it waited for the upstream.
		in.PodEnded = true
		v = verdict.Decide(in)
		rec.Verdict = v
		if v.Outcome < verdict.Serve {
			s.refuse(ctx, c, refusalOf(v), rec)
			return
		}
	}
	rec.Status, rec.Reason, rec.Hit = fasthttp.StatusOK, v.Reason, cred.Hit
	rec.Role, rec.Association = cred.Role, cred.Association
	ctx.Response.Header.SetContentTypeBytes(contentJSON)
	ctx.Response.SetBodyRaw(cred.Body)
}

// claimed reads a refused token for the record. What it gives is never Verified.
func (s *Server) claimed(raw []byte) evidence.Token {
	t, ok := s.claims.Claims(string(raw))
	if !ok {
		return evidence.Token{}
	}
	t.Verified = false
	return t
}

// admit charges the request to the connection's account.
func (s *Server) admit(c *conn, now time.Time) bool {
	if c.account.bucket.take(int64(now.Sub(s.epoch))) {
		return true
	}
	if s.patience <= 0 {
		return false
	}
	timer := time.NewTimer(s.patience)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-s.stopped:
		return false
	}
	return c.account.bucket.take(s.elapsed())
}

// judgeToken gives the verified token, or the refusal that the contract has
// for what was sent instead.
func (s *Server) judgeToken(c *conn, raw []byte, now time.Time) (*knownToken, refusal) {
	if len(raw) == 0 {
		return nil, refusal{
			status: fasthttp.StatusBadRequest, reason: evidence.ReasonTokenMissing,
			code: codeInvalidToken, text: "Service account token cannot be empty",
		}
	}
	known, err := s.verify(c, raw, now)
	if err != nil {
		return nil, tokenRefusal(err)
	}
	return known, refusal{}
}

// target gives authority and path of a request, and whether it is HTTP/1. The
// path is compared as it was sent: decoding or cleaning it would only add
// spellings. The absolute form is what RFC 9112 section 3.2.2 asks servers to
// accept; its authority counts, not the Host header.
func target(h *fasthttp.RequestHeader) (authority, path []byte, http1 bool) {
	if p := h.Protocol(); len(p) < 6 || p[5] != '1' {
		return nil, nil, false
	}
	authority, path = h.Host(), h.RequestURI()
	if len(path) > 0 && path[0] != '/' {
		const scheme = "http://"
		if len(path) < len(scheme) || !bytes.EqualFold(path[:len(scheme)], []byte(scheme)) {
			return nil, nil, true
		}
		rest := path[len(scheme):]
		end := bytes.IndexAny(rest, "/?")
		if end < 0 {
			return rest, nil, true
		}
		authority, path = rest[:end], rest[end:]
	}
	if q := bytes.IndexByte(path, '?'); q >= 0 {
		path = path[:q]
	}
	return authority, path, true
}

// hostAllowed compares text, as the reference agent does: a name or another
// spelling is what a browser or a confused proxy sends.
func (s *Server) hostAllowed(authority []byte) bool {
	for _, h := range s.hosts {
		if string(authority) == h {
			return true
		}
	}
	host := bareHost(authority)
	for _, h := range s.hosts {
		if string(host) == h {
			return true
		}
	}
	return false
}

// bareHost takes port and brackets off. What is not of the form host,
// host:port, [host] or [host]:port is given back whole, and matches nothing.
func bareHost(authority []byte) []byte {
	host := authority
	if colon := bytes.LastIndexByte(host, ':'); colon >= 0 && digits(host[colon+1:]) {
		before := host[:colon]
		bracketed := len(before) > 1 && before[0] == '[' && before[len(before)-1] == ']'
		if bracketed || bytes.IndexByte(before, ':') < 0 {
			host = before
		}
	}
	if len(host) > 2 && host[0] == '[' && host[len(host)-1] == ']' {
		host = host[1 : len(host)-1]
		if bytes.ContainsAny(host, "[]") {
			return authority
		}
	}
	return host
}

func digits(b []byte) bool {
	for _, d := range b {
		if d < '0' || d > '9' {
			return false
		}
	}
	return len(b) <= 5
}

// wantsClose tells whether the client asked for the connection to be closed.
// fasthttp looks for the exact value "close"; RFC 9110 section 7.6.1 has a list
// of options in any case.
func wantsClose(h *fasthttp.RequestHeader) bool {
	v := h.Peek(fasthttp.HeaderConnection)
	for len(v) > 0 {
		option, rest, _ := bytes.Cut(v, []byte{','})
		if bytes.EqualFold(bytes.TrimSpace(option), []byte("close")) {
			return true
		}
		v = rest
	}
	return false
}

// handleError answers what could not be read as a request. The connection is
// closed afterwards, as nobody knows where the next request begins.
func (s *Server) handleError(ctx *fasthttp.RequestCtx, err error) {
	c, ok := ctx.Conn().(*conn)
	if !ok {
		return
	}
	// Nobody waits for an answer who has not said anything.
	c.linger = c.state.Load() != stateNew
	r := refusal{status: fasthttp.StatusBadRequest, reason: ReasonBadRequest, code: codeBadRequest, text: "400 Bad Request", close: true}
	var small *fasthttp.ErrSmallBuffer
	var op *net.OpError
	switch {
	case errors.As(err, &small):
		r.status, r.text = fasthttp.StatusRequestHeaderFieldsTooLarge, "431 Request Header Fields Too Large"
	case errors.Is(err, fasthttp.ErrBodyTooLarge):
		r.status, r.text = fasthttp.StatusRequestEntityTooLarge, "413 Request Entity Too Large"
	case errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, fasthttp.ErrTimeout):
		r.status, r.text = fasthttp.StatusRequestTimeout, "408 Request Timeout"
	case errors.As(err, &op), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, net.ErrClosed):
		// The client went away: it is not there to be answered or counted. The
		// reply that fasthttp is about to write goes nowhere.
		c.linger = false
		ctx.Response.Header.SetStatusCode(r.status)
		return
	}
	rec := Record{Start: s.now()}
	s.refuse(ctx, c, r, &rec)
	if c.linger {
		s.finish(c, &rec)
	}
}

// waitEnded tells whether err is only that the client's patience ended.
func waitEnded(err error) bool {
	return errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled)
}
