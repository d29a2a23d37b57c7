package sched

import (
	"fmt"
	"maps"
	"slices"
	"testing"

	"github.com/skep-dev/skep/api"
)

// fleet returns nodes in ten zones.
func fleet(count int) []*api.Node {
	nodes := make([]*api.Node, count)
	for i := range nodes {
		nodes[i] = testNode(fmt.Sprintf("node%05d", i), func(n *api.Node) {
			n.Description.Resources = &api.Resources{NanoCpus: 1e15, MemoryBytes: 1 << 50}
			n.Spec.Annotations.Labels["zone"] = fmt.Sprint(i % 10)
			n.Spec.Annotations.Labels["host"] = fmt.Sprint(i)
		})
	}
	return nodes
}

// BenchmarkPlace measures one placement, the event that brings the task included.
func BenchmarkPlace(b *testing.B) {
	reserve := func(t *api.Task) { t.Spec.Resources.Reservations = &api.Resources{NanoCpus: 1e6, MemoryBytes: 1 << 20} }
	constrain := func(t *api.Task) { t.Spec.Placement.Constraints = []string{"node.labels.zone==3"} }
	spread := func(key string) func(*api.Task) {
		return func(t *api.Task) { t.Spec.Placement.Preferences = []*api.PlacementPreference{spreadOver(key)} }
	}
	for name, c := range map[string]struct {
		batch  int // tasks that come at once
		life   int // tasks of one service
		change []func(*api.Task)
	}{
		"group":       {batch: 10000, life: 10000, change: []func(*api.Task){reserve}},
		"constrained": {batch: 10000, life: 10000, change: []func(*api.Task){reserve, constrain}},
		"zones":       {batch: 10000, life: 10000, change: []func(*api.Task){reserve, spread("node.labels.zone")}},
		"hosts":       {batch: 10000, life: 10000, change: []func(*api.Task){reserve, spread("node.labels.host")}},
		"single":      {batch: 1, life: 100, change: []func(*api.Task){reserve}},
	} {
		for _, nodes := range []int{1000, 10000} {
			b.Run(fmt.Sprintf("%s/nodes=%d", name, nodes), func(b *testing.B) {
				s := New(slices.Values(fleet(nodes)), func(func(*api.Task) bool) {})
				s.Schedule(epoch())
				b.ReportAllocs()
				placed := 0
				for b.Loop() {
					task := testTask(fmt.Sprintf("s%d", placed/c.life), uint64(placed%c.life)+1, c.change...)
					s.setTask(task)
					if placed++; placed%c.batch == 0 {
						s.Schedule(epoch())
					}
				}
				if waiting := len(s.waiting) + len(s.freshGroups); placed%c.batch == 0 && waiting > 0 {
					b.Fatalf("%d groups wait", waiting)
				}
			})
		}
	}
}

// BenchmarkRestart measures what the end of a task and the placement of the next one cost
// a service that has tasks on every node.
func BenchmarkRestart(b *testing.B) {
	for _, nodes := range []int{1000, 10000} {
		b.Run(fmt.Sprintf("nodes=%d", nodes), func(b *testing.B) {
			s := New(slices.Values(fleet(nodes)), func(func(*api.Task) bool) {})
			for i := range 2 * nodes {
				s.setTask(testTask("web", uint64(i)+1))
			}
			s.Schedule(epoch())
			running := slices.Sorted(maps.Keys(s.known))
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				old := s.known[running[i*7919%len(running)]]
				done := testTask("web", old.GetSlot())
				done.NodeId, done.Status.State = old.GetNodeId(), api.TaskState_COMPLETE
				s.setTask(done)
				s.setTask(testTask("web", old.GetSlot()))
				s.Schedule(epoch())
			}
		})
	}
}

// BenchmarkReplace measures what the end of a task and the placement of the next one cost
// while many groups wait for room that never comes.
func BenchmarkReplace(b *testing.B) {
	for _, waiting := range []int{0, 1000} {
		for _, nodes := range []int{1000, 10000} {
			b.Run(fmt.Sprintf("waiting=%d/nodes=%d", waiting, nodes), func(b *testing.B) {
				s := New(slices.Values(fleet(nodes)), func(func(*api.Task) bool) {})
				for i := range waiting {
					s.setTask(testTask(fmt.Sprintf("big%d", i), 1, func(t *api.Task) { t.Spec.Placement.Constraints = []string{"node.labels.zone==none"} }))
				}
				for i := range nodes / 2 {
					s.setTask(testTask("web", uint64(i)+1))
				}
				s.Schedule(epoch())
				running := slices.Sorted(maps.Keys(s.known))
				b.ReportAllocs()
				for i := 0; b.Loop(); i++ {
					id := running[i%len(running)]
					old := s.known[id]
					if !holds(old) {
						continue
					}
					done := testTask("web", old.GetSlot())
					done.NodeId, done.Status.State = old.GetNodeId(), api.TaskState_COMPLETE
					s.setTask(done)
					s.setTask(testTask("web", old.GetSlot()))
					s.Schedule(epoch())
				}
			})
		}
	}
}
