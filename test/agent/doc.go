// SPDX-License-Identifier: Apache-2.0

// Package agent tests the agent's whole program from outside, as a person on
// call would look at it: on a node of its own (package rig), with real pods,
// real clients and the real kernel. Only EKS Auth is a stand-in.
//
// There is one test for each promise. The tests need root, BTF and cgroup v2:
//
//	go test -race -tags privileged ./test/agent
//
// The program is built once, with the race detector; what it writes is searched
// for races and panics at the end of each of its lives. On a machine without a
// toolchain, LATCHKEY_AGENT names a program that was built elsewhere, with the
// CLI, latchkey, beside it.
package agent
