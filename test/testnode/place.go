// SPDX-License-Identifier: Apache-2.0

//go:build linux

package testnode

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/latchkey-dev/latchkey/pkg/evidence"
)

// pipeGrace bounds how long a command's output is waited for after its end:
// a child which it left behind may hold the pipe open.
const pipeGrace = 5 * time.Second

// Place is where a process runs: a cgroup, a network namespace and a user. It
// is a value; the methods that change it return another one. Get one from
// [Pod.Place], [Pod.In], [Node.HostPlace] or [Node.AgentPlace].
type Place struct {
	node  *Node
	name  string // for messages
	base  string // absolute cgroup directory, made by the node
	dir   string // base, or a nested cgroup below it
	netns *Netns
	home  string
	env   []string
	user  *syscall.Credential
	err   error // of an earlier step, reported when the place is used
}

// Nested is the cgroup at path below this one, made when it is used. A
// workload with a writable cgroup mount makes such cgroups, with any name.
func (p Place) Nested(path string) Place {
	if !filepath.IsLocal(path) {
		p.err = fmt.Errorf("nested cgroup %q is not below its parent", path)
		return p
	}
	p.dir = filepath.Join(p.dir, path)
	return p
}

// InNetns is the same cgroup with another network namespace: another pod's,
// the node's or an isolated one.
func (p Place) InNetns(ns *Netns) Place {
	p.netns = ns
	return p
}

// AsUser is the same place with another user and no supplementary groups. It
// has none of root's capabilities.
func (p Place) AsUser(uid, gid uint32) Place {
	p.user = &syscall.Credential{Uid: uid, Gid: gid}
	return p
}

// WithEnv is the same place with more environment variables ("NAME=value").
// Processes get only PATH, HOME (the pod's directory), LANG, what the Go runtime
// reads for coverage and races, the pod's Env and these: nothing of this process's, such as AWS_PROFILE or HTTP_PROXY.
func (p Place) WithEnv(env ...string) Place {
	p.env = append(append([]string(nil), p.env...), env...)
	return p
}

// CgroupDir is the absolute path of the place's cgroup.
func (p Place) CgroupDir() string { return p.dir }

// CgroupPath is the same relative to the cgroup2 mount, as in
// /proc/PID/cgroup.
func (p Place) CgroupPath() string { return p.node.relative(p.dir) }

// CgroupID is the kernel's id of the place's cgroup, which is made if needed.
func (p Place) CgroupID() (evidence.CgroupID, error) {
	if err := p.prepare(); err != nil {
		return 0, err
	}
	return CgroupID(p.dir)
}

// Netns is the place's network namespace.
func (p Place) Netns() *Netns { return p.netns }

// Move puts a running process into the place's cgroup. Its network namespace
// and its open sockets stay what they are.
func (p Place) Move(pid int) error {
	if err := p.prepare(); err != nil {
		return err
	}
	return moveProcess(p.dir, pid)
}

func (p Place) prepare() error {
	if p.err != nil {
		return fmt.Errorf("%s: %w", p.name, p.err)
	}
	// MkdirAll must not bring a deleted pod's cgroup back.
	if _, err := os.Stat(p.base); err != nil {
		return fmt.Errorf("%s: %w", p.name, err)
	}
	if err := os.MkdirAll(p.dir, 0o755); err != nil {
		return fmt.Errorf("%s: making cgroup: %w", p.name, err)
	}
	return nil
}

func (p Place) environ() []string {
	env := []string{"PATH=" + os.Getenv("PATH"), "HOME=" + p.home, "LANG=C.UTF-8"}
	// The test's own instruments.
	for _, name := range []string{"GOCOVERDIR", "GOTRACEBACK"} {
		if value, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+value)
		}
	}
	// A program built with -race sleeps a second at its exit by default.
	env = append(env, strings.TrimSpace("GORACE=atexit_sleep_ms=0 "+os.Getenv("GORACE")))
	return append(env, p.env...)
}

// Cmd is an [exec.Cmd] that starts in a [Place]. All of its fields may be set
// as usual; Env is the place's unless changed, and is never this process's.
type Cmd struct {
	*exec.Cmd
	place Place
}

