package dataplane

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	mdnetlink "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Registers of 32 bits: components of a concatenation stand in successive ones.
const (
	reg0 = unix.NFT_REG32_00
	reg1 = unix.NFT_REG32_01
	reg2 = unix.NFT_REG32_02
	reg4 = unix.NFT_REG32_04
)

// maxElements bounds the elements in one message: an attribute holds 64 KiB.
const maxElements = 500

// ruleset is one table of ours as it should be. Every rule carries a digest of itself as
// its comment, by which it is recognized.
type ruleset struct {
	table  *nftables.Table
	sets   []*ruleSet
	chains []*ruleChain
}

type ruleSet struct {
	*nftables.Set

	elements []nftables.SetElement
}

type ruleChain struct {
	*nftables.Chain

	rules []rule
}

// rule is a list of expressions; a Lookup without a name in it refers to choices, which
// becomes an anonymous map.
type rule struct {
	exprs   []expr.Any
	choices []nftables.SetElement
}

// tag is the digest of a rule.
func (r rule) tag() []byte {
	h := sha256.New()
	enc := json.NewEncoder(h)
	for _, e := range r.exprs {
		_, _ = fmt.Fprintf(h, "%T", e) // a hash never fails
		_ = enc.Encode(e)
	}
	for _, c := range r.choices {
		h.Write(c.Key)
		h.Write(c.Val)
	}
	return append([]byte(hex.EncodeToString(h.Sum(nil)[:8])), 0)
}

// openNFT returns a connection that acts in a namespace.
func openNFT(ns netns.NsHandle) (*nftables.Conn, error) {
	c, err := nftables.New(nftables.WithNetNSFd(int(ns)), nftables.WithSockOptions(func(conn *mdnetlink.Conn) error {
		// A transaction is one message: thousands of elements must fit.
		return errors.Join(conn.SetWriteBuffer(8<<20), conn.SetReadBuffer(8<<20))
	}))
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	return c, nil
}

// add puts the rule at the end of a chain.
func (r rule) add(c *nftables.Conn, ch *nftables.Chain) error {
	exprs := r.exprs
	if r.choices != nil {
		data := nftables.TypeIPAddr
		if len(r.choices[0].Val) == 16 {
			data = nftables.TypeIP6Addr
		}
		anonymous := &nftables.Set{
			Table: ch.Table, Anonymous: true, Constant: true, IsMap: true, KeyType: nftables.TypeInteger, DataType: data,
		}
		// Elements given here would be all that the map can hold.
		if err := c.AddSet(anonymous, nil); err != nil {
			return fmt.Errorf("make map: %w", err)
		}
		open := *anonymous
		open.Anonymous = false // until a rule refers to it, elements may come
		for more := range slices.Chunk(r.choices, maxElements) {
			if err := c.SetAddElements(&open, more); err != nil {
				return fmt.Errorf("fill map: %w", err)
			}
		}
		exprs = slices.Clone(exprs)
		for i, e := range exprs {
			if l, ok := e.(*expr.Lookup); ok && l.SetName == "" {
				named := *l
				named.SetName, named.SetID = anonymous.Name, anonymous.ID
				exprs[i] = &named
			}
		}
	}
	c.AddRule(&nftables.Rule{Table: ch.Table, Chain: ch, Exprs: exprs, UserData: userdata.Append(nil, userdata.TypeComment, r.tag())})
	return nil
}

// write replaces the table by the ruleset in one transaction.
func (s *ruleset) write(ns netns.NsHandle) error {
	c, err := openNFT(ns)
	if err != nil {
		return err
	}
	c.AddTable(s.table)
	c.DelTable(s.table)
	c.AddTable(s.table)
	for _, set := range s.sets {
		n := min(len(set.elements), maxElements)
		first := set.elements[:n]
		// Verdicts name chains, which come later.
		if set.DataType == nftables.TypeVerdict {
			n, first = 0, nil
		}
		if err := c.AddSet(set.Set, first); err != nil {
			return fmt.Errorf("make nftables set %s: %w", set.Name, err)
		}
		if set.DataType == nftables.TypeVerdict {
			continue
		}
		for more := range slices.Chunk(set.elements[n:], maxElements) {
			if err := c.SetAddElements(set.Set, more); err != nil {
				return fmt.Errorf("fill nftables set %s: %w", set.Name, err)
			}
		}
	}
	for _, ch := range s.chains {
		c.AddChain(ch.Chain)
	}
	for _, set := range s.sets {
		for more := range slices.Chunk(set.elements, maxElements) {
			if set.DataType != nftables.TypeVerdict {
				break
			}
			if err := c.SetAddElements(set.Set, more); err != nil {
				return fmt.Errorf("fill nftables map %s: %w", set.Name, err)
			}
		}
	}
	for _, ch := range s.chains {
		for _, r := range ch.rules {
			if r.zones() {
				continue
			}
			if err := r.add(c, ch.Chain); err != nil {
				return err
			}
		}
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("make nftables table %s: %w", s.table.Name, err)
	}
	for _, ch := range s.chains {
		for _, r := range ch.rules {
			if !r.zones() {
				continue
			}
			if err := addZoneRule(ns, ch.Chain, r); err != nil {
				return err
			}
		}
	}
	return nil
}

