// Package sched decides which task goes on which node, and says why not on the others.
//
// State holds what is needed for that, kept up to date from store events: each node's
// free resources and tasks, and the tasks that wait. It belongs to its caller's
// goroutine. Its decisions depend only on what it was told and the time it is given;
// nothing blocks. Proposing the decisions, and telling the State what became of them
// (by the events that follow), is the caller's part.
//
// The cost of one placement does not grow with the number of nodes: tasks of one
// revision are placed as a group that looks at every node once, and a single task is
// placed by walking the nodes from the least loaded one up to the first that fits.
package sched
