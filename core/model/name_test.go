package model

import (
	"testing"

	"github.com/skep-dev/skep/api"
)

func TestTaskName(t *testing.T) {
	service := &api.Annotations{Name: "web"}
	for want, task := range map[string]*api.Task{
		"web.3.id":    {Id: "id", Slot: 3, NodeId: "node", ServiceAnnotations: service},
		"web.node.id": {Id: "id", NodeId: "node", ServiceAnnotations: service},
		"own":         {Id: "id", Slot: 3, ServiceAnnotations: service, Annotations: &api.Annotations{Name: "own"}},
	} {
		if got := TaskName(task); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}

func TestIngress(t *testing.T) {
	internal := map[string]string{"com.docker.swarm.internal": ""}
	for name, c := range map[string]struct {
		spec *api.NetworkSpec
		want bool
	}{
		"marked":             {&api.NetworkSpec{Ingress: true}, true},
		"labelled":           {&api.NetworkSpec{Annotations: &api.Annotations{Name: "ingress", Labels: internal}}, true},
		"labelled, own name": {&api.NetworkSpec{Annotations: &api.Annotations{Name: "back", Labels: internal}}, false},
		"name alone":         {&api.NetworkSpec{Annotations: &api.Annotations{Name: "ingress"}}, false},
		"none":               {nil, false},
	} {
		if got := Ingress(&api.Network{Spec: c.spec}); got != c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}
