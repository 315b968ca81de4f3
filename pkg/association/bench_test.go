// SPDX-License-Identifier: Apache-2.0

package association

import (
	"context"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/pkg/etcd"
)

// What the design asks for is at 100 clusters of 5,000 associations.
const (
	benchClusters = 100
	benchEach     = DefaultLimit
)

func heap() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// BenchmarkLookup also tells how much heap an association takes in the index.
func BenchmarkLookup(b *testing.B) {
	before := heap()
	x := seeded(b, benchClusters, benchEach)
	bytes := float64(heap()-before) / (benchClusters * benchEach)
	names := make([]CreateInput, 4096)
	for i := range names {
		names[i] = seedInput(fmt.Sprintf("cluster-%03d", i*7%benchClusters), i*131%benchEach)
	}
	b.ReportAllocs()
	b.ResetTimer()
	var next atomic.Int64
	b.RunParallel(func(p *testing.PB) {
		i := int(next.Add(1)) * 1000
		for p.Next() {
			i++
			n := &names[i%len(names)]
			if _, ok := x.Lookup(n.Cluster, n.Namespace, n.ServiceAccount); !ok {
				b.Error("not found")
				return
			}
		}
	})
	b.ReportMetric(bytes, "heap-B/association")
}

// BenchmarkCreate: 64 writers, into one cluster or into many; the etcd calls
// fsync for what it acknowledges.
func BenchmarkCreate(b *testing.B) {
	for _, clusters := range []int{1, 64} {
		for _, tokens := range []bool{false, true} {
			b.Run(fmt.Sprintf("clusters=%d/tokens=%v", clusters, tokens), func(b *testing.B) {
				s := newTestStore(b, func(c *Config) { c.Limit = MaxLimit })
				for i := range clusters {
					if _, err := s.PutCluster(b.Context(), testCluster(fmt.Sprint("c-", i))); err != nil {
						b.Fatal(err)
					}
				}
				b.ResetTimer()
				var next atomic.Int64
				var wg sync.WaitGroup
				for range 64 {
					wg.Go(func() {
						for {
							i := int(next.Add(1))
							if i > b.N {
								return
							}
							in := seedInput(fmt.Sprint("c-", i%clusters), i)
							if tokens {
								in.ClientToken = fmt.Sprint("token-", i)
							}
							if _, err := s.Create(b.Context(), in); err != nil {
								b.Error(err)
								return
							}
						}
					})
				}
				wg.Wait()
				b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "creates/s")
			})
		}
	}
}

// seedStore makes what BenchmarkStart starts with, and leaves nothing of it in
// memory.
func seedStore(b *testing.B, dir string) {
	srv, err := etcd.Start(b.Context(), etcd.Config{Dir: dir})
	if err != nil {
		b.Fatal(err)
	}
	s := NewStore(Config{Client: srv.Client(), MaxTxnOps: etcd.MaxTxnOps, Timeout: time.Minute})
	began := time.Now()
	for c := range benchClusters {
		cl := testCluster(fmt.Sprintf("cluster-%03d", c))
		if _, err := s.PutCluster(b.Context(), cl); err != nil {
			b.Fatal(err)
		}
		in := make([]CreateInput, benchEach)
		for i := range in {
			in[i] = seedInput(cl.Name, i)
		}
		if _, err := s.CreateMany(b.Context(), cl.Name, in); err != nil {
			b.Fatal(err)
		}
	}
	b.Logf("seeded %d associations in %v", benchClusters*benchEach, time.Since(began).Round(time.Millisecond))
	if err := srv.Close(); err != nil {
		b.Fatal(err)
	}
}

// cpu is what the process has used, which a busy machine does not change.
func cpu(b *testing.B) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkStart: a server with 500,000 associations, from nothing to an index
// that answers, and the whole process's heap then.
func BenchmarkStart(b *testing.B) {
	dir := b.TempDir()
	seedStore(b, dir)
	var opened, used time.Duration
	b.ResetTimer()
	for range b.N {
		began, cpuBegan := time.Now(), cpu(b)
		srv, err := etcd.Start(b.Context(), etcd.Config{Dir: dir})
		if err != nil {
			b.Fatal(err)
		}
		opened += time.Since(began)
		x := NewIndex(IndexConfig{Client: srv.Client()})
		ctx, cancel := context.WithCancel(b.Context())
		done := make(chan error, 1)
		go func() { done <- x.Run(ctx) }()
		if err := x.Wait(b.Context(), 1); err != nil {
			b.Fatal(err)
		}
		used += cpu(b) - cpuBegan
		b.StopTimer()
		if n, _ := x.Len(); n != benchClusters*benchEach {
			b.Fatalf("%d associations", n)
		}
		st, err := srv.Status(b.Context())
		if err != nil {
			b.Fatal(err)
		}
		// All of the process's, etcd's own index of keys included.
		b.ReportMetric(float64(heap())/(benchClusters*benchEach), "process-heap-B/association")
		b.ReportMetric(float64(st.SizeBytes)/(benchClusters*benchEach), "disk-B/association")
		runtime.KeepAlive(x)
		cancel()
		<-done
		if err := srv.Close(); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
	b.ReportMetric(opened.Seconds()/float64(b.N), "etcd-s/op")
	b.ReportMetric(used.Seconds()/float64(b.N), "cpu-s/op")
}
