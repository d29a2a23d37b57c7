package dispatcher

import (
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/store"
)

func TestFirstMessageIsComplete(t *testing.T) {
	inTerm(t, func(r *rig) {
		c := r.session("n1", "")
		m := c.next()
		if len(m.GetSessionId()) != 25 {
			t.Errorf("session id %q", m.GetSessionId())
		}
		if m.GetNode().GetId() != "n1" || string(m.GetRootCA()) != "root" || len(m.GetNetworkBootstrapKeys()) != 1 {
			t.Errorf("got %v", m)
		}
		if p := m.GetManagers(); len(p) != 1 || p[0].GetPeer().GetAddr() != "10.0.0.1:2377" || p[0].GetPeer().GetNodeId() != "m1" || p[0].GetWeight() != 10 {
			t.Errorf("managers %v", p)
		}
		// The first message waits until the state knows the node.
		n := r.state.View().Node("n1")
		if n.GetStatus().GetState() != api.NodeStatus_READY || n.GetStatus().GetAddr() != "192.0.2.7" || n.GetDescription().GetHostname() != "host of n1" {
			t.Errorf("node is %v", n)
		}
	})
}

func TestMessagesWhenSomethingChanges(t *testing.T) {
	inTerm(t, func(r *rig) {
		c, _ := r.register("n1")
		c.quiet()
		r.update(func(tx *store.Tx) error {
			n := model.Clone(tx.Snapshot().Node("n1"))
			n.Spec.DesiredRole = api.NodeRole_MANAGER
			return tx.Update(n)
		})
		if m := c.next(); m.GetNode().GetSpec().GetDesiredRole() != api.NodeRole_MANAGER {
			t.Errorf("after the node changed: %v", m)
		}
		r.update(func(tx *store.Tx) error {
			c := model.Clone(tx.Snapshot().Cluster())
			c.RootCa.CaCert = []byte("root 2")
			return tx.Update(c)
		})
		if m := c.next(); string(m.GetRootCA()) != "root 2" {
			t.Errorf("after the cluster changed: %v", m)
		}
		r.update(func(tx *store.Tx) error {
			n := model.Clone(tx.Snapshot().Node("n2"))
			n.Spec.Annotations = &api.Annotations{Name: "other"}
			return tx.Update(n)
		})
		c.quiet()
	})
}

// A worker that does not hear of new managers has nowhere to go when the old ones die.
func TestMessageWhenManagersChange(t *testing.T) {
	inTerm(t, func(r *rig) {
		c, _ := r.register("n1")
		second := &api.RaftMember{NodeId: "m2", Addr: "10.0.0.2:2377"}
		r.setMembers(&api.RaftMember{NodeId: "m1", Addr: "10.0.0.1:2377"}, second)
		time.Sleep(time.Second)
		if m := c.next(); len(m.GetManagers()) != 2 {
			t.Errorf("managers %v", m.GetManagers())
		}
		r.setMembers(second)
		time.Sleep(time.Second)
		if m := c.next(); len(m.GetManagers()) != 1 || m.GetManagers()[0].GetPeer().GetNodeId() != "m2" {
			t.Errorf("managers %v", m.GetManagers())
		}
		c.quiet()
	})
}

func TestResumeKeepsTheSession(t *testing.T) {
	inTerm(t, func(r *rig) {
		first, id := r.register("n1")
		first.end()
		synctest.Wait()
		again := r.session("n1", id)
		if got := again.next().GetSessionId(); got != id {
			t.Errorf("resumed session has id %s, want %s", got, id)
		}
		if _, err := r.heartbeat("n1", id); err != nil {
			t.Error(err)
		}
		// The id of another node's session is worth nothing.
		if got := r.session("n2", id).next().GetSessionId(); got == id {
			t.Errorf("node n2 took over session %s of n1", id)
		}
	})
}

func TestNewRegistrationReplacesTheOld(t *testing.T) {
	inTerm(t, func(r *rig) {
		old, oldID := r.register("n1")
		feed := r.assignments("n1", oldID)
		feed.next()
		_, id := r.register("n1")
		if id == oldID {
			t.Fatal("the session id did not change")
		}
		old.ended(codes.InvalidArgument, "session invalid")
		feed.ended(codes.InvalidArgument, "session invalid")
		_, err := r.heartbeat("n1", oldID)
		wantStatus(t, err, codes.InvalidArgument, "session invalid")
		wantStatus(t, r.report("n1", oldID, "t", api.TaskState_RUNNING), codes.InvalidArgument, "session invalid")
		if _, err := r.heartbeat("n1", id); err != nil {
			t.Error(err)
		}
	})
}

func TestRefusals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.session("n1", "").ended(codes.Aborted, "dispatcher is stopped")
		_, err := r.heartbeat("n1", "x")
		wantStatus(t, err, codes.Aborted, "dispatcher is stopped")
		r.lead()
		_, err = r.heartbeat("n1", "x")
		wantStatus(t, err, codes.NotFound, "node not registered")
		r.assignments("n1", "x").ended(codes.NotFound, "node not registered")
		r.session("n3", "").ended(codes.Unknown, "node not found")
		c, id := r.register("n1")
		_, err = r.heartbeat("n1", "")
		wantStatus(t, err, codes.InvalidArgument, "session invalid")
		_, err = r.heartbeat("n2", id)
		wantStatus(t, err, codes.NotFound, "node not registered")
		feed := r.assignments("n1", id)
		feed.next()
		r.stop()
		c.ended(codes.Aborted, "dispatcher is stopped")
		feed.ended(codes.Aborted, "dispatcher is stopped")
	})
}

