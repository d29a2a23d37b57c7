package agent

import (
	"context"
	"net/netip"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/lifecycle"
	"github.com/skep-dev/skep/core/model"
)

// overlaysOf says, where a rig's node has networks that like it, that they are served.
type overlaysOf struct {
	skepv1.UnimplementedNetworksServer

	r *rig
}

func (o overlaysOf) Watch(req *skepv1.WatchNetworksRequest, stream skepv1.Networks_WatchServer) error {
	e, ok := o.r.nets.(*ear)
	if !ok {
		return o.UnimplementedNetworksServer.Watch(req, stream)
	}
	if err := stream.Send(&skepv1.NetworkUpdate{Complete: true, Version: 1}); err != nil {
		return err
	}
	for {
		select {
		case <-stream.Context().Done():
			return nil
		case u := <-e.says:
			if err := stream.Send(u); err != nil {
				return err
			}
		}
	}
}

func (overlaysOf) Programmed(context.Context, *skepv1.ProgrammedRequest) (*skepv1.ProgrammedResponse, error) {
	return new(skepv1.ProgrammedResponse), nil
}

// ear is the networks of a node whose containers listen on port 80 once on is set.
type ear struct {
	noNetworks

	on    atomic.Bool
	asked atomic.Int32
	says  chan *skepv1.NetworkUpdate // what the manager tells next
}

func (*ear) Apply(context.Context, *skepv1.NetworkUpdate) error { return nil }

func (e *ear) Listening(string) ([]lifecycle.Socket, error) {
	e.asked.Add(1)
	if !e.on.Load() {
		return nil, nil
	}
	return []lifecycle.Socket{{Protocol: 6, Addr: netip.MustParseAddrPort("[::]:80")}}, nil
}

// web is a task whose service publishes port 80.
func web(desired api.TaskState) *api.Task {
	t := task("t1", desired)
	t.Networks = []*api.NetworkAttachment{{
		Network:   &api.Network{Id: "net", Spec: &api.NetworkSpec{Annotations: &api.Annotations{Name: "net"}}, DriverState: &api.Driver{Name: "overlay"}},
		Addresses: []string{"10.0.0.3/24"},
	}}
	t.Endpoint = &api.Endpoint{Spec: &api.EndpointSpec{Ports: []*api.PortConfig{{TargetPort: 80, PublishedPort: 8080}}}}
	return t
}

func withEar(t *testing.T, test func(*rig, *ear)) {
	t.Helper()
	inBubble(t, func(r *rig) {
		e := &ear{noNetworks: noNetworks{t}, says: make(chan *skepv1.NetworkUpdate)}
		r.halt()
		r.nets = e
		r.start()
		test(r, e)
	})
}

func TestATaskRunsOnceItListens(t *testing.T) {
	withEar(t, func(r *rig, e *ear) {
		r.assign(web(api.TaskState_RUNNING))
		r.want("t1", api.TaskState_STARTING, 1, 1)
		e.on.Store(true)
		time.Sleep(2 * lookLast)
		r.want("t1", api.TaskState_RUNNING, 1, 1)
		before := e.asked.Load()
		e.on.Store(false) // to find that is a health check's business
		time.Sleep(lifecycle.ListenWait)
		r.want("t1", api.TaskState_RUNNING, 1, 1)
		r.halt()
		r.start()
		r.lose()
		r.want("t1", api.TaskState_RUNNING, 1, 1)
		if after := e.asked.Load(); after != before {
			t.Errorf("a running task was looked at %d times", after-before)
		}
	})
}

func TestATaskThatNeverListensRunsAllTheSame(t *testing.T) {
	withEar(t, func(r *rig, e *ear) {
		r.assign(web(api.TaskState_RUNNING))
		r.want("t1", api.TaskState_STARTING, 1, 1)
		if asked := e.asked.Load(); asked < 10 || asked > 40 {
			t.Errorf("looked %d times in two seconds", asked)
		}
		r.halt() // the wait counts from the container's start, not the agent's
		time.Sleep(lifecycle.ListenWait)
		r.want("t1", api.TaskState_STARTING, 1, 1)
		r.start()
		r.want("t1", api.TaskState_RUNNING, 1, 1)
	})
}

