// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path"
	"strings"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/attribution"
	"github.com/latchkey-dev/latchkey/pkg/cgroup"
	"github.com/latchkey-dev/latchkey/pkg/evidence"
	"github.com/latchkey-dev/latchkey/pkg/pods"
	"github.com/latchkey-dev/latchkey/pkg/verdict"
)

// ErrCannotAttest: the mode is enforce somewhere, and the node cannot attest.
// There is no silent downgrade.
var ErrCannotAttest = errors.New("this node cannot attest connections, and attestation is enforced")

// node is what the kernel side of the agent consists of. All fields are nil or
// zero on a node that cannot attest.
type node struct {
	mount    cgroup.Mount
	root     cgroup.Root
	attachAt string // path below the mount
	resolver *cgroup.Resolver
	index    *pods.Index
	kernel   *attribution.Attribution
}

func (n *node) close() error {
	if n == nil {
		return nil
	}
	var errs []error
	if n.kernel != nil {
		errs = append(errs, n.kernel.Close())
	}
	if n.resolver != nil {
		errs = append(errs, n.resolver.Close())
	}
	return errors.Join(errs...)
}

// openNode finds the node's pods and attaches the programs. Nothing listens
// yet, so that no connection can be older than the programs.
func openNode(cfg *Config, levels *logLevels, onPod, onEnd func(*pods.Pod)) (_ *node, err error) {
	n := &node{}
	defer func() {
		if err != nil {
			_ = n.close()
		}
	}()
	if n.mount, err = cgroup.FindMount(""); err != nil {
		return nil, err
	}
	self, err := n.mount.SelfPath("")
	if err != nil && !errors.Is(err, cgroup.ErrOutside) {
		return nil, err
	}
	if n.root, err = cgroup.FindRoot(n.mount, self, cfg.CgroupRoot); err != nil {
		return nil, err
	}
	if n.resolver, err = cgroup.NewResolver(cgroup.ResolverConfig{Mount: n.mount, Owner: n.root.Owner}); err != nil {
		return nil, err
	}
	rootID, err := n.resolver.ID(n.root.Path())
	if err != nil {
		return nil, err
	}
	n.attachAt = attachPoint(n.root.Path(), self)
	n.kernel, err = attribution.Open(attribution.Config{
		CgroupPath: n.mount.Join(n.attachAt),
		PinPath:    cfg.PinPath,
		Addresses:  cfg.BindHosts,
		Ports:      []uint16{cfg.Port},
		Kubepods:   rootID,
		Logger:     levels.logger(LogAttribution),
	})
	if err != nil {
		return nil, err
	}
	inode, cookie, err := pods.OwnNetns()
	if err != nil {
		return nil, fmt.Errorf("the agent's own network namespace: %w", err)
	}
	log := levels.logger(LogPods)
	n.index, err = pods.New(pods.Config{
		Root: n.root, Mount: n.mount, Resolver: n.resolver,
		HostNetns: inode, HostNetnsCookie: cookie,
		Logger: log,
		OnPod:  onPod,
		OnEnd: func(p *pods.Pod) {
			if err := n.kernel.PodEnded(p.ID); err != nil {
				log.Warn("cannot free a pod's ring", "pod_uid", string(p.UID), "error", err)
			}
			onEnd(p)
		},
		OnQoS: func(id evidence.CgroupID) {
			if err := n.kernel.SetQoS([]evidence.CgroupID{id}); err != nil {
				log.Warn("cannot note a QoS directory: its pods share one bound", "cgroup_id", uint64(id), "error", err)
			}
		},
	})
	if err != nil {
		return nil, err
	}
	return n, nil
}

// keepAttached puts programs back that somebody detached, until ctx ends. The
// agent would answer 503 to every new connection else.
func (n *node) keepAttached(ctx context.Context, log *slog.Logger) {
	const interval = 5 * time.Second // a few system calls that read
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	said := ""
	for {
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
		hooks, err := n.kernel.Repair()
		if len(hooks) > 0 {
			log.Error("somebody detached kernel programs; attached them again", "hooks", hooks)
		}
		text := ""
		if err != nil {
			text = err.Error()
		}
		if text != "" && text != said {
			log.Error("kernel programs are not attached, and cannot be attached again; trying on", "error", err)
		}
		said = text
	}
}

// attachPoint is the lowest cgroup that holds both every pod and the agent: the
// connecting sockets and the accepted ones must be below it, and what is not
// below it pays nothing. On an ordinary node it is the top of the hierarchy.
func attachPoint(root, self string) string {
	if self == "" {
		// Not below the mount: then the agent is nowhere that a lower point
		// could include.
		return "/"
	}
	above := path.Dir(root)
	for above != "/" && self != above && !strings.HasPrefix(self, above+"/") {
		above = path.Dir(above)
	}
	return above
}

// enforcedAnywhere tells whether some token leads to enforce mode.
func enforcedAnywhere(p verdict.Policy) bool {
	for _, m := range p.Namespaces {
		if m == verdict.Enforce {
			return true
		}
	}
	return p.Default == verdict.Enforce
}
