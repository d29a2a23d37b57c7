// Package logbroker brings the logs of tasks from their nodes to those who asked: a client
// subscribes on the leader, the nodes concerned hear of it and publish, and the broker
// passes their lines on.
//
// Subscriptions live in memory and end with the term of leadership. One mutex guards the
// tables; lines go through bounded channels, and a client that reads slowly slows its
// publishers. Reading the logs is worker/agent's.
package logbroker

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/control/replica"
	"github.com/skep-dev/skep/core/model"
)

// lineQueue bounds the batches of lines waiting for one client; publishers wait then.
const lineQueue = 64

// Config is what a Broker works with; all fields are required.
type Config struct {
	State replica.State
	// Caller says which node makes a call.
	Caller func(ctx context.Context) (nodeID, addr string, err error)
	Log    *slog.Logger
}

// Broker implements the Logs and LogBroker services while Run runs.
type Broker struct {
	api.UnimplementedLogsServer
	api.UnimplementedLogBrokerServer

	cfg Config

	mu sync.Mutex
	// ctx is the term's; nil outside of Run.
	ctx       context.Context //nolint:containedctx // ends the streams of the term
	subs      map[string]*subscription
	listeners map[string]*listener // by node id
}

// listener is one node that hears of subscriptions.
type listener struct {
	queue []*api.SubscriptionMessage // grows with the subscriptions only
	wake  chan struct{}
	gone  chan struct{}
}

// subscription is one client's wish. Its fields are guarded by Broker.mu unless they are
// channels.
type subscription struct {
	msg   *api.SubscriptionMessage
	lines chan []*api.LogMessage
	// ended is closed when the client is gone.
	ended chan struct{}
	// waiting are the nodes that have not finished; told are those that know of it.
	waiting, told map[string]bool
	problems      []string
	// changed is closed and replaced when waiting changed.
	changed chan struct{}
}

// New returns a Broker that refuses calls until Run.
func New(cfg Config) *Broker { return &Broker{cfg: cfg} }

// Run brokers for one term of leadership, until ctx ends.
func (b *Broker) Run(ctx context.Context) error {
	cursor := b.cfg.State.Follow()
	b.mu.Lock()
	b.ctx, b.subs, b.listeners = ctx, map[string]*subscription{}, map[string]*listener{}
	b.mu.Unlock()
	defer func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.ctx = nil
	}()
	for {
		events, reset, err := cursor.Next(ctx)
		if err != nil {
			return nil
		}
		b.mu.Lock()
		if len(b.subs) > 0 {
			b.placed(events, reset)
		}
		b.mu.Unlock()
	}
}

// placed tells nodes of subscriptions that concern them from now on. Callers hold mu.
func (b *Broker) placed(events []model.Event, reset bool) {
	for _, s := range b.subs {
		if !s.msg.GetOptions().GetFollow() {
			continue
		}
		if reset {
			b.tellAll(s)
			continue
		}
		for _, e := range events {
			if task, ok := e.New.(*api.Task); ok && task.GetNodeId() != "" && selects(s.msg.GetSelector(), task) {
				b.tell(s, task.GetNodeId())
			}
		}
	}
}

func selects(sel *api.LogSelector, task *api.Task) bool {
	return slices.Contains(sel.GetServiceIds(), task.GetServiceId()) || slices.Contains(sel.GetTaskIds(), task.GetId())
}

// tellAll tells the nodes of all tasks that a subscription selects, and notes tasks that
// are nowhere. Callers hold mu.
func (b *Broker) tellAll(s *subscription) {
	view, sel := b.cfg.State.View(), s.msg.GetSelector()
	follow := s.msg.GetOptions().GetFollow()
	visit := func(task *api.Task, byService bool) {
		switch {
		case task.GetNodeId() == "":
			if !follow {
				s.problems = append(s.problems, fmt.Sprintf("task %s has not been scheduled", task.GetId()))
			}
		case !follow && byService && task.GetStatus().GetState() < api.TaskState_RUNNING:
		default:
			b.tell(s, task.GetNodeId())
		}
	}
	for _, id := range sel.GetServiceIds() {
		for task := range view.TasksByService(id) {
			visit(task, true)
		}
	}
	for _, id := range sel.GetTaskIds() {
		if task := view.Task(id); task != nil {
			visit(task, false)
		}
	}
	for _, id := range sel.GetNodeIds() {
		b.tell(s, id)
	}
}

