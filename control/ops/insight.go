package ops

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/control/replica"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/core/store"
)

// maxExplained bounds the tasks of one explanation: the newest ones say most.
const maxExplained = 500

// Refuse returns, for one snapshot, what tells for a task without node which nodes
// each filter of the scheduler refuses.
type Refuse func(s *store.Snapshot) func(t *api.Task) []*skepv1.Refusal

// Insight answers why things are as they are. It implements skepv1.InsightServer and
// has no state.
type Insight struct {
	skepv1.UnimplementedInsightServer

	state   replica.State
	members Membership
	refuse  Refuse
}

// NewInsight returns an Insight. A nil refuse asks the scheduler.
func NewInsight(state replica.State, members Membership, refuse Refuse) *Insight {
	if refuse == nil {
		refuse = scheduler
	}
	return &Insight{state: state, members: members, refuse: refuse}
}

// Explain says where the tasks of a service stand and why, or one task.
func (i *Insight) Explain(ctx context.Context, req *skepv1.ExplainRequest) (*skepv1.ExplainResponse, error) {
	s, err := i.state.Read(ctx)
	if err != nil {
		return nil, fail(err)
	}
	service, task, err := target(s, req.GetTarget())
	if err != nil {
		return nil, fail(err)
	}
	resp := new(skepv1.ExplainResponse)
	var tasks []*api.Task
	if task != nil {
		tasks = []*api.Task{task}
		service = s.Service(task.GetServiceId())
	} else {
		tasks = slices.Collect(s.TasksByService(service.GetId()))
	}
	resp.ServiceId, resp.ServiceName = service.GetId(), service.GetSpec().GetAnnotations().GetName()
	slices.SortFunc(tasks, byInterest)
	if len(tasks) > maxExplained {
		resp.Notes = append(resp.Notes, fmt.Sprintf("%d more tasks are not shown", len(tasks)-maxExplained))
		tasks = tasks[:maxExplained]
	}
	refuse := i.refuse(s)
	for _, t := range tasks {
		e := explain(s, t)
		if waiting(t) {
			e.Refusals = refuse(t)
		}
		resp.Tasks = append(resp.Tasks, e)
	}
	if service != nil {
		resp.Notes = append(notes(s, service), resp.Notes...)
	}
	return resp, nil
}

// byInterest puts tasks that should run first, by slot, and then the newest.
func byInterest(a, b *api.Task) int {
	rank := func(t *api.Task) int {
		if t.GetDesiredState() <= api.TaskState_COMPLETE {
			return 0
		}
		return 1
	}
	return cmp.Or(cmp.Compare(rank(a), rank(b)), cmp.Compare(a.GetSlot(), b.GetSlot()),
		b.GetStatus().GetTimestamp().AsTime().Compare(a.GetStatus().GetTimestamp().AsTime()), cmp.Compare(a.GetId(), b.GetId()))
}

func explain(s *store.Snapshot, t *api.Task) *skepv1.TaskExplanation {
	return &skepv1.TaskExplanation{
		TaskId: t.GetId(), Name: model.TaskName(t), NodeId: t.GetNodeId(), NodeName: s.Node(t.GetNodeId()).GetDescription().GetHostname(),
		State: model.StateName(t.GetStatus().GetState()), DesiredState: model.StateName(t.GetDesiredState()),
		Message: t.GetStatus().GetMessage(), Error: t.GetStatus().GetErr(), Since: t.GetStatus().GetTimestamp(),
	}
}

// waiting reports whether a task is to run but has no confirmed node yet.
func waiting(t *api.Task) bool {
	return t.GetStatus().GetState() < api.TaskState_ASSIGNED && t.GetDesiredState() <= api.TaskState_COMPLETE
}

