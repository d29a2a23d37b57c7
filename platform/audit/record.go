package audit

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"time"
	"unicode/utf8"

	"github.com/skep-dev/skep/core/model"
)

// How a call ended, as Record.Outcome says it.
const (
	// Begun is a long call that goes on; another record tells its end.
	Begun = "begun"
	// Done is a call that was carried out.
	Done = "done"
	// Failed is a call that was not carried out.
	Failed = "failed"
	// Refused is a call that its caller had no right to make.
	Refused = "refused"
)

// Record is one call. No field ever holds what was sent or answered.
type Record struct {
	// Seq counts the records of a log from 1.
	Seq  uint64    `json:"seq"`
	Time time.Time `json:"time"`
	// Who made the call: the names of a certificate, or the process at the other end of a
	// local socket; From is the address.
	Who  string `json:"who"`
	Role string `json:"role,omitempty"`
	From string `json:"from,omitempty"`
	// What was called: the method and route, or the RPC. Object is what it was about.
	What    string `json:"what"`
	Object  string `json:"object,omitempty"`
	Outcome string `json:"outcome"`
	// Status is the HTTP status of the answer, if there is one.
	Status int `json:"status,omitempty"`
	// Reason says why a call was refused.
	Reason string `json:"reason,omitempty"`
	// Skipped counts calls before this one that are not in the log: refused ones beyond the
	// rate that is recorded, and those that could not be written.
	Skipped uint64 `json:"skipped,omitempty"`
	// Prev is the hash of the record before, in hex; zeros for the first.
	Prev string `json:"prev"`
}

// maxText bounds each text of a record, in bytes.
const maxText = 256

func cut(s string) string {
	if len(s) <= maxText {
		return s
	}
	s = s[:maxText]
	for len(s) > 0 && !utf8.ValidString(s) {
		s = s[:len(s)-1]
	}
	return s + "…"
}

// bounded returns the record with texts of bounded length.
func (r Record) bounded() Record {
	r.Who, r.Role, r.From, r.What, r.Object, r.Reason = cut(r.Who), cut(r.Role), cut(r.From), cut(r.What), cut(r.Object), cut(r.Reason)
	return r
}

// Head is the place of a record in the chain.
type Head struct {
	Seq  uint64
	Hash [sha256.Size]byte
}

// maxLine bounds one line of a log, in bytes.
const maxLine = 16 << 10

// line returns the record as it is written, HASH JSON, and its place. Hash is over the JSON,
// which holds the hash of the record before.
func line(r Record) ([]byte, Head, error) {
	data, err := json.Marshal(r)
	if err != nil {
		return nil, Head{}, err
	}
	head := Head{Seq: r.Seq, Hash: sha256.Sum256(data)}
	return append(append(append(hex.AppendEncode(nil, head.Hash[:]), ' '), data...), '\n'), head, nil
}

// parse reads a line without its newline, and checks its hash.
func parse(text []byte) (Record, Head, error) {
	given, data, ok := bytes.Cut(text, []byte(" "))
	if !ok || len(text) > maxLine {
		return Record{}, Head{}, model.Errorf(model.Invalid, "it is no record")
	}
	var r Record
	if err := json.Unmarshal(data, &r); err != nil {
		return Record{}, Head{}, model.Errorf(model.Invalid, "it is no record")
	}
	head := Head{Seq: r.Seq, Hash: sha256.Sum256(data)}
	if string(given) != hex.EncodeToString(head.Hash[:]) {
		return Record{}, Head{}, model.Errorf(model.Invalid, "its hash does not fit its text: it was changed")
	}
	return r, head, nil
}
