// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"testing"
)

func TestSystemdPath(t *testing.T) {
	const uid, id = "2b7d9a3e-0f4c-4b11-9d55-6f3a1c2e4d5f", "0123abcd"
	for in, want := range map[string]string{
		"/kubepods/burstable/pod" + uid + "/" + id:  "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod2b7d9a3e_0f4c_4b11_9d55_6f3a1c2e4d5f.slice/cri-containerd-0123abcd.scope",
		"/kubepods/besteffort/pod" + uid + "/" + id: "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod2b7d9a3e_0f4c_4b11_9d55_6f3a1c2e4d5f.slice/cri-containerd-0123abcd.scope",
		"/kubepods/pod" + uid + "/" + id:            "/kubepods.slice/kubepods-pod2b7d9a3e_0f4c_4b11_9d55_6f3a1c2e4d5f.slice/cri-containerd-0123abcd.scope",
		"/system/x/y":                               "",
		"/kubepods/pod" + uid:                       "",
		"/kubepods/a/b/pod" + uid + "/" + id:        "",
		"":                                          "",
	} {
		if got := systemdPath(in); got != want {
			t.Errorf("systemdPath(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestChange(t *testing.T) {
	const spec = `{"ociVersion":"1.1.0","linux":{"cgroupsPath":"/kubepods/pod1/c","resources":{"memory":{"limit":1},"cpu":{"shares":2},"devices":[{"allow":false}]}}}`
	type config struct {
		OCIVersion string
		Linux      struct {
			CgroupsPath string
			Resources   map[string]json.RawMessage
		}
	}
	for _, tt := range []struct {
		mode, path string
		resources  int
	}{
		{"", "/kubepods.slice/kubepods-pod1.slice/cri-containerd-c.scope", 3},
		{"systemd", "/kubepods.slice/kubepods-pod1.slice/cri-containerd-c.scope", 3},
		{"plain", "/kubepods/pod1/c", 1},
		{"both", "/kubepods.slice/kubepods-pod1.slice/cri-containerd-c.scope", 1},
	} {
		out, err := change([]byte(spec), tt.mode)
		if err != nil {
			t.Fatal(tt.mode, err)
		}
		var got config
		if err := json.Unmarshal(out, &got); err != nil {
			t.Fatal(tt.mode, err)
		}
		if got.OCIVersion != "1.1.0" || got.Linux.CgroupsPath != tt.path || len(got.Linux.Resources) != tt.resources {
			t.Errorf("mode %q: %s", tt.mode, out)
		}
	}
	for _, bad := range []string{"", "{}", `{"linux":{"cgroupsPath":1}}`, `{"linux":[]}`} {
		if _, err := change([]byte(bad), "both"); err == nil {
			t.Errorf("change(%q): no error", bad)
		}
	}
}
