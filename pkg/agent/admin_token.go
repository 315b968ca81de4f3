// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/adminapi"
	"github.com/latchkey-dev/latchkey/pkg/satoken"
)

// checkToken answers adminapi.PathToken. The token is judged as a pod's would
// be, up to the verdict; it is not kept, logged or sent anywhere.
func (a *Agent) checkToken(r *http.Request) (any, error) {
	raw, err := io.ReadAll(io.LimitReader(r.Body, satoken.MaxTokenSize+1))
	if err != nil {
		return nil, fmt.Errorf("%w: reading the token: %w", adminapi.ErrInvalid, err)
	}
	out := adminapi.TokenCheck{Keys: a.tokens.what, Audience: a.audience(), Time: time.Now()}
	t, err := a.tokens.verifier.Verify(r.Context(), string(raw))
	var refused *satoken.Error
	switch {
	case err == nil:
		out.Accepted, out.Verified = true, t.Verified
	case errors.As(err, &refused):
		out.Reason, out.Message = string(refused.Reason()), refused.Message()
	default:
		return nil, errors.New("the token could not be checked")
	}
	return out, nil
}
