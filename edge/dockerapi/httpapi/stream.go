package httpapi

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/moby/moby/api/types"
)

// StreamType returns the content type of a container's output. Clients before 1.42 do
// not know the type of multiplexed streams.
func StreamType(r *http.Request, tty bool) string {
	if tty || RequestVersion(r).Before(42) {
		return types.MediaTypeRawStream
	}
	return types.MediaTypeMultiplexedStream
}

// Begin sends status 200 and the headers at once, and returns a writer that sends
// every write at once. It may be used from several goroutines.
func Begin(w http.ResponseWriter, contentType string) io.Writer {
	if contentType != "" {
		w.Header().Set("Content-Type", contentType)
	}
	w.WriteHeader(http.StatusOK)
	flushing := &flushWriter{w: w}
	flushing.flush()
	return flushing
}

type flushWriter struct {
	mu sync.Mutex
	w  http.ResponseWriter
}

func (f *flushWriter) flush() {
	if flusher, ok := f.w.(http.Flusher); ok {
		flusher.Flush()
	}
}

// Write implements [io.Writer].
func (f *flushWriter) Write(b []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n, err := f.w.Write(b)
	if err == nil {
		f.flush()
	}
	return n, err
}

// The streams of a multiplexed connection.
const (
	Stdout byte = 1
	Stderr byte = 2
	// System carries an error text that ends the client's reading.
	System byte = 3
)

// Frames writes each write to w as one frame of a stream: type, three zeros, length
// in four bytes big-endian, payload. The writers of one connection may be used from
// several goroutines if w may.
func Frames(w io.Writer, stream byte) io.Writer { return &frameWriter{w: w, stream: stream} }

type frameWriter struct {
	w      io.Writer
	stream byte
}

// Write implements [io.Writer].
func (f *frameWriter) Write(b []byte) (int, error) {
	frame := make([]byte, 8, 8+len(b))
	frame[0] = f.stream
	binary.BigEndian.PutUint32(frame[4:], uint32(len(b)))
	if _, err := f.w.Write(append(frame, b...)); err != nil {
		return 0, err
	}
	return len(b), nil
}

// Conn is a connection taken over from HTTP: raw bytes both ways.
type Conn struct {
	conn net.Conn
	r    *bufio.Reader
	mu   sync.Mutex // serializes writes, so that frames stay whole
}

// Hijack takes the connection over and tells the client: 101 UPGRADED if it asked for
// an upgrade, else 200. After it the handler must close the Conn and return nil or an
// error for the log. A failure before is an ordinary error.
func Hijack(w http.ResponseWriter, r *http.Request, contentType string) (*Conn, error) {
	extra := w.Header().Clone()
	conn, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return nil, fmt.Errorf("take connection over: %w", err)
	}
	var head strings.Builder
	upgrade := r.Header.Get("Upgrade")
	if upgrade != "" {
		head.WriteString("HTTP/1.1 101 UPGRADED\r\nContent-Type: " + contentType + "\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n")
	} else {
		head.WriteString("HTTP/1.1 200 OK\r\nContent-Type: " + types.MediaTypeRawStream + "\r\n")
	}
	extra.Del("Content-Type")
	if err := errors.Join(extra.Write(&head), conn.SetDeadline(time.Time{})); err != nil {
		return nil, errors.Join(fmt.Errorf("take connection over: %w", err), conn.Close())
	}
	head.WriteString("\r\n")
	if _, err := io.WriteString(conn, head.String()); err != nil {
		return nil, errors.Join(fmt.Errorf("take connection over: %w", err), conn.Close())
	}
	return &Conn{conn: conn, r: rw.Reader}, nil
}

// Read reads what the client sends; [io.EOF] when it has closed its side.
func (c *Conn) Read(b []byte) (int, error) { return c.r.Read(b) }

// Write sends to the client. It may be called from several goroutines.
func (c *Conn) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.conn.Write(b)
}

// CloseWrite says that nothing more will be sent; reading goes on.
func (c *Conn) CloseWrite() error {
	if half, ok := c.conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return nil
}

// Close ends the connection.
func (c *Conn) Close() error { return c.conn.Close() }
