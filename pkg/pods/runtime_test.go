// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	eventsapi "github.com/containerd/containerd/api/services/events/v1"
	"github.com/containerd/containerd/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/latchkey-dev/latchkey/pkg/cgroup"
	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

var born = time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)

// id makes a container's id of a letter.
func id(letter string) string { return strings.Repeat(letter, 64) }

func kubeLabels(uid evidence.PodUID, name string) map[string]string {
	return map[string]string{labelPodUID: string(uid), labelPodName: name, labelPodNamespace: "shop"}
}

func sandboxOfContainerd(cid string, uid evidence.PodUID, name string, netns string, extra map[string]string) *containersapi.Container {
	labels := kubeLabels(uid, name)
	labels[containerdKind] = "sandbox"
	maps.Copy(labels, extra)
	spec := `{"linux":{"namespaces":[{"type":"pid"}]}}`
	if netns != "" {
		spec = fmt.Sprintf(`{"linux":{"namespaces":[{"type":"network","path":%q}]}}`, netns)
	}
	return &containersapi.Container{
		ID: cid, Labels: labels, Image: "localhost/pause:1", CreatedAt: timestamppb.New(born),
		Spec: &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/Spec", Value: []byte(spec)},
	}
}

func containerOfContainerd(cid string, uid evidence.PodUID, pod, name, sandbox string) *containersapi.Container {
	labels := kubeLabels(uid, pod)
	labels[containerdKind], labels[labelContainerName] = "container", name
	spec := fmt.Sprintf(`{"annotations":{%q:%q,%q:"example/app:2"},"process":{"env":["SECRET=x"]}}`, containerdSandboxID, sandbox, containerdImage)
	return &containersapi.Container{
		ID: cid, Labels: labels, Image: "example/app@sha256:00", CreatedAt: timestamppb.New(born.Add(time.Second)),
		Spec: &anypb.Any{Value: []byte(spec)},
	}
}

// fakeContainerd is the part of containerd that is asked.
type fakeContainerd struct {
	containersapi.UnimplementedContainersServer
	eventsapi.UnimplementedEventsServer
	t      *testing.T
	socket string

	mu         sync.Mutex
	containers map[string]*containersapi.Container
	subs       []chan *types.Envelope
	lists      int
	hang       bool
	fail       error // what List answers
	server     *grpc.Server
}

func newFakeContainerd(t *testing.T) *fakeContainerd {
	t.Helper()
	dir, err := os.MkdirTemp("", "ctrd") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return &fakeContainerd{t: t, socket: filepath.Join(dir, "c.sock"), containers: make(map[string]*containersapi.Container)}
}

func (f *fakeContainerd) start() {
	f.t.Helper()
	ln, err := net.Listen("unix", f.socket)
	if err != nil {
		f.t.Fatal(err)
	}
	s := grpc.NewServer()
	containersapi.RegisterContainersServer(s, f)
	eventsapi.RegisterEventsServer(s, f)
	f.mu.Lock()
	f.server = s
	f.mu.Unlock()
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(ln) }()
	f.t.Cleanup(func() { s.Stop(); <-done })
}

func (f *fakeContainerd) stop() {
	f.mu.Lock()
	s := f.server
	f.subs = nil
	f.mu.Unlock()
	s.Stop()
}

func (f *fakeContainerd) set(cs ...*containersapi.Container) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range cs {
		f.containers[c.ID] = c
	}
}

func (f *fakeContainerd) unset(cid string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.containers, cid)
}

// tell sends an event to whoever subscribed.
func (f *fakeContainerd) tell(topic, cid string) {
	b := protowire.AppendTag(nil, 1, protowire.BytesType)
	b = protowire.AppendString(b, cid)
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range f.subs {
		s <- &types.Envelope{Namespace: "k8s.io", Topic: topic, Event: &anypb.Any{Value: b}}
	}
}

