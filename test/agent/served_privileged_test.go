// SPDX-License-Identifier: Apache-2.0

//go:build linux && privileged

package agent

import (
	"context"
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/latchkey-dev/latchkey/test/clients"
	"github.com/latchkey-dev/latchkey/test/rig"
	"github.com/latchkey-dev/latchkey/test/testnode"
)

const (
	uri4     = "http://169.254.170.23/v1/credentials"
	uri6     = "http://[fd00:ec2::23]/v1/credentials"
	loopback = "http://127.0.0.1/v1/credentials"
)

// A pod gets its own role's credentials with the SDK's default chain and the
// environment that the webhook injects, and with nothing else.
func TestPrivilegedPodGetsItsOwnRoleWithTheGoSDK(t *testing.T) {
	w := sharedWorld(t)
	own, host := w.newPod(t, testnode.PodConfig{}), w.newPod(t, testnode.PodConfig{HostNetwork: true})
	for _, tt := range []struct {
		name string
		pod  *pod
		uri  string
	}{
		{"own network, IPv4", own, uri4},
		{"own network, IPv6", own, uri6},
		{"hostNetwork, IPv4", host, uri4},
		{"hostNetwork, IPv6", host, uri6},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := fetch(t, tt.pod.Place().WithEnv(tt.pod.AWSEnv(tt.uri)...))
			if got.Error != "" || got.AccountID != tt.pod.account {
				t.Errorf("got %+v, want credentials of account %s", got, tt.pod.account)
			}
		})
	}
	if n := w.calls(own) + w.calls(host); n != 2 {
		t.Errorf("EKS Auth was asked %d times for two pods; families and connections share one cache", n)
	}
}

// fetch runs aws-sdk-go-v2.
func fetch(t *testing.T, place testnode.Place) (got clients.Result) {
	t.Helper()
	must(t, place.Call(t.Context(), "fetch", nil, &got))
	return got
}

// The same with the JavaScript SDK's providers. fromContainerMetadata allows
// localhost only, so the agent serves there too.
func TestPrivilegedPodGetsItsOwnRoleWithTheJavaScriptSDK(t *testing.T) {
	w := newWorld(t, rig.Config{})
	w.start(t, "-b", "169.254.170.23", "-b", "[fd00:ec2::23]", "-b", "127.0.0.1")
	own, host := w.newPod(t, testnode.PodConfig{}), w.newPod(t, testnode.PodConfig{HostNetwork: true})
	for _, tt := range []struct {
		name     string
		pod      *pod
		provider clients.JSProvider
		uri      string
	}{
		{"HTTP provider, IPv4", own, clients.JSHTTP, uri4},
		{"HTTP provider, IPv6", own, clients.JSHTTP, uri6},
		{"container metadata provider", host, clients.JSMetadata, loopback},
	} {
		t.Run(tt.name, func(t *testing.T) {
			place := tt.pod.Place().WithEnv(append(tt.pod.AWSEnv(tt.uri), clients.EnvToken+"="+tt.pod.Token)...)
			got := javaScript(t, place, tt.provider)
			// The HTTP provider drops the account.
			if got.Error != "" || got.AccessKeyID == "" || tt.provider == clients.JSMetadata && got.AccountID != tt.pod.account {
				t.Errorf("got %+v", got)
			}
			if w.calls(tt.pod) != 1 {
				t.Errorf("EKS Auth was asked %d times for this pod's role, want once", w.calls(tt.pod))
			}
		})
	}
	t.Run("a thief is refused", func(t *testing.T) {
		place := own.Place().WithEnv(append(own.AWSEnv(uri4), "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE="+host.TokenFile())...)
		if got := javaScript(t, place, clients.JSHTTP); got.Error == "" || got.AccessKeyID != "" {
			t.Errorf("got %+v, want an error", got)
		}
	})
}

// javaScript runs one of the JavaScript clients.
func javaScript(t *testing.T, place testnode.Place, provider clients.JSProvider) (got clients.Result) {
	t.Helper()
	argv, err := clients.JS(provider)
	must(t, err)
	stdout, stderr, code := runProgram(t, place, argv...)
	if code > 1 {
		t.Fatalf("exit status %d: %s", code, stderr)
	}
	must(t, json.Unmarshal([]byte(stdout), &got))
	return got
}

