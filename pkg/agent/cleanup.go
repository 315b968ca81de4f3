// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"github.com/latchkey-dev/latchkey/pkg/attribution"
)

func cleanupPins(path string) ([]string, error) {
	removed, err := attribution.Cleanup(path)
	if err != nil {
		return removed, fmt.Errorf("pins: %w", err)
	}
	return removed, nil
}

// socketUnused: nobody listens on the admin socket.
func socketUnused(socket string) error {
	if socket == "" {
		return nil
	}
	if c, err := net.Dial("unix", socket); err == nil {
		c.Close()
		return fmt.Errorf("%w, and listens on %s: stop it first", ErrAnotherAgent, socket)
	}
	return nil
}

// cleanupFiles removes the key cache and the admin socket, and their
// directories if nothing else is in them.
func cleanupFiles(stateDir, socket string) ([]string, error) {
	var removed []string
	var errs []error
	note := func(r []string, err error) {
		removed = append(removed, r...)
		errs = append(errs, err)
	}
	if socket != "" {
		note(removeIfThere(socket))
		_ = os.Remove(filepath.Dir(socket)) // stays if not empty
	}
	if stateDir != "" {
		note(removeIfThere(filepath.Join(stateDir, keyCacheName)))
		_ = os.Remove(stateDir)
	}
	return removed, errors.Join(errs...)
}
