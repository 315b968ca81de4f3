// SPDX-License-Identifier: Apache-2.0

package permission

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"reflect"
	"regexp"
	"slices"
	"sync"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/latchkey-dev/latchkey/pkg/sigv4"
)

// Limits of a users file.
const (
	// MaxFile is its size in bytes.
	MaxFile = 8 << 20
	// MinSecret is the least length of a secret access key.
	MinSecret = 16
)

// DefaultInterval is how often the file is looked at.
const DefaultInterval = 2 * time.Second

// Errors of the users file.
var (
	// ErrFile: the file cannot be used.
	ErrFile = errors.New("invalid users file")
	// ErrUserExists: a user of this name is there already.
	ErrUserExists = errors.New("user exists")
	// ErrNoUser: there is no user of this name.
	ErrNoUser = errors.New("no such user")
)

// AccessKey is one of a user's keys. A user may have several, so that a new one
// can be handed out before the old one goes. It prints without its secret.
type AccessKey struct {
	ID     string `yaml:"accessKeyId"`
	Secret string `yaml:"secretAccessKey"`
	// Expires is when it ends; zero: never.
	Expires time.Time `yaml:"expires,omitempty"`
}

// String shows no secret.
func (k AccessKey) String() string { return k.ID }

// GoString shows no secret.
func (k AccessKey) GoString() string { return k.ID }

// MarshalJSON shows no secret.
func (k AccessKey) MarshalJSON() ([]byte, error) {
	var expires *time.Time
	if !k.Expires.IsZero() {
		expires = &k.Expires
	}
	return json.Marshal(struct {
		ID      string     `json:"accessKeyId"`
		Expires *time.Time `json:"expires,omitempty"`
	}{k.ID, expires})
}

// User is somebody with keys and permissions, or, with Node, the agent of one
// node that has no token of its own.
type User struct {
	Name string      `yaml:"name" json:"name"`
	Keys []AccessKey `yaml:"keys" json:"keys"`
	// Node makes the keys those of a node: they are good for
	// AssumeRoleForPodIdentity in its cluster alone, and there are no Permissions.
	Node        *Node        `yaml:"node,omitempty" json:"node,omitempty"`
	Permissions []Permission `yaml:"permissions,omitempty" json:"permissions,omitempty"`
}

// UnmarshalYAML takes one value or a list.
func (v *Values) UnmarshalYAML(n *yaml.Node) error {
	if n.Kind == yaml.ScalarNode {
		var one string
		if err := n.Decode(&one); err != nil {
			return err
		}
		*v = Values{one}
		return nil
	}
	return n.Decode((*[]string)(v))
}

var (
	userName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}$`)
	keyID    = regexp.MustCompile(`^[A-Za-z0-9_-]{4,128}$`)
	secret   = regexp.MustCompile(`^[!-~]+$`)
	// quoted is what the YAML decoder cites of the file, which can be a secret in
	// the wrong place.
	quoted = regexp.MustCompile("`[^`]*`|unknown anchor '.*' referenced")
)

// Parse reads and checks a users file. Errors are ErrFile and name the line.
func Parse(b []byte) ([]User, error) {
	users, _, err := parse(b)
	return users, err
}

type table struct {
	keys  map[string]tableKey
	users int
}

type tableKey struct {
	secret    string
	expires   time.Time
	principal Principal
}

func parse(b []byte) ([]User, *table, error) {
	if len(b) > MaxFile {
		return nil, nil, fmt.Errorf("%w: it is larger than %d bytes", ErrFile, MaxFile)
	}
	var file struct {
		Users []User `yaml:"users"`
	}
	dec := yaml.NewDecoder(bytes.NewReader(b))
	// A misspelt "conditions" would else be a permission without any.
	dec.KnownFields(true)
	if err := dec.Decode(&file); err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, fmt.Errorf("%w: %s", ErrFile, quoted.ReplaceAllString(err.Error(), "a value"))
	}
	var another yaml.Node
	if err := dec.Decode(&another); !errors.Is(err, io.EOF) {
		return nil, nil, fmt.Errorf("%w: more than one YAML document", ErrFile)
	}
	lines := userLines(b)
	t := &table{keys: map[string]tableKey{}, users: len(file.Users)}
	names := map[string]bool{}
	for i, u := range file.Users {
		wrong := func(err error) error {
			line := 0
			if i < len(lines) {
				line = lines[i]
			}
			return fmt.Errorf("%w: line %d: user %q: %w", ErrFile, line, u.Name, err)
		}
		p, err := u.principal()
		if err != nil {
			return nil, nil, wrong(err)
		}
		if names[u.Name] {
			return nil, nil, wrong(ErrUserExists)
		}
		names[u.Name] = true
		for _, k := range u.Keys {
			if _, ok := t.keys[k.ID]; ok {
				return nil, nil, wrong(fmt.Errorf("access key %s is there twice", k.ID))
			}
			t.keys[k.ID] = tableKey{k.Secret, k.Expires, p}
		}
	}
	return file.Users, t, nil
}

