package netdb

import (
	"encoding/hex"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/skep-dev/skep/api/networkdb"
)

func begin() time.Time { return time.Date(2026, 11, 27, 12, 0, 0, 0, time.UTC) }

// examples are the bytes that docs/format/gossip.md shows.
func examples(t *testing.T) []string {
	t.Helper()
	text, err := os.ReadFile("../../docs/format/gossip.md")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for block := range strings.SplitSeq(string(text), "\n\n") {
		if strings.HasPrefix(block, "    ") {
			out = append(out, strings.Join(strings.Fields(block), ""))
		}
	}
	return out
}

// TestExamples holds messages to bytes that Docker's nodes exchange.
func TestExamples(t *testing.T) {
	record, err := proto.Marshal(&networkdb.PeerRecord{EndpointIp: "10.0.1.3/24", EndpointMac: "02:42:0a:00:01:03", TunnelEndpointIp: "192.168.0.2"})
	if err != nil {
		t.Fatal(err)
	}
	d := New("abcdef012345", 4)
	d.Join("net1")
	d.Set("net1", []Row{{"overlay_peer_table", "ep1", record}}, begin())
	event := d.mine["net1"].queue[rowKey{"overlay_peer_table", "ep1"}].msg
	if diff := cmp.Diff(examples(t), []string{hex.EncodeToString(record), hex.EncodeToString(event)}); diff != "" {
		t.Error(diff)
	}
}

// cluster is some replicas that hear each other as long as a test lets them.
type cluster struct {
	now   time.Time
	nodes map[string]*DB
}

func newCluster(names ...string) *cluster {
	c := &cluster{now: begin(), nodes: map[string]*DB{}}
	for _, name := range names {
		c.nodes[name] = New(name, 1)
	}
	for _, name := range names {
		for _, other := range names {
			c.nodes[name].NodeUp(other, other+":7946", c.now)
		}
	}
	return c
}

// tell has a node hear a message, and all others what it passes on.
func (c *cluster) tell(to string, msg []byte) {
	a, err := c.nodes[to].Receive(msg, c.now)
	if err != nil {
		panic(err)
	}
	for _, b := range a.Broadcasts {
		c.tellOthers(to, b.Msg)
	}
	if a.Sync != nil && a.Sync.Unsolicited {
		answer, _ := c.nodes[to].Sync(a.Sync.Networks, false, c.now)
		c.tell(a.Sync.From, answer)
	}
}

func (c *cluster) tellOthers(from string, msg []byte) {
	for _, name := range slices.Sorted(maps.Keys(c.nodes)) {
		if name != from {
			c.tell(name, msg)
		}
	}
}

func (c *cluster) join(name, network string) {
	c.tellOthers(name, c.nodes[name].Join(network).Msg)
	for _, m := range c.nodes[name].Members(network) {
		c.sync(name, m, network)
	}
	c.nodes[name].Synced(network)
}

func (c *cluster) sync(from, to string, networks ...string) {
	msg, _ := c.nodes[from].Sync(networks, true, c.now)
	c.tell(to, msg)
}

func (c *cluster) gossip(from string) {
	for _, g := range c.nodes[from].Gossip() {
		for _, to := range g.Members {
			c.tell(to, g.Msg)
		}
	}
}

// rows is what a node knows of others in a network.
func (c *cluster) rows(name, network string) string {
	var out []string
	for _, r := range c.nodes[name].Others(network) {
		out = append(out, r.Owner+":"+r.Key+"="+string(r.Value))
	}
	return strings.Join(out, " ")
}

func (c *cluster) want(t *testing.T, name, network, want string) {
	t.Helper()
	if got := c.rows(name, network); got != want {
		t.Errorf("%s has %q, want %q", name, got, want)
	}
}

func testRow(key, value string) Row { return Row{"t", key, []byte(value)} }

