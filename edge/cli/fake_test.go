package cli

import (
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/api/types/system"
)

// fakeSwarm answers as much of the Docker API as the commands use. Services get running
// tasks at once, unless behave says otherwise.
type fakeSwarm struct {
	mu       sync.Mutex
	index    uint64
	state    swarm.LocalNodeState
	manager  bool
	services map[string]*swarm.Service
	secrets  map[string]*swarm.Secret
	configs  map[string]*swarm.Config
	networks map[string]network.Inspect
	tasks    []swarm.Task
	calls    []string
	overview string
	// behave makes the tasks of a service that was created or updated.
	behave func(s *swarm.Service) []swarm.Task
	// conflicts is how many updates still answer that the version is old.
	conflicts int
}

func newFake(t *testing.T) (*fakeSwarm, string) {
	t.Helper()
	f := &fakeSwarm{
		state: swarm.LocalNodeStateActive, manager: true, services: map[string]*swarm.Service{},
		secrets: map[string]*swarm.Secret{}, configs: map[string]*swarm.Config{}, networks: map[string]network.Inspect{}, behave: allRun,
	}
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := &httptest.Server{Listener: l, Config: &http.Server{Handler: f}}
	s.Start()
	t.Cleanup(s.Close)
	return f, "unix://" + socket
}

func allRun(s *swarm.Service) []swarm.Task {
	n := uint64(1)
	if r := s.Spec.Mode.Replicated; r != nil && r.Replicas != nil {
		n = *r.Replicas
	}
	var out []swarm.Task
	for i := range n {
		out = append(out, swarm.Task{
			ID: fmt.Sprintf("%s-t%d", s.ID, i+1), ServiceID: s.ID, Slot: int(i + 1), NodeID: "n1", DesiredState: swarm.TaskStateRunning,
			Status: swarm.TaskStatus{State: swarm.TaskStateRunning, Timestamp: time.Now()}, Meta: swarm.Meta{CreatedAt: time.Now()},
		})
	}
	return out
}

func answer(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Api-Version", "1.51")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(v)
}

func refuse(w http.ResponseWriter, code int, format string, args ...any) {
	answer(w, code, map[string]string{"message": fmt.Sprintf(format, args...)})
}

func (f *fakeSwarm) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	path := r.URL.Path
	if strings.HasPrefix(path, "/v1.") {
		path = path[strings.Index(path[1:], "/")+1:]
	}
	f.calls = append(f.calls, r.Method+" "+path)
	var filters map[string]map[string]bool
	_ = json.Unmarshal([]byte(r.URL.Query().Get("filters")), &filters)
	kind, rest, _ := strings.Cut(path[1:], "/")
	switch {
	case kind == "_ping":
		w.Header().Set("Api-Version", "1.51")
	case kind == "info":
		answer(w, 200, system.Info{Name: "n1", ServerVersion: "1", DockerRootDir: "/data", Swarm: swarm.Info{
			NodeID: "n1", NodeAddr: "10.0.0.1", LocalNodeState: f.state, ControlAvailable: f.manager, Managers: 1, Nodes: 1,
		}})
	case kind == "nodes" && rest == "":
		answer(w, 200, []swarm.Node{f.node()})
	case kind == "nodes":
		answer(w, 200, f.node())
	case path == "/swarm/init":
		f.state = swarm.LocalNodeStateActive
		answer(w, 200, "n1")
	case path == "/swarm/join":
		f.state, f.manager = swarm.LocalNodeStateActive, false
	case path == "/swarm/leave":
		f.state = swarm.LocalNodeStateInactive
	case kind == "swarm":
		answer(w, 200, swarm.Swarm{JoinTokens: swarm.JoinTokens{Worker: "SWMTKN-1-w", Manager: "SWMTKN-1-m"}})
	case path == "/skep/v1/overview" && f.overview != "":
		_, _ = w.Write([]byte(f.overview))
	case path == "/skep/v1/explain" && r.URL.Query().Get("target") == "web":
		_, _ = w.Write([]byte(`{"serviceId":"s1","serviceName":"web","notes":["1 task waits for a node"],"tasks":[{"taskId":"t1","name":"web.1",` +
			`"state":"pending","desiredState":"running","error":"no suitable node","refusals":[{"filter":"constraint","reason":"node.role==worker","nodeIds":["n1"],"nodeNames":["n1"]}]}]}`))
	case path == "/skep/v1/networks/check" && r.Method == http.MethodPost:
		if q := r.URL.Query().Get("target"); q == "nothing" {
			refuse(w, 404, "there is no network or service nothing")
			return
		} else if q == "clean" {
			_, _ = w.Write([]byte(`{"nodes":[{"nodeId":"n1","nodeName":"n1"},{"nodeId":"n2","nodeName":"n2","unchecked":"the node is down"}]}`))
			return
		}
		_, _ = w.Write([]byte(`{"nodes":[{"nodeId":"n1","nodeName":"n1","differences":[{"kind":"link","networkIds":["x"],"networkNames":["back"],"text":"bridge is missing","mended":true}]},` +
			`{"nodeId":"n2","nodeName":"n2","unchecked":"no answer","missing":true},{"nodeId":"n3","nodeName":"n3","differences":[{"kind":"rules","text":"rules differ"}],"error":"no room"}]}`))
	case path == "/skep/v1/explain":
		refuse(w, 404, "no such service or task: %s", r.URL.Query().Get("target"))
	case kind == "tasks" && rest != "":
		id, verb, _ := strings.Cut(rest, "/")
		i := slices.IndexFunc(f.tasks, func(t swarm.Task) bool { return t.ID == id })
		if i < 0 {
			refuse(w, 404, "task %s not found", id)
			return
		}
		if verb == "logs" {
			f.serveLogs(w, f.tasks[i])
			return
		}
		answer(w, 200, f.tasks[i])
	case kind == "tasks":
		out := []swarm.Task{}
		for _, t := range f.tasks {
			s := f.services[t.ServiceID]
			if ids := filters["service"]; len(ids) > 0 && !ids[t.ServiceID] && (s == nil || !ids[s.Spec.Name]) {
				continue
			}
			out = append(out, t)
		}
		answer(w, 200, out)
	case kind == "services":
		f.serveServices(w, r, rest, filters)
	case kind == "secrets":
		f.serveSecrets(w, r, rest)
	case kind == "configs":
		f.serveConfigs(w, r, rest)
	case kind == "networks":
		f.serveNetworks(w, r, rest, filters)
	default:
		refuse(w, 404, "page not found")
	}
}

