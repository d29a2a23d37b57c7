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
	"time"
)

// poll is how often a following reader looks for more; files need no watch that could overflow.
const poll = 50 * time.Millisecond

// maxEncoded bounds one encoded line: every byte may take six characters.
const maxEncoded = 6*MaxLine + 256

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
	defer func() {
		for _, f := range files {
			_ = f.Close() // only read from
		}
	}()
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

// open opens every file of the log, oldest first. A rotation in between is noticed by
// finding the same file twice, and then everything is opened anew.
func (r *reader) open() ([]*os.File, error) {
	for {
		var files []*os.File
		for i := 0; ; i++ {
			f, err := os.Open(numbered(r.path, i))
			if errors.Is(err, fs.ErrNotExist) {
				break
			}
			if err != nil {
				return nil, fmt.Errorf("open log: %w", err)
			}
			files = append([]*os.File{f}, files...)
		}
		if !repeats(files) {
			return files, nil
		}
		for _, f := range files {
			_ = f.Close() // only read from
		}
	}
}

func repeats(files []*os.File) bool {
	var seen []os.FileInfo
	for _, f := range files {
		info, err := f.Stat()
		if err != nil {
			return false
		}
		for _, s := range seen {
			if os.SameFile(s, info) {
				return true
			}
		}
		seen = append(seen, info)
	}
	return false
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
	now, err := os.Stat(r.path)
	if err != nil {
		return false // in the middle of a rotation, or removed
	}
	have, err := t.file.Stat()
	return err == nil && !os.SameFile(now, have)
}

// next opens the file that follows t, the oldest if t was dropped since. It returns
// nil when there is none yet.
func (r *reader) next(t *tailFile) (*os.File, error) {
	successor := 0
	for i := 1; t != nil; i++ {
		now, err := os.Stat(numbered(r.path, i))
		if err != nil {
			break
		}
		successor = i
		if have, err := t.file.Stat(); err == nil && os.SameFile(now, have) {
			successor = i - 1
			break
		}
	}
	f, err := os.Open(numbered(r.path, successor))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	return f, nil
}
