// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"bufio"
	"cmp"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

// ContainerCgroup is a directory of a pod's cgroup that is named as a runtime
// names those of containers. A container that may write to its cgroup mount can
// make such directories too: for display.
type ContainerCgroup struct {
	// ID is the container's, read from the name.
	ID string `json:"id"`
	// Path is below the cgroup2 mount.
	Path string `json:"cgroup_path"`
	// CgroupID is zero if the directory went away meanwhile.
	CgroupID evidence.CgroupID `json:"cgroup_id,omitempty"`
	// Processes counts those directly in it, at most 256 of them.
	Processes int `json:"processes"`
	// PID is the oldest of them, 0 if none can be seen, and Started when it was
	// started, by the kernel's clock.
	PID     int       `json:"pid,omitempty"`
	Started time.Time `json:"started,omitzero"`
}

// Find returns the pod that lives and has the UID; false if there is none.
func (x *Index) Find(uid evidence.PodUID) (Info, bool) {
	for _, p := range x.snapshot() {
		if p.UID == uid {
			return x.info(p), true
		}
	}
	return Info{}, false
}

// Containers lists the containers of a pod that have a cgroup now, the oldest
// first; nil if the pod does not live. It reads the cgroup tree and /proc, so it
// is for people's questions.
func (x *Index) Containers(uid evidence.PodUID) []ContainerCgroup {
	pod, ok := x.Find(uid)
	if !ok {
		return nil
	}
	d, err := os.Open(x.cfg.Mount.Join(pod.Path))
	if err != nil {
		return nil
	}
	defer d.Close()
	boot := x.bootTime()
	var out []ContainerCgroup
	// Names, not entries: a control file of the cgroup costs no stat call.
	names, err := d.Readdirnames(maxRecordsPerPod * 4)
	if err != nil && err != io.EOF {
		return nil
	}
	for _, name := range names {
		path := pod.Path + "/" + name
		ref, err := x.cfg.Root.Parse(path)
		if err != nil || ref.ContainerID == "" || len(out) == maxRecordsPerPod {
			continue
		}
		c := ContainerCgroup{ID: ref.ContainerID, Path: path}
		if id, err := x.cfg.Resolver.ID(path); err == nil {
			c.CgroupID = id
		}
		var oldest uint64
		for _, pid := range x.readProcs(path) {
			c.Processes++
			if start, err := x.startTime(pid); err == nil && (c.PID == 0 || start < oldest) {
				c.PID, oldest = pid, start
			}
		}
		if c.PID != 0 && !boot.IsZero() {
			c.Started = boot.Add(time.Duration(oldest) * time.Second / userHZ)
		}
		out = append(out, c)
	}
	slices.SortFunc(out, func(a, b ContainerCgroup) int {
		return cmp.Or(a.Started.Compare(b.Started), cmp.Compare(a.ID, b.ID))
	})
	return out
}

// userHZ is the unit of times in /proc, the same on all architectures that
// Latchkey is built for, whatever the kernel's own tick is.
const userHZ = 100

// bootTime reads when the kernel started; zero if /proc does not say.
func (x *Index) bootTime() time.Time {
	f, err := os.Open(filepath.Join(x.cfg.ProcFS, "stat"))
	if err != nil {
		return time.Time{}
	}
	defer f.Close()
	t, err := parseBootTime(f)
	if err != nil {
		return time.Time{}
	}
	return t
}

// parseBootTime reads the btime line of /proc/stat.
func parseBootTime(r io.Reader) (time.Time, error) {
	// The line of interrupts before it has a number for each.
	lines := bufio.NewScanner(io.LimitReader(r, 1<<20))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		if v, ok := strings.CutPrefix(lines.Text(), "btime "); ok {
			sec, err := strconv.ParseInt(strings.TrimSpace(v), 10, 64)
			if err != nil || sec < 0 {
				return time.Time{}, fmt.Errorf("%w: boot time %q", errStat, v)
			}
			return time.Unix(sec, 0), nil
		}
	}
	return time.Time{}, fmt.Errorf("%w: no boot time", errStat)
}
