// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"time"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	eventsapi "github.com/containerd/containerd/api/services/events/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
)

// containerd's generated API is used, not its client: that one links what makes
// and runs containers too, and costs an idle agent 4 MiB more of resident
// memory. Two calls and one stream are all there is to do.

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
	conn, err := grpc.NewClient("passthrough:///containerd",
		grpc.WithTransportCredentials(insecure.NewCredentials()), // a unix socket of root's
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		}),
		grpc.WithNoProxy(),
		grpc.WithDisableServiceConfig(),
		// After a reconnect all is listed again, so no call is repeated unseen.
		grpc.WithDisableRetry(),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
	)
	if err != nil {
		return false, err
	}
	defer conn.Close()
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(ctx, namespaceHeader, r.cfg.Namespace))
	defer cancel()

	// Subscribe first, list then: what changes in between is told twice.
	stream, err := eventsapi.NewEventsClient(conn).Subscribe(ctx, &eventsapi.SubscribeRequest{Filters: []string{
		filter(r.cfg.Namespace, "/containers/create"),
		filter(r.cfg.Namespace, "/containers/update"),
		filter(r.cfg.Namespace, "/containers/delete"),
	}})
	if err != nil {
		return false, fmt.Errorf("subscribe to containerd's events: %w", err)
	}
	containers := containersapi.NewContainersClient(conn)
	if err := r.listContainerd(ctx, containers); err != nil {
		return false, err
	}
	r.connected(RuntimeContainerd, socket)
	r.log.Info("names of pods come from containerd", "socket", socket)

	type message struct {
		topic, id string
		err       error
	}
	messages := make(chan message)
	go func() {
		for {
			e, err := stream.Recv()
			m := message{err: err}
			if err == nil {
				m.topic, m.id = e.GetTopic(), eventID(e.GetEvent().GetValue())
			}
			select {
			case messages <- m:
			case <-ctx.Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()
	again := time.NewTimer(r.settle)
	defer again.Stop()
	for {
		select {
		case <-ctx.Done():
			return true, ctx.Err()
		case <-again.C:
			if err := r.listContainerd(ctx, containers); err != nil {
				return true, err
			}
			again.Reset(r.relist)
		case m := <-messages:
			switch {
			case errors.Is(m.err, io.EOF):
				return true, errStream
			case m.err != nil:
				return true, fmt.Errorf("containerd's events: %w", m.err)
			case m.id == "":
			case m.topic == "/containers/delete":
				r.catalog.remove(m.id)
			default:
				if err := r.getContainerd(ctx, containers, m.id); err != nil {
					return true, err
				}
			}
		}
	}
}

func filter(namespace, topic string) string {
	return fmt.Sprintf("namespace==%q,topic==%q", namespace, topic)
}

// eventID reads the container's id, which is field 1 of all the events that are
// subscribed to; empty if it cannot be read.
func eventID(b []byte) string {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return ""
		}
		b = b[n:]
		if num == 1 && typ == protowire.BytesType {
			v, n := protowire.ConsumeBytes(b)
			if n < 0 || !isID(string(v)) {
				return ""
			}
			return string(v)
		}
		if n = protowire.ConsumeFieldValue(num, typ, b); n < 0 {
			return ""
		}
		b = b[n:]
	}
	return ""
}

// listContainerd reads all containers, one at a time, and forgets what is no
// longer there.
func (r *Runtime) listContainerd(ctx context.Context, client containersapi.ContainersClient) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// A list may take long on a node with many; silence may not.
	silence := time.AfterFunc(callTimeout, cancel)
	defer silence.Stop()
	stream, err := client.ListStream(ctx, &containersapi.ListContainersRequest{})
	if err != nil {
		return fmt.Errorf("list containerd's containers: %w", err)
	}
	seen := make(map[string]struct{})
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("list containerd's containers: %w", err)
		}
		silence.Reset(callTimeout)
		if rec, ok := containerdRecord(m.GetContainer()); ok {
			seen[rec.id] = struct{}{}
			r.catalog.put(rec)
		}
	}
	r.catalog.keepOnly(RuntimeContainerd, seen)
	return nil
}

func (r *Runtime) getContainerd(ctx context.Context, client containersapi.ContainersClient, id string) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	resp, err := client.Get(ctx, &containersapi.GetContainerRequest{ID: id})
	switch {
	case status.Code(err) == codes.NotFound:
		return nil // deleted since; the event of that follows
	case err != nil:
		return fmt.Errorf("get containerd's container: %w", err)
	}
	if rec, ok := containerdRecord(resp.GetContainer()); ok {
		r.catalog.put(rec)
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
func containerdRecord(c *containersapi.Container) (*entry, bool) {
	labels := c.GetLabels()
	rec := &entry{runtime: RuntimeContainerd, id: strings.Clone(c.GetID()), sandbox: labels[containerdKind] == "sandbox"}
	if !rec.identify(labels) {
		return nil, false
	}
	if t := c.GetCreatedAt(); t.IsValid() {
		rec.created = t.AsTime()
	}
	rec.image = text(c.GetImage())
	// A specification that cannot be read takes away what it would have told,
	// no more.
	spec, _ := parseSpec(c.GetSpec().GetValue())
	if s := spec.Annotations[containerdImage]; s != "" {
		rec.image = text(s) // as the pod names it; the record may have its digest
	}
	if rec.sandbox {
		rec.name, rec.sandboxID = "", ""
		rec.labels = podLabels(labels)
		rec.netns, rec.hostNet = spec.network()
		return rec, true
	}
	if rec.sandboxID = text(c.GetSandbox()); rec.sandboxID == "" {
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
