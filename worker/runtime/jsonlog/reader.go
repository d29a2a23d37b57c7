package jsonlog

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// poll is how often a following reader looks for more; files need no watch that could overflow.
const poll = 50 * time.Millisecond

// maxEncoded bounds one encoded line: every byte may take six characters.
const maxEncoded = 6*MaxLine + MaxAttrs + 256

// Options selects what Read returns.
type Options struct {
	// Tail is the number of last entries to begin with; negative means all.
	Tail         int
	Since, Until time.Time
	// Follow is closed when nothing more will be written; nil means not to follow.
	Follow <-chan struct{}
}

// Read calls each with the entries of the log at path, oldest first, across rotated
// files. With Follow it goes on until that closes and everything was read, or ctx ends.
// Lines that cannot be read, such as the one a power cut left half written, are skipped.
func Read(ctx context.Context, path string, opts Options, each func(Entry) error) error {
	r := &reader{ctx: ctx, path: path, opts: opts, each: each}
	err := r.read()
	if errors.Is(err, errUntil) {
		return nil
	}
	return err
}

var errUntil = errors.New("end of the wanted time")

type reader struct {
	ctx  context.Context //nolint:containedctx // lives for one call
	path string
	opts Options
	each func(Entry) error
}

func (r *reader) read() error {
	files, err := r.open()
	if err != nil {
		return err
	}
	defer func() { closeAll(files) }()
	skip := 0
	if r.opts.Tail >= 0 {
		if skip, err = r.countBefore(files); err != nil {
			return err
		}
	}
	var last *tailFile
	for i, f := range files {
		t := &tailFile{file: f, buf: bufio.NewReaderSize(f, 64<<10)}
		if err := r.drain(t, &skip); err != nil {
			return err
		}
		if i == len(files)-1 {
			last = t
		}
	}
	if r.opts.Follow == nil {
		return nil
	}
	return r.follow(last, func(f *os.File) { files = append(files, f) })
}

// settleTime is how long a rotation may take; longer, its gaps are what a crash left.
const settleTime = 200 * time.Millisecond

// open opens every file of the log, oldest first. While a rotation is going on names are
// missing or change hands; then everything is opened anew.
func (r *reader) open() ([]*os.File, error) {
	for deadline := time.Now().Add(settleTime); ; time.Sleep(time.Millisecond) {
		files, settled, err := r.openOnce()
		if err != nil || settled || time.Now().After(deadline) {
			return files, err
		}
		closeAll(files)
	}
}

func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close() // only read from
	}
}

// openOnce reports whether what it opened is the whole log as it was at one moment.
func (r *reader) openOnce() (files []*os.File, settled bool, err error) {
	numbers, err := r.numbers()
	if err != nil {
		return nil, false, err
	}
	settled = true
	var seen []os.FileInfo
	for _, n := range numbers {
		f, err := os.Open(numbered(r.path, n))
		if errors.Is(err, fs.ErrNotExist) {
			settled = false
			continue
		}
		if err == nil {
			var info os.FileInfo
			if info, err = f.Stat(); err == nil && slices.ContainsFunc(seen, func(s os.FileInfo) bool { return os.SameFile(s, info) }) {
				settled = false
				_ = f.Close() // only read from
				continue
			}
			seen = append(seen, info)
			files = append(files, f)
		}
		if err != nil {
			closeAll(files)
			return nil, false, fmt.Errorf("open log: %w", err)
		}
	}
	for i, n := range numbers {
		now, err := os.Stat(numbered(r.path, n))
		if n != len(numbers)-1-i || !settled || err != nil || !os.SameFile(now, seen[i]) {
			return files, false, nil //nolint:nilerr // renamed meanwhile
		}
	}
	return files, true, nil
}

// numbers lists the numbers of the log's files, the oldest file's first.
func (r *reader) numbers() ([]int, error) {
	entries, err := os.ReadDir(filepath.Dir(r.path))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list log files: %w", err)
	}
	var out []int
	for _, e := range entries {
		rest, ok := strings.CutPrefix(e.Name(), filepath.Base(r.path))
		if ok && rest == "" {
			out = append(out, 0)
			continue
		}
		text, dotted := strings.CutPrefix(rest, ".")
		if n, err := strconv.Atoi(text); ok && dotted && err == nil && n > 0 {
			out = append(out, n)
		}
	}
	slices.SortFunc(out, func(a, b int) int { return b - a })
	return out, nil
}

