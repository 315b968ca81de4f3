// SPDX-License-Identifier: Apache-2.0

package server

import (
	"context"
	"net/http"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/latchkey-dev/latchkey/pkg/eksapi"
	"github.com/latchkey-dev/latchkey/pkg/etcd"
	"github.com/latchkey-dev/latchkey/pkg/issuer"
	"github.com/latchkey-dev/latchkey/pkg/tokencheck"
)

// metrics are the server's. Labels have values that the server chose: nothing
// that a caller made up becomes a time series.
type metrics struct {
	registry *prometheus.Registry

	requests   *prometheus.CounterVec
	duration   *prometheus.HistogramVec
	exchanges  *prometheus.CounterVec
	sts        *prometheus.CounterVec
	stsTime    *prometheus.HistogramVec
	reviews    *prometheus.CounterVec
	reviewTime *prometheus.HistogramVec
	keysAlone  *prometheus.CounterVec
	nodes      *prometheus.CounterVec
	throttled  prometheus.Counter
	unrecorded prometheus.Counter
}

func newMetrics(cfg *Config) *metrics {
	network := []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5}
	m := &metrics{
		registry: prometheus.NewRegistry(),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "latchkey_server_requests_total", Help: "Calls of the APIs, by operation, HTTP status and error."}, []string{"operation", "status", "code"}),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "latchkey_server_request_duration_seconds", Help: "Time of a call, STS included.",
			Buckets: []float64{.00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5}}, []string{"operation"}),
		exchanges: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "latchkey_server_exchanges_total", Help: "Pods' tokens exchanged for credentials or refused, by cluster, outcome and error."}, []string{"cluster", "outcome", "code"}),
		sts: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "latchkey_server_sts_calls_total", Help: "Calls of STS, by hop and STS's answer."}, []string{"hop", "code"}),
		stsTime: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "latchkey_server_sts_call_duration_seconds", Help: "Time of a call of STS, with its repetitions.", Buckets: network}, []string{"hop"}),
		reviews: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "latchkey_server_token_reviews_total", Help: "Questions to clusters' API servers, by outcome."}, []string{"cluster", "outcome"}),
		reviewTime: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "latchkey_server_token_review_duration_seconds", Help: "Time of one such question.", Buckets: network}, []string{"cluster"}),
		keysAlone: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "latchkey_server_token_reviews_bypassed_total", Help: "Tokens accepted by their signature alone, because the cluster's API server was away and the cluster is set to go on."}, []string{"cluster"}),
		nodes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "latchkey_server_node_exchanges_total", Help: "Agents' tokens exchanged for a node's keys, by outcome."}, []string{"outcome"}),
		throttled: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "latchkey_server_strangers_throttled_total", Help: "Calls without a known access key answered 429, because many from their address had failed."}),
		unrecorded: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "latchkey_server_audit_unrecorded_total", Help: "Refusals of callers that had not proved who they are left out of the audit log, because there were many."}),
	}
	sts := "sts"
	if cfg.StandInSTS {
		sts = "stand-in"
	}
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "latchkey_server_build_info", Help: "Always 1.",
		ConstLabels: prometheus.Labels{"version": cfg.Version, "sts": sts, "node_binding": cfg.NodeBinding}})
	info.Set(1)
	m.registry.MustRegister(m.requests, m.duration, m.exchanges, m.sts, m.stsTime, m.reviews, m.reviewTime, m.keysAlone, m.nodes, m.throttled, m.unrecorded, info,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

func (m *metrics) observe(o eksapi.Observation) {
	m.requests.WithLabelValues(o.Operation, strconv.Itoa(o.Status), o.Code).Inc()
	m.duration.WithLabelValues(o.Operation).Observe(o.Duration.Seconds())
	if o.Stranger && o.Status == http.StatusTooManyRequests {
		m.throttled.Inc()
	}
	if o.Unrecorded {
		m.unrecorded.Inc()
	}
}

// audited counts exchanges. The cluster is the caller's word until it is known.
func (m *metrics) audited(r eksapi.Record, known func(cluster string) bool) {
	if r.Type != eksapi.TypeExchange {
		return
	}
	cluster := r.Cluster
	if !known(cluster) {
		cluster = ""
	}
	m.exchanges.WithLabelValues(cluster, r.Outcome, r.Code).Inc()
}

func (m *metrics) stsCall(c issuer.Call) {
	hop := strconv.Itoa(c.Hop)
	m.sts.WithLabelValues(hop, c.Code).Inc()
	m.stsTime.WithLabelValues(hop).Observe(c.Duration.Seconds())
}

func (m *metrics) review(r tokencheck.Review) {
	m.reviews.WithLabelValues(r.Cluster, string(r.Outcome)).Inc()
	if r.Outcome != tokencheck.OutcomeSkipped {
		m.reviewTime.WithLabelValues(r.Cluster).Observe(r.Duration.Seconds())
	}
	if r.KeysAlone {
		m.keysAlone.WithLabelValues(r.Cluster).Inc()
	}
}

func (m *metrics) gauge(name, help string, f func() float64) {
	m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, f))
}

