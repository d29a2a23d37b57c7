package replica

import (
	"bytes"
	"fmt"
	"log/slog"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/store"
)

// apply makes committed entries part of the state, publishes it once and answers those
// who waited.
func (m *member) apply(entries []*raftpb.Entry) error {
	var events []model.Event
	var answers []*pending
	for _, e := range entries {
		if e.GetIndex() <= m.applied {
			continue
		}
		own := m.takePending(e)
		if own != nil {
			answers = append(answers, own)
		}
		switch e.GetType() {
		case raftpb.EntryNormal:
			events = append(events, m.applyNormal(e, own)...)
		case raftpb.EntryConfChange:
			if err := m.applyConfChange(e); err != nil {
				return err
			}
		case raftpb.EntryConfChangeV2:
			m.r.cfg.Log.Error("skipped a change of membership of an unknown form", slog.Uint64("index", e.GetIndex()))
		}
		m.applied = e.GetIndex()
	}
	if len(events) > 0 {
		m.r.feed.publish(m.state, events, false)
	}
	for _, p := range answers {
		m.r.metrics.applied(p)
		p.answer(nil)
	}
	return nil
}

// takePending returns the pending of an entry that was proposed here. If something else is
// at its place, what is in flight is lost to those who wait, and this member may write
// again only after the end of its log, for what it held in mind is not what will be.
func (m *member) takePending(e *raftpb.Entry) *pending {
	if len(m.pending) == 0 || m.pending[0].index > e.GetIndex() {
		return nil
	}
	p := m.pending[0]
	same := p.index == e.GetIndex() && p.term == e.GetTerm()
	switch {
	case same && !p.conf && bytes.Equal(p.data, e.GetData()),
		same && p.conf && e.GetType() == raftpb.EntryConfChange:
		m.pending = m.pending[1:]
		return p
	case same && p.conf && len(e.GetData()) == 0:
		// Raft refuses a change of membership while another is not applied.
		m.pending = m.pending[1:]
		p.answer(model.Errorf(model.Unavailable, "raft: another change of membership is under way"))
		return nil
	default:
		m.dropPending()
		m.leadFrom = m.last
		return nil
	}
}

func (m *member) applyNormal(e *raftpb.Entry, own *pending) []model.Event {
	if own != nil {
		m.state = own.state
		return own.events
	}
	if len(e.GetData()) == 0 {
		return nil // the no-op of a new leader
	}
	state, events, err := decodeAndApply(m.state, e)
	if err != nil {
		// Every member refuses it for the same reason, so they stay equal.
		m.r.cfg.Log.Error("skipped a raft entry", slog.Uint64("index", e.GetIndex()), slog.Any("error", err))
		return nil
	}
	m.state = state
	return events
}

func decodeAndApply(base *store.Snapshot, e *raftpb.Entry) (*store.Snapshot, []model.Event, error) {
	var req api.InternalRaftRequest
	if err := proto.Unmarshal(e.GetData(), &req); err != nil {
		return nil, nil, fmt.Errorf("decode raft entry: %w", err)
	}
	return store.ApplyActions(base, e.GetIndex(), req.GetAction())
}
