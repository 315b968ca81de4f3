// SPDX-License-Identifier: Apache-2.0

package exchange

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/association"
	"github.com/latchkey-dev/latchkey/pkg/evidence"
	"github.com/latchkey-dev/latchkey/pkg/sigv4"
	"github.com/latchkey-dev/latchkey/pkg/tokencheck"
)

// gone is a cluster whose API server no longer knows the agent's pod.
type gone struct{}

type podGone struct{}

func (podGone) Error() string           { return "token_not_alive" }
func (podGone) Is(target error) bool    { return target == tokencheck.ErrInvalid }
func (podGone) Reason() evidence.Reason { return tokencheck.ReasonNotAlive }

func (gone) Check(context.Context, association.Cluster, string) (tokencheck.Subject, error) {
	return tokencheck.Subject{}, podGone{}
}

// A limit that the threat model names: keys are not asked for again at the
// cluster, so they outlive the pod that they were given to. They end with their
// hour, and there are no new ones.
func TestKeysOutliveTheAgentsPodByAnHourAtMost(t *testing.T) {
	r := start(t)
	token := r.a.Token(agent())
	g, err := r.exchange(t, "a", token)
	if err != nil {
		t.Fatal(err)
	}
	r.cfg.Tokens = gone{}
	if _, err := r.exchange(t, "a", token); !errors.Is(err, ErrInvalid) {
		t.Errorf("new keys for a pod that is gone: %v", err)
	}
	r.clock.add(time.Hour - 2*time.Second)
	if _, err := r.Lookup(t.Context(), g.AccessKeyID, g.SessionToken); err != nil {
		t.Errorf("within the hour: %v", err)
	}
	r.clock.add(2 * time.Second)
	if _, err := r.Lookup(t.Context(), g.AccessKeyID, g.SessionToken); !errors.Is(err, sigv4.ErrExpiredKey) {
		t.Errorf("after it: %v", err)
	}
}
