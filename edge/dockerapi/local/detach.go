package local

import (
	"io"
	"strings"

	"github.com/skep-dev/skep/core/model"
)

// parseDetachKeys reads a comma-separated list of characters and ctrl-<character>; empty
// is ctrl-p,ctrl-q.
func parseDetachKeys(text string) ([]byte, error) {
	if text == "" {
		return []byte{16, 17}, nil
	}
	var keys []byte
	for key := range strings.SplitSeq(text, ",") {
		ctrl, isCtrl := strings.CutPrefix(key, "ctrl-")
		switch {
		case len(key) == 1:
			keys = append(keys, key[0])
		case isCtrl && len(ctrl) == 1 && ctrl[0] >= 'a' && ctrl[0] <= 'z':
			keys = append(keys, ctrl[0]-'a'+1)
		case isCtrl && ctrl == "@":
			keys = append(keys, 0)
		case isCtrl && len(ctrl) == 1 && strings.Contains(`[\]^_`, ctrl):
			keys = append(keys, byte(27+strings.Index(`[\]^_`, ctrl)))
		default:
			return nil, model.Errorf(model.Invalid, "Invalid detach keys (%s) provided", text)
		}
	}
	return keys, nil
}

// detachReader passes input on until the keys were typed in a row; then it calls detach
// and ends. The keys themselves are not passed on.
type detachReader struct {
	r      io.Reader
	keys   []byte
	detach func()
	held   int    // keys seen so far
	ready  []byte // to be passed on
	err    error
}

// Read implements [io.Reader].
func (d *detachReader) Read(p []byte) (int, error) {
	for len(d.ready) == 0 && d.err == nil {
		buf := make([]byte, max(len(p), 1))
		n, err := d.r.Read(buf)
		d.err = err
		d.scan(buf[:n])
		if d.err != nil && d.held > 0 {
			d.ready = append(d.ready, d.keys[:d.held]...)
			d.held = 0
		}
	}
	if len(d.ready) == 0 {
		return 0, d.err
	}
	n := copy(p, d.ready)
	d.ready = d.ready[n:]
	return n, nil
}

func (d *detachReader) scan(input []byte) {
	for i, b := range input {
		if b == d.keys[d.held] {
			if d.held++; d.held == len(d.keys) {
				d.held, d.err = 0, io.EOF
				d.detach()
				return
			}
			continue
		}
		if d.held > 0 {
			d.ready = append(d.ready, d.keys[:d.held]...)
			d.held = 0
			if b == d.keys[0] {
				d.scan(input[i:])
				return
			}
		}
		d.ready = append(d.ready, b)
	}
}
