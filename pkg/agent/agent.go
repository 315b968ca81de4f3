// SPDX-License-Identifier: Apache-2.0

// Package agent puts the node half together: it attests connections, checks
// tokens, asks EKS Auth, caches, and answers; and it tells people what it does
// through its probes, metrics and admin socket.
//
// The order of the start is part of the security: programs first, listeners
// last. A connection that is older than the programs has no evidence, so there
// must be none.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/pkg/audit"
	"github.com/latchkey-dev/latchkey/pkg/credcache"
	"github.com/latchkey-dev/latchkey/pkg/credserver"
	"github.com/latchkey-dev/latchkey/pkg/evidence"
	"github.com/latchkey-dev/latchkey/pkg/linklocal"
	"github.com/latchkey-dev/latchkey/pkg/pods"
	"github.com/latchkey-dev/latchkey/pkg/privilege"
)

// auditGrace is how long the last audit records may take to be written.
const auditGrace = 3 * time.Second

// stopGrace is how long requests in progress may take once the agent is told to
// stop. Kubernetes gives a pod 30 s.
const stopGrace = 10 * time.Second

// Agent is a running agent.
type Agent struct {
	cfg     Config
	levels  *logLevels
	log     *slog.Logger // component LogAgent
	started time.Time

	node      *node
	tokens    tokenCheck
	attestor  *attestor
	cache     *credcache.Cache
	server    *credserver.Server
	listeners *listeners
	observer  *observer
	runtime   *pods.Runtime // nil: not asked
	audit     *audit.Log    // nil: off
	metrics   *metrics
	ready     readiness
	admin     adminState
	stopping  atomic.Bool
}

// Run answers pods until ctx ends, then stops gracefully and returns nil, or
// what Config.CleanupOnExit could not remove. It returns an error if the agent cannot start: a setting that makes no sense
// (ErrConfig), a node that cannot attest (ErrCannotAttest), an address that
// somebody else holds (ErrAddressInUse), another agent (ErrAnotherAgent).
func Run(ctx context.Context, cfg Config) error {
	if err := run(ctx, cfg); err != nil || !cfg.CleanupOnExit {
		return err
	}
	// The lock on the pins was given up: if the next agent has it already, that
	// one keeps everything.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopGrace)
	defer cancel()
	levels := newLogLevels(cfg.Logger.Handler(), cfg.LogLevel)
	log := levels.logger(LogAgent)
	removed, err := Cleanup(ctx, CleanupConfig{
		PinPath: cfg.PinPath, StateDir: cfg.StateDir, AdminSocket: cfg.AdminSocket,
		LinkLocal: linklocal.Config{Logger: levels.logger(LogLinkLocal)},
	})
	if errors.Is(err, ErrAnotherAgent) {
		log.Info("another agent has taken over: its addresses and pins stay", "cause", err.Error())
		return nil
	}
	log.Info("removed what this agent had put on the node", "removed", removed)
	if err != nil {
		return fmt.Errorf("clean up at the end: %w", err)
	}
	return nil
}

