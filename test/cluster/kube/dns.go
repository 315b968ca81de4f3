// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/net/dns/dnsmessage"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	listers "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/clientcmd"
)

// The zone of a cluster's services, and how long an answer may be kept.
const (
	zone = ".svc.cluster.local."
	ttl  = 5
)

// newDNS answers for services, which is what a node's programs need of a
// cluster's DNS: the cluster addresses of NAME.NAMESPACE.svc.cluster.local. No
// other name exists.
func newDNS() *cobra.Command {
	var kubeconfig, address string
	cmd := &cobra.Command{
		Use:  "dns",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGTERM, syscall.SIGINT)
			defer stop()
			return serveDNS(ctx, kubeconfig, address)
		},
	}
	cmd.Flags().StringVar(&kubeconfig, "kubeconfig", "", "kubeconfig `file`")
	cmd.Flags().StringVar(&address, "address", "", "host:port to listen on, UDP")
	_ = cmd.MarkFlagRequired("kubeconfig")
	_ = cmd.MarkFlagRequired("address")
	return cmd
}

func serveDNS(ctx context.Context, kubeconfig, address string) error {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	factory := informers.NewSharedInformerFactory(client, 0)
	services := factory.Core().V1().Services().Lister()
	factory.Start(ctx.Done())
	conn, err := net.ListenPacket("udp", address)
	if err != nil {
		return err
	}
	context.AfterFunc(ctx, func() { _ = conn.Close() })
	query := make([]byte, 512)
	for {
		n, from, err := conn.ReadFrom(query)
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("reading a query: %w", err)
		}
		reply, err := answer(query[:n], services)
		if err != nil {
			continue // Not a query: no answer.
		}
		// Whoever asked has gone, perhaps; others have not.
		_, _ = conn.WriteTo(reply, from)
	}
}

func answer(query []byte, services listers.ServiceLister) ([]byte, error) {
	var p dnsmessage.Parser
	header, err := p.Start(query)
	if err != nil {
		return nil, err
	}
	question, err := p.Question()
	if err != nil {
		return nil, err
	}
	addresses, exists := lookup(question.Name.String(), services)
	response := dnsmessage.Header{ID: header.ID, Response: true, Authoritative: true, RecursionDesired: header.RecursionDesired, RecursionAvailable: true}
	if !exists {
		response.RCode = dnsmessage.RCodeNameError
	}
	b := dnsmessage.NewBuilder(nil, response)
	if err := errors.Join(b.StartQuestions(), b.Question(question), b.StartAnswers()); err != nil {
		return nil, err
	}
	resource := dnsmessage.ResourceHeader{Name: question.Name, Class: dnsmessage.ClassINET, TTL: ttl}
	for _, a := range addresses {
		switch {
		case a.Is4() && question.Type == dnsmessage.TypeA:
			err = b.AResource(resource, dnsmessage.AResource{A: a.As4()})
		case a.Is6() && question.Type == dnsmessage.TypeAAAA:
			err = b.AAAAResource(resource, dnsmessage.AAAAResource{AAAA: a.As16()})
		}
		if err != nil {
			return nil, err
		}
	}
	return b.Finish()
}

// lookup: a name that exists may have no address of the family asked for, which
// is not the same answer.
func lookup(name string, services listers.ServiceLister) ([]netip.Addr, bool) {
	name, ok := strings.CutSuffix(strings.ToLower(name), zone)
	if !ok {
		return nil, false
	}
	service, namespace, ok := strings.Cut(name, ".")
	if !ok {
		return nil, false
	}
	s, err := services.Services(namespace).Get(service)
	if err != nil {
		return nil, !apierrors.IsNotFound(err)
	}
	var out []netip.Addr
	for _, ip := range s.Spec.ClusterIPs {
		if a, err := netip.ParseAddr(ip); err == nil {
			out = append(out, a)
		}
	}
	return out, true
}
