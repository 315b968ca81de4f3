// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/latchkey-dev/latchkey/test/rig"
	"github.com/latchkey-dev/latchkey/test/standin/eksauth"
	"github.com/latchkey-dev/latchkey/test/standin/tokens"
)

// unlimited lifts a pod's limits, which a load generator meets at once.
func unlimited() []string {
	return []string{"--max-pod-qps", "1000000", "--max-pod-burst", "1000000", "--max-pod-connections", "4096"}
}

// hit measures the processor time of a cached answer, attestation enforced,
// against nginx and the agent's own HTTP engine with the same bytes.
func (b *bench) hit() (err error) {
	n, err := b.newNode(tokens.Config{})
	if err != nil {
		return err
	}
	defer n.Close()
	if err := n.start(unlimited()...); err != nil {
		return err
	}
	p, err := n.pod("load")
	if err != nil {
		return err
	}
	body, err := n.warm(p)
	if err != nil {
		return err
	}
	nginxPID, stop, err := n.nginx(body)
	if err != nil {
		return err
	}
	defer stop()
	engine, err := n.Node.HostPlace().Spawn(b.ctx)
	if err != nil {
		return err
	}
	defer engine.Kill()
	if _, err := call[struct{}](n, engine, "bare", bareArgs{Body: body}); err != nil {
		return err
	}
	servers := []struct {
		name, host string
		pid        int
	}{
		{"nginx `return 200`, two workers", nginxHost, nginxPID},
		{"fasthttp, fixed bytes", bareHost, engine.PID()},
		{"Latchkey, attestation enforced", "169.254.170.23", n.agent.PID()},
	}
	const connections = 16
	type key struct {
		server int
		keep   bool
	}
	used, rate := map[key][]float64{}, map[key][]float64{}
	failed := 0
	for round := range b.rounds + 1 {
		for _, keep := range []bool{true, false} {
			for _, i := range rand.Perm(len(servers)) {
				s := servers[i]
				before, err := cpu(s.pid)
				if err != nil {
					return err
				}
				start := time.Now()
				got, err := n.wrk(p, s.host, connections, keep, p.Token, b.length)
				if err != nil {
					return err
				}
				took := time.Since(start)
				after, err := cpu(s.pid)
				if err != nil {
					return err
				}
				if round == 0 {
					continue // warms up
				}
				failed += got.failed
				k := key{i, keep}
				used[k] = append(used[k], float64((after-before).Microseconds())/float64(got.requests))
				rate[k] = append(rate[k], float64(got.requests)/took.Seconds())
			}
		}
	}
	b.printf("## A cached answer\n\nProcessor time of the server process per answer (user and system, from `/proc/PID/stat`); `wrk` in a pod, %d connections, token of %d bytes in, %d bytes out. "+
		"Median of %d rounds of %s, with least and most; servers in random order. %d requests failed.\n\n", connections, len(p.Token), len(body), b.rounds, b.length, failed)
	b.printf("| server | keep-alive: µs | × nginx | req/s | one connection each: µs | × nginx | req/s |\n|---|---|---|---|---|---|---|\n")
	ratio := map[key]float64{}
	for i, s := range servers {
		b.printf("| %s |", s.name)
		for _, keep := range []bool{true, false} {
			k := key{i, keep}
			ratio[k] = median(used[k]) / median(used[key{0, keep}])
			b.printf(" %.1f (%.1f to %.1f) | %.2f | %.0f |", median(used[k]), slices.Min(used[k]), slices.Max(used[k]), ratio[k], median(rate[k]))
		}
		b.printf("\n")
	}
	b.printf("\nTargets: keep-alive ≤ 1.3 × nginx: %s; one connection each ≤ 1.6 × nginx: %s.\n\n",
		met(ratio[key{2, true}] <= 1.3), met(ratio[key{2, false}] <= 1.6))
	return nil
}

