package sched

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

// oracle decides what State decides, from nothing but the records, slowly and obviously:
// for each task it looks at each node, and for each node at each task.
type oracle struct {
	nodes map[string]*api.Node
	tasks map[string]*api.Task
	now   time.Time
	// what it decides:
	order    []string          // the tasks that get a node, in order
	assigned map[string]string // task: node
	refused  map[string]string // task: why
	obsolete []string
}

func (c *cluster) oracle() *oracle {
	o := &oracle{
		nodes: c.nodes, tasks: maps.Clone(c.tasks), now: c.now,
		assigned: make(map[string]string), refused: make(map[string]string),
	}
	groups := make(map[revision][]*api.Task)
	for _, id := range slices.Sorted(maps.Keys(o.tasks)) {
		switch t := o.tasks[id]; {
		case t.GetStatus().GetState() != api.TaskState_PENDING:
		case t.GetDesiredState() > api.TaskState_COMPLETE:
			if t.GetDesiredState() < api.TaskState_REMOVE {
				o.obsolete = append(o.obsolete, id)
			}
		case t.GetNodeId() == "":
			groups[revisionOf(t)] = append(groups[revisionOf(t)], t)
		}
	}
	for _, node := range slices.Sorted(maps.Keys(o.nodes)) {
		for _, id := range slices.Sorted(maps.Keys(o.tasks)) {
			t := o.tasks[id]
			if t.GetStatus().GetState() != api.TaskState_PENDING || t.GetNodeId() != node || t.GetDesiredState() > api.TaskState_COMPLETE {
				continue
			}
			if o.refusal(t, o.nodes[node]) == "" {
				o.assign(t, node)
			} else {
				o.refused[id] = o.explain(t, o.nodes[node])
			}
		}
	}
	for _, r := range slices.SortedFunc(maps.Keys(groups), func(a, b revision) int {
		return cmp.Or(cmp.Compare(a.service, b.service), cmp.Compare(a.version, b.version))
	}) {
		o.place(r, groups[r])
	}
	return o
}

func (o *oracle) place(r revision, tasks []*api.Task) {
	slices.SortFunc(tasks, func(a, b *api.Task) int {
		return cmp.Or(cmp.Compare(a.GetSlot(), b.GetSlot()), cmp.Compare(a.GetId(), b.GetId()))
	})
	all := slices.SortedFunc(maps.Values(o.nodes), func(a, b *api.Node) int {
		return cmp.Or(cmp.Compare(o.count(a, ""), o.count(b, "")), cmp.Compare(a.GetId(), b.GetId()))
	})
	first := make(map[string]int) // nodes suitable at the beginning, the least loaded first
	for i, n := range all {
		if o.refusal(tasks[0], n) == "" {
			first[n.GetId()] = i + 1
		}
	}
	for _, t := range tasks {
		if n := o.pick(t, r, all, t.GetSpec().GetPlacement().GetPreferences(), first); n != nil {
			o.assign(t, n.GetId())
		} else {
			o.refused[t.GetId()] = o.explain(t, all...)
		}
	}
}

// pick chooses among nodes, by the first of the preferences and those below it.
func (o *oracle) pick(t *api.Task, r revision, nodes []*api.Node, preferences []*api.PlacementPreference, first map[string]int) *api.Node {
	suitable := slices.DeleteFunc(slices.Clone(nodes), func(n *api.Node) bool { return o.refusal(t, n) != "" })
	if len(suitable) == 0 {
		return nil
	}
	if len(preferences) == 0 {
		return slices.MinFunc(suitable, func(a, b *api.Node) int {
			return cmp.Or(
				cmp.Compare(o.failures(a, r), o.failures(b, r)),
				cmp.Compare(o.count(a, r.service), o.count(b, r.service)),
				cmp.Compare(o.count(a, ""), o.count(b, "")),
				cmp.Compare(a.GetId(), b.GetId()),
			)
		})
	}
	var value func(*api.Node) string
	switch prefix, key := cutLabel(preferences[0].GetSpread().GetSpreadDescriptor()); prefix {
	case "node.labels.":
		value = func(n *api.Node) string { return n.GetSpec().GetAnnotations().GetLabels()[key] }
	case "engine.labels.":
		value = func(n *api.Node) string { return n.GetDescription().GetEngine().GetLabels()[key] }
	default:
		return o.pick(t, r, nodes, preferences[1:], first)
	}
	branches := make(map[string][]*api.Node)
	for _, n := range nodes {
		branches[value(n)] = append(branches[value(n)], n)
	}
	rank := func(v string) (total, begin int) {
		begin = len(o.nodes) + 1
		for _, n := range branches[v] {
			total += o.count(n, r.service)
			if at := first[n.GetId()]; at > 0 {
				begin = min(begin, at)
			}
		}
		return total, begin
	}
	for _, v := range slices.SortedFunc(maps.Keys(branches), func(a, b string) int {
		totalA, beginA := rank(a)
		totalB, beginB := rank(b)
		return cmp.Or(cmp.Compare(totalA, totalB), cmp.Compare(beginA, beginB))
	}) {
		if n := o.pick(t, r, branches[v], preferences[1:], first); n != nil {
			return n
		}
	}
	return nil
}

