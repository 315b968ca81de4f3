// SPDX-License-Identifier: Apache-2.0

package nodeauth

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
)

// Defaults of ProviderConfig.
const (
	// DefaultAttemptTimeout bounds one HTTP exchange.
	DefaultAttemptTimeout = 3 * time.Second
	// DefaultTimeout bounds one fetch with all its attempts.
	DefaultTimeout = 10 * time.Second
	// DefaultBackoff is the longest pause before the second attempt.
	DefaultBackoff = 200 * time.Millisecond
)

const (
	attempts  = 3
	maxAnswer = 64 << 10
	maxToken  = 16 << 10
	// unusable is how long before they expire keys are no longer signed with: a
	// request must not expire on its way.
	unusable = 10 * time.Second
	// After a failed fetch nobody asks again for so long, and up to twice that:
	// pauseNone while there are no keys and somebody waits, else longer.
	pauseNone    = time.Second
	pauseRenewal = 10 * time.Second
)

// One sentinel per outcome of a fetch.
var (
	// ErrProviderConfig: the provider cannot be made.
	ErrProviderConfig = errors.New("invalid settings for node credentials")
	// ErrTokenFile: the token cannot be read.
	ErrTokenFile = errors.New("the node token cannot be read")
	// ErrRefused: the server has said no (4xx, in its own words).
	ErrRefused = errors.New("the server refused the node token")
	// ErrUnavailable: no answer, a 5xx, or one that the server never gives.
	ErrUnavailable = errors.New("node credentials are unavailable")
)

// ProviderConfig is what a Provider is made of.
type ProviderConfig struct {
	// Endpoint is the server's URL; required. Plain http is accepted, with a
	// warning unless it is this machine.
	Endpoint string
	// Cluster is the cluster's name at the server; required.
	Cluster string
	// TokenFile is the projected service-account token with audience Audience;
	// required. It is read at each fetch: the kubelet replaces it.
	TokenFile string
	// HTTP carries the requests. Its timeout and redirects are not used: a
	// redirect would take the token to another host. Nil means a client of its
	// own, with the proxies of the environment and the system's CAs.
	HTTP *http.Client
	// AttemptTimeout, Timeout and Backoff: zero means the default of that name.
	AttemptTimeout, Timeout, Backoff time.Duration
	// Now is the clock; nil means time.Now.
	Now func() time.Time
	// Jitter gives numbers in [0,1); nil means math/rand.
	Jitter func() float64
	// Log gets failures and the first success after one; nil discards them.
	Log *slog.Logger
}

// Provider fetches the node's credentials and keeps them. It is an
// aws.CredentialsProvider that needs no cache around it, and may be used by
// several goroutines.
//
// Credentials are renewed from half their life on, in the background. A server
// that does not answer, or refuses, costs nothing until they expire.
type Provider struct {
	cfg    ProviderConfig
	url    string
	client *http.Client

	mu      sync.Mutex
	current *keys  // nil if there are none
	flight  *fetch // nil if none is under way
	// lastErr is the last fetch's, nil after success; notBefore is when the next
	// may begin.
	lastErr   error
	notBefore time.Time
}

// keys are credentials with their times on this node's clock.
type keys struct {
	aws.Credentials
	renew time.Time
}

// fetch is one exchange under way. done is closed when it has ended.
type fetch struct {
	done chan struct{}
	keys *keys
	err  error
}

var clusterNameForm = regexp.MustCompile(`^[0-9A-Za-z][A-Za-z0-9_-]{0,99}$`)

