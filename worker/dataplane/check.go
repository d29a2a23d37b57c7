package dataplane

import (
	"context"
	"log/slog"
	"slices"

	skepv1 "github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/core/netplan"
)

// Repairs returns how many differences were found and mended since the process began.
func (d *Dataplane) Repairs() uint64 { return d.metrics.repairs.total.Load() }

// Digest returns netplan.Digest of what this node knows of the swarm's networks.
func (d *Dataplane) Digest() []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	return netplan.Digest(withoutBridges(d.want.Snapshot()))
}

// Examine compares the kernel with the plan, mends what differs, and tells each difference.
// The error says what could not be compared or mended.
func (d *Dataplane) Examine(ctx context.Context) ([]*skepv1.NetworkDifference, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	first := &drift{}
	err := d.converge(first)
	if len(first.found) == 0 && err == nil {
		return nil, nil
	}
	// What is mended can show more: the ways of a network whose bridge was missing.
	mend := &drift{repair: true, repairs: d.metrics.repairs}
	err = d.converge(mend)
	d.broken = err != nil
	left := &drift{}
	if err == nil {
		err = d.converge(left)
	}
	all := append(first.details, mend.details...)
	var out []*skepv1.NetworkDifference
	seen := map[string]bool{}
	for _, x := range all {
		if seen[x.GetText()] {
			continue
		}
		seen[x.GetText()] = true
		x.Mended = err == nil && !slices.Contains(left.found, x.GetText())
		out = append(out, x)
		d.cfg.Log.LogAttrs(ctx, slog.LevelWarn, "network differed from the plan", slog.String("difference", x.GetText()))
	}
	return out, err
}
