package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/lifecycle"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime"
)

// attachWait bounds how long a container waits for its place in a network of the swarm.
const attachWait = 20 * time.Second

// Attachments is the network of a node's containers as their runtime sees it. Containers
// that are no tasks get their addresses in networks of the swarm through it: each such
// place is a task without a service, made when the container starts and removed when it has
// ended. It outlives swarms; who is in one binds its agent.
type Attachments struct {
	next runtime.Network
	// bridges are the node's own networks, which next connects to by itself; nil for none.
	bridges runtime.Bridges

	mu      sync.Mutex
	agent   *Agent // nil while the node is in no swarm
	changed chan struct{}
	// here are the places that running containers have, by container id.
	here map[string][]runtime.OverlayRequest
	// asking counts the calls that ask for places, by container id: what they get is kept
	// until they are done.
	asking map[string]int
	// settled is set once the runtime has told which containers a former process left.
	settled bool
}

// NewAttachments returns Attachments that connect containers through next, which knows the
// networks of the node alone; bridges may be nil.
func NewAttachments(next runtime.Network, bridges runtime.Bridges) *Attachments {
	return &Attachments{
		next: next, bridges: bridges, changed: make(chan struct{}), here: map[string][]runtime.OverlayRequest{}, asking: map[string]int{},
	}
}

// bind makes a the agent that asks for places, nil for none.
func (t *Attachments) bind(a *Agent) {
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.agent = a
	t.notify()
}

// notify wakes those who wait for a change. Callers hold mu.
func (t *Attachments) notify() {
	close(t.changed)
	t.changed = make(chan struct{})
}

// Attach implements runtime.Network.
func (t *Attachments) Attach(ctx context.Context, req runtime.SandboxRequest) (_ runtime.Sandbox, err error) {
	req.Overlays = slices.Clone(req.Overlays)
	defer t.keep(req.ContainerID)()
	if req.Former != "" {
		if err := t.rename(ctx, req); err != nil {
			return runtime.Sandbox{}, err
		}
		defer func() {
			if err != nil {
				err = errors.Join(err, t.unname(ctx, req))
			}
		}()
	}
	for i, o := range req.Overlays {
		if o.Address.IsValid() || t.bridges != nil && t.bridges.Bridge(o) {
			continue
		}
		var err error
		if req.Overlays[i], err = t.ask(ctx, &req, o); err != nil {
			return runtime.Sandbox{}, err
		}
	}
	s, err := t.next.Attach(ctx, req)
	if err != nil {
		return s, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(req.Overlays) > 0 {
		t.here[req.ContainerID] = req.Overlays
	} else {
		delete(t.here, req.ContainerID)
	}
	t.notify()
	return s, nil
}

// keep keeps the attachments of a container until done is called.
func (t *Attachments) keep(containerID string) (done func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.asking[containerID]++
	return func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if t.asking[containerID]--; t.asking[containerID] == 0 {
			delete(t.asking, containerID)
		}
		t.notify()
	}
}

// Detach implements runtime.Network.
func (t *Attachments) Detach(ctx context.Context, containerID string) error {
	err := t.next.Detach(ctx, containerID)
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.here, containerID)
	t.notify()
	return err
}

// Retain implements runtime.Network.
func (t *Attachments) Retain(ctx context.Context, containerIDs []string) error {
	err := t.next.Retain(ctx, containerIDs)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.settled = true
	t.notify()
	return err
}

// ask gets a container a place in a network.
func (t *Attachments) ask(ctx context.Context, req *runtime.SandboxRequest, o runtime.OverlayRequest) (runtime.OverlayRequest, error) {
	ctx, cancel := context.WithTimeout(ctx, attachWait)
	defer cancel()
	t.mu.Lock()
	a := t.agent
	t.mu.Unlock()
	if a == nil {
		return o, model.Errorf(model.NotFound, "network %s not found", o.Name)
	}
	if a.worker.foreign() {
		return o, model.Errorf(model.Unimplemented, "a Skep node in a swarm of Docker Engine has no overlay networks: run the container on a bridge network or on host")
	}
	target := o.NetworkID
	if target == "" {
		target = o.Name
	}
	config := &api.NetworkAttachmentConfig{Target: target, Aliases: aliases(req, o)}
	for _, addr := range o.Wanted {
		config.Addresses = append(config.Addresses, addr.String())
	}
	client, err := a.allocator(ctx)
	if err != nil {
		return o, model.Wrap(model.Unavailable, err, "Could not attach to network "+o.Name)
	}
	resp, err := client.AttachNetwork(ctx, &api.AttachNetworkRequest{Config: config, ContainerId: req.ContainerID})
	switch status.Code(err) {
	case codes.OK:
	case codes.NotFound:
		return o, model.Errorf(model.NotFound, "network %s not found", o.Name)
	case codes.PermissionDenied:
		return o, model.Wrap(model.Denied, err, "Could not attach to network "+o.Name)
	case codes.FailedPrecondition, codes.ResourceExhausted, codes.InvalidArgument:
		return o, model.Wrap(model.Precondition, err, "Could not attach to network "+o.Name)
	default:
		return o, model.Wrap(model.Unavailable, err, "Could not attach to network "+o.Name)
	}
	place, err := a.place(ctx, resp.GetAttachmentId())
	if err != nil {
		return o, model.Wrap(model.Unavailable, err, "Could not attach to network "+o.Name+": the swarm gave the container no address in time")
	}
	place.Aliases = o.Aliases
	return place, nil
}