// tell makes a node publish for a subscription. Callers hold mu.
func (b *Broker) tell(s *subscription, nodeID string) {
	if s.told[nodeID] {
		return
	}
	l := b.listeners[nodeID]
	if l == nil {
		if !s.msg.GetOptions().GetFollow() {
			s.told[nodeID] = true
			s.problems = append(s.problems, fmt.Sprintf("node %s is not available", nodeID))
		}
		return
	}
	s.told[nodeID], s.waiting[nodeID] = true, true
	l.send(s.msg)
}

func (l *listener) send(msg *api.SubscriptionMessage) {
	l.queue = append(l.queue, msg)
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// finish notes that a node will send no more. Callers hold mu.
func (s *subscription) finish(nodeID string) {
	if s.waiting[nodeID] {
		delete(s.waiting, nodeID)
		close(s.changed)
		s.changed = make(chan struct{})
	}
}

func errStopped() error { return status.Error(codes.Aborted, "log broker is stopped") }

// SubscribeLogs streams the lines that a selector names. Without follow it ends when all
// nodes concerned have; with errors when some could not be asked.
func (b *Broker) SubscribeLogs(req *api.SubscribeLogsRequest, stream api.Logs_SubscribeLogsServer) error {
	sel := req.GetSelector()
	if len(sel.GetServiceIds())+len(sel.GetTaskIds())+len(sel.GetNodeIds()) == 0 {
		return status.Error(codes.InvalidArgument, "log selector must not be empty")
	}
	id, err := model.NewID(rand.Reader)
	if err != nil {
		return err
	}
	options := req.GetOptions()
	if options == nil {
		options = new(api.LogSubscriptionOptions)
	}
	s := &subscription{
		msg:   &api.SubscriptionMessage{Id: id, Selector: sel, Options: options},
		lines: make(chan []*api.LogMessage, lineQueue), ended: make(chan struct{}),
		waiting: map[string]bool{}, told: map[string]bool{}, changed: make(chan struct{}),
	}
	b.mu.Lock()
	term := b.ctx
	if term == nil {
		b.mu.Unlock()
		return errStopped()
	}
	b.subs[id] = s
	b.tellAll(s)
	b.mu.Unlock()
	defer b.unsubscribe(s)
	return b.pump(term, s, stream)
}

// pump passes lines on until the subscription is complete.
func (b *Broker) pump(term context.Context, s *subscription, stream api.Logs_SubscribeLogsServer) error {
	for {
		b.mu.Lock()
		changed := s.changed
		complete := len(s.waiting) == 0 && !s.msg.GetOptions().GetFollow()
		b.mu.Unlock()
		if complete {
			changed = nil
		}
		select {
		case lines := <-s.lines:
			if err := stream.Send(&api.SubscribeLogsMessage{Messages: lines}); err != nil {
				return err
			}
			continue
		default:
		}
		if complete {
			return b.verdict(s)
		}
		select {
		case lines := <-s.lines:
			if err := stream.Send(&api.SubscribeLogsMessage{Messages: lines}); err != nil {
				return err
			}
		case <-changed:
		case <-term.Done():
			return errStopped()
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}

// verdict is the error of a subscription that could not be served whole.
func (b *Broker) verdict(s *subscription) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(s.problems) == 0 {
		return nil
	}
	return status.Errorf(codes.Unknown, "warning: incomplete log stream. some logs could not be retrieved for the following reasons: %s",
		strings.Join(s.problems, ", "))
}

func (b *Broker) unsubscribe(s *subscription) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.subs, s.msg.GetId())
	close(s.ended)
	for nodeID := range s.told {
		if l := b.listeners[nodeID]; l != nil {
			l.send(&api.SubscriptionMessage{Id: s.msg.GetId(), Selector: s.msg.GetSelector(), Options: s.msg.GetOptions(), Close: true})
		}
	}
}

