package dataplane

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netns"

	"github.com/skep-dev/skep/core/netplan"
)

// arrivalsTable is the table in the sandbox of a task in the ingress network, while there are
// Docker Engines in it. What these lead to the task comes to the published port.
const arrivalsTable = "skep_arrivals"

// arrivals are the rules of one sandbox for that.
type arrivals struct {
	watched

	looked bool // whether a former process left some is known
}

// arrivalRules returns them, in nft's words:
//
//	table ip skep_arrivals {
//	  set engines { type ipv4_addr; elements = { 10.0.0.5 } }
//	  chain prerouting { type nat hook prerouting priority -100; iifname ETH ip saddr @engines tcp dport 8080 dnat to OWN:80 }
//	}
//
// Skep's nodes translate the port themselves. Only by where a packet comes from the two can be
// told apart: one port of a service may be published as another's number.
func arrivalRules(eth string, own netip.Addr, engines []netip.Addr, ports []netplan.Published) *ruleset {
	t := &nftables.Table{Family: nftables.TableFamilyIPv4, Name: arrivalsTable}
	set := &ruleSet{Set: &nftables.Set{Table: t, Name: "engines", KeyType: nftables.TypeIPAddr}}
	for _, a := range engines {
		set.elements = append(set.elements, nftables.SetElement{Key: a.AsSlice()})
	}
	ch := &ruleChain{Chain: baseChain(t, "prerouting", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest)}
	for _, p := range ports {
		to := toBackend([]netip.Addr{own}, p.Target)
		to.exprs = slices.Concat(named(expr.MetaKeyIIFNAME, expr.CmpOpEq, eth), []expr.Any{
			&expr.Payload{DestRegister: reg0, Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 4},
			&expr.Lookup{SourceRegister: reg0, SetName: set.Name},
		}, protocol(p.Protocol), destinationPort(p.Published), to.exprs)
		ch.rules = append(ch.rules, to)
	}
	return &ruleset{table: t, sets: []*ruleSet{set}, chains: []*ruleChain{ch}}
}

// ensureArrivals makes or mends the rules of a sandbox in the ingress network, or removes them
// where there is nothing for them to do. Callers hold mu.
func (d *Dataplane) ensureArrivals(ns netns.NsHandle, s *sandbox, x *drift) error {
	for _, o := range s.Overlays {
		if !d.want.Network(o.NetworkID).GetIngress() {
			continue
		}
		engines, ports := d.want.Engines(), d.want.Arrivals(o.Address.Addr())
		rules := arrivalRules(s.interfaceOf(o.NetworkID), o.Address.Addr(), engines, ports)
		if len(engines) > 0 && len(ports) > 0 {
			s.arrivals.want(rules)
			return s.arrivals.ensure(ns, x, fmt.Sprintf("container %.12s, ports that Docker Engines lead to", s.id))
		}
		if !x.repair || s.arrivals.looked && s.arrivals.rules == nil {
			return nil
		}
		s.arrivals = arrivals{looked: true}
		return rules.remove(ns)
	}
	return nil
}

// updateArrivals does so for all sandboxes in the ingress network if an update may matter to
// them. Callers hold mu.
func (d *Dataplane) updateArrivals(p netplan.Plan) error {
	if !p.Engines && (len(p.Publish) == 0 || len(d.want.Engines()) == 0) {
		return nil // where there are no engines, and were none, no sandbox has rules
	}
	ingress := d.want.Ingress().GetId()
	var errs []error
	for _, id := range sortedKeys(d.sandboxes) {
		s := d.sandboxes[id]
		if !slices.Contains(s.networks(), ingress) {
			continue
		}
		ns, err := netns.GetFromPath(d.netns(s.id))
		if err != nil {
			errs = append(errs, fmt.Errorf("open network namespace: %w", err))
			continue
		}
		errs = append(errs, d.ensureArrivals(ns, s, &drift{repair: true}), ns.Close())
	}
	return errors.Join(errs...)
}
