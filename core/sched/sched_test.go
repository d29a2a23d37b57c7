package sched

import (
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

// epoch is when the tests begin.
func epoch() time.Time { return time.Date(2026, 11, 27, 12, 0, 0, 0, time.UTC) }

// cluster is the store that a State follows.
type cluster struct {
	state *State
	nodes map[string]*api.Node
	tasks map[string]*api.Task
	now   time.Time
}

func newCluster() *cluster {
	c := &cluster{nodes: make(map[string]*api.Node), tasks: make(map[string]*api.Task), now: epoch()}
	c.state = c.scratch()
	return c
}

// scratch makes a State from nothing but the records.
func (c *cluster) scratch() *State { return New(maps.Values(c.nodes), maps.Values(c.tasks)) }

// put creates or updates a record and tells the State.
func (c *cluster) put(o model.Object) {
	e := model.Event{Kind: model.Create, Table: model.TableOf(o), New: o}
	switch o := o.(type) {
	case *api.Node:
		if old := c.nodes[o.GetId()]; old != nil {
			e.Kind, e.Old = model.Update, old
		}
		c.nodes[o.GetId()] = o
	case *api.Task:
		if old := c.tasks[o.GetId()]; old != nil {
			e.Kind, e.Old = model.Update, old
		}
		c.tasks[o.GetId()] = o
	}
	c.state.Apply(e)
}

// edit changes a copy of a task.
func (c *cluster) edit(id string, change func(*api.Task)) {
	t := model.Clone(c.tasks[id])
	change(t)
	c.put(t)
}

func (c *cluster) remove(id string) {
	if n := c.nodes[id]; n != nil {
		delete(c.nodes, id)
		c.state.Apply(model.Event{Kind: model.Remove, Table: model.Nodes, Old: n})
		return
	}
	t := c.tasks[id]
	delete(c.tasks, id)
	c.state.Apply(model.Event{Kind: model.Remove, Table: model.Tasks, Old: t})
}

// schedule lets the State decide and stores what it decided, but for lost tasks.
func (c *cluster) schedule(lost ...string) model.Plan {
	plan := c.state.Schedule(c.now)
	for _, change := range plan.Changes {
		if id := change.Object.GetId(); slices.Contains(lost, id) {
			c.state.Refuse(c.tasks[id])
			continue
		}
		c.put(change.Object)
	}
	return plan
}

// on returns the tasks of a node that hold something of it.
func (c *cluster) on(node string) []*api.Task {
	var out []*api.Task
	for _, id := range slices.Sorted(maps.Keys(c.tasks)) {
		if t := c.tasks[id]; t.GetNodeId() == node && holds(t) {
			out = append(out, t)
		}
	}
	return out
}

func testNode(id string, change ...func(*api.Node)) *api.Node {
	n := &api.Node{
		Id:     id,
		Spec:   &api.NodeSpec{Annotations: &api.Annotations{Labels: map[string]string{}}},
		Status: &api.NodeStatus{State: api.NodeStatus_READY, Addr: "10.0.0.1"},
		Description: &api.NodeDescription{
			Hostname:  "host-" + id,
			Platform:  &api.Platform{Os: "linux", Architecture: "x86_64"},
			Resources: &api.Resources{NanoCpus: 4e9, MemoryBytes: 8 << 30},
			Engine:    &api.EngineDescription{Labels: map[string]string{}},
		},
	}
	for _, f := range change {
		f(n)
	}
	return n
}

func testTask(service string, slot uint64, change ...func(*api.Task)) *api.Task {
	t := &api.Task{
		Id: fmt.Sprintf("%s.%d", service, slot), ServiceId: service, Slot: slot,
		SpecVersion:  &api.Version{},
		Spec:         &api.TaskSpec{Runtime: &api.TaskSpec_Container{Container: &api.ContainerSpec{}}, Resources: &api.ResourceRequirements{Reservations: &api.Resources{}}, Placement: &api.Placement{}},
		Status:       &api.TaskStatus{State: api.TaskState_PENDING, Message: "pending task scheduling"},
		DesiredState: api.TaskState_RUNNING,
	}
	for _, f := range change {
		f(t)
	}
	return t
}

func discrete(kind string, value int64) *api.GenericResource {
	return &api.GenericResource{Resource: &api.GenericResource_DiscreteResourceSpec{
		DiscreteResourceSpec: &api.DiscreteGenericResource{Kind: kind, Value: value},
	}}
}

func named(kind, value string) *api.GenericResource {
	return &api.GenericResource{Resource: &api.GenericResource_NamedResourceSpec{
		NamedResourceSpec: &api.NamedGenericResource{Kind: kind, Value: value},
	}}
}

func spreadOver(descriptor string) *api.PlacementPreference {
	return &api.PlacementPreference{Preference: &api.PlacementPreference_Spread{Spread: &api.SpreadOver{SpreadDescriptor: descriptor}}}
}

// TestFilters holds each filter against one node and one task.
func TestFilters(t *testing.T) {
	reserve := func(r *api.Resources) func(*api.Task) {
		return func(t *api.Task) { t.Spec.Resources.Reservations = r }
	}
	mount := func(m *api.Mount) func(*api.Task) {
		return func(t *api.Task) { t.Spec.GetContainer().Mounts = []*api.Mount{m} }
	}
	driver := func(name string) *api.Mount {
		return &api.Mount{Type: api.Mount_VOLUME, VolumeOptions: &api.Mount_VolumeOptions{DriverConfig: &api.Driver{Name: name}}}
	}
	plugin := func(kind, name string) func(*api.Node) {
		return func(n *api.Node) {
			n.Description.Engine.Plugins = append(n.Description.Engine.Plugins, &api.PluginDescription{Type: kind, Name: name})
		}
	}
	constrain := func(list ...string) func(*api.Task) {
		return func(t *api.Task) { t.Spec.Placement.Constraints = list }
	}
	platform := func(list ...*api.Platform) func(*api.Task) {
		return func(t *api.Task) { t.Spec.Placement.Platforms = list }
	}
	port := func(protocol api.PortConfig_Protocol, number uint32, mode api.PortConfig_PublishMode) func(*api.Task) {
		return func(t *api.Task) {
			t.Endpoint = &api.Endpoint{Ports: []*api.PortConfig{{Protocol: protocol, PublishedPort: number, PublishMode: mode}}}
		}
	}
	host80 := port(api.PortConfig_TCP, 80, api.PortConfig_HOST)
	running := func(slot uint64, change ...func(*api.Task)) *api.Task {
		t := testTask("web", slot, change...)
		t.NodeId, t.Status.State = "n", api.TaskState_RUNNING
		return t
	}
	same := func(*api.Node) {}
	for name, c := range map[string]struct {
		node  func(*api.Node)
		there []*api.Task
		task  func(*api.Task)
		want  string // the refusing filter
	}{
		"anything":                {node: same, task: reserve(nil)},
		"unknown node":            {node: func(n *api.Node) { n.Status.State = api.NodeStatus_UNKNOWN }, task: reserve(nil), want: "Ready"},
		"down":                    {node: func(n *api.Node) { n.Status.State = api.NodeStatus_DOWN }, task: reserve(nil), want: "Ready"},
		"disconnected":            {node: func(n *api.Node) { n.Status.State = api.NodeStatus_DISCONNECTED }, task: reserve(nil), want: "Ready"},
		"paused":                  {node: func(n *api.Node) { n.Spec.Availability = api.NodeSpec_PAUSE }, task: reserve(nil), want: "Ready"},
		"drained":                 {node: func(n *api.Node) { n.Spec.Availability = api.NodeSpec_DRAIN }, task: reserve(nil), want: "Ready"},
		"all cpus":                {node: same, task: reserve(&api.Resources{NanoCpus: 4e9})},
		"one cpu too many":        {node: same, task: reserve(&api.Resources{NanoCpus: 4e9 + 1}), want: "Resource"},
		"all memory":              {node: same, task: reserve(&api.Resources{MemoryBytes: 8 << 30})},
		"one byte too many":       {node: same, task: reserve(&api.Resources{MemoryBytes: 8<<30 + 1}), want: "Resource"},
		"what others hold":        {node: same, there: []*api.Task{running(1, reserve(&api.Resources{NanoCpus: 3e9}))}, task: reserve(&api.Resources{NanoCpus: 2e9}), want: "Resource"},
		"nothing on a full node":  {node: same, there: []*api.Task{running(1, reserve(&api.Resources{NanoCpus: 9e9}))}, task: reserve(&api.Resources{MemoryBytes: 1})},
		"generic, none there":     {node: same, task: reserve(&api.Resources{Generic: []*api.GenericResource{discrete("gpu", 1)}}), want: "Resource"},
		"generic, nothing wanted": {node: same, task: reserve(&api.Resources{Generic: []*api.GenericResource{discrete("gpu", 0)}})},
		"generic, twice the same": {node: func(n *api.Node) { n.Description.Resources.Generic = []*api.GenericResource{discrete("gpu", 3)} }, task: reserve(&api.Resources{Generic: []*api.GenericResource{discrete("gpu", 2), discrete("gpu", 2)}}), want: "Resource"},
		"named pieces": {node: func(n *api.Node) {
			n.Description.Resources.Generic = []*api.GenericResource{named("gpu", "a"), named("gpu", "b")}
		}, task: reserve(&api.Resources{Generic: []*api.GenericResource{discrete("gpu", 2)}})},
		"more than the named pieces": {node: func(n *api.Node) {
			n.Description.Resources.Generic = []*api.GenericResource{named("gpu", "a"), named("gpu", "a")}
		}, task: reserve(&api.Resources{Generic: []*api.GenericResource{discrete("gpu", 2)}}), want: "Resource"},
		"local volume":                {node: same, task: mount(driver("local"))},
		"foreign volume":              {node: same, task: mount(driver("nfs")), want: "Plugin"},
		"foreign volume there":        {node: plugin("Volume", "nfs:latest"), task: mount(driver("nfs"))},
		"other tag of the plugin":     {node: plugin("Volume", "nfs:1"), task: mount(driver("nfs")), want: "Plugin"},
		"plugin of another kind":      {node: plugin("Log", "nfs"), task: mount(driver("nfs")), want: "Plugin"},
		"no engine description":       {node: func(n *api.Node) { n.Description.Engine = nil }, task: mount(driver("nfs"))},
		"network driver":              {node: plugin("Network", "weave"), task: func(t *api.Task) { t.Networks = networkWith("weave") }},
		"network driver missing":      {node: plugin("Network", "bridge"), task: func(t *api.Task) { t.Networks = networkWith("weave") }, want: "Plugin"},
		"overlay on a Skep node":      {node: plugin("Network", "skep-overlay"), task: func(t *api.Task) { t.Networks = networkWith("overlay") }},
		"overlay on Docker Engine":    {node: plugin("Network", "overlay"), task: func(t *api.Task) { t.Networks = networkWith("overlay") }},
		"IPv6 on Docker Engine":       {node: plugin("Network", "overlay"), task: func(t *api.Task) { t.Networks = networkWith("overlay", "fd00::/64") }, want: "Overlay"},
		"IPv6 on a Skep node":         {node: plugin("Network", "skep-overlay"), task: func(t *api.Task) { t.Networks = networkWith("overlay", "fd00::/64") }},
		"host network of an engine":   {node: plugin("Network", "host"), task: func(t *api.Task) { t.Networks = networkWith("host") }},
		"log driver, no log plugins":  {node: same, task: func(t *api.Task) { t.LogDriver = &api.Driver{Name: "gelf"} }},
		"log driver missing":          {node: plugin("Log", "json-file"), task: func(t *api.Task) { t.LogDriver = &api.Driver{Name: "gelf"} }, want: "Plugin"},
		"no log":                      {node: plugin("Log", "json-file"), task: func(t *api.Task) { t.LogDriver = &api.Driver{Name: "none"} }},
		"constraints":                 {node: same, task: constrain("node.id==n", "node.hostname!=other")},
		"constraint fails":            {node: same, task: constrain("node.id==n", "node.hostname==other"), want: "Constraint"},
		"constraint unreadable":       {node: same, task: constrain("nonsense"), want: "Constraint"},
		"platform by its other name":  {node: same, task: platform(&api.Platform{Os: "linux", Architecture: "amd64"})},
		"any architecture":            {node: same, task: platform(&api.Platform{Os: "linux"})},
		"one of several platforms":    {node: same, task: platform(&api.Platform{Os: "windows"}, &api.Platform{Architecture: "x86_64"})},
		"wrong architecture":          {node: same, task: platform(&api.Platform{Os: "linux", Architecture: "aarch64"}), want: "Platform"},
		"arm by its other name":       {node: func(n *api.Node) { n.Description.Platform.Architecture = "arm64" }, task: platform(&api.Platform{Architecture: "aarch64"})},
		"wrong system":                {node: same, task: platform(&api.Platform{Os: "windows", Architecture: "amd64"}), want: "Platform"},
		"platform of the node hidden": {node: func(n *api.Node) { n.Description.Platform = nil }, task: platform(&api.Platform{Os: "linux"}), want: "Platform"},
		"port free":                   {node: same, task: host80},
		"port taken":                  {node: same, there: []*api.Task{running(1, host80)}, task: host80, want: "HostPort"},
		"port taken until it stops":   {node: same, there: []*api.Task{running(1, host80, func(t *api.Task) { t.DesiredState = api.TaskState_SHUTDOWN })}, task: host80, want: "HostPort"},
		"same port, other protocol":   {node: same, there: []*api.Task{running(1, host80)}, task: port(api.PortConfig_UDP, 80, api.PortConfig_HOST)},
		"same port in the mesh":       {node: same, there: []*api.Task{running(1, port(api.PortConfig_TCP, 80, api.PortConfig_INGRESS))}, task: host80},
		"port chosen later":           {node: same, there: []*api.Task{running(1, port(api.PortConfig_TCP, 0, api.PortConfig_HOST))}, task: port(api.PortConfig_TCP, 0, api.PortConfig_HOST)},
		"max replicas":                {node: same, there: []*api.Task{running(1)}, task: func(t *api.Task) { t.Spec.Placement.MaxReplicas = 2 }},
		"max replicas reached":        {node: same, there: []*api.Task{running(1), running(2)}, task: func(t *api.Task) { t.Spec.Placement.MaxReplicas = 2 }, want: "MaxReplicas"},
		"max replicas, one leaving":   {node: same, there: []*api.Task{running(1), running(2, func(t *api.Task) { t.DesiredState = api.TaskState_SHUTDOWN })}, task: func(t *api.Task) { t.Spec.Placement.MaxReplicas = 2 }},
		"cluster volume":              {node: same, task: mount(&api.Mount{Type: api.Mount_CLUSTER, Source: "v"}), want: "Volumes"},
		"encryption, same way":        {node: encrypting("esp,wireguard"), task: func(t *api.Task) { t.Networks = encryptedBy("esp") }},
		"encryption, in a process":    {node: encrypting("wireguard-userspace"), task: func(t *api.Task) { t.Networks = encryptedBy("wireguard") }},
		"encryption, another way":     {node: encrypting("wireguard"), task: func(t *api.Task) { t.Networks = encryptedBy("esp") }, want: "Encryption"},
		"encryption, a Docker Engine": {node: same, task: func(t *api.Task) { t.Networks = encryptedBy("wireguard") }, want: "Overlay"},
		"encryption undecided":        {node: encrypting("wireguard"), task: func(t *api.Task) { t.Networks = encryptedBy("") }, want: "Encryption"},
		"the first filter counts":     {node: func(n *api.Node) { n.Spec.Availability = api.NodeSpec_DRAIN }, task: constrain("node.id==other"), want: "Ready"},
	} {
		t.Run(name, func(t *testing.T) {
			s := New(slices.Values([]*api.Node{testNode("n", c.node)}), slices.Values(c.there))
			refusals, suitable := s.Explain(testTask("web", 99, c.task))
			var got string
			for _, r := range refusals {
				got += r.Filter
			}
			if got != c.want || (len(suitable) == 1) != (c.want == "") {
				t.Errorf("refused by %q, suitable %v, want refused by %q", got, suitable, c.want)
			}
		})
	}
}

func encrypting(how string) func(*api.Node) {
	return func(n *api.Node) {
		n.Description.Engine.Labels[model.EncryptionLabel] = how
		n.Description.Engine.Plugins = []*api.PluginDescription{{Type: "Network", Name: model.SkepOverlay}}
	}
}

func encryptedBy(how string) []*api.NetworkAttachment {
	n := &api.Network{Id: "net", Spec: &api.NetworkSpec{Annotations: &api.Annotations{Name: "front"}}, DriverState: &api.Driver{Name: "overlay", Options: map[string]string{model.EncryptedOption: ""}}}
	if how != "" {
		n.DriverState.Options[model.EncryptionOption] = how
	}
	return []*api.NetworkAttachment{{Network: n}}
}

// TestRefusalNamesTheEncryption lets people see which way a node would have to know.
func TestRefusalNamesTheEncryption(t *testing.T) {
	c := newCluster()
	c.put(testNode("n", encrypting("wireguard")))
	c.put(testNode("docker"))
	c.put(testTask("web", 1, func(t *api.Task) { t.Networks = encryptedBy("esp") }))
	c.schedule()
	want := "no suitable node (network front is encrypted and does not reach 1 node with Docker Engine; cannot encrypt the network as it is (esp) on 1 node)"
	if got := c.tasks["web.1"].GetStatus().GetErr(); got != want {
		t.Errorf("%q, want %q", got, want)
	}
	c.put(testNode("n", encrypting("esp")))
	c.schedule()
	if got := c.tasks["web.1"].GetNodeId(); got != "n" {
		t.Errorf("on node %q once it can", got)
	}
}

func networkWith(driver string, subnets ...string) []*api.NetworkAttachment {
	n := &api.Network{Id: "net", DriverState: &api.Driver{Name: driver}, Ipam: new(api.IPAMOptions)}
	for _, text := range subnets {
		n.Ipam.Configs = append(n.Ipam.Configs, &api.IPAMConfig{Subnet: text})
	}
	return []*api.NetworkAttachment{{Network: n}}
}

// TestFailuresAreForgotten keeps the memory of failures bounded by what happened lately.
func TestFailuresAreForgotten(t *testing.T) {
	n := newNode(testNode("n"))
	for i := range 100 {
		n.fail(revision{"web", uint64(i)}, fmt.Sprint(i), epoch().Add(time.Duration(i)*time.Minute))
	}
	if got := len(n.failures); got != 5 {
		t.Errorf("%d revisions remembered, want those of 5 minutes", got)
	}
}

// TestDecisionsAreCopies keeps stored records as they are.
func TestDecisionsAreCopies(t *testing.T) {
	c := newCluster()
	c.put(testNode("n"))
	for i := range uint64(3) {
		c.put(testTask("web", i+1, func(t *api.Task) { t.Spec.Resources.Reservations.NanoCpus = 2e9 }))
	}
	before := make(map[string]*api.Task)
	stored := maps.Clone(c.tasks)
	for id, task := range stored {
		before[id] = model.Clone(task)
	}
	c.schedule()
	for id, task := range stored {
		if task.String() != before[id].String() {
			t.Errorf("stored record of %s changed to %s", id, task)
		}
		if c.tasks[id] == task {
			t.Errorf("%s was not decided about", id)
		}
	}
}
