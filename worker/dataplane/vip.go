package dataplane

import (
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/core/netplan"
)

// vipTable is the table in every sandbox that turns service addresses into backends.
const vipTable = "skep_vip"

// resolverAddr is where containers ask for names.
var resolverAddr = netip.AddrFrom4([4]byte{127, 0, 0, 11}) //nolint:gochecknoglobals // a constant in all but syntax

// vipRules returns the rules of one sandbox and family, in nft's words:
//
//	table ip skep_vip {
//	  set vips { type ipv4_addr; elements = { every service address } }
//	  map services { type ipv4_addr : verdict; elements = { 10.0.1.100 : jump svc_0a000164 } }
//	  chain output {
//	    type nat hook output priority -100
//	    ip daddr 127.0.0.11 udp dport 53 dnat to 127.0.0.11:PORT  # and tcp
//	    ip daddr vmap @services
//	  }
//	  chain guard {
//	    type filter hook output priority 0
//	    ip daddr @vips meta l4proto tcp reject with tcp reset
//	    ip daddr @vips meta l4proto sctp reject with icmp prot-unreachable
//	    ip daddr @vips reject with icmp port-unreachable
//	  }
//	  chain svc_0a000164 { dnat to numgen random mod 2 map { 0 : 10.0.1.3, 1 : 10.0.1.4 } }
//	}
//
// The guard sees addresses after translation: only those of services without backends.
func vipRules(f nftables.TableFamily, balances []netplan.Balance, dns dnsPorts) *ruleset {
	t := &nftables.Table{Family: f, Name: vipTable}
	vips, services := vipSets(t)
	s := &ruleset{table: t, sets: []*ruleSet{vips, services}}
	output := &ruleChain{Chain: baseChain(t, "output", nftables.ChainTypeNAT, nftables.ChainHookOutput, nftables.ChainPriorityNATDest)}
	if f == nftables.TableFamilyIPv4 && dns.udp != 0 {
		resolver := resolverAddr.As4()
		for proto, port := range map[byte]uint16{unix.IPPROTO_UDP: dns.udp, unix.IPPROTO_TCP: dns.tcp} {
			to := toBackend([]netip.Addr{resolverAddr}, port)
			to.exprs = slices.Concat([]expr.Any{destination(f), &expr.Cmp{Op: expr.CmpOpEq, Register: reg0, Data: resolver[:]}},
				protocol(proto), destinationPort(53), to.exprs)
			output.rules = append(output.rules, to)
		}
		// Ranging over a map has no order; rules are compared in order.
		slices.SortFunc(output.rules, func(a, b rule) int { return slices.Compare(a.tag(), b.tag()) })
	}
	output.rules = append(output.rules, rule{exprs: []expr.Any{
		destination(f), &expr.Lookup{SourceRegister: reg0, SetName: "services", IsDestRegSet: true, DestRegister: unix.NFT_REG_VERDICT},
	}})
	guard := &ruleChain{Chain: baseChain(t, "guard", nftables.ChainTypeFilter, nftables.ChainHookOutput, nftables.ChainPriorityFilter)}
	forVIP := []expr.Any{destination(f), &expr.Lookup{SourceRegister: reg0, SetName: "vips"}}
	unreachable := &expr.Reject{Type: unix.NFT_REJECT_ICMP_UNREACH, Code: 3}
	if f == nftables.TableFamilyIPv6 {
		unreachable.Code = 4
	}
	guard.rules = []rule{
		{exprs: slices.Concat(forVIP, protocol(unix.IPPROTO_TCP), []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}})},
	}
	if f == nftables.TableFamilyIPv4 { // SCTP gives up at once only where its protocol is unreachable
		guard.rules = append(guard.rules, rule{exprs: slices.Concat(forVIP, protocol(unix.IPPROTO_SCTP),
			[]expr.Any{&expr.Reject{Type: unix.NFT_REJECT_ICMP_UNREACH, Code: 2}})})
	}
	guard.rules = append(guard.rules, rule{exprs: slices.Concat(forVIP, []expr.Any{unreachable})})
	s.chains = append(s.chains, output, guard)
	for _, b := range balances {
		if family(b.VIP) != f {
			continue
		}
		vips.elements = append(vips.elements, vipElement(b.VIP))
		services.elements = append(services.elements, serviceElement(b.VIP))
		s.chains = append(s.chains, serviceChain(t, b))
	}
	return s
}

func vipSets(t *nftables.Table) (vips, services *ruleSet) {
	key := nftables.TypeIPAddr
	if t.Family == nftables.TableFamilyIPv6 {
		key = nftables.TypeIP6Addr
	}
	return &ruleSet{Set: &nftables.Set{Table: t, Name: "vips", KeyType: key}},
		&ruleSet{Set: &nftables.Set{Table: t, Name: "services", IsMap: true, KeyType: key, DataType: nftables.TypeVerdict}}
}

func vipElement(vip netip.Addr) nftables.SetElement {
	return nftables.SetElement{Key: vip.AsSlice()}
}

