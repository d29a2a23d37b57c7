package replica

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"google.golang.org/grpc"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/store"
)

// The crash test runs three members as processes, kills them at any moment while clients
// write and read, and checks with porcupine that the history of every register is
// linearizable: no acknowledged write is lost, none happens twice, no reader sees the past.

const crashEnv = "REPLICA_CRASH_MEMBER"

func crashDuration() *time.Duration {
	return flag.Duration("crash.duration", 20*time.Second, "how long the crash test kills members")
}

func TestMain(m *testing.M) {
	if spec := os.Getenv(crashEnv); spec != "" {
		if err := runCrashMember(spec); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	crashFor = crashDuration()
	flag.Parse()
	os.Exit(m.Run())
}

var crashFor *time.Duration

// crashSpec is what a member process is told.
type crashSpec struct {
	ID, Dir, Addr, HTTP, Join string
}

// crashOp swaps the value of a register for a new one, or only reads it if there is none.
type crashOp struct {
	Key string `json:"key"`
	New string `json:"new"`
}

type crashResult struct {
	Old string `json:"old"`
}

func runCrashMember(spec string) error {
	var s crashSpec
	if err := json.Unmarshal([]byte(spec), &s); err != nil {
		return err
	}
	r := New(Config{
		NodeID: s.ID, Addr: s.Addr, Dir: s.Dir, Keys: testKey(), JoinAddr: s.Join, Caller: testCaller,
		Dial: func(_ context.Context, addr string) (*grpc.ClientConn, error) { return dialAs(s.ID, addr) }, Log: testLog(), TickInterval: 20 * time.Millisecond,
	})
	lis, err := net.Listen("tcp", s.Addr)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	api.RegisterRaftServer(server, r.RaftServer())
	api.RegisterRaftMembershipServer(server, r.MembershipServer())
	health := new(Health)
	health.Set(HealthRaft, true)
	api.RegisterHealthServer(server, health)
	go func() { _ = server.Serve(lis) }()
	mux := http.NewServeMux()
	mux.HandleFunc("POST /swap", func(w http.ResponseWriter, req *http.Request) { serveSwap(r, w, req) })
	mux.HandleFunc("GET /state", func(w http.ResponseWriter, _ *http.Request) { serveState(r, w) })
	web := &http.Server{Addr: s.HTTP, Handler: mux, ReadHeaderTimeout: time.Second}
	go func() { _ = web.ListenAndServe() }()
	go func() { // the parent died
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(2)
	}()
	return r.Run(context.Background())
}

func serveSwap(r *Replica, w http.ResponseWriter, req *http.Request) {
	var op crashOp
	if err := json.NewDecoder(req.Body).Decode(&op); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	var res crashResult
	var err error
	if op.New == "" {
		var s *store.Snapshot
		if s, err = r.Read(req.Context()); err == nil {
			res.Old = valueOf(s, op.Key)
		}
	} else {
		_, err = r.Update(req.Context(), func(tx *store.Tx) error { return swapIn(tx, op, &res) })
	}
	switch {
	case errors.Is(err, model.ErrNoLeader), errors.Is(err, model.ErrUnconfirmed):
		http.Error(w, err.Error(), http.StatusMisdirectedRequest) // certainly not written
	case err != nil:
		http.Error(w, err.Error(), http.StatusInternalServerError) // perhaps written
	default:
		_ = json.NewEncoder(w).Encode(res)
	}
}

// swapIn executes a swap.
func swapIn(tx *store.Tx, op crashOp, res *crashResult) error {
	res.Old = valueOf(tx.Snapshot(), op.Key)
	if old := tx.Snapshot().Config(op.Key); old != nil {
		edited := model.Clone(old)
		edited.Spec.Data = []byte(op.New)
		return tx.Update(edited)
	}
	if tx.Snapshot().Cluster() == nil {
		if err := tx.Create(&api.Cluster{Id: "cluster", Spec: &api.ClusterSpec{
			Annotations: &api.Annotations{Name: "default"},
			Raft:        &api.RaftConfig{SnapshotInterval: 200, LogEntriesForSlowFollowers: 50, KeepOldSnapshots: 1},
		}}); err != nil {
			return err
		}
	}
	return createConfig(tx, op.Key, op.New)
}

func valueOf(s *store.Snapshot, key string) string { return string(s.Config(key).GetSpec().GetData()) }

func serveState(r *Replica, w http.ResponseWriter) {
	out := make(map[string]string)
	s := r.View()
	for c := range s.Configs() {
		out[c.GetId()] = string(c.GetSpec().GetData())
	}
	leading, _ := r.Leading()
	_ = json.NewEncoder(w).Encode(map[string]any{"index": s.Index(), "leading": leading, "configs": out})
}

// crashMember is a member process and how to start it again.
type crashMember struct {
	spec crashSpec
	mu   sync.Mutex
	cmd  *exec.Cmd // nil while dead
	in   io.Closer
}

func (m *crashMember) start(t *testing.T) {
	t.Helper()
	spec, err := json.Marshal(m.spec)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0]) // killed below
	cmd.Env = append(os.Environ(), crashEnv+"="+string(spec))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		for lines := bufio.NewScanner(stderr); lines.Scan(); {
			if os.Getenv("REPLICA_TEST_LOG") != "" || strings.Contains(lines.Text(), "panic") {
				fmt.Fprintln(os.Stderr, m.spec.ID, lines.Text())
			}
		}
	}()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.cmd, m.in = cmd, in
}

