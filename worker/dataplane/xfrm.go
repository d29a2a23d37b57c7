package dataplane

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/netplan"
)

const (
	// espReqID ties policies to associations, espMark is what VXLAN packets carry until they
	// are encrypted. They are not Docker's, since a Docker Engine on the same machine removes
	// all that has those when it starts.
	espReqID = 0x534b4550
	espMark  = 0xe50000

	espCipher = "rfc4106(gcm(aes))"
	espICV    = 64 // bits

	// replayWindow is how late a packet may come, in packets: as much as kernels can remember.
	// Several processors send at once, and the wire may mix what they send.
	replayWindow = 4096

	// Priorities of our policies. Lower ones come first, and those of others are far above.
	priorityEncrypt = 1
	priorityGuard   = 2
)

// counters are the sequence numbers of an association: the last sent, and the last received.
type counters struct{ OSeq, OSeqHi, Seq, SeqHi uint32 }

// xfrm is an open way to the kernel's IPsec in one namespace, for one family of addresses.
type xfrm struct {
	h      *netlink.Handle
	socket *nl.SocketHandle
	v6     bool
}

func openXfrm(ns netns.NsHandle, v6 bool) (*xfrm, error) {
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_XFRM)
	if err != nil {
		return nil, fmt.Errorf("open IPsec: %w", err)
	}
	socket, err := nl.GetNetlinkSocketAt(ns, netns.None(), unix.NETLINK_XFRM)
	if err != nil {
		h.Close()
		return nil, fmt.Errorf("open IPsec: %w", err)
	}
	return &xfrm{h: h, socket: &nl.SocketHandle{Socket: socket}, v6: v6}, nil
}

func (x *xfrm) close() {
	x.h.Close()
	x.socket.Close()
}

func (x *xfrm) family() int {
	if x.v6 {
		return netlink.FAMILY_V6
	}
	return netlink.FAMILY_V4
}

// anywhere is every address of the family.
func (x *xfrm) anywhere() *net.IPNet {
	if x.v6 {
		return ipNet(netip.PrefixFrom(netip.IPv6Unspecified(), 0))
	}
	return ipNet(netip.PrefixFrom(netip.IPv4Unspecified(), 0))
}

func (x *xfrm) request(kind, flags int) *nl.NetlinkRequest {
	req := nl.NewNetlinkRequest(kind, flags)
	req.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_XFRM: x.socket}
	return req
}

func single(a netip.Addr) *net.IPNet { return ipNet(netip.PrefixFrom(a, a.BitLen())) }

// put makes an association that goes on counting from c.
func (x *xfrm) put(sa netplan.SA, c counters) error {
	msg := &nl.XfrmUsersaInfo{Family: uint16(x.family()), Mode: uint8(netlink.XFRM_MODE_TRANSPORT), Reqid: espReqID, Flags: nl.XFRM_STATE_ESN}
	msg.Id.Daddr.FromIP(sa.Dst.AsSlice())
	msg.Id.Proto, msg.Id.Spi = unix.IPPROTO_ESP, nl.Swap32(sa.SPI)
	msg.Saddr.FromIP(sa.Src.AsSlice())
	msg.Lft = nl.XfrmLifetimeCfg{SoftByteLimit: nl.XFRM_INF, HardByteLimit: nl.XFRM_INF, SoftPacketLimit: nl.XFRM_INF, HardPacketLimit: nl.XFRM_INF}
	// Nothing else than VXLAN comes through it, whatever the other node sends.
	msg.Sel = nl.XfrmSelector{
		Family: uint16(x.family()), PrefixlenD: uint8(sa.Dst.BitLen()), PrefixlenS: uint8(sa.Src.BitLen()), Proto: unix.IPPROTO_UDP,
		Dport: nl.Swap16(model.ESPPort), DportMask: ^uint16(0),
	}
	msg.Sel.Daddr, msg.Sel.Saddr = msg.Id.Daddr, msg.Saddr
	req := x.request(nl.XFRM_MSG_NEWSA, unix.NLM_F_CREATE|unix.NLM_F_EXCL|unix.NLM_F_ACK)
	req.AddData(msg)
	cipher := nl.XfrmAlgoAEAD{AlgKeyLen: model.ESPKeySize * 8, AlgICVLen: espICV, AlgKey: sa.Key[:]}
	copy(cipher.AlgName[:], espCipher)
	req.AddData(nl.NewRtAttr(nl.XFRMA_ALG_AEAD, cipher.Serialize()))
	req.AddData(nl.NewRtAttr(nl.XFRMA_REPLAY_ESN_VAL, c.encode()))
	if _, err := req.Execute(unix.NETLINK_XFRM, 0); err != nil {
		return fmt.Errorf("make ESP association %#08x from %s to %s: %w", sa.SPI, sa.Src, sa.Dst, err)
	}
	return nil
}

