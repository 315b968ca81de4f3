// SPDX-License-Identifier: Apache-2.0

package sts

import "github.com/latchkey-dev/latchkey/test/standin/wire"

// Running is a stand-in that listens.
type Running struct {
	*Server
	*wire.Endpoint
}

// Start makes a stand-in that listens on a free port of the loopback address.
func Start(cfg Config) (*Running, error) {
	ln, err := wire.Listen()
	if err != nil {
		return nil, err
	}
	s := New(cfg)
	return &Running{s, wire.Serve(ln, s)}, nil
}