func (f *fakeSwarm) node() swarm.Node {
	return swarm.Node{
		ID: "n1", Description: swarm.NodeDescription{Hostname: "n1"}, Status: swarm.NodeStatus{State: swarm.NodeStateReady, Addr: "10.0.0.1"},
		Spec:          swarm.NodeSpec{Role: swarm.NodeRoleManager, Availability: swarm.NodeAvailabilityActive},
		ManagerStatus: &swarm.ManagerStatus{Leader: true, Reachability: swarm.ReachabilityReachable, Addr: "10.0.0.1:2377"},
	}
}

func (f *fakeSwarm) find(name string) *swarm.Service {
	for _, s := range f.services {
		if s.ID == name || s.Spec.Name == name {
			return s
		}
	}
	return nil
}

func (f *fakeSwarm) retask(s *swarm.Service) {
	f.tasks = slices.DeleteFunc(f.tasks, func(t swarm.Task) bool { return t.ServiceID == s.ID })
	f.tasks = append(f.tasks, f.behave(s)...)
}

func (f *fakeSwarm) serveServices(w http.ResponseWriter, r *http.Request, rest string, filters map[string]map[string]bool) {
	id, verb, _ := strings.Cut(rest, "/")
	s := f.find(id)
	switch {
	case r.Method == http.MethodGet && rest == "":
		out := []swarm.Service{}
		for _, name := range slices.Sorted(maps.Keys(f.services)) {
			s := f.services[name]
			ok := true
			for label := range filters["label"] {
				k, v, _ := strings.Cut(label, "=")
				ok = ok && s.Spec.Labels[k] == v
			}
			if ok {
				out = append(out, *s)
			}
		}
		answer(w, 200, out)
	case rest == "create":
		var spec swarm.ServiceSpec
		_ = json.NewDecoder(r.Body).Decode(&spec)
		f.index++
		s := &swarm.Service{ID: "id-" + spec.Name, Meta: swarm.Meta{Version: swarm.Version{Index: f.index}}, Spec: spec}
		f.services[s.ID] = s
		f.retask(s)
		answer(w, 201, swarm.ServiceCreateResponse{ID: s.ID})
	case s == nil:
		refuse(w, 404, "service %s not found", id)
	case verb == "update" && (f.conflicts > 0 || r.URL.Query().Get("version") != s.Version.String()):
		f.conflicts--
		refuse(w, 500, "rpc error: code = Unknown desc = update out of sequence")
	case verb == "update":
		s.Spec = swarm.ServiceSpec{}
		_ = json.NewDecoder(r.Body).Decode(&s.Spec)
		f.index++
		s.Version.Index = f.index
		f.retask(s)
		answer(w, 200, map[string]any{})
	case verb == "logs":
		f.serveLogs(w, f.tasks[slices.IndexFunc(f.tasks, func(t swarm.Task) bool { return t.ServiceID == s.ID })])
	case r.Method == http.MethodDelete:
		delete(f.services, s.ID)
		f.tasks = slices.DeleteFunc(f.tasks, func(t swarm.Task) bool { return t.ServiceID == s.ID })
	default:
		answer(w, 200, s)
	}
}