// encode writes the counters as the kernel wants them. What was received before them counts as
// received already.
func (c counters) encode() []byte {
	const words = replayWindow / 32
	out := (&nl.XfrmReplayStateEsn{BmpLen: words, OSeq: c.OSeq, OSeqHi: c.OSeqHi, Seq: c.Seq, SeqHi: c.SeqHi, ReplayWindow: replayWindow}).Serialize()
	bitmap := make([]byte, words*4)
	if c.Seq != 0 || c.SeqHi != 0 {
		for i := range bitmap {
			bitmap[i] = 0xff
		}
	}
	return append(append([]byte(nil), out...), bitmap...)
}

func decodeCounters(b []byte) counters {
	if len(b) < nl.SizeofXfrmReplayStateEsn {
		return counters{}
	}
	word := func(i int) uint32 { return nl.NativeEndian().Uint32(b[4*i:]) }
	return counters{OSeq: word(1), Seq: word(2), OSeqHi: word(3), SeqHi: word(4)}
}

// look returns an association as it is, and how far it has counted; unix.ESRCH if it is not there.
func (x *xfrm) look(id netplan.SAID) (netplan.SA, counters, error) {
	msg := &nl.XfrmUsersaId{Spi: nl.Swap32(id.SPI), Family: uint16(x.family()), Proto: unix.IPPROTO_ESP}
	msg.Daddr.FromIP(id.Dst.AsSlice())
	req := x.request(nl.XFRM_MSG_GETSA, 0)
	req.AddData(msg)
	messages, err := req.Execute(unix.NETLINK_XFRM, nl.XFRM_MSG_NEWSA)
	if err == nil && len(messages) == 0 {
		err = unix.ESRCH
	}
	if err != nil {
		return netplan.SA{}, counters{}, fmt.Errorf("look at ESP association %#08x to %s: %w", id.SPI, id.Dst, err)
	}
	sa, c, _ := readSA(messages[0])
	return sa, c, nil
}

// remove deletes an association; one that is not there is no error.
func (x *xfrm) remove(sa netplan.SA) error {
	err := x.h.XfrmStateDel(&netlink.XfrmState{Src: sa.Src.AsSlice(), Dst: sa.Dst.AsSlice(), Proto: netlink.XFRM_PROTO_ESP, Spi: int(sa.SPI)})
	if err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("remove ESP association %#08x to %s: %w", sa.SPI, sa.Dst, err)
	}
	return nil
}

// way is the policy that encrypts what carries the mark. There is one for each other node.
func (x *xfrm) way(w netplan.ESPWay) *netlink.XfrmPolicy {
	return &netlink.XfrmPolicy{
		Src: single(w.Src), Dst: single(w.Dst), Proto: unix.IPPROTO_UDP, DstPort: model.ESPPort, Dir: netlink.XFRM_DIR_OUT, Priority: priorityEncrypt,
		Mark: &netlink.XfrmMark{Value: espMark, Mask: ^uint32(0)},
		Tmpls: []netlink.XfrmPolicyTmpl{{
			Src: w.Src.AsSlice(), Dst: w.Dst.AsSlice(), Proto: netlink.XFRM_PROTO_ESP, Mode: netlink.XFRM_MODE_TRANSPORT, Spi: int(w.SPI), Reqid: espReqID,
		}},
	}
}

func (x *xfrm) putWay(w netplan.ESPWay) error {
	if err := x.h.XfrmPolicyUpdate(x.way(w)); err != nil {
		return fmt.Errorf("encrypt to %s: %w", w.Dst, err)
	}
	return nil
}

func (x *xfrm) removeWay(w netplan.ESPWay) error {
	if err := x.h.XfrmPolicyDel(x.way(w)); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("stop encrypting to %s: %w", w.Dst, err)
	}
	return nil
}

// guards are the policies that let nothing out to the port that is not encrypted, and nothing in
// that was not.
func (x *xfrm) guards() []*netlink.XfrmPolicy {
	zero := x.anywhere().IP
	block := &netlink.XfrmPolicy{
		Src: x.anywhere(), Dst: x.anywhere(), Proto: unix.IPPROTO_UDP, DstPort: model.ESPPort, Dir: netlink.XFRM_DIR_OUT,
		Priority: priorityGuard, Action: netlink.XFRM_POLICY_BLOCK,
	}
	require := &netlink.XfrmPolicy{
		Src: x.anywhere(), Dst: x.anywhere(), Proto: unix.IPPROTO_UDP, DstPort: model.ESPPort, Dir: netlink.XFRM_DIR_IN, Priority: priorityGuard,
		Tmpls: []netlink.XfrmPolicyTmpl{{Src: zero, Dst: zero, Proto: netlink.XFRM_PROTO_ESP, Mode: netlink.XFRM_MODE_TRANSPORT, Reqid: espReqID}},
	}
	return []*netlink.XfrmPolicy{block, require}
}

