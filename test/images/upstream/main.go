// SPDX-License-Identifier: Apache-2.0

// Command upstream is the stand-in for EKS Auth as a server for the suites. Its
// credentials open nothing.
//
//	upstream ADDRESS CLUSTER JWKSFILE
//
// PUT /associations makes the association in the body, GET /calls?namespace=N&serviceAccount=S
// says how often a service account's credentials were asked for.
package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"time"

	"github.com/latchkey-dev/latchkey/test/standin/eksauth"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "upstream:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 3 {
		return fmt.Errorf("want ADDRESS CLUSTER JWKSFILE, got %d arguments", len(args))
	}
	jwks, err := os.ReadFile(args[2])
	if err != nil {
		return err
	}
	service, err := eksauth.New(eksauth.Config{Cluster: args[1], JWKS: jwks})
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.Handle("/", service)
	mux.HandleFunc("PUT /associations", func(w http.ResponseWriter, r *http.Request) {
		var a eksauth.Association
		if err := json.NewDecoder(r.Body).Decode(&a); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		service.Associate(a)
	})
	mux.HandleFunc("GET /calls", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, service.CallsFor(r.FormValue("namespace"), r.FormValue("serviceAccount")))
	})
	server := &http.Server{Addr: args[0], Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	return server.ListenAndServe()
}
