package sim

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/moby/moby/api/types/swarm"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/orch"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/platform/keystore"
	"github.com/skep-dev/skep/platform/wire"
)

// faults gathers what watchers found wrong.
type faults struct {
	mu   sync.Mutex
	list []string
}

func (f *faults) add(format string, args ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.list = append(f.list, fmt.Sprintf(format, args...))
}

func (f *faults) take() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	list := f.list
	f.list = nil
	return list
}

func newWatcher(w *world) watcher {
	return watcher{w: w, group: new(sync.WaitGroup), faults: new(faults)}
}

// start watches every change of the state on every manager, with the manager's own
// certificate and from a machine that is never cut off.
func (o *watcher) start() {
	ctx, cancel := context.WithCancel(context.Background())
	o.cancel = cancel
	allowed := map[[2]api.TaskState]bool{}
	for _, t := range model.Transitions() {
		allowed[[2]api.TaskState{t.From, t.To}] = true
	}
	for _, m := range o.w.machines {
		o.group.Go(func() {
			for ctx.Err() == nil {
				_ = o.follow(ctx, m, allowed) // ends with the daemon, or when it is no manager
				select {
				case <-ctx.Done():
				case <-time.After(2 * time.Second):
				}
			}
		})
	}
}

func (o *watcher) stop() {
	if o.cancel != nil {
		o.cancel()
		o.group.Wait()
	}
}

// follow watches one manager until the connection breaks.
func (o *watcher) follow(ctx context.Context, m *machine, allowed map[[2]api.TaskState]bool) error {
	keys, err := keystore.Open(filepath.Join(m.dir, "data", "swarm", "certificates"))
	if err != nil {
		return err
	}
	id, err := keys.Load(nil)
	if err != nil {
		return err
	}
	root, err := pki.ParseRoot(id.RootPEM, nil)
	if err != nil {
		return err
	}
	material, err := wire.NewMaterial(root, id.ChainPEM, id.Key)
	if err != nil {
		return err
	}
	creds := &wire.Credentials{Network: o.w.net.Host("10.9.9.2")}
	creds.Set(material)
	if creds.Role() != pki.ManagerRole {
		return errors.New("no manager")
	}
	conn, err := wire.Dial(creds, m.ip+":2377", pki.ManagerRole)
	if err != nil {
		return err
	}
	defer conn.Close()
	stream, err := api.NewWatchClient(conn).Watch(ctx, &api.WatchRequest{
		Entries: []*api.WatchRequest_WatchEntry{{Kind: "task"}}, IncludeOldObject: true,
	})
	if err != nil {
		return err
	}
	for {
		msg, err := stream.Recv()
		if err != nil {
			return err
		}
		for _, e := range msg.GetEvents() {
			o.task(m, e.GetOldObject().GetTask(), e.GetObject().GetTask(), allowed)
		}
	}
}

// task checks one change of a task.
func (o *watcher) task(m *machine, old, now *api.Task, allowed map[[2]api.TaskState]bool) {
	if old == nil || now == nil {
		return
	}
	from, to := old.GetStatus().GetState(), now.GetStatus().GetState()
	if from != to && !allowed[[2]api.TaskState{from, to}] {
		o.faults.add("on %s task %s went from %s to %s", m.name, now.GetId(), from, to)
	}
	if now.GetDesiredState() < old.GetDesiredState() {
		o.faults.add("on %s the desired state of task %s went back from %s to %s", m.name, now.GetId(), old.GetDesiredState(), now.GetDesiredState())
	}
	if old.GetNodeId() != "" && old.GetNodeId() != now.GetNodeId() {
		o.faults.add("on %s task %s moved from node %s to %s", m.name, now.GetId(), old.GetNodeId(), now.GetNodeId())
	}
	if old.GetSlot() != now.GetSlot() {
		o.faults.add("on %s task %s moved from slot %d to %d", m.name, now.GetId(), old.GetSlot(), now.GetSlot())
	}
}

// running is one container that runs.
type running struct {
	on                     *machine
	service, task, slot    string
	serviceName, container string
}

// containers returns the tasks' containers that run, on all machines.
func (w *world) containers() []running {
	var out []running
	for _, m := range w.machines {
		list, err := m.engine.List(context.Background())
		if err != nil {
			w.t.Fatal(err)
		}
		for _, c := range list {
			labels := c.Config.Labels
			if !c.State.Running || labels["com.docker.swarm.task.id"] == "" {
				continue
			}
			slot, _, _ := strings.Cut(strings.TrimPrefix(labels["com.docker.swarm.task.name"], labels["com.docker.swarm.service.name"]+"."), ".")
			out = append(out, running{
				on: m, service: labels["com.docker.swarm.service.id"], task: labels["com.docker.swarm.task.id"], slot: slot,
				serviceName: labels["com.docker.swarm.service.name"], container: c.ID,
			})
		}
	}
	return out
}

