// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/latchkey-dev/latchkey/pkg/attribution"
	"github.com/latchkey-dev/latchkey/pkg/audit"
	"github.com/latchkey-dev/latchkey/pkg/credcache"
	"github.com/latchkey-dev/latchkey/pkg/eksauth"
	"github.com/latchkey-dev/latchkey/pkg/evidence"
	"github.com/latchkey-dev/latchkey/pkg/linklocal"
	"github.com/latchkey-dev/latchkey/pkg/pods"
)

// metrics are the agent's own. The names that begin with pod_identity are the
// EKS Pod Identity Agent's, with the meaning that they promise: a hit is a
// request answered from the cache.
type metrics struct {
	registry *prometheus.Registry

	responses  *prometheus.CounterVec
	cacheError *prometheus.CounterVec

	verdicts *prometheus.CounterVec
	duration prometheus.Histogram
	upstream *prometheus.CounterVec
	exchange prometheus.Histogram
	dropped  prometheus.Counter
	address  *prometheus.GaugeVec
	repairs  *prometheus.CounterVec
	serving  *prometheus.GaugeVec

	// Of the hit path: found without a look-up.
	servedTotal prometheus.Counter
	// refusals by reason; the values are made once each.
	refusals sync.Map // refusalKey → prometheus.Counter
}

type refusalKey struct {
	reason evidence.Reason
	shadow bool
}

func newMetrics(version string, mode string) *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		responses: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "pod_identity_http_response", Help: "Answers of the credential endpoint, by HTTP status (code)."}, []string{"code"}),
		cacheError: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "pod_identity_cache_errors", Help: "Failed calls of EKS Auth, by whether cached credentials are kept (Recoverable) or dropped (NonRecoverable), and by the reason (code)."}, []string{"type", "code"}),
		verdicts: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "latchkey_verdicts_total", Help: "Decisions by outcome (served, shadow: served though enforce mode would refuse, refused) and reason."}, []string{"outcome", "reason"}),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "latchkey_request_duration_seconds", Help: "Time from a request's head to its answer.",
			Buckets: []float64{.00001, .000025, .00005, .0001, .00025, .0005, .001, .005, .025, .1, .25, .5, 1, 2}}),
		upstream: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "latchkey_upstream_attempts_total", Help: "Calls of EKS Auth, each attempt, by outcome."}, []string{"outcome"}),
		exchange: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "latchkey_upstream_attempt_duration_seconds", Help: "Time of one call of EKS Auth.",
			Buckets: []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5}}),
		dropped: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "latchkey_log_records_dropped_total", Help: "Refusals that were counted but not logged, because the log could not keep up."}),
		address: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "latchkey_link_local_present", Help: "1 if the family's link-local address can be bound."}, []string{"family"}),
		repairs: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "latchkey_link_local_changes_total", Help: "How often the family's address came or went."}, []string{"family"}),
		serving: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "latchkey_listener_serving", Help: "1 while credentials are served on the address."}, []string{"address"}),
	}
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "latchkey_build_info", Help: "Always 1.", ConstLabels: prometheus.Labels{"version": version, "attestation": mode}})
	info.Set(1)
	m.registry.MustRegister(m.responses, m.cacheError, m.verdicts, m.duration, m.upstream, m.exchange,
		m.dropped, m.address, m.repairs, m.serving, info,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	// There from the start, so that a rate over them is never absent.
	for _, r := range []evidence.Reason{evidence.ReasonPodMismatch, evidence.ReasonNoEvidence, evidence.ReasonPodEnded, evidence.ReasonTwoPods, evidence.ReasonForeignNetns, evidence.ReasonNotPod} {
		m.refused(r, false)
	}
	m.servedTotal = m.verdicts.WithLabelValues("served", string(evidence.ReasonServed))
	for _, f := range []linklocal.Family{linklocal.IPv4, linklocal.IPv6} {
		m.address.WithLabelValues(f.String())
	}
	return m
}

func (m *metrics) refused(r evidence.Reason, shadow bool) prometheus.Counter {
	if shadow {
		return m.counter(refusalKey{r, true}, "shadow")
	}
	return m.counter(refusalKey{r, false}, "refused")
}

func (m *metrics) counter(k refusalKey, outcome string) prometheus.Counter {
	if c, ok := m.refusals.Load(k); ok {
		return c.(prometheus.Counter)
	}
	c, _ := m.refusals.LoadOrStore(k, m.verdicts.WithLabelValues(outcome, string(k.reason)))
	return c.(prometheus.Counter)
}

func (m *metrics) attempt(a eksauth.Attempt) {
	m.upstream.WithLabelValues(string(a.Class)).Inc()
	m.exchange.Observe(a.Duration.Seconds())
}

