package orch

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"pgregory.net/rapid"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/sim/golden"
)

// TestStories runs the scripts in testdata. The commands are the methods of story;
// testdata/README explains them.
func TestStories(t *testing.T) {
	golden.Stories(t, func(t *testing.T) golden.Teller {
		t.Helper()
		s := newStory(t)
		s.broken = func(format string, args ...any) {
			t.Helper()
			t.Fatalf("line %d: %s\n%s", s.line, fmt.Sprintf(format, args...), strings.Join(s.events, "\n"))
		}
		return func(line int, words []string) []string {
			s.line = line
			s.run(words)
			events := s.events
			s.events = nil
			return events
		}
	})
}

type story struct {
	rapid.TB
	*world

	start time.Time
	line  int
}

func newStory(t rapid.TB) *story {
	w := newWorld(nil)
	return &story{TB: t, world: w, start: w.now}
}

// run executes one command.
func (s *story) run(words []string) {
	s.Helper()
	if len(words) == 0 {
		s.Fatalf("line %d: no command", s.line)
	}
	args := words[1:]
	switch words[0] {
	case "nodes":
		for _, id := range args {
			s.addNode(id)
		}
	case "node":
		s.node(args[0], args[1:])
	case "image":
		s.image(args[0], args[1:])
	case "history":
		s.cluster.Spec = &api.ClusterSpec{
			Orchestration: &api.OrchestrationConfig{TaskHistoryRetentionLimit: int64(s.number(args[0]))},
		}
	case "limit":
		s.limit = int(s.number(args[0]))
	case "service":
		service := &api.Service{Spec: &api.ServiceSpec{
			Annotations: &api.Annotations{Name: serviceID},
			Mode:        &api.ServiceSpec_Replicated{Replicated: &api.ReplicatedService{Replicas: 1}},
			Task:        &api.TaskSpec{Runtime: &api.TaskSpec_Container{Container: &api.ContainerSpec{Image: "a"}}},
		}}
		s.set(service.Spec, args)
		s.create(service)
	case "edit":
		s.edit(func(spec *api.ServiceSpec) { s.set(spec, args) })
	case "rollback":
		s.rollback()
	case "remove":
		s.remove()
	case "wait":
		s.wait(s.duration(args[0]))
		return
	case "show":
		s.show()
		return
	default:
		s.Fatalf("line %d: unknown command %s", s.line, words[0])
	}
	s.wait(0)
}

// wait lets time pass and puts the time before each thing that happens.
func (s *story) wait(d time.Duration) {
	end := s.now.Add(d)
	var out []string
	last := ""
	for {
		s.settle()
		at := s.now.Sub(s.start).String()
		for _, e := range s.events {
			if at == last {
				out = append(out, fmt.Sprintf("%7s  %s", "", e))
			} else {
				out = append(out, fmt.Sprintf("%7s  %s", at, e))
			}
			last = at
		}
		s.events = nil
		next := model.Earlier(s.wake, s.agentsWake())
		for _, at := range s.nodeAt {
			next = model.Earlier(next, at)
		}
		if next.IsZero() || next.After(end) {
			s.now = end
			s.events = out
			return
		}
		if !next.After(s.now) {
			s.Fatalf("line %d: time stands still at %v", s.line, s.now.Sub(s.start))
		}
		s.now = next
	}
}

// show prints the service, then each place: what it has and, in brackets, had.
func (s *story) show() {
	if s.service != nil {
		line := "service of " + s.service.GetSpec().GetTask().GetContainer().GetImage()
		if u := s.service.GetUpdateStatus(); u != nil {
			line += ", " + strings.ToLower(u.GetState().String()) + ": " + u.GetMessage()
		}
		s.say("%s", line)
	}
	tasks := newWork(s.view(), s.now).tasks
	var places []string
	has := make(map[string][]string)
	for _, i := range tasks {
		place := s.place(i.Task)
		if !slices.Contains(places, place) {
			places = append(places, place)
		}
		text := fmt.Sprintf("%s %s %s", i.GetId(), image(i.Task), model.StateName(i.GetStatus().GetState()))
		if i.GetNodeId() != "" {
			text += " on " + i.GetNodeId()
		}
		switch {
		case i.stopped():
			text = "(" + text + ")"
		case i.GetDesiredState() == api.TaskState_READY:
			text += ", held back"
		case i.GetDesiredState() > api.TaskState_COMPLETE:
			text += ", to " + model.StateName(i.GetDesiredState())
		}
		has[place] = append(has[place], text)
	}
	slices.Sort(places)
	for _, place := range places {
		s.say("%s", strings.Join(has[place], "; "))
	}
	for _, n := range Decide(s.view(), s.now).Notes {
		s.say("%s: %s", n.Subject, n.Text)
	}
	if len(s.events) == 0 {
		s.say("nothing is left")
	}
}

// node changes a node: its state, its availability or a label.
func (s *story) node(id string, args []string) {
	s.Helper()
	for _, arg := range args {
		key, value, isLabel := strings.Cut(arg, "=")
		state, isState := api.NodeStatus_State_value[strings.ToUpper(arg)]
		availability, isAvailability := api.NodeSpec_Availability_value[strings.ToUpper(arg)]
		switch {
		case arg == "gone":
			s.removeNode(id)
		case arg == "deaf", arg == "hears":
			s.deaf[id] = arg == "deaf"
		case isLabel:
			s.editNode(id, func(n *api.Node) { label(n.Spec.Annotations, key, value) })
		case isState:
			s.editNode(id, func(n *api.Node) { n.Status.State = api.NodeStatus_State(state) })
		case isAvailability:
			s.editNode(id, func(n *api.Node) { n.Spec.Availability = api.NodeSpec_Availability(availability) })
		default:
			s.Fatalf("line %d: unknown %s", s.line, arg)
		}
	}
}

