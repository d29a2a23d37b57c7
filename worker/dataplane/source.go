package dataplane

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/core/netplan"
)

// A task sees who its clients at published ports are, and answers each through the node at
// which the client came in. Nothing here is about a particular node: its leg's hardware
// address is 02:42 and its address in the ingress network, and that address becomes the
// mark of the connection. docs/decisions has why it is safe.

// sourceTable is the table in the sandbox of a task in the ingress network.
const sourceTable = "skep_mesh"

// sourceRoutes is the routing table that leads answers back to the ingress network, and the
// preference of the rule that leads to it.
const sourceRoutes = 91

// viaEntry is the next hop of all answers. Nothing has the address: the egress rule puts
// the entry node's hardware address in the place of its own.
//
//nolint:gochecknoglobals // constants in all but syntax
var (
	viaEntry  = netip.AddrFrom4([4]byte{169, 254, 91, 91})
	viaEntry6 = netip.MustParseAddr("fe80::5b5b")
	entryMAC  = net.HardwareAddr{0x02, 0x53, 0x5b, 0xff, 0xff, 0xff}
)

// answering is what a sandbox needs to answer clients by their own addresses.
type answering struct {
	eth    string       // its link to the ingress network
	subnet netip.Prefix // of its address there
	local  netip.Addr   // its address in the local network, from which datagrams are answered
	// subnet6 is that of its IPv6 address; zero without one.
	subnet6 netip.Prefix
	rules   watched
	rules6  watched
	egress  watched
	index   int // of eth; with the link, the egress rules are gone
}

// sourceRules returns the rules of one sandbox, in nft's words:
//
//	table ip skep_mesh {
//	  chain zone   { type filter hook prerouting priority -300; CAME ct original zone set ENTRY & 0xffff }
//	  chain mark   { type filter hook prerouting priority -150; CAME ct direction original ct mark set ENTRY meta mark set ENTRY }
//	  chain answer { type route hook output priority -150; ct direction reply ct mark & MASK == SUBNET meta mark set ct mark }
//	  chain local  { type nat hook prerouting priority -100; CAME meta l4proto udp ct mark & MASK == SUBNET dnat to LOCAL }
//	}
//
// CAME is iifname ETH, a source outside of SUBNET, and a hardware address of 02:42 and an
// address within: ENTRY. The zone keeps one port of a client at two entry nodes apart. A
// datagram's answer is given the address of the way out before it is marked, so that is
// where the datagram goes as well.
//
// In IPv6 it is the same, but for datagrams: local has no rule. ENTRY is an IPv4 address there, too.
func sourceRules(f nftables.TableFamily, s *answering) *ruleset {
	t := &nftables.Table{Family: f, Name: sourceTable}
	mask, net4 := maskOf(s.subnet), s.subnet.Masked().Addr().As4()
	inSubnet := []expr.Any{
		&expr.Bitwise{SourceRegister: reg0, DestRegister: reg0, Len: 4, Mask: mask, Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg0, Data: net4[:]},
	}
	hardware := func(offset, length uint32) expr.Any {
		return &expr.Payload{DestRegister: reg0, Base: expr.PayloadBaseLLHeader, Offset: offset, Len: length}
	}
	inside := s.subnet.Masked()
	if f == nftables.TableFamilyIPv6 {
		inside = s.subnet6.Masked()
	}
	came := slices.Concat(
		named(expr.MetaKeyIIFNAME, expr.CmpOpEq, s.eth), sourceIn(inside, false),
		[]expr.Any{hardware(6, 2), &expr.Cmp{Op: expr.CmpOpEq, Register: reg0, Data: []byte{0x02, 0x42}}, hardware(8, 4)}, inSubnet)
	direction := func(d byte) []expr.Any {
		return []expr.Any{&expr.Ct{Key: expr.CtKeyDIRECTION, Register: reg0}, &expr.Cmp{Op: expr.CmpOpEq, Register: reg0, Data: []byte{d}}}
	}
	marked := append([]expr.Any{&expr.Ct{Key: expr.CtKeyMARK, Register: reg0}}, inSubnet...)
	const original, reply = 0, 1
	local := toBackend([]netip.Addr{s.local}, 0)
	local.exprs = slices.Concat(came, protocol(unix.IPPROTO_UDP), marked, local.exprs)
	raw, mangle := nftables.ChainPriorityRef(-300), nftables.ChainPriorityRef(-150)
	rules := &ruleset{table: t, chains: []*ruleChain{
		{baseChain(t, "zone", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, raw), []rule{
			{exprs: slices.Concat(came, []expr.Any{hardware(10, 2), zoneOfOriginal()})},
		}},
		{baseChain(t, "mark", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, mangle), []rule{
			{exprs: slices.Concat(came, direction(original), []expr.Any{
				hardware(8, 4),
				&expr.Ct{Key: expr.CtKeyMARK, Register: reg0, SourceRegister: true},
				&expr.Meta{Key: expr.MetaKeyMARK, Register: reg0, SourceRegister: true},
			})},
		}},
		{baseChain(t, "answer", nftables.ChainTypeRoute, nftables.ChainHookOutput, mangle), []rule{
			{exprs: slices.Concat(direction(reply), marked, []expr.Any{
				&expr.Ct{Key: expr.CtKeyMARK, Register: reg0},
				&expr.Meta{Key: expr.MetaKeyMARK, Register: reg0, SourceRegister: true},
			})},
		}},
	}}
	// With a chain of its kind, if without rules, the kernel translates at all: it gives one
	// of two equal answers another port.
	nat := &ruleChain{Chain: baseChain(t, "local", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest)}
	if f == nftables.TableFamilyIPv4 {
		nat.rules = append(nat.rules, local)
	}
	rules.chains = append(rules.chains, nat)
	return rules
}

