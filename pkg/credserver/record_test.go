// SPDX-License-Identifier: Apache-2.0

package credserver

import (
	"context"
	"strings"
	"testing"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

// claimReader is a TokenVerifier that reads what it refuses.
type claimReader struct {
	*tokens
	read int
}

func (c *claimReader) Claims(raw string) (evidence.Token, bool) {
	c.read++
	if !strings.Contains(raw, ".") {
		return evidence.Token{}, false
	}
	// Verified is not for it to say.
	return evidence.Token{Subject: subjectB, JTI: "j", Verified: true}, true
}

// What is told of a request: who asked, what it was given or told instead, and
// what a refused token claims, which is never said to be verified.
func TestRecords(t *testing.T) {
	claims := &claimReader{}
	b := newBed(t, func(cfg *Config, b *bed) {
		claims.tokens = b.tokens
		cfg.Tokens = claims
		cfg.Credentials = credentialsFunc(func(ctx context.Context, r CredentialRequest) (Credential, error) {
			c, err := cached(ctx, r)
			c.Role, c.Association = "arn:aws:sts::111122223333:assumed-role/r/s", "a-1"
			return c, err
		})
	})
	client := b.dial(t)
	client.ask(get(tokenA))
	r := b.records.last(t)
	if r.Role != "arn:aws:sts::111122223333:assumed-role/r/s" || r.Association != "a-1" || r.Told != "" || r.Claimed != (evidence.Token{}) ||
		r.Token.Subject != subjectA || r.Peer.String() != client.LocalAddr().String() {
		t.Errorf("issued: %+v", r)
	}
	for _, c := range []struct {
		token    string
		reason   evidence.Reason
		accepted evidence.Subject
		claimed  evidence.Subject
	}{
		{tokenB, evidence.ReasonPodMismatch, subjectB, evidence.Subject{}},
		{"foreign.audience.token", evidence.ReasonTokenAudience, evidence.Subject{}, subjectB},
		{"no-token-at-all", evidence.ReasonTokenMalformed, evidence.Subject{}, evidence.Subject{}},
		{"", evidence.ReasonTokenMissing, evidence.Subject{}, evidence.Subject{}},
	} {
		reply := client.ask(get(c.token))
		r := b.records.last(t)
		if r.Reason != c.reason || r.Token.Subject != c.accepted || r.Claimed.Subject != c.claimed || r.Claimed.Verified {
			t.Errorf("%q: %+v", c.token, r)
		}
		if r.Told+"\n" != reply.text || r.Told == "" || r.Role != "" || r.Association != "" {
			t.Errorf("%q: told %q, the record says %q", c.token, reply.text, r.Told)
		}
	}
	// An accepted token is not read again, and an empty one not at all.
	if claims.read != 2 {
		t.Errorf("%d tokens were read for their claims, want 2", claims.read)
	}
}