func (f *fakeContainerd) namespace(ctx context.Context) error {
	if ns := metadata.ValueFromIncomingContext(ctx, namespaceHeader); !slices.Equal(ns, []string{"k8s.io"}) {
		return status.Errorf(codes.FailedPrecondition, "namespace %q", ns)
	}
	return nil
}

func (f *fakeContainerd) ListStream(_ *containersapi.ListContainersRequest, out containersapi.Containers_ListStreamServer) error {
	if err := f.namespace(out.Context()); err != nil {
		return err
	}
	f.mu.Lock()
	f.lists++
	hang, fail := f.hang, f.fail
	cs := slices.Collect(maps.Values(f.containers))
	f.mu.Unlock()
	if hang {
		<-out.Context().Done()
		return out.Context().Err()
	}
	if fail != nil {
		return fail
	}
	for _, c := range cs {
		if err := out.Send(&containersapi.ListContainerMessage{Container: c}); err != nil {
			return err
		}
	}
	return nil
}

func (f *fakeContainerd) Get(ctx context.Context, r *containersapi.GetContainerRequest) (*containersapi.GetContainerResponse, error) {
	if err := f.namespace(ctx); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	c, ok := f.containers[r.GetID()]
	if !ok {
		return nil, status.Error(codes.NotFound, "no such container")
	}
	return &containersapi.GetContainerResponse{Container: c}, nil
}

func (f *fakeContainerd) Subscribe(r *eventsapi.SubscribeRequest, out eventsapi.Events_SubscribeServer) error {
	if len(r.GetFilters()) != 3 || !strings.Contains(r.GetFilters()[0], `namespace=="k8s.io"`) {
		return status.Errorf(codes.InvalidArgument, "filters %q", r.GetFilters())
	}
	ch := make(chan *types.Envelope, 16)
	f.mu.Lock()
	f.subs = append(f.subs, ch)
	f.mu.Unlock()
	for {
		select {
		case <-out.Context().Done():
			return out.Context().Err()
		case e := <-ch:
			if err := out.Send(e); err != nil {
				return err
			}
		}
	}
}

func (f *fakeContainerd) subscribers() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.subs)
}

// startRuntime runs one until the test ends.
func startRuntime(t *testing.T, cfg RuntimeConfig) *Runtime {
	t.Helper()
	if cfg.ContainerdSockets == nil {
		cfg.ContainerdSockets = []string{}
	}
	if cfg.CRIODirs == nil {
		cfg.CRIODirs = []string{}
	}
	cfg.Logger = slog.New(slog.DiscardHandler)
	r := NewRuntime(cfg)
	r.retryMin, r.retryMax, r.poll = time.Millisecond, 10*time.Millisecond, 5*time.Millisecond
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return r
}

func connects(r *Runtime) uint64 {
	for _, s := range r.Status() {
		if s.Connected {
			return s.Connects
		}
	}
	return 0
}

