package store

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"pgregory.net/rapid"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

func now() time.Time { return time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC) }

func service(id, name string) *api.Service {
	return &api.Service{Id: id, Spec: &api.ServiceSpec{Annotations: &api.Annotations{Name: name}}}
}

// commit makes one change on top of s at the next index.
func commit(t testing.TB, s *Snapshot, fn func(*Tx) error) *Snapshot {
	t.Helper()
	tx := Begin(s, s.Index(), now())
	if err := fn(tx); err != nil {
		t.Fatal(err)
	}
	return tx.Commit(s.Index() + 1)
}

// contents returns everything in a snapshot, tables and indexes, for comparison.
func contents(s *Snapshot) map[string]any {
	out := make(map[string]any)
	for t := range model.TableCount {
		s.tables[t].scan(func(k string, o model.Object) bool { out[fmt.Sprint("table ", t, k)] = o; return true })
		s.names[t].scan(func(k, id string) bool { out[fmt.Sprint("name ", t, k)] = id; return true })
	}
	s.hostnames.scan(func(k string, _ struct{}) bool { out["host "+k] = true; return true })
	s.tasksByService.scan(func(k string, o *api.Task) bool { out["service "+k] = o; return true })
	s.tasksByNode.scan(func(k string, o *api.Task) bool { out["node "+k] = o; return true })
	return out
}

func TestUpdateOutOfSequence(t *testing.T) {
	s := commit(t, Empty(), func(tx *Tx) error { return tx.Create(service("s", "web")) })
	stale := model.Clone(s.Service("s"))
	s = commit(t, s, func(tx *Tx) error { return tx.Update(model.Clone(s.Service("s"))) })
	err := Begin(s, s.Index(), now()).Update(stale)
	if !errors.Is(err, model.ErrSequence) {
		t.Errorf("update from a stale copy: %v, want %v", err, model.ErrSequence)
	}
}

func TestWriteRules(t *testing.T) {
	base := commit(t, Empty(), func(tx *Tx) error {
		return errors.Join(
			tx.Create(service("s", "Web")),
			tx.Create(&api.Extension{Id: "e", Annotations: &api.Annotations{Name: "kind"}}),
		)
	})
	tests := []struct {
		name string
		do   func(*Tx) error
		want model.Kind
	}{
		{"create with a taken id", func(tx *Tx) error { return tx.Create(service("s", "other")) }, model.Exists},
		{"create with a taken name", func(tx *Tx) error { return tx.Create(service("s2", "wEB")) }, model.Exists},
		{"update what is not there", func(tx *Tx) error { return tx.Update(service("s2", "x")) }, model.NotFound},
		{"remove what is not there", func(tx *Tx) error { return tx.Remove(model.Tasks, "t") }, model.NotFound},
		{"update an extension", func(tx *Tx) error { return tx.Update(model.Clone(base.Get(model.Extensions, "e"))) }, model.Invalid},
		{"resource of no extension", func(tx *Tx) error { return tx.Create(&api.Resource{Id: "r", Kind: "none"}) }, model.Invalid},
		{"create without id", func(tx *Tx) error { return tx.Create(&api.Task{}) }, model.Internal},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			tx := Begin(base, base.Index(), now())
			if err := tt.do(tx); err == nil || model.KindOf(err) != tt.want {
				t.Errorf("got %v (kind %d), want kind %d", err, model.KindOf(err), tt.want)
			}
			if !tx.Empty() {
				t.Error("a refused change was recorded")
			}
		})
	}
}

func TestApplyRefusesBrokenActions(t *testing.T) {
	tests := map[string]*api.StoreAction{
		"no target":    {Action: api.StoreActionKind_STORE_ACTION_CREATE},
		"nil target":   {Action: api.StoreActionKind_STORE_ACTION_CREATE, Target: &api.StoreAction_Node{}},
		"empty target": {Action: api.StoreActionKind_STORE_ACTION_CREATE, Target: &api.StoreAction_Task{Task: &api.Task{}}},
		"unknown kind": {Target: &api.StoreAction_Task{Task: &api.Task{Id: "t"}}},
		"future kind":  {Action: 17, Target: &api.StoreAction_Task{Task: &api.Task{Id: "t"}}},
		"update of nothing": {
			Action: api.StoreActionKind_STORE_ACTION_UPDATE, Target: &api.StoreAction_Task{Task: &api.Task{Id: "t"}},
		},
	}
	for name, action := range tests {
		t.Run(name, func(t *testing.T) {
			good := storeAction(api.StoreActionKind_STORE_ACTION_CREATE, service("s", "web"))
			if _, _, err := ApplyActions(Empty(), 1, []*api.StoreAction{good, action}); err == nil {
				t.Error("applied")
			}
		})
	}
}