// principal checks a user, and makes what its keys stand for.
func (u *User) principal() (Principal, error) {
	p := Principal{Name: u.Name}
	if !userName.MatchString(u.Name) {
		return p, errors.New("a name is 1 to 64 letters, digits and _.@-")
	}
	for _, k := range u.Keys {
		switch {
		case !keyID.MatchString(k.ID):
			return p, errors.New("an accessKeyId is 4 to 128 letters, digits, _ and -")
		case len(k.Secret) < MinSecret || !secret.MatchString(k.Secret):
			return p, fmt.Errorf("the secret of access key %s must be at least %d printable characters", k.ID, MinSecret)
		}
	}
	if u.Node != nil {
		if u.Node.Cluster == "" || u.Node.Name == "" {
			return p, errors.New("a node has a cluster and a name")
		}
		if len(u.Permissions) > 0 {
			return p, errors.New("a node has no permissions: it may ask for credentials in its own cluster")
		}
		node := *u.Node
		p.Node = &node
		return p, nil
	}
	var err error
	p.Policy, err = Compile(u.Permissions)
	return p, err
}

// userLines finds at which line each user begins.
func userLines(b []byte) []int {
	var lines []int
	for _, n := range userNodes(b) {
		lines = append(lines, n.Line)
	}
	return lines
}

func userNodes(b []byte) []*yaml.Node {
	var doc yaml.Node
	if yaml.Unmarshal(b, &doc) != nil || len(doc.Content) == 0 {
		return nil
	}
	if seq := child(doc.Content[0], "users"); seq != nil {
		return seq.Content
	}
	return nil
}

// child finds a value of a YAML mapping.
func child(n *yaml.Node, key string) *yaml.Node {
	if n.Kind != yaml.MappingNode {
		return nil
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == key {
			return n.Content[i+1]
		}
	}
	return nil
}

// Config of Users. Zero values mean what the field says.
type Config struct {
	// Path is the users file, required.
	Path string
	// Interval is how often Run looks whether it changed; 0: DefaultInterval.
	Interval time.Duration
	// Now is the clock for expiry of keys; nil: time.Now.
	Now func() time.Time
	// Changed is told of every change but the first reading. It must not block for
	// long. Nil: nobody is.
	Changed func(Change)
	// Log is told of every change, and of a file that cannot be used; nil: nothing
	// is.
	Log *slog.Logger
}

// Change is what a changed users file has changed, without secrets.
type Change struct {
	// Users and Keys are how many are in force now.
	Users int `json:"users"`
	Keys  int `json:"keys"`
	// Added, Removed and Changed are names of users: Changed are those with other
	// keys, permissions or node.
	Added   []string `json:"added,omitempty"`
	Removed []string `json:"removed,omitempty"`
	Changed []string `json:"changed,omitempty"`
}

// changeOf compares two readings.
func changeOf(before, after []User, keys int) Change {
	c := Change{Users: len(after), Keys: keys}
	had := make(map[string]User, len(before))
	for _, u := range before {
		had[u.Name] = u
	}
	for _, u := range after {
		old, ok := had[u.Name]
		delete(had, u.Name)
		switch {
		case !ok:
			c.Added = append(c.Added, u.Name)
		case !reflect.DeepEqual(old, u):
			c.Changed = append(c.Changed, u.Name)
		}
	}
	c.Removed = slices.Sorted(maps.Keys(had))
	slices.Sort(c.Added)
	slices.Sort(c.Changed)
	return c
}

// Users is the users file, read again when it changes. It implements
// sigv4.Keys; a key's Principal is a Principal. It is safe for concurrent use.
type Users struct {
	cfg Config

	// reloading is held while the file is read, so that changes are told in order.
	reloading sync.Mutex

	mu      sync.RWMutex
	table   *table
	users   []User
	sum     [sha256.Size]byte
	loaded  time.Time
	failure error
	warned  fs.FileMode
}

