package orch

import (
	"time"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

// View is all that a decider may look at. It is not changed.
type View struct {
	// ServiceID names the service, also once it is gone.
	ServiceID string
	// Service is nil when it was removed.
	Service *api.Service
	// Tasks are all tasks of the service, in any order.
	Tasks []*api.Task
	// Nodes by id. Needed are the nodes that Tasks are on; for the global modes, all.
	// A node that is missing here does not exist.
	Nodes map[string]*api.Node
	// Cluster holds the defaults and may be nil.
	Cluster *api.Cluster
	// RanSince says of tasks that have stopped when they were first seen running. It
	// may be incomplete; an unknown task that just failed counts as one that never ran
	// for long.
	RanSince map[string]time.Time
	// NewID makes ids for new tasks. The same sequence of ids gives the same plan.
	NewID func() string
	// Limit bounds the number of changes; zero means no bound. A plan that was cut
	// short wakes at once (its Wake is now plus a nanosecond).
	Limit int
}

// Decide returns what to do for one service of any mode at time now.
func Decide(v View, now time.Time) model.Plan {
	w := newWork(v, now)
	switch {
	case v.Service == nil:
		w.removeAll()
	case v.Service.GetSpec().GetReplicated() != nil:
		w.replicated()
	case v.Service.GetSpec().GetGlobal() != nil:
		w.global()
	case v.Service.GetSpec().GetReplicatedJob() != nil:
		w.replicatedJob()
	case v.Service.GetSpec().GetGlobalJob() != nil:
		w.globalJob()
	}
	w.reap()
	return w.plan()
}
