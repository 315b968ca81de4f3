// SPDX-License-Identifier: Apache-2.0

package diagnose

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/pkg/explain"
)

// The webhook's variables.
const (
	envURI       = "AWS_CONTAINER_CREDENTIALS_FULL_URI"
	envTokenFile = "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"
)

// preferred are settings that SDKs look at before pod identity.
func preferred() []string {
	return []string{"AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"}
}

const (
	maxEnviron = 1 << 20
	maxToken   = 16 << 10
)

// Processes lists the processes of a cgroup and of those below it, a
// directory's path.
func Processes(dir string) ([]int, error) {
	var out []int
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			if path != dir && (errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV)) {
				return nil
			}
			return err
		}
		if e.IsDir() || e.Name() != "cgroup.procs" {
			return nil
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return nil // gone, or threaded: its parent lists it
		}
		for _, line := range strings.Fields(string(data)) {
			if pid, err := strconv.Atoi(line); err == nil && pid > 0 {
				out = append(out, pid)
			}
		}
		return nil
	})
	slices.Sort(out)
	return slices.Compact(out), err
}

// maxProcesses bounds how many processes of a pod are looked at.
const maxProcesses = 256

// FindInjection looks at what a pod's processes were given when they started.
// The one with the webhook's variables counts, else the first that can be read;
// nil if none can. procfs is /proc if empty. The token is returned apart, so
// that nothing that is shown can hold it.
func FindInjection(procfs string, pids []int) (found *explain.Injection, token string) {
	if procfs == "" {
		procfs = "/proc"
	}
	for _, pid := range pids[:min(len(pids), maxProcesses)] {
		env, err := environ(procfs, pid)
		if err != nil || len(env) == 0 {
			continue
		}
		j := &explain.Injection{PID: pid, URI: env[envURI], TokenFile: env[envTokenFile]}
		if j.URI == "" && found != nil {
			continue
		}
		for _, name := range preferred() {
			if env[name] != "" {
				j.Other = name
				break
			}
		}
		j.Proxy = proxyFor(env, j.URI)
		if found = j; j.URI != "" {
			break
		}
	}
	if found == nil || found.TokenFile == "" {
		return found, ""
	}
	token, err := readInside(procfs, found.PID, found.TokenFile)
	if err != nil {
		found.TokenError = err.Error()
	}
	return found, token
}

func environ(procfs string, pid int) (map[string]string, error) {
	f, err := os.Open(filepath.Join(procfs, strconv.Itoa(pid), "environ"))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxEnviron))
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	for _, line := range bytes.Split(data, []byte{0}) {
		if name, value, ok := strings.Cut(string(line), "="); ok {
			out[name] = value
		}
	}
	return out, nil
}

// proxyFor names the variable that sends requests for the URI elsewhere.
func proxyFor(env map[string]string, uri string) string {
	u, err := url.Parse(uri)
	if err != nil || u.Hostname() == "" {
		return ""
	}
	name := ""
	for _, n := range []string{"HTTP_PROXY", "http_proxy"} {
		if env[n] != "" {
			name = n
		}
	}
	if name == "" {
		return ""
	}
	host := u.Hostname()
	addr, _ := netip.ParseAddr(host)
	for entry := range strings.SplitSeq(env["NO_PROXY"]+","+env["no_proxy"], ",") {
		entry = strings.Trim(strings.TrimSpace(entry), "[]")
		if entry == "*" || entry == host {
			return ""
		}
		if p, err := netip.ParsePrefix(entry); err == nil && addr.IsValid() && p.Contains(addr) {
			return ""
		}
	}
	return name
}

// readInside reads a file as a process of a pod sees it. The pod chooses the
// path, and what lies there: no link in it may lead out of the pod's own root,
// and nothing but a file is read.
func readInside(procfs string, pid int, path string) (string, error) {
	root, err := unix.Open(filepath.Join(procfs, strconv.Itoa(pid), "root"), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("open the process's root: %w", err)
	}
	defer unix.Close(root)
	fd, err := unix.Openat2(root, strings.TrimPrefix(path, "/"), &unix.OpenHow{
		Flags: unix.O_RDONLY | unix.O_NONBLOCK | unix.O_CLOEXEC | unix.O_NOCTTY, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return "", &fs.PathError{Op: "open", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", err
	}
	if !info.Mode().IsRegular() {
		return "", fmt.Errorf("%s is no file", path)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxToken+1))
	return string(data), err
}

// Leaf gives a cgroup of a pod that holds processes, as a new one of the pod's
// would be made in; empty if there is none.
func Leaf(dir string) string {
	leaf := ""
	_ = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || leaf != "" || !e.IsDir() {
			return nil
		}
		if data, err := os.ReadFile(filepath.Join(path, "cgroup.procs")); err == nil && len(data) > 0 {
			leaf = path
		}
		return nil
	})
	return leaf
}
