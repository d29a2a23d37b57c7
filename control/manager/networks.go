package manager

import (
	"context"
	"log/slog"
	"slices"
	"time"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/alloc"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/store"
)

// networking is what the controller of services knows of addresses and ports, and who
// waits for some. It is rebuilt from the store at the beginning of a term.
type networking struct {
	*alloc.State
	// networks and nodes are the ids of those to look at.
	networks, nodes *queue
	// waiting says for services, tasks without service, networks and nodes what must be
	// released before it makes sense to look at them again. It is bounded by what exists.
	waiting map[waiter]string
}

// waiter is a record that could not be served.
type waiter struct {
	table model.Table
	id    string
}

func newNetworking(s *store.Snapshot) *networking {
	n := &networking{
		State:    alloc.New(s.Cluster(), s.Networks(), s.Services(), s.Nodes(), s.Tasks()),
		networks: newQueue(), nodes: newQueue(), waiting: make(map[waiter]string),
	}
	for network := range s.Networks() {
		n.networks.push(network.GetId())
	}
	for node := range s.Nodes() {
		n.nodes.push(node.GetId())
	}
	return n
}

func (n *networking) idle() bool { return n.networks.empty() && n.nodes.empty() }

// note takes over a change.
func (n *networking) note(e model.Event, s *store.Snapshot) {
	n.Set(e.Table, e.ID(), e.New)
	switch e.Table { //nolint:exhaustive // the others have no addresses of their own
	case model.Networks:
		n.networks.push(e.ID())
		old, _ := e.Old.(*api.Network)
		updated, _ := e.New.(*api.Network)
		if model.Ingress(old) || model.Ingress(updated) {
			for node := range s.Nodes() {
				n.nodes.push(node.GetId())
			}
		}
	case model.Nodes:
		old, _ := e.Old.(*api.Node)
		updated, _ := e.New.(*api.Node)
		if e.Kind == model.Create || model.Foreign(old.GetDescription()) != model.Foreign(updated.GetDescription()) {
			n.nodes.push(e.ID())
		}
	}
	if e.Table == model.Tasks {
		n.noteTask(e, s)
	}
	if e.Kind == model.Remove {
		delete(n.waiting, waiter{e.Table, e.ID()})
	}
}

// noteTask has a Docker Engine looked at that a task came to, or left, with its networks.
func (n *networking) noteTask(e model.Event, s *store.Snapshot) {
	old, _ := e.Old.(*api.Task)
	updated, _ := e.New.(*api.Task)
	id := updated.GetNodeId()
	if id == "" {
		id = old.GetNodeId()
	}
	if balancesFrom(old) != balancesFrom(updated) && model.Foreign(s.Node(id).GetDescription()) {
		n.nodes.push(id)
	}
}

// balancesFrom reports whether a task is the reason for its node to have an address in each of
// its networks: it is on a node and has not ended.
func balancesFrom(t *api.Task) bool {
	return t.GetNodeId() != "" && t.GetStatus().GetState() <= api.TaskState_RUNNING && len(t.GetNetworks()) > 0
}

// settle remembers what a record waits for; a nil error means that it has everything.
func (n *networking) settle(table model.Table, id string, err error) {
	b, ok := err.(*alloc.BlockedError) //nolint:errorlint // alloc returns nothing else
	if !ok {
		delete(n.waiting, waiter{table, id})
		return
	}
	n.waiting[waiter{table, id}] = b.On
}

// wake marks those whose wait may be over. They go on waiting until they are settled, so
// that what was said of them is not said again.
func (c *services) wake() {
	released := c.net.Released()
	if len(released) == 0 {
		return
	}
	for w, on := range c.net.waiting {
		if !released[on] {
			continue
		}
		switch w.table { //nolint:exhaustive // nothing else waits
		case model.Services:
			c.dirtyServices.push(w.id)
		case model.Tasks:
			c.dirtyLoose.push(w.id)
		case model.Networks:
			c.net.networks.push(w.id)
		case model.Nodes:
			c.net.nodes.push(w.id)
		}
	}
}

