package sim

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/api/types/swarm"
)

// user works with a swarm and remembers what it was told, while faults happen.
type user struct {
	w *world
	// random chooses what the user does, chaos what fails. Each belongs to one goroutine
	// at a time.
	random, chaos *rand.Rand
	next          int
	configs       map[string][]byte // acknowledged
	services      map[string]*wish  // by name
	restless      bool              // there are services whose tasks end by themselves
	trace         []string          // what happened, for the report of a failure
}

// wish is what a user knows of one service.
type wish struct {
	id string // empty while its creation was not answered
	// replicas are the counts that may hold: one after an answer, more without.
	replicas map[uint64]bool
	// gone is set when the removal was not answered.
	gone bool
}

func newUser(w *world, seed uint64) *user {
	return &user{
		w: w, random: rand.New(rand.NewPCG(seed, 3)), chaos: rand.New(rand.NewPCG(seed, 4)),
		configs: map[string][]byte{}, services: map[string]*wish{},
	}
}

// live works among faults for a time, then heals everything and checks it.
func (u *user) live(length time.Duration) {
	w := u.w
	defer func() {
		for _, line := range u.trace {
			if w.t.Failed() || *logFlag {
				w.t.Log(line)
			}
		}
	}()
	for end := time.Now().Add(length); time.Now().Before(end); {
		act := u.choose()
		begin := u.chaos.IntN(800)
		done := make(chan string, 1)
		go func() { done <- act() }()
		w.sleep(time.Duration(begin) * time.Millisecond)
		fault := u.fault()
		u.trace = append(u.trace, time.Now().Format("15:04:05.000 ")+fault)
		for answered := false; !answered; {
			select {
			case what := <-done:
				u.trace = append(u.trace, time.Now().Format("15:04:05.000 ")+what)
				answered = true
			default:
				w.sleep(100 * time.Millisecond)
			}
		}
		w.sleep(time.Duration(u.chaos.IntN(2000)) * time.Millisecond)
	}
	u.heal()
	w.await("all services converge after healing", 5*time.Minute, func() error {
		return errors.Join(w.converged(), u.kept())
	})
	patience := time.Millisecond
	if u.restless {
		patience = time.Minute // for a moment at which no task is being replaced
	}
	for range 3 {
		w.sleep(5 * time.Second)
		w.await("what had converged stays so", patience, func() error {
			return errors.Join(w.converged(), u.kept())
		})
	}
}

// told turns the outcome of a request into words.
func told(what string, err error) string {
	switch {
	case err == nil:
		return what + ": done"
	case notApplied(err):
		return what + ": refused: " + err.Error()
	default:
		return what + ": no answer: " + err.Error()
	}
}

// choose returns what the user does next. The function may run beside a fault.
func (u *user) choose() func() string {
	names := slices.Sorted(maps.Keys(u.services))
	names = slices.DeleteFunc(names, func(n string) bool { return u.services[n].id == "" })
	dice := u.random.IntN(100)
	switch {
	case dice < 35 || len(names) == 0 && dice >= 50 && dice < 88:
		return u.writeConfig
	case dice < 50 && len(u.services) < 8 || len(names) == 0:
		return u.addService
	case dice < 68 && len(names) > 0:
		return func() string { return u.scale(names[u.random.IntN(len(names))]) }
	case dice < 80:
		return func() string { return u.roll(names[u.random.IntN(len(names))]) }
	case dice < 88:
		return func() string { return u.removeService(names[u.random.IntN(len(names))]) }
	case dice < 94:
		return u.drain
	default:
		return u.promote
	}
}

func (u *user) name(kind string) string {
	u.next++
	return kind + strconv.Itoa(u.next)
}

func (u *user) writeConfig() string {
	name := u.name("config")
	data := []byte("content of " + name)
	err := u.w.any("POST", "/configs/create", swarm.ConfigSpec{Annotations: swarm.Annotations{Name: name}, Data: data}, nil)
	if err == nil {
		u.configs[name] = data
	}
	return told("write "+name, err)
}

func (u *user) addService() string {
	n := uint64(u.random.IntN(6))
	spec := service(u.name("service"), n)
	switch u.random.IntN(4) {
	case 0:
		n = 1
		spec = fence(service(u.name(fencedName), n))
	case 1:
		spec = service(spec.Name, n, "exit", "1", "after", "20s")
		u.restless = true
	case 2:
		spec.TaskTemplate.ContainerSpec.Args = []string{"ignore"} // must be killed
	}
	parallel := uint64(1 + u.random.IntN(2))
	order := []swarm.UpdateOrder{swarm.UpdateOrderStopFirst, swarm.UpdateOrderStartFirst}[u.random.IntN(2)]
	if strings.HasPrefix(spec.Name, fencedName) {
		order = swarm.UpdateOrderStopFirst
	}
	spec.UpdateConfig = &swarm.UpdateConfig{Parallelism: parallel, Order: order, FailureAction: swarm.UpdateFailureActionContinue}
	id, err := u.w.create(spec)
	if err == nil || !notApplied(err) {
		u.services[spec.Name] = &wish{id: id, replicas: map[uint64]bool{n: true}}
	}
	return told(fmt.Sprintf("create %s of %d", spec.Name, n), err)
}

func (u *user) scale(name string) string {
	s, n := u.services[name], uint64(u.random.IntN(7))
	if strings.HasPrefix(name, fencedName) {
		n = uint64(u.random.IntN(3))
	}
	err := u.w.update(s.id, func(spec *swarm.ServiceSpec) { spec.Mode.Replicated.Replicas = &n })
	switch {
	case err == nil:
		s.replicas = map[uint64]bool{n: true}
	case !notApplied(err):
		s.replicas[n] = true
	}
	return told(fmt.Sprintf("scale %s to %d", name, n), err)
}

