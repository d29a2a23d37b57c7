package sched

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/sim/golden"
)

// TestStories runs the scripts of testdata. Their commands:
//
//	node ID [key=value…]         a node comes or changes to this
//	service NAME replicas=N …    tasks NAME.1 to NAME.N come, pending
//	task ID …                    one task comes, pending
//	set ID… [state=S] [desired=S]  tasks change
//	remove ID…                   nodes or tasks go
//	at DURATION                  it is this long after the beginning
//	schedule [lost=ID]           decide; the decisions about lost tasks are not stored
//	explain ID                   why a task waits
//	load                         what each node carries
func TestStories(t *testing.T) {
	golden.Stories(t, func(t *testing.T) golden.Teller {
		t.Helper()
		c := newCluster()
		return func(_ int, words []string) []string { return command(t, c, words) }
	})
}

func command(t *testing.T, c *cluster, words []string) []string {
	t.Helper()
	args, options := split(words[1:])
	switch words[0] {
	case "node":
		c.put(testNode(args[0], func(n *api.Node) { describeNode(t, n, options) }))
	case "service", "task":
		count := 1
		for _, o := range options {
			if o[0] == "replicas" {
				count = int(number(t, o[1]))
			}
		}
		for i := range count {
			task := testTask(args[0], uint64(i+1), func(task *api.Task) { describeTask(t, task, options) })
			if words[0] == "task" {
				task.Id = args[0]
			}
			c.put(task)
		}
	case "set":
		for _, id := range args {
			c.edit(id, func(task *api.Task) {
				for _, o := range options {
					setState(t, task, o, c.now)
				}
			})
		}
	case "remove":
		for _, id := range args {
			c.remove(id)
		}
	case "at":
		d, err := time.ParseDuration(args[0])
		if err != nil {
			t.Fatal(err)
		}
		c.now = epoch().Add(d)
	case "schedule":
		var lost []string
		for _, o := range options {
			lost = append(lost, o[1])
		}
		return tell(c.schedule(lost...))
	case "explain":
		return explain(c, args[0])
	case "load":
		return load(c)
	default:
		t.Fatalf("what is %q?", words[0])
	}
	return nil
}

func split(words []string) (args []string, options [][2]string) {
	for _, w := range words {
		if key, value, ok := strings.Cut(w, "="); ok {
			options = append(options, [2]string{key, value})
		} else {
			args = append(args, w)
		}
	}
	return args, options
}

