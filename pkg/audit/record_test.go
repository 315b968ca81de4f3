// SPDX-License-Identifier: Apache-2.0

package audit

import (
	"bytes"
	"encoding/json"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

const podA, podB = "6a5f4f3e-0000-4000-8000-00000000000a", "6a5f4f3e-0000-4000-8000-00000000000b"

// issued is a pod that got what is its own.
func issued() Record {
	return Record{
		Time: time.Date(2026, 11, 21, 22, 3, 4, 567891000, time.UTC), Latency: 1234567 * time.Nanosecond,
		Status: 200, Reason: evidence.ReasonServed, Hit: true,
		Attestation: evidence.Attestation{
			Finding: evidence.FindingPod, Pod: podA,
			Connection: evidence.Connection{TaskCgroup: 5001, SocketCgroup: 5001, NetnsCookie: 42, NetnsInode: 4026532001, TGID: 777, UID: 0},
		},
		Token: evidence.Token{
			Subject: evidence.Subject{PodUID: podA, Namespace: "shop", ServiceAccount: "cart"},
			PodName: "cart-0", Node: "n1", JTI: "jti-1", Verified: true,
		},
		Role: "arn:aws:sts::111122223333:assumed-role/cart/eks-cart-0-abc", Association: "a-1",
		Peer: netip.MustParseAddrPort("10.88.0.2:41234"),
		Task: Task{Cgroup: "/kubepods/pod" + podA + "/c1", Pod: podA, ContainerID: "c1", Container: "app", PodName: "runtime-name", Namespace: "runtime-ns"},
	}
}

// stolen is pod A with pod B's token.
func stolen() Record {
	r := issued()
	r.Status, r.Reason, r.Hit, r.Role, r.Association = 403, evidence.ReasonPodMismatch, false, "", ""
	r.Token.Subject = evidence.Subject{PodUID: podB, Namespace: "bank", ServiceAccount: "teller"}
	r.Token.PodName, r.Token.JTI = "teller-0", "jti-b"
	r.Told, r.Err = "Access Denied. Another pod's.", errors.New("cause")
	return r
}

func decode(t *testing.T, line []byte) map[string]any {
	t.Helper()
	var m map[string]any
	if err := json.Unmarshal(line, &m); err != nil {
		t.Fatalf("%v: %s", err, line)
	}
	return m
}

func TestRecordIsOneKnownLine(t *testing.T) {
	for _, c := range []struct {
		name    string
		record  func() Record
		dropped uint64
		sampled int
		want    string
	}{
		{"issued", issued, 0, 1,
			`{"time":"2026-11-21T22:03:04.567891Z","type":"audit","verdict":"issued","reason":"served","status":200,"cache":"hit","latency_us":1234,` +
				`"pod":{"uid":"` + podA + `","name":"cart-0","namespace":"shop","service_account":"cart","container":"app","container_id":"c1"},` +
				`"role":"arn:aws:sts::111122223333:assumed-role/cart/eks-cart-0-abc","session":"eks-cart-0-abc","association":"a-1",` +
				`"token":{"verified_by":"keys","pod_uid":"` + podA + `","pod_name":"cart-0","namespace":"shop","service_account":"cart","node":"n1","jti":"jti-1"},` +
				`"finding":"pod","cgroup_id":5001,"cgroup":"/kubepods/pod` + podA + `/c1","netns_cookie":42,"netns_inode":4026532001,"pid":777,"uid":0,"peer":"10.88.0.2:41234"}`},
		{"refused", stolen, 3, 0,
			`{"time":"2026-11-21T22:03:04.567891Z","type":"audit","verdict":"refused","reason":"pod_mismatch","status":403,"latency_us":1234,` +
				`"pod":{"uid":"` + podA + `","name":"runtime-name","namespace":"runtime-ns","container":"app","container_id":"c1"},` +
				`"token":{"verified_by":"keys","pod_uid":"` + podB + `","pod_name":"teller-0","namespace":"bank","service_account":"teller","node":"n1","jti":"jti-b"},` +
				`"finding":"pod","cgroup_id":5001,"cgroup":"/kubepods/pod` + podA + `/c1","netns_cookie":42,"netns_inode":4026532001,"pid":777,"uid":0,"peer":"10.88.0.2:41234",` +
				`"told":"Access Denied. Another pod's.","error":"cause","dropped":3}`},
		{"nothing known", func() Record {
			return Record{Time: issued().Time, Status: 503, Reason: evidence.ReasonNoEvidence}
		}, 0, 0,
			`{"time":"2026-11-21T22:03:04.567891Z","type":"audit","verdict":"refused","reason":"no_evidence","status":503,"latency_us":0,"finding":"none"}`},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := c.record()
			got := r.append(nil, c.dropped, c.sampled)
			decode(t, got)
			if string(got) != c.want {
				t.Errorf("\n got %s\nwant %s", got, c.want)
			}
		})
	}
}