// rename tells all nodes the name that a container has from now on. Nothing changes where the
// managers cannot be told. Those that run an older Skep know of no such change: then the name is
// new on this node alone, as it was with that one.
func (t *Attachments) rename(ctx context.Context, req runtime.SandboxRequest) error {
	asked, err := t.tellNames(ctx, &req, attachWait)
	switch {
	case err == nil, status.Code(err) == codes.Unimplemented:
		return nil
	case status.Code(err) == codes.InvalidArgument:
		return model.Wrap(model.Invalid, err, "tell the swarm the container's new name")
	}
	err = model.Wrap(model.Unavailable, err, "tell the swarm the container's new name")
	if asked { // they may have noted it all the same
		err = errors.Join(err, t.unname(ctx, req))
	}
	return err
}

// unname tells all nodes the former name of a container again, whose renaming failed.
func (t *Attachments) unname(ctx context.Context, req runtime.SandboxRequest) error {
	req.Name = req.Former
	_, err := t.tellNames(context.WithoutCancel(ctx), &req, callTimeout)
	if err == nil || status.Code(err) == codes.Unimplemented {
		return nil
	}
	return fmt.Errorf("tell the swarm the container's former name again: %w", err)
}

// tellNames tells the managers the names by which others find a container, if it has places in
// networks of the swarm, and reports whether they were asked.
func (t *Attachments) tellNames(ctx context.Context, req *runtime.SandboxRequest, timeout time.Duration) (asked bool, err error) {
	t.mu.Lock()
	a := t.agent
	t.mu.Unlock()
	if a == nil {
		return false, nil
	}
	names := a.worker.namesOf(req)
	if len(names) == 0 {
		return false, nil
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	conn, err := a.connection(ctx)
	if err != nil {
		return false, err
	}
	_, err = skepv1.NewNetworksClient(conn).RenameAttachments(ctx, &skepv1.RenameAttachmentsRequest{Attachments: names})
	return true, err
}

// namesOf returns the names that a container shall have, at each of its attachments.
func (w *worker) namesOf(req *runtime.SandboxRequest) []*skepv1.AttachmentNames {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []*skepv1.AttachmentNames
	for _, id := range slices.Sorted(maps.Keys(w.tasks)) {
		task, _ := w.tasks[id].current()
		if task.GetSpec().GetAttachment().GetContainerId() != req.ContainerID || task.GetDesiredState() > api.TaskState_RUNNING {
			continue
		}
		for _, o := range req.Overlays {
			if slices.ContainsFunc(task.GetNetworks(), func(a *api.NetworkAttachment) bool { return a.GetNetwork().GetId() == o.NetworkID }) {
				out = append(out, &skepv1.AttachmentNames{AttachmentId: id, Aliases: aliases(req, o)})
			}
		}
	}
	return out
}

// aliases are the names by which other nodes find a container in a network.
func aliases(req *runtime.SandboxRequest, o runtime.OverlayRequest) []string {
	names := slices.Concat(o.Aliases, []string{strings.TrimPrefix(req.Name, "/"), req.Hostname, req.ContainerID[:min(12, len(req.ContainerID))]})
	slices.Sort(names)
	return slices.DeleteFunc(slices.Compact(names), func(n string) bool { return n == "" })
}

// holds reports whether the container of an attachment has its place, and whether it has
// none and will get none. The channel closes when that may have changed.
func (t *Attachments) holds(task *api.Task) (connected, over bool, changed <-chan struct{}) {
	t.mu.Lock()
	defer t.mu.Unlock()
	connected = slices.ContainsFunc(t.here[task.GetSpec().GetAttachment().GetContainerId()], func(o runtime.OverlayRequest) bool {
		return slices.ContainsFunc(task.GetNetworks(), func(a *api.NetworkAttachment) bool {
			return a.GetNetwork().GetId() == o.NetworkID && slices.Contains(a.GetAddresses(), o.Address.String())
		})
	})
	return connected, !connected && t.settled && t.asking[task.GetSpec().GetAttachment().GetContainerId()] == 0, t.changed
}

// allocator returns the client of the session of now, and waits for one.
func (a *Agent) allocator(ctx context.Context) (api.ResourceAllocatorClient, error) {
	conn, err := a.connection(ctx)
	if err != nil {
		return nil, err
	}
	return api.NewResourceAllocatorClient(conn), nil
}

// connection returns that of the session of now, and waits for one.
func (a *Agent) connection(ctx context.Context) (grpc.ClientConnInterface, error) {
	for {
		a.mu.Lock()
		conn, changed := a.conn, a.connected
		a.mu.Unlock()
		if conn != nil {
			return conn, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, model.Errorf(model.Unavailable, "no manager can be reached: %w", ctx.Err())
		}
	}
}

// detach gives an attachment back.
func (a *Agent) detach(ctx context.Context, task *api.Task) error {
	client, err := a.allocator(ctx)
	if err != nil {
		return err
	}
	call, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if _, err = client.DetachNetwork(call, &api.DetachNetworkRequest{AttachmentId: task.GetId()}); status.Code(err) == codes.NotFound {
		return nil
	}
	return err
}

// place waits until an attachment was assigned to this node with its address.
func (a *Agent) place(ctx context.Context, id string) (runtime.OverlayRequest, error) {
	for {
		a.worker.mu.Lock()
		m, changed := a.worker.tasks[id], a.worker.changed
		a.worker.mu.Unlock()
		if m != nil {
			task, _ := m.current()
			if list := task.GetNetworks(); len(list) > 0 {
				return placeOf(list[0])
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return runtime.OverlayRequest{}, ctx.Err()
		}
	}
}

func placeOf(a *api.NetworkAttachment) (runtime.OverlayRequest, error) {
	o := runtime.OverlayRequest{NetworkID: a.GetNetwork().GetId(), Name: a.GetNetwork().GetSpec().GetAnnotations().GetName()}
	for _, text := range a.GetAddresses() {
		p, err := netip.ParsePrefix(text)
		if err != nil {
			return o, model.Errorf(model.Internal, "network %s: address %q is not in CIDR form", o.Name, text)
		}
		if p.Addr().Is4() {
			o.Address = p
		} else {
			o.Address6 = p
		}
	}
	if !o.Address.IsValid() {
		return o, model.Errorf(model.Unavailable, "network %s gave the container no address", o.Name)
	}
	return o, nil
}

// doAttachment performs one action of an attachment: there is no container to care for, but
// one that others made and whose end ends the attachment.
func (m *managed) doAttachment(ctx context.Context, task *api.Task, action lifecycle.Action) (*api.TaskStatus, error) {
	now := task.GetStatus()
	switch action { //nolint:exhaustive // the rest is as for other tasks
	case lifecycle.Prepare:
		return newStatus(now, api.TaskState_READY, time.Now()), nil
	case lifecycle.Stop:
		return newStatus(now, api.TaskState_SHUTDOWN, time.Now()), nil
	}
	if m.w.cfg.Attachments == nil {
		return nil, model.Errorf(model.Invalid, "this node has no containers to attach")
	}
	for {
		connected, over, changed := m.w.cfg.Attachments.holds(task)
		switch {
		case connected && action == lifecycle.Start:
			s := newStatus(now, api.TaskState_RUNNING, time.Now())
			s.RuntimeStatus = &api.TaskStatus_Container{Container: &api.ContainerStatus{ContainerId: task.GetSpec().GetAttachment().GetContainerId()}}
			return s, nil
		case over:
			if err := m.w.detach(ctx, task); err != nil {
				return nil, model.Wrap(model.Unavailable, err, "give place in network back")
			}
			<-ctx.Done() // the manager takes the task away
			return nil, ctx.Err()
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// lose disconnects the container of an attachment that the managers took away, for example
// since the node was away for long: its address may be another's by now.
func (m *managed) lose(ctx context.Context, task *api.Task) {
	if m.w.cfg.Attachments == nil {
		return
	}
	connected, _, _ := m.w.cfg.Attachments.holds(task)
	if !connected {
		return
	}
	container := task.GetSpec().GetAttachment().GetContainerId()
	for _, a := range task.GetNetworks() {
		m.log.Warn("container loses a network that the swarm took from it", slog.String("container_id", container), slog.String("network_id", a.GetNetwork().GetId()))
		if err := m.w.cfg.Engine.Disconnect(ctx, container, a.GetNetwork().GetId()); err != nil {
			m.log.Warn("container not disconnected", slog.String("container_id", container), slog.Any("error", err))
		}
	}
}
