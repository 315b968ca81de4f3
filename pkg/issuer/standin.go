// SPDX-License-Identifier: Apache-2.0

package issuer

import (
	"context"
	"crypto/rand"
	"encoding/base32"
	"encoding/base64"
	"fmt"
	"log/slog"
	"time"

	"github.com/google/uuid"

	"github.com/latchkey-dev/latchkey/pkg/association"
)

// Marks by which everything that a StandIn issues can be told from STS's.
const (
	// StandInKeyPrefix begins every access key id, which has 20 characters.
	StandInKeyPrefix = "ASIASTANDIN"
	// StandInSecretPrefix begins every secret access key, which has 40 characters.
	StandInSecretPrefix = "standin/"
	// StandInTokenPrefix begins every session token.
	StandInTokenPrefix = "STANDIN//"
)

// StandInConfig is what a StandIn is made of. Zero values mean what the field
// says.
type StandInConfig struct {
	// Duration is as Config.Duration.
	Duration time.Duration
	// NewID makes the UUIDs of session names; nil means random ones.
	NewID func() uuid.UUID
	// Now is the clock; nil means time.Now.
	Now func() time.Time
	// Log is told that there is a stand-in; nil discards it.
	Log *slog.Logger
}

// StandIn issues credentials that open nothing, and calls nobody. It is for
// demonstrations; a server uses it only if it is asked to. It refuses what the
// cluster's limits forbid as Issuer does.
type StandIn struct{ cfg StandInConfig }

// NewStandIn makes a stand-in, and says so in the log.
func NewStandIn(cfg StandInConfig) (*StandIn, error) {
	if cfg.Duration == 0 {
		cfg.Duration = DefaultDuration
	}
	if cfg.Duration < MinDuration || cfg.Duration > MaxDuration {
		return nil, fmt.Errorf("%w: a session of %s: must be %s to %s", ErrConfig, cfg.Duration, MinDuration, MaxDuration)
	}
	if cfg.NewID == nil {
		cfg.NewID = uuid.New
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	cfg.Log.Warn("a stand-in takes the place of STS: the credentials it issues are marked and open nothing",
		"access_key_prefix", StandInKeyPrefix)
	return &StandIn{cfg}, nil
}

// Issue makes marked credentials. Errors are of type *Error.
func (s *StandIn) Issue(_ context.Context, req Request) (Credentials, error) {
	hops, err := plan(req, s.cfg.Duration, s.cfg.NewID())
	if err != nil {
		return Credentials{}, err
	}
	last := hops[len(hops)-1]
	role, err := association.ParseRoleARN(last.roleARN)
	if err != nil {
		return Credentials{}, &Error{kind: ErrInvalidRequest, message: messageRefused, cause: err}
	}
	random := make([]byte, 700)
	_, _ = rand.Read(random) // never fails since Go 1.24
	letters := base32.StdEncoding.EncodeToString(random[:40])
	text := base64.StdEncoding.EncodeToString(random)
	ids := make([]string, len(hops))
	for i := range ids {
		ids[i] = s.cfg.NewID().String()
	}
	return Credentials{
		AccessKeyID:     StandInKeyPrefix + letters[:20-len(StandInKeyPrefix)],
		SecretAccessKey: StandInSecretPrefix + text[:40-len(StandInSecretPrefix)],
		SessionToken:    StandInTokenPrefix + text[40:],
		Expires:         s.cfg.Now().Add(last.duration).UTC().Truncate(time.Second),
		AssumedRoleARN:  sessionARN(role, last.sessionName),
		AssumedRoleID:   "AROASTANDIN" + letters[20:30] + ":" + last.sessionName,
		SessionName:     last.sessionName,
		STSRequestIDs:   ids,
	}, nil
}
