package e2e

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"github.com/vishvananda/netlink"
)

// crashTime is how long TestCrash kills managers; the environment variable
// SKEP_CRASH_TIME sets another duration.
const crashTime = 5 * time.Minute

// TestCrash kills the daemons of three managers with SIGKILL, one, two or all of them at
// any moment, or takes one's network away for a while, while clients create, change, read
// and remove configs through all managers' Docker API. Then it checks that the history of every config is linearizable: no
// acknowledged write is lost, none happens twice, no reader sees the past.
func TestCrash(t *testing.T) {
	duration := crashTime
	if s := os.Getenv("SKEP_CRASH_TIME"); s != "" {
		var err error
		if duration, err = time.ParseDuration(s); err != nil {
			t.Fatalf("SKEP_CRASH_TIME: %v", err)
		}
	}
	s := newSwarm(t, 3, 0)
	var sockets []string
	for _, n := range s.nodes {
		sockets = append(sockets, n.Socket)
	}
	h := &history{begin: time.Now()}
	stop := make(chan struct{})
	var clients sync.WaitGroup
	for i := range 6 {
		c := newConfigClient(i, sockets, h)
		clients.Go(func() { c.work(stop) })
	}
	kills := s.killLoop(t, duration, h)
	close(stop)
	clients.Wait()
	t.Logf("%d kills, %d writes acknowledged, %d refused, %d of unknown outcome; longest time without an acknowledged write %s",
		kills, h.acked.Load(), h.refused.Load(), len(h.unknown()), time.Duration(h.gap).Round(10*time.Millisecond))
	h.readAll(t, sockets)
	h.check(t)
}

// killLoop kills and starts managers until the time is over and returns how many died.
func (s *swarm) killLoop(t *testing.T, d time.Duration, h *history) int {
	t.Helper()
	kills := 0
	names := s.byRole("manager")
	for end := time.Now().Add(d); ; {
		over := time.Now().After(end)
		before := h.acked.Load()
		eventually(t, 90*time.Second, "writes go on", func() string {
			if n := h.acked.Load() - before; n < 20 {
				return fmt.Sprintf("%d writes were acknowledged since %d of %d managers were started", n, kills, len(names))
			}
			return ""
		})
		if over {
			return kills
		}
		time.Sleep(rand.N(time.Second)) // any moment
		if rand.IntN(3) == 0 {
			s.cutOff(t, names[rand.IntN(len(names))], h)
			continue
		}
		victims := slices.Clone(names)
		rand.Shuffle(len(victims), func(i, j int) { victims[i], victims[j] = victims[j], victims[i] })
		// Mostly one, so that the others elect; sometimes all, so that only disks remain.
		victims = victims[:[]int{1, 1, 1, 1, 2, 2, 3}[rand.IntN(7)]]
		for _, v := range victims {
			s.dev(t, "kill", v)
			t.Logf("%.3f %s killed", time.Since(h.begin).Seconds(), v)
			kills++
		}
		time.Sleep(rand.N(1500 * time.Millisecond))
		for _, v := range victims {
			s.dev(t, "start", v)
			t.Logf("%.3f %s started", time.Since(h.begin).Seconds(), v)
		}
	}
}

// cutOff takes a manager's network away for long enough that the others elect a leader, if
// it leads, while clients still ask it.
func (s *swarm) cutOff(t *testing.T, name string, h *history) {
	t.Helper()
	s.refresh(t)
	err := inside(netnsOf(s.node(t, name).PID), func() error {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		addrs, err := netlink.AddrList(link, netlink.FAMILY_ALL)
		if err != nil {
			return err
		}
		routes, err := netlink.RouteList(link, netlink.FAMILY_ALL)
		if err != nil {
			return err
		}
		if err := netlink.LinkSetDown(link); err != nil {
			return err
		}
		t.Logf("%.3f %s cut off", time.Since(h.begin).Seconds(), name)
		time.Sleep(rand.N(4 * time.Second))
		if err := netlink.LinkSetUp(link); err != nil {
			return err
		}
		for _, a := range addrs { // those that went with the link
			if err := netlink.AddrReplace(link, &a); err != nil {
				return err
			}
		}
		for _, r := range routes {
			if err := netlink.RouteReplace(&r); err != nil {
				return err
			}
		}
		t.Logf("%.3f %s is back", time.Since(h.begin).Seconds(), name)
		return nil
	})
	if err != nil {
		t.Fatalf("cut %s off: %v", name, err)
	}
}

// What clients do to the config of one name. Every label is written once.
type (
	readConfig   struct{ Key string }
	createConfig struct{ Key, Label string }
	// changeConfig gives the object a new label if it still is as it was read.
	changeConfig struct{ Key, ID, From, To string }
	removeConfig struct{ Key, ID string }
	// endOfConfig is when nobody looks at the config any more.
	endOfConfig struct{ Key string }
)

