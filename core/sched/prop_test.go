package sched

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

// machine drives a State and its store through a random life.
type machine struct {
	*cluster
	services int
	gone     int // nodes that went
	specs    map[revision]*api.Task
}

// TestDecidesLikeTheOracle lets nodes, services and tasks come, change and go, and holds
// every decision against a slow, obvious version made from the records alone.
func TestDecidesLikeTheOracle(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := &machine{cluster: newCluster(), specs: make(map[revision]*api.Task)}
		for range rapid.IntRange(1, 4).Draw(t, "nodes") {
			m.node(t)
		}
		t.Repeat(map[string]func(*rapid.T){
			"node":     m.node,
			"service":  m.service,
			"tasks":    m.more,
			"global":   m.global,
			"move":     m.move,
			"end":      m.end,
			"fail":     m.fail,
			"delete":   m.delete,
			"time":     func(t *rapid.T) { m.now = m.now.Add(time.Duration(rapid.IntRange(0, 400).Draw(t, "s")) * time.Second) },
			"schedule": m.check,
			"":         m.account,
		})
	})
}

func drawID[V any](t *rapid.T, from map[string]V, pick func(V) bool) string {
	var ids []string
	for _, id := range slices.Sorted(maps.Keys(from)) {
		if pick(from[id]) {
			ids = append(ids, id)
		}
	}
	if len(ids) == 0 {
		return ""
	}
	return rapid.SampledFrom(ids).Draw(t, "id")
}

// node adds, changes or removes a node.
func (m *machine) node(t *rapid.T) {
	id := fmt.Sprintf("n%d", m.gone+len(m.nodes))
	if len(m.nodes) >= 6 || len(m.nodes) > 0 && rapid.Bool().Draw(t, "known") {
		id = drawID(t, m.nodes, func(*api.Node) bool { return true })
		if rapid.IntRange(0, 5).Draw(t, "remove") == 0 && m.idle(id) {
			m.remove(id)
			m.gone++
			return
		}
	}
	m.put(testNode(id, func(n *api.Node) {
		d := n.GetDescription()
		d.Resources.NanoCpus = rapid.Int64Range(0, 4).Draw(t, "cpu")
		d.Resources.MemoryBytes = rapid.Int64Range(0, 4).Draw(t, "memory")
		d.Platform.Architecture = rapid.SampledFrom([]string{"x86_64", "amd64", "aarch64"}).Draw(t, "arch")
		d.Engine.Labels["zone"] = rapid.SampledFrom([]string{"a", "b"}).Draw(t, "engine zone")
		if rapid.Bool().Draw(t, "plugin") {
			d.Engine.Plugins = []*api.PluginDescription{{Type: "Volume", Name: "nfs"}}
		}
		d.Engine.Plugins = append(d.Engine.Plugins, &api.PluginDescription{
			Type: "Network", Name: rapid.SampledFrom([]string{"overlay", "skep-overlay"}).Draw(t, "kind of node"),
		})
		if rapid.Bool().Draw(t, "generic") {
			d.Resources.Generic = []*api.GenericResource{discrete("ssd", 2), named("gpu", "y"), named("gpu", "x")}
		}
		n.Spec.Annotations.Labels["zone"] = rapid.SampledFrom([]string{"", "a", "b", "c"}).Draw(t, "zone")
		n.Spec.Annotations.Labels["rack"] = rapid.SampledFrom([]string{"1", "2"}).Draw(t, "rack")
		n.Role = api.NodeRole(rapid.Int32Range(0, 1).Draw(t, "role"))
		n.Status.Addr = fmt.Sprintf("10.%d.0.1", rapid.IntRange(0, 1).Draw(t, "ip"))
		if rapid.IntRange(0, 3).Draw(t, "ill") == 0 {
			n.Status.State = rapid.SampledFrom([]api.NodeStatus_State{api.NodeStatus_UNKNOWN, api.NodeStatus_DOWN}).Draw(t, "state")
		}
		if rapid.IntRange(0, 3).Draw(t, "busy") == 0 {
			n.Spec.Availability = rapid.SampledFrom([]api.NodeSpec_Availability{api.NodeSpec_PAUSE, api.NodeSpec_DRAIN}).Draw(t, "availability")
		}
	}))
}

