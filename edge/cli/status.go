package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/api/types/system"
	"github.com/moby/moby/client"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/skep-dev/skep/api/skepv1"
)

// status is what `skep status --json` prints.
type status struct {
	Host     string          `json:"host"`
	Node     nodeStatus      `json:"node"`
	Managers quorum          `json:"managers"`
	Overview json.RawMessage `json:"overview,omitempty"`
	// Problems are what is wrong and what to do, worst first.
	Problems []string `json:"problems"`

	overview *skepv1.OverviewResponse
}

type nodeStatus struct {
	ID      string `json:"id"`
	Name    string `json:"name"`
	Addr    string `json:"addr"`
	State   string `json:"state"`
	Manager bool   `json:"manager"`
	Leader  bool   `json:"leader"`
	Version string `json:"version"`
	Dir     string `json:"data_root"`
	Running int    `json:"containers_running"`
}

// quorum says how the managers stand.
type quorum struct {
	Total     int  `json:"total"`
	Reachable int  `json:"reachable"`
	Needed    int  `json:"needed"`
	Held      bool `json:"held"`
}

// CanLose returns how many more managers may fail while the swarm still takes writes.
func (q quorum) canLose() int { return max(0, q.Reachable-q.Needed) }

func (a *app) statusCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show this node, the managers, the nodes, the services, what is wrong and why",
		Args:  args(0, 0),
		RunE: func(c *cobra.Command, _ []string) error {
			s, err := a.readStatus(c.Context())
			if err != nil {
				return err
			}
			s.tidyProblems()
			if a.json {
				return a.printJSON(s)
			}
			return a.printStatus(s)
		},
	}
}

func (a *app) readStatus(ctx context.Context) (status, error) {
	c, err := a.connect()
	if err != nil {
		return status{}, err
	}
	defer c.Close() //nolint:errcheck // only idle connections
	info, err := c.Info(ctx, client.InfoOptions{})
	if err != nil {
		return status{}, unreachable(c, err)
	}
	s := newStatus(c.DaemonHost(), info.Info)
	if !info.Info.Swarm.ControlAvailable {
		return s, nil
	}
	data, err := get(ctx, c, "/skep/v1/overview", nil)
	if err != nil {
		s.Problems = append(s.Problems, err.Error())
		return s, nil
	}
	var o skepv1.OverviewResponse
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(data, &o); err != nil {
		return s, fmt.Errorf("read overview: %w", err)
	}
	s.addOverview(data, &o)
	return s, nil
}

// tidyProblems says everything once and without the words that the transport adds.
func (s *status) tidyProblems() {
	out := []string{}
	for _, p := range s.Problems {
		p = strings.TrimPrefix(p, "Error response from daemon: ")
		if rest, ok := strings.CutPrefix(p, "rpc error: code = "); ok {
			if _, text, ok := strings.Cut(rest, " desc = "); ok {
				p = text
			}
		}
		if !slices.Contains(out, p) {
			out = append(out, p)
		}
	}
	s.Problems = out
}

func newStatus(host string, i system.Info) status {
	s := status{Host: host, Problems: []string{}, Node: nodeStatus{
		ID: i.Swarm.NodeID, Name: i.Name, Addr: i.Swarm.NodeAddr, State: string(i.Swarm.LocalNodeState), Manager: i.Swarm.ControlAvailable,
		Version: i.ServerVersion, Dir: i.DockerRootDir, Running: i.ContainersRunning,
	}}
	if s.Node.State == "" {
		s.Node.State = string(swarm.LocalNodeStateInactive)
	}
	s.Managers = quorum{Total: i.Swarm.Managers, Needed: i.Swarm.Managers/2 + 1}
	switch i.Swarm.LocalNodeState {
	case swarm.LocalNodeStateActive:
	case swarm.LocalNodeStateLocked:
		s.Problems = append(s.Problems, "this manager is locked: run `docker swarm unlock`")
	case swarm.LocalNodeStatePending:
		s.Problems = append(s.Problems, "this node is not accepted by its swarm yet")
	case swarm.LocalNodeStateInactive, "":
		s.Problems = append(s.Problems, "this node is in no swarm: run `skep up`, or `skep up --join TOKEN ADDR`")
	case swarm.LocalNodeStateError:
		s.Problems = append(s.Problems, "this node cannot take part in its swarm")
	}
	if i.Swarm.Error != "" {
		s.Problems = append(s.Problems, i.Swarm.Error)
	}
	return s
}

