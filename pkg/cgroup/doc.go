// SPDX-License-Identifier: Apache-2.0

// Package cgroup turns a cgroup v2 id, which the kernel recorded, into a
// directory, and a directory into the pod it belongs to.
//
// Precedence of evidence, in one sentence: the kernel makes the id, the kubelet
// makes the pod-level directory, the workload may make everything below it. So
// a pod is always the outermost one on the path, a direct child of the node's
// kubepods root or of one of the root's QoS directories, and no deeper name is
// ever more than a label for people.
//
// Only cgroup v2 is read. On a hybrid node that is the mount of the unified
// hierarchy beside the v1 controllers.
package cgroup

import "errors"

// Sentinels. Every error of this package wraps at most one of them.
var (
	// ErrNoCgroup2: no usable cgroup2 mount is visible.
	ErrNoCgroup2 = errors.New("no cgroup v2 mount found: boot the node with systemd.unified_cgroup_hierarchy=1, " +
		"or mount it (mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified); in a container, mount the host's /sys/fs/cgroup")

	// ErrMountinfo: a mountinfo file does not have the form of proc(5).
	ErrMountinfo = errors.New("malformed mountinfo")

	// ErrNotCgroup2: the directory exists but is not on the cgroup2 mount.
	ErrNotCgroup2 = errors.New("not a cgroup v2 directory")

	// ErrGone: the cgroup does not exist any more. An id that is gone stays
	// gone, but whose it was cannot be told, so it is no final answer about a
	// connection.
	ErrGone = errors.New("cgroup is gone")

	// ErrOutside: the cgroup exists but is not below the mount's root. The
	// mount is that of a container, or a bind mount of a part of the tree.
	ErrOutside = errors.New("cgroup is outside the cgroup v2 mount")

	// ErrNotPod: the path is not inside any pod of this node's kubepods root.
	ErrNotPod = errors.New("cgroup is not in a pod")

	// ErrPath: the text is not a canonical absolute cgroup path, so nothing
	// can be said of it.
	ErrPath = errors.New("malformed cgroup path")

	// ErrNoRoot: no kubepods directory is known.
	ErrNoRoot = errors.New("no kubepods cgroup found: is the kubelet running? " +
		"If the agent runs in a pod, let it see the host's cgroups; else name the directory with --cgroup-root")

	// ErrAmbiguousRoot: more than one kubepods directory could be the node's.
	// Guessing would let one of them speak for the other's pods.
	ErrAmbiguousRoot = errors.New("several kubepods cgroups found, name the node's own with --cgroup-root")

	// ErrSearchLimit: the tree has more directories than a search looks at.
	ErrSearchLimit = errors.New("cgroup tree too large to search, name the kubepods directory with --cgroup-root")
)
