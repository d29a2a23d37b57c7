package replica

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api"
)

const (
	// peerQueue bounds the messages waiting for one peer. Further ones are dropped and the
	// peer is reported unreachable; raft repeats what matters.
	peerQueue = 4096
	// sendWatchdog ends a call that makes no progress.
	sendWatchdog = 2 * time.Second
	// patience is how long one message's answer is waited for before the next is sent: on a
	// near network as long as it takes, which keeps them in order and the calls few; on a far
	// one answers take longer than the pauses between heartbeats, and would fall behind.
	patience = 10 * time.Millisecond
	// maxUnanswered bounds the calls to one peer; further messages stay in its queue.
	maxUnanswered = 256
	// maxMessage is the most that a receiver takes in one gRPC message.
	maxMessage = 4 << 20
	// redialAfter is how often a connection that fails is tried again at once.
	redialAfter = 250 * time.Millisecond
	// maxResolving bounds the unknown members asked for at a time, and those that were told of
	// and are not in our log yet. Further ones wait for raft to repeat.
	maxResolving = 16
)

// transport holds the connections to the other members. set and send belong to the owner.
type transport struct {
	r     *Replica
	ctx   context.Context //nolint:containedctx // the life of the peers' goroutines
	stop  context.CancelFunc
	group sync.WaitGroup

	mu        sync.Mutex
	peers     map[uint64]*peer
	resolving map[uint64]bool
}

type peer struct {
	t        *transport
	id       uint64
	addr     string
	queue    chan *raftpb.Message
	stop     context.CancelFunc
	hearsay  bool // not in our log yet
	isActive atomic.Bool
	conn     atomic.Pointer[grpc.ClientConn] // nil until dialed
}

func newTransport(r *Replica) *transport {
	ctx, stop := context.WithCancel(context.Background()) //nolint:forbidigo // ended by close
	return &transport{r: r, ctx: ctx, stop: stop, peers: make(map[uint64]*peer), resolving: make(map[uint64]bool)}
}

// close ends all connections and waits for their goroutines.
func (t *transport) close() {
	t.stop()
	t.group.Wait()
}

// active reports whether the last message to a member arrived.
func (t *transport) active(id uint64) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	p := t.peers[id]
	return p != nil && p.isActive.Load()
}

func (t *transport) get(id uint64) *peer {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.peers[id]
}

// set makes the peers those of a roster. Peers that others told of stay until they are
// removed.
func (t *transport) set(ros *roster) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for id, p := range t.peers {
		m := ros.members[id]
		if ros.removed[id] || m == nil && !p.hearsay || m != nil && m.GetAddr() != p.addr {
			p.stop()
			delete(t.peers, id)
		}
	}
	for id, m := range ros.members {
		if id != ros.self && t.peers[id] == nil {
			t.add(id, m.GetAddr(), false)
		}
	}
}

// add begins to send to a member. The caller holds mu.
func (t *transport) add(id uint64, addr string, hearsay bool) {
	ctx, stop := context.WithCancel(t.ctx)
	p := &peer{
		t: t, id: id, addr: addr, hearsay: hearsay, stop: stop,
		queue: make(chan *raftpb.Message, peerQueue),
	}
	t.peers[id] = p
	t.group.Go(func() { p.run(ctx) })
}

