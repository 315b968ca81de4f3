// SPDX-License-Identifier: Apache-2.0

package permission

import (
	"bytes"
	"crypto/rand"
	"encoding/base32"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"go.yaml.in/yaml/v3"
	"golang.org/x/sys/unix"
)

// NewAccessKey makes a key: an ID that cannot be taken for a cloud's, and a
// secret of 240 random bits.
func NewAccessKey() AccessKey {
	id, secret := make([]byte, 10), make([]byte, 30)
	// Never fails (crypto/rand, since Go 1.24).
	_, _ = rand.Read(id)
	_, _ = rand.Read(secret)
	return AccessKey{ID: "LKIA" + base32.StdEncoding.EncodeToString(id), Secret: base64.StdEncoding.EncodeToString(secret)}
}

// List reads the users of a file; one that is not there has none.
func List(path string) ([]User, error) {
	b, err := current(path)
	if err != nil {
		return nil, err
	}
	return Parse(b)
}

// Add writes a user into the file, which is made (mode 0600) if it is not there.
// Comments in it stay. Errors are ErrUserExists and ErrFile.
func Add(path string, user User) error {
	return edit(path, func(doc *yaml.Node, users *yaml.Node) error {
		if find(users, user.Name) >= 0 {
			return fmt.Errorf("%w: %q", ErrUserExists, user.Name)
		}
		var n yaml.Node
		if err := n.Encode(user); err != nil {
			return fmt.Errorf("encode user: %w", err)
		}
		users.Content = append(users.Content, &n)
		return nil
	})
}

// AddKey gives a user one more key. Errors are ErrNoUser and ErrFile.
func AddKey(path, name string, key AccessKey) error {
	return edit(path, func(doc *yaml.Node, users *yaml.Node) error {
		i := find(users, name)
		if i < 0 {
			return fmt.Errorf("%w: %q", ErrNoUser, name)
		}
		user := users.Content[i]
		keys := child(user, "keys")
		if keys == nil || keys.Kind != yaml.SequenceNode {
			return fmt.Errorf("%w: user %q has no list of keys", ErrFile, name)
		}
		var n yaml.Node
		if err := n.Encode(key); err != nil {
			return fmt.Errorf("encode key: %w", err)
		}
		keys.Style = 0
		keys.Content = append(keys.Content, &n)
		return nil
	})
}

// RemoveKey takes a key away, whoever has it. Errors are ErrNoUser and ErrFile.
func RemoveKey(path, accessKeyID string) error {
	return edit(path, func(doc *yaml.Node, users *yaml.Node) error {
		for _, user := range users.Content {
			keys := child(user, "keys")
			if keys == nil {
				continue
			}
			for i, k := range keys.Content {
				if id := child(k, "accessKeyId"); id != nil && id.Value == accessKeyID {
					keys.Content = append(keys.Content[:i], keys.Content[i+1:]...)
					return nil
				}
			}
		}
		return fmt.Errorf("%w: nobody has access key %s", ErrNoUser, accessKeyID)
	})
}

// Remove takes a user out of the file. Errors are ErrNoUser and ErrFile.
func Remove(path, name string) error {
	return edit(path, func(doc *yaml.Node, users *yaml.Node) error {
		i := find(users, name)
		if i < 0 {
			return fmt.Errorf("%w: %q", ErrNoUser, name)
		}
		users.Content = append(users.Content[:i], users.Content[i+1:]...)
		return nil
	})
}

func find(users *yaml.Node, name string) int {
	for i, u := range users.Content {
		if n := child(u, "name"); n != nil && n.Value == name {
			return i
		}
	}
	return -1
}

// current reads the file, which may not be there.
func current(path string) ([]byte, error) {
	b, _, err := readFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return b, err
}

// edit changes the file as a whole or not at all: two at a time wait for each
// other, and a server that reads at any moment sees the old file or the new one.
func edit(path string, change func(doc, users *yaml.Node) error) error {
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	// A file of its own, for path itself is another one after the rename.
	lock, err := os.OpenFile(path+".lock", os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("lock users file: %w", err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("lock users file: %w", err)
	}
	b, err := current(path)
	if err != nil {
		return err
	}
	// What is not understood is not written back.
	if _, err := Parse(b); err != nil {
		return err
	}
	var doc yaml.Node
	if err := yaml.Unmarshal(b, &doc); err != nil {
		return fmt.Errorf("%w: %w", ErrFile, err)
	}
	if len(doc.Content) == 0 {
		doc = yaml.Node{Kind: yaml.DocumentNode, Content: []*yaml.Node{{Kind: yaml.MappingNode}}}
	}
	top := doc.Content[0]
	if top.Kind != yaml.MappingNode {
		*top = yaml.Node{Kind: yaml.MappingNode}
	}
	users := child(top, "users")
	if users == nil {
		users = &yaml.Node{Kind: yaml.SequenceNode}
		top.Content = append(top.Content, &yaml.Node{Kind: yaml.ScalarNode, Value: "users"}, users)
	} else if users.Kind != yaml.SequenceNode {
		*users = yaml.Node{Kind: yaml.SequenceNode}
	}
	users.Style = 0
	if err := change(&doc, users); err != nil {
		return err
	}
	var out bytes.Buffer
	enc := yaml.NewEncoder(&out)
	enc.SetIndent(2)
	if err := errors.Join(enc.Encode(&doc), enc.Close()); err != nil {
		return fmt.Errorf("encode users file: %w", err)
	}
	if _, err := Parse(out.Bytes()); err != nil {
		return err
	}
	return replace(path, out.Bytes())
}

// replace writes a new file in the old one's place, on disk before it is there.
func replace(path string, b []byte) error {
	mode := fs.FileMode(0o600)
	uid, gid := -1, -1
	if info, err := os.Stat(path); err == nil {
		mode = info.Mode().Perm()
		// A server that runs as somebody else must still be able to read it.
		if st, ok := info.Sys().(*syscall.Stat_t); ok && (int(st.Uid) != os.Geteuid() || int(st.Gid) != os.Getegid()) {
			uid, gid = int(st.Uid), int(st.Gid)
		}
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".users-*")
	if err != nil {
		return fmt.Errorf("write users file: %w", err)
	}
	defer os.Remove(f.Name())
	_, err = f.Write(b)
	if uid >= 0 {
		err = errors.Join(err, f.Chown(uid, gid))
	}
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("write users file: %w", err)
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("write users file: %w", err)
	}
	defer dir.Close()
	if err := dir.Sync(); err != nil {
		return fmt.Errorf("write users file: %w", err)
	}
	return nil
}