// kill reports whether the member was alive until then.
func (m *crashMember) kill() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.cmd == nil {
		return true
	}
	_ = m.cmd.Process.Kill()
	err := m.cmd.Wait()
	m.cmd = nil
	_ = m.in.Close()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		if ws, ok := exit.Sys().(syscall.WaitStatus); ok {
			return ws.Signaled() && ws.Signal() == syscall.SIGKILL
		}
	}
	return false
}

// crashHistory collects what clients did.
type crashHistory struct {
	mu  sync.Mutex
	ops []porcupine.Operation
	// open are the operations whose outcome is unknown, by place in ops.
	open []int
}

func (h *crashHistory) begin(client int, op crashOp, start time.Time) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ops = append(h.ops, porcupine.Operation{ClientId: client, Input: op, Call: start.UnixNano()})
	h.open = append(h.open, len(h.ops)-1)
	return len(h.ops) - 1
}

func (h *crashHistory) end(at int, out any, drop bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ops[at].Output, h.ops[at].Return = out, time.Now().UnixNano()
	if drop {
		h.ops[at].Input = nil
	}
	for i, o := range h.open {
		if o == at {
			h.open = append(h.open[:i], h.open[i+1:]...)
			break
		}
	}
}

// register is the sequential meaning of swaps and reads. A nil output is an unknown outcome.
func register() porcupine.Model {
	return porcupine.Model{
		Partition: func(history []porcupine.Operation) [][]porcupine.Operation {
			byKey := make(map[string][]porcupine.Operation)
			for _, o := range history {
				if op, ok := o.Input.(crashOp); ok {
					byKey[op.Key] = append(byKey[op.Key], o)
				}
			}
			var out [][]porcupine.Operation
			for _, ops := range byKey {
				out = append(out, ops)
			}
			return out
		},
		Init: func() any { return "" },
		Step: func(state, input, output any) (bool, any) {
			op, _ := input.(crashOp)
			res, known := output.(crashResult)
			if op.New == "" {
				return !known || state == res.Old, state
			}
			return !known || state == res.Old, op.New
		},
		Equal: func(a, b any) bool { return a == b },
	}
}

func TestCrash(t *testing.T) {
	if testing.Short() {
		t.Skip("takes long")
	}
	members := crashMembers(t, 3)
	var history crashHistory
	var acked atomic.Int64
	stop := make(chan struct{})
	var clients sync.WaitGroup
	for c := range 4 {
		clients.Go(func() { crashClient(c, members, &history, &acked, stop) })
	}
	kills := killLoop(t, members, *crashFor, &acked)
	close(stop)
	clients.Wait()
	checkCrash(t, members, &history)
	t.Logf("%d kills, %d writes acknowledged, %d of unknown outcome", kills, acked.Load(), len(history.open))
	if acked.Load() == 0 {
		t.Error("nothing was written")
	}
}

func crashMembers(t *testing.T, n int) []*crashMember {
	t.Helper()
	base := t.TempDir()
	var members []*crashMember
	t.Cleanup(func() {
		for _, m := range members {
			m.kill()
		}
	})
	for i := range n {
		m := &crashMember{spec: crashSpec{
			ID: fmt.Sprintf("node%d", i), Dir: filepath.Join(base, fmt.Sprint(i)), Addr: freeAddr(t), HTTP: freeAddr(t),
		}}
		if i > 0 {
			m.spec.Join = members[0].spec.Addr
		}
		m.start(t)
		members = append(members, m)
		key := fmt.Sprintf("hello%d", i)
		waitFor(t, "a member joined", func() bool {
			_, status := swap(members[0], crashOp{Key: key, New: "x"})
			_, ok := readState(m)
			return status == http.StatusOK && ok && hasKey(m, key)
		})
		m.spec.Join = ""
	}
	return members
}

func hasKey(m *crashMember, key string) bool {
	s, ok := readState(m)
	return ok && s.Configs[key] != ""
}

