// SPDX-License-Identifier: Apache-2.0

// Package bpf holds the BPF programs and, generated from them by bpf2go, the
// Go types that load them. The objects are embedded; `make generate` makes
// them anew and needs clang and libbpf's headers.
package bpf

//go:generate go tool bpf2go -cc clang -cflags "-O2 -g -Wall -Wextra -Werror -mcpu=v2 -fdebug-prefix-map=$PWD=." -target bpfel -type evidence -type client -type handshake -type peers -type ring -type event -type siphash_key Attribution attribution.bpf.c
