// SPDX-License-Identifier: Apache-2.0

package satoken

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// cacheVersion is the format of the cache file. Others are not read.
const cacheVersion = 1

// cacheContent is the cache file. Its keys are as good as the cluster's own, so
// only we may have written it.
type cacheContent struct {
	Version int    `json:"version"`
	Source  string `json:"source"`
	Issuer  string `json:"issuer,omitempty"`
	Keys    []byte `json:"keys"`
}

// loadCache takes the last keys from the cache file, if they are this source's.
func (k *Keys) loadCache() {
	document, identity, err := k.readCache()
	if err == nil && document == nil {
		return
	}
	var set *KeySet
	if err == nil {
		set, err = ParseKeySet(document.Issuer, document.Keys)
	}
	if err == nil && k.NamesIssuer() && !set.NamesIssuer() {
		err = errors.New("no issuer is named")
	}
	if err != nil {
		k.cacheErrors.Add(1)
		k.log.Warn("the cache of token keys is not used", "file", k.cfg.CacheFile, "error", err)
		return
	}
	k.set.Store(&publishedSet{KeySet: set, document: *document, cachedAs: identity})
}

// cacheIdentity is the source's identity, empty if nothing is to be cached.
func (k *Keys) cacheIdentity() (string, error) {
	if k.cfg.CacheFile == "" {
		return "", nil
	}
	identity, err := k.cfg.Source.Identity()
	if err != nil {
		return "", fmt.Errorf("identifying the source: %w", err)
	}
	return identity, nil
}

// readCache returns nil without an error if there is nothing for this source.
func (k *Keys) readCache() (_ *Document, identity string, err error) {
	identity, err = k.cacheIdentity()
	if err != nil || identity == "" {
		return nil, "", err
	}
	if err := checkPrivateDirectory(filepath.Dir(k.cfg.CacheFile)); errors.Is(err, fs.ErrNotExist) {
		return nil, "", nil
	} else if err != nil {
		return nil, "", err
	}
	data, err := readFile(k.cfg.CacheFile, syscall.O_NOFOLLOW, checkOwn)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, "", nil
	}
	if err != nil {
		return nil, "", err
	}
	var content cacheContent
	if err := json.Unmarshal(data, &content); err != nil {
		return nil, "", fmt.Errorf("reading the cache: %w", err)
	}
	if content.Version != cacheVersion || content.Source != identity {
		k.log.Info("the cache of token keys is of another source or version", "cached_source", content.Source)
		return nil, "", nil
	}
	return &Document{Issuer: content.Issuer, Keys: content.Keys}, identity, nil
}

// saveCache writes the cache file unless it has this already, and returns the
// identity it was written under; empty if it was not. The file is replaced by
// rename, so that a crash leaves the old keys or the new ones.
func (k *Keys) saveCache(set *publishedSet) string {
	identity, err := k.cacheIdentity()
	if err == nil && identity != set.cachedAs {
		err = k.writeCache(identity, set.document)
	}
	if err != nil {
		k.cacheErrors.Add(1)
		k.log.Warn("token keys could not be cached", "file", k.cfg.CacheFile, "error", err)
		return ""
	}
	return identity
}

func (k *Keys) writeCache(identity string, document Document) (err error) {
	data, err := json.Marshal(cacheContent{
		Version: cacheVersion, Source: identity, Issuer: document.Issuer, Keys: document.Keys,
	})
	if err != nil {
		return fmt.Errorf("encoding the cache: %w", err)
	}
	directory := filepath.Dir(k.cfg.CacheFile)
	if err := os.MkdirAll(directory, 0o700); err != nil {
		return fmt.Errorf("making the cache directory: %w", err)
	}
	if err := checkPrivateDirectory(directory); err != nil {
		return err
	}
	file, err := os.CreateTemp(directory, filepath.Base(k.cfg.CacheFile)+".*.tmp") // mode 0600
	if err != nil {
		return fmt.Errorf("making the cache file: %w", err)
	}
	defer func() {
		if err != nil {
			_ = os.Remove(file.Name())
		}
	}()
	_, err = file.Write(data)
	if err == nil {
		err = file.Sync() // else the name may reach the disk before the content
	}
	if closeErr := file.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = os.Rename(file.Name(), k.cfg.CacheFile)
	}
	if err != nil {
		return fmt.Errorf("writing the cache: %w", err)
	}
	return nil
}

// checkPrivateDirectory refuses a directory in which somebody else could put a
// file in our name. It follows no symbolic link at the end.
func checkPrivateDirectory(path string) error {
	info, err := os.Lstat(path)
	if err != nil {
		return fmt.Errorf("checking the cache directory: %w", err)
	}
	if !info.IsDir() {
		return fmt.Errorf("%s is not a directory", path)
	}
	return checkOwn(path, info)
}

// checkOwn refuses what is not ours, or what others may write.
func checkOwn(path string, info fs.FileInfo) error {
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return fmt.Errorf("the owner of %s is not known", path)
	}
	if int(stat.Uid) != os.Geteuid() {
		return fmt.Errorf("%s belongs to user %d, not to us", path, stat.Uid)
	}
	if info.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("%s may be written by others (mode %04o)", path, info.Mode().Perm())
	}
	return nil
}

// readFile reads a regular file of bounded size after check has approved of it.
// What is checked is what is read: both use one descriptor. A FIFO does not
// block it.
func readFile(path string, flags int, check func(path string, info fs.FileInfo) error) (_ []byte, err error) {
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_CLOEXEC|flags, 0)
	if err != nil {
		return nil, fmt.Errorf("opening: %w", err)
	}
	defer func() { _ = file.Close() }()
	info, err := file.Stat()
	if err != nil {
		return nil, fmt.Errorf("looking at %s: %w", path, err)
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", path)
	}
	if err := check(path, info); err != nil {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(file, maxFileSize+1))
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", path, err)
	}
	if len(data) > maxFileSize {
		return nil, fmt.Errorf("%s is larger than %d bytes", path, maxFileSize)
	}
	return data, nil
}

// maxFileSize has room for a cached document of maxKeySetSize in base64.
const maxFileSize = 2 * maxKeySetSize
