// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"net/netip"

	"github.com/latchkey-dev/latchkey/pkg/adminapi"
	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

// facts gathers what the agent knows of a query. It concludes nothing: that is
// the asker's part.
func (a *Agent) facts(query string) (adminapi.Facts, error) {
	s, err := a.resolve(query)
	if err != nil {
		return adminapi.Facts{}, err
	}
	f := adminapi.Facts{
		Query: query, Kind: s.kind, Status: a.status(), Connection: s.connection, Cgroup: s.cgroup, Container: s.container,
	}
	if s.pid != 0 {
		f.Process = &adminapi.Process{PID: s.pid, Name: processName(s.pid)}
	}
	all, err := a.denials()
	if err != nil {
		return f, err
	}
	if s.uid == "" {
		for _, d := range all {
			if s.connection != nil && s.connection.Client == d.Peer || s.cgroup != "" && d.Cgroup == s.cgroup {
				f.Denials = append(f.Denials, d.Denial)
			}
		}
		return f, nil
	}
	uid := string(s.uid)
	pod := a.podOf(s)
	f.Pod = &pod
	if info, ok := a.findPod(s.uid); ok {
		f.PodSeen = timeOrNil(info.FirstSeen)
		f.Sandbox, f.Netns, f.HostNetwork = info.Sandbox, uint32(info.Netns), info.HostNet
	}
	if last, ok := a.observer.last(s.uid); ok && last.Token.Subject.PodUID == s.uid {
		f.TokenJTI, f.TokenExpires = last.Token.JTI, timeOrNil(last.Token.Expiry)
	}
	for _, e := range a.cacheEntries() {
		if e.PodUID == uid {
			f.Cache = append(f.Cache, e)
		}
	}
	for _, d := range all {
		// What an unverified token says would let anybody blame this pod.
		if d.PodUID == uid || d.taskPod == uid || d.TokenVerified && d.TokenPodUID == uid {
			f.Denials = append(f.Denials, d.Denial)
		}
	}
	f.LastConnection = a.lastConnection(func(att *evidence.Attestation) bool { return att.Pod == s.uid })
	return f, nil
}

// lastConnection gives the newest of the remembered connections that match.
func (a *Agent) lastConnection(match func(*evidence.Attestation) bool) *adminapi.Connection {
	r := &a.attestor.recent
	var newest recent
	var end netip.AddrPort
	r.mu.Lock()
	for at, c := range r.byEnd {
		if match(&c.att) && c.at.After(newest.at) {
			newest, end = c, at
		}
	}
	r.mu.Unlock()
	if newest.at.IsZero() {
		return nil
	}
	return a.connection(end, newest)
}

func badSubject(text string) error {
	return fmt.Errorf("%w: %q: a subject is NAMESPACE/SERVICEACCOUNT or a pod UID", adminapi.ErrInvalid, text)
}
