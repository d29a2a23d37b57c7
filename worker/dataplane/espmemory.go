package dataplane

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"github.com/skep-dev/skep/core/netplan"
	"github.com/skep-dev/skep/platform/disk"
)

// espMemory is what a node remembers of its associations, beside the namespaces and as long as
// they last. A key is never used again from the first number on: an association that comes back
// goes on counting, and when the kernel has lost one, the node takes another epoch, from which
// other keys follow.
type espMemory struct {
	// Boot is the run of the kernel that this is about.
	Boot string
	// Epoch is the random number that managers are told.
	Epoch string
	// Local is the address that associations were made for.
	Local netip.Addr
	// Seen are those of them that are in the kernel or may come back, by saidText.
	Seen map[string]espSeen

	// changed are those of Seen that the file does not hold as they are; anew is set when it must
	// be written whole. Else it grows by what changed, which was appended so often since.
	changed  map[string]bool
	anew     bool
	appended int
	// lost is set when the epoch must change.
	lost bool
}

// espSeen is one association.
type espSeen struct {
	// Key is its key's fingerprint.
	Key        string
	Generation uint64
	// Gone is set for one that was removed, Counters is how far it had counted. Lost is set for
	// one that disappeared, which is not made again.
	Gone, Lost bool
	Counters   counters
	// Former are the fingerprints of keys that it had before, the newest of them last. How far it
	// had counted with these is not known any more.
	Former []string `json:",omitempty"`
}

// espNote is a change of Seen, as the file holds it: a line of its own after that of the whole.
type espNote struct {
	ID   string
	Seen *espSeen // nil for one that was forgotten
}

// sentMeanwhile is how far a sender's counter leaps when it comes back, for what it had sent
// between the last look at it and its removal.
const sentMeanwhile = 1 << 20

// formerKeys is how many former keys of an association are remembered. It has one more with each
// epoch of an end, and with each leader of another version that derives keys otherwise.
const formerKeys = 32

func saidText(id netplan.SAID) string { return fmt.Sprintf("%s %08x", id.Dst, id.SPI) }

func (d *Dataplane) espPath() string { return filepath.Join(d.cfg.ExecDir, ".esp") }

// recoverESP takes over what a former process left.
func (d *Dataplane) recoverESP() error {
	m := &espMemory{}
	d.esp.memory, d.esp.present = m, true
	if !d.canESP() {
		return nil
	}
	data, err := os.ReadFile(d.espPath())
	switch {
	case err == nil:
		*m = decodeMemory(data)
	case !errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("read ESP state: %w", err)
	}
	if boot := bootID(); m.Boot != boot || m.Epoch == "" {
		local := m.Local
		*m = espMemory{Boot: boot, Local: local}
		if m.Epoch, err = newEpoch(); err != nil {
			return err
		}
	}
	if m.anew = true; m.Seen == nil {
		m.Seen = map[string]espSeen{}
	}
	if !m.Local.IsValid() {
		return d.saveESP()
	}
	x, err := openXfrm(d.hostNS, m.Local.Is6())
	if err != nil {
		return err
	}
	defer x.close()
	have, err := x.observe(map[netip.Addr]bool{m.Local: true})
	if err != nil {
		return err
	}
	for _, sa := range have.SAs {
		s, known := m.Seen[saidText(sa.SAID)]
		another := known && sa.Key != netplan.ESPKey{} && s.Key != fingerprint(sa.Key)
		if !known || s.Gone || s.Lost || another {
			m.made(sa)
		}
		m.lost = m.lost || another // neither that key nor the one remembered shall come back
	}
	there := map[string]bool{}
	for id := range have.SAs {
		there[saidText(id)] = true
	}
	for text := range m.Seen {
		if !there[text] {
			m.vanished(text)
		}
	}
	return d.saveESP()
}

// decodeMemory reads what a file holds. A torn file is none, and a torn last line as if it had not
// come: it is noted again what the kernel has.
func decodeMemory(data []byte) (m espMemory) {
	first := true
	for line := range bytes.Lines(data) {
		if first {
			if first = false; json.Unmarshal(line, &m) != nil {
				return espMemory{}
			}
			continue
		}
		var n espNote
		switch {
		case json.Unmarshal(line, &n) != nil:
			return m
		case n.Seen == nil:
			delete(m.Seen, n.ID)
		default:
			if m.Seen == nil {
				m.Seen = map[string]espSeen{}
			}
			m.Seen[n.ID] = *n.Seen
		}
	}
	return m
}

// note changes what is remembered of an association.
func (m *espMemory) note(text string, s espSeen) {
	m.Seen[text] = s
	m.touch(text)
}

// touch says that the file does not hold an association as it is.
func (m *espMemory) touch(text string) {
	if m.changed == nil {
		m.changed = map[string]bool{}
	}
	m.changed[text] = true
}

// made notes an association that was made.
func (m *espMemory) made(sa netplan.SA) {
	key := fingerprint(sa.Key)
	was, known := m.Seen[saidText(sa.SAID)]
	former := was.Former
	if known && was.Key != key && was.Key != fingerprint(netplan.ESPKey{}) {
		former = append(slices.Clone(former), was.Key)
		former = former[max(0, len(former)-formerKeys):]
	}
	m.note(saidText(sa.SAID), espSeen{Key: key, Generation: sa.Generation, Former: former})
}

