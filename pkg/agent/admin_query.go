// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"github.com/latchkey-dev/latchkey/pkg/adminapi"
	"github.com/latchkey-dev/latchkey/pkg/cgroup"
	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

// What a query may be taken for: adminapi.Facts.Kind.
const (
	kindProcess    = "process"
	kindConnection = "connection"
	kindCgroup     = "cgroup"
	kindContainer  = "container"
	kindPod        = "pod"
)

// maxPID is the kernel's PID_MAX_LIMIT: a number beyond it is the beginning of a
// container's id, which can be digits alone.
const maxPID = 1 << 22

const queryForms = "a pid, ip:port, cgroup path, cgroup:ID, container id, pod UID or NAMESPACE/POD"

// subject is what a query was found to name.
type subject struct {
	kind  string
	steps []adminapi.Step
	// pid, connection and cgroup are those on the way; cgroup is a path below
	// the mount.
	pid        int
	connection *adminapi.Connection
	cgroup     string
	container  string
	// uid is empty if the way ends before a pod, and ended is set if the pod is
	// no more.
	uid   evidence.PodUID
	qos   string
	ended *endedPod
}

func (s *subject) step(what, value, source string) {
	s.steps = append(s.steps, adminapi.Step{What: what, Value: value, Source: source})
}

// resolve follows the evidence from what was asked to a pod, as far as it goes.
// Errors wrap adminapi.ErrInvalid or adminapi.ErrNotFound.
func (a *Agent) resolve(query string) (*subject, error) {
	s := &subject{}
	if query == "" {
		return nil, fmt.Errorf("%w: give %s", adminapi.ErrInvalid, queryForms)
	}
	if a.node == nil {
		return a.resolvePod(s, query)
	}
	end, endErr := netip.ParseAddrPort(query)
	pid, pidErr := strconv.Atoi(query)
	var err error
	switch {
	case strings.HasPrefix(query, "/"):
		err = a.resolvePath(s, query)
	case strings.HasPrefix(query, "cgroup:"):
		s.kind = kindCgroup
		id, perr := strconv.ParseUint(query[len("cgroup:"):], 10, 64)
		if perr != nil {
			return nil, fmt.Errorf("%w: %q: a cgroup id is a decimal number", adminapi.ErrInvalid, query)
		}
		if s.cgroup, err = a.node.resolver.Path(evidence.CgroupID(id)); err != nil {
			return nil, fmt.Errorf("%w: cgroup id %d: %w", adminapi.ErrNotFound, id, err)
		}
		s.step("cgroup", s.cgroup, "kernel, open_by_handle_at")
	case endErr == nil:
		err = a.resolveConnection(s, end)
	case pidErr == nil && pid <= maxPID:
		s.kind, s.pid = kindProcess, pid
		if pid <= 0 {
			return nil, fmt.Errorf("%w: pid %d: a process id is 1 or more", adminapi.ErrInvalid, pid)
		}
		if s.cgroup, err = a.node.mount.ProcessPath("", pid); err != nil {
			return nil, fmt.Errorf("%w: process %d: %w", adminapi.ErrNotFound, pid, err)
		}
		s.step("process", named(query, processName(pid)), "as asked, in the agent's pid namespace")
		s.step("cgroup", s.cgroup, "kernel, /proc/"+query+"/cgroup")
	default:
		return a.resolvePod(s, query)
	}
	if err != nil || s.cgroup == "" {
		return s, err
	}
	return s, a.podOfCgroup(s)
}

func (a *Agent) resolvePath(s *subject, query string) error {
	s.kind = kindCgroup
	below := strings.TrimSuffix(strings.TrimPrefix(query, strings.TrimSuffix(a.node.mount.Point, "/")), "/")
	id, err := a.node.resolver.ID(below)
	if err != nil {
		return fmt.Errorf("%w: no cgroup %s: %w", adminapi.ErrNotFound, below, err)
	}
	s.cgroup = below
	s.step("cgroup", below, "as asked")
	s.step("cgroup id", id.String(), "kernel, name_to_handle_at")
	return nil
}

