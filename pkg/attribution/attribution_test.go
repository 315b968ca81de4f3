// SPDX-License-Identifier: Apache-2.0

package attribution

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
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

type pinner func(path string) error

func (p pinner) Pin(path string) error { return p(path) }

// An agent that is killed while it replaces a pin leaves the one or the other.
func TestPinOverLeavesNoGap(t *testing.T) {
	dir := t.TempDir()
	pin := filepath.Join(dir, "link_connect4")
	for _, content := range []string{"first", "second"} {
		before, _ := os.ReadFile(pin)
		// As a killed one leaves it.
		if err := os.WriteFile(filepath.Join(dir, freshPin+"link_connect4"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		err := pinOver(pinner(func(path string) error {
			if now, _ := os.ReadFile(pin); string(now) != string(before) {
				t.Errorf("while the next is made, the pin is %q, want %q", now, before)
			}
			// As bpf(2) does, whatever is there already is an error.
			f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
			if err != nil {
				return err
			}
			_, err = f.WriteString(content)
			return errors.Join(err, f.Close())
		}), pin)
		if err != nil {
			t.Fatal(err)
		}
		if now, err := os.ReadFile(pin); string(now) != content {
			t.Errorf("pinned %q, %v; want %q", now, err, content)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("%v, %v; want the pin alone", left, err)
	}
}