func TestRegistrationsAreLimited(t *testing.T) {
	inTerm(t, func(r *rig) {
		for range 1 + rateLimit { // the first does not count
			r.register("n1")
		}
		r.session("n1", "").ended(codes.Unavailable, "node n1 exceeded rate limit count of registrations")
		r.register("n2") // others are not concerned
		for range 20 {
			time.Sleep(ratePause)
			r.register("n1")
		}
		r.session("n1", "").ended(codes.Unavailable, "node n1 exceeded rate limit count of registrations")
	})
}

func TestHeartbeatPeriod(t *testing.T) {
	inTerm(t, func(r *rig) {
		_, id := r.register("n1")
		spread := func(want time.Duration) {
			t.Helper()
			least, most := time.Hour, time.Duration(0)
			for range 200 {
				p, err := r.heartbeat("n1", id)
				if err != nil {
					t.Fatal(err)
				}
				least, most = min(least, p), max(most, p)
			}
			if least < want*9/10 || most > want*11/10 || most-least < want/10 {
				t.Errorf("periods from %v to %v, want %v with a tenth of jitter", least, most, want)
			}
		}
		spread(skepPeriod)
		r.update(func(tx *store.Tx) error {
			c := model.Clone(tx.Snapshot().Cluster())
			c.Spec.Dispatcher.HeartbeatPeriod = durationpb.New(20 * time.Second)
			return tx.Update(c)
		})
		spread(20 * time.Second)
	})
}

func TestSilentNodeIsLost(t *testing.T) {
	inTerm(t, func(r *rig) {
		lost, lostID := r.register("n1")
		feed := r.assignments("n1", lostID)
		feed.next()
		_, id := r.register("n2")
		var down time.Duration
		for began := time.Now(); time.Since(began) < 20*time.Second; time.Sleep(skepPeriod / 2) {
			if _, err := r.heartbeat("n2", id); err != nil {
				t.Fatalf("a node with heartbeats was lost after %v: %v", time.Since(began), err)
			}
			if down == 0 && r.nodeStatus("n1").GetState() == api.NodeStatus_DOWN {
				down = time.Since(began)
			}
		}
		if down < graceFactor*skepPeriod-time.Second || down > 9*time.Second {
			t.Errorf("the silent node was down after %v", down)
		}
		if s := r.nodeStatus("n1"); s.GetMessage() != "heartbeat failure" || s.GetAddr() != "192.0.2.7" {
			t.Errorf("status %v", s)
		}
		lost.ended(codes.Aborted, "node must disconnect")
		feed.ended(codes.Aborted, "node must disconnect")
		_, err := r.heartbeat("n1", lostID)
		wantStatus(t, err, codes.NotFound, "node not registered")
		r.register("n1")
		if s := r.nodeStatus("n1"); s.GetState() != api.NodeStatus_READY || s.GetMessage() != "" {
			t.Errorf("after it came back: %v", s)
		}
	})
}

// A leader whose machine was paused has heard nobody meanwhile; that is not their silence.
func TestPausedLeaderLosesNobody(t *testing.T) {
	inTerm(t, func(r *rig) {
		_, id := r.register("n1")
		r.mu.Lock()
		r.pause = time.Minute
		r.mu.Unlock()
		time.Sleep(time.Minute + time.Second)
		if _, err := r.heartbeat("n1", id); err != nil {
			t.Errorf("after the pause: %v", err)
		}
		time.Sleep((graceFactor + 1) * skepPeriod)
		if s := r.nodeStatus("n1"); s.GetState() != api.NodeStatus_DOWN {
			t.Errorf("a node that is silent after the pause: %v", s)
		}
	})
}

func TestNewLeaderKnowsNoNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.lead()
		r.register("n1")
		r.register("n2")
		r.stop()
		r.lead()
		defer func() { r.stop() }()
		for _, id := range []string{"n1", "n2"} {
			if s := r.nodeStatus(id); s.GetState() != api.NodeStatus_UNKNOWN || s.GetMessage() != `Node moved to "unknown" state due to leadership change in cluster` {
				t.Errorf("node %s is %v", id, s)
			}
		}
		_, id := r.register("n1")
		for range 20 {
			if _, err := r.heartbeat("n1", id); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
		}
		if s := r.nodeStatus("n1"); s.GetState() != api.NodeStatus_READY {
			t.Errorf("the node that came is %v", s)
		}
		if s := r.nodeStatus("n2"); s.GetState() != api.NodeStatus_DOWN || s.GetMessage() != `heartbeat failure for node in "unknown" state` {
			t.Errorf("the node that did not come is %v", s)
		}
	})
}

func TestRemovedNodeMustDisconnect(t *testing.T) {
	inTerm(t, func(r *rig) {
		c, id := r.register("n1")
		feed := r.assignments("n1", id)
		feed.next()
		r.update(func(tx *store.Tx) error { return tx.Remove(model.Nodes, "n1") })
		c.ended(codes.Aborted, "node must disconnect")
		feed.ended(codes.Aborted, "node must disconnect")
		_, err := r.heartbeat("n1", id)
		wantStatus(t, err, codes.NotFound, "node not registered")
	})
}