func cutLabel(descriptor string) (prefix, key string) {
	at := strings.LastIndex(descriptor, ".") + 1 // the tests' labels have no dots
	return strings.ToLower(descriptor[:at]), descriptor[at:]
}

func (o *oracle) assign(t *api.Task, node string) {
	stored := t
	t = model.Clone(t)
	t.NodeId, t.Status.State = node, api.TaskState_ASSIGNED
	t.AssignedGenericResources = o.claims(stored, o.nodes[node])
	o.tasks[t.GetId()] = t
	o.assigned[t.GetId()] = node
	o.order = append(o.order, t.GetId())
}

// holders lists the tasks that hold something of a node.
func (o *oracle) holders(n *api.Node) []*api.Task {
	var out []*api.Task
	for _, t := range o.tasks {
		if t.GetNodeId() == n.GetId() && t.GetStatus().GetState() >= api.TaskState_ASSIGNED && t.GetStatus().GetState() <= api.TaskState_RUNNING {
			out = append(out, t)
		}
	}
	return out
}

// count counts the active tasks of a node, of one service if it is given.
func (o *oracle) count(n *api.Node, service string) int {
	count := 0
	for _, t := range o.holders(n) {
		if t.GetDesiredState() <= api.TaskState_COMPLETE && (service == "" || t.GetServiceId() == service) {
			count++
		}
	}
	return count
}

func (o *oracle) failures(n *api.Node, r revision) int {
	count := 0
	for _, t := range o.tasks {
		state := t.GetStatus().GetState()
		if t.GetNodeId() == n.GetId() && revisionOf(t) == r && (state == api.TaskState_FAILED || state == api.TaskState_REJECTED) &&
			o.now.Sub(t.GetStatus().GetTimestamp().AsTime()) < 5*time.Minute {
			count++
		}
	}
	if count < 5 {
		return 0
	}
	return count
}

// left returns what of a generic resource nobody has claimed: names, and an amount.
func (o *oracle) left(n *api.Node, kind string) (names []string, amount int64) {
	taken := make(map[string]bool)
	for _, t := range o.holders(n) {
		for _, g := range t.GetAssignedGenericResources() {
			if d := g.GetDiscreteResourceSpec(); d.GetKind() == kind {
				amount -= d.GetValue()
			}
			if d := g.GetNamedResourceSpec(); d.GetKind() == kind {
				taken[d.GetValue()] = true
			}
		}
	}
	for _, g := range n.GetDescription().GetResources().GetGeneric() {
		if d := g.GetDiscreteResourceSpec(); d.GetKind() == kind {
			amount += d.GetValue()
		}
		if d := g.GetNamedResourceSpec(); d.GetKind() == kind && !taken[d.GetValue()] {
			names = append(names, d.GetValue())
		}
	}
	slices.Sort(names)
	return slices.Compact(names), amount
}

func (o *oracle) claims(t *api.Task, n *api.Node) []*api.GenericResource {
	var out []*api.GenericResource
	for _, g := range t.GetSpec().GetResources().GetReservations().GetGeneric() {
		kind, want := g.GetDiscreteResourceSpec().GetKind(), g.GetDiscreteResourceSpec().GetValue()
		names, _ := o.left(n, kind)
		for ; want > 0 && len(names) > 0; want, names = want-1, names[1:] {
			out = append(out, named(kind, names[0]))
		}
		if want > 0 {
			out = append(out, discrete(kind, want))
		}
	}
	return out
}

