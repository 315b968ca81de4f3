// SPDX-License-Identifier: Apache-2.0

//go:build linux && privileged

package agent

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/test/rig"
	"github.com/latchkey-dev/latchkey/test/standin/tokens"
	"github.com/latchkey-dev/latchkey/test/testnode"
)

// reply is what came back to bytes that were written as they are.
type reply struct {
	rig.Answer
	// head is the response's, as sent; raw is everything.
	head, raw string
	// closed: the server closed the connection afterwards.
	closed bool
}

// exchange writes bytes and reads one response. A connection that is closed
// without one gives status 0.
func exchange(t *testing.T, conn *rig.Conn, send string) (out reply) {
	t.Helper()
	must(t, conn.SetDeadline(time.Now().Add(patience)))
	// What is too long may be cut off while it is written.
	_, werr := io.WriteString(conn.Conn, send)
	var seen bytes.Buffer
	r := bufio.NewReader(io.TeeReader(conn.Conn, &seen))
	method, _, _ := strings.Cut(send, " ")
	resp, err := http.ReadResponse(r, &http.Request{Method: method})
	if err != nil {
		if werr == nil && seen.Len() > 0 && !strings.HasPrefix(seen.String(), "HTTP/") {
			t.Errorf("not an HTTP response: %q", seen.String())
		}
		out.raw, out.closed = seen.String(), true
		return out
	}
	body, err := io.ReadAll(resp.Body)
	must(t, err)
	out.Status, out.Header, out.Body = resp.StatusCode, resp.Header, string(body)
	out.head, _, _ = strings.Cut(seen.String(), "\r\n\r\n")
	if resp.Close {
		_, err := r.ReadByte()
		out.closed = err != nil
	}
	out.raw = seen.String()
	return out
}

// request is one that a client could send.
func request(method, path, host, token string, more ...string) string {
	// As people's tools do: refusals come as text.
	lines := append([]string{method + " " + path + " HTTP/1.1", "Host: " + host}, more...)
	if !slices.ContainsFunc(more, func(l string) bool { return strings.HasPrefix(l, "Accept:") }) {
		// As people's tools do: refusals come as text.
		lines = append(lines, "Accept: */*")
	}
	if token != "" {
		lines = append(lines, "Authorization: "+token)
	}
	return strings.Join(lines, "\r\n") + "\r\n\r\n"
}

// Whatever a pod sends as a token, the answer is the contract's and says what is
// wrong; EKS Auth is not bothered, and nobody else notices.
func TestPrivilegedBadTokens(t *testing.T) {
	w := sharedWorld(t)
	p, quiet := w.newPod(t, testnode.PodConfig{}), w.newPod(t, testnode.PodConfig{})
	wantCredentials(t, askFrom(t, quiet.Place(), rig.Host4, quiet.Token), quiet)
	neighbour := w.quietNeighbour(t, quiet)
	calls := w.EKSAuth.CallCount()

	claims := w.Claims(p.Pod.Pod)
	with := func(change func(*tokens.Claims)) string {
		c := claims
		change(&c)
		return w.Signer.Token(c)
	}
	stranger, err := tokens.NewSigner(tokens.Config{Algorithm: "ES256"})
	must(t, err)
	payload := w.Signer.Payload(claims)
	header := func(alg string) []byte {
		return w.Signer.Header(tokens.Claims{Header: map[string]any{"alg": alg}})
	}
	hour := time.Hour
	const (
		unparsable = "Service account token cannot be parsed: "
		unclaimed  = "Service account token failed basic claim validations: "
		unverified = "Service account token cannot be verified: "
	)
	c := newClient(t, p.Place())
	for _, tt := range []struct {
		name, token, text string
	}{
		{"none", "", "Service account token cannot be empty"},
		{"garbage", "garbage", unparsable},
		{"three times nothing", "..", unparsable},
		{"not base64", "a!.b!.c!", unparsable},
		{"not JSON", "YWJj.YWJj.YWJj", unparsable},
		{"Bearer", "Bearer " + p.Token, unparsable},
		{"cut short", p.Token[:len(p.Token)-20], "Service account token cannot be "},
		{"alg none", tokens.Assemble(header("none"), payload, nil), unparsable},
		{"alg none with a signature", tokens.Assemble(header("none"), payload, []byte("signature")), unparsable},
		{"HS256 with the public key", tokens.SignHMAC(header("HS256"), payload, w.Signer.PEM()), unparsable},
		{"RS256 claimed for an ES256 key", with(func(c *tokens.Claims) { c.Header = map[string]any{"alg": "RS256"} }), unparsable},
		{"a foreign key", stranger.Token(claims), unverified},
		{"a foreign key under this cluster's kid", stranger.Token(tokens.Claims{Namespace: claims.Namespace, ServiceAccount: claims.ServiceAccount,
			Pod: claims.Pod, PodUID: claims.PodUID, Header: map[string]any{"kid": w.Signer.KeyID()}}), unverified},
		{"expired", with(func(c *tokens.Claims) { c.IssuedAt, c.Expiry = time.Now().Add(-2*hour), time.Now().Add(-hour) }), unclaimed + "token is expired"},
		{"of the future", with(func(c *tokens.Claims) { c.IssuedAt = time.Now().Add(hour) }), unclaimed + "token is not valid yet"},
		{"a foreign audience", with(func(c *tokens.Claims) { c.Audience = "sts.amazonaws.com" }), unclaimed},
		{"a foreign issuer", with(func(c *tokens.Claims) { c.Issuer = "https://elsewhere.example" }), unclaimed},
		{"bound to no pod", with(func(c *tokens.Claims) { c.NoPod = true }), unclaimed},
		{"of a user", with(func(c *tokens.Claims) { c.Set = map[string]any{"sub": "admin"} }), ""},
		{"with another key offered", with(func(c *tokens.Claims) { c.Header = map[string]any{"jku": "http://169.254.169.254/"} }), unparsable},
		{"17 KiB", "a.b." + strings.Repeat("c", 17<<10), unparsable},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, address := range []string{rig.Host4, rig.Host6} {
				conn := c.dial(address)
				defer conn.Close()
				got := exchange(t, conn, request("GET", rig.Path, hostOf(address), tt.token))
				wantRefusal(t, got.Answer, 400, tt.text)
				if ct := got.Header.Get("Content-Type"); ct != "text/plain; charset=utf-8" {
					t.Errorf("Content-Type %q", ct)
				}
				if tt.token != "" && len(tt.token) > 40 && strings.Contains(got.Body, tt.token[len(tt.token)-20:]) {
					t.Error("the answer quotes the token")
				}
			}
			// SDKs that read JSON get code and message in both spellings.
			conn := c.dial(rig.Host4)
			defer conn.Close()
			got := exchange(t, conn, request("GET", rig.Path, rig.Host4, tt.token, "Accept: application/json"))
			var both map[string]string
			if err := json.Unmarshal([]byte(got.Body), &both); err != nil {
				t.Fatalf("%v in %q", err, got.Body)
			}
			if got.Status != 400 || both["code"] == "" || both["code"] != both["Code"] || both["message"] != both["Message"] ||
				!strings.Contains(both["message"], tt.text) {
				t.Errorf("%d %s", got.Status, got.Body)
			}
		})
	}
	// On one connection, a bad token spoils nothing for the good one.
	kept := c.dial(rig.Host4)
	wantRefusal(t, ask(t, kept, "garbage"), 400, unparsable)
	neighbour.wasServed(t)
	if n := w.EKSAuth.CallCount() - calls; n != 0 {
		t.Errorf("EKS Auth was asked %d times for tokens that this node can refuse", n)
	}
	wantCredentials(t, ask(t, kept, p.Token), p)
}

