// SPDX-License-Identifier: Apache-2.0

// Hookcost measures what Latchkey's programs cost the connections that are none
// of its business, and prints a table.
//
// It makes a node of its own (a cgroup and a network namespace), and needs root.
// Two things are measured, each for IPv4 and IPv6, to another port and to the
// agent's port at another address:
//
//   - connect+accept+close, both ends below the cgroup that the programs are
//     attached at, by one thread: with no programs, with empty ones, and with
//     Latchkey's, taking turns within one run. Over loopback, which is the
//     cheapest connection there is, so that the share is the largest; and from a
//     pod's network namespace through its veth pair and the bridge, as pods
//     connect;
//   - the run time of each program per call, from the kernel's own statistics,
//     less that of an empty program of the same type attached beside it: the
//     statistics cost more than the programs.
//
// Numbers are medians over rounds. With -write FILE the table also replaces the
// block between the markers in docs/kernels.md.
package main

import (
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/pkg/attribution"
	"github.com/latchkey-dev/latchkey/test/kernel"
	"github.com/latchkey-dev/latchkey/test/testnode"
)

const (
	agentPort = 80
	otherPort = 8080
)

func main() {
	testnode.Main(nil)
	var cfg config
	flag.IntVar(&cfg.rounds, "rounds", 200, "rounds; medians are over these")
	flag.IntVar(&cfg.batch, "batch", 400, "connections in one round; few make attaching itself look like a cost")
	flag.StringVar(&cfg.write, "write", "", "document whose block about cost is replaced")
	flag.Parse()
	text, err := run(cfg)
	if err == nil {
		fmt.Print(text)
		err = write(cfg.write, text)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "hookcost:", err)
		os.Exit(1)
	}
}

type config struct {
	rounds, batch int
	write         string
}

func write(path, text string) error {
	if path == "" {
		return nil
	}
	old, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	document, err := kernel.SetCost(string(old), text)
	if err != nil {
		return err
	}
	return os.WriteFile(path, []byte(document), 0o644)
}

// hook is one place of attachment, with Latchkey's program and an empty one.
type hook struct {
	name            string
	attach          ebpf.AttachType
	latchkey, empty *ebpf.Program
}

// scenario is a kind of unrelated connection.
type scenario struct {
	name string
	v6   bool
	port int
	// veth: from the pod, else over loopback.
	veth bool
}

func scenarios() []scenario {
	return []scenario{
		{"loopback, IPv4, another port", false, otherPort, false},
		{"loopback, IPv4, port 80 of another address", false, agentPort, false},
		{"loopback, IPv6, another port", true, otherPort, false},
		{"loopback, IPv6, port 80 of another address", true, agentPort, false},
		{"from a pod, IPv4, another port", false, otherPort, true},
		{"from a pod, IPv6, another port", true, otherPort, true},
	}
}

func run(cfg config) (_ string, err error) {
	if cfg.rounds < 5 || cfg.batch < 10 {
		return "", errors.New("fewer than 5 rounds of 10 connections tell nothing")
	}
	ctx := context.Background()
	machine, err := describe()
	if err != nil {
		return "", err
	}
	node, err := testnode.New(ctx, testnode.Config{})
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, node.Leave(), node.Close()) }()
	pod, err := node.AddPod(ctx, testnode.PodConfig{Name: "web"})
	if err != nil {
		return "", err
	}
	// The sockets' cgroup is that of their maker.
	if err := node.Join(); err != nil {
		return "", err
	}
	hooks, err := load(node)
	if err != nil {
		return "", err
	}
	if err := node.Do(anyLocal); err != nil {
		return "", fmt.Errorf("make destinations: %w", err)
	}
	b := &bench{cfg: cfg, cgroup: node.CgroupRoot(), hooks: hooks}
	var results []result
	for _, s := range scenarios() {
		var srv *server
		if err := node.Do(func() (err error) { srv, err = listen(s); return err }); err != nil {
			return "", err
		}
		from := node.Netns()
		if s.veth {
			from = pod.Netns()
		}
		r := result{scenario: s}
		// A socket belongs to the network namespace of the thread that makes it.
		err := from.Do(func() (err error) {
			if r.total, err = b.totals(srv); err != nil {
				return err
			}
			r.calls, err = b.perCalls(srv)
			return err
		})
		if err = errors.Join(err, unix.Close(srv.fd)); err != nil {
			return "", fmt.Errorf("%s: %w", s.name, err)
		}
		results = append(results, r)
	}
	return render(cfg, machine, hooks, results), nil
}

