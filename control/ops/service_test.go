package ops_test

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

const (
	ingress = api.PortConfig_INGRESS
	onHost  = api.PortConfig_HOST
)

// overlayNetworks are what the store holds in the tests of network rules.
func networks() []model.Object {
	return []model.Object{
		&api.Network{Id: "ing", Spec: &api.NetworkSpec{Annotations: &api.Annotations{Name: "ingress"}, Ingress: true}},
		&api.Network{Id: "net", Spec: &api.NetworkSpec{Annotations: &api.Annotations{Name: "front"}}},
		&api.Network{Id: "hst", Spec: &api.NetworkSpec{Annotations: &api.Annotations{Name: "host", Labels: map[string]string{"com.docker.swarm.predefined": "true"}}}},
	}
}

func attach(id string) func(*api.ServiceSpec) {
	return func(s *api.ServiceSpec) { s.Task.Networks = []*api.NetworkAttachmentConfig{{Target: id}} }
}

func TestServiceRefusals(t *testing.T) {
	secret := func(id, name, target string) *api.SecretReference {
		r := &api.SecretReference{SecretId: id, SecretName: name}
		if target != "-" {
			r.Target = &api.SecretReference_File{File: &api.FileTarget{Name: target}}
		}
		return r
	}
	secrets := func(list ...*api.SecretReference) func(*api.ServiceSpec) {
		return in(func(c *api.ContainerSpec) { c.Secrets = list })
	}
	tests := []struct {
		name string
		spec *api.ServiceSpec
		code codes.Code
		text string
	}{
		{"plain", spec("ok"), codes.OK, ""},
		{"no name", spec(""), codes.InvalidArgument, "meta: name must be provided"},
		{"bad name", spec("a b"), codes.InvalidArgument, "name must be valid as a DNS name component"},
		{"trailing dash", spec("a-"), codes.InvalidArgument, "name must be valid as a DNS name component"},
		{"long name", spec(strings.Repeat("a", 64)), codes.InvalidArgument, "name must be 63 characters or fewer"},
		{"longest name", spec(strings.Repeat("a", 63)), codes.OK, ""},
		{"taken name", spec("WEB"), codes.AlreadyExists, "name conflicts with an existing object: service WEB already exists"},
		{"no runtime", spec("x", func(s *api.ServiceSpec) { s.Task.Runtime = nil }), codes.InvalidArgument, "TaskSpec: missing runtime"},
		{"plugin", spec("x", func(s *api.ServiceSpec) {
			s.Task.Runtime = &api.TaskSpec_Generic{Generic: &api.GenericRuntimeSpec{Kind: "plugin"}}
		}), codes.Unimplemented, `runtime "plugin" is not implemented by skep: services run containers`},
		{"no image", spec("x", in(func(c *api.ContainerSpec) { c.Image = "" })), codes.InvalidArgument, "ContainerSpec: image reference must be provided"},
		{"bad image", spec("x", in(func(c *api.ContainerSpec) { c.Image = "A B" })), codes.InvalidArgument, `ContainerSpec: "A B" is not a valid repository/tag`},
		{"mounts", spec("x", in(func(c *api.ContainerSpec) { c.Mounts = []*api.Mount{{Target: "/x"}, {Target: "/x"}} })), codes.InvalidArgument, "ContainerSpec: duplicate mount point: /x"},
		{"cluster volume", spec("x", in(func(c *api.ContainerSpec) { c.Mounts = []*api.Mount{{Target: "/x", Type: api.Mount_CLUSTER}} })), codes.Unimplemented, "mount /x: cluster volumes are not implemented by skep"},
		{"cpu", spec("x", func(s *api.ServiceSpec) {
			s.Task.Resources = &api.ResourceRequirements{Limits: &api.Resources{NanoCpus: 1}}
		}), codes.InvalidArgument, "invalid cpu value 1e-09: Must be at least 0.001"},
		{"memory", spec("x", func(s *api.ServiceSpec) {
			s.Task.Resources = &api.ResourceRequirements{Reservations: &api.Resources{MemoryBytes: 1}}
		}), codes.InvalidArgument, "invalid memory value 1: Must be at least 4MiB"},
		{"restart delay", spec("x", func(s *api.ServiceSpec) { s.Task.Restart = &api.RestartPolicy{Delay: durationpb.New(-1)} }), codes.InvalidArgument, "TaskSpec: restart-delay cannot be negative"},
		{"restart window", spec("x", func(s *api.ServiceSpec) { s.Task.Restart = &api.RestartPolicy{Window: durationpb.New(-1)} }), codes.InvalidArgument, "TaskSpec: restart-window cannot be negative"},
		{"update delay", spec("x", func(s *api.ServiceSpec) { s.Update = &api.UpdateConfig{Delay: durationpb.New(-1)} }), codes.InvalidArgument, "TaskSpec: update-delay cannot be negative"},
		{"update monitor", spec("x", func(s *api.ServiceSpec) { s.Rollback = &api.UpdateConfig{Monitor: durationpb.New(-1)} }), codes.InvalidArgument, "TaskSpec: update-monitor cannot be negative"},
		{"update ratio", spec("x", func(s *api.ServiceSpec) { s.Update = &api.UpdateConfig{MaxFailureRatio: 2} }), codes.InvalidArgument, "TaskSpec: update-maxfailureratio cannot be less than 0 or bigger than 1"},
		{"job update", spec("x", func(s *api.ServiceSpec) {
			s.Mode, s.Update = &api.ServiceSpec_GlobalJob{GlobalJob: new(api.GlobalJob)}, new(api.UpdateConfig)
		}), codes.InvalidArgument, "Jobs may not have an update config"},
		{"health interval", spec("x", in(func(c *api.ContainerSpec) { c.Healthcheck = &api.HealthConfig{Interval: durationpb.New(1)} })), codes.InvalidArgument, "ContainerSpec: Interval in HealthConfig cannot be less than 1ms"},
		{"health start interval", spec("x", in(func(c *api.ContainerSpec) { c.Healthcheck = &api.HealthConfig{StartInterval: durationpb.New(1)} })), codes.InvalidArgument, "ContainerSpec: StartInterval in HealthConfig cannot be less than 1ms"},
		{"health retries", spec("x", in(func(c *api.ContainerSpec) { c.Healthcheck = &api.HealthConfig{Retries: -1} })), codes.InvalidArgument, "ContainerSpec: Retries in HealthConfig cannot be negative"},
		{"constraint operator", spec("x", func(s *api.ServiceSpec) { s.Task.Placement = &api.Placement{Constraints: []string{"node.role"}} }), codes.Unknown, "constraint expected one operator from ==, !="},
		{"constraint key", spec("x", func(s *api.ServiceSpec) { s.Task.Placement = &api.Placement{Constraints: []string{"a b==c"}} }), codes.Unknown, "key 'a b' is invalid"},
		{"constraint value", spec("x", func(s *api.ServiceSpec) { s.Task.Placement = &api.Placement{Constraints: []string{"node.id==ä"}} }), codes.Unknown, "value 'ä' is invalid"},
		{"hostname template", spec("x", in(func(c *api.ContainerSpec) { c.Hostname = "{{.Nope}}" })), codes.InvalidArgument, "expanding hostname failed: template: expansion:1:2: …"},
		{"env template", spec("x", in(func(c *api.ContainerSpec) { c.Env = []string{"A={{"} })), codes.InvalidArgument, `expanding env failed: expanding env "A={{": …`},
		{"mount template", spec("x", in(func(c *api.ContainerSpec) { c.Mounts = []*api.Mount{{Source: "{{.X}}", Target: "/x"}} })), codes.InvalidArgument, "expanding mounts failed: …"},
		{"good templates", spec("x", in(func(c *api.ContainerSpec) {
			c.Hostname, c.Env = "{{.Node.Hostname}}-{{.Task.Slot}}", []string{`L={{index .Service.Labels "a"}}`, `P={{.Node.Platform.OS}}`}
		})), codes.OK, ""},
		{"dnsrr", spec("x", func(s *api.ServiceSpec) {
			s.Endpoint = &api.EndpointSpec{Mode: api.EndpointSpec_DNSRR, Ports: []*api.PortConfig{port(ingress, 1, 1)}}
		}), codes.InvalidArgument, "EndpointSpec: port published with ingress mode can't be used with dnsrr mode"},
		{"same port twice", spec("x", publish(port(onHost, 1, 1), port(ingress, 1, 2))), codes.InvalidArgument, "EndpointSpec: duplicate published ports provided"},
		{"unset ports", spec("x", publish(port(onHost, 0, 1), port(onHost, 0, 2))), codes.OK, ""},
		{"ingress port taken", spec("x", publish(port(ingress, 8080, 80))), codes.InvalidArgument, "port '8080' is already in use by service 'web' (svc1) as an ingress port"},
		{"host port taken by ingress", spec("x", publish(port(onHost, 8080, 80))), codes.InvalidArgument, "port '8080' is already in use by service 'web' (svc1) as an ingress port"},
		{"ingress port taken by host", spec("x", publish(port(ingress, 9090, 80))), codes.InvalidArgument, "port '9090' is already in use by service 'hosted' (svc2) as a host-published port"},
		{"host ports shared", spec("x", publish(port(onHost, 9090, 80))), codes.OK, ""},
		{"allocated port taken", spec("x", publish(port(ingress, 30001, 80))), codes.InvalidArgument, "port '30001' is already in use by service 'hosted' (svc2) as an ingress port"},
		{"network unknown", spec("x", attach("nope")), codes.NotFound, "network nope not found"},
		{"network ingress", spec("x", attach("ing")), codes.InvalidArgument, `Service cannot be explicitly attached to the ingress network "ingress"`},
		{"overlay on", spec("x", attach("net")), codes.OK, ""},
		{"host network", spec("x", attach("hst")), codes.OK, ""},
		{"secret without id", spec("x", secrets(secret("", "s", "t"))), codes.InvalidArgument, "malformed secret reference"},
		{"secret without target", spec("x", secrets(secret("sec1", "s1", "-"))), codes.InvalidArgument, "malformed secret reference, no target provided"},
		{"secret without file", spec("x", secrets(secret("sec1", "s1", ""))), codes.InvalidArgument, "malformed file secret reference, invalid target file name provided"},
		{"secret unknown", spec("x", secrets(secret("q", "b", "t"))), codes.InvalidArgument, "secret not found: b"},
		{"secrets unknown", spec("x", secrets(secret("q", "b", "t"), secret("p", "a", "u"))), codes.InvalidArgument, "secrets not found: a, b"},
		{"secret targets", spec("x", secrets(secret("sec1", "s1", "x"), secret("sec1", "s2", "x"))), codes.InvalidArgument, "secret references 's1' and 's2' have a conflicting target: 'x'"},
		{"config unknown", spec("x", in(func(c *api.ContainerSpec) {
			c.Configs = []*api.ConfigReference{{ConfigId: "q", ConfigName: "c", Target: &api.ConfigReference_Runtime{Runtime: new(api.RuntimeTarget)}}}
		})), codes.InvalidArgument, "config not found: c"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			hosted := service("svc2", "hosted", publish(port(onHost, 9090, 80)))
			hosted.Endpoint = &api.Endpoint{Ports: []*api.PortConfig{port(ingress, 30001, 99)}}
			objects := append(networks(), service("svc1", "web", publish(port(ingress, 8080, 80))), hosted,
				&api.Secret{Id: "sec1", Spec: &api.SecretSpec{Annotations: &api.Annotations{Name: "s1"}}})
			o, state := newOps(t, nil, objects...)
			resp, err := o.CreateService(t.Context(), &api.CreateServiceRequest{Spec: tt.spec})
			wantStatus(t, err, tt.code, tt.text)
			if err == nil && state.View().Service(resp.GetService().GetId()) == nil {
				t.Error("the service is not stored")
			}
		})
	}
}

