// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/pkg/privilege"
)

// Capabilities is all that the server uses; docs/privileges.md says what for.
// What else the process was started with is given up before anything is done.
func Capabilities() privilege.Set {
	return runningCapabilities() | startCapabilities()
}

// startCapabilities are needed until the programs are loaded: PERFMON because
// they follow kernel pointers, SYS_RESOURCE for RLIMIT_MEMLOCK before Linux
// 5.11, SETPCAP to take all three out of the bounding set then. Programs that
// are attached again are those that are loaded, so PERFMON is not needed twice.
func startCapabilities() privilege.Set {
	return privilege.Of(unix.CAP_PERFMON, unix.CAP_SYS_RESOURCE, unix.CAP_SETPCAP)
}

// runningCapabilities: BPF reads evidence where unprivileged bpf(2) is off,
// NET_ADMIN repairs addresses, NET_BIND_SERVICE opens port 80 again,
// DAC_READ_SEARCH resolves cgroup ids, SYS_PTRACE sees which network namespace
// is whose.
func runningCapabilities() privilege.Set {
	return privilege.Of(unix.CAP_BPF, unix.CAP_NET_ADMIN, unix.CAP_NET_BIND_SERVICE, unix.CAP_DAC_READ_SEARCH, unix.CAP_SYS_PTRACE)
}
