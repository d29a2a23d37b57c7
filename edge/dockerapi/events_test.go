package dockerapi

import (
	"net/http/httptest"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/moby/api/types/events"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/edge/dockerapi/httpapi"
)

func TestSwarmEvents(t *testing.T) {
	created, updated, now := time.Unix(1, 1), time.Unix(2, 2), time.Unix(3, 3)
	meta := &api.Meta{CreatedAt: timestamppb.New(created), UpdatedAt: timestamppb.New(updated)}
	service := func(edit func(*api.Service)) *api.Service {
		s := &api.Service{Id: "s", Meta: meta, Spec: &api.ServiceSpec{
			Annotations: &api.Annotations{Name: "web"},
			Task:        &api.TaskSpec{Runtime: &api.TaskSpec_Container{Container: &api.ContainerSpec{Image: "a"}}},
			Mode:        &api.ServiceSpec_Replicated{Replicated: &api.ReplicatedService{Replicas: 1}},
		}}
		edit(s)
		return s
	}
	plain := service(func(*api.Service) {})
	node := func(edit func(*api.Node)) *api.Node {
		n := &api.Node{Id: "n", Meta: meta, Spec: new(api.NodeSpec), Description: &api.NodeDescription{Hostname: "host"}, Status: new(api.NodeStatus)}
		edit(n)
		return n
	}
	named := &api.Annotations{Name: "x"}
	tests := []struct {
		name   string
		change model.Event
		kind   events.Type
		action events.Action
		at     time.Time
		want   map[string]string
	}{
		{"create", model.Event{Kind: model.Create, New: plain}, "service", "create", created, map[string]string{"name": "web"}},
		{"remove", model.Event{Kind: model.Remove, Old: plain}, "service", "remove", now, map[string]string{"name": "web"}},
		{"nothing tracked", model.Event{Kind: model.Update, Old: plain, New: plain}, "service", "update", updated, map[string]string{"name": "web"}},
		{"image, replicas, update", model.Event{Kind: model.Update, Old: plain, New: service(func(s *api.Service) {
			s.GetSpec().GetTask().GetContainer().Image, s.GetSpec().GetReplicated().Replicas = "b", 2
			s.UpdateStatus = &api.UpdateStatus{State: api.UpdateStatus_UPDATING}
		})}, "service", "update", updated, map[string]string{
			"name": "web", "image.old": "a", "image.new": "b", "replicas.old": "1", "replicas.new": "2", "updatestate.new": "updating",
		}},
		{
			"update ends",
			model.Event{
				Kind: model.Update,
				Old:  service(func(s *api.Service) { s.UpdateStatus = &api.UpdateStatus{State: api.UpdateStatus_UPDATING} }),
				New:  service(func(s *api.Service) { s.UpdateStatus = &api.UpdateStatus{State: api.UpdateStatus_COMPLETED} }),
			},
			"service", "update", updated,
			map[string]string{"name": "web", "updatestate.old": "updating", "updatestate.new": "completed"},
		},
		{"node", model.Event{Kind: model.Update, Old: node(func(*api.Node) {}), New: node(func(n *api.Node) {
			n.Spec.Availability, n.Spec.DesiredRole, n.Status.State = api.NodeSpec_DRAIN, api.NodeRole_MANAGER, api.NodeStatus_READY
		})}, "node", "update", updated, map[string]string{
			"name": "host", "availability.old": "active", "availability.new": "drain", "role.old": "worker", "role.new": "manager",
			"state.old": "unknown", "state.new": "ready",
		}},
		{"secret", model.Event{Kind: model.Create, New: &api.Secret{Id: "x", Meta: meta, Spec: &api.SecretSpec{Annotations: named}}}, "secret", "create", created, map[string]string{"name": "x"}},
		{"config", model.Event{Kind: model.Create, New: &api.Config{Id: "x", Meta: meta, Spec: &api.ConfigSpec{Annotations: named}}}, "config", "create", created, map[string]string{"name": "x"}},
		{"network", model.Event{Kind: model.Remove, Old: &api.Network{Id: "x", Meta: meta, Spec: &api.NetworkSpec{Annotations: named}}}, "network", "remove", now, map[string]string{"name": "x"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, ok := swarmEvent(tt.change, now)
			want := events.Message{
				Type: tt.kind, Action: tt.action, Scope: "swarm", Time: tt.at.Unix(), TimeNano: tt.at.UnixNano(),
				Actor: events.Actor{ID: tt.change.ID(), Attributes: tt.want},
			}
			if diff := cmp.Diff(want, got); diff != "" || !ok {
				t.Error(diff)
			}
		})
	}
	if _, ok := swarmEvent(model.Event{Kind: model.Create, New: new(api.Task)}, now); ok {
		t.Error("tasks have no events")
	}
}

