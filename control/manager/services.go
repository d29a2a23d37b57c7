package manager

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/control/replica"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/orch"
	"github.com/skep-dev/skep/core/store"
)

// services is the controller of services, the tasks they have, and the tasks that nodes
// may keep. All of it can be rebuilt from the store.
type services struct {
	*Manager
	cursor *replica.Cursor
	// dirty holds the ids of what must be looked at: services (also gone ones), nodes,
	// and tasks without service.
	dirtyServices, dirtyNodes, dirtyLoose *queue
	wakes                                 *agenda
	// globals are the services that want a task on every node.
	globals map[string]bool
	net     *networking
	// ranSince says since when tasks that have ended had been running.
	ranSince map[string]time.Time
}

// runServices runs the controller.
func (m *Manager) runServices(ctx context.Context) error {
	c := &services{Manager: m, cursor: m.state.Follow()}
	c.restart()
	for {
		if err := c.pass(ctx); err != nil {
			return fmt.Errorf("decide about services: %w", err)
		}
		if c.dirtyServices.empty() && c.dirtyNodes.empty() && c.dirtyLoose.empty() && c.net.idle() {
			if err := c.wakes.wait(ctx, c.cursor.Changed()); err != nil {
				return err
			}
		} else if err := ctx.Err(); err != nil {
			return err
		}
		events, reset := c.cursor.Drain()
		if reset {
			c.restart()
			continue
		}
		for _, e := range events {
			c.net.note(e, c.cursor.Snapshot())
			c.note(e)
		}
		c.wake()
		for _, id := range c.wakes.due(time.Now()) {
			c.mark(id)
		}
	}
}

// restart marks everything there is.
func (c *services) restart() {
	c.dirtyServices, c.dirtyNodes, c.dirtyLoose = newQueue(), newQueue(), newQueue()
	c.wakes = newAgenda()
	c.globals = make(map[string]bool)
	c.ranSince = make(map[string]time.Time)
	s := c.cursor.Snapshot()
	c.net = newNetworking(s)
	for service := range s.Services() {
		c.dirtyServices.push(service.GetId())
		if onEveryNode(service) {
			c.globals[service.GetId()] = true
		}
	}
	for t := range s.Tasks() {
		switch {
		case t.GetServiceId() == "":
			c.dirtyLoose.push(t.GetId())
		case s.Service(t.GetServiceId()) == nil:
			c.dirtyServices.push(t.GetServiceId())
		}
	}
	for n := range s.Nodes() {
		c.dirtyNodes.push(n.GetId())
	}
}

func onEveryNode(s *api.Service) bool {
	return s.GetSpec().GetGlobal() != nil || s.GetSpec().GetGlobalJob() != nil
}

// mark puts a service or node, whose wake has come, back in its queue.
func (c *services) mark(id string) {
	switch s := c.cursor.Snapshot(); {
	case s.Node(id) != nil:
		c.dirtyNodes.push(id)
		c.net.nodes.push(id)
	case s.Network(id) != nil:
		c.net.networks.push(id)
	default:
		c.dirtyServices.push(id)
	}
}

// note marks what a change may matter to.
func (c *services) note(e model.Event) {
	switch e.Table { //nolint:exhaustive // the others do not matter to services
	case model.Services:
		c.dirtyServices.push(e.ID())
		delete(c.globals, e.ID())
		if s, ok := e.New.(*api.Service); ok && onEveryNode(s) {
			c.globals[e.ID()] = true
		}
	case model.Tasks:
		old, _ := e.Old.(*api.Task)
		updated, _ := e.New.(*api.Task)
		c.noteTask(old, updated)
	case model.Nodes:
		old, _ := e.Old.(*api.Node)
		updated, _ := e.New.(*api.Node)
		c.noteNode(e.ID(), old, updated)
	case model.Clusters:
		old, _ := e.Old.(*api.Cluster)
		updated, _ := e.New.(*api.Cluster)
		if !proto.Equal(old.GetSpec().GetOrchestration(), updated.GetSpec().GetOrchestration()) {
			for s := range c.cursor.Snapshot().Services() {
				c.dirtyServices.push(s.GetId())
			}
		}
	}
}