func TestContainerd(t *testing.T) {
	f := newFakeContainerd(t)
	f.set(
		sandboxOfContainerd(id("a"), uidA, "web-0", "/run/netns/cni-1", map[string]string{"app": "web", "io.kubernetes.x": "no"}),
		containerOfContainerd(id("b"), uidA, "web-0", "server", id("a")),
		sandboxOfContainerd(id("c"), uidB, "proxy", "", nil),
		&containersapi.Container{ID: "some-tool", Labels: map[string]string{"a": "b"}},
	)
	// No socket yet: nothing is known, and that is all.
	r := startRuntime(t, RuntimeConfig{ContainerdSockets: []string{f.socket + ".none", f.socket}})
	if _, ok := r.Metadata(uidA); ok || len(r.Status()) != 0 {
		t.Fatalf("without a runtime: status %+v", r.Status())
	}
	f.start()
	eventually(t, "connected", func() bool { return connects(r) == 1 })

	m, ok := r.Metadata(uidA)
	want := Metadata{
		UID: uidA, Name: "web-0", Namespace: "shop", Runtime: RuntimeContainerd, SandboxID: id("a"), Created: born,
		Labels: map[string]string{"app": "web"}, NetnsPath: "/run/netns/cni-1",
		Containers: []Container{{ID: id("b"), Name: "server", Image: "example/app:2", SandboxID: id("a"), Created: born.Add(time.Second)}},
	}
	if !ok || !equalJSON(t, m, want) {
		t.Errorf("got  %+v\nwant %+v", m, want)
	}
	if m, ok := r.Metadata(uidB); !ok || !m.HostNetwork || m.NetnsPath != "" || m.Containers != nil {
		t.Errorf("hostNetwork: %+v", m)
	}
	if s := r.Status(); len(s) != 1 || s[0].Pods != 2 || s[0].Containers != 3 || s[0].Source != f.socket {
		t.Errorf("status %+v", s)
	}

	// A container is found in its own pod only.
	if c, ok := r.Container(uidA, id("b")); !ok || c.Name != "server" {
		t.Errorf("container: %+v %v", c, ok)
	}
	if c, ok := r.Container(uidA, id("a")); !ok || c.Name != "POD" {
		t.Errorf("sandbox: %+v %v", c, ok)
	}
	if c, ok := r.Container(uidB, id("b")); ok {
		t.Errorf("another pod's container: %+v", c)
	}

	// Events.
	eventually(t, "subscription", func() bool { return f.subscribers() == 1 })
	f.set(containerOfContainerd(id("d"), uidA, "web-0", "sidecar", id("a")))
	f.tell("/containers/create", id("d"))
	eventually(t, "the new container", func() bool { _, ok := r.Container(uidA, id("d")); return ok })
	f.unset(id("d"))
	f.tell("/containers/create", id("d")) // late: it is gone again
	f.tell("/containers/delete", id("d"))
	f.tell("/containers/delete", "../../etc")
	eventually(t, "its deletion", func() bool { _, ok := r.Container(uidA, id("d")); return !ok })

	// containerd goes away: what is known stays. It comes back without one pod.
	f.stop()
	eventually(t, "the loss", func() bool { return connects(r) == 0 })
	if _, ok := r.Metadata(uidA); !ok {
		t.Error("forgot a pod while containerd was away")
	}
	if s := r.Status(); s[0].Connected || s[0].Error == "" || s[0].Since.IsZero() {
		t.Errorf("status %+v", s)
	}
	f.unset(id("c"))
	f.start()
	eventually(t, "reconnect", func() bool { return connects(r) == 2 })
	if _, ok := r.Metadata(uidB); ok {
		t.Error("a pod that went while containerd was away is still known")
	}
	if _, ok := r.Metadata(uidA); !ok {
		t.Error("lost a pod by the reconnect")
	}
}

func equalJSON(t *testing.T, a, b any) bool {
	t.Helper()
	x, err := json.Marshal(a)
	if err != nil {
		t.Fatal(err)
	}
	y, err := json.Marshal(b)
	if err != nil {
		t.Fatal(err)
	}
	return string(x) == string(y)
}

