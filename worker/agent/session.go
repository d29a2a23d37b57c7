package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api"
)

// session registers with a manager and serves the session until something of it fails.
// id is the last session's id and becomes the new one's.
func (a *Agent) session(ctx context.Context, id *string) (registered bool, err error) {
	conn, done, err := a.cfg.Connect(ctx)
	if err != nil {
		return false, err
	}
	defer func() { done(registered) }()
	description, err := a.cfg.Describe(ctx)
	if err != nil {
		return false, fmt.Errorf("describe node: %w", err)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	client := api.NewDispatcherClient(conn)
	stream, err := client.Session(ctx, &api.SessionRequest{Description: description, SessionId: *id})
	if err != nil {
		return false, err
	}
	late := time.AfterFunc(callTimeout, func() { cancel(errors.New("no answer to the registration")) })
	msg, err := stream.Recv()
	if !late.Stop() || err != nil {
		return false, errors.Join(err, context.Cause(ctx))
	}
	*id = msg.GetSessionId()
	a.cfg.OnSession(msg)
	a.cfg.Log.Info("session with the swarm", slog.String("node_id", a.cfg.NodeID), slog.String("session_id", *id))
	a.worker.reportAll()
	a.setConn(conn)
	defer a.setConn(nil)

	g := &group{cancel: cancel}
	g.run(func() error { return a.messages(stream, *id) })
	g.run(func() error { return heartbeat(ctx, client, *id) })
	g.run(func() error { return a.assignments(ctx, client, *id) })
	g.run(func() error { return a.report(ctx, client, *id) })
	g.run(func() error { return a.watchDescription(ctx, description) })
	g.run(func() error { return a.logs(ctx, conn) })
	if a.cfg.Networks != nil {
		g.run(func() error { return a.networks(ctx, conn, *id) })
	}
	<-ctx.Done()
	g.Wait()
	return true, context.Cause(ctx)
}

// messages receives what the manager says about the node and the managers.
func (a *Agent) messages(stream grpc.ServerStreamingClient[api.SessionMessage], id string) error {
	for {
		msg, err := stream.Recv()
		if err != nil {
			return err
		}
		if msg.GetSessionId() != id {
			return fmt.Errorf("session %s became %s", id, msg.GetSessionId())
		}
		a.cfg.OnSession(msg)
	}
}

func heartbeat(ctx context.Context, client api.DispatcherClient, id string) error {
	var wait time.Duration
	for {
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		case <-timer.C:
		}
		call, cancel := context.WithTimeout(ctx, callTimeout)
		resp, err := client.Heartbeat(call, &api.HeartbeatRequest{SessionId: id})
		cancel()
		if err != nil {
			return err
		}
		wait = max(resp.GetPeriod().AsDuration(), 100*time.Millisecond)
	}
}

// assignments applies what the manager assigns.
func (a *Agent) assignments(ctx context.Context, client api.DispatcherClient, id string) error {
	stream, err := client.Assignments(ctx, &api.AssignmentsRequest{SessionId: id})
	if err != nil {
		return err
	}
	version := ""
	for {
		msg, err := stream.Recv()
		if err != nil {
			return err
		}
		switch msg.GetType() {
		case api.AssignmentsMessage_COMPLETE:
			a.worker.assignAll(ctx, msg.GetChanges())
		case api.AssignmentsMessage_INCREMENTAL:
			a.worker.assign(msg.GetChanges())
			if msg.GetAppliesTo() != version {
				return fmt.Errorf("assignments for version %s on top of version %s", msg.GetAppliesTo(), version)
			}
		}
		version = msg.GetResultsIn()
	}
}

// report sends statuses as they come; what comes while a call is under way goes together
// into the next.
func (a *Agent) report(ctx context.Context, client api.DispatcherClient, id string) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-a.worker.dirty:
		}
		updates := a.worker.takeReports()
		if len(updates) == 0 {
			continue
		}
		call, cancel := context.WithTimeout(ctx, callTimeout)
		_, err := client.UpdateTaskStatus(call, &api.UpdateTaskStatusRequest{SessionId: id, Updates: updates})
		cancel()
		if status.Code(err) == codes.NotFound {
			continue // the task is gone
		}
		if err != nil {
			return err
		}
	}
}

// watchDescription ends the session when the node is not as it was described.
func (a *Agent) watchDescription(ctx context.Context, reported *api.NodeDescription) error {
	tick := time.NewTicker(describeEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		case <-a.described:
		}
		now, err := a.cfg.Describe(ctx)
		if err != nil {
			a.cfg.Log.Warn("describe node", slog.Any("error", err))
			continue
		}
		if !proto.Equal(now, reported) {
			return errDescribed
		}
	}
}
