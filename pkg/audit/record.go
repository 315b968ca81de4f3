// SPDX-License-Identifier: Apache-2.0

// Package audit writes one line of JSON for every credential that the agent
// issued or refused, and remembers the recent refusals for people.
//
// Whoever answers a pod hands over a Record, which is copied into a bounded
// queue: no answer waits for a disk, and nothing is allocated or encoded while
// a pod waits. What does not fit is counted, and the next line says how much is
// missing before it. docs/audit.md describes the line.
//
// Nothing here can hold a secret or a token, by type.
package audit

import (
	"net/netip"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

// Record is what became of one request for credentials.
type Record struct {
	// Time is when the request had been read, Latency until its answer was
	// handed over for writing.
	Time    time.Time
	Latency time.Duration
	// Status is the HTTP status sent; 200 is the only one with credentials.
	Status int
	// Reason is evidence.ReasonServed, or what was refused for, or would have
	// been in enforce mode.
	Reason evidence.Reason
	// Shadow: issued although enforce mode would have refused.
	Shadow bool
	// Hit: issued from the cache.
	Hit bool
	// Attestation is the kernel's word about who connected.
	Attestation evidence.Attestation
	// Token is what the token says. Unless it is Verified, or EKS Auth accepted
	// it (Status 200), it is no more than a claim.
	Token evidence.Token
	// Role is the ARN of the assumed-role session, Association the id of what
	// gave it. Empty if refused.
	Role, Association string
	// Peer is the client's end of the connection.
	Peer netip.AddrPort
	// Told is the text that the client was given instead of credentials.
	Told string
	// Err is the cause of a refusal, often nil.
	Err error

	// Task is what is known of the connecting task beyond the attestation.
	Task Task
}

// Task describes the connecting task for people; it decides nothing. It is
// looked up after the answer (Config.Enrich), and may be empty.
type Task struct {
	// Cgroup is the path of Attestation.Connection.TaskCgroup, Pod the pod that
	// it is below, also where the attestation names no single pod.
	Cgroup string
	Pod    evidence.PodUID
	// ContainerID is read from the path.
	ContainerID string
	// PodName, Namespace and Container are the container runtime's.
	PodName, Namespace, Container string
	// Process is the process's name for itself, which it may choose. It is known
	// of refusals only, and not in the line.
	Process string
}

// Issued tells whether the client was given credentials.
func (r *Record) Issued() bool { return r.Status == 200 }

// established tells whether somebody vouches for what the token says.
func (r *Record) established() bool { return r.Token.Verified || r.Issued() }

// Limits of what is written of one text, in bytes: a line must fit a datagram.
const (
	maxText = 256
	maxTold = 1024
)

// Values of "verdict".
const (
	verdictIssued  = "issued"
	verdictRefused = "refused"
)

// AppendJSON appends the record as one JSON object without a newline.
func (r *Record) AppendJSON(b []byte) []byte { return r.append(b, 0, 0) }

// append writes the object. dropped is how many records are missing before it,
// sampled for how many hits it stands.
func (r *Record) append(b []byte, dropped uint64, sampled int) []byte {
	o := object{b: append(b, '{')}
	o.key("time")
	o.b = append(o.b, '"')
	o.b = r.Time.UTC().AppendFormat(o.b, "2006-01-02T15:04:05.000000Z")
	o.b = append(o.b, '"')
	o.text("type", "audit")
	verdict := verdictRefused
	if r.Issued() {
		verdict = verdictIssued
	}
	o.text("verdict", verdict)
	o.text("reason", string(r.Reason))
	if r.Shadow {
		o.bool("shadow", true)
	}
	o.int("status", int64(r.Status))
	if r.Issued() {
		cache := "miss"
		if r.Hit {
			cache = "hit"
		}
		o.text("cache", cache)
	}
	o.int("latency_us", r.Latency.Microseconds())
	r.appendPod(&o)
	o.text("role", r.Role)
	o.text("session", Session(r.Role))
	o.text("association", r.Association)
	r.appendToken(&o)
	o.text("finding", r.Attestation.Finding.String())
	c := &r.Attestation.Connection
	o.uint("cgroup_id", uint64(c.TaskCgroup))
	if c.SocketCgroup != c.TaskCgroup {
		o.uint("socket_cgroup_id", uint64(c.SocketCgroup))
	}
	o.text("cgroup", r.Task.Cgroup)
	o.uint("netns_cookie", uint64(c.NetnsCookie))
	o.uint("netns_inode", uint64(c.NetnsInode))
	if c.TGID != 0 {
		o.uint("pid", uint64(c.TGID))
		o.key("uid") // 0 is a user as well
		o.b = strconv.AppendUint(o.b, uint64(c.UID), 10)
	}
	if r.Peer.IsValid() {
		o.key("peer")
		o.b = append(o.b, '"')
		o.b = r.Peer.AppendTo(o.b)
		o.b = append(o.b, '"')
	}
	if !r.Issued() {
		o.textMax("told", r.Told, maxTold)
		if r.Err != nil {
			o.textMax("error", r.Err.Error(), maxTold)
		}
	}
	if sampled > 1 {
		o.int("sampled", int64(sampled))
	}
	o.uint("dropped", dropped)
	return append(o.b, '}')
}

// appendPod writes the pod that the kernel saw connecting, or, where it saw no
// single one, that of the connecting task. The names are the token's only if
// that is this pod's and established, and else the runtime's.
func (r *Record) appendPod(b *object) {
	a := &r.Attestation
	key, uid := "pod", a.Pod
	if uid == "" {
		key, uid = "task_pod", r.Task.Pod
	}
	if uid == "" && r.Task.ContainerID == "" {
		return
	}
	o := b.object(key)
	o.text("uid", string(uid))
	name, namespace := r.Task.PodName, r.Task.Namespace
	own := r.established() && a.Pod != "" && r.Token.Subject.PodUID == a.Pod
	if own {
		namespace = r.Token.Subject.Namespace
		if r.Token.PodName != "" {
			name = r.Token.PodName
		}
	}
	o.text("name", name)
	o.text("namespace", namespace)
	if own {
		o.text("service_account", r.Token.Subject.ServiceAccount)
	}
	o.text("container", r.Task.Container)
	o.text("container_id", r.Task.ContainerID)
	b.end(o)
}

// appendToken writes what the token says, under a name that tells whether
// anybody vouches for it.
func (r *Record) appendToken(b *object) {
	t := &r.Token
	if t.Subject == (evidence.Subject{}) && t.JTI == "" && t.PodName == "" {
		return
	}
	key := "claimed_token"
	if r.established() {
		key = "token"
	}
	o := b.object(key)
	switch {
	case t.Verified:
		o.text("verified_by", "keys")
	case r.Issued():
		o.text("verified_by", "upstream")
	}
	o.text("pod_uid", string(t.Subject.PodUID))
	o.text("pod_name", t.PodName)
	o.text("namespace", t.Subject.Namespace)
	o.text("service_account", t.Subject.ServiceAccount)
	o.text("node", t.Node)
	o.text("jti", t.JTI)
	b.end(o)
}

// Session is the session name in the ARN of an assumed role
// (arn:aws:sts::ACCOUNT:assumed-role/ROLE/SESSION), empty if there is none.
func Session(arn string) string {
	_, rest, ok := strings.Cut(arn, ":assumed-role/")
	if !ok {
		return ""
	}
	_, session, _ := strings.Cut(rest, "/")
	return session
}

// object writes a JSON object by hand: the fields are known, and encoding/json
// would allocate for each of them.
type object struct{ b []byte }

func (o *object) key(k string) {
	if n := len(o.b); n > 0 && o.b[n-1] != '{' {
		o.b = append(o.b, ',')
	}
	o.b = append(o.b, '"')
	o.b = append(o.b, k...)
	o.b = append(o.b, '"', ':')
}

// text writes a text, and nothing if it is empty.
func (o *object) text(k, v string) { o.textMax(k, v, maxText) }

func (o *object) textMax(k, v string, most int) {
	if v == "" {
		return
	}
	o.key(k)
	o.b = appendString(o.b, clip(v, most))
}

func (o *object) int(k string, v int64) {
	o.key(k)
	o.b = strconv.AppendInt(o.b, v, 10)
}

// uint writes a number, and nothing if it is zero: not known.
func (o *object) uint(k string, v uint64) {
	if v == 0 {
		return
	}
	o.key(k)
	if v > 1<<53 {
		// Readers that keep numbers as floating point would change an id.
		o.b = append(o.b, '"')
		o.b = strconv.AppendUint(o.b, v, 10)
		o.b = append(o.b, '"')
		return
	}
	o.b = strconv.AppendUint(o.b, v, 10)
}

func (o *object) bool(k string, v bool) {
	o.key(k)
	o.b = strconv.AppendBool(o.b, v)
}

func (o *object) object(k string) *object {
	o.key(k)
	o.b = append(o.b, '{')
	return o
}

func (o *object) end(*object) { o.b = append(o.b, '}') }

// clip shortens a text to a number of bytes, between two characters.
func clip(s string, most int) string {
	if len(s) <= most {
		return s
	}
	for most > 0 && !utf8.RuneStart(s[most]) {
		most--
	}
	return s[:most]
}

const hex = "0123456789abcdef"

// appendString quotes a text of any origin: what comes out is valid UTF-8, in
// one line, and cannot move the cursor of a terminal.
func appendString(b []byte, s string) []byte {
	b = append(b, '"')
	for i := 0; i < len(s); {
		c := s[i]
		if c < utf8.RuneSelf {
			switch {
			case c == '"' || c == '\\':
				b = append(b, '\\', c)
			case c < ' ' || c == 0x7f:
				b = append(b, '\\', 'u', '0', '0', hex[c>>4], hex[c&15])
			default:
				b = append(b, c)
			}
			i++
			continue
		}
		r, size := utf8.DecodeRuneInString(s[i:])
		switch {
		case r == utf8.RuneError && size == 1:
			b = append(b, `\ufffd`...)
		case r >= 0x80 && r <= 0x9f, r == 0x2028, r == 0x2029, r >= 0x200e && r <= 0x200f, r >= 0x202a && r <= 0x202e, r >= 0x2066 && r <= 0x2069:
			// Control characters, line separators, and what reverses the
			// direction of a line.
			b = append(b, '\\', 'u', hex[r>>12&15], hex[r>>8&15], hex[r>>4&15], hex[r&15])
		default:
			b = append(b, s[i:i+size]...)
		}
		i += size
	}
	return append(b, '"')
}
