// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"cmp"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

// Metadata is what the container runtime says of a pod: names for people, for
// the audit record and for the debug CLI. It is no evidence and decides
// nothing. Texts come from users by way of the API server; all are bounded, and
// hold no control characters.
type Metadata struct {
	UID       evidence.PodUID `json:"uid"`
	Name      string          `json:"name,omitempty"`
	Namespace string          `json:"namespace,omitempty"`
	// Labels are the pod's own, at most 64 of them, without those that the
	// kubelet adds. Nil if the sandbox is not known.
	Labels map[string]string `json:"labels,omitempty"`
	// Runtime is where this comes from: RuntimeContainerd or RuntimeCRIO.
	Runtime string `json:"runtime"`
	// SandboxID is the container id of the pod's newest sandbox, empty if not
	// known, and Created when that was made.
	SandboxID string    `json:"sandbox_id,omitempty"`
	Created   time.Time `json:"created,omitzero"`
	// NetnsPath is where the runtime keeps the sandbox's network namespace, as
	// the host sees it. Empty if HostNetwork, or if not known.
	NetnsPath   string `json:"netns_path,omitempty"`
	HostNetwork bool   `json:"host_network,omitempty"`
	// Containers are those that the runtime has a record of, which includes
	// ended ones until they are collected; without sandboxes; oldest first.
	Containers []Container `json:"containers,omitempty"`
}

// Container is one container of a pod, as the runtime knows it.
type Container struct {
	// ID is the runtime's: 64 hex digits, as in the name of its cgroup.
	ID string `json:"id"`
	// Name is the one in the pod's manifest.
	Name string `json:"name,omitempty"`
	// Image is what the runtime made it from.
	Image     string    `json:"image,omitempty"`
	SandboxID string    `json:"sandbox_id,omitempty"`
	Created   time.Time `json:"created,omitzero"`
}

// The values of Metadata.Runtime and RuntimeStatus.Runtime.
const (
	RuntimeContainerd = "containerd"
	RuntimeCRIO       = "cri-o"
)

// Bounds of what is remembered. A runtime that holds more (a node has some
// hundred pods, tests have had ten thousand) is shown in part, and the rest
// counted.
const (
	maxRecords       = 32768
	maxRecordsPerPod = 256
	maxPodLabels     = 64
	maxText          = 512 // bytes of one text
)

// entry is one container or sandbox of a runtime. Immutable once in a catalog.
type entry struct {
	runtime   string
	id        string
	sandbox   bool
	uid       evidence.PodUID
	pod       string
	namespace string
	name      string
	image     string
	sandboxID string
	created   time.Time
	labels    map[string]string // the pod's; of sandboxes only
	netns     string
	hostNet   bool
}

// catalog holds the records of all runtimes of the node.
type catalog struct {
	mu      sync.RWMutex
	byID    map[string]*entry
	byPod   map[evidence.PodUID][]*entry
	dropped uint64
}

func newCatalog() *catalog {
	return &catalog{byID: make(map[string]*entry), byPod: make(map[evidence.PodUID][]*entry)}
}

// put adds a record or replaces that of the same id. One that is beyond the
// bounds is counted, and left out.
func (c *catalog) put(r *entry) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if old := c.byID[r.id]; old != nil {
		c.unlink(old)
	}
	if len(c.byID) >= maxRecords || len(c.byPod[r.uid]) >= maxRecordsPerPod {
		c.dropped++
		return
	}
	c.byID[r.id] = r
	c.byPod[r.uid] = append(c.byPod[r.uid], r)
}

func (c *catalog) remove(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if old := c.byID[id]; old != nil {
		c.unlink(old)
	}
}

// unlink takes a record out. The caller holds mu.
func (c *catalog) unlink(r *entry) {
	delete(c.byID, r.id)
	rest := slices.DeleteFunc(c.byPod[r.uid], func(o *entry) bool { return o == r })
	if len(rest) == 0 {
		delete(c.byPod, r.uid)
		return
	}
	c.byPod[r.uid] = rest
}

// keepOnly removes a runtime's records that are not in the set.
func (c *catalog) keepOnly(runtime string, ids map[string]struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for id, r := range c.byID {
		if _, ok := ids[id]; !ok && r.runtime == runtime {
			c.unlink(r)
		}
	}
}

func (c *catalog) has(id string) bool {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.byID[id] != nil
}

func (c *catalog) counts(runtime string) (pods, containers int, dropped uint64) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	for _, entries := range c.byPod {
		if entries[0].runtime == runtime {
			pods++
			containers += len(entries)
		}
	}
	return pods, containers, c.dropped
}

