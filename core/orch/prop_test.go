package orch

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/skep-dev/skep/api"
)

// TestRandomStories tells stories at random. The rules of world hold at every step, and
// once nothing changes any more, decisions come to an end and the service has the tasks
// that it wants. A story that breaks a rule is printed; it can be put in testdata as it is.
func TestRandomStories(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		teller := &teller{T: t, story: newStory(t)}
		teller.broken = func(format string, args ...any) {
			t.Fatalf("%s\n%s\n%s", fmt.Sprintf(format, args...), strings.Join(teller.script, "\n"), strings.Join(teller.events, "\n"))
		}
		teller.tick = 1 // as clocks go: no two decisions are made at one instant
		teller.begin()
		for range rapid.IntRange(0, 14).Draw(t, "commands") {
			teller.next()
		}
		teller.end()
	})
}

// teller makes up a story as it goes.
type teller struct {
	*rapid.T
	*story

	script []string
	mode   string // replicated, global, job or globaljob
}

func (t *teller) tell(format string, args ...any) {
	line := fmt.Sprintf(format, args...)
	t.script = append(t.script, "> "+line)
	t.run(strings.Fields(line))
	t.events = nil
}

func (t *teller) pick(what string, from ...string) string {
	return rapid.SampledFrom(from).Draw(t.T, what)
}

// maybe adds one of some settings, or none.
func (t *teller) maybe(settings *[]string, key string, values ...string) {
	if value := t.pick(key, append([]string{""}, values...)...); value != "" {
		*settings = append(*settings, key+"="+value)
	}
}

func (t *teller) begin() {
	if limit := t.pick("limit", "0", "1", "3"); limit != "0" {
		t.tell("limit %s", limit)
	}
	t.tell("nodes %s", strings.Join([]string{"n1", "n2", "n3"}[:rapid.IntRange(1, 3).Draw(t.T, "nodes")], " "))
	if history := t.pick("history", "", "0", "1", "2"); history != "" {
		t.tell("history %s", history)
	}
	t.anImage()
	t.mode = t.pick("mode", "replicated", "global", "job", "globaljob")
	var settings []string
	switch t.mode {
	case "global", "globaljob":
		settings = append(settings, t.mode)
	default:
		settings = append(settings, t.size())
	}
	t.maybe(&settings, "fence", "true")
	t.maybe(&settings, "restart.condition", "none", "on-failure", "any")
	t.maybe(&settings, "restart.delay", "0s", "1s", "3s")
	t.maybe(&settings, "restart.attempts", "1", "2")
	t.maybe(&settings, "restart.window", "5s")
	for _, of := range []string{"update", "rollback"} {
		t.maybe(&settings, of+".order", "start-first")
		t.maybe(&settings, of+".parallelism", "0", "2")
		t.maybe(&settings, of+".delay", "2s")
		t.maybe(&settings, of+".monitor", "0s", "1s")
		t.maybe(&settings, of+".ratio", "0.4")
	}
	t.maybe(&settings, "update.action", "continue", "rollback")
	t.maybe(&settings, "rollback.action", "continue")
	t.tell("service %s", strings.Join(settings, " "))
}

// size is the number of tasks.
func (t *teller) size() string {
	n := rapid.IntRange(0, 4).Draw(t.T, "size")
	if t.mode == "job" {
		return fmt.Sprintf("job=%d/%d", n, rapid.IntRange(0, 3).Draw(t.T, "at once"))
	}
	return fmt.Sprintf("replicas=%d", n)
}

// anImage says how the containers of an image shall behave from now on.
func (t *teller) anImage() {
	how := t.pick("end", "", "fails=1s", "fails=4s", "completes=1s", "completes=3s", "rejected")
	t.tell("image %s prepare=%s stop=%s %s", t.pick("image", "a", "b"), t.pick("prepare", "1s", "4s"), t.pick("stop", "1s", "10s", "70s"), how)
}

