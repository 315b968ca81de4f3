// SPDX-License-Identifier: Apache-2.0

// Package strangers bounds what callers that have proved nothing can cost: the
// audit records that they leave, and the work of refusing them.
//
// Callers behind a proxy or a NAT share an address, so nothing here may refuse
// somebody for what others at his address did: what is counted are failures, and
// who uses it refuses by them only those that are strangers themselves.
package strangers

import (
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Rate is how often something may happen.
type Rate struct {
	// PerSecond is the lasting rate; 0: the default of its kind, negative: no
	// limit.
	PerSecond float64
	// Burst is how many may come at once; 0: the default of its kind.
	Burst int
}

// Defaults of Config.
const (
	// DefaultInterval is how often what was left out is summed up.
	DefaultInterval = time.Minute
	// maxPeers bounds each of two generations of addresses: one that was not seen
	// since the last change of them has its budget back, or is forgotten when it
	// matters least. The budget of all together is never forgotten.
	maxPeers = 8 << 10
)

// Config of Limits. Zero values mean what the field says.
type Config struct {
	// Failures is how many failures of an address are answered in full; by default
	// 50/s, 500 at once.
	Failures Rate
	// Records is how many of an address's refusals are recorded; by default one in
	// 5 s, 50 at once.
	Records Rate
	// AllRecords is that of all addresses together; by default 1/s, 300 at once: at
	// less than 2 KiB each, some 150 MB a day at the very most.
	AllRecords Rate
	// Interval is the least time between summaries of what was left out; 0:
	// DefaultInterval.
	Interval time.Duration
	// Now is the clock; nil: time.Now.
	Now func() time.Time
}

// Limits are the budgets. They may be used by several goroutines.
type Limits struct {
	cfg  Config
	most int

	mu         sync.Mutex
	young, old map[netip.Addr]*budget
	records    *rate.Limiter
	left       Summary
}

type budget struct{ failures, records *rate.Limiter }

// Summary is what was left out.
type Summary struct {
	// Count is how many records were not made, since the first of them at Since.
	Count int64
	Since time.Time
	// Peer is the address that the last of them came from.
	Peer string
}

// New makes Limits.
func New(cfg Config) *Limits {
	or := func(r *Rate, d Rate) {
		if r.PerSecond == 0 {
			r.PerSecond = d.PerSecond
		}
		if r.Burst <= 0 {
			r.Burst = d.Burst
		}
	}
	or(&cfg.Failures, Rate{50, 500})
	or(&cfg.Records, Rate{0.2, 50})
	or(&cfg.AllRecords, Rate{1, 300})
	if cfg.Interval <= 0 {
		cfg.Interval = DefaultInterval
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Limits{cfg: cfg, most: maxPeers, young: map[netip.Addr]*budget{}, records: limiter(cfg.AllRecords)}
}

func limiter(r Rate) *rate.Limiter {
	if r.PerSecond < 0 {
		return rate.NewLimiter(rate.Inf, 0)
	}
	return rate.NewLimiter(rate.Limit(r.PerSecond), r.Burst)
}

// Peer is what counts as one address of a connection's other end: of IPv6 a
// /64, since whoever has one address there has 2^64 of them. What is no address
// and port is the zero Addr, which counts as one too.
func Peer(remote string) netip.Addr {
	ap, err := netip.ParseAddrPort(remote)
	if err != nil {
		return netip.Addr{}
	}
	a := ap.Addr().Unmap().WithZone("")
	if a.Is6() {
		if p, err := a.Prefix(64); err == nil {
			return p.Addr()
		}
	}
	return a
}

// of is the budget of an address. l.mu is held.
func (l *Limits) of(peer netip.Addr) *budget {
	if b := l.young[peer]; b != nil {
		return b
	}
	b := l.old[peer]
	if b == nil {
		b = &budget{limiter(l.cfg.Failures), limiter(l.cfg.Records)}
	}
	if len(l.young) >= l.most {
		l.young, l.old = map[netip.Addr]*budget{}, l.young
	}
	l.young[peer] = b
	return b
}

// Failed counts a caller at an address (http.Request.RemoteAddr) that did not
// prove who it is.
func (l *Limits) Failed(remote string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.of(Peer(remote)).failures.AllowN(l.cfg.Now(), 1)
}

// Exhausted reports whether callers at an address have failed so often that the
// next stranger there need not be answered in full. An address that nobody
// failed at costs no memory.
func (l *Limits) Exhausted(remote string) bool {
	peer := Peer(remote)
	l.mu.Lock()
	defer l.mu.Unlock()
	b := l.young[peer]
	if b == nil {
		b = l.old[peer]
	}
	return b != nil && b.failures.Limit() != rate.Inf && b.failures.TokensAt(l.cfg.Now()) < 1
}

// Record reports whether there may be a record of a stranger at an address. One
// that there may not be is counted for Summary.
func (l *Limits) Record(remote string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.cfg.Now()
	// The address's own first: one that has used up its own takes nothing of the
	// others'.
	if l.of(Peer(remote)).records.AllowN(now, 1) && l.records.AllowN(now, 1) {
		return true
	}
	if l.left.Count == 0 {
		l.left.Since = now
	}
	l.left.Count++
	l.left.Peer = remote
	return false
}

// Summary gives, once, what was left out since the last one, if there is
// anything and it is time. Somebody has to ask now and then; nothing runs here.
func (l *Limits) Summary() (Summary, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.left.Count == 0 || l.cfg.Now().Sub(l.left.Since) < l.cfg.Interval {
		return Summary{}, false
	}
	s := l.left
	l.left = Summary{}
	return s, true
}

// maxText bounds a stranger's text in a record, in bytes.
const maxText = 128

// Text is a stranger's text as a record may have it: short, and without what
// JSON writes in more bytes than one.
func Text(s string) string {
	b := []byte(s[:min(len(s), maxText)])
	for i, c := range b {
		if c < ' ' || c > '~' || c == '"' || c == '\\' || c == '<' || c == '>' || c == '&' {
			b[i] = '?'
		}
	}
	return string(b)
}
