package dataplane

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/core/netplan"
)

// ingressLink is this node's leg into the ingress network, in the host's namespace. It
// carries the daemon's mark, as the local bridge does.
func (d *Dataplane) ingressLink() string { return "ing" + strings.TrimPrefix(d.bridge, "skep") }

func (d *Dataplane) meshTable() string { return d.bridge + "_mesh" }

// meshRules returns the rules of the routing mesh, in nft's words:
//
//	table ip skepXXXXXXXX_mesh {
//	  map published { type inet_proto . inet_service : verdict; elements = { tcp . 8080 : jump port_6_8080 } }
//	  set keepers   { type ipv4_addr; elements = { tasks that shall see whom they serve } }
//	  chain prerouting  { type nat hook prerouting priority -100; fib daddr type local meta l4proto . th dport vmap @published }
//	  chain output      { type nat hook output priority -100; the same }
//	  chain postrouting { type nat hook postrouting priority 100
//	    oifname ingXXXXXXXX ct status dnat ip daddr @keepers meta l4proto { tcp, udp } ip saddr != INGRESS ip saddr != LOCAL
//	      fib saddr type != local accept
//	    oifname ingXXXXXXXX ct status dnat masquerade
//	  }
//	  chain forward     { type filter hook forward priority 0; drop new flows to or from ingXXXXXXXX that nobody published }
//	  chain port_6_8080 { dnat to numgen random mod 2 map { 0 : 10.0.0.11, 1 : 10.0.0.12 } : 80 }
//	}
//
// Addresses of this node and its containers repeat on others: the task could not tell them
// from its own.
func (d *Dataplane) meshRules(ports []netplan.Published, keepers []netip.Addr) *ruleset {
	t := &nftables.Table{Family: nftables.TableFamilyIPv4, Name: d.meshTable()}
	published := publishedSet(t)
	keeping := keeperSet(t)
	s := &ruleset{table: t, sets: []*ruleSet{published, keeping}}
	for _, a := range keepers {
		keeping.elements = append(keeping.elements, nftables.SetElement{Key: a.AsSlice()})
	}
	link := d.ingressLink()
	translate := rule{exprs: slices.Concat(toLocal(), []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg0},
		&expr.Payload{DestRegister: reg1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Lookup{SourceRegister: reg0, SetName: "published", IsDestRegSet: true, DestRegister: unix.NFT_REG_VERDICT},
	})}
	s.chains = []*ruleChain{
		{baseChain(t, "prerouting", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest), []rule{translate}},
		{baseChain(t, "output", nftables.ChainTypeNAT, nftables.ChainHookOutput, nftables.ChainPriorityNATDest), []rule{translate}},
		{baseChain(t, "postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource), []rule{
			d.keep(link, unix.IPPROTO_TCP), d.keep(link, unix.IPPROTO_UDP),
			{exprs: slices.Concat(named(expr.MetaKeyOIFNAME, expr.CmpOpEq, link), translated(true), masquerade())},
		}},
		{baseChain(t, "forward", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter), []rule{
			{exprs: slices.Concat(named(expr.MetaKeyOIFNAME, expr.CmpOpEq, link), newFlow(), translated(false), drop())},
			{exprs: slices.Concat(named(expr.MetaKeyIIFNAME, expr.CmpOpEq, link), newFlow(), drop())},
		}},
	}
	for _, p := range ports {
		published.elements = append(published.elements, publishedElement(p))
		s.chains = append(s.chains, publishedChain(t, p))
	}
	return s
}

// keep lets what goes to a task that shall see its client pass as it is.
func (d *Dataplane) keep(link string, proto byte) rule {
	ingress := netip.Prefix{}
	if p, err := netip.ParsePrefix(d.want.Node().GetIngressAddr()); err == nil {
		ingress = p.Masked()
	}
	r := rule{exprs: slices.Concat(named(expr.MetaKeyOIFNAME, expr.CmpOpEq, link), translated(true), protocol(proto),
		[]expr.Any{destination(nftables.TableFamilyIPv4), &expr.Lookup{SourceRegister: reg0, SetName: "keepers"}})}
	for _, p := range []netip.Prefix{ingress, d.state.Address.Masked()} {
		if p.IsValid() {
			r.exprs = append(r.exprs, sourceIn(p, false)...)
		}
	}
	r.exprs = append(r.exprs,
		&expr.Fib{Register: reg0, FlagSADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: reg0, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)},
		&expr.Verdict{Kind: expr.VerdictAccept})
	return r
}

func keeperSet(t *nftables.Table) *ruleSet {
	return &ruleSet{Set: &nftables.Set{Table: t, Name: "keepers", KeyType: nftables.TypeIPAddr}}
}

func drop() []expr.Any {
	return []expr.Any{&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop}}
}

func publishedSet(t *nftables.Table) *ruleSet {
	return &ruleSet{Set: &nftables.Set{
		Table: t, Name: "published", IsMap: true, Concatenation: true, DataType: nftables.TypeVerdict,
		KeyType: nftables.MustConcatSetType(nftables.TypeInetProto, nftables.TypeInetService),
	}}
}

