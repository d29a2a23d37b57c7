package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"

	"github.com/skep-dev/skep/e2e/testimage"
)

// engine is a daemon under measurement, alone in a network namespace of its own.
type engine struct {
	name   string
	cmd    *exec.Cmd
	netns  string
	client *client.Client
	// down removes what the daemon leaves behind.
	down func() error
}

// startEngine runs a daemon in a new network namespace until its API answers, makes it
// a swarm of one and loads the test image.
func (b *bench) startEngine(ctx context.Context, name string) (_ *engine, err error) {
	b.started++
	dir := filepath.Join(b.work, fmt.Sprint(name, b.started))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	e := &engine{name: name, netns: fmt.Sprintf("skb-%s-%d", name, os.Getpid()), down: func() error { return nil }}
	defer func() {
		if err != nil {
			err = errors.Join(err, e.stop())
		}
	}()
	for _, args := range [][]string{{"netns", "add", e.netns}, {"-n", e.netns, "link", "set", "lo", "up"}} {
		if out, err := exec.CommandContext(ctx, "ip", args...).CombinedOutput(); err != nil {
			return nil, fmt.Errorf("ip %v: %w: %s", args, err, out)
		}
	}
	socket := filepath.Join(dir, "s.sock")
	switch name {
	case "skep":
		e.cmd = exec.Command("nsenter", "--net=/run/netns/"+e.netns, filepath.Join(b.bin, "skep"), "daemon",
			"--data-root", filepath.Join(dir, "d"), "--exec-root", filepath.Join(dir, "x"), "-H", "unix://"+socket, "--stop-tasks")
		e.down = func() error {
			out, err := exec.Command(filepath.Join(b.bin, "skep"), "down", "--data-root", filepath.Join(dir, "d"), "--exec-root", filepath.Join(dir, "x")).CombinedOutput()
			if err != nil {
				return fmt.Errorf("skep down: %w: %s", err, out)
			}
			return nil
		}
	case "docker":
		root := filepath.Join(b.bin, "docker-engine")
		fetch := exec.CommandContext(ctx, "tools/docker-engine.sh", root)
		if out, err := fetch.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("fetch docker engine: %w: %s", err, out)
		}
		e.cmd = exec.Command("nsenter", "--net=/run/netns/"+e.netns, filepath.Join(root, "usr/sbin/dockerd"),
			"--data-root", filepath.Join(dir, "d"), "--exec-root", filepath.Join(dir, "x"), "-H", "unix://"+socket, "-p", filepath.Join(dir, "pid"))
		e.cmd.Env = append(os.Environ(), "PATH="+filepath.Join(root, "usr/bin")+":"+filepath.Join(root, "usr/sbin")+":"+os.Getenv("PATH")+":/usr/sbin:/sbin")
	default:
		return nil, fmt.Errorf("unknown engine %q", name)
	}
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	e.cmd.Stdout, e.cmd.Stderr = log, log
	if err := e.cmd.Start(); err != nil {
		return nil, err
	}
	if e.client, err = client.New(client.WithHost("unix://" + socket)); err != nil {
		return nil, err
	}
	if err := poll(ctx, time.Minute, func() error {
		_, err := e.client.Ping(ctx, client.PingOptions{})
		return err
	}); err != nil {
		text, _ := os.ReadFile(log.Name())
		return nil, fmt.Errorf("%s did not come up: %w\n%s", name, err, text[max(0, len(text)-2000):])
	}
	if _, err := e.client.SwarmInit(ctx, client.SwarmInitOptions{ListenAddr: "127.0.0.1:2377", AdvertiseAddr: "127.0.0.1"}); err != nil {
		return nil, fmt.Errorf("swarm init on %s: %w", name, err)
	}
	return e, b.load(ctx, e)
}

// load puts the test image on an engine.
func (b *bench) load(ctx context.Context, e *engine) error {
	archive := filepath.Join(b.work, "image.tar")
	if _, err := os.Stat(archive); err != nil {
		if err := testimage.Write(ctx, archive); err != nil {
			return err
		}
	}
	f, err := os.Open(archive)
	if err != nil {
		return err
	}
	defer f.Close()
	result, err := e.client.ImageLoad(ctx, f)
	if err != nil {
		return err
	}
	defer result.Close()
	_, err = io.Copy(io.Discard, result)
	return err
}

// stop ends the daemon and its namespace.
func (e *engine) stop() error {
	var errs []error
	if e.cmd != nil && e.cmd.Process != nil {
		_ = e.cmd.Process.Signal(syscall.SIGTERM)
		done := make(chan struct{})
		go func() { _ = e.cmd.Wait(); close(done) }()
		select {
		case <-done:
		case <-time.After(40 * time.Second):
			errs = append(errs, e.cmd.Process.Kill())
			<-done
		}
	}
	errs = append(errs, e.down())
	if out, err := exec.Command("ip", "netns", "del", e.netns).CombinedOutput(); err != nil {
		errs = append(errs, fmt.Errorf("ip netns del: %w: %s", err, out))
	}
	return errors.Join(errs...)
}

// poll repeats f every 20 ms until it succeeds or the time is over.
func poll(ctx context.Context, timeout time.Duration, f func() error) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// service is the service that the benchmarks create: a program that ends on SIGTERM.
func service(name string, replicas uint64) swarm.ServiceSpec {
	return swarm.ServiceSpec{
		Annotations:  swarm.Annotations{Name: name},
		TaskTemplate: swarm.TaskSpec{ContainerSpec: &swarm.ContainerSpec{Image: testimage.V1}},
		Mode:         swarm.ServiceMode{Replicated: &swarm.ReplicatedService{Replicas: &replicas}},
	}
}

// runningTasks counts the tasks of a service that run.
func runningTasks(ctx context.Context, c *client.Client, name string) (int, error) {
	tasks, err := c.TaskList(ctx, client.TaskListOptions{Filters: client.Filters{}.Add("service", name)})
	if err != nil {
		return 0, err
	}
	n := 0
	for _, t := range tasks.Items {
		if t.Status.State == swarm.TaskStateRunning && t.DesiredState == swarm.TaskStateRunning {
			n++
		}
	}
	return n, nil
}
