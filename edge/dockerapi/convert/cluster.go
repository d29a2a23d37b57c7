package convert

import (
	"crypto/x509"
	"encoding/pem"
	"maps"
	"net/netip"
	"time"

	"github.com/moby/moby/api/types/swarm"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/skep-dev/skep/api"
)

// StoreClusterSpec returns what is stored of a swarm spec by `swarm update`, which gives
// the whole spec: what is absent stays absent.
func StoreClusterSpec(s swarm.Spec) (*api.ClusterSpec, error) {
	return MergeClusterSpec(s, new(api.ClusterSpec))
}

// InitClusterSpec returns what is stored of a swarm spec by `swarm init`: what is absent
// gets SwarmKit's default.
func InitClusterSpec(s swarm.Spec) (*api.ClusterSpec, error) {
	return MergeClusterSpec(s, &api.ClusterSpec{
		Orchestration: &api.OrchestrationConfig{TaskHistoryRetentionLimit: 5},
		Raft:          &api.RaftConfig{SnapshotInterval: 10000, LogEntriesForSlowFollowers: 500, HeartbeatTick: 1, ElectionTick: 10},
		Dispatcher:    &api.DispatcherConfig{HeartbeatPeriod: durationpb.New(5 * time.Second)},
		CaConfig:      &api.CAConfig{NodeCertExpiry: durationpb.New(90 * 24 * time.Hour)},
	})
}

// MergeClusterSpec puts the members of a swarm spec that are not zero over base, which
// it changes and returns: `swarm init` chooses over defaults.
func MergeClusterSpec(s swarm.Spec, base *api.ClusterSpec) (*api.ClusterSpec, error) {
	base.Annotations = storeAnnotations(s.Annotations)
	switch base.Annotations.Name {
	case "":
		base.Annotations.Name = "default"
	case "default":
	default:
		return nil, invalid(`swarm spec must be named "default"`)
	}
	if n := s.Orchestration.TaskHistoryRetentionLimit; n != nil {
		base.Orchestration = &api.OrchestrationConfig{TaskHistoryRetentionLimit: *n}
	}
	mergeRaft(s.Raft, base)
	if s.Dispatcher.HeartbeatPeriod != 0 {
		base.Dispatcher = &api.DispatcherConfig{HeartbeatPeriod: durationpb.New(s.Dispatcher.HeartbeatPeriod)}
	}
	if err := mergeCA(s.CAConfig, base); err != nil {
		return nil, err
	}
	if s.TaskDefaults.LogDriver != nil {
		base.TaskDefaults = &api.TaskDefaults{LogDriver: storeDriver(s.TaskDefaults.LogDriver)}
	}
	base.EncryptionConfig = &api.EncryptionConfig{AutoLockManagers: s.EncryptionConfig.AutoLockManagers}
	return base, nil
}

func mergeRaft(r swarm.RaftConfig, base *api.ClusterSpec) {
	if r == (swarm.RaftConfig{}) {
		return
	}
	if base.Raft == nil {
		base.Raft = new(api.RaftConfig)
	}
	if r.SnapshotInterval != 0 {
		base.Raft.SnapshotInterval = r.SnapshotInterval
	}
	if r.KeepOldSnapshots != nil {
		base.Raft.KeepOldSnapshots = *r.KeepOldSnapshots
	}
	if r.LogEntriesForSlowFollowers != 0 {
		base.Raft.LogEntriesForSlowFollowers = r.LogEntriesForSlowFollowers
	}
	if r.HeartbeatTick != 0 {
		base.Raft.HeartbeatTick = uint32(r.HeartbeatTick)
	}
	if r.ElectionTick != 0 {
		base.Raft.ElectionTick = uint32(r.ElectionTick)
	}
}

