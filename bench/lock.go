package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"time"

	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"
	"go.etcd.io/etcd/server/v3/storage/wal"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/control/replica"
	"github.com/skep-dev/skep/core/store"
	"github.com/skep-dev/skep/platform/disk"
	"github.com/skep-dev/skep/platform/wire"
)

// unlock measures the time from giving a restarted manager its key to its first answer
// about the swarm.
func (b *bench) unlock(ctx context.Context) error {
	d, err := b.newDev(ctx, 3, 0)
	if err != nil {
		return err
	}
	defer func() { _ = d.down() }()
	first, last := d.nodes[0].client, d.nodes[2]
	now, err := first.SwarmInspect(ctx, client.SwarmInspectOptions{})
	if err != nil {
		return err
	}
	spec := now.Swarm.Spec
	spec.EncryptionConfig.AutoLockManagers = true
	if _, err := first.SwarmUpdate(ctx, client.SwarmUpdateOptions{Version: now.Swarm.Version, Spec: spec}); err != nil {
		return err
	}
	key, err := first.SwarmGetUnlockKey(ctx)
	if err != nil {
		return err
	}
	var took []float64
	for range max(b.rounds/2, 1) {
		if err := d.command(ctx, "kill", last.Name); err != nil {
			return err
		}
		if err := d.command(ctx, "start", last.Name); err != nil {
			return err
		}
		err := poll(ctx, time.Minute, func() error {
			info, err := last.client.Info(ctx, client.InfoOptions{})
			if err == nil && info.Info.Swarm.LocalNodeState != swarm.LocalNodeStateLocked {
				err = fmt.Errorf("the manager is %s", info.Info.Swarm.LocalNodeState)
			}
			return err
		})
		if err != nil {
			return err
		}
		begin := time.Now()
		if _, err := last.client.SwarmUnlock(ctx, client.SwarmUnlockOptions(key)); err != nil {
			return err
		}
		err = poll(ctx, time.Minute, func() error {
			_, err := last.client.NodeList(ctx, client.NodeListOptions{})
			return err
		})
		if err != nil {
			return err
		}
		took = append(took, time.Since(begin).Seconds())
	}
	b.add(row{"h. unlock to first answer of the manager, p50", quantile(took, 0.5), "s", spread(took), ""})
	return nil
}

// What seal writes: batches as a leader's under load, of entries like a small service's.
const (
	sealBatch = 16
	sealSize  = 1 << 10
	sealRuns  = 400
)

// seal measures what sealing costs the raft log: the same batches, each synced, through
// platform/disk and through the bare log below it, alternately.
func (b *bench) seal(ctx context.Context) error {
	var sealed, plain, ratios []float64
	for pair := range b.pairs {
		s, err := sealedWrites(filepath.Join(b.work, fmt.Sprintf("sealed%d", pair)))
		if err != nil {
			return err
		}
		p, err := plainWrites(filepath.Join(b.work, fmt.Sprintf("plain%d", pair)))
		if err != nil {
			return err
		}
		sealed, plain, ratios = append(sealed, s), append(plain, p), append(ratios, s/p)
	}
	b.add(row{"h. log writes sealed", quantile(sealed, 0.5), "1/s", fmt.Sprintf("%d entries of %d bytes a sync; %s", sealBatch, sealSize, spread(sealed)), ""})
	b.add(row{"h. log writes in the clear", quantile(plain, 0.5), "1/s", spread(plain), ""})
	b.add(row{"h. log writes sealed / in the clear", quantile(ratios, 0.5), "ratio", spread(ratios), ""})
	return b.accepted(ctx)
}

// How many clients write at once, and how often each.
const (
	acceptedClients = 32
	acceptedWrites  = 200
)

// accepted measures what a write takes that clients wait for, from the request to the
// answer, and how much of that is sealing.
func (b *bench) accepted(ctx context.Context) error {
	var rates, parts []float64
	for pair := range b.pairs {
		write, err := oneAccepted(ctx, filepath.Join(b.work, fmt.Sprintf("accepted%d", pair)))
		if err != nil {
			return err
		}
		data, key := bytes.Repeat([]byte("x"), sealSize), bytes.Repeat([]byte("k"), disk.KeySize)
		begin := time.Now()
		for range acceptedClients * acceptedWrites {
			if _, err := disk.Seal(key, data); err != nil {
				return err
			}
		}
		seal := time.Since(begin) / (acceptedClients * acceptedWrites)
		rates, parts = append(rates, 1/write.Seconds()), append(parts, seal.Seconds()/write.Seconds())
	}
	b.add(row{"h. accepted writes", quantile(rates, 0.5), "1/s", fmt.Sprintf("objects of %d bytes, %d clients; %s", sealSize, acceptedClients, spread(rates)), ""})
	b.add(row{"h. sealing, part of an accepted write", quantile(parts, 0.5), "ratio", spread(parts), "< 0.1"})
	return nil
}

// oneAccepted returns the time that a manager takes for one of many writes.
func oneAccepted(ctx context.Context, dir string) (time.Duration, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	r := replica.New(replica.Config{
		NodeID: "bench", Addr: "127.0.0.1:1", Dir: dir, Keys: replica.StaticKey(strings.Repeat("k", disk.KeySize)),
		Caller: wire.CallerNode, Log: slog.New(slog.DiscardHandler),
	})
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	for leading, changed := r.Leading(); !leading; leading, changed = r.Leading() {
		<-changed
	}
	data := bytes.Repeat([]byte("x"), sealSize)
	var clients errgroup.Group
	begin := time.Now()
	for c := range acceptedClients {
		clients.Go(func() error {
			for i := range acceptedWrites {
				name := fmt.Sprintf("%d.%d", c, i)
				_, err := r.Update(ctx, func(tx *store.Tx) error {
					return tx.Create(&api.Config{Id: name, Spec: &api.ConfigSpec{Annotations: &api.Annotations{Name: name}, Data: data}})
				})
				if err != nil {
					return err
				}
			}
			return nil
		})
	}
	err := clients.Wait()
	took := time.Since(begin) / (acceptedClients * acceptedWrites)
	cancel()
	return took, errors.Join(err, <-done)
}

func sealedWrites(dir string) (float64, error) {
	key := make([]byte, disk.KeySize)
	rand.Read(key)
	l, err := disk.Create(dir, []byte("bench"), key, slog.New(slog.DiscardHandler))
	if err != nil {
		return 0, err
	}
	rate, err := writes(l.Save)
	return rate, errors.Join(err, l.Close())
}

func plainWrites(dir string) (float64, error) {
	w, err := wal.Create(zap.NewNop(), dir, []byte("bench"))
	if err != nil {
		return 0, err
	}
	rate, err := writes(w.Save)
	return rate, errors.Join(err, w.Close())
}

// writes returns the entries a second that save takes.
func writes(save func(*raftpb.HardState, []*raftpb.Entry) error) (float64, error) {
	data := bytes.Repeat([]byte("x"), sealSize)
	begin, index := time.Now(), uint64(0)
	for range sealRuns {
		var entries []*raftpb.Entry
		for range sealBatch {
			index++
			entries = append(entries, &raftpb.Entry{Type: raftpb.EntryNormal.Enum(), Term: new(uint64(1)), Index: new(index), Data: data})
		}
		if err := save(&raftpb.HardState{Term: new(uint64(1)), Vote: new(uint64(1)), Commit: new(index)}, entries); err != nil {
			return 0, err
		}
	}
	return float64(index) / time.Since(begin).Seconds(), nil
}
