package replica

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"go.etcd.io/raft/v3/raftpb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/store"
)

// TestReadsAreLinearizable has clients of each member read and swap registers while the
// leader is cut off from the others or hands leadership over, again and again, and checks
// that nobody reads what was no more when they asked.
func TestReadsAreLinearizable(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, s *testSwarm) {
		h := new(crashHistory)
		stop := make(chan struct{})
		var clients sync.WaitGroup
		for i, n := range s.nodes {
			clients.Go(func() { readClient(n, 2*i, true, h, stop) })
			clients.Go(func() { readClient(n, 2*i+1, false, h, stop) })
		}
		random := rand.New(rand.NewPCG(5, 6))
		for range 12 {
			time.Sleep(time.Duration(random.IntN(500)) * time.Millisecond)
			leader := s.leader()
			if random.IntN(3) == 0 {
				_ = leader.TransferLeadership(t.Context()) // the others may be gone
				continue
			}
			s.cut(leader)
			s.leader()
			time.Sleep(time.Duration(random.IntN(1500)) * time.Millisecond)
			s.heal()
		}
		close(stop)
		clients.Wait()
		reads, swaps := 0, 0
		for _, o := range h.ops {
			if op, ok := o.Input.(crashOp); ok && op.New == "" {
				reads++
			} else if ok {
				swaps++
			}
		}
		t.Logf("%d reads, %d swaps, %d of unknown outcome", reads, swaps, len(h.open))
		if reads == 0 || swaps == 0 {
			t.Error("nothing was read or written")
		}
		for _, place := range h.open { // may take effect at any later time
			h.ops[place].Return = time.Now().Add(time.Hour).UnixNano()
		}
		if res := porcupine.CheckOperationsTimeout(register(), h.ops, 0); res != porcupine.Ok {
			t.Errorf("the history is %s: somebody read what was no more", res)
		}
	})
}

// readClient reads or swaps through one member, which refuses it while it does not lead.
func readClient(n *testNode, id int, reads bool, h *crashHistory, stop <-chan struct{}) {
	random := rand.New(rand.NewPCG(7, uint64(id)))
	begin := time.Now()
	for i := 0; ; i++ {
		select {
		case <-stop:
			return
		case <-time.After(time.Duration(random.IntN(20)) * time.Millisecond):
		}
		op := crashOp{Key: fmt.Sprintf("r%d-%d", time.Since(begin)/time.Second, random.IntN(2))}
		if !reads {
			op.New = fmt.Sprintf("%d.%d", id, i)
		}
		place := h.begin(id, op, time.Now())
		res, err := readOrSwap(n, op)
		switch {
		case err == nil:
			h.end(place, res, false)
		case op.New == "", errors.Is(err, model.ErrNoLeader): // certainly not written
			h.end(place, nil, true)
		}
	}
}

func readOrSwap(n *testNode, op crashOp) (res crashResult, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if op.New != "" {
		_, err = n.Update(ctx, func(tx *store.Tx) error { return swapIn(tx, op, &res) })
		return res, err
	}
	s, err := n.Read(ctx)
	if err == nil {
		res.Old = valueOf(s, op.Key)
	}
	return res, err
}

// TestReadWithoutQuorum: a leader that the others cannot hear refuses to read, within the
// time in which it notices, and reads again when they are back.
func TestReadWithoutQuorum(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, s *testSwarm) {
		s.write("a")
		leader := s.leader()
		s.cut(leader)
		begin := time.Now()
		_, err := leader.Read(t.Context())
		if !errors.Is(err, model.ErrUnconfirmed) || time.Since(begin) > readTicks*100*time.Millisecond {
			t.Errorf("after %v a leader that nobody hears answers %v", time.Since(begin), err)
		}
		if leader.View().Config("a") == nil {
			t.Error("what needs no quorum is not there")
		}
		s.write("b")
		s.heal()
		waitFor(t, "somebody reads", func() bool {
			state, err := s.leader().Read(t.Context())
			return err == nil && state.Config("b") != nil
		})
	})
}

// TestReadsShareRounds: reads at one time cost two rounds of heartbeats, one for the first of
// them and one for the others.
func TestReadsShareRounds(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, s *testSwarm) {
		leader := s.leader()
		var before, after uint64
		done := make(chan error, 100)
		if err := leader.call(t.Context(), func(m *member) {
			before = m.reads.number
			for range cap(done) {
				m.read(done)
			}
		}); err != nil {
			t.Fatal(err)
		}
		for range cap(done) {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
		if err := leader.call(t.Context(), func(m *member) { after = m.reads.number }); err != nil {
			t.Fatal(err)
		}
		if after-before != 2 {
			t.Errorf("%d reads took %d rounds of heartbeats", cap(done), after-before)
		}
	})
}

// TestAnswersFromOutside: a manager cannot answer another's reads for it, nor end it with an
// answer that is none.
func TestAnswersFromOutside(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, s *testSwarm) {
		leader, other := s.leader(), s.followers()[0]
		conn, err := s.dialFrom(other.addr, other.id)(t.Context(), leader.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		to, from := leader.members.Load().self, other.members.Load().self
		for _, kind := range []raftpb.MessageType{raftpb.MsgProp, raftpb.MsgReadIndex, raftpb.MsgReadIndexResp} {
			msg := &raftpb.Message{Type: kind.Enum(), To: &to, From: &from, Entries: []*raftpb.Entry{{Data: []byte("x")}}}
			if _, err := api.NewRaftClient(conn).ProcessRaftMessage(t.Context(), &api.ProcessRaftMessageRequest{Message: msg}); err != nil {
				t.Error(err)
			}
		}
		if _, err := leader.Read(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

// TestReadAlone: a manager without others asks nobody, and one that has just lost the last
// of them waits for nobody.
func TestReadAlone(t *testing.T) {
	inBubble(t, 2, func(t *testing.T, s *testSwarm) {
		s.write("a")
		leader, other := s.leader(), s.followers()[0]
		// The other is removed before it answers the round, and not heard after that.
		done := make(chan error, 1)
		var removed <-chan error
		if err := leader.call(t.Context(), func(m *member) {
			var err error
			if removed, err = m.proposeConf(&raftpb.ConfChange{
				Type: raftpb.ConfChangeRemoveNode.Enum(), NodeId: new(other.members.Load().self), Context: []byte{},
			}); err != nil {
				t.Error(err)
			}
			m.read(done)
		}); err != nil {
			t.Fatal(err)
		}
		for _, c := range []<-chan error{removed, done} {
			if err := <-c; err != nil {
				t.Error(err)
			}
		}
		begin := time.Now()
		state, err := leader.Read(t.Context())
		if err != nil || state.Config("a") == nil || time.Since(begin) > 0 {
			t.Errorf("after %v the only manager answers %v", time.Since(begin), err)
		}
		if err := leader.call(t.Context(), func(m *member) {
			if !m.quiet() || m.reads.number != 1 {
				t.Errorf("the only manager has begun %d rounds and is quiet: %v", m.reads.number, m.quiet())
			}
		}); err != nil {
			t.Fatal(err)
		}
	})
}
