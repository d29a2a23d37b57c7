package agent

import (
	"bytes"
	"context"
	"log/slog"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/lifecycle"
	"github.com/skep-dev/skep/core/model"
)

// Networks makes this node's kernel match what the swarm says of its networks.
type Networks interface {
	// Apply takes an update over and returns nil when the kernel matches it. Updates come in
	// order, from one goroutine; one without content only has the kernel checked.
	Apply(ctx context.Context, u *skepv1.NetworkUpdate) error
	// Digest is netplan.Digest of what the updates told.
	Digest() []byte
	// Examine compares the kernel with it, mends what differs and tells each difference.
	Examine(ctx context.Context) ([]*skepv1.NetworkDifference, error)
	// Repairs counts the differences mended since the process began.
	Repairs() uint64
	// Listening returns the sockets of a running container, in a namespace of its own, that
	// take what comes from others.
	Listening(containerID string) ([]lifecycle.Socket, error)
}

const (
	// withdrawWait bounds how long a task that is to stop runs on for other nodes to lead
	// their connections elsewhere.
	withdrawWait = 5 * time.Second
	// enginesWait is how long Docker Engines, which report nothing, have to hear by gossip that
	// a task is to stop. It is as long as they give each other.
	enginesWait = 2 * time.Second
	// lingerWait is how much longer than all nodes lead there a task runs, for the connections
	// that were led to it last to bring their requests: servers that are told to stop drop those
	// that have not. It is enough for TLS over a long way, and little beside a container's start.
	lingerWait = 300 * time.Millisecond
	// programAgain is the pause before an update that failed is tried again.
	programAgain = time.Second
	// repairsEvery is how often differences that the node mended by itself are reported.
	repairsEvery = 10 * time.Second
)

// networks applies what the manager says of networks and reports what was programmed. A
// manager that does not know the service (Docker's) has no such networks for this node.
func (a *Agent) networks(ctx context.Context, conn grpc.ClientConnInterface, session string) error {
	client := skepv1.NewNetworksClient(conn)
	stream, err := client.Watch(ctx, &skepv1.WatchNetworksRequest{SessionId: session})
	if err != nil {
		return err
	}
	updates := make(chan *skepv1.NetworkUpdate)
	ended := make(chan error, 1)
	go func() {
		for {
			u, err := stream.Recv()
			if err != nil {
				ended <- err
				return
			}
			select {
			case updates <- u:
			case <-ctx.Done():
				ended <- ctx.Err()
				return
			}
		}
	}()
	var again <-chan time.Time
	var version uint64
	repairs := a.cfg.Networks.Repairs()
	tick := time.NewTicker(repairsEvery)
	defer tick.Stop()
	for {
		u := &skepv1.NetworkUpdate{Version: version}
		select {
		case <-tick.C:
			if version == 0 || again != nil || a.cfg.Networks.Repairs() == repairs {
				continue
			}
		case err := <-ended:
			if status.Code(err) == codes.Unimplemented {
				a.worker.setOverlays(overlaysForeign)
				<-ctx.Done()
				return ctx.Err()
			}
			return err
		case u = <-updates:
			version = u.GetVersion()
			a.worker.setOverlays(overlaysServed)
		case <-again:
		}
		again = nil
		order := u.GetCheck()
		a.worker.withdraw(u)
		report := &skepv1.ProgrammedRequest{SessionId: session, Version: version}
		err := a.cfg.Networks.Apply(ctx, u)
		if err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			a.cfg.Log.Warn("networks not programmed, trying again", slog.Any("error", err))
			report.Version, report.Error = 0, err.Error()
			again = time.After(programAgain)
		}
		now := a.cfg.Networks.Repairs()
		report.Repaired, repairs = now-repairs, now
		call, cancel := context.WithTimeout(ctx, callTimeout)
		_, callErr := client.Programmed(call, report)
		if callErr == nil && order != nil {
			callErr = a.examine(call, client, session, order, err)
		}
		cancel()
		if callErr != nil {
			return callErr
		}
	}
}