// told completes what is known of those that were found in the kernel and are wanted: the kernel
// does not tell their generation, and not everybody their key.
func (m *espMemory) told(want, have map[netplan.SAID]netplan.SA) {
	for id, sa := range want {
		is, there := have[id]
		s, known := m.Seen[saidText(id)]
		if there && known && s.Generation == 0 && !s.Gone && !s.Lost && is.Src == sa.Src && (is.Key == sa.Key || is.Key == netplan.ESPKey{}) {
			m.made(sa)
		}
	}
}

// removed notes one that was removed, and how far it had counted.
func (m *espMemory) removed(sa netplan.SA, c counters) {
	text := saidText(sa.SAID)
	s, known := m.Seen[text]
	switch {
	case !known:
		s = espSeen{Key: fingerprint(sa.Key), Generation: sa.Generation, Gone: true, Counters: c}
	case s.Key == fingerprint(sa.Key) || sa.Key == netplan.ESPKey{}:
		s.Gone, s.Counters = true, c
	case !s.Gone: // somebody put another one in its place
		s.Lost, m.lost = true, true
	}
	m.note(text, s)
}

// vanished notes that the kernel has an association no more, by saidText: if nobody removed it on
// purpose, how far it had counted is lost.
func (m *espMemory) vanished(text string) {
	if s, known := m.Seen[text]; known && !s.Gone && !s.Lost {
		s.Lost, m.lost = true, true
		m.note(text, s)
	}
}

// counters returns from where an association goes on counting that is to be made, and whether
// it may be: not when the kernel had it and has lost it, nor with a key that it had before its
// last one.
func (m *espMemory) counters(sa netplan.SA) (counters, bool) {
	text := saidText(sa.SAID)
	s, known := m.Seen[text]
	switch {
	case known && s.Key != fingerprint(sa.Key) && slices.Contains(s.Former, fingerprint(sa.Key)):
		if !s.Lost { // other keys are asked for once
			s.Lost, m.lost = true, true
			m.note(text, s)
		}
		return counters{}, false
	case !known || s.Key != fingerprint(sa.Key):
		return counters{}, true
	case s.Lost:
		return counters{}, false
	case s.Gone:
		c := s.Counters
		if c.OSeq != 0 || c.OSeqHi != 0 {
			if c.OSeq += sentMeanwhile; c.OSeq < sentMeanwhile {
				c.OSeqHi++
			}
		}
		return c, true
	}
	m.vanished(text)
	return counters{}, false
}

// forget drops what cannot come back: what is not in the kernel and older than all keys that
// managers tell of. One of which no manager has told yet is none of these.
func (m *espMemory) forget(want, have map[netplan.SAID]netplan.SA) {
	if len(want) == 0 {
		return
	}
	oldest := ^uint64(0)
	for _, sa := range want {
		oldest = min(oldest, sa.Generation)
	}
	here := map[string]bool{}
	for id := range have {
		here[saidText(id)] = true
	}
	for id := range want {
		here[saidText(id)] = true
	}
	for text, s := range m.Seen {
		if !here[text] && s.Generation != 0 && s.Generation < oldest {
			delete(m.Seen, text)
			m.touch(text)
		}
	}
}

// saveESP takes another epoch where that is due, and writes what changed. Callers hold mu.
func (d *Dataplane) saveESP() error {
	m := d.esp.memory
	if m.lost {
		epoch, err := newEpoch()
		if err != nil {
			return err
		}
		m.Epoch, m.lost, m.anew = epoch, false, true
		d.cfg.Log.Warn("the kernel has lost ESP associations: asking managers for other keys")
		select {
		case d.described <- struct{}{}:
		default: // somebody is about to look
		}
	}
	var err error
	switch {
	case m.anew || m.appended > len(m.Seen)+256:
		if err = m.rewrite(d.espPath()); err == nil {
			m.anew, m.appended = false, 0
		}
	case len(m.changed) > 0:
		if err = m.append(d.espPath()); err == nil {
			m.appended += len(m.changed)
		}
	}
	if err != nil {
		m.anew = true
		return fmt.Errorf("write ESP state: %w", err)
	}
	clear(m.changed)
	return nil
}

// rewrite writes all of it.
func (m *espMemory) rewrite(path string) error {
	data, err := json.Marshal(m)
	if err != nil {
		return err
	}
	return disk.WriteFile(path, append(data, '\n'), 0o600)
}

// append adds what changed to a file that was written whole.
func (m *espMemory) append(path string) error {
	var lines []byte
	for _, text := range sortedKeys(m.changed) {
		n := espNote{ID: text}
		if s, known := m.Seen[text]; known {
			n.Seen = &s
		}
		line, err := json.Marshal(n)
		if err != nil {
			return err
		}
		lines = append(append(lines, line...), '\n')
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(lines)
	return errors.Join(err, f.Close())
}

// forgetESP removes what is remembered. Callers hold mu.
func (d *Dataplane) forgetESP() error {
	if err := os.Remove(d.espPath()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove ESP state: %w", err)
	}
	return nil
}
