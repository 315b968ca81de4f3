// SPDX-License-Identifier: Apache-2.0

package satoken

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"math"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/json"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

// MaxTokenSize is the longest token looked at, in bytes. Real ones have about
// 1,200 (RS256 with a 2048-bit key).
const MaxTokenSize = 16 << 10

const (
	maxKeyIDSize = 256
	maxJTISize   = 128
	// maxNesting is the deepest JSON looked at. Real claims have three levels;
	// the decoder recurses, so depth is memory that a pod makes us use.
	maxNesting = 16
	// maxCommas bounds the members and elements of claims and header alike. Real
	// claims have about 15; a token full of them would cost ten times what
	// checking a signature does.
	maxCommas = 128
	// maxTime is the end of year 9999, where RFC 3339 ends.
	maxTime = 253402300799
)

// claims is what a well-formed token says, before anything of it is believed.
type claims struct {
	algorithm jose.SignatureAlgorithm
	keyID     string
	payload   []byte

	issuer    string
	audience  []string
	expiry    time.Time
	notBefore time.Time // zero if absent
	issuedAt  time.Time // zero if absent

	token evidence.Token
}

func malformed(detail string) *Error { return refuse(evidence.ReasonTokenMalformed, detail) }

// parse checks everything about a token that needs neither clock nor keys.
// Nothing that does not have the exact shape of a Kubernetes token passes: what
// two readers could understand differently is refused, not interpreted.
func parse(raw string) (*claims, *Error) {
	switch {
	case raw == "":
		return nil, refuse(evidence.ReasonTokenMissing, "token is empty")
	case len(raw) > MaxTokenSize:
		return nil, refuse(evidence.ReasonTokenTooLarge, "token is too large")
	case len(raw) >= 7 && strings.EqualFold(raw[:7], "bearer "):
		return nil, malformed(`remove the "Bearer" scheme, send the token alone`)
	}
	encodedHeader, rest, _ := strings.Cut(raw, ".")
	encodedPayload, encodedSignature, ok := strings.Cut(rest, ".")
	if !ok || strings.Contains(encodedSignature, ".") {
		return nil, malformed("token must have three segments")
	}
	header, err := decodeSegment(encodedHeader)
	if err != nil {
		return nil, err
	}
	payload, err := decodeSegment(encodedPayload)
	if err != nil {
		return nil, err
	}
	// Decoded only to refuse a second spelling of the same signature; the
	// signature itself is checked by the verifier.
	if _, err := decodeSegment(encodedSignature); err != nil {
		return nil, err
	}

	c := &claims{payload: payload}
	if err := c.readHeader(header); err != nil {
		return nil, err
	}
	if err := c.readPayload(payload); err != nil {
		return nil, err
	}
	c.token.ID = identity(header, payload)
	return c, nil
}