func (m *metrics) counter(name, help string, f func() float64) {
	m.registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help}, f))
}

func bool01(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// registerState adds what is read when it is asked for.
func (m *metrics) registerState(s *server) {
	m.gauge("latchkey_server_ready", "1 if /readyz says yes.", func() float64 { return bool01(s.ready() == nil) })
	m.gauge("latchkey_server_index_associations", "Associations in memory.", func() float64 { n, _ := s.index.Len(); return float64(n) })
	m.gauge("latchkey_server_index_clusters", "Clusters in memory.", func() float64 { _, n := s.index.Len(); return float64(n) })
	m.gauge("latchkey_server_index_revision", "The store's revision that the index has reached.", func() float64 { return float64(s.index.Revision()) })
	m.gauge("latchkey_server_index_behind_seconds", "How long ago the store last said that the index has everything.", func() float64 { return s.index.Behind().Seconds() })
	m.gauge("latchkey_server_users", "Users in force.", func() float64 { return float64(s.users.Status().Users) })
	m.gauge("latchkey_server_users_file_usable", "1 if the users file as it is now is in force; 0: the last good one is.", func() float64 { return bool01(s.users.Status().Err == nil) })
	m.counter("latchkey_server_audit_records_total", "Audit records written.", func() float64 { return float64(s.audit.written.Load()) })
	m.counter("latchkey_server_audit_failures_total", "Audit records that could not be written.", func() float64 { return float64(s.audit.failed.Load()) })
	if s.cert != nil {
		m.gauge("latchkey_server_certificate_expiry_timestamp_seconds", "When the TLS certificate in use ends.", func() float64 {
			leaf, _, _, _ := s.cert.state()
			return float64(leaf.NotAfter.Unix())
		})
		m.counter("latchkey_server_certificate_reloads_total", "Certificates read again because their files changed.", func() float64 { _, n, _, _ := s.cert.state(); return float64(n) })
		m.counter("latchkey_server_certificate_failures_total", "Looks at the certificate's files that found nothing usable.", func() float64 { _, _, n, _ := s.cert.state(); return float64(n) })
	}
	m.registry.MustRegister(newStoreCollector(s.etcd.Status))
}

// storeCollector shows the store, with one question per scrape.
type storeCollector struct {
	status                    func(context.Context) (etcd.Status, error)
	size, inUse, quota, alarm *prometheus.Desc
}

func newStoreCollector(status func(context.Context) (etcd.Status, error)) *storeCollector {
	return &storeCollector{
		status: status,
		size:   prometheus.NewDesc("latchkey_server_store_size_bytes", "The store's file.", nil, nil),
		inUse:  prometheus.NewDesc("latchkey_server_store_in_use_bytes", "What of the store's file holds data.", nil, nil),
		quota:  prometheus.NewDesc("latchkey_server_store_quota_bytes", "The most that the store's file may be; beyond it changes are refused.", nil, nil),
		alarm:  prometheus.NewDesc("latchkey_server_store_alarm", "1 if the store refuses changes, by why.", []string{"alarm"}, nil),
	}
}

// Describe implements prometheus.Collector.
func (c *storeCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- c.size
	ch <- c.inUse
	ch <- c.quota
	ch <- c.alarm
}

// Collect implements prometheus.Collector.
func (c *storeCollector) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	st, err := c.status(ctx)
	if err != nil {
		ch <- prometheus.NewInvalidMetric(c.size, err)
		return
	}
	for d, v := range map[*prometheus.Desc]int64{c.size: st.SizeBytes, c.inUse: st.InUseBytes, c.quota: st.QuotaBytes} {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(v))
	}
	ch <- prometheus.MustNewConstMetric(c.alarm, prometheus.GaugeValue, bool01(st.NoSpace), "no_space")
	ch <- prometheus.MustNewConstMetric(c.alarm, prometheus.GaugeValue, bool01(st.Corrupt), "corrupt")
}
