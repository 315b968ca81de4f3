// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"github.com/valyala/fasthttp"
	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/test/rig"
	"github.com/latchkey-dev/latchkey/test/testnode"
)

// actions run in pods and on the node, in processes of their own.
func actions() testnode.Actions {
	return testnode.Actions{
		"bare":    action(bare),
		"sink":    action(sink),
		"paced":   action(paced),
		"crowd":   action(crowd),
		"hasty":   action(hasty),
		"fill":    action(fill),
		"connect": action(connect),
	}
}

func action[A, R any](f func(A) (R, error)) testnode.Action {
	return func(_ *testnode.Session, raw json.RawMessage) (any, error) {
		var args A
		if err := json.Unmarshal(raw, &args); err != nil {
			return nil, err
		}
		return f(args)
	}
}

type bareArgs struct {
	Body string
	// Delay before each answer.
	Delay time.Duration
}

// bare serves fixed bytes with the HTTP engine that the agent uses, and nothing
// else: what the engine alone costs. It goes on in the background.
func bare(a bareArgs) (struct{}, error) {
	lc := net.ListenConfig{KeepAlive: -1}
	lc.SetMultipathTCP(false)
	ln, err := lc.Listen(context.Background(), "tcp4", bareHost+":80")
	if err != nil {
		return struct{}{}, err
	}
	text := []byte(a.Body)
	srv := &fasthttp.Server{
		NoDefaultServerHeader: true, ReadBufferSize: 24 << 10,
		Handler: func(ctx *fasthttp.RequestCtx) {
			time.Sleep(a.Delay)
			ctx.Response.Header.SetContentType("application/json")
			ctx.Response.SetBodyRaw(text)
		},
	}
	go func() { _ = srv.Serve(ln) }()
	return struct{}{}, nil
}

// sink accepts and closes connections. It goes on in the background.
func sink(struct{}) (struct{}, error) {
	ln, err := net.Listen("tcp4", sinkHost+":80")
	if err != nil {
		return struct{}{}, err
	}
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	return struct{}{}, nil
}

func request(token, more string) string {
	return "GET " + rig.Path + " HTTP/1.1\r\nHost: 169.254.170.23\r\nAccept: application/json\r\n" + more + "Authorization: " + token + "\r\n\r\n"
}

func exchange(c net.Conn, head string) (int, error) {
	if _, err := io.WriteString(c, head); err != nil {
		return 0, err
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	return resp.StatusCode, err
}

type pacedArgs struct {
	Token    string
	Requests int
	Every    time.Duration
}

// pacedResult has the latencies of requests that succeeded, from connect to the
// answer's end.
type pacedResult struct {
	Latencies []time.Duration
	Failed    int
}

// paced asks at a steady rate, one connection for each request.
func paced(a pacedArgs) (r pacedResult, _ error) {
	next := time.Now()
	for range a.Requests {
		time.Sleep(time.Until(next))
		next = next.Add(a.Every)
		start := time.Now()
		status, err := func() (int, error) {
			c, err := net.DialTimeout("tcp", rig.Host4, 2*time.Second)
			if err != nil {
				return 0, err
			}
			defer c.Close()
			if err := c.SetDeadline(time.Now().Add(2 * time.Second)); err != nil {
				return 0, err
			}
			return exchange(c, request(a.Token, "Connection: close\r\n"))
		}()
		if err != nil || status != http.StatusOK {
			r.Failed++
			continue
		}
		r.Latencies = append(r.Latencies, time.Since(start))
	}
	return r, nil
}

type crowdArgs struct {
	Token   string
	Waiters int
}

type crowdResult struct {
	// First and Last answer's time of day.
	First, Last time.Time
	Statuses    map[int]int
}

// crowd opens all connections, then asks on all of them at once.
func crowd(a crowdArgs) (crowdResult, error) {
	r := crowdResult{Statuses: map[int]int{}}
	conns := make([]net.Conn, a.Waiters)
	for i := range conns {
		c, err := net.Dial("tcp", rig.Host4)
		if err != nil {
			return r, err
		}
		defer c.Close()
		conns[i] = c
	}
	var mu sync.Mutex
	var wg sync.WaitGroup
	head := request(a.Token, "")
	for _, c := range conns {
		wg.Go(func() {
			status, err := exchange(c, head)
			now := time.Now()
			if err != nil {
				status = 0
			}
			mu.Lock()
			defer mu.Unlock()
			r.Statuses[status]++
			if r.First.IsZero() || now.Before(r.First) {
				r.First = now
			}
			if now.After(r.Last) {
				r.Last = now
			}
		})
	}
	wg.Wait()
	return r, nil
}

type hastyArgs struct {
	Token    string
	Patience time.Duration
	Tries    int
}

// hasty asks, gives up after its patience, and tries again at once; it returns
// which try succeeded, 0 if none did.
func hasty(a hastyArgs) (int, error) {
	for try := range a.Tries {
		c, err := net.Dial("tcp", rig.Host4)
		if err != nil {
			return 0, err
		}
		_ = c.SetDeadline(time.Now().Add(a.Patience))
		status, err := exchange(c, request(a.Token, ""))
		c.Close()
		if err == nil && status == http.StatusOK {
			return try + 1, nil
		}
	}
	return 0, nil
}

// fill asks once with each token, on a few connections, and returns how many
// were served.
func fill(all []string) (int, error) {
	const workers = 8
	served := make([]int, workers)
	errs := make(chan error, workers)
	for w := range workers {
		go func() {
			c, err := net.Dial("tcp", rig.Host4)
			if err != nil {
				errs <- err
				return
			}
			defer c.Close()
			for i := w; i < len(all); i += workers {
				status, err := exchange(c, request(all[i], ""))
				if err != nil {
					errs <- err
					return
				}
				if status == http.StatusOK {
					served[w]++
				}
			}
			errs <- nil
		}()
	}
	sum := 0
	for range workers {
		if err := <-errs; err != nil {
			return 0, err
		}
	}
	for _, n := range served {
		sum += n
	}
	return sum, nil
}

type connectArgs struct {
	Address     netip.AddrPort
	Connections int
}

type connectResult struct{ Wall, CPU time.Duration }

// connect opens and closes connections, with as little as possible around the
// two system calls.
func connect(a connectArgs) (r connectResult, _ error) {
	to := &unix.SockaddrInet4{Port: int(a.Address.Port()), Addr: a.Address.Addr().As4()}
	before, start := usage(), time.Now()
	for i := range a.Connections {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return r, err
		}
		// A reset instead of a state that keeps the port for a minute.
		if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
			return r, err
		}
		if err := unix.Connect(fd, to); err != nil {
			return r, fmt.Errorf("connection %d: %w", i, err)
		}
		if err := unix.Close(fd); err != nil {
			return r, err
		}
	}
	return connectResult{time.Since(start), usage() - before}, nil
}

func usage() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