func run(ctx context.Context, cfg Config) error {
	warnings, err := cfg.check()
	if err != nil {
		return err
	}
	levels := newLogLevels(cfg.Logger.Handler(), cfg.LogLevel)
	log := levels.logger(LogAgent)
	for _, w := range warnings {
		log.Warn(string(w))
	}
	// Alone, before anything on the node is changed: an agent that is refused
	// leaves the one that runs as it was.
	release, err := claimPins(cfg.PinPath)
	if err != nil {
		return err
	}
	defer release()
	if err := addressesFree(cfg.BindHosts, cfg.Port); err != nil {
		return err
	}
	var admin net.Listener
	if cfg.AdminSocket != "" {
		if admin, err = listenAdmin(ctx, cfg.AdminSocket); err != nil {
			return err
		}
		defer admin.Close()
	}

	a := &Agent{cfg: cfg, levels: levels, log: log, started: time.Now()}
	a.ready.a = a
	a.metrics = newMetrics(cfg.Version, cfg.Policy.Default.String())
	if a.audit, err = a.openAudit(); err != nil {
		return err
	}
	a.observer = newObserver(a.metrics, levels.logger(LogRequests), a.enrich, a.audit)

	if a.tokens, err = newTokenCheck(&cfg, levels.logger(LogTokens)); err != nil {
		return err
	}
	if a.tokens.keys == nil {
		a.log.Warn("no key to check tokens with: EKS Auth alone judges them, and every rotated token costs a call; give --issuer, or the agent a service account")
	}
	client, err := newUpstream(ctx, &cfg, levels.logger(LogUpstream), a.metrics.attempt, func(ctx context.Context) error {
		// The cache is made below, and calls nobody before.
		return a.cache.Permit(ctx)
	})
	if err != nil {
		return err
	}
	a.admin.upstream = client
	if a.cache, err = credcache.New(credcache.Config{
		Upstream: upstream{client}, Audience: cfg.Audience,
		Disabled:   cfg.MaxRetention == 0 || cfg.MaxCacheSize == 0,
		MaxEntries: cfg.MaxCacheSize, MaxRetention: cfg.MaxRetention,
		MaxBytes: cfg.MaxCacheBytes, Concurrency: cfg.UpstreamConcurrency,
		UpstreamQPS: cfg.UpstreamQPS, BackgroundQPS: cfg.RenewalQPS,
		Logger: levels.logger(LogCache), Observe: a.observeFetch,
	}); err != nil {
		return err
	}
	defer a.cache.Close()

	// The programs.
	a.node, err = openNode(&a.cfg, levels, a.podSeen, a.podEnded)
	switch {
	case err == nil:
		defer a.node.close()
		a.attestor = newAttestor(a.node.kernel, a.node.index, levels.logger(LogEndpoint))
		s := a.node.kernel.Status()
		a.log.Info("attesting connections", "attached_at", a.node.attachAt, "kubepods", a.node.root.Path(),
			"pins", s.Directory, "reused_links", s.ReusedLinks, "reused_maps", s.ReusedMaps)
		for _, f := range s.Fallbacks {
			a.log.Warn("fallback in use on this kernel", "fallback", f)
		}
	case enforcedAnywhere(cfg.Policy):
		return fmt.Errorf("%w (--attestation=audit starts without, and serves stolen tokens): %w", ErrCannotAttest, err)
	default:
		a.admin.cannotAttest = err
		a.node = nil
		a.attestor = newAttestor(nil, nil, levels.logger(LogEndpoint))
		a.log.Warn("this node cannot attest connections; the mode allows to go on without", "error", err)
	}

	if err := privilege.Drop(startCapabilities()); err != nil {
		a.log.Info("capabilities of the start are kept, or could come back in a child", "error", err)
	}

	if a.server, err = credserver.New(credserver.Config{
		Attestor: a.attestor, Tokens: a.tokens.verifier, Credentials: credentials{a.cache},
		Policy: cfg.Policy, Hosts: hosts(cfg.BindHosts), Observer: a.observer, Logger: levels.logger(LogEndpoint),
		Limits: credserver.Limits{Pod: cfg.PodLimits},
	}); err != nil {
		if errors.Is(err, credserver.ErrConfig) {
			err = fmt.Errorf("%w: %w", ErrConfig, err)
		}
		return err
	}
	a.listeners = newListeners(a.server, cfg.BindHosts, cfg.Port, a.log, a.metrics)
	if a.runtime = newRuntime(cfg.ContainerRuntime, levels.logger(LogPods)); a.runtime != nil {
		a.admin.names = a.runtime
	}
	a.registerGauges()

	// What runs beside the requests. It ends after them, so that the last ones
	// are still judged with a live index and told to the log.
	background, stopBackground := context.WithCancel(context.WithoutCancel(ctx))
	var wg sync.WaitGroup
	defer func() {
		stopBackground()
		wg.Wait()
	}()
	if a.runtime != nil {
		wg.Go(func() { _ = a.runtime.Run(background) }) // nil when background ends
	}
	wg.Go(func() { a.observer.run(background) })
	if a.audit != nil {
		// Not among those that are waited for without end: standard output may
		// be a pipe that nobody reads.
		written := make(chan struct{})
		go func() {
			defer close(written)
			a.audit.Run(background)
		}()
		defer func() {
			stopBackground()
			select {
			case <-written:
			case <-time.After(auditGrace):
				log.Warn("audit records were lost at the end: nobody takes them")
			}
		}()
	}
	if a.tokens.keys != nil {
		wg.Go(func() { a.tokens.keys.Run(background) })
	}
	if a.node != nil {
		failed := make(chan error, 1)
		wg.Go(func() { failed <- a.node.index.Run(background) })
		select {
		case <-a.node.index.Ready():
		case err := <-failed:
			return fmt.Errorf("watch the node's pods: %w", err)
		case <-ctx.Done():
			return nil
		}
	}

	if a.node != nil {
		wg.Go(func() { a.node.keepAttached(background, levels.logger(LogAttribution)) })
	}

	// The addresses.
	nudge := make(chan struct{}, 1)
	keeper, err := a.keepAddresses(ctx, nudge)
	if err != nil {
		return err
	}
	if keeper != nil {
		a.admin.keeper = keeper
		wg.Go(func() {
			if err := keeper.Run(background); err != nil {
				a.log.Error("the link-local addresses are no longer kept", "error", err)
			}
			keeper.Close()
		})
	}

	// The listeners, last.
	if err := a.listeners.open(ctx); err != nil {
		if len(a.listeners.serving()) == 0 {
			return err
		}
		a.log.Error("cannot serve credentials on an address; trying again", "error", err)
	}
	side, stopSide := context.WithCancel(context.WithoutCancel(ctx))
	defer stopSide()
	if cfg.ProbePort != 0 {
		wg.Go(func() {
			keepServing(side, a.log, "probes", net.JoinHostPort("localhost", port(cfg.ProbePort)), a.probeHandler())
		})
	}
	if cfg.MetricsPort != 0 {
		wg.Go(func() {
			keepServing(side, a.log, "metrics", net.JoinHostPort(cfg.MetricsAddress, port(cfg.MetricsPort)), a.metricsHandler())
		})
	}
	if admin != nil {
		wg.Go(func() {
			if err := serveHTTP(side, admin, a.adminHandler()); err != nil {
				a.log.Error("admin socket ended", "error", err)
			}
		})
	}
	if held, _, err := privilege.Held(); err == nil {
		a.log.Info("capabilities", "held", held.String())
	}
	a.log.Info("started", "version", cfg.Version, "cluster_name", cfg.ClusterName, "attestation", cfg.Policy.Default.String(),
		"token_keys", a.tokens.what, "upstream", client.Endpoint())
	// Loading the programs parsed the kernel's type information: megabytes that
	// are garbage now, and that an idle agent would not collect for minutes.
	debug.FreeOSMemory()

	a.listeners.keep(ctx, nudge) // until ctx ends

	a.stopping.Store(true)
	a.log.Info("stopping")
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopGrace)
	defer cancel()
	if err := a.server.Shutdown(grace); err != nil {
		a.log.Warn("requests were cut", "error", err)
	}
	a.listeners.wg.Wait()
	a.log.Info("stopped")
	return nil
}