// configState is a config's object and label; the zero value is that there is none. The
// id is "?" after a creation whose answer was lost.
type configState struct {
	ID, Label string
	Ended     bool
}

// outcome is what a write answered.
type outcome struct {
	Done bool   // false: refused, because the object is not or no more as the write needs it
	ID   string // of a creation
}

// configs is the sequential meaning of all that. A nil output is an unknown outcome: the
// operation happens at some later time or, what is the same to everybody, after the end.
func configs() porcupine.Model {
	return porcupine.Model{
		Partition: func(all []porcupine.Operation) [][]porcupine.Operation {
			byKey := map[string][]porcupine.Operation{}
			for _, o := range all {
				byKey[keyOf(o.Input)] = append(byKey[keyOf(o.Input)], o)
			}
			return slices.Collect(maps.Values(byKey))
		},
		Init: func() any { return configState{} },
		Step: func(state, input, output any) (bool, any) {
			s, _ := state.(configState)
			out, known := output.(outcome)
			switch in := input.(type) {
			case endOfConfig:
				return true, configState{Ended: true}
			case readConfig:
				seen, _ := output.(configState)
				if s.ID == "?" && seen.Label == s.Label {
					return true, seen
				}
				return s == seen, s
			case createConfig:
				next := configState{ID: "?", Label: in.Label}
				if known {
					next.ID = out.ID
				}
				return step(s, next, s == configState{}, out, known)
			case changeConfig:
				return step(s, configState{ID: in.ID, Label: in.To}, s == configState{ID: in.ID, Label: in.From}, out, known)
			case removeConfig:
				return step(s, configState{}, s.ID == in.ID, out, known)
			}
			return false, s
		},
		Equal: func(a, b any) bool { return a == b },
	}
}

// step is a write that happens exactly when it may.
func step(now, next configState, may bool, out outcome, known bool) (bool, any) {
	switch {
	case now.Ended:
		return !known, now
	case !known:
		return may, next
	case out.Done:
		return may, next
	default:
		return !may, now
	}
}

func keyOf(input any) string {
	switch in := input.(type) {
	case readConfig:
		return in.Key
	case createConfig:
		return in.Key
	case changeConfig:
		return in.Key
	case removeConfig:
		return in.Key
	case endOfConfig:
		return in.Key
	}
	return ""
}

// history collects what clients did and saw.
type history struct {
	begin          time.Time
	acked, refused atomic.Int64

	mu   sync.Mutex
	ops  []porcupine.Operation
	last int64 // when a write was acknowledged
	gap  int64 // longest time between two acknowledged writes
}

func (h *history) now() int64 { return int64(time.Since(h.begin)) }

// add records an operation that began at call and has ended; a nil output is unknown.
func (h *history) add(client int, call int64, input, output any) {
	op := porcupine.Operation{ClientId: client, Input: input, Output: output, Call: call, Return: h.now()}
	switch out := output.(type) {
	case outcome:
		if out.Done {
			h.acked.Add(1)
		} else {
			h.refused.Add(1)
		}
	case nil:
		op.Return = int64(1000 * time.Hour)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ops = append(h.ops, op)
	if out, ok := output.(outcome); ok && out.Done {
		h.gap, h.last = max(h.gap, h.now()-h.last), h.now()
	}
}

func (h *history) unknown() []porcupine.Operation {
	h.mu.Lock()
	defer h.mu.Unlock()
	var open []porcupine.Operation
	for _, o := range h.ops {
		if o.Output == nil {
			open = append(open, o)
		}
	}
	return open
}

// readAll reads every config once more, through each manager.
func (h *history) readAll(t *testing.T, sockets []string) {
	t.Helper()
	h.mu.Lock()
	keys := map[string]bool{}
	for _, o := range h.ops {
		keys[keyOf(o.Input)] = true
	}
	h.mu.Unlock()
	for i, socket := range sockets {
		c := newConfigClient(100+i, []string{socket}, h)
		for key := range keys {
			eventually(t, time.Minute, "manager "+socket+" answers", func() string {
				if _, ok := c.read(key); !ok {
					return "it does not"
				}
				return ""
			})
		}
	}
	for key := range keys {
		h.add(100, h.now(), endOfConfig{key}, configState{})
	}
}

// check checks the history of each config; that of the first one which cannot be is kept.
func (h *history) check(t *testing.T) {
	t.Helper()
	model := configs()
	for _, ops := range model.Partition(h.ops) {
		switch porcupine.CheckOperationsTimeout(model, ops, time.Minute) {
		case porcupine.Ok:
			continue
		case porcupine.Unknown:
			t.Errorf("%s: the history could not be checked in time", keyOf(ops[0].Input))
		case porcupine.Illegal:
			t.Errorf("%s: the history is not linearizable: an acknowledged write was lost or happened twice, or a reader saw the past", keyOf(ops[0].Input))
		}
		slices.SortFunc(ops, func(a, b porcupine.Operation) int { return cmp.Compare(a.Call, b.Call) })
		var text strings.Builder
		for _, o := range ops {
			fmt.Fprintf(&text, "%.6f %.6f client %d: %#v -> %#v\n", time.Duration(o.Call).Seconds(), time.Duration(o.Return).Seconds(), o.ClientId, o.Input, o.Output)
		}
		path := filepath.Join(os.TempDir(), keyOf(ops[0].Input)+".history")
		if err := os.WriteFile(path, []byte(text.String()), 0o600); err != nil {
			t.Error(err)
		}
		t.Logf("the history is in %s", path)
		return
	}
}

// configClient works on configs through the Docker API of a random one of its managers.
type configClient struct {
	id       int
	n        int
	managers []*http.Client
	h        *history
}

func newConfigClient(id int, sockets []string, h *history) *configClient {
	c := &configClient{id: id, h: h}
	for _, socket := range sockets {
		c.managers = append(c.managers, &http.Client{
			Timeout: 30 * time.Second,
			Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				var d net.Dialer
				return d.DialContext(ctx, "unix", socket)
			}},
		})
	}
	return c
}

