// SPDX-License-Identifier: Apache-2.0

package sts

import (
	"net/http"
	"slices"

	"github.com/latchkey-dev/latchkey/test/standin/wire"
)

// checkSignature judges the request's SigV4 signature and says who made it.
func (s *Server) checkSignature(r *http.Request, body []byte, call *Call) (caller, *apiError) {
	forbid := func(code, text string) (caller, *apiError) {
		return caller{}, refuse(http.StatusForbidden, code, "%s", text)
	}
	sig, flaw := wire.ReadSignature(r, "sts", s.cfg.Region, s.cfg.Now())
	call.Region = sig.Region
	if flaw != nil {
		code := map[wire.Flaw]string{
			wire.Unsigned: "MissingAuthenticationToken", wire.Incomplete: "IncompleteSignature", wire.Invalid: "SignatureDoesNotMatch",
		}[flaw.Flaw]
		return forbid(code, flaw.Text)
	}

	var secret string
	var who caller
	key, token := sig.AccessKeyID, r.Header.Get("X-Amz-Security-Token")
	s.mu.Lock()
	made, isSession := s.sessions[key]
	s.mu.Unlock()
	owner, isCaller := s.cfg.Callers[key]
	switch {
	case isSession && made.token == token && slices.Contains(sig.Headers, "x-amz-security-token"):
		if !s.cfg.Now().Before(made.expires) {
			return forbid("ExpiredToken", "The security token included in the request is expired")
		}
		secret, who = made.secret, caller{arn: made.arn, roleARN: made.roleARN, id: made.id, session: &made}
	case isCaller && token == "":
		secret, who = owner.SecretAccessKey, caller{arn: owner.ARN, id: key}
		if who.arn == "" {
			who.arn = "arn:aws:iam::111122223333:user/" + key
		}
	default:
		return forbid("InvalidClientTokenId", "The security token included in the request is invalid.")
	}
	if !sig.MadeWith(secret, r, body) {
		return forbid("SignatureDoesNotMatch", "The request signature we calculated does not match the signature you provided.")
	}
	return who, nil
}