func number(t *testing.T, text string) float64 {
	t.Helper()
	n, err := strconv.ParseFloat(text, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func enum[E ~int32](t *testing.T, values map[string]int32, name string) E {
	t.Helper()
	v, ok := values[strings.ToUpper(name)]
	if !ok {
		t.Fatalf("no value %q", name)
	}
	return E(v)
}

func describeNode(t *testing.T, n *api.Node, options [][2]string) {
	t.Helper()
	d := n.GetDescription()
	for _, o := range options {
		key, name, _ := strings.Cut(o[0], ".")
		value := o[1]
		switch key {
		case "cpu":
			d.Resources.NanoCpus = int64(number(t, value) * 1e9)
		case "memory":
			d.Resources.MemoryBytes = int64(number(t, value) * (1 << 30))
		case "role":
			n.Role = enum[api.NodeRole](t, api.NodeRole_value, value)
		case "state":
			n.Status.State = enum[api.NodeStatus_State](t, api.NodeStatus_State_value, value)
		case "availability":
			n.Spec.Availability = enum[api.NodeSpec_Availability](t, api.NodeSpec_Availability_value, value)
		case "hostname":
			d.Hostname = value
		case "ip":
			n.Status.Addr = value
		case "os":
			d.Platform.Os = value
		case "arch":
			d.Platform.Architecture = value
		case "label":
			n.Spec.Annotations.Labels[name] = value
		case "engine":
			d.Engine.Labels[name] = value
		case "discrete":
			d.Resources.Generic = append(d.Resources.Generic, discrete(name, int64(number(t, value))))
		case "named":
			for v := range strings.SplitSeq(value, ",") {
				d.Resources.Generic = append(d.Resources.Generic, named(name, v))
			}
		case "plugin":
			kind, plugin, _ := strings.Cut(value, "/")
			d.Engine.Plugins = append(d.Engine.Plugins, &api.PluginDescription{Type: kind, Name: plugin})
		default:
			t.Fatalf("nodes have no %q", o[0])
		}
	}
}

func describeTask(t *testing.T, task *api.Task, options [][2]string) {
	t.Helper()
	spec := task.GetSpec()
	for _, o := range options {
		key, name, _ := strings.Cut(o[0], ".")
		value := o[1]
		switch key {
		case "replicas":
		case "id":
			task.Id = value + strings.TrimPrefix(task.GetId(), task.GetServiceId())
		case "service":
			task.ServiceId = value
		case "version":
			task.SpecVersion.Index = uint64(number(t, value))
		case "slot":
			task.Slot = uint64(number(t, value))
		case "node":
			task.NodeId = value
		case "state", "desired":
			setState(t, task, o, epoch())
		case "cpu":
			spec.Resources.Reservations.NanoCpus = int64(number(t, value) * 1e9)
		case "memory":
			spec.Resources.Reservations.MemoryBytes = int64(number(t, value) * (1 << 30))
		case "generic":
			spec.Resources.Reservations.Generic = append(spec.Resources.Reservations.Generic, discrete(name, int64(number(t, value))))
		case "constraint":
			spec.Placement.Constraints = append(spec.Placement.Constraints, value)
		case "spread":
			spec.Placement.Preferences = append(spec.Placement.Preferences, spreadOver(value))
		case "max":
			spec.Placement.MaxReplicas = uint64(number(t, value))
		case "platform":
			system, arch, _ := strings.Cut(value, "/")
			spec.Placement.Platforms = append(spec.Placement.Platforms, &api.Platform{Os: system, Architecture: arch})
		case "port":
			if task.GetEndpoint() == nil {
				task.Endpoint = &api.Endpoint{}
			}
			task.Endpoint.Ports = append(task.Endpoint.Ports, &api.PortConfig{PublishedPort: uint32(number(t, value)), PublishMode: api.PortConfig_HOST})
		case "volume":
			spec.GetContainer().Mounts = []*api.Mount{{Type: api.Mount_VOLUME, VolumeOptions: &api.Mount_VolumeOptions{DriverConfig: &api.Driver{Name: value}}}}
		case "network":
			driver, subnet, found := strings.Cut(value, ",")
			if task.Networks = networkWith(driver); found {
				task.Networks = networkWith(driver, subnet)
			}
		case "log":
			task.LogDriver = &api.Driver{Name: value}
		case "cluster-volume":
			spec.GetContainer().Mounts = []*api.Mount{{Type: api.Mount_CLUSTER, Source: value}}
		default:
			t.Fatalf("tasks have no %q", o[0])
		}
	}
}

func setState(t *testing.T, task *api.Task, option [2]string, now time.Time) {
	t.Helper()
	state := enum[api.TaskState](t, api.TaskState_value, option[1])
	if option[0] == "desired" {
		task.DesiredState = state
		return
	}
	task.Status = status(task, state, task.GetStatus().GetMessage(), "", now)
}

// tell writes down a plan.
func tell(plan model.Plan) []string {
	var out []string
	for _, change := range plan.Changes {
		task := change.Object.(*api.Task)
		st := task.GetStatus()
		line := task.GetId()
		switch {
		case st.GetState() == api.TaskState_ASSIGNED && st.GetMessage() == assignedMessage:
			line += " -> " + task.GetNodeId()
		case st.GetState() == api.TaskState_ASSIGNED && st.GetMessage() == confirmedMessage:
			line += " stays on " + task.GetNodeId()
		default:
			line += " " + model.StateName(st.GetState()) + ": " + st.GetErr()
			if st.GetErr() == "" {
				line += st.GetMessage()
			}
		}
		for _, g := range task.GetAssignedGenericResources() {
			if d := g.GetDiscreteResourceSpec(); d != nil {
				line += fmt.Sprintf(" %s=%d", d.GetKind(), d.GetValue())
			} else {
				line += fmt.Sprintf(" %s=%s", g.GetNamedResourceSpec().GetKind(), g.GetNamedResourceSpec().GetValue())
			}
		}
		out = append(out, line)
	}
	if len(out) == 0 {
		return []string{"nothing to do"}
	}
	return out
}

func explain(c *cluster, id string) []string {
	refusals, suitable := c.state.Explain(c.tasks[id])
	var out []string
	for _, r := range refusals {
		out = append(out, fmt.Sprintf("%s: %s (%s)", r.Filter, r.Reason, strings.Join(r.Nodes, " ")))
	}
	if len(suitable) > 0 {
		out = append(out, "would go to "+strings.Join(suitable, " "))
	}
	return out
}

// load lists what each node carries, and checks the account that it reads.
func load(c *cluster) []string {
	var out []string
	for _, id := range slices.Sorted(maps.Keys(c.state.nodes)) {
		n := c.state.nodes[id]
		names := make([]string, 0, len(n.tasks))
		for _, t := range c.on(id) {
			names = append(names, t.GetId())
		}
		out = append(out, fmt.Sprintf("%s: %s; free %g cpu, %g GiB", id, strings.Join(names, " "), float64(n.cpu)/1e9, float64(n.memory)/(1<<30)))
	}
	return out
}
