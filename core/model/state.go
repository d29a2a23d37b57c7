package model

import (
	"strings"

	"github.com/skep-dev/skep/api"
)

// Terminal reports whether a task in this state will never run again.
func Terminal(s api.TaskState) bool { return s > api.TaskState_RUNNING }

// StateName returns the name of a task state as Docker's API spells it: "running".
func StateName(s api.TaskState) string { return strings.ToLower(s.String()) }

// Actor is a component that may move a task from state to state.
type Actor int

// The actors.
const (
	Orchestrator Actor = iota
	Allocator
	Scheduler
	Agent
	Enforcer
	Dispatcher
)

// Transition is one allowed move of a task's observed state.
type Transition struct {
	From, To api.TaskState
	By       Actor
}

// Transitions returns the table of all allowed moves of the observed state. The
// observed state never decreases. Forward moves by the agent may skip states: a
// leader sees only what was committed.
func Transitions() []Transition {
	const (
		created   = api.TaskState_NEW
		pending   = api.TaskState_PENDING
		assigned  = api.TaskState_ASSIGNED
		running   = api.TaskState_RUNNING
		shutdown  = api.TaskState_SHUTDOWN
		failed    = api.TaskState_FAILED
		rejected  = api.TaskState_REJECTED
		orphaned  = api.TaskState_ORPHANED
		completed = api.TaskState_COMPLETE
	)
	table := []Transition{
		{created, pending, Allocator},
		{pending, assigned, Scheduler},
		{pending, shutdown, Scheduler},
	}
	live := []api.TaskState{
		assigned, api.TaskState_ACCEPTED, api.TaskState_PREPARING, api.TaskState_READY,
		api.TaskState_STARTING, running,
	}
	for i, from := range live {
		for _, to := range live[i+1:] {
			table = append(table, Transition{from, to, Agent})
		}
		for _, to := range []api.TaskState{completed, shutdown, failed, rejected} {
			table = append(table, Transition{from, to, Agent})
		}
		table = append(table, Transition{from, rejected, Enforcer}, Transition{from, orphaned, Dispatcher})
	}
	return table
}