// work does one thing after the other until stop is closed. The names change every
// second, so that each one's history stays short enough to be checked.
func (c *configClient) work(stop <-chan struct{}) {
	for {
		select {
		case <-stop:
			return
		case <-time.After(rand.N(20 * time.Millisecond)):
		}
		key := fmt.Sprintf("crash-%d-%d", time.Since(c.h.begin)/time.Second, rand.IntN(3))
		now, ok := c.read(key)
		if !ok {
			continue
		}
		c.n++
		label := fmt.Sprintf("%d.%d", c.id, c.n)
		switch dice := rand.IntN(10); {
		case now.ID == "":
			c.write(createConfig{key, label}, http.MethodPost, "/configs/create", spec(key, label))
		case dice < 2:
			c.write(removeConfig{key, now.ID}, http.MethodDelete, "/configs/"+now.ID, nil)
		default:
			c.write(changeConfig{key, now.ID, now.Label, label}, http.MethodPost,
				fmt.Sprintf("/configs/%s/update?version=%d", now.ID, now.version), spec(key, label))
		}
	}
}

func spec(key, label string) map[string]any {
	return map[string]any{"Name": key, "Labels": map[string]string{"v": label}, "Data": []byte("data of " + key)}
}

// seenConfig is what a read returned.
type seenConfig struct {
	configState
	version uint64
}

// read reads one config; it is false if no answer came.
func (c *configClient) read(key string) (seenConfig, bool) {
	call := c.h.now()
	status, body, err := c.do(http.MethodGet, "/configs/"+url.PathEscape(key), nil)
	var seen seenConfig
	switch {
	case err != nil:
		return seen, false
	case status == http.StatusOK:
		var got struct {
			ID      string
			Version struct{ Index uint64 }
			Spec    struct{ Labels map[string]string }
		}
		if json.Unmarshal(body, &got) != nil {
			return seen, false // cut off by a kill
		}
		seen = seenConfig{configState{ID: got.ID, Label: got.Spec.Labels["v"]}, got.Version.Index}
	case status != http.StatusNotFound:
		return seen, false
	}
	c.h.add(c.id, call, readConfig{key}, seen.configState)
	return seen, true
}

// write does one operation and records what became of it.
func (c *configClient) write(input any, method, path string, body any) {
	call := c.h.now()
	status, answer, err := c.do(method, path, body)
	var created struct{ ID string }
	switch {
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.ENOENT):
		return // never sent
	case err == nil && status == http.StatusCreated && json.Unmarshal(answer, &created) == nil:
		c.h.add(c.id, call, input, outcome{Done: true, ID: created.ID})
	case err == nil && (status == http.StatusOK || status == http.StatusNoContent):
		c.h.add(c.id, call, input, outcome{Done: true})
	case err == nil && (status == http.StatusNotFound || status == http.StatusConflict || strings.Contains(string(answer), "update out of sequence")):
		c.h.add(c.id, call, input, outcome{})
	default:
		c.h.add(c.id, call, input, nil)
	}
}

func (c *configClient) do(method, path string, body any) (int, []byte, error) {
	var in io.Reader
	if body != nil {
		data, err := json.Marshal(body)
		if err != nil {
			return 0, nil, err
		}
		in = bytes.NewReader(data)
	}
	req, err := http.NewRequestWithContext(context.Background(), method, "http://docker"+path, in)
	if err != nil {
		return 0, nil, err
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	req.GetBody = nil // the transport must not send a write twice
	resp, err := c.managers[rand.IntN(len(c.managers))].Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	return resp.StatusCode, data, err
}
