package audit

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/skep-dev/skep/core/model"
)

// Report is what Verify found.
type Report struct {
	Files   int  `json:"files"`
	Records int  `json:"records"`
	First   Head `json:"-"`
	Last    Head `json:"-"`
	// Skipped are calls that the records count but do not tell.
	Skipped uint64 `json:"skipped"`
}

// Verify reads a whole log and checks that every record is as it was written and none is
// missing between the first and the last. A log that begins later than with the first record
// is whole: its older files were replaced. What was cut off at the end can be told only by
// who knows a record that was there: expect, if it is not nil, must be in the log.
func Verify(dir string, expect *Head) (Report, error) {
	var report Report
	files, err := list(dir)
	if err != nil {
		return report, fmt.Errorf("verify audit log: %w", err)
	}
	met := expect == nil
	for _, path := range files {
		report.Files++
		if err := verifyFile(path, &report, func(h Head) { met = met || h == *expect }); err != nil {
			return report, err
		}
	}
	unreadable, err := filepath.Glob(filepath.Join(dir, "*.unreadable"))
	switch {
	case err != nil:
		return report, err
	case len(unreadable) > 0:
		return report, model.Errorf(model.Invalid, "%s was set aside because no record of it could be read", unreadable[0])
	case !met && expect.Seq < report.First.Seq:
		return report, model.Errorf(model.Invalid, "record %d is older than this log, which begins with %d: its file was replaced", expect.Seq, report.First.Seq)
	case !met:
		return report, model.Errorf(model.Invalid, "record %s is not in this log: it was changed, or its end was cut off", expect)
	}
	return report, nil
}

func verifyFile(path string, report *Report, met func(Head)) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("verify audit log: %w", err)
	}
	number := 0
	for text := range bytes.Lines(data) {
		number++
		broken := func(format string, args ...any) error {
			return model.Errorf(model.Invalid, "%s, line %d: %s", path, number, fmt.Sprintf(format, args...))
		}
		body, whole := bytes.CutSuffix(text, []byte("\n"))
		if !whole {
			return broken("its end is missing: it is being written, or was cut off")
		}
		r, head, err := parse(body)
		switch {
		case err != nil:
			return broken("%v", err)
		case number == 1 && path != fileOf(filepath.Dir(path), r.Seq):
			return broken("the file begins with record %d, which is not in its name", r.Seq)
		case report.Records == 0:
			if zeros := hex.EncodeToString(make([]byte, len(head.Hash))); r.Seq == 1 && r.Prev != zeros {
				return broken("record 1 claims to follow another")
			}
			report.First = head
		case r.Seq != report.Last.Seq+1:
			return broken("record %d follows record %d: what was between them is missing", r.Seq, report.Last.Seq)
		case r.Prev != hex.EncodeToString(report.Last.Hash[:]):
			return broken("it does not follow record %d as that is now: one of the two was replaced", report.Last.Seq)
		}
		report.Records++
		report.Skipped += r.Skipped
		report.Last = head
		met(head)
	}
	return nil
}

// Read returns the newest n records, oldest first. Lines that cannot be read are left out.
func Read(dir string, n int) ([]Record, error) {
	files, err := list(dir)
	if err != nil {
		return nil, fmt.Errorf("read audit log: %w", err)
	}
	var newest []Record // newest first
	for _, path := range slices.Backward(files) {
		if len(newest) >= n {
			break
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return nil, fmt.Errorf("read audit log: %w", err)
		}
		lines := bytes.Split(bytes.TrimSuffix(data, []byte("\n")), []byte("\n"))
		for _, text := range slices.Backward(lines) {
			if len(newest) >= n {
				break
			}
			if r, _, err := parse(text); err == nil {
				newest = append(newest, r)
			}
		}
	}
	slices.Reverse(newest)
	return newest, nil
}
