package plugin

import (
	"context"
	"log/slog"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

// secretProvider is the capability of secret drivers.
const secretProvider = "secretprovider"

// CheckSecretDriver refuses a secret driver that is not there or is something else.
func (f Finder) CheckSecretDriver(ctx context.Context, name string) error {
	return f.Check(ctx, name, secretProvider)
}

// secretRequest is what a driver hears about the task that needs a secret.
type secretRequest struct {
	SecretName          string            `json:",omitempty"`
	SecretLabels        map[string]string `json:",omitempty"`
	ServiceHostname     string            `json:",omitempty"`
	ServiceID           string            `json:",omitempty"`
	ServiceName         string            `json:",omitempty"`
	ServiceLabels       map[string]string `json:",omitempty"`
	TaskID              string            `json:",omitempty"`
	TaskName            string            `json:",omitempty"`
	TaskImage           string            `json:",omitempty"`
	NodeID              string            `json:",omitempty"`
	ServiceEndpointSpec *endpointSpec     `json:",omitempty"`
}

type endpointSpec struct {
	Mode  int32          `json:",omitempty"`
	Ports []endpointPort `json:",omitempty"`
}

type endpointPort struct {
	Name          string `json:",omitempty"`
	Protocol      int32  `json:",omitempty"`
	PublishedPort uint32 `json:",omitempty"`
	TargetPort    uint32 `json:",omitempty"`
	PublishMode   int32  `json:",omitempty"`
}

// value is a driver's answer. It keeps its bytes out of logs.
type value struct {
	Value      []byte
	Err        string
	DoNotReuse bool
}

// LogValue hides the value.
func (value) LogValue() slog.Value { return slog.StringValue("[redacted]") }

// Secret asks a secret's driver for the value that a task gets. reuse says whether other
// tasks of the same node may be given the same.
func (f Finder) Secret(ctx context.Context, secret *api.Secret, task *api.Task) (data []byte, reuse bool, err error) {
	container := task.GetSpec().GetContainer()
	req := secretRequest{
		SecretName: secret.GetSpec().GetAnnotations().GetName(), SecretLabels: secret.GetSpec().GetAnnotations().GetLabels(),
		ServiceHostname: container.GetHostname(), ServiceID: task.GetServiceId(),
		ServiceName: task.GetServiceAnnotations().GetName(), ServiceLabels: task.GetServiceAnnotations().GetLabels(),
		TaskID: task.GetId(), TaskName: model.TaskName(task), TaskImage: container.GetImage(), NodeID: task.GetNodeId(),
	}
	if e := task.GetEndpoint().GetSpec(); e != nil {
		req.ServiceEndpointSpec = &endpointSpec{Mode: int32(e.GetMode())}
		for _, p := range e.GetPorts() {
			req.ServiceEndpointSpec.Ports = append(req.ServiceEndpointSpec.Ports, endpointPort{
				Name: p.GetName(), Protocol: int32(p.GetProtocol()), PublishedPort: p.GetPublishedPort(),
				TargetPort: p.GetTargetPort(), PublishMode: int32(p.GetPublishMode()),
			})
		}
	}
	var answer value
	driver := secret.GetSpec().GetDriver().GetName()
	if err := f.Call(ctx, driver, "SecretProvider.GetSecret", req, &answer); err != nil {
		return nil, false, err
	}
	switch n := len(answer.Value); {
	case answer.Err != "":
		return nil, false, model.Errorf(model.Internal, "secret driver %s: %s", driver, answer.Err)
	case n == 0 || n > model.MaxSecret:
		return nil, false, model.Errorf(model.Invalid, "secret driver %s gave %d bytes, want 1 to %d", driver, n, model.MaxSecret)
	}
	return answer.Value, !answer.DoNotReuse, nil
}