// refusal names the first filter that keeps a task from a node, "" for none.
func (o *oracle) refusal(t *api.Task, n *api.Node) string {
	want, have := t.GetSpec().GetResources().GetReservations(), n.GetDescription().GetResources()
	cpu, memory := have.GetNanoCpus(), have.GetMemoryBytes()
	ports := make(map[string]bool)
	for _, other := range o.holders(n) {
		cpu -= other.GetSpec().GetResources().GetReservations().GetNanoCpus()
		memory -= other.GetSpec().GetResources().GetReservations().GetMemoryBytes()
		for _, p := range other.GetEndpoint().GetPorts() {
			ports[fmt.Sprint(p.GetPublishMode(), p.GetProtocol(), p.GetPublishedPort())] = true
		}
	}
	if n.GetStatus().GetState() != api.NodeStatus_READY || n.GetSpec().GetAvailability() != api.NodeSpec_ACTIVE {
		return "Ready"
	}
	if w := want.GetNanoCpus(); w > 0 && w > cpu {
		return "Resource"
	}
	if w := want.GetMemoryBytes(); w > 0 && w > memory {
		return "Resource"
	}
	for _, g := range want.GetGeneric() {
		names, amount := o.left(n, g.GetDiscreteResourceSpec().GetKind())
		if g.GetDiscreteResourceSpec().GetValue() > int64(len(names))+amount {
			return "Resource"
		}
	}
	for _, m := range t.GetSpec().GetContainer().GetMounts() {
		driver := m.GetVolumeOptions().GetDriverConfig().GetName()
		if m.GetType() == api.Mount_VOLUME && !slices.ContainsFunc(n.GetDescription().GetEngine().GetPlugins(), func(p *api.PluginDescription) bool {
			return p.GetType() == "Volume" && p.GetName() == driver
		}) {
			return "Plugin"
		}
	}
	for _, a := range t.GetNetworks() {
		plugins := n.GetDescription().GetEngine().GetPlugins()
		switch {
		case a.GetNetwork().GetDriverState().GetName() == "host":
			return "Plugin" // no node here lists it
		case len(a.GetNetwork().GetIpam().GetConfigs()) > 0 && plugins[len(plugins)-1].GetName() != "skep-overlay":
			return "Overlay"
		}
	}
	for _, c := range t.GetSpec().GetPlacement().GetConstraints() {
		if !satisfies(n, c) {
			return "Constraint"
		}
	}
	if list := t.GetSpec().GetPlacement().GetPlatforms(); len(list) > 0 {
		names := map[string]string{"x86_64": "amd64", "aarch64": "arm64", "amd64": "amd64", "arm64": "arm64"}
		mine := names[n.GetDescription().GetPlatform().GetArchitecture()]
		if !slices.ContainsFunc(list, func(p *api.Platform) bool { return names[p.GetArchitecture()] == mine }) {
			return "Platform"
		}
	}
	for _, p := range t.GetEndpoint().GetPorts() {
		if p.GetPublishMode() == api.PortConfig_HOST && ports[fmt.Sprint(p.GetPublishMode(), p.GetProtocol(), p.GetPublishedPort())] {
			return "HostPort"
		}
	}
	if most := t.GetSpec().GetPlacement().GetMaxReplicas(); most > 0 && o.count(n, t.GetServiceId()) >= int(most) {
		return "MaxReplicas"
	}
	return ""
}

// satisfies reads a constraint written without spaces.
func satisfies(n *api.Node, constraint string) bool {
	key, value, equal := strings.Cut(constraint, "==")
	if !equal {
		key, value, _ = strings.Cut(constraint, "!=")
	}
	var have string
	switch prefix, label := cutLabel(key); {
	case prefix == "node.labels.":
		have = n.GetSpec().GetAnnotations().GetLabels()[label]
	case prefix == "engine.labels.":
		have = n.GetDescription().GetEngine().GetLabels()[label]
	case key == "node.id":
		have = n.GetId()
	case key == "node.hostname":
		have = n.GetDescription().GetHostname()
	case key == "node.role":
		have = strings.ToLower(n.GetRole().String())
	case key == "node.platform.os":
		have = n.GetDescription().GetPlatform().GetOs()
	case key == "node.platform.arch":
		have = n.GetDescription().GetPlatform().GetArchitecture()
	case key == "node.ip":
		return netip.MustParsePrefix(value).Contains(netip.MustParseAddr(n.GetStatus().GetAddr())) == equal
	default:
		return false
	}
	return (have == value) == equal
}

// counts returns for each filter how many nodes it refuses.
func (o *oracle) counts(t *api.Task, nodes ...*api.Node) map[string]int {
	counts := make(map[string]int)
	for _, n := range nodes {
		if f := o.refusal(t, n); f != "" {
			counts[f]++
		}
	}
	return counts
}

func (o *oracle) explain(t *api.Task, nodes ...*api.Node) string {
	counts := o.counts(t, nodes...)
	var parts []string
	for n := len(nodes); n > 0; n-- {
		for _, f := range []string{"Ready", "Resource", "Plugin", "Overlay", "Constraint", "Platform", "HostPort", "MaxReplicas"} {
			if counts[f] != n {
				continue
			}
			noun := "nodes"
			if n == 1 {
				noun = "node"
			}
			parts = append(parts, map[string]string{
				"Ready":       fmt.Sprintf("%d %s not available for new tasks", n, noun),
				"Resource":    fmt.Sprintf("insufficient resources on %d %s", n, noun),
				"Plugin":      fmt.Sprintf("missing plugin on %d %s", n, noun),
				"Overlay":     fmt.Sprintf("network  has IPv6 and does not reach %d %s with Docker Engine", n, noun),
				"Constraint":  fmt.Sprintf("scheduling constraints not satisfied on %d %s", n, noun),
				"Platform":    fmt.Sprintf("unsupported platform on %d %s", n, noun),
				"HostPort":    fmt.Sprintf("host-mode port already in use on %d %s", n, noun),
				"MaxReplicas": "max replicas per node limit exceed",
			}[f])
		}
	}
	if len(parts) == 0 {
		return "no suitable node"
	}
	return "no suitable node (" + strings.Join(parts, "; ") + ")"
}
