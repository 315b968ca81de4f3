// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"log/slog"
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/latchkey-dev/latchkey/pkg/audit"
	"github.com/latchkey-dev/latchkey/pkg/credserver"
	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

// observer counts every request and remembers what became of each pod's last
// one. A served request costs a few counters; refusals go through a queue to
// a goroutine that logs them, so that no answer waits for a log.
type observer struct {
	m     *metrics
	log   *slog.Logger
	queue chan credserver.Record
	// enrich looks up, outside of the request path, what people want to know of
	// a record. It may be nil.
	enrich  func(*audit.Record)
	denials audit.Denials
	audit   *audit.Log // nil: off

	// Looked up by status and reason without making label strings.
	responses map[int]prometheus.Counter

	// named is the process whose name was read last; handle's alone.
	named struct {
		pid  uint32
		name string
		at   time.Time
	}

	mu   sync.Mutex
	pods map[evidence.PodUID]lastVerdict
	// logged limits refusals in the log to one per pod and reason and
	// logInterval.
	logged map[logKey]time.Time
}

// Denials lists the recent refusals, and what was served although enforce mode
// would have refused, newest first: audit.MaxDenials kinds at most.
func (a *Agent) Denials() []audit.Denial { return a.observer.denials.List() }

// lastVerdict is what became of a pod's last request.
type lastVerdict struct {
	Reason evidence.Reason
	Status int
	Shadow bool // served although enforce mode would refuse
	Token  evidence.Token
	At     time.Time
}

type logKey struct {
	pod    evidence.PodUID
	reason evidence.Reason
}

const (
	logInterval = 10 * time.Second
	maxLogKeys  = 4096
)

func newObserver(m *metrics, log *slog.Logger, enrich func(*audit.Record), audit *audit.Log) *observer {
	o := &observer{
		m: m, log: log, enrich: enrich, audit: audit,
		queue:     make(chan credserver.Record, 1024),
		responses: map[int]prometheus.Counter{},
		pods:      map[evidence.PodUID]lastVerdict{},
		logged:    map[logKey]time.Time{},
	}
	for _, code := range []int{200, 400, 403, 404, 405, 408, 413, 429, 431, 500, 502, 503, 504} {
		o.responses[code] = m.responses.WithLabelValues(strconv.Itoa(code))
	}
	return o
}

// Observe implements credserver.Observer.
func (o *observer) Observe(r credserver.Record) {
	if c, ok := o.responses[r.Status]; ok {
		c.Inc()
	} else {
		o.m.responses.WithLabelValues(strconv.Itoa(r.Status)).Inc()
	}
	o.m.duration.Observe(r.Latency.Seconds())
	if o.audit != nil {
		o.record(&r)
	}
	if r.Status == 200 && !r.Verdict.Report {
		o.m.servedTotal.Inc()
		if !r.Hit {
			// The first answer of a life: worth telling the CLI. Hits are told
			// by the cache.
			o.enqueue(r)
		}
		return
	}
	o.m.refused(r.Reason, r.Verdict.Report).Inc()
	o.enqueue(r)
}

// record hands a request to the audit.
func (o *observer) record(r *credserver.Record) {
	switch {
	case r.Status == 200 && r.Hit && !r.Verdict.Report:
		if !o.audit.Hit() {
			return
		}
	case r.Reason == credserver.ReasonNotFound:
		return // nobody asked for credentials
	}
	a := auditRecord(r)
	// A connection is answered by one goroutine at a time.
	o.audit.Add(uint32(r.Peer.Port()), &a)
}

func (o *observer) enqueue(r credserver.Record) {
	select {
	case o.queue <- r:
	default:
		o.m.dropped.Inc()
	}
}

// run handles the queue until ctx ends.
func (o *observer) run(ctx context.Context) {
	for {
		select {
		case r := <-o.queue:
			o.handle(r)
		case <-ctx.Done():
			for {
				select {
				case r := <-o.queue:
					o.handle(r)
				default:
					return
				}
			}
		}
	}
}

