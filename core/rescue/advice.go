package rescue

import (
	"fmt"
	"strings"
	"time"
)

// Advice is one thing that can be done.
type Advice struct {
	Text     string   `json:"text"`
	Commands []string `json:"commands,omitempty"`
}

// Advise says what can be done with a node, in the order to try it.
func Advise(f Facts, now time.Time) []Advice {
	switch {
	case !f.InSwarm && len(f.Damage) > 0:
		return []Advice{
			{Text: "what the swarm's state needs is missing or damaged: put it back from a copy of the disk, or go on from a backup", Commands: []string{"skep backup restore -i KEY FILE"}},
			{Text: "give the node up and let it join again", Commands: []string{"docker swarm leave --force", "docker swarm join --token TOKEN MANAGER:2377"}},
		}
	case !f.InSwarm:
		return []Advice{{
			Text:     "this node is in no swarm: begin one, join one, or go on from a backup",
			Commands: []string{"docker swarm init", "docker swarm join --token TOKEN MANAGER:2377", "skep backup restore -i KEY FILE"},
		}}
	}
	var list []Advice
	if !f.Running {
		list = append(list, Advice{Text: "start the daemon on this directory", Commands: []string{"skep daemon --data-root " + f.Dir}})
	}
	if f.Locked {
		list = append(list, Advice{
			Text:     "unlock it; the key is the one of when this node last ran, so a key that was rotated since does not open it",
			Commands: []string{"docker swarm unlock"},
		})
		if !f.Opened {
			list = append(list, Advice{
				Text:     "see the managers and the state behind the lock",
				Commands: []string{"skep recover --unlock-key - " + f.Dir},
			})
		}
	}
	if !f.Manager {
		return append(list, worker(f, now)...)
	}
	return append(list, manager(f, now)...)
}

func worker(f Facts, now time.Time) []Advice {
	if now.After(f.NotAfter) {
		return []Advice{{
			Text:     "its certificate has expired: it comes back by itself when a manager that it knows does, unless docker info says that the swarm does not take it back; then let it leave and join again",
			Commands: []string{"docker swarm leave --force", "docker swarm join --token TOKEN MANAGER:2377"},
		}}
	}
	return []Advice{{Text: "a worker holds nothing of the swarm's state: it comes back by itself when a manager that it knows does"}}
}

func manager(f Facts, now time.Time) []Advice {
	force := Advice{
		Text:     "continue with this node alone, if the other managers are lost for good: it keeps what it had committed, and they must never start again with their old state",
		Commands: []string{"docker swarm init --force-new-cluster --advertise-addr " + host(f.Addr)},
	}
	if f.Log == nil {
		return []Advice{{
			Text:     "it has no log yet, so another manager must give it one; if there is none, let it leave, and go on from a backup",
			Commands: []string{"docker swarm leave --force", "skep backup restore -i KEY FILE"},
		}}
	}
	backup := Advice{Text: "keep a copy first, also without a quorum", Commands: []string{"skep backup create --stale -r RECIPIENT -o swarm.backup"}}
	if now.After(f.NotAfter) {
		force.Text = "its certificate has expired: a manager with a valid one gives it a new one; if there is none, continue with the node of the highest commit alone: the others return to it by themselves and become managers again"
	}
	n := f.Log.Managers()
	switch {
	case n == 1:
		text := "it is the only manager: it leads as soon as it runs"
		if now.After(f.NotAfter) {
			text += ", and makes itself a new certificate"
		}
		return []Advice{{Text: text}}
	case n > 1:
		text := fmt.Sprintf("start the other managers: the swarm works when %d of %d run and reach each other", n/2+1, n)
		if others := addresses(f.Log); len(others) > 0 {
			text += ", the others being at " + strings.Join(others, ", ")
		}
		return []Advice{{Text: text}, backup, force}
	default:
		return []Advice{{Text: "start the other managers: the swarm works when more than half of them run and reach each other"}, backup, force}
	}
}

// addresses are where the other managers are.
func addresses(l *Log) []string {
	var list []string
	for _, m := range l.Members {
		if m.RaftID != l.RaftID {
			list = append(list, m.Addr)
		}
	}
	return list
}

func host(addr string) string {
	if i := strings.LastIndexByte(addr, ':'); i > 0 {
		return addr[:i]
	}
	return "ADDRESS"
}
