package unlock

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
)

const (
	// timeout bounds one answer.
	timeout = 30 * time.Second
	// maxAnswer bounds its length in bytes.
	maxAnswer = 4096
)

// Provider is where a key can be asked for.
type Provider struct {
	kind string // exec or unix
	path string
}

// Request says who asks. A provider gets it as one line of JSON.
type Request struct {
	// Op is what is wanted: "unlock", the unlock key.
	Op        string `json:"op"`
	ClusterID string `json:"cluster_id"`
	NodeID    string `json:"node_id"`
	// KEKVersion tells the keys of a swarm apart: the wanted one is the newest that is not
	// newer than this version of the swarm's cluster object.
	KEKVersion uint64 `json:"kek_version"`
}

// Parse reads a provider as people name it: exec:/PATH runs a program, unix:/PATH connects
// to a socket.
func Parse(text string) (Provider, error) {
	kind, path, _ := strings.Cut(text, ":")
	switch {
	case kind == "peers":
		return Provider{}, model.Errorf(model.Invalid, "unlocking by other managers is a setting of the swarm, no provider: `skep lock peers on`")
	case kind != "exec" && kind != "unix" || !filepath.IsAbs(path):
		return Provider{}, model.Errorf(model.Invalid, "unlock provider %q must be exec:/PATH of a program or unix:/PATH of a socket", text)
	}
	return Provider{kind: kind, path: path}, nil
}

// String names the provider as Parse reads it.
func (p Provider) String() string { return p.kind + ":" + p.path }

// Key asks for the unlock key. Errors hold nothing of an answer, which may be the key.
func (p Provider) Key(ctx context.Context, req Request) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	req.Op = "unlock"
	line, err := json.Marshal(req)
	if err != nil {
		return nil, fmt.Errorf("ask %s for the unlock key: %w", p, err)
	}
	line = append(line, '\n')
	var answer []byte
	if p.kind == "exec" {
		answer, err = p.run(ctx, line)
	} else {
		answer, err = p.call(ctx, line)
	}
	if err != nil {
		return nil, fmt.Errorf("ask %s for the unlock key: %w", p, err)
	}
	kek, err := parseAnswer(answer)
	if err != nil {
		return nil, fmt.Errorf("ask %s for the unlock key: %w", p, err)
	}
	return kek, nil
}

// parseAnswer reads the key from the first line of an answer.
func parseAnswer(answer []byte) ([]byte, error) {
	first, _, _ := bytes.Cut(answer, []byte("\n"))
	kek, err := pki.ParseUnlockKey(strings.TrimSpace(string(first)))
	if err != nil {
		return nil, errors.New("the first line of the answer is no unlock key, SWMKEY-1-…")
	}
	return kek, nil
}

// run runs the program with the request on its standard input.
func (p Provider) run(ctx context.Context, line []byte) ([]byte, error) {
	cmd := exec.CommandContext(ctx, p.path)
	cmd.Stdin, cmd.WaitDelay = bytes.NewReader(line), time.Second
	out, complaint := &bounded{}, &bounded{}
	cmd.Stdout, cmd.Stderr = out, complaint
	if err := cmd.Run(); err != nil {
		if text := strings.TrimSpace(string(complaint.data)); text != "" {
			return nil, fmt.Errorf("%w: %s", err, text)
		}
		return nil, err
	}
	return out.data, nil
}

// call writes the request to the socket and reads a line.
func (p Provider) call(ctx context.Context, line []byte) ([]byte, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", p.path)
	if err != nil {
		return nil, err
	}
	defer conn.Close() //nolint:errcheck // nothing is lost
	if deadline, ok := ctx.Deadline(); ok {
		if err := conn.SetDeadline(deadline); err != nil {
			return nil, err
		}
	}
	if _, err := conn.Write(line); err != nil {
		return nil, err
	}
	answer, err := bufio.NewReader(io.LimitReader(conn, maxAnswer)).ReadBytes('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return answer, nil
}

// bounded keeps the beginning of what is written to it.
type bounded struct{ data []byte }

// Write never fails: what is too much is dropped.
func (b *bounded) Write(p []byte) (int, error) {
	b.data = append(b.data, p[:min(len(p), maxAnswer-len(b.data))]...)
	return len(p), nil
}
