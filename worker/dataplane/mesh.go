package dataplane

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
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
func (d *Dataplane) meshRules(f nftables.TableFamily, ports []netplan.Published, keepers []netip.Addr) *ruleset {
	t := &nftables.Table{Family: f, Name: d.meshTable()}
	published := publishedSet(t)
	keeping := keeperSet(t)
	s := &ruleset{table: t, sets: []*ruleSet{published, keeping}}
	for _, a := range keepers {
		if family(a) == f {
			keeping.elements = append(keeping.elements, nftables.SetElement{Key: a.AsSlice()})
		}
	}
	link := d.ingressLink()
	translate := rule{exprs: slices.Concat(toLocal(), []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg0},
		&expr.Payload{DestRegister: reg1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Lookup{SourceRegister: reg0, SetName: "published", IsDestRegSet: true, DestRegister: unix.NFT_REG_VERDICT},
	})}
	var sees []rule
	for _, proto := range keptProtocols(f) {
		sees = append(sees, d.keep(f, link, proto))
	}
	s.chains = []*ruleChain{
		{baseChain(t, "prerouting", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest), []rule{translate}},
		{baseChain(t, "output", nftables.ChainTypeNAT, nftables.ChainHookOutput, nftables.ChainPriorityNATDest), []rule{translate}},
		{baseChain(t, "postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource), append(sees,
			rule{exprs: slices.Concat(named(expr.MetaKeyOIFNAME, expr.CmpOpEq, link), translated(true), masquerade())})},
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

// keptProtocols are those of which tasks see their clients. A datagram's answer needs a way
// out before it is marked, which sandboxes have in IPv4 only.
func keptProtocols(f nftables.TableFamily) []byte {
	if f == nftables.TableFamilyIPv6 {
		return []byte{unix.IPPROTO_TCP}
	}
	return []byte{unix.IPPROTO_TCP, unix.IPPROTO_UDP}
}

// keep lets what goes to a task that shall see its client pass as it is.
func (d *Dataplane) keep(f nftables.TableFamily, link string, proto byte) rule {
	addr, local := d.want.Node().GetIngressAddr(), d.state.Address.Masked()
	if f == nftables.TableFamilyIPv6 {
		addr, local = d.want.Node().GetIngressAddr6(), netip.Prefix{}
	}
	ingress := netip.Prefix{}
	if p, err := netip.ParsePrefix(addr); err == nil {
		ingress = p.Masked()
	}
	r := rule{exprs: slices.Concat(named(expr.MetaKeyOIFNAME, expr.CmpOpEq, link), translated(true), protocol(proto),
		[]expr.Any{destination(f), &expr.Lookup{SourceRegister: reg0, SetName: "keepers"}})}
	for _, p := range []netip.Prefix{ingress, local} {
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
	key := nftables.TypeIPAddr
	if t.Family == nftables.TableFamilyIPv6 {
		key = nftables.TypeIP6Addr
	}
	return &ruleSet{Set: &nftables.Set{Table: t, Name: "keepers", KeyType: key}}
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
	backends := p.Backends
	if t.Family == nftables.TableFamilyIPv6 {
		backends = p.Backends6
	}
	if len(backends) > 0 {
		ch.rules = []rule{toBackend(backends, p.Target)}
	}
	return ch
}

// mesh holds the rules of this node's edge.
type mesh struct {
	ports   map[meshPort]netplan.Published // those that are published here; nil without rules
	keepers map[netip.Addr]bool
	held    map[meshPort][]*reservation
	taken   map[meshPort]taker
	refused string  // why there is no mesh on this node; empty if there may be one
	moved   bool    // a port was taken, or given up, since the rules were written
	v4, v6  watched // v6 has no rules unless the ingress network has IPv6
}

// families returns the rulesets of the node's edge.
func (m *mesh) families() []*watched {
	if m.v6.rules == nil {
		return []*watched{&m.v4}
	}
	return []*watched{&m.v4, &m.v6}
}

func (m *mesh) write(ns netns.NsHandle) error {
	var errs []error
	for _, w := range m.families() {
		errs = append(errs, w.write(ns))
	}
	return errors.Join(errs...)
}

func newMesh() mesh {
	return mesh{held: map[meshPort][]*reservation{}, taken: map[meshPort]taker{}}
}

// planMesh sets what the rules should be.
func (d *Dataplane) planMesh() {
	d.mesh.ports, d.mesh.keepers = map[meshPort]netplan.Published{}, map[netip.Addr]bool{}
	ports, keepers := d.open(d.want.Mesh()), d.want.Keepers()
	for _, p := range ports {
		d.mesh.ports[meshPortOf(p)] = p
	}
	for _, a := range keepers {
		d.mesh.keepers[a] = true
	}
	d.mesh.v4.want(d.meshRules(nftables.TableFamilyIPv4, ports, keepers))
	if d.want.Node().GetIngressAddr6() != "" {
		d.mesh.v6.want(d.meshRules(nftables.TableFamilyIPv6, ports, keepers))
	}
}

// updateMesh changes some ports and keepers in one transaction. Callers hold mu.
func (d *Dataplane) updateMesh(changes []netplan.Published, keep []netplan.Keeper) error {
	if len(changes)+len(keep) == 0 || d.mesh.ports == nil {
		return nil
	}
	ports := make([]netplan.Published, 0, len(changes))
	known := map[meshPort]bool{}
	for _, p := range changes {
		at := meshPortOf(p)
		if _, known[at] = d.mesh.ports[at]; p.Gone {
			d.freePort(at)
		} else if !known[at] && !d.holdPort(at) {
			continue
		}
		if !p.Gone || known[at] {
			ports = append(ports, p)
		}
	}
	keep = slices.DeleteFunc(slices.Clone(keep), func(k netplan.Keeper) bool { return k.Gone != d.mesh.keepers[k.Addr] })
	failed := false
	for _, w := range d.mesh.families() {
		// The rules as a whole are put together when they are next compared.
		w.gen = 0
		err := changeMesh(d.hostNS, w.rules.table, ports, known, keep)
		failed = failed || err != nil
	}
	before := maps.Clone(d.mesh.ports)
	for _, p := range ports {
		if d.mesh.ports[meshPortOf(p)] = p; p.Gone {
			delete(d.mesh.ports, meshPortOf(p))
		}
	}
	for _, k := range keep {
		if d.mesh.keepers[k.Addr] = true; k.Gone {
			delete(d.mesh.keepers, k.Addr)
		}
	}
	if failed { // somebody changed our table: all of it is written anew
		d.planMesh()
		if err := d.mesh.write(d.hostNS); err != nil {
			return err
		}
	}
	return forgetUnled(d.hostNS, opened(before, d.mesh.ports))
}

// opened returns the ports of datagrams that lead somewhere now and did not before.
func opened(before, now map[meshPort]netplan.Published) map[uint16]bool {
	out := map[uint16]bool{}
	for at, p := range now {
		was := before[at]
		if at[0] == unix.IPPROTO_UDP && len(was.Backends)+len(was.Backends6) == 0 && len(p.Backends)+len(p.Backends6) > 0 {
			out[at[1]] = true
		}
	}
	return out
}

// changeMesh changes ports, known to the kernel or not, and keepers of one family.
func changeMesh(ns netns.NsHandle, t *nftables.Table, ports []netplan.Published, known map[meshPort]bool, keep []netplan.Keeper) error {
	c, err := openNFT(ns)
	if err != nil {
		return err
	}
	published, keepers := publishedSet(t), keeperSet(t)
	for _, p := range ports {
		ch := publishedChain(t, p)
		switch {
		case p.Gone:
			err = c.SetDeleteElements(published.Set, []nftables.SetElement{publishedElement(p)})
			c.FlushChain(ch.Chain)
			c.DelChain(ch.Chain)
		case known[meshPortOf(p)]:
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
		for _, r := range ch.rules {
			if err := r.add(c, ch.Chain); err != nil {
				return err
			}
		}
	}
	for _, k := range keep {
		if family(k.Addr) != t.Family {
			continue
		}
		change := c.SetAddElements
		if k.Gone {
			change = c.SetDeleteElements
		}
		if err := change(keepers.Set, []nftables.SetElement{{Key: k.Addr.AsSlice()}}); err != nil {
			return fmt.Errorf("change who sees clients: %w", err)
		}
	}
	return c.Flush()
}

// ensureMesh makes or mends the node's leg into the ingress network and its rules, or
// removes both when there is no such network. Callers hold mu.
func (d *Dataplane) ensureMesh(x *drift) error {
	in := d.want.Ingress()
	addr, err := netip.ParsePrefix(d.want.Node().GetIngressAddr())
	if in == nil || err != nil {
		return d.removeMesh(x)
	}
	if refused := d.refuseCrypt(in); refused != nil {
		d.sayNoMesh(refused, x)
		return d.removeMesh(x)
	}
	f := d.fabricOf(in)
	if f == nil {
		return nil
	}
	bridge, ok := f.links[netplan.VNI(in, addr.Addr())]
	if !ok {
		return nil // named already
	}
	d.mesh.refused = ""
	if err := d.ensureLeg(f, bridge.bridge, addr, x); err != nil {
		return err
	}
	if d.mesh.ports == nil {
		d.mesh.v4.gen, d.mesh.v6.gen = 0, 0
	}
	before := d.mesh.ports
	d.planMesh()
	d.sayTaken(x)
	if !x.repair {
		before = d.mesh.ports // nothing is written
	}
	var errs []error
	if d.mesh.moved && x.repair {
		d.mesh.moved = false
		errs = append(errs, d.mesh.write(d.hostNS))
	} else {
		for _, w := range d.mesh.families() {
			errs = append(errs, w.ensure(d.hostNS, x, "routing mesh"))
		}
	}
	return errors.Join(append(errs, forgetUnled(d.hostNS, opened(before, d.mesh.ports)))...)
}

// ensureLeg makes or mends the pair of links between host and ingress network.
func (d *Dataplane) ensureLeg(f *fabric, bridge int, addr netip.Prefix, x *drift) error {
	name := d.ingressLink()
	_, _, mtu, err := d.underlay()
	if err != nil {
		return err
	}
	mtu = insideMTU(d.want.Ingress(), mtu)
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
		if leg, outer, err = d.makeLeg(f, bridge, mtu, mac, leg, outer); err != nil {
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
func (d *Dataplane) makeLeg(f *fabric, bridge, mtu int, mac [6]byte, leg, outer netlink.Link) (netlink.Link, netlink.Link, error) {
	name := d.ingressLink()
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
	wanted := []netip.Prefix{addr}
	six, err := netip.ParsePrefix(d.want.Node().GetIngressAddr6())
	if err == nil {
		wanted = append(wanted, six)
	}
	have, err := dump(func() ([]netlink.Addr, error) { return d.host.AddrList(leg, netlink.FAMILY_ALL) })
	if err != nil {
		return fmt.Errorf("list addresses of %s: %w", name, err)
	}
	for _, want := range wanted {
		if slices.ContainsFunc(have, func(a netlink.Addr) bool { return a.IP.Equal(want.Addr().AsSlice()) }) ||
			!x.add(kindLink, "routing mesh: %s has no address %s", name, want) {
			continue
		}
		flags := 0
		if want.Addr().Is6() {
			flags = unix.IFA_F_NODAD // the swarm gave it to nobody else
			if err := within(d.hostNS, func() error { return sysctl("net/ipv6/conf/"+name+"/disable_ipv6", "0") }); err != nil {
				return err
			}
		}
		if err := d.host.AddrAdd(leg, &netlink.Addr{IPNet: ipNet(want), Flags: flags}); err != nil {
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
		err := errors.Join(sysctl("net/ipv4/ip_forward", "1"), sysctl("net/ipv4/conf/"+name+"/route_localnet", "1"))
		if six.IsValid() {
			err = errors.Join(err, forward6())
		}
		return err
	})
}

// forward6 lets the calling thread's namespace forward IPv6. A host that forwards takes no
// routes from routers' advertisements any more unless each link says so.
func forward6() error {
	const all = "net/ipv6/conf/all/forwarding"
	if data, err := os.ReadFile(filepath.Join("/proc/sys", all)); err != nil || len(data) > 0 && data[0] != '0' {
		return err
	}
	links, err := os.ReadDir("/proc/sys/net/ipv6/conf")
	if err != nil {
		return fmt.Errorf("list links: %w", err)
	}
	for _, l := range links {
		file := "net/ipv6/conf/" + l.Name() + "/accept_ra"
		if data, err := os.ReadFile(filepath.Join("/proc/sys", file)); err != nil || !strings.HasPrefix(string(data), "1") {
			continue
		}
		if err := sysctl(file, "2"); err != nil {
			return err
		}
	}
	return sysctl(all, "1")
}

// sayNoMesh says why this node takes no part in the routing mesh, once in the log, and whenever
// it is asked.
func (d *Dataplane) sayNoMesh(why error, x *drift) {
	text := "routing mesh: no port is published on this node: " + why.Error()
	if d.mesh.refused != text {
		d.cfg.Log.Warn("node takes no part in the routing mesh: its published ports lead nowhere", slog.Any("error", why))
	}
	d.mesh.refused = text
	if !x.repair { // nothing that could be mended
		x.found = append(x.found, text)
	}
}

// removeMesh removes what ensureMesh made.
func (d *Dataplane) removeMesh(x *drift) error {
	leg, err := d.host.LinkByName(d.ingressLink())
	if err != nil && d.mesh.v4.rules == nil {
		return nil // there is none
	}
	if !x.add(kindLink, "routing mesh: there is no ingress network, but its link or rules") {
		return nil
	}
	var errs []error
	if leg != nil {
		errs = append(errs, d.host.LinkDel(leg))
	}
	for _, f := range []nftables.TableFamily{nftables.TableFamilyIPv4, nftables.TableFamilyIPv6} {
		errs = append(errs, d.meshRules(f, nil, nil).remove(d.hostNS))
	}
	d.open(nil)
	refused := d.mesh.refused
	d.mesh = newMesh()
	d.mesh.refused = refused
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