func bool01(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// sources are what is read when somebody asks for the metrics. A nil one has no
// metrics on this node.
type sources struct {
	attesting, byToken bool
	connections        func() int
	cache              func() credcache.Stats
	keys               func() int // nil: 0
	audit              func() audit.Stats
	bpf                func() ([]attribution.Event, error)
	reattached         func() uint64
	pods               func() pods.Stats
	runtimes           func() []pods.RuntimeStatus
}

func (m *metrics) register(s sources) {
	m.gauge("latchkey_attesting", "1 if the kernel attests connections on this node; 0 only in modes that allow to go on without.", func() float64 { return bool01(s.attesting) })
	m.gauge("latchkey_token_keys", "Usable keys to check tokens with; 0: EKS Auth alone judges them.", func() float64 {
		if s.keys == nil {
			return 0
		}
		return float64(s.keys())
	})
	m.gauge("latchkey_connections", "Open connections of pods.", func() float64 { return float64(s.connections()) })
	m.gauge("latchkey_by_token_mode", "1 if there is no key to check tokens with, so that each token is known by its bytes alone.", func() float64 { return bool01(s.byToken) })
	m.registry.MustRegister(newCacheCollector(s.cache))
	if s.audit != nil {
		m.registry.MustRegister(newAuditCollector(s.audit))
	}
	if s.bpf != nil {
		m.registry.MustRegister(newBPFCollector(s.bpf))
		m.counterFunc("latchkey_bpf_reattached_total", "Programs that somebody had detached or replaced, and that were put back.", func() float64 { return float64(s.reattached()) })
	}
	if s.runtimes != nil {
		m.registry.MustRegister(newRuntimeCollector(s.runtimes))
	}
	if s.pods != nil {
		m.gauge("latchkey_pods", "Pods of this node, by their cgroups.", func() float64 { return float64(s.pods().Pods) })
		m.counterFunc("latchkey_unknown_netns_total", "Connections accepted from a network namespace that is no pod's own, such as nested containers.", func() float64 { return float64(s.pods().UnknownNetns) })
	}
}

// gauge registers a value that is read when it is asked for.
func (m *metrics) gauge(name, help string, f func() float64) {
	m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, f))
}

// familyRepairs registers how often a family's address was put back.
func (m *metrics) familyRepairs(family linklocal.Family, f func() uint64) {
	m.registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{
		Name:        "latchkey_link_local_repairs_total",
		Help:        "How often the family's address, its route or its link was gone and was put back.",
		ConstLabels: prometheus.Labels{"family": family.String()},
	}, func() float64 { return float64(f()) }))
}

// counterFunc is gauge for a value that only grows.
func (m *metrics) counterFunc(name, help string, f func() float64) {
	m.registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help}, f))
}

// runtimeCollector shows whether the container runtime tells names.
type runtimeCollector struct {
	status    func() []pods.RuntimeStatus
	connected *prometheus.Desc
}

func newRuntimeCollector(status func() []pods.RuntimeStatus) *runtimeCollector {
	return &runtimeCollector{status: status, connected: prometheus.NewDesc("latchkey_container_runtime_connected",
		"1 while the names of pods are kept up to date from the container runtime; nothing is decided by them.", []string{"runtime"}, nil)}
}

// Describe implements prometheus.Collector.
func (c *runtimeCollector) Describe(ch chan<- *prometheus.Desc) { ch <- c.connected }

// Collect implements prometheus.Collector.
func (c *runtimeCollector) Collect(ch chan<- prometheus.Metric) {
	for _, s := range c.status() {
		ch <- prometheus.MustNewConstMetric(c.connected, prometheus.GaugeValue, bool01(s.Connected), s.Runtime)
	}
}

// auditCollector shows what became of the audit's records.
type auditCollector struct {
	stats                       func() audit.Stats
	written, dropped, unsampled *prometheus.Desc
}

func newAuditCollector(stats func() audit.Stats) *auditCollector {
	return &auditCollector{
		stats:     stats,
		written:   prometheus.NewDesc("latchkey_audit_records_total", "Audit records written.", nil, nil),
		dropped:   prometheus.NewDesc("latchkey_audit_records_dropped_total", "Audit records lost, because the queue was full (queue) or the target took none (sink). The next record tells how many.", []string{"cause"}, nil),
		unsampled: prometheus.NewDesc("latchkey_audit_hits_unsampled_total", "Answers from the cache that --audit-sample-hits left out of the audit.", nil, nil),
	}
}

// Describe implements prometheus.Collector.
func (c *auditCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- c.written
	ch <- c.dropped
	ch <- c.unsampled
}