// roll changes the environment, which replaces all tasks.
func (u *user) roll(name string) string {
	u.next++
	env := "VERSION=" + strconv.Itoa(u.next)
	err := u.w.update(u.services[name].id, func(spec *swarm.ServiceSpec) { spec.TaskTemplate.ContainerSpec.Env = []string{env} })
	return told("update "+name, err)
}

func (u *user) removeService(name string) string {
	s := u.services[name]
	err := u.w.any("DELETE", "/services/"+s.id, nil, nil)
	r, refused := errors.AsType[*refusal](err)
	switch {
	case err == nil || refused && r.code == 404 && s.gone:
		delete(u.services, name)
	case !notApplied(err):
		s.gone = true
	}
	return told("remove "+name, err)
}

// changeNode edits a node's spec.
func (u *user) changeNode(m *machine, change func(*swarm.NodeSpec)) error {
	var n swarm.Node
	if err := u.w.any("GET", "/nodes/"+m.id, nil, &n); err != nil {
		return err
	}
	change(&n.Spec)
	return u.w.any("POST", "/nodes/"+m.id+"/update?version="+strconv.FormatUint(n.Version.Index, 10), n.Spec, nil)
}

func (u *user) drain() string {
	m := u.w.machines[u.random.IntN(len(u.w.machines))]
	to := []swarm.NodeAvailability{swarm.NodeAvailabilityDrain, swarm.NodeAvailabilityActive, swarm.NodeAvailabilityPause}[u.random.IntN(3)]
	err := u.changeNode(m, func(s *swarm.NodeSpec) { s.Availability = to })
	return told(fmt.Sprintf("make %s %s", m.name, to), err)
}

func (u *user) promote() string {
	m := u.w.machines[u.random.IntN(len(u.w.machines))]
	to := swarm.NodeRoleManager
	err := u.changeNode(m, func(s *swarm.NodeSpec) {
		if s.Role == swarm.NodeRoleManager {
			to = swarm.NodeRoleWorker
		}
		s.Role = to
	})
	return told(fmt.Sprintf("make %s a %s", m.name, to), err)
}

// fault makes something fail or work again, and says what.
func (u *user) fault() string {
	w := u.w
	m := w.machines[u.chaos.IntN(len(w.machines))]
	other := w.machines[u.chaos.IntN(len(w.machines))]
	var off []*machine
	for _, o := range w.machines {
		if !o.running() {
			off = append(off, o)
		}
	}
	dice := u.chaos.IntN(100)
	switch {
	case len(off) > 2 || len(off) > 0 && dice < 35:
		m = off[u.chaos.IntN(len(off))]
		m.start()
		return "start " + m.name
	case dice < 50 && m.running():
		m.kill()
		return "kill " + m.name
	case dice < 54 && m.running():
		m.powerOff()
		return "power off " + m.name
	case dice < 58 && m.running():
		m.halt()
		return "stop " + m.name
	case dice < 66:
		m.isolate()
		return "isolate " + m.name
	case dice < 70 && m != other:
		w.net.Cut(m.ip, other.ip)
		return fmt.Sprintf("cut %s to %s", m.name, other.name)
	case dice < 86:
		w.net.Heal()
		return "heal the network"
	case dice < 94:
		loss := []float64{0, 0, 0.02, 0.1}[u.chaos.IntN(4)]
		most := time.Duration(1+u.chaos.IntN(80)) * time.Millisecond
		w.net.SetLoss(loss)
		w.net.SetDelay(100*time.Microsecond, most)
		return fmt.Sprintf("lose %.2f, delay to %v", loss, most)
	case dice < 97:
		w.sleep(time.Duration(5+u.chaos.IntN(30)) * time.Second)
		return "a quiet time"
	default:
		return "no fault"
	}
}

// heal ends all faults and lets all nodes take tasks.
func (u *user) heal() {
	w := u.w
	w.net.Heal()
	w.net.SetLoss(0)
	w.net.SetDelay(100*time.Microsecond, time.Millisecond)
	for _, m := range w.machines {
		if !m.running() {
			m.start()
		}
	}
	u.trace = append(u.trace, time.Now().Format("15:04:05.000 ")+"healed")
	for _, m := range w.machines {
		w.await("node "+m.name+" can be made active", 2*time.Minute, func() error {
			return u.changeNode(m, func(s *swarm.NodeSpec) { s.Availability = swarm.NodeAvailabilityActive })
		})
	}
}

// kept checks that everything acknowledged is there, and nothing that was never asked for.
func (u *user) kept() error {
	var configs []swarm.Config
	if err := u.w.any("GET", "/configs", nil, &configs); err != nil {
		return err
	}
	have := map[string][]byte{}
	for _, c := range configs {
		have[c.Spec.Name] = c.Spec.Data
	}
	for name, data := range u.configs {
		if !bytes.Equal(have[name], data) {
			return fmt.Errorf("acknowledged %s is lost: %q", name, have[name])
		}
	}
	var services []swarm.Service
	if err := u.w.any("GET", "/services", nil, &services); err != nil {
		return err
	}
	seen := map[string]bool{}
	for _, s := range services {
		name := s.Spec.Name
		seen[name] = true
		wish := u.services[name]
		switch {
		case wish == nil:
			return fmt.Errorf("service %s was removed and is there", name)
		case !wish.replicas[*s.Spec.Mode.Replicated.Replicas]:
			return fmt.Errorf("service %s has %d replicas, want one of %v", name, *s.Spec.Mode.Replicated.Replicas, wish.replicas)
		}
	}
	for name, wish := range u.services {
		if !seen[name] && wish.id != "" && !wish.gone {
			return fmt.Errorf("acknowledged service %s is lost", name)
		}
	}
	return nil
}