// Status is how the users file is.
type Status struct {
	// Users and Keys are how many are in force.
	Users, Keys int
	// Loaded is when what is in force was read.
	Loaded time.Time
	// Err is why the file as it is now is not in force; nil if it is.
	Err error
}

// Open reads the file. It must be usable: a server that starts without the
// users it is to have would refuse everybody and look well.
func Open(cfg Config) (*Users, error) {
	if cfg.Interval <= 0 {
		cfg.Interval = DefaultInterval
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	u := &Users{cfg: cfg}
	if err := u.Reload(); err != nil {
		return nil, err
	}
	return u, nil
}

// Reload reads the file now. If it cannot be used, what was in force stays so.
// The content is compared, not the time: several writes can have one time.
func (u *Users) Reload() error {
	u.reloading.Lock()
	defer u.reloading.Unlock()
	b, mode, err := readFile(u.cfg.Path)
	if err != nil {
		return u.failed(err)
	}
	sum := sha256.Sum256(b)
	u.mu.Lock()
	unchanged := u.table != nil && sum == u.sum && u.failure == nil
	warn := mode&0o044 != 0 && mode != u.warned
	u.warned = mode
	u.mu.Unlock()
	if warn {
		u.cfg.Log.Warn("users file can be read by others", "path", u.cfg.Path, "mode", mode.String())
	}
	if unchanged {
		return nil
	}
	users, t, err := parse(b)
	if err != nil {
		return u.failed(fmt.Errorf("%s: %w", u.cfg.Path, err))
	}
	u.mu.Lock()
	first, before := u.table == nil, u.users
	u.table, u.users, u.sum, u.failure, u.loaded = t, users, sum, nil, u.cfg.Now()
	u.mu.Unlock()
	u.cfg.Log.Info("users file loaded", "path", u.cfg.Path, "users", t.users, "keys", len(t.keys))
	if c := changeOf(before, users, len(t.keys)); !first && u.cfg.Changed != nil && len(c.Added)+len(c.Removed)+len(c.Changed) > 0 {
		u.cfg.Changed(c)
	}
	return nil
}

func (u *Users) failed(err error) error {
	u.mu.Lock()
	again := u.failure != nil && u.failure.Error() == err.Error()
	u.failure = err
	had := u.table != nil
	u.mu.Unlock()
	if !again && had {
		u.cfg.Log.Error("users file cannot be used; what was in force stays so", "path", u.cfg.Path, "error", err)
	}
	return err
}

// Run reloads the file when it changes, until ctx ends. It returns the context's
// error.
func (u *Users) Run(ctx context.Context) error {
	tick := time.NewTicker(u.cfg.Interval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
			_ = u.Reload() // told to the log, and by Status
		}
	}
}

// Status returns how the file is.
func (u *Users) Status() Status {
	u.mu.RLock()
	defer u.mu.RUnlock()
	return Status{Users: u.table.users, Keys: len(u.table.keys), Loaded: u.loaded, Err: u.failure}
}

// Lookup implements sigv4.Keys. These keys have no session token.
func (u *Users) Lookup(_ context.Context, accessKeyID, sessionToken string) (sigv4.Key, error) {
	u.mu.RLock()
	k, ok := u.table.keys[accessKeyID]
	u.mu.RUnlock()
	if !ok || sessionToken != "" {
		return sigv4.Key{}, sigv4.ErrUnknownKey
	}
	key := sigv4.Key{Secret: k.secret, Principal: k.principal}
	if !k.expires.IsZero() && !u.cfg.Now().Before(k.expires) {
		return key, sigv4.ErrExpiredKey
	}
	return key, nil
}

// readFile reads a file that only its owner can write: anybody else could make
// himself a user.
func readFile(path string) ([]byte, fs.FileMode, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, fmt.Errorf("users file: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, 0, fmt.Errorf("users file: %w", err)
	}
	if !info.Mode().IsRegular() {
		return nil, 0, fmt.Errorf("%w: %s is not a regular file", ErrFile, path)
	}
	if info.Mode().Perm()&0o022 != 0 {
		return nil, 0, fmt.Errorf("%w: %s has mode %s: others can write it", ErrFile, path, info.Mode().Perm())
	}
	b, err := io.ReadAll(io.LimitReader(f, MaxFile+1))
	if err != nil {
		return nil, 0, fmt.Errorf("users file: %w", err)
	}
	return b, info.Mode().Perm(), nil
}
