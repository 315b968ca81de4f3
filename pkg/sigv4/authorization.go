// SPDX-License-Identifier: Apache-2.0

package sigv4

import (
	"crypto/sha256"
	"encoding/hex"
	"strings"
)

// authorization is a parsed Authorization header.
type authorization struct {
	accessKeyID, date, region, service string
	// signedHeaders is as in the header, list is its parts.
	list          string
	signedHeaders []string
	signature     [sha256.Size]byte
}

// parseAuthorization reads
//
//	AWS4-HMAC-SHA256 Credential=ID/DATE/REGION/SERVICE/aws4_request, SignedHeaders=a;b, Signature=hex
//
// with the three in any order, each once, and nothing else.
func parseAuthorization(s string) (authorization, error) {
	var a authorization
	if len(s) > MaxAuthorization {
		return a, refuse(ErrIncomplete, "The Authorization header is too long.")
	}
	scheme, rest, _ := strings.Cut(s, " ")
	if scheme != algorithm {
		if strings.HasPrefix(scheme, "AWS4-") {
			return a, refuse(ErrIncomplete, "Unsupported AWS 'algorithm': only %s is accepted.", algorithm)
		}
		return a, refuse(ErrMissing, "Missing Authentication Token")
	}
	var credential, signature string
	seen := map[string]bool{}
	for part := range strings.SplitSeq(rest, ",") {
		name, value, ok := strings.Cut(strings.TrimSpace(part), "=")
		if !ok || seen[name] {
			return a, refuse(ErrIncomplete, "Authorization header must consist of Credential, SignedHeaders and Signature, once each.")
		}
		seen[name] = true
		switch name {
		case "Credential":
			credential = value
		case "SignedHeaders":
			a.list = value
		case "Signature":
			signature = value
		default:
			return a, refuse(ErrIncomplete, "Authorization header must consist of Credential, SignedHeaders and Signature, once each.")
		}
	}
	for _, name := range [...]string{"Credential", "Signature", "SignedHeaders"} {
		if !seen[name] {
			return a, refuse(ErrIncomplete, "Authorization header requires '%s' parameter.", name)
		}
	}
	scope := strings.Split(credential, "/")
	if len(scope) != 5 || scope[4] != terminator {
		return a, refuse(ErrIncomplete, "Credential must have exactly 5 slash-delimited elements: keyid/date/region/service/aws4_request.")
	}
	a.accessKeyID, a.date, a.region, a.service = scope[0], scope[1], scope[2], scope[3]
	if !form(a.accessKeyID, MaxAccessKeyID, keyByte) || len(a.date) != len(dateForm) ||
		!form(a.region, 64, regionByte) || !form(a.service, 64, regionByte) {
		return a, refuse(ErrIncomplete, "Credential is not of the form keyid/date/region/service/aws4_request.")
	}
	if err := a.parseSignedHeaders(); err != nil {
		return a, err
	}
	// Upper case would be a second spelling of the same signature.
	if len(signature) != hex.EncodedLen(len(a.signature)) || strings.ToLower(signature) != signature {
		return a, refuse(ErrIncomplete, "Signature must be 64 lower-case hexadecimal digits.")
	}
	if _, err := hex.Decode(a.signature[:], []byte(signature)); err != nil {
		return a, refuse(ErrIncomplete, "Signature must be 64 lower-case hexadecimal digits.")
	}
	return a, nil
}

// parseSignedHeaders wants lower-case names in strictly rising order, so none
// twice.
func (a *authorization) parseSignedHeaders() error {
	a.signedHeaders = strings.Split(a.list, ";")
	if len(a.signedHeaders) > MaxSignedHeaders {
		return refuse(ErrIncomplete, "There are too many SignedHeaders.")
	}
	for i, name := range a.signedHeaders {
		if !form(name, 128, headerByte) || i > 0 && a.signedHeaders[i-1] >= name {
			return refuse(ErrIncomplete, "SignedHeaders must be lower-case names of headers, sorted, separated by semicolons.")
		}
	}
	return nil
}

func form(s string, most int, allowed func(byte) bool) bool {
	if s == "" || len(s) > most {
		return false
	}
	for i := range len(s) {
		if !allowed(s[i]) {
			return false
		}
	}
	return true
}

func lowerOrDigit(c byte) bool { return c >= 'a' && c <= 'z' || c >= '0' && c <= '9' }
func regionByte(c byte) bool   { return lowerOrDigit(c) || c == '-' }
func headerByte(c byte) bool   { return regionByte(c) || c == '_' || c == '.' }
func keyByte(c byte) bool      { return regionByte(c) || c >= 'A' && c <= 'Z' || c == '_' }
