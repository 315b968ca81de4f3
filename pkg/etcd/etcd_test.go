// SPDX-License-Identifier: Apache-2.0

package etcd

import (
	"testing"
	"time"
)

func TestPutGet(t *testing.T) {
	t0 := time.Now()
	s, err := Start(t.Context(), Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Log("start", time.Since(t0))
	if _, err := s.Client().Put(t.Context(), "a", "b"); err != nil {
		t.Fatal(err)
	}
	t.Log("put", time.Since(t0))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	t.Log("close", time.Since(t0))
}
