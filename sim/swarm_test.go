package sim

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/moby/moby/api/types/swarm"
	"go.etcd.io/etcd/server/v3/storage/wal"

	"github.com/skep-dev/skep/node"
	"github.com/skep-dev/skep/sim/memnet"
	"github.com/skep-dev/skep/worker/runtime/fake"
)

func TestMain(m *testing.M) {
	wal.SegmentSizeBytes = 1 << 20 // many segments, and little to copy at a crash
	os.Exit(m.Run())
}

// world is a swarm in a bubble.
type world struct {
	t        *testing.T
	random   *rand.Rand
	base     string
	net      *memnet.Network // between the nodes
	desk     *memnet.Network // from the user to the nodes' API; never faulty
	machines []*machine
	watch    watcher
}

// machine is one computer: what survives its daemon.
type machine struct {
	w        *world
	name, ip string
	dir      string
	engine   *fake.Engine
	id       string // of the node, once it has joined

	// up says whether the daemon runs; stop and done are set then.
	up   atomic.Bool
	stop context.CancelFunc
	done chan error
}

// inWorld runs a test in a bubble with n machines, none of which is in a swarm yet.
func inWorld(t *testing.T, seed uint64, n int, test func(*world)) {
	t.Helper()
	if raceEnabled {
		t.Skip("the race detector kills bubbles with many timers (golang.org/issue/76691)")
	}
	base := t.TempDir()
	if shm, err := os.MkdirTemp("/dev/shm", "skep-sim"); err == nil { //nolint:usetesting // where fsync costs nothing
		base = shm
		t.Cleanup(func() { _ = os.RemoveAll(shm) })
	}
	synctest.Test(t, func(t *testing.T) {
		random := rand.New(rand.NewPCG(seed, 0))
		w := &world{
			t: t, random: random, base: base,
			net:  memnet.New(rand.New(rand.NewPCG(seed, 1))),
			desk: memnet.New(rand.New(rand.NewPCG(seed, 2))),
		}
		w.net.SetDelay(100*time.Microsecond, time.Millisecond)
		w.watch = newWatcher(w)
		defer w.end()
		for i := range n {
			m := &machine{w: w, name: fmt.Sprintf("m%d", i+1), ip: fmt.Sprintf("10.0.0.%d", i+1)}
			m.dir = filepath.Join(base, m.name)
			m.engine = fake.New(fake.Config{
				PullTime: 300 * time.Millisecond, StartTime: 100 * time.Millisecond, StopTime: 200 * time.Millisecond,
			})
			w.machines = append(w.machines, m)
			m.start()
		}
		test(w)
	})
}

// end stops everything; the bubble then fails the test if a goroutine is left.
func (w *world) end() {
	w.net.Heal()
	w.watch.stop()
	for _, m := range w.machines {
		if m.running() {
			m.halt()
		}
	}
}

func (m *machine) running() bool { return m.up.Load() }

// log writes to standard error if the test was asked to, else nowhere.
func (m *machine) log() *slog.Logger {
	if !*logFlag {
		return slog.New(slog.DiscardHandler)
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug})).With(slog.String("machine", m.name))
}

// start runs the daemon.
func (m *machine) start() {
	m.w.net.SetDown(m.ip, false)
	m.w.desk.SetDown(m.ip, false)
	ctx, stop := context.WithCancel(context.Background())
	listen, err := m.w.desk.Host(m.ip).Listen(ctx, m.ip+":80")
	if err != nil {
		m.w.t.Fatal(err)
	}
	done := make(chan error, 1)
	m.stop, m.done = stop, done
	m.up.Store(true)
	data, exec := filepath.Join(m.dir, "data"), filepath.Join(m.dir, "exec")
	release, err := node.Lock(data, exec)
	if err != nil {
		m.w.t.Fatal(err)
	}
	go func() {
		defer release()
		done <- node.Run(ctx, node.Config{
			DataRoot: data, ExecRoot: exec,
			Listeners: []net.Listener{listen}, Network: m.w.net.Host(m.ip),
			AdvertiseAddr: m.ip, ListenAddr: m.ip + ":2377",
			Hostname: m.name, Version: "sim", Engine: m.engine, Log: m.log(),
		})
	}()
}

