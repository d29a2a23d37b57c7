// Package audit keeps a log of who called what through the interfaces of one daemon: every
// write and every refused call, with its outcome and never with its content.
//
// The log is a directory of text files with one record a line. Each record holds the hash of
// the one before, so that a record that was changed or taken out breaks the chain; files are
// replaced by newer ones, so the log is bounded. One goroutine, Run, owns the files; others
// hand it records and wait until they are written. What happens in the swarm by itself, and
// what other daemons were told, is not here.
package audit

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

const (
	// fileLimit is the size at which a file is followed by a new one; filesKept files stay.
	fileLimit = 8 << 20
	filesKept = 8
	// syncEvery is how soon a record is safe from a loss of power.
	syncEvery = time.Second
	// queueLimit bounds the records that wait; beyond it callers wait.
	queueLimit = 256
	// Refused calls are recorded at this rate, for a stranger could make any number of them
	// and push out what matters; the others are counted.
	refusalsPerSecond = 20
	refusalBurst      = 200
)

// Config says where a log is. All fields but Registerer are required.
type Config struct {
	Dir        string
	Log        *slog.Logger
	Registerer prometheus.Registerer
}

// Log is an open log. Records are accepted while Run runs.
type Log struct {
	cfg     Config
	queue   chan entry
	done    chan struct{} // closed when Run has ended
	records *prometheus.CounterVec
	lost    prometheus.Counter
	w       writer // Run's
}

type entry struct {
	record  Record
	written chan struct{}
}

// writer is the state of Run.
type writer struct {
	file    *os.File // nil before the first record and after a failure to make a file
	size    int64
	limit   int64
	head    Head
	skipped uint64
	tokens  float64
	refill  time.Time
	dirty   bool
	failing bool
}

// Open reads where the log in a directory ends, and makes the directory if there is none.
func Open(cfg Config) (*Log, error) {
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("open audit log: %w", err)
	}
	l := &Log{
		cfg: cfg, queue: make(chan entry, queueLimit), done: make(chan struct{}),
		records: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "skep_audit_records_total", Help: "Calls that were written to the audit log, by outcome.",
		}, []string{"outcome"}),
		lost: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "skep_audit_lost_total", Help: "Calls that the audit log counts but does not tell: refused ones beyond the rate that is recorded, and those that could not be written.",
		}),
		w: writer{limit: fileLimit, tokens: refusalBurst},
	}
	if cfg.Registerer != nil {
		cfg.Registerer.MustRegister(l.records, l.lost)
	}
	if err := l.resume(); err != nil {
		return nil, fmt.Errorf("open audit log: %w", err)
	}
	return l, nil
}

// Head is where the log ends. It must not be called while Run runs.
func (l *Log) Head() Head { return l.w.head }

// Dir is the log's directory.
func (l *Log) Dir() string { return l.cfg.Dir }

// resume finds the last record. What a crash left of a line is cut off; whole lines that are
// wrong stay for Verify to tell, and a new file goes on behind them.
func (l *Log) resume() error {
	files, err := list(l.cfg.Dir)
	if err != nil {
		return err
	}
	for i, path := range slices.Backward(files) {
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		whole := data[:bytes.LastIndexByte(data, '\n')+1]
		clean, found := true, false
		for text := range bytes.Lines(whole) {
			_, head, err := parse(bytes.TrimSuffix(text, []byte("\n")))
			if err != nil {
				clean = false
				continue
			}
			l.w.head, found = head, true
		}
		switch {
		case !found && len(whole) == 0: // a crash before its first record
			if err := os.Remove(path); err != nil {
				return err
			}
			files = files[:i]
			continue
		case !found:
			if err := os.Rename(path, path+".unreadable"); err != nil {
				return err
			}
			l.cfg.Log.Error("a file of the audit log is unreadable and was set aside", slog.String("path", path))
			continue
		case !clean || i != len(files)-1:
			l.cfg.Log.Error("the audit log was changed: see `skep audit verify`", slog.String("path", path))
			return nil
		}
		file, err := os.OpenFile(path, os.O_RDWR, 0o600)
		if err == nil {
			err = file.Truncate(int64(len(whole)))
		}
		if err != nil {
			return err
		}
		l.w.file, l.w.size = file, int64(len(whole))
		return nil
	}
	return nil
}

// list returns the files of a log, oldest first.
func list(dir string) ([]string, error) {
	files, err := filepath.Glob(filepath.Join(dir, "audit-*.log"))
	slices.Sort(files) // numbers have leading zeros
	return files, err
}

func fileOf(dir string, first uint64) string {
	return filepath.Join(dir, fmt.Sprintf("audit-%020d.log", first))
}

