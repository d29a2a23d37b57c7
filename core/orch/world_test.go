package orch

import (
	"bytes"
	"cmp"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

// world is a small swarm with one service: the deciders' plans are applied to it, a
// scheduler places tasks, agents do as they are told, and time is a number. Whatever a
// decider answers is checked against the rules that hold for every plan.
type world struct {
	now     time.Time
	service *api.Service
	removed bool // the service was there and is not any more
	tasks   []*api.Task
	nodes   map[string]*api.Node
	cluster *api.Cluster
	ran     map[string]time.Time
	version uint64 // of the last write
	ids     int
	names   map[string]string // of tasks, by id: slot or node, and a number
	count   map[string]int    // of the tasks that each place has had
	wake    time.Time
	nodeAt  map[string]time.Time // wakes of Enforce and Orphan
	limit   int
	tick    time.Duration // that passes with each decision

	images map[string]behaviour // how containers of an image behave
	since  map[string]time.Time // of what a task's agent is at
	deaf   map[string]bool      // nodes whose agent does nothing
	// containers is what really runs: task id to its place, also on lost nodes.
	containers map[string]string
	// mixed is set once an update has started tasks first, so that slots may hold two.
	mixed  bool
	events []string                         // what happened since they were last taken
	broken func(format string, args ...any) // a rule was broken
}

// behaviour is how the containers of an image behave.
type behaviour struct {
	prepare time.Duration // until ready to start
	stop    time.Duration
	end     api.TaskState // RUNNING means until stopped
	after   time.Duration // of running, when end comes; negative fails the preparation
}

func newWorld(broken func(string, ...any)) *world {
	return &world{
		now: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC), nodes: make(map[string]*api.Node), cluster: &api.Cluster{},
		ran: make(map[string]time.Time), names: make(map[string]string), count: make(map[string]int),
		nodeAt: make(map[string]time.Time), images: make(map[string]behaviour), since: make(map[string]time.Time),
		deaf: make(map[string]bool), containers: make(map[string]string), broken: broken, version: 10,
	}
}

const serviceID = "web"

func (w *world) behave(t *api.Task) behaviour {
	if b, ok := w.images[image(t)]; ok {
		return b
	}
	return behaviour{prepare: time.Second, stop: time.Second, end: api.TaskState_RUNNING}
}

func image(t *api.Task) string { return t.GetSpec().GetContainer().GetImage() }

func (w *world) task(id string) *api.Task {
	for _, t := range w.tasks {
		if t.GetId() == id {
			return t
		}
	}
	return nil
}

// place names the slot of a task.
func (w *world) place(t *api.Task) string {
	if w.byNode() {
		return t.GetNodeId()
	}
	return fmt.Sprint(t.GetSlot())
}

func (w *world) byNode() bool {
	return w.service.GetSpec().GetGlobal() != nil || w.service.GetSpec().GetGlobalJob() != nil
}

// say adds to what has happened, with names for ids.
func (w *world) say(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	for _, id := range slices.SortedFunc(maps.Keys(w.names), func(a, b string) int { return cmp.Compare(b, a) }) {
		text = strings.ReplaceAll(text, id, w.names[id])
	}
	w.events = append(w.events, text)
}

func (w *world) view() View {
	v := View{
		ServiceID: serviceID, Service: w.service, Tasks: slices.Clone(w.tasks), Nodes: make(map[string]*api.Node),
		Cluster: w.cluster, RanSince: w.ran, Limit: w.limit,
	}
	ids := w.ids
	v.NewID = func() string {
		ids++
		return fmt.Sprintf("task%05d", ids)
	}
	for _, t := range w.tasks {
		if n := w.nodes[t.GetNodeId()]; n != nil {
			v.Nodes[n.GetId()] = n
		}
	}
	if w.byNode() {
		maps.Copy(v.Nodes, w.nodes)
	}
	return v
}

// decide asks the deciders until they want nothing more now.
func (w *world) decide() {
	rounds := 50
	if w.limit > 0 {
		rounds = 1000
	}
	for range rounds {
		w.decideNodes()
		before := w.state()
		plan := Decide(w.view(), w.now)
		w.checkPlan(plan)
		if !bytes.Equal(before, w.state()) {
			w.broken("the view was changed")
		}
		w.wake = plan.Wake
		if len(plan.Changes) == 0 {
			break
		}
		w.apply(plan.Changes, true)
		w.checkTasks(w.limit == 0)
		again := Decide(w.view(), w.now)
		if w.limit == 0 && len(again.Changes) > 0 {
			w.broken("decided at once again:\n%v", again.Changes)
		}
		w.now = w.now.Add(w.tick)
	}
	if len(Decide(w.view(), w.now).Changes) > 0 {
		w.broken("decisions without end")
	}
	w.checkTasks(true)
}