// allocations runs the packages' own benchmarks of the hit path and of memory.
func (b *bench) allocations() error {
	out, err := exec.CommandContext(b.ctx, "go", "test", "-run", "^$", "-bench", "HandlerHit$|CacheHit$|ConnectionHit/latchkey|VerdictHit|DecideHit|BytesPerSubject", "-benchmem",
		"./pkg/credserver", "./pkg/credcache", "./pkg/verdict").CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	line := regexp.MustCompile(`(?m)^Benchmark(\S+?)(?:-\d+)?\s+\d+\s+([\d.]+) ns/op(.*?)([\d.]+) B/op\s+(\d+) allocs/op`)
	subject := regexp.MustCompile(`([\d.]+) B/subject`)
	b.printf("## Allocations of a cached answer\n\n| benchmark | ns | allocations |\n|---|---|---|\n")
	most, found := 0, false
	perSubject := 0.0
	for _, m := range line.FindAllStringSubmatch(string(out), -1) {
		if s := subject.FindStringSubmatch(m[3]); s != nil {
			perSubject, _ = strconv.ParseFloat(s[1], 64)
			continue
		}
		allocs, _ := strconv.Atoi(m[5])
		ns, _ := strconv.ParseFloat(m[2], 64)
		b.printf("| `%s` | %.0f | %d |\n", m[1], ns, allocs)
		most, found = max(most, allocs), true
	}
	if !found {
		return fmt.Errorf("no benchmark ran:\n%s", out)
	}
	b.printf("\nTarget: 0: %s.\n\n", met(most == 0))
	if perSubject > 0 {
		b.printf("A cached subject costs %.0f bytes of heap beyond its credential's own bytes (`BenchmarkBytesPerSubject`, 10,000 subjects, token included). Target ≤ 3 KiB: %s.\n\n",
			perSubject, met(perSubject <= 3<<10))
	}
	return nil
}