// openAudit makes the audit log; nil if that is off.
func (a *Agent) openAudit() (*audit.Log, error) {
	sink, err := audit.Open(a.cfg.Audit)
	if err != nil {
		return nil, fmt.Errorf("%w: --audit: %w", ErrConfig, err)
	}
	if sink == nil {
		return nil, nil
	}
	return audit.New(audit.Config{
		Sink: sink, SampleHits: a.cfg.AuditSampleHits, Enrich: a.enrich, Logger: a.levels.logger(LogAudit),
	})
}

// enrich adds to a record what the node knows of the connecting task. It may
// read the cgroup tree: not for the request path.
func (a *Agent) enrich(r *audit.Record) {
	id := r.Attestation.Connection.TaskCgroup
	if a.node == nil || id == 0 {
		return
	}
	path, err := a.node.resolver.Path(id)
	if err != nil {
		return // gone; what the kernel recorded is in the record
	}
	r.Task.Cgroup = path
	ref, err := a.node.root.Parse(path)
	if err != nil {
		return
	}
	r.Task.Pod, r.Task.ContainerID = ref.UID, ref.ContainerID
	if a.runtime == nil {
		return
	}
	if m, ok := a.runtime.Metadata(ref.UID); ok {
		r.Task.PodName, r.Task.Namespace = m.Name, m.Namespace
	}
	if c, ok := a.runtime.Container(ref.UID, ref.ContainerID); ok {
		r.Task.Container = c.Name
	}
}