func (c *services) noteTask(old, updated *api.Task) {
	before, after := old.GetStatus().GetState(), updated.GetStatus().GetState()
	if updated == nil {
		delete(c.ranSince, old.GetId())
		c.dirtyServices.push(old.GetServiceId())
		return
	}
	if before == api.TaskState_RUNNING && after > before {
		c.ranSince[old.GetId()] = statusTime(old)
	}
	if updated.GetServiceId() == "" {
		if after == api.TaskState_NEW || updated.GetDesiredState() == api.TaskState_REMOVE {
			c.dirtyLoose.push(updated.GetId())
		}
		return
	}
	if old == nil || old.GetDesiredState() != updated.GetDesiredState() ||
		before != after && after >= api.TaskState_RUNNING {
		c.dirtyServices.push(updated.GetServiceId())
	}
}

func statusTime(t *api.Task) time.Time {
	if at := t.GetStatus().GetAppliedAt(); at != nil {
		return at.AsTime()
	}
	return t.GetStatus().GetTimestamp().AsTime()
}

func (c *services) noteNode(id string, old, updated *api.Node) {
	if old != nil && updated != nil && sameNode(old, updated) {
		return
	}
	c.dirtyNodes.push(id)
	for service := range c.globals {
		c.dirtyServices.push(service)
	}
	for t := range c.cursor.Snapshot().TasksByNode(id) {
		if t.GetServiceId() != "" {
			c.dirtyServices.push(t.GetServiceId())
		}
	}
}

// sameNode reports whether nothing changed that decides which tasks a node may have.
func sameNode(a, b *api.Node) bool {
	return a.GetStatus().GetState() == b.GetStatus().GetState() && a.GetStatus().GetAddr() == b.GetStatus().GetAddr() &&
		a.GetRole() == b.GetRole() && proto.Equal(a.GetSpec(), b.GetSpec()) &&
		proto.Equal(a.GetDescription(), b.GetDescription())
}

// pass decides about marked things, as many as one entry takes, and proposes it.
func (c *services) pass(ctx context.Context) error {
	start := time.Now()
	b := new(batch)
	s := c.cursor.Snapshot()
	for !b.full() && !c.net.networks.empty() {
		c.decideNetwork(ctx, s, c.net.networks.pop(), b)
	}
	for !b.full() && !c.net.nodes.empty() {
		c.decideAttachments(ctx, s, c.net.nodes.pop(), b)
	}
	for !b.full() && !c.dirtyNodes.empty() {
		c.decideNode(s, c.dirtyNodes.pop(), start, b)
	}
	for !b.full() && !c.dirtyLoose.empty() {
		c.decideLoose(s, c.dirtyLoose.pop(), start, b)
	}
	for !b.full() && !c.dirtyServices.empty() {
		c.decideService(ctx, s, c.dirtyServices.pop(), start, b)
	}
	c.metrics.deciding.WithLabelValues("services").Observe(time.Since(start).Seconds())
	stale, err := c.propose(ctx, b)
	for _, u := range stale {
		c.net.restore(s, u.changes)
		c.mark(u.key)
	}
	return err
}