func publishedElement(p netplan.Published) nftables.SetElement {
	return nftables.SetElement{
		Key:         portKey(p.Protocol, p.Published),
		VerdictData: &expr.Verdict{Kind: expr.VerdictJump, Chain: publishedChainName(p)},
	}
}

func publishedChainName(p netplan.Published) string {
	return fmt.Sprintf("port_%d_%d", p.Protocol, p.Published)
}

// publishedChain translates to the backends; without any, the host answers that nothing
// listens there.
func publishedChain(t *nftables.Table, p netplan.Published) *ruleChain {
	ch := &ruleChain{Chain: &nftables.Chain{Name: publishedChainName(p), Table: t}}
	if len(p.Backends) > 0 {
		ch.rules = []rule{toBackend(p.Backends, p.Target)}
	}
	return ch
}

// mesh holds the rules of this node's edge.
type mesh struct {
	ports   map[[2]uint16]netplan.Published // by protocol and port
	keepers map[netip.Addr]bool
	watched
}

// planMesh sets what the rules should be.
func (d *Dataplane) planMesh() {
	d.mesh.ports, d.mesh.keepers = map[[2]uint16]netplan.Published{}, map[netip.Addr]bool{}
	ports, keepers := d.want.Mesh(), d.want.Keepers()
	for _, p := range ports {
		d.mesh.ports[[2]uint16{uint16(p.Protocol), p.Published}] = p
	}
	for _, a := range keepers {
		d.mesh.keepers[a] = true
	}
	d.mesh.rules = d.meshRules(ports, keepers)
}

// updateMesh changes some ports and keepers in one transaction. Callers hold mu.
func (d *Dataplane) updateMesh(changes []netplan.Published, keep []netplan.Keeper) error {
	if len(changes)+len(keep) == 0 || d.mesh.ports == nil {
		return nil
	}
	t := &nftables.Table{Family: nftables.TableFamilyIPv4, Name: d.meshTable()}
	published := publishedSet(t)
	c, err := openNFT(d.hostNS)
	if err != nil {
		return err
	}
	for _, p := range changes {
		key := [2]uint16{uint16(p.Protocol), p.Published}
		_, known := d.mesh.ports[key]
		ch := publishedChain(t, p)
		switch {
		case p.Gone && !known:
			continue
		case p.Gone:
			err = c.SetDeleteElements(published.Set, []nftables.SetElement{publishedElement(p)})
			c.FlushChain(ch.Chain)
			c.DelChain(ch.Chain)
			delete(d.mesh.ports, key)
		case known:
			c.FlushChain(ch.Chain)
		default:
			c.AddChain(ch.Chain)
			err = c.SetAddElements(published.Set, []nftables.SetElement{publishedElement(p)})
		}
		if err != nil {
			return fmt.Errorf("publish port %d: %w", p.Published, err)
		}
		if p.Gone {
			continue
		}
		d.mesh.ports[key] = p
		for _, r := range ch.rules {
			if err := r.add(c, ch.Chain); err != nil {
				return err
			}
		}
	}
	if err := d.changeKeepers(c, t, keep); err != nil {
		return err
	}
	// The rules as a whole are put together when they are next compared.
	d.mesh.gen = 0
	if err := c.Flush(); err != nil { // somebody changed our table: all of it is written anew
		d.planMesh()
		return d.mesh.write(d.hostNS)
	}
	return nil
}

func (d *Dataplane) changeKeepers(c *nftables.Conn, t *nftables.Table, keep []netplan.Keeper) error {
	set := keeperSet(t)
	for _, k := range keep {
		change := c.SetAddElements
		switch known := d.mesh.keepers[k.Addr]; {
		case k.Gone != known:
			continue
		case k.Gone:
			change = c.SetDeleteElements
			delete(d.mesh.keepers, k.Addr)
		default:
			d.mesh.keepers[k.Addr] = true
		}
		if err := change(set.Set, []nftables.SetElement{{Key: k.Addr.AsSlice()}}); err != nil {
			return fmt.Errorf("change who sees clients: %w", err)
		}
	}
	return nil
}

// ensureMesh makes or mends the node's leg into the ingress network and its rules, or
// removes both when there is no such network. Callers hold mu.
func (d *Dataplane) ensureMesh(x *drift) error {
	in := d.want.Ingress()
	addr, err := netip.ParsePrefix(d.want.Node().GetIngressAddr())
	if in == nil || err != nil || in.GetEncrypted() {
		return d.removeMesh(x)
	}
	if d.fabric == nil {
		return nil
	}
	bridge, ok := d.fabric.links[netplan.VNI(in, addr.Addr())]
	if !ok {
		return nil // named already
	}
	if err := d.ensureLeg(bridge.bridge, addr, x); err != nil {
		return err
	}
	if d.mesh.rules == nil || d.mesh.ports == nil {
		d.mesh.gen = 0
	}
	d.planMesh()
	return d.mesh.ensure(d.hostNS, x, "routing mesh")
}