// TestRows follows rows from their creation to their end.
func TestRows(t *testing.T) {
	c := newCluster("a", "b", "c")
	c.join("a", "net")
	c.nodes["a"].Set("net", []Row{testRow("k", "1")}, c.now)
	c.want(t, "b", "net", "")
	c.join("b", "net") // asks for what was there before
	c.want(t, "b", "net", "a:k=1")
	c.nodes["a"].Set("net", []Row{testRow("k", "2"), testRow("l", "1")}, c.now)
	c.gossip("a")
	c.want(t, "b", "net", "a:k=2 a:l=1")
	c.want(t, "c", "net", "") // is not in it
	if m := c.nodes["c"].Members("net"); !slices.Equal(m, []string{"a", "b"}) {
		t.Errorf("c knows members %v", m)
	}
	if n := c.nodes["a"].Common("b"); !slices.Equal(n, []string{"net"}) {
		t.Errorf("a and b are both in %v", n)
	}
	if n := c.nodes["a"].Common("c"); n != nil {
		t.Errorf("a and c are both in %v", n)
	}
	c.nodes["a"].Set("net", []Row{testRow("l", "1")}, c.now)
	c.gossip("a")
	c.want(t, "b", "net", "a:l=1")
	c.join("c", "net") // hears of it from both
	c.want(t, "c", "net", "a:l=1")

	c.tellOthers("a", c.nodes["a"].Leave("net", c.now).Msg)
	c.want(t, "b", "net", "")
	if m := c.nodes["b"].Members("net"); !slices.Equal(m, []string{"c"}) {
		t.Errorf("b knows members %v", m)
	}
}

// TestLateEvents: what is older than what is known changes nothing, deletions included.
func TestLateEvents(t *testing.T) {
	c := newCluster("a", "b")
	c.join("a", "net")
	c.join("b", "net")
	events := make([]string, 0, 3)
	for _, rows := range [][]Row{{testRow("k", "1")}, {testRow("k", "2")}, nil} {
		c.nodes["a"].Set("net", rows, c.now)
		events = append(events, string(c.nodes["a"].mine["net"].queue[rowKey{"t", "k"}].msg))
	}
	for _, i := range []int{1, 0, 1} {
		c.tell("b", []byte(events[i]))
		c.want(t, "b", "net", "a:k=2")
	}
	for _, i := range []int{2, 1, 0} {
		c.tell("b", []byte(events[i]))
		c.want(t, "b", "net", "")
	}
	c.now = c.now.Add(tombstoneAge)
	c.nodes["b"].Reap(c.now)
	if s := c.nodes["b"]; s.count != 0 || s.bytes != 0 {
		t.Errorf("%d rows of %d bytes are left", s.count, s.bytes)
	}
}

// TestFailure: rows of a node out of reach are hidden, come back with it, and are forgotten
// in time.
func TestFailure(t *testing.T) {
	c := newCluster("a", "b")
	c.join("a", "net")
	c.nodes["a"].Set("net", []Row{testRow("k", "1")}, c.now)
	c.join("b", "net")
	b := c.nodes["b"]
	b.NodeDown("a", c.now)
	c.want(t, "b", "net", "")
	if f := b.Failed(); !slices.Equal(f, []string{"a:7946"}) {
		t.Errorf("failed are %v", f)
	}
	b.NodeUp("a", "a:7946", c.now)
	c.want(t, "b", "net", "a:k=1")

	b.NodeDown("a", c.now)
	b.Reap(c.now.Add(failedRowsAge))
	if b.count != 0 || b.attachments != 0 {
		t.Errorf("%d rows and %d attachments of a failed node are left", b.count, b.attachments)
	}
	b.Reap(c.now.Add(goneAge))
	if len(b.nodes) != 0 {
		t.Error("the failed node is not forgotten")
	}
}

// TestReplaced: another node at the same address takes the place of the one before.
func TestReplaced(t *testing.T) {
	c := newCluster("a", "b")
	c.join("a", "net")
	c.nodes["a"].Set("net", []Row{testRow("k", "1")}, c.now)
	c.join("b", "net")
	b := c.nodes["b"]
	b.NodeUp("a2", "a:7946", c.now)
	c.want(t, "b", "net", "")
	b.NodeDown("a", c.now)
	if f := b.Failed(); len(f) != 0 {
		t.Errorf("failed are %v", f)
	}
	if b.count != 0 {
		t.Errorf("%d rows are left", b.count)
	}
}

// TestReplacedInAnyOrder: the older of two processes at one address, of which the transport
// tells last, does not take the place of the one that lives.
func TestReplacedInAnyOrder(t *testing.T) {
	c := newCluster("a", "b")
	c.join("a", "net")
	c.nodes["a"].Set("net", []Row{testRow("k", "1")}, c.now)
	c.join("b", "net")
	b := c.nodes["b"]
	b.NodeUp("old", "a:7946", c.now)
	c.want(t, "b", "net", "")
	if f := b.Failed(); len(f) != 0 {
		t.Errorf("failed are %v", f)
	}
	b.Reap(c.now.Add(goneAge)) // forgets none that the transport has for alive
	c.tell("b", c.nodes["a"].Announce().Msg)
	c.want(t, "b", "net", "a:k=1")

	b.NodeUp("old", "a:7946", c.now)
	c.want(t, "b", "net", "")
	b.NodeDown("old", c.now)
	c.want(t, "b", "net", "a:k=1")
}