// What nobody vouches for is called claimed, and names nobody.
func TestClaimsAreCalledClaims(t *testing.T) {
	r := stolen()
	r.Reason, r.Status = evidence.ReasonTokenSignature, 400
	r.Token.Verified = false
	r.Token.Subject.PodUID = podA // it claims to be the pod that it comes from
	r.Task.PodName, r.Task.Namespace = "", ""
	m := decode(t, r.AppendJSON(nil))
	if m["token"] != nil {
		t.Errorf("an unverified token of a refused request is called token: %v", m)
	}
	claimed, _ := m["claimed_token"].(map[string]any)
	if claimed["namespace"] != "bank" || claimed["verified_by"] != nil {
		t.Errorf("claimed_token: %v", claimed)
	}
	pod, _ := m["pod"].(map[string]any)
	if pod["uid"] != podA || pod["name"] != nil || pod["namespace"] != nil || pod["service_account"] != nil {
		t.Errorf("the pod took names from a token that nobody vouches for: %v", pod)
	}
}

// Without keys EKS Auth vouches for a token by giving credentials for it.
func TestUpstreamVouches(t *testing.T) {
	r := issued()
	r.Token.Verified = false
	m := decode(t, r.AppendJSON(nil))
	token, _ := m["token"].(map[string]any)
	if token["verified_by"] != "upstream" {
		t.Errorf("token: %v", token)
	}
	r.Status = 403
	if m := decode(t, r.AppendJSON(nil)); m["token"] != nil {
		t.Errorf("refused, and yet vouched for: %v", m["token"])
	}
}

// Where the kernel saw no single pod, the task's is shown as what it is.
func TestTaskPodIsNotThePod(t *testing.T) {
	r := stolen()
	r.Attestation = evidence.Attestation{Finding: evidence.FindingContradictory, Reason: evidence.ReasonTwoPods, Connection: r.Attestation.Connection}
	m := decode(t, r.AppendJSON(nil))
	if m["pod"] != nil {
		t.Errorf("pod: %v", m["pod"])
	}
	if p, _ := m["task_pod"].(map[string]any); p["uid"] != podA {
		t.Errorf("task_pod: %v", m["task_pod"])
	}
}

func TestSession(t *testing.T) {
	for arn, want := range map[string]string{
		"arn:aws:sts::111122223333:assumed-role/r/s":    "s",
		"arn:aws-cn:sts::111122223333:assumed-role/r/s": "s",
		"arn:aws:iam::111122223333:role/r":              "",
		"arn:aws:sts::111122223333:assumed-role/r":      "",
		"": "",
	} {
		if got := Session(arn); got != want {
			t.Errorf("Session(%q) = %q, want %q", arn, got, want)
		}
	}
}

// Whatever a stranger made a text of: one line, valid, printable, no longer than
// allowed, and of the same meaning as far as it goes.
func FuzzRecord(f *testing.F) {
	f.Add("shop", "told", "error", uint64(1)<<60)
	f.Add("a\x1b[2Jb\n\r\t\"\\\x7f", "\u202eevil\u2028", "\xff\xfe\xc3", uint64(0))
	f.Add(strings.Repeat("é", maxText), strings.Repeat("x", 3000), "\u0085", uint64(7))
	f.Fuzz(func(t *testing.T, name, told, cause string, id uint64) {
		r := stolen()
		r.Token.Subject.Namespace, r.Token.JTI, r.Task.Container = name, name, name
		r.Attestation.Connection.TaskCgroup = evidence.CgroupID(id)
		r.Told, r.Err = told, errors.New(cause)
		line := r.AppendJSON(nil)
		if !utf8.Valid(line) || bytes.ContainsFunc(line, unicode.IsControl) {
			t.Errorf("not fit to be shown: %q", line)
		}
		m := decode(t, line)
		token := m["token"].(map[string]any)
		want := strings.ToValidUTF8(clip(name, maxText), "\ufffd")
		got, _ := token["namespace"].(string)
		if utf8.ValidString(name) && got != want {
			t.Errorf("namespace %q became %q", name, got)
		}
		if len(got) > 3*maxText {
			t.Errorf("%d bytes of a name", len(got))
		}
	})
}
