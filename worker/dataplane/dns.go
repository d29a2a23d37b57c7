package dataplane

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
	"github.com/vishvananda/netns"

	"github.com/skep-dev/skep/core/netplan"
)

const (
	// maxForwards bounds the questions that wait for the host's resolvers; more are
	// refused with SERVFAIL.
	maxForwards = 1024
	// forwardTimeout is for one resolver.
	forwardTimeout = 2 * time.Second
)

// directory is what all names mean, for the resolvers of all sandboxes.
type directory struct {
	mu    sync.RWMutex
	state *netplan.State
}

func newDirectory() *directory { return &directory{state: netplan.NewNames()} }

// leave takes away what a plan takes away; merge brings what it brings.
func (n *directory) leave(p netplan.Plan) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.state.MergeLeaving(p)
}

func (n *directory) merge(p netplan.Plan) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.state.MergeUpdate(p)
}

func (n *directory) setLocal(network string, l netplan.Local) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.state.SetLocal(network, l)
}

func (n *directory) unsetLocal(network string, a netip.Addr) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.state.UnsetLocal(network, a)
}

func (n *directory) lookup(networks []string, name string) netplan.Answer {
	n.mu.RLock()
	defer n.mu.RUnlock()
	return n.state.Lookup(networks, name)
}

func (n *directory) reverse(networks []string, a netip.Addr) (string, bool) {
	n.mu.RLock()
	defer n.mu.RUnlock()
	return n.state.Reverse(networks, a)
}

// dnsPorts are where a sandbox's resolver listens; rules lead port 53 there, so that the
// container may have a server of its own on port 53. Zero without a resolver.
type dnsPorts struct{ udp, tcp uint16 }

// resolver answers the questions of one sandbox.
type resolver struct {
	names    *directory
	networks []string
	own      map[string][]netip.Addr
	forward  func(*dns.Msg, bool) (*dns.Msg, error) // nil: nothing leaves the sandbox
	metrics  *metrics

	udp, tcp *dns.Server
	at       dnsPorts
	done     sync.WaitGroup
}

func (r *resolver) ports() dnsPorts {
	if r == nil {
		return dnsPorts{}
	}
	return r.at
}

// listen opens the sockets of a sandbox's resolver and serves them. Callers hold mu.
func (d *Dataplane) listen(ns netns.NsHandle, s *sandbox) (*resolver, error) {
	r := &resolver{names: d.names, networks: s.networks(), own: map[string][]netip.Addr{}, metrics: d.metrics}
	for _, o := range s.Overlays {
		for _, name := range ownNames(s.id, s.lease, o) {
			name = strings.ToLower(name)
			for _, p := range []netip.Prefix{o.Address, o.Address6} {
				if p.IsValid() && (len(r.own[name]) == 0 || !slices.Contains(r.own[name], p.Addr())) {
					r.own[name] = append(r.own[name], p.Addr())
				}
			}
		}
	}
	if s.Addr.IsValid() { // with a way out
		path, servers := d.netns(s.id), s.DNS
		r.forward = func(q *dns.Msg, tcp bool) (*dns.Msg, error) { return d.askOthers(path, servers, q, tcp) }
	}
	var packets net.PacketConn
	var stream net.Listener
	var lc net.ListenConfig
	err := within(ns, func() (err error) {
		// Listening does not wait, so no context could end it.
		ctx := context.Background() //nolint:forbidigo // see above
		if packets, err = lc.ListenPacket(ctx, "udp4", netip.AddrPortFrom(resolverAddr, 0).String()); err != nil {
			return err
		}
		stream, err = lc.Listen(ctx, "tcp4", netip.AddrPortFrom(resolverAddr, 0).String())
		return err
	})
	if err != nil {
		if packets != nil {
			err = errors.Join(err, packets.Close())
		}
		return nil, fmt.Errorf("open resolver: %w", err)
	}
	r.at = dnsPorts{udp: boundPort(packets.LocalAddr()), tcp: boundPort(stream.Addr())}
	r.udp, r.tcp = &dns.Server{PacketConn: packets, Handler: r}, &dns.Server{Listener: stream, Handler: r}
	for _, server := range []*dns.Server{r.udp, r.tcp} {
		ready := make(chan struct{})
		server.NotifyStartedFunc = sync.OnceFunc(func() { close(ready) })
		r.done.Go(func() {
			_ = server.ActivateAndServe() // ends when the socket is closed
		})
		<-ready
	}
	return r, nil
}