// next tells what happens next.
func (t *teller) next() {
	commands := []string{"wait", "image", "join"}
	if len(t.nodes) > 0 {
		commands = append(commands, "node")
	}
	if t.service != nil {
		commands = append(commands, "edit", "edit", "remove")
		if t.service.GetPreviousSpec() != nil && !isJob(t.service) {
			commands = append(commands, "rollback")
		}
	}
	t.tell("wait 1ms") // no two things happen at one instant
	switch command := t.pick("command", commands...); command {
	case "wait":
		t.tell("wait %s", t.pick("time", "1s", "2s", "5s", "20s"))
	case "image":
		t.anImage()
	case "join":
		if id := t.pick("joins", "n1", "n2", "n3", "n4"); t.nodes[id] == nil {
			t.tell("nodes %s", id)
		}
	case "node":
		id := t.pick("node", slices.Sorted(maps.Keys(t.nodes))...)
		t.tell("node %s %s", id, t.pick("change", "down", "ready", "unknown", "drain", "pause", "active", "deaf", "hears", "gone", "x=1", "x=2"))
	case "edit":
		var settings []string
		t.maybe(&settings, "image", "a", "b")
		if t.mode == "replicated" || t.mode == "job" {
			settings = append(settings, t.size())
		}
		if rapid.Bool().Draw(t.T, "force") {
			settings = append(settings, "force")
		}
		t.maybe(&settings, "constraint", "node.labels.x==1", "node.labels.x!=2")
		t.maybe(&settings, "restart.attempts", "0", "1")
		t.maybe(&settings, "update.order", "start-first", "stop-first")
		t.tell("edit %s", strings.Join(settings, " "))
	case "rollback", "remove":
		t.tell("%s", command)
	}
}

// end lets all be well, or as well as can be beside nodes that stay as they are, and
// looks at what comes of it.
func (t *teller) end() {
	how := ""
	if t.mode == "job" || t.mode == "globaljob" {
		how = "completes=1s"
	}
	for _, name := range []string{"a", "b"} {
		t.tell("image %s %s", name, how)
	}
	healed := rapid.Bool().Draw(t.T, "healed")
	if healed {
		if len(t.nodes) == 0 {
			t.tell("nodes n1")
		}
		for _, id := range slices.Sorted(maps.Keys(t.nodes)) {
			t.tell("node %s ready active hears x=1", id)
		}
	}
	t.tell("wait 50h")
	for id, at := range t.nodeAt {
		if !at.IsZero() {
			t.broken("node %s wakes at %v, after all has happened", id, at.Sub(t.start))
		}
	}
	if at := t.agentsWake(); !t.wake.IsZero() || !at.IsZero() {
		t.broken("decisions at %v and actions at %v, after all has happened", t.wake.Sub(t.start), at.Sub(t.start))
	}
	if healed {
		t.checkWanted()
	}
}

// checkWanted holds a swarm at rest, all nodes of which are well, against what its
// service asks for.
func (t *teller) checkWanted() {
	if t.service == nil {
		if len(t.tasks) > 0 {
			t.broken("left by the service: %v", t.tasks)
		}
		return
	}
	k := newWork(t.view(), t.now)
	gaveUp := false // a slot may be given up: it is empty, or keeps its old task
	has := make(map[string]bool)
	for _, i := range k.tasks {
		if r := i.GetSpec().GetRestart(); r != nil && (r.GetCondition() != api.RestartPolicy_ANY || r.GetMaxAttempts() > 0) {
			gaveUp = true
		}
		switch {
		case isJob(t.service) && completedTask(i):
			has[t.place(i.Task)] = true
		case i.stopped():
		case i.live() && i.GetDesiredState() == api.TaskState_RUNNING && i.GetStatus().GetState() == api.TaskState_RUNNING && !isJob(t.service):
			if has[t.place(i.Task)] {
				t.broken("%s has two tasks, at rest", t.place(i.Task))
			}
			has[t.place(i.Task)] = true
		default:
			t.broken("at rest with %v", i.Task)
		}
	}
	if r := t.service.GetSpec().GetTask().GetRestart(); r != nil && (r.GetCondition() != api.RestartPolicy_ANY || r.GetMaxAttempts() > 0) {
		gaveUp = true
	}
	if want := t.wanted(); len(has) > want && !isJob(t.service) || len(has) < want && !gaveUp {
		t.broken("has %d tasks, wants %d", len(has), want)
	}
	switch state := t.service.GetUpdateStatus().GetState(); state {
	case api.UpdateStatus_PAUSED, api.UpdateStatus_ROLLBACK_PAUSED:
		return
	case api.UpdateStatus_UPDATING, api.UpdateStatus_ROLLBACK_STARTED:
		t.broken("the update does not end: %v", t.service.GetUpdateStatus())
	case api.UpdateStatus_UNKNOWN, api.UpdateStatus_COMPLETED, api.UpdateStatus_ROLLBACK_COMPLETED:
	}
	for _, i := range k.tasks {
		if i.live() && !i.stopped() && k.dirty(i) && !gaveUp {
			t.broken("not updated: %v", i.Task)
		}
	}
}

// wanted is the number of tasks that the service wants, on nodes that are all well.
func (t *teller) wanted() int {
	spec := t.service.GetSpec()
	if t.byNode() {
		return len(t.nodes)
	}
	return int(spec.GetReplicated().GetReplicas() + spec.GetReplicatedJob().GetTotalCompletions())
}
