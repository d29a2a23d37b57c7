package lifecycle

import (
	"maps"
	"slices"
	"testing"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
)

func states() []api.TaskState {
	var out []api.TaskState
	for _, v := range slices.Sorted(maps.Keys(api.TaskState_name)) {
		out = append(out, api.TaskState(v))
	}
	return out
}

// TestNext is the whole table: what a node does in each observed state, for each wish.
func TestNext(t *testing.T) {
	live := map[api.TaskState]Action{
		api.TaskState_NEW: Accept, api.TaskState_PENDING: Accept, api.TaskState_ASSIGNED: Accept,
		api.TaskState_ACCEPTED: BeginPrepare, api.TaskState_PREPARING: Prepare, api.TaskState_READY: BeginStart,
		api.TaskState_STARTING: Start, api.TaskState_RUNNING: Observe,
	}
	for _, desired := range states() {
		for _, state := range states() {
			want := live[state] // the zero value is Rest, for every end
			switch {
			case desired >= api.TaskState_SHUTDOWN && state < api.TaskState_COMPLETE:
				want = Stop
			case desired >= api.TaskState_SHUTDOWN:
				want = Rest
			case state == api.TaskState_READY && desired < api.TaskState_RUNNING:
				want = Rest // held back until it is wanted
			}
			if got := Next(desired, state); got != want {
				t.Errorf("wanted %s, is %s: action %d, want %d", desired, state, got, want)
			}
		}
	}
}

// TestLifeEnds follows actions to their states: every life ends or rests where it is
// wanted, in a bounded number of steps, and each step is one that the table of
// transitions allows the agent.
func TestLifeEnds(t *testing.T) {
	allowed := make(map[[2]api.TaskState]bool)
	for _, tr := range model.Transitions() {
		if tr.By == model.Agent {
			allowed[[2]api.TaskState{tr.From, tr.To}] = true
		}
	}
	success := map[Action]api.TaskState{
		Accept: api.TaskState_ACCEPTED, BeginPrepare: api.TaskState_PREPARING, Prepare: api.TaskState_READY,
		BeginStart: api.TaskState_STARTING, Start: api.TaskState_RUNNING, Stop: api.TaskState_SHUTDOWN,
	}
	for _, desired := range states() {
		for _, code := range []int{0, 1} {
			state := api.TaskState_ASSIGNED
			for step := 0; ; step++ {
				if step > len(success) {
					t.Fatalf("wanted %s: still busy in %s", desired, state)
				}
				action := Next(desired, state)
				if action == Rest {
					break
				}
				next, ok := success[action]
				if action == Observe {
					next, _ = Ended(code, false)
				} else if !ok {
					t.Fatalf("what is action %d?", action)
				}
				if !allowed[[2]api.TaskState{state, next}] {
					t.Errorf("wanted %s: the agent may not go from %s to %s", desired, state, next)
				}
				if failed := Failed(state); action != Stop && !allowed[[2]api.TaskState{state, failed}] {
					t.Errorf("wanted %s: the agent may not fail from %s to %s", desired, state, failed)
				}
				state = next
			}
			want := map[int]api.TaskState{0: api.TaskState_COMPLETE, 1: api.TaskState_FAILED}[code]
			switch {
			case desired >= api.TaskState_SHUTDOWN:
				want = api.TaskState_SHUTDOWN
			case desired < api.TaskState_RUNNING:
				want = api.TaskState_READY
			}
			if state != want {
				t.Errorf("wanted %s, exit code %d: rests in %s, want %s", desired, code, state, want)
			}
		}
	}
}

func TestFailed(t *testing.T) {
	for state, want := range map[api.TaskState]api.TaskState{
		api.TaskState_ASSIGNED: api.TaskState_REJECTED, api.TaskState_PREPARING: api.TaskState_REJECTED, api.TaskState_READY: api.TaskState_REJECTED,
		api.TaskState_STARTING: api.TaskState_FAILED, api.TaskState_RUNNING: api.TaskState_FAILED,
	} {
		if got := Failed(state); got != want {
			t.Errorf("failed in %s: %s, want %s", state, got, want)
		}
	}
}

// TestEnded has the texts that users look for.
func TestEnded(t *testing.T) {
	for _, c := range []struct {
		code      int
		unhealthy bool
		state     api.TaskState
		text      string
	}{
		{0, false, api.TaskState_COMPLETE, ""},
		{3, false, api.TaskState_FAILED, "task: non-zero exit (3)"},
		{137, false, api.TaskState_FAILED, "task: non-zero exit (137)"},
		{137, true, api.TaskState_FAILED, "task: non-zero exit (137): dockerexec: unhealthy container"},
		{0, true, api.TaskState_FAILED, "task: non-zero exit (0): dockerexec: unhealthy container"},
	} {
		if state, text := Ended(c.code, c.unhealthy); state != c.state || text != c.text {
			t.Errorf("exit %d, unhealthy %v: %s %q", c.code, c.unhealthy, state, text)
		}
	}
}

func TestMessages(t *testing.T) {
	for state, want := range map[api.TaskState]string{
		api.TaskState_ACCEPTED: "accepted", api.TaskState_PREPARING: "preparing", api.TaskState_READY: "prepared",
		api.TaskState_STARTING: "starting", api.TaskState_RUNNING: "started", api.TaskState_COMPLETE: "finished",
		api.TaskState_FAILED: "finished", api.TaskState_SHUTDOWN: "shutdown", api.TaskState_NEW: "",
	} {
		if got := Message(state); got != want {
			t.Errorf("%s: %q, want %q", state, got, want)
		}
	}
}

func TestReplaces(t *testing.T) {
	task := func(desired api.TaskState) *api.Task { return &api.Task{DesiredState: desired} }
	for _, known := range states() {
		for _, update := range states() {
			if got := Replaces(task(known), task(update)); got != (update >= known) {
				t.Errorf("%s replaced by %s: %v", known, update, got)
			}
		}
	}
}
