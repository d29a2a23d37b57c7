package containerd

import (
	"context"
	"fmt"

	"github.com/containerd/containerd/v2/core/snapshots"
)

// sweepSnapshots removes the root file systems of containers whose creation was cut short.
func (e *Engine) sweepSnapshots(ctx context.Context) error {
	sn := e.client.SnapshotService(snapshotter)
	var gone []string
	err := sn.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		if _, ours := info.Labels[gcRoot]; !ours || info.Kind != snapshots.KindActive {
			return nil
		}
		if _, err := e.find(info.Name); err != nil {
			gone = append(gone, info.Name)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("list snapshots: %w", err)
	}
	for _, key := range gone {
		if err := ignoreNotFound(sn.Remove(ctx, key)); err != nil {
			return fmt.Errorf("remove leftover snapshot: %w", err)
		}
		if err := e.dropFiles(key); err != nil {
			return err
		}
	}
	return nil
}
