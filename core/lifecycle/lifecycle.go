// Package lifecycle decides how a task lives on its node: what to do next, given what the
// swarm wants and how far the task is, and what a container's end means for its task.
//
// It is pure; doing it is worker/agent's.
package lifecycle

import (
	"fmt"

	"github.com/skep-dev/skep/api"
)

// Action is what a node does next with a task.
type Action int

// The actions.
const (
	// Rest: nothing, until the desired state changes.
	Rest Action = iota
	// Accept notes that the node knows the task.
	Accept
	// BeginPrepare notes that preparing starts.
	BeginPrepare
	// Prepare pulls the image and creates the container.
	Prepare
	// BeginStart notes that starting starts.
	BeginStart
	// Start starts the container and waits until it is up, and healthy if it can tell.
	Start
	// Observe waits for the container's end.
	Observe
	// Stop stops the container.
	Stop
)

// Next is the table of a task's life on its node.
func Next(desired, state api.TaskState) Action {
	if desired >= api.TaskState_SHUTDOWN {
		if state >= api.TaskState_COMPLETE {
			return Rest
		}
		return Stop
	}
	switch state {
	case api.TaskState_NEW, api.TaskState_PENDING, api.TaskState_ASSIGNED:
		return Accept
	case api.TaskState_ACCEPTED:
		return BeginPrepare
	case api.TaskState_PREPARING:
		return Prepare
	case api.TaskState_READY:
		if desired < api.TaskState_RUNNING {
			return Rest
		}
		return BeginStart
	case api.TaskState_STARTING:
		return Start
	case api.TaskState_RUNNING:
		return Observe
	case api.TaskState_COMPLETE, api.TaskState_SHUTDOWN, api.TaskState_FAILED,
		api.TaskState_REJECTED, api.TaskState_REMOVE, api.TaskState_ORPHANED:
		return Rest
	default:
		return Rest
	}
}

// Message returns what a status says when a task enters a state.
func Message(state api.TaskState) string {
	switch state {
	case api.TaskState_ACCEPTED:
		return "accepted"
	case api.TaskState_PREPARING:
		return "preparing"
	case api.TaskState_READY:
		return "prepared"
	case api.TaskState_STARTING:
		return "starting"
	case api.TaskState_RUNNING:
		return "started"
	case api.TaskState_COMPLETE, api.TaskState_FAILED:
		return "finished"
	case api.TaskState_SHUTDOWN:
		return "shutdown"
	default:
		return ""
	}
}

// Failed returns the state of a task whose action in a state failed for good.
func Failed(state api.TaskState) api.TaskState {
	if state < api.TaskState_STARTING {
		return api.TaskState_REJECTED
	}
	return api.TaskState_FAILED
}

// Ended returns the state and error text of a task whose container ended by itself.
func Ended(exitCode int, unhealthy bool) (api.TaskState, string) {
	switch {
	case unhealthy:
		return api.TaskState_FAILED, fmt.Sprintf("task: non-zero exit (%d): dockerexec: unhealthy container", exitCode)
	case exitCode != 0:
		return api.TaskState_FAILED, fmt.Sprintf("task: non-zero exit (%d)", exitCode)
	default:
		return api.TaskState_COMPLETE, ""
	}
}

// Replaces reports whether an assignment for a known task must be acted on: it wants more
// than what is known, or describes the task differently. The desired state never sinks.
func Replaces(known, update *api.Task) bool {
	return update.GetDesiredState() >= known.GetDesiredState()
}
