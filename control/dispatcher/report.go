package dispatcher

import (
	"context"
	"log/slog"
	"slices"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/store"
)

// nodeReport is what is to be written about a node.
type nodeReport struct {
	state       api.NodeStatus_State
	message     string
	addr        string
	description *api.NodeDescription
	written     chan struct{} // closed when written; may be nil
}

// batch gathers reports, the latest of each task and node.
type batch struct {
	tasks map[string]*api.TaskStatus
	nodes map[string]*nodeReport
	order []string // tasks in the order of their first report
	waits []chan struct{}
}

func newBatch() *batch {
	return &batch{tasks: map[string]*api.TaskStatus{}, nodes: map[string]*nodeReport{}}
}

func (b *batch) empty() bool { return len(b.tasks) == 0 && len(b.nodes) == 0 }

func (b *batch) node(id string, r *nodeReport) {
	if old := b.nodes[id]; old != nil && r.description == nil {
		r.description = old.description
	}
	if r.written != nil {
		b.waits = append(b.waits, r.written)
	}
	b.nodes[id] = r
}

func (b *batch) task(id string, s *api.TaskStatus) {
	old, known := b.tasks[id]
	if !known {
		b.order = append(b.order, id)
	}
	if !known || s.GetState() >= old.GetState() {
		b.tasks[id] = s
	}
}

func (t *term) wakeWriter() {
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

// reportAndWait writes a report about a node and returns when the state has it.
func (d *Dispatcher) reportAndWait(ctx context.Context, t *term, nodeID string, r *nodeReport) error {
	r.written = make(chan struct{})
	d.mu.Lock()
	t.pending.node(nodeID, r)
	t.wakeWriter()
	d.mu.Unlock()
	select {
	case <-r.written:
		return nil
	case <-t.ctx.Done():
		return errStopped()
	case <-ctx.Done():
		return ctx.Err()
	}
}

// UpdateTaskStatus takes in what a node observed of its tasks. It returns before that is
// written; a node reports everything again when it registers.
func (d *Dispatcher) UpdateTaskStatus(ctx context.Context, req *api.UpdateTaskStatusRequest) (*api.UpdateTaskStatusResponse, error) {
	nodeID, _, err := d.cfg.Caller(ctx)
	if err != nil {
		return nil, err
	}
	t, _, err := d.check(nodeID, req.GetSessionId())
	if err != nil {
		return nil, err
	}
	view := d.cfg.State.View()
	for _, u := range req.GetUpdates() {
		if task := view.Task(u.GetTaskId()); task != nil && task.GetNodeId() != nodeID {
			return nil, status.Error(codes.PermissionDenied, "cannot update a task not assigned this node")
		}
	}
	for {
		d.mu.Lock()
		if len(t.pending.tasks) < maxPending {
			for _, u := range req.GetUpdates() {
				if u.GetStatus() != nil {
					t.pending.task(u.GetTaskId(), u.GetStatus())
				}
			}
			t.wakeWriter()
			d.mu.Unlock()
			return new(api.UpdateTaskStatusResponse), nil
		}
		room := t.room
		d.mu.Unlock()
		select {
		case <-room:
		case <-t.ctx.Done():
			return nil, errStopped()
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// UpdateVolumeStatus is of no use before there are cluster volumes.
func (d *Dispatcher) UpdateVolumeStatus(context.Context, *api.UpdateVolumeStatusRequest) (*api.UpdateVolumeStatusResponse, error) {
	return nil, status.Error(codes.Unimplemented, "cluster volumes are not implemented by skep")
}

// write writes reports: whatever came in while the last write was in flight goes together.
func (d *Dispatcher) write(ctx context.Context, t *term) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.wake:
		}
		d.mu.Lock()
		b := t.pending
		t.pending = newBatch()
		close(t.room)
		t.room = make(chan struct{})
		d.mu.Unlock()
		if b.empty() {
			continue
		}
		if err := d.commit(ctx, b); err != nil {
			return err
		}
		for _, w := range b.waits {
			close(w)
		}
	}
}

// commit writes a batch in as many entries as it needs.
func (d *Dispatcher) commit(ctx context.Context, b *batch) error {
	ids := make([]string, 0, len(b.nodes))
	for id := range b.nodes {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	for chunk := range slices.Chunk(ids, batchSize) {
		_, err := d.cfg.State.Update(ctx, func(tx *store.Tx) error {
			for _, id := range chunk {
				if err := writeNode(tx, id, b.nodes[id]); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	for chunk := range slices.Chunk(b.order, batchSize) {
		var delays []time.Duration
		_, err := d.cfg.State.Update(ctx, func(tx *store.Tx) error {
			for _, id := range chunk {
				old := tx.Snapshot().Task(id)
				if err := d.writeTask(tx, old, b.tasks[id]); err != nil {
					return err
				}
				if delay, ok := started(old, tx.Snapshot().Task(id), tx.Now()); ok {
					delays = append(delays, delay)
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		for _, delay := range delays {
			d.metrics.scheduling.Observe(delay.Seconds())
		}
	}
	return nil
}

func writeNode(tx *store.Tx, id string, r *nodeReport) error {
	old := tx.Snapshot().Node(id)
	if old == nil {
		return nil
	}
	node := model.Clone(old)
	node.Status = &api.NodeStatus{State: r.state, Message: r.message, Addr: r.addr}
	if r.addr == "" || r.addr == "@" {
		node.Status.Addr = old.GetStatus().GetAddr()
	}
	if r.description != nil {
		node.Description = r.description
	}
	if proto.Equal(old.GetStatus(), node.GetStatus()) && proto.Equal(old.GetDescription(), node.GetDescription()) {
		return nil
	}
	return tx.Update(node)
}

// writeTask writes a report about a task, which may be gone.
func (d *Dispatcher) writeTask(tx *store.Tx, old *api.Task, s *api.TaskStatus) error {
	if old == nil || s.GetState() < old.GetStatus().GetState() || sameStatus(old.GetStatus(), s) {
		return nil
	}
	if old.GetStatus().GetState() != s.GetState() {
		d.cfg.Log.Debug("task changed", slog.String("task_id", old.GetId()), slog.String("state", model.StateName(s.GetState())))
	}
	task := model.Clone(old)
	task.Status = model.Clone(s)
	task.Status.AppliedBy = d.cfg.NodeID
	task.Status.AppliedAt = timestamppb.New(tx.Now())
	return tx.Update(task)
}

// sameStatus reports whether a report says nothing new.
func sameStatus(old, s *api.TaskStatus) bool {
	o := model.Clone(old)
	o.AppliedBy, o.AppliedAt = "", nil
	return proto.Equal(o, s)
}

// markUnknown notes at the start of a term that nobody knows how the nodes are.
func (d *Dispatcher) markUnknown(ctx context.Context) error {
	var ids []string
	for node := range d.cfg.State.View().Nodes() {
		if s := node.GetStatus().GetState(); s != api.NodeStatus_DOWN && s != api.NodeStatus_UNKNOWN {
			ids = append(ids, node.GetId())
		}
	}
	for chunk := range slices.Chunk(ids, batchSize) {
		_, err := d.cfg.State.Update(ctx, func(tx *store.Tx) error {
			for _, id := range chunk {
				old := tx.Snapshot().Node(id)
				if old == nil {
					continue
				}
				node := model.Clone(old)
				node.Status = &api.NodeStatus{
					State:   api.NodeStatus_UNKNOWN,
					Message: `Node moved to "unknown" state due to leadership change in cluster`,
					Addr:    old.GetStatus().GetAddr(),
				}
				if err := tx.Update(node); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}