// differs compares the kernel's table with the ruleset and says what is not as it should
// be; empty when all is.
func (s *ruleset) differs(ns netns.NsHandle) (string, error) {
	c, err := openNFT(ns)
	if err != nil {
		return "", err
	}
	tables, err := c.ListTablesOfFamily(s.table.Family)
	if err != nil {
		return "", fmt.Errorf("list nftables: %w", err)
	}
	if !slices.ContainsFunc(tables, func(t *nftables.Table) bool { return t.Name == s.table.Name }) {
		return "table " + s.table.Name + " is missing", nil
	}
	chains, err := c.ListChainsOfTableFamily(s.table.Family)
	if err != nil {
		return "", fmt.Errorf("list nftables chains: %w", err)
	}
	chains = slices.DeleteFunc(chains, func(ch *nftables.Chain) bool { return ch.Table.Name != s.table.Name })
	if len(chains) != len(s.chains) {
		return fmt.Sprintf("table %s has %d chains instead of %d", s.table.Name, len(chains), len(s.chains)), nil
	}
	tags, err := ruleTags(ns, s.table)
	if err != nil {
		return "", err
	}
	for _, want := range s.chains {
		at := slices.IndexFunc(chains, func(ch *nftables.Chain) bool { return ch.Name == want.Name })
		if at < 0 || !sameHook(chains[at], want.Chain) {
			return fmt.Sprintf("chain %s of table %s is missing or another", want.Name, s.table.Name), nil
		}
		if !slices.EqualFunc(tags[want.Name], want.rules, func(have []byte, want rule) bool { return bytes.Equal(have, want.tag()) }) {
			return fmt.Sprintf("rules of chain %s of table %s differ", want.Name, s.table.Name), nil
		}
	}
	for _, want := range s.sets {
		have, err := c.GetSetElements(want.Set)
		if errors.Is(err, unix.ENOENT) {
			return fmt.Sprintf("set %s of table %s is missing", want.Name, s.table.Name), nil
		}
		if err != nil {
			return "", fmt.Errorf("list nftables set: %w", err)
		}
		if !sameElements(have, want.elements) {
			return fmt.Sprintf("elements of %s of table %s differ", want.Name, s.table.Name), nil
		}
	}
	return "", nil
}

// ruleTags returns the tags of a table's rules, in order, by chain. A rule of somebody else
// has none.
func ruleTags(ns netns.NsHandle, t *nftables.Table) (map[string][][]byte, error) {
	conn, err := mdnetlink.Dial(unix.NETLINK_NETFILTER, &mdnetlink.Config{NetNS: int(ns)})
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	defer conn.Close() //nolint:errcheck // everything was answered
	table, err := mdnetlink.MarshalAttributes([]mdnetlink.Attribute{{Type: unix.NFTA_RULE_TABLE, Data: append([]byte(t.Name), 0)}})
	if err != nil {
		return nil, fmt.Errorf("list nftables rules: %w", err)
	}
	replies, err := conn.Execute(mdnetlink.Message{
		Header: mdnetlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETRULE, Flags: mdnetlink.Request | mdnetlink.Dump},
		Data:   append([]byte{byte(t.Family), unix.NFNETLINK_V0, 0, 0}, table...),
	})
	if err != nil {
		return nil, fmt.Errorf("list nftables rules: %w", err)
	}
	out := map[string][][]byte{}
	for _, m := range replies {
		attrs, err := mdnetlink.UnmarshalAttributes(m.Data[min(4, len(m.Data)):])
		if err != nil {
			return nil, fmt.Errorf("read nftables rules: %w", err)
		}
		var chain string
		var tag []byte
		for _, a := range attrs {
			switch a.Type {
			case unix.NFTA_RULE_CHAIN:
				chain = strings.TrimRight(string(a.Data), "\x00")
			case unix.NFTA_RULE_USERDATA:
				tag = userdata.Get(a.Data, userdata.TypeComment)
			}
		}
		out[chain] = append(out[chain], tag)
	}
	return out, nil
}

func sameHook(a, b *nftables.Chain) bool {
	if (a.Hooknum == nil) != (b.Hooknum == nil) {
		return false
	}
	return a.Hooknum == nil || *a.Hooknum == *b.Hooknum && *a.Priority == *b.Priority && a.Type == b.Type
}

func sameElements(a, b []nftables.SetElement) bool {
	verdict := len(b) > 0 && b[0].VerdictData != nil
	key := func(e nftables.SetElement) string {
		to := string(e.Val)
		switch {
		case e.VerdictData != nil:
			to = e.VerdictData.Chain
		case verdict && len(to) > 12: // as read: two attributes, the second of which names the chain
			to = strings.TrimRight(to[12:], "\x00")
		}
		return string(e.Key) + "\x00" + to
	}
	had := map[string]bool{}
	for _, e := range a {
		had[key(e)] = true
	}
	for _, e := range b {
		if !had[key(e)] {
			return false
		}
	}
	return len(a) == len(b)
}

