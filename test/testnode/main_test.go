// SPDX-License-Identifier: Apache-2.0

//go:build linux

package testnode

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// where is what a process in a pod finds out about itself.
type where struct {
	Cgroup    string
	Netns     uint64
	UID       int
	Home      string
	Secret    string
	Addresses []string
}

func TestMain(m *testing.M) {
	Main(Actions{
		"where": func(*Session, json.RawMessage) (any, error) {
			own, err := ownCgroup()
			if err != nil {
				return nil, err
			}
			var stat unix.Stat_t
			if err := unix.Stat("/proc/self/ns/net", &stat); err != nil {
				return nil, err
			}
			w := where{Cgroup: own, Netns: stat.Ino, UID: os.Getuid(), Home: os.Getenv("HOME"), Secret: os.Getenv("TESTNODE_SECRET")}
			addrs, err := net.InterfaceAddrs()
			for _, a := range addrs {
				w.Addresses = append(w.Addresses, a.String())
			}
			return w, err
		},
		"count": func(s *Session, _ json.RawMessage) (any, error) {
			n, _ := s.Values["n"].(int)
			s.Values["n"] = n + 1
			return n + 1, nil
		},
		// Not select {}: without cgo the runtime calls that a deadlock.
		"sleep": func(*Session, json.RawMessage) (any, error) { time.Sleep(time.Hour); return nil, nil },
		"exit":  func(*Session, json.RawMessage) (any, error) { os.Exit(3); return nil, nil },
		// nomain makes a node as a program does that never called Main and was
		// therefore executed again as a whole.
		"nomain": func(*Session, json.RawMessage) (any, error) {
			os.Setenv(actionEnv, roleWatchdog)
			_, err := New(context.Background(), Config{})
			return errors.Is(err, ErrNoMain), nil
		},
		// node makes a node that its own process is then killed over.
		"node": func(s *Session, _ json.RawMessage) (any, error) {
			n, err := New(context.Background(), Config{})
			if err != nil {
				return nil, err
			}
			s.Values["node"] = n
			if _, err := n.AddPod(context.Background(), PodConfig{Name: "orphan"}); err != nil {
				return nil, errors.Join(err, n.Close())
			}
			return []string{n.CgroupRoot(), n.Dir()}, nil
		},
		"crash": func(*Session, json.RawMessage) (any, error) {
			go func() { panic("on purpose") }()
			select {}
		},
	})
	os.Exit(m.Run())
}
