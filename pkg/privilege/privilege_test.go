// SPDX-License-Identifier: Apache-2.0

package privilege

import (
	"testing"

	"golang.org/x/sys/unix"
)

func TestSetString(t *testing.T) {
	for s, want := range map[Set]string{
		0:                                    "none",
		Of(unix.CAP_BPF, unix.CAP_NET_ADMIN): "NET_ADMIN,BPF",
		Of(unix.CAP_DAC_READ_SEARCH, 63):     "DAC_READ_SEARCH,63",
		Of(unix.CAP_PERFMON) | Of(unix.CAP_CHOWN): "0,PERFMON",
	} {
		if got := s.String(); got != want {
			t.Errorf("%x: got %s, want %s", uint64(s), got, want)
		}
	}
}

func TestParseStatus(t *testing.T) {
	const status = "Name:\tx\nCapInh:\t0000000000000000\nCapPrm:\t0000000000003000\nCapEff:\t0000000000001000\nCapBnd:\t000001ffffffffff\n"
	eff, bnd, err := parseStatus(status)
	if err != nil || eff != Of(unix.CAP_NET_ADMIN) || bnd != 1<<41-1 {
		t.Errorf("got %v, %v, %v", eff, bnd, err)
	}
	for _, bad := range []string{"", "CapEff:\t0\n", "CapEff:\tzz\nCapBnd:\t0\n"} {
		if _, _, err := parseStatus(bad); err == nil {
			t.Errorf("%q: no error", bad)
		}
	}
}

func TestHeldIsReadable(t *testing.T) {
	if _, bnd, err := Held(); err != nil || bnd == 0 {
		t.Errorf("got %v, %v", bnd, err)
	}
}

// Nothing to give up: nothing happens, above all no exec.
func TestConfineToWhatIsHeld(t *testing.T) {
	if err := Confine(^Set(0)); err != nil {
		t.Error(err)
	}
	if err := Drop(0); err != nil {
		t.Error(err)
	}
}