// However a pod connects, it is itself.
func TestPrivilegedEveryWayOfConnectingIsServed(t *testing.T) {
	w := sharedWorld(t)
	own := w.newPod(t, testnode.PodConfig{Containers: 2})
	guaranteed := w.newPod(t, testnode.PodConfig{QoS: testnode.Guaranteed})
	besteffort := w.newPod(t, testnode.PodConfig{QoS: testnode.BestEffort})
	host := w.newPod(t, testnode.PodConfig{HostNetwork: true})
	for _, tt := range []struct {
		name  string
		pod   *pod
		place testnode.Place
	}{
		{"over veth", own, own.Place()},
		{"second container", own, own.In(1)},
		{"unprivileged user", own, own.Place().AsUser(1000, 1000)},
		{"nested cgroup", own, own.Place().Nested("system.slice/docker-0123.scope")},
		{"guaranteed", guaranteed, guaranteed.Place()},
		{"besteffort", besteffort, besteffort.Place()},
		{"hostNetwork, over loopback", host, host.Place()},
		{"hostNetwork, nested cgroup", host, host.Place().Nested("init")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := newClient(t, tt.place)
			for _, address := range []string{rig.Host4, rig.Host6, mapped} {
				wantCredentials(t, c.ask(address, tt.pod.Token), tt.pod)
			}
		})
	}
}

// Under SYN cookies the listener keeps nothing of a SYN, and so none of what it
// carried.
func TestPrivilegedSYNCookiesChangeNothing(t *testing.T) {
	w := sharedWorld(t)
	victim, thief := w.newPod(t, testnode.PodConfig{}), w.newPod(t, testnode.PodConfig{})
	inVictim, inThief := newClient(t, victim.Place()), newClient(t, thief.Place())
	set := func(mode string) {
		must(t, w.Node.Do(func() error { return os.WriteFile("/proc/sys/net/ipv4/tcp_syncookies", []byte(mode), 0o644) }))
	}
	defer set("1")
	for _, mode := range []string{"0", "1", "2"} {
		set(mode)
		for _, address := range []string{rig.Host4, rig.Host6} {
			t.Run("tcp_syncookies="+mode+" "+address, func(t *testing.T) {
				wantCredentials(t, inVictim.ask(address, victim.Token), victim)
				wantRefusal(t, inThief.ask(address, victim.Token), 403, textMismatch)
			})
		}
	}
}

// EKS nodes name their cgroups after systemd's slices.
func TestPrivilegedSystemdCgroups(t *testing.T) {
	for _, prefix := range []string{"cri-containerd", "crio"} {
		t.Run(prefix, func(t *testing.T) {
			w := newWorld(t, rig.Config{Node: testnode.Config{Driver: testnode.DriverSystemd, ScopePrefix: prefix}})
			w.start(t)
			for _, qos := range []testnode.QoS{testnode.Guaranteed, testnode.Burstable, testnode.BestEffort} {
				p := w.newPod(t, testnode.PodConfig{QoS: qos})
				wantCredentials(t, askFrom(t, p.Place(), rig.Host4, p.Token), p)
			}
			victim, thief := w.newPod(t, testnode.PodConfig{}), w.newPod(t, testnode.PodConfig{})
			slice := "kubepods-burstable-pod" + strings.ReplaceAll(string(victim.UID), "-", "_") + ".slice"
			for _, forged := range []string{slice, "kubepods.slice/kubepods-burstable.slice/" + slice + "/" + prefix + "-" + victim.Containers()[0].ID + ".scope"} {
				place := thief.Place().Nested(forged)
				wantRefusal(t, askFrom(t, place, rig.Host4, victim.Token), 403, textMismatch)
				wantCredentials(t, askFrom(t, place, rig.Host4, thief.Token), thief)
			}
		})
	}
}

// A token that the kubelet rotates costs no call of EKS Auth, on kept and on
// new connections.
func TestPrivilegedRotatedTokenCostsNoCall(t *testing.T) {
	w := sharedWorld(t)
	p := w.newPod(t, testnode.PodConfig{})
	c := newClient(t, p.Place())
	kept := c.dial(rig.Host4)
	first := ask(t, kept, p.Token)
	wantCredentials(t, first, p)
	old := p.Token
	for range 3 {
		must(t, w.Rotate(p.Pod))
		if p.Token == old {
			t.Fatal("the token did not change")
		}
		for _, a := range []rig.Answer{ask(t, kept, p.Token), c.ask(rig.Host4, p.Token), c.ask(rig.Host6, p.Token)} {
			wantCredentials(t, a, p)
			if a.Body != first.Body {
				t.Error("the credentials changed with the token")
			}
		}
	}
	// Kubernetes lets the old one live on.
	wantCredentials(t, ask(t, kept, old), p)
	if n := w.calls(p); n != 1 {
		t.Errorf("EKS Auth was asked %d times, want once", n)
	}
}

// A container's first process is served at its first connect.
func TestPrivilegedFirstConnectOfANewPodIsServed(t *testing.T) {
	w := sharedWorld(t)
	for range 5 {
		p := w.newPod(t, testnode.PodConfig{NoPause: true})
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		a, err := rig.Ask(ctx, p.Place(), rig.Host4, p.Token)
		cancel()
		must(t, err)
		wantCredentials(t, a, p)
	}
}
