package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"
)

const (
	// monitorDefault is how long tasks must run before a service counts as converged,
	// unless the service says otherwise.
	monitorDefault = 5 * time.Second
	// failuresAllowed is how many tasks of a service may fail before waiting for it is
	// given up: one may be bad luck, three are a reason.
	failuresAllowed = 3
	pollEvery       = 200 * time.Millisecond
)

// converge shows the progress of services until all have what they want and kept it for
// their monitor time. It fails with the reason as soon as waiting has no point.
func (a *app) converge(ctx context.Context, d *client.Client, ids []string) error {
	return a.convergeFor(ctx, d, ids, -1)
}

// convergeFor is converge with a time to keep it; negative means the services' own.
func (a *app) convergeFor(ctx context.Context, d *client.Client, ids []string, keep time.Duration) error {
	out := a.live()
	watches := make([]*watch, len(ids))
	for i, id := range ids {
		watches[i] = &watch{id: id, keep: keep, known: map[string]bool{}}
	}
	for {
		lines := make([]string, len(watches))
		all := true
		var errs []error
		for i, w := range watches {
			err := w.look(ctx, d)
			if err != nil && w.progress.name == "" {
				return err
			}
			lines[i] = w.progress.String()
			all = all && w.done
			if err != nil {
				lines[i] += ": " + oneLine(err.Error())
				errs = append(errs, err)
			}
		}
		out.show(lines)
		switch {
		case len(errs) > 0:
			return errors.Join(errs...)
		case all:
			return nil
		}
		select {
		case <-ctx.Done():
			return a.late(ctx, watches)
		case <-time.After(pollEvery):
		}
	}
}

// late says what is missing when the time is over.
func (a *app) late(ctx context.Context, watches []*watch) error {
	if !errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fmt.Errorf("wait for services: %w", context.Cause(ctx))
	}
	var missing []string
	for _, w := range watches {
		if !w.done {
			missing = append(missing, w.progress.String())
		}
	}
	return fmt.Errorf("not all services run in time: %s\nask why with `skep explain SERVICE`", strings.Join(missing, "; "))
}

func oneLine(s string) string {
	first, _, _ := strings.Cut(s, "\n")
	return first
}

// watch follows one service.
type watch struct {
	id       string
	keep     time.Duration
	progress progress
	known    map[string]bool // tasks that had failed before we looked, or were counted
	failures int
	looked   bool
	since    time.Time // since when it has what it wants; zero if it has not
	done     bool
}

// progress is where a service stands.
type progress struct {
	name          string
	running, want int
	verb          string // what tasks do when it is well: running, complete
	state         string // what is going on or wrong
}

// String is one line for people.
func (p progress) String() string {
	s := fmt.Sprintf("%s: %d/%d %s", p.name, p.running, p.want, p.verb)
	if p.state != "" {
		s += " (" + p.state + ")"
	}
	return s
}

// look reads the service and its tasks once. An error means that waiting has no point.
func (w *watch) look(ctx context.Context, d *client.Client) error {
	s, err := d.ServiceInspect(ctx, w.id, client.ServiceInspectOptions{InsertDefaults: true})
	if err != nil {
		return w.patience(ctx, fmt.Errorf("follow service: %w", err))
	}
	current, err := d.TaskList(ctx, client.TaskListOptions{Filters: client.Filters{}.Add("service", w.id).Add("_up-to-date", "true")})
	if err != nil {
		return w.patience(ctx, fmt.Errorf("follow tasks of %s: %w", s.Service.Spec.Name, err))
	}
	nodes, err := d.NodeList(ctx, client.NodeListOptions{})
	if err != nil {
		return w.patience(ctx, fmt.Errorf("follow nodes: %w", err))
	}
	return w.judge(s.Service, current.Items, nodes.Items, time.Now())
}

// patience keeps waiting through errors that pass, such as a change of leader.
func (w *watch) patience(ctx context.Context, err error) error {
	if w.progress.name != "" && ctx.Err() == nil && (errdefs.IsUnavailable(err) || errdefs.IsInternal(err) || client.IsErrConnectionFailed(err)) {
		w.progress.state = oneLine(err.Error())
		return nil
	}
	if ctx.Err() != nil && w.progress.name != "" {
		return nil // the caller says what is missing
	}
	return err
}

// judge decides from one observation where the service stands.
func (w *watch) judge(s swarm.Service, tasks []swarm.Task, nodes []swarm.Node, now time.Time) error {
	w.progress = measure(s, tasks, nodes)
	if err := w.fails(s, tasks, now); err != nil {
		return err
	}
	updating := s.UpdateStatus != nil && (s.UpdateStatus.State == swarm.UpdateStateUpdating || s.UpdateStatus.State == swarm.UpdateStateRollbackStarted)
	if updating || w.progress.running != w.progress.want {
		w.since, w.done = time.Time{}, false
		return nil
	}
	if w.since.IsZero() {
		w.since = now
	}
	keep := w.keep
	if keep < 0 {
		keep = monitorDefault
		if u := s.Spec.UpdateConfig; u != nil && u.Monitor > 0 {
			keep = u.Monitor
		}
	}
	if s.Spec.Mode.ReplicatedJob != nil || s.Spec.Mode.GlobalJob != nil || w.progress.want == 0 {
		keep = 0 // what is complete stays complete
	}
	left := keep - now.Sub(w.since)
	w.done = left <= 0
	if w.done {
		w.progress.state = "converged"
	} else {
		w.progress.state = "staying up"
	}
	return nil
}