// TestManyNodes: nodes that are gone make room for new ones.
func TestManyNodes(t *testing.T) {
	d := New("a", 1)
	for i := range maxNodes {
		d.nodes[fmt.Sprint("n", i)] = &node{addr: fmt.Sprint(i), listed: true}
	}
	d.NodeUp("one more", "more", begin())
	if len(d.nodes) != maxNodes || d.refused != 1 {
		t.Errorf("%d nodes, %d refused", len(d.nodes), d.refused)
	}
	d.NodeDown("n7", begin())
	d.NodeDown("n8", begin().Add(-time.Hour))
	d.NodeUp("one more", "more", begin())
	if len(d.nodes) != maxNodes || d.nodes["one more"] == nil || d.nodes["n8"] != nil {
		t.Errorf("%d nodes, n8 is %v", len(d.nodes), d.nodes["n8"])
	}
}

// TestClocks: one message raises a clock by no more than anybody can have counted.
func TestClocks(t *testing.T) {
	c := newCluster("a", "b")
	c.join("a", "net")
	c.join("b", "net")
	b := c.nodes["b"]
	network, table := b.networkClock, b.tableClock
	for _, m := range []struct {
		kind networkdb.MessageType
		m    proto.Message
	}{
		{networkdb.MessageType_NODE_EVENT, &networkdb.NodeEvent{Type: networkdb.NodeEvent_JOIN, LTime: maxTime - 1, NodeName: "a"}},
		{networkdb.MessageType_NETWORK_EVENT, &networkdb.NetworkEvent{Type: networkdb.NetworkEvent_JOIN, LTime: maxTime - 1, NodeName: "a", NetworkId: "other"}},
		{networkdb.MessageType_TABLE_EVENT, &networkdb.TableEvent{Type: networkdb.TableEvent_CREATE, LTime: maxTime - 1, NodeName: "a", NetworkId: "net", TableName: "t", Key: "k"}},
		{networkdb.MessageType_BULK_SYNC, &networkdb.BulkSyncMessage{LTime: maxTime - 1, NodeName: "a", Unsolicited: true}},
	} {
		if _, err := b.Receive(encode(m.kind, m.m), c.now); err != nil {
			t.Errorf("%s: %v", m.kind, err)
		}
	}
	if b.networkClock != network || b.tableClock != table || b.refused != 4 {
		t.Errorf("the clocks are %d and %d, %d refused", b.networkClock, b.tableClock, b.refused)
	}
}

// TestNodeLeaves: who says that it leaves is forgotten at once, and believed once only.
func TestNodeLeaves(t *testing.T) {
	c := newCluster("a", "b")
	c.join("a", "net")
	c.nodes["a"].Set("net", []Row{testRow("k", "1")}, c.now)
	c.join("b", "net")
	back := c.nodes["a"].Announce()
	gone := c.nodes["a"].Depart()
	c.tell("b", gone.Msg)
	c.want(t, "b", "net", "")
	a, err := c.nodes["b"].Receive(back.Msg, c.now)
	if err != nil || len(a.Broadcasts) != 0 {
		t.Errorf("an older event is passed on: %v, %v", a, err)
	}
	if s := c.nodes["b"].Stats(); s.Nodes != 0 {
		t.Errorf("stats are %+v", s)
	}
}

// TestState: who joins learns who is in which network, of those that left as well.
func TestState(t *testing.T) {
	c := newCluster("a", "b")
	c.join("a", "net")
	c.join("a", "old")
	c.tellOthers("a", c.nodes["a"].Leave("old", c.now).Msg)
	fresh := New("c", 1)
	fresh.NodeUp("a", "a:7946", c.now)
	fresh.NodeUp("b", "b:7946", c.now)
	if err := fresh.Merge(c.nodes["b"].State(false), c.now); err != nil {
		t.Fatal(err)
	}
	if m := fresh.Members("net"); !slices.Equal(m, []string{"a"}) {
		t.Errorf("members of net are %v", m)
	}
	if m := fresh.Members("old"); m != nil {
		t.Errorf("members of old are %v", m)
	}
}

