// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
)

// Components of the agent's log, the values of the key "component".
const (
	LogAgent       = "agent"       // start, stop, listeners, probes
	LogAttribution = "attribution" // the kernel's programs
	LogPods        = "pods"        // the index of pods and their names
	LogLinkLocal   = "linklocal"   // addresses and routes
	LogTokens      = "tokens"      // the keys that tokens are checked with
	LogUpstream    = "upstream"    // calls of EKS Auth, and the node's credentials for them
	LogCache       = "cache"       // credentials and their renewal
	LogEndpoint    = "endpoint"    // connections of pods
	LogRequests    = "requests"    // what became of single requests
	LogAudit       = "audit"       // the audit's own troubles
)

func logComponents() []string {
	return []string{LogAgent, LogAttribution, LogPods, LogLinkLocal, LogTokens, LogUpstream, LogCache, LogEndpoint, LogRequests, LogAudit}
}

// LogAll names every component at once, for SetLogLevel.
const LogAll = "all"

// ErrLogComponent: the log has no such component; the text names those it has.
var ErrLogComponent = errors.New("unknown log component")

// logLevels has one level per component, which can be changed at any time.
type logLevels struct {
	base   slog.Handler
	levels map[string]*slog.LevelVar // never changed once made
}

// newLogLevels gives every component the same level. Base must let through
// whatever a level may be set to later.
func newLogLevels(base slog.Handler, level slog.Level) *logLevels {
	l := &logLevels{base: base, levels: map[string]*slog.LevelVar{}}
	for _, c := range logComponents() {
		v := new(slog.LevelVar)
		v.Set(level)
		l.levels[c] = v
	}
	return l
}

// logger gives a component's logger.
func (l *logLevels) logger(component string) *slog.Logger {
	level, ok := l.levels[component]
	if !ok {
		level = l.levels[LogAgent]
	}
	return slog.New(leveled{l.base, level}).With("component", component)
}

// leveled puts a component's level before the handler that all share.
type leveled struct {
	slog.Handler
	level *slog.LevelVar
}

// Enabled implements slog.Handler.
func (h leveled) Enabled(ctx context.Context, level slog.Level) bool {
	return level >= h.level.Level() && h.Handler.Enabled(ctx, level)
}

// WithAttrs implements slog.Handler.
func (h leveled) WithAttrs(attrs []slog.Attr) slog.Handler {
	return leveled{h.Handler.WithAttrs(attrs), h.level}
}

// WithGroup implements slog.Handler.
func (h leveled) WithGroup(name string) slog.Handler {
	return leveled{h.Handler.WithGroup(name), h.level}
}

func (l *logLevels) list() map[string]slog.Level {
	out := make(map[string]slog.Level, len(l.levels))
	for c, v := range l.levels {
		out[c] = v.Level()
	}
	return out
}

func (l *logLevels) set(component string, level slog.Level) error {
	if component == LogAll {
		for _, v := range l.levels {
			v.Set(level)
		}
		return nil
	}
	v, ok := l.levels[component]
	if !ok {
		return fmt.Errorf("%w %q: use %s or %s", ErrLogComponent, component, strings.Join(slices.Sorted(maps.Keys(l.levels)), ", "), LogAll)
	}
	v.Set(level)
	return nil
}

// LogLevels gives the level of each component of the log.
func (a *Agent) LogLevels() map[string]slog.Level { return a.levels.list() }

// SetLogLevel changes the level of a component, or of every one (LogAll), until
// the agent ends. The error wraps ErrLogComponent.
func (a *Agent) SetLogLevel(component string, level slog.Level) error {
	if err := a.levels.set(component, level); err != nil {
		return err
	}
	a.log.Info("log level changed", "changed", component, "level", level.String())
	return nil
}
