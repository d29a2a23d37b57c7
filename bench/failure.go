package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"
)

// dev is a `skep dev` swarm.
type dev struct {
	skep, name string
	nodes      []devNode
}

type devNode struct {
	Name, Role, Socket string
	client             *client.Client
}

func (b *bench) newDev(ctx context.Context, managers, workers int) (*dev, error) {
	b.started++
	d := &dev{skep: filepath.Join(b.bin, "skep"), name: fmt.Sprintf("b%d%c", os.Getpid()%100000, 'a'+b.started%26)}
	if err := d.command(ctx, "up", "--managers", fmt.Sprint(managers), "--workers", fmt.Sprint(workers)); err != nil {
		return nil, errors.Join(err, d.down())
	}
	out, err := exec.CommandContext(ctx, d.skep, "dev", "ls", "--name", d.name, "--json").Output()
	if err != nil {
		return nil, errors.Join(err, d.down())
	}
	if err := json.Unmarshal(out, &d.nodes); err != nil {
		return nil, errors.Join(err, d.down())
	}
	for i := range d.nodes {
		if d.nodes[i].client, err = client.New(client.WithHost("unix://" + d.nodes[i].Socket)); err != nil {
			return nil, errors.Join(err, d.down())
		}
		if err := b.load(ctx, &engine{client: d.nodes[i].client}); err != nil {
			return nil, errors.Join(err, d.down())
		}
	}
	return d, nil
}