// countBefore returns how many entries come before the last Tail ones.
func (r *reader) countBefore(files []*os.File) (int, error) {
	n := 0
	chunk := make([]byte, 64<<10)
	for _, f := range files {
		for {
			k, err := f.Read(chunk)
			n += bytes.Count(chunk[:k], []byte{'\n'})
			if err == io.EOF {
				break
			}
			if err != nil {
				return 0, fmt.Errorf("read log: %w", err)
			}
		}
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return 0, fmt.Errorf("read log: %w", err)
		}
	}
	return max(0, n-r.opts.Tail), nil
}

// tailFile is one file being read; partial keeps a line whose end is not there yet.
type tailFile struct {
	file    *os.File
	buf     *bufio.Reader
	partial []byte
}

// drain reads to the end of what is there now.
func (r *reader) drain(t *tailFile, skip *int) error {
	for {
		if err := r.ctx.Err(); err != nil {
			return err
		}
		line, err := t.buf.ReadSlice('\n')
		switch {
		case errors.Is(err, bufio.ErrBufferFull), err == io.EOF:
			if len(t.partial)+len(line) <= maxEncoded {
				t.partial = append(t.partial, line...)
			}
			if err == io.EOF {
				return nil
			}
			continue
		case err != nil:
			return fmt.Errorf("read log: %w", err)
		}
		if len(t.partial) > 0 {
			line = append(t.partial, line...)
			t.partial = nil
		}
		if *skip > 0 {
			*skip--
			continue
		}
		if err := r.line(line); err != nil {
			return err
		}
	}
}

func (r *reader) line(line []byte) error {
	e, err := Parse(line)
	if err != nil {
		return nil //nolint:nilerr // documented: unreadable lines are skipped
	}
	if e.Time.Before(r.opts.Since) {
		return nil
	}
	if !r.opts.Until.IsZero() && e.Time.After(r.opts.Until) {
		return errUntil
	}
	return r.each(e)
}

func (r *reader) follow(t *tailFile, opened func(*os.File)) error {
	skip := 0
	tick := time.NewTicker(poll)
	defer tick.Stop()
	for ended := false; ; {
		for t == nil || r.rotated(t) {
			next, err := r.next(t)
			if err != nil {
				return err
			}
			if next == nil {
				break
			}
			opened(next)
			if t != nil { // what was written before the rotation
				if err := r.drain(t, &skip); err != nil {
					return err
				}
			}
			t = &tailFile{file: next, buf: bufio.NewReaderSize(next, 64<<10)}
		}
		if t != nil {
			if err := r.drain(t, &skip); err != nil {
				return err
			}
		}
		if ended && (t == nil || !r.rotated(t)) {
			return nil
		}
		select {
		case <-tick.C:
			if !r.opts.Until.IsZero() && time.Now().After(r.opts.Until) {
				return nil
			}
		case <-r.opts.Follow:
			ended = true
		case <-r.ctx.Done():
			return r.ctx.Err()
		}
	}
}

// rotated reports whether path is another file by now.
func (r *reader) rotated(t *tailFile) bool {
	_, err := os.Stat(r.path)
	return err == nil && !t.is(r.path) // else in the middle of a rotation, or removed
}

// next opens the file that follows t, the oldest if t was dropped since. It returns
// nil when there is none yet.
func (r *reader) next(t *tailFile) (*os.File, error) {
	for t != nil {
		n, err := r.number(t)
		if err != nil {
			return nil, err
		}
		if n < 0 {
			break
		}
		if n == 0 {
			return nil, nil
		}
		// A rotation moves older files first: as long as t keeps its number, the one
		// below belongs to its successor.
		f, err := os.Open(numbered(r.path, n-1))
		if !t.is(numbered(r.path, n)) {
			if err == nil {
				_ = f.Close() // of another time
			}
			continue
		}
		if errors.Is(err, fs.ErrNotExist) { // in the middle of a rotation
			return nil, nil
		}
		if err != nil {
			return nil, fmt.Errorf("open log: %w", err)
		}
		return f, nil
	}
	files, err := r.open()
	if err != nil || len(files) == 0 {
		return nil, err
	}
	closeAll(files[1:])
	return files[0], nil
}

// number finds the number that t has now, -1 if it was dropped. Numbers only grow, so
// looking upward cannot miss it.
func (r *reader) number(t *tailFile) (int, error) {
	numbers, err := r.numbers()
	if err != nil || len(numbers) == 0 {
		return -1, err
	}
	for n := range numbers[0] + 2 {
		if t.is(numbered(r.path, n)) {
			return n, nil
		}
	}
	return -1, nil
}

// is reports whether path is t's file.
func (t *tailFile) is(path string) bool {
	now, err := os.Stat(path)
	if err != nil {
		return false
	}
	have, err := t.file.Stat()
	return err == nil && os.SameFile(now, have)
}
