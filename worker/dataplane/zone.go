package dataplane

import (
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	mdnetlink "github.com/mdlayher/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// zoneOfOriginal puts a packet that has no connection yet into the conntrack zone whose
// number is in reg0. The zone tells apart only the packets of those who began: the answers
// of all zones share one table, in which the kernel gives two equal ones different ports.
//
// The nftables library does not write the direction, so rules that hold this expression
// are written by addZoneRule.
func zoneOfOriginal() expr.Any {
	return &expr.Ct{Key: expr.CtKeyZONE, Register: reg0, SourceRegister: true}
}

// zones reports whether a rule needs addZoneRule.
func (r rule) zones() bool {
	for _, e := range r.exprs {
		if ct, ok := e.(*expr.Ct); ok && ct.Key == expr.CtKeyZONE {
			return true
		}
	}
	return false
}

// addZoneRule adds a rule in a transaction of its own.
func addZoneRule(ns netns.NsHandle, ch *nftables.Chain, r rule) error {
	fam := byte(ch.Table.Family)
	list := make([]mdnetlink.Attribute, 0, len(r.exprs))
	for _, e := range r.exprs {
		data, err := expr.Marshal(fam, e)
		if ct, ok := e.(*expr.Ct); ok && ct.Key == expr.CtKeyZONE {
			data, err = marshalZone(ct)
		}
		if err != nil {
			return fmt.Errorf("write nftables rule: %w", err)
		}
		list = append(list, mdnetlink.Attribute{Type: unix.NLA_F_NESTED | unix.NFTA_LIST_ELEM, Data: data})
	}
	exprs, err := mdnetlink.MarshalAttributes(list)
	if err != nil {
		return fmt.Errorf("write nftables rule: %w", err)
	}
	body, err := mdnetlink.MarshalAttributes([]mdnetlink.Attribute{
		{Type: unix.NFTA_RULE_TABLE, Data: append([]byte(ch.Table.Name), 0)},
		{Type: unix.NFTA_RULE_CHAIN, Data: append([]byte(ch.Name), 0)},
		{Type: unix.NLA_F_NESTED | unix.NFTA_RULE_EXPRESSIONS, Data: exprs},
		{Type: unix.NFTA_RULE_USERDATA, Data: userdata.Append(nil, userdata.TypeComment, r.tag())},
	})
	if err != nil {
		return fmt.Errorf("write nftables rule: %w", err)
	}
	return sendBatch(ns, mdnetlink.Message{
		Header: mdnetlink.Header{
			Type:  unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_NEWRULE,
			Flags: mdnetlink.Request | mdnetlink.Acknowledge | mdnetlink.Create | mdnetlink.Append,
		},
		Data: append([]byte{fam, unix.NFNETLINK_V0, 0, 0}, body...),
	})
}

func marshalZone(ct *expr.Ct) ([]byte, error) {
	const directionOriginal = 0
	data, err := mdnetlink.MarshalAttributes([]mdnetlink.Attribute{
		{Type: unix.NFTA_CT_KEY, Data: binaryutil.BigEndian.PutUint32(uint32(ct.Key))},
		{Type: unix.NFTA_CT_DIRECTION, Data: []byte{directionOriginal}},
		{Type: unix.NFTA_CT_SREG, Data: binaryutil.BigEndian.PutUint32(ct.Register)},
	})
	if err != nil {
		return nil, err
	}
	return mdnetlink.MarshalAttributes([]mdnetlink.Attribute{
		{Type: unix.NFTA_EXPR_NAME, Data: []byte("ct\x00")},
		{Type: unix.NLA_F_NESTED | unix.NFTA_EXPR_DATA, Data: data},
	})
}

// sendBatch makes one message a transaction.
func sendBatch(ns netns.NsHandle, m mdnetlink.Message) error {
	conn, err := mdnetlink.Dial(unix.NETLINK_NETFILTER, &mdnetlink.Config{NetNS: int(ns)})
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	defer conn.Close() //nolint:errcheck // everything was answered
	mark := func(kind mdnetlink.HeaderType) mdnetlink.Message {
		return mdnetlink.Message{
			Header: mdnetlink.Header{Type: kind, Flags: mdnetlink.Request},
			Data:   []byte{0, unix.NFNETLINK_V0, 0, unix.NFNL_SUBSYS_NFTABLES},
		}
	}
	if _, err := conn.SendMessages([]mdnetlink.Message{mark(unix.NFNL_MSG_BATCH_BEGIN), m, mark(unix.NFNL_MSG_BATCH_END)}); err != nil {
		return fmt.Errorf("write nftables rule: %w", err)
	}
	if _, err := conn.Receive(); err != nil {
		return fmt.Errorf("write nftables rule: %w", err)
	}
	return nil
}