// idle reports whether no task refers to a node; orchestrators see to that before it goes.
func (m *machine) idle(node string) bool {
	for _, t := range m.tasks {
		if t.GetNodeId() == node {
			return false
		}
	}
	return true
}

// service makes a new revision, of a new or a known service.
func (m *machine) service(t *rapid.T) {
	r := revision{service: fmt.Sprintf("s%d", m.services)}
	if m.services > 0 && rapid.Bool().Draw(t, "update") {
		r.service = fmt.Sprintf("s%d", rapid.IntRange(0, m.services-1).Draw(t, "service"))
		r.version = uint64(len(m.specs))
	} else {
		m.services++
	}
	some := func(name string) bool { return rapid.IntRange(0, 2).Draw(t, name) == 0 }
	m.specs[r] = testTask(r.service, 0, func(task *api.Task) {
		task.SpecVersion.Index = r.version
		want, placement := task.GetSpec().GetResources().GetReservations(), task.GetSpec().GetPlacement()
		if some("reserves") {
			want.NanoCpus, want.MemoryBytes = rapid.Int64Range(0, 2).Draw(t, "cpu"), rapid.Int64Range(0, 2).Draw(t, "memory")
		}
		if some("generic") {
			want.Generic = []*api.GenericResource{discrete(rapid.SampledFrom([]string{"ssd", "gpu"}).Draw(t, "kind"), rapid.Int64Range(1, 2).Draw(t, "amount"))}
		}
		if some("constrained") {
			placement.Constraints = rapid.SliceOfN(rapid.SampledFrom([]string{
				"node.id!=n0", "node.hostname!=host-n1", "node.role==worker", "node.role!=worker", "node.ip==10.0.0.0/16", "node.ip!=10.0.0.0/16",
				"node.platform.os==linux", "node.platform.arch!=aarch64", "node.labels.zone==a", "node.labels.zone!=a",
				"engine.labels.zone==a", "engine.labels.zone!=a", "node.color!=red",
			}), 1, 2).Draw(t, "constraints")
		}
		if some("spread") {
			for _, d := range rapid.SliceOfN(rapid.SampledFrom([]string{"node.labels.zone", "engine.labels.zone", "node.labels.rack", "node.id"}), 1, 2).Draw(t, "spread over") {
				placement.Preferences = append(placement.Preferences, spreadOver(d))
			}
		}
		if some("overlay") {
			task.Networks = networkWith(rapid.SampledFrom([]string{"overlay", "host"}).Draw(t, "network"), rapid.SampledFrom([][]string{nil, {"fd00::/64"}}).Draw(t, "IPv6")...)
		}
		if some("platform") {
			placement.Platforms = []*api.Platform{{Os: "linux", Architecture: rapid.SampledFrom([]string{"amd64", "arm64"}).Draw(t, "arch")}}
		}
		if some("limited") {
			placement.MaxReplicas = rapid.Uint64Range(1, 3).Draw(t, "max")
		}
		if some("publishes") {
			task.Endpoint = &api.Endpoint{Ports: []*api.PortConfig{{
				Protocol: api.PortConfig_Protocol(rapid.Int32Range(0, 1).Draw(t, "protocol")), PublishedPort: 80,
				PublishMode: api.PortConfig_PublishMode(rapid.Int32Range(0, 1).Draw(t, "mode")),
			}}}
		}
		if some("mounts") {
			task.Spec.GetContainer().Mounts = []*api.Mount{{Type: api.Mount_VOLUME, VolumeOptions: &api.Mount_VolumeOptions{DriverConfig: &api.Driver{Name: "nfs"}}}}
		}
	})
	m.more(t)
}