func (w *world) decideNodes() {
	for _, id := range slices.Sorted(maps.Keys(w.nodes)) {
		v := NodeView{Node: w.nodes[id], Services: map[string]*api.Service{}}
		if w.service != nil {
			v.Services[serviceID] = w.service
		}
		for _, t := range w.tasks {
			if t.GetNodeId() == id {
				v.Tasks = append(v.Tasks, t)
			}
		}
		w.applyNode(Enforce(v, w.now), model.Enforcer)
		orphans := Orphan(v, w.now)
		w.applyNode(orphans, model.Dispatcher)
		w.nodeAt[id] = orphans.Wake
	}
}

func (w *world) applyNode(p model.Plan, by model.Actor) {
	for _, c := range p.Changes {
		t, old := c.Object.(*api.Task), w.task(c.Object.GetId())
		from, to := old.GetStatus().GetState(), t.GetStatus().GetState()
		if from != to && !slices.Contains(model.Transitions(), model.Transition{From: from, To: to, By: by}) {
			w.broken("%s: %v to %v by %v", w.names[t.GetId()], from, to, by)
		}
		if t.GetDesiredState() < old.GetDesiredState() {
			w.broken("%s: desired %v after %v", w.names[t.GetId()], t.GetDesiredState(), old.GetDesiredState())
		}
		if from != to {
			w.say("%s %s", t.GetId(), model.StateName(to))
		} else {
			w.say("stop %s: %s", t.GetId(), t.GetStatus().GetErr())
		}
	}
	w.apply(p.Changes, false)
}

// state is the whole state in bytes, to see whether it changed.
func (w *world) state() []byte {
	var b []byte
	add := func(m proto.Message) {
		b, _ = proto.MarshalOptions{Deterministic: true}.MarshalAppend(b, m)
	}
	if w.service != nil {
		add(w.service)
	}
	for _, t := range w.tasks {
		add(t)
	}
	for _, id := range slices.Sorted(maps.Keys(w.nodes)) {
		add(w.nodes[id])
	}
	return b
}

// stamp gives a record that is written its version and times.
func (w *world) stamp(m *api.Meta) *api.Meta {
	out := &api.Meta{CreatedAt: m.GetCreatedAt(), UpdatedAt: timestamppb.New(w.now), Version: &api.Version{Index: w.version}}
	if out.CreatedAt == nil {
		out.CreatedAt = timestamppb.New(w.now)
	}
	return out
}

// apply writes changes, as the store would.
func (w *world) apply(changes []model.Change, tell bool) {
	w.version++
	for _, c := range changes {
		switch o := c.Object.(type) {
		case *api.Service:
			old := w.service.GetUpdateStatus()
			w.service = model.Clone(o)
			w.service.Meta = w.stamp(o.GetMeta())
			if now := o.GetUpdateStatus(); tell && !proto.Equal(old, now) {
				w.say("service %s: %s", strings.ToLower(now.GetState().String()), now.GetMessage())
			}
		case *api.Task:
			w.applyTask(c.Kind, o, tell)
		}
	}
}

