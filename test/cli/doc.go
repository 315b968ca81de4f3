// SPDX-License-Identifier: Apache-2.0

// Package cli tests the debug CLI as a program: on a node with a real agent,
// real cgroups, namespaces and kernel programs, its verbs must say what is true,
// name the cause of set-ups that are broken for real, refuse bad input with what
// was expected, and never show a token or a secret.
//
// The runs in docs/cli.md are recorded by the same tests: LATCHKEY_RECORD=1
// writes the file anew.
package cli
