// SPDX-License-Identifier: Apache-2.0

// Package attacks answers one question with programs: can pod A pass as pod B?
//
// Each attack is a small program that runs in the attacker's pod, and a test
// that says what it does, what must come of it ([Outcome]), and that the victim
// and a quiet neighbour get their credentials all the same. The node is a test
// node; the agent is the one that ships, in enforce mode.
//
// Attackers hold a copy of the victim's token throughout: the question is what
// it is worth to them.
//
// A suite that cannot fail proves nothing. The tests of proof_privileged_test.go
// turn one protection of the agent off and demand that its attack succeeds then.
package attacks

// Outcome is what must come of an attack.
type Outcome string

// The outcomes of docs/threat-model.md.
const (
	// Refused: the agent got the request, and gave nothing.
	Refused Outcome = "refused"
	// ServedAsTruePod: the attacker's connection counts as the attacker's pod,
	// so that its own token is good on it and the victim's is not.
	ServedAsTruePod Outcome = "served as the true pod"
	// NeverReachesTheAgent: the kernel already says no, or the packets go
	// nowhere.
	NeverReachesTheAgent Outcome = "never reaches the agent"
	// OutOfScope: it works, because whoever can do this can do the same
	// without Latchkey. The test says why, and shows what happens.
	OutOfScope Outcome = "out of scope"
)
