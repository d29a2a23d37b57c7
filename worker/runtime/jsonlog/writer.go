package jsonlog

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"sync"
	"time"
)

// Defaults of a log's bounds.
const (
	DefaultMaxSize  = 10 << 20
	DefaultMaxFiles = 3
)

// Config describes one log.
type Config struct {
	Path string
	// MaxSize is the bytes after which a new file begins; zero is DefaultMaxSize,
	// negative unbounded.
	MaxSize int64
	// MaxFiles is how many files are kept, the current one included; zero is DefaultMaxFiles.
	MaxFiles int
	// Attrs is written beside every entry.
	Attrs map[string]string
}

// Writer appends to a log.
type Writer struct {
	cfg   Config
	attrs []byte // encoded

	mu     sync.Mutex
	file   *os.File // nil when closed, or when a rotation failed
	size   int64
	buf    []byte
	closed bool
}

// Open opens a log for appending, creating it if need be.
func Open(cfg Config) (*Writer, error) {
	if cfg.MaxSize == 0 {
		cfg.MaxSize = DefaultMaxSize
	}
	if cfg.MaxFiles <= 0 {
		cfg.MaxFiles = DefaultMaxFiles
	}
	w := &Writer{cfg: cfg, attrs: appendAttrs(nil, cfg.Attrs)}
	return w, w.open()
}

func (w *Writer) open() error {
	f, err := os.OpenFile(w.cfg.Path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o640)
	if err != nil {
		return fmt.Errorf("open log: %w", err)
	}
	info, err := f.Stat()
	if err != nil {
		_ = f.Close() // the error of Stat counts
		return fmt.Errorf("open log: %w", err)
	}
	w.file, w.size = f, info.Size()
	return nil
}

// Write appends entries, those that go to one file in one write. Their attributes are the
// log's, not their own.
func (w *Writer) Write(entries ...Entry) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.buf = w.buf[:0]
	for _, e := range entries {
		before := len(w.buf)
		w.buf = appendEntry(w.buf, e, w.attrs)
		if full := w.size+int64(len(w.buf)) > w.cfg.MaxSize; w.cfg.MaxSize < 0 || !full {
			continue
		}
		if err := w.flush(before); err != nil {
			return err
		}
		if w.size == 0 {
			continue // one entry larger than a file
		}
		if err := w.rotate(); err != nil {
			return err
		}
	}
	err := w.flush(len(w.buf))
	if cap(w.buf) > 1<<20 {
		w.buf = nil
	}
	return err
}

// flush writes the first n bytes of the buffer. What does not fit on the disk is lost, but
// leaves no half of a line for the next to continue.
func (w *Writer) flush(n int) error {
	if n == 0 {
		return nil
	}
	if w.closed {
		return os.ErrClosed
	}
	if w.file == nil { // a rotation went wrong half-way
		if err := w.open(); err != nil {
			return err
		}
	}
	k, err := w.file.Write(w.buf[:n])
	w.buf = append(w.buf[:0], w.buf[n:]...)
	if err == nil {
		w.size += int64(k)
		return nil
	}
	if k > 0 {
		err = errors.Join(err, w.file.Truncate(w.size))
	}
	return fmt.Errorf("write log: %w", err)
}

// rotate shifts path.1 to path.2 and so on, drops the oldest file and begins a new one.
func (w *Writer) rotate() error {
	if err := w.file.Close(); err != nil {
		return fmt.Errorf("rotate log: %w", err)
	}
	w.file = nil
	if w.cfg.MaxFiles == 1 {
		if err := os.Remove(w.cfg.Path); err != nil {
			return fmt.Errorf("rotate log: %w", err)
		}
		return w.open()
	}
	for i := w.cfg.MaxFiles - 1; i > 0; i-- {
		err := os.Rename(numbered(w.cfg.Path, i-1), numbered(w.cfg.Path, i))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("rotate log: %w", err)
		}
	}
	return w.open()
}

func numbered(path string, i int) string {
	if i == 0 {
		return path
	}
	return path + "." + strconv.Itoa(i)
}

// Close closes the log; later writes fail.
func (w *Writer) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
	if w.file == nil {
		return nil
	}
	err := w.file.Close()
	w.file = nil
	return err
}

// Splitter cuts a stream of bytes into entries at newlines and at MaxLine. It belongs to
// one stream of one container.
type Splitter struct {
	Stderr bool
	rest   []byte
}

// Push takes p, as read at time now, and calls write with the entries it completes.
// What has no newline yet stays until more comes or Flush. An entry's data may be part of
// p: it is valid as long as p does not change.
func (s *Splitter) Push(p []byte, now time.Time, write func(Entry)) {
	for len(p) > 0 {
		i := bytes.IndexByte(p, '\n') + 1
		line := p
		if i > 0 {
			line = p[:i]
		}
		if room := MaxLine - len(s.rest); len(line) > room {
			line, i = line[:room], room
		}
		p = p[len(line):]
		if i == 0 && len(s.rest)+len(line) < MaxLine {
			s.rest = append(s.rest, line...)
			return
		}
		if len(s.rest) > 0 {
			line = append(s.rest, line...)
			s.rest = nil // it is the entry's now
		}
		write(Entry{Time: now, Stderr: s.Stderr, Data: line})
	}
}

// Flush writes what is left without a newline.
func (s *Splitter) Flush(now time.Time, write func(Entry)) {
	if len(s.rest) > 0 {
		write(Entry{Time: now, Stderr: s.Stderr, Data: s.rest})
		s.rest = nil
	}
}
