// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

func TestFindMount(t *testing.T) {
	for _, dir := range cases(t, "mounts") {
		t.Run(filepath.Base(dir), func(t *testing.T) {
			m, err := FindMount(filepath.Join(dir, "mountinfo"))
			got := m.Point + " " + m.Root
			switch {
			case errors.Is(err, ErrNoCgroup2):
				got = "no-cgroup2"
			case errors.Is(err, ErrMountinfo):
				got = "malformed"
			case err != nil:
				t.Fatal(err)
			}
			if want := readCase(t, dir, "want"); got != want {
				t.Errorf("got %q, want %q", got, want)
			}
		})
	}
}

func TestFindMountNoFile(t *testing.T) {
	if _, err := FindMount(filepath.Join(t.TempDir(), "none")); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

func TestSelfPath(t *testing.T) {
	for name, tc := range map[string]struct {
		cgroup, root, want string
		err                error
	}{
		"host":                     {"0::/system.slice/a.service\n", "/", "/system.slice/a.service", nil},
		"hybrid":                   {"9:name=systemd:/x\n1:cpu:/y\n0::/z\n", "/", "/z", nil},
		"top":                      {"0::/\n", "/", "/", nil},
		"mount of a part":          {"0::/a/b/c\n", "/a/b", "/c", nil},
		"mount of own cgroup":      {"0::/a/b\n", "/a/b", "/", nil},
		"mount of a similar name":  {"0::/a/bc\n", "/a/b", "", ErrOutside},
		"mount of another part":    {"0::/x\n", "/a/b", "", ErrOutside},
		"only v1":                  {"1:cpu:/y\n", "/", "", ErrNoCgroup2},
		"colons in the path":       {"0::/a:b::c\n", "/", "/a:b::c", nil},
		"v1 hierarchy with a name": {"10::/y\n", "/", "", ErrNoCgroup2},
	} {
		t.Run(name, func(t *testing.T) {
			procfs := t.TempDir()
			writeFile(t, procfs+"/self/cgroup", tc.cgroup)
			got, err := Mount{Point: t.TempDir(), Root: tc.root}.SelfPath(procfs)
			if got != tc.want || !errors.Is(err, tc.err) {
				t.Errorf("got %q, %v", got, err)
			}
		})
	}
}

// In a cgroup namespace of its own the agent reads "/" and must search the
// host's tree for itself.
func TestSelfPathInCgroupNamespace(t *testing.T) {
	procfs, m := t.TempDir(), Mount{Point: t.TempDir(), Root: "/../.."}
	writeFile(t, procfs+"/self/cgroup", "0::/\n")
	writeFile(t, m.Join("/kubepods/poda/c1/cgroup.procs"), "0\n1\n")
	writeFile(t, m.Join("/kubepods/podb/c2/cgroup.procs"), "0\n"+strconv.Itoa(os.Getpid())+"\n")
	if err := os.MkdirAll(m.Join("/kubepods/podc/no-procs-file"), 0o755); err != nil {
		t.Fatal(err)
	}
	if got, err := m.SelfPath(procfs); err != nil || got != "/kubepods/podb/c2" {
		t.Errorf("got %q, %v", got, err)
	}
	writeFile(t, m.Join("/kubepods/podb/c2/cgroup.procs"), "")
	if got, err := m.SelfPath(procfs); !errors.Is(err, ErrOutside) {
		t.Errorf("got %q, %v", got, err)
	}
}

// So it must for others, whose cgroups it reads relative to its own.
func TestProcessPath(t *testing.T) {
	procfs, m := t.TempDir(), Mount{Point: t.TempDir(), Root: "/../.."}
	writeFile(t, procfs+"/42/cgroup", "0::/../podb/c2\n")
	writeFile(t, m.Join("/kubepods/poda/c1/cgroup.procs"), "4\n421\n")
	writeFile(t, m.Join("/kubepods/podb/c2/cgroup.procs"), "7\n42\n")
	if got, err := m.ProcessPath(procfs, 42); err != nil || got != "/kubepods/podb/c2" {
		t.Errorf("in a namespace of its own: got %q, %v", got, err)
	}
	m.Root = "/"
	writeFile(t, procfs+"/42/cgroup", "1:cpu:/y\n0::/kubepods/podb/c3\n")
	if got, err := m.ProcessPath(procfs, 42); err != nil || got != "/kubepods/podb/c3" {
		t.Errorf("in the node's: got %q, %v", got, err)
	}
	if got, err := m.ProcessPath(procfs, 43); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("of no process: got %q, %v", got, err)
	}
}

func TestWalkIsBounded(t *testing.T) {
	m := Mount{Point: t.TempDir()}
	for i := range 10 {
		if err := os.Mkdir(m.Join("/"+strconv.Itoa(i)), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	visit := func(string, int) (bool, error) { return true, nil }
	if err := walk(m, 11, visit); err != nil {
		t.Error(err)
	}
	if err := walk(m, 10, visit); !errors.Is(err, ErrSearchLimit) {
		t.Error(err)
	}
}

func writeFile(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// FuzzMountinfo: never a panic, and what is found is a cgroup2 mount with an
// absolute mount point.
func FuzzMountinfo(f *testing.F) {
	dirs, err := filepath.Glob("testdata/mounts/*")
	if err != nil {
		f.Fatal(err)
	}
	for _, dir := range dirs {
		data, err := os.ReadFile(filepath.Join(dir, "mountinfo"))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(data))
	}
	f.Fuzz(func(t *testing.T, text string) {
		mounts, err := ParseMountinfo(strings.NewReader(text))
		if err != nil {
			if mounts != nil {
				t.Fatalf("error and result: %v, %v", err, mounts)
			}
			return
		}
		if len(mounts) > 0 && !strings.Contains(text, "cgroup2") {
			t.Fatalf("no cgroup2 in the text, yet %v", mounts)
		}
		for _, m := range mounts {
			if !filepath.IsAbs(m.Point) {
				t.Fatalf("relative mount point %q", m.Point)
			}
		}
		if m, err := ChooseMount(mounts); err != nil && len(mounts) > 0 {
			t.Fatalf("%v of %v", err, mounts)
		} else if err == nil {
			for _, other := range mounts {
				if rootDepth(other.Root) < rootDepth(m.Root) {
					t.Fatalf("chose %v, but %v shows more", m, other)
				}
			}
		}
	})
}
