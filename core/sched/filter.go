package sched

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

// filter is one reason to pass over nodes.
type filter struct {
	name string
	// reason says that n nodes were passed over.
	reason func(n int) string
	// fits reports whether the node may take the task. Nil means that the filter has
	// nothing to say about this task.
	fits func(*node) bool
}

// pipeline holds the filters for one task, in order.
type pipeline []filter

// newPipeline prepares the filters for a task.
func newPipeline(t *api.Task) pipeline {
	all := [...]filter{
		{"Ready", plural("%s not available for new tasks"), ready},
		{"Resource", plural("insufficient resources on %s"), resources(t)},
		{"Plugin", plural("missing plugin on %s"), plugins(t)},
		{"Overlay", func(n int) string { return plural(unshared(t) + " and does not reach %s with Docker Engine")(n) }, overlays(t)},
		{"Constraint", plural("scheduling constraints not satisfied on %s"), constraints(t)},
		{"Platform", plural("unsupported platform on %s"), platforms(t)},
		{"HostPort", plural("host-mode port already in use on %s"), freePorts(t)},
		{"MaxReplicas", func(int) string { return "max replicas per node limit exceed" }, maxReplicas(t)},
		{"Encryption", func(n int) string {
			return plural("cannot encrypt the network as it is (" + encryption(t) + ") on %s")(n)
		}, encrypts(t)},
		{"Volumes", plural("cannot fulfill requested CSI volume mounts on %s"), volumes(t)},
	}
	p := make(pipeline, 0, len(all))
	for _, f := range all {
		if f.fits != nil {
			p = append(p, f)
		}
	}
	return p
}

func plural(format string) func(int) string {
	return func(n int) string {
		if n == 1 {
			return fmt.Sprintf(format, "1 node")
		}
		return fmt.Sprintf(format, fmt.Sprintf("%d nodes", n))
	}
}

// refusedBy returns the index of the first filter that the node fails, -1 for none.
func (p pipeline) refusedBy(n *node) int {
	for i := range p {
		if !p[i].fits(n) {
			return i
		}
	}
	return -1
}

// explain turns counts of refused nodes, by filter, into the text for the task.
func (p pipeline) explain(counts []int) string {
	type part struct {
		text  string
		count int
	}
	var parts []part
	for i, n := range counts {
		if n > 0 {
			parts = append(parts, part{p[i].reason(n), n})
		}
	}
	if len(parts) == 0 {
		return "no suitable node"
	}
	slices.SortStableFunc(parts, func(a, b part) int { return cmp.Compare(b.count, a.count) })
	texts := make([]string, len(parts))
	for i := range parts {
		texts[i] = parts[i].text
	}
	return "no suitable node (" + strings.Join(texts, "; ") + ")"
}

func ready(n *node) bool {
	return n.GetStatus().GetState() == api.NodeStatus_READY &&
		n.GetSpec().GetAvailability() == api.NodeSpec_ACTIVE
}

func resources(t *api.Task) func(*node) bool {
	want := t.GetSpec().GetResources().GetReservations()
	if want.GetNanoCpus() == 0 && want.GetMemoryBytes() == 0 && len(want.GetGeneric()) == 0 {
		return nil
	}
	kinds := amounts(want.GetGeneric())
	return func(n *node) bool {
		if want.GetNanoCpus() > n.cpu && want.GetNanoCpus() > 0 ||
			want.GetMemoryBytes() > n.memory && want.GetMemoryBytes() > 0 {
			return false
		}
		for _, k := range kinds {
			if k.value > n.generic[k.kind].free() {
				return false
			}
		}
		return true
	}
}

// amount is how much of one kind of generic resource a task reserves.
type amount struct {
	kind  string
	value int64
}

// amounts sums up reservations by kind, in the order in which the kinds come.
func amounts(list []*api.GenericResource) []amount {
	var out []amount
	for _, g := range list {
		d := g.GetDiscreteResourceSpec()
		if d.GetValue() <= 0 {
			continue
		}
		at := slices.IndexFunc(out, func(a amount) bool { return a.kind == d.GetKind() })
		if at < 0 {
			out = append(out, amount{d.GetKind(), d.GetValue()})
			continue
		}
		out[at].value += d.GetValue()
	}
	return out
}