// create makes tasks of a revision.
func (m *machine) create(t *rapid.T, count int, node func() string) {
	if len(m.specs) == 0 {
		return
	}
	r := rapid.SampledFrom(slices.SortedFunc(maps.Keys(m.specs), func(a, b revision) int {
		return cmp.Or(cmp.Compare(a.service, b.service), cmp.Compare(a.version, b.version))
	})).Draw(t, "revision")
	for range count {
		task := model.Clone(m.specs[r])
		task.Id = fmt.Sprintf("t%03d", len(m.tasks))
		for m.tasks[task.GetId()] != nil {
			task.Id += "x"
		}
		task.Slot = rapid.Uint64Range(1, 4).Draw(t, "slot")
		task.NodeId = node()
		m.put(task)
	}
}

func (m *machine) more(t *rapid.T) {
	m.create(t, rapid.IntRange(1, 8).Draw(t, "count"), func() string { return "" })
}

func (m *machine) global(t *rapid.T) {
	m.create(t, 1, func() string { return drawID(t, m.nodes, func(*api.Node) bool { return true }) })
}

// move changes what is wanted of a task, or lets it get on.
func (m *machine) move(t *rapid.T) {
	id := drawID(t, m.tasks, func(*api.Task) bool { return true })
	if id == "" {
		return
	}
	m.edit(id, func(task *api.Task) {
		if rapid.Bool().Draw(t, "wanted") {
			task.DesiredState = max(task.GetDesiredState(), rapid.SampledFrom([]api.TaskState{api.TaskState_COMPLETE, api.TaskState_SHUTDOWN, api.TaskState_REMOVE}).Draw(t, "desired"))
		} else if holds(task) {
			task.Status.State = api.TaskState_RUNNING
		}
	})
}

func (m *machine) end(t *rapid.T) {
	if id := drawID(t, m.tasks, holds); id != "" {
		m.edit(id, func(task *api.Task) {
			task.Status.State = rapid.SampledFrom([]api.TaskState{api.TaskState_COMPLETE, api.TaskState_SHUTDOWN, api.TaskState_ORPHANED}).Draw(t, "state")
		})
	}
}

// fail lets all tasks of one service on one node fail.
func (m *machine) fail(t *rapid.T) {
	id := drawID(t, m.tasks, holds)
	if id == "" {
		return
	}
	like := m.tasks[id]
	for _, other := range m.on(like.GetNodeId()) {
		if revisionOf(other) == revisionOf(like) {
			m.edit(other.GetId(), func(task *api.Task) {
				task.Status.State, task.Status.Timestamp = api.TaskState_FAILED, timestamppb.New(m.now)
			})
		}
	}
}

// delete removes a task; failures are kept, for the oracle counts them.
func (m *machine) delete(t *rapid.T) {
	if id := drawID(t, m.tasks, func(task *api.Task) bool { return task.GetStatus().GetState() != api.TaskState_FAILED }); id != "" {
		m.remove(id)
	}
}

// check lets the State decide and compares.
func (m *machine) check(t *rapid.T) {
	want, scratch, again := m.oracle(), m.scratch(), m.scratch()
	m.compareExplanations(t, want)
	plan := m.state.Schedule(m.now)
	m.compare(t, "the State that followed", plan, want)
	fresh := scratch.Schedule(m.now)
	m.compare(t, "a State from scratch", fresh, want)
	if diff := gocmp.Diff(fresh, again.Schedule(m.now), protocmp.Transform()); diff != "" {
		t.Fatalf("the same input gave another plan:\n%s", diff)
	}
	if !plan.Wake.IsZero() && !plan.Wake.After(m.now) {
		t.Fatalf("wakes at %s, which is not after %s", plan.Wake, m.now)
	}
	if got := m.state.Schedule(m.now); len(got.Changes) > 0 {
		t.Fatalf("decided again at once, it changes more: %v", got.Changes)
	}
	for _, change := range plan.Changes {
		task := change.Object.(*api.Task)
		if rapid.IntRange(0, 9).Draw(t, "lost") == 0 {
			m.state.Refuse(m.tasks[task.GetId()])
			continue
		}
		m.put(task)
	}
	m.safe(t, plan)
}