func TestEventFilters(t *testing.T) {
	m := events.Message{
		Type: "container", Action: "health_status: healthy", Scope: "local",
		Actor: events.Actor{ID: "abcdef", Attributes: map[string]string{"name": "web.1", "image": "busybox:1", "tier": "front", "node": "n1"}},
	}
	tests := []struct {
		filters string
		want    bool
	}{
		{`{}`, true},
		{`{"type":["container","image"]}`, true},
		{`{"type":["image"]}`, false},
		{`{"event":["health_status"]}`, true},
		{`{"event":["health_status: healthy"]}`, true},
		{`{"event":["die"]}`, false},
		{`{"scope":["swarm"]}`, false},
		{`{"container":["abc"]}`, true},
		{`{"container":["web.1"]}`, true},
		{`{"container":["eb.1"]}`, false},
		{`{"service":["web"]}`, false},
		{`{"node":["n1"]}`, true},
		{`{"image":["busybox"]}`, true},
		{`{"image":["busybox:1"]}`, true},
		{`{"image":["alpine"]}`, false},
		{`{"label":["tier=front"]}`, true},
		{`{"label":["tier=back"]}`, false},
		{`{"daemon":["m1"]}`, true},
		{`{"daemon":["other"]}`, false},
	}
	for _, tt := range tests {
		f, err := httpapi.ParseFilters(tt.filters)
		if err != nil {
			t.Fatal(err)
		}
		if got := eventMatches(f, m, Facts{ID: "id", Name: "m1"}); got != tt.want {
			t.Errorf("%s: %v", tt.filters, got)
		}
	}
}

func TestEventType(t *testing.T) {
	tests := []struct {
		version string
		accept  []string
		want    string
	}{
		{"1.51", nil, "application/json"},
		{"1.52", nil, "application/jsonl"},
		{"1.51", []string{"*/*"}, "application/json"},
		{"1.41", []string{"application/x-ndjson"}, "application/x-ndjson"},
		{"1.55", []string{"application/jsonl", "application/x-ndjson;q=0.9", "application/json-seq;q=0.5"}, "application/jsonl"},
		{"1.55", []string{"application/json-seq;q=0.5, application/x-ndjson;q=0.9"}, "application/x-ndjson"},
		{"1.55", []string{"application/json-seq;q=x, ;;"}, "application/jsonl"},
	}
	for _, tt := range tests {
		r := httpapi.WithVersion(httptest.NewRequestWithContext(t.Context(), "GET", "/events", nil), httpapi.ParseVersion(tt.version))
		for _, a := range tt.accept {
			r.Header.Add("Accept", a)
		}
		if got := eventType(r); got != tt.want {
			t.Errorf("%+v: %s", tt, got)
		}
	}
}

func TestLegacyEvents(t *testing.T) {
	m := events.Message{Type: "container", Action: "start", Scope: "local", Actor: events.Actor{ID: "c", Attributes: map[string]string{"image": "i"}}}
	for version, want := range map[string]string{
		"1.51": `{"status":"start","id":"c","from":"i","Type":"container","Action":"start","Actor":{"ID":"c","Attributes":{"image":"i"}},"scope":"local"}` + "\n",
		"1.52": `{"Type":"container","Action":"start","Actor":{"ID":"c","Attributes":{"image":"i"}},"scope":"local"}` + "\n",
	} {
		var got string
		s := &eventStream{out: func(b []byte) error { got += string(b); return nil }, version: httpapi.ParseVersion(version)}
		if err := s.send(m); err != nil || got != want {
			t.Errorf("%s: %s %v", version, got, err)
		}
	}
	var got string
	s := &eventStream{out: func(b []byte) error { got += string(b); return nil }, version: httpapi.ParseVersion("1.45"), record: true}
	if err := s.send(events.Message{Type: "image", Action: "create"}); err != nil || got != "" {
		t.Errorf("image create before 1.46: %q", got)
	}
	if err := s.send(events.Message{Type: "node", Action: "create"}); err != nil || got[0] != 0x1E {
		t.Errorf("record: %q", got)
	}
}
