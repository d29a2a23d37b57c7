package replica

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"sync/atomic"
	"testing"

	"github.com/skep-dev/skep/core/store"
)

// BenchmarkCommit measures one accepted write of a manager alone, with its log on disk,
// at different numbers of writers for each core.
func BenchmarkCommit(b *testing.B) {
	for _, writers := range []int{1, 16, 256} {
		b.Run(fmt.Sprintf("writers_a_core=%d", writers), func(b *testing.B) {
			ctx, cancel := context.WithCancel(b.Context())
			r := New(Config{
				NodeID: "node1", Addr: "10.0.0.1:2377", Dir: b.TempDir(), Keys: testKey(), Caller: testCaller,
				Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
			})
			done := make(chan error, 1)
			go func() { done <- r.Run(ctx) }()
			defer func() {
				cancel()
				if err := <-done; err != nil {
					b.Error(err)
				}
			}()
			for leading, changed := r.Leading(); !leading; leading, changed = r.Leading() {
				<-changed
			}
			var id atomic.Int64
			b.SetParallelism(writers)
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) { // b.Loop has no parallel form
				for pb.Next() {
					_, err := r.Update(ctx, func(tx *store.Tx) error {
						return createConfig(tx, fmt.Sprint(id.Add(1)), "text")
					})
					if err != nil {
						b.Error(err)
					}
				}
			})
		})
	}
}