func serviceElement(vip netip.Addr) nftables.SetElement {
	return nftables.SetElement{Key: vip.AsSlice(), VerdictData: &expr.Verdict{Kind: expr.VerdictJump, Chain: chainOf(vip)}}
}

func chainOf(vip netip.Addr) string { return "svc_" + hex.EncodeToString(vip.AsSlice()) }

func serviceChain(t *nftables.Table, b netplan.Balance) *ruleChain {
	ch := &ruleChain{Chain: &nftables.Chain{Name: chainOf(b.VIP), Table: t}}
	if len(b.Backends) > 0 {
		ch.rules = []rule{toBackend(b.Backends, 0)}
	}
	return ch
}

// balancer holds the service rules of one sandbox.
type balancer struct {
	dns dnsPorts
	// by service address
	balances map[netip.Addr]netplan.Balance
	v4, v6   watched
}

// families returns the rulesets that the sandbox needs; IPv6 only with an address of it.
func (b *balancer) families() []*watched {
	if b.v6.rules == nil {
		return []*watched{&b.v4}
	}
	return []*watched{&b.v4, &b.v6}
}

// plan sets what the rules should be.
func (b *balancer) plan(balances []netplan.Balance, dns dnsPorts) {
	b.balances, b.dns = map[netip.Addr]netplan.Balance{}, dns
	for _, v := range balances {
		b.balances[v.VIP] = v
	}
	b.compile()
}

func (b *balancer) compile() {
	var list []netplan.Balance
	six := b.v6.rules != nil
	for _, v := range b.balances {
		list = append(list, v)
		six = six || v.VIP.Is6()
	}
	slices.SortFunc(list, func(x, y netplan.Balance) int { return x.VIP.Compare(y.VIP) })
	b.v4.want(vipRules(nftables.TableFamilyIPv4, list, b.dns))
	if six {
		b.v6.want(vipRules(nftables.TableFamilyIPv6, list, b.dns))
	}
}

// update changes some services in one transaction a family. When the kernel's rules are
// not what they were thought to be, all are written anew.
func (b *balancer) update(ns netns.NsHandle, changes []netplan.Balance) error {
	if b.balances == nil {
		return nil // not attached yet; the attachment will look
	}
	fresh := false
	for _, f := range []nftables.TableFamily{nftables.TableFamilyIPv4, nftables.TableFamilyIPv6} {
		t := &nftables.Table{Family: f, Name: vipTable}
		c, err := openNFT(ns)
		if err != nil {
			return err
		}
		some := false
		for _, v := range changes {
			if family(v.VIP) != f {
				continue
			}
			some = true
			if err := b.change(c, t, v); err != nil {
				return err
			}
		}
		if !some {
			continue
		}
		fresh = fresh || f == nftables.TableFamilyIPv6 && b.v6.rules == nil
		if fresh {
			continue
		}
		if err := c.Flush(); err != nil {
			fresh = true
		}
	}
	for _, v := range changes {
		if v.Gone {
			delete(b.balances, v.VIP)
		} else {
			b.balances[v.VIP] = v
		}
	}
	// The rules as a whole are put together when they are next compared.
	if !fresh {
		return nil
	}
	b.compile()
	var errs []error
	for _, w := range b.families() {
		errs = append(errs, w.write(ns))
	}
	return errors.Join(errs...)
}

// change adds to a transaction what makes one service right.
func (b *balancer) change(c *nftables.Conn, t *nftables.Table, v netplan.Balance) error {
	vips, services := vipSets(t)
	_, known := b.balances[v.VIP]
	ch := serviceChain(t, v)
	switch {
	case v.Gone && !known:
		return nil
	case v.Gone:
		if err := errors.Join(c.SetDeleteElements(services.Set, []nftables.SetElement{serviceElement(v.VIP)}),
			c.SetDeleteElements(vips.Set, []nftables.SetElement{vipElement(v.VIP)})); err != nil {
			return fmt.Errorf("remove service %s: %w", v.VIP, err)
		}
		c.FlushChain(ch.Chain)
		c.DelChain(ch.Chain)
		return nil
	case known:
		c.FlushChain(ch.Chain)
	default:
		c.AddChain(ch.Chain)
		if err := errors.Join(c.SetAddElements(services.Set, []nftables.SetElement{serviceElement(v.VIP)}),
			c.SetAddElements(vips.Set, []nftables.SetElement{vipElement(v.VIP)})); err != nil {
			return fmt.Errorf("add service %s: %w", v.VIP, err)
		}
	}
	for _, r := range ch.rules {
		if err := r.add(c, ch.Chain); err != nil {
			return err
		}
	}
	return nil
}

// ensure compares the sandbox's rules with the plan.
func (b *balancer) ensure(ns netns.NsHandle, x *drift, what string) error {
	var errs []error
	for _, w := range b.families() {
		errs = append(errs, w.ensure(ns, x, what))
	}
	return errors.Join(errs...)
}
