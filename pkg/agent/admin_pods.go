// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"net/http"

	"github.com/latchkey-dev/latchkey/pkg/adminapi"
	"github.com/latchkey-dev/latchkey/pkg/evidence"
	"github.com/latchkey-dev/latchkey/pkg/pods"
)

// podNames is what the container runtime says of pods; *pods.Runtime is one.
type podNames interface {
	Metadata(evidence.PodUID) (pods.Metadata, bool)
}

// pods joins what the kernel says of the node with what the cache holds.
func (a *Agent) pods() []adminapi.Pod {
	cached := a.cached()
	if a.node != nil {
		list := a.node.index.List()
		out := make([]adminapi.Pod, 0, len(list))
		for _, info := range list {
			out = append(out, a.describe(info.UID, info.Path, string(info.QoS), cached))
		}
		return out
	}
	// Without the kernel's list: the pods that asked.
	out := make([]adminapi.Pod, 0, len(cached))
	for uid := range cached {
		out = append(out, a.describe(uid, "", "", cached))
	}
	return out
}

func (a *Agent) describe(uid evidence.PodUID, cgroupPath, qos string, cached map[evidence.PodUID]cachedPod) adminapi.Pod {
	p := adminapi.Pod{UID: string(uid), Cgroup: cgroupPath, QoS: qos, Credentials: "none"}
	if a.admin.names != nil {
		if m, ok := a.admin.names.Metadata(uid); ok {
			p.Namespace, p.Name = m.Namespace, m.Name
			for _, c := range m.Containers {
				p.Containers = append(p.Containers, c.Name)
			}
		}
	}
	if c, ok := cached[uid]; ok {
		p.Namespace, p.ServiceAccount = c.namespace, c.serviceAccount
		p.Role, p.Association, p.Credentials, p.Expires = c.role, c.association, c.state, c.expires
		if !c.lastUsed.IsZero() {
			used := c.lastUsed
			p.LastAsked, p.Verdict = &used, string(evidence.ReasonServed)
		}
	}
	if last, ok := a.observer.last(uid); ok {
		if s := last.Token.Subject; s.PodUID != "" {
			p.Namespace, p.ServiceAccount = s.Namespace, s.ServiceAccount
			if last.Token.PodName != "" {
				p.Name = last.Token.PodName
			}
		}
		if p.LastAsked == nil || last.At.After(*p.LastAsked) {
			at := last.At
			p.LastAsked, p.Verdict = &at, string(last.Reason)
			switch {
			case last.Shadow:
				p.Verdict = "served despite " + p.Verdict
			case last.Status != http.StatusOK:
				p.Verdict = fmt.Sprintf("refused %d %s", last.Status, last.Reason)
			}
		}
	}
	return p
}

// describeEnded describes a pod that is no more.
func (a *Agent) describeEnded(e endedPod) adminapi.Pod {
	p := a.describe(e.uid, e.path, e.qos, nil)
	p.Ended = true
	if s := e.token.Subject; s.PodUID != "" {
		p.Namespace, p.ServiceAccount, p.Name = s.Namespace, s.ServiceAccount, e.token.PodName
	}
	return p
}

func (a *Agent) findPod(uid evidence.PodUID) (pods.Info, bool) {
	if a.node == nil {
		return pods.Info{}, false
	}
	for _, info := range a.node.index.List() {
		if info.UID == uid {
			return info, true
		}
	}
	return pods.Info{}, false
}
