package shim

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/fifo"
	"github.com/containerd/log"

	"github.com/skep-dev/skep/worker/runtime/jsonlog"
)

// stream carries one task's input and output.
type stream struct {
	spec Spec
	log  *jsonlog.Writer // nil keeps no log
	done sync.WaitGroup  // the output copiers

	outputs []io.Closer // the FIFOs; closed by finish
	// endInput makes the task service let go of the input FIFO, of which it is a writer too.
	endInput func()

	mu      sync.Mutex
	clients map[*client]struct{}
	ended   bool
	stdin   io.WriteCloser // nil without input, or closed
}

// newStream makes the FIFOs of a task in its bundle and begins to copy. It returns the
// paths to hand to the task service.
func newStream(spec Spec, bundle string, terminal bool, endInput func()) (s *stream, stdin, stdout, stderr string, err error) {
	s = &stream{spec: spec, endInput: endInput, clients: map[*client]struct{}{}}
	if spec.LogPath != "" {
		if s.log, err = jsonlog.Open(jsonlog.Config{Path: spec.LogPath, MaxSize: spec.MaxSize, MaxFiles: spec.MaxFiles, Attrs: spec.LogAttrs}); err != nil {
			return nil, "", "", "", err
		}
	}
	// The FIFOs live as long as the task; closing the stream closes them.
	ctx := context.Background() //nolint:forbidigo // of the task, not of the request
	open := func(name string, flags int) (io.ReadWriteCloser, string, error) {
		path := filepath.Join(bundle, name)
		f, err := fifo.OpenFifo(ctx, path, flags|syscall.O_CREAT|syscall.O_NONBLOCK, 0o600)
		if err != nil {
			return nil, "", fmt.Errorf("open %s: %w", name, err)
		}
		return f, path, nil
	}
	var out, errs io.ReadCloser
	if out, stdout, err = open("skep-stdout", syscall.O_RDONLY); err == nil && !terminal {
		errs, stderr, err = open("skep-stderr", syscall.O_RDONLY)
	}
	if err == nil && spec.Stdin {
		s.stdin, stdin, err = open("skep-stdin", syscall.O_WRONLY)
	}
	if err != nil {
		for _, c := range []io.Closer{out, errs} {
			if c != nil {
				_ = c.Close() // the first error counts
			}
		}
		s.closeLog()
		return nil, "", "", "", err
	}
	s.outputs = append(s.outputs, out)
	s.copy(out, false)
	if errs != nil {
		s.outputs = append(s.outputs, errs)
		s.copy(errs, true)
	}
	return s, stdin, stdout, stderr, nil
}

// copy reads one output until its end.
func (s *stream) copy(from io.ReadCloser, stderr bool) {
	s.done.Go(func() {
		split := jsonlog.Splitter{Stderr: stderr}
		var entries []jsonlog.Entry
		add := func(e jsonlog.Entry) { entries = append(entries, e) }
		flush := func() {
			if s.log == nil {
				return
			}
			if err := s.log.Write(entries...); err != nil {
				log.L.WithError(err).WithField("path", s.spec.LogPath).Error("write container log")
			}
			entries = entries[:0]
		}
		buf := make([]byte, 32<<10)
		for {
			n, err := from.Read(buf)
			if n > 0 {
				if s.log != nil {
					split.Push(buf[:n], time.Now(), add)
					flush()
				}
				s.broadcast(buf[:n], stderr)
			}
			if err != nil {
				break
			}
		}
		if s.log != nil {
			split.Flush(time.Now(), add)
			flush()
		}
	})
}

// broadcast hands p to every attached client. A client that does not read holds the
// container up, as Docker's does; one that went away is forgotten.
func (s *stream) broadcast(p []byte, stderr bool) {
	s.mu.Lock()
	clients := make([]*client, 0, len(s.clients))
	for c := range s.clients {
		clients = append(clients, c)
	}
	s.mu.Unlock()
	for _, c := range clients {
		if err := c.write(p, stderr); err != nil {
			s.detach(c)
		}
	}
}

func (s *stream) attach(c *client) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return false
	}
	s.clients[c] = struct{}{}
	return true
}

func (s *stream) detach(c *client) {
	s.mu.Lock()
	delete(s.clients, c)
	s.mu.Unlock()
	c.close()
}

// input writes to the task's standard input.
func (s *stream) input(p []byte) error {
	s.mu.Lock()
	w := s.stdin
	s.mu.Unlock()
	if w == nil {
		return os.ErrClosed
	}
	_, err := w.Write(p)
	return err
}

func (s *stream) closeInput() {
	s.mu.Lock()
	w := s.stdin
	s.stdin = nil
	s.mu.Unlock()
	if w != nil {
		_ = w.Close() // the reader sees the end either way
		s.endInput()
	}
}

// finish waits until the output was copied, at most for patience, and lets every client go.
func (s *stream) finish(patience time.Duration) {
	copied := make(chan struct{})
	go func() {
		s.done.Wait()
		close(copied)
	}()
	t := time.NewTimer(patience)
	defer t.Stop()
	select {
	case <-copied:
	case <-t.C: // somebody outside the container holds its output open
	}
	for _, o := range s.outputs {
		_ = o.Close() // only read from
	}
	s.closeInput()
	s.mu.Lock()
	s.ended = true
	clients := s.clients
	s.clients = map[*client]struct{}{}
	s.mu.Unlock()
	for c := range clients {
		c.close()
	}
	s.closeLog()
}

func (s *stream) closeLog() {
	if s.log == nil {
		return
	}
	if err := s.log.Close(); err != nil {
		log.L.WithError(err).WithField("path", s.spec.LogPath).Error("close container log")
	}
}
