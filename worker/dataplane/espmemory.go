package dataplane

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"

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

	saved string // what the file holds
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
}

// sentMeanwhile is how far a sender's counter leaps when it comes back, for what it had sent
// between the last look at it and its removal.
const sentMeanwhile = 1 << 20

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
		if json.Unmarshal(data, m) != nil {
			*m = espMemory{} // a torn file is none
		}
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
	if m.Seen == nil {
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
	for text, s := range m.Seen {
		if !there[text] && !s.Gone && !s.Lost {
			s.Lost, m.lost = true, true
			m.Seen[text] = s
		}
	}
	return d.saveESP()
}

// made notes an association that was made.
func (m *espMemory) made(sa netplan.SA) {
	m.Seen[saidText(sa.SAID)] = espSeen{Key: fingerprint(sa.Key), Generation: sa.Generation}
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
	m.Seen[text] = s
}

// counters returns from where an association goes on counting that is to be made, and whether
// it may be: not when the kernel had it and has lost it.
func (m *espMemory) counters(sa netplan.SA) (counters, bool) {
	text := saidText(sa.SAID)
	s, known := m.Seen[text]
	switch {
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
	s.Lost, m.lost = true, true
	m.Seen[text] = s
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
		m.Epoch, m.lost = epoch, false
		d.cfg.Log.Warn("the kernel has lost ESP associations: asking managers for other keys")
		select {
		case d.described <- struct{}{}:
		default: // somebody is about to look
		}
	}
	data, err := json.Marshal(m)
	if err != nil {
		return fmt.Errorf("write ESP state: %w", err)
	}
	if string(data) == m.saved {
		return nil
	}
	if err := disk.WriteFile(d.espPath(), data, 0o600); err != nil {
		return err
	}
	m.saved = string(data)
	return nil
}

// forgetESP removes what is remembered. Callers hold mu.
func (d *Dataplane) forgetESP() error {
	if err := os.Remove(d.espPath()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove ESP state: %w", err)
	}
	return nil
}
