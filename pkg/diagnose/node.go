// SPDX-License-Identifier: Apache-2.0

package diagnose

import (
	"bufio"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/pkg/attribution"
	"github.com/latchkey-dev/latchkey/pkg/cgroup"
)

// Cgroups tells which versions of cgroups are mounted. v2 is the mount point,
// empty if there is none. procfs is /proc if empty.
func Cgroups(procfs string) (v2 string, v1 bool, err error) {
	if procfs == "" {
		procfs = "/proc"
	}
	mountinfo := filepath.Join(procfs, "self", "mountinfo")
	f, err := os.Open(mountinfo)
	if err != nil {
		return "", false, err
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	s.Buffer(nil, 4<<20)
	for s.Scan() {
		_, right, _ := strings.Cut(s.Text(), " - ")
		v1 = v1 || strings.HasPrefix(right, "cgroup ")
	}
	if err := s.Err(); err != nil {
		return "", v1, err
	}
	m, err := cgroup.FindMount(mountinfo)
	if errors.Is(err, cgroup.ErrNoCgroup2) {
		return "", v1, nil
	}
	return m.Point, v1, err
}

// ErrElsewhere: what is seen from here is not what the agent sees.
var ErrElsewhere = errors.New("this is not the agent's view of the node: run latchkey on the node itself, or in the agent's container (kubectl exec)")

// SameNetns tells whether the caller is in the network namespace with this
// inode; 0, which older agents say, is taken for yes.
func SameNetns(inode uint32) bool {
	var own unix.Stat_t
	return inode == 0 || unix.Stat("/proc/self/ns/net", &own) == nil && uint32(own.Ino) == inode
}

// SameCgroups tells whether a path below the mount is the cgroup with this id;
// 0 is taken for yes.
func SameCgroups(mount, path string, id uint64) bool {
	if id == 0 {
		return true
	}
	got, err := cgroup.ID(filepath.Join(mount, path))
	return err == nil && uint64(got) == id
}

// MissingFeatures names what the kernel lacks for attestation; err is why the
// rest could not be told.
func MissingFeatures() (missing []string, err error) {
	for _, f := range attribution.Features() {
		switch {
		case f.Err == nil:
		case errors.Is(f.Err, ebpf.ErrNotSupported):
			missing = append(missing, f.Name+" (Linux "+f.Since+")")
		default:
			err = errors.Join(err, fmt.Errorf("%s: %w", f.Name, f.Err))
		}
	}
	return missing, err
}

// MissingAddresses lists those that no link of the caller's network namespace
// has.
func MissingAddresses(want []netip.Addr) ([]netip.Addr, error) {
	list, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list the node's addresses: %w", err)
	}
	have := map[netip.Addr]bool{}
	for _, a := range list {
		if ip, ok := netip.AddrFromSlice(a.IP); ok {
			have[ip.Unmap()] = true
		}
	}
	return slices.DeleteFunc(slices.Clone(want), func(a netip.Addr) bool { return have[a] }), nil
}

// Listener is a socket that waits for connections.
type Listener struct {
	At netip.AddrPort
	// Inode is the socket's.
	Inode uint64
	// Process is "name (pid)", empty if its holder cannot be found.
	Process string
	PID     int
}

// Listeners lists who listens on a port in the network namespace of a procfs's
// own process. procfs is /proc if empty.
func Listeners(procfs string, port uint16) ([]Listener, error) {
	if procfs == "" {
		procfs = "/proc"
	}
	var out []Listener
	for _, table := range []string{"tcp", "tcp6"} {
		data, err := os.ReadFile(filepath.Join(procfs, "self", "net", table))
		if errors.Is(err, os.ErrNotExist) {
			continue // no IPv6
		}
		if err != nil {
			return out, err
		}
		for line := range strings.SplitSeq(string(data), "\n") {
			if l, ok := parseListener(line); ok && l.At.Port() == port {
				out = append(out, l)
			}
		}
	}
	for i := range out {
		out[i].PID = holder(procfs, out[i].Inode)
		if out[i].PID != 0 {
			out[i].Process = fmt.Sprintf("%s (%d)", processName(procfs, out[i].PID), out[i].PID)
		}
	}
	return out, nil
}

// stateListen is TCP_LISTEN of the kernel's tcp_states.h.
const stateListen = "0A"

// parseListener reads a line of /proc/net/tcp or tcp6, whose addresses are
// words of the machine's byte order.
func parseListener(line string) (Listener, bool) {
	f := strings.Fields(line)
	if len(f) < 10 || f[3] != stateListen {
		return Listener{}, false
	}
	host, port, ok := strings.Cut(f[1], ":")
	b, err := hex.DecodeString(host)
	n, perr := strconv.ParseUint(port, 16, 16)
	inode, ierr := strconv.ParseUint(f[9], 10, 64)
	if !ok || err != nil || perr != nil || ierr != nil || len(b)%4 != 0 {
		return Listener{}, false
	}
	for i := 0; i < len(b); i += 4 {
		b[i], b[i+1], b[i+2], b[i+3] = b[i+3], b[i+2], b[i+1], b[i]
	}
	a, ok := netip.AddrFromSlice(b)
	return Listener{At: netip.AddrPortFrom(a.Unmap(), uint16(n)), Inode: inode}, ok
}

// holder finds a process that holds a socket; 0 if none can be found.
func holder(procfs string, inode uint64) int {
	want := fmt.Sprintf("socket:[%d]", inode)
	entries, err := os.ReadDir(procfs)
	if err != nil {
		return 0
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		dir := filepath.Join(procfs, e.Name(), "fd")
		fds, err := os.ReadDir(dir)
		if err != nil {
			continue
		}
		for _, fd := range fds {
			if target, err := os.Readlink(filepath.Join(dir, fd.Name())); err == nil && target == want {
				return pid
			}
		}
	}
	return 0
}

// PortHolder names who listens on one of the addresses, or on every address,
// and is not the process agent; empty if nobody does.
func PortHolder(procfs string, addresses []netip.Addr, port uint16, agent int) (string, error) {
	list, err := Listeners(procfs, port)
	for _, l := range list {
		if (agent == 0 || l.PID != agent) && (l.At.Addr().IsUnspecified() || slices.Contains(addresses, l.At.Addr())) {
			who := l.Process
			if who == "" {
				who = "a process"
			}
			return who + " on " + l.At.String(), nil
		}
	}
	return "", err
}

// processName is what a process is called. One that executed itself again, as
// the agent does to give up capabilities, is called "exe", which says nothing.
func processName(procfs string, pid int) string {
	dir := filepath.Join(procfs, strconv.Itoa(pid))
	comm, _ := os.ReadFile(filepath.Join(dir, "comm"))
	name := strings.TrimSpace(string(comm))
	if name == "exe" {
		if target, err := os.Readlink(filepath.Join(dir, "exe")); err == nil {
			name = filepath.Base(target)
		}
	}
	return name
}