func boundPort(a net.Addr) uint16 {
	if ap, err := netip.ParseAddrPort(a.String()); err == nil {
		return ap.Port()
	}
	return 0
}

func (r *resolver) close() {
	if r == nil {
		return
	}
	for _, server := range []*dns.Server{r.udp, r.tcp} {
		_ = server.Shutdown() // the server was started, so there is no error
	}
	r.done.Wait()
}

// ServeDNS implements dns.Handler.
func (r *resolver) ServeDNS(w dns.ResponseWriter, q *dns.Msg) {
	_, tcp := w.RemoteAddr().(*net.TCPAddr)
	m := r.answer(q, tcp)
	if !tcp {
		size := dns.MinMsgSize
		if o := q.IsEdns0(); o != nil {
			size = max(size, int(o.UDPSize()))
		}
		m.Truncate(size)
	}
	_ = w.WriteMsg(m) // who asked is gone, or asks again
}

func (r *resolver) answer(q *dns.Msg, tcp bool) *dns.Msg {
	m := new(dns.Msg)
	m.SetReply(q)
	m.RecursionAvailable = true
	if o := q.IsEdns0(); o != nil {
		m.SetEdns0(4096, false)
	}
	switch {
	case q.Opcode != dns.OpcodeQuery:
		m.Rcode = dns.RcodeNotImplemented
		return m
	case len(q.Question) != 1:
		m.Rcode = dns.RcodeFormatError
		return m
	}
	question := q.Question[0]
	if question.Qclass == dns.ClassINET && r.ours(m, question) {
		r.metrics.queries.WithLabelValues("skep").Inc()
		return m
	}
	if r.forward == nil {
		// Who is only on internal networks learns nothing of the outside, nor tells it anything.
		r.metrics.queries.WithLabelValues("nobody").Inc()
		m.Rcode = dns.RcodeNameError
		return m
	}
	answer, err := r.forward(q, tcp)
	if err != nil {
		r.metrics.queries.WithLabelValues("failed").Inc()
		m.Rcode = dns.RcodeServerFailure
		return m
	}
	r.metrics.queries.WithLabelValues("host").Inc()
	return answer
}

// ours answers a question about the swarm's names; false for others.
func (r *resolver) ours(m *dns.Msg, question dns.Question) bool {
	header := dns.RR_Header{Name: question.Name, Rrtype: question.Qtype, Class: dns.ClassINET} // time to live zero: nothing may be kept
	if addr, ok := parseReverse(question.Name); ok {
		name, known := r.names.reverse(r.networks, addr)
		switch {
		case !known:
			return false
		case name == "":
			m.Rcode = dns.RcodeNameError
		case question.Qtype == dns.TypePTR:
			m.Answer = append(m.Answer, &dns.PTR{Hdr: header, Ptr: dns.Fqdn(name)})
		}
		return true
	}
	name := strings.ToLower(strings.TrimSuffix(question.Name, "."))
	answer := r.names.lookup(r.networks, name)
	if own, ok := r.own[name]; ok && len(answer.Addrs) == 0 {
		answer = netplan.Answer{Known: true, Addrs: slices.Clone(own)}
	}
	if !answer.Known {
		return false
	}
	// Who takes the first takes any.
	rand.Shuffle(len(answer.Addrs), func(i, j int) { answer.Addrs[i], answer.Addrs[j] = answer.Addrs[j], answer.Addrs[i] })
	for _, a := range answer.Addrs {
		switch {
		case a.Is4() && question.Qtype == dns.TypeA:
			m.Answer = append(m.Answer, &dns.A{Hdr: header, A: a.AsSlice()})
		case a.Is6() && question.Qtype == dns.TypeAAAA:
			m.Answer = append(m.Answer, &dns.AAAA{Hdr: header, AAAA: a.AsSlice()})
		}
	}
	return true
}

