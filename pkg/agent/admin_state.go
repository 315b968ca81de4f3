// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"slices"
	"sync"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/eksauth"
	"github.com/latchkey-dev/latchkey/pkg/evidence"
	"github.com/latchkey-dev/latchkey/pkg/linklocal"
	"github.com/latchkey-dev/latchkey/pkg/pods"
)

// adminState is what the admin socket shows beyond the parts' own state. The
// pointers are set before the socket is served and not changed afterwards; nil
// means that there is no such part.
type adminState struct {
	upstream     *eksauth.Client
	keeper       *linklocal.Keeper
	cannotAttest error
	// names is nil if no container runtime is asked.
	names podNames

	mu    sync.Mutex
	ended []endedPod // oldest first, at most maxEnded
}

// endedPod is a pod that was on the node, for whoever asks after it.
type endedPod struct {
	uid   evidence.PodUID
	path  string
	qos   string
	at    time.Time
	token evidence.Token
}

// maxEnded is how many ended pods are remembered.
const maxEnded = 512

// podEnded remembers a pod by its last token. It is called by the pod index, in
// its goroutine.
func (s *adminState) podEnded(p *pods.Pod, o *observer) {
	e := endedPod{uid: p.UID, path: p.Path, qos: string(p.QoS), at: time.Now()}
	if last, ok := o.last(p.UID); ok {
		e.token = last.Token
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.ended) >= maxEnded {
		s.ended = slices.Delete(s.ended, 0, len(s.ended)-maxEnded+1)
	}
	s.ended = append(s.ended, e)
}

// findEnded gives the newest ended pod that matches.
func (s *adminState) findEnded(match func(*endedPod) bool) (endedPod, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := len(s.ended) - 1; i >= 0; i-- {
		if match(&s.ended[i]) {
			return s.ended[i], true
		}
	}
	return endedPod{}, false
}
