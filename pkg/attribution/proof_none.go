// SPDX-License-Identifier: Apache-2.0

//go:build !proof

package attribution

import "github.com/cilium/ebpf"

// What follows does something in proof builds only; see proof.go.

func configureProof(*ebpf.CollectionSpec) error { return nil }

func proofNotice() []string { return nil }