// Command prepares a program to run in the place; it is killed when ctx ends.
// Start it with the methods of Cmd.
func (p Place) Command(ctx context.Context, argv ...string) *Cmd {
	if len(argv) == 0 {
		return &Cmd{Cmd: &exec.Cmd{Err: errors.New("no program given")}, place: p}
	}
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = p.environ()
	cmd.Dir = "/"
	cmd.WaitDelay = pipeGrace
	return &Cmd{Cmd: cmd, place: p}
}

// Start starts the program: its first instruction runs inside the cgroup and
// the network namespace. See [exec.Cmd.Start].
func (c *Cmd) Start() error {
	if c.Err != nil {
		return c.Err
	}
	if err := c.place.prepare(); err != nil {
		return err
	}
	cgroup, err := os.Open(c.place.dir)
	if err != nil {
		return fmt.Errorf("%s: opening cgroup: %w", c.place.name, err)
	}
	defer cgroup.Close()
	if c.Env == nil {
		c.Env = c.place.environ() // nil would mean this process's
	}
	if c.SysProcAttr == nil {
		c.SysProcAttr = &syscall.SysProcAttr{}
	}
	// clone3 with CLONE_INTO_CGROUP (Linux 5.7): the process never exists
	// outside. Moving it after the start would leave a moment in which it
	// could open a socket as somebody else.
	c.SysProcAttr.UseCgroupFD = true
	c.SysProcAttr.CgroupFD = int(cgroup.Fd())
	if c.place.user != nil {
		c.SysProcAttr.Credential = c.place.user
	}
	// The child inherits the network namespace of the thread that forks. No
	// Pdeathsig: it would fire when that thread ends.
	if err := c.place.netns.Do(c.Cmd.Start); err != nil {
		return fmt.Errorf("starting %s in %s: %w", filepath.Base(c.Path), c.place.name, err)
	}
	return nil
}

// Run is Start and Wait. See [exec.Cmd.Run].
func (c *Cmd) Run() error {
	if err := c.Start(); err != nil {
		return err
	}
	return c.Wait()
}

// Output runs the program and returns what it wrote to its standard output;
// its standard error is in the [exec.ExitError].
func (c *Cmd) Output() ([]byte, error) {
	if c.Stdout != nil {
		return nil, errors.New("standard output is already set")
	}
	var stdout bytes.Buffer
	c.Stdout = &stdout
	var stderr *tail
	if c.Stderr == nil {
		stderr = &tail{}
		c.Stderr = stderr
	}
	err := c.Run()
	var exit *exec.ExitError
	if stderr != nil && errors.As(err, &exit) {
		exit.Stderr = []byte(stderr.String())
	}
	return stdout.Bytes(), err
}

// CombinedOutput runs the program and returns its standard output and error.
func (c *Cmd) CombinedOutput() ([]byte, error) {
	if c.Stdout != nil || c.Stderr != nil {
		return nil, errors.New("standard output or error is already set")
	}
	var both bytes.Buffer
	c.Stdout, c.Stderr = &both, &both
	err := c.Run()
	return both.Bytes(), err
}

// Exec runs a program in the place and returns its standard output. The error
// holds its standard error.
func (p Place) Exec(ctx context.Context, argv ...string) ([]byte, error) {
	out, err := p.Command(ctx, argv...).Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return out, fmt.Errorf("%s in %s: %w: %s", filepath.Base(argv[0]), p.name, err, strings.TrimSpace(string(exit.Stderr)))
	}
	return out, err
}

// Call runs one action in a process of its own in the place; result, if not
// nil, receives what it returned. See [Proc.Call].
func (p Place) Call(ctx context.Context, action string, args, result any) error {
	proc, err := p.Spawn(ctx)
	if err != nil {
		return err
	}
	err = proc.Call(ctx, action, args, result)
	return errors.Join(err, proc.Close())
}

// marshalArgs keeps a nil out of an action's args.
func marshalArgs(args any) (json.RawMessage, error) {
	if args == nil {
		return json.RawMessage("{}"), nil
	}
	text, err := json.Marshal(args)
	if err != nil {
		return nil, fmt.Errorf("encoding arguments: %w", err)
	}
	return text, nil
}
