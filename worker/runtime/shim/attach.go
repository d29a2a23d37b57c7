package shim

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"time"
)

// The stream protocol: a client connects to the group's socket, writes the task's id and
// a newline and reads "ok\n" or "no\n". From then on both sides send frames of a kind
// (one byte), three zero bytes, a big-endian length and so many bytes.
const (
	frameStdin  = 0 // to the shim; of length zero it closes the input
	frameStdout = 1
	frameStderr = 2
	maxFrame    = 1 << 20
	headerSize  = 8
)

// client is one attached connection.
type client struct {
	mu   sync.Mutex // makes frames whole
	conn net.Conn
}

func (c *client) write(p []byte, stderr bool) error {
	kind := byte(frameStdout)
	if stderr {
		kind = frameStderr
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return writeFrame(c.conn, kind, p)
}

func (c *client) close() { _ = c.conn.Close() } // nothing is buffered

func writeFrame(w io.Writer, kind byte, p []byte) error {
	b := make([]byte, headerSize, headerSize+len(p))
	b[0] = kind
	binary.BigEndian.PutUint32(b[4:], uint32(len(p)))
	_, err := w.Write(append(b, p...))
	return err
}

func readFrame(r io.Reader, buf []byte) (kind byte, p []byte, err error) {
	var h [headerSize]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return 0, buf, err
	}
	n := binary.BigEndian.Uint32(h[4:])
	if n > maxFrame {
		return 0, buf, fmt.Errorf("stream frame of %d bytes", n)
	}
	if int(n) > cap(buf) {
		buf = make([]byte, n)
	}
	buf = buf[:n]
	_, err = io.ReadFull(r, buf)
	return h[0], buf, err
}

// listen serves the stream socket at path until the process ends.
func listen(path string, find func(id string) *stream) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("listen for streams: %w", err)
	}
	l, err := net.Listen("unix", path) //nolint:noctx // lives as long as the process
	if err != nil {
		return fmt.Errorf("listen for streams: %w", err)
	}
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go serve(conn, find)
		}
	}()
	return nil
}

func serve(conn net.Conn, find func(id string) *stream) {
	c := &client{conn: conn}
	r := bufio.NewReaderSize(conn, 32<<10)
	id, err := r.ReadString('\n')
	if err != nil {
		c.close()
		return
	}
	s := find(strings.TrimSuffix(id, "\n"))
	// The answer comes before the first frame: nothing else writes while c.mu is held.
	c.mu.Lock()
	answer := "no\n"
	if s != nil && s.attach(c) {
		answer = "ok\n"
	}
	_, err = io.WriteString(conn, answer)
	c.mu.Unlock()
	if err != nil || answer == "no\n" {
		if s != nil {
			s.detach(c)
		}
		c.close()
		return
	}
	defer s.detach(c)
	var buf []byte
	wrote := false
	for {
		kind, p, err := readFrame(r, buf)
		if err != nil {
			if wrote && s.spec.StdinOnce {
				s.closeInput()
			}
			return
		}
		buf = p
		if kind != frameStdin {
			continue
		}
		wrote = true
		if len(p) == 0 {
			s.closeInput()
			continue
		}
		if err := s.input(p); err != nil {
			s.closeInput()
		}
	}
}

// Conn is a client's end of a stream.
type Conn struct {
	conn net.Conn
	r    *bufio.Reader
	mu   sync.Mutex
}

// ErrGone says that the shim does not know the task, or that it has ended.
var ErrGone = errors.New("task has no streams")

// Dial attaches to task id over the socket of its group.
func Dial(socket, id string) (*Conn, error) {
	conn, err := net.DialTimeout("unix", socket, 5*time.Second) //nolint:noctx // local, bounded
	if err != nil {
		return nil, fmt.Errorf("attach to streams: %w", err)
	}
	c := &Conn{conn: conn, r: bufio.NewReaderSize(conn, 32<<10)}
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second)) // unix sockets support it
	_, err = io.WriteString(conn, id+"\n")
	answer := ""
	if err == nil {
		answer, err = c.r.ReadString('\n')
	}
	_ = conn.SetDeadline(time.Time{})
	if err == nil && answer != "ok\n" {
		err = ErrGone
	}
	if err != nil {
		_ = conn.Close() // the first error counts
		return nil, fmt.Errorf("attach to streams: %w", err)
	}
	return c, nil
}

// Copy writes the task's output until the task ends or the connection is closed. A nil
// writer drops its stream.
func (c *Conn) Copy(stdout, stderr io.Writer) error {
	var buf []byte
	for {
		kind, p, err := readFrame(c.r, buf)
		if err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) {
				return nil
			}
			return fmt.Errorf("read streams: %w", err)
		}
		buf = p
		w := stdout
		if kind == frameStderr {
			w = stderr
		}
		if w == nil {
			continue
		}
		if _, err := w.Write(p); err != nil {
			return err
		}
	}
}

// Write sends p to the task's standard input.
func (c *Conn) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	sent := 0
	for len(p) > 0 {
		n := min(len(p), 32<<10)
		if err := writeFrame(c.conn, frameStdin, p[:n]); err != nil {
			return sent, err
		}
		sent += n
		p = p[n:]
	}
	return sent, nil
}

// CloseInput closes the task's standard input.
func (c *Conn) CloseInput() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return writeFrame(c.conn, frameStdin, nil)
}

// Close detaches.
func (c *Conn) Close() error { return c.conn.Close() }
