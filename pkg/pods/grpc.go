// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strconv"
	"sync"
)

// grpcConn makes gRPC calls to a unix socket: HTTP/2 by net/http, and the
// framing of the protocol's document (github.com/grpc/grpc, PROTOCOL-HTTP2.md).
// One request message, any number of answers, no compression.
type grpcConn struct {
	transport *http.Transport
	headers   map[string]string

	mu     sync.Mutex
	conns  []net.Conn
	closed bool
}

// grpcNotFound is the status code of what does not exist.
const grpcNotFound = 5

// grpcError is a call's status other than OK.
type grpcError struct {
	code    int
	message string
}

func (e *grpcError) Error() string { return fmt.Sprintf("status %d: %s", e.code, e.message) }

// errGRPC: the other end does not speak gRPC, or broke off.
var errGRPC = errors.New("no valid gRPC answer")

// dialGRPC connects at the first call. The headers go with every call.
func dialGRPC(socket string, headers map[string]string) *grpcConn {
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	c := &grpcConn{headers: headers}
	c.transport = &http.Transport{
		Protocols:          &protocols,
		DisableCompression: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
			if err != nil {
				return nil, err
			}
			c.mu.Lock()
			defer c.mu.Unlock()
			if c.closed {
				conn.Close()
				return nil, net.ErrClosed
			}
			c.conns = append(c.conns, conn)
			return conn, nil
		},
		// What a list may have in flight; the default is 4 MiB a stream.
		HTTP2: &http.HTTP2Config{MaxReceiveBufferPerStream: 256 << 10, MaxReceiveBufferPerConnection: 1 << 20},
	}
	return c
}

// close ends all calls. The transport's own closing would leave a connection
// whose last call has just been cancelled.
func (c *grpcConn) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	for _, conn := range c.conns {
		conn.Close()
	}
}

// call makes one call and gives each message of its answer to f; the bytes are
// valid until f returns. It returns nil if the call ended with OK, f's error, a
// *grpcError, or what broke. sent, if not nil, is closed when the request is on
// its way: a server need not answer anything before its first message.
func (c *grpcConn) call(ctx context.Context, method string, request []byte, sent chan<- struct{}, f func([]byte) error) error {
	ctx, cancel := context.WithCancel(ctx) // ends the stream if f ends it
	defer cancel()
	if sent != nil {
		once := sync.OnceFunc(func() { close(sent) })
		ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{WroteRequest: func(i httptrace.WroteRequestInfo) {
			if i.Err == nil {
				once()
			}
		}})
	}
	body := binary.BigEndian.AppendUint32([]byte{0}, uint32(len(request)))
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://localhost"+method, bytes.NewReader(append(body, request...)))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/grpc")
	req.Header.Set("Te", "trailers")
	for k, v := range c.headers {
		req.Header.Set(k, v)
	}
	resp, err := c.transport.RoundTrip(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%w: HTTP status %d", errGRPC, resp.StatusCode)
	}
	if resp.Header.Get("Grpc-Status") != "" {
		return grpcStatus(resp.Header) // an answer of trailers only
	}
	var prefix [5]byte
	var buf []byte
	for {
		if _, err := io.ReadFull(resp.Body, prefix[:]); errors.Is(err, io.EOF) {
			return grpcStatus(resp.Trailer)
		} else if err != nil {
			return err
		}
		size := binary.BigEndian.Uint32(prefix[1:])
		if prefix[0] != 0 || size > maxMessage {
			return fmt.Errorf("%w: flags %d, %d bytes", errGRPC, prefix[0], size)
		}
		if int(size) > cap(buf) {
			buf = make([]byte, size)
		}
		buf = buf[:size]
		if _, err := io.ReadFull(resp.Body, buf); err != nil {
			return err
		}
		if err := f(buf); err != nil {
			return err
		}
	}
}

// grpcStatus reads how a call ended; nil is OK.
func grpcStatus(h http.Header) error {
	code, err := strconv.Atoi(h.Get("Grpc-Status"))
	if err != nil {
		return fmt.Errorf("%w: ended without a status", errGRPC)
	}
	if code == 0 {
		return nil
	}
	message := h.Get("Grpc-Message")
	if m, err := url.PathUnescape(message); err == nil {
		message = m
	}
	return &grpcError{code: code, message: text(message)}
}
