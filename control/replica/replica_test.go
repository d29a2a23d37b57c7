package replica

import (
	"context"
	cryptorand "crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/core/store"
	"github.com/skep-dev/skep/platform/disk"
)

func TestFirstMemberWritesAndRestarts(t *testing.T) {
	inBubble(t, 1, func(t *testing.T, s *testSwarm) {
		ids := names("c", 10)
		s.write(ids...)
		s.nodes[0].stop()
		if s.nodes[0].err != nil {
			t.Fatalf("run: %v", s.nodes[0].err)
		}
		n := s.restart(s.nodes[0])
		s.mustHave(s.leader(), ids...)
		s.write("after")
		if n.View().Index() == 0 {
			t.Error("the state has no index")
		}
	})
}

func TestThreeMembersReplicate(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, s *testSwarm) {
		s.write("c")
		for _, n := range s.nodes {
			s.mustHave(n, "c")
			id, addr, ok := n.Leader()
			if id != "node1" || addr != s.nodes[0].addr || !ok {
				t.Errorf("%s says that %q at %q leads: %v", n.id, id, addr, ok)
			}
		}
		members := s.nodes[0].Members()
		if len(members) != 3 {
			t.Fatalf("there are %d members", len(members))
		}
		for _, m := range members {
			if m.GetStatus().GetReachability() != api.RaftMemberStatus_REACHABLE {
				t.Errorf("%s is not reachable", m.GetNodeId())
			}
			if m.GetStatus().GetLeader() != (m.GetNodeId() == "node1") {
				t.Errorf("%s leads: %v", m.GetNodeId(), m.GetStatus().GetLeader())
			}
		}
	})
}

func TestLeaderLossElectsAnother(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, s *testSwarm) {
		s.write("before")
		old := s.nodes[0]
		old.stop()
		start := time.Now()
		leader := s.leader()
		mustCreate(t, leader, "after")
		if d := time.Since(start); d > 3*time.Second {
			t.Errorf("the next write took %v", d)
		}
		s.mustHave(leader, "before")
		s.mustHave(s.restart(old), "before", "after")
	})
}

func TestUpdateAnswers(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, s *testSwarm) {
		leader := s.leader()
		ctx := t.Context()
		_, err := s.followers()[0].Update(ctx, func(tx *store.Tx) error { return createConfig(tx, "x", "") })
		if !errors.Is(err, model.ErrNoLeader) {
			t.Errorf("on a follower: %v", err)
		}
		mine := errors.New("mine")
		_, err = leader.Update(ctx, func(tx *store.Tx) error { _ = createConfig(tx, "x", ""); return mine })
		if !errors.Is(err, mine) || leader.View().Config("x") != nil {
			t.Errorf("with an error of its own: %v", err)
		}
		_, err = leader.Update(ctx, func(tx *store.Tx) error { return createConfig(tx, "x", strings.Repeat("x", maxRequest)) })
		wantKind(t, err, model.Exhausted)
		_, err = leader.Update(ctx, func(tx *store.Tx) error {
			for i := range 14 {
				if err := createConfig(tx, fmt.Sprint("big", i), strings.Repeat("x", 100_000)); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			t.Errorf("just below the limit: %v", err)
		}
		if s, err := leader.Update(ctx, func(*store.Tx) error { return nil }); err != nil || s == nil {
			t.Errorf("without changes: %v", err)
		}
		ended, cancel := context.WithCancel(ctx)
		cancel()
		if _, err := leader.Update(ended, func(*store.Tx) error { return nil }); err != nil && !errors.Is(err, context.Canceled) {
			t.Errorf("with an ended context: %v", err)
		}
	})
}