// TestFormerProcess: after a restart under the same name others hear what is true now.
func TestFormerProcess(t *testing.T) {
	c := newCluster("a", "b")
	c.join("a", "net")
	c.nodes["a"].Set("net", []Row{testRow("gone", "1"), testRow("same", "1"), testRow("changed", "1")}, c.now)
	c.join("b", "net")
	c.want(t, "b", "net", "a:changed=1 a:gone=1 a:same=1")

	// Its clock is behind: epochs alone would not do.
	c.nodes["a"] = New("a", 0)
	c.nodes["a"].NodeUp("b", "b:7946", c.now)
	if err := c.nodes["a"].Merge(c.nodes["b"].State(true), c.now); err != nil {
		t.Fatal(err)
	}
	event := c.nodes["a"].Join("net")
	c.nodes["a"].Set("net", []Row{testRow("same", "1"), testRow("changed", "2")}, c.now)
	c.tell("b", event.Msg)
	c.sync("a", "b", "net")
	c.nodes["a"].Synced("net")
	c.gossip("a")
	c.want(t, "b", "net", "a:changed=2 a:same=1")
}

// TestStolenRow: what another node says of a row of this one is answered.
func TestStolenRow(t *testing.T) {
	c := newCluster("a", "b", "x")
	for _, name := range []string{"a", "b", "x"} {
		c.join(name, "net")
	}
	c.nodes["a"].Set("net", []Row{testRow("k", "1")}, c.now)
	c.gossip("a")
	for _, owner := range []string{"x", "a"} {
		lie := encode(networkdb.MessageType_TABLE_EVENT, &networkdb.TableEvent{
			Type: networkdb.TableEvent_CREATE, LTime: c.nodes["a"].tableClock + 5, NodeName: owner, NetworkId: "net", TableName: "t", Key: "k", Value: []byte("lie"),
		})
		c.tell("b", lie)
		c.tell("a", lie)
		c.gossip("a")
		c.want(t, "b", "net", "a:k=1")
	}
}

// TestRelay: events of others are passed on a bounded number of times; deletions of what was
// never known only when others may still have it.
func TestRelay(t *testing.T) {
	c := newCluster("a", "b", "x")
	for _, name := range []string{"a", "b", "x"} {
		c.join(name, "net")
	}
	c.nodes["a"].Set("net", []Row{testRow("k", "1")}, c.now)
	c.tell("b", c.nodes["a"].Gossip()[0].Msg)
	rounds := 0
	for ; len(c.nodes["b"].Gossip()) > 0; rounds++ {
	}
	if rounds != retransmitMult {
		t.Errorf("an event was passed on %d times", rounds)
	}
	for _, tc := range []struct {
		residual int32
		syncing  bool
		relayed  bool
	}{{600, false, false}, {600, true, true}, {200, true, false}} {
		e := &networkdb.TableEvent{
			Type: networkdb.TableEvent_DELETE, LTime: 100, NodeName: "a", NetworkId: "net", TableName: "t",
			Key: fmt.Sprint(tc.residual, tc.syncing), ResidualReapTime: tc.residual,
		}
		c.nodes["b"].hearRow(e, tc.syncing, c.now)
		if relayed := c.nodes["b"].mine["net"].queue[rowKey{"t", e.GetKey()}] != nil; relayed != tc.relayed {
			t.Errorf("%s: passed on: %t", e.GetKey(), relayed)
		}
	}
}

// TestOwnFirst: a packet holds this node's own events first, and is never larger than it may be
// unless one event is.
func TestOwnFirst(t *testing.T) {
	q := queue{}
	for i := range 40 {
		q.put(rowKey{"t", fmt.Sprintf("foreign%02d", i)}, make([]byte, 100), false)
	}
	q.put(rowKey{"t", "own"}, []byte("own"), true)
	q.put(rowKey{"t", "big"}, make([]byte, 5000), true)
	list := q.take(1)
	if len(list) != 1 || len(list[0]) != 5000 {
		t.Fatalf("the large event does not go alone: %d events", len(list))
	}
	list = q.take(1)
	total := compoundHeader
	for _, e := range list {
		total += eventHeader + len(e)
	}
	if string(list[0]) != "own" || total > packetSize || len(list) < 10 {
		t.Errorf("%d events of %d bytes, the first is %q", len(list), total, list[0])
	}
}

