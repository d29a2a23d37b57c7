package model

import (
	"strconv"

	"github.com/skep-dev/skep/api"
)

// TaskName returns the name of a task and of its container: "service.slot.id", or
// "service.node.id" for a task without slot.
func TaskName(t *api.Task) string {
	if name := t.GetAnnotations().GetName(); name != "" {
		return name
	}
	place := t.GetNodeId()
	if t.GetSlot() != 0 {
		place = strconv.FormatUint(t.GetSlot(), 10)
	}
	return t.GetServiceAnnotations().GetName() + "." + place + "." + t.GetId()
}

// Overlay reports whether a network spans nodes, as its allocated state says.
func Overlay(n *api.Network) bool { return n.GetDriverState().GetName() == "overlay" }

// Ingress reports whether a network is the routing mesh's, marked as new managers do or by
// the label of old ones.
func Ingress(n *api.Network) bool {
	a := n.GetSpec().GetAnnotations()
	_, internal := a.GetLabels()["com.docker.swarm.internal"]
	return n.GetSpec().GetIngress() || internal && a.GetName() == "ingress"
}

// NameOf returns the name that people gave an object and that must be unique in its table,
// or "" for nodes and tasks.
func NameOf(o Object) string {
	switch o := o.(type) {
	case *api.Service:
		return o.GetSpec().GetAnnotations().GetName()
	case *api.Network:
		return o.GetSpec().GetAnnotations().GetName()
	case *api.Cluster:
		return o.GetSpec().GetAnnotations().GetName()
	case *api.Secret:
		return o.GetSpec().GetAnnotations().GetName()
	case *api.Config:
		return o.GetSpec().GetAnnotations().GetName()
	case *api.Volume:
		return o.GetSpec().GetAnnotations().GetName()
	case *api.Resource:
		return o.GetAnnotations().GetName()
	case *api.Extension:
		return o.GetAnnotations().GetName()
	default:
		return ""
	}
}
