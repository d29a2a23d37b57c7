package dataplane

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	skepv1 "github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/netplan"
)

// esp is what a node that encrypts by ESP has beside the switch. A network encrypted so is a
// VXLAN like others, on a port of its own; the host's IPsec encrypts its packets, by an
// association for each direction between two nodes.
//
// Three locks keep what is clear out and in. VXLAN packets carry a mark from the switch to the
// host's choice of a route, which nothing else can: only with it are packets to the port
// encrypted, all others are blocked. What arrives at the port must have come by an association
// of ours. And rules of the host close what policies do not see: packets of the host to itself,
// and sockets of those who may set marks; and what is sent while somebody has removed policies.
type esp struct {
	memory *espMemory
	known  *espKnown // nil when all must be compared
	rules  watched   // the host's table
	// present is false once nothing of ours is in the kernel.
	present bool
	clashes []string // that were logged
}

// metaKeySecpath loads whether a packet came by IPsec, rtKeyXfrm whether it is about to go by it;
// the nftables library does not know them.
const (
	metaKeySecpath expr.MetaKey = 25
	rtKeyXfrm      expr.RtKey   = 4
)

// espLink begins the names of VXLAN devices that ESP encrypts.
const espLink = "es"

func (d *Dataplane) canESP() bool { return slices.Contains(d.encryption, model.ESP) }

// probeESP makes all that ESP needs in a namespace of its own.
func (d *Dataplane) probeESP() error {
	families := []netip.Addr{netip.MustParseAddr("192.0.2.1")}
	if kernelHasIPv6() {
		families = append(families, netip.MustParseAddr("2001:db8::1"))
	}
	return tryWithin(filepath.Join(d.cfg.ExecDir, ".probe-esp"), func(ns netns.NsHandle) error {
		errs := []error{espMarks().write(ns)}
		for _, a := range families {
			errs = append(errs, probeFamily(ns, a), d.espRules(a).write(ns))
		}
		return errors.Join(errs...)
	})
}

func probeFamily(ns netns.NsHandle, a netip.Addr) error {
	x, err := openXfrm(ns, a.Is6())
	if err != nil {
		return err
	}
	defer x.close()
	sa := netplan.SA{SAID: netplan.SAID{Dst: a.Next(), SPI: 0x1000}, Src: a, Key: netplan.ESPKey{1}}
	errs := []error{x.put(sa, counters{}), x.putWay(netplan.ESPWay{Src: a, SAID: sa.SAID})}
	for _, g := range x.guards() {
		errs = append(errs, x.h.XfrmPolicyUpdate(g))
	}
	return errors.Join(errs...)
}

// espMarks are the rules of the switch, in nft's words:
//
//	table bridge skep_esp {
//	  chain forward { type filter hook forward priority 0; oifname "es*" meta mark set 0xe50000 }
//	}
func espMarks() *ruleset {
	t := &nftables.Table{Family: nftables.TableFamilyBridge, Name: "skep_esp"}
	mark := []expr.Any{
		&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: reg0},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg0, Data: []byte(espLink)},
		&expr.Immediate{Register: reg0, Data: binaryutil.NativeEndian.PutUint32(espMark)},
		&expr.Meta{Key: expr.MetaKeyMARK, Register: reg0, SourceRegister: true},
	}
	return &ruleset{table: t, chains: []*ruleChain{
		{baseChain(t, "forward", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter), []rule{{exprs: mark}}},
	}}
}

// espRules are those of the host, for the family of its address, in nft's words:
//
//	table ip skepXXXXXXXX_esp {
//	  chain input  { type filter hook input priority -300; udp dport 21819 meta secpath missing drop }
//	  chain output {
//	    type filter hook output priority -300
//	    udp dport 21819 rt ipsec missing drop
//	    udp dport 21819 meta mark 0xe50000 drop
//	  }
//	}
//
// A packet gets to the output before it is encrypted, with its route, which says whether it will
// be: without policies it would not. What the switch marks has lost its mark there: only who
// marks packets himself is caught by that.
func (d *Dataplane) espRules(local netip.Addr) *ruleset {
	t := &nftables.Table{Family: family(local), Name: d.bridge + "_esp"}
	toPort := slices.Concat(protocol(17), destinationPort(model.ESPPort))
	bare := slices.Concat(toPort, []expr.Any{
		&expr.Meta{Key: metaKeySecpath, Register: reg0}, &expr.Cmp{Op: expr.CmpOpEq, Register: reg0, Data: []byte{0}},
	}, drop())
	unsealed := slices.Concat(toPort, []expr.Any{
		&expr.Rt{Register: reg0, Key: rtKeyXfrm}, &expr.Cmp{Op: expr.CmpOpEq, Register: reg0, Data: []byte{0}},
	}, drop())
	marked := slices.Concat(toPort, []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: reg0}, &expr.Cmp{Op: expr.CmpOpEq, Register: reg0, Data: binaryutil.NativeEndian.PutUint32(espMark)},
	}, drop())
	return &ruleset{table: t, chains: []*ruleChain{
		{baseChain(t, "input", nftables.ChainTypeFilter, nftables.ChainHookInput, nftables.ChainPriorityRaw), []rule{{exprs: bare}}},
		{baseChain(t, "output", nftables.ChainTypeFilter, nftables.ChainHookOutput, nftables.ChainPriorityRaw), []rule{{exprs: unsealed}, {exprs: marked}}},
	}}
}

