package cli

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"
	"github.com/spf13/cobra"
)

// Labels with which a manager marks the origin of every line.
const (
	labelTask = "com.docker.swarm.task.id"
	labelNode = "com.docker.swarm.node.id"
)

func (a *app) logsCommand() *cobra.Command {
	var o client.ServiceLogsOptions
	var raw bool
	c := &cobra.Command{
		Use:   "logs SERVICE|TASK",
		Short: "Print what the tasks of a service, or one task, wrote",
		Args:  args(1, 1),
		RunE: func(c *cobra.Command, given []string) error {
			d, _, err := a.manager(c.Context())
			if err != nil {
				return err
			}
			defer d.Close() //nolint:errcheck // only idle connections
			since, err := parseSince(o.Since, time.Now())
			if err != nil {
				return err
			}
			o.Since, o.ShowStdout, o.ShowStderr, o.Details = since, true, true, !raw
			return a.logs(c.Context(), d, given[0], o, raw)
		},
	}
	c.Flags().BoolVarP(&o.Follow, "follow", "f", false, "go on as more is written")
	c.Flags().StringVarP(&o.Tail, "tail", "n", "all", "how many of the last lines of each task")
	c.Flags().StringVar(&o.Since, "since", "", "only what was written since a time (2006-01-02T15:04:05Z) or for a duration (10m)")
	c.Flags().BoolVarP(&o.Timestamps, "timestamps", "t", false, "print when each line was written")
	c.Flags().BoolVar(&raw, "raw", false, "print the lines as they are, without the task's name")
	return c
}

// parseSince turns a duration or an RFC 3339 time into seconds since 1970, as the API wants it.
func parseSince(s string, now time.Time) (string, error) {
	if s == "" {
		return "", nil
	}
	if d, err := time.ParseDuration(s); err == nil {
		return unixSeconds(now.Add(-d)), nil
	}
	for _, layout := range []string{time.RFC3339Nano, "2006-01-02T15:04:05", "2006-01-02 15:04:05", "2006-01-02"} {
		if t, err := time.ParseInLocation(layout, s, now.Location()); err == nil {
			return unixSeconds(t), nil
		}
	}
	if _, err := strconv.ParseFloat(s, 64); err == nil {
		return s, nil
	}
	return "", fmt.Errorf("%q is neither a duration like 10m nor a time like 2006-01-02T15:04:05Z", s)
}

func unixSeconds(t time.Time) string { return fmt.Sprintf("%d.%09d", t.Unix(), t.Nanosecond()) }

func (a *app) logs(ctx context.Context, d *client.Client, name string, o client.ServiceLogsOptions, raw bool) error {
	source, err := findLogs(ctx, d, name)
	if err != nil {
		return err
	}
	if source.tty {
		o.Details = false
	}
	var stream io.ReadCloser
	if source.task {
		stream, err = d.TaskLogs(ctx, source.id, client.TaskLogsOptions(o))
	} else {
		stream, err = d.ServiceLogs(ctx, source.id, o)
	}
	if err != nil {
		return fmt.Errorf("read logs of %s: %w", name, err)
	}
	defer stream.Close() //nolint:errcheck // only read
	if source.tty {
		_, err = io.Copy(a.Out, stream)
	} else {
		p := &prefixer{
			timestamps: o.Timestamps, raw: raw, json: a.json,
			lookup: func(task, node string) string { return taskName(ctx, d, source.service, task, node) }, known: map[string]string{},
		}
		_, err = stdcopy.StdCopy(p.to(a.Out, "stdout"), p.to(a.Err, "stderr"), stream)
	}
	if ctx.Err() != nil { // whatever the stream says of its end
		return ctx.Err()
	}
	if err != nil {
		return fmt.Errorf("read logs of %s: %w", name, err)
	}
	return nil
}

// logSource is the service or task whose logs are read.
type logSource struct {
	id, service string
	task, tty   bool
}