// newRuntime makes what asks the container runtime for names; nil if nobody is
// to be asked.
func newRuntime(where string, log *slog.Logger) *pods.Runtime {
	cfg := pods.RuntimeConfig{Logger: log}
	switch where {
	case "", RuntimeOff:
		return nil
	case RuntimeAuto:
	default:
		cfg.ContainerdSockets, cfg.CRIODirs = []string{where}, []string{}
	}
	return pods.NewRuntime(cfg)
}

// podSeen is called by the pod index, in its goroutine.
func (a *Agent) podSeen(p *pods.Pod) { a.cache.AdmitPod(p.UID) }

// podEnded is called by the pod index, in its goroutine.
func (a *Agent) podEnded(p *pods.Pod) {
	a.cache.DropPod(p.UID)
	a.admin.podEnded(p, a.observer)
	a.observer.forget(p.UID)
}

func (a *Agent) observeFetch(f credcache.Fetch) {
	if f.Reason == evidence.ReasonServed {
		return
	}
	kind := "Recoverable"
	if f.Reason == evidence.ReasonUpstreamNotFound || f.Reason == evidence.ReasonUpstreamToken {
		kind = "NonRecoverable"
	}
	a.metrics.cacheError.WithLabelValues(kind, string(f.Reason)).Inc()
	if f.Background {
		a.log.Warn("cannot renew credentials", "reason", string(f.Reason), "pod_uid", string(f.Subject.PodUID),
			"namespace", f.Subject.Namespace, "service_account", f.Subject.ServiceAccount)
	}
}

// keepAddresses puts the link-local addresses among the bind hosts on the node
// and returns who keeps them there, nil if nobody has to or may.
func (a *Agent) keepAddresses(ctx context.Context, nudge chan<- struct{}) (*linklocal.Keeper, error) {
	var own []netip.Addr
	for _, d := range linklocal.DefaultAddresses() {
		if slices.Contains(a.cfg.BindHosts, d) {
			own = append(own, d)
		}
	}
	if len(own) == 0 {
		return nil, nil
	}
	keeper, err := linklocal.New(linklocal.Config{
		Addresses: own, Logger: a.levels.logger(LogLinkLocal),
		OnChange: func(f linklocal.Family, present bool, err error) {
			a.metrics.address.WithLabelValues(f.String()).Set(bool01(present))
			a.metrics.repairs.WithLabelValues(f.String()).Inc()
			select {
			case nudge <- struct{}{}:
			default:
			}
		},
	})
	if err != nil {
		return nil, fmt.Errorf("link-local addresses: %w", err)
	}
	for _, f := range []linklocal.Family{linklocal.IPv4, linklocal.IPv6} {
		// A repair is done before anybody sees the address missing, so it is no
		// change.
		a.metrics.familyRepairs(f, func() uint64 { return keeper.State().Repairs(f) })
	}
	result, err := keeper.Ensure(ctx)
	if ctx.Err() != nil {
		keeper.Close()
		return nil, nil
	}
	for _, f := range []linklocal.Family{linklocal.IPv4, linklocal.IPv6} {
		present, _ := result.Family(f)
		a.metrics.address.WithLabelValues(f.String()).Set(bool01(present))
	}
	if err != nil {
		// One family is enough to go on with; which one is missing is said.
		a.log.Warn("a link-local address is missing", "error", err)
		if errors.Is(err, unix.EPERM) {
			a.log.Info("without CAP_NET_ADMIN the addresses are not kept; `latchkey-agent initialize` puts them on the node once")
			keeper.Close()
			return nil, nil
		}
	}
	return keeper, nil
}