func (w *world) applyTask(kind model.ChangeKind, t *api.Task, tell bool) {
	t = model.Clone(t)
	t.Meta = w.stamp(t.GetMeta())
	id := t.GetId()
	switch kind {
	case model.Create:
		if _, err := fmt.Sscanf(id, "task%d", &w.ids); err != nil {
			w.broken("id %s: %v", id, err)
		}
		place := w.place(t)
		w.count[place]++
		w.names[id] = fmt.Sprintf("%s.%d", place, w.count[place])
		w.tasks = append(w.tasks, t)
		w.since[id] = w.now
		held := ""
		if t.GetDesiredState() == api.TaskState_READY {
			held = ", held back"
		}
		w.say("make %s of %s%s", id, image(t), held)
	case model.Remove:
		if tell {
			w.say("forget %s", id)
		}
		w.tasks = slices.DeleteFunc(w.tasks, func(o *api.Task) bool { return o.GetId() == id })
		delete(w.ran, id)
	case model.Update:
		i := slices.IndexFunc(w.tasks, func(o *api.Task) bool { return o.GetId() == id })
		old := w.tasks[i]
		if old.GetStatus().GetState() == api.TaskState_RUNNING && model.Terminal(t.GetStatus().GetState()) {
			w.ran[id] = changed(old)
		}
		if tell && old.GetDesiredState() != t.GetDesiredState() {
			verb := map[api.TaskState]string{
				api.TaskState_RUNNING: "start", api.TaskState_COMPLETE: "start",
				api.TaskState_SHUTDOWN: "stop", api.TaskState_REMOVE: "remove",
			}[t.GetDesiredState()]
			w.say("%s %s", verb, id)
		}
		w.tasks[i] = t
		w.since[id] = w.now
	}
}

// settle lets everybody do what can be done without time.
func (w *world) settle() {
	for range 10000 {
		w.decide()
		if !w.schedule() && !w.agents() {
			return
		}
		w.checkContainers()
	}
	w.broken("no rest at %v", w.now)
}

// schedule gives the first task that lacks it a node, or ends one that is not wanted.
func (w *world) schedule() bool {
	for _, t := range w.tasks {
		if t.GetStatus().GetState() >= api.TaskState_ASSIGNED {
			continue
		}
		if t.GetDesiredState() >= api.TaskState_SHUTDOWN {
			w.status(t, api.TaskState_SHUTDOWN)
			return true
		}
		constraints, _ := model.ParseConstraints(t.GetSpec().GetPlacement().GetConstraints())
		best, least := "", 0
		for _, id := range slices.Sorted(maps.Keys(w.nodes)) {
			n := w.nodes[id]
			if n.GetStatus().GetState() != api.NodeStatus_READY || n.GetSpec().GetAvailability() != api.NodeSpec_ACTIVE ||
				t.GetNodeId() != "" && t.GetNodeId() != id || !model.MatchAll(constraints, n) {
				continue
			}
			has := 0
			for _, o := range w.tasks {
				if o.GetNodeId() == id && !model.Terminal(o.GetStatus().GetState()) {
					has++
				}
			}
			if best == "" || has < least {
				best, least = id, has
			}
		}
		if best != "" {
			edited := model.Clone(t)
			edited.NodeId = best
			w.status(edited, api.TaskState_ASSIGNED)
			return true
		}
	}
	return false
}

// agents lets the first agent that has something to do now do it.
func (w *world) agents() bool {
	for _, t := range w.tasks {
		if at, to := w.next(t); to != 0 && !at.After(w.now) {
			w.status(t, to)
			return true
		}
	}
	return false
}

func (w *world) agentsWake() (at time.Time) {
	for _, t := range w.tasks {
		if next, to := w.next(t); to != 0 {
			at = model.Earlier(at, next)
		}
	}
	return at
}

// next returns what a task's agent will report next, and when; no state for nothing.
func (w *world) next(t *api.Task) (at time.Time, to api.TaskState) {
	state := t.GetStatus().GetState()
	n := w.nodes[t.GetNodeId()]
	if n == nil || n.GetStatus().GetState() != api.NodeStatus_READY || w.deaf[n.GetId()] ||
		state < api.TaskState_ASSIGNED || model.Terminal(state) {
		return time.Time{}, 0
	}
	b := w.behave(t)
	since := w.since[t.GetId()]
	switch {
	case t.GetDesiredState() >= api.TaskState_SHUTDOWN:
		if state < api.TaskState_STARTING {
			return since, api.TaskState_SHUTDOWN
		}
		return since.Add(b.stop), api.TaskState_SHUTDOWN
	case state < api.TaskState_READY && b.after < 0:
		return since.Add(b.prepare), api.TaskState_REJECTED
	case state < api.TaskState_READY:
		return since.Add(b.prepare), api.TaskState_READY
	case state == api.TaskState_READY && t.GetDesiredState() >= api.TaskState_RUNNING:
		return since, api.TaskState_RUNNING
	case state == api.TaskState_RUNNING && b.end != api.TaskState_RUNNING:
		return since.Add(b.after), b.end
	}
	return time.Time{}, 0
}

