// SPDX-License-Identifier: Apache-2.0

package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/sts"
	authv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes"

	"github.com/latchkey-dev/latchkey/pkg/association"
	"github.com/latchkey-dev/latchkey/pkg/issuer"
	"github.com/latchkey-dev/latchkey/pkg/satoken"
	"github.com/latchkey-dev/latchkey/pkg/tokencheck"
)

// doctorTimeout bounds one question to something elsewhere.
const doctorTimeout = 10 * time.Second

// examine looks at the server and what it depends on. What is elsewhere is asked
// at the same time.
func (s *server) examine(ctx context.Context) []Finding {
	var out []Finding
	out = append(out, s.examineDirectory(), s.examineReadiness())
	out = append(out, s.examineStore(ctx)...)
	out = append(out, s.examineTLS()...)
	out = append(out, s.examineUsers(), s.examineAudit())

	clusters, err := s.store.Clusters(ctx)
	if err != nil {
		out = append(out, fail("clusters", "look at the lines about the store", "cannot be listed: %v", err))
	}
	if err == nil && len(clusters) == 0 {
		out = append(out, warn("clusters", "latchkey-server cluster add", "there are none, so nobody gets credentials"))
	}
	elsewhere := make([][]Finding, len(clusters)+1)
	var wg sync.WaitGroup
	wg.Go(func() {
		if s.sts == nil {
			elsewhere[0] = []Finding{warn("STS", "leave out --stand-in-sts", "a stand-in: the credentials issued open nothing")}
			return
		}
		elsewhere[0] = []Finding{s.sts(ctx)}
	})
	for i, c := range clusters {
		wg.Go(func() { elsewhere[i+1] = s.examineCluster(ctx, c) })
	}
	wg.Wait()
	for _, f := range elsewhere {
		out = append(out, f...)
	}
	return out
}

func (s *server) examineDirectory() Finding {
	fi, err := os.Stat(s.cfg.StateDir)
	switch {
	case err != nil:
		return fail("state directory", "put it back, or restore a snapshot", "%v", err)
	case fi.Mode().Perm()&0o077 != 0:
		return fail("state directory", "chmod 0700 "+s.cfg.StateDir, "%s has mode %04o: others can reach secrets in it", s.cfg.StateDir, fi.Mode().Perm())
	}
	return ok("state directory", "%s, its owner's alone", s.cfg.StateDir)
}

func (s *server) examineReadiness() Finding {
	if err := s.ready(); err != nil {
		return fail("readiness", "see the log, and the lines below", "%v", err)
	}
	associations, clusters := s.index.Len()
	return ok("readiness", "serving on %s: %d clusters, %d associations, index %s old", s.address, clusters, associations, s.index.Behind().Round(time.Millisecond))
}

func (s *server) examineStore(ctx context.Context) []Finding {
	ctx, cancel := context.WithTimeout(ctx, doctorTimeout)
	defer cancel()
	st, err := s.etcd.Status(ctx)
	if err != nil {
		return []Finding{fail("store", "restart the server; if that does not help, restore a snapshot", "%v", err)}
	}
	mb := func(n int64) int64 { return n >> 20 }
	switch {
	case st.Corrupt:
		return []Finding{fail("store", "stop the server and restore a snapshot (latchkey-server snapshot restore)", "etcd found its data damaged and refuses everything")}
	case st.NoSpace:
		return []Finding{fail("store", "restart with a larger --store-quota", "the quota of %d MiB is used up: changes are refused, credentials are still issued", mb(st.QuotaBytes))}
	case st.SizeBytes > st.QuotaBytes/5*4:
		return []Finding{warn("store", "raise --store-quota before changes are refused", "%d of %d MiB used", mb(st.SizeBytes), mb(st.QuotaBytes))}
	}
	return []Finding{ok("store", "%d of %d MiB, revision %d, no alarm", mb(st.SizeBytes), mb(st.QuotaBytes), st.Revision)}
}

func (s *server) examineTLS() []Finding {
	if s.cert == nil {
		if loopback(s.cfg.Listen) {
			return []Finding{ok("TLS", "none, and none needed: %s is reached from this machine only", s.cfg.Listen)}
		}
		return []Finding{fail("TLS", "give --tls-cert and --tls-key", "none on %s: tokens and credentials can be read on the way", s.cfg.Listen)}
	}
	leaf, _, _, err := s.cert.state()
	if err != nil {
		return []Finding{fail("TLS", "put a certificate and its key in place; the last good one is served meanwhile", "%v", err)}
	}
	left := leaf.NotAfter.Sub(s.cfg.Now())
	names := strings.Join(append(slices.Clone(leaf.DNSNames), addresses(leaf.IPAddresses)...), ", ")
	switch {
	case left <= 0:
		return []Finding{fail("TLS", "renew "+s.cfg.TLSCert+"; it is read again without a restart", "the certificate for %s ended %s", names, leaf.NotAfter.Format(time.RFC3339))}
	case left < 14*24*time.Hour && left < leaf.NotAfter.Sub(leaf.NotBefore)/3:
		return []Finding{warn("TLS", "renew "+s.cfg.TLSCert+"; it is read again without a restart", "the certificate for %s ends in %s", names, left.Round(time.Hour))}
	case names == "":
		return []Finding{warn("TLS", "issue one with subject alternative names", "the certificate names no host, so no client accepts it")}
	}
	return []Finding{ok("TLS", "certificate for %s until %s", names, leaf.NotAfter.Format(time.RFC3339))}
}

