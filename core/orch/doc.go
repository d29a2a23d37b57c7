// Package orch decides which tasks a service should have: how many, in which slot or
// on which node, which to restart, replace, stop or forget.
//
// Every decider is a function of a View and a time that returns a model.Plan; it
// changes neither. A View is narrow: one service, its tasks, the nodes concerned and
// the cluster's defaults. Delays, monitors and back-off are derived from stored
// records (creation times, status times, the tasks kept as history) and returned as
// the Plan's Wake, so a new leader goes on where the old one stopped.
//
// The package has no state and does not block. Where tasks run is core/sched's
// decision, their networks are core/alloc's, and what happens on the node is the
// agent's.
package orch