// The list is read again by itself: what no event told of is found.
func TestContainerdRelists(t *testing.T) {
	f := newFakeContainerd(t)
	f.start()
	r := NewRuntime(RuntimeConfig{ContainerdSockets: []string{f.socket}, CRIODirs: []string{}, Logger: slog.New(slog.DiscardHandler)})
	r.settle, r.relist = 5*time.Millisecond, 5*time.Millisecond
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	eventually(t, "connected", func() bool { return connects(r) == 1 })
	f.set(sandboxOfContainerd(id("a"), uidA, "web-0", "", nil))
	eventually(t, "the pod", func() bool { _, ok := r.Metadata(uidA); return ok })
	// One that answers no more: Run ends when it is told to all the same.
	f.mu.Lock()
	f.hang = true
	lists := f.lists
	f.mu.Unlock()
	eventually(t, "a list that hangs", func() bool { f.mu.Lock(); defer f.mu.Unlock(); return f.lists > lists })
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// What is no gRPC server is an error, whatever it says.
func TestNoGRPC(t *testing.T) {
	for name, answer := range map[string]func(http.ResponseWriter){
		"status":      func(w http.ResponseWriter) { w.WriteHeader(http.StatusNotFound) },
		"nothing":     func(http.ResponseWriter) {},
		"half prefix": func(w http.ResponseWriter) { _, _ = w.Write([]byte{0, 0}) },
		"half":        func(w http.ResponseWriter) { _, _ = w.Write([]byte{0, 0, 0, 0, 9, 1}) },
		"compressed":  func(w http.ResponseWriter) { _, _ = w.Write([]byte{1, 0, 0, 0, 1, 1}) },
		"too long":    func(w http.ResponseWriter) { _, _ = w.Write([]byte{0, 255, 0, 0, 0}) },
		"refused": func(w http.ResponseWriter) {
			w.Header().Set("Grpc-Status", "7")
			w.Header().Set("Grpc-Message", "no%0away")
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir, err := os.MkdirTemp("", "grpc")
			if err != nil {
				t.Fatal(err)
			}
			defer os.RemoveAll(dir)
			ln, err := net.Listen("unix", dir+"/s")
			if err != nil {
				t.Fatal(err)
			}
			var protocols http.Protocols
			protocols.SetUnencryptedHTTP2(true)
			srv := &http.Server{Protocols: &protocols, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { answer(w) })}
			done := make(chan struct{})
			go func() { defer close(done); _ = srv.Serve(ln) }()
			defer func() { srv.Close(); <-done }()
			c := dialGRPC(dir+"/s", nil)
			defer c.close()
			err = c.call(t.Context(), callGet, nil, nil, func([]byte) error { return nil })
			var status *grpcError
			switch {
			case err == nil:
				t.Error("taken for an answer")
			case name == "refused" && (!errors.As(err, &status) || status.code != 7 || status.message != "no\uFFFDway"):
				t.Errorf("got %v", err)
			}
		})
	}
}

// An answer that cannot be used is an error that can be shown.
func TestContainerdRefuses(t *testing.T) {
	for name, test := range map[string]struct {
		fail error
		spec int // bytes
		want string
	}{
		"status":   {fail: status.Error(codes.PermissionDenied, "no\x1b[31m way"), want: "status 7: no\uFFFD[31m way"},
		"too long": {spec: maxMessage, want: errGRPC.Error()},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFakeContainerd(t)
			f.fail = test.fail
			big := sandboxOfContainerd(id("a"), uidA, "web-0", "", nil)
			big.Spec.Value = make([]byte, test.spec)
			f.set(big)
			f.start()
			r := startRuntime(t, RuntimeConfig{ContainerdSockets: []string{f.socket}})
			eventually(t, "the error", func() bool {
				s := r.Status()
				return len(s) == 1 && strings.Contains(s[0].Error, test.want)
			})
			if s := r.Status(); s[0].Connected || s[0].Connects != 0 {
				t.Errorf("status %+v", s)
			}
			if m, ok := r.Metadata(uidA); ok {
				t.Errorf("read of a message that is too long: %+v", m)
			}
		})
	}
}

// Whoever listens there and is no containerd is left, and tried again.
func TestNoContainerd(t *testing.T) {
	for name, answer := range map[string]string{
		"nothing": "",
		"HTTP/1":  "HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n",
		"noise":   strings.Repeat("\xff", 100),
	} {
		t.Run(name, func(t *testing.T) {
			f := newFakeContainerd(t) // for its path
			ln, err := net.Listen("unix", f.socket)
			if err != nil {
				t.Fatal(err)
			}
			done := make(chan struct{})
			go func() {
				defer close(done)
				for {
					conn, err := ln.Accept()
					if err != nil {
						return
					}
					_, _ = conn.Write([]byte(answer))
					conn.Close()
				}
			}()
			r := startRuntime(t, RuntimeConfig{ContainerdSockets: []string{f.socket}})
			eventually(t, "the error", func() bool { s := r.Status(); return len(s) == 1 && s[0].Error != "" })
			if connects(r) != 0 {
				t.Errorf("status %+v", r.Status())
			}
			ln.Close()
			<-done
			f.start()
			eventually(t, "containerd", func() bool { return connects(r) == 1 })
		})
	}
}

