package convert

import (
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/swarm"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

// StoreServiceSpec returns what is stored of a service spec. legacy are the networks
// of clients before 1.44, which count only if the task template names none.
func StoreServiceSpec(s swarm.ServiceSpec, legacy []swarm.NetworkAttachmentConfig) (*api.ServiceSpec, error) {
	out := &api.ServiceSpec{Annotations: storeAnnotations(s.Annotations)}
	template := s.TaskTemplate
	if len(template.Networks) == 0 {
		template.Networks = legacy
	}
	var err error
	if out.Task, err = storeTaskSpec(template); err != nil {
		return nil, err
	}
	if out.Update, err = storeUpdate(s.UpdateConfig); err != nil {
		return nil, err
	}
	if out.Rollback, err = storeUpdate(s.RollbackConfig); err != nil {
		return nil, err
	}
	if out.Endpoint, err = storeEndpoint(s.EndpointSpec); err != nil {
		return nil, err
	}
	if err := storeMode(s.Mode, out); err != nil {
		return nil, err
	}
	return out, nil
}

func storeMode(m swarm.ServiceMode, out *api.ServiceSpec) error {
	modes := 0
	if m.Global != nil {
		modes++
		out.Mode = &api.ServiceSpec_Global{Global: new(api.GlobalService)}
	}
	if m.GlobalJob != nil {
		modes++
		out.Mode = &api.ServiceSpec_GlobalJob{GlobalJob: new(api.GlobalJob)}
	}
	if m.ReplicatedJob != nil {
		modes++
		job := &api.ReplicatedJob{MaxConcurrent: 1}
		if m.ReplicatedJob.MaxConcurrent != nil {
			job.MaxConcurrent = *m.ReplicatedJob.MaxConcurrent
		}
		job.TotalCompletions = job.MaxConcurrent
		if m.ReplicatedJob.TotalCompletions != nil {
			job.TotalCompletions = *m.ReplicatedJob.TotalCompletions
		}
		out.Mode = &api.ServiceSpec_ReplicatedJob{ReplicatedJob: job}
	}
	if m.Replicated != nil || modes == 0 {
		modes++
		replicated := &api.ReplicatedService{Replicas: 1}
		if m.Replicated != nil && m.Replicated.Replicas != nil {
			replicated.Replicas = *m.Replicated.Replicas
		}
		out.Mode = &api.ServiceSpec_Replicated{Replicated: replicated}
	}
	if modes > 1 {
		return invalid("must specify only one service mode")
	}
	return nil
}

func storeUpdate(u *swarm.UpdateConfig) (*api.UpdateConfig, error) {
	if u == nil {
		return nil, nil //nolint:nilnil // absent stays absent
	}
	action, err := enum[api.UpdateConfig_FailureAction](api.UpdateConfig_FailureAction_value, string(u.FailureAction), "FailureAction")
	if err != nil {
		return nil, invalid("unrecognized update failure action %s", u.FailureAction)
	}
	order, err := enum[api.UpdateConfig_UpdateOrder](api.UpdateConfig_UpdateOrder_value, string(u.Order), "Order")
	if err != nil {
		return nil, invalid("unrecognized update order %s", u.Order)
	}
	out := &api.UpdateConfig{
		Parallelism: u.Parallelism, Delay: durationpb.New(u.Delay), FailureAction: action,
		MaxFailureRatio: u.MaxFailureRatio, Order: order,
	}
	if u.Monitor != 0 {
		out.Monitor = durationpb.New(u.Monitor)
	}
	return out, nil
}

func storeEndpoint(e *swarm.EndpointSpec) (*api.EndpointSpec, error) {
	if e == nil {
		return nil, nil //nolint:nilnil // absent stays absent
	}
	mode, err := enum[api.EndpointSpec_ResolutionMode](api.EndpointSpec_ResolutionMode_value, string(e.Mode), "resolution mode")
	if err != nil {
		return nil, err
	}
	ports, err := tryEach(e.Ports, storePort)
	if err != nil {
		return nil, err
	}
	return &api.EndpointSpec{Mode: mode, Ports: ports}, nil
}

func storePort(p swarm.PortConfig) (*api.PortConfig, error) {
	protocol, err := enum[api.PortConfig_Protocol](api.PortConfig_Protocol_value, string(p.Protocol), "protocol")
	if err != nil {
		return nil, err
	}
	mode, err := enum[api.PortConfig_PublishMode](api.PortConfig_PublishMode_value, string(p.PublishMode), "publish mode")
	if err != nil {
		return nil, err
	}
	return &api.PortConfig{Name: p.Name, Protocol: protocol, TargetPort: p.TargetPort, PublishedPort: p.PublishedPort, PublishMode: mode}, nil
}

func dockerPort(p *api.PortConfig) swarm.PortConfig {
	return swarm.PortConfig{
		Name: p.GetName(), Protocol: network.IPProtocol(word(p.GetProtocol())), TargetPort: p.GetTargetPort(),
		PublishedPort: p.GetPublishedPort(), PublishMode: swarm.PortConfigPublishMode(word(p.GetPublishMode())),
	}
}

// DockerService returns what clients read of a service.
func DockerService(s *api.Service) swarm.Service {
	out := swarm.Service{
		ID: s.GetId(), Meta: meta(s.GetMeta()), Spec: DockerServiceSpec(s.GetSpec()),
		Endpoint: swarm.Endpoint{
			Ports: each(s.GetEndpoint().GetPorts(), dockerPort),
			VirtualIPs: each(s.GetEndpoint().GetVirtualIps(), func(v *api.Endpoint_VirtualIP) swarm.EndpointVirtualIP {
				return swarm.EndpointVirtualIP{NetworkID: v.GetNetworkId(), Addr: prefix(v.GetAddr())}
			}),
		},
	}
	if e := dockerEndpointSpec(s.GetEndpoint().GetSpec()); e != nil {
		out.Endpoint.Spec = *e
	}
	if s.GetPreviousSpec() != nil {
		previous := DockerServiceSpec(s.GetPreviousSpec())
		out.PreviousSpec = &previous
	}
	if u := s.GetUpdateStatus(); u != nil {
		out.UpdateStatus = &swarm.UpdateStatus{
			State: UpdateState(u.GetState()), Message: u.GetMessage(),
			StartedAt: optionalInstant(u.GetStartedAt()), CompletedAt: optionalInstant(u.GetCompletedAt()),
		}
	}
	if j := s.GetJobStatus(); j != nil {
		out.JobStatus = &swarm.JobStatus{
			JobIteration:  swarm.Version{Index: j.GetJobIteration().GetIndex()},
			LastExecution: instant(j.GetLastExecution()),
		}
	}
	return out
}

// UpdateState returns Docker's name of an update's state, "" when it is unknown.
func UpdateState(s api.UpdateStatus_UpdateState) swarm.UpdateState {
	switch s {
	case api.UpdateStatus_UPDATING:
		return swarm.UpdateStateUpdating
	case api.UpdateStatus_PAUSED:
		return swarm.UpdateStatePaused
	case api.UpdateStatus_COMPLETED:
		return swarm.UpdateStateCompleted
	case api.UpdateStatus_ROLLBACK_STARTED:
		return swarm.UpdateStateRollbackStarted
	case api.UpdateStatus_ROLLBACK_PAUSED:
		return swarm.UpdateStateRollbackPaused
	case api.UpdateStatus_ROLLBACK_COMPLETED:
		return swarm.UpdateStateRollbackCompleted
	case api.UpdateStatus_UNKNOWN:
		return ""
	default:
		return ""
	}
}

// DockerServiceSpec returns what clients read of a service spec. The registry
// credentials stored with it are not shown.
func DockerServiceSpec(s *api.ServiceSpec) swarm.ServiceSpec {
	out := swarm.ServiceSpec{
		Annotations:    dockerAnnotations(s.GetAnnotations()),
		TaskTemplate:   dockerTaskSpec(s.GetTask()),
		UpdateConfig:   dockerUpdate(s.GetUpdate()),
		RollbackConfig: dockerUpdate(s.GetRollback()),
		EndpointSpec:   dockerEndpointSpec(s.GetEndpoint()),
	}
	if out.TaskTemplate.ContainerSpec != nil {
		out.TaskTemplate.Runtime = swarm.RuntimeContainer
	}
	if legacy := s.GetNetworks(); len(out.TaskTemplate.Networks) == 0 && len(legacy) > 0 { //nolint:staticcheck // written by old clients
		out.TaskTemplate.Networks = each(legacy, dockerAttachmentConfig)
	}
	switch m := s.GetMode().(type) {
	case *api.ServiceSpec_Global:
		out.Mode.Global = new(swarm.GlobalService)
	case *api.ServiceSpec_GlobalJob:
		out.Mode.GlobalJob = new(swarm.GlobalJob)
	case *api.ServiceSpec_ReplicatedJob:
		out.Mode.ReplicatedJob = &swarm.ReplicatedJob{
			MaxConcurrent: new(m.ReplicatedJob.GetMaxConcurrent()), TotalCompletions: new(m.ReplicatedJob.GetTotalCompletions()),
		}
	case *api.ServiceSpec_Replicated:
		out.Mode.Replicated = &swarm.ReplicatedService{Replicas: new(m.Replicated.GetReplicas())}
	}
	return out
}

func dockerUpdate(u *api.UpdateConfig) *swarm.UpdateConfig {
	if u == nil {
		return nil
	}
	return &swarm.UpdateConfig{
		Parallelism: u.GetParallelism(), Delay: u.GetDelay().AsDuration(),
		FailureAction: swarm.FailureAction(word(u.GetFailureAction())), Monitor: u.GetMonitor().AsDuration(),
		MaxFailureRatio: u.GetMaxFailureRatio(), Order: swarm.UpdateOrder(word(u.GetOrder())),
	}
}

func dockerEndpointSpec(e *api.EndpointSpec) *swarm.EndpointSpec {
	if e == nil {
		return nil
	}
	return &swarm.EndpointSpec{Mode: swarm.ResolutionMode(word(e.GetMode())), Ports: each(e.GetPorts(), dockerPort)}
}

// ServiceMode returns the name of a service's mode as filters spell it.
func ServiceMode(s *api.ServiceSpec) string {
	switch s.GetMode().(type) {
	case *api.ServiceSpec_Global:
		return "global"
	case *api.ServiceSpec_GlobalJob:
		return "global-job"
	case *api.ServiceSpec_ReplicatedJob:
		return "replicated-job"
	default:
		return "replicated"
	}
}

// State returns Docker's name of a task state.
func State(s api.TaskState) swarm.TaskState { return swarm.TaskState(model.StateName(s)) }
