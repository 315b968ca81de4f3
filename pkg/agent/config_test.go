// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/verdict"
)

func TestParseBindHosts(t *testing.T) {
	for name, c := range map[string]struct {
		in       []string
		want     []string
		warnings int
		bad      bool
	}{
		"none means both":             {nil, []string{"169.254.170.23", "fd00:ec2::23"}, 0, false},
		"the documents' empty string": {[]string{""}, []string{"169.254.170.23"}, 1, false},
		"blank":                       {[]string{" "}, []string{"169.254.170.23"}, 1, false},
		"IPv4 only":                   {[]string{"169.254.170.23"}, []string{"169.254.170.23"}, 0, false},
		"brackets":                    {[]string{"[fd00:ec2::23]"}, []string{"fd00:ec2::23"}, 0, false},
		"no brackets":                 {[]string{"fd00:ec2::23"}, []string{"fd00:ec2::23"}, 0, false},
		"localhost":                   {[]string{"localhost"}, []string{"127.0.0.1"}, 0, false},
		"given twice":                 {[]string{"127.0.0.1", "localhost"}, []string{"127.0.0.1"}, 0, false},
		"v4-mapped":                   {[]string{"::ffff:127.0.0.1"}, []string{"127.0.0.1"}, 0, false},
		"every IPv4 address":          {[]string{"0.0.0.0"}, nil, 0, true},
		"every IPv6 address":          {[]string{"[::]"}, nil, 0, true},
		"every address, mapped":       {[]string{"::ffff:0.0.0.0"}, nil, 0, true},
		"a name":                      {[]string{"node-1"}, nil, 0, true},
		"with a port":                 {[]string{"169.254.170.23:80"}, nil, 0, true},
		"multicast":                   {[]string{"224.0.0.1"}, nil, 0, true},
		"with a zone":                 {[]string{"fe80::1%eth0"}, nil, 0, true},
	} {
		got, warnings, err := ParseBindHosts(c.in)
		if c.bad {
			if !errors.Is(err, ErrConfig) || len(got) != 0 {
				t.Errorf("%s: got %v, %v; want ErrConfig", name, got, err)
			}
			continue
		}
		var want []netip.Addr
		for _, w := range c.want {
			want = append(want, netip.MustParseAddr(w))
		}
		if err != nil || !slices.Equal(got, want) || len(warnings) != c.warnings {
			t.Errorf("%s: got %v, %d warnings, %v; want %v, %d", name, got, len(warnings), err, want, c.warnings)
		}
	}
}

func TestParseExceptions(t *testing.T) {
	got, err := ParseExceptions([]string{"legacy=audit", "kube-system=off", "prod=enforce"})
	if err != nil || got["legacy"] != verdict.Audit || got["kube-system"] != verdict.Off || got["prod"] != verdict.Enforce || len(got) != 3 {
		t.Errorf("got %v, %v", got, err)
	}
	for _, bad := range [][]string{{"legacy"}, {"=audit"}, {"legacy="}, {"legacy=on"}, {"a=audit", "a=off"}} {
		if got, err := ParseExceptions(bad); !errors.Is(err, ErrConfig) || got != nil {
			t.Errorf("%v: got %v, %v; want ErrConfig", bad, got, err)
		}
	}
}

func good() Config {
	return Config{
		ClusterName: "c", Port: DefaultPort, MaxRetention: DefaultMaxRetention, MaxCacheSize: DefaultMaxCacheSize,
		RenewalQPS: DefaultRenewalQPS, UpstreamQPS: DefaultUpstreamQPS, Logger: slog.New(slog.DiscardHandler),
	}
}

func TestCheckRefuses(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"no cluster":           func(c *Config) { c.ClusterName = "" },
		"no logger":            func(c *Config) { c.Logger = nil },
		"port zero":            func(c *Config) { c.Port = 0 },
		"relative node token":  func(c *Config) { c.NodeTokenFile = "token" },
		"two sources of keys":  func(c *Config) { c.NodeTokenFile, c.RotateCredentials = "/token", true },
		"relative runtime":     func(c *Config) { c.ContainerRuntime = "containerd.sock" },
		"negative sampling":    func(c *Config) { c.AuditSampleHits = -1 },
		"relative socket":      func(c *Config) { c.AdminSocket = "admin.sock" },
		"relative pins":        func(c *Config) { c.PinPath = "pins" },
		"negative retention":   func(c *Config) { c.MaxRetention = -time.Second },
		"negative cache":       func(c *Config) { c.MaxCacheSize = -1 },
		"negative rate":        func(c *Config) { c.RenewalQPS = -1 },
		"negative pod limit":   func(c *Config) { c.PodLimits.Rate = -1 },
		"negative cache bytes": func(c *Config) { c.MaxCacheBytes = -1 },
		"nine addresses": func(c *Config) {
			for i := range byte(9) {
				c.BindHosts = append(c.BindHosts, netip.AddrFrom4([4]byte{127, 0, 0, i + 1}))
			}
		},
	} {
		c := good()
		change(&c)
		if _, err := c.check(); !errors.Is(err, ErrConfig) {
			t.Errorf("%s: got %v, want ErrConfig", name, err)
		}
	}
}

func TestCheckWarns(t *testing.T) {
	c := good()
	if w, err := c.check(); err != nil || len(w) != 0 {
		t.Errorf("the defaults: warnings %v, error %v", w, err)
	}
	for name, c := range map[string]struct {
		change func(*Config)
		says   string
	}{
		// The reference agent panics here.
		"retention too short for the rate": {func(c *Config) { c.MaxRetention = 5 * time.Minute }, "too small to renew a full cache"},
		"more renewals than calls":         {func(c *Config) { c.RenewalQPS = 100 }, "bounds all calls"},
		"no cache":                         {func(c *Config) { c.MaxCacheSize = 0 }, "the cache is off"},
		"audit":                            {func(c *Config) { c.Policy.Default = verdict.Audit }, "stolen token"},
	} {
		cfg := good()
		c.change(&cfg)
		w, err := cfg.check()
		if err != nil || len(w) != 1 || !strings.Contains(string(w[0]), c.says) {
			t.Errorf("%s: got %v, %v; want one that says %q", name, w, err, c.says)
		}
	}
}

func TestAttachPoint(t *testing.T) {
	for _, c := range []struct{ root, self, want string }{
		{"/kubepods.slice", "/kubepods.slice/kubepods-podx.slice/cri-containerd-y.scope", "/"},
		{"/kubepods.slice", "/system.slice/latchkey.service", "/"},
		{"/kubepods", "", "/"},
		// kind: the node is a container of its own.
		{"/docker/abc/kubelet/kubepods", "/docker/abc/kubelet/kubepods/podx/y", "/docker/abc/kubelet"},
		{"/docker/abc/kubelet/kubepods", "/docker/abc/init.scope", "/docker/abc"},
		{"/a/kubepods", "/ab/agent", "/"},
		{"/a/kubepods", "/a", "/a"},
	} {
		if got := attachPoint(c.root, c.self); got != c.want {
			t.Errorf("root %s, agent in %s: got %s, want %s", c.root, c.self, got, c.want)
		}
	}
}