// status reports a task's new state.
func (w *world) status(t *api.Task, to api.TaskState) {
	t = model.Clone(t)
	t.Status = &api.TaskStatus{State: to, Timestamp: timestamppb.New(w.now), AppliedAt: timestamppb.New(w.now)}
	switch {
	case to == api.TaskState_RUNNING:
		w.say("%s runs on %s", t.GetId(), t.GetNodeId())
		w.containers[t.GetId()] = w.place(t)
	case model.Terminal(to):
		delete(w.containers, t.GetId())
		w.say("%s %s", t.GetId(), model.StateName(to))
	}
	w.apply([]model.Change{{Kind: model.Update, Object: t}}, false)
}

// --- what people do ---

func (w *world) addNode(id string) {
	w.version++
	w.nodes[id] = &api.Node{
		Id: id, Meta: w.stamp(nil), Status: &api.NodeStatus{State: api.NodeStatus_READY},
		Spec:        &api.NodeSpec{Annotations: &api.Annotations{}},
		Description: &api.NodeDescription{Hostname: id, Resources: &api.Resources{NanoCpus: 1e12, MemoryBytes: 1 << 40}},
	}
}

// label sets a label; copies of records have no empty maps.
func label(a *api.Annotations, key, value string) {
	if a.Labels == nil {
		a.Labels = make(map[string]string)
	}
	a.Labels[key] = value
}

func (w *world) editNode(id string, f func(*api.Node)) {
	w.version++
	n := model.Clone(w.nodes[id])
	f(n)
	n.Meta = w.stamp(n.GetMeta())
	w.nodes[id] = n
}

// removeNode takes a node out of the swarm for good, as the API does: its tasks are
// given up, and whoever does that has made sure that nothing runs there.
func (w *world) removeNode(id string) {
	delete(w.nodes, id)
	delete(w.nodeAt, id)
	for _, t := range slices.Clone(w.tasks) {
		if t.GetNodeId() == id && !model.Terminal(t.GetStatus().GetState()) {
			w.status(t, api.TaskState_ORPHANED)
		}
	}
}

func (w *world) create(s *api.Service) {
	w.version++
	s.Id, s.SpecVersion, s.Meta = serviceID, &api.Version{}, w.stamp(nil)
	if isJob(s) {
		s.JobStatus = &api.JobStatus{JobIteration: &api.Version{}}
	}
	w.service = s
	w.mixed = w.mixed || s.GetSpec().GetUpdate().GetOrder() == api.UpdateConfig_START_FIRST
}

// edit changes the service's spec, as the API does.
func (w *world) edit(f func(*api.ServiceSpec)) {
	s := model.Clone(w.service)
	s.PreviousSpec, s.PreviousSpecVersion = model.Clone(s.GetSpec()), s.GetSpecVersion()
	s.SpecVersion = &api.Version{Index: s.GetMeta().GetVersion().GetIndex()}
	s.UpdateStatus = nil
	if isJob(s) {
		s.JobStatus.JobIteration.Index++
	}
	f(s.GetSpec())
	w.version++
	s.Meta = w.stamp(s.GetMeta())
	w.service = s
	for _, c := range []*api.UpdateConfig{s.GetSpec().GetUpdate(), s.GetSpec().GetRollback()} {
		w.mixed = w.mixed || c.GetOrder() == api.UpdateConfig_START_FIRST
	}
}

// rollback is a manual one.
func (w *world) rollback() {
	s := model.Clone(w.service)
	s.Spec, s.SpecVersion = s.GetPreviousSpec(), s.GetPreviousSpecVersion()
	s.PreviousSpec, s.PreviousSpecVersion = nil, nil
	s.UpdateStatus = &api.UpdateStatus{
		State: api.UpdateStatus_ROLLBACK_STARTED, Message: manualRollback, StartedAt: timestamppb.New(w.now),
	}
	w.version++
	s.Meta = w.stamp(s.GetMeta())
	w.service = s
}

func (w *world) remove() {
	w.version++
	w.service, w.removed = nil, true
}

// --- the rules ---

