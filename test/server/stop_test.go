// SPDX-License-Identifier: Apache-2.0

package server

import (
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"syscall"
	"testing"

	"github.com/latchkey-dev/latchkey/test/standin/sts"
	"github.com/latchkey-dev/latchkey/test/standin/tokens"
)

// Whoever was asking when the server is told to stop is answered.
func TestStopsGracefully(t *testing.T) {
	t.Parallel()
	standin := sts.New(sts.Config{AnyRole: true, Callers: map[string]sts.Caller{"AKIASERVER0000000000": {SecretAccessKey: "server's own"}}})
	asked := make(chan struct{}, 16)
	stsServer := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked <- struct{}{}
		standin.ServeHTTP(w, r)
	}))
	defer stsServer.Close()
	s := newServer(t, "--sts-endpoint", stsServer.URL)
	s.env = []string{"AWS_ACCESS_KEY_ID=AKIASERVER0000000000", "AWS_SECRET_ACCESS_KEY=server's own"}
	s.serve()
	signer := newSigner(t)
	s.addCluster(cluster, signer)
	agent := s.user("agent", "--node", cluster+"/"+node)
	s.cli("association", "create", "-c", cluster, "-n", "web", "-s", "api", "-r", roleARN("r"))
	hold := make(chan struct{})
	standin.Inject(sts.Fault{Hold: hold})
	answered := make(chan answer, 1)
	token := signer.Token(tokens.Claims{Namespace: "web", ServiceAccount: "api"})
	go func() { answered <- s.exchange(agent, cluster, token) }()
	select {
	case <-asked:
	case <-s.ctx.Done():
		t.Fatal("STS was not asked")
	}
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	s.until("new connections are refused", func() error {
		c, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
		if err != nil {
			return nil
		}
		c.Close()
		return fmt.Errorf("it still listens")
	})
	close(hold)
	wantAnswer(t, "asked before the stop", <-answered, 200, "", "role/r/")
	<-s.done
	if s.err != nil {
		t.Errorf("ended with %v", s.err)
	}
}

// A collector that is away costs nobody anything.
func TestTracesToNobody(t *testing.T) {
	t.Parallel()
	s := start(t, "--traces-endpoint", "http://127.0.0.1:1")
	signer := newSigner(t)
	s.addCluster(cluster, signer)
	agent := s.user("agent", "--node", cluster+"/"+node)
	s.cli("association", "create", "-c", cluster, "-n", "web", "-s", "api", "-r", roleARN("r"))
	wantAnswer(t, "an exchange", s.exchange(agent, cluster, signer.Token(tokens.Claims{Namespace: "web", ServiceAccount: "api"})), 200, "", "role/r/")
	if m, err := s.get("/metrics"); err != nil || !strings.Contains(m, `latchkey_server_exchanges_total{cluster="prod",code="",outcome="done"} 1`) {
		t.Errorf("the exchange is not counted: %v", err)
	}
	s.stop()
}