// resolve asks the other members for the address of one that is not in our log yet, such as
// a leader that joined while we were away. Until there is an answer its messages are
// dropped; raft repeats them.
func (t *transport) resolve(id uint64) {
	ros := t.r.members.Load()
	if ros.removed[id] || id == ros.self {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.resolving[id] || len(t.resolving) >= maxResolving {
		return
	}
	t.resolving[id] = true
	t.group.Go(func() {
		addr := t.ask(ros, id)
		t.mu.Lock()
		defer t.mu.Unlock()
		delete(t.resolving, id)
		if addr != "" && t.peers[id] == nil && !t.r.members.Load().removed[id] {
			t.add(id, addr, true)
		}
	})
}

// addUnknown begins to send to a member that is not in our log yet, unless there are many
// such already.
func (t *transport) addUnknown(id uint64, addr string) {
	ros := t.r.members.Load()
	t.mu.Lock()
	defer t.mu.Unlock()
	unknown := 0
	for _, p := range t.peers {
		if p.hearsay {
			unknown++
		}
	}
	if unknown < maxResolving && t.peers[id] == nil && ros.members[id] == nil && !ros.removed[id] && id != ros.self {
		t.add(id, addr, true)
	}
}

// ask returns the address of a member as the first who knows it says, or "".
func (t *transport) ask(ros *roster, id uint64) string {
	ctx, cancel := context.WithTimeout(t.ctx, sendWatchdog)
	defer cancel()
	for _, other := range ros.ids() {
		p := t.get(other)
		if p == nil || p.conn.Load() == nil {
			continue
		}
		res, err := api.NewRaftClient(p.conn.Load()).ResolveAddress(ctx, &api.ResolveAddressRequest{RaftId: id})
		if err == nil {
			return res.GetAddr()
		}
	}
	return ""
}

// send queues messages for their receivers and never blocks.
func (m *member) send(msgs []*raftpb.Message) {
	for _, msg := range msgs {
		if msg.GetTo() == m.id || msg.GetType() == raftpb.MsgProp {
			continue
		}
		if msg.GetType() == raftpb.MsgSnap {
			// The receiver must know the members of now, not those of the snapshot's time.
			meta := proto.CloneOf(msg.GetSnapshot().GetMetadata())
			meta.ConfState = proto.CloneOf(m.conf)
			msg = withSnapshot(msg, &raftpb.Snapshot{Metadata: meta, Data: msg.GetSnapshot().GetData()})
		}
		p := m.r.peers.get(msg.GetTo())
		if p == nil {
			m.r.peers.resolve(msg.GetTo())
			continue
		}
		select {
		case p.queue <- msg:
		default:
			m.raw.ReportUnreachable(msg.GetTo())
			if msg.GetType() == raftpb.MsgSnap {
				m.raw.ReportSnapshot(msg.GetTo(), raft.SnapshotFailure)
			}
		}
	}
}

// run sends what is queued until ctx ends: in order, which raft does not need and which
// makes it fast.
func (p *peer) run(ctx context.Context) {
	conn, err := p.t.r.cfg.Dial(ctx, p.addr)
	if err != nil {
		p.t.r.cfg.Log.Error("connect to manager", slog.String("addr", p.addr), slog.Any("error", err))
		return
	}
	defer conn.Close() //nolint:errcheck // nothing is lost
	p.conn.Store(conn)
	defer p.isActive.Store(false)
	_, err = api.NewHealthClient(conn).Check(ctx, &api.HealthCheckRequest{Service: HealthRaft})
	p.isActive.Store(err == nil)
	var calls sync.WaitGroup
	defer calls.Wait()
	unanswered := make(chan struct{}, maxUnanswered)
	slow := time.NewTimer(patience)
	defer slow.Stop()
	redial := &redial{conn: conn}
	for {
		var msg *raftpb.Message
		select {
		case msg = <-p.queue:
		case <-ctx.Done():
			return
		}
		if msg.GetType() == raftpb.MsgSnap {
			// Beside the rest, for it takes long and heartbeats must not wait.
			calls.Go(func() { p.deliver(ctx, conn, msg) })
			continue
		}
		select {
		case unanswered <- struct{}{}:
		case <-ctx.Done():
			return
		}
		answered := make(chan struct{})
		calls.Go(func() {
			defer close(answered)
			if !p.deliver(ctx, conn, msg) {
				redial.try()
			}
			<-unanswered
		})
		slow.Reset(patience)
		select {
		case <-answered:
		case <-slow.C:
		}
	}
}

// redial has a connection that fails tried again soon, and not all the time.
type redial struct {
	conn *grpc.ClientConn

	mu   sync.Mutex
	last time.Time
}

func (r *redial) try() {
	r.mu.Lock()
	again := time.Since(r.last) > redialAfter
	if again {
		r.last = time.Now()
	}
	r.mu.Unlock()
	if again {
		r.conn.ResetConnectBackoff()
	}
}

// deliver sends one message and tells the owner how it went.
func (p *peer) deliver(ctx context.Context, conn *grpc.ClientConn, msg *raftpb.Message) bool {
	call := metadata.AppendToOutgoingContext(ctx, keyAddr, p.t.r.cfg.Addr)
	err := sendMessage(call, api.NewRaftClient(conn), msg)
	p.isActive.Store(err == nil)
	if err == nil {
		if msg.GetType() == raftpb.MsgSnap {
			p.tell(ctx, func(m *member) { m.raw.ReportSnapshot(p.id, raft.SnapshotFinish) })
		}
		return true
	}
	if ctx.Err() != nil {
		return false
	}
	p.t.r.cfg.Log.Debug("send raft message", slog.String("raft_id", fmt.Sprintf("%x", p.id)), slog.Any("error", err))
	removed := status.Code(err) == codes.NotFound && status.Convert(err).Message() == ErrRemoved.Error()
	p.tell(ctx, func(m *member) {
		m.removed = m.removed || removed
		m.raw.ReportUnreachable(p.id)
		if msg.GetType() == raftpb.MsgSnap {
			m.raw.ReportSnapshot(p.id, raft.SnapshotFailure)
		}
	})
	return false
}

func (p *peer) tell(ctx context.Context, f func(*member)) {
	select {
	case p.t.r.calls <- f:
	case <-ctx.Done():
	}
}

// sendMessage makes one call for one message, as SwarmKit's members do.
func sendMessage(ctx context.Context, client api.RaftClient, msg *raftpb.Message) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	watchdog := time.AfterFunc(sendWatchdog, cancel)
	defer watchdog.Stop()
	stream, err := client.StreamRaftMessage(ctx)
	if err == nil {
		for _, part := range split(msg) {
			if err = stream.Send(&api.StreamRaftMessageRequest{Message: part}); err != nil {
				break // the reason comes with the answer
			}
			watchdog.Reset(sendWatchdog)
		}
		_, err = stream.CloseAndRecv()
	}
	if status.Code(err) == codes.Unimplemented {
		_, err = client.ProcessRaftMessage(ctx, &api.ProcessRaftMessageRequest{Message: msg})
	}
	return err
}

// split cuts a snapshot into messages that a receiver takes; each repeats all but the data.
func split(msg *raftpb.Message) []*raftpb.Message {
	size := proto.Size(&api.StreamRaftMessageRequest{Message: msg})
	if msg.GetType() != raftpb.MsgSnap || size <= maxMessage {
		return []*raftpb.Message{msg}
	}
	data := msg.GetSnapshot().GetData()
	piece := maxMessage - (size - len(data))
	var parts []*raftpb.Message
	for len(data) > 0 {
		n := min(piece, len(data))
		parts = append(parts, withSnapshot(msg, &raftpb.Snapshot{
			Metadata: msg.GetSnapshot().GetMetadata(),
			Data:     data[:n],
		}))
		data = data[n:]
	}
	return parts
}

// withSnapshot returns a copy of a snapshot message with another snapshot in it.
func withSnapshot(msg *raftpb.Message, s *raftpb.Snapshot) *raftpb.Message {
	return &raftpb.Message{
		Type: msg.Type, To: msg.To, From: msg.From, Term: msg.Term, LogTerm: msg.LogTerm, Index: msg.Index,
		Commit: msg.Commit, Reject: msg.Reject, RejectHint: msg.RejectHint, Context: msg.Context, Snapshot: s,
	}
}
