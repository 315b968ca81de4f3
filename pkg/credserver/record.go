// SPDX-License-Identifier: Apache-2.0

package credserver

import (
	"net/netip"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
	"github.com/latchkey-dev/latchkey/pkg/verdict"
)

// Reasons for answers that concern neither evidence, nor token, nor upstream.
const (
	// ReasonNotFound: another path.
	ReasonNotFound evidence.Reason = "not_found"
	// ReasonBadRequest: not HTTP/1, too large, or too slow.
	ReasonBadRequest evidence.Reason = "bad_request"
	// ReasonInternal: a defect of the agent.
	ReasonInternal evidence.Reason = "internal_error"
)

// Record is what became of one request. It holds no secret and no token text.
type Record struct {
	// Status is the HTTP status sent.
	Status int
	// Reason is why it was refused; for an answer with credentials,
	// ReasonServed, or what enforce mode would have refused for.
	Reason evidence.Reason
	// Verdict is the decision, if Judged: evidence and an accepted token were
	// joined. The credentials may still have been refused upstream.
	Verdict verdict.Verdict
	Judged  bool
	// Attestation is the connection's evidence.
	Attestation evidence.Attestation
	// Token is the accepted token; zero if there was none.
	Token evidence.Token
	// Claimed is what a token says of itself that was not accepted, if the
	// TokenVerifier can tell (ClaimReader). Anybody may have written it.
	Claimed evidence.Token
	// Hit: answered from the cache.
	Hit bool
	// Role and Association are the credentials'; empty if refused.
	Role, Association string
	// Peer is the client's end of the connection; zero if that is not TCP.
	Peer netip.AddrPort
	// Told is the text that the client was given instead of credentials.
	Told string
	// Start is when the request's head had been read, Latency the time from
	// there until the answer was handed over for writing.
	Start   time.Time
	Latency time.Duration
	// Err is the cause of a refusal, for logs; often nil.
	Err error
}

// Observer learns of every request, after its answer is decided and before it
// is written. Observe is called from the connections' goroutines and adds to
// the time of every answer: it should neither block nor allocate for a hit.
type Observer interface {
	Observe(Record)
}

func (s *Server) observe(r Record) {
	if s.observer != nil {
		s.observer.Observe(r)
	}
}
