// SPDX-License-Identifier: Apache-2.0

package server

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"testing"
	"time"
)

// Connections beyond the bounds are closed, and their places are free again when
// others end.
func TestConnectionsAreBounded(t *testing.T) {
	ln, err := listenTCP(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	bounded := newBoundedListener(ln, 4, 2)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	srv := newHTTPServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "ok") }))
	go func() { ended <- serveUntil(ctx, bounded, srv, time.Minute) }()
	defer func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if n := bounded.connections(); n != 0 || len(bounded.from) != 0 {
			t.Errorf("%d places are taken by nobody", n)
		}
	}()
	// ask reports whether a connection from a local address is served.
	ask := func(from string) (net.Conn, bool) {
		t.Helper()
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
		c, err := d.DialContext(t.Context(), "tcp", ln.Addr().String())
		if err != nil {
			return nil, false // reset before it was told
		}
		_ = c.SetDeadline(time.Now().Add(time.Minute))
		fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
		res, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			c.Close()
			return nil, false
		}
		_, _ = io.Copy(io.Discard, res.Body)
		res.Body.Close()
		t.Cleanup(func() { c.Close() })
		return c, true
	}
	first, ok := ask("127.0.0.1")
	if _, second := ask("127.0.0.1"); !ok || !second {
		t.Fatal("refused within the bounds")
	}
	if _, ok := ask("127.0.0.1"); ok {
		t.Error("a third of one address")
	}
	for range 2 {
		if _, ok := ask("127.0.0.2"); !ok {
			t.Error("another address is refused for the first one's")
		}
	}
	if _, ok := ask("127.0.0.3"); ok {
		t.Error("a fifth of all")
	}
	if n := bounded.refused.Load(); n != 2 {
		t.Errorf("%d refused", n)
	}
	first.Close()
	for late := time.Now().Add(time.Minute); bounded.connections() == 4; { // until the server has seen it
		if time.Now().After(late) {
			t.Fatal("the place is not given back")
		}
		time.Sleep(time.Millisecond)
	}
	if _, ok := ask("127.0.0.1"); !ok {
		t.Error("no place, though one was given back")
	}
}

func TestPlacesAreGivenBackOnce(t *testing.T) {
	l := newBoundedListener(nil, 2, 2)
	peer := netip.MustParseAddr("192.0.2.1")
	for i, want := range []bool{true, true, false} {
		if l.enter(peer) != want {
			t.Fatalf("connection %d: %v", i, !want)
		}
	}
	l.leave(peer)
	l.leave(peer)
	if l.connections() != 0 || len(l.from) != 0 {
		t.Errorf("%d open, of %d addresses", l.connections(), len(l.from))
	}
}
