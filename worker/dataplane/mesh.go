package dataplane

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/core/netplan"
)

func (d *Dataplane) meshTable() string { return d.bridge + "_mesh" }

// portsTable is the table in the mesh's namespace.
const portsTable = "skep_ports"

// hostRules returns the rules that lead published ports from the host to the mesh, in nft's
// words:
//
//	table ip skepXXXXXXXX_mesh {
//	  set published { type inet_proto . inet_service; elements = { tcp . 8080 } }
//	  chain prerouting  { type nat hook prerouting priority -100; fib daddr type local meta l4proto . th dport @published dnat to MESH }
//	  chain output      { type nat hook output priority -100; the same }
//	  chain postrouting { type nat hook postrouting priority 100
//	    oifname ingXXXXXXXX ip saddr INGRESS masquerade
//	    oifname ingXXXXXXXX fib saddr type local masquerade
//	  }
//	  chain forward     { type filter hook forward priority 0; drop new flows to ingXXXXXXXX that nobody published, and all but answers from there }
//	}
//
// A LAN may have the ingress network's addresses: the mesh could not tell such a client from
// a task, so it sees the host instead.
func (d *Dataplane) hostRules(f nftables.TableFamily, ports []netplan.Published) *ruleset {
	t := &nftables.Table{Family: f, Name: d.meshTable()}
	published := openSet(t)
	for _, p := range ports {
		published.elements = append(published.elements, openElement(p))
	}
	link := d.ingressLink()
	_, inner := d.hops()
	to := inner.of(f)
	if !to.IsValid() {
		to = netip.IPv4Unspecified() // it is removed, or only looked at
	}
	lead := toBackend([]netip.Addr{to}, 0)
	lead.exprs = slices.Concat(toLocal(), []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg0},
		&expr.Payload{DestRegister: reg1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Lookup{SourceRegister: reg0, SetName: published.Name},
	}, lead.exprs)
	var hidden []rule
	if p := d.ingressPrefix(f); p.IsValid() {
		hidden = append(hidden, rule{exprs: slices.Concat(named(expr.MetaKeyOIFNAME, expr.CmpOpEq, link), sourceIn(p, true), masquerade())})
	}
	hidden = append(hidden, rule{exprs: slices.Concat(named(expr.MetaKeyOIFNAME, expr.CmpOpEq, link), []expr.Any{
		&expr.Fib{Register: reg0, FlagSADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg0, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)},
	}, masquerade())})
	return &ruleset{table: t, sets: []*ruleSet{published}, chains: []*ruleChain{
		{baseChain(t, "prerouting", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest), []rule{lead}},
		{baseChain(t, "output", nftables.ChainTypeNAT, nftables.ChainHookOutput, nftables.ChainPriorityNATDest), []rule{lead}},
		{baseChain(t, "postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource), hidden},
		{baseChain(t, "forward", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter), onlyPublished(link)},
	}}
}

// onlyPublished drops what nobody published and would go to a link, and what comes from there
// without being an answer: untranslated, it would tell addresses that nobody knows.
func onlyPublished(link string) []rule {
	return []rule{
		{exprs: slices.Concat(named(expr.MetaKeyOIFNAME, expr.CmpOpEq, link), newFlow(), translated(false), drop())},
		{exprs: slices.Concat(named(expr.MetaKeyIIFNAME, expr.CmpOpEq, link), inState(expr.CtStateBitNEW|expr.CtStateBitINVALID), drop())},
	}
}

// meshRules returns the rules of the mesh's namespace, in nft's words:
//
//	table ip skep_ports {
//	  map published { type inet_proto . inet_service : verdict; elements = { tcp . 8080 : jump port_6_8080 } }
//	  set keepers   { type ipv4_addr; elements = { tasks that shall see whom they serve } }
//	  chain prerouting  { type nat hook prerouting priority -100; iifname host meta l4proto . th dport vmap @published }
//	  chain postrouting { type nat hook postrouting priority 100
//	    oifname ingress ct status dnat ip daddr @keepers meta l4proto { tcp, udp } ip saddr != LOCAL accept
//	    oifname ingress ct status dnat masquerade
//	  }
//	  chain forward     { type filter hook forward priority 0; the same for ingress }
//	  chain port_6_8080 { dnat to numgen random mod 2 map { 0 : 10.0.0.11, 1 : 10.0.0.12 } : 80 }
//	}
//
// LOCAL is the local network, from whose addresses come the node itself and its containers:
// they repeat on other nodes, and the task could not tell them from its own.
func (d *Dataplane) meshRules(f nftables.TableFamily, ports []netplan.Published, keepers []netip.Addr) *ruleset {
	t := &nftables.Table{Family: f, Name: portsTable}
	published := publishedSet(t)
	keeping := keeperSet(t)
	s := &ruleset{table: t, sets: []*ruleSet{published, keeping}}
	for _, a := range keepers {
		if family(a) == f {
			keeping.elements = append(keeping.elements, nftables.SetElement{Key: a.AsSlice()})
		}
	}
	translate := rule{exprs: slices.Concat(named(expr.MetaKeyIIFNAME, expr.CmpOpEq, toHost), []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg0},
		&expr.Payload{DestRegister: reg1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Lookup{SourceRegister: reg0, SetName: published.Name, IsDestRegSet: true, DestRegister: unix.NFT_REG_VERDICT},
	})}
	var sees []rule
	for _, proto := range keptProtocols(f) {
		sees = append(sees, d.keep(f, proto))
	}
	s.chains = []*ruleChain{
		{baseChain(t, "prerouting", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest), []rule{translate}},
		{baseChain(t, "postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource), append(sees,
			rule{exprs: slices.Concat(named(expr.MetaKeyOIFNAME, expr.CmpOpEq, toIngress), translated(true), masquerade())})},
		{baseChain(t, "forward", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter), onlyPublished(toIngress)},
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
func (d *Dataplane) keep(f nftables.TableFamily, proto byte) rule {
	host, _ := d.hops()
	local := d.state.Address.Masked()
	if f == nftables.TableFamilyIPv6 {
		local = netip.PrefixFrom(host.v6, 64).Masked()
	}
	return rule{exprs: slices.Concat(named(expr.MetaKeyOIFNAME, expr.CmpOpEq, toIngress), translated(true), protocol(proto),
		[]expr.Any{destination(f), &expr.Lookup{SourceRegister: reg0, SetName: "keepers"}}, sourceIn(local, false),
		[]expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}})}
}

