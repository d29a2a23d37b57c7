package dataplane

import (
	"errors"
	"net/netip"
	"slices"

	skepv1 "github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/netplan"
)

// espKnown is what the kernel has of ESP as far as this process knows: what it had when all was
// compared, and what was done since. With it a change of one node costs the same beside any number
// of others; what somebody else did meanwhile is found by the next comparison.
type espKnown struct {
	local netip.Addr
	nodes map[string]netplan.ESP // by the other node
	// sas and ways name the other node of each.
	sas  map[netplan.SAID]string
	ways map[netip.Addr]string
}

// knowESP returns what the kernel has, nil where that is not all wanted, and of one node each.
func knowESP(local netip.Addr, have, want netplan.ESP) *espKnown {
	if len(want.Clashes) > 0 {
		return nil
	}
	k := &espKnown{local: local, nodes: map[string]netplan.ESP{}, sas: map[netplan.SAID]string{}, ways: map[netip.Addr]string{}}
	for id := range have.SAs {
		sa, wanted := want.SAs[id]
		if !wanted || sa.Src == local && want.Ways[id.Dst].SAID != id {
			return nil // or another node has the same address
		}
		k.did(sa.Node, netplan.ESPOp{Put: true, SA: sa})
	}
	for at, way := range have.Ways {
		if want.Ways[at] != way {
			return nil
		}
		k.did(want.SAs[way.SAID].Node, netplan.ESPOp{Put: true, Way: &way})
	}
	return k
}

// did notes an operation for another node.
func (k *espKnown) did(node string, op netplan.ESPOp) {
	e, known := k.nodes[node]
	if !known {
		e = netplan.NewESP()
		k.nodes[node] = e
	}
	e.Do(op)
	switch {
	case op.Way != nil && op.Put:
		k.ways[op.Way.Dst] = node
	case op.Way != nil:
		delete(k.ways, op.Way.Dst)
	case op.Put:
		k.sas[op.SA.SAID] = node
	default:
		delete(k.sas, op.SA.SAID)
	}
	if len(e.SAs)+len(e.Ways) == 0 {
		delete(k.nodes, node)
	}
}

// plan returns what the kernel shall hold of each of some other nodes; nil where that does not
// follow from them alone: little is known, or one of them and another node shall have the same.
func (k *espKnown) plan(s *netplan.State, local netip.Addr, networks, nodes []string) map[string]netplan.ESP {
	if k == nil || k.local != local {
		return nil
	}
	out, sas, ways := map[string]netplan.ESP{}, 0, 0
	for _, node := range nodes {
		want := s.ESPOf(networks, []string{node})
		out[node] = want
		sas, ways = sas+len(want.SAs), ways+len(want.Ways)
		for id := range want.SAs {
			if has, taken := k.sas[id]; taken && has != node {
				return nil
			}
		}
		for at := range want.Ways {
			if has, taken := k.ways[at]; taken && has != node {
				return nil
			}
		}
		if len(want.Clashes) > 0 {
			return nil
		}
	}
	if all := s.ESPOf(networks, nodes); len(all.SAs) != sas || len(all.Ways) != ways {
		return nil
	}
	return out
}

// updateESP programs what an update said of other nodes in networks that ESP encrypts here. What
// is gone stays unless all is set, for those who still send by it; held is set if something did.
// Callers hold mu.
func (d *Dataplane) updateESP(u *skepv1.NetworkUpdate, all bool) (held bool, err error) {
	if len(u.GetPeers())+len(u.GetRemovedPeers()) == 0 {
		return false, nil
	}
	switched, _ := d.needed()
	networks := byESP(switched)
	nodes := peersOf(u, networks)
	if len(nodes) == 0 {
		return false, nil
	}
	err = d.withXfrm(func(k *xfrm, local netip.Addr) error {
		if wants := d.esp.known.plan(d.want, local, networks, nodes); wants != nil {
			held, err = d.syncNodes(k, nodes, wants, all)
			return err
		}
		have, err := k.observe(d.mine(local))
		if err != nil {
			return err
		}
		held, err = d.syncESP(k, have, local, d.want.ESP(networks), all, &drift{repair: true})
		return err
	})
	return held || err != nil && !all, err
}

// peersOf returns the other nodes that an update says something of in some networks, sorted.
func peersOf(u *skepv1.NetworkUpdate, networks []string) []string {
	var out []string
	for _, p := range u.GetPeers() {
		if slices.Contains(networks, p.GetKey().GetNetworkId()) {
			out = append(out, p.GetKey().GetNodeId())
		}
	}
	for _, k := range u.GetRemovedPeers() {
		if slices.Contains(networks, k.GetNetworkId()) {
			out = append(out, k.GetNodeId())
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// syncNodes does what syncESP does for some other nodes alone, by what is known.
func (d *Dataplane) syncNodes(k *xfrm, nodes []string, wants map[string]netplan.ESP, all bool) (held bool, err error) {
	known, x := d.esp.known, &drift{repair: true}
	var errs []error
	for _, id := range nodes {
		ops := wants[id].Diff(known.nodes[id])
		if !all {
			additions := netplan.Additions(ops)
			held, ops = held || len(additions) < len(ops), additions
		}
		for _, op := range ops {
			done, err := d.doESP(k, op, x)
			if errs = append(errs, err); done {
				known.did(id, op)
			}
		}
	}
	errs = append(errs, d.saveESP())
	if err = errors.Join(errs...); err != nil {
		d.esp.known = nil // the kernel has something else
	}
	return held, err
}
