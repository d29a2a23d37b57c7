package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
	"golang.org/x/term"
)

// printJSON prints a value for scripts.
func (a *app) printJSON(v any) error {
	e := json.NewEncoder(a.Out)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return fmt.Errorf("print: %w", err)
	}
	return nil
}

// jsonLine returns a value as one line of JSON; strings and maps of them always can be.
func jsonLine(v any) []byte {
	data, err := json.Marshal(v)
	if err != nil {
		return []byte(err.Error() + "\n")
	}
	return append(data, '\n')
}

// table prints rows in columns.
func (a *app) table(header []string, rows [][]string) error {
	w := tabwriter.NewWriter(a.Out, 0, 0, 3, ' ', 0)
	for _, row := range append([][]string{header}, rows...) {
		if _, err := fmt.Fprintln(w, strings.TrimRight(strings.Join(row, "\t"), "\t")); err != nil {
			return fmt.Errorf("print: %w", err)
		}
	}
	if err := w.Flush(); err != nil {
		return fmt.Errorf("print: %w", err)
	}
	return nil
}

// say prints one line for the person; scripts that asked for JSON get nothing.
func (a *app) say(format string, values ...any) {
	if !a.json {
		_, _ = fmt.Fprintf(a.Out, format+"\n", values...) // nobody to tell if the terminal is gone
	}
}

// terminalWidth returns the width of the terminal that w is, 0 if it is none.
func terminalWidth(w io.Writer) int {
	f, ok := w.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return 0
	}
	width, _, err := term.GetSize(int(f.Fd()))
	if err != nil || width < 20 {
		return 80
	}
	return width
}

// live shows lines that change: on a terminal in place, elsewhere each line when it changes.
type live struct {
	w     io.Writer
	width int      // 0 when w is no terminal
	shown []string // what stands there now
}

func (a *app) live() *live {
	if a.json {
		return &live{w: io.Discard}
	}
	return &live{w: a.Out, width: terminalWidth(a.Out)}
}

// show replaces the lines.
func (l *live) show(lines []string) {
	var b strings.Builder
	if l.width > 0 && len(l.shown) > 0 {
		fmt.Fprintf(&b, "\x1b[%dA", len(l.shown))
	}
	for i, line := range lines {
		switch {
		case l.width > 0:
			fmt.Fprintf(&b, "\x1b[2K%s\n", cut(line, l.width-1))
		case i >= len(l.shown) || l.shown[i] != line:
			fmt.Fprintln(&b, line)
		}
	}
	for i := len(lines); l.width > 0 && i < len(l.shown); i++ {
		b.WriteString("\x1b[2K\n")
		lines = append(lines, "")
	}
	l.shown = append([]string(nil), lines...)
	_, _ = io.WriteString(l.w, b.String()) // nobody to tell if the terminal is gone
}

// cut shortens s to at most n characters.
func cut(s string, n int) string {
	r := []rune(s)
	if len(r) <= n {
		return s
	}
	return string(r[:max(0, n-1)]) + "…"
}

// short returns the part of an id that people see.
func short(id string) string {
	if len(id) > 12 {
		return id[:12]
	}
	return id
}

// ago says how long something is past.
func ago(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return strings.ToLower(units.HumanDuration(time.Since(t))) + " ago"
}

// plural returns "1 thing" or "n things".
func plural(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}