func TestFindSocket(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r := NewRuntime(RuntimeConfig{ContainerdSockets: []string{dir + "/a", dir + "/b"}})
	if _, err := r.findSocket(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("none: %v", err)
	}
	r = NewRuntime(RuntimeConfig{ContainerdSockets: []string{dir + "/a", file}})
	if _, err := r.findSocket(); err == nil || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no socket: %v", err)
	}
}

func TestRuntimeDefaults(t *testing.T) {
	r := NewRuntime(RuntimeConfig{})
	if !slices.Equal(r.cfg.ContainerdSockets, DefaultContainerdSockets()) || !slices.Equal(r.cfg.CRIODirs, DefaultCRIODirs()) || r.cfg.Namespace != "k8s.io" {
		t.Errorf("defaults %+v", r.cfg)
	}
	r = NewRuntime(RuntimeConfig{ContainerdSockets: []string{}, CRIODirs: []string{}})
	if err := r.Run(t.Context()); err != nil || len(r.Status()) != 0 {
		t.Errorf("nothing to ask: %v, %+v", err, r.Status())
	}
}

func TestFind(t *testing.T) {
	r := NewRuntime(RuntimeConfig{})
	for _, e := range []*entry{
		{runtime: RuntimeContainerd, id: id("a"), uid: uidA, pod: "web", namespace: "shop"},
		{runtime: RuntimeContainerd, id: "b1" + id("b")[2:], uid: uidB, pod: "web", namespace: "bank"},
		{runtime: RuntimeContainerd, id: "b2" + id("b")[2:], uid: uidB, pod: "web", namespace: "bank"},
	} {
		r.catalog.put(e)
	}
	for query, want := range map[string]evidence.PodUID{
		id("a"): uidA, "aaaaaa": uidA, "aaaaa": "", "": "", "b1bbbb": uidB, "ffffff": "",
	} {
		if uid, _, ok := r.FindContainer(query); uid != want || ok != (want != "") {
			t.Errorf("%q: %q %v", query, uid, ok)
		}
	}
	r.catalog.put(&entry{runtime: RuntimeContainerd, id: "b1bbbb" + id("c")[6:], uid: uidC})
	if uid, _, ok := r.FindContainer("b1bbbb"); ok {
		t.Errorf("two answers, and %q was given", uid)
	}
	if got := r.FindPod("bank", "web"); !slices.Equal(got, []evidence.PodUID{uidB}) {
		t.Errorf("got %v", got)
	}
	if got := r.FindPod("", "web"); len(got) != 2 {
		t.Errorf("got %v", got)
	}
}

func TestCatalogBounds(t *testing.T) {
	c := newCatalog()
	for i := range maxRecordsPerPod + 10 {
		c.put(&entry{runtime: RuntimeContainerd, id: fmt.Sprintf("c%d", i), uid: uidA})
	}
	c.put(&entry{runtime: RuntimeContainerd, id: "other", uid: uidB})
	if pods, containers, dropped := c.counts(RuntimeContainerd); pods != 2 || containers != maxRecordsPerPod+1 || dropped != 10 {
		t.Errorf("%d pods, %d containers, %d dropped", pods, containers, dropped)
	}
	// The same id again is no second entry, and may change its pod.
	c.put(&entry{runtime: RuntimeContainerd, id: "other", uid: uidC})
	if _, ok := c.metadata(uidB); ok {
		t.Error("a replaced entry is still there")
	}
	c.keepOnly(RuntimeCRIO, nil)
	if _, ok := c.metadata(uidC); !ok {
		t.Error("one runtime's list removed the other's")
	}
	c.keepOnly(RuntimeContainerd, map[string]struct{}{"other": {}})
	if pods, containers, _ := c.counts(RuntimeContainerd); pods != 1 || containers != 1 {
		t.Errorf("%d pods, %d containers", pods, containers)
	}
	for i := range maxRecords + 5 {
		c.put(&entry{runtime: RuntimeContainerd, id: fmt.Sprintf("c%d", i), uid: evidence.PodUID(fmt.Sprint(i))})
	}
	if _, containers, _ := c.counts(RuntimeContainerd); containers != maxRecords {
		t.Errorf("%d containers", containers)
	}
}