// fencedName begins the names of services that are fenced.
const fencedName = "fenced"

// always checks what must hold at every moment, whatever has failed.
func (w *world) always() {
	w.t.Helper()
	slots := map[string]running{}
	for _, c := range w.containers() {
		if !strings.HasPrefix(c.serviceName, fencedName) {
			continue
		}
		key := c.service + "." + c.slot
		if other, ok := slots[key]; ok {
			w.t.Fatalf("two tasks of the fenced slot %s.%s run: %s on %s and %s on %s",
				c.serviceName, c.slot, other.task, other.on.name, c.task, c.on.name)
		}
		slots[key] = c
	}
	for _, f := range w.watch.faults.take() {
		w.t.Fatal(f)
	}
	for _, m := range w.machines {
		select {
		case err := <-m.done:
			m.up.Store(false)
			m.done = nil
			w.t.Fatalf("the daemon of %s ended by itself: %v", m.name, err)
		default:
		}
	}
}

// fence makes a service a fenced one.
func fence(s swarm.ServiceSpec) swarm.ServiceSpec {
	s.Labels = map[string]string{orch.FenceLabel: "true"}
	return s
}

// nodesReady checks that all machines are ready nodes and the managers a whole group.
func (w *world) nodesReady() error {
	var nodes []swarm.Node
	if err := w.any("GET", "/nodes", nil, &nodes); err != nil {
		return err
	}
	leaders, ready := 0, 0
	for _, n := range nodes {
		if n.Status.State != swarm.NodeStateReady {
			return fmt.Errorf("node %s is %s: %s", n.Description.Hostname, n.Status.State, n.Status.Message)
		}
		ready++
		if s := n.ManagerStatus; s != nil {
			if s.Reachability != swarm.ReachabilityReachable {
				return fmt.Errorf("manager %s is %s", n.Description.Hostname, s.Reachability)
			}
			if s.Leader {
				leaders++
			}
		}
		if (n.Spec.Role == swarm.NodeRoleManager) != (n.ManagerStatus != nil) {
			return fmt.Errorf("node %s is to be a %s and is not", n.Description.Hostname, n.Spec.Role)
		}
	}
	if ready != len(w.machines) || leaders != 1 {
		return fmt.Errorf("%d of %d nodes are ready, %d lead", ready, len(w.machines), leaders)
	}
	return nil
}

// converged checks that every service has the tasks it wants and nothing else runs.
func (w *world) converged() error {
	if err := w.nodesReady(); err != nil {
		return err
	}
	var services []swarm.Service
	var tasks []swarm.Task
	if err := w.any("GET", "/services", nil, &services); err != nil {
		return err
	}
	if err := w.any("GET", "/tasks", nil, &tasks); err != nil {
		return err
	}
	placed := map[string]string{} // task, node
	live := map[string]int{}      // by service
	for _, t := range tasks {
		if t.DesiredState > swarm.TaskStateRunning && t.Status.State == swarm.TaskStateRunning {
			return fmt.Errorf("task %s of %s runs and shall be %s", t.ID, t.ServiceID, t.DesiredState)
		}
		if t.DesiredState != swarm.TaskStateRunning {
			continue
		}
		if t.Status.State != swarm.TaskStateRunning {
			return fmt.Errorf("task %s of %s is %s: %s %s", t.ID, t.ServiceID, t.Status.State, t.Status.Message, t.Status.Err)
		}
		placed[t.ID] = t.NodeID
		live[t.ServiceID]++
	}
	for _, s := range services {
		want := len(w.machines)
		if r := s.Spec.Mode.Replicated; r != nil {
			want = int(*r.Replicas)
		}
		if live[s.ID] != want {
			return fmt.Errorf("service %s has %d of %d tasks", s.Spec.Name, live[s.ID], want)
		}
		delete(live, s.ID)
	}
	if len(live) > 0 {
		return fmt.Errorf("tasks of removed services shall run: %v", live)
	}
	for _, c := range w.containers() {
		if placed[c.task] != c.on.id {
			return fmt.Errorf("task %s of %s still runs on %s", c.task, c.serviceName, c.on.name)
		}
		delete(placed, c.task)
	}
	if len(placed) > 0 {
		return fmt.Errorf("tasks are said to run and do not: %v", placed)
	}
	return w.swept(services)
}

// swept checks that no container of a removed service is left, running or not.
func (w *world) swept(services []swarm.Service) error {
	known := map[string]bool{}
	for _, s := range services {
		known[s.ID] = true
	}
	for _, m := range w.machines {
		list, err := m.engine.List(context.Background())
		if err != nil {
			return err
		}
		for _, c := range list {
			if id := c.Config.Labels["com.docker.swarm.service.id"]; id != "" && !known[id] {
				return fmt.Errorf("a container of removed service %s is left on %s, %s", c.Config.Labels["com.docker.swarm.service.name"], m.name, c.State.Status)
			}
		}
	}
	return nil
}
