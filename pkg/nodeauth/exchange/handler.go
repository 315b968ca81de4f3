// SPDX-License-Identifier: Apache-2.0

package exchange

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"

	"github.com/google/uuid"

	"github.com/latchkey-dev/latchkey/pkg/nodeauth"
)

// Pattern is what the handler is to be registered for, in the form of
// http.ServeMux.
const Pattern = "POST /latchkey/v1/clusters/{name}/node-credentials"

// maxBody is beyond any request: a token of satoken.MaxTokenSize. Whoever sends
// it has proved nothing yet.
const maxBody = 20 << 10

// ServeHTTP answers one exchange; the path's {name} is the cluster. Its errors
// have the form of the EKS APIs. Limits per caller are the server's, around it.
func (e *Exchanger) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Cache-Control", "no-store")
	if h.Get("X-Amzn-RequestId") == "" {
		h.Set("X-Amzn-RequestId", uuid.NewString())
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if err != nil {
		var tooLarge *http.MaxBytesError
		if errors.As(err, &tooLarge) {
			fail(w, http.StatusRequestEntityTooLarge, "InvalidRequestException", "The request is too large.")
			return
		}
		fail(w, http.StatusBadRequest, "InvalidRequestException", "The request cannot be read.")
		return
	}
	var in nodeauth.Request
	if json.Unmarshal(body, &in) != nil {
		fail(w, http.StatusBadRequest, "InvalidRequestException", "The request is not JSON as it should be.")
		return
	}
	if in.Token == "" {
		fail(w, http.StatusBadRequest, "InvalidParameterException", "token is required")
		return
	}
	if !e.cfg.Clusters.Ready() {
		fail(w, http.StatusServiceUnavailable, "ServiceUnavailableException", messageUnavailable)
		return
	}
	name := r.PathValue("name")
	cluster, ok := e.cfg.Clusters.Cluster(name)
	if !ok {
		// Whoever has proved nothing is not told which clusters there are.
		cluster.Name = name
	}
	grant, err := e.exchangeAs(r.Context(), cluster, ok, in.Token, r.RemoteAddr)
	if err != nil {
		status, code := http.StatusServiceUnavailable, "ServiceUnavailableException"
		switch {
		case errors.Is(err, ErrInvalid), errors.Is(err, ErrExpired):
			// Alike, as the time is judged before the signature.
			status, code = http.StatusBadRequest, "InvalidTokenException"
		case errors.Is(err, ErrNotAgent):
			status, code = http.StatusForbidden, "AccessDeniedException"
		}
		message := messageUnavailable
		var refused *Error
		if errors.As(err, &refused) {
			message = refused.Message()
		}
		fail(w, status, code, message)
		return
	}
	_ = json.NewEncoder(w).Encode(nodeauth.Answer{
		Node: nodeauth.AnswerNode{Name: grant.Node.Name, UID: grant.Node.UID},
		Credentials: nodeauth.AnswerCredentials{
			AccessKeyID: grant.AccessKeyID, SecretAccessKey: grant.SecretAccessKey, SessionToken: grant.SessionToken,
			Expiration: grant.Node.Expires.Unix(),
		},
	})
}

func fail(w http.ResponseWriter, status int, code, message string) {
	w.Header().Set("X-Amzn-ErrorType", code)
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(struct {
		Message string `json:"message"`
	}{message})
}