func TestATaskEndsBeforeItListens(t *testing.T) {
	withEar(t, func(r *rig, _ *ear) {
		r.assign(web(api.TaskState_RUNNING))
		list, err := r.engine.List(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := r.engine.Exit(list[0].ID, 3); err != nil {
			t.Fatal(err)
		}
		r.settle()
		r.want("t1", api.TaskState_FAILED, 0, 1)
	})
}

func TestATaskIsStoppedBeforeItListens(t *testing.T) {
	withEar(t, func(r *rig, _ *ear) {
		r.assign(web(api.TaskState_RUNNING))
		r.want("t1", api.TaskState_STARTING, 1, 1)
		r.assign(web(api.TaskState_SHUTDOWN))
		time.Sleep(withdrawWait) // nobody says here that the task is withdrawn
		r.settle()
		r.want("t1", api.TaskState_SHUTDOWN, 0, 1)
	})
}

// A task that has a check, or that nobody is led to, runs as before.
func TestOthersAreNotWaitedFor(t *testing.T) {
	withEar(t, func(r *rig, e *ear) {
		checked, alone := web(api.TaskState_RUNNING), web(api.TaskState_RUNNING)
		checked.GetSpec().GetContainer().Healthcheck = &api.HealthConfig{Test: []string{"CMD", "x"}, Interval: durationpb.New(100 * time.Millisecond)}
		alone.Id, alone.Slot, alone.Networks = "t2", 2, nil
		r.assign(checked, alone)
		r.want("t1", api.TaskState_RUNNING, 2, 2)
		r.want("t2", api.TaskState_RUNNING, 2, 2)
		if asked := e.asked.Load(); asked != 0 {
			t.Errorf("they were looked at %d times", asked)
		}
	})
}

// Servers that are told to stop drop connections that have not brought their requests yet,
// so one that was led to a task just before all nodes knew was lost.
func TestATaskRunsOnForItsLastConnections(t *testing.T) {
	withEar(t, func(r *rig, e *ear) {
		e.on.Store(true)
		r.assign(web(api.TaskState_RUNNING))
		r.assign(web(api.TaskState_SHUTDOWN))
		r.want("t1", api.TaskState_RUNNING, 1, 1)
		e.says <- &skepv1.NetworkUpdate{Version: 2, Withdrawn: []string{"t1"}}
		time.Sleep(lingerWait - time.Millisecond)
		synctest.Wait()
		r.want("t1", api.TaskState_RUNNING, 1, 1)
		r.settle()
		r.want("t1", api.TaskState_SHUTDOWN, 0, 1)
	})
}

// TestDockerEnginesHearBeforeATaskStops: they report nothing, so a task of a network that they
// may be in runs on for a moment after all nodes of Skep's have turned away from it.
func TestDockerEnginesHearBeforeATaskStops(t *testing.T) {
	for name, c := range map[string]struct {
		gossip bool
		edit   func(*api.Network)
		waits  bool
	}{
		"with engines":                  {true, func(*api.Network) {}, true},
		"without":                       {false, func(*api.Network) {}, false},
		"engines, an encrypted network": {true, func(n *api.Network) { n.DriverState.Options = map[string]string{model.EncryptedOption: ""} }, false},
		"engines, a network with IPv6":  {true, func(n *api.Network) { n.Ipam = &api.IPAMOptions{Configs: []*api.IPAMConfig{{Subnet: "fd00::/64"}}} }, false},
	} {
		t.Run(name, func(t *testing.T) {
			withEar(t, func(r *rig, e *ear) {
				e.on.Store(true)
				one := func(desired api.TaskState) *api.Task {
					task := web(desired)
					c.edit(task.GetNetworks()[0].GetNetwork())
					return task
				}
				r.assign(one(api.TaskState_RUNNING))
				time.Sleep(2 * lookLast)
				r.want("t1", api.TaskState_RUNNING, 1, 1)
				e.says <- &skepv1.NetworkUpdate{Version: 2, Node: &skepv1.LocalNode{Id: "n", Gossip: c.gossip}}
				r.assign(one(api.TaskState_SHUTDOWN))
				e.says <- &skepv1.NetworkUpdate{Version: 3, Withdrawn: []string{"t1"}}
				time.Sleep(enginesWait / 2)
				state, running := api.TaskState_SHUTDOWN, 0
				if c.waits {
					state, running = api.TaskState_RUNNING, 1
				}
				r.want("t1", state, running, 1)
				time.Sleep(enginesWait)
				r.want("t1", api.TaskState_SHUTDOWN, 0, 1)
			})
		})
	}
}
