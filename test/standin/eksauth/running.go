// SPDX-License-Identifier: Apache-2.0

package eksauth

import (
	"net"

	"github.com/latchkey-dev/latchkey/test/standin/wire"
)

// Running is a stand-in that listens.
type Running struct {
	*Server
	*wire.Endpoint
}

// Start makes a stand-in that listens on a free port of the loopback address.
func Start(cfg Config) (*Running, error) {
	s, err := New(cfg)
	if err != nil {
		return nil, err
	}
	ln, err := wire.Listen()
	if err != nil {
		return nil, err
	}
	return s.Serve(ln), nil
}

// Serve answers on a listener, in the background, until Close.
func (s *Server) Serve(ln net.Listener) *Running { return &Running{s, wire.Serve(ln, s)} }