func plugins(t *api.Task) func(*node) bool {
	type plugin struct{ kind, name string }
	var want []plugin
	for _, m := range t.GetSpec().GetContainer().GetMounts() {
		d := m.GetVolumeOptions().GetDriverConfig()
		if m.GetType() == api.Mount_VOLUME && d.GetName() != "" && d.GetName() != "local" {
			want = append(want, plugin{"Volume", d.GetName()})
		}
	}
	for _, a := range t.GetNetworks() {
		if d := a.GetNetwork().GetDriverState().GetName(); d != "" && d != "overlay" {
			want = append(want, plugin{"Network", d})
		}
	}
	log := t.GetLogDriver().GetName()
	if log == "none" {
		log = ""
	}
	if len(want) == 0 && log == "" {
		return nil
	}
	return func(n *node) bool {
		engine := n.GetDescription().GetEngine()
		if engine == nil {
			return true
		}
		for _, p := range want {
			if !hasPlugin(engine, p.kind, p.name) {
				return false
			}
		}
		anyLog := slices.ContainsFunc(engine.GetPlugins(), func(p *api.PluginDescription) bool { return p.GetType() == "Log" })
		return log == "" || !anyLog || hasPlugin(engine, "Log", log)
	}
}

func hasPlugin(e *api.EngineDescription, kind, name string) bool {
	return slices.ContainsFunc(e.GetPlugins(), func(p *api.PluginDescription) bool {
		return p.GetType() == kind && (p.GetName() == name || p.GetName() == name+":latest")
	})
}

// unshared names the first of a task's overlay networks that Docker Engines cannot take part
// in and says why; it is empty without one.
func unshared(t *api.Task) string {
	for _, a := range t.GetNetworks() {
		n := a.GetNetwork()
		if why := model.Unshared(n); why != "" && model.Overlay(n) {
			return "network " + n.GetSpec().GetAnnotations().GetName() + " " + why
		}
	}
	return ""
}

// overlays keeps tasks off Docker Engines that are on a network which does not reach these.
func overlays(t *api.Task) func(*node) bool {
	if unshared(t) == "" {
		return nil
	}
	return func(n *node) bool { return !model.Foreign(n.GetDescription()) }
}

func constraints(t *api.Task) func(*node) bool {
	list := t.GetSpec().GetPlacement().GetConstraints()
	if len(list) == 0 {
		return nil
	}
	parsed, err := model.ParseConstraints(list)
	if err != nil { // never accepted by the API; nothing can satisfy it
		return func(*node) bool { return false }
	}
	return func(n *node) bool { return model.MatchAll(parsed, n.Node) }
}

func platforms(t *api.Task) func(*node) bool {
	list := t.GetSpec().GetPlacement().GetPlatforms()
	if len(list) == 0 {
		return nil
	}
	return func(n *node) bool {
		have := n.GetDescription().GetPlatform()
		return have != nil && slices.ContainsFunc(list, func(p *api.Platform) bool {
			return (p.GetOs() == "" || strings.EqualFold(p.GetOs(), have.GetOs())) &&
				(p.GetArchitecture() == "" || architecture(p.GetArchitecture()) == architecture(have.GetArchitecture()))
		})
	}
}

func architecture(s string) string {
	switch s = strings.ToLower(s); s {
	case "x86_64":
		return "amd64"
	case "aarch64":
		return "arm64"
	default:
		return s
	}
}

func freePorts(t *api.Task) func(*node) bool {
	want := hostPorts(t)
	if len(want) == 0 {
		return nil
	}
	return func(n *node) bool {
		for _, p := range want {
			if n.ports[p] > 0 {
				return false
			}
		}
		return true
	}
}

func maxReplicas(t *api.Task) func(*node) bool {
	most := t.GetSpec().GetPlacement().GetMaxReplicas()
	if most == 0 {
		return nil
	}
	return func(n *node) bool { return uint64(n.byService[t.GetServiceId()]) < most }
}

// encryption returns how a task's networks are encrypted, each way once.
func encryption(t *api.Task) string {
	var ways []string
	for _, a := range t.GetNetworks() {
		if n := a.GetNetwork(); model.Encrypted(n) {
			how, _ := model.Encryption(n)
			ways = append(ways, how)
		}
	}
	slices.Sort(ways)
	return strings.Join(slices.Compact(ways), ", ")
}

// encrypts refuses nodes that cannot encrypt one of a task's networks as it is encrypted:
// Docker Engines among them, which do not tell how they can.
func encrypts(t *api.Task) func(*node) bool {
	if !slices.ContainsFunc(t.GetNetworks(), func(a *api.NetworkAttachment) bool { return model.Encrypted(a.GetNetwork()) }) {
		return nil
	}
	return func(n *node) bool {
		for _, a := range t.GetNetworks() {
			if how, _ := model.Encryption(a.GetNetwork()); model.Encrypted(a.GetNetwork()) && !model.CanEncrypt(n.Node, how) {
				return false
			}
		}
		return true
	}
}

// volumes refuses cluster volumes everywhere: no node can publish one yet.
func volumes(t *api.Task) func(*node) bool {
	wanted := slices.ContainsFunc(t.GetSpec().GetContainer().GetMounts(), func(m *api.Mount) bool {
		return m.GetType() == api.Mount_CLUSTER
	})
	if !wanted {
		return nil
	}
	return func(*node) bool { return false }
}