// target finds a service or else a task by id, name or unique id prefix.
func target(s *store.Snapshot, typed string) (*api.Service, *api.Task, error) {
	if typed == "" {
		return nil, nil, invalid("explain needs a target: the id or name of a service or task")
	}
	if service := s.Service(typed); service != nil {
		return service, nil, nil
	}
	if service := s.Service(s.IDByName(model.Services, typed)); service != nil {
		return service, nil, nil
	}
	if t := s.Task(typed); t != nil {
		return nil, t, nil
	}
	var services []*api.Service
	for service := range s.Services() {
		if strings.HasPrefix(service.GetId(), typed) {
			services = append(services, service)
		}
	}
	var tasks []*api.Task
	for t := range s.Tasks() {
		name := model.TaskName(t)
		if strings.HasPrefix(t.GetId(), typed) || name == typed || strings.TrimSuffix(name, "."+t.GetId()) == typed && t.GetDesiredState() <= api.TaskState_COMPLETE {
			tasks = append(tasks, t)
		}
	}
	switch n := len(services) + len(tasks); {
	case n == 0:
		return nil, nil, notFound("service or task", typed)
	case n > 1:
		return nil, nil, invalid("%s is ambiguous (%d matches found)", typed, n)
	case len(services) == 1:
		return services[0], nil, nil
	default:
		return nil, tasks[0], nil
	}
}

// notes says what goes on with a service, most important first.
func notes(s *store.Snapshot, service *api.Service) []string {
	var list []string
	if u := service.GetUpdateStatus(); u != nil {
		list = append(list, fmt.Sprintf("update %s: %s", strings.ToLower(u.GetState().String()), u.GetMessage()))
	}
	status := serviceStatus(s, service.GetId())
	if reason := shortfall(s, service, status); reason != "" {
		list = append(list, fmt.Sprintf("%d of %d tasks run: %s", status.GetRunningTasks(), status.GetDesiredTasks(), reason))
	}
	return list
}

// shortfall says why fewer tasks run than should, by the most frequent reason, or "".
func shortfall(s *store.Snapshot, service *api.Service, status *api.ListServiceStatusesResponse_ServiceStatus) string {
	if status.GetRunningTasks() >= status.GetDesiredTasks() || isJob(service.GetSpec()) {
		return ""
	}
	reasons := make(map[string]int)
	for t := range s.TasksByService(service.GetId()) {
		if t.GetDesiredState() <= api.TaskState_RUNNING && t.GetStatus().GetState() != api.TaskState_RUNNING {
			reasons[cmp.Or(t.GetStatus().GetErr(), t.GetStatus().GetMessage(), model.StateName(t.GetStatus().GetState()))]++
		}
	}
	best := ""
	for reason, n := range reasons {
		if best == "" || n > reasons[best] || (n == reasons[best] && reason < best) {
			best = reason
		}
	}
	return cmp.Or(best, "tasks are being created")
}

// Overview summarizes one snapshot.
func (i *Insight) Overview(ctx context.Context, _ *skepv1.OverviewRequest) (*skepv1.OverviewResponse, error) {
	s, err := i.state.Read(ctx)
	if err != nil {
		return nil, fail(err)
	}
	members := i.members.Members()
	resp := &skepv1.OverviewResponse{ClusterId: s.Cluster().GetId(), RaftIndex: s.Index()}
	for _, m := range members {
		if m.GetStatus().GetLeader() {
			resp.LeaderId = m.GetNodeId()
		}
	}
	for n := range s.Nodes() {
		resp.Nodes = append(resp.Nodes, nodeOverview(s, withManagerStatus(n, members)))
	}
	slices.SortFunc(resp.GetNodes(), func(a, b *skepv1.NodeOverview) int {
		return cmp.Or(cmp.Compare(a.GetHostname(), b.GetHostname()), cmp.Compare(a.GetId(), b.GetId()))
	})
	for service := range s.Services() {
		resp.Services = append(resp.Services, serviceOverview(s, service))
	}
	slices.SortFunc(resp.GetServices(), func(a, b *skepv1.ServiceOverview) int { return cmp.Compare(a.GetName(), b.GetName()) })
	resp.Problems = append(problems(i.members.Voters(), resp.GetNodes(), resp.GetServices()), rotationProblems(s)...)
	return resp, nil
}

func nodeOverview(s *store.Snapshot, n *api.Node) *skepv1.NodeOverview {
	o := &skepv1.NodeOverview{
		Id: n.GetId(), Hostname: n.GetDescription().GetHostname(), Role: strings.ToLower(n.GetRole().String()),
		State: strings.ToLower(n.GetStatus().GetState().String()), Availability: strings.ToLower(n.GetSpec().GetAvailability().String()),
		Address: n.GetStatus().GetAddr(), Message: n.GetStatus().GetMessage(),
	}
	if m := n.GetManagerStatus(); m != nil {
		o.Leader, o.Reachability = m.GetLeader(), strings.ToLower(m.GetReachability().String())
		if at, err := netip.ParseAddrPort(m.GetAddr()); err == nil && o.GetAddress() == "" {
			o.Address = at.Addr().String() // its session is with itself and has no address
		}
	}
	for t := range s.TasksByNode(n.GetId()) {
		if t.GetStatus().GetState() == api.TaskState_RUNNING {
			o.RunningTasks++
		}
	}
	return o
}