// Updates in flight see each other, and versions increase with each.
func TestPipelinedVersionsIncrease(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, s *testSwarm) {
		s.write("counter")
		leader := s.leader()
		const writers, rounds = 8, 40
		cursor := leader.Follow()
		var group sync.WaitGroup
		for range writers {
			group.Go(func() {
				for range rounds {
					_, err := leader.Update(t.Context(), func(tx *store.Tx) error {
						c := model.Clone(tx.Snapshot().Config("counter"))
						c.Spec.Data = append(c.Spec.Data, 'x')
						return tx.Update(c)
					})
					if err != nil {
						t.Errorf("update: %v", err)
					}
				}
			})
		}
		group.Wait()
		events, _ := cursor.Drain()
		if len(events) != writers*rounds {
			t.Errorf("%d events, want %d", len(events), writers*rounds)
		}
		for _, e := range events {
			before, after := e.Old.GetMeta().GetVersion().GetIndex(), e.New.GetMeta().GetVersion().GetIndex()
			if after <= before {
				t.Fatalf("version went from %d to %d", before, after)
			}
		}
		want := len("text of counter") + writers*rounds
		if got := len(leader.View().Config("counter").GetSpec().GetData()); got != want {
			t.Errorf("%d bytes, want %d: an update was lost or doubled", got, want)
		}
		if v, i := leader.View().Config("counter").GetMeta().GetVersion().GetIndex(), leader.View().Index(); v >= i {
			t.Errorf("version %d is not below the index %d of its entry", v, i)
		}
	})
}

// A leader that is cut off fails what is in flight and refuses what comes; what it could
// not write is not there afterwards.
func TestCutOffLeader(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, s *testSwarm) {
		s.write("before")
		old := s.leader()
		_, changed := old.Leading()
		s.cut(old)
		_, err := old.Update(t.Context(), func(tx *store.Tx) error { return createConfig(tx, "lost", "") })
		wantKind(t, err, model.Unavailable)
		if err == nil || !strings.Contains(err.Error(), "lost leader status") {
			t.Errorf("got %v", err)
		}
		<-changed
		if old.View().Config("before") == nil {
			t.Error("cannot read without a quorum")
		}
		_, err = old.Update(t.Context(), func(tx *store.Tx) error { return createConfig(tx, "refused", "") })
		if !errors.Is(err, model.ErrNoLeader) {
			t.Errorf("without a quorum: %v", err)
		}
		s.write("meanwhile")
		s.heal()
		s.mustHave(old, "meanwhile")
		if old.View().Config("lost") != nil || s.leader().View().Config("lost") != nil {
			t.Error("a write that failed is there")
		}
	})
}

func TestRunTermsFollowsLeadership(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, s *testSwarm) {
		first := s.leader()
		ctx, cancel := context.WithCancel(t.Context())
		began, ended := make(chan string, 10), make(chan string, 10)
		run := func(n *testNode) error {
			return n.RunTerms(ctx, func(ctx context.Context) error {
				began <- n.id
				<-ctx.Done()
				ended <- n.id
				return ctx.Err()
			})
		}
		var group sync.WaitGroup
		for _, n := range s.nodes {
			group.Go(func() {
				if err := run(n); !errors.Is(err, context.Canceled) {
					t.Errorf("run terms: %v", err)
				}
			})
		}
		if got := <-began; got != first.id {
			t.Errorf("%s began to lead, want %s", got, first.id)
		}
		if err := first.TransferLeadership(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := <-ended; got != first.id {
			t.Errorf("%s ended, want %s", got, first.id)
		}
		if got := <-began; got == first.id {
			t.Errorf("%s leads again", got)
		}
		cancel()
		group.Wait()
		mine := errors.New("mine")
		err := s.leader().RunTerms(t.Context(), func(context.Context) error { return mine })
		if !errors.Is(err, mine) {
			t.Errorf("run terms: %v, want the error of the term", err)
		}
	})
}

func TestFollowerCatchesUpBySnapshot(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, s *testSwarm) {
		s.configure(&api.RaftConfig{SnapshotInterval: 20, LogEntriesForSlowFollowers: 5})
		late := s.followers()[0]
		late.stop()
		ids := names("c", 100)
		for _, id := range ids { // above 4 MiB, so that the snapshot is sent in parts
			_, err := s.leader().Update(t.Context(), func(tx *store.Tx) error {
				return createConfig(tx, id, strings.Repeat(id, 20_000))
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		late = s.restart(late)
		cursor := late.Follow()
		s.mustHave(late, ids...)
		if _, reset := cursor.Drain(); !reset {
			t.Error("the follower did not restore a snapshot")
		}
		s.write("after")
		s.mustHave(late, "after")
		late.stop()
		s.mustHave(s.restart(late), append(ids, "after")...)
	})
}

func TestMembersComeAndGo(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, s *testSwarm) {
		leader, gone := s.leader(), s.followers()[0]
		id := gone.members.Load().self
		if err := leader.RemoveMember(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		<-gone.done
		if !errors.Is(gone.err, ErrRemoved) {
			t.Errorf("run of the removed member: %v", gone.err)
		}
		if n := len(leader.Members()); n != 2 {
			t.Errorf("%d members are left", n)
		}
		s.write("without")
		back := s.restart(gone) // it still has its log, and learns that it is out
		<-back.done
		if !errors.Is(back.err, ErrRemoved) {
			t.Errorf("run of the removed member after a restart: %v", back.err)
		}
		if err := leader.RemoveMember(t.Context(), id); err != nil {
			t.Errorf("removing it again: %v", err)
		}
		s.mustHave(s.add(), "without")
	})
}

