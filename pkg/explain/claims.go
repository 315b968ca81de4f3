// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"strings"
	"time"
)

// Claims are what a service-account token says of itself, unchecked. They hold
// no signature and nothing that a token could be made of again.
type Claims struct {
	Algorithm      string    `json:"algorithm"`
	KeyID          string    `json:"key_id"`
	Issuer         string    `json:"issuer"`
	Audience       []string  `json:"audience"`
	Subject        string    `json:"subject"`
	Namespace      string    `json:"namespace,omitempty"`
	ServiceAccount string    `json:"service_account,omitempty"`
	Pod            string    `json:"pod,omitempty"`
	PodUID         string    `json:"pod_uid,omitempty"`
	Node           string    `json:"node,omitempty"`
	ID             string    `json:"jti,omitempty"`
	IssuedAt       time.Time `json:"issued_at,omitzero"`
	NotBefore      time.Time `json:"not_before,omitzero"`
	Expires        time.Time `json:"expires,omitzero"`
	// SignatureBytes is the signature's length. The signature is not kept.
	SignatureBytes int `json:"signature_bytes"`
}

// ErrNotToken: the text is not the compact form of a JSON Web Token. The error
// does not quote it.
var ErrNotToken = errors.New("not a service-account token: it should be three parts of base64url, separated by dots, of which the first two are JSON")

// maxToken is as long as the agent reads.
const maxToken = 16 << 10

// ParseClaims reads a token for people. It checks nothing but the form; the
// agent says whether it is good. The error is ErrNotToken.
func ParseClaims(token string) (*Claims, error) {
	parts := strings.Split(token, ".")
	if len(token) > maxToken || len(parts) != 3 {
		return nil, ErrNotToken
	}
	var header struct{ Alg, Kid string }
	var payload struct {
		Iss, Sub, Jti string
		Aud           any
		Iat, Nbf, Exp float64
		Kubernetes    struct {
			Namespace      string
			ServiceAccount struct{ Name string }
			Pod            struct{ Name, UID string }
			Node           struct{ Name string }
		} `json:"kubernetes.io"`
	}
	if decode(parts[0], &header) != nil || decode(parts[1], &payload) != nil {
		return nil, ErrNotToken
	}
	signature, err := base64.RawURLEncoding.DecodeString(parts[2])
	if err != nil {
		return nil, ErrNotToken
	}
	k := payload.Kubernetes
	c := &Claims{
		Audience: []string{}, Algorithm: printable(header.Alg), KeyID: printable(header.Kid), Issuer: printable(payload.Iss), Subject: printable(payload.Sub),
		Namespace: printable(k.Namespace), ServiceAccount: printable(k.ServiceAccount.Name), Pod: printable(k.Pod.Name), PodUID: printable(k.Pod.UID),
		Node: printable(k.Node.Name), ID: printable(payload.Jti), SignatureBytes: len(signature),
		IssuedAt: unix(payload.Iat), NotBefore: unix(payload.Nbf), Expires: unix(payload.Exp),
	}
	switch aud := payload.Aud.(type) {
	case string:
		c.Audience = []string{printable(aud)}
	case []any:
		for _, a := range aud {
			if text, ok := a.(string); ok {
				c.Audience = append(c.Audience, printable(text))
			}
		}
	}
	return c, nil
}

func decode(part string, into any) error {
	b, err := base64.RawURLEncoding.DecodeString(part)
	if err != nil {
		return err
	}
	return json.Unmarshal(b, into)
}

func unix(seconds float64) time.Time {
	// Year 9999 is where RFC 3339 ends.
	if seconds <= 0 || seconds > 253402300799 {
		return time.Time{}
	}
	return time.Unix(int64(seconds), 0).UTC()
}

// printable makes a text of a stranger's fit for a terminal: bounded, and
// without control characters.
func printable(s string) string {
	const most = 256
	var b strings.Builder
	for _, r := range s {
		if b.Len() >= most {
			b.WriteString("…")
			break
		}
		if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 || r == 0x2028 || r == 0x2029 ||
			r >= 0x200e && r <= 0x200f || r >= 0x202a && r <= 0x202e || r >= 0x2066 && r <= 0x2069 || r == '\ufffd' {
			r = '?'
		}
		b.WriteRune(r)
	}
	return b.String()
}
