// SPDX-License-Identifier: Apache-2.0

// Package testnode makes a Kubernetes-like node out of one Linux machine, for
// privileged tests and for the demo: pods that are real cgroups, real network
// namespaces and real processes, without a container runtime.
//
// # What it makes
//
//	<cgroup2 mount>/latchkey-node-<pid>-<n>/    Node.CgroupRoot
//	  kubepods/                                 Node.KubepodsRoot
//	    burstable/pod<uid>/<container id>/      Pod, Container
//	    besteffort/...
//	  system/agent/                             Node.AgentPlace
//	  system/host/                              Node.HostPlace
//	<temp dir>/latchkey-node-<pid>-<n>/         Node.Dir
//	  bpf/                                      Node.BPFFS, a bpffs of its own
//	  pods/<uid>/                               Pod.Dir, token files
//
// The node has a network namespace of its own with a bridge cni0
// (10.88.0.1/24, fd00:88::1/64); every pod has another one, joined to the
// bridge by a veth pair. The namespaces are anonymous: they are file
// descriptors of this process and never appear in /run/netns. Nothing on the
// machine's own network, addresses, routes, sysctls or other cgroups changes.
//
// # How processes get into a pod
//
// A process belongs to its pod from its first instruction: it is cloned into
// the cgroup (CLONE_INTO_CGROUP, Linux 5.7) by a thread that has already
// entered the network namespace. A [Place] says where: which cgroup, which
// network namespace, which user. Attack tests combine them freely, for
// instance one pod's cgroup with another pod's namespace.
//
// Go code cannot enter a cgroup by thread, so a test's own code runs in a pod
// in a process of its own: the test binary executed again. Such code is an
// [Action]; [Main] at the start of TestMain or main dispatches it, [Place.Call]
// runs one, [Place.Spawn] keeps a process that runs one after the other.
// [Proc.DialContext] gives the test a connection which a pod opened.
//
// # How it is cleaned up
//
// [Node.Close] kills by cgroup and removes everything. If the process that
// made the node dies first (panic, SIGKILL, test time-out), a watchdog process
// does the same. If that was killed too, [Sweep], which [New] also runs,
// removes what is left.
//
// # Which cgroup a listener belongs to
//
// A socket belongs to the cgroup of the process that created it, and an
// accepted socket to the cgroup of its listener. A program attached at
// Node.CgroupRoot therefore sees an in-process agent's sockets only after
// [Node.Join].
package testnode
