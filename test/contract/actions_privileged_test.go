// SPDX-License-Identifier: Apache-2.0

//go:build linux && privileged

package contract

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/latchkey-dev/latchkey/test/clients"
	"github.com/latchkey-dev/latchkey/test/rig"
	"github.com/latchkey-dev/latchkey/test/testnode"
)

// actions are what runs in pods.
func actions() testnode.Actions {
	return testnode.Actions{
		"fetch":  func(*testnode.Session, json.RawMessage) (any, error) { return clients.Fetch(context.Background()), nil },
		"steady": action(steady),
		"flood":  action(flood),
		"crowd":  action(crowd),
		"idle":   action(idle),
		"drip":   action(drip),
		"rude":   action(rude),
	}
}

func action[A, R any](f func(*testnode.Session, A) (R, error)) testnode.Action {
	return func(s *testnode.Session, raw json.RawMessage) (any, error) {
		var args A
		if err := json.Unmarshal(raw, &args); err != nil {
			return nil, err
		}
		return f(s, args)
	}
}

// request is a credential request as an SDK sends it; headers are lines.
func request(token string, headers ...string) string {
	head := "GET " + rig.Path + " HTTP/1.1\r\nHost: 169.254.170.23\r\nAccept: application/json\r\n"
	if token != "" {
		head += "Authorization: " + token + "\r\n"
	}
	for _, h := range headers {
		head += h + "\r\n"
	}
	return head + "\r\n"
}

// tally counts answers.
type tally struct {
	Asked, OK int
	// Other counts statuses that are not 200, and errors.
	Other map[string]int
}

func (t *tally) count(status int, err error) {
	t.Asked++
	what := fmt.Sprint(status)
	switch {
	case err == nil && status == http.StatusOK:
		t.OK++
		return
	case err != nil:
		what = err.Error()
	}
	if t.Other == nil {
		t.Other = map[string]int{}
	}
	t.Other[what]++
}

func (t *tally) add(u tally) {
	t.Asked += u.Asked
	t.OK += u.OK
	for k, n := range u.Other {
		if t.Other == nil {
			t.Other = map[string]int{}
		}
		t.Other[k] += n
	}
}

// exchange makes one request on a connection and reads the answer to its end.
func exchange(c net.Conn, br *bufio.Reader, head string) (int, string, error) {
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		return 0, "", err
	}
	if _, err := io.WriteString(c, head); err != nil {
		return 0, "", err
	}
	return readAnswer(br)
}

func readAnswer(br *bufio.Reader) (int, string, error) {
	resp, err := http.ReadResponse(br, nil)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(body), err
}

type steadyArgs struct {
	Token    string
	Requests int
}

// steady asks as a well-behaved client: one connection for each request, a
// little apart.
func steady(_ *testnode.Session, a steadyArgs) (t tally, _ error) {
	for range a.Requests {
		c, err := net.Dial("tcp", rig.Host4)
		if err != nil {
			t.count(0, err)
			continue
		}
		status, _, err := exchange(c, bufio.NewReader(c), request(a.Token, "Connection: close"))
		t.count(status, err)
		c.Close()
		time.Sleep(5 * time.Millisecond)
	}
	return t, nil
}

type floodArgs struct {
	Token       string
	Connections int
	Requests    int // of each connection
}

// flood asks as fast as it can on several connections.
func flood(_ *testnode.Session, a floodArgs) (sum tally, _ error) {
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range a.Connections {
		wg.Go(func() {
			var t tally
			defer func() {
				mu.Lock()
				defer mu.Unlock()
				sum.add(t)
			}()
			var c net.Conn
			var br *bufio.Reader
			for range a.Requests {
				if c == nil {
					var err error
					if c, err = net.Dial("tcp", rig.Host4); err != nil {
						t.count(0, err)
						continue
					}
					br = bufio.NewReader(c)
				}
				status, _, err := exchange(c, br, request(a.Token))
				t.count(status, err)
				if err != nil {
					c.Close()
					c = nil
				}
			}
			if c != nil {
				c.Close()
			}
		})
	}
	wg.Wait()
	return sum, nil
}

type crowdArgs struct {
	Tokens []string // one request for each
	// GiveUp closes the connections this long after the requests were sent.
	GiveUp time.Duration
}

// crowdAnswer is one of crowd's.
type crowdAnswer struct {
	Status int
	Body   string
	Error  string
}

// crowd opens all connections first and then sends all requests at once.
func crowd(_ *testnode.Session, a crowdArgs) ([]crowdAnswer, error) {
	conns := make([]net.Conn, len(a.Tokens))
	for i := range conns {
		c, err := net.Dial("tcp", rig.Host4)
		if err != nil {
			return nil, err
		}
		defer c.Close()
		conns[i] = c
	}
	if a.GiveUp > 0 {
		for i, c := range conns {
			if _, err := io.WriteString(c, request(a.Tokens[i])); err != nil {
				return nil, err
			}
		}
		time.Sleep(a.GiveUp)
		return nil, nil
	}
	out := make([]crowdAnswer, len(conns))
	var wg sync.WaitGroup
	for i, c := range conns {
		wg.Go(func() {
			status, body, err := exchange(c, bufio.NewReader(c), request(a.Tokens[i]))
			out[i] = crowdAnswer{Status: status, Body: body}
			if err != nil {
				out[i].Error = err.Error()
			}
		})
	}
	wg.Wait()
	return out, nil
}

