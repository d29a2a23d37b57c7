package dataplane

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/worker/runtime"
)

// table returns this daemon's own table. The rules, in nft's words:
//
//	table ip skepXXXXXXXX {
//	  map ports { type inet_proto . inet_service : ipv4_addr . inet_service }
//	  map bound { type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service }
//	  chain prerouting  { type nat hook prerouting priority -100; fib daddr type local dnat to … }
//	  chain output      { type nat hook output priority -100; fib daddr type local dnat to … }
//	  chain postrouting { type nat hook postrouting priority 100; masquerade what leaves, hairpins }
//	  chain forward     { type filter hook forward priority 0; drop new flows in that nobody published }
//	}
func (d *Dataplane) table() *nftables.Table {
	return &nftables.Table{Family: nftables.TableFamilyIPv4, Name: d.bridge}
}

func (d *Dataplane) maps(t *nftables.Table) (ports, bound *nftables.Set) {
	target := nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetService)
	ports = &nftables.Set{
		Table: t, Name: "ports", IsMap: true, Concatenation: true, DataType: target,
		KeyType: nftables.MustConcatSetType(nftables.TypeInetProto, nftables.TypeInetService),
	}
	bound = &nftables.Set{
		Table: t, Name: "bound", IsMap: true, Concatenation: true, DataType: target,
		KeyType: nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetProto, nftables.TypeInetService),
	}
	return ports, bound
}

// localRules returns the table with all published ports. Callers hold mu.
func (d *Dataplane) localRules() *ruleset {
	t := d.table()
	open, bound := d.maps(t)
	ports, narrow := &ruleSet{Set: open}, &ruleSet{Set: bound}
	for _, l := range d.state.Leases {
		o, n := elements(l)
		ports.elements, narrow.elements = append(ports.elements, o...), append(narrow.elements, n...)
	}
	translate := []rule{{exprs: dnat(true)}, {exprs: dnat(false)}}
	subnet := d.state.Address.Masked()
	return &ruleset{table: t, sets: []*ruleSet{ports, narrow}, chains: []*ruleChain{
		{baseChain(t, "prerouting", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest), translate},
		{baseChain(t, "output", nftables.ChainTypeNAT, nftables.ChainHookOutput, nftables.ChainPriorityNATDest), translate},
		{baseChain(t, "postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource), []rule{
			// Containers to the world.
			{exprs: slices.Concat(source(subnet), named(expr.MetaKeyOIFNAME, expr.CmpOpNeq, d.bridge), masquerade())},
			// The host's loopback to a published port.
			{exprs: slices.Concat(source(netip.MustParsePrefix("127.0.0.0/8")), named(expr.MetaKeyOIFNAME, expr.CmpOpEq, d.bridge), masquerade())},
			// A container to a published port of a container.
			{exprs: slices.Concat(source(subnet), named(expr.MetaKeyOIFNAME, expr.CmpOpEq, d.bridge), translated(true), masquerade())},
		}},
		{baseChain(t, "forward", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter), []rule{
			{exprs: slices.Concat(named(expr.MetaKeyOIFNAME, expr.CmpOpEq, d.bridge), named(expr.MetaKeyIIFNAME, expr.CmpOpNeq, d.bridge),
				newFlow(), translated(false), drop())},
		}},
	}}
}

// ensureTable makes the table with all published ports, or mends it. Callers hold mu.
func (d *Dataplane) ensureTable(x *drift) error {
	d.local.want(d.localRules())
	return d.local.ensure(d.hostNS, x, "local network")
}

// publish adds or removes the map elements of a container's ports. Callers hold mu.
func (d *Dataplane) publish(l lease, on bool) error {
	c, err := openNFT(d.hostNS)
	if err != nil {
		return err
	}
	ports, bound := d.maps(d.table())
	open, narrow := elements(l)
	for set, list := range map[*nftables.Set][]nftables.SetElement{ports: open, bound: narrow} {
		if len(list) == 0 {
			continue
		}
		change := c.SetAddElements
		if !on {
			change = c.SetDeleteElements
		}
		if err := change(set, list); err != nil {
			return fmt.Errorf("publish ports: %w", err)
		}
	}
	err = c.Flush()
	if !on && errors.Is(err, unix.ENOENT) {
		return nil // the table was flushed by somebody
	}
	if err != nil {
		return fmt.Errorf("publish ports: %w", err)
	}
	return nil
}

// elements returns the map elements of a lease: for all addresses, and for particular ones.
func elements(l lease) (open, narrow []nftables.SetElement) {
	for _, p := range l.Ports {
		proto := map[string]byte{"tcp": unix.IPPROTO_TCP, "udp": unix.IPPROTO_UDP, "sctp": unix.IPPROTO_SCTP}[p.Protocol]
		addr := l.Addr.As4()
		e := nftables.SetElement{Key: portKey(proto, p.HostPort), Val: append(addr[:], padPort(p.ContainerPort)...)}
		if p.HostIP.IsValid() && !p.HostIP.IsUnspecified() {
			host := p.HostIP.As4()
			e.Key = append(host[:], e.Key...)
			narrow = append(narrow, e)
			continue
		}
		open = append(open, e)
	}
	return open, narrow
}

func portKey(proto byte, port uint16) []byte {
	return append([]byte{proto, 0, 0, 0}, padPort(port)...)
}

func padPort(port uint16) []byte {
	b := make([]byte, 4)
	binary.BigEndian.PutUint16(b, port)
	return b
}

// dnat sends what is for a published port of this host to its container.
func dnat(narrow bool) []expr.Any {
	exprs := toLocal()
	name, proto, port := "ports", uint32(reg0), uint32(reg1)
	if narrow {
		name, proto, port = "bound", reg1, reg2
		exprs = append(exprs, &expr.Payload{DestRegister: reg0, Base: expr.PayloadBaseNetworkHeader, Offset: 16, Len: 4})
	}
	return append(exprs,
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: proto},
		&expr.Payload{DestRegister: port, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Lookup{SourceRegister: reg0, DestRegister: reg0, IsDestRegSet: true, SetName: name},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: reg0, RegProtoMin: reg1, Specified: true},
	)
}

func source(p netip.Prefix) []expr.Any { return sourceIn(p, true) }

// sourceIn matches what comes, or does not come, from a prefix.
func sourceIn(p netip.Prefix, in bool) []expr.Any {
	op := expr.CmpOpEq
	if !in {
		op = expr.CmpOpNeq
	}
	offset, size := uint32(12), uint32(p.Addr().BitLen()/8)
	if p.Addr().Is6() {
		offset = 8
	}
	return []expr.Any{
		&expr.Payload{DestRegister: reg0, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: size},
		&expr.Bitwise{SourceRegister: reg0, DestRegister: reg0, Len: size, Mask: maskOf(p), Xor: make([]byte, size)},
		&expr.Cmp{Op: op, Register: reg0, Data: p.Masked().Addr().AsSlice()},
	}
}

func newFlow() []expr.Any { return inState(expr.CtStateBitNEW) }

// inState matches packets whose connection is in one of some states.
func inState(states uint32) []expr.Any {
	return []expr.Any{
		&expr.Ct{Register: reg0, Key: expr.CtKeySTATE},
		&expr.Bitwise{SourceRegister: reg0, DestRegister: reg0, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(states), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: reg0, Data: make([]byte, 4)},
	}
}

func masquerade() []expr.Any { return []expr.Any{&expr.Masq{}} }

var _ runtime.Network = (*Dataplane)(nil)
