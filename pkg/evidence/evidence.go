// SPDX-License-Identifier: Apache-2.0

// Package evidence holds the types that the node half's parts exchange: what
// the kernel recorded of a connection, what that resolved to, whose token was
// presented, and why a request was refused.
//
// It has no logic beyond formatting and no dependency, so that every part may
// import it and none has to import another.
package evidence

import (
	"strconv"
	"time"
)

// CgroupID is the 64-bit id of a cgroup v2 directory, unique for the life of
// the kernel (kernfs node id: inode and generation). Zero means "not known".
type CgroupID uint64

// String gives the decimal form, as in the inode column of `ls -i`.
func (id CgroupID) String() string { return strconv.FormatUint(uint64(id), 10) }

// NetnsCookie is the id of a network namespace as SO_NETNS_COOKIE (Linux 5.14)
// gives it: never reused while the kernel runs. Zero means "not known".
type NetnsCookie uint64

// NetnsInode is the inode number of a network namespace's nsfs file, as in
// /proc/PID/ns/net. The kernel reuses it once the namespace is gone, so it
// identifies a namespace only while somebody is known to hold it.
type NetnsInode uint32

// PodUID names a pod: metadata.uid in Kubernetes, lower case, with dashes. For
// a static pod it is the kubelet's hash of the manifest, 32 hex digits.
type PodUID string

// Connection is what the kernel's hooks recorded when a connection to the
// agent was opened. Every field is the kernel's; none can be chosen by the
// workload.
type Connection struct {
	// TaskCgroup is the cgroup of the task that called connect.
	TaskCgroup CgroupID
	// SocketCgroup is the cgroup of the task that created the socket. It
	// differs from TaskCgroup when the descriptor was passed between pods, or
	// when another task (an io_uring thread) connected on behalf of the owner.
	SocketCgroup CgroupID
	// NetnsCookie and NetnsInode are the client socket's network namespace.
	NetnsCookie NetnsCookie
	NetnsInode  NetnsInode
	// SocketCookie is the client socket's (SO_COOKIE), never reused.
	SocketCookie uint64
	// TGID is the connecting process, in the initial pid namespace. For people
	// and audit only: it can be reused.
	TGID uint32
	// UID is the connecting task's, in the initial user namespace.
	UID uint32
	// Connected is when connect was called, on the kernel's monotonic clock.
	Connected time.Duration
}

// Finding is what a connection's evidence resolved to.
type Finding uint8

const (
	// FindingNone: the kernel recorded nothing for this connection, or what it
	// recorded can no longer be resolved. Uncertain, so never a final answer.
	FindingNone Finding = iota
	// FindingPod: task and socket belong to one pod.
	FindingPod
	// FindingContradictory: the evidence names two pods, or a pod and the
	// network namespace of another.
	FindingContradictory
	// FindingNotPod: the connection was opened outside every pod.
	FindingNotPod
)

// String is the value used in logs, metrics and JSON.
func (f Finding) String() string {
	switch f {
	case FindingNone:
		return "none"
	case FindingPod:
		return "pod"
	case FindingContradictory:
		return "contradictory"
	case FindingNotPod:
		return "not_pod"
	}
	return "finding_" + strconv.Itoa(int(f))
}

// Attestation is a connection's evidence, resolved.
type Attestation struct {
	Finding Finding
	// Pod is set for FindingPod only.
	Pod PodUID
	// Reason says why the finding is not FindingPod; empty if it is.
	Reason Reason
	// UnknownNetns: the network namespace is none that the node knows (nested
	// containers, a sandbox just re-created). Accepted, and counted.
	UnknownNetns bool
	// Connection is what the kernel recorded; zero for FindingNone without any
	// record. For people and audit.
	Connection Connection
}

// Subject is who a token speaks for: a pod and its service account.
type Subject struct {
	PodUID         PodUID
	Namespace      string
	ServiceAccount string
}

// Token is what the service-account token of one request says, after
// verification if Verified, else as claimed.
type Token struct {
	Subject Subject
	// PodName and Node are the token's, for people; Node is empty on tokens of
	// Kubernetes before 1.30.
	PodName string
	Node    string
	// ServiceAccountUID and NodeUID are those objects' metadata.uid; empty if the
	// token names none.
	ServiceAccountUID string
	NodeUID           string
	// ID is equal for every spelling of the same token. It is a hash and gives
	// the token away to nobody.
	ID [32]byte
	// JTI is the token's own id (claim jti), empty on old clusters. Not secret.
	JTI string
	// Expiry is claim exp.
	Expiry time.Time
	// Verified: the signature was checked against the cluster's own keys. If
	// false, only the upstream can tell whether the token is genuine.
	Verified bool
}
