package main

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/netmap"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/platform/wire"
)

// simulate is one node: a connection, a session, heartbeats, an assignment stream, and for
// each message with new tasks one call that says they run. It calls joined once it is
// registered and has its assignments, and returns when ctx ends or the session does. With a
// data plane it programs its networks, and gives its tasks their sandboxes.
func simulate(ctx context.Context, addr string, creds *wire.Credentials, plane *netNode, joined func()) error {
	conn, err := wire.Dial(creds, addr, pki.ManagerRole)
	if err != nil {
		return err
	}
	defer conn.Close()
	client := api.NewDispatcherClient(conn)
	group, ctx := errgroup.WithContext(ctx)
	description := &api.NodeDescription{
		Hostname:  "sim-" + creds.NodeID(),
		Platform:  &api.Platform{Architecture: "x86_64", Os: "linux"},
		Resources: &api.Resources{NanoCpus: 64e9, MemoryBytes: 256 << 30},
		Engine:    &api.EngineDescription{EngineVersion: "simulated"},
	}
	if plane != nil {
		description.Engine.Labels = map[string]string{netmap.DataAddrLabel: plane.addr.String()}
		description.Engine.Plugins = []*api.PluginDescription{{Type: "Network", Name: model.SkepOverlay}}
	}
	session, err := client.Session(ctx, &api.SessionRequest{Description: description})
	if err != nil {
		return err
	}
	msg, err := session.Recv()
	if err != nil {
		return fmt.Errorf("register: %w", err)
	}
	id := msg.GetSessionId()
	group.Go(func() error {
		for {
			if _, err := session.Recv(); err != nil {
				return err
			}
		}
	})
	group.Go(func() error {
		for {
			resp, err := client.Heartbeat(ctx, &api.HeartbeatRequest{SessionId: id})
			if err != nil {
				return err
			}
			if err := sleep(ctx, resp.GetPeriod().AsDuration()); err != nil {
				return err
			}
		}
	})
	if plane != nil {
		group.Go(func() error { return plane.programs(ctx, skepv1.NewNetworksClient(conn), id) })
	}
	group.Go(func() error {
		stream, err := client.Assignments(ctx, &api.AssignmentsRequest{SessionId: id})
		if err != nil {
			return err
		}
		for first := true; ; first = false {
			msg, err := stream.Recv()
			if err != nil {
				return err
			}
			if first {
				joined()
			}
			if err := reportRunning(ctx, client, id, plane, msg); err != nil {
				return err
			}
		}
	})
	return group.Wait()
}

// reportRunning says of the new tasks of a message that they run.
func reportRunning(ctx context.Context, client api.DispatcherClient, session string, plane *netNode, msg *api.AssignmentsMessage) error {
	req := &api.UpdateTaskStatusRequest{SessionId: session}
	for _, c := range msg.GetChanges() {
		task := c.GetAssignment().GetTask()
		if task == nil || c.GetAction() != api.AssignmentChange_UPDATE || task.GetStatus().GetState() != api.TaskState_ASSIGNED {
			continue
		}
		if plane != nil {
			if err := plane.connect(ctx, task); err != nil {
				return err
			}
		}
		req.Updates = append(req.Updates, &api.UpdateTaskStatusRequest_TaskStatusUpdate{
			TaskId: task.GetId(),
			Status: &api.TaskStatus{
				State: api.TaskState_RUNNING, Message: "started", Timestamp: timestamppb.New(time.Now()),
				RuntimeStatus: &api.TaskStatus_Container{Container: &api.ContainerStatus{ContainerId: task.GetId(), Pid: 1}},
			},
		})
	}
	if len(req.GetUpdates()) == 0 {
		return nil
	}
	_, err := client.UpdateTaskStatus(ctx, req)
	return err
}