func (a *Agent) resolveConnection(s *subject, end netip.AddrPort) error {
	c, ok := a.attestor.recent.find(end)
	if !ok {
		return fmt.Errorf("%w: no recent connection from %s (the last %d are remembered)", adminapi.ErrNotFound, end, maxRecent)
	}
	s.kind, s.connection = kindConnection, a.connection(end, c)
	s.step("connection", end.String(), "accepted "+c.at.UTC().Format("15:04:05"))
	s.step("finding", c.att.Finding.String(), "evidence rules")
	if c.att.Reason != "" {
		s.step("reason", string(c.att.Reason), "evidence rules")
	}
	conn := c.att.Connection
	if conn == (evidence.Connection{}) {
		return nil
	}
	s.pid = int(conn.TGID)
	s.step("process", fmt.Sprintf("%s, user %d", named(strconv.Itoa(s.pid), processName(s.pid)), conn.UID), "kernel, at connect")
	s.step("network namespace", fmt.Sprintf("inode %d, cookie %d", conn.NetnsInode, conn.NetnsCookie), "kernel, client socket")
	if conn.SocketCgroup != conn.TaskCgroup {
		if p, err := a.node.resolver.Path(conn.SocketCgroup); err == nil {
			s.step("socket's cgroup", p, "kernel, sk_cgrp_data")
		}
	}
	p, err := a.node.resolver.Path(conn.TaskCgroup)
	if err != nil {
		s.step("cgroup", "gone, was id "+conn.TaskCgroup.String(), "kernel, at connect")
		return nil
	}
	s.cgroup = p
	s.step("cgroup", p, "kernel, connecting task")
	return nil
}

// podOfCgroup ends the way: cgroup to container and pod.
func (a *Agent) podOfCgroup(s *subject) error {
	ref, err := a.node.root.Parse(s.cgroup)
	if errors.Is(err, cgroup.ErrNotPod) {
		s.step("pod", "none: outside "+a.node.root.Path(), "cgroup path")
		return nil
	}
	if err != nil {
		return err
	}
	s.uid, s.qos, s.container = ref.UID, string(ref.QoS), ref.ContainerID
	if s.container != "" {
		s.step("container", s.container, "cgroup path, for display")
	}
	info, ok := a.findPod(ref.UID)
	if ok && info.Netns != 0 {
		s.step("sandbox", fmt.Sprintf("process %d, network namespace %d", info.Sandbox, info.Netns), "/proc")
	}
	if !ok {
		if e, gone := a.admin.findEnded(func(e *endedPod) bool { return e.uid == ref.UID }); gone {
			s.ended = &e
		}
	}
	// The pod, not what is nested in it, is what the rest is about.
	if s.kind == kindPod {
		s.cgroup = ref.Path
	}
	return nil
}

var containerForm = regexp.MustCompile(`^(?:[a-z0-9.-]+://)?([0-9a-f]{12,64})$`)

// resolvePod takes a query for a pod's UID or name, or a container's id.
func (a *Agent) resolvePod(s *subject, query string) (*subject, error) {
	text := strings.ToLower(query)
	all := a.pods()
	var hits []adminapi.Pod
	for _, p := range all {
		if p.UID == text || p.Name != "" && (p.Namespace+"/"+p.Name == query || p.Name == query) {
			hits = append(hits, p)
		}
	}
	switch {
	case len(hits) == 1:
		return a.foundPod(s, hits[0])
	case len(hits) > 1:
		var names []string
		for _, p := range hits[:min(len(hits), 5)] {
			names = append(names, p.Namespace+"/"+p.Name+" ("+p.UID+")")
		}
		return nil, fmt.Errorf("%w: %d pods are called %q, give NAMESPACE/POD or the UID: %s", adminapi.ErrInvalid, len(hits), query, strings.Join(names, ", "))
	}
	if m := containerForm.FindStringSubmatch(text); m != nil && a.node != nil {
		found, err := a.findContainer(all, m[1])
		if err != nil {
			return nil, err
		}
		if found != "" {
			s.kind, s.cgroup = kindContainer, found
			s.step("container", m[1], "as asked")
			s.step("cgroup", found, "cgroup tree")
			return s, a.podOfCgroup(s)
		}
	}
	if e, ok := a.admin.findEnded(func(e *endedPod) bool {
		name := e.token.PodName
		return string(e.uid) == text || name != "" && (name == query || e.token.Subject.Namespace+"/"+name == query)
	}); ok {
		s.kind, s.uid, s.qos, s.ended = kindPod, e.uid, e.qos, &e
		s.step("pod", string(e.uid)+", ended "+e.at.UTC().Format("15:04:05"), "cgroup tree")
		return s, nil
	}
	if a.node == nil {
		return nil, fmt.Errorf("%w: this agent does not attest, so it knows no cgroups, and no pod called %q has asked it", adminapi.ErrNotFound, query)
	}
	return nil, fmt.Errorf("%w: %q is no pid, ip:port, cgroup path, cgroup:ID or container id, and no pod of this node has that UID or name "+
		"(a name is known once the pod has presented a token, or from the container runtime)", adminapi.ErrNotFound, query)
}