func addresses(ips []net.IP) []string {
	out := make([]string, 0, len(ips))
	for _, ip := range ips {
		out = append(out, ip.String())
	}
	return out
}

func (s *server) examineUsers() Finding {
	st := s.users.Status()
	fi, err := os.Stat(s.cfg.Users)
	switch {
	case st.Err != nil:
		return fail("users", "correct "+s.cfg.Users+"; the last good one is in force meanwhile", "%v", st.Err)
	case err != nil:
		return fail("users", "put it back", "%v", err)
	case fi.Mode().Perm()&0o077 != 0:
		return warn("users", "chmod 0600 "+s.cfg.Users, "%s has mode %04o and holds secret keys", s.cfg.Users, fi.Mode().Perm())
	case st.Users == 0:
		return warn("users", "latchkey-server user add", "there are none: associations can be changed by this CLI only")
	}
	return ok("users", "%d users, %d keys", st.Users, st.Keys)
}

func (s *server) examineAudit() Finding {
	switch {
	case s.cfg.AuditLog == "":
		return warn("audit", "give --audit-log", "records are thrown away")
	case s.audit.complained.Load():
		return fail("audit", "make room for, or access to, "+s.cfg.AuditLog, "the last record could not be written; %d are missing", s.audit.failed.Load())
	case s.cfg.AuditLog == auditStdout:
		return ok("audit", "on standard output")
	}
	return ok("audit", "in %s", s.cfg.AuditLog)
}

// askSTS asks STS who the server is: that shows credentials, the way there, and,
// by its Date, the clock.
func (s *server) askSTS(ctx context.Context) Finding {
	const what = "STS"
	ctx, cancel := context.WithTimeout(ctx, doctorTimeout)
	defer cancel()
	region := "us-east-1"
	if all, err := s.store.Clusters(ctx); err == nil && len(all) > 0 {
		region = all[0].Region
	}
	var date time.Time
	cfg, err := config.LoadDefaultConfig(ctx, config.WithRegion(region))
	if err != nil {
		return fail(what, "correct the AWS configuration (AWS_PROFILE, ~/.aws and so on)", "%s", oneLine(err.Error()))
	}
	// The endpoint that the exchanges call, and not one that the environment names.
	options := sts.Options{
		Region: region, Credentials: cfg.Credentials, RetryMaxAttempts: 2,
		HTTPClient: &http.Client{Transport: dateTransport{issuer.NewTransport(cfg), &date}},
	}
	if s.cfg.STSEndpoint != "" {
		options.BaseEndpoint = aws.String(s.cfg.STSEndpoint)
	}
	client := sts.New(options)
	id, err := client.GetCallerIdentity(ctx, &sts.GetCallerIdentityInput{})
	if err != nil {
		return fail(what, "give the server AWS credentials that may call sts:AssumeRole, and a way to STS", "GetCallerIdentity in %s: %s", region, oneLine(err.Error()))
	}
	if !date.IsZero() {
		if off := s.cfg.Now().Sub(date).Abs(); off > time.Minute {
			return warn("clock", "set the clock (NTP)", "%s away from STS's: beyond 5 minutes no signature is valid", off.Round(time.Second))
		}
	}
	return ok(what, "%s in %s; the trust policies of the pods' roles must name it. The clock agrees", aws.ToString(id.Arn), region)
}

// dateTransport notes the Date of the last answer.
type dateTransport struct {
	next http.RoundTripper
	date *time.Time
}

// RoundTrip implements http.RoundTripper.
func (t dateTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := t.next.RoundTrip(r)
	if err == nil {
		if d, err := http.ParseTime(resp.Header.Get("Date")); err == nil {
			*t.date = d
		}
	}
	return resp, err
}

