// SPDX-License-Identifier: Apache-2.0

package server

import (
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"gopkg.in/natefinch/lumberjack.v2"
)

// auditLog writes one line of JSON for each exchange and each change. It is no
// logger: it has no levels, cannot be turned down, and its fields are a
// contract. A record that cannot be written is counted and logged, and refuses
// nothing: a full disk must not take every pod's credentials away.
type auditLog struct {
	log *slog.Logger

	mu     sync.Mutex
	w      io.Writer
	closer io.Closer

	written, failed atomic.Uint64
	complained      atomic.Bool
}

// auditStdout is the value of --audit-log that means standard output.
const auditStdout = "-"

// openAudit opens the destination: a file that is rotated, auditStdout, or
// nothing if it is empty.
func openAudit(path string, maxMB, maxFiles int, stdout io.Writer, log *slog.Logger) (*auditLog, error) {
	a := &auditLog{log: log}
	switch path {
	case "":
		a.w = io.Discard
		log.Warn("audit records are thrown away: --audit-log is empty")
	case auditStdout:
		a.w = stdout
	default:
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return nil, fmt.Errorf("audit log: %w", err)
		}
		// Now, not at the first record: who cannot write should not start.
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
		if err != nil {
			return nil, fmt.Errorf("audit log: %w", err)
		}
		f.Close()
		rotated := &lumberjack.Logger{Filename: path, MaxSize: maxMB, MaxBackups: maxFiles}
		a.w, a.closer = rotated, rotated
	}
	return a, nil
}

// Write appends one record.
func (a *auditLog) Write(record any) {
	line, err := json.Marshal(record)
	if err == nil {
		line = append(line, '\n')
		a.mu.Lock()
		_, err = a.w.Write(line)
		a.mu.Unlock()
	}
	if err != nil {
		a.failed.Add(1)
		// Once until it works again.
		if !a.complained.Swap(true) {
			a.log.Error("an audit record could not be written", "error", err)
		}
		return
	}
	a.complained.Store(false)
	a.written.Add(1)
}

// Close closes the file.
func (a *auditLog) Close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closer == nil {
		return nil
	}
	return a.closer.Close()
}
