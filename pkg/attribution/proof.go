// SPDX-License-Identifier: Apache-2.0

//go:build proof

package attribution

import (
	"fmt"
	"os"

	"github.com/cilium/ebpf"

	"github.com/latchkey-dev/latchkey/bpf"
)

// A proof build is for tests that show what a protection is for: with the one
// that LATCHKEY_PROOF_OFF names turned off, the attack it stops must succeed.
// No release is built with the tag; without it none of this is compiled.

// proofBit is the programs' bit of a protection (PROOF_… in bpf/latchkey.h), 0
// for the protections of other packages.
func proofBit(name string) uint32 {
	switch name {
	case "nonce":
		return 1
	case "peer_tuple":
		return 2
	case "consume_once":
		return 4
	case "pod_bound":
		return 8
	case "agent_netns":
		return 16
	}
	return 0
}

func configureProof(spec *ebpf.CollectionSpec) error {
	if err := spec.Variables[bpf.AttributionVarProofOff].Set(proofBit(os.Getenv("LATCHKEY_PROOF_OFF"))); err != nil {
		return fmt.Errorf("set %s: %w", bpf.AttributionVarProofOff, err)
	}
	return nil
}

// proofNotice makes such a build say so wherever it tells how it works.
func proofNotice() []string {
	return []string{fmt.Sprintf("PROOF BUILD, FOR TESTS ONLY: protection off: %q", os.Getenv("LATCHKEY_PROOF_OFF"))}
}
