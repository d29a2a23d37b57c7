package ops

import (
	"context"
	"slices"

	"github.com/skep-dev/skep/api"
	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/core/pki"
	"github.com/skep-dev/skep/core/store"
)

// What a cluster shows where nothing was chosen at init.
const (
	defaultPool       = "10.0.0.0/8"
	defaultSubnetSize = 24
	defaultVXLANPort  = 4789
)

// redactCluster returns the cluster without keys and with the defaults filled in.
func redactCluster(old *api.Cluster) *api.Cluster {
	c := model.Clone(old)
	c.UnlockKeys, c.NetworkBootstrapKeys = nil, nil
	if ca := c.GetRootCa(); ca != nil {
		ca.CaKey = nil
		if ca.RootRotation != nil {
			ca.RootRotation.CaKey = nil
		}
	}
	if ca := c.GetSpec().GetCaConfig(); ca != nil {
		ca.SigningCaCert, ca.SigningCaKey = nil, nil
	}
	if len(c.GetDefaultAddressPool()) == 0 {
		c.DefaultAddressPool = []string{defaultPool}
	}
	if c.GetSubnetSize() == 0 {
		c.SubnetSize = defaultSubnetSize
	}
	if c.GetVXLANUDPPort() == 0 {
		c.VXLANUDPPort = defaultVXLANPort
	}
	return c
}

// GetCluster returns the cluster without its keys.
func (o *Ops) GetCluster(ctx context.Context, req *api.GetClusterRequest) (*api.GetClusterResponse, error) {
	if err := needID(req.GetClusterId()); err != nil {
		return nil, fail(err)
	}
	state, err := o.state.Read(ctx)
	if err != nil {
		return nil, fail(err)
	}
	c := state.Cluster()
	if c == nil || c.GetId() != req.GetClusterId() {
		return nil, fail(notFound("cluster", req.GetClusterId()))
	}
	return &api.GetClusterResponse{Cluster: redactCluster(c)}, nil
}

// ListClusters returns the cluster, if it matches, without its keys.
func (o *Ops) ListClusters(ctx context.Context, req *api.ListClustersRequest) (*api.ListClustersResponse, error) {
	resp := new(api.ListClustersResponse)
	state, err := o.state.Read(ctx)
	if err != nil {
		return nil, fail(err)
	}
	if c := state.Cluster(); c != nil {
		a := c.GetSpec().GetAnnotations()
		if matchNamed(req.GetFilters(), c.GetId(), a.GetName(), a.GetLabels()) {
			resp.Clusters = append(resp.Clusters, redactCluster(c))
		}
	}
	return resp, nil
}

// UpdateCluster replaces the cluster's spec and rotates join tokens.
func (o *Ops) UpdateCluster(ctx context.Context, req *api.UpdateClusterRequest) (*api.UpdateClusterResponse, error) {
	if err := needUpdate(req.GetClusterId(), req.GetClusterVersion(), req.GetSpec() != nil); err != nil {
		return nil, fail(err)
	}
	if err := validateCluster(req.GetSpec()); err != nil {
		return nil, fail(err)
	}
	root, err := o.planRoot(ctx, req)
	if err != nil {
		return nil, fail(err)
	}
	var updated *api.Cluster
	err = o.update(ctx, func(tx *store.Tx) error {
		old := tx.Snapshot().Cluster()
		if old == nil || old.GetId() != req.GetClusterId() {
			return notFound("cluster", req.GetClusterId())
		}
		updated = model.Clone(old)
		updated.Meta = at(old.GetMeta(), req.GetClusterVersion())
		updated.Spec = model.Clone(req.GetSpec())
		if err := adoptRoot(updated, old, root); err != nil {
			return err
		}
		if err := o.rotateTokens(updated, req.GetRotation()); err != nil {
			return err
		}
		if err := o.lock(updated, req.GetRotation().GetManagerUnlockKey()); err != nil {
			return err
		}
		if rotateLabel(old) != rotateLabel(updated) {
			if err := pki.AskRotation(tx, o.random, pki.RotateAll); err != nil {
				return err
			}
		}
		purgeBlacklist(updated, tx.Now())
		return tx.Update(updated)
	})
	if err != nil {
		return nil, fail(err)
	}
	return &api.UpdateClusterResponse{Cluster: redactCluster(updated)}, nil
}

// rotateLabel is what a change of asks for other keys of encrypted networks.
func rotateLabel(c *api.Cluster) string {
	return c.GetSpec().GetAnnotations().GetLabels()[model.RotateLabel]
}

func validateCluster(spec *api.ClusterSpec) error {
	if d := spec.GetCaConfig().GetNodeCertExpiry(); d != nil && d.AsDuration() < pki.MinExpiry {
		return invalid("minimum certificate expiry time is: %s", pki.MinExpiry)
	}
	if which, on := spec.GetAnnotations().GetLabels()[model.EncryptLabel]; on && which != model.EncryptAll {
		return invalid("label %s=%s of the swarm: it is %s, or the swarm does not have it", model.EncryptLabel, which, model.EncryptAll)
	}
	if spec.GetDispatcher().GetHeartbeatPeriod().AsDuration() < 0 {
		return invalid("heartbeat time period cannot be a negative duration")
	}
	return nil
}

// lock gives the managers an unlock key, another one if rotate is set, or takes it away, as
// the cluster's spec says.
func (o *Ops) lock(c *api.Cluster, rotate bool) error {
	on, has := c.GetSpec().GetEncryptionConfig().GetAutoLockManagers(), pki.ManagersKEK(c) != nil
	if on == has && (!on || !rotate) {
		return nil
	}
	c.UnlockKeys = slices.DeleteFunc(c.UnlockKeys, func(k *api.EncryptionKey) bool { return k.GetSubsystem() == pki.ManagerRole })
	if !on {
		return nil
	}
	kek, err := pki.NewKEK(o.random)
	if err != nil {
		return err
	}
	c.UnlockKeys = append(c.UnlockKeys, &api.EncryptionKey{Subsystem: pki.ManagerRole, Key: kek})
	return nil
}

// rotateTokens gives the chosen roles new tokens for the present root.
func (o *Ops) rotateTokens(c *api.Cluster, rotation *api.KeyRotation) error {
	tokens := c.GetRootCa().GetJoinTokens()
	if tokens == nil {
		return nil
	}
	for _, t := range []struct {
		rotate bool
		token  *string
	}{{rotation.GetWorkerJoinToken(), &tokens.Worker}, {rotation.GetManagerJoinToken(), &tokens.Manager}} {
		if !t.rotate {
			continue
		}
		var err error
		if *t.token, err = pki.NewToken(o.random, c.GetRootCa().GetCaCert(), c.GetFips()); err != nil {
			return err
		}
	}
	return nil
}
