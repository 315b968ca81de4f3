// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
)

// The calls, as in containerd's api/services. Field numbers below are theirs.
const (
	callList      = "/containerd.services.containers.v1.Containers/ListStream"
	callGet       = "/containerd.services.containers.v1.Containers/Get"
	callSubscribe = "/containerd.services.events.v1.Events/Subscribe"
)

const (
	// namespaceHeader is how containerd is told which of its namespaces a call
	// is about.
	namespaceHeader = "containerd-namespace"
	// maxMessage is containerd's own bound of a message; a container's record
	// holds its whole specification.
	maxMessage = 16 << 20
	// callTimeout is how long containerd may be silent in a call, so that one
	// that hangs is left and tried again.
	callTimeout = 30 * time.Second
)

// errStream: containerd ended the event stream.
var errStream = errors.New("containerd ended the event stream")

// runContainerd connects, follows, and connects again, until the context ends.
func (r *Runtime) runContainerd(ctx context.Context) {
	wait := r.retryMin
	for ctx.Err() == nil {
		socket, err := r.findSocket()
		if err == nil {
			var worked bool
			worked, err = r.follow(ctx, socket)
			if ctx.Err() != nil {
				return
			}
			if worked {
				wait = r.retryMin
			}
		}
		switch {
		case errors.Is(err, fs.ErrNotExist):
			r.absent(RuntimeContainerd)
		case r.lost(RuntimeContainerd, socket, err):
			r.log.Warn("containerd cannot be asked for the names of pods, trying again", "socket", socket, "error", err)
		}
		// Spread, so that the agents of a thousand nodes that were updated
		// together do not ask together.
		if !pause(ctx, wait/2+rand.N(wait/2+1)) {
			return
		}
		wait = min(2*wait, r.retryMax)
	}
}

// findSocket returns the first socket that exists. The error wraps
// fs.ErrNotExist if there is none.
func (r *Runtime) findSocket() (string, error) {
	var errs []error
	for _, s := range r.cfg.ContainerdSockets {
		fi, err := os.Stat(s)
		switch {
		case err != nil && !errors.Is(err, fs.ErrNotExist):
			return s, err
		case err != nil:
			errs = append(errs, err)
		case fi.Mode()&fs.ModeSocket == 0:
			return s, fmt.Errorf("%s is no socket", s)
		default:
			return s, nil
		}
	}
	return "", errors.Join(errs...)
}

// follow lists what there is and then acts on events, until something fails. It
// says whether the connection worked at all.
func (r *Runtime) follow(ctx context.Context, socket string) (worked bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	conn := dialGRPC(socket, map[string]string{namespaceHeader: r.cfg.Namespace})
	defer conn.close()

	// Subscribe first, list then: what changes in between is told twice.
	type message struct {
		topic, id string
		err       error
	}
	messages := make(chan message)
	send := func(m message) bool {
		select {
		case messages <- m:
			return true
		case <-ctx.Done():
			return false
		}
	}
	subscribed := make(chan struct{})
	go func() {
		err := conn.call(ctx, callSubscribe, subscription(r.cfg.Namespace), subscribed, func(b []byte) error {
			topic, id := decodeEnvelope(b)
			if !send(message{topic: topic, id: id}) {
				return ctx.Err()
			}
			return nil
		})
		if err == nil {
			err = errStream
		}
		send(message{err: err})
	}()
	select {
	case <-subscribed:
	case m := <-messages:
		return false, fmt.Errorf("subscribe to containerd's events: %w", m.err)
	case <-time.After(callTimeout):
		return false, fmt.Errorf("subscribe to containerd's events: %w", context.DeadlineExceeded)
	case <-ctx.Done():
		return false, ctx.Err()
	}
	if err := r.listContainerd(ctx, conn); err != nil {
		return false, err
	}
	r.connected(RuntimeContainerd, socket)
	r.log.Info("names of pods come from containerd", "socket", socket)

	again := time.NewTimer(r.settle)
	defer again.Stop()
	for {
		select {
		case <-ctx.Done():
			return true, ctx.Err()
		case <-again.C:
			if err := r.listContainerd(ctx, conn); err != nil {
				return true, err
			}
			again.Reset(r.relist)
		case m := <-messages:
			switch {
			case m.err != nil:
				return true, fmt.Errorf("containerd's events: %w", m.err)
			case m.id == "":
			case m.topic == "/containers/delete":
				r.catalog.remove(m.id)
			default:
				if err := r.getContainerd(ctx, conn, m.id); err != nil {
					return true, err
				}
			}
		}
	}
}

