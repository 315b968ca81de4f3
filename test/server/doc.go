// SPDX-License-Identifier: Apache-2.0

// Package server tests the latchkey-server program from the outside: the built
// program, its command line and its wire, with clients that nobody here wrote.
//
// The AWS SDK for Go is a Go module, so its tests run anywhere. The JavaScript
// SDK and the AWS CLI must be installed (scripts/setup): those tests are
// privileged ones. LATCHKEY_SERVER names a program to test instead of one that
// is built; LATCHKEY_KILLS says how often to kill it (200 is the promise).
package server