func (f *fakeSwarm) serveLogs(w http.ResponseWriter, t swarm.Task) {
	w.Header().Set("Content-Type", "application/vnd.docker.multiplexed-stream")
	for stream, line := range map[stdcopy.StdType]string{stdcopy.Stdout: "hello", stdcopy.Stderr: "oops"} {
		text := fmt.Sprintf("com.docker.swarm.node.id=n1,com.docker.swarm.service.id=%s,com.docker.swarm.task.id=%s %s\n", t.ServiceID, t.ID, line)
		frame := append([]byte{byte(stream), 0, 0, 0, 0, 0, 0, byte(len(text))}, text...)
		_, _ = w.Write(frame)
	}
}

func (f *fakeSwarm) serveSecrets(w http.ResponseWriter, r *http.Request, rest string) {
	id, verb, _ := strings.Cut(rest, "/")
	s := f.secrets[strings.TrimPrefix(id, "id-")]
	switch {
	case rest == "":
		answer(w, 200, slices.Collect(maps.Values(f.secrets)))
	case rest == "create":
		var spec swarm.SecretSpec
		_ = json.NewDecoder(r.Body).Decode(&spec)
		f.secrets[spec.Name] = &swarm.Secret{ID: "id-" + spec.Name, Spec: spec}
		answer(w, 201, swarm.SecretCreateResponse{ID: "id-" + spec.Name})
	case s == nil:
		refuse(w, 404, "secret %s not found", id)
	case verb == "update":
		var spec swarm.SecretSpec
		_ = json.NewDecoder(r.Body).Decode(&spec)
		if string(spec.Data) != string(s.Spec.Data) {
			refuse(w, 400, "rpc error: code = InvalidArgument desc = only updates to Labels are allowed")
		}
	case r.Method == http.MethodDelete:
		delete(f.secrets, s.Spec.Name)
		w.WriteHeader(http.StatusNoContent)
	default:
		answer(w, 200, s)
	}
}

func (f *fakeSwarm) serveConfigs(w http.ResponseWriter, r *http.Request, rest string) {
	id, verb, _ := strings.Cut(rest, "/")
	c := f.configs[strings.TrimPrefix(id, "id-")]
	switch {
	case rest == "":
		answer(w, 200, slices.Collect(maps.Values(f.configs)))
	case rest == "create":
		var spec swarm.ConfigSpec
		_ = json.NewDecoder(r.Body).Decode(&spec)
		f.configs[spec.Name] = &swarm.Config{ID: "id-" + spec.Name, Spec: spec}
		answer(w, 201, swarm.ConfigCreateResponse{ID: "id-" + spec.Name})
	case c == nil:
		refuse(w, 404, "config %s not found", id)
	case verb == "update":
	case r.Method == http.MethodDelete:
		delete(f.configs, c.Spec.Name)
		w.WriteHeader(http.StatusNoContent)
	default:
		answer(w, 200, c)
	}
}

func (f *fakeSwarm) serveNetworks(w http.ResponseWriter, r *http.Request, rest string, filters map[string]map[string]bool) {
	name := strings.TrimPrefix(rest, "id-")
	n, ok := f.networks[name]
	switch {
	case rest == "":
		out := []network.Inspect{}
		for _, n := range f.networks {
			ok := true
			for label := range filters["label"] {
				k, v, _ := strings.Cut(label, "=")
				ok = ok && n.Labels[k] == v
			}
			if ok {
				out = append(out, n)
			}
		}
		answer(w, 200, out)
	case rest == "create":
		var req network.CreateRequest
		_ = json.NewDecoder(r.Body).Decode(&req)
		n.Name, n.ID, n.Scope, n.Driver, n.Labels, n.Attachable = req.Name, "id-"+req.Name, "swarm", req.Driver, req.Labels, req.Attachable
		f.networks[req.Name] = n
		answer(w, 201, network.CreateResponse{ID: n.ID})
	case !ok:
		refuse(w, 404, "network %s not found", rest)
	case r.Method == http.MethodDelete:
		delete(f.networks, name)
		w.WriteHeader(http.StatusNoContent)
	default:
		answer(w, 200, n)
	}
}
