// SPDX-License-Identifier: Apache-2.0

package eksauth

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
)

// State is what a client's calls have found out, for people on call. It has no
// secret and no token.
type State struct {
	// LastCall is the end of the last exchange, LastSuccess of the last good one;
	// zero if there was none.
	LastCall, LastSuccess time.Time
	// LastError is the last exchange's, nil if it succeeded.
	LastError error
	// Skew is the service's clock (header Date) minus this node's, when last
	// seen at SkewAt; SkewAt is zero if no answer has told. Date has whole
	// seconds, and the answer was on its way: less than two seconds say nothing.
	Skew   time.Duration
	SkewAt time.Time
	// Credentials describes the node's own.
	Credentials CredentialsState
}

// CredentialsState describes the node's own credentials, without them.
type CredentialsState struct {
	// Source is where the SDK found them, empty if they were never asked for.
	Source string
	// Expires is zero if they do not expire.
	Expires time.Time
	// Err is why there are none.
	Err error
	// Refused: the service's last word about them was that they are unknown or
	// have expired.
	Refused bool
}

// NodeCredentialsRefused tells whether an error says that the service did not
// accept the node's own credentials. With status 403 these codes speak of who
// signed, not of the pod's token.
func NodeCredentialsRefused(err error) bool {
	var api *APIError
	if !errors.As(err, &api) || api.Status != http.StatusForbidden {
		return false
	}
	switch api.Code {
	case "ExpiredTokenException", "ExpiredToken", "UnrecognizedClientException", "InvalidClientTokenId", "MissingAuthenticationTokenException":
		return true
	}
	return false
}

// memory is State under its lock.
type memory struct {
	mu sync.Mutex
	State
}

// State gives what the calls so far have found out.
func (c *Client) State() State {
	c.memory.mu.Lock()
	defer c.memory.mu.Unlock()
	return c.memory.State
}

// noteCredentials remembers what the provider gave.
func (c *Client) noteCredentials(creds aws.Credentials, err error) {
	c.memory.mu.Lock()
	defer c.memory.mu.Unlock()
	s := &c.memory.Credentials
	s.Err = err
	if err != nil {
		return
	}
	s.Source, s.Expires = creds.Source, time.Time{}
	if creds.CanExpire {
		s.Expires = creds.Expires
	}
}

// noteDate remembers how the service's clock differs from this node's.
func (c *Client) noteDate(header http.Header) {
	date, err := http.ParseTime(header.Get("Date"))
	if err != nil {
		return
	}
	now := c.cfg.Now()
	c.memory.mu.Lock()
	defer c.memory.mu.Unlock()
	c.memory.Skew, c.memory.SkewAt = date.Sub(now), now
}

// noteOutcome remembers how an exchange ended.
func (c *Client) noteOutcome(err error) {
	now := c.cfg.Now()
	c.memory.mu.Lock()
	defer c.memory.mu.Unlock()
	s := &c.memory.State
	s.LastCall, s.LastError = now, err
	if err == nil {
		s.LastSuccess = now
	}
	var api *APIError
	switch {
	case NodeCredentialsRefused(err):
		s.Credentials.Refused = true
	case err == nil, errors.As(err, &api) && api.Status != http.StatusForbidden:
		// Judged beyond the signature.
		s.Credentials.Refused = false
	}
}

// Reached is what Reach found.
type Reached struct {
	// Status is the HTTP status: any means that the service, or somebody in
	// between, answers.
	Status int
	// Skew is as in State; HasSkew is false if the answer has no Date.
	Skew    time.Duration
	HasSkew bool
	// Took is the exchange's duration.
	Took time.Duration
}

// Reach connects to the service the way calls do and asks for nothing: the
// request is not signed and carries no token, and any answer will do.
func (c *Client) Reach(ctx context.Context) (Reached, error) {
	ctx, cancel := context.WithTimeout(ctx, c.cfg.AttemptTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.Endpoint()+"/", nil)
	if err != nil {
		return Reached{}, fmt.Errorf("%w: %w", ErrEndpoint, err)
	}
	req.Header.Set("User-Agent", c.cfg.UserAgent)
	started := c.cfg.Now()
	res, err := c.cfg.Transport.RoundTrip(req)
	if err != nil {
		return Reached{}, fmt.Errorf("%w: %w", ErrUnavailable, hideURL(err))
	}
	defer func() { _ = res.Body.Close() }()
	_, _ = io.Copy(io.Discard, io.LimitReader(res.Body, maxAnswer))
	c.noteDate(res.Header)
	now := c.cfg.Now()
	r := Reached{Status: res.StatusCode, Took: now.Sub(started)}
	if date, err := http.ParseTime(res.Header.Get("Date")); err == nil {
		r.Skew, r.HasSkew = date.Sub(now), true
	}
	return r, nil
}