// examine answers a manager's wish to know whether this node's networks are as they should be.
func (a *Agent) examine(ctx context.Context, client skepv1.NetworksClient, session string, order *skepv1.CheckOrder, programmed error) error {
	answer := &skepv1.CheckedRequest{SessionId: session, CheckId: order.GetId()}
	if !bytes.Equal(order.GetDigest(), a.cfg.Networks.Digest()) {
		answer.Differences = append(answer.Differences, &skepv1.NetworkDifference{
			Kind: "state", Text: "the node knows something else of its networks than the managers: it is told anew",
		})
	}
	found, err := a.cfg.Networks.Examine(ctx)
	if err == nil {
		err = programmed
	}
	if err != nil {
		answer.Error = err.Error()
	}
	answer.Differences = append(answer.Differences, found...)
	_, err = client.Checked(ctx, answer)
	return err
}

// withdraw notes the tasks that no node of Skep's leads connections to any longer. A complete
// update names all of them.
func (w *worker) withdraw(u *skepv1.NetworkUpdate) {
	if len(u.GetWithdrawn()) == 0 && u.GetNode() == nil && !u.GetComplete() {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if u.GetNode() != nil {
		w.engines = u.GetNode().GetGossip()
	}
	if u.GetComplete() {
		clear(w.withdrawn)
	}
	for _, id := range u.GetWithdrawn() {
		w.withdrawn[id] = time.Now()
	}
	w.notify()
}

// awaitWithdrawal waits until a task may be stopped without anybody losing a request, for a
// bounded time: a swarm without leader must not keep a task from stopping.
func (w *worker) awaitWithdrawal(ctx context.Context, task *api.Task) {
	if w.cfg.Networks == nil || !spansNodes(task) {
		return
	}
	late := time.NewTimer(withdrawWait)
	defer late.Stop()
	for {
		w.mu.Lock()
		since, gone := w.withdrawn[task.GetId()]
		changed, engines := w.changed, w.engines
		w.mu.Unlock()
		if gone {
			wait := time.Duration(0)
			if task.GetStatus().GetState() == api.TaskState_RUNNING {
				wait = lingerWait
			}
			if engines && sharedWithEngines(task) {
				wait = enginesWait
			}
			select {
			case <-time.After(time.Until(since.Add(wait))):
			case <-ctx.Done():
			}
			return
		}
		select {
		case <-changed:
		case <-late.C:
			w.cfg.Log.Warn("task stops before all nodes know", slog.String("task_id", task.GetId()))
			return
		case <-ctx.Done():
			return
		}
	}
}

// sharedWithEngines reports whether Docker Engines may lead connections to a task.
func sharedWithEngines(task *api.Task) bool {
	return slices.ContainsFunc(task.GetNetworks(), func(a *api.NetworkAttachment) bool {
		return model.Overlay(a.GetNetwork()) && model.Unshared(a.GetNetwork()) == ""
	})
}

// overlays is what the agent knows of its swarm's overlay networks.
type overlays int

const (
	// overlaysUnknown is so until a manager has answered.
	overlaysUnknown overlays = iota
	// overlaysServed are Skep's: the managers say what the networks hold.
	overlaysServed
	// overlaysForeign are Docker Engine's, which learn that from each other.
	overlaysForeign
)

func (w *worker) setOverlays(o overlays) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.overlays != o {
		w.overlays = o
		w.notify()
	}
}

// foreign reports whether the managers are known to be another engine's.
func (w *worker) foreign() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.overlays == overlaysForeign
}

// checkOverlays refuses a task of an overlay network that this node cannot take part in.
// It waits until the managers are known.
func (w *worker) checkOverlays(ctx context.Context, task *api.Task) error {
	if w.cfg.Networks == nil || !spansNodes(task) {
		return nil
	}
	for {
		w.mu.Lock()
		known, changed := w.overlays, w.changed
		w.mu.Unlock()
		switch known {
		case overlaysServed:
			return nil
		case overlaysForeign:
			return model.Errorf(model.Unimplemented, "a Skep node in a swarm of Docker Engine has no overlay networks and no ingress ports: publish with mode=host, use the network host, or keep the service off this node by a constraint")
		case overlaysUnknown:
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// spansNodes reports whether a task has an endpoint in a network of the swarm.
func spansNodes(task *api.Task) bool {
	for _, a := range task.GetNetworks() {
		if model.Overlay(a.GetNetwork()) {
			return true
		}
	}
	return false
}