// subscription is a SubscribeRequest for the records of a namespace.
func subscription(namespace string) []byte {
	var b []byte
	for _, topic := range []string{"/containers/create", "/containers/update", "/containers/delete"} {
		b = protowire.AppendTag(b, 1, protowire.BytesType)
		b = protowire.AppendString(b, fmt.Sprintf("namespace==%q,topic==%q", namespace, topic))
	}
	return b
}

// listContainerd reads all containers, one at a time, and forgets what is no
// longer there.
func (r *Runtime) listContainerd(ctx context.Context, conn *grpcConn) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// A list may take long on a node with many; silence may not.
	silence := time.AfterFunc(callTimeout, cancel)
	defer silence.Stop()
	seen := make(map[string]struct{})
	err := conn.call(ctx, callList, nil, nil, func(b []byte) error {
		silence.Reset(callTimeout)
		c, err := decodeContainer(b)
		if err != nil {
			return err
		}
		if rec, ok := containerdRecord(c); ok {
			seen[rec.id] = struct{}{}
			r.catalog.put(rec)
		}
		return nil
	})
	if err != nil {
		if !silence.Stop() {
			err = context.DeadlineExceeded // the cancelled call says less
		}
		return fmt.Errorf("list containerd's containers: %w", err)
	}
	r.catalog.keepOnly(RuntimeContainerd, seen)
	return nil
}

func (r *Runtime) getContainerd(ctx context.Context, conn *grpcConn, id string) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	req := protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), id)
	err := conn.call(ctx, callGet, req, nil, func(b []byte) error {
		c, err := decodeContainer(b)
		if err != nil {
			return err
		}
		if rec, ok := containerdRecord(c); ok {
			r.catalog.put(rec)
		}
		return nil
	})
	var status *grpcError
	if errors.As(err, &status) && status.code == grpcNotFound {
		return nil // deleted since; the event of that follows
	}
	if err != nil {
		return fmt.Errorf("get containerd's container: %w", err)
	}
	return nil
}

// errMessage: a message of containerd's is no valid protobuf.
var errMessage = errors.New("malformed message of containerd")

// fields calls f for each field of a message; v is nil for fields that are not
// of variable length, and n the value of a varint.
func fields(b []byte, f func(num protowire.Number, v []byte, n uint64) error) error {
	for len(b) > 0 {
		num, typ, size := protowire.ConsumeTag(b)
		if size < 0 {
			return errMessage
		}
		b = b[size:]
		var v []byte
		var n uint64
		switch typ {
		case protowire.BytesType:
			v, size = protowire.ConsumeBytes(b)
		case protowire.VarintType:
			n, size = protowire.ConsumeVarint(b)
		default:
			size = protowire.ConsumeFieldValue(num, typ, b)
		}
		if size < 0 {
			return errMessage
		}
		b = b[size:]
		if err := f(num, v, n); err != nil {
			return err
		}
	}
	return nil
}

// decodeEnvelope reads an event: its topic, and the container's id, which is
// field 1 of all the events that are subscribed to. Empty if they cannot be
// read.
func decodeEnvelope(b []byte) (topic, id string) {
	var value []byte
	err := fields(b, func(num protowire.Number, v []byte, _ uint64) error {
		switch num {
		case 3:
			topic = string(v)
		case 4: // google.protobuf.Any
			return fields(v, func(num protowire.Number, v []byte, _ uint64) error {
				if num == 2 {
					value = v
				}
				return nil
			})
		}
		return nil
	})
	if err == nil {
		err = fields(value, func(num protowire.Number, v []byte, _ uint64) error {
			if num == 1 {
				id = string(v)
			}
			return nil
		})
	}
	if err != nil || !isID(id) {
		return "", ""
	}
	return topic, id
}

// containerdContainer is what is used of containerd's record.
type containerdContainer struct {
	id, image, sandbox string
	labels             map[string]string
	spec               []byte // JSON
	created            time.Time
}

