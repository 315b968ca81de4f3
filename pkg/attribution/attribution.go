// SPDX-License-Identifier: Apache-2.0

// Package attribution loads and attaches the BPF programs of package bpf, and
// reads what they recorded of an accepted connection.
//
// The order matters to whoever calls it: Open first, listen afterwards. A
// connection that was opened before the programs were attached has no evidence
// and never gains any.
//
// Maps, programs and links are pinned under PinPath, in a directory named after
// the layout of the maps. When the agent is killed the pinned programs go on
// recording, and the next agent takes the links over by updating them, so that
// there is no moment without a program and none with two.
package attribution

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/bpf"
	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

// Layout names the pin directory. It changes when a pinned map changes its
// shape: an older agent's maps are then not reused, and connections whose
// evidence was in flight answer 503 once.
const Layout = "v1"

// Limits of the programs (bpf/latchkey.h).
const (
	// MaxAddresses is how many agent addresses one family can have.
	MaxAddresses = 8
	// MaxPorts is how many agent ports there can be.
	MaxPorts = 4
)

// Errors that Open's can be compared with.
var (
	// ErrUnsupported: the kernel lacks something that attribution needs. The
	// text names it, and the version it came with.
	ErrUnsupported = errors.New("the kernel cannot attest connections")
	// ErrNotBPFFS: PinPath is not on a bpf filesystem.
	ErrNotBPFFS = errors.New("not on a bpf filesystem")
	// ErrConfig: the configuration cannot be loaded into the programs.
	ErrConfig = errors.New("invalid attribution configuration")
)

// Config says what to attribute, and where.
type Config struct {
	// CgroupPath is the cgroup v2 directory that the programs are attached at.
	// Every pod and the agent itself must be below it.
	CgroupPath string
	// PinPath is a directory on a bpf filesystem, made if missing. Empty: pin
	// nothing; the programs end with the process.
	PinPath string
	// Addresses and Ports are what the agent answers on. Both are needed.
	Addresses []netip.Addr
	Ports     []uint16
	// Kubepods is the id of the node's kubepods cgroup, for the bound per pod.
	Kubepods evidence.CgroupID
	// Netns is the network namespace that the agent listens in, which somebody
	// must hold as long as the programs are attached. A listener elsewhere, on
	// an address that only looks like the agent's, takes no evidence. Zero: the
	// calling process's.
	Netns evidence.NetnsInode
	// Logger may be nil.
	Logger *slog.Logger
}

// Attribution is the loaded programs. Its methods are safe for concurrent use.
type Attribution struct {
	accepted *ebpf.Map
	events   *ebpf.Map
	inflight *ebpf.Map
	qos      *ebpf.Map
	pending  *ebpf.Map

	closers []interface{ Close() error }
	log     *slog.Logger
	status  Status

	// mu guards hooked, which Repair changes.
	mu         sync.Mutex
	cfg        Config
	hooked     []*hooked
	reattached atomic.Uint64
}

// Status tells how Open came to its programs; it does not change afterwards.
type Status struct {
	// Directory of the pins, empty if nothing is pinned.
	Directory string
	// ReusedMaps and ReusedLinks count what an earlier agent had left.
	ReusedMaps, ReusedLinks int
	// Fallbacks in use on this kernel; empty on a current one.
	Fallbacks []string
}

// hooks are the places the programs are attached at. The names are the pins'.
var hooks = [...]struct {
	name    string
	program string
	attach  ebpf.AttachType
}{
	// sock_ops first: evidence noted without it would never be carried.
	{"sockops", bpf.AttributionProgLatchkeySockops, ebpf.AttachCGroupSockOps},
	{"connect4", bpf.AttributionProgLatchkeyConnect4, ebpf.AttachCGroupInet4Connect},
	{"connect6", bpf.AttributionProgLatchkeyConnect6, ebpf.AttachCGroupInet6Connect},
}