// parseReverse reads a name below in-addr.arpa or ip6.arpa as the address it stands for.
func parseReverse(name string) (netip.Addr, bool) {
	name = strings.ToLower(strings.TrimSuffix(name, "."))
	if rest, ok := strings.CutSuffix(name, ".in-addr.arpa"); ok {
		labels := strings.Split(rest, ".")
		if len(labels) != 4 {
			return netip.Addr{}, false
		}
		var b [4]byte
		for i, l := range labels {
			n, err := strconv.ParseUint(l, 10, 8)
			if err != nil {
				return netip.Addr{}, false
			}
			b[3-i] = byte(n)
		}
		return netip.AddrFrom4(b), true
	}
	rest, ok := strings.CutSuffix(name, ".ip6.arpa")
	if !ok || len(rest) != 63 {
		return netip.Addr{}, false
	}
	var digits []byte
	for i := len(rest) - 1; i >= 0; i -= 2 {
		digits = append(digits, rest[i])
		if i > 0 && rest[i-1] != '.' {
			return netip.Addr{}, false
		}
	}
	b, err := hex.DecodeString(string(digits))
	if err != nil || len(b) != 16 {
		return netip.Addr{}, false
	}
	return netip.AddrFrom16([16]byte(b)), true
}

// askOthers passes a question on: to servers from inside the sandbox, or, without any, to
// the host's resolvers from the host. Truncated answers are asked for again by TCP.
func (d *Dataplane) askOthers(path string, servers []netip.Addr, q *dns.Msg, tcp bool) (*dns.Msg, error) {
	select {
	case d.forwards <- struct{}{}:
		defer func() { <-d.forwards }()
	default:
		return nil, errors.New("too many questions wait for an answer")
	}
	enter := func(f func() error) error { return within(d.hostNS, f) }
	if len(servers) > 0 {
		enter = func(f func() error) error { return withinPath(path, func(netns.NsHandle) error { return f() }) }
	} else {
		list, _, _ := resolverSettings(true)
		for _, s := range list {
			if a, err := netip.ParseAddr(s); err == nil {
				servers = append(servers, a)
			}
		}
	}
	err := errors.New("no resolver is known")
	var answer *dns.Msg
	for _, server := range servers {
		if answer, err = askOne(enter, server, q, tcp); err == nil && answer.Rcode != dns.RcodeServerFailure {
			break
		}
	}
	return answer, err
}

func askOne(enter func(func() error) error, server netip.Addr, q *dns.Msg, tcp bool) (*dns.Msg, error) {
	network := "udp"
	if tcp {
		network = "tcp"
	}
	ask := q.Copy()
	ask.Id = dns.Id()
	dialer := net.Dialer{Timeout: forwardTimeout}
	var conn net.Conn
	if err := enter(func() (err error) {
		ctx := context.Background() //nolint:forbidigo // the dialer's timeout ends it
		conn, err = dialer.DialContext(ctx, network, netip.AddrPortFrom(server, 53).String())
		return err
	}); err != nil {
		return nil, fmt.Errorf("ask %s: %w", server, err)
	}
	defer conn.Close() //nolint:errcheck // the answer is what counts
	client := dns.Client{Net: network, Timeout: forwardTimeout}
	size := uint16(dns.MinMsgSize)
	if o := q.IsEdns0(); o != nil {
		size = max(size, o.UDPSize())
	}
	answer, _, err := client.ExchangeWithConn(ask, &dns.Conn{Conn: conn, UDPSize: size})
	if err != nil {
		return nil, fmt.Errorf("ask %s: %w", server, err)
	}
	if answer.Truncated && !tcp {
		if whole, err := askOne(enter, server, q, true); err == nil {
			answer = whole
		}
	}
	answer.Id = q.Id
	return answer, nil
}
