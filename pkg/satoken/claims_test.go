// SPDX-License-Identifier: Apache-2.0

package satoken

import (
	"testing"

	"github.com/latchkey-dev/latchkey/test/standin/tokens"
)

// Claims reads a token that nothing else would accept, and does not vouch for it.
func TestClaimsChecksNothing(t *testing.T) {
	s, err := tokens.NewSigner(tokens.Config{Algorithm: "ES256"})
	if err != nil {
		t.Fatal(err)
	}
	c := tokens.Claims{Set: map[string]any{"aud": []string{"somebody-else"}, "iss": "https://elsewhere.example", "exp": 1000, "iat": 900, "nbf": 900}}
	got, ok := Claims(s.Token(c))
	if !ok || got.Verified || got.Subject.PodUID == "" || got.Subject.Namespace == "" || got.Subject.ServiceAccount == "" {
		t.Errorf("%+v, %v", got, ok)
	}
	for _, raw := range []string{"", "a", "a.b.c", "Bearer " + s.Token(c)} {
		if got, ok := Claims(raw); ok {
			t.Errorf("%.10q… was read: %+v", raw, got)
		}
	}
}
