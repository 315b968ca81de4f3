// SPDX-License-Identifier: Apache-2.0

package server

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/eks"
)

// The process is killed under writes. Whatever was acknowledged is there
// afterwards, as it was acknowledged, and nothing is there twice.
func TestKill(t *testing.T) {
	t.Parallel()
	kills := 4
	if v := os.Getenv("LATCHKEY_KILLS"); v != "" {
		n, err := strconv.Atoi(v)
		if err != nil {
			t.Fatal(err)
		}
		kills = n
	}
	s := start(t)
	s.addCluster(cluster, newSigner(t))
	// Several, for each has a rate of its own.
	var writers []aws.Credentials
	for i := range 4 {
		writers = append(writers, s.user(fmt.Sprint("writer-", i)))
	}
	var mu sync.Mutex
	acknowledged := map[string]string{} // ID → service account
	deleted := map[string]bool{}        // acknowledged, or nobody knows
	for round := range kills {
		end := make(chan struct{})
		var wg sync.WaitGroup
		for w, c := range writers {
			client := s.eks(c)
			wg.Go(func() {
				for i := 0; ; i++ {
					select {
					case <-end:
						return
					default:
					}
					name := fmt.Sprintf("s-%d-%d-%d", round, w, i)
					out, err := client.CreatePodIdentityAssociation(s.ctx, &eks.CreatePodIdentityAssociationInput{
						ClusterName: aws.String(cluster), Namespace: aws.String("n"), ServiceAccount: aws.String(name), RoleArn: aws.String(roleARN("r")),
					})
					if err != nil {
						if code, _ := outcome(err); code == "ThrottlingException" {
							time.Sleep(5 * time.Millisecond)
							continue
						}
						return // killed
					}
					id := aws.ToString(out.Association.AssociationId)
					mu.Lock()
					acknowledged[id] = name
					mu.Unlock()
					// Old ones go, so that the cluster's limit is not what ends it.
					if i%2 == 1 {
						mu.Lock()
						deleted[id] = true
						mu.Unlock()
						if _, err := client.DeletePodIdentityAssociation(s.ctx, &eks.DeletePodIdentityAssociationInput{ClusterName: aws.String(cluster), AssociationId: aws.String(id)}); err != nil {
							if code, _ := outcome(err); code == "ThrottlingException" {
								continue
							}
							return
						}
					}
				}
			})
		}
		// Anywhere in the work, and now and then before any of it.
		time.Sleep(time.Duration(rand.IntN(150)) * time.Millisecond)
		s.kill()
		close(end)
		wg.Wait()
		s.serve()

		there := map[string]string{}
		for line := range strings.Lines(s.cli("association", "list", "-c", cluster)) {
			f := strings.Fields(line)
			if len(f) < 5 || f[0] != "n" {
				continue
			}
			for id, name := range there {
				if name == f[1] {
					t.Errorf("%s is there twice: %s and %s", name, id, f[4])
				}
			}
			there[f[4]] = f[1]
		}
		for id, name := range acknowledged {
			if there[id] != name && !deleted[id] {
				t.Fatalf("kill %d: %s of %s was acknowledged and is %q", round, id, name, there[id])
			}
		}
		if t.Failed() {
			t.FailNow()
		}
		if len(there) > 4000 {
			s.cli("cluster", "remove", cluster, "--force")
			s.addCluster(cluster, newSigner(t))
			clear(acknowledged)
			clear(deleted)
		}
	}
	if len(acknowledged) == 0 {
		t.Errorf("nothing was acknowledged in %d rounds", kills)
	}
	t.Logf("%d kills, %d acknowledged writes, e.g. %v", kills, len(acknowledged), slices.Sorted(maps.Values(acknowledged))[:min(3, len(acknowledged))])
}
