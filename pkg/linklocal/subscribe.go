// SPDX-License-Identifier: Apache-2.0

package linklocal

import (
	"context"
	"fmt"
	"net"
	"sync"

	"github.com/vishvananda/netlink"
)

// receiveBuffer of each subscription in bytes. The kernel bounds it by
// net.core.rmem_max. An overflow only costs a new subscription.
const receiveBuffer = 1 << 20

// SubscribeNetlink streams the changes of addresses, links and routes of the
// calling thread's network namespace. The channel closes when ctx ends or when
// the kernel had to drop notifications; the caller then looks for itself and
// subscribes again. It must be read until it closes.
func SubscribeNetlink(ctx context.Context) (<-chan Event, error) {
	ctx, cancel := context.WithCancel(ctx)
	addrs := make(chan netlink.AddrUpdate)
	links := make(chan netlink.LinkUpdate)
	routes := make(chan netlink.RouteUpdate)
	out := make(chan Event)
	var wg sync.WaitGroup

	forward := func(e Event) {
		select {
		case out <- e:
		case <-ctx.Done():
		}
	}
	// Each forwarder drains its channel to the end: netlink's goroutine
	// behind it would hang in a send otherwise. The first stream to end ends
	// them all.
	start := func(f func()) {
		wg.Go(func() {
			defer cancel()
			f()
		})
	}
	finish := func() {
		wg.Wait()
		close(out)
	}

	if err := netlink.AddrSubscribeWithOptions(addrs, ctx.Done(), netlink.AddrSubscribeOptions{ReceiveBufferSize: receiveBuffer}); err != nil {
		cancel()
		return nil, fmt.Errorf("subscribing to address changes: %w", err)
	}
	start(func() {
		for u := range addrs {
			e := Event{Kind: AddressEvent, LinkIndex: u.LinkIndex}
			e.Address, _ = addrOf(&u.LinkAddress)
			forward(e)
		}
	})
	if err := netlink.LinkSubscribeWithOptions(links, ctx.Done(), netlink.LinkSubscribeOptions{ReceiveBufferSize: receiveBuffer}); err != nil {
		cancel()
		go finish()
		return nil, fmt.Errorf("subscribing to link changes: %w", err)
	}
	start(func() {
		for u := range links {
			e := Event{Kind: LinkEvent, LinkIndex: int(u.Index)}
			if u.Link != nil {
				e.Link = u.Attrs().Name
			}
			forward(e)
		}
	})
	if err := netlink.RouteSubscribeWithOptions(routes, ctx.Done(), netlink.RouteSubscribeOptions{ReceiveBufferSize: receiveBuffer}); err != nil {
		cancel()
		go finish()
		return nil, fmt.Errorf("subscribing to route changes: %w", err)
	}
	start(func() {
		for u := range routes {
			e := Event{Kind: RouteEvent}
			if ones, bits := maskSize(u.Dst); ones == bits {
				e.Address, _ = addrOf(u.Dst)
			}
			forward(e)
		}
	})
	go finish()
	return out, nil
}

func maskSize(n *net.IPNet) (ones, bits int) {
	if n == nil {
		return 0, -1
	}
	return n.Mask.Size()
}