type idleArgs struct{ Connections int }

// idle opens connections and keeps them, without a word. Every second one has
// begun a request.
func idle(s *testnode.Session, a idleArgs) (opened int, _ error) {
	var kept []net.Conn
	var mu sync.Mutex
	var wg sync.WaitGroup
	const workers = 16
	for w := range workers {
		wg.Go(func() {
			for i := w; i < a.Connections; i += workers {
				c, err := net.DialTimeout("tcp", rig.Host4, 20*time.Second)
				if err != nil {
					continue
				}
				if i%2 == 0 {
					_, _ = io.WriteString(c, "GET /v1/cre")
				}
				mu.Lock()
				kept = append(kept, c)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	s.Values["idle"] = kept
	return len(kept), nil
}

type dripArgs struct {
	Connections int
	Token       string
}

// drip sends requests byte by byte on many connections until the server has
// enough of it, and returns how many connections it ended, and with what.
func drip(_ *testnode.Session, a dripArgs) (t tally, _ error) {
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range a.Connections {
		wg.Go(func() {
			status, err := dripOne(request(a.Token))
			mu.Lock()
			defer mu.Unlock()
			t.count(status, err)
		})
	}
	wg.Wait()
	return t, nil
}

func dripOne(head string) (int, error) {
	c, err := net.Dial("tcp", rig.Host4)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	answered := make(chan struct{})
	var status int
	go func() {
		defer close(answered)
		status, _, err = readAnswer(bufio.NewReader(c))
	}()
	for i := range len(head) - 4 { // never a whole head
		if _, werr := io.WriteString(c, head[i:i+1]); werr != nil {
			break
		}
		select {
		case <-answered:
			return status, err
		case <-time.After(100 * time.Millisecond):
		}
	}
	_ = c.SetReadDeadline(time.Now().Add(time.Minute))
	<-answered
	return status, err
}

type rudeArgs struct {
	Kind        string
	Connections int
	Token       string
}

// rude behaves badly on connections, one after the other, and returns what it
// was answered, if it listened.
func rude(_ *testnode.Session, a rudeArgs) (t tally, _ error) {
	for range a.Connections {
		status, err := rudeOne(a.Kind, a.Token)
		t.count(status, err)
	}
	return t, nil
}

func rudeOne(kind, token string) (int, error) {
	conn, err := net.Dial("tcp", rig.Host4)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	c := conn.(*net.TCPConn)
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		return 0, err
	}
	br := bufio.NewReader(c)
	whole := request(token)
	switch kind {
	case "reset at once", "reset in the head", "reset after the request":
		part := map[string]string{"reset at once": "", "reset in the head": whole[:len(whole)/2], "reset after the request": whole}[kind]
		if _, err := io.WriteString(c, part); err != nil {
			return 0, err
		}
		return 0, c.SetLinger(0) // Close sends a reset
	case "half-closed":
		if _, err := io.WriteString(c, whole); err != nil {
			return 0, err
		}
		if err := c.CloseWrite(); err != nil {
			return 0, err
		}
		status, _, err := readAnswer(br)
		return status, err
	case "half-closed in the head":
		if _, err := io.WriteString(c, whole[:len(whole)/2]); err != nil {
			return 0, err
		}
		if err := c.CloseWrite(); err != nil {
			return 0, err
		}
		if status, _, err := readAnswer(br); err == nil {
			return status, nil
		}
		return 0, nil // closed without a word is right too
	case "pipelined":
		const depth = 50
		go func() { _, _ = io.WriteString(c, strings.Repeat(whole, depth)) }()
		for i := range depth {
			status, body, err := readAnswer(br)
			if err != nil || status != http.StatusOK || !strings.Contains(body, "AccessKeyId") {
				return status, fmt.Errorf("answer %d of %d: %d %w", i, depth, status, err)
			}
		}
		return http.StatusOK, nil
	case "head of 1 MB", "header of 1 MB", "token of 1 MB":
		head := map[string]string{
			"head of 1 MB":   request(token, strings.Repeat("X-Filler: "+strings.Repeat("x", 90)+"\r\n", 10_000)+"X-End: 1"),
			"header of 1 MB": request(token, "X-Filler: "+strings.Repeat("x", 1<<20)),
			"token of 1 MB":  request(strings.Repeat("x", 1<<20)),
		}[kind]
		go func() { _, _ = io.WriteString(c, head) }()
		status, _, err := readAnswer(br)
		return status, err
	}
	return 0, errors.New("unknown kind of rudeness " + kind)
}
