package cli

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/skep-dev/skep/core/rescue"
)

func (a *app) recoverCommand() *cobra.Command {
	var keyFile string
	c := &cobra.Command{
		Use:   "recover [DIR]",
		Short: "Explain the state of a data root and what can be done with it",
		Long: `Explain the state of a data root, ` + DefaultDataRoot + ` unless DIR names another: which node of which
swarm it is, whether it is locked, how far its log goes, who the managers are, and what can
be done, with the commands to type. Nothing is changed, and no daemon is asked.

The log of a locked manager can be read with its unlock key, from a file or, with
--unlock-key -, from standard input.`,
		Args: args(0, 1),
		RunE: func(_ *cobra.Command, given []string) error {
			dir := DefaultDataRoot
			if len(given) > 0 {
				dir = given[0]
			}
			key, err := a.readKey(keyFile)
			if err != nil {
				return err
			}
			e, err := a.Examine(dir, key)
			if err != nil {
				return err
			}
			advice := rescue.Advise(e, time.Now())
			if a.json {
				return a.printJSON(struct {
					rescue.Facts

					Advice []rescue.Advice `json:"advice"`
				}{e, advice})
			}
			return a.printRescue(&e, advice)
		},
	}
	c.Flags().StringVar(&keyFile, "unlock-key", "", "file with the unlock key of a locked manager; - reads standard input")
	return c
}

// readKey returns the first line of a file, of standard input for "-", "" for no file.
func (a *app) readKey(path string) (string, error) {
	if path == "" {
		return "", nil
	}
	in := a.In
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return "", fmt.Errorf("read unlock key: %w", err)
		}
		defer f.Close() //nolint:errcheck // only read
		in = f
	}
	line := bufio.NewScanner(in)
	if !line.Scan() {
		return "", errors.Join(errors.New("read unlock key: there is none"), line.Err())
	}
	return strings.TrimSpace(line.Text()), nil
}

func (a *app) printRescue(f *rescue.Facts, advice []rescue.Advice) error {
	rows := [][]string{{"Directory", f.Dir}, {"Daemon", map[bool]string{true: "running", false: "not running"}[f.Running]}}
	if f.InSwarm {
		rows = append(rows, nodeRows(f)...)
	} else {
		rows = append(rows, []string{"Swarm", "none"})
	}
	if f.Log != nil {
		rows = append(rows, logRows(f.Log)...)
	}
	for _, d := range f.Damage {
		rows = append(rows, []string{"Damage", d})
	}
	if err := a.table(rows[0], rows[1:]); err != nil {
		return err
	}
	a.say("\nWhat can be done:")
	for _, one := range advice {
		a.say("  - %s", one.Text)
		for _, c := range one.Commands {
			a.say("      %s", c)
		}
	}
	return nil
}

func nodeRows(f *rescue.Facts) [][]string {
	role, expiry, lock := "worker", "valid until ", "open: the key file is in the clear"
	if f.Manager {
		role = "manager"
	}
	if time.Now().After(f.NotAfter) {
		expiry = "EXPIRED on "
	}
	switch {
	case f.Opened:
		lock = "locked; the unlock key given opens it"
	case f.Locked:
		lock = fmt.Sprintf("locked, by the unlock key of version %d", f.KEKVersion)
	}
	return [][]string{
		{"Swarm", f.ClusterID},
		{"Node", fmt.Sprintf("%s, %s at %s", f.NodeID, role, f.Addr)},
		{"Certificate", expiry + f.NotAfter.UTC().Format(time.RFC3339)},
		{"Lock", lock},
	}
}

func logRows(l *rescue.Log) [][]string {
	log := fmt.Sprintf("raft member %s, term %d, committed up to %d, last entry %d", l.RaftID, l.Term, l.Commit, l.Last)
	if l.Rotating {
		log += ", moving to another key"
	}
	snapshot := "none yet"
	if l.SnapshotIndex > 0 {
		snapshot = fmt.Sprintf("at %d, term %d, from %s", l.SnapshotIndex, l.SnapshotTerm, l.SnapshotTime.UTC().Format(time.RFC3339))
	}
	rows := [][]string{{"Log", log}, {"Snapshot", snapshot}}
	for i, m := range l.Members {
		name := ""
		if i == 0 {
			name = "Managers"
		}
		row := strings.TrimSpace(fmt.Sprintf("%s at %s %s", m.NodeID, m.Addr, m.Hostname))
		if m.RaftID == l.RaftID {
			row += " (this one)"
		}
		rows = append(rows, []string{name, row})
	}
	if len(l.Members) == 0 && l.Voters > 0 {
		rows = append(rows, []string{"Managers", fmt.Sprintf("%d at the newest snapshot; who they are is sealed", l.Voters)})
	}
	if len(l.Objects) > 0 {
		var kinds []string
		for _, kind := range []string{"service", "task", "node", "network", "secret", "config"} {
			kinds = append(kinds, plural(l.Objects[kind], kind))
		}
		rows = append(rows, []string{"State", strings.Join(kinds, ", ") + " at the newest snapshot"})
	}
	return rows
}
