// SPDX-License-Identifier: Apache-2.0

package server

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"

	"github.com/latchkey-dev/latchkey/pkg/adminsocket"
)

// Errors of Client, for exit codes.
var (
	// ErrNoServer: nobody listens on the socket.
	ErrNoServer = errors.New("no server answers")
	// ErrNotPermitted: the socket is somebody else's.
	ErrNotPermitted = errors.New("not permitted")
	// ErrNotFound: there is no such cluster or association.
	ErrNotFound = errors.New("not found")
	// ErrConflict: something is in the way.
	ErrConflict = errors.New("conflict")
	// ErrRefused: the server cannot accept what it was given.
	ErrRefused = errors.New("refused")
	// ErrUnavailable: to be tried again.
	ErrUnavailable = errors.New("unavailable")
)

// Client speaks to a running server over its admin socket.
type Client struct {
	http   *http.Client
	socket string
}

// NewClient makes a client for a socket; nothing is opened until it is asked.
func NewClient(socket string) *Client {
	return &Client{socket: socket, http: &http.Client{Transport: adminsocket.Transport(socket)}}
}

// Status asks for the server itself.
func (c *Client) Status(ctx context.Context) (Status, error) {
	return call[Status](ctx, c, http.MethodGet, pathStatus, nil, nil)
}

// Doctor asks the server to examine itself and what it depends on.
func (c *Client) Doctor(ctx context.Context) ([]Finding, error) {
	return call[[]Finding](ctx, c, http.MethodGet, pathDoctor, nil, nil)
}

// Clusters lists the clusters.
func (c *Client) Clusters(ctx context.Context) ([]ClusterSpec, error) {
	l, err := call[clusterList](ctx, c, http.MethodGet, pathClusters, nil, nil)
	return l.Clusters, err
}

// Cluster gives one.
func (c *Client) Cluster(ctx context.Context, name string) (ClusterSpec, error) {
	return call[ClusterSpec](ctx, c, http.MethodGet, pathClusters+"/"+url.PathEscape(name), nil, nil)
}

// PutCluster adds a cluster, or with replace changes one.
func (c *Client) PutCluster(ctx context.Context, s ClusterSpec, replace bool) (ClusterSpec, error) {
	return call[ClusterSpec](ctx, c, http.MethodPut, pathClusters, nil, putClusterRequest{s, replace})
}

// DeleteCluster removes a cluster; force removes its associations with it.
func (c *Client) DeleteCluster(ctx context.Context, name string, force bool) error {
	_, err := call[struct{}](ctx, c, http.MethodDelete, pathClusters+"/"+url.PathEscape(name), url.Values{"force": {strconv.FormatBool(force)}}, nil)
	return err
}

// Associations lists a cluster's associations; empty filters mean any.
func (c *Client) Associations(ctx context.Context, cluster, namespace, serviceAccount string) ([]AssociationSpec, error) {
	l, err := call[associationList](ctx, c, http.MethodGet, pathAssociations,
		url.Values{"clusterName": {cluster}, "namespace": {namespace}, "serviceAccount": {serviceAccount}}, nil)
	return l.Associations, err
}

// CreateAssociation makes one.
func (c *Client) CreateAssociation(ctx context.Context, s AssociationSpec) (AssociationSpec, error) {
	return call[AssociationSpec](ctx, c, http.MethodPost, pathAssociations, nil, s)
}

// ReloadUsers has the server read its users file now; it does so by itself
// within seconds.
func (c *Client) ReloadUsers(ctx context.Context) error {
	_, err := call[struct{}](ctx, c, http.MethodPost, pathReloadUsers, nil, struct{}{})
	return err
}

// NodeKeys lists the keys that seal nodes' credentials.
func (c *Client) NodeKeys(ctx context.Context) (NodeKeys, error) {
	return call[NodeKeys](ctx, c, http.MethodGet, pathNodeKeys, nil, nil)
}

// RotateNodeKeys has a new key seal from now on. With revoke, credentials that
// nodes have got so far end at once.
func (c *Client) RotateNodeKeys(ctx context.Context, revoke bool) (NodeKeys, error) {
	return call[NodeKeys](ctx, c, http.MethodPost, pathNodeKeys+"/rotate", nil, rotateRequest{revoke})
}