// What a newer version of the program wrote survives edits and snapshots by this one.
func TestUnknownFieldsSurvive(t *testing.T) {
	unknown := protowire.AppendString(protowire.AppendTag(nil, 4711, protowire.BytesType), "from the future")
	o := service("s", "web")
	o.ProtoReflect().SetUnknown(unknown)
	o.Meta = &api.Meta{Version: &api.Version{Index: 3}}
	o.Meta.ProtoReflect().SetUnknown(unknown)
	data, err := proto.Marshal(storeAction(api.StoreActionKind_STORE_ACTION_CREATE, o))
	if err != nil {
		t.Fatal(err)
	}
	action := new(api.StoreAction)
	if err := proto.Unmarshal(data, action); err != nil {
		t.Fatal(err)
	}
	s, _, err := ApplyActions(Empty(), 4, []*api.StoreAction{action})
	if err != nil {
		t.Fatal(err)
	}
	s = commit(t, s, func(tx *Tx) error {
		edited := model.Clone(tx.Snapshot().Service("s"))
		edited.Spec.Annotations.Name = "renamed"
		return tx.Update(edited)
	})
	data, err = proto.Marshal(Encode(s))
	if err != nil {
		t.Fatal(err)
	}
	stored := new(api.StoreSnapshot)
	if err := proto.Unmarshal(data, stored); err != nil {
		t.Fatal(err)
	}
	got := Decode(stored, 9).Service("s")
	if !slices.Equal(got.ProtoReflect().GetUnknown(), unknown) {
		t.Errorf("unknown field of the service is %q", got.ProtoReflect().GetUnknown())
	}
	if !slices.Equal(got.GetMeta().ProtoReflect().GetUnknown(), unknown) {
		t.Errorf("unknown field of its meta is %q", got.GetMeta().ProtoReflect().GetUnknown())
	}
}

// draw returns a random record; few ids and names, so that they clash.
func draw(t *rapid.T) model.Object {
	id := rapid.SampledFrom([]string{"a", "b", "c", "d"}).Draw(t, "id")
	name := rapid.SampledFrom([]string{"", "x", "X", "y", "z"}).Draw(t, "name")
	ann := &api.Annotations{Name: name}
	switch model.Table(rapid.IntRange(0, model.TableCount-1).Draw(t, "table")) {
	case model.Nodes:
		return &api.Node{Id: id, Description: &api.NodeDescription{Hostname: name}}
	case model.Services:
		return &api.Service{Id: id, Spec: &api.ServiceSpec{Annotations: ann}}
	case model.Networks:
		return &api.Network{Id: id, Spec: &api.NetworkSpec{Annotations: ann}}
	case model.Clusters:
		return &api.Cluster{Id: id, Spec: &api.ClusterSpec{Annotations: ann}}
	case model.Secrets:
		return &api.Secret{Id: id, Spec: &api.SecretSpec{Annotations: ann}}
	case model.Configs:
		return &api.Config{Id: id, Spec: &api.ConfigSpec{Annotations: ann}}
	case model.Volumes:
		return &api.Volume{Id: id, Spec: &api.VolumeSpec{Annotations: ann}}
	case model.Resources:
		return &api.Resource{Id: id, Annotations: ann, Kind: rapid.SampledFrom([]string{"x", "q"}).Draw(t, "kind")}
	case model.Extensions:
		return &api.Extension{Id: id, Annotations: ann}
	default:
		return &api.Task{Id: id, ServiceId: name, NodeId: rapid.SampledFrom([]string{"", "n", "m"}).Draw(t, "node")}
	}
}

// write makes one random change; refusals are fine.
func write(t *rapid.T, tx *Tx) {
	o := draw(t)
	table := model.TableOf(o)
	var err error
	switch rapid.IntRange(0, 3).Draw(t, "kind") {
	case 0:
		err = tx.Remove(table, o.GetId())
	case 1:
		err = tx.Create(o)
	default:
		if old := tx.Snapshot().Get(table, o.GetId()); old != nil {
			setMeta(o, model.Clone(old.GetMeta()))
		}
		err = tx.Update(o)
	}
	if err != nil && model.KindOf(err) == model.Internal {
		t.Fatalf("write: %v", err)
	}
}

// Over any history: a follower that applies the entries is equal to the leader, the
// indexes are those of a state built from scratch, old snapshots never change, and the
// versions of a record increase.
func TestHistories(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		leader, follower := Empty(), Empty()
		type frozen struct {
			s    *Snapshot
			want map[string]any
		}
		var old []frozen
		for range rapid.IntRange(1, 30).Draw(t, "entries") {
			tx := Begin(leader, leader.Index(), now())
			for range rapid.IntRange(0, 4).Draw(t, "changes") {
				write(t, tx)
			}
			if tx.Empty() || rapid.IntRange(0, 4).Draw(t, "drop") == 0 {
				continue // a dropped transaction leaves no trace
			}
			index := leader.Index() + 1
			old = append(old, frozen{leader, contents(leader)})
			data, err := proto.Marshal(&api.InternalRaftRequest{Action: tx.Actions()})
			if err != nil {
				t.Fatal(err)
			}
			leader = tx.Commit(index)
			var entry api.InternalRaftRequest
			if err := proto.Unmarshal(data, &entry); err != nil {
				t.Fatal(err)
			}
			var events []model.Event
			if follower, events, err = ApplyActions(follower, index, entry.GetAction()); err != nil {
				t.Fatalf("apply: %v", err)
			}
			if diff := cmp.Diff(tx.Events(), events, protocmp.Transform()); diff != "" {
				t.Fatalf("events of leader and follower: %s", diff)
			}
			for _, e := range events {
				if e.Kind == model.Update && e.New.GetMeta().GetVersion().GetIndex() <= e.Old.GetMeta().GetVersion().GetIndex() &&
					index > 1 && e.Old.GetMeta().GetVersion().GetIndex() != index-1 {
					t.Fatalf("version of %s did not increase", e.ID())
				}
			}
		}
		if diff := cmp.Diff(contents(leader), contents(follower), protocmp.Transform()); diff != "" {
			t.Fatalf("leader and follower: %s", diff)
		}
		rebuilt := Decode(Encode(leader), leader.Index())
		if diff := cmp.Diff(contents(rebuilt), contents(leader), protocmp.Transform()); diff != "" {
			t.Fatalf("from scratch and incremental: %s", diff)
		}
		for _, f := range old {
			if got := contents(f.s); !maps.EqualFunc(got, f.want, func(a, b any) bool { return a == b }) {
				t.Fatalf("the snapshot at %d changed", f.s.Index())
			}
		}
	})
}

