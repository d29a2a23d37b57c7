package e2e

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/skep-dev/skep/e2e/testimage"
)

// chaosServices are the services that TestNetworkChaos plays with.
const chaosServices = 20

// chaos is a swarm, what was asked of it last, and what was done to its nodes.
type chaos struct {
	*swarm

	t        *testing.T
	r        *rand.Rand
	app      string
	networks []string
	services []*chaosService
	dead     map[string]bool
	cut      map[string]bool
	drained  map[string]bool
}

// chaosService is one service as it was last asked for.
type chaosService struct {
	name     string
	network  string
	replicas int // negative: it is removed
	port     int // zero: it publishes none
	greeting string
	dnsrr    bool
}

// TestNetworkChaos changes twenty services and the nodes under them at random, for
// SKEP_CHAOS_TIME, then lets everything heal and wants every name, service address and
// published port to be right on every node, and every node's kernel to be as planned.
// SKEP_CHAOS_SEED plays the same changes again.
func TestNetworkChaos(t *testing.T) {
	length, err := time.ParseDuration(envOr("SKEP_CHAOS_TIME", "5m"))
	if err != nil {
		t.Fatal(err)
	}
	seed, err := strconv.ParseUint(envOr("SKEP_CHAOS_SEED", strconv.FormatInt(time.Now().UnixNano(), 10)), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("SKEP_CHAOS_SEED=%d SKEP_CHAOS_TIME=%s go test ./e2e -run TestNetworkChaos", seed, length)
	c := &chaos{
		swarm: newSwarm(t, 3, 2), t: t, r: rand.New(rand.NewPCG(seed, seed)), app: testapp(t), networks: []string{"n0", "n1", "n2", "n3"},
		dead: map[string]bool{}, cut: map[string]bool{}, drained: map[string]bool{},
	}
	c.loadImages(t)
	m := c.byRole("manager")[0]
	for _, n := range c.networks {
		c.docker(t, m, "network", "create", "-d", "overlay", n)
	}
	probe := []string{"service", "create", "--name", "probe", "--mode", "global"}
	for _, n := range c.networks {
		probe = append(probe, "--network", n)
	}
	c.docker(t, m, append(probe, testimage.V1)...)
	for i := range chaosServices {
		s := &chaosService{name: fmt.Sprint("s", i), network: c.networks[i%len(c.networks)], replicas: -1, dnsrr: i%7 == 6}
		c.services = append(c.services, s)
		c.create(s)
	}
	for begin := time.Now(); time.Since(begin) < length && !t.Failed(); {
		c.step()
	}
	c.heal()
	c.verify()
}

func envOr(name, otherwise string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return otherwise
}

// manager returns a manager whose daemon runs and that reaches the others.
func (c *chaos) manager() string {
	var up []string
	for _, n := range c.byRole("manager") {
		if !c.dead[n] && !c.cut[n] {
			up = append(up, n)
		}
	}
	return up[c.r.IntN(len(up))]
}

// change runs a docker command on some manager, again and again while there is no leader.
func (c *chaos) change(args ...string) {
	c.t.Helper()
	m := c.manager()
	c.t.Logf("%s docker %s (%s)", time.Now().Format("15:04:05.000"), strings.Join(args, " "), m)
	eventually(c.t, time.Minute, "docker "+strings.Join(args, " "), func() string {
		out, err := c.tryDocker(c.t, 20*time.Second, m, args...)
		switch {
		case err == nil:
			return ""
		case args[1] == "create" && strings.Contains(out, "already exists"), args[1] == "rm" && strings.Contains(out, "not found"):
			return "" // it was done, only the answer was lost
		}
		return err.Error()
	})
}

func (c *chaos) create(s *chaosService) {
	s.replicas, s.greeting = 1+c.r.IntN(3), s.name+"a"
	args := []string{
		"service", "create", "-d", "--name", s.name, "--network", s.network, "--replicas", strconv.Itoa(s.replicas), "--env", "GREETING=" + s.greeting,
		"--restart-delay", "500ms", "--stop-grace-period", "3s",
	}
	s.port = 0
	if s.dnsrr {
		args = append(args, "--endpoint-mode", "dnsrr")
	} else if c.r.IntN(3) > 0 {
		s.port = 9500 + slices.Index(c.services, s)
		args = append(args, "--publish", fmt.Sprintf("%d:80", s.port))
	}
	c.change(append(args, testimage.V1, "serve", ":80")...)
}

// step does one thing.
func (c *chaos) step() {
	s := c.services[c.r.IntN(len(c.services))]
	switch what := c.r.IntN(20); {
	case s.replicas < 0:
		c.create(s)
	case what < 5:
		s.replicas = c.r.IntN(5)
		c.change("service", "scale", "-d", fmt.Sprintf("%s=%d", s.name, s.replicas))
	case what < 9:
		s.greeting = s.name + string(rune('a'+c.r.IntN(26)))
		c.change("service", "update", "-d", "--env-add", "GREETING="+s.greeting, "--update-monitor", "200ms",
			"--update-order", []string{"start-first", "stop-first"}[c.r.IntN(2)], "--update-parallelism", strconv.Itoa(c.r.IntN(3)), s.name)
	case what < 11 && !s.dnsrr:
		if s.port != 0 {
			c.change("service", "update", "-d", "--publish-rm", "80", s.name)
			s.port = 0
		} else {
			s.port = 9500 + slices.Index(c.services, s)
			c.change("service", "update", "-d", "--publish-add", fmt.Sprintf("%d:80", s.port), s.name)
		}
	case what < 12:
		c.change("service", "rm", s.name)
		s.replicas = -1
	case what < 13:
		c.drain()
	case what < 15:
		c.crash()
	case what < 16:
		c.cutOrHeal()
	case what < 18:
		c.killTask()
	default:
		time.Sleep(time.Duration(c.r.IntN(1500)) * time.Millisecond) // let some of it happen
	}
}

// mayLose reports whether one more node may be away: a quorum and a worker must be left.
func (c *chaos) mayLose(node string) bool {
	away := 0
	for _, n := range c.nodes {
		if c.dead[n.Name] || c.cut[n.Name] {
			away++
		}
	}
	return away == 0 && !c.dead[node] && !c.cut[node]
}

func (c *chaos) drain() {
	n := c.nodes[c.r.IntN(len(c.nodes))].Name
	if c.drained[n] = !c.drained[n]; c.drained[n] && len(c.drained) < len(c.nodes)-1 {
		c.change("node", "update", "--availability", "drain", n)
		return
	}
	delete(c.drained, n)
	c.change("node", "update", "--availability", "active", n)
}

// crash kills a daemon, or all of a node, or brings back those that were killed.
func (c *chaos) crash() {
	for _, n := range c.nodes {
		if c.dead[n.Name] {
			c.say("start", n.Name)
			c.dev(c.t, "start", n.Name)
			delete(c.dead, n.Name)
			return
		}
	}
	n := c.nodes[c.r.IntN(len(c.nodes))].Name
	if !c.mayLose(n) {
		return
	}
	if c.dead[n] = true; c.r.IntN(3) == 0 {
		c.say("kill --containers", n)
		c.dev(c.t, "kill", n, "--containers")
		return
	}
	c.say("kill", n)
	c.dev(c.t, "kill", n)
}

func (c *chaos) cutOrHeal() {
	for _, n := range c.nodes {
		if c.cut[n.Name] {
			c.say("heal", n.Name)
			c.dev(c.t, "heal", n.Name)
			delete(c.cut, n.Name)
			return
		}
	}
	n := c.nodes[c.r.IntN(len(c.nodes))].Name
	if c.mayLose(n) {
		c.say("cut", n)
		c.dev(c.t, "cut", n)
		c.cut[n] = true
	}
}

// killTask removes a container behind the swarm's back.
func (c *chaos) killTask() {
	n := c.nodes[c.r.IntN(len(c.nodes))].Name
	if c.dead[n] {
		return
	}
	out, err := c.tryDocker(c.t, 20*time.Second, n, "ps", "-q", "--filter", "name=s")
	if ids := strings.Fields(out); err == nil && len(ids) > 0 {
		id := ids[c.r.IntN(len(ids))]
		c.say("docker kill "+id, n)
		_, _ = c.tryDocker(c.t, 20*time.Second, n, "kill", id) // it may be gone by now
	}
}

func (c *chaos) say(what, node string) {
	c.t.Logf("%s %s %s", time.Now().Format("15:04:05.000"), what, node)
}

// heal brings all nodes back.
func (c *chaos) heal() {
	for _, n := range c.nodes {
		if c.dead[n.Name] {
			c.say("start", n.Name)
			c.dev(c.t, "start", n.Name)
		}
		if c.cut[n.Name] {
			c.say("heal", n.Name)
			c.dev(c.t, "heal", n.Name)
		}
	}
	clear(c.dead)
	clear(c.cut)
	for _, n := range c.nodes {
		if c.drained[n.Name] {
			c.change("node", "update", "--availability", "active", n.Name)
		}
	}
	for _, n := range c.nodes {
		for _, m := range c.byRole("manager") {
			c.wantReady(c.t, m, n.Name)
		}
	}
}

// verify waits until every service runs as asked for, and then wants every node to see it so.
func (c *chaos) verify() {
	m := c.byRole("manager")[0]
	var names, ports []string
	for _, s := range c.services {
		if s.replicas >= 0 {
			c.wantRunning(c.t, m, s.name, s.replicas, 2*time.Minute)
		}
		names = append(names, s.name)
		ports = append(ports, strconv.Itoa(9500+slices.Index(c.services, s)))
	}
	c.wantRunning(c.t, m, "probe", len(c.nodes), time.Minute)
	var want []string
	eventually(c.t, time.Minute, "all updates are over", func() string {
		want = nil
		for _, s := range c.services {
			line, busy := c.expect(m, s)
			if busy != "" {
				return busy
			}
			want = append(want, line)
		}
		return ""
	})
	for _, n := range c.nodes {
		c.same(n.Name, "names", want, func() (string, error) {
			return c.exec(c.t, n.Name, "probe", append([]string{"/bin/testapp", "survey"}, names...)...)
		})
		var wanted, asked []string
		for i, s := range c.services {
			at := net.JoinHostPort(n.Addr, ports[i])
			asked = append(asked, at)
			if s.port != 0 && s.replicas > 0 {
				wanted = append(wanted, at+" "+s.greeting)
			} else {
				wanted = append(wanted, at+" refused")
			}
		}
		from := c.nodes[c.r.IntN(len(c.nodes))].Name
		c.same(n.Name, "published ports, from "+from, wanted, func() (string, error) {
			args := append([]string{"dev", "exec", "--name", c.name, from, "--", c.app, "survey"}, asked...)
			return try(c.t, time.Minute, skepBinary(c.t), args...)
		})
	}
	c.wantPlanned()
}

// expect returns what a survey must say of a service, or what is still going on in it.
func (c *chaos) expect(m string, s *chaosService) (line, busy string) {
	if s.replicas < 0 {
		return s.name + " - - unknown", ""
	}
	vip, err := c.tryDocker(c.t, 20*time.Second, m, "service", "inspect", "--format",
		`{{with .UpdateStatus}}{{.State}}{{else}}none{{end}}{{range .Endpoint.VirtualIPs}} {{.NetworkID}}={{.Addr}}{{end}}`, s.name)
	if err != nil {
		return "", err.Error()
	}
	fields := strings.Fields(vip)
	if fields[0] == "updating" {
		return "", s.name + " is " + fields[0]
	}
	network := c.docker(c.t, m, "network", "inspect", "--format", "{{.ID}}", s.network)
	addr := ""
	for _, f := range fields[1:] {
		if text, ok := strings.CutPrefix(f, network+"="); ok {
			addr, _, _ = strings.Cut(text, "/")
		}
	}
	up, err := c.running(c.t, m, s.name)
	if err != nil || len(up) != s.replicas {
		return "", fmt.Sprint(s.name, " has ", len(up), " tasks: ", err)
	}
	var tasks []string
	for _, one := range up {
		out, err := c.tryDocker(c.t, 20*time.Second, m, "inspect", "--type", "task", "--format",
			`{{range .NetworksAttachments}}{{.Network.ID}}={{index .Addresses 0}} {{end}}`, one.ID)
		if err != nil {
			return "", err.Error()
		}
		for f := range strings.FieldsSeq(out) {
			if text, ok := strings.CutPrefix(f, network+"="); ok {
				a, _, _ := strings.Cut(text, "/")
				tasks = append(tasks, a)
			}
		}
	}
	slices.Sort(tasks)
	inner := strings.Join(tasks, ",")
	if inner == "" {
		inner = "-"
	}
	switch {
	case s.dnsrr && s.replicas == 0:
		return s.name + " - - unknown", ""
	case s.dnsrr:
		addr = inner
	}
	greeting := s.greeting
	if s.replicas == 0 {
		greeting = "refused"
	}
	return fmt.Sprint(s.name, " ", addr, " ", inner, " ", greeting), ""
}

// same wants a survey to say what it must, soon.
func (c *chaos) same(node, what string, want []string, survey func() (string, error)) {
	c.t.Helper()
	begin := time.Now()
	for {
		out, err := survey()
		got := strings.Split(strings.TrimSpace(out), "\n")
		if err == nil && slices.Equal(got, want) {
			return
		}
		if time.Since(begin) < 20*time.Second {
			time.Sleep(500 * time.Millisecond)
			continue
		}
		if err != nil || len(got) != len(want) {
			c.t.Errorf("%s, %s: %v\n%s", node, what, err, out)
			return
		}
		for i := range want {
			if got[i] != want[i] {
				c.t.Errorf("%s, %s: %q, want %q", node, what, got[i], want[i])
			}
		}
		return
	}
}

// wantPlanned wants no node to find anything to mend, nor to have missed what it was told.
func (c *chaos) wantPlanned() {
	m := c.node(c.t, c.byRole("manager")[0])
	out, err := try(c.t, time.Minute, skepBinary(c.t), "-H", "unix://"+m.Socket, "net", "check")
	if err != nil || strings.Count(out, ": as it should be") != len(c.nodes) {
		c.t.Errorf("skep net check: %v\n%s", err, out)
	}
}