func (a *Agent) registerGauges() {
	s := sources{
		attesting: a.node != nil, byToken: a.tokens.keys == nil,
		connections: func() int { return a.server.Stats().Connections },
		cache:       a.cache.Stats,
	}
	if a.tokens.keys != nil {
		s.keys = func() int { return a.tokens.keys.Stats().Keys }
	}
	if a.audit != nil {
		s.audit = a.audit.Stats
	}
	if a.runtime != nil {
		s.runtimes = a.runtime.Status
	}
	if a.node != nil {
		s.bpf, s.pods, s.reattached = a.node.kernel.Events, a.node.index.Stats, a.node.kernel.Reattached
	}
	a.metrics.register(s)
}

// hosts are the texts that the Host header may have.
func hosts(bind []netip.Addr) []string {
	out := make([]string, 0, len(bind))
	for _, b := range bind {
		out = append(out, b.String())
	}
	return out
}

func port(p uint16) string { return strconv.Itoa(int(p)) }

// Initialize puts the link-local addresses on the node once. As in the
// reference agent, IPv4 that cannot be had is an error and IPv6 is not.
func Initialize(ctx context.Context, cfg linklocal.Config) error {
	keeper, err := linklocal.New(cfg)
	if err != nil {
		return err
	}
	defer keeper.Close()
	result, err := keeper.Ensure(ctx)
	if present, v4 := result.Family(linklocal.IPv4); !present || v4 != nil {
		return errors.Join(v4, err)
	}
	if err != nil {
		cfg.Logger.Warn("IPv6 is left out", "error", err)
	}
	cfg.Logger.Info("link-local addresses are in place", "link", result.Link)
	return nil
}

// CleanupConfig says where server left what.
type CleanupConfig struct {
	// PinPath, StateDir and AdminSocket are the flags' values; empty leaves out.
	PinPath, StateDir, AdminSocket string
	LinkLocal                      linklocal.Config
}

// Cleanup removes what agents left on the node and returns what it removed. It
// goes on after an error and returns them all.
func Cleanup(ctx context.Context, cfg CleanupConfig) ([]string, error) {
	var removed []string
	var errs []error
	note := func(r []string, err error) {
		removed = append(removed, r...)
		errs = append(errs, err)
	}
	// An agent that runs would lose its evidence and put its addresses back.
	release, err := lockPins(cfg.PinPath)
	if err != nil {
		return nil, err
	}
	defer release()
	if err := socketUnused(cfg.AdminSocket); err != nil {
		return nil, err
	}
	if cfg.PinPath != "" {
		note(cleanupPins(cfg.PinPath))
	}
	keeper, err := linklocal.New(cfg.LinkLocal)
	if err != nil {
		errs = append(errs, err)
	} else {
		note(keeper.Cleanup(ctx))
		keeper.Close()
	}
	note(cleanupFiles(cfg.StateDir, cfg.AdminSocket))
	return removed, errors.Join(errs...)
}

func removeIfThere(path string) ([]string, error) {
	err := os.Remove(path)
	switch {
	case err == nil:
		return []string{path}, nil
	case errors.Is(err, os.ErrNotExist):
		return nil, nil
	}
	return nil, err
}