// Open loads the programs, takes over what an earlier agent pinned, and
// attaches. On error nothing new stays attached.
func Open(cfg Config) (_ *Attribution, err error) {
	log := cfg.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	// Kernels before 5.11 charge maps to RLIMIT_MEMLOCK; on later ones this
	// does nothing, and must not fail where limits cannot be raised.
	if err := rlimit.RemoveMemlock(); err != nil {
		return nil, fmt.Errorf("raise RLIMIT_MEMLOCK, needed before Linux 5.11: %w", err)
	}
	if err := Probe(); err != nil {
		return nil, err
	}
	spec, err := bpf.LoadAttribution()
	if err != nil {
		return nil, fmt.Errorf("read the embedded programs: %w", err)
	}
	if err := configure(spec, &cfg); err != nil {
		return nil, err
	}

	a := &Attribution{log: log, cfg: cfg}
	a.status.Fallbacks = append(fallbacks(), proofNotice()...)
	// Owned until handed over at the end.
	var owned []interface{ Close() error }
	defer func() {
		if err != nil {
			for i := len(owned) - 1; i >= 0; i-- {
				_ = owned[i].Close()
			}
		}
	}()

	var dir string
	opts := ebpf.CollectionOptions{MapReplacements: map[string]*ebpf.Map{}}
	if cfg.PinPath != "" {
		dir = filepath.Join(cfg.PinPath, Layout)
		if err := makePinDirectory(dir); err != nil {
			return nil, err
		}
		a.status.Directory = dir
		for name, ms := range spec.Maps {
			if !pinnedMap(name) {
				continue
			}
			m, err := ebpf.LoadPinnedMap(filepath.Join(dir, "map_"+name), nil)
			if errors.Is(err, os.ErrNotExist) {
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("open pinned map %s: %w", name, err)
			}
			owned = append(owned, m)
			if err := ms.Compatible(m); err != nil {
				// Somebody else's object, or a build that changed a map and
				// not Layout. Start over with a fresh map; what was in the
				// old one is lost with it.
				log.Warn("pinned map does not fit, replacing it", "map", name, "error", err)
				continue
			}
			opts.MapReplacements[name] = m
			a.status.ReusedMaps++
		}
	}

	coll, err := ebpf.NewCollectionWithOptions(spec, opts)
	if err != nil {
		return nil, explainLoad(err)
	}
	// MapReplacements are cloned into the collection: it owns every descriptor
	// it holds.
	owned = append(owned, closerFunc(func() error { coll.Close(); return nil }))

	if err := ensureKey(coll.Maps[bpf.AttributionMapNonceKey]); err != nil {
		return nil, err
	}
	if dir != "" {
		for name, m := range coll.Maps {
			if _, reused := opts.MapReplacements[name]; reused || !pinnedMap(name) {
				continue
			}
			if err := pinOver(m, filepath.Join(dir, "map_"+name)); err != nil {
				return nil, fmt.Errorf("pin map %s: %w", name, err)
			}
		}
	}

	for _, h := range hooks {
		prog := coll.Programs[h.program]
		l, reused, err := attach(&cfg, dir, h.name, h.attach, prog)
		if err != nil {
			return nil, fmt.Errorf("attach %s at %s: %w", h.name, cfg.CgroupPath, err)
		}
		a.hooked = append(a.hooked, newHooked(l, prog, h.name, h.attach))
		owned = append(owned, a.hooked[len(a.hooked)-1])
		if reused {
			a.status.ReusedLinks++
		}
		if dir != "" {
			if err := pinOver(prog, filepath.Join(dir, "prog_"+h.name)); err != nil {
				return nil, fmt.Errorf("pin program %s: %w", h.name, err)
			}
		}
	}
	// Only now: whatever an older layout had attached has been taken over.
	if dir != "" {
		if err := removeOtherLayouts(cfg.PinPath, log); err != nil {
			log.Warn("old pins stay", "error", err)
		}
	}

	a.accepted = coll.Maps[bpf.AttributionMapAccepted]
	a.events = coll.Maps[bpf.AttributionMapEvents]
	a.inflight = coll.Maps[bpf.AttributionMapInflight]
	a.qos = coll.Maps[bpf.AttributionMapQos]
	a.pending = coll.Maps[bpf.AttributionMapPending]
	if opts.MapReplacements[bpf.AttributionMapInflight] != nil {
		if n, err := a.freeEndedRings(cfg.CgroupPath); err != nil {
			log.Warn("rings of pods that ended while no agent ran may stay", "error", err)
		} else if n > 0 {
			log.Info("freed the rings of pods that ended while no agent ran", "rings", n)
		}
	}
	a.closers = owned
	return a, nil
}

type closerFunc func() error

func (f closerFunc) Close() error { return f() }

// Status tells how Open came to its programs.
func (a *Attribution) Status() Status { return a.status }

