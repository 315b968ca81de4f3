// SPDX-License-Identifier: Apache-2.0

// Package bpf holds the BPF programs and, generated from them by bpf2go, the
// Go types that load them. The objects are embedded; `make generate` makes
// them anew and needs clang and libbpf's headers.
package bpf

//go:generate go tool bpf2go -cc clang -cflags "-O2 -g -Wall -Wextra -Werror -mcpu=v2 -fdebug-prefix-map=$PWD=." -target bpfel -tags "!proof" -type evidence -type client -type handshake -type peers -type ring -type event -type siphash_key Attribution attribution.bpf.c

// The second object is for the build tag proof alone: test/attacks turns one
// protection of it off at a time. No release is built with that tag.
//go:generate go tool bpf2go -cc clang -cflags "-O2 -g -Wall -Wextra -Werror -mcpu=v2 -DLATCHKEY_PROOF -fdebug-prefix-map=$PWD=." -target bpfel -tags proof -output-stem attributionproof -type evidence -type client -type handshake -type peers -type ring -type event -type siphash_key Attribution attribution.bpf.c
