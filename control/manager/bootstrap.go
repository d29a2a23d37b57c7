package manager

import (
	"context"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/alloc"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/store"
)

// Bootstrap describes a swarm to found.
type Bootstrap struct {
	// ClusterID is the organisation in the certificates.
	ClusterID string
	// Certificate is the first node's, as a PEM chain: with it the node may return after it
	// has expired.
	Certificate []byte
	// RootCA holds the CA certificate, its key and hash, and both join tokens.
	RootCA *api.RootCA
	// Availability of the first node.
	Availability api.NodeSpec_Availability
	// Spec overrides the cluster's default settings where it sets them; may be nil.
	Spec *api.ClusterSpec
	// UnlockKeys are set when the swarm is locked from the beginning.
	UnlockKeys []*api.EncryptionKey
	FIPS       bool
	// DefaultAddressPool, SubnetSize and VXLANUDPPort are as given at init, or zero.
	DefaultAddressPool []string
	SubnetSize         uint32
	VXLANUDPPort       uint32
}

const (
	defaultClusterName = "default"
	predefinedLabel    = "com.docker.swarm.predefined"
)

// bootstrap creates what every swarm has, each object only if it is missing.
func (m *Manager) bootstrap(ctx context.Context) error {
	_, err := m.state.Update(ctx, func(tx *store.Tx) error {
		if m.boot != nil {
			if err := m.found(tx); err != nil {
				return err
			}
		}
		for _, name := range [...]string{"bridge", "host"} {
			if tx.Snapshot().IDByName(model.Networks, name) != "" {
				continue
			}
			n := &api.Network{Id: m.newID(), Spec: &api.NetworkSpec{
				Annotations:  &api.Annotations{Name: name, Labels: map[string]string{predefinedLabel: "true"}},
				DriverConfig: &api.Driver{Name: name},
			}}
			if err := tx.Create(alloc.Predefined(n)); err != nil {
				return err
			}
		}
		return m.ensureKeys(tx)
	})
	return err
}

// found creates the cluster and its first node. Of a state that was restored it makes only
// the node.
func (m *Manager) found(tx *store.Tx) error {
	restored := tx.Snapshot().Cluster() != nil
	if !restored {
		if err := tx.Create(m.boot.cluster()); err != nil {
			return err
		}
	}
	if tx.Snapshot().Node(m.self) != nil {
		return nil
	}
	if err := tx.Create(&api.Node{
		Id: m.self,
		Spec: &api.NodeSpec{
			DesiredRole: api.NodeRole_MANAGER, Membership: api.NodeSpec_ACCEPTED, Availability: m.boot.Availability,
		},
		Role: api.NodeRole_MANAGER,
		Certificate: &api.Certificate{
			Cn: m.self, Role: api.NodeRole_MANAGER, Certificate: m.boot.Certificate, Status: &api.IssuanceStatus{State: api.IssuanceStatus_ISSUED},
		},
		VXLANUDPPort: m.boot.VXLANUDPPort,
	}); err != nil {
		return err
	}
	if restored || tx.Snapshot().IDByName(model.Networks, "ingress") != "" {
		return nil
	}
	spec := &api.NetworkSpec{
		Annotations:  &api.Annotations{Name: "ingress"},
		Ingress:      true,
		DriverConfig: &api.Driver{},
		Ipam:         &api.IPAMOptions{Driver: &api.Driver{}},
	}
	if model.EncryptsAll(m.boot.Spec) {
		model.Encrypt(spec)
		// What the first node can says nothing of those that will join; this all Skep nodes can.
		spec.DriverConfig.Options[model.EncryptionOption] = model.WireGuard
	}
	return tx.Create(&api.Network{Id: m.newID(), Spec: spec})
}

// cluster makes the cluster object with SwarmKit's defaults.
func (b *Bootstrap) cluster() *api.Cluster {
	spec := model.Clone(b.Spec)
	if spec == nil {
		spec = new(api.ClusterSpec)
	}
	if spec.Annotations == nil {
		spec.Annotations = new(api.Annotations)
	}
	spec.Annotations.Name = defaultClusterName
	if spec.Orchestration == nil {
		spec.Orchestration = &api.OrchestrationConfig{TaskHistoryRetentionLimit: 5}
	}
	if spec.Dispatcher == nil {
		spec.Dispatcher = &api.DispatcherConfig{HeartbeatPeriod: durationpb.New(5 * time.Second)}
	}
	if spec.Raft == nil {
		spec.Raft = &api.RaftConfig{
			SnapshotInterval: 10000, LogEntriesForSlowFollowers: 500, HeartbeatTick: 1, ElectionTick: 10,
		}
	}
	if spec.CaConfig == nil {
		spec.CaConfig = &api.CAConfig{NodeCertExpiry: durationpb.New(90 * 24 * time.Hour)}
	}
	if spec.EncryptionConfig == nil {
		spec.EncryptionConfig = new(api.EncryptionConfig)
	}
	return &api.Cluster{
		Id: b.ClusterID, Spec: spec, RootCa: model.Clone(b.RootCA), UnlockKeys: b.UnlockKeys, Fips: b.FIPS,
		DefaultAddressPool: b.DefaultAddressPool, SubnetSize: b.SubnetSize, VXLANUDPPort: b.VXLANUDPPort,
	}
}