func findLogs(ctx context.Context, d *client.Client, name string) (logSource, error) {
	s, err := d.ServiceInspect(ctx, name, client.ServiceInspectOptions{})
	if err == nil {
		return logSource{id: s.Service.ID, service: s.Service.Spec.Name, tty: hasTTY(s.Service.Spec.TaskTemplate)}, nil
	}
	if !errdefs.IsNotFound(err) {
		return logSource{}, fmt.Errorf("read logs: %w", err)
	}
	t, err := d.TaskInspect(ctx, name, client.TaskInspectOptions{})
	if errdefs.IsNotFound(err) {
		return logSource{}, fmt.Errorf("there is no service or task %s: `skep ls` and `skep ps` list them", name)
	}
	if err != nil {
		return logSource{}, fmt.Errorf("read logs: %w", err)
	}
	source := logSource{id: t.Task.ID, service: short(t.Task.ServiceID), task: true, tty: hasTTY(t.Task.Spec)}
	if s, err := d.ServiceInspect(ctx, t.Task.ServiceID, client.ServiceInspectOptions{}); err == nil {
		source.service = s.Service.Spec.Name
	}
	return source, nil
}

func hasTTY(t swarm.TaskSpec) bool { return t.ContainerSpec != nil && t.ContainerSpec.TTY }

// taskName names the origin of a line: service.slot@node.
func taskName(ctx context.Context, d *client.Client, service, task, node string) string {
	name := service + "." + short(task)
	if t, err := d.TaskInspect(ctx, task, client.TaskInspectOptions{}); err == nil && t.Task.Slot > 0 {
		name = fmt.Sprintf("%s.%d", service, t.Task.Slot)
	}
	host := short(node)
	if n, err := d.NodeInspect(ctx, node, client.NodeInspectOptions{}); err == nil {
		host = n.Node.Description.Hostname
	}
	return name + "@" + host
}

// prefixer puts the origin before every line. The API sends one line a frame, and
// StdCopy hands each frame to one Write.
type prefixer struct {
	timestamps, raw, json bool
	lookup                func(task, node string) string
	known                 map[string]string // task id to origin
}

func (p *prefixer) to(w io.Writer, stream string) io.Writer {
	return writerFunc(func(frame []byte) (int, error) {
		if _, err := w.Write(p.line(frame, stream)); err != nil {
			return 0, fmt.Errorf("print: %w", err)
		}
		return len(frame), nil
	})
}

type writerFunc func([]byte) (int, error)

// Write calls the function.
func (f writerFunc) Write(b []byte) (int, error) { return f(b) }

// line lays out one frame: [timestamp SP]details SP message.
func (p *prefixer) line(frame []byte, stream string) []byte {
	if p.raw && !p.json {
		return frame
	}
	rest := frame
	var stamp, details []byte
	if p.timestamps {
		stamp, rest, _ = bytes.Cut(rest, []byte(" "))
	}
	if !p.raw {
		details, rest, _ = bytes.Cut(rest, []byte(" "))
	}
	origin := p.origin(string(details))
	if p.json {
		return jsonLine(map[string]string{
			"time": string(stamp), "task": origin, "stream": stream, "line": strings.TrimSuffix(string(rest), "\n"),
		})
	}
	var b bytes.Buffer
	if p.timestamps {
		b.Write(stamp)
		b.WriteByte(' ')
	}
	fmt.Fprintf(&b, "%s | ", origin)
	b.Write(rest)
	return b.Bytes()
}

// origin reads details, k=v pairs in URL escapes joined by commas.
func (p *prefixer) origin(details string) string {
	labels := parseDetails(details)
	task := labels[labelTask]
	if task == "" {
		return ""
	}
	name, ok := p.known[task]
	if !ok {
		name = p.lookup(task, labels[labelNode])
		p.known[task] = name
	}
	return name
}

func parseDetails(s string) map[string]string {
	out := map[string]string{}
	for pair := range strings.SplitSeq(s, ",") {
		key, value, ok := strings.Cut(pair, "=")
		k, errK := url.QueryUnescape(key)
		v, errV := url.QueryUnescape(value)
		if ok && errK == nil && errV == nil {
			out[k] = v
		}
	}
	return out
}
