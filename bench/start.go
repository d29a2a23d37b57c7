package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/moby/moby/client"
)

const replicas = 60

// start measures the time from `service create --replicas 60` to 60 running tasks, and
// from `service rm` to no container left, on Skep and on a Docker Engine, alternately.
func (b *bench) start(ctx context.Context) error {
	up, down := map[string][]float64{}, map[string][]float64{}
	engines := map[string]*engine{}
	defer func() {
		for _, e := range engines {
			if err := e.stop(); err != nil {
				fmt.Println("stop:", err)
			}
		}
	}()
	names := b.engines
	for _, name := range names {
		e, err := b.startEngine(ctx, name)
		if err != nil {
			return err
		}
		engines[name] = e
	}
	for pair := range b.pairs {
		for _, name := range names {
			u, d, err := createAndRemove(ctx, engines[name].client, fmt.Sprintf("bench%d", pair))
			if err != nil {
				return fmt.Errorf("%s, pair %d: %w", name, pair, err)
			}
			up[name] = append(up[name], u.Seconds())
			down[name] = append(down[name], d.Seconds())
		}
	}
	for name := range engines {
		fmt.Printf("%s: start %s; removal %s\n", name, spread(up[name]), spread(down[name]))
	}
	if len(engines) < 2 {
		return nil
	}
	s, d := quantile(up["skep"], 0.5), quantile(up["docker"], 0.5)
	b.add(row{"a. start of 60 tasks, Skep", replicas / s, "tasks/s", spread(up["skep"]) + " s", "31 (2.5 x Docker 29)"})
	b.add(row{"a. start of 60 tasks, Docker Engine 20.10", replicas / d, "tasks/s", spread(up["docker"]) + " s", ""})
	b.add(row{"a. start, ratio", d / s, "x", "medians", ">= 6"})
	s, d = quantile(down["skep"], 0.5), quantile(down["docker"], 0.5)
	b.add(row{"a. removal of 60 tasks, Skep", replicas / s, "tasks/s", spread(down["skep"]) + " s", ""})
	b.add(row{"a. removal of 60 tasks, Docker Engine 20.10", replicas / d, "tasks/s", spread(down["docker"]) + " s", ""})
	b.add(row{"a. removal, ratio", d / s, "x", "medians", ">= 6"})
	return nil
}

func createAndRemove(ctx context.Context, c *client.Client, name string) (up, down time.Duration, err error) {
	begin := time.Now()
	if _, err := c.ServiceCreate(ctx, client.ServiceCreateOptions{Spec: service(name, replicas)}); err != nil {
		return 0, 0, err
	}
	err = poll(ctx, 3*time.Minute, func() error {
		n, err := runningTasks(ctx, c, name)
		if err == nil && n < replicas {
			err = fmt.Errorf("%d of %d run", n, replicas)
		}
		return err
	})
	if err != nil {
		return 0, 0, err
	}
	up = time.Since(begin)
	begin = time.Now()
	if _, err := c.ServiceRemove(ctx, name, client.ServiceRemoveOptions{}); err != nil {
		return 0, 0, err
	}
	err = poll(ctx, 3*time.Minute, func() error {
		left, err := c.ContainerList(ctx, client.ContainerListOptions{All: true})
		if err != nil {
			return err
		}
		if len(left.Items) > 0 {
			return errors.New("containers are left")
		}
		return nil
	})
	return up, time.Since(begin), err
}