func (o *observer) handle(r credserver.Record) {
	// Whoever asks for another path, as the CLI's own connections do, has not
	// asked for credentials.
	if r.Attestation.Finding == evidence.FindingPod && r.Reason != credserver.ReasonNotFound {
		o.mu.Lock()
		last := o.pods[r.Attestation.Pod]
		last.Reason, last.Status, last.Shadow, last.At = r.Reason, r.Status, r.Verdict.Report, r.Start
		// A pod is called what its own token calls it, never what a token that
		// it stole says.
		if r.Token.Subject.PodUID == r.Attestation.Pod {
			last.Token = r.Token
		}
		o.pods[r.Attestation.Pod] = last
		o.mu.Unlock()
	}
	if r.Status == 200 && !r.Verdict.Report {
		return
	}
	if r.Reason != credserver.ReasonNotFound {
		// Somebody's probe is no refusal of credentials.
		denied := auditRecord(&r)
		if o.enrich != nil {
			o.enrich(&denied)
		}
		denied.Task.Process = o.processName(denied.Attestation.Connection.TGID)
		o.denials.Add(&denied)
	}
	if !o.mayLog(logKey{r.Attestation.Pod, r.Reason}) {
		return
	}
	level, text := slog.LevelWarn, "refused"
	switch {
	case r.Verdict.Report && r.Status == 200:
		text = "served, but enforce mode would refuse"
	case r.Reason == credserver.ReasonNotFound:
		// Somebody's probe.
		level = slog.LevelDebug
	}
	c := r.Attestation.Connection
	attrs := []slog.Attr{
		slog.Int("status", r.Status), slog.String("reason", string(r.Reason)),
		slog.String("finding", r.Attestation.Finding.String()), slog.String("pod_uid", string(r.Attestation.Pod)),
		slog.Uint64("cgroup_id", uint64(c.TaskCgroup)), slog.Uint64("tgid", uint64(c.TGID)), slog.Uint64("uid", uint64(c.UID)),
	}
	if s := r.Token.Subject; s.PodUID != "" {
		attrs = append(attrs, slog.String("token_pod_uid", string(s.PodUID)), slog.String("token_namespace", s.Namespace),
			slog.String("token_service_account", s.ServiceAccount), slog.String("token_jti", r.Token.JTI),
			slog.Bool("token_verified", r.Token.Verified))
	}
	if r.Err != nil {
		attrs = append(attrs, slog.Any("error", r.Err))
	}
	o.log.LogAttrs(context.Background(), level, text, attrs...)
}

// processName reads what a process is called, now: when somebody asks, it may
// have ended and its number be another's. One that is refused again and again is
// looked at once a second.
func (o *observer) processName(pid uint32) string {
	if pid == 0 {
		return ""
	}
	if now := time.Now(); o.named.pid != pid || o.named.name == "" || now.Sub(o.named.at) > time.Second {
		o.named.pid, o.named.name, o.named.at = pid, processName(int(pid)), now
	}
	return o.named.name
}

// auditRecord is a request's record as the audit has it.
func auditRecord(r *credserver.Record) audit.Record {
	t := &r.Token
	if r.Claimed.Subject != (evidence.Subject{}) {
		t = &r.Claimed
	}
	return audit.Record{
		Time: r.Start, Latency: r.Latency, Status: r.Status, Reason: r.Reason,
		Shadow: r.Status == 200 && r.Reason != evidence.ReasonServed, Hit: r.Hit,
		Attestation: r.Attestation, Token: *t, Role: r.Role, Association: r.Association,
		Peer: r.Peer, Told: r.Told, Err: r.Err,
	}
}

func (o *observer) mayLog(k logKey) bool {
	now := time.Now()
	o.mu.Lock()
	defer o.mu.Unlock()
	if now.Sub(o.logged[k]) < logInterval {
		return false
	}
	if len(o.logged) >= maxLogKeys {
		clear(o.logged)
	}
	o.logged[k] = now
	return true
}

func (o *observer) last(pod evidence.PodUID) (lastVerdict, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	l, ok := o.pods[pod]
	return l, ok
}

// forget drops a pod that has ended.
func (o *observer) forget(pod evidence.PodUID) {
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.pods, pod)
}