// ingressPrefix returns the ingress network's subnet of a family, zero without one.
func (d *Dataplane) ingressPrefix(f nftables.TableFamily) netip.Prefix {
	addr := d.want.Node().GetIngressAddr()
	if f == nftables.TableFamilyIPv6 {
		addr = d.want.Node().GetIngressAddr6()
	}
	p, err := netip.ParsePrefix(addr)
	if err != nil {
		return netip.Prefix{}
	}
	return p.Masked()
}

func keeperSet(t *nftables.Table) *ruleSet {
	key := nftables.TypeIPAddr
	if t.Family == nftables.TableFamilyIPv6 {
		key = nftables.TypeIP6Addr
	}
	return &ruleSet{Set: &nftables.Set{Table: t, Name: "keepers", KeyType: key}}
}

// openSet is the host's set of published ports.
func openSet(t *nftables.Table) *ruleSet {
	return &ruleSet{Set: &nftables.Set{
		Table: t, Name: "published", Concatenation: true, KeyType: nftables.MustConcatSetType(nftables.TypeInetProto, nftables.TypeInetService),
	}}
}

func openElement(p netplan.Published) nftables.SetElement {
	return nftables.SetElement{Key: portKey(p.Protocol, p.Published)}
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

// mesh holds this node's edge.
type mesh struct {
	space   *fabric                        // its namespace; nil until it is open
	ports   map[meshPort]netplan.Published // those that are published here; nil without rules
	keepers map[netip.Addr]bool
	held    map[meshPort][]*reservation
	taken   map[meshPort]taker
	refused string     // why there is no mesh on this node; empty if there may be one
	moved   bool       // a port was taken, or given up, since the rules were written
	former  bool       // the host had another link, whose connections are to find their way anew
	v4, v6  meshTables // v6 has no rules unless the ingress network has IPv6
}

// meshTables are the two tables of one family: the host's leads to the mesh's.
type meshTables struct{ host, inner watched }

// families returns the tables of the node's edge.
func (m *mesh) families() []*meshTables {
	if m.v6.host.rules == nil {
		return []*meshTables{&m.v4}
	}
	return []*meshTables{&m.v4, &m.v6}
}

// all returns every table, planned or not.
func (m *mesh) all() []*watched {
	return []*watched{&m.v4.inner, &m.v6.inner, &m.v4.host, &m.v6.host}
}

func (m *mesh) write(host netns.NsHandle) error {
	var errs []error
	for _, w := range m.families() {
		errs = append(errs, w.inner.write(m.space.ns), w.host.write(host))
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
	want := func(w *meshTables, f nftables.TableFamily) {
		w.host.want(d.hostRules(f, ports))
		w.inner.want(d.meshRules(f, ports, keepers))
	}
	want(&d.mesh.v4, nftables.TableFamilyIPv4)
	if d.want.Node().GetIngressAddr6() != "" {
		want(&d.mesh.v6, nftables.TableFamilyIPv6)
	}
}

// updateMesh changes some ports and keepers: in one transaction of the mesh's table, and in
// one of the host's if a port comes or goes. Callers hold mu.
func (d *Dataplane) updateMesh(changes []netplan.Published, keep []netplan.Keeper) error {
	if len(changes)+len(keep) == 0 || d.mesh.ports == nil {
		return nil
	}
	ports := make([]netplan.Published, 0, len(changes))
	known := map[meshPort]bool{}
	moved := false
	for _, p := range changes {
		at := meshPortOf(p)
		if _, known[at] = d.mesh.ports[at]; p.Gone {
			d.freePort(at)
		} else if !known[at] && !d.holdPort(at) {
			continue
		}
		if !p.Gone || known[at] {
			ports = append(ports, p)
			moved = moved || p.Gone || !known[at]
		}
	}
	keep = slices.DeleteFunc(slices.Clone(keep), func(k netplan.Keeper) bool { return k.Gone != d.mesh.keepers[k.Addr] })
	failed := false
	for _, w := range d.mesh.families() {
		// The rules as a whole are put together when they are next compared.
		w.inner.gen = 0
		err := changeMesh(d.mesh.space.ns, w.inner.rules.table, ports, known, keep)
		if err == nil && moved {
			w.host.gen = 0
			err = changeOpen(d.hostNS, w.host.rules.table, ports, known)
		}
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
	return d.redirect(before)
}

// redirect lets datagrams that come from one port again and again find the way that ports
// lead by now; before is how they led.
func (d *Dataplane) redirect(before map[meshPort]netplan.Published) error {
	published := func(netplan.Published) bool { return true }
	_, inner := d.hops()
	return errors.Join(
		forgetUnled(d.mesh.space.ns, datagrams(before, d.mesh.ports, func(p netplan.Published) bool { return len(p.Backends)+len(p.Backends6) > 0 })),
		forgetUnled(d.hostNS, datagrams(before, d.mesh.ports, published)),
		forgetLed(d.hostNS, datagrams(d.mesh.ports, before, published), inner))
}

// forgetFormer forgets the connections over a link that was the leg into the ingress network
// itself, as older versions had it: with the rules of now they find their way anew.
func (d *Dataplane) forgetFormer() error {
	p := d.ingressPrefix(nftables.TableFamilyIPv4)
	if !d.mesh.former || !p.IsValid() {
		return nil
	}
	d.mesh.former = false
	return forget(d.hostNS, through(p))
}

// datagrams returns the ports of datagrams that are so in now and were not before.
func datagrams(before, now map[meshPort]netplan.Published, so func(netplan.Published) bool) map[uint16]bool {
	out := map[uint16]bool{}
	for at, p := range now {
		if was, ok := before[at]; at[0] == unix.IPPROTO_UDP && so(p) && (!ok || !so(was)) {
			out[at[1]] = true
		}
	}
	return out
}

// changeOpen changes the host's set of published ports.
func changeOpen(ns netns.NsHandle, t *nftables.Table, ports []netplan.Published, known map[meshPort]bool) error {
	var come, gone []nftables.SetElement
	for _, p := range ports {
		switch {
		case p.Gone:
			gone = append(gone, openElement(p))
		case !known[meshPortOf(p)]:
			come = append(come, openElement(p))
		}
	}
	c, err := openNFT(ns)
	if err != nil {
		return err
	}
	set := openSet(t).Set
	for more := range slices.Chunk(come, maxElements) {
		err = errors.Join(err, c.SetAddElements(set, more))
	}
	for less := range slices.Chunk(gone, maxElements) {
		err = errors.Join(err, c.SetDeleteElements(set, less))
	}
	if err != nil {
		return fmt.Errorf("lead published ports: %w", err)
	}
	return c.Flush()
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

// ensureMesh makes or mends the mesh's namespace, links and rules, or removes all when there
// is no ingress network. Callers hold mu.
func (d *Dataplane) ensureMesh(x *drift) error {
	in := d.want.Ingress()
	addr, err := netip.ParsePrefix(d.want.Node().GetIngressAddr())
	if in == nil || err != nil {
		return d.removeMesh(x)
	}
	if refused := d.refuseMesh(in); refused != nil {
		d.sayNoMesh(refused, x)
		return d.removeMesh(x)
	}
	f := d.fabricOf(in)
	if f == nil {
		return nil
	}
	segment, ok := f.links[netplan.VNI(in, addr.Addr())]
	if !ok {
		return nil // named already
	}
	d.mesh.refused = ""
	m, err := d.openMesh(x)
	if err != nil || m == nil {
		return err
	}
	if err := d.ensureMeshLinks(m, f, segment.bridge, addr, x); err != nil {
		return err
	}
	if d.mesh.ports == nil {
		for _, w := range d.mesh.all() {
			w.gen = 0
		}
	}
	before := d.mesh.ports
	d.planMesh()
	d.sayTaken(x)
	var errs []error
	if six := d.mesh.v6; six.host.rules != nil && d.want.Node().GetIngressAddr6() == "" &&
		x.add(kindRules, "routing mesh: there are rules for IPv6, which the ingress network has not") {
		errs = append(errs, six.inner.rules.remove(m.ns), six.host.rules.remove(d.hostNS))
		d.mesh.v6 = meshTables{}
	}
	if d.mesh.moved && x.repair {
		d.mesh.moved = false
		errs = append(errs, d.mesh.write(d.hostNS))
	} else {
		for _, w := range d.mesh.families() {
			errs = append(errs, w.inner.ensure(m.ns, x, "routing mesh"), w.host.ensure(d.hostNS, x, "routing mesh on the host"))
		}
	}
	if x.repair { // else nothing was written
		errs = append(errs, d.redirect(before), d.forgetFormer())
	}
	return errors.Join(errs...)
}

// sayNoMesh says why this node takes no part in the routing mesh, once in the log, and whenever
// it is asked.
func (d *Dataplane) sayNoMesh(why error, x *drift) {
	if d.mesh.refused != why.Error() {
		d.cfg.Log.Warn("node takes no part in the routing mesh: its published ports lead nowhere", slog.Any("error", why))
	}
	d.mesh.refused = why.Error()
	x.say(kindLink, "routing mesh: no port is published on this node: %v", why)
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
