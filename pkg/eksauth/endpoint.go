// SPDX-License-Identifier: Apache-2.0

package eksauth

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
)

// DefaultEndpoint is the service's own URL for a region. EKS Auth is served on
// the dual-stack names only, in every partition.
func DefaultEndpoint(region string, fips bool) string {
	host := "eks-auth"
	if fips {
		host = "eks-auth-fips"
	}
	return "https://" + host + "." + region + "." + dualStackSuffix(region)
}

// dualStackSuffix is the partition's, as in the SDK's list of partitions.
func dualStackSuffix(region string) string {
	for _, p := range []struct{ prefix, suffix string }{
		{"cn-", "api.amazonwebservices.com.cn"},
		{"eusc-", "api.amazonwebservices.eu"},
		{"us-isob-", "api.aws.scloud"},
		{"us-isof-", "api.aws.hci.ic.gov"},
		{"us-iso-", "api.aws.ic.gov"},
		{"eu-isoe-", "api.cloud-aws.adc-e.uk"},
	} {
		if strings.HasPrefix(region, p.prefix) {
			return p.suffix
		}
	}
	return "api.aws"
}

func endpointOf(cfg Config) (*url.URL, error) {
	raw := cfg.Endpoint
	if raw == "" {
		raw = DefaultEndpoint(cfg.Region, cfg.FIPS)
	} else if cfg.FIPS {
		return nil, fmt.Errorf("%w: FIPS and an own endpoint exclude each other", ErrEndpoint)
	}
	u, err := url.Parse(raw)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrEndpoint, hideURL(err))
	}
	if u.Scheme != "https" && u.Scheme != "http" || u.Hostname() == "" {
		return nil, fmt.Errorf("%w %q: need http:// or https:// and a host", ErrEndpoint, u.Redacted())
	}
	if u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return nil, fmt.Errorf("%w %q: user, query and fragment have no meaning here", ErrEndpoint, u.Redacted())
	}
	return u, nil
}

func isLoopback(host string) bool {
	if host == "localhost" {
		return true
	}
	addr, err := netip.ParseAddr(host)
	return err == nil && addr.Unmap().IsLoopback()
}

// NewTransport makes a transport for this service from a base, which is not
// changed; nil means proxies from the environment and the system's CAs.
//
// HTTP/1.1 only: when a connection dies silently, the attempt's timeout closes
// it, while an HTTP/2 connection would stay in use until TCP gives it up.
// Connections are bounded and kept, so that a cold start of a full node does not
// open hundreds.
func NewTransport(base *http.Transport) *http.Transport {
	var t *http.Transport
	if base != nil {
		t = base.Clone()
	} else {
		t = &http.Transport{Proxy: http.ProxyFromEnvironment}
	}
	if t.DialContext == nil {
		t.DialContext = (&net.Dialer{Timeout: 2 * time.Second, KeepAlive: 15 * time.Second}).DialContext
	}
	t.TLSHandshakeTimeout = 2 * time.Second
	t.MaxConnsPerHost = 32
	t.MaxIdleConns = 32
	t.MaxIdleConnsPerHost = 16
	t.IdleConnTimeout = 50 * time.Second
	t.MaxResponseHeaderBytes = 32 << 10
	t.DisableCompression = true
	t.ForceAttemptHTTP2 = false
	t.Protocols = new(http.Protocols)
	t.Protocols.SetHTTP1(true)
	// A base that could do HTTP/2 has it among the protocols that its handshake
	// offers. A server that chose it would not be understood.
	t.TLSNextProto = nil
	if t.TLSClientConfig != nil {
		t.TLSClientConfig.NextProtos = []string{"http/1.1"} // the clone's own
	}
	return t
}

// ConfigFrom takes over what an AWS configuration says: region, the node's
// credentials, AWS_ENDPOINT_URL and AWS_ENDPOINT_URL_EKS_AUTH or their like in
// a profile, the FIPS setting, and of its HTTP client the transport (which has
// AWS_CA_BUNDLE and proxies). ClusterName is the caller's to set.
func ConfigFrom(ctx context.Context, a aws.Config) (Config, error) {
	cfg := Config{Region: a.Region, Credentials: a.Credentials}
	for _, source := range a.ConfigSources {
		if p, ok := source.(interface {
			GetUseFIPSEndpoint(context.Context) (aws.FIPSEndpointState, bool, error)
		}); ok {
			state, found, err := p.GetUseFIPSEndpoint(ctx)
			if err != nil {
				return Config{}, fmt.Errorf("%w: FIPS setting: %w", ErrConfig, err)
			}
			if found {
				cfg.FIPS = state == aws.FIPSEndpointStateEnabled
				break
			}
		}
	}
	endpoint, err := configuredEndpoint(ctx, a)
	if err != nil {
		return Config{}, err
	}
	cfg.Endpoint = endpoint
	var base *http.Transport
	switch client := a.HTTPClient.(type) {
	case interface{ GetTransport() *http.Transport }: // the SDK's BuildableClient
		base = client.GetTransport()
	case *http.Client:
		switch t := client.Transport.(type) {
		case *http.Transport:
			base = t
		case nil:
		default:
			cfg.Transport = t
			return cfg, nil
		}
	}
	cfg.Transport = NewTransport(base)
	return cfg, nil
}

// configuredEndpoint follows the SDK: the service's own setting before the
// global one, but the environment's global one before a file's; and none of
// them if the user said to ignore them.
func configuredEndpoint(ctx context.Context, a aws.Config) (string, error) {
	for _, source := range a.ConfigSources {
		if p, ok := source.(interface {
			GetIgnoreConfiguredEndpoints(context.Context) (bool, bool, error)
		}); ok {
			ignore, found, err := p.GetIgnoreConfiguredEndpoints(ctx)
			if err != nil {
				return "", fmt.Errorf("%w: endpoint setting: %w", ErrConfig, err)
			}
			if found && ignore {
				return "", nil
			}
			if found {
				break
			}
		}
	}
	global := ""
	if a.BaseEndpoint != nil {
		global = *a.BaseEndpoint
	}
	_, hasGlobal := os.LookupEnv("AWS_ENDPOINT_URL")
	_, hasOwn := os.LookupEnv("AWS_ENDPOINT_URL_EKS_AUTH")
	if hasGlobal && !hasOwn {
		return global, nil
	}
	for _, source := range a.ConfigSources {
		if p, ok := source.(interface {
			GetServiceBaseEndpoint(context.Context, string) (string, bool, error)
		}); ok {
			endpoint, found, err := p.GetServiceBaseEndpoint(ctx, "EKS Auth")
			if err != nil {
				return "", fmt.Errorf("%w: endpoint setting: %w", ErrConfig, err)
			}
			if found {
				return endpoint, nil
			}
		}
	}
	return global, nil
}
