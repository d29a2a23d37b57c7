package node

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/moby/moby/api/types/swarm"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/api/skepv1"
	"github.com/skep-dev/skep/control/backup"
	"github.com/skep-dev/skep/control/manager"
	"github.com/skep-dev/skep/control/replica"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/edge/dockerapi"
	"github.com/skep-dev/skep/platform/keystore"
)

// catchUpTimeout bounds how long a backup waits for this manager to have what the leader has.
const catchUpTimeout = 30 * time.Second

// Backup implements dockerapi.Backups.
func (s *membership) Backup(ctx context.Context, stale bool) ([]byte, error) {
	role, err := s.role()
	if err != nil {
		return nil, err
	}
	if !stale {
		if err := catchUp(ctx, role); err != nil {
			return nil, err
		}
	}
	state, index := role.replica.Copy()
	if len(state.GetStore().GetClusters()) == 0 {
		return nil, model.Errorf(model.Unavailable, "this manager has no state of the swarm yet")
	}
	return backup.Encode(backup.Info{
		ClusterID: state.GetStore().GetClusters()[0].GetId(), NodeID: role.creds.NodeID(), Index: index, CreatedAt: time.Now(), Version: s.cfg.Version,
	}, state)
}

// catchUp returns when this manager has everything that the leader had acknowledged.
func catchUp(ctx context.Context, role *managerRole) error {
	ctx, cancel := context.WithTimeout(ctx, catchUpTimeout)
	defer cancel()
	leader, err := skepv1.NewInsightClient(role.route()).Overview(ctx, new(skepv1.OverviewRequest))
	if err != nil {
		return fmt.Errorf("%w\nWithout a leader nobody knows what is newest. `skep backup create --stale` keeps what this manager has", err)
	}
	for at := role.replica.Follow(); at.Snapshot().Index() < leader.GetRaftIndex(); {
		if _, _, err := at.Next(ctx); err != nil {
			return model.Errorf(model.Unavailable, "this manager is behind the leader, at %d of %d, and does not catch up: make the backup on another one", at.Snapshot().Index(), leader.GetRaftIndex())
		}
	}
	return nil
}

// Restore implements dockerapi.Backups.
func (s *membership) Restore(ctx context.Context, data []byte, req dockerapi.RestoreRequest) (dockerapi.Restored, error) {
	end, err := s.begin(ctx)
	if err != nil {
		return dockerapi.Restored{}, err
	}
	defer end()
	if s.Status().LocalNodeState != swarm.LocalNodeStateInactive {
		return dockerapi.Restored{}, errInSwarm()
	}
	info, state, err := backup.Parse(data)
	if err != nil {
		return dockerapi.Restored{}, err
	}
	listen := req.ListenAddr
	if listen == "" {
		listen = defaultListen
	}
	saved, err := s.addresses(listen, req.AdvertiseAddr, req.DataPathAddr)
	if err != nil {
		return dockerapi.Restored{}, err
	}
	removed := backup.Adapt(state, req.Alone, time.Now())
	cluster := state.GetStore().GetClusters()[0]
	id, err := restoredIdentity(cluster)
	if err != nil {
		return dockerapi.Restored{}, err
	}
	saved.DefaultAddressPool, saved.SubnetSize, saved.DataPathPort = cluster.GetDefaultAddressPool(), cluster.GetSubnetSize(), cluster.GetVXLANUDPPort()
	m, err := s.placeRestored(cluster, state, info.Index, saved, id)
	if err != nil {
		return dockerapi.Restored{}, errors.Join(err, s.clear())
	}
	s.start(m)
	wait, cancel := context.WithTimeout(ctx, activateTimeout)
	defer cancel()
	if err := s.active(wait, m); err != nil {
		return dockerapi.Restored{}, errors.Join(err, s.clear())
	}
	s.cfg.Log.Info("swarm restored from a backup", slog.String("node_id", m.creds.NodeID()), slog.String("cluster_id", cluster.GetId()), slog.Uint64("index", info.Index))
	return dockerapi.Restored{
		NodeID: m.creds.NodeID(), ClusterID: cluster.GetId(), CreatedAt: info.CreatedAt,
		RemovedManagers: removed.Managers, RemovedWorkers: removed.Workers, OrphanedTasks: removed.Tasks,
		Locked: pki.ManagersKEK(cluster) != nil,
	}, nil
}

// placeRestored writes what a manager that goes on from a state starts from. What says
// that the node is in a swarm comes last.
func (s *membership) placeRestored(cluster *api.Cluster, state *api.Snapshot, index uint64, saved savedState, id keystore.Identity) (*member, error) {
	if err := errors.Join(os.MkdirAll(s.dir, 0o700), s.keys.SaveManager(id, pki.ManagersKEK(cluster), cluster.GetMeta().GetVersion().GetIndex())); err != nil {
		return nil, err
	}
	m, err := newMember(s.cfg, s.dir, saved, s.keys, id)
	if err != nil {
		return nil, err
	}
	if err := replica.Restore(m.raftDir(), s.keys, m.creds.NodeID(), saved.AdvertiseAddr, state, index, s.cfg.Log); err != nil {
		return nil, err
	}
	m.founding = &manager.Bootstrap{ClusterID: cluster.GetId(), Certificate: id.ChainPEM, VXLANUDPPort: cluster.GetVXLANUDPPort()}
	return m, saved.save(s.dir)
}

// restoredIdentity makes the first manager of a restored swarm a certificate, signed by
// the swarm's own CA.
func restoredIdentity(cluster *api.Cluster) (keystore.Identity, error) {
	ca := cluster.GetRootCa()
	root, err := pki.Signer(ca)
	if err != nil {
		return keystore.Identity{}, fmt.Errorf("read the swarm's CA: %w", err)
	}
	if root.Key == nil {
		return keystore.Identity{}, model.Errorf(model.Unimplemented,
			"restoring a swarm whose certificates an external CA signs is not implemented by skep yet: its backup holds no CA key to begin with")
	}
	nodeID, err := model.NewID(rand.Reader)
	if err != nil {
		return keystore.Identity{}, err
	}
	key, err := pki.NewKey(rand.Reader)
	if err != nil {
		return keystore.Identity{}, err
	}
	csr, err := pki.NewCSR(rand.Reader, key)
	if err != nil {
		return keystore.Identity{}, err
	}
	chain, err := root.Issue(rand.Reader, time.Now(), csr, pki.Leaf{
		NodeID: nodeID, ClusterID: cluster.GetId(), OU: pki.ManagerRole, Expiry: cluster.GetSpec().GetCaConfig().GetNodeCertExpiry().AsDuration(),
	})
	if err != nil {
		return keystore.Identity{}, err
	}
	return keystore.Identity{RootPEM: ca.GetCaCert(), ChainPEM: chain, Key: key}, nil
}