// compare holds a plan against the oracle's. What is known to be refused may be left as
// it is; all else is the same, in the same order.
func (m *machine) compare(t *rapid.T, who string, plan model.Plan, want *oracle) {
	var order, obsolete []string
	for _, change := range plan.Changes {
		task := change.Object.(*api.Task)
		id, st := task.GetId(), task.GetStatus()
		switch st.GetState() {
		case api.TaskState_ASSIGNED:
			order = append(order, id)
			if task.GetNodeId() != want.assigned[id] {
				t.Fatalf("%s puts %s on %q, the oracle on %q", who, id, task.GetNodeId(), want.assigned[id])
			}
			if diff := gocmp.Diff(want.tasks[id].GetAssignedGenericResources(), task.GetAssignedGenericResources(), protocmp.Transform()); diff != "" {
				t.Fatalf("%s claims for %s (-oracle +state):\n%s", who, id, diff)
			}
		case api.TaskState_PENDING:
			if st.GetErr() != want.refused[id] {
				t.Fatalf("%s says of %s: %q, the oracle %q", who, id, st.GetErr(), want.refused[id])
			}
		case api.TaskState_SHUTDOWN:
			obsolete = append(obsolete, id)
		default:
			t.Fatalf("%s sets %s to %s", who, id, st.GetState())
		}
	}
	if diff := gocmp.Diff(want.order, order); diff != "" {
		t.Fatalf("%s places (-oracle +state):\n%s", who, diff)
	}
	if diff := gocmp.Diff(want.obsolete, obsolete); diff != "" {
		t.Fatalf("%s shuts down (-oracle +state):\n%s", who, diff)
	}
}

// compareExplanations holds the refusal counts per filter against the oracle's.
func (m *machine) compareExplanations(t *rapid.T, want *oracle) {
	records := &oracle{nodes: m.nodes, tasks: m.tasks, now: m.now}
	for _, id := range slices.Sorted(maps.Keys(m.tasks)) {
		task := m.tasks[id]
		if task.GetStatus().GetState() != api.TaskState_PENDING {
			continue
		}
		var nodes []*api.Node
		for _, n := range m.nodes {
			if task.GetNodeId() == "" || task.GetNodeId() == n.GetId() {
				nodes = append(nodes, n)
			}
		}
		got := make(map[string]int)
		refusals, suitable := m.state.Explain(task)
		refused := 0
		for _, r := range refusals {
			got[r.Filter] = len(r.Nodes)
			refused += len(r.Nodes)
		}
		if diff := gocmp.Diff(records.counts(task, nodes...), got); diff != "" {
			t.Fatalf("%s is refused (-oracle +state):\n%s", id, diff)
		}
		if refused+len(suitable) != len(nodes) {
			t.Fatalf("%s: %d nodes refuse, %d suit, of %d", id, refused, len(suitable), len(nodes))
		}
	}
}

// safe holds the sentence that nothing is placed above a node's resources.
func (m *machine) safe(t *rapid.T, plan model.Plan) {
	for _, change := range plan.Changes {
		task := m.tasks[change.Object.GetId()]
		n := m.nodes[task.GetNodeId()]
		if n == nil || !holds(task) {
			continue
		}
		want, have := task.GetSpec().GetResources().GetReservations(), n.GetDescription().GetResources()
		cpu, memory, pieces := have.GetNanoCpus(), have.GetMemoryBytes(), make(map[string]bool)
		for _, other := range m.on(n.GetId()) {
			cpu -= other.GetSpec().GetResources().GetReservations().GetNanoCpus()
			memory -= other.GetSpec().GetResources().GetReservations().GetMemoryBytes()
			for _, g := range other.GetAssignedGenericResources() {
				if d := g.GetNamedResourceSpec(); d != nil {
					if pieces[d.GetKind()+d.GetValue()] {
						t.Fatalf("%s %s of %s is claimed twice", d.GetKind(), d.GetValue(), n.GetId())
					}
					pieces[d.GetKind()+d.GetValue()] = true
				}
			}
		}
		if want.GetNanoCpus() > 0 && cpu < 0 || want.GetMemoryBytes() > 0 && memory < 0 {
			t.Fatalf("%s was placed above the resources of %s", task.GetId(), n.GetId())
		}
	}
}

