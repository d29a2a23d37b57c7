package node

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"math"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/platform/disk"
)

// Bounds of a manager's weight and what an attempt to talk to it counts, as SwarmKit has it.
const (
	weightLimit     = 256
	observedSuccess = 10
	observedFailure = -10
)

// remotes are the managers that this node knows, with weights by experience. They are kept
// in state.json.
type remotes struct {
	path string
	log  *slog.Logger

	mu      sync.Mutex
	weights map[remote]float64
	// told are addresses of other managers, since the last session message, by the address of
	// the listed one who told of them: it is none any more, and may lie.
	told map[string][]string
}

// remote is one manager.
type remote struct {
	NodeID string `json:"node_id"`
	Addr   string `json:"addr"`
}

// openRemotes reads the managers of a swarm directory.
func openRemotes(dir string, log *slog.Logger) *remotes {
	r := &remotes{path: filepath.Join(dir, "state.json"), log: log, weights: map[remote]float64{}, told: map[string][]string{}}
	data, err := os.ReadFile(r.path)
	if err != nil {
		return r
	}
	var known []remote
	if err := json.Unmarshal(data, &known); err != nil {
		log.Warn("list of managers not read", slog.Any("error", err))
	}
	for _, k := range known {
		r.weights[k] = 0
	}
	return r
}

// forgetRemotes deletes the managers of a swarm directory.
func forgetRemotes(dir string) error {
	if err := os.Remove(filepath.Join(dir, "state.json")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("forget managers: %w", err)
	}
	return nil
}

// add makes a manager known.
func (r *remotes) add(addr string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.weights[remote{Addr: addr}] = observedSuccess
}

// maxTold bounds what one node can tell of; more is dropped.
const maxTold = 16

// suggest replaces what the listed manager at teller told of. It drops what is no address, is
// known, or is this node's own. It reports whether there was a new one.
func (r *remotes) suggest(teller string, addrs []string, self string) (news bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	listed, known := map[string]bool{}, map[string]bool{}
	for k := range r.weights {
		listed[k.Addr] = true
	}
	if !listed[teller] {
		return false // a session listed others meanwhile
	}
	for _, others := range r.told {
		for _, addr := range others {
			known[addr] = true
		}
	}
	var next []string
	for _, addr := range addrs {
		if len(next) == maxTold {
			break
		}
		if addr == self || listed[addr] || slices.Contains(next, addr) || !reachable(addr) {
			continue
		}
		next = append(next, addr)
		news = news || !known[addr]
	}
	delete(r.told, teller)
	if len(next) > 0 {
		r.told[teller] = next
	}
	return news
}

// reachable reports whether addr can be a manager's: IP:port, as managers list each other.
func reachable(addr string) bool {
	a, err := netip.ParseAddrPort(addr)
	return err == nil && a.Port() != 0 && !a.Addr().IsUnspecified() && !a.Addr().IsMulticast()
}

// toldOthers reports whether somebody told of other managers since the last session message.
func (r *remotes) toldOthers() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.told) > 0
}

// replace makes the managers those that a session message lists.
func (r *remotes) replace(managers []*api.WeightedPeer) {
	if len(managers) == 0 {
		return
	}
	r.mu.Lock()
	next := make(map[remote]float64, len(managers))
	changed := len(managers) != len(r.weights)
	for _, m := range managers {
		k := remote{NodeID: m.GetPeer().GetNodeId(), Addr: m.GetPeer().GetAddr()}
		old, known := r.weights[k]
		changed = changed || !known
		next[k] = blend(old, float64(m.GetWeight()))
	}
	r.weights = next
	clear(r.told)
	list := r.sorted()
	r.mu.Unlock()
	if !changed {
		return
	}
	data, err := json.Marshal(list)
	if err == nil {
		err = disk.WriteFile(r.path, data, 0o600)
	}
	if err != nil {
		r.log.Warn("list of managers not written", slog.Any("error", err))
	}
}

// sorted returns the managers in a fixed order. Callers hold mu.
func (r *remotes) sorted() []remote {
	var list []remote
	for k := range r.weights {
		list = append(list, k)
	}
	slices.SortFunc(list, func(a, b remote) int {
		if a.Addr < b.Addr || (a.Addr == b.Addr && a.NodeID < b.NodeID) {
			return -1
		}
		return 1
	})
	return list
}

// list returns the managers in a fixed order, but not those that others told of.
func (r *remotes) list() []remote {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.sorted()
}

// pick chooses a manager by weight, other than those with an excluded address if it can. Those
// that others told of weigh as much as those that fail, for each who tells of them: so nobody
// keeps this node from trying what another tells.
func (r *remotes) pick(exclude ...string) (remote, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	list := r.sorted()
	for _, teller := range slices.Sorted(maps.Keys(r.told)) {
		for _, addr := range r.told[teller] {
			list = append(list, remote{Addr: addr})
		}
	}
	list = slices.DeleteFunc(list, func(k remote) bool { return slices.Contains(exclude, k.Addr) })
	if len(list) == 0 {
		return remote{}, false
	}
	total := 0.0
	for _, k := range list {
		total += chance(r.weights[k])
	}
	at := rand.Float64() * total
	for _, k := range list {
		if at -= chance(r.weights[k]); at <= 0 {
			return k, true
		}
	}
	return list[len(list)-1], true
}

// observe notes how talking to a manager went.
func (r *remotes) observe(k remote, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	old, known := r.weights[k]
	if !known {
		return
	}
	seen := float64(observedFailure)
	if ok {
		seen = observedSuccess
	}
	r.weights[k] = blend(old, seen)
}

func chance(weight float64) float64 { return max(weight, 0) + 0.001 }

func blend(old, seen float64) float64 {
	clip := func(f float64) float64 { return min(max(f, -weightLimit), weightLimit) }
	return math.Ceil(clip(0.5*clip(seen) + 0.5*old))
}
