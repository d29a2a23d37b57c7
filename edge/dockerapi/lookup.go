package dockerapi

import (
	"context"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

// finder looks one kind of object up by what a user typed.
type finder[T model.Object] struct {
	what     string
	byID     func(id string) (T, error)
	byName   func(name string) ([]T, error)
	byPrefix func(prefix string) ([]T, error)
}

// find returns the object with this id, or else the one with this name, or else the
// one whose id begins so.
func (f finder[T]) find(typed string) (none T, err error) {
	found, err := f.byID(typed)
	if err == nil {
		return found, nil
	}
	if status.Code(err) != codes.NotFound {
		return none, err
	}
	for _, list := range []func(string) ([]T, error){f.byName, f.byPrefix} {
		matches, err := list(typed)
		if err != nil {
			return none, err
		}
		switch len(matches) {
		case 0:
		case 1:
			return matches[0], nil
		default:
			return none, model.Errorf(model.Invalid, "%s %s is ambiguous (%d matches found)", f.what, typed, len(matches))
		}
	}
	return none, model.Errorf(model.NotFound, "%s %s not found", f.what, typed)
}

func findNode(ctx context.Context, c api.ControlClient, typed string) (*api.Node, error) {
	list := func(f *api.ListNodesRequest_Filters) ([]*api.Node, error) {
		resp, err := c.ListNodes(ctx, &api.ListNodesRequest{Filters: f})
		return resp.GetNodes(), err
	}
	return finder[*api.Node]{
		what: "node",
		byID: func(id string) (*api.Node, error) {
			resp, err := c.GetNode(ctx, &api.GetNodeRequest{NodeId: id})
			return resp.GetNode(), err
		},
		byName: func(n string) ([]*api.Node, error) { return list(&api.ListNodesRequest_Filters{Names: []string{n}}) },
		byPrefix: func(p string) ([]*api.Node, error) {
			return list(&api.ListNodesRequest_Filters{IdPrefixes: []string{p}})
		},
	}.find(typed)
}

func findService(ctx context.Context, c api.ControlClient, typed string, insertDefaults bool) (*api.Service, error) {
	get := func(id string) (*api.Service, error) {
		resp, err := c.GetService(ctx, &api.GetServiceRequest{ServiceId: id, InsertDefaults: insertDefaults})
		return resp.GetService(), err
	}
	list := func(f *api.ListServicesRequest_Filters) ([]*api.Service, error) {
		resp, err := c.ListServices(ctx, &api.ListServicesRequest{Filters: f})
		return resp.GetServices(), err
	}
	found, err := finder[*api.Service]{
		what: "service",
		byID: get,
		byName: func(n string) ([]*api.Service, error) {
			return list(&api.ListServicesRequest_Filters{Names: []string{n}})
		},
		byPrefix: func(p string) ([]*api.Service, error) {
			return list(&api.ListServicesRequest_Filters{IdPrefixes: []string{p}})
		},
	}.find(typed)
	if err == nil && insertDefaults && found.GetId() != typed {
		return get(found.GetId()) // lists do not insert defaults
	}
	return found, err
}

func findTask(ctx context.Context, c api.ControlClient, typed string) (*api.Task, error) {
	list := func(f *api.ListTasksRequest_Filters) ([]*api.Task, error) {
		resp, err := c.ListTasks(ctx, &api.ListTasksRequest{Filters: f})
		return resp.GetTasks(), err
	}
	return finder[*api.Task]{
		what: "task",
		byID: func(id string) (*api.Task, error) {
			resp, err := c.GetTask(ctx, &api.GetTaskRequest{TaskId: id})
			return resp.GetTask(), err
		},
		byName: func(n string) ([]*api.Task, error) { return list(&api.ListTasksRequest_Filters{Names: []string{n}}) },
		byPrefix: func(p string) ([]*api.Task, error) {
			return list(&api.ListTasksRequest_Filters{IdPrefixes: []string{p}})
		},
	}.find(typed)
}

func findSecret(ctx context.Context, c api.ControlClient, typed string) (*api.Secret, error) {
	list := func(f *api.ListSecretsRequest_Filters) ([]*api.Secret, error) {
		resp, err := c.ListSecrets(ctx, &api.ListSecretsRequest{Filters: f})
		return resp.GetSecrets(), err
	}
	return finder[*api.Secret]{
		what: "secret",
		byID: func(id string) (*api.Secret, error) {
			resp, err := c.GetSecret(ctx, &api.GetSecretRequest{SecretId: id})
			return resp.GetSecret(), err
		},
		byName: func(n string) ([]*api.Secret, error) {
			return list(&api.ListSecretsRequest_Filters{Names: []string{n}})
		},
		byPrefix: func(p string) ([]*api.Secret, error) {
			return list(&api.ListSecretsRequest_Filters{IdPrefixes: []string{p}})
		},
	}.find(typed)
}

func findConfig(ctx context.Context, c api.ControlClient, typed string) (*api.Config, error) {
	list := func(f *api.ListConfigsRequest_Filters) ([]*api.Config, error) {
		resp, err := c.ListConfigs(ctx, &api.ListConfigsRequest{Filters: f})
		return resp.GetConfigs(), err
	}
	return finder[*api.Config]{
		what: "config",
		byID: func(id string) (*api.Config, error) {
			resp, err := c.GetConfig(ctx, &api.GetConfigRequest{ConfigId: id})
			return resp.GetConfig(), err
		},
		byName: func(n string) ([]*api.Config, error) {
			return list(&api.ListConfigsRequest_Filters{Names: []string{n}})
		},
		byPrefix: func(p string) ([]*api.Config, error) {
			return list(&api.ListConfigsRequest_Filters{IdPrefixes: []string{p}})
		},
	}.find(typed)
}

// theCluster returns the swarm's one cluster object.
func theCluster(ctx context.Context, c api.ControlClient) (*api.Cluster, error) {
	resp, err := c.ListClusters(ctx, &api.ListClustersRequest{Filters: &api.ListClustersRequest_Filters{Names: []string{"default"}}})
	if err != nil {
		return nil, err
	}
	if len(resp.GetClusters()) != 1 {
		return nil, model.Errorf(model.Internal, "swarm not found: it has %d cluster objects", len(resp.GetClusters()))
	}
	return resp.GetClusters()[0], nil
}