// Close gives up the agent's descriptors. What is pinned stays attached and
// goes on recording for the next agent; Cleanup removes it.
func (a *Attribution) Close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.hooked = nil // nothing is repaired any more
	var errs []error
	for i := len(a.closers) - 1; i >= 0; i-- {
		errs = append(errs, a.closers[i].Close())
	}
	a.closers = nil
	return errors.Join(errs...)
}

// Evidence reads what the kernel recorded of an accepted connection: one
// bpf(2) call. It returns false if there is nothing: the connection is older
// than the programs, was not made through connect(2) on this node, or its nonce
// did not hold. Call it after accept; the answer does not change afterwards.
func (a *Attribution) Evidence(c syscall.Conn) (evidence.Connection, bool, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return evidence.Connection{}, false, fmt.Errorf("descriptor of the connection: %w", err)
	}
	var ev bpf.AttributionEvidence
	var lookup error
	if err := raw.Control(func(fd uintptr) {
		// The kernel finds the socket by the caller's own descriptor: there is
		// no name that somebody else could have made point elsewhere.
		lookup = a.accepted.Lookup(int32(fd), &ev)
	}); err != nil {
		return evidence.Connection{}, false, fmt.Errorf("descriptor of the connection: %w", err)
	}
	if errors.Is(lookup, ebpf.ErrKeyNotExist) {
		return evidence.Connection{}, false, nil
	}
	if lookup != nil {
		return evidence.Connection{}, false, fmt.Errorf("read the evidence: %w", lookup)
	}
	return evidence.Connection{
		TaskCgroup:   evidence.CgroupID(ev.TaskCgroup),
		SocketCgroup: evidence.CgroupID(ev.SocketCgroup),
		NetnsCookie:  evidence.NetnsCookie(ev.NetnsCookie),
		NetnsInode:   evidence.NetnsInode(ev.NetnsInode),
		SocketCookie: ev.SocketCookie,
		TGID:         ev.Tgid,
		UID:          ev.Uid,
		Connected:    time.Duration(ev.ConnectedNs),
	}, true, nil
}

// SetQoS tells the programs which directories hold pods besides the kubepods
// root itself, so that the bound is per pod and not per QoS class.
func (a *Attribution) SetQoS(ids []evidence.CgroupID) error {
	for _, id := range ids {
		if err := a.qos.Put(uint64(id), uint8(1)); err != nil {
			return fmt.Errorf("note QoS directory %d: %w", id, err)
		}
	}
	return nil
}

// PodEnded frees the ring of a pod whose cgroup is gone. Its id is never used
// again.
func (a *Attribution) PodEnded(id evidence.CgroupID) error {
	if err := a.inflight.Delete(uint64(id)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("free the ring of cgroup %d: %w", id, err)
	}
	return nil
}

// freeEndedRings frees what PodEnded could not while no agent ran. The map holds
// a ring per cgroup; on a node whose agent restarts often enough it would fill
// with those of pods long gone, and new pods would get none.
func (a *Attribution) freeEndedRings(mount string) (int, error) {
	fd, err := unix.Open(mount, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("open the cgroup tree: %w", err)
	}
	defer unix.Close(fd)
	var ended []uint64
	var id uint64
	var ring bpf.AttributionRing
	it := a.inflight.Iterate()
	for it.Next(&id, &ring) {
		var handle [8]byte
		binary.NativeEndian.PutUint64(handle[:], id)
		cgroup, err := unix.OpenByHandleAt(fd, unix.NewFileHandle(fileidKernfs, handle[:]), unix.O_PATH|unix.O_CLOEXEC)
		switch {
		case err == nil:
			_ = unix.Close(cgroup)
		case errors.Is(err, unix.ESTALE):
			// Ids are not reused, so it is gone for good.
			ended = append(ended, id)
		case id != 0: // 0: what has no cgroup of its own
			return 0, fmt.Errorf("look for cgroup %d: %w", id, err)
		}
	}
	// A ring that appears meanwhile is a living pod's.
	if err := it.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
		return 0, fmt.Errorf("walk the rings: %w", err)
	}
	for _, id := range ended {
		if err := a.PodEnded(evidence.CgroupID(id)); err != nil {
			return 0, err
		}
	}
	return len(ended), nil
}

// fileidKernfs is FILEID_KERNFS of the kernel's exportfs.h: the type of a file
// handle that is a kernfs node's id.
const fileidKernfs = 0xfe

// Event is a counter of the programs.
type Event struct {
	// Name is the metric label.
	Name string
	// Error: something that should have worked did not.
	Error bool
	Count uint64
}