// espMTU returns the MTU inside VXLAN that ESP encrypts, where that inside VXLAN is known: ESP
// adds 24 bytes, and fills what it encrypts with two bytes of its own up to a multiple of four.
func espMTU(inside int) int {
	const headers = 30 // UDP, VXLAN and Ethernet, which are encrypted
	return (inside+headers-24)&^3 - headers - 2
}

// refuseESP says why this node does not serve a network encrypted by ESP, nil if it does.
func (d *Dataplane) refuseESP(n *skepv1.OverlayNetwork) error {
	switch {
	case !d.canESP():
		return model.Errorf(model.Unimplemented, "network %s is encrypted by %s, which this node cannot do", n.GetName(), model.ESP)
	case d.want.Node().GetVxlanPort() == model.ESPPort:
		return model.Errorf(model.Unimplemented, "network %s is encrypted by %s, whose UDP port %d is that of this swarm's other overlays", n.GetName(), model.ESP, model.ESPPort)
	}
	return nil
}

// byESP returns the ids of those of some networks that are encrypted by ESP.
func byESP(networks []*skepv1.OverlayNetwork) []string {
	var out []string
	for _, n := range networks {
		if netplan.ByESP(n) {
			out = append(out, n.GetId())
		}
	}
	return out
}

// withXfrm calls f with the host's IPsec, for the family of this node's address.
func (d *Dataplane) withXfrm(f func(x *xfrm, local netip.Addr) error) error {
	local, err := netip.ParseAddr(d.want.Node().GetDataAddr())
	if err != nil {
		if local = d.esp.memory.Local; !local.IsValid() {
			return nil // there was never anything to encrypt
		}
	}
	x, err := openXfrm(d.hostNS, local.Is6())
	if err != nil {
		return err
	}
	defer x.close()
	return f(x, local)
}

// mine are the addresses that this node's associations begin or end at.
func (d *Dataplane) mine(local netip.Addr) map[netip.Addr]bool {
	out := map[netip.Addr]bool{local: true}
	if d.esp.memory.Local.IsValid() {
		out[d.esp.memory.Local] = true // it had another address before
	}
	return out
}

// ensureESP makes or mends what encrypts and guards the networks given, which are all that ESP
// encrypts here. It comes before their devices. Callers hold mu.
func (d *Dataplane) ensureESP(networks []string, x *drift) error {
	if len(networks) == 0 {
		return nil
	}
	d.esp.present = true
	f, err := d.openSwitch()
	if err != nil {
		return err
	}
	return d.withXfrm(func(k *xfrm, local netip.Addr) error {
		if err := d.leaveFamily(local, x); err != nil {
			return err
		}
		have, err := k.observe(d.mine(local))
		if err != nil {
			return err
		}
		for i, g := range k.guards() {
			if have.guards[i] || !x.add(kindRules, "ESP: the policy %s that guards UDP port %d is missing", g.Dir, model.ESPPort) {
				continue
			}
			if err := k.h.XfrmPolicyUpdate(g); err != nil {
				return fmt.Errorf("guard UDP port %d: %w", model.ESPPort, err)
			}
		}
		f.marks.want(espMarks())
		d.esp.rules.want(d.espRules(local))
		if err := errors.Join(f.marks.ensure(f.ns, x, "ESP, switch"), d.esp.rules.ensure(d.hostNS, x, "ESP, host")); err != nil {
			return err
		}
		_, err = d.syncESP(k, have, local, d.want.ESP(networks), true, x)
		return err
	})
}

// syncESP makes associations and ways those wanted; without all it holds removals back.
func (d *Dataplane) syncESP(k *xfrm, have observed, local netip.Addr, want netplan.ESP, all bool, x *drift) (held bool, err error) {
	for _, text := range want.Clashes {
		x.say(kindForward, "ESP: %s, until keys are changed: skep net rotate-keys", text)
		if !slices.Contains(d.esp.clashes, text) {
			d.cfg.Log.Warn("two nodes cannot be told apart until keys are changed: skep net rotate-keys", slog.String("clash", text))
		}
	}
	d.esp.clashes = want.Clashes
	m := d.esp.memory
	if x.repair && m.Local != local { // else what is of another address is still to be removed
		m.Local, m.anew = local, true
	}
	ops := want.Diff(have.ESP)
	if !all {
		additions := netplan.Additions(ops)
		held, ops = len(additions) < len(ops), additions
	}
	var errs []error
	var did []netplan.ESPOp
	for _, op := range ops {
		done, err := d.doESP(k, op, x)
		if errs = append(errs, err); done {
			did = append(did, op)
		}
	}
	m.told(want.SAs, have.SAs)
	m.forget(want.SAs, have.SAs)
	if !x.repair {
		return held, errors.Join(errs...)
	}
	for _, op := range did {
		have.Do(op)
	}
	d.esp.known = nil
	if err = errors.Join(append(errs, d.saveESP())...); err == nil {
		d.esp.known = knowESP(local, have.ESP, want)
	}
	return held, err
}