// Requests of every shape: the contract's status, never a panic, never a
// neighbour's loss.
func TestPrivilegedBadRequests(t *testing.T) {
	w := sharedWorld(t)
	p, quiet := w.newPod(t, testnode.PodConfig{}), w.newPod(t, testnode.PodConfig{})
	wantCredentials(t, askFrom(t, p.Place(), rig.Host4, p.Token), p)
	wantCredentials(t, askFrom(t, quiet.Place(), rig.Host4, quiet.Token), quiet)
	neighbour := w.quietNeighbour(t, quiet)
	noise := make([]byte, 8<<10)
	_, _ = rand.Read(noise)
	const host = "169.254.170.23"
	const invalid = "Access Denied. Called agent through invalid address, please use either "
	c := newClient(t, p.Place())
	for _, tt := range []struct {
		name, send string
		status     int // 0: closed without an answer will do as well
		text       string
	}{
		// Who may be asked, and how.
		{"Host with port", request("GET", rig.Path, host+":80", p.Token), 200, ""},
		{"Host of IPv6", request("GET", rig.Path, "[fd00:ec2::23]:80", p.Token), 200, ""},
		{"Host of IPv6 without brackets", request("GET", rig.Path, "fd00:ec2::23", p.Token), 200, ""},
		{"query", request("GET", rig.Path+"?x=y", host, p.Token), 200, ""},
		{"POST", request("POST", rig.Path, host, p.Token, "Content-Length: 0"), 200, ""},
		{"POST with a body", request("POST", rig.Path, host, p.Token, "Content-Length: 3") + "abc", 200, ""},
		{"PUT", request("PUT", rig.Path, host, p.Token, "Content-Length: 0"), 200, ""},
		{"DELETE", request("DELETE", rig.Path, host, p.Token), 200, ""},
		{"HTTP/1.0", "GET " + rig.Path + " HTTP/1.0\r\nHost: " + host + "\r\nAuthorization: " + p.Token + "\r\n\r\n", 200, ""},
		{"wrong Host", request("GET", rig.Path, "credentials.example", p.Token), 403, invalid},
		{"Host of the instance metadata service", request("GET", rig.Path, "169.254.169.254", p.Token), 403, invalid},
		{"Host as a number", request("GET", rig.Path, "2852039191", p.Token), 403, invalid},
		{"localhost", request("GET", rig.Path, "localhost", p.Token), 403, invalid},
		{"no Host", "GET " + rig.Path + " HTTP/1.1\r\nAuthorization: " + p.Token + "\r\n\r\n", 400, ""},
		{"root", request("GET", "/", host, p.Token), 404, "404 page not found"},
		{"trailing slash", request("GET", rig.Path+"/", host, p.Token), 404, "404 page not found"},
		{"upward path", request("GET", "/x/.."+rig.Path, host, p.Token), 404, "404 page not found"},
		{"doubled slash", request("GET", "/"+rig.Path, host, p.Token), 404, "404 page not found"},
		{"escaped", request("GET", "/v1/%63redentials", host, p.Token), 404, "404 page not found"},
		{"a path of the instance metadata service", request("GET", "/latest/meta-data/iam/security-credentials/", host, ""), 404, "404 page not found"},
		// What is not quite HTTP.
		{"HTTP/0.9", "GET " + rig.Path + "\r\n\r\n", 400, ""},
		{"HTTP/2 preface", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, ""},
		{"HTTP/9", "GET " + rig.Path + " HTTP/9.9\r\nHost: " + host + "\r\n\r\n", 505, ""},
		{"TLS", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + string(noise[:512]) + "\r\n\r\n", 400, ""},
		{"noise", string(noise) + "\r\n\r\n", 0, ""},
		{"no method", " / HTTP/1.1\r\nHost: " + host + "\r\n\r\n", 0, ""},

		{"negative length", request("POST", rig.Path, host, p.Token, "Content-Length: -1"), 400, ""},
		{"two lengths", request("POST", rig.Path, host, p.Token, "Content-Length: 3", "Content-Length: 4") + "abcd", 400, ""},
		{"body beyond measure", request("POST", rig.Path, host, p.Token, "Content-Length: 99999999"), 413, ""},
		// Too much of it.
		{"a header of 25 KiB", request("GET", rig.Path, host, p.Token, "X: "+strings.Repeat("x", 25<<10)), 431, ""},
		{"a token of 1 MB", request("GET", rig.Path, host, strings.Repeat("x", 1<<20)), 431, ""},
		{"a path of 64 KiB", request("GET", "/"+strings.Repeat("x", 64<<10), host, p.Token), 431, ""},
		{"10,000 headers", request("GET", rig.Path, host, p.Token, strings.Repeat("X: y\r\n", 10000)+"X: y"), 431, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			conn := c.dial(rig.Host4)
			defer conn.Close()
			got := exchange(t, conn, tt.send)
			switch {
			case tt.status == 200:
				wantCredentials(t, got.Answer, p)
			case tt.status != 0:
				wantRefusal(t, got.Answer, tt.status, tt.text)
			case got.Status == 200 || strings.Contains(got.raw, "standin"):
				t.Errorf("served: %q", got.raw)
			}
			if got.Status >= 400 && got.Status != 404 && strings.Contains(got.raw, p.Token[len(p.Token)-20:]) {
				t.Error("the answer quotes the token")
			}
		})
	}
	t.Run("HEAD", func(t *testing.T) {
		conn := c.dial(rig.Host4)
		defer conn.Close()
		got := exchange(t, conn, request("HEAD", rig.Path, host, p.Token))
		if got.Status != 200 || got.Body != "" || got.Header.Get("Content-Length") == "0" {
			t.Errorf("%+v", got.Answer)
		}
		// What follows on the connection is the next answer, not a body.
		if got := exchange(t, conn, request("GET", rig.Path, host, p.Token)); got.Status != 200 {
			t.Errorf("after it: %d", got.Status)
		}
	})
	t.Run("several at once", func(t *testing.T) {
		conn := c.dial(rig.Host4)
		defer conn.Close()
		must(t, conn.SetDeadline(time.Now().Add(patience)))
		one := request("GET", rig.Path, host, p.Token)
		_, err := io.WriteString(conn.Conn, one+request("GET", "/", host, p.Token)+one)
		must(t, err)
		r := bufio.NewReader(conn.Conn)
		for i, want := range []int{200, 404, 200} {
			resp, err := http.ReadResponse(r, nil)
			must(t, err)
			_, _ = io.Copy(io.Discard, resp.Body)
			if resp.StatusCode != want {
				t.Errorf("answer %d: %d, want %d", i, resp.StatusCode, want)
			}
		}
	})
	t.Run("gone in the middle", func(t *testing.T) {
		whole := request("GET", rig.Path, host, p.Token)
		for _, n := range []int{0, 1, 10, len(whole) / 2, len(whole) - 1, len(whole)} {
			conn := c.dial(rig.Host4)
			_, err := io.WriteString(conn.Conn, whole[:n])
			must(t, err)
			must(t, conn.Close())
		}
	})
	// Still there, still good, and no poorer.
	wantCredentials(t, c.ask(rig.Host4, p.Token), p)
	wantCredentials(t, c.ask(rig.Host6, p.Token), p)
	neighbour.wasServed(t)
	eventually(t, func() error {
		// The neighbour has gone; nobody else is asking.
		if n := w.metric(t, "latchkey_connections"); n > 2 {
			return fmt.Errorf("%g connections stay open", n)
		}
		return nil
	})
}