// account holds the sums that the State keeps against those made from scratch.
func (m *machine) account(t *rapid.T) {
	want := m.scratch()
	if diff := gocmp.Diff(slices.Sorted(maps.Keys(want.known)), slices.Sorted(maps.Keys(m.state.known))); diff != "" {
		t.Fatalf("tasks known (-scratch +followed):\n%s", diff)
	}
	if diff := gocmp.Diff(want.spread, m.state.spread, gocmp.AllowUnexported(tally{})); diff != "" {
		t.Fatalf("nodes of each service (-scratch +followed):\n%s", diff)
	}
	for i := range m.services + 1 { // and one that nobody has
		service, fewest := fmt.Sprintf("s%d", i), 0
		for id := range m.nodes {
			count := (&oracle{tasks: m.tasks}).count(m.nodes[id], service)
			if fewest == 0 || count < fewest {
				fewest = count
			}
			if count == 0 {
				break
			}
		}
		if got := m.state.fewest(service); len(m.nodes) > 0 && got != fewest {
			t.Fatalf("no node has fewer than %d tasks of %s, the State says %d", fewest, service, got)
		}
	}
	var order, wanted []string
	m.state.order.Scan(func(n *node) bool { order = append(order, n.GetId()); return true })
	want.order.Scan(func(n *node) bool { wanted = append(wanted, n.GetId()); return true })
	if diff := gocmp.Diff(wanted, order); diff != "" {
		t.Fatalf("order of nodes (-scratch +followed):\n%s", diff)
	}
	for id, n := range m.state.nodes {
		w := want.nodes[id]
		if n.cpu != w.cpu || n.memory != w.memory || n.total != w.total || !maps.Equal(n.byService, w.byService) || !maps.Equal(n.ports, w.ports) {
			t.Fatalf("%s: account %v, from scratch %v", id, n, w)
		}
		for kind, p := range n.generic {
			if w.generic[kind].free() != p.free() {
				t.Fatalf("%s: %d of %s free, from scratch %d", id, p.free(), kind, w.generic[kind].free())
			}
		}
	}
}

// TestSpreadsEvenly holds a service's tasks to differ by one at most between equal nodes,
// and between the branches of a preference that have room.
func TestSpreadsEvenly(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := newCluster()
		nodes := rapid.IntRange(1, 20).Draw(t, "nodes")
		zones := rapid.IntRange(1, 4).Draw(t, "zones")
		for i := range nodes {
			c.put(testNode(fmt.Sprintf("n%02d", i), func(n *api.Node) { n.Spec.Annotations.Labels["zone"] = fmt.Sprint(i % zones) }))
		}
		preferred := rapid.Bool().Draw(t, "preferred")
		perNode, perZone := make(map[string]int), make(map[string]int)
		slot := uint64(0)
		for range rapid.IntRange(1, 4).Draw(t, "batches") {
			for range rapid.IntRange(1, 30).Draw(t, "tasks") {
				slot++
				c.put(testTask("web", slot, func(task *api.Task) {
					if preferred {
						task.Spec.Placement.Preferences = []*api.PlacementPreference{spreadOver("node.labels.zone")}
					}
				}))
			}
			c.schedule()
		}
		for id, n := range c.nodes {
			perNode[id] = len(c.on(id))
			perZone[n.GetSpec().GetAnnotations().GetLabels()["zone"]] += len(c.on(id))
		}
		counts := perNode
		if preferred {
			counts = perZone
		}
		values := slices.Sorted(maps.Values(counts))
		if values[len(values)-1]-values[0] > 1 {
			t.Fatalf("uneven: %v", counts)
		}
	})
}