// TestLimits: whoever tells too much is not believed, and counted.
func TestLimits(t *testing.T) {
	c := newCluster("a", "b")
	c.join("a", "net")
	c.join("b", "net")
	b := c.nodes["b"]
	b.count = maxRows
	c.nodes["a"].Set("net", []Row{testRow("k", "1")}, c.now)
	c.gossip("a")
	c.want(t, "b", "net", "")
	b.count = 0
	if b.Stats().Refused == 0 {
		t.Error("nothing is counted")
	}
	for name, m := range map[string]proto.Message{
		"time":    &networkdb.TableEvent{Type: networkdb.TableEvent_CREATE, LTime: maxTime, NodeName: "a", NetworkId: "net", TableName: "t", Key: "k"},
		"key":     &networkdb.TableEvent{Type: networkdb.TableEvent_CREATE, LTime: 50, NodeName: "a", NetworkId: "net", TableName: "t", Key: strings.Repeat("k", maxName+1)},
		"slash":   &networkdb.TableEvent{Type: networkdb.TableEvent_CREATE, LTime: 50, NodeName: "a", NetworkId: "net", TableName: "t", Key: "a/b"},
		"value":   &networkdb.TableEvent{Type: networkdb.TableEvent_CREATE, LTime: 50, NodeName: "a", NetworkId: "net", TableName: "t", Key: "k", Value: make([]byte, maxValue+1)},
		"nothing": &networkdb.TableEvent{},
	} {
		if _, err := b.Receive(encode(networkdb.MessageType_TABLE_EVENT, m), c.now); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	for i := range maxRelays + 10 {
		b.mine["net"].queue.put(rowKey{"t", fmt.Sprint(i)}, nil, false)
	}
	if n := len(b.mine["net"].queue); n != maxRelays {
		t.Errorf("%d events wait", n)
	}
}

// TestSyncOfOthersNetworks: what a node is asked for, and is not in, it does not even remember.
func TestSyncOfOthersNetworks(t *testing.T) {
	c := newCluster("a", "b")
	c.join("a", "net")
	c.join("a", "more")
	c.join("b", "net")
	msg, _ := c.nodes["a"].Sync([]string{"net", "more"}, true, c.now)
	a, err := c.nodes["b"].Receive(msg, c.now)
	if err != nil || a.Sync == nil || !slices.Equal(a.Sync.Networks, []string{"net"}) {
		t.Errorf("b is asked for %+v: %v", a.Sync, err)
	}
}

// TestLargeSync: a bulk synchronization that would be too large keeps the sender's own rows.
func TestLargeSync(t *testing.T) {
	c := newCluster("a", "b")
	c.join("a", "net")
	c.join("b", "net")
	big := make([]Row, 1200)
	for i := range big {
		big[i] = Row{"t", fmt.Sprint("a", i), make([]byte, maxValue)}
	}
	c.nodes["a"].Set("net", big, c.now)
	c.sync("a", "b", "net")
	c.nodes["b"].Set("net", []Row{testRow("z", "own")}, c.now)
	msg, _ := c.nodes["b"].Sync([]string{"net"}, true, c.now)
	if len(msg) > 20<<20 {
		t.Errorf("the message has %d bytes", len(msg))
	}
	fresh := newCluster("b", "c").nodes["c"]
	fresh.Join("net")
	if err := fresh.Merge(c.nodes["b"].State(true), c.now); err != nil {
		t.Fatal(err)
	}
	if _, err := fresh.Receive(msg, c.now); err != nil {
		t.Fatal(err)
	}
	if list := fresh.Others("net"); len(list) != 1 || list[0].Key != "z" {
		t.Errorf("what arrives is not the sender's own: %d rows", len(list))
	}
}

func TestTransmits(t *testing.T) {
	got := map[int]int{}
	for _, members := range []int{1, 8, 9, 98, 99} {
		got[members] = transmits(members)
	}
	if diff := cmp.Diff(map[int]int{1: 4, 8: 4, 9: 8, 98: 8, 99: 12}, got); diff != "" {
		t.Error(diff)
	}
}

// TestConverge: whatever is lost on the way, after each two have compared their rows all know
// the same, and nothing that its owner does not publish.
func TestConverge(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		names := []string{"a", "b", "c", "d"}
		c := newCluster(names...)
		for _, name := range names {
			c.join(name, "net")
		}
		published := map[string]map[string]string{}
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			name := rapid.SampledFrom(names).Draw(t, "node")
			switch rapid.IntRange(0, 3).Draw(t, "what") {
			case 0, 1:
				list := map[string]string{}
				var rows []Row
				for _, k := range rapid.SliceOfDistinct(rapid.IntRange(0, 3), rapid.ID[int]).Draw(t, "keys") {
					r := testRow(fmt.Sprint(name, k), rapid.StringMatching("[0-9]").Draw(t, "value"))
					list[r.Key] = string(r.Value)
					rows = append(rows, r)
				}
				published[name] = list
				c.nodes[name].Set("net", rows, c.now)
			case 2:
				for _, g := range c.nodes[name].Gossip() {
					c.tell(rapid.SampledFrom(g.Members).Draw(t, "to"), g.Msg)
				}
			case 3:
				other := rapid.SampledFrom(names).Draw(t, "with")
				if other != name {
					c.sync(name, other, "net")
				}
			}
		}
		for _, a := range names {
			for _, b := range names {
				if a != b {
					c.sync(a, b, "net")
				}
			}
		}
		for _, name := range names {
			var want []string
			for owner, list := range published {
				for k, v := range list {
					if owner != name {
						want = append(want, owner+":"+k+"="+v)
					}
				}
			}
			slices.Sort(want)
			if got := c.rows(name, "net"); got != strings.Join(want, " ") {
				t.Fatalf("%s has %q, want %q", name, got, want)
			}
			d := c.nodes[name]
			count, bytes := 0, 0
			for k, r := range d.rows["net"] {
				count, bytes = count+1, bytes+size(k, r)
			}
			if d.count != count || d.bytes != bytes {
				t.Fatalf("%s counts %d rows of %d bytes, has %d of %d", name, d.count, d.bytes, count, bytes)
			}
		}
	})
}

