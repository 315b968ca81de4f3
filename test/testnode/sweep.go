// SPDX-License-Identifier: Apache-2.0

//go:build linux

package testnode

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// namePrefix begins the names of all nodes: latchkey-node-<pid>-<n>.
const namePrefix = "latchkey-node-"

// ownerOf reads the pid out of a node's name.
func ownerOf(name string) (pid int, ok bool) {
	rest, ok := strings.CutPrefix(name, namePrefix)
	if !ok {
		return 0, false
	}
	first, second, ok := strings.Cut(rest, "-")
	if !ok {
		return 0, false
	}
	pid, err := strconv.Atoi(first)
	if err != nil || pid <= 0 {
		return 0, false
	}
	if _, err := strconv.ParseUint(second, 10, 31); err != nil {
		return 0, false
	}
	return pid, true
}

// Sweep removes what dead programs left of their nodes: cgroups named
// latchkey-node-<pid>-<n> and directories of that name in cfg.Dir, with their
// mounts. A node is dead if no process has that pid and nobody holds the lock
// on its directory. It returns the paths removed.
func Sweep(ctx context.Context, cfg Config) ([]string, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	mountPoint, err := Cgroup2Mount()
	if err != nil {
		return nil, err
	}
	var removed []string
	var errs []error
	for _, parent := range []struct {
		dir    string
		remove func(dir string) error
	}{
		{mountPoint, func(dir string) error { return removeCgroup(ctx, dir) }},
		{cfg.Dir, removeDir},
	} {
		entries, err := os.ReadDir(parent.dir)
		if err != nil {
			errs = append(errs, fmt.Errorf("looking for left-over nodes: %w", err))
			continue
		}
		for _, entry := range entries {
			dir := filepath.Join(parent.dir, entry.Name())
			dead, err := isDead(dir, entry.Name())
			if err == nil && dead {
				err = parent.remove(dir)
			}
			if err != nil {
				errs = append(errs, err)
			} else if dead {
				removed = append(removed, dir)
			}
		}
	}
	if err := errors.Join(errs...); err != nil {
		return removed, fmt.Errorf("sweeping left-over nodes: %w", err)
	}
	return removed, nil
}

// isDead says whether dir is a node's whose program is gone. The pid alone
// would be wrong for a program in another pid namespace, the lock alone in the
// moment between making the directory and locking it.
func isDead(dir, name string) (bool, error) {
	pid, ok := ownerOf(name)
	if !ok {
		return false, nil
	}
	if err := unix.Kill(pid, 0); !errors.Is(err, unix.ESRCH) {
		return false, nil
	}
	info, err := os.Lstat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil // somebody else sweeps
	}
	if err != nil {
		return false, fmt.Errorf("looking at %s: %w", dir, err)
	}
	// The temporary directory is everybody's: leave alone what is not ours.
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok || !info.IsDir() || int(stat.Uid) != os.Geteuid() {
		return false, nil
	}
	lock, err := lockDir(dir)
	if errors.Is(err, unix.EWOULDBLOCK) || errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return true, lock.Close()
}

// watchdogArgs are what a watchdog cleans up.
type watchdogArgs struct {
	Root string // the node's cgroup
	Dir  string // the node's directory
}

const (
	watchdogReady = "ready\n"
	watchdogDone  = "done\n"
)

// watchdog is a process that outlives this one and removes its node then. It
// sees that by the end of a pipe, which the kernel closes however we die.
type watchdog struct {
	cmd  *exec.Cmd
	pipe io.WriteCloser
}

func startWatchdog(ctx context.Context, args watchdogArgs) (*watchdog, error) {
	text, err := json.Marshal(args)
	if err != nil {
		return nil, fmt.Errorf("starting the watchdog: %w", err)
	}
	cmd := exec.Command(selfExe)
	cmd.Args = []string{"latchkey-testnode-watchdog"}
	cmd.Env = []string{actionEnv + "=" + roleWatchdog, argsEnv + "=" + string(text), "GORACE=atexit_sleep_ms=0"}
	cmd.Dir = "/"
	// Out of reach of the terminal's Ctrl-C.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	pipe, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("starting the watchdog: %w", err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("starting the watchdog: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting the watchdog: %w", err)
	}
	w := &watchdog{cmd: cmd, pipe: pipe}
	// Without Main this program would now run as a whole a second time.
	stop := context.AfterFunc(ctx, func() { cmd.Process.Kill() })
	defer stop()
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if line == watchdogReady {
		return w, nil
	}
	cmd.Process.Kill()
	pipe.Close()
	cmd.Wait() // killed: its status says nothing
	if ctx.Err() != nil {
		return nil, fmt.Errorf("starting the watchdog: %w", ctx.Err())
	}
	return nil, fmt.Errorf("starting the watchdog: %w (it said %q, %v)", ErrNoMain, line, err)
}

// dismiss ends the watchdog without letting it do anything.
func (w *watchdog) dismiss() error {
	if _, err := io.WriteString(w.pipe, watchdogDone); err != nil {
		// Then it has ended, and by whose hand is told below.
		w.pipe.Close()
	}
	w.pipe.Close()
	if err := w.cmd.Wait(); err != nil {
		return fmt.Errorf("ending the watchdog: %w", err)
	}
	return nil
}

// watch is the watchdog's own side.
func watch(text string) error {
	signal.Ignore(unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT, unix.SIGPIPE)
	var args watchdogArgs
	if err := json.Unmarshal([]byte(text), &args); err != nil {
		return fmt.Errorf("decoding the watchdog's arguments: %w", err)
	}
	if _, ok := ownerOf(filepath.Base(args.Root)); !ok || filepath.Base(args.Root) != filepath.Base(args.Dir) {
		return fmt.Errorf("%q and %q are not a node's", args.Root, args.Dir)
	}
	if _, err := io.WriteString(os.Stdout, watchdogReady); err != nil {
		return fmt.Errorf("reporting to the test: %w", err)
	}
	said, err := io.ReadAll(os.Stdin)
	if err != nil {
		return fmt.Errorf("watching the test: %w", err)
	}
	if string(said) == watchdogDone {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	return errors.Join(removeCgroup(ctx, args.Root), removeDir(args.Dir))
}
