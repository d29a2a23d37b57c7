package dispatcher

import (
	"fmt"
	"testing"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/store"
)

// BenchmarkFanOut measures one new task on its way from the state to the message for its
// node, at different numbers of nodes with a session.
func BenchmarkFanOut(b *testing.B) {
	for _, nodes := range []int{1_000, 10_000} {
		b.Run(fmt.Sprintf("nodes=%d", nodes), func(b *testing.B) {
			t := &term{nodes: map[string]*node{}}
			events := make([]model.Event, nodes)
			for i := range events {
				id := fmt.Sprint("node", i)
				t.nodes[id] = &node{feed: newFeed()}
				events[i] = model.Event{Kind: model.Create, Table: model.Tasks, New: &api.Task{
					Id: fmt.Sprint("task", i), NodeId: id, Spec: new(api.TaskSpec),
					Status: &api.TaskStatus{State: api.TaskState_ASSIGNED},
				}}
			}
			view := store.Empty()
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				at := i % nodes
				t.deliver(events[at])
				taken, _ := t.nodes[fmt.Sprint("node", at)].feed.take()
				sent := &assigned{tasks: map[string]bool{}}
				if changes := sent.apply(view, taken); len(changes) != 1 {
					b.Fatalf("%d changes for one task", len(changes))
				}
			}
		})
	}
}
