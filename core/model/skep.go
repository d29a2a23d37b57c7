package model

import (
	"slices"
	"strings"

	"github.com/skep-dev/skep/api"
)

// SkepOverlay is the network plugin that Skep's nodes list in their descriptions, in place
// of Docker Engine's "overlay": Skep's overlays are programmed from what Skep's managers tell,
// so Docker's scheduler must not send tasks of such networks here. By it managers know a Skep
// node. It is not a label since those are the operator's.
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

// Unshared says why Docker Engines cannot take part in an overlay network of Skep's; it is
// empty if they can.
func Unshared(n *api.Network) string {
	switch {
	case Encrypted(n):
		return "is encrypted" // by keys for each two of Skep's nodes
	case slices.ContainsFunc(n.GetIpam().GetConfigs(), func(c *api.IPAMConfig) bool { return strings.Contains(c.GetSubnet(), ":") }):
		return "has IPv6"
	}
	return ""
}

// TaskLabel is on the containers of the swarm's tasks, as Docker's clients know it.
const TaskLabel = "com.docker.swarm.task"