// remove deletes the table, if it is there.
func (s *ruleset) remove(ns netns.NsHandle) error {
	c, err := openNFT(ns)
	if err != nil {
		return err
	}
	c.DelTable(s.table)
	if err := c.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove nftables rules: %w", err)
	}
	return nil
}

// generation returns the number of the last change to any rule of the calling thread's
// namespace: while it stays, nobody has changed anything.
func generation() (uint32, error) {
	req := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETGEN, 0)
	req.AddRawData(make([]byte, 4)) // nfgenmsg
	replies, err := req.Execute(unix.NETLINK_NETFILTER, 0)
	if err != nil {
		return 0, fmt.Errorf("ask for nftables generation: %w", err)
	}
	for _, r := range replies {
		attrs, err := nl.ParseRouteAttr(r[min(4, len(r)):])
		if err != nil {
			return 0, fmt.Errorf("read nftables generation: %w", err)
		}
		for _, a := range attrs {
			if a.Attr.Type == unix.NFTA_GEN_ID && len(a.Value) == 4 {
				return binary.BigEndian.Uint32(a.Value), nil
			}
		}
	}
	return 0, errors.New("read nftables generation: the kernel named none")
}

// watched is a ruleset with the generation after it was last written or found right.
type watched struct {
	rules *ruleset
	gen   uint32 // zero: not known
}

// want sets the ruleset. Other rules than before are compared with the kernel's although
// nobody has touched those.
func (w *watched) want(r *ruleset) {
	if !reflect.DeepEqual(w.rules, r) {
		w.gen = 0
	}
	w.rules = r
}

// ensure makes the kernel match the ruleset in ns unless it does; Callers name it in what.
func (w *watched) ensure(ns netns.NsHandle, x *drift, what string) error {
	var gen uint32
	if err := within(ns, func() (err error) { gen, err = generation(); return err }); err != nil {
		return err
	}
	if w.gen != 0 && w.gen == gen {
		return nil
	}
	diff, err := w.rules.differs(ns)
	if err != nil {
		return err
	}
	if diff != "" && x.add(kindRules, "%s: %s", what, diff) {
		return w.write(ns)
	}
	if diff == "" {
		w.gen = gen
	}
	return nil
}

// write writes the ruleset. Another's change at the same time is not mistaken for ours:
// the next check compares.
func (w *watched) write(ns netns.NsHandle) error {
	w.gen = 0
	return w.rules.write(ns)
}

// Expressions.

func family(a netip.Addr) nftables.TableFamily {
	if a.Is4() {
		return nftables.TableFamilyIPv4
	}
	return nftables.TableFamilyIPv6
}

// destination loads the destination address of a packet.
func destination(f nftables.TableFamily) *expr.Payload {
	p := &expr.Payload{DestRegister: reg0, Base: expr.PayloadBaseNetworkHeader, Offset: 16, Len: 4}
	if f == nftables.TableFamilyIPv6 {
		p.Offset, p.Len = 24, 16
	}
	return p
}

func protocol(p byte) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg0}, &expr.Cmp{Op: expr.CmpOpEq, Register: reg0, Data: []byte{p}}}
}

func destinationPort(port uint16) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: reg0, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg0, Data: binary.BigEndian.AppendUint16(nil, port)},
	}
}

// toBackend returns the rule that sends a flow to one of backends by chance, at a port
// unless that is zero.
func toBackend(backends []netip.Addr, port uint16) rule {
	var r rule
	f := family(backends[0])
	if len(backends) == 1 {
		r.exprs = append(r.exprs, &expr.Immediate{Register: reg0, Data: backends[0].AsSlice()})
	} else {
		r.exprs = append(r.exprs,
			&expr.Numgen{Register: reg0, Modulus: uint32(len(backends)), Type: unix.NFT_NG_RANDOM},
			&expr.Lookup{SourceRegister: reg0, DestRegister: reg0, IsDestRegSet: true})
		for i, b := range backends {
			r.choices = append(r.choices, nftables.SetElement{Key: binaryutil.NativeEndian.PutUint32(uint32(i)), Val: b.AsSlice()})
		}
	}
	nat := &expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(f), RegAddrMin: reg0}
	if port != 0 {
		r.exprs = append(r.exprs, &expr.Immediate{Register: reg4, Data: binary.BigEndian.AppendUint16(nil, port)})
		nat.RegProtoMin, nat.Specified = reg4, true
	}
	r.exprs = append(r.exprs, nat)
	return r
}

// toLocal matches what is for an address of this machine.
func toLocal() []expr.Any {
	return []expr.Any{
		&expr.Fib{Register: reg0, FlagDADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg0, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)},
	}
}

func baseChain(t *nftables.Table, name string, kind nftables.ChainType, hook *nftables.ChainHook, priority *nftables.ChainPriority) *nftables.Chain {
	accept := nftables.ChainPolicyAccept
	return &nftables.Chain{Name: name, Table: t, Type: kind, Hooknum: hook, Priority: priority, Policy: &accept}
}