// Several goroutines may begin transactions on one snapshot; the race detector watches.
func TestConcurrentTransactions(t *testing.T) {
	s := withTasks(t, 100)
	done := make(chan int)
	for g := range 4 {
		go func() {
			for i := range 100 {
				tx := Begin(s, s.Index(), now())
				id := fmt.Sprintf("g%d-%d", g, i)
				if err := tx.Create(&api.Task{Id: id}); err != nil {
					t.Error(err)
				}
				if tx.Commit(s.Index()+1).Task(id) == nil || s.Task(id) != nil {
					t.Errorf("task %s is in the wrong state", id)
				}
			}
			done <- g
		}()
	}
	for range 4 {
		<-done
	}
}

func withTasks(t testing.TB, n int) *Snapshot {
	t.Helper()
	return commit(t, Empty(), func(tx *Tx) error {
		for i := range n {
			task := &api.Task{
				Id: fmt.Sprintf("task%09d", i), ServiceId: fmt.Sprintf("service%d", i%50), NodeId: fmt.Sprintf("node%d", i%20),
			}
			if err := tx.Create(task); err != nil {
				return err
			}
		}
		return nil
	})
}

// change edits one task, as the leader does for each status.
func change(t testing.TB, s *Snapshot, id string) *Snapshot {
	t.Helper()
	return commit(t, s, func(tx *Tx) error {
		task := model.Clone(tx.Snapshot().Task(id))
		task.Status = &api.TaskStatus{State: api.TaskState_RUNNING}
		return tx.Update(task)
	})
}

// The cost of one change must not grow with what exists, but for the depth of the
// trees: a hundred times as much is one or two levels more, of 4 allocations, in three of them.
func TestCostOfAChangeIsFlat(t *testing.T) {
	cost := func(n int) float64 {
		s := withTasks(t, n)
		return testing.AllocsPerRun(100, func() { change(t, s, "task000000500") })
	}
	small, large := cost(1_000), cost(100_000)
	if large > 2*small {
		t.Errorf("a change costs %.0f allocations at 1,000 tasks and %.0f at 100,000", small, large)
	}
}

func BenchmarkChange(b *testing.B) {
	for _, n := range []int{1_000, 100_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			s := withTasks(b, n)
			b.ReportAllocs()
			for b.Loop() {
				change(b, s, "task000000500")
			}
		})
	}
}

func FuzzEntry(f *testing.F) {
	for _, o := range []model.Object{service("s", "web"), &api.Task{Id: "t", ServiceId: "s", NodeId: "n"}} {
		data, err := proto.Marshal(&api.InternalRaftRequest{
			Id: 1, Action: []*api.StoreAction{storeAction(api.StoreActionKind_STORE_ACTION_CREATE, o)},
		})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var entry api.InternalRaftRequest
		if proto.Unmarshal(data, &entry) != nil {
			return
		}
		base := withTasks(t, 3)
		before := contents(base)
		s, _, err := ApplyActions(base, 2, entry.GetAction())
		if !maps.EqualFunc(contents(base), before, func(a, b any) bool { return a == b }) {
			t.Error("applying changed the state applied to")
		}
		if err != nil {
			return
		}
		rebuilt := Decode(Encode(s), s.Index())
		if diff := cmp.Diff(contents(rebuilt), contents(s), protocmp.Transform()); diff != "" {
			t.Errorf("from scratch and incremental: %s", diff)
		}
	})
}

func FuzzSnapshot(f *testing.F) {
	data, err := proto.Marshal(Encode(withTasks(f, 3)))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Fuzz(func(t *testing.T, data []byte) {
		var in api.StoreSnapshot
		if proto.Unmarshal(data, &in) != nil {
			return
		}
		s := Decode(&in, 7)
		again := Decode(Encode(s), 7)
		if diff := cmp.Diff(contents(again), contents(s), protocmp.Transform()); diff != "" {
			t.Errorf("decoding what was encoded: %s", diff)
		}
	})
}
