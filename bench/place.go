// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/latchkey-dev/latchkey/test/rig"
	"github.com/latchkey-dev/latchkey/test/standin/tokens"
	"github.com/latchkey-dev/latchkey/test/testnode"
)

// Addresses of what Latchkey is compared with, on the node's loopback link as
// the agent's own.
const (
	nginxHost = "169.254.170.24"
	bareHost  = "169.254.170.25"
	sinkHost  = "169.254.170.26"
)

// node is a rig with an agent and pods.
type node struct {
	*rig.Rig
	b     *bench
	agent *rig.Agent
}

// newNode makes a rig without an agent.
func (b *bench) newNode(signer tokens.Config) (*node, error) {
	r, err := rig.New(b.ctx, rig.Config{AgentBinary: b.agent, Signer: signer})
	if err != nil {
		return nil, err
	}
	n := &node{Rig: r, b: b}
	for _, host := range []string{nginxHost, bareHost, sinkHost} {
		if _, err := r.Node.HostPlace().Exec(b.ctx, "ip", "address", "add", host+"/32", "dev", "lo"); err != nil {
			return nil, errors.Join(err, r.Close())
		}
	}
	return n, nil
}

func (n *node) start(more ...string) (err error) {
	n.agent, err = n.StartAgent(n.b.ctx, more...)
	return err
}

func (n *node) stop() error {
	ctx, cancel := context.WithTimeout(n.b.ctx, 30*time.Second)
	defer cancel()
	return n.agent.Stop(ctx)
}

// pod adds one with a role of its own.
func (n *node) pod(name string) (*rig.Pod, error) {
	n.Associate("bench", name, name)
	return n.AddPod(n.b.ctx, testnode.PodConfig{Name: name, Namespace: "bench", ServiceAccount: name})
}

// warm makes sure that a pod's credentials are cached, and returns the answer.
func (n *node) warm(p *rig.Pod) (string, error) {
	a, err := rig.Ask(n.b.ctx, p.Place(), rig.Host4, p.Token)
	if err == nil && a.Status != http.StatusOK {
		err = fmt.Errorf("the pod is answered %d %s", a.Status, a.Body)
	}
	return a.Body, err
}

// call runs an action in a process and returns what it returned.
func call[T any](n *node, proc *testnode.Proc, action string, args any) (result T, err error) {
	err = proc.Call(n.b.ctx, action, args, &result)
	return result, err
}

// nginx starts nginx with two workers that answer with the body, and returns
// its process id.
func (n *node) nginx(body string) (pid int, stop func(), err error) {
	dir := filepath.Join(n.Node.Dir(), "nginx")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return 0, nil, err
	}
	conf := filepath.Join(dir, "nginx.conf")
	text := fmt.Sprintf(`daemon off;
worker_processes 2;
pid %[1]s/pid;
error_log %[1]s/error.log;
events { worker_connections 1024; }
http {
	access_log off;
	keepalive_requests 1000000000;
	default_type application/json;
	server {
		listen %[2]s:80 backlog=4096;
		location = %[3]s { return 200 '%[4]s'; }
	}
}
`, dir, nginxHost, rig.Path, body)
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
		return 0, nil, err
	}
	cmd := n.Node.HostPlace().Command(n.b.ctx, "nginx", "-p", dir, "-c", conf)
	if err := cmd.Start(); err != nil {
		return 0, nil, err
	}
	stop = func() {
		_ = cmd.Process.Signal(os.Interrupt)
		_ = cmd.Wait()
	}
	return cmd.Process.Pid, stop, n.await(nginxHost + ":80")
}

// await waits until somebody listens on the address.
func (n *node) await(address string) error {
	var err error
	for range 200 {
		err = n.Node.Do(func() error {
			c, err := (&net.Dialer{}).DialContext(n.b.ctx, "tcp", address)
			if err == nil {
				c.Close()
			}
			return err
		})
		if err == nil {
			return nil
		}
		select {
		case <-n.b.ctx.Done():
			return n.b.ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
	return fmt.Errorf("nobody listens on %s: %w", address, err)
}

// tick is the unit of /proc/PID/stat: USER_HZ, which the kernel fixes at 100
// for user space on every architecture that Latchkey runs on.
const tick = 10 * time.Millisecond

// cpu is the processor time that processes and their children have used.
func cpu(pids ...int) (time.Duration, error) {
	var sum time.Duration
	for _, pid := range pids {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return 0, err
		}
		// Behind the command's name, which may hold anything.
		fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
		for _, i := range []int{11, 12} { // utime, stime
			ticks, err := strconv.ParseInt(fields[i], 10, 64)
			if err != nil {
				return 0, err
			}
			sum += time.Duration(ticks) * tick
		}
		children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
		if err != nil {
			return 0, err
		}
		for _, child := range strings.Fields(string(children)) {
			id, err := strconv.Atoi(child)
			if err != nil {
				return 0, err
			}
			used, err := cpu(id)
			if err != nil {
				return 0, err
			}
			sum += used
		}
	}
	return sum, nil
}

// loadResult is what wrk counted.
type loadResult struct {
	requests, failed int
}

// wrk makes requests with the pod's token from the pod, on 16 connections.
func (n *node) wrk(p *rig.Pod, host string, connections int, keep bool, token string, length time.Duration) (loadResult, error) {
	args := []string{"wrk", "-t2", fmt.Sprintf("-c%d", connections), fmt.Sprintf("-d%dms", length.Milliseconds()), "-H", "Accept: application/json"}
	// wrk knows whole seconds only.
	args[3] = fmt.Sprintf("-d%ds", max(1, int(length.Seconds())))
	if token != "" {
		args = append(args, "-H", "Authorization: "+token)
	}
	if !keep {
		args = append(args, "-H", "Connection: close")
	}
	out, err := p.Place().Exec(n.b.ctx, append(args, "http://"+host+rig.Path)...)
	if err != nil {
		return loadResult{}, err
	}
	return readWrk(string(out))
}

var errNoCount = errors.New("wrk printed no count of requests")

func readWrk(out string) (r loadResult, err error) {
	m := regexp.MustCompile(`(\d+) requests in`).FindStringSubmatch(out)
	if m == nil {
		return r, fmt.Errorf("%w: %s", errNoCount, out)
	}
	r.requests, _ = strconv.Atoi(m[1])
	if m := regexp.MustCompile(`Non-2xx or 3xx responses: (\d+)`).FindStringSubmatch(out); m != nil {
		n, _ := strconv.Atoi(m[1])
		r.failed += n
	}
	if m := regexp.MustCompile(`Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)`).FindStringSubmatch(out); m != nil {
		for _, s := range m[1:] {
			n, _ := strconv.Atoi(s)
			r.failed += n
		}
	}
	return r, nil
}

// kilobytes reads fields of /proc/PID/status.
func kilobytes(pid int, field string) (int, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, field+":"); ok {
			return strconv.Atoi(strings.Fields(rest)[0])
		}
	}
	return 0, fmt.Errorf("no %s of process %d", field, pid)
}
