package containerd_test

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"

	"github.com/skep-dev/skep/worker/runtime"
)

// BenchmarkStartStop prints starts and stops a second at several concurrencies, of
// containers that end on SIGTERM. SKEP_BENCH_N is how many at a time (100).
func BenchmarkStartStop(b *testing.B) {
	bench := newBench(b, nil).withBusybox(b)
	n, err := strconv.Atoi(os.Getenv("SKEP_BENCH_N"))
	if err != nil {
		n = 100
	}
	pauser := os.Getenv("SKEP_BIN") + "/skep-init"
	host := &container.HostConfig{
		Mounts:    []mount.Mount{{Type: mount.TypeBind, Source: pauser, Target: "/pauser", ReadOnly: true}},
		Resources: container.Resources{Memory: 64 << 20, PidsLimit: new(int64(100))},
	}
	ctx := context.Background()
	warm := bench.run(b, &container.Config{Cmd: []string{"/pauser", "sleep", "1000"}}, host)
	if err := bench.Remove(ctx, warm, true, true); err != nil {
		b.Fatal(err)
	}
	for _, parallel := range []int{1, 4, 8} {
		b.Run(fmt.Sprintf("c=%d", parallel), func(b *testing.B) {
			var starts, stops time.Duration
			rounds := 0
			for b.Loop() {
				rounds++
				ids := make([]string, n)
				starts += each(b, n, parallel, func(i int) error {
					id, _, err := bench.Create(ctx, runtime.CreateOptions{
						Config: &container.Config{Image: "busybox", Cmd: []string{"/pauser", "sleep", "1000"}}, HostConfig: host,
					})
					ids[i] = id
					if err != nil {
						return err
					}
					return bench.Start(ctx, id)
				})
				stops += each(b, n, parallel, func(i int) error {
					if err := bench.Stop(ctx, ids[i], "", nil); err != nil {
						return err
					}
					return bench.Remove(ctx, ids[i], false, true)
				})
			}
			b.ReportMetric(float64(n*rounds)/starts.Seconds(), "starts/s")
			b.ReportMetric(float64(n*rounds)/stops.Seconds(), "stops/s")
		})
	}
}

// each runs f for 0 … n-1, parallel at a time, and returns how long it took.
func each(tb testing.TB, n, parallel int, f func(int) error) time.Duration {
	tb.Helper()
	begin := time.Now()
	work := make(chan int)
	var wg sync.WaitGroup
	for range parallel {
		wg.Go(func() {
			for i := range work {
				if err := f(i); err != nil {
					tb.Error(err)
				}
			}
		})
	}
	for i := range n {
		work <- i
	}
	close(work)
	wg.Wait()
	return time.Since(begin)
}