// result of one scenario.
type result struct {
	scenario
	total total
	calls map[string]*perCall
}

// load takes the programs as the agent loads them, from its pins, and detaches
// them.
func load(node *testnode.Node) (_ []hook, err error) {
	pins := filepath.Join(node.BPFFS(), "latchkey")
	kubepods, err := testnode.CgroupID(node.KubepodsRoot())
	if err != nil {
		return nil, err
	}
	a, err := attribution.Open(attribution.Config{
		CgroupPath: node.CgroupRoot(), PinPath: pins, Kubepods: kubepods, Netns: node.Netns().Inode(),
		Addresses: []netip.Addr{netip.MustParseAddr("169.254.170.23"), netip.MustParseAddr("fd00:ec2::23")},
		Ports:     []uint16{agentPort},
	})
	if err != nil {
		return nil, err
	}
	defer func() {
		_, cerr := attribution.Cleanup(pins)
		err = errors.Join(err, a.Close(), cerr)
	}()
	hooks := []hook{
		{name: "connect4", attach: ebpf.AttachCGroupInet4Connect},
		{name: "connect6", attach: ebpf.AttachCGroupInet6Connect},
		{name: "sockops", attach: ebpf.AttachCGroupSockOps},
	}
	for i := range hooks {
		h := &hooks[i]
		if h.latchkey, err = ebpf.LoadPinnedProgram(filepath.Join(pins, attribution.Layout, "prog_"+h.name), nil); err != nil {
			return nil, err
		}
		if h.empty, err = ebpf.NewProgram(&ebpf.ProgramSpec{
			Name: "empty", Type: h.latchkey.Type(), AttachType: h.attach, License: "GPL",
			Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
		}); err != nil {
			return nil, fmt.Errorf("load an empty program for %s: %w", h.name, err)
		}
	}
	return hooks, nil
}

// anyLocal makes whole prefixes local, as 127.0.0.0/8 is: closed connections
// keep their ports for a minute, and there must be more destinations than one.
func anyLocal() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	for _, cidr := range []string{"10.89.0.0/16", "fd00:10c::/64"} {
		_, prefix, err := net.ParseCIDR(cidr)
		if err != nil {
			return err
		}
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: lo.Attrs().Index, Dst: prefix, Scope: unix.RT_SCOPE_HOST, Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL}); err != nil {
			return err
		}
	}
	return nil
}

type bench struct {
	cfg    config
	cgroup string
	hooks  []hook
	// turn picks the next batch's destination.
	turn uint32
}

// mode is what is attached.
type mode int

const (
	nothing mode = iota
	emptyPrograms
	latchkey
	both        // empty ones run first
	bothReverse // Latchkey's run first
	modes
)

// attach puts the mode's programs in place and returns what takes them away.
func (b *bench) attach(m mode) (io.Closer, error) {
	var l links
	for _, h := range b.hooks {
		for _, p := range [modes][]*ebpf.Program{
			emptyPrograms: {h.empty}, latchkey: {h.latchkey}, both: {h.empty, h.latchkey}, bothReverse: {h.latchkey, h.empty},
		}[m] {
			a, err := link.AttachCgroup(link.CgroupOptions{Path: b.cgroup, Attach: h.attach, Program: p})
			if err != nil {
				return nil, errors.Join(fmt.Errorf("attach %s: %w", h.name, err), l.Close())
			}
			l = append(l, a)
		}
	}
	return l, nil
}

type links []link.Link

func (l links) Close() error {
	var errs []error
	for _, x := range l {
		errs = append(errs, x.Close())
	}
	return errors.Join(errs...)
}

// server listens on every address of one family.
type server struct {
	scenario
	fd int
}

func listen(s scenario) (*server, error) {
	family := unix.AF_INET
	if s.v6 {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	var sa unix.Sockaddr = &unix.SockaddrInet4{Port: s.port}
	if s.v6 {
		sa = &unix.SockaddrInet6{Port: s.port}
	}
	err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	if err = errors.Join(err, unix.Bind(fd, sa), unix.Listen(fd, 128)); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("listen: %w", err)
	}
	return &server{s, fd}, nil
}

