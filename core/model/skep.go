package model

import (
	"slices"

	"github.com/skep-dev/skep/api"
)

// SkepOverlay is the network plugin that Skep's nodes list in their descriptions, in place
// of Docker Engine's "overlay": Skep's overlays and Docker's are programmed from different
// sources, so a network reaches the nodes of one kind only. By it both schedulers know
// where tasks of overlay networks may go, and managers know a Skep node. It is not a label
// since those are the operator's.
const SkepOverlay = "skep-overlay"

// IsSkep reports whether a description is a Skep node's.
func IsSkep(d *api.NodeDescription) bool {
	return slices.ContainsFunc(d.GetEngine().GetPlugins(), func(p *api.PluginDescription) bool {
		return p.GetType() == "Network" && p.GetName() == SkepOverlay
	})
}

// Foreign reports whether a description is another engine's: Docker's. A node that has not
// described its engine yet is not foreign.
func Foreign(d *api.NodeDescription) bool { return d.GetEngine() != nil && !IsSkep(d) }

// TaskLabel is on the containers of the swarm's tasks, as Docker's clients know it.
const TaskLabel = "com.docker.swarm.task"