func (d *dev) command(ctx context.Context, verb string, args ...string) error {
	args = append([]string{"dev", verb, "--name", d.name}, args...)
	if out, err := exec.CommandContext(ctx, d.skep, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("skep %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return nil
}

func (d *dev) down() error { return d.command(context.Background(), "down") }

// leaderIndex returns the index of the leader's node as a reachable manager sees it.
func (d *dev) leaderIndex(ctx context.Context) (int, error) {
	for _, n := range d.nodes {
		if n.Role != "manager" {
			continue
		}
		list, err := n.client.NodeList(ctx, client.NodeListOptions{})
		if err != nil {
			continue
		}
		for _, node := range list.Items {
			if node.ManagerStatus == nil || !node.ManagerStatus.Leader {
				continue
			}
			for i := range d.nodes {
				if d.nodes[i].Name == node.Description.Hostname {
					return i, nil
				}
			}
		}
	}
	return 0, errors.New("no leader")
}

// leader measures the time from SIGKILL of the leader to the next accepted write.
func (b *bench) leader(ctx context.Context) error {
	d, err := b.newDev(ctx, 3, 0)
	if err != nil {
		return err
	}
	defer func() { _ = d.down() }()
	if _, err := d.nodes[0].client.ServiceCreate(ctx, client.ServiceCreateOptions{Spec: service("w", 0)}); err != nil {
		return err
	}
	var took []float64
	for round := range b.rounds {
		var leader int
		if err := poll(ctx, time.Minute, func() (err error) { leader, err = d.leaderIndex(ctx); return err }); err != nil {
			return err
		}
		if err := poll(ctx, time.Minute, func() error { return d.allReady(ctx, leader) }); err != nil {
			return err
		}
		other := d.nodes[(leader+1)%3].client
		begin := time.Now()
		if err := d.command(ctx, "kill", d.nodes[leader].Name); err != nil {
			return err
		}
		if err := poll(ctx, time.Minute, func() error { return label(ctx, other, fmt.Sprint(round)) }); err != nil {
			return err
		}
		took = append(took, time.Since(begin).Seconds())
		if err := d.command(ctx, "start", d.nodes[leader].Name); err != nil {
			return err
		}
	}
	b.add(row{"b. leader killed to next write, p50", quantile(took, 0.5), "s", spread(took), ""})
	b.add(row{"b. leader killed to next write, p99", quantile(took, 0.99), "s", "includes the kill command", "< 3"})
	return nil
}

func (d *dev) allReady(ctx context.Context, leader int) error {
	list, err := d.nodes[leader].client.NodeList(ctx, client.NodeListOptions{})
	if err != nil {
		return err
	}
	for _, n := range list.Items {
		if n.Status.State != swarm.NodeStateReady || (n.ManagerStatus != nil && n.ManagerStatus.Reachability != swarm.ReachabilityReachable) {
			return fmt.Errorf("node %s is %s", n.Description.Hostname, n.Status.State)
		}
	}
	return nil
}

// label writes to service w.
func label(ctx context.Context, c *client.Client, value string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	s, err := c.ServiceInspect(ctx, "w", client.ServiceInspectOptions{})
	if err != nil {
		return err
	}
	spec := s.Service.Spec
	spec.Labels = map[string]string{"round": value}
	_, err = c.ServiceUpdate(ctx, s.Service.ID, client.ServiceUpdateOptions{Version: s.Service.Version, Spec: spec})
	return err
}

// worker measures the time from the loss of a worker to its task running elsewhere.
func (b *bench) worker(ctx context.Context) error {
	d, err := b.newDev(ctx, 1, 2)
	if err != nil {
		return err
	}
	defer func() { _ = d.down() }()
	m := d.nodes[0].client
	spec := service("lost", 4)
	spec.TaskTemplate.Placement = &swarm.Placement{Constraints: []string{"node.role==worker"}}
	if _, err := m.ServiceCreate(ctx, client.ServiceCreateOptions{Spec: spec}); err != nil {
		return err
	}
	var took []float64
	for round := range b.rounds / 2 {
		victim := d.nodes[1+round%2]
		if err := poll(ctx, time.Minute, func() error {
			if err := d.allReady(ctx, 0); err != nil {
				return err
			}
			return b.fourElsewhere(ctx, m, "")
		}); err != nil {
			return err
		}
		// Force a spread over both workers, so that the victim has tasks.
		id, err := nodeID(ctx, m, victim.Name)
		if err != nil {
			return err
		}
		if err := force(ctx, m, "lost"); err != nil {
			return err
		}
		if err := poll(ctx, time.Minute, func() error { return b.fourElsewhere(ctx, m, "") }); err != nil {
			return err
		}
		begin := time.Now()
		if err := d.command(ctx, "kill", victim.Name, "--containers"); err != nil {
			return err
		}
		if err := poll(ctx, time.Minute, func() error { return b.fourElsewhere(ctx, m, id) }); err != nil {
			return err
		}
		took = append(took, time.Since(begin).Seconds())
		if err := d.command(ctx, "start", victim.Name); err != nil {
			return err
		}
	}
	b.add(row{"c. worker killed to replacement running, p50", quantile(took, 0.5), "s", spread(took), "< 10"})
	b.add(row{"c. worker killed to replacement running, max", quantile(took, 1), "s", "", "< 10"})
	return nil
}

// fourElsewhere wants four running tasks, none of them on a node.
func (b *bench) fourElsewhere(ctx context.Context, m *client.Client, node string) error {
	tasks, err := m.TaskList(ctx, client.TaskListOptions{Filters: client.Filters{}.Add("service", "lost")})
	if err != nil {
		return err
	}
	n := 0
	for _, t := range tasks.Items {
		if t.Status.State == swarm.TaskStateRunning && t.DesiredState == swarm.TaskStateRunning && (node == "" || t.NodeID != node) {
			n++
		}
	}
	if n != 4 {
		return fmt.Errorf("%d of 4 run elsewhere", n)
	}
	return nil
}

func nodeID(ctx context.Context, m *client.Client, hostname string) (string, error) {
	list, err := m.NodeList(ctx, client.NodeListOptions{})
	if err != nil {
		return "", err
	}
	for _, n := range list.Items {
		if n.Description.Hostname == hostname {
			return n.ID, nil
		}
	}
	return "", fmt.Errorf("no node %s", hostname)
}

// force replaces all tasks of a service at once.
func force(ctx context.Context, m *client.Client, name string) error {
	s, err := m.ServiceInspect(ctx, name, client.ServiceInspectOptions{})
	if err != nil {
		return err
	}
	spec := s.Service.Spec
	spec.TaskTemplate.ForceUpdate++
	spec.UpdateConfig = &swarm.UpdateConfig{Parallelism: 0, Monitor: time.Second}
	_, err = m.ServiceUpdate(ctx, s.Service.ID, client.ServiceUpdateOptions{Version: s.Service.Version, Spec: spec})
	if err != nil {
		return err
	}
	return poll(ctx, time.Minute, func() error {
		s, err := m.ServiceInspect(ctx, name, client.ServiceInspectOptions{})
		if err != nil {
			return err
		}
		if u := s.Service.UpdateStatus; u == nil || u.State != swarm.UpdateStateCompleted {
			return errors.New("update not completed")
		}
		return nil
	})
}