func (c *catalog) metadata(uid evidence.PodUID) (Metadata, bool) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	records := c.byPod[uid]
	if len(records) == 0 {
		return Metadata{}, false
	}
	m := Metadata{UID: uid}
	var newest, sandbox *entry
	for _, r := range records {
		if newest == nil || r.created.After(newest.created) {
			newest = r
		}
		if r.sandbox {
			if sandbox == nil || r.created.After(sandbox.created) {
				sandbox = r
			}
			continue
		}
		m.Containers = append(m.Containers, r.container())
	}
	slices.SortFunc(m.Containers, func(a, b Container) int {
		return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.ID, b.ID))
	})
	m.Name, m.Namespace, m.Runtime = newest.pod, newest.namespace, newest.runtime
	if sandbox != nil {
		m.SandboxID, m.Created, m.NetnsPath, m.HostNetwork = sandbox.id, sandbox.created, sandbox.netns, sandbox.hostNet
		m.Name, m.Namespace, m.Runtime = sandbox.pod, sandbox.namespace, sandbox.runtime
		// Records are immutable, and so is what is handed out.
		m.Labels = sandbox.labels
	}
	return m, true
}

func (e *entry) container() Container {
	return Container{ID: e.id, Name: e.name, Image: e.image, SandboxID: e.sandboxID, Created: e.created}
}

// The labels by which kubelets tell a runtime whose a container is. The kubelet
// sets them over a pod's own of the same name.
const (
	labelPodName       = "io.kubernetes.pod.name"
	labelPodNamespace  = "io.kubernetes.pod.namespace"
	labelPodUID        = "io.kubernetes.pod.uid"
	labelContainerName = "io.kubernetes.container.name"
)

// identify takes from a container's labels whose it is; false if it is no pod's.
func (e *entry) identify(labels map[string]string) bool {
	e.uid = evidence.PodUID(text(labels[labelPodUID]))
	e.pod, e.namespace = text(labels[labelPodName]), text(labels[labelPodNamespace])
	e.name = text(labels[labelContainerName])
	return e.uid != "" && isID(e.id)
}

// podLabels are the labels that a pod's owner gave it, as far as the bounds
// allow, in the order of their keys.
func podLabels(labels map[string]string) map[string]string {
	keys := make([]string, 0, len(labels))
	for k := range labels {
		if !strings.HasPrefix(k, "io.kubernetes.") && !strings.HasPrefix(k, "io.cri-containerd") && k == text(k) {
			keys = append(keys, k)
		}
	}
	slices.Sort(keys)
	out := make(map[string]string, min(len(keys), maxPodLabels))
	for _, k := range keys[:min(len(keys), maxPodLabels)] {
		// Cloned: a key may be part of a large message.
		out[strings.Clone(k)] = text(labels[k])
	}
	return out
}

// text bounds a text and takes out what could act on a terminal.
func text(s string) string {
	if len(s) > maxText {
		s = s[:maxText]
	}
	s = strings.Clone(s)
	if utf8.ValidString(s) && !strings.ContainsFunc(s, notShown) {
		return s
	}
	s = strings.ToValidUTF8(s, "\uFFFD")
	return strings.Map(func(r rune) rune {
		if notShown(r) {
			return unicode.ReplacementChar
		}
		return r
	}, s)
}

func notShown(r rune) bool { return !unicode.IsPrint(r) }

// isID accepts the ids that Kubernetes's runtimes make. They are names of
// directories too, so nothing else will do.
func isID(s string) bool {
	if len(s) == 0 || len(s) > 128 {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if (c < '0' || c > '9') && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && c != '-' && c != '_' {
			return false
		}
	}
	return true
}

// find returns the pod and the whole id of the only container whose id begins
// with a text.
func (c *catalog) find(prefix string) (evidence.PodUID, string, bool) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if r := c.byID[prefix]; r != nil {
		return r.uid, r.id, true
	}
	if len(prefix) < 6 {
		return "", "", false
	}
	var found *entry
	for id, r := range c.byID {
		if strings.HasPrefix(id, prefix) {
			if found != nil {
				return "", "", false
			}
			found = r
		}
	}
	if found == nil {
		return "", "", false
	}
	return found.uid, found.id, true
}

func (c *catalog) named(namespace, name string) []evidence.PodUID {
	c.mu.RLock()
	defer c.mu.RUnlock()
	var out []evidence.PodUID
	for uid, records := range c.byPod {
		if r := records[0]; r.pod == name && (namespace == "" || r.namespace == namespace) {
			out = append(out, uid)
		}
	}
	return out
}