// halt stops the daemon as SIGTERM does; its containers go on.
func (m *machine) halt() {
	m.up.Store(false)
	m.stop()
	if err := <-m.done; err != nil && !errors.Is(err, context.Canceled) {
		m.w.t.Errorf("daemon of %s ended with %v", m.name, err)
	}
	m.stop, m.done = nil, nil
	m.w.net.SetDown(m.ip, true)
	m.w.desk.SetDown(m.ip, true)
}

// kill ends the daemon as kill -9 does: nobody hears of it, and nothing that it does from
// now on reaches its disk. Its containers go on.
func (m *machine) kill() {
	m.up.Store(false)
	m.w.net.SetDown(m.ip, true)
	m.w.desk.SetDown(m.ip, true)
	synctest.Wait() // no write is half done in a way that a kill could not leave
	image := m.dir + ".image"
	if err := copyTree(m.dir, image); err != nil {
		m.w.t.Fatalf("copy the disk of %s: %v", m.name, err)
	}
	m.stop()
	<-m.done
	m.stop, m.done = nil, nil
	if err := errors.Join(os.RemoveAll(m.dir), os.Rename(image, m.dir)); err != nil {
		m.w.t.Fatal(err)
	}
}

// powerOff kills the daemon and all containers.
func (m *machine) powerOff() {
	m.kill()
	m.engine.Reboot()
}

// copyTree copies files; raft's files in preparation, which are empty, stay behind.
func copyTree(from, to string) error {
	return filepath.WalkDir(from, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		target := filepath.Join(to, rel)
		switch {
		case d.IsDir():
			return os.MkdirAll(target, 0o700)
		case strings.HasSuffix(path, ".tmp"):
			return nil
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		return os.WriteFile(target, data, info.Mode())
	})
}

// isolate cuts a machine off from all others, in both directions.
func (m *machine) isolate() {
	for _, o := range m.w.machines {
		if o != m {
			m.w.net.Cut(m.ip, o.ip)
			m.w.net.Cut(o.ip, m.ip)
		}
	}
}

// refusal is an answer of the API that is not success.
type refusal struct {
	code int
	text string
}

// Error returns the API's text.
func (r *refusal) Error() string { return fmt.Sprintf("%d: %s", r.code, r.text) }