// destination is another one for each turn, as the kernel reads it.
func (s *server) destination(turn uint32) []byte {
	host := 2 + turn%4000
	if s.v6 {
		sa := make([]byte, unix.SizeofSockaddrInet6)
		binary.NativeEndian.PutUint16(sa, unix.AF_INET6)
		binary.BigEndian.PutUint16(sa[2:], uint16(s.port))
		copy(sa[8:], []byte{0xfd, 0x00, 0x01, 0x0c}) // fd00:10c::
		binary.BigEndian.PutUint32(sa[20:], host)
		return sa
	}
	sa := make([]byte, unix.SizeofSockaddrInet4)
	binary.NativeEndian.PutUint16(sa, unix.AF_INET)
	binary.BigEndian.PutUint16(sa[2:], uint16(s.port))
	binary.BigEndian.PutUint32(sa[4:], 127<<24+host)
	if s.veth {
		binary.BigEndian.PutUint32(sa[4:], 10<<24+89<<16+host)
	}
	return sa
}

// connections opens and closes n connections, one after the other, with system
// calls only: on loopback the handshake is over when connect returns. It returns
// the time per connection.
func (b *bench) connections(s *server, n int) (time.Duration, error) {
	b.turn++
	sa := s.destination(b.turn)
	family := uintptr(unix.AF_INET)
	if s.v6 {
		family = unix.AF_INET6
	}
	start := time.Now()
	for range n {
		c, _, e := unix.RawSyscall(unix.SYS_SOCKET, family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if e != 0 {
			return 0, fmt.Errorf("socket: %w", e)
		}
		if _, _, e := unix.RawSyscall(unix.SYS_CONNECT, c, uintptr(unsafe.Pointer(&sa[0])), uintptr(len(sa))); e != 0 {
			unix.Close(int(c))
			return 0, fmt.Errorf("connect: %w", e)
		}
		a, _, e := unix.RawSyscall6(unix.SYS_ACCEPT4, uintptr(s.fd), 0, 0, unix.SOCK_CLOEXEC, 0, 0)
		if e != 0 {
			unix.Close(int(c))
			return 0, fmt.Errorf("accept: %w", e)
		}
		unix.RawSyscall(unix.SYS_CLOSE, c, 0, 0)
		unix.RawSyscall(unix.SYS_CLOSE, a, 0, 0)
	}
	return time.Since(start) / time.Duration(n), nil
}

// total is what a connection costs in each mode, by round.
type total struct {
	nothing, empty, latchkey []float64
}

// totals lets the modes take turns, in another order each round.
func (b *bench) totals(s *server) (total, error) {
	var t total
	for round := range b.cfg.rounds {
		var took [3]float64
		for i := range took {
			m := mode((round + i) % len(took))
			attached, err := b.attach(m)
			if err != nil {
				return t, err
			}
			// Attaching patches the kernel's text and leaves work behind, which
			// must not be taken for the programs' cost.
			_, err = b.connections(s, b.cfg.batch/4)
			var d time.Duration
			if err == nil {
				d, err = b.connections(s, b.cfg.batch)
			}
			if err = errors.Join(err, attached.Close()); err != nil {
				return t, err
			}
			took[m] = float64(d.Nanoseconds())
		}
		t.nothing = append(t.nothing, took[nothing])
		t.empty = append(t.empty, took[emptyPrograms])
		t.latchkey = append(t.latchkey, took[latchkey])
	}
	return t, nil
}

// perCall is one program's run time, by round.
type perCall struct {
	// raw is with the statistics' own cost, empty that of the empty program.
	raw, empty []float64
	// calls per connection.
	calls float64
}

// perCalls measures every program that a scenario runs.
func (b *bench) perCalls(s *server) (_ map[string]*perCall, err error) {
	stats, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	if err != nil {
		return nil, fmt.Errorf("turn the kernel's statistics of programs on: %w", err)
	}
	defer func() { err = errors.Join(err, stats.Close()) }()
	out := map[string]*perCall{}
	connections := 0
	for round := range b.cfg.rounds {
		m := both
		if round%2 == 1 {
			m = bothReverse
		}
		if err := b.countRound(s, m, out); err != nil {
			return nil, err
		}
		connections += b.cfg.batch
	}
	for _, p := range out {
		p.calls /= float64(connections)
	}
	return out, nil
}

func (b *bench) countRound(s *server, m mode, out map[string]*perCall) (err error) {
	attached, err := b.attach(m)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, attached.Close()) }()
	if _, err := b.connections(s, b.cfg.batch/4); err != nil {
		return err
	}
	before, err := b.stats()
	if err != nil {
		return err
	}
	if _, err := b.connections(s, b.cfg.batch); err != nil {
		return err
	}
	after, err := b.stats()
	if err != nil {
		return err
	}
	for i, h := range b.hooks {
		ours, empty := after[i].latchkey.minus(before[i].latchkey), after[i].empty.minus(before[i].empty)
		if ours.calls == 0 || empty.calls == 0 {
			continue
		}
		p := out[h.name]
		if p == nil {
			p = &perCall{}
			out[h.name] = p
		}
		p.raw = append(p.raw, ours.perCall())
		p.empty = append(p.empty, empty.perCall())
		p.calls += ours.calls
	}
	return nil
}

