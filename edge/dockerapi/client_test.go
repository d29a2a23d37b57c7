package dockerapi_test

import (
	"bytes"
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"
)

func newClient(t *testing.T, d *daemon, opts ...client.Opt) *client.Client {
	t.Helper()
	c, err := client.New(append(opts, client.WithHost(strings.Replace(serve(t, d).URL, "http://", "tcp://", 1)))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func must[T any](t *testing.T) func(T, error) T {
	t.Helper()
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// TestClient drives the API with the client library that tools are built on.
func TestClient(t *testing.T) {
	ctx := t.Context()
	c := newClient(t, newDaemon(t, true))
	ping := must[client.PingResult](t)(c.Ping(ctx, client.PingOptions{NegotiateAPIVersion: true}))
	if ping.APIVersion != "1.55" || ping.OSType != "linux" || ping.SwarmStatus == nil || ping.SwarmStatus.NodeState != "inactive" {
		t.Errorf("ping: %+v", ping)
	}
	must[client.SwarmInitResult](t)(c.SwarmInit(ctx, client.SwarmInitOptions{ListenAddr: "0.0.0.0:2377"}))
	eventCtx, stopEvents := context.WithCancel(ctx)
	defer stopEvents()
	stream := c.Events(eventCtx, client.EventsListOptions{Filters: make(client.Filters).Add("type", "service", "secret")})

	created := must[client.ServiceCreateResult](t)(c.ServiceCreate(ctx, client.ServiceCreateOptions{Spec: swarm.ServiceSpec{
		Annotations:  swarm.Annotations{Name: "web", Labels: map[string]string{"tier": "front"}},
		TaskTemplate: swarm.TaskSpec{ContainerSpec: &swarm.ContainerSpec{Image: "busybox:1", Env: []string{"A=<b>&c"}}},
		Mode:         swarm.ServiceMode{Replicated: &swarm.ReplicatedService{Replicas: new(uint64(2))}},
	}}))
	wait(t, func() bool {
		tasks := must[client.TaskListResult](t)(c.TaskList(ctx, client.TaskListOptions{
			Filters: make(client.Filters).Add("service", "web").Add("desired-state", "running").Add("_up-to-date", "true"),
		}))
		return len(tasks.Items) == 2
	})
	service := must[client.ServiceInspectResult](t)(c.ServiceInspect(ctx, "web", client.ServiceInspectOptions{})).Service
	if service.ID != created.ID || service.Spec.TaskTemplate.ContainerSpec.Env[0] != "A=<b>&c" {
		t.Errorf("service: %+v", service)
	}
	service.Spec.Mode.Replicated.Replicas = new(uint64(3))
	if _, err := c.ServiceUpdate(ctx, service.ID, client.ServiceUpdateOptions{Version: swarm.Version{Index: 1}, Spec: service.Spec}); err == nil || !strings.Contains(err.Error(), "update out of sequence") {
		t.Errorf("stale update: %v", err)
	}
	must[client.ServiceUpdateResult](t)(c.ServiceUpdate(ctx, service.ID, client.ServiceUpdateOptions{Version: service.Version, Spec: service.Spec}))
	wait(t, func() bool {
		list := must[client.ServiceListResult](t)(c.ServiceList(ctx, client.ServiceListOptions{Status: true, Filters: make(client.Filters).Add("label", "tier=front")}))
		return len(list.Items) == 1 && list.Items[0].ServiceStatus.RunningTasks == 3 && list.Items[0].ServiceStatus.DesiredTasks == 3
	})
	logs, err := c.ServiceLogs(ctx, "web", client.ServiceLogsOptions{ShowStdout: true, ShowStderr: true})
	if err != nil {
		t.Fatal(err)
	}
	defer logs.Close()
	var out, errs bytes.Buffer
	if _, err := stdcopy.StdCopy(&out, &errs, logs); err != nil || out.String() != "hello\n" || errs.String() != "oops\n" {
		t.Errorf("logs: %q %q %v", out.String(), errs.String(), err)
	}
	must[client.SecretCreateResult](t)(c.SecretCreate(ctx, client.SecretCreateOptions{Spec: swarm.SecretSpec{Annotations: swarm.Annotations{Name: "s"}, Data: []byte("x")}}))
	must[client.SecretRemoveResult](t)(c.SecretRemove(ctx, "s", client.SecretRemoveOptions{}))
	must[client.ServiceRemoveResult](t)(c.ServiceRemove(ctx, "web", client.ServiceRemoveOptions{}))

	var got []string
	for !slices.Contains(got, "service remove web") {
		select {
		case m := <-stream.Messages:
			if m.Scope != "swarm" || m.TimeNano == 0 {
				t.Errorf("event %+v", m)
			}
			line := string(m.Type) + " " + string(m.Action) + " " + m.Actor.Attributes["name"]
			if r := m.Actor.Attributes["replicas.new"]; r != "" {
				line += " replicas=" + m.Actor.Attributes["replicas.old"] + "→" + r
			}
			got = append(got, line)
		case err := <-stream.Err:
			t.Fatalf("events ended: %v, after %q", err, got)
		case <-time.After(10 * time.Second):
			t.Fatalf("no more events after %q", got)
		}
	}
	for _, want := range []string{"service create web", "service update web replicas=2→3", "secret create s", "secret remove s"} {
		if !slices.Contains(got, want) {
			t.Errorf("no %q in %q", want, got)
		}
	}
	info := must[client.SystemInfoResult](t)(c.Info(ctx, client.InfoOptions{})).Info
	if info.Swarm.Cluster == nil || info.Swarm.Nodes != 2 || info.Swarm.Managers != 1 {
		t.Errorf("info: %+v", info.Swarm)
	}
}

// wait polls until ok, as clients of this API do.
func wait(t *testing.T, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); {
		if time.Now().After(deadline) {
			t.Fatal("it did not happen within 10 s")
		}
	}
}

// TestEventsSinceTheSwarmBegan wants what follows an init at once to be remembered: it was
// not until the node looked whether it had become a manager.
func TestEventsSinceTheSwarmBegan(t *testing.T) {
	c := newClient(t, newDaemon(t, false))
	must[client.SwarmInitResult](t)(c.SwarmInit(t.Context(), client.SwarmInitOptions{ListenAddr: "0.0.0.0:2377"}))
	spec := swarm.ConfigSpec{Annotations: swarm.Annotations{Name: "early"}, Data: []byte("x")}
	must[client.ConfigCreateResult](t)(c.ConfigCreate(t.Context(), client.ConfigCreateOptions{Spec: spec}))
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	stream := c.Events(ctx, client.EventsListOptions{Since: "1", Filters: make(client.Filters).Add("type", "config")})
	select {
	case m := <-stream.Messages:
		if m.Action != events.ActionCreate || m.Actor.Attributes["name"] != "early" {
			t.Errorf("event %+v", m)
		}
	case err := <-stream.Err:
		t.Error(err)
	}
}

// TestEventsEnd checks the bounds of a stream.
func TestEventsEnd(t *testing.T) {
	c := newClient(t, newDaemon(t, false), client.WithAPIVersion("1.44"))
	stream := c.Events(t.Context(), client.EventsListOptions{Until: "0.1s"})
	select {
	case m := <-stream.Messages:
		t.Errorf("event %+v", m)
	case err := <-stream.Err:
		if err == nil || !strings.Contains(err.Error(), "EOF") {
			t.Errorf("the stream ended with %v", err)
		}
	}
	stream = c.Events(t.Context(), client.EventsListOptions{Since: "2024-01-02T00:00:00Z", Until: "2024-01-01T00:00:00Z"})
	if err := <-stream.Err; err == nil || !strings.Contains(err.Error(), "cannot be after `until` time") {
		t.Errorf("since after until: %v", err)
	}
}