func TestNoIngressNetwork(t *testing.T) {
	o, _ := newOps(t, nil)
	_, err := o.CreateService(t.Context(), &api.CreateServiceRequest{Spec: spec("x", publish(port(ingress, 1, 1)))})
	wantStatus(t, err, codes.FailedPrecondition, "service needs ingress network, but no ingress network is present")
}

// TestRevisions follows spec, previous spec and their versions through updates and rollbacks.
func TestRevisions(t *testing.T) {
	o, state := newOps(t, nil)
	ctx := t.Context()
	created, err := o.CreateService(ctx, &api.CreateServiceRequest{Spec: spec("web")})
	if err != nil {
		t.Fatal(err)
	}
	id := created.GetService().GetId()
	update := func(rollback api.UpdateServiceRequest_Rollback, v *api.Version, s *api.ServiceSpec) (*api.Service, error) {
		resp, err := o.UpdateService(ctx, &api.UpdateServiceRequest{ServiceId: id, ServiceVersion: v, Spec: s, Rollback: rollback})
		return resp.GetService(), err
	}
	second := spec("web", in(func(c *api.ContainerSpec) { c.Image = "busybox:2" }))
	first := version(t, state, model.Services, id)
	_, err = update(api.UpdateServiceRequest_PREVIOUS, first, second)
	wantStatus(t, err, codes.FailedPrecondition, "service "+id+" does not have a previous spec")
	_, err = update(api.UpdateServiceRequest_NONE, &api.Version{Index: 1}, second)
	wantStatus(t, err, codes.Unknown, "update out of sequence")
	_, err = update(api.UpdateServiceRequest_NONE, first, spec("other"))
	wantStatus(t, err, codes.Unimplemented, "renaming services is not supported")
	_, err = update(api.UpdateServiceRequest_NONE, first, spec("web", func(s *api.ServiceSpec) { s.Mode = &api.ServiceSpec_Global{Global: new(api.GlobalService)} }))
	wantStatus(t, err, codes.Unimplemented, "service mode change is not allowed")
	_, err = update(api.UpdateServiceRequest_NONE, nil, second)
	wantStatus(t, err, codes.InvalidArgument, "an update needs the object's version and a spec")
	_, err = o.UpdateService(ctx, &api.UpdateServiceRequest{ServiceId: "nope", ServiceVersion: first, Spec: second})
	wantStatus(t, err, codes.NotFound, "service nope not found")

	updated, err := update(api.UpdateServiceRequest_NONE, first, second)
	if err != nil {
		t.Fatal(err)
	}
	if updated.GetSpecVersion().GetIndex() != first.GetIndex() || updated.GetPreviousSpecVersion().GetIndex() != 0 || updated.GetPreviousSpec().GetTask().GetContainer().GetImage() != "busybox:1" {
		t.Errorf("after update: %v", updated)
	}
	back, err := update(api.UpdateServiceRequest_PREVIOUS, version(t, state, model.Services, id), second)
	if err != nil {
		t.Fatal(err)
	}
	want := model.Clone(updated)
	want.Spec, want.PreviousSpec = want.PreviousSpec, want.Spec
	want.SpecVersion, want.PreviousSpecVersion = want.PreviousSpecVersion, want.SpecVersion
	want.Meta = back.GetMeta()
	want.UpdateStatus = &api.UpdateStatus{State: api.UpdateStatus_ROLLBACK_STARTED, Message: "manually requested rollback", StartedAt: back.GetUpdateStatus().GetStartedAt()}
	if diff := cmp.Diff(want, back, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	if back.GetUpdateStatus().GetStartedAt() == nil {
		t.Error("the rollback did not start")
	}
	again, err := update(api.UpdateServiceRequest_NONE, version(t, state, model.Services, id), second)
	if err != nil || again.GetUpdateStatus() != nil {
		t.Errorf("an update clears the update's status: %v %v", again.GetUpdateStatus(), err)
	}
}

func TestJobIterations(t *testing.T) {
	o, state := newOps(t, nil)
	job := spec("job", func(s *api.ServiceSpec) {
		s.Mode = &api.ServiceSpec_ReplicatedJob{ReplicatedJob: &api.ReplicatedJob{MaxConcurrent: 1, TotalCompletions: 3}}
	})
	created, err := o.CreateService(t.Context(), &api.CreateServiceRequest{Spec: job})
	if err != nil {
		t.Fatal(err)
	}
	s := created.GetService()
	if s.GetJobStatus().GetJobIteration().GetIndex() != 0 || s.GetJobStatus().GetLastExecution() == nil {
		t.Errorf("new job: %v", s.GetJobStatus())
	}
	updated, err := o.UpdateService(t.Context(), &api.UpdateServiceRequest{
		ServiceId: s.GetId(), ServiceVersion: version(t, state, model.Services, s.GetId()), Spec: job,
	})
	if err != nil || updated.GetService().GetJobStatus().GetJobIteration().GetIndex() != 1 {
		t.Errorf("updated job: %v %v", updated, err)
	}
}

func TestInsertDefaults(t *testing.T) {
	o, state := newOps(t, nil, service("s", "web", func(s *api.ServiceSpec) { s.Rollback = &api.UpdateConfig{Parallelism: 0} }))
	resp, err := o.GetService(t.Context(), &api.GetServiceRequest{ServiceId: "s", InsertDefaults: true})
	if err != nil {
		t.Fatal(err)
	}
	want := spec("web", in(func(c *api.ContainerSpec) {
		c.StopGracePeriod, c.DnsConfig = durationpb.New(10*time.Second), new(api.ContainerSpec_DNSConfig)
	}), func(s *api.ServiceSpec) {
		s.Task.Resources = &api.ResourceRequirements{Limits: new(api.Resources), Reservations: new(api.Resources)}
		s.Task.Restart = &api.RestartPolicy{Condition: api.RestartPolicy_ANY, Delay: durationpb.New(5 * time.Second)}
		s.Task.Placement = new(api.Placement)
		s.Update = &api.UpdateConfig{Parallelism: 1, Delay: durationpb.New(0), Monitor: durationpb.New(5 * time.Second)}
		s.Rollback = &api.UpdateConfig{Monitor: durationpb.New(5 * time.Second)}
	})
	if diff := cmp.Diff(want, resp.GetService().GetSpec(), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	if state.View().Service("s").GetSpec().GetUpdate() != nil {
		t.Error("the stored spec was changed")
	}
}

func aTask(id, serviceID string, slot uint64, desired, state api.TaskState) *api.Task {
	return &api.Task{
		Id: id, ServiceId: serviceID, Slot: slot, DesiredState: desired, SpecVersion: new(api.Version), NodeId: "n1",
		ServiceAnnotations: &api.Annotations{Name: "web", Labels: map[string]string{"a": "1"}},
		Status:             &api.TaskStatus{State: state, Timestamp: timestamppb.New(time.Unix(int64(slot), 0))},
		Spec:               &api.TaskSpec{Runtime: &api.TaskSpec_Container{Container: new(api.ContainerSpec)}},
	}
}

func TestServiceStatuses(t *testing.T) {
	run, done, stop := api.TaskState_RUNNING, api.TaskState_COMPLETE, api.TaskState_SHUTDOWN
	iteration := func(t *api.Task, n uint64) *api.Task { t.JobIteration = &api.Version{Index: n}; return t }
	job := service("j", "job", func(s *api.ServiceSpec) {
		s.Mode = &api.ServiceSpec_ReplicatedJob{ReplicatedJob: &api.ReplicatedJob{MaxConcurrent: 2, TotalCompletions: 4}}
	})
	job.JobStatus = &api.JobStatus{JobIteration: &api.Version{Index: 1}}
	globalJob := service("k", "gjob", func(s *api.ServiceSpec) { s.Mode = &api.ServiceSpec_GlobalJob{GlobalJob: new(api.GlobalJob)} })
	globalJob.JobStatus = &api.JobStatus{JobIteration: new(api.Version)}
	o, _ := newOps(t, nil,
		service("r", "web", func(s *api.ServiceSpec) { s.GetReplicated().Replicas = 3 }),
		aTask("r1", "r", 1, run, run), aTask("r2", "r", 2, run, api.TaskState_PREPARING), aTask("r3", "r", 2, stop, run),
		service("g", "glob", func(s *api.ServiceSpec) { s.Mode = &api.ServiceSpec_Global{Global: new(api.GlobalService)} }),
		aTask("g1", "g", 0, run, run), aTask("g2", "g", 0, run, api.TaskState_NEW), aTask("g3", "g", 0, stop, stop),
		job, iteration(aTask("j1", "j", 0, done, done), 1), iteration(aTask("j2", "j", 1, done, run), 1), iteration(aTask("j3", "j", 0, done, done), 0),
		globalJob, iteration(aTask("k1", "k", 0, done, done), 0), iteration(aTask("k2", "k", 0, done, run), 0),
	)
	resp, err := o.ListServiceStatuses(t.Context(), &api.ListServiceStatusesRequest{Services: []string{"r", "g", "j", "k", "nope"}})
	if err != nil {
		t.Fatal(err)
	}
	type st = api.ListServiceStatusesResponse_ServiceStatus
	want := []*st{
		{ServiceId: "r", DesiredTasks: 3, RunningTasks: 2},
		{ServiceId: "g", DesiredTasks: 2, RunningTasks: 1},
		{ServiceId: "j", DesiredTasks: 2, RunningTasks: 1, CompletedTasks: 1},
		{ServiceId: "k", DesiredTasks: 1, RunningTasks: 1, CompletedTasks: 1},
		{ServiceId: "nope"},
	}
	if diff := cmp.Diff(want, resp.GetStatuses(), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
}

func TestListFilters(t *testing.T) {
	run := api.TaskState_RUNNING
	old := aTask("t2", "s1", 2, api.TaskState_SHUTDOWN, api.TaskState_SHUTDOWN)
	old.SpecVersion, old.Spec = &api.Version{Index: 7}, &api.TaskSpec{Runtime: &api.TaskSpec_Container{Container: &api.ContainerSpec{Image: "old"}}}
	scaled := aTask("u1", "s2", 0, run, run) // an older spec, but nothing of it has changed since
	scaled.SpecVersion, scaled.Spec = &api.Version{Index: 7}, spec("worker").GetTask()
	o, _ := newOps(t, nil, service("s1", "web", func(s *api.ServiceSpec) { s.Annotations.Labels = map[string]string{"a": "1"} }),
		service("s2", "worker"), aTask("t1", "s1", 1, run, run), old, scaled)
	tasks := func(f *api.ListTasksRequest_Filters) string {
		resp, err := o.ListTasks(t.Context(), &api.ListTasksRequest{Filters: f})
		if err != nil {
			t.Fatal(err)
		}
		var ids []string
		for _, task := range resp.GetTasks() {
			ids = append(ids, task.GetId())
		}
		return strings.Join(ids, " ")
	}
	type f = api.ListTasksRequest_Filters
	for _, tt := range []struct {
		filter *f
		want   string
	}{
		{nil, "t1 t2 u1"},
		{&f{ServiceIds: []string{"s1"}}, "t1 t2"},
		{&f{ServiceIds: []string{"s1", "s2"}}, "t1 t2 u1"},
		{&f{NodeIds: []string{"n1"}}, "t1 t2 u1"},
		{&f{NodeIds: []string{"other"}}, ""},
		{&f{IdPrefixes: []string{"t"}}, "t1 t2"},
		{&f{Names: []string{"web.1.t1"}}, "t1"},
		{&f{Names: []string{"web.n1.u1"}}, "u1"},
		{&f{NamePrefixes: []string{"web.2"}}, "t2"},
		{&f{Labels: map[string]string{"a": ""}}, "t1 t2 u1"},
		{&f{Labels: map[string]string{"a": "2"}}, ""},
		{&f{DesiredStates: []api.TaskState{run}}, "t1 u1"},
		{&f{UpToDate: true}, "t1 u1"},
		{&f{Runtimes: []string{"container"}, ServiceIds: []string{"s1"}, UpToDate: true}, "t1"},
		{&f{Runtimes: []string{"plugin"}}, ""},
	} {
		if got := tasks(tt.filter); got != tt.want {
			t.Errorf("%v: %q, want %q", tt.filter, got, tt.want)
		}
	}
	services := func(f *api.ListServicesRequest_Filters) int {
		resp, err := o.ListServices(t.Context(), &api.ListServicesRequest{Filters: f})
		if err != nil {
			t.Fatal(err)
		}
		return len(resp.GetServices())
	}
	if n := services(&api.ListServicesRequest_Filters{NamePrefixes: []string{"w"}}); n != 2 {
		t.Errorf("names that begin with w: %d", n)
	}
	if n := services(&api.ListServicesRequest_Filters{NamePrefixes: []string{"w"}, Labels: map[string]string{"a": "1"}}); n != 1 {
		t.Errorf("with a label: %d", n)
	}
}