// Selector names an association: by ID, or by namespace and service account.
type Selector struct{ Cluster, Namespace, ServiceAccount, ID string }

func (s Selector) wire() selector { return selector(s) }

// Association gives one.
func (c *Client) Association(ctx context.Context, s Selector) (AssociationSpec, error) {
	return call[AssociationSpec](ctx, c, http.MethodPost, pathAssociations+"/describe", nil, s.wire())
}

// UpdateAssociation changes one.
func (c *Client) UpdateAssociation(ctx context.Context, s Selector, u Update) (AssociationSpec, error) {
	return call[AssociationSpec](ctx, c, http.MethodPost, pathAssociations+"/update", nil, updateRequest{s.wire(), u})
}

// DeleteAssociation deletes one and returns what it was.
func (c *Client) DeleteAssociation(ctx context.Context, s Selector) (AssociationSpec, error) {
	return call[AssociationSpec](ctx, c, http.MethodPost, pathAssociations+"/delete", nil, s.wire())
}

// Import makes a cluster's associations what the file says, or says what would
// be done.
func (c *Client) Import(ctx context.Context, f AssociationFile, prune, dryRun bool) (Plan, error) {
	return call[Plan](ctx, c, http.MethodPost, pathImport, nil, importRequest{f, prune, dryRun})
}

// Export is a cluster's associations as Import reads them.
func (c *Client) Export(ctx context.Context, cluster string) (AssociationFile, error) {
	all, err := c.Associations(ctx, cluster, "", "")
	if err != nil {
		return AssociationFile{}, err
	}
	return exportOf(cluster, all), nil
}

// Snapshot writes the store's content to w and returns its length. The error is
// not nil unless all of it was written.
func (c *Client) Snapshot(ctx context.Context, w io.Writer) (int64, error) {
	resp, err := c.do(ctx, http.MethodGet, pathSnapshot, nil, nil)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	n, err := io.Copy(w, resp.Body)
	if err != nil {
		return n, fmt.Errorf("read the snapshot: %w", err)
	}
	if want := resp.Trailer.Get(trailerDone); want != strconv.FormatInt(n, 10) {
		return n, fmt.Errorf("%w: the snapshot broke off after %d bytes; the server's log says why", ErrUnavailable, n)
	}
	return n, nil
}

func (c *Client) do(ctx context.Context, method, path string, query url.Values, in any) (*http.Response, error) {
	u := url.URL{Scheme: "http", Host: "server", RawQuery: query.Encode()}
	u.Path, _ = url.PathUnescape(path)
	u.RawPath = path
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return nil, fmt.Errorf("ask the server: %w", err)
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), body)
	if err != nil {
		return nil, fmt.Errorf("ask the server: %w", err)
	}
	resp, err := c.http.Do(req)
	switch {
	case err == nil:
	case adminsocket.Forbidden(err):
		return nil, fmt.Errorf("%w: the admin socket %s is the server's user's; use sudo", ErrNotPermitted, c.socket)
	case adminsocket.NobodyListens(err):
		return nil, fmt.Errorf("%w on %s: is `latchkey-server serve` running here, and with the same --state-dir? %w", ErrNoServer, c.socket, err)
	default:
		return nil, fmt.Errorf("ask the server: %w", err)
	}
	if resp.StatusCode == http.StatusOK {
		return resp, nil
	}
	defer resp.Body.Close()
	var p Problem
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil || json.Unmarshal(b, &p) != nil || p.Error == "" {
		p.Error = resp.Status
	}
	sentinel := map[string]error{
		problemInvalid: ErrRefused, problemNotFound: ErrNotFound, problemConflict: ErrConflict, problemUnavailable: ErrUnavailable,
	}[p.Kind]
	if sentinel == nil {
		return nil, fmt.Errorf("the server says: %s", p.Error)
	}
	return nil, fmt.Errorf("%w: %s", sentinel, p.Error)
}

func call[Out any](ctx context.Context, c *Client, method, path string, query url.Values, in any) (Out, error) {
	var out Out
	resp, err := c.do(ctx, method, path, query, in)
	if err != nil {
		return out, err
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(&out); err != nil {
		return out, fmt.Errorf("read the server's answer: %w", err)
	}
	return out, nil
}