// examineCluster looks at a cluster's settings and records, and asks its API
// server to judge a token that is none: whether we may ask, and whether it
// compares audiences.
func (s *server) examineCluster(ctx context.Context, c association.Cluster) []Finding {
	what := "cluster " + c.Name
	var out []Finding
	if !s.index.Whole(c.Name) {
		out = append(out, fail(what, "find the record in the log; restore a snapshot, or take the record out with etcd's tools", "a record of it in the store is damaged: service accounts that seem to have no association are answered 503"))
	}
	if _, _, err := PinKeys(c.Keys); err != nil {
		return append(out, fail(what, "latchkey-server cluster add "+c.Name+" --replace --keys FILE", "%v", err))
	}
	if c.TokenReview == nil {
		return append(out, warn(what, "latchkey-server cluster add "+c.Name+" --replace --token-review KUBECONFIG", "no TokenReview: a stolen token is good until it expires, though its pod be gone"))
	}
	if err := reviewNothing(ctx, c.TokenReview); err != nil {
		outage := "exchanges answer 503"
		if c.TokenReview.OnOutage == association.OnOutageKeys {
			outage = "tokens are accepted by their signature alone"
		}
		return append(out, fail(what, "look at the kubeconfig "+c.TokenReview.Kubeconfig+"; its user needs the ClusterRole system:auth-delegator", "TokenReview: %s; meanwhile %s", oneLine(err.Error()), outage))
	}
	out = append(out, ok(what, "%d keys, TokenReview answers", len(specOf(c).PinnedKeys)))
	return append(out, examineKeys(ctx, c))
}

// examineKeys compares what is pinned with what the API server that reviews the
// cluster's tokens publishes: a kubeconfig can be another cluster's.
func examineKeys(ctx context.Context, c association.Cluster) Finding {
	what := "keys of " + c.Name
	ctx, cancel := context.WithTimeout(ctx, doctorTimeout)
	defer cancel()
	published, err := FetchKeys(ctx, c.TokenReview.Kubeconfig, c.TokenReview.Context)
	if err != nil {
		return warn(what, "give the user of "+c.TokenReview.Kubeconfig+" the ClusterRole system:service-account-issuer-discovery", "cannot be compared with the API server's: %s", oneLine(err.Error()))
	}
	return compareKeys(c, published)
}

func compareKeys(c association.Cluster, published FetchedKeys) Finding {
	what := "keys of " + c.Name
	_, theirs, err := PinKeys(published.Document)
	if err != nil {
		return warn(what, "look at what kubectl get --raw /openid/v1/jwks prints", "cannot be compared with those of %s: %s", published.Server, oneLine(err.Error()))
	}
	ours := specOf(c).PinnedKeys
	in := func(keys []PinnedKey) func(PinnedKey) bool {
		return func(k PinnedKey) bool {
			return slices.ContainsFunc(keys, func(o PinnedKey) bool { return o.ID == k.ID && o.Fingerprint == k.Fingerprint })
		}
	}
	kids := func(keys []PinnedKey, known func(PinnedKey) bool) (out []string) {
		for _, k := range keys {
			if !known(k) {
				out = append(out, k.ID)
			}
		}
		return out
	}
	unpinned, unpublished := kids(theirs, in(ours)), kids(ours, in(theirs))
	pin := "compare the fingerprints, then latchkey-server cluster add " + c.Name + " --replace --keys FILE with those keys"
	switch {
	case len(unpinned) == len(theirs):
		return fail(what, "correct tokenReview if its kubeconfig is another cluster's; else "+pin,
			"%s signs tokens with none of them: it is another cluster's API server, or has new keys", published.Server)
	case !slices.Contains(c.Issuers, published.Issuer):
		return fail(what, "latchkey-server cluster add "+c.Name+" --replace, with --issuer "+published.Issuer+" beside those that still count",
			"%s makes tokens of issuer %s, which are refused: accepted is %s", published.Server, published.Issuer, strings.Join(c.Issuers, ", "))
	case len(unpinned) > 0:
		return warn(what, pin, "%s has keys that are not pinned, and tokens signed with those are refused: %s", published.Server, strings.Join(unpinned, ", "))
	case len(unpublished) > 0:
		return warn(what, "once no token is signed with it any more, latchkey-server cluster add "+c.Name+" --replace --keys FILE without it",
			"pinned, and not published by %s: %s", published.Server, strings.Join(unpublished, ", "))
	}
	return ok(what, "those that %s publishes, and its issuer", published.Server)
}

// errReview: the API server's answer is not one.
var errReview = errors.New("the API server accepted a token that is none")

func reviewNothing(ctx context.Context, t *association.TokenReview) error {
	ctx, cancel := context.WithTimeout(ctx, doctorTimeout)
	defer cancel()
	cfg, err := tokencheck.RESTConfig(t.Kubeconfig, t.Context)
	if err != nil {
		return err
	}
	// As the exchanges ask, so that the answer is about them.
	cfg.ContentType = runtime.ContentTypeJSON
	client, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return err
	}
	r, err := client.AuthenticationV1().TokenReviews().Create(ctx, &authv1.TokenReview{
		Spec: authv1.TokenReviewSpec{Token: "latchkey-doctor", Audiences: []string{satoken.DefaultAudience}},
	}, metav1.CreateOptions{})
	if err != nil {
		return err
	}
	if r.Status.Authenticated {
		return fmt.Errorf("%w, for %s", errReview, r.Status.User.Username)
	}
	return nil
}
