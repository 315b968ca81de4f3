// SPDX-License-Identifier: Apache-2.0

//go:build proof

package pods

import "os"

// proofOff says whether a protection is turned off, so that a test can show that
// the attack which it stops succeeds then. No release is built with the tag.
func proofOff(protection string) bool { return os.Getenv("LATCHKEY_PROOF_OFF") == protection }
