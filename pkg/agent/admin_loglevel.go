// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"

	"github.com/latchkey-dev/latchkey/pkg/adminapi"
)

// levelSetter is whoever keeps the levels of the log's components; *Agent is
// one.
type levelSetter interface {
	LogLevels() map[string]slog.Level
	SetLogLevel(component string, level slog.Level) error
}

var _ levelSetter = (*Agent)(nil)

func (a *Agent) logLevels() (adminapi.LogLevels, error) {
	out := adminapi.LogLevels{Levels: map[string]string{}}
	for component, level := range a.LogLevels() {
		out.Levels[component] = strings.ToLower(level.String())
	}
	return out, nil
}

func (a *Agent) setLogLevel(r *http.Request) (any, error) {
	var change adminapi.LogLevel
	if err := json.NewDecoder(io.LimitReader(r.Body, 4096)).Decode(&change); err != nil {
		return nil, fmt.Errorf("%w: give a component and a level as JSON", adminapi.ErrInvalid)
	}
	var level slog.Level
	switch change.Level {
	case "debug":
		level = slog.LevelDebug
	case "info":
		level = slog.LevelInfo
	case "warn":
		level = slog.LevelWarn
	case "error":
		level = slog.LevelError
	default:
		return nil, fmt.Errorf("%w: unknown level %q: use debug, info, warn or error", adminapi.ErrInvalid, change.Level)
	}
	if err := a.SetLogLevel(change.Component, level); err != nil {
		if errors.Is(err, ErrLogComponent) {
			return nil, fmt.Errorf("%w: %w", adminapi.ErrInvalid, err)
		}
		return nil, err
	}
	return a.logLevels()
}