// decideService asks alloc and orch about one service.
func (c *services) decideService(ctx context.Context, s *store.Snapshot, id string, now time.Time, b *batch) {
	service := s.Service(id)
	v := orch.View{
		ServiceID: id, Service: service, Nodes: make(map[string]*api.Node), Cluster: s.Cluster(),
		RanSince: c.ranSince, NewID: c.newID, Limit: maxObjects,
	}
	var edited *api.Service
	var unserved error
	if service != nil {
		if edited, unserved = c.net.Service(service); edited != nil {
			v.Service = edited
		}
		v.Limit = min(maxObjects, max(1, maxBytes/(proto.Size(service)+1024)))
	}
	for t := range s.TasksByService(id) {
		v.Tasks = append(v.Tasks, t)
		if n := t.GetNodeId(); n != "" && v.Nodes[n] == nil {
			if node := s.Node(n); node != nil {
				v.Nodes[n] = node
			}
		}
	}
	if service != nil && onEveryNode(service) {
		for n := range s.Nodes() {
			v.Nodes[n.GetId()] = n
		}
	}
	plan := orch.Decide(v, now)
	c.wakes.set(id, plan.Wake)
	if edited != nil && !updates(plan, id) {
		plan.Changes = append([]model.Change{{Kind: model.Update, Object: edited}}, plan.Changes...)
	}
	plan.Changes = c.allocate(serviceView{id, v.Service, unserved, v.Tasks}, plan.Changes, now)
	for _, n := range plan.Notes {
		c.log.LogAttrs(ctx, slog.LevelDebug, "service decision", slog.String("service_id", id),
			slog.String("subject_id", n.Subject), slog.String("reason", n.Text))
	}
	if len(plan.Changes) == 0 {
		return
	}
	u := unit{key: id, changes: plan.Changes}
	if service != nil && !updates(plan, id) {
		u.uses = []model.Object{service}
	}
	c.logUpdateStatus(ctx, service, plan)
	b.add(u)
}

// updates reports whether a plan writes the service itself.
func updates(p model.Plan, serviceID string) bool {
	return len(p.Changes) > 0 && p.Changes[0].Kind == model.Update && p.Changes[0].Object.GetId() == serviceID
}

// logUpdateStatus tells of an update that began, ended or got stuck.
func (c *services) logUpdateStatus(ctx context.Context, old *api.Service, p model.Plan) {
	if old == nil || !updates(p, old.GetId()) {
		return
	}
	s, ok := p.Changes[0].Object.(*api.Service)
	if !ok || s.GetUpdateStatus().GetState() == old.GetUpdateStatus().GetState() {
		return
	}
	c.log.LogAttrs(ctx, slog.LevelInfo, "service update changed", slog.String("service_id", old.GetId()),
		slog.String("service", s.GetSpec().GetAnnotations().GetName()),
		slog.String("state", s.GetUpdateStatus().GetState().String()), slog.String("reason", s.GetUpdateStatus().GetMessage()))
}

// decideNode asks which tasks a node must give up.
func (c *services) decideNode(s *store.Snapshot, id string, now time.Time, b *batch) {
	v := orch.NodeView{Node: s.Node(id), Services: make(map[string]*api.Service)}
	if v.Node == nil {
		return
	}
	for t := range s.TasksByNode(id) {
		v.Tasks = append(v.Tasks, t)
		v.Services[t.GetServiceId()] = s.Service(t.GetServiceId())
	}
	plan := orch.Enforce(v, now)
	plan.Add(orch.Orphan(v, now))
	c.wakes.set(id, plan.Wake)
	if len(plan.Changes) > maxObjects { // the rest has its turn at once
		plan.Changes = plan.Changes[:maxObjects]
		c.wakes.set(id, now)
	}
	if len(plan.Changes) > 0 {
		b.add(unit{key: id, changes: plan.Changes, uses: []model.Object{v.Node}})
	}
}

// decideLoose serves a task without service: one that attaches a container to a network.
func (c *services) decideLoose(s *store.Snapshot, id string, now time.Time, b *batch) {
	t := s.Task(id)
	if t == nil || t.GetServiceId() != "" {
		return
	}
	state := t.GetStatus().GetState()
	if state == api.TaskState_ORPHANED ||
		t.GetDesiredState() == api.TaskState_REMOVE && (state < api.TaskState_ASSIGNED || state >= api.TaskState_COMPLETE) {
		b.add(unit{key: id, changes: []model.Change{{Kind: model.Remove, Object: t}}})
		return
	}
	t = model.Clone(t)
	changed, err := c.net.Task(t, nil, nil, now)
	c.net.settle(model.Tasks, id, err)
	if changed {
		b.add(unit{key: id, changes: []model.Change{{Kind: model.Update, Object: t}}})
	}
}