// maxRecordLabels bounds the labels that are read of one record; containerd
// bounds their size.
const maxRecordLabels = 1024

// decodeContainer reads what List and Get answer: a message with the container
// as field 1.
func decodeContainer(b []byte) (*containerdContainer, error) {
	c := &containerdContainer{labels: make(map[string]string)}
	err := fields(b, func(num protowire.Number, v []byte, _ uint64) error {
		if num != 1 {
			return nil
		}
		return fields(v, c.field)
	})
	if err != nil {
		return nil, err
	}
	return c, nil
}

func (c *containerdContainer) field(num protowire.Number, v []byte, _ uint64) error {
	switch num {
	case 1:
		c.id = string(v)
	case 2: // map entry
		var key, value string
		err := fields(v, func(num protowire.Number, v []byte, _ uint64) error {
			switch num {
			case 1:
				key = string(v)
			case 2:
				value = string(v)
			}
			return nil
		})
		if err != nil {
			return err
		}
		if len(c.labels) < maxRecordLabels {
			c.labels[key] = value
		}
	case 3:
		c.image = string(v)
	case 5: // google.protobuf.Any
		return fields(v, func(num protowire.Number, v []byte, _ uint64) error {
			if num == 2 {
				c.spec = v // of the message's buffer: read before the next one
			}
			return nil
		})
	case 8: // google.protobuf.Timestamp
		var sec, nsec uint64
		err := fields(v, func(num protowire.Number, _ []byte, n uint64) error {
			switch num {
			case 1:
				sec = n
			case 2:
				nsec = n
			}
			return nil
		})
		if err != nil {
			return err
		}
		// Years that JSON can write; another is no time that anything was made.
		if t := time.Unix(int64(sec), int64(nsec)).UTC(); nsec < 1e9 && t.Year() > 1970 && t.Year() < 10000 {
			c.created = t
		}
	case 11:
		c.sandbox = string(v)
	}
	return nil
}

// Names that containerd's CRI plugin gives what it makes.
const (
	containerdKind      = "io.cri-containerd.kind" // label
	containerdSandboxID = "io.kubernetes.cri.sandbox-id"
	containerdImage     = "io.kubernetes.cri.image-name"
)

// containerdRecord reads one record of containerd; false if it is no pod's.
func containerdRecord(c *containerdContainer) (*entry, bool) {
	rec := &entry{runtime: RuntimeContainerd, id: c.id, sandbox: c.labels[containerdKind] == "sandbox", created: c.created}
	if !rec.identify(c.labels) {
		return nil, false
	}
	rec.image = text(c.image)
	// A specification that cannot be read takes away what it would have told,
	// no more.
	spec, _ := parseSpec(c.spec)
	if s := spec.Annotations[containerdImage]; s != "" {
		rec.image = text(s) // as the pod names it; the record may have its digest
	}
	if rec.sandbox {
		rec.name = ""
		rec.labels = podLabels(c.labels)
		rec.netns, rec.hostNet = spec.network()
		return rec, true
	}
	if rec.sandboxID = text(c.sandbox); rec.sandboxID == "" {
		rec.sandboxID = text(spec.Annotations[containerdSandboxID])
	}
	return rec, true
}

// ociSpec is the part of an OCI runtime specification (config.json) that is of
// use here.
type ociSpec struct {
	Annotations map[string]string `json:"annotations"`
	Linux       *struct {
		Namespaces []struct {
			Type string `json:"type"`
			Path string `json:"path"`
		} `json:"namespaces"`
	} `json:"linux"`
}

func parseSpec(data []byte) (ociSpec, error) {
	var s ociSpec
	if err := json.Unmarshal(data, &s); err != nil {
		return ociSpec{}, fmt.Errorf("OCI specification: %w", err)
	}
	return s, nil
}

// network returns the path of a sandbox's network namespace. A sandbox without
// one shares the host's.
func (s ociSpec) network() (path string, host bool) {
	if s.Linux == nil {
		return "", false
	}
	for _, ns := range s.Linux.Namespaces {
		if ns.Type == "network" {
			return text(ns.Path), false
		}
	}
	return "", true
}