// egressRules returns the rule that sends answers to their entry node:
//
//	table netdev skep_mesh {
//	  chain egress { type filter hook egress device ETH priority 0; ether daddr 02:53:5b:ff:ff:ff ether daddr[2-5] set meta mark }
//	}
func egressRules(eth string) *ruleset {
	t := &nftables.Table{Family: nftables.TableFamilyNetdev, Name: sourceTable}
	ch := baseChain(t, "egress", nftables.ChainTypeFilter, nftables.ChainHookEgress, nftables.ChainPriorityFilter)
	ch.Device = eth
	to := []byte{0x02, 0x42}
	return &ruleset{table: t, chains: []*ruleChain{{ch, []rule{{exprs: []expr.Any{
		&expr.Payload{DestRegister: unix.NFT_REG_1, Base: expr.PayloadBaseLLHeader, Offset: 0, Len: 6},
		&expr.Cmp{Op: expr.CmpOpEq, Register: unix.NFT_REG_1, Data: entryMAC},
		&expr.Immediate{Register: reg0, Data: to},
		&expr.Payload{OperationType: expr.PayloadWrite, SourceRegister: reg0, Base: expr.PayloadBaseLLHeader, Offset: 0, Len: 2},
		&expr.Meta{Key: expr.MetaKeyMARK, Register: reg0},
		&expr.Payload{OperationType: expr.PayloadWrite, SourceRegister: reg0, Base: expr.PayloadBaseLLHeader, Offset: 2, Len: 4},
	}}}}}}
}

func maskOf(p netip.Prefix) []byte { return net.CIDRMask(p.Bits(), p.Addr().BitLen()) }

// ensure makes or mends what a sandbox needs.
func (s *answering) ensure(ns netns.NsHandle, h *netlink.Handle, x *drift, what string) error {
	if s.rules.rules == nil {
		s.rules.want(sourceRules(nftables.TableFamilyIPv4, s))
		s.egress.want(egressRules(s.eth))
		if s.subnet6.IsValid() {
			s.rules6.want(sourceRules(nftables.TableFamilyIPv6, s))
		}
	}
	link, err := h.LinkByName(s.eth)
	if err != nil {
		return nil //nolint:nilerr // named already
	}
	if at := link.Attrs().Index; at != s.index {
		s.index, s.egress.gen = at, 0
	}
	err = errors.Join(s.rules.ensure(ns, x, what), s.egress.ensure(ns, x, what), s.ensureRoutes(h, netlink.FAMILY_V4, viaEntry, x, what))
	if s.subnet6.IsValid() {
		err = errors.Join(err, s.rules6.ensure(ns, x, what), s.ensureRoutes(h, netlink.FAMILY_V6, viaEntry6, x, what))
	}
	if err != nil || !x.repair {
		return err
	}
	return within(ns, func() error {
		err := errors.Join(
			sysctl("net/ipv4/conf/"+s.eth+"/src_valid_mark", "1"), // clients do not live where eth leads
			sysctl("net/ipv4/tcp_fwmark_accept", "1"), sysctl("net/ipv4/fwmark_reflect", "1"),
			// Kernels before 6.3 would give what begins to the socket that its port meant before
			// it was given another.
			sysctls([2]string{"net/ipv4/tcp_early_demux", "0"}, [2]string{"net/ipv4/udp_early_demux", "0"}))
		if s.subnet6.IsValid() {
			err = errors.Join(err, sysctl("net/ipv6/fwmark_reflect", "1"))
		}
		return err
	})
}