func (s *status) addOverview(data []byte, o *skepv1.OverviewResponse) {
	s.Overview, s.overview = data, o
	s.Managers = quorum{}
	for _, n := range o.GetNodes() {
		if n.GetId() == s.Node.ID {
			s.Node.Leader = n.GetLeader()
		}
		if n.GetRole() != "manager" {
			continue
		}
		s.Managers.Total++
		if n.GetReachability() == "reachable" || n.GetLeader() {
			s.Managers.Reachable++
		}
	}
	s.Managers.Needed = s.Managers.Total/2 + 1
	s.Managers.Held = s.Managers.Reachable >= s.Managers.Needed
	s.Problems = append(s.Problems, o.GetProblems()...)
}

func (a *app) printStatus(s status) error {
	what := "worker"
	switch {
	case s.Node.State != string(swarm.LocalNodeStateActive):
		what = s.Node.State
	case s.Node.Leader:
		what = "manager, leader"
	case s.Node.Manager:
		what = "manager"
	}
	a.say("Node       %s: %s%s", s.Node.Name, what, nonEmpty(" at ", s.Node.Addr))
	a.say("Daemon     %s at %s, data in %s, %s running", s.Node.Version, s.Host, s.Node.Dir, plural(s.Node.Running, "container"))
	if o := s.overview; o != nil {
		a.printSwarm(s, o)
		if err := a.printOverview(o); err != nil {
			return err
		}
	}
	if len(s.Problems) == 0 {
		a.say("\nNothing is wrong.")
		return nil
	}
	a.say("\nWrong:")
	for _, p := range s.Problems {
		a.say("  - %s", strings.ReplaceAll(p, "\n", "\n    "))
	}
	return nil
}

func (a *app) printSwarm(s status, o *skepv1.OverviewResponse) {
	a.say("Swarm      %s, raft index %d", short(o.GetClusterId()), o.GetRaftIndex())
	switch {
	case !s.Managers.Held:
		a.say("Managers   %d of %d reachable: no quorum, %d needed; nothing can be changed", s.Managers.Reachable, s.Managers.Total, s.Managers.Needed)
	case s.Managers.canLose() == 0:
		a.say("Managers   %d of %d reachable; the swarm cannot lose another", s.Managers.Reachable, s.Managers.Total)
	default:
		a.say("Managers   %d of %d reachable; the swarm can lose %d more", s.Managers.Reachable, s.Managers.Total, s.Managers.canLose())
	}
}

func (a *app) printOverview(o *skepv1.OverviewResponse) error {
	var rows [][]string
	for _, n := range o.GetNodes() {
		role := n.GetRole()
		switch {
		case n.GetLeader():
			role = "leader"
		case role == "manager" && n.GetReachability() != "reachable":
			role = "manager (" + n.GetReachability() + ")"
		}
		rows = append(rows, []string{
			n.GetHostname(), role, n.GetState(), n.GetAvailability(), n.GetAddress(),
			strconv.FormatUint(uint64(n.GetRunningTasks()), 10), n.GetMessage(),
		})
	}
	a.say("")
	if err := a.table([]string{"NODE", "ROLE", "STATE", "AVAILABILITY", "ADDRESS", "TASKS", ""}, rows); err != nil {
		return err
	}
	if len(o.GetServices()) == 0 {
		a.say("\nNo services yet: skep deploy compose.yaml")
		return nil
	}
	rows = nil
	for _, v := range o.GetServices() {
		rows = append(rows, []string{
			v.GetName(), v.GetMode(), fmt.Sprintf("%d/%d", v.GetRunning(), v.GetDesired()), v.GetUpdateState(), v.GetReason(),
		})
	}
	a.say("")
	return a.table([]string{"SERVICE", "MODE", "RUNNING", "UPDATE", "WHY"}, rows)
}

func nonEmpty(prefix, s string) string {
	if s == "" {
		return ""
	}
	return prefix + s
}