// A member that was away while it was removed is told by those who are left.
func TestRemovedWhileAway(t *testing.T) {
	inBubble(t, 4, func(t *testing.T, s *testSwarm) {
		leader, away := s.leader(), s.followers()[0]
		away.stop()
		waitFor(t, "it is unreachable", func() bool { return !leader.peers.active(away.members.Load().self) })
		if err := leader.RemoveMember(t.Context(), away.members.Load().self); err != nil {
			t.Fatal(err)
		}
		away = s.restart(away)
		<-away.done
		if !errors.Is(away.err, ErrRemoved) {
			t.Errorf("run: %v", away.err)
		}
	})
}

func TestRemovalKeepsQuorum(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, s *testSwarm) {
		leader, followers := s.leader(), s.followers()
		down := followers[0].members.Load().self
		followers[0].stop()
		waitFor(t, "it is unreachable", func() bool { return !leader.peers.active(down) })
		err := leader.RemoveMember(t.Context(), followers[1].members.Load().self)
		if !errors.Is(err, errQuorum) {
			t.Errorf("removing the last reachable follower: %v", err)
		}
		if err := leader.RemoveMember(t.Context(), down); err != nil {
			t.Errorf("removing the one that is down: %v", err)
		}
	})
}

func TestLeaderRemovesItself(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, s *testSwarm) {
		old := s.leader()
		if err := old.RemoveMember(t.Context(), old.members.Load().self); err != nil {
			t.Fatal(err)
		}
		<-old.done
		if !errors.Is(old.err, ErrRemoved) {
			t.Errorf("run: %v", old.err)
		}
		s.write("after")
		waitFor(t, "two are left", func() bool { return len(s.leader().Members()) == 2 })
	})
}