// ensureLeg makes or mends the pair of links between host and ingress network.
func (d *Dataplane) ensureLeg(bridge int, addr netip.Prefix, x *drift) error {
	f, name := d.fabric, d.ingressLink()
	_, _, mtu, err := d.underlay()
	if err != nil {
		return err
	}
	mtu = mtuOf(d.want.Ingress(), mtu)
	outer, err := f.find("ingress")
	if err != nil {
		return err
	}
	mac := netplan.MAC(addr.Addr())
	leg, err := d.host.LinkByName(name)
	if err != nil {
		leg = nil
	}
	if leg != nil && outer != nil && leg.Attrs().HardwareAddr.String() != net.HardwareAddr(mac[:]).String() &&
		x.add(kindLink, "routing mesh: %s has another address than %s", name, addr) {
		if err := d.host.LinkDel(leg); err != nil {
			return fmt.Errorf("remove %s: %w", name, err)
		}
		leg, outer = nil, nil
	}
	if leg == nil || outer == nil {
		if !x.add(kindLink, "routing mesh: link %s is missing", name) {
			return nil
		}
		if leg, outer, err = d.makeLeg(bridge, mtu, mac, leg, outer); err != nil {
			return err
		}
	}
	if outer.Attrs().MasterIndex != bridge && x.add(kindLink, "routing mesh: link is not in its bridge") {
		if err := f.h.LinkSetMasterByIndex(outer, bridge); err != nil {
			return fmt.Errorf("put link into the ingress network: %w", err)
		}
	}
	return d.ensureLegAddress(leg, addr, x)
}

// makeLeg adds the pair of links; one of leg and outer may be left of a former pair.
func (d *Dataplane) makeLeg(bridge, mtu int, mac [6]byte, leg, outer netlink.Link) (netlink.Link, netlink.Link, error) {
	name, f := d.ingressLink(), d.fabric
	var errs []error
	if leg != nil {
		errs = append(errs, d.host.LinkDel(leg))
	}
	if outer != nil {
		errs = append(errs, f.h.LinkDel(outer))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, nil, fmt.Errorf("remove stale link: %w", err)
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.MasterIndex, attrs.Flags = "ingress", mtu, bridge, net.FlagUp
	if err := f.h.LinkAdd(&netlink.Veth{
		LinkAttrs: attrs, PeerName: name, PeerHardwareAddr: mac[:], PeerNamespace: netlink.NsFd(int(d.hostNS)), PeerMTU: uint32(mtu),
	}); err != nil {
		return nil, nil, fmt.Errorf("make %s: %w", name, err)
	}
	leg, err := d.host.LinkByName(name)
	if err != nil {
		return nil, nil, fmt.Errorf("find %s: %w", name, err)
	}
	if outer, err = f.h.LinkByName(attrs.Name); err != nil {
		return nil, nil, fmt.Errorf("find link into the ingress network: %w", err)
	}
	return leg, outer, nil
}

func (d *Dataplane) ensureLegAddress(leg netlink.Link, addr netip.Prefix, x *drift) error {
	name := leg.Attrs().Name
	have, err := d.host.AddrList(leg, netlink.FAMILY_V4)
	if err != nil {
		return fmt.Errorf("list addresses of %s: %w", name, err)
	}
	if !slices.ContainsFunc(have, func(a netlink.Addr) bool { return a.IP.Equal(addr.Addr().AsSlice()) }) &&
		x.add(kindLink, "routing mesh: %s has no address %s", name, addr) {
		if err := d.host.AddrAdd(leg, &netlink.Addr{IPNet: ipNet(addr)}); err != nil {
			return fmt.Errorf("address %s: %w", name, err)
		}
	}
	if leg.Attrs().Flags&net.FlagUp == 0 && x.add(kindLink, "routing mesh: %s is down", name) {
		if err := d.host.LinkSetUp(leg); err != nil {
			return fmt.Errorf("raise %s: %w", name, err)
		}
	}
	if !x.repair {
		return nil
	}
	return within(d.hostNS, func() error {
		// The node's own loopback may ask for published ports.
		return errors.Join(sysctl("net/ipv4/ip_forward", "1"), sysctl("net/ipv4/conf/"+name+"/route_localnet", "1"))
	})
}

// removeMesh removes what ensureMesh made.
func (d *Dataplane) removeMesh(x *drift) error {
	leg, err := d.host.LinkByName(d.ingressLink())
	if err != nil && d.mesh.rules == nil {
		return nil // there is none
	}
	if !x.add(kindLink, "routing mesh: there is no ingress network, but its link or rules") {
		return nil
	}
	var errs []error
	if leg != nil {
		errs = append(errs, d.host.LinkDel(leg))
	}
	errs = append(errs, d.meshRules(nil, nil).remove(d.hostNS))
	d.mesh = mesh{}
	return errors.Join(errs...)
}

// named compares the name of a packet's link.
func named(key expr.MetaKey, op expr.CmpOp, name string) []expr.Any {
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
