package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"
)

// readTime is how long each way of reading takes in a round.
const readTime = 2 * time.Second

// reads measures what asking a swarm of three managers for one config takes, and with
// -against alternately what another version takes.
func (b *bench) reads(ctx context.Context) error {
	versions := []struct{ name, bin string }{{"", b.bin}}
	if b.against != "" {
		versions = append(versions, struct{ name, bin string }{", the other version", b.against})
	}
	ways := []struct {
		name     string
		clients  int
		follower bool
	}{{"1 client of the leader", 1, false}, {"32 clients of the leader", 32, false}, {"1 client of a follower", 1, true}, {"32 clients of a follower", 32, true}}
	own := b.bin
	defer func() { b.bin = own }()
	var swarms []*dev
	for _, v := range versions {
		b.bin = v.bin
		d, err := b.newDev(ctx, 3, 0)
		if err != nil {
			return err
		}
		defer func() { _ = d.down() }()
		swarms = append(swarms, d)
		spec := swarm.ConfigSpec{Annotations: swarm.Annotations{Name: "read"}, Data: make([]byte, 1024)}
		if _, err := d.nodes[0].client.ConfigCreate(ctx, client.ConfigCreateOptions{Spec: spec}); err != nil {
			return err
		}
	}
	for _, way := range ways {
		rates, medians, tails := make([][]float64, len(swarms)), make([][]float64, len(swarms)), make([][]float64, len(swarms))
		for range b.pairs {
			for i, d := range swarms {
				at, err := d.leaderIndex(ctx)
				if err != nil {
					return err
				}
				if way.follower {
					at = (at + 1) % len(d.nodes)
				}
				took, err := readFor(ctx, d.nodes[at].client, way.clients)
				if err != nil {
					return err
				}
				rates[i] = append(rates[i], float64(len(took))/readTime.Seconds())
				medians[i], tails[i] = append(medians[i], quantile(took, 0.5)), append(tails[i], quantile(took, 0.99))
			}
		}
		for i, v := range versions {
			name := "j. reads, " + way.name + v.name
			b.add(row{name, quantile(rates[i], 0.5), "/s", spread(rates[i]), ""})
			b.add(row{name + ", p50", 1000 * quantile(medians[i], 0.5), "ms", fmt.Sprintf("p99 %.3g ms; medians of %d rounds", 1000*quantile(tails[i], 0.5), b.pairs), ""})
		}
	}
	return nil
}

// readFor has clients read for readTime and returns how long each read took, in seconds.
func readFor(ctx context.Context, c *client.Client, clients int) ([]float64, error) {
	var mu sync.Mutex
	var all []float64
	var failed error
	var group sync.WaitGroup
	end := time.Now().Add(readTime)
	for range clients {
		group.Go(func() {
			var took []float64
			var err error
			for time.Now().Before(end) && err == nil {
				begin := time.Now()
				if _, err = c.ConfigInspect(ctx, "read", client.ConfigInspectOptions{}); err == nil {
					took = append(took, time.Since(begin).Seconds())
				}
			}
			mu.Lock()
			defer mu.Unlock()
			all, failed = append(all, took...), errors.Join(failed, err)
		})
	}
	group.Wait()
	return all, failed
}
