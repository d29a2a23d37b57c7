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

// Registers of 32 bits: components of a concatenation stand in successive ones.
const (
	reg0 = unix.NFT_REG32_00
	reg1 = unix.NFT_REG32_01
	reg2 = unix.NFT_REG32_02
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

// ensureTable makes the table with all published ports unless it is there. Callers hold mu.
func (d *Dataplane) ensureTable() error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	tables, err := c.ListTablesOfFamily(nftables.TableFamilyIPv4)
	if err != nil {
		return fmt.Errorf("list nftables: %w", err)
	}
	if slices.ContainsFunc(tables, func(t *nftables.Table) bool { return t.Name == d.bridge }) {
		return nil
	}
	t := c.AddTable(d.table())
	ports, bound := d.maps(t)
	var open, narrow []nftables.SetElement
	for _, l := range d.state.Leases {
		o, n := elements(l)
		open, narrow = append(open, o...), append(narrow, n...)
	}
	if err := errors.Join(c.AddSet(ports, open), c.AddSet(bound, narrow)); err != nil {
		return fmt.Errorf("make nftables maps: %w", err)
	}
	accept := nftables.ChainPolicyAccept
	chain := func(name string, kind nftables.ChainType, hook *nftables.ChainHook, priority *nftables.ChainPriority) *nftables.Chain {
		return c.AddChain(&nftables.Chain{Name: name, Table: t, Type: kind, Hooknum: hook, Priority: priority, Policy: &accept})
	}
	for name, hook := range map[string]*nftables.ChainHook{"prerouting": nftables.ChainHookPrerouting, "output": nftables.ChainHookOutput} {
		ch := chain(name, nftables.ChainTypeNAT, hook, nftables.ChainPriorityNATDest)
		for _, narrow := range []bool{true, false} {
			c.AddRule(&nftables.Rule{Table: t, Chain: ch, Exprs: dnat(narrow)})
		}
	}
	post := chain("postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource)
	subnet := d.state.Address.Masked()
	for _, exprs := range [][]expr.Any{
		// Containers to the world.
		slices.Concat(source(subnet), link(expr.MetaKeyOIFNAME, expr.CmpOpNeq, d.bridge), masquerade()),
		// The host's loopback to a published port.
		slices.Concat(source(netip.MustParsePrefix("127.0.0.0/8")), link(expr.MetaKeyOIFNAME, expr.CmpOpEq, d.bridge), masquerade()),
		// A container to a published port of a container.
		slices.Concat(source(subnet), link(expr.MetaKeyOIFNAME, expr.CmpOpEq, d.bridge), translated(true), masquerade()),
	} {
		c.AddRule(&nftables.Rule{Table: t, Chain: post, Exprs: exprs})
	}
	forward := chain("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter)
	c.AddRule(&nftables.Rule{Table: t, Chain: forward, Exprs: slices.Concat(
		link(expr.MetaKeyOIFNAME, expr.CmpOpEq, d.bridge), link(expr.MetaKeyIIFNAME, expr.CmpOpNeq, d.bridge),
		newFlow(), translated(false), []expr.Any{&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop}},
	)})
	if err := c.Flush(); err != nil {
		return fmt.Errorf("make nftables rules: %w", err)
	}
	return nil
}

func (d *Dataplane) removeTable() error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	c.DelTable(d.table())
	if err := c.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove nftables rules: %w", err)
	}
	return nil
}

// publish adds or removes the map elements of a container's ports. Callers hold mu.
func (d *Dataplane) publish(l lease, on bool) error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
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
	exprs := []expr.Any{
		&expr.Fib{Register: reg0, FlagDADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg0, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)},
	}
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

func source(p netip.Prefix) []expr.Any {
	mask := make([]byte, 4)
	binary.BigEndian.PutUint32(mask, ^uint32(0)<<(32-p.Bits()))
	base := p.Masked().Addr().As4()
	return []expr.Any{
		&expr.Payload{DestRegister: reg0, Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 4},
		&expr.Bitwise{SourceRegister: reg0, DestRegister: reg0, Len: 4, Mask: mask, Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg0, Data: base[:]},
	}
}

func link(key expr.MetaKey, op expr.CmpOp, name string) []expr.Any {
	data := make([]byte, unix.IFNAMSIZ)
	copy(data, name)
	return []expr.Any{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: op, Register: 1, Data: data}}
}

// translated matches flows whose destination was (or was not) rewritten.
func translated(yes bool) []expr.Any {
	const statusDNAT = 1 << 5 // IPS_DST_NAT
	op := expr.CmpOpEq
	if yes {
		op = expr.CmpOpNeq
	}
	return []expr.Any{
		&expr.Ct{Register: reg0, Key: expr.CtKeySTATUS},
		&expr.Bitwise{SourceRegister: reg0, DestRegister: reg0, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(statusDNAT), Xor: make([]byte, 4)},
		&expr.Cmp{Op: op, Register: reg0, Data: make([]byte, 4)},
	}
}

func newFlow() []expr.Any {
	return []expr.Any{
		&expr.Ct{Register: reg0, Key: expr.CtKeySTATE},
		&expr.Bitwise{SourceRegister: reg0, DestRegister: reg0, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(expr.CtStateBitNEW), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: reg0, Data: make([]byte, 4)},
	}
}

func masquerade() []expr.Any { return []expr.Any{&expr.Masq{}} }

var _ runtime.Network = (*Dataplane)(nil)