// ListenSubscriptions tells the calling node of the subscriptions that concern it.
func (b *Broker) ListenSubscriptions(_ *api.ListenSubscriptionsRequest, stream api.LogBroker_ListenSubscriptionsServer) error {
	nodeID, _, err := b.cfg.Caller(stream.Context())
	if err != nil {
		return err
	}
	l := &listener{wake: make(chan struct{}, 1), gone: make(chan struct{})}
	b.mu.Lock()
	term := b.ctx
	if term == nil {
		b.mu.Unlock()
		return errStopped()
	}
	if old := b.listeners[nodeID]; old != nil {
		close(old.gone)
		b.lost(nodeID)
	}
	b.listeners[nodeID] = l
	for _, id := range slices.Sorted(maps.Keys(b.subs)) {
		s := b.subs[id]
		if s.msg.GetOptions().GetFollow() {
			delete(s.told, nodeID)
			b.tellAll(s)
		}
	}
	b.mu.Unlock()
	defer b.unlisten(nodeID, l)
	for {
		b.mu.Lock()
		queue := l.queue
		l.queue = nil
		b.mu.Unlock()
		for _, msg := range queue {
			if err := stream.Send(msg); err != nil {
				return err
			}
		}
		select {
		case <-l.wake:
		case <-l.gone:
			return status.Error(codes.Aborted, "another stream of this node listens")
		case <-term.Done():
			return errStopped()
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}

func (b *Broker) unlisten(nodeID string, l *listener) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.listeners[nodeID] != l {
		return
	}
	delete(b.listeners, nodeID)
	b.lost(nodeID)
}

// lost gives up what a node that went away should have published. Callers hold mu.
func (b *Broker) lost(nodeID string) {
	for _, s := range b.subs {
		s.breakOff(nodeID)
	}
}

// breakOff notes that a node stopped before its end. Callers hold Broker.mu.
func (s *subscription) breakOff(nodeID string) {
	if s.waiting[nodeID] && !s.msg.GetOptions().GetFollow() {
		s.problems = append(s.problems, fmt.Sprintf("node %s disconnected unexpectedly", nodeID))
	}
	s.finish(nodeID)
}

// PublishLogs takes the lines of one node for one subscription.
func (b *Broker) PublishLogs(stream api.LogBroker_PublishLogsServer) (err error) {
	nodeID, _, err := b.cfg.Caller(stream.Context())
	if err != nil {
		return err
	}
	var s *subscription
	defer func() {
		if s == nil {
			return
		}
		b.mu.Lock()
		defer b.mu.Unlock()
		if err != nil {
			s.breakOff(nodeID)
		} else {
			s.finish(nodeID)
		}
	}()
	for {
		msg, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return stream.SendAndClose(new(api.PublishLogsResponse))
		}
		if err != nil {
			return err
		}
		if s, err = b.publisher(s, msg, nodeID); err != nil {
			return err
		}
		if msg.GetClose() {
			return stream.SendAndClose(new(api.PublishLogsResponse))
		}
		select {
		case s.lines <- msg.GetMessages():
		case <-s.ended:
			return status.Error(codes.NotFound, "log subscription not found")
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}

// publisher checks one message and returns its subscription.
func (b *Broker) publisher(s *subscription, msg *api.PublishLogsMessage, nodeID string) (*subscription, error) {
	if msg.GetSubscriptionId() == "" {
		return s, status.Error(codes.InvalidArgument, "missing subscription ID")
	}
	if s != nil && s.msg.GetId() != msg.GetSubscriptionId() {
		return s, status.Error(codes.InvalidArgument, "different subscription IDs in the same session")
	}
	for _, line := range msg.GetMessages() {
		if line.GetContext().GetNodeId() != nodeID {
			return s, status.Error(codes.PermissionDenied, "a node publishes logs of its own tasks only")
		}
	}
	if s != nil {
		return s, nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if s = b.subs[msg.GetSubscriptionId()]; b.ctx == nil || s == nil {
		return nil, status.Error(codes.NotFound, "log subscription not found")
	}
	return s, nil
}
