// SPDX-License-Identifier: Apache-2.0

package strangers

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"
)

type clock struct{ now time.Time }

func (c *clock) Now() time.Time { return c.now }

func TestPeer(t *testing.T) {
	for remote, want := range map[string]string{
		"192.0.2.1:80": "192.0.2.1", "192.0.2.1:81": "192.0.2.1", "[::ffff:192.0.2.1]:80": "192.0.2.1",
		"[2001:db8:0:1:2:3:4:5]:80": "2001:db8:0:1::", "[2001:db8:0:1::9]:1": "2001:db8:0:1::", "[fe80::1%eth0]:1": "fe80::",
	} {
		if got := Peer(remote); got != netip.MustParseAddr(want) {
			t.Errorf("%s: %s, want %s", remote, got, want)
		}
	}
	for _, remote := range []string{"", "@", "pipe"} {
		if Peer(remote).IsValid() {
			t.Errorf("%q", remote)
		}
	}
}

func TestRecords(t *testing.T) {
	c := &clock{time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)}
	l := New(Config{Now: c.Now, Records: Rate{0.1, 3}, AllRecords: Rate{1, 5}})
	count := func(peer string, n int) (recorded int) {
		for range n {
			if l.Record(peer) {
				recorded++
			}
		}
		return recorded
	}
	if n := count("192.0.2.1:1", 100); n != 3 {
		t.Errorf("%d records of one address", n)
	}
	// One that has used up its own share has taken nothing of the others'.
	if n := count("192.0.2.2:1", 2); n != 2 {
		t.Errorf("%d records of another", n)
	}
	all := 0
	for i := range 100 {
		all += count(fmt.Sprintf("198.51.100.%d:1", i), 1)
	}
	if all != 0 {
		t.Errorf("%d records beyond the budget of all", all)
	}
	if _, ok := l.Summary(); ok {
		t.Error("summed up at once")
	}
	since := c.now
	c.now = c.now.Add(DefaultInterval)
	s, ok := l.Summary()
	if !ok || s.Count != 97+100 || !s.Since.Equal(since) || s.Peer != "198.51.100.99:1" {
		t.Errorf("%+v, %v", s, ok)
	}
	if s, ok := l.Summary(); ok {
		t.Errorf("twice: %+v", s)
	}
	if n := count("192.0.2.1:1", 100); n != 3 {
		t.Errorf("%d after a minute", n)
	}
}

func TestExhausted(t *testing.T) {
	c := &clock{time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)}
	l := New(Config{Now: c.Now, Failures: Rate{1, 3}})
	for range 3 {
		if l.Exhausted("192.0.2.1:1") {
			t.Fatal("too early")
		}
		l.Failed("192.0.2.1:1")
	}
	if !l.Exhausted("192.0.2.1:2") || l.Exhausted("192.0.2.2:1") {
		t.Error("not that address, or another")
	}
	for range 100 {
		l.Failed("192.0.2.1:1") // leaves no debt
	}
	c.now = c.now.Add(time.Second)
	if l.Exhausted("192.0.2.1:1") {
		t.Error("for ever")
	}
	free := New(Config{Now: c.Now, Failures: Rate{PerSecond: -1}, Records: Rate{PerSecond: -1}, AllRecords: Rate{PerSecond: -1}})
	for range 1000 {
		free.Failed("192.0.2.1:1")
		if free.Exhausted("192.0.2.1:1") || !free.Record("192.0.2.1:1") {
			t.Fatal("limited, without a limit")
		}
	}
}

// However many addresses there are, memory is bounded, and so are the records
// of all of them.
func TestMemoryIsBounded(t *testing.T) {
	c := &clock{time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)}
	l := New(Config{Now: c.Now})
	l.most = 100
	recorded := 0
	for i := range 10000 {
		remote := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), 1).String()
		l.Exhausted(remote)
		l.Failed(remote)
		if l.Record(remote) {
			recorded++
		}
		if n := len(l.young) + len(l.old); n > 200 {
			t.Fatalf("%d addresses", n)
		}
	}
	if recorded != 300 {
		t.Errorf("%d records", recorded)
	}
}

func FuzzText(f *testing.F) {
	for _, s := range []string{"prod", "a\x00b", "<script>", strings.Repeat("\xff", 500), "\u2028", `"\`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		line, err := json.Marshal(Text(s))
		if err != nil || len(line) > maxText+2 {
			t.Errorf("%q: %d bytes, %v", s, len(line), err)
		}
	})
}