// fairness measures what a flooding pod costs a quiet one, with the default
// limits.
func (b *bench) fairness() error {
	n, err := b.newNode(tokens.Config{})
	if err != nil {
		return err
	}
	defer n.Close()
	if err := n.start(); err != nil {
		return err
	}
	quiet, err := n.pod("quiet")
	if err != nil {
		return err
	}
	rude, err := n.pod("rude")
	if err != nil {
		return err
	}
	for _, p := range []*rig.Pod{quiet, rude} {
		if _, err := n.warm(p); err != nil {
			return err
		}
	}
	proc, err := quiet.Spawn(b.ctx)
	if err != nil {
		return err
	}
	defer proc.Kill()
	// What the load generator itself costs the quiet pod: as many answers, by
	// somebody else.
	engine, err := n.Node.HostPlace().Spawn(b.ctx)
	if err != nil {
		return err
	}
	defer engine.Kill()
	if _, err := call[struct{}](n, engine, "bare", bareArgs{Body: "Too Many Requests", Delay: 45 * time.Millisecond}); err != nil {
		return err
	}
	const agent = "169.254.170.23"
	floods := []struct {
		name        string
		host        string // empty: no flood
		connections int
		keep        bool
		token       string
	}{
		{name: "is quiet too"},
		{"floods another server, 64 kept connections", bareHost, 64, true, rude.Token},
		{"floods another server, new connections, 64 at a time", bareHost, 64, false, rude.Token},
		{"floods without a token, 64 kept connections", agent, 64, true, ""},
		{"floods with its own token, 64 kept connections", agent, 64, true, rude.Token},
		{"floods with new connections, 64 at a time", agent, 64, false, rude.Token},
	}
	type result struct {
		latencies []time.Duration
		failed    int
		flooded   int
		seconds   float64
	}
	results := make([]result, len(floods))
	const every = 10 * time.Millisecond
	length := 2 * b.length
	for range b.rounds {
		for _, i := range rand.Perm(len(floods)) {
			f := floods[i]
			flood := make(chan error, 1)
			var got loadResult
			if f.host != "" {
				go func() {
					var err error
					got, err = n.wrk(rude, f.host, f.connections, f.keep, f.token, length)
					flood <- err
				}()
			} else {
				flood <- nil
			}
			r, err := call[pacedResult](n, proc, "paced", pacedArgs{Token: quiet.Token, Requests: int(length / every), Every: every})
			if err != nil {
				return err
			}
			if err := <-flood; err != nil {
				return err
			}
			results[i].latencies = append(results[i].latencies, r.Latencies...)
			results[i].failed += r.Failed
			results[i].flooded += got.requests
			results[i].seconds += length.Seconds()
		}
	}
	b.printf("## Fairness\n\nA quiet pod asks 100 times per second, a new connection each time, while another pod floods; default limits, %d rounds of %s. "+
		"Times are the client's, connect included; `wrk` and all else share the machine's processors, which the second and third line show.\n\n", b.rounds, length)
	b.printf("| the other pod | answered to it per s | quiet pod: asked | failed | p50 ms | p99 ms | × p99 alone |\n|---|---|---|---|---|---|---|\n")
	none, ok := true, true
	alone := quantile(results[0].latencies, 0.99)
	for i, f := range floods {
		r := results[i]
		p99 := quantile(r.latencies, 0.99)
		times := float64(p99) / float64(alone)
		b.printf("| %s | %.0f | %d | %d | %.2f | %.2f | %.2f |\n", f.name, float64(r.flooded)/r.seconds, len(r.latencies)+r.failed, r.failed,
			ms(quantile(r.latencies, 0.5)), ms(p99), times)
		none = none && r.failed == 0
		ok = ok && (f.host != agent || times <= 2)
	}
	b.printf("\nTargets: no failed request: %s; ≤ 2 × p99: %s.\n\n", met(none), met(ok))
	return nil
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// waiters measures how fast 64 requests that wait for a cold subject are
// answered once the upstream has.
func (b *bench) waiters() error {
	n, err := b.newNode(tokens.Config{})
	if err != nil {
		return err
	}
	defer n.Close()
	if err := n.start("--upstream-qps", "1000"); err != nil {
		return err
	}
	const upstream, many = 50 * time.Millisecond, 64
	b.printf("## Waiters\n\n%d requests wait for a subject that is not cached. EKS Auth, a stand-in in this program, lets go of its answer %s after it was called; times are from then to the answer in the client, so that the stand-in's own work is part of them. %d rounds, a new pod each.\n\n", many, upstream, 2*b.rounds)
	b.printf("| case | calls upstream | answered | one waiter: ms, median | first of %d: ms | last of %d: ms | most | last beyond one waiter: ms |\n|---|---|---|---|---|---|---|---|\n", many, many)
	ok := true
	for _, f := range []struct {
		name  string
		fault eksauth.Fault
	}{
		{"success", eksauth.Fault{}},
		{"error", eksauth.Fault{Kind: eksauth.Refuse, ErrorType: "InvalidParameterException", Message: "no"}},
	} {
		var alone, first, last []time.Duration
		statuses := map[int]int{}
		calls := 0
		for round := range 2*b.rounds + 1 {
			for _, size := range []int{1, many} {
				p, err := n.pod(fmt.Sprintf("w-%s-%d-%d", f.name, round, size))
				if err != nil {
					return err
				}
				r, released, err := n.crowd(p, size, f.fault, upstream)
				if err != nil {
					return err
				}
				if err := p.Delete(b.ctx); err != nil {
					return err
				}
				switch {
				case round == 0: // warms up
				case size == 1:
					alone = append(alone, r.Last.Sub(released))
				default:
					calls = max(calls, n.EKSAuth.CallCount())
					first, last = append(first, r.First.Sub(released)), append(last, r.Last.Sub(released))
					for s, c := range r.Statuses {
						statuses[s] += c
					}
				}
			}
		}
		beyond := median(last) - median(alone)
		ok = ok && calls == 1 && beyond <= 2*time.Millisecond
		b.printf("| %s | %d | %s | %.1f | %.1f | %.1f | %.1f | %.1f |\n", f.name, calls, countsText(statuses), ms(median(alone)), ms(median(first)), ms(median(last)), ms(slices.Max(last)), ms(beyond))
	}
	b.printf("\nTarget: one call, and all answered within 2 ms of it: %s.\n\n", met(ok))
	return nil
}

// crowd lets many requests of a pod wait for one answer of the upstream, and
// returns when that was let go.
func (n *node) crowd(p *rig.Pod, size int, fault eksauth.Fault, upstream time.Duration) (r crowdResult, released time.Time, err error) {
	proc, err := p.Spawn(n.b.ctx)
	if err != nil {
		return r, released, err
	}
	defer proc.Kill()
	n.EKSAuth.Reset()
	hold := make(chan struct{})
	fault.Hold = hold
	n.EKSAuth.Inject(fault)
	done := make(chan error, 1)
	go func() {
		var err error
		r, err = call[crowdResult](n, proc, "crowd", crowdArgs{Token: p.Token, Waiters: size})
		done <- err
	}()
	for now := 0; now == 0; now, _ = n.EKSAuth.InFlight() {
		select {
		case err := <-done:
			return r, released, fmt.Errorf("answered without a call of the upstream: %w", err)
		case <-time.After(time.Millisecond):
		}
	}
	time.Sleep(upstream)
	released = time.Now()
	close(hold)
	err = <-done
	return r, released, err
}

func countsText(m map[int]int) string {
	var parts []string
	for _, s := range slices.Sorted(maps.Keys(m)) {
		parts = append(parts, fmt.Sprintf("%d × %d", m[s], s))
	}
	return strings.Join(parts, ", ")
}

// giveUp lets a client give up after 0.5 s while the upstream takes 0.8 s.
func (b *bench) giveUp() error {
	n, err := b.newNode(tokens.Config{})
	if err != nil {
		return err
	}
	defer n.Close()
	if err := n.start(); err != nil {
		return err
	}
	n.EKSAuth.Inject(eksauth.Fault{Delay: 800 * time.Millisecond})
	p, err := n.pod("hasty")
	if err != nil {
		return err
	}
	proc, err := p.Spawn(b.ctx)
	if err != nil {
		return err
	}
	defer proc.Kill()
	try, err := call[int](n, proc, "hasty", hastyArgs{Token: p.Token, Patience: 500 * time.Millisecond, Tries: 5})
	if err != nil {
		return err
	}
	b.printf("## A client that gives up\n\nA client gives up after 0.5 s and tries again at once; EKS Auth takes 0.8 s. Served at try %d, with %d call(s) of EKS Auth. Target: the next try succeeds: %s.\n\n",
		try, n.EKSAuth.CallCount(), met(try == 2 && n.EKSAuth.CallCount() == 1))
	return nil
}

// memory measures the agent's resident memory, idle and with subjects cached.
func (b *bench) memory() error {
	n, err := b.newNode(tokens.Config{Algorithm: "ES256"}) // RSA is slow to sign
	if err != nil {
		return err
	}
	defer n.Close()
	if err := n.start(); err != nil {
		return err
	}
	idle, err := kilobytes(n.agent.PID(), "VmRSS")
	if err != nil {
		return err
	}
	anonymous, err := kilobytes(n.agent.PID(), "RssAnon")
	if err != nil {
		return err
	}
	if err := n.stop(); err != nil {
		return err
	}
	// As many pods as this cannot be made here, so nothing is attested: what is
	// cached is the same.
	const subjects = 5000
	if err := n.start(append(unlimited(), "--attestation", "off", "--max-cache-size", "20000", "--max-cache-bytes", "1000000000",
		"--upstream-qps", "100000", "--upstream-concurrency", "64")...); err != nil {
		return err
	}
	var all []string
	for i := range subjects {
		name := fmt.Sprintf("sa-%d", i)
		n.Associate("bench", name, name)
		all = append(all, n.Signer.Token(tokens.Claims{Namespace: "bench", ServiceAccount: name, Pod: name, PodUID: tokens.UID(name)}))
	}
	p, err := n.pod("filler")
	if err != nil {
		return err
	}
	proc, err := p.Spawn(b.ctx)
	if err != nil {
		return err
	}
	defer proc.Kill()
	before, err := kilobytes(n.agent.PID(), "VmRSS")
	if err != nil {
		return err
	}
	served, err := call[int](n, proc, "fill", all)
	if err != nil {
		return err
	}
	if served < subjects*99/100 {
		return fmt.Errorf("only %d of %d subjects were served", served, subjects)
	}
	after, err := kilobytes(n.agent.PID(), "VmRSS")
	if err != nil {
		return err
	}
	a, err := rig.Ask(b.ctx, p.Place(), rig.Host4, all[0])
	if err != nil || a.Status != http.StatusOK {
		return fmt.Errorf("a filled subject is answered %d %s: %w", a.Status, a.Body, err)
	}
	text, err := n.Metrics(b.ctx)
	if err != nil {
		return err
	}
	entries, bytes := metric(text, "latchkey_cache_entries"), metric(text, "latchkey_cache_bytes")
	b.printf("## Memory\n\n| what | KiB |\n|---|---|\n")
	b.printf("| resident, idle, attestation enforced | %d |\n| of which anonymous, that is neither program nor libraries | %d |\n", idle, anonymous)
	b.printf("| resident, %.0f subjects cached (%.0f bytes each by its own account, of which the credential's %d) | %d |\n", entries, bytes/entries, len(a.Body), after)
	b.printf("| growth per subject, garbage not yet collected included | %.2f |\n\n", float64(after-before)/entries)
	b.printf("Target: ≤ 24 MiB idle: %s. The second half was measured with attestation off, as so many pods cannot be made here.\n\n", met(idle <= 24<<10))
	return nil
}

func metric(text, name string) float64 {
	for line := range strings.Lines(text) {
		if rest, ok := strings.CutPrefix(line, name+" "); ok {
			v, _ := strconv.ParseFloat(strings.TrimSpace(rest), 64)
			return v
		}
	}
	return 0
}

// hooks measures connect and close to an address that is not the agent's, with
// and without the programs.
func (b *bench) hooks() error {
	n, err := b.newNode(tokens.Config{})
	if err != nil {
		return err
	}
	defer n.Close()
	server, err := n.Node.HostPlace().Spawn(b.ctx)
	if err != nil {
		return err
	}
	defer server.Kill()
	if _, err := call[struct{}](n, server, "sink", struct{}{}); err != nil {
		return err
	}
	p, err := n.pod("unrelated")
	if err != nil {
		return err
	}
	proc, err := p.Spawn(b.ctx)
	if err != nil {
		return err
	}
	defer proc.Kill()
	args := connectArgs{Address: netip.MustParseAddrPort(sinkHost + ":80"), Connections: 15000}
	wall, used := map[bool][]time.Duration{}, map[bool][]time.Duration{}
	var ratios []float64
	for round := range 2*b.rounds + 1 {
		// Which goes first takes turns too.
		for _, with := range []bool{round%2 == 0, round%2 != 0} {
			if with {
				if err := n.start(); err != nil {
					return err
				}
			}
			r, err := call[connectResult](n, proc, "connect", args)
			if err != nil {
				return err
			}
			if with {
				if err := n.stop(); err != nil {
					return err
				}
				if out, err := n.Cleanup(b.ctx); err != nil {
					return fmt.Errorf("%w: %s", err, out)
				}
			}
			if round == 0 {
				continue // warms up
			}
			wall[with] = append(wall[with], r.Wall/time.Duration(args.Connections))
			used[with] = append(used[with], r.CPU/time.Duration(args.Connections))
		}
		if round > 0 {
			i := round - 1
			ratios = append(ratios, float64(used[true][i])/float64(used[false][i])-1)
		}
	}
	b.printf("## Unrelated connections\n\nconnect and close from a pod to another address of the node, %d connections a round, %d rounds with the programs attached and as many without, in turns.\n\n", args.Connections, len(wall[true]))
	b.printf("| | without | with | difference |\n|---|---|---|---|\n")
	for _, row := range []struct {
		name string
		v    map[bool][]time.Duration
	}{{"client's processor time, median", used}, {"elapsed, median", wall}} {
		without, with := median(row.v[false]), median(row.v[true])
		b.printf("| %s | %.2f µs | %.2f µs | %+.1f %% |\n", row.name, us(without), us(with), 100*(float64(with)/float64(without)-1))
	}
	low, high := quantile(ratios, 0.25), quantile(ratios, 0.75)
	verdict := "cannot be told in this noise"
	if high <= 0.02 || low > 0.02 {
		verdict = met(high <= 0.02)
	}
	b.printf("\nDifference of processor time within a round: median %+.1f %%, half of the rounds between %+.1f %% and %+.1f %%. Target ≤ 2 %%: %s. What each hook costs by itself is measured by `test/kernel`.\n\n",
		100*median(ratios), 100*low, 100*high, verdict)
	return nil
}

func us(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1000 }
