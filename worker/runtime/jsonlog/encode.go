package jsonlog

import (
	"encoding/json"
	"errors"
	"time"
	"unicode/utf8"
)

// MaxLine is the most bytes of one entry; longer lines are split into several, of which
// only the last ends with a newline.
const MaxLine = 16 << 10

// Entry is one line of a log.
type Entry struct {
	Time   time.Time
	Stderr bool
	Data   []byte
	// Attrs is what Attributes found for the container; most have none.
	Attrs map[string]string
}

// Append appends the encoded entry with its final newline to b.
func Append(b []byte, e Entry) []byte { return appendEntry(b, e, appendAttrs(nil, e.Attrs)) }

// appendEntry appends an entry whose attributes are encoded.
func appendEntry(b []byte, e Entry, attrs []byte) []byte {
	b = append(b, `{"log":`...)
	b = appendString(b, e.Data)
	if e.Stderr {
		b = append(b, `,"stream":"stderr"`...)
	} else {
		b = append(b, `,"stream":"stdout"`...)
	}
	b = append(b, attrs...)
	b = append(b, `,"time":"`...)
	b = e.Time.UTC().AppendFormat(b, time.RFC3339Nano)
	return append(b, '"', '}', '\n')
}

// appendString quotes s for JSON. Bytes that are no UTF-8 become U+FFFD.
func appendString(b, s []byte) []byte {
	const hex = "0123456789abcdef"
	b = append(b, '"')
	start := 0
	for i := 0; i < len(s); {
		c := s[i]
		if c < utf8.RuneSelf {
			if c >= ' ' && c != '"' && c != '\\' {
				i++
				continue
			}
			b = append(b, s[start:i]...)
			switch c {
			case '"', '\\':
				b = append(b, '\\', c)
			case '\n':
				b = append(b, '\\', 'n')
			case '\r':
				b = append(b, '\\', 'r')
			case '\t':
				b = append(b, '\\', 't')
			default:
				b = append(b, '\\', 'u', '0', '0', hex[c>>4], hex[c&15])
			}
			i++
			start = i
			continue
		}
		r, size := utf8.DecodeRune(s[i:])
		if r == utf8.RuneError && size == 1 {
			b = append(b, s[start:i]...)
			b = append(b, "\ufffd"...)
			i++
			start = i
			continue
		}
		i += size
	}
	b = append(b, s[start:]...)
	return append(b, '"')
}

var errBadEntry = errors.New("log entry is neither stdout nor stderr")

// Parse reads one encoded line.
func Parse(line []byte) (Entry, error) {
	var v struct {
		Log    string            `json:"log"`
		Stream string            `json:"stream"`
		Attrs  map[string]string `json:"attrs"`
		Time   time.Time         `json:"time"`
	}
	if err := json.Unmarshal(line, &v); err != nil {
		return Entry{}, err
	}
	if v.Stream != "stdout" && v.Stream != "stderr" {
		return Entry{}, errBadEntry
	}
	return Entry{Time: v.Time, Stderr: v.Stream == "stderr", Data: []byte(v.Log), Attrs: v.Attrs}, nil
}
