// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"
)

// CRI-O has no API that tells of containers in one stream, but the library it
// stores them with has a directory per container on a tmpfs, written before the
// container starts and removed with it:
//
//	/run/containers/storage/overlay-containers/ID/userdata/config.json
//
// That is the OCI specification, with what CRI-O knows as annotations. It is
// root's; workloads cannot write there.

const (
	maxSpecFile = 4 << 20
	crioPrefix  = "io.kubernetes.cri-o."
)

// runCRIO compares the directories with what is known, again and again: reading
// the names in a directory is cheap, and a file is read once.
func (r *Runtime) runCRIO(ctx context.Context) {
	told := false
	for {
		found, err := r.scanCRIO()
		switch {
		case err != nil:
			if r.lost(RuntimeCRIO, found, err) {
				r.log.Warn("CRI-O's containers cannot be read, trying again", "directory", found, "error", err)
			}
			told = false
		case found == "":
			r.absent(RuntimeCRIO)
			told = false
		case !told:
			told = true
			r.connected(RuntimeCRIO, found)
			r.log.Info("names of pods come from CRI-O", "directory", found)
		}
		if !pause(ctx, r.poll) {
			return
		}
	}
}

// scanCRIO returns the last directory that held a container of a pod, or that
// could not be read.
func (r *Runtime) scanCRIO() (found string, err error) {
	seen := make(map[string]struct{})
	for _, dir := range r.cfg.CRIODirs {
		// A Root does not follow links out of the directory.
		root, err := os.OpenRoot(dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return dir, err
		}
		n, err := r.scanCRIODir(root, seen)
		root.Close()
		if err != nil {
			return dir, err
		}
		if n > 0 {
			found = dir
		}
	}
	r.catalog.keepOnly(RuntimeCRIO, seen)
	return found, nil
}

func (r *Runtime) scanCRIODir(root *os.Root, seen map[string]struct{}) (n int, err error) {
	d, err := root.Open(".")
	if err != nil {
		return 0, err
	}
	defer d.Close()
	for {
		entries, err := d.ReadDir(256)
		for _, e := range entries {
			id := e.Name()
			if !e.IsDir() || !isID(id) || len(seen) >= maxRecords {
				continue
			}
			if !r.catalog.has(id) {
				rec, err := readCRIO(root, id)
				if err != nil {
					// Being made, being removed, or podman's: looked at again
					// with the next scan.
					continue
				}
				r.catalog.put(rec)
			}
			seen[id] = struct{}{}
			n++
		}
		if errors.Is(err, io.EOF) {
			return n, nil
		}
		if err != nil {
			return n, err
		}
	}
}

// errNotPods: a container is no pod's.
var errNotPods = errors.New("no pod's container")

func readCRIO(root *os.Root, id string) (*entry, error) {
	f, err := root.Open(id + "/userdata/config.json")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxSpecFile+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxSpecFile {
		return nil, fmt.Errorf("%s: longer than %d bytes", f.Name(), maxSpecFile)
	}
	return crioRecord(id, data)
}

// crioRecord reads the specification that CRI-O wrote for a container.
func crioRecord(id string, data []byte) (*entry, error) {
	spec, err := parseSpec(data)
	if err != nil {
		return nil, err
	}
	a := spec.Annotations
	rec := &entry{runtime: RuntimeCRIO, id: id}
	switch a[crioPrefix+"ContainerType"] {
	case "sandbox":
		rec.sandbox = true
	case "container":
	default:
		return nil, errNotPods
	}
	// The kubelet's labels are annotations of a container, and CRI-O keeps them
	// once more, so that a pod's own annotation of such a name is not taken for
	// one.
	labels := make(map[string]string)
	if err := json.Unmarshal([]byte(a[crioPrefix+"Labels"]), &labels); err != nil {
		return nil, fmt.Errorf("CRI-O's labels: %w", err)
	}
	if !rec.identify(labels) {
		return nil, errNotPods
	}
	if t, err := time.Parse(time.RFC3339Nano, a[crioPrefix+"Created"]); err == nil {
		rec.created = t
	}
	if rec.image = text(a[crioPrefix+"ImageName"]); rec.image == "" {
		rec.image = text(a[crioPrefix+"Image"])
	}
	if rec.sandbox {
		rec.name = ""
		rec.labels = podLabels(labels)
		rec.netns, rec.hostNet = spec.network()
		return rec, nil
	}
	rec.sandboxID = text(a[crioPrefix+"SandboxID"])
	return rec, nil
}