// observed is what the kernel has of ours.
type observed struct {
	netplan.ESP

	// guards says which of xfrm.guards are there.
	guards []bool
	// others is set if associations or ways like ours are of a node with another address.
	others bool
}

// observe returns what the kernel has of ours, of a node with some addresses.
func (x *xfrm) observe(mine map[netip.Addr]bool) (observed, error) {
	out := observed{ESP: netplan.NewESP()}
	messages, err := dump(func() ([][]byte, error) {
		return x.request(nl.XFRM_MSG_GETSA, unix.NLM_F_DUMP).Execute(unix.NETLINK_XFRM, nl.XFRM_MSG_NEWSA)
	})
	if err != nil {
		return out, fmt.Errorf("list ESP associations: %w", err)
	}
	for _, m := range messages {
		sa, _, ours := readSA(m)
		switch {
		case !ours || sa.Dst.Is6() != x.v6:
		case mine[sa.Src] || mine[sa.Dst]:
			out.SAs[sa.SAID] = sa
		default:
			out.others = true
		}
	}
	policies, err := dump(func() ([]netlink.XfrmPolicy, error) { return x.h.XfrmPolicyList(x.family()) })
	if err != nil {
		return out, fmt.Errorf("list IPsec policies: %w", err)
	}
	guards := x.guards()
	out.guards = make([]bool, len(guards))
	for _, p := range policies {
		for i, g := range guards {
			out.guards[i] = out.guards[i] || sameGuard(&p, g)
		}
		if p.Mark == nil || p.Mark.Value != espMark || p.Dir != netlink.XFRM_DIR_OUT || len(p.Tmpls) != 1 || p.Tmpls[0].Reqid != espReqID {
			continue
		}
		w := netplan.ESPWay{Src: addrOf(p.Src.IP), SAID: netplan.SAID{Dst: addrOf(p.Dst.IP), SPI: uint32(p.Tmpls[0].Spi)}}
		if mine[w.Src] {
			out.Ways[w.Dst] = w
		} else {
			out.others = true
		}
	}
	return out, nil
}

func sameGuard(have, want *netlink.XfrmPolicy) bool {
	if have.Dir != want.Dir || have.Action != want.Action || have.Priority != want.Priority || have.Proto != want.Proto || have.Mark != nil ||
		have.DstPort != want.DstPort || have.SrcPort != 0 || have.Dst.String() != want.Dst.String() || have.Src.String() != want.Src.String() {
		return false
	}
	if len(have.Tmpls) != len(want.Tmpls) {
		return false
	}
	for i, t := range have.Tmpls {
		w := want.Tmpls[i]
		if t.Proto != w.Proto || t.Mode != w.Mode || t.Reqid != w.Reqid || t.Spi != w.Spi || t.Optional != 0 {
			return false
		}
	}
	return true
}

func addrOf(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}

// readSA reads an association as the kernel tells it, and whether it is one of ours.
func readSA(m []byte) (netplan.SA, counters, bool) {
	var sa netplan.SA
	var c counters
	if len(m) < nl.SizeofXfrmUsersaInfo {
		return sa, c, false
	}
	msg := nl.DeserializeXfrmUsersaInfo(m)
	if msg.Reqid != espReqID || msg.Id.Proto != unix.IPPROTO_ESP || msg.Mode != uint8(netlink.XFRM_MODE_TRANSPORT) {
		return sa, c, false
	}
	sa.SPI, sa.Dst, sa.Src = nl.Swap32(msg.Id.Spi), familyAddr(msg.Id.Daddr, msg.Family), familyAddr(msg.Saddr, msg.Family)
	attrs, err := nl.ParseRouteAttr(m[nl.SizeofXfrmUsersaInfo:])
	if err != nil {
		return sa, c, false
	}
	const head = nl.SizeofXfrmAlgoAEAD
	for _, a := range attrs {
		switch {
		case a.Attr.Type == nl.XFRMA_ALG_AEAD && len(a.Value) >= head+model.ESPKeySize:
			sa.Key = netplan.ESPKey(a.Value[head : head+model.ESPKeySize])
		case a.Attr.Type == nl.XFRMA_REPLAY_ESN_VAL:
			c = decodeCounters(a.Value)
		}
	}
	return sa, c, true
}

func familyAddr(a nl.XfrmAddress, family uint16) netip.Addr {
	if family == netlink.FAMILY_V6 {
		return netip.AddrFrom16(a)
	}
	return netip.AddrFrom4([4]byte(a[:4]))
}