// eventNames follows enum event in bpf/latchkey.h; a test compares the two.
var eventNames = [...]Event{
	bpf.AttributionEventEVENT_CONNECT:              {Name: "connect"},
	bpf.AttributionEventEVENT_NONCE_SENT:           {Name: "nonce_sent"},
	bpf.AttributionEventEVENT_ATTESTED:             {Name: "attested"},
	bpf.AttributionEventEVENT_EVICTED:              {Name: "evicted"},
	bpf.AttributionEventEVENT_CLOSED_UNUSED:        {Name: "closed_unused"},
	bpf.AttributionEventEVENT_NO_OPTION:            {Name: "no_option"},
	bpf.AttributionEventEVENT_NONCE_UNKNOWN:        {Name: "nonce_unknown"},
	bpf.AttributionEventEVENT_PEER_MISMATCH:        {Name: "peer_mismatch"},
	bpf.AttributionEventEVENT_NONCE_RACE:           {Name: "nonce_race"},
	bpf.AttributionEventEVENT_ERR_CLIENT_STORAGE:   {Name: "client_storage", Error: true},
	bpf.AttributionEventEVENT_ERR_NO_TCP_SOCK:      {Name: "no_tcp_sock", Error: true},
	bpf.AttributionEventEVENT_ERR_INFLIGHT:         {Name: "inflight", Error: true},
	bpf.AttributionEventEVENT_ERR_PENDING:          {Name: "pending", Error: true},
	bpf.AttributionEventEVENT_ERR_FLAGS:            {Name: "flags", Error: true},
	bpf.AttributionEventEVENT_ERR_OPTION_SPACE:     {Name: "option_space", Error: true},
	bpf.AttributionEventEVENT_ERR_OPTION_WRITE:     {Name: "option_write", Error: true},
	bpf.AttributionEventEVENT_ERR_OPTION_READ:      {Name: "option_read", Error: true},
	bpf.AttributionEventEVENT_ERR_ACCEPTED_STORAGE: {Name: "accepted_storage", Error: true},
	bpf.AttributionEventEVENT_ERR_NO_KEY:           {Name: "no_key", Error: true},
}

// Events reads the programs' counters, summed over the CPUs. They go on across
// restarts of the agent as long as the maps are pinned.
func (a *Attribution) Events() ([]Event, error) {
	out := make([]Event, len(eventNames))
	var perCPU []uint64
	for i := range eventNames {
		out[i] = eventNames[i]
		if err := a.events.Lookup(uint32(i), &perCPU); err != nil {
			return nil, fmt.Errorf("read counter %s: %w", out[i].Name, err)
		}
		for _, n := range perCPU {
			out[i].Count += n
		}
	}
	return out, nil
}

// Pending counts the handshakes whose evidence is on its way. It walks the
// map: for tests and for the admin socket.
func (a *Attribution) Pending() (int, error) {
	var nonce uint64
	var h bpf.AttributionHandshake
	n := 0
	it := a.pending.Iterate()
	for it.Next(&nonce, &h) {
		n++
	}
	// Entries come and go while the walk goes on; that ends it early, and the
	// count so far is as good as any.
	if err := it.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
		return n, fmt.Errorf("walk the pending handshakes: %w", err)
	}
	return n, nil
}