// checkPlan holds a plan against the rules for plans.
func (w *world) checkPlan(p model.Plan) {
	if !p.Wake.IsZero() && !p.Wake.After(w.now) {
		w.broken("wakes at %v, now is %v", p.Wake, w.now)
	}
	v := w.view()
	rand.New(rand.NewPCG(uint64(w.ids), w.version)).Shuffle(len(v.Tasks), func(i, j int) { v.Tasks[i], v.Tasks[j] = v.Tasks[j], v.Tasks[i] })
	if again := Decide(v, w.now); !samePlan(p, again) {
		w.broken("the same view gave\n%v\nand\n%v", p, again)
	}
	for _, c := range p.Changes {
		t, ok := c.Object.(*api.Task)
		if !ok {
			continue
		}
		old := w.task(t.GetId())
		switch c.Kind {
		case model.Create:
			if t.GetStatus().GetState() != api.TaskState_NEW || old != nil || w.service == nil {
				w.broken("created %v", t)
			}
		case model.Update:
			if t.GetDesiredState() < old.GetDesiredState() {
				w.broken("%s: desired %v after %v", w.names[t.GetId()], t.GetDesiredState(), old.GetDesiredState())
			}
			if !proto.Equal(t.GetStatus(), old.GetStatus()) {
				w.broken("%s: status %v after %v", w.names[t.GetId()], t.GetStatus(), old.GetStatus())
			}
		case model.Remove:
			if (&item{Task: old}).mayRun() && w.nodes[old.GetNodeId()] != nil {
				w.broken("forgot %s, which may run", w.names[t.GetId()])
			}
		}
	}
	// Nodes that have none of the tasks are no reason, but for the global modes.
	v = w.view()
	maps.Copy(v.Nodes, w.nodes)
	if again := Decide(v, w.now); !samePlan(p, again) {
		w.broken("with all nodes in view\n%v\nand without\n%v", again, p)
	}
	w.checkParallelism(p)
}

func samePlan(a, b model.Plan) bool {
	return a.Wake.Equal(b.Wake) && slices.Equal(a.Notes, b.Notes) &&
		slices.EqualFunc(a.Changes, b.Changes, func(a, b model.Change) bool {
			return a.Kind == b.Kind && proto.Equal(a.Object, b.Object)
		})
}

// begins reports whether a new task begins the update of its slot: it takes the place of one
// that could have gone on, and is not another attempt of an update that has begun already.
func (w *world) begins(s *api.Service, t *api.Task) bool {
	k := newWork(w.view(), w.now)
	replaces := false
	for _, i := range k.tasks {
		if w.place(i.Task) != w.place(t) {
			continue
		}
		if updates(s, i.Task) {
			return false
		}
		replaces = replaces || i.live() && !k.mustMove(i) && i.GetSpecVersion().GetIndex() != t.GetSpecVersion().GetIndex()
	}
	return replaces
}

// updates reports whether a task was made by a service's current update.
func updates(s *api.Service, t *api.Task) bool {
	return t.GetSpecVersion().GetIndex() == s.GetSpecVersion().GetIndex() &&
		!created(t).Before(s.GetUpdateStatus().GetStartedAt().AsTime())
}

// checkParallelism holds a plan that begins to update slots against the number of slots
// that may be under way by the spec that it leaves.
func (w *world) checkParallelism(p model.Plan) {
	s, tasks := w.after(p)
	config := s.GetSpec().GetUpdate()
	if s.GetUpdateStatus().GetState() == api.UpdateStatus_ROLLBACK_STARTED {
		config = s.GetSpec().GetRollback()
	}
	if config == nil {
		config = &api.UpdateConfig{Parallelism: 1}
	}
	if isJob(s) || config.GetParallelism() == 0 { // a job's tasks of another run just go
		return
	}
	begins := slices.ContainsFunc(p.Changes, func(c model.Change) bool {
		t, ok := c.Object.(*api.Task)
		return ok && c.Kind == model.Create && w.begins(s, t)
	})
	if under := w.underWay(s, tasks, config.GetDelay().AsDuration()); begins && uint64(len(under)) > config.GetParallelism() {
		w.broken("updates are under way in %v, at most in %d may be", under, config.GetParallelism())
	}
}

// after returns the service and the tasks that a plan leaves.
func (w *world) after(p model.Plan) (*api.Service, []*api.Task) {
	s, tasks := w.service, slices.Clone(w.tasks)
	for _, c := range p.Changes {
		if o, ok := c.Object.(*api.Service); ok {
			s = o
			continue
		}
		i := slices.IndexFunc(tasks, func(o *api.Task) bool { return o.GetId() == c.Object.GetId() })
		switch t, _ := c.Object.(*api.Task); c.Kind {
		case model.Create:
			tasks = append(tasks, t)
		case model.Update:
			tasks[i] = t
		case model.Remove:
			tasks = slices.Delete(tasks, i, i+1)
		}
	}
	return s, tasks
}

