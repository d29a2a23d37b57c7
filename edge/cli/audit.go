package cli

import (
	"encoding/json"
	"fmt"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/skep-dev/skep/platform/audit"
)

func (a *app) auditCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "audit",
		Short: "Show who changed what through a daemon, or check that the record of it is whole",
	}
	c.AddCommand(a.auditListCommand(), a.auditVerifyCommand())
	return c
}

func (a *app) auditListCommand() *cobra.Command {
	var tail int
	c := &cobra.Command{
		Use:   "ls",
		Short: "List the newest calls that changed something or were refused",
		Long: `List the newest calls that changed something through one daemon, or were refused by
it: the one that the command talks to. Every daemon keeps its own record.`,
		Args: args(0, 0),
		RunE: func(c *cobra.Command, _ []string) error {
			d, err := a.connect()
			if err != nil {
				return err
			}
			defer d.Close() //nolint:errcheck // only idle connections
			data, err := get(c.Context(), d, "/skep/v1/audit", url.Values{"tail": {strconv.Itoa(tail)}})
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(json.RawMessage(data))
			}
			var records []audit.Record
			if err := json.Unmarshal(data, &records); err != nil {
				return fmt.Errorf("read audit log: %w", err)
			}
			w := tabwriter.NewWriter(a.Out, 0, 8, 2, ' ', 0)
			table := []string{"SEQ\tTIME\tWHO\tROLE\tFROM\tWHAT\tOBJECT\tOUTCOME"}
			for _, r := range records {
				outcome := r.Outcome + nonEmpty(": ", r.Reason)
				if r.Status >= 400 {
					outcome = fmt.Sprintf("%s (%d)%s", r.Outcome, r.Status, nonEmpty(": ", r.Reason))
				}
				if r.Skipped > 0 {
					outcome += fmt.Sprintf("; %d before it are not told", r.Skipped)
				}
				table = append(table, fmt.Sprintf("%d\t%s\t%q\t%s\t%s\t%s\t%q\t%s", r.Seq, r.Time.Local().Format("2006-01-02 15:04:05"), r.Who, r.Role, r.From, r.What, r.Object, outcome))
			}
			if _, err := fmt.Fprintln(w, strings.Join(table, "\n")); err != nil {
				return err
			}
			return w.Flush()
		},
	}
	c.Flags().IntVar(&tail, "tail", 100, "how many")
	return c
}

func (a *app) auditVerifyCommand() *cobra.Command {
	var dataRoot, expect string
	c := &cobra.Command{
		Use:   "verify",
		Short: "Check that no record of this machine's daemon was changed or taken out",
		Long: `Check the audit log below a data root on this machine: every record must be as it was
written and follow the one before.

The command prints the head of the log, SEQ:HASH. Kept elsewhere, it proves later with
--expect that nothing up to that record was changed, replaced or cut off: the files alone
cannot tell that somebody who is root on the machine has written all of them anew.`,
		Args: args(0, 0),
		RunE: func(*cobra.Command, []string) error {
			var head *audit.Head
			if expect != "" {
				h, err := audit.ParseHead(expect)
				if err != nil {
					return fmt.Errorf("--expect: %w", err)
				}
				head = &h
			}
			report, err := audit.Verify(filepath.Join(dataRoot, "audit"), head)
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(struct {
					audit.Report
					First uint64 `json:"first"`
					Head  string `json:"head"`
				}{report, report.First.Seq, report.Last.String()})
			}
			if report.Records == 0 {
				return fmt.Errorf("there is no audit log in %s", filepath.Join(dataRoot, "audit"))
			}
			a.say("%s in %s, whole from %d to %d", plural(report.Records, "record"), plural(report.Files, "file"), report.First.Seq, report.Last.Seq)
			if report.Skipped > 0 {
				a.say("%s counted but not told", plural(int(report.Skipped), "call"))
			}
			a.say("head %s", report.Last)
			return nil
		},
	}
	c.Flags().StringVar(&dataRoot, "data-root", DefaultDataRoot, "data root of the daemon")
	c.Flags().StringVar(&expect, "expect", "", "a head, SEQ:HASH, that must be in the log")
	return c
}