// configure sets the programs' constants.
func configure(spec *ebpf.CollectionSpec, cfg *Config) error {
	if cfg.CgroupPath == "" {
		return fmt.Errorf("%w: no cgroup to attach at", ErrConfig)
	}
	var ports [MaxPorts]uint32
	if len(cfg.Ports) == 0 || len(cfg.Ports) > MaxPorts {
		return fmt.Errorf("%w: %d ports, need 1 to %d", ErrConfig, len(cfg.Ports), MaxPorts)
	}
	for i, p := range cfg.Ports {
		if p == 0 {
			return fmt.Errorf("%w: port 0", ErrConfig)
		}
		ports[i] = uint32(p)
	}
	var v4 [MaxAddresses]uint32
	var v6 [MaxAddresses][4]uint32
	var n4, n6 uint32
	for _, a := range cfg.Addresses {
		a = a.Unmap()
		switch {
		case !a.IsValid() || a.IsUnspecified():
			return fmt.Errorf("%w: address %v", ErrConfig, a)
		case a.Is4():
			if n4 == MaxAddresses {
				return fmt.Errorf("%w: more than %d IPv4 addresses", ErrConfig, MaxAddresses)
			}
			b := a.As4()
			v4[n4] = binary.NativeEndian.Uint32(b[:])
			n4++
		default:
			if n6 == MaxAddresses {
				return fmt.Errorf("%w: more than %d IPv6 addresses", ErrConfig, MaxAddresses)
			}
			b := a.As16()
			for w := range 4 {
				v6[n6][w] = binary.NativeEndian.Uint32(b[4*w:])
			}
			n6++
		}
	}
	if n4+n6 == 0 {
		return fmt.Errorf("%w: no address", ErrConfig)
	}
	netns := cfg.Netns
	if netns == 0 {
		var own unix.Stat_t
		if err := unix.Stat("/proc/self/ns/net", &own); err != nil {
			return fmt.Errorf("find the own network namespace: %w", err)
		}
		netns = evidence.NetnsInode(own.Ino)
	}
	for name, value := range map[string]any{
		bpf.AttributionVarPorts:         ports,
		bpf.AttributionVarPortCount:     uint32(len(cfg.Ports)),
		bpf.AttributionVarAddresses4:    v4,
		bpf.AttributionVarAddress4Count: n4,
		bpf.AttributionVarAddresses6:    v6,
		bpf.AttributionVarAddress6Count: n6,
		bpf.AttributionVarKubepodsId:    uint64(cfg.Kubepods),
		bpf.AttributionVarAgentNetns:    uint32(netns),
	} {
		v := spec.Variables[name]
		if v == nil {
			return fmt.Errorf("%w: the programs have no variable %s", ErrConfig, name)
		}
		if err := v.Set(value); err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
	}
	return configureProof(spec)
}

// ensureKey gives the nonces their key. A pinned map keeps the key it has: the
// old programs may be using it at this moment.
func ensureKey(m *ebpf.Map) error {
	var key bpf.AttributionSiphashKey
	if err := m.Lookup(uint32(0), &key); err != nil {
		return fmt.Errorf("read the nonce key: %w", err)
	}
	if key.K0 != 0 || key.K1 != 0 {
		return nil
	}
	var b [16]byte
	if _, err := rand.Read(b[:]); err != nil {
		return fmt.Errorf("make the nonce key: %w", err)
	}
	key.K0, key.K1 = binary.NativeEndian.Uint64(b[:]), binary.NativeEndian.Uint64(b[8:])
	if err := m.Put(uint32(0), key); err != nil {
		return fmt.Errorf("set the nonce key: %w", err)
	}
	return nil
}

// attach puts the program in place of the one an earlier agent left at the
// hook, or attaches it anew.
func attach(cfg *Config, dir, hook string, at ebpf.AttachType, prog *ebpf.Program) (link.Link, bool, error) {
	var target unix.Stat_t
	if err := unix.Stat(cfg.CgroupPath, &target); err != nil {
		return nil, false, err
	}
	pin := ""
	if dir != "" {
		pin = filepath.Join(dir, "link_"+hook)
		for _, old := range pinnedLinks(cfg.PinPath, hook) {
			l, err := link.LoadPinnedLink(old, nil)
			if err != nil {
				return nil, false, fmt.Errorf("open pinned link %s: %w", old, err)
			}
			// A link to another cgroup (the machine's layout changed) or to
			// one that is gone cannot be updated to serve this one.
			info, err := l.Info()
			if err == nil && info.Cgroup() != nil && info.Cgroup().CgroupId == target.Ino && l.Update(prog) == nil {
				if old != pin {
					if err := l.Pin(pin); err != nil {
						return nil, false, fmt.Errorf("move pinned link %s: %w", old, err)
					}
				}
				return l, true, nil
			}
			_ = l.Unpin()
			_ = l.Close()
		}
	}
	l, err := link.AttachCgroup(link.CgroupOptions{Path: cfg.CgroupPath, Attach: at, Program: prog})
	if err != nil {
		return nil, false, err
	}
	if pin != "" {
		if err := l.Pin(pin); err != nil {
			_ = l.Close()
			return nil, false, fmt.Errorf("pin: %w", err)
		}
	}
	return l, false, nil
}

// explainLoad names the verifier's complaint; the whole log is in %+v.
func explainLoad(err error) error {
	var ve *ebpf.VerifierError
	if errors.As(err, &ve) {
		return fmt.Errorf("%w: the verifier refuses a program: %w", ErrUnsupported, err)
	}
	return fmt.Errorf("load the programs: %w", err)
}
