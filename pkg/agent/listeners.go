// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/pkg/adminapi"
	"github.com/latchkey-dev/latchkey/pkg/credserver"
)

// ErrAddressInUse: another process answers on the address and port, most likely
// another agent.
var ErrAddressInUse = errors.New("address in use")

// listeners keeps one credential listener per bind host. Each is opened when
// its address can be bound, and again if it is lost; none waits for another.
type listeners struct {
	server *credserver.Server
	log    *slog.Logger
	m      *metrics

	mu    sync.Mutex
	state map[netip.AddrPort]*listener
	order []netip.AddrPort
	wg    sync.WaitGroup
}

type listener struct {
	serving bool
	err     error
}

func newListeners(server *credserver.Server, hosts []netip.Addr, port uint16, log *slog.Logger, m *metrics) *listeners {
	l := &listeners{server: server, log: log, m: m, state: map[netip.AddrPort]*listener{}}
	for _, h := range hosts {
		at := netip.AddrPortFrom(h, port)
		l.order = append(l.order, at)
		l.state[at] = &listener{err: errors.New("not tried yet")}
		m.serving.WithLabelValues(at.String()).Set(0)
	}
	return l
}

// open tries every address that is not served. It returns ErrAddressInUse for
// those that another process holds; addresses that are merely absent are left
// for a later call.
func (l *listeners) open(ctx context.Context) error {
	var inUse []error
	for _, at := range l.order {
		l.mu.Lock()
		s := l.state[at]
		if s.serving {
			l.mu.Unlock()
			continue
		}
		ln, err := credserver.Listen(ctx, at)
		changed := err != nil && (s.err == nil || s.err.Error() != err.Error())
		s.serving, s.err = err == nil, err
		l.mu.Unlock()
		l.m.serving.WithLabelValues(at.String()).Set(bool01(err == nil))
		switch {
		case err == nil:
			l.log.Info("serving credentials", "address", at.String())
			l.wg.Go(func() { l.serve(at, ln) })
		case errors.Is(err, unix.EADDRINUSE):
			inUse = append(inUse, addressInUse(at))
		case changed:
			l.log.Warn("cannot serve credentials on this address; trying again", "address", at.String(), "error", err)
		}
	}
	return errors.Join(inUse...)
}

func (l *listeners) serve(at netip.AddrPort, ln net.Listener) {
	err := l.server.Serve(ln)
	l.mu.Lock()
	defer l.mu.Unlock()
	if err == nil {
		err = errors.New("stopped")
	}
	l.state[at].serving, l.state[at].err = false, err
	l.m.serving.WithLabelValues(at.String()).Set(0)
}

// keep opens what is missing until ctx ends: when told to, and every so often.
func (l *listeners) keep(ctx context.Context, nudge <-chan struct{}) {
	const interval = 5 * time.Second
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		select {
		case <-nudge:
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
		if err := l.open(ctx); err != nil {
			l.log.Error("cannot serve credentials on an address; trying again", "error", err)
		}
	}
}

func (l *listeners) serving() []netip.AddrPort {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []netip.AddrPort
	for _, at := range l.order {
		if l.state[at].serving {
			out = append(out, at)
		}
	}
	return out
}

func (l *listeners) list() []adminapi.Listener {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := make([]adminapi.Listener, 0, len(l.order))
	for _, at := range l.order {
		s := l.state[at]
		e := ""
		if !s.serving && s.err != nil {
			e = s.err.Error()
		}
		out = append(out, adminapi.Listener{Address: at.String(), Serving: s.serving, Error: e})
	}
	return out
}