// decideNetwork allocates a network.
func (c *services) decideNetwork(ctx context.Context, s *store.Snapshot, id string, b *batch) {
	n := s.Network(id)
	if n == nil {
		return
	}
	edited, err := c.net.Network(n)
	c.net.settle(model.Networks, id, err)
	if err != nil {
		c.log.LogAttrs(ctx, slog.LevelWarn, "network cannot be allocated", slog.String("network_id", id), slog.Any("error", err))
		// Those who wait for it shall say why.
		for w, on := range c.net.waiting {
			if on == id && w.table == model.Services {
				c.dirtyServices.push(w.id)
			}
		}
	}
	if edited != nil {
		b.add(unit{key: id, changes: []model.Change{{Kind: model.Update, Object: edited}}})
	}
}

// decideAttachments gives a node its address in the ingress network, and a Docker Engine one in
// each network of its tasks.
func (c *services) decideAttachments(ctx context.Context, s *store.Snapshot, id string, b *batch) {
	n := s.Node(id)
	if n == nil {
		return
	}
	var others []string
	if model.Foreign(n.GetDescription()) {
		for t := range s.TasksByNode(id) {
			if !balancesFrom(t) {
				continue
			}
			for _, a := range t.GetNetworks() {
				others = append(others, a.GetNetwork().GetId())
			}
		}
		slices.Sort(others)
		others = slices.Compact(others)
	}
	_, waited := c.net.waiting[waiter{model.Nodes, id}]
	edited, err := c.net.Node(n, others...)
	c.net.settle(model.Nodes, id, err)
	if err != nil && !waited {
		c.log.LogAttrs(ctx, slog.LevelWarn, "node lacks addresses in its networks", slog.String("node_id", id), slog.Any("error", err))
	}
	if edited != nil {
		b.add(unit{key: id, changes: []model.Change{{Kind: model.Update, Object: edited}}})
	}
}

// allocate serves a service, the new tasks of its plan, and older ones that had to wait.
// unserved is the error for the service as it is in v.
func (c *services) allocate(v serviceView, changes []model.Change, now time.Time) []model.Change {
	service, unserved := v.service, v.unserved
	touched := make(map[string]bool, len(changes))
	var last error
	for i, change := range changes {
		switch o := change.Object.(type) {
		case *api.Service: // the plan replaced the spec, or just the status
			if change.Kind == model.Update {
				var edited *api.Service
				if edited, unserved = c.net.Service(o); edited != nil {
					o = edited
					changes[i].Object = o
				}
				service = o
			}
		case *api.Task:
			touched[o.GetId()] = true
			if change.Kind == model.Create {
				if _, err := c.net.Task(o, service, unserved, now); err != nil {
					last = err
				}
			}
		}
	}
	if unserved != nil {
		last = unserved
	}
	for _, t := range v.tasks {
		if touched[t.GetId()] || t.GetStatus().GetState() != api.TaskState_NEW || t.GetDesiredState() > api.TaskState_COMPLETE {
			continue
		}
		if len(changes) >= maxObjects {
			c.wakes.set(v.id, now)
			break
		}
		t = model.Clone(t)
		changed, err := c.net.Task(t, service, unserved, now)
		if changed {
			changes = append(changes, model.Change{Kind: model.Update, Object: t})
		}
		if err != nil {
			last = err
		}
	}
	c.net.settle(model.Services, v.id, last)
	return changes
}

// serviceView is what allocate looks at.
type serviceView struct {
	id string
	// service may be nil, when it is gone.
	service  *api.Service
	unserved error
	tasks    []*api.Task
}

// restore says of changes that were refused what is stored instead.
func (n *networking) restore(s *store.Snapshot, changes []model.Change) {
	for _, c := range changes {
		table := model.TableOf(c.Object)
		n.Set(table, c.Object.GetId(), s.Get(table, c.Object.GetId()))
	}
}
