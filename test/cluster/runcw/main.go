// SPDX-License-Identifier: Apache-2.0

// Command runcw stands before runc and changes a container's configuration
// before it is created, to show a node that this machine is not.
//
// With RUNCW=systemd, the default, the container gets the cgroup path that the
// systemd driver gives it on a node with systemd:
//
//	/kubepods/burstable/pod<uid>/<id>
//	/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod<uid_>.slice/cri-containerd-<id>.scope
//
// RUNCW=plain keeps the path and takes away the limits that need controllers
// of cgroup v2, for a machine where version 1 hierarchies hold them. RUNCW=both
// does both. The real runc is RUNCW_RUNC, or the one in /usr/bin.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "runcw:", err)
		os.Exit(1)
	}
}

func run() error {
	runc := os.Getenv("RUNCW_RUNC")
	if runc == "" {
		runc = "/usr/bin/runc"
	}
	if at := slices.Index(os.Args, "--bundle"); slices.Contains(os.Args, "create") && at > 0 && at+1 < len(os.Args) {
		if err := rewrite(filepath.Join(os.Args[at+1], "config.json"), os.Getenv("RUNCW")); err != nil {
			return err
		}
	}
	if slices.Contains(os.Args, "delete") {
		return remove(runc)
	}
	return syscall.Exec(runc, append([]string{runc}, os.Args[1:]...), os.Environ())
}

// remove runs runc to delete a container, and removes its pod's group once
// that is empty: the kubelet removes those that it has named, and this is not
// one of them.
func remove(runc string) error {
	var state struct {
		CgroupPaths map[string]string `json:"cgroup_paths"`
	}
	if at := slices.Index(os.Args, "--root"); at > 0 && at+1 < len(os.Args) {
		// The container's state goes with it, so it is read first. There may be
		// none, after a failed start.
		if raw, err := os.ReadFile(filepath.Join(os.Args[at+1], os.Args[len(os.Args)-1], "state.json")); err == nil {
			if err := json.Unmarshal(raw, &state); err != nil {
				return fmt.Errorf("the container's state: %w", err)
			}
		}
	}
	cmd := exec.Command(runc, os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	err := cmd.Run()
	for _, path := range state.CgroupPaths {
		if pod := filepath.Dir(path); strings.HasSuffix(pod, ".slice") && strings.Contains(filepath.Base(pod), "-pod") {
			// It stays while another container of the pod is in it.
			_ = syscall.Rmdir(pod)
		}
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		os.Exit(exit.ExitCode())
	}
	return err
}

// rewrite changes the runtime specification in file as mode says.
func rewrite(file, mode string) error {
	raw, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	out, err := change(raw, mode)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	return os.WriteFile(file, out, 0o600)
}

func change(raw []byte, mode string) ([]byte, error) {
	// What is not changed is kept as it is, also what is not known here.
	var spec, linux map[string]json.RawMessage
	if err := json.Unmarshal(raw, &spec); err != nil {
		return nil, err
	}
	if err := json.Unmarshal(spec["linux"], &linux); err != nil {
		return nil, fmt.Errorf("linux: %w", err)
	}
	var err error
	if mode != "plain" {
		var path string
		if err := json.Unmarshal(linux["cgroupsPath"], &path); err != nil {
			return nil, fmt.Errorf("cgroupsPath: %w", err)
		}
		if path = systemdPath(path); path != "" {
			if linux["cgroupsPath"], err = json.Marshal(path); err != nil {
				return nil, err
			}
		}
	}
	if mode == "plain" || mode == "both" {
		var resources map[string]json.RawMessage
		if err := json.Unmarshal(linux["resources"], &resources); err != nil {
			return nil, fmt.Errorf("resources: %w", err)
		}
		for _, limit := range []string{"memory", "cpu", "pids", "blockIO", "hugepageLimits", "unified"} {
			delete(resources, limit)
		}
		if linux["resources"], err = json.Marshal(resources); err != nil {
			return nil, err
		}
	}
	if spec["linux"], err = json.Marshal(linux); err != nil {
		return nil, err
	}
	return json.Marshal(spec)
}

// systemdPath is "" for a path that is not the kubelet's cgroupfs driver's.
func systemdPath(path string) string {
	parts := strings.Split(strings.Trim(path, "/"), "/")
	if len(parts) < 3 || len(parts) > 4 || parts[0] != "kubepods" {
		return ""
	}
	pod, id := parts[len(parts)-2], parts[len(parts)-1]
	dir, prefix := "/kubepods.slice", "kubepods"
	if len(parts) == 4 {
		prefix += "-" + parts[1]
		dir += "/" + prefix + ".slice"
	}
	return dir + "/" + prefix + "-" + strings.ReplaceAll(pod, "-", "_") + ".slice/cri-containerd-" + id + ".scope"
}