func createLog(t *testing.T, dir string, self *api.RaftMember) {
	t.Helper()
	data, err := proto.Marshal(self)
	if err != nil {
		t.Fatal(err)
	}
	log, err := disk.Create(dir, data, testKey(), testLog())
	if err == nil {
		err = log.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
}

// A new manager was demoted before it had a vote, while it was away: without one it never
// asked for votes, heard of no leader and of no removal, and stayed as it was for ever.
func TestRemovedBeforeItVoted(t *testing.T) {
	inBubble(t, 1, func(t *testing.T, s *testSwarm) {
		first := s.nodes[0]
		second := &api.RaftMember{NodeId: "node2", Addr: "10.0.0.2:2377"}
		var err error
		if second.RaftId, err = first.AddMember(t.Context(), second.GetNodeId(), second.GetAddr()); err != nil {
			t.Fatal(err)
		}
		dir := filepath.Join(s.base, "2")
		if err := saveJoined(dir, membershipOf(first.members.Load())); err != nil {
			t.Fatal(err)
		}
		createLog(t, dir, second)
		if err := first.RemoveMember(t.Context(), second.GetRaftId()); err != nil {
			t.Fatal(err)
		}
		n := s.start(second.GetNodeId(), dir, second.GetAddr(), "")
		s.nodes = append(s.nodes, n)
		waitFor(t, "it hears of it", func() bool { return n.ended(ErrRemoved) })
	})
}

// The answer to a manager that joined a single one was lost: now there were two, without the
// other one nobody led, and without a leader the other one could not ask again.
func TestLostJoinTakesNoQuorum(t *testing.T) {
	inBubble(t, 1, func(t *testing.T, s *testSwarm) {
		first := s.nodes[0]
		id, err := first.AddMember(t.Context(), "node2", "10.0.0.2:2377")
		if err != nil {
			t.Fatal(err)
		}
		s.write("before")
		first.stop()
		first = s.restart(first)
		s.write("after")
		if n := len(first.Members()); n != 2 {
			t.Errorf("%d members", n)
		}
		second := s.add()
		if got := second.members.Load().self; got != id {
			t.Errorf("it joined as %x and was to be %x", got, id)
		}
		waitFor(t, "it has a vote", second.Votes)
		s.mustHave(second, "before", "after")
		first.stop()
		s.away = first
		time.Sleep(time.Minute)
		if leading, _ := second.Leading(); leading {
			t.Error("one of two leads")
		}
	})
}

// The first of two managers was killed when it had told the second that its removal is agreed
// and had not noted it. The second was gone at once, and the first never led again, for it
// needs the second's vote.
func TestSecondOfTwoVotesOnceMore(t *testing.T) {
	inBubble(t, 2, func(t *testing.T, s *testSwarm) {
		first, second := s.leader(), s.followers()[0]
		if err := first.RemoveMember(t.Context(), second.members.Load().self); err != nil {
			t.Fatal(err)
		}
		first.stop()
		second.stop()
		for n, missing := range map[*testNode]uint64{first: 1, second: 0} {
			log, loaded, err := disk.Load(n.dir, testLog(), testKey())
			if err != nil {
				t.Fatal(err)
			}
			last := loaded.Entries[len(loaded.Entries)-1].GetIndex()
			hard := &raftpb.HardState{Term: loaded.HardState.Term, Vote: loaded.HardState.Vote, Commit: new(last - missing)}
			if err := errors.Join(log.Save(hard, nil), log.Close()); err != nil {
				t.Fatal(err)
			}
		}
		first, second = s.restart(first), s.restart(second)
		waitFor(t, "the first leads", func() bool { leading, _ := first.Leading(); return leading })
		mustCreate(t, first, "after")
		waitFor(t, "the second is gone", func() bool { return second.ended(ErrRemoved) })
	})
}

// A worker was promoted and led while a manager was away that knew it as a worker: it refused
// all that the leader sent, for ever.
func TestLeaderPromotedWhileAway(t *testing.T) {
	now := time.Now()
	root, err := pki.NewRoot(cryptorand.Reader, now)
	if err != nil {
		t.Fatal(err)
	}
	issue := func(role string, at time.Time) ([]byte, *x509.Certificate) {
		key, err := pki.NewKey(cryptorand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		csr, err := pki.NewCSR(cryptorand.Reader, key)
		if err != nil {
			t.Fatal(err)
		}
		chain, err := root.Issue(cryptorand.Reader, at, csr, pki.Leaf{NodeID: "node4", ClusterID: "swarm", OU: role})
		if err != nil {
			t.Fatal(err)
		}
		certs, err := pki.ParseCerts(chain)
		if err != nil {
			t.Fatal(err)
		}
		return chain, certs[0]
	}
	_, demoted := issue(pki.ManagerRole, now.Add(time.Minute))
	chain, _ := issue(pki.WorkerRole, now.Add(2*time.Minute))
	_, promoted := issue(pki.ManagerRole, now.Add(3*time.Minute))
	inBubble(t, 3, func(t *testing.T, s *testSwarm) {
		shown := promoted
		s.change = func(c *Config) { c.CallerCertificate = func(context.Context) *x509.Certificate { return shown } }
		node := &api.Node{Id: "node4", Spec: new(api.NodeSpec), Role: api.NodeRole_WORKER, Certificate: &api.Certificate{Certificate: chain}}
		if _, err := s.leader().Update(t.Context(), func(tx *store.Tx) error { return tx.Create(node) }); err != nil {
			t.Fatal(err)
		}
		away, other := s.followers()[0], s.followers()[1]
		waitFor(t, "the worker is known", func() bool { return away.View().Node("node4") != nil })
		away.stop()
		if _, err := s.leader().Update(t.Context(), func(tx *store.Tx) error {
			n := model.Clone(tx.Snapshot().Node("node4"))
			n.Role, n.Spec.DesiredRole = api.NodeRole_MANAGER, api.NodeRole_MANAGER
			return tx.Update(n)
		}); err != nil {
			t.Fatal(err)
		}
		fresh := s.add()
		waitFor(t, "the new member leads", func() bool {
			if leading, _ := fresh.Leading(); leading {
				return true
			}
			_ = s.leader().TransferLeadership(t.Context())
			return false
		})
		other.stop() // who knows its address, and without whom nothing is agreed but with the one that was away
		away = s.restart(away)
		s.write("after")
		s.mustHave(away, "after")
		stale := New(Config{Caller: testCaller, CallerCertificate: func(context.Context) *x509.Certificate { return shown }})
		tx := store.Begin(store.Empty(), 1, time.Now())
		if err := tx.Create(&api.Node{Id: "node4", Spec: new(api.NodeSpec), Role: api.NodeRole_WORKER, Certificate: node.GetCertificate()}); err != nil {
			t.Fatal(err)
		}
		stale.feed = newFeed(tx.Commit(1))
		from4 := metadata.NewIncomingContext(t.Context(), metadata.Pairs(nodeHeader, "node4"))
		for cert, want := range map[*x509.Certificate]codes.Code{promoted: codes.OK, demoted: codes.PermissionDenied, nil: codes.PermissionDenied} {
			shown = cert
			if err := stale.checkSender(from4, new(roster), 99); status.Code(err) != want {
				t.Errorf("a member that is known to be a worker: %v, want %v", err, want)
			}
		}
	})
}

// A member that was away while another joined and became leader learns its address.
func TestUnknownLeaderIsResolved(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, s *testSwarm) {
		away := s.followers()[0]
		away.stop()
		fresh := s.add()
		waitFor(t, "the new member leads", func() bool {
			if leading, _ := fresh.Leading(); leading {
				return true
			}
			_ = s.leader().TransferLeadership(t.Context())
			return false
		})
		s.write("after")
		s.mustHave(s.restart(away), "after")
	})
}

