// SPDX-License-Identifier: Apache-2.0

//go:build linux && privileged

package clients

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/test/testnode"
)

func TestMain(m *testing.M) {
	testnode.Main(testnode.Actions{
		"fetch": func(*testnode.Session, json.RawMessage) (any, error) {
			return Fetch(context.Background()), nil
		},
	})
	os.Exit(m.Run())
}

// serve opens the endpoint at address in the namespace.
func serve(t *testing.T, ns *testnode.Netns, address string) {
	t.Helper()
	var listener net.Listener
	if host := netip.MustParseAddrPort(address).Addr(); !host.IsLoopback() {
		if err := ns.AddLoopback(host); err != nil {
			t.Fatal(err)
		}
	}
	err := ns.Do(func() (err error) {
		listener, err = net.Listen("tcp", address)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(endpoint)}
	go server.Serve(listener)
	t.Cleanup(func() { server.Close() })
}

// js runs a JavaScript client in the place.
func js(ctx context.Context, t *testing.T, place testnode.Place, provider JSProvider) Result {
	t.Helper()
	argv, err := JS(provider)
	if err != nil {
		t.Fatal(err)
	}
	out, err := place.Command(ctx, argv...).Output()
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 1) {
		if exit != nil {
			t.Fatalf("%v: %s", err, exit.Stderr)
		}
		t.Fatal(err)
	}
	var got Result
	if err := json.Unmarshal(out, &got); err != nil {
		t.Fatalf("%v in %q", err, out)
	}
	if (err == nil) != (got.Error == "") {
		t.Errorf("exit status and report disagree: %v, %+v", err, got)
	}
	return got
}

// Every client reaches the well-known addresses from a pod.
func TestPrivilegedClients(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	node, err := testnode.New(ctx, testnode.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := node.Close(); err != nil {
			t.Error(err)
		}
	}()
	serve(t, node.Netns(), "169.254.170.23:80")
	serve(t, node.Netns(), "[fd00:ec2::23]:80")
	pod, err := node.AddPod(ctx, testnode.PodConfig{Name: "app"})
	if err != nil {
		t.Fatal(err)
	}
	const ipv6URI = "http://[fd00:ec2::23]/v1/credentials"
	const ownURI = "http://127.0.0.1:8080/v1/credentials"
	serve(t, pod.Netns(), "127.0.0.1:8080")

	fetch := func(t *testing.T, place testnode.Place) (got Result) {
		t.Helper()
		if err := place.Call(ctx, "fetch", nil, &got); err != nil {
			t.Fatal(err)
		}
		return got
	}
	jsHTTP := func(t *testing.T, place testnode.Place) Result { t.Helper(); return js(ctx, t, place, JSHTTP) }
	jsMetadata := func(t *testing.T, place testnode.Place) Result { t.Helper(); return js(ctx, t, place, JSMetadata) }
	for _, tt := range []struct {
		name, uri        string
		run              func(*testing.T, testnode.Place) Result
		account, expires string
	}{
		{"Go, IPv4", "", fetch, "111122223333", "2099-01-02T02:59:05Z"},
		{"Go, IPv6", ipv6URI, fetch, "111122223333", "2099-01-02T02:59:05Z"},
		{"JavaScript, IPv4", "", jsHTTP, "", "2099-01-02T03:04:05.000Z"},
		{"JavaScript, IPv6", ipv6URI, jsHTTP, "", "2099-01-02T03:04:05.000Z"},
		{"JavaScript metadata", ownURI, jsMetadata, "111122223333", "2099-01-02T03:04:05.000Z"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, token := range []string{testToken, "someone.elses.token"} {
				if err := pod.WriteToken(token); err != nil {
					t.Fatal(err)
				}
				place := pod.Place().WithEnv(append(pod.AWSEnv(tt.uri), EnvToken+"="+token)...)
				got := tt.run(t, place)
				if token != testToken {
					if got.Error == "" || got.AccessKeyID != "" || strings.Contains(got.Error, token) {
						t.Errorf("with another token: %+v", got)
					}
					continue
				}
				if got.Error != "" || got.AccessKeyID != "ASIATEST" || got.AccountID != tt.account || got.Expires != tt.expires {
					t.Errorf("with the right token: %+v", got)
				}
			}
		})
	}
}