// image says how an image's containers behave.
func (s *story) image(name string, args []string) {
	s.Helper()
	b := behaviour{prepare: time.Second, stop: time.Second, end: api.TaskState_RUNNING}
	for _, arg := range args {
		key, value, _ := strings.Cut(arg, "=")
		switch key {
		case "prepare":
			b.prepare = s.duration(value)
		case "stop":
			b.stop = s.duration(value)
		case "fails":
			b.end, b.after = api.TaskState_FAILED, s.duration(value)
		case "completes":
			b.end, b.after = api.TaskState_COMPLETE, s.duration(value)
		case "rejected":
			b.after = -1
		default:
			s.Fatalf("line %d: unknown %s", s.line, key)
		}
	}
	s.images[name] = b
}

// set edits a spec.
func (s *story) set(spec *api.ServiceSpec, args []string) {
	s.Helper()
	for _, arg := range args {
		key, value, _ := strings.Cut(arg, "=") // a constraint has more of these
		if of, key, ok := strings.Cut(key, "."); ok {
			s.setPart(spec, of, key, value)
			continue
		}
		switch key {
		case "image":
			spec.Task.GetContainer().Image = value
		case "force":
			spec.Task.ForceUpdate++
		case "constraint":
			spec.Task.Placement = &api.Placement{Constraints: []string{value}}
		case "fence":
			label(spec.Annotations, FenceLabel, value)
		case "replicas":
			spec.Mode = &api.ServiceSpec_Replicated{Replicated: &api.ReplicatedService{Replicas: s.number(value)}}
		case "global":
			spec.Mode = &api.ServiceSpec_Global{Global: &api.GlobalService{}}
		case "globaljob":
			spec.Mode = &api.ServiceSpec_GlobalJob{GlobalJob: &api.GlobalJob{}}
		case "job": // job=COMPLETIONS/CONCURRENT
			total, most, _ := strings.Cut(value, "/")
			spec.Mode = &api.ServiceSpec_ReplicatedJob{ReplicatedJob: &api.ReplicatedJob{
				TotalCompletions: s.number(total), MaxConcurrent: s.number(most),
			}}
		default:
			s.Fatalf("line %d: unknown %s", s.line, key)
		}
	}
}

func (s *story) setPart(spec *api.ServiceSpec, of, key, value string) {
	s.Helper()
	if of == "restart" {
		if spec.Task.Restart == nil {
			spec.Task.Restart = &api.RestartPolicy{Condition: api.RestartPolicy_ANY}
		}
		s.setRestart(spec.Task.Restart, key, value)
		return
	}
	config := &spec.Update
	if of == "rollback" {
		config = &spec.Rollback
	}
	if *config == nil {
		*config = &api.UpdateConfig{Parallelism: 1}
	}
	c := *config
	upper := strings.ReplaceAll(strings.ToUpper(value), "-", "_")
	switch key {
	case "parallelism":
		c.Parallelism = s.number(value)
	case "delay":
		c.Delay = durationpb.New(s.duration(value))
	case "monitor":
		c.Monitor = durationpb.New(s.duration(value))
	case "action":
		c.FailureAction = api.UpdateConfig_FailureAction(s.enum(api.UpdateConfig_FailureAction_value, upper))
	case "order":
		c.Order = api.UpdateConfig_UpdateOrder(s.enum(api.UpdateConfig_UpdateOrder_value, upper))
	case "ratio":
		ratio, err := strconv.ParseFloat(value, 32)
		if err != nil {
			s.Fatalf("line %d: %v", s.line, err)
		}
		c.MaxFailureRatio = float32(ratio)
	default:
		s.Fatalf("line %d: unknown %s.%s", s.line, of, key)
	}
}

func (s *story) setRestart(r *api.RestartPolicy, key, value string) {
	s.Helper()
	switch key {
	case "condition":
		upper := strings.ReplaceAll(strings.ToUpper(value), "-", "_")
		r.Condition = api.RestartPolicy_RestartCondition(s.enum(api.RestartPolicy_RestartCondition_value, upper))
	case "delay":
		r.Delay = durationpb.New(s.duration(value))
	case "attempts":
		r.MaxAttempts = s.number(value)
	case "window":
		r.Window = durationpb.New(s.duration(value))
	default:
		s.Fatalf("line %d: unknown restart.%s", s.line, key)
	}
}

func (s *story) number(text string) uint64 {
	s.Helper()
	n, err := strconv.ParseUint(text, 10, 32)
	if err != nil {
		s.Fatalf("line %d: %v", s.line, err)
	}
	return n
}

func (s *story) duration(text string) time.Duration {
	s.Helper()
	d, err := time.ParseDuration(text)
	if err != nil {
		s.Fatalf("line %d: %v", s.line, err)
	}
	return d
}

func (s *story) enum(values map[string]int32, name string) int32 {
	s.Helper()
	v, ok := values[name]
	if !ok {
		s.Fatalf("line %d: unknown %s", s.line, name)
	}
	return v
}
