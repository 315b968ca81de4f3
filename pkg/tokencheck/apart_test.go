// SPDX-License-Identifier: Apache-2.0

package tokencheck

import (
	"context"
	"errors"
	"net/http"
	"testing"
	"time"

	authv1 "k8s.io/api/authentication/v1"

	"github.com/latchkey-dev/latchkey/pkg/association"
	"github.com/latchkey-dev/latchkey/test/standin/tokens"
)

// A cluster whose API server hangs, with every place taken, holds up its own
// tokens and nobody else's: slots and failures are each cluster's.
func TestAHangingAPIServerHoldsUpItsOwnClusterOnly(t *testing.T) {
	r := startReview(t, func(c *Config) { c.ReviewsAtOnce = 1 })
	asked, hold := make(chan struct{}), make(chan struct{})
	r.api.answer = func(w http.ResponseWriter, _ *http.Request, _ *authv1.TokenReview) {
		close(asked)
		<-hold
		status(w, 503, "ServiceUnavailable")
	}
	other, healthy := signer(t, "b"), startAPIServer(t)
	neighbour := clusterOf(other, "neighbour")
	neighbour.TokenReview = &association.TokenReview{Kubeconfig: healthy.kubeconfig(t, "reviewer-credential"), Context: "reviewer"}

	ended := make(chan error, 1)
	go func() {
		_, err := r.check(r.signer.Token(tokens.Claims{ID: "hangs"}))
		ended <- err
	}()
	<-asked
	if got, err := r.Check(t.Context(), neighbour, other.Token(tokens.Claims{})); err != nil || !got.Reviewed {
		t.Errorf("the neighbour's token: %+v, %v", got, err)
	}
	// Its own next token waits for the place that is taken, as long as its caller
	// does.
	impatient, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := r.Check(impatient, r.cluster, r.signer.Token(tokens.Claims{ID: "waits"})); !errors.Is(err, ErrUnavailable) {
		t.Errorf("beside the one that hangs: %v", err)
	}
	close(hold)
	if err := <-ended; !errors.Is(err, ErrUnavailable) {
		t.Errorf("the one that hung: %v", err)
	}
}