func mergeCA(c swarm.CAConfig, base *api.ClusterSpec) error {
	if c.NodeCertExpiry == 0 && c.SigningCACert == "" && c.SigningCAKey == "" && c.ForceRotate == 0 && len(c.ExternalCAs) == 0 {
		return nil
	}
	if base.CaConfig == nil {
		base.CaConfig = new(api.CAConfig)
	}
	if c.NodeCertExpiry != 0 {
		base.CaConfig.NodeCertExpiry = durationpb.New(c.NodeCertExpiry)
	}
	if c.SigningCACert != "" {
		base.CaConfig.SigningCaCert = []byte(c.SigningCACert)
	}
	if c.SigningCAKey != "" {
		base.CaConfig.SigningCaKey = []byte(c.SigningCAKey)
	}
	base.CaConfig.ForceRotate = c.ForceRotate
	for _, ca := range present(c.ExternalCAs) {
		protocol, err := enum[api.ExternalCA_CAProtocol](api.ExternalCA_CAProtocol_value, string(ca.Protocol), "protocol")
		if err != nil {
			return err
		}
		base.CaConfig.ExternalCas = append(base.CaConfig.ExternalCas, &api.ExternalCA{
			Protocol: protocol, Url: ca.URL, Options: maps.Clone(ca.Options), CaCert: []byte(ca.CACert),
		})
	}
	return nil
}

// DockerSwarm returns what clients read of the cluster, join tokens included.
func DockerSwarm(c *api.Cluster) swarm.Swarm {
	ca := c.GetRootCa()
	out := swarm.Swarm{
		ClusterInfo: swarm.ClusterInfo{
			ID: c.GetId(), Meta: meta(c.GetMeta()), Spec: dockerClusterSpec(c.GetSpec()),
			TLSInfo: tlsInfo(ca), RootRotationInProgress: ca.GetRootRotation() != nil,
			DefaultAddrPool: each(c.GetDefaultAddressPool(), func(s string) netip.Prefix { return prefix(s) }),
			SubnetSize:      c.GetSubnetSize(), DataPathPort: c.GetVXLANUDPPort(),
		},
		JoinTokens: swarm.JoinTokens{Worker: ca.GetJoinTokens().GetWorker(), Manager: ca.GetJoinTokens().GetManager()},
	}
	return out
}

// tlsInfo tells the root that nodes trust and the issuer that they should have: the new
// root while one is being rotated to.
func tlsInfo(ca *api.RootCA) swarm.TLSInfo {
	info := swarm.TLSInfo{TrustRoot: string(ca.GetCaCert())}
	wanted := ca.GetCaCert()
	if ca.GetRootRotation() != nil {
		wanted = ca.GetRootRotation().GetCaCert()
	}
	if block, _ := pem.Decode(wanted); block != nil {
		if cert, err := x509.ParseCertificate(block.Bytes); err == nil {
			info.CertIssuerSubject, info.CertIssuerPublicKey = cert.RawSubject, cert.RawSubjectPublicKeyInfo
		}
	}
	return info
}

func dockerClusterSpec(s *api.ClusterSpec) swarm.Spec {
	return swarm.Spec{
		Annotations:   dockerAnnotations(s.GetAnnotations()),
		Orchestration: swarm.OrchestrationConfig{TaskHistoryRetentionLimit: new(s.GetOrchestration().GetTaskHistoryRetentionLimit())},
		Raft: swarm.RaftConfig{
			SnapshotInterval: s.GetRaft().GetSnapshotInterval(), KeepOldSnapshots: new(s.GetRaft().GetKeepOldSnapshots()),
			LogEntriesForSlowFollowers: s.GetRaft().GetLogEntriesForSlowFollowers(),
			HeartbeatTick:              int(s.GetRaft().GetHeartbeatTick()), ElectionTick: int(s.GetRaft().GetElectionTick()),
		},
		Dispatcher: swarm.DispatcherConfig{HeartbeatPeriod: s.GetDispatcher().GetHeartbeatPeriod().AsDuration()},
		CAConfig: swarm.CAConfig{
			NodeCertExpiry: s.GetCaConfig().GetNodeCertExpiry().AsDuration(), ForceRotate: s.GetCaConfig().GetForceRotate(),
			ExternalCAs: each(s.GetCaConfig().GetExternalCas(), func(e *api.ExternalCA) *swarm.ExternalCA {
				return &swarm.ExternalCA{
					Protocol: swarm.ExternalCAProtocol(word(e.GetProtocol())), URL: e.GetUrl(),
					Options: maps.Clone(e.GetOptions()), CACert: string(e.GetCaCert()),
				}
			}),
		},
		TaskDefaults:     swarm.TaskDefaults{LogDriver: dockerDriver(s.GetTaskDefaults().GetLogDriver())},
		EncryptionConfig: swarm.EncryptionConfig{AutoLockManagers: s.GetEncryptionConfig().GetAutoLockManagers()},
	}
}
