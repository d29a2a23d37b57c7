package agent

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime"
)

const (
	// logBatch and logDelay bound how many lines, and for how long, are gathered.
	logBatch = 256
	logDelay = 50 * time.Millisecond
)

// logs serves the log subscriptions that the manager sends, until the session ends.
func (a *Agent) logs(ctx context.Context, conn grpc.ClientConnInterface) error {
	broker := api.NewLogBrokerClient(conn)
	stream, err := broker.ListenSubscriptions(ctx, new(api.ListenSubscriptionsRequest))
	if err != nil {
		return err
	}
	var group sync.WaitGroup
	defer group.Wait()
	ctx, cancelAll := context.WithCancel(ctx)
	defer cancelAll()
	open := map[string]context.CancelFunc{}
	for {
		msg, err := stream.Recv()
		if status.Code(err) == codes.Unimplemented {
			<-ctx.Done()
			return ctx.Err()
		}
		if err != nil {
			return err
		}
		if cancel, ok := open[msg.GetId()]; ok {
			if msg.GetClose() {
				cancel()
				delete(open, msg.GetId())
			}
			continue
		}
		if msg.GetClose() {
			continue
		}
		sub, cancel := context.WithCancel(ctx)
		open[msg.GetId()] = cancel
		group.Go(func() {
			defer cancel()
			if err := a.publish(sub, conn, msg); err != nil && sub.Err() == nil {
				a.cfg.Log.Warn("publish logs", slog.String("subscription_id", msg.GetId()), slog.Any("error", err))
			}
		})
	}
}

// openPublisher opens a stream to publish logs on. Docker's managers end it without the
// response that the protocol has, which is an error to a client of a method with one; as a
// stream of responses it is an end like any other.
func openPublisher(ctx context.Context, conn grpc.ClientConnInterface) (grpc.ClientStreamingClient[api.PublishLogsMessage, api.PublishLogsResponse], error) {
	desc := &grpc.StreamDesc{StreamName: "PublishLogs", ClientStreams: true, ServerStreams: true}
	stream, err := conn.NewStream(ctx, desc, api.LogBroker_PublishLogs_FullMethodName)
	if err != nil {
		return nil, err
	}
	return &grpc.GenericClientStream[api.PublishLogsMessage, api.PublishLogsResponse]{ClientStream: stream}, nil
}

// publish sends the lines of all tasks that a subscription selects.
func (a *Agent) publish(ctx context.Context, conn grpc.ClientConnInterface, sub *api.SubscriptionMessage) error {
	stream, err := openPublisher(ctx, conn)
	if err != nil {
		return err
	}
	lines := make(chan *api.LogMessage, logBatch) // blocks the readers of the logs when full
	var readers sync.WaitGroup
	done := make(chan struct{})
	go func() {
		a.readAll(ctx, sub, &readers, lines)
		readers.Wait()
		close(done)
	}()
	err = sendLogs(ctx, stream, sub.GetId(), lines, done)
	<-done
	if err != nil {
		return err
	}
	if err := stream.Send(&api.PublishLogsMessage{SubscriptionId: sub.GetId(), Close: true}); err != nil {
		return err
	}
	if _, err = stream.CloseAndRecv(); errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// readAll starts a reader for each selected task; with follow also for those to come.
func (a *Agent) readAll(ctx context.Context, sub *api.SubscriptionMessage, readers *sync.WaitGroup, lines chan<- *api.LogMessage) {
	began := map[string]bool{}
	for {
		tasks, changed := a.worker.selected(sub.GetSelector())
		for _, m := range tasks {
			task, _ := m.current()
			state := task.GetStatus().GetState()
			if began[m.id] || state < api.TaskState_RUNNING {
				continue
			}
			began[m.id] = true
			readers.Go(func() {
				if err := a.readTask(ctx, sub, task, lines); err != nil && ctx.Err() == nil {
					a.cfg.Log.Warn("read logs of task", slog.String("task_id", task.GetId()), slog.Any("error", err))
				}
			})
		}
		if !sub.GetOptions().GetFollow() {
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

// selected returns the tasks that a selector names, and a channel that closes when that
// may have changed.
func (w *worker) selected(s *api.LogSelector) ([]*managed, <-chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []*managed
	for _, m := range w.tasks {
		task, _ := m.current()
		if slices.Contains(s.GetServiceIds(), task.GetServiceId()) || slices.Contains(s.GetTaskIds(), task.GetId()) ||
			slices.Contains(s.GetNodeIds(), w.cfg.NodeID) {
			out = append(out, m)
		}
	}
	return out, w.changed
}

func (a *Agent) readTask(ctx context.Context, sub *api.SubscriptionMessage, task *api.Task, lines chan<- *api.LogMessage) error {
	id := task.GetStatus().GetContainer().GetContainerId()
	if id == "" {
		return nil
	}
	o := sub.GetOptions()
	opts := runtime.LogOptions{Stdout: true, Stderr: true, Follow: o.GetFollow(), Tail: -1}
	if streams := o.GetStreams(); len(streams) > 0 {
		opts.Stdout = slices.Contains(streams, api.LogStream_LOG_STREAM_STDOUT)
		opts.Stderr = slices.Contains(streams, api.LogStream_LOG_STREAM_STDERR)
	}
	if o.GetSince() != nil {
		opts.Since = o.GetSince().AsTime()
	}
	skip := int64(0)
	switch tail := o.GetTail(); {
	case tail < 0:
		opts.Tail = int(-tail - 1)
	case tail > 0:
		skip = tail
	}
	logContext := &api.LogContext{ServiceId: task.GetServiceId(), NodeId: a.cfg.NodeID, TaskId: task.GetId()}
	err := a.cfg.Engine.Logs(ctx, id, opts, func(line runtime.LogLine) error {
		if skip > 0 {
			skip--
			return nil
		}
		stream := api.LogStream_LOG_STREAM_STDOUT
		if line.Stderr {
			stream = api.LogStream_LOG_STREAM_STDERR
		}
		msg := &api.LogMessage{Context: logContext, Timestamp: timestamppb.New(line.Time), Stream: stream, Data: slices.Clone(line.Data)}
		for _, key := range slices.Sorted(maps.Keys(line.Attrs)) {
			msg.Attrs = append(msg.Attrs, &api.LogAttr{Key: key, Value: line.Attrs[key]})
		}
		select {
		case lines <- msg:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	if model.KindOf(err) == model.NotFound {
		return nil
	}
	return err
}

// sendLogs sends lines in batches until done is closed and nothing is left.
func sendLogs(ctx context.Context, stream grpc.ClientStreamingClient[api.PublishLogsMessage, api.PublishLogsResponse], id string, lines <-chan *api.LogMessage, done <-chan struct{}) error {
	for {
		var batch []*api.LogMessage
		select {
		case line := <-lines:
			batch = append(batch, line)
		case <-ctx.Done():
			return ctx.Err()
		case <-done:
			select {
			case line := <-lines:
				batch = append(batch, line)
			default:
				return nil
			}
		}
		timer := time.NewTimer(logDelay)
	gather:
		for len(batch) < logBatch {
			select {
			case line := <-lines:
				batch = append(batch, line)
			case <-timer.C:
				break gather
			case <-done:
				select {
				case line := <-lines:
					batch = append(batch, line)
				default:
					break gather
				}
			}
		}
		timer.Stop()
		if err := stream.Send(&api.PublishLogsMessage{SubscriptionId: id, Messages: batch}); err != nil {
			_, cause := stream.CloseAndRecv()
			return errors.Join(err, cause)
		}
	}
}
