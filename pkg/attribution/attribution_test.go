// SPDX-License-Identifier: Apache-2.0

package attribution

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/cilium/ebpf/btf"

	"github.com/latchkey-dev/latchkey/bpf"
)

// The Go names follow the C enumeration; an event added in one place only would
// count under a wrong name.
func TestEventNamesFollowTheEnum(t *testing.T) {
	spec, err := bpf.LoadAttribution()
	if err != nil {
		t.Fatal(err)
	}
	var enum *btf.Enum
	if err := spec.Types.TypeByName("event", &enum); err != nil {
		t.Fatal(err)
	}
	seen := 0
	for _, v := range enum.Values {
		if v.Name == "EVENT_MAX" {
			if int(v.Value) != len(eventNames) {
				t.Errorf("the programs count %d events, Go names %d", v.Value, len(eventNames))
			}
			continue
		}
		name, isErr := strings.CutPrefix(strings.ToLower(strings.TrimPrefix(v.Name, "EVENT_")), "err_")
		if got := eventNames[v.Value]; got.Name != name || got.Error != isErr {
			t.Errorf("%s: named %q (error %v)", v.Name, got.Name, got.Error)
		}
		seen++
	}
	if seen != len(eventNames) {
		t.Errorf("saw %d events, want %d", seen, len(eventNames))
	}
}

func TestConfigureRefuses(t *testing.T) {
	good := []netip.Addr{netip.MustParseAddr("169.254.170.23"), netip.MustParseAddr("fd00:ec2::23")}
	many := make([]netip.Addr, 0, MaxAddresses+1)
	for i := range MaxAddresses + 1 {
		many = append(many, netip.MustParseAddr(fmt.Sprintf("127.0.0.%d", i+1)))
	}
	for name, c := range map[string]struct {
		cfg Config
		ok  bool
	}{
		"good":             {Config{CgroupPath: "/x", Addresses: good, Ports: []uint16{80}}, true},
		"no cgroup":        {Config{Addresses: good, Ports: []uint16{80}}, false},
		"no port":          {Config{CgroupPath: "/x", Addresses: good}, false},
		"port zero":        {Config{CgroupPath: "/x", Addresses: good, Ports: []uint16{0}}, false},
		"five ports":       {Config{CgroupPath: "/x", Addresses: good, Ports: []uint16{1, 2, 3, 4, 5}}, false},
		"no address":       {Config{CgroupPath: "/x", Ports: []uint16{80}}, false},
		"every address":    {Config{CgroupPath: "/x", Addresses: []netip.Addr{netip.IPv4Unspecified()}, Ports: []uint16{80}}, false},
		"unset address":    {Config{CgroupPath: "/x", Addresses: []netip.Addr{{}}, Ports: []uint16{80}}, false},
		"too many":         {Config{CgroupPath: "/x", Addresses: many, Ports: []uint16{80}}, false},
		"as many as go in": {Config{CgroupPath: "/x", Addresses: many[1:], Ports: []uint16{80}}, true},
	} {
		spec, err := bpf.LoadAttribution()
		if err != nil {
			t.Fatal(err)
		}
		err = configure(spec, &c.cfg)
		if c.ok && err != nil || !c.ok && !errors.Is(err, ErrConfig) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

func TestCleanupOfNothing(t *testing.T) {
	removed, err := Cleanup(t.TempDir() + "/none")
	if err != nil || len(removed) != 0 {
		t.Fatalf("got %v, %v", removed, err)
	}
}
