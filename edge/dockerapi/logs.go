package dockerapi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/edge/dockerapi/httpapi"
)

// timestampLayout is RFC 3339 with exactly nine digits.
const timestampLayout = "2006-01-02T15:04:05.000000000Z07:00"

func (a *API) serviceLogs(w http.ResponseWriter, r *http.Request) error {
	c, err := a.manager.Control()
	if err != nil {
		return err
	}
	s, err := findService(r.Context(), c, r.PathValue("id"), false)
	if err != nil {
		return err
	}
	tty := s.GetSpec().GetTask().GetContainer().GetTty()
	return a.streamLogs(w, r, &api.LogSelector{ServiceIds: []string{s.GetId()}}, tty)
}

func (a *API) taskLogs(w http.ResponseWriter, r *http.Request) error {
	c, err := a.manager.Control()
	if err != nil {
		return err
	}
	t, err := findTask(r.Context(), c, r.PathValue("id"))
	if err != nil {
		return err
	}
	return a.streamLogs(w, r, &api.LogSelector{TaskIds: []string{t.GetId()}}, t.GetSpec().GetContainer().GetTty())
}

// logOptions reads the query of a log request.
func logOptions(r *http.Request) (*api.LogSubscriptionOptions, error) {
	q := r.URL.Query()
	options := &api.LogSubscriptionOptions{Follow: httpapi.Bool(r, "follow")}
	if httpapi.Bool(r, "stdout") {
		options.Streams = append(options.Streams, api.LogStream_LOG_STREAM_STDOUT)
	}
	if httpapi.Bool(r, "stderr") {
		options.Streams = append(options.Streams, api.LogStream_LOG_STREAM_STDERR)
	}
	if len(options.Streams) == 0 {
		return nil, model.Errorf(model.Invalid, "must specify at least one of 'stdout' or 'stderr'")
	}
	since, err := httpapi.Time(q.Get("since"))
	if err != nil {
		return nil, model.Errorf(model.Invalid, "invalid value for \"since\": %v", err)
	}
	if !since.IsZero() {
		options.Since = timestamppb.New(since)
	}
	if tail := q.Get("tail"); tail != "" && tail != "all" {
		n, err := strconv.ParseInt(tail, 10, 64)
		switch {
		case err != nil:
			return nil, model.Errorf(model.Internal, `tail value must be a positive integer or "all"`)
		case n < 0:
			return nil, model.Errorf(model.Internal, "negative tail values not supported")
		}
		options.Tail = -n - 1 // on the wire the last n lines are -n-1; 0 is all
	}
	return options, nil
}

// streamLogs subscribes on the leader and writes one frame a line. Errors after the
// answer has begun are told inside the stream.
func (a *API) streamLogs(w http.ResponseWriter, r *http.Request, selector *api.LogSelector, tty bool) error {
	options, err := logOptions(r)
	if err != nil {
		return err
	}
	client, err := a.manager.Logs()
	if err != nil {
		return err
	}
	stream, err := client.SubscribeLogs(r.Context(), &api.SubscribeLogsRequest{Selector: selector, Options: options})
	if err != nil {
		return err
	}
	out := httpapi.Begin(w, httpapi.StreamType(r, tty))
	format := lineFormat{timestamps: httpapi.Bool(r, "timestamps"), details: httpapi.Bool(r, "details")}
	for {
		batch, err := stream.Recv()
		if err != nil {
			return endLogs(r.Context(), out, tty, err)
		}
		for _, m := range batch.GetMessages() {
			if err := writeLine(out, m, format, tty); err != nil {
				return nil //nolint:nilerr // the client has gone
			}
		}
	}
}

func writeLine(out io.Writer, m *api.LogMessage, format lineFormat, tty bool) error {
	stream := httpapi.Stdout
	if m.GetStream() == api.LogStream_LOG_STREAM_STDERR {
		stream = httpapi.Stderr
	}
	if !tty {
		out = httpapi.Frames(out, stream)
	}
	_, err := out.Write(format.line(m))
	return err
}

func endLogs(ctx context.Context, out io.Writer, tty bool, err error) error {
	if errors.Is(err, io.EOF) || status.Code(err) == codes.Canceled || ctx.Err() != nil {
		return nil //nolint:nilerr // the logs or the client have ended
	}
	text := "Error grabbing logs: " + err.Error() + "\n"
	if !tty {
		out = httpapi.Frames(out, httpapi.System)
	}
	if _, writeErr := io.WriteString(out, text); writeErr != nil {
		return nil //nolint:nilerr // the client has gone
	}
	return fmt.Errorf("stream logs: %w", err)
}

// lineFormat says what stands before a message.
type lineFormat struct{ timestamps, details bool }

// line returns "[timestamp SP][details SP]message".
func (f lineFormat) line(m *api.LogMessage) []byte {
	var b []byte
	if f.timestamps {
		b = m.GetTimestamp().AsTime().AppendFormat(b, timestampLayout)
		b = append(b, ' ')
	}
	if f.details {
		b = append(b, details(m)...)
		b = append(b, ' ')
	}
	return append(b, m.GetData()...)
}

// details returns the attributes of a line, the task's context among them.
func details(m *api.LogMessage) string {
	attrs := map[string]string{}
	for _, attr := range m.GetAttrs() {
		attrs[attr.GetKey()] = attr.GetValue()
	}
	attrs["com.docker.swarm.node.id"] = m.GetContext().GetNodeId()
	attrs["com.docker.swarm.service.id"] = m.GetContext().GetServiceId()
	attrs["com.docker.swarm.task.id"] = m.GetContext().GetTaskId()
	return httpapi.Attributes(attrs)
}