// NewProvider makes a provider. It does no I/O: the file need not exist yet.
// Errors match ErrProviderConfig.
func NewProvider(cfg ProviderConfig) (*Provider, error) {
	bad := func(format string, args ...any) (*Provider, error) {
		return nil, fmt.Errorf("%w: %w", ErrProviderConfig, fmt.Errorf(format, args...))
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Jitter == nil {
		cfg.Jitter = rand.Float64
	}
	if cfg.AttemptTimeout <= 0 {
		cfg.AttemptTimeout = DefaultAttemptTimeout
	}
	if cfg.Timeout <= 0 {
		cfg.Timeout = DefaultTimeout
	}
	if cfg.Backoff <= 0 {
		cfg.Backoff = DefaultBackoff
	}
	if !clusterNameForm.MatchString(cfg.Cluster) {
		return bad("cluster name %q: 1 to 100 letters, digits, - and _", cfg.Cluster)
	}
	if cfg.TokenFile == "" {
		return bad("no file with the node token")
	}
	base, err := url.Parse(cfg.Endpoint)
	if err != nil {
		return bad("the endpoint is no URL") // err would quote it, and a password in it
	}
	if base.Scheme != "https" && base.Scheme != "http" || base.Hostname() == "" {
		return bad("endpoint %q: need http:// or https:// and a host", base.Redacted())
	}
	if base.User != nil || base.RawQuery != "" || base.Fragment != "" {
		return bad("endpoint %q: user, query and fragment have no meaning here", base.Redacted())
	}
	if base.Scheme == "http" && !isLoopback(base.Hostname()) {
		cfg.Log.Warn("node credentials are fetched over plain http: whoever is on the path can read them",
			"endpoint", base.Redacted())
	}
	client := &http.Client{Transport: newTransport()}
	if cfg.HTTP != nil {
		*client = *cfg.HTTP
	}
	client.Timeout = 0 // bounded by AttemptTimeout
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return &Provider{
		cfg:    cfg,
		client: client,
		url:    strings.TrimSuffix(base.String(), "/") + Path(cfg.Cluster),
	}, nil
}

// newTransport is one connection to one server, used every half hour.
func newTransport() *http.Transport {
	return &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		DialContext:            (&net.Dialer{Timeout: 2 * time.Second}).DialContext,
		TLSHandshakeTimeout:    2 * time.Second,
		MaxResponseHeaderBytes: 32 << 10,
		DisableKeepAlives:      true,
	}
}

func isLoopback(host string) bool {
	if host == "localhost" {
		return true
	}
	addr, err := netip.ParseAddr(host)
	return err == nil && addr.Unmap().IsLoopback()
}

// Retrieve returns the node's credentials. It waits for a fetch only if there
// are none that can be used, and no longer than ctx; the fetch itself goes on.
// Errors match ErrTokenFile, ErrRefused or ErrUnavailable, or are ctx's.
func (p *Provider) Retrieve(ctx context.Context) (aws.Credentials, error) {
	p.mu.Lock()
	now := p.cfg.Now()
	if p.current != nil && !now.Before(p.current.Expires.Add(-unusable)) {
		p.forget()
	}
	current := p.current
	if (current == nil || !now.Before(current.renew)) && p.flight == nil && !now.Before(p.notBefore) {
		p.flight = &fetch{done: make(chan struct{})}
		go p.run(p.flight)
	}
	flight, lastErr := p.flight, p.lastErr
	p.mu.Unlock()

	switch {
	case current != nil:
		return current.Credentials, nil
	case flight == nil:
		return aws.Credentials{}, lastErr
	}
	select {
	case <-flight.done:
	case <-ctx.Done():
		return aws.Credentials{}, fmt.Errorf("waiting for node credentials: %w", ctx.Err())
	}
	if flight.err != nil {
		return aws.Credentials{}, flight.err
	}
	return flight.keys.Credentials, nil
}

// Invalidate forgets the credentials at hand: the server does not accept them
// any more.
func (p *Provider) Invalidate() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.forget()
}

// forget drops the credentials. From now on somebody waits, so a pause that was
// meant for a renewal ends. p.mu is held.
func (p *Provider) forget() {
	if p.current != nil {
		p.current, p.notBefore = nil, time.Time{}
	}
}

// run does one fetch and publishes what came of it.
func (p *Provider) run(f *fetch) {
	// Not the caller's context: whoever gives up must not take the others' keys
	// with him.
	ctx, cancel := context.WithTimeout(context.Background(), p.cfg.Timeout)
	defer cancel()
	f.keys, f.err = p.fetch(ctx)

	p.mu.Lock()
	defer p.mu.Unlock()
	defer close(f.done)
	p.flight = nil
	failed := p.lastErr
	p.lastErr = f.err
	if f.err == nil {
		p.current, p.notBefore = f.keys, time.Time{}
		if failed != nil {
			p.cfg.Log.Info("node credentials can be had again", "expires", f.keys.Expires)
		}
		return
	}
	pause := pauseRenewal
	if p.current == nil {
		pause = pauseNone // also after a refusal: a new token may be there any moment
	}
	p.notBefore = p.cfg.Now().Add(pause + time.Duration(p.cfg.Jitter()*float64(pause)))
	if p.current != nil {
		p.cfg.Log.Warn("node credentials could not be renewed", "error", f.err, "expires", p.current.Expires)
	} else {
		p.cfg.Log.Error("no node credentials", "error", f.err)
	}
}

// fetch tries until the server has decided or time is up.
func (p *Provider) fetch(ctx context.Context) (*keys, error) {
	for n := 1; ; n++ {
		k, err := p.attempt(ctx)
		if err == nil || n == attempts || errors.Is(err, ErrRefused) || ctx.Err() != nil {
			return k, err
		}
		// Full jitter: nodes that lost the server together do not come back
		// together.
		timer := time.NewTimer(time.Duration(p.cfg.Jitter() * float64(p.cfg.Backoff<<(n-1))))
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil, err
		}
	}
}