func (a *Agent) foundPod(s *subject, p adminapi.Pod) (*subject, error) {
	s.kind, s.uid, s.qos, s.cgroup = kindPod, evidence.PodUID(p.UID), p.QoS, p.Cgroup
	if p.Cgroup == "" {
		s.step("pod", p.UID, "the agent's cache")
		return s, nil
	}
	s.step("cgroup", p.Cgroup, "cgroup tree")
	return s, a.podOfCgroup(s)
}

// findContainer looks for a container's directory by its id or the beginning of
// it. Empty: there is none.
func (a *Agent) findContainer(all []adminapi.Pod, id string) (string, error) {
	found := ""
	for _, p := range all {
		entries, err := os.ReadDir(a.node.mount.Join(p.Cgroup))
		if err != nil {
			continue // ended meanwhile
		}
		for _, e := range entries {
			if !e.IsDir() {
				continue
			}
			at := path.Join(p.Cgroup, e.Name())
			ref, err := a.node.root.Parse(at)
			if err != nil || ref.ContainerID == "" || !strings.HasPrefix(ref.ContainerID, id) {
				continue
			}
			if found != "" {
				return "", fmt.Errorf("%w: several containers begin with %s, give more of the id", adminapi.ErrInvalid, id)
			}
			found = at
		}
	}
	return found, nil
}

// whois answers adminapi.PathWhois.
func (a *Agent) whois(query string) (adminapi.Whois, error) {
	s, err := a.resolve(query)
	if err != nil {
		return adminapi.Whois{}, err
	}
	who := adminapi.Whois{Query: query, Steps: s.steps}
	if s.uid != "" {
		pod := a.podOf(s)
		who.Pod = &pod
	}
	return who, nil
}

// podOf describes the pod that a query led to.
func (a *Agent) podOf(s *subject) adminapi.Pod {
	if s.ended != nil {
		return a.describeEnded(*s.ended)
	}
	at := s.cgroup
	if a.node != nil {
		if dir, ok := a.node.root.PodDir(at); ok {
			at = dir
		}
	}
	return a.describe(s.uid, at, s.qos, a.cached())
}

// connection puts a remembered connection into words.
func (a *Agent) connection(end netip.AddrPort, c recent) *adminapi.Connection {
	conn := c.att.Connection
	out := &adminapi.Connection{
		Client: end.String(), Accepted: c.at, Finding: c.att.Finding.String(), Reason: string(c.att.Reason),
		PodUID: string(c.att.Pod), PID: conn.TGID, UID: conn.UID, NetnsInode: uint32(conn.NetnsInode), UnknownNetns: c.att.UnknownNetns,
	}
	if conn != (evidence.Connection{}) && a.node != nil {
		out.TaskCgroup = a.cgroupName(conn.TaskCgroup)
		out.SocketCgroup = a.cgroupName(conn.SocketCgroup)
	}
	return out
}

func (a *Agent) cgroupName(id evidence.CgroupID) string {
	if p, err := a.node.resolver.Path(id); err == nil {
		return p
	}
	return "gone, was id " + id.String()
}

// processName is a process's own name for itself, made printable; empty if it
// is gone.
func processName(pid int) string {
	data, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "comm"))
	if err != nil {
		return ""
	}
	name := strings.TrimSpace(string(data))
	if name == "exe" {
		// It executed itself again; that name says nothing.
		if target, err := os.Readlink(filepath.Join("/proc", strconv.Itoa(pid), "exe")); err == nil {
			name = filepath.Base(target)
		}
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, name[:min(len(name), 64)])
}

func named(id, name string) string {
	if name == "" {
		return id
	}
	return id + " (" + name + ")"
}