func FuzzReceive(f *testing.F) {
	c := newCluster("a", "b")
	c.nodes["a"].Join("net")
	c.nodes["a"].Set("net", []Row{testRow("k", "1")}, c.now)
	sync, _ := c.nodes["a"].Sync([]string{"net"}, true, c.now)
	f.Add(c.nodes["a"].Announce().Msg)
	f.Add(c.nodes["a"].Join("other").Msg)
	f.Add(c.nodes["a"].State(true))
	f.Add(c.nodes["a"].mine["net"].queue[rowKey{"t", "k"}].msg)
	f.Add(sync)
	f.Add(compound([][]byte{sync, compound(nil)}))
	f.Fuzz(func(t *testing.T, msg []byte) {
		c := newCluster("a", "b")
		c.join("a", "net")
		c.join("b", "net")
		b := c.nodes["b"]
		if _, err := decodeMessage(msg); err == nil {
			decodeCompound(msg)
		}
		_, err := b.Receive(msg, c.now)
		if merge := b.Merge(msg, c.now); (err == nil) != (merge == nil) {
			t.Fatalf("received: %v, merged: %v", err, merge)
		}
		b.Reap(c.now)
		b.Gossip()
		if _, err := decodeMessage(b.State(true)); err != nil {
			t.Fatalf("the state is unreadable: %v", err)
		}
		// Whatever b heard, what a publishes next reaches it.
		c.nodes["a"].Set("net", []Row{testRow("k", "2")}, c.now)
		answer, _ := b.Sync([]string{"net"}, false, c.now)
		if _, err := c.nodes["a"].Receive(answer, c.now); err != nil {
			t.Fatalf("the answer is unreadable: %v", err)
		}
	})
}

// BenchmarkSync is one exchange of a network's rows, each way, of a thousand nodes with twenty.
func BenchmarkSync(b *testing.B) {
	c := newCluster("a", "b")
	c.join("a", "net")
	c.join("b", "net")
	for i := range 1000 {
		name := fmt.Sprintf("node%04d", i)
		for _, d := range c.nodes {
			d.NodeUp(name, name, c.now)
			d.hearNetwork(&networkdb.NetworkEvent{Type: networkdb.NetworkEvent_JOIN, LTime: 5, NodeName: name, NetworkId: "net"}, c.now)
		}
		for k := range 20 {
			c.nodes["a"].hearRow(&networkdb.TableEvent{
				Type: networkdb.TableEvent_CREATE, LTime: 9, NodeName: name, NetworkId: "net", TableName: "t", Key: fmt.Sprint(name, k), Value: make([]byte, 60),
			}, true, c.now)
		}
	}
	c.sync("a", "b", "net")
	for b.Loop() {
		c.sync("a", "b", "net")
	}
}