// killLoop kills and restarts members until the time is over and returns how many died.
func killLoop(t *testing.T, members []*crashMember, d time.Duration, acked *atomic.Int64) int {
	t.Helper()
	kills := 0
	for end := time.Now().Add(d); time.Now().Before(end); {
		before := acked.Load()
		waitFor(t, "writes go on", func() bool { return acked.Load() > before+10 })
		time.Sleep(rand.N(500 * time.Millisecond)) // any moment
		victims := rand.Perm(len(members))[:1+rand.IntN(len(members))]
		for _, v := range victims {
			if !members[v].kill() {
				t.Fatalf("member %d ended by itself", v)
			}
			kills++
		}
		time.Sleep(rand.N(600 * time.Millisecond))
		for _, v := range victims {
			members[v].start(t)
		}
	}
	return kills
}

// crashClient swaps registers, through whichever member leads.
func crashClient(id int, members []*crashMember, h *crashHistory, acked *atomic.Int64, stop <-chan struct{}) {
	at := 0
	begin := time.Now()
	for n := 0; ; n++ {
		select {
		case <-stop:
			return
		default:
		}
		// Registers of the same second are shared by all clients.
		op := crashOp{
			Key: fmt.Sprintf("r%d-%d", time.Since(begin)/time.Second, rand.IntN(3)),
			New: fmt.Sprintf("%d.%d", id, n),
		}
		if n%2 == 0 {
			op.New = ""
		}
		place := h.begin(id, op, time.Now())
		res, status := swap(members[at], op)
		switch status {
		case http.StatusOK:
			h.end(place, res, false)
			if op.New != "" {
				acked.Add(1)
			}
		case http.StatusMisdirectedRequest, 0:
			h.end(place, nil, true)
			at = (at + 1) % len(members)
			time.Sleep(5 * time.Millisecond)
		default:
			if op.New == "" {
				h.end(place, nil, true)
			} // else it stays open
			at = (at + 1) % len(members)
		}
	}
}

// swap returns the status of the answer, 0 if the request was certainly not sent and -1 if
// its outcome is unknown.
func swap(m *crashMember, op crashOp) (crashResult, int) {
	var res crashResult
	body, err := json.Marshal(op)
	if err != nil {
		return res, 0
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+m.spec.HTTP+"/swap", strings.NewReader(string(body)))
	if err != nil {
		return res, 0
	}
	req.GetBody = nil // the transport must not send it twice
	answer, err := http.DefaultClient.Do(req)
	if errors.Is(err, syscall.ECONNREFUSED) {
		return res, 0
	}
	if err != nil {
		return res, -1
	}
	defer answer.Body.Close()
	if answer.StatusCode == http.StatusOK && json.NewDecoder(answer.Body).Decode(&res) != nil {
		return res, -1
	}
	_, _ = io.Copy(io.Discard, answer.Body)
	return res, answer.StatusCode
}

type crashState struct {
	Index   uint64            `json:"index"`
	Leading bool              `json:"leading"`
	Configs map[string]string `json:"configs"`
}

func readState(m *crashMember) (crashState, bool) {
	var s crashState
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+m.spec.HTTP+"/state", nil)
	if err != nil {
		return s, false
	}
	answer, err := http.DefaultClient.Do(req)
	if err != nil {
		return s, false
	}
	defer answer.Body.Close()
	return s, json.NewDecoder(answer.Body).Decode(&s) == nil
}

// checkCrash reads every register once more, and checks the history and that all members
// ended with the same state.
func checkCrash(t *testing.T, members []*crashMember, h *crashHistory) {
	t.Helper()
	keys := make(map[string]bool)
	for _, o := range h.ops {
		if op, ok := o.Input.(crashOp); ok {
			keys[op.Key] = true
		}
	}
	for key := range keys {
		op := crashOp{Key: key, New: "final"}
		waitFor(t, "the swarm writes again", func() bool {
			for _, m := range members {
				place := h.begin(-1, op, time.Now())
				res, status := swap(m, op)
				if status == http.StatusOK {
					h.end(place, res, false)
					return true
				}
				if status == 0 || status == http.StatusMisdirectedRequest {
					h.end(place, nil, true)
				}
			}
			return false
		})
	}
	for _, place := range h.open { // may take effect at any later time
		h.ops[place].Return = time.Now().Add(time.Hour).UnixNano()
	}
	switch porcupine.CheckOperationsTimeout(register(), h.ops, time.Minute) {
	case porcupine.Illegal:
		t.Error("the history is not linearizable: an acknowledged write was lost or happened twice, or a reader saw the past")
	case porcupine.Unknown:
		t.Error("the history could not be checked in time")
	case porcupine.Ok:
	}
	waitFor(t, "all members have the same state", func() bool {
		first, ok := readState(members[0])
		for _, m := range members[1:] {
			s, okay := readState(m)
			ok = ok && okay && s.Index == first.Index && fmt.Sprint(s.Configs) == fmt.Sprint(first.Configs)
		}
		return ok
	})
}

func freeAddr(t *testing.T) string {
	t.Helper()
	var lc net.ListenConfig
	lis, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer lis.Close()
	return lis.Addr().String()
}