// doESP carries out one operation, if x allows, and reports whether it is done.
func (d *Dataplane) doESP(k *xfrm, op netplan.ESPOp, x *drift) (done bool, err error) {
	switch {
	case op.Way != nil && op.Put:
		if !x.add(kindForward, "ESP: packets to %s are not encrypted as they should be", op.Way.Dst) {
			return false, nil
		}
		err = k.putWay(*op.Way)
	case op.Way != nil:
		if !x.add(kindForward, "ESP: packets to %s are encrypted without reason", op.Way.Dst) {
			return false, nil
		}
		err = k.removeWay(*op.Way)
	case op.Put:
		return d.putSA(k, op.SA, x)
	default:
		if !x.add(kindForward, "ESP: association %#08x from %s to %s is there without reason", op.SA.SPI, op.SA.Src, op.SA.Dst) {
			return false, nil
		}
		err = d.removeSA(k, op.SA)
	}
	return err == nil, err
}

// putSA makes an association, which goes on counting from where it was.
func (d *Dataplane) putSA(k *xfrm, sa netplan.SA, x *drift) (done bool, err error) {
	const missing = "ESP: association %#08x from %s to %s is missing or another"
	if !x.repair {
		x.say(kindForward, missing, sa.SPI, sa.Src, sa.Dst)
		return false, nil
	}
	c, usable := d.esp.memory.counters(sa)
	if !usable {
		// With the same key packets would be sent again under numbers that were used: it waits
		// for managers, whom the node asks for other keys.
		return false, nil
	}
	x.add(kindForward, missing, sa.SPI, sa.Src, sa.Dst)
	if err := k.put(sa, c); err != nil {
		return false, err
	}
	d.esp.memory.made(sa)
	return true, nil
}

// removeSA removes an association and remembers how far it had counted.
func (d *Dataplane) removeSA(k *xfrm, sa netplan.SA) error {
	is, c, err := k.look(sa.SAID)
	switch {
	case errors.Is(err, unix.ESRCH): // somebody was faster
		d.esp.memory.vanished(saidText(sa.SAID))
		return nil
	case err != nil:
		return err
	}
	if err := k.remove(sa); err != nil {
		return err
	}
	is.Generation = sa.Generation
	d.esp.memory.removed(is, c)
	return nil
}

// tidyESP removes all that ESP has here once no network needs it. Their devices are gone by
// then. Callers hold mu.
func (d *Dataplane) tidyESP(x *drift) error {
	if !d.esp.present || !d.canESP() {
		return nil
	}
	if switched, _ := d.needed(); len(byESP(switched)) > 0 {
		return nil
	}
	return d.withXfrm(func(k *xfrm, local netip.Addr) error {
		if err := d.leaveFamily(local, x); err != nil {
			return err
		}
		errs := []error{d.removeESP(k, local, x)}
		if x.repair {
			if d.fabric != nil {
				errs = append(errs, espMarks().remove(d.fabric.ns))
				d.fabric.marks = watched{}
			}
			d.esp.rules = watched{}
			d.esp.present = errors.Join(errs...) != nil
		}
		return errors.Join(errs...)
	})
}

// removeESP removes what the host's kernel has of ESP for the family of an address of this node.
func (d *Dataplane) removeESP(k *xfrm, local netip.Addr, x *drift) error {
	have, err := k.observe(d.mine(local))
	if err != nil {
		return err
	}
	_, err = d.syncESP(k, have, local, netplan.ESP{}, true, x)
	errs := []error{err}
	for i, g := range k.guards() {
		// Another daemon of this host may need them.
		if have.guards[i] && !have.others && x.add(kindRules, "ESP: the policy %s guards UDP port %d without reason", g.Dir, model.ESPPort) {
			errs = append(errs, k.h.XfrmPolicyDel(g))
		}
	}
	if x.repair {
		errs = append(errs, d.espRules(local).remove(d.hostNS))
	}
	return errors.Join(errs...)
}

// leaveFamily removes what is of this node's former address, if that was of the other family.
func (d *Dataplane) leaveFamily(local netip.Addr, x *drift) error {
	was := d.esp.memory.Local
	if !was.IsValid() || was.Is6() == local.Is6() {
		return nil
	}
	k, err := openXfrm(d.hostNS, was.Is6())
	if err != nil {
		return err
	}
	defer k.close()
	return d.removeESP(k, was, x)
}

// fingerprint names a key without telling it.
func fingerprint(k netplan.ESPKey) string {
	sum := sha256.Sum256(k[:])
	return hex.EncodeToString(sum[:16])
}

// newEpoch makes the random number from which the node's keys follow.
func newEpoch() (string, error) {
	var b [16]byte
	if _, err := rand.Read(b[:]); err != nil {
		return "", fmt.Errorf("make epoch: %w", err)
	}
	return hex.EncodeToString(b[:]), nil
}

// bootID names this run of the kernel; empty if the kernel does not tell.
func bootID() string {
	data, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(data))
}