// call makes one request to the machine's API, as a client does.
func (m *machine) call(method, path string, in, out any) error {
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	var body bytes.Buffer
	if in != nil {
		if err := json.NewEncoder(&body).Encode(in); err != nil {
			return err
		}
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://"+m.ip+":80"+path, &body)
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	user := m.w.desk.Host("10.9.9.1")
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(ctx context.Context, _, addr string) (net.Conn, error) { return user.Dial(ctx, addr) },
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode >= 300 {
		var message struct{ Message string }
		_ = json.Unmarshal(data, &message)
		return &refusal{code: resp.StatusCode, text: message.Message}
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(data, out)
}

// callTimeout is how long a user waits for an answer.
const callTimeout = 25 * time.Second

// must makes a request that has to succeed.
func (m *machine) must(method, path string, in, out any) {
	m.w.t.Helper()
	if err := m.call(method, path, in, out); err != nil {
		m.w.t.Fatalf("%s %s on %s: %v", method, path, m.name, err)
	}
}

// found makes the first machine found a swarm and the others join it: managers in all,
// the rest as workers.
func (w *world) found(managers int) {
	w.t.Helper()
	first := w.machines[0]
	first.must("POST", "/swarm/init", swarm.InitRequest{ListenAddr: first.ip + ":2377", AdvertiseAddr: first.ip}, &first.id)
	var cluster swarm.Swarm
	first.must("GET", "/swarm", nil, &cluster)
	for i, m := range w.machines[1:] {
		token := cluster.JoinTokens.Worker
		if i+1 < managers {
			token = cluster.JoinTokens.Manager
		}
		m.must("POST", "/swarm/join", swarm.JoinRequest{
			ListenAddr: m.ip + ":2377", AdvertiseAddr: m.ip, RemoteAddrs: []string{first.ip + ":2377"}, JoinToken: token,
		}, nil)
		var info struct{ Swarm swarm.Info }
		m.must("GET", "/info", nil, &info)
		m.id = info.Swarm.NodeID
	}
	w.await("the nodes are ready", time.Minute, func() error { return w.nodesReady() })
	w.watch.start()
}

// any makes a request to the running machines until one that is a manager answers.
func (w *world) any(method, path string, in, out any) error {
	err := errors.New("no daemon runs")
	for _, i := range w.random.Perm(len(w.machines)) {
		if m := w.machines[i]; m.running() {
			if err = m.call(method, path, in, out); err == nil || !notApplied(err) {
				return err
			}
		}
	}
	return err
}

// notApplied reports whether an error means that the request surely changed nothing.
func notApplied(err error) bool {
	r, ok := errors.AsType[*refusal](err)
	return ok && (r.code < 500 || r.code == http.StatusNotImplemented || strings.Contains(r.text, "not a swarm manager"))
}

// await polls until check finds nothing wrong.
func (w *world) await(what string, limit time.Duration, check func() error) {
	w.t.Helper()
	var err error
	for end := time.Now().Add(limit); time.Now().Before(end); w.sleep(250 * time.Millisecond) {
		if err = check(); err == nil {
			return
		}
	}
	w.t.Fatalf("after %v it is not true that %s: %v", limit, what, err)
}

// sleep lets time pass and looks at what must hold all the time.
func (w *world) sleep(d time.Duration) {
	w.t.Helper()
	for d > 0 {
		step := min(d, 100*time.Millisecond)
		time.Sleep(step)
		d -= step
		w.always()
	}
}

// leader returns the machine that leads, as the running managers say.
func (w *world) leader() *machine {
	w.t.Helper()
	var found *machine
	w.await("there is a leader", time.Minute, func() error {
		var nodes []swarm.Node
		if err := w.any("GET", "/nodes", nil, &nodes); err != nil {
			return err
		}
		for _, n := range nodes {
			if n.ManagerStatus != nil && n.ManagerStatus.Leader {
				if m := w.machine(n.ID); m != nil && m.running() {
					found = m
					return nil
				}
			}
		}
		return errors.New("nobody leads")
	})
	return found
}

func (w *world) machine(id string) *machine {
	for _, m := range w.machines {
		if m.id == id {
			return m
		}
	}
	return nil
}

// service returns a spec of replicas that run the fake's script.
func service(name string, replicas uint64, script ...string) swarm.ServiceSpec {
	s := swarm.ServiceSpec{
		Annotations: swarm.Annotations{Name: name},
		TaskTemplate: swarm.TaskSpec{
			ContainerSpec: &swarm.ContainerSpec{Image: "web:1", Args: script},
		},
		Mode: swarm.ServiceMode{Replicated: &swarm.ReplicatedService{Replicas: &replicas}},
	}
	delay := time.Second
	s.TaskTemplate.RestartPolicy = &swarm.RestartPolicy{Condition: swarm.RestartPolicyConditionAny, Delay: &delay}
	return s
}

// create makes a service through any manager and returns its id.
func (w *world) create(spec swarm.ServiceSpec) (string, error) {
	var resp swarm.ServiceCreateResponse
	err := w.any("POST", "/services/create", spec, &resp)
	return resp.ID, err
}

func (w *world) mustCreate(spec swarm.ServiceSpec) string {
	w.t.Helper()
	id, err := w.create(spec)
	if err != nil {
		w.t.Fatalf("create service %s: %v", spec.Name, err)
	}
	return id
}

// update changes a service through any manager.
func (w *world) update(id string, change func(*swarm.ServiceSpec)) error {
	var s swarm.Service
	if err := w.any("GET", "/services/"+id, nil, &s); err != nil {
		return &refusal{code: 400, text: err.Error()} // nothing was asked for yet
	}
	change(&s.Spec)
	return w.any("POST", "/services/"+id+"/update?version="+strconv.FormatUint(s.Version.Index, 10), s.Spec, nil)
}

// tasks returns the tasks of a service.
func (w *world) tasks(id string) ([]swarm.Task, error) {
	var all, out []swarm.Task
	err := w.any("GET", "/tasks", nil, &all)
	for _, t := range all {
		if t.ServiceID == id {
			out = append(out, t)
		}
	}
	return out, err
}

// watcher checks the managers' state as it changes; see check_test.go.
type watcher struct {
	w      *world
	cancel context.CancelFunc
	group  *sync.WaitGroup
	faults *faults
}