// fails reports why the service will not become what was asked for.
func (w *watch) fails(s swarm.Service, tasks []swarm.Task, now time.Time) error {
	name := s.Spec.Name
	if u := s.UpdateStatus; u != nil {
		switch u.State {
		case swarm.UpdateStatePaused:
			return fmt.Errorf("service %s: the update is paused: %s", name, u.Message)
		case swarm.UpdateStateRollbackPaused:
			return fmt.Errorf("service %s: the rollback is paused: %s", name, u.Message)
		case swarm.UpdateStateRollbackCompleted:
			if u.CompletedAt == nil || now.Sub(*u.CompletedAt) < time.Minute {
				return fmt.Errorf("service %s was rolled back: %s", name, u.Message)
			}
		case swarm.UpdateStateUpdating, swarm.UpdateStateCompleted, swarm.UpdateStateRollbackStarted:
		}
	}
	var last *swarm.Task
	for i, t := range tasks {
		if t.Status.State != swarm.TaskStateFailed && t.Status.State != swarm.TaskStateRejected || w.known[t.ID] {
			continue
		}
		w.known[t.ID] = true
		// What failed before we looked belongs to an earlier deployment of the same spec.
		if !w.looked && now.Sub(t.CreatedAt) > 30*time.Second {
			continue
		}
		w.failures++
		last = &tasks[i]
	}
	w.looked = true
	switch {
	case last == nil:
		return nil
	case w.failures >= failuresAllowed || restartsNever(s):
		return fmt.Errorf("service %s: task %s: %s\nsee `skep logs %s` and `skep explain %s`", name, last.Status.State, cmp.Or(last.Status.Err, last.Status.Message), name, name)
	default:
		w.progress.state = last.Status.Err
		return nil
	}
}

func restartsNever(s swarm.Service) bool {
	r := s.Spec.TaskTemplate.RestartPolicy
	return r != nil && r.Condition == swarm.RestartPolicyConditionNone
}

// measure counts the tasks that are what the service wants.
func measure(s swarm.Service, tasks []swarm.Task, nodes []swarm.Node) progress {
	p := progress{name: s.Spec.Name, verb: "running"}
	good := swarm.TaskStateRunning
	switch m := s.Spec.Mode; {
	case m.ReplicatedJob != nil:
		p.verb, good = "complete", swarm.TaskStateComplete
		p.want = int(orOne(m.ReplicatedJob.TotalCompletions, m.ReplicatedJob.MaxConcurrent))
	case m.Replicated != nil:
		p.want = int(orOne(m.Replicated.Replicas))
	}
	if m := s.Spec.Mode; m.GlobalJob != nil {
		p.verb, good = "complete", swarm.TaskStateComplete
	}
	up := map[string]bool{}
	for _, n := range nodes {
		up[n.ID] = n.Status.State != swarm.NodeStateDown
	}
	global := s.Spec.Mode.Global != nil || s.Spec.Mode.GlobalJob != nil
	reached, wanted, behind := map[string]bool{}, map[string]bool{}, map[string]swarm.Task{}
	for _, t := range tasks {
		done := t.Status.State == good && (good == swarm.TaskStateComplete || t.DesiredState == swarm.TaskStateRunning && up[t.NodeID])
		asked := t.DesiredState == swarm.TaskStateRunning || t.DesiredState == swarm.TaskStateComplete
		if !done && !asked || global && !up[t.NodeID] {
			continue
		}
		slot := slotOf(t)
		wanted[slot] = true
		if done {
			reached[slot] = true
		} else {
			behind[slot] = t
		}
	}
	if global {
		p.want = len(wanted)
	}
	p.running = len(reached)
	p.state = slowest(behind, reached)
	return p
}

func orOne(values ...*uint64) uint64 {
	for _, v := range values {
		if v != nil {
			return *v
		}
	}
	return 1
}

// slowest describes the tasks that are not there yet: the state of the one that is
// furthest behind, and its error if it has one.
func slowest(behind map[string]swarm.Task, reached map[string]bool) string {
	order := []swarm.TaskState{
		swarm.TaskStateNew, swarm.TaskStateAllocated, swarm.TaskStatePending, swarm.TaskStateAssigned, swarm.TaskStateAccepted,
		swarm.TaskStatePreparing, swarm.TaskStateReady, swarm.TaskStateStarting,
	}
	best := len(order)
	text := ""
	for slot, t := range behind {
		i := slices.Index(order, t.Status.State)
		if reached[slot] || i < 0 || i > best || i == best && t.Status.Err == "" {
			continue
		}
		best, text = i, string(t.Status.State)
		if t.Status.Err != "" {
			text += ": " + t.Status.Err
		}
	}
	return text
}
