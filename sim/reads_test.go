package sim

import (
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"github.com/moby/moby/api/types/swarm"
)

// register is what one client does to the label of a config: it reads it or, if To is not
// empty, changes it from what it read.
type register struct{ From, To string }

// registers is the sequential meaning of that. The output of a read is the label, of a change
// whether it was done, and nil if nobody knows.
func registers() porcupine.Model {
	return porcupine.Model{
		Init: func() any { return "" },
		Step: func(state, input, output any) (bool, any) {
			in, _ := input.(register)
			if in.To == "" {
				return state == output, state
			}
			done, known := output.(bool)
			if !known {
				if state == in.From {
					return true, in.To
				}
				return true, state // one that was never done comes last
			}
			if !done {
				return state != in.From, state
			}
			return state == in.From, in.To
		},
	}
}

// readers has clients of all machines read and change one config.
type readers struct {
	w  *world
	id string

	mu  sync.Mutex
	ops []porcupine.Operation
}

func (r *readers) add(client int, call time.Time, in register, out any) {
	op := porcupine.Operation{ClientId: client, Input: in, Output: out, Call: call.UnixNano(), Return: time.Now().UnixNano()}
	if out == nil {
		op.Return = call.Add(time.Hour).UnixNano() // happens at any later time, or never
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ops = append(r.ops, op)
}

// read asks one machine and returns what it answered.
func (r *readers) read(m *machine, client int) (c swarm.Config, err error) {
	call := time.Now()
	if err = m.call("GET", "/configs/"+r.id, nil, &c); err == nil {
		r.add(client, call, register{}, c.Spec.Labels["v"])
	}
	return c, err
}

func (r *readers) change(m *machine, client int, label string) {
	c, err := r.read(m, client)
	if err != nil {
		return
	}
	in := register{From: c.Spec.Labels["v"], To: label}
	c.Spec.Labels = map[string]string{"v": label}
	call := time.Now()
	err = m.call("POST", "/configs/"+r.id+"/update?version="+strconv.FormatUint(c.Version.Index, 10), c.Spec, nil)
	switch {
	case err == nil:
		r.add(client, call, in, true)
	case strings.Contains(err.Error(), "update out of sequence"):
		r.add(client, call, in, false)
	case !notApplied(err):
		r.add(client, call, in, nil)
	}
}

// work lets a reader and a writer loose on each machine until stop is closed.
func (r *readers) work(stop <-chan struct{}) {
	var clients sync.WaitGroup
	for i, m := range r.w.machines {
		for j, act := range []func(client, n int){
			func(client, _ int) { _, _ = r.read(m, client) },
			func(client, n int) { r.change(m, client, strconv.Itoa(client)+"."+strconv.Itoa(n)) },
		} {
			client := 2*i + j
			random := rand.New(rand.NewPCG(9, uint64(client)))
			clients.Go(func() {
				for n := 0; ; n++ {
					select {
					case <-stop:
						return
					case <-time.After(time.Duration(random.IntN(60)) * time.Millisecond):
						act(client, n)
					}
				}
			})
		}
	}
	clients.Wait()
}

// A manager that was cut off showed what had changed since: `ls` and `inspect` through it
// answered from its own state until it noticed that it did not lead any more.
func TestNobodyReadsThePast(t *testing.T) {
	inWorld(t, 7, 3, func(w *world) {
		w.found(3)
		reads, open := 0, 0
		for round := range 8 {
			name := "config" + strconv.Itoa(round)
			var made struct{ ID string }
			w.await("a config is written", time.Minute, func() error {
				return w.any("POST", "/configs/create", swarm.ConfigSpec{Annotations: swarm.Annotations{Name: name}, Data: []byte("x")}, &made)
			})
			r := &readers{w: w, id: made.ID}
			stop, ended := make(chan struct{}), make(chan struct{})
			go func() {
				defer close(ended)
				r.work(stop)
			}()
			w.sleep(time.Duration(w.random.IntN(500)) * time.Millisecond)
			w.leader().isolate()
			w.sleep(time.Duration(1500+w.random.IntN(1500)) * time.Millisecond)
			w.net.Heal()
			w.sleep(500 * time.Millisecond)
			close(stop)
			<-ended
			for _, o := range r.ops {
				if in, _ := o.Input.(register); in.To == "" {
					reads++
				}
				if o.Output == nil {
					open++
				}
			}
			if res := porcupine.CheckOperationsTimeout(registers(), r.ops, 0); res != porcupine.Ok {
				t.Errorf("the history of %s is %s: somebody read what was no more", name, res)
			}
		}
		t.Logf("%d reads, %d changes of unknown outcome", reads, open)
		if reads == 0 {
			t.Error("nothing was read")
		}
	})
}