// ensureRoutes makes or mends the way of what is marked.
func (s *answering) ensureRoutes(h *netlink.Handle, family int, via netip.Addr, x *drift, what string) error {
	net4 := s.subnet.Masked().Addr().As4()
	mark, mask := binary.NativeEndian.Uint32(net4[:]), binary.NativeEndian.Uint32(maskOf(s.subnet))
	rules, err := dump(func() ([]netlink.Rule, error) { return h.RuleList(family) })
	if err != nil {
		return fmt.Errorf("list routing rules: %w", err)
	}
	there := slices.ContainsFunc(rules, func(r netlink.Rule) bool {
		return r.Table == sourceRoutes && r.Mark == mark && r.Mask != nil && *r.Mask == mask
	})
	if !there && x.add(kindLink, "%s: the rule for answers is missing", what) {
		r := netlink.NewRule()
		r.Family, r.Priority, r.Table, r.Mark, r.Mask = family, sourceRoutes, sourceRoutes, mark, &mask
		if err := h.RuleAdd(r); err != nil {
			return fmt.Errorf("lead answers back: %w", err)
		}
	}
	want := &netlink.Route{LinkIndex: s.index, Gw: via.AsSlice(), Table: sourceRoutes, Flags: int(netlink.FLAG_ONLINK)}
	routes, err := dump(func() ([]netlink.Route, error) {
		return h.RouteListFiltered(family, want, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_OIF|netlink.RT_FILTER_GW)
	})
	if err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	if len(routes) == 0 && x.add(kindLink, "%s: the route for answers is missing", what) {
		if err := h.RouteReplace(want); err != nil {
			return fmt.Errorf("lead answers back: %w", err)
		}
	}
	return ensureNeighbour(h, s.index, via, entryMAC, x, "%s: the next hop of answers is missing", what)
}

// ensureSource does so for a sandbox in the ingress network, if the kernel can.
func (d *Dataplane) ensureSource(ns netns.NsHandle, h *netlink.Handle, s *sandbox, x *drift) error {
	if !d.keepsSource {
		return nil
	}
	for _, o := range s.Overlays {
		in := d.want.Network(o.NetworkID)
		if !in.GetIngress() || !s.Addr.IsValid() {
			continue
		}
		want := answering{eth: s.interfaceOf(o.NetworkID), local: s.Addr, subnet6: o.Address6.Masked()}
		for _, g := range netplan.Segments(in) {
			if g.Subnet.Contains(o.Address.Addr()) {
				want.subnet = g.Subnet
			}
		}
		if !want.subnet.IsValid() {
			continue
		}
		if was := s.answers; was == nil || was.eth != want.eth || was.subnet != want.subnet || was.local != want.local || was.subnet6 != want.subnet6 {
			s.answers = &want
		}
		return s.answers.ensure(ns, h, x, fmt.Sprintf("container %.12s, clients' addresses", s.id))
	}
	return nil
}

// probeSource tries the rules out in a namespace of their own.
func (d *Dataplane) probeSource() error {
	return tryWithin(filepath.Join(d.cfg.ExecDir, ".probe"), func(ns netns.NsHandle) error {
		s := &answering{eth: "lo", subnet: netip.MustParsePrefix("10.0.0.0/24"), local: netip.MustParseAddr("10.0.0.1")}
		return errors.Join(sourceRules(nftables.TableFamilyIPv4, s).write(ns), egressRules(s.eth).write(ns))
	})
}
