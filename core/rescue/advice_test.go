package rescue

import (
	"strings"
	"testing"
	"time"
)

// The advice names what a person can type, and never what would destroy more than is lost.
func TestAdvise(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	later, before := now.Add(time.Hour), now.Add(-time.Hour)
	three := &Log{RaftID: "1", Members: []Member{{RaftID: "1", Addr: "10.0.0.1:2377"}, {RaftID: "2", Addr: "10.0.0.2:2377"}, {RaftID: "3", Addr: "10.0.0.3:2377"}}}
	manager := Facts{Dir: "/d", InSwarm: true, Manager: true, Addr: "10.0.0.1:2377", NotAfter: later, Running: true}
	with := func(f Facts, edit func(*Facts)) Facts {
		edit(&f)
		return f
	}
	for _, tt := range []struct {
		name  string
		facts Facts
		want  []string
		never []string
	}{
		{"no swarm", Facts{Dir: "/d"}, []string{"docker swarm init", "docker swarm join", "skep backup restore"}, []string{"leave", "force-new-cluster"}},
		{"damaged", Facts{Dir: "/d", Damage: []string{"no key"}}, []string{"skep backup restore", "docker swarm leave --force"}, []string{"force-new-cluster"}},
		{
			"one of three", with(manager, func(f *Facts) { f.Log = three }),
			[]string{"2 of 3", "10.0.0.2:2377, 10.0.0.3:2377", "--force-new-cluster --advertise-addr 10.0.0.1", "backup create --stale"},
			[]string{"unlock", "skep daemon"},
		},
		{"not running", with(manager, func(f *Facts) { f.Log, f.Running = three, false }), []string{"skep daemon --data-root /d"}, nil},
		{
			"locked", with(manager, func(f *Facts) { f.Log, f.Locked = &Log{RaftID: "1", Voters: 5}, true }),
			[]string{"docker swarm unlock", "skep recover --unlock-key - /d", "3 of 5"},
			nil,
		},
		{"opened", with(manager, func(f *Facts) { f.Log, f.Locked, f.Opened = three, true, true }), []string{"docker swarm unlock"}, []string{"skep recover"}},
		{"alone", with(manager, func(f *Facts) { f.Log = &Log{RaftID: "1", Voters: 1} }), []string{"only manager"}, []string{"force-new-cluster"}},
		{
			"alone, expired", with(manager, func(f *Facts) { f.Log, f.NotAfter = &Log{RaftID: "1", Voters: 1}, before }),
			[]string{"new certificate"},
			[]string{"force-new-cluster"},
		},
		{
			"one of three, expired", with(manager, func(f *Facts) { f.Log, f.NotAfter = three, before }),
			[]string{"expired", "2 of 3", "return to it by themselves", "--force-new-cluster"},
			[]string{"never start again"},
		},
		{"no snapshot yet", with(manager, func(f *Facts) { f.Log = &Log{RaftID: "1"} }), []string{"more than half"}, nil},
		{"no log", manager, []string{"skep backup restore"}, []string{"force-new-cluster"}},
		{"worker", Facts{InSwarm: true, NotAfter: later, Running: true}, []string{"comes back by itself"}, []string{"docker", "force"}},
		{"worker, expired", Facts{InSwarm: true, NotAfter: before, Running: true}, []string{"comes back by itself", "docker swarm leave --force"}, []string{"force-new-cluster"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var all strings.Builder
			for _, a := range Advise(tt.facts, now) {
				all.WriteString(a.Text + "\n" + strings.Join(a.Commands, "\n") + "\n")
			}
			for _, w := range tt.want {
				if !strings.Contains(all.String(), w) {
					t.Errorf("no %q in\n%s", w, all.String())
				}
			}
			for _, n := range tt.never {
				if strings.Contains(all.String(), n) {
					t.Errorf("%q in\n%s", n, all.String())
				}
			}
		})
	}
}
