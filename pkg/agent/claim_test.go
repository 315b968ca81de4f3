// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
)

// One agent per pin directory, for as long as it lives.
func TestPinsAreClaimedOnce(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "latchkey")
	release, err := claimPins(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := claimPins(dir); !errors.Is(err, ErrAnotherAgent) || !strings.Contains(err.Error(), dir) {
		t.Errorf("a second claim: %v", err)
	}
	if _, err := lockPins(dir); !errors.Is(err, ErrAnotherAgent) {
		t.Errorf("cleaning up under an agent: %v", err)
	}
	other, err := claimPins(filepath.Join(t.TempDir(), "elsewhere"))
	if err != nil {
		t.Errorf("other pins: %v", err)
	}
	other()
	release()
	again, err := claimPins(dir)
	if err != nil {
		t.Fatalf("after the first one's end: %v", err)
	}
	again()
}

// What cannot be claimed is left to who uses it.
func TestClaimLeavesOddDirectoriesToOthers(t *testing.T) {
	for _, dir := range []string{"", "/proc/latchkey-cannot-be-made"} {
		release, err := claimPins(dir)
		if err != nil {
			t.Errorf("%q: %v", dir, err)
			continue
		}
		release()
	}
}

func TestAddressesFree(t *testing.T) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	taken := netip.MustParseAddrPort(ln.Addr().String())
	for _, tt := range []struct {
		name  string
		hosts []string
		inUse bool
	}{
		{"taken", []string{"127.0.0.1"}, true},
		{"taken, v4-mapped", []string{"::ffff:127.0.0.1"}, true},
		{"one of two taken", []string{"127.0.0.2", "127.0.0.1"}, true},
		{"another address", []string{"127.0.0.2"}, false},
		{"not on this machine", []string{"192.0.2.1", "2001:db8::1"}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var hosts []netip.Addr
			for _, h := range tt.hosts {
				hosts = append(hosts, netip.MustParseAddr(h))
			}
			err := addressesFree(hosts, taken.Port())
			if errors.Is(err, ErrAddressInUse) != tt.inUse || !tt.inUse && err != nil {
				t.Errorf("got %v, want in use: %v", err, tt.inUse)
			}
			if tt.inUse && !strings.Contains(err.Error(), taken.String()[len("127.0.0.1"):]+",") {
				t.Errorf("%v does not name the address", err)
			}
		})
	}
}