// decodeSegment decodes unpadded base64url that has exactly one spelling: the
// unused bits at the end are zero, and there are no line breaks, which Go's
// decoder skips even in strict mode.
func decodeSegment(s string) ([]byte, *Error) {
	if s == "" {
		return nil, malformed("token has an empty segment")
	}
	if strings.ContainsAny(s, "\r\n") {
		return nil, malformed("token contains a line break")
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(s)
	if err != nil {
		return nil, malformed("token segment is not base64url") // err would quote positions of the token
	}
	return b, nil
}

// identity hashes what is signed, with the lengths in front so that no two
// tokens have the same input.
func identity(header, payload []byte) (id [32]byte) {
	h := sha256.New()
	var size [8]byte
	binary.BigEndian.PutUint64(size[:], uint64(len(header)))
	h.Write(size[:])
	h.Write(header)
	h.Write(payload)
	h.Sum(id[:0])
	return id
}

// decodeObject decodes one JSON object. The decoder is go-jose's own, which
// matches names exactly and refuses repeated ones at every level:
// encoding/json would let "SUB" overwrite "sub".
func decodeObject(b []byte) (map[string]any, bool) {
	if nesting, commas := shape(b); nesting > maxNesting || commas > maxCommas || !utf8.Valid(b) {
		return nil, false
	}
	var v map[string]any
	if err := json.Unmarshal(b, &v); err != nil || v == nil {
		return nil, false
	}
	return v, true
}

// shape measures JSON before it is decoded: the depth of arrays and objects, and
// the number of commas between their entries. Both are exact for valid JSON.
func shape(b []byte) (nesting, commas int) {
	depth, quoted := 0, false
	for i := 0; i < len(b); i++ {
		switch c := b[i]; {
		case quoted && c == '\\':
			i++
		case c == '"':
			quoted = !quoted
		case quoted:
		case c == '{' || c == '[':
			depth++
			nesting = max(nesting, depth)
		case c == '}' || c == ']':
			depth--
		case c == ',':
			commas++
		}
	}
	return nesting, commas
}

func (c *claims) readHeader(b []byte) *Error {
	header, ok := decodeObject(b)
	if !ok {
		return malformed("header is not a plain JSON object")
	}
	// crit and b64 change what the signature covers; the others let a token
	// bring its own key. Kubernetes writes none of them.
	for _, name := range [...]string{"crit", "b64", "jku", "jwk", "x5u", "x5c"} {
		if _, there := header[name]; there {
			return malformed("header parameter " + name + " is not supported")
		}
	}
	if typ, there := header["typ"]; there {
		if s, ok := typ.(string); !ok || !strings.EqualFold(s, "JWT") {
			return malformed("header parameter typ is not JWT")
		}
	}
	algorithm, _ := header["alg"].(string)
	switch c.algorithm = jose.SignatureAlgorithm(algorithm); c.algorithm {
	case jose.RS256, jose.ES256, jose.ES384, jose.ES512:
	default:
		return refuse(evidence.ReasonTokenAlgorithm, "signature algorithm must be RS256, ES256, ES384 or ES512")
	}
	c.keyID, _ = header["kid"].(string)
	if c.keyID == "" || len(c.keyID) > maxKeyIDSize {
		return malformed("header names no key")
	}
	return nil
}

func (c *claims) readPayload(b []byte) *Error {
	payload, ok := decodeObject(b)
	if !ok {
		return malformed("claims are not a plain JSON object")
	}
	if c.issuer, _ = payload["iss"].(string); c.issuer == "" {
		return malformed("claim iss is missing or not a string")
	}
	if c.audience, ok = stringOrStrings(payload["aud"]); !ok {
		return malformed("claim aud is neither a string nor an array of strings")
	}
	if c.expiry, ok = numericDate(payload["exp"]); !ok {
		return malformed("claim exp is missing or not a time")
	}
	for name, to := range map[string]*time.Time{"nbf": &c.notBefore, "iat": &c.issuedAt} {
		if v, there := payload[name]; there {
			if *to, ok = numericDate(v); !ok {
				return malformed("claim " + name + " is not a time")
			}
		}
	}
	if v, there := payload["jti"]; there {
		if c.token.JTI, ok = v.(string); !ok || !isJTI(c.token.JTI) {
			return malformed("claim jti is not an identifier")
		}
	}
	c.token.Expiry = c.expiry
	return c.readKubernetes(payload)
}

// readKubernetes reads the subject. sub and kubernetes.io say the same thing
// twice; a token in which they differ is no Kubernetes token.
func (c *claims) readKubernetes(payload map[string]any) *Error {
	kubernetes, ok := payload["kubernetes.io"].(map[string]any)
	if !ok {
		return malformed("claim kubernetes.io is missing or not an object")
	}
	namespace, _ := kubernetes["namespace"].(string)
	if !isLabel(namespace) {
		return malformed("claim kubernetes.io has no valid namespace")
	}
	account, accountUID, ok := reference(kubernetes, "serviceaccount")
	if !ok || !isSubdomain(account) {
		return malformed("claim kubernetes.io has no valid service account")
	}
	if sub, _ := payload["sub"].(string); sub != "system:serviceaccount:"+namespace+":"+account {
		return malformed("claim sub is not the service account of claim kubernetes.io")
	}
	if _, there := kubernetes["pod"]; !there {
		return refuse(evidence.ReasonTokenUnbound, "token is not bound to a pod")
	}
	pod, podUID, ok := reference(kubernetes, "pod")
	if !ok || !isSubdomain(pod) || !isUID(podUID) {
		return malformed("claim kubernetes.io has no valid pod")
	}
	if _, there := kubernetes["node"]; there { // since Kubernetes 1.30
		node, nodeUID, ok := reference(kubernetes, "node")
		if !ok || !isSubdomain(node) {
			return malformed("claim kubernetes.io has no valid node")
		}
		c.token.Node, c.token.NodeUID = node, nodeUID
	}
	c.token.PodName, c.token.ServiceAccountUID = pod, accountUID
	c.token.Subject = evidence.Subject{
		PodUID: evidence.PodUID(podUID), Namespace: namespace, ServiceAccount: account,
	}
	return nil
}

// reference reads {"name": …, "uid": …}. The uid may be missing: a node's is,
// when the API server did not know the node object. If it is there, it can be
// logged as it is.
func reference(kubernetes map[string]any, field string) (name, uid string, ok bool) {
	ref, ok := kubernetes[field].(map[string]any)
	if !ok {
		return "", "", false
	}
	if name, ok = ref["name"].(string); !ok {
		return "", "", false
	}
	if v, there := ref["uid"]; there {
		if uid, ok = v.(string); !ok || uid != "" && !isJTI(uid) {
			return "", "", false
		}
	}
	return name, uid, true
}

func stringOrStrings(v any) ([]string, bool) {
	switch v := v.(type) {
	case string:
		return []string{v}, true
	case []any:
		out := make([]string, 0, len(v))
		for _, item := range v {
			s, ok := item.(string)
			if !ok {
				return nil, false
			}
			out = append(out, s)
		}
		return out, true
	}
	return nil, false
}

// numericDate reads RFC 7519's NumericDate in whole seconds, as Kubernetes
// writes it.
func numericDate(v any) (time.Time, bool) {
	f, ok := v.(float64)
	if !ok || f != math.Trunc(f) || f < 0 || f > maxTime {
		return time.Time{}, false
	}
	return time.Unix(int64(f), 0).UTC(), true
}

// isLabel: RFC 1123 label, as namespaces must be.
func isLabel(s string) bool { return len(s) <= 63 && isSubdomain(s) && !strings.Contains(s, ".") }

// isSubdomain: RFC 1123 subdomain, as names of service accounts, pods and nodes
// must be.
func isSubdomain(s string) bool {
	if len(s) == 0 || len(s) > 253 {
		return false
	}
	edge := func(c byte) bool { return c >= 'a' && c <= 'z' || c >= '0' && c <= '9' }
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case edge(c):
		case c == '-' && i > 0 && s[i-1] != '.' && i+1 < len(s) && s[i+1] != '.':
		case c == '.' && i > 0 && edge(s[i-1]) && i+1 < len(s):
		default:
			return false
		}
	}
	return true
}

// isUID: a UUID in lower case, or 32 hex digits: the two forms a pod's cgroup
// can show, so that the verdict compares like with like.
func isUID(s string) bool {
	if len(s) != 36 && len(s) != 32 {
		return false
	}
	for i := 0; i < len(s); i++ {
		c := s[i]
		if dash := len(s) == 36 && (i == 8 || i == 13 || i == 18 || i == 23); dash {
			if c != '-' {
				return false
			}
		} else if !(c >= '0' && c <= '9' || c >= 'a' && c <= 'f') {
			return false
		}
	}
	return true
}

// isJTI: something that can be logged as it is. Kubernetes writes a UUID.
func isJTI(s string) bool {
	if len(s) == 0 || len(s) > maxJTISize {
		return false
	}
	return bytes.IndexFunc([]byte(s), func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("-_.:", r))
	}) < 0
}
