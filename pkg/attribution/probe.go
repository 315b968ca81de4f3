// SPDX-License-Identifier: Apache-2.0

package attribution

import (
	"errors"
	"fmt"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/features"
	"golang.org/x/sys/unix"
)

// Feature is one thing that attribution needs of the kernel.
type Feature struct {
	Name string
	// Since is the kernel that first had it. For people: the probe decides,
	// never the version.
	Since string
	// Err is nil if the kernel has it. Otherwise it is ebpf.ErrNotSupported, or
	// what kept the probe from telling (a missing capability).
	Err error
}

// Features tries each thing that attribution needs. It loads small programs
// and so needs CAP_BPF and CAP_PERFMON (or CAP_SYS_ADMIN).
func Features() []Feature {
	helper := func(pt ebpf.ProgramType, fn asm.BuiltinFunc, since string) Feature {
		name := strings.TrimPrefix(fn.String(), "Fn")
		return Feature{fmt.Sprintf("helper %s in %s", name, pt), since, features.HaveProgramHelper(pt, fn)}
	}
	_, btfErr := btf.LoadKernelSpec()
	return []Feature{
		{"type information of the kernel (CONFIG_DEBUG_INFO_BTF, /sys/kernel/btf/vmlinux)", "5.4", btfErr},
		{"map type sk_storage", "5.2", features.HaveMapType(ebpf.SkStorage)},
		{"program type cgroup/connect", "4.17", features.HaveProgramType(ebpf.CGroupSockAddr)},
		{"program type sock_ops", "4.13", features.HaveProgramType(ebpf.SockOps)},
		helper(ebpf.CGroupSockAddr, asm.FnSkStorageGet, "5.8"),
		helper(ebpf.CGroupSockAddr, asm.FnGetNetnsCookie, "5.7"),
		helper(ebpf.CGroupSockAddr, asm.FnGetCurrentCgroupId, "5.7"),
		helper(ebpf.CGroupSockAddr, asm.FnGetCurrentAncestorCgroupId, "5.7"),
		helper(ebpf.CGroupSockAddr, asm.FnSkcToTcpSock, "5.10"),
		helper(ebpf.SockOps, asm.FnSkStorageGet, "5.2"),
		helper(ebpf.SockOps, asm.FnSkcToTcpSock, "5.10"),
		helper(ebpf.SockOps, asm.FnReserveHdrOpt, "5.10"),
		helper(ebpf.SockOps, asm.FnStoreHdrOpt, "5.10"),
		helper(ebpf.SockOps, asm.FnLoadHdrOpt, "5.10"),
	}
}

// Probe returns nil if the kernel can attest connections, else an error that
// wraps ErrUnsupported and names everything that is missing. A probe that could
// not tell is reported as what it is: attribution must not be given up for a
// missing capability under the name of an old kernel.
func Probe() error {
	var missing, failed []string
	var causes []error
	for _, f := range Features() {
		switch {
		case f.Err == nil:
		case errors.Is(f.Err, ebpf.ErrNotSupported):
			missing = append(missing, fmt.Sprintf("%s (Linux %s)", f.Name, f.Since))
		default:
			failed = append(failed, f.Name)
			causes = append(causes, f.Err)
		}
	}
	switch {
	case len(missing) > 0:
		return fmt.Errorf("%w: missing %s; Linux 5.10 with BTF and cgroup v2 is the oldest that has all",
			ErrUnsupported, strings.Join(missing, ", "))
	case len(failed) > 0:
		return fmt.Errorf("cannot tell whether the kernel has %s; CAP_BPF and CAP_PERFMON are needed: %w",
			strings.Join(failed, ", "), causes[0])
	}
	return nil
}

// fallbacks names what is done differently on this kernel. Each text ends with
// the kernel that no longer needs it, which a test holds it to.
func fallbacks() []string {
	var out []string
	if socketCgroupInUnion() {
		out = append(out, "socket's cgroup read from sock_cgroup_data.val, unknown while cgroup v1 net_cls or net_prio is in use (before Linux 5.15)")
	}
	if mapsAreLockedMemory() {
		out = append(out, "maps are charged to RLIMIT_MEMLOCK, which was raised (before Linux 5.11)")
	}
	if noNetnsCookie() {
		out = append(out, "network namespaces told apart by inode, as SO_NETNS_COOKIE is missing (before Linux 5.14)")
	}
	return out
}

// socketCgroupInUnion: the programs (socket_cgroup) take the other branch.
func socketCgroupInUnion() bool {
	spec, err := btf.LoadKernelSpec()
	if err != nil {
		return false
	}
	var data *btf.Struct
	if err := spec.TypeByName("sock_cgroup_data", &data); err != nil {
		return false
	}
	for _, m := range data.Members {
		if m.Name == "cgroup" {
			return false
		}
	}
	return true
}

// mapsAreLockedMemory: Open has raised the limit. How maps are charged cannot be
// asked for without lowering the limit of the whole process for a moment, and
// whether the limit was raised by Open or by whoever started the agent cannot be
// told afterwards; the helper came with the change.
func mapsAreLockedMemory() bool {
	return errors.Is(features.HaveProgramHelper(ebpf.SocketFilter, asm.FnKtimeGetCoarseNs), ebpf.ErrNotSupported)
}

// noNetnsCookie: package pods goes by inode. The programs do have the cookie,
// from an older helper, but nobody can tell whose it is.
func noNetnsCookie() bool {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	_, err = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	return errors.Is(err, unix.ENOPROTOOPT)
}
