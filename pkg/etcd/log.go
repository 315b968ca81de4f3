// SPDX-License-Identifier: Apache-2.0

package etcd

import (
	"context"
	"log/slog"
	"strings"

	"go.uber.org/zap/zapcore"
)

// core hands what etcd logs to slog. etcd's "info" tells of its own inner life,
// which is this program's "debug". Its "debug" is not for anybody: it has whole
// requests, with the values that are stored.
type core struct {
	log    *slog.Logger
	fields []zapcore.Field
}

// expected are warnings that a server without listeners, and one that has never
// needed a raft snapshot, give at each start.
func expected(message string) bool {
	switch message {
	case "Running http and grpc server on single port. This is not recommended for production.",
		"Failed to detect storage schema version. Please wait till wal snapshot before upgrading cluster.":
		return true
	}
	return false
}

func level(l zapcore.Level) slog.Level {
	switch {
	case l >= zapcore.ErrorLevel:
		return slog.LevelError
	case l == zapcore.WarnLevel:
		return slog.LevelWarn
	}
	return slog.LevelDebug
}

// Enabled is zapcore.Core's.
func (c *core) Enabled(l zapcore.Level) bool {
	return l > zapcore.DebugLevel && c.log.Enabled(context.Background(), level(l))
}

// With is zapcore.Core's.
func (c *core) With(fields []zapcore.Field) zapcore.Core {
	return &core{log: c.log, fields: append(c.fields[:len(c.fields):len(c.fields)], fields...)}
}

// Check is zapcore.Core's.
func (c *core) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) && !expected(e.Message) {
		return ce.AddCore(e, c)
	}
	return ce
}

// Write is zapcore.Core's.
func (c *core) Write(e zapcore.Entry, fields []zapcore.Field) error {
	enc := zapcore.NewMapObjectEncoder()
	for _, f := range c.fields {
		f.AddTo(enc)
	}
	for _, f := range fields {
		f.AddTo(enc)
	}
	attrs := make([]slog.Attr, 0, len(enc.Fields)+1)
	attrs = append(attrs, slog.String("component", "etcd"))
	for k, v := range enc.Fields {
		attrs = append(attrs, slog.Any(key(k), v))
	}
	c.log.LogAttrs(context.Background(), level(e.Level), e.Message, attrs...)
	return nil
}

// Sync is zapcore.Core's.
func (c *core) Sync() error { return nil }

// key is an etcd field's name as this program's logs write names.
func key(k string) string { return strings.ReplaceAll(k, "-", "_") }