// Add writes a record and returns when it is in the log, or counted as lost. Seq, Prev and
// Skipped are filled in, Time if it is zero. After Run has ended nothing is recorded.
func (l *Log) Add(r Record) {
	if r.Time.IsZero() {
		r.Time = time.Now().UTC()
	}
	e := entry{record: r.bounded(), written: make(chan struct{})}
	select {
	case l.queue <- e:
	case <-l.done:
		return
	}
	select {
	case <-e.written:
	case <-l.done:
	}
}

// Run writes records until ctx ends, and those that wait then.
func (l *Log) Run(ctx context.Context) error {
	defer close(l.done)
	var syncNow <-chan time.Time // set while something is not synced
	for {
		select {
		case e := <-l.queue:
			l.write(e)
			if l.w.dirty && syncNow == nil {
				syncNow = time.After(syncEvery)
			}
		case <-syncNow:
			syncNow = nil
			l.sync()
		case <-ctx.Done():
			for {
				select {
				case e := <-l.queue:
					l.write(e)
					continue
				default:
				}
				l.sync()
				return l.w.close()
			}
		}
	}
}

func (w *writer) close() error {
	if w.file == nil {
		return nil
	}
	err := w.file.Close()
	w.file = nil
	return err
}

func (l *Log) sync() {
	if l.w.dirty && l.w.file != nil {
		l.w.dirty = false
		l.failed(l.w.file.Sync())
	}
}

// failed logs the first of a row of failures.
func (l *Log) failed(err error) {
	if err != nil && !l.w.failing {
		l.cfg.Log.Error("audit log is not written", slog.Any("error", err))
	}
	l.w.failing = err != nil
}

// write appends one record, or counts it.
func (l *Log) write(e entry) {
	defer close(e.written)
	if e.record.Outcome == Refused && !l.w.allow(e.record.Time) {
		l.skip()
		return
	}
	r := e.record
	r.Seq, r.Prev, r.Skipped = l.w.head.Seq+1, hex.EncodeToString(l.w.head.Hash[:]), l.w.skipped
	text, head, err := line(r)
	if err == nil {
		err = l.append(r.Seq, text)
	}
	l.failed(err)
	if err != nil {
		l.skip()
		return
	}
	l.w.head, l.w.skipped, l.w.dirty = head, 0, true
	l.records.WithLabelValues(r.Outcome).Inc()
}

func (l *Log) skip() {
	l.w.skipped++
	l.lost.Inc()
}

// allow takes a token of the bucket of refused calls.
func (w *writer) allow(now time.Time) bool {
	if !w.refill.IsZero() && now.After(w.refill) {
		w.tokens = min(refusalBurst, w.tokens+now.Sub(w.refill).Seconds()*refusalsPerSecond)
	}
	w.refill = now
	if w.tokens < 1 {
		return false
	}
	w.tokens--
	return true
}

// append writes a line behind the last good one, in a new file when the last is full.
func (l *Log) append(seq uint64, text []byte) error {
	w := &l.w
	if w.file != nil && w.size+int64(len(text)) > w.limit {
		l.sync()
		if err := w.close(); err != nil {
			return err
		}
		l.cfg.Log.Info("audit log goes on in a new file", slog.Uint64("seq", w.head.Seq), slog.String("hash", hex.EncodeToString(w.head.Hash[:])))
	}
	if w.file == nil {
		file, err := os.OpenFile(fileOf(l.cfg.Dir, seq), os.O_CREATE|os.O_RDWR|os.O_TRUNC, 0o600)
		if err != nil {
			return err
		}
		w.file, w.size = file, 0
		if err := l.prune(); err != nil {
			return err
		}
	}
	n, err := w.file.WriteAt(text, w.size)
	if err != nil {
		return err
	}
	w.size += int64(n)
	return nil
}

// prune removes the oldest files.
func (l *Log) prune() error {
	files, err := list(l.cfg.Dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, path := range files[:max(0, len(files)-filesKept)] {
		errs = append(errs, os.Remove(path))
	}
	return errors.Join(errs...)
}

// String is the head as people keep it: SEQ:HASH.
func (h Head) String() string { return fmt.Sprintf("%d:%x", h.Seq, h.Hash) }

// ParseHead reads what String wrote.
func ParseHead(text string) (Head, error) {
	var h Head
	seq, hash, ok := strings.Cut(text, ":")
	n, err := strconv.ParseUint(seq, 10, 64)
	if !ok || err != nil {
		return Head{}, fmt.Errorf("%q is not SEQ:HASH", text)
	}
	h.Seq = n
	raw, err := hex.DecodeString(hash)
	if err != nil || len(raw) != len(h.Hash) {
		return Head{}, fmt.Errorf("%q is not SEQ:HASH", text)
	}
	copy(h.Hash[:], raw)
	return h, nil
}