// The newest sandbox speaks for the pod.
func TestSandboxMadeAgain(t *testing.T) {
	c := newCatalog()
	c.put(&entry{id: "new", sandbox: true, uid: uidA, pod: "p", netns: "/run/netns/2", created: born.Add(time.Hour)})
	c.put(&entry{id: "old", sandbox: true, uid: uidA, pod: "p", netns: "/run/netns/1", created: born})
	if m, _ := c.metadata(uidA); m.SandboxID != "new" || m.NetnsPath != "/run/netns/2" {
		t.Errorf("got %+v", m)
	}
}

func TestText(t *testing.T) {
	for in, want := range map[string]string{
		"web-0":             "web-0",
		"":                  "",
		"a\x1b[31mred":      "a\uFFFD[31mred",
		"two\nlines":        "two\uFFFDlines",
		"bad\xff":           "bad\uFFFD",
		"größe":             "größe",
		"\u202egnp.exe":     "\uFFFDgnp.exe",
		"a" + id("x") + "z": "a" + id("x") + "z",
	} {
		if got := text(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
	if got := text(strings.Repeat("ü", maxText)); len(got) > maxText+2 {
		t.Errorf("%d bytes", len(got))
	}
	labels := make(map[string]string)
	for i := range 200 {
		labels[fmt.Sprintf("k%03d", i)] = strings.Repeat("v", 2*maxText)
	}
	labels["bad\x00key"] = "v"
	got := podLabels(labels)
	if len(got) != maxPodLabels || len(got["k000"]) != maxText || got["k199"] != "" {
		t.Errorf("%d labels, %d bytes", len(got), len(got["k000"]))
	}
}

func TestCRIO(t *testing.T) {
	dir := "testdata/crio/overlay-containers"
	r := startRuntime(t, RuntimeConfig{CRIODirs: []string{"testdata/none", dir}})
	eventually(t, "CRI-O", func() bool { return connects(r) == 1 })
	m, ok := r.Metadata(uidA)
	want := Metadata{
		UID: uidA, Name: "web-0", Namespace: "shop", Runtime: RuntimeCRIO, SandboxID: id("1"),
		Created: born.Add(123456789), NetnsPath: "/var/run/netns/5b0e7f06-3a6e-4f0e-9a67-6f0d3c1f6a11",
		Labels: map[string]string{"app": "web"},
		Containers: []Container{{
			ID: id("2"), Name: "server", Image: "registry.example/shop/web:1.2", SandboxID: id("1"), Created: born.Add(2 * time.Second),
		}},
	}
	if !ok || !equalJSON(t, m, want) {
		t.Errorf("got  %+v\nwant %+v", m, want)
	}
	if m, ok := r.Metadata(uidC); !ok || !m.HostNetwork || m.NetnsPath != "" {
		t.Errorf("hostNetwork: %+v", m)
	}
	if m, ok := r.Metadata(uidB); ok {
		t.Errorf("an annotation forged a pod: %+v", m)
	}
	if s := r.Status(); len(s) != 1 || s[0].Containers != 3 {
		t.Errorf("status %+v", s)
	}
}

func TestCRIOComesAndGoes(t *testing.T) {
	top := t.TempDir()
	dir := filepath.Join(top, "overlay-containers")
	outside := filepath.Join(top, "outside")
	write := func(base, cid string, uid evidence.PodUID) {
		t.Helper()
		labels, err := json.Marshal(kubeLabels(uid, "p"))
		if err != nil {
			t.Fatal(err)
		}
		spec, err := json.Marshal(map[string]any{"annotations": map[string]string{
			crioPrefix + "ContainerType": "sandbox", crioPrefix + "Labels": string(labels),
		}})
		if err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll(filepath.Join(base, cid, "userdata"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(base, cid, "userdata/config.json"), spec, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	r := startRuntime(t, RuntimeConfig{CRIODirs: []string{dir}})
	write(outside, id("e"), uidB)
	write(dir, id("a"), uidA)
	eventually(t, "the first pod", func() bool { _, ok := r.Metadata(uidA); return ok })
	// A link that leads out of the directory is not followed.
	if err := os.Mkdir(filepath.Join(dir, id("e")), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(outside, id("e"), "userdata"), filepath.Join(dir, id("e"), "userdata")); err != nil {
		t.Fatal(err)
	}
	// A file longer than a specification can be is not read.
	big := filepath.Join(dir, id("f"), "userdata")
	if err := os.MkdirAll(big, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(big+"/config.json", make([]byte, maxSpecFile+1), 0o600); err != nil {
		t.Fatal(err)
	}
	write(dir, id("c"), uidC)
	eventually(t, "the second pod", func() bool { _, ok := r.Metadata(uidC); return ok })
	if m, ok := r.Metadata(uidB); ok {
		t.Errorf("followed a link: %+v", m)
	}
	if err := os.RemoveAll(filepath.Join(dir, id("a"))); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the removal", func() bool { _, ok := r.Metadata(uidA); return !ok })
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	eventually(t, "CRI-O gone", func() bool { return connects(r) == 0 })
}

func TestContainersOfPod(t *testing.T) {
	f := newFakeTree(t)
	f.mkdir(dirA + "/" + id("a"))
	f.mkdir(dirA + "/" + id("b"))
	f.mkdir(dirA + "/nested")
	f.mkdir(dirB)
	cfg := f.config(nil)
	x := mustNew(t, cfg)
	x.scan(nil)
	f.procs(dirA+"/"+id("a"), 30, 20)
	process(t, cfg.ProcFS, 30, 700, 5)
	process(t, cfg.ProcFS, 20, 900, 5)
	if err := os.WriteFile(cfg.ProcFS+"/stat", []byte("cpu 1 2\nintr 0 0\nbtime 1000\nprocesses 3\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	got := x.Containers(uidA)
	slices.SortFunc(got, func(a, b ContainerCgroup) int { return strings.Compare(a.ID, b.ID) })
	if len(got) != 2 {
		t.Fatalf("got %+v", got)
	}
	if a := got[0]; a.ID != id("a") || a.Processes != 2 || a.PID != 30 || !a.Started.Equal(time.Unix(1007, 0)) || a.CgroupID == 0 {
		t.Errorf("got %+v", a)
	}
	if b := got[1]; b.ID != id("b") || b.PID != 0 || !b.Started.IsZero() {
		t.Errorf("got %+v", b)
	}
	if got := x.Containers(uidB); len(got) != 0 {
		t.Errorf("got %+v", got)
	}
	if got := x.Containers(uidC); got != nil {
		t.Errorf("a pod that does not live has %+v", got)
	}
	if i, ok := x.Find(uidB); !ok || i.Path != dirB {
		t.Errorf("got %+v %v", i, ok)
	}
}

func TestParseBootTime(t *testing.T) {
	for in, want := range map[string]int64{
		"btime 1700000000\n": 1700000000, "cpu 1\nbtime 5\n": 5,
		"": -1, "btime x\n": -1, "btime -5\n": -1, "cpu 1\n": -1,
	} {
		got, err := parseBootTime(strings.NewReader(in))
		if want < 0 {
			if !errors.Is(err, errStat) {
				t.Errorf("%q: %v, %v", in, got, err)
			}
			continue
		}
		if err != nil || got.Unix() != want {
			t.Errorf("%q: %v, %v", in, got, err)
		}
	}
}

func FuzzMessage(f *testing.F) {
	add := func(m proto.Message) {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	id1 := protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), "abc")
	add(&types.Envelope{Timestamp: timestamppb.New(born), Namespace: "k8s.io", Topic: "/containers/create", Event: &anypb.Any{TypeUrl: "x", Value: id1}})
	add(&containersapi.ListContainerMessage{Container: sandboxOfContainerd(id("a"), uidA, "web", "/run/netns/1", map[string]string{"app": "web"})})
	add(&containersapi.GetContainerResponse{Container: containerOfContainerd(id("b"), uidA, "web", "server", id("a"))})
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, got := decodeEnvelope(b); got != "" && !isID(got) {
			t.Errorf("%q", got)
		}
		if c, err := decodeContainer(b); err == nil {
			if e, ok := containerdRecord(c); ok && (!isID(e.id) || e.uid == "") {
				t.Errorf("%+v", e)
			}
		}
	})
}

// Whatever stands in a specification, what is shown is bounded and harmless.
func FuzzSpec(f *testing.F) {
	for _, name := range []string{id("1"), id("2"), id("3")} {
		b, err := os.ReadFile("testdata/crio/overlay-containers/" + name + "/userdata/config.json")
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		check := func(e *entry) {
			texts := []string{string(e.uid), e.pod, e.namespace, e.name, e.image, e.sandboxID, e.netns}
			for k, v := range e.labels {
				texts = append(texts, k, v)
			}
			for _, s := range texts {
				if len(s) > 3*maxText || strings.ContainsFunc(s, func(r rune) bool { return r < ' ' }) {
					t.Errorf("%q", s)
				}
			}
			if len(e.labels) > maxPodLabels {
				t.Errorf("%d labels", len(e.labels))
			}
		}
		if e, err := crioRecord(id("a"), b); err == nil {
			check(e)
		}
		c := sandboxOfContainerd(id("a"), uidA, string(b), "", map[string]string{string(b): string(b)})
		c.Spec.Value = b
		// Made with containerd's code, read with ours.
		if m, err := proto.Marshal(&containersapi.ListContainerMessage{Container: c}); err == nil {
			read, err := decodeContainer(m)
			if err != nil || read.id != c.GetID() || !bytes.Equal(read.spec, b) || !maps.Equal(read.labels, c.GetLabels()) {
				t.Fatalf("%v: %+v", err, read)
			}
			if e, ok := containerdRecord(read); ok {
				check(e)
			}
		}
	})
}

// The whole list that the CLI asks for, on a node of 10,000 pods.
func BenchmarkList(b *testing.B) {
	const pods = 10_000
	root, err := cgroup.NewRoot("/kubepods")
	if err != nil {
		b.Fatal(err)
	}
	x := mustNew(b, Config{Root: root, Mount: cgroup.Mount{Point: "/none", Root: "/"}, Resolver: newFakeTree(b)})
	r := NewRuntime(RuntimeConfig{})
	for i := range pods {
		uid := evidence.PodUID(fmt.Sprintf("aaaaaaaa-0000-4000-8000-%012d", i))
		path := "/kubepods/burstable/pod" + string(uid)
		x.byDir[path] = &Pod{UID: uid, Path: path, ID: evidence.CgroupID(i + 1)}
		r.catalog.put(&entry{runtime: RuntimeContainerd, id: fmt.Sprintf("%064d", 2*i), sandbox: true, uid: uid, pod: fmt.Sprint("p", i), labels: map[string]string{"app": "x"}})
		r.catalog.put(&entry{runtime: RuntimeContainerd, id: fmt.Sprintf("%064d", 2*i+1), uid: uid, name: "app"})
	}
	b.ReportAllocs()
	for b.Loop() {
		named := 0
		for _, info := range x.List() {
			if m, ok := r.Metadata(info.UID); ok && m.Name != "" {
				named++
			}
		}
		if named != pods {
			b.Fatalf("%d named", named)
		}
	}
}