// The second manager was killed when it had joined and had no log yet, the first one was
// restarted too, and neither became leader: the first needs a vote of the second, which did
// not know whom to send it to.
func TestJoinedWithoutLog(t *testing.T) {
	inBubble(t, 2, func(t *testing.T, s *testSwarm) {
		s.write("before")
		first, second := s.nodes[0], s.nodes[1]
		first.stop()
		second.stop()
		if err := disk.RemoveAll(second.dir); err != nil {
			t.Fatal(err)
		}
		createLog(t, second.dir, &api.RaftMember{RaftId: second.members.Load().self, NodeId: second.id, Addr: second.addr})
		s.restart(first)
		second = s.restart(second)
		s.write("after")
		s.mustHave(second, "before", "after")
	})
}

func TestRejoinWithAnotherAddress(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, s *testSwarm) {
		n := s.followers()[0]
		id := n.members.Load().self
		n.stop()
		moved := s.start(n.id, n.dir, "10.0.0.99:2377", s.leader().addr)
		s.nodes = append(s.nodes, moved)
		waitFor(t, "it is known at its new address", func() bool {
			return s.leader().members.Load().members[id].GetAddr() == moved.addr
		})
		s.write("after")
		s.mustHave(moved, "after")
	})
}

func TestForceNewCluster(t *testing.T) {
	for _, snapshots := range []uint64{0, 10} {
		t.Run(fmt.Sprint("snapshot interval ", snapshots), func(t *testing.T) {
			inBubble(t, 3, func(t *testing.T, s *testSwarm) {
				s.configure(&api.RaftConfig{SnapshotInterval: snapshots})
				ids := names("c", 30)
				s.write(ids...)
				last := s.followers()[0]
				s.mustHave(last, ids...)
				for _, n := range s.nodes {
					n.stop()
				}
				s.nodes = []*testNode{last}
				s.change = func(c *Config) { c.ForceNewCluster = true }
				last = s.restart(last)
				s.write("alone")
				s.mustHave(last, ids...)
				if n := len(last.Members()); n != 1 {
					t.Errorf("%d members", n)
				}
				last.stop()
				s.change = nil
				s.restart(last)
				s.mustHave(s.leader(), append(ids, "alone")...)
				s.write("again")
			})
		})
	}
}

func TestLeavesNothingBehind(t *testing.T) {
	// The bubble fails when a goroutine is left.
	base := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		r := New(Config{NodeID: "n", Addr: "a:1", Dir: base, Keys: testKey(), Log: testLog(), Caller: testCaller})
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		var group sync.WaitGroup
		group.Go(func() {
			if err := r.Run(ctx); err != nil {
				t.Errorf("run: %v", err)
			}
		})
		group.Wait()
		_, err := r.Update(t.Context(), func(*store.Tx) error { return nil })
		wantKind(t, err, model.Unavailable)
		if err := r.RemoveMember(t.Context(), 1); err == nil {
			t.Error("a stopped member changed the membership")
		}
	})
}