// Collect implements prometheus.Collector.
func (c *auditCollector) Collect(ch chan<- prometheus.Metric) {
	s := c.stats()
	ch <- prometheus.MustNewConstMetric(c.written, prometheus.CounterValue, float64(s.Written))
	ch <- prometheus.MustNewConstMetric(c.dropped, prometheus.CounterValue, float64(s.Full), "queue")
	ch <- prometheus.MustNewConstMetric(c.dropped, prometheus.CounterValue, float64(s.Failed), "sink")
	ch <- prometheus.MustNewConstMetric(c.unsampled, prometheus.CounterValue, float64(s.Sampled))
}

// bpfCollector shows the programs' counters.
type bpfCollector struct {
	events func() ([]attribution.Event, error)
	ok     *prometheus.Desc
	failed *prometheus.Desc
}

func newBPFCollector(events func() ([]attribution.Event, error)) *bpfCollector {
	return &bpfCollector{
		events: events,
		ok:     prometheus.NewDesc("latchkey_bpf_events_total", "What the kernel programs saw, by event.", []string{"event"}, nil),
		failed: prometheus.NewDesc("latchkey_bpf_errors_total", "What failed in the kernel programs, by operation. Each is a connection without evidence.", []string{"operation"}, nil),
	}
}

// Describe implements prometheus.Collector.
func (c *bpfCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- c.ok
	ch <- c.failed
}

// Collect implements prometheus.Collector.
func (c *bpfCollector) Collect(ch chan<- prometheus.Metric) {
	events, err := c.events()
	if err != nil {
		ch <- prometheus.NewInvalidMetric(c.failed, err)
		return
	}
	for _, e := range events {
		d := c.ok
		if e.Error {
			d = c.failed
		}
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(e.Count), e.Name)
	}
}

// cacheCollector shows the cache, with one look at it per scrape.
type cacheCollector struct {
	stats func() credcache.Stats
	descs map[string]*prometheus.Desc
	state *prometheus.Desc
}

func newCacheCollector(stats func() credcache.Stats) *cacheCollector {
	c := &cacheCollector{
		stats: stats, descs: map[string]*prometheus.Desc{},
		state: prometheus.NewDesc("pod_identity_cache_state", "Requests answered from the cache (hit) or after a call of EKS Auth (miss), and entries removed by the cache's bounds (evicted).", []string{"state"}, nil),
	}
	for name, help := range map[string]string{
		"latchkey_cache_entries":             "Cached credentials.",
		"latchkey_cache_bytes":               "Memory of cached credentials, in bytes.",
		"latchkey_cache_unverified_entries":  "Cached credentials of tokens that only EKS Auth has judged.",
		"latchkey_cache_next_expiry_seconds": "Time until the first cached credentials end; 0 without any.",
		"latchkey_cache_due":                 "Renewals that wait for the budget.",
		"latchkey_upstream_in_flight":        "Calls of EKS Auth under way.",
		"latchkey_upstream_waiting":          "Fetches that wait for the budget.",
		"latchkey_upstream_rate_factor":      "Share of --upstream-qps in use; below 1 while EKS Auth throttles.",
	} {
		c.descs[name] = prometheus.NewDesc(name, help, nil, nil)
	}
	c.descs["latchkey_cache_removed_total"] = prometheus.NewDesc("latchkey_cache_removed_total",
		"Credentials removed from the cache, by cause: evicted by its bounds, expired, pod (ended) or refused by EKS Auth.", []string{"cause"}, nil)
	return c
}

// Describe implements prometheus.Collector.
func (c *cacheCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- c.state
	for _, d := range c.descs {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c *cacheCollector) Collect(ch chan<- prometheus.Metric) {
	s := c.stats()
	counter := func(d *prometheus.Desc, v uint64, label string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), label)
	}
	gauge := func(name string, v float64) {
		ch <- prometheus.MustNewConstMetric(c.descs[name], prometheus.GaugeValue, v)
	}
	counter(c.state, s.Hits, "hit")
	counter(c.state, s.Misses+s.Joined, "miss")
	counter(c.state, s.Evicted, "evicted")
	removed := c.descs["latchkey_cache_removed_total"]
	counter(removed, s.Evicted, "evicted")
	counter(removed, s.Expired, "expired")
	counter(removed, s.DroppedPod, "pod")
	counter(removed, s.DroppedRefused, "refused")
	gauge("latchkey_cache_entries", float64(s.Entries))
	gauge("latchkey_cache_bytes", float64(s.Bytes))
	gauge("latchkey_cache_unverified_entries", float64(s.UnverifiedEntries))
	gauge("latchkey_cache_due", float64(s.Due))
	gauge("latchkey_upstream_in_flight", float64(s.InFlight))
	gauge("latchkey_upstream_waiting", float64(s.Waiting))
	gauge("latchkey_upstream_rate_factor", s.RateFactor)
	next := 0.0
	if !s.NextExpiry.IsZero() {
		next = max(0, time.Until(s.NextExpiry).Seconds())
	}
	gauge("latchkey_cache_next_expiry_seconds", next)
}