type runs struct{ ns, calls float64 }

func (r runs) minus(o runs) runs { return runs{r.ns - o.ns, r.calls - o.calls} }
func (r runs) perCall() float64  { return r.ns / r.calls }

type hookRuns struct{ latchkey, empty runs }

func (b *bench) stats() ([]hookRuns, error) {
	var out []hookRuns
	for _, h := range b.hooks {
		var r hookRuns
		for _, x := range []struct {
			p  *ebpf.Program
			to *runs
		}{{h.latchkey, &r.latchkey}, {h.empty, &r.empty}} {
			s, err := x.p.Stats()
			if err != nil {
				return nil, fmt.Errorf("statistics of %s: %w", h.name, err)
			}
			*x.to = runs{float64(s.Runtime.Nanoseconds()), float64(s.RunCount)}
		}
		out = append(out, r)
	}
	return out, nil
}

func render(cfg config, machine string, hooks []hook, results []result) string {
	var t, c strings.Builder
	for i := range results {
		r := &results[i]
		t.WriteString(r.total.row(r.name))
		for _, h := range hooks {
			if p := r.calls[h.name]; p != nil {
				c.WriteString(p.row(r.name, h.name))
			}
		}
	}
	return fmt.Sprintf(`%s; medians of %d rounds of %d connections, the ways taking turns in one run. In brackets: the middle half of the
rounds for times, the 95 %% interval of the median for differences.

connect+accept+close by one thread, both ends below the cgroup that the programs are attached at (target: at most 2 %%):

| connection | no programs, ns | empty programs, ns more | Latchkey's, ns more | share |
| --- | --: | --: | --: | --: |
%s
One call of a program that does not match, by the kernel's statistics, less an empty program of the same type beside it
(target: at most 100 ns):

| connection | program | calls per connection | with the statistics' own cost, ns | empty program, ns | program, ns |
| --- | --- | --: | --: | --: | --: |
%s`, machine, cfg.rounds, cfg.batch, t.String(), c.String())
}

func (t *total) row(name string) string {
	base := median(t.nothing)
	more := differences(t.latchkey, t.nothing)
	low, high := confidence(more)
	return fmt.Sprintf("| %s | %.0f [%.0f–%.0f] | %s | %s | **%.1f %%** [%.1f–%.1f] |\n", name,
		base, quantile(t.nothing, 0.25), quantile(t.nothing, 0.75),
		interval(differences(t.empty, t.nothing)), interval(more),
		100*median(more)/base, 100*low/base, 100*high/base)
}

func (p *perCall) row(scenario, program string) string {
	return fmt.Sprintf("| %s | `%s` | %.1f | %.0f | %.0f | **%s** |\n", scenario, program, p.calls,
		median(p.raw), median(p.empty), interval(differences(p.raw, p.empty)))
}

func interval(x []float64) string {
	low, high := confidence(x)
	return fmt.Sprintf("%.0f [%.0f–%.0f]", median(x), low, high)
}

// describe names what the numbers depend on.
func describe() (string, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", err
	}
	jit := "unknown"
	if b, err := os.ReadFile("/proc/sys/net/core/bpf_jit_enable"); err == nil {
		jit = map[string]string{"0": "off", "1": "on", "2": "on"}[strings.TrimSpace(string(b))]
	}
	cpu := "unknown CPU"
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		if _, after, ok := strings.Cut(string(b), "model name"); ok {
			model, _, _ := strings.Cut(strings.TrimLeft(after, "\t :"), "\n")
			cpu = model
		}
	}
	return fmt.Sprintf("Linux %s, %s, BPF JIT %s", kernel.Series(unix.ByteSliceToString(u.Release[:])), cpu, jit), nil
}
