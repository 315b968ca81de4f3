// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// testdata is kept as one directory per case, named after what it is about. A
// report of a path that is read wrongly becomes a new directory.
func cases(t *testing.T, kind string) []string {
	t.Helper()
	dirs, err := filepath.Glob(filepath.Join("testdata", kind, "*"))
	if err != nil || len(dirs) == 0 {
		t.Fatalf("no cases of kind %s: %v", kind, err)
	}
	return dirs
}

func readCase(t *testing.T, dir, name string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSuffix(string(data), "\n")
}

func mustRoot(t testing.TB, path string) Root {
	t.Helper()
	r, err := NewRoot(path)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func describe(ref PodRef, err error) string {
	switch {
	case errors.Is(err, ErrNotPod):
		return "not-pod"
	case errors.Is(err, ErrPath):
		return "bad-path"
	case err != nil:
		return err.Error()
	}
	container := ref.ContainerID
	if container == "" {
		container = "-"
	}
	return string(ref.UID) + " " + string(ref.QoS) + " " + container
}

func TestParse(t *testing.T) {
	for _, dir := range cases(t, "paths") {
		t.Run(filepath.Base(dir), func(t *testing.T) {
			root := mustRoot(t, readCase(t, dir, "root"))
			paths := strings.Split(readCase(t, dir, "cgroup"), "\n")
			want := strings.Split(readCase(t, dir, "want"), "\n")
			if len(paths) != len(want) {
				t.Fatalf("%d paths, %d results", len(paths), len(want))
			}
			for i, path := range paths {
				ref, err := root.Parse(path)
				if got := describe(ref, err); got != want[i] {
					t.Errorf("%s\n got %s\nwant %s", path, got, want[i])
				}
				if err != nil {
					if ref != (PodRef{}) {
						t.Errorf("%s: error and result %+v", path, ref)
					}
					continue
				}
				if dir, ok := root.PodDir(path); !ok || dir != ref.Path {
					t.Errorf("%s: PodDir is %q, Parse says %q", path, dir, ref.Path)
				}
			}
		})
	}
}

func TestFindRoot(t *testing.T) {
	for _, dir := range cases(t, "roots") {
		t.Run(filepath.Base(dir), func(t *testing.T) {
			m := Mount{Point: t.TempDir(), Root: "/"}
			for path := range strings.SplitSeq(readCase(t, dir, "tree"), "\n") {
				if err := os.MkdirAll(m.Join(path), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			override := strings.Replace(readCase(t, dir, "override"), "MOUNT", m.Point, 1)
			root, err := FindRoot(m, readCase(t, dir, "self"), override)
			want := strings.Fields(readCase(t, dir, "want"))
			sentinel, named := map[string]error{
				"ambiguous": ErrAmbiguousRoot, "no-root": ErrNoRoot, "bad-path": ErrPath,
			}[want[0]], want[1:]
			if sentinel == nil {
				if err != nil || root.Path() != want[0] {
					t.Fatalf("got %q, %v; want %s", root.Path(), err, want[0])
				}
				return
			}
			if !errors.Is(err, sentinel) {
				t.Fatalf("got %q, %v; want error %q", root.Path(), err, sentinel)
			}
			for _, name := range append(named, "--cgroup-root") {
				if !strings.Contains(err.Error(), name) {
					t.Errorf("error does not name %s: %v", name, err)
				}
			}
		})
	}
}

func TestNewRootRefuses(t *testing.T) {
	for _, path := range []string{"", "/", "kubepods", "/kubepods/", "/a/../kubepods", "/.slice", "/-.slice", "/a-.slice", "/a\x00b"} {
		if r, err := NewRoot(path); !errors.Is(err, ErrPath) || r.Path() != "" {
			t.Errorf("%q: got %q, %v", path, r.Path(), err)
		}
	}
}

func TestZeroRootContainsNothing(t *testing.T) {
	var r Root
	for _, path := range []string{"/", "/pod1c3c2b62-7a0e-4d5e-9f50-0a8f4c1f2a77", "//pod"} {
		if ref, err := r.Parse(path); err == nil {
			t.Errorf("%s: %+v", path, ref)
		}
	}
	if _, ok := r.IsQoS(""); ok {
		t.Error("empty name is a QoS directory")
	}
}

func TestIsQoS(t *testing.T) {
	for _, tc := range []struct {
		root, name string
		want       QoS
	}{
		{"/kubepods", "burstable", Burstable},
		{"/kubepods", "besteffort", BestEffort},
		{"/kubepods", "guaranteed", ""},
		{"/kubepods", "", ""},
		{"/kubepods", "kubepods-burstable.slice", ""},
		{"/kubepods.slice", "kubepods-burstable.slice", Burstable},
		{"/kubepods.slice", "burstable", ""},
		{"/kubelet.slice/kubelet-kubepods.slice", "kubelet-kubepods-besteffort.slice", BestEffort},
		{"/kubelet.slice/kubelet-kubepods.slice", "kubepods-besteffort.slice", ""},
	} {
		got, ok := mustRoot(t, tc.root).IsQoS(tc.name)
		if got != tc.want || ok != (tc.want != "") {
			t.Errorf("%s in %s: %q, %v", tc.name, tc.root, got, ok)
		}
	}
}

func TestIsMonitor(t *testing.T) {
	root := mustRoot(t, "/kubepods.slice")
	pod := "/kubepods.slice/kubepods-pod1c3c2b62_7a0e_4d5e_9f50_0a8f4c1f2a77.slice"
	for path, want := range map[string]bool{
		pod:                           false,
		pod + "/crio-conmon-0f.scope": true,
		pod + "/crio-0f.scope":        false,
		pod + "/crio-0f.scope/crio-conmon-0f.scope": false,
		"/system.slice/crio-conmon-0f.scope":        false,
	} {
		if got := root.IsMonitor(path); got != want {
			t.Errorf("%s: %v", path, got)
		}
	}
}

func TestList(t *testing.T) {
	m := Mount{Point: t.TempDir()}
	root := mustRoot(t, "/kubepods")
	if _, err := root.List(m); !errors.Is(err, ErrGone) {
		t.Fatalf("without the root: %v", err)
	}
	const uid = "1c3c2b62-7a0e-4d5e-9f50-0a8f4c1f2a7"
	for _, dir := range []string{
		"/kubepods/pod" + uid + "1/pod" + uid + "8",
		"/kubepods/pod" + uid + "x",
		"/kubepods/burstable/pod" + uid + "2",
	} {
		if err := os.MkdirAll(m.Join(dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(m.Join("/kubepods/pod"+uid+"9"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := root.List(m)
	if err != nil {
		t.Fatal(err)
	}
	if len(got.QoS) != 1 || got.QoS[0] != "/kubepods/burstable" {
		t.Errorf("QoS directories %v", got.QoS)
	}
	if len(got.Pods) != 2 || got.Pods[0].UID != uid+"1" || got.Pods[0].QoS != Guaranteed ||
		got.Pods[1].UID != uid+"2" || got.Pods[1].QoS != Burstable {
		t.Errorf("pods %+v", got.Pods)
	}
}

func TestPodDirDoesNotAllocate(t *testing.T) {
	root := mustRoot(t, "/kubepods.slice")
	path := "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1c3c2b62_7a0e_4d5e_9f50_0a8f4c1f2a77.slice/x"
	if n := testing.AllocsPerRun(100, func() {
		if _, ok := root.PodDir(path); !ok {
			t.Fatal("no pod directory")
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// FuzzParse: whatever the path, a pod's UID and directory come from the
// outermost level, and nothing that is appended changes them.
func FuzzParse(f *testing.F) {
	roots := []string{"/kubepods", "/kubepods.slice", "/kubelet.slice/kubelet-kubepods.slice", "/my/pods"}
	dirs, err := filepath.Glob("testdata/paths/*")
	if err != nil {
		f.Fatal(err)
	}
	for _, dir := range dirs {
		data, err := os.ReadFile(filepath.Join(dir, "cgroup"))
		if err != nil {
			f.Fatal(err)
		}
		for line := range strings.SplitSeq(strings.TrimSpace(string(data)), "\n") {
			for i := range roots {
				f.Add(byte(i), line, "pod1c3c2b62-7a0e-4d5e-9f50-0a8f4c1f2a77")
			}
		}
	}
	f.Fuzz(func(t *testing.T, which byte, path, more string) {
		root := mustRoot(t, roots[int(which)%len(roots)])
		ref, err := root.Parse(path)
		if err != nil {
			if !errors.Is(err, ErrNotPod) && !errors.Is(err, ErrPath) {
				t.Fatalf("%q: unknown error %v", path, err)
			}
			return
		}
		rel, ok := strings.CutPrefix(path, root.Path()+"/")
		if !ok {
			t.Fatalf("%q is not below %s", path, root.Path())
		}
		parts := strings.Split(rel, "/")
		name, at := parts[0], 1
		if _, ok := root.IsQoS(name); ok {
			name, at = parts[1], 2
		}
		if want := root.Path() + "/" + strings.Join(parts[:at], "/"); ref.Path != want {
			t.Fatalf("%q: pod directory %q, want %q", path, ref.Path, want)
		}
		if !strings.Contains(strings.ReplaceAll(name, "_", "-"), string(ref.UID)) {
			t.Fatalf("%q: UID %q is not in the outermost name %q", path, ref.UID, name)
		}
		if checkPath("/"+more) != nil {
			return
		}
		again, err := root.Parse(strings.TrimSuffix(path+"/"+more, "/"))
		if err != nil || again.UID != ref.UID || again.Path != ref.Path || again.QoS != ref.QoS {
			t.Fatalf("%q + %q: %+v, %v; was %+v", path, more, again, err, ref)
		}
	})
}

func BenchmarkParse(b *testing.B) {
	root := mustRoot(b, "/kubepods.slice")
	path := "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1c3c2b62_7a0e_4d5e_9f50_0a8f4c1f2a77.slice/" +
		"cri-containerd-" + strings.Repeat("0f", 32) + ".scope"
	b.ReportAllocs()
	for b.Loop() {
		if _, err := root.Parse(path); err != nil {
			b.Fatal(err)
		}
	}
}