func (p *Provider) attempt(ctx context.Context) (*keys, error) {
	token, err := readToken(p.cfg.TokenFile)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrTokenFile, err)
	}
	body, err := json.Marshal(Request{Token: token})
	if err != nil {
		return nil, fmt.Errorf("encoding the request for node credentials: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, p.cfg.AttemptTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, p.url, bytes.NewReader(body))
	if err != nil {
		return nil, fmt.Errorf("%w: making the request: %w", ErrUnavailable, hideURL(err))
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", "latchkey-agent")
	started := p.cfg.Now()
	res, err := p.client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, hideURL(err))
	}
	defer func() { _ = res.Body.Close() }()
	answer, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer+1))
	if err != nil {
		return nil, fmt.Errorf("%w: reading the answer: %w", ErrUnavailable, err)
	}
	if len(answer) > maxAnswer {
		return nil, fmt.Errorf("%w: the answer has more than %d bytes", ErrUnavailable, maxAnswer)
	}
	if res.StatusCode != http.StatusOK {
		return nil, refusal(res, answer, token)
	}
	return decode(answer, started, res.Header.Get("Date"))
}

// readToken reads a projected token. The kubelet writes no line break; a person
// does.
func readToken(path string) (string, error) {
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("opening: %w", err)
	}
	defer func() { _ = file.Close() }()
	if info, err := file.Stat(); err != nil || !info.Mode().IsRegular() {
		return "", fmt.Errorf("%s is not a regular file", path)
	}
	b, err := io.ReadAll(io.LimitReader(file, maxToken+1))
	if err != nil {
		return "", fmt.Errorf("reading %s: %w", path, err)
	}
	token := strings.TrimSpace(string(b))
	if token == "" || len(b) > maxToken {
		return "", fmt.Errorf("%s has %d bytes, not a token's", path, len(b))
	}
	return token, nil
}

// decode reads a 200. Half an answer is none.
func decode(body []byte, now time.Time, date string) (*keys, error) {
	var in Answer
	if json.Unmarshal(body, &in) != nil {
		// The error's own text may quote the body, and with it a secret.
		return nil, fmt.Errorf("%w: the answer cannot be decoded", ErrUnavailable)
	}
	c := in.Credentials
	if c.AccessKeyID == "" || c.SecretAccessKey == "" || c.SessionToken == "" || c.Expiration <= 0 {
		return nil, fmt.Errorf("%w: the answer is not complete", ErrUnavailable)
	}
	// How long they live counts from the server's clock: this node's may be wrong.
	server, err := http.ParseTime(date)
	if err != nil {
		server = now
	}
	life := time.Unix(c.Expiration, 0).Sub(server)
	if life <= unusable || life > 24*time.Hour {
		return nil, fmt.Errorf("%w: the credentials live for %s", ErrUnavailable, life)
	}
	return &keys{
		Credentials: aws.Credentials{
			AccessKeyID: c.AccessKeyID, SecretAccessKey: c.SecretAccessKey, SessionToken: c.SessionToken,
			Source: "LatchkeyNodeToken", CanExpire: true, Expires: now.Add(life),
		},
		renew: now.Add(life / 2),
	}, nil
}

// refusal reads an answer that is not 200. Only a 4xx that names an error of the
// API is the server's no: others come from something in between, or mean "not
// now".
func refusal(res *http.Response, body []byte, token string) error {
	code, _, _ := strings.Cut(res.Header.Get("X-Amzn-Errortype"), ":")
	var in struct {
		Message string `json:"message"`
	}
	_ = json.Unmarshal(body, &in) // what is not JSON says nothing
	sentinel := ErrUnavailable
	switch s := res.StatusCode; {
	case s == http.StatusTooManyRequests || s == http.StatusRequestTimeout || s == http.StatusProxyAuthRequired:
	case s >= 400 && s < 500 && code != "":
		sentinel = ErrRefused
	}
	return fmt.Errorf("%w: %d %s: %s", sentinel, res.StatusCode, clean(code, token), clean(in.Message, token))
}

// clean makes a text from outside fit for logs: bounded, printable, and without
// the token, should somebody have echoed it.
func clean(text, token string) string {
	text = strings.ReplaceAll(text, token, "[token]")
	text = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(text, "?"))
	if len(text) > 256 {
		text = strings.ToValidUTF8(text[:256], "") + "..."
	}
	return text
}

// hideURL drops the URL that net/http puts around transport errors: it can
// carry a proxy's user and password.
func hideURL(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}