func serviceOverview(s *store.Snapshot, service *api.Service) *skepv1.ServiceOverview {
	status := serviceStatus(s, service.GetId())
	o := &skepv1.ServiceOverview{
		Id: service.GetId(), Name: service.GetSpec().GetAnnotations().GetName(), Mode: modeOf(service.GetSpec()),
		Desired: status.GetDesiredTasks(), Running: status.GetRunningTasks(), Reason: shortfall(s, service, status),
	}
	if u := service.GetUpdateStatus(); u != nil {
		o.UpdateState = strings.ToLower(u.GetState().String())
	}
	return o
}

// maxNamed bounds the nodes that one problem names.
const maxNamed = 8

// rotationProblems says which nodes a rotation of the root certificate waits for.
func rotationProblems(s *store.Snapshot) []string {
	rotation := s.Cluster().GetRootCa().GetRootRotation()
	root, err := pki.ParseRoot(rotation.GetCaCert(), nil)
	if rotation == nil || err != nil {
		return nil
	}
	issuer := pki.IssuerOf(root.Certs[0])
	var waiting []string
	total := 0
	for n := range s.Nodes() {
		if total++; issuer.Issued(n) {
			continue
		}
		name := cmp.Or(n.GetDescription().GetHostname(), n.GetId())
		if state := n.GetStatus().GetState(); state != api.NodeStatus_READY {
			name += " (" + strings.ToLower(state.String()) + ")"
		} else if reason := n.GetCertificate().GetStatus().GetErr(); reason != "" {
			name += " (" + reason + ")"
		}
		waiting = append(waiting, name)
	}
	slices.Sort(waiting)
	have := total - len(waiting)
	if len(waiting) > maxNamed {
		waiting = append(waiting[:maxNamed], fmt.Sprintf("%d more", len(waiting)-maxNamed))
	}
	return []string{fmt.Sprintf("the root certificate is being replaced: %d of %d nodes have a new certificate; it waits for %s: start those that are down, or remove them with `docker node rm --force`",
		have, total, strings.Join(waiting, ", "))}
}

// problems lists what is wrong and what to do, worst first.
func problems(voters []*api.RaftMember, nodes []*skepv1.NodeOverview, services []*skepv1.ServiceOverview) []string {
	var list []string
	reachable := 0
	for _, m := range voters {
		if m.GetStatus().GetReachability() == api.RaftMemberStatus_REACHABLE {
			reachable++
		}
	}
	quorum := len(voters)/2 + 1
	switch {
	case reachable == quorum && len(voters) > reachable:
		list = append(list, fmt.Sprintf("%d of %d managers are reachable: losing one more stops all changes; bring managers back or demote the lost ones", reachable, len(voters)))
	case len(voters) == 2:
		list = append(list, "two managers: losing either stops all changes; add a third manager or demote one")
	}
	for _, n := range nodes {
		switch {
		case n.GetReachability() == "unreachable":
			list = append(list, fmt.Sprintf("manager %s (%s) is unreachable: check the machine and port 2377", n.GetHostname(), n.GetId()))
		case n.GetState() != "ready":
			list = append(list, fmt.Sprintf("node %s (%s) is %s: %s", n.GetHostname(), n.GetId(), n.GetState(), cmp.Or(n.GetMessage(), "no reason is known")))
		}
	}
	for _, s := range services {
		if s.GetReason() != "" {
			list = append(list, fmt.Sprintf("service %s runs %d of %d tasks: %s", s.GetName(), s.GetRunning(), s.GetDesired(), s.GetReason()))
		}
		if strings.Contains(s.GetUpdateState(), "paused") {
			list = append(list, fmt.Sprintf("service %s: update %s; see `docker service ps %s`, then update or roll back", s.GetName(), s.GetUpdateState(), s.GetName()))
		}
	}
	return list
}