// underWay lists the places with a live task of the current update, where none has started
// or failed yet, or did so less than the delay ago. Those of nodes that are to have no task
// do not count: their tasks may never come to run, and the update must not wait for them.
func (w *world) underWay(s *api.Service, tasks []*api.Task, delay time.Duration) []string {
	live, quiet := make(map[string]bool), make(map[string]bool)
	for _, t := range tasks {
		place := w.place(t)
		if t.GetDesiredState() >= api.TaskState_REMOVE || w.byNode() && !w.eligible(place) ||
			!updates(s, t) {
			continue
		}
		live[place] = live[place] || t.GetDesiredState() <= api.TaskState_RUNNING
		if t.GetStatus().GetState() >= api.TaskState_RUNNING {
			quiet[place] = quiet[place] || !changed(t).Add(delay).After(w.now)
		}
	}
	var under []string
	for _, place := range slices.Sorted(maps.Keys(live)) {
		if live[place] && !quiet[place] {
			under = append(under, place)
		}
	}
	return under
}

// eligible reports whether a node is to have a task of a global service.
func (w *world) eligible(id string) bool {
	n := w.nodes[id]
	constraints, err := model.ParseConstraints(w.service.GetSpec().GetTask().GetPlacement().GetConstraints())
	return n != nil && n.GetSpec().GetAvailability() == api.NodeSpec_ACTIVE && n.GetStatus().GetState() != api.NodeStatus_DOWN &&
		err == nil && model.MatchAll(constraints, n)
}

// checkTasks holds the tasks after a plan against the rules for states. Some hold only when
// the plans were carried out as a whole: one that is cut short leaves, say, some tasks of
// those that a removed service had.
func (w *world) checkTasks(whole bool) {
	if w.service == nil {
		for _, t := range w.tasks {
			if whole && (t.GetDesiredState() != api.TaskState_REMOVE || model.Terminal(t.GetStatus().GetState())) {
				w.broken("kept for a removed service: %v", t)
			}
		}
		return
	}
	live, ended := make(map[string]int), make(map[string]int)
	limit := int(newWork(w.view(), w.now).historyLimit())
	for _, t := range w.tasks {
		if t.GetDesiredState() >= api.TaskState_REMOVE {
			continue
		}
		limit = max(limit, int(t.GetSpec().GetRestart().GetMaxAttempts())+1)
		if t.GetDesiredState() <= api.TaskState_COMPLETE && t.GetStatus().GetState() <= api.TaskState_RUNNING {
			live[w.place(t)]++
		}
		if model.Terminal(t.GetStatus().GetState()) {
			ended[w.place(t)]++
		}
	}
	for place, n := range live {
		if most := w.mostLive(); n > most {
			w.broken("%d live tasks in %s", n, place)
		}
	}
	if !whole {
		return
	}
	for place, n := range ended {
		// While an update runs, the failures that it counts stay as well. One more may be what
		// a task that is held back waits for.
		if !newWork(w.view(), w.now).updating() && n > max(limit, 1)+1 {
			w.broken("%d records of %s, the limit is %d", n, place, limit)
		}
	}
	if r := w.service.GetSpec().GetReplicated(); r != nil && uint64(len(live)) > r.GetReplicas() {
		w.broken("%d slots are live, want %d", len(live), r.GetReplicas())
	}
	if j := w.service.GetSpec().GetReplicatedJob(); j != nil && uint64(len(live)) > max(1, j.GetMaxConcurrent()) {
		w.broken("%d slots of the job are live, want %d", len(live), j.GetMaxConcurrent())
	}
}

func (w *world) mostLive() int {
	if w.mixed && !fenced(w.service) {
		return 2
	}
	return 1
}

// checkContainers looks at what really runs.
func (w *world) checkContainers() {
	if !fenced(w.service) {
		return
	}
	has := make(map[string]string)
	for id, place := range w.containers {
		if other := has[place]; other != "" {
			w.broken("two containers of the fenced slot %s: %s and %s", place, w.names[id], w.names[other])
		}
		has[place] = id
	}
}
